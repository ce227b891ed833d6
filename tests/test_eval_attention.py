"""Maps of attention: which weights they are, where on the image they lie, their pictures and their video."""

import re
import struct
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import checkpoint
from fastdino.config import Config, CropPolicy, DataConfig, ModelConfig
from fastdino.data import crops
from fastdino.dino import DINO
from fastdino.eval import attention
from fastdino.eval.attention import (
    Attention,
    attention_maps,
    fit,
    keep_mass,
    load,
    look,
    open_film,
    panels,
    plot_attention,
    sheet,
    tile,
    write_film,
)
from fastdino.vit import VisionTransformer, vit_nano, vit_small
from fastdino.weights import load_backbone

POLICY = CropPolicy(global_crops_size=16, local_crops_number=0)
CONFIG = Config(
    data=DataConfig(crops=CropPolicy(global_crops_size=16, local_crops_size=8, mean=(0.4, 0.5, 0.6))),
    model=ModelConfig(arch="vit_nano", patch_size=4, out_dim=8, head_hidden_dim=8, bottleneck_dim=4),
)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Something smooth, as video codecs want it."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, and in `images` three of different sizes."""
    checkpoint.write_teacher(tmp_path / "teacher.safetensors", DINO(CONFIG).teacher, CONFIG, 1)
    (tmp_path / "images").mkdir()
    for i, size in enumerate([(50, 40), (33, 70), (40, 40)]):
        photo(*size, seed=i).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def command(run: Path, **flags: Any) -> Attention:
    return Attention(**({"weights": str(run), "device": "cpu"} | flags))


# Maps.


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(("patch", "height", "width"), [(4, 16, 16), (4, 12, 24), (5, 17, 23)])
def test_maps_are_the_class_tokens_row_over_the_patch_grid(patch, height, width, depth, registers):
    network = VisionTransformer(
        img_size=16,
        patch_size=patch,
        embed_dim=24,
        depth=depth,
        num_heads=3,
        num_register_tokens=registers,
        init_values=0.5,
    ).eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.5)  # initial weights make nearly uniform attention
    images = torch.randn(2, 3, height, width)
    maps = attention_maps(network, images)
    rows, columns = height // patch, width // patch
    weights = network.get_last_selfattention(images)
    assert weights.shape[-1] == 1 + registers + rows * columns
    assert maps.shape == (2, 3, rows, columns)
    assert maps.std() > 0.01
    for i in range(rows):
        for j in range(columns):
            torch.testing.assert_close(maps[:, :, i, j], weights[:, :, 0, 1 + registers + i * columns + j])
    torch.testing.assert_close(maps.sum((2, 3)), 1 - weights[:, :, 0, : 1 + registers].sum(-1))
    assert not maps.requires_grad


def test_maps_need_no_square_of_the_tokens(monkeypatch: pytest.MonkeyPatch):
    sizes: list[torch.Size] = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda x, *args, **kw: sizes.append(x.shape) or softmax(x, *args, **kw)
    )
    attention_maps(vit_nano(4, img_size=16).eval(), torch.randn(1, 3, 40, 60))
    assert sizes == [(1, 4, 1, 1 + 150)]  # the class token's row, and no other


# Sums of powers of two, so that nothing is rounded. Of eight equal patches 0.375 are three: five hold 0.625.
@pytest.mark.parametrize(
    ("values", "share", "kept"),
    [
        ([8, 1, 4, 1, 1, 1], 0.5, [1, 0, 0, 0, 0, 0]),  # 8 of 16
        ([8, 1, 4, 1, 1, 1], 0.625, [1, 0, 1, 0, 0, 0]),  # 10 of 16 want 12
        ([8, 1, 4, 1, 1, 1], 0.75, [1, 0, 1, 0, 0, 0]),  # 12 are exactly enough
        ([8, 1, 4, 1, 1, 1], 0.8125, [1, 0, 1, 0, 0, 1]),  # of equal ones the last stays
        ([1, 1, 1, 1, 1, 1, 1, 1], 0.625, [0, 0, 0, 1, 1, 1, 1, 1]),
        ([2, 2, 4, 4, 2, 2], 0.5, [0, 0, 1, 1, 0, 0]),
        ([3, 1, 0, 0], 1.0, [1, 1, 0, 0]),
        ([3, 1, 0, 0], 0.01, [1, 0, 0, 0]),
        ([0, 0, 0, 0], 0.6, [0, 0, 0, 0]),
    ],
)
def test_a_mask_keeps_the_fewest_strongest_patches_that_hold_the_share(values, share, kept):
    maps = torch.tensor(values, dtype=torch.float32).view(1, 2, -1) / 16
    assert keep_mass(maps, share).int().flatten().tolist() == kept


def test_masks_of_many_maps_are_each_their_own():
    maps = torch.rand(2, 3, 4, 5).square()
    masks = keep_mass(maps, 0.6)
    assert masks.shape == maps.shape
    assert masks.dtype == torch.bool
    for one, mask in zip(maps.flatten(0, 1), masks.flatten(0, 1), strict=True):
        assert torch.equal(keep_mass(one, 0.6), mask)
        total, kept = one.double().sum(), one[mask].double().sum()
        assert kept >= 0.6 * total > kept - one[mask].min()
        assert one[mask].min() >= one[~mask].max()


# Images as the network sees them.


@pytest.mark.parametrize(
    ("size", "side", "patch", "resized", "box"),
    [
        ((640, 427), 480, 16, (719, 480), (7, 0, 711, 480)),  # 640 * 480 / 427 = 719.4; 15 pixels too many
        ((427, 640), 480, 16, (480, 719), (0, 7, 480, 711)),
        ((300, 300), 480, 14, (476, 476), (0, 0, 476, 476)),  # 34 patches
        ((100, 50), 32, 8, (64, 32), (0, 0, 64, 32)),
    ],
)
def test_images_keep_their_aspect_and_lose_less_than_a_patch(size, side, patch, resized, box):
    assert fit(size, side, patch) == (resized, box)


@pytest.mark.parametrize("size", [(50, 40), (33, 70)])
def test_the_network_sees_the_middle_of_the_resized_image(size):
    network, image = vit_nano(4, img_size=16).eval(), photo(*size)
    seen, maps = look(network, image, 22, POLICY)  # 20 pixels are whole patches
    wide = image.resize((25, 20) if size[0] == 50 else (20, 42), Image.Resampling.BICUBIC)
    expected = wide.crop((0, 0, 24, 20) if size[0] == 50 else (0, 1, 20, 41))
    assert np.array_equal(np.asarray(seen), np.asarray(expected))
    pixels = (np.asarray(expected, dtype=np.float32) / 255 - POLICY.mean) / POLICY.std
    x = torch.from_numpy(pixels).float().permute(2, 0, 1)[None]
    torch.testing.assert_close(maps, attention_maps(network, x)[0], rtol=1e-4, atol=1e-6)


def test_weights_come_with_the_side_to_show_images_at(run: Path, tmp_path: Path):
    network, policy, side = load(str(run), "cpu")
    assert (policy, side) == (CONFIG.data.crops, 32)
    torch.save(network.state_dict(), tmp_path / "other.pth")
    other, policy, side = load(str(tmp_path / "other.pth"), "cpu")
    assert (policy, side) == (CropPolicy(), 480)
    x = torch.randn(1, 3, 24, 24)
    assert torch.equal(attention_maps(other, x), attention_maps(network, x))


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
    monkeypatch.setattr(attention, "attention_maps", lambda n, x: given.append(x) or torch.rand(1, 8, 8, 8))
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


# Video.


def write_video(path: Path, frames: list[Image.Image], rate: Fraction) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return path


def read_video(path: Path) -> tuple[Fraction, list[np.ndarray]]:
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        return rate, [np.asarray(frame.to_image()) for frame in container.decode(video=0)]


def near(a: np.ndarray, b: np.ndarray, levels: float) -> bool:
    """Whether two pictures differ by what a codec loses, on average."""
    return a.shape == b.shape and bool(np.abs(a.astype(float) - b).mean() < levels)


def test_a_video_becomes_one_of_as_many_frames_at_its_rate(run: Path, capsys):
    frames = [photo(96, 64, seed=i) for i in range(7)]
    film = write_video(run / "in.mp4", frames, Fraction(24000, 1001))
    out = run / "out.mp4"
    command(run, video=str(film), out=str(out), image_size=32).run()
    assert capsys.readouterr().out == f"{out}: 7 frames, 23.976 a second\n"
    rate, pictures = read_video(out)
    assert rate == Fraction(24000, 1001)
    assert len(pictures) == 7
    network = load_backbone(str(run))
    for decoded, picture in zip(read_video(film)[1], pictures, strict=True):
        seen, maps = look(network, Image.fromarray(decoded), 32, CONFIG.data.crops)
        assert picture.shape == (32, 96, 3)
        assert near(picture[:, :48], np.asarray(seen), 8)  # of another frame by 80
        assert near(picture[:, 48:], panels(seen, maps, 0)[0][1], 5)  # of another by 13


def test_heads_masks_and_maps_over_the_frame_share_the_picture(run: Path):
    film = write_video(run / "in.mp4", [photo(48, 32, seed=i) for i in range(3)], Fraction(25))
    sizes = {}
    for name, flags in {
        "heads": {"heads": 2},
        "masks": {"threshold": 0.6},
        "over": {"over": True},
        "fast": {"over": True, "fps": 50.0},
    }.items():
        command(run, video=str(film), out=str(run / f"{name}.mp4"), **flags).run()
        rate, pictures = read_video(run / f"{name}.mp4")
        sizes[name] = (rate, len(pictures), pictures[0].shape[:2])
    assert sizes == {
        "heads": (25, 3, (32, 192)),
        "masks": (25, 3, (64, 96)),
        "over": (25, 3, (32, 48)),
        "fast": (50, 3, (32, 48)),
    }


def test_a_folder_of_frames_plays_in_the_order_of_their_numbers(run: Path):
    pytest.importorskip("av")
    folder = run / "frames"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (40, 40), (20 * i, 120, 60)).save(folder / f"frame{i}.png")
    command(run, video=str(folder), out=str(run / "out.mp4")).run()
    rate, pictures = read_video(run / "out.mp4")
    assert (rate, len(pictures)) == (30, 12)
    for i, picture in enumerate(pictures):
        assert abs(int(picture[16, 16, 0]) - 20 * i) <= 4
    assert [p.name for p in run.iterdir() if p.suffix == ".tmp"] == []


def test_a_film_is_streamed():
    """No frame is read before the one before it was asked for."""
    read = []

    class Load:
        def __init__(self, i: int) -> None:
            self.i = i

        def __call__(self) -> Image.Image:
            read.append(self.i)
            return photo(16, 16)

    with pytest.MonkeyPatch.context() as patch:
        named = [attention.Named(f"{i}.png", Load(i)) for i in range(3)]
        patch.setattr(attention, "open_images", lambda paths: list(named))
        film = open_film("frames.txt")
        for i in range(3):
            assert read == list(range(i))
            next(film.frames)


def test_colours_survive_and_odd_sizes_grow_by_a_pixel(tmp_path: Path):
    pytest.importorskip("av")
    blocks = np.array(attention.COLOURS, np.uint8).reshape(2, 3, 3)
    picture = blocks.repeat(33, 0).repeat(21, 1)[:-1, :]
    assert picture.shape == (65, 63, 3)
    assert write_film(iter([picture] * 3), Fraction(10), tmp_path / "o.mp4") == 3
    _, frames = read_video(tmp_path / "o.mp4")
    assert frames[1].shape == (66, 64, 3)
    for i in range(2):
        for j in range(3):
            np.testing.assert_allclose(frames[1][16 + 33 * i, 10 + 21 * j], blocks[i, j], atol=6)


def test_a_film_that_stops_in_the_middle_leaves_what_was_there(tmp_path: Path):
    pytest.importorskip("av")

    def frames() -> Iterator[np.ndarray]:
        yield from [np.asarray(photo(32, 32, seed=i)) for i in range(100)]
        raise ValueError("no more")

    (tmp_path / "o.mp4").write_bytes(b"the one before")
    with pytest.raises(ValueError, match="no more"):
        write_film(frames(), Fraction(10), tmp_path / "o.mp4")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("o.mp4", b"the one before")]


def test_wide_rows_are_made_smaller(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "MOST", 100)
    panel = np.zeros((30, 40, 3), np.uint8)
    assert tile([[panel, panel]]).shape == (30, 80, 3)
    assert tile([[panel] * 4, [panel] * 4]).shape == (38, 100, 3)  # 160 x 60 times 5 / 8


def test_a_film_from_a_telephone_is_upright(tmp_path: Path):
    """Telephones store frames on their side, with the turn in the track's header (ISO 14496-12, tkhd)."""
    half = Image.new("RGB", (64, 48), (200, 30, 30))
    half.paste((30, 30, 200), (0, 24, 64, 48))  # red above blue
    path = write_video(tmp_path / "in.mp4", [half] * 2, Fraction(10))
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    one = 1 << 16
    assert struct.unpack_from(">9i", content, matrix) == (one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    # a quarter clockwise: red comes to the right
    struct.pack_into(">9i", content, matrix, 0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30)
    path.write_bytes(content)
    frame = np.asarray(next(open_film(str(path)).frames)).astype(int)
    assert frame.shape == (64, 48, 3)
    assert frame[32, 40, 0] > 150 > 100 > frame[32, 8, 0]


def test_a_film_that_breaks_off_is_named_and_nothing_is_written(run: Path):
    content = write_video(run / "in.mp4", [photo(48, 32)] * 3, Fraction(10)).read_bytes()
    (run / "cut.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.mp4: no pictures in it, or cut short"):
        command(run, video=str(run / "cut.mp4"), out=str(run / "o.mp4")).run()
    (run / "bad.png").write_bytes(b"no image")
    frames = run / "frames.txt"
    frames.write_text("images/0.png\nbad.png\n")
    with pytest.raises(ValueError, match=r"bad\.png: not a JPEG"):
        command(run, video=str(frames), out=str(run / "o.mp4")).run()
    assert not [p for p in run.iterdir() if p.name.startswith((".o", "o"))]


def test_without_pyav_videos_say_what_to_install_and_pictures_need_none(run: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # importing it raises
    with pytest.raises(ValueError, match=r"pip install 'fastdino\[video\]'"):
        command(run, video=str(run / "images"), out=str(run / "o.mp4")).run()
    command(run, images=(str(run / "images" / "0.png"),), out=str(run / "o.png")).run()


def test_released_networks_have_the_maps_of_their_heads():
    """Six of ViT-S/8 over 4 x 6 patches, as official DINO's weights are shown."""
    assert attention_maps(vit_small(8).eval(), torch.randn(1, 3, 32, 48)).shape == (1, 6, 4, 6)
