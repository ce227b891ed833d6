"""What every benchmark measures with: an interleaved clock, peak memory, and the machine's name and state."""

import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastdino import ops
from fastdino.files import write_atomically

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]
Timed = dict[str, Callable[[], object]]


class Clock:
    """Milliseconds of one call; on a GPU between its first kernel and its last, with a cold cache.

    There a call that launches slower than it computes is told by its launches, unless `ahead` has the GPU
    wait some ten milliseconds until all are queued.
    """

    def __init__(self, device: torch.device, ahead: bool = False) -> None:
        self.cuda, self.ahead = device.type == "cuda", ahead
        self.flush = torch.empty(2**28, dtype=torch.int8, device=device) if self.cuda else None

    def __call__(self, run: Callable[[], object]) -> float:
        if self.flush is None:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        self.flush.zero_()
        if self.ahead:
            torch.cuda._sleep(20_000_000)  # clock cycles
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last)


def interleave(timed: Timed, clock: Clock, seconds: float, rounds: int) -> dict[str, list[float]]:
    """Times of every variant, one of each in turn, so that a disturbance meets all of them."""
    for run in timed.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in timed}
    start = time.perf_counter()
    for done in range(rounds):
        if done and time.perf_counter() - start > seconds:
            break
        for name, run in timed.items():
            times[name].append(clock(run))
    return times


def peak_bytes(run: Callable[[], object], device: torch.device, warm: bool = True) -> int:
    """Memory beyond what is held before the call, at its highest; on a CPU of a second call, if `warm`."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    if warm:
        run()
    status = Path("/proc/self/status")
    if not status.exists():
        return -1
    # what the allocator keeps after one call would hide what the next one needs
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark

    def read(key: str) -> int:
        return next(int(x.split()[1]) * 1024 for x in status.read_text().splitlines() if x.startswith(key))

    before = read("VmRSS")
    run()
    return max(0, read("VmHWM") - before)


class Conditions:
    """How busy the machine was with other work between construction and `describe`."""

    def __init__(self) -> None:
        self.load, self.before = os.getloadavg()[0], self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        stat = Path("/proc/stat")
        ticks = [int(x) for x in stat.read_text().split("\n")[0].split()[1:]] if stat.exists() else [0] * 8
        own = sum(os.times()[:4])
        hertz = os.sysconf("SC_CLK_TCK")
        return sum(ticks[:8]) / hertz, (sum(ticks[:3]) + sum(ticks[5:7])) / hertz - own, ticks[7] / hertz

    def describe(self) -> Row:
        total, others, stolen = (b - a for a, b in zip(self.before, self._now(), strict=True))
        shares = {
            "others_share_of_cores": round(others / max(total, 1e-9), 3),
            "stolen": round(stolen / max(total, 1e-9), 3),
        }
        return {"load_before": self.load, "load_after": os.getloadavg()[0], **shares}


def machine(device: torch.device) -> Row:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        name = next(
            (x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor()
        )
        name += f", {torch.get_num_threads()} threads"
    words = iter(sys.argv[1:])  # where it was written is no one's business
    given = " ".join(w for w in words if w != "--out" or not next(words))
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # a machine without git
        found = ""
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": found or os.environ.get("FASTDINO_COMMIT", "unknown"),
        "command": f"python -m benchmarks.{Path(sys.argv[0]).stem} {given}".rstrip(),
        "runs": ops.describe(device),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def folder(device: torch.device) -> Path:
    """Where a device's results lie by default."""
    name = "".join(c if c.isalnum() else " " for c in str(machine(device)["device"]))
    return ROOT / "benchmarks" / "results" / "-".join(name.split()).lower()


def write(title: str, rows: list[Row], about: Row, table: str, out: Path) -> None:
    """results.json and table.md; called after every problem, so that a stop loses one alone."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [f"- {key}: {value}" for key, value in about.items()]
    texts = {
        "results.json": json.dumps({"about": about, "rows": rows}, indent=1) + "\n",
        "table.md": f"# {title}\n\n" + "\n".join(lines) + "\n" + table,
    }
    for name, text in texts.items():
        write_atomically(out / name, lambda path, text=text: path.write_text(text))  # type: ignore[misc]
