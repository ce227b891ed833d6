"""Official DINO as published, plainly: the algorithm that the tests hold fastdino to.

Written from the paper (arXiv:2104.14294, algorithm 1 and appendix) and the published defaults; shares no code
with fastdino but the networks that it is given. Works in the networks' dtype, so float64 gives the truth.
"""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cosine_schedule(
    base: float, final: float, epochs: int, per_epoch: int, warmup_epochs: float = 0
) -> np.ndarray:
    """One value a step: linear from 0 over the warm-up, then a cosine."""
    warmup = int(warmup_epochs * per_epoch)
    steps = np.arange(epochs * per_epoch - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * steps / max(len(steps), 1)))
    return np.concatenate((np.linspace(0, base, warmup), cosine))


class OfficialLoss:
    """The cross-entropy over pairs of a teacher's global crop and another student crop, term by term."""

    def __init__(
        self, out_dim: int, ncrops: int, temps: np.ndarray, student_temp: float = 0.1, m: float = 0.9
    ) -> None:
        self.center = torch.zeros(1, out_dim)
        self.ncrops, self.temps, self.student_temp, self.m = ncrops, temps, student_temp, m

    def __call__(self, student: Tensor, teacher: Tensor, epoch: int) -> Tensor:
        self.center = self.center.to(teacher.dtype)
        log_p = [F.log_softmax(s / self.student_temp, dim=-1) for s in student.chunk(self.ncrops)]
        q = F.softmax((teacher - self.center) / self.temps[epoch], dim=-1).detach().chunk(2)
        terms = [
            torch.sum(-q[g] * log_p[v], dim=-1).mean() for g in range(2) for v in range(self.ncrops) if v != g
        ]
        assert len(terms) == 2 * self.ncrops - 2
        self.center = self.center * self.m + teacher.mean(dim=0, keepdim=True) * (1 - self.m)
        return sum(terms) / len(terms)


class OfficialRun:
    """Student, teacher and their updates. `network` maps a list of crops to logits; it is copied twice."""

    def __init__(
        self, network: nn.Module, config: dict, epochs: int, per_epoch: int, ncrops: int, out_dim: int
    ) -> None:
        self.student, self.teacher = copy.deepcopy(network), copy.deepcopy(network)
        self.per_epoch, self.config = per_epoch, config
        warm = config["warmup_teacher_temp_epochs"]
        temps = np.concatenate(
            (
                np.linspace(config["warmup_teacher_temp"], config["teacher_temp"], warm),
                np.ones(epochs - warm) * config["teacher_temp"],
            )
        )
        self.loss = OfficialLoss(out_dim, ncrops, temps)
        decayed = [p for n, p in self.student.named_parameters() if not (n.endswith(".bias") or p.ndim == 1)]
        plain = [p for n, p in self.student.named_parameters() if n.endswith(".bias") or p.ndim == 1]
        groups = [
            {"params": [p for p in decayed if p.requires_grad]},
            {"params": [p for p in plain if p.requires_grad], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, foreach=False, fused=False)
        self.lr = cosine_schedule(
            config["lr"] * config["batch_size"] / 256,
            config["min_lr"],
            epochs,
            per_epoch,
            config["warmup_epochs"],
        )
        self.wd = cosine_schedule(config["weight_decay"], config["weight_decay_end"], epochs, per_epoch)
        self.momentum = cosine_schedule(config["momentum_teacher"], 1.0, epochs, per_epoch)

    def step(self, it: int, crops: list[Tensor]) -> float:
        """One update; returns its loss."""
        epoch = it // self.per_epoch
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = self.lr[it]
            if i == 0:
                group["weight_decay"] = self.wd[it]
        with torch.no_grad():
            teacher_output = self.teacher(crops[:2])
        loss = self.loss(self.student(crops), teacher_output, epoch)
        assert math.isfinite(loss.item())
        self.optimizer.zero_grad()
        loss.backward()
        for p in self.student.parameters():
            if p.grad is not None:
                factor = self.config["clip_grad"] / (p.grad.norm(2) + 1e-6)
                if factor < 1:
                    p.grad.mul_(factor)
        if epoch < self.config["freeze_last_layer"]:
            for n, p in self.student.named_parameters():
                if "last_layer" in n:
                    p.grad = None
        self.optimizer.step()
        with torch.no_grad():
            m = self.momentum[it]
            for s, t in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                t.mul_(m).add_((1 - m) * s)
        return loss.item()
