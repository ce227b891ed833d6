"""The Triton kernels that make views against Pillow, pixel for pixel."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastdino.config import CropPolicy
from fastdino.data.crops import ADJUSTMENTS, View, draw, encode, render, to_tensor

pytest.importorskip("triton")
import triton
import triton.language as tl

from fastdino.ops import multi_crop_triton
from fastdino.ops.multi_crop_triton import _to_hsv, _to_rgb, multi_crop

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# fresh memory is 255 and 2**31 - 1
pytestmark = [pytest.mark.usefixtures("poison"), *([pytest.mark.cuda] if CUDA else [])]


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that hold a whole small view: what the interpreter takes goes by programs, not by pixels."""
    if not CUDA:
        for name in ("ROWS", "STRIP_ROWS", "COLUMNS"):
            monkeypatch.setattr(multi_crop_triton, name, 64)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Of a tint of its own, many values at the ends, where results are clipped."""
    rng = np.random.default_rng([height, width, channels])
    tint = rng.integers(-40, 41, channels)
    return (tint + rng.integers(-64, 320, (height, width, channels))).clip(0, 255).astype(np.uint8)


def view(size: int, box: tuple[int, int, int, int], **what) -> View:
    plain = {"flip": False, "jitter": (), "grayscale": False, "blur": None, "solarize": False}
    return View(size=size, box=box, **(plain | what))


def check(images: Sequence[np.ndarray], views: Sequence[Sequence[View]], shift: int = 0) -> None:
    """Views of images, in memory that starts `shift` bytes after a boundary, are those of Pillow."""

    def room(*shape: int) -> Tensor:
        memory.append(torch.full((shift + int(np.prod(shape)) + 64,), 77, dtype=torch.uint8, device=DEVICE))
        return memory[-1][shift:-64].view(shape)

    memory: list[Tensor] = []
    given = [room(*image.shape).copy_(torch.from_numpy(image)) for image in images]
    out = [room(len(images), 3, x.size, x.size) for x in views[0]]
    multi_crop(given, torch.stack([encode(v) for v in views]), out)
    assert all((x[:shift] == 77).all() and (x[-64:] == 77).all() for x in memory)
    for b, image in enumerate(images):
        assert np.array_equal(given[b].cpu().numpy(), image)
        pillow = Image.fromarray(np.ascontiguousarray(image[..., :3]))
        for v, x in enumerate(views[b]):
            made, expected = out[v][b].cpu(), to_tensor(render(pillow, x))
            assert torch.equal(made, expected), f"{(made != expected).sum()} of {made.numel()} differ in {x}"


def launch(dtype: torch.dtype) -> None:
    """Launches the kernels, which take no logits, once: compile_triton.py makes machine code of them."""
    views = [view(64, (0, 0, 90, 120), jitter=(("contrast", 1.2),), blur=1.0)]
    images, out = [torch.zeros(90, 120, 3, dtype=torch.uint8)], [torch.zeros(1, 3, 64, 64, dtype=torch.uint8)]
    multi_crop(images, encode(views)[None], out)


ALONE = [
    {"flip": True},
    {"grayscale": True},
    {"solarize": True},
    {"blur": 1.3, "solarize": True},
    {"blur": 0.6, "grayscale": True, "flip": True},
    *(
        {"jitter": ((name, factor),)}
        for name, factors in zip(
            ADJUSTMENTS,
            [(0.0, 0.63, 1.0, 1.7), (0.0, 0.63, 1.4), (0.0, 0.81, 1.2), (-0.5, -0.07, 0.1, 0.5)],
            strict=True,
        )
        for factor in factors
    ),
]


@pytest.mark.usefixtures("few_programs")
def test_each_operation_alone():
    check([noise(30, 21)], [[view(20, (3, 1, 25, 19), **what) for what in ALONE]])


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("first", ADJUSTMENTS)
def test_adjustments_in_every_order(first):
    factors = {"brightness": 1.2, "contrast": 0.7, "saturation": 1.6, "hue": -0.09}
    orders = [order for order in itertools.permutations(ADJUSTMENTS) if order[0] == first]
    jitters = [tuple((name, factors[name]) for name in order) for order in orders]
    views = [
        view(9, (0, 0, 14, 14), jitter=x, grayscale=i == 4, solarize=i == 5) for i, x in enumerate(jitters)
    ]
    check([noise(14, 14)], [views])


@pytest.mark.usefixtures("few_programs")
def test_a_mean_between_two_levels_is_rounded_up():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:4], image[4:] = 10, 11
    dark = image.copy()
    dark[0, 0] = 9
    flat = view(8, (0, 0, 8, 8), jitter=(("contrast", 0.0),))
    check([image, dark], [[flat], [flat]])


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(("size", "radii"), [(37, (0.0, 0.1, 0.5, 1.0, 1.3, 2.0, 3.1, 5.0)), (8, (0.7, 9.0))])
def test_blur_of_every_radius(size, radii):
    check([noise(40, 40)], [[view(size, (0, 0, 40, 40), blur=radius) for radius in radii]])


BOXES = [
    (0, 0, 40, 60),  # all
    (0, 0, 16, 16),  # as large as the view: nothing is resized
    (24, 44, 16, 16),
    (24, 0, 16, 33),  # resized in one direction only
    (0, 44, 27, 16),
    (0, 0, 1, 1),
    (39, 59, 1, 1),
    (39, 0, 1, 60),
    (0, 59, 40, 1),
    (17, 29, 3, 2),
]


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("channels", [3, 4])
def test_boxes_at_every_edge_made_smaller_and_larger(channels):
    views = [view(16, box, flip=bool(i % 2)) for i, box in enumerate(BOXES)]
    check([noise(40, 60, channels)], [views], shift=channels)


@pytest.mark.usefixtures("few_programs")
def test_boxes_many_times_as_large_as_the_view():
    check([noise(3, 500), noise(350, 2, 4)], [[view(7, (0, 0, 3, 499))], [view(7, (1, 0, 349, 2))]])


POLICIES = {
    "dino": CropPolicy(global_crops_size=24, local_crops_size=12, local_crops_number=2),
    "strong": CropPolicy(
        global_crops_size=33,
        local_crops_size=13,
        local_crops_number=2,
        jitter=1.0,
        brightness=1.5,
        contrast=1.5,
        saturation=1.5,
        hue=0.5,
        blur=(0.5, 0.5, 0.5),
        blur_radius=(0.0, 5.0),
        solarize=(0.5, 0.5, 0.5),
    ),
    "plain": CropPolicy(
        global_crops_size=40,
        local_crops_size=8,
        local_crops_number=1,
        global_crops_scale=(0.05, 1.0),
        aspect_ratio=(0.2, 5.0),
        hue=0.0,
        grayscale=0.5,
        blur=(0.0, 0.0, 0.0),
    ),
}


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("name", POLICIES)
def test_batches_as_they_are_drawn(name):
    sizes = [[(40, 60, 3), (1, 1, 4), (33, 20, 3)], [(57, 41, 4)], [(200, 3, 3)]]
    for epoch, batch in enumerate(sizes):
        images = [noise(*shape) for shape in batch]
        views = [draw(POLICIES[name], 0, epoch, i, (x.shape[1], x.shape[0])) for i, x in enumerate(images)]
        check(images, views, shift=epoch)


def test_views_of_many_tiles():
    """With the tiles that a GPU runs, and every overflow of an integer an error in the interpreter."""
    jitter = (("hue", 0.1), ("brightness", 1.3), ("contrast", 0.7), ("saturation", 1.2))
    one = view(70, (5, 7, 90, 80), flip=True, jitter=jitter, blur=1.7, solarize=True)
    other = view(40, (0, 0, 20, 45), jitter=jitter[:2], grayscale=True)
    check([noise(97, 101)], [[one, other]])


def test_a_second_contrast_is_refused():
    twice = view(8, (0, 0, 8, 8), jitter=(("contrast", 0.5), ("contrast", 0.5)))
    with pytest.raises(ValueError, match="contrast twice"):
        check([noise(8, 8)], [[twice]])


@pytest.mark.parametrize(
    ("extent", "size"),
    [
        *[(1, 8), (2, 5), (7, 7), (8, 3), (33, 32), (97, 96), (60, 224), (375, 224), (500, 96), (1231, 224)],
        *itertools.product((101, 222, 247, 310, 333, 389, 418, 467), (96, 224)),
    ],
)
def test_weights_are_those_of_pillow(extent, size):
    # a row of Pillow's resized 2**22 I, integers of 32 bits, is what each output takes of one input
    identity = Image.fromarray(np.eye(extent, dtype=np.int32) << 22)
    expected = np.asarray(identity.resize((size, extent), Image.Resampling.BICUBIC))
    padded = -(-size // multi_crop_triton.COLUMNS) * multi_crop_triton.COLUMNS
    table = torch.zeros(1, multi_crop_triton.ENTRIES.value, dtype=torch.int64, device=DEVICE)
    table[0, multi_crop_triton.EXTENT.value : multi_crop_triton.EXTENT.value + 2] = extent
    table[0, multi_crop_triton.SIZE.value] = size
    taps = int(4 * max(1, extent / size)) + 3
    weights = torch.zeros(2 + taps, padded, dtype=torch.int32, device=DEVICE)
    multi_crop_triton.weights_kernel[(1, 2)](
        weights,
        table,
        BLOCK=multi_crop_triton.BLOCK,
        COLUMNS=multi_crop_triton.COLUMNS,
        enable_fp_fusion=False,
    )
    first, count, weights = (x.numpy() for x in weights.cpu()[:, :size].split([1, 1, taps]))
    made = np.zeros_like(expected)
    for i, output in itertools.product(range(taps), range(size)):
        if i < count[0, output]:
            made[first[0, output] + i, output] = weights[i, output]
    np.testing.assert_array_equal(made, expected)


@triton.jit
def all_colors_kernel(to, HUE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b, c = i >> 16, (i >> 8) & 255, i & 255
    if HUE:
        x, y, z = _to_hsv(a, b, c)
    else:
        x, y, z = _to_rgb(a, b, c)
    tl.store(to + 3 * i, x.to(tl.uint8))
    tl.store(to + 3 * i + 1, y.to(tl.uint8))
    tl.store(to + 3 * i + 2, z.to(tl.uint8))


@pytest.mark.parametrize(("source", "target"), [("RGB", "HSV"), ("HSV", "RGB")])
def test_every_color_is_converted_as_by_pillow(source, target):
    block = 1024 if CUDA else 2**18
    made = torch.empty(2**24, 3, dtype=torch.uint8, device=DEVICE)
    all_colors_kernel[(2**24 // block,)](made, target == "HSV", BLOCK=block, enable_fp_fusion=False)
    i = np.arange(2**24, dtype=np.uint32)
    colors = np.stack([i >> 16, (i >> 8) & 255, i & 255], -1).astype(np.uint8)
    expected = np.array(Image.frombytes(source, (4096, 4096), colors.tobytes()).convert(target))
    assert np.array_equal(made.cpu().numpy(), expected.reshape(-1, 3))


needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")


@pytest.mark.cuda
@needs_gpu
def test_batches_of_real_sizes():
    shapes = [(375, 500, 3), (500, 333, 3), (400, 500, 4), (1200, 1600, 3), (96, 96, 3), (2000, 17, 3)]
    for epoch, policy in enumerate([CropPolicy(), CropPolicy(jitter=1.0, blur=(1.0, 1.0, 1.0), hue=0.5)]):
        images = [noise(*shape) for shape in shapes]
        views = [draw(policy, 0, epoch, i, (x.shape[1], x.shape[0])) for i, x in enumerate(images)]
        check(images, views)


@pytest.mark.cuda
@needs_gpu
def test_batches_of_any_sizes_neither_wait_nor_compile_again():
    compiled = []
    policy = CropPolicy(blur=(1.0, 1.0, 1.0), jitter=1.0)
    for sizes in ([(300, 400)] * 3, [(301, 403), (17, 33)], [(96, 224)]):
        images = [torch.from_numpy(noise(*size)).cuda() for size in sizes]
        views = [draw(policy, 0, 0, i, (w, h)) for i, (h, w) in enumerate(sizes)]
        parameters = torch.stack([encode(x) for x in views])
        out = [torch.empty(len(sizes), 3, x.size, x.size, dtype=torch.uint8, device="cuda") for x in views[0]]
        torch.cuda.synchronize()
        multi_crop(images, parameters, out)  # the first compiles, and may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            multi_crop(images, parameters, out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        kernels = [kernel for name, kernel in vars(multi_crop_triton).items() if name.endswith("_kernel")]
        compiled.append([len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels])
    assert compiled[1:] == compiled[:1] * 2
