"""Official DINO's runs as published, plainly: the algorithm that the tests hold fastdino to.

The update is that of `benchmarks/official.py`, with the published schedules. It works in the networks' dtype,
so float64 gives the truth.
"""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import official


def cosine_schedule(
    base: float, final: float, epochs: int, per_epoch: int, warmup_epochs: float = 0
) -> np.ndarray:
    """One value a step: linear from 0 over the warm-up, then a cosine."""
    warmup = int(warmup_epochs * per_epoch)
    steps = np.arange(epochs * per_epoch - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * steps / max(len(steps), 1)))
    return np.concatenate((np.linspace(0, base, warmup), cosine))


class OfficialRun:
    """Student, teacher and their updates. `network` maps a list of crops to logits; it is copied twice."""

    def __init__(
        self,
        network: nn.Module,
        config: dict[str, Any],
        epochs: int,
        per_epoch: int,
        ncrops: int,
        out_dim: int,
    ) -> None:
        self.student, self.teacher = copy.deepcopy(network), copy.deepcopy(network)
        self.per_epoch, self.config, self.ncrops = per_epoch, config, ncrops
        warm = config["warmup_teacher_temp_epochs"]
        self.temps = np.concatenate(
            (
                np.linspace(config["warmup_teacher_temp"], config["teacher_temp"], warm),
                np.ones(epochs - warm) * config["teacher_temp"],
            )
        )
        self.center = torch.zeros(1, out_dim, dtype=next(network.parameters()).dtype)
        groups = official.param_groups(self.student)
        optimizer = torch.optim.AdamW(groups, lr=0.0, foreach=False, fused=False)
        self.update = official.Update(
            self.student, self.teacher, optimizer, self.center, config["clip_grad"], once=True
        )
        peak = config["lr"] * config["batch_size"] / 256
        self.lr = cosine_schedule(peak, config["min_lr"], epochs, per_epoch, config["warmup_epochs"])
        self.wd = cosine_schedule(config["weight_decay"], config["weight_decay_end"], epochs, per_epoch)
        self.momentum = cosine_schedule(config["momentum_teacher"], 1.0, epochs, per_epoch)

    def step(self, it: int, crops: list[Tensor]) -> float:
        """One update; returns its loss."""
        epoch = it // self.per_epoch
        assert len(crops) == self.ncrops
        for group in self.update.optimizer.param_groups:
            group["lr"] = self.lr[it]
        self.update.optimizer.param_groups[0]["weight_decay"] = self.wd[it]
        self.update.temp, self.update.momentum = self.temps[epoch], self.momentum[it]
        self.update.freeze_last_layer = epoch < self.config["freeze_last_layer"]
        return self.update(crops).item()
