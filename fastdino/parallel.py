"""How a network runs: attention kernel, activation checkpointing, compilation, DDP or FSDP2 over ranks."""

from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastdino.config import RunConfig
from fastdino.distributed import launch, world_size
from fastdino.sync_batch_norm import synchronize_batch_norm

# From this number of parameters of the backbone on, sharding saves more memory than its gathers cost time.
# ViT-L has 303 M, whose gradients, moments and teacher are 20 bytes a parameter, 6 GB; ViT-B has 86 M.
SHARDED_FROM = 200_000_000


def choose_parallel(name: str, backbone: nn.Module) -> str:
    """`ddp`, `fsdp` or `hsdp` for what --parallel says; auto shards from ViT-L on, within a node."""
    if name != "auto":
        return name
    if sum(p.numel() for p in backbone.parameters()) < SHARDED_FROM:
        return "ddp"
    return "hsdp" if launch().local_ranks < world_size() else "fsdp"


def _mesh(parallel: str, device: torch.device) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    if parallel == "fsdp":
        return init_device_mesh(device.type, (world_size(),), mesh_dim_names=("shard",))
    local_ranks = launch().local_ranks
    if world_size() % local_ranks:
        raise ValueError(
            f"--parallel hsdp needs as many ranks on each node: there are {world_size()}, {local_ranks} here"
        )
    return init_device_mesh(
        device.type, (world_size() // local_ranks, local_ranks), mesh_dim_names=("replicate", "shard")
    )


def parallelize(
    network: nn.Module,
    config: RunConfig,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    trained: bool = True,
    partly: bool = False,
) -> nn.Module:
    """Have a network of backbone and head run as `config` says; returns what to call in its place.

    In this order: attention kernel, activation checkpointing, compilation, then over several ranks batch norm
    in step and DDP or FSDP2. Parameters keep their names in `network`, which stays what has them.

    A ViT is compiled block by block: its blocks share one graph, with sizes left open, so that neither
    stochastic depth nor another batch compiles anew. Other networks are compiled whole, once for each size of
    crop.

    Args:
        network: has a `backbone` and a `head`, or is a backbone alone; already on `device`.
        dtype: what autocast computes in, and FSDP2 gathers parameters in; gradients are reduced in float32.
        trained: it gets gradients. Without them there is nothing for DDP to do.
        partly: some steps leave parameters without a gradient.

    Raises:
        ValueError: checkpointing of a network that has none, or ranks that --parallel cannot lay out.
    """
    backbone: Any = getattr(network, "backbone", network)
    blocks = getattr(backbone, "blocks", None) if hasattr(backbone, "attention_impl") else None
    if blocks is not None:
        backbone.attention_impl = config.attention
    if device.type == "cuda":
        # cuDNN plans anew for every number of samples, of which stochastic depth draws another each step.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if config.activation_checkpointing:
        if blocks is not None:
            backbone.checkpointing = True
        elif hasattr(backbone, "set_grad_checkpointing"):  # timm's
            backbone.set_grad_checkpointing()
        else:
            raise ValueError("--activation-checkpointing: this network has no blocks to checkpoint")
    has_batch_norm = world_size() > 1 and synchronize_batch_norm(network, device)
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        # A graph each for student and teacher, with and without stochastic depth, the last block, evaluation.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        # Sizes that happen to be equal when a graph is made need not be so in the next step.
        torch.fx.experimental._config.use_duck_shape = False  # type: ignore[attr-defined]
        # Blocks are small enough for DDP's buckets; splitting their graphs at those would compile them anew.
        torch._dynamo.config.optimize_ddp = False
        for block in [backbone] if blocks is None else list(blocks):
            block.compile(dynamic=None if blocks is None else True)
    if world_size() == 1 and (
        config.parallel == "auto" or not (dist.is_available() and dist.is_initialized())
    ):
        return network
    parallel = choose_parallel(config.parallel, backbone)
    if parallel == "ddp":
        if not trained:
            return network
        wrap: Any = nn.parallel.DistributedDataParallel
        # Batch norm is in step, other buffers are the same everywhere. The flag's new name is torch 2.15's.
        new = "forward_sync_buffers" in signature(wrap).parameters
        return wrap(
            network,
            **{"forward_sync_buffers" if new else "broadcast_buffers": False},
            gradient_as_bucket_view=True,
            find_unused_parameters=partly,
        )
    _shard(network, _mesh(parallel, device), None if has_batch_norm else dtype, trained)
    return network


def _shard(network: Any, mesh: Any, dtype: torch.dtype | None, trained: bool) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = dtype if dtype in (torch.bfloat16, torch.float16) else None
    # Inputs stay as autocast leaves them: the residual stream in float32, as without sharding.
    policy = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
    blocks = [*getattr(network.backbone, "blocks", ())]
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # The backward pass begins with the head, and what a root holds is used at both ends.
    for module in (network.head, network):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=not trained)
    order = [network, *blocks, network.head]
    for first, then in pairwise(order):
        first.set_modules_to_forward_prefetch([then])
    if trained:
        backward = [network.head, *reversed(blocks)]
        for first, then in pairwise(backward):
            first.set_modules_to_backward_prefetch([then])


def gradient_sync(network: Any, gradients: bool) -> AbstractContextManager:
    """Forward and backward of one piece of a batch; only those of the last reduce gradients over ranks."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        return nullcontext() if gradients else network.no_sync()
    if hasattr(network, "set_requires_gradient_sync"):
        network.set_requires_gradient_sync(gradients)
    return nullcontext()
