"""Jaccard similarity of attention's masks: by hand on small grids, and `fastdino-eval segmentation`."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastdino import checkpoint
from fastdino.config import Config, CropPolicy, DataConfig, ModelConfig
from fastdino.dino import DINO
from fastdino.eval import segmentation
from fastdino.eval.maps import NamedImage, keep_mass, look
from fastdino.eval.segmentation import (
    SegmentationCommand,
    _patch_of,
    evaluate_segmentation,
    jaccard,
    pair,
    read_mask,
)
from fastdino.vit import vit_nano
from fastdino.weights import load_backbone

CONFIG = Config(
    data=DataConfig(crops=CropPolicy(global_crops_size=16, local_crops_size=8)),
    model=ModelConfig(arch="vit_nano", patch_size=4, out_dim=8, head_hidden_dim=8, bottleneck_dim=4),
)


def grid(text: str) -> Tensor:
    """Rows of 0 and 1, separated by blanks."""
    return torch.tensor([[int(x) for x in row] for row in text.split()]).bool()


def save(path: Path, values: Any, mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(values, dtype=np.uint8))
    if mode == "P":  # the same numbers, as indices of colours
        image.putpalette(list(range(0, 256)) * 3)
    image.save(path)
    return path


# Jaccard.


@pytest.mark.parametrize(
    ("mask", "truth", "counted", "expected"),
    [
        ("1100 1100", "0110 0110", None, 2 / 6),
        ("1100 1100", "1100 1100", None, 1.0),
        ("1100 0000", "0000 0011", None, 0.0),
        ("1111 1111", "0100 0000", None, 1 / 8),
        ("0000 0000", "0100 0000", None, 0.0),
        ("1100 1100", "0110 0110", "1011 1011", 0 / 4),  # the shared column does not count
        ("1100 1100", "0110 0110", "0110 0111", 2 / 4),
        ("1100 1100", "0110 0110", "1111 0000", 1 / 3),
        ("0000 0000", "0000 0000", None, math.nan),
        ("1000 0000", "1000 0000", "0111 1111", math.nan),
    ],
)
def test_jaccard_is_what_it_is_by_hand(mask, truth, counted, expected):
    counted = None if counted is None else grid(counted)
    found = jaccard(torch.stack([grid(mask), ~grid(mask)]), grid(truth), counted)
    assert found.shape == (2,)
    assert found.dtype == torch.float64
    torch.testing.assert_close(float(found[0]), float(expected), equal_nan=True)


# Masks.

VALUES = [[0, 1, 1, 255], [7, 7, 0, 255]]


@pytest.mark.parametrize("mode", ["L", "P"])
@pytest.mark.parametrize(
    ("flags", "truth", "counted"),
    [
        ({}, "0111 1101", "1111 1111"),
        ({"ignore": 255}, "0110 1100", "1110 1110"),
        ({"class_value": 7}, "0000 1100", "1111 1111"),
        ({"class_value": 7, "ignore": 255}, "0000 1100", "1110 1110"),
        ({"class_value": 0, "ignore": 1}, "1000 0010", "1001 1111"),
    ],
)
def test_the_object_is_not_0_or_the_class_that_is_named(mode, flags, truth, counted, tmp_path):
    found = read_mask(save(tmp_path / "m.png", VALUES, mode), **flags)
    assert torch.equal(found[0], grid(truth))
    assert torch.equal(found[1], grid(counted))


def test_masks_of_one_bit_of_sixteen_and_of_equal_colours_are_read(tmp_path):
    truth = grid("0111 1100")
    values = truth.numpy()
    Image.fromarray(values).save(tmp_path / "1.png")
    Image.fromarray(values.astype(np.uint16) * 40_000).save(tmp_path / "16.png")
    Image.fromarray(values[..., None].repeat(3, 2).astype(np.uint8) * 9).save(tmp_path / "rgb.png")
    for name in ("1", "16", "rgb"):
        assert torch.equal(read_mask(tmp_path / f"{name}.png")[0], truth)
    assert torch.equal(read_mask(tmp_path / "16.png", class_value=40_000)[0], truth)


def test_masks_that_cannot_be_understood_are_named(tmp_path):
    Image.new("RGB", (4, 4), (200, 0, 0)).save(tmp_path / "red.png")
    with pytest.raises(ValueError, match=r"red\.png: a mask of colours; give one of gray levels"):
        read_mask(tmp_path / "red.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bad\.png: .*; give masks as PNG"):
        read_mask(tmp_path / "bad.png")


# Where the pixels of a mask lie among the patches.


@pytest.mark.parametrize(
    ("pixels", "resized", "start", "stop", "patch", "inside", "patches"),
    [
        (4, 8, 0, 8, 4, slice(0, 4), [0, 0, 1, 1]),  # middles 1, 3, 5, 7
        (8, 8, 0, 8, 4, slice(0, 8), [0] * 4 + [1] * 4),
        (5, 10, 1, 9, 4, slice(0, 4), [0, 0, 1, 1]),  # middles 1, 3, 5, 7; 9 is where the cut ends
        (10, 10, 1, 9, 4, slice(1, 9), [0] * 4 + [1] * 4),  # the first and the last pixel are cut off
        (20, 10, 1, 9, 4, slice(2, 18), [0] * 8 + [1] * 8),
        (3, 9, 0, 8, 4, slice(0, 3), [0, 1, 1]),  # middles 1.5, 4.5, 7.5
    ],
)
def test_a_pixel_is_of_the_patch_over_its_middle(pixels, resized, start, stop, patch, inside, patches):
    found = _patch_of(pixels, resized, start, stop, patch)
    assert found[0] == inside
    assert found[1].tolist() == patches


class Fixed:
    """What `evaluate_segmentation` asks of a network, with maps that are given."""

    patch_size, num_heads = 4, 2

    def __init__(self, maps: Tensor) -> None:
        self.maps = maps


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(network: Fixed, image: Image.Image, side: int, *rest: object) -> tuple[Image.Image, Tensor]:
        return image, network.maps

    monkeypatch.setattr(segmentation, "look", look)


def named(width: int, height: int, name: str = "a.png") -> NamedImage:
    return NamedImage(name, lambda: Image.new("RGB", (width, height)))


def test_masks_are_compared_at_the_resolution_of_the_objects(fixed, tmp_path):
    """Two patches above two, on an image of 8 x 8 pixels and masks of 8 x 8, 4 x 4 and 16 x 16."""
    # 60 % of the mass: the first head keeps the upper left patch, the second both on the right.
    network: Any = Fixed(torch.tensor([[[0.7, 0.1], [0.1, 0.1]], [[0.1, 0.4], [0.1, 0.4]]]))
    truth = np.zeros((8, 8), np.uint8)
    truth[:4, :6] = 1  # 24 pixels: all 16 of the upper left patch, 8 of the upper right
    for n in (8, 4, 16):
        large = np.kron(truth, np.ones((2, 2), np.uint8)) if n == 16 else truth[:: 8 // n, :: 8 // n]
        path = save(tmp_path / f"{n}.png", large)
        found = evaluate_segmentation(network, [(named(8, 8), path)], CropPolicy(), side=8)
        # 16 of 24, and 8 of 24 + 32 - 8
        np.testing.assert_allclose(found.jaccard, [[16 / 24, 8 / 48]])
    truth[:4, 4:] = 255  # then the upper right patch counts no more: 16 of 16, and 0 of 32
    path = save(tmp_path / "ignored.png", truth)
    found = evaluate_segmentation(network, [(named(8, 8), path)], CropPolicy(), side=8, ignore=255)
    np.testing.assert_allclose(found.jaccard, [[1.0, 0.0]])
    found = evaluate_segmentation(network, [(named(8, 8), path)], CropPolicy(), side=8, share=0.85)
    # Both keep three patches, of equal ones the last; 255 is object where it is not ignored.
    np.testing.assert_allclose(found.jaccard, [[16 / 64, 16 / 64]])


def test_pixels_beyond_the_patches_do_not_count(fixed, tmp_path):
    """Of 12 x 8 pixels, with patches of 4 at 8 pixels nothing is cut; of 10 x 8 a pixel on either side."""
    network: Any = Fixed(torch.tensor([[[0.7, 0.1], [0.1, 0.1]], [[0.1, 0.4], [0.1, 0.4]]]))
    truth = np.zeros((8, 10), np.uint8)
    truth[:4, :5] = 1  # the upper left patch, and a column that is cut off
    truth[:, 9] = 1  # cut off
    found = evaluate_segmentation(
        network, [(named(10, 8), save(tmp_path / "a.png", truth))], CropPolicy(), side=8
    )
    np.testing.assert_allclose(found.jaccard, [[1.0, 0.0]])


def test_images_without_an_object_are_left_out_and_named(fixed, tmp_path):
    network: Any = Fixed(torch.tensor([[[0.7, 0.1], [0.1, 0.1]], [[0.1, 0.4], [0.1, 0.4]]]))
    empty = save(tmp_path / "empty.png", np.zeros((8, 8)))
    full = save(tmp_path / "full.png", np.ones((8, 8)))
    pairs = [(named(8, 8, "x.png"), empty), (named(8, 8, "y.png"), full)]
    found = evaluate_segmentation(network, pairs, CropPolicy(), side=8)
    np.testing.assert_allclose(found.jaccard, [[0.25, 0.5]])
    assert found.left_out == ["x.png"]
    with pytest.raises(ValueError, match="no mask has a pixel whose value is 3"):
        evaluate_segmentation(network, pairs, CropPolicy(), side=8, class_value=3)


def test_a_mask_of_other_proportions_is_refused(fixed, tmp_path):
    network: Any = Fixed(torch.rand(2, 2, 3))
    path = save(tmp_path / "m.png", np.ones((40, 60)))
    with pytest.raises(ValueError, match=r"a mask of 60 x 40 pixels for an image of 40 x 60 \(a\.png\)"):
        evaluate_segmentation(network, [(named(40, 60), path)], CropPolicy(), side=8)
    half = save(tmp_path / "half.png", np.ones((21, 30)))  # of 61 x 41, rounded
    evaluate_segmentation(network, [(named(61, 41), half)], CropPolicy(), side=8)


def test_the_measure_is_that_of_the_networks_own_masks(tmp_path):
    """On rectangular images, against a plain form: the masks enlarged to the image, cropped as it is."""
    rng = np.random.default_rng(0)
    network = vit_nano(4, img_size=16).eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    pairs, expected = [], []
    for i, (width, height) in enumerate([(16, 12), (12, 20), (27, 12)]):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        truth = rng.integers(0, 2, (height, width), dtype=np.uint8)
        pairs.append((NamedImage(f"{i}", lambda image=image: image), save(tmp_path / f"{i}.png", truth)))
        seen, maps = look(network, image, 12, CropPolicy())  # the side is 12: nothing is resized
        left, top = (width - seen.width) // 2, (height - seen.height) // 2
        part = truth[top : top + seen.height, left : left + seen.width].astype(bool)
        row = []
        for one in maps:
            mask = keep_mass(one).numpy().repeat(4, 0).repeat(4, 1)
            row.append((mask & part).sum() / (mask | part).sum())
        expected.append(row)
    found = evaluate_segmentation(network, pairs, CropPolicy(), side=12)
    np.testing.assert_allclose(found.jaccard, expected, rtol=1e-12)


# Which mask is whose.


def test_masks_have_the_names_of_their_images(tmp_path):
    for name in ("a.jpg", "b.png", "cats/a.jpg"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
        save((tmp_path / "masks" / name).with_suffix(".png"), np.ones((8, 8)))
    masks = str(tmp_path / "masks")
    found = {image.name: path.relative_to(masks) for image, path in pair(str(tmp_path / "images"), masks)}
    assert found == {name: Path(name).with_suffix(".png") for name in ("a.jpg", "b.png", "cats/a.jpg")}
    listed = tmp_path / "val.txt"
    listed.write_text("images/b.png\nimages/cats/a.jpg\n")
    # Paths of a text file have other folders: VOC's are JPEGImages/NAME.jpg, its masks in one folder.
    assert [path.name for _, path in pair(str(listed), masks)] == ["b.png", "a.png"]
    (tmp_path / "masks" / "cats" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"no mask for 1 of 3 images: cats/a\.jpg\. An image NAME\.jpg"):
        pair(str(tmp_path / "images"), masks)


# The command.


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with `images` of three sizes, and `masks`, of which the last shows no object."""
    torch.manual_seed(11)  # another than the run's: a trained teacher has not its initial weights
    checkpoint.write_teacher(tmp_path / "teacher.safetensors", DINO(CONFIG).teacher, CONFIG, 1)
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i, (width, height) in enumerate([(40, 40), (50, 40), (40, 60), (40, 40)]):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        mask = np.zeros((height, width), np.uint8)
        mask[5:30, 5 : 10 * i + 15] = i < 3
        mask[0, 0] = 255
        save(tmp_path / "masks" / f"{i}.png", mask)
    return tmp_path


def command(run: Path, **flags: Any) -> SegmentationCommand:
    options = {"images": str(run / "images"), "masks": str(run / "masks"), "ignore": 255, "device": "cpu"}
    return SegmentationCommand(**({"weights": str(run)} | options | flags))


def test_the_table_has_each_head_and_the_best_of_each_image(run: Path, capsys):
    command(run, json=str(run / "out.json"), baselines=True).run()
    pairs = pair(str(run / "images"), str(run / "masks"))
    torch.manual_seed(CONFIG.run.seed)
    untrained: Any = DINO(CONFIG).teacher.backbone
    networks: dict[str, Any] = {"teacher": load_backbone(str(run)), "untrained": untrained.eval()}
    out = capsys.readouterr().out
    lines = [" ".join(line.replace("│", " ").split()) for line in out.splitlines()]
    written = json.loads((run / "out.json").read_text())
    values = {}
    for name, network in networks.items():
        found = evaluate_segmentation(network, pairs, CONFIG.data.crops, side=32, ignore=255)
        assert found.jaccard.shape == (3, 4)
        values[name] = [*(100 * found.jaccard.mean(0)), 100 * found.jaccard.max(1).mean()]
        assert written[name]["heads"] == pytest.approx(values[name][:-1])
        assert written[name]["best_head"] == pytest.approx(values[name][-1])
    assert values["teacher"] != values["untrained"]
    rows = [*(f"head {i}" for i in range(1, 5)), "best head of each image"]
    for i, row in enumerate(rows):
        assert f"{row} {values['teacher'][i]:.1f} {values['untrained'][i]:.1f}" in lines
    assert lines[0] == (
        "Jaccard similarity in %: attention's masks (60 % of it) and the objects' of 3 images of "
        f"{run / 'images'}, shorter side 32"
    )
    assert "left out, no object in their masks: 1 images: 3.png" in lines
    settings = {"images": 3, "left_out": ["3.png"], "threshold": 0.6, "image_size": 32}
    assert {name: written[name] for name in settings} == settings


def test_flags_change_what_is_measured(run: Path, capsys):
    results = []
    for flags in ({}, {"image_size": 19}, {"threshold": 0.9}, {"class_value": 255, "ignore": None}):
        command(run, json=str(run / "out.json"), **flags).run()
        results.append(json.loads((run / "out.json").read_text()))
    assert [r["image_size"] for r in results] == [32, 16, 32, 32]  # whole patches
    assert [r["images"] for r in results] == [3, 3, 3, 4]  # the corner of 255 is in each
    assert len({r["teacher"]["best_head"] for r in results}) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"threshold": 0.0}, "--threshold 0.0: give a share"),
        ({"threshold": 60.0}, "--threshold 60.0: give a share"),
        ({"image_size": -1}, "--image-size -1"),
        ({"image_size": 3}, "--image-size 3: the network's patches have 4 pixels"),
        ({"masks": "nowhere"}, "--masks nowhere: no such folder"),
        ({"masks": "empty"}, "no mask for 4 of 4 images: 0.png, 1.png, 2.png, 3.png"),
        ({"images": "empty"}, "no files in it"),
        ({"json": "nowhere/out.json"}, "no folder nowhere"),
        ({"weights": "backbone.pth", "baselines": True}, "--baselines needs the weights of a run"),
    ],
)
def test_what_cannot_be_is_refused(flags, message, run: Path, monkeypatch: pytest.MonkeyPatch):
    (run / "empty").mkdir()
    torch.save(load_backbone(str(run)).state_dict(), run / "backbone.pth")
    monkeypatch.chdir(run)
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        command(run, **flags).run()


def test_an_image_that_cannot_be_read_is_named(run: Path):
    (run / "images" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1\.png: not a JPEG.*; give images that can be read"):
        command(run).run()
