"""The folder of a run while it trains: its lock, where it goes on, checkpoints, teacher file, and signals."""

import json
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from fastdino import checkpoint, distributed
from fastdino.config import Config, flag
from fastdino.files import append_text
from fastdino.monitor import read_metrics
from fastdino.optim import Schedule
from fastdino.update import Update

# What a process that was told to go exits with, once all is saved: EX_TEMPFAIL of sysexits.h, "temporary
# failure, run me again". Ctrl-C has 130, as everywhere.
REQUEUE = 75


class RunError(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


class Interrupted(Exception):
    """The process was asked to stop, and the state of the run is saved."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that Ctrl-C, SIGTERM and SIGUSR1 append to, so that the loop can save and leave.

    The second signal of a kind kills.
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


def has_checkpoint(out: str | Path) -> bool:
    """Whether `out` holds a run that would be continued; the same on all ranks, which all call."""
    return distributed.on_rank_zero(lambda: bool(checkpoint.checkpoints(Path(out))))


def with_numbers_of_run(config: Config) -> Config:
    """The config with the numbers of the run that it continues, if any, where it has `auto`; all ranks call.

    Of other images, or more epochs, `auto` would make other numbers, and networks of other shapes.
    """
    stored = distributed.on_rank_zero(lambda: checkpoint.stored_config(Path(config.run.out)))
    if stored is None:
        return config
    for part in ("model", "method", "optim"):  # where `resolve_auto` puts numbers
        now, was = getattr(config, part), getattr(stored, part)
        numbers = {name: getattr(was, name) for name, value in vars(now).items() if value == "auto"}
        config = replace(config, **{part: replace(now, **numbers)})
    return config


PRECISIONS = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}


def _check_state(info: dict[str, Any]) -> None:
    """Raise ValueError where the info of a checkpoint is not what `Run.save` and `Health.state` put there."""

    def names(x: Any) -> bool:
        return isinstance(x, list) and all(isinstance(name, str) for name in x)

    scaler, skipped = info.get("scaler"), info.get("skipped", 0)
    unreadable = info.get("unreadable", {"run": [], "epoch": []})
    scales = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
    good = {
        "images": isinstance(info.get("images"), str),
        "precision": isinstance(info.get("precision"), str) and info["precision"] in PRECISIONS,
        "scaler": isinstance(scaler, dict)
        and (not scaler or scaler.keys() == set(scales))
        and all(isinstance(x, int | float) and 0 <= x < 2**62 for x in scaler.values()),
        "skipped": type(skipped) is int and 0 <= skipped < 2**62,
        "unreadable": isinstance(unreadable, dict)
        and unreadable.keys() == {"run", "epoch"}
        and all(map(names, unreadable.values())),
    }
    if bad := [name for name, ok in good.items() if not ok]:
        raise ValueError(f"its info.json holds no usable {bad[0]}")


class Run:
    """A context manager that holds the folder `config.run.out` for one run and keeps what is written there.

    Entering it locks the folder, begins to listen for signals, and fills the update from the newest
    checkpoint that can be read. All ranks enter it together.

    Args:
        config: the run.
        update: networks and optimiser, written from now on and filled where the run is continued.
        images: the fingerprint of the images, which a continued run must find unchanged, unless --change.
        schedule: of the run.

    Attributes:
        out: the folder.
        total_steps: updates of the whole run.
        start_step: updates that were done when this process began.
        state: what `save` was given at that step; empty in a new run.
        notes: a sentence on each checkpoint that cannot be read, on what is continued, and what changes.
        signals: the signals caught since the run began; not empty when it is asked to stop.

    Raises:
        ValueError: on entering, where the folder belongs to another run, another process trains in it, or
            images or precision are others than those of its checkpoint.
    """

    def __init__(self, config: Config, update: Update, images: str, schedule: Schedule) -> None:
        self.config, self.update, self.images, self.schedule = config, update, images, schedule
        self.total_steps = schedule.total_steps
        self.out = Path(config.run.out)
        self.teacher = self.out / "teacher.safetensors"
        self.start_step, self.state = 0, dict[str, Any]()
        self.notes: list[str] = []

    def __enter__(self) -> "Run":
        with ExitStack() as stack:
            tensors = self.update.tensors()

            def claim() -> None:
                held = stack.enter_context(checkpoint.claim(self.out, self.config, tensors))
                self.notes += [held.note] if held.note else []

            distributed.on_rank_zero(claim)
            self.signals = stack.enter_context(stop_signals())
            self._saver = stack.enter_context(
                closing(checkpoint.Saver(self.out, self.config.run.keep, self.schedule.keep_every))
            )
            self._resume()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _resume(self) -> None:
        with distributed.raise_on_all_ranks():
            self.start_step, info, damaged = checkpoint.load_newest(
                self.out, self.update.tensors(), _check_state
            )
        self.notes += damaged
        changed = distributed.on_rank_zero(lambda: self._changes(info)) if self.start_step else {}
        if self.start_step:
            if "images" in changed:  # files of this epoch that may be gone
                info["unreadable"] = {"run": info.get("unreadable", {}).get("run", []), "epoch": []}
            if info["scaler"]:  # that of fp16
                self.update.scaler.load_state_dict(info["scaler"])
            self.state = info
            how = "is complete" if self.start_step == self.total_steps else "is continued"
            self.notes.append(f"{self.out} {how}: step {self.start_step} of {self.total_steps}")
        if changed:
            self.notes += distributed.on_rank_zero(lambda: self._keep_changes(changed))
        # There is a teacher from the start. It is behind its checkpoint after a crash between the two writes.
        written = distributed.on_rank_zero(lambda: checkpoint.teacher_step(self.out))
        if written != self.start_step or not self.start_step or changed:
            state = checkpoint.cpu_state_dict(self.update.dino.teacher)
            distributed.on_rank_zero(
                lambda: checkpoint.write_teacher(self.teacher, state, self.config, self.start_step)
            )

    def _changes(self, info: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """What differs from the run as it was, was and now: fields of the config, "images", "precision".

        Raises:
            ValueError: it does, and --change is not given; or the run is beyond --epochs.
        """
        changed, change = checkpoint.changes(self.out, self.config), self.config.run.change
        if self.start_step > self.total_steps:
            epochs = math.ceil(self.start_step / self.schedule.steps_per_epoch)
            raise ValueError(
                f"{self.out} is at step {self.start_step}, and --epochs {self.config.optim.epochs} are "
                f"{self.total_steps} steps: give --epochs {epochs} or more with --extend, or another --out"
            )
        if info["images"] != self.images:
            if not change:
                raise ValueError(
                    f"{self.config.data.data} holds other images than when {self.out} was begun: a continued "
                    "run would see other crops. Restore the images, add --change to go on with these, or "
                    "give another --out."
                )
            changed["images"] = (info["images"], self.images)
        was, now = info["precision"], str(self.update.dtype)
        if was != now:
            if not change:
                raise ValueError(
                    f"{self.out} was trained in {was}, not {now}: give --precision {PRECISIONS[was]} to go "
                    f"on so, add --change to go on in {now}, or give another --out"
                )
            changed["precision"] = (was, now)
        return changed

    def _keep_changes(self, changed: dict[str, tuple[Any, Any]]) -> list[str]:
        """Make the run in the folder the changed one and write down what changed; sentences on it."""
        try:
            ours = version("fastdino")
        except PackageNotFoundError:
            ours = "unknown"
        kept = {
            "step": self.start_step,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"fastdino": ours, "torch": version("torch")},
        }
        path = self.out / "changes.jsonl"
        lines, said = "", []
        for name, (was, now) in changed.items():
            what = "images" if name == "images" else flag(name)
            lines += json.dumps({**kept, "flag": what, "was": was, "now": now}) + "\n"
            shown = "others than before" if name == "images" else f"was {was!r}, now {now!r}"
            said.append(f"{what}: {shown}" + (", without effect" if name == "model.init_from" else ""))
        append_text(path, lines)
        # Now the same command without --change is one that continues the run.
        if self.start_step:
            newest = checkpoint.checkpoints(self.out)[self.start_step]
            checkpoint.amend(newest, images=self.images, precision=str(self.update.dtype))
        checkpoint.write_config(self.out, self.config)
        lines_before = [line for line in read_metrics(self.out) if line["step"] <= self.start_step]
        logged = [lr for line in lines_before if isinstance(lr := line.get("lr"), float)]
        if self.start_step < self.total_steps:
            next_ = self.schedule.at(self.start_step)
            said.append(f"it goes on in epoch {next_.epoch + 1} of {self.config.optim.epochs}")
            if logged and abs(logged[-1] - next_.lr) > 0.01 * next_.lr:
                said.append(
                    f"the learning rate goes from {logged[-1]:.3g} to {next_.lr:.3g} at step "
                    f"{self.start_step + 1}, since schedules span all epochs"
                )
        return [*said, f"no single command makes this run any more: {path} has what changed, and when"]

    @property
    def asked_to_stop(self) -> bool:
        """Whether the only process was asked to stop; False with several, which agree by their rows."""
        return bool(self.signals) and distributed.world_size() == 1

    def save(self, step: int, state: dict[str, Any]) -> str:
        """Begin to write checkpoint `step` and its teacher, behind the training.

        Args:
            step: updates done.
            state: JSON values beyond the tensors, which `Run.state` gives back.

        Returns:
            What is wrong with the checkpoint before it, as `wait`.
        """
        error = self.wait()
        info = state | {
            "images": self.images,
            "precision": str(self.update.dtype),
            "scaler": self.update.scaler.state_dict(),
        }
        teacher = checkpoint.cpu_state_dict(self.update.dino.teacher)
        self._saver.save(
            step,
            self.update.tensors(),
            info,
            lambda: checkpoint.write_teacher(self.teacher, teacher, self.config, step),
        )
        return error

    def wait(self) -> str:
        """Wait until the last checkpoint is on the disk; returns why it is not, or nothing."""
        error = self._saver.finish()
        return f"{error}. {self.last_good()}" if error else ""

    def wait_for_checkpoint(self) -> None:
        """Wait for the last checkpoint of this process; raises RunError where it cannot be written."""
        if error := self.wait():
            raise RunError(f"{error} Make room, then the same command goes on there.")

    def last_good(self) -> str:
        """A sentence on the newest checkpoint."""
        found = list(checkpoint.checkpoints(self.out).values())
        return f"The last good checkpoint is {found[-1]}." if found else "No checkpoint had been written yet."

    def interruption(self, step: int) -> Interrupted:
        """The exception that ends a run which was asked to stop, once `step` is saved."""
        return Interrupted(
            self.signals[0] if self.signals else signal.SIGTERM,  # another rank heard it
            f"saved {self.out} at step {step} of {self.total_steps}; the same command continues it",
        )
