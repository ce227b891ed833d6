"""Weighted k-NN of random features."""

from collections.abc import Callable

import pytest

from benchmarks import ops


@pytest.mark.parametrize("variant", ["fastdino", "matrix-product"])
def bench_knn(timed: Callable[..., None], small: bool, variant: str) -> None:
    """All of official DINO's k, 100 classes; beside it, only the similarities."""
    case = ops.knn(*((300, 50) if small else (20_000, 2_000)), 100, rivals=False)
    timed("k-NN", variant, case, 15, "fastdino, k = 10 20 100 200" if variant == "fastdino" else variant)
