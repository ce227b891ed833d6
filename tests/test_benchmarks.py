"""The benchmarks that start runs of their own: the command for a lent GPU goes through all its parts, with no
more than torch and triton to import; that of the data's loading measures every loader that is installed."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

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
    assert [part["part"] for part in summary] == ["tests", "loss", "ema", "step", "data", "patch_size"]
    assert [part["status"] for part in summary[:-2]] == ["ok"] * 4
    assert summary[-2]["status"] == "left out: not installed: PIL, torchvision"
    assert summary[-1]["status"] == "left out: not installed: PIL, torchvision, rich, safetensors, tyro"
    for part in ("loss", "ema"):
        result = json.loads((tmp_path / "out" / part / "results.json").read_text())
        assert {"fastdino", "copy of the ideal bytes"} <= {row["variant"] for row in result["rows"]}
        assert all(row["min_ms"] > 0 for row in result["rows"])
        assert (tmp_path / "out" / part / "table.md").exists()
    rows = json.loads((tmp_path / "out" / "step" / "results.json").read_text())["rows"]
    assert {"official", "fastdino, packed, sdpa"} <= {row["variant"] for row in rows}
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert all(0 < row["utilisation"] < 1 and row["images_per_s"] > 0 for row in rows)


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
