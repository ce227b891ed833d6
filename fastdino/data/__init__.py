"""Batches of crops for a whole run: which images make each batch, and the workers that load and crop them."""

import math
import os
import signal
import statistics
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from fastdino.config import CropPolicy
from fastdino.data.crops import draw, enough_pixels, render_into
from fastdino.data.sources import Source, Unreadable, epoch_order, open_source

__all__ = [
    "Batch",
    "Loader",
    "Source",
    "Unreadable",
    "choose_loader",
    "choose_workers",
    "crop_size_warning",
    "epoch_order",
    "make_loader",
    "open_source",
    "share_of",
    "steps_per_epoch",
]

MAX_IN_A_ROW = 100  # unreadable files one after the other, before the run stops
_CPU_QUOTA = "/sys/fs/cgroup/cpu.max"
T = TypeVar("T")


@dataclass
class Batch:
    """Views of B images, on the CPU, or where DALI decodes on the device."""

    views: list[Tensor]  # in the order g1 g2 l1 ... ln, each uint8 (B, 3, size, size), contiguous
    indices: Tensor  # int64 (B,) on the CPU: the images used, as numbered by the source
    unreadable: list[str]  # paths of this batch's files that could not be read; others took their places
    reasons: list[str]  # why, in the same order
    by_pillow: int = 0  # images that DALI could not decode or was not given, and Pillow did


def choose_loader(name: str, device: torch.device) -> tuple[str, str]:
    """The loader that --loader `name` means on a device, and what to tell the user, if anything."""
    install = "install it with pip install 'fastdino[dali]' (CUDA 13) or 'fastdino[dali-cuda12]'"
    installed = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
    if name == "dali" and not installed:
        return "torchvision", f"--loader dali: DALI is not installed, the CPU makes the crops; {install}"
    if name == "auto":
        if device.type == "cuda" and not installed:
            return "torchvision", f"the CPU makes the crops; DALI would on the GPU: {install}"
        return ("dali" if device.type == "cuda" else "torchvision"), ""
    return name, ""


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
    device: torch.device | str = "cpu",
    loader: str = "torchvision",
    shuffle_buffer: int = 0,
    jpeg_scaling: bool = False,
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
    local_ranks - 1 others on this machine, less one. device: where the views are wanted. loader: with
    "torchvision" the workers decode and crop, into pinned memory for a GPU; with "dali" they read files,
    DALI decodes and a kernel crops on the device. shuffle_buffer: see `Source.order`; for shards.
    jpeg_scaling: the workers decode large JPEGs at a part of their size, see `crops.enough_pixels`. Raises
    ValueError where batch_size is larger than the source or no multiple of pieces times ranks; iterating
    raises RuntimeError if a worker dies.
    """
    steps_per_epoch(len(source), batch_size)
    share = share_of(batch_size, pieces, ranks)
    workers = choose_workers(share, local_ranks) if workers < 0 else workers
    device = torch.device(device)
    steps = range(start_step, total_steps)
    options: dict[str, Any] = {
        "batch_sampler": _Order(source, shuffle_buffer, batch_size, share, seed, steps, rank, ranks),
        "num_workers": workers,
        "collate_fn": as_is,
        "worker_init_fn": _init_worker,
        "prefetch_factor": 2 if workers else None,
        "generator": torch.Generator(),  # else the loader would draw from torch's global generator
    }
    if loader == "dali":
        from fastdino.data.dali import DaliLoader, Encoded

        encoded = DataLoader(Encoded(source, policy, seed), **options)
        return DaliLoader(encoded, policy, device, share, threads=choose_workers(8, local_ranks))
    return Loader(
        DataLoader(
            Crops(source, policy, seed, enough_pixels(policy) if jpeg_scaling else 0),
            pin_memory=device.type == "cuda",
            **options,
        ),
        policy,
    )


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
        """What the dataset makes of each piece; raises what it returned as Unreadable."""
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


# all views flat, indices, (path, reason) of unreadable files
Loaded = tuple[Tensor, Tensor, list[tuple[str, str]]]


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


class _Order(Sampler[list[tuple[int, int]]]):
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
        pixels = room(len(items) * 3 * sum(size**2 for size in self.sizes))
        views = split_views(pixels, self.sizes)
        indices = torch.empty(len(items), dtype=torch.int64)
        failed: list[tuple[str, str]] = []
        for place, (epoch, index) in enumerate(items):
            try:
                used, image = readable(
                    self.source, index, failed, lambda i: self.source.load(i, enough=self.enough)
                )
            except Unreadable as error:
                return error
            indices[place] = used
            drawn = draw(self.policy, self.seed, epoch, index, image.size)
            render_into(image, drawn, [view[place : place + 1] for view in views])
        return pixels, indices, failed


def room(n: int) -> Tensor:
    """uint8 (n,) to fill; in a worker, memory that is sent without a copy."""
    if get_worker_info() is None:
        return torch.empty(n, dtype=torch.uint8)
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(n))


def readable(
    source: Source, index: int, failed: list[tuple[str, str]], load: Callable[[int], T]
) -> tuple[int, T]:
    """What `load` gives for the image, or for the next one that can be read, with its index.

    Only the first file is noted in `failed`: the others have places of their own.
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
    raise Unreadable(
        last.path, f"{last.reason}; so were the {tries - 1} files before it: are the paths right?"
    )


def as_is(loaded: Any) -> Any:
    """What a dataset that makes whole batches has for a collate_fn; at the top, so that it can be pickled."""
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
    return max(1, min(cores() // local_ranks - 1, batch))


def cores() -> int:
    """Cores of this machine that this process may use."""
    number = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open(_CPU_QUOTA) as file:  # a container's share: "200000 100000" is two cores
            quota, period = file.read().split()
        number = min(number, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass
    return number
