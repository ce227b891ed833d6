"""Crops: each probability and range of official DINO, and pixels equal to torchvision's and Pillow's."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms as T

from fastdino.config import CROPS, CropPolicy
from fastdino.data import crops
from fastdino.data.crops import View, draw, eval_image, normalize, render, to_tensor, uniforms

DINO = CROPS["dino"]
SIZE = (500, 375)  # width, height
IMAGES = 4000
NAMES = ("brightness", "contrast", "saturation", "hue")
# Draws are fixed by their seeds, so the tests are deterministic. Bounds are those that a right implementation
# with other seeds would break once in about 10,000 tests.
Z = 4.0  # two-sided normal: 6e-5
ALPHA = 1e-4


@pytest.fixture(scope="module")
def draws() -> list[list[View]]:
    return [draw(DINO, 7, 0, index, SIZE) for index in range(IMAGES)]


def assert_probability(hits: int, n: int, p: float) -> None:
    if p in (0, 1):
        assert hits == n * p
    assert abs(hits / n - p) <= Z * math.sqrt(p * (1 - p) / n)


def assert_same_distribution(a: list[float], b: list[float]) -> None:
    """Two-sample Kolmogorov-Smirnov."""
    x, y = np.sort(a), np.sort(b)
    grid = np.concatenate([x, y])
    distance = np.abs(
        np.searchsorted(x, grid, side="right") / len(x) - np.searchsorted(y, grid, side="right") / len(y)
    ).max()
    assert distance <= math.sqrt(-math.log(ALPHA / 2) / 2 * (1 / len(x) + 1 / len(y)))


def assert_uniform(a: list[float], low: float, high: float) -> None:
    """In the range, and one-sample Kolmogorov-Smirnov."""
    x = (np.sort(a) - low) / (high - low)
    n = len(x)
    assert n >= 1000
    assert x[0] >= 0
    assert x[-1] <= 1
    distance = max((np.arange(1, n + 1) / n - x).max(), (x - np.arange(n) / n).max())
    assert distance <= math.sqrt(-math.log(ALPHA / 2) / 2 / n)


# --- drawing: statistics


@pytest.mark.parametrize(
    ("views", "blur", "solarize"),
    [(slice(0, 1), 1.0, 0.0), (slice(1, 2), 0.1, 0.2), (slice(2, 10), 0.5, 0.0)],
    ids=["first global", "second global", "local"],
)
def test_each_kind_of_view_has_its_own_probabilities(draws, views, blur, solarize):
    drawn = [view for image in draws for view in image[views]]
    n = len(drawn)
    assert_probability(sum(v.blur is not None for v in drawn), n, blur)
    assert_probability(sum(v.solarize for v in drawn), n, solarize)
    assert_probability(sum(v.flip for v in drawn), n, 0.5)
    assert_probability(sum(bool(v.jitter) for v in drawn), n, 0.8)
    assert_probability(sum(v.grayscale for v in drawn), n, 0.2)


@pytest.mark.parametrize("views", [slice(0, 2), slice(2, 10)], ids=["global", "local"])
def test_strengths_are_uniform_in_official_ranges(draws, views):
    drawn = [view for image in draws for view in image[views]]
    factors = {name: [f for v in drawn for n, f in v.jitter if n == name] for name in NAMES}
    assert_uniform(factors["brightness"], 0.6, 1.4)
    assert_uniform(factors["contrast"], 0.6, 1.4)
    assert_uniform(factors["saturation"], 0.8, 1.2)
    assert_uniform(factors["hue"], -0.1, 0.1)
    assert_uniform([v.blur for v in drawn if v.blur is not None], 0.1, 2.0)


def test_each_order_of_the_four_adjustments_is_equally_likely(draws):
    orders = Counter(tuple(n for n, _ in v.jitter) for image in draws for v in image if v.jitter)
    assert set(orders) == set(itertools.permutations(NAMES))
    expected = orders.total() / 24
    chi_square = sum((count - expected) ** 2 / expected for count in orders.values())
    assert chi_square <= 57.6  # the 1 - 1e-4 quantile at 23 degrees of freedom


@pytest.mark.parametrize("size", [(500, 375), (200, 600), (64, 64), (33, 47), (9, 7)], ids=str)
@pytest.mark.parametrize("is_global", [True, False], ids=["global", "local"])
def test_boxes_are_distributed_as_torchvision_s(size, is_global):
    width, height = size
    policy = replace(DINO, local_crops_number=1)
    scale = policy.global_crops_scale if is_global else policy.local_crops_scale
    image = Image.new("RGB", size)
    theirs = [T.RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(2500)]
    ours = [draw(policy, 3, 0, i, size)[0 if is_global else 2].box for i in range(2500)]
    for measure in (
        lambda top, left, h, w: h * w,
        lambda top, left, h, w: math.log(w / h),
        lambda top, left, h, w: top / (height - h + 1),
        lambda top, left, h, w: left / (width - w + 1),
        lambda top, left, h, w: top + h,
        lambda top, left, h, w: left + w,
    ):
        assert_same_distribution([measure(*box) for box in ours], [measure(*box) for box in theirs])
    if size == SIZE:
        shares = [h * w / (width * height) for _, _, h, w in ours]
        assert scale[0] - 0.01 <= min(shares) <= scale[0] + 0.01  # rounding to pixels moves the ends a little
        assert scale[1] - 0.02 <= max(shares) <= scale[1] + 0.01


@pytest.mark.parametrize("size", [(900, 60), (60, 900), (300, 1), (1, 300), (1, 1)], ids=str)
def test_a_box_that_fits_nowhere_is_central_and_within_the_ratios_as_torchvision_s(size):
    policy = replace(DINO, global_crops_scale=(0.9, 1.0), local_crops_number=0)
    theirs = T.RandomResizedCrop.get_params(Image.new("RGB", size), [0.9, 1.0], [3 / 4, 4 / 3])
    assert {view.box for i in range(20) for view in draw(policy, 0, 0, i, size)} == {theirs}


def test_boxes_lie_within_images_of_any_size():
    policy = replace(DINO, local_crops_number=2)
    rng = np.random.default_rng(0)
    for i in range(500):
        width, height = (int(x) for x in np.exp(rng.uniform(0, math.log(2000), 2)))
        for view in draw(policy, 0, 0, i, (width, height)):
            top, left, h, w = view.box
            assert 0 <= top < top + h <= height
            assert 0 <= left < left + w <= width


def test_decisions_and_views_are_independent(draws):
    # (images, views, decisions); the first global view is always blurred, the first and the local never
    # solarised
    values = np.array(
        [
            [[v.flip, bool(v.jitter), v.grayscale, v.blur or 0, v.box[1], v.box[2] * v.box[3]] for v in image]
            for image in draws
        ],
        dtype=float,
    )
    columns = values[:, :4].reshape(IMAGES, -1)  # two global and two local views
    correlation = np.corrcoef(columns, rowvar=False)
    later = np.corrcoef(columns[:-1], columns[1:], rowvar=False)[: columns.shape[1], columns.shape[1] :]
    np.fill_diagonal(correlation, 0)
    for view in range(4):  # a box's area bounds its place: they alone are tied, and by less than any mistake
        for a, b in ((4, 5), (5, 4)):
            correlation[6 * view + a, 6 * view + b] = 0
    bound = 4.8 / math.sqrt(IMAGES)  # 24 * 47 pairs: 1.6e-6 each
    assert np.abs(correlation).max() <= bound
    assert np.abs(later).max() <= bound


# --- drawing: a pure function


def test_drawing_follows_from_its_arguments_alone():
    np.random.seed(0)
    torch.manual_seed(0)
    first = draw(DINO, 5, 2, 17, SIZE)
    for i in range(3):
        draw(DINO, 5, 2, i, SIZE)
    np.random.seed(1)
    torch.manual_seed(1)
    assert draw(DINO, 5, 2, 17, SIZE) == first
    others = [draw(DINO, 6, 2, 17, SIZE), draw(DINO, 5, 3, 17, SIZE), draw(DINO, 5, 2, 18, SIZE)]
    others.append(draw(DINO, 2, 5, 17, SIZE))
    assert len({view.box for views in (first, *others) for view in views}) == 50


def test_views_come_with_their_sizes_in_the_order_global_then_local():
    assert [v.size for v in draw(DINO, 0, 0, 0, SIZE)] == [224, 224] + [96] * 8
    assert [v.size for v in draw(CROPS["two-crop"], 0, 0, 0, SIZE)] == [224, 224]


def test_changing_one_setting_changes_nothing_else():
    base = draw(DINO, 0, 0, 0, SIZE)
    other = replace(DINO, flip=0.0, jitter=0.0, grayscale=1.0, blur=(0.0, 0.0, 0.0), solarize=(1.0, 1.0, 1.0))
    assert [v.box for v in draw(other, 0, 0, 0, SIZE)] == [v.box for v in base]
    other = replace(DINO, local_crops_scale=(0.05, 0.14), local_crops_number=3)
    assert draw(other, 0, 0, 0, SIZE)[:2] == base[:2]
    for view, same in zip(draw(other, 0, 0, 0, SIZE)[2:], base[2:5], strict=True):
        assert replace(view, box=same.box) == same


def test_the_stream_of_doubles_is_what_the_source_says():
    """A run that was begun must see the same crops after an update: a change here is a change of format."""
    u = np.random.default_rng([11, 2, 4]).random((2, 54))[1]
    policy = replace(DINO, jitter=1.0, blur=(1.0, 1.0, 1.0), flip=0.5)
    view = draw(policy, 11, 2, 4, SIZE)[1]
    assert view.flip == (u[0] < 0.5)
    assert [n for n, _ in view.jitter] == [NAMES[i] for i in np.argsort(u[2:6])]
    assert dict(view.jitter) == pytest.approx(
        {
            "brightness": 0.6 + 0.8 * u[6],
            "contrast": 0.6 + 0.8 * u[7],
            "saturation": 0.8 + 0.4 * u[8],
            "hue": -0.1 + 0.2 * u[9],
        }
    )
    assert view.grayscale == (u[10] < 0.2)
    assert view.blur == pytest.approx(0.1 + 1.9 * u[12])
    assert view.solarize == (u[13] < 0.2)
    area, aspect = 500 * 375 * (0.4 + 0.6 * u[14]), (3 / 4) ** (1 - 2 * u[15])
    h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
    assert view.box == (int(u[16] * (376 - h)), int(u[17] * (501 - w)), h, w)


def test_a_new_parameter_leaves_the_draws_of_all_others_as_they_are(monkeypatch):
    before, views = uniforms(3, 1, 7, 4), draw(DINO, 3, 1, 7, SIZE)
    monkeypatch.setitem(crops._OWN_STREAMS, "posterize", 2)
    monkeypatch.setitem(crops._OWN_STREAMS, "sharpen", 1)
    after = uniforms(3, 1, 7, 4)
    assert draw(DINO, 3, 1, 7, SIZE) == views
    own = [view.pop("posterize") for view in after]
    assert [len(view.pop("sharpen")) for view in after] == [1] * 4
    assert after == before
    assert len({u for view in own for u in view}) == 8
    assert not {u for view in own for u in view} & {u for view in before for us in view.values() for u in us}
    # nor does it hang on what was added with it, or on the number of views
    monkeypatch.delitem(crops._OWN_STREAMS, "sharpen")
    assert [view["posterize"] for view in uniforms(3, 1, 7, 6)[:4]] == own
    others = [uniforms(*key, 4)[0]["posterize"] for key in ((4, 1, 7), (3, 2, 7), (3, 1, 8))]
    assert own[0] not in others


def test_an_adjustment_of_zero_strength_is_left_out():
    policy = replace(DINO, jitter=1.0, brightness=0.0, hue=0.0)
    for i in range(20):
        for view in draw(policy, 0, 0, i, SIZE):
            assert sorted(n for n, _ in view.jitter) == ["contrast", "saturation"]


def test_factors_do_not_fall_below_zero():
    policy = replace(DINO, jitter=1.0, brightness=1.5, local_crops_number=0)
    factors = [dict(v.jitter)["brightness"] for i in range(1000) for v in draw(policy, 0, 0, i, SIZE)]
    assert_uniform(factors, 0.0, 2.5)


# --- rendering


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Smooth colours, edges and noise, so that every operation changes pixels."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    x = np.asarray(coarse.resize((250, 187), Image.Resampling.BICUBIC)).astype(int)
    x[60:120, 80:170] += rng.integers(-60, 60, 3)
    return Image.fromarray((x + rng.integers(-12, 13, x.shape)).clip(0, 255).astype(np.uint8))


def gray(x: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma in Pillow's 16-bit fixed point, uint8 (h, w)."""
    r, g, b = np.moveaxis(x.astype(np.int64), -1, 0)
    return ((19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16).astype(np.uint8)


def blend(degenerate: np.ndarray, x: np.ndarray, factor: float) -> np.ndarray:
    return np.asarray(Image.blend(Image.fromarray(degenerate), Image.fromarray(x), factor))


RESIZE = Image.Image.resize


def across_then_down(image: Image.Image, size: tuple[int, int], *args) -> Image.Image:
    """Pillow's resize as before version 13, which goes down first where the box is tall."""
    return RESIZE(RESIZE(image, (size[0], image.height), *args), size, *args)


def reference(image: Image.Image, view: View) -> np.ndarray:
    """The view by numpy, with Pillow's resize, blend, HSV and box blur."""
    top, left, h, w = view.box
    x = np.ascontiguousarray(np.asarray(image)[top : top + h, left : left + w])
    x = np.asarray(across_then_down(Image.fromarray(x), (view.size, view.size), Image.Resampling.BICUBIC))
    if view.flip:
        x = x[:, ::-1]
    x = np.ascontiguousarray(x)
    for name, factor in view.jitter:
        if name == "brightness":
            x = blend(np.zeros_like(x), x, factor)
        elif name == "contrast":
            x = blend(np.full_like(x, int(gray(x).mean() + 0.5)), x, factor)
        elif name == "saturation":
            x = blend(np.stack([gray(x)] * 3, -1), x, factor)
        else:
            hsv = np.array(Image.fromarray(x).convert("HSV"))
            hsv[..., 0] = (hsv[..., 0].astype(int) + math.trunc(255 * factor)) % 256
            x = np.asarray(
                Image.merge("HSV", [Image.fromarray(c) for c in np.moveaxis(hsv, -1, 0)]).convert("RGB")
            )
    if view.grayscale:
        x = np.stack([gray(x)] * 3, -1)
    if view.blur is not None:
        x = np.asarray(Image.fromarray(x).filter(ImageFilter.GaussianBlur(view.blur)))
    if view.solarize:
        x = np.where(x < 128, x, 255 - x)
    return x


def torchvision_view(image: Image.Image, view: View, monkeypatch: pytest.MonkeyPatch) -> Image.Image:
    """The view by torchvision's own transforms, made to draw the view's parameters."""
    monkeypatch.setattr(T.RandomResizedCrop, "get_params", staticmethod(lambda *args: view.box))
    monkeypatch.setattr(Image.Image, "resize", across_then_down)
    factors = dict(view.jitter)
    order = [NAMES.index(name) for name, _ in view.jitter]
    monkeypatch.setattr(
        T.ColorJitter, "get_params", staticmethod(lambda *args: (order, *(factors.get(n) for n in NAMES)))
    )
    return T.Compose(
        [
            T.RandomResizedCrop(view.size, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(float(view.flip)),
            T.ColorJitter(0.4, 0.4, 0.2, 0.1),
            T.RandomGrayscale(float(view.grayscale)),
            lambda x: x if view.blur is None else x.filter(ImageFilter.GaussianBlur(radius=view.blur)),
            lambda x: ImageOps.solarize(x) if view.solarize else x,
        ]
    )(image)


# more grayscale and solarisation than official, so that a few hundred views hold every combination
MIXED = replace(DINO, blur=(0.5, 0.5, 0.5), solarize=(0.5, 0.5, 0.5), grayscale=0.3, local_crops_number=4)


@pytest.mark.parametrize("policy", [DINO, MIXED], ids=["dino", "mixed"])
def test_render_equals_a_plain_implementation_pixel_for_pixel(photo, policy):
    for index in range(25):
        for view in draw(policy, 1, 0, index, photo.size):
            image = render(photo, view)
            assert (image.mode, image.size) == ("RGB", (view.size, view.size))
            np.testing.assert_array_equal(np.asarray(image), reference(photo, view), err_msg=str(view))


@pytest.mark.parametrize("policy", [DINO, MIXED], ids=["dino", "mixed"])
def test_render_and_normalize_equal_torchvision_given_the_same_parameters(photo, policy, monkeypatch):
    finish = T.Compose([T.ToTensor(), T.Normalize(policy.mean, policy.std)])
    for index in range(25):
        for view in draw(policy, 2, 0, index, photo.size):
            expected = torchvision_view(photo, view, monkeypatch)
            image = render(photo, view)
            np.testing.assert_array_equal(np.asarray(image), np.asarray(expected), err_msg=str(view))
            assert torch.equal(normalize(to_tensor(image), policy), finish(expected))


ENDS = [(name, factor) for name in NAMES[:3] for factor in (0.0, 0.004, 0.5, 1.0, 1.7)]
ENDS += [("hue", factor) for factor in (-0.5, -0.1, -0.004, 0.0, 0.1, 0.5)]


@pytest.mark.parametrize(("name", "factor"), ENDS)
def test_each_adjustment_equals_torchvision_at_and_beyond_the_ends(photo, name, factor):
    view = View(100, (0, 0, 100, 100), False, ((name, factor),), False, None, False)
    expected = getattr(T.functional, f"adjust_{name}")(photo.crop((0, 0, 100, 100)), factor)
    np.testing.assert_array_equal(np.asarray(render(photo, view)), np.asarray(expected))


def test_render_leaves_the_image_as_it_was(photo):
    before = photo.tobytes()
    for view in draw(MIXED, 0, 0, 0, photo.size):
        render(photo, view)
    assert photo.tobytes() == before


def test_to_tensor_is_channels_first():
    x = np.arange(2 * 5 * 3, dtype=np.uint8).reshape(2, 5, 3)
    y = to_tensor(Image.fromarray(x))
    assert y.dtype == torch.uint8
    assert y.is_contiguous()
    np.testing.assert_array_equal(y.numpy(), x.transpose(2, 0, 1))


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 3, 16, 16), (2, 2, 3, 8, 8), (0, 3, 4, 4)], ids=str)
def test_normalize_takes_any_leading_dimensions(shape):
    policy = CropPolicy(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    x = torch.arange(math.prod(shape)).remainder(256).to(torch.uint8).reshape(shape)
    before = x.clone()
    y = normalize(x, policy)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (policy.mean, policy.std))
    assert y.dtype == torch.float32
    assert torch.equal(y, (x.float() / 255 - mean) / std)
    assert torch.equal(x, before)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_normalize_on_a_gpu_equals_the_cpu_bit_for_bit():
    x = torch.arange(256, dtype=torch.uint8).repeat(3).view(3, 16, 16)
    assert torch.equal(normalize(x.cuda(), DINO).cpu(), normalize(x, DINO))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (300, 300), (257, 1000), (40, 30), (7, 5)], ids=str)
@pytest.mark.parametrize("side", [224, 96, 33, 22])
def test_eval_image_equals_official_evaluation(size, side):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    official = T.Compose(
        [
            T.Resize(round(side * 256 / 224), interpolation=T.InterpolationMode.BICUBIC),
            T.CenterCrop(side),
        ]
    )
    np.testing.assert_array_equal(np.asarray(eval_image(image, side)), np.asarray(official(image)))
