"""The operations with kernels of their own or a choice among others'."""

from pathlib import Path

import torch

from fastdino.ops import native
from fastdino.ops.dino_loss import dino_loss
from fastdino.ops.ema import ema_
from fastdino.ops.linear import Linear, linear
from fastdino.ops.multi_crop import multi_crop
from fastdino.ops.packed_attention import attention
from fastdino.ops.sinkhorn import sinkhorn_center

__all__ = ["Linear", "attention", "describe", "dino_loss", "ema_", "linear", "multi_crop", "sinkhorn_center"]


def describe(device: torch.device | str) -> dict[str, str]:
    """What "auto" runs on a device for each op with a NAME_cpu.py; in brackets with what, or why so."""
    names = {path.name.removesuffix("_cpu.py") for path in Path(__file__).parent.glob("*_cpu.py")}
    names -= {"multi_crop"}  # has no form in torch: data/crops.py says what makes the crops
    impl, why = native.choose(torch.device(device))
    return dict.fromkeys(sorted(names), f"{impl} ({why})")
