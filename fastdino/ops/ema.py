"""Teacher update: t = m * t + (1 - m) * s for every parameter. Computed in float32 whatever is stored."""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fastdino.ops import native
from fastdino.ops.ema_cpu import DTYPES as CPU_DTYPES
from fastdino.ops.ema_cpu import ema_cpu_


def ema_ref_(
    teacher: Sequence[Tensor], student: Sequence[Tensor], copies: Sequence[Tensor], momentum: Tensor
) -> None:
    """Lerp in one foreach call where all are alike, one by one where they are not; then the copies."""
    alike = {(x.dtype, x.device) for x in (*teacher, *student)}
    if len(alike) == 1 and momentum.device.type == "cpu":
        torch._foreach_lerp_(list(teacher), list(student), 1 - momentum.item())
    else:
        for t, s in zip(teacher, student, strict=True):
            wide = torch.float64 if t.dtype == torch.float64 else torch.float32
            t.copy_(torch.lerp(t.to(wide), s.to(t.device, wide), (1 - momentum).to(t.device, wide)))
    if copies:
        torch._foreach_copy_(list(copies), list(teacher))


@torch.library.custom_op("fastdino::ema_", mutates_args=("teacher", "copies"))
def _ema_(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    copies: Sequence[Tensor],
    momentum: Tensor,
    impl: str,
) -> None:
    """Each group of tensors that one launch can take; what the kernels do not cover goes to `ema_ref_`."""
    groups: dict[object, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
    for t, s, c in zip(teacher, student, copies or teacher, strict=True):
        if not t.numel():
            continue
        dense = t.is_contiguous() and s.is_contiguous() and c.is_contiguous() and t.device == s.device
        key: object = None
        if impl == "cpu" and dense and t.dtype in CPU_DTYPES and s.dtype in CPU_DTYPES:
            key = impl
        if impl == "triton" and dense and torch.float64 not in (t.dtype, s.dtype):
            aligned = t.data_ptr() % 64 == s.data_ptr() % 64 == c.data_ptr() % 64 == 0
            key = (t.dtype, s.dtype, t.device, aligned)
        if key not in groups:
            groups[key] = [], [], []
        ts, ss, cs = groups[key]
        ts.append(t)
        ss.append(s)
        if copies:
            cs.append(c)
    for key, (ts, ss, cs) in groups.items():
        if key is None:
            ema_ref_(ts, ss, cs, momentum)
        elif impl == "cpu":
            ema_cpu_(ts, ss, cs, momentum)
        else:
            from fastdino.ops.ema_triton import ema_triton_

            ema_triton_(ts, ss, cs, momentum)


def _local(x: Tensor) -> Tensor:
    # a DTensor is averaged shard by shard, without communication
    return x if type(x) in (Tensor, nn.Parameter) or not hasattr(x, "to_local") else x.to_local()


def _plain(name: str) -> str:
    # torch.compile and DistributedDataParallel prefix the names of what they wrap
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _parameters(x: nn.Module | Iterable[Tensor]) -> list[tuple[str, Tensor]]:
    if isinstance(x, nn.Module):
        return [(_plain(name), _local(p)) for name, p in x.named_parameters()]
    return [(f"tensor {i}", _local(t)) for i, t in enumerate(x)]


def _buffers(x: nn.Module | Iterable[Tensor]) -> list[tuple[str, Tensor]]:
    if not isinstance(x, nn.Module):
        raise ValueError("buffers are those of modules, and tensors were given: leave it at keep")
    return [(_plain(name), _local(b)) for name, b in x.named_buffers()]


def _matched(
    teacher: list[tuple[str, Tensor]], student: list[tuple[str, Tensor]], what: str = "student"
) -> list[tuple[str, Tensor, Tensor]]:
    """Name, teacher's and the other's tensor of each pair; ValueError at the first that does not match."""
    for (name, t), (other, s) in zip(teacher, student, strict=False):
        if name != other:
            raise ValueError(
                f"teacher has {name} where {what} has {other}: give two of the same architecture"
            )
        if t.shape != s.shape:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)} in the teacher, {tuple(s.shape)} in the {what}"
            )
        if t is s or (t.numel() and t.untyped_storage()._cdata == s.untyped_storage()._cdata):
            raise ValueError(
                f"{name} of teacher and {what} share memory: make the teacher with copy.deepcopy"
            )
    if len(teacher) != len(student):
        longer, side = (teacher, "teacher") if len(teacher) > len(student) else (student, what)
        name = longer[min(len(teacher), len(student))][0]
        raise ValueError(f"only the {side} has {name}: teacher {len(teacher)} tensors, {what} {len(student)}")
    return [(name, t, s) for (name, t), (_, s) in zip(teacher, student, strict=True)]


@torch.no_grad()
def ema_(
    teacher: nn.Module | Iterable[Tensor],
    student: nn.Module | Iterable[Tensor],
    momentum: float | Tensor,
    *,
    buffers: Literal["keep", "copy", "average"] = "keep",
    bf16_copy: nn.Module | Iterable[Tensor] | None = None,
    impl: str = "auto",
) -> None:
    """Move the teacher towards the student, in place: t = momentum * t + (1 - momentum) * s.

    `buffers` and `bf16_copy` are for trainers other than fastdino's, which uses neither.

    Args:
        teacher: module, or tensors of any floating dtype and layout. Keep it in float32: at a momentum of
            0.996 and above, bfloat16 loses the updates. Of a DTensor the local shard is updated.
        student: module, or tensors in the same order and of the same shapes; dtypes may differ.
        momentum: a number in [0, 1], or a tensor of one element (on the GPU: no synchronisation).
        buffers: of modules, "keep" the teacher's as in official DINO, "copy" the student's, or "average" them
            like parameters and copy those that are not floating point.
        bf16_copy: bfloat16 module or tensors, matching the teacher's parameters, that the same pass sets to
            the new teacher, for a forward in bfloat16 that casts nothing.
        impl: "auto", "torch", "cpu" (C++: float32 and bfloat16) or "triton" (CUDA GPU: not float64). What a
            kernel does not cover, and what is not contiguous, takes the plain form.

    Raises:
        ValueError: the two sides do not match, or share memory; the message names the first such tensor.

    Source: Caron et al. 2021, section 3.1.
    """
    if buffers not in ("keep", "copy", "average"):
        raise ValueError(f"buffers is {buffers!r}: give keep, copy or average")
    if not isinstance(momentum, Tensor):
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum is {momentum}: it lies between 0 and 1")
        # on the CPU: a copy to the GPU would wait for it
        momentum = torch.tensor(momentum, dtype=torch.float64, device="cpu")
    elif momentum.numel() != 1:
        raise ValueError(f"momentum has shape {tuple(momentum.shape)}: give one number")
    parameters = _matched(_parameters(teacher), _parameters(student))
    for name, t, s in parameters:
        if not (t.is_floating_point() and s.is_floating_point()):
            raise ValueError(
                f"{name} is {t.dtype} in the teacher, {s.dtype} in the student: give floating point"
            )
    copies: list[Tensor] = []
    if bf16_copy is not None:
        for name, _, copy in _matched(_parameters(teacher), _parameters(bf16_copy), "bf16_copy"):
            if copy.dtype != torch.bfloat16:
                raise ValueError(f"{name} of bf16_copy is {copy.dtype}: give bfloat16")
            copies.append(copy)
    given = [] if buffers == "keep" else _matched(_buffers(teacher), _buffers(student))
    averaged = [pair for pair in given if buffers == "average" and pair[1].is_floating_point()]
    for pairs, targets in ((parameters, copies), (averaged, [])):
        if not pairs:
            continue
        chosen = native.resolve(impl, pairs[0][1].device)
        _, ts, ss = map(list, zip(*pairs, strict=True))
        _ema_(ts, ss, targets, momentum.detach().reshape(()), chosen)
    for _, t, s in given:
        if buffers == "copy" or not t.is_floating_point():
            t.copy_(s)
