"""Times whole DINO updates against patch size: official DINO, lightly's parts, fastdino, and what brings it.

    python -m benchmarks.patch_size [--device cuda] [--minutes 50] [--quick] [--plot-only] [--out DIR]

An update is the forward passes of teacher and student, loss, backward pass, clipping, optimiser, moving
average and centre, on random images in memory: two global crops of 224 and eight local ones of 96 pixels an
image, 65536 prototypes, stochastic depth 0.1 in the student. Where a side is no multiple of the patch, all
leave out the rest: at patch 14 a crop of 96 pixels has 6 x 6 patches, at 5 it has 19 x 19.

    official            the published algorithm, from its formulas: softmax(q k^T) v written out, a pass for
                        each size of crop, 18 cross-entropies one by one, each tensor clipped with two waits
                        for the device, the moving average tensor by tensor, torch's AdamW as it comes; fp16
                        autocast with loss scaling on a GPU, float32 on a CPU
    official, compiled  the same, networks and loss under torch.compile
    official, bfloat16  on a CPU: the same under autocast, not compiled
    lightly             its DINOLoss, DINOProjectionHead and update_momentum on timm's ViT (or torchvision's
                        ResNet), a pass for each size, gradients clipped by their common norm; precision as
                        official
    fastdino            fastdino-train's own update with its defaults for the device

and fastdino with one of its means taken away: `fused loss` (official's 18 terms instead), `fused EMA` (a
loop), `packing` (a pass for each size), `attention kernel` (weights written out; in bfloat16 on a CPU up to
256 tokens they are so as it is), `compile` (off; on a CPU, where it is off by default, it is added), `half
precision` (float32), `no syncs` (official's clipping and loss.item()), `fused optimiser` (torch's as it
comes), `skipped work` (samples that stochastic depth drops are multiplied by 0, the last block computes all
tokens), `all of these` (on a CPU without compile), and `loader` (official's transform and DataLoader).

Nothing is timed unless every variant gives the loss, gradients and centre of official DINO in float32, from
the same weights and images without stochastic depth, and its clipping, optimiser and moving average do what
their formulas say (benchmarks/update.py; in half precision within twice official DINO's own error there;
lightly on timm's ViT for the global crops alone, since timm resizes position embeddings otherwise).

images/s     median of the rounds, least and most; in a round every variant has a turn, in a new order. Ratios
             are medians of the rounds' own. On a CPU with the default allocator, as fastdino-train has it
peak MB      what an update holds at its highest: tensors of student and teacher and the optimiser's state,
             counted, and what comes on top within the update, measured (on a CPU: resident memory, in a
             process of the problem's own, after the allocator gave back what it kept). The images are left
             out. MB an image: less that of half as many images, divided; nothing is extrapolated. Largest
             batch: on a GPU, with --largest-batch
MFU          model FLOPs (whole networks and heads, 3 forwards for the student and 1 for the teacher,
             whatever a variant leaves out) a second, by those of the best matrix product of the run in that
             precision
share        time between the ends of the parts; on a CPU of the rounds themselves, on a GPU of updates of
             their own, with a wait for the device after each part
with loader  the same updates fed from JPEGs, each by its own loader, once its workers are under way

A problem that results.json has from the same device, versions, commit and arguments is not measured again.
"""

import argparse
import gc
import json
import math
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.measure import Clock, Conditions, Row, folder, machine, peak_bytes, write
from benchmarks.step import matmul_flops
from benchmarks.update import (
    MEANS,
    PARTS,
    Mark,
    Official,
    Problem,
    Shared,
    check,
    model_flops,
    synchronize,
    variants_of,
)
from fastdino import data
from fastdino.backbones import VITS

TITLE = "Whole updates and patch size"
MAIN = ("official", "official, compiled", "official, bfloat16", "lightly", "fastdino")
TAKEN = (*MEANS, "all of these")
PUBLISHED = ([224, 96], 8, 65536)
NOISE = 5  # per cent by which rounds of one variant differ
FED = 3.0  # seconds of a round with a loader


class Parts:
    """Seconds of each part of updates."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.last = device, Counter[str](), 0.0

    def __call__(self, part: str) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now


def nothing(part: str) -> None:
    """The mark of who does not ask for parts."""


def run(variant: Any, crops: list[Tensor], times: int = 1, mark: Mark = nothing) -> float:
    """Seconds of an update, of so many on end; leaves no gradients."""
    synchronize(crops[0].device)
    began = time.perf_counter()
    if isinstance(mark, Parts):
        mark.last = began
    for _ in range(times):
        variant(crops, mark)
    synchronize(crops[0].device)
    seconds = (time.perf_counter() - began) / times
    variant.its.drop_gradients()
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    middle = statistics.median(values)
    return {"median": middle, "low": min(values), "high": max(values), "rounds": len(values)}


def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def bench(problem: Problem, asked: Row, device: torch.device, rates: Row, until: float, args: Any) -> Row:
    """All of a problem; rounds, of which two are due, as long as there is time."""
    conditions, began = Conditions(), time.monotonic()
    apart = memory_apart(problem, asked["compiled"]) if device.type == "cpu" else {}
    torch.manual_seed(0)
    its, crops = Shared(problem, device), problem.crops(problem.images, device)
    variants = variants_of(problem, its, asked["compiled"], asked["means"])
    checked = check(variants, crops)
    gpu = device.type == "cuda"
    times: dict[str, list[float]] = {name: [] for name in variants}
    parts = {name: Parts(device) for name in variants}
    on_end = dict.fromkeys(variants, 1)

    for name, variant in variants.items():
        if variant.compiled or gpu:
            run(variant, crops)  # the check ran without stochastic depth
        if gpu:
            on_end[name] = max(1, min(20, round(0.5 / run(variant, crops))))
    peaks = memory_of(variants, crops) if gpu else apart
    print(f"{problem.name}: checked and warm after {time.monotonic() - began:.0f} s", flush=True)
    for done in range(args.rounds):
        started = time.monotonic()
        # in another order each time: who comes after whom costs, or saves, some per cent
        for name, variant in random.Random(done).sample([*variants.items()], len(variants)):
            times[name].append(run(variant, crops, on_end[name], nothing if gpu else parts[name]))
        now = time.monotonic()
        if done >= 1 and now + (now - started) > until:
            break
    rows = []
    for name, variant in variants.items():
        if gpu and name in ("official", "fastdino"):
            run(variant, crops, 5, parts[name])
        count = 5 if gpu else len(times[name])
        dtype = str(variant.dtype).removeprefix("torch.")
        rate = model_flops(problem) * problem.images / statistics.median(times[name])
        row: Row = {"variant": name, "precision": dtype, "off": checked[name], **peaks.get(name, {})}
        row |= {"images_per_s": spread([problem.images / t for t in times[name]])}
        row |= {"times_official": ratio(times, "official", name)}
        row |= {"times_fastdino": ratio(times, name, "fastdino"), "use": rate / rates[dtype]}
        if asked["largest"] and name in MAIN and not (variant.compiled and isinstance(variant, Official)):
            row["largest_batch"] = largest(fits(variant, problem, device), problem.images)
        rows.append(row | {"parts": {part: s / count for part, s in parts[name].seconds.items()}})
    found: Row = {"problem": asdict(problem), "GFLOP_an_image": model_flops(problem) / 1e9, "variants": rows}
    found["fastdino"] = "compiled" if variants["fastdino"].compiled else "eager"
    if asked["loader"]:
        found["loader"] = bench_loader(problem, variants, device, args.workers, 3)
    return found | {"seconds": time.monotonic() - began, "conditions": conditions.describe()}


def memory_of(variants: dict[str, Any], crops: list[Tensor]) -> dict[str, Row]:
    """Of the main variants: what an update holds at its highest, and how much of it goes with an image."""
    found: dict[str, Row] = {}
    for name, variant in variants.items():
        if name not in MAIN:
            continue
        if variant.compiled:
            run(variant, crops)
        images, held = len(crops[0]), variant.its.held(variant.optimizer)
        static = variant.compiled and isinstance(variant, Official)  # compiled anew for each batch

        def peak(count: int, variant: Any = variant) -> int:
            some = [x[:count] for x in crops]
            return peak_bytes(lambda: run(variant, some), crops[0].device, warm=False)

        half = math.inf if static or images == 1 else peak(images // 2)
        whole = peak(images)
        found[name] = {"held_MB": held / 1e6, "peak_MB": (held + whole) / 1e6 if whole >= 0 else None}
        if half < whole:
            found[name]["MB_an_image"] = (whole - half) / (images - images // 2) / 1e6
    return found


def memory(problem: Problem, compiled: bool) -> dict[str, Row]:
    """`memory_of` a problem on the CPU."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    its = Shared(problem, device)
    its.make_state()
    return memory_of(variants_of(problem, its, compiled, means=False), problem.crops(problem.images, device))


def memory_apart(problem: Problem, compiled: bool) -> dict[str, Row]:
    """`memory` in a process of its own: what is resident depends on what the allocator has been through."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(memory, problem, compiled).result()


def largest(fits: Callable[[int], bool], images: int, most: int = 8192) -> int:
    """Images that fit: doubled as long as they do, then to an eighth of that; 0 if `images` do not."""
    if not fits(images):
        return 0
    while 2 * images <= most and fits(2 * images):
        images *= 2
    step = images // 2
    for _ in range(3):
        if step and images + step <= most and fits(images + step):
            images += step
        step //= 2
    return images


def fits(variant: Any, problem: Problem, device: torch.device) -> Callable[[int], bool]:
    def one(images: int) -> bool:
        try:
            run(variant, problem.crops(images, device))
        except torch.OutOfMemoryError:
            return False
        finally:
            variant.its.drop_gradients()
            gc.collect()
            torch.cuda.empty_cache()
        return True

    return one


def bench_loader(
    problem: Problem, variants: Row, device: torch.device, workers: int | None, rounds: int
) -> list[Row]:
    """Updates fed from JPEGs; the last row is fastdino's update with official DINO's loader."""
    from benchmarks import data as loaders
    from benchmarks import photos

    images = problem.images
    policy = problem.config().data.crops
    workers = data.choose_workers(images) if workers is None else workers
    instead = mock.patch.multiple(loaders, POLICY=policy, SIZES=problem.sides)
    with tempfile.TemporaryDirectory() as scratch, instead:
        where = Path(scratch, "photos")
        photos.make(where, max(64, 2 * images))
        source = data.open_source(str(where))
        ways = {way.name: way for way in loaders.ways_of(where, source, device)[0]}
        kind, _ = data.choose_loader("auto", device)
        own = {"official": "official DINO", "lightly": "lightly"}
        own["fastdino"] = "fastdino, DALI" if kind == "dali" else "fastdino"
        if problem.sizes != (224, 96):
            del own["lightly"]  # whose transform there has its own sizes
        feeds = [(name, name, way) for name, way in own.items() if name in variants and way in ways]
        feeds.append(("loader", "fastdino", "official DINO"))
        times, waits = ({name: list[float]() for name, _, _ in feeds} for _ in range(2))
        loaders.check([ways[way] for way in own.values() if way in ways], source, device, min(16, images))

        def feed(variant: Any, way: Any, count: int) -> tuple[float, float]:
            """Seconds of an update and its images, and the share of them waited for images."""
            first = 2 * workers + 1  # what the workers have made ahead
            batches = iter(way.open(images, workers, first + count))
            waited = 0.0
            for i in range(first + count):
                if i == first:
                    synchronize(device)
                    began, waited = time.perf_counter(), 0.0
                at = time.perf_counter()
                views = loaders.finish(way.views(next(batches)), device)
                waited += time.perf_counter() - at
                if i + 1 >= first:
                    variant(views, nothing)
            synchronize(device)
            seconds = time.perf_counter() - began
            variant.its.drop_gradients()
            return seconds / count, waited / seconds

        for done in range(rounds):
            for name, variant, way in random.Random(done).sample(feeds, len(feeds)):
                count = max(4, min(50, round(FED / run(variants[variant], problem.crops(images, device)))))
                seconds, waited = feed(variants[variant], ways[way], count)
                times[name].append(seconds)
                waits[name].append(waited)
                gc.collect()  # its workers end
    return [
        {"variant": name, "workers": workers, "images_per_s": spread([images / t for t in its])}
        | {"times_official": ratio(times, "official", name), "waiting": statistics.median(waits[name])}
        for name, its in times.items()
    ]


# What is written.


def name_of(row: Row) -> str:
    return Problem(**row["problem"]).name


def reduced(rows: list[Row]) -> str:
    """What to say of sizes that are not the published ones; empty if they are."""
    for p in (row["problem"] for row in rows):
        if (list(p["sizes"]), p["local_crops"], p["out_dim"]) != PUBLISHED:
            big, small = p["sizes"]
            return f"REDUCED: crops of {big} and {small} pixels, {p['local_crops']} local, K = {p['out_dim']}"
    return ""


def label(name: str, row: Row) -> str:
    return f"{name}, added" if name == "compile" and row["fastdino"] == "eager" else name


def between(x: Row) -> str:
    digits = max(0, 2 - math.floor(math.log10(x["median"])))
    return f"{x['median']:.{digits}f} ({x['low']:.{digits}f}-{x['high']:.{digits}f})"


def block(title: str, heads: list[str], lines: list[list[str]]) -> list[str]:
    out = ["", f"**{title}**", "", "| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    return out + ["| " + " | ".join(line) + " |" for line in lines]


def table(rows: list[Row]) -> str:
    note = reduced(rows)
    note = f" ({note})" if note else ""
    names = [n for n in MAIN if any(v["variant"] == n for row in rows for v in row["variants"])]
    overview = []
    for row in rows:
        its = {v["variant"]: v for v in row["variants"]}
        cells = [between(its[n]["images_per_s"]) if n in its else "-" for n in names]
        head = [name_of(row), str(row["problem"]["images"]), f"{row['GFLOP_an_image']:.0f}"]
        overview.append([*head, *cells, f"{its['fastdino']['times_official']:.2f}"])
    heads = ["network", "images", "GFLOP an image", *names, "fastdino, times official"]
    out = block(f"images/s of whole updates{note}", heads, overview)
    for row in rows:
        problem, its = row["problem"], {v["variant"]: v for v in row["variants"]}
        others, when = row["conditions"]["others_share_of_cores"], row["stamp"]["date"]
        title = f"{name_of(row)}, {problem['images']} images an update{note}"
        lines = []
        for v in (its[n] for n in MAIN if n in its):
            optional = [v.get("peak_MB"), v.get("MB_an_image"), v.get("largest_batch")]
            cells = [v["variant"], v["precision"], between(v["images_per_s"]), f"{v['times_official']:.2f}"]
            cells += [f"{v['use']:.0%}", *("-" if x is None else f"{x:.0f}" for x in optional)]
            lines.append([*cells, f"{v['off']['gradients']:.0e}"])
        heads = ["variant", "precision", "images/s", "times official", "MFU", "peak MB", "MB an image"]
        out += block(title, [*heads, "largest batch", "gradients off"], lines)
        rounds = its["official"]["images_per_s"]["rounds"]
        out += ["", f"{rounds} rounds; {others:.0%} of the cores were at other work; {when}"]
        if taken := [its[n] for n in TAKEN if n in its]:
            lines = [
                [label(v["variant"], row), between(v["images_per_s"]), f"{v['times_fastdino']:.3f}"]
                for v in taken
            ]
            heads = ["fastdino without", "images/s", "time, of fastdino's"]
            out += block(f"{name_of(row)}, a means taken away{note}", heads, lines)
        lines = []
        for v in (its[n] for n in ("official", "fastdino")):
            total = sum(v["parts"].values())
            lines.append([v["variant"], *(f"{v['parts'].get(p, 0) / total:.1%}" for p in PARTS)])
        out += block(f"{name_of(row)}, share of the time{note}", ["variant", *PARTS], lines)
        if its := row.get("loader"):
            title = f"{name_of(row)}, with its own loader, {its[0]['workers']} worker processes{note}"
            lines = [
                [
                    "fastdino with official's" if v["variant"] == "loader" else v["variant"],
                    *(between(v["images_per_s"]), f"{v['times_official']:.2f}", f"{v['waiting']:.1%}"),
                ]
                for v in its
            ]
            out += block(title, ["variant", "images/s", "times official", "waiting for images"], lines)
    return "\n".join(out) + "\n"


def plot(rows: list[Row], about: Row, out: Path) -> None:
    """throughput.png, memory.png, parts.png and means.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    archs = list(dict.fromkeys(row["problem"]["arch"] for row in rows))
    below = f"{about['device']}, torch {about['torch']}, commit {about['commit']}, {about['date'][:10]}"
    note = f"\n{note}" if (note := reduced(rows)) else ""
    by = {(row["problem"]["arch"], row["problem"]["patch"]): row for row in rows}
    of = {key: {v["variant"]: v for v in row["variants"]} for key, row in by.items()}
    names = [n for n in MAIN if any(n in its for its in of.values())]
    look = dict(zip(MAIN, ("tab:blue", "tab:cyan", "tab:purple", "tab:green", "tab:orange"), strict=True))

    def save(figure: Any, name: str) -> None:
        figure.supxlabel(below, fontsize="small", color="grey")
        figure.savefig(out / name, dpi=120)
        plt.close(figure)

    def against_patch(
        title: str, unit: str, value: Callable[[Row], tuple[float, float, float]], log: bool
    ) -> Any:
        width = [3 if any(key == (a, 0) for key in of) else 4 for a in archs]
        figure, axes = plt.subplots(
            1,
            len(archs),
            figsize=(sum(width) + 2, 4.6),
            squeeze=False,
            width_ratios=width,
            layout="constrained",
        )
        for axis, arch in zip(axes[0], archs, strict=True):
            patches = sorted(patch for a, patch in of if a == arch)
            for i, name in enumerate(names):
                shown = [p for p in patches if name in of[arch, p] and value(of[arch, p][name])[0] > 0]
                if not shown:
                    continue
                points = [value(of[arch, p][name]) for p in shown]
                middle = [m for m, _, _ in points]
                error = [[m - low for m, low, _ in points], [high - m for m, _, high in points]]
                at = [p or i for p in shown]
                axis.errorbar(at, middle, error, marker="o", capsize=3, color=look[name], label=name)
            axis.set_title(arch)
            images = [f"{p or ''}\n({by[arch, p]['problem']['images']})".strip() for p in patches]
            if patches == [0]:
                axis.set_xlim(-1, len(names))
                axis.set_xticks([(len(names) - 1) / 2], images)
            else:
                axis.set_xscale("log")
                axis.set_xticks(patches, images)
                axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            axis.set_xlabel("patch size (images an update)" if patches != [0] else "(images an update)")
            if log:
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:g}"))
                axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
                axis.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            else:
                axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel(unit)
        figure.suptitle(title + note)
        lines = {n: h for a in axes[0] for h, n in zip(*a.get_legend_handles_labels(), strict=True)}
        shown = [n for n in names if n in lines]
        figure.legend([lines[n] for n in shown], shown, loc="outside right center")
        return figure

    def rate(v: Row) -> tuple[float, float, float]:
        return v["images_per_s"]["median"], v["images_per_s"]["low"], v["images_per_s"]["high"]

    def peak(v: Row) -> tuple[float, float, float]:
        return ((v.get("peak_MB") or 0) / 1e3,) * 3

    save(
        against_patch("Whole DINO updates (median, least and most)", "images/s", rate, True), "throughput.png"
    )
    save(against_patch("Peak memory of an update of the images in brackets", "GB", peak, False), "memory.png")

    figure, axes = plt.subplots(
        1, len(archs), figsize=(4.2 * len(archs) + 2, 4.8), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, arch in zip(axes[0], archs, strict=True):
        bars = [
            (p, n)
            for p in sorted((p for a, p in of if a == arch), reverse=True)
            for n in ("official", "fastdino")
        ]
        bottom = [0.0] * len(bars)
        for part, colour in zip(PARTS, plt.get_cmap("Set2").colors, strict=False):  # type: ignore[attr-defined]
            parts = [of[arch, p][n]["parts"] for p, n in bars]
            heights = [100 * its.get(part, 0) / sum(its.values()) for its in parts]
            axis.bar(range(len(bars)), heights, bottom=bottom, color=colour, label=part)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        axis.set_xticks(range(len(bars)), [f"{n} {p or ''}" for p, n in bars], rotation=60, ha="right")
        axis.set_title(arch)
    axes[0][0].set_ylabel("% of the time of an update")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", reverse=True)
    figure.suptitle(f"Where the time of an update goes{note}")
    save(figure, "parts.png")

    studied = [key for key, its in of.items() if any(n in its for n in TAKEN)]
    if not studied:
        return
    columns = min(4, len(studied))
    lines = math.ceil(len(studied) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.4 * columns + 1.5, 3 * lines + 0.6), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(studied) :]:
        axis.axis("off")
    for i, (axis, key) in enumerate(zip(axes.flat, studied, strict=False)):
        slower = [round(100 * (of[key][n]["times_fastdino"] - 1)) if n in of[key] else 0 for n in TAKEN]
        means = [label(n, by[key]) for n in TAKEN]
        colours = [
            "tab:blue" if "added" in mean else "tab:orange" if x > NOISE else "tab:grey"
            for mean, x in zip(means, slower, strict=True)
        ]
        drawn = axis.barh(range(len(TAKEN)), slower, color=colours)
        # compile is left out where it is not asked for, the others where the device has no use for them
        absent = {n: "not measured" if n == "compile" else "the same here" for n in TAKEN if n not in of[key]}
        labels = [absent.get(n, f"{x:+d} %") for n, x in zip(TAKEN, slower, strict=True)]
        axis.bar_label(drawn, labels, padding=2, fontsize="small")
        axis.set_yticks(range(len(TAKEN)), means if i % columns == 0 else [""] * len(TAKEN))
        axis.margins(x=0.25)
        axis.invert_yaxis()
        axis.set_title(name_of(by[key]), fontsize="medium")
    figure.suptitle(
        "Extra time of an update with one of fastdino's means taken away (blue: one added; grey: within "
        f"{NOISE} %, as rounds differ){note}"
    )
    save(figure, "means.png")


def problems_of(args: argparse.Namespace, gpu: bool) -> list[Problem]:
    """The networks asked for; on a CPU the dearest first, whose two rounds are due: the others share what is
    left of the time. On a GPU in the order given."""
    target, most = (30e12, 64) if gpu else (0.25e12 if args.quick else 0.8e12, 8)
    found = []
    for arch in args.archs:
        for patch in args.patches if arch.startswith("vit") else [0]:
            rest = (args.global_size, args.local_size), args.local_crops, args.out_dim
            flops = model_flops(Problem(arch, patch, 1, *rest))
            images = args.images or max(1, min(most, 2 ** round(math.log2(target / flops))))
            found.append(Problem(arch, patch, max(images, 1 if patch else 2), *rest))
    return found if gpu else sorted(found, key=lambda p: -model_flops(p) * p.images)


def is_in(problem: Problem, names: list[str]) -> bool:
    return problem.arch in names or problem.name in names


def position(arch: str) -> tuple[int, str]:
    """Where a network stands in tables and plots: ViTs by size, then the others."""
    return (list(VITS).index(arch) if arch in VITS else len(VITS)), arch


def stamp_of(device: torch.device) -> Row:
    stamp = {key: machine(device)[key] for key in ("device", "torch", "python", "commit")}
    for package in ("timm", "lightly"):
        try:
            stamp[package] = version(package)
        except PackageNotFoundError:
            stamp[package] = "not installed"
    return stamp


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DEVICE/patch_size")
    parser.add_argument("--archs", nargs="*", default=["vit_small", "vit_base", "vit_tiny", "resnet50"])
    parser.add_argument("--patches", type=int, nargs="*", default=[16, 8, 14, 5])
    parser.add_argument("--images", type=int, help="an update; default: by the network's FLOPs")
    parser.add_argument("--minutes", type=float, default=8 if gpu else 50, help="in all, about")
    parser.add_argument("--rounds", type=int, default=9, help="at most, of a problem; two are due")
    few = ["vit_small/16", "vit_small/8"]
    parser.add_argument("--means", nargs="*", default=["vit_tiny/16", *few], help="taken away of these")
    parser.add_argument("--compiled", nargs="*", default=few, help="official DINO of these is compiled, too")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--loader", nargs="*", default=["vit_tiny/16", "vit_small/16"])
    parser.add_argument("--workers", type=int, help="of loaders; default: what make_loader chooses")
    parser.add_argument("--largest-batch", action="store_true", help="on a GPU")
    parser.add_argument("--global-size", type=int, default=224)
    parser.add_argument("--local-size", type=int, default=96)
    parser.add_argument("--local-crops", type=int, default=8)
    parser.add_argument("--out-dim", type=int, default=65536)
    parser.add_argument("--quick", action="store_true", help="reduced sizes, 10 minutes on two cores")
    parser.add_argument("--memory-only", action="store_true", help="on a CPU: anew, of what results.json has")
    parser.add_argument("--plot-only", action="store_true", help="table and plots anew, of results.json")
    if "--quick" in sys.argv:
        parser.set_defaults(archs=["vit_tiny", "vit_small", "resnet50"], global_size=112, local_size=48)
        parser.set_defaults(out_dim=8192, minutes=8, compile=False, loader=["vit_tiny/16"])
        parser.set_defaults(means=["vit_tiny/16", "vit_tiny/8"])
    return parser.parse_args()


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    gpu, out = device.type == "cuda", args.out or folder(device) / "patch_size"
    stored = out / "results.json"
    before = json.loads(stored.read_text()) if stored.exists() else {"about": {}, "rows": []}
    rows: list[Row] = before["rows"]
    about: Row = before["about"]
    if args.memory_only and gpu:
        raise SystemExit("--memory-only is for a CPU: on a GPU memory is measured with the rest")
    if args.memory_only:
        for row in rows:
            found = memory_apart(Problem(**row["problem"]), row["asked"]["compiled"])
            for v in row["variants"]:
                v |= {"MB_an_image": None, "peak_MB": None, "held_MB": None} | found.get(v["variant"], {})
            row["memory_stamp"] = stamp_of(device) | {"date": machine(device)["date"]}
            write(title(rows), rows, about, table(rows), out)
            print(
                f"{name_of(row)}: {[round(v['peak_MB']) for v in row['variants'] if v['peak_MB']]} MB",
                flush=True,
            )
    elif not args.plot_only:
        stamp, conditions, began = stamp_of(device), Conditions(), time.monotonic()
        clock = Clock(device)
        dtypes = ("float32", "bfloat16", "float16") if gpu else ("float32", "bfloat16")
        rates = {name: matmul_flops(getattr(torch, name), device, clock) for name in dtypes}
        rows = [row for row in rows if row["stamp"].items() >= stamp.items()]
        problems, skipped = problems_of(args, gpu), []
        for i, problem in enumerate(problems):
            asked = {
                "compiled": args.compile and is_in(problem, args.compiled),
                "means": is_in(problem, args.means),
                "loader": is_in(problem, args.loader),
                "largest": gpu and args.largest_batch,
            }
            same = {"problem": json.loads(json.dumps(asdict(problem))), "asked": asked}
            if any(row.items() >= same.items() for row in rows):
                print(f"{problem.name}: measured already", flush=True)
                continue
            left = 60 * args.minutes - (time.monotonic() - began)
            if left < 0:
                skipped.append(problem.name)
                continue
            until = time.monotonic() + left / (len(problems) - i)
            # Blocks of all variants count together; past the limit they would run as they are, uncompiled.
            with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):
                row = bench(problem, asked, device, rates, until, args)
            stamp_ = stamp | {"date": machine(device)["date"]}
            row |= {"asked": asked, "stamp": stamp_, "matmul_GFLOP_s": {n: r / 1e9 for n, r in rates.items()}}
            rows = [r for r in rows if r["problem"] != same["problem"]] + [json.loads(json.dumps(row))]
            rows.sort(key=lambda r: (*position(r["problem"]["arch"]), -r["problem"]["patch"]))
            about = machine(device) | stamp | conditions.describe()
            about["matmul_GFLOP_s"] = {n: round(r / 1e9) for n, r in rates.items()}
            write(title(rows), rows, about, table(rows), out)
            spent = (time.monotonic() - began) / 60
            print(
                f"{problem.name}: done; {spent:.1f} of {args.minutes:g} minutes, {len(problems) - i - 1} left"
            )
            print(table([row]), flush=True)
            del row
            gc.collect()
            torch._dynamo.reset()
        if skipped:
            print(f"no time was left for {', '.join(skipped)}: the same command goes on with them")
    if rows:
        write(title(rows), rows, about, table(rows), out)
        if find_spec("matplotlib"):
            plot(rows, about, out)
        print(f"written to {out}")


def title(rows: list[Row]) -> str:
    return TITLE + (f" ({note})" if (note := reduced(rows)) else "")


if __name__ == "__main__":
    main()
