"""Where images come from: any folder, or a text file of paths; each file becomes RGB or Unreadable."""

import collections
import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# What a file may hold whatever its name says. Pillow opens more, but some of that starts other programs
# (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
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
        self.path = path.encode(
            "utf-8", "backslashreplace"
        ).decode()  # names that are not UTF-8 can be printed
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.reason else self.path


class Source:
    """A fixed list of images, with labels where there are some.

    labels: int64 (n,), an index into `classes`; or None. Paths are kept as one bytes object with offsets, not
    as a Python object each, so that forked workers share the pages: per image 8 bytes and the path relative
    to the root (about 50 bytes for ImageNet), and 8 bytes where there are labels.
    """

    def __init__(self, root: str, names: list[bytes], labels: list[str] | None = None) -> None:
        self.root = root
        self._names = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self.classes: list[str] = []
        self.labels: np.ndarray | None = None
        if labels is not None and len(kinds := set(labels)) >= 2:
            numbers = all(kind.isascii() and kind.isdigit() for kind in kinds)
            self.classes = sorted(kinds, key=(lambda kind: (int(kind), kind)) if numbers else None)
            numbered = {kind: i for i, kind in enumerate(self.classes)}
            self.labels = np.array([numbered[label] for label in labels], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def path(self, i: int) -> str:
        """Path of image i, 0 <= i < len(self)."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        start = int(self._ends[i - 1]) if i else 0
        return os.path.join(self.root, os.fsdecode(self._names[start : int(self._ends[i])]))

    def load(self, i: int) -> Image.Image:
        """Image i as 8-bit RGB, upright; raises Unreadable, naming the file and the reason."""
        return read_image(self.path(i))

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) of image i as stored, from the file's header alone; raises Unreadable."""
        with _opened(self.path(i)) as image:
            return image.size

    def fingerprint(self) -> str:
        """Changes when a name (relative to the root), the order or a label does, not with the root."""
        digest = hashlib.sha256(self._names)
        digest.update(self._ends.astype("<i8").tobytes())
        if self.labels is not None:
            digest.update(
                self.labels.astype("<i8").tobytes() + "\0".join(self.classes).encode("utf-8", "replace")
            )
        return digest.hexdigest()


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """The file as a Pillow image, not yet decoded; whatever fails is Unreadable, and nothing warns."""
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")
            yield Image.open(file, formats=_FORMATS)
    except (
        Exception
    ) as error:  # decoders raise anything on broken files: OSError, SyntaxError, struct.error, ...
        raise Unreadable(path, _reason(path, error)) from None


def _reason(path: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    if isinstance(error, UnidentifiedImageError):
        if os.path.isfile(path) and os.path.getsize(path) == 0:
            return "empty file"
        return "not a JPEG, PNG, WebP, BMP, TIFF or GIF image"
    return str(error) or type(error).__name__


def read_image(path: str) -> Image.Image:
    """The first image of a file as 8-bit RGB, turned upright as its EXIF orientation says.

    Transparency is dropped, as official DINO's convert("RGB") drops it: the colours stored under it show.
    16-bit gray is divided by 257, so that 65535 becomes 255. Floats within 0 to 1 are multiplied by 255;
    other floats and integers outside 0 to 65535 are stretched from the image's lowest to its highest finite
    value. Raises Unreadable on a file that is missing, broken, truncated or larger than Pillow's limit of 179
    million pixels.
    """
    with _opened(path) as image:
        image.load()
        orientation = _orientation(image)
        if image.mode.startswith(("I", "F")):
            image = Image.fromarray(_to_8_bits(np.asarray(image)))
        if image.mode != "RGB":
            image = image.convert("RGB")
        if orientation in _UPRIGHT:
            image = image.transpose(_UPRIGHT[orientation])
        return image


def _orientation(image: Image.Image) -> int:
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
    """The images of a folder or of a text file.

    Folder: every file below it with an image's extension, sorted by path; hidden files and folders are
    skipped, links to folders are followed, once around. If every image lies in one of two or more sub-folders
    of the folder itself, the sub-folder is its class. Text file: a path a line, relative to the text file's
    folder, and optionally a tab and a class; blank lines and lines that begin with # are skipped. Listed
    files are not looked at before they are loaded.

    Raises FileNotFoundError if there is no such path and ValueError if it holds no images, saying what it
    holds.
    """
    if not path:
        raise ValueError("no images given: give a folder of images or a text file with one path a line")
    if os.path.isdir(path):
        return _open_folder(path)
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{path}: no such folder or file; give a folder of images or a text file with one path a line"
        )
    return _open_list(path)


def _open_folder(root: str) -> Source:
    names: list[bytes] = []
    others: collections.Counter[str] = collections.Counter()
    for name in _walk(root, b"", ()):
        extension = os.path.splitext(os.fsdecode(name))[1].lower()
        if extension in EXTENSIONS:
            names.append(name)
        else:
            others[extension or "no extension"] += 1
    if not names:
        n = others.total()
        common = sorted(others, key=lambda extension: (-others[extension], extension))[:8]
        held = f"{n} file{'s' * (n != 1)}, none an image: {' '.join(common)}"
        raise ValueError(
            f"{root}: {held if n else 'no files in it'}; give a folder that holds images "
            f"({' '.join(EXTENSIONS)}), at any depth"
        )
    names.sort()
    labels = None
    if all(b"/" in name for name in names):
        labels = [os.fsdecode(name.split(b"/", 1)[0]) for name in names]
    return Source(root, names, labels)


def _walk(root: str, folder: bytes, above: tuple[tuple[int, int], ...]) -> Iterator[bytes]:
    """Paths of the files below root/folder, relative to root, with slashes; `above`: folders on the way."""
    place = os.path.join(os.fsencode(root), folder)
    status = os.stat(place)
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link back to a folder on the way
        return
    try:
        entries = list(os.scandir(place))
    except PermissionError:
        raise PermissionError(f"{os.fsdecode(place)}: no permission to read this folder; grant it") from None
    for entry in entries:
        if entry.name.startswith(b"."):
            continue
        name = folder + b"/" + entry.name if folder else entry.name
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself
            is_folder, is_file = False, False
        if is_folder:
            yield from _walk(root, name, (*above, here))
        elif is_file or entry.is_symlink():  # broken links are named when loaded; pipes would make it wait
            yield name


def _open_list(path: str) -> Source:
    content = b""
    if os.path.isfile(path):
        with open(path, "rb") as file:
            content = file.read(1 << 16)
            if b"\0" not in content:  # an archive may be larger than the memory
                content += file.read()
    if not os.path.isfile(path) or b"\0" in content:
        raise ValueError(
            f"{path}: neither a folder nor a text file; give a folder of images (unpack an archive first) or "
            "a text file with one path a line"
        )
    names: list[bytes] = []
    labels: list[str] = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith(b"#"):
            continue
        name, _, label = (part.strip() for part in line.partition(b"\t"))
        names.append(name)
        if label:
            labels.append(label.decode("utf-8", "replace"))
        if labels and len(labels) != len(names):
            raise ValueError(
                f"{path}, line {number}: some lines have a class and some have none; "
                "write a tab and the class on all lines or on none"
            )
    if not names:
        raise ValueError(f"{path}: no paths in it; write one path of an image a line")
    return Source(os.path.dirname(path), names, labels or None)
