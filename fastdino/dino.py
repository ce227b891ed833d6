"""DINO: a student that sees all crops matches a teacher that sees the global ones (paper, section 3.1)."""

from itertools import groupby

import torch
from torch import Tensor, nn

from fastdino import adapter, distributed, ops
from fastdino.backbones import build_backbone
from fastdino.config import Config, resolved, temperature_warmup
from fastdino.head import DINOHead
from fastdino.loss import DINOLoss
from fastdino.vit import VisionTransformer
from fastdino.weights import load_networks


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
        out_dim = resolved(model.out_dim)

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
            temperature_warmup(config),
            config.optim.epochs,
            method.student_temp,
            method.center_momentum,
            method.centering,
        )
        self.teacher_update = method.teacher_update

    def load_weights(self, path: str) -> list[str]:
        """Begin with the weights in `path`, any that `weights.read_weights` reads; see `load_networks`."""
        return load_networks(path, self.student, self.teacher, self.loss.center)

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
