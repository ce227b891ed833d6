"""DINO's loss written out, what is compared with it, and logits to compare on."""

import math

import torch
from torch import Tensor

from fastdino.ops import dino_loss


def official(
    student: Tensor, teacher: Tensor, center: Tensor, ts: float, tt: float, weights: Tensor
) -> Tensor:
    """Pair by pair, as the paper writes it: the weighted terms (pairs, B), whose sum is the loss."""
    terms = []
    for g in range(teacher.shape[0]):
        q = torch.softmax((teacher[g] - center) / tt, -1)
        for v in range(student.shape[0]):
            if weights[v, g]:
                terms.append(weights[v, g] * (-q * torch.log_softmax(student[v] / ts, -1)).sum(-1))
    return torch.stack(terms) / (weights.sum() * student.shape[1])


def by_formula(
    dtype: torch.dtype, student: Tensor, teacher: Tensor, center: Tensor, *args, upstream: float = 1.0
):
    s = student.detach().to(dtype).requires_grad_()
    terms = official(s, teacher.to(dtype), center.to(dtype), *args)
    (grad,) = torch.autograd.grad(terms.sum() * upstream, s)
    return terms.detach(), grad


def default_weights(v: int, g: int) -> Tensor:
    return 1 - torch.eye(v, g)


def logits(v: int, g: int, b: int, k: int, scale: float = 1.0, student=torch.float32, teacher=torch.float32):
    s = (torch.randn(v, b, k) * scale).to(student)
    t = (torch.randn(g, b, k) * scale).to(teacher)
    return s, t, torch.randn(k) * 0.1 * scale


def check(
    impl: str,
    s: Tensor,
    t: Tensor,
    c: Tensor,
    ts: float = 0.1,
    tt: float = 0.04,
    weights=None,
    upstream=1.0,
    few=False,
):
    """`few`: of a few numbers float32 may get all right by luck; its error is then that of one rounding of
    the largest exponent, as a share of the largest term."""
    leaf = s.detach().requires_grad_()
    loss, mean = dino_loss(
        leaf,
        t,
        c,
        student_temp=ts,
        teacher_temp=tt,
        pair_weights=weights,
        impl=impl,
        return_teacher_mean=True,
    )
    (grad,) = torch.autograd.grad(loss * upstream, leaf)
    assert loss.dtype == torch.float32
    assert grad.dtype == s.dtype
    used = default_weights(s.shape[0], t.shape[0]) if weights is None else weights
    true_terms, true_grad = by_formula(torch.float64, s, t, c, ts, tt, used, upstream=upstream)
    plain_terms, plain_grad = by_formula(torch.float32, s, t, c, ts, tt, used, upstream=upstream)
    # one number's error may vanish by luck: the measure is that of the worst term, as if all erred like it
    worst = (plain_terms - true_terms).abs().max() * len(true_terms.flatten())
    exponents = [(x.double() - y) / z for x, y, z in ((s, 0, ts), (t, c, tt))]
    eps = torch.finfo(torch.float32).eps / 2
    least = few * 2 * eps * (exponents[0].max() - exponents[0].min() + math.log(s.shape[2]))
    assert_as_accurate(loss.detach(), true_terms.sum(), true_terms.sum() + worst, least=least)
    # Triton's interpreter truncates to bfloat16; compiled, it rounds (test_triton.py)
    truncates = impl == "triton" and s.dtype == torch.bfloat16 and s.device.type == "cpu"
    largest = max(x.softmax(-1).max() * (1 + x.abs().max()) for x in exponents)
    term = largest * used.sum(1).max() * abs(upstream) / (used.sum() * s.shape[1] * ts)
    assert_as_accurate(grad, true_grad, plain_grad, 1.0 if truncates else 0.5, few * eps * term)
    true_mean, plain_mean = t.double().mean((0, 1)), t.float().mean((0, 1))
    assert_as_accurate(mean, true_mean, plain_mean, least=few * eps * t.abs().max().double())


def assert_as_accurate(
    x: Tensor, truth: Tensor, plain: Tensor, ulps: float = 0.5, least: Tensor | float = 0.0
) -> None:
    info = torch.finfo(x.dtype)
    rounding = info.eps * truth.abs() * ulps + info.smallest_normal * info.eps
    bound = 2 * torch.maximum((plain.double() - truth).abs().max(), torch.as_tensor(least)) + rounding
    excess = ((x.double() - truth).abs() - bound).max()
    assert excess <= 0, f"{excess:.3g} beyond the bound {bound.max():.3g}"
