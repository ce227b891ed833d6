"""Decoding: a file becomes an 8-bit RGB image, upright, or Unreadable with the reason."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastdino.files import printable_name

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".heif")
# Files that need another library, and its name.
OPTIONAL = {".heic": "pillow-heif", ".heif": "pillow-heif"}
# The formats that a file may have whatever its extension. Pillow opens more, but some of them start other
# programs (EPS).
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"]
with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()
    FORMATS.append("HEIF")
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
        self.path = printable_name(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.reason else self.path


@contextlib.contextmanager
def opened(stream: Callable[[], BinaryIO], name: Callable[[], str]) -> Iterator[Image.Image]:
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
    # Decoders raise anything on broken files: OSError, SyntaxError, struct.error, ...
    except Exception as error:
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
    return load(lambda: open(path, "rb"), lambda: path)


def decode_image(content: bytes, name: str) -> Image.Image:
    """The first image of an encoded file as 8-bit RGB, turned upright as its EXIF orientation says.

    Transparency is dropped, as official DINO's convert("RGB") drops it: the colours stored under it show.
    16-bit gray is divided by 257, so that 65535 becomes 255. Floats within 0 to 1 are multiplied by 255;
    other floats and integers outside 0 to 65535 are stretched from the image's lowest to its highest finite
    value. Raises Unreadable, with `name` as its path, on a file that is empty, broken, truncated or larger
    than Pillow's limit of 179 million pixels.
    """
    return load(lambda: io.BytesIO(content), lambda: name)


def load(stream: Callable[[], BinaryIO], name: Callable[[], str], enough: int = 0) -> Image.Image:
    """`decode_image` of the file that `stream` opens; name: called for the path, where it is Unreadable.

    enough: a JPEG is decoded at the smallest of 1/8, 1/4, 1/2 and all of its size that leaves at least
    `enough` pixels; 0: at its size.
    """
    with opened(stream, name) as image:
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
