"""A file is whole or absent; a folder belongs to one job with one set of settings, and to one process."""

import errno
import fcntl
import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastdino import files
from fastdino.files import (
    belongs,
    claim,
    differences,
    holder,
    lock,
    printable,
    printable_name,
    read_json,
    write_atomically,
    write_text,
)

SETTINGS: dict[str, Any] = {"seed": 0, "size": [8, 8], "fingerprint": 7}


def take(folder: Path, *, settings: dict[str, Any] = SETTINGS, **how: Any) -> Any:
    return claim(folder, "job.json", settings, "a job", "the files", **how)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("old")

    def fail(tmp: Path) -> None:
        tmp.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_written_whole_with_ordinary_permissions(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_text(tmp_path / "a", "one\n")
        write_text(tmp_path / "a", "two\n")
    finally:
        os.umask(before)
    assert (tmp_path / "a").read_text() == "two\n"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_names_that_are_no_utf8_can_be_printed() -> None:
    assert printable(os.fsdecode(b"caf\xe9 \xc3\xa9")) == "caf\\udce9 é"
    assert printable("a\nb\r\t\x1b[31m\u202e日\u3000") == "a\nb\\r\\t\\x1b[31m\\u202e日\u3000"
    assert printable_name("a\nb\0") == "a\\nb\\x00"


def test_differences_are_those_of_the_json_by_dotted_name() -> None:
    was = {"a": {"b": [1, 2], "c": None, "gone": 1}, "same": (1, 2)}
    assert differences(was, {"same": [1, 2], "a": {"b": (1, 3), "c": None}, "new": False}) == {
        "a.b": ([1, 2], [1, 3]),
        "a.gone": (1, None),
        "new": (None, False),
    }


def test_a_claimed_folder_is_of_these_settings_for_good(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    assert not belongs(folder, "job.json", SETTINGS, "a job", "the files")
    assert not folder.exists()
    take(folder).close()
    assert json.loads((folder / "job.json").read_text()) == SETTINGS
    assert belongs(folder, "job.json", SETTINGS, "a job", "the files")
    with take(folder):  # goes on
        pass


@pytest.mark.parametrize(
    ("settings", "other"),
    [
        (
            {"seed": 1, "size": [8, 9], "fingerprint": 8},
            "settings (seed 0 not 1, size [8, 8] not [8, 9])",
        ),
        ({**SETTINGS, "fingerprint": 8}, "images"),
        ({**SETTINGS, "more": 1}, "settings (more None not 1)"),
    ],
)
@pytest.mark.parametrize("children", [False, True])
def test_other_settings_are_refused_with_the_differences(
    tmp_path: Path, settings: dict[str, Any], other: str, children: bool
) -> None:
    folder = tmp_path / "folder"
    take(folder, children=children).close()
    with pytest.raises(FileExistsError) as error:
        take(folder, settings=settings, children=children)
    assert str(error.value) == f"{folder} holds a job of other {other}: give another folder or delete it"
    assert json.loads((folder / "job.json").read_text()) == SETTINGS
    take(folder, children=children).close()  # a refusal does not hold the folder


def test_files_of_others_are_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError, match=r"file is a file: give a new folder for the files$"):
        take(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".hidden").touch()  # what a kill may leave
    assert not belongs(tmp_path / "folder", "job.json", SETTINGS, "a job", "the files")
    (tmp_path / "folder" / "a").write_text("precious")
    with pytest.raises(
        FileExistsError, match=r"folder holds other files: give a new or empty folder for the files$"
    ):
        take(tmp_path / "folder", children=True)
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [".hidden", "a"]


HOLD = """
import os, sys, time
from pathlib import Path
from fastdino.files import claim
held = claim(Path(sys.argv[1]), "job.json", {"seed": 0}, "a job", "the files", children=sys.argv[2] == "True")
if os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
time.sleep(60)
"""


@pytest.mark.parametrize("children", [False, True])
def test_a_lock_holds_as_long_as_its_process_or_as_the_children_too(tmp_path: Path, children: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), str(children)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            with pytest.raises(FileExistsError) as error:
                take(tmp_path, settings={"seed": 0}, children=children, busy="another job is at work")
            who = "" if children else rf" \(process {process.pid} of \S+ on \S+\)"
            assert re.fullmatch(
                rf"{tmp_path}: another job is at work{who}; wait for it or stop it", str(error.value)
            )
            process.kill()
            process.wait()
            free = lock(tmp_path, children=children)
            assert (free is None) == children
        finally:
            process.kill()
            os.kill(child, 9)
    deadline = time.monotonic() + 300
    while not (free := free or lock(tmp_path, children=children)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    free.close()
    assert (tmp_path / ".lock").exists() == (not children)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that knows none."""

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("children", [False, True])
def test_where_the_file_system_has_no_locks_a_file_stands_for_one(
    tmp_path: Path, no_locks: None, children: bool
) -> None:
    held = lock(tmp_path, children=children)
    assert held is not None
    assert held.note == ""
    marker = tmp_path / ".lock.held"
    assert lock(tmp_path, children=children) is None
    with pytest.raises(FileExistsError) as error:
        take(tmp_path, children=children)
    told = rf"\(process {os.getpid()} of \S+ on \S+, alive 0 minutes ago; if it has ended, remove {marker}\)"
    assert re.search(told, str(error.value))
    held.close()
    assert not marker.exists()
    take(tmp_path, children=children).close()
    assert not marker.exists()
    with take(tmp_path, children=children):
        marker.unlink()  # what it says works
        lock(tmp_path, children=children).close()  # type: ignore[union-attr]


LEAVE = """
import fcntl, os, sys
from pathlib import Path
from fastdino import files
def refuse(*arguments):
    raise OSError(95, "Operation not supported")
fcntl.lockf = refuse
assert files.lock(Path(sys.argv[1]))
os.kill(os.getpid(), 9)
"""


def test_a_killed_process_leaves_a_lock_that_is_taken_over_and_said(tmp_path: Path, no_locks: None) -> None:
    killed = subprocess.run([sys.executable, "-c", LEAVE, str(tmp_path)], check=False)
    assert killed.returncode == -9
    assert (tmp_path / ".lock.held").exists()
    with lock(tmp_path) as held:  # type: ignore[union-attr]
        said = rf"{tmp_path} was locked by process \d+ of \S+ on \S+, which has ended: taken over"
        assert re.fullmatch(said, held.note)
        assert lock(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("content", "age", "taken"),
    [
        ({"machine": "another", "pid": 1, "host": "far", "began": "5", "user": "me"}, 60, False),
        ({"machine": "another", "pid": 1, "host": "far", "began": "5", "user": "me"}, 3600, True),
        ("", 0, False),  # being written
        ("", 3600, True),
        ("[" * 5000, 3600, True),
        ({"pid": 10**40, "machine": [], "host": {"a": 1}}, 3600, True),
        ({"pid": "1"}, 0, False),
    ],
)
def test_a_lock_of_another_machine_is_stale_where_nobody_touches_it(
    tmp_path: Path, no_locks: None, content: Any, age: int, taken: bool
) -> None:
    marker = tmp_path / ".lock.held"
    marker.write_text(content if isinstance(content, str) else json.dumps(content))
    before = time.time() - age
    os.utime(marker, (before, before))
    held = lock(tmp_path)
    assert (held is not None) == taken
    assert "may" not in holder(tmp_path)
    if held is not None:
        assert "which has ended: taken over" in held.note
        held.close()


def test_who_holds_a_lock_on_such_a_file_system_touches_it(
    tmp_path: Path, no_locks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LOCK_BEATS", 0.01)
    marker = tmp_path / ".lock.held"
    with lock(tmp_path):  # type: ignore[union-attr]
        os.utime(marker, (0, 0))
        deadline = time.monotonic() + 300
        while marker.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


WRITE = """
import os, sys
from pathlib import Path
from fastdino.files import write_atomically
write_atomically(Path(sys.argv[1]), lambda tmp: (tmp.write_text("half"), os.kill(os.getpid(), 9)))
"""


def test_what_a_killed_write_left_is_removed_by_the_next(tmp_path: Path) -> None:
    names = ["a[1].txt", "b.txt"]
    for name in names:
        subprocess.run([sys.executable, "-c", WRITE, str(tmp_path / name)], check=False)
    left = {path.name.partition(".txt.")[0] for path in tmp_path.iterdir()}
    assert left == {".a[1]", ".b"}
    write_text(tmp_path / names[0], "whole")
    assert {path.name.partition(".txt.")[0] for path in tmp_path.iterdir()} == {"a[1].txt", ".b"}
    files.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a[1].txt"]


def test_what_somebody_may_still_write_is_left(tmp_path: Path) -> None:
    mine = f".a.{files._machine()}@{os.getpid()}.tmp"  # of this process, which lives
    kept = [mine, ".a.0000abcd@1.tmp", ".a.12345.tmp", ".hidden.tmp", ".a.x@1.tmp.png"]
    gone = [".a.0000abcd@2.tmp", ".a.1234.tmp", f".a.{files._machine()}@{10**30}.tmp"]
    for name in (*kept, *gone):
        (tmp_path / name).touch()
    for name in gone[:2]:
        os.utime(tmp_path / name, (0, 0))
    files.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


def full_disk(kind: str, path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    tensors = {"a": torch.zeros(100_000)}
    write: dict[str, Callable[[Path], Any]] = {
        "text": lambda tmp: tmp.write_text("x" * 100_000),
        "safetensors": lambda tmp: save_file(tensors, tmp),
        "torch": lambda tmp: torch.save(tensors, tmp),
        "numpy": lambda tmp: np.save(open(tmp, "wb"), np.zeros(100_000)),  # noqa: SIM115
        "image": lambda tmp: Image.effect_noise((300, 300), 99).save(tmp, "PNG"),
    }
    write_atomically(path, write[kind])


@pytest.mark.parametrize("kind", ["text", "safetensors", "torch", "numpy", "image"])
def test_a_file_that_does_not_fit_on_the_disk_is_said_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with (
        ProcessPoolExecutor(1, get_context("spawn")) as other,
        pytest.raises(OSError, match=rf"^({path} cannot be written|\[Errno 27\] File too large: '{path}')"),
    ):
        other.submit(full_disk, kind, path).result()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "large"])
def test_what_is_no_ordinary_file_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.json"
    make: dict[str, Callable[[], Any]] = {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "large": lambda: (path.touch(), os.truncate(path, 2**40)),
    }
    make[kind]()
    with pytest.raises(ValueError, match=r"a\.json is (no regular file|larger than 67108864 bytes)"):
        read_json(path)


@pytest.mark.parametrize("text", ["", "{", "[" * 10**5, "9" * 5000, "\udce9", "nonsense"])
def test_json_that_is_none_is_refused_by_the_name_of_its_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"a\.json is damaged, it holds no JSON: "):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"text"', "", "[" * 10**5])
def test_settings_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(FileExistsError, match=r"job\.json is damaged: give another folder or delete "):
        take(tmp_path)
