"""A checkpoint's folder as it is read: whoever wrote it, it executes nothing, and damage in it is noticed.

torch.distributed.checkpoint writes tensors to `*.distcp` and where each lies to `.metadata`, a pickle, which
its own reader executes. Here that pickle is read without making a single object that it names.
"""

import hashlib
import io
import math
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from fastdino.files import open_regular, read_bytes, read_json

DATA = re.compile(r"__\d+_\d+\.distcp")  # the names that DCP gives to its files of tensors
LARGEST = 2**48  # of any number in it

# All that the metadata of a checkpoint names, of torch 2.11 to 2.14 and Python 3.11 to 3.13.
_DCP = "torch.distributed.checkpoint"
NAMED = {
    *((f"{_DCP}.metadata", kind.__name__) for kind in (Metadata, MetadataIndex, StorageMeta)),
    *((f"{_DCP}.metadata", kind.__name__) for kind in (TensorProperties, TensorStorageMetadata)),
    *((f"{_DCP}.metadata", name) for name in ("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("builtins", "getattr"),  # of an enum, in Python 3.11.0 to 3.11.3
    *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
}
# These make room for as many bytes as they say before they look whether there are any.
_REFUSED = (pickle.BYTEARRAY8[0], pickle.NEXT_BUFFER[0], pickle.READONLY_BUFFER[0])


class _StandIn:
    """Stands for an object of a pickle: it keeps what the pickle gives to the object."""

    args: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *args: Any) -> "_StandIn":
        made = object.__new__(cls)
        made.args = args
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle._Unpickler):
    """Reads a pickle in which every class and function is a `_StandIn`, but torch's dtypes, which are values.

    Python's own implementation, not that in C, in which three bytes can ask for 64 GB (LONG_BINPUT).
    """

    dispatch: ClassVar = {
        code: step for code, step in pickle._Unpickler.dispatch.items() if code not in _REFUSED
    }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if (module, name) not in NAMED:
            raise ValueError(f"it names {module}.{name}, which no checkpoint does")
        return type(name, (_StandIn,), {})


def _fields(x: Any, kind: str, *names: str) -> list[Any]:
    """These fields of what stands for an object of class `kind`."""
    if not isinstance(x, _StandIn) or type(x).__name__ != kind or not isinstance(x.state, dict):
        raise ValueError(f"there is no {kind}")
    return [x.state.get(name) for name in names]


def _numbers(*values: Any) -> list[int]:
    if not all(type(n) is int and 0 <= n <= LARGEST for n in values):
        raise ValueError("it holds impossible sizes")
    return list(values)


def _size(x: Any) -> torch.Size:
    if not isinstance(x, _StandIn) or type(x).__name__ != "Size" or not isinstance(x.args[0], tuple):
        raise ValueError("it holds something else in the place of a size")
    return torch.Size(_numbers(*x.args[0]))


def read_metadata(folder: Path) -> Metadata:
    """Where each tensor of a checkpoint lies; ValueError where that is damaged or not what DCP writes.

    What it says is of the right types; `check` compares it with the files.
    """
    content = read_bytes(folder / ".metadata")
    try:
        tensors, storage = _fields(
            _Unpickler(io.BytesIO(content)).load(), "Metadata", "state_dict_metadata", "storage_data"
        )
        described: dict[str, Any] = {}
        for name, tensor in tensors.items():
            properties, size, chunks = _fields(
                tensor, "TensorStorageMetadata", "properties", "size", "chunks"
            )
            parts = [
                [_size(x) for x in _fields(c, "ChunkStorageMetadata", "offsets", "sizes")] for c in chunks
            ]
            dtype = properties.state[0]
            if not isinstance(name, str) or not isinstance(dtype, torch.dtype):
                raise ValueError("it holds no dtype")
            described[name] = TensorStorageMetadata(
                TensorProperties(dtype=dtype),
                _size(size),
                [ChunkStorageMetadata(offsets, sizes) for offsets, sizes in parts],
            )
        places = {}
        for key, place in storage.items():
            name, offset = _fields(key, "MetadataIndex", "fqn", "offset")
            path, start, length = _fields(place, "_StorageInfo", "relative_path", "offset", "length")
            if not isinstance(name, str) or not isinstance(path, str) or not DATA.fullmatch(path):
                raise ValueError("it holds a path out of the checkpoint")
            start, length = _numbers(start, length)
            places[MetadataIndex(name, _size(offset))] = _StorageInfo(path, start, length)
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"its .metadata is damaged: {error or type(error).__name__}") from None
    return Metadata(described, storage_data=places, storage_meta=StorageMeta())


def misfit(metadata: Metadata, tensors: Mapping[str, Tensor]) -> str:
    """The first of `tensors` that is not in the checkpoint as it is, as words; empty if all are."""
    for name, tensor in tensors.items():
        stored = metadata.state_dict_metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            return f"{name} is not in it"
        there, here = (stored.size, stored.properties.dtype), (tensor.size(), tensor.dtype)
        if there != here:
            return f"{name} is {_described(*there)} there and {_described(*here)} here"
    return ""


def _described(size: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} ({', '.join(map(str, size))})"


def check(folder: Path, metadata: Metadata, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where the files of a checkpoint cannot hold what its metadata says of `tensors`."""
    if problem := misfit(metadata, tensors):
        raise ValueError(problem)
    sizes: dict[str, int] = {}
    for name in tensors:
        stored: Any = metadata.state_dict_metadata[name]
        covered = 0
        for chunk in stored.chunks:
            place = metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
            if (
                place is None
                or len(chunk.offsets) != len(stored.size)
                or len(chunk.sizes) != len(stored.size)
            ):
                raise ValueError(f"a part of {name} is missing")
            path = folder / place.relative_path
            if path.name not in sizes:
                found = os.lstat(path)
                if not stat.S_ISREG(found.st_mode):
                    raise ValueError(f"{path.name} is no regular file")
                sizes[path.name] = found.st_size
            within = all(o + n <= s for o, n, s in zip(chunk.offsets, chunk.sizes, stored.size, strict=True))
            count = math.prod(chunk.sizes)
            fits = count * stored.properties.dtype.itemsize <= place.length
            if not (within and fits and place.offset + place.length <= sizes[path.name]):
                raise ValueError(f"{path.name} is too short for {name}")
            covered += count
        distinct = {tuple(chunk.offsets) for chunk in stored.chunks if math.prod(chunk.sizes)}
        if covered != math.prod(stored.size) or len(distinct) != sum(
            bool(math.prod(c.sizes)) for c in stored.chunks
        ):
            raise ValueError(f"a part of {name} is missing")


class Reader(dcp.FileSystemReader):
    """DCP's reader of a folder whose metadata is known and checked: it reads no pickle."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's metadata, whichever rank's is asked for."""
        return self.metadata

    def _slice_file(self, file: IO[bytes], sinfo: _StorageInfo) -> IO[bytes]:
        """One tensor, as torch.save wrote it: a zip. A packed one could be a thousand times as large."""
        file.seek(sinfo.offset)
        part = io.BytesIO(file.read(sinfo.length))
        with zipfile.ZipFile(part) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > sinfo.length:
                    raise ValueError(f"{sinfo.relative_path} is packed, which no checkpoint is")
        part.seek(0)
        return part


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a checkpoint but info.json, by name: 0.6 s for a GB."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name != "info.json":
            with open_regular(path) as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def read_info(folder: Path, *, verify: bool) -> dict[str, Any]:
    """The info.json of a checkpoint; where asked, after comparing the files with the digests in it, if any.

    Raises:
        ValueError: it is damaged, or another file is.
    """
    info = read_json(folder / "info.json")
    if not isinstance(info, dict):
        raise ValueError("its info.json holds no information")
    expected = info.pop("digests", {})
    if not isinstance(expected, dict):
        raise ValueError("its info.json holds no digests")
    if verify and expected:  # checkpoints of earlier versions have none
        found = digests(folder)
        if damaged := [name for name in expected if found.get(name) != expected[name]]:
            raise ValueError(f"{damaged[0]} is damaged: it is not what was written")
    return info
