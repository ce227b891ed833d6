"""The cases of `make bench` run, and benchmarks/compare.py tells a slower commit from an equal one."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark")

from benchmarks import compare
from benchmarks.compare import Case, judge
from fastdino.ops import native

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "benchmarks" / "suite"


def run(where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    # as on a machine where no test runs around it
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    return subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, check=False)


def test_every_case_runs() -> None:
    done = run(ROOT, "pytest", "benchmarks/suite", "--benchmark-disable", "-q")
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed in", done.stdout)  # and nothing else, as skipped
    assert passed, done.stdout
    assert int(passed[1]) > 30


def case(group: str, base: list[float], head: list[float], ours: bool = True) -> Case:
    times = {"base": base, "head": head}
    return Case(f"{group}, {'ours' if ours else 'theirs'}", group, ours, times, times)


@pytest.mark.parametrize(
    ("base", "head", "theirs", "noise", "verdict"),
    [
        ([1.0, 1.02, 1.01], [1.2, 1.21, 1.2], 1.0, 1.02, "slower"),
        ([1.0, 1.02, 1.01], [0.9, 0.91, 0.9], 1.0, 1.02, "faster"),
        ([1.0, 1.02, 1.01], [1.01, 1.03, 1.02], 1.0, 1.02, ""),  # less than it differs by from itself
        ([1.0, 1.3, 1.1], [1.2, 1.21, 1.2], 1.0, 1.3, ""),
        ([1.0, 1.02, 1.01], [1.2, 1.7, 1.2], 1.0, 1.7 / 1.2, ""),
        ([1.0, 1.02, 1.01], [1.2, 1.21, 1.2], 1.25, 1.25, ""),  # the same code became as slow
        ([1.0, 1.02, 1.01], [0.9, 0.91, 0.9], 0.8, 1.25, ""),
    ],
)
def test_a_difference_within_the_noise_is_none(
    base: list[float], head: list[float], theirs: float, noise: float, verdict: str
) -> None:
    rival = case("op", [1.0, 1.0, 1.0], [theirs] * 3, ours=False)
    elsewhere = case("another op", [1.0, 1.0, 1.0], [9.0] * 3, ours=False)
    ours, *others = judge([case("op", base, head), rival, elsewhere])
    assert ours["ratio"] == pytest.approx(min(head) / min(base))
    assert ours["noise"] == pytest.approx(noise)
    assert [row["verdict"] for row in (ours, *others)] == [verdict, "", ""]


def test_a_base_that_is_no_commit_is_named() -> None:
    with pytest.raises(SystemExit, match=r"'no-such-branch' names no commit of .*: give a hash, a branch"):
        compare.resolve("no-such-branch")


CASES = """
import pytest

@pytest.mark.parametrize("variant", ["fastdino", "python"])
def bench_work(timed, variant):
    import fastdino

    timed("work", variant, {"fastdino": fastdino.work, "python": lambda: sum(range(30_000))}, 60)

def bench_new(timed):
    from fastdino import new

    timed("new", "fastdino", {"fastdino": new}, 60)
"""
NATIVE = "LIBRARY = __file__\ndescribe = lambda: 'none'\n"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A commit of another fastdino, and changes to it: its work is ten times as long, and there is more."""
    folder = tmp_path / "repository"
    shutil.copytree(SUITE, folder / "benchmarks" / "suite", ignore=shutil.ignore_patterns("bench_*", "__*"))
    for name in ("__init__.py", "compare.py"):
        shutil.copy(ROOT / "benchmarks" / name, folder / "benchmarks")
    (folder / "fastdino" / "ops").mkdir(parents=True)
    (folder / "fastdino" / "ops" / "native.py").write_text(NATIVE)
    module, git = folder / "fastdino" / "__init__.py", ["git", "-c", "core.hooksPath=/dev/null"]
    module.write_text("def work(): return sum(range(10_000))\n")
    git += ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "base"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    module.write_text("def work(): return sum(range(100_000))\nnew = work\n")
    (folder / "benchmarks" / "suite" / "bench_work.py").write_text(CASES)
    (folder / "benchmarks" / "suite" / "bench_apart.py").write_text("from fastdino import new\n")
    return folder


def worktrees(repository: Path) -> int:
    command = ["git", "worktree", "list", "--porcelain"]
    listed = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True).stdout
    return listed.count("worktree ")


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_changes_are_compared_with_the_commit_before_them(repository: Path) -> None:
    options = ["HEAD", "--rounds", "2", "--out", "found.json"]
    done = run(repository, "benchmarks.compare", *options, "--fail-above", "1.1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "slower by more than 1.1: bench_work.py::bench_work[fastdino]" in done.stderr
    assert "base cannot run bench_work.py::bench_new: ImportError: cannot import name 'new'" in done.stdout
    assert "base cannot run bench_apart.py: it cannot be imported" in done.stdout
    found: dict[str, Any] = json.loads((repository / "found.json").read_text())
    ours, theirs = sorted(found["cases"], key=lambda row: not row["ours"])
    assert (ours["name"], ours["verdict"]) == ("bench_work.py::bench_work[fastdino]", "slower")
    assert 3 < ours["ratio"] < 30
    assert (theirs["name"], theirs["verdict"]) == ("bench_work.py::bench_work[python]", "")
    assert {len(times) for row in found["cases"] for times in row["least"].values()} == {2}
    assert worktrees(repository) == 1


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_comparison_that_fails_leaves_no_worktree(repository: Path) -> None:
    done = run(repository, "benchmarks.compare", "HEAD", "-k", "nothing")
    assert done.returncode == 1
    assert "-k 'nothing' fits no case" in done.stderr
    assert worktrees(repository) == 1


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout")
@pytest.mark.skipif(not native.isas(), reason=native.describe())
def test_the_checkout_is_compared_with_itself(tmp_path: Path) -> None:
    done = run(
        ROOT, "benchmarks.compare", "HEAD", "--rounds", "2", "-k", "center", "--out", str(tmp_path / "found")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found").read_text())
    assert {row["name"] for row in found["cases"]} == {
        f"bench_ops.py::bench_center[{variant}]" for variant in ("fastdino", "official")
    }
    # each with a library built for it
    assert found["kernels"] == dict.fromkeys(("base", "head"), native.describe())
    assert found["failed"] == {"base": {}, "head": {}}
