"""`fastdino-eval knn` on a folder of little images: the table, the JSON, the baselines and each refusal."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import checkpoint
from fastdino import eval as eval_
from fastdino.config import Config, CropPolicy, DataConfig, ModelConfig
from fastdino.data import open_source
from fastdino.dino import DINO, load_backbone
from fastdino.eval import KNN
from fastdino.eval.features import raw_pixels
from fastdino.eval.knn import evaluate_knn

CONFIG = Config(
    data=DataConfig(crops=CropPolicy(global_crops_size=16, local_crops_size=8)),
    model=ModelConfig(arch="vit_nano", patch_size=8, out_dim=8, head_hidden_dim=8, bottleneck_dim=4),
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with a teacher, and folders `images` and `val` of 36 in three classes, hard to tell."""
    torch.manual_seed(11)  # another than the run's: a trained teacher has not its initial weights
    checkpoint.write_teacher(tmp_path / "teacher.safetensors", DINO(CONFIG).teacher, CONFIG, 7)
    rng = np.random.default_rng(0)
    for folder in ("images", "val"):
        for i in range(36):
            path = tmp_path / folder / f"class{i % 3}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            colour = 110 + rng.normal(0, 14, 3) + 16 * np.eye(3)[i % 3]
            pixels = np.clip(colour + rng.normal(0, 30, (20, 24, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path


def knn(run: Path, **flags: object) -> KNN:
    options = {"weights": str(run), "data": str(run / "images"), "workers": 0, "device": "cpu", "k": (1, 5)}
    return KNN(**(options | flags))


def test_accuracies_are_those_of_the_teacher_and_of_both_baselines(run: Path, capsys):
    knn(run, baselines=True, json=str(run / "out.json")).run()
    source, policy = open_source(str(run / "images")), CONFIG.data.crops
    torch.manual_seed(CONFIG.run.seed)
    networks = {
        "untrained network": DINO(CONFIG).teacher.backbone.eval(),
        "raw pixels": raw_pixels,
        "teacher": load_backbone(str(run)),
    }
    expected = {
        name: {str(k): a for k, a in evaluate_knn(network, source, None, policy, ks=(1, 5)).items()}
        for name, network in networks.items()
    }
    assert json.loads((run / "out.json").read_text()) == expected
    assert (
        len({tuple(accuracy.values()) for accuracy in expected.values()}) == 3
    )  # else a mix-up would not show
    rows = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    for name, accuracy in expected.items():
        assert f"{name} {accuracy['1']:.1f} {accuracy['5']:.1f}" in rows
    assert rows[0] == "k-NN accuracy in %: 36 images by the others, 3 classes"


def test_images_of_val_are_classified_by_those_of_data(run: Path, capsys):
    knn(run, val=str(run / "val"), temperature=0.2, json=str(run / "out.json")).run()
    train, val = open_source(str(run / "images")), open_source(str(run / "val"))
    accuracy = evaluate_knn(
        load_backbone(str(run)), train, val, CONFIG.data.crops, ks=(1, 5), temperature=0.2
    )
    assert json.loads((run / "out.json").read_text()) == {"teacher": {str(k): a for k, a in accuracy.items()}}
    knn(run, val=str(run / "val"), json=str(run / "other.json")).run()
    assert (run / "other.json").read_text() != (run / "out.json").read_text()  # of another temperature
    title = capsys.readouterr().out.splitlines()[0]
    assert title == f"k-NN accuracy in %: 36 images of {run / 'val'} by 36, 3 classes"


def test_the_file_itself_may_be_named(run: Path):
    knn(run, weights=str(run / "teacher.safetensors"), json=str(run / "a.json")).run()
    knn(run, json=str(run / "b.json")).run()
    assert (run / "a.json").read_text() == (run / "b.json").read_text()


def test_the_command_runs_by_itself(run: Path, capsys):
    flags = f"--data {run}/images --k 1 3 --baselines --workers 1 --device cpu --json {run}/out.json".split()
    command = [sys.executable, "-c", "from fastdino.eval import main; main()", "knn", str(run), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    knn(run, k=(1, 3), baselines=True, json=str(run / "here.json")).run()
    assert (run / "out.json").read_text() == (run / "here.json").read_text()
    assert done.stdout == capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"k": ()}, "--k : give numbers of neighbours, 1 or more"),
        ({"k": (10, 0)}, "--k 10 0: give numbers of neighbours, 1 or more"),
        ({"temperature": 0.0}, "--temperature 0.0: a temperature is above 0"),
        ({"batch_size": 0}, "--batch-size 0: give 1 or more"),
        ({"device": "gpu"}, "--device gpu: give auto, cpu, cuda or cuda:N"),
        ({"json": "/nowhere/a.json"}, "--json /nowhere/a.json: there is no folder /nowhere; make it first"),
        (
            {"weights": "{run}/none"},
            "{run}/none does not exist: give a run's folder or its teacher.safetensors",
        ),
        (
            {"weights": "{run}/images"},
            "{run}/images/teacher.safetensors does not exist: give a run's folder or",
        ),
        ({"weights": "{run}/images/class0/0.png"}, "{run}/images/class0/0.png cannot be read as weights: "),
        ({"data": "{run}/none"}, "{run}/none: no such folder or file; give a folder of images or"),
        (
            {"data": "{run}/images/class0"},
            "{run}/images/class0 has no labels: k-NN needs a sub-folder per class",
        ),
        (
            {"val": "{run}/images/class0"},
            "{run}/images/class0 has no labels: k-NN needs a sub-folder per class",
        ),
        ({"val": "{run}/other"}, "{run}/other has classes that {run}/images does not have: class3"),
    ],
)
def test_bad_input_is_refused_with_one_sentence(run: Path, flags, message, monkeypatch, capsys):
    (run / "val").rename(run / "other")
    (run / "other" / "class1").rename(run / "other" / "class3")
    filled = {k: v.replace("{run}", str(run)) if isinstance(v, str) else v for k, v in flags.items()}
    monkeypatch.setattr(eval_.tyro.extras, "subcommand_cli_from_dict", lambda *a, **k: knn(run, **filled))
    with pytest.raises(SystemExit) as exit_:
        eval_.main()
    assert str(exit_.value.code).startswith("fastdino-eval: " + message.replace("{run}", str(run)))
    assert capsys.readouterr().out == ""


def test_flags_have_no_prefix_and_data_is_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.setattr(sys, "argv", ["fastdino-eval", "knn", "--help"])
    with pytest.raises(SystemExit) as exit_:
        eval_.main()
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    for field in dataclasses.fields(KNN):
        assert field.name == "weights" or re.search(rf" --{field.name.replace('_', '-')}[ ,]", out)
    monkeypatch.setattr(sys, "argv", ["fastdino-eval", "knn", "teacher.safetensors"])
    with pytest.raises(SystemExit) as exit_:
        eval_.main()
    assert exit_.value.code == 2
    assert "--data" in capsys.readouterr().err
