"""What a run leaves to look at: metrics.jsonl, TensorBoard, W&B, the progress on a terminal, curves.png."""

import json
import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastdino import monitor
from fastdino.monitor import Monitor, plot_curves, read_metrics

VALUES = {"loss": 5.25, "lr": 1e-3, "images_per_s": 64.0, "data_wait": 0.125, "batch_size": 32}


def scalars(out: Path) -> dict[str, dict[int, float]]:
    """Step and value of each curve that TensorBoard would show."""
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_each_record_is_a_line_and_a_point(tmp_path: Path):
    with Monitor(tmp_path, 0, 20, {}) as m:
        m.record(10, {"loss": 1.5, "epoch": 0, "names": ["a.png"]})
        assert lines(tmp_path) == [{"step": 10, "loss": 1.5, "epoch": 0, "names": ["a.png"]}]  # at once
        m.record(20, {"loss": 1.25, "epoch": 1})
    assert read_metrics(tmp_path) == lines(tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20]
    assert scalars(tmp_path) == {"loss": {10: 1.5, 20: 1.25}, "epoch": {10: 0.0, 20: 1.0}}


def test_what_is_not_finite_is_null_and_every_line_strict_json(tmp_path: Path):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    with Monitor(tmp_path, 0, 20, {}) as m:
        m.record(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.5, "epoch": 0})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.5, "epoch": 0}


def test_a_continued_run_drops_the_lines_and_points_after_its_start(tmp_path: Path):
    with Monitor(tmp_path, 0, 40, {}) as m:
        for step in (10, 20, 30, 33):
            m.record(step, {"loss": float(step)})
    with Monitor(tmp_path, 20, 40, {}) as m:  # killed after the checkpoint of step 20
        assert [line["step"] for line in lines(tmp_path)] == [10, 20]
        m.record(30, {"loss": -30.0})
    assert lines(tmp_path) == [
        {"step": 10, "loss": 10.0},
        {"step": 20, "loss": 20.0},
        {"step": 30, "loss": -30.0},
    ]
    assert scalars(tmp_path) == {"loss": {10: 10.0, 20: 20.0, 30: -30.0}}


def test_a_run_begun_again_before_its_first_checkpoint_drops_all(tmp_path: Path):
    with Monitor(tmp_path, 0, 40, {}) as m:
        m.record(10, {"loss": 1.0})
    with Monitor(tmp_path, 0, 40, {}) as m:
        m.record(10, {"loss": 2.0})
    assert lines(tmp_path) == [{"step": 10, "loss": 2.0}]
    assert scalars(tmp_path) == {"loss": {10: 2.0}}


@pytest.mark.parametrize("torn", ['{"step": 30, "lo', "{", '{"step": 30, "loss": 1.0', "\0\0\0\0"])
def test_a_torn_last_line_is_survived(tmp_path: Path, torn: str):
    whole = '{"step": 10, "loss": 1.0}\n{"step": 20, "loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + torn)
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20]
    with Monitor(tmp_path, 20, 40, {}) as m:
        m.record(30, {"loss": 3.0})
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30]
    plot_curves(tmp_path, 1.0)


def test_no_metrics_yet_is_an_empty_list(tmp_path: Path):
    assert read_metrics(tmp_path) == []


def test_wandb_is_imported_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    with Monitor(tmp_path, 0, 20, {}) as m:
        m.record(10, {"loss": 1.0})
    with pytest.raises(
        ValueError, match=r"--wandb cats needs Weights & Biases: pip install 'fastdino\[wandb\]'"
    ):
        Monitor(tmp_path, 0, 20, {}, wandb="cats")
    assert [line["step"] for line in lines(tmp_path)] == [10]  # nothing was cut before the error


def test_wandb_gets_the_numbers_and_keeps_its_page_when_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[tuple[str, Any]] = []

    def init(**arguments: Any) -> Any:
        calls.append(("init", arguments))
        return types.SimpleNamespace(
            log=lambda values, step: calls.append(("log", (step, values))),
            finish=lambda exit_code: calls.append(("finish", exit_code)),
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with Monitor(tmp_path, 0, 20, {"seed": 1}, wandb="cats") as m:
        m.record(10, {"loss": 1.0, "images": ["a"]})
    with pytest.raises(KeyError), Monitor(tmp_path, 10, 20, {"seed": 1}, wandb="cats"):
        raise KeyError
    (_, first), log, finish, (_, second), failed = calls
    assert first["project"] == "cats"
    assert first["config"] == {"seed": 1}
    assert first["resume"] == "allow"
    assert first["id"] == second["id"] != ""
    assert log == ("log", (10, {"loss": 1.0}))
    assert (finish, failed) == (("finish", 0), ("finish", 1))


def test_without_a_terminal_progress_is_plain_lines_now_and_then(tmp_path: Path, monkeypatch, capsys):
    clock = [1.0]  # seconds since the machine started: the first line must not wait for the fifteenth
    monkeypatch.setattr(monitor.time, "monotonic", lambda: clock[0])
    with Monitor(tmp_path, 0, 1000, {}) as m:
        m.say(
            "[bold] is not markup, and neither is a path of a hundred and more characters broken " + "x" * 60
        )
        for step, seconds in ((10, 1.0), (20, 9.0), (30, 17.0), (1000, 18.0)):
            clock[0] = seconds
            m.progress(step, VALUES)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    assert out.splitlines() == [
        "[bold] is not markup, and neither is a path of a hundred and more characters broken " + "x" * 60,
        # 990 steps of 32 images at 64 images/s are 495 s
        "step 10/1000 loss 5.250 lr 1.0e-03 64 img/s, waiting for data 12%, 8:15 left",
        "step 30/1000 loss 5.250 lr 1.0e-03 64 img/s, waiting for data 12%, 8:05 left",
        "step 1000/1000 loss 5.250 lr 1.0e-03 64 img/s, waiting for data 12%, 0:00 left",
    ]


def test_a_terminal_of_80_columns_shows_all_that_is_asked(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with Monitor(tmp_path, 100_000, 250_200, {}) as m:
        for step in (101_000, 102_000):
            m.progress(step, VALUES | {"loss": 10.25, "images_per_s": 1264.0})
    out = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    last = out.replace("\r", "\n").strip().splitlines()[-1]
    shown = r"102000/250200 \S{3,} loss 10.250 lr 1.0e-03 1264 img/s wait 12% +\d+:\d\d:\d\d +left"
    assert re.fullmatch(shown, last), last
    assert len(last) <= 80


def test_curves_show_the_numbers_of_the_run(tmp_path: Path, drawn, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it raises
    numbers = {"grad_norm": 2.0, "lr": 0.1, "momentum": 0.99, "images_per_s": 50.0}
    with Monitor(tmp_path, 0, 30, {}) as m:
        m.record(10, {"loss": 6.0, "teacher_entropy": 4.5, "kl": 1.5, **numbers})
        m.record(15, {"nonfinite": "loss is nan", "lr": 0.1, "images": ["a.png"]})
        m.record(20, {"loss": math.nan, **numbers, "knn_10": 1.0, "knn_20": 40.0})
        m.record(30, {"loss": 5.0, **numbers, "knn_10": 2.0, "knn_20": 60.0})
    path = plot_curves(tmp_path, math.log(512))
    assert path == tmp_path / "curves.png"
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
    points = {axis.get_title(): [line.get_xydata().tolist() for line in axis.lines] for axis in drawn[0].axes}
    loss, entropy, divergence, uniform = points["loss and its parts"]
    assert (entropy, divergence) == ([[10, 4.5]], [[10, 1.5]])
    assert loss == [[10, 6.0], [30, 5.0]]
    assert [y for _, y in uniform] == [pytest.approx(math.log(512))] * 2
    assert points["k-NN accuracy of the teacher (%)"] == [[[20, 40.0], [30, 60.0]]]
    assert points["gradient norm before clipping"] == [[[10, 2.0], [20, 2.0], [30, 2.0]]]
    assert points["learning rate"] == [[[10, 0.1], [15, 0.1], [20, 0.1], [30, 0.1]]]
    assert points["teacher momentum"] == [[[10, 0.99], [20, 0.99], [30, 0.99]]]
    assert points["images per second"] == [[[10, 50.0], [20, 50.0], [30, 50.0]]]


def test_curves_of_a_run_without_a_logged_step_or_k_nn(tmp_path: Path, drawn):
    with Image.open(plot_curves(tmp_path, 1.0)) as image:
        image.load()
    texts = [text.get_text() for axis in drawn[0].axes for text in axis.texts]
    assert "not evaluated" in texts
