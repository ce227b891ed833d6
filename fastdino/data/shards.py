"""Tar shards: images and labels as WebDataset stores them, indexed once and then read at random."""

import contextlib
import functools
import glob
import io
import itertools
import json
import multiprocessing
import os
import re
import struct
import tarfile
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastdino.data.images import EXTENSIONS, Unreadable, reason_of
from fastdino.data.machine import cores, map_in_processes
from fastdino.data.sources import Source, epoch_order, shard_order
from fastdino.files import printable, write_atomically

BLOCK = tarfile.BLOCKSIZE
CLASSES = "classes.txt"  # beside the shards: the name of class 0, 1, ..., a line each; empty if there is none
OPEN = 128  # shards a process holds open; 1024 files is a common limit
ALONE = 1.0  # seconds of indexing before other processes are started to help
_VERSION = 1  # of the sidecar index
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_DAMAGED = (tarfile.TarError, ValueError, OverflowError, MemoryError)  # of headers that say anything
_LABEL = 4096  # bytes; a larger .cls member is no label
LARGEST = 1 << 32  # bytes; from this size on a member cannot be an image

# One image: its data begins at block `block` of 512 bytes and has `size` bytes. The header of the member ends
# there, has the checksum `sum` (modulo 2**16), and takes `head` blocks with the long names before it.
RECORD = np.dtype([("block", "<u4"), ("size", "<u4"), ("head", "<u2"), ("sum", "<u2")])


@dataclass
class Index:
    """The images of one shard, in their order."""

    records: np.ndarray  # RECORD (n,)
    labels: np.ndarray  # int32 (n,): an index into `kinds`, -1 for none
    kinds: list[str]  # what the .cls members hold
    folders: np.ndarray  # int32 (n,): an index into `folder_kinds`, -1 for none
    folder_kinds: list[str]
    note: str = ""  # what is wrong with the shard


class Shards(Source):
    """Images in tar files, as WebDataset stores them.

    Neighbours whose paths are the same up to the first dot of the base name belong together; those with an
    image's extension are images, hidden ones are skipped. If every image has a .cls member, what that holds
    is its class, named by the line of `classes.txt` beside the shards where there is one; else, if every
    image lies in one of two or more folders inside the tars, that folder is. Other members are ignored. Links
    are not followed. Per image 12 bytes, and 8 where there are labels.

    A shard that has changed since it was opened gives Unreadable, not other bytes. Each process opens the
    files itself.
    """

    def __init__(self, root: str, paths: list[str], indexes: Iterator[Index]) -> None:
        """indexes: those of the shards `paths`, in their order."""
        super().__init__(root)
        self._paths = paths
        self.__setstate__({})
        records, first = bytearray(), array("q", [0])
        labels, folders = _Codes(), _Codes()
        for index in indexes:
            records += index.records.tobytes()
            first.append(len(records) // RECORD.itemsize)
            labels.add(index.labels, index.kinds)
            folders.add(index.folders, index.folder_kinds)
            self.notes += [printable(index.note)] if index.note else []
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
            return _name(file.fd, record)
        except (OSError, tarfile.TarError):  # gone or replaced
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
            found = _pread(file.fd, BLOCK + size, (int(record["block"]) - 1) * BLOCK)
        except OSError as error:
            raise Unreadable(self.path(i), reason_of(error)) from None
        if not _is_header(found[:BLOCK], record) or len(found) < BLOCK + size:
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
    for folder in {os.path.dirname(path) for path in paths}:
        with contextlib.suppress(FileNotFoundError):
            file = Path(folder, CLASSES)
            found[str(file)] = file.read_bytes().decode("utf-8", "surrogateescape").splitlines()
    if len({tuple(names) for names in found.values()}) > 1:
        raise ValueError(f"{' and '.join(sorted(found))} differ: open shards of one set of classes")
    return next(iter(found.values()), None)


def is_tar(name: str) -> bool:
    """Whether a file's name is that of a tar, compressed ones included."""
    return name.lower().endswith((".tar", *_COMPRESSED))


def expand(pattern: str) -> list[str]:
    """The paths that {000..127}, {a,b} and then * ? [...] stand for; [pattern] if it has none of these.

    Raises ValueError on braces that make no sense and FileNotFoundError where nothing matches * ? [...].
    """
    paths = []
    for path in _expand_braces(pattern):
        found = sorted(glob.glob(path), key=os.fsencode) if glob.has_magic(path) else [path]
        if not found:
            raise FileNotFoundError(f"{path}: no file matches")
        paths += found
    return paths


def _expand_braces(pattern: str) -> list[str]:
    start = pattern.find("{")
    if start < 0:
        return [pattern]
    commas, depth = [start], 0
    for end, character in enumerate(pattern[start:], start):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 1:
            commas.append(end)
        if not depth:
            break
    else:
        raise ValueError(f"{pattern}: a brace is not closed; write {{000..127}} or {{a,b}}")
    parts = [pattern[a + 1 : b] for a, b in itertools.pairwise([*commas, end])]
    if len(parts) == 1:
        span = re.fullmatch(r"(\d+)\.\.(\d+)", parts[0])
        if not span or int(span[1]) > int(span[2]):
            raise ValueError(f"{pattern}: {{{parts[0]}}} is no range; write {{000..127}} or {{a,b}}")
        width = max(map(len, span.groups())) if span[1].startswith("0") else 0
        parts = [f"{number:0{width}}" for number in range(int(span[1]), int(span[2]) + 1)]
    return [
        pattern[:start] + middle + rest
        for rest_of in [_expand_braces(pattern[end + 1 :])]
        for part in parts
        for middle in _expand_braces(part)
        for rest in rest_of
    ]


def open_shards(root: str, paths: list[str]) -> Shards:
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
    source = Shards(root, paths, _indexes(paths))
    if not len(source):
        n = len(paths)
        raise ValueError(
            f"{root}: no images in {n} tar file{'s' * (n != 1)}; give shards that hold images "
            f"({' '.join(EXTENSIONS)})" + "".join(f"\n{note}" for note in source.notes)
        )
    return source


def _indexes(paths: list[str]) -> Iterator[Index]:
    """The index of each shard, in order; if that takes long, other processes help."""
    start = time.monotonic()
    done = 0
    while done < len(paths) and time.monotonic() - start < ALONE:
        yield index(paths[done])
        done += 1
    workers = min(len(paths) - done, cores(), 32)
    if workers < 2 or multiprocessing.current_process().daemon:  # these may have no children
        yield from map(index, paths[done:])
        return
    some = [paths[i : i + 4] for i in range(done, len(paths), 4)]
    for indexes in map_in_processes(_index_all, some, workers):
        yield from indexes


def _index_all(paths: list[str]) -> list[Index]:
    return [index(path) for path in paths]


def index(path: str) -> Index:
    """The index of a shard, from the file beside it if that fits; raises ValueError if it is no plain tar."""
    loaded = load_index(path)
    return scan(path) if loaded is None else loaded[0]


def index_path(path: Path) -> Path:
    """Where the index of a shard lies."""
    return path.with_name(path.name + ".index.npz")


def save_index(path: Path, size: int, found: Index, left_out: list[tuple[str, str]]) -> None:
    """Write the index of the shard `path` of `size` bytes beside it.

    left_out: (path, reason) of files that could not be packed into it.
    """
    about = {
        "version": _VERSION,
        "bytes": size,
        "kinds": found.kinds,
        "folder_kinds": found.folder_kinds,
        "left_out": left_out,
    }

    def write(tmp: Path) -> None:
        with open(tmp, "wb") as file:  # np.savez gives a path another name
            np.savez(
                file,
                about=np.frombuffer(json.dumps(about).encode(), np.uint8),
                records=found.records,
                labels=found.labels,
                folders=found.folders,
            )

    write_atomically(index_path(path), write)


def load_index(path: str) -> tuple[Index, list[tuple[str, str]]] | None:
    """The index beside a shard and what was left out of it; None if there is none that fits the shard.

    It fits if the shard has the size it had and its first and last image begin where they began.
    """
    try:
        with np.load(index_path(Path(path)), allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            if about["version"] != _VERSION:
                return None
            found = Index(
                file["records"], file["labels"], about["kinds"], file["folders"], about["folder_kinds"]
            )
        with open(path, "rb") as tar:
            if os.fstat(tar.fileno()).st_size != about["bytes"]:
                return None
            for record in found.records[[0, -1]] if len(found.records) else ():
                tar.seek((int(record["block"]) - 1) * BLOCK)
                if not _is_header(tar.read(BLOCK), record):
                    return None
    except Exception:  # there is none, or it is damaged somehow
        return None
    return found, [(name, reason) for name, reason in about["left_out"]]


def scan(path: str) -> Index:
    """The index of a shard, from its headers.

    Raises ValueError if it is compressed or no tar. Where it is cut short or damaged, `note` says so and what
    lies before is indexed.
    """
    with open(path, "rb") as file:
        if file.read(6).startswith(_MAGIC) or path.lower().endswith(_COMPRESSED):
            raise ValueError(f"{path}: a compressed tar cannot be read at random; unpack it to a plain .tar")
        size = file.seek(0, os.SEEK_END)
        if size > BLOCK << 32:
            raise ValueError(f"{path}: larger than 2 TiB; split it into several shards")
        file.seek(0)
        try:
            tar = tarfile.TarFile(fileobj=file, encoding="utf-8")
        except _DAMAGED as error:
            raise ValueError(f"{path}: not a tar file, or damaged at its start ({error})") from None
        return _scan(path, tar, size)


def _scan(path: str, tar: Any, size: int) -> Index:
    file = tar.fileobj
    records, labels, folders = bytearray(), array("i"), array("i")
    kinds: dict[str, int] = {}
    folder_kinds: dict[str, int] = {}
    # of the members whose path has this key: suffixes, label, and which image was the first
    key, suffixes, label, begin, odd = "", set[str](), -1, 0, 0
    while True:
        try:
            member = tar.next()
        except _DAMAGED:
            break
        if member is None or member.size < 0:  # a damaged header would lead back
            break
        tar.members.clear()  # it would keep them all
        name = _clean(member.name)
        if "/." in f"/{name}":  # hidden, as the files named ._* that Macs add
            continue
        group, suffix = _split(name)
        extension = "." + suffix.rpartition(".")[2].lower()
        elsewhere = member.islnk() or member.issym() or member.issparse()
        if elsewhere or member.size >= LARGEST or "size" in member.pax_headers:
            odd += extension in EXTENSIONS
            continue
        if not member.isreg():
            continue
        if member.offset_data + member.size > size:
            break
        if group != key or suffix in suffixes:
            key, suffixes, label, begin = group, set(), -1, len(labels)
        suffixes.add(suffix)
        if extension in EXTENSIONS:
            head = (member.offset_data - member.offset) // BLOCK
            records += struct.pack(
                "<IIHH", member.offset_data // BLOCK, member.size, min(head, 0xFFFF), member.chksum & 0xFFFF
            )
            labels.append(label)
            top, slash, _ = name.partition("/")
            folders.append(folder_kinds.setdefault(top, len(folder_kinds)) if slash else -1)
        elif extension == ".cls" and member.size <= _LABEL:
            file.seek(member.offset_data)
            text = file.read(member.size).decode("utf-8", "replace").strip()
            label = kinds.setdefault(text, len(kinds))
            labels[begin:] = array("i", [label]) * (len(labels) - begin)
    found = Index(
        np.frombuffer(records, RECORD),
        np.array(labels, np.int32),
        list(kinds),
        np.array(folders, np.int32),
        list(folder_kinds),
    )
    file.seek(tar.offset)
    if file.read(BLOCK) != bytes(BLOCK):  # a whole tar ends in zeros
        if len(found.labels) and found.labels[-1] < 0 and (found.labels[:-1] >= 0).any():
            # its label was cut off
            found.records, found.labels, found.folders = (
                x[:-1] for x in (found.records, found.labels, found.folders)
            )
        found.note = (
            f"{path} is cut short or damaged: only its first {len(found.records)} images are used; fetch or "
            "make it again"
        )
    elif odd:
        found.note = (
            f"{path}: {odd} images are links, sparse or larger than 4 GiB, and are left out; store plain "
            "files (tar --dereference --hard-dereference)"
        )
    return found


def _clean(name: str) -> str:
    return name.removeprefix("./").lstrip("/")


def _split(name: str) -> tuple[str, str]:
    """Key and suffix of a member: what is before and after the first dot of its base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix


def _pread(fd: int, size: int, offset: int) -> bytes:
    """The bytes there are, at most `size`."""
    found = os.pread(fd, size, offset)
    while 0 < len(found) < size and (more := os.pread(fd, size - len(found), offset + len(found))):
        found += more
    return found


def _is_header(block: bytes, record: np.void) -> bool:
    """Whether a block is the header that `record` was made from: a file's, with its size and checksum."""
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return member.isreg() and member.size == record["size"] and member.chksum & 0xFFFF == record["sum"]


def _name(fd: int, record: np.void) -> str:
    """A member's name; raises tarfile.TarError if it is not where it was."""
    size = max(1, int(record["head"])) * BLOCK
    headers = _pread(fd, size, int(record["block"]) * BLOCK - size)
    if not _is_header(headers[-BLOCK:], record):
        raise tarfile.ReadError
    with tarfile.TarFile(fileobj=io.BytesIO(headers), encoding="utf-8") as tar:
        member = tar.next()
    assert member is not None
    return member.name
