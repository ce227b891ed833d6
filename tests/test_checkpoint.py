"""Files of a run: whole or absent, whatever kills the process; bad folders and files refused clearly."""

import json
import os
import shutil
import signal
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
from safetensors.torch import save_file
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
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "helpers")}
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
