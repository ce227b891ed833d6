"""`fastdino.Update` in several processes: measured beside the counted bytes, and predicted for many GPUs.

    python -m benchmarks.distributed [--ranks 1 2] [--arch vit_tiny] [--predict vit_small ...] [--peak 790]

Measured under torchrun on random crops: one process without a group, DDP and FSDP2, each with and without
torch.compile. An update has N images for all ranks: of two each does half the work, with half the cores.

    images/s        of three rounds of updates, after two to warm up
    sent MB         by each rank in an update: the loopback interface's bytes, where ranks talk over it
    counted MB      the same by counting the parameters; the tests hold one to the other
    save ms         for which a checkpoint stops the training; on disk ms: until it is whole there
    resume ms       to read it back
    waits           places in an update that wait for the device; peak MB: of rank 0

Predicted, for the networks of --predict, from parameters, model FLOPs and bytes, which are counted exactly,
and from the flags: the share of the matrix-product rate that networks reach, speeds of memory and links.

    compute    model FLOPs / (peak x utilisation), then optimiser and teacher update at the speed of memory
    eff.       compute / (compute + exposed), at the same images a GPU. exposed: the sent bytes over the
               slowest link on their way, and a latency for each collective, less what fits behind computing:
               reductions behind the student's backward pass (half of the FLOPs), gathers behind all of it

An upper bound: links reach their speed, no rank waits for a slower one, sending takes nothing from computing.
DDP reduces gradients of 4 bytes a parameter, once an update. FSDP2 gathers bf16 parameters of the student
(forward, and its blocks again backward) and of the teacher, and reduces float32 gradients. HSDP does that
within a node, and reduces each rank's share of the gradients between nodes. All send the centre: K numbers.
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
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.harness import ROOT, Results, Row, parser, spread, synchronize, table
from benchmarks.update import Problem, model_flops, settings_of
from fastdino import checkpoint, distributed
from fastdino.dino import DINO
from fastdino.update import Update
from tests.helpers.counting import CountSyncs, loopback_bytes

SCALES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
KINDS = ("ddp", "fsdp", "hsdp")


# Measured.


def work(path: Path) -> None:
    """One rank of one job: torchrun starts it."""
    job: Row = json.loads(path.read_text())
    problem, updates = Problem(**job["problem"]), job["updates"]
    with distributed.process_group(job["device"], job["parallel"]) as device:
        run = {"parallel": job["parallel"], "compile": job["compile"], "device": job["device"]}
        config = problem.config(**run)
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
        rates, sent = zip(*(make(updates) for _ in range(3)), strict=True)
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
    ranks = job["ranks"]
    with tempfile.TemporaryDirectory() as where:
        path = Path(where, "job.json")
        path.write_text(json.dumps(job))
        command = [sys.executable]
        if job["parallel"] != "auto":
            command += ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
            command += [f"--nproc-per-node={ranks}"]
        threads = str(max(1, (os.cpu_count() or 1) // ranks))
        env = os.environ | {"OMP_NUM_THREADS": threads, "GLOO_SOCKET_IFNAME": "lo"}
        command += ["-m", "benchmarks.distributed", "--job", str(path)]
        subprocess.run(command, cwd=ROOT, env=env, check=True)
        row = json.loads(Path(where, "row.json").read_text())
    with torch.device("meta"):
        size = sizes_of(DINO(Problem(**job["problem"]).config()).student)
    counted = None
    if row["sent MB"] is not None:
        # gloo makes its reduce-scatter of an all-reduce; parameters are gathered as autocast computes
        options = {"parameter_bytes": row["bytes"], "scatter": 2}
        counted = sent(job["parallel"], size, ranks, ranks, **options).total / 1e6
    name = f"{ranks}, {job['parallel'].replace('auto', 'plain')}" + ", compiled" * (job["compile"] == "on")
    return {"ranks, way": name} | row | {"counted MB": counted}


# Counted.


class Sizes(NamedTuple):
    """Parameters of one network, as FSDP2 groups them; the teacher has the same."""

    blocks: list[list[nn.Parameter]]
    rest: list[nn.Parameter]  # head, embeddings, class token, last norm
    prototypes: int

    @property
    def all(self) -> list[nn.Parameter]:
        """Blocks and rest."""
        return [p for block in self.blocks for p in block] + self.rest

    @property
    def total(self) -> int:
        """Numbers in all of them."""
        return count(self.all)

    @property
    def trained(self) -> list[nn.Parameter]:
        """Those with a gradient: without the prototypes' lengths."""
        return [p for p in self.all if p.requires_grad]


def count(parameters: Iterable[nn.Parameter], shards: int = 1) -> int:
    """Numbers in all shards together: FSDP2 cuts the first dimension and fills up what does not divide."""
    return sum(shards * math.ceil(len(p) / shards) * (p.numel() // len(p)) for p in parameters)


def sizes_of(network: Any) -> Sizes:
    """The parameters of a network of backbone and head."""
    blocks = [list(block.parameters()) for block in network.backbone.blocks]
    known = {id(p) for block in blocks for p in block}
    rest = [p for p in network.parameters() if id(p) not in known]
    return Sizes(blocks, rest, len(network.head.last_layer.weight_g))


class Sent(NamedTuple):
    """Bytes that one rank sends in an update, and in how many collectives."""

    reduce: float  # gradients within the node, or over all ranks
    gather: float  # parameters within the node, or over all ranks
    between: float  # gradients between nodes, of HSDP
    center: float
    collectives: int

    @property
    def total(self) -> float:
        """All of them."""
        return self.reduce + self.gather + self.between + self.center


def sent(
    kind: str, size: Sizes, ranks: int, per_node: int, *, parameter_bytes: int = 2, scatter: float = 1.0
) -> Sent:
    """Bytes that a rank sends in an update over ring algorithms.

    Args:
        parameter_bytes: of a gathered parameter: 2 in bf16, 4 in float32.
        scatter: bytes of a reduce-scatter, in those of a ring: 2 where it is made of an all-reduce (gloo).
    """

    def ring(n: int) -> float:  # the share of a gather or a scatter over n ranks that each rank sends
        return (n - 1) / n

    center = 2 * ring(ranks) * 4 * (size.prototypes + 4)
    trained = count(size.trained)
    if ranks == 1:
        return Sent(0, 0, 0, 0, 0)
    if kind == "ddp":
        return Sent(2 * ring(ranks) * 4 * trained, 0, 0, center, max(1, round(4 * trained / 25e6)) + 1)
    shards = ranks if kind == "fsdp" else min(per_node, ranks)
    nodes = ranks // shards
    # The student's blocks are gathered forward and backward; all else of both networks once.
    gathered = 2 * count(size.all, shards) + sum(count(block, shards) for block in size.blocks)
    reduced = count(size.trained, shards)
    return Sent(
        scatter * ring(shards) * 4 * reduced,
        ring(shards) * parameter_bytes * gathered,
        2 * ring(nodes) * 4 * reduced / shards,
        center,
        4 * len(size.blocks) + 6 + (len(size.blocks) + 2) * (nodes > 1) + 2,
    )


def checkpoint_bytes(size: Sizes) -> tuple[int, int]:
    """Bytes of a checkpoint, student, teacher and two moments in float32, and of teacher.safetensors."""
    return 4 * (2 * size.total + 2 * count(size.trained)), 4 * size.total


# Predicted.


def predict(
    kind: str, size: Sizes, flops: float, ranks: int, args: argparse.Namespace
) -> tuple[float, float]:
    """Seconds of an update of `flops` model FLOPs a rank: computing, and exposed sending."""
    networks = flops / (args.peak * 1e12 * args.utilisation)
    # AdamW reads and writes 28 bytes a parameter, the teacher's update 12
    shards = 1 if kind == "ddp" else ranks if kind == "fsdp" else min(args.per_node, ranks)
    compute = networks + 40 * size.total / shards / (args.memory * 1e9)
    if ranks == 1:
        return compute, 0.0
    found = sent(kind, size, ranks, args.per_node)
    link, network = args.link * 1e9, args.network * 1e9
    within = link if ranks <= args.per_node or kind == "hsdp" else network
    latency = found.collectives * args.latency * 1e-6 * math.log2(ranks)
    reductions = found.reduce / within + found.between / network
    gathers = (found.gather + found.center) / within + latency
    exposed = max(0.0, reductions - networks / 2)  # student 1 + 2, teacher 1
    return compute, exposed + max(0.0, gathers - max(0.0, networks - reductions))


def predictions(args: argparse.Namespace) -> str:
    """A table for each network."""
    flags = ("batch", "peak", "utilisation", "memory", "link", "network", "latency", "per_node", "image_kb")
    assumed = ", ".join(f"{name} {getattr(args, name):g}" for name in flags)
    out = [f"\nPredicted, not measured: 2 x 224 and 8 x 96 pixels, 65536 prototypes, {assumed} (--help)"]
    for arch in args.predict:
        problem = Problem(arch, args.patch, args.batch)
        flops = model_flops(problem) * args.batch
        with torch.device("meta"):
            size = sizes_of(DINO(problem.config()).student)
        whole, teacher = checkpoint_bytes(size)
        cells = []
        for ranks in args.scales:
            times = {kind: predict(kind, size, flops, ranks, args) for kind in KINDS}
            rate = ranks * args.batch / min(map(sum, times.values()))
            row: Row = {"compute ms": f"{1e3 * times['ddp'][0]:.1f}"}
            for kind, (compute, exposed) in times.items():
                row[f"{kind} MB"] = f"{sent(kind, size, ranks, args.per_node).total / 1e6:.0f}"
                row[f"{kind} eff."] = f"{compute / (compute + exposed):.0%}"
            cells.append(row | {"images/s": f"{rate:,.0f}", "GB/s": f"{rate * args.image_kb / 1e6:.2f}"})
        title = f"{problem.name}: {size.total / 1e6:.0f} M parameters with head, "
        title += f"{flops / args.batch / 1e9:.0f} GFLOP an image, "
        title += f"checkpoint {whole / 1e9:.2f} GB, teacher {teacher / 1e9:.2f} GB"
        out.append(table(title, [{"GPUs": str(n)} for n in args.scales], "GPUs", cells))
    return "\n".join(out)


def text(rows: list[Row]) -> str:
    """All that was measured."""
    names = ("images/s", "sent MB", "counted MB", "save ms", "on disk ms", "resume ms", "waits", "peak MB")
    return table("Measured", rows, "ranks, way", [{name: row[name] for name in names} for row in rows])


def main() -> None:
    """See the module's docstring."""
    arguments, cuda = parser(__doc__, "distributed"), torch.cuda.is_available()
    add = arguments.add_argument
    add("--ranks", type=int, nargs="*", help="default: 1 2 on a CPU, 1 to all GPUs; none: only predict")
    add("--arch", default="vit_small" if cuda else "vit_tiny", help="to measure")
    add("--images", type=int, default=128 if cuda else 8, help="an update, of all ranks")
    add("--updates", type=int, default=4, help="of each of three rounds")
    add("--small", action="store_true", help="crops of 32 and 16 pixels, to try it out")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add("--predict", nargs="*", default=["vit_small", "vit_base", "vit_large", "vit_giant"], metavar="ARCH")
    add("--patch", type=int, default=16)
    add("--batch", type=int, default=64, help="images a GPU in an update")
    add("--peak", type=float, default=790, help="TFLOP/s of bf16 matrix products")
    add("--utilisation", type=float, default=0.4, help="share of that the networks reach")
    add("--memory", type=float, default=4300, help="GB/s of the GPU's memory")
    add("--link", type=float, default=450, help="GB/s a GPU sends within a node")
    add("--network", type=float, default=50, help="GB/s a GPU sends between nodes")
    add("--latency", type=float, default=10, help="us a collective, times log2 of the ranks")
    add("--per-node", type=int, default=8, help="GPUs of a node")
    add("--image-kb", type=float, default=110, help="of an image's file")
    add("--scales", type=int, nargs="*", default=SCALES, help="numbers of GPUs")
    add("--job", type=Path, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.job:
        return work(args.job)
    counts = [1, *range(2, torch.cuda.device_count() + 1)] if cuda else [1, 2]
    counts = counts if args.ranks is None else args.ranks
    sizes = (32, 16) if args.small else (224, 96)
    problem = asdict(Problem(args.arch, args.patch, args.images, sizes))
    shared = {"problem": problem, "device": args.device, "updates": args.updates}
    if counts:
        results = Results("Updates in several processes", text, args)
    for ranks in counts:
        for parallel in (["auto"] if ranks == 1 else []) + ["ddp", "fsdp"]:
            for compile_ in ["off", "on"] if args.compile else ["off"]:
                ways = {"ranks": ranks, "parallel": parallel, "compile": compile_}
                results.add([measure(shared | ways)])
    if args.predict:
        print(predictions(args))


if __name__ == "__main__":
    main()
