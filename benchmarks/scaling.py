"""Predicts how DINO scales over GPUs: what a step computes, sends, reads and saves. Measures nothing.

    python -m benchmarks.scaling [--archs vit_small ...] [--batch 64] [--peak 790] [--link 450] [--network 50]

Counted exactly, from the networks themselves: parameters, model FLOPs, bytes that each rank sends (the tests
compare them with what processes really send), bytes of a checkpoint. Assumed, and therefore flags: the share
of the matrix-product rate that the networks reach, speeds of memory, links and network, latency, the size of
an image's file. The prediction adds them up:

    compute    model FLOPs / (peak x utilisation), then optimiser and teacher update at the speed of memory
    sent       what a rank sends over the slowest link on its way, and a latency for each collective
    exposed    what of that does not fit behind the computation that it can hide behind: reductions behind the
               student's backward pass (half of the FLOPs), gathers behind all of it
    efficiency compute / (compute + exposed), for the same images a GPU on every scale

An upper bound: links reach their speed, no rank waits for a slower one, sending takes nothing from computing.

DDP reduces gradients of 4 bytes a parameter, once an update. FSDP2 gathers bf16 parameters of the student
(forward, and its blocks again backward) and of the teacher, and reduces float32 gradients. HSDP does that
within a node, and reduces each rank's share of the gradients between nodes. All send the centre: K numbers.
"""

import argparse
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.step import model_flops
from fastdino.config import Config, ModelConfig
from fastdino.dino import DINO

SCALES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
KINDS = ("ddp", "fsdp", "hsdp")


class Sizes(NamedTuple):
    """Parameters of one network, as FSDP2 groups them; the teacher has the same."""

    blocks: list[list[nn.Parameter]]
    rest: list[nn.Parameter]
    """Head, embeddings, class token, last norm."""
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


def sizes(arch: str, patch: int) -> Sizes:
    """The parameters of DINO's student (or teacher) with the official head."""
    config = Config(model=ModelConfig(arch=arch, patch_size=patch))
    with torch.device("meta"):
        return sizes_of(DINO(config).student)


def sizes_of(network: Any) -> Sizes:
    """The parameters of a network of backbone and head."""
    blocks = [list(block.parameters()) for block in network.backbone.blocks]
    known = {id(p) for block in blocks for p in block}
    rest = [p for p in network.parameters() if id(p) not in known]
    return Sizes(blocks, rest, len(network.head.last_layer.weight_g))


class Sent(NamedTuple):
    """Bytes that one rank sends in an update, and in how many collectives."""

    reduce: float
    """Gradients within the node, or over all ranks."""
    gather: float
    """Parameters within the node, or over all ranks."""
    between: float
    """Gradients between nodes, of HSDP."""
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
        scatter: what a reduce-scatter sends, in those of a ring: 2 where it is made of an all-reduce (gloo).
    """

    def ring(n: int) -> float:  # of what a gather or a scatter over n ranks moves, each rank sends this share
        return (n - 1) / n

    center = 2 * ring(ranks) * 4 * (size.prototypes + 4)
    trained = count(size.trained)
    if ranks == 1:
        return Sent(0, 0, 0, 0, 0)
    if kind == "ddp":
        buckets = max(1, round(4 * trained / 25e6))
        return Sent(2 * ring(ranks) * 4 * trained, 0, 0, center, buckets + 1)
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


class Step(NamedTuple):
    """A predicted update, in seconds."""

    compute: float
    exposed: float

    @property
    def total(self) -> float:
        """Seconds of an update."""
        return self.compute + self.exposed

    @property
    def efficiency(self) -> float:
        """Of ideal scaling."""
        return self.compute / self.total


def predict(kind: str, size: Sizes, flops: float, ranks: int, args: argparse.Namespace) -> Step:
    """The update of `flops` model FLOPs a rank at `ranks` ranks."""
    networks = flops / (args.peak * 1e12 * args.utilisation)
    # AdamW reads and writes 28 bytes a parameter, the teacher's update 12
    share = 1 if kind == "ddp" else ranks if kind == "fsdp" else min(args.per_node, ranks)
    compute = networks + 40 * size.total / share / (args.memory * 1e9)
    its = sent(kind, size, ranks, args.per_node)
    inside = ranks <= args.per_node
    link, network = args.link * 1e9, args.network * 1e9
    within = link if inside or kind == "hsdp" else network
    latency = its.collectives * args.latency * 1e-6 * math.log2(max(ranks, 2))
    reductions = its.reduce / within + its.between / network
    gathers = (its.gather + its.center) / within + latency
    backward = networks / 2  # student 1 + 2, teacher 1
    exposed = max(0.0, reductions - backward) + max(0.0, gathers - max(0.0, networks - reductions))
    return Step(compute, exposed if ranks > 1 else 0.0)


def checkpoint_bytes(size: Sizes) -> tuple[int, int]:
    """Bytes of a checkpoint, student, teacher and two moments in float32, and of teacher.safetensors."""
    return 4 * (2 * size.total + 2 * count(size.trained)), 4 * size.total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archs", nargs="*", default=["vit_small", "vit_base", "vit_large", "vit_giant"])
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64, help="images a GPU in an update")
    parser.add_argument("--peak", type=float, default=790, help="TFLOP/s of bf16 matrix products")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of that the networks reach")
    parser.add_argument("--memory", type=float, default=4300, help="GB/s of the GPU's memory")
    parser.add_argument("--link", type=float, default=450, help="GB/s a GPU sends within a node")
    parser.add_argument("--network", type=float, default=50, help="GB/s a GPU sends between nodes")
    parser.add_argument("--latency", type=float, default=10, help="us a collective, times log2 of the ranks")
    parser.add_argument("--per-node", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--image-kb", type=float, default=110, help="of an image's file")
    parser.add_argument("--scales", type=int, nargs="*", default=SCALES, help="numbers of GPUs")
    args = parser.parse_args()
    console = Console(width=max(110, Console().width))
    console.print(
        f"Predicted, not measured: {args.batch} images a GPU, patch {args.patch}, 2 x 224 and 8 x 96 "
        f"pixels, 65536 prototypes; {args.peak:g} TFLOP/s at {args.utilisation:.0%}, memory {args.memory:g} "
        f"GB/s, links {args.link:g} GB/s in nodes of {args.per_node}, {args.network:g} GB/s between, "
        f"{args.latency:g} us.",
        soft_wrap=True,
    )
    for arch in args.archs:
        size = sizes(arch, args.patch)
        head = count(p for p in size.rest if p.ndim == 2)
        # ten crops through the student's head, forward and twice backward, two through the teacher's
        flops = model_flops(arch, args.patch, args.batch) + args.batch * 2 * head * (3 * 10 + 2)
        whole, teacher = checkpoint_bytes(size)
        table = Table(
            title=f"{arch}/{args.patch}: {size.total / 1e6:.0f} M parameters with head, "
            f"{flops / args.batch / 1e9:.0f} GFLOP an image, checkpoint {whole / 1e9:.2f} GB, teacher "
            f"{teacher / 1e9:.2f} GB",
            title_justify="left",
        )
        columns = ["GPUs", "compute ms", *(f"{kind} {what}" for kind in KINDS for what in ("MB", "eff."))]
        for name in (*columns, "images/s", "read GB/s"):
            table.add_column(name, justify="right")
        for ranks in args.scales:
            steps = {kind: predict(kind, size, flops, ranks, args) for kind in KINDS}
            rate = ranks * args.batch / min(step.total for step in steps.values())
            cells = [
                cell
                for kind, step in steps.items()
                for cell in (
                    f"{sent(kind, size, ranks, args.per_node).total / 1e6:.0f}",
                    f"{step.efficiency:.0%}",
                )
            ]
            table.add_row(
                str(ranks),
                f"{steps['ddp'].compute * 1e3:.1f}",
                *cells,
                f"{rate:,.0f}",
                f"{rate * args.image_kb * 1e3 / 1e9:.2f}",
            )
        console.print(table)
    console.print(
        "MB: sent by each GPU in an update. eff.: of ideal scaling. images/s and what must be read for them: "
        "of the best of the three.",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
