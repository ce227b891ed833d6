"""The cases of `make bench` run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")


def test_every_case_runs() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks/suite.py", "--benchmark-disable", "-q"]
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed in", done.stdout)  # and nothing else, as skipped
    assert passed, done.stdout
    assert int(passed[1]) > 30
