"""The command for a lent GPU: its rehearsal, and parts that do not end well."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu, harness

ABSENT = ("torchvision", "timm", "tyro", "rich", "safetensors", "tensorboard", "matplotlib", "PIL", "lightly")


def test_rehearsal_runs_every_part_and_writes_its_results(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({ABSENT})\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(gpu.ROOT)))}
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--minutes", "60", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    status = {part["part"]: part["status"] for part in summary}
    assert {name for name, what in status.items() if what == "ok"} == {"tests", "headline", "ema"}
    assert all(what == "ok" or what.startswith("left out: ") for what in status.values())
    assert {"profile", "patch_size", "loader", "distributed"} <= status.keys()
    assert " passed" in (tmp_path / "out" / "tests.log").read_text()
    for part in ("headline", "ema"):
        rows = json.loads((tmp_path / "out" / part / "results.json").read_text())["rows"]
        assert {"fastdino", harness.COPY} <= {row["variant"] for row in rows}
    assert (tmp_path / "out.tar.gz").exists()


def test_the_tests_for_a_gpu_are_found_by_their_mark(tmp_path: Path) -> None:
    """No list of files: those that hold a marked test, or one of an operation's Triton kernels."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "triton or cuda"]
    found = gpu.importable(command, {**os.environ}, tmp_path / "log")
    assert {"tests/ops/test_dino_loss.py", "tests/ops/test_ema.py"} <= {*found}
    assert "tests/test_cli.py" not in found


def test_a_part_that_runs_out_of_time_ends_with_all_that_it_started(tmp_path: Path) -> None:
    code = "import signal, subprocess, sys, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code += "child = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
    code += "print(subprocess.Popen(child).pid, flush=True)\ntime.sleep(600)"
    log, env = tmp_path / "part.log", {**os.environ}
    assert gpu.run([sys.executable, "-c", code], env, log, 5) == "stopped after 5 s, see part.log"
    state, until = Path("/proc", log.read_text().strip() or "none", "status"), time.monotonic() + 120
    while state.exists() and "Z (zombie)" not in state.read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    assert gpu.run([sys.executable, "-c", "raise SystemExit(3)"], env, log, 600).startswith("failed with 3")
    missing = gpu.run([sys.executable, "-c", "import no_such_package"], env, log, 600)
    assert missing == "left out: No module named 'no_such_package'"
