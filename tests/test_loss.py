"""fastdino.DINOLoss against official DINO's algorithm, call by call: loss, gradient, centre, temperatures.

Bounds: the truth in float64, and twice the error of the official form in float32 on the same logits plus one
rounding to the output's dtype. In half precision also: no further from the truth than the official form.
"""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastdino import DINOLoss

K, NCROPS, B = 257, 6, 3
ARGUMENTS = {
    "out_dim": K,
    "ncrops": NCROPS,
    "warmup_teacher_temp": 0.03,
    "teacher_temp": 0.06,
    "warmup_teacher_temp_epochs": 3,
    "nepochs": 8,
}


class Official:
    """Official DINO's loss: 2 * ncrops - 2 terms, and a centre that moves after each of its uses.

    All is computed in `dtype`; or, where that is a half precision, as under CUDA's autocast: the division by
    the student's temperature in it, everything else in float32.
    """

    def __init__(self, dtype: torch.dtype, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        self.dtype, self.student_temp, self.m = dtype, student_temp, center_momentum
        self.wide = torch.promote_types(dtype, torch.float32)
        self.center = torch.zeros(1, K, dtype=self.wide)
        warmup, final, n = 0.03, 0.06, 3
        self.temps = np.concatenate((np.linspace(warmup, final, n), np.ones(8 - n) * final))

    def terms(self, student: Tensor, teacher: Tensor, epoch: int) -> Tensor:
        """(pairs, B), whose mean is the loss; moves the centre."""
        student_out = (student.to(self.dtype) / self.student_temp).chunk(NCROPS)
        teacher_out = F.softmax(
            (teacher.to(self.dtype) - self.center) / self.temps[epoch], dim=-1, dtype=self.wide
        )
        terms = [
            torch.sum(-q * F.log_softmax(student_out[v], dim=-1, dtype=self.wide), dim=-1)
            for iq, q in enumerate(teacher_out.detach().chunk(2))
            for v in range(NCROPS)
            if v != iq
        ]
        assert len(terms) == 2 * NCROPS - 2
        batch = teacher.to(self.dtype).sum(0, keepdim=True, dtype=self.wide) / len(teacher)
        self.center = self.center * self.m + batch * (1 - self.m)
        return torch.stack(terms)


def logits(
    dtype: torch.dtype = torch.float32, scale: float = 1.0, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(NCROPS * B, K) * scale, torch.randn(2 * B, K) * scale
    return student.to(dtype), (teacher + offset + torch.linspace(-1, 1, K) * scale).to(dtype)


def run(loss_of, student: Tensor, upstream: float = 1.0) -> tuple[Tensor, Tensor]:
    """Loss (or its terms) and gradient for the student's logits."""
    leaf = student.detach().clone().requires_grad_()
    loss = loss_of(leaf)
    (loss.mean() * upstream).backward()
    return loss.detach(), leaf.grad


def within(x: Tensor, truth: Tensor, error: Tensor) -> None:
    """No further from the truth than `error` and one rounding."""
    excess = (x.double() - truth).abs() - error - torch.finfo(x.dtype).eps / 2 * truth.abs()
    assert excess.max() <= 1e-30, f"{excess.max():.3g} beyond the bound"


def check_as_accurate_as_official(
    dtype: torch.dtype, calls: list[int], upstream: float = 1.0, **made
) -> None:
    """`calls` gives the epoch of each call; the centre carries errors from one to the next."""
    loss = DINOLoss(**ARGUMENTS, **made)
    truth, plain = Official(torch.float64, **made), Official(torch.float32, **made)
    for epoch in calls:
        student, teacher = logits(dtype)
        value, grad = run(lambda s: loss(s, teacher, epoch), student, upstream)  # noqa: B023
        true_terms, true_grad = run(lambda s: truth.terms(s, teacher, epoch), student.double(), upstream)  # noqa: B023
        terms, plain_grad = run(lambda s: plain.terms(s, teacher, epoch), student.float(), upstream)  # noqa: B023
        assert value.dtype == torch.float32
        assert value.shape == ()
        assert grad.dtype == dtype
        # one number's error may vanish by luck: the measure is that of the worst term
        within(value, true_terms.mean(), 2 * (terms - true_terms).abs().max())
        within(grad, true_grad, 2 * (plain_grad - true_grad).abs().max())
        within(loss.center, truth.center, 2 * (plain.center - truth.center).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_gradient_and_centre_are_official_dinos_over_many_calls(dtype, poison):
    check_as_accurate_as_official(dtype, [0, 0, 1, 2, 3, 7])


def test_gradient_follows_the_upstream_gradient():
    check_as_accurate_as_official(torch.float32, [0, 4], upstream=-3.7)


def test_student_temperature_and_centre_momentum_are_those_given():
    check_as_accurate_as_official(torch.float32, [0, 1, 2], student_temp=0.2, center_momentum=0.5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_at_least_as_near_the_truth_as_official_under_autocast(dtype, autocast):
    loss, truth, official = DINOLoss(**ARGUMENTS), Official(torch.float64), Official(dtype)
    for epoch in (0, 1, 5):
        # logits of 8 and more: divided by 0.1 in half precision they lose what decides the softmax
        student, teacher = logits(dtype, scale=8.0, offset=3.0)
        with torch.autocast("cpu", dtype, enabled=autocast):
            value, grad = run(lambda s: loss(s, teacher, epoch), student)  # noqa: B023
        true_terms, true_grad = run(lambda s: truth.terms(s, teacher, epoch), student.double())  # noqa: B023
        terms, official_grad = run(lambda s: official.terms(s, teacher, epoch), student)  # noqa: B023
        assert value.dtype == terms.dtype == torch.float32
        assert grad.dtype == official_grad.dtype == dtype
        assert (value - true_terms.mean()).abs() <= (terms.mean() - true_terms.mean()).abs()
        assert (grad - true_grad).abs().max() <= (official_grad - true_grad).abs().max()
        assert (grad - true_grad).norm() < 0.9 * (official_grad - true_grad).norm()
        within(loss.center, truth.center, 2 * (official.center - truth.center).abs().max())


def test_an_autocast_region_changes_no_bit():
    results = []
    for enabled in (False, True):
        torch.manual_seed(1)
        loss = DINOLoss(**ARGUMENTS)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            student, teacher = logits(torch.bfloat16)
            results.append((*run(lambda s: loss(s, teacher, 0), student), loss.center))  # noqa: B023
    for without, under in zip(*results, strict=True):
        assert torch.equal(without, under)


def test_float64_logits_stay_float64():
    loss, truth = DINOLoss(**ARGUMENTS), Official(torch.float64)
    student, teacher = logits(torch.float64)
    value, grad = run(lambda s: loss(s, teacher, 0), student)
    true_terms, true_grad = run(lambda s: truth.terms(s, teacher, 0), student)
    assert value.dtype == grad.dtype == torch.float64
    torch.testing.assert_close(value, true_terms.mean(), rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, true_grad, rtol=1e-10, atol=1e-16)


def test_teacher_gets_no_gradient():
    student, teacher = logits()
    teacher.requires_grad_()
    loss = DINOLoss(**ARGUMENTS)
    loss(student.requires_grad_(), teacher, 0).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert not loss.center.requires_grad


def test_backward_may_come_after_the_next_forward():
    """The centre moves between a loss and its backward, which must use the one that the loss used."""
    loss, (student, teacher) = DINOLoss(**ARGUMENTS), logits()
    _, at_once = run(lambda s: loss(s, teacher, 0), student)
    loss.center.zero_()
    leaf = student.clone().requires_grad_()
    first = loss(leaf, teacher, 0)
    loss(student, 5 * teacher, 0)
    first.backward()
    assert torch.equal(leaf.grad, at_once)


def test_cross_entropy_leaves_the_centre_and_update_center_moves_it_as_forward_does():
    loss, other, (student, teacher) = DINOLoss(**ARGUMENTS), DINOLoss(**ARGUMENTS), logits()
    for each in (loss, other):
        each.center.normal_(generator=torch.Generator().manual_seed(1))
    before = loss.center.clone()
    value, mean = loss.cross_entropy(student, teacher, loss.teacher_temp(2))
    assert torch.equal(loss.center, before)
    loss.update_center(mean)
    assert torch.equal(value, other(student, teacher, 2))
    assert torch.equal(loss.center, other.center)
    assert not torch.equal(loss.center, before)
    twin = DINOLoss(**ARGUMENTS)
    twin.center.copy_(before)
    twin.update_center(teacher)  # the rows themselves do as well, as for official DINO's
    torch.testing.assert_close(twin.center, loss.center)


def balanced(teacher: Tensor, temp: float) -> Tensor:
    """The textbook's three iterations of Sinkhorn-Knopp: assignments (N, K)."""
    q = torch.exp(teacher / temp)
    for _ in range(3):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / len(q)
    return q * len(q)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sinkhorn_balances_the_teachers_rows_and_leaves_the_centre(dtype):
    loss, (student, teacher) = DINOLoss(**ARGUMENTS, centering="sinkhorn"), logits(dtype)
    value, grad = run(lambda s: loss(s, teacher, 5), student)
    q = balanced(teacher.double(), 0.06).chunk(2)

    def by_pairs(s: Tensor) -> Tensor:
        log_p = F.log_softmax(s / 0.1, -1).chunk(NCROPS)
        pairs = [(g, v) for g in range(2) for v in range(NCROPS) if v != g]
        return torch.stack([-(q[g] * log_p[v]).sum(-1) for g, v in pairs])

    terms, expected = run(by_pairs, student.double())
    exact = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {}
    torch.testing.assert_close(value.double(), terms.mean(), **(exact or {"rtol": 1e-5, "atol": 0}))
    half = {"rtol": 0.01, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-7}
    torch.testing.assert_close(grad.double(), expected, **(exact or half))
    assert not loss.center.any()
    assert loss.state_dict().keys() == {"center"}


@pytest.mark.parametrize(
    ("epochs", "table"),
    [
        (0, [0.07] * 6),
        (1, [0.04] + [0.07] * 5),
        (
            4,
            [0.04, 0.05, 0.06, 0.07, 0.07, 0.07],
        ),  # the final one is reached in the last epoch of the warm-up
        (6, [0.04, 0.046, 0.052, 0.058, 0.064, 0.07]),
    ],
)
def test_teacher_temperature_rises_linearly_over_the_warmup(epochs, table):
    loss = DINOLoss(5, 2, 0.04, 0.07, epochs, 6)
    np.testing.assert_allclose(loss.teacher_temp_schedule, table, rtol=1e-12)
    # and it is what divides: two prototypes, the student sure of neither, tell q from the loss
    one = DINOLoss(2, 2, 0.04, 0.07, epochs, 6, student_temp=1.0)
    student = torch.tensor([[0.0, 1.0]] * 2)
    for epoch, temp in enumerate(table):
        one.center.zero_()
        q = 1 / (1 + np.exp(-0.05 / temp))
        expected = np.log(1 + np.e) - (1 - q)
        assert one(student, torch.tensor([[0.05, 0.0]] * 2), epoch).item() == pytest.approx(
            expected, rel=1e-6
        )


def test_no_process_group_is_needed_and_none_is_made():
    assert not dist.is_initialized()
    loss = DINOLoss(**ARGUMENTS)
    student, teacher = logits()
    loss(student, teacher, 0)
    assert not dist.is_initialized()
    torch.testing.assert_close(loss.center, 0.1 * teacher.mean(0, keepdim=True))


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    loss = DINOLoss(7, 3, 0.04, 0.04, 0, 1)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        student, teacher = (torch.randn(n * 4, 7, generator=generator) for n in (3, 2))
        loss(student.requires_grad_(), teacher, 0).backward()
    torch.save(loss.center, f"{folder}/center{rank}.pt")
    dist.destroy_process_group()


def test_centre_is_the_mean_over_ranks(tmp_path: Path):
    processes = torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2, join=False)
    deadline = time.monotonic() + 300
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, "the ranks hang"
    finally:
        for process in processes.processes:
            process.kill()
    teachers: list[list[Tensor]] = []
    for rank in range(2):
        generator = torch.Generator().manual_seed(rank)
        drawn = [torch.randn(n * 4, 7, generator=generator) for _ in range(3) for n in (3, 2)]
        teachers.append(drawn[1::2])
    expected = torch.zeros(1, 7)
    for of_ranks in zip(*teachers, strict=True):
        expected = 0.9 * expected + 0.1 * torch.cat(of_ranks).mean(0, keepdim=True)
    centers = [torch.load(tmp_path / f"center{rank}.pt") for rank in range(2)]
    assert torch.equal(*centers)
    torch.testing.assert_close(centers[0], expected, rtol=1e-6, atol=1e-7)


def test_state_is_the_centre_alone():
    loss = DINOLoss(**ARGUMENTS)
    state = loss.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {"center": (1, K)}
    assert state["center"].dtype == torch.float32
    assert not state["center"].any()
    assert list(loss.parameters()) == []
    loaded = DINOLoss(**ARGUMENTS)
    loaded.load_state_dict({"center": torch.arange(float(K))[None]})
    student, teacher = logits()
    q = F.softmax((teacher - torch.arange(float(K))) / 0.03, -1).chunk(2)
    log_p = F.log_softmax(student / 0.1, -1).chunk(NCROPS)
    expected = torch.stack(
        [-(q[g] * log_p[v]).sum(-1) for g in range(2) for v in range(NCROPS) if v != g]
    ).mean()
    torch.testing.assert_close(loaded(student, teacher, 0), expected)


def test_constructor_takes_official_dinos_arguments_in_its_order():
    loss = DINOLoss(65536, 10, 0.04, 0.07, 30, 100, 0.2, 0.8)
    assert loss.center.shape == (1, 65536)
    assert (loss.ncrops, loss.student_temp, loss.center_momentum) == (10, 0.2, 0.8)
    assert len(loss.teacher_temp_schedule) == 100
    assert loss.teacher_temp_schedule[[0, 29]].tolist() == pytest.approx([0.04, 0.07])
    defaults = DINOLoss(8, 10, 0.04, 0.04, 0, 100)
    assert (defaults.student_temp, defaults.center_momentum) == (0.1, 0.9)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"out_dim": 0}, "out_dim is 0: give the number of prototypes, 1 or more"),
        ({"ncrops": 1}, "ncrops is 1: the loss compares two global crops at least"),
        (
            {"warmup_teacher_temp_epochs": 30, "nepochs": 10},
            "warmup_teacher_temp_epochs is 30 but the run has nepochs = 10: give a warm-up between 0 and",
        ),
        ({"warmup_teacher_temp_epochs": -1}, "warmup_teacher_temp_epochs is -1 but the run has nepochs = 8"),
        ({"warmup_teacher_temp": 0.0}, "warmup_teacher_temp is 0.0: a temperature is above 0"),
        ({"teacher_temp": -0.04}, "teacher_temp is -0.04: a temperature is above 0"),
        ({"student_temp": float("nan")}, "student_temp is nan: a temperature is above 0"),
        ({"centering": "none"}, "centering is 'none': give ema or sinkhorn"),
        ({"center_momentum": 1.5}, "center_momentum is 1.5: a momentum lies between 0 and 1"),
    ],
)
def test_impossible_arguments_are_refused(changed, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared
        DINOLoss(**(ARGUMENTS | changed))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("student", "teacher", "epoch", "message"),
    [
        ((18, K, 1), (6, K), 0, "student_output (18, 257, 1), teacher_output (6, 257): give two matrices"),
        ((18, K), (K,), 0, "student_output (18, 257), teacher_output (257,): give two matrices"),
        (
            (18, 256),
            (6, K),
            0,
            "student_output (18, 256), teacher_output (6, 257): the last dimension must be",
        ),
        (
            (18, K),
            (6, 300),
            0,
            "student_output (18, 257), teacher_output (6, 300): the last dimension must be",
        ),
        (
            (17, K),
            (6, K),
            0,
            "student_output (17, 257), teacher_output (6, 257): for B images the student has",
        ),
        (
            (18, K),
            (5, K),
            0,
            "student_output (18, 257), teacher_output (5, 257): for B images the student has",
        ),
        ((6, K), (6, K), 0, "student_output (6, 257), teacher_output (6, 257): for B images the student has"),
        ((0, K), (0, K), 0, "student_output (0, 257), teacher_output (0, 257): for B images the student has"),
        ((18, K), (6, K), 8, "epoch is 8 but the schedule was made for epochs 0 to 7 (nepochs)"),
        ((18, K), (6, K), -1, "epoch is -1 but the schedule was made for epochs 0 to 7 (nepochs)"),
    ],
)
def test_wrong_shapes_and_epochs_are_refused_and_leave_the_centre(student, teacher, epoch, message):
    loss = DINOLoss(**ARGUMENTS)
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared
        loss(torch.randn(student), torch.randn(teacher), epoch)
    assert str(error.value).startswith(message)
    assert not loss.center.any()
