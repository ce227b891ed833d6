"""`fastdino-train PRESET --data DIR --out DIR`: train official DINO on any folder of images.

On several GPUs: `torchrun --nproc-per-node N -m fastdino.train PRESET ...`, or fastdino-train under srun.
"""

import math
import resource
import signal
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from fastdino import cli, data, distributed, ops
from fastdino.backbones import build_backbone
from fastdino.config import PRESETS, Config, hints, resolve_auto, resolved, to_dict
from fastdino.data import Source, Unreadable, crops, open_source
from fastdino.data.feed import Feed
from fastdino.diagnostics import DIAGNOSTICS
from fastdino.eval.attention import plot_attention
from fastdino.eval.knn import check_classes, evaluate_knn, knn_roles
from fastdino.health import Health, Row, Window
from fastdino.monitor import Monitor, plot_curves, read_metrics
from fastdino.optim import Schedule
from fastdino.run import REQUEUE, Interrupted, Run, RunError, has_checkpoint, with_numbers_of_run
from fastdino.update import Update


def train(
    config: Config, *, update_type: type[Update] = Update, feed_type: type[Feed] = Feed
) -> dict[str, Any]:
    """Train DINO as `config` says, or continue the run in `config.run.out`.

    Leaves there config.json, metrics.jsonl, tensorboard/, checkpoints/, teacher.safetensors, curves.png, for
    a ViT attention.png, and changes.jsonl where --extend or --change was used. Where torchrun or srun has
    launched N processes, each calls this: they share each batch, and the result is that of one process.

    Args:
        config: the run.
        update_type: makes the updates; a subclass changes the method.
        feed_type: hands the loader's batches to the update; a subclass brings about what a test is about.

    Returns:
        The metrics of the last log line, and "step".

    Raises:
        ValueError, FileNotFoundError: a configuration, folder or machine that cannot work; at the start.
        RunError: too many unreadable files or non-finite updates, or no room for the last checkpoint.
        Interrupted: Ctrl-C, SIGTERM or SIGUSR1, after saving. Several processes save at their next log line.
        OtherRankFailed: another process failed, and says why.
    """
    with distributed.process_group(config.run.device, config.run.parallel) as device, ExitStack() as stack:
        # What to train on, and the numbers that follow from it.
        images = open_images(config, device)
        with distributed.raise_on_all_ranks():
            config, explanations = resolve_auto_for(with_numbers_of_run(config), len(images.source))
            schedule = Schedule(config, images.steps_per_epoch)
        total = schedule.total_steps

        # What trains. Entering `run` locks the folder and loads its checkpoint, if any, into `update`.
        update = update_type(config, device, load_weights=not has_checkpoint(config.run.out))
        run = stack.enter_context(Run(config, update, images.fingerprint, schedule))
        wandb, quiet = config.run.wandb, distributed.rank() > 0
        monitor = stack.enter_context(Monitor(run.out, run.start_step, total, to_dict(config), wandb, quiet))
        loader = make_loader(config, images, device, run.start_step, total)
        # With counts that are averaged over processes, the feed passes on whether this one was signalled.
        feed = feed_type(loader, config.optim.accumulate, run.signals)
        window = Window(config.run.log_every, device)
        advice = waiting_advice(images, loader, device)
        health = Health(config, images.source, update, run, monitor, advice)
        monitor.say(describe(update, images, loader))
        for note in (*explanations, *update.notes, *images.notes, *run.notes, *schedule.notes, *health.notes):
            monitor.say(note)

        values: dict[str, Any] = {}
        for step in range(run.start_step, total):
            settings = schedule.at(step)
            row = update(feed, settings)
            window.add(row, settings, feed.indices)
            # Whatever evaluates or saves logs too. Up to here nothing waits for the device.
            if not (settings.logs or run.asked_to_stop):
                continue

            rows, seconds = window.read()
            # In a row `stop` is above 0 on all processes if one of them was signalled.
            stop = run.asked_to_stop or any(row["stop"] for row in rows)
            health.check_updates(rows, feed, seconds)
            values = summarize(rows, update, images, health, seconds)
            health.diagnose(settings, values)
            if settings.evaluates and not stop:
                values |= evaluate(update, images, run, loader.workers, monitor, step + 1)
            monitor.record(step + 1, values)
            monitor.progress(step + 1, values | {"batch_size": config.optim.batch_size})
            health.check_unreadable()  # after the line that shows how many
            if settings.saves or stop:
                # Written behind the next updates; what comes back is what went wrong with the one before.
                monitor.say(run.save(step + 1, health.state()))
            if stop and step + 1 < total:
                run.wait_for_checkpoint()
                raise run.interruption(step + 1)
            window.restart()  # neither evaluating nor saving counts as time of the next updates

        run.wait_for_checkpoint()
        draw(update, images, run, monitor)
        distributed.gather(None)  # some launchers end all processes as soon as one has ended
        if run.start_step == total:  # the run was complete before
            values = (read_metrics(run.out) or [{}])[-1]
    return {"step": total, **values}


@dataclass(frozen=True)
class Images:
    """What a run trains on."""

    source: Source
    val: Source | None
    steps_per_epoch: int
    fingerprint: str
    loader_kind: str
    """What makes the crops: "torchvision" or "dali"."""
    notes: list[str]
    """Sentences for the user."""


def open_images(config: Config, device: torch.device) -> Images:
    """Open and check what --data and --val name. All ranks call it.

    Raises:
        ValueError, FileNotFoundError: a path, a batch size or a size of crops that cannot work, an --out
            within the images, or other images on another rank.
    """
    cfg, path = config.optim, config.data.data
    with distributed.raise_on_all_ranks():
        if not path:
            raise ValueError(
                "--data is missing: give a folder of images, or a text file with one path a line"
            )
        if not config.run.out:
            raise ValueError("--out is missing: give a folder for the run's files")
        patterns = {"include": config.data.include, "exclude": config.data.exclude}
        source = open_source(path, **patterns)
        val = open_source(config.data.val, **patterns) if config.data.val else None
        # At once: a refusal may be due to them.
        cli.say(*source.notes, *(val.notes if val else []))
        if val is not None:
            check_classes(*knn_roles(source, val))
        steps_per_epoch = data.steps_per_epoch(len(source), cfg.batch_size)
        # Raises where the batch does not divide into pieces and ranks.
        data.share_of(cfg.batch_size, cfg.accumulate, distributed.world_size())
        out = Path(config.run.out)
        if Path(path).is_dir() and out.resolve().is_relative_to(Path(path).resolve()):
            raise ValueError(f"--out {out} lies in --data {path}, whose images it would join: move it")
        fingerprint = source.fingerprint()
    warning = distributed.on_rank_zero(lambda: data.crop_size_warning(source, config.data.crops))
    with distributed.raise_on_all_ranks():
        if any(other != fingerprint for other in distributed.gather(fingerprint)):
            raise ValueError(f"the ranks see different images in {path}: give all the same ones")
    loader_kind, about_loader = data.choose_loader(config.data.loader, device)
    by_itself = "--data has no labels: k-NN classifies each image of --val by the others of --val"
    alone = by_itself if val and source.labels is None else ""
    notes = [note for note in (warning, about_loader, alone) if note]
    return Images(source, val, steps_per_epoch, fingerprint, loader_kind, notes)


def resolve_auto_for(config: Config, images: int) -> tuple[Config, list[str]]:
    """`config.resolve_auto` for a run on N = `images` images; ValueError: unknown network, batch above N."""
    with torch.device("meta"):
        backbone = build_backbone(config.model, config.data.crops.global_crops_size)
    updates = config.optim.epochs * data.steps_per_epoch(images, config.optim.batch_size)
    return resolve_auto(config, images, updates, getattr(backbone, "embed_dim", 384))


def make_loader(config: Config, images: Images, device: torch.device, start: int, total: int) -> data.Loader:
    """The loader of this rank's part of the batches of updates start to total - 1."""
    return data.make_loader(
        images.source,
        config.data.crops,
        batch_size=config.optim.batch_size,
        pieces=config.optim.accumulate,
        seed=config.run.seed,
        start_step=start,
        total_steps=total,
        workers=config.data.workers,
        device=device,
        loader=images.loader_kind,
        shuffle_buffer=config.data.shuffle_buffer,
        jpeg_scaling=config.data.jpeg_scaling,
        rank=distributed.rank(),
        ranks=distributed.world_size(),
        local_ranks=distributed.launch().local_ranks,
    )


def describe(update: Update, images: Images, loader: data.Loader) -> str:
    """The first line of a run: what runs on what, and how long."""
    cfg, ranks, device = update.config.optim, distributed.world_size(), update.device
    left_out = len(images.source) - images.steps_per_epoch * cfg.batch_size
    wrapped = ranks > 1 or update.sharded or update.student is not update.dino.student
    crops_device = device if images.loader_kind == "dali" else "cpu"
    return " · ".join(
        (
            *([f"{ranks} rank{'s' * (ranks > 1)}, {update.parallel}"] if wrapped else []),
            device_name(device),
            str(update.dtype).removeprefix("torch."),
            *(f"{op}: {impl}" for op, impl in ops.describe(device).items()),
            f"crops: {crops.describe(crops_device)}",
            f"{len(images.source)} images, {loader.workers} loader processes"
            + (" a rank" if ranks > 1 else "")
            + (" and DALI" if images.loader_kind == "dali" else ""),
            f"{cfg.epochs} epochs of {images.steps_per_epoch} updates of {cfg.batch_size} images"
            + (f", {left_out} left out of each" if left_out else ""),
        )
    )


def summarize(
    rows: list[Row], update: Update, images: Images, health: Health, seconds: float
) -> dict[str, Any]:
    """The metrics of a log line from the updates since the line before. All ranks call it.

    Args:
        rows: of `Window.read`.
        seconds: what they took.
    """
    last, settings = rows[-1], rows[-1]["settings"]
    losses = [row["loss"] for row in rows if math.isfinite(row["loss"])]
    values: dict[str, Any] = {
        "epoch": settings.epoch,
        "loss": float(np.mean(losses)) if losses else math.nan,
        "grad_norm": last["grad_norm"],
        "lr": settings.lr,
        "weight_decay": settings.weight_decay,
        "momentum": settings.momentum,
        "teacher_temp": settings.teacher_temp,
        "images_per_s": len(rows) * update.config.optim.batch_size / seconds,
        "data_wait": sum(row["waited"] for row in rows) / seconds,
        "memory_gb": peak_memory_gb(update.device),
        "unreadable": len(health.unreadable["run"]),
        "skipped": health.skipped,
    }
    # A line that a signal forced has no diagnostics: its update computed none.
    if settings.logs and math.isfinite(last["loss"]):
        values |= {name: last[name] for name in DIAGNOSTICS}
        values |= {
            "kl": last["loss"] - last["teacher_entropy"],
            "center_norm": update.dino.loss.center.norm().item(),
            "teacher_distance": update.dino.teacher_distance().item(),
        }
    if images.loader_kind == "dali":
        values["decoded_by_pillow"] = health.by_pillow
    if update.device.type == "cuda":
        # Of torch, DALI, the CUDA context and other processes together.
        free, total = torch.cuda.mem_get_info(update.device)
        values["device_memory_gb"] = (total - free) / 1e9
    return values


def evaluate(
    update: Update, images: Images, run: Run, workers: int, monitor: Monitor, step: int
) -> dict[str, float]:
    """k-NN accuracy of the teacher in %, as knn_10, knn_20, ...; all ranks call it.

    Empty without labels, where it cannot be measured, and where a single process is asked to stop meanwhile.
    """
    neighbours, classified = knn_roles(images.source, images.val)
    if neighbours.labels is None:
        return {}
    config = update.config
    try:
        accuracy = evaluate_knn(
            update.teacher_backbone(),
            neighbours,
            classified,
            config.data.crops,
            limit=config.run.knn_images,
            device=update.device,
            workers=workers,
            progress=partial(_abort_if_stopping, run),
        )
    except KeyboardInterrupt:
        return {}
    except ValueError as error:
        monitor.say(f"step {step}: no k-NN: {error}")
        return {}
    finally:
        update.dino.teacher.train()
    shown = ", ".join(f"{a:.1f} % (k={k})" for k, a in accuracy.items())
    where = " within --val" if neighbours is images.val else ""
    monitor.say(f"step {step}: k-NN of the teacher{where} {shown}")
    return {f"knn_{k}": a for k, a in accuracy.items()}


def _abort_if_stopping(run: Run, done: int) -> None:
    """End an evaluation, of which `done` images are done, where a single process was asked to stop.

    The next update then saves and leaves. Several processes finish the evaluation first.
    """
    if run.asked_to_stop:
        raise KeyboardInterrupt


def draw(update: Update, images: Images, run: Run, monitor: Monitor) -> None:
    """Draw the curves and, for a ViT, attention maps, and print where everything is. All ranks call it."""
    backbone: Any = update.teacher_backbone()
    if distributed.rank() > 0:
        return
    monitor.say(f"curves     {plot_curves(run.out, math.log(resolved(update.config.model.out_dim)))}")
    examples = some_images(images.val or images.source, 8)
    if examples and hasattr(backbone, "get_last_selfattention"):
        policy, path = update.config.data.crops, run.out / "attention.png"
        monitor.say(f"attention  {plot_attention(backbone, examples, policy, path, update.device)}")
    monitor.say(f"teacher    {run.teacher}")


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def waiting_advice(images: Images, loader: data.Loader, device: torch.device) -> str:
    """What to do where training waits for images."""
    cores, dali = data.cores(), images.loader_kind == "dali"
    hints = [
        f"more --workers ({loader.workers} now, on {cores} cores)" if loader.workers < cores else "",
        "--loader dali" if not dali and device.type == "cuda" else "",
        "--jpeg-scaling (a begun run wants --change) if the photographs are far larger than the crops"
        if not dali
        else "",
        "shards (fastdino-data pack; --change) if many small files are what is slow, or a faster disk",
    ]
    return "training waits for images; what may help: " + "; ".join(hint for hint in hints if hint)


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far in GB: of the GPU, or of this process without the loader's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def some_images(source: Source, n: int) -> list[Image.Image]:
    """Up to `n` readable images, evenly spread over the source."""
    images = []
    for i in np.unique(np.linspace(0, len(source) - 1, n).astype(int)):
        try:
            images.append(source.load(int(i)))
        except Unreadable:
            continue
    return images


def command(config: Config, **types: Any) -> None:
    """`train` as a command: what it raises becomes a line on stderr, from one rank, and an exit code.

    Args:
        config: the run.
        types: `update_type` and `feed_type` of `train`.
    """

    def work() -> None:
        train(config, **types)

    rank, ranks = distributed.launch()[:2]
    title = "fastdino-train" + (f", rank {rank}" if ranks > 1 else "")
    try:
        cli.run("fastdino-train", work, errors=(Unreadable,))
    except Interrupted as stopped:
        if rank == 0:
            print(f"fastdino-train: {stopped}", file=sys.stderr)
        sys.exit(130 if stopped.signum == signal.SIGINT else REQUEUE)
    except RunError as error:  # the same on all ranks
        sys.exit(f"fastdino-train: {error}" if rank == 0 else 1)
    except torch.OutOfMemoryError as error:
        sys.exit(f"{title}: out of memory: raise --accumulate, same result in less memory.\n{error}")
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        sys.exit(f"{title}: torch.compile failed; --compile off goes on without it.\n{error}")


def main() -> None:
    """Entry point of `fastdino-train`."""
    try:
        config = tyro.extras.overridable_config_cli(
            PRESETS, prog="fastdino-train", description=__doc__, config=(tyro.conf.OmitArgPrefixes,)
        )
    except SystemExit as stopped:
        for hint in hints(sys.argv[1:]) if stopped.code else ():
            print(f"fastdino-train: {hint}", file=sys.stderr)
        raise
    command(config)


if __name__ == "__main__":
    main()
