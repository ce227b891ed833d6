"""Nothing in a stranger's checkpoint is executed; one that lies or is damaged is refused in a sentence."""

import io
import os
import pickle
import random
import resource
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata

from fastdino import checkpoint
from fastdino.checkpoint_reader import NAMED, read_metadata


def tensors(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {"a": torch.full((5, 3), float(value)), "b": torch.tensor(int(value)), "c": torch.zeros(0, 2)}


class Payload:
    """Makes a folder where it is executed."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path, 1, tensors(3), {"images": "abc"})


def without_digests(folder: Path) -> None:
    """As a stranger would, who can make the right ones."""
    (folder / "info.json").write_text("{}")


def rewrite(folder: Path, change: Callable[[Metadata], Any]) -> None:
    metadata = FileSystemReader(folder).read_metadata()
    changed = change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata if changed is None else changed))
    without_digests(folder)


def put(where: str, payload: Any) -> Callable[[Metadata], Any]:
    def change(metadata: Metadata) -> Any:
        tensor, meta = metadata.state_dict_metadata["a"], metadata.storage_meta
        assert meta is not None
        places: dict[str, Callable[[], Any]] = {
            "whole": lambda: payload,
            "state_dict_metadata": lambda: setattr(metadata, "state_dict_metadata", payload),
            "a tensor": lambda: metadata.state_dict_metadata.update({"more": payload}),
            "a size": lambda: setattr(tensor, "size", payload),
            "chunks": lambda: tensor.chunks.append(payload),  # type: ignore[union-attr]
            "planner_data": lambda: setattr(metadata, "planner_data", {"a": payload}),
            "storage_data": lambda: metadata.storage_data.update({payload: 1}),
            "storage_data's value": lambda: metadata.storage_data.update(
                {next(iter(metadata.storage_data)): payload}
            ),
            "storage_meta": lambda: setattr(metadata, "storage_meta", payload),
            "modules": lambda: meta.modules.append(payload),
            "version": lambda: setattr(metadata, "version", payload),
            "a new field": lambda: setattr(metadata, "more", payload),
        }
        return places[where]()

    return change


PLACES = (
    *("whole", "state_dict_metadata", "a tensor", "a size", "chunks", "planner_data", "storage_data"),
    *("storage_data's value", "storage_meta", "modules", "version", "a new field"),
)


@pytest.mark.parametrize("where", PLACES)
def test_a_payload_in_the_metadata_is_refused_unexecuted(where: str, folder: Path, tmp_path: Path) -> None:
    rewrite(folder, put(where, Payload(tmp_path / "executed")))
    with pytest.raises(ValueError, match=r"step_1 cannot be read: its \.metadata is damaged: it names "):
        checkpoint.load(folder, tensors())
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_payload_of_any_protocol_is_refused(protocol: int, folder: Path, tmp_path: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "executed"), protocol))
    with pytest.raises(ValueError, match=r"it names posix\.mkdir, which no checkpoint does"):
        read_metadata(folder)
    assert not (tmp_path / "executed").exists()


def test_what_a_checkpoint_may_name_is_not_executed_either(folder: Path) -> None:
    """Every name that is let through: called, and given attributes."""
    for module, name in sorted(NAMED):
        program = [pickle.PROTO + b"\2", f"c{module}\n{name}\n".encode(), b"U\1aU\1b", pickle.TUPLE2]
        (folder / ".metadata").write_bytes(b"".join([*program, pickle.REDUCE, pickle.STOP]))
        with pytest.raises(ValueError, match="damaged: there is no Metadata"):
            read_metadata(folder)
        built = [*program[:2], b"N}U\1aK\1s", pickle.TUPLE2, pickle.BUILD, pickle.STOP]
        (folder / ".metadata").write_bytes(b"".join(built))
        with pytest.raises(ValueError, match="damaged: "):
            read_metadata(folder)


def test_the_metadata_of_a_rank_does_not_stand_in_for_that_of_all(folder: Path, tmp_path: Path) -> None:
    for name in ("__0.metadata", "0.metadata"):
        (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    (folder / ".metadata").unlink()
    without_digests(folder)
    with pytest.raises(ValueError, match=r"cannot be read: .*No such file"):
        checkpoint.load(folder, tensors())
    assert not (tmp_path / "executed").exists()


def saved(value: Any, method: int = zipfile.ZIP_STORED) -> bytes:
    """What torch.save makes of it, packed by `method`."""
    torch.save(value, plain := io.BytesIO())
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed := io.BytesIO(), "w", method) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return packed.getvalue()


@pytest.mark.parametrize("kind", ["a pickle", "torch.save", "torch.save of old"])
def test_a_payload_in_place_of_tensors_is_refused_unexecuted(kind: str, folder: Path, tmp_path: Path) -> None:
    payload = Payload(tmp_path / "executed")
    torch.save(payload, old := io.BytesIO(), _use_new_zipfile_serialization=False)
    content = {"a pickle": pickle.dumps(payload), "torch.save": saved(payload)}.get(kind, old.getvalue())
    (folder / "__0_0.distcp").write_bytes(content)

    def point(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            place.offset, place.length = 0, len(content)

    rewrite(folder, point)
    with pytest.raises(ValueError, match="step_1 cannot be read: "):
        checkpoint.load(folder, tensors())
    assert not (tmp_path / "executed").exists()


def test_tensors_that_are_packed_are_refused_before_they_are_unpacked(folder: Path) -> None:
    content = saved(torch.zeros(2**24), zipfile.ZIP_DEFLATED)  # 64 MB in 65 kB
    (folder / "__0_0.distcp").write_bytes(content)

    def point(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            place.offset, place.length = 0, len(content)

    rewrite(folder, point)
    with pytest.raises(ValueError, match=r"__0_0\.distcp is packed, which no checkpoint is"):
        checkpoint.load(folder, tensors())


def set_place(**fields: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            for name, value in fields.items():
                setattr(place, name, value)

    return change


def set_size(*sizes: int) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        tensor: Any = metadata.state_dict_metadata["a"]
        tensor.size = torch.Size(sizes)
        tensor.chunks = [ChunkStorageMetadata(torch.Size([0] * len(sizes)), torch.Size(sizes))]

    return change


def set_chunks(*chunks: tuple[list[int], list[int]]) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        tensor: Any = metadata.state_dict_metadata["a"]
        tensor.chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in chunks]

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_place(relative_path="../../../etc/passwd"), "a path out of the checkpoint"),
        (set_place(relative_path="/etc/passwd"), "a path out of the checkpoint"),
        (set_place(relative_path="__0_0.distcp/../x"), "a path out of the checkpoint"),
        (set_place(relative_path="__1_0.distcp"), "No such file"),
        (set_place(offset=-1), "impossible sizes"),
        (set_place(offset=2**62), "impossible sizes"),
        (set_place(offset=True), "impossible sizes"),
        (set_place(offset="0"), "impossible sizes"),
        (set_place(length=2**40), "too short for a"),
        (set_place(length=1), "too short for a"),
        (set_size(2**40, 2**40), "a is float32 .* there and float32 .* here"),
        (set_size(3, 5), r"a is float32 \(3, 5\) there and float32 \(5, 3\) here"),
        (set_size(15), "a is float32"),
        (set_chunks(), "a part of a is missing"),
        (set_chunks(([0, 0], [4, 3])), "a part of a is missing"),
        (set_chunks(([0, 0], [5, 3]), ([0, 0], [5, 3])), "a part of a is missing"),
        (set_chunks(([0, 0], [6, 3])), "too short for a"),
        (set_chunks(([0], [15])), "a part of a is missing"),
        (lambda metadata: metadata.state_dict_metadata.pop("a") and None, "a is not in it"),
        (lambda metadata: metadata.storage_data.clear(), "a part of a is missing"),
        (lambda metadata: [metadata], "there is no Metadata"),
    ],
)
def test_metadata_that_lies_is_refused_before_anything_is_filled(
    change: Callable[[Metadata], Any], said: str, folder: Path
) -> None:
    rewrite(folder, change)
    into = tensors()
    with pytest.raises(ValueError, match=f"step_1 cannot be read: .*{said}"):
        checkpoint.load(folder, into)
    assert all(not value.any() for value in into.values())


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "info.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a device"])
def test_a_file_that_is_none_is_refused_and_not_waited_for(name: str, kind: str, folder: Path) -> None:
    without_digests(folder)
    path = folder / name
    path.unlink()
    {"pipe": os.mkfifo, "folder": os.mkdir, "link to a device": lambda p: p.symlink_to("/dev/zero")}[kind](
        path
    )
    with pytest.raises(ValueError, match=r"step_1 cannot be read: .*no regular file"):
        checkpoint.load(folder, tensors())


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_any_flipped_bit_is_noticed(name: str, folder: Path) -> None:
    path, rng = folder / name, random.Random(0)
    content = path.read_bytes()
    for _ in range(20):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name} is damaged: it is not what was written"):
            checkpoint.load(folder, tensors())
    path.write_bytes(content)
    assert checkpoint.load(folder, into := tensors()) == {"images": "abc"}
    assert torch.equal(into["a"], tensors(3)["a"])


def test_a_checkpoint_from_before_there_were_digests_is_read(folder: Path) -> None:
    (folder / "info.json").write_text('{"images": "abc"}')
    assert checkpoint.load(folder, into := tensors()) == {"images": "abc"}
    assert into["b"] == 3


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "3", '{"digests": 3}', "[" * 100_000, '{"a": ' + "9" * 5000, "\0"]
)
def test_a_damaged_info_is_refused(text: str, folder: Path) -> None:
    (folder / "info.json").write_text(text)
    with pytest.raises(ValueError, match=r"step_1 cannot be read: .*info\.json"):
        checkpoint.load(folder, tensors())


def test_no_damage_of_the_metadata_is_more_than_a_sentence(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bytes changed, cut, doubled; with little memory to ask for."""
    without_digests(folder)
    path, rng = folder / ".metadata", random.Random(0)
    content = path.read_bytes()
    refused = 0
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(len(damaged))
            damaged[at : at + rng.choice((0, 1, 1, 1, 9))] = rng.randbytes(rng.choice((0, 1, 1, 1, 9)))
        path.write_bytes(damaged)
        with suppress(ValueError):  # some of it means nothing
            checkpoint.load(folder, tensors())
            continue
        refused += 1
    assert refused > 200
    assert capfd.readouterr() == ("", "")


GREEDY = {
    "memo": pickle.PROTO + b"\2N" + pickle.LONG_BINPUT + b"\xff\xff\xff\xff" + pickle.STOP,
    "bytearray": pickle.PROTO + b"\5" + pickle.BYTEARRAY8 + (2**40).to_bytes(8, "little") + pickle.STOP,
    "frame": pickle.PROTO + b"\4" + pickle.FRAME + (2**62).to_bytes(8, "little") + pickle.STOP,
    "bytes": pickle.PROTO + b"\4" + pickle.BINBYTES8 + (2**40).to_bytes(8, "little") + pickle.STOP,
    "nested": pickle.PROTO + b"\4" + pickle.EMPTY_LIST * 10**6 + pickle.APPEND * (10**6 - 1) + pickle.STOP,
}


@pytest.mark.parametrize("kind", GREEDY)
def test_a_few_bytes_cannot_ask_for_much_memory(kind: str, folder: Path) -> None:
    (folder / ".metadata").write_bytes(GREEDY[kind])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="damaged"):
        read_metadata(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
