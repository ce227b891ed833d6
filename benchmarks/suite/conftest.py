"""The cases' clock and seed. A case is one way to do a thing; its group has others, without fastdino.

Those are there to be the same at every commit: where they change, the machine has. Cases import what they
need themselves, so that a commit that lacks it loses no other case. For a CPU: on a GPU this clock would
time only the launches.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """What was timed: benchmarks/compare.py checks it, and pytest-benchmark warns where it differs."""
    import fastdino
    from fastdino.ops import native

    machine_info["fastdino"] = fastdino.__file__
    machine_info["library"] = str(native.LIBRARY)
    machine_info["kernels"] = native.describe()
    machine_info["torch"] = f"{torch.__version__}, {torch.get_num_threads()} threads"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small(request: pytest.FixtureRequest) -> bool:
    """Whether nothing is timed, but everything tried: then sizes are to be tiny."""
    return request.config.getoption("--benchmark-disable")


@pytest.fixture
def timed(benchmark: Any) -> Callable[..., None]:
    """timed(group, variant, case, rounds, of): times `of`, or the variant, of a `Case` or a dict.

    The rounds are fixed, so that two commits have as many to take the least of: a few seconds on two cores.
    """

    def run(group: str, variant: str, case: Any, rounds: int, of: str = "") -> None:
        benchmark.group = group
        benchmark.extra_info["ours"] = variant.startswith("fastdino")
        variants, setup = getattr(case, "variants", case), getattr(case, "setup", None)
        benchmark.pedantic(variants[of or variant], setup=setup, rounds=rounds, warmup_rounds=2)

    return run
