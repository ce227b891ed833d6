"""Pictures of attention, and `fastdino-eval attention`."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_runs import ATTENTION_CONFIG as CONFIG
from eval_runs import make_attention_run, photo
from PIL import Image

from fastdino.config import CropPolicy
from fastdino.data import crops
from fastdino.eval import attention, maps
from fastdino.eval.attention import AttentionCommand, panels, plot_attention, sheet
from fastdino.eval.maps import look
from fastdino.vit import vit_nano
from fastdino.weights import load_backbone

POLICY = CropPolicy(global_crops_size=16, local_crops_number=0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_attention_run(tmp_path)


def command(run: Path, **flags: Any) -> AttentionCommand:
    return AttentionCommand(**({"weights": str(run), "device": "cpu"} | flags))


# Panels: two heads over 2 x 3 patches of 4 pixels.

PATCHES = torch.tensor([[[8, 0, 0], [4, 2, 2]], [[0, 0, 8], [2, 2, 4]]]) / 16
INFERNO = {0.0: (0, 0, 3), 1.0: (252, 254, 164)}  # the ends of the colour map


def at(panel: np.ndarray) -> np.ndarray:
    """The pixel within each patch: (2, 3, 3)."""
    assert panel.dtype == np.uint8
    return panel[2::4, 1::4].astype(int)


def test_panels_are_the_image_the_mean_and_each_head():
    image = photo(12, 8)
    (row,) = panels(image, PATCHES, heads=2)
    assert len(row) == 4
    assert {panel.shape for panel in row} == {(8, 12, 3)}
    assert np.array_equal(row[0], np.asarray(image))
    for panel in row[1:]:
        assert np.array_equal(panel, at(panel).repeat(4, 0).repeat(4, 1))  # squares
    for panel, brightest, darkest in ((row[2], (0, 0), (0, 1)), (row[3], (0, 2), (0, 0))):
        np.testing.assert_allclose(at(panel)[brightest], INFERNO[1.0], atol=1)
        np.testing.assert_allclose(at(panel)[darkest], INFERNO[0.0], atol=1)
    # The mean's patches are 4 0 4 / 3 2 3: equal values have equal colours, brighter ones more light.
    light = at(row[1]).sum(-1)
    assert light[0, 0] == light[0, 2] > light[1, 0] == light[1, 2] > light[1, 1] > light[0, 1]
    assert [len(row) for row in panels(image, PATCHES, heads=1)] == [3]
    assert [len(row) for row in panels(image, PATCHES, heads=6)] == [4]
    assert [len(row) for row in panels(image, PATCHES, heads=0, share=0.6)] == [2, 2]


def test_masks_shine_through_and_have_outlines():
    image = Image.new("RGB", (120, 80), (100, 100, 100))
    _, (together, mean, first, second) = panels(image, PATCHES, heads=2, share=0.75)
    one, two = attention.COLOURS[:2]
    # 12 of 16: the first head keeps 8 and 4, the second 8 and 4; the mean 4, 4, 3, 3 (the 2 goes: 14 of 16).
    for panel, kept in ((first, {(0, 0): one, (1, 0): one}), (second, {(0, 2): two, (1, 2): two})):
        for i in range(2):
            for j in range(3):
                patch = panel[40 * i : 40 * (i + 1), 40 * j : 40 * (j + 1)]
                if (i, j) in kept:
                    mixed = 0.45 * 100 + 0.55 * np.array(kept[i, j])
                    np.testing.assert_allclose(patch[20, 20], mixed, atol=1)
                    assert any(tuple(pixel) == kept[i, j] for pixel in patch[:, [0, -1]].reshape(-1, 3))
                else:
                    assert (patch == 55).all()  # darker
    assert (first[36:44, 10] == first[20, 20]).all()  # no line between patches of one mask
    seen = {tuple(together[20 + 40 * i, 20 + 40 * j]) for i, j in ((0, 0), (1, 0))}
    assert seen == {tuple(first[20, 20])}
    assert np.array_equal(together[:, 80:], second[:, 80:])
    assert (mean[:40, 40:80] == 55).all()
    assert (mean[60, [20, 100], 0] == 185).all()  # 0.45 * 100 + 0.55 * 255


def test_a_patch_of_two_heads_has_the_colour_of_the_stronger():
    maps = torch.tensor([[[0.6, 0.2]], [[0.5, 0.4]]])
    _, (together, *_) = panels(Image.new("RGB", (80, 40)), maps, heads=0, share=1.0)
    for x, colour in ((20, attention.COLOURS[0]), (60, attention.COLOURS[1])):
        np.testing.assert_allclose(together[20, x], 0.55 * np.array(colour), atol=1)


def test_maps_over_the_image_leave_it_visible():
    image = photo(12, 8)
    ((_, plain, *_), (_, over, *_)) = (panels(image, PATCHES, 2, over=o)[0] for o in (False, True))
    assert not np.array_equal(plain, over)
    # 0.3 of the darkest colour on the gray image where there is no attention
    gray = np.asarray(image)[:4, 4:8].mean(-1, keepdims=True)
    np.testing.assert_allclose(over[:4, 4:8], 0.7 * gray + 0.3 * np.array(INFERNO[0.0]), atol=1.5)


def test_a_sheet_has_each_panel_in_its_place_in_proportion():
    wide = np.full((30, 60, 3), (255, 0, 0), np.uint8)
    tall = np.full((90, 30, 3), (0, 0, 255), np.uint8)
    picture = np.asarray(sheet([[[wide, wide]], [[tall, tall]]], ["a", "b"], [], cell=60))
    assert picture.shape[1] == 8 + 2 * 68
    for colour, width, height in (((255, 0, 0), 60, 30), ((0, 0, 255), 30, 90)):
        ys, xs = (picture == colour).all(-1).nonzero()
        assert len(ys) == 2 * width * height
        assert ys.max() - ys.min() + 1 == height
        assert xs.max() - xs.min() + 1 == 68 + width


# The trainer's picture.


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("patch", [4, 5])  # 32 pixels are no multiple of 5: 30 are shown
def test_the_trainers_picture_opens_and_needs_no_display(n, patch, tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it raises
    network, path = vit_nano(patch, img_size=16).eval(), tmp_path / "attention.png"
    images = [photo(33, 20 + 3 * i, i) for i in range(n)]
    assert plot_attention(network, images, POLICY, path) == path
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        # image, mean and four heads, of two images side by side
        assert image.width == 8 + 108 * 6 * min(n, 2)
        assert image.height == 38 + 116 * ((n + 1) // 2)
        assert len(image.getcolors(1 << 24)) > 100
    assert [p.name for p in tmp_path.iterdir()] == ["attention.png"]


def test_the_trainers_picture_shows_images_at_twice_the_training_size(tmp_path, monkeypatch):
    shown, given = [], []
    monkeypatch.setattr(maps, "attention_maps", lambda n, x: given.append(x) or torch.rand(1, 8, 8, 8))
    monkeypatch.setattr(attention, "panels", lambda image, *args: shown.append(image) or panels(image, *args))
    images = [photo(33, 20), photo(60, 90)]
    plot_attention(vit_nano(4, img_size=16), images, POLICY, tmp_path / "a.png")
    for image, large, x in zip(images, shown, given, strict=True):
        seen = crops.eval_image(image, 32)  # as fastdino-eval would crop it
        expected = (np.asarray(seen, dtype=np.float64) / 255 - POLICY.mean) / POLICY.std
        np.testing.assert_allclose(x[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)
        assert large.size == (224, 224)
    assert Image.open(tmp_path / "a.png").width == 8 + 108 * 2 * 8  # at most six of eight heads


# The command.


def test_the_picture_has_a_row_of_maps_and_one_of_masks_for_each_image(run: Path, capsys):
    out = run / "out.png"
    command(run, images=(str(run / "images"),), out=str(out)).run()
    assert capsys.readouterr().out.split() == [str(out)]
    with Image.open(out) as picture:
        # The sizes seen at 32 pixels: 40 x 32, 32 x 64 (of 68), 32 x 32; higher than 1.5 widths are narrower.
        heights = [160, 300, 200]
        assert picture.size == (30 + 208 * 6, 38 + sum(2 * (h + 8) + 8 for h in heights))
    (run / "images" / "2.png").write_bytes(b"no image")  # images that are not shown are not read
    small = run / "small.png"
    command(run, images=(str(run / "images"),), out=str(small), rows=1, heads=1, threshold=0).run()
    assert capsys.readouterr().out.split("\n")[0] == f"{small}: 1 of 3 images, evenly spread (--rows)"
    with Image.open(small) as picture:
        assert picture.size == (8 + 208 * 3, 38 + 160 + 8 + 8)


def test_each_map_can_be_a_file_of_its_own(run: Path):
    folder, network = run / "maps", load_backbone(str(run))
    one = str(run / "images" / "1.png")
    command(
        run, images=(str(run / "images"), one), out=str(run / "o.png"), separate=str(folder), rows=1
    ).run()
    assert sorted(p.name for p in folder.iterdir()) == ["0-0", "1-1", "2-2", "3-1"]
    names = ["mean", "head-1", "head-2", "head-3", "head-4"]
    for number, name in enumerate(("0", "1", "2", "1")):
        image = Image.open(run / "images" / f"{name}.png")
        seen, maps = look(network, image, 32, CONFIG.data.crops)
        expected = panels(seen, maps, 4, 0.6)
        files = [["image", *names], ["masks", *(f"{n}-mask" for n in names)]]
        place = folder / f"{number}-{name}"
        assert {p.stem for p in place.iterdir()} == {*files[0], *files[1]}
        for row, its in zip(expected, files, strict=True):
            for panel, file in zip(row, its, strict=True):
                assert np.array_equal(np.asarray(Image.open(place / f"{file}.png")), panel)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "give either --images PATH... or --video PATH"),
        ({"images": ("a.png",), "video": "b.mp4"}, "give either --images"),
        ({"images": ("nowhere.png",)}, "nowhere.png: no such file"),
        ({"images": ("nowhere",)}, "nowhere: no such folder"),
        ({"images": ("RUN/empty",)}, "no files in it"),
        ({"images": ("RUN/images/0.png",), "out": "a.jpg"}, "--out a.jpg: give a name that ends in .png"),
        ({"images": ("RUN/images/0.png",), "out": "no/a.png"}, "no folder no"),
        ({"images": ("RUN/images/0.png",), "image_size": 3}, "--image-size 3: the network's patches have 4"),
        ({"images": ("RUN/images/0.png",), "threshold": 60.0}, "--threshold 60.0"),
        ({"images": ("RUN/images/0.png",), "heads": -1}, "--heads -1"),
        ({"video": "nowhere.mp4"}, "--video nowhere.mp4: no such file"),
        ({"video": "RUN/empty"}, "no files in it"),
        ({"video": "RUN/teacher.safetensors"}, "not a video that can be read"),
        ({"video": "RUN/images", "out": "a.avi"}, "--out a.avi: give a name that ends in .mp4"),
        ({"video": "RUN/images", "separate": "x"}, "--separate is for --images"),
        ({"video": "RUN/images"}, "frame 1 becomes 64 x 68 pixels, those before it 80 x 32"),
    ],
)
def test_what_cannot_be_is_refused(flags, message, run: Path, monkeypatch: pytest.MonkeyPatch):
    if "video" in flags:
        pytest.importorskip("av")
    (run / "empty").mkdir()
    monkeypatch.chdir(run)
    flags = {
        name: tuple(x.replace("RUN", str(run)) for x in value)
        if isinstance(value, tuple)
        else value.replace("RUN", str(run))
        if isinstance(value, str)
        else value
        for name, value in flags.items()
    }
    before = sorted(run.iterdir())
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        command(run, **flags).run()
    assert sorted(run.iterdir()) == before  # nothing is left half written


def test_a_network_without_attention_is_refused(run: Path):
    from torchvision.models import resnet18

    torch.save(resnet18().state_dict(), run / "resnet.pth")
    refusal = r"resnet\.pth: a ResNet has no class token .* give weights of a ViT"
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match=refusal):
        command(run, weights=str(run / "resnet.pth"), images=(str(run / "images"),)).run()
