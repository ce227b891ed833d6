"""A file is whole or absent; a folder belongs to one job with one set of settings, and to one process."""

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastdino.files import (
    belongs,
    claim,
    differences,
    lock,
    printable,
    printable_name,
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
            assert str(error.value) == f"{tmp_path}: another job is at work; wait for it or stop it"
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
