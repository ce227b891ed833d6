"""`fastdino-data`: pack images into tar shards, check what a set of them holds, render sample images."""

import functools
import hashlib
import io
import json
import multiprocessing
import os
import re
import statistics
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from fastdino import cli, files
from fastdino.data import cores, open_source, shards, tars
from fastdino.data.images import EXTENSIONS, Unreadable, decode_image, opened
from fastdino.data.machine import map_in_processes, raise_if_stopped
from fastdino.data.samples import Samples
from fastdino.data.sources import Source, by_product
from fastdino.files import printable_name

MARKER = "pack.json"  # says what a folder of shards was packed from
LEFT_OUT = "left_out.txt"  # the files that could not be read
SMALL = 96  # pixels: as many as the side of DINO's local crops
SHOWN = 20  # lines that a list shows before it says how many more there are

Data = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
Failed = list[tuple[str, str]]  # path and reason of files that cannot be read


def _processes(workers: int) -> int:
    if workers < -1 or workers == 0:
        raise ValueError(f"--workers {workers}: give 1 or more, or -1 for all cores")
    return workers if workers > 0 else cores()


def _say_list(title: str, lines: list[str]) -> None:
    if lines:
        more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        cli.say("\n  ".join([title, *lines[:SHOWN], *more]))


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """The flags that say which images."""

    data: Data
    """The images: a folder, a text file of paths, or shards, as for fastdino-train."""
    include: tuple[str, ...] = ()
    """Patterns of paths below DATA, as 'photos/*': only images that fit one of them are taken."""
    exclude: tuple[str, ...] = ()
    """Patterns of paths below DATA to leave out, as 'masks/*' '*_depth.png'."""

    def _open(self) -> Source:
        return open_source(self.data, include=self.include, exclude=self.exclude)


# --- pack


@dataclass(frozen=True, kw_only=True)
class Pack(_Chosen):
    """Write images into tar shards as WebDataset has them, for fast reading from network or spinning disks.

    The files are copied as they are. OUT gets 000000.tar, 000001.tar, ..., an index beside each, the names
    of the classes and those of the files that could not be read; train on it with --data OUT. A pack that was
    stopped goes on where it was when the same command is given again.
    """

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
        workers, out = _processes(self.workers), Path(self.out)
        source = self._open()
        cli.say(*source.notes)
        paths = [out / f"{number:06d}.tar" for number in range(-(-len(source) // self.images_per_shard))]
        claim = functools.partial(files.claim, out, MARKER, self._settings(source), "a pack", "the shards")
        try:
            # locked until all processes that write have ended
            with claim(busy="another pack is writing there", children=True):
                _delete_half_written(out)
                try:
                    images, left_out, kept = self._write(source, paths, workers)
                finally:
                    _delete_half_written(out)
        except OSError as error:
            if error.errno not in (ENOSPC, EDQUOT, EFBIG):
                raise
            raise OSError(
                f"{out}: the disk is full ({error.strerror}): {sum(path.exists() for path in paths)} of "
                f"{len(paths)} shards are written; free some space and give the same command again, or give "
                "another folder"
            ) from None
        _say_list(
            f"left out, {len(left_out)} of {len(source)} files (all in {out / LEFT_OUT}):",
            [f"{path}: {reason}" for path, reason in left_out],
        )
        size = sum(path.stat().st_size for path in paths)
        were = f", {kept} of which were there already" if kept else ""
        cli.say(f"{out}: {images} images in {len(paths)} shards{were}, {decimal(size)}")
        return 0 if images else 1

    def _settings(self, source: Source) -> dict[str, Any]:
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

    def _write(self, source: Source, paths: list[Path], workers: int) -> tuple[int, Failed, int]:
        """Write the missing shards. Returns the number of images, what was left out, and shards kept."""
        n, out = len(source), Path(self.out)
        names = "".join(f"{name}\n" for name in source.classes).encode("utf-8", "surrogateescape")
        files.write_atomically(out / shards.CLASSES, lambda tmp: tmp.write_bytes(names))
        there = {path: tars.load_index(str(path)) for path in paths}
        images = sum(len(found[0].records) for found in there.values() if found)
        left_out = [one for found in there.values() if found for one in found[1]]
        order = source.order(self.seed, 0).numpy() if self.shuffle else np.arange(n)
        missing = [
            (path, order[i * self.images_per_shard : (i + 1) * self.images_per_shard])
            for i, path in enumerate(paths)
            if not there[path]
        ]
        packed = multiprocessing.get_context().Value("q", 0)
        shown = 0
        with cli.progress("", n) as advance:
            advance(images + len(left_out))

            def tick() -> None:
                nonlocal shown
                new, shown = packed.value - shown, packed.value
                advance(new)

            work = functools.partial(_pack_shard, source, packed)
            for written, failed in map_in_processes(work, missing, min(workers, len(missing) or 1), tick):
                images += written
                left_out += failed
        if left_out:
            left_out.sort()
            text = "".join(f"{path}: {reason}\n" for path, reason in left_out)
            files.write_text(out / LEFT_OUT, text)
        return images, left_out, len(paths) - len(missing)


def _delete_half_written(out: Path) -> None:
    """Delete what processes that were killed have left."""
    for tmp in out.glob(".*.tmp"):
        if re.match(rf"\.(\d+\.tar(\.index\.npz)?|{shards.CLASSES}|{LEFT_OUT}|{MARKER})\.", tmp.name):
            tmp.unlink()


def _pack_shard(source: Source, packed: Any, shard: tuple[Path, np.ndarray]) -> tuple[int, Failed]:
    """Write one shard and its index; packed: counts its images. Returns images in it, and files left out."""
    path, chosen = shard
    left_out: Failed = []

    def write(tmp: Path) -> None:
        # the names of GNU tar take one block where pax takes three, as soon as they are not ASCII
        with tarfile.open(tmp, "w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
            for i in chosen.tolist():
                raise_if_stopped()
                try:
                    content = source.read(i)
                    if len(content) >= tars.LARGEST:
                        raise Unreadable(source.path(i), "larger than 4 GiB")
                except Unreadable as error:
                    left_out.append((error.path, error.reason))
                else:
                    key, extension = _member(source.name(i), i)
                    if source.labels is not None:
                        _add(tar, f"{key}.cls", str(source.labels[i]).encode())
                    _add(tar, key + extension, content)
                with packed.get_lock():
                    packed.value += 1
        found = tars.scan(str(tmp))
        if found.note or len(found.records) != len(chosen) - len(left_out):
            raise RuntimeError(f"{tmp} was not written as it should: {found.note or len(found.records)}")
        tars.save_index(path, tmp.stat().st_size, found, left_out)

    try:
        files.write_atomically(path, write)
    except BaseException:
        tars.index_path(path).unlink(missing_ok=True)
        raise
    return len(chosen) - len(left_out), left_out


def _member(name: str, i: int) -> tuple[str, str]:
    """Key and extension of image i's member: the key is its own, shows `name`, and ends at the first dot."""
    # a name in a tar may hold anything; of a path longer than Linux has the end is shown
    *folders, base = [part for part in name[-4096:].replace("\0", "_").split("/") if part.strip(".")] or [""]
    stem, extension = os.path.splitext(base)
    if extension.lower() not in EXTENSIONS:  # a list may name anything, and what it is shows when it is read
        stem, extension = base, ".jpg"
    folders = [f"_{folder[1:]}" if by_product(folder) else folder for folder in folders]
    return "/".join([*folders, f"{i:08d}-{stem.replace('.', '_')}"]), extension


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without a time: the same images give the same bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


# --- check

# What is found of an image. A width of 0 marks an image that cannot be read, a hash of 0 a file that cannot.
CHECKED = np.dtype(
    [("width", "u4"), ("height", "u4"), ("bytes", "u8"), ("hash", "u8", 2), ("format", "S4"), ("mode", "S8")]
)


@dataclass(frozen=True, kw_only=True)
class Check(_Chosen):
    """Decode every image, and say what there is: sizes, formats, classes, broken files and duplicates."""

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
        workers, source = _processes(self.workers), self._open()
        n = len(source)
        step = max(1, min(256, n // (4 * workers)))  # images a job
        jobs = (range(start, min(n, start + step)) for start in range(0, n, step))
        found, broken, done = np.zeros(n, CHECKED), Failed(), 0
        with cli.progress("", n) as advance:
            for part, failed in map_in_processes(functools.partial(_check, source), jobs, workers):
                found[done : done + len(part)] = part
                broken += failed
                done += len(part)
                advance(len(part))
        report = _report(source, found, broken)
        _show(self.data, report)
        if self.json:
            files.write_text(Path(self.json), json.dumps({"data": self.data, **report}, indent=2) + "\n")
        return 0 if report["readable"] else 1


def _check(source: Source, images: range) -> tuple[np.ndarray, Failed]:
    """What is found of some images, CHECKED (n,), and which are broken."""
    found, broken = np.zeros(len(images), CHECKED), Failed()
    for row, i in zip(found, images, strict=True):
        raise_if_stopped()
        try:
            content = source.read(i)
            row["bytes"] = len(content)
            row["hash"] = np.frombuffer(hashlib.blake2b(content, digest_size=16).digest(), np.uint64)
            decode_image(content, "")
            with opened(functools.partial(io.BytesIO, content), str) as image:
                row["format"], row["mode"] = image.format or "", image.mode
                row["width"], row["height"] = image.size
        except Unreadable as error:
            broken.append((error.path or printable_name(source.path(i)), error.reason))
    return found, broken


def _report(source: Source, found: np.ndarray, broken: Failed) -> dict[str, Any]:
    """All that the JSON says; found: CHECKED (n,)."""
    readable = found[found["width"] > 0]
    small = np.minimum(found["width"], found["height"])
    report: dict[str, Any] = {
        "images": len(source),
        "readable": len(readable),
        "bytes": int(found["bytes"].sum()),
        "classes": None,
        "formats": _count(readable["format"]),
        "modes": _count(readable["mode"]),
        "width": _span(readable["width"]),
        "height": _span(readable["height"]),
        "broken": [{"path": path, "reason": reason} for path, reason in sorted(broken)],
        "small": [printable_name(source.path(int(i))) for i in np.flatnonzero((small > 0) & (small < SMALL))],
        "duplicates": [[printable_name(source.path(i)) for i in same] for same in _duplicates(found["hash"])],
        "left_out": {"files": _names(source.left_out.files), "folders": _names(source.left_out.folders)},
        "notes": source.notes,
    }
    if source.labels is not None:
        counts = np.bincount(source.labels, minlength=len(source.classes)).tolist()
        report["classes"] = dict(zip(map(printable_name, source.classes), counts, strict=True))
    return report


def _names(numbers: Counter[str]) -> dict[str, int]:
    return {printable_name(kind): n for kind, n in numbers.most_common()}


def _count(values: np.ndarray) -> dict[str, int]:
    """How often each value is there, the most frequent first."""
    return dict(Counter(value.decode() for value in np.sort(values).tolist()).most_common())


def _span(lengths: np.ndarray) -> dict[str, float] | None:
    if not len(lengths):
        return None
    return {"min": int(lengths.min()), "median": float(np.median(lengths)), "max": int(lengths.max())}


def _duplicates(hashes: np.ndarray) -> list[list[int]]:
    """Groups of images that have the same hash, of uint64 (n, 2), in order; zeros belong to none."""
    known = np.flatnonzero(hashes.any(1))
    order = known[np.lexsort(hashes[known].T)]
    starts = np.flatnonzero((hashes[order[1:]] != hashes[order[:-1]]).any(1)) + 1
    return sorted(group.tolist() for group in np.split(order, starts) if len(group) > 1)


def _show(data: str, report: dict[str, Any]) -> None:
    cli.say(*report["notes"])
    rows = {
        "images": f"{report['images']:,}",
        "broken": f"{len(report['broken']):,}",
        "left out": f"{sum(report['left_out']['files'].values()):,} files",
        "bytes": f"{report['bytes']:,} ({decimal(report['bytes'])})",
    }
    for name, key in (("formats", "formats"), ("colour modes", "modes")):
        rows[name] = ", ".join(f"{kind} {n:,}" for kind, n in report[key].items()) or "none"
    for side in ("width", "height"):
        if span := report[side]:
            rows[side] = f"{span['min']} to {span['max']}, median {span['median']:g}"
    rows[f"shorter side under {SMALL} px"] = f"{len(report['small']):,}"
    groups = report["duplicates"]
    rows["duplicates"] = f"{sum(map(len, groups)) - len(groups):,}, of {len(groups):,} images"
    rows["classes"] = "none"
    if classes := report["classes"]:
        least, most = min(classes, key=classes.__getitem__), max(classes, key=classes.__getitem__)
        rows["classes"] = (
            f"{len(classes):,}: {classes[least]:,} ({least}) to {classes[most]:,} ({most}) images, "
            f"median {statistics.median(classes.values()):g}"
        )
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, Text(value))
    cli.say(data)
    cli.console().print(table)
    _say_list("broken:", [f"{one['path']}: {one['reason']}" for one in report["broken"]])
    more = [f" and {len(group) - 4} more" if len(group) > 4 else "" for group in groups]
    _say_list("the same bytes:", ["  ".join(g[:4]) + text for g, text in zip(groups, more, strict=True)])


def main() -> None:
    """Entry point of `fastdino-data`."""
    commands: dict[str, Any] = {"pack": Pack, "check": Check, "samples": Samples}
    command = tyro.extras.subcommand_cli_from_dict(commands, prog="fastdino-data", description=__doc__)
    sys.exit(cli.run("fastdino-data", command.run))
