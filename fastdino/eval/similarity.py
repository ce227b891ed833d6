"""Cosine similarities of two sets of features, in blocks, since all of ImageNet's would take 256 GB."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 256 << 20  # for one chunk of queries
COLUMNS = 1 << 17  # of the gallery in a block: more leave few rows, and products of few rows are slow

Blocks = Iterator[tuple[int, Tensor]]


def check_lengths(**sets: tuple[Tensor, Tensor]) -> None:
    """Raise ValueError, naming the set, unless features are (n, D) and labels (n,)."""
    for name, (features, labels) in sets.items():
        if features.ndim != 2 or len(features) != len(labels):
            raise ValueError(
                f"{name}: features {tuple(features.shape)} and labels {tuple(labels.shape)} do not match"
            )


def similarities(
    query: Tensor,
    gallery: Tensor | None,
    *,
    rows: range,
    step: int,
    columns: int,
    device: torch.device,
) -> Iterator[tuple[range, Blocks]]:
    """Cosine similarities of each query of `rows` and all of the gallery, a chunk of queries after another.

    Args:
        query: (M, D), of any scale and type: normalised here, in float32.
        gallery: (N, D) likewise; None compares the queries with one another, and gives each -inf with itself.
        step: queries in a chunk.
        columns: images of the gallery in a block.
        device: where to compute. What is not there is copied block by block.

    Yields:
        the queries of a chunk, and its blocks: the first column of each and similarities (chunk, columns).
        Go through a chunk's blocks before the next chunk.
    """
    others = query if gallery is None else gallery
    whole = _unit(others, device) if len(others) <= columns else None  # one block: the same for all chunks

    def blocks(chunk: range) -> Blocks:
        x = _unit(query[chunk.start : chunk.stop], device)
        for first in range(0, len(others), columns):
            y = _unit(others[first : first + columns], device) if whole is None else whole
            block = x @ y.T
            own = range(max(chunk.start, first), min(chunk.stop, first + len(y)))
            if gallery is None and own:
                i = torch.arange(own.start, own.stop, device=device)
                block[i - chunk.start, i - first] = -torch.inf
            yield first, block

    for start in range(rows.start, rows.stop, step):
        chunk = range(start, min(start + step, rows.stop))
        yield chunk, blocks(chunk)


def _unit(x: Tensor, device: torch.device) -> Tensor:
    return F.normalize(x.to(device).float(), dim=1)


def largest(blocks: Blocks, k: int) -> tuple[Tensor, Tensor]:
    """The k largest similarities of each row over all blocks, falling, and their columns: both (rows, k).

    Where the gallery has fewer than k images, all of them.
    """
    values, columns = torch.empty(0), torch.empty(0)
    for first, block in blocks:
        top = block.topk(min(k, block.shape[1]), dim=1)
        if first == 0:
            values, columns = top
            continue
        values = torch.cat((values, top.values), dim=1)
        columns = torch.cat((columns, top.indices + first), dim=1)
        values, order = values.topk(min(k, values.shape[1]), dim=1)
        columns = columns.gather(1, order)
    return values, columns
