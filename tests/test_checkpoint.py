"""Files of a run: whole or absent, whatever kills the process; bad folders and files refused clearly."""

import argparse
import json
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_config
from torch import nn

from fastdino import checkpoint
from fastdino.config import from_dict, to_dict


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.full((5, 3), value),
        "optimizer.step": torch.tensor(value),
        "half": torch.full((2,), value, dtype=torch.bfloat16),
        "count": torch.tensor(int(value)),
    }


def test_load_gives_back_what_save_was_given(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 7, tensors(3.0), {"images": "abc"})
    into = tensors(0.0)
    held = into["weight"]
    assert checkpoint.load(tmp_path / "checkpoints" / "step_7", into) == {"images": "abc"}
    assert all(torch.equal(into[k], v) for k, v in tensors(3.0).items())
    assert into["weight"] is held  # in place: the optimiser's own tensors are filled


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 7, tensors(3.0), {})
    checkpoint.save(tmp_path, 7, tensors(4.0), {})
    into = tensors(0.0)
    checkpoint.load(checkpoint.checkpoints(tmp_path)[7], into)
    assert into["count"] == 4


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "info.json"])
@pytest.mark.parametrize("share", [0.0, 0.5, None])  # None: it is missing
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(
    file: str, share: float | None, tmp_path: Path
) -> None:
    checkpoint.save(tmp_path, 1, tensors(1.0), {"step": 1})
    path = checkpoint.save(tmp_path, 2, tensors(2.0), {"step": 2}) / file
    content = path.read_bytes()
    path.unlink()
    if share is not None:
        path.write_bytes(content[: int(share * len(content))])
    into = tensors(0.0)
    step, info, problems = checkpoint.load_newest(tmp_path, into)
    assert (step, info) == (1, {"step": 1})
    assert all(torch.equal(into[name], value) for name, value in tensors(1.0).items())
    assert len(problems) == 1
    assert problems[0].startswith(f"{path.parent} cannot be read: ")
    shutil.rmtree(tmp_path / "checkpoints" / "step_1")
    with pytest.raises(ValueError, match=r"step_2 cannot be read: (.|\n)*No checkpoint of .* is left: give"):
        checkpoint.load_newest(tmp_path, into)


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path, tensors(0.0)) == (0, {}, [])


def test_a_save_may_be_overtaken_by_changes_and_says_when_it_failed(tmp_path: Path) -> None:
    saver, state, told = checkpoint.Saver(tmp_path), tensors(1.0), []
    saver.save(1, state, {}, lambda: told.append("teacher"))
    for value in state.values():
        value.fill_(7)
    assert saver.finish() == ""
    assert told == ["teacher"]
    assert saver.finish() == ""  # nothing is pending
    into = tensors(0.0)
    checkpoint.load(tmp_path / "checkpoints" / "step_1", into)
    assert all(torch.equal(into[name], value) for name, value in tensors(1.0).items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "sync", lambda path: (_ for _ in ()).throw(OSError("No space left")))
        saver.save(2, state, {})
        assert saver.finish() == "checkpoint 2 could not be written: No space left"
    assert list(checkpoint.checkpoints(tmp_path)) == [1]
    saver.save(3, state, {})
    saver.close()
    assert list(checkpoint.checkpoints(tmp_path)) == [1, 3]
    assert not list((tmp_path / "checkpoints").glob(".*"))  # nor what the failed one left


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    saver = checkpoint.Saver(tmp_path)
    saver.save(1, tensors(1.0), {})
    assert saver.finish().startswith("checkpoint 1 could not be written: ")
    with pytest.raises(OSError, match="checkpoint 1 could not be written: "):
        checkpoint.save(tmp_path, 1, tensors(1.0), {})


def test_prune_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    for step in range(1, 11):
        checkpoint.save(tmp_path, step, {"x": torch.zeros(1)}, {})
    (tmp_path / "checkpoints" / ".step_11.tmp").mkdir()  # a save that was killed
    checkpoint.prune(tmp_path, keep=2, keep_every=4)
    assert list(checkpoint.checkpoints(tmp_path)) == [4, 8, 9, 10]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step_4", "step_8", "step_9", "step_10"}
    checkpoint.prune(tmp_path, keep=1, keep_every=0)
    assert list(checkpoint.checkpoints(tmp_path)) == [10]


def test_kill_at_any_moment_leaves_only_whole_checkpoints_and_files(tmp_path: Path) -> None:
    code = f"""
import torch
from pathlib import Path
from fastdino import checkpoint
from tiny import make_config
out = Path({str(tmp_path)!r})
module = torch.nn.Linear(300, 300)
config = make_config(out, out)
print("ready", flush=True)
step = 0
while True:
    step += 1
    with torch.no_grad():
        module.weight.fill_(step)
    checkpoint.save(out, step, {{"weight": module.weight.detach()}}, {{"step": step}})
    checkpoint.write_teacher(out / "teacher.safetensors", module, config, step)
    checkpoint.prune(out, 2, 0)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    newest = 0
    for pause in (0.01, 0.05, 0.13, 0.3):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for step, path in checkpoint.checkpoints(tmp_path).items():
            into = {"weight": torch.zeros(300, 300)}
            assert checkpoint.load(path, into) == {"step": step}
            assert (into["weight"] == step).all()
            newest = max(newest, step)
        if (tmp_path / "teacher.safetensors").exists():
            state, _ = checkpoint.read_teacher(tmp_path)
            assert len(state["weight"].unique()) == 1
    assert newest > 0


def test_claim_continues_the_same_run_and_names_what_differs(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path / "run")
    out = tmp_path / "run"
    checkpoint.claim(out, replace(config, optim=replace(config.optim, lr=9.0))).close()
    checkpoint.claim(out, config).close()  # nothing had been saved yet: the first failed, out of memory say
    checkpoint.save(out, 1, tensors(1.0), {})
    stored = from_dict(type(config), json.loads((out / "config.json").read_text()))
    assert stored == config
    # What does not touch learning may change.
    checkpoint.claim(out, replace(config, run=replace(config.run, log_every=3, keep=9))).close()
    other = replace(config, optim=replace(config.optim, lr=0.1), model=replace(config.model, patch_size=2))
    with pytest.raises(
        ValueError, match=r"(?s)another configuration.*--patch-size: was 4, now 2.*another --out"
    ) as e:
        checkpoint.claim(out, other)
    assert "--lr: was 0.05, now 0.1" in str(e.value)
    assert "--log-every" not in str(e.value)
    checkpoint.claim(out, config).close()  # a refusal does not hold the folder


NEW = {
    "model": ("num_register_tokens", "layer_scale", "init_from"),
    "optim": ("head_warmup_steps",),
    "run": ("compile", "attention", "activation_checkpointing"),
}


def test_claim_continues_a_run_from_before_a_field_was_there(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path)
    checkpoint.claim(tmp_path, config).close()
    checkpoint.save(tmp_path, 1, tensors(1.0), {})
    old = to_dict(config)
    for part, names in NEW.items():
        for name in names:
            del old[part][name]
    text = json.dumps(old)
    (tmp_path / "config.json").write_text(text)
    checkpoint.claim(tmp_path, config).close()
    assert (tmp_path / "config.json").read_text() == text
    other = make_config(tmp_path, tmp_path, num_register_tokens=4, layer_scale=0.1, init_from="a.pth")
    with pytest.raises(ValueError, match="another configuration") as error:
        checkpoint.claim(tmp_path, other)
    assert str(error.value).split("\n")[1:-1] == [
        "  --init-from: was '', now 'a.pth'",
        "  --layer-scale: was 0.0, now 0.1",
        "  --num-register-tokens: was 0, now 4",
    ]


def test_claim_lets_a_continued_run_compute_the_same_otherwise(tmp_path: Path) -> None:
    checkpoint.claim(tmp_path, make_config(tmp_path, tmp_path)).close()
    checkpoint.save(tmp_path, 1, tensors(1.0), {})
    otherwise: dict[str, Any] = {"compile": "on", "attention": "sdpa", "parallel": "fsdp", "accumulate": 2}
    otherwise |= {"activation_checkpointing": True, "workers": 3}
    checkpoint.claim(tmp_path, make_config(tmp_path, tmp_path, **otherwise)).close()
    with pytest.raises(ValueError, match="--head-warmup-steps: was 0, now 3"):
        checkpoint.claim(tmp_path, make_config(tmp_path, tmp_path, head_warmup_steps=3, init_from="a.pth"))


def test_claim_refuses_two_processes_a_file_and_foreign_files(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path)
    with (
        checkpoint.claim(tmp_path / "run", config),
        ProcessPoolExecutor(1, get_context("fork")) as other,
        pytest.raises(ValueError, match="another process is training"),
    ):
        other.submit(checkpoint.claim, tmp_path / "run", config).result()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file: give a folder"):
        checkpoint.claim(tmp_path / "file", config)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "teacher.safetensors").write_text("precious")
    with pytest.raises(ValueError, match=r"teacher\.safetensors but no config\.json"):
        checkpoint.claim(tmp_path / "foreign", config)
    assert (tmp_path / "foreign" / "teacher.safetensors").read_text() == "precious"


def test_teacher_file_carries_tensors_configuration_and_ordinary_permissions(tmp_path: Path) -> None:
    module, config = nn.Linear(3, 2), make_config(tmp_path, tmp_path)
    path = tmp_path / "teacher.safetensors"
    checkpoint.write_teacher(path, module, config, 5)
    state, read = checkpoint.read_teacher(path)
    assert read == config
    assert all(torch.equal(state[k], v) for k, v in module.state_dict().items())
    (tmp_path / "ordinary").touch()
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_bad_teacher_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors does not exist: give a run's folder"):
        checkpoint.read_teacher(tmp_path / "nothing.safetensors")
    (tmp_path / "text").write_text("not tensors")
    with pytest.raises(ValueError, match="text is not a safetensors file"):
        checkpoint.read_teacher(tmp_path / "text")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="carries no fastdino configuration"):
        checkpoint.read_teacher(tmp_path / "other.safetensors")


# Weights of others

NAMES = ("backbone.norm.weight", "backbone.blocks.0.attn.qkv.weight", "head.mlp.0.bias")


def network(value: float, prefix: str = "") -> dict[str, torch.Tensor]:
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


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value)


@pytest.mark.parametrize("zipped", [True, False])
def test_an_official_checkpoint_is_read_whole(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(official(), path, _use_new_zipfile_serialization=zipped)  # torch before 1.6 did not zip
    weights = checkpoint.read_weights(path)
    assert weights.kind == "full checkpoint, teacher and student"
    assert_same(weights.student, network(1.0))
    assert_same(weights.teacher, network(2.0))
    assert weights.center is not None
    assert torch.equal(weights.center, torch.full((1, 5), 0.5))
    assert weights.config is None


@pytest.mark.parametrize("part", ["student", "teacher"])
def test_a_checkpoint_of_one_network_is_read_as_both(tmp_path: Path, part: str) -> None:
    torch.save({part: network(3.0, "module._orig_mod."), "epoch": 1}, tmp_path / "a.pth")
    weights = checkpoint.read_weights(tmp_path / "a.pth")
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
    weights = checkpoint.read_weights(path)
    assert weights.kind == ("network" if any(name.startswith("head.") for name in ours) else "backbone")
    assert_same(weights.teacher, ours)
    assert_same(weights.student, ours)


def test_values_of_every_type_arrive_bit_for_bit(tmp_path: Path) -> None:
    bits = torch.randint(-(2**15), 2**15, (64,), dtype=torch.int16)
    state = {"backbone.half": bits.view(torch.float16), "backbone.brain": bits.flip(0).view(torch.bfloat16)}
    state |= {"backbone.count": torch.tensor(7), "backbone.double": torch.randn(3, dtype=torch.float64)}
    torch.save({"teacher": state}, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors")
    for path in (tmp_path / "a.pth", tmp_path / "a.safetensors"):
        read = checkpoint.read_weights(path).teacher
        assert read.keys() == state.keys()
        for name, value in state.items():
            assert read[name].dtype == value.dtype
            # as integers, for a NaN is not equal to itself
            assert torch.equal(read[name].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))


def test_our_own_files_are_read_with_their_configuration(tmp_path: Path) -> None:
    config, module = make_config(tmp_path, tmp_path), nn.Linear(3, 2)
    checkpoint.write_teacher(tmp_path / "teacher.safetensors", module, config, 5)
    for path in (tmp_path, tmp_path / "teacher.safetensors"):
        weights = checkpoint.read_weights(path)
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
        checkpoint.read_weights(tmp_path / "a.pth")
    assert str(error.value) == (
        f"{tmp_path / 'a.pth'} holds no tensors by name, nor under teacher or student: it has {has}"
    )


def test_files_that_are_not_there_are_refused(tmp_path: Path) -> None:
    for name in ("a.pth", "a.safetensors", "run"):
        with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
            checkpoint.read_weights(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"teacher\.safetensors does not exist: give a run's folder"):
        checkpoint.read_weights(tmp_path)


def weights_file(path: Path, kind: str) -> bytes:
    """A whole file of weights, in each of three formats."""
    if kind == "safetensors":
        save_file(network(1.0), path)
    else:
        torch.save(official(), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    assert len(checkpoint.read_weights(path).teacher) == 3
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
            checkpoint.read_weights(path)


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
            checkpoint.read_weights(path)  # where a number or a name changed, nothing tells
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
        checkpoint.read_weights(path)
    save_file(network(1.0), path)  # and the refusals are not of all files
    assert_same(checkpoint.read_weights(path).teacher, load_file(path))


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
        checkpoint.read_weights(path)
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
    renamed = checkpoint.vit_names(state)
    assert {name: int(value) for name, value in renamed.items()} == {
        **{f"blocks.{i}.norm1.weight": i for i in range(12)},
        "norm.weight": 99,
    }
    assert checkpoint.vit_names(renamed) == renamed


def test_timms_swiglu_is_ours() -> None:
    state = {
        "blocks.0.mlp.fc1.weight": torch.randn(12, 4),
        "blocks.0.mlp.fc1.bias": torch.randn(12),
        "blocks.0.mlp.fc2.weight": torch.randn(4, 6),
        "blocks.0.mlp.fc2.bias": torch.randn(4),
    }
    ours = checkpoint.vit_names(state)
    assert_same(ours, {n.replace("fc1", "w12").replace("fc2", "w3"): t for n, t in state.items()})
    plain = state | {"blocks.0.mlp.fc1.weight": torch.randn(6, 4), "blocks.0.mlp.fc1.bias": torch.randn(6)}
    assert_same(checkpoint.vit_names(plain), plain)
