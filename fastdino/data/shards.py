"""Tar shards: images and labels as WebDataset stores them, indexed once and then read at random."""

import functools
import glob
import itertools
import multiprocessing
import os
import re
import time
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from fastdino.data.images import Unreadable, reason_of
from fastdino.data.machine import cores, map_in_processes
from fastdino.data.sources import ALL, TAKEN, Patterns, Source, epoch_order, most_common, shard_order
from fastdino.data.tars import BLOCK, COMPRESSED, RECORD, Index, index, is_header, pread, read_name
from fastdino.files import printable_name

CLASSES = "classes.txt"  # beside the shards: the name of class 0, 1, ..., a line each; empty if there is none
OPEN = 128  # shards a process holds open; 1024 files is a common limit
ALONE = 1.0  # seconds of indexing before other processes are started to help
MOST = 1_000_000  # shards that a pattern may name
_TEXT = 1 << 26  # bytes of class names


class Shards(Source):
    """Images in tar files, as WebDataset stores them.

    Neighbours whose paths are the same up to the first dot of the base name belong together; those with an
    image's extension are images, hidden ones and by-products are left out. If every image has a .cls member,
    what that holds is its class, named by the line of `classes.txt` beside the shards where there is one;
    else, if every image lies in one of two or more folders inside the tars, that folder is. Other members are
    counted. Links are not followed. Per image 12 bytes, and 8 where there are labels.

    A shard that has changed since it was opened gives Unreadable, not other bytes. Each process opens the
    files itself.
    """

    def __init__(self, root: str, paths: list[str], indexes: Iterator[Index]) -> None:
        """indexes: those of the shards `paths`, in their order."""
        super().__init__(root)
        self._paths = paths
        self.__setstate__({})
        records, first = bytearray(), array("q", [0])
        labels, folders, unfit = _Codes(), _Codes(), 0
        for found in indexes:
            records += found.records.tobytes()
            first.append(len(records) // RECORD.itemsize)
            labels.add(found.labels, found.kinds)
            folders.add(found.folders, found.folder_kinds)
            self.notes += [printable_name(found.note)] if found.note else []
            self.left_out.files += found.others
            unfit += found.unfit
        if unfit:
            self.notes.append(
                f"{printable_name(root)}: {unfit} of {len(paths)} shards have an index beside them that does "
                "not fit: they were indexed anew"
            )
        self._records = np.frombuffer(records, RECORD)
        self._first = np.frombuffer(first, np.int64)
        named = _read_classes(paths)
        if named == [] or not len(self):  # packed from images without classes
            return
        if (codes := labels.complete()) is None:
            if (codes := folders.complete()) is not None:
                self._label(codes, folders.kinds)
        elif named and all(kind.isdecimal() and int(kind) < len(named) for kind in labels.kinds):
            self.classes = named
            self.labels = np.array([int(kind) for kind in labels.kinds], np.int64)[codes]
        else:
            self._label(codes, labels.kinds)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._file = functools.lru_cache(OPEN)(_File)

    def __len__(self) -> int:
        return len(self._records)

    def _find(self, i: int) -> tuple[str, np.void]:
        """Path of the shard of image i, and its record."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        return self._paths[int(np.searchsorted(self._first, i, side="right")) - 1], self._records[i]

    def name(self, i: int) -> str:
        """Name of image i, 0 <= i < len(self), in its shard, read from there; IndexError beyond."""
        path, record = self._find(i)
        try:
            file = self._file(path, os.getpid())
            return read_name(file.fd, record)
        except Exception:  # gone or replaced, by what makes tarfile raise anything
            return f"image at byte {int(record['block']) * BLOCK}"

    def path(self, i: int) -> str:
        """SHARD/NAME of image i, 0 <= i < len(self); IndexError beyond."""
        return f"{self._find(i)[0]}/{self.name(i)}"

    def read(self, i: int) -> bytes:
        """The file of image i as it is stored; raises Unreadable, naming it and the reason."""
        path, record = self._find(i)
        size = int(record["size"])
        try:
            file = self._file(path, os.getpid())  # held while it is read
            found = pread(file.fd, BLOCK + size, (int(record["block"]) - 1) * BLOCK)
        except OSError as error:
            raise Unreadable(self.path(i), reason_of(error)) from None
        if not is_header(found[:BLOCK], record) or len(found) < BLOCK + size:
            raise Unreadable(self.path(i), "the shard is not the one that was opened: it has changed since")
        if not size:
            raise Unreadable(self.path(i), "empty file")
        return found[BLOCK:]

    def order(self, seed: int, epoch: int, buffer: int = 0) -> Tensor:
        """The images of an epoch in their order, int64 (n,): see `Source.order`."""
        if not 0 < buffer < len(self):
            return epoch_order(len(self), seed, epoch)
        return shard_order(np.diff(self._first), seed, epoch, buffer)

    def fingerprint(self) -> str:
        """Changes when a shard's name, what its headers say, the order or a label does, not with the root."""
        names = "\0".join(os.path.basename(path) for path in self._paths)
        # uint8: no memoryview of records can be hashed
        return self._fingerprint(
            os.fsencode(names), np.asarray(self._first, "<i8").data, self._records.view(np.uint8).data
        )


class _File:
    """A file open for reading until nobody holds it: threads may read from it while others are opened."""

    def __init__(self, path: str, process: int) -> None:
        """process: the one that opens it; not used, but a cache keyed by it hands no file down to a fork."""
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class _Codes:
    """Labels of one shard after the other, by one numbering of all their kinds."""

    def __init__(self) -> None:
        self.kinds: dict[str, int] = {}
        self._codes: bytearray | None = bytearray()

    def add(self, codes: np.ndarray, kinds: list[str]) -> None:
        if self._codes is None or (codes < 0).any():
            self._codes = None
            return
        table = np.zeros(len(kinds), np.int32)
        for code in np.unique(codes):
            table[code] = self.kinds.setdefault(kinds[code], len(self.kinds))
        self._codes += table[codes].tobytes()

    def complete(self) -> np.ndarray | None:
        """The labels of all images, int32 (n,); None if one has none."""
        return None if self._codes is None else np.frombuffer(self._codes, np.int32)


def _read_classes(paths: list[str]) -> list[str] | None:
    """Names of the classes, if a file beside the shards says them."""
    found = {}
    for path in {os.path.join(os.path.dirname(path), CLASSES) for path in paths}:
        if os.path.isfile(path):
            with open(path, "rb") as file:
                found[path] = file.read(_TEXT).decode("utf-8", "surrogateescape").splitlines()
    if len({tuple(names) for names in found.values()}) > 1:
        raise ValueError(f"{' and '.join(sorted(found))} differ: open shards of one set of classes")
    return next(iter(found.values()), None)


def is_tar(name: str) -> bool:
    """Whether a file's name is that of a tar, compressed ones included."""
    return name.lower().endswith((".tar", *COMPRESSED))


def expand(pattern: str) -> list[str]:
    """The paths that {000..127}, {a,b} and then * ? [...] stand for; [pattern] if it has none of these.

    Raises ValueError on braces that make no sense and FileNotFoundError where nothing matches * ? [...].
    """
    paths = []
    try:
        for path in itertools.islice(_expand_braces(pattern), MOST + 1):
            found = sorted(glob.glob(path), key=os.fsencode) if glob.has_magic(path) else [path]
            if not found:
                raise FileNotFoundError(f"{path}: no file matches")
            paths += found
    except RecursionError:
        raise ValueError(f"{pattern[:80]}...: too many braces; write {{000..127}} or {{a,b}}") from None
    if len(paths) > MOST:
        raise ValueError(f"{pattern}: more than {MOST:,} shards; write {{000..127}} or {{a,b}} for fewer")
    return paths


def _expand_braces(pattern: str) -> Iterator[str]:
    start = pattern.find("{")
    if start < 0:
        yield pattern
        return
    commas, depth = [start], 0
    for end, character in enumerate(pattern[start:], start):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 1:
            commas.append(end)
        if not depth:
            break
    else:
        raise ValueError(f"{pattern}: a brace is not closed; write {{000..127}} or {{a,b}}")
    parts: Iterable[str] = [pattern[a + 1 : b] for a, b in itertools.pairwise([*commas, end])]
    if len(commas) == 1:
        inside = pattern[start + 1 : end]
        span = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", inside)
        if not span or int(span[1]) > int(span[2]):
            raise ValueError(f"{pattern}: {{{inside}}} is no range; write {{000..127}} or {{a,b}}")
        width = max(map(len, span.groups())) if span[1].startswith("0") else 0
        parts = (f"{number:0{width}}" for number in range(int(span[1]), int(span[2]) + 1))
    for part in parts:
        for middle in _expand_braces(part):
            for rest in _expand_braces(pattern[end + 1 :]):
                yield pattern[:start] + middle + rest


def open_shards(root: str, paths: list[str], patterns: Patterns = ALL) -> Shards:
    """The images of the tar files `paths`; errors name `root`, what they were found by.

    Raises FileNotFoundError naming all that are missing, and ValueError on files that are no plain tar, or
    hold no image.
    """
    if missing := [path for path in paths if not os.path.exists(path)]:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise FileNotFoundError(
            f"{root}: {len(missing)} of {len(paths)} shards are missing: {', '.join(missing[:10])}{more}"
        )
    for path in paths:
        if not is_tar(path) or not os.path.isfile(path):
            raise ValueError(f"{path}: not a tar file; give shards named NAME.tar")
    source = Shards(root, paths, _indexes(paths, patterns))
    if not len(source):
        n, held = len(paths), ", ".join(most_common(source.left_out.files))
        raise ValueError(
            f"{root}: no images in {n} tar file{'s' * (n != 1)}{held and f', but {held}'}; give shards that "
            f"hold images ({' '.join(TAKEN)})" + "".join(f"\n{note}" for note in source.notes)
        )
    return source


def _indexes(paths: list[str], patterns: Patterns) -> Iterator[Index]:
    """The index of each shard, in order; if that takes long, other processes help."""
    start = time.monotonic()
    done = 0
    while done < len(paths) and time.monotonic() - start < ALONE:
        yield index(paths[done], patterns)
        done += 1
    workers = min(len(paths) - done, cores(), 32)
    if workers < 2 or multiprocessing.current_process().daemon:  # these may have no children
        yield from (index(path, patterns) for path in paths[done:])
        return
    some = [paths[i : i + 4] for i in range(done, len(paths), 4)]
    for indexes in map_in_processes(functools.partial(_index_all, patterns), some, workers):
        yield from indexes


def _index_all(patterns: Patterns, paths: list[str]) -> list[Index]:
    return [index(path, patterns) for path in paths]
