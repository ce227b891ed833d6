"""All crops of decoded images in one call: the pixels Pillow makes, bit for bit, from C++ or Triton.

The specification is Pillow itself, as fastdino.data.crops.render uses it: bicubic resize of a box
(antialiased, across and then down), flip, colour jitter in any order, grayscale, Gaussian blur, solarisation,
each rounding to 8 bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdino.ops import native
from fastdino.ops.multi_crop_cpu import multi_crop_cpu
from fastdino.ops.multi_crop_row import AT, FIELDS


def multi_crop(
    images: Sequence[Tensor], parameters: Tensor, out: Sequence[Tensor], *, impl: str = "auto"
) -> None:
    """Make every view of every image of a batch, into `out`.

    Args:
        images: B tensors uint8 (H, W, 3) of RGB, of any sizes, or (H, W, 4) whose last channel is not looked
            at; contiguous, on one device.
        parameters: float64 (B, V, FIELDS) on the CPU, a row a view; see multi_crop_row.py.
        out: V tensors uint8 (B, 3, size, size), each view with a size of its own; contiguous, on the images'
            device.
        impl: "auto", "cpu" (C++) or "triton" (CUDA GPU).

    Raises:
        ValueError: shapes, types, devices or boxes that do not fit, or no kernel for the device.

    Source: Caron et al. 2021, section 3 and appendix B, for the operations; Pillow for the arithmetic.
    """
    if impl not in ("auto", "cpu", "triton"):
        raise ValueError(f"impl is {impl!r}: give auto, cpu or triton")
    if not images or not out:
        raise ValueError(f"{len(images)} images, {len(out)} views: give at least one of each")
    device, n = images[0].device, len(images)
    if tuple(parameters.shape) != (n, len(out), FIELDS) or parameters.dtype != torch.float64:
        raise ValueError(
            f"parameters are {parameters.dtype} {tuple(parameters.shape)}: {n} images and {len(out)} views "
            f"need float64 ({n}, {len(out)}, {FIELDS})"
        )
    for i, image in enumerate(images):
        if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[2] not in (3, 4):
            raise ValueError(
                f"image {i} is {image.dtype} {tuple(image.shape)}: give uint8 (height, width, 3 or 4)"
            )
        if image.device != device or not image.is_contiguous() or not image.numel():
            raise ValueError(f"image {i}, on {image.device}: give pixels, contiguous, on {device}")
    for v, views in enumerate(out):
        if views.dtype != torch.uint8 or views.shape != (n, 3, views.shape[-1], views.shape[-1]):
            raise ValueError(
                f"out[{v}] is {views.dtype} {tuple(views.shape)}: give uint8 ({n}, 3, size, size)"
            )
        if views.device != device or not views.is_contiguous() or not views.numel():
            raise ValueError(f"out[{v}], on {views.device}: give room, contiguous, on {device}")
    boxes = parameters[..., AT["box"]]
    sizes = torch.tensor([image.shape[:2] for image in images], dtype=torch.float64)[:, None]
    if not bool(
        ((boxes == boxes.floor()) & (boxes >= 0)).all()
        & (boxes[..., 2:] >= 1).all()
        & (boxes[..., :2] + boxes[..., 2:] <= sizes).all()
    ):
        raise ValueError("a box lies outside its image: give top, left, height, width within it, in pixels")
    chosen = native.choose(device)[0] if impl == "auto" else impl
    if why := native.choose(device)[1] if chosen == "torch" else native.missing(chosen, device):
        raise ValueError(
            f"impl={impl!r} cannot run: {why}; fastdino.data.crops.render makes a view by Pillow"
        )
    if chosen == "cpu":
        multi_crop_cpu(images, parameters, out)
    else:
        from fastdino.ops.multi_crop_triton import multi_crop as multi_crop_triton

        multi_crop_triton(list(images), parameters, list(out))
