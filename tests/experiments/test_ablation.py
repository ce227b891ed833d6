"""The ablation study: what is planned, what is refused; a tiny study that is stopped, goes on and is kept."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.ablation import arguments, execute, plan
from experiments.judge import Variant
from fastdino.checkpoint import checkpoints
from fastdino.data.samples import render_samples
from fastdino.monitor import read_metrics

TINY = "--patch-size 8 --global-crops-size 16 --local-crops-size 8 --local-crops-number 1 --batch-size 16"
TINY += " --out-dim 32 --head-hidden-dim 32 --bottleneck-dim 16 --precision fp32 --log-every 1 --epochs 1"


def planned(*argv: str, images: int = 2000) -> list[Variant]:
    return plan(*arguments(["--data", "x", *argv]), images)


@pytest.fixture(scope="module")
def defaults() -> list[Variant]:
    return planned()


def test_a_variant_that_is_the_base_is_not_run_again(defaults: list[Variant]) -> None:
    assert [v.name for v in defaults if not v.flags] == [
        *("base", "momentum", "centring-and-sharpening", "4-local-crops", "teacher-temp-0.04"),
        "centre-momentum-0.9",
        "prototypes-256",  # that --out-dim auto chooses for 2000 images
        *("batch-64", "patch-4"),
    ]
    seeds = {v.flags: max(w.seeds for w in defaults if w.flags == v.flags) for v in defaults}
    assert (len(seeds), sum(seeds.values())) == (19, 46)


def test_the_default_list_asks_what_the_papers_ablations_ask(defaults: list[Variant]) -> None:
    # Caron et al. 2021: figure 6; figure 7; tables 7 and 8; appendix D; figure 5
    assert {v.name: v.paper for v in defaults if v.paper} == {
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


def test_other_presets_and_sets_of_images_have_a_list_about_themselves() -> None:
    assert not [v for v in planned("resnet50", images=100_000) if v.group == "patch"]
    assert [v.name for v in planned("--variants", "batch", images=100)] == ["base", "batch-16", "batch-64"]
    crops = planned("--variants", "multi-crop", "--", "--local-crops-number", "0")
    assert [v.name for v in crops] == ["base", "0-local-crops"]


def test_own_variants_come_with_the_base_and_with_what_is_asked_for() -> None:
    assert [v.name for v in planned("--vary", "--lr 1e-3 --out-dim 64")] == ["base", "--lr 1e-3 --out-dim 64"]
    names = [v.name for v in planned("--vary", "--lr 1e-3", "--variants", "centre", "patch-8")]
    assert names == ["base", *(f"centre-momentum-{m}" for m in (0, 0.9, 0.99, 0.999)), "patch-8", "--lr 1e-3"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--variants", "teachers"], r"--variants teachers: give all, groups \(teacher, collapse, "),
        (["--vary", "--momentum-teachr 0.9"], r"momentum-teachr"),
        (["--vary", "--center-momentum 2"], r"--center-momentum 2\.0: a momentum lies between 0 and 1"),
        (["--vary", "--batch-size 4000"], r"--batch-size 4000: --batch-size 4000 is larger than the 2000 im"),
        (["--vary", "--seed 3"], r"--seed cannot be given to the runs"),
        (["--", "--data", "elsewhere"], r"--data cannot be given to the runs"),
    ],
)
def test_what_cannot_work_is_refused(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((ValueError, SystemExit)) as error:
        planned(*argv)
    assert re.search(message, " ".join(f"{error.value} {capsys.readouterr().err}".split()))


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


MEET = """
import time, pathlib
pathlib.Path({0!r}, "{1}").touch()
while not pathlib.Path({0!r}, "{2}").exists():
    time.sleep(0.01)
"""


def test_jobs_run_together_and_a_failing_one_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # a value that is set already stays
    jobs = {
        "first": [python(MEET.format(str(tmp_path), "a", "b")), python("print(7)")],
        "second": [python(MEET.format(str(tmp_path), "b", "a"))],
        "third": [python("raise SystemExit('no')"), python("print('never')")],
        "fourth": [python("import os; print(os.environ['OMP_NUM_THREADS'])")],
    }
    assert dict(execute(jobs, tmp_path, 2, 3)) == {"first": 0, "second": 0, "third": 1, "fourth": 0}
    logs = {path.stem: path.read_text().splitlines() for path in tmp_path.glob("*.log")}
    assert [logs[name][-1] for name in ("first", "third", "fourth")] == ["7", "no", "3"]


def test_a_job_that_is_told_to_stop_stops_all(tmp_path: Path) -> None:
    sleep = "import os, pathlib, time; print(os.getpid(), flush=True); pathlib.Path({!r}, 'a').touch()"
    sleep = sleep.format(str(tmp_path)) + "; time.sleep(60); print('slept')"
    jobs = {
        "a": [python(sleep)],
        "b": [python(MEET.format(str(tmp_path), "b", "a") + "raise SystemExit(75)")],
    }
    with pytest.raises(KeyboardInterrupt):
        list(execute(jobs, tmp_path, 2, 1))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "a.log").read_text().splitlines()[-1]), 0)


def test_a_stopped_study_goes_on_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    render_samples(tmp_path / "s", train=64, val=16)
    out, command = tmp_path / "out", [sys.executable, "-m", "experiments.ablation", "demo"]
    command += ["--out", str(out), "--data", f"{tmp_path}/s/train", "--val", f"{tmp_path}/s/val"]
    command += ["--seeds", "2", "--jobs", "1", "--variants", "student-copy", "--", *TINY.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "4 runs of 2 configurations; 1 at a time\n"
        assert re.match(r"1 of 4: base-seed0: trained, k-NN .* %; about ", process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=300)
    assert (process.returncode, error) == (130, "ablation: stopped; the same command goes on\n")
    before = json.loads((out / "ablation.json").read_text())
    assert [*before] == ["base-seed0"]

    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.startswith(
        "4 runs of 2 configurations, 1 of them there already; 1 at a time\n2 of 4: "
    )
    assert (done.returncode, done.stderr) == (0, "")
    runs = json.loads((out / "ablation.json").read_text())
    assert runs["base-seed0"] == before["base-seed0"]
    names = [f"{name}-seed{seed}" for seed in (0, 1) for name in ("base", "teacher-update_student_copy")]
    assert {name: run["state"] for name, run in runs.items()} == dict.fromkeys(names, "trained")
    for name in names:
        assert [*checkpoints(out / "runs" / name)] == [4]
        assert runs[name]["at_end"] == (["the teacher equals the student"] if "copy" in name else [])
    assert len({read_metrics(out / "runs" / name)[-1]["loss"] for name in names}) == 4
    table = (out / "ablation.md").read_text()
    assert re.search(r"\| base +\| [\d.]+ ± [\d.]+ \| +\| [\d.]+ ± [\d.]+ \|", table)
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")

    # Again: nothing is trained, and the table is the same. Other settings are another study.
    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, again.stdout.splitlines()[0]) == (
        0,
        "4 runs of 2 configurations, 4 of them there already; 1 at a time",
    )
    other = subprocess.run([*command, "--lr", "0.1"], capture_output=True, text=True)
    assert other.returncode == 1
    assert re.search(r"holds an ablation of other settings \(flags .* not .*--lr 0\.1\): give", other.stderr)
    assert (out / "ablation.md").read_text() == table
