"""JPEGs of ImageNet's sizes and weight, made of eight photographs that scikit-learn and scikit-image hold.

    python -m benchmarks.photos DIR [--count 512]

Each is a random piece of a photograph: scaled by 0.7 to 1 (never up: that would leave it smooth), mirrored at
its edges where it is smaller than the piece, flipped or not, with the grain of a sensor. Sizes are 500x400,
500x375, 500x333 and 400x500; JPEG of quality 95 with 4:2:0 subsampling brings the mean to ImageNet's 110 KB.
The same seed gives the same pixels. They lie in a folder for each photograph, as classes do.
"""

import argparse
import tempfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PHOTOGRAPHS = {
    "skimage": (
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "rocket.jpg",
    ),
    "sklearn": ("china.jpg", "flower.jpg"),
}
FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
# width, height: share
SIZES = {(500, 400): 0.5, (500, 375): 0.2, (400, 500): 0.2, (500, 333): 0.1}
SCALES = (0.7, 1.0)
GRAIN = (3.0, 9.0)  # standard deviation of each pixel's light, in levels of 255
QUALITY = 95


def photographs() -> dict[str, np.ndarray[Any, Any]]:
    """The photographs by name, uint8 (h, w, 3); ImportError where a package is missing."""
    found = {}
    for package, names in PHOTOGRAPHS.items():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ImportError(f"the photographs lie in {package}: pip install scikit-learn scikit-image")
        for name in names:
            path = Path(spec.origin).parent / FOLDERS[package] / name
            found[path.stem] = np.asarray(Image.open(path).convert("RGB"))
    return found


def draw(seed: int, count: int) -> Iterator[tuple[str, Image.Image]]:
    """Names of the photographs and pieces of them."""
    from_ = photographs()
    names, sizes = list(from_), list(SIZES)
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        name = names[i % len(names)]
        width, height = sizes[rng.choice(len(sizes), p=list(SIZES.values()))]
        photo = Image.fromarray(from_[name])
        scale = rng.uniform(*SCALES)
        photo = photo.resize([round(side * scale) for side in photo.size], Image.Resampling.LANCZOS)
        pixels = np.asarray(photo)
        short = [max(0, side - had) for side, had in zip((height, width), pixels.shape, strict=False)]
        pixels = np.pad(pixels, [(s // 2, s - s // 2) for s in short] + [(0, 0)], "symmetric")
        top, left = (rng.integers(had - s + 1) for had, s in zip(pixels.shape, (height, width), strict=False))
        pixels = pixels[top : top + height, left : left + width]
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        grain = rng.uniform(*GRAIN) * rng.standard_normal((height, width, 1), dtype=np.float32)
        yield name, Image.fromarray(np.clip(pixels + grain + 0.5, 0, 255).astype(np.uint8))


def make(folder: Path, count: int = 512, seed: int = 0) -> None:
    """Write them into a new or empty folder, whole or not at all; one that holds files is left as it is."""
    if folder.exists() and any(folder.iterdir()):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        for i, (name, image) in enumerate(draw(seed, count)):
            place = Path(scratch, "photos", name)
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{i:05d}.jpg", quality=QUALITY, subsampling="4:2:0")
        Path(scratch, "photos").rename(folder)


def describe(paths: Iterable[str | Path]) -> dict[str, Any]:
    """Count, mean size and weight of JPEGs, each read once: then the page cache has them."""
    bytes_, sizes = [], []
    for path in paths:
        bytes_.append(len(Path(path).read_bytes()))
        with Image.open(path) as image:
            sizes.append(image.size)
    width, height = np.mean(sizes, axis=0)
    return {
        "images": len(bytes_),
        "mean_KB": round(float(np.mean(bytes_)) / 1e3, 1),
        "smallest_KB": round(min(bytes_) / 1e3, 1),
        "largest_KB": round(max(bytes_) / 1e3, 1),
        "mean_size": f"{width:.0f}x{height:.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.folder, args.count, args.seed)
    print(f"{args.folder}: {describe(sorted(args.folder.glob('*/*.jpg')))}")


if __name__ == "__main__":
    main()
