"""Retrieval by frozen features: for each query, the images of a gallery in the order of cosine similarity.

Relevant are those of the query's class. An image as similar as a relevant one counts as ranked before it, so
that equal features earn nothing:

    average precision = mean over relevant images of  relevant ones so similar / images so similar
    recall@k          = share of queries with a relevant image among the first k

which is sklearn's average_precision_score, and recall as metric learning has it (Jegou et al. 2011).
"""

from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from fastdino import distributed
from fastdino.cli import progress, say
from fastdino.data.sources import Source
from fastdino.eval.common import (
    FeatureEvaluation,
    Network,
    check_labels,
    check_readable,
    collect,
    extract_shared,
    labels_of,
    on_device,
    print_table,
    rank_slice,
    say_unreadable,
    write_json,
)
from fastdino.eval.similarity import CHUNK_BYTES, COLUMNS, check_lengths, similarities
from fastdino.vit import VisionTransformer

KS = (1, 5, 10)
POWER = 4.0  # of GeM pooling


@torch.no_grad()
def search(
    query: Tensor,
    query_labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    rows: range | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    columns: int = COLUMNS,
    device: str | torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """How well each query of `rows` (default: all) finds the images of its class.

    Args:
        query, query_labels: (M, D) features of any scale and (M,) integers.
        gallery, gallery_labels: (N, D) and (N,); without them each query is searched among the others.
        chunk_bytes: memory for the similarities that are held at once, and for sorting them.
        columns: images of the gallery in a block of similarities at most.
        device: where to compute, if not where the features are.

    Returns:
        precision: average precision of each query, float64 (m,); NaN where nothing is relevant.
        first: the place of its first relevant image, int64 (m,), from 1 on; 0 where nothing is relevant.

    Raises:
        ValueError: no images, or shapes that do not match.
    """
    leave_one_out = gallery is None or gallery_labels is None
    if gallery is None or gallery_labels is None:
        gallery, gallery_labels = query, query_labels
    check_lengths(query=(query, query_labels), gallery=(gallery, gallery_labels))
    if not len(query) or len(gallery) <= leave_one_out:
        raise ValueError(f"retrieval needs images: {len(query)} queries, {len(gallery)} to find")
    device = torch.device(gallery.device if device is None else device)
    gallery_labels = gallery_labels.to(device)
    precision, first = [torch.empty(0, dtype=torch.float64)], [torch.empty(0, dtype=torch.int64)]
    chunks = similarities(
        query,
        None if leave_one_out else gallery,
        rows=range(len(query)) if rows is None else rows,
        step=max(1, chunk_bytes // (64 * len(gallery))),
        columns=columns,
        device=device,
    )
    for chunk, blocks in chunks:
        similarity = torch.cat([block for _, block in blocks], dim=1)
        values, order = similarity.sort(dim=1, descending=True)
        relevant = gallery_labels[order] == query_labels[chunk.start : chunk.stop].to(device)[:, None]
        if leave_one_out:  # itself is the last
            values, relevant = values[:, :-1], relevant[:, :-1]
        # Images at least so similar, and the relevant ones among them.
        seen = torch.searchsorted(-values, -values, right=True)
        found = relevant.cumsum(dim=1).gather(1, seen - 1)
        total = relevant.sum(dim=1)
        precision.append(((relevant * (found / seen.double())).sum(dim=1) / total).cpu())
        # argmax: the first one; those before it, and others as similar, are not relevant
        at = relevant.byte().argmax(dim=1, keepdim=True)
        place = (seen - found).gather(1, at)[:, 0] + 1
        first.append(torch.where(total > 0, place, 0).cpu())
    return torch.cat(precision), torch.cat(first)


def recall(first: Tensor, k: int) -> float:
    """Share in per cent of the queries whose first relevant image, int64 (m,) from 1 on, is among k."""
    return 100 * int((first <= k).sum()) / len(first)


def square(image: Image.Image, size: int) -> Image.Image:
    """What official DINO's copy detection sees: the whole image, size x size, distorted (bicubic)."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


def copy_features(network: VisionTransformer, images: Tensor) -> Tensor:
    """Official DINO's for copy detection: class token, and patch tokens pooled by GeM, (B, 2 D).

    GeM: the 4th root of the mean 4th power, per channel, negative values taken as 0 (Radenovic et al. 2018).
    """
    features, (patches,) = network(images, return_patches=True)
    pooled = patches.clamp(min=1e-6).pow(POWER).mean(dim=1).pow(1 / POWER)
    return torch.cat((features, pooled), dim=1)


@dataclass(frozen=True, kw_only=True)
class RetrievalCommand(FeatureEvaluation):
    """Mean average precision and recall of searching images of the same class."""

    query: str
    """Labelled images to search with: a folder with a sub-folder per class, or a text file of path TAB
    label."""
    gallery: str = ""
    """Labelled images to search in. Without them, each image of --query is searched among the others."""
    k: tuple[int, ...] = KS
    """Recall@k is the share of queries with a relevant image among the first k."""
    copy_detection: bool = False
    """Official DINO's features for copy detection: the class token and pooled patch tokens of the whole image
    made square. Give --image-size 320, as official DINO."""

    def _check(self) -> None:
        super()._check()
        if not self.k or min(self.k) < 1:
            raise ValueError(f"--k {' '.join(map(str, self.k))}: give numbers of images, 1 or more")

    def run(self) -> None:
        """Print the table, and write the JSON if asked."""
        with distributed.process_group(self.device) as device:
            with distributed.raise_on_all_ranks():
                self._check()
                query = self._open(self.query)
                gallery = self._open(self.gallery) if self.gallery else None
                sources: list[Source] = [query, *([gallery] if gallery else [])]
                for source in sources:
                    check_labels(source, "retrieval")
                network, policy = self._load(device)
                if self.copy_detection and not isinstance(network, VisionTransformer):
                    raise ValueError(f"--copy-detection: a {type(network).__name__} has no patch tokens")
            features: Network = network
            options = self._options(device)
            if self.copy_detection:
                features, options["view"] = partial(copy_features, network), square  # type: ignore[arg-type]
            classes = sorted({name for source in sources for name in source.classes})
            unreadable: list[str] = []
            extracted: list[Tensor] = []
            with progress("features", sum(len(rank_slice(len(source))) for source in sources)) as advance:
                for source in sources:
                    x, kept = extract_shared(
                        features, source, policy, progress=advance, unreadable=unreadable, **options
                    )
                    check_readable(len(kept), source)
                    extracted += [on_device(x, device), labels_of(source, kept, classes)]
            found = search(*extracted, rows=rank_slice(len(extracted[0])), device=device)
            precision, first = collect(found[0]), collect(found[1])
            self._report(precision, first, len(extracted[-1]) - (gallery is None))
            say_unreadable(unreadable)

    def _report(self, precision: Tensor, first: Tensor, n: int) -> None:
        searched = first > 0
        with distributed.raise_on_all_ranks():
            if not searched.any() and distributed.rank() == 0:
                raise ValueError(
                    f"no image of {self.query} has another of its class"
                    + (f" in {self.gallery}" if self.gallery else "")
                    + ": there is nothing to find"
                )
        where = f"among {n} of {self.gallery}" if self.gallery else f"among the {n} others"
        say(f"retrieval in %: {int(searched.sum())} images of {self.query}, each {where}")
        mean = 100 * precision[searched].mean().item()
        recalls = {k: recall(first[searched], k) for k in self.k}
        table = {"mAP": mean, **{f"recall@{k}": value for k, value in recalls.items()}}
        print_table(("features", *table), [(self._what(), *(f"{value:.1f}" for value in table.values()))])
        if left_out := len(first) - int(searched.sum()):
            say(f"left out: {left_out} images without another of their class")
        if beyond := [str(k) for k in self.k if k > n]:
            say(f"k = {', '.join(beyond)}: there are {n} images to find, all of them are looked at")
        figures = {
            "queries": int(searched.sum()),
            "left_out": left_out,
            "gallery": n,
            "mAP": mean,
            "recall": {str(k): value for k, value in recalls.items()},
        }
        write_json(self.json, figures)

    def _what(self) -> str:
        return "class token and pooled patches" if self.copy_detection else "features"
