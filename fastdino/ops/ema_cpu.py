"""Teacher update by kernels/ema.cpp: t = m * t + (1 - m) * s, one pass over a list of tensors."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdino.ops import native

DTYPES = (torch.float32, torch.bfloat16)
POINTER = ctypes.c_void_p
ARGUMENTS = (POINTER, POINTER, POINTER, POINTER, POINTER, ctypes.c_int64, ctypes.c_float, ctypes.c_int)


def ema_cpu_(
    teacher: Sequence[Tensor], student: Sequence[Tensor], copies: Sequence[Tensor], momentum: Tensor
) -> None:
    """`ema_ref_` for contiguous float32 and bfloat16 tensors."""
    n, sizes = len(teacher), [t.numel() for t in teacher]
    half = [
        (t.dtype == torch.bfloat16) + 2 * (s.dtype == torch.bfloat16)
        for t, s in zip(teacher, student, strict=True)
    ]
    pointers = [(POINTER * n)(*map(Tensor.data_ptr, side)) for side in (teacher, student, copies) if side]
    tables = (
        *pointers,
        *(() if copies else (None,)),
        (ctypes.c_int64 * n)(*sizes),
        (ctypes.c_int32 * n)(*half),
    )
    native.kernel("ema", ARGUMENTS)(*tables, n, 1 - momentum.item(), native.threads(sum(sizes)))
