"""Where images come from: what all sources have in common, and files in a folder or named by a list."""

import codecs
import hashlib
import io
import os
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdino.data.images import EXTENSIONS, OPTIONAL, Unreadable, load, opened, reason_of
from fastdino.files import printable_name

# Extensions of the files that are taken: those of formats that need a library only where that is installed.
TAKEN = tuple(
    extension
    for extension in EXTENSIONS
    if extension not in OPTIONAL or find_spec(OPTIONAL[extension].replace("-", "_"))
)
# What file managers, network disks and archivers leave beside images, where no dot hides it.
BY_PRODUCTS = {
    "#recycle",
    "#snapshot",
    "$RECYCLE.BIN",
    "@eaDir",
    "System Volume Information",
    "Thumbs.db",
    "__MACOSX",
    "desktop.ini",
}


@dataclass(frozen=True)
class Patterns:
    """Which images to take: those that one of `include` fits, if there is any, and none of `exclude`.

    A pattern is one of fnmatch for the path below what was opened, where * stands for slashes too.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def why_not(self, name: str) -> str:
        """Why the image of this path is not taken; empty if it is."""
        for pattern in self.exclude:
            if fnmatchcase(name, pattern):
                return f"by --exclude {pattern}"
        if self.include and not any(fnmatchcase(name, pattern) for pattern in self.include):
            return "by no --include"
        return ""


ALL = Patterns()


@dataclass
class LeftOut:
    """What was not taken, by why: the number of files, and that of folders that nobody looked into."""

    files: Counter[str] = field(default_factory=Counter)
    folders: Counter[str] = field(default_factory=Counter)

    def note(self, taken: int) -> str:
        """A sentence for the user; empty if nothing was left out."""
        n = self.files.total()
        said = f"{taken + n} file{'s' * (taken + n != 1)}: {taken} taken"
        if n:
            said += f", {n} left out: {', '.join(most_common(self.files))}"
        if self.folders:
            said += f"; folders left out: {', '.join(most_common(self.folders))}"
        return said if self.files or self.folders else ""


def most_common(numbers: Counter[str]) -> list[str]:
    """The eight most frequent with their numbers, what to do about them, and how many more there are."""
    shown = sorted(numbers, key=lambda kind: (-numbers[kind], kind))[:8]
    rest = numbers.total() - sum(numbers[kind] for kind in shown)
    said = [f"{numbers[kind]} {printable_name(kind)}{_ADVICE.get(kind, '')}" for kind in shown]
    return said + [f"{rest} others"] * (rest > 0)


_ADVICE = {
    extension: f" (install {name}: pip install 'fastdino[heic]')" for extension, name in OPTIONAL.items()
}
_ADVICE[".tar"] = " (shards: give --data 'DIR/*.tar')"


def by_product(name: str) -> str:
    """Why a file or folder of this name is none of the images; empty if it may be."""
    if name.startswith("."):
        return "._* (of a Mac)" if name.startswith("._") else name
    return name if name in BY_PRODUCTS else ""


def extension_of(name: str) -> str:
    """What follows the last dot of a file's name, with it and in small letters; or "no extension"."""
    _, dot, extension = name.rpartition(".")
    return f".{extension.lower()}" if dot else "no extension"


class Source:
    """A fixed list of images, with labels where there are some; what all of them have in common.

    labels: int64 (n,), an index into `classes`; or None. root: what was opened. left_out: what of it is not
    taken. notes: sentences about that, and about what of it is damaged. What is kept of the images is a few
    flat buffers, not Python objects, so that forked workers share the pages. It can be pickled.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.classes: list[str] = []
        self.labels: np.ndarray | None = None
        self.left_out = LeftOut()
        self.notes: list[str] = []

    def _label(self, codes: np.ndarray, kinds: Collection[str]) -> None:
        """Set labels and classes: codes (n,) say which of `kinds` an image is; a single one is no class."""
        if len(kinds) < 2:
            return
        numbers = all(kind.isascii() and kind.isdigit() and len(kind) < 100 for kind in kinds)
        self.classes = sorted(kinds, key=(lambda kind: (int(kind), kind)) if numbers else None)
        place = {kind: i for i, kind in enumerate(self.classes)}
        self.labels = np.array([place[kind] for kind in kinds], dtype=np.int64)[codes]

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, i: int) -> str:
        """Name of image i, 0 <= i < len(self), relative to its folder or in its shard; IndexError beyond."""
        raise NotImplementedError

    def path(self, i: int) -> str:
        """Path of image i, 0 <= i < len(self); in a shard SHARD/NAME, and IndexError beyond."""
        raise NotImplementedError

    def read(self, i: int) -> bytes:
        """The file of image i as it is stored; raises Unreadable, naming the file and the reason."""
        raise NotImplementedError

    def _stream(self, i: int) -> BinaryIO:
        return io.BytesIO(self.read(i))

    def load(self, i: int, enough: int = 0) -> Image.Image:
        """Image i as 8-bit RGB, upright: `decode_image` of `read`; raises Unreadable.

        enough: a JPEG is decoded at the smallest of 1/8, 1/4, 1/2 and all of its size that leaves
        `enough` pixels; 0: at its size.
        """
        return load(lambda: self._stream(i), lambda: self.path(i), enough)

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) of image i as stored, from the file's header alone; raises Unreadable."""
        with opened(lambda: self._stream(i), lambda: self.path(i)) as image:
            return image.size

    def order(self, seed: int, epoch: int, buffer: int = 0) -> Tensor:
        """The images of an epoch in their order, int64 (n,): a permutation that follows from (seed, epoch).

        buffer: shards are read one after the other, and images are mixed within about `buffer` of them;
        0, or the number of images, mixes all. Files that lie on their own are always mixed so.
        """
        return epoch_order(len(self), seed, epoch)

    def fingerprint(self) -> str:
        """Changes when a name (relative to the root), the order or a label does, not with the root."""
        raise NotImplementedError

    def _fingerprint(self, *parts: bytes | bytearray | memoryview) -> str:
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        if self.labels is not None:
            digest.update(np.asarray(self.labels, "<i8").data)
            digest.update("\0".join(self.classes).encode("utf-8", "replace"))
        return digest.hexdigest()


class Files(Source):
    """Images that are files of their own.

    items: (path relative to root, class or None); classes count if all have one. Per image 8 bytes and the
    path (about 50 bytes for ImageNet), and 8 bytes where there are labels.
    """

    def __init__(self, root: str, items: Iterable[tuple[bytes, str | None]]) -> None:
        super().__init__(root)
        self._names = bytearray()  # one after the other
        ends, codes = array("q"), array("i")
        kinds: dict[str, int] = {}
        for name, label in items:
            self._names += name
            ends.append(len(self._names))
            if label is not None:
                codes.append(kinds.setdefault(label, len(kinds)))
        self._ends = np.frombuffer(ends, np.int64)
        if len(codes) == len(ends):
            self._label(np.frombuffer(codes, np.int32), kinds)

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, i: int) -> str:
        """Name of image i, 0 <= i < len(self), relative to the root; IndexError beyond."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        start = int(self._ends[i - 1]) if i else 0
        return os.fsdecode(bytes(self._names[start : int(self._ends[i])]))

    def path(self, i: int) -> str:
        """Path of image i, 0 <= i < len(self); IndexError beyond."""
        return os.path.join(self.root, self.name(i))

    def read(self, i: int) -> bytes:
        """The file of image i as it is; raises Unreadable, naming the file and the reason."""
        path = self.path(i)
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise Unreadable(path, reason_of(error)) from None
        if not content:
            raise Unreadable(path, "empty file")
        return content

    def _stream(self, i: int) -> BinaryIO:  # not all of it in memory: the first page of many is enough
        return open(self.path(i), "rb")

    def fingerprint(self) -> str:
        """Changes when a name (relative to the root), the order or a label does, not with the root."""
        return self._fingerprint(self._names, np.asarray(self._ends, "<i8").data)


def _generator(seed: int, epoch: int) -> torch.Generator:
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    return torch.Generator().manual_seed(mixed)


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The images of an epoch in their order, int64 (n,): a permutation that follows from (seed, epoch)."""
    return torch.randperm(n, generator=_generator(seed, epoch))


def shard_order(counts: np.ndarray, seed: int, epoch: int, buffer: int) -> Tensor:
    """The same for shards of `counts` images each, int64 (n,), so that they are read nearly in sequence.

    The shards follow one another in random order, and each of their images moves by less than `buffer`
    places from where it would be then.
    """
    generator = _generator(seed, epoch)
    sizes = torch.from_numpy(counts).long()
    shards = torch.randperm(len(sizes), generator=generator)
    # a shard's images are numbered from `first`, and come from `place` on
    first, place = sizes.cumsum(0) - sizes, sizes[shards].cumsum(0) - sizes[shards]
    images = torch.repeat_interleave(first[shards] - place, sizes[shards])
    n = len(images)
    images += torch.arange(n)
    # Whatever overtakes an image was less than `buffer` places behind it.
    late = torch.rand(n, dtype=torch.float64, generator=generator).mul_(buffer).add_(torch.arange(n))
    return images[late.argsort(stable=True)]


def list_folder(path: str, patterns: Patterns = ALL) -> Files:
    """The images below a folder. See `open_source`; raises OSError if the folder itself cannot be read."""
    left_out = LeftOut()
    source = Files(path, _labelled(_walk(os.fsencode(path), patterns, left_out)))
    source.left_out = left_out
    return source


def read_list(path: str, patterns: Patterns = ALL) -> Files:
    """The images that a text file names. See `open_source`.

    Raises ValueError if it is no text file, or some lines have a class and some have none.
    """
    left_out = LeftOut()
    source = Files(os.path.dirname(path), _list(path, patterns, left_out))
    source.left_out = left_out
    return source


def _labelled(names: Iterable[bytes]) -> Iterator[tuple[bytes, str | None]]:
    for name in names:
        top, slash, _ = name.partition(b"/")
        yield name, os.fsdecode(top) if slash else None


def _walk(root: bytes, patterns: Patterns, left_out: LeftOut) -> Iterator[bytes]:
    """Paths of the images below root, relative to it, with slashes, in the order of their bytes."""
    # The folders on the way, that may be more than calls can be nested: path, identity, and what is to come.
    way: list[tuple[bytes, tuple[int, int], Iterator[bytes]]] = []

    def enter(folder: bytes) -> None:
        place = os.path.join(root, folder[:-1]) if folder else root
        status = os.stat(place)
        here = (status.st_dev, status.st_ino)
        if all(here != other for _, other, _ in way):  # else a link back to a folder on the way
            way.append((folder, here, iter(_entries(place, left_out))))

    try:
        enter(b"")
    except OSError as error:
        raise OSError(f"{os.fsdecode(root)} cannot be read: {reason_of(error)}") from None
    while way:
        folder, _, names = way[-1]
        if (name := next(names, None)) is None:
            way.pop()
            continue
        path = os.fsdecode(folder + name)
        if name.endswith(b"/"):
            try:
                enter(folder + name)
            except OSError as error:
                left_out.folders[f"{path[:-1]} ({reason_of(error)})"] += 1
        elif why := patterns.why_not(path):
            left_out.files[why] += 1
        else:
            yield folder + name


def _entries(place: bytes, left_out: LeftOut) -> list[bytes]:
    """Names of a folder's images, and of its folders with a slash after them, sorted.

    So each folder's paths come in the order of their bytes.
    """
    names, files, folders = [], Counter[str](), Counter[str]()
    for entry in os.scandir(place):
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself
            is_folder, is_file = False, False
        name = os.fsdecode(entry.name)
        if found := by_product(name):
            (folders if is_folder else files)[found] += 1
        elif is_folder:
            names.append(entry.name + b"/")
        elif (extension := extension_of(name)) not in TAKEN:
            files[extension] += 1
        # broken links are named when loaded
        elif is_file or (entry.is_symlink() and not os.path.exists(entry.path)):
            names.append(entry.name)
        else:
            files["pipes, sockets or devices"] += 1
    left_out.files += files  # once all of it could be read
    left_out.folders += folders
    return sorted(names)


_LINE = 1 << 16  # bytes; a longer line is no path


def _list(path: str, patterns: Patterns, left_out: LeftOut) -> Iterator[tuple[bytes, str | None]]:
    """Path and class of each line of a text file."""
    labelled: bool | None = None
    for number, line in enumerate(_lines(path), 1):
        line = line.strip()
        if line.startswith(b"#"):
            left_out.files["in lines that begin with #"] += 1
        if not line or line.startswith(b"#"):
            continue
        name, _, label = (part.strip() for part in line.partition(b"\t"))
        if labelled is None:
            labelled = bool(label)
        if labelled != bool(label):
            raise ValueError(
                f"{path}, line {number}: some lines have a class and some have none; "
                "write a tab and the class on all lines or on none"
            )
        if why := patterns.why_not(os.fsdecode(name)):
            left_out.files[why] += 1
        else:
            yield name, label.decode("utf-8", "replace") if label else None


def _lines(path: str) -> Iterator[bytes]:
    """Lines of a text file, of which only one is in memory: an archive may be larger than that."""
    text = os.path.isfile(path)
    if text:
        with open(path, "rb") as file:
            start = file.read(len(codecs.BOM_UTF8))
            file.seek(len(start) if start == codecs.BOM_UTF8 else 0)
            wide = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as PowerShell writes
            lines = io.TextIOWrapper(file, "utf-16", "replace", newline="") if wide else file
            while text and (line := lines.readline(_LINE)):
                line = line if isinstance(line, bytes) else line.encode("utf-8", "replace")
                text = b"\0" not in line and len(line) < _LINE
                if text:
                    yield from line.splitlines()  # a line may end as on old Macs
    if not text:
        raise ValueError(
            f"{path}: neither a folder nor a text file nor tar shards; give a folder of images (unpack an "
            "archive first), NAME.tar or a text file with one path a line"
        )
