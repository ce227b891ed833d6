"""`fastdino-data pack` writes images into tar shards, `fastdino-data check` says what a set of them holds."""

import collections
import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tarfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fastdino.data import cores, open_source, shards
from fastdino.data.images import EXTENSIONS, FORMATS, Unreadable, decode_image
from fastdino.data.sources import Source
from fastdino.files import printable, write_atomically

MARKER = "pack.json"  # says what a folder of shards was packed from
LEFT_OUT = "left_out.txt"  # the files that could not be read
SMALL = 96  # pixels: as many as the side of DINO's local crops
_SHOWN = 20  # names a list shows before it says how many more there are
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# What a process of the pool works on, and whether it is to end; set as it starts.
_task: Callable[[Any], Any]
_stop: Any


class _Stopped(Exception):
    pass


def _start(task: Callable[[Any], Any], stop: Any) -> None:
    global _task, _stop
    _task, _stop = task, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process tells the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    threading.Thread(target=_outlive, args=(os.getppid(),), daemon=True).start()


def _outlive(parent: int) -> None:
    """End with the first process, however that was killed."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _do(job: Any) -> Any:
    return _task(job)


def _go_on() -> None:
    if _stop.is_set():
        raise _Stopped


def _spread(
    task: Callable[[Any], Any],
    jobs: Iterable[Any],
    workers: int,
    done: Callable[[Any], None],
    tick: Callable[[], None],
) -> None:
    """Have processes do all `jobs`, and call done(task(job)) here as each is finished.

    task: calls `_go_on` at each image. tick: called a few times a second. What a process raises, or Ctrl-C,
    stops the others and is raised here.
    """
    jobs = iter(jobs)
    running: set[Future[Any]] = set()
    context = multiprocessing.get_context()
    stop = context.Event()
    with ProcessPoolExecutor(workers, context, _start, (task, stop)) as pool:
        try:
            while True:
                for job in itertools.islice(jobs, 2 * workers - len(running)):
                    running.add(pool.submit(_do, job))
                if not running:
                    return
                finished, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in finished:
                    done(future.result())
                tick()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _processes(workers: int) -> int:
    if workers < -1 or workers == 0:
        raise ValueError(f"--workers {workers}: give 1 or more, or -1 for all cores")
    return workers if workers > 0 else cores()


def _progress(console: Console) -> Progress:
    """A bar without a thread of its own, which would be copied into the processes."""
    columns = (BarColumn(), TaskProgressColumn(), MofNCompleteColumn(), "images", TimeRemainingColumn())
    return Progress(
        *columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
    )


def _say(console: Console, text: str) -> None:
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def _list(console: Console, title: str, lines: list[str]) -> None:
    if not lines:
        return
    more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    _say(console, "\n  ".join([title, *lines[:_SHOWN], *more]))


# --- pack


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Write images into tar shards as WebDataset has them, for fast reading from network or spinning disks.

    The files are copied as they are. OUT gets 000000.tar, 000001.tar, ..., an index beside each, the names
    of the classes and those of the files that could not be read; train on it with --data OUT. A pack that was
    stopped goes on where it was when the same command is given again.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """The images: a folder, a text file of paths, or shards, as for fastdino-train."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """New or empty folder for the shards."""
    images_per_shard: int = 10_000
    """Images in a tar: 10,000 of 100 kB make 1 GB. Take less for larger images."""
    shuffle: bool = True
    """Mix the images over all shards, so that reading a shard in sequence gives a mixture of classes."""
    seed: int = 0
    """Another seed mixes them otherwise."""
    workers: int = -1
    """Processes, each of which writes a shard at a time; -1 takes all cores."""

    def run(self) -> int:
        """Write the shards that are not there yet, and say what was left out; returns the exit status."""
        if self.images_per_shard < 1:
            raise ValueError(f"--images-per-shard {self.images_per_shard}: give 1 or more")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: give 0 or more")
        workers = _processes(self.workers)
        console, out = Console(), Path(self.out)
        source = open_source(self.data)
        for note in source.notes:
            _say(console, note)
        n = len(source)
        order = source.order(self.seed, 0).numpy() if self.shuffle else np.arange(n)
        paths = [out / f"{number:06d}.tar" for number in range(-(-n // self.images_per_shard))]
        try:
            with _claimed(out, self._plan(source)):
                images, left_out, kept = self._write(source, order, paths, workers, console)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            whole = sum(path.exists() for path in paths)
            raise OSError(
                f"{out}: the disk is full ({error.strerror}): {whole} of {len(paths)} shards are written; "
                "free some space and give the same command again, or give another folder"
            ) from None
        _list(console, f"left out, {len(left_out)} of {n} files (all in {out / LEFT_OUT}):", left_out)
        size = sum(path.stat().st_size for path in paths)
        were = f", {kept} of which were there already" if kept else ""
        _say(console, f"{out}: {images} images in {len(paths)} shards{were}, {decimal(size)}")
        return 0 if images else 1

    def _write(
        self, source: Source, order: np.ndarray, paths: list[Path], workers: int, console: Console
    ) -> tuple[int, list[str], int]:
        """Write what is not there. Returns the images, what was left out, and shards that were there."""
        out = Path(self.out)
        names = "".join(f"{name}\n" for name in source.classes).encode("utf-8", "surrogateescape")
        write_atomically(out / shards.CLASSES, lambda beside: beside.write_bytes(names))
        images = 0
        left_out: list[tuple[str, str]] = []
        missing = []
        for number, path in enumerate(paths):
            if there := shards.load_index(str(path)):
                images += len(there[0].records)
                left_out += there[1]
            else:
                missing.append(number)

        def add(result: tuple[int, list[tuple[str, str]]]) -> None:
            nonlocal images
            images += result[0]
            left_out.extend(result[1])

        done = multiprocessing.get_context().Value("q", images + len(left_out))
        task = functools.partial(_pack_shard, source, order, self.images_per_shard, out, done)
        with _progress(console) as progress:
            bar = progress.add_task("", total=len(source))
            tick = functools.partial(progress.update, bar, refresh=True)
            _spread(task, missing, min(workers, len(missing) or 1), add, lambda: tick(completed=done.value))
        lines = [f"{path}: {reason}" for path, reason in sorted(left_out)]
        if lines:
            text = "".join(f"{line}\n" for line in lines)
            write_atomically(out / LEFT_OUT, lambda beside: beside.write_text(text))
        return images, lines, len(paths) - len(missing)

    def _plan(self, source: Source) -> dict[str, Any]:
        """What must be the same for a pack to go on."""
        if bad := [name for name in source.classes if len(name.splitlines()) != 1]:
            raise ValueError(f"{self.data}: class {bad[0]!r} is empty or has a line break; rename it")
        return {
            "version": 1,
            "images": len(source),
            "fingerprint": source.fingerprint(),
            "images_per_shard": self.images_per_shard,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }


@contextlib.contextmanager
def _claimed(out: Path, plan: dict[str, Any]) -> Iterator[None]:
    """Keep `out` for this pack, by `plan`; raises FileExistsError if something else is there or at work."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: give a new folder for the shards")
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until all processes that write have ended
        except BlockingIOError:
            raise FileExistsError(f"{out}: another pack is writing there; wait for it or stop it") from None
        except OSError:  # some network file systems cannot lock
            pass
        marker = out / MARKER
        if marker.is_file():
            there = json.loads(marker.read_text())
            changed = [key for key in plan if there.get(key) != plan[key]]
            settings = ", ".join(f"{k} {there.get(k)} not {plan[k]}" for k in changed if k != "fingerprint")
            if changed:
                raise FileExistsError(
                    f"{out} holds a pack of other {f'settings ({settings})' if settings else 'images'}: give "
                    "another folder or delete it"
                )
        elif any(not path.name.startswith(".") for path in out.iterdir()):
            raise FileExistsError(f"{out} holds other files: give a new or empty folder for the shards")
        else:
            write_atomically(marker, lambda beside: beside.write_text(json.dumps(plan)))
        _sweep(out)
        try:
            yield
        finally:
            _sweep(out)
    finally:
        os.close(folder)


def _sweep(out: Path) -> None:
    """Delete what processes that were killed have left half written."""
    for beside in out.glob(".*.tar.*.tmp"):
        beside.unlink()


def _pack_shard(
    source: Source, order: np.ndarray, per_shard: int, out: Path, done: Any, number: int
) -> tuple[int, list[tuple[str, str]]]:
    """Write shard `number` and its index. Returns images in it, and (path, reason) of files left out."""
    path = out / f"{number:06d}.tar"
    left_out: list[tuple[str, str]] = []
    chosen = order[number * per_shard : (number + 1) * per_shard].tolist()

    def write(beside: Path) -> None:
        # the names of GNU tar take one block where pax takes three, as soon as they are not ASCII
        with tarfile.open(beside, "w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
            for i in chosen:
                _go_on()
                try:
                    content = source.read(i)
                    if len(content) >= shards.LARGEST:
                        raise Unreadable(source.path(i), "larger than 4 GiB")
                except Unreadable as error:
                    left_out.append((error.path, error.reason))
                else:
                    key, extension = _member(source.name(i), i)
                    if source.labels is not None:
                        _add(tar, f"{key}.cls", str(source.labels[i]).encode())
                    _add(tar, key + extension, content)
                with done.get_lock():
                    done.value += 1
        found = shards.scan(str(beside))
        if found.note or len(found.records) != len(chosen) - len(left_out):
            raise RuntimeError(f"{beside} was not written as it should: {found.note or len(found.records)}")
        shards.save_index(path, beside.stat().st_size, found, left_out)

    try:
        write_atomically(path, write)
    except BaseException:
        shards.index_path(path).unlink(missing_ok=True)
        raise
    return len(chosen) - len(left_out), left_out


def _member(name: str, i: int) -> tuple[str, str]:
    """Key and extension of image i's member: the key is its own, shows `name`, and ends at the first dot."""
    *folders, base = [part for part in name.split("/") if part not in ("", ".", "..")]
    stem, extension = os.path.splitext(base)
    if extension.lower() not in EXTENSIONS:  # a list may name anything, and what it is shows when it is read
        stem, extension = base, ".jpg"
    folders = [f"_{folder[1:]}" if folder.startswith(".") else folder for folder in folders]
    return "/".join([*folders, f"{i:08d}-{stem.replace('.', '_')}"]), extension


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without a time: the same images give the same bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


# --- check


@dataclass
class _Checked:
    """What was found of the images start, start + 1, ...; a width of 0 marks the broken ones."""

    start: int
    sizes: np.ndarray  # uint32 (n, 2): width, height
    hashes: np.ndarray  # uint64 (n, 2); zeros where there is no file
    content: int  # bytes
    formats: collections.Counter[str]
    modes: collections.Counter[str]
    broken: list[tuple[str, str]]  # path, reason


@dataclass(frozen=True, kw_only=True)
class Check:
    """Decode every image, and say what there is: sizes, formats, classes, broken files and duplicates."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """The images: a folder, a text file of paths, or shards, as for fastdino-train."""
    json: str = ""
    """File to write all of it to, with the paths of all broken, small and duplicate images."""
    workers: int = -1
    """Processes that decode; -1 takes all cores."""

    def run(self) -> int:
        """Print the table, and write the JSON if asked; returns 1 if no image can be read, else 0."""
        if self.json and not Path(self.json).parent.is_dir():
            raise ValueError(
                f"--json {self.json}: there is no folder {Path(self.json).parent}; make it first"
            )
        console = Console()
        workers = _processes(self.workers)
        report = _check(open_source(self.data), workers, console)
        _show(console, self.data, report)
        if self.json:
            text = json.dumps({"data": self.data, **report}, indent=2)
            write_atomically(Path(self.json), lambda beside: beside.write_text(text + "\n"))
        return 0 if report["readable"] else 1


def _check(source: Source, workers: int, console: Console) -> dict[str, Any]:
    n = len(source)
    # all that is kept of an image: 24 bytes
    sizes, hashes = np.zeros((n, 2), np.uint32), np.zeros((n, 2), np.uint64)
    total = _Checked(0, sizes, hashes, 0, collections.Counter(), collections.Counter(), [])
    with _progress(console) as progress:
        bar = progress.add_task("", total=n)

        def add(part: _Checked) -> None:
            span = slice(part.start, part.start + len(part.sizes))
            sizes[span], hashes[span] = part.sizes, part.hashes
            total.content += part.content
            total.formats += part.formats
            total.modes += part.modes
            total.broken += part.broken
            progress.advance(bar, len(part.sizes))

        step = max(1, min(256, n // (4 * workers)))  # images a job
        jobs = (range(start, min(n, start + step)) for start in range(0, n, step))
        _spread(functools.partial(_check_images, source), jobs, workers, add, progress.refresh)
    readable = sizes[:, 0] > 0
    small = np.flatnonzero(readable & (sizes.min(1) < SMALL))
    report: dict[str, Any] = {
        "images": n,
        "readable": int(readable.sum()),
        "bytes": total.content,
        "classes": None,
        "formats": _most_first(total.formats),
        "modes": _most_first(total.modes),
        "width": _spans(sizes[readable, 0]),
        "height": _spans(sizes[readable, 1]),
        "broken": [{"path": path, "reason": reason} for path, reason in sorted(total.broken)],
        "small": [printable(source.path(int(i))) for i in small],
        "duplicates": [[printable(source.path(i)) for i in group] for group in _duplicates(hashes)],
        "notes": source.notes,
    }
    if source.labels is not None:
        counts = np.bincount(source.labels, minlength=len(source.classes)).tolist()
        report["classes"] = dict(zip(map(printable, source.classes), counts, strict=True))
    return report


def _check_images(source: Source, images: range) -> _Checked:
    n = len(images)
    found = _Checked(
        images.start,
        np.zeros((n, 2), np.uint32),
        np.zeros((n, 2), np.uint64),
        0,
        collections.Counter(),
        collections.Counter(),
        [],
    )
    for row, i in enumerate(images):
        _go_on()
        try:
            content = source.read(i)
            found.content += len(content)
            digest = hashlib.blake2b(content, digest_size=16).digest()
            found.hashes[row] = np.frombuffer(digest, np.uint64)
            decode_image(content, "")
        except Unreadable as error:
            found.broken.append((error.path or printable(source.path(i)), error.reason))
            continue
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            found.sizes[row] = image.size
            found.formats[image.format or ""] += 1
            found.modes[image.mode] += 1
    return found


def _most_first(counts: collections.Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def _spans(lengths: np.ndarray) -> dict[str, float] | None:
    if not len(lengths):
        return None
    return {"min": int(lengths.min()), "median": float(np.median(lengths)), "max": int(lengths.max())}


def _duplicates(hashes: np.ndarray) -> list[list[int]]:
    """Groups of images that have the same hash, of uint64 (n, 2), in order; zeros belong to none."""
    known = np.flatnonzero(hashes.any(1))
    order = known[np.lexsort(hashes[known].T)]
    same = (hashes[order[1:]] == hashes[order[:-1]]).all(1)
    edges = np.diff(np.concatenate([[False], same, [False]]).astype(np.int8))
    begins, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) + 1
    return sorted(order[begin:end].tolist() for begin, end in zip(begins, ends, strict=True))


def _show(console: Console, data: str, report: dict[str, Any]) -> None:
    for note in report["notes"]:
        _say(console, note)
    rows = {
        "images": f"{report['images']:,}",
        "broken": f"{len(report['broken']):,}",
        "bytes": f"{report['bytes']:,} ({decimal(report['bytes'])})",
        "formats": _counts(report["formats"]),
        "colour modes": _counts(report["modes"]),
    }
    for side in ("width", "height"):
        if spans := report[side]:
            rows[side] = f"{spans['min']} to {spans['max']}, median {spans['median']:g}"
    rows[f"shorter side under {SMALL} px"] = f"{len(report['small']):,}"
    groups = report["duplicates"]
    rows["duplicates"] = f"{sum(map(len, groups)) - len(groups):,}, of {len(groups):,} images"
    if classes := report["classes"]:
        least, most = min(classes, key=classes.__getitem__), max(classes, key=classes.__getitem__)
        rows["classes"] = (
            f"{len(classes):,}: {classes[least]:,} ({least}) to {classes[most]:,} ({most}) images, "
            f"median {statistics.median(classes.values()):g}"
        )
    else:
        rows["classes"] = "none"
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, Text(value))
    _say(console, data)
    console.print(table)
    _list(console, "broken:", [f"{one['path']}: {one['reason']}" for one in report["broken"]])
    _list(console, "the same bytes:", [_some(group) for group in groups])


def _some(paths: list[str]) -> str:
    return "  ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"


def main() -> None:
    """Entry point of `fastdino-data`."""
    command = tyro.extras.subcommand_cli_from_dict(
        {"pack": Pack, "check": Check}, prog="fastdino-data", description=__doc__
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # job managers end it as Ctrl-C does
    try:
        sys.exit(command.run())
    except (ValueError, OSError) as error:
        sys.exit(f"fastdino-data: {printable(str(error))}")
    except BrokenProcessPool:
        sys.exit("fastdino-data: a process died: often memory ran out; lower --workers")
    except KeyboardInterrupt:
        print("fastdino-data: stopped", file=sys.stderr)
        sys.exit(130)
