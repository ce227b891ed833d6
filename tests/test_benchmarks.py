"""The benchmarks that start runs of their own: the command for a lent GPU goes through all its parts, with no
more than torch and triton to import; that of the data's loading measures every loader that is installed."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounter

from benchmarks import gpu, ops
from benchmarks.measure import Clock
from fastdino.data.samples import render_samples

ROOT = Path(__file__).parent.parent
ABSENT = ("torchvision", "timm", "tyro", "rich", "safetensors", "tensorboard", "matplotlib", "PIL", "lightly")


def test_rehearsal_runs_every_part_and_writes_its_results(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({ABSENT})\n")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(tmp_path / "out")]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    trainer = "left out: not installed: PIL, torchvision, rich, safetensors, tyro"
    assert {part["part"]: part["status"] for part in summary} == {
        **dict.fromkeys(("tests", "loss", "ema", "step"), "ok"),
        **dict.fromkeys(("patch_size", "profile"), trainer),
        **dict.fromkeys(("data", "parallel"), f"{trainer}, tensorboard, matplotlib"),
    }
    for part in ("loss", "ema"):
        result = json.loads((tmp_path / "out" / part / "results.json").read_text())
        assert {"fastdino", "copy of the ideal bytes"} <= {row["variant"] for row in result["rows"]}
        assert all(row["min_ms"] > 0 for row in result["rows"])
        assert (tmp_path / "out" / part / "table.md").exists()
    rows = json.loads((tmp_path / "out" / "step" / "results.json").read_text())["rows"]
    assert {"official", "fastdino, packed, sdpa"} <= {row["variant"] for row in rows}
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert all(0 < row["utilisation"] < 1 and row["images_per_s"] > 0 for row in rows)


def test_a_part_that_runs_out_of_time_ends_with_all_that_it_started(tmp_path: Path) -> None:
    started = "import signal, subprocess, sys, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    started += (
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True)"
    )
    log = tmp_path / "part.log"
    said = gpu.run([sys.executable, "-c", started], {**os.environ}, log, 60)
    assert said == "ok"
    said = gpu.run([sys.executable, "-c", f"{started}\ntime.sleep(60)"], {**os.environ}, log, 1)
    assert said == "stopped after 1 s, see part.log"
    state = Path("/proc", log.read_text().strip(), "status")
    until = time.monotonic() + 10
    while state.exists() and "Z (zombie)" not in state.read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    assert gpu.run([sys.executable, "-c", "raise SystemExit(3)"], {**os.environ}, log, 60).startswith(
        "failed with 3"
    )


def test_official_dinos_loss_is_compiled_anew_for_every_problem(
    monkeypatch: pytest.MonkeyPatch, dynamo: None
) -> None:
    """Past torch's limit of graphs too, where it would run as it is without a word."""
    counter, compile_, cpu = CompileCounter(), torch.compile, torch.device("cpu")
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=counter, **options))
    args = SimpleNamespace(compile=True, seconds=0, rounds=1)
    for images in range(1, 12):
        ops.bench_loss(images, 8, torch.float32, Clock(cpu), cpu, args)
    assert counter.frame_count == 11


def test_data_times_every_loader_and_writes_its_results(tmp_path: Path) -> None:
    render_samples(tmp_path / "samples", train=16, val=8, size=160)
    images, out = tmp_path / "samples" / "train", tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.data", "--device", "cpu", "--quick", "--workers", "1"]
    command += ["--images", str(images), "--out", str(out), "--entries", "2500"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads((out / "results.json").read_text())["rows"]
    by_part = {
        part: {row["loader"]: row for row in rows if row["part"] == part}
        for part in ("core", "split", "workers", "entries")
    }
    for part in ("core", "split", "workers"):
        assert {"official DINO", "torchvision v2", "fastdino"} <= by_part[part].keys()
    for row in [*by_part["core"].values(), *by_part["workers"].values()]:
        assert row["images_per_s"]["median"] > 0
        assert row["times_official"]["median"] > 0
    assert by_part["workers"]["official DINO"]["KB_sent"] == 4 * by_part["workers"]["fastdino"]["KB_sent"]
    for row in by_part["split"].values():
        assert row["ms"]["decode"] > 0
        assert all(math.isfinite(ms) for ms in row["ms"].values())
    assert {kind: row["entries"] for kind, row in by_part["entries"].items()} == {
        "list": 2500,
        "shards": 2500,
    }
    table = (out / "table.md").read_text()
    assert "times official" in table
    assert "| fastdino |" in table


def test_photos_have_the_sizes_and_texture_of_photographs(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    from benchmarks import photos

    photos.make(tmp_path / "photos", 16)
    found = sorted((tmp_path / "photos").glob("*/*.jpg"))
    assert {path.parent.name for path in found} == set(photos.photographs())
    for path in found:
        with Image.open(path) as image:
            assert image.size in photos.SIZES
            assert image.layer[1][1:3] == (1, 1)  # chroma at half of the light's resolution
            assert image.layer[0][1:3] == (2, 2)
    assert 90 < photos.describe(found)["mean_KB"] < 130
    before = [path.read_bytes() for path in found]
    photos.make(tmp_path / "photos", 8)  # what is there stays
    photos.make(tmp_path / "again", 16)
    assert before == [path.read_bytes() for path in sorted((tmp_path / "again").glob("*/*.jpg"))]
    assert before == [path.read_bytes() for path in found]
