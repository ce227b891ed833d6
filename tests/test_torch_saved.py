"""Torch-saved files of others are read; whatever else a pickle asks for is named, and nothing runs."""

import argparse
import builtins
import codecs
import collections
import copyreg
import ctypes
import datetime
import functools
import importlib
import io
import operator
import os
import pathlib
import pickle
import random
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import types
import uuid
import warnings
import webbrowser
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdino.torch_saved import read_torch_saved
from fastdino.weights import read_weights

NETWORK = {"backbone.norm.weight": torch.arange(6.0)}


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.called = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.called


def rewritten(
    path: Path, old: bytes, new: bytes, count: int = -1, compression: int = zipfile.ZIP_STORED
) -> None:
    """Replace bytes in the pickle of a zip file of torch.save."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content.replace(old, new, count) if name.endswith("data.pkl") else content)


def move(patch: pytest.MonkeyPatch, cls: type, path: str) -> None:
    """Make a class that of a module that need not be installed."""
    parts = path.split(".")
    for i in range(len(parts)):
        name = ".".join(parts[: i + 1])
        patch.setitem(sys.modules, name, types.ModuleType(name))
    cls.__module__, cls.__qualname__ = path, cls.__name__
    setattr(sys.modules[path], cls.__name__, cls)


# What trainings write


def settings() -> dict[str, Any]:
    """Beside the weights, by the real classes."""
    return {
        "args": argparse.Namespace(lr=np.float64(5e-4), seed=np.int64(3), output_dir=pathlib.Path("/out")),
        "windows": pathlib.PureWindowsPath("c:/out"),
        "arrays": [np.arange(5), np.array([1, "x"], object), np.dtype("f4"), np.bool_(True), np.str_("k")],
        "random": [np.random.get_state(), np.random.default_rng(0), random.getstate()],
        "optimizer": {
            "state": collections.defaultdict(dict, {0: {"step": torch.tensor(3)}}),
            "lr": np.float32(1),
        },
        "ordered": collections.OrderedDict(a=collections.Counter("ab")),
        "queue": collections.deque([1, 2], maxlen=3),
        "when": [datetime.datetime(2021, 4, 29), datetime.timedelta(1), uuid.UUID(int=3)],
        "plain": [
            b"bytes",
            b"",
            {1, 2},
            frozenset({1}),
            1j,
            slice(1),
            None,
            -(2**70),
            0.5,
            "text",
            (1, (2,)),
        ],
        "torch": [
            torch.float16,
            torch.Size((1, 2)),
            torch.device("cpu"),
            torch.__version__,
            torch.optim.AdamW,
        ],
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_settings_of_real_classes_are_read_past(tmp_path: Path, zipped: bool) -> None:
    torch.save({"teacher": NETWORK, **settings()}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    content = read_torch_saved(tmp_path / "a.pth")
    assert content.keys() == {"teacher", *settings()}
    assert torch.equal(content["teacher"]["backbone.norm.weight"], torch.arange(6.0))
    assert content["optimizer"]["state"][0]["step"] == 3
    assert content["queue"] == [1, 2]
    assert not isinstance(content["args"], argparse.Namespace)  # a stand-in, which keeps nothing
    assert vars(content["args"]) == {}


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (b"cnumpy._core.", b"cnumpy.core."),
        (b"cnumpy.core.", b"cnumpy._core."),
        (b"cpathlib\nP", b"cpathlib._local\nP"),
    ],
)
def test_settings_by_the_names_of_other_versions_are_read_past(
    tmp_path: Path, here: bytes, there: bytes
) -> None:
    torch.save({"teacher": NETWORK, **settings()}, tmp_path / "a.pth")
    rewritten(tmp_path / "a.pth", here, there)
    assert torch.equal(read_weights(tmp_path / "a.pth").teacher["backbone.norm.weight"], torch.arange(6.0))


def test_lightnings_and_omegaconfs_settings_are_read_past(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AttributeDict(dict):
        pass

    class DictConfig:
        def __init__(self) -> None:
            self._metadata, self._content = {"type": Any}, {"lr": 0.1}

    modules: dict[str, type] = {
        "lightning.fabric.utilities.data": AttributeDict,
        "lightning_fabric.utilities.data": AttributeDict,
        "pytorch_lightning.utilities.parsing": AttributeDict,
        "omegaconf.dictconfig": DictConfig,
    }
    for path, cls in modules.items():
        with monkeypatch.context() as patch:
            move(patch, cls, path)
            value = cls(lr=0.1) if cls is AttributeDict else cls()
            torch.save({"state_dict": NETWORK, "hyper_parameters": value}, tmp_path / "a.ckpt")
            if cls is AttributeDict:
                assert read_torch_saved(tmp_path / "a.ckpt")["hyper_parameters"] == {"lr": 0.1}
        assert read_weights(tmp_path / "a.ckpt").teacher.keys() == NETWORK.keys()


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"teacher": NETWORK}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_weights(tmp_path / "a.pth").teacher.keys() == NETWORK.keys()


# What nobody should run


TOUCH = "open('executed', 'w')"
HOSTILE: dict[str, tuple[Any, str]] = {
    "system": (Call(os.system, "touch executed"), "posix.system"),
    "eval": (Call(eval, TOUCH), "builtins.eval"),
    "exec": (Call(exec, TOUCH), "builtins.exec"),
    "compile": (Call(compile, TOUCH, "a", "exec"), "builtins.compile"),
    "import": (Call(__import__, "this"), "builtins.__import__"),
    "open": (Call(open, "executed", "w"), "io.open"),
    "getattr": (Call(getattr, os.path.join, "__globals__"), "builtins.getattr"),
    "setattr": (Call(setattr, NETWORK, "a", 1), "builtins.setattr"),
    "map": (Call(map, eval, [TOUCH]), "builtins.eval"),
    "popen": (Call(subprocess.Popen, ["touch", "executed"]), "subprocess.Popen"),
    "partial": (Call(functools.partial, eval, TOUCH), "functools.partial"),
    "attrgetter": (Call(operator.attrgetter("system")), "operator.attrgetter"),
    "methodcaller": (Call(operator.methodcaller, "touch"), "operator.methodcaller"),
    "import_module": (Call(importlib.import_module, "this"), "importlib.import_module"),
    "run_path": (Call(runpy.run_path, "a.py"), "runpy.run_path"),
    "rmtree": (Call(shutil.rmtree, "a"), "shutil.rmtree"),
    "touch": (Call(Path.touch, Path("executed")), "builtins.getattr|pathlib.Path.touch"),
    "browser": (Call(webbrowser.open, "http://localhost"), "webbrowser.open"),
    "library": (Call(ctypes.CDLL, "a.so"), "ctypes.CDLL"),
    "loads": (Call(pickle.loads, pickle.dumps(Call(eval, TOUCH))), "pickle.loads"),
    "torch.load": (Call(torch.load, "b.pth", None), "torch.serialization.load"),
    "numpy.load": (Call(np.load, "b.npy", None, True), "numpy.load"),
    "load_from_bytes": (Call(torch.storage._load_from_bytes, b"a"), "torch.storage._load_from_bytes"),
    "hub": (Call(torch.hub.load, "a/b", "c"), "torch.hub.load"),
    "reconstructor": (Call(copyreg._reconstructor, dict, object, None), "copyreg._reconstructor"),
    "decode": (Call(codecs.decode, b"a", "latin1"), "_codecs.decode"),
    "bytearray": (Call(bytearray, 10), "builtins.bytearray"),
    "whole network": (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    "sparse": (torch.eye(3).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
    "meta": (torch.empty(10**9, device="meta"), "torch._utils._rebuild_meta_tensor_no_storage"),
    "namespace": (Call(argparse.Namespace, state={"a": Call(eval, TOUCH)}), "builtins.eval"),
    "array": (np.array([Call(eval, TOUCH)], object), "builtins.eval"),
    "defaultdict": (collections.defaultdict(list, {0: Call(os.system, "touch executed")}), "posix.system"),
    "key": ({Call(eval, TOUCH): 1}, "builtins.eval"),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", HOSTILE)
def test_planted_calls_are_named_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, zipped: bool, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    value, named = HOSTILE[kind]
    content = {"teacher": NETWORK, "args": value}
    torch.save(content, "a.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=rf"^a\.pth cannot be read as weights: it holds .*({named})"
    ) as error:
        read_weights("a.pth")
    assert "\n" not in str(error.value)
    assert not Path("executed").exists()


def test_a_plain_pickle_is_named_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in range(6):
        Path("a.pth").write_bytes(pickle.dumps(Call(eval, TOUCH), protocol))
        with pytest.raises(ValueError, match=r"a\.pth cannot be read as weights: it (holds|begins with)"):
            read_weights("a.pth")
    assert not Path("executed").exists()
    builtins.eval(TOUCH)
    assert Path("executed").exists()  # the pickles do what they are said to


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_archives_of_other_kinds_are_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "jit.pt")
    np.savez(tmp_path / "a.npz", a=np.ones(2))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:  # as torch before 0.1.10 wrote
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    for name, why in {
        "jit.pt": "it is a TorchScript program",
        "a.npz": "it is a zip file, but not of torch.save",
        "a.tar": "it begins with b'st', as no file of torch.save",
    }.items():
        with pytest.raises(ValueError, match=re.escape(f"{name} cannot be read as weights: {why}")):
            read_weights(tmp_path / name)


@pytest.mark.parametrize("codec", ["punycode", "hex", "PUNY_code"])
def test_text_is_encoded_by_latin1_alone(tmp_path: Path, codec: str) -> None:
    torch.save({"teacher": NETWORK, "a": Call(codecs.encode, "a" * 9, codec)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="encode with another codec"):
        read_weights(tmp_path / "a.pth")


# Files that inflate or lie


def nested(levels: int, twice: bool) -> Any:
    value: Any = (1,)
    for _ in range(levels):
        value = (value, value) if twice else (value,)
    return value


@pytest.mark.parametrize(("levels", "twice"), [(60, True), (400, True)])
def test_keys_whose_hash_takes_for_ever_are_refused(tmp_path: Path, levels: int, twice: bool) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:  # torch.save would hash it too
        content = b"\x80\x02}(K\x01\x85" + b"q\x00h\x00\x86" * levels + b"K\x01u."
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/version", "3\n")
    with pytest.raises(ValueError, match="nests tuples too deeply"):
        read_weights(tmp_path / "a.pth")
    deep = b"\x80\x02}(K\x01" + b"\x85" * 100_000 + b"K\x01u."  # hashed, it overflows the stack
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", deep)
    with pytest.raises(ValueError, match="nests tuples too deeply"):
        read_weights(tmp_path / "a.pth")


def test_a_packed_file_is_refused(tmp_path: Path) -> None:
    torch.save({"teacher": {"backbone.a": torch.zeros(100_000)}}, tmp_path / "a.pth")
    rewritten(tmp_path / "a.pth", b"", b"", 0, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a.pth").stat().st_size < 10_000
    with pytest.raises(ValueError, match="its parts are compressed"):
        read_weights(tmp_path / "a.pth")


FOUR = b"X\x03\x00\x00\x00cpuq\x06K\x04"  # the storage's size, and the tensor's
SHAPE = b"K\x00K\x04\x85"


@pytest.mark.parametrize("storage", [FOUR, FOUR.replace(b"K\x04", b"J\x00\x00\x00\x7f")])
@pytest.mark.parametrize(
    "shape", [b"K\x00M\xe8\x03\x85", b"K\x00J\x00\x00\x00\x7f\x85", b"M\xff\xffK\x04\x85"]
)
def test_a_tensor_larger_than_the_file_is_refused(tmp_path: Path, storage: bytes, shape: bytes) -> None:
    torch.save({"a": torch.arange(4.0)}, tmp_path / "a.pth")
    rewritten(tmp_path / "a.pth", FOUR, storage)
    rewritten(tmp_path / "a.pth", SHAPE, shape)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (
            {"a": torch.zeros(1).expand(10**12)},
            "a is of shape (1000000000000,), and the file has but 4 bytes of it",
        ),
        ({"a": torch.zeros(8).as_strided((10**6, 8), (0, 1))}, "the file has but 32 bytes"),
        (dict.fromkeys(map(str, range(2000)), torch.zeros(100_000)), "its tensors share their memory"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "a is complex64 strided"),
        ({"module.a": torch.zeros(2), "a": torch.ones(2)}, "several networks"),
    ],
    ids=["expanded", "strided", "shared", "complex", "wrapped"],
)
def test_tensors_that_are_no_weights_are_refused(tmp_path: Path, state: Any, why: str) -> None:
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=re.escape(why)):
        read_weights(tmp_path / "a.pth")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for name in ("a.pth", "a.safetensors", "teacher.safetensors"):
        os.mkfifo(tmp_path / name)  # opening it would wait for ever
        with pytest.raises(FileNotFoundError, match="is no file"):
            read_weights(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no file"):
        read_weights("/dev/zero")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_checkpoint_ends_in_a_sentence(tmp_path: Path, zipped: bool) -> None:
    path, generator, sentences = tmp_path / "a.pth", random.Random(0), []
    torch.save({"teacher": NETWORK, **settings()}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(generator.choice((1, 1, 20))):
            damaged[generator.randrange(len(whole))] = generator.randrange(256)
        path.write_bytes(damaged[: generator.choice((len(whole), generator.randrange(len(whole))))])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                read_weights(path)
            except ValueError as error:
                sentences.append(str(error))
    assert len(sentences) > 100
    assert [said for said in sentences if str(path) not in said] == []
