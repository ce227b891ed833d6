"""Crops and loading: photographs in size, in texture noise over smooth colours."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.config import CropPolicy
from fastdino.data import crops

POLICY = CropPolicy()
Timed = Callable[..., None]


def photograph(seed: int, width: int = 500, height: int = 375) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))
    noise = rng.normal(0, 12, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("variant", ["fastdino", "pillow"])
def bench_crops_of_an_image(timed: Timed, small: bool, variant: str) -> None:
    """All ten, drawing them included."""
    image = photograph(0)
    views = crops.draw(POLICY, 0, 0, 0, image.size)
    out = [torch.empty(1, 3, view.size, view.size, dtype=torch.uint8) for view in views]
    variants = {
        "fastdino": lambda: crops.render_into(image, crops.draw(POLICY, 0, 0, 0, image.size), out),
        "pillow": lambda: [crops.render(image, view) for view in views],
    }
    timed("crops of an image", variant, variants, 100 if variant == "pillow" else 1000)


@pytest.mark.parametrize("variant", ["fastdino"])
def bench_crops_of_a_batch(timed: Timed, small: bool, variant: str) -> None:
    """The kernel alone, on all threads."""
    from fastdino import ops

    count = 2 if small else 16
    images = [crops.pixels(photograph(i)) for i in range(count)]
    drawn = [crops.draw(POLICY, 0, 0, i, (500, 375)) for i in range(count)]
    parameters = torch.stack([crops.encode(views) for views in drawn])
    out = [torch.empty(count, 3, view.size, view.size, dtype=torch.uint8) for view in drawn[0]]
    timed("crops of 16 images", variant, {"fastdino": lambda: ops.multi_crop(images, parameters, out)}, 150)


@pytest.mark.parametrize("variant", ["fastdino", "pillow-decodes"])
def bench_loader(timed: Timed, small: bool, tmp_path: Path, variant: str) -> None:
    """Eight images from JPEG files to uint8 crops, in this process; beside it, their decoding by Pillow."""
    from fastdino.data import make_loader, open_source

    batch, files = 2 if small else 8, 4 if small else 32
    for i in range(files):
        (tmp_path / "images").mkdir(exist_ok=True)
        photograph(i).save(tmp_path / "images" / f"{i:02d}.jpg", quality=90)
    paths = sorted((tmp_path / "images").iterdir())[:batch]
    source = open_source(str(tmp_path / "images"))
    options = {
        "batch_size": batch,
        "pieces": 1,
        "seed": 0,
        "start_step": 0,
        "total_steps": 1000,
        "workers": 0,
    }
    batches = iter(make_loader(source, POLICY, **options))
    variants = {
        "fastdino": lambda: next(batches),
        "pillow-decodes": lambda: [Image.open(path).convert("RGB") for path in paths],
    }
    timed("loader", variant, variants, 80)
