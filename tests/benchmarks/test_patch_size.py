"""The study of whole updates by patch size, at tiny size."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import patch_size, update
from fastdino import ops

TINY = "--archs vit_nano --patches 8 --global-size 32 --local-size 16 --out-dim 64 --images 2 --rounds 2"
PLOTS = {"throughput.png", "memory.png", "parts.png", "optimizations.png"}


def command(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> list[dict[str, Any]]:
    """Run the study; the rows that it leaves."""
    argv = ["patch_size", *TINY.split(), "--no-compile", "--device", "cpu", "--out", str(out), *words]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr(patch_size, "matmul_flops", lambda *_: 1e13)
    patch_size.main()
    return json.loads((out / "results.json").read_text())["rows"]


def test_nothing_is_written_of_a_wrong_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.dino_loss
    monkeypatch.setattr(ops, "dino_loss", lambda *a, **k: right(*a, **k | {"student_temp": 0.11}))
    with pytest.raises(SystemExit, match=r"loss off by .*nothing was timed"):
        command(monkeypatch, tmp_path / "out", "--optimizations")
    assert not (tmp_path / "out").exists()


def test_run_writes_results_and_does_not_measure_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--optimizations", "vit_nano", "--without", "fused loss", "packing"]
    (row,) = command(monkeypatch, tmp_path, *words)
    found = {v["variant"]: v for v in row["variants"]}
    assert {"official", "fastdino", "fused loss", "packing", "all of these"} <= found.keys()
    for v in found.values():
        assert (v["images_per_s"]["rounds"], v["images_per_s"]["low"] > 0) == (2, True)
    for name in ("official", "fastdino"):
        assert set(found[name]["parts"]) == set(update.PARTS)
        assert all(seconds > 0 for seconds in found[name]["parts"].values())
    assert all(v["peak_MB"] > v["held_MB"] > 0 for n, v in found.items() if n in patch_size.MAIN)
    text = (tmp_path / "table.md").read_text()
    assert "REDUCED: crops of 32 and 16 pixels" in text.splitlines()[0]
    assert str(tmp_path) not in text
    for path in (found := {path.name: path for path in tmp_path.glob("*.png")}).values():
        path.unlink()
    assert found.keys() == PLOTS

    monkeypatch.setattr(patch_size, "bench", None)
    command(monkeypatch, tmp_path, *words)
    assert "vit_nano/8: measured already" in capsys.readouterr().out
    assert command(monkeypatch, tmp_path, "--plot-only") == [row]
    assert {path.name for path in tmp_path.iterdir()} >= PLOTS
    (again,) = command(monkeypatch, tmp_path, "--memory-only")
    assert again.pop("memory_stamp")["commit"] == row["stamp"]["commit"]
    for v, old in zip(again["variants"], row["variants"], strict=True):
        assert v["images_per_s"] == old["images_per_s"]
        assert (v["peak_MB"] or 0) > 0 or v["variant"] not in patch_size.MAIN


def test_profile_has_the_slowest_operators_of_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official, fastdino = command(monkeypatch, tmp_path, "--profile")
    assert (official["variant"], fastdino["variant"]) == ("official", "fastdino")
    for row in (official, fastdino):
        assert 0 < sum(ms for ms, _ in row["most"].values()) <= row["ms"]
        assert (tmp_path / f"vit_nano-8-{row['variant']}.json.gz").exists()
    assert any(name.startswith("fastdino::") for name in fastdino["most"].keys() - official["most"].keys())
    assert "vit_nano/8, 2 images" in (tmp_path / "table.md").read_text()
