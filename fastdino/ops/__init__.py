"""The fused operations, DINO loss and teacher update, in a plain form and in kernels; Sinkhorn's centre."""

import torch

from fastdino.ops.dino_loss import choose as _choose_dino_loss
from fastdino.ops.dino_loss import dino_loss
from fastdino.ops.ema import choose as _choose_ema
from fastdino.ops.ema import ema_
from fastdino.ops.sinkhorn import sinkhorn_center

__all__ = ["describe", "dino_loss", "ema_", "sinkhorn_center"]


def describe(device: torch.device | str) -> dict[str, str]:
    """For each operation, what "auto" runs on a device, and in brackets why, or why nothing faster."""
    chosen = {"dino_loss": _choose_dino_loss(torch.device(device)), "ema": _choose_ema(torch.device(device))}
    return {name: f"{impl} ({why})" for name, (impl, why) in chosen.items()}
