"""Times fastdino's operations beside what else there is, in one interleaved run.

    python -m benchmarks.ops [CASE ...] [--device cuda] [--out DIR]

    loss        forward and backward, upstream gradient 0.37: official DINO's form, eager and compiled,
                lightly's DINOLoss (float32 only), the closed form in eager PyTorch, fastdino, and fastdino
                writing the gradient over the logits. Ideal bytes: student and teacher read, gradient written
    sinkhorn    Sinkhorn-Knopp's centring, beside DINOv2's
    ema         the teacher's moving average over a network and its head; ideal bytes: 12 a parameter
    attention   of packed crops, forward and backward, beside torch's once for each length
    linear      the wider layer of an MLP, forward and backward, float32
    multi_crop  ten crops of each image, beside Pillow's
    knn         weighted k-NN, beside scikit-learn's brute force and the product of all similarities

Nothing is timed unless the variants of a case compute the same. A case is told by its least
time. On a CPU all runs twice: with the default allocator, and with one that keeps its pages.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import official
from benchmarks.harness import ROOT, Case, Results, Row, parser, table
from fastdino import ops

V, G = 10, 2
TEMPS: dict[str, Any] = {"student_temp": official.STUDENT_TEMP, "teacher_temp": official.TEACHER_TEMP}
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(2**40), "MALLOC_TRIM_THRESHOLD_": str(2**40)}
ALLOCATORS = {"allocator keeps pages": KEEP | {"MALLOC_TOP_PAD_": str(2**28)}, "default allocator": {}}


def silent(run: Callable[[], object]) -> Callable[[], list[Tensor]]:
    """A call without a result to compare."""
    return lambda: [run()][:0]  # type: ignore[return-value]


def loss(images: int, prototypes: int, dtype: str, device: str = "cpu", compiled: bool = False) -> Case:
    """DINO's loss and its gradient by the student's logits (V, B, K)."""
    torch._dynamo.reset()  # past eight shapes a function is no longer compiled, without a word
    kind: Any = {"device": device, "dtype": getattr(torch, dtype)}
    logits, teacher = (torch.randn(n, images, prototypes, **kind) for n in (V, G))
    center = torch.randn(prototypes, device=device) * 0.1
    student, upstream = logits.clone().requires_grad_(), torch.tensor(0.37, device=device)
    temps: Any = {name: torch.tensor(x, device=device) for name, x in TEMPS.items()}

    def restore() -> None:
        student.grad = None
        student.data.copy_(logits)  # in place, the gradient was written over them

    def both(forward: Callable[[Tensor], Tensor]) -> tuple[Tensor, Any]:
        # on a view: only logits that are not a leaf may be written over
        found = forward(student.view_as(student))
        found.backward(upstream)
        return found, student.grad

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "closed form eager": lambda s: ops.dino_loss(s, teacher, center, **TEMPS, impl="torch"),
        "official": lambda s: official.cross_entropy(s, teacher, center, **temps),
        "fastdino": lambda s: ops.dino_loss(s, teacher, center, **TEMPS),
        "fastdino-in-place": lambda s: ops.dino_loss(s, teacher, center, **TEMPS, inplace_backward=True),
    }
    if compiled:
        graph = torch.compile(official.cross_entropy, dynamic=False)
        ways["official compiled"] = lambda s: graph(s, teacher, center, **temps)
    if dtype == "float32" and find_spec("lightly"):
        from lightly.loss import DINOLoss

        lightly = DINOLoss(prototypes, student_temp=official.STUDENT_TEMP).to(device)
        lightly.center, lightly.update_center = center.view(1, 1, -1), lambda *_: None
        ways["lightly"] = lambda s: lightly(list(teacher), list(s), teacher_temp=official.TEACHER_TEMP)
    # the others divide half-precision logits by the temperature in half precision
    limits = {"": 1e-4 if dtype == "float32" else 0.2, "fastdino": 5e-3, "fastdino-in-place": 5e-3}
    moved: Any = {"bytes": 2 * logits.nbytes + teacher.nbytes, "held": logits.nbytes}
    variants = {name: partial(both, way) for name, way in ways.items()}
    sizes = {"images": images, "prototypes": prototypes, "dtype": dtype}
    return Case("loss", sizes, variants, limits, restore, **moved)


def sinkhorn(images: int, prototypes: int, device: str = "cpu") -> Case:
    """DINOv2's gives the probabilities, fastdino's the centre that leads to them."""
    teacher, temp = 0.3 * torch.randn(G * images, prototypes, device=device), official.TEACHER_TEMP
    right = official.sinkhorn(teacher)
    found = torch.softmax((teacher - ops.sinkhorn_center(teacher, temp)) / temp, -1)
    if not torch.allclose(found, right, rtol=1e-2, atol=1e-6):
        raise SystemExit("sinkhorn: fastdino's probabilities are not DINOv2's: nothing was timed")
    variants = {
        "dinov2": silent(lambda: official.sinkhorn(teacher)),
        "fastdino": silent(lambda: ops.sinkhorn_center(teacher, temp)),
    }
    return Case("sinkhorn", {"images": images, "prototypes": prototypes}, variants)


def ema(arch: str, device: str = "cpu", prototypes: int = 65536) -> Case:
    """The teacher's moving average over a network's and its head's parameters."""
    from fastdino import vit
    from fastdino.head import DINOHead

    with torch.device("meta"):
        backbone = getattr(vit, arch)(16)
        parameters = [*backbone.parameters(), *DINOHead(backbone.embed_dim, prototypes).parameters()]
    start, student = ([torch.randn(p.shape, device=device) for p in parameters] for _ in range(2))
    teacher, momentum = [t.clone() for t in start], official.MOMENTUM

    def restore() -> None:
        torch._foreach_copy_(teacher, start)

    def loop() -> list[Tensor]:
        for t, s in zip(teacher, student, strict=True):
            t.mul_(momentum).add_((1 - momentum) * s)
        return teacher

    def lerp() -> list[Tensor]:
        torch._foreach_lerp_(teacher, student, 1 - momentum)
        return teacher

    def fastdino() -> list[Tensor]:
        ops.ema_(teacher, student, momentum)
        return teacher

    variants = {"official loop": loop, "foreach-lerp": lerp, "fastdino": fastdino}
    count = sum(s.numel() for s in student)
    sizes = {"arch": arch, "parameters": count}
    return Case("ema", sizes, variants, {"": 1e-5}, restore, bytes=12 * count)


def per_run(
    qkv: Tensor,
    runs: Sequence[tuple[int, int]],
    attend: Callable[..., Tensor] = F.scaled_dot_product_attention,
) -> Tensor:
    """torch's attention once for each length."""
    outs = []
    for part, run in zip(qkv.split([a * b for a, b in runs]), runs, strict=True):
        q, k, v = part.unflatten(0, run).permute(2, 0, 3, 1, 4).unbind(0)
        outs.append(attend(q, k, v).transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)


def gradients(way: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """Of a way's output by its inputs, after the output itself."""
    out = way(*inputs)
    return [out, *torch.autograd.grad(out, inputs, upstream)]


def attention(images: int, patch: int, dtype: str, device: str = "cpu", heads: int = 6) -> Case:
    """Of packed crops of 224 and 96 pixels, forward and backward."""
    runs = ((2 * images, (224 // patch) ** 2 + 1), (8 * images, (96 // patch) ** 2 + 1))
    kind: Any = {"dtype": getattr(torch, dtype), "device": device}
    leaf = torch.randn(sum(a * b for a, b in runs), 3, heads, 64, **kind).requires_grad_()
    rest = [leaf], torch.randn_like(leaf[:, 0])
    variants = {
        "torch": partial(gradients, lambda x: per_run(x, runs), *rest),
        "fastdino": partial(gradients, lambda x: ops.attention(x, runs), *rest),
    }
    sizes = {"images": images, "patch": patch, "dtype": dtype}
    return Case("attention", sizes, variants, {"": 1e-4 if dtype == "float32" else 2e-2})


def linear(tokens: int, width: int = 384, device: str = "cpu") -> Case:
    """The wider layer of an MLP over the tokens of some images, forward and backward, float32."""
    shapes = (tokens, width), (4 * width, width), (4 * width,)
    inputs = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
    rest = inputs, torch.randn(tokens, 4 * width, device=device)
    ways: dict[str, Callable[..., Tensor]] = {"torch": F.linear, "fastdino": ops.linear}
    variants = {name: partial(gradients, way, *rest) for name, way in ways.items()}
    return Case("linear", {"tokens": tokens, "width": width}, variants)


def photograph(seed: int, width: int = 500, height: int = 375) -> Any:
    """Something as smooth and as grainy as a photograph."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))
    noise = rng.normal(0, 12, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def multi_crop(images: int) -> Case:
    """Ten crops of each image on a CPU: one image after another as a loader's worker, and all in one call."""
    from fastdino.config import CropPolicy
    from fastdino.data import crops

    policy, pictures = CropPolicy(), [photograph(i) for i in range(images)]

    def draw() -> list[list[crops.View]]:
        return [crops.draw(policy, 0, 0, i, picture.size) for i, picture in enumerate(pictures)]

    drawn, pixels = draw(), [crops.pixels(picture) for picture in pictures]
    parameters = torch.stack([crops.encode(views) for views in drawn])
    out = [torch.empty(images, 3, view.size, view.size, dtype=torch.uint8) for view in drawn[0]]

    def pillow() -> list[Tensor]:
        rendered = [[crops.render(p, v) for v in views] for p, views in zip(pictures, drawn, strict=True)]
        return [torch.stack([crops.to_tensor(x) for x in views]) for views in zip(*rendered, strict=True)]

    def by_image() -> list[Tensor]:
        for i, (picture, views) in enumerate(zip(pictures, draw(), strict=True)):
            crops.render_into(picture, views, [x[i : i + 1] for x in out])
        return out

    def at_once() -> list[Tensor]:
        ops.multi_crop(pixels, parameters, out)
        return out

    variants = {"pillow": pillow, "fastdino": by_image, "fastdino, decoded images at once": at_once}
    return Case("multi_crop", {"images": images}, variants, {"": 0.0})


def knn(train: int, test: int, classes: int, dim: int = 384, rivals: bool = True) -> Case:
    """Noisy features about a centre a class; accuracy of the 20 nearest, which near ties decide a little."""
    from fastdino.eval.knn import KS, TEMPERATURE, knn_accuracy

    centres = torch.randn(classes, dim)
    labels, truth = (torch.randint(classes, (n,)) for n in (train, test))
    features, queries = (centres[x] + 3 * torch.randn(len(x), dim) for x in (labels, truth))

    def ours(*ks: int) -> float:
        return knn_accuracy(features, labels, queries, truth, ks=ks)[ks[0]]

    variants: dict[str, Callable[[], Any]] = {
        "fastdino": lambda: [torch.tensor(ours(20))],
        "fastdino, k = 10 20 100 200": silent(lambda: ours(*KS)),
        "matrix-product": silent(lambda: [part @ features.T for part in queries.split(512)]),
    }
    if rivals and find_spec("sklearn"):
        from sklearn.neighbors import KNeighborsClassifier

        def weights(distance: Any) -> Any:
            return np.exp((1 - distance) / TEMPERATURE)

        how: Any = {"metric": "cosine", "algorithm": "brute", "weights": weights}
        theirs = KNeighborsClassifier(min(20, train), **how).fit(features.numpy(), labels.numpy())
        right = partial(theirs.score, queries.numpy(), truth.numpy())
        variants["scikit-learn"] = lambda: [torch.tensor(100 * right())]
    sizes = {"train": train, "test": test, "dim": dim, "classes": classes}
    return Case("knn", sizes, variants, {"": 1e-3})


CASES = ("loss", "sinkhorn", "ema", "attention", "linear", "multi_crop", "knn")
ON_CPU = ("multi_crop", "knn")


def cases(args: argparse.Namespace) -> list[Callable[[], Case]]:
    """Those asked for, each made when it is called."""
    on = {"device": args.device}
    sizes = [(b, k) for k in args.prototypes for b in args.images]
    small = [(images, patch, dtype) for patch, images in ((16, 4), (8, 1)) for dtype in args.dtypes]
    found: dict[str, list[Callable[[], Case]]] = {
        "loss": [partial(loss, *s, d, compiled=args.compile, **on) for s in sizes for d in args.dtypes],
        "sinkhorn": [partial(sinkhorn, *size, **on) for size in sizes[:1]],
        "ema": [partial(ema, arch, **on) for arch in args.archs],
        "attention": [partial(attention, *size, **on) for size in small],
        "linear": [partial(linear, 2760, **on)],
        "multi_crop": [partial(multi_crop, 16)],
        "knn": [partial(knn, *args.knn)],
    }
    names = [name for name in args.cases or CASES if args.device == "cpu" or name not in ON_CPU]
    return [make for name in names for make in found[name]]


def text(rows: list[Row]) -> str:
    """A table for each case."""
    tables: dict[str, list[tuple[str, Row]]] = {}
    for r in rows:
        sizes = [f"{name} {value}" for name, value in r["sizes"].items()]
        cells = {"least ms": r["ms"]["low"], "median": r["ms"], "time / fastdino's": r["times_fastdino"]}
        cells |= {"GB/s of ideal bytes": r.get("GB_s"), "share of the copy": r.get("share_of_copy")}
        cells |= {"extra MB": r.get("extra_MB")}
        title = ", ".join(filter(None, (r.get("allocator", ""), r["op"], *sizes)))
        tables.setdefault(title, []).append((r["variant"], cells))
    return "\n".join(table(title, "variant", lines) for title, lines in tables.items())


def both_allocators(results: Results) -> None:
    """All cases in a process for each allocator."""
    for allocator, env in ALLOCATORS.items():
        with tempfile.TemporaryDirectory() as scratch:
            again = [sys.executable, "-m", "benchmarks.ops", *sys.argv[1:], "--out", scratch]
            subprocess.run([*again, "--allocator", allocator], cwd=ROOT, env=os.environ | env, check=True)
            results.rows += json.loads(Path(scratch, "results.json").read_text())["rows"]
        results.write(results.about | results.conditions.describe())  # a stop loses only the second half


def main() -> None:
    """See the module's docstring."""
    arguments = parser(__doc__, "ops")
    add = arguments.add_argument
    add("cases", nargs="*", metavar="CASE", help="default: all")
    add("--images", type=int, nargs="*", default=[64, 32, 16, 8], help="of loss, sinkhorn")
    add("--prototypes", type=int, nargs="*", default=[65536, 4096, 262144])
    add("--dtypes", nargs="*", default=["float32", "bfloat16"])
    add("--archs", nargs="*", default=["vit_small", "vit_base", "vit_large"], help="of ema")
    add("--knn", type=int, nargs=3, default=[100_000, 10_000, 1000], metavar=("TRAIN", "TEST", "CLASSES"))
    add("--seconds", type=float, default=10, help="of timing for each problem")
    add("--rounds", type=int, default=31, help="at most, for each problem")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add("--allocator", help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if unknown := {*args.cases} - {*CASES}:
        arguments.error(f"no case {', '.join(sorted(unknown))}: there are {', '.join(CASES)}")
    results = Results("fastdino's operations", text, args)
    if args.device == "cpu" and not args.allocator:
        both_allocators(results)
    else:
        for make in cases(args):
            torch.manual_seed(0)
            rows = make().measure(torch.device(args.device), args.seconds, args.rounds)
            results.add([{"allocator": args.allocator} | r if args.allocator else r for r in rows])
    if not args.allocator:
        print(f"written to {results.out}")


if __name__ == "__main__":
    main()
