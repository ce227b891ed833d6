"""The study of whole updates: its FLOPs, the update that it times, what its check refuses, a small run."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import patch_size, profile, update
from fastdino import ops, optim
from fastdino.update import Update

TINY = "--archs vit_nano --patches 8 --global-size 32 --local-size 16 --out-dim 64 --images 2 --rounds 2"
CPU = torch.device("cpu")


def problem(**sizes: Any) -> update.Problem:
    return update.Problem("vit_nano", 8, 2, **{"sizes": (32, 16), "local_crops": 3, "out_dim": 64} | sizes)


def command(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> list[dict[str, Any]]:
    """Run the study at tiny size; the rows that it leaves."""
    argv = ["patch_size", *TINY.split(), "--no-compile", "--device", "cpu", "--out", str(out), *words]
    monkeypatch.setattr("sys.argv", argv)
    patch_size.main()
    return json.loads((out / "results.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("arch", "patch", "gflop"),
    [("vit_small", 16, 114), ("vit_small", 8, 518), ("vit_base", 16, 436), ("vit_base", 8, 1863)],
)
def test_model_flops_are_those_of_the_closed_form(arch: str, patch: int, gflop: int) -> None:
    assert round(update.model_flops(update.Problem(arch, patch, 1)) / 1e9) == gflop


def test_model_flops_count_whole_patches_and_a_resnet() -> None:
    width, depth, total = 384, 12, 0
    for crops, passes, side in ((2, 4, 16), (8, 3, 6)):  # of 224 and 96 pixels in patches of 14
        n = side**2
        blocks = depth * (24 * (n + 1) * width**2 + 4 * (n + 1) ** 2 * width)
        head = 2 * (width * 2048 + 2048 * 2048 + 2048 * 256 + 256 * 65536)
        total += crops * passes * (2 * n * 3 * 14**2 * width + blocks + head)
    assert update.model_flops(update.Problem("vit_small", 14, 1)) == total
    # 4.09 G multiplications and additions for an image of 224 pixels
    whole = update.model_flops(update.Problem("resnet50", 0, 2, (224, 224), 0)) / 8
    head = 2 * (2048 * 2048 + 2048 * 2048 + 2048 * 256 + 256 * 65536)
    assert (whole - head) / 2 == pytest.approx(4.09e9, rel=0.01)


def variants(*without: str) -> dict[str, update.Variant]:
    return update.variants_of(problem(), update.Shared(problem(), CPU), False, without)


def waits_of(variant: update.Variant) -> int:
    return update.check({"": variant}, problem().crops(2, CPU))[""]["waits"]


def test_the_trainers_own_update_is_timed_and_a_wait_in_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(variants()["fastdino"].update) is Update
    assert waits_of(variants()["fastdino"]) == 0
    assert waits_of(variants()["official"]) > 50
    right = Update.clip

    def clip(self: Update, settings: Any) -> Any:
        norm = right(self, settings)
        norm.item()
        return norm

    monkeypatch.setattr(Update, "clip", clip)
    assert waits_of(variants()["fastdino"]) == 1


def patched(owner: Any, name: str, wrong: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    right = getattr(owner, name)
    return lambda patch: patch.setattr(owner, name, lambda *a, **k: wrong(right, *a, **k))


@pytest.mark.parametrize(
    ("make_wrong", "what"),
    [
        (patched(ops, "dino_loss", lambda right, *a, **k: right(*a, **k | {"student_temp": 0.11})), "loss"),
        (patched(ops, "ema_", lambda right, teacher, student, m: right(teacher, student, 0.99)), "teacher"),
        (
            patched(optim, "clip_gradients", lambda right, net, limit, _: right(net, limit, "global")),
            "clipping",
        ),
        (patched(Update, "step_student", lambda right, self, finite: right(self, ~finite)), "optimiser"),
    ],
)
def test_check_refuses_a_wrong_update_and_nothing_is_written(
    make_wrong: Any, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wrong(monkeypatch)
    with pytest.raises(SystemExit, match=f"fastdino in torch.*: {what} off by .*nothing was timed"):
        command(monkeypatch, tmp_path / "out", "--optimizations")
    assert not (tmp_path / "out").exists()


def test_check_refuses_a_wrong_centre() -> None:
    wrong = variants()["fastdino"]
    wrong.update.dino.loss.center_momentum = 0.8
    with pytest.raises(SystemExit, match="centre off by"):
        update.check({"fastdino": wrong}, problem().crops(2, CPU))


def test_check_finds_the_scale_of_half_precision() -> None:
    """The command does not take fp16 on a CPU; here from a scale at which its gradients overflow."""
    shared = update.Shared(problem(), CPU)
    found = update.variants_of(problem(), shared, False, ())
    found = {name: found[name] for name in ("official", "fastdino")}
    for variant in found.values():
        variant.update.dtype = torch.float16
        variant.update.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    rows = update.check(found, problem().crops(2, CPU))
    assert all(0 < row["gradients"] < 0.05 for row in rows.values())
    assert all(1 < variant.update.scaler.get_scale() < 2**40 for variant in found.values())


def test_each_optimization_can_be_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "choose_precision", lambda *_: torch.float32)
    monkeypatch.setattr("fastdino.update.choose_precision", lambda *_: torch.float32)
    found = variants(*update.OPTIMIZATIONS)
    update.check(found, problem().crops(2, CPU))
    operators, tokens = {}, dict[str, list[int]]()
    for name, variant in found.items():
        views = variant.inputs(problem().crops(2, CPU))
        if variant.ours:
            fc1, seen = variant.update.dino.student.backbone.blocks[0].mlp.fc1, tokens.setdefault(name, [])
            fc1.register_forward_hook(lambda module, args, out, seen=seen: seen.append(len(args[0])))
        with torch.profiler.profile() as profiled:
            variant(views)
        operators[name] = {event.key for event in profiled.key_averages()}
    gone = {name: operators["fastdino"] - its for name, its in operators.items()}
    assert "fastdino::dino_loss" in gone["fused loss"]
    assert "fastdino::ema_" in gone["fused EMA"]
    assert any("scaled_dot_product" in key for key in gone["attention kernel"])
    assert "aten::_fused_adamw_" in gone["fused optimiser"]
    assert "aten::_foreach_norm" in gone["no syncs"]
    assert "aten::index_add" in gone["skipped work"]
    assert sum(tokens["packing"]) == tokens["fastdino"][0]
    assert [len(tokens[name]) for name in ("packing", "fastdino")] == [2, 1]
    assert {"fastdino::dino_loss", "fastdino::ema_", "aten::_fused_adamw_"} <= gone["all of these"]


def test_run_writes_results_and_does_not_measure_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(patch_size, "matmul_flops", lambda *_: 1e13)
    words = ["--optimizations", "vit_nano", "--without", "fused loss", "packing"]
    (row,) = command(monkeypatch, tmp_path, *words)
    found = {v["variant"]: v for v in row["variants"]}
    assert {"official", "fastdino", "fused loss", "packing", "all of these"} <= found.keys()
    for variant in found.values():
        assert variant["images_per_s"]["low"] > 0
        assert variant["images_per_s"]["rounds"] == 2
        assert 0 < variant["use"] < 1
    for name in ("official", "fastdino"):
        assert set(found[name]["parts"]) == set(update.PARTS)
        assert all(seconds > 0 for seconds in found[name]["parts"].values())
    assert all(v["peak_MB"] > v["held_MB"] > 0 for n, v in found.items() if n in patch_size.MAIN)
    text = (tmp_path / "table.md").read_text()
    assert "REDUCED: crops of 32 and 16 pixels" in text.splitlines()[0]
    assert str(tmp_path) not in text
    plots = {"throughput.png", "memory.png", "parts.png", "optimizations.png"}
    assert plots <= {path.name for path in tmp_path.iterdir()}

    for path in tmp_path.glob("*.png"):
        path.unlink()
    monkeypatch.setattr(patch_size, "bench", None)
    command(monkeypatch, tmp_path, *words)
    assert "vit_nano/8: measured already" in capsys.readouterr().out
    assert command(monkeypatch, tmp_path, "--plot-only") == [row]
    assert plots <= {path.name for path in tmp_path.iterdir()}
    (again,) = command(monkeypatch, tmp_path, "--memory-only")
    assert again.pop("memory_stamp")["commit"] == row["stamp"]["commit"]
    for v, old in zip(again["variants"], row["variants"], strict=True):
        assert v["images_per_s"] == old["images_per_s"]
        assert (v["peak_MB"] or 0) > 0 or v["variant"] not in patch_size.MAIN


def test_lightly_is_held_to_official_dino_on_global_crops() -> None:
    pytest.importorskip("lightly")
    pytest.importorskip("timm")
    odd = problem(sizes=(36, 20))  # neither a multiple of 8
    lightly = update.variants_of(odd, update.Shared(odd, CPU), False, ())["lightly"]
    update.check({"lightly": lightly}, odd.crops(2, CPU))
    assert lightly(lightly.inputs(odd.crops(2, CPU))).isfinite()


def event(name: str, start: float, end: float, on_gpu: bool = True, annotation: bool = False) -> Any:
    device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=annotation)


def test_profile_of_a_gpu_tells_gaps_tiny_launches_and_waits() -> None:
    """Two updates, of 100 microseconds each from the first kernel to the end of the last."""
    kernels = profile.kernels_of(
        [
            event("aten::mm", 0, 200, on_gpu=False),
            event("Optimizer.step#AdamW.step", 0, 200, annotation=True),
            event("sm90_xmma_gemm_bf16", 50, 90),
            event("Memcpy DtoH (Device -> Pinned)", 80, 84),  # on another stream, beside it
            event("triton_poi_fused__to_copy_3", 10, 30),
            event("tile_kernel", 100, 110),
            event("flash_fwd_kernel<cutlass::bfloat16_t>", 110, 210),
        ]
    )
    assert [start for _, start, _ in kernels] == [10, 50, 80, 100, 110]
    found = profile.of_kernels(kernels, waits=3, updates=2)
    assert found["ms"] == pytest.approx(0.1)
    assert found["busy"] == pytest.approx(1 - 30 / 200)
    assert found["gaps"] == pytest.approx({"sm90_xmma_gemm_bf16": 0.010, "tile_kernel": 0.005})
    assert (found["launches"], found["tiny"], found["waits"]) == (2.5, 0.5, 1.5)
    assert found["tiny_ms"] == pytest.approx(0.002)
    kinds = ["casts, alone", "matrix products", "copies", "loss, teacher", "attention"]
    assert [profile.kind_of(name) for name, *_ in kernels] == kinds


def test_profile_accounts_for_the_whole_time_of_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = command(monkeypatch, tmp_path, "--profile")
    assert [row["variant"] for row in rows] == ["official", "fastdino"]
    for row in rows:
        assert sum(row["kinds"].values()) == pytest.approx(row["ms"])
        assert row["calls"]["matrix products"] > 50
    assert "fastdino::ema_" in rows[1]["most"].keys() - rows[0]["most"].keys()
    assert rows[1]["casts"] < rows[0]["casts"]
    assert "vit_nano/8, 2 images" in (tmp_path / "table.md").read_text()
