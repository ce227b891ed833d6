"""fastdino-train: resuming, stopping, bad images, non-finite steps, host syncs, and what a person is told."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import CountSyncs
from faults import ScaleOne, feed_that_calls, with_infinite_gradients, with_nan_losses
from safetensors import safe_open
from tiny import final_tensors, make_config, make_images
from torch import Tensor

from fastdino import checkpoint, train
from fastdino.config import Config
from fastdino.data import Batch
from fastdino.data.feed import Feed, Piece
from fastdino.dino import DINO
from fastdino.monitor import Monitor, read_metrics
from fastdino.update import Update


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nineteen images in two classes: two updates of 8 an epoch, three left over."""
    return make_images(tmp_path_factory.mktemp("images"), 19, classes=2)


def run_until(config: Config, step: int, signum: int = signal.SIGTERM, **types: Any) -> None:
    """Train in this process and send it `signum` during update `step`."""
    feed = feed_that_calls(lambda: os.kill(os.getpid(), signum), step)
    with pytest.raises(train.Interrupted) as stopped:
        train.train(config, feed_type=feed, **types)
    assert stopped.value.signum == signum


KINDS = {
    "adamw with drop path": {"drop_path_rate": 0.3, "freeze_last_layer": 2},
    "batch norm, sgd, pieces": {
        "arch": "resnet18",
        "optimizer": "sgd",
        "accumulate": 2,
        "use_bn_in_head": True,
    },
    "bf16, lars, loader processes": {"precision": "bf16", "optimizer": "lars", "workers": 2},
    "fp16, previous epoch": {
        "precision": "fp16",  # very slow on a CPU
        "teacher_update": "previous_epoch",
        "local_crops_number": 0,
        "global_crops_size": 8,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_equals_the_uninterrupted_bit_for_bit(images: Path, tmp_path: Path, kind: str) -> None:
    flags = {"epochs": 3, "save_every": 100, "keep_every_epochs": 0, **KINDS[kind]}
    whole = make_config(images, tmp_path / "whole", **flags)
    train.train(whole)
    config = make_config(images, tmp_path / "stopped", **{**flags, "log_every": 3})
    run_until(config, 3, signal.SIGTERM)  # in the middle of the second epoch
    assert list(checkpoint.checkpoints(tmp_path / "stopped")) == [3]
    run_until(config, 2, signal.SIGINT)
    assert max(checkpoint.checkpoints(tmp_path / "stopped")) == 5
    train.train(config)
    expected, got = final_tensors(tmp_path / "whole", 6), final_tensors(tmp_path / "stopped", 6)
    assert expected.keys() == got.keys()
    assert [k for k in expected if not torch.equal(expected[k], got[k])] == []
    assert sum(v.abs().sum().item() for v in expected.values() if v.is_floating_point()) > 0
    assert read_metrics(tmp_path / "stopped")[-1]["step"] == 6


class SlowFeed(Feed):
    """Waits 0.16 s for each batch."""

    def __init__(self, loader: Iterable[Batch], *arguments: Any) -> None:
        def slowly() -> Iterator[Batch]:
            for batch in loader:
                time.sleep(0.16)
                yield batch

        super().__init__(slowly(), *arguments)


class PromptFeed(Feed):
    """Says that nothing was waited for."""

    def __next__(self) -> Piece:
        views, tally = super().__next__()
        return Piece(views, tally._replace(waited=0.0))


def test_waiting_for_images_is_measured_and_said_once_with_what_helps(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.train(make_config(images, tmp_path / "slow", epochs=3), feed_type=SlowFeed)
    said = capsys.readouterr().out
    assert len(re.findall("of the time training waits for images; what may help: more --workers", said)) == 1
    assert "step 2: " in said.partition("of the time training waits")[0].splitlines()[-1]
    for line in read_metrics(tmp_path / "slow"):
        assert 0.16 * line["images_per_s"] / 8 <= line["data_wait"] * 1.05 <= 1.05


def test_a_run_that_does_not_wait_says_nothing_of_it(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.train(make_config(images, tmp_path / "run", epochs=3), feed_type=PromptFeed)
    assert "waits for images" not in capsys.readouterr().out


def test_kill_9_loses_only_the_steps_since_the_last_save(images: Path, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from tiny import make_config
from fastdino.train import train
images, out = Path({str(images)!r}), Path({str(tmp_path / "killed")!r})
train(make_config(images, out, epochs=200, save_every=2, workers=1))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "helpers")}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(read_metrics(tmp_path / "killed")) < 7:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = read_metrics(tmp_path / "killed")[-1]["step"]
    saved = max(checkpoint.checkpoints(tmp_path / "killed"))
    assert reached - 3 <= saved <= reached + 1
    # And the lock is free, the torn files are whole: the run goes on from there.
    config = make_config(images, tmp_path / "killed", epochs=200, save_every=2, workers=0)
    run_until(config, 3)
    assert max(checkpoint.checkpoints(tmp_path / "killed")) == saved + 3
    steps = [m["step"] for m in read_metrics(tmp_path / "killed")]
    assert steps == list(range(1, saved + 4))  # no step twice, none lost


def test_a_signal_between_log_and_save_still_saves(images: Path, tmp_path: Path) -> None:
    original = Monitor.record

    def record(self: Monitor, step: int, values: dict[str, Any]) -> None:
        original(self, step, values)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "record", record)
        with pytest.raises(train.Interrupted, match="at step 2 of 4"):
            train.train(make_config(images, tmp_path, epochs=2))
    assert list(checkpoint.checkpoints(tmp_path)) == [2]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_preemption_saves_and_exits_as_a_requeue_understands(
    signum: int, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(images, tmp_path, epochs=2)
    with pytest.raises(SystemExit) as left:
        train.command(config, feed_type=feed_that_calls(lambda: os.kill(os.getpid(), signum), 1))
    assert left.value.code == train.REQUEUE == 75
    assert f"saved {tmp_path} at step 1 of 4; the same command continues it" in capsys.readouterr().err
    assert list(checkpoint.checkpoints(tmp_path)) == [1]


def test_a_truncated_checkpoint_is_said_and_the_one_before_it_continued(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = make_config(images, tmp_path / "whole", epochs=2)
    train.train(whole)
    config = make_config(images, tmp_path / "run", epochs=2, save_every=1)
    run_until(config, 3)
    newest = checkpoint.checkpoints(tmp_path / "run")[3]
    os.truncate(newest / "__0_0.distcp", 1000)
    os.truncate(tmp_path / "run" / "teacher.safetensors", 1000)
    capsys.readouterr()
    train.train(config)
    said = capsys.readouterr().out
    assert f"{newest} cannot be read: " in said
    assert "is continued: step 2 of 4" in said
    expected, got = final_tensors(tmp_path / "whole", 4), final_tensors(tmp_path / "run", 4)
    assert [k for k in expected if not torch.equal(expected[k], got[k])] == []
    assert checkpoint.teacher_step(tmp_path / "run") == 4


def test_a_compilation_that_fails_says_how_to_go_on_without(
    images: Path, tmp_path: Path, dynamo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: compile_block(self, **how, backend=broken)
    )
    with pytest.raises(SystemExit) as left:
        train.command(make_config(images, tmp_path, compile="on"))
    assert "torch.compile failed; --compile off goes on without it" in str(left.value.code)
    assert "no compiler here" in str(left.value.code)


def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(images: Path, tmp_path: Path) -> None:
    command = [
        *(
            sys.executable,
            "-m",
            "fastdino.train",
            "demo",
            "--data",
            str(images),
            "--out",
            str(tmp_path / "run"),
        ),
        *(
            "--batch-size",
            "8",
            "--epochs",
            "500",
            "--log-every",
            "1",
            "--workers",
            "1",
            "--precision",
            "fp32",
        ),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not read_metrics(tmp_path / "run"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # a terminal signals the loader's processes too
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert re.search(r"saved .* at step \d+ of 1000; the same command continues it", errors)
    assert "Traceback" not in output + errors
    (step,) = checkpoint.checkpoints(tmp_path / "run")
    assert read_metrics(tmp_path / "run")[-1]["step"] == step


def test_finished_run_is_left_alone(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(images, tmp_path, epochs=1)
    first = train.train(config)
    before = (tmp_path / "teacher.safetensors").read_bytes()
    again = train.train(config)
    assert (tmp_path / "teacher.safetensors").read_bytes() == before
    assert again == first
    assert "complete" in capsys.readouterr().out


def test_all_files_are_left_and_the_teacher_is_there_from_the_start(images: Path, tmp_path: Path) -> None:
    config = make_config(images, tmp_path, epochs=2, knn_every_epochs=1, save_every=3, keep_every_epochs=1)
    seen = []

    class Looking(Feed):
        def __next__(self) -> Piece:
            seen.append((tmp_path / "teacher.safetensors").exists())
            return super().__next__()

    last = train.train(config, feed_type=Looking)
    assert seen == [True] * 4
    names = {p.name for p in tmp_path.iterdir() if p.name != ".lock"}
    assert names == {
        *("config.json", "metrics.jsonl", "tensorboard", "checkpoints", "teacher.safetensors"),
        *("curves.png", "attention.png"),
    }
    assert list(checkpoint.checkpoints(tmp_path)) == [2, 3, 4]  # 2: end of an epoch; 3, 4: the newest
    with safe_open(tmp_path / "teacher.safetensors", "pt") as file:
        assert file.metadata()["step"] == "4"
        assert "backbone.blocks.0.attn.qkv.weight" in file.keys()  # noqa: SIM118
    assert set(last) >= {
        *("loss", "lr", "weight_decay", "momentum", "teacher_temp", "grad_norm", "images_per_s", "data_wait"),
        *("memory_gb", "unreadable", "skipped", "epoch", "knn_10", "knn_20", "knn_100", "knn_200"),
    }


def test_first_line_says_what_runs(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.train(make_config(images, tmp_path, epochs=1))
    line = capsys.readouterr().out.splitlines()[0]
    for part in ("cpu", "float32", "dino_loss: ", "ema: ", "19 images", "1 epochs of 2 updates of 8 images"):
        assert part in line


def test_accumulation_steps_centre_teacher_and_schedules_once_an_update(images: Path, tmp_path: Path) -> None:
    tensors = {}
    for accumulate in (1, 4):
        out = tmp_path / str(accumulate)
        config = make_config(images, out, epochs=2, accumulate=accumulate, drop_path_rate=0.0, lr=1e-3)
        train.train(config)
        tensors[accumulate] = final_tensors(out, 4)
    for name, value in tensors[1].items():
        if "qkv.bias" not in name:  # the keys' bias has no gradient but rounding, which Adam magnifies
            torch.testing.assert_close(tensors[4][name], value, rtol=2e-4, atol=2e-6, msg=name)
    assert tensors[4]["optimizer.backbone.cls_token.step"] == 4


@pytest.mark.parametrize("flags", [{"optimizer": "adamw"}, {"optimizer": "sgd"}, {"optimizer": "lars"}])
def test_a_step_that_does_not_log_never_waits_for_the_device(
    images: Path, tmp_path: Path, flags: dict[str, str]
) -> None:
    counts = []
    # One epoch of 2 and one of 4 updates, each logged at its end alone.
    for batch in (8, 4):
        config = make_config(
            images, tmp_path / str(batch), epochs=1, batch_size=batch, log_every=100, save_every=100, **flags
        )
        with CountSyncs("cpu") as syncs:
            train.train(config)
        counts.append(syncs.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("optimizer", "precision"), [("adamw", "fp32"), ("sgd", "fp32"), ("lars", "fp32"), ("adamw", "fp16")]
)
def test_a_non_finite_step_is_skipped_and_named(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    optimizer: str,
    precision: str,
) -> None:
    flags = {"optimizer": optimizer, "precision": precision, "save_every": 1, "keep": 9, "log_every": 4}
    config = make_config(images, tmp_path, epochs=2, **flags)
    train.train(config, update_type=with_nan_losses(2))
    before, after = final_tensors(tmp_path, 1), final_tensors(tmp_path, 2)
    unchanged = [k for k in before if not k.startswith("teacher.")]
    assert [k for k in unchanged if not torch.equal(before[k], after[k])] == []
    assert all(v.isfinite().all() for v in final_tensors(tmp_path, 4).values())
    assert re.search(
        r"step 2: loss is nan at learning rate [\d.e-]+, skipped; images .*\.png", capsys.readouterr().out
    )
    (record,) = [m for m in read_metrics(tmp_path) if "nonfinite" in m]
    assert record["step"] == 2
    assert len(record["images"]) == 8
    assert all(Path(name).exists() for name in record["images"])
    assert read_metrics(tmp_path)[-1]["skipped"] == 1


def test_too_many_non_finite_steps_in_a_row_stop_the_run(images: Path, tmp_path: Path) -> None:
    config = make_config(images, tmp_path, epochs=9, save_every=2, max_nonfinite=3)
    message = (
        r"stopped at step 6: 3 non-finite steps in a row\. The last good checkpoint is .*step_4\. Lower --lr"
    )
    with pytest.raises(train.RunError, match=message):
        train.train(config, update_type=with_nan_losses(2, 4, 5, 6))
    assert all(v.isfinite().all() for v in final_tensors(tmp_path, 4).values())


@pytest.mark.parametrize(("precision", "reported"), [("fp16", 0), ("fp32", 1)])
def test_a_gradient_overflow_is_skipped_and_is_news_only_without_a_scaler(
    images: Path, tmp_path: Path, precision: str, reported: int
) -> None:
    config = make_config(images, tmp_path, epochs=2, precision=precision)
    train.train(config, update_type=with_infinite_gradients(2))
    tensors = final_tensors(tmp_path, 4)
    assert all(v.isfinite().all() for v in tensors.values())
    assert tensors["optimizer.backbone.cls_token.step"] == 3
    assert read_metrics(tmp_path)[-1]["skipped"] == 1
    assert len([m for m in read_metrics(tmp_path) if "nonfinite" in m]) == reported


def test_unreadable_files_are_skipped_named_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_images(tmp_path / "images", 17)
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:200])
    train.train(make_config(folder, tmp_path / "run", epochs=2, batch_size=17, max_unreadable=0.1))
    output = capsys.readouterr().out
    assert len(re.findall(r"skipped .*03\.png", output)) == 1
    assert read_metrics(tmp_path / "run")[-1]["unreadable"] == 1


def test_too_many_unreadable_files_stop_the_run_with_the_list(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", 17)
    for name in ("03.png", "08.png"):
        (folder / name).write_bytes(b"")
    with pytest.raises(train.RunError, match=r"(?s)2 of 17 files.*--max-unreadable 0\.1.*03\.png.*08\.png"):
        train.train(make_config(folder, tmp_path / "run", epochs=1, batch_size=17, max_unreadable=0.1))


def test_a_continued_run_refuses_other_images(images: Path, tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", 17)
    config = make_config(folder, tmp_path / "run", epochs=2)
    run_until(config, 2)
    (folder / "05.png").rename(folder / "renamed.png")
    with pytest.raises(ValueError, match=r"holds other images than when .* was begun"):
        train.train(config)


def test_a_continued_run_may_find_its_images_elsewhere(images: Path, tmp_path: Path) -> None:
    config = make_config(images, tmp_path / "run", epochs=2)
    run_until(config, 2)
    (tmp_path / "moved").symlink_to(images)
    (tmp_path / "run" / "teacher.safetensors").unlink()  # as if killed between checkpoint and teacher
    run_until(make_config(tmp_path / "moved", tmp_path / "run", epochs=2, save_every=99), 1)
    assert max(checkpoint.checkpoints(tmp_path / "run")) == 3


def test_a_continued_run_refuses_another_precision(images: Path, tmp_path: Path) -> None:
    run_until(make_config(images, tmp_path, epochs=2, precision="auto"), 2)

    class OnAnotherMachine(Update):
        def __init__(self, config: Config, *arguments: Any, **options: Any) -> None:
            super().__init__(
                replace(config, run=replace(config.run, precision="fp16")), *arguments, **options
            )

    with pytest.raises(ValueError, match=r"was trained in torch\.\w+, not torch\.float16.*--precision"):
        train.train(make_config(images, tmp_path, epochs=2, precision="auto"), update_type=OnAnotherMachine)


def test_knn_that_cannot_be_made_does_not_end_the_run(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = train.train(make_config(images, tmp_path, epochs=1, knn_every_epochs=1, knn_images=1))
    assert "knn_20" not in last
    assert "step 2: no k-NN: " in capsys.readouterr().out


def test_unlabelled_training_has_knn_within_labelled_val(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, val = make_images(tmp_path / "data", 9), make_images(tmp_path / "val", 6, classes=2)
    (data / "film.mp4").touch()
    flags = {"val": str(val), "epochs": 1, "knn_every_epochs": 1}
    assert "knn_20" in train.train(make_config(data, tmp_path / "run", **flags))
    out = " ".join(capsys.readouterr().out.split())
    assert f"{data}: 10 files: 9 taken, 1 left out: 1 .mp4" in out
    assert "--data has no labels: k-NN classifies each image of --val by the others of --val" in out
    assert "step 1: k-NN of the teacher within --val " in out
    with pytest.raises(ValueError, match="no labels"):
        train.train(make_config(data, tmp_path / "other", **flags | {"val": str(data)}))


def run_command(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fastdino.train", *flags], capture_output=True, text=True)


def test_bad_input_is_refused_before_any_work(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (tmp_path / "empty").mkdir()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": ""}, "--data is missing"),
        ({"data": str(tmp_path / "nowhere")}, "nowhere: no such folder or file"),
        ({"data": str(tmp_path / "empty")}, "empty"),
        ({"batch_size": 20}, r"--batch-size 20 is larger than the 19 images"),
        ({"val": str(make_images(tmp_path / "unlabelled", 3))}, "unlabelled has no labels"),
        ({"val": str(make_images(tmp_path / "more", 9, classes=3))}, "more has classes that .* class2"),
        ({"global_crops_size": 200}, "--global-crops-size 200 makes no sense for images .* 24 pixels"),
        ({"device": "gpu"}, "--device gpu: give auto, cpu, cuda"),
        ({"device": "cuda:99"}, r"--device cuda:99: this machine has \d+ CUDA devices"),
        ({"arch": "vit_vast"}, "--arch vit_vast is unknown"),
    ]
    for flags, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train.train(make_config(images, out, **flags))
        assert not out.exists(), flags
    with pytest.raises(ValueError, match=r"--out .* lies in --data"):
        train.train(make_config(images, images / "run"))
    assert not (images / "run").exists()


def test_command_prints_an_error_as_one_line_and_fails(tmp_path: Path) -> None:
    done = run_command("demo", "--data", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "fastdino-train: --out is missing: give a folder for the run's files\n"
    done = run_command("demo", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run"))
    assert done.returncode == 1
    assert done.stderr.startswith("fastdino-train: ")
    assert "Traceback" not in done.stderr
    done = run_command("demo", "--patch-size", "64")
    assert done.returncode != 0
    assert "lower --patch-size" in re.sub(r"[\s│]+", " ", done.stderr + done.stdout)


def test_metrics_are_json_with_a_line_a_logged_step(images: Path, tmp_path: Path) -> None:
    train.train(make_config(images, tmp_path, epochs=3, log_every=2))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]


def released(tmp_path: Path, images: Path, **flags: Any) -> Path:
    """A full checkpoint of official DINO with weights of its own."""
    torch.manual_seed(5)
    dino = DINO(make_config(images, tmp_path / "unused", **flags))
    for part in (dino.student, dino.teacher):
        for parameter in part.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    path = tmp_path / "released.pth"
    torch.save(
        {
            "student": {f"module.{k}": v for k, v in dino.student.state_dict().items()},
            "teacher": dino.teacher.state_dict(),
            "dino_loss": {"center": torch.randn(1, 96)},
        },
        path,
    )
    return path


def test_a_run_begins_with_released_weights_and_says_so(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture
) -> None:
    path = released(tmp_path, images)
    config = make_config(images, tmp_path / "run", init_from=str(path), lr=0.0, min_lr=0.0, epochs=1)
    train.train(config)  # without a learning rate nothing but the centre moves
    said = capsys.readouterr().out
    assert "full checkpoint, teacher and student" in said
    assert "with its head" in said
    given, found = torch.load(path), final_tensors(tmp_path / "run", 2)
    for name, tensor in given["student"].items():
        assert torch.equal(found[f"student.{name.removeprefix('module.')}"], tensor), name


def test_the_backbone_is_still_while_the_head_warms_up(tmp_path: Path, images: Path) -> None:
    path = released(tmp_path, images, out_dim=64)  # another number of prototypes: a new head
    flags: dict[str, Any] = {"init_from": str(path), "head_warmup_steps": 3, "save_every": 1, "keep": 9}
    config = make_config(images, tmp_path / "run", epochs=3, warmup_epochs=1, freeze_last_layer=0, **flags)
    train.train(config)
    given = torch.load(path)["student"]
    found = {step: final_tensors(tmp_path / "run", step) for step in range(1, 7)}

    def moved(a: dict[str, Tensor], b: dict[str, Tensor], part: str) -> set[bool]:
        names = [n for n in a if n.startswith(f"student.{part}") and not n.endswith("weight_g")]
        assert names
        return {not torch.equal(a[n], b[n]) for n in names}

    for step in (1, 2, 3):
        for name, tensor in given.items():
            if name.startswith("module.backbone."):
                assert torch.equal(found[step][f"student.{name.removeprefix('module.')}"], tensor), name
    for step in (2, 3):
        assert moved(found[step - 1], found[step], "head.") == {True}
    # the first step after it has learning rate 0, as the first of any warm-up
    assert moved(found[5], found[4], "backbone.") == {True}
    lrs = [m["lr"] for m in read_metrics(tmp_path / "run")]
    peak = config.optim.lr * 8 / 256
    assert lrs[:3] == pytest.approx([peak / 3, 2 * peak / 3, peak])
    assert lrs[3:5] == pytest.approx([0, peak])  # a warm-up of one epoch, two updates

    # Interrupted within, and without the file, which is needed no more, it goes on bit for bit.
    again = make_config(images, tmp_path / "again", epochs=3, warmup_epochs=1, freeze_last_layer=0, **flags)
    run_until(again, 2)
    path.unlink()
    train.train(again)
    end = final_tensors(tmp_path / "again", 6)
    assert all(torch.equal(end[name], tensor) for name, tensor in found[6].items())


# The loss is about ln 96 = 4.6 and falls by 0.3 in these ten updates; bf16 rounds each number to 0.4 %.
BAND = 0.01


def test_bf16_stays_within_a_hundredth_of_float32(tmp_path: Path, images: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        config = make_config(
            images, tmp_path / precision, precision=precision, drop_path_rate=0.2, teacher_temp=0.05, lr=0.1
        )
        train.train(config)
        losses[precision] = torch.tensor([m["loss"] for m in read_metrics(tmp_path / precision)])
        assert {t.dtype for t in final_tensors(tmp_path / precision, 10).values()} == {torch.float32}
    assert losses["fp32"][0] - losses["fp32"][-1] > 10 * BAND  # it learns: equal losses would say little
    assert not torch.equal(losses["fp32"], losses["bf16"])
    assert ((losses["bf16"] - losses["fp32"]).abs() / losses["fp32"]).max() < BAND


def test_a_run_compiles_at_its_start_and_never_again(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, dynamo: None
) -> None:
    """Schedules, stochastic depth, pieces, evaluations and last batches: no graph breaks, no new graph."""
    compile_block, seen = torch.nn.Module.compile, []
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **options: compile_block(self, **options, fullgraph=True, backend="eager"),
    )
    record = Monitor.record

    def count(self: Monitor, step: int, values: dict[str, Any]) -> None:
        seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        record(self, step, values)

    monkeypatch.setattr(Monitor, "record", count)
    flags: dict[str, Any] = {
        "drop_path_rate": 0.3,
        "accumulate": 2,
        "knn_every_epochs": 2,
        "warmup_teacher_temp_epochs": 3,
        "warmup_teacher_temp": 0.02,
    }
    for mode in ("off", "on"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        seen.clear()
        train.train(make_config(images, tmp_path / mode, compile=mode, **flags))
    # student: first block, middle ones, last; teacher: middle and last; evaluation has no graph of its own
    assert seen[1] == seen[-1] <= 6, seen
    assert not torch._dynamo.utils.counters["graph_break"]
    off, on = ([m["loss"] for m in read_metrics(tmp_path / mode)] for mode in ("off", "on"))
    assert on == off


needs_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("precision", [pytest.param(p, marks=needs_gpu) for p in ("fp32", "bf16", "fp16")])
def test_a_run_on_a_gpu_follows_the_one_on_a_cpu(tmp_path: Path, images: Path, precision: str) -> None:
    """Compiled, by the Triton kernels; stopped, and gone on with."""
    flags: dict[str, Any] = {"drop_path_rate": 0.2, "teacher_temp": 0.05, "lr": 0.1}
    train.train(make_config(images, tmp_path / "cpu", **flags))
    config = make_config(images, tmp_path / "gpu", device="cuda", compile="on", precision=precision, **flags)
    run_until(config, 5, update_type=ScaleOne)
    train.train(config, update_type=ScaleOne)
    cpu, gpu = (torch.tensor([m["loss"] for m in read_metrics(tmp_path / name)]) for name in ("cpu", "gpu"))
    assert len(gpu) == len(cpu) == 10
    assert ((gpu - cpu).abs() / cpu).max() < BAND


@pytest.mark.parametrize("optimizer", [pytest.param(o, marks=needs_gpu) for o in ("adamw", "sgd", "lars")])
def test_a_step_on_a_gpu_that_does_not_log_never_waits_for_it(
    tmp_path: Path, images: Path, optimizer: str
) -> None:
    from fastdino.ops import ema_triton

    counts = []
    for name, batch in (
        ("first", 8),
        ("two", 8),
        ("four", 4),
    ):  # tables made once are waited for in the first
        ema_triton._table.cache_clear()
        config = make_config(
            images,
            tmp_path / name,
            epochs=1,
            batch_size=batch,
            log_every=100,
            save_every=100,
            optimizer=optimizer,
            device="cuda",
            compile="off",
        )
        with CountSyncs("cuda") as syncs:
            train.train(config)
        counts.append(syncs.count)
    assert counts[1] == counts[2]
