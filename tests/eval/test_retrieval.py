"""Average precision and recall by hand, against scikit-learn, and `fastdino-eval retrieval`."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_runs import CONFIG, make_run, refusal
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import Tensor

from fastdino.config import CropPolicy
from fastdino.data import crops, open_source
from fastdino.eval.common import extract
from fastdino.eval.retrieval import KS, RetrievalCommand, copy_features, recall, search, square
from fastdino.weights import load_backbone


def at(*similarities: float) -> Tensor:
    """Features (n, 2) with these cosine similarities to (1, 0); equal ones have equal features."""
    return torch.tensor([(c, math.sqrt(1 - c * c)) for c in similarities])


FAR, NEAR = 0.6, 0.8


@pytest.mark.parametrize(
    ("similarities", "labels", "precision", "first"),
    [
        ([1.0, 0.9, 0.8, 0.7], [1, 1, 0, 0], 1.0, 1),
        ([1.0, 0.9, 0.8, 0.7], [1, 0, 1, 0], (1 / 1 + 2 / 3) / 2, 1),
        ([0.7, 0.8, 0.9, 1.0], [1, 0, 1, 0], (1 / 2 + 2 / 4) / 2, 2),  # in no order
        ([1.0, 0.9, 0.8, 0.7], [0, 0, 0, 1], 1 / 4, 4),
        ([1.0, -0.5], [0, 1], 1 / 2, 2),
        ([1.0], [1], 1.0, 1),
        # Equals: as if a relevant one came after all that are as similar.
        ([1.0, NEAR, NEAR, 0.5], [0, 1, 0, 1], (1 / 3 + 2 / 4) / 2, 3),
        ([NEAR, NEAR, NEAR, NEAR], [1, 0, 0, 0], 1 / 4, 4),
        ([NEAR, NEAR, NEAR, NEAR], [1, 1, 0, 1], 3 / 4, 2),
        ([1.0, NEAR, NEAR], [0, 1, 1], 2 / 3, 2),
        ([1.0, FAR, FAR, NEAR], [1, 0, 1, 0], (1 / 1 + 2 / 4) / 2, 1),
        ([1.0, 0.9], [0, 0], math.nan, 0),  # nothing to find
    ],
)
def test_what_a_query_finds_is_what_it_is_by_hand(similarities, labels, precision, first):
    query = torch.tensor([[3.0, 0.0]])  # of any length
    found = search(query, torch.tensor([1]), at(*similarities) * 7, torch.tensor(labels))
    torch.testing.assert_close(found[0], torch.tensor([precision]).double(), equal_nan=True)
    assert (found[1].tolist(), found[1].dtype, found[0].dtype) == ([first], torch.int64, torch.float64)


def test_recall_is_the_share_of_queries_with_a_relevant_image_among_k():
    first = torch.tensor([1, 3, 2, 7])
    assert [recall(first, k) for k in (1, 2, 3, 6, 7, 100)] == [25.0, 50.0, 75.0, 75.0, 100.0, 100.0]
    assert KS == (1, 5, 10)


def test_alone_an_image_never_finds_itself():
    features = at(1.0, 0.9, 0.0, -0.1)
    precision, first = search(features, torch.tensor([0, 1, 0, 1]))
    # of the first: 0.9 (1), 0.0 (0), -0.1 (1)
    torch.testing.assert_close(precision[0], torch.tensor(1 / 2).double())
    assert first[0] == 2
    precision, first = search(features, torch.tensor([0, 0, 1, 2]))  # the last two are alone in their class
    assert precision.isnan().tolist() == [False, False, True, True]
    assert first.tolist() == [1, 1, 0, 0]


def test_equal_features_earn_nothing():
    precision, first = search(torch.ones(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
    torch.testing.assert_close(precision, torch.full((6,), 1 / 5).double())  # as by chance
    assert recall(first, 4) == 0.0
    assert recall(first, 5) == 100.0


@pytest.mark.parametrize("alone", [False, True])
def test_precision_is_that_of_scikit_learn(alone):
    labels = torch.randint(5, (40,))
    query = torch.randn(5, 6)[labels] + torch.randn(40, 6)
    classes = torch.randint(6, (70,))  # one that no query has
    gallery = (query, labels) if alone else (torch.randn(70, 6), classes)
    precision, first = search(query, labels, *(() if alone else gallery))
    for i in range(40):
        keep = torch.arange(len(gallery[0])) != (i if alone else -1)
        score = torch.cosine_similarity(query[i : i + 1].double(), gallery[0][keep].double())
        relevant = gallery[1][keep] == labels[i]
        expected = average_precision_score(relevant.numpy(), score.numpy())
        assert precision[i].item() == pytest.approx(expected)
        assert first[i] == 1 + relevant[score.argsort(descending=True)].int().argmax()
    assert 0.1 < precision.mean() < 0.9


def test_precision_of_equals_is_that_of_scikit_learn():
    """Queries along an axis have a coordinate as their similarity, with no rounding to tell equals apart."""
    values = at(*torch.tensor([0.0, 0.28, FAR, NEAR, 0.96])[torch.randint(5, (60,))].tolist())
    labels, query = torch.randint(3, (60,)), torch.eye(2).repeat(3, 1)
    precision, first = search(query, torch.tensor([0, 0, 1, 1, 2, 2]), values, labels)
    unit = torch.nn.functional.normalize(values, dim=1)
    for i in range(6):
        score, relevant = unit[:, i % 2], labels == i // 2
        assert precision[i].item() == pytest.approx(average_precision_score(relevant, score))
        best = score[relevant].max()
        assert first[i] == 1 + ((score >= best) & ~relevant).sum()


@pytest.mark.parametrize("alone", [False, True])
def test_chunks_blocks_and_parts_change_nothing(alone):
    labels, query = torch.randint(4, (31,)), torch.randn(31, 5)
    gallery = () if alone else (torch.randn(50, 5), torch.randint(4, (50,)))
    whole = search(query, labels, *gallery)
    for chunk_bytes in (1, 64 * 50 * 4):
        parts = [
            search(query, labels, *gallery, rows=rows, chunk_bytes=chunk_bytes, columns=7)
            for rows in (range(11), range(11, 11), range(11, 31))
        ]
        assert torch.equal(torch.cat([part[1] for part in parts]), whole[1])
        torch.testing.assert_close(torch.cat([part[0] for part in parts]), whole[0])


@pytest.mark.parametrize(
    ("query", "labels", "gallery", "message"),
    [
        ((3, 2), 2, None, "query: features (3, 2) and labels (2,) do not match"),
        ((3, 2), 3, (4, 3), "gallery: features (4, 2) and labels (3,) do not match"),
        ((0, 2), 0, (4, 4), "retrieval needs images: 0 queries, 4 to find"),
        ((3, 2), 3, (0, 0), "retrieval needs images: 3 queries, 0 to find"),
        ((1, 2), 1, None, "retrieval needs images: 1 queries, 1 to find"),
    ],
)
def test_what_cannot_be_searched_is_refused(query, labels, gallery, message):
    its = () if gallery is None else (torch.randn(gallery[0], 2), torch.zeros(gallery[1]).long())
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared
        search(torch.randn(query), torch.zeros(labels).long(), *its)
    assert str(error.value) == message


# Copy detection.


@pytest.mark.parametrize("size", [16, 20])  # and one that leaves a rest of a patch
def test_features_for_copies_are_the_class_token_and_the_patches_pooled_by_gem(tmp_path: Path, size):
    network: Any = load_backbone(str(make_run(tmp_path, n=3)))
    images = torch.randn(3, 3, size, size)
    tokens = network.get_intermediate_layers(images)[0].double()
    positive = tokens[:, 1:].clamp(min=1e-6)
    pooled = ((positive**4).sum(1) / 4) ** 0.25  # two by two patches
    expected = torch.cat((tokens[:, 0], pooled), dim=1)
    torch.testing.assert_close(copy_features(network, images).double(), expected, atol=1e-5, rtol=1e-5)
    assert expected.shape == (3, 256)


def test_copies_are_seen_whole_and_made_square():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    official = resize(image, [24, 24], InterpolationMode.BICUBIC)
    np.testing.assert_array_equal(np.asarray(square(image, 24)), np.asarray(official))


# The command.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("run"))
    for i in (0, 1):  # a class of one, and one that the gallery does not have
        path = folder / "query" / ("alone" if i else "class0") / f"{i}.png"
        path.parent.mkdir(parents=True)
        Image.open(folder / "val" / f"class{i}" / f"{i}.png").save(path)
    return folder


def command(run: Path, **flags: Any) -> RetrievalCommand:
    options = {"weights": str(run), "query": str(run / "val"), "workers": 0, "device": "cpu"}
    return RetrievalCommand(**(options | flags))


def test_images_of_a_folder_are_searched_among_the_others(run: Path, capsys):
    command(run, json=str(run / "out.json"), k=(1, 3, 50)).run()
    source = open_source(str(run / "val"))
    features, kept = extract(load_backbone(str(run)), source, CONFIG.data.crops)
    labels = source.labels[kept.numpy()]
    precisions, places = [], []
    unit = torch.nn.functional.normalize(features.double(), dim=1).numpy()
    for i in range(36):
        others = np.arange(36) != i
        score, relevant = unit[others] @ unit[i], labels[others] == labels[i]
        precisions.append(average_precision_score(relevant, score))
        places.append(relevant[np.argsort(-score)].argmax())
    found = json.loads((run / "out.json").read_text())
    assert found == {
        "queries": 36,
        "left_out": 0,
        "gallery": 35,
        "mAP": pytest.approx(100 * np.mean(precisions)),
        "recall": {str(k): pytest.approx(100 * np.mean(np.array(places) < k)) for k in (1, 3, 50)},
    }
    assert 20 < found["mAP"] < 80
    assert 20 < found["recall"]["1"] < found["recall"]["3"]
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"retrieval in %: 36 images of {run}/val, each among the 35 others"
    assert out[-1] == "k = 50: there are 35 images to find, all of them are looked at"
    rows = [" ".join(line.replace("│", " ").split()) for line in out]
    numbers = (found["mAP"], *found["recall"].values())
    assert " ".join(("features", *(f"{x:.1f}" for x in numbers))) in rows


@pytest.mark.parametrize("copies", [False, True])
def test_a_gallery_may_have_other_classes(run: Path, copies, capsys):
    flags = {"query": str(run / "query"), "gallery": str(run / "images"), "copy_detection": copies}
    command(run, **flags, image_size=24, json=str(run / "out.json")).run()
    network: Any = load_backbone(str(run))
    gallery, policy = (
        open_source(str(run / "images")),
        CropPolicy(global_crops_size=24, local_crops_number=0),
    )
    view = square if copies else crops.eval_image

    def features(images: Tensor) -> Tensor:
        return copy_features(network, images) if copies else network(images)

    x, _ = extract(features, gallery, policy, view=view)
    query, _ = extract(features, open_source(str(run / "query")), policy, view=view)
    # the second image of the folder of queries, after "alone"
    score = torch.cosine_similarity(query[1:].double(), x.double()).numpy()
    relevant = gallery.labels == gallery.classes.index("class0")
    found = json.loads((run / "out.json").read_text())
    assert found["mAP"] == pytest.approx(100 * average_precision_score(relevant, score))
    assert (found["queries"], found["left_out"], found["gallery"]) == (1, 1, 36)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"retrieval in %: 1 images of {run}/query, each among 36 of {run}/images"
    assert out[-1] == "left out: 1 images without another of their class"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"k": ()}, "--k : give numbers of images, 1 or more"),
        ({"k": (5, 0)}, "--k 5 0: give numbers of images, 1 or more"),
        ({"query": "{run}/val/class0"}, "{run}/val/class0 has no labels: retrieval needs a sub-folder per"),
        ({"gallery": "{run}/val/class0"}, "{run}/val/class0 has no labels: retrieval needs a sub-folder per"),
        ({"gallery": "{run}/none"}, "{run}/none: no such folder or file; give a folder of images or"),
        ({"query": "{run}/query"}, "no image of {run}/query has another of its class: there is nothing to"),
        (
            {"gallery": "{run}/strange"},
            "no image of {run}/val has another of its class in {run}/strange: there is nothing to find",
        ),
        ({"query": "{run}/broken"}, "{run}/broken: none of its 2 images can be read"),
    ],
)
def test_bad_input_is_refused(run: Path, flags, message, monkeypatch, capsys):
    for name in ("a", "b"):
        (run / "broken" / name).mkdir(parents=True, exist_ok=True)
        (run / "broken" / name / "x.png").write_bytes(b"no image")
        (run / "strange" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(run / "strange" / name / "x.png")
    filled = {k: v.replace("{run}", str(run)) if isinstance(v, str) else v for k, v in flags.items()}
    said = refusal(lambda: command(run, **filled), monkeypatch)
    assert said.startswith("fastdino-eval: " + message.replace("{run}", str(run)))
    assert capsys.readouterr().out == ""


def test_networks_without_patches_are_refused(run: Path, monkeypatch):
    from fastdino.adapter import torchvision_backbone

    torch.save(torchvision_backbone("resnet18").state_dict(), run / "resnet.pth")
    flags = {"weights": str(run / "resnet.pth"), "copy_detection": True}
    said = refusal(lambda: command(run, **flags), monkeypatch)
    assert said == "fastdino-eval: --copy-detection: a ResNet has no patch tokens"
