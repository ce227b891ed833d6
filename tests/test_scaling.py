"""What benchmarks/scaling.py predicts against what processes really send and save."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import launch
from tiny import make_config, make_images

from benchmarks import scaling
from fastdino import checkpoint
from fastdino.dino import DINO

FLAGS: dict[str, Any] = {
    "out_dim": 8192,
    "drop_path_rate": 0.0,
    "freeze_last_layer": 0,
    "keep_every_epochs": 0,
    "local_crops_number": 0,
    "batch_size": 4,
}
ASSUMED = Namespace(peak=790, utilisation=0.4, memory=4300, link=450, network=50, latency=10, per_node=8)


def flags_of(kind: str) -> dict[str, Any]:
    """Of a run in pieces, gradients travel with the last one alone."""
    parallel, _, pieces = kind.partition(" ")
    return {"parallel": parallel, "accumulate": 2 if pieces else 1}


@pytest.mark.parametrize(
    ("ranks", "kinds"), [(2, ["ddp", "ddp in pieces", "fsdp"]), (4, ["ddp", "fsdp", "hsdp"])]
)
def test_bytes_counted_are_the_bytes_sent(ranks: int, kinds: list[str], tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 4)
    # of runs of one update and of five: what all do at their beginning and end goes out of the difference
    jobs = [
        {"images": images, "out": tmp_path / f"{i}{epochs}", **FLAGS, **flags_of(kind), "epochs": epochs}
        for i, kind in enumerate(kinds)
        for epochs in (1, 5)
    ]
    done = launch(
        jobs, tmp_path, ranks, GLOO_SOCKET_IFNAME="lo", **({"LOCAL_RANKS": "2"} if ranks == 4 else {})
    )
    assert done.returncode == 0, done.stderr[-4000:]
    sent = json.loads((tmp_path / "sent.json").read_text())
    config = make_config(images, tmp_path, **FLAGS)
    with torch.device("meta"):
        size = scaling.sizes_of(DINO(config).student)
    for i, kind in enumerate(kinds):
        measured = (sent[2 * i + 1] - sent[2 * i]) / 4 / ranks
        # gloo makes its reduce-scatter of an all-reduce; parameters are gathered in float32 on a CPU
        its = flags_of(kind)["parallel"]
        expected = scaling.sent(its, size, ranks, 2, parameter_bytes=4, scatter=2).total
        print(kind, ranks, measured, expected, measured / expected)
        assert measured == pytest.approx(expected, rel=0.02), kind


def test_a_checkpoint_is_as_large_as_counted(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path, **FLAGS)
    dino = DINO(config)
    whole, teacher = scaling.checkpoint_bytes(scaling.sizes_of(dino.student))
    trained = {name: p for name, p in dino.student.named_parameters() if p.requires_grad}
    moments = {f"{moment}.{name}": p.detach().clone() for name, p in trained.items() for moment in "mv"}
    path = checkpoint.save(tmp_path, 1, dino.state_dict() | moments, {})
    checkpoint.write_teacher(tmp_path / "teacher.safetensors", dino.teacher, config, 1)
    assert sum(file.stat().st_size for file in path.iterdir()) == pytest.approx(whole, rel=0.05)
    assert (tmp_path / "teacher.safetensors").stat().st_size == pytest.approx(teacher, rel=0.01)


def test_parameters_are_those_of_the_published_networks() -> None:
    small = scaling.sizes("vit_small", 16)
    assert sum(scaling.count(block) for block in small.blocks) == 12 * (4 * 384**2 + 8 * 384**2 + 13 * 384)
    assert small.total == pytest.approx(44e6, rel=0.02)  # 21.7 M and the head's 22.3 M
    assert small.prototypes == 65536


@pytest.mark.parametrize("kind", scaling.KINDS)
def test_predictions_hold_together(kind: str) -> None:
    size, flops = scaling.sizes("vit_large", 16), 1e14
    steps = {n: scaling.predict(kind, size, flops, n, ASSUMED) for n in scaling.SCALES}
    assert steps[1].efficiency == 1
    assert all(0 < step.efficiency <= 1 for step in steps.values())
    slow = Namespace(**{**vars(ASSUMED), "network": 0.5, "link": 4})
    assert all(
        scaling.predict(kind, size, flops, n, slow).efficiency < step.efficiency
        for n, step in steps.items()
        if n > 8
    )
    sent = {n: scaling.sent(kind, size, n, 8).total for n in scaling.SCALES}
    assert sent[1] == 0
    assert all(sent[n] < sent[2 * n] for n in (1, 2, 4))


def test_the_tables_are_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["scaling", "--archs", "vit_small", "vit_giant", "--scales", "1", "1024"]
    )
    scaling.main()
    printed = capsys.readouterr().out
    assert "Predicted, not measured" in printed
    assert "vit_small/16: 44 M parameters" in printed
    assert "1024" in printed
