"""Files of others are read by our names, loaded to the same features, refused clearly, and never executed."""

import argparse
import json
import os
import pickle
import random
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_config, make_dino, perturb
from torch import Tensor, nn
from torchvision import models

from fastdino import checkpoint, vit
from fastdino.backbones import build_backbone
from fastdino.config import ModelConfig
from fastdino.dino import DINO
from fastdino.vit import VisionTransformer
from fastdino.weights import load_backbone, load_backbone_state, read_weights, vit_names

NOWHERE = Path("unused")


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, types and bits."""
    assert got.keys() == expected.keys()
    assert {name: x.dtype for name, x in got.items()} == {name: x.dtype for name, x in expected.items()}
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


# Reading

NAMES = ("backbone.norm.weight", "backbone.blocks.0.attn.qkv.weight", "head.mlp.0.bias")


def network(value: float, prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}{name}": torch.arange(6.0) + value + i for i, name in enumerate(NAMES)}


def official() -> dict[str, Any]:
    """What official DINO saves, with all that is not of the networks."""
    return {
        "student": network(1.0, "module."),
        "teacher": network(2.0),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(6), "step": 7}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", lr=0.0005, global_crops_scale=(0.4, 1.0), seed=None),
        "dino_loss": {"center": torch.full((1, 5), 0.5)},
        "fp16_scaler": {"scale": 65536.0, "_growth_tracker": 7},
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_an_official_checkpoint_is_read_whole(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(official(), path, _use_new_zipfile_serialization=zipped)  # torch before 1.6 did not zip
    weights = read_weights(path)
    assert weights.kind == "full checkpoint, teacher and student"
    assert_same(weights.student, network(1.0))
    assert_same(weights.teacher, network(2.0))
    assert weights.center is not None
    assert torch.equal(weights.center, torch.full((1, 5), 0.5))
    assert weights.config is None


@pytest.mark.parametrize("part", ["student", "teacher"])
def test_a_checkpoint_of_one_network_is_read_as_both(tmp_path: Path, part: str) -> None:
    torch.save({part: network(3.0, "module._orig_mod."), "epoch": 1}, tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth")
    assert weights.kind == f"full checkpoint, {part}"
    assert_same(weights.student, network(3.0))
    assert_same(weights.teacher, network(3.0))
    assert weights.center is None


ALONE = {
    "backbone": (
        {"norm.weight": 1, "head.weight": 2},
        {"backbone.norm.weight": 1, "backbone.head.weight": 2},
    ),
    "network": ({"backbone.norm.weight": 1, "head.w": 2}, {"backbone.norm.weight": 1, "head.w": 2}),
    "of DINOv2": (
        {"backbone.norm.weight": 1, "dino_head.w": 2, "ibot_head.w": 3},
        {"backbone.norm.weight": 1, "head.w": 2, "ibot_head.w": 3},
    ),
    "parallel": ({"module.norm.weight": 1}, {"backbone.norm.weight": 1}),
    "compiled": ({"_orig_mod.module.backbone.norm.weight": 1}, {"backbone.norm.weight": 1}),
    # only a prefix goes
    "inside": (
        {"module.a.module.b": 1, "stem.dino_head.c": 2},
        {"backbone.a.module.b": 1, "backbone.stem.dino_head.c": 2},
    ),
}


@pytest.mark.parametrize("kind", ALONE)
@pytest.mark.parametrize("around", ["", "state_dict", "model", "safetensors"])
def test_a_network_alone_is_read_by_our_names(tmp_path: Path, kind: str, around: str) -> None:
    theirs, ours = ({name: torch.tensor([i]) for name, i in names.items()} for names in ALONE[kind])
    path = tmp_path / "weights.pth"
    if around == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(theirs, path)
    else:
        torch.save({around: theirs, "epoch": 3} if around else theirs, path)
    weights = read_weights(path)
    assert weights.kind == ("network" if any(name.startswith("head.") for name in ours) else "backbone")
    assert_same(weights.teacher, ours)
    assert_same(weights.student, ours)


MOMENTUM = {
    # file's prefix of the moving average, of the trained one, and what they are called
    "solo-learn": ("momentum_backbone.", "backbone.", "momentum", "backbone"),
    "solo-learn before 1.0": ("momentum_encoder.", "encoder.", "momentum", "backbone"),
    "lightly's examples": ("teacher_backbone.", "student_backbone.", "teacher", "student"),
    "lightly's benchmarks": ("backbone.", "student_backbone.", "backbone", "student"),
    "lightly's BYOL": ("backbone_momentum.", "backbone.", "momentum", "backbone"),
    "MoCo": ("module.encoder_k.", "module.encoder_q.", "momentum", "base"),
    "MoCo v3": ("module.momentum_encoder.", "module.base_encoder.", "momentum", "base"),
    "BYOL": ("target_encoder.", "online_encoder.", "target", "online"),
    "DINOv2's FSDP": ("teacher.backbone.", "student.backbone.", "teacher", "student"),
    "compiled": ("_orig_mod.teacher.module.backbone.", "student.backbone._orig_mod.", "teacher", "student"),
    "parallel": ("teacher_backbone.module.", "module._orig_mod.student_backbone.", "teacher", "student"),
    "Lightning around DINO": ("model.teacher.backbone.", "model.student.backbone.", "teacher", "student"),
}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", MOMENTUM)
def test_of_a_state_dict_with_a_momentum_network_that_one_is_the_teacher(
    tmp_path: Path, kind: str, order: int
) -> None:
    momentum, trained, *names = MOMENTUM[kind]
    average, follower = small_vit(), small_vit()
    content = {f"{momentum}{k}": v for k, v in average.state_dict().items()}
    content |= {f"{trained}{k}": v for k, v in follower.state_dict().items()}
    content |= {"queue": torch.zeros(2, 3), "classifier.weight": torch.zeros(2, 64)}
    content = dict(list(content.items())[::order])
    path = write(tmp_path / "weights.ckpt", {"state_dict": content, "epoch": 3})
    weights = read_weights(path)
    assert weights.kind == f"full checkpoint, {names[0]} and {names[1]}"
    of_backbones = [
        {n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")}
        for state in (weights.teacher, weights.student)
    ]
    assert_same(of_backbones[0], average.state_dict())
    assert_same(of_backbones[1], follower.state_dict())
    if names[0] == "teacher":
        network = load_quietly(path)
    else:
        network, said = load_noting(path)
        assert said.endswith(f"{names[0]} is taken for the teacher, the moving average of {names[1]}")
    assert_same(network.state_dict(), average.state_dict())


@pytest.mark.parametrize(
    ("ema", "plain"),
    [("model_ema", "model"), ("state_dict_ema", "state_dict"), ("target_encoder", "encoder")],
)
def test_of_a_file_with_a_moving_average_that_one_is_the_teacher(
    tmp_path: Path, ema: str, plain: str
) -> None:
    average, follower = small_vit(), small_vit()
    content = {plain: follower.state_dict(), ema: average.state_dict(), "epoch": 3}
    path = write(tmp_path / "weights.pth", content)
    network, said = load_noting(path)
    assert said.endswith(f"{ema} is taken for the teacher, the moving average of {plain}")
    assert_same(network.state_dict(), average.state_dict())
    assert_same(read_weights(path).student, {f"backbone.{k}": v for k, v in follower.state_dict().items()})


def test_solo_learns_heads_are_taken_with_its_networks(tmp_path: Path) -> None:
    source, dino = make_dino(), make_dino()
    perturb(source)
    content = {f"momentum_{k}": v for k, v in source.teacher.state_dict().items()}
    content |= source.student.state_dict()
    path = write(tmp_path / "last.ckpt", {"state_dict": content})
    assert dino.load_weights(str(path)) == [
        f"{path}: full checkpoint, momentum and backbone",
        "momentum is taken for the teacher, the moving average of backbone",
        "with its head",
    ]
    assert_same(dino.teacher.state_dict(), source.teacher.state_dict())
    assert_same(dino.student.state_dict(), source.student.state_dict())


def test_lightlys_resnet_in_numbered_parts_is_read(tmp_path: Path) -> None:
    theirs = models.resnet18()
    parts = nn.Sequential(*list(theirs.children())[:-1])
    path = write(tmp_path / "a.ckpt", {f"teacher_backbone.{k}": v for k, v in parts.state_dict().items()})
    theirs.fc = nn.Identity()
    assert_same(load_quietly(path).state_dict(), theirs.state_dict())


def test_values_of_every_type_arrive_bit_for_bit(tmp_path: Path) -> None:
    bits = torch.randint(-(2**15), 2**15, (64,), dtype=torch.int16)
    state = {"backbone.half": bits.view(torch.float16), "backbone.brain": bits.flip(0).view(torch.bfloat16)}
    state |= {"backbone.count": torch.tensor(7), "backbone.double": torch.randn(3, dtype=torch.float64)}
    torch.save({"teacher": state}, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors")
    for path in (tmp_path / "a.pth", tmp_path / "a.safetensors"):
        read = read_weights(path).teacher
        assert read.keys() == state.keys()
        for name, value in state.items():
            assert read[name].dtype == value.dtype
            # as integers, for a NaN is not equal to itself
            assert torch.equal(read[name].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))


def test_our_own_files_are_read_with_their_configuration(tmp_path: Path) -> None:
    config, module = make_config(tmp_path, tmp_path), nn.Linear(3, 2)
    checkpoint.write_teacher(tmp_path / "teacher.safetensors", module, config, 5)
    for path in (tmp_path, tmp_path / "teacher.safetensors"):
        weights = read_weights(path)
        assert weights.config == config
        assert_same(weights.teacher, module.state_dict())
        assert_same(weights.student, module.state_dict())
        assert weights.center is None


@pytest.mark.parametrize(
    ("found", "has"),
    [
        ({}, "keys "),
        ({"teacher": 3, "epoch": 4}, "keys teacher, epoch"),
        ({"teacher": {}}, "keys "),
        ({"teacher": {"backbone.norm.weight": [1.0]}}, "keys backbone.norm.weight"),
        ({"norm.weight": torch.zeros(1), "epoch": 3}, "keys norm.weight, epoch"),
        ({"teacher": {"state_dict": {"norm.weight": torch.zeros(1)}}}, "keys state_dict"),
        ([torch.zeros(1)], "<class 'list'>"),
        (torch.zeros(1), "<class 'torch.Tensor'>"),
        ({0: torch.zeros(1)}, "keys 0"),
        ({"teacher": {("a", 1): torch.zeros(1)}}, "keys ('a', 1)"),
    ],
    ids=str,
)
def test_files_without_tensors_by_name_are_refused(tmp_path: Path, found: Any, has: str) -> None:
    torch.save(found, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="holds no tensors by name, nor under teacher or student") as error:
        read_weights(tmp_path / "a.pth")
    assert str(error.value) == (
        f"{tmp_path / 'a.pth'} holds no tensors by name, nor under teacher or student: it has {has}"
    )


def test_files_that_are_not_there_are_refused(tmp_path: Path) -> None:
    for name in ("a.pth", "a.safetensors", "run"):
        with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
            read_weights(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"teacher\.safetensors does not exist: give a run's folder"):
        read_weights(tmp_path)


def weights_file(path: Path, kind: str) -> bytes:
    """A whole file of weights, in each of three formats."""
    if kind == "safetensors":
        save_file(network(1.0), path)
    else:
        torch.save(official(), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    assert len(read_weights(path).teacher) == 3
    return whole


FORMATS = {"zip": "a.pth", "legacy": "a.pth", "safetensors": "a.safetensors"}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_cut_short_is_refused_wherever_it_is_cut(tmp_path: Path, kind: str) -> None:
    path = tmp_path / FORMATS[kind]
    whole = weights_file(path, kind)
    last = range(len(whole) - 40, len(whole))
    for cut in sorted({*range(0, len(whole), max(1, len(whole) // 150)), *last}):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_weights(path)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.filterwarnings("ignore")  # torch's, about what the damage looks like
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / FORMATS[kind]
    whole, generator, refused = weights_file(path, kind), random.Random(0), 0
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            read_weights(path)  # where a number or a name changed, nothing tells
        except ValueError:
            refused += 1
    assert 50 < refused < 450


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"not tensors",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 8) + b"\xff" * 8,
        struct.pack("<Q", 6) + b'{"a":3}',
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(64),
        struct.pack("<Q", 64) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}'.ljust(64) + b"0000",
        pickle.dumps({"a": 1}),
    ],
    ids=["empty", "text", "huge", "binary", "no tensor", "no data", "backwards", "pickle"],
)
def test_a_safetensors_file_of_garbage_is_refused(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(garbage)
    with pytest.raises(
        ValueError, match=r"a\.safetensors is not a safetensors file|cannot be read as weights"
    ):
        read_weights(path)
    save_file(network(1.0), path)  # and the refusals are not of all files
    assert_same(read_weights(path).teacher, load_file(path))


class Hostile:
    """Touches a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("executed"),)


class Evaluated:
    """The same by way of what every program has."""

    def __reduce__(self) -> tuple[object, ...]:
        return eval, ("open('executed', 'w')",)


class State:
    """The same by the state of an object that is allowed."""

    def __reduce__(self) -> tuple[object, ...]:
        return argparse.Namespace, (), {"a": Hostile()}


@pytest.mark.parametrize("hostile", [Hostile, Evaluated, State])
@pytest.mark.parametrize("where", ["file", "teacher", "tensor", "args", "optimizer"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_hostile_file_is_refused_and_executes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hostile: type, where: str, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found: Any = official()
    if where == "file":
        found = hostile()
    elif where == "tensor":
        found["teacher"]["backbone.norm.weight"] = hostile()
    else:
        found[where] = hostile()
    path = Path("weights.pth")
    if kind == "pickle":
        path.write_bytes(pickle.dumps(found))
    else:
        torch.save(found, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match=r"weights\.pth cannot be read as weights") as error:
        read_weights(path)
    assert not Path("executed").exists()
    # torch's own message goes on with how to run the file all the same
    assert "weights_only" not in str(error.value)
    if kind == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert Path("executed").exists()  # the file does what it is said to


# Names of others' ViTs


def test_blocks_in_chunks_are_counted_through() -> None:
    state = {f"blocks.{i // 2}.{i}.norm1.weight": torch.tensor([i]) for i in range(12)}
    state |= {"norm.weight": torch.tensor([99])}
    renamed = vit_names(state)
    assert {name: int(value) for name, value in renamed.items()} == {
        **{f"blocks.{i}.norm1.weight": i for i in range(12)},
        "norm.weight": 99,
    }
    assert vit_names(renamed) == renamed


def test_timms_swiglu_is_ours() -> None:
    state = {
        "blocks.0.mlp.fc1.weight": torch.randn(12, 4),
        "blocks.0.mlp.fc1.bias": torch.randn(12),
        "blocks.0.mlp.fc2.weight": torch.randn(4, 6),
        "blocks.0.mlp.fc2.bias": torch.randn(4),
    }
    ours = vit_names(state)
    assert_same(ours, {n.replace("fc1", "w12").replace("fc2", "w3"): t for n, t in state.items()})
    plain = state | {"blocks.0.mlp.fc1.weight": torch.randn(6, 4), "blocks.0.mlp.fc1.bias": torch.randn(6)}
    assert_same(vit_names(plain), plain)


# Loading a backbone


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
    load_backbone_state(ours, theirs.state_dict(), "here")  # in full precision
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
    assert load_backbone_state(ours, theirs.state_dict(), "here") == [
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


# Fitting


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
    notes = load_backbone_state(network, given, "here")
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
    (note,) = load_backbone_state(network, source.state_dict(), "here")
    assert note.endswith("from 4 x 4 to 3 x 5 patches")
    images = torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        assert torch.equal(network(images), source(images))


def test_halves_and_doubles_become_the_networks_type() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        for size in (32, 24):  # the same grid, and another
            source, network = small_vit().to(dtype), small_vit(size)
            load_backbone_state(network, source.state_dict(), "here")
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
        load_backbone_state(network, state, "a.pth")
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
        load_backbone_state(network, state, "a.pth")
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
        load_backbone_state(network, state, "a.pth")
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
    dino = make_dino(drop_path_rate=0.0)
    crops = [torch.randn(3, 3, size, size) for size in (16, 16, 8, 8, 8)]
    dino.load_weights(str(path))
    loss, _ = dino(crops, 0)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in dino.student.parameters() if p.requires_grad)


# Files that lie


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"cls_token": torch.zeros(1, 1, 500_032)}, "heads of 64|does not fit"),
        ({"cls_token": torch.zeros(1, 1, 0)}, "heads of 64"),
        ({"pos_embed": torch.zeros(1, 0, 64)}, "only square grids"),
        ({"pos_embed": torch.zeros(1, 1, 64)}, "only square grids"),
        ({"patch_embed.proj.weight": torch.zeros(64, 3, 0, 0)}, "only square grids"),
        ({"patch_embed.proj.weight": torch.zeros(1, 1, 1, 90_000)}, "does not fit"),
        ({"blocks.0.mlp.fc2.weight": torch.zeros(1, 2_000_000)}, "does not fit"),
        ({"blocks.999999.norm1.weight": torch.zeros(64)}, "does not fit"),
        ({f"blocks.{'9' * 5000}.norm1.weight": torch.zeros(64)}, "does not fit"),
        ({"register_tokens": torch.zeros(2)}, "does not fit|IndexError|range"),
        ({"register_tokens": torch.zeros(0, 10**12, 64)}, "."),
        ({"reg_token": torch.zeros(2)}, "no ViT has"),
        ({"reg_token": torch.zeros(1, 9, 9)}, "no ViT has"),
        ({"blocks.0.mlp.fc1.weight": torch.zeros(())}, "does not fit"),
        (
            {"norm.weight": torch.zeros(64, dtype=torch.int64)},
            "norm.weight is torch.int64, not torch.float32",
        ),
        ({"norm.weight": torch.zeros(64, dtype=torch.bool)}, "norm.weight is torch.bool, not torch.float32"),
        ({"rope_embed.periods": torch.zeros(4), "pos_embed": torch.zeros(1)}, "DINOv3's rotary positions"),
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_shapes_that_claim_another_network_are_refused_before_it_is_made(
    tmp_path: Path, changed: dict[str, Tensor], why: str, suffix: str
) -> None:
    path = write(tmp_path / f"a.{suffix}", small_vit().state_dict() | changed)
    with pytest.raises(ValueError, match=why) as error:
        load_backbone(str(path))
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        make_dino().load_weights(str(path))


def test_what_is_not_finite_is_said(tmp_path: Path) -> None:
    source, dino = make_dino(), make_dino()
    source.teacher.backbone.norm.weight.data[0] = torch.nan
    source.student.head.mlp[0].bias.data[0] = torch.inf
    path = write(tmp_path / "a.pth", as_official(source))
    notes = dino.load_weights(str(path))
    assert "not finite: norm.weight" in notes
    assert "not finite: mlp.0.bias" in notes
    vit = small_vit()
    vit.norm.bias.data[0] = -torch.inf
    _, said = load_noting(write(tmp_path / "b.pth", vit.state_dict()))
    assert said.endswith("not finite: norm.bias")


def claiming(path: Path, change: Any) -> Path:
    """A teacher.safetensors whose configuration says something else than its tensors."""
    config = make_config(NOWHERE, NOWHERE)
    checkpoint.write_teacher(path, make_dino().teacher, config, 0)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    values = json.loads(metadata["fastdino_config"])
    metadata["fastdino_config"] = change if isinstance(change, str) else json.dumps(change(values))
    save_file(load_file(path), path, metadata=metadata)
    return path


def setting(section: str, **values: Any) -> Any:
    return lambda config: config | {section: config[section] | values}


@pytest.mark.parametrize(
    "change",
    [
        "", "{", "[]", "3", "null", '"text"', "[" * 100_000, '{"a":' * 100_000, "1" * 5000, "NaN",
        lambda config: config | {"model": None},
        lambda config: config | {"model": [], "extra": 1},
        setting("model", arch=3),
        setting("model", arch="vit_unknown"),
        setting("model", arch="timm:hf-hub:a/b"),
        setting("model", arch="vit_giant"),
        setting("model", patch_size=10**6),
        setting("model", patch_size=10**30),
        setting("model", num_register_tokens=10**15),
        setting("model", num_register_tokens=1),
        setting("model", out_dim=10**12),
        setting("model", head_layers=10**9),
        setting("model", head_hidden_dim=10**9),
        setting("model", bottleneck_dim="x"),
        setting("model", unknown=1),
        setting("data", crops=None),
        setting("data", crops={"global_crops_size": 4096, "local_crops_size": 4}),
        setting("data", crops={"global_crops_size": "x"}),
    ],
    ids=range(28),
)  # fmt: skip
def test_a_configuration_that_lies_ends_in_a_sentence(tmp_path: Path, change: Any) -> None:
    path = claiming(tmp_path / "teacher.safetensors", change)
    with pytest.raises(ValueError, match=r"."):
        load_backbone(str(path))


def test_a_teacher_that_is_no_file_is_not_there(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "teacher.safetensors")  # opening it would wait for ever
    assert checkpoint.teacher_step(tmp_path) is None
    for path in (tmp_path, tmp_path / "teacher.safetensors"):
        with pytest.raises(FileNotFoundError, match=r"teacher\.safetensors"):
            load_backbone(str(path))
