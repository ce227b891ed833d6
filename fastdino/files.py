"""Writing a file so that it is whole or absent, whatever kills the process."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` fill a file beside `path`, flush it and rename it: readers see old or new, never half."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.touch()
    mode = beside.stat().st_mode  # by the umask; some writers make their file private
    try:
        write(beside)
        os.chmod(beside, mode)
        sync(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)
