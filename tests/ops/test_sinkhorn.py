"""The Sinkhorn-Knopp centre against the textbook's iteration on the matrix of assignments."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from fastdino.ops import dino_loss, sinkhorn_center


def textbook(logits: Tensor, temp: float, iterations: int) -> Tensor:
    """Assignments (N, K): prototypes and samples take turns in being normalised to equal shares."""
    q = torch.exp(logits / temp)
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(0, keepdim=True) * q.shape[1]
        q /= q.sum(1, keepdim=True) * q.shape[0]
    return q * q.shape[0]


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_assignments_are_the_textbooks(iterations):
    teacher = torch.randn(2, 8, 13, dtype=torch.float64)
    center = sinkhorn_center(teacher, 0.07, iterations)
    q = torch.softmax((teacher - center) / 0.07, -1)
    torch.testing.assert_close(q.flatten(0, 1), textbook(teacher.flatten(0, 1), 0.07, iterations))


def test_the_loss_with_this_centre_uses_these_assignments():
    student, teacher = torch.randn(3, 4, 9, dtype=torch.float64), torch.randn(2, 4, 9, dtype=torch.float64)
    q = textbook(teacher.flatten(0, 1), 0.1, 3).unflatten(0, (2, 4))
    log_p = torch.log_softmax(student / 0.2, -1)
    pairs = [(v, g) for v in range(3) for g in range(2) if v != g]
    expected = sum(-(q[g] * log_p[v]).sum(-1).mean() for v, g in pairs) / len(pairs)
    loss = dino_loss(student, teacher, sinkhorn_center(teacher, 0.1), student_temp=0.2, teacher_temp=0.1)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_do_not_overflow(dtype):
    teacher = (torch.randn(2, 16, 40) * 100).to(dtype)
    center = sinkhorn_center(teacher, 0.04)
    assert center.dtype == torch.float32
    torch.testing.assert_close(center, sinkhorn_center(teacher.double(), 0.04).float(), rtol=1e-5, atol=1e-3)


def _rank(rank: int, store: Path, teacher: Tensor, expected: Tensor) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = teacher[:3] if rank == 0 else teacher[3:]  # ranks need not hold equally many rows
    torch.testing.assert_close(sinkhorn_center(mine, 0.07), expected)
    dist.destroy_process_group()


def test_rows_of_all_ranks_count(tmp_path):
    teacher = torch.randn(8, 13, dtype=torch.float64)
    mp.spawn(_rank, (tmp_path / "store", teacher, sinkhorn_center(teacher, 0.07)), nprocs=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(0, 3), 0.1), "teacher has shape"),
        ((torch.zeros(3), 0.1), "teacher has shape"),
        ((torch.zeros(2, 3), 0.0), "temp is"),
        ((torch.zeros(2, 3), torch.ones(2)), "temp has shape"),
        ((torch.zeros(2, 3), 0.1, 0), "iterations is 0"),
    ],
)
def test_impossible_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn_center(*arguments)
