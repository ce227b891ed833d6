"""Times whole DINO updates by patch size: official DINO, lightly's parts, fastdino and its optimizations.

    python -m benchmarks.patch_size [--device cuda] [--minutes 50] [--quick] [--plot-only] [--out DIR]

An update is the forward passes of teacher and student, loss, backward pass, clipping, optimiser, moving
average and centre, on random images in memory: two global crops of 224 and eight local ones of 96 pixels an
image, 65536 prototypes, stochastic depth 0.1. Where a side is no multiple of the patch, the rest is left out.
benchmarks/README.md says what the variants are, how they are checked and how to read the tables. A network
that results.json has from the same device, versions, commit and arguments is not measured again.
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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import (
    Conditions,
    Results,
    Row,
    Timed,
    draw,
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
STAMP = ("device", "processor", "instruction_set", "torch", "python", "commit", "timm", "lightly")


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
    seconds, last = defaultdict[str, float](float), 0.0

    def mark(part: str) -> None:
        nonlocal last
        synchronize(variant.shared.device)
        now = time.perf_counter()
        seconds[part] += (now - last) / updates
        last = now

    with variant.watched(mark):
        for _ in range(updates):
            last = time.perf_counter()
            variant(views)
    variant.drop_gradients()
    return dict(seconds)


def bench(problem: Problem, asked: Row, rates: Row, until: float, args: argparse.Namespace) -> Row:
    """All of a problem; rounds, of which two are due, as long as there is time."""
    conditions, began, device = Conditions(), time.monotonic(), torch.device(args.device)
    gpu, peaks = device.type == "cuda", memory_apart(problem, asked["compiled"], args.device)
    torch.manual_seed(0)
    shared, crops = Shared(problem, device), problem.crops(problem.images, device)
    variants = variants_of(problem, shared, asked["compiled"], tuple(asked["without"]))
    checked = check(variants, crops)
    timed: Timed = {}
    views = {name: variant.inputs(crops) for name, variant in variants.items()}
    for name, variant in variants.items():
        if variant.compiled or gpu:
            run(variant, views[name])  # the check ran without stochastic depth
        on_end = max(1, min(20, round(0.5 / run(variant, views[name])))) if gpu else 1
        timed[name] = partial(run, variant, views[name], on_end)
    print(f"{problem.name}: checked and warm after {time.monotonic() - began:.0f} s", flush=True)
    left = until - time.monotonic()
    times = interleave(timed, lambda call: call(), left, args.rounds, warm=0, due=min(2, args.rounds))
    rows, flops = [], model_flops(problem)
    for name, variant in variants.items():
        row: Row = {"variant": name, "precision": variant.precision, "off": checked[name]}
        row |= peaks.get(name, {}) | {"images_per_s": spread([problem.images / t for t in times[name]])}
        row["use"] = flops * problem.images / statistics.median(times[name]) / rates[variant.precision]
        row["times_official"] = ratio(times, "official", name)
        row["times_fastdino"] = ratio(times, name, "fastdino")
        if args.parts and name in ("official", "fastdino"):
            row["parts"] = parts_of(variant, views[name], args.parts)
        rows.append(row)
    found: Row = {"problem": asdict(problem), "GFLOP_an_image": flops / 1e9, "variants": rows}
    found["fastdino"] = "compiled" if variants["fastdino"].compiled else "eager"
    return found | {"seconds": time.monotonic() - began, "conditions": conditions.describe()}


def memory(problem: Problem, compiled: bool, device: str) -> dict[str, Row]:
    """Of the main variants: an update's peak, and the part of it that goes with an image."""
    torch.manual_seed(0)
    shared, found = Shared(problem, torch.device(device)), dict[str, Row]()
    crops, images, held = problem.crops(problem.images, shared.device), problem.images, shared.held()
    for name, variant in variants_of(problem, shared, compiled, ()).items():
        views = variant.inputs(crops)
        if variant.compiled:
            run(variant, views)

        def peak(count: int, variant: Variant = variant, views: list[Tensor] = views) -> int:
            return peak_bytes(lambda: run(variant, [x[:count] for x in views]), shared.device)

        static = variant.compiled and not variant.ours  # compiled anew for each batch
        half = math.inf if static or images == 1 else peak(images // 2)
        whole = peak(images)
        found[name] = {"held_MB": held / 1e6, "peak_MB": (held + whole) / 1e6 if whole >= 0 else None}
        if half < whole:
            found[name]["MB_an_image"] = (whole - half) / (images - images // 2) / 1e6
    return found


def memory_apart(*args: Any) -> dict[str, Row]:
    """`memory` in a process of its own: resident memory depends on the allocator's past."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(memory, *args).result()


# What is written.


def title(rows: list[Row], of: str = TITLE) -> str:
    """With the sizes, where they are not the published ones."""
    for p in (row["problem"] for row in rows):
        (big, small), local, out_dim = p["sizes"], p["local_crops"], p["out_dim"]
        if (big, small, local, out_dim) != (224, 96, 8, 65536):
            return f"{of} (REDUCED: crops of {big} and {small} pixels, {local} local, K = {out_dim})"
    return of


def label(name: str, row: Row) -> str:
    """A variant's name in tables and plots."""
    return f"{name}, added" if name == "compile" and row["fastdino"] == "eager" else name


def shares(v: Row) -> Row:
    """Parts as shares of the time, per cent."""
    total = sum(v["parts"].values())
    return {part: 100 * v["parts"].get(part, 0.0) / total for part in PARTS}


def text(rows: list[Row]) -> str:
    """An overview, and tables for each network."""
    named = [(Problem(**r["problem"]), r, {v["variant"]: v for v in r["variants"]}) for r in rows]
    lines = []
    for problem, row, of in named:
        cells = {"images": problem.images, "GFLOP an image": row["GFLOP_an_image"]}
        cells |= {n: of[n]["images_per_s"] for n in MAIN if n in of}
        lines.append((problem.name, cells | {"fastdino, times official": of["fastdino"]["times_official"]}))
    out = [table(title(rows, "images/s of whole updates"), "network", lines)]
    for problem, row, of in named:
        main, lines = [of[n] for n in MAIN if n in of], []
        for v in main:
            cells = {"precision": v["precision"], "images/s": v["images_per_s"]}
            cells |= {"times official": v["times_official"], "MFU": f"{v['use']:.0%}"}
            cells |= {"peak MB": v.get("peak_MB"), "MB an image": v.get("MB_an_image")}
            cells |= {"waits": v["off"].get("waits"), "gradients off": f"{v['off']['gradients']:.0e}"}
            lines.append((v["variant"], cells))
        out.append(table(title(rows, f"{problem.name}, {problem.images} images an update"), "variant", lines))
        others, when = row["conditions"]["others_share_of_cores"], row["stamp"]["date"]
        rounds = of["official"]["images_per_s"]["rounds"]
        out.append(f"{rounds} rounds; {others:.0%} of the cores were at other work; {when}\n")
        lines = [
            (label(n, row), {"images/s": v["images_per_s"], "time, of fastdino's": v["times_fastdino"]})
            for n, v in of.items()
            if n not in MAIN
        ]
        if lines:
            what = title(rows, f"{problem.name}, an optimization taken away")
            out.append(table(what, "fastdino without", lines))
        timed = [v for v in main if v["variant"] in ("official", "fastdino") and v.get("parts")]
        lines = [(v["variant"], {part: f"{x:.1f}%" for part, x in shares(v).items()}) for v in timed]
        if lines:
            out.append(table(title(rows, f"{problem.name}, share of the time"), "variant", lines))
    return "\n".join(out)


def plot(rows: list[Row], about: Row, out: Path) -> None:
    """throughput.png, memory.png, parts.png and optimizations.png."""
    rate, peak, parts, extra = (defaultdict[str, Row](lambda: defaultdict(dict)) for _ in range(4))
    for row in rows:
        problem = Problem(**row["problem"])
        group = f"{problem.patch or ''} ({problem.images})".strip()
        for v in row["variants"]:
            name = v["variant"]
            if name in MAIN:
                rate[problem.arch][group][name] = v["images_per_s"]
            else:
                extra[problem.name][label(name, row)] = {"extra time": 100 * (v["times_fastdino"] - 1)}
            if v.get("peak_MB"):
                peak[problem.arch][group][name] = v["peak_MB"] / 1e3
            if name in ("official", "fastdino") and v.get("parts"):
                parts[problem.arch][f"{name} {problem.patch or ''}"] = shares(v)
    figures: list[tuple[str, str, Row, str, Row]] = [
        ("throughput", "Images/s of an update, by patch size (images)", rate, "images/s", {"log": True}),
        ("memory", "Peak memory of an update, by patch size (images)", peak, "GB", {}),
        ("parts", "Where the time of an update goes", parts, "%", {"stacked": True}),
        ("optimizations", "Extra time of an update without an optimization", extra, "%; 5 % is noise", {}),
    ]
    for file, what, panels, unit, options in figures:
        draw(out / f"{file}.png", title(rows, what), panels, unit, about, **options)


# The commands.


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


def measure(args: argparse.Namespace, results: Results) -> None:
    """Every network that results.json does not have."""
    began, device, about = time.monotonic(), torch.device(args.device), results.about
    names = ("float32", "bfloat16", "float16") if device.type == "cuda" else ("float32", "bfloat16")
    rates = {name: matmul_flops(getattr(torch, name), device) for name in names}
    stamp = {key: about.get(key) for key in STAMP}
    results.rows = [row for row in results.stored if row["stamp"].items() >= stamp.items()]
    if old := len(results.stored) - len(results.rows):
        print(f"{old} networks were measured at another commit or with other versions: they are left out")
    problems = problems_of(args)
    for i, problem in enumerate(problems):
        compiled, taken = ({problem.arch, problem.name} & {*x} for x in (args.compiled, args.optimizations))
        asked = {"compiled": bool(args.compile and compiled), "without": list(args.without) if taken else []}
        key = {"problem": json.loads(json.dumps(asdict(problem))), "asked": asked}
        left = 60 * args.minutes - (time.monotonic() - began)
        if any(row.items() >= key.items() for row in results.rows):
            print(f"{problem.name}: measured already", flush=True)
            continue
        if left < 0:
            print(f"{problem.name}: no time was left for it: the same command goes on with it", flush=True)
            continue
        until = time.monotonic() + left / (len(problems) - i)
        # Blocks of all variants count together; past the limit they would run as they are, uncompiled.
        with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):
            row = bench(problem, asked, rates, until, args)
        row |= {"asked": asked, "stamp": stamp | {"date": about["date"]}}
        row["matmul_GFLOP_s"] = {name: rate / 1e9 for name, rate in rates.items()}
        kept = [r for r in results.rows if r["problem"] != key["problem"]]
        results.rows = sorted([*kept, json.loads(json.dumps(row))], key=position)
        results.title = title(results.rows)
        results.write(about | results.conditions.describe())
        spent = (time.monotonic() - began) / 60
        print(f"{problem.name}: done; {spent:.1f} of {args.minutes:g} minutes, {len(problems) - i - 1} left")
        print(text([row]), flush=True)
        del row
        gc.collect()
        torch._dynamo.reset()


def memory_again(args: argparse.Namespace, results: Results) -> None:
    """--memory-only: peaks anew, of the networks that results.json has."""
    stamp = {key: results.about.get(key) for key in (*STAMP, "date")}
    for row in results.rows:
        problem = Problem(**row["problem"])
        found = memory_apart(problem, row["asked"]["compiled"], args.device)
        for v in row["variants"]:
            v |= {"MB_an_image": None, "peak_MB": None, "held_MB": None} | found.get(v["variant"], {})
        row["memory_stamp"] = stamp
        results.write(results.stored_about)
        print(f"{problem.name}: {[v['peak_MB'] for v in row['variants']]} MB", flush=True)


def profile(args: argparse.Namespace) -> None:
    """--profile: the 25 kernels, on a CPU operators, that take most of each network's update, and a trace."""
    args.module, device, gpu = "profile", torch.device(args.device), args.device.startswith("cuda")
    results, updates = Results("Profile of whole updates", slowest, args), 5 if gpu else 2
    for problem in problems_of(args):
        shared, crops = Shared(problem, device), problem.crops(problem.images, device)
        variants = variants_of(problem, shared, False, ())
        # on a CPU the published form in the same precision, for float32 against bfloat16 tells little
        variants["official"] = variants.get("official, bfloat16", variants["official"])
        for name in ("official", "fastdino"):
            variant, views = variants[name], variants[name].inputs(crops)
            run(variant, views, 2)
            with torch.profiler.profile() as profiled:
                run(variant, views, updates)
            events = [e for e in profiled.key_averages() if gpu == (e.device_type.name != "CPU")]
            most = {}
            for e in (e for e in events if not e.is_user_annotation):
                ms = e.self_device_time_total if gpu else e.self_cpu_time_total
                most[e.key] = [ms / 1e3 / updates, e.count / updates]
            what = {"problem": problem.name, "images": problem.images, "variant": name}
            row = what | {"precision": variant.precision, "ms": sum(ms for ms, _ in most.values())}
            results.add([row | {"most": dict(sorted(most.items(), key=lambda item: -item[1][0])[:25])}])
            trace = f"{problem.name}-{name}.json.gz".replace("/", "-")
            profiled.export_chrome_trace(str(results.out / trace))


def slowest(rows: list[Row]) -> str:
    """A table of each profile."""
    out = []
    for r in rows:
        what = f"{r['problem']}, {r['images']} images, {r['variant']}, {r['precision']}"
        lines = [
            (f"`{name[:90]}`", {"ms": ms, "share": f"{ms / r['ms']:.1%}", "calls": calls})
            for name, (ms, calls) in r["most"].items()
        ]
        out.append(table(f"{what}: {r['ms']:.1f} ms an update", "most time in", lines))
    return "\n".join(out)


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
    add("--without", nargs="*", choices=OPTIMIZATIONS, default=OPTIMIZATIONS, help="only these optimizations")
    add("--compiled", nargs="*", default=few, help="networks of which official DINO is compiled, too")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add("--parts", type=int, default=5 if gpu else 2, help="updates to time part by part; 0: none")
    add("--global-size", type=int, default=224)
    add("--local-size", type=int, default=96)
    add("--local-crops", type=int, default=8)
    add("--out-dim", type=int, default=65536)
    add("--quick", action="store_true", help="reduced sizes, 9 minutes on two cores")
    add("--profile", action="store_true", help="instead: torch.profiler on official DINO's and our updates")
    add("--memory-only", action="store_true", help="memory anew, of the networks that results.json has")
    add("--plot-only", action="store_true", help="tables and plots anew, of results.json")
    if arguments.parse_known_args()[0].quick:
        arguments.set_defaults(archs=["vit_tiny", "vit_small", "resnet50"], global_size=112, local_size=48)
        arguments.set_defaults(out_dim=8192, minutes=8, compile=False)
        arguments.set_defaults(optimizations=["vit_tiny/16", "vit_tiny/8"])
    return arguments.parse_args()


def main() -> None:
    """See the module's docstring."""
    args = parse()
    if args.profile:
        return profile(args)
    again = args.plot_only or args.memory_only
    results = Results(TITLE, text, args, continues=not args.plot_only)
    if again:
        results.rows, results.title = results.stored, title(results.stored)
    if args.memory_only:
        memory_again(args, results)
    elif not args.plot_only:
        measure(args, results)
    if results.rows:
        results.write(results.stored_about if again else results.about)
        plot(results.rows, results.about, results.out)
        print(f"written to {results.out}")


if __name__ == "__main__":
    main()
