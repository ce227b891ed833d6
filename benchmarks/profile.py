"""Where the time of a whole update goes, by torch.profiler; `python -m benchmarks.patch_size --profile`."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Row, synchronize, table

KINDS = {  # by a kernel's or an operator's name; the first that matches
    "matrix products": r"triton_tem|gemm|nvjet|xmma|cublas|::(add|b)?mm$|linear_onednn|conv",
    "casts, alone": r"^triton_poi_fused__to_copy_\d+$",
    "compiled, fused": r"^triton_",
    "attention": r"flash|fmha|attention|(?<!log)_softmax|(?<!Log)SoftMax",
    "loss, teacher": r"dino_loss|^(tile|merge|finish|bwd|ema)_kernel|::ema_|(?i:log_?softmax)",
    "optimiser, clipping": r"(?i)adam|sgd|multi_tensor|_foreach|addcdiv|addcmul|lerp",
    "norms": r"(?i)norm",
    "GELU": r"(?i)gelu",
    "copies": r"(?i)copy|memcpy|memset|clone|fill|zero|cat\b|Cat|index|gather|scatter",
}
TINY = 5.0  # microseconds
WAITS = re.compile(r"cuda(Stream|Device|Event)Synchronize|cudaMemcpy$")


def kind_of(name: str) -> str:
    """What a kernel or an operator computes."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "the rest")


def kernels_of(events: Iterable[Any]) -> list[tuple[str, float, float]]:
    """Kernels and movements of memory on a GPU as they began: name, first and last microsecond."""
    found = [
        (e.name, e.time_range.start, e.time_range.end)
        for e in events
        if e.device_type != DeviceType.CPU
        and not e.is_user_annotation
        and e.time_range.end > e.time_range.start
    ]
    return sorted(found, key=lambda kernel: kernel[1])


def most(times: dict[str, float], count: int) -> list[tuple[str, float]]:
    """The largest, in order."""
    return sorted(times.items(), key=lambda item: -item[1])[:count]


def of_kernels(kernels: list[tuple[str, float, float]], waits: int, updates: int) -> Row:
    """Of one update among N: ms, the busy share, gaps by the kernel that ends them, launches, tiny ones."""
    began = end = kernels[0][1]
    idle = defaultdict[str, float](float)
    for name, first, last in kernels:  # streams may overlap
        idle[name] += max(0.0, first - end)
        end = max(end, last)
    tiny = [last - first for _, first, last in kernels if last - first < TINY]
    per = 1e3 * updates
    row = {
        "ms": (end - began) / per,
        "busy": 1 - sum(idle.values()) / (end - began),
        "waits": waits / updates,
    }
    row |= {"launches": len(kernels) / updates, "tiny": len(tiny) / updates, "tiny_ms": sum(tiny) / per}
    return row | {"gaps": {name: gap / per for name, gap in most(idle, 5) if gap}}


def shares(named: Iterable[tuple[str, float, float]]) -> Row:
    """Kinds, and the names that take most, of (name, ms, calls) of one update."""
    kinds, calls, names = (defaultdict[str, float](float) for _ in range(3))
    for name, ms, count in named:
        kinds[kind_of(name)] += ms
        calls[kind_of(name)] += count
        names[name] += ms
    return {"kinds": dict(kinds), "calls": dict(calls), "most": dict(most(names, 15))}


def profile_update(run: Callable[[], object], device: torch.device, updates: int) -> Row:
    """An update's time by kind. The profiler slows the host: where that sets the pace, gaps grow.

    On a CPU of operators, their own time without that of those they call.
    """
    run()
    run()
    synchronize(device)
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiled:
        for _ in range(updates):
            run()
        synchronize(device)
    if gpu:
        events = profiled.events()
        kernels = kernels_of(events)
        waits = sum(bool(WAITS.search(e.name)) for e in events if e.device_type == DeviceType.CPU)
        named = [(name, (last - first) / 1e3 / updates, 1 / updates) for name, first, last in kernels]
        return of_kernels(kernels, waits - 1, updates) | shares(named)  # one wait is ours
    found = {e.key: e for e in profiled.key_averages()}
    named = [(e.key, e.self_cpu_time_total / 1e3 / updates, e.count / updates) for e in found.values()]
    row: Row = {"ms": sum(ms for _, ms, _ in named)}
    row["casts"] = found["aten::_to_copy"].count / updates if "aten::_to_copy" in found else 0.0
    return row | shares(named)


def text(rows: list[Row]) -> str:
    """A line on each variant, a table of its kinds and one of its slowest kernels or operators."""
    out = []
    for row in rows:
        numbers = ("busy", "launches", "tiny", "tiny_ms", "casts", "waits")
        what = ", ".join(f"{name} {row[name]:.3g}" for name in numbers if name in row)
        out.append(
            f"\n## {row['problem']}: {row['variant']}, {row['precision']}: {row['ms']:.1f} ms of an update\n"
        )
        out += [
            what,
            *(f"- {gap:.2f} ms idle before `{name[:90]}`" for name, gap in row.get("gaps", {}).items()),
        ]
        total = sum(row["kinds"].values())
        kinds = sorted(row["kinds"].items(), key=lambda item: -item[1])
        cells = [
            {"share": f"{ms / total:.1%}", "ms": ms, "calls": f"{row['calls'][k]:.0f}"} for k, ms in kinds
        ]
        out.append(table("kinds", [{"kind": kind} for kind, _ in kinds], "kind", cells))
        most = [{"name": f"`{name[:90]}`"} for name in row["most"]]
        cells = [{"ms": ms, "kind": kind_of(name)} for name, ms in row["most"].items()]
        out.append(table("most time in", most, "name", cells))
    return "\n".join(out)
