"""DINO: a student that sees all crops matches a teacher that sees the global ones (paper, section 3.1)."""

import math
from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor, nn

from fastdino import checkpoint, ops, resnet, vit
from fastdino.config import Config, ModelConfig
from fastdino.head import DINOHead
from fastdino.loss import DINOLoss

VITS: dict[str, Callable[..., vit.VisionTransformer]] = {
    "vit_nano": vit.vit_nano,
    "vit_tiny": vit.vit_tiny,
    "vit_small": vit.vit_small,
    "vit_base": vit.vit_base,
    "vit_large": vit.vit_large,
}


def build_backbone(config: ModelConfig, image_size: int = 224, drop_path_rate: float = 0.0) -> nn.Module:
    """The network that `config.arch` names: (B, 3, H, W) to (B, embed_dim) features.

    `image_size` is the side in pixels whose patch grid the position embedding is made for.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if config.arch in VITS:
        return VITS[config.arch](config.patch_size, img_size=image_size, drop_path_rate=drop_path_rate)
    if config.arch in resnet.NAMES:
        return resnet.resnet(config.arch)
    raise ValueError(f"--arch {config.arch} is unknown: choose from {', '.join([*VITS, *resnet.NAMES])}")


def network_of(state: dict[str, Tensor]) -> nn.Module:
    """The network whose tensors these are, untrained: a ViT with heads of 64 channels, or a ResNet.

    Raises:
        ValueError: they are of neither.
    """
    if "conv1.weight" in state:
        shapes = {name: tensor.shape for name, tensor in state.items()}
        for name in resnet.NAMES:
            with torch.device("meta"):
                candidate = resnet.resnet(name)
            if {n: t.shape for n, t in candidate.state_dict().items()} == shapes:
                return resnet.resnet(name)
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    if missing := [name for name in needed if name not in state]:
        raise ValueError(
            f"these are not the tensors of a ViT (no {', '.join(missing)}) or a ResNet of torchvision: there "
            f"are {', '.join(list(state)[:6])}, ..."
        )
    dim, patches = state["cls_token"].shape[-1], state["pos_embed"].shape[1] - 1
    side, filters = math.isqrt(patches), state["patch_embed.proj.weight"]
    if side * side != patches or dim % 64:
        raise ValueError(
            f"a ViT of width {dim} with {patches} positions: only square grids and heads of 64 are known"
        )
    return vit.VisionTransformer(
        img_size=side * filters.shape[-1],
        patch_size=filters.shape[-1],
        in_chans=filters.shape[1],
        embed_dim=dim,
        depth=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        num_heads=dim // 64,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
    )


def load_backbone(path: str, device: str | torch.device = "cpu") -> nn.Module:
    """The backbone in `path`, in evaluation mode.

    `path` is a run's folder, its teacher.safetensors, or weights of official DINO (a full checkpoint, of
    which the teacher is taken, or a backbone) or of timm with the same names (`vit_*.dino`), torch-saved or
    as safetensors. The network is built after the tensors' shapes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, or tensors that fit no known network; the message lists all
            that are missing, unexpected or of another shape.
    """
    if checkpoint.is_ours(path):
        tensors, config = checkpoint.read_teacher(path)
        state = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
        backbone = build_backbone(config.model, config.data.crops.global_crops_size)
    else:
        state = checkpoint.read_backbone(path)
        backbone = network_of(state)
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from None
    return backbone.to(device).eval().requires_grad_(False)


class MultiCrop(nn.Module):
    """Backbone and head over crops of several sizes: one backbone pass per size, one head pass over all."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: list[Tensor]) -> Tensor:
        """V crops (B, C, H, W) to logits (V * B, K), crop-major. Neighbours of one size share a pass."""
        groups = [torch.cat(list(group)) for _, group in groupby(crops, key=lambda crop: crop.shape[-2:])]
        return self.head(torch.cat([self.backbone(group) for group in groups]))


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

        def network(drop_path_rate: float, norm_last_layer: bool) -> MultiCrop:
            backbone = build_backbone(model, crops.global_crops_size, drop_path_rate)
            head = DINOHead(
                backbone.embed_dim,  # type: ignore[arg-type]
                model.out_dim,
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
        warmup = method.warmup_teacher_temp_epochs
        self.loss = DINOLoss(
            model.out_dim,
            crops.n_views,
            method.warmup_teacher_temp,
            method.teacher_temp,
            # Three tenths of the run, as published for 100 epochs, where the warm-up asked for does not fit.
            warmup if warmup <= config.optim.epochs else round(0.3 * config.optim.epochs),
            config.optim.epochs,
            method.student_temp,
            method.center_momentum,
            method.centering,
        )
        self.teacher_update = method.teacher_update

    def forward(self, crops: list[Tensor], epoch: int) -> tuple[Tensor, Tensor]:
        """Loss of one batch, and the mean of its teacher logits for `loss.update_center`.

        The centre is left to the caller so that a batch run in pieces updates it once, with the mean of the
        means.

        Args:
            crops: V tensors (B, C, H, W), the global crops first.
            epoch: from 0; selects the teacher temperature.

        Returns:
            loss: scalar, float32.
            teacher_mean: (K,), float32.
        """
        with torch.no_grad():
            teacher_output = self.teacher(crops[: self.n_global])
        student_output = self.student(crops)
        # these logits have no other reader: the last layer's backward needs its input alone
        return self.loss.cross_entropy(student_output, teacher_output, epoch, inplace_backward=True)

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
