"""DINOLoss: the teacher's centre and temperature schedule around `ops.dino_loss` (paper, section 3.1)."""

from typing import Literal

import torch
from torch import Tensor, nn

from fastdino import ops
from fastdino.distributed import mean_over_ranks_
from fastdino.optim import teacher_temperatures


class DINOLoss(nn.Module):
    """Official DINO's loss, same constructor, `forward` and buffer, in one pass over the logits.

    With S student crops of which the first two are global, B images and K prototypes, the loss is the mean
    over images and over the 2 S - 2 pairs of a teacher crop g and a student crop v != g of the cross-entropy
    between softmax((teacher[g] - center) / teacher_temp) and softmax(student[v] / student_temp). Afterwards
    center <- m center + (1 - m) mean(teacher rows), averaged over the ranks if a process group exists; none
    is needed.

    With `centering="sinkhorn"` the centre is instead the one that Sinkhorn-Knopp finds for each call's
    teacher rows, of all ranks together, with which all prototypes are used alike (paper, table 7); the buffer
    `center` stays as it is.

    Args:
        out_dim: K, prototypes.
        ncrops: S, student crops per image, the two global ones first.
        warmup_teacher_temp: teacher temperature of the first epoch.
        teacher_temp: teacher temperature after the warm-up.
        warmup_teacher_temp_epochs: epochs of linear warm-up; the last of them has `teacher_temp` already.
        nepochs: epochs of the run.
        student_temp: student temperature.
        center_momentum: m.
        centering: "ema", or "sinkhorn" with three iterations.

    Raises:
        ValueError: a size or temperature that is not positive, a warm-up longer than the run, or an unknown
            centering.
    """

    center: Tensor  # (1, K) float32, not trained, saved

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        centering: Literal["ema", "sinkhorn"] = "ema",
    ) -> None:
        super().__init__()
        if out_dim < 1:
            raise ValueError(f"out_dim is {out_dim}: give the number of prototypes, 1 or more")
        if ncrops < 2:
            raise ValueError(f"ncrops is {ncrops}: the loss compares two global crops at least")
        if not 0 <= warmup_teacher_temp_epochs <= nepochs:
            raise ValueError(
                f"warmup_teacher_temp_epochs is {warmup_teacher_temp_epochs} but the run has nepochs = "
                f"{nepochs}: give a warm-up between 0 and nepochs"
            )
        for name, value in (
            ("warmup_teacher_temp", warmup_teacher_temp),
            ("teacher_temp", teacher_temp),
            ("student_temp", student_temp),
        ):
            if not value > 0:
                raise ValueError(f"{name} is {value}: a temperature is above 0")
        if not 0 <= center_momentum <= 1:
            raise ValueError(f"center_momentum is {center_momentum}: a momentum lies between 0 and 1")
        if centering not in ("ema", "sinkhorn"):
            raise ValueError(f"centering is {centering!r}: give ema or sinkhorn")
        self.centering = centering
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.ncrops = ncrops
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.teacher_temp_schedule = teacher_temperatures(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs
        )

    def forward(self, student_output: Tensor, teacher_output: Tensor, epoch: int) -> Tensor:
        """The loss, with the centre updated after its use.

        Args:
            student_output: (ncrops * B, K), crop-major: all images' first crop, then all images' second, ...
            teacher_output: (2 * B, K), the global crops in the same order. No gradient flows into it.
            epoch: from 0; selects the teacher temperature.

        Returns:
            Scalar, float32 whatever the precision of the logits (float64 for float64).

        Raises:
            ValueError: shapes that do not fit one another or the constructor, or an epoch outside the
                schedule.
        """
        loss, teacher_mean = self.cross_entropy(student_output, teacher_output, self.teacher_temp(epoch))
        self.update_center(teacher_mean)
        return loss

    def teacher_temp(self, epoch: int) -> Tensor:
        """The teacher temperature of an epoch, from 0: a scalar on the CPU; ValueError outside the schedule.

        A tensor, so that torch.compile makes no graph of its own for each epoch.
        """
        last = len(self.teacher_temp_schedule) - 1
        if not 0 <= epoch <= last:
            raise ValueError(f"epoch is {epoch} but the schedule was made for epochs 0 to {last} (nepochs)")
        return torch.from_numpy(self.teacher_temp_schedule)[epoch]

    def current_center(self, teacher_output: Tensor, teacher_temp: float | Tensor) -> Tensor:
        """The centre (K,) subtracted from these teacher logits (..., K): the only place that chooses one."""
        if self.centering == "sinkhorn":
            return ops.sinkhorn_center(teacher_output, teacher_temp)
        return self.center[0].clone()  # the backward reads it, perhaps after update_center has written

    def cross_entropy(
        self,
        student_output: Tensor,
        teacher_output: Tensor,
        teacher_temp: float | Tensor,
        *,
        inplace_backward: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The loss of `forward`, leaving the centre as it is, and the mean (K,) of the teacher's rows.

        The mean comes out of the loss's pass over them and is for `update_center`. `inplace_backward` writes
        the gradient over `student_output`, which nobody may read after the loss (see `ops.dino_loss`).
        """
        out_dim = self.center.shape[1]
        given = f"student_output {tuple(student_output.shape)}, teacher_output {tuple(teacher_output.shape)}"
        if student_output.dim() != 2 or teacher_output.dim() != 2:
            raise ValueError(f"{given}: give two matrices, rows by out_dim {out_dim}")
        if student_output.shape[1] != out_dim or teacher_output.shape[1] != out_dim:
            raise ValueError(f"{given}: the last dimension must be out_dim {out_dim}")
        images, rest = divmod(len(teacher_output), 2)
        if images == 0 or rest or len(student_output) != self.ncrops * images:
            raise ValueError(
                f"{given}: for B images the student has ncrops * B = {self.ncrops} B rows, the teacher 2 B"
            )
        loss, teacher_mean = ops.dino_loss(
            student_output.unflatten(0, (self.ncrops, images)),
            teacher_output.detach().unflatten(0, (2, images)),
            self.current_center(teacher_output, teacher_temp),
            student_temp=self.student_temp,
            teacher_temp=teacher_temp,
            inplace_backward=inplace_backward,
            return_teacher_mean=True,
        )
        return loss, teacher_mean

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """center <- m center + (1 - m) mean of `teacher_output` (..., K) over all but K, and over ranks.

        Does nothing where the centre is Sinkhorn's.
        """
        if self.centering == "ema":
            rows = teacher_output.to(self.center.dtype).reshape(-1, self.center.shape[1])
            self.move_center(mean_over_ranks_(rows.mean(dim=0)))

    @torch.no_grad()
    def move_center(self, mean: Tensor) -> None:
        """`update_center` with a mean (K,) that is over all images, global crops and ranks already.

        A trainer all-reduces it while the backward pass runs.
        """
        if self.centering == "ema":
            self.center.lerp_(mean.to(self.center.dtype).unsqueeze(0), 1 - self.center_momentum)
