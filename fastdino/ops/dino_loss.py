"""DINO loss over all pairs of crops, forward and backward, without a temporary of the logits' size.

x_v = s_v / ts,  q_g = softmax((t_g - c) / tt),  p_v = softmax(x_v),  weights M[v, g],  m_v = sum_g M[v, g],
T_v = sum_g M[v, g] q_g,  n = sum M,  B images:

    L       = 1 / (n B)    * sum_b sum_v [ m_v * logsumexp(x_v) - <T_v, x_v> ]       (because sum_k q_k = 1)
    dL/ds_v = 1 / (n B ts) * (m_v * p_v - T_v)

Student (V, B, K), teacher (G, B, K), centre (K,). Everything is accumulated in float32, or in float64 if a
logit is float64.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from fastdino.ops import native

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


POINTER, FLOAT, INT = ctypes.c_void_p, ctypes.c_float, ctypes.c_int
CPU_FORWARD = (POINTER,) * 10 + (FLOAT, FLOAT, POINTER, INT, INT)
CPU_BACKWARD = (POINTER,) * 8 + (FLOAT, FLOAT, FLOAT, POINTER, INT, INT)
CPU_DTYPES = (torch.float32, torch.bfloat16)


def _rows(x: Tensor) -> Tensor:
    """Logits whose last axis is contiguous; crops and images keep any stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _cpu_call(student: Tensor, teacher: Tensor, out: Tensor) -> tuple[Any, int, int, Tensor]:
    """What both directions pass to C: sizes with strides, dtypes, threads; and their workspace."""
    crops = (student, teacher, out)
    sizes = [student.shape[0], teacher.shape[0], *student.shape[1:]]
    strides = [stride for x in crops for stride in x.stride()[:2]]
    numbers = (ctypes.c_int64 * 10)(*sizes, *strides)
    half = (student.dtype == torch.bfloat16) + 2 * (teacher.dtype == torch.bfloat16)
    # below some ten microseconds of work a second thread costs more than it does
    threads = torch.get_num_threads() if student.numel() + teacher.numel() > 65536 else 1
    floats = ctypes.c_int64()
    size_of = native.kernel("dino_loss_workspace", (POINTER, POINTER, INT))
    size_of(ctypes.addressof(floats), ctypes.addressof(numbers), threads)
    return numbers, half, threads, torch.empty(floats.value, device="cpu")


def dino_loss_cpu(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    pair_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`dino_loss_ref` by kernels/dino_loss.cpp."""
    student, teacher = _rows(student), _rows(teacher)
    center, pair_weights = center.contiguous(), pair_weights.contiguous()
    out = _empty_results(student, teacher, center)
    numbers, half, threads, workspace = _cpu_call(student, teacher, student)
    losses = torch.empty(student.shape[1], dtype=torch.float64, device="cpu")
    tensors = (*out, workspace, losses, student, teacher, center, pair_weights)
    native.kernel("dino_loss_forward", CPU_FORWARD)(
        *(x.data_ptr() for x in tensors),
        student_temp.item(),
        teacher_temp.item(),
        ctypes.addressof(numbers),
        half,
        threads,
    )
    return out


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
    """`dino_loss_bwd_ref` by kernels/dino_loss.cpp."""
    student, teacher = _rows(student), _rows(teacher)
    center, pair_weights = center.contiguous(), pair_weights.contiguous()
    out = grad_student if grad_student.stride(-1) == 1 else torch.empty_like(student)
    numbers, half, threads, workspace = _cpu_call(student, teacher, out)
    tensors = (out, workspace, student, teacher, center, pair_weights, student_stats, teacher_stats)
    native.kernel("dino_loss_backward", CPU_BACKWARD)(
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


def _empty_results(student: Tensor, teacher: Tensor, center: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, statistics of both sides and the teacher's mean, to be written."""
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

        return dino_loss_triton(*args, pair_weights)
    run = dino_loss_cpu if impl == "cpu" else dino_loss_ref
    return run(*args, _official_weights(student, teacher, center) if pair_weights is None else pair_weights)


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


def _cannot(impl: str, student: Tensor, teacher: Tensor) -> str:
    """Why a kernel cannot take these tensors; empty if it can."""
    dtypes = {student.dtype, teacher.dtype}
    if why := native.missing(impl, student.device):
        return why
    if impl == "cpu" and (unknown := dtypes.difference(CPU_DTYPES)):
        return f"its kernels know float32 and bfloat16, not {unknown.pop()}"
    if impl == "triton" and torch.float64 in dtypes:
        return "its kernels compute in float32, not float64"
    return ""


def _resolve(impl: str, student: Tensor, teacher: Tensor) -> str:
    """The implementation that runs; "auto" takes the plain form for what the kernels do not cover."""
    chosen = native.choose(student.device)[0] if impl == "auto" else impl
    if why := _cannot(chosen, student, teacher):
        if impl == "auto":
            return "torch"
        raise ValueError(f"impl={impl!r} cannot run: {why}; give impl='torch' or 'auto'")
    return chosen


def _check(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    temps: dict[str, float | Tensor],
    pair_weights: Tensor | None,
    impl: str,
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
        if isinstance(temp, Tensor):
            if temp.numel() != 1:
                raise ValueError(f"{name} has shape {tuple(temp.shape)}: give one number")
        elif not temp > 0:
            raise ValueError(f"{name} is {temp}: a temperature is above 0")
    pairs = (student.shape[0], teacher.shape[0])
    if pair_weights is None and pairs == (1, 1):
        raise ValueError(
            "one crop on each side leaves no pair of different crops: give pair_weights of shape (1, 1)"
        )
    if pair_weights is not None and pair_weights.shape != pairs:
        raise ValueError(f"pair_weights has shape {tuple(pair_weights.shape)}: give (V, G) = {pairs}")
    if impl not in ("auto", "torch", "cpu", "triton"):
        raise ValueError(f"impl is {impl!r}: give auto, torch, cpu or triton")


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
    _check(student, teacher, center, temps, pair_weights, impl)
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
        _resolve(impl, student, teacher),
        inplace_backward,
    )
    return (loss, teacher_mean) if return_teacher_mean else loss
