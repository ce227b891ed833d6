"""Opening: the images that a path names, and the loader of their batches of crops."""

import os
import statistics
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from fastdino.config import CropPolicy
from fastdino.data import shards
from fastdino.data.crops import enough_pixels
from fastdino.data.dali import DaliLoader, Encoded
from fastdino.data.images import Unreadable
from fastdino.data.loader import (
    Batch,
    Crops,
    Loader,
    PieceOrder,
    identity_collate,
    share_of,
    steps_per_epoch,
)
from fastdino.data.machine import choose_workers, cores, init_worker
from fastdino.data.sources import (
    TAKEN,
    Patterns,
    Source,
    by_product,
    epoch_order,
    list_folder,
    most_common,
    read_list,
)
from fastdino.files import printable_name

__all__ = [
    "Batch",
    "Crops",
    "Loader",
    "Source",
    "Unreadable",
    "choose_loader",
    "choose_workers",
    "cores",
    "crop_size_warning",
    "epoch_order",
    "identity_collate",
    "make_loader",
    "open_source",
    "share_of",
    "steps_per_epoch",
]

_GIVE = "give a folder of images or a text file with one path a line, or tar shards ('DIR/{000..127}.tar')"


def open_source(path: str, *, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> Source:
    """The images of a folder, of a text file, or of tar shards.

    Folder: every file below it with an image's extension, sorted by path; links to folders are followed, once
    around. What is hidden, is a `sources.by_product` or lies in a folder that cannot be read is left out. If
    every image lies in one of two or more sub-folders of the folder itself, the sub-folder is its class. Text
    file: a path a line, relative to the text file's folder, and optionally a tab and a class; blank lines and
    lines that begin with # are skipped. Listed files are not looked at before they are loaded. Shards: a file
    NAME.tar, several as DIR/{000..127}.tar, DIR/{a,b}.tar or DIR/*.tar, or a folder that holds tars itself
    and no images at any depth; see `shards.Shards`.

    Args:
        include: patterns, of which one fits the path of each image taken, see `sources.Patterns`; none: all.
        exclude: patterns, none of which fits an image taken.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: it holds no images, saying what it holds.
        OSError: it cannot be read.
    """
    if not path:
        raise ValueError(f"no images given: {_GIVE}")
    patterns = Patterns(tuple(include), tuple(exclude))
    source = _open(path, patterns)
    found = source.left_out
    if not len(source):
        where = " or tar shards at its top" if ".tar" in found.files else ""
        raise ValueError(
            f"{path}: {found.note(0) or 'no files in it'}; give a folder that holds images "
            f"({' '.join(TAKEN)}), at any depth{where}"
        )
    shown = printable_name(path)
    if note := found.note(len(source)):
        source.notes.insert(0, f"{shown}: {note}")
    source.notes += [
        f"--exclude {printable_name(pattern)} fits no image of {shown}: a pattern is for the path below it, "
        "as 'masks/*' or '*_mask.png'"
        for pattern in exclude
        if f"by --exclude {pattern}" not in found.files
    ]
    return source


def _open(path: str, patterns: Patterns) -> Source:
    """The images of `path`, if there are any."""
    if os.path.isdir(path):
        source = list_folder(path, patterns)
        tars = sorted(name for name in os.listdir(path) if shards.is_tar(name) and not by_product(name))
        if len(source) or not tars:
            return source
        return shards.open_shards(path, [os.path.join(path, name) for name in tars], patterns)
    if not os.path.exists(path) and (named := shards.expand(path)) != [path]:
        return shards.open_shards(path, named, patterns)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such folder or file; {_GIVE}")
    if os.path.isfile(path) and shards.is_tar(path):
        return shards.open_shards(path, [path], patterns)
    source = read_list(path, patterns)
    if not len(source):
        held = ", ".join(most_common(source.left_out.files))
        raise ValueError(
            f"{path}: no paths in it{held and f', but {held}'}; write one path of an image a line"
        )
    return source


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
) -> Loader:
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
        "batch_sampler": PieceOrder(source, shuffle_buffer, batch_size, share, seed, steps, rank, ranks),
        "num_workers": workers,
        "collate_fn": identity_collate,
        "worker_init_fn": init_worker,
        "prefetch_factor": 2 if workers else None,
        "generator": torch.Generator(),  # else the loader would draw from torch's global generator
    }
    if loader == "dali":
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
