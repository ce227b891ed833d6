"""Times the DINO loss and the teacher update beside what else there is, in one interleaved run.

    python -m benchmarks.ops [--device cuda] [--out DIR]

Loss: forward plus backward, with upstream gradient 1 and 0.37, checked against one another first. Variants:
official DINO's form eager and under torch.compile (temperature as a tensor), lightly's DINOLoss where it is
installed (float32 only), the closed form in eager PyTorch (impl="torch"), fastdino, and as the limit a copy
of the ideal bytes: student read once, its gradient written once, teacher read once. No variant updates the
centre; the closed form and fastdino yield the teacher's mean all the same. On a CPU everything runs twice:
with the default allocator, and with one that keeps its pages.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import (
    ROOT,
    Clock,
    Conditions,
    Row,
    Timed,
    folder,
    interleave,
    machine,
    peak_bytes,
    write,
)
from fastdino import ops

TITLE = "DINO loss and teacher update"
V, G = 10, 2
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04


def official(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: Tensor, teacher_temp: Tensor
) -> Tensor:
    """Official DINO's loss: 2 V - 2 cross-entropies one by one."""
    q = torch.softmax((teacher - center) / teacher_temp, -1)
    terms = [
        # in float32 as under autocast; the division stays in the logits' precision, as there
        torch.sum(-q[g] * torch.log_softmax(student[v] / student_temp, -1, dtype=torch.float32), -1).mean()
        for g in range(len(teacher))
        for v in range(len(student))
        if v != g
    ]
    return torch.stack(terms).mean()


def loss_variants(
    student: Tensor, teacher: Tensor, center: Tensor, compiled: bool
) -> dict[str, Callable[[], Tensor]]:
    """Name to a function that computes the loss of the leaf `student`."""
    temps = [torch.tensor(x, device=student.device) for x in (STUDENT_TEMP, TEACHER_TEMP)]
    keywords: Any = {"student_temp": STUDENT_TEMP, "teacher_temp": TEACHER_TEMP}
    variants: dict[str, Callable[[], Tensor]] = {
        "official eager": lambda: official(student, teacher, center, *temps)
    }
    if compiled:
        graph = torch.compile(official, dynamic=False)
        variants["official compiled"] = lambda: graph(student, teacher, center, *temps)
    if student.dtype == torch.float32 and find_spec("lightly"):
        from lightly.loss import DINOLoss

        lightly = DINOLoss(student.shape[-1], student_temp=STUDENT_TEMP)
        lightly.center = center.view(1, 1, -1)
        lightly.update_center = lambda *_: None
        variants["lightly"] = lambda: lightly(list(teacher), list(student), teacher_temp=TEACHER_TEMP)
    variants["closed form eager"] = lambda: ops.dino_loss(student, teacher, center, **keywords, impl="torch")
    variants["fastdino"] = lambda: ops.dino_loss(student, teacher, center, **keywords)
    return variants


def step(variant: Callable[[], Tensor], leaf: Tensor, upstream: Tensor | None) -> Callable[[], None]:
    def run() -> None:
        leaf.grad = None
        variant().backward(upstream)

    return run


def check(variants: dict[str, Callable[[], Tensor]], leaf: Tensor) -> None:
    """Every variant computes the same loss and gradient as the closed form, or nothing is timed."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, variant in variants.items():
        leaf.grad = None
        loss = variant()
        loss.backward()
        assert leaf.grad is not None
        found[name] = loss.detach().float(), leaf.grad.float()
    leaf.grad = None
    expected = found["closed form eager"]
    # the others divide half-precision logits by the temperature in half precision
    limit = 1e-4 if leaf.dtype == torch.float32 else 0.2
    for name, both in found.items():
        off = max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(both, expected, strict=True))
        if not off < (5e-3 if name == "fastdino" else limit):
            raise SystemExit(f"{name} is off by {off:.1e} of the largest value: nothing was timed")


def bench_loss(
    images: int, prototypes: int, dtype: torch.dtype, clock: Clock, device: torch.device, args: Any
) -> list[Row]:
    torch._dynamo.reset()  # past eight shapes a function is no longer compiled, without a word
    student = torch.randn(V, images, prototypes, device=device).to(dtype).requires_grad_()
    teacher = torch.randn(G, images, prototypes, device=device).to(dtype)
    center = torch.randn(prototypes, device=device) * 0.1
    variants = loss_variants(student, teacher, center, args.compile)
    check(variants, student)
    ideal = (2 * student.numel() + teacher.numel()) * student.element_size()
    source = torch.randn(student.numel() + teacher.numel() // 2, device=device).to(dtype)
    target = torch.empty_like(source)
    upstream = torch.tensor(0.37, device=device)
    timed: Timed = {"copy of the ideal bytes": lambda: target.copy_(source)}
    for name, variant in variants.items():
        timed[name] = step(variant, student, None)
        timed[f"{name}, upstream 0.37"] = step(variant, student, upstream)
    times = interleave(timed, clock, args.seconds, args.rounds)
    copy = min(times["copy of the ideal bytes"])
    rows = []
    for name, ms in times.items():
        row: Row = {"op": "dino_loss", "variant": name, "B": images, "K": prototypes, "dtype": str(dtype)[6:]}
        row |= {"min_ms": min(ms), "median_ms": statistics.median(ms), "rounds": len(ms)}
        row |= {"GB_s": ideal / min(ms) / 1e6, "share_of_copy": copy / min(ms)}
        if name in variants:
            # the gradient itself is no extra memory
            peak = peak_bytes(timed[name], device)
            row["extra_MB"] = (
                max(0, peak - student.numel() * student.element_size()) / 1e6 if peak >= 0 else None
            )
        rows.append(row)
    return rows


def parameter_shapes(arch: str) -> list[torch.Size]:
    from fastdino import vit
    from fastdino.head import DINOHead

    with torch.device("meta"):
        backbone = getattr(vit, arch)(patch_size=16)
        head = DINOHead(backbone.embed_dim, 65536)
    return [p.shape for module in (backbone, head) for p in module.parameters()]


def bench_ema(arch: str, clock: Clock, device: torch.device, args: Any) -> list[Row]:
    shapes = parameter_shapes(arch)
    teacher, student = ([torch.randn(s, device=device) for s in shapes] for _ in range(2))
    momentum, count = 0.996, sum(s.numel() for s in shapes)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(momentum)
    source = torch.randn(
        count * 3 // 2, device=device
    )  # reads and writes 12 bytes a parameter, like the update
    target = torch.empty_like(source)

    def loop() -> None:
        for t, s in zip(teacher, student, strict=True):
            t.mul_(momentum).add_((1 - momentum) * s)

    def mul_add() -> None:
        torch._foreach_mul_(teacher, momentum)
        torch._foreach_add_(teacher, student, alpha=1 - momentum)

    timed: Timed = {
        "copy of the ideal bytes": lambda: target.copy_(source),
        "official loop": loop,
        "foreach mul, add": mul_add,
        "foreach lerp": lambda: torch._foreach_lerp_(teacher, student, 1 - momentum),
        "AveragedModel's average": lambda: average(teacher, student, 1),
        "fastdino": lambda: ops.ema_(teacher, student, momentum),
    }
    with torch.no_grad():
        times = interleave(timed, clock, args.seconds, args.rounds)
    copy = min(times["copy of the ideal bytes"])
    return [
        {"op": "ema", "variant": name, "arch": arch, "parameters": count, "rounds": len(ms)}
        | {"min_ms": min(ms), "median_ms": statistics.median(ms)}
        | {"GB_s": 12 * count / min(ms) / 1e6, "share_of_copy": copy / min(ms)}
        for name, ms in times.items()
    ]


def table(rows: list[Row]) -> str:
    """Markdown, one block for each problem, with the factor by which fastdino is faster."""
    out: list[str] = []
    keys = ("allocator", "op", "arch", "B", "K", "dtype")
    problems = list(dict.fromkeys(tuple((k, r[k]) for k in keys if k in r) for r in rows))
    for problem in problems:
        mine = [r for r in rows if all(r.get(k) == x for k, x in problem)]
        best = next(r for r in mine if r["variant"] == "fastdino")
        out += ["", "**" + ", ".join(f"{k} {x}" if k in "BK" else f"{x}" for k, x in problem) + "**", ""]
        out += [
            "| variant | min ms | median ms | time / ours | GB/s of ideal bytes | of the copy | extra MB |"
        ]
        out += ["|---|--:|--:|--:|--:|--:|--:|"]
        for r in mine:
            extra = "" if r.get("extra_MB") is None else f"{r['extra_MB']:.1f}"
            times = f"{r['min_ms']:.3f} | {r['median_ms']:.3f} | {r['min_ms'] / best['min_ms']:.2f}"
            out.append(f"| {r['variant']} | {times} | {r['GB_s']:.1f} | {r['share_of_copy']:.0%} | {extra} |")
    return "\n".join(out) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    loss = [r for r in rows if r["op"] == "dino_loss" and "upstream" not in r["variant"]]
    problems = list(dict.fromkeys((r.get("allocator", ""), r["K"], r["B"], r["dtype"]) for r in loss))
    names = list(dict.fromkeys(r["variant"] for r in loss))
    figure, axis = plt.subplots(figsize=(8, 1 + 0.9 * len(problems)))
    for j, name in enumerate(names):
        shown = {
            (r.get("allocator", ""), r["K"], r["B"], r["dtype"]): r["GB_s"]
            for r in loss
            if r["variant"] == name
        }
        at = [i + 0.8 * (j / len(names) - 0.5) for i in range(len(problems))]
        axis.barh(at, [shown.get(p, 0) for p in problems], height=0.8 / len(names), label=name)
    axis.set_yticks(range(len(problems)), [f"{a}\nK {k}, B {b}, {d}".strip() for a, k, b, d in problems])
    axis.set_xlabel("GB/s of ideal bytes, forward plus backward (best round)")
    axis.invert_yaxis()
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def measure(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    about, conditions, clock = machine(device), Conditions(), Clock(device, ahead=True)
    rows: list[Row] = []
    problems = [
        partial(bench_loss, b, k, getattr(torch, d), clock, device, args)
        for k in args.prototypes
        for b in args.images
        for d in args.dtypes
    ]
    problems += [partial(bench_ema, a, clock, device, args) for a in args.archs]
    for problem in problems:
        torch.manual_seed(0)
        found = [{"allocator": args.allocator} | r if args.allocator else r for r in problem()]
        rows += found
        write(TITLE, rows, about | conditions.describe(), table(rows), args.out)
        print(table(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DEVICE")
    parser.add_argument("--images", type=int, nargs="*", default=[64, 32, 16, 8])
    parser.add_argument("--prototypes", type=int, nargs="*", default=[65536, 4096, 262144])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--archs", nargs="*", default=["vit_small", "vit_base", "vit_large"])
    parser.add_argument("--seconds", type=float, default=10, help="of timing for each problem")
    parser.add_argument("--rounds", type=int, default=31, help="at most, for each problem")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--allocator", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    args.out = args.out or folder(device)
    if device.type == "cuda" or args.allocator:
        measure(args)
    else:
        keep = {
            "MALLOC_MMAP_THRESHOLD_": str(2**40),
            "MALLOC_TRIM_THRESHOLD_": str(2**40),
            "MALLOC_TOP_PAD_": str(2**28),
        }
        merged: list[Row] = []
        about: Row = {}
        for allocator, env in (("allocator keeps pages", keep), ("default allocator", {})):
            part = args.out / allocator.split()[0]
            again = [
                sys.executable,
                "-m",
                "benchmarks.ops",
                *sys.argv[1:],
                "--out",
                part,
                "--allocator",
                allocator,
            ]
            subprocess.run(again, cwd=ROOT, env=os.environ | env, check=True)
            result = json.loads((part / "results.json").read_text())
            merged += result["rows"]
            conditions = {k: v for k, v in result["about"].items() if k in Conditions().describe()}
            about |= machine(device) | {allocator: conditions}
            for file in part.iterdir():
                file.unlink()
            part.rmdir()
            write(TITLE, merged, about, table(merged), args.out)  # a stop loses the second half alone
    rows = json.loads((args.out / "results.json").read_text())["rows"]
    if not args.allocator and find_spec("matplotlib") and any(r["op"] == "dino_loss" for r in rows):
        plot(rows, args.out / "plot.png")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
