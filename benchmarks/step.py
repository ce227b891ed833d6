"""Times the networks of a DINO step beside one another: student forward and backward, teacher forward.

    python -m benchmarks.step [--device cuda] [--out DIR]

Two global crops of 224 and eight local ones of 96 pixels an image, stochastic depth 0.1 in the student,
random images and upstream gradient; no head, loss or optimiser. Variants, interleaved, each in every
precision:

    official      official DINO's form: softmax(q k^T) v written out, a pass per size of crop, dropped samples
                  computed and multiplied by 0; eager, and compiled as a whole
    timm          timm's ViT where it is installed, a pass per size
    fastdino      a pass per size, and packed with each implementation of attention that runs here; the packed
                  one also compiled per block, as fastdino-train --compile on does it

All begin with the same weights, and nothing is timed unless they give the same features and gradients (timm
for the global crops: it resizes positions otherwise). Model FLOPs count the whole network for every crop, 1
forward for the teacher and 3 for the student, whatever a variant leaves out (dropped samples, patch tokens of
the last block); utilisation is their rate over that of the best matrix product measured in the same run.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Clock, Conditions, Row, Timed, folder, interleave, machine, peak_bytes, write
from fastdino import vit
from fastdino.config import RunConfig
from fastdino.ops import linear
from fastdino.ops.packed_attention import missing
from fastdino.parallel import parallelize

DROP_PATH = 0.1
SIZES = ((2, 224), (8, 96))  # crops an image, pixels


class OfficialBlock(nn.Module):
    """A block of official DINO, written from its formulas, with our block's parameters."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.qkv, self.proj = plain(block.attn.qkv), plain(block.attn.proj)
        self.fc1, self.fc2 = plain(block.mlp.fc1), plain(block.mlp.fc2)
        self.heads, self.drop_rate = block.attn.num_heads, block.drop_rate

    def drop(self, x: Tensor) -> Tensor:
        if self.drop_rate == 0 or not self.training:
            return x
        keep = 1 - self.drop_rate
        mask = (keep + torch.rand(len(x), 1, 1, dtype=x.dtype, device=x.device)).floor()
        return x / keep * mask

    def attend(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (d // self.heads) ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attend(self.norm1(x)))
        return x + self.drop(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


def plain(layer: nn.Linear) -> nn.Linear:
    """The layer as torch's own, with the same parameters."""
    theirs = nn.Linear(1, 1, bias=False)
    theirs.weight, theirs.bias = layer.weight, layer.bias
    return theirs


class Official(nn.Module):
    """Official DINO's ViT over one size of crop."""

    def __init__(self, ours: vit.VisionTransformer) -> None:
        super().__init__()
        self.ours = ours  # patches, positions, last norm
        self.blocks = nn.ModuleList(OfficialBlock(block) for block in ours.blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ours.prepare_tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.ours.norm(x)[:, 0]


class PerSize(nn.Module):
    """A pass for each size of crop."""

    def __init__(self, network: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network

    def forward(self, sizes: list[Tensor]) -> Tensor:
        return torch.cat([self.network(images) for images in sizes])


def timm_vit(ours: vit.VisionTransformer, drop_path_rate: float) -> nn.Module:
    import timm

    network = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=0,
        dynamic_img_size=True,
        drop_path_rate=drop_path_rate,
        patch_size=ours.patch_size,
        embed_dim=ours.embed_dim,
        depth=len(ours.blocks),
        num_heads=ours.num_heads,
    )
    network.load_state_dict(ours.state_dict(), strict=True)
    return network


def networks(arch: str, patch: int, device: torch.device, compiled: bool) -> dict[str, tuple[Any, Any]]:
    """Name to student and teacher, each from a list of batches to features; all with the same weights."""
    torch.manual_seed(0)
    make = partial(getattr(vit, arch), patch)
    first = make()
    with torch.no_grad():
        for parameter in first.parameters():  # far from the start, where attention is flat
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn_like(parameter) * scale)

    def ours(impl: str = "sdpa", compile: str = "off") -> tuple[Any, Any]:
        pair = make(drop_path_rate=DROP_PATH), make()
        for network in pair:
            network.load_state_dict(first.state_dict())
            parallelize(network.to(device), RunConfig(attention=impl, compile=compile), device)  # type: ignore
        return pair

    def per_size(wrap: Callable[[Any], Any]) -> tuple[Any, Any]:
        student, teacher = (PerSize(wrap(network)) for network in ours())
        return student, teacher

    def whole(network: Any) -> nn.Module:
        official = Official(network)
        official.compile(dynamic=False)
        return official

    found = {"official": per_size(Official)}
    if find_spec("timm"):
        found["timm"] = (
            PerSize(timm_vit(first, DROP_PATH).to(device)),
            PerSize(timm_vit(first, 0.0).to(device)),
        )
    found["fastdino, a pass per size"] = per_size(lambda network: network)
    impls = ["sdpa"]
    if device.type == "cuda":
        impls += [impl for impl in ("varlen", "xformers") if not missing(impl)]
    for impl in impls:
        found[f"fastdino, packed, {impl}"] = ours(impl)
    if compiled:
        found["official, compiled"] = per_size(whole)
        for impl in impls:
            if impl != "xformers":  # breaks the graph
                found[f"fastdino, packed, {impl}, compiled"] = ours(impl, "on")
    return found


def model_flops(arch: str, patch: int, images: int) -> float:
    """Multiplications and additions of one step of the whole networks."""
    with torch.device("meta"):
        network = getattr(vit, arch)(patch)
    d, total = network.embed_dim, 0.0
    for crops, pixels in SIZES:
        n = (pixels // patch) ** 2
        forward = 2 * n * 3 * patch**2 * d + len(network.blocks) * (
            24 * (n + 1) * d**2 + 4 * (n + 1) ** 2 * d
        )
        passes = 3 + (pixels == SIZES[0][1])
        total += images * crops * passes * forward
    return total


def matmul_flops(dtype: torch.dtype, device: torch.device, clock: Clock) -> float:
    """The best rate of a matrix product of a ViT's sizes and of a large one, FLOP/s."""
    best = 0.0
    large = 8192 if device.type == "cuda" else 2048
    for m, k, n in ((2760, 384, 1536), (2760, 1536, 384), (large, large, large)):
        x = torch.randn(m, k, device=device, dtype=dtype)
        w = torch.randn(n, k, device=device, dtype=dtype)
        times = interleave({"linear": lambda: linear(x, w)}, clock, 1.0, 20)["linear"]  # noqa: B023
        best = max(best, 2 * m * k * n / min(times) * 1e3)
    return best


def check(variants: dict[str, tuple[Any, Any]], crops: list[Tensor], upstream: Tensor, dtype: str) -> None:
    """All give the features and gradients of the official form, without stochastic depth."""
    expected: dict[int, list[Tensor]] = {}
    for name, (student, _) in variants.items():
        student.eval()
        for sizes in (1,) if name == "timm" else (1, 2):
            count = sum(len(c) for c in crops[:sizes])
            features, gradients = run(student, crops[:sizes], upstream[:count], dtype)
            found = [features, gradients["cls_token"], gradients["blocks.0.norm1.weight"]]
            for a, b in zip(found, expected.setdefault(sizes, found), strict=True):
                error = ((a - b).norm() / b.norm()).item()
                if not error < (1e-3 if dtype == "float32" else 0.1):
                    raise SystemExit(f"{name} in {dtype} is off by {error:.1e}: nothing was timed")
            student.zero_grad(set_to_none=True)
        student.train()


def run(student: Any, crops: list[Tensor], upstream: Tensor, dtype: str) -> tuple[Tensor, dict[str, Tensor]]:
    kind = upstream.device.type
    with torch.autocast(kind, getattr(torch, dtype), enabled=dtype != "float32"):
        features = student(crops)
    features.backward(upstream.to(features.dtype))
    named = {n.rpartition("ours.")[2].removeprefix("network."): p for n, p in student.named_parameters()}
    return features.detach().float(), {n: p.grad.clone() for n, p in named.items() if p.grad is not None}


def bench(arch: str, patch: int, images: int, clock: Clock, device: torch.device, args: Any) -> list[Row]:
    crops = [torch.randn(n * images, 3, pixels, pixels, device=device) for n, pixels in SIZES]
    torch._dynamo.reset()  # past eight shapes a function is no longer compiled, without a word
    variants = networks(arch, patch, device, args.compile)
    width = getattr(vit, arch)(224, img_size=224).embed_dim
    upstream = torch.randn(sum(len(c) for c in crops), width, device=device)
    timed: Timed = {}
    rates = {}
    for dtype in args.dtypes:
        rates[dtype] = matmul_flops(getattr(torch, dtype), device, clock)
        mine = {
            name: pair
            for name, pair in variants.items()
            # official DINO's own choice on a GPU, and no one else's
            if dtype != "float16" or name.startswith("official")
        }
        check(mine, crops, upstream, dtype)
        for name, (student, teacher) in mine.items():

            def step(student: Any = student, teacher: Any = teacher, dtype: str = dtype) -> None:
                with torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
                    with torch.no_grad():
                        teacher(crops[:1])
                    features = student(crops)
                features.backward(upstream.to(features.dtype))
                for parameter in student.parameters():
                    parameter.grad = None

            timed[f"{dtype}: {name}"] = step
    times = interleave(timed, clock, args.seconds, args.rounds)
    flops, rows = model_flops(arch, patch, images), []
    slowest = min(times[f"{args.dtypes[0]}: official"])
    for label, ms in times.items():
        dtype, _, name = label.partition(": ")
        row: Row = {"arch": arch, "patch": patch, "images": images, "dtype": dtype, "variant": name}
        row |= {"min_ms": min(ms), "median_ms": statistics.median(ms), "rounds": len(ms)}
        row |= {"images_per_s": images / min(ms) * 1e3}
        row |= {
            "times_official": min(times[f"{dtype}: official"]) / min(ms),
            f"times_official_{args.dtypes[0]}": slowest / min(ms),
        }
        row |= {"matmul_GFLOP_s": rates[dtype] / 1e9, "utilisation": flops / min(ms) * 1e3 / rates[dtype]}
        row["peak_MB"] = peak_bytes(timed[label], device) / 1e6
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    out: list[str] = []
    for problem in dict.fromkeys((r["arch"], r["patch"], r["images"]) for r in rows):
        mine = [r for r in rows if (r["arch"], r["patch"], r["images"]) == problem]
        (base,) = (k for k in mine[0] if k.startswith("times_official_"))
        out += ["", f"**{problem[0]}, patch {problem[1]}, {problem[2]} images**", ""]
        out += [
            f"| precision | variant | images/s | best ms | median ms | times official | times official in "
            f"{base.removeprefix('times_official_')} | MFU | peak MB |"
        ]
        out += ["|---|---|--:|--:|--:|--:|--:|--:|--:|"]
        out += [
            f"| {r['dtype']} | {r['variant']} | {r['images_per_s']:.2f} | {r['min_ms']:.0f} | "
            f"{r['median_ms']:.0f} | {r['times_official']:.2f} | {r[base]:.2f} | {r['utilisation']:.0%} | "
            f"{r['peak_MB']:.0f} |"
            for r in mine
        ]
    return "\n".join(out) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    problems = list(dict.fromkeys((r["arch"], r["patch"]) for r in rows))
    labels = list(dict.fromkeys(f"{r['variant']}, {r['dtype']}" for r in rows))
    figure, axes = plt.subplots(1, len(problems), figsize=(4 * len(problems) + 3, 1 + 0.3 * len(labels)))
    for axis, problem in zip([axes] if len(problems) == 1 else axes, problems, strict=True):
        mine = {
            f"{r['variant']}, {r['dtype']}": r["images_per_s"]
            for r in rows
            if (r["arch"], r["patch"]) == problem
        }
        colours = ["tab:orange" if "fastdino" in label else "tab:grey" for label in labels]
        axis.barh(range(len(labels)), [mine.get(label, 0) for label in labels], color=colours)
        axis.set_yticks(
            range(len(labels)), labels if axis is (axes if len(problems) == 1 else axes[0]) else []
        )
        axis.set_title(f"{problem[0]}/{problem[1]}")
        axis.set_xlabel("images/s (best round)")
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DEVICE/step")
    parser.add_argument("--archs", nargs="*", default=["vit_tiny", "vit_small"])
    parser.add_argument("--patches", type=int, nargs="*", default=[16, 8])
    parser.add_argument("--images", type=int, help="default: 64 on a GPU, 4 on a CPU")
    parser.add_argument("--dtypes", nargs="*", help="the first is what all are compared with")
    parser.add_argument("--seconds", type=float, default=60, help="of timing for each network")
    parser.add_argument("--rounds", type=int, default=15, help="at most, for each network")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    args.dtypes = args.dtypes or (["float16", "bfloat16"] if on_gpu else ["float32", "bfloat16"])
    out = args.out or folder(device) / "step"
    about, conditions, clock = machine(device), Conditions(), Clock(device)
    rows: list[Row] = []
    for arch in args.archs:
        for patch in args.patches:
            found = bench(arch, patch, args.images or (64 if on_gpu else 4), clock, device, args)
            rows += found
            write("The networks of a DINO step", rows, about | conditions.describe(), table(rows), out)
            print(table(found), flush=True)
    if find_spec("matplotlib"):
        plot(rows, out / "plot.png")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
