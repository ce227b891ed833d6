"""Every case of the operations is checked and timed at tiny size."""

import json
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from benchmarks import harness, ops

TINY = "--device cpu --images 2 --prototypes 100 --archs vit_nano --knn 600 200 7 --seconds 0 --no-compile"


def test_ops_checks_and_times_every_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["ops", *TINY.split(), "--out", str(tmp_path)])
    ops.main()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["op"] for row in rows} == set(ops.CASES)
    assert {row["allocator"] for row in rows} == set(ops.ALLOCATORS)
    assert all(row["ms"]["low"] > 0 for row in rows)
    assert all(row["share_of_copy"] == 1 for row in rows if row["variant"] == harness.COPY)
    assert {"scikit-learn", "matrix-product"} <= {row["variant"] for row in rows if row["op"] == "knn"}
    assert "| fastdino |" in (tmp_path / "table.md").read_text()


def test_official_dinos_loss_is_compiled_anew_for_every_problem(
    monkeypatch: pytest.MonkeyPatch, dynamo: None
) -> None:
    """Past torch's limit of graphs too, where it would run as it is without a word."""
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=counter, **options))
    for images in range(1, 12):
        ops.loss(images, 8, "float32", compiled=True).measure(torch.device("cpu"), 0, 1)
    assert counter.frame_count == 11
