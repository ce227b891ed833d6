"""The operations with kernels of their own or a choice among others'."""

import torch

from fastdino.ops import native
from fastdino.ops.attention import attention
from fastdino.ops.dino_loss import dino_loss
from fastdino.ops.ema import ema_
from fastdino.ops.linear import Linear, linear
from fastdino.ops.multi_crop import multi_crop
from fastdino.ops.sinkhorn import sinkhorn_center

__all__ = ["Linear", "attention", "describe", "dino_loss", "ema_", "linear", "multi_crop", "sinkhorn_center"]


def describe(device: torch.device | str) -> dict[str, str]:
    """For each operation, what "auto" runs on a device, and in brackets why, or why nothing faster."""
    impl, why = native.choose(torch.device(device))
    return dict.fromkeys(("dino_loss", "ema"), f"{impl} ({why})")
