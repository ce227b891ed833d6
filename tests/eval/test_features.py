"""What `fastdino-eval features` writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_runs import CONFIG, make_run_with_flaws, refusal
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from fastdino.data import crops, open_source
from fastdino.eval import features
from fastdino.eval.features import FeaturesCommand
from fastdino.weights import load_backbone

POLICY = CONFIG.data.crops


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_with_flaws(tmp_path_factory.mktemp("run"))


def dump(run: Path, out: str, **flags: Any) -> None:
    options = {"weights": str(run), "data": str(run / "images"), "workers": 0, "device": "cpu"}
    FeaturesCommand(**(options | {"out": str(run / out)} | flags)).run()


def by_hand(run: Path, folder: str, size: int = 16) -> tuple[list[str], Tensor, Tensor]:
    """Names, class tokens and mean patch tokens, image by image, in the order of names."""
    network: Any = load_backbone(str(run))
    names, tokens = [], []
    for path in sorted((run / folder).rglob("*.png")):
        try:
            image = Image.open(path).convert("RGB")
        except OSError:
            continue
        x = crops.normalize(crops.to_tensor(crops.eval_image(image, size))[None], POLICY)
        names.append(str(path.relative_to(run / folder)))
        tokens.append(network.get_intermediate_layers(x)[0][0])
    return names, torch.stack([x[0] for x in tokens]), torch.stack([x[1:].mean(0) for x in tokens])


def test_safetensors_hold_features_patches_labels_and_names(run: Path, capsys):
    dump(run, "a.safetensors", patches=True, json=str(run / "figures.json"))
    names, tokens, patches = by_hand(run, "images")
    assert len(names) == 13
    with safe_open(run / "a.safetensors", "pt") as file:
        metadata = file.metadata()
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    assert json.loads(metadata["names"]) == names
    assert json.loads(metadata["classes"]) == ["class0", "class1", "class2"]
    assert (metadata["weights"], metadata["image_size"]) == (str(run), "16")
    assert found.keys() == {"features", "patches", "labels"}
    torch.testing.assert_close(found["features"], tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["patches"], patches, atol=1e-5, rtol=1e-5)
    assert [f"class{label}" for label in found["labels"].tolist()] == [Path(name).parts[0] for name in names]
    assert json.loads((run / "figures.json").read_text()) == {"images": 13, "width": 128, "image_size": 16}
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"13 images of {run}/images, 16 pixels, in {run}/a.safetensors"
    assert out[-1] == f"left out, they cannot be read: 1 images: {run}/images/class1/4.png"


def test_npy_holds_features_and_its_json_the_rest(run: Path):
    dump(run, "b.npy", patches=True, image_size=24, batch_size=4)
    names, tokens, patches = by_hand(run, "images", size=24)
    found = np.load(run / "b.npy")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, tokens, atol=1e-5)
    np.testing.assert_allclose(np.load(run / "b.patches.npy"), patches, atol=1e-5)
    about = json.loads((run / "b.json").read_text())
    assert about["names"] == names
    assert [about["classes"][label] for label in about["labels"]] == [Path(name).parts[0] for name in names]
    assert sorted(p.name for p in run.iterdir() if p.name.startswith((".", "b."))) == [
        "b.json",
        "b.npy",
        "b.patches.npy",
    ]


@pytest.mark.parametrize("out", ["c.npy", "c.safetensors"])
def test_images_without_labels_have_none(run: Path, out):
    dump(run, out, data=str(run / "flat"))
    names, tokens, _ = by_hand(run, "flat")
    assert names[0] == "tür 0.png"
    if out.endswith("npy"):
        about = json.loads((run / "c.json").read_text())
        assert (about["names"], about["labels"], about["classes"]) == (names, None, [])
        found = torch.from_numpy(np.load(run / out))
    else:
        with safe_open(run / out, "pt") as file:
            assert list(file.keys()) == ["features"]
            assert json.loads(file.metadata()["names"]) == names
            found = file.get_tensor("features")
    torch.testing.assert_close(found, tokens, atol=1e-5, rtol=1e-5)


def test_a_write_that_fails_leaves_the_old_file(run: Path, monkeypatch):
    dump(run, "d.npy")
    before = (run / "d.npy").read_bytes()

    def full(file: Any, array: Any) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(features.np, "save", full)
    with pytest.raises(OSError, match="no space left"):
        dump(run, "d.npy", image_size=24)
    assert (run / "d.npy").read_bytes() == before
    assert not [p for p in run.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"out": "x.pt"}, "--out x.pt: give a name that ends in .safetensors or .npy"),
        ({"out": "/nowhere/x.npy"}, "--out /nowhere/x.npy: there is no folder /nowhere; make it first"),
        (
            {"out": "{run}/x.npy", "json": "{run}/x.json"},
            "--json {run}/x.json: --out writes a file of that name; give another",
        ),
        ({"data": "{run}/broken"}, "{run}/broken: none of its 1 images can be read"),
        (
            {"out": "{run}/x.safetensors"},
            "--out {run}/x.safetensors: the names of 14 images take 0 MB, more than the header of a "
            "safetensors file holds; give a name that ends in .npy",
        ),
    ],
)
def test_bad_input_is_refused(run: Path, flags, message, monkeypatch, capsys):
    (run / "broken").mkdir(exist_ok=True)
    (run / "broken" / "x.png").write_bytes(b"no image")
    monkeypatch.setattr(features, "HEADER_BYTES", 14 * len("class0/1.png"))
    filled = {key: value.replace("{run}", str(run)) for key, value in flags.items()}
    said = refusal(lambda: FeaturesCommand(**_options(run) | filled), monkeypatch)
    assert said == "fastdino-eval: " + message.replace("{run}", str(run))
    assert capsys.readouterr().out == ""


def _options(run: Path) -> dict[str, Any]:
    out, data = str(run / "e.npy"), str(run / "images")
    return {"weights": str(run), "data": data, "out": out, "workers": 0, "device": "cpu"}


def test_names_take_as_much_of_the_header_as_is_reckoned(run: Path, monkeypatch):
    source = open_source(str(run / "flat"))
    names = json.dumps([source.name(i) for i in range(3)])
    # what is refused is less than two bytes a name from what the file's header has
    reckoned = sum(len(json.dumps(json.dumps(source.name(i)))) for i in range(3))
    assert abs(len(json.dumps(names)) - reckoned) <= 2 * 3
    monkeypatch.setattr(features, "HEADER_BYTES", reckoned)
    dump(run, "f.safetensors", data=str(run / "flat"))
    monkeypatch.setattr(features, "HEADER_BYTES", reckoned - 1)
    with pytest.raises(ValueError, match=r"give a name that ends in \.npy"):
        dump(run, "f.safetensors", data=str(run / "flat"))
