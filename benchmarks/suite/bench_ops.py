"""The operations, at the sizes of ViT-S/16 with 65,536 prototypes."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino import ops

V, G = 10, 2
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
DTYPES = ("float32", "bfloat16")
Timed = Callable[..., None]


def official_loss(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    """Official DINO's: 2 V - 2 cross-entropies one by one."""
    q = torch.softmax((teacher - center) / TEACHER_TEMP, -1)
    terms = [
        torch.sum(-q[g] * torch.log_softmax(student[v] / STUDENT_TEMP, -1, dtype=torch.float32), -1).mean()
        for g in range(G)
        for v in range(V)
        if v != g
    ]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("variant", ["fastdino", "fastdino-in-place", "official"])
@pytest.mark.parametrize("dtype", DTYPES)
def bench_loss(timed: Timed, small: bool, dtype: str, variant: str) -> None:
    """Forward and backward, with an upstream gradient that is not 1."""
    images, prototypes = (2, 100) if small else (16, 65536)
    logits = torch.randn(V, images, prototypes).to(getattr(torch, dtype))
    student, upstream = logits.clone().requires_grad_(), torch.tensor(0.37)
    teacher = torch.randn(G, images, prototypes).to(logits.dtype)
    center = torch.randn(prototypes) * 0.1

    def restore() -> None:
        student.grad = None
        student.data.copy_(logits)  # in place, the gradient was written over them

    def ours(**options: Any) -> None:
        temps = {"student_temp": STUDENT_TEMP, "teacher_temp": TEACHER_TEMP}
        # a view: what has no other reader is not a leaf
        ops.dino_loss(student.view_as(student), teacher, center, **temps, **options).backward(upstream)

    variants = {
        "fastdino": ours,
        "fastdino-in-place": lambda: ours(inplace_backward=True),
        "official": lambda: official_loss(student, teacher, center).backward(upstream),
    }
    rounds = 40 if variant == "official" else 200
    timed(f"loss, {dtype}", variant, variants, rounds, restore)


@pytest.mark.parametrize("variant", ["fastdino", "official"])
def bench_center(timed: Timed, small: bool, variant: str) -> None:
    """Of a teacher's output whose mean nobody has yet."""
    from fastdino.loss import DINOLoss

    images, prototypes = (2, 100) if small else (16, 65536)
    loss, teacher = DINOLoss(prototypes, V, 0.04, 0.04, 0, 1), torch.randn(G * images, prototypes)
    center = torch.zeros(1, prototypes)

    def official() -> Tensor:
        return center.mul_(0.9).add_(torch.sum(teacher, dim=0, keepdim=True) / len(teacher) * 0.1)

    timed("centre", variant, {"fastdino": lambda: loss.update_center(teacher), "official": official}, 1000)


@torch.no_grad()
def dinov2_sinkhorn(teacher: Tensor) -> Tensor:
    """DINOv2's, to probabilities."""
    q = torch.exp(teacher / TEACHER_TEMP).t()
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(dim=1, keepdim=True) * len(q)
        q /= q.sum(dim=0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).t()


@pytest.mark.parametrize("variant", ["fastdino", "dinov2"])
def bench_sinkhorn(timed: Timed, small: bool, variant: str) -> None:
    images, prototypes = (2, 100) if small else (16, 65536)
    teacher = 0.3 * torch.randn(G * images, prototypes)
    variants = {
        "fastdino": lambda: ops.sinkhorn_center(teacher, TEACHER_TEMP),
        "dinov2": lambda: dinov2_sinkhorn(teacher),
    }
    timed("sinkhorn", variant, variants, 200)


@pytest.mark.parametrize("variant", ["fastdino", "foreach-lerp"])
@pytest.mark.parametrize("arch", ["vit_small", "vit_base"])
def bench_ema(timed: Timed, small: bool, arch: str, variant: str) -> None:
    """Of a network's and its head's parameters."""
    from fastdino import vit
    from fastdino.head import DINOHead

    with torch.device("meta"):
        backbone = getattr(vit, "vit_nano" if small else arch)(16)
        modules = (backbone, DINOHead(backbone.embed_dim, 100 if small else 65536))
    shapes = [p.shape for module in modules for p in module.parameters()]
    teacher, student = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    variants = {
        "fastdino": lambda: ops.ema_(teacher, student, 0.996),
        "foreach-lerp": lambda: torch._foreach_lerp_(teacher, student, 0.004),
    }
    with torch.no_grad():
        timed(f"teacher's update, {arch}", variant, variants, 200 if arch == "vit_small" else 100)


def per_run(qkv: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
    """torch's attention once for each length."""
    outs = []
    for part, run in zip(qkv.split([a * b for a, b in runs]), runs, strict=True):
        q, k, v = part.unflatten(0, run).permute(2, 0, 3, 1, 4).unbind(0)
        outs.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("variant", ["fastdino", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patch", [16, 8])
def bench_attention(timed: Timed, small: bool, patch: int, dtype: str, variant: str) -> None:
    """Of packed crops, forward and backward."""
    images, heads = (1, 1) if small else ({16: 4, 8: 1}[patch], 6)
    runs = [(2 * images, (224 // patch) ** 2 + 1), (8 * images, (96 // patch) ** 2 + 1)]
    leaf = torch.randn(
        sum(a * b for a, b in runs), 3, heads, 64, dtype=getattr(torch, dtype)
    ).requires_grad_()
    upstream = torch.randn_like(leaf[:, 0])
    variants = {
        "fastdino": lambda: torch.autograd.grad(ops.attention(leaf, runs), leaf, upstream),
        "torch": lambda: torch.autograd.grad(per_run(leaf, runs), leaf, upstream),
    }
    timed(f"attention, patch {patch}, {dtype}", variant, variants, 80 if patch == 16 else 40)


@pytest.mark.parametrize("variant", ["fastdino", "torch"])
def bench_linear(timed: Timed, small: bool, variant: str) -> None:
    """The wider layer of an MLP over the tokens of four images, forward and backward, float32."""
    tokens, width = (20, 24) if small else (2760, 384)
    inputs = [torch.randn(n) for n in ((tokens, width), (4 * width, width), (4 * width,))]
    inputs = [x.requires_grad_() for x in inputs]
    upstream = torch.randn(tokens, 4 * width)
    variants = {
        "fastdino": lambda: torch.autograd.grad(ops.linear(*inputs), inputs, upstream),
        "torch": lambda: torch.autograd.grad(F.linear(*inputs), inputs, upstream),
    }
    timed("linear", variant, variants, 80)
