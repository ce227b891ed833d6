"""The benchmarks' harness, operations and loaders at tiny sizes, and the command for a lent GPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounter

from benchmarks import gpu, harness, ops
from fastdino.data.samples import render_samples

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ABSENT = ("torchvision", "timm", "tyro", "rich", "safetensors", "tensorboard", "matplotlib", "PIL", "lightly")


def run(module: str, *words: str | Path, **env: str) -> list[dict[str, Any]]:
    """Run a benchmark as a user does; the rows in its --out, which is the last word."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, words)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(Path(words[-1], "results.json").read_text())["rows"]


def test_a_processor_is_told_by_its_number_or_by_family_and_model() -> None:
    def cpu(brand: str) -> str:
        one = f"processor : 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: {brand}\n"
        return harness.processor(one + one.replace("17", "18"))

    assert cpu("AMD EPYC") == "AMD EPYC family 25 model 17"
    assert cpu("AMD EPYC 9R14 96-Core Processor") == "AMD EPYC 9R14 96-Core Processor"
    assert cpu("AMD EPYC 96-Core Processor").endswith("family 25 model 17")
    assert cpu("Intel(R) Xeon(R) CPU @ 2.20GHz").endswith("family 25 model 17")
    about = harness.machine(CPU)
    assert about["instruction_set"] in about["device"]
    name = harness.folder(about).name
    assert about["instruction_set"] in name
    assert f"{torch.get_num_threads()}-thread" in name


def results(out: Path, **options: Any) -> harness.Results:
    args = harness.parser("", "module").parse_args(["--device", "cpu", "--out", str(out)])
    return harness.Results("Title", lambda rows: f"{len(rows)} rows\n", args, **options)


@pytest.mark.parametrize("changed", ["processor()", "isas", "get_num_threads"])
def test_results_of_another_processor_are_not_continued(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results(tmp_path).add([{"n": 1}])
    assert results(tmp_path).stored == [{"n": 1}]
    if changed == "isas":
        monkeypatch.setattr(harness.native, "isas", lambda: ("other",))
    elif changed == "get_num_threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    else:
        monkeypatch.setattr(harness, "processor", lambda _: "Another CPU")
    with pytest.raises(
        SystemExit, match=r"results.json was measured on .* and this is .*: give another --out"
    ):
        results(tmp_path)
    assert results(tmp_path, continues=False).stored == [{"n": 1}]


def test_variants_take_turns_in_a_new_order_each_round() -> None:
    order: list[str] = []
    timed = {name: lambda name=name: order.append(name) for name in "abcd"}
    times = harness.interleave(timed, harness.Clock(CPU), 60, 5)  # type: ignore[arg-type]
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


def test_ops_checks_and_times_every_case(tmp_path: Path) -> None:
    words = (
        "--device cpu --images 2 --prototypes 100 --archs vit_nano --knn 600 200 7 --seconds 0 --no-compile"
    )
    rows = run("ops", *words.split(), "--out", tmp_path)
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
        ops.loss(images, 8, "float32", compiled=True).measure(CPU, 0, 1)
    assert counter.frame_count == 11


def test_loader_times_every_loader_and_writes_its_results(tmp_path: Path) -> None:
    render_samples(tmp_path / "samples", train=16, val=8, size=160)
    words = ["--images", tmp_path / "samples" / "train", "--device", "cpu", "--quick", "--workers", "1"]
    rows = run("loader", *words, "--out", tmp_path / "out")
    parts = {part: {r["loader"]: r for r in rows if r["part"] == part} for part in ("core", "workers")}
    for part in parts.values():
        assert {"official DINO", "torchvision v2", "fastdino"} <= part.keys()
    for row in (*parts["core"].values(), *parts["workers"].values()):
        assert row["images_per_s"]["median"] > 0
        assert row["times_official"] > 0
    workers = parts["workers"]
    assert workers["official DINO"]["KB_sent"] == 4 * workers["fastdino"]["KB_sent"]
    assert "times official" in (tmp_path / "out" / "table.md").read_text()


def test_photos_have_the_sizes_and_texture_of_photographs(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    from benchmarks import loader

    loader.make_photos(tmp_path / "photos", 16)
    found = sorted((tmp_path / "photos").glob("*/*.jpg"))
    assert {path.parent.name for path in found} == set(loader.photographs())
    for path in found:
        with Image.open(path) as image:
            assert image.size in {(500, 400), (500, 375), (400, 500), (500, 333)}
            assert image.layer[1][1:3] == (1, 1)  # chroma at half of the light's resolution
            assert image.layer[0][1:3] == (2, 2)
    before = [path.read_bytes() for path in found]
    assert 90e3 < sum(map(len, before)) / 16 < 130e3
    loader.make_photos(tmp_path / "photos", 8)  # files that are there stay
    loader.make_photos(tmp_path / "again", 16)
    assert before == [path.read_bytes() for path in sorted((tmp_path / "again").glob("*/*.jpg"))]
    assert before == [path.read_bytes() for path in found]


def test_rehearsal_runs_every_part_and_writes_its_results(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({ABSENT})\n")
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--minutes", "60", "--out", "out"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    status = {part["part"]: part["status"] for part in summary}
    assert {name for name, what in status.items() if what == "ok"} == {"tests", "headline", "ema"}
    assert all(what == "ok" or what.startswith("left out: ") for what in status.values())
    assert {"profile", "patch_size", "loader", "distributed"} <= status.keys()
    for part in ("headline", "ema"):
        rows = json.loads((tmp_path / "out" / part / "results.json").read_text())["rows"]
        assert {"fastdino", harness.COPY} <= {row["variant"] for row in rows}
    assert (tmp_path / "out.tar.gz").exists()


def test_a_part_that_runs_out_of_time_ends_with_all_that_it_started(tmp_path: Path) -> None:
    started = "import signal, subprocess, sys, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    started += "child = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
    started += "print(subprocess.Popen(child).pid, flush=True)\n"
    log, env = tmp_path / "part.log", {**os.environ}
    assert gpu.run([sys.executable, "-c", started], env, log, 600) == "ok"
    said = gpu.run([sys.executable, "-c", f"{started}\ntime.sleep(600)"], env, log, 5)
    assert said == "stopped after 5 s, see part.log"
    state = Path("/proc", log.read_text().strip() or "none", "status")
    until = time.monotonic() + 120
    while state.exists() and "Z (zombie)" not in state.read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    assert gpu.run([sys.executable, "-c", "raise SystemExit(3)"], env, log, 600).startswith("failed with 3")
    missing = gpu.run([sys.executable, "-c", "import no_such_package"], env, log, 600)
    assert missing == "left out: No module named 'no_such_package'"
