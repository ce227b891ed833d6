"""The folder of a run while it trains: its lock, where it goes on, checkpoints, teacher file, and signals."""

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from fastdino import checkpoint, distributed
from fastdino.config import Config
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


class Run:
    """A context manager that holds the folder `config.run.out` for one run and keeps what is written there.

    Entering it locks the folder, begins to listen for signals, and fills the update from the newest
    checkpoint that can be read. All ranks enter it together.

    Args:
        config: the run.
        update: networks and optimiser, written from now on and filled where the run is continued.
        images: the fingerprint of the images, which a continued run must find unchanged.
        total_steps: updates of the whole run.
        keep_every: updates between two checkpoints that are kept for good; 0 keeps none.

    Attributes:
        out: the folder.
        start_step: updates that were done when this process began.
        state: what `save` was given at that step; empty in a new run.
        notes: a sentence on each checkpoint that cannot be read, and on what is continued.
        signals: the signals caught since the run began; not empty when it is asked to stop.

    Raises:
        ValueError: on entering, where the folder belongs to another run, another process trains in it, or
            images or precision are others than those of its checkpoint.
    """

    def __init__(
        self, config: Config, update: Update, images: str, total_steps: int, keep_every: int = 0
    ) -> None:
        self.config, self.update, self.images = config, update, images
        self.total_steps, self.keep_every = total_steps, keep_every
        self.out = Path(config.run.out)
        self.teacher = self.out / "teacher.safetensors"
        self.start_step, self.state = 0, dict[str, Any]()
        self.notes: list[str] = []

    def __enter__(self) -> "Run":
        with ExitStack() as stack:

            def claim() -> None:
                stack.enter_context(checkpoint.claim(self.out, self.config))

            distributed.on_rank_zero(claim)
            self.signals = stack.enter_context(stop_signals())
            self._saver = stack.enter_context(
                closing(checkpoint.Saver(self.out, self.config.run.keep, self.keep_every))
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
            self.start_step, info, damaged = checkpoint.load_newest(self.out, self.update.tensors())
            if self.start_step and info["images"] != self.images:
                raise ValueError(
                    f"{self.config.data.data} holds other images than when {self.out} was begun: a continued "
                    "run would see other crops. Restore the images, or give another --out."
                )
            if self.start_step and info["precision"] != str(self.update.dtype):
                raise ValueError(
                    f"{self.out} was trained in {info['precision']}, not {self.update.dtype}: say so with "
                    "--precision, or give another --out"
                )
        self.notes += damaged
        if self.start_step:
            self.update.scaler.load_state_dict(info["scaler"])
            self.state = info
            how = "is complete" if self.start_step == self.total_steps else "is continued"
            self.notes.append(f"{self.out} {how}: step {self.start_step} of {self.total_steps}")
        # There is a teacher from the start. It is behind its checkpoint after a crash between the two writes.
        written = distributed.on_rank_zero(lambda: checkpoint.teacher_step(self.out))
        if written != self.start_step or not self.start_step:
            state = checkpoint.cpu_state_dict(self.update.dino.teacher)
            distributed.on_rank_zero(
                lambda: checkpoint.write_teacher(self.teacher, state, self.config, self.start_step)
            )

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
