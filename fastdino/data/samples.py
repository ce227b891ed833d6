"""Sample images to start with: eight objects on clutter, with their labels and masks, from numpy and Pillow.

Each class is one shape with one texture. All share the same tones, area, clutter and kind of light, while place,
size, rotation and light vary from image to image. So a pixel or the mean colour says little about the class, and
what the crops of one image have in common, and not with every other image, is the object.

    python -m fastdino.data.samples OUT

writes OUT/train/CLASS/NNNN.jpg, OUT/val/CLASS/NNNN.jpg and the masks, OUT/masks/train/CLASS/NNNN.png and so on.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Array = NDArray[Any]

VERSION = 1  # of the images' content: raise it when the same settings give other images
MARKER = "samples.json"  # written last; holds the settings
SPLITS = ("train", "val")
SUPERSAMPLING = 3
RADIUS = (0.22, 0.36)  # of the object, in sides of the image
ROTATION = 60.0  # degrees to either side
EDGE = 0.48
SLOPE = (0.2, 0.5)
ROUGH = 13
SHADOW = 0.35
NMARKS = 36
OUTLINE = 0.07  # width in radii of the object

CREAM, RED, PLUM = (250, 228, 170), (212, 78, 58), (48, 34, 46)
GROUND = (116, 156, 152)
MARKS = ((156, 194, 188), (72, 108, 112), (234, 214, 166), (196, 104, 88))


def _segments(value: Array, period: float) -> Array:
    return np.floor(value * (2 / period)) % 2 == 1


def _dots(x: Array, y: Array, period: float, radius: float) -> Array:
    row = np.floor(y / period)
    u = (x / period + 0.5 * (row % 2)) % 1 - 0.5
    v = y / period - row - 0.5
    return np.hypot(u, v) < radius


def _star(x: Array, y: Array) -> tuple[Array, Array]:
    angle, arm = np.arctan2(x, -y), 2 * np.pi / 5
    fold = np.abs((angle + arm / 2) % arm - arm / 2)  # all arms on one, its tip at (1, 0)
    r = np.hypot(x, y)
    inner = 0.5 * np.array([np.cos(arm / 2), np.sin(arm / 2)])
    edge = inner - np.array([1.0, 0.0])
    distance = ((r * np.cos(fold) - 1) * -edge[1] + r * np.sin(fold) * edge[0]) / -np.hypot(*edge)
    return distance, _segments(angle, arm)


def _ring(x: Array, y: Array) -> tuple[Array, Array]:
    return np.abs(np.hypot(x, y) - 0.68) - 0.3, _segments(np.arctan2(x, -y), 2 * np.pi / 6)


def _cross(x: Array, y: Array) -> tuple[Array, Array]:
    bar = np.maximum(np.abs(x) - 0.36, np.abs(y) - 0.94)
    beam = np.maximum(np.abs(y) - 0.36, np.abs(x) - 0.94)
    return np.minimum(bar, beam), _segments(x + 0.12, 0.48) ^ _segments(y + 0.12, 0.48)


def _crescent(x: Array, y: Array) -> tuple[Array, Array]:
    x = x - 0.15
    distance = np.maximum(np.hypot(x, y) - 0.97, 0.72 - np.hypot(x - 0.44, y))
    return distance, _segments(y + 0.1 * np.sin(9 * x), 0.4)


def _leaf(x: Array, y: Array) -> tuple[Array, Array]:
    blade = np.maximum(np.hypot(x - 0.5, y) - 1.08, np.hypot(x + 0.5, y) - 1.08)
    return blade, _segments(y + np.abs(x), 0.44)


def _gear(x: Array, y: Array) -> tuple[Array, Array]:
    r = np.hypot(x, y)
    teeth = np.clip(3 * np.cos(8 * np.arctan2(x, -y)), -1, 1)
    return np.maximum(r - 0.85 - 0.13 * teeth, 0.2 - r), _segments(r + 0.02, 0.36)


def _heart(x: Array, y: Array) -> tuple[Array, Array]:
    u, v = np.abs(x), 0.6 - 0.9 * y
    u, v = u / 1.15 * 0.92, (v + 0.15) / 1.35
    corner = np.hypot(u, v - 1)
    lobes = np.hypot(u - 0.25, v - 0.75) - np.sqrt(2) / 4
    tip = np.minimum(corner, np.hypot(u - np.maximum(u + v, 0) / 2, v - np.maximum(u + v, 0) / 2))
    return 1.3 * np.where(u + v > 1, lobes, tip * np.sign(u - v)), _segments(x + y, 0.48)


def _mushroom(x: Array, y: Array) -> tuple[Array, Array]:
    cap = np.maximum(np.hypot(x / 0.98, (y - 0.1) / 0.98) - 0.98, y - 0.12)
    stem = np.maximum(np.abs(x) - 0.3, np.abs(y - 0.5) - 0.44)
    return np.minimum(cap, stem), (y < 0.12) & ~_dots(x, y + 0.03, 0.44, 0.35)


# name: (shape, scale that gives all the same area)
SHAPES: dict[str, tuple[Callable[[Array, Array], tuple[Array, Array]], float]] = {
    "crescent": (_crescent, 1.12),
    "cross": (_cross, 0.93),
    "gear": (_gear, 0.93),
    "heart": (_heart, 1.07),
    "leaf": (_leaf, 1.1),
    "mushroom": (_mushroom, 0.98),
    "ring": (_ring, 0.86),
    "star": (_star, 1.14),
}
CLASSES = tuple(SHAPES)


def _noise(rng: np.random.Generator, size: int) -> Array:
    """Smooth noise (size, size) of fixed statistics: mean 0, about unit variance."""
    total = np.zeros((size, size), np.float32)
    for cells, weight in ((4, 0.6), (8, 0.5), (size // 4, 0.5), (size // 2, 0.4)):
        grid = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
        total += weight * np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))
    return total


def _ground(rng: np.random.Generator, size: int) -> Array:
    """The background (size, size, 3) in 0 to 255: noise, and as many small marks on every image."""
    scale = SUPERSAMPLING
    tint = np.array([1.0, 0.9, 0.8])
    base = np.array(GROUND) + ROUGH * _noise(rng, size)[..., None] * tint
    marks = Image.new("RGBA", (size * scale, size * scale), (*GROUND, 0))
    draw = ImageDraw.Draw(marks)
    for i in range(NMARKS):
        x, y = rng.uniform(0, size * scale, 2)
        angle, length = rng.uniform(0, 2 * np.pi), size * scale * rng.uniform(0.03, 0.07)
        dx, dy = length * np.cos(angle), length * np.sin(angle)
        tone = (*MARKS[i % len(MARKS)], 235)
        kind = i % 3
        if kind == 0:
            draw.line((x - dx, y - dy, x + dx, y + dy), tone, width=scale + 1)
        elif kind == 1:
            r = length * 0.5
            draw.ellipse((x - r, y - r, x + r, y + r), tone)
        else:
            draw.polygon(((x + dx, y + dy), (x - dy, y + dx), (x + dy, y - dx)), tone)
    small = np.asarray(marks.reduce(scale), np.float32)
    alpha = small[..., 3:] / 255
    return base * (1 - alpha) + small[..., :3] * alpha


def _blur(field: Array, radius: float) -> Array:
    image = Image.fromarray((255 * field).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(image, np.float32) / 255


def draw_sample(seed: int, split: str, index: int, size: int = 64) -> tuple[Image.Image, Image.Image, int]:
    """One sample as a pure function of its arguments.

    Returns the image (RGB, size by size), the object's mask (mode L, 0 or 255) and the class, `index` modulo the number
    of classes.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    label = index % len(CLASSES)
    ground = _ground(rng, size)

    radius = rng.uniform(*RADIUS)
    room = EDGE - radius
    cx, cy = 0.5 + rng.uniform(-room, room, 2)
    turn = np.deg2rad(rng.uniform(-ROTATION, ROTATION))
    grid = (np.arange(size * SUPERSAMPLING, dtype=np.float32) + 0.5) / (size * SUPERSAMPLING)
    u, v = (grid[None, :] - cx) / radius, (grid[:, None] - cy) / radius
    x = (np.cos(turn) * u + np.sin(turn) * v).astype(np.float32)
    y = (np.cos(turn) * v - np.sin(turn) * u).astype(np.float32)
    if rng.random() < 0.5:
        x = -x
    shape, scale = SHAPES[CLASSES[label]]
    distance, texture = shape(x / scale, y / scale)

    def coarse(field: Array) -> Array:
        return field.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING).mean((1, 3), dtype=np.float32)

    inside, core = distance < 0, distance * scale < -OUTLINE
    cover, second, first = coarse(inside), coarse(core & texture), coarse(core & ~texture)
    paint = (
        first[..., None] * np.array(CREAM)
        + second[..., None] * np.array(RED)
        + (cover - first - second)[..., None] * np.array(PLUM)
    )

    towards = rng.uniform(0, 2 * np.pi)
    lx, ly = np.cos(towards), np.sin(towards)
    # a rim that is bright towards the light, and a soft shadow away from it
    down, across = np.gradient(_blur(cover, size / 32))
    rim = 1 - size / 64 * 1.6 * (lx * across + ly * down)
    shift = (round(-ly * size / 24), round(-lx * size / 24))
    shadow = 1 - SHADOW * _blur(np.roll(cover, shift, (0, 1)), size / 32)

    image = ground * shadow[..., None] * (1 - cover[..., None]) + paint * rim[..., None]
    slope = rng.uniform(*SLOPE)
    side = 2 * ((grid[1::SUPERSAMPLING][None, :] - 0.5) * lx + (grid[1::SUPERSAMPLING][:, None] - 0.5) * ly)
    image = image * (rng.uniform(0.85, 1.1) * (1 + slope * side))[..., None]
    pixels = np.clip(image + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels), Image.fromarray(np.uint8(255) * (cover >= 0.5)), label


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
    if not out.exists():
        return False
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file: give a new folder for the sample images")
    if not any(out.iterdir()):
        return False
    marker = out / MARKER
    if not marker.is_file():
        raise FileExistsError(f"{out} holds other files: give a new or empty folder for the sample images")
    there = json.loads(marker.read_text())
    if there != settings:
        changed = ", ".join(f"{k} {there.get(k)} not {v}" for k, v in settings.items() if there.get(k) != v)
        raise FileExistsError(
            f"{out} holds sample images of other settings ({changed}): give another folder or delete it"
        )
    for split in SPLITS:
        for index in range(settings[split]):
            for name in _names(split, index):
                if not (out / name).is_file():
                    raise FileExistsError(
                        f"{out} has lost {name}: delete {out} to render the sample images again"
                    )
    return True


def render_samples(out: Path, *, seed: int = 0, train: int = 2400, val: int = 800, size: int = 64) -> bool:
    """Write `train` and `val` samples under `out`; True if they were rendered, False if they were there already.

    `out`/train/CLASS/NNNN.jpg and `out`/val/CLASS/NNNN.jpg are the images, `out`/masks/... the objects' masks. The
    folder appears whole or not at all. Raises ValueError on counts or sizes that cannot be, FileExistsError if `out`
    holds anything else.
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
        folder.rename(out)
    return True


def main() -> None:
    """`python -m fastdino.data.samples OUT`"""
    parser = argparse.ArgumentParser(
        prog="python -m fastdino.data.samples", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("out", type=Path, help="new folder for the images")
    parser.add_argument("--train", type=int, default=2400, help="images in OUT/train (default %(default)s)")
    parser.add_argument("--val", type=int, default=800, help="images in OUT/val (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed gives other images (default %(default)s)"
    )
    args = parser.parse_args()
    try:
        new = render_samples(args.out, seed=args.seed, train=args.train, val=args.val)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    print(
        f"{args.out}: {args.train} + {args.val} sample images {'rendered' if new else 'are there already: kept'}"
    )


if __name__ == "__main__":
    main()
