"""DINO: which crops go where, where the teacher's weights come from, what is loaded from files of others."""

import argparse
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import make_config
from torch import Tensor, nn
from torchvision import models

from fastdino import checkpoint, vit
from fastdino.config import ModelConfig
from fastdino.dino import DINO, MultiCrop, build_backbone, fit, flags_of, load_backbone, network_of
from fastdino.vit import VisionTransformer

NOWHERE = Path("unused")


def make_dino(**flags: object) -> DINO:
    torch.manual_seed(0)
    return DINO(make_config(NOWHERE, NOWHERE, **flags))


def make_crops(b: int = 3, local: int = 3) -> list[Tensor]:
    return [torch.randn(b, 3, 16, 16) for _ in range(2)] + [torch.randn(b, 3, 8, 8) for _ in range(local)]


def perturb(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))


@pytest.mark.parametrize("arch", ["vit_nano", "resnet18"])
def test_teacher_starts_equal_and_shares_no_tensor(arch: str) -> None:
    dino = make_dino(arch=arch, use_bn_in_head=True)
    student, teacher = dino.student.state_dict(), dino.teacher.state_dict()
    assert student.keys() == teacher.keys()
    assert all(torch.equal(student[k], teacher[k]) for k in student)
    held = {t.untyped_storage().data_ptr() for t in student.values()}
    assert held.isdisjoint(t.untyped_storage().data_ptr() for t in teacher.values())
    assert not any(p.requires_grad for p in dino.teacher.parameters())


def test_drop_path_is_the_students_alone() -> None:
    dino = make_dino(drop_path_rate=0.5).train()
    crops = make_crops()
    assert not torch.equal(dino.student(crops), dino.student(crops))
    assert torch.equal(dino.teacher(crops[:2]), dino.teacher(crops[:2]))


SHAPES: dict[str, dict[str, list]] = {
    "vit_nano": {  # one pass over a list, as the crops come
        "student": [[(3, 3, 16, 16)] * 2 + [(3, 3, 8, 8)] * 3],
        "teacher": [[(3, 3, 16, 16)] * 2],
    },
    "resnet18": {"student": [(6, 3, 16, 16), (9, 3, 8, 8)], "teacher": [(6, 3, 16, 16)]},
}


@pytest.mark.parametrize("arch", SHAPES)
def test_student_sees_all_crops_and_teacher_the_global_ones(arch: str) -> None:
    dino = make_dino(drop_path_rate=0.0, arch=arch)
    seen: dict[str, list] = {"student": [], "teacher": []}
    for name, shapes in seen.items():
        getattr(dino, name).backbone.register_forward_pre_hook(
            lambda _, x, shapes=shapes: shapes.append(
                tuple(x[0].shape) if isinstance(x[0], Tensor) else [tuple(crop.shape) for crop in x[0]]
            )
        )
    dino(make_crops(), 0)
    assert seen == SHAPES[arch]


@pytest.mark.parametrize("arch", ["vit_nano", "resnet18"])
def test_multi_crop_equals_a_pass_per_crop_in_the_crops_order(arch: str) -> None:
    network = make_dino(drop_path_rate=0.0, arch=arch).student.double().eval()
    # Sizes that come again later must not be reordered.
    crops = [torch.randn(2, 3, s, s, dtype=torch.float64) for s in (16, 8, 8, 16, 12)]
    each = torch.cat([network.head(network.backbone(crop)) for crop in crops])
    torch.testing.assert_close(MultiCrop.forward(network, crops), each, rtol=1e-12, atol=1e-12)


def test_teacher_mean_is_over_images_and_global_crops() -> None:
    dino = make_dino(drop_path_rate=0.0)
    crops = make_crops()
    _, mean = dino(crops, 0)
    rows = [dino.teacher([crop]) for crop in crops[:2]]
    torch.testing.assert_close(mean, torch.cat(rows).mean(0))
    assert torch.equal(dino.loss.center, torch.zeros(1, 96))  # left to the caller


def test_backward_takes_the_memory_of_the_students_logits() -> None:
    dino, crops, kept = make_dino(drop_path_rate=0.0), make_crops(), []
    dino.student.head.register_forward_hook(lambda *args: kept.append(args[-1]))
    loss, _ = dino(crops, 0)
    (logits,) = kept
    logits.register_hook(lambda grad: kept.append(grad))
    loss.backward()
    assert kept[1].data_ptr() == logits.data_ptr()
    twin = make_dino(drop_path_rate=0.0)
    expected = twin.loss.cross_entropy(
        twin.student(crops), twin.teacher(crops[:2]), twin.loss.teacher_temp(0)
    )[0]
    expected.backward()
    for p, q in zip(dino.student.parameters(), twin.student.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)


def test_gradient_reaches_every_student_parameter_that_trains() -> None:
    dino = make_dino(drop_path_rate=0.0, norm_last_layer=False)
    perturb(dino.teacher)  # from equal networks on equal crops some gradients vanish
    dino(make_crops(), 0)[0].backward()
    without = [n for n, p in dino.student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("arch", ["vit_nano", "resnet18"])
def test_a_frozen_backbone_gets_no_gradient_and_the_head_all_of_its_own(arch: str) -> None:
    crops, gradients = make_crops(), []
    for freeze in (False, True):
        dino = make_dino(drop_path_rate=0.0, norm_last_layer=False, arch=arch)
        perturb(dino.teacher)
        torch.manual_seed(1)
        loss, _ = dino(crops, 0, freeze_backbone=freeze)
        loss.backward()
        assert all((p.grad is None) == freeze for p in dino.student.backbone.parameters())
        assert all(p.requires_grad for p in dino.student.backbone.parameters())  # it learns again later
        gradients.append([loss.detach(), *(p.grad for p in dino.student.head.parameters())])
    assert all(grad is not None and grad.abs().sum() > 0 for grad in gradients[0])
    # the ViT may compute its last block otherwise where no gradient is kept
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


def step_teacher(
    kind: str, student_before: list[Tensor], teacher: list[Tensor], after: list[Tensor]
) -> list[Tensor]:
    """What a teacher of each kind is after one update of the student, in the middle of an epoch."""
    return {
        "momentum": [0.9 * t + 0.1 * s for t, s in zip(teacher, after, strict=True)],
        "student_copy": after,
        "previous_iteration": student_before,
        "previous_epoch": teacher,
    }[kind]


@pytest.mark.parametrize("kind", ["momentum", "student_copy", "previous_iteration", "previous_epoch"])
def test_teacher_update(kind: str) -> None:
    dino = make_dino(teacher_update=kind, arch="resnet18")
    perturb(dino.teacher)
    before = [p.detach().clone() for p in dino.student.parameters()]
    teacher = [p.detach().clone() for p in dino.teacher.parameters()]
    statistics = [b.clone() for b in dino.teacher.buffers()]
    if kind == "previous_iteration":
        dino.update_teacher(0.9)
    perturb(dino.student)
    after = [p.detach().clone() for p in dino.student.parameters()]
    if kind != "previous_iteration":
        dino.update_teacher(0.9)
    for got, expected in zip(
        dino.teacher.parameters(), step_teacher(kind, before, teacher, after), strict=True
    ):
        torch.testing.assert_close(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(statistics, dino.teacher.buffers(), strict=True))
    if kind == "previous_epoch":
        dino.update_teacher(0.9, new_epoch=True)
        assert all(torch.equal(t, s) for t, s in zip(dino.teacher.parameters(), after, strict=True))


@pytest.mark.parametrize(("warmup", "epochs", "expected"), [(3, 5, 3), (5, 5, 5), (30, 10, 3), (30, 1, 0)])
def test_temperature_warmup_fits_the_run(warmup: int, epochs: int, expected: int) -> None:
    dino = make_dino(
        warmup_teacher_temp_epochs=warmup, epochs=epochs, warmup_teacher_temp=0.01, teacher_temp=0.04
    )
    table = dino.loss.teacher_temp_schedule
    assert len(table) == epochs
    assert (table < 0.04).sum() == max(0, expected - 1)  # the last epoch of warm-up is at its end


def test_unknown_arch_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"--arch vit_smal is unknown.*vit_small.*resnet50"):
        build_backbone(ModelConfig(arch="vit_smal"))


# Weights


def small_vit(img_size: int = 32, **changed: Any) -> VisionTransformer:
    """A ViT that no name is known of, with other values than the initial ones."""
    shape = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1} | changed
    network = VisionTransformer(img_size=img_size, **shape).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names and bits."""
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


def load_quietly(path: Path | str, arch: str = "") -> nn.Module:
    """Nothing is left out and nothing changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_backbone(str(path), arch=arch)


def load_noting(path: Path, arch: str = "") -> tuple[nn.Module, str]:
    """The network, and the one warning."""
    with pytest.warns(UserWarning, match=re.escape(f"{path}: ")) as said:
        network = load_backbone(str(path), arch=arch)
    (warning,) = said
    assert warning.filename == __file__  # it points at the caller
    return network, str(warning.message)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"num_register_tokens": 4, "layer_scale": 0.1},
        {"arch": "resnet18"},
        {"arch": "torchvision:mobilenet_v3_small", "global_crops_size": 32, "local_crops_size": 32},
        # the only network whose state dict has a version
        {"arch": "torchvision:mnasnet0_5", "global_crops_size": 32, "local_crops_size": 32},
        {"arch": "timm:convnext_atto", "global_crops_size": 32, "local_crops_size": 32},
    ],
    ids=lambda flags: flags.get("arch", "registers" if flags else "vit"),
)
def test_load_backbone_returns_the_teachers_network(tmp_path: Path, flags: dict[str, Any]) -> None:
    if flags.get("arch", "").startswith("timm"):
        pytest.importorskip("timm")
    dino = make_dino(**flags)
    perturb(dino.teacher)
    path = tmp_path / "teacher.safetensors"
    checkpoint.write_teacher(path, dino.teacher, make_config(NOWHERE, NOWHERE, **flags), 0)
    size = flags.get("global_crops_size", 16)
    images = torch.randn(2, 3, size, size)
    for given in (path, tmp_path):
        backbone = load_quietly(given)
        assert not backbone.training
        assert not any(p.requires_grad for p in backbone.parameters())
        assert_same(backbone.state_dict(), dino.teacher.backbone.state_dict())
        # random statistics of batch norm can make a deep network's features NaN
        expected = dino.teacher.backbone.eval()(images)
        torch.testing.assert_close(backbone(images), expected, rtol=0, atol=0, equal_nan=True)


def as_official(dino: DINO) -> dict[str, object]:
    """What official DINO's checkpoint.pth holds of these networks."""
    return {
        "student": {f"module.{k}": v for k, v in dino.student.state_dict().items()},
        "teacher": dino.teacher.state_dict(),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", lr=0.0005, local_crops_scale=(0.05, 0.4)),
        "dino_loss": {"center": torch.randn(1, dino.loss.center.shape[1])},
        "fp16_scaler": {"scale": 65536.0, "growth_tracker": 7},
    }


def write(path: Path, found: Any) -> Path:
    """Torch-saved, or safetensors by the path's suffix."""
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in found.items()}, path)
    else:
        torch.save(found, path)
    return path


@pytest.mark.parametrize("arch", ["vit_tiny", "resnet18"])
@pytest.mark.parametrize("kind", ["full", "student only", "backbone", "safetensors", "state_dict", "model"])
def test_load_backbone_reads_official_files(tmp_path: Path, arch: str, kind: str) -> None:
    dino = make_dino(arch=arch)
    perturb(dino.teacher)
    perturb(dino.student)  # of a full checkpoint the teacher is taken
    source = (dino.student if kind == "student only" else dino.teacher).backbone.eval()
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    state = source.state_dict()
    if kind == "full":
        write(path, as_official(dino))
    elif kind == "student only":
        write(path, {"student": as_official(dino)["student"]})
    elif kind in ("backbone", "safetensors"):
        write(path, state)
    else:
        write(path, {kind: {f"module.{k}": v for k, v in state.items()}, "epoch": 3})
    images = torch.randn(2, 3, 16, 16)
    read = load_quietly(path)
    assert not read.training
    assert not any(p.requires_grad for p in read.parameters())
    assert_same(read.state_dict(), state)
    assert torch.equal(read(images), source(images))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("inside", ["", "backbone."])
def test_prefixes_of_parallel_and_compiled_networks_go(tmp_path: Path, prefix: str, inside: str) -> None:
    source = small_vit()
    path = write(
        tmp_path / "weights.pth", {f"{prefix}{inside}{k}": v for k, v in source.state_dict().items()}
    )
    assert_same(load_quietly(path).state_dict(), source.state_dict())


@pytest.mark.parametrize("arch", ["vit_nano", "vit_tiny", "vit_huge", "vit_giant"])
def test_every_vit_is_known_by_its_tensors(arch: str) -> None:
    # No tensor tells the number of heads: vit_nano's and vit_huge's are not 64 channels wide.
    with torch.device("meta"):
        source = getattr(vit, arch)(14, num_register_tokens=4, init_values=0.1, img_size=70)
        plain = getattr(vit, arch)(16)
        read = network_of(source.state_dict())
    shapes = {name: value.shape for name, value in source.state_dict().items()}
    assert {name: value.shape for name, value in read.state_dict().items()} == shapes
    assert (read.num_heads, read.patch_size, read.grid) == (source.num_heads, 14, (5, 5))
    assert (
        flags_of(source.state_dict())
        == f"--arch {arch} --patch-size 14 --num-register-tokens 4 --layer-scale 1e-05"
    )
    assert flags_of(plain.state_dict()) == f"--arch {arch} --patch-size 16"


def test_networks_without_a_name_have_no_flags() -> None:
    assert flags_of(small_vit().state_dict()) == ""
    assert flags_of(models.resnet18().state_dict()) == ""
    assert flags_of({"weight": torch.zeros(1)}) == ""


# Weights of timm and DINOv2


def timm_vit(**changed: Any) -> nn.Module:
    timm = pytest.importorskip("timm.models.vision_transformer")
    shape = {"img_size": 42, "patch_size": 14, "embed_dim": 64, "depth": 2, "num_heads": 1}
    network = timm.VisionTransformer(**shape | {"num_classes": 0} | changed).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_timms_classifier_is_left_out_and_named(tmp_path: Path, suffix: str) -> None:
    theirs = timm_vit(num_classes=10)
    state = theirs.state_dict()
    ours, said = load_noting(write(tmp_path / f"weights.{suffix}", state))
    assert set(said.rpartition(": ")[2].split(", ")) == {"head.weight", "head.bias"}
    assert_same(
        ours.state_dict(), {name: value for name, value in state.items() if not name.startswith("head.")}
    )
    images = torch.randn(2, 3, 42, 42)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.forward_features(images)[:, 0], rtol=1e-4, atol=1e-5)


REGISTERS = {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5, "dynamic_img_size": True}


@pytest.mark.parametrize(
    "changed",
    [
        REGISTERS,
        REGISTERS | {"no_embed_class": False},  # positions for class token and registers too
        REGISTERS | {"img_size": 28, "reg_tokens": 1},
    ],
    ids=["dinov2", "positions of all", "one register"],
)
@pytest.mark.parametrize("size", [28, 42, 70])
def test_timms_registers_give_timms_features(tmp_path: Path, changed: dict[str, Any], size: int) -> None:
    # timm resizes position embeddings with antialiasing and to a size, as DINOv2 does with registers
    theirs = timm_vit(**changed).double()
    ours = load_quietly(write(tmp_path / "weights.safetensors", theirs.state_dict())).double()
    fit(ours, theirs.state_dict(), "here")  # in full precision
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        # timm resizes in float32 whatever the type
        exact = size == changed.get("img_size", 42)
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-12 if exact else 1e-6)


def as_dinov2(source: VisionTransformer) -> dict[str, Tensor]:
    """The backbone as DINOv2 saves it, with its blocks in two chunks and the token that masks patches."""
    half = len(source.blocks) // 2
    state = {
        re.sub(r"^blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // half}.{m[1]}.", name): value
        for name, value in source.state_dict().items()
    }
    return state | {"mask_token": torch.zeros(1, 64)}


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglu"])
@pytest.mark.parametrize("kind", ["teacher", "backbone"])
def test_load_backbone_reads_dinov2(tmp_path: Path, ffn_layer: str, kind: str) -> None:
    resizing = {"interpolate_antialias": True, "interpolate_offset": 0.0}
    source = small_vit(depth=4, ffn_layer=ffn_layer, init_values=0.1, num_register_tokens=4, **resizing)
    state: dict[str, Any] = as_dinov2(source)
    assert {"blocks.0.1.ls1.gamma", "blocks.1.3.ls2.gamma", "register_tokens"} < state.keys()
    assert ("blocks.1.2.mlp.w12.weight" in state) == (ffn_layer == "swiglu")
    if kind == "teacher":
        state = {f"backbone.{name}": value for name, value in state.items()}
        heads = {f"{part}_head.mlp.0.weight": torch.zeros(5, 64) for part in ("dino", "ibot")}
        state = {"teacher": state | heads}
    ours, said = load_noting(write(tmp_path / "weights.pth", state))
    assert said.endswith("left out, no part of a backbone: mask_token")
    assert_same(ours.state_dict(), source.state_dict())
    for size in (24, 32, 56):
        images = torch.randn(2, 3, size, size)
        assert torch.equal(ours(images), source(images))


def test_load_backbone_takes_a_network_of_others_by_its_name(tmp_path: Path) -> None:
    theirs = models.get_model("mobilenet_v3_small").eval()
    path = write(tmp_path / "weights.pth", theirs.state_dict())
    ours, said = load_noting(path, "torchvision:mobilenet_v3_small")
    assert said.endswith("left out, no part of a backbone: classifier.3.weight, classifier.3.bias")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(theirs.classifier[3](ours(x)), theirs(x))
    with pytest.raises(ValueError, match=r"not the tensors of a ViT \(no cls_token.*or a ResNet"):
        load_backbone(str(path))
    with pytest.raises(ValueError, match=r"(?s)does not fit:.*missing: conv1\.weight.*unexpected: features"):
        load_backbone(str(path), arch="resnet18")


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("resnet18", "fc"),
        ("densenet121", "classifier"),
        ("vgg11", "classifier.6"),
        ("swin_t", "head"),
        ("vit_b_16", "heads.head"),
    ],
)
def test_torchvisions_classifiers_are_left_out_whatever_they_are_called(name: str, last: str) -> None:
    with torch.device("meta"):
        ours = build_backbone(ModelConfig(arch=f"torchvision:{name}"))
        theirs = models.get_model(name, weights=None)
    assert fit(ours, theirs.state_dict(), "here") == [
        f"left out, no part of a backbone: {last}.weight, {last}.bias"
    ]


def test_load_backbone_takes_a_network_of_timm_by_its_name(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("convnext_atto", num_classes=10).eval()
    path = write(tmp_path / "weights.safetensors", theirs.state_dict())
    ours, said = load_noting(path, "timm:convnext_atto")
    # its head has a norm too, which the features pass through
    assert set(said.rpartition(": ")[2].split(", ")) == {"head.fc.bias", "head.fc.weight"}
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(theirs.head.fc(ours(x)), theirs(x))


def test_load_backbone_refuses_what_it_cannot_load_whole(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    state = make_dino(arch="vit_tiny").teacher.backbone.state_dict()
    torch.save(
        {k: v for k, v in state.items() if k != "blocks.3.norm1.bias"} | {"extra": torch.zeros(1)}, path
    )
    with pytest.raises(ValueError, match=r"(?s)missing: blocks\.3\.norm1\.bias\n  unexpected: extra"):
        load_backbone(str(path))
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"not the tensors of a ViT \(no cls_token.*there are weights"):
        load_backbone(str(path))
    torch.save({"teacher": 3}, path)
    with pytest.raises(
        ValueError, match=r"holds no tensors by name, nor under teacher.*: it has keys teacher"
    ):
        load_backbone(str(path))
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_backbone(str(path))
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth does not exist"):
        load_backbone(str(tmp_path / "nothing.pth"))


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("executed"),)


def test_load_backbone_and_load_weights_execute_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dino = make_dino()
    torch.save({"teacher": dino.teacher.state_dict() | {"backbone.norm.weight": Hostile()}}, "weights.pth")
    before = snapshot(dino)
    for load in (load_backbone, dino.load_weights):
        with pytest.raises(ValueError, match="cannot be read as weights"):
            load("weights.pth")
    assert not Path("executed").exists()
    assert_same(dino.state_dict(), before)
    torch.load("weights.pth", weights_only=False)  # the file does what it is said to
    assert Path("executed").exists()


# fit


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize(("old", "new"), [(224, 96), (96, 224), (224, 256), (224, 208)])
def test_a_position_embedding_of_another_grid_is_resized(registers: int, old: int, new: int) -> None:
    options: dict[str, Any] = {"patch_size": 16, "depth": 1, "num_register_tokens": registers}
    if registers:  # as build_backbone makes them
        options |= {"interpolate_antialias": True, "interpolate_offset": 0.0}
    source, network = small_vit(old, **options), small_vit(new, **options)
    state = snapshot(source)
    given = dict(state)
    side, into = old // 16, new // 16
    notes = fit(network, given, "here")
    assert notes == [f"position embedding resized from {side} x {side} to {into} x {into} patches"]
    assert_same(given, state)  # the caller's stays his
    # official DINO: by a factor of the new side and 0.1; DINOv2 with registers: to the size, smoothed
    patches = state["pos_embed"][:, 1:].reshape(1, side, side, 64).permute(0, 3, 1, 2)
    if registers:
        patches = F.interpolate(patches, size=(into, into), mode="bicubic", antialias=True)
    else:
        patches = F.interpolate(patches, scale_factor=((into + 0.1) / side,) * 2, mode="bicubic")
    resized = torch.cat((state["pos_embed"][:, :1], patches.permute(0, 2, 3, 1).reshape(1, -1, 64)), dim=1)
    torch.testing.assert_close(network.pos_embed.data, resized)
    assert_same(
        {k: v for k, v in network.state_dict().items() if k != "pos_embed"},
        {k: v for k, v in state.items() if k != "pos_embed"},
    )
    images = torch.randn(2, 3, new, new)
    with torch.no_grad():
        assert torch.equal(network(images), source(images))


def test_a_position_embedding_is_resized_to_a_network_that_is_not_square() -> None:
    source, network = small_vit(32), small_vit((24, 40))
    (note,) = fit(network, source.state_dict(), "here")
    assert note.endswith("from 4 x 4 to 3 x 5 patches")
    images = torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        assert torch.equal(network(images), source(images))


def test_halves_and_doubles_become_the_networks_type() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        for size in (32, 24):  # the same grid, and another
            source, network = small_vit().to(dtype), small_vit(size)
            fit(network, source.state_dict(), "here")
            assert {value.dtype for value in network.state_dict().values()} == {torch.float32}
            assert torch.equal(network.norm.weight, source.norm.weight.float())
            if size == 32:
                assert torch.equal(network.pos_embed, source.pos_embed.float())


def test_all_that_does_not_fit_is_listed_at_once_and_nothing_is_loaded() -> None:
    source, network = vit.vit_tiny(16), vit.vit_tiny(16)
    before = snapshot(network)
    state = snapshot(source)
    bias, gamma = state.pop("blocks.3.norm1.bias"), state.pop("norm.weight")
    state |= {"blocks.3.norm1.beta": bias, "gamma": gamma, "blocks.0.mlp.fc1.bias": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"^the backbone of a\.pth does not fit:\n") as error:
        fit(network, state, "a.pth")
    _, *problems, flags = str(error.value).split("\n")
    assert sorted(problems) == [
        "  missing: blocks.3.norm1.bias",
        "  missing: norm.weight",
        "  of another shape: blocks.0.mlp.fc1.bias is (7,), not (768,)",
        "  unexpected: blocks.3.norm1.beta",
        "  unexpected: gamma",
    ]
    assert flags == "The file is --arch vit_tiny --patch-size 16."
    assert_same(network.state_dict(), before)


def test_what_is_missing_is_listed_for_a_file_of_another_grid_too() -> None:
    source, network = vit.vit_tiny(16, img_size=64), vit.vit_tiny(16, img_size=96)
    before, state = snapshot(network), snapshot(source)
    del state["blocks.0.mlp.fc2.weight"], state["norm.bias"]
    with pytest.raises(ValueError, match=r"^the backbone of a\.pth does not fit:\n") as error:
        fit(network, state, "a.pth")
    assert str(error.value).split("\n")[1:] == ["  missing: blocks.0.mlp.fc2.weight", "  missing: norm.bias"]
    assert_same(network.state_dict(), before)


@pytest.mark.parametrize(
    ("made", "flags"),
    [
        ({}, "--arch vit_tiny --patch-size 16"),
        ({"num_register_tokens": 4}, "--arch vit_tiny --patch-size 16 --num-register-tokens 4"),
        ({"init_values": 1e-5}, "--arch vit_tiny --patch-size 16 --layer-scale 1e-05"),
        ({"patch_size": 8, "img_size": 96}, "--arch vit_tiny --patch-size 8"),
    ],
    ids=str,
)
def test_the_flags_that_fit_the_file_make_it_fit(made: dict[str, Any], flags: str, tmp_path: Path) -> None:
    source = vit.vit_tiny(**made)
    path = write(tmp_path / "weights.pth", source.state_dict())
    other = make_dino(arch="vit_tiny", patch_size=4, num_register_tokens=2, layer_scale=0.1)
    before = snapshot(other)
    with pytest.raises(ValueError, match=rf"(?s)does not fit.*\nThe file is {flags}\.$"):
        other.load_weights(str(path))
    assert_same(other.state_dict(), before)
    words = flags.split()
    given = {
        name.removeprefix("--").replace("-", "_"): value
        for name, value in zip(words[::2], words[1::2], strict=True)
    }
    typed: dict[str, Any] = {
        name: value if name == "arch" else float(value) if name == "layer_scale" else int(value)
        for name, value in given.items()
    }
    size = made.get("img_size", 224)
    dino = make_dino(**typed, global_crops_size=size, local_crops_size=32)
    dino.load_weights(str(path))
    assert_same(dino.student.backbone.state_dict(), source.state_dict())
    assert_same(dino.teacher.backbone.state_dict(), source.state_dict())


def test_other_weights_than_a_resnets_are_listed_without_flags() -> None:
    network = models.resnet18()
    network.fc = nn.Identity()
    before = snapshot(network)
    state = snapshot(network)
    state["layer1.0.bn1.scale"] = state.pop("layer1.0.bn1.weight")
    with pytest.raises(ValueError, match=r"missing: layer1\.0\.bn1\.weight\n  unexpected: .*bn1\.scale$"):
        fit(network, state, "a.pth")
    assert_same(network.state_dict(), before)


# DINO.load_weights


def file_of(path: Path, **flags: Any) -> DINO:
    """A DINO with other values than any other, saved to `path` as an official full checkpoint."""
    dino = make_dino(**flags)
    torch.manual_seed(3)
    perturb(dino)
    found = as_official(dino)
    dino.loss.center.copy_(found["dino_loss"]["center"])  # type: ignore[index]
    torch.save(found, path)
    return dino


@pytest.mark.parametrize("flags", [{}, {"arch": "resnet18"}, {"use_bn_in_head": True}], ids=str)
def test_load_weights_takes_student_teacher_head_and_centre(tmp_path: Path, flags: dict[str, Any]) -> None:
    path = tmp_path / "weights.pth"
    source, dino = file_of(path, **flags), make_dino(**flags)
    notes = dino.load_weights(str(path))
    assert notes == [f"{path}: full checkpoint, teacher and student", "with its head", "with its centre"]
    assert_same(dino.state_dict(), source.state_dict())
    student, teacher = dino.student.state_dict(), dino.teacher.state_dict()
    weights = [name for name, _ in dino.student.named_parameters()]
    assert not any(torch.equal(student[name], teacher[name]) for name in weights)
    held = {p.data_ptr() for p in dino.student.parameters()}
    assert held.isdisjoint(p.data_ptr() for p in dino.teacher.parameters())
    assert not any(p.requires_grad for p in dino.teacher.parameters())


@pytest.mark.parametrize("part", ["student", "teacher"])
def test_one_network_of_a_file_becomes_both(tmp_path: Path, part: str) -> None:
    path = tmp_path / "weights.pth"
    source, dino = file_of(path), make_dino()
    found = torch.load(path, weights_only=False)
    torch.save({part: found[part]}, path)
    center = dino.loss.center.clone()
    assert dino.load_weights(str(path)) == [f"{path}: full checkpoint, {part}", "with its head"]
    for network in (dino.student, dino.teacher):
        assert_same(network.state_dict(), getattr(source, part).state_dict())
    assert torch.equal(dino.loss.center, center)


@pytest.mark.parametrize(
    ("flags", "unfit"),
    [
        (
            {"out_dim": 64},
            ["last_layer.weight_g (64, 1), here (96, 1)", "last_layer.weight_v (64, 16), here (96, 16)"],
        ),
        (
            {"head_layers": 2},
            [
                "mlp.2.weight (16, 32), here (32, 32)",
                "mlp.2.bias (16,), here (32,)",
                "mlp.4.weight missing, here (16, 32)",
                "mlp.4.bias missing, here (16,)",
            ],
        ),
        (
            {"head_layers": 4},
            [
                "mlp.4.weight (32, 32), here (16, 32)",
                "mlp.4.bias (32,), here (16,)",
                "mlp.6.weight (16, 32), here none",
                "mlp.6.bias (16,), here none",
            ],
        ),
    ],
    ids=str,
)
def test_a_head_that_does_not_fit_is_new_in_both_networks(
    tmp_path: Path, flags: dict[str, Any], unfit: list[str]
) -> None:
    path = tmp_path / "weights.pth"
    source, dino = file_of(path, **flags), make_dino()
    head = snapshot(dino.student.head)
    _, said = dino.load_weights(str(path))
    assert said.startswith("a new head, for the file's does not fit: ")
    assert sorted(said.partition(": ")[2].split("; ")) == sorted(unfit)
    for name in ("student", "teacher"):
        network = getattr(dino, name)
        assert_same(network.backbone.state_dict(), getattr(source, name).backbone.state_dict())
        assert_same(network.head.state_dict(), head)
    assert torch.equal(dino.loss.center, torch.zeros(1, 96))


def test_a_backbone_alone_begins_with_a_new_head(tmp_path: Path) -> None:
    source = make_dino(global_crops_size=32).student.backbone
    perturb(source)
    path = write(tmp_path / "weights.safetensors", source.state_dict())
    dino = make_dino()
    head = snapshot(dino.student.head)
    assert dino.load_weights(str(path)) == [
        f"{path}: backbone",
        "position embedding resized from 8 x 8 to 4 x 4 patches",
        "a new head",
    ]
    images = torch.randn(2, 3, 16, 16)
    for network in (dino.student.eval(), dino.teacher.eval()):
        assert_same(network.head.state_dict(), head)
        assert torch.equal(network.backbone(images), source.eval()(images))


def test_load_weights_takes_a_runs_teacher(tmp_path: Path) -> None:
    source = make_dino()
    perturb(source.teacher)
    checkpoint.write_teacher(
        tmp_path / "teacher.safetensors", source.teacher, make_config(NOWHERE, NOWHERE), 0
    )
    for path in (tmp_path, tmp_path / "teacher.safetensors"):
        dino = make_dino()
        notes = dino.load_weights(str(path))
        assert notes == [f"{path}: teacher of a run of fastdino", "with its head"]
        assert_same(dino.student.state_dict(), source.teacher.state_dict())
        assert_same(dino.teacher.state_dict(), source.teacher.state_dict())


def test_load_weights_takes_dinov2s_head_and_names_what_it_leaves(tmp_path: Path) -> None:
    flags = {"num_register_tokens": 2, "layer_scale": 0.1}
    source = make_dino(**flags)
    perturb(source.teacher)
    state = {
        re.sub(r"^head\.", "dino_head.", re.sub(r"\bblocks\.", "blocks.0.", name)): value
        for name, value in source.teacher.state_dict().items()
    }
    state |= {"backbone.mask_token": torch.zeros(1, 128), "ibot_head.mlp.0.weight": torch.zeros(3, 128)}
    path = write(tmp_path / "weights.pth", {"teacher": state, "iteration": 5})
    dino = make_dino(**flags)
    assert dino.load_weights(str(path)) == [
        f"{path}: full checkpoint, teacher",
        "left out, no part of a backbone: mask_token",
        "left out: ibot_head.mlp.0.weight",
        "with its head",
    ]
    assert_same(dino.teacher.state_dict(), source.teacher.state_dict())
    assert_same(dino.student.state_dict(), source.teacher.state_dict())


@pytest.mark.parametrize("bare", ["student", "teacher"])
def test_a_head_of_one_network_alone_is_taken_by_neither(tmp_path: Path, bare: str) -> None:
    path = tmp_path / "weights.pth"
    file_of(path)
    dino, found = make_dino(), torch.load(path, weights_only=False)
    head = snapshot(dino.student.head)
    found[bare] = {name: value for name, value in found[bare].items() if "backbone." in name}
    torch.save(found, path)
    notes = dino.load_weights(str(path))
    assert notes[-1].startswith("a new head, for the file's does not fit: ")
    assert "mlp.0.weight missing" in notes[-1]
    assert_same(dino.student.head.state_dict(), head)
    assert_same(dino.teacher.head.state_dict(), head)


@pytest.mark.parametrize(
    "name", ["pos_embed", "cls_token", "patch_embed.proj.weight", "blocks.0.mlp.fc2.weight"]
)
def test_a_tensor_of_too_few_dimensions_is_named(tmp_path: Path, name: str) -> None:
    state = make_dino(arch="vit_tiny").teacher.backbone.state_dict()
    path = write(tmp_path / "weights.pth", {**state, name: torch.zeros(3)})
    with pytest.raises(ValueError, match=f"not the tensors of a ViT .*{re.escape(name)}"):
        load_backbone(str(path))
    with pytest.raises(ValueError, match=rf"of another shape: {re.escape(name)} is \(3,\)"):
        make_dino(arch="vit_tiny").load_weights(str(path))


def test_a_centre_of_another_width_stays_out(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    source, dino = file_of(path), make_dino()
    found = torch.load(path, weights_only=False)
    torch.save(found | {"dino_loss": {"center": torch.ones(1, 64)}}, path)
    assert dino.load_weights(str(path))[-1] == "with its head"
    assert_same(dino.student.state_dict(), source.student.state_dict())
    assert torch.equal(dino.loss.center, torch.zeros(1, 96))


def test_loaded_weights_train_on(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    file_of(path)
    dino, crops = make_dino(drop_path_rate=0.0), make_crops()
    dino.load_weights(str(path))
    loss, _ = dino(crops, 0)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in dino.student.parameters() if p.requires_grad)
