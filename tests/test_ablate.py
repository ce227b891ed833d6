"""fastdino-ablate: what is planned, what is refused; a tiny ablation that is stopped, goes on and is kept."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastdino import ablate
from fastdino.ablate import Ablation, Job, Run, default_variants, execute
from fastdino.checkpoint import checkpoints
from fastdino.config import PRESETS, to_dict
from fastdino.data.samples import render_samples
from fastdino.monitor import read_metrics

TINY = (
    *(
        "--patch-size",
        "8",
        "--global-crops-size",
        "16",
        "--local-crops-size",
        "8",
        "--local-crops-number",
        "1",
    ),
    *("--batch-size", "16", "--out-dim", "32", "--head-hidden-dim", "32", "--bottleneck-dim", "16"),
    *("--precision", "fp32", "--log-every", "1"),
)


def plan(*flags: str, images: int = 2000, **fields: Any) -> tuple[dict[str, Any], list[Run]]:
    variants, runs = Ablation(**fields)._plan(flags, images)
    return {v.name: (v, run) for v, run in variants}, runs


@pytest.fixture(scope="module")
def defaults() -> tuple[dict[str, Any], list[Run]]:
    return plan()


def test_a_variant_that_is_the_base_is_not_run_again(defaults):
    variants, runs = defaults
    assert runs[0].name == "base"
    base = [name for name, (_, run) in variants.items() if run is runs[0]]
    assert base == [
        "momentum",
        "centring-and-sharpening",
        "4-local-crops",
        "teacher-temp-0.04",
        "centre-momentum-0.9",
        "prototypes-256",  # that --out-dim auto chooses for 2000 images
        "batch-64",
        "patch-4",
    ]
    assert variants["no-sharpening"][1] is variants["teacher-temp-0.1"][1]
    assert len({run.config for run in runs}) == len({run.name for run in runs}) == len(runs) == 19
    assert sum(run.seeds for run in runs) == 46


def test_the_default_list_asks_what_the_papers_ablations_ask(defaults):
    variants = {v.name: v for v in default_variants(defaults[1][0].config)}
    groups = list(dict.fromkeys(v.group for v in variants.values()))
    assert groups == [
        "teacher",
        "collapse",
        "multi-crop",
        "teacher-temp",
        "centre",
        "prototypes",
        "batch",
        "patch",
    ]
    says = {name: v.paper for name, v in variants.items() if v.paper}
    # Caron et al. 2021: figure 6; figure 7; tables 7 and 8; appendix D; figure 5
    assert says == {
        "momentum": "learns",
        "previous-epoch": "learns",
        "previous-iteration": "collapses",
        "student-copy": "collapses",
        "centring-and-sharpening": "learns",
        "no-centring": "collapses",
        "no-sharpening": "collapses",
        "no-local-crops": "worse",
        "no-local-crops-wide": "worse",
        "teacher-temp-0.02": "learns",
        "teacher-temp-0.04": "learns",
        "teacher-temp-0.1": "collapses",
        "centre-momentum-0": "learns",
        "centre-momentum-0.9": "learns",
        "centre-momentum-0.99": "learns",
        "centre-momentum-0.999": "collapses",
        "patch-2": "better",
        "patch-8": "worse",
    }
    method = {name: run.config.method for name, (_, run) in defaults[0].items()}
    assert method["student-copy"].teacher_update == "student_copy"
    assert method["no-centring"].center_momentum == 1
    sharp = method["no-sharpening"]
    assert sharp.teacher_temp == sharp.warmup_teacher_temp == sharp.student_temp


@pytest.mark.parametrize("preset", ["vit-small-16-boost", "resnet50"])
def test_other_presets_have_a_list_about_themselves(preset: str):
    variants, runs = plan(images=100_000, preset=preset)
    # each question has its base, at a value of its own or beside the list
    for group in {v.group for v, _ in variants.values()}:
        assert any(v.group == group and run is runs[0] for v, run in variants.values())
    assert ("patch" in {v.group for v, _ in variants.values()}) == (preset != "resnet50")


def test_a_base_without_local_crops_is_not_said_to_be_worse_than_itself():
    variants, runs = plan("--local-crops-number", "0")
    assert variants["no-local-crops"][1] is runs[0]
    assert (variants["no-local-crops"][0].paper, variants["no-local-crops-wide"][0].paper) == ("", "worse")


def test_own_variants_come_with_the_base_and_with_what_is_asked_for():
    variants, runs = plan(vary=("--lr 1e-3 --out-dim 64", "--center-momentum 0.9"), seeds=4)
    assert [*variants] == ["--lr 1e-3 --out-dim 64", "--center-momentum 0.9"]
    assert [(run.name, run.seeds) for run in runs] == [("base", 4), ("lr-1e-3-out-dim-64", 4)]
    assert runs[1].config.model.out_dim == 64
    variants, _ = plan(vary=("--lr 1e-3",), variants=("teacher-temp", "patch-8"))
    assert [*variants] == [
        *(f"teacher-temp-{t}" for t in (0.02, 0.04, 0.07, 0.1)),
        "base",  # of the patch sizes, whose own is not asked for; and of one's own variants
        "patch-8",
        "--lr 1e-3",
    ]


def test_a_batch_of_more_images_than_there_are_is_left_out(capsys: pytest.CaptureFixture[str]):
    variants, _ = plan(images=100, variants=("batch",))
    assert [*variants] == ["batch-16", "batch-64"]
    assert "left out: batch-128: --batch-size 128 is larger than the 100 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--variants", "teacher", "teachers"],
            r"--variants teachers: give all, groups \(teacher, collapse, ",
        ),
        (["--vary", "--momentum-teachr 0.9"], r"momentum-teachr"),
        (["--vary", "--center-momentum 2"], r"--center-momentum 2\.0: a momentum lies between 0 and 1"),
        (
            ["--vary", "--batch-size 4000"],
            r"--batch-size 4000: --batch-size 4000 is larger than the 2000 images",
        ),
        (["--vary", "--arch nothing"], r"nothing"),
        (["--vary", "--seed 3"], r"--seed cannot be given to the runs"),
        (["--", "--data", "elsewhere"], r"--data cannot be given to the runs"),
        (["--", "--epochz", "3"], r"epochz"),
        (["--val", "x"], r"--val x goes with images of your own: give --data too"),
        (["--data", "/nowhere"], r"/nowhere"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments, message
):
    monkeypatch.setattr(sys, "argv", ["fastdino-ablate", "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as stopped:
        ablate.main()
    said = " ".join(f"{stopped.value.code} {capsys.readouterr().err}".split())
    assert stopped.value.code != 0
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def job(folder: Path, *codes: str) -> Job:
    return Job(Run("x", (), PRESETS["demo"][1]), 0, folder, [python(code) for code in codes])


MEET = """
import sys, time, pathlib
mine, other = (pathlib.Path({folder!r}, name) for name in {names!r})
mine.touch()
while not other.exists():
    time.sleep(0.01)
"""


def test_jobs_run_together_and_a_failing_one_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # what is set already holds
    ended: dict[str, int] = {}
    left: list[float] = []
    jobs = [
        job(tmp_path / "first", MEET.format(folder=str(tmp_path), names=["a", "b"]), "print(7)"),
        job(tmp_path / "second", MEET.format(folder=str(tmp_path), names=["b", "a"])),
        job(tmp_path / "third", "raise SystemExit('no')", "print('never')"),
        job(tmp_path / "fourth", "import os; print(os.environ['OMP_NUM_THREADS'])"),
    ]

    def note(job: Job, code: int, seconds: float) -> None:
        ended[job.folder.name] = code
        left.append(seconds)

    execute(jobs, 2, 3, note)
    assert ended == {"first": 0, "second": 0, "third": 1, "fourth": 0}
    assert left[-1] == 0 < left[0]
    logs = {path.stem: path.read_text().splitlines() for path in tmp_path.glob("*.log")}
    assert [logs[name][-1] for name in ("first", "third", "fourth")] == ["7", "no", "3"]


def test_a_job_that_is_told_to_go_stops_all(tmp_path: Path):
    jobs = [job(tmp_path / "a", "import time; time.sleep(60)"), job(tmp_path / "b", "raise SystemExit(75)")]
    with pytest.raises(KeyboardInterrupt):
        execute(jobs, 2, 1, lambda *_: None)
    assert jobs[0].process is not None
    assert jobs[0].process.returncode == -signal.SIGTERM


def test_told_to_go_while_a_job_starts_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Slow(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # the interpreter answers the signal here

    started: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(subprocess, "Popen", Slow)
    with pytest.raises(KeyboardInterrupt):
        execute([job(tmp_path / "a", "import time; time.sleep(60)")], 1, 1, lambda *_: None)
    assert [process.poll() for process in started] == [-signal.SIGTERM]


def test_a_failing_variant_is_reported_and_tried_again_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    """With commands that write what a run would."""
    line = {"step": 9, "epoch": 0, "images_per_s": 5.0, "skipped": 0, "loss": 1.0, "teacher_entropy": 2.0}
    tried: list[str] = []

    def commands(self: Ablation, run: Run, seed: int, folder: Path, *_: Any) -> list[list[str]]:
        tried.append(run.at(seed))
        if run.name == "arch-vit_tiny":
            return [python("raise SystemExit('fastdino-train: [no] such thing\\nand more')")]
        folder.mkdir(exist_ok=True)
        if run.name == "lr-9":
            return [python("raise SystemExit('fastdino-train: 20 non-finite steps in a row')")]
        (folder / "config.json").write_text(json.dumps(to_dict(run.config)))
        (folder / "metrics.jsonl").write_text(json.dumps(line | {"knn_20": 60.0 + seed}) + "\n")
        knn = {"untrained network": {"20": 40.0 + seed}, "raw pixels": {"20": 30.0}}
        (folder / "knn.json").write_text(json.dumps(knn))
        return [python("")]

    monkeypatch.setattr(Ablation, "_commands", commands)
    out = tmp_path / "out"
    ablation = Ablation(
        out=str(out), samples=64, seeds=2, variants=("momentum",), vary=("--arch vit_tiny", "--lr 9")
    )
    assert ablation.run(["--batch-size", "8"]) == 1
    said = capsys.readouterr().out
    assert "arch-vit_tiny-seed1: fastdino-train: [no] such thing" in said
    assert "lr-9-seed0: diverged" in said
    assert (
        "- as in the paper: momentum learns (figure 6); here learns: k-NN +20.0 to untrained, spread 1.0"
        in said
    )
    names = [f"{name}-seed{seed}" for seed in (0, 1) for name in ("base", "arch-vit_tiny", "lr-9")]
    assert tried == names
    runs = json.loads((out / "ablation.json").read_text())["runs"]
    assert [runs[name]["state"] for name in names] == ["trained", "failed", "diverged"] * 2
    table = (out / "ablation.md").read_text()
    assert "failed fastdino-train: [no] such thing (2 of 2)" in table
    assert "diverged (2 of 2)" in table
    assert "| momentum (base) | 60.5 ± 0.7 |  | 40.5 ± 0.7 |" in table
    assert (out / "samples" / "val").is_dir()

    tried.clear()
    assert ablation.run(["--batch-size", "8"]) == 1
    assert tried == ["arch-vit_tiny-seed0", "arch-vit_tiny-seed1"]
    assert re.search(r"\n5 of 6: arch.*\n6 of 6: arch", capsys.readouterr().out)


def test_a_stopped_ablation_goes_on_and_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    render_samples(tmp_path / "s", train=64, val=16)
    out = tmp_path / "out"
    ours = ["fastdino-ablate", "demo", "--out", str(out), "--data", f"{tmp_path}/s/train"]
    ours += ["--val", f"{tmp_path}/s/val", "--epochs", "1", "--seeds", "2", "--jobs", "1"]
    ours += ["--variants", "student-copy", "--", *TINY]
    command = [sys.executable, "-m", "fastdino.ablate", *ours[1:]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "4 runs of 2 configurations; 1 at a time\n"
        assert re.match(r"1 of 4: base-seed0: trained in \d+ s, k-NN .* %; about ", process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "fastdino-ablate: stopped; the same command goes on\n")
    before = json.loads((out / "ablation.json").read_text())
    assert [*before["runs"]] == ["base-seed0"]

    monkeypatch.setattr(sys, "argv", ours)
    with pytest.raises(SystemExit) as ended:
        ablate.main()
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert said.startswith("4 runs of 2 configurations, 1 of them there already; 1 at a time\n2 of 4: ")
    state = json.loads((out / "ablation.json").read_text())
    runs = state["runs"]
    assert runs["base-seed0"] == before["runs"]["base-seed0"]
    names = [f"{name}-seed{seed}" for seed in (0, 1) for name in ("base", "teacher-update-student_copy")]
    assert {name: run["state"] for name, run in runs.items()} == dict.fromkeys(names, "trained")
    for name in names:
        last = read_metrics(out / "runs" / name)[-1]
        assert (last["step"], last["knn_20"], last["loss"]) == (4, runs[name]["knn"], runs[name]["loss"])
        assert [*checkpoints(out / "runs" / name)] == [4]
        at_end = ["the teacher equals the student"] if "copy" in name else []
        assert runs[name]["at_end"] == at_end
    assert len({run["loss"] for run in runs.values()}) == 4
    # The network before training is looked at once for a seed.
    assert [(out / "runs" / name / "knn.json").exists() for name in names] == [True, False] * 2
    knn = [json.loads((out / "runs" / f"base-seed{i}" / "knn.json").read_text()) for i in (0, 1)]
    its = {str(i): knn[i]["untrained network"]["20"] for i in (0, 1)}
    assert state["untrained"] == {"vit_nano 8 0 0.0 16": its}
    assert [figures["teacher"]["20"] for figures in knn] == [runs[f"base-seed{i}"]["knn"] for i in (0, 1)]
    table = (out / "ablation.md").read_text()
    assert re.search(r"\| base \| [\d.]+ ± [\d.]+ \|  \| [\d.]+ ± [\d.]+ \|", table)
    assert re.search(
        r"\| student-copy \| .* \| the teacher equals the student \(2 of 2\) \| collapses", table
    )
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")

    # Again: nothing is trained, and the table is the same.
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(SystemExit) as ended:
        ablate.main()
    said = "4 runs of 2 configurations, 4 of them there already; 1 at a time"
    assert (ended.value.code, capsys.readouterr().out.splitlines()[0]) == (0, said)
    assert (out / "ablation.md").read_text() == table
    assert json.loads((out / "ablation.json").read_text()) == state

    # Other settings are another ablation.
    monkeypatch.setattr(sys, "argv", [*ours, "--lr", "0.1"])
    with pytest.raises(SystemExit) as ended:
        ablate.main()
    message = r"holds another ablation \(flags: was .*, now .*--lr 0\.1\): give another --out"
    assert re.search(message, str(ended.value.code))
    assert (out / "ablation.md").read_text() == table


def test_the_list_is_printed_and_nothing_done(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fastdino-ablate", "--list"])
    with pytest.raises(SystemExit) as ended:
        ablate.main()
    lines = capsys.readouterr().out.splitlines()
    assert (ended.value.code, len(lines), [*tmp_path.iterdir()]) == (0, 27, [])
    assert re.match(
        r"teacher +student-copy +3 seeds +collapses \(figure 6\) +--teacher-update student_copy$", lines[3]
    )
