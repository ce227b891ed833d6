"""One rank's batches of crops for a whole run: their order, the dataset that makes them, and the workers."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from fastdino.config import CropPolicy
from fastdino.data.crops import draw, render_into
from fastdino.data.images import Unreadable
from fastdino.data.sources import Source

MAX_IN_A_ROW = 100  # unreadable files one after the other, before the run stops
T = TypeVar("T")
# all views flat, indices, (path, reason) of unreadable files
Loaded = tuple[Tensor, Tensor, list[tuple[str, str]]]


@dataclass
class Batch:
    """Views of B images, on the CPU, or where DALI decodes on the device."""

    views: list[Tensor]  # in the order g1 g2 l1 ... ln, each uint8 (B, 3, size, size), contiguous
    indices: Tensor  # int64 (B,) on the CPU: the images used, as numbered by the source
    unreadable: list[str]  # paths of this batch's files that could not be read; others took their places
    reasons: list[str]  # why, in the same order
    by_pillow: int = 0  # images that DALI could not decode or was not given, and Pillow did


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Batches in a pass over n images, without the last incomplete one, as official DINO.

    Raises ValueError if there is none.
    """
    if n < batch_size:
        raise ValueError(
            f"--batch-size {batch_size} is larger than the {n} images: lower it to {n} or less, or add images"
        )
    return n // batch_size


def share_of(batch_size: int, pieces: int, ranks: int) -> int:
    """Images that a rank gets of each piece of a batch; raises ValueError where it does not divide."""
    if batch_size % (pieces * ranks):
        raise ValueError(
            f"--batch-size {batch_size} is not a multiple of --accumulate {pieces}"
            + (f" times {ranks} ranks" if ranks > 1 else "")
            + ": change one of them"
        )
    return batch_size // pieces // ranks


class Loader:
    """Iterates over a run's batches; workers start with the iteration and end with it."""

    def __init__(self, loader: DataLoader, policy: CropPolicy) -> None:
        self._loader = loader
        self.sizes = view_sizes(policy)

    @property
    def workers(self) -> int:
        """Processes that load; 0 if this one does."""
        return self._loader.num_workers

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        with closing(self.arriving()) as arriving:
            for pixels, indices, failed in arriving:
                yield Batch(
                    split_views(pixels, self.sizes),
                    indices,
                    [path for path, _ in failed],
                    [reason for _, reason in failed],
                )

    def arriving(self) -> Generator[Any, None, None]:
        """Yield what the dataset makes of each piece; raise the Unreadable that it returns instead."""
        batches = iter(self._loader)
        died = ""
        try:
            while True:
                try:
                    loaded = next(batches)
                except StopIteration:
                    return
                # a worker's death is noticed by the DataLoader or, earlier, by its closed socket
                except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
                    about_worker = not isinstance(error, RuntimeError) or "DataLoader worker" in str(error)
                    if not about_worker or str(error).startswith("Caught "):  # raised in a worker that lives
                        raise
                    died = str(error).strip() or type(error).__name__
                if died:  # not raised while handling: the first error's traceback would keep the workers
                    raise RuntimeError(
                        f"a process that loads images died ({died}): often memory ran out; lower "
                        "--workers or --batch-size, or give the container more shared memory (--shm-size)"
                    )
                if isinstance(loaded, Unreadable):
                    raise loaded
                yield loaded
        finally:
            del batches  # ends the workers now, not when the traceback that holds this frame is dropped


def view_sizes(policy: CropPolicy) -> list[int]:
    """Side in pixels of each view of an image."""
    return [policy.global_crops_size] * policy.n_global + [
        policy.local_crops_size
    ] * policy.local_crops_number


def split_views(pixels: Tensor, sizes: list[int]) -> list[Tensor]:
    """Views (B, 3, size, size) of the flat pixels of a batch."""
    n = pixels.numel() // (3 * sum(size**2 for size in sizes))
    parts = pixels.split([n * 3 * size**2 for size in sizes])
    return [part.view(n, 3, size, size) for part, size in zip(parts, sizes, strict=True)]


class PieceOrder(Sampler[list[tuple[int, int]]]):
    """Lists of (epoch, index), one for each piece of each step: this rank's `share` of it."""

    def __init__(
        self,
        source: Source,
        buffer: int,
        batch_size: int,
        share: int,
        seed: int,
        steps: range,
        rank: int,
        ranks: int,
    ) -> None:
        self.source, self.buffer = source, buffer
        self.batch_size, self.share, self.seed, self.steps = batch_size, share, seed, steps
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return len(self.steps) * (self.batch_size // (self.share * self.ranks))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = steps_per_epoch(len(self.source), self.batch_size)
        share, piece = self.share, self.share * self.ranks
        current = -1
        for step in self.steps:
            epoch, place = divmod(step, per_epoch)
            if epoch != current:
                order, current = self.source.order(self.seed, epoch, self.buffer), epoch
            for first in range(place * self.batch_size, (place + 1) * self.batch_size, piece):
                start = first + self.rank * share
                yield [(epoch, i) for i in order[start : start + share].tolist()]


class Crops(Dataset[Loaded | Unreadable]):
    """Makes a whole batch at once, so that each pixel is written once, into the memory that is sent."""

    def __init__(self, source: Source, policy: CropPolicy, seed: int, enough: int = 0) -> None:
        self.source, self.policy, self.seed, self.enough = source, policy, seed, enough
        self.sizes = view_sizes(policy)

    def __getitems__(self, items: list[tuple[int, int]]) -> Loaded | Unreadable:
        """Unreadable is returned, not raised: the DataLoader would bury its message in a traceback."""
        # all views in one tensor: one file descriptor and one pinned allocation a batch, not one a view
        pixels = shared_buffer(len(items) * 3 * sum(size**2 for size in self.sizes))
        views = split_views(pixels, self.sizes)
        indices = torch.empty(len(items), dtype=torch.int64)
        failed: list[tuple[str, str]] = []
        for place, (epoch, index) in enumerate(items):
            try:
                used, image = load_or_next(
                    self.source, index, failed, lambda i: self.source.load(i, enough=self.enough)
                )
            except Unreadable as error:
                return error
            indices[place] = used
            drawn = draw(self.policy, self.seed, epoch, index, image.size)
            render_into(image, drawn, [view[place : place + 1] for view in views])
        return pixels, indices, failed


def shared_buffer(n: int) -> Tensor:
    """uint8 (n,), not filled; in a worker, shared memory, which is sent without a copy."""
    if get_worker_info() is None:
        return torch.empty(n, dtype=torch.uint8)
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(n))


def load_or_next(
    source: Source, index: int, failed: list[tuple[str, str]], load: Callable[[int], T]
) -> tuple[int, T]:
    """The index of the first image from `index` on that can be read, and what `load` gives for it.

    Only the first unreadable file is noted in `failed`: the others have places of their own. Raises
    Unreadable after 100 unreadable files.
    """
    n = len(source)
    tries = min(MAX_IN_A_ROW, n)
    for used in range(index, index + tries):
        try:
            return used % n, load(used % n)
        except Unreadable as error:
            last = error
            if used == index:
                failed.append((error.path, error.reason))
    others = f"; so were the {tries - 1} files before it" if tries > 1 else ""
    raise Unreadable(last.path, f"{last.reason}{others}: are the paths right?")


def identity_collate(loaded: Any) -> Any:
    """The collate_fn of a dataset that makes whole batches. A lambda could not be pickled."""
    return loaded
