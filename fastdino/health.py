"""What the training loop knows of the updates since its last log line, and whether the run is well."""

import math
import time
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastdino import distributed
from fastdino.config import Config
from fastdino.data.feed import Feed
from fastdino.data.sources import Source
from fastdino.diagnostics import Doctor
from fastdino.monitor import Monitor
from fastdino.optim import StepSettings
from fastdino.run import Run, RunError
from fastdino.update import COLUMNS, Update

DATA_WAIT = 0.05  # share of the time spent waiting for images from which on the user is told what to do

Row = dict[str, Any]
"""An update: `COLUMNS` as numbers, `settings` (StepSettings), `images` of this rank (list of Tensor)."""


class Window:
    """The updates since the last log line. Their rows stay on the device until `read` waits for them.

    Args:
        size: updates that it holds at the most.
        device: where the rows are.

    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._ring = torch.zeros(size, len(COLUMNS), device=device)
        self._updates: list[tuple[StepSettings, list[Tensor]]] = []
        self.restart()

    def restart(self) -> None:
        """Begin to count time anew."""
        self._began = time.perf_counter()

    def add(self, row: Tensor, settings: StepSettings, images: list[Tensor]) -> None:
        """Keep the row (len(COLUMNS),) of an update, with its settings and the numbers of its images."""
        self._ring[len(self._updates)] = row
        self._updates.append((settings, images))

    def read(self) -> tuple[list[Row], float]:
        """The rows, oldest first, and the seconds since `restart`. Waits for the device; empties it."""
        numbers = self._ring[: len(self._updates)].tolist()
        seconds = time.perf_counter() - self._began
        rows = [
            dict(zip(COLUMNS, values, strict=True)) | {"settings": settings, "images": images}
            for values, (settings, images) in zip(numbers, self._updates, strict=True)
        ]
        self._updates.clear()
        return rows, seconds


class Health:
    """Counts and reports non-finite updates, unreadable files and waiting; ends a run that cannot go on.

    Args:
        config: the run.
        source: the images.
        update: whose scaler expects overflows where it is enabled.
        run: its state is where the counts begin.
        monitor: prints what is found.
        advice: what to do where training waits for images.

    Attributes:
        notes: what the configuration alone says will go wrong.
        skipped: updates that were not finite, since the run began.
        unreadable: paths of unreadable files, of the whole "run" and of its "epoch" so far.
        by_pillow: images that Pillow decoded in DALI's place, since this process began.
    """

    def __init__(
        self, config: Config, source: Source, update: Update, run: Run, monitor: Monitor, advice: str
    ) -> None:
        self.config, self.source, self.update, self.run, self.monitor = config, source, update, run, monitor
        self.doctor = Doctor(config, distributed.world_size())
        self.notes = self.doctor.before(run.total_steps)
        self.skipped: int = run.state.get("skipped", 0)
        unreadable = run.state.get("unreadable", {"run": [], "epoch": []})
        self.unreadable = {part: set[str](paths) for part, paths in unreadable.items()}
        self.by_pillow = 0
        self._in_a_row = 0
        self._advice, self._windows = advice, 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        unreadable = {part: sorted(paths) for part, paths in self.unreadable.items()}
        return {"unreadable": unreadable, "skipped": self.skipped}

    def check_updates(self, rows: list[Row], feed: Feed, seconds: float) -> None:
        """Count the non-finite updates, which `Update` has skipped; report unreadable files and waiting.

        All ranks call it.

        Args:
            rows: of `Window.read`.
            feed: knows this rank's unreadable files.
            seconds: what the updates took.

        Raises:
            RunError: --max-nonfinite updates in a row were not finite.
        """
        self._report_unreadable(rows, feed)
        for row in rows:
            self._check_finite(row)
        self.by_pillow += round(sum(row["by_pillow"] for row in rows) * distributed.world_size())
        self._windows += 1
        share = sum(row["waited"] for row in rows) / seconds
        # The wait of the first window contains the start of the loader's processes.
        if self._advice and self._windows > 1 and share > DATA_WAIT:
            done = rows[-1]["settings"].step + 1
            self.monitor.say(f"step {done}: {share:.0%} of the time {self._advice}")
            self._advice = ""

    def diagnose(self, settings: StepSettings, values: dict[str, Any]) -> None:
        """Print what the Doctor finds in the metrics of a log line."""
        if settings.logs:
            for sentence in self.doctor.examine(settings.step + 1, values, settings.ends_epoch):
                self.monitor.say(f"step {settings.step + 1}: {sentence}")

    def check_unreadable(self) -> None:
        """Raises RunError where more files of this epoch are unreadable than --max-unreadable allows."""
        failed, allowed = self.unreadable["epoch"], self.config.data.max_unreadable
        if len(failed) > allowed * len(self.source):
            self.monitor.say(self.run.wait())
            raise RunError(
                f"{len(failed)} of {len(self.source)} files could not be read, more than --max-unreadable "
                f"{allowed:g} allows. Repair them, remove them and go on with --change, or raise it:\n  "
                + "\n  ".join(sorted(failed))
            )

    def _report_unreadable(self, rows: list[Row], feed: Feed) -> None:
        if rows[0]["settings"].begins_epoch:
            self.unreadable["epoch"] = set()
        found = feed.take_unreadable()
        if not any(row["unreadable"] for row in rows):  # on any rank
            return
        for update, name, reason in sorted(chain.from_iterable(distributed.gather(found))):
            self.unreadable["epoch"].add(name)
            if name not in self.unreadable["run"]:
                self.monitor.say(f"step {self.run.start_step + update + 1}: skipped {name}: {reason}")
            self.unreadable["run"].add(name)

    def _check_finite(self, row: Row) -> None:
        if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
            self._in_a_row = 0
            return
        self._in_a_row, self.skipped = self._in_a_row + 1, self.skipped + 1
        step, lr = row["settings"].step + 1, row["settings"].lr
        # fp16 gradients overflow now and then: the scaler lowers its scale, and nobody needs to know.
        if not (math.isfinite(row["loss"]) and self.update.scaler.is_enabled()):
            names = distributed.gather([self.source.path(int(i)) for piece in row["images"] for i in piece])
            self._report_nonfinite(step, lr, row["loss"], [*chain.from_iterable(names)])
        if self._in_a_row >= self.config.run.max_nonfinite:
            self.monitor.say(self.run.wait())
            raise RunError(
                f"stopped at step {step}: {self._in_a_row} non-finite steps in a row. "
                f"{self.run.last_good()} Lower --lr, or use --precision bf16 or fp32; either with --change."
            )

    def _report_nonfinite(self, step: int, lr: float, loss: float, names: list[str]) -> None:
        """Print the step and some of its images; metrics.jsonl gets all names."""
        what = f"loss is {loss}" if not math.isfinite(loss) else "gradient is not finite"
        more = f" and {len(names) - 4} more (metrics.jsonl)" if len(names) > 4 else ""
        shown = ", ".join(names[:4]) + more
        self.monitor.say(f"step {step}: {what} at learning rate {lr:.3g}, skipped; images {shown}")
        self.monitor.record(step, {"nonfinite": what, "lr": lr, "images": names})
