"""What every benchmark shares: cases, an interleaved clock, peak memory, stamps, tables, plots."""

import argparse
import ctypes
import gc
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdino import ops
from fastdino.files import write_text
from fastdino.ops import native

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]
Timed = dict[str, Callable[[], Any]]
COPY = "copy of the ideal bytes"


@dataclass
class Case:
    """One thing to do and the ways to do it: `fastdino`, and others beside it.

    Attributes:
        sizes: what it is done on; the title of its table.
        variants: name to a call that returns the tensors to compare; the first one's are the reference.
        limits: largest error of a variant, of the largest value of each tensor; "" for those not named.
        setup: called before each call, and not timed.
        bytes: how many must be moved; a copy of as many is timed too.
        held: bytes of a variant's peak memory that are its result.
    """

    op: str
    sizes: Row
    variants: Timed
    limits: dict[str, float] = field(default_factory=lambda: {"": 1e-4})
    setup: Callable[[], object] = lambda: None
    bytes: int = 0
    held: int = 0

    def check(self) -> None:
        """Raises SystemExit unless all variants compute the same."""
        expected: list[Tensor] = []
        for name, run in self.variants.items():
            self.setup()
            found = [x.detach().double() for x in run() or ()]  # None: not compared
            expected = expected or [x.clone() for x in found]
            errors = [off(x, y) for x, y in zip(found, expected, strict=True)] if found else []
            if not all(error <= self.limits.get(name, self.limits[""]) for error in errors):
                raise SystemExit(f"{self.op}: {name} is off by {max(errors):.1e}: nothing was timed")

    def measure(self, device: torch.device, seconds: float, rounds: int) -> list[Row]:
        """Checks, then times all variants in turns; a row of each."""
        self.check()
        timed = dict(self.variants)
        if self.bytes:
            source = torch.randn(self.bytes // 8, device=device)
            target = torch.empty_like(source)
            timed[COPY] = lambda: target.copy_(source)
        times = interleave(timed, Clock(device), seconds, rounds, self.setup)
        rows = []
        for name, ms in times.items():
            row: Row = {"op": self.op, "sizes": self.sizes, "variant": name, "ms": spread(ms)}
            row["times_fastdino"] = min(ms) / min(times["fastdino"])
            if self.bytes:
                row |= {"GB_s": self.bytes / min(ms) / 1e6, "share_of_copy": min(times[COPY]) / min(ms)}
            if name in self.variants and (peak := peak_bytes(timed[name], device, self.setup)) >= 0:
                row["extra_MB"] = max(0, peak - self.held) / 1e6
            rows.append(row)
        return rows


def off(x: Tensor, y: Tensor) -> float:
    """The largest difference, as a share of the largest expected value."""
    return ((x - y).abs().max() / y.abs().max()).item()


# Time and memory.


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Milliseconds of one call; on a GPU between its first kernel and its last, with a cold cache.

    A call that launches more slowly than it computes would be timed by its launches: a GPU first waits some
    ten milliseconds, until all of them are queued.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.flush = torch.empty(2**28 if self.cuda else 0, dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        self.flush.zero_()
        torch.cuda._sleep(20_000_000)  # clock cycles
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last)


def interleave(
    timed: Timed,
    clock: Callable[[Callable[[], Any]], float],
    seconds: float,
    rounds: int,
    setup: Callable[[], object] = lambda: None,
    *,
    warm: int = 1,
    due: int = 1,
) -> dict[str, list[float]]:
    """Times of every variant, one of each a round in an order drawn anew: a disturbance meets all of them.

    The first `warm` rounds are not counted. `due` rounds are made in any case, more while `seconds` last.
    """
    times: dict[str, list[float]] = {name: [] for name in timed}
    start = time.perf_counter()
    for done in range(-warm, rounds):
        began = time.perf_counter()
        start = began if done == 0 else start
        for name, run in random.Random(done).sample([*timed.items()], len(timed)):
            setup()
            times[name].append(clock(run))
        now = time.perf_counter()
        if done + 1 >= due and now - start + (now - began) > seconds:
            break
    return {name: ms[warm:] for name, ms in times.items()}


def spread(values: Sequence[float]) -> Row:
    """Median, least, most and number of some measurements."""
    middle = statistics.median(values)
    return {"median": middle, "low": min(values), "high": max(values), "rounds": len(values)}


def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    """The median of the rounds' own ratios: a disturbance of a whole round leaves it alone."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def peak_bytes(
    run: Callable[[], object], device: torch.device, setup: Callable[[], object] = lambda: None
) -> int:
    """Memory beyond what is held before the call, at its highest; -1 where the system does not tell."""
    setup()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    if not status.exists():
        return -1
    # Memory that the allocator keeps after one call would hide what the next one needs.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark

    def read(key: str) -> int:
        return next(int(x.split()[1]) * 1024 for x in status.read_text().splitlines() if x.startswith(key))

    before = read("VmRSS")
    run()
    return max(0, read("VmHWM") - before)


def matmul_flops(dtype: torch.dtype, device: torch.device) -> float:
    """The best rate of a matrix product of a ViT's sizes and of a large one, FLOP/s."""
    best, large = 0.0, 8192 if device.type == "cuda" else 2048
    for m, k, n in ((2760, 384, 1536), (2760, 1536, 384), (large, large, large)):
        x, w = (torch.randn(rows, k, device=device, dtype=dtype) for rows in (m, n))
        times = interleave({"linear": lambda: ops.linear(x, w)}, Clock(device), 1.0, 20)  # noqa: B023
        best = max(best, 2 * m * k * n / min(times["linear"]) * 1e3)
    return best


# The machine.


class Conditions:
    """How busy the machine was with other work, the hypervisor's included, since this was made."""

    def __init__(self) -> None:
        self.before = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        """Seconds of all cores, and those of them that other programs took."""
        stat, hertz = Path("/proc/stat"), os.sysconf("SC_CLK_TCK")
        ticks = [int(x) for x in stat.read_text().split("\n")[0].split()[1:9]] if stat.exists() else [0] * 8
        idle = ticks[3] + ticks[4]
        return sum(ticks) / hertz, (sum(ticks) - idle) / hertz - sum(os.times()[:4])

    def describe(self) -> Row:
        """Others' share of the cores' time."""
        total, others = (b - a for a, b in zip(self.before, self._now(), strict=True))
        return {"others_share_of_cores": round(others / max(total, 1e-9), 3)}


def processor(cpuinfo: str) -> str:
    """The CPU's brand; with family and model where the brand has no number of its own."""
    lines = (line.partition(":") for line in reversed(cpuinfo.splitlines()))  # of the first processor
    info = {key.strip(): value.strip() for key, _, value in lines}
    brand = info.get("model name") or platform.processor() or platform.machine()
    if not re.search(r"\d", re.sub(r"@.*|\d+-Core", "", brand)) and "cpu family" in info:
        brand += f" family {info['cpu family']} model {info['model']}"
    return brand


def machine(device: torch.device) -> Row:
    """The stamp of a result: processor, instruction set and threads, versions, commit and command."""
    cpuinfo = Path("/proc/cpuinfo")
    threads, isa = torch.get_num_threads(), (native.isas() or ("no kernels",))[0]
    cpu = processor(cpuinfo.read_text() if cpuinfo.exists() else "")
    host = f"{cpu}, {isa}, {threads} thread{'s' * (threads > 1)}"
    words = iter(sys.argv[1:])
    given = " ".join(w for w in words if w != "--out" or not next(words))  # where it lies says nothing
    git = ["git", "rev-parse", "--short", "HEAD"] if shutil.which("git") else ["echo"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else host,
        "processor": host,
        "instruction_set": isa,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or os.environ.get("FASTDINO_COMMIT", "unknown"),
        "command": f"python -m benchmarks.{Path(sys.argv[0]).stem} {given}".rstrip(),
        "runs": ops.describe(device),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    } | {package: version(package) for package in ("timm", "lightly") if find_spec(package)}


def folder(about: Row) -> Path:
    """Where the results of a device lie by default; its name is that of the stamp's device."""
    words = "".join(c if c.isalnum() else " " for c in str(about["device"])).split()
    return ROOT / "benchmarks" / "results" / "-".join(words).lower()


# Results.


class Results:
    """results.json and table.md of a benchmark, written after every problem: a stop loses only one.

    Raises:
        SystemExit: the folder holds results of another device, processor, instruction set or thread count,
            which a benchmark that `continues` must not mix with its own.
    """

    def __init__(
        self, title: str, text: Callable[[list[Row]], str], args: Any, continues: bool = True
    ) -> None:
        self.title, self.text, self.conditions = title, text, Conditions()
        self.about = machine(torch.device(args.device))
        self.out: Path = args.out or folder(self.about) / args.module
        stored = self.out / "results.json"
        before = json.loads(stored.read_text()) if stored.exists() else {"about": {}, "rows": []}
        self.stored_about, self.stored = before["about"], before["rows"]
        self.rows: list[Row] = []
        for key in ("device", "processor"):
            old, new = self.stored_about.get(key, self.about[key]), self.about[key]
            if old != new and continues:
                raise SystemExit(f"{stored} was measured on {old} and this is {new}: give another --out")

    def add(self, rows: list[Row]) -> None:
        """Keep some more rows, and print them."""
        self.rows += rows
        self.write(self.about | self.conditions.describe())
        print(self.text(rows), flush=True)

    def write(self, about: Row) -> None:
        """Both files, of all rows."""
        self.about = about
        self.out.mkdir(parents=True, exist_ok=True)
        lines = "\n".join(f"- {key}: {value}" for key, value in about.items())
        found = json.dumps({"about": about, "rows": self.rows}, indent=1)
        write_text(self.out / "results.json", f"{found}\n")
        write_text(self.out / "table.md", f"# {self.title}\n\n{lines}\n{self.text(self.rows)}")


def parser(doc: str | None, module: str) -> argparse.ArgumentParser:
    """--device and --out, with a module's docstring as help."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--out", type=Path, help=f"default: benchmarks/results/DEVICE/{module}")
    found.set_defaults(module=module)
    return found


def show(x: Any) -> str:
    """A cell: three digits of a number; a median with least and most."""
    if isinstance(x, dict):
        return f"{show(x['median'])} ({show(x['low'])}-{show(x['high'])})"
    if isinstance(x, float):
        return f"{x:.0f}" if abs(x) >= 1000 else f"{x:.3g}"
    return "" if x is None else str(x)


def table(title: str, name: str, lines: Sequence[tuple[str, Row]]) -> str:
    """Markdown: a line for each name and its cells, a column for each key of the cells that has a value."""
    columns = list(dict.fromkeys(key for _, cells in lines for key in cells))
    columns = [key for key in columns if any(cells.get(key) is not None for _, cells in lines)]
    out = ["", f"**{title}**", "", f"| {' | '.join([name, *columns])} |", "|---|" + "--:|" * len(columns)]
    for first, cells in lines:
        out.append(f"| {' | '.join([first, *(show(cells.get(key)) for key in columns)])} |")
    return "\n".join([*out, ""])


def draw(
    path: Path, title: str, panels: Row, unit: str, about: Row, stacked: bool = False, log: bool = False
) -> None:
    """A panel each with groups of dots, or of one stacked bar: panel, group, series to number or `spread`."""
    if not find_spec("matplotlib") or not panels:
        return
    from matplotlib.figure import Figure

    columns, lines = min(4, len(panels)), -(-len(panels) // 4)
    figure = Figure((4.5 * columns + 2.5, 4.5 * lines + 0.8), layout="constrained")
    handles: Row = {}
    names = dict.fromkeys(name for groups in panels.values() for found in groups.values() for name in found)
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    for number, (panel, groups) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(lines, columns, number)
        for i, found in enumerate(groups.values()):
            left = 0.0
            for j, (name, x) in enumerate(found.items()):
                if stacked:
                    handles[name] = axis.barh(i, x, 0.8, left, color=colours[name])
                    left += x
                    continue
                middle, low, high = (x["median"], x["low"], x["high"]) if isinstance(x, dict) else (x, x, x)
                at, error = i + 0.8 * (j + 0.5) / len(found) - 0.4, [[middle - low], [high - middle]]
                handles[name] = axis.errorbar(middle, at, xerr=error, fmt="o", color=colours[name])
        axis.set_yticks(range(len(groups)), groups)
        axis.invert_yaxis()
        axis.set(title=panel, xlabel=unit, xscale="log" if log else "linear")
        axis.grid(axis="x", alpha=0.3)
    if len(handles) > 1:
        figure.legend(handles.values(), handles, loc="outside right center")
    below = f"{about['device']}, torch {about['torch']}, commit {about['commit']}, {about['date'][:10]}"
    figure.suptitle(title)
    figure.supxlabel(below, fontsize="small", color="grey")
    figure.savefig(path, dpi=120)
