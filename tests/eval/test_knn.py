"""Weighted k-NN against a slow loop and scikit-learn, and over the images of folders."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from fastdino.config import CropPolicy
from fastdino.data import open_source
from fastdino.eval.common import extract, raw_pixels
from fastdino.eval.knn import KS, TEMPERATURE, evaluate_knn, knn_accuracy, knn_correct, knn_roles

POLICY = CropPolicy(global_crops_size=14, local_crops_number=0)


def by_loop(
    train: Tensor, labels: Tensor, test: Tensor | None, test_labels: Tensor | None, k: int, temperature: float
) -> float:
    """Accuracy in per cent; without a test set each image is classified by the others."""
    alone = test is None
    test, test_labels = (train, labels) if alone else (test, test_labels)
    right = 0
    for i, (x, label) in enumerate(zip(test.double(), test_labels.tolist(), strict=True)):
        near = [
            (float(x @ y / (x.norm() * y.norm())), other)
            for j, (y, other) in enumerate(zip(train.double(), labels.tolist(), strict=True))
            if not (alone and i == j)
        ]
        votes: dict[int, float] = {}
        for similarity, other in sorted(near, reverse=True)[:k]:
            votes[other] = votes.get(other, 0.0) + math.exp(similarity / temperature)
        right += max(votes, key=votes.__getitem__) == label
    return 100 * right / len(test)


def clusters(n: int, classes: list[int], noise: float = 1.5, dim: int = 6) -> tuple[Tensor, Tensor]:
    """Noisy features about a centre per class, of very different lengths, and labels."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(len(classes), dim, generator=generator)
    which = torch.randint(len(classes), (n,))
    features = centres[which] + noise * torch.randn(n, dim)
    return features * torch.rand(n, 1).exp() * 10, torch.tensor(classes)[which]


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_accuracy_is_that_of_the_slow_loop(leave_one_out, temperature):
    classes = [3, -7, 1000, 12]  # neither contiguous nor from 0
    train, labels = clusters(90, classes)
    test, test_labels = (None, None) if leave_one_out else clusters(60, classes)
    ks = (1, 5, 20, 89)
    result = knn_accuracy(train, labels, test, test_labels, ks=ks, temperature=temperature)
    assert result == {k: pytest.approx(by_loop(train, labels, test, test_labels, k, temperature)) for k in ks}
    assert len(set(result.values())) > 1
    assert max(result.values()) < 100  # a task on which k matters, or the comparison would say little


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 5000])  # a row at a time, and a number that leaves a rest
def test_chunks_change_nothing(leave_one_out, chunk_bytes):
    train, labels = clusters(80, [0, 1, 2])
    test = () if leave_one_out else clusters(57, [0, 1, 2])
    whole = knn_accuracy(train, labels, *test)
    assert knn_accuracy(train, labels, *test, chunk_bytes=chunk_bytes) == whole


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("columns", [1, 13, 80])
@pytest.mark.parametrize("ks", [(1, 5), (20, 200)])  # fewer and more than a block of neighbours has
def test_blocks_of_neighbours_change_nothing(leave_one_out, columns, ks):
    train, labels = clusters(80, [0, 1, 2])
    test = () if leave_one_out else clusters(57, [0, 1, 2])
    whole = knn_accuracy(train, labels, *test, ks=ks)
    assert knn_accuracy(train, labels, *test, ks=ks, chunk_bytes=700, columns=columns) == whole


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_parts_of_the_images_add_up(leave_one_out):
    train, labels = clusters(80, [0, 1, 2])
    test = () if leave_one_out else clusters(57, [0, 1, 2])
    n = 80 if leave_one_out else 57
    whole = knn_correct(train, labels, *test)
    parts = [
        knn_correct(train, labels, *test, rows=rows, chunk_bytes=3000)
        for rows in (range(0, 19), range(19, 19), range(19, n))
    ]
    assert {k: sum(part[k] for part in parts) for k in KS} == whole
    assert parts[1] == dict.fromkeys(KS, 0)


@pytest.mark.parametrize("k", [1, 7, 60])
def test_accuracy_is_that_of_scikit_learn(k):
    train, labels = clusters(400, [5, 2, 9, 4])
    test, test_labels = clusters(300, [5, 2, 9, 4])
    theirs = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    theirs.fit(train.numpy(), labels.numpy())
    expected = 100 * (theirs.predict(test.numpy()) == test_labels.numpy()).mean()
    assert knn_accuracy(train, labels, test, test_labels, ks=(k,)) == {k: pytest.approx(expected)}
    assert 30 < expected < 95


def test_defaults_are_official_dinos():
    assert KS == (10, 20, 100, 200)
    assert TEMPERATURE == 0.07
    train, labels = clusters(230, [0, 1, 2])
    test, test_labels = clusters(20, [0, 1, 2])
    expected = {k: pytest.approx(by_loop(train, labels, test, test_labels, k, 0.07)) for k in KS}
    assert knn_accuracy(train, labels, test, test_labels) == expected


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_k_beyond_the_neighbours_uses_all_of_them(leave_one_out):
    train, labels = clusters(12, [0, 1])
    test = () if leave_one_out else clusters(9, [0, 1])
    n = 11 if leave_one_out else 12
    result = knn_accuracy(train, labels, *test, ks=(n, 200))
    assert result[200] == result[n] == pytest.approx(by_loop(train, labels, *(test or (None, None)), n, 0.07))


def test_an_image_never_votes_for_itself():
    features = torch.eye(2).repeat_interleave(2, 0)  # two pairs, and each image's double has the other label
    assert knn_accuracy(features, torch.tensor([0, 1, 0, 1]), ks=(1,)) == {1: 0.0}
    assert knn_accuracy(features, torch.tensor([0, 0, 1, 1]), ks=(1, 200)) == {1: 100.0, 200: 100.0}


def test_a_tie_goes_to_the_smaller_label():
    train, labels, test = torch.ones(2, 3), torch.tensor([9, 4]), torch.ones(1, 3)
    assert knn_accuracy(train, labels, test, torch.tensor([4]), ks=(2,)) == {2: 100.0}
    assert knn_accuracy(train, labels, test, torch.tensor([9]), ks=(2,)) == {2: 0.0}


def test_weights_decide_not_numbers():
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels, test = torch.tensor([1, 0, 0]), torch.tensor([[2.0, 0.0]])
    # exp(1 / T) against 2 exp(0.6 / T): even at T = 0.4 / ln 2 = 0.577
    assert knn_accuracy(train, labels, test, torch.tensor([1]), ks=(3,), temperature=0.55) == {3: 100.0}
    assert knn_accuracy(train, labels, test, torch.tensor([0]), ks=(3,), temperature=0.6) == {3: 100.0}


def test_a_small_temperature_does_not_overflow():
    train, labels = clusters(60, [0, 1, 2])
    test, test_labels = clusters(40, [0, 1, 2])
    result = knn_accuracy(train, labels, test, test_labels, ks=(10,), temperature=0.002)
    assert result[10] == pytest.approx(by_loop(train, labels, test, test_labels, 10, 0.002))
    assert result[10] > 40


def test_any_number_of_classes_and_a_single_image():
    """Official DINO's script is fixed to 1000 classes and fails below 100 images."""
    train, labels = torch.randn(1500, 16), torch.arange(1500)
    assert knn_accuracy(train, labels, train[1234:1235], labels[1234:1235], ks=(1, 20)) == {
        1: 100.0,
        20: 100.0,
    }
    assert knn_accuracy(train, labels, train[7:8], torch.tensor([-1]), ks=(1,)) == {1: 0.0}  # a class unseen


def test_half_precision_features_are_compared_in_float32():
    train, labels = clusters(60, [0, 1, 2])
    half = train.bfloat16()
    assert knn_accuracy(half, labels) == knn_accuracy(half.float(), labels)


@pytest.mark.parametrize(
    ("train", "labels", "test", "message"),
    [
        ((4, 3), [0, 0, 0, 0], None, "k-NN needs two classes at least: all 4 labels are [0]"),
        ((4, 3), [0, 1, 0], None, "train: features (4, 3) and labels (3,) do not match"),
        ((4, 3, 1), [0, 1, 0, 1], None, "train: features (4, 3, 1) and labels (4,) do not match"),
        ((4, 3), [0, 1, 0, 1], ((2, 3), [0]), "test: features (2, 3) and labels (1,) do not match"),
        ((0, 3), [], ((1, 3), [0]), "k-NN needs images: 0 to compare with, 1 to classify"),
        ((2, 3), [0, 1], ((0, 3), []), "k-NN needs images: 2 to compare with, 0 to classify"),
        ((1, 3), [0], None, "k-NN needs images: 1 to compare with, 1 to classify"),
    ],
)
def test_what_cannot_be_classified_is_refused(train, labels, test, message):
    more = () if test is None else (torch.randn(test[0]), torch.tensor(test[1]))
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared
        knn_accuracy(torch.randn(train), torch.tensor(labels), *more)
    assert str(error.value) == message


COLOURS = {"blue": (20, 20, 200), "green": (20, 200, 20), "red": (200, 20, 20)}


def save(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images in each of three classes, told apart by their colour."""
    for name, colour in COLOURS.items():
        for i in range(4):
            save(tmp_path / "train" / name / f"{i}.png", tuple(c + 8 * i for c in colour))
    return tmp_path / "train"


def mean_colour(images: Tensor) -> Tensor:
    return images.mean((2, 3))


def test_images_of_a_folder_are_classified_by_the_others(folder: Path):
    assert evaluate_knn(mean_colour, open_source(str(folder)), None, POLICY, ks=(1, 3)) == {
        1: 100.0,
        3: 100.0,
    }
    # the class is in the colour: a network that sees none of it does not find it
    result = evaluate_knn(lambda x: torch.ones(len(x), 1), open_source(str(folder)), None, POLICY, ks=(11,))
    assert result[11] < 40


def test_validation_classes_are_mapped_by_name(folder: Path, tmp_path: Path):
    val = tmp_path / "val"  # without blue, so that green and red have other numbers than in the training set
    for name in ("green", "red"):
        save(val / name / "x.png", COLOURS[name])
    train, test = open_source(str(folder)), open_source(str(val))
    assert (train.classes, test.classes) == (["blue", "green", "red"], ["green", "red"])
    assert evaluate_knn(mean_colour, train, test, POLICY, ks=(3,)) == {3: 100.0}
    # images that carry the wrong label are counted as wrong
    save(val / "green" / "y.png", COLOURS["red"])
    save(val / "green" / "z.png", COLOURS["blue"])
    assert evaluate_knn(mean_colour, train, open_source(str(val)), POLICY, ks=(3,)) == {3: 50.0}


def test_an_unknown_class_or_no_labels_are_refused_before_the_network_runs(folder: Path, tmp_path: Path):
    def never(images: Tensor) -> Tensor:
        raise AssertionError("the network ran")

    for name in ("green", "purple", "orange"):
        save(tmp_path / "val" / name / "x.png", (0, 0, 0))
    save(tmp_path / "flat" / "x.png", (0, 0, 0))
    train, val, flat = (open_source(str(p)) for p in (folder, tmp_path / "val", tmp_path / "flat"))
    with pytest.raises(ValueError, match=r"val has classes that .*train does not have: orange, purple$"):
        evaluate_knn(never, train, val, POLICY)
    with pytest.raises(ValueError, match=r"flat has no labels: k-NN needs a sub-folder per class"):
        evaluate_knn(never, train, flat, POLICY)
    with pytest.raises(ValueError, match=r"flat has no labels: k-NN needs a sub-folder per class"):
        evaluate_knn(never, flat, None, POLICY)


def test_without_labels_of_the_training_images_the_others_are_classified_by_themselves(
    folder: Path, tmp_path: Path
):
    save(tmp_path / "flat" / "x.png", (0, 0, 0))
    labelled, flat = open_source(str(folder)), open_source(str(tmp_path / "flat"))
    assert knn_roles(flat, labelled) == (labelled, None)
    assert knn_roles(labelled, flat) == (labelled, flat)
    assert knn_roles(flat, None) == (flat, None)
    assert evaluate_knn(mean_colour, *knn_roles(flat, labelled), POLICY, ks=(1,)) == {1: 100.0}


def test_unreadable_images_are_left_out(folder: Path):
    (folder / "blue" / "1.png").write_bytes(b"no image")
    (folder / "red" / "3.png").write_bytes((folder / "red" / "3.png").read_bytes()[:40])
    source = open_source(str(folder))
    features, kept = extract(mean_colour, source, POLICY, batch_size=5)
    assert kept.tolist() == [i for i in range(12) if i not in (1, 11)]
    for row, i in zip(features, kept.tolist(), strict=True):
        pixel = torch.tensor(source.load(i).getpixel((0, 0))) / 255
        expected = (pixel - torch.tensor(POLICY.mean)) / torch.tensor(POLICY.std)
        torch.testing.assert_close(row, expected)
    assert evaluate_knn(mean_colour, source, None, POLICY, ks=(2,)) == {2: 100.0}


def test_a_source_without_a_readable_image_is_refused(folder: Path):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="k-NN needs images: 0 to compare with"):
        evaluate_knn(mean_colour, open_source(str(folder)), None, POLICY)


@pytest.mark.parametrize("workers", [0, 1])
def test_features_come_in_order_whatever_batch_and_workers(folder: Path, workers):
    source, seen = open_source(str(folder)), []
    features, kept = extract(
        mean_colour, source, POLICY, indices=[9, 2, 5], batch_size=2, workers=workers, progress=seen.append
    )
    assert kept.tolist() == [9, 2, 5]
    assert seen == [2, 1]
    assert (features.dtype, kept.dtype) == (torch.float32, torch.int64)
    whole, every = extract(mean_colour, source, POLICY)
    assert every.tolist() == list(range(12))
    assert torch.equal(features, whole[kept])


def test_limit_takes_images_evenly_from_both_sources(folder: Path, tmp_path: Path):
    seen: list[int] = []

    def count(images: Tensor) -> Tensor:
        seen.append(len(images))
        return mean_colour(images)

    train = open_source(str(folder))
    # 0, 3, 7 and 11 of the twelve: one or two of each class, where the first four would be of one
    assert evaluate_knn(count, train, train, POLICY, limit=4, ks=(1,)) == {1: 100.0}
    assert seen == [4, 4]
    seen.clear()
    evaluate_knn(count, train, None, POLICY, limit=100, ks=(1,))
    evaluate_knn(count, train, None, POLICY, limit=0, ks=(1,))
    assert seen == [12, 12]


def test_raw_pixels_are_the_image_or_its_mean_over_32_by_32_cells():
    small = torch.randn(2, 3, 32, 32)
    assert torch.equal(raw_pixels(small), small)
    large = torch.randn(2, 3, 96, 96)
    expected = large.unflatten(3, (32, 3)).unflatten(2, (32, 3)).mean((3, 5))
    torch.testing.assert_close(raw_pixels(large), expected)


def test_images_are_seen_as_official_dinos_evaluation_sees_them(tmp_path: Path):
    """Shorter side to 256 / 224 of the crop, bicubic; centre crop; normalised."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    Image.fromarray(rng.integers(0, 256, (40, 70, 3), dtype=np.uint8)).save(tmp_path / "images" / "x.png")
    features, _ = extract(lambda x: x, open_source(str(tmp_path / "images")), POLICY)
    resized = Image.open(tmp_path / "images" / "x.png").resize((28, 16), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized, dtype=np.float64)[1:15, 7:21] / 255
    expected = ((pixels - np.array(POLICY.mean)) / np.array(POLICY.std)).transpose(2, 0, 1)
    np.testing.assert_allclose(features[0].numpy(), expected.ravel(), atol=1e-5)
