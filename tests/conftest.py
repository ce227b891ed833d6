"""Shared by all tests: the Triton interpreter where there is no GPU, a fixed seed, the operations'
implementations, poisoned memory, Dynamo as it is when it is imported, and what is drawn."""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before anything imports triton

from fastdino.ops import native  # noqa: E402

IMPLS: list = ["torch", *(["cpu"] if native.isas() else [])]
if find_spec("triton"):
    IMPLS.append(pytest.param("triton", marks=pytest.mark.cuda if CUDA else ()))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation of an operation; where there is a GPU, Triton's tests make their tensors on it."""
    with torch.device("cuda") if CUDA and request.param == "triton" else nullcontext():
        yield request.param


@pytest.fixture
def poison() -> Iterator[None]:
    """Fresh memory is NaN: an element that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def dynamo() -> Iterator[None]:
    """Dynamo without graphs and with its own settings, which `parallelize` changes, put back afterwards.

    (Through `patch`: Dynamo takes `monkeypatch` undoing an attribute for its deletion.)
    """
    import torch._dynamo
    import torch.fx.experimental._config as symbolic

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8), symbolic.patch(use_duck_shape=True):
        yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were saved."""
    import matplotlib.figure  # some machines that test kernels have none

    figures: list[Any] = []
    savefig = matplotlib.figure.Figure.savefig

    def keep(figure: Any, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return figures
