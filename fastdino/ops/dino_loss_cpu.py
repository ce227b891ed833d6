"""DINO loss by kernels/dino_loss.cpp, forward and backward. Formulas: fastdino/ops/dino_loss.py."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from fastdino.ops import native

DTYPES = (torch.float32, torch.bfloat16)
POINTER, FLOAT, INT = ctypes.c_void_p, ctypes.c_float, ctypes.c_int
FORWARD = (POINTER,) * 10 + (FLOAT, FLOAT, POINTER, INT, INT)
BACKWARD = (POINTER,) * 8 + (FLOAT, FLOAT, FLOAT, POINTER, INT, INT)


def _call(student: Tensor, teacher: Tensor, out: Tensor) -> tuple[Any, int, int, Tensor]:
    """What both directions pass to C: sizes with strides, dtypes, threads; and their workspace."""
    crops = (student, teacher, out)
    sizes = [student.shape[0], teacher.shape[0], *student.shape[1:]]
    strides = [stride for x in crops for stride in x.stride()[:2]]
    numbers = (ctypes.c_int64 * 10)(*sizes, *strides)
    half = (student.dtype == torch.bfloat16) + 2 * (teacher.dtype == torch.bfloat16)
    threads = native.threads(student.numel() + teacher.numel())
    floats = ctypes.c_int64()
    size_of = native.kernel("dino_loss_workspace", (POINTER, POINTER, INT))
    size_of(ctypes.addressof(floats), ctypes.addressof(numbers), threads)
    return numbers, half, threads, torch.empty(floats.value, device="cpu")


def dino_loss_cpu(
    results: tuple[Tensor, Tensor, Tensor, Tensor],  # written: what `dino_loss_ref` returns
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    pair_weights: Tensor,
) -> None:
    """`dino_loss_ref` for float32 and bfloat16."""
    student, teacher = native.contiguous_rows(student), native.contiguous_rows(teacher)
    center, pair_weights = center.contiguous(), pair_weights.contiguous()
    numbers, half, threads, workspace = _call(student, teacher, student)
    losses = torch.empty(student.shape[1], dtype=torch.float64, device="cpu")
    tensors = (*results, workspace, losses, student, teacher, center, pair_weights)
    native.kernel("dino_loss_forward", FORWARD)(
        *(x.data_ptr() for x in tensors),
        student_temp.item(),
        teacher_temp.item(),
        ctypes.addressof(numbers),
        half,
        threads,
    )


def dino_loss_bwd_cpu(
    grad_student: Tensor,
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    pair_weights: Tensor,
    student_stats: Tensor,
    teacher_stats: Tensor,
) -> None:
    """`dino_loss_bwd_ref` for float32 and bfloat16."""
    student, teacher = native.contiguous_rows(student), native.contiguous_rows(teacher)
    center, pair_weights = center.contiguous(), pair_weights.contiguous()
    out = grad_student if grad_student.stride(-1) == 1 else torch.empty_like(student)
    numbers, half, threads, workspace = _call(student, teacher, out)
    tensors = (out, workspace, student, teacher, center, pair_weights, student_stats, teacher_stats)
    native.kernel("dino_loss_backward", BACKWARD)(
        *(x.data_ptr() for x in tensors),
        student_temp.item(),
        teacher_temp.item(),
        grad.item(),
        ctypes.addressof(numbers),
        half,
        threads,
    )
    if out is not grad_student:
        grad_student.copy_(out)
