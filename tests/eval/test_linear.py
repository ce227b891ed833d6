"""Linear classifiers against their formula in float64, torch's optimiser and scikit-learn, and
`fastdino-eval linear` against official DINO's recipe written out image by image."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_runs import CONFIG, make_run, refusal
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import make_blobs
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import hflip, resized_crop

from fastdino import distributed
from fastdino.adapter import torchvision_backbone
from fastdino.backbones import build_backbone
from fastdino.config import Config, ModelConfig
from fastdino.data import crops, epoch_order, open_source
from fastdino.eval.linear import (
    EPOCHS,
    RATES,
    Heads,
    LinearCommand,
    augmented,
    cached,
    choose_layers,
    probe_features,
    train_heads,
    train_view,
)
from fastdino.weights import load_backbone

CPU = torch.device("cpu")
POLICY = CONFIG.data.crops
Array = NDArray[np.float64]


def by_formula(
    weight: Array, batches: list[list[tuple[Array, NDArray[Any]]]], rate: float
) -> list[tuple[Array, Array]]:
    """(W, b) after each epoch of official DINO's training from weights (C, D) and b = 0, in float64."""
    bias = np.zeros(len(weight))
    velocity = [np.zeros_like(weight), np.zeros_like(bias)]
    after = []
    for epoch, its in enumerate(batches):
        lr = 0.5 * rate * (1 + math.cos(math.pi * epoch / len(batches)))
        for x, labels in its:
            logits = x @ weight.T + bias
            p = np.exp(logits - logits.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            error = (p - np.eye(len(weight))[labels]) / len(x)
            for i, gradient in enumerate((error.T @ x, error.sum(0))):
                velocity[i] = 0.9 * velocity[i] + gradient
            weight, bias = weight - lr * velocity[0], bias - lr * velocity[1]
        after.append((weight, bias))
    return after


def some_batches(epochs: int, classes: int, width: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Batches of 6, 6 and 3."""
    return [
        [(torch.randn(n, width).double(), torch.randint(classes, (n,))) for n in (6, 6, 3)]
        for _ in range(epochs)
    ]


def test_heads_take_official_steps_in_float64():
    rates, batches = (0.05, 0.7, 4.0), some_batches(4, classes=3, width=5)
    heads = Heads(rates, 3, 5, seed=2, dtype=torch.float64)
    start = heads.weight[0].detach().numpy().copy()
    # none held out: the accuracy is of no concern here
    for _ in train_heads(heads, lambda epoch: batches[epoch], 4, torch.randn(1, 5), torch.tensor([0])):
        pass
    numpy = [[(x.numpy(), y.numpy()) for x, y in its] for its in batches]
    for i, rate in enumerate(rates):
        weight, bias = by_formula(start, numpy, rate)[-1]
        np.testing.assert_allclose(heads.weight[i].detach(), weight, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(heads.bias[i].detach(), bias, rtol=1e-12, atol=1e-14)


def test_heads_are_what_torchs_sgd_and_cosine_schedule_make():
    batches = some_batches(5, classes=4, width=6)
    heads = Heads((0.3, 1.0), 4, 6, dtype=torch.float64)
    layers = [nn.Linear(6, 4).double() for _ in heads.rates]
    for i, layer in enumerate(layers):
        layer.load_state_dict({"weight": heads.weight[i].detach().clone(), "bias": torch.zeros(4)})
        optimizer = torch.optim.SGD(layer.parameters(), (0.3, 1.0)[i], momentum=0.9, weight_decay=0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5, eta_min=0)
        for its in batches:
            for x, y in its:
                optimizer.zero_grad()
                nn.CrossEntropyLoss()(layer(x), y).backward()
                optimizer.step()
            schedule.step()
    list(train_heads(heads, lambda epoch: batches[epoch], 5, torch.randn(1, 6), torch.tensor([0])))
    for i, layer in enumerate(layers):
        torch.testing.assert_close(heads.weight[i], layer.weight)
        torch.testing.assert_close(heads.bias[i], layer.bias)


def test_heads_begin_as_official_and_equal_and_do_not_touch_one_another():
    heads = Heads((0.1, 0.5), 200, 300)
    assert torch.equal(heads.weight[0], heads.weight[1])
    assert heads.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert heads.weight.mean().item() == pytest.approx(0, abs=1e-4)
    assert not heads.bias.any()
    assert not torch.equal(heads.weight, Heads((0.1, 0.5), 200, 300, seed=1).weight)
    x, y = torch.randn(8, 300), torch.randint(200, (8,))
    wild = Heads((1e38, 0.5), 200, 300)  # its first head is lost
    alone = Heads((0.5,), 200, 300)
    for _ in range(3):
        wild.step(x, y)
        alone.step(x, y)
    assert not wild.weight[0].isfinite().all()
    torch.testing.assert_close(wild.weight[1], alone.weight[0])
    # whichever class the largest of NaNs would be taken for
    assert wild.correct(x[:1].expand(200, -1), torch.arange(200))[:, 0].tolist() == [0, 0]
    assert wild.correct(x, y)[0, 1] == 8


def test_a_batch_without_images_changes_nothing_but_momentum():
    heads = Heads((0.5,), 3, 4)
    heads.step(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    assert torch.equal(heads.weight, Heads((0.5,), 3, 4).weight)


@pytest.mark.filterwarnings("ignore:'k':sklearn.exceptions.UndefinedMetricWarning")  # five of five
@pytest.mark.parametrize("classes", [3, 5, 9])
def test_top_1_and_top_5_are_those_of_scikit_learn(classes, monkeypatch):
    heads = Heads((0.1, 0.2), classes, 4, dtype=torch.float64)
    with torch.no_grad():
        heads.weight[1] = torch.randn(classes, 4)
        heads.bias[1] = torch.randn(classes)
    x, y = torch.randn(53, 4), torch.randint(classes, (53,))
    found = heads.correct(x, y)
    monkeypatch.setattr("fastdino.eval.linear.LOGIT_BYTES", 4 * 2 * classes * 10)
    assert torch.equal(heads.correct(x, y), found)
    logits = heads(x.double()).detach()
    for head in range(2):
        for row, k in enumerate((1, min(5, classes))):
            expected = top_k_accuracy_score(y, logits[:, head], k=k, labels=range(classes), normalize=False)
            assert found[row, head] == expected


def test_accuracy_is_within_a_point_of_logistic_regression():
    x, y = make_blobs(1500, 20, centers=6, cluster_std=12.0, random_state=0)
    train, test = (torch.from_numpy(part).float() / 12 for part in (x[:1000], x[1000:]))
    labels, truth = torch.from_numpy(y[:1000]), torch.from_numpy(y[1000:])
    heads = Heads((0.03, 0.3), 6, 20)
    batches = cached(train, labels, seed=0, batch_size=128, device=CPU)
    *_, last = train_heads(heads, batches, 60, test, truth)
    expected = LogisticRegression(max_iter=2000).fit(train, labels).score(test, truth) * 100
    assert abs(last[0].max().item() - expected) < 1
    assert 60 < expected < 99


# What is classified.


@pytest.mark.parametrize(
    ("arch", "given", "expected"),
    [
        ("vit_nano", (0, None), (4, False)),
        ("vit_small", (0, None), (4, False)),
        ("vit_base", (0, None), (1, True)),
        ("vit_large", (0, None), (1, True)),
        ("vit_base", (4, False), (4, False)),
        ("vit_small", (1, None), (1, False)),
        ("vit_small", (0, True), (4, True)),
    ],
)
def test_layers_are_official_dinos_unless_given(arch, given, expected):
    with torch.device("meta"):
        assert choose_layers(build_backbone(ModelConfig(arch=arch)), *given) == expected


def test_layers_that_are_not_there_are_refused():
    vit, resnet = build_backbone(ModelConfig(arch="vit_nano")), torchvision_backbone("resnet18")
    assert choose_layers(resnet, 0, None) == choose_layers(resnet, 0, False) == (0, False)
    with pytest.raises(ValueError, match="--n-last-blocks 5: this network has 4 blocks"):
        choose_layers(vit, 5, None)
    for given in ((1, None), (0, True)):
        with pytest.raises(ValueError, match="are for a ViT; a ResNet gives its pooled features"):
            choose_layers(resnet, *given)


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize(("blocks", "avgpool"), [(1, False), (1, True), (3, False), (2, True)])
def test_features_are_the_last_class_tokens_and_the_mean_patch(registers, blocks, avgpool):
    arch = ModelConfig(arch="vit_nano", patch_size=8, num_register_tokens=registers)
    network: Any = build_backbone(arch, 16).eval()
    images = torch.randn(2, 3, 16, 16)
    outputs = network.get_intermediate_layers(images, blocks)
    parts = [x[:, 0] for x in outputs] + [outputs[-1][:, 1 + registers :].mean(1)] * avgpool
    found = probe_features(network, blocks, avgpool)(images)
    torch.testing.assert_close(found, torch.cat(parts, 1), atol=1e-5, rtol=1e-5)


# Views and batches.


def test_a_training_view_is_torchvisions_random_resized_crop():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    shares, ratios, flips = [], [], 0
    for index in range(300):
        view = train_view(image, POLICY, 5, 2, index)
        whole = crops.draw(
            crops.CropPolicy(
                global_crops_size=16,
                global_crops_scale=(0.08, 1.0),
                aspect_ratio=(3 / 4, 4 / 3),
                flip=0.5,
                local_crops_number=0,
            ),
            5,
            2,
            index,
            (120, 90),
        )[0]
        top, left, height, width = whole.box
        expected = resized_crop(image, top, left, height, width, [16, 16], InterpolationMode.BILINEAR)
        expected = hflip(expected) if whole.flip else expected
        np.testing.assert_array_equal(np.asarray(view), np.asarray(expected))
        shares.append(height * width / (90 * 120))
        ratios.append(width / height)
        flips += whole.flip
    assert 0.07 < min(shares) < 0.15
    assert 0.9 < max(shares) <= 1
    assert 0.38 < np.mean(shares) < 0.52  # under (0.08 + 1) / 2: not every large box fits into 120 x 90
    assert 0.73 < min(ratios) < max(ratios) < 1.37
    assert 120 < flips < 180


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), classes=6, n=37)


@pytest.mark.parametrize("workers", [0, 2])
def test_each_epoch_has_every_readable_image_once_and_other_views(run: Path, tmp_path: Path, workers):
    images = make_run(tmp_path, classes=3, n=13) / "images"
    broken = images / "class1" / "4.png"
    broken.write_bytes(b"no image")
    source, unreadable, seen = open_source(str(images)), list[str](), []
    batches = augmented(
        lambda x: x,
        source,
        POLICY,
        width=3 * 16 * 16,
        seed=3,
        epochs=2,
        batch_size=5,
        device=CPU,
        workers=workers,
        unreadable=unreadable,
    )
    for epoch in range(2):
        its = list(batches(epoch))
        order = [i for i in epoch_order(13, 3, epoch).tolist() if source.path(i) != str(broken)]
        x, labels = (torch.cat(parts) for parts in zip(*its, strict=True))
        assert labels.tolist() == source.labels[order].tolist()
        views = torch.stack([crops.to_tensor(train_view(source.load(i), POLICY, 3, epoch, i)) for i in order])
        torch.testing.assert_close(x, crops.normalize(views, POLICY).flatten(1))
        assert sorted(len(part) for part, _ in its) in ([2, 5, 5], [3, 4, 5])
        seen.append(x[torch.tensor(order).argsort()])
    assert not torch.equal(*seen)
    assert unreadable == [str(broken)] * 2


@pytest.mark.parametrize("how", ["augmented", "cached"])
def test_ranks_share_each_batch(run: Path, how, monkeypatch):
    source, features = open_source(str(run / "images")), torch.randn(37, 4)
    labels = torch.from_numpy(source.labels)

    def batches() -> list[tuple[Tensor, Tensor]]:
        if how == "cached":
            return list(cached(features, labels, seed=1, batch_size=5, device=CPU)(1))
        options: dict[str, Any] = {
            "width": 3,
            "seed": 1,
            "epochs": 2,
            "batch_size": 5,
            "device": CPU,
            "workers": 0,
        }
        its = augmented(lambda x: x.mean((2, 3)), source, POLICY, **options)
        list(its(0))
        return list(its(1))

    whole = batches()
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(batches())
    assert {len(part) for part in parts} == {len(whole)} == {8}
    for (x, y), *its in zip(whole, *parts, strict=True):
        for rank, (part, truth) in enumerate(its):
            torch.testing.assert_close(part, x[rank::3], check_dtype=False)
            assert torch.equal(truth, y[rank::3])
    assert [len(part[-1][0]) for part in parts] == [1, 1, 0]


# The command.


def command(run: Path, **flags: Any) -> LinearCommand:
    options = {"data": str(run / "images"), "val": str(run / "val"), "workers": 0, "device": "cpu"}
    return LinearCommand(**({"weights": str(run), "epochs": 3, "batch_size": 10} | options | flags))


def token_features(network: Any, views: list[Image.Image], blocks: int) -> Array:
    """Class tokens of the last blocks, image by image, in float64."""
    rows = []
    for view in views:
        x = crops.normalize(crops.to_tensor(view)[None], POLICY)
        rows.append(torch.cat([out[0, 0] for out in network.get_intermediate_layers(x, blocks)]))
    return torch.stack(rows).double().numpy()


@pytest.mark.parametrize("how", ["cached", "augmented"])
def test_figures_are_those_of_the_recipe_written_out(run: Path, how, capsys):
    rates = (0.02, 2.0)
    command(run, lr=rates, seed=7, cached=how == "cached", n_last_blocks=2, json=str(run / "out.json")).run()
    network = load_backbone(str(run))
    train, val = open_source(str(run / "images")), open_source(str(run / "val"))
    plain = {
        source: token_features(network, [crops.eval_image(source.load(i), 16) for i in range(37)], 2)
        for source in (train, val)
    }
    batches = []
    for epoch in range(3):
        order = epoch_order(37, 7, epoch).numpy()
        if how == "cached":
            x = plain[train][order]
        else:
            views = [train_view(train.load(i), POLICY, 7, epoch, i) for i in order]
            x = token_features(network, views, 2)
        y = train.labels[order]
        batches.append([(x[i : i + 10], y[i : i + 10]) for i in range(0, 37, 10)])
    start = torch.randn(6, 256, generator=torch.Generator().manual_seed(7)).double().numpy() * 0.01
    found = json.loads((run / "out.json").read_text())
    about = {"n_last_blocks": 2, "avgpool": False, "width": 256, "cached": how == "cached", "epochs": 3}
    assert {key: found[key] for key in about} == about
    top1 = {}
    for rate in rates:
        after = [
            [
                100 * top_k_accuracy_score(val.labels, plain[val] @ w.T + b, k=k, labels=range(6))
                for k in (1, 5)
            ]
            for w, b in by_formula(start, batches, rate * 10 / 256)
        ]
        top1[rate] = [first for first, _ in after]
        assert found["lr"][str(rate)] == {
            "top1": pytest.approx(after[-1][0]),
            "top5": pytest.approx(after[-1][1]),
            "best_top1": pytest.approx(max(top1[rate])),
            "best_epoch": top1[rate].index(max(top1[rate])) + 1,
        }
    assert len({x for its in top1.values() for x in its}) > 2  # else little would be compared
    best = max(rates, key=lambda rate: max(top1[rate]))
    assert found["best"] == {"lr": best, **found["lr"][str(best)]}
    out = capsys.readouterr().out.splitlines()
    assert out[0] == (
        f"linear accuracy in %: 37 images of {run}/val, 6 classes; trained on 37 images of {run}/images"
    )
    assert out[1].startswith("class tokens of the last 2 blocks (256 numbers) of ")
    rows = [" ".join(line.replace("│", " ").split()) for line in out]
    for rate in rates:
        its = found["lr"][str(rate)]
        numbers = " ".join(f"{its[key]:.1f}" for key in ("top1", "top5", "best_top1"))
        assert f"{rate:g} {numbers} {its['best_epoch']}" in rows
    said = f"best: {found['best']['best_top1']:.1f} % with --lr {best:g} after epoch"
    assert any(line.startswith(said) and "--val" in line for line in out)
    assert out[-1].startswith("it is the last of those tried at its end")


def test_defaults_are_official_dinos():
    assert EPOCHS == 100
    assert 0.001 in RATES
    assert LinearCommand(weights="", data="", val="").batch_size == 128


def test_three_classes_have_no_top_5_and_unreadable_files_are_named(tmp_path: Path, capsys):
    run = make_run(tmp_path, n=12)
    broken = [run / "images" / "class0" / "3.png", run / "val" / "class1" / "1.png"]
    for path in broken:
        path.write_bytes(b"no image")
    command(run, lr=(0.1,), json=str(run / "out.json")).run()
    assert set(json.loads((run / "out.json").read_text())["best"]) == {
        "lr",
        "top1",
        "best_top1",
        "best_epoch",
    }
    out = capsys.readouterr().out.splitlines()
    assert out[0] == (
        f"linear accuracy in %: 11 images of {run}/val, 3 classes; trained on 11 images of {run}/images"
    )
    assert "top-5" not in "".join(out)
    assert out[-1] == f"left out, they cannot be read: 2 images: {broken[0]}, {broken[1]}"


def test_a_resnet_gives_its_pooled_features(tmp_path: Path):
    config = Config(data=CONFIG.data, model=ModelConfig(arch="resnet18", out_dim=8, head_hidden_dim=8))
    run = make_run(tmp_path, n=9, config=config)
    command(run, epochs=1, image_size=32, json=str(run / "out.json")).run()
    found = json.loads((run / "out.json").read_text())
    assert (found["n_last_blocks"], found["avgpool"], found["width"]) == (0, False, 512)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lr": ()}, "--lr : give learning rates above 0"),
        ({"lr": (0.1, 0.0)}, "--lr 0.1 0.0: give learning rates above 0"),
        ({"lr": (math.nan,)}, "--lr nan: give learning rates above 0"),
        ({"epochs": 0}, "--epochs 0: give 1 or more"),
        ({"batch_size": 0}, "--batch-size 0: give 1 or more"),
        ({"n_last_blocks": -1}, "--n-last-blocks -1: give 1 or more"),
        ({"n_last_blocks": 5}, "--n-last-blocks 5: this network has 4 blocks"),
        ({"seed": -1}, "--seed -1: give 0 or more"),
        ({"val": "{run}/none"}, "{run}/none: no such folder or file; give a folder of images or"),
        (
            {"data": "{run}/images/class0"},
            "{run}/images/class0 has no labels: linear evaluation needs a sub-folder per class, two at least",
        ),
        ({"val": "{run}/other"}, "{run}/other has classes that {run}/images does not have: b"),
        ({"val": "{run}/broken"}, "{run}/broken: none of its 2 images can be read"),
        ({"data": "{run}/broken", "val": "{run}/fine"}, "{run}/broken: none of its 2 images can be read"),
        (
            {"data": "{run}/broken", "val": "{run}/fine", "cached": True},
            "{run}/broken: none of its 2 images can be read",
        ),
    ],
)
def test_bad_input_is_refused(run: Path, flags, message, monkeypatch, capsys):
    for folder, name in (("broken", "class0"), ("broken", "class1"), ("other", "class0"), ("other", "b")):
        (run / folder / name).mkdir(parents=True, exist_ok=True)
        (run / folder / name / "x.png").write_bytes(b"no image")
    for name in ("class0", "class1"):
        (run / "fine" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(run / "fine" / name / "x.png")
    filled = {k: v.replace("{run}", str(run)) if isinstance(v, str) else v for k, v in flags.items()}
    said = refusal(lambda: command(run, **filled), monkeypatch)
    assert said.startswith("fastdino-eval: " + message.replace("{run}", str(run)))
    assert capsys.readouterr().out == ""


def test_ctrl_c_ends_it_at_once_with_its_workers(run: Path):
    out = run / "stopped.json"
    arguments = ["--data", str(run / "images"), "--val", str(run / "val"), "--epochs", "100000"]
    arguments += ["--workers", "2", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastdino.eval", "linear", str(run), *arguments, "--json", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # torch warns of two workers on one core
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore:This DataLoader will create"},
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline, workers = time.monotonic() + 300, [list[str]()]
    try:
        # the same two for eight looks: those of the held-out images come and go
        while len(set(map(tuple, workers[-8:]))) > 1 or len(workers) < 8 or len(workers[-1]) != 2:
            assert time.monotonic() < deadline, workers[-8:]
            time.sleep(0.1)
            workers.append(children.read_text().split())
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output, error = process.communicate(timeout=300)
    finally:
        process.kill()
    assert (process.returncode, output, error) == (130, "", "fastdino-eval: stopped\n")
    assert not out.exists()
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers[-1])
