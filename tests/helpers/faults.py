"""Feeds and updates for `train` that do something at a given update, or go wrong there on purpose."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastdino.data.feed import Feed, Piece
from fastdino.update import Update


def feed_that_calls(act: Callable[[], None], update: int) -> type[Feed]:
    """A Feed that calls `act` as update `update` of its process, from 1, takes its first piece."""

    class Acting(Feed):
        given = 0

        def __next__(self) -> Piece:
            if self.given == (update - 1) * self.pieces:
                act()
            self.given += 1
            return super().__next__()

    return Acting


class ScaleOne(Update):
    """fp16's loss scale begins at 1, at which the tiny network does not overflow."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        kind = type(self.scaler)
        self.scaler = kind(self.device.type, init_scale=1.0, enabled=self.scaler.is_enabled())


def with_nan_losses(*updates: int) -> type[Update]:
    """An Update in which the loss of these updates of the run, from 1, is NaN."""

    class Poisoned(ScaleOne):
        def forward(self, crops: Any, settings: Any, diagnose: bool) -> tuple[Tensor, Tensor, Tensor]:
            loss, mean, diagnostics = super().forward(crops, settings, diagnose)
            factor = math.nan if settings.step + 1 in updates else 1.0
            return loss * factor, mean * factor, diagnostics

    return Poisoned


def with_infinite_gradients(update: int) -> type[Update]:
    """An Update in which the gradient of update `update` of the run, from 1, is infinite."""

    class Overflowing(ScaleOne):
        def forward(self, crops: Any, settings: Any, diagnose: bool) -> tuple[Tensor, Tensor, Tensor]:
            loss, mean, diagnostics = super().forward(crops, settings, diagnose)
            if settings.step + 1 == update:
                loss.register_hook(lambda gradient: gradient * math.inf)
            return loss, mean, diagnostics

    return Overflowing
