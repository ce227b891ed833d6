"""Official DINO's update written from its formulas, and lightly's: what fastdino is held to.

Written from the paper (arXiv:2104.14294, algorithm 1 and appendix) and the published defaults; shares no code
with fastdino but the parameters that it is given. `tests/helpers/reference.py` runs the same update in
float64 as the truth of the tests; `benchmarks/update.py` times it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino import vit

STUDENT_TEMP, TEACHER_TEMP, CENTER_MOMENTUM = 0.1, 0.04, 0.9
MOMENTUM = 0.996


def cross_entropy(
    student: Any, teacher: Any, center: Tensor, student_temp: Any, teacher_temp: Any, once: bool = False
) -> Tensor:
    """The mean of 2 V - 2 cross-entropies, of a teacher's crop and another crop of the student, one by one.

    Of V crops' logits (B, K) and 2 of the teacher's, in float32 or more, as under autocast; the division
    stays in the logits' precision, as there. `once`: take each crop's log-softmax once, not once for each
    pair, which rounds the gradient otherwise.
    """

    def log_p(v: int) -> Tensor:
        x = student[v] / student_temp
        return torch.log_softmax(x, -1, dtype=torch.promote_types(x.dtype, torch.float32))

    if once:
        log_p = functools.cache(log_p)
    q = [torch.softmax((t - center) / teacher_temp, -1).detach() for t in teacher]
    terms = [
        torch.sum(-q[g] * log_p(v), -1).mean()
        for g in range(len(teacher))
        for v in range(len(student))
        if v != g
    ]
    return sum(terms[1:], terms[0]) / len(terms)


def clip_(student: nn.Module, limit: float) -> float:
    """Each tensor by its own norm, which the host reads and waits for, and waits again to compare."""
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
def ema_loop_(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """The teacher's moving average, tensor by tensor."""
    for s, t in zip(student.parameters(), teacher.parameters(), strict=True):
        t.mul_(momentum).add_((1 - momentum) * s)


def param_groups(student: nn.Module) -> list[Any]:
    """With weight decay, and without it: biases and one-dimensional parameters."""
    groups: list[Any] = [{"params": []}, {"params": [], "weight_decay": 0.0}]
    for name, p in student.named_parameters():
        if p.requires_grad:
            groups[name.endswith(".bias") or p.ndim == 1]["params"].append(p)
    return groups


@torch.no_grad()
def sinkhorn(teacher: Tensor, temperature: float = TEACHER_TEMP) -> Tensor:
    """DINOv2's Sinkhorn-Knopp: teacher logits (B, K) to probabilities."""
    q = torch.exp(teacher / temperature).t()
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(dim=1, keepdim=True) * len(q)
        q /= q.sum(dim=0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).t()


class Update:
    """Official DINO's update of a student and a teacher, which map a list of crops to logits, crop-major.

    The optimiser's settings are the caller's. `center` (1, K) changes in place; `clip` is the largest norm
    of a tensor's gradient; float16 comes with loss scaling; `compiled` compiles networks and loss.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        optimizer: torch.optim.Optimizer,
        center: Tensor,
        clip: float,
        *,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        once: bool = False,
    ) -> None:
        self.student, self.teacher, self.optimizer, self.center = student, teacher, optimizer, center
        self.limit, self.dtype, self.compiled, self.once = clip, dtype, compiled, once
        self.temp, self.momentum, self.freeze_last_layer = TEACHER_TEMP, MOMENTUM, False
        self.kind = center.device.type
        self.scaler = torch.amp.GradScaler(self.kind, enabled=dtype == torch.float16)
        self.loss: Callable[..., Tensor] = cross_entropy
        if compiled:
            for network in (student, teacher):
                network.compile(dynamic=False)
            self.loss = torch.compile(cross_entropy, dynamic=False)

    def __call__(self, crops: list[Tensor]) -> Tensor:
        """One update; its loss, whose value the host has read."""
        loss, teacher = self.gradients(crops)
        self.clip()
        self.step_student()
        self.move_teacher(teacher)
        loss.item()  # for the log
        if self.kind == "cuda":
            torch.cuda.synchronize()
        return loss

    def cross_entropy(self, student: Tensor, teacher: Tensor, views: int) -> Tensor:
        """The loss of the logits (V B, K) and (2 B, K)."""
        s, t = student.unflatten(0, (views, -1)), teacher.unflatten(0, (2, -1))
        return self.loss(s, t, self.center[0], STUDENT_TEMP, self.temp, self.once)

    def gradients(self, crops: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Forward and backward passes; the loss and the teacher's logits."""
        with torch.autocast(self.kind, self.dtype, enabled=self.dtype not in (torch.float32, torch.float64)):
            with torch.no_grad():
                teacher = self.teacher(crops[:2])
            loss = self.cross_entropy(self.student(crops), teacher, len(crops))
        if not math.isfinite(loss.item()):
            raise SystemExit("the loss is not finite: nothing was timed")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        return loss, teacher

    def clip(self) -> None:
        """Clip the gradients, and drop those of frozen prototypes."""
        self.scaler.unscale_(self.optimizer)
        clip_(self.student, self.limit)
        if self.freeze_last_layer:
            for name, p in self.student.named_parameters():
                if "last_layer" in name:
                    p.grad = None

    def step_student(self) -> None:
        """The optimiser's step."""
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @torch.no_grad()
    def move_teacher(self, teacher: Tensor) -> None:
        """Moving average and centre."""
        ema_loop_(self.teacher, self.student, self.momentum)
        mean = teacher.mean(dim=0, keepdim=True)
        self.center.copy_(self.center * CENTER_MOMENTUM + mean * (1 - CENTER_MOMENTUM))


# Official DINO's network, on the parameters of fastdino's.


def plain(layer: nn.Linear) -> nn.Linear:
    """A linear layer as torch's own, with the same parameters."""
    found = nn.Linear(1, 1, bias=False)
    found.weight, found.bias = layer.weight, layer.bias
    return found


class Block(nn.Module):
    """A block of official DINO's ViT with a fastdino block's parameters.

    The drop rate is a tensor: the check, which sets it to 0, then runs the graph that is timed.
    """

    rate: Tensor

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.qkv, self.proj = plain(block.attn.qkv), plain(block.attn.proj)
        self.fc1, self.fc2 = plain(block.mlp.fc1), plain(block.mlp.fc2)
        self.heads, self.drop_rate = block.attn.num_heads, block.drop_rate
        self.register_buffer("rate", torch.tensor(self.drop_rate, device=block.norm1.weight.device))

    def drop(self, x: Tensor) -> Tensor:
        """Stochastic depth: dropped samples are computed and multiplied by 0."""
        if self.drop_rate == 0:
            return x
        keep = 1 - self.rate
        mask = (keep + torch.rand(len(x), 1, 1, dtype=x.dtype, device=x.device)).floor()
        return x / keep * mask.clamp(max=1)  # bfloat16 rounds 1 + 0.998 to 2

    def attend(self, x: Tensor) -> Tensor:
        """Attention with its weights written out."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (d // self.heads) ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attend(self.norm1(x)))
        return x + self.drop(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class Backbone(nn.Module):
    """Official DINO's ViT over one size of crop; patches, positions and last norm are fastdino's."""

    def __init__(self, ours: vit.VisionTransformer) -> None:
        super().__init__()
        self.ours, self.blocks = ours, nn.ModuleList(Block(block) for block in ours.blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ours.prepare_tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.ours.norm(x)[:, 0]


def per_size(network: Callable[[Tensor], Tensor], crops: list[Tensor]) -> Tensor:
    """A pass for each size of crop."""
    sides = dict.fromkeys(x.shape[-1] for x in crops)
    return torch.cat([network(torch.cat([x for x in crops if x.shape[-1] == side])) for side in sides])


class Network(nn.Module):
    """Official backbone and head over crops of several sizes."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.backbone: Any = ours.backbone
        if isinstance(ours.backbone, vit.VisionTransformer):
            self.backbone = Backbone(ours.backbone)
        layers = (plain(x) if isinstance(x, nn.Linear) else x for x in ours.head.mlp)
        self.mlp, self.last_layer = nn.Sequential(*layers), ours.head.last_layer

    def forward(self, crops: list[Tensor]) -> Tensor:
        x = F.normalize(self.mlp(per_size(self.backbone, crops)), dim=-1)
        return F.linear(x, torch._weight_norm(self.last_layer.weight_v, self.last_layer.weight_g, 0))


def still(network: nn.Module, still: bool) -> None:
    """Turn stochastic depth off, or on again; batch norm keeps to its batches."""
    for module in network.modules():
        if isinstance(module, Block):
            module.rate.fill_(0.0 if still else module.drop_rate)
        elif isinstance(module, vit.VisionTransformer) or type(module).__module__.startswith("timm."):
            module.train(not still)


# lightly.


def adopt(module: nn.Module, parameters: dict[str, nn.Parameter]) -> nn.Module:
    """Have a module use these parameters in place of its own, by name."""
    own = {name for name, _ in module.named_parameters()}
    if own != parameters.keys():
        raise SystemExit(f"other parameters than fastdino's: {sorted(own ^ parameters.keys())}")
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, parameter)
    return module


def timm_vit(ours: vit.VisionTransformer, rate: float) -> nn.Module:
    """timm's ViT with the parameters of fastdino's and a rate of stochastic depth."""
    from timm.models.vision_transformer import VisionTransformer

    sizes: Any = {"img_size": ours.grid[0] * ours.patch_size, "patch_size": ours.patch_size, "num_classes": 0}
    sizes |= {"embed_dim": ours.embed_dim, "depth": len(ours.blocks), "num_heads": ours.num_heads}
    with torch.device("meta"):
        network = VisionTransformer(**sizes, dynamic_img_size=True, drop_path_rate=rate)
    return adopt(network, dict(ours.named_parameters()))


class LightlyNetwork(nn.Module):
    """timm's ViT, or torchvision's ResNet, and lightly's head, with fastdino's parameters."""

    def __init__(self, ours: Any, rate: float) -> None:
        from lightly.models.modules import DINOProjectionHead

        super().__init__()
        self.backbone, self.patch = ours.backbone, getattr(ours.backbone, "patch_size", 1)
        if isinstance(ours.backbone, vit.VisionTransformer):
            self.backbone = timm_vit(ours.backbone, rate)
        first, (out_dim, bottleneck) = ours.head.mlp[0], ours.head.last_layer.weight_v.shape
        with torch.device("meta"):
            head = DINOProjectionHead(first.in_features, first.out_features, bottleneck, out_dim)
        self.head = adopt(head, {n.replace("mlp.", "layers."): p for n, p in ours.head.named_parameters()})

    def forward(self, crops: list[Tensor]) -> Tensor:
        # timm takes only whole patches; a strided convolution leaves out the same pixels
        whole = [x.shape[-1] // self.patch * self.patch for x in crops]
        return self.head(per_size(self.backbone, [x[..., :n, :n] for x, n in zip(crops, whole, strict=True)]))


class Lightly(Update):
    """lightly's loss and moving average, torch's clipping by the common norm."""

    def __init__(self, *args: Any, **options: Any) -> None:
        from lightly.loss import DINOLoss

        super().__init__(*args, **options)
        self.criterion = DINOLoss(self.center.shape[1]).to(self.center.device)

    def cross_entropy(self, student: Tensor, teacher: Tensor, views: int) -> Tensor:
        """The loss, which moves lightly's centre."""
        self.criterion.center = self.center[None]
        return self.criterion(list(teacher.chunk(2)), list(student.chunk(views)), teacher_temp=self.temp)

    def clip(self) -> None:
        """By the norm of all."""
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.student.parameters(), self.limit)

    def move_teacher(self, teacher: Tensor) -> None:
        """Moving average and centre."""
        from lightly.models.utils import update_momentum

        update_momentum(self.student, self.teacher, m=self.momentum)
        self.center.copy_(self.criterion.center[0])
