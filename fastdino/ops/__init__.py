"""The fused operations, DINO loss and teacher update, in a plain form and in kernels; Sinkhorn's centre."""

import torch

from fastdino.ops import native
from fastdino.ops.dino_loss import dino_loss
from fastdino.ops.ema import ema_
from fastdino.ops.sinkhorn import sinkhorn_center

__all__ = ["describe", "dino_loss", "ema_", "sinkhorn_center"]


def describe(device: torch.device | str) -> dict[str, str]:
    """For each operation, what "auto" runs on a device, and in brackets why, or why nothing faster."""
    impl, why = native.choose(torch.device(device))
    return dict.fromkeys(("dino_loss", "ema"), f"{impl} ({why})")
