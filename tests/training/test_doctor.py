"""The collapse doctor: each ailment brought about for real on the sample images; silence on a healthy run."""

import math
import re
from pathlib import Path

import pytest
import torch
from tiny import make_config
from torch import Tensor

from fastdino import train
from fastdino.data import samples
from fastdino.diagnostics import DIAGNOSTICS, Doctor, batch_diagnostics
from fastdino.monitor import read_metrics


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "images"
    samples.render_samples(folder, train=480, val=8)
    return folder / "train"


def run(images: Path, out: Path, capsys: pytest.CaptureFixture[str], **flags: object) -> str:
    """What a run says; it stops by itself where it must."""
    config = make_config(
        images,
        out,
        **{
            "batch_size": 32,
            "epochs": 2,
            "lr": 5e-3,
            "log_every": 3,
            "save_every": 10_000,
            "warmup_epochs": 0.2,
            "momentum_teacher": 0.983,
            "use_bn_in_head": True,
            "global_crops_scale": (0.3, 1.0),
            "blur_radius": (0.1, 0.5),
        }
        | flags,
    )
    try:
        train.train(config)
    except train.RunError:
        assert config.run.precision == "fp16"
    return capsys.readouterr().out


SAID = (
    "collapsed to uniform",
    "collapsed to one dimension",
    "the teacher equals the student",
    "NaN is on its way",
    "fp16 overflowed",
    "the prototypes never learn",
    "follows the noise of its batches",
    "near its untrained beginning",
)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            {"teacher_temp": 0.5, "warmup_teacher_temp": 0.5},
            r"step \d+: teacher entropy is ln K = 4\.56: collapsed to uniform since step \d\. Sharpen it: "
            r"--teacher-temp \(now 0\.5\) and --warmup-teacher-temp at 0\.04 or lower",
        ),
        (
            {"center_momentum": 1.0, "lr": 0.1, "use_bn_in_head": False, "epochs": 4},
            r"step \d+: [12]\.\d of 96 prototypes have all images: collapsed to one dimension since step "
            r"\d+\. Centre: --center-momentum at 0\.9 \(now 1\), or --centering sinkhorn",
        ),
        (
            {"teacher_update": "student_copy"},
            r"step 9: the teacher equals the student since step 3, there is nothing to learn from it: "
            r"--teacher-update student_copy does not learn, momentum does",
        ),
        (
            {
                "norm_last_layer": False,
                "freeze_last_layer": 0,
                "optimizer": "sgd",
                "lr": 20.0,
                "clip_grad": 0.0,
                "weight_decay": 0.0,
                "weight_decay_end": 0.0,
            },
            r"logits grow, to [0-9.]+ from [0-9.]+, since step \d+: NaN is on its way\. Set "
            r"--norm-last-layer, or lower --lr or --clip-grad",
        ),
        (
            {"precision": "fp16", "lr": 400.0, "clip_grad": 0.0, "batch_size": 8, "max_nonfinite": 12},
            r"step \d+: fp16 overflowed in \d+ of the last \d+ steps: use --precision bf16 or fp32",
        ),
        (
            {"freeze_last_layer": 2, "epochs": 2},
            r"the prototypes never learn: --freeze-last-layer 2 lasts all 2 epochs; 1 is usual",
        ),
        (
            {"batch_size": 8, "momentum_teacher": 0.9, "epochs": 1},
            r"the teacher averages over 80 images only \(batch 8, momentum 0\.9\) and follows the noise of "
            r"its batches: raise --momentum-teacher to 0\.996 or more",
        ),
    ],
    ids=["no sharpening", "no centring", "student copy", "growing logits", "fp16", "frozen", "small batch"],
)
def test_an_ailment_is_named_once_with_what_to_try(images, tmp_path, capsys, flags, sentence):
    said = run(images, tmp_path / "run", capsys, **flags)
    assert len(re.findall(sentence, said)) == 1, said


def test_a_healthy_run_is_left_in_peace(images, tmp_path, capsys):
    said = run(images, tmp_path / "run", capsys, epochs=4)
    assert [sign for sign in SAID if sign in said] == []
    lines = read_metrics(tmp_path / "run")
    for line in lines:
        assert all(
            math.isfinite(line[name]) for name in (*DIAGNOSTICS, "kl", "center_norm", "teacher_distance")
        )
        assert 0 < line["teacher_entropy"] < math.log(96)
    # in lines of one step the loss is what the two parts of it add up to
    (first,) = [
        line for line in read_metrics(run_of_single_steps(images, tmp_path, capsys)) if line["step"] == 1
    ]
    assert first["loss"] == pytest.approx(first["teacher_entropy"] + first["kl"], rel=1e-6)
    assert lines[-1]["loss"] < lines[0]["loss"]


def run_of_single_steps(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    run(images, tmp_path / "single", capsys, epochs=1, log_every=1)
    return tmp_path / "single"


# --- what it looks at


def reference(teacher: Tensor, center: Tensor, temp: float, student: Tensor, features: Tensor) -> list[float]:
    """`batch_diagnostics` by its words, in float64, with a singular value decomposition for the rank."""
    teacher, center, student, features = (x.double() for x in (teacher, center, student, features))
    q = torch.softmax((teacher - center) / temp, dim=1)
    entropy = -(q * q.log()).sum(1).mean()
    mean = q.mean(0)
    unit = features / features.norm(dim=1, keepdim=True)
    variances = torch.linalg.svdvals(unit - unit.mean(0)).square()
    return [
        entropy.item(),
        (-(mean * mean.log()).sum()).exp().item(),
        student.abs().max().item(),
        unit.std(0, correction=0).mean().item() * features.shape[1] ** 0.5,
        (variances.sum() ** 2 / variances.square().sum()).item(),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "d"), [(8, 50, 6), (37, 200, 16), (2, 10, 40)])
def test_diagnostics_are_their_formulas(n: int, k: int, d: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(n)
    teacher, student = (torch.randn(m, k, generator=generator).to(dtype) for m in (n, 5 * n))
    center, features = torch.randn(k, generator=generator) / 3, torch.randn(n, d, generator=generator) + 0.5
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        got = batch_diagnostics(teacher, center, 0.3, student, features.to(dtype))
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(
        reference(teacher, center, 0.3, student, features.to(dtype)), rel=2e-5
    )


def test_diagnostics_at_their_ends():
    k = 64
    same = torch.zeros(16, k)
    onehot = torch.zeros(16, k)
    onehot[:, 3] = 1e4
    directions = torch.eye(16)
    entropy, used, _, spread, rank = batch_diagnostics(
        same, torch.zeros(k), 0.04, -7 * torch.ones(4, k), directions
    ).tolist()
    assert (entropy, used) == pytest.approx((math.log(k), k))
    assert spread == pytest.approx(0.968, abs=1e-3)  # sqrt(15 / 16)
    assert rank == pytest.approx(15)
    entropy, used, logit, spread, rank = batch_diagnostics(
        onehot, torch.zeros(k), 0.04, onehot, torch.ones(16, 8)
    ).tolist()
    assert (entropy, used, logit) == pytest.approx((0, 1, 1e4))
    assert (spread, rank) == pytest.approx((0, 0), abs=1e-5)


@pytest.mark.parametrize(
    ("momentum", "updates", "expected"),
    [
        (0.996, 250, None),
        (0.99, 100, None),
        (0.9995, 558, "the teacher averages over 2000 updates, but the run has 558, so it ends near its "
         "untrained beginning: lower --momentum-teacher to 0.991"),
        (1.0, 558, "the teacher never moves, but the run has 558"),
        (0.996, 100, "averages over 250 updates, but the run has 100, .*: give more --epochs"),
    ],
)  # fmt: skip
def test_a_teacher_that_averages_over_more_updates_than_there_are_is_named(
    momentum: float, updates: int, expected: str | None, tmp_path: Path
) -> None:
    config = make_config(tmp_path, tmp_path / "run", momentum_teacher=momentum, batch_size=64)
    said = [s for s in Doctor(config).before(updates) if "untrained beginning" in s]
    assert [bool(re.search(expected or "", sentence)) for sentence in said] == [True] * bool(expected)


HEALTHY = {
    "teacher_entropy": 2.0,
    "prototypes_used": 40.0,
    "logit_max": 0.7,
    "teacher_distance": 0.01,
    "skipped": 0,
}


def test_a_sign_that_comes_and_goes_is_said_again_when_it_lasts(tmp_path):
    doctor = Doctor(make_config(tmp_path, tmp_path / "run"))
    uniform = HEALTHY | {"teacher_entropy": math.log(96)}
    said = [
        bool(doctor.examine(i, v))
        for i, v in enumerate([uniform, uniform, HEALTHY, *[uniform] * 5, HEALTHY, *[uniform] * 3])
    ]
    assert [i for i, spoke in enumerate(said) if spoke] == [5, 11]


def test_the_teacher_of_the_epoch_before_equals_the_student_as_an_epoch_ends(tmp_path):
    doctor = Doctor(make_config(tmp_path, tmp_path / "run", teacher_update="previous_epoch"))
    for step in range(6):
        assert doctor.examine(step, HEALTHY | {"teacher_distance": 0.0}, last_of_epoch=True) == []


def test_a_single_image_cannot_show_a_collapse_to_one_prototype(tmp_path):
    doctor = Doctor(make_config(tmp_path, tmp_path / "run", batch_size=2))
    for step in range(6):
        assert doctor.examine(step, HEALTHY | {"prototypes_used": 1.2}) == []
