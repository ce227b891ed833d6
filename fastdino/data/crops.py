"""Multi-crop augmentation: `draw` decides every parameter of every view, `render` executes them on Pillow,
`render_into` by the kernels of fastdino.ops.multi_crop, pixel for pixel the same and many times faster.

Semantics are official DINO's (paper, section 3 and appendix B): random resized crop (bicubic, antialiased),
flip, colour jitter, grayscale, Gaussian blur, solarisation, in this order. Drawing is a pure function, so
that any view of any image can be made again anywhere, whatever worker, rank or resumed run asks for it.

To add a parameter: a field of `View`, whose default leaves the pixels as they are; its random numbers in
`_OWN_STREAMS`; what decides it in `draw`; what it does in `render`. Pillow then makes the views in which it
is set. For the kernels to make them, add it to ops/multi_crop_row.py, `encode` and the kernels.
"""

import functools
import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from fastdino.config import CropPolicy, Range
from fastdino.ops import multi_crop, native
from fastdino.ops.multi_crop_row import ADJUSTMENTS, ROW, number_of

_TRIES = 10
# How many random numbers a view has of each name, in the order of the one stream that they come from. Never
# edit it: every run that was begun would go on with other crops. All are drawn whether used or not, so that
# changing one probability or range changes nothing else.
_SHARED_STREAM = {
    "flip": 1,
    "jitter": 1,
    "order": 4,  # of ADJUSTMENTS
    "factors": 4,
    "grayscale": 1,
    "blur": 1,
    "radius": 1,
    "solarize": 1,
    "box": 4 * _TRIES,  # area, ratio, top, left of each try
}
# The same for names added since. Each has a stream of its own, so adding one leaves the others as they are.
_OWN_STREAMS: dict[str, int] = {}


@dataclass(frozen=True)
class View:
    """All parameters of a view: the box in pixels of the image, the blur in pixels of the view."""

    size: int
    box: tuple[int, int, int, int]  # top, left, height, width
    flip: bool
    # (name, factor) in the order of application; empty: no colour jitter
    jitter: tuple[tuple[str, float], ...]
    grayscale: bool
    blur: float | None  # Pillow's radius
    solarize: bool


def uniforms(seed: int, epoch: int, index: int, views: int) -> list[dict[str, list[float]]]:
    """Random numbers in [0, 1) of each view of image `index` in `epoch`, by name.

    Those of _SHARED_STREAM come from `default_rng([seed, epoch, index])`, each view taking as many as any
    other, so more views leave the others as they are; those of _OWN_STREAMS from
    `default_rng([seed, epoch, index, *name.encode()])`.
    """
    shared = np.random.default_rng([seed, epoch, index]).random((views, sum(_SHARED_STREAM.values())))
    ends = itertools.accumulate(_SHARED_STREAM.values())
    numbers = {
        name: shared[:, end - n : end].tolist()
        for (name, n), end in zip(_SHARED_STREAM.items(), ends, strict=True)
    }
    for name, n in _OWN_STREAMS.items():
        stream = np.random.default_rng([seed, epoch, index, *name.encode()])
        numbers[name] = stream.random((views, n)).tolist()
    return [{name: rows[view] for name, rows in numbers.items()} for view in range(views)]


def draw(policy: CropPolicy, seed: int, epoch: int, index: int, image_size: tuple[int, int]) -> list[View]:
    """Parameters of all views of image `index` in `epoch`, in the order g1 g2 l1 ... ln.

    They follow from the arguments alone, by `uniforms`. `image_size` is (width, height) in pixels.
    """
    views = []
    for view, u in enumerate(uniforms(seed, epoch, index, policy.n_views)):
        is_global = view < policy.n_global
        kind = min(view, 2)  # first global, second global, local
        jitter: tuple[tuple[str, float], ...] = ()
        if u["jitter"][0] < policy.jitter:
            factors = _factors(policy, u["factors"])
            order = sorted(range(4), key=u["order"].__getitem__)
            jitter = tuple((ADJUSTMENTS[i], f) for i in order if (f := factors[i]) is not None)
        blurred = u["blur"][0] < policy.blur[kind]
        views.append(
            View(
                size=policy.global_crops_size if is_global else policy.local_crops_size,
                box=_box(
                    u["box"],
                    image_size,
                    policy.global_crops_scale if is_global else policy.local_crops_scale,
                    policy.aspect_ratio,
                ),
                flip=u["flip"][0] < policy.flip,
                jitter=jitter,
                grayscale=u["grayscale"][0] < policy.grayscale,
                blur=_uniform(policy.blur_radius, u["radius"][0]) if blurred else None,
                solarize=u["solarize"][0] < policy.solarize[kind],
            )
        )
    return views


def enough_pixels(policy: CropPolicy) -> int:
    """Pixels that an image needs for the box of every view to be no smaller than the view, on either side."""
    narrow = min(policy.aspect_ratio[0], 1 / policy.aspect_ratio[1], 1.0)
    needs = [policy.global_crops_size**2 / policy.global_crops_scale[0]]
    if policy.local_crops_number:
        needs.append(policy.local_crops_size**2 / policy.local_crops_scale[0])
    return math.ceil(max(needs) / narrow)


def _uniform(limits: Range, u: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * u


def _factors(policy: CropPolicy, u: list[float]) -> list[float | None]:
    """A factor for each of ADJUSTMENTS; None where the strength is 0: torchvision leaves that one out."""
    factors: list[float | None] = []
    for name, x in zip(ADJUSTMENTS, u, strict=True):
        strength = getattr(policy, name)
        limits = (-strength, strength) if name == "hue" else (max(0.0, 1 - strength), 1 + strength)
        factors.append(_uniform(limits, x) if strength else None)
    return factors


def _box(
    u: list[float], image_size: tuple[int, int], scale: Range, ratio: Range
) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop: ten tries, then the largest central box within the ratios."""
    width, height = image_size
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for i in range(0, 4 * _TRIES, 4):
        area = width * height * _uniform(scale, u[i])
        aspect = math.exp(_uniform(log_ratio, u[i + 1]))
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[i + 2] * (height - h + 1)), int(u[i + 3] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def render(image: Image.Image, view: View) -> Image.Image:
    """The view of an RGB image, as RGB of view.size x view.size: pixel for pixel what torchvision makes."""
    top, left, height, width = view.box
    # cropped first: resize(box=...) would let pixels outside the box bleed in
    image = image.crop((left, top, left + width, top + height))
    # Across, then down, as every Pillow before 13; newer ones go down first where the box is tall, and round
    # differently there: how a run's crops come out is not to hang on the version installed.
    image = image.resize((view.size, height), Image.Resampling.BICUBIC)
    image = image.resize((view.size, view.size), Image.Resampling.BICUBIC)
    if view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name, factor in view.jitter:
        image = _adjust(image, name, factor)
    if view.grayscale:
        image = image.convert("L").convert("RGB")
    if view.blur is not None:
        image = image.filter(ImageFilter.GaussianBlur(view.blur))
    if view.solarize:
        image = ImageOps.solarize(image, 128)
    return image


_ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


def _adjust(image: Image.Image, name: str, factor: float) -> Image.Image:
    if name != "hue":
        return _ENHANCERS[name](image).enhance(factor)
    shift = int(factor * 255)  # hue has 256 steps around the circle; torchvision truncates and wraps
    table = [(i + shift) % 256 for i in range(256)] + [*range(256)] * 2
    return image.convert("HSV").point(table).convert("RGB")


def pixels(image: Image.Image) -> Tensor:
    """The RGB image as uint8 (height, width, 3): read it, and do not write to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has no tensors that cannot be written to, and says so
        return torch.from_numpy(np.asarray(image))


def encode(views: Sequence[View]) -> Tensor:
    """The rows that `fastdino.ops.multi_crop` takes for the views of one image: float64 (V, FIELDS).

    Parameters for which a row has no place are left out, see `fits_row`.
    """
    rows = []
    for view in views:
        jitter = [x for name, factor in view.jitter for x in (number_of(name), factor)]
        row = {
            "box": view.box,
            "flip": [view.flip],
            "jitter": jitter + [0] * (ROW["jitter"] - len(jitter)),
            "grayscale": [view.grayscale],
            "blur": [-1.0 if view.blur is None else view.blur],
            "solarize": [view.solarize],
        }
        rows.append([x for name in ROW for x in row[name]])
    return torch.tensor(rows, dtype=torch.float64)


def fits_row(view: View) -> bool:
    """Whether the kernels can make the view: no parameter is set for which their row has no place."""
    return all(
        field.name in ROW or field.name == "size" or getattr(view, field.name) == field.default
        for field in fields(view)
    )


def render_into(image: Image.Image, views: Sequence[View], out: Sequence[Tensor]) -> None:
    """Make the views of an RGB image, each into its uint8 (1, 3, size, size).

    By the kernel; by Pillow where there is none, and the views that the kernel cannot make.
    """
    kernel = bool(native.isas())
    by_kernel = []
    for view, target in zip(views, out, strict=True):
        if kernel and fits_row(view):
            by_kernel.append((view, target))
        else:
            target[0] = to_tensor(render(image, view))
    if by_kernel:
        made, targets = zip(*by_kernel, strict=True)
        multi_crop([pixels(image)], encode(made)[None], targets)


def describe(device: torch.device | str) -> str:
    """What makes the crops on a device, and in brackets with what, or why nothing faster than Pillow."""
    impl, why = native.choose(torch.device(device))
    return f"{'pillow' if impl == 'torch' else impl} ({why})"


def to_tensor(image: Image.Image) -> Tensor:
    """The RGB image as uint8 (3, height, width), contiguous."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def normalize(x: Tensor, policy: CropPolicy) -> Tensor:
    """uint8 (..., 3, h, w) to float32 of that shape and device: (x / 255 - mean) / std, as torchvision."""
    scale, mean, std = _constants(policy.mean, policy.std, x.device)
    return x.to(torch.float32).div_(scale).sub_(mean).div_(std)


@functools.lru_cache(maxsize=16)  # copying them to a GPU would wait for it in each step
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    # 255 as a tensor: CUDA turns division by a number into multiplication by its rounded reciprocal
    return (
        torch.tensor(255.0, device=device),
        torch.tensor(mean, device=device).view(3, 1, 1),
        torch.tensor(std, device=device).view(3, 1, 1),
    )


def eval_image(image: Image.Image, size: int) -> Image.Image:
    """Official DINO's evaluation view: shorter side to size * 256 / 224 (bicubic), central size x size."""
    short = round(size * 256 / 224)
    width, height = image.size
    if width <= height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))
