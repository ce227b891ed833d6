"""Whole updates of one problem, official DINO's, lightly's and `fastdino.Update`, and their check.

All variants of a problem share parameters, centre and the optimisers' moments: weights need no copies, and
the memory that a variant needs beyond them can be measured beside the others.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from types import MethodType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import official
from benchmarks.harness import Row
from benchmarks.ops import per_run
from fastdino import optim, vit
from fastdino.backbones import build_backbone
from fastdino.config import PRESETS, Config, CropPolicy, DataConfig, ModelConfig, OptimConfig, RunConfig
from fastdino.data.crops import normalize
from fastdino.dino import DINO
from fastdino.head import DINOHead
from fastdino.ops.packed_attention import PLAIN_SCORES, attention_ref, class_tokens
from fastdino.optim import StepSettings
from fastdino.update import Update, choose_precision
from tests.helpers.counting import CountSyncs

PARTS = ("teacher forward", "student forward", "loss", "backward", "clip", "optimiser", "EMA, centre")
ONLY_VIT = ("packing", "attention kernel", "skipped work")
OPTIMIZATIONS = ("fused loss", "fused EMA", *ONLY_VIT[:2], "compile", "half precision", "no syncs")
OPTIMIZATIONS += ("fused optimiser", "skipped work")


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
        """As in vit_small/16."""
        return f"{self.arch}/{self.patch}" if self.patch else self.arch

    def crops(self, images: int, device: torch.device) -> list[Tensor]:
        """Random uint8 crops (images, 3, side, side), as a loader sends them, the two global ones first."""
        sides = [self.sizes[0]] * 2 + [self.sizes[1]] * self.local_crops
        shapes = [(images, 3, side, side) for side in sides]
        return [torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for shape in shapes]

    def config(self, **run: Any) -> Config:
        """fastdino's configuration, with its defaults but for what `run` says."""
        size, local = self.sizes
        crops: Any = {"global_crops_size": size, "local_crops_size": local}
        policy = CropPolicy(**crops, local_crops_number=self.local_crops)
        model = ModelConfig(arch=self.arch, patch_size=self.patch or 16, out_dim=self.out_dim)
        recipe = OptimConfig() if self.patch else PRESETS["resnet50"][1].optim
        recipe = replace(recipe, batch_size=self.images)
        return Config(data=DataConfig(crops=policy), model=model, optim=recipe, run=RunConfig(**run))


@functools.cache
def model_flops(problem: Problem) -> float:
    """Of an update, for an image: whole networks and heads, 3 forwards for the student and 1 for the teacher.

    Counted on the written-out networks, without computing anything.
    """
    total = 0.0
    with torch.device("meta"):
        backbone: Any = build_backbone(problem.config().model, problem.sizes[0])
        network = official.Backbone(backbone) if problem.patch else backbone
        for side, crops, passes in zip(problem.sizes, (2, problem.local_crops), (4, 3), strict=True):
            with FlopCounterMode(display=False) as count:
                features = network(torch.empty(2, 3, side, side))  # batch norm wants more than one
                DINOHead(features.shape[1], problem.out_dim)(features)
            total += crops * passes * count.get_total_flops() / 2
    return total


def settings_of(config: Config) -> StepSettings:
    """Of an update past the first epoch, in which the prototypes are frozen."""
    cfg = config.optim
    no: Any = dict.fromkeys(("freeze_last_layer", "freeze_backbone", "begins_epoch", "ends_epoch"), False)
    rates: Any = {"lr": optim.peak_lr(cfg), "weight_decay": cfg.weight_decay, "momentum": official.MOMENTUM}
    return StepSettings(step=0, epoch=1, teacher_temp=official.TEACHER_TEMP, **rates, **no)


class Shared:
    """The tensors that all variants of a problem share: those of a DINO that is not run, and moments."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem, self.config, self.device = problem, problem.config(), device
        self.vit, self.settings = problem.patch > 0, settings_of(self.config)
        self.dino = DINO(self.config).to(device).train()
        self.fused = optim.make_optimizer(self.dino.student, self.config.optim)
        self.plain = self.plain_optimizer(self.dino.student)
        self.reset()

    def plain_optimizer(self, student: nn.Module) -> torch.optim.Optimizer:
        """torch's optimiser as it comes, of a student; on the shared moments."""
        cfg, groups = self.config.optim, official.param_groups(student)
        kind: Any = partial(torch.optim.SGD, momentum=0.9) if cfg.optimizer == "sgd" else torch.optim.AdamW
        found = kind(groups, lr=optim.peak_lr(cfg), weight_decay=cfg.weight_decay)
        for p, state in zip(parameters(found), self.states(), strict=True):
            found.state[p] = state | ({"step": torch.zeros(())} if "step" in state else {})
        return found

    def states(self) -> list[dict[str, Tensor]]:
        """The fused optimiser's, in the order of its parameters."""
        return [self.fused.state[p] for p in parameters(self.fused)]

    def lend(self, update: Update) -> None:
        """Have fastdino's update use the shared tensors in place of its own."""
        own, shared = ((*d.parameters(), *d.buffers()) for d in (update.dino, self.dino))
        for x, y in zip(own, shared, strict=True):
            x.data = y.data
        for p, state in zip(parameters(update.optimizer), self.states(), strict=True):
            update.optimizer.state[p] = state

    @torch.no_grad()
    def reset(self) -> None:
        """The same start every time: attention is not flat, the student is not its teacher, no moments."""
        numbers = torch.Generator(self.device).manual_seed(0)
        students = dict(self.dino.student.named_parameters())
        for name, t in self.dino.teacher.named_parameters():
            if name.endswith("weight_g"):
                continue  # stays 1
            # matrices keep the size of their input, norms are near the identity
            bound = 1.7 * (t[0].numel() ** -0.5 if t.ndim > 1 else 0.1)
            t.uniform_(-bound, bound, generator=numbers)
            students[name].uniform_(-0.2 * bound, 0.2 * bound, generator=numbers).add_(t)
            if t.ndim == 1 and name.endswith("weight"):
                # a ResNet's branches begin small, as in training: else bfloat16 leaves nothing of gradients
                start = 0.2 if name.endswith("bn3.weight") else 1.0
                for x in (t, students[name]):
                    x.add_(1).mul_(start)
        self.dino.loss.center.normal_(0.0, 0.02, generator=numbers)
        for state in (*self.states(), *self.plain.state.values()):
            for value in state.values():
                value.zero_()

    def held(self) -> int:
        """Bytes that last from one update to the next."""
        state = [x for each in self.states() for x in each.values()]
        return sum(x.nbytes for x in (*self.dino.parameters(), *self.dino.buffers(), *state))


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All of an optimiser's."""
    return [p for group in optimizer.param_groups for p in group["params"]]


# fastdino less some of its optimizations.


class Without(Update):
    """fastdino's update with some of its optimizations taken away."""

    def __init__(self, shared: Shared, without: tuple[str, ...], **run: Any) -> None:
        self.without = without
        run |= {"attention": "sdpa"} if "attention kernel" in without else {}
        run |= {"precision": "fp32"} if "half precision" in without else {}
        super().__init__(shared.problem.config(**run), shared.device)
        for network in (self.dino.student, self.dino.teacher):
            backbone: Any = network.backbone
            for block in backbone.blocks if shared.vit else ():
                if "skipped work" in without:
                    block.__class__ = WholeBlock
                if "attention kernel" in without:
                    block.attn.__class__ = PlainAttention
            if "packing" in without:
                network.forward = MethodType(forward_per_size, network)  # type: ignore[method-assign]
        if "fused loss" in without:
            self.dino.loss.cross_entropy = partial(official_loss, self.dino.loss)  # type: ignore[method-assign]
        shared.lend(self)
        if "fused optimiser" in without:
            self.optimizer = shared.plain_optimizer(self.dino.student)

    def __call__(self, pieces: Any, settings: StepSettings) -> Tensor:
        """With official DINO's two reads of the loss."""
        row = super().__call__(pieces, settings)
        for _ in range(2 * ("no syncs" in self.without)):
            row[0].item()
        return row

    def clip(self, settings: StepSettings) -> Tensor:
        """With official DINO's two waits for each tensor."""
        if "no syncs" not in self.without:
            return super().clip(settings)
        self.scaler.unscale_(self.optimizer)
        norm = official.clip_(self.dino.student, self.config.optim.clip_grad)
        return torch.tensor(norm, device=self.device)

    def step_student(self, finite: Tensor) -> None:
        """By an optimiser that cannot skip a step on the device."""
        if "fused optimiser" not in self.without:
            return super().step_student(finite)
        self.optimizer.step()
        if self.scaler.is_enabled():
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def move_teacher(self, settings: StepSettings) -> None:
        """Tensor by tensor."""
        if "fused EMA" not in self.without:
            return super().move_teacher(settings)
        official.ema_loop_(self.dino.teacher, self.dino.student, settings.momentum)


class WholeBlock(vit.Block):
    """Multiplies by 0 what stochastic depth drops, after computing it, and computes all the last tokens."""

    def forward(self, x: Tensor, packed: Any, kept: Any = None, class_only: bool = False) -> Tensor:
        def drop(y: Tensor, kept: Any) -> Tensor:
            return y if kept is None else y * y.new_zeros(len(y), 1).index_fill(0, kept.rows, kept.scale)

        first, second = kept or (None, None)
        x = x + drop(self.ls1(self.attn(self.norm1(x), packed)), first)
        x = x + drop(self.ls2(self.mlp(self.norm2(x))), second)
        return class_tokens(x, packed.runs) if class_only else x


class PlainAttention(vit.Attention):
    """Attention with its weights written out."""

    def forward(self, x: Tensor, packed: Any, class_only: bool = False) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention_ref(q[..., :1, :] if class_only else q, k, v)

        return self.proj(per_run(self.heads(x), packed.runs, attend).flatten(1))


def forward_per_size(self: Any, crops: list[Tensor], freeze_backbone: bool = False) -> Tensor:
    """`MultiCrop.forward` with a pass for each size of crop."""
    features = official.per_size(self.backbone, crops)
    self.features = features.detach()
    return self.head(features)


def official_loss(loss: Any, student: Tensor, teacher: Tensor, temp: float, **_: Any) -> Any:
    """`DINOLoss.cross_entropy` in official DINO's form."""
    s, t = student.unflatten(0, (-1, len(teacher) // 2)), teacher.unflatten(0, (2, -1))
    value = official.cross_entropy(s, t, loss.center[0].clone(), official.STUDENT_TEMP, temp)
    return value, teacher.float().mean(dim=0)


# All variants.


class Variant:
    """An update of whoever's, called with the crops of `inputs`; returns the loss."""

    def __init__(self, shared: Shared, update: Any, compiled: bool = False) -> None:
        self.shared, self.update, self.compiled, self.steps = shared, update, compiled, 0
        self.ours, self.precision = isinstance(update, Update), str(update.dtype).removeprefix("torch.")
        self.networks = update.dino if self.ours else update

    def inputs(self, crops: list[Tensor]) -> list[Tensor]:
        """The crops as the update's own loader hands them over: fastdino normalises within the update."""
        policy = self.shared.config.data.crops
        return crops if self.ours else [normalize(view, policy) for view in crops]

    def __call__(self, views: list[Tensor]) -> Tensor:
        if not self.ours:
            return self.update(views)
        self.steps += 1
        return self.update([views], replace(self.shared.settings, step=self.steps))[0]

    def drop_gradients(self) -> None:
        """Leave none behind."""
        self.shared.dino.student.zero_grad(set_to_none=True)

    @contextmanager
    def watched(self, mark: Callable[[str], None], networks: bool = True) -> Iterator[None]:
        """Have `mark` called with the name of each part as it ends."""
        update, loss = self.update, self.networks.loss if self.ours else self.update
        ends = [(loss, "cross_entropy"), (update, "gradients"), (update, "clip"), (update, "step_student")]
        ends.append((update, "move_teacher"))

        def ended(right: Callable[..., Any], part: str) -> Callable[..., Any]:
            def run(*args: Any, **options: Any) -> Any:
                out = right(*args, **options)
                mark(part)
                return out

            return run

        with ExitStack() as stack:
            for (owner, name), part in [*zip(ends, PARTS[2:], strict=True)][not networks :]:
                stack.enter_context(mock.patch.object(owner, name, ended(getattr(owner, name), part)))
            for network, part in zip((self.networks.teacher, self.networks.student), PARTS, strict=False):
                if networks:
                    hook = network.register_forward_hook(lambda *_, part=part: mark(part))
                    stack.callback(hook.remove)
            yield


def other_variant(
    shared: Shared, dtype: torch.dtype, compiled: bool = False, lightly: bool = False
) -> Variant:
    """Official DINO's update, or lightly's parts in it."""
    pair, kind = (shared.dino.student, shared.dino.teacher), official.Lightly if lightly else official.Update
    rate, options = shared.config.model.drop_path_rate, dict[str, Any](dtype=dtype, compiled=compiled)
    networks: Any = (
        map(official.LightlyNetwork, pair, (rate, 0.0)) if lightly else map(official.Network, pair)
    )
    made = kind(*networks, shared.plain, shared.dino.loss.center, shared.config.optim.clip_grad, **options)
    return Variant(shared, made, compiled)


def variants_of(
    problem: Problem, shared: Shared, compiled: bool, without: tuple[str, ...]
) -> dict[str, Variant]:
    """Name to variant; fastdino without one of its optimizations is named by it."""
    cuda = shared.device.type == "cuda"
    theirs, ours = torch.float16 if cuda else torch.float32, choose_precision("auto", shared.device)

    def fastdino(*without: str) -> Variant:
        on = ("compile" in without) != cuda  # on a CPU compiling is added
        return Variant(shared, Without(shared, without, compile="on" if on else "off"), on)

    found = {"official": other_variant(shared, theirs)}
    if compiled:
        found["official, compiled"] = other_variant(shared, theirs, compiled=True)
    if not cuda and ours != torch.float32:
        found["official, bfloat16"] = other_variant(shared, ours)
    if find_spec("lightly") and (find_spec("timm") or not shared.vit):
        found["lightly"] = other_variant(shared, theirs, lightly=True)
    trainers = Update(shared.config, shared.device)
    shared.lend(trainers)
    found["fastdino"] = Variant(shared, trainers, cuda)
    tokens = 1 + (problem.sizes[0] // max(problem.patch, 1)) ** 2
    absent = {
        "half precision": ours == torch.float32,
        "compile": not compiled,
        # there the weights are written out as it is
        "attention kernel": not cuda and ours != torch.float32 and tokens**2 <= PLAIN_SCORES,
    }
    here = [m for m in without if not absent.get(m) and (shared.vit or m not in ONLY_VIT)]
    found |= {name: fastdino(name) for name in here}
    if here:
        found["all of these"] = fastdino(*(m for m in here if cuda or m != "compile"))
    return found


# Correctness.

CHECKED = ("cls_token", "blocks.0.norm1.weight", "conv1.weight", "head.mlp.0.weight", "last_layer.weight_v")
LOSS = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 2e-3}
REST = 1e-3  # gradients and centre, beyond twice the error of official DINO in the same precision
PLAIN = 0.6  # most of that error; a ResNet's batch norm leaves bfloat16 little of random images' gradients
STEPS = 1e-2  # clipping, optimiser and teacher, which all compute in float32 from the same gradients
Seen = dict[str, dict[str, Tensor]]


def observe(variant: Variant, crops: list[Tensor]) -> tuple[Seen, int | None]:
    """What an update from the start, without stochastic depth, does to the CHECKED tensors, and its waits.

    Gradients differ by rounding. So all variants are given the same ones, large enough to be clipped, after
    the backward pass, and others after clipping: what clipping, optimiser and teacher do is then comparable.
    """
    shared, update = variant.shared, variant.update
    own = variant.networks if variant.ours else shared.dino
    students, teachers = (dict(x.named_parameters()) for x in (own.student, own.teacher))
    names = [n for n, p in students.items() if n.endswith(CHECKED) and p.requires_grad]
    seen: Seen = {}

    def mark(part: str) -> None:
        if part not in ("backward", "clip"):
            return
        scale = update.scaler.get_scale() if part == "backward" else 1.0
        seen[part] = {n: students[n].grad.clone() / scale for n in names}  # type: ignore[union-attr]
        numbers = torch.Generator(shared.device).manual_seed(1)
        for p in students.values():
            if p.grad is not None:
                p.grad.normal_(0, 10 * scale, generator=numbers)

    views = variant.inputs(crops)
    official.still(variant.networks.student, True)
    while True:
        shared.reset()
        student, teacher = ({n: x[n].detach().clone() for n in names} for x in (students, teachers))
        center = shared.dino.loss.center.clone()
        # a graph would be made anew under this counter
        counter = nullcontext() if variant.compiled else CountSyncs(shared.device.type)
        with variant.watched(mark, networks=False), counter as counted:
            loss = variant(views).detach()
        if all(x.isfinite().all() for x in seen["backward"].values()) or not update.scaler.is_enabled():
            break
        update.scaler.update(update.scaler.get_scale() / 16)  # fp16's gradients overflowed
    official.still(variant.networks.student, False)
    variant.drop_gradients()
    found: Seen = {"loss": {"": loss}}
    found["centre"] = {"": shared.dino.loss.center - official.CENTER_MOMENTUM * center}
    found |= {"gradients": seen["backward"], "clipping": seen["clip"]}
    found["optimiser"] = {n: students[n].detach() - x for n, x in student.items()}
    found["teacher"] = {n: teachers[n].detach() - x for n, x in teacher.items()}
    return found, counted.count if counted else None


def distances(found: Seen, right: Seen) -> dict[str, dict[str, float]]:
    """Relative, in norm."""
    return {
        part: {n: ((x - right[part][n]).norm() / right[part][n].norm()).item() for n, x in tensors.items()}
        for part, tensors in found.items()
    }


def check(variants: dict[str, Variant], crops: list[Tensor]) -> dict[str, Row]:
    """How far each variant is from official DINO in float32, and waits; SystemExit where one is too far."""
    observed: dict[tuple[int, torch.dtype], tuple[Seen, int | None]] = {}

    def published(count: int, shared: Shared, dtype: torch.dtype) -> tuple[Seen, int | None]:
        if (count, dtype) not in observed:
            observed[count, dtype] = observe(other_variant(shared, dtype), crops[:count])
        return observed[count, dtype]

    rows: dict[str, Row] = {}
    for name, variant in variants.items():
        update, shared, dtype = variant.update, variant.shared, variant.update.dtype
        lightly = isinstance(update, official.Lightly)
        # timm resizes position embeddings otherwise: its features of local crops are others
        count = 2 if lightly and shared.vit else len(crops)
        exact, plain = (published(count, shared, x) for x in (torch.float32, dtype))
        same = type(update) is official.Update and not variant.compiled
        found, waits = plain if same else observe(variant, crops[:count])
        off, rough = distances(found, exact[0]), distances(plain[0], exact[0])
        for part, by_name in off.items():
            for n, error in by_name.items():
                limit = REST + 2 * rough[part][n] if rough[part][n] < PLAIN else 0.0
                limit = {"loss": LOSS[dtype], "gradients": limit, "centre": limit}.get(part, STEPS)
                if not error < limit and not (lightly and part == "clipping"):  # it clips by the norm of all
                    raise SystemExit(f"{name} in {dtype}: {part} off by {error:.1e}: nothing was timed")
        rows[name] = {"loss": off["loss"][""], "centre": off["centre"][""]}
        rows[name] |= {"gradients": max(off["gradients"].values()), "waits": waits}
    return rows
