"""The display of a run: metrics.jsonl, TensorBoard, W&B, a progress bar, curves.png."""

import json
import math
import os
import re
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from fastdino.files import read_bytes, write_atomically, write_text

PLAIN_LINE_SECONDS = 15.0  # between progress lines where there is no terminal to draw a bar on


class Monitor:
    """Writes each logged step to metrics.jsonl and its friends, and shows progress. Use as a context manager.

    Args:
        out: folder of the run. Lines after step `start` (of a run that was killed) are dropped from
            metrics.jsonl.
        start, total: first and last step.
        config: what W&B shows as the run's configuration.
        wandb: W&B project, or empty.
        quiet: of several ranks, one writes and shows; the others do neither.

    Raises:
        ValueError: W&B is asked for and not installed.
    """

    def __init__(
        self,
        out: Path,
        start: int,
        total: int,
        config: dict[str, Any],
        wandb: str = "",
        quiet: bool = False,
    ) -> None:
        self.quiet = quiet
        if quiet:
            return
        if wandb:
            try:
                import wandb as library
            except ImportError:
                raise ValueError(
                    f"--wandb {wandb} needs Weights & Biases: pip install 'fastdino[wandb]', or leave it out"
                ) from None
        self.console = Console(highlight=False, soft_wrap=True)
        path = out / "metrics.jsonl"
        kept = [json.dumps(line) + "\n" for line in read_metrics(out) if line["step"] <= start]
        write_text(path, "".join(kept))
        self.file = open(path, "a")  # noqa: SIM115  closed in __exit__
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        # From `purge_step` on, the points of a run that was killed are hidden.
        self.tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
        self.wandb = None
        if wandb:
            self.wandb = library.init(
                project=wandb, dir=str(out), config=config, resume="allow", id=_run_id(out)
            )
        self.bar = Progress(
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(table_column=Column(min_width=8)),
            TextColumn("left"),
            console=self.console,
            expand=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("train", completed=start, total=total, text="")
        self.total = total
        self.last_line = -math.inf

    def __enter__(self) -> "Monitor":
        if not self.quiet:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.quiet:
            return
        self.bar.stop()
        self.file.close()
        self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=0 if kind is None else 1)

    def say(self, text: str | None) -> None:
        """Print a line above the bar; nothing where there is no text."""
        if text and not self.quiet:
            self.console.print(text, markup=False)

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Keep `values` of `step`: a line of metrics.jsonl, and the numbers to TensorBoard and W&B.

        In metrics.jsonl a number that is not finite is null: JSON knows no other way.
        """
        if self.quiet:
            return
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.file.write(json.dumps({"step": step, **line}, allow_nan=False) + "\n")
        self.file.flush()
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        for name, value in numbers.items():
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Move the bar to `step`; without a terminal, print a line every now and then."""
        if self.quiet:
            return
        learnt = f"loss {values['loss']:.3f} lr {values['lr']:.1e} {values['images_per_s']:.0f} img/s"
        # Any longer, and on 80 columns the bar and the time left would lose their places.
        self.bar.update(self.task, completed=step, text=f"{learnt} wait {values['data_wait']:.0%}")
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.last_line > PLAIN_LINE_SECONDS or step == self.total):
            self.last_line = now
            seconds_left = (self.total - step) * values["batch_size"] / max(values["images_per_s"], 1e-9)
            minutes, seconds = divmod(round(seconds_left), 60)
            self.say(
                f"step {step}/{self.total} {learnt}, waiting for data {values['data_wait']:.0%}, "
                f"{minutes}:{seconds:02d} left"
            )


def _run_id(out: Path) -> str:
    """A W&B id that stays with the folder, so that a continued run continues its page."""
    path = out / "wandb_id"
    if path.exists() and re.fullmatch(rb"[\w-]{1,64}", found := read_bytes(path, 4096)):
        return found.decode()
    write_text(path, new := os.urandom(8).hex())
    return new


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The whole lines of the run's metrics.jsonl.

    What no run writes is left out: a last line cut short by a kill, a line without a step or with values
    other than numbers and words.
    """
    path = out / "metrics.jsonl"
    lines = []
    for text in read_bytes(path, 2**32).splitlines() if path.exists() else []:
        try:
            line = json.loads(text, parse_constant=lambda _: None)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and all(map(_is_value, line.values())):
            step = line.get("step")
            lines += [line] if type(step) is int and step >= 0 else []
    return lines


def _is_value(value: Any) -> bool:
    """Whether a run logs such values: a number, or words, or names of images."""
    if isinstance(value, int | float):
        return -(2**62) < value < 2**62
    words = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(word, str) for word in words)


def plot_curves(out: Path, uniform_loss: float) -> Path:
    """Draw the run's loss, gradient norm, schedules and k-NN over steps to curves.png; returns its path.

    `uniform_loss` is ln K, the loss of a collapsed teacher that says nothing: drawn as a line not to sit on.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display is asked for
    from matplotlib.figure import Figure

    metrics = read_metrics(out)
    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).flat

    def draw(axis: Any, title: str, **names: str) -> None:
        for name, label in names.items():
            points = [(m["step"], m[name]) for m in metrics if isinstance(m.get(name), int | float)]
            axis.plot(*zip(*points, strict=True), label=label) if points else None
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(names) > 1 and axis.lines:
            axis.legend()

    parts = {"teacher_entropy": "teacher's entropy", "kl": "KL(teacher || student)"}
    draw(loss := next(axes), "loss and its parts", loss="loss", **parts)
    loss.axhline(uniform_loss, linestyle=":", color="grey")
    loss.annotate(
        "ln K: uniform", (0.99, uniform_loss), xycoords=("axes fraction", "data"), ha="right", va="top"
    )
    draw(knn := next(axes), "k-NN accuracy of the teacher (%)", knn_20="k = 20")
    if not knn.lines:
        knn.text(0.5, 0.5, "not evaluated", ha="center", transform=knn.transAxes)
    elif len(knn.lines[0].get_xdata()) < 20:
        knn.lines[0].set_marker("o")
    draw(next(axes), "gradient norm before clipping", grad_norm="norm")
    draw(next(axes), "learning rate", lr="lr")
    draw(next(axes), "teacher momentum", momentum="momentum")
    draw(rate := next(axes), "images per second", images_per_s="images/s")
    rate.set_ylim(bottom=0)
    path = out / "curves.png"
    write_atomically(path, lambda tmp: figure.savefig(tmp, format="png", dpi=110))
    return path
