"""Times weighted k-NN beside scikit-learn's KNeighborsClassifier: features in, accuracy out.

    python -m benchmarks.knn [--train 100000] [--test 10000] [--dim 384] [--classes 1000] [--out DIR]

Both classify the same test features by cosine similarity, each of the k = 20 nearest neighbours voting with
weight exp(similarity / 0.07): scikit-learn by brute force (the only way it has for cosine distances), with
that weight as a callable. No time is told unless both get the same accuracy, but for near ties that rounding
decides. Also fastdino for all of official DINO's k in one pass, which scikit-learn does one by one; and as
the limit the matrix product of all similarities alone. Variants take turns; the time is the least of the
rounds, memory what the first call needs beyond the features.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Clock, Conditions, Row, Timed, folder, machine, peak_bytes, write
from fastdino.eval.knn import KS, TEMPERATURE, knn_accuracy

K = 20
NEAR_TIES = 0.0005  # of the test images may come out otherwise


def make(n: int, dim: int, classes: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, dim) about a centre per class, so noisy that some are classified wrong; labels (n,)."""
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(classes, (n,), generator=generator)
    return centres[labels] + 3 * torch.randn(n, dim, generator=generator), labels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=int, default=100_000)
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1, help="after a first one, which counts too")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import sklearn  # which the test and bench extras bring
    from sklearn.neighbors import KNeighborsClassifier

    generator = torch.Generator().manual_seed(0)
    train, labels = make(args.train, args.dim, args.classes, generator)
    test, truth = make(args.test, args.dim, args.classes, generator)
    device, conditions = torch.device("cpu"), Conditions()
    theirs: Any = KNeighborsClassifier(
        min(K, len(train)),
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / TEMPERATURE),
    )
    theirs.fit(train.numpy(), labels.numpy())

    def product() -> None:
        for part in test.split(512):
            part @ train.T

    found: dict[str, float] = {}

    def ours() -> None:
        found["fastdino"] = knn_accuracy(train, labels, test, truth, ks=(K,))[K]

    def scikit_learn() -> None:
        found["scikit-learn"] = 100 * float((theirs.predict(test.numpy()) == truth.numpy()).mean())

    timed: Timed = {
        "fastdino": ours,
        "fastdino, k = 10 20 100 200": lambda: knn_accuracy(train, labels, test, truth, ks=KS),
        "scikit-learn": scikit_learn,
        "matrix product alone": product,
    }
    clock, memory = Clock(device), {}
    times: dict[str, list[float]] = {name: [] for name in timed}
    for name, run in timed.items():
        memory[name] = peak_bytes(lambda its=times[name], run=run: its.append(clock(run)), device)  # type: ignore[misc]
    if abs(found["fastdino"] - found["scikit-learn"]) > 100 * NEAR_TIES:
        raise SystemExit(f"accuracies differ: {found}: no time is told")
    for _ in range(args.rounds):
        for name, run in timed.items():
            times[name].append(clock(run))
    rows: list[Row] = [
        {
            "variant": name,
            "train": args.train,
            "test": args.test,
            "dim": args.dim,
            "seconds": min(its) / 1e3,
            "images_per_s": args.test / min(its) * 1e3,
            "peak_MB": memory[name] / 1e6,
            "accuracy": found.get(name),
        }
        for name, its in times.items()
    ]
    table = f"\n{args.train:,} x {args.dim} features, {args.test:,} to classify, {args.classes} classes\n\n"
    table += "| variant | s | images/s | MB beyond the features | accuracy % |\n|---|---|---|---|---|\n"
    for row in rows:
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.2f}"
        table += f"| {row['variant']} | {row['seconds']:.2f} | {row['images_per_s']:.0f} "
        table += f"| {row['peak_MB']:.0f} | {accuracy} |\n"
    print(table)
    about = machine(device) | conditions.describe() | {"scikit-learn": sklearn.__version__}
    write("Weighted k-NN", rows, about, table, args.out or folder(device) / "knn")


if __name__ == "__main__":
    main()
