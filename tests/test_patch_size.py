"""The study of patch sizes: its FLOPs, official DINO's update in it, what its check refuses, a small run."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import patch_size, profile, update
from fastdino import ops
from tests.reference import OfficialRun

TINY = ["--archs", "vit_nano", "--patches", "8", "--global-size", "32", "--local-size", "16"]
TINY += ["--out-dim", "64", "--images", "2", "--rounds", "2", "--no-compile", "--device", "cpu"]
CPU = torch.device("cpu")


def problem(**sizes: Any) -> update.Problem:
    return update.Problem("vit_nano", 8, 2, **{"sizes": (32, 16), "local_crops": 3, "out_dim": 64} | sizes)


def nothing(part: str) -> None:
    pass


def main(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["patch_size", *TINY, "--out", str(out), *words])
    patch_size.main()


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


def test_official_update_is_the_reference_of_the_tests() -> None:
    its = update.Shared(problem(), CPU)
    official, config = update.Official(its, torch.float32), its.config
    official.still(True)
    crops = problem().crops(2, CPU)
    network = official.networks()[0]
    for block in network.modules():
        if isinstance(block, update.OfficialBlock):
            block.rate.zero_()
    settings = {"lr": config.optim.lr, "batch_size": 2, "min_lr": config.optim.lr * 2 / 256}
    settings |= {
        "warmup_epochs": 0,
        "weight_decay": 0.04,
        "weight_decay_end": 0.04,
        "momentum_teacher": 0.996,
    }
    settings |= {"warmup_teacher_temp": 0.04, "warmup_teacher_temp_epochs": 0, "teacher_temp": 0.04}
    settings |= {"clip_grad": config.optim.clip_grad, "freeze_last_layer": 0}
    reference = OfficialRun(network, settings, epochs=10**6, per_epoch=1, ncrops=5, out_dim=64)
    with torch.no_grad():
        for t, x in zip(reference.teacher.parameters(), official.teacher.parameters(), strict=True):
            t.copy_(x)
    reference.loss.center = its.dino.loss.center.clone()
    for step in range(3):
        expected = reference.step(step, crops)
        assert official(crops, nothing).item() == pytest.approx(expected, rel=1e-6)
    pairs = [
        *zip(its.dino.student.named_parameters(), reference.student.parameters(), strict=True),
        *zip(its.dino.teacher.named_parameters(), reference.teacher.parameters(), strict=True),
    ]
    for (name, found), right in pairs:
        if name.endswith("qkv.bias"):  # the keys' has no gradient but rounding, which AdamW makes large
            found, right = (x.unflatten(0, (3, -1))[::2] for x in (found, right))
        torch.testing.assert_close(found, right, rtol=1e-5, atol=2e-7)
    torch.testing.assert_close(its.dino.loss.center, reference.loss.center, rtol=1e-5, atol=1e-7)


def wrong_temperature(its: update.Shared, patch: pytest.MonkeyPatch) -> None:
    right = ops.dino_loss

    def wrong(*args: Any, **options: Any) -> Any:
        return right(*args, **options | {"student_temp": 0.11})

    patch.setattr(ops, "dino_loss", wrong)


def wrong_momentum(its: update.Shared, patch: pytest.MonkeyPatch) -> None:
    right = ops.ema_
    patch.setattr(ops, "ema_", lambda teacher, student, momentum: right(teacher, student, 0.99))


def wrong_clipping(its: update.Shared, patch: pytest.MonkeyPatch) -> None:
    right = update.optim.clip_gradients
    patch.setattr(update.optim, "clip_gradients", lambda model, limit, mode: right(model, limit, "global"))


def wrong_centre(its: update.Shared, patch: pytest.MonkeyPatch) -> None:
    its.dino.loss.center_momentum = 0.8


@pytest.mark.parametrize(
    ("make_wrong", "what"),
    [
        (wrong_temperature, "loss"),
        (wrong_momentum, "teacher"),
        (wrong_clipping, "clipping"),
        (wrong_centre, "centre"),
    ],
)
def test_check_refuses(make_wrong: Any, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    its = update.Shared(problem(), CPU)
    crops = problem().crops(2, CPU)
    update.check({"fastdino": update.Ours(its, torch.float32)}, crops)
    make_wrong(its, monkeypatch)
    with pytest.raises(SystemExit, match=f"fastdino in torch.float32: {what} off by .*nothing was timed"):
        update.check({"fastdino": update.Ours(its, torch.float32)}, crops)


def test_check_finds_the_scale_of_half_precision() -> None:
    """fp16 cannot be had on a CPU by the command; here from a scale at which its gradients overflow."""
    its = update.Shared(problem(), CPU)
    crops = problem().crops(2, CPU)
    variants = {"official": update.Official(its, torch.float16), "fastdino": update.Ours(its, torch.float16)}
    for variant in variants.values():
        variant.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    rows = update.check(variants, crops)
    assert all(0 < row["gradients"] < 0.05 for row in rows.values())
    assert all(1 < variant.scaler.get_scale() < 2**40 for variant in variants.values())


def test_nothing_is_written_where_the_check_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_temperature(None, monkeypatch)  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="nothing was timed"):
        main(monkeypatch, tmp_path / "out", "--means", "--loader")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("means", [(m,) for m in update.MEANS if m != "compile"])
def test_means_are_what_is_taken_away(means: tuple[str, ...]) -> None:
    its = update.Shared(problem(), CPU)
    crops = problem().crops(2, CPU)
    with_, without = update.Ours(its, torch.float32), update.Ours(its, torch.float32, means)
    update.check({"without": without}, crops)
    calls: dict[str, set[str]] = {}
    for name, variant in (("with", with_), ("without", without)):
        with torch.profiler.profile() as profile:
            variant(crops, nothing)
        calls[name] = {event.key for event in profile.key_averages()}
    gone, come = calls["with"] - calls["without"], calls["without"] - calls["with"]
    seen = {
        "fused loss": "fastdino::dino_loss" in gone,
        "fused EMA": "fastdino::ema_" in gone,
        "attention kernel": any("scaled_dot_product" in key for key in gone),
        "fused optimiser": "aten::_fused_adamw_" in gone,
        "no syncs": "aten::_foreach_norm" in gone,
        "skipped work": "aten::index_add" in gone and "aten::index_fill" in come,
        "half precision": True,  # both are in float32 here
        "packing": True,  # the same operators, on other shapes
    }
    assert seen[means[0]], (gone, come)
    if means == ("packing",):
        shapes: list[int] = []
        for variant in (with_, without):
            fc1 = variant.student.backbone.blocks[0].mlp.fc1
            fc1.register_forward_hook(lambda module, args, out: shapes.append(len(args[0])))
            variant(crops, nothing)
        assert len(shapes) == 3
        assert shapes[0] == shapes[1] + shapes[2]
    if means == ("half precision",):
        assert update.Ours(its, torch.bfloat16, means).dtype == torch.float32


def test_largest_batch_is_found_to_an_eighth() -> None:
    for most in (3, 4, 7, 64, 100, 127, 1000):
        found = patch_size.largest(lambda n, most=most: n <= most, 4)
        assert found <= most
        assert most < 4 or found > most * 7 / 8 - 1
    assert patch_size.largest(lambda n: False, 4) == 0


def test_run_writes_results_and_does_not_measure_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("skimage")
    monkeypatch.setattr(patch_size, "FED", 0.1)
    monkeypatch.setattr(patch_size, "matmul_flops", lambda *_: 1e13)
    main(monkeypatch, tmp_path, "--means", "vit_nano", "--loader", "vit_nano/8", "--workers", "1")
    result = json.loads((tmp_path / "results.json").read_text())
    (row,) = result["rows"]
    found = {v["variant"]: v for v in row["variants"]}
    assert {"official", "fastdino", "fused loss", "packing", "all of these"} <= found.keys()
    for variant in found.values():
        assert variant["images_per_s"]["low"] > 0
        assert variant["images_per_s"]["rounds"] == 2
        assert 0 < variant["use"] < 1
        assert set(variant["parts"]) == set(update.PARTS)
        assert all(seconds > 0 for seconds in variant["parts"].values())
    assert all(v["peak_MB"] > v["held_MB"] > 0 for n, v in found.items() if n in patch_size.MAIN)
    assert {r["variant"] for r in row["loader"]} == {"official", "fastdino", "loader"}
    table = (tmp_path / "table.md").read_text()
    assert "REDUCED: crops of 32 and 16 pixels" in table.splitlines()[0]
    assert str(tmp_path) not in table + json.dumps(result)
    plots = {"throughput.png", "memory.png", "parts.png", "means.png"}
    assert plots <= {path.name for path in tmp_path.iterdir()}

    capsys.readouterr()
    for path in tmp_path.glob("*.png"):
        path.unlink()
    monkeypatch.setattr(patch_size, "bench", None)
    main(monkeypatch, tmp_path, "--means", "vit_nano", "--loader", "vit_nano/8", "--workers", "1")
    assert "vit_nano/8: measured already" in capsys.readouterr().out
    main(monkeypatch, tmp_path, "--plot-only")
    assert plots <= {path.name for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == [row]
    main(monkeypatch, tmp_path, "--memory-only")
    (again,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert again.pop("memory_stamp")["commit"] == row["stamp"]["commit"]
    for v, old in zip(again["variants"], row["variants"], strict=True):
        assert v["images_per_s"] == old["images_per_s"]
        assert (v["peak_MB"] or 0) > 0 or v["variant"] not in patch_size.MAIN


def test_lightly_is_held_to_official_dino_on_global_crops() -> None:
    pytest.importorskip("lightly")
    pytest.importorskip("timm")
    its = update.Shared(problem(sizes=(36, 20)), CPU)  # neither a multiple of 8
    crops = problem(sizes=(36, 20)).crops(2, CPU)
    lightly = update.Lightly(its, torch.float32)
    update.check({"lightly": lightly}, crops)
    loss: Tensor = lightly(crops, nothing)
    assert np.isfinite(loss.item())


def event(name: str, start: float, end: float, on_gpu: bool = True, annotation: bool = False) -> Any:
    device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=annotation)


def test_profile_of_a_gpu_tells_gaps_tiny_launches_and_waits() -> None:
    """Two updates, of 100 microseconds each from the first kernel to the end of the last."""
    events = [
        event("aten::mm", 0, 200, on_gpu=False),
        event("Optimizer.step#AdamW.step", 0, 200, annotation=True),
        event("sm90_xmma_gemm_bf16", 50, 90),
        event("Memcpy DtoH (Device -> Pinned)", 80, 84),  # on another stream, beside it
        event("triton_poi_fused__to_copy_3", 10, 30),
        event("tile_kernel", 100, 110),
        event("flash_fwd_kernel<cutlass::bfloat16_t>", 110, 210),
    ]
    kernels = profile.kernels_of(events)
    assert [k.start for k in kernels] == [10, 50, 80, 100, 110]
    found = profile.of_kernels(kernels, waits=3, updates=2)
    assert found["ms"] == pytest.approx(0.1)
    assert found["busy"] == pytest.approx(1 - 30 / 200)
    assert found["gaps"] == [
        {"before": "sm90_xmma_gemm_bf16", "ms": pytest.approx(0.010)},
        {"before": "tile_kernel", "ms": pytest.approx(0.005)},
    ]
    assert (found["launches"], found["tiny"], found["waits"]) == (2.5, 0.5, 1.5)
    assert found["tiny_ms"] == pytest.approx(0.002)
    assert [profile.kind_of(k.name) for k in kernels] == [
        "casts, alone",
        "matrix products",
        "copies",
        "loss, teacher",
        "attention",
    ]
    assert "busy 85.0%, 2 launches, 0 of them tiny" in profile.table(
        [{"variant": "ours", "precision": "bfloat16"} | found | profile.shares([("aten::mm", 0.1, 4)])]
    )


def test_profile_accounts_for_the_whole_time_of_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--device", "cpu", "--arch", "vit_nano", "--patch", "8", "--images", "2", "--updates", "1"]
    words += ["--global-size", "32", "--local-size", "16", "--out-dim", "64", "--trace"]
    monkeypatch.setattr("sys.argv", ["profile", *words, "--out", str(tmp_path)])
    profile.main()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["official", "fastdino"]
    for row in rows:
        assert sum(its["ms"] for its in row["kinds"].values()) == pytest.approx(row["ms"])
        assert row["kinds"]["matrix products"]["calls"] > 50
        assert (tmp_path / f"{row['variant']}.trace.json.gz").stat().st_size > 1000
    official, ours = ({its["name"] for its in row["most"]} for row in rows)
    assert "fastdino::ema_" in ours - official
    assert "vit_nano/8, 2 images" in (tmp_path / "table.md").read_text()
