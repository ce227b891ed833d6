"""Teacher update: t = m * t + (1 - m) * s for every parameter. Computed in float32 whatever is stored."""

import ctypes
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fastdino.ops import native


def ema_ref_(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: Tensor) -> None:
    """Lerp in one foreach call where all tensors are alike, one by one where they are not."""
    alike = {(x.dtype, x.device) for x in (*teacher, *student)}
    if len(alike) == 1 and momentum.device.type == "cpu":
        torch._foreach_lerp_(list(teacher), list(student), 1 - momentum.item())
        return
    for t, s in zip(teacher, student, strict=True):
        wide = torch.float64 if t.dtype == torch.float64 else torch.float32
        t.copy_(torch.lerp(t.to(wide), s.to(t.device, wide), (1 - momentum).to(t.device, wide)))


POINTER = ctypes.c_void_p
CPU_ARGUMENTS = (POINTER, POINTER, POINTER, POINTER, ctypes.c_int64, ctypes.c_float, ctypes.c_int)
CPU_DTYPES = (torch.float32, torch.bfloat16)


def ema_cpu_(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: Tensor) -> None:
    """`ema_ref_` by kernels/ema.cpp; what the kernel does not cover goes to `ema_ref_`."""
    pairs: list[tuple[Tensor, Tensor]] = []
    others: list[tuple[Tensor, Tensor]] = []
    for t, s in zip(teacher, student, strict=True):
        known = t.dtype in CPU_DTYPES and s.dtype in CPU_DTYPES and t.device.type == s.device.type == "cpu"
        (pairs if known and t.is_contiguous() and s.is_contiguous() else others).append((t, s))
    if others:
        ema_ref_([t for t, _ in others], [s for _, s in others], momentum)
    n, total = len(pairs), sum(t.numel() for t, _ in pairs)
    half = [(t.dtype == torch.bfloat16) + 2 * (s.dtype == torch.bfloat16) for t, s in pairs]
    tables = (
        (ctypes.c_void_p * n)(*(t.data_ptr() for t, _ in pairs)),
        (ctypes.c_void_p * n)(*(s.data_ptr() for _, s in pairs)),
        (ctypes.c_int64 * n)(*(t.numel() for t, _ in pairs)),
        (ctypes.c_int32 * n)(*half),
    )
    native.kernel("ema", CPU_ARGUMENTS)(
        *(ctypes.addressof(table) for table in tables),
        n,
        1 - momentum.item(),
        torch.get_num_threads() if total > 65536 else 1,
    )


@torch.library.custom_op("fastdino::ema_", mutates_args=("teacher",))
def _ema_(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: Tensor, impl: str) -> None:
    (ema_cpu_ if impl == "cpu" else ema_ref_)(teacher, student, momentum)


def choose(device: torch.device) -> tuple[str, str]:
    """The implementation that "auto" takes on a device, and with what, or why none that is faster."""
    if device.type != "cpu":
        return "torch", f"there is no kernel for {device.type}"
    return ("cpu" if native.isas() else "torch"), native.describe()


def _named(x: nn.Module | Iterable[Tensor]) -> list[tuple[str, Tensor]]:
    if isinstance(x, nn.Module):
        # torch.compile and DistributedDataParallel prefix the names of what they wrap
        return [(n.replace("_orig_mod.", "").removeprefix("module."), p) for n, p in x.named_parameters()]
    return [(f"tensor {i}", t) for i, t in enumerate(x)]


def _check(teacher: list[tuple[str, Tensor]], student: list[tuple[str, Tensor]]) -> None:
    for (name, t), (other, s) in zip(teacher, student, strict=False):
        if name != other:
            raise ValueError(
                f"teacher has parameter {name} where student has {other}: give two of the same architecture"
            )
        if t.shape != s.shape:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)} in the teacher, {tuple(s.shape)} in the student"
            )
        if not (t.is_floating_point() and s.is_floating_point()):
            raise ValueError(
                f"{name} is {t.dtype} in the teacher, {s.dtype} in the student: give floating point"
            )
        if t is s or (t.numel() and t.untyped_storage()._cdata == s.untyped_storage()._cdata):
            raise ValueError(
                f"{name} of teacher and student share memory: make the teacher with copy.deepcopy"
            )
    if len(teacher) != len(student):
        longer, side = (teacher, "teacher") if len(teacher) > len(student) else (student, "student")
        name = longer[min(len(teacher), len(student))][0]
        raise ValueError(
            f"only the {side} has {name}: teacher {len(teacher)} parameters, student {len(student)}"
        )


@torch.no_grad()
def ema_(
    teacher: nn.Module | Iterable[Tensor],
    student: nn.Module | Iterable[Tensor],
    momentum: float | Tensor,
    *,
    impl: str = "auto",
) -> None:
    """Move the teacher towards the student, in place: t = momentum * t + (1 - momentum) * s.

    Args:
        teacher: module, or tensors of any floating dtype and layout. Keep it in float32: at a momentum of
            0.996 and above, bfloat16 loses the updates.
        student: module, or tensors in the same order and of the same shapes. Of modules only the parameters
            are averaged, as in official DINO; buffers stay.
        momentum: a number in [0, 1], or a tensor of one element (on the GPU: no synchronisation).
        impl: "auto", "torch" or "cpu": the C++ kernel, and the plain form for what is not contiguous float32
            or bfloat16.

    Raises:
        ValueError: the two sides do not match, or share memory; the message names the first such parameter.

    Source: Caron et al. 2021, section 3.1.
    """
    if impl not in ("auto", "torch", "cpu"):
        raise ValueError(f"impl is {impl!r}: give auto, torch or cpu")
    if impl == "cpu" and not native.isas():
        raise ValueError(f"impl='cpu' cannot run: {native.describe()}; give impl='torch' or 'auto'")
    if isinstance(momentum, Tensor):
        if momentum.numel() != 1:
            raise ValueError(f"momentum has shape {tuple(momentum.shape)}: give one number")
    elif not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}: it lies between 0 and 1")
    named_teacher, named_student = _named(teacher), _named(student)
    _check(named_teacher, named_student)
    if not named_teacher:
        return
    ts, ss = [t for _, t in named_teacher], [s for _, s in named_student]
    if not isinstance(momentum, Tensor):
        momentum = torch.tensor(momentum, dtype=torch.float64)
    _ema_(ts, ss, momentum.detach().reshape(()), choose(ts[0].device)[0] if impl == "auto" else impl)
