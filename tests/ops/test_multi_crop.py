"""The C++ crops against Pillow's, bit for bit: every operation, size and instruction set."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastdino import ops
from fastdino.config import CropPolicy
from fastdino.data import crops
from fastdino.data.crops import View, draw, encode, pixels, render, render_into, to_tensor
from fastdino.ops import multi_crop, native

ISAS = native.isas()
pytestmark = pytest.mark.skipif(not ISAS, reason=native.describe())
GUARD = 256
PLAIN = View(size=32, box=(0, 0, 20, 30), flip=False, jitter=(), grayscale=False, blur=None, solarize=False)
# each operation about half of the time, and small views
MIXED = CropPolicy(
    global_crops_size=40,
    local_crops_size=17,
    local_crops_number=6,
    local_crops_scale=(0.01, 0.4),
    blur=(0.5, 0.5, 0.5),
    solarize=(0.5, 0.5, 0.5),
    grayscale=0.3,
)


@pytest.fixture(params=ISAS or ["none"])
def isa(request, monkeypatch) -> str:
    monkeypatch.setattr(native, "isas", lambda: (request.param,))
    return request.param


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise on smooth colours, with flat parts: pixels of every kind."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((width, height))
    x = np.asarray(coarse).astype(int) + rng.integers(-40, 41, (height, width, 3))
    x[: height // 3] = np.asarray(coarse)[: height // 3]
    return Image.fromarray(x.clip(0, 255).astype(np.uint8))


def guarded(views: list[View]) -> tuple[list[Tensor], list[Tensor]]:
    """Room for the views of one image, poisoned, and the memory around it."""
    whole = [torch.full((GUARD + 3 * view.size**2 + GUARD,), 171, dtype=torch.uint8) for view in views]
    out = [x[GUARD:-GUARD].view(1, 3, v.size, v.size) for x, v in zip(whole, views, strict=True)]
    return out, [x[i] for x in whole for i in (slice(GUARD), slice(-GUARD, None))]


def assert_as_pillow(image: Image.Image, views: list[View]) -> None:
    out, around = guarded(views)
    multi_crop([pixels(image)], encode(views)[None], out)
    for view, its in zip(views, out, strict=True):
        assert torch.equal(its[0], to_tensor(render(image, view))), view
    assert all((x == 171).all() for x in around)


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 300), (300, 1), (2, 3), (37, 53), (64, 64), (180, 240)], ids=str
)
def test_drawn_views_are_pillow_s(isa, size):
    image = noise(*size)
    for index in range(12):
        assert_as_pillow(image, draw(MIXED, 3, 0, index, image.size))


def test_official_views_of_a_photograph_s_size_are_pillow_s(isa):
    image = noise(375, 500)
    for index in range(3):
        assert_as_pillow(image, draw(CropPolicy(), 0, 0, index, image.size))


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 200])
def test_views_of_any_size_are_pillow_s(isa, size):
    image = noise(90, 70)
    boxes = [(0, 0, 90, 70), (0, 0, 1, 1), (89, 69, 1, 1), (10, 0, 33, 70), (0, 20, 90, 5), (45, 35, 45, 35)]
    view = replace(PLAIN, size=size, jitter=(("contrast", 1.2), ("hue", 0.07)), blur=1.1, solarize=True)
    assert_as_pillow(image, [replace(view, box=box, flip=flip) for box in boxes for flip in (False, True)])


def test_very_long_images_are_pillow_s(isa):
    assert_as_pillow(noise(3, 20000), [replace(PLAIN, size=30, box=(0, 5, 3, 19990))])
    assert_as_pillow(noise(20000, 3), [replace(PLAIN, size=30, box=(5, 0, 19990, 3))])


@pytest.mark.parametrize("radius", [0.0, 0.001, 0.1, 0.5, 1.0, 1.5, 1.7, 2.0, 3.3, 9.0, 40.0])
def test_every_blur_is_pillow_s(isa, radius):
    image = noise(60, 50)
    for size in (5, 40):
        assert_as_pillow(image, [replace(PLAIN, size=size, blur=radius)])


def colours() -> np.ndarray:
    """All of them, uint8 (4096, 4096, 3)."""
    x = np.arange(1 << 24, dtype=np.uint32)
    return np.stack([x >> 16, (x >> 8) & 255, x & 255], -1).astype(np.uint8).reshape(4096, 4096, 3)


ADJUSTED = [("hue", 0.1), ("hue", -0.037), ("saturation", 0.7), ("contrast", 1.37), ("brightness", 1.21)]


@pytest.mark.parametrize("adjustment", [*ADJUSTED, None], ids=str)
def test_every_colour_is_adjusted_as_by_pillow(adjustment):
    image = Image.fromarray(colours())
    view = replace(PLAIN, size=4096, box=(0, 0, 4096, 4096))
    jitter = replace(view, jitter=(adjustment,)) if adjustment else replace(view, grayscale=True)
    assert_as_pillow(image, [jitter])


@pytest.mark.parametrize("name", crops.ADJUSTMENTS)
def test_every_factor_is_pillow_s(isa, name):
    image = noise(40, 40)
    factors = np.linspace(-0.5, 0.5, 41) if name == "hue" else [0, 1e-9, 0.3, 0.9999, 1, 1.0001, 1.4, 2, 30]
    assert_as_pillow(image, [replace(PLAIN, jitter=((name, float(factor)),)) for factor in factors])


def test_a_fourth_channel_is_not_looked_at(isa):
    image = noise(50, 60)
    rgb = pixels(image)
    four = torch.cat((rgb, torch.randint(0, 256, (50, 60, 1), dtype=torch.uint8)), dim=2)
    views = draw(MIXED, 0, 0, 0, image.size)
    parameters = encode(views)[None]
    expected, _ = guarded(views)
    got, _ = guarded(views)
    multi_crop([rgb], parameters, expected)
    multi_crop([four], parameters, got)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_of_sizes_on_several_threads(isa, threads):
    images = [noise(20 + 9 * i, 90 - 7 * i, i) for i in range(9)]
    views = [draw(MIXED, 0, 0, i, image.size) for i, image in enumerate(images)]
    out = [torch.full((9, 3, v.size, v.size), 171, dtype=torch.uint8) for v in views[0]]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        multi_crop([pixels(i) for i in images], torch.stack([encode(v) for v in views]), out)
    finally:
        torch.set_num_threads(before)
    for i, image in enumerate(images):
        for view, its in zip(views[i], out, strict=True):
            assert torch.equal(its[i], to_tensor(render(image, view)))


def test_without_the_library_pillow_makes_the_views(monkeypatch):
    image = noise(50, 60)
    views = draw(MIXED, 0, 0, 0, image.size)
    out, _ = guarded(views)
    monkeypatch.setattr(native, "isas", tuple)
    render_into(image, views, out)
    for view, its in zip(views, out, strict=True):
        assert torch.equal(its[0], to_tensor(render(image, view)))
    with pytest.raises(ValueError, match=r"cannot run: .*makes a view by Pillow"):
        multi_crop([pixels(image)], encode(views)[None], out, impl="cpu")


@dataclass(frozen=True)
class Posterized(View):
    """A view with a parameter for which the kernels' row has no place."""

    bits: int = 8


def test_a_view_that_the_kernel_cannot_make_is_pillow_s_and_the_others_the_kernel_s(isa, monkeypatch):
    def posterize(image: Image.Image, view: View) -> Image.Image:
        assert view.bits < 8
        return ImageOps.posterize(render(image, view), view.bits)

    def count(images: list[Tensor], parameters: Tensor, out: list[Tensor]) -> None:
        made.append(len(out))
        multi_crop(images, parameters, out)

    image, made = noise(50, 60), []
    views = [
        Posterized(**vars(view), bits=2 if i in (0, 3) else 8)
        for i, view in enumerate(draw(MIXED, 0, 0, 0, image.size))
    ]
    expected = [posterize(image, view) if view.bits < 8 else render(image, view) for view in views]
    monkeypatch.setattr(crops, "render", posterize)
    monkeypatch.setattr(crops, "multi_crop", count)
    out, around = guarded(views)
    render_into(image, views, out)
    assert all(torch.equal(x[0], to_tensor(y)) for x, y in zip(out, expected, strict=True))
    assert all((x == 171).all() for x in around)
    assert made == [6]
    render_into(image, [views[0]], out[:1])
    assert made == [6]


def bytes_(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "0 images, 1 views"),
        ({"images": [bytes_(9, 9, 3).float()]}, r"image 0 is torch.float32 \(9, 9, 3\): give uint8"),
        ({"images": [bytes_(3, 9, 9)]}, r"image 0 is torch.uint8 \(3, 9, 9\)"),
        ({"images": [bytes_(9, 9, 3).transpose(0, 1)]}, "image 0, on cpu: give pixels, contiguous"),
        ({"images": [bytes_(0, 9, 3)]}, "give pixels"),
        ({"out": [bytes_(1, 3, 4, 5)]}, r"out\[0\] is torch.uint8 \(1, 3, 4, 5\)"),
        ({"out": [bytes_(2, 3, 4, 4)]}, r"give uint8 \(1, 3, size, size\)"),
        ({"parameters": encode([PLAIN])}, r"need float64 \(1, 1, 16\)"),
        ({"parameters": encode([replace(PLAIN, box=(0, 1, 9, 9))])[None]}, "a box lies outside its image"),
        ({"parameters": encode([replace(PLAIN, box=(-1, 0, 9, 9))])[None]}, "a box lies outside"),
        ({"parameters": encode([replace(PLAIN, box=(0, 0, 0, 9))])[None]}, "a box lies outside"),
        ({"parameters": encode([PLAIN])[None] * torch.nan}, "a box lies outside"),
        ({"impl": "cuda"}, "impl is 'cuda': give auto, cpu or triton"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {
        "images": [bytes_(9, 9, 3)],
        "parameters": encode([replace(PLAIN, box=(0, 0, 9, 9))])[None],
        "out": [bytes_(1, 3, 4, 4)],
    } | change
    with pytest.raises(ValueError, match=message):
        ops.multi_crop(**given)
