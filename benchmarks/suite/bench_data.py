"""Loading: the ten crops of images, and whole batches from files, beside Pillow."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import ops

Timed = Callable[..., None]


@pytest.mark.parametrize("variant", ["fastdino", "pillow"])
def bench_crops_of_an_image(timed: Timed, variant: str) -> None:
    """All ten, drawing them included."""
    timed("crops of an image", variant, ops.multi_crop(1), 100 if variant == "pillow" else 1000)


@pytest.mark.parametrize("variant", ["fastdino"])
def bench_crops_of_a_batch(timed: Timed, small: bool, variant: str) -> None:
    """Only the kernel, on all threads."""
    case = ops.multi_crop(2 if small else 16)
    timed("crops of 16 images", variant, case, 150, "fastdino, decoded images at once")


@pytest.mark.parametrize("variant", ["fastdino", "pillow-decodes"])
def bench_loader(timed: Timed, small: bool, tmp_path: Path, variant: str) -> None:
    """Eight images from JPEG files to uint8 crops, in this process; beside it, their decoding by Pillow."""
    from benchmarks.loader import our_loader
    from fastdino.config import CropPolicy
    from fastdino.data import open_source

    batch = 2 if small else 8
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / f"{i:02d}.jpg" for i in range(4 * batch)]
    for i, path in enumerate(paths):
        ops.photograph(i).save(path, quality=90)
    batches = iter(
        our_loader(open_source(str(tmp_path / "images")), CropPolicy(), "torchvision", batch, 0, 1000)
    )
    variants = {
        "fastdino": lambda: next(batches),
        "pillow-decodes": lambda: [Image.open(path).convert("RGB") for path in paths[:batch]],
    }
    timed("loader", variant, variants, 80)
