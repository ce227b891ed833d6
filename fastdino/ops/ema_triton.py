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
    copy,  # bfloat16, set to the new teacher if COPY
    table,  # (blocks, 4) teacher's offset, student's offset, copy's offset, elements
    momentum,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    COPY: tl.constexpr,
    MOMENTUM_ON_DEVICE: tl.constexpr,
):
    row = table + tl.program_id(0).to(tl.int64) * 4
    teacher_at, student_at, copy_at, count = (
        tl.load(row),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3),
    )
    if ALIGNED:  # a promise that makes 16-byte accesses of it
        teacher_at, student_at = tl.multiple_of(teacher_at, 16), tl.multiple_of(student_at, 16)
        copy_at = tl.multiple_of(copy_at, 16)
    i = tl.arange(0, BLOCK)
    t, s, c = teacher + teacher_at + i, student + student_at + i, copy + copy_at + i
    weight = 1 - (tl.load(momentum) if MOMENTUM_ON_DEVICE else momentum)
    weight = weight.to(tl.float32)
    dtype = teacher.dtype.element_ty
    if count == BLOCK:  # a mask of unknown length would split the accesses
        updated = _lerp(tl.load(t), tl.load(s), weight)
        tl.store(t, updated.to(dtype))
        if COPY:
            tl.store(c, updated.to(tl.bfloat16))
    else:
        inside = i < count
        updated = _lerp(tl.load(t, mask=inside, other=0.0), tl.load(s, mask=inside, other=0.0), weight)
        tl.store(t, updated.to(dtype), mask=inside)
        if COPY:
            tl.store(c, updated.to(tl.bfloat16), mask=inside)


@functools.lru_cache(maxsize=16)
def _table(
    tensors: tuple[tuple[int, int, int, int], ...], sizes: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, bool]:
    """The table for (address, address, address, elements), and whether all offsets are multiples of 16."""
    rows = []
    for *addresses, count in tensors:
        at = [(a - b) // size for a, b, size in zip(addresses, tensors[0], sizes, strict=False)]
        rows += [(*(x + i for x in at), min(BLOCK, count - i)) for i in range(0, count, BLOCK)]
    aligned = all(x % 16 == 0 for row in rows for x in row[:3])
    return torch.tensor(rows, dtype=torch.int64, device=device), aligned


def ema_triton_(
    teacher: Sequence[Tensor], student: Sequence[Tensor], copies: Sequence[Tensor], momentum: Tensor
) -> None:
    """`ema_ref_` for contiguous tensors of one device and, on each side, one dtype. One launch."""
    sides = (teacher, student, copies or teacher)
    tensors = tuple((*(x.data_ptr() for x in one), one[0].numel()) for one in zip(*sides, strict=True))
    first = [side[0] for side in sides]
    table, aligned = _table(tensors, tuple(x.element_size() for x in first), first[0].device)
    on_device = momentum.device.type != "cpu"
    with torch.cuda.device_of(first[0]):
        ema_kernel[(len(table),)](
            *first,
            table,
            momentum if on_device else momentum.item(),
            BLOCK=BLOCK,
            ALIGNED=aligned,
            COPY=bool(copies),
            MOMENTUM_ON_DEVICE=on_device,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
