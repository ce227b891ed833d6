"""Sample images to start with: eight objects on clutter, with their labels and masks, from numpy and Pillow.

Each class is one shape with one texture. All share the same two tones, the clutter and the kind of light,
while place, size, rotation and light vary from image to image: raw pixels say little about the class, and
what the crops of an image have in common, and not with every other image, is the object.
"""

import json
import math
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image

from fastdino import cli, files

Array = NDArray[Any]

VERSION = 1  # of the images' content: raise it when the same settings give other images
MARKER = "samples.json"  # holds the settings
SPLITS = ("train", "val")

SIZE = 48  # pixels a side
SUPERSAMPLING = 3
RADIUS = (0.30, 0.46)  # of the object, in sides of the image
LIGHT, DARK = (238, 214, 150), (38, 46, 80)  # the tones of every object
GRAIN = ((1, 20.0), (3, 20.0))  # of the ground: cell in pixels, standard deviation in levels of 255
SENSOR = 5.0  # noise of every pixel, in levels of 255
BEND = 0.8 / 48  # how far textures are bent, in sides of the image
FADE = 0.7  # the light grows or falls by up to half of this from the middle to the sides
EXPOSURE = (0.6, 1.4)


def _bands(x: Array, period: float, phase: float) -> Array:
    """What is light of bands with a period in 48ths of the image's side."""
    return np.floor(2 * (x / (period / 48) + phase)) % 2 == 0


# Takes coordinates about the middle, in radii, and returns what lies inside.
Shape = Callable[[Array, Array], Array]
SHAPES: dict[str, Shape] = {
    "crescent": lambda x, y: (np.hypot(x, y) < 1) & (np.hypot(x - 0.55, y) > 0.65),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.4) & (np.maximum(abs(x), abs(y)) < 1),
    "disc": lambda x, y: np.hypot(x, y) < 0.92,
    "gear": lambda x, y: np.hypot(x, y) < 0.82 + 0.18 * np.sign(np.cos(8 * np.arctan2(y, x))),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.68) < 0.32,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.8,
    "star": lambda x, y: np.hypot(x, y) < 0.68 + 0.32 * np.cos(5 * np.arctan2(y, x)),
    "triangle": lambda x, y: (y < 0.8) & (y > 1.8 * np.abs(x) - 1),
}
# Takes coordinates in sides of the image and two phases in 0 to 1, and returns what is light.
Texture = Callable[[Array, Array, float, float], Array]
TEXTURES: dict[str, Texture] = {
    "crescent": lambda x, y, p, q: np.zeros_like(x, bool),
    "cross": lambda x, y, p, q: _bands(x, 5, p) ^ _bands(y, 5, q),
    "disc": lambda x, y, p, q: _bands(x, 4, p),
    "gear": lambda x, y, p, q: np.hypot((x * 8 + p) % 1 - 0.5, (y * 8 + q) % 1 - 0.5) < 0.32,
    "ring": lambda x, y, p, q: _bands(np.hypot(x, y), 6, p),
    "square": lambda x, y, p, q: _bands(x, 8, p) ^ _bands(y, 8, q),
    "star": lambda x, y, p, q: np.ones_like(x, bool),
    "triangle": lambda x, y, p, q: _bands(x, 9, p),
}
CLASSES = tuple(SHAPES)
# striped or not, an object is as bright as the ground
GROUND = np.array((LIGHT, DARK), np.float32).mean(axis=0)


def draw_sample(seed: int, split: str, index: int, size: int = SIZE) -> tuple[Image.Image, Image.Image, int]:
    """One sample, a pure function of its arguments.

    Returns the image (RGB, size by size), the object's mask (mode L, 0 or 255) and its class: `index` modulo
    the number of classes.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    label = index % len(CLASSES)
    shape, texture = SHAPES[CLASSES[label]], TEXTURES[CLASSES[label]]
    ground = np.full((size, size, 3), GROUND, np.float32)
    for cell, deviation in GRAIN:
        cells = -(-size // cell)
        grain = np.kron(
            rng.standard_normal((cells, cells), dtype=np.float32), np.ones((cell, cell), np.float32)
        )
        ground += deviation * grain[:size, :size, None]

    # The object at SUPERSAMPLING points a pixel side, then averaged.
    side = size * SUPERSAMPLING
    radius, turn = rng.uniform(*RADIUS), rng.uniform(0, 2 * math.pi)
    room = 0.5 - 0.8 * radius
    cx, cy = 0.5 + rng.uniform(-room, room, 2)
    fine = (np.arange(side, dtype=np.float32) + 0.5) / side
    x, y = fine - cx, (fine - cy)[:, None]
    x, y = math.cos(turn) * x + math.sin(turn) * y, math.cos(turn) * y - math.sin(turn) * x
    bend = [
        np.asarray(Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC))
        for grid in BEND * rng.standard_normal((2, 7, 7), dtype=np.float32)
    ]
    inside = shape(x / radius, y / radius)
    light = texture(x + bend[0], y + bend[1], *rng.uniform(0, 1, 2))

    def average(where: Array) -> Array:
        return where.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING).mean((1, 3), dtype=np.float32)

    lit, unlit = (average(inside & tone)[..., None] for tone in (light, ~light))
    image = (
        ground * (1 - lit - unlit) + lit * np.array(LIGHT, np.float32) + unlit * np.array(DARK, np.float32)
    )

    # The light falls unevenly, and the sensor is not perfect.
    middle = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    across, down = rng.uniform(-FADE, FADE, 2)
    image *= (rng.uniform(*EXPOSURE) * (1 + across * middle + down * middle[:, None]))[..., None]
    image += SENSOR * rng.standard_normal(image.shape, dtype=np.float32)
    mask = (lit + unlit)[..., 0] >= 0.5
    pixels = np.clip(image + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels), Image.fromarray(mask.astype(np.uint8) * np.uint8(255)), label


def _names(split: str, index: int) -> tuple[Path, Path]:
    """Image and mask of a sample, relative to the folder of the samples."""
    folder, stem = Path(split, CLASSES[index % len(CLASSES)]), f"{index // len(CLASSES):04d}"
    return folder / f"{stem}.jpg", Path("masks") / folder / f"{stem}.png"


def _write(folder: Path, seed: int, split: str, index: int, size: int) -> None:
    image, mask, _ = draw_sample(seed, split, index, size)
    to_image, to_mask = (folder / name for name in _names(split, index))
    image.save(to_image, quality=92, subsampling=0)
    mask.save(to_mask)


def _holds(out: Path, settings: dict[str, int]) -> bool:
    """Whether `out` holds exactly these samples. Raises FileExistsError if it holds anything else."""
    if not files.belongs(out, MARKER, settings, "sample images", "the sample images"):
        return False
    for split in SPLITS:
        for name in (name for index in range(settings[split]) for name in _names(split, index)):
            if not (out / name).is_file():
                raise FileExistsError(
                    f"{out} has lost {name}: delete {out} to render the sample images again"
                )
    return True


def render_samples(out: Path, *, seed: int = 0, train: int = 4000, val: int = 800, size: int = SIZE) -> bool:
    """Write `train` and `val` samples under `out`; True if rendered, False if they were there already.

    `out`/train/CLASS/NNNN.jpg and `out`/val/CLASS/NNNN.jpg are the images, RGB, `size` pixels a side;
    `out`/masks/... holds the objects' masks. The folder appears whole or not at all. Raises ValueError on
    counts or sizes that cannot be, FileExistsError if `out` holds anything else.
    """
    for name, value, low in (("train", train, len(CLASSES)), ("val", val, len(CLASSES)), ("size", size, 32)):
        if value < low:
            raise ValueError(f"{name} {value}: give {low} or more")
    if seed < 0:
        raise ValueError(f"seed {seed}: give 0 or more")
    settings = {"version": VERSION, "seed": seed, "train": train, "val": val, "size": size}
    out = Path(out)
    if _holds(out, settings):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch, "samples")
        jobs = [(split, index) for split, n in (("train", train), ("val", val)) for index in range(n)]
        for split in SPLITS:
            for name in CLASSES:
                (folder / split / name).mkdir(parents=True)
                (folder / "masks" / split / name).mkdir(parents=True)
        # numpy and Pillow release the interpreter lock in the costly parts, so threads fill the cores
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(lambda job: _write(folder, seed, job[0], job[1], size), jobs):
                pass
        (folder / MARKER).write_text(json.dumps(settings))
        try:
            folder.rename(out)
        except OSError:  # another process may have been faster
            if not _holds(out, settings):
                raise
            return False
    return True


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Render sample images to start with: eight objects on clutter, with their labels and masks.

    OUT gets the images train/CLASS/NNNN.jpg and val/CLASS/NNNN.jpg, and the masks of the objects,
    masks/train/CLASS/NNNN.png and masks/val/CLASS/NNNN.png.
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """New folder for the images."""
    train: int = 4000
    """Images in OUT/train."""
    val: int = 800
    """Images in OUT/val."""
    seed: int = 0
    """Another seed gives other images."""

    def run(self) -> None:
        """Render them, or say that they are there."""
        new = render_samples(self.out, seed=self.seed, train=self.train, val=self.val)
        done = "rendered" if new else "are there already: kept"
        cli.say(f"{self.out}: {self.train} + {self.val} sample images {done}")
