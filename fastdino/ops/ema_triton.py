"""Teacher update in Triton: t = m * t + (1 - m) * s for a whole list of tensors in one launch.

A table says for each block of elements where it lies, as an offset from the first tensor of its side; it is
built once and found again by the tensors' addresses.
"""
# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of a kernel as its own types.)

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 8


@triton.jit
def _lerp(t, s, weight):
    t, s = t.to(tl.float32), s.to(tl.float32)
    # from the nearer end, as torch.lerp: exact at both
    return tl.where(weight < 0.5, t + weight * (s - t), s - (1 - weight) * (s - t))


@triton.jit
def ema_kernel(
    teacher,  # first tensor of the teacher's; the others lie at offsets from it
    student,
    table,  # (blocks, 3) teacher's offset, student's offset, elements
    momentum,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MOMENTUM_ON_DEVICE: tl.constexpr,
):
    row = table + tl.program_id(0).to(tl.int64) * 3
    teacher_at, student_at, count = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    if ALIGNED:  # a promise that makes 16-byte accesses of it
        teacher_at, student_at = tl.multiple_of(teacher_at, 16), tl.multiple_of(student_at, 16)
    i = tl.arange(0, BLOCK)
    t, s = teacher + teacher_at + i, student + student_at + i
    weight = 1 - (tl.load(momentum) if MOMENTUM_ON_DEVICE else momentum)
    weight = weight.to(tl.float32)
    dtype = teacher.dtype.element_ty
    if count == BLOCK:  # a mask of unknown length would split the accesses
        tl.store(t, _lerp(tl.load(t), tl.load(s), weight).to(dtype))
    else:
        inside = i < count
        updated = _lerp(tl.load(t, mask=inside, other=0.0), tl.load(s, mask=inside, other=0.0), weight)
        tl.store(t, updated.to(dtype), mask=inside)


@functools.lru_cache(maxsize=16)
def _table(
    pairs: tuple[tuple[int, int, int], ...], sizes: tuple[int, int], device: torch.device
) -> tuple[Tensor, bool]:
    """The table for (address, address, elements) of tensors, and whether all offsets are multiples of 16."""
    rows = []
    for teacher, student, count in pairs:
        t, s = (teacher - pairs[0][0]) // sizes[0], (student - pairs[0][1]) // sizes[1]
        rows += [(t + i, s + i, min(BLOCK, count - i)) for i in range(0, count, BLOCK)]
    aligned = all(t % 16 == 0 and s % 16 == 0 for t, s, _ in rows)
    return torch.tensor(rows, dtype=torch.int64, device=device), aligned


def ema_triton_(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: Tensor) -> None:
    """`ema_ref_` for contiguous tensors of one device and, on each side, one dtype. One launch."""
    pairs = tuple((t.data_ptr(), s.data_ptr(), t.numel()) for t, s in zip(teacher, student, strict=True))
    first = teacher[0]
    table, aligned = _table(pairs, (first.element_size(), student[0].element_size()), first.device)
    on_device = momentum.device.type != "cpu"
    with torch.cuda.device_of(first):
        ema_kernel[(len(table),)](
            first,
            student[0],
            table,
            momentum if on_device else momentum.item(),
            BLOCK=BLOCK,
            ALIGNED=aligned,
            MOMENTUM_ON_DEVICE=on_device,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
