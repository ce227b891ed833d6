"""Export: each format is loaded here by its own side, strictly, to the same bits or the same features."""

import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file
from tiny import make_config
from torch import Tensor, nn

from fastdino import checkpoint, export
from fastdino.config import Config
from fastdino.dino import DINO
from fastdino.export import Export
from fastdino.vit import VisionTransformer
from fastdino.weights import load_backbone

NETWORKS: dict[str, dict[str, Any]] = {
    "vit": {},
    "registers": {"num_register_tokens": 3, "layer_scale": 0.1},
    "resnet": {"arch": "resnet18"},
    "convnext": {"arch": "timm:convnext_atto", "global_crops_size": 64, "local_crops_size": 32},
}


def make_run(tmp_path: Path, **flags: Any) -> tuple[Path, DINO, Config]:
    """A run's folder with a checkpoint and a teacher of it, none of whose numbers is a default."""
    config = make_config(tmp_path / "images", tmp_path / "run", **flags)
    torch.manual_seed(1)
    dino = DINO(config)
    with torch.no_grad():
        for tensor in dino.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.02 * torch.rand_like(tensor))  # a variance stays above 0
    out = tmp_path / "run"
    out.mkdir()
    checkpoint.write_teacher(out / "teacher.safetensors", dino.teacher, config, 5)
    checkpoint.save(out, 5, dino.state_dict(), {})
    return out, dino, config


def images_of(config: Config, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, config.data.crops.global_crops_size, config.data.crops.global_crops_size)


def features(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return network.eval()(images)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Two float32 forms of one network; onnxruntime's GELU is good to 1e-6 of its own, and errors add up."""
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 2e-5 * expected.norm()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("to", ["torch", "safetensors"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_state_dict_is_the_teachers_backbone_bit_for_bit(tmp_path: Path, network: str, to: str) -> None:
    out, dino, _ = make_run(tmp_path, **NETWORKS[network])
    path = export.export(Export(weights=str(out), to=to))
    assert path == out / ("backbone.pth" if to == "torch" else "backbone.safetensors")
    found = torch.load(path, weights_only=True) if to == "torch" else load_file(path)
    assert_same(found, dino.teacher.backbone.state_dict())
    arch = NETWORKS[network].get("arch", "")
    read = load_backbone(str(path), arch=arch if ":" in arch else "")
    if network != "registers":  # a file alone does not tell that its base grid is another than 224 pixels'
        assert_same(read.state_dict(), dino.teacher.backbone.state_dict())


@pytest.mark.parametrize("network", ["vit", "resnet"])
def test_official_holds_teacher_student_and_centre(tmp_path: Path, network: str) -> None:
    out, dino, config = make_run(tmp_path, **NETWORKS[network])
    found = torch.load(export.export(Export(weights=str(out), to="official")), weights_only=True)
    assert_same(found["teacher"], dino.teacher.state_dict())
    assert_same(found["student"], {f"module.{k}": v for k, v in dino.student.state_dict().items()})
    assert torch.equal(found["dino_loss"]["center"], dino.loss.center)
    again = DINO(config)
    notes = again.load_weights(str(out / "official.pth"))
    assert {"with its head", "with its centre"} <= set(notes)
    assert_same(again.state_dict(), dino.state_dict())
    images = images_of(config)
    assert torch.equal(
        features(load_backbone(str(out / "official.pth")), images), features(dino.teacher.backbone, images)
    )


def test_official_of_a_teacher_alone_has_no_student(tmp_path: Path) -> None:
    out, dino, _ = make_run(tmp_path)
    path = export.export(
        Export(weights=str(out / "teacher.safetensors"), to="official", out=str(tmp_path / "o.pth"))
    )
    found = torch.load(path, weights_only=True)
    assert found.keys() == {"teacher"}
    assert_same(found["teacher"], dino.teacher.state_dict())


def test_a_checkpoint_of_another_step_than_the_teachers_is_not_mixed_in(tmp_path: Path) -> None:
    out, dino, config = make_run(tmp_path)
    checkpoint.write_teacher(out / "teacher.safetensors", dino.teacher, config, 4)
    found = torch.load(export.export(Export(weights=str(out), to="official")), weights_only=True)
    assert found.keys() == {"teacher"}


@pytest.mark.parametrize("network", NETWORKS)
def test_timms_own_model_gives_the_same_features(
    tmp_path: Path, network: str, capsys: pytest.CaptureFixture
) -> None:
    out, dino, config = make_run(tmp_path, **NETWORKS[network])
    path = export.export(Export(weights=str(out), to="timm"))
    # The line that was printed is what a person would type.
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("use it: ")]
    theirs = eval(line.removeprefix("use it: "), {"timm": timm})
    assert type(theirs).__module__.startswith("timm.")
    theirs.load_state_dict(load_file(path), strict=True)
    images = images_of(config)
    expected = features(dino.teacher.backbone, images)
    torch.testing.assert_close(
        features(theirs, images), expected, rtol=2e-5, atol=2e-5 * expected.abs().max()
    )
    if network in ("vit", "registers", "resnet"):
        assert_same(load_backbone(str(path)).state_dict(), dino.teacher.backbone.state_dict())


def test_timm_takes_a_swiglu_and_odd_sizes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    vit = VisionTransformer(
        42, 7, in_chans=2, embed_dim=64, depth=3, num_heads=1, mlp_ratio=3, qkv_bias=False, ffn_layer="swiglu"
    )
    source = tmp_path / "vit.pth"
    torch.save(vit.state_dict(), source)
    path = export.export(Export(weights=str(source), to="timm"))
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("use it: ")]
    theirs = eval(line.removeprefix("use it: "), {"timm": timm})
    images = torch.randn(2, 2, 42, 42)
    assert_close(features(theirs, images), features(vit, images))
    assert_same(load_backbone(str(path)).state_dict(), vit.state_dict())


@pytest.mark.parametrize("network", NETWORKS)
def test_onnx_gives_the_same_features_at_any_batch(tmp_path: Path, network: str) -> None:
    out, dino, config = make_run(tmp_path, **NETWORKS[network])
    path = export.export(Export(weights=str(out), to="onnx"))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["images"]
    assert [o.name for o in session.get_outputs()] == ["features"]
    for batch in (1, 2, 7):
        images = images_of(config, batch)
        (found,) = session.run(None, {"images": images.numpy()})
        expected = features(dino.teacher.backbone, images)
        assert_close(torch.from_numpy(found), expected)


def test_onnx_of_another_size(tmp_path: Path) -> None:
    out, dino, _ = make_run(tmp_path)
    path = export.export(Export(weights=str(out), to="onnx", size=20))
    images = torch.randn(2, 3, 20, 20)
    (found,) = onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})
    expected = features(dino.teacher.backbone, images)
    assert_close(torch.from_numpy(found), expected)


def test_what_does_not_load_is_not_left_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _, _ = make_run(tmp_path)
    before = sorted(out.iterdir())

    def spoilt(state: dict[str, Tensor], path: Path) -> None:
        name, tensor = next(iter(state.items()))  # not + 1, which the norms take away again
        save({**state, name: torch.randn_like(tensor)}, path)

    save = export.save_file
    monkeypatch.setattr(export, "save_file", spoilt)
    for to in ("safetensors", "timm"):
        with pytest.raises(RuntimeError, match=f"{to} does not load what was written"):
            export.export(Export(weights=str(out), to=to))
    assert sorted(out.iterdir()) == before


def test_what_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _, _ = make_run(tmp_path, **NETWORKS["registers"])

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            export.export(Export(**({"weights": str(out), "to": "torch"} | options)))

    refused("official DINO has no registers", to="official")
    refused("a file for onnx ends in .onnx", to="onnx", out="x.pth")
    refused("there is no folder", out=str(tmp_path / "nowhere" / "x.pth"))
    export.export(Export(weights=str(out), to="torch"))
    refused("exists: remove it")
    for module, to in (("timm", "timm"), ("onnxruntime", "onnx")):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, module, None)
            m.setattr(export, "find_spec", lambda name: None)
            refused(rf"needs .*{module}.*pip install 'fastdino\[{to}\]'", to=to)
    monkeypatch.setattr(export, "MAX_PARAMETERS", 1000)
    refused("an ONNX file holds 2 GB", to="onnx")
    with pytest.raises(FileNotFoundError):
        export.export(Export(weights=str(tmp_path / "none.pth"), to="torch"))


def test_the_command_writes_and_says_errors_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out, _, _ = make_run(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fastdino-export", str(out), "--to", "torch"])
    export.main()
    assert (out / "backbone.pth").exists()
    assert "M numbers, checked by loading" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"fastdino-export: .*exists: remove it"):
        export.main()
