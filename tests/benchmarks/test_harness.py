"""Stamps, what results may be continued, turns, the check of a case, and the committed results."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness, patch_size

CPU = torch.device("cpu")


def test_a_processor_is_told_by_its_number_or_by_family_and_model() -> None:
    def cpu(brand: str) -> str:
        one = f"processor : 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: {brand}\n"
        return harness.processor(one + one.replace("17", "18"))

    assert cpu("AMD EPYC") == "AMD EPYC family 25 model 17"
    assert cpu("AMD EPYC 9R14 96-Core Processor") == "AMD EPYC 9R14 96-Core Processor"
    assert cpu("Intel(R) Xeon(R) CPU @ 2.20GHz").endswith("family 25 model 17")
    about = harness.machine(CPU)
    name = harness.folder(about).name
    assert about["instruction_set"] in name
    assert f"{torch.get_num_threads()}-thread" in name


def results(out: Path, **options: Any) -> harness.Results:
    args = harness.parser("", "module").parse_args(["--device", "cpu", "--out", str(out)])
    return harness.Results("Title", lambda rows: f"{len(rows)} rows\n", args, **options)


@pytest.mark.parametrize("changed", ["processor", "isas", "get_num_threads"])
def test_results_of_another_processor_are_not_continued(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results(tmp_path).add([{"n": 1}])
    assert results(tmp_path).stored == [{"n": 1}]
    owner, value = {
        "processor": (harness, lambda _: "Another CPU"),
        "isas": (harness.native, lambda: ("other",)),
        "get_num_threads": (torch, lambda: 99),
    }[changed]
    monkeypatch.setattr(owner, changed, value)
    with pytest.raises(SystemExit, match=r"json was measured on .* and this is .*: give another --out"):
        results(tmp_path)
    assert results(tmp_path, continues=False).stored == [{"n": 1}]


def test_variants_take_turns_in_a_new_order_each_round() -> None:
    order: list[str] = []
    timed: harness.Timed = {name: lambda name=name: order.append(name) for name in "abcd"}  # type: ignore[misc]
    times = harness.interleave(timed, harness.Clock(CPU), 60, 5)
    rounds = [order[i : i + 4] for i in range(0, 24, 4)]
    assert all(sorted(one) == list("abcd") for one in rounds)
    assert len({tuple(one) for one in rounds}) > 2
    assert {len(ms) for ms in times.values()} == {5}  # the first round is not counted
    assert {len(ms) for ms in harness.interleave(timed, harness.Clock(CPU), 0, 5, due=2).values()} == {2}


def test_a_case_whose_variants_differ_is_not_timed() -> None:
    x = torch.ones(3)
    case = harness.Case("op", {}, {"theirs": lambda: [x], "fastdino": lambda: [1.01 * x]})
    with pytest.raises(SystemExit, match=r"op: fastdino is off by 1\.0e-02: nothing was timed"):
        case.measure(CPU, 0, 1)
    case.limits = {"": 0.1}
    assert [row["variant"] for row in case.measure(CPU, 0, 1)] == ["theirs", "fastdino"]


def test_the_committed_study_gives_its_table_and_its_plots(tmp_path: Path) -> None:
    (stored,) = harness.ROOT.glob("benchmarks/results/*/patch_size/results.json")
    found = json.loads(stored.read_text())
    anew = patch_size.text(found["rows"])
    committed = stored.with_name("table.md").read_text().split("\n\n**")[1]  # the overview
    assert committed.strip() in anew
    assert len(committed.splitlines()) == 4 + len(found["rows"])
    patch_size.plot(found["rows"], found["about"], tmp_path)
    names = {path.name for path in stored.parent.glob("*.png")}
    assert names == {path.name for path in tmp_path.iterdir()}
