"""Where the time of a whole update goes, by torch.profiler: what is computed, and what does not belong there.

    python -m benchmarks.profile [--device cuda] [--arch vit_small] [--patch 16] [--images 64] [--trace]

Profiles official DINO's update and fastdino's (benchmarks/update.py), after some to warm up, on random images
in memory. Prints and writes, for each, of one update:

kinds     time and calls of kernels by what they compute, told by their names; on a CPU of operators, their
          own time without that of those they call
most      the kernels, or operators, that take most
casts     on a CPU: copies whose result has another type than what is copied, and their share

and on a GPU

busy      share of the time between the first kernel and the last in which one runs or memory is moved
gaps      the time in which none does, by the kernel that ends it: what the device waited for
launches  kernels, and of these tiny ones, which take less than 5 microseconds
waits     times that the host waits for the device

The profiler slows the host down: where it, and not the device, sets the pace, gaps are shorter without.
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Conditions, Row, folder, machine, write
from benchmarks.update import Official, Ours, Problem, Shared, synchronize
from fastdino.train import choose_precision

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
REST = "the rest"
TINY = 5.0  # microseconds
WAITS = re.compile(r"cuda(Stream|Device|Event)Synchronize|cudaMemcpy$")


class Kernel(NamedTuple):
    """What ran on a GPU, from and to which microsecond."""

    name: str
    start: float
    end: float


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), REST)


def kernels_of(events: Iterable[Any]) -> list[Kernel]:
    """A profile's kernels and movements of memory, as they began."""
    found = [
        Kernel(e.name, e.time_range.start, e.time_range.end)
        for e in events
        if e.device_type != DeviceType.CPU
        and not e.is_user_annotation
        and e.time_range.end > e.time_range.start
    ]
    return sorted(found, key=lambda kernel: kernel.start)


def of_kernels(kernels: list[Kernel], waits: int, updates: int) -> Row:
    """Of one update among so many; times in ms."""
    began = end = kernels[0].start
    idle = Counter[str]()
    for kernel in kernels:  # streams may overlap
        if kernel.start > end:
            idle[kernel.name] += kernel.start - end
        end = max(end, kernel.end)
    tiny = [k.end - k.start for k in kernels if k.end - k.start < TINY]
    per = 1e3 * updates
    return {
        "ms": (end - began) / per,
        "busy": 1 - sum(idle.values()) / (end - began),
        "gaps": [{"before": name, "ms": gap / per} for name, gap in idle.most_common(5)],
        "launches": len(kernels) / updates,
        "tiny": len(tiny) / updates,
        "tiny_ms": sum(tiny) / per,
        "waits": waits / updates,
    }


def shares(named: Iterable[tuple[str, float, float]]) -> Row:
    """Kinds, and the names that take most, of (name, ms, calls) of one update."""
    kinds, calls, most = Counter[str](), Counter[str](), Counter[str]()
    for name, ms, count in named:
        kinds[kind_of(name)] += ms
        calls[kind_of(name)] += count
        most[name] += ms
    order = [*KINDS, REST]
    return {
        "kinds": {kind: {"ms": kinds[kind], "calls": calls[kind]} for kind in order if kinds[kind]},
        "most": [{"name": name, "ms": ms, "kind": kind_of(name)} for name, ms in most.most_common(15)],
    }


def bench(variant: Any, crops: list[torch.Tensor], updates: int, trace: Path | None) -> Row:
    device = crops[0].device
    gpu = device.type == "cuda"

    def run() -> None:
        for _ in range(updates):
            variant(crops, lambda part: None)

    run()
    run()
    synchronize(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiled:
        run()
        synchronize(device)
    variant.its.drop_gradients()
    if trace:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiled.export_chrome_trace(str(trace))
    if gpu:
        events = profiled.events()
        kernels = kernels_of(events)
        waits = sum(bool(WAITS.search(e.name)) for e in events if e.device_type == DeviceType.CPU)
        named = ((k.name, (k.end - k.start) / 1e3 / updates, 1 / updates) for k in kernels)
        return of_kernels(kernels, waits - 1, updates) | shares(named)  # one wait is ours
    found = profiled.key_averages()
    its = [(e.key, e.self_cpu_time_total / 1e3 / updates, e.count / updates) for e in found]
    casts = [e for e in found if e.key == "aten::_to_copy"]
    return {
        "ms": sum(ms for _, ms, _ in its),
        "casts": sum(e.count for e in casts) / updates,
        "casts_ms": sum(e.cpu_time_total for e in casts) / 1e3 / updates,
    } | shares(its)


def table(rows: list[Row]) -> str:
    """As Markdown."""
    lines = []
    for row in rows:
        lines += ["", f"## {row['variant']}, {row['precision']}: {row['ms']:.1f} ms of an update", ""]
        if "busy" in row:
            lines.append(
                f"busy {row['busy']:.1%}, {row['launches']:.0f} launches, {row['tiny']:.0f} of them tiny "
                f"({row['tiny_ms']:.2f} ms), {row['waits']:.1f} waits; gaps before:"
            )
            lines += ["", *(f"- {gap['ms']:.2f} ms: `{gap['before'][:90]}`" for gap in row["gaps"])]
        else:
            lines.append(f"{row['casts']:.0f} casts, {row['casts_ms'] / row['ms']:.1%} of the time")
        lines += ["", "| kind | share | ms | calls |", "|---|--:|--:|--:|"]
        for kind, its in sorted(row["kinds"].items(), key=lambda item: -item[1]["ms"]):
            share = its["ms"] / sum(other["ms"] for other in row["kinds"].values())
            lines.append(f"| {kind} | {share:.1%} | {its['ms']:.2f} | {its['calls']:.0f} |")
        lines += ["", "| most time in | ms | kind |", "|---|--:|---|"]
        lines += [f"| `{its['name'][:90]}` | {its['ms']:.2f} | {its['kind']} |" for its in row["most"]]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DEVICE/profile")
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--images", type=int, default=64 if gpu else 8)
    parser.add_argument("--updates", type=int, default=5 if gpu else 2)
    parser.add_argument("--global-size", type=int, default=224)
    parser.add_argument("--local-size", type=int, default=96)
    parser.add_argument("--out-dim", type=int, default=65536)
    parser.add_argument(
        "--trace", action="store_true", help="also write traces for Perfetto, a file a variant"
    )
    args = parser.parse_args()
    device = torch.device(args.device)
    out = args.out or folder(device) / "profile"
    sizes = (args.global_size, args.local_size)
    problem = Problem(args.arch, args.patch, args.images, sizes, out_dim=args.out_dim)
    conditions = Conditions()
    torch.manual_seed(0)
    its, crops = Shared(problem, device), problem.crops(problem.images, device)
    ours = choose_precision("auto", device)
    # on a CPU the published form in the same precision, for float32 against bfloat16 tells little
    theirs = torch.float16 if device.type == "cuda" else ours
    rows = []
    for name, variant in {"official": Official(its, theirs), "fastdino": Ours(its, ours)}.items():
        trace = out / f"{name}.trace.json.gz" if args.trace else None
        row = {"variant": name, "precision": str(variant.dtype).removeprefix("torch.")}
        rows.append(row | bench(variant, crops, args.updates, trace))
    title = f"Profile of {problem.name}, {problem.images} images"
    text = table(rows)
    write(title, rows, machine(device) | conditions.describe(), text, out)
    print(text)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
