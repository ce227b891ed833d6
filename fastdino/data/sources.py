"""Where images come from: a folder, a text file of paths, or tar shards; each becomes RGB or Unreadable."""

import codecs
import collections
import contextlib
import hashlib
import heapq
import io
import os
import warnings
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# What a file may hold whatever its name says. Pillow opens more, but some of that starts other programs
# (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_GIVE = "give a folder of images or a text file with one path a line, or tar shards ('DIR/{000..127}.tar')"
_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unreadable(Exception):
    """A file that cannot be used as an image; `path` names it and `reason` says why."""

    def __init__(self, path: str, reason: str = "") -> None:
        super().__init__(path, reason)
        self.path = printable(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.reason else self.path


def printable(text: str) -> str:
    """The same text where names that are not UTF-8 can be printed."""
    return text.encode("utf-8", "backslashreplace").decode()


class Source:
    """A fixed list of images, with labels where there are some; what all of them have in common.

    labels: int64 (n,), an index into `classes`; or None. root: what was opened. notes: sentences about what
    of it is damaged and was left out. What is kept of the images is a few flat buffers, not Python objects,
    so that forked workers share the pages. It can be pickled.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.classes: list[str] = []
        self.labels: np.ndarray | None = None
        self.notes: list[str] = []

    def _label(self, codes: np.ndarray, kinds: Collection[str]) -> None:
        """Set labels and classes: codes (n,) say which of `kinds` an image is; a single one is no class."""
        if len(kinds) < 2:
            return
        numbers = all(kind.isascii() and kind.isdigit() for kind in kinds)
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

        enough: a JPEG is decoded at the smallest of 1/8, 1/4, 1/2 and all of its size that leaves so many
        pixels; 0: at its size.
        """
        return _load(lambda: self._stream(i), lambda: self.path(i), enough)

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) of image i as stored, from the file's header alone; raises Unreadable."""
        with _opened(lambda: self._stream(i), lambda: self.path(i)) as image:
            return image.size

    def order(self, seed: int, epoch: int, buffer: int = 0) -> Tensor:
        """The images of an epoch in their order, int64 (n,): a permutation that follows from (seed, epoch).

        buffer: shards are read one after the other, and images mixed within about so many; 0, or as many as
        there are images, mixes all of them. Files that lie on their own are always mixed so.
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


@contextlib.contextmanager
def _opened(stream: Callable[[], BinaryIO], name: Callable[[], str]) -> Iterator[Image.Image]:
    """A file as a Pillow image, not yet decoded; whatever fails is Unreadable, and nothing warns."""
    try:
        with warnings.catch_warnings(), stream() as file:
            warnings.simplefilter("ignore")
            if not file.read(1):
                raise ValueError("empty file")
            file.seek(0)
            yield Image.open(file, formats=FORMATS)
    except Unreadable:
        raise
    except (
        Exception
    ) as error:  # decoders raise anything on broken files: OSError, SyntaxError, struct.error, ...
        raise Unreadable(name(), reason_of(error)) from None


def reason_of(error: Exception) -> str:
    """Why a file cannot be used, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    if isinstance(error, UnidentifiedImageError):
        return "not a JPEG, PNG, WebP, BMP, TIFF or GIF image"
    return str(error) or type(error).__name__


def read_image(path: str) -> Image.Image:
    """`decode_image` of a file; raises Unreadable also where it is missing."""
    return _load(lambda: open(path, "rb"), lambda: path)


def decode_image(content: bytes, name: str) -> Image.Image:
    """The first image of an encoded file as 8-bit RGB, turned upright as its EXIF orientation says.

    Transparency is dropped, as official DINO's convert("RGB") drops it: the colours stored under it show.
    16-bit gray is divided by 257, so that 65535 becomes 255. Floats within 0 to 1 are multiplied by 255;
    other floats and integers outside 0 to 65535 are stretched from the image's lowest to its highest finite
    value. Raises Unreadable, with `name` as its path, on a file that is empty, broken, truncated or larger
    than Pillow's limit of 179 million pixels.
    """
    return _load(lambda: io.BytesIO(content), lambda: name)


def _load(stream: Callable[[], BinaryIO], name: Callable[[], str], enough: int = 0) -> Image.Image:
    with _opened(stream, name) as image:
        width, height = image.size
        for part in (8, 4, 2) if enough else ():
            if (width // part) * (height // part) >= enough:
                image.draft(image.mode, (width // part, height // part))
                break
        image.load()
        orientation = orientation_of(image)
        if image.mode.startswith(("I", "F")):
            image = Image.fromarray(_to_8_bits(np.asarray(image)))
        if image.mode != "RGB":
            image = image.convert("RGB")
        if orientation in _UPRIGHT:
            image = image.transpose(_UPRIGHT[orientation])
        return image


def orientation_of(image: Image.Image) -> int:
    """What EXIF says of how the image is turned; 1 is upright."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF data in an image that is fine
        return 1


def _to_8_bits(x: np.ndarray) -> np.ndarray:
    """uint8 of a gray image of wider integers or floats, by the rule of `read_image`."""
    if x.dtype.kind in "iu" and x.min() >= 0 and x.max() <= 65535:
        return ((x.astype(np.int32) + 128) // 257).astype(np.uint8)
    x = x.astype(np.float64)
    finite = x[np.isfinite(x)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    if x.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    x = np.nan_to_num(x, nan=low, posinf=high, neginf=low)
    return np.rint((x - low) * (255 / ((high - low) or 1.0))).astype(np.uint8)


def open_source(path: str) -> Source:
    """The images of a folder, of a text file, or of tar shards.

    Folder: every file below it with an image's extension, sorted by path; hidden files and folders are
    skipped, links to folders are followed, once around. If every image lies in one of two or more sub-folders
    of the folder itself, the sub-folder is its class. Text file: a path a line, relative to the text file's
    folder, and optionally a tab and a class; blank lines and lines that begin with # are skipped. Listed
    files are not looked at before they are loaded. Shards: a file NAME.tar, several as DIR/{000..127}.tar,
    DIR/{a,b}.tar or DIR/*.tar, or a folder that holds tars itself and no images at any depth; see
    `shards.Shards`.

    Raises FileNotFoundError if there is no such path and ValueError if it holds no images, saying what it
    holds.
    """
    from fastdino.data import shards  # built upon this module

    if not path:
        raise ValueError(f"no images given: {_GIVE}")
    if os.path.isdir(path):
        others: collections.Counter[str] = collections.Counter()
        source = Files(path, _labelled(_walk(os.fsencode(path), b"", (), others)))
        if len(source):
            return source
        if tars := sorted(
            name for name in os.listdir(path) if shards.is_tar(name) and not name.startswith(".")
        ):
            return shards.open_shards(path, [os.path.join(path, name) for name in tars])
        raise ValueError(f"{path}: {_held(others)}")
    if not os.path.exists(path) and (named := shards.expand(path)) != [path]:
        return shards.open_shards(path, named)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such folder or file; {_GIVE}")
    if os.path.isfile(path) and shards.is_tar(path):
        return shards.open_shards(path, [path])
    source = Files(os.path.dirname(path), _list(path))
    if not len(source):
        raise ValueError(f"{path}: no paths in it; write one path of an image a line")
    return source


def _held(others: collections.Counter[str]) -> str:
    """What a folder without images holds, and what to do."""
    n = others.total()
    common = sorted(others, key=lambda extension: (-others[extension], extension))[:8]
    held = f"{n} file{'s' * (n != 1)}, none an image: {' '.join(common)}" if n else "no files in it"
    shards = " or tar shards at its top" if ".tar" in others else ""
    return f"{held}; give a folder that holds images ({' '.join(EXTENSIONS)}), at any depth{shards}"


def _labelled(names: Iterable[bytes]) -> Iterator[tuple[bytes, str | None]]:
    for name in names:
        top, slash, _ = name.partition(b"/")
        yield name, os.fsdecode(top) if slash else None


def _walk(
    root: bytes, folder: bytes, above: tuple[tuple[int, int], ...], others: collections.Counter[str]
) -> Iterator[bytes]:
    """Paths of the images below root/folder, relative to root, with slashes, in the order of their bytes.

    above: folders on the way. others: counts the extensions of the other files.
    """
    place = os.path.join(root, folder.rstrip(b"/"))
    status = os.stat(place)
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link back to a folder on the way
        return
    for name in _entries(place, others):
        if name.endswith(b"/"):
            yield from _walk(root, folder + name, (*above, here), others)
        else:
            yield folder + name


_RUN = 64 << 20  # bytes of names sorted at a time
_IMAGES = {extension.encode() for extension in EXTENSIONS}


def _entries(place: bytes, others: collections.Counter[str]) -> Iterator[bytes]:
    """Names of a folder's images, and of its folders with a slash after them, sorted.

    So each folder's paths come in the order of their bytes. The folder may hold millions, and a name is 70
    bytes larger as a Python object: names are sorted in runs, which are merged.
    """
    try:
        entries = os.scandir(place)
    except PermissionError:
        raise PermissionError(f"{os.fsdecode(place)}: no permission to read this folder; grant it") from None
    runs: list[tuple[bytes, array[int]]] = []
    names, lengths, width = bytearray(), array("H"), 1
    for entry in entries:
        name = entry.name
        if name.startswith(b"."):
            continue
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself
            is_folder, is_file = False, False
        if is_folder:
            name += b"/"
        elif is_file or entry.is_symlink():  # broken links are named when loaded; pipes would make it wait
            _, dot, extension = name.rpartition(b".")
            if not dot or b"." + extension.lower() not in _IMAGES:
                others[os.fsdecode(dot + extension).lower() if dot else "no extension"] += 1
                continue
        else:
            continue
        names += name
        lengths.append(len(name))
        width = max(width, len(name))
        if len(lengths) * width > _RUN:
            runs.append(_sorted(names, lengths, width))
            names, lengths, width = bytearray(), array("H"), 1
    runs.append(_sorted(names, lengths, width))
    yield from heapq.merge(*(_split(*run) for run in runs))


def _sorted(names: bytearray, lengths: "array[int]", width: int) -> "tuple[bytes, array[int]]":
    """The same names in order: joined, and the length of each. No name holds a zero byte."""
    table = np.zeros((len(lengths), width), np.uint8)
    table[np.arange(width) < np.frombuffer(lengths, np.uint16)[:, None]] = np.frombuffer(names, np.uint8)
    table.reshape(-1).view(f"S{width}").sort()
    used = table != 0
    return table[used].tobytes(), array("H", used.sum(1, dtype=np.uint16).tobytes())


def _split(names: bytes, lengths: "array[int]") -> Iterator[bytes]:
    start = 0
    for length in lengths:
        yield names[start : start + length]
        start += length


_LINE = 1 << 16  # bytes; a longer line is no path


def _list(path: str) -> Iterator[tuple[bytes, str | None]]:
    """Path and class of each line of a text file."""
    labelled: bool | None = None
    for number, line in enumerate(_lines(path), 1):
        line = line.strip()
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
        yield name, label.decode("utf-8", "replace") if label else None


def _lines(path: str) -> Iterator[bytes]:
    """Lines of a text file, of which only one is in memory: an archive may be larger than that."""
    text = os.path.isfile(path)
    if text:
        with open(path, "rb") as file:
            start = file.read(_LINE)
            text = b"\0" not in start
            file.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
            while text and (line := file.readline(_LINE)):
                text = b"\0" not in line and len(line) < _LINE
                if text:
                    yield from line.splitlines()  # a line may end as on old Macs
    if not text:
        raise ValueError(
            f"{path}: neither a folder nor a text file nor tar shards; give a folder of images (unpack an "
            "archive first), NAME.tar or a text file with one path a line"
        )
