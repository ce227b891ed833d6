"""Weighted k-nearest-neighbour classification of frozen features, as official DINO evaluates them.

Features are l2-normalised; each of the k nearest neighbours votes for its class with weight
exp(cosine similarity / temperature) (Wu et al. 2018, arXiv:1805.01978; DINO paper, section 4.1).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino import distributed
from fastdino.config import CropPolicy
from fastdino.data.sources import Source
from fastdino.eval.features import extract

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
CHUNK_BYTES = 256 << 20  # of similarities at a time; the whole matrix of ImageNet would take 256 GB


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor | None = None,
    test_labels: Tensor | None = None,
    *,
    ks: tuple[int, ...] = KS,
    temperature: float = TEMPERATURE,
    chunk_bytes: int = CHUNK_BYTES,
) -> dict[int, float]:
    """Top-1 accuracy in per cent for each k.

    Args:
        train_features: (N, D), the neighbours. Any scale: they are normalised here.
        train_labels: (N,) integers; classes are whatever values occur.
        test_features, test_labels: (M, D) and (M,); without them each training image is classified by the
            others.
        ks: neighbours that vote. One larger than the number of neighbours there are uses all of them.
        chunk_bytes: largest block of similarities held at once.

    Raises:
        ValueError: no images, lengths that differ, or fewer than two classes.
    """
    leave_one_out = test_features is None or test_labels is None
    if test_features is None or test_labels is None:
        test_features, test_labels = train_features, train_labels
    for name, features, labels in (
        ("train", train_features, train_labels),
        ("test", test_features, test_labels),
    ):
        if features.ndim != 2 or len(features) != len(labels):
            raise ValueError(
                f"{name}: features {tuple(features.shape)} and labels {tuple(labels.shape)} do not match"
            )
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
    train = F.normalize(train_features.float(), dim=1)
    test = F.normalize(test_features.float(), dim=1)
    used = {k: min(k, neighbours) for k in ks}
    correct = dict.fromkeys(ks, 0)
    # Each row of a chunk holds N similarities and, per class, one vote.
    rows = max(1, chunk_bytes // (4 * (len(train) + len(classes))))
    for start in range(0, len(test), rows):
        similarity = test[start : start + rows] @ train.T
        if leave_one_out:
            own = torch.arange(start, start + len(similarity), device=similarity.device)
            similarity[own - start, own] = -torch.inf
        nearest, index = similarity.topk(max(used.values()), dim=1)
        # Relative to the nearest one, which changes no comparison: exp(1 / 0.01) is too large for float32.
        weight, voted = ((nearest - nearest[:, :1]) / temperature).exp(), train_classes[index]
        for k, n in used.items():
            votes = weight.new_zeros(len(weight), len(classes)).scatter_add_(1, voted[:, :n], weight[:, :n])
            predicted = classes[votes.argmax(dim=1)]
            correct[k] += int((predicted == test_labels[start : start + rows]).sum())
    return {k: 100.0 * n / len(test) for k, n in correct.items()}


def check_classes(train: Source, val: Source | None) -> None:
    """Raise ValueError where images of `val` cannot be classified by `train`, or `train` by itself."""
    for source in (train, val) if val is not None else (train,):
        if source.labels is None:
            raise ValueError(
                f"{source.root} has no labels: k-NN needs a sub-folder per class, two at least, or a text "
                "file of path TAB class"
            )
        if missing := sorted(set(source.classes) - set(train.classes)):
            raise ValueError(
                f"{source.root} has classes that {train.root} does not have: {', '.join(missing[:10])}"
            )


def evaluate_knn(
    network: Callable[[Tensor], Tensor],
    train: Source,
    val: Source | None,
    policy: CropPolicy,
    *,
    limit: int = 0,
    ks: tuple[int, ...] = KS,
    temperature: float = TEMPERATURE,
    **extract_options: Any,
) -> dict[int, float]:
    """k-NN accuracy in per cent of `network`'s features: `val` classified by `train`, or `train` by itself.

    Args:
        limit: at most so many images of each source, evenly spread over it; 0 takes all.
        extract_options: see `features.extract`.

    Raises:
        ValueError: no labels, or a class of `val` that `train` does not have.
    """
    check_classes(train, val)
    extracted = []
    for source in (train, val) if val is not None else (train,):
        assert source.labels is not None  # check_classes
        n = len(source)
        indices = sorted({int(i) for i in np.linspace(0, n - 1, limit)}) if 0 < limit < n else list(range(n))
        with distributed.together():
            part = extract(
                network,
                source,
                policy,
                indices=indices[distributed.rank() :: distributed.ranks()],
                **extract_options,
            )
        features, kept = map(torch.cat, zip(*distributed.gather(part), strict=True))
        names = np.array([train.classes.index(name) for name in source.classes])
        extracted.append((features, torch.from_numpy(names[source.labels[kept.numpy()]])))

    def accuracy() -> dict[int, float]:
        return knn_accuracy(
            *extracted[0], *(extracted[1] if val is not None else ()), ks=ks, temperature=temperature
        )

    return distributed.on_first(accuracy)
