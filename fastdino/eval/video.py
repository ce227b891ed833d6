"""Videos, read and written frame by frame: files by PyAV, or the images of a folder or a list."""

import itertools
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdino.eval.maps import open_images
from fastdino.files import write_atomically

Pixels = NDArray[np.uint8]  # (height, width, 3)

MAX_WIDTH = 1920  # of a video, in pixels


def import_av() -> Any:
    """PyAV; raises ValueError if it is not installed."""
    try:
        import av
    except ImportError:
        raise ValueError("videos need PyAV, which is not installed: pip install 'fastdino[video]'") from None
    return av


class Film(NamedTuple):
    """Images in order, each read when it is needed."""

    frames: Iterator[Image.Image]
    rate: Fraction
    """Frames a second."""
    length: int | None
    """The number of frames; None where the file does not say."""


def open_film(path: str, fps: float = 0.0) -> Film:
    """The frames of a video file, the images of a text file, or those of a folder by their names, in which
    numbers count as numbers: 9.png comes before 10.png.

    fps: frames a second; 0: as the file, and 30 for images.

    Raises FileNotFoundError if there is no such path, ValueError if it holds no video; the frames raise
    ValueError where one cannot be read.
    """
    rate = Fraction(fps).limit_denominator(1001) if fps else Fraction(30)
    if Path(path).is_dir() or path.endswith(".txt"):
        images = open_images((path,))
        if Path(path).is_dir():
            images.sort(key=lambda image: _by_number(image.name))
        return Film((image.load() for image in images), rate, len(images))
    av = import_av()
    if not Path(path).exists():
        raise FileNotFoundError(f"--video {path}: no such file; give a video or a folder of frames")
    try:
        container = av.open(path)
    except av.FFmpegError as error:
        raise ValueError(f"--video {path}: not a video that can be read ({error.strerror})") from None
    if not container.streams.video:
        container.close()
        raise ValueError(
            f"--video {path}: no pictures in it, or cut short; give a video or a folder of frames"
        )
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return Film(_decode(container, path), rate if fps else stream.average_rate or rate, stream.frames or None)


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(x), "") if x[:1] in "0123456789" else (-1, x) for x in re.split(r"([0-9]+)", name) if x]


def _decode(container: Any, path: str) -> Iterator[Image.Image]:
    with container:
        frames = container.decode(video=0)
        for i in itertools.count():
            try:
                frame = next(frames, None)
            except import_av().FFmpegError as error:
                raise ValueError(f"--video {path}: frame {i} cannot be read ({error.strerror})") from None
            if frame is None:
                return
            image = frame.to_image()
            # telephones store upright films lying on their side
            yield image.rotate(frame.rotation, expand=True) if frame.rotation else image


def write_film(frames: Iterable[Pixels], rate: Fraction, path: Path) -> int:
    """Write frames of one size, one by one, to the MP4 `path`; returns their number.

    H.264 where PyAV was built with x264, else MPEG-4; no sound. Odd sides grow by a pixel: both need even.

    Raises ValueError on no frames, or frames of several sizes.
    """
    av = import_av()
    written = 0

    def write(tmp: Path) -> None:
        nonlocal written
        first: tuple[int, ...] = ()
        with av.open(str(tmp), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            for pixels in frames:
                if not written:
                    h264 = "libx264" in av.codecs_available
                    stream = container.add_stream("libx264" if h264 else "mpeg4", rate=rate)
                    stream.options = {"crf": "18"} if h264 else {"q:v": "3"}
                    first = pixels.shape
                    stream.height, stream.width = (x + x % 2 for x in first[:2])
                    stream.pix_fmt = "yuv420p"
                    # BT.709, as full HD: players guess from the size unless the file names a standard
                    colours = stream.codec_context
                    colours.colorspace = colours.color_primaries = colours.color_trc = colours.color_range = 1
                if pixels.shape != first:
                    raise ValueError(
                        f"frame {written} becomes {pixels.shape[1]} x {pixels.shape[0]} pixels, those before "
                        f"it {first[1]} x {first[0]}: give frames of one size"
                    )
                even = np.pad(pixels, ((0, first[0] % 2), (0, first[1] % 2), (0, 0)), mode="edge")
                frame = av.VideoFrame.from_ndarray(even, "rgb24")
                container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
                written += 1
            if not written:
                raise ValueError("a video without frames: nothing to write")
            container.mux(stream.encode())

    write_atomically(path, write)
    return written


def tile(rows: list[list[Pixels]]) -> Pixels:
    """Rows of panels of one size as one picture, scaled down to MAX_WIDTH where it would be wider."""
    picture = np.concatenate([np.concatenate(row, axis=1) for row in rows])
    if picture.shape[1] <= MAX_WIDTH:
        return picture
    height = round(picture.shape[0] * MAX_WIDTH / picture.shape[1])
    return np.asarray(Image.fromarray(picture).resize((MAX_WIDTH, height), Image.Resampling.BOX))
