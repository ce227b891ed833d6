"""Weighted k-NN of random features."""

from collections.abc import Callable

import pytest
import torch

Timed = Callable[..., None]


@pytest.mark.parametrize("variant", ["fastdino", "matrix-product"])
def bench_knn(timed: Timed, small: bool, variant: str) -> None:
    """All of official DINO's k, 100 classes; beside it, the similarities alone."""
    from fastdino.eval.knn import knn_accuracy

    train, test = (torch.randn(n, 384) for n in ((300, 50) if small else (20_000, 2_000)))
    labels, truth = (torch.randint(100, (len(x),)) for x in (train, test))
    variants = {
        "fastdino": lambda: knn_accuracy(train, labels, test, truth),
        "matrix-product": lambda: test @ train.T,
    }
    timed("k-NN", variant, variants, 15)
