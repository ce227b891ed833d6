"""A run that is continued: otherwise than before, as what it prints advises, and from a stranger's folder."""

import dataclasses
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import with_nan_losses
from tiny import final_tensors, make_config, make_images

from fastdino import checkpoint, train
from fastdino.config import Config, from_dict
from fastdino.export import Export, export
from fastdino.monitor import read_metrics


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nineteen images: two updates of 8 an epoch, three left over."""
    return make_images(tmp_path_factory.mktemp("images"), 19)


@pytest.fixture(autouse=True, scope="module")
def _undrawn() -> Iterator[None]:
    """No curves and maps at the end of each run, which take longer than the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw", lambda *arguments: None)
        yield


FLAGS: dict[str, Any] = {"epochs": 2, "save_every": 1, "keep": 3}


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four updates, with the checkpoints of the last three."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train.train(make_config(images, out, **FLAGS))
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that was stopped after its third update."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints" / "step_4")
    return out


def go_on(images: Path, out: Path, **flags: Any) -> dict[str, Any]:
    return train.train(make_config(images, out, **(FLAGS | flags)))


def refusal(images: Path, out: Path, **flags: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared
        go_on(images, out, **flags)
    return str(error.value)


def kept(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "changes.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("how", "flags"),
    [
        ("extend", {"epochs": 3}),
        ("change", {"epochs": 3, "lr": 0.01}),
        ("change", {"lr": 0.01}),
        ("change", {"batch_size": 4}),
        ("change", {"drop_path_rate": 0.3, "teacher_temp": 0.05, "local_crops_number": 2}),
        ("change", {"centering": "sinkhorn", "clip_grad": 0.0, "seed": 3}),
        ("change", {"warmup_epochs": 0, "freeze_last_layer": 0, "momentum_teacher": 0.9}),
        ("change", {"init_from": "/other/weights.pth"}),
    ],
)
def test_a_run_goes_on_otherwise_as_the_refusal_advises(
    how: str, flags: dict[str, Any], images: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    told = refusal(images, run, **flags)
    for name, value in flags.items():
        assert f"--{name.replace('_', '-')}: was " in told
        assert f", now {value!r}" in told
    assert f"Give the flags of that run to continue it, add --{how} to continue it with these, or" in told
    assert {path: path.read_bytes() for path in before} == before  # a refusal changes nothing
    if how == "change" and flags != {"epochs": 3}:
        assert "add --change" in refusal(images, run, **flags, extend=True)
    capsys.readouterr()
    last = go_on(images, run, **flags, **{how: True})
    said = capsys.readouterr().out
    assert "is continued: step 3 of" in said
    assert "no single command makes this run any more: " in said
    assert last["step"] > 3
    found = {line["flag"]: (line["was"], line["now"], line["step"]) for line in kept(run)}
    assert {flag: values[1:] for flag, values in found.items()} == {
        f"--{name.replace('_', '-')}": (value, 3) for name, value in flags.items()
    }
    assert set(kept(run)[0]["versions"]) == {"fastdino", "torch"}
    # From now on that is the run: without the word, and in the file of the teacher.
    go_on(images, run, **flags)
    assert len(kept(run)) == len(flags)
    config = make_config(images, run, **(FLAGS | flags))
    assert checkpoint.read_teacher(run)[1] == config
    assert from_dict(Config, json.loads((run / "config.json").read_text())) == config


def test_the_words_alone_change_nothing(finished: Path, images: Path, run: Path) -> None:
    go_on(images, run, extend=True, change=True)
    assert not (run / "changes.jsonl").exists()
    ours, theirs = final_tensors(run, 4), final_tensors(finished, 4)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_finished_run_is_extended_and_the_jump_of_its_learning_rate_is_said(
    finished: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, out := tmp_path / "run")
    assert "add --extend" in refusal(images, out, epochs=4)
    assert go_on(images, out, epochs=4, extend=True)["step"] == 8
    rates = [line["lr"] for line in read_metrics(out)]
    said = capsys.readouterr().out
    assert f"the learning rate goes from {rates[3]:.3g} to {rates[4]:.3g} at step 5, since schedules" in said
    assert "it goes on in epoch 3 of 4" in said
    assert max(checkpoint.checkpoints(out)) == 8


def test_a_warm_up_that_auto_chose_stays_when_the_run_is_extended(images: Path, tmp_path: Path) -> None:
    """For more epochs `auto` would choose another one, which --extend does not allow."""
    out, auto = tmp_path / "run", {"warmup_epochs": "auto", "warmup_teacher_temp_epochs": "auto"}
    go_on(images, out, **auto)
    chosen = from_dict(Config, json.loads((out / "config.json").read_text()))
    assert (chosen.optim.warmup_epochs, chosen.method.warmup_teacher_temp_epochs) == (0.2, 1)
    assert go_on(images, out, epochs=10, extend=True, **auto)["step"] == 20
    now = from_dict(Config, json.loads((out / "config.json").read_text()))
    assert (now.optim.warmup_epochs, now.method.warmup_teacher_temp_epochs) == (0.2, 1)


def test_fewer_epochs_than_done_are_refused_with_how_many_it_takes(images: Path, run: Path) -> None:
    told = refusal(images, run, epochs=1, extend=True)
    assert told.startswith(
        f"{run} is at step 3, and --epochs 1 are 2 steps: give --epochs 2 or more with --extend"
    )
    assert go_on(images, run, epochs=2, extend=True)["step"] == 4


@pytest.mark.parametrize(
    "flags",
    [
        {"out_dim": 64},
        {"arch": "vit_tiny"},
        {"patch_size": 8},
        {"num_register_tokens": 2},
        {"layer_scale": 0.1},
        {"head_layers": 2},
        {"head_hidden_dim": 16},
        {"bottleneck_dim": 8},
        {"use_bn_in_head": True},
        {"optimizer": "sgd"},
        {"norm_last_layer": False},
        {"global_crops_size": 32},
    ],
)
def test_other_shapes_are_refused_by_what_does_not_fit(
    flags: dict[str, Any], images: Path, run: Path
) -> None:
    told = refusal(images, run, **flags, change=True)
    assert "Its tensors have other shapes, which nothing can change: " in told
    assert "--change" not in told
    assert told == refusal(images, run, **flags)
    assert go_on(images, run)["step"] == 4  # as it advises


def test_other_images_are_refused_and_gone_on_with_by_change(
    images: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = tmp_path / "images"
    shutil.copytree(images, fewer)
    (fewer / "03.png").unlink()
    told = refusal(fewer, run)
    assert "Restore the images, add --change to go on with these, or give another --out" in told
    assert refusal(fewer, run, extend=True) == told
    capsys.readouterr()
    assert go_on(fewer, run, change=True)["step"] == 4
    assert "images: others than before" in capsys.readouterr().out
    assert [line["flag"] for line in kept(run)] == ["images"]
    assert go_on(fewer, run)["step"] == 4


def test_a_change_that_is_killed_before_its_first_checkpoint_is_kept(
    images: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = tmp_path / "images"
    shutil.copytree(images, fewer)
    (fewer / "03.png").unlink()

    def die(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "make_loader", die)
        with pytest.raises(KeyboardInterrupt):
            go_on(fewer, run, lr=0.01, precision="bf16", change=True)
    assert go_on(fewer, run, lr=0.01, precision="bf16")["step"] == 4
    assert {line["flag"] for line in kept(run)} == {"--lr", "--precision", "images"}


def test_precision_is_compared_by_what_it_comes_to(images: Path, run: Path) -> None:
    told = refusal(images, run, precision="bf16")
    assert "was trained in torch.float32, not torch.bfloat16: give --precision fp32 to go on so, add " in told
    again = run.with_name("again")
    shutil.copytree(run, again)
    assert go_on(images, run, precision="fp32")["step"] == 4
    assert go_on(images, again, precision="bf16", change=True)["step"] == 4
    config = json.loads((run / "config.json").read_text())
    config["run"]["precision"] = "auto"  # it was begun so, on a machine where that is fp32
    (run / "config.json").write_text(json.dumps(config))
    assert go_on(images, run, precision="fp32")["step"] == 4


def test_fp16_is_left_and_entered(images: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = {"global_crops_size": 8, "local_crops_number": 0}
    go_on(images, tmp_path, **small, epochs=1, precision="fp16")
    go_on(images, tmp_path, **small, epochs=2, precision="fp32", change=True)
    assert go_on(images, tmp_path, **small, epochs=3, precision="fp16", change=True)["step"] == 6


def test_numbers_left_open_stay_those_of_the_run(images: Path, tmp_path: Path) -> None:
    auto: dict[str, Any] = {"momentum_teacher": "auto", "lr": "auto", "out_dim": "auto"}
    go_on(images, tmp_path, **auto)
    stored = json.loads((tmp_path / "config.json").read_text())
    more = make_images(tmp_path.with_name("more"), 3000)
    assert "--epochs: was 2, now 3\n" in refusal(more, tmp_path, **auto, epochs=3)
    config = make_config(more, tmp_path, **FLAGS, **auto, change=True)
    assert train.with_numbers_of_run(config).model.out_dim == stored["model"]["out_dim"] == 256
    go_on(images, tmp_path, **auto, epochs=3, extend=True)
    assert [line["flag"] for line in kept(tmp_path)] == ["--epochs"]


def test_weights_by_another_path_and_what_is_kept_need_no_word(
    images: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((run / "config.json").read_text())
    monkeypatch.chdir(run.parent)
    for was, now in [
        ("w/a.pth", str(run.parent / "w/a.pth")),
        ("../x/w/a.pth", "w/a.pth"),
        ("/w/a.pth", "a.pth"),
    ]:
        config["model"]["init_from"] = was
        (run / "config.json").write_text(json.dumps(config))
        assert checkpoint.changes(run, make_config(images, run, **FLAGS, init_from=now)) == {}
    assert checkpoint.changes(run, make_config(images, run, **FLAGS, init_from="b.pth"))
    assert checkpoint.changes(run, make_config(images, run, **FLAGS))
    assert go_on(images, run, init_from="a.pth", keep_every_epochs=1)["step"] == 4


def test_after_non_finite_updates_its_advice_is_followed(images: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"epochs": 3, "max_nonfinite": 2, "save_every": 2}
    config = make_config(images, tmp_path, **flags)
    with pytest.raises(
        train.RunError, match=r"Lower --lr, or use --precision bf16 or fp32; either with --change"
    ):
        train.train(config, update_type=with_nan_losses(3, 4))
    shutil.copytree(tmp_path, again := tmp_path.with_name("again"))
    assert train.train(make_config(images, tmp_path, **flags, lr=0.01, change=True))["step"] == 6
    assert train.train(make_config(images, again, **flags, precision="bf16", change=True))["step"] == 6


def test_after_unreadable_files_its_advice_is_followed(images: Path, tmp_path: Path) -> None:
    broken = tmp_path / "images"
    shutil.copytree(images, broken)
    content = (broken / "05.png").read_bytes()
    flags: dict[str, Any] = {"epochs": 4, "save_every": 1, "max_unreadable": 0.0}
    make = {name: make_config(broken, tmp_path / name, **flags) for name in ("repaired", "removed", "raised")}
    for config in make.values():
        (broken / "05.png").write_bytes(content)
        train.train(dataclasses.replace(config, optim=dataclasses.replace(config.optim, epochs=2)))
        (broken / "05.png").write_bytes(b"nonsense")
        with pytest.raises(
            train.RunError, match="Repair them, remove them and go on with --change, or raise it"
        ):
            train.train(make_config(broken, Path(config.run.out), **flags, extend=True))
    raised = {**flags, "max_unreadable": 0.5}
    assert train.train(make_config(broken, tmp_path / "raised", **raised))["step"] == 8
    (broken / "05.png").write_bytes(content)
    assert train.train(make["repaired"])["step"] == 8
    (broken / "05.png").unlink()
    assert train.train(make_config(broken, tmp_path / "removed", **flags, change=True))["step"] == 8


class Payload:
    """Makes a folder where it is executed."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


FILES = (
    *("checkpoints/step_3/.metadata", "checkpoints/step_3/__0_0.distcp", "checkpoints/step_3/info.json"),
    *(
        "checkpoints/step_3/__0.metadata",
        "config.json",
        "metrics.jsonl",
        "wandb_id",
        ".lock",
        "changes.jsonl",
    ),
    *("teacher.safetensors", "curves.png", "checkpoints/step_9"),
)


@pytest.mark.parametrize("name", FILES)
def test_no_file_of_a_strangers_run_executes_anything(
    name: str, images: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "executed"
    (run / name).write_bytes(pickle.dumps(Payload(marker)))
    if name.startswith("checkpoints/step_3/"):  # without digests, so that it is opened
        info = run / "checkpoints/step_3/info.json"
        if name != "checkpoints/step_3/info.json":
            info.write_text(
                json.dumps({k: v for k, v in json.loads(info.read_text()).items() if k != "digests"})
            )
    for to in ("official", "torch"):
        with suppress(ValueError):
            export(Export(weights=str(run), to=to))  # type: ignore[arg-type]
    if name == "config.json":
        assert str(run / name) in refusal(images, run)
    else:
        assert go_on(images, run)["step"] == 4
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    assert not marker.exists()


def mutated(value: Any, rng: random.Random) -> Any:
    """JSON with one of its values replaced by something odd."""
    odd = [
        None,
        True,
        -1,
        0,
        10**30,
        1e300,
        float("nan"),
        float("inf"),
        "",
        "x\0",
        [],
        {},
        [[]],
        {"a": 1},
        "auto",
    ]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        return {**value, key: mutated(value[key], rng)}
    return rng.choice(odd)


def test_no_config_is_more_than_a_sentence(images: Path, run: Path) -> None:
    rng, path = random.Random(0), run / "config.json"
    config = make_config(images, run, **FLAGS)
    content = json.loads(path.read_text())
    refused = 0
    for _ in range(500):
        path.write_text(json.dumps(mutated(content, rng)))
        try:
            checkpoint.claim(run, config).close()
        except ValueError as error:
            refused += 1
            told = str(error)
            assert told.startswith(
                (f"{path} cannot be read: ", f"{run} holds a run of another configuration")
            )
    assert refused > 300


@pytest.mark.parametrize(
    "change",
    [
        {"images": None},
        {"images": 3},
        {"precision": "torch.int8"},
        {"precision": []},
        {"scaler": None},
        {"scaler": {"scale": 1}},
        {"skipped": -1},
        {"skipped": "many"},
        {"skipped": 10**30},
        {"unreadable": []},
        {"unreadable": {"run": [], "epoch": [3]}},
        {"unreadable": {"run": None, "epoch": []}},
        {"checkpoint": 2},
        None,
        [],
    ],
)
def test_a_checkpoint_with_another_state_gives_way_to_the_one_before(
    change: Any, images: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoints" / "step_3" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change if isinstance(change, dict) else change))
    assert go_on(images, run)["step"] == 4
    said = capsys.readouterr().out
    assert f"{path.parent} cannot be read: " in said
    assert "is continued: step 2 of 4" in said


def test_no_metrics_are_more_than_left_out(finished: Path, images: Path, run: Path) -> None:
    rng, path = random.Random(0), run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    bad = [json.dumps(mutated(rng.choice(lines), rng)) for _ in range(300)]
    path.write_text(
        "\n".join([*bad, "[" * 10**5, "9" * 10**4, "null", "", '{"step": 1', *map(json.dumps, lines)])
    )
    with open(path, "ab") as file:
        file.write(b"\n\xff\xfe\n" + pickle.dumps(Payload(run / "executed")))
    assert go_on(images, run)["step"] == 4
    steps = [line["step"] for line in read_metrics(run)]
    assert set(range(1, 5)) <= set(steps)
    assert all(type(step) is int for step in steps)


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: (folder / "step_٣").mkdir(),
        lambda folder: (folder / "step_²").mkdir(),
        lambda folder: (folder / "step_-1").mkdir(),
        lambda folder: (folder / "step_007").mkdir(),
        lambda folder: (folder / ("step_" + "9" * 40)).mkdir(),
        lambda folder: (folder / "step_5").write_text("a file"),
        lambda folder: (folder / "step_5").symlink_to("nowhere"),
    ],
)
def test_what_only_looks_like_a_checkpoint_is_left_alone(
    make: Callable[[Path], Any], images: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set((run / "checkpoints").iterdir())
    make(run / "checkpoints")
    (added,) = set((run / "checkpoints").iterdir()) - before
    assert go_on(images, run)["step"] == 4
    assert "cannot be read" not in capsys.readouterr().out
    assert added.is_symlink() or added.exists()


def test_a_checkpoint_beyond_the_run_is_refused_or_passed_over(
    images: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "checkpoints" / "step_3", run / "checkpoints" / "step_99")
    assert go_on(images, run)["step"] == 4
    assert "step_99 cannot be read: it is checkpoint 3 under another name" in capsys.readouterr().out


def test_what_a_killed_process_left_is_gone_at_the_next_start(images: Path, run: Path) -> None:
    from fastdino.files import _machine

    left = [
        run / f".{name}.{_machine()}@{10**7}.tmp" for name in ("teacher.safetensors", "curves.png", "x.pth")
    ]
    for path in left:
        path.touch()
    (run / "checkpoints" / ".step_3.tmp").mkdir()
    config = make_config(images, run, **FLAGS)
    checkpoint.claim(run, config).close()
    assert list(run.rglob(".*.tmp")) == []
