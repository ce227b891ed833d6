"""Times whole DINO updates by patch size: official DINO, lightly's parts, fastdino and its optimizations.

    python -m benchmarks.patch_size [--device cuda] [--minutes 50] [--quick] [--plot-only] [--out DIR]

An update is the forward passes of teacher and student, loss, backward pass, clipping, optimiser, moving
average and centre, on random images in memory: two global crops of 224 and eight local ones of 96 pixels an
image, 65536 prototypes, stochastic depth 0.1. Where a side is no multiple of the patch, the rest is left out.

    official            the published algorithm, from its formulas (benchmarks/official.py); fp16 autocast
                        with loss scaling on a GPU, float32 on a CPU; on crops that its loader normalised
    official, compiled  the same, networks and loss under torch.compile
    official, bfloat16  on a CPU: the same under autocast, not compiled
    lightly             its DINOLoss, DINOProjectionHead and update_momentum on timm's ViT (or torchvision's
                        ResNet), a pass for each size, gradients clipped by their common norm
    fastdino            `fastdino.Update`, the trainer's own, with the device's defaults, on uint8 crops

and fastdino without one of its optimizations: `fused loss` (official's 18 terms instead), `fused EMA` (a
loop), `packing` (a pass for each size), `attention kernel` (weights written out; in bfloat16 on a CPU up to
256 tokens they are so as it is), `compile` (off; on a CPU, where it is off by default, it is added), `half
precision` (float32), `no syncs` (official's clipping and loss.item()), `fused optimiser` (torch's as it
comes), `skipped work` (samples that stochastic depth drops are multiplied by 0, the last block computes all
tokens), and `all of these` (on a CPU without compile).

Nothing is timed unless every variant gives the loss, gradients and centre of official DINO in float32, from
the same weights and images without stochastic depth, and its clipping, optimiser and moving average do what
their formulas say (benchmarks/update.py). benchmarks/README.md says how to read the tables. A network that
results.json has from the same device, versions, commit and arguments is not measured again.
"""

import argparse
import gc
import json
import math
import multiprocessing
import statistics
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import profile as profiling
from benchmarks.harness import (
    Conditions,
    Results,
    Row,
    Timed,
    bars,
    interleave,
    matmul_flops,
    parser,
    peak_bytes,
    ratio,
    spread,
    synchronize,
    table,
)
from benchmarks.update import OPTIMIZATIONS, PARTS, Problem, Shared, Variant, check, model_flops, variants_of
from fastdino.backbones import VITS

TITLE = "Whole updates and patch size"
MAIN = ("official", "official, compiled", "official, bfloat16", "lightly", "fastdino")
PUBLISHED = ([224, 96], 8, 65536)


def run(variant: Variant, views: list[Tensor], times: int = 1) -> float:
    """Seconds of an update, of N on end; leaves no gradients."""
    synchronize(variant.shared.device)
    began = time.perf_counter()
    for _ in range(times):
        variant(views)
    synchronize(variant.shared.device)
    seconds = (time.perf_counter() - began) / times
    variant.drop_gradients()
    return seconds


def parts_of(variant: Variant, views: list[Tensor], updates: int) -> Row:
    """Seconds of each part; each update waits for the device after each part, so overlap is not seen."""
    seconds, device = defaultdict[str, float](float), variant.shared.device
    last = time.perf_counter()

    def mark(part: str) -> None:
        nonlocal last
        synchronize(device)
        now = time.perf_counter()
        seconds[part] += now - last
        last = now

    with variant.watched(mark):
        for _ in range(updates):
            last = time.perf_counter()
            variant(views)
    variant.drop_gradients()
    return {part: s / updates for part, s in seconds.items()}


def bench(problem: Problem, asked: Row, rates: Row, until: float, args: argparse.Namespace) -> Row:
    """All of a problem; rounds, of which two are due, as long as there is time."""
    conditions, began = Conditions(), time.monotonic()
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    peaks = {} if gpu else memory_apart(problem, asked["compiled"])
    torch.manual_seed(0)
    shared, crops = Shared(problem, device), problem.crops(problem.images, device)
    variants = variants_of(problem, shared, asked["compiled"], tuple(asked["without"]))
    checked = check(variants, crops)
    views = {name: variant.inputs(crops) for name, variant in variants.items()}
    on_end = dict.fromkeys(variants, 1)
    for name, variant in variants.items():
        if variant.compiled or gpu:
            run(variant, views[name])  # the check ran without stochastic depth
        if gpu:
            on_end[name] = max(1, min(20, round(0.5 / run(variant, views[name]))))
    peaks = peaks or memory_of(variants, crops)
    print(f"{problem.name}: checked and warm after {time.monotonic() - began:.0f} s", flush=True)
    timed: Timed = {name: partial(run, v, views[name], on_end[name]) for name, v in variants.items()}
    left = until - time.monotonic()
    times = interleave(timed, lambda call: call(), left, args.rounds, warm=0, due=min(2, args.rounds))
    rows = []
    for name, variant in variants.items():
        dtype = str(variant.update.dtype).removeprefix("torch.")
        rate = model_flops(problem) * problem.images / statistics.median(times[name])
        row: Row = {"variant": name, "precision": dtype, "off": checked[name], **peaks.get(name, {})}
        row |= {"images_per_s": spread([problem.images / t for t in times[name]])}
        row |= {"times_official": ratio(times, "official", name), "use": rate / rates[dtype]}
        row |= {"times_fastdino": ratio(times, name, "fastdino")}
        if args.parts and name in ("official", "fastdino"):
            row["parts"] = parts_of(variant, views[name], args.parts)
        rows.append(row)
    found: Row = {"problem": asdict(problem), "GFLOP_an_image": model_flops(problem) / 1e9, "variants": rows}
    found["fastdino"] = "compiled" if variants["fastdino"].compiled else "eager"
    return found | {"seconds": time.monotonic() - began, "conditions": conditions.describe()}


def memory_of(variants: dict[str, Variant], crops: list[Tensor]) -> dict[str, Row]:
    """Of the main variants: an update's peak, and the part of it that goes with an image."""
    found: dict[str, Row] = {}
    for name, variant in variants.items():
        if name not in MAIN:
            continue
        views, images, held = variant.inputs(crops), len(crops[0]), variant.shared.held()
        if variant.compiled:
            run(variant, views)

        def peak(count: int, variant: Variant = variant, views: list[Tensor] = views) -> int:
            return peak_bytes(lambda: run(variant, [x[:count] for x in views]), variant.shared.device)

        static = variant.compiled and not variant.ours  # compiled anew for each batch
        half = math.inf if static or images == 1 else peak(images // 2)
        whole = peak(images)
        found[name] = {"held_MB": held / 1e6, "peak_MB": (held + whole) / 1e6 if whole >= 0 else None}
        if half < whole:
            found[name]["MB_an_image"] = (whole - half) / (images - images // 2) / 1e6
    return found


def memory(problem: Problem, compiled: bool) -> dict[str, Row]:
    """`memory_of` a problem on the CPU."""
    torch.manual_seed(0)
    shared = Shared(problem, torch.device("cpu"))
    return memory_of(variants_of(problem, shared, compiled, ()), problem.crops(problem.images, shared.device))


def memory_apart(problem: Problem, compiled: bool) -> dict[str, Row]:
    """`memory` in a process of its own: resident memory depends on the allocator's past."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(memory, problem, compiled).result()


# What is written.


def reduced(rows: list[Row]) -> str:
    """What to say of sizes that are not the published ones; empty if they are."""
    for p in (row["problem"] for row in rows):
        if (list(p["sizes"]), p["local_crops"], p["out_dim"]) != PUBLISHED:
            big, small = p["sizes"]
            return (
                f" (REDUCED: crops of {big} and {small} pixels, {p['local_crops']} local, K = {p['out_dim']})"
            )
    return ""


def label(name: str, row: Row) -> str:
    """A variant's name in tables and plots."""
    return f"{name}, added" if name == "compile" and row["fastdino"] == "eager" else name


def shares(v: Row) -> Row:
    """Parts as shares of the time, per cent."""
    total = sum(v["parts"].values())
    return {part: 100 * v["parts"].get(part, 0.0) / total for part in PARTS}


def text(rows: list[Row]) -> str:
    """An overview, and tables for each network."""
    note, out, overview = reduced(rows), [], []
    named = [
        (Problem(**row["problem"]).name, row, {v["variant"]: v for v in row["variants"]}) for row in rows
    ]
    for _, row, of in named:
        rates = {n: of[n]["images_per_s"] for n in MAIN if n in of}
        head = {"images": row["problem"]["images"], "GFLOP an image": row["GFLOP_an_image"]}
        overview.append(head | rates | {"fastdino, times official": of["fastdino"]["times_official"]})
    networks = [{"network": name} for name, *_ in named]
    out.append(table(f"images/s of whole updates{note}", networks, "network", overview))
    for name, row, of in named:
        main = [of[n] for n in MAIN if n in of]
        cells = []
        for v in main:
            cell = {"precision": v["precision"], "images/s": v["images_per_s"]}
            cell |= {"times official": v["times_official"], "MFU": f"{v['use']:.0%}"}
            cell |= {"peak MB": v.get("peak_MB"), "MB an image": v.get("MB_an_image")}
            cell |= {"waits": v["off"].get("waits"), "gradients off": f"{v['off']['gradients']:.0e}"}
            cells.append(cell)
        title = f"{name}, {row['problem']['images']} images an update{note}"
        others, when = row["conditions"]["others_share_of_cores"], row["stamp"]["date"]
        rounds = of["official"]["images_per_s"]["rounds"]
        out.append(table(title, main, "variant", cells))
        out.append(f"{rounds} rounds; {others:.0%} of the cores were at other work; {when}\n")
        if without := [v for v in row["variants"] if v["variant"] not in MAIN]:
            cells = [
                {"images/s": v["images_per_s"], "time, of fastdino's": v["times_fastdino"]} for v in without
            ]
            lines = [{"fastdino without": label(v["variant"], row)} for v in without]
            out.append(table(f"{name}, an optimization taken away{note}", lines, "fastdino without", cells))
        if parts := [v for v in main if v["variant"] in ("official", "fastdino") and v.get("parts")]:
            cells = [{part: f"{x:.1f}%" for part, x in shares(v).items()} for v in parts]
            out.append(table(f"{name}, share of the time{note}", parts, "variant", cells))
    return "\n".join(out)


def plot(rows: list[Row], about: Row, out: Path) -> None:
    """throughput.png, memory.png, parts.png and optimizations.png."""
    figures: dict[str, Any] = {name: {} for name in ("throughput", "memory", "parts", "optimizations")}
    for row in rows:
        problem = Problem(**row["problem"])
        group = f"{problem.patch or ''} ({problem.images})".strip()
        for v in row["variants"]:
            found: Row = {"throughput": v["images_per_s"]} if v["variant"] in MAIN else {}
            found |= {"memory": v["peak_MB"] / 1e3} if v.get("peak_MB") else {}
            for figure, value in found.items():
                figures[figure].setdefault(problem.arch, {}).setdefault(group, {})[v["variant"]] = value
            if v["variant"] in ("official", "fastdino") and v.get("parts"):
                name = f"{v['variant']} {problem.patch or ''}"
                figures["parts"].setdefault(problem.arch, {})[name] = shares(v)
            if v["variant"] not in MAIN:
                extra = {"extra time": 100 * (v["times_fastdino"] - 1)}
                figures["optimizations"].setdefault(problem.name, {})[label(v["variant"], row)] = extra
    note = reduced(rows)
    draw = partial(bars, about=about)
    first = f"Whole DINO updates, by patch size (images an update); median, least and most{note}"
    draw(out / "throughput.png", first, figures["throughput"], "images/s", log=True)
    second = f"Peak memory of an update, by patch size (images){note}"
    draw(out / "memory.png", second, figures["memory"], "GB")
    draw(out / "parts.png", f"Where the time of an update goes{note}", figures["parts"], "%", stacked=True)
    title = f"Extra time of an update with one of fastdino's optimizations taken away{note}"
    draw(out / "optimizations.png", title, figures["optimizations"], "%; within 5 % is noise")


def problems_of(args: argparse.Namespace) -> list[Problem]:
    """The networks asked for; on a CPU the most expensive first, for its two rounds are due in any case."""
    gpu = args.device.startswith("cuda")
    target, most = (30e12, 64) if gpu else (0.25e12 if args.quick else 0.8e12, 8)
    found = []
    for arch in args.archs:
        for patch in args.patches if arch.startswith("vit") else [0]:
            rest = (args.global_size, args.local_size), args.local_crops, args.out_dim
            flops = model_flops(Problem(arch, patch, 1, *rest))
            images = args.images or max(1, min(most, 2 ** round(math.log2(target / flops))))
            found.append(Problem(arch, patch, max(images, 1 if patch else 2), *rest))
    return found if gpu else sorted(found, key=lambda p: -model_flops(p) * p.images)


def position(row: Row) -> tuple[int, str, int]:
    """Where a network stands in tables and plots: ViTs by size, then the others."""
    arch = row["problem"]["arch"]
    return (list(VITS).index(arch) if arch in VITS else len(VITS)), arch, -row["problem"]["patch"]


def stamp_of(about: Row) -> Row:
    """What must be the same for a network not to be measured again."""
    keys = ("device", "processor", "instruction_set", "torch", "python", "commit")
    stamp = {key: about[key] for key in keys}
    for package in ("timm", "lightly"):
        try:
            stamp[package] = version(package)
        except PackageNotFoundError:
            stamp[package] = "not installed"
    return stamp


def parse() -> argparse.Namespace:
    """The command's arguments."""
    arguments, gpu = parser(__doc__, "patch_size"), torch.cuda.is_available()
    add, few = arguments.add_argument, ["vit_small/16", "vit_small/8"]
    add("--archs", nargs="*", default=["vit_small", "vit_base", "vit_tiny", "resnet50"])
    add("--patches", type=int, nargs="*", default=[16, 8, 14, 5])
    add("--images", type=int, help="an update; default: by the network's FLOPs")
    add("--minutes", type=float, default=8 if gpu else 50, help="in all, about")
    add("--rounds", type=int, default=9, help="at most, of a network; two are due")
    add("--optimizations", nargs="*", default=["vit_tiny/16", *few], help="networks to take them away of")
    add("--without", nargs="*", default=OPTIMIZATIONS, metavar="NAME", help="only these optimizations")
    add("--compiled", nargs="*", default=few, help="networks of which official DINO is compiled, too")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add("--parts", type=int, default=5 if gpu else 2, help="updates to time part by part; 0: none")
    add("--global-size", type=int, default=224)
    add("--local-size", type=int, default=96)
    add("--local-crops", type=int, default=8)
    add("--out-dim", type=int, default=65536)
    add("--quick", action="store_true", help="reduced sizes, 9 minutes on two cores")
    add(
        "--profile",
        action="store_true",
        help="torch.profiler on official DINO's update and fastdino's instead",
    )
    add("--memory-only", action="store_true", help="on a CPU: anew, of the networks that results.json has")
    add("--plot-only", action="store_true", help="tables and plots anew, of results.json")
    if arguments.parse_known_args()[0].quick:
        arguments.set_defaults(archs=["vit_tiny", "vit_small", "resnet50"], global_size=112, local_size=48)
        arguments.set_defaults(out_dim=8192, minutes=8, compile=False)
        arguments.set_defaults(optimizations=["vit_tiny/16", "vit_tiny/8"])
    args = arguments.parse_args()
    if unknown := {*args.without} - {*OPTIMIZATIONS}:
        arguments.error(f"--without {', '.join(sorted(unknown))}: there are {', '.join(OPTIMIZATIONS)}")
    if args.memory_only and args.device.startswith("cuda"):
        arguments.error("--memory-only is for a CPU: on a GPU memory is measured with the rest")
    return args


def profile(args: argparse.Namespace) -> None:
    """A profile of each network's update in place of its time."""
    args.module = "profile"
    results = Results("Profile of whole updates", profiling.text, args)
    device = torch.device(args.device)
    for problem in problems_of(args):
        shared, crops = Shared(problem, device), problem.crops(problem.images, device)
        variants = variants_of(problem, shared, False, ())
        # on a CPU the published form in the same precision, for float32 against bfloat16 tells little
        published = variants.get("official, bfloat16", variants["official"])
        for name, variant in (("official", published), ("fastdino", variants["fastdino"])):
            update = partial(variant, variant.inputs(crops))
            row = profiling.profile_update(update, device, 5 if device.type == "cuda" else 2)
            variant.drop_gradients()
            what = f"{problem.name}, {problem.images} images"
            precision = str(variant.update.dtype).removeprefix("torch.")
            results.add([{"problem": what, "variant": name, "precision": precision} | row])


def memory_again(results: Results) -> None:
    """--memory-only: peaks anew, of the networks that results.json has."""
    stamp = stamp_of(results.about) | {"date": results.about["date"]}
    for row in results.rows:
        found = memory_apart(Problem(**row["problem"]), row["asked"]["compiled"])
        for v in row["variants"]:
            v |= {"MB_an_image": None, "peak_MB": None, "held_MB": None} | found.get(v["variant"], {})
        row["memory_stamp"] = stamp
        results.write(results.stored_about)
        print(f"{Problem(**row['problem']).name}: {[v['peak_MB'] for v in row['variants']]} MB", flush=True)


def measure(args: argparse.Namespace, results: Results) -> None:
    """Every network that results.json does not have."""
    began, gpu, device = time.monotonic(), args.device.startswith("cuda"), torch.device(args.device)
    names = ("float32", "bfloat16", "float16") if gpu else ("float32", "bfloat16")
    rates = {name: matmul_flops(getattr(torch, name), device) for name in names}
    stamp, about = stamp_of(results.about), results.about
    results.rows = [row for row in results.stored if row["stamp"].items() >= stamp.items()]
    if old := len(results.stored) - len(results.rows):
        print(f"{old} networks were measured at another commit or with other versions: they are left out")
    problems, skipped = problems_of(args), []
    for i, problem in enumerate(problems):

        def named(networks: list[str], problem: Problem = problem) -> bool:
            return problem.arch in networks or problem.name in networks

        without = list(args.without) if named(args.optimizations) else []
        asked = {"compiled": args.compile and named(args.compiled), "without": without}
        key = {"problem": json.loads(json.dumps(asdict(problem))), "asked": asked}
        if any(row.items() >= key.items() for row in results.rows):
            print(f"{problem.name}: measured already", flush=True)
            continue
        left = 60 * args.minutes - (time.monotonic() - began)
        if left < 0:
            skipped.append(problem.name)
            continue
        until = time.monotonic() + left / (len(problems) - i)
        # Blocks of all variants count together; past the limit they would run as they are, uncompiled.
        with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):
            row = bench(problem, key["asked"], rates, until, args)
        row |= {"asked": key["asked"], "stamp": stamp | {"date": about["date"]}}
        row["matmul_GFLOP_s"] = {name: rate / 1e9 for name, rate in rates.items()}
        kept = [r for r in results.rows if r["problem"] != key["problem"]]
        results.rows = sorted([*kept, json.loads(json.dumps(row))], key=position)
        results.title = TITLE + reduced(results.rows)
        results.write(about | stamp | results.conditions.describe())
        spent = (time.monotonic() - began) / 60
        print(f"{problem.name}: done; {spent:.1f} of {args.minutes:g} minutes, {len(problems) - i - 1} left")
        print(text([row]), flush=True)
        del row
        gc.collect()
        torch._dynamo.reset()
    if skipped:
        print(f"no time was left for {', '.join(skipped)}: the same command goes on with them")


def main() -> None:
    """See the module's docstring."""
    args = parse()
    if args.profile:
        profile(args)
        return
    results = Results(TITLE, text, args, continues=not args.plot_only)
    if args.plot_only or args.memory_only:
        results.rows, results.title = results.stored, TITLE + reduced(results.stored)
    if args.memory_only:
        memory_again(results)
    elif not args.plot_only:
        measure(args, results)
    if results.rows:
        results.write(results.stored_about if args.plot_only or args.memory_only else results.about)
        plot(results.rows, results.about, results.out)
        print(f"written to {results.out}")


if __name__ == "__main__":
    main()
