"""Schedules, parameter groups, clipping, the frozen last layer, LARS (paper, section 3.2).

Nothing here waits for the device: what must be decided from a gradient's value is decided there.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fastdino.config import Config, OptimConfig, lr_warmup, resolved, temperature_warmup
from fastdino.distributed import is_sharded, local, norms, sharded_like


def cosine(step: int, base: float, final: float, total: int, warmup: int = 0) -> float:
    """Value at `step` of `total`: linear from 0 to `base` over `warmup` steps, then a cosine to `final`.

    As official DINO, the last warm-up step has `base`, and the cosine would reach `final` at step `total`.
    """
    if step < warmup:
        return base * step / max(1, warmup - 1)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def teacher_temperatures(first: float, final: float, warmup_epochs: int, epochs: int) -> np.ndarray:
    """Teacher temperature of each epoch, float64 (epochs,): linear from `first`, then constant at `final`.

    The last epoch of the warm-up has `final` already, as in official DINO.
    """
    warmup = np.linspace(first, final, warmup_epochs)
    return np.concatenate((warmup, np.full(epochs - warmup_epochs, final)))


def peak_lr(config: OptimConfig) -> float:
    """Learning rate after warm-up: `lr` is per 256 images."""
    return resolved(config.lr) * config.batch_size / 256


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What the schedules say of one update; `Schedule.at` makes it."""

    step: int
    """Updates before this one: the first has 0."""
    epoch: int
    """Epochs before this one."""
    lr: float
    """Learning rate of all parameter groups."""
    weight_decay: float
    """Weight decay of the first parameter group; the other has none."""
    momentum: float
    """m in teacher <- m teacher + (1 - m) student."""
    teacher_temp: float
    """Softmax temperature of the teacher."""
    freeze_last_layer: bool
    """The prototypes get neither gradient nor decay."""
    freeze_backbone: bool
    """Only the head learns (--head-warmup-steps)."""
    begins_epoch: bool
    """First update of its epoch."""
    ends_epoch: bool
    """Last update of its epoch."""
    logs: bool = False
    """A metrics line is written after it, with the diagnostics of its batch."""
    saves: bool = False
    """A checkpoint is written after it."""
    evaluates: bool = False
    """k-NN accuracy is measured after it, if the images have labels."""


class Schedule:
    """Every number that changes during a run, as a pure function of the step (paper, appendix B).

    The learning rate rises linearly and then follows a cosine; weight decay and the teacher's momentum follow
    a cosine; the teacher temperature rises linearly by epoch. A warm-up that is longer than the run is
    shortened, which `notes` says.

    Args:
        config: the run; its optim, method and run parts are read.
        steps_per_epoch: updates in one pass over the images, 1 or more.

    Attributes:
        total_steps: updates of the whole run.
        keep_every: updates between two checkpoints that are kept for good; 0 keeps none.
        notes: a sentence on each thing that is not as configured.

    Raises:
        ValueError: no step in an epoch, or a rate or momentum that is `auto`.
    """

    def __init__(self, config: Config, steps_per_epoch: int) -> None:
        cfg, method = config.optim, config.method
        if steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch is {steps_per_epoch}: give the updates of an epoch, 1 or more")
        self.config, self.steps_per_epoch = config, steps_per_epoch
        self.total_steps = cfg.epochs * steps_per_epoch
        self.keep_every = config.run.keep_every_epochs * steps_per_epoch
        self.peak_lr, self.first_momentum = peak_lr(cfg), resolved(method.momentum_teacher)
        self.lr_warmup = int(lr_warmup(cfg) * steps_per_epoch)
        self.teacher_temps = teacher_temperatures(
            method.warmup_teacher_temp, method.teacher_temp, temperature_warmup(config), cfg.epochs
        )
        self.head_warmup = cfg.head_warmup_steps
        self.notes = [
            f"{flag} {asked}: shortened to {share} of the run, which has {cfg.epochs} epochs"
            for flag, asked, share in (
                ("--warmup-epochs", cfg.warmup_epochs, "a tenth"),
                ("--warmup-teacher-temp-epochs", method.warmup_teacher_temp_epochs, "three tenths"),
            )
            if asked != "auto" and asked > cfg.epochs
        ]
        if self.head_warmup >= self.total_steps:
            self.head_warmup = self.total_steps // 10
            self.notes.append(
                f"--head-warmup-steps {cfg.head_warmup_steps}: shortened to {self.head_warmup}, a tenth of "
                f"the run, which has {self.total_steps} updates"
            )

    def at(self, step: int) -> StepSettings:
        """The settings of update `step`, 0 to total_steps - 1; raises ValueError outside of those."""
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step is {step}, but the run has steps 0 to {self.total_steps - 1}")
        cfg, run, total, done = self.config.optim, self.config.run, self.total_steps, step + 1
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        ends_epoch = in_epoch == self.steps_per_epoch - 1
        head_only = self.head_warmup
        if step < head_only:
            lr = self.peak_lr * done / head_only
        else:
            lr = cosine(step - head_only, self.peak_lr, cfg.min_lr, total - head_only, self.lr_warmup)
        saves = done == total or done % run.save_every == 0
        saves |= self.keep_every > 0 and done % self.keep_every == 0
        every = run.knn_every_epochs
        return StepSettings(
            step=step,
            epoch=epoch,
            lr=lr,
            weight_decay=cosine(step, cfg.weight_decay, cfg.weight_decay_end, total),
            momentum=cosine(step, self.first_momentum, 1.0, total),
            teacher_temp=float(self.teacher_temps[epoch]),
            freeze_last_layer=epoch < cfg.freeze_last_layer,
            freeze_backbone=step < head_only,
            begins_epoch=in_epoch == 0,
            ends_epoch=ends_epoch,
            logs=done % run.log_every == 0 or ends_epoch or saves,
            saves=saves,
            evaluates=every > 0 and ends_epoch and ((epoch + 1) % every == 0 or done == total),
        )


def param_groups(model: nn.Module) -> list[dict]:
    """Two groups: with weight decay, and without it (biases and one-dimensional parameters)."""
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (not_decayed if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed}, {"params": not_decayed, "weight_decay": 0.0}]


class LARS(torch.optim.Optimizer):
    """SGD whose rate per tensor is scaled by |weight| / |gradient| (You et al. 2017, arXiv:1708.03888).

    As official DINO: momentum 0.9, trust coefficient 0.001; one-dimensional parameters get neither scaling
    nor decay.
    Like torch's fused optimisers, a step with `self.found_inf` nonzero changes nothing, decided on the
    device.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: list[dict],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the parameters' gradients."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            updates = [p.grad for p in given]
            scaled = [i for i, p in enumerate(given) if p.ndim > 1]
            if scaled:
                for i in scaled:
                    updates[i] = updates[i] + group["weight_decay"] * given[i]
                like = getattr(given[0], "sharded", None)
                weight_norms, update_norms = (norms([x[i] for i in scaled], like) for x in (given, updates))
                trust = torch.where(
                    (weight_norms > 0) & (update_norms > 0), group["eta"] * weight_norms / update_norms, 1.0
                )
                for i, factor in zip(scaled, trust.unbind(), strict=True):
                    updates[i] = updates[i] * factor
            for p, update in zip(given, updates, strict=True):
                buffer = self.state[p]["momentum_buffer"]
                update = group["momentum"] * buffer + update
                if found_inf is not None:
                    buffer.copy_(torch.where(found_inf > 0, buffer, update))
                    p.sub_(torch.where(found_inf > 0, torch.zeros_like(buffer), group["lr"] * buffer))
                else:
                    buffer.copy_(update)
                    p.sub_(group["lr"] * buffer)


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser, with every state tensor in existence, so that a checkpoint always has the same entries.

    A parameter's state made early equals the state made at its first gradient: zeros. AdamW and SGD are
    torch's fused ones, which can skip a non-finite step on the device.

    Of sharded parameters it has this rank's shards, as tensors of their own in the same memory, to which
    `attach_shard_gradients` gives theirs: a fused step knows no DTensor, and needs none.
    """
    groups = param_groups(model)
    for group in groups:
        group["params"] = [_shard(p) for p in group["params"]]
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
        entries = ["exp_avg", "exp_avg_sq"]
    elif config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
        entries = ["momentum_buffer"]
    else:
        optimizer = LARS(groups, lr=0.0)
        entries = ["momentum_buffer"]
    for group in groups:
        for p in group["params"]:
            optimizer.state[p] = {entry: torch.zeros_like(p) for entry in entries}
            if config.optimizer == "adamw":
                optimizer.state[p]["step"] = torch.zeros((), device=p.device)
    return optimizer


def _shard(p: nn.Parameter) -> nn.Parameter:
    if not is_sharded(p):
        return p
    shard = nn.Parameter(local(p.detach()))
    shard.sharded = p  # type: ignore[attr-defined]
    return shard


def attach_shard_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimiser's shards the gradients of the sharded parameters; call it before using those."""
    for group in optimizer.param_groups:
        for shard in group["params"]:
            if (p := getattr(shard, "sharded", None)) is not None:
                shard.grad = None if p.grad is None else local(p.grad)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state tensors by `<parameter name>.<entry>`; writing to them restores the optimiser.

    Of sharded parameters they are sharded as those, on the optimiser's memory.
    """
    shards = {id(getattr(p, "sharded", p)): p for group in optimizer.param_groups for p in group["params"]}
    return {
        f"{name}.{entry}": sharded_like(parameter, value) if value.ndim else value
        for name, parameter in model.named_parameters()
        if id(parameter) in shards
        for entry, value in optimizer.state[shards[id(parameter)]].items()
    }


def cancel_last_layer_gradients(model: nn.Module) -> None:
    """Freeze the prototypes for this step: without a gradient they get neither update nor decay."""
    for name, parameter in model.named_parameters():
        if "last_layer" in name:
            parameter.grad = None


@torch.no_grad()
def clip_gradients(model: nn.Module, limit: float, mode: str) -> Tensor:
    """Scale gradients in place to norm `limit` at most (0: leave them) and return the norm they had together.

    `per_tensor` scales each by limit / (its norm + 1e-6) where that is below 1, as official DINO; `global`
    scales all by the same factor from their common norm. Of sharded gradients the norm is that of the whole.
    The norm is a scalar on the gradients' device.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    each = norms(grads)
    total = torch.linalg.vector_norm(each)
    if limit > 0:
        factors = (limit / ((each if mode == "per_tensor" else total.expand(len(grads))) + 1e-6)).clamp(
            max=1.0
        )
        torch._foreach_mul_([local(grad) for grad in grads], list(factors.unbind()))
    return total
