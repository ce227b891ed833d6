"""The command for a lent GPU goes through all its parts, with no more than torch and triton to import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    assert [part["part"] for part in summary] == ["tests", "loss", "ema", "step"]
    for part in ("loss", "ema"):
        result = json.loads((tmp_path / "out" / part / "results.json").read_text())
        assert {"fastdino", "copy of the ideal bytes"} <= {row["variant"] for row in result["rows"]}
        assert all(row["min_ms"] > 0 for row in result["rows"])
        assert (tmp_path / "out" / part / "table.md").exists()
    rows = json.loads((tmp_path / "out" / "step" / "results.json").read_text())["rows"]
    assert {"official", "fastdino, packed, sdpa"} <= {row["variant"] for row in rows}
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert all(0 < row["utilisation"] < 1 and row["images_per_s"] > 0 for row in rows)
