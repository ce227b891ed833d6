"""A whole update of a small ViT: `fastdino.Update` on a batch that has been loaded, as the trainer's."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.mark.parametrize("variant", ["fastdino", "matrix-products"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_update(timed: Callable[..., None], small: bool, dtype: str, variant: str) -> None:
    """ViT-Ti/16, two images; beside it, products of matrices of its sizes, which no commit changes."""
    from benchmarks.update import Problem, settings_of
    from fastdino.update import Update

    problem = Problem("vit_nano", 16, 1, (32, 16), out_dim=100) if small else Problem("vit_tiny", 16, 2)
    config = problem.config(precision={"float32": "fp32", "bfloat16": "bf16"}[dtype])
    update, settings = Update(config), settings_of(config)
    crops, width = problem.crops(problem.images, update.device), 32 if small else 768
    x, weight = (torch.randn(2 * width, width).to(update.dtype) for _ in range(2))

    def products() -> Tensor:
        out = x
        for _ in range(8):
            out = (x @ weight.t()) @ weight
        return out

    variants = {"fastdino": lambda: update([crops], settings), "matrix-products": products}
    timed(f"update, {dtype}", variant, variants, 20)
