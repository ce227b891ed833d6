"""Weighted k-nearest-neighbour classification of frozen features, as official DINO evaluates them.

Features are l2-normalised; each of the k nearest neighbours votes for its class with weight
exp(cosine similarity / temperature) (Wu et al. 2018, arXiv:1805.01978; DINO paper, section 4.1).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdino import distributed
from fastdino.cli import progress, say
from fastdino.config import CropPolicy
from fastdino.data.sources import Source
from fastdino.eval.common import (
    FeatureEvaluation,
    Network,
    check_classes,
    extract_shared,
    labels_of,
    on_device,
    print_table,
    rank_slice,
    raw_pixels,
    say_unreadable,
    untrained,
    write_json,
)
from fastdino.eval.similarity import CHUNK_BYTES, COLUMNS, check_lengths, largest, similarities

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07


@torch.no_grad()
def knn_correct(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor | None = None,
    test_labels: Tensor | None = None,
    *,
    rows: range | None = None,
    ks: tuple[int, ...] = KS,
    temperature: float = TEMPERATURE,
    chunk_bytes: int = CHUNK_BYTES,
    columns: int = COLUMNS,
    device: str | torch.device | None = None,
) -> dict[int, int]:
    """How many images of `rows` (default: all) of the test set get their own class, for each k.

    Args:
        train_features: (N, D), the neighbours. Any scale: they are normalised here.
        train_labels: (N,) integers; classes are whatever values occur.
        test_features, test_labels: (M, D) and (M,); without them each training image is classified by the
            others.
        ks: neighbours that vote. One larger than the number of neighbours there are uses all of them.
        chunk_bytes: memory for the similarities and votes that are held at once.
        columns: neighbours in a block of similarities at most.
        device: where to compute, if not where the features are. What is not there is copied block by block.

    Raises:
        ValueError: no images, lengths that differ, or fewer than two classes.
    """
    leave_one_out = test_features is None or test_labels is None
    if test_features is None or test_labels is None:
        test_features, test_labels = train_features, train_labels
    check_lengths(train=(train_features, train_labels), test=(test_features, test_labels))
    neighbours = len(train_features) - leave_one_out
    if neighbours < 1 or len(test_features) < 1:
        raise ValueError(
            f"k-NN needs images: {len(train_features)} to compare with, {len(test_features)} to classify"
        )
    classes, train_classes = torch.unique(train_labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"k-NN needs two classes at least: all {len(train_labels)} labels are {classes.tolist()}"
        )
    device = torch.device(train_features.device if device is None else device)
    classes, train_classes = classes.to(device), train_classes.to(device)
    used = {k: min(k, neighbours) for k in ks}
    correct = dict.fromkeys(ks, 0)
    columns = min(len(train_features), columns)
    chunks = similarities(
        test_features,
        None if leave_one_out else train_features,
        rows=range(len(test_features)) if rows is None else rows,
        # Each row of a chunk holds a similarity per column and, per class, one vote.
        step=max(1, chunk_bytes // (4 * (columns + len(classes)))),
        columns=columns,
        device=device,
    )
    for chunk, blocks in chunks:
        nearest, index = largest(blocks, max(used.values()))
        # Relative to the nearest one, which changes no comparison: exp(1 / 0.01) is too large for float32.
        weight, voted = ((nearest - nearest[:, :1]) / temperature).exp(), train_classes[index]
        truth = test_labels[chunk.start : chunk.stop].to(device)
        for k, n in used.items():
            votes = weight.new_zeros(len(weight), len(classes)).scatter_add_(1, voted[:, :n], weight[:, :n])
            correct[k] += int((classes[votes.argmax(dim=1)] == truth).sum())
    return correct


def knn_roles(train: Source, val: Source | None) -> tuple[Source, Source | None]:
    """Neighbours and what they classify, None for themselves: without labels of `train`, `val` by itself."""
    return (val, None) if val is not None and train.labels is None else (train, val)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor | None = None,
    test_labels: Tensor | None = None,
    **options: Any,
) -> dict[int, float]:
    """Top-1 accuracy in per cent for each k; arguments and errors are those of `knn_correct`."""
    correct = knn_correct(train_features, train_labels, test_features, test_labels, **options)
    n = len(train_features if test_features is None or test_labels is None else test_features)
    return {k: 100.0 * right / n for k, right in correct.items()}


def evaluate_knn(
    network: Network,
    train: Source,
    val: Source | None,
    policy: CropPolicy,
    *,
    limit: int = 0,
    ks: tuple[int, ...] = KS,
    temperature: float = TEMPERATURE,
    device: str | torch.device = "cpu",
    **extract_options: Any,
) -> dict[int, float]:
    """k-NN accuracy in per cent of `network`'s features: `val` classified by `train`, or `train` by itself.

    Each rank extracts a part of the features, and classifies a part of the images by all of `train`.

    Args:
        limit: at most this number of images of each source, evenly spread over it; 0 takes all.
        extract_options: see `common.extract`.

    Raises:
        ValueError: no labels, or a class of `val` that `train` does not have.
    """
    check_classes(train, val)
    device = torch.device(device)
    extracted: list[Tensor] = []
    for source in (train, val) if val is not None else (train,):
        n = len(source)
        indices = sorted({int(i) for i in np.linspace(0, n - 1, limit)}) if 0 < limit < n else None
        features, kept = extract_shared(
            network, source, policy, indices=indices, device=device, **extract_options
        )
        extracted += [on_device(features, device), labels_of(source, kept, train.classes)]
    n = len(extracted[-1])
    correct = distributed.gather(
        knn_correct(*extracted, rows=rank_slice(n), ks=ks, temperature=temperature, device=device)
    )
    return {k: 100.0 * sum(part[k] for part in correct) / n for k in ks}


@dataclass(frozen=True, kw_only=True)
class KnnCommand(FeatureEvaluation):
    """Weighted k-nearest-neighbour accuracy, as official DINO's eval_knn."""

    data: str
    """Labelled images that vote: a folder with a sub-folder per class, or a text file of path TAB label."""
    val: str = ""
    """Labelled images to classify. Without them, each image of --data is classified by the others."""
    k: tuple[int, ...] = KS
    """Numbers of neighbours that vote."""
    temperature: float = TEMPERATURE
    """A neighbour's vote weighs exp(similarity / temperature)."""
    baselines: bool = False
    """Also the same network with the weights that the run began with, and raw pixels."""

    def _check(self) -> None:
        super()._check()
        if not self.k or min(self.k) < 1:
            raise ValueError(f"--k {' '.join(map(str, self.k))}: give numbers of neighbours, 1 or more")
        if self.temperature <= 0:
            raise ValueError(f"--temperature {self.temperature}: a temperature is above 0")

    def run(self) -> None:
        """Print the table, and write the JSON if asked."""
        with distributed.process_group(self.device) as device:
            with distributed.raise_on_all_ranks():
                self._check()
                train, val = self._open(self.data), self._open(self.val) if self.val else None
                check_classes(train, val)
                teacher, policy = self._load(device)
                networks: dict[str, Network] = {**self._baselines(device), "teacher": teacher}
            results: dict[str, dict[int, float]] = {}
            unreadable: list[str] = []
            images = sum(len(rank_slice(len(source))) for source in (train, val) if source)
            for name, network in networks.items():
                with progress(name, images) as advance:
                    results[name] = evaluate_knn(
                        network,
                        train,
                        val,
                        policy,
                        ks=self.k,
                        temperature=self.temperature,
                        progress=advance,
                        unreadable=unreadable,
                        **self._options(device),
                    )
            classified = f"{len(val)} images of {self.val} by {len(train)}" if val else ""
            classified = classified or f"{len(train)} images by the others"
            say(f"k-NN accuracy in %: {classified}, {len(train.classes)} classes")
            columns = ("features", *(f"k = {k}" for k in self.k))
            print_table(columns, [(n, *(f"{a[k]:.1f}" for k in self.k)) for n, a in results.items()])
            neighbours = len(train) - (val is None)
            if beyond := [str(k) for k in self.k if k > neighbours]:
                say(f"k = {', '.join(beyond)}: there are {neighbours} neighbours, all of them vote")
            say_unreadable(unreadable)
            figures = {name: {str(k): a for k, a in by_k.items()} for name, by_k in results.items()}
            write_json(self.json, figures)

    def _baselines(self, device: torch.device) -> dict[str, Network]:
        if not self.baselines:
            return {}
        return {"untrained network": untrained(self.weights).to(device), "raw pixels": raw_pixels}
