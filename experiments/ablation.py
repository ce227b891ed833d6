"""The paper's ablations: train variants of a preset with several seeds, and compare them.

    python -m experiments.ablation [PRESET] --data IMAGES --out DIR [-- FLAGS OF FASTDINO-TRAIN]

DIR gets ablation.md, ablation.json and ablation.png, anew after each run, and runs/. The same command goes on
where it was stopped. What the paper says (Caron et al. 2021, arXiv:2104.14294), where that is clear-cut, is
held against what comes out here. Labelled images are needed for that: k-NN judges.
"""

import argparse
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch
import tyro

from experiments.judge import Result, Variant, plot, report, result_of
from fastdino import cli, data
from fastdino.config import PRESETS, Config, resolved
from fastdino.eval.knn import check_classes
from fastdino.files import claim, write_text
from fastdino.train import resolve_auto_for

TAKEN = {"--data", "--val", "--out", "--seed"}  # flags of fastdino-train that each run gets from here
STOPPED = {75, 130, -signal.SIGINT, -signal.SIGTERM}  # exit statuses of a run that was told to stop


def default_variants(base: Config, images: int) -> list[Variant]:
    """The paper's ablations about `base`, whose numbers are resolved for a number of images."""
    model, crops, method = base.model, base.data.crops, base.method
    k, b, p = resolved(model.out_dim), base.optim.batch_size, model.patch_size
    local, batches = crops.local_crops_number, [n for n in (b // 4, b, 2 * b) if n <= images]
    smallest = crops.local_crops_size if local else crops.global_crops_size
    none = "--local-crops-number 0"

    def flag(name: str, value: float, own: float) -> str:
        return "" if value == own else f"--{name} {value}"

    def temp(t: float) -> str:
        same = t == method.teacher_temp == method.warmup_teacher_temp
        return "" if same else f"--teacher-temp {t:g} --warmup-teacher-temp {t:g}"

    def center(m: float) -> str:
        return flag("center-momentum", m, method.center_momentum)

    table = [
        ("teacher", "momentum", "", "learns"),
        ("teacher", "previous-epoch", "--teacher-update previous_epoch", "learns"),
        ("teacher", "previous-iteration", "--teacher-update previous_iteration", "collapses"),
        ("teacher", "student-copy", "--teacher-update student_copy", "collapses"),
        ("collapse", "centring-and-sharpening", "", "learns"),
        # A centre that stays at 0, where it begins; a teacher no sharper than its student.
        ("collapse", "no-centring", "--center-momentum 1", "collapses"),
        ("collapse", "no-sharpening", temp(method.student_temp), "collapses"),
        ("multi-crop", f"{local}-local-crops", "", ""),
        ("multi-crop", "no-local-crops", none, "worse"),
        # Official DINO's advice: the global crops then take smaller scales too.
        ("multi-crop", "no-local-crops-wide", f"{none} --global-crops-scale 0.14 1", "worse"),
    ]
    table = [line for line in table if local or none not in line[2]]
    for t, paper in ((0.02, "learns"), (0.04, "learns"), (0.07, ""), (0.1, "collapses")):
        table.append(("teacher-temp", f"teacher-temp-{t:g}", temp(t), paper))
    for m, paper in ((0, "learns"), (0.9, "learns"), (0.99, "learns"), (0.999, "collapses")):
        table.append(("centre", f"centre-momentum-{m:g}", center(m), paper))
    table += [("prototypes", f"prototypes-{n}", flag("out-dim", n, k), "") for n in (k // 4, k, 16 * k)]
    table += [("batch", f"batch-{n}", flag("batch-size", n, b), "") for n in batches]
    for n, paper in ((p // 2, "better"), (p, ""), (2 * p, "worse")):
        if 1 <= n <= smallest and model.arch.startswith("vit"):
            table.append(("patch", f"patch-{n}", flag("patch-size", n, p), paper))
    return [Variant(*line) for line in table]


def plan(args: argparse.Namespace, flags: Sequence[str], images: int) -> list[Variant]:
    """The base and the variants that `args` ask for.

    Raises:
        SystemExit: flags that fastdino-train refuses; it has said why.
        ValueError: names that are not in the list; flags that are not for the user to give; a network or a
            batch that cannot be.
    """

    def configure(v: Variant) -> Config:
        given = [*flags, *shlex.split(v.flags)]
        if taken := [flag for flag in given if flag.partition("=")[0] in TAKEN]:
            raise ValueError(f"{taken[0]} cannot be given to the runs: each gets its own")
        config = tyro.extras.overridable_config_cli(
            PRESETS, args=[args.preset, *given], prog="fastdino-train", config=(tyro.conf.OmitArgPrefixes,)
        )
        try:
            return resolve_auto_for(config, images)[0]
        except ValueError as error:
            raise ValueError(f"{v.name}: {error}") from None

    base = Variant("base", "base")
    known, own = default_variants(configure(base), images), [Variant("own", x, x) for x in args.vary]
    wanted = {*args.variants} or ({"all"} if not own else set())
    groups, names = dict.fromkeys(v.group for v in known), [v.name for v in known]
    if unknown := wanted - {"all", *groups, *names}:
        raise ValueError(
            f"--variants {' '.join(sorted(unknown))}: give all, groups ({', '.join(groups)}) or names "
            f"({', '.join(names)})"
        )
    variants = [base, *(v for v in known if wanted & {"all", v.group, v.name}), *own]
    for v in variants:
        configure(v)
    return variants


def execute(
    jobs: Mapping[str, list[list[str]]], folder: Path, at_once: int, threads: int
) -> Generator[tuple[str, int], None, None]:
    """Do the jobs, `at_once` together: the commands of each in turn, until one fails; output to NAME.log.

    Yields the name and exit status of each as it ends. Raises KeyboardInterrupt if one was told to stop. What
    ends this early, Ctrl-C too, stops all: they are told to save, and waited for.
    """
    environment = ({"OMP_NUM_THREADS": str(threads)} if threads else {}) | os.environ
    waiting, running = {name: [*todo] for name, todo in jobs.items()}, dict[str, subprocess.Popen[bytes]]()

    def start(name: str) -> None:
        command = waiting[name].pop(0)
        with (folder / f"{name}.log").open("a") as log:
            print("$", shlex.join(command), file=log, flush=True)
            running[name] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    try:
        while waiting:
            for name in [name for name in waiting if name not in running][: at_once - len(running)]:
                start(name)
            time.sleep(0.1)
            for name, code in [(n, code) for n, p in running.items() if (code := p.poll()) is not None]:
                if code in STOPPED:
                    raise KeyboardInterrupt
                if code == 0 and waiting[name]:
                    start(name)
                    continue
                del running[name], waiting[name]
                yield name, code
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and flags of fastdino-train for all runs."""
    own, flags = [*argv], list[str]()
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        "ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("preset", nargs="?", default="demo", help="the preset of fastdino-train that is varied (%(default)s)")
    add("--data", required=True, help="the images, as for fastdino-train")
    add("--val", default="", help="labelled images to test k-NN on, with --data as the neighbours")
    add("--out", default="runs/ablation", help="folder for the tables, the plot and the runs (%(default)s)")
    add("--seeds", type=int, default=0, help="of each variant. 0: 3, and 2 in the sweeps of a number")
    add("--jobs", type=int, default=0, help="runs at a time. 0: one on a GPU, else one a core, 8 at most")
    add("--variants", nargs="+", default=[], help="groups or names of --list, or all; with --vary none")
    add("--vary", action="append", default=[], help='a variant of your own: --vary "--lr 1e-3 --out-dim 64"')
    add("--list", action="store_true", help="print the variants and their flags, and end")
    args = parser.parse_args(own)
    fixed = ["--knn-every-epochs", "0", "--keep", "1", "--keep-every-epochs", "0"]
    fixed += [] if torch.cuda.is_available() else ["--workers", "0"]  # every core has a run of its own
    return args, [*fixed, *flags]


def commands(args: argparse.Namespace, flags: Sequence[str], run: Path, labelled: bool) -> list[list[str]]:
    """Train; then, where there are labels, classify by the teacher and by the network before training."""
    images = ["--data", args.data, *(["--val", args.val] if args.val else [])]
    train = ["fastdino.train", args.preset, *images, *flags, "--out", str(run)]
    knn = ["fastdino.eval", "knn", str(run), *images, "--baselines", "--k", "20", "--workers", "0"]
    knn += ["--json", f"{run}/knn.json"]
    return [[sys.executable, "-m", *command] for command in ([train, knn] if labelled else [train])]


def run(args: argparse.Namespace, flags: list[str]) -> int:
    """Do the study, with `flags` of fastdino-train for all runs; returns 1 if a run failed.

    Raises:
        ValueError, OSError, SystemExit: what cannot work, before anything is written.
        KeyboardInterrupt: told to stop; the runs have saved.
    """
    source = data.open_source(args.data)
    if args.val:
        check_classes(source, data.open_source(args.val))
    variants = plan(args, flags, len(source))
    if args.list:
        cli.say(*(f"{v.group:13}{v.name:26}{v.seeds} seeds  {v.statement:28}{v.flags}" for v in variants))
        return 0
    settings = {"preset": args.preset, "data": args.data, "val": args.val, "flags": shlex.join(flags)}
    settings |= {"fingerprint": source.fingerprint()}
    with claim(Path(args.out), "settings.json", settings, "an ablation", "the ablation"):
        return train_all(args, flags, variants, source.labels is not None)


def train_all(args: argparse.Namespace, flags: list[str], variants: list[Variant], labelled: bool) -> int:
    """Train what is not there yet, and write the report after each run; returns 1 if one failed."""
    out, folder, cuda = Path(args.out), Path(args.out, "runs"), torch.cuda.is_available()
    folder.mkdir(exist_ok=True)
    path = out / "ablation.json"
    found: dict[str, Result] = json.loads(path.read_text()) if path.exists() else {}
    seeds: dict[str, int] = {}  # of each configuration, by its flags
    for v in variants:
        seeds[v.flags] = max(seeds.get(v.flags, 0), args.seeds or v.seeds)

    def name_of(own: str, seed: int) -> str:
        """By its flags, so that a run is found again among other variants."""
        words = re.sub(r"[^\w.+=-]+", "_", own).strip("-")
        return f"{words or 'base'}-seed{seed}"

    runs = [(own, seed) for own, count in seeds.items() for seed in range(count)]
    runs.sort(key=lambda run: run[1])  # the first seed of each configuration comes first
    names = {name_of(*run): run for run in runs}
    jobs = {}
    for name, (own, seed) in names.items():
        if found.get(name, {}).get("state") not in ("trained", "diverged"):
            given = [*flags, *shlex.split(own), "--seed", str(seed)]
            jobs[name] = commands(args, given, folder / name, labelled)

    def write() -> str:
        results: dict[str, list[Result]] = {own: [] for own in seeds}
        for name, (own, _) in names.items():
            results[own] += [found[name]] if name in found else []
        text = report(variants, results, f"`{args.preset}` on {args.data}, with {shlex.join(flags)}")
        write_text(path, json.dumps(found, indent=1, allow_nan=False) + "\n")
        write_text(out / "ablation.md", text)
        plot(variants, results, out / "ablation.png")
        return text

    total, there, began = len(names), len(names) - len(jobs), time.monotonic()
    at_once = args.jobs or (1 if cuda else min(data.cores(), 8))
    note = f", {there} of them there already" if there else ""
    cli.say(f"{total} runs of {len(seeds)} configurations{note}; {at_once} at a time")
    with closing(execute(jobs, folder, at_once, 0 if cuda else max(1, data.cores() // at_once))) as ended:
        for n, (name, code) in enumerate(ended, 1):
            log = (folder / f"{name}.log").read_text(errors="replace")
            result = found[name] = result_of(folder / name, code, log)
            write()
            knn = f", k-NN {result['knn']:.1f} %" if "knn" in result else ""
            left = math.ceil((time.monotonic() - began) / n * (len(jobs) - n) / 60)
            what = result["error"] or f"{result['state']}{knn}"
            cli.say(f"{there + n} of {total}: {name}: {what}; about {left} min left")
    cli.say(write(), f"{out}/ablation.md, ablation.json, ablation.png")
    return int(any(found[name]["state"] == "failed" for name in names))


if __name__ == "__main__":
    args, flags = arguments(sys.argv[1:])
    sys.exit(cli.run("ablation", lambda: run(args, flags), stopped="stopped; the same command goes on"))
