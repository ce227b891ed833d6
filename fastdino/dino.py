"""DINO: a student that sees all crops matches a teacher that sees the global ones (paper, section 3.1)."""

import functools
import math
import re
import warnings
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from fastdino import adapter, checkpoint, distributed, ops, optim, vit
from fastdino.config import Config, ModelConfig, number
from fastdino.head import DINOHead
from fastdino.loss import DINOLoss
from fastdino.vit import VisionTransformer, resize_positions

VITS: dict[str, Callable[..., VisionTransformer]] = {
    "vit_nano": vit.vit_nano,
    "vit_tiny": vit.vit_tiny,
    "vit_small": vit.vit_small,
    "vit_base": vit.vit_base,
    "vit_large": vit.vit_large,
    "vit_huge": vit.vit_huge,
    "vit_giant": vit.vit_giant,
}


def build_backbone(config: ModelConfig, image_size: int = 224, drop_path_rate: float = 0.0) -> nn.Module:
    """The network that `config.arch` names, untrained: (B, 3, H, W) to (B, D) features.

    `image_size` is the side in pixels whose patch grid a ViT's position embedding is made for.

    Raises:
        ValueError: an unknown name; the message lists known ones.
    """
    library, _, name = config.arch.rpartition(":")
    if config.arch in VITS:
        return VITS[config.arch](
            config.patch_size,
            img_size=image_size,
            drop_path_rate=drop_path_rate,
            init_values=config.layer_scale or None,
            **_registers(config.num_register_tokens),
        )
    if library == "torchvision" or config.arch in adapter.RESNETS:
        return adapter.torchvision_backbone(name, drop_path_rate)
    if library == "timm":
        return adapter.timm_backbone(name, drop_path_rate)
    raise ValueError(
        f"--arch {config.arch} is unknown: choose from {', '.join([*VITS, *adapter.RESNETS])}, "
        "torchvision:NAME, timm:NAME"
    )


# Classifiers, by the names of torchvision, timm and official DINO, and what DINOv2 masks patches with.
NO_BACKBONE = re.compile(
    r"(heads?|head_dist|heads_dist|aux_head|fc|classifier|classif|last_linear)\.|mask_token$"
)


def _registers(n: int) -> dict[str, Any]:
    """Options of a ViT with n registers: DINOv2 resizes position embeddings otherwise since it has them."""
    return {"num_register_tokens": n} | (
        {"interpolate_antialias": True, "interpolate_offset": 0.0} if n else {}
    )


@functools.cache
def _sizes() -> dict[tuple[int, int], tuple[str, int]]:
    """Name and number of heads of each ViT by width and depth."""
    with torch.device("meta"):
        made = {name: make() for name, make in VITS.items()}
    return {(vit.embed_dim, len(vit.blocks)): (name, vit.num_heads) for name, vit in made.items()}


def network_of(state: dict[str, Tensor]) -> nn.Module:
    """The network whose tensors these are, untrained: a ResNet or a ViT.

    Its heads, which no tensor tells, are those of the ViT of its width and depth here, else 64 channels wide.

    Raises:
        ValueError: they are of neither.
    """
    if "conv1.weight" in state:
        shapes = {name: tensor.shape for name, tensor in state.items() if not name.startswith("fc.")}
        for name in adapter.RESNETS:
            with torch.device("meta"):
                candidate = adapter.torchvision_backbone(name)
            if {n: t.shape for n, t in candidate.state_dict().items()} == shapes:
                return adapter.torchvision_backbone(name)
    state = checkpoint.vit_names(state)
    ffn = "swiglu" if "blocks.0.mlp.w3.weight" in state else "mlp"
    last = f"blocks.0.mlp.{'w3' if ffn == 'swiglu' else 'fc2'}.weight"
    needed = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, last: 2}  # and their dimensions
    if missing := [name for name, ndim in needed.items() if name not in state or state[name].ndim != ndim]:
        raise ValueError(
            f"these are not the tensors of a ViT (no {', '.join(missing)}) or a ResNet of torchvision: there "
            f"are {', '.join(list(state)[:6])}, ..."
        )
    dim, patches = state["cls_token"].shape[-1], state["pos_embed"].shape[1] - 1
    side, filters = math.isqrt(patches), state["patch_embed.proj.weight"]
    depth = 1 + max(int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name)))
    _, heads = _sizes().get((dim, depth), ("", dim // 64))
    if side * side != patches or not heads or dim % heads:
        raise ValueError(
            f"a ViT of width {dim} with {patches} positions: only square grids and heads of 64 are known"
        )
    # a SwiGLU is two thirds as wide as its ratio says
    ratio = state[last].shape[1] / dim * (1.5 if ffn == "swiglu" else 1)
    registers = state.get("register_tokens")
    return VisionTransformer(
        img_size=side * filters.shape[-1],
        patch_size=filters.shape[-1],
        in_chans=filters.shape[1],
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=ratio,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        init_values=1e-5 if "blocks.0.ls1.gamma" in state else None,
        ffn_layer=ffn,  # type: ignore[arg-type]
        **_registers(0 if registers is None else registers.shape[1]),
    )


def flags_of(state: dict[str, Tensor]) -> str:
    """The flags of `fastdino-train` for a ViT with these tensors; empty if it is none of those by name."""
    try:
        with torch.device("meta"):
            network: Any = network_of(state)
        arch, _ = _sizes()[network.embed_dim, len(network.blocks)]
    except (ValueError, KeyError, AttributeError):
        return ""
    flags = {"arch": arch, "patch-size": network.patch_size}
    if network.num_register_tokens:
        flags["num-register-tokens"] = network.num_register_tokens
    if "blocks.0.ls1.gamma" in state:
        flags["layer-scale"] = 1e-5
    return " ".join(f"--{name} {value}" for name, value in flags.items())


def fit(network: nn.Module, state: dict[str, Tensor], where: str) -> list[str]:
    """Load a backbone's tensors into `network`; returns a sentence on each thing that is not as in the file.

    A position embedding of another grid is resized as for images of another size, so that the features are
    those that the file's own network gives for them. Classifiers and DINOv2's mask token are left out.

    Raises:
        ValueError: tensors that are missing, unexpected or of another shape, all listed.
    """
    own, notes = network.state_dict(), []
    if isinstance(network, VisionTransformer):
        state = checkpoint.vit_names(state)
        old, new = state.get("pos_embed"), own["pos_embed"]
        if old is not None and old.ndim == 3 and old.shape != new.shape and old.shape[-1] == new.shape[-1]:
            side = math.isqrt(old.shape[1] - 1)
            if side * side == old.shape[1] - 1:
                options = _registers(1 if "register_tokens" in state else 0)  # as its network resizes it
                offset, antialias = (
                    options.get("interpolate_offset", 0.1),
                    "interpolate_antialias" in options,
                )
                state["pos_embed"] = resize_positions(
                    old.float(), (side, side), network.grid, offset, antialias
                )
                rows, columns = network.grid
                notes.append(f"position embedding resized from {side} x {side} to {rows} x {columns} patches")
    left_out = [name for name in state if name not in own and NO_BACKBONE.match(name)]
    if left_out:
        notes.append(f"left out, no part of a backbone: {', '.join(left_out)}")
    state = {name: tensor for name, tensor in state.items() if name not in left_out}
    problems = [
        *(f"missing: {name}" for name in own if name not in state),
        *(f"unexpected: {name}" for name in state if name not in own),
        *(
            f"of another shape: {name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in state and state[name].shape != tensor.shape
        ),
    ]
    if problems:
        flags = flags_of(state)
        raise ValueError(
            f"the backbone of {where} does not fit:\n  "
            + "\n  ".join(problems)
            + (f"\nThe file is {flags}." if flags else "")
        )
    own.update(state)  # keeps the versions by which some modules of torchvision read their tensors
    network.load_state_dict(own)
    return notes


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def load_backbone(path: str, device: str | torch.device = "cpu", arch: str = "") -> nn.Module:
    """The backbone in `path`, in evaluation mode.

    Args:
        path: a run's folder, its teacher.safetensors, or weights of official DINO (a full checkpoint, of
            which the teacher is taken, or a backbone), DINOv2, or timm's ViTs, torch-saved or as safetensors.
        device: where to put it.
        arch: the network, as `fastdino-train --arch`, for weights of others that are no ViT or ResNet; else
            it is built after the tensors' shapes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, or tensors that fit no known network; the message lists all
            that are missing, unexpected or of another shape.

    What is left out of a file of others, such as a classifier, is said in a warning.
    """
    weights = checkpoint.read_weights(path)
    state = _part(weights.teacher, "backbone.")
    if weights.config:
        backbone = build_backbone(weights.config.model, weights.config.data.crops.global_crops_size)
    else:
        backbone = build_backbone(ModelConfig(arch=arch)) if arch else network_of(state)
    for note in fit(backbone, state, path):
        warnings.warn(f"{path}: {note}", stacklevel=2)
    return backbone.to(device).eval().requires_grad_(False)


class MultiCrop(nn.Module):
    """Backbone and head over crops of several sizes; `features` are the backbone's (V * B, D), last time."""

    features: Tensor

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: list[Tensor], freeze_backbone: bool = False) -> Tensor:
        """V crops (B, C, H, W) to logits (V * B, K), crop-major; without a gradient for a frozen backbone.

        A ViT takes all sizes in one pass, other networks neighbours of one size.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not freeze_backbone):
            if isinstance(self.backbone, VisionTransformer):
                features = self.backbone(crops)
            else:
                sizes = groupby(crops, key=lambda crop: crop.shape[-2:])
                features = torch.cat([self.backbone(torch.cat(list(same))) for _, same in sizes])
        self.features = features.detach()
        return self.head(features)


class DINO(nn.Module):
    """Student, teacher, loss. The teacher starts equal, gets no gradient and has no drop path.

    Args:
        config: the run; its model, method, crops and epochs are used.

    Attributes:
        student, teacher: `MultiCrop`; they share no tensor.
        loss: `DINOLoss`, which holds the centre.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        model, method, crops = config.model, config.method, config.data.crops
        out_dim = number(model.out_dim)

        def network(drop_path_rate: float, norm_last_layer: bool) -> MultiCrop:
            backbone = build_backbone(model, crops.global_crops_size, drop_path_rate)
            sizes = [crops.global_crops_size] + [crops.local_crops_size] * (crops.local_crops_number > 0)
            head = DINOHead(
                backbone.embed_dim
                if isinstance(backbone, VisionTransformer)
                else adapter.feature_dim(backbone, model.arch, sizes),
                out_dim,
                use_bn=model.use_bn_in_head,
                norm_last_layer=norm_last_layer,
                nlayers=model.head_layers,
                hidden_dim=model.head_hidden_dim,
                bottleneck_dim=model.bottleneck_dim,
            )
            return MultiCrop(backbone, head)

        self.n_global = crops.n_global
        self.student = network(model.drop_path_rate, model.norm_last_layer)
        self.teacher = network(0.0, True).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.loss = DINOLoss(
            out_dim,
            crops.n_views,
            method.warmup_teacher_temp,
            method.teacher_temp,
            optim.temperature_warmup_epochs(config),
            config.optim.epochs,
            method.student_temp,
            method.center_momentum,
            method.centering,
        )
        self.teacher_update = method.teacher_update

    def load_weights(self, path: str) -> list[str]:
        """Begin with the weights in `path`, any that `checkpoint.read_weights` reads: student, teacher, and
        where they fit head and centre. Returns what was taken and what was not, for people.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that cannot be read, or a backbone that does not fit.
        """
        weights = checkpoint.read_weights(path)
        networks = ((self.teacher, weights.teacher), (self.student, weights.student))
        notes, unfit, heads = [f"{path}: {weights.kind}"], [], []
        for network, tensors in networks:
            notes += fit(network.backbone, _part(tensors, "backbone."), path)
            heads.append(_part(tensors, "head."))
            own = network.head.state_dict()
            unfit += [
                f"{name} {tuple(heads[-1][name].shape) if name in heads[-1] else 'missing'}, here "
                f"{tuple(own[name].shape) if name in own else 'none'}"
                for name in own | heads[-1]
                if name not in heads[-1] or name not in own or heads[-1][name].shape != own[name].shape
            ]
            if others := [name for name in tensors if not name.startswith(("backbone.", "head."))]:
                notes.append(f"left out: {', '.join(others)}")
        if not any(heads):
            notes.append("a new head")
        elif unfit:
            notes.append(f"a new head, for the file's does not fit: {'; '.join(dict.fromkeys(unfit))}")
        else:
            for (network, _), head in zip(networks, heads, strict=True):
                network.head.load_state_dict(head)
            notes.append("with its head")
            if weights.center is not None and weights.center.shape == self.loss.center.shape:
                self.loss.center.copy_(weights.center)
                notes.append("with its centre")
        return list(dict.fromkeys(notes))  # teacher and student mostly say the same

    def forward(
        self, crops: list[Tensor], epoch: int, freeze_backbone: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Loss of one batch, and the mean of its teacher logits for `loss.update_center`.

        The centre is left to the caller so that a batch run in pieces updates it once, with the mean of the
        means.

        Args:
            crops: V tensors (B, C, H, W), the global crops first.
            epoch: from 0; selects the teacher temperature.
            freeze_backbone: the student's head alone gets a gradient.

        Returns:
            loss: scalar, float32.
            teacher_mean: (K,), float32.
        """
        with torch.no_grad():
            teacher_output = self.teacher(crops[: self.n_global])
        student_output = self.student(crops, freeze_backbone)
        # these logits have no other reader: the last layer's backward needs its input alone
        teacher_temp = self.loss.teacher_temp(epoch)
        return self.loss.cross_entropy(student_output, teacher_output, teacher_temp, inplace_backward=True)

    @torch.no_grad()
    def teacher_distance(self) -> Tensor:
        """Norm of the difference of the teacher's parameters from the student's, over the student's norm."""
        pairs = [(t, s) for t, s in zip(self.teacher.parameters(), self.student.parameters(), strict=True)]
        # one tensor at a time: all differences at once would take the memory of a network
        apart = [(distributed.local(t) - distributed.local(s)).norm() for t, s in pairs]
        students = [s for _, s in pairs]
        whole = distributed.norms(students)
        return distributed.norms(apart, like=students[0]).norm() / whole.norm().clamp_min(1e-30)

    @torch.no_grad()
    def update_teacher(self, momentum: float, new_epoch: bool = False) -> None:
        """Move the teacher after a step of the student (paper, section 3.1 and figure 6). Parameters only.

        `momentum`: teacher <- m teacher + (1 - m) student. `student_copy`, `previous_iteration`: teacher <-
        student, called after and before the optimiser's step respectively. `previous_epoch`: teacher <-
        student once `new_epoch` says that an epoch has ended.
        """
        if self.teacher_update == "previous_epoch" and not new_epoch:
            return
        ops.ema_(
            list(self.teacher.parameters()),
            list(self.student.parameters()),
            momentum if self.teacher_update == "momentum" else 0.0,
        )
