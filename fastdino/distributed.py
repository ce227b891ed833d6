"""Where and how the work runs: device, compilation, and the mean over ranks, the identity in one process."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdino.config import RunConfig


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


def parallelize(backbone: nn.Module, config: RunConfig, device: torch.device) -> None:
    """Have a backbone run as `config` says: attention kernel, activation checkpointing, then compilation.

    A ViT is compiled block by block: its blocks share one graph, with sizes left open, so that neither
    stochastic depth nor another batch compiles anew. Other networks are compiled whole, once for each size of
    crop. Parameters and their names stay as they are.

    Raises:
        ValueError: checkpointing of a network that has none.
    """
    blocks = getattr(backbone, "blocks", None) if hasattr(backbone, "attention_impl") else None
    if blocks is not None:
        backbone.attention_impl = config.attention  # type: ignore[assignment]
    if config.activation_checkpointing:
        if blocks is not None:
            backbone.checkpointing = True  # type: ignore[assignment]
        elif hasattr(backbone, "set_grad_checkpointing"):  # timm's
            backbone.set_grad_checkpointing()  # type: ignore[operator]
        else:
            raise ValueError("--activation-checkpointing True: this network has no blocks to checkpoint")
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        # A graph each for student and teacher, with and without stochastic depth, the last block, evaluation.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        # Sizes that happen to be equal when a graph is made need not be so in the next step.
        torch.fx.experimental._config.use_duck_shape = False  # type: ignore[attr-defined]
        for block in [backbone] if blocks is None else list(blocks):  # type: ignore[arg-type]
            block.compile(dynamic=None if blocks is None else True)


def mean_over_ranks_(x: Tensor) -> Tensor:
    """Replace `x` (same shape on all ranks) by its mean over the default process group, if there is one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x
