"""DINO loss over all pairs of crops, forward and backward, without a temporary of the logits' size.

x_v = s_v / ts,  q_g = softmax((t_g - c) / tt),  p_v = softmax(x_v),  weights M[v, g],  m_v = sum_g M[v, g],
T_v = sum_g M[v, g] q_g,  n = sum M,  B images:

    L       = 1 / (n B)    * sum_b sum_v [ m_v * logsumexp(x_v) - <T_v, x_v> ]       (because sum_k q_k = 1)
    dL/ds_v = 1 / (n B ts) * (m_v * p_v - T_v)

Student (V, B, K), teacher (G, B, K), centre (K,). Everything is accumulated in float32, or in float64 if a
logit is float64.
"""

from typing import Any

import torch
from torch import Tensor

from fastdino.ops import native
from fastdino.ops.dino_loss_cpu import DTYPES as CPU_DTYPES
from fastdino.ops.dino_loss_cpu import dino_loss_bwd_cpu, dino_loss_cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _accumulator(student: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def _softmax(x: Tensor, top: Tensor, temp: Tensor) -> Tensor:
    # the maximum leaves before the division, which would round it away; torch.exp is many times slower than
    # torch.softmax where it underflows
    return torch.softmax((x - top[..., None]).div_(temp), -1)


def _sum(probs: Tensor) -> Tensor:
    """Sum of exp((x - maximum) / temp) of each row; NaN where a softmax is."""
    return probs.amax(-1).reciprocal_()


def dino_loss_ref(
    student: Tensor,  # (V, B, K)
    teacher: Tensor,  # (G, B, K)
    center: Tensor,  # (K,) in the accumulation dtype, as all below
    student_temp: Tensor,  # ()
    teacher_temp: Tensor,  # ()
    pair_weights: Tensor,  # (V, G)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (), maximum and sum of exponentials of each row of student and teacher, (2, V, B) and (2, G, B),
    teacher's mean (K,)."""
    dtype, batch = center.dtype, student.shape[1]
    wide = teacher.to(dtype)
    teacher_mean = wide.mean((0, 1))
    centred = wide - center
    top = centred.amax(-1)
    q = _softmax(centred, top, teacher_temp)
    teacher_stats = torch.stack((top, _sum(q)))
    student_stats = center.new_empty(2, *student.shape[:2])
    loss = center.new_zeros((), dtype=torch.float64)
    for v, weights in enumerate(pair_weights):
        row = student[v].to(dtype)
        top = row.amax(-1)
        total = _sum(_softmax(row, top, student_temp))
        student_stats[0, v], student_stats[1, v] = top, total
        # sum_g M (log_sum - <q, x - max>): equal to the formula, and exact where x is large
        shifted = (row - top[:, None]).div_(student_temp)
        for g, weight in enumerate(weights):
            pair = total.log() - (q[g] * shifted).sum(-1)
            loss += torch.where(weight == 0, 0, weight * pair.sum(dtype=torch.float64))
    loss = (loss / (pair_weights.sum() * batch)).to(dtype)
    return loss, student_stats, teacher_stats, teacher_mean


def dino_loss_bwd_ref(
    grad_student: Tensor,  # (V, B, K), written; may be the student itself
    grad: Tensor,  # () upstream
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    pair_weights: Tensor,
    student_stats: Tensor,
    teacher_stats: Tensor,
) -> None:
    """Gradient of the loss for the student's logits, from the forward's statistics."""
    scale = grad / (pair_weights.sum() * student.shape[1] * student_temp)
    q = _softmax(teacher.to(center.dtype) - center, teacher_stats[0], teacher_temp)
    for v, weights in enumerate(pair_weights):
        out = _softmax(student[v].to(center.dtype), student_stats[0, v], student_temp)
        out *= weights.sum()
        for g, weight in enumerate(weights):
            out -= torch.where(weight == 0, 0, weight * q[g])
        grad_student[v] = out.mul_(scale)


def _empty_results(student: Tensor, teacher: Tensor, center: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `dino_loss_ref` returns, to be written."""
    (v, b, k), g = student.shape, teacher.shape[0]
    loss, mean = center.new_empty(()), center.new_empty(k)
    return loss, center.new_empty(2, v, b), center.new_empty(2, g, b), mean


# what both directions take after the two logits
REST = (
    "Tensor teacher, Tensor center, Tensor student_temp, Tensor teacher_temp, Tensor? pair_weights, "
    "{}str impl"
)
STATS = "Tensor student_stats, Tensor teacher_stats, "


@torch.library.custom_op(
    "fastdino::dino_loss",
    mutates_args=(),
    schema=f"(Tensor student, {REST.format('')}, bool inplace_backward) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _dino_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    pair_weights: Tensor | None,
    impl: str,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = (student, teacher, center, student_temp, teacher_temp)
    if impl == "triton":
        from fastdino.ops.dino_loss_triton import dino_loss_triton

        results = _empty_results(student, teacher, center)
        dino_loss_triton(results, *args, pair_weights)
        return results
    weights = _official_weights(student, teacher, center) if pair_weights is None else pair_weights
    if impl == "torch":
        return dino_loss_ref(*args, weights)
    results = _empty_results(student, teacher, center)
    dino_loss_cpu(results, *args, weights)
    return results


@_dino_loss.register_fake
def _(student: Tensor, teacher: Tensor, center: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_results(student, teacher, center)


@torch.library.custom_op(
    "fastdino::dino_loss_bwd",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor student, {REST.format(STATS)}) -> Tensor",
)
def _dino_loss_bwd(grad: Tensor, student: Tensor, *rest: Any) -> Tensor:
    grad_student = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    _backward_into(grad_student, grad, student, *rest)
    return grad_student


@_dino_loss_bwd.register_fake
def _(grad: Tensor, student: Tensor, *_: Any) -> Tensor:
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


@torch.library.custom_op(
    "fastdino::dino_loss_bwd_",
    mutates_args=("student",),
    schema=f"(Tensor grad, Tensor(a!) student, {REST.format(STATS)}) -> ()",
)
def _dino_loss_bwd_(grad: Tensor, student: Tensor, *rest: Any) -> None:
    _backward_into(student, grad, student, *rest)


def _backward_into(
    grad_student: Tensor,
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    pair_weights: Tensor | None,
    student_stats: Tensor,
    teacher_stats: Tensor,
    impl: str,
) -> None:
    args = (grad_student, grad, student, teacher, center, student_temp, teacher_temp)
    stats = (student_stats, teacher_stats)
    if impl == "triton":
        from fastdino.ops.dino_loss_triton import dino_loss_bwd_triton

        return dino_loss_bwd_triton(*args, pair_weights, *stats)
    run = dino_loss_bwd_cpu if impl == "cpu" else dino_loss_bwd_ref
    weights = _official_weights(student, teacher, center) if pair_weights is None else pair_weights
    return run(*args, weights, *stats)


def _official_weights(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    return center.new_ones(student.shape[0], teacher.shape[0]).fill_diagonal_(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, impl, inplace_backward = inputs
    _, student_stats, teacher_stats, teacher_mean = output
    ctx.mark_non_differentiable(student_stats, teacher_stats, teacher_mean)
    ctx.save_for_backward(*tensors, student_stats, teacher_stats)
    ctx.impl, ctx.inplace_backward = impl, inplace_backward


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 7
    if not ctx.needs_input_grad[0]:
        return None, *nothing
    student, *rest = ctx.saved_tensors
    # elsewhere two logits may share memory, as after expand
    dense = student.is_contiguous() or student.transpose(0, 1).is_contiguous()
    if ctx.inplace_backward and dense and not torch.compiler.is_compiling():
        _dino_loss_bwd_(grad, student.detach(), *rest, ctx.impl)
        return student.detach(), *nothing
    return _dino_loss_bwd(grad, student, *rest, ctx.impl), *nothing


_dino_loss.register_autograd(_backward, setup_context=_setup_context)


def _unfit(student: Tensor, teacher: Tensor) -> dict[str, str]:
    """Why a kernel cannot take logits of these dtypes, for each that cannot."""
    dtypes, unfit = {student.dtype, teacher.dtype}, {}
    if unknown := dtypes.difference(CPU_DTYPES):
        unfit["cpu"] = f"its kernels know float32 and bfloat16, not {unknown.pop()}"
    if torch.float64 in dtypes:
        unfit["triton"] = "its kernels compute in float32, not float64"
    return unfit


def _check(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    temps: dict[str, float | Tensor],
    pair_weights: Tensor | None,
) -> None:
    for name, x, dims in (("student", student, "(V, B, K)"), ("teacher", teacher, "(G, B, K)")):
        if x.ndim != 3 or 0 in x.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: give logits of shape {dims}, none of them 0"
            )
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} is {x.dtype}: give float32, bfloat16, float16 or float64")
    if student.shape[1:] != teacher.shape[1:]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in images or "
            "prototypes, the last two sizes"
        )
    if center.shape != student.shape[2:]:
        raise ValueError(
            f"center has shape {tuple(center.shape)}: give ({student.shape[2]},), one number a prototype"
        )
    if student.device != teacher.device or student.device != center.device:
        raise ValueError(
            f"student is on {student.device}, teacher on {teacher.device}, center on {center.device}"
        )
    for name, temp in temps.items():
        native.check_temperature(name, temp)
    pairs = (student.shape[0], teacher.shape[0])
    if pair_weights is None and pairs == (1, 1):
        raise ValueError(
            "one crop on each side leaves no pair of different crops: give pair_weights of shape (1, 1)"
        )
    if pair_weights is not None and pair_weights.shape != pairs:
        raise ValueError(f"pair_weights has shape {tuple(pair_weights.shape)}: give (V, G) = {pairs}")


def dino_loss(
    student: Tensor,  # (V, B, K)
    teacher: Tensor,  # (G, B, K)
    center: Tensor,  # (K,)
    *,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    pair_weights: Tensor | None = None,  # (V, G)
    impl: str = "auto",
    inplace_backward: bool = False,
    return_teacher_mean: bool = False,
) -> Any:
    """Mean cross-entropy of the teacher's centred, sharpened output and the student's, over pairs of crops.

    Args:
        student: logits (V, B, K) of all crops, float32, bfloat16, float16 or float64, in any layout.
        teacher: logits (G, B, K) of the first G crops; no gradient flows to it. Its dtype may differ.
        center: (K,), subtracted from the teacher's logits.
        student_temp: temperature, a number or a tensor of one element. A tensor on the logits' device lets a
            schedule change it without a recompilation or a new CUDA graph.
        teacher_temp: likewise.
        pair_weights: (V, G), weight of student crop v against teacher crop g; None is official DINO: 1, and 0
            where v == g. The loss is divided by their sum, which must not be 0.
        impl: "auto", "torch", "cpu" (C++ kernels: float32 and bfloat16) or "triton" (CUDA GPU: not float64).
        inplace_backward: write the gradient over the student's logits, which saves a tensor of their size.
            Only for logits that nobody reads after the loss; autograd raises if another operation saved them.
            Ignored under torch.compile, and for logits that are not contiguous.
        return_teacher_mean: also return the mean of the teacher's logits over crops and images, which comes
            out of the same pass.

    Returns:
        The loss, a float32 scalar (float64 if a logit is float64); with `return_teacher_mean` also the mean,
        (K,).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a temperature is not above 0.

    Source: Caron et al. 2021, section 3.1 and algorithm 1.
    """
    temps = {"student_temp": student_temp, "teacher_temp": teacher_temp}
    _check(student, teacher, center, temps, pair_weights)
    dtype, device = _accumulator(student, teacher), student.device
    # numbers stay on the CPU: a copy to the GPU would wait for it
    numbers = (
        t if isinstance(t, Tensor) else torch.tensor(t, dtype=dtype, device="cpu") for t in temps.values()
    )
    loss, _, _, teacher_mean = _dino_loss(
        student,
        teacher.detach(),
        center.detach().to(dtype),
        *(t.detach().to(dtype).reshape(()) for t in numbers),
        None if pair_weights is None else pair_weights.detach().to(device, dtype),
        native.resolve(impl, device, _unfit(student, teacher)),
        inplace_backward,
    )
    return (loss, teacher_mean) if return_teacher_mean else loss
