"""The counts of benchmarks/distributed.py against the bytes that processes really send."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import launch
from tiny import make_config, make_images

from benchmarks import distributed
from fastdino.dino import DINO

FLAGS: dict[str, Any] = {
    "out_dim": 8192,
    "drop_path_rate": 0.0,
    "freeze_last_layer": 0,
    "keep_every_epochs": 0,
    "local_crops_number": 0,
    "batch_size": 4,
}


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
        student = DINO(make_config(images, tmp_path, **FLAGS)).student
    ways = [flags_of(kind)["parallel"] for kind in kinds]
    expected = [distributed.bytes_sent(way, student, ranks, 2, parameter_bytes=4) for way in ways]
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


def test_the_command_measures_what_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--ranks", "2", "--arch", "vit_nano", "--small", "--images", "4", "--updates", "2"]
    words += ["--no-compile", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["distributed", *words])
    distributed.main()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["ranks, way"] for row in rows] == ["2, ddp", "2, fsdp"]
    for row in rows:
        assert row["sent MB"] == pytest.approx(row["counted MB"], rel=0.02)
        assert row["waits"] == 0
        assert all(row[name] > 0 for name in ("save ms", "on disk ms", "resume ms", "peak MB"))
