"""The sample images: reproducible, balanced, hard for raw pixels, and written whole or not at all."""

import json
import re
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdino.data import samples, tool
from fastdino.data.samples import CLASSES, SIZE, draw_sample, render_samples


@cache
def drawn(split: str, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (n, s, s, 3) in 0 to 255, masks (n, s, s) bool and labels (n,)."""
    images, masks, labels = zip(*(draw_sample(0, split, i) for i in range(n)), strict=True)
    return np.stack(images).astype(np.float32), np.stack(masks) > 0, np.array(labels)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_settings_give_the_same_bytes_and_the_seed_changes_every_image(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert render_samples(tmp_path / name, seed=seed, train=24, val=8)
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert not any(a[name] == c[name] for name in a if name.endswith(".jpg"))
    images = [data for name, data in a.items() if name.endswith(".jpg")]
    assert len(set(images)) == len(images)  # train and val share none either


def test_a_sample_depends_on_seed_split_and_index_alone(tmp_path: Path) -> None:
    """Not on how many samples there are, nor on which thread drew it after which."""
    render_samples(tmp_path / "few", train=16, val=8)
    render_samples(tmp_path / "more", train=40, val=16)
    few, more = files(tmp_path / "few"), files(tmp_path / "more")
    few.pop("samples.json")
    assert few == {name: more[name] for name in few}


def test_folders_hold_balanced_classes_and_train_holds_images_only(tmp_path: Path) -> None:
    render_samples(tmp_path / "s", train=32, val=16, size=48)
    for split, n in (("train", 4), ("val", 2)):
        images = sorted(p.relative_to(tmp_path / "s" / split) for p in (tmp_path / "s" / split).rglob("*.*"))
        assert images == [Path(c, f"{i:04d}.jpg") for c in CLASSES for i in range(n)]
        masks = tmp_path / "s" / "masks" / split
        found = sorted(p.relative_to(masks) for p in masks.rglob("*.*"))
        assert found == [p.with_suffix(".png") for p in images]
    with Image.open(tmp_path / "s/train/star/0001.jpg") as image:
        assert (image.mode, image.size, image.format) == ("RGB", (48, 48), "JPEG")
    with Image.open(tmp_path / "s/masks/train/star/0001.png") as mask:
        assert (mask.mode, mask.size) == ("L", (48, 48))
        assert set(np.unique(np.asarray(mask))) == {0, 255}


def test_the_mask_covers_the_object_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"GRAIN": (), "SENSOR": 0.0, "FADE": 0.0, "EXPOSURE": (1.0, 1.0)}.items():
        monkeypatch.setattr(samples, name, value)
    for index in range(4 * len(CLASSES)):
        image, mask, _ = draw_sample(0, "val", index)
        painted = (
            np.abs(np.asarray(image, np.float32) - samples.GROUND).max(-1) > 1
        )  # all else is even ground
        inside = np.asarray(mask) > 0
        # the rest is even
        assert (painted & inside).sum() > 0.85 * inside.sum()
        rim = inside.copy()
        for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
            rim |= np.roll(inside, step, axis)
        for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
            rim |= np.roll(rim, step, axis)
        assert not (painted & ~rim).any()


def test_place_size_and_rotation_vary() -> None:
    _, masks, labels = drawn("train", 400)
    middle = np.arange(SIZE) - (SIZE - 1) / 2
    weight = masks.sum((1, 2))
    cx, cy = (masks.sum(axis) @ middle / weight for axis in (1, 2))
    assert min(cx.std(), cy.std()) > SIZE / 16
    assert abs(cx.mean()) < SIZE / 32
    assert abs(cy.mean()) < SIZE / 32
    assert 0.1 < masks.mean((1, 2)).min() < 0.25 < 0.5 < masks.mean((1, 2)).max() < 0.7
    # The cross's arms, from fourth-order symmetry, point everywhere.
    x, y = middle[None, None, :] - cx[:, None, None], middle[None, :, None] - cy[:, None, None]
    turned = (masks * np.exp(4j * np.arctan2(y, x)) * np.hypot(x, y) ** 2).sum((1, 2))
    angles = np.angle(turned[labels == CLASSES.index("cross")])
    assert np.histogram(angles, 4, (-np.pi, np.pi))[0].min() >= 5


def test_classes_share_the_tones() -> None:
    """Striped and checked objects are as bright as the ground; the star is lighter, the crescent darker."""
    images, _, labels = drawn("train", 800)
    tone = np.array([images[labels == c].mean() for c in range(len(CLASSES))])
    plain = [i for i, name in enumerate(CLASSES) if name not in ("star", "crescent")]
    assert np.ptp(tone[plain]) < 12  # levels of 255
    assert tone.argmax() == CLASSES.index("star")
    assert tone.argmin() == CLASSES.index("crescent")


def knn(train: np.ndarray, train_labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray) -> float:
    """Accuracy of the vote of 20 neighbours weighted by exp(cosine / 0.07)."""
    train, val = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, val))
    similarity = val @ train.T
    nearest = np.argsort(-similarity, axis=1)[:, :20]
    votes = np.zeros((len(val), len(CLASSES)))
    for i, row in enumerate(nearest):
        np.add.at(votes[i], train_labels[row], np.exp(similarity[i, row] / 0.07))
    return float((votes.argmax(1) == val_labels).mean())


def pixels(images: np.ndarray) -> np.ndarray:
    small = images[:, 4:44, 4:44].reshape(-1, 20, 2, 20, 2, 3).mean((2, 4)) / 127.5 - 1
    return small.reshape(len(small), -1)


def test_raw_pixels_say_little_about_the_class() -> None:
    (train, _, a), (val, _, b) = drawn("train", 1600), drawn("val", 400)
    assert knn(pixels(train), a, pixels(val), b) < 0.45


def test_a_finished_folder_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "new" / "samples"
    assert render_samples(out, train=8, val=8)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert not render_samples(out, train=8, val=8)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    assert render_samples(tmp_path, train=8, val=8)
    assert (tmp_path / "train" / "gear" / "0000.jpg").is_file()


def _other_settings(out: Path) -> None:
    render_samples(out, seed=3, train=16, val=8)


def _other_version(out: Path) -> None:
    render_samples(out, train=8, val=8)
    settings = json.loads((out / "samples.json").read_text())
    (out / "samples.json").write_text(json.dumps(settings | {"version": 0}))


def _lost_file(out: Path) -> None:
    render_samples(out, train=8, val=8)
    (out / "masks/val/star/0000.png").unlink()


def _own_pictures(out: Path) -> None:
    out.mkdir()
    (out / "holiday.jpg").write_bytes(b"mine")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (_other_settings, "other settings (seed 3 not 0, train 16 not 8): give another folder or delete it"),
        (_other_version, "other settings (version 0 not 1)"),
        (_lost_file, f"has lost {Path('masks/val/star/0000.png')}: delete"),
        (_own_pictures, "holds other files: give a new or empty folder"),
        (lambda out: out.write_text("text"), "is a file: give a new folder"),
    ],
)
def test_anything_else_is_refused_and_left_alone(
    tmp_path: Path, prepare: Callable[[Path], object], message: str
) -> None:
    out = tmp_path / "out"
    prepare(out)
    before = files(tmp_path)
    with pytest.raises(FileExistsError, match=re.escape(message)):
        render_samples(out, train=8, val=8)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": 7}, "train 7: give 8 or more"),
        ({"val": 0}, "val 0: give 8 or more"),
        ({"size": 16}, "size 16: give 32 or more"),
        ({"seed": -1}, "seed -1: give 0 or more"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_samples(tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_rendering_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(seed: int, split: str, index: int, size: int = 64) -> tuple[Image.Image, Image.Image, int]:
        assert not (tmp_path / "out").exists()
        if index == 9:
            raise KeyboardInterrupt
        return draw_sample(seed, split, index, size)

    monkeypatch.setattr(samples, "draw_sample", fail)
    with pytest.raises(KeyboardInterrupt):
        render_samples(tmp_path / "out", train=16, val=8)
    assert not list(tmp_path.iterdir())


def test_of_two_renderings_at_once_the_second_keeps_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "elsewhere"
    render_samples(other, train=8, val=8)
    calls = []

    def draw(seed: int, split: str, index: int, size: int = 64) -> tuple[Image.Image, Image.Image, int]:
        if not calls:
            calls.append(index)
            other.rename(tmp_path / "out")  # the other one finishes meanwhile
        return draw_sample(seed, split, index, size)

    monkeypatch.setattr(samples, "draw_sample", draw)
    assert not render_samples(tmp_path / "out", train=8, val=8)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_command_says_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def run(*arguments: str) -> int | str | None:
        monkeypatch.setattr("sys.argv", ["fastdino-data", "samples", str(out), *arguments])
        with pytest.raises(SystemExit) as caught:
            tool.main()
        return caught.value.code

    handler = signal.getsignal(signal.SIGTERM)  # the command sets another, as if it were a process of its own
    try:
        assert run("--train", "8", "--val", "8", "--seed", "2") == 0
        assert capsys.readouterr().out == f"{out}: 8 + 8 sample images rendered\n"
        assert run("--train", "8", "--val", "8", "--seed", "2") == 0
        assert capsys.readouterr().out == f"{out}: 8 + 8 sample images are there already: kept\n"
        assert "train 8 not 16" in str(run("--train", "16", "--val", "8", "--seed", "2"))
    finally:
        signal.signal(signal.SIGTERM, handler)
