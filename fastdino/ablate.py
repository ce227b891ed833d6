"""`fastdino-ablate PRESET --out DIR`: train variants of a preset with several seeds, and compare them.

The default list asks what the paper's ablations ask (Caron et al. 2021, arXiv:2104.14294), and each answer of
the paper that is clear-cut is held against ours.
"""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from fastdino import compare, data, distributed
from fastdino.compare import Row, Variant
from fastdino.config import PRESETS, Config, number
from fastdino.data.samples import render_samples
from fastdino.data.sources import open_source, printable
from fastdino.eval.knn import check_classes
from fastdino.files import write_atomically
from fastdino.run import stop_signals
from fastdino.train import settle_for

EPOCHS = 8  # on the sample images, where --epochs does not say
VAL = 800  # sample images that test k-NN
JOBS = 8  # at most, where --jobs does not say: each takes 1.5 GB or more
OURS = {"--data", "--val", "--out", "--seed"}  # flags of a run that are not the user's to give
STOPPED = {75, 130, -signal.SIGINT, -signal.SIGTERM}  # exit statuses of a run that was told to go

Commands = list[list[str]]


def default_variants(base: Config) -> list[Variant]:
    """The paper's ablations about `base`, whose numbers are settled."""
    model, crops = base.model, base.data.crops
    k, b, p = number(model.out_dim), base.optim.batch_size, model.patch_size
    smallest = crops.local_crops_size if crops.local_crops_number else crops.global_crops_size
    patches = [n for n in (p // 2, p, 2 * p) if 1 <= n <= smallest and model.arch.startswith("vit")]

    def temp(t: float) -> str:
        return f"--teacher-temp {t:g} --warmup-teacher-temp {t:g}"

    # group, name, flags, what the paper says, where, seeds
    table: list[tuple[str, str, str, str, str, int]] = [
        ("teacher", "momentum", "", "learns", "figure 6", 3),
        ("teacher", "previous-epoch", "--teacher-update previous_epoch", "learns", "figure 6", 3),
        ("teacher", "previous-iteration", "--teacher-update previous_iteration", "collapses", "figure 6", 3),
        ("teacher", "student-copy", "--teacher-update student_copy", "collapses", "figure 6", 3),
        ("collapse", "centring-and-sharpening", "", "learns", "figure 7", 3),
        # A centre that stays at 0, where it begins; a teacher no sharper than its student.
        ("collapse", "no-centring", "--center-momentum 1", "collapses", "figure 7", 3),
        ("collapse", "no-sharpening", temp(base.method.student_temp), "collapses", "figure 7", 3),
        ("multi-crop", f"{crops.local_crops_number}-local-crops", "", "", "", 3),
        ("multi-crop", "no-local-crops", "--local-crops-number 0", "worse", "tables 7 and 8", 3),
        # Official DINO's advice: the global crops then take smaller scales too.
        (
            "multi-crop",
            "no-local-crops-wide",
            "--local-crops-number 0 --global-crops-scale 0.14 1",
            "worse",
            "tables 7 and 8",
            3,
        ),
    ]
    for t, paper in ((0.02, "learns"), (0.04, "learns"), (0.07, ""), (0.1, "collapses")):
        table.append(("teacher-temp", f"teacher-temp-{t:g}", temp(t), paper, "appendix D", 2))
    for m, paper in ((0, "learns"), (0.9, "learns"), (0.99, "learns"), (0.999, "collapses")):
        table.append(("centre", f"centre-momentum-{m:g}", f"--center-momentum {m:g}", paper, "appendix D", 2))
    for n in (k // 4, k, 16 * k):
        table.append(("prototypes", f"prototypes-{n}", f"--out-dim {n}", "", "", 2))
    for n in (b // 4, b, 2 * b):
        table.append(("batch", f"batch-{n}", f"--batch-size {n}", "", "", 2))
    for n in patches:
        paper = "better" if n < p else "worse" if n > p else ""
        table.append(("patch", f"patch-{n}", f"--patch-size {n}", paper, "figure 5", 2))
    return [
        Variant(group, name, tuple(flags.split()), paper, source, seeds)
        for group, name, flags, paper, source, seeds in table
    ]


def configure(preset: str, flags: Sequence[str], images: int) -> Config:
    """The config that fastdino-train makes of `flags` for so many images.

    Raises:
        SystemExit: it refuses them, and has said why.
        ValueError: the network or the batch cannot be.
    """
    config = tyro.extras.overridable_config_cli(
        PRESETS, args=[preset, *flags], prog="fastdino-train", config=(tyro.conf.OmitArgPrefixes,)
    )
    return settle_for(config, images)[0]


@dataclass
class Run:
    """One configuration, which several variants may share, and its flags beside those of all."""

    name: str
    flags: tuple[str, ...]
    config: Config
    seeds: int = 0

    def at(self, seed: int) -> str:
        """The name of one of its seeds."""
        return f"{self.name}-seed{seed}"

    def network(self) -> str:
        """What the features before training depend on, besides the seed."""
        m, crops = self.config.model, self.config.data.crops
        shape = f"{m.arch} {m.patch_size} {m.num_register_tokens} {m.layer_scale} {crops.global_crops_size}"
        return f"{shape} {m.init_from}".rstrip()

    def work(self) -> float:
        """Rough cost: the tokens of an image in student, where backward is twice forward, and teacher."""
        crops, patch = self.config.data.crops, self.config.model.patch_size
        whole, local = ((side / patch) ** 2 for side in (crops.global_crops_size, crops.local_crops_size))
        tokens = 4 * 2 * whole + 3 * crops.local_crops_number * local
        return self.config.optim.epochs * (tokens + 100)  # and crops and head, whatever the patch


@dataclass
class Job:
    """A seed of a run: commands, one after the other."""

    run: Run
    seed: int
    folder: Path
    commands: Commands
    began: float = 0.0
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """What the commands print is added to it."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def start(self, environment: dict[str, str]) -> None:
        """Start the next command."""
        self.began = self.began or time.monotonic()
        command = self.commands.pop(0)
        with self.log.open("a") as log:
            print("$", shlex.join(command), file=log, flush=True)
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def execute(
    jobs: Sequence[Job], at_once: int, threads: int, ended: Callable[[Job, int, float], None]
) -> None:
    """Do the jobs in order, `at_once` together; `ended` gets each, its exit status and the seconds left.

    Raises KeyboardInterrupt if this process or a command was told to go. What ends this early ends all: they
    are told to save, and waited for.
    """
    environment = ({"OMP_NUM_THREADS": str(threads)} if threads else {}) | os.environ
    waiting, running, work, seconds = [*jobs], list[Job](), 0.0, 0.0
    with stop_signals() as told:  # an exception within Popen would leave a process that nobody knows
        try:
            while waiting or running:
                if told:
                    raise KeyboardInterrupt
                while waiting and len(running) < at_once:
                    running.append(waiting.pop(0))
                    running[-1].start(environment)
                time.sleep(0.1)
                for job in [*running]:
                    code = job.process.poll() if job.process else None
                    if code is None:
                        continue
                    if code in STOPPED:
                        raise KeyboardInterrupt
                    if code == 0 and job.commands:
                        job.start(environment)
                        continue
                    running.remove(job)
                    now = time.monotonic()
                    work, seconds = work + job.run.work(), seconds + now - job.began
                    left = sum(j.run.work() for j in waiting + running) * seconds / work
                    left -= sum(min(now - j.began, j.run.work() * seconds / work) for j in running)
                    ended(job, code, left / at_once)
        finally:
            processes = [job.process for job in running if job.process]
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Train variants of a preset with several seeds, each by a process of fastdino-train, and compare them.

    Without --data on rendered sample images: about 50 minutes on two cores for the default list. OUT gets
    ablation.md, ablation.json and ablation.png, anew after each run, and runs/. The same command goes on
    where it was stopped. Flags of fastdino-train for all runs come last, after --.
    """

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")] = "demo"
    """The preset of fastdino-train that is varied."""
    out: str = ""
    """Folder for the tables, the plot and the runs."""
    data: str = ""
    """The images, as for fastdino-train. Without it: sample images, rendered to OUT/samples."""
    val: str = ""
    """Labelled images to test k-NN on, with --data as the neighbours."""
    samples: int = 2000
    """Sample images to train on where there is no --data; 800 more test k-NN."""
    epochs: int = 0
    """Passes over the images. 0: 8 over the sample images, the preset's over --data."""
    seeds: int = 0
    """Seeds of each variant. 0: 3 where it matters most what the paper says, 2 in the sweeps of a number."""
    jobs: int = 0
    """Runs at a time. 0: one on a GPU, else one a core, 8 at most."""
    variants: tuple[str, ...] = ()
    """Groups or names of the default list (see --list), or all. Without it all; with --vary none."""
    vary: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A variant of your own by its flags: --vary "--lr 1e-3 --out-dim 256"."""
    show: Annotated[bool, tyro.conf.arg(name="list")] = False
    """Print the variants and their flags, and end."""

    def run(self, flags: Sequence[str]) -> int:
        """Do it, with `flags` of fastdino-train for all runs; returns the exit status, 1 if a run failed.

        Raises:
            ValueError, FileNotFoundError: what cannot work, before anything is written.
            SystemExit: flags that fastdino-train refuses; it has said why.
            KeyboardInterrupt: told to stop; what was running has saved.
        """
        images, labelled = self._images()
        variants, runs = self._plan(flags, images)
        if self.show:
            for v, run in variants:
                paper = f"{v.paper} ({v.source})" if v.paper else ""
                say(f"{v.group:13}{v.name:26}{run.seeds} seeds  {paper:28}{shlex.join(v.flags)}")
            return 0
        if not self.out:
            raise ValueError("--out is missing: give a folder for the tables, the plot and the runs")
        out, state = Path(self.out), self._load(flags)
        device = distributed.choose_device(runs[0].config.run.device)
        at_once = self.jobs or (1 if device.type == "cuda" else min(data.cores(), JOBS))
        threads = 0 if device.type == "cuda" else max(1, data.cores() // at_once)
        if not self.data:
            render_samples(out / "samples", train=self.samples, val=VAL)
        (out / "runs").mkdir(parents=True, exist_ok=True)

        plan = [(run, seed) for seed in range(runs[0].seeds) for run in runs if seed < run.seeds]
        measured = {(network, int(seed)) for network, its in state["untrained"].items() for seed in its}
        jobs, new = list[Job](), list[str]()
        for run, seed in plan:
            folder, was = out / "runs" / run.at(seed), state["runs"].get(run.at(seed), {})
            done = was.get("state") in ("trained", "diverged") and was["flags"] == [*run.flags]
            measure = labelled and (run.network(), seed) not in measured
            if measure or not (done and folder.exists()):
                measured.add((run.network(), seed))
                jobs.append(Job(run, seed, folder, self._commands(run, seed, folder, flags, measure)))

        def ended(job: Job, code: int, left: float) -> None:
            name = job.folder.name
            result = compare.result_of(job.folder, code, job.log.read_text(errors="replace"))
            state["runs"][name] = result | {"flags": [*job.run.flags]}
            if (found := job.folder / "knn.json").exists():
                knn = json.loads(found.read_text())
                its = state["untrained"].setdefault(job.run.network(), {})
                its[str(job.seed)] = knn["untrained network"]["20"]
                state["raw pixels"] = knn["raw pixels"]["20"]
            self._write(state, variants)
            new.append(name)
            what = result["error"] or f"{result['state']} in {result['seconds']:.0f} s"
            what += f", k-NN {result['knn']:.1f} %" if result.get("knn") is not None else ""
            what += f"; about {math.ceil(left / 60)} min left" if left else ""
            say(f"{len(plan) - len(jobs) + len(new)} of {len(plan)}: {name}: {what}")

        there = f", {len(plan) - len(jobs)} of them there already" if len(jobs) < len(plan) else ""
        say(f"{len(plan)} runs of {len(runs)} configurations{there}; {at_once} at a time")
        execute(jobs, at_once, threads, ended)
        compare.show(self._write(state, variants))
        say(f"{out}/ablation.md, ablation.json, ablation.png")
        return int(any(state["runs"][run.at(seed)]["state"] == "failed" for run, seed in plan))

    def _images(self) -> tuple[int, bool]:
        """How many there are to train on, and whether they have labels."""
        if not self.data:
            if self.val:
                raise ValueError(f"--val {self.val} goes with images of your own: give --data too")
            return self.samples, True
        source = open_source(self.data)
        if self.val:
            check_classes(source, open_source(self.val))
        return len(source), source.labels is not None

    def _run_flags(self, flags: Sequence[str]) -> list[str]:
        """Of every run; the last of a kind holds."""
        epochs = self.epochs or (0 if self.data else EPOCHS)
        workers = [] if torch.cuda.is_available() else ["--workers", "0"]  # every core has a run of its own
        ours = [*workers, "--knn-every-epochs", "1000000", "--keep", "1", "--keep-every-epochs", "0"]
        return [*(["--epochs", str(epochs)] if epochs else []), *ours, *flags]

    def _commands(self, run: Run, seed: int, folder: Path, flags: Sequence[str], measure: bool) -> Commands:
        """Train; with `measure` also classify by the network before training, and by raw pixels."""
        images = ["--data", self.data or f"{self.out}/samples/train"]
        if val := self.val if self.data else f"{self.out}/samples/val":
            images += ["--val", val]
        train = ["fastdino.train", self.preset, *images, *self._run_flags(flags), *run.flags]
        commands = [[sys.executable, "-m", *train, "--seed", str(seed), "--out", str(folder)]]
        if measure:
            knn = ["fastdino.eval", "knn", str(folder), *images, "--baselines", "--k", "20", "--workers", "0"]
            knn += ["--device", run.config.run.device, "--json", f"{folder}/knn.json"]
            commands.append([sys.executable, "-m", *knn])
        return commands

    def _plan(self, flags: Sequence[str], images: int) -> tuple[list[tuple[Variant, Run]], list[Run]]:
        """The variants with their runs, and these: the base's first, each configuration once."""
        own = [Variant("own", text, tuple(shlex.split(text))) for text in self.vary]
        for flag in (*flags, *(flag for v in own for flag in v.flags)):
            if flag.partition("=")[0] in OURS:
                raise ValueError(f"{flag} cannot be given to the runs: fastdino-ablate gives each its own")
        runs: dict[Config, Run] = {}

        def run_of(v: Variant) -> Run:
            try:
                config = configure(self.preset, [*self._run_flags(flags), *v.flags], images)
            except ValueError as error:
                raise ValueError(f"{v.name}: {error}") from None
            if config not in runs:
                # By its flags, not the variant's name, so that it is found again among other variants.
                name = re.sub(r"[^\w.]+", "-", " ".join(v.flags)).strip("-")[:100] or "base"
                taken = any(run.name == name for run in runs.values())
                runs[config] = Run(f"{name}-{len(runs)}" if taken else name, v.flags, config)
            runs[config].seeds = max(runs[config].seeds, self.seeds or v.seeds)
            return runs[config]

        base = run_of(Variant("", "base"))
        known = default_variants(base.config)
        groups, names = dict.fromkeys(v.group for v in known), [v.name for v in known]
        wanted = {*self.variants} or ({"all"} if not own else set())
        if unknown := wanted - {"all", *groups, *names}:
            raise ValueError(
                f"--variants {' '.join(sorted(unknown))}: give all, groups ({', '.join(groups)}) or names "
                f"({', '.join(names)})"
            )
        chosen = []
        for v in [*known, *own]:
            if v in known and not wanted & {"all", v.group, v.name}:
                continue
            try:
                run = run_of(v)
            except ValueError as error:  # a batch of more images than there are
                if v in own:
                    raise
                say(f"left out: {error}")
                continue
            same = run is base and v.paper in ("worse", "better")
            chosen.append((replace(v, paper="") if same else v, run))
        variants: list[tuple[Variant, Run]] = []
        for group in dict.fromkeys(v.group for v, _ in chosen):
            its = [(v, run) for v, run in chosen if v.group == group]
            variants += its if any(run is base for _, run in its) else [(Variant(group, "base"), base), *its]
        return variants, [*runs.values()]

    def _load(self, flags: Sequence[str]) -> dict[str, Any]:
        """What OUT has of this ablation already; raises ValueError if it has another one."""
        images = {"data": self.data, "val": self.val} if self.data else {"samples": f"{self.samples} + {VAL}"}
        settings = {"preset": self.preset, **images, "flags": shlex.join(self._run_flags(flags))}
        path = Path(self.out, "ablation.json")
        state = json.loads(path.read_text()) if path.exists() else {"settings": settings}
        if state["settings"] != settings:
            was = state["settings"]
            told = [f"{k}: was {was.get(k)}, now {v}" for k, v in settings.items() if was.get(k) != v]
            raise ValueError(f"{self.out} holds another ablation ({'; '.join(told)}): give another --out")
        return {"untrained": {}, "runs": {}} | state

    def _write(self, state: dict[str, Any], variants: Sequence[tuple[Variant, Run]]) -> list[Row]:
        """ablation.json, ablation.md and ablation.png as they are by now; returns the table."""
        results = {
            run.name: [state["runs"][run.at(i)] for i in range(run.seeds) if run.at(i) in state["runs"]]
            for _, run in variants
        }
        rows = []
        for v, run in variants:
            knn = state["untrained"].get(run.network(), {})
            untrained = [knn[str(i)] for i in range(run.seeds) if str(i) in knn]
            rows.append(Row(v, results[run.name], results["base"], untrained))
        out, score = Path(self.out), compare.score_of(rows)
        state["variants"] = [asdict(row.variant) | compare.cells(row, score) for row in rows]
        text = json.dumps(state, indent=1, allow_nan=False)
        write_atomically(out / "ablation.json", lambda beside: beside.write_text(text + "\n"))
        heading = ["# Ablation", ""] + [f"- {name}: `{value}`" for name, value in state["settings"].items()]
        compare.write_markdown(rows, heading, out / "ablation.md")
        compare.plot(rows, out / "ablation.png")
        return rows


def say(text: str) -> None:
    """Print a line at once, also where it is not to a terminal."""
    print(printable(text), flush=True)


def main() -> None:
    """Entry point of `fastdino-ablate`."""
    ours, flags = sys.argv[1:], list[str]()
    if "--" in ours:
        ours, flags = ours[: ours.index("--")], ours[ours.index("--") + 1 :]
    while "--vary" in ours[:-1]:  # what follows it begins with -- too
        i = ours.index("--vary")
        ours[i : i + 2] = [f"--vary={ours[i + 1]}"]
    ablation = tyro.cli(Ablation, args=ours, prog="fastdino-ablate")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # job managers end it as Ctrl-C does
    try:
        sys.exit(ablation.run(flags))
    except (ValueError, OSError) as error:
        sys.exit(f"fastdino-ablate: {printable(str(error))}")
    except KeyboardInterrupt:
        print("fastdino-ablate: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
