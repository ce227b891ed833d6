"""Files that are whole or absent, whatever kills the process that writes; folders that belong to one job."""

import fcntl
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# Bytes that are not UTF-8, and what moves a terminal's cursor, colours or turns round what follows.
_UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The same text, of one or several lines, where whatever names it holds can be printed."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_name(name: str) -> str:
    """The name of a file or class as it can be printed in a line."""
    return printable(name).replace("\n", "\\n")


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` fill a temporary file, flush it and rename it: readers see old or new, never half."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tmp.touch()
    mode = tmp.stat().st_mode  # by the umask; some writers make their file private
    try:
        write(tmp)
        os.chmod(tmp, mode)
        sync(tmp)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file by `write_atomically`."""
    write_atomically(path, lambda tmp: tmp.write_text(text))


def lock(folder: Path, *, children: bool = False) -> ExitStack | None:
    """Lock a folder until this process ends, however it ends, or closes the result.

    A file system without locks locks nothing: then this succeeds.

    Args:
        folder: it is there.
        children: the processes that this one forks hold the lock too, until the last of them has ended.
            Otherwise the folder gets a file .lock.

    Returns:
        the lock, or None where another process has it.
    """
    held = ExitStack()
    # A flock passes to forked processes; a record lock (lockf) does not, and needs a file to write to.
    path, flags = (folder, os.O_RDONLY) if children else (folder / ".lock", os.O_RDWR | os.O_CREAT)
    fd = os.open(path, flags, 0o666)
    held.callback(os.close, fd)
    try:
        (fcntl.flock if children else fcntl.lockf)(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # lockf may raise either where another process has the lock
        held.close()
        return None
    except OSError:  # some network file systems cannot lock
        pass
    return held


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, with both values (None where there is none), by name in order.

    Both are what JSON makes of them, and those of a dict within have dotted names: {"optim.lr": (0.1, 0.2)}.
    """
    a, b = (_flat(json.loads(json.dumps(settings))) for settings in (was, now))
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def belongs(folder: Path, marker: str, settings: Mapping[str, Any], what: str, content: str) -> bool:
    """Whether `folder` is the place of a job with these settings; False if it is new or empty.

    Args:
        folder: it need not be there.
        marker: the file in it that holds the settings, as JSON.
        settings: what JSON can hold. A fingerprint is of the images: its value is not shown.
        what: the job, as in "holds a pack of other settings".
        content: what it writes, as in "give a new folder for the shards".

    Raises:
        FileExistsError: it is a file, or holds other files, hidden ones aside, or a job of other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give a new folder for {content}")
    path = folder / marker
    if not path.is_file():
        if folder.exists() and any(not other.name.startswith(".") for other in folder.iterdir()):
            raise FileExistsError(f"{folder} holds other files: give a new or empty folder for {content}")
        return False
    changed = differences(json.loads(path.read_text()), settings)
    told = ", ".join(f"{k} {was} not {now}" for k, (was, now) in changed.items() if k != "fingerprint")
    if changed:
        other = f"settings ({told})" if told else "images"
        raise FileExistsError(f"{folder} holds {what} of other {other}: give another folder or delete it")
    return True


def claim(
    folder: Path,
    marker: str,
    settings: Mapping[str, Any],
    what: str,
    content: str,
    *,
    busy: str = "another process is writing there",
    children: bool = False,
) -> ExitStack:
    """Make `folder` the place of one job with these settings, new or continued, and lock it.

    Args:
        folder: made if it is not there.
        marker: see `belongs`, as of the next three.
        settings: they are kept in `marker`.
        what: the job.
        content: what it writes.
        busy: said where another process has the lock.
        children: see `lock`.

    Returns:
        the lock: close it, or use it as a context manager.

    Raises:
        FileExistsError: as by `belongs`, or another process works there. Nothing in the folder has changed.
    """
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
    elif not folder.is_dir():
        belongs(folder, marker, settings, what, content)
    held = lock(folder, children=children)
    if held is None:
        raise FileExistsError(f"{folder}: {busy}; wait for it or stop it")
    try:
        if not belongs(folder, marker, settings, what, content):
            write_text(folder / marker, json.dumps(settings))
    except BaseException:
        held.close()
        raise
    return held
