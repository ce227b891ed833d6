"""Parameter groups, schedules, clipping, the frozen last layer, LARS (paper, section 3.2).

Nothing here waits for the device: what must be decided from a gradient's value is decided there.
"""

import math

import torch
from torch import Tensor, nn

from fastdino.config import OptimConfig, number
from fastdino.distributed import is_sharded, local, norms, sharded_like


def cosine(step: int, base: float, final: float, total: int, warmup: int = 0) -> float:
    """Value at `step` of `total`: linear from 0 to `base` over `warmup` steps, then a cosine to `final`.

    As official DINO, the last warm-up step has `base`, and the cosine would reach `final` at step `total`.
    """
    if step < warmup:
        return base * step / max(1, warmup - 1)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def warmup_steps(config: OptimConfig, steps_per_epoch: int) -> int:
    """Steps of learning-rate warm-up: as configured, or a tenth of a run that is shorter than its warm-up."""
    epochs = config.warmup_epochs if config.warmup_epochs <= config.epochs else 0.1 * config.epochs
    return int(epochs * steps_per_epoch)


def peak_lr(config: OptimConfig) -> float:
    """Learning rate after warm-up: `lr` is per 256 images."""
    return number(config.lr) * config.batch_size / 256


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
    `hand_over_gradients` gives theirs: a fused step knows no DTensor, and needs none.
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


def hand_over_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimiser's shards the gradients of what they are shards of; call it before using them."""
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


def drop_last_layer_gradients(model: nn.Module) -> None:
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
