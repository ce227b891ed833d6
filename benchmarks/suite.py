"""The cases of `make bench`, by pytest-benchmark: on a CPU, for on a GPU its clock would time only launches.

A case is one way to do a thing; its group has others, without fastdino. Those are there to be the same at
every commit: where they change, the machine has.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fastdino
from benchmarks import loader, ops
from benchmarks.harness import Case
from benchmarks.update import Problem, settings_of
from fastdino.config import CropPolicy
from fastdino.data import open_source
from fastdino.update import Update


def update(arch: str, sizes: tuple[int, int], out_dim: int, precision: str) -> Case:
    """A whole update of two images; beside it, products of matrices of its sizes, which no commit changes."""
    problem = Problem(arch, 16, 2, sizes, out_dim=out_dim)
    config = problem.config(precision=precision)
    made, settings = Update(config), settings_of(config)
    crops = problem.crops(problem.images, made.device)
    x, weight = (torch.randn(n, 768).to(made.dtype) for n in (1536, 768))

    def products() -> None:
        for _ in range(8):
            (x @ weight.t()) @ weight

    variants = {"fastdino": lambda: made([crops], settings), "matrix products": products}
    return Case("update", {}, variants)


def load(batch: int) -> Case:
    """Some images from JPEG files to uint8 crops, in this process; beside it, their decoding by Pillow."""
    scratch = tempfile.TemporaryDirectory(prefix="fastdino-bench-")
    for i in range(4 * batch):
        ops.photograph(i).save(Path(scratch.name, f"{i:02d}.jpg"), quality=90)
    source = open_source(scratch.name)
    batches = iter(loader.our_loader(source, CropPolicy(), "torchvision", loader.CPU, batch, 0, 1000))

    def decode() -> None:
        for i in range(batch):
            Image.open(Path(scratch.name, f"{i:02d}.jpg")).convert("RGB")

    return Case("loader", {}, {"fastdino": lambda: next(batches), "pillow": decode})


# What makes the case, its arguments, tiny ones to try it, and the rounds of each variant: fixed, so that two
# commits have as many to take the least of.
GROUPS: dict[str, tuple[Callable[..., Case], tuple[Any, ...], tuple[Any, ...], dict[str, int]]] = {
    "crops of an image": (ops.multi_crop, (1,), (1,), {"fastdino": 1000, "pillow": 100}),
    "crops of 16 images": (ops.multi_crop, (16,), (2,), {"fastdino, decoded images at once": 150}),
    "loader": (load, (8,), (2,), {"fastdino": 80, "pillow": 80}),
    "linear": (ops.linear, (2760, 384), (20, 24), {"fastdino": 80, "torch": 80}),
    "sinkhorn": (ops.sinkhorn, (16, 65536), (2, 100), {"fastdino": 200, "dinov2": 200}),
    "k-NN": (
        ops.knn,
        (20_000, 2_000, 100, 384, False),
        (300, 50, 100, 384, False),
        {"fastdino, k = 10 20 100 200": 15, "matrix-product": 15},
    ),
}
for arch, rounds in (("vit_small", 200), ("vit_base", 100)):
    tried, ways = ("vit_nano", "cpu", 100), {"fastdino": rounds, "foreach-lerp": rounds}
    GROUPS[f"teacher's update, {arch}"] = ops.ema, (arch,), tried, ways
for dtype, precision in (("float32", "fp32"), ("bfloat16", "bf16")):
    ways = {"fastdino": 200, "fastdino-in-place": 200, "official": 40}
    GROUPS[f"loss, {dtype}"] = ops.loss, (16, 65536, dtype), (2, 100, dtype), ways
    for patch, images, rounds in ((16, 4, 80), (8, 1, 40)):
        size, tried = (images, patch, dtype), (1, patch, dtype, "cpu", 1)
        ways = {"fastdino": rounds, "torch": rounds}
        GROUPS[f"attention, patch {patch}, {dtype}"] = ops.attention, size, tried, ways
    size, tried = ("vit_tiny", (224, 96), 65536, precision), ("vit_nano", (32, 16), 100, precision)
    GROUPS[f"update, {dtype}"] = update, size, tried, {"fastdino": 20, "matrix products": 20}


@pytest.mark.parametrize(("group", "variant"), [(g, v) for g, case in GROUPS.items() for v in case[3]])
def test_speed(benchmark: Any, group: str, variant: str) -> None:
    """Times a variant; under --benchmark-disable tries it at tiny size."""
    torch.manual_seed(0)
    make, sizes, tiny, rounds = GROUPS[group]
    case = make(*(sizes if benchmark.enabled else tiny))
    benchmark.group, benchmark.extra_info["fastdino"] = group, fastdino.__file__
    benchmark.pedantic(case.variants[variant], setup=case.setup, rounds=rounds[variant], warmup_rounds=2)
