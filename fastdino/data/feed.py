"""What an update takes from the loader: crops piece by piece, with a tally of how the loading goes."""

import time
from collections.abc import Iterable, Iterator, Sized
from typing import NamedTuple

from torch import Tensor

from fastdino.data.loader import Batch


class Tally(NamedTuple):
    """What one rank reports of an update's loading so far; numbers, since ranks average them."""

    stop: float = 0.0
    """1 once this process was asked to stop."""
    unreadable: float = 0.0
    """Files that could not be read."""
    waited: float = 0.0
    """Seconds spent waiting for images."""
    by_pillow: float = 0.0
    """Images that Pillow decoded in DALI's place."""


class Piece(NamedTuple):
    """One of the `accumulate` pieces of an update's batch."""

    views: list[Tensor]
    """V crops, the global ones first: each uint8 (B, 3, side, side)."""
    tally: Tally = Tally()


class Feed:
    """An iterator over the pieces of all updates of a run, which also keeps what the loader says about them.

    Args:
        loader: gives the batches, `pieces` of them for each update.
        pieces: pieces of an update.
        signals: not empty once this process was asked to stop.

    Attributes:
        indices: int64 (B,) for each piece of the update in progress: its images, as the source numbers them.
        unreadable: (update of this feed, from 0, path, reason) of each file that could not be read since the
            last `take_unreadable`.
    """

    def __init__(self, loader: Iterable[Batch], pieces: int = 1, signals: Sized = ()) -> None:
        self.pieces, self.signals = pieces, signals
        self.indices: list[Tensor] = []
        self.unreadable: list[tuple[int, str, str]] = []
        self._batches = iter(loader)
        self._given = 0
        self._tally = Tally()

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        began = time.perf_counter()
        batch = next(self._batches)
        waited = time.perf_counter() - began
        update, piece = divmod(self._given, self.pieces)
        if piece == 0:
            self.indices, self._tally = [], Tally()
        self._given += 1
        self.indices.append(batch.indices)
        self.unreadable += [
            (update, path, reason) for path, reason in zip(batch.unreadable, batch.reasons, strict=True)
        ]
        before = self._tally
        self._tally = Tally(
            float(len(self.signals) > 0),
            before.unreadable + len(batch.unreadable),
            before.waited + waited,
            before.by_pillow + batch.by_pillow,
        )
        return Piece(batch.views, self._tally)

    def take_unreadable(self) -> list[tuple[int, str, str]]:
        """The unreadable files since the last call."""
        taken, self.unreadable = self.unreadable, []
        return taken
