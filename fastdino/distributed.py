"""Ranks and what runs on them: joining, talking to one another, and `parallelize`.

All of it is the identity in one process. A run is launched by torchrun, by SLURM's srun, or as it is.
"""

import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdino.config import RunConfig

T = TypeVar("T")

# Above so many parameters of the backbone, sharding saves more memory than its gathers cost time: ViT-L has
# 303 M, whose gradients, moments and teacher are 20 bytes a parameter, 6 GB; ViT-B 86 M.
SHARDED_FROM = 200_000_000


class ElsewhereError(RuntimeError):
    """Another rank failed and says why."""


class Place(NamedTuple):
    """Where this process stands among those that train together."""

    rank: int
    ranks: int
    local_rank: int
    """Its number among those on this machine: its GPU."""
    local_ranks: int


def place() -> Place:
    """This process's place by what torchrun or SLURM's srun put into the environment; else alone."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        ranks = int(env["WORLD_SIZE"])
        return Place(
            int(env["RANK"]),
            ranks,
            int(env.get("LOCAL_RANK", 0)),
            int(env.get("LOCAL_WORLD_SIZE", ranks)),
        )
    # The number of tasks of this *step*: a shell inside an allocation (salloc, sbatch) is one task.
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        ranks = int(env["SLURM_STEP_NUM_TASKS"])
        return Place(
            int(env["SLURM_PROCID"]),
            ranks,
            int(env["SLURM_LOCALID"]),
            # "4(x2),3": as many on the first two nodes, 3 on the third; the largest is what a node can hold
            max(int(n) for n in re.findall(r"(?:^|,)(\d+)", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))),
        )
    return Place(0, 1, 0, 1)


def first_host(nodes: str) -> str:
    """The first host of a SLURM list: `a[007-010,12],b3` gives `a007`."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,]*)", nodes)
    if not found:
        raise ValueError(f"SLURM's list of nodes is {nodes!r}: set MASTER_ADDR to the first of them")
    return found[1] + (found[2] or "") + found[3]


def rank() -> int:
    """This process's number; 0 alone."""
    return dist.get_rank() if ranks() > 1 else 0


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that --device names, `cuda` being this rank's GPU; raises ValueError if it is not there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise ValueError(f"--device {name}: give auto, cpu, cuda or cuda:N") from None
    if device.type != "cuda":
        return device
    if device.index is None and local_rank:
        device = torch.device("cuda", local_rank)
    if (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices"
            + (f", and rank {local_rank} on it wants one" if local_rank else "")
            + "; try --device cpu"
        )
    return device


@contextmanager
def joined(name: str, parallel: str = "auto") -> Iterator[torch.device]:
    """The device that --device names, with the ranks that were launched together joined meanwhile.

    One rank alone joins itself where torchrun launched it and --parallel asks for a way of several: so the
    code of many GPUs can be tried on one.

    Raises:
        ValueError: a device that is not there, or the same one for several ranks.
    """
    here = place()
    device = choose_device(name, here.local_rank)
    alone = here.ranks == 1 and ("RANK" not in os.environ or parallel == "auto")
    if alone or (dist.is_available() and dist.is_initialized()):
        yield device
        return
    if (
        here.ranks > 1
        and device.type == "cuda"
        and torch.device(name if name != "auto" else "cuda").index is not None
    ):
        raise ValueError(f"--device {name} with {here.ranks} ranks: give cuda, each takes a GPU of its own")
    if not dist.is_available():
        raise ValueError(f"{here.ranks} ranks: this build of torch has no torch.distributed")
    if "SLURM_STEP_NODELIST" in os.environ and "RANK" not in os.environ:
        os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))
    if device.type == "cuda":
        device = torch.device("cuda", here.local_rank)
        torch.cuda.set_device(device)
    store, _, _ = next(dist.rendezvous("env://", here.rank, here.ranks))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.PrefixStore(_word(store, here.rank, here.ranks), store)
    dist.init_process_group(
        # gloo carries what never touches the GPU: names of files, checkpoints
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=here.rank,
        world_size=here.ranks,
        device_id=device if device.type == "cuda" else None,
    )
    yield device
    # Not after an error: the others may be dead, and NCCL would wait for them.
    dist.destroy_process_group()
    _groups.clear()  # one that outlives the interpreter's end aborts the process


def _word(store: Any, rank: int, ranks: int) -> str:
    """A word that the ranks of this start share, and those of none before it.

    torchrun keeps its store when it starts the ranks anew, with the addresses of the dead in it, and gloo and
    NCCL call those (pytorch issue 135712; its count of restarts differs between nodes). So each rank asks
    rank 0 with a word of its own, which no answer to another start can fit.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"fastdino/asks/{rank}", mine)
        word = store.get(f"fastdino/answer/{mine}").decode()
        store.add(f"fastdino/heard/{word}", 1)
        return word
    answered: set[bytes] = set()
    deadline = time.monotonic() + store.timeout.total_seconds()
    while store.add(f"fastdino/heard/{mine}", 0) < ranks - 1:
        if time.monotonic() > deadline:
            raise RuntimeError(f"not all of the {ranks} ranks came within {store.timeout}")
        for other in range(1, ranks):
            if store.check([f"fastdino/asks/{other}"]):
                theirs = store.get(f"fastdino/asks/{other}")
                if theirs not in answered:
                    store.set(f"fastdino/answer/{theirs.decode()}", mine)
                    answered.add(theirs)
        time.sleep(0.02)
    return mine


def gather(value: T) -> list[T]:
    """Every rank's `value`, pickled, in the order of ranks, on all of them."""
    if ranks() == 1:
        return [value]
    values: list[Any] = [None] * ranks()
    dist.all_gather_object(values, value, group=cpu_group())
    return values


_groups: dict[Any, Any] = {}


def cpu_group(name: str = "") -> Any:
    """A group of all ranks over gloo, by name; made at its first use, which all ranks share."""
    if ranks() == 1:
        return None
    key = (dist.group.WORLD, name)
    if key not in _groups:
        _groups[key] = dist.new_group(backend="gloo")
    return _groups[key]


@contextmanager
def together() -> Iterator[None]:
    """What fails within on one rank fails on all: there with its own error, elsewhere with ElsewhereError."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        if ranks() == 1:
            raise
        error = caught
    failed = [i for i, said in enumerate(gather(error and str(error))) if said is not None]
    if failed and rank() == failed[0]:
        assert error is not None
        raise error
    if failed:
        raise ElsewhereError(f"rank {failed[0]} failed")


def on_first(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on all ranks; it runs there alone. What it raises fails all of them."""
    value: Any = None
    with together():
        if rank() == 0:
            value = work()
    return value if ranks() == 1 else gather(value)[0]


def start_mean(x: Tensor) -> Callable[[], Tensor]:
    """Begin to replace `x` (same shape on all ranks) by its mean over them; call the result to have it.

    What runs between the two hides the communication. On a GPU neither waits for the device.
    """
    if ranks() == 1:
        return lambda: x
    work = dist.all_reduce(x, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return x.div_(ranks())

    return finish


def mean_over_ranks_(x: Tensor) -> Tensor:
    """Replace `x` (same shape on all ranks) by its mean over the default process group, if there is one."""
    return start_mean(x)()


def is_sharded(x: Tensor) -> bool:
    """Whether `x` is a DTensor, of which this rank has a part."""
    return hasattr(x, "device_mesh")


def local(x: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def whole(x: Tensor) -> Tensor:
    """A sharded tensor put together, which all ranks take part in; any other tensor as it is."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def sharded_like(x: Tensor, part: Tensor) -> Tensor:
    """A DTensor laid out as `x`, on the memory of this rank's `part`; that itself if `x` is not sharded."""
    if not is_sharded(x):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        x.device_mesh,  # type: ignore[attr-defined]
        x.placements,  # type: ignore[attr-defined]
        shape=x.shape,  # parts may be uneven
        stride=x.stride(),
    )


def norms(tensors: Sequence[Tensor], like: Tensor | None = None) -> Tensor:
    """The 2-norm of each tensor, (n,), over all its shards: one all-reduce of n numbers.

    `like`: for shards without their DTensors, one that is sharded as they are.
    """
    parts = torch.stack(torch._foreach_norm([local(x) for x in tensors]))
    first = tensors[0] if like is None else like
    if not is_sharded(first):
        return parts
    mesh: Any = first.device_mesh  # type: ignore[attr-defined]
    squares = parts.square_()
    for dim, its in enumerate(first.placements):  # type: ignore[attr-defined]
        if its.is_shard():  # not the replicas of HSDP
            dist.all_reduce(squares, group=mesh.get_group(dim))
    return squares.sqrt_()


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all ranks, on a CPU, where torch's own is for GPUs alone.

    Each rank has as many images.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"input of shape {tuple(x.shape)}: give (B, C, ...)")

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not self.training:
            return super().forward(x)
        out, mean, var = _Standardize.apply(x, self.eps)  # type: ignore[misc]
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            n = x.numel() // x.shape[1] * ranks()
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum  # type: ignore[arg-type]
            self.running_mean.lerp_(mean, weight)
            self.running_var.lerp_(var * (n / max(n - 1, 1)), weight)
        if self.affine:
            shape = [1, -1] + [1] * (x.ndim - 2)
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


class _Standardize(torch.autograd.Function):
    """Each channel of x (B, C, ...) to mean 0 and variance 1 over all ranks; also mean and variance, (C,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        dims, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
        mean = mean_over_ranks_(wide.mean(dims))
        centred = wide - mean.view(shape)
        # What rounding left of the mean; and the variance not from squares of x: digits would be lost.
        rest = mean_over_ranks_(centred.mean(dims))
        centred -= rest.view(shape)
        var = mean_over_ranks_(centred.square().mean(dims))
        scale = (var + eps).rsqrt().view(shape)
        out = centred.mul_(scale)
        ctx.save_for_backward(out, scale)
        ctx.dims, ctx.shape, ctx.dtype = dims, shape, x.dtype
        mean += rest
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        out, scale = ctx.saved_tensors
        means = mean_over_ranks_(torch.stack((grad.mean(ctx.dims), (grad * out).mean(ctx.dims))))
        first, second = (m.view(ctx.shape) for m in means)
        return ((grad - first - out * second) * scale).to(ctx.dtype), None


def _synchronize_batch_norm(network: nn.Module, device: torch.device) -> bool:
    """Have every batch norm of `network` use the batches of all ranks; whether it has any."""
    found = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    plain = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
    others = {type(m).__name__ for m in found if type(m) not in plain}
    if device.type == "cuda" and others:  # timm's, which have an activation inside
        from timm.layers import convert_sync_batchnorm

        convert_sync_batchnorm(network)
    elif device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    elif others:
        raise ValueError(
            f"this network's {', '.join(sorted(others))} cannot be kept in step over ranks on a CPU: train "
            "in one process, on GPUs, or with another --arch"
        )
    else:
        for module in found:
            module.__class__ = SyncBatchNorm
    return bool(found)


def choose_parallel(name: str, backbone: nn.Module) -> str:
    """`ddp`, `fsdp` or `hsdp` for what --parallel says; auto shards from ViT-L on, within a node."""
    if name != "auto":
        return name
    if sum(p.numel() for p in backbone.parameters()) < SHARDED_FROM:
        return "ddp"
    return "hsdp" if place().local_ranks < ranks() else "fsdp"


def _mesh(parallel: str, device: torch.device) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    if parallel == "fsdp":
        return init_device_mesh(device.type, (ranks(),), mesh_dim_names=("shard",))
    local_ranks = place().local_ranks
    if ranks() % local_ranks:
        raise ValueError(
            f"--parallel hsdp needs as many ranks on each node: there are {ranks()}, {local_ranks} here"
        )
    return init_device_mesh(
        device.type, (ranks() // local_ranks, local_ranks), mesh_dim_names=("replicate", "shard")
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
    has_batch_norm = ranks() > 1 and _synchronize_batch_norm(network, device)
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        # A graph each for student and teacher, with and without stochastic depth, the last block, evaluation.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        # Sizes that happen to be equal when a graph is made need not be so in the next step.
        torch.fx.experimental._config.use_duck_shape = False  # type: ignore[attr-defined]
        # Blocks are small enough for DDP's buckets; splitting their graphs at those would compile them anew.
        torch._dynamo.config.optimize_ddp = False
        for block in [backbone] if blocks is None else list(blocks):
            block.compile(dynamic=None if blocks is None else True)
    if ranks() == 1 and (config.parallel == "auto" or not (dist.is_available() and dist.is_initialized())):
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


def communicating(network: Any, gradients: bool) -> AbstractContextManager:
    """Forward and backward of one piece of a batch; only those of the last reduce gradients over ranks."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        return nullcontext() if gradients else network.no_sync()
    if hasattr(network, "set_requires_gradient_sync"):
        network.set_requires_gradient_sync(gradients)
    return nullcontext()
