"""Batches of crops for a whole run: which images make each batch, and the workers that load and crop them."""

import math
import os
import signal
import statistics
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastdino.config import CropPolicy
from fastdino.data.crops import draw, render, to_tensor
from fastdino.data.sources import Source, Unreadable, open_source

__all__ = [
    "Batch",
    "Loader",
    "Source",
    "Unreadable",
    "choose_workers",
    "crop_size_warning",
    "make_loader",
    "open_source",
    "share_of",
    "steps_per_epoch",
]

MAX_IN_A_ROW = 100  # unreadable files one after the other, before the run stops
_CPU_QUOTA = "/sys/fs/cgroup/cpu.max"


@dataclass
class Batch:
    """Views of B images, on the CPU."""

    views: list[Tensor]  # in the order g1 g2 l1 ... ln, each uint8 (B, 3, size, size), contiguous
    indices: Tensor  # int64 (B,): the images used, as numbered by the source
    unreadable: list[str]  # paths of this batch's files that could not be read; others took their places
    reasons: list[str]  # why, in the same order


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


def crop_size_warning(source: Source, policy: CropPolicy) -> str | None:
    """What to tell the user if the global crops are more than twice as large as the images, else None.

    Reads the headers of at most 64 images, spread evenly; unreadable ones are left out. Raises ValueError if
    the crops are more than eight times as large.
    """
    shorts = []
    for i in np.linspace(0, len(source) - 1, min(64, len(source))).astype(int):
        try:
            shorts.append(min(source.size(int(i))))
        except Unreadable:
            continue
    if not shorts or (short := statistics.median(shorts)) * 2 >= policy.global_crops_size:
        return None
    if short * 8 < policy.global_crops_size:
        raise ValueError(
            f"--global-crops-size {policy.global_crops_size} makes no sense for images whose shorter side "
            f"is {short:g} pixels (median of {len(shorts)}): lower it, --local-crops-size and --patch-size "
            "to match"
        )
    return (
        f"the images' shorter side is {short:g} pixels (median of {len(shorts)}), under half of the global "
        f"crops' {policy.global_crops_size}: lower --global-crops-size, --local-crops-size and "
        "--patch-size to match"
    )


def make_loader(
    source: Source,
    policy: CropPolicy,
    *,
    batch_size: int,
    pieces: int,
    seed: int,
    start_step: int,
    total_steps: int,
    workers: int,
    pin: bool,
    rank: int = 0,
    ranks: int = 1,
    local_ranks: int = 1,
) -> "Loader":
    """One rank's share of the batches of steps start_step to total_steps - 1.

    A step has `pieces`, of which each rank gets batch_size / pieces / ranks images, neighbours in the order.

    The order of images follows from (seed, epoch), their crops from (seed, epoch, index): a run resumed at
    any step, with any number of workers and ranks, sees what the uninterrupted run would have seen. A file
    that cannot be read gives its place to the next one that can, with the crops of the first; after 100 in a
    row iterating raises Unreadable.

    workers: processes; 0 loads in this one, -1 takes the cores that this process may use, shared with the
    local_ranks - 1 others on this machine, less one. pin: batches come in pinned memory. Raises ValueError
    where batch_size is larger than the source or no multiple of pieces times ranks; iterating raises
    RuntimeError if a worker dies.
    """
    steps_per_epoch(len(source), batch_size)
    share = share_of(batch_size, pieces, ranks)
    workers = choose_workers(share, local_ranks) if workers < 0 else workers
    return Loader(
        DataLoader(
            _Crops(source, policy, seed),
            batch_sampler=_Order(len(source), batch_size, share, seed, start_step, total_steps, rank, ranks),
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=pin,
            worker_init_fn=_init_worker,
            prefetch_factor=2 if workers else None,
            generator=torch.Generator(),  # else the loader would draw from torch's global generator
        ),
        policy,
    )


class Loader:
    """Iterates over a run's batches; workers start with the iteration and end with it."""

    def __init__(self, loader: DataLoader, policy: CropPolicy) -> None:
        self._loader = loader
        self._sizes = _view_sizes(policy)

    @property
    def workers(self) -> int:
        """Processes that load; 0 if this one does."""
        return self._loader.num_workers

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
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
                pixels, indices, failed = loaded
                yield Batch(
                    views=_split(pixels, self._sizes),
                    indices=indices,
                    unreadable=[path for path, _ in failed],
                    reasons=[reason for _, reason in failed],
                )
        finally:
            del batches  # ends the workers now, not when the traceback that holds this frame is dropped


# all views flat, indices, (path, reason) of unreadable files
Loaded = tuple[Tensor, Tensor, list[tuple[str, str]]]


def _view_sizes(policy: CropPolicy) -> list[int]:
    return [policy.global_crops_size] * policy.n_global + [
        policy.local_crops_size
    ] * policy.local_crops_number


def _split(pixels: Tensor, sizes: list[int]) -> list[Tensor]:
    """Views (B, 3, size, size) of the flat pixels of a batch."""
    n = pixels.numel() // (3 * sum(size**2 for size in sizes))
    parts = pixels.split([n * 3 * size**2 for size in sizes])
    return [part.view(n, 3, size, size) for part, size in zip(parts, sizes, strict=True)]


class _Order(Sampler[list[tuple[int, int]]]):
    """Lists of (epoch, index), one for each piece of each step: this rank's `share` of it."""

    def __init__(
        self,
        n: int,
        batch_size: int,
        share: int,
        seed: int,
        start_step: int,
        total_steps: int,
        rank: int,
        ranks: int,
    ) -> None:
        self.n, self.batch_size, self.share, self.seed = n, batch_size, share, seed
        self.steps = range(start_step, total_steps)
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return len(self.steps) * (self.batch_size // (self.share * self.ranks))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = steps_per_epoch(self.n, self.batch_size)
        share, piece = self.share, self.share * self.ranks
        current = -1
        for step in self.steps:
            epoch, place = divmod(step, per_epoch)
            if epoch != current:
                order, current = epoch_order(self.n, self.seed, epoch), epoch
            for first in range(place * self.batch_size, (place + 1) * self.batch_size, piece):
                start = first + self.rank * share
                yield [(epoch, i) for i in order[start : start + share].tolist()]


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The images of an epoch in their order, int64 (n,): a permutation that follows from (seed, epoch)."""
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed))


class _Crops(Dataset[Loaded | Unreadable]):
    """Makes a whole batch at once, so that each pixel is written once, into the memory that is sent."""

    def __init__(self, source: Source, policy: CropPolicy, seed: int) -> None:
        self.source, self.policy, self.seed = source, policy, seed
        self.sizes = _view_sizes(policy)

    def __getitems__(self, items: list[tuple[int, int]]) -> Loaded | Unreadable:
        """Unreadable is returned, not raised: the DataLoader would bury its message in a traceback."""
        # all views in one tensor: one file descriptor and one pinned allocation a batch, not one a view
        pixels = torch.empty(len(items) * 3 * sum(size**2 for size in self.sizes), dtype=torch.uint8)
        views = _split(pixels, self.sizes)
        indices = torch.empty(len(items), dtype=torch.int64)
        failed: list[tuple[str, str]] = []
        for place, (epoch, index) in enumerate(items):
            try:
                used, image = self._load(index, failed)
            except Unreadable as error:
                return error
            indices[place] = used
            for out, view in zip(views, draw(self.policy, self.seed, epoch, index, image.size), strict=True):
                out[place] = to_tensor(render(image, view))
        return pixels, indices, failed

    def _load(self, index: int, failed: list[tuple[str, str]]) -> tuple[int, Image.Image]:
        """The image, or the next readable one, with its index.

        Only the first file is noted in `failed`: the others have places of their own.
        """
        n = len(self.source)
        tries = min(MAX_IN_A_ROW, n)
        for used in range(index, index + tries):
            try:
                return used % n, self.source.load(used % n)
            except Unreadable as error:
                last = error
                if used == index:
                    failed.append((error.path, error.reason))
        raise Unreadable(
            last.path, f"{last.reason}; so were the {tries - 1} files before it: are the paths right?"
        )


def _as_is(loaded: Any) -> Any:
    return loaded


def _init_worker(worker: int) -> None:
    """Workers leave signals to the training process, whose handlers they inherited, and obey it alone.

    Ctrl-C and job managers signal the whole process group, while the trainer needs batches to end its step.
    """
    for ignored in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def choose_workers(batch: int, local_ranks: int = 1) -> int:
    """Cores that this process may use, less one for itself; no more than there are images in a batch.

    `local_ranks` processes of this machine share its cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open(_CPU_QUOTA) as file:  # a container's share: "200000 100000" is two cores
            quota, period = file.read().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass
    return max(1, min(cores // local_ranks - 1, batch))
