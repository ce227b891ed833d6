"""Training in several processes against training in one: the same numbers, whatever happens to them.

A test starts torchrun once, with as many jobs as it can hold (ranks.py): starting is most of the time.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import ScaleOne
from ranks import PYTHONPATH, launch, start
from tiny import final_tensors, make_config, make_images
from torch import Tensor, nn

from fastdino import checkpoint
from fastdino.config import Config
from fastdino.dino import DINO
from fastdino.monitor import read_metrics
from fastdino.train import REQUEUE, train

STEPS = 6  # three epochs of two updates
FP16: dict[str, Any] = {"precision": "fp16", "local_crops_number": 0, "global_crops_size": 8}
COMMON: dict[str, Any] = {
    "epochs": 3,
    "save_every": 100,
    "keep_every_epochs": 0,
    "drop_path_rate": 0.0,  # each rank draws its own
    "warmup_teacher_temp": 0.02,
    "teacher_temp": 0.05,
    "warmup_teacher_temp_epochs": 2,
}
# What one process does, and how several do the same.
SINGLE: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "lr": 1.0},
    "adamw": {"freeze_last_layer": 2},
    "lars": {"optimizer": "lars", "lr": 20.0},
    "sinkhorn": {"optimizer": "sgd", "lr": 1.0, "centering": "sinkhorn", "clip": "global", "clip_grad": 0.1},
    "batch norm": {"optimizer": "sgd", "lr": 1.0, "use_bn_in_head": True},
    "resnet": {"optimizer": "sgd", "lr": 0.05, "arch": "resnet18", "global_crops_size": 32},
    "fp16": {"optimizer": "sgd", "lr": 1.0, **FP16},
    "bf16": {"optimizer": "sgd", "lr": 1.0, "precision": "bf16"},
    # the backbone of the first of these runs, held still for four updates
    "head": {"optimizer": "sgd", "lr": 1.0, "head_warmup_steps": 4, "init_from": "sgd"},
    # temperatures at which the gradients overflow
    "overflow": {"optimizer": "sgd", "lr": 1.0, **FP16, "student_temp": 1e-6},
}
SEVERAL: dict[int, list[tuple[str, dict[str, Any]]]] = {
    2: [
        ("sgd", {"parallel": "ddp"}),
        ("sgd", {"parallel": "fsdp"}),
        ("sgd", {"parallel": "ddp", "accumulate": 2}),
        ("sgd", {"parallel": "fsdp", "accumulate": 2}),
        ("sgd", {"parallel": "fsdp", "activation_checkpointing": True, "compile": "on"}),
        ("sgd", {"parallel": "ddp", "compile": "on"}),
        ("adamw", {"parallel": "ddp"}),
        ("adamw", {"parallel": "fsdp"}),
        ("lars", {"parallel": "fsdp"}),
        ("sinkhorn", {"parallel": "fsdp"}),
        ("batch norm", {"parallel": "ddp"}),
        ("batch norm", {"parallel": "fsdp"}),
        ("resnet", {"parallel": "ddp"}),
        ("resnet", {"parallel": "fsdp"}),
        ("fp16", {"parallel": "fsdp"}),
        ("overflow", {"parallel": "fsdp"}),
        ("bf16", {"parallel": "ddp"}),
        ("bf16", {"parallel": "fsdp"}),
        ("head", {"parallel": "ddp"}),
        ("head", {"parallel": "fsdp"}),
    ],
    4: [("sgd", {"parallel": "hsdp"}), ("sgd", {"parallel": "fsdp"}), ("adamw", {"parallel": "ddp"})],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nineteen images in two classes: two updates of 8 an epoch, three left over."""
    return make_images(tmp_path_factory.mktemp("images"), 19, classes=2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, images: Path) -> dict[str, Path]:
    """The runs of one process."""
    outs = {name: tmp_path_factory.mktemp("alone") for name in SINGLE}
    for name, out in outs.items():
        if "init_from" in SINGLE[name]:
            SINGLE[name]["init_from"] = str(outs["sgd"])
        config = make_config(images, out, **COMMON, knn_every_epochs=1, **SINGLE[name])
        train(config, update_type=ScaleOne)
        assert all(m["skipped"] == 0 for m in read_metrics(out)) == (name != "overflow")
    return outs


def start_of(config: Config) -> dict[str, Tensor]:
    """The tensors that a run begins with."""
    torch.manual_seed(config.run.seed)
    dino = DINO(config)
    if config.model.init_from:
        dino.load_weights(config.model.init_from)
    return dino.state_dict()


def differences(a: Path, b: Path, initial: dict[str, Tensor]) -> dict[str, float]:
    """How far two runs end apart, for each part as a share of the way that it has come."""
    first, second = final_tensors(a, STEPS), final_tensors(b, STEPS)
    assert first.keys() == second.keys()
    parts: dict[str, list[tuple[float, float]]] = {}
    for name, x in first.items():
        if not x.is_floating_point():
            assert torch.equal(x, second[name]), name
            continue
        part = name.partition(".")[0]
        moved = x - initial.get(name, torch.zeros_like(x))
        parts.setdefault(part, []).append(((x - second[name]).norm().item(), moved.norm().item()))
    return {
        part: torch.tensor(pairs).norm(dim=0)[0].item()
        / max(torch.tensor(pairs).norm(dim=0)[1].item(), 1e-30)
        for part, pairs in parts.items()
    }


@pytest.mark.parametrize("ranks", SEVERAL)
def test_several_ranks_do_what_one_does(
    ranks: int, images: Path, alone: dict[str, Path], tmp_path: Path
) -> None:
    jobs = [
        {"images": images, "out": tmp_path / f"{i}", **COMMON, "knn_every_epochs": 1, **SINGLE[name], **flags}
        for i, (name, flags) in enumerate(SEVERAL[ranks])
    ]
    # HSDP: two nodes of two, on this machine
    done = launch(jobs, tmp_path, ranks, **({"LOCAL_RANKS": "2"} if ranks == 4 else {}))
    assert done.returncode == 0, done.stderr[-4000:]
    for i, (name, flags) in enumerate(SEVERAL[ranks]):
        initial = start_of(make_config(images, tmp_path, **COMMON, **SINGLE[name]))
        found = differences(alone[name], tmp_path / f"{i}", initial)
        # In bf16 a gradient summed, not averaged, moves the student by 0.18 of its way, and a centre of each
        # rank's own the centre by 0.09; what rounding leaves is up to 0.022 (FSDP2 gathers bf16 norms). AdamW
        # enlarges what rounding leaves of gradients that are 0; it decides a ReLU that stands near 0.
        rough = {"adamw": 1e-2, "resnet": 2e-2, "fp16": 2e-2, "overflow": 2e-2, "bf16": 0.05}
        allowed = rough.get(name, 1e-4)
        assert max(found.values()) < allowed, (name, flags, found)
        one, several = read_metrics(alone[name]), read_metrics(tmp_path / f"{i}")
        assert [m["step"] for m in several] == list(range(1, STEPS + 1))
        for key in ("loss", "grad_norm", "knn_20"):
            found_values, expected_values = (
                [m[key] for m in metrics if m.get(key) is not None] for metrics in (several, one)
            )
            # the norm of the gradients, of the last update alone, is rounded twice as far as the weights
            assert found_values == pytest.approx(expected_values, rel=2 * allowed), (name, flags, key)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """The run of two ranks that the tests below interrupt; also writes down what its ranks draw."""
    folder = tmp_path_factory.mktemp("two")
    job = {"images": images, "out": folder / "run", **INTERRUPTED, "draws": True}
    done = launch([{"batch_norm": True}, job, job | {"out": folder / "again"}], folder, 2)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


INTERRUPTED: dict[str, Any] = {
    **COMMON,
    "save_every": 2,
    "keep": 9,
    "drop_path_rate": 0.3,
    "parallel": "fsdp",
}


def test_batch_norm_in_step_is_that_of_the_whole_batch(uninterrupted: Path) -> None:
    found = torch.load(uninterrupted / "batch_norm.pt")
    generator = torch.Generator().manual_seed(0)
    for shape in ((6, 5), (6, 3, 4, 2)):
        x, upstream = (torch.randn(shape, generator=generator) * 3 + 100 for _ in range(2))
        values = {}
        for dtype in (torch.float32, torch.float64):
            norm = nn.BatchNorm1d(shape[1]) if len(shape) == 2 else nn.BatchNorm2d(shape[1])
            norm, leaf = norm.to(dtype), x.to(dtype, copy=True).requires_grad_()
            norm(leaf).backward(upstream.to(dtype))
            assert leaf.grad is not None
            assert norm.weight.grad is not None
            values[dtype] = {
                "out": norm(leaf).detach(),  # the statistics move twice, as there
                "grad": leaf.grad,
                "weight_grad": norm.weight.grad,
                "mean": norm.running_mean,
                "var": norm.running_var,
            }
        for name, truth in values[torch.float64].items():
            plain, ours = values[torch.float32][name], found[str(len(shape))][name]
            assert truth is not None
            assert plain is not None
            scale = truth.abs().max()
            assert (ours - truth).norm() <= 2 * (
                plain - truth
            ).norm() + 4e-7 * scale * truth.numel() ** 0.5, name


def test_two_runs_of_two_ranks_are_identical(uninterrupted: Path) -> None:
    first, second = (final_tensors(uninterrupted / name, STEPS) for name in ("run", "again"))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    losses = [[m["loss"] for m in read_metrics(uninterrupted / name)] for name in ("run", "again")]
    assert losses[0] == losses[1]


def test_ranks_share_each_batch_and_draw_nothing_twice(uninterrupted: Path) -> None:
    drawn = [json.loads((uninterrupted / f"draws_{rank}.json").read_text()) for rank in (0, 1)]
    crops = [[tuple(pair) for its in found for pair in its if isinstance(pair, list)] for found in drawn]
    # two epochs' worth and one more, of 16 of the 19 images, in two runs
    assert len(crops[0]) == len(crops[1]) == 2 * 3 * 8
    for epoch in range(3):
        mine, theirs = ({pair for pair in its if pair[0] == epoch} for its in crops)
        assert len(mine) == len(theirs) == 8
        assert not mine & theirs
    orders = [[tuple(its) for its in found if its and not isinstance(its[0], list)] for found in drawn]
    assert len(orders[0]) == len(orders[1]) > 2 * STEPS
    # the second run drew as the first one; within one, no order of a step or rank came twice
    half = len(orders[0]) // 2
    assert [its[:half] for its in orders] == [its[half:] for its in orders]
    once = [order for its in orders for order in its[:half] if len(order) > 16]
    assert len(set(once)) == len(once) > 0


def test_stopped_at_two_ranks_a_run_goes_on_at_any_number(
    images: Path, alone: dict[str, Path], tmp_path: Path
) -> None:
    """One rank hears the signal, both save; DDP's run goes on sharded, and the other way round."""
    base = {"images": images, **COMMON, **SINGLE["sgd"], "keep": 9}
    for i, (before, ranks, after) in enumerate([("fsdp", 1, "auto"), ("fsdp", 2, "ddp"), ("ddp", 4, "fsdp")]):
        out = tmp_path / f"{i}"
        stop = {"rank": 1, "step": 3}
        stopped = launch([base | {"out": out, "parallel": before, "stop": stop}], tmp_path, 2)
        # torchrun itself fails with 1, and shows the code
        assert f"exitcode  : {REQUEUE}" in stopped.stderr, stopped.stderr[-4000:]
        assert "the same command continues it" in stopped.stderr
        assert list(checkpoint.checkpoints(out)) == [3]
        if ranks == 1:
            train(make_config(images, out, **COMMON, **SINGLE["sgd"], keep=9))
        else:
            done = launch([base | {"out": out, "parallel": after}], tmp_path, ranks)
            assert done.returncode == 0, done.stderr[-4000:]
            assert "is continued: step 3 of 6" in done.stdout
        initial = start_of(make_config(images, tmp_path, **COMMON, **SINGLE["sgd"]))
        assert max(differences(alone["sgd"], out, initial).values()) < 1e-3


@pytest.mark.parametrize(
    ("kill", "found"),
    [
        ({"rank": 1, "step": 4, "when": "update"}, 2),
        ({"rank": 1, "step": 4, "when": "write"}, 2),
        ({"rank": 0, "step": 4, "when": "rename"}, 2),
    ],
)
def test_after_a_kill_torchrun_goes_on_from_the_last_save(
    kill: dict[str, Any], found: int, images: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = {"images": images, "out": out, **INTERRUPTED, "kill": kill}
    done = launch([job], tmp_path, 2, "--max-restarts=1")
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "run.killed").exists()
    assert f"is continued: step {found} of 6" in done.stdout
    assert list(checkpoint.checkpoints(out)) == [2, 4, 6]
    assert not list((out / "checkpoints").glob(".*"))
    expected, got = final_tensors(uninterrupted / "run", STEPS), final_tensors(out, STEPS)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert [m["step"] for m in read_metrics(out)] == list(range(1, STEPS + 1))
    assert checkpoint.teacher_step(out) == STEPS


def test_torchrun_told_to_stop_has_all_ranks_save(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = {
        "images": images,
        "out": out,
        **INTERRUPTED,
        "epochs": 500,
        "save_every": 10_000,
        "keep_every_epochs": 0,
    }
    process = start([job], tmp_path, 2)
    try:
        while not (out / "metrics.jsonl").exists() or not read_metrics(out):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode != 0
    (step,) = checkpoint.checkpoints(out)
    assert said.count(f"saved {out} at step {step} of 1000; the same command continues it") == 1


def test_sruns_tasks_find_one_another(images: Path, tmp_path: Path) -> None:
    """With what srun tells its tasks, and no torchrun; two of them, this machine being both nodes."""
    (tmp_path / "jobs.json").write_text(
        json.dumps([{"images": str(images), "out": str(tmp_path / "run"), **COMMON}])
    )
    step = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "localhost,elsewhere",
        "SLURM_LOCALID": "0",
        "SLURM_JOB_ID": str(os.getpid()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": PYTHONPATH,
    }
    tasks = [
        subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).parents[1] / "helpers" / "ranks.py"),
                str(tmp_path / "jobs.json"),
            ],
            env=os.environ | step | {"SLURM_PROCID": str(task)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for task in (0, 1)
    ]
    said = [task.communicate(timeout=300)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    assert said[0].startswith("2 ranks, ddp")
    assert said[1] == ""
    assert list(checkpoint.checkpoints(tmp_path / "run")) == [STEPS]


def test_a_failing_rank_ends_all_with_its_error(images: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    job = {"images": images, "out": tmp_path / "run", **INTERRUPTED, "raise": {"rank": 1, "step": 3}}
    failed = launch([job], tmp_path, 2)
    assert time.monotonic() - began < 240  # the others do not wait for it until gloo's timeout, 30 minutes
    assert failed.returncode != 0
    assert "something broke here" in failed.stderr
    assert list(checkpoint.checkpoints(tmp_path / "run")) == [2]


def test_bad_input_is_said_once(images: Path, tmp_path: Path) -> None:
    jobs = [{"images": images, "out": tmp_path / "run", **COMMON, "batch_size": 9}]
    failed = launch(jobs, tmp_path, 2)
    assert failed.returncode != 0
    assert failed.stderr.count("--batch-size 9 is not a multiple of --accumulate 1 times 2 ranks") == 1


def test_a_full_disk_is_said_and_the_checkpoint_before_it_stays(images: Path, tmp_path: Path) -> None:
    # the first checkpoint of this run is there before the disk is full
    out = tmp_path / "run"
    job = {"images": images, "out": out, **INTERRUPTED}
    assert launch([job | {"stop": {"rank": 0, "step": 2}}], tmp_path, 2).returncode != 0
    failed = launch([job | {"full": {"rank": 1, "bytes": 20_000}}], tmp_path, 2)
    assert failed.returncode != 0
    assert "checkpoint 4 could not be written" in failed.stdout
    assert "checkpoint 6 could not be written" in failed.stderr
    assert failed.stderr.count(f"The last good checkpoint is {out / 'checkpoints' / 'step_2'}") == 1
    assert list(checkpoint.checkpoints(out)) == [2]
    assert checkpoint.teacher_step(out) == 2
    done = launch([job], tmp_path, 2)
    assert done.returncode == 0, done.stderr[-4000:]
    assert list(checkpoint.checkpoints(out)) == [2, 4, 6]


def test_unreadable_files_of_all_ranks_are_counted_together(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 16)
    broken = [images / "03.png", images / "08.png", images / "12.png"]
    for path in broken:
        path.write_bytes(b"not a picture")
    job = {"images": images, "out": tmp_path / "run", **COMMON, "max_unreadable": 0.2}
    done = launch([job, job | {"out": tmp_path / "strict", "max_unreadable": 0.15}], tmp_path, 2)
    assert done.returncode != 0
    assert read_metrics(tmp_path / "run")[-1]["unreadable"] == 3
    assert [done.stdout.count(f"skipped {path}") for path in broken] == [2, 2, 2]  # once in each run
    assert "3 of 16 files could not be read, more than --max-unreadable 0.15 allows" in done.stderr
