"""Where the work runs: the device, and the mean over ranks, which is the identity in a single process."""

import torch
import torch.distributed as dist
from torch import Tensor


def choose_device(name: str) -> torch.device:
    """The device that --device names; raises ValueError if it is not there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise ValueError(f"--device {name}: give auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; try --device cpu"
        )
    return device


def mean_over_ranks_(x: Tensor) -> Tensor:
    """Replace `x` (same shape on all ranks) by its mean over the default process group, if there is one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x
