"""What several processes run in the tests: `torchrun ... ranks.py FILE`, with a list of jobs as JSON in FILE.

A job is the keywords of tiny.make_config and what is to go wrong: `stop` {rank, step}: that rank gets SIGTERM
in that update; `kill` {rank, step, when}: it dies of SIGKILL, once, in the "update", about to "write" the
checkpoint of that step or, rank 0, to "rename" it; `raise` {rank, step}: it raises; `full` {rank, bytes}: its
files cannot grow beyond so many bytes. `batch_norm` and `draws`: see the functions of these names.
"""

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from counting import loopback_bytes
from faults import ScaleOne, feed_that_calls
from tiny import make_config
from torch.distributed.checkpoint import filesystem

from fastdino import checkpoint, data, distributed, train, vit
from fastdino.data.feed import Feed
from fastdino.sync_batch_norm import synchronize_batch_norm

# Of the processes: this folder and the checkout.
PYTHONPATH = os.pathsep.join(str(path) for path in (Path(__file__).parent, Path(__file__).parents[2]))


def start(jobs: list[dict[str, Any]], folder: Path, ranks: int, *options: str, **env: str) -> Any:
    """Begin to run `jobs` in so many processes: the torchrun, its stdout and stderr pipes of text."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs, default=str))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.Popen(
        [*command, *options, __file__, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH} | env,
    )


def launch(jobs: list[dict[str, Any]], folder: Path, ranks: int, *options: str, **env: str) -> Any:
    """Run `jobs` in so many processes; the finished torchrun with its returncode, stdout and stderr."""
    process = start(jobs, folder, ranks, *options, **env)
    try:
        out, error = process.communicate(timeout=900)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def once(marker: Path) -> bool:
    """Whether this is the first time."""
    if marker.exists():
        return False
    marker.touch()
    return True


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def prepare(job: dict[str, Any], rank: int) -> type[Feed]:
    """Have go wrong what `job` says; returns the feed of the run."""
    out, feed = Path(job["out"]), Feed

    def mine(name: str) -> Any:
        what = job.pop(name, None)
        return what if what and what["rank"] == rank else None

    if what := mine("stop"):
        feed = feed_that_calls(lambda: os.kill(os.getpid(), signal.SIGTERM), what["step"])
    if what := mine("raise"):

        def fail() -> None:
            raise RuntimeError("something broke here")

        feed = feed_that_calls(fail, what["step"])
    if what := mine("full"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (what["bytes"], what["bytes"]))
    if (what := mine("kill")) and once(out.with_name(f"{out.name}.killed")):
        if what["when"] == "update":
            feed = feed_that_calls(die, what["step"])
        elif what["when"] == "write":
            write = filesystem.FileSystemWriter.write_data

            def write_data(self: Any, *args: Any) -> Any:
                if f".step_{what['step']}.tmp" in str(self.path):
                    (Path(self.path) / "__half__.distcp").write_bytes(b"half")
                    die()
                return write(self, *args)

            filesystem.FileSystemWriter.write_data = write_data  # type: ignore[method-assign]
        else:
            sync = checkpoint.sync

            def before_rename(path: Path) -> None:
                if path.name == f".step_{what['step']}.tmp":
                    die()
                sync(path)

            checkpoint.sync = before_rename
    return feed


def keep_draws(folder: Path, rank: int) -> None:
    """Write down what this rank draws: crops by (epoch, index), and orders of stochastic depth."""
    seen: list[Any] = []
    kept, items = vit.draw_drop_path, data.Crops.__getitems__

    def draw_drop_path(images: int, rates: Any) -> Any:
        drawn = kept(images, rates)
        seen.append(drawn[0].flatten().tolist())
        return drawn

    def getitems(self: Any, wanted: Any) -> Any:
        seen.append(wanted)
        return items(self, wanted)

    def write() -> None:
        (folder / f"draws_{rank}.json").write_text(json.dumps(seen))

    vit.draw_drop_path, data.Crops.__getitems__ = draw_drop_path, getitems
    atexit.register(write)


def batch_norm(folder: Path) -> None:
    """Batch norm in step, forward and backward, on this rank's share of a batch; rank 0 writes it down."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    results = {}
    for shape in ((6, 5), (6, 3, 4, 2)):
        x, upstream = (torch.randn(shape, generator=generator) * 3 + 100 for _ in range(2))
        norm = torch.nn.BatchNorm1d(shape[1]) if len(shape) == 2 else torch.nn.BatchNorm2d(shape[1])
        synchronize_batch_norm(norm, torch.device("cpu"))
        mine = x.chunk(ranks)[rank].clone().requires_grad_()
        norm(mine).backward(upstream.chunk(ranks)[rank])
        parts = distributed.gather((norm(mine).detach(), mine.grad))
        gradient = sum(distributed.gather(norm.weight.grad))
        results[str(len(shape))] = {
            "out": torch.cat([out for out, _ in parts]),
            "grad": torch.cat([grad for _, grad in parts]),
            "weight_grad": gradient,
            "mean": norm.running_mean,
            "var": norm.running_var,
        }
    if rank == 0:
        torch.save(results, folder / "batch_norm.pt")


def main() -> None:
    """All jobs of the file, one after the other, in one process group."""
    with distributed.process_group("cpu"):
        run()


def run() -> None:
    """All jobs of the file; writes down the bytes sent during each."""
    sent: list[int] = []
    if "LOCAL_RANKS" in os.environ:
        os.environ["LOCAL_WORLD_SIZE"] = os.environ["LOCAL_RANKS"]
    place = distributed.launch()
    path = Path(sys.argv[1])
    for job in json.loads(path.read_text()):
        if job.pop("batch_norm", False):
            batch_norm(path.parent)
            continue
        if job.pop("draws", False):
            keep_draws(path.parent, place.rank)
        feed = prepare(job, place.rank)
        config = make_config(Path(job.pop("images")), Path(job.pop("out")), **job)
        dist.barrier()
        before = loopback_bytes()
        # at the scale that fp16 begins with, all these updates overflow
        train.command(config, feed_type=feed, update_type=ScaleOne)
        dist.barrier()
        sent.append(loopback_bytes() - before)
        if place.rank == 0:
            (path.parent / "sent.json").write_text(json.dumps(sent))


if __name__ == "__main__":
    main()
