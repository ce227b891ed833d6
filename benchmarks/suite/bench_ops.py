"""The operations, at the sizes of ViT-S/16 with 65,536 prototypes."""

from collections.abc import Callable

import pytest

from benchmarks import ops

DTYPES = ("float32", "bfloat16")
Timed = Callable[..., None]


@pytest.mark.parametrize("variant", ["fastdino", "fastdino-in-place", "official"])
@pytest.mark.parametrize("dtype", DTYPES)
def bench_loss(timed: Timed, small: bool, dtype: str, variant: str) -> None:
    case = ops.loss(*((2, 100) if small else (16, 65536)), dtype)
    timed(f"loss, {dtype}", variant, case, 40 if variant == "official" else 200)


@pytest.mark.parametrize("variant", ["fastdino", "official"])
def bench_center(timed: Timed, small: bool, variant: str) -> None:
    timed("centre", variant, ops.center(*((2, 100) if small else (16, 65536))), 1000)


@pytest.mark.parametrize("variant", ["fastdino", "dinov2"])
def bench_sinkhorn(timed: Timed, small: bool, variant: str) -> None:
    timed("sinkhorn", variant, ops.sinkhorn(*((2, 100) if small else (16, 65536))), 200)


@pytest.mark.parametrize("variant", ["fastdino", "foreach-lerp"])
@pytest.mark.parametrize("arch", ["vit_small", "vit_base"])
def bench_ema(timed: Timed, small: bool, arch: str, variant: str) -> None:
    case = ops.ema("vit_nano" if small else arch, prototypes=100 if small else 65536)
    timed(f"teacher's update, {arch}", variant, case, 200 if arch == "vit_small" else 100)


@pytest.mark.parametrize("variant", ["fastdino", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("patch", [16, 8])
def bench_attention(timed: Timed, small: bool, patch: int, dtype: str, variant: str) -> None:
    case = ops.attention(1 if small or patch == 8 else 4, patch, dtype, heads=1 if small else 6)
    timed(f"attention, patch {patch}, {dtype}", variant, case, 80 if patch == 16 else 40)


@pytest.mark.parametrize("variant", ["fastdino", "torch"])
def bench_linear(timed: Timed, small: bool, variant: str) -> None:
    timed("linear", variant, ops.linear(*((20, 24) if small else (2760, 384))), 80)
