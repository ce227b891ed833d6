"""`fastdino-eval knn` on a folder of little images: the table, the JSON, the baselines and each refusal; and
what all commands share: their flags, weights of others, what they say, and several ranks against one."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_runs import CONFIG, make_run, refusal

from fastdino import eval as eval_
from fastdino.config import CropPolicy
from fastdino.data import open_source
from fastdino.dino import DINO
from fastdino.eval.common import raw_pixels, untrained
from fastdino.eval.knn import KnnCommand, evaluate_knn
from fastdino.weights import load_backbone


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def knn(run: Path, **flags: object) -> KnnCommand:
    options = {"weights": str(run), "data": str(run / "images"), "workers": 0, "device": "cpu", "k": (1, 5)}
    return KnnCommand(**(options | flags))


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


def test_a_run_that_began_with_weights_is_compared_with_these(run: Path, tmp_path: Path):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, init_from=str(run)))
    (tmp_path / "later").mkdir()
    later = make_run(tmp_path / "later", config=config)
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(untrained(str(later))(x), load_backbone(str(run))(x))
    assert not torch.equal(untrained(str(run))(x), load_backbone(str(run))(x))
    (run / "teacher.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=str(run)):
        untrained(str(later))


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
    command = [sys.executable, "-m", "fastdino.eval", "knn", str(run), *flags]
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
        ({"workers": -2}, "--workers -2: give 0 or more, or -1 to choose by the machine"),
        ({"image_size": 5000}, "--image-size 5000: give 1 to 4096 pixels"),
        ({"image_size": 7}, "images of 7 x 7 pixels hold no patch of 8"),
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
    said = refusal(lambda: knn(run, **filled), monkeypatch)
    assert said.startswith("fastdino-eval: " + message.replace("{run}", str(run)))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", eval_.COMMANDS)
def test_flags_have_no_prefix(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.setattr(sys, "argv", ["fastdino-eval", name, "--help"])
    with pytest.raises(SystemExit) as exit_:
        eval_.main()
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    for field in dataclasses.fields(eval_.COMMANDS[name]):
        assert field.name == "weights" or re.search(rf" --{field.name.replace('_', '-')}[ ,]", out)


def test_data_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastdino-eval", "knn", "teacher.safetensors"])
    with pytest.raises(SystemExit) as exit_:
        eval_.main()
    assert exit_.value.code == 2
    assert "--data" in capsys.readouterr().err


def test_official_weights_and_a_size_of_images(run: Path):
    torch.save({"teacher": load_backbone(str(run)).state_dict()}, run / "official.pth")
    knn(run, image_size=24, json=str(run / "a.json")).run()
    knn(run, weights=str(run / "official.pth"), image_size=24, json=str(run / "b.json")).run()
    assert json.loads((run / "a.json").read_text()) == json.loads((run / "b.json").read_text())
    source, policy = open_source(str(run / "images")), CropPolicy(global_crops_size=24, local_crops_number=0)
    accuracy = evaluate_knn(load_backbone(str(run)), source, None, policy, ks=(1, 5))
    assert json.loads((run / "a.json").read_text())["teacher"] == {str(k): a for k, a in accuracy.items()}


def test_what_is_not_as_asked_is_said(run: Path, capsys):
    for name in ("0", "3"):
        (run / "images" / "class0" / f"{name}.png").write_bytes(b"no image")
    knn(run, k=(5, 36, 100), json=str(run / "out.json")).run()
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0] == "k = 36, 100: there are 35 neighbours, all of them vote"
    broken = [str(run / "images" / "class0" / f"{name}.png") for name in ("0", "3")]
    assert last[1] == f"left out, they cannot be read: 2 images: {', '.join(broken)}"


@pytest.mark.parametrize("name", ["knn", "linear", "retrieval", "features"])
def test_networks_for_other_images_than_rgb_are_refused(name, run: Path, monkeypatch):
    state = load_backbone(str(run)).state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :1]
    torch.save(state, run / "gray.pth")
    images, val = str(run / "images"), str(run / "val")
    flags = {
        "knn": {"data": images},
        "linear": {"data": images, "val": val},
        "retrieval": {"query": images},
        "features": {"data": images, "out": str(run / "x.npy")},
    }
    make: Any = eval_.COMMANDS[name]
    said = refusal(lambda: make(weights=str(run / "gray.pth"), device="cpu", **flags[name]), monkeypatch)
    assert said == (
        f"fastdino-eval: {run}/gray.pth: a network for images of 1 channels, and images are read as RGB; "
        "give weights of a network for 3"
    )


COMMANDS = """
import json, sys
from fastdino import distributed
from fastdino.eval import COMMANDS
with distributed.process_group("cpu"):
    for name, flags in json.loads(sys.argv[1]):
        COMMANDS[name](device="cpu", workers=0, **flags).run()
"""


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Two ranks of a script or module."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        *arguments,
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


def test_two_ranks_find_what_one_does_and_print_it_once(tmp_path: Path, capsys):
    run = make_run(tmp_path, classes=6, n=37)  # neither sets nor batches divide by two
    (run / "images" / "class1" / "7.png").write_bytes(b"no image")
    (run / "val" / "class0" / "36.png").write_bytes(b"no image")
    images, val = str(run / "images"), str(run / "val")
    linear = {"data": images, "val": val, "epochs": 3, "batch_size": 9, "lr": (0.01, 3.0)}
    jobs: list[tuple[str, dict[str, Any]]] = [
        ("knn", {"data": images, "val": val, "k": (1, 5), "baselines": True}),
        ("knn", {"data": images, "k": (1, 5)}),
        ("linear", linear),
        ("linear", {**linear, "cached": True}),
        ("retrieval", {"query": images}),
        ("retrieval", {"query": images, "gallery": val, "copy_detection": True}),
        ("features", {"data": images, "patches": True}),
    ]
    alone, several = ([(name, dict(flags)) for name, flags in jobs] for _ in range(2))
    for where, its in (("one", alone), ("two", several)):
        (run / where).mkdir()
        for i, (name, flags) in enumerate(its):
            flags |= {"weights": str(run), "json": str(run / where / f"{i}.json")}
            if name == "features":
                flags["out"] = str(run / where / "features.npy")
    for name, flags in alone:
        eval_.COMMANDS[name](device="cpu", workers=0, **flags).run()
    out = capsys.readouterr().out
    (run / "commands.py").write_text(COMMANDS)
    done = torchrun(str(run / "commands.py"), json.dumps(several))
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace(str(run / "two"), str(run / "one")) == out
    for path in (run / "one").iterdir():
        theirs = run / "two" / path.name
        if path.suffix == ".npy":
            np.testing.assert_allclose(np.load(theirs), np.load(path), atol=1e-5)
        else:
            assert json.loads(theirs.read_text()) == json.loads(path.read_text()), path.name


def test_torchrun_starts_the_command_and_a_refusal_is_said_once(run: Path):
    done = torchrun("-m", "fastdino.eval", "knn", str(run), "--data", str(run / "none"), "--device", "cpu")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("fastdino-eval")]
    assert said == [line for line in said if f"{run}/none: no such folder or file" in line]
    assert len(said) == 1
