"""Whether what the paper says came out of an ablation: from figures written by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny import make_config

from experiments.judge import Result, Variant, cells, difference, judge, plot, report, result_of
from fastdino.config import to_dict

UNIFORM = "collapsed to uniform"
COPY = "the teacher equals the student"


def run(knn: float | None, *at_end: str, state: str = "trained", untrained: float | None = 50) -> Result:
    return {"state": state, "error": "", "at_end": [*at_end], "entropy": 0.5} | {
        "knn": knn,
        "untrained": untrained,
    }


def test_spread_is_the_deviation_of_one_seeds_difference() -> None:
    above, spread = difference([60.0, 64.0], [50.0, 51.0, 52.0])
    assert above == pytest.approx(11.0)
    assert spread == pytest.approx(math.sqrt(8.0 + 1.0))  # with n - 1
    assert math.isnan(difference([60.0], [50.0, 51.0])[1])
    assert all(map(math.isnan, difference([], [50.0, 51.0])))


BASE = [run(70), run(72)]


@pytest.mark.parametrize(
    ("paper", "runs", "expected"),
    [
        ("learns", [run(60), run(64)], (True, "learns: k-NN +12.0 to untrained, spread 2.8")),
        ("collapses", [run(60), run(64)], (False, "learns: k-NN +12.0 to untrained, spread 2.8")),
        # not above by more than the spread, far below, and equal to the last digit
        ("collapses", [run(60), run(50)], (True, "collapses: k-NN +5.0 to untrained, spread 7.1")),
        ("collapses", [run(30), run(31)], (True, "collapses: k-NN -19.5 to untrained, spread 0.7")),
        ("collapses", [run(50), run(50)], (True, "collapses: k-NN +0.0 to untrained, spread 0.0")),
        # the doctor's word holds however good the features still are, if it is of all seeds
        ("collapses", [run(60, UNIFORM), run(64, UNIFORM)], (True, f"collapses: {UNIFORM}")),
        ("learns", [run(60, UNIFORM), run(64)], (False, "collapses in part: 1 of 2 seeds")),
        ("collapses", [run(60, UNIFORM), run(64)], (False, "collapses in part: 1 of 2 seeds")),
        # that the teacher equals the student is what such a variant is, not what became of it
        ("learns", [run(60, COPY), run(64, COPY)], (True, "learns: k-NN +12.0 to untrained, spread 2.8")),
        ("learns", [run(60), run(None, state="diverged")], (False, "diverges: 1 of 2 seeds")),
        ("learns", [run(60), run(None, state="failed")], (None, "one seed has no spread")),
        ("learns", [run(60)], (None, "one seed has no spread")),
        ("collapses", [run(60, UNIFORM)], (True, f"collapses: {UNIFORM}")),
        ("learns", [run(None, untrained=None)] * 2, (None, "no k-NN")),
        ("learns", [run(None, state="failed")], (None, "no run has ended")),
        ("learns", [], (None, "no run has ended")),
        ("worse", [run(60), run(62)], (True, "worse: k-NN -10.0 to the base, spread 2.0")),
        ("worse", [run(70), run(71)], (False, "no different: k-NN -0.5 to the base, spread 1.6")),
        ("worse", [run(80), run(80)], (False, "better: k-NN +9.0 to the base, spread 1.4")),
        ("better", [run(80), run(80)], (True, "better: k-NN +9.0 to the base, spread 1.4")),
        ("better", [run(80)], (None, "one seed has no spread")),
        ("better", [run(None), run(None)], (None, "no k-NN")),
    ],
)
def test_whether_the_paper_came_out(
    paper: str, runs: list[Result], expected: tuple[bool | None, str]
) -> None:
    assert judge(paper, runs, BASE) == expected


VARIANTS = [
    Variant("teacher", "momentum", "", "learns"),
    Variant("teacher", "copy", "--x 'a|b'", "collapses"),
    Variant("centre", "0.9", "", "learns"),
    Variant("centre", "0.99", "--c 0.99", "collapses"),
    Variant("own", "y", "--y"),
]
FAILED: Result = {"state": "failed", "error": "fastdino-train: no", "at_end": []}
RESULTS = {
    "": BASE,
    "--x 'a|b'": [run(40, UNIFORM), run(41, UNIFORM)],
    "--c 0.99": [],
    "--y": [run(60), FAILED],
}


def test_the_report_has_each_variant_and_each_statement_once() -> None:
    text = report(VARIANTS, RESULTS, "heading")
    lines = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert [line for line in lines if line.strip("-") not in ("", "variant")] == [
        *("momentum (base)", "copy", "0.9 (base)", "0.99", "y")
    ]
    assert text[text.index("What") :].splitlines() == [
        "What the paper says: 2 as in the paper, 1 undecided",
        "",
        "- as in the paper: momentum learns (figure 6); here learns: k-NN +21.0 to untrained, spread 1.4",
        f"- as in the paper: copy collapses (figure 6); here collapses: {UNIFORM}",
        "- undecided: 0.99 collapses (appendix D); here no run has ended",
    ]
    copy = cells(VARIANTS[1], RESULTS)
    assert (copy["k-NN, %"], copy["to base"], copy["entropy"]) == ("40.5 ± 0.7", "-30.5 ± 1.6", "0.50")
    assert copy["at the end"] == f"{UNIFORM} (2 of 2)"
    assert cells(VARIANTS[0], RESULTS)["to base"] == ""
    assert cells(VARIANTS[4], RESULTS)["at the end"] == "failed fastdino-train: no (1 of 2)"
    assert "What" not in report(VARIANTS[4:], RESULTS, "heading")


def test_the_plot_has_a_mark_for_each_seed_and_says_which_collapsed(tmp_path: Path, drawn: list[Any]) -> None:
    plot(VARIANTS, RESULTS, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    (axis,) = drawn[0].axes
    marks = {m: [x for line in axis.lines if line.get_marker() == m for x in line.get_xdata()] for m in "ox"}
    assert sorted(marks["o"]) == [60, 70, 70, 72, 72]
    assert sorted(marks["x"]) == [40, 41]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names[:2] + names[4:] == ["teacher: momentum (base)", "teacher: copy", "own: y"]
    texts = {text.get_text() for text in axis.texts}
    assert {"learns: as in the paper", "collapses: undecided", "1 failed"} <= texts


def line(step: int, epoch: int = 0, **values: Any) -> dict[str, Any]:
    healthy = {"teacher_entropy": 2.0, "prototypes_used": 50.0, "logit_max": 1.0, "teacher_distance": 0.1}
    healthy |= {"skipped": 0, "images_per_s": 16.0, "loss": 3.0}
    return {"step": step, "epoch": epoch} | healthy | values


def write_run(out: Path, lines: list[dict[str, Any]], **flags: Any) -> Path:
    out.mkdir()
    (out / "config.json").write_text(json.dumps(to_dict(make_config(out, out, **flags))))
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def test_only_what_holds_at_the_end_counts(tmp_path: Path) -> None:
    bad = [line(s, teacher_entropy=math.log(96) - 0.01) for s in (1, 2, 3)]
    good = [line(s) for s in (4, 5, 6)]
    assert result_of(write_run(tmp_path / "a", bad + good), 0, "")["at_end"] == []
    assert result_of(write_run(tmp_path / "b", good + bad), 0, "")["at_end"] == [UNIFORM]
    assert result_of(write_run(tmp_path / "c", good + bad[1:]), 0, "")["at_end"] == []  # not long enough


def test_a_teacher_copied_at_an_epochs_end_is_no_copy_of_the_student(tmp_path: Path) -> None:
    same = [line(s, epoch=s, teacher_distance=0.0) for s in (1, 2, 3)]
    copied = result_of(write_run(tmp_path / "a", same, teacher_update="previous_epoch"), 0, "")
    held = result_of(write_run(tmp_path / "b", same, teacher_update="student_copy"), 0, "")
    assert (copied["at_end"], held["at_end"]) == ([], [COPY])


def test_figures_are_those_of_the_last_line_and_may_be_missing(tmp_path: Path) -> None:
    lines = [line(4), {"step": 5, "nonfinite": "loss is nan"}, line(6, images_per_s=4.0)]
    run = write_run(tmp_path / "a", lines)
    (run / "knn.json").write_text('{"teacher": {"20": 33.0}, "untrained network": {"20": 30.0}}')
    result = result_of(run, 0, "")
    assert (result["state"], result["error"], result["images_per_s"]) == ("trained", "", 4.0)
    assert (result["knn"], result["untrained"]) == (33.0, 30.0)
    assert result["entropy"] == pytest.approx(2.0 / math.log(96))
    lost = write_run(tmp_path / "b", [line(4), line(5, loss=None, teacher_entropy=None)])
    assert result_of(lost, 0, "")["entropy"] is None


@pytest.mark.parametrize(
    ("code", "log", "state", "error"),
    [
        (1, "x\nfastdino-train: no such file\n  detail\n", "failed", "fastdino-train: no such file"),
        (1, "Traceback\nKeyError: 'x'\n\n", "failed", "KeyError: 'x'"),
        (1, "", "failed", "it printed nothing"),
        (-9, "step 10", "failed", "killed by SIGKILL: if memory ran out, lower --jobs"),
        (1, "fastdino-train: stopped at step 9: 20 non-finite steps in a row. Lower --lr", "diverged", ""),
    ],
)
def test_a_run_that_did_not_end_well_says_why(
    tmp_path: Path, code: int, log: str, state: str, error: str
) -> None:
    result = result_of(tmp_path / "nothing", code, log)
    assert (result["state"], result["error"]) == (state, error)
