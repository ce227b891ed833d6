"""Times a commit beside the working tree: the cases of `make bench`, in turns, so that drift meets both.

    python -m benchmarks.compare BASE [--rounds 4] [-k EXPR] [--out FILE] [--fail-above 1.10]

BASE is checked out into a temporary worktree, the working tree copied beside it, changes and new files
included. Each gets the native library of its own sources, and the working tree's benchmarks. A round runs the
suite once on either, every second round the other way round, each time in a process of its own that is
checked to import that folder's fastdino and library.

A time is the least of all rounds. The noise of a case is the factor by which it differs from itself (the
largest over the smallest least of a round, of either side) or by which the cases of its group that are not
fastdino's seem to have changed. A case that changed by more is `slower` or `faster`.
"""

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SUITE = "benchmarks/suite"
SIDES = ("base", "head")


@dataclass
class Case:
    """The times of a case's rounds, ms, by side; least and median of each round."""

    name: str
    group: str
    ours: bool
    least: dict[str, list[float]]
    median: dict[str, list[float]]

    @property
    def ratio(self) -> float:
        """Head's least time by base's."""
        return min(self.least["head"]) / min(self.least["base"])

    @property
    def spread(self) -> float:
        """The factor by which a case differs from itself."""
        return max(max(times) / min(times) for times in self.least.values())


def run(command: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Its output is captured."""
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False)


def git(*arguments: str) -> str:
    """Its output; without hooks, which a temporary checkout must not start."""
    done = run(["git", "-c", "core.hooksPath=/dev/null", *arguments], ROOT)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def resolve(base: str) -> str:
    """The commit that `base` names."""
    try:
        return git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{base}^{{commit}}").strip()
    except SystemExit:
        text = f"{base!r} names no commit of {ROOT}: give a hash, a branch, a tag or HEAD~1"
        raise SystemExit(text) from None


@contextmanager
def worktree(commit: str, where: Path) -> Iterator[None]:
    """`commit` checked out at `where`, and forgotten afterwards."""
    git("worktree", "add", "--detach", "--quiet", str(where), commit)
    try:
        yield
    finally:
        git("worktree", "remove", "--force", str(where))


def copy_tree(where: Path) -> None:
    """The working tree as it is now, without what git ignores."""
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if name and (ROOT / name).is_file():  # a file may be deleted and not yet committed so
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, where / name)


def build(folder: Path) -> None:
    """The native library of `folder`, in its place there."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    if not (cmake := shutil.which("cmake", path=path)):
        raise SystemExit("there is no cmake to build the kernels with: pip install cmake")
    make = ["--build", "build", "--parallel", str(os.cpu_count())]
    configure = ["-S", ".", "-B", "build", "-DCMAKE_BUILD_TYPE=Release"]
    for step in (configure, make, ["--install", "build", "--prefix", "."]):
        done = run([cmake, *step], folder)
        if done.returncode:
            raise SystemExit(
                f"the kernels of {folder.name} cannot be built:\n{(done.stdout + done.stderr)[-2000:]}"
            )


def sources(folder: Path) -> dict[Path, bytes]:
    """The native library's; empty where there is none."""
    paths = [folder / "CMakeLists.txt", *sorted((folder / "kernels").rglob("*"))]
    return {path.relative_to(folder): path.read_bytes() for path in paths if path.is_file()}


def build_both(base: Path, head: Path) -> None:
    """A library for each, or the same one where the sources are the same."""
    if sources(base):
        build(base)
    if sources(base) == sources(head):
        for library in (base / "fastdino").glob("*.so"):  # the same code at the same place in memory
            shutil.copy2(library, head / "fastdino")
    elif sources(head):
        build(head)


def time_suite(folder: Path, expression: str) -> tuple[dict[str, Any], dict[str, str]]:
    """pytest-benchmark's report on `folder`, and the cases that failed there, with the reason."""
    report = folder.parent / f"{folder.name}.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", SUITE, "-q", "-rfE", "--tb=no"]
    command += ["--continue-on-collection-errors", f"--benchmark-json={report}"]
    command += ["-k", expression] if expression else []
    done = run(command, folder, COLUMNS="250")  # wide enough for the reasons
    if done.returncode == 5:
        raise SystemExit(f"-k {expression!r} fits no case")
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest ended with {done.returncode} on {folder.name}:\n{done.stdout}{done.stderr}")
    failed = re.findall(rf"^(?:FAILED|ERROR) {SUITE}/(\S+)(?: - (.*))?$", done.stdout, re.MULTILINE)
    if not report.exists() or not report.stat().st_size:
        return {"benchmarks": [], "machine_info": {}}, dict(failed)
    found = json.loads(report.read_text())
    about = found["machine_info"]
    for what in ("fastdino", "library"):
        if found["benchmarks"] and not Path(about[what]).resolve().is_relative_to(folder.resolve()):
            raise SystemExit(f"{folder.name} was to be timed, but its {what} was {about[what]}")
    return found, dict(failed)


def compare(
    folders: dict[str, Path], rounds: int, expression: str
) -> tuple[list[Case], dict[str, dict[str, str]], dict[str, str]]:
    """Cases that ran on both sides; those that did not, with the reason, and what kernels ran, by side."""
    cases: dict[str, Case] = {}
    failed: dict[str, dict[str, str]] = {side: {} for side in SIDES}
    kernels: dict[str, str] = {}
    for n in range(rounds):
        for side in SIDES if n % 2 == 0 else SIDES[::-1]:
            print(f"round {n + 1} of {rounds}: {side}", file=sys.stderr, flush=True)
            report, unable = time_suite(folders[side], expression)
            failed[side] |= unable
            kernels[side] = report["machine_info"].get("kernels", "nothing ran")
            for found in report["benchmarks"]:
                name, stats, ours = found["fullname"], found["stats"], found["extra_info"]["ours"]
                times: Any = [{side: [] for side in SIDES} for _ in range(2)]
                case = cases.setdefault(name, Case(name, found["group"], ours, *times))
                case.least[side].append(stats["min"] * 1e3)
                case.median[side].append(stats["median"] * 1e3)
    return [case for case in cases.values() if all(case.least.values())], failed, kernels


def judge(cases: list[Case]) -> list[dict[str, Any]]:
    """Each case with its ratio, what of it may be noise, and a verdict."""
    rows = []
    for case in cases:
        others = [c.ratio for c in cases if c.group == case.group and not c.ours]
        noise = max(case.spread, *(max(r, 1 / r) for r in others), 1.0)
        verdict = "slower" if case.ratio > noise else "faster" if case.ratio < 1 / noise else ""
        judged = {"ratio": case.ratio, "noise": noise, "verdict": verdict if case.ours else ""}
        rows.append(asdict(case) | judged)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [("case", "base min", "median", "head min", "median", "head/base", "noise", "")]
    for row in rows:
        sides = [(min(row["least"][side]), statistics.median(row["median"][side])) for side in SIDES]
        numbers = [f"{x:.3f}" for x in (*sides[0], *sides[1], row["ratio"], row["noise"])]
        name = row["name"].partition("::bench_")[2]
        lines.append((name, *numbers, row["verdict"] if row["ours"] else "not ours"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([name.ljust(widths[0]), *map(str.rjust, rest, widths[1:])] for name, *rest in lines)
    return "\n".join(map("  ".join, padded))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", metavar="BASE", help="a commit, branch or tag")
    parser.add_argument("--rounds", type=int, default=4, help="2 at least: noise is what rounds differ by")
    parser.add_argument("-k", dest="expression", default="", help="cases, as for pytest")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--fail-above", type=float, help="end with status 1 if a case is slower by this")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds 2 at least: noise is what rounds differ by")
    commit = resolve(args.base)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, which cleans up
    with tempfile.TemporaryDirectory(prefix="fastdino-compare-") as temporary:
        folders = {side: Path(temporary) / side for side in SIDES}
        with worktree(commit, folders["base"]):
            copy_tree(folders["head"])
            build_both(*folders.values())
            shutil.copytree(ROOT / "benchmarks", folders["base"] / "benchmarks", dirs_exist_ok=True)
            cases, failed, kernels = compare(folders, args.rounds, args.expression)
    rows = judge(cases)
    head = git("describe", "--always", "--dirty").strip()
    print(f"\nbase {commit[:9]}: {kernels['base']}\nhead {head}: {kernels['head']}\n\nms")
    print(table(rows))
    for side in SIDES:
        for name, why in failed[side].items():
            print(f"{side} cannot run {name}: {why or 'it cannot be imported'}")
    if args.out:
        about = {"base": commit, "head": head, "rounds": args.rounds, "kernels": kernels, "failed": failed}
        args.out.write_text(json.dumps(about | {"cases": rows}, indent=1) + "\n")
    slower = [row for row in rows if row["verdict"] == "slower" and row["ratio"] > (args.fail_above or 0)]
    if args.fail_above and (slower or failed["head"]):
        text = (
            f"slower by more than {args.fail_above:g}: {', '.join(row['name'] for row in slower) or 'none'}"
        )
        raise SystemExit(text + (f"; failed: {', '.join(failed['head'])}" if failed["head"] else ""))


if __name__ == "__main__":
    main()
