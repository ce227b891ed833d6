"""The counts of benchmarks/distributed.py against the bytes that processes really send and save."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import launch
from tiny import make_config, make_images

from benchmarks import distributed as scaling
from benchmarks.update import Problem
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
    with torch.device("meta"):
        size = scaling.sizes_of(DINO(make_config(images, tmp_path, **FLAGS)).student)
    # gloo makes its reduce-scatter of an all-reduce; parameters are gathered in float32 on a CPU
    options = {"parameter_bytes": 4, "scatter": 2}
    ways = [flags_of(kind)["parallel"] for kind in kinds]
    expected = [scaling.sent(way, size, ranks, 2, **options).total for way in ways]
    for attempt in range(3):  # other programs may use the loopback interface meanwhile
        measured = bytes_sent(images, tmp_path / str(attempt), ranks, kinds)
        if measured == pytest.approx(expected, rel=0.02):
            return
    assert measured == pytest.approx(expected, rel=0.02)


def bytes_sent(images: Path, out: Path, ranks: int, kinds: list[str]) -> list[float]:
    """By each rank in an update of each kind."""
    out.mkdir()
    # of runs of one update and of five: what all do at their beginning and end goes out of the difference
    jobs = [
        {"images": images, "out": out / f"{i}{epochs}", **FLAGS, **flags_of(kind), "epochs": epochs}
        for i, kind in enumerate(kinds)
        for epochs in (1, 5)
    ]
    env = {"LOCAL_RANKS": "2"} if ranks == 4 else {}
    done = launch(jobs, out, ranks, GLOO_SOCKET_IFNAME="lo", **env)
    assert done.returncode == 0, done.stderr[-4000:]
    sent = json.loads((out / "sent.json").read_text())
    return [(more - less) / 4 / ranks for less, more in zip(sent[::2], sent[1::2], strict=True)]


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


def sizes(arch: str) -> scaling.Sizes:
    with torch.device("meta"):
        return scaling.sizes_of(DINO(Problem(arch, 16, 1).config()).student)


def test_parameters_are_those_of_the_published_networks() -> None:
    small = sizes("vit_small")
    assert sum(scaling.count(block) for block in small.blocks) == 12 * (4 * 384**2 + 8 * 384**2 + 13 * 384)
    assert small.total == pytest.approx(44e6, rel=0.02)  # 21.7 M and the head's 22.3 M
    assert small.prototypes == 65536


@pytest.mark.parametrize("kind", scaling.KINDS)
def test_predictions_hold_together(kind: str) -> None:
    def efficiency(ranks: int, assumed: Namespace) -> float:
        compute, exposed = scaling.predict(kind, size, 1e14, ranks, assumed)
        return compute / (compute + exposed)

    size, slow = sizes("vit_large"), Namespace(**{**vars(ASSUMED), "network": 0.5, "link": 4})
    assert efficiency(1, ASSUMED) == 1
    assert all(0 < efficiency(n, ASSUMED) <= 1 for n in scaling.SCALES)
    assert all(efficiency(n, slow) < efficiency(n, ASSUMED) for n in scaling.SCALES if n > 8)
    sent = {n: scaling.sent(kind, size, n, 8).total for n in scaling.SCALES}
    assert sent[1] == 0
    assert all(sent[n] < sent[2 * n] for n in (1, 2, 4))


def test_the_command_measures_what_it_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--ranks", "2", "--arch", "vit_nano", "--small", "--images", "4", "--updates", "2"]
    words += ["--no-compile", "--device", "cpu"]
    words += ["--predict", "vit_small", "--scales", "1", "1024", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["distributed", *words])
    scaling.main()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["ranks, way"] for row in rows] == ["2, ddp", "2, fsdp"]
    for row in rows:
        assert row["sent MB"] == pytest.approx(row["counted MB"], rel=0.02)
        assert row["waits"] == 0
        assert row["images/s"]["low"] > 0
        assert all(row[name] > 0 for name in ("save ms", "on disk ms", "resume ms", "peak MB"))
    printed = capsys.readouterr().out
    assert "Predicted, not measured" in printed
    assert "vit_small/16: 44 M parameters" in printed
    assert "| 1024 |" in printed
