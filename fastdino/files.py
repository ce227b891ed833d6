"""Files that are whole or absent, whatever kills the process that writes; folders that belong to one job."""

import fcntl
import getpass
import json
import os
import re
import socket
import stat
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

# Bytes that are not UTF-8, and what moves a terminal's cursor, colours or turns round what follows.
_UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LOCK_BEATS = 60.0  # seconds between two signs of life of a lock where the file system has none
LOCK_STALE = 15 * LOCK_BEATS  # without one: whoever held it has ended
LEFTOVER = 24 * 3600.0  # seconds after which another machine's unfinished file is nobody's


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


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading; ValueError where it is a folder, or a pipe or device, which may never end."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ValueError(f"{path} is no regular file")
    return os.fdopen(fd, "rb")


def read_bytes(path: Path, largest: int = 2**28) -> bytes:
    """What is in a file; ValueError where that is no regular file or is larger than `largest` bytes."""
    with open_regular(path) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"{path} is larger than {largest} bytes: it is not what it should be")
    return content


def read_json(path: Path, largest: int = 2**26) -> Any:
    """The JSON in a file, NaN and infinities as None; ValueError, naming it, where it holds none."""
    content = read_bytes(path, largest)
    try:
        return json.loads(content, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, it holds no JSON: {error or type(error).__name__}") from None


def _machine() -> str:
    """Where process numbers mean the same, in 8 digits: the host, and the container."""
    place = socket.gethostname()
    with suppress(OSError):
        place += f" {os.stat('/proc/self/ns/pid').st_ino}"
    return f"{zlib.crc32(place.encode()):08x}"


def _began(pid: int) -> str:
    """When a process of this machine began, in ticks since the boot; empty where there is none."""
    with suppress(OSError):
        # The name, in brackets, may hold anything. Field 22 of proc(5) is the 20th after it.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    if not Path("/proc/self/stat").exists():  # no Linux: at least whether it is there
        with suppress(OSError):
            os.kill(pid, 0)
            return "some time"
    return ""


def sweep(folder: Path, name: str = "") -> None:
    """Remove what killed processes left of `write_atomically`: of one file, or of all in the folder.

    Theirs are those of processes of this machine that have ended, and those that nobody touched for a day.
    """
    pattern = re.compile(rf"\.({re.escape(name) if name else '.+'})\.(?:([^/]*)@)?(\d+)\.tmp", re.DOTALL)
    for path in folder.glob(".*.tmp"):
        if (found := pattern.fullmatch(path.name)) is None:
            continue
        machine, pid = found[2], int(found[3])
        with suppress(OSError, OverflowError):  # another process sweeps too
            ended = machine == _machine() and not _began(pid)
            if ended or time.time() - path.stat().st_mtime > LEFTOVER:
                path.unlink()


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` fill a temporary file, flush it and rename it: readers see old or new, never half.

    What earlier ones left that were killed is removed.

    Raises:
        OSError: it cannot be written, on a full disk say; the old file is as it was.
    """
    sweep(path.parent, path.name)
    tmp = path.with_name(f".{path.name}.{_machine()}@{os.getpid()}.tmp")
    try:
        tmp.touch()
        mode = tmp.stat().st_mode  # by the umask; some writers make their file private
        write(tmp)
        os.chmod(tmp, mode)
        sync(tmp)
        os.replace(tmp, path)
        sync(path.parent)
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{path} cannot be written: {error}") from error
        if error.filename is None:  # a full disk, while writing
            error.filename = str(path)
        raise
    except Exception as error:
        # Of safetensors, which a machine that only measures kernels need not have, and of torch.save.
        full = "PytorchStreamWriter" in str(error) or "inline_container" in str(error)
        if type(error).__name__ == "SafetensorError" or (isinstance(error, RuntimeError) and full):
            raise OSError(f"{path} cannot be written, the disk may be full: {error}") from error
        raise
    finally:
        tmp.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file by `write_atomically`."""
    write_atomically(path, lambda tmp: tmp.write_text(text))


def append_text(path: Path, text: str) -> None:
    """Append to a text file and flush it; ValueError where it is no regular file."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    with os.fdopen(fd, "ab") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError(f"{path} is no regular file")
        file.write(text.encode())
        file.flush()
        os.fsync(fd)
    sync(path.parent)


class Lock(ExitStack):
    """Holds a folder until it is closed or the process ends.

    Attributes:
        note: a sentence where it was taken over from a process that had ended without giving it back.
    """

    note = ""


def lock(folder: Path, *, children: bool = False) -> Lock | None:
    """Lock a folder until this process ends, however it ends, or closes the result.

    On a file system without locks, a file .lock.held stands for it: who made it touches it every
    `LOCK_BEATS` seconds, and it is taken over where that process has ended, or not touched it for
    `LOCK_STALE`.

    Args:
        folder: it is there.
        children: the processes that this one forks hold the lock too, until the last of them has ended.
            Otherwise the folder gets a file .lock.

    Returns:
        the lock, or None where another process has it, which `holder` names.
    """
    held = Lock()
    # A flock passes to forked processes; a record lock (lockf) does not, and needs a file to write to.
    path, flags = (folder, os.O_RDONLY) if children else (folder / ".lock", os.O_RDWR | os.O_CREAT)
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    held.callback(os.close, fd)
    try:
        (fcntl.flock if children else fcntl.lockf)(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # lockf may raise either where another process has the lock
        held.close()
        return None
    except OSError:  # some network file systems cannot lock
        try:
            if _hold(folder / ".lock.held", held):
                return held
        except BaseException:
            held.close()
            raise
        held.close()
        return None
    if not children:
        with suppress(OSError):  # no room: it only says who
            os.ftruncate(fd, 0)
            os.write(fd, _signature())
    return held


def _signature() -> bytes:
    """Who holds a lock, as JSON."""
    pid, user = os.getpid(), "?"
    with suppress(Exception):  # no name for this user's number
        user = getpass.getuser()
    place = {"host": socket.gethostname(), "machine": _machine()}
    return json.dumps({"pid": pid, "began": _began(pid), "user": user, **place}).encode()


def _owner(path: Path) -> dict[str, Any]:
    """Who signed a lock's file; empty where that cannot be read, as while it is being made."""
    with suppress(OSError, ValueError):
        owner = read_json(path, 4096)
        names = ("host", "machine", "began", "user")
        if isinstance(owner, dict) and isinstance(owner.get("pid"), int):
            return {"pid": owner["pid"], **{name: str(owner.get(name, "?")) for name in names}}
    return {}


def _named(owner: dict[str, Any]) -> str:
    if not owner:
        return "a process that left no name"
    return f"process {owner['pid']} of {owner['user']} on {owner['host']}"


def holder(folder: Path) -> str:
    """Who holds the lock of a folder, in brackets, and what to do should it have ended; empty if unknown."""
    marker = folder / ".lock.held"
    with suppress(OSError):
        age = (_now(folder) - marker.stat().st_mtime) / 60
        return f" ({_named(_owner(marker))}, alive {age:.0f} minutes ago; if it has ended, remove {marker})"
    owner = _owner(folder / ".lock")
    return f" ({_named(owner)})" if owner else ""


def _now(folder: Path) -> float:
    """The time by the clock of the file system, which may be another machine's."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _hold(marker: Path, held: Lock) -> bool:
    """Make the file that stands for a lock, unless somebody alive has; `held` removes it."""
    signature = _signature()
    for _ in range(2):
        try:
            fd = os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            if note := _remove_stale(marker):
                held.note = note
                continue
            return False
        with os.fdopen(fd, "wb") as file:
            file.write(signature)
        break
    else:
        return False
    ended, me = threading.Event(), os.getpid()

    def beat() -> None:
        while not ended.wait(LOCK_BEATS):
            with suppress(OSError):
                os.utime(marker)

    def release() -> None:
        ended.set()
        with suppress(OSError):
            if os.getpid() == me and read_bytes(marker, 4096) == signature:
                marker.unlink()

    held.callback(release)
    threading.Thread(target=beat, name="lock", daemon=True).start()
    return True


def _remove_stale(marker: Path) -> str:
    """Remove the mark of a process that has ended; a sentence on it, or nothing where it may be alive."""
    try:
        seen, age, owner = marker.stat(), _now(marker.parent) - marker.stat().st_mtime, _owner(marker)
    except FileNotFoundError:
        return "its lock was given back just now"
    here = owner.get("machine") == _machine()
    if not (here and owner["began"] != _began(owner["pid"])) and age < LOCK_STALE:
        return ""
    said = f"{marker.parent} was locked by {_named(owner)}, which has ended: taken over"
    # By a rename, which one process alone succeeds in; and back, if it was a newer one's.
    aside = marker.with_name(f"{marker.name}.{_machine()}@{os.getpid()}")
    try:
        os.rename(marker, aside)
    except FileNotFoundError:
        return said
    if aside.stat().st_ino != seen.st_ino:
        with suppress(OSError):
            os.link(aside, marker)
        said = ""
    aside.unlink(missing_ok=True)
    return said


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


def _read_settings(path: Path) -> dict[str, Any]:
    with suppress(ValueError):
        if isinstance(settings := read_json(path), dict):
            return settings
    raise FileExistsError(f"{path} is damaged: give another folder or delete {path.parent}")


def belongs(folder: Path, marker: str, settings: Mapping[str, Any], what: str, content: str) -> bool:
    """Whether `folder` is the place of a job with these settings; False if it is new or empty.

    Args:
        folder: it need not be there.
        marker: the file in it that holds the settings, as JSON.
        settings: what JSON can hold. A fingerprint is of the images: its value is not shown.
        what: the job, as in "holds a pack of other settings".
        content: what it writes, as in "give a new folder for the shards".

    Raises:
        FileExistsError: it is a file, or holds other files, hidden ones aside, or a job of other settings
            or damaged ones.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give a new folder for {content}")
    path = folder / marker
    if not path.is_file():
        if folder.exists() and any(not other.name.startswith(".") for other in folder.iterdir()):
            raise FileExistsError(f"{folder} holds other files: give a new or empty folder for {content}")
        return False
    changed = differences(_read_settings(path), settings)
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
) -> Lock:
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
        raise FileExistsError(f"{folder}: {busy}{holder(folder)}; wait for it or stop it")
    try:
        sweep(folder)
        if not belongs(folder, marker, settings, what, content):
            write_text(folder / marker, json.dumps(settings))
    except BaseException:
        held.close()
        raise
    return held
