"""All crops of decoded images by kernels/multi_crop.cpp."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdino.ops import native

POINTER = ctypes.c_void_p
ARGUMENTS = (POINTER, POINTER, ctypes.c_int64, POINTER, ctypes.c_int64, POINTER, POINTER, ctypes.c_int)


def multi_crop_cpu(images: Sequence[Tensor], parameters: Tensor, out: Sequence[Tensor]) -> None:
    """`multi_crop`, an image a thread; checks nothing."""
    parameters = parameters.contiguous()
    native.kernel("multi_crop", ARGUMENTS)(
        (POINTER * len(images))(*(image.data_ptr() for image in images)),
        (ctypes.c_int64 * (3 * len(images)))(*(n for image in images for n in image.shape)),
        len(images),
        parameters.data_ptr(),
        len(out),
        (POINTER * len(out))(*(views.data_ptr() for views in out)),
        (ctypes.c_int64 * len(out))(*(views.shape[-1] for views in out)),
        min(torch.get_num_threads(), len(images)),
    )
