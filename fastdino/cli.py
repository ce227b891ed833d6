"""What all commands share: errors in one line and exit codes, a progress bar, lines for people."""

import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastdino import distributed
from fastdino.files import printable

T = TypeVar("T")


def run(
    name: str,
    command: Callable[[], int | None],
    *,
    stopped: str = "stopped",
    errors: tuple[type[Exception], ...] = (),
) -> int:
    """Run `command` as the work of program `name`; returns the exit status that it returns, 0 for None.

    Ctrl-C and SIGTERM raise KeyboardInterrupt in it and end the process with status 130, after the line
    `stopped`. ValueError, OSError and `errors` end it with status 1 and their message, which should say what
    was given and what to do; other exceptions pass.

    Raises:
        SystemExit: as above.
    """
    rank, ranks = distributed.launch()[:2]
    if ranks == 1:  # torchrun ends the remaining ranks by SIGTERM: they have nothing to say then
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # job managers end it as Ctrl-C does
    refusals: tuple[type[Exception], ...] = (ValueError, OSError, *errors)
    title = name + (f", rank {rank}" if ranks > 1 else "")
    try:
        return command() or 0
    except distributed.OtherRankFailed:
        sys.exit(1)  # that rank has said it
    except BrokenProcessPool:
        sys.exit(f"{title}: a process died: often memory ran out; lower --workers")
    except refusals as error:
        sys.exit(f"{title}: {printable(str(error))}")
    except KeyboardInterrupt:
        if rank == 0:
            print(f"{name}: {stopped}", file=sys.stderr)
        sys.exit(130)


def console() -> Console:
    """Where to print for people: nowhere on the ranks above 0."""
    return Console(quiet=distributed.rank() > 0)


def say(*lines: str) -> None:
    """Print lines as they are, at once, on rank 0."""
    out = console()
    for line in lines:
        out.print(printable(line), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(what: str, total: int | None, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """A progress bar in a terminal, on rank 0; call what it yields with how many more `unit` are done."""
    out = console()
    # Without a thread of its own, which would be copied into forked processes.
    with Progress(
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), unit, TimeRemainingColumn()),
        console=out,
        transient=True,
        auto_refresh=False,
        disable=not out.is_terminal,
    ) as bar:
        task, drawn = bar.add_task(what, total=total), 0.0

        def advance(n: int) -> None:
            nonlocal drawn
            bar.advance(task, n)
            if time.monotonic() - drawn > 0.1:  # drawing takes a millisecond, which some steps do not
                bar.refresh()
                drawn = time.monotonic()

        yield advance


def track(items: Iterable[T], what: str, total: int | None = None, unit: str = "images") -> Iterator[T]:
    """Yield the items under a progress bar; `total` is their number where they have no len."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(what, total, unit) as advance:
        for item in items:
            yield item
            advance(1)
