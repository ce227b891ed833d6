"""Several processes (ranks) that train together: how they were launched, find one another, and talk.

In one process everything here is a no-op. A run is launched by torchrun, by SLURM's srun, or by itself.
"""

import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class OtherRankFailed(RuntimeError):
    """Another rank failed and says why."""


class Launch(NamedTuple):
    """Where a launcher has put this process."""

    rank: int
    ranks: int
    local_rank: int
    """Rank among the processes of this machine: the number of its GPU."""
    local_ranks: int


def launch() -> Launch:
    """What torchrun or SLURM's srun says in the environment; one process without them."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        ranks = int(env["WORLD_SIZE"])
        return Launch(
            int(env["RANK"]),
            ranks,
            int(env.get("LOCAL_RANK", 0)),
            int(env.get("LOCAL_WORLD_SIZE", ranks)),
        )
    # The number of tasks of this *step*: a shell inside an allocation (salloc, sbatch) is one task.
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        ranks = int(env["SLURM_STEP_NUM_TASKS"])
        return Launch(
            int(env["SLURM_PROCID"]),
            ranks,
            int(env["SLURM_LOCALID"]),
            # "4(x2),3": as many on the first two nodes, 3 on the third; the largest is what a node can hold
            max(int(n) for n in re.findall(r"(?:^|,)(\d+)", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))),
        )
    return Launch(0, 1, 0, 1)


def first_host(nodes: str) -> str:
    """The first host of a SLURM list: `a[007-010,12],b3` gives `a007`."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,]*)", nodes)
    if not found:
        raise ValueError(f"SLURM's list of nodes is {nodes!r}: set MASTER_ADDR to the first of them")
    return found[1] + (found[2] or "") + found[3]


def rank() -> int:
    """Rank of this process; 0 if it is the only one."""
    return dist.get_rank() if world_size() > 1 else 0


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
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
def process_group(name: str, parallel: str = "auto") -> Iterator[torch.device]:
    """The device that --device names, with the ranks that were launched together joined meanwhile.

    One rank alone joins itself where torchrun launched it and --parallel asks for a way of several: so the
    code of many GPUs can be tried on one.

    Raises:
        ValueError: a device that is not there, or the same one for several ranks.
    """
    here = launch()
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
        store = dist.PrefixStore(_start_id(store, here.rank, here.ranks), store)
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


def _start_id(store: Any, rank: int, ranks: int) -> str:
    """An identifier that the ranks of this start share, and the ranks of no start before it have.

    torchrun keeps its store when it starts the ranks anew, with the addresses of the dead in it, and gloo and
    NCCL call those (pytorch issue 135712; its count of restarts differs between nodes). So each rank asks
    rank 0 with an identifier of its own, which no answer to another start can fit.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"fastdino/asks/{rank}", own)
        start_id = store.get(f"fastdino/answer/{own}").decode()
        store.add(f"fastdino/heard/{start_id}", 1)
        return start_id
    answered: set[bytes] = set()
    deadline = time.monotonic() + store.timeout.total_seconds()
    while store.add(f"fastdino/heard/{own}", 0) < ranks - 1:
        if time.monotonic() > deadline:
            raise RuntimeError(f"not all of the {ranks} ranks came within {store.timeout}")
        for other in range(1, ranks):
            if store.check([f"fastdino/asks/{other}"]):
                asked = store.get(f"fastdino/asks/{other}")
                if asked not in answered:
                    store.set(f"fastdino/answer/{asked.decode()}", own)
                    answered.add(asked)
        time.sleep(0.02)
    return own


def gather(value: T) -> list[T]:
    """Every rank's `value`, pickled, in the order of ranks, on all of them."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=cpu_group())
    return values


_groups: dict[Any, Any] = {}


def cpu_group(name: str = "") -> Any:
    """A group of all ranks over gloo, by name; made at its first use, which all ranks share."""
    if world_size() == 1:
        return None
    key = (dist.group.WORLD, name)
    if key not in _groups:
        _groups[key] = dist.new_group(backend="gloo")
    return _groups[key]


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """An exception within, on one rank, is raised on all: on the others as OtherRankFailed."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        if world_size() == 1:
            raise
        error = caught
    failed = [i for i, message in enumerate(gather(error and str(error))) if message is not None]
    if failed and rank() == failed[0]:
        assert error is not None
        raise error
    if failed:
        raise OtherRankFailed(f"rank {failed[0]} failed")


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 only; all ranks return its value, or raise where it raises."""
    value: Any = None
    with raise_on_all_ranks():
        if rank() == 0:
            value = work()
    return value if world_size() == 1 else gather(value)[0]


def all_reduce_mean_async(x: Tensor) -> Callable[[], Tensor]:
    """Begin to replace `x` (same shape on all ranks) by its mean over them; call the result to have it.

    What runs between the two hides the communication. On a GPU neither waits for the device.
    """
    if world_size() == 1:
        return lambda: x
    work = dist.all_reduce(x, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return x.div_(world_size())

    return finish


def mean_over_ranks_(x: Tensor) -> Tensor:
    """Replace `x` (same shape on all ranks) by its mean over the default process group, if there is one."""
    return all_reduce_mean_async(x)()


def is_sharded(x: Tensor) -> bool:
    """Whether `x` is a DTensor, of which this rank has a part."""
    return hasattr(x, "device_mesh")


def local(x: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def full_tensor(x: Tensor) -> Tensor:
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
    for dim, placement in enumerate(first.placements):  # type: ignore[attr-defined]
        if placement.is_shard():  # not the replicas of HSDP
            dist.all_reduce(squares, group=mesh.get_group(dim))
    return squares.sqrt_()
