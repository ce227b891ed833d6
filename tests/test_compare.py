"""Results of runs, and verdicts on them: from figures written by hand, and on real runs in test_ablate.py."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny import make_config

from fastdino.compare import Row, Variant, gain, outcome, plot, result_of, statements, verdict, write_markdown
from fastdino.config import to_dict

UNIFORM = "collapsed to uniform"


def run(knn: float | None, *at_end: str, state: str = "trained") -> dict[str, Any]:
    return {"state": state, "error": "", "knn": knn, "at_end": [*at_end], "entropy": 0.5, "seconds": 9.0}


def test_spread_is_the_deviation_of_one_seeds_difference():
    above, spread = gain([60.0, 64.0], [50.0, 51.0, 52.0])
    assert above == pytest.approx(11.0)
    assert spread == pytest.approx(math.sqrt(8.0 + 1.0))  # with n - 1
    assert math.isnan(gain([60.0], [50.0, 51.0])[1])
    assert all(map(math.isnan, gain([], [50.0, 51.0])))


@pytest.mark.parametrize(
    ("results", "untrained", "expected"),
    [
        ([run(60), run(64)], [50, 50], ("learns", "k-NN +12.0 to untrained, spread 2.8")),
        # not above by more than the spread, far below, and equal to the last digit
        ([run(60), run(50)], [50, 50], ("collapses", "k-NN +5.0 to untrained, spread 7.1")),
        ([run(30), run(31)], [50, 50], ("collapses", "k-NN -19.5 to untrained, spread 0.7")),
        ([run(50), run(50)], [50, 50], ("collapses", "k-NN +0.0 to untrained, spread 0.0")),
        # the doctor's word holds however good the features still are, if it is of all seeds
        ([run(60, UNIFORM), run(64, UNIFORM)], [50, 50], ("collapses", UNIFORM)),
        ([run(60, UNIFORM), run(64)], [50, 50], ("collapses in part", "1 of 2 seeds")),
        # that the teacher equals the student is what such a variant is, not what became of it
        (
            [run(60, "the teacher equals the student"), run(64, "the teacher equals the student")],
            [50, 50],
            ("learns", "k-NN +12.0 to untrained, spread 2.8"),
        ),
        ([run(60), run(None, state="diverged")], [50, 50], ("diverges", "1 of 2 seeds")),
        ([run(60), run(None, state="failed")], [50, 50], ("", "one seed has no spread")),
        ([run(60)], [50], ("", "one seed has no spread")),
        ([run(60, UNIFORM)], [50], ("collapses", UNIFORM)),
        ([run(None), run(None)], [], ("", "no k-NN")),
        ([run(None, state="failed")], [50, 50], ("", "no run has ended")),
        ([], [], ("", "no run has ended")),
    ],
)
def test_what_became_of_a_variant(results, untrained, expected):
    assert outcome(results, untrained) == expected


BASE = [run(70), run(72)]


@pytest.mark.parametrize(
    ("paper", "results", "came_out", "told"),
    [
        ("learns", [run(60), run(64)], True, "learns: k-NN +12.0 to untrained, spread 2.8"),
        ("collapses", [run(60), run(64)], False, "learns: k-NN +12.0 to untrained, spread 2.8"),
        ("learns", [run(60, UNIFORM), run(64)], False, "collapses in part: 1 of 2 seeds"),
        ("collapses", [run(60, UNIFORM), run(64)], False, "collapses in part: 1 of 2 seeds"),
        ("learns", [run(None, state="diverged")], False, "diverges: 1 of 1 seeds"),
        ("collapses", [run(60)], None, "one seed has no spread"),
        ("worse", [run(60), run(62)], True, "worse: k-NN -10.0 to the base, spread 2.0"),
        ("worse", [run(70), run(71)], False, "no different: k-NN -0.5 to the base, spread 1.6"),
        ("worse", [run(80), run(80)], False, "better: k-NN +9.0 to the base, spread 1.4"),
        ("better", [run(80), run(80)], True, "better: k-NN +9.0 to the base, spread 1.4"),
        ("better", [run(80)], None, "one seed has no spread"),
        ("better", [run(None), run(None)], None, "no k-NN"),
    ],
)
def test_whether_the_paper_came_out(paper, results, came_out, told):
    assert verdict(Row(Variant("g", "v", paper=paper), results, BASE, [50.0, 50.0])) == (came_out, told)


def rows() -> list[Row]:
    untrained = [50.0, 51.0]
    copies = [run(40, UNIFORM), run(41, UNIFORM)]
    return [
        Row(Variant("teacher", "momentum", (), "learns", "figure 6"), BASE, BASE, untrained),
        Row(Variant("teacher", "copy", ("--x", "a|b"), "collapses", "figure 6"), copies, BASE, untrained),
        Row(Variant("centre", "0.9", ("--c", "0.9"), "learns", "appendix D"), BASE, BASE, untrained),
        Row(Variant("centre", "0.99", ("--c", "0.99"), "collapses", "appendix D"), [], BASE, []),
        Row(
            Variant("own", "y", ("--y",)),
            [run(60), {"state": "failed", "error": "fastdino-train: no", "at_end": []}],
            BASE,
            untrained,
        ),
    ]


def test_statements_are_all_listed_once_with_what_was_found():
    assert statements(rows()) == [
        "What the paper says: 2 as in the paper, 1 undecided",
        "",
        "- as in the paper: momentum learns (figure 6); here learns: k-NN +20.5 to untrained, spread 1.6",
        f"- as in the paper: copy collapses (figure 6); here collapses: {UNIFORM}",
        "- undecided: 0.99 collapses (appendix D); here no run has ended",
    ]


def test_the_table_has_each_variant_and_failures_with_their_reason(tmp_path: Path):
    write_markdown(rows(), ["# heading"], tmp_path / "t.md")
    lines = [
        [cell.strip() for cell in line.strip("|").replace("\\|", "/").split("|")]
        for line in (tmp_path / "t.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    assert len({len(line) for line in lines}) == 1
    tables = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines if line != lines[0]}
    assert [*tables] == ["momentum (base)", "copy", "0.9 (base)", "0.99", "y"]
    copy = tables["copy"]
    assert (copy["k-NN, %"], copy["to base"], copy["entropy"]) == ("40.5 ± 0.7", "-30.5 ± 1.6", "0.50")
    assert copy["at the end"] == f"{UNIFORM} (2 of 2)"
    assert copy["flags"] == "--x 'a/b'"
    assert tables["momentum (base)"]["to base"] == ""
    assert (tables["y"]["k-NN, %"], tables["y"]["to base"]) == ("60.0", "-11.0")
    assert tables["y"]["at the end"] == "failed fastdino-train: no (1 of 2)"


def test_the_plot_has_a_mark_for_each_seed_and_says_which_collapsed(tmp_path: Path, drawn: list):
    plot(rows(), tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    (axis,) = drawn[0].axes
    marks = {m: [x for line in axis.lines if line.get_marker() == m for x in line.get_xdata()] for m in "ox"}
    assert sorted(marks["o"]) == [60, 70, 70, 72, 72]
    assert sorted(marks["x"]) == [40, 41]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == ["momentum (base)", "copy", "0.9 (base)", "0.99", "y"]
    texts = {text.get_text() for text in axis.texts}
    assert {"learns: as in the paper", "collapses: undecided", "1 failed", "teacher", "own"} <= texts


def line(step: int, epoch: int = 0, **values: Any) -> dict[str, Any]:
    healthy = {
        "teacher_entropy": 2.0,
        "prototypes_used": 50.0,
        "logit_max": 1.0,
        "teacher_distance": 0.1,
        "skipped": 0,
        "images_per_s": 16.0,
        "loss": 3.0,
    }
    return {"step": step, "epoch": epoch} | healthy | values


def write_run(out: Path, lines: list[dict[str, Any]], **flags: Any) -> Path:
    out.mkdir()
    (out / "config.json").write_text(json.dumps(to_dict(make_config(out, out, **flags))))
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def test_only_what_holds_at_the_end_counts(tmp_path: Path):
    uniform = {"teacher_entropy": math.log(96) - 0.01}
    bad = [line(s, **uniform) for s in (1, 2, 3)]
    good = [line(s) for s in (4, 5, 6)]
    assert result_of(write_run(tmp_path / "a", bad + good), 0, "")["at_end"] == []
    assert result_of(write_run(tmp_path / "b", good + bad), 0, "")["at_end"] == [UNIFORM]
    assert result_of(write_run(tmp_path / "c", good + bad[1:]), 0, "")["at_end"] == []  # not long enough


def test_a_teacher_copied_at_an_epochs_end_is_no_copy_of_the_student(tmp_path: Path):
    same = [line(s, epoch=s, teacher_distance=0.0) for s in (1, 2, 3)]
    copied = result_of(write_run(tmp_path / "a", same, teacher_update="previous_epoch"), 0, "")
    held = result_of(write_run(tmp_path / "b", same, teacher_update="student_copy"), 0, "")
    assert (copied["at_end"], held["at_end"]) == ([], ["the teacher equals the student"])


def test_figures_are_those_of_the_last_line(tmp_path: Path):
    lines = [line(4), {"step": 5, "nonfinite": "loss is nan"}, line(6, images_per_s=4.0, knn_20=33.0)]
    result = result_of(
        write_run(tmp_path / "a", lines), 0, "step 4: teacher entropy ... collapsed to uniform"
    )
    assert (result["state"], result["error"], result["knn"], result["step"]) == ("trained", "", 33.0, 6)
    assert result["seconds"] == pytest.approx(4 * 8 / 16 + 2 * 8 / 4)
    assert result["entropy"] == pytest.approx(2.0 / math.log(96))
    assert result["said"] == ["step 4: teacher entropy ... collapsed to uniform"]


def test_a_last_step_that_is_not_finite_has_no_vitals(tmp_path: Path):
    values = {"loss": None, "teacher_entropy": None, "prototypes_used": None, "knn_20": 12.5}
    result = result_of(write_run(tmp_path / "a", [line(4), line(5, **values)]), 0, "")
    assert (result["loss"], result["entropy"], result["knn"]) == (None, None, 12.5)


@pytest.mark.parametrize(
    ("code", "said", "state", "error"),
    [
        (1, "x\nfastdino-train: no such file\n  detail\n", "failed", "fastdino-train: no such file"),
        (1, "Traceback\nKeyError: 'x'\n\n", "failed", "KeyError: 'x'"),
        (1, "", "failed", "it said nothing"),
        (-9, "step 10", "failed", "killed by SIGKILL: if memory ran out, lower --jobs"),
        (1, "fastdino-train: stopped at step 9: 20 non-finite steps in a row. Lower --lr", "diverged", ""),
    ],
)
def test_a_run_that_did_not_end_well_says_why(tmp_path: Path, code, said, state, error):
    result = result_of(tmp_path / "nothing", code, said)
    assert (result["state"], result["error"]) == (state, error)
