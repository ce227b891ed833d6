"""`fastdino-train PRESET --data DIR --out DIR`: train official DINO on any folder of images.

On several GPUs: `torchrun --nproc-per-node N -m fastdino.train PRESET ...`, or fastdino-train under srun.
"""

import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from fastdino import checkpoint, data, distributed, ops, optim
from fastdino.backbones import build_backbone
from fastdino.config import PRESETS, Config, number, settle, to_dict
from fastdino.data import crops
from fastdino.data.sources import Source, Unreadable, open_source
from fastdino.dino import DINO
from fastdino.eval.attention import plot_attention
from fastdino.eval.knn import check_classes, evaluate_knn
from fastdino.monitor import VITALS, Doctor, Monitor, plot_curves, read_metrics

# What a process that was told to go exits with, once all is saved: EX_TEMPFAIL of sysexits.h, "temporary
# failure, run me again". Ctrl-C has 130, as everywhere.
REQUEUE = 75
DATA_WAIT = 0.05  # share of the time spent waiting for images from which on the user is told what to do


class RunError(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


class Interrupted(Exception):
    """The process was asked to stop, and what it had is saved."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that Ctrl-C, SIGTERM and SIGUSR1 append to, so that the loop can save and leave.

    The second one of a kind kills.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may set handlers
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

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


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of the random numbers within a step (stochastic depth), so that a continued run draws the same.

    Ranks draw apart from one another: each has samples of its own.
    """
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


def settle_for(config: Config, images: int) -> tuple[Config, list[str]]:
    """`config.settle` for a run on so many images; ValueError if network or batch cannot be."""
    with torch.device("meta"):
        backbone = build_backbone(config.model, config.data.crops.global_crops_size)
    updates = config.optim.epochs * data.steps_per_epoch(images, config.optim.batch_size)
    return settle(config, images, updates, getattr(backbone, "embed_dim", 384))


def train(config: Config) -> dict[str, Any]:
    """Train DINO as `config` says, or go on with the run in `config.run.out`; returns the last metrics.

    Leaves there config.json, metrics.jsonl, tensorboard/, checkpoints/, teacher.safetensors, curves.png and,
    for a ViT, attention.png. Where torchrun or srun has launched several processes, each calls this: together
    they do what one would.

    Raises:
        ValueError, FileNotFoundError: a configuration, folder or machine that cannot work; before any work.
        RunError: too many unreadable files or non-finite steps, or a last checkpoint that cannot be written.
        Interrupted: Ctrl-C, SIGTERM or SIGUSR1, after saving.
        ElsewhereError: another process failed, and says why.
    """
    with distributed.joined(config.run.device, config.run.parallel) as device:
        return _train(config, device)


def _train(config: Config, device: torch.device) -> dict[str, Any]:
    cfg, policy = config.optim, config.data.crops
    rank, ranks = distributed.rank(), distributed.ranks()
    with distributed.together():
        if not config.data.data:
            raise ValueError(
                "--data is missing: give a folder of images, or a text file with one path a line"
            )
        if not config.run.out:
            raise ValueError("--out is missing: give a folder for the run's files")
        dtype = choose_precision(config.run.precision, device)
        source = open_source(config.data.data)
        val = open_source(config.data.val) if config.data.val else None
        if val is not None:
            check_classes(source, val)
        steps_per_epoch = data.steps_per_epoch(len(source), cfg.batch_size)
        data.share_of(cfg.batch_size, cfg.accumulate, ranks)
        total = cfg.epochs * steps_per_epoch
        config, settled = settle_for(config, len(source))
        cfg = config.optim
        out = Path(config.run.out)
        if Path(config.data.data).is_dir() and out.resolve().is_relative_to(Path(config.data.data).resolve()):
            raise ValueError(
                f"--out {out} lies in --data {config.data.data}, whose images it would join: move it"
            )
        if cfg.head_warmup_steps >= total:
            raise ValueError(
                f"--head-warmup-steps {cfg.head_warmup_steps}: the run has {total} updates, give fewer than "
                "those"
            )
        fingerprint = source.fingerprint()
    note = distributed.on_first(lambda: data.crop_size_warning(source, policy))
    resumes = distributed.on_first(lambda: bool(checkpoint.checkpoints(out)))
    with distributed.together():
        if any(other != fingerprint for other in distributed.gather(fingerprint)):
            raise ValueError(f"the ranks see different images in {config.data.data}: give all the same ones")

    # The network, from the seed alone.
    torch.manual_seed(config.run.seed)
    with distributed.together():
        dino = DINO(config)
        begun_from = (
            dino.load_weights(config.model.init_from) if config.model.init_from and not resumes else []
        )
        dino.to(device).train()
    parallel = distributed.choose_parallel(config.run.parallel, dino.student.backbone)
    student = distributed.parallelize(
        dino.student, config.run, device, dtype, partly=cfg.head_warmup_steps > 0
    )
    distributed.parallelize(dino.teacher, config.run, device, dtype, trained=False)
    optimizer = optim.make_optimizer(dino.student, cfg)
    sharded = any(map(distributed.is_sharded, dino.teacher.parameters()))
    # Over shards an overflow on any rank is one on all.
    grad_scaler = ShardedGradScaler if sharded else torch.amp.GradScaler
    scaler = grad_scaler(device.type, enabled=dtype == torch.float16)
    # Put back if a step is not finite: the centre, and the statistics of batch norm.
    buffers = [b for b in dino.buffers() if b.is_floating_point()]

    def tensors() -> dict[str, Tensor]:
        return dino.state_dict() | {
            f"optimizer.{name}": value
            for name, value in optim.optimizer_tensors(dino.student, optimizer).items()
        }

    with ExitStack() as stack:

        def claim() -> None:
            stack.enter_context(checkpoint.claim(out, config))

        distributed.on_first(claim)
        caught = stack.enter_context(stop_signals())
        milestone = config.run.keep_every_epochs * steps_per_epoch
        saver = stack.enter_context(closing(checkpoint.Saver(out, config.run.keep, milestone)))

        # Continue where the last checkpoint ends.
        unreadable, skipped = {"run": set[str](), "epoch": set[str]()}, 0
        with distributed.together():
            start, info, damaged = checkpoint.load_newest(out, tensors())
            if start and info["images"] != fingerprint:
                raise ValueError(
                    f"{config.data.data} holds other images than when {out} was begun: a continued run would "
                    "see other crops. Restore the images, or give another --out."
                )
            if start and info["precision"] != str(dtype):
                raise ValueError(
                    f"{out} was trained in {info['precision']}, not {dtype}: say so with --precision, or "
                    "give another --out"
                )
        if start:
            scaler.load_state_dict(info["scaler"])
            unreadable = {key: set(paths) for key, paths in info["unreadable"].items()}
            skipped = info["skipped"]
        teacher = out / "teacher.safetensors"
        # At the start, or where a kill fell between the two files.
        if not resumes or distributed.on_first(lambda: checkpoint.teacher_step(out)) != start:
            state = checkpoint.copied(dino.teacher)
            distributed.on_first(lambda: checkpoint.write_teacher(teacher, state, config, start))
            del state

        monitor = stack.enter_context(
            Monitor(out, start, total, to_dict(config), config.run.wandb, quiet=rank > 0)
        )
        how, about_loader = data.choose_loader(config.data.loader, device)
        loader = data.make_loader(
            source,
            policy,
            batch_size=cfg.batch_size,
            pieces=cfg.accumulate,
            seed=config.run.seed,
            start_step=start,
            total_steps=total,
            workers=config.data.workers,
            device=device,
            loader=how,
            shuffle_buffer=config.data.shuffle_buffer,
            jpeg_scaling=config.data.jpeg_scaling,
            rank=rank,
            ranks=ranks,
            local_ranks=distributed.place().local_ranks,
        )
        left_out = len(source) - steps_per_epoch * cfg.batch_size
        monitor.say(
            (
                f"{ranks} rank{'s' * (ranks > 1)}, {parallel} · "
                if sharded or student is not dino.student
                else ""
            )
            + f"{device_name(device)} · {str(dtype).removeprefix('torch.')} · "
            + " · ".join(f"{op}: {impl}" for op, impl in ops.describe(device).items())
            + f" · crops: {crops.describe(device if how == 'dali' else 'cpu')}"
            + f" · {len(source)} images, {loader.workers} loader processes"
            + (" a rank" if ranks > 1 else "")
            + (" and DALI" if how == "dali" else "")
            + f" · {cfg.epochs} epochs of {steps_per_epoch} updates of {cfg.batch_size} images"
            + (f", {left_out} left out of each" if left_out else "")
        )
        doctor = Doctor(config, ranks)
        for line in (*settled, *begun_from, note, about_loader, *source.notes, *damaged, *doctor.before()):
            if line:
                monitor.say(line)
        if start:
            what = "is complete" if start == total else "is continued"
            monitor.say(f"{out} {what}: step {start} of {total}")
        if cfg.warmup_epochs > cfg.epochs or config.method.warmup_teacher_temp_epochs > cfg.epochs:
            monitor.say("a warm-up longer than the run was shortened to its published share of it")

        def saved() -> str:
            """Wait for the last checkpoint; says what is wrong with it, if anything."""
            if error := saver.finish():
                monitor.say(f"{error}. {last_good(out)}")
            return error

        def save(step: int) -> None:
            saved()
            info = {
                "images": fingerprint,
                "precision": str(dtype),
                "scaler": scaler.state_dict(),
                "unreadable": {key: sorted(paths) for key, paths in unreadable.items()},
                "skipped": skipped,
            }
            state = checkpoint.copied(dino.teacher)
            saver.save(step, tensors(), info, lambda: checkpoint.write_teacher(teacher, state, config, step))

        def plain_backbone() -> torch.nn.Module:
            """The teacher's backbone in evaluation mode; a copy where it is sharded, on all ranks."""
            backbone = dino.teacher.backbone
            if not sharded:
                return backbone.eval()
            copy = build_backbone(config.model, policy.global_crops_size)
            copy.load_state_dict({n: distributed.whole(t) for n, t in backbone.state_dict().items()})
            return copy.to(device).eval()

        def evaluate() -> dict[str, float]:
            def heed(images: int) -> None:
                if caught and ranks == 1:
                    raise KeyboardInterrupt  # ends the evaluation; the loop then saves and leaves

            try:
                accuracy = evaluate_knn(
                    plain_backbone(),
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
        momentum_at_start = number(config.method.momentum_teacher)
        warmup, head_only = optim.warmup_steps(cfg, steps_per_epoch), cfg.head_warmup_steps
        # Of each step since the last log line: loss, gradient norm, and the means over ranks of: whether to
        # stop, unreadable files, seconds waited for data, images left to Pillow, and of the last step VITALS.
        # Read when logging.
        history = torch.zeros(config.run.log_every, 6 + len(VITALS), device=device)
        no_vitals = torch.zeros(len(VITALS), device=device)
        since: list[tuple[int, float, list[Tensor]]] = []  # step, lr and this rank's images of each row of it
        failed: list[tuple[int, str, str]] = []  # step, path and reason of this rank's unreadable files since
        values: dict[str, Any] = (read_metrics(out) or [{}])[-1] if start == total else {}
        in_a_row, paused, began = 0, 0.0, time.perf_counter()
        by_pillow, lines, advice = 0, 0, waiting_advice(how, loader.workers, device)

        for step in range(start, total):
            epoch, in_epoch = divmod(step, steps_per_epoch)
            last_of_epoch = in_epoch == steps_per_epoch - 1
            if in_epoch == 0:
                unreadable["epoch"] = set()
            done = step + 1
            save_due = done == total or done % config.run.save_every == 0
            save_due |= bool(milestone) and done % milestone == 0
            logged = done % config.run.log_every == 0 or last_of_epoch or save_due

            # Schedules.
            lr = optim.peak_lr(cfg) * (step + 1) / max(head_only, 1)
            if step >= head_only:
                lr = optim.cosine(step - head_only, optim.peak_lr(cfg), cfg.min_lr, total - head_only, warmup)
            weight_decay = optim.cosine(step, cfg.weight_decay, cfg.weight_decay_end, total)
            momentum = optim.cosine(step, momentum_at_start, 1.0, total)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.param_groups[0]["weight_decay"] = weight_decay
            torch.manual_seed(step_seed(config.run.seed, step, rank))

            # Loss and gradient of the batch, piece by piece.
            kept = [b.clone() for b in buffers]
            loss = torch.zeros((), device=device)
            means, seen, waited, files, left = [], [], 0.0, len(failed), 0
            for piece in range(cfg.accumulate):
                waiting = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - waiting
                seen.append(batch.indices)
                left += batch.by_pillow
                failed += [(step + 1, *its) for its in zip(batch.unreadable, batch.reasons, strict=True)]
                views = [crops.normalize(v.to(device, non_blocking=True), policy) for v in batch.views]
                last = piece == cfg.accumulate - 1
                examine = logged and last
                with distributed.communicating(student, gradients=last):
                    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                        its_loss, mean = dino(views, epoch, step < head_only, student, examine)
                    loss += its_loss.detach() / cfg.accumulate
                    means.append(mean)
                    if last:
                        # What all ranks must know, on its way while the backward pass runs.
                        stop, unread = float(bool(caught)), float(len(failed) - files)
                        extras = [torch.full((), x, device=device) for x in (stop, unread, waited, left)]
                        parts = (
                            torch.stack((loss, *extras)),
                            dino.vitals if examine else no_vitals,
                            torch.stack(means).mean(dim=0),
                        )
                        shared = distributed.start_mean(torch.cat(parts))
                    scaler.scale(its_loss / cfg.accumulate).backward()

            # The student's step, which changes nothing where loss or gradient is not finite.
            if epoch < cfg.freeze_last_layer:
                optim.drop_last_layer_gradients(dino.student)
            optim.hand_over_gradients(optimizer)
            scaler.unscale_(optimizer)
            norm = optim.clip_gradients(dino.student, cfg.clip_grad, cfg.clip)
            loss, others, teacher_mean = shared().split([1, 4 + len(VITALS), len(mean)])
            finite = torch.isfinite(loss)
            if config.method.teacher_update == "previous_iteration":
                dino.update_teacher(momentum)
            # Not by scaler.step: over ranks its found_inf may be 2, which torch's fused steps take for 0.
            optimizer.found_inf = (~(finite[0] & torch.isfinite(norm))).float()  # type: ignore[attr-defined]
            optimizer.step()
            if scaler.is_enabled():
                scaler.update()
            optimizer.zero_grad(set_to_none=True)
            dino.student.zero_grad(set_to_none=True)  # what its shards are of

            # Centre and teacher, once an update.
            dino.loss.move_center(teacher_mean)
            for buffer, old in zip(buffers, kept, strict=True):
                buffer.copy_(torch.where(finite, buffer, old))
            if config.method.teacher_update != "previous_iteration":
                dino.update_teacher(momentum, new_epoch=last_of_epoch)
            history[len(since)] = torch.cat((loss, norm.reshape(1).to(loss.dtype), others))
            since.append((step + 1, lr, seen))

            # What a person sees: the only place that waits for the device.
            stopping = stop > 0 and ranks == 1
            if not (logged or stopping):
                continue
            distance = dino.teacher_distance()
            rows = history[: len(since)].tolist()
            elapsed = time.perf_counter() - began - paused
            stopping = any(row[2] for row in rows)  # on any rank, and so on all of them
            save_due |= stopping
            if any(row[3] for row in rows):
                for at, name, reason in sorted(chain.from_iterable(distributed.gather(failed))):
                    unreadable["epoch"].add(name)
                    if name not in unreadable["run"]:
                        monitor.say(f"step {at}: skipped {name}: {reason}")
                    unreadable["run"].add(name)
            failed.clear()
            for (at, its_lr, images), (a_loss, a_norm, *_) in zip(since, rows, strict=True):
                if math.isfinite(a_loss) and math.isfinite(a_norm):
                    in_a_row = 0
                    continue
                in_a_row, skipped = in_a_row + 1, skipped + 1
                # fp16 gradients overflow now and then; the scaler lowers its scale.
                if not (math.isfinite(a_loss) and scaler.is_enabled()):
                    names = distributed.gather([source.path(int(i)) for piece in images for i in piece])
                    report_nonfinite(monitor, at, its_lr, a_loss, [*chain.from_iterable(names)])
                if in_a_row >= config.run.max_nonfinite:
                    saved()
                    raise RunError(
                        f"stopped at step {at}: {in_a_row} non-finite steps in a row. "
                        f"{last_good(out)} Lower --lr, or use --precision bf16 or fp32."
                    )
            by_pillow += round(sum(row[5] for row in rows) * ranks)
            data_wait = sum(row[4] for row in rows) / elapsed
            lines += 1
            # The first line's has the workers' start in it.
            if advice and lines > 1 and data_wait > DATA_WAIT:
                monitor.say(f"step {done}: {data_wait:.0%} of the time {advice}")
                advice = ""
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
                "data_wait": data_wait,
                "memory_gb": peak_memory_gb(device),
                "unreadable": len(unreadable["run"]),
                "skipped": skipped,
            }
            if logged and math.isfinite(rows[-1][0]):
                values |= dict(zip(VITALS, rows[-1][6:], strict=True))
                values |= {
                    "kl": rows[-1][0] - values["teacher_entropy"],
                    "center_norm": dino.loss.center.norm().item(),
                    "teacher_distance": distance.item(),
                }
            for sentence in doctor.examine(done, values, last_of_epoch) if logged else ():
                monitor.say(f"step {done}: {sentence}")
            if how == "dali":
                values["decoded_by_pillow"] = by_pillow
            if device.type == "cuda":  # torch's, DALI's, the context's, and that of other processes
                free, its = torch.cuda.mem_get_info(device)
                values["device_memory_gb"] = (its - free) / 1e9
            every = config.run.knn_every_epochs
            due = every and last_of_epoch and ((epoch + 1) % every == 0 or done == total)
            if due and source.labels is not None and not stopping:
                values |= evaluate()
            monitor.record(done, values)
            monitor.progress(done, values | {"batch_size": cfg.batch_size})
            since.clear()
            paused, began = 0.0, time.perf_counter()
            if len(unreadable["epoch"]) > config.data.max_unreadable * len(source):
                saved()
                raise RunError(
                    f"{len(unreadable['epoch'])} of {len(source)} files could not be read, more than "
                    f"--max-unreadable {config.data.max_unreadable:g} allows. Repair or remove them, or "
                    "raise it:\n  " + "\n  ".join(sorted(unreadable["epoch"]))
                )

            if save_due:
                pause = time.perf_counter()
                save(done)
                if (stopping or done == total) and (error := saved()):
                    raise RunError(
                        f"{error}. {last_good(out)} Make room, then the same command goes on there."
                    )
                paused += time.perf_counter() - pause
            if stopping and done < total:
                raise Interrupted(
                    caught[0] if caught else signal.SIGTERM,
                    f"saved {out} at step {done} of {total}; the same command continues it",
                )

        # What is left to look at.
        if rank == 0:
            monitor.say(f"curves     {plot_curves(out, math.log(number(config.model.out_dim)))}")
        backbone: Any = plain_backbone()
        if rank == 0:
            examples = some_images(val or source, 8)
            if examples and hasattr(backbone, "get_last_selfattention"):
                path = plot_attention(backbone, examples, policy, out / "attention.png", device)
                monitor.say(f"attention  {path}")
            monitor.say(f"teacher    {teacher}")
        distributed.gather(None)  # a launcher may end those that outlast the others
    return {"step": total, **values}


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def waiting_advice(loader: str, workers: int, device: torch.device) -> str:
    """What to do where training waits for images."""
    cores = data.cores()
    hints = [
        f"more --workers ({workers} now, on {cores} cores)" if workers < cores else "",
        "--loader dali" if loader != "dali" and device.type == "cuda" else "",
        "--jpeg-scaling if the photographs are far larger than the crops" if loader != "dali" else "",
        "shards (fastdino-data pack) if many small files are what is slow, or a faster disk",
    ]
    return "training waits for images; what may help: " + "; ".join(hint for hint in hints if hint)


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far in GB: of the GPU, or of this process without the loader's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def report_nonfinite(monitor: Monitor, step: int, lr: float, loss: float, names: list[str]) -> None:
    """Say which step was skipped, and with which images; all their names go to metrics.jsonl."""
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


def command(config: Config) -> None:
    """`train` as a command: what it raises becomes a line on stderr, said by one rank, and an exit code."""
    rank, ranks = distributed.place()[:2]
    name = "fastdino-train" + (f", rank {rank}" if ranks > 1 else "")
    try:
        train(config)
    except Interrupted as stopped:
        if rank == 0:
            print(f"fastdino-train: {stopped}", file=sys.stderr)
        sys.exit(130 if stopped.signum == signal.SIGINT else REQUEUE)
    except distributed.ElsewhereError:
        sys.exit(1)  # that rank has said it
    except torch.OutOfMemoryError as error:
        sys.exit(f"{name}: out of memory: raise --accumulate, same result in less memory.\n{error}")
    except RunError as error:  # the same on all ranks
        sys.exit(f"fastdino-train: {error}" if rank == 0 else 1)
    except (ValueError, OSError, Unreadable) as error:
        sys.exit(f"{name}: {error}")
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        sys.exit(f"{name}: torch.compile failed; --compile off goes on without it.\n{error}")


def main() -> None:
    """Entry point of `fastdino-train`."""
    command(
        tyro.extras.overridable_config_cli(
            PRESETS, prog="fastdino-train", description=__doc__, config=(tyro.conf.OmitArgPrefixes,)
        )
    )


if __name__ == "__main__":
    main()
