"""`fastdino.Update` in several processes on random crops: what it sends, saves and waits for.

    python -m benchmarks.distributed [--ranks 1 2] [--arch vit_tiny] [--images 8] [--no-compile] [--out DIR]

One process without a group, DDP and FSDP2, each with and without torch.compile. An update has N images for
all ranks: of two each does half the work, with half the cores.

    images/s        of three rounds of updates, after two to warm up
    sent MB         by each rank in an update: the loopback interface's bytes, where ranks talk over it
    counted MB      the same by counting the parameters; the tests hold one to the other
    save ms         for which a checkpoint stops the training; on disk ms: until it is whole there
    resume ms       to read it back
    waits           places in an update that wait for the device; peak MB: of rank 0
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness import ROOT, Results, Row, parser, spread, synchronize, table
from benchmarks.update import Problem, settings_of
from fastdino import checkpoint, distributed
from fastdino.dino import DINO
from fastdino.update import Update
from tests.helpers.counting import CountSyncs, loopback_bytes


def work(path: Path) -> None:
    """One rank of one job: torchrun starts it."""
    job: Row = json.loads(path.read_text())
    problem = Problem(**job["problem"])
    with distributed.process_group(job["device"], job["parallel"]) as device:
        config = problem.config(parallel=job["parallel"], compile=job["compile"], device=job["device"])
        update, settings = Update(config, device), settings_of(config)
        crops = problem.crops(problem.images // job["ranks"], device)

        def make(count: int) -> tuple[float, float]:
            """Images/s, and bytes sent in an update."""
            distributed.gather(None)
            before, began = loopback_bytes(), time.perf_counter()
            for _ in range(count):
                update([crops], settings)
            synchronize(device)
            seconds = time.perf_counter() - began
            distributed.gather(None)
            return count * problem.images / seconds, (loopback_bytes() - before) / count

        make(2)
        rates, sent = zip(*(make(job["updates"]) for _ in range(3)), strict=True)
        with CountSyncs(device.type) as counter:
            update([crops], settings)
        row: Row = {"images/s": spread(rates), "sent MB": None, "bytes": update.dtype.itemsize}
        if job["ranks"] > 1 and device.type == "cpu":
            row["sent MB"] = min(sent) / job["ranks"] / 1e6  # other programs can only add
        with closing(checkpoint.Saver(path.parent)) as saver:
            began = time.perf_counter()
            saver.save(1, update.tensors(), {})
            row["save ms"] = 1e3 * (time.perf_counter() - began)
            if error := saver.finish():
                raise SystemExit(error)
            row["on disk ms"] = 1e3 * (time.perf_counter() - began)
        began = time.perf_counter()
        checkpoint.load_newest(path.parent, update.tensors())
        row |= {"resume ms": 1e3 * (time.perf_counter() - began), "waits": counter.count}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        row["peak MB"] = (torch.cuda.max_memory_allocated() if device.type == "cuda" else peak) / 1e6
        if distributed.rank() == 0:
            (path.parent / "row.json").write_text(json.dumps(row))


def measure(job: Row) -> Row:
    """Run a job under torchrun, or as one process; its row."""
    ranks, command = job["ranks"], [sys.executable]
    if job["parallel"] != "auto":
        command += ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        command += [f"--nproc-per-node={ranks}"]
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    env = os.environ | {"OMP_NUM_THREADS": threads, "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as where:
        path = Path(where, "job.json")
        path.write_text(json.dumps(job))
        command += ["-m", "benchmarks.distributed", "--job", str(path)]
        subprocess.run(command, cwd=ROOT, env=env, check=True)
        row = json.loads(Path(where, "row.json").read_text())
    counted = None
    if row["sent MB"] is not None:
        with torch.device("meta"):
            student = DINO(Problem(**job["problem"]).config()).student
        counted = bytes_sent(job["parallel"], student, ranks, ranks, row["bytes"]) / 1e6
    name = f"{ranks}, {job['parallel'].replace('auto', 'plain')}" + ", compiled" * (job["compile"] == "on")
    return {"ranks, way": name} | row | {"counted MB": counted}


def bytes_sent(kind: str, student: Any, ranks: int, per_node: int, parameter_bytes: int) -> float:
    """Bytes that a rank sends in an update over gloo's rings, of ddp, fsdp or hsdp (per_node ranks a shard).

    DDP reduces gradients of 4 bytes a parameter. FSDP2 gathers the student's parameters of `parameter_bytes`
    (forward, and its blocks again backward) and the teacher's, and reduces float32 gradients; HSDP does that
    within a node, and reduces each rank's share of the gradients between nodes. All send the centre.
    """

    def ring(n: int) -> float:  # the share of a gather or a scatter over n ranks that each rank sends
        return (n - 1) / n

    def count(parameters: Iterable[nn.Parameter], shards: int) -> int:
        """In all shards together: FSDP2 cuts the first dimension and fills up what does not divide."""
        return sum(shards * math.ceil(len(p) / shards) * (p.numel() // len(p)) for p in parameters)

    trained = [p for p in student.parameters() if p.requires_grad]
    center = 2 * ring(ranks) * 4 * (len(student.head.last_layer.weight_g) + 4)
    if kind == "ddp":
        return center + 2 * ring(ranks) * 4 * count(trained, 1)
    shards = ranks if kind == "fsdp" else min(per_node, ranks)
    gathered = 2 * count(student.parameters(), shards) + count(student.backbone.blocks.parameters(), shards)
    reduced = 4 * count(trained, shards)
    # gloo makes its reduce-scatter of an all-reduce
    within = ring(shards) * (2 * reduced + parameter_bytes * gathered)
    return center + within + 2 * ring(ranks // shards) * reduced / shards


def text(rows: list[Row]) -> str:
    """All that was measured."""
    names = ("images/s", "sent MB", "counted MB", "save ms", "on disk ms", "resume ms", "waits", "peak MB")
    lines = [(row["ranks, way"], {name: row[name] for name in names}) for row in rows]
    return table("Measured", "ranks, way", lines)


def main() -> None:
    """See the module's docstring."""
    arguments, cuda = parser(__doc__, "distributed"), torch.cuda.is_available()
    add = arguments.add_argument
    add("--ranks", type=int, nargs="*", help="default: 1 2 on a CPU, 1 to all GPUs")
    add("--arch", default="vit_small" if cuda else "vit_tiny")
    add("--patch", type=int, default=16)
    add("--images", type=int, default=128 if cuda else 8, help="an update, of all ranks")
    add("--updates", type=int, default=4, help="of each of three rounds")
    add("--small", action="store_true", help="crops of 32 and 16 pixels, to try it out")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add("--job", type=Path, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.job:
        return work(args.job)
    sizes = (32, 16) if args.small else (224, 96)
    problem = asdict(Problem(args.arch, args.patch, args.images, sizes))
    shared = {"problem": problem, "device": args.device, "updates": args.updates}
    results = Results("Updates in several processes", text, args)
    for ranks in args.ranks or ([1, *range(2, torch.cuda.device_count() + 1)] if cuda else [1, 2]):
        for parallel in (["auto"] if ranks == 1 else []) + ["ddp", "fsdp"]:
            for compile_ in ["off", "on"] if args.compile else ["off"]:
                ways = {"ranks": ranks, "parallel": parallel, "compile": compile_}
                results.add([measure(shared | ways)])


if __name__ == "__main__":
    main()
