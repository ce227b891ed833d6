"""`fastdino-train PRESET --data DIR --out DIR`: train official DINO on any folder of images."""

import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from fastdino import checkpoint, data, ops, optim
from fastdino.config import PRESETS, Config, to_dict
from fastdino.data import crops
from fastdino.data.sources import Source, Unreadable, open_source
from fastdino.dino import DINO
from fastdino.distributed import choose_device, parallelize
from fastdino.eval.attention import plot_attention
from fastdino.eval.knn import check_classes, evaluate_knn
from fastdino.monitor import Monitor, plot_curves, read_metrics


class RunError(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


class Interrupted(Exception):
    """The process was asked to stop, and what it had is saved."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that Ctrl-C and SIGTERM append to, so that the loop can save and leave; the second kills."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may set handlers
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def catch(signum: int, frame: object) -> None:
        caught.append(signum)
        signal.signal(signum, before[signal.Signals(signum)])

    for s in before:
        signal.signal(s, catch)
    try:
        yield caught
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The compute type that --precision names; auto takes bf16 where the device computes it natively."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def step_seed(seed: int, step: int) -> int:
    """Seed of the random numbers within a step (stochastic depth), so that a continued run draws the same."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0])


def train(config: Config) -> dict[str, Any]:
    """Train DINO as `config` says, or go on with the run in `config.run.out`; returns the last metrics.

    Leaves there config.json, metrics.jsonl, tensorboard/, checkpoints/, teacher.safetensors, curves.png and,
    for a ViT, attention.png.

    Raises:
        ValueError, FileNotFoundError: a configuration, folder or machine that cannot work; before any work.
        RunError: too many unreadable files or non-finite steps.
        Interrupted: Ctrl-C or SIGTERM, after saving.
    """
    cfg, policy = config.optim, config.data.crops
    if not config.data.data:
        raise ValueError("--data is missing: give a folder of images, or a text file with one path a line")
    if not config.run.out:
        raise ValueError("--out is missing: give a folder for the run's files")
    device = choose_device(config.run.device)
    dtype = choose_precision(config.run.precision, device)
    source = open_source(config.data.data)
    val = open_source(config.data.val) if config.data.val else None
    if val is not None:
        check_classes(source, val)
    steps_per_epoch = data.steps_per_epoch(len(source), cfg.batch_size)
    total = cfg.epochs * steps_per_epoch
    out = Path(config.run.out)
    if Path(config.data.data).is_dir() and out.resolve().is_relative_to(Path(config.data.data).resolve()):
        raise ValueError(
            f"--out {out} lies in --data {config.data.data}, whose images it would join: move it"
        )
    note = data.crop_size_warning(source, policy)
    resumes = bool(checkpoint.checkpoints(out))
    if cfg.head_warmup_steps >= total:
        raise ValueError(
            f"--head-warmup-steps {cfg.head_warmup_steps}: the run has {total} updates, give fewer than those"
        )

    # The network, from the seed alone.
    torch.manual_seed(config.run.seed)
    dino = DINO(config)
    begun_from = dino.load_weights(config.model.init_from) if config.model.init_from and not resumes else []
    dino.to(device).train()
    for network in (dino.student, dino.teacher):
        parallelize(network.backbone, config.run, device)
    optimizer = optim.make_optimizer(dino.student, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    tensors = dino.state_dict() | {
        f"optimizer.{name}": value for name, value in optim.optimizer_tensors(dino.student, optimizer).items()
    }
    # Put back if a step is not finite: the centre, and the statistics of batch norm.
    buffers = [b for b in dino.buffers() if b.is_floating_point()]

    with checkpoint.claim(out, config), stop_signals() as caught:
        # Continue where the last checkpoint ends.
        start, unreadable, skipped = 0, {"run": set[str](), "epoch": set[str]()}, 0
        if found := checkpoint.checkpoints(out):
            start, path = list(found.items())[-1]
            info = checkpoint.load(path, tensors)
            if info["images"] != source.fingerprint():
                raise ValueError(
                    f"{config.data.data} holds other images than when {out} was begun: a continued run would "
                    "see other crops. Restore the images, or give another --out."
                )
            if info["precision"] != str(dtype):
                raise ValueError(
                    f"{out} was trained in {info['precision']}, not {dtype}: say so with --precision, or "
                    "give another --out"
                )
            scaler.load_state_dict(info["scaler"])
            unreadable = {key: set(paths) for key, paths in info["unreadable"].items()}
            skipped = info["skipped"]
        if not resumes or checkpoint.teacher_step(out) != start:  # or a kill fell between the two files
            checkpoint.write_teacher(out / "teacher.safetensors", dino.teacher, config, start)

        with Monitor(out, start, total, to_dict(config), config.run.wandb) as monitor:
            loader = data.make_loader(
                source,
                policy,
                batch_size=cfg.batch_size,
                pieces=cfg.accumulate,
                seed=config.run.seed,
                start_step=start,
                total_steps=total,
                workers=config.data.workers,
                pin=device.type == "cuda",
            )
            monitor.say(
                f"{device_name(device)} · {str(dtype).removeprefix('torch.')} · "
                + " · ".join(f"{op}: {impl}" for op, impl in ops.describe(device).items())
                + f" · {len(source)} images, {loader.workers} loader processes · "
                f"{cfg.epochs} epochs of {steps_per_epoch} updates of {cfg.batch_size} images"
            )
            for line in (*begun_from, note):
                if line:
                    monitor.say(line)
            if start:
                what = "is complete" if start == total else "is continued"
                monitor.say(f"{out} {what}: step {start} of {total}")
            if cfg.warmup_epochs > cfg.epochs or config.method.warmup_teacher_temp_epochs > cfg.epochs:
                monitor.say("a warm-up longer than the run was shortened to its published share of it")

            def save(step: int) -> None:
                info = {
                    "images": source.fingerprint(),
                    "precision": str(dtype),
                    "scaler": scaler.state_dict(),
                    "unreadable": {key: sorted(paths) for key, paths in unreadable.items()},
                    "skipped": skipped,
                }
                checkpoint.save(out, step, tensors, info)
                checkpoint.write_teacher(out / "teacher.safetensors", dino.teacher, config, step)
                checkpoint.prune(out, config.run.keep, config.run.keep_every_epochs * steps_per_epoch)

            def evaluate() -> dict[str, float]:
                def heed(images: int) -> None:
                    if caught:
                        raise KeyboardInterrupt  # ends the evaluation; the loop then saves and leaves

                dino.teacher.eval()
                try:
                    accuracy = evaluate_knn(
                        dino.teacher.backbone,
                        source,
                        val,
                        policy,
                        limit=config.run.knn_images,
                        device=device,
                        workers=loader.workers,
                        progress=heed,
                    )
                except KeyboardInterrupt:
                    return {}
                except ValueError as error:
                    monitor.say(f"step {step + 1}: no k-NN: {error}")
                    return {}
                finally:
                    dino.teacher.train()
                monitor.say(
                    f"step {step + 1}: k-NN of the teacher "
                    + ", ".join(f"{a:.1f} % (k={k})" for k, a in accuracy.items())
                )
                return {f"knn_{k}": a for k, a in accuracy.items()}

            batches = iter(loader)
            warmup, head_only = optim.warmup_steps(cfg, steps_per_epoch), cfg.head_warmup_steps
            milestone = config.run.keep_every_epochs * steps_per_epoch
            # Loss and gradient norm of each step since the last log line, read when logging.
            history = torch.zeros(config.run.log_every, 2, device=device)
            since: list[tuple[int, float, list[Tensor]]] = []  # step, lr and images of each row of it
            values: dict[str, Any] = (read_metrics(out) or [{}])[-1] if start == total else {}
            in_a_row, waited, paused, began = 0, 0.0, 0.0, time.perf_counter()

            for step in range(start, total):
                epoch, in_epoch = divmod(step, steps_per_epoch)
                last_of_epoch = in_epoch == steps_per_epoch - 1
                if in_epoch == 0:
                    unreadable["epoch"] = set()

                # Schedules.
                lr = optim.peak_lr(cfg) * (step + 1) / max(head_only, 1)
                if step >= head_only:
                    lr = optim.cosine(
                        step - head_only, optim.peak_lr(cfg), cfg.min_lr, total - head_only, warmup
                    )
                weight_decay = optim.cosine(step, cfg.weight_decay, cfg.weight_decay_end, total)
                momentum = optim.cosine(step, config.method.momentum_teacher, 1.0, total)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.param_groups[0]["weight_decay"] = weight_decay
                torch.manual_seed(step_seed(config.run.seed, step))

                # Loss and gradient of the batch, piece by piece.
                kept = [b.clone() for b in buffers]
                loss = torch.zeros((), device=device)
                means, seen = [], []
                for _ in range(cfg.accumulate):
                    waiting = time.perf_counter()
                    batch = next(batches)
                    waited += time.perf_counter() - waiting
                    seen.append(batch.indices)
                    unreadable["epoch"].update(batch.unreadable)
                    for name, reason in zip(batch.unreadable, batch.reasons, strict=True):
                        if name not in unreadable["run"]:
                            monitor.say(f"step {step + 1}: skipped {name}: {reason}")
                    unreadable["run"].update(batch.unreadable)
                    views = [crops.normalize(v.to(device, non_blocking=True), policy) for v in batch.views]
                    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                        piece, mean = dino(views, epoch, step < head_only)
                    scaler.scale(piece / cfg.accumulate).backward()
                    loss += piece.detach() / cfg.accumulate
                    means.append(mean)

                # The student's step, which changes nothing where loss or gradient is not finite.
                scaler.unscale_(optimizer)
                if epoch < cfg.freeze_last_layer:
                    optim.drop_last_layer_gradients(dino.student)
                norm = optim.clip_gradients(dino.student, cfg.clip_grad, cfg.clip)
                finite = torch.isfinite(loss)
                if config.method.teacher_update == "previous_iteration":
                    dino.update_teacher(momentum)
                if scaler.is_enabled():
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.found_inf = (~(finite & torch.isfinite(norm))).float()  # type: ignore[attr-defined]
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)

                # Centre and teacher, once an update.
                dino.loss.update_center(torch.stack(means))
                for buffer, old in zip(buffers, kept, strict=True):
                    buffer.copy_(torch.where(finite, buffer, old))
                if config.method.teacher_update != "previous_iteration":
                    dino.update_teacher(momentum, new_epoch=last_of_epoch)
                history[len(since)] = torch.stack((loss, norm.to(loss.dtype)))
                since.append((step + 1, lr, seen))

                # What a person sees: the only place that waits for the device.
                done = step + 1
                stopping = bool(caught)  # looked at once: a later signal waits for the next step's save
                save_due = done == total or done % config.run.save_every == 0 or stopping
                save_due |= bool(milestone) and done % milestone == 0
                if done % config.run.log_every == 0 or last_of_epoch or save_due:
                    rows = history[: len(since)].tolist()
                    elapsed = time.perf_counter() - began - paused
                    for (at, its_lr, images), (its_loss, its_norm) in zip(since, rows, strict=True):
                        if math.isfinite(its_loss) and math.isfinite(its_norm):
                            in_a_row = 0
                            continue
                        in_a_row, skipped = in_a_row + 1, skipped + 1
                        # fp16 gradients overflow now and then; the scaler lowers its scale.
                        if not (math.isfinite(its_loss) and scaler.is_enabled()):
                            report_nonfinite(monitor, source, at, its_lr, its_loss, images)
                        if in_a_row >= config.run.max_nonfinite:
                            raise RunError(
                                f"stopped at step {at}: {in_a_row} non-finite steps in a row. "
                                f"{last_good(out)} Lower --lr, or use --precision bf16 or fp32."
                            )
                    good = [row for row in rows if math.isfinite(row[0])]
                    values = {
                        "epoch": epoch,
                        "loss": float(np.mean([row[0] for row in good])) if good else math.nan,
                        "grad_norm": rows[-1][1],
                        "lr": lr,
                        "weight_decay": weight_decay,
                        "momentum": momentum,
                        "teacher_temp": float(dino.loss.teacher_temp_schedule[epoch]),
                        "images_per_s": len(since) * cfg.batch_size / elapsed,
                        "data_wait": waited / elapsed,
                        "memory_gb": peak_memory_gb(device),
                        "unreadable": len(unreadable["run"]),
                        "skipped": skipped,
                    }
                    every = config.run.knn_every_epochs
                    due = every and last_of_epoch and ((epoch + 1) % every == 0 or done == total)
                    if due and source.labels is not None and not stopping:
                        values |= evaluate()
                    monitor.record(done, values)
                    monitor.progress(done, values | {"batch_size": cfg.batch_size})
                    since.clear()
                    waited, paused, began = 0.0, 0.0, time.perf_counter()
                if len(unreadable["epoch"]) > config.data.max_unreadable * len(source):
                    raise RunError(
                        f"{len(unreadable['epoch'])} of {len(source)} files could not be read, more than "
                        f"--max-unreadable {config.data.max_unreadable:g} allows. Repair or remove them, or "
                        "raise it:\n  " + "\n  ".join(sorted(unreadable["epoch"]))
                    )

                if save_due:
                    pause = time.perf_counter()
                    save(done)
                    paused += time.perf_counter() - pause
                if stopping and done < total:
                    raise Interrupted(
                        caught[0], f"saved {out} at step {done} of {total}; the same command continues it"
                    )

            # What is left to look at.
            monitor.say(f"curves     {plot_curves(out, math.log(config.model.out_dim))}")
            examples = some_images(val or source, 8)
            if examples and hasattr(dino.teacher.backbone, "get_last_selfattention"):
                path = plot_attention(
                    dino.teacher.backbone.eval(), examples, policy, out / "attention.png", device
                )
                monitor.say(f"attention  {path}")
            monitor.say(f"teacher    {out / 'teacher.safetensors'}")
    return {"step": total, **values}


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far in GB: of the GPU, or of this process without the loader's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def report_nonfinite(
    monitor: Monitor, source: Source, step: int, lr: float, loss: float, pieces: list[Tensor]
) -> None:
    """Say which step was skipped, and with which images; all their names go to metrics.jsonl."""
    names = [source.path(int(i)) for piece in pieces for i in piece]
    what = f"loss is {loss}" if not math.isfinite(loss) else "gradient is not finite"
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more (metrics.jsonl)" if len(names) > 4 else "")
    monitor.say(f"step {step}: {what} at learning rate {lr:.3g}, skipped; images {shown}")
    monitor.record(step, {"nonfinite": what, "lr": lr, "images": names})


def last_good(out: Path) -> str:
    """A sentence on the newest checkpoint."""
    found = list(checkpoint.checkpoints(out).values())
    return f"The last good checkpoint is {found[-1]}." if found else "No checkpoint had been written yet."


def some_images(source: Source, n: int) -> list[Image.Image]:
    """Up to `n` readable images, evenly spread over the source."""
    images = []
    for i in np.unique(np.linspace(0, len(source) - 1, n).astype(int)):
        try:
            images.append(source.load(int(i)))
        except Unreadable:
            continue
    return images


def main() -> None:
    """Entry point of `fastdino-train`."""
    config = tyro.extras.overridable_config_cli(
        PRESETS, prog="fastdino-train", description=__doc__, config=(tyro.conf.OmitArgPrefixes,)
    )
    try:
        train(config)
    except Interrupted as stopped:
        print(f"fastdino-train: {stopped}", file=sys.stderr)
        sys.exit(128 + stopped.signum)
    except torch.OutOfMemoryError as error:
        sys.exit(f"fastdino-train: out of memory: raise --accumulate, same result in less memory.\n{error}")
    except (ValueError, OSError, RunError, Unreadable) as error:
        sys.exit(f"fastdino-train: {error}")


if __name__ == "__main__":
    main()
