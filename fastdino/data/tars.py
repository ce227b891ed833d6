"""One tar: which of its members are images, by its headers or by the index that may lie beside it."""

import io
import json
import os
import struct
import tarfile
import zipfile
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastdino.data.sources import ALL, TAKEN, Patterns, by_product, extension_of
from fastdino.files import write_atomically

BLOCK = tarfile.BLOCKSIZE
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
LARGEST = 1 << 32  # bytes; from this size on a member cannot be an image
_VERSION = 1  # of the index beside a tar
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_LABEL = 4096  # bytes; a larger .cls member is no label
_HEAD = 1 << 20  # bytes that the headers of a member may take
_TEXT = 1 << 26  # bytes of text that an index may hold
_NOT_PLAIN = (
    "links, sparse, devices or larger than 4 GiB (store plain files: tar --dereference --hard-dereference)"
)

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
    others: Counter[str] = field(default_factory=Counter)  # members that are not taken, by why
    unfit: bool = False  # an index lies beside the shard and was not used


def index(path: str, patterns: Patterns = ALL) -> Index:
    """The index of a tar, from the file beside it if that fits; raises ValueError if it is no plain tar."""
    if patterns != ALL:  # the names are in the shard alone
        return scan(path, patterns)
    if loaded := load_index(path):
        return loaded[0]
    found = scan(path)
    found.unfit = index_path(Path(path)).exists()
    return found


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

    It may be a stranger's: nothing in it is executed or believed. It fits if the shard has the size it had,
    the images lie within it one after the other, and the first and last begin where they began.
    """
    beside = index_path(Path(path))
    try:
        size = os.stat(path).st_size
        if not beside.is_file():
            return None
        with zipfile.ZipFile(beside) as archive:  # that may inflate to any size
            if sum(part.file_size for part in archive.infolist()) > size // 16 + _TEXT:
                return None
        with np.load(beside, allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            found = Index(
                file["records"], file["labels"], about["kinds"], file["folders"], about["folder_kinds"]
            )
        left_out = [(str(name), str(reason)) for name, reason in about["left_out"]]
        if about["version"] != _VERSION or about["bytes"] != size or not _fits(found, size):
            return None
        with open(path, "rb") as tar:
            for record in found.records[[0, -1]] if len(found.records) else ():
                tar.seek((int(record["block"]) - 1) * BLOCK)
                if not is_header(tar.read(BLOCK), record):
                    return None
    except Exception:  # there is none, or it is damaged somehow
        return None
    return found, left_out


def _fits(found: Index, size: int) -> bool:
    """Whether an index can be that of a tar of `size` bytes."""
    n = len(found.records)
    if found.records.dtype != RECORD or found.records.shape != (n,):
        return False
    block, length = (found.records[name].astype(np.int64) for name in ("block", "size"))
    last = block + -(-length // BLOCK)  # where the next header begins at the earliest
    coded = ((found.labels, found.kinds), (found.folders, found.folder_kinds))
    return (
        bool((block > 0).all() and (block[1:] > last[:-1]).all() and (block * BLOCK + length <= size).all())
        and all(codes.dtype == np.int32 and codes.shape == (n,) for codes, _ in coded)
        and all(((codes >= -1) & (codes < len(kinds))).all() for codes, kinds in coded)
        and all(isinstance(kinds, list) and all(isinstance(k, str) for k in kinds) for _, kinds in coded)
    )


class _Tar(io.BufferedReader):
    """A file of which tarfile reads no more than `_HEAD` bytes for a member, whatever its headers say."""

    left = _HEAD

    def read(self, size: int | None = -1, /) -> bytes:
        """Raises tarfile.ReadError beyond the limit."""
        self.left -= _HEAD + 1 if size is None or size < 0 else size
        if self.left < 0:
            raise tarfile.ReadError("headers of more than a megabyte")
        return super().read(size)


def scan(path: str, patterns: Patterns = ALL) -> Index:
    """The index of a shard, from its headers.

    Raises ValueError if it is compressed or no tar. Where it is cut short or damaged, `note` says so and what
    lies before is indexed.
    """
    with _Tar(io.FileIO(path)) as file:
        if file.read(6).startswith(_MAGIC) or path.lower().endswith(COMPRESSED):
            raise ValueError(f"{path}: a compressed tar cannot be read at random; unpack it to a plain .tar")
        size = file.seek(0, os.SEEK_END)
        if size > BLOCK << 32:
            raise ValueError(f"{path}: larger than 2 TiB; split it into several shards")
        file.seek(0)
        try:
            tar = tarfile.TarFile(fileobj=file, encoding="utf-8")
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"{path}: not a tar file, or damaged at its start ({error})") from None
        return _scan(path, tar, size, patterns)


def _members(tar: Any, size: int) -> Iterator[tarfile.TarInfo]:
    """The members of a tar of `size` bytes, folders aside, up to its end or to where it is damaged."""
    file = tar.fileobj
    while True:
        file.left = _HEAD
        try:
            member = tar.next()
        except OSError:
            raise
        except Exception:  # headers that say anything make tarfile raise anything
            return
        if member is None or member.size < 0:  # a damaged header would lead back
            return
        tar.members.clear()  # it would keep them all, and what is said of all
        tar.pax_headers.clear()
        if not member.isdir():
            yield member
        if tar.offset > size:  # no file can be sought so far, perhaps
            return


def _why_not(member: tarfile.TarInfo, name: str, extension: str) -> str:
    """Why a member is neither an image nor says something of one; empty if it may be."""
    if found := next(filter(None, map(by_product, name.split("/"))), ""):
        return found
    plain = member.isreg() and not member.issparse() and "size" not in member.pax_headers
    if plain and member.size < LARGEST:
        return ""
    return _NOT_PLAIN if extension in TAKEN else extension


def _scan(path: str, tar: Any, size: int, patterns: Patterns) -> Index:
    file = tar.fileobj
    records, labels, folders = bytearray(), array("i"), array("i")
    kinds: dict[str, int] = {}
    folder_kinds: dict[str, int] = {}
    others = Counter[str]()
    # of the members whose path has this key: suffixes, label, and which image was the first
    key, suffixes, label, begin = "", set[str](), -1, 0
    for member in _members(tar, size):
        name = member.name.removeprefix("./").lstrip("/")
        group, suffix = _split(name)
        extension = extension_of(suffix)
        if why := _why_not(member, name, extension):
            others[why] += 1
            continue
        if member.offset_data + member.size > size:
            break
        if group != key or suffix in suffixes:
            key, suffixes, label, begin = group, set(), -1, len(labels)
        suffixes.add(suffix)
        if extension == ".cls" and member.size <= _LABEL:
            file.seek(member.offset_data)
            text = file.read(member.size).decode("utf-8", "replace").strip()
            label = kinds.setdefault(text, len(kinds))
            labels[begin:] = array("i", [label]) * (len(labels) - begin)
        elif why := extension * (extension not in TAKEN) or patterns.why_not(name):
            others[why] += 1
        else:
            head = (member.offset_data - member.offset) // BLOCK
            records += struct.pack(
                "<IIHH", member.offset_data // BLOCK, member.size, min(head, 0xFFFF), member.chksum & 0xFFFF
            )
            labels.append(label)
            top, slash, _ = name.partition("/")
            folders.append(folder_kinds.setdefault(top, len(folder_kinds)) if slash else -1)
    file.left = _HEAD
    file.seek(min(tar.offset, size))
    cut = file.read(BLOCK) != bytes(BLOCK)  # a whole tar ends in zeros
    if cut and labels and labels[-1] < 0 and max(labels) >= 0:  # its label was cut off
        del records[-RECORD.itemsize :], labels[-1:], folders[-1:]
    note = f"{path} is cut short or damaged: only its first {len(labels)} images are used; fetch or make it "
    return Index(
        np.frombuffer(records, RECORD),
        np.array(labels, np.int32),
        list(kinds),
        np.array(folders, np.int32),
        list(folder_kinds),
        f"{note}again" if cut else "",
        others,
    )


def _split(name: str) -> tuple[str, str]:
    """Key and suffix of a member: what is before and from the first dot of its base name on."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return folder + slash + stem, dot + suffix


def pread(fd: int, size: int, offset: int) -> bytes:
    """The bytes there are, at most `size`."""
    found = os.pread(fd, size, offset)
    while 0 < len(found) < size and (more := os.pread(fd, size - len(found), offset + len(found))):
        found += more
    return found


def is_header(block: bytes, record: np.void) -> bool:
    """Whether a block is the header that `record` was made from: a file's, with its size and checksum."""
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except Exception:  # bytes that are no header make tarfile raise anything
        return False
    return member.isreg() and member.size == record["size"] and member.chksum & 0xFFFF == record["sum"]


def read_name(fd: int, record: np.void) -> str:
    """A member's name; raises whatever it likes if it is not where it was."""
    size = max(1, int(record["head"])) * BLOCK
    headers = pread(fd, size, int(record["block"]) * BLOCK - size)
    if not is_header(headers[-BLOCK:], record):
        raise tarfile.ReadError
    with tarfile.TarFile(fileobj=io.BytesIO(headers), encoding="utf-8") as tar:
        if member := tar.next():
            return member.name
    raise tarfile.ReadError
