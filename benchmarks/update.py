"""Whole DINO updates as others write them and as fastdino makes them, on one set of tensors, and their check.

An update is called with crops, the two global ones first, and with a function that is told when a part ends.
All variants of a problem share parameters, centre and the state of their optimisers: weights need no copies,
and what one variant needs beyond them can be measured beside the others.
"""

import copy
import functools
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import MethodType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ops as official_ops
from benchmarks import step as official_step
from benchmarks.measure import Row
from fastdino import optim, vit
from fastdino.backbones import build_backbone
from fastdino.config import PRESETS, Config, CropPolicy, DataConfig, ModelConfig, OptimConfig, RunConfig
from fastdino.dino import DINO, MultiCrop
from fastdino.head import DINOHead
from fastdino.ops import packed_attention
from fastdino.ops.packed_attention import PLAIN_SCORES, attention_ref, class_tokens
from fastdino.parallel import parallelize
from fastdino.train import choose_precision, step_seed

Mark = Callable[[str], None]
PARTS = ("teacher forward", "student forward", "loss", "backward", "clip", "optimiser", "EMA, centre")
MEANS = (
    "fused loss",
    "fused EMA",
    "packing",
    "attention kernel",
    "compile",
    "half precision",
    "no syncs",
    "fused optimiser",
    "skipped work",
)
ONLY_VIT = ("packing", "attention kernel", "skipped work")
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
MOMENTUM = 0.996
EPOCH = 1  # past the first, in which the prototypes are frozen


@dataclass(frozen=True)
class Problem:
    """A network and a batch; `patch` is 0 where the network has none."""

    arch: str
    patch: int
    images: int
    sizes: tuple[int, int] = (224, 96)
    local_crops: int = 8
    out_dim: int = 65536

    @property
    def name(self) -> str:
        return f"{self.arch}/{self.patch}" if self.patch else self.arch

    @property
    def sides(self) -> list[int]:
        return [self.sizes[0]] * 2 + [self.sizes[1]] * self.local_crops

    def crops(self, images: int, device: torch.device) -> list[Tensor]:
        return [torch.randn(images, 3, side, side, device=device) for side in self.sides]

    def config(self) -> Config:
        size, local = self.sizes
        crops = CropPolicy(
            global_crops_size=size, local_crops_size=local, local_crops_number=self.local_crops
        )
        model = ModelConfig(arch=self.arch, patch_size=self.patch or 16, out_dim=self.out_dim)
        recipe = OptimConfig() if self.patch else PRESETS["resnet50"][1].optim
        return Config(
            data=DataConfig(crops=crops), model=model, optim=replace(recipe, batch_size=self.images)
        )


@functools.cache
def model_flops(problem: Problem) -> float:
    """Of an update, for an image: whole networks and heads, 3 forwards for the student and 1 for the teacher.

    Counted on the written-out networks, without computing anything.
    """
    total = 0.0
    with torch.device("meta"):
        backbone: Any = build_backbone(problem.config().model, problem.sizes[0])
        network: Any = official_step.Official(backbone) if problem.patch else backbone
        for side, crops, passes in zip(problem.sizes, (2, problem.local_crops), (4, 3), strict=True):
            with FlopCounterMode(display=False) as count:
                features = network(torch.empty(2, 3, side, side))  # batch norm wants more than one
                DINOHead(features.shape[1], problem.out_dim)(features)
            total += crops * passes * count.get_total_flops() / 2
    return total


class Shared:
    """What all variants of a problem share: the tensors of a DINO that itself is not run, and optimisers."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.config, self.device, self.vit = problem.config(), device, problem.patch > 0
        cfg = self.config.optim
        self.clip = cfg.clip_grad
        self.dino = DINO(self.config).to(device).train()
        groups = optim.param_groups(self.dino.student)
        plain: torch.optim.Optimizer = (
            torch.optim.SGD(groups, momentum=0.9) if cfg.optimizer == "sgd" else torch.optim.AdamW(groups)
        )
        self.optimizers = {"fused": optim.make_optimizer(self.dino.student, cfg), "plain": plain}
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = optim.peak_lr(cfg)
            optimizer.param_groups[0]["weight_decay"] = cfg.weight_decay
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """The same start every time: attention is not flat, the student is not its teacher, no state."""
        numbers = torch.Generator(self.device).manual_seed(0)
        students = dict(self.dino.student.named_parameters())
        for name, t in self.dino.teacher.named_parameters():
            if name.endswith("weight_g"):
                continue  # stays 1
            # matrices keep the size of what they are given, norms are near the identity
            bound = 1.7 * (t[0].numel() ** -0.5 if t.ndim > 1 else 0.1)
            t.uniform_(-bound, bound, generator=numbers)
            students[name].uniform_(-0.2 * bound, 0.2 * bound, generator=numbers).add_(t)
            if t.ndim == 1 and name.endswith("weight"):
                # a ResNet's branches begin small, as in training: else bfloat16 leaves nothing of gradients
                start = 0.2 if name.endswith("bn3.weight") else 1.0
                t.add_(1).mul_(start)
                students[name].add_(1).mul_(start)
        self.dino.loss.center.normal_(0.0, 0.02, generator=numbers)
        for state in (s for optimizer in self.optimizers.values() for s in optimizer.state.values()):
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()
        self.drop_gradients()

    def make_state(self) -> None:
        """The optimisers', which else comes with the first update."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.zeros_like(p)
            optimizer.step()
        self.reset()

    def drop_gradients(self) -> None:
        self.dino.student.zero_grad(set_to_none=True)

    def held(self, optimizer: torch.optim.Optimizer) -> int:
        """Bytes that last from one update to the next."""
        state = [x for its in optimizer.state.values() for x in its.values() if isinstance(x, Tensor)]
        return sum(x.nbytes for x in (*self.dino.parameters(), *self.dino.buffers(), *state))


def per_size(network: Callable[[Tensor], Tensor], crops: list[Tensor]) -> Tensor:
    """A pass for each size of crop."""
    sides = dict.fromkeys(x.shape[-1] for x in crops)
    return torch.cat([network(torch.cat([x for x in crops if x.shape[-1] == side])) for side in sides])


# Official DINO.


class OfficialBlock(official_step.OfficialBlock):
    """With the drop rate in a tensor: the check, which sets it to 0, runs the graph that is timed."""

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        self.register_buffer("rate", torch.tensor(self.drop_rate, device=block.norm1.weight.device))

    def drop(self, x: Tensor) -> Tensor:
        if self.drop_rate == 0:
            return x
        keep: Tensor = 1 - self.rate  # type: ignore[operator, assignment]
        mask = (keep + torch.rand(len(x), 1, 1, dtype=x.dtype, device=x.device)).floor()
        return x / keep * mask.clamp(max=1)  # bfloat16 rounds 1 + 0.998 to 2


class OfficialNetwork(nn.Module):
    """Backbone and head over crops of several sizes."""

    def __init__(self, ours: MultiCrop) -> None:
        super().__init__()
        self.backbone: Any = ours.backbone
        if isinstance(ours.backbone, vit.VisionTransformer):
            self.backbone = official_step.Official(ours.backbone)
            self.backbone.blocks = nn.ModuleList(OfficialBlock(block) for block in ours.backbone.blocks)
        head: Any = ours.head
        layers = (official_step.plain(x) if isinstance(x, nn.Linear) else x for x in head.mlp)
        self.mlp, self.last = nn.Sequential(*layers), head.last_layer

    def forward(self, crops: list[Tensor]) -> Tensor:
        x = F.normalize(self.mlp(per_size(self.backbone, crops)), dim=-1)
        return F.linear(x, torch._weight_norm(self.last.weight_v, self.last.weight_g, 0))


def clip_with_syncs(student: nn.Module, limit: float) -> float:
    """As published: each tensor by its own norm, which the host reads, and waits for again to compare."""
    squares = 0.0
    for p in student.parameters():
        if p.grad is not None:
            norm = p.grad.norm(2)
            squares += norm.item() ** 2
            factor = limit / (norm + 1e-6)
            if factor < 1:
                p.grad.mul_(factor)
    return math.sqrt(squares)


@torch.no_grad()
def ema_loop(teacher: nn.Module, student: nn.Module) -> None:
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.mul_(MOMENTUM).add_((1 - MOMENTUM) * s)


class Official:
    """Official DINO's update."""

    per_tensor = True  # clips each gradient by its own norm

    def __init__(self, its: Shared, dtype: torch.dtype, compiled: bool = False) -> None:
        self.its, self.dtype, self.compiled = its, dtype, compiled
        self.optimizer = its.optimizers["plain"]
        self.scaler = torch.amp.GradScaler(its.device.type, enabled=dtype == torch.float16)
        self.student, self.teacher = self.networks()
        self.loss: Any = official_ops.official
        if compiled:
            self.student.compile(dynamic=False)
            self.teacher.compile(dynamic=False)
            self.loss = torch.compile(official_ops.official, dynamic=False)

    def networks(self) -> tuple[nn.Module, nn.Module]:
        return OfficialNetwork(self.its.dino.student), OfficialNetwork(self.its.dino.teacher)

    def still(self, still: bool) -> None:
        """Turn stochastic depth off, or on again."""
        for block in self.student.modules():
            if isinstance(block, OfficialBlock):
                block.rate.fill_(0.0 if still else block.drop_rate)  # type: ignore[operator]

    def cross_entropy(self, student: Tensor, teacher: Tensor, views: int) -> Tensor:
        s, t = student.unflatten(0, (views, -1)), teacher.unflatten(0, (2, -1))
        return self.loss(s, t, self.its.dino.loss.center[0], STUDENT_TEMP, TEACHER_TEMP)

    def clip(self) -> None:
        clip_with_syncs(self.its.dino.student, self.its.clip)

    @torch.no_grad()
    def move(self, teacher: Tensor) -> None:
        ema_loop(self.its.dino.teacher, self.its.dino.student)
        center = self.its.dino.loss.center
        center.copy_(center * 0.9 + teacher.mean(dim=0, keepdim=True) * (1 - 0.9))

    def __call__(self, crops: list[Tensor], mark: Mark) -> Tensor:
        with torch.autocast(self.its.device.type, self.dtype, enabled=self.dtype != torch.float32):
            teacher = self.teacher(crops[:2])
            mark("teacher forward")
            student = self.student(crops)
            mark("student forward")
            loss = self.cross_entropy(student, teacher, len(crops))
        if not math.isfinite(loss.item()):
            raise SystemExit("the loss is not finite: nothing was timed")
        mark("loss")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        mark("backward")
        self.scaler.unscale_(self.optimizer)
        self.clip()
        mark("clip")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        mark("optimiser")
        self.move(teacher)
        loss.item()  # for the log
        synchronize(loss.device)
        mark("EMA, centre")
        return loss


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# lightly.


class LightlyNetwork(nn.Module):
    """timm's ViT, or torchvision's ResNet, and lightly's head."""

    def __init__(self, ours: Any, drop_path_rate: float) -> None:
        from lightly.models.modules import DINOProjectionHead

        super().__init__()
        self.backbone, self.patch = ours.backbone, 1
        out_dim, bottleneck = ours.head.last_layer.weight_v.shape
        width, hidden = ours.head.mlp[0].in_features, ours.head.mlp[0].out_features
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # the old weight_norm
            self.head = DINOProjectionHead(width, hidden, bottleneck, out_dim)
        adopt(self.head, {n.replace("mlp.", "layers."): p for n, p in ours.head.named_parameters()})
        if isinstance(ours.backbone, vit.VisionTransformer):
            self.patch = ours.backbone.patch_size
            self.backbone = timm_vit(ours.backbone, drop_path_rate)

    def forward(self, crops: list[Tensor]) -> Tensor:
        # timm takes whole patches alone; a strided convolution leaves the same pixels out
        whole = [x.shape[-1] // self.patch * self.patch for x in crops]
        return self.head(per_size(self.backbone, [x[..., :n, :n] for x, n in zip(crops, whole, strict=True)]))


def timm_vit(ours: vit.VisionTransformer, drop_path_rate: float) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        network = VisionTransformer(
            img_size=ours.grid[0] * ours.patch_size,
            patch_size=ours.patch_size,
            embed_dim=ours.embed_dim,
            depth=len(ours.blocks),
            num_heads=ours.num_heads,
            num_classes=0,
            dynamic_img_size=True,
            drop_path_rate=drop_path_rate,
        )
    adopt(network, dict(ours.named_parameters()))
    return network


def adopt(module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Have a module use these in the place of its own, by their names."""
    own = {name for name, _ in module.named_parameters()}
    if own != parameters.keys():
        raise SystemExit(f"other parameters than fastdino's: {sorted(own ^ parameters.keys())}")
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, parameter)


class Lightly(Official):
    """lightly's parts in the place of official DINO's."""

    per_tensor = False

    def networks(self) -> tuple[nn.Module, nn.Module]:
        from lightly.loss import DINOLoss

        self.criterion = DINOLoss(self.its.config.model.out_dim).to(self.its.device)
        dino, rate = self.its.dino, self.its.config.model.drop_path_rate
        return LightlyNetwork(dino.student, rate), LightlyNetwork(dino.teacher, 0.0)

    def still(self, still: bool) -> None:
        if self.its.vit:
            self.student.train(not still)

    def cross_entropy(self, student: Tensor, teacher: Tensor, views: int) -> Tensor:
        self.criterion.center = self.its.dino.loss.center[None]
        return self.criterion(list(teacher.chunk(2)), list(student.chunk(views)), teacher_temp=TEACHER_TEMP)

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.its.dino.student.parameters(), self.its.clip)

    def move(self, teacher: Tensor) -> None:
        from lightly.models.utils import update_momentum

        update_momentum(self.student, self.teacher, m=MOMENTUM)
        self.its.dino.loss.center.copy_(self.criterion.center[0])


# fastdino.


class Ours:
    """fastdino's update, as its trainer makes it, less the means in `taken`."""

    per_tensor = True

    def __init__(self, its: Shared, dtype: torch.dtype, taken: tuple[str, ...] = ()) -> None:
        self.its, self.taken, self.steps = its, taken, 0
        self.dtype = torch.float32 if "half precision" in taken else dtype
        tensors = (*its.dino.parameters(), *its.dino.buffers())
        self.dino: Any = copy.deepcopy(its.dino, {id(x): x for x in tensors})  # of modules alone
        self.student, self.teacher = self.dino.student, self.dino.teacher
        self.compiled = ("compile" in taken) != (its.device.type == "cuda")
        run = RunConfig(
            compile="on" if self.compiled else "off",
            attention="sdpa" if "attention kernel" in taken else "auto",
        )
        for network in (self.student, self.teacher):
            if "skipped work" in taken:
                for block in network.backbone.blocks:
                    block.__class__ = WholeBlock
            if "packing" in taken:
                network.forward = MethodType(forward_per_size, network)
            parallelize(network, run, its.device, self.dtype, trained=network is self.student)
        if "fused loss" in taken:
            self.dino.loss.cross_entropy = MethodType(official_cross_entropy, self.dino.loss)
        if "fused EMA" in taken:
            self.dino.update_teacher = lambda momentum: ema_loop(self.teacher, self.student)
        self.optimizer = its.optimizers["plain" if "fused optimiser" in taken else "fused"]
        self.scaler = torch.amp.GradScaler(its.device.type, enabled=self.dtype == torch.float16)
        self.mark: Mark = lambda part: None
        self.teacher.register_forward_hook(lambda *_: self.mark("teacher forward"))
        self.student.register_forward_hook(lambda *_: self.mark("student forward"))

    def still(self, still: bool) -> None:
        if self.its.vit:
            self.student.train(not still)

    def __call__(self, crops: list[Tensor], mark: Mark) -> Tensor:
        if "attention kernel" not in self.taken:
            return self.update(crops, mark)
        with mock.patch.object(packed_attention, "_sdpa_run", attention_ref):
            return self.update(crops, mark)

    def update(self, crops: list[Tensor], mark: Mark) -> Tensor:
        dino, optimizer, syncs = self.dino, self.optimizer, "no syncs" in self.taken
        self.mark, self.steps = mark, self.steps + 1
        torch.manual_seed(step_seed(0, self.steps))
        buffers = [b for b in dino.buffers() if b.is_floating_point()]
        kept = [b.clone() for b in buffers]
        with torch.autocast(self.its.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss, teacher_mean = dino(crops, EPOCH)
        if syncs:
            loss.item()
        mark("loss")
        self.scaler.scale(loss).backward()
        mark("backward")
        self.scaler.unscale_(optimizer)
        if syncs:
            norm = torch.tensor(clip_with_syncs(self.student, self.its.clip), device=loss.device)
        else:
            norm = optim.clip_gradients(self.student, self.its.clip, self.its.config.optim.clip)
        mark("clip")
        finite = torch.isfinite(loss.detach())
        if optimizer is self.its.optimizers["fused"]:
            optimizer.found_inf = (~(finite & torch.isfinite(norm))).float()  # type: ignore[attr-defined]
        optimizer.step()
        if self.scaler.is_enabled():
            self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        mark("optimiser")
        dino.loss.move_center(teacher_mean)
        for buffer, old in zip(buffers, kept, strict=True):
            buffer.copy_(torch.where(finite, buffer, old))
        dino.update_teacher(MOMENTUM)
        if syncs:
            loss.item()
            synchronize(loss.device)
        mark("EMA, centre")
        return loss


class WholeBlock(vit.Block):
    """Computes what stochastic depth drops and multiplies it by 0, and the last block's tokens all."""

    def forward(self, x: Tensor, packed: Any, kept: Any = None, class_only: bool = False) -> Tensor:
        def drop(y: Tensor, its: Any) -> Tensor:
            return y if its is None else y * y.new_zeros(len(y), 1).index_fill(0, its.rows, its.scale)

        first, second = kept or (None, None)
        x = x + drop(self.ls1(self.attn(self.norm1(x), packed)), first)
        x = x + drop(self.ls2(self.mlp(self.norm2(x))), second)
        return class_tokens(x, packed.runs) if class_only else x


def forward_per_size(self: Any, crops: list[Tensor], freeze_backbone: bool = False) -> Tensor:
    features = per_size(self.backbone, crops)
    self.features = features.detach()
    return self.head(features)


def official_cross_entropy(self: Any, student: Tensor, teacher: Tensor, *_: Any, **__: Any) -> Any:
    s, t = student.unflatten(0, (-1, len(teacher) // 2)), teacher.detach().unflatten(0, (2, -1))
    loss = official_ops.official(s, t, self.center[0].clone(), STUDENT_TEMP, TEACHER_TEMP)  # type: ignore
    return loss, teacher.float().mean(dim=0)


def variants_of(problem: Problem, its: Shared, compiled: bool, means: bool) -> dict[str, Any]:
    """Name to update; fastdino without one of its means is named by it."""
    cuda = its.device.type == "cuda"
    theirs, ours = torch.float16 if cuda else torch.float32, choose_precision("auto", its.device)
    found: dict[str, Any] = {"official": Official(its, theirs)}
    if compiled:
        found["official, compiled"] = Official(its, theirs, compiled=True)
    if not cuda and ours != torch.float32:
        found["official, bfloat16"] = Official(its, ours)
    if find_spec("lightly") and (find_spec("timm") or not its.vit):
        found["lightly"] = Lightly(its, theirs)
    found["fastdino"] = Ours(its, ours)
    if not means:
        return found
    tokens = 1 + (problem.sizes[0] // max(problem.patch, 1)) ** 2
    absent = {
        "half precision": ours == torch.float32,
        "compile": not compiled,
        # there the weights are written out as it is
        "attention kernel": not cuda and ours != torch.float32 and tokens**2 <= PLAIN_SCORES,
    }
    here = [m for m in MEANS if not absent.get(m) and (its.vit or m not in ONLY_VIT)]
    found |= {mean: Ours(its, ours, (mean,)) for mean in here}
    # on a CPU compile is what is added
    found["all of these"] = Ours(its, ours, tuple(m for m in here if cuda or m != "compile"))
    return found


# Correctness.

CHECKED = ("cls_token", "blocks.0.norm1.weight", "conv1.weight", "head.mlp.0.weight", "last_layer.weight_v")
LOSS = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 2e-3}
REST = 1e-3  # gradients and centre, beyond twice the error of official DINO in the same precision
PLAIN = 0.6  # most of that error; a ResNet's batch norm leaves bfloat16 little of random images' gradients
FORMULAS = 1e-2  # what an update does with its gradients


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def observe(variant: Any, crops: list[Tensor]) -> dict[str, Any]:
    """Of one update from the start, without stochastic depth: loss, gradients, the centre's movement; and how
    far clipping, optimiser and teacher are from what their formulas make of these."""
    its: Shared = variant.its
    its.clip = 0.01  # so that all are clipped
    students, teachers = (dict(x.named_parameters()) for x in (its.dino.student, its.dino.teacher))
    names = [n for n, p in students.items() if n.endswith(CHECKED) and p.requires_grad]
    seen: dict[str, dict[str, Tensor]] = {}

    def mark(part: str) -> None:
        if part in ("backward", "clip"):
            seen[part] = {n: students[n].grad.clone() for n in names}  # type: ignore[union-attr]

    variant.still(True)
    while True:
        its.reset()
        before = {n: (students[n].detach().clone(), teachers[n].double()) for n in names}
        center, scale = its.dino.loss.center.clone(), variant.scaler.get_scale()
        began = time.perf_counter()
        loss = float(variant(crops, mark).detach())
        seconds = time.perf_counter() - began
        if variant.scaler.get_scale() >= scale or scale < 1:
            break  # else fp16's gradients overflowed: as in training, the first updates find their scale
    variant.still(False)
    its.clip = its.config.optim.clip_grad
    gradients = {n: g / scale for n, g in seen["backward"].items()}
    off = dict.fromkeys(("clipping", "optimiser", "teacher"), 0.0)
    for n in names:
        clipped, (old, old_teacher) = seen["clip"][n], before[n]
        (group,) = (g for g in variant.optimizer.param_groups if any(p is students[n] for p in g["params"]))
        alone = nn.Parameter(old.clone())
        alone.grad = clipped
        kind: Any = type(variant.optimizer)
        kind([group | {"params": [alone], "fused": False}]).step()
        new = students[n].detach()
        teacher = MOMENTUM * old_teacher + (1 - MOMENTUM) * new.double()
        pairs = {
            "optimiser": (new - old, alone.detach() - old),
            "teacher": (teachers[n].double() - old_teacher, teacher - old_teacher),
        }
        if variant.per_tensor:
            pairs["clipping"] = clipped, gradients[n] * (0.01 / (gradients[n].norm() + 1e-6)).clamp(max=1)
        off |= {what: max(off[what], distance(*pair)) for what, pair in pairs.items()}
    its.drop_gradients()
    moved = its.dino.loss.center - 0.9 * center
    return {"loss": loss, "gradients": gradients, "centre": moved, "off": off, "seconds": seconds}


def errors(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Relative, of the loss, the centre's movement and each gradient."""
    gradients = {n: distance(g, expected["gradients"][n]) for n, g in found["gradients"].items()}
    centre = distance(found["centre"], expected["centre"])
    return {"loss": abs(found["loss"] / expected["loss"] - 1), "centre": centre} | gradients


def check(variants: dict[str, Any], crops: list[Tensor]) -> dict[str, Row]:
    """How far each variant is from official DINO in float32, and seconds; SystemExit where one is too far."""
    exact: dict[int, dict[str, Any]] = {}
    plain: dict[tuple[int, torch.dtype], dict[str, Any]] = {}
    rows: dict[str, Row] = {}
    for name, variant in variants.items():
        its = variant.its
        # timm resizes position embeddings otherwise: its features of local crops are others
        seen = crops[:2] if isinstance(variant, Lightly) and its.vit else crops
        key = len(seen), variant.dtype
        if len(seen) not in exact:
            exact[len(seen)] = observe(Official(its, torch.float32), seen)
            plain[len(seen), torch.float32] = exact[len(seen)]
        same = type(variant) is Official and not variant.compiled
        if key not in plain:
            plain[key] = observe(variant if same else Official(its, variant.dtype), seen)
        found = plain[key] if same else observe(variant, seen)
        off, rough = (errors(x, exact[len(seen)]) for x in (found, plain[key]))
        limits = {n: REST + 2 * error if error < PLAIN else 0.0 for n, error in rough.items()}
        limits |= {"loss": LOSS[variant.dtype]} | dict.fromkeys(found["off"], FORMULAS)
        for what, error in (off | found["off"]).items():
            if not error < limits[what]:
                raise SystemExit(f"{name} in {variant.dtype}: {what} off by {error:.1e}: nothing was timed")
        loss, centre, *gradients = off.values()
        rows[name] = {"loss": loss, "centre": centre, "gradients": max(gradients)}
        rows[name]["seconds"] = found["seconds"]
    return rows
