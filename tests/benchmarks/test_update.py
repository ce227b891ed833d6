"""Whole updates: their FLOPs, the update that is timed, what the check refuses, what can be taken away."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import update
from fastdino import ops, optim
from fastdino.update import Update

CPU = torch.device("cpu")


def problem(**sizes: Any) -> update.Problem:
    return update.Problem("vit_nano", 8, 2, **{"sizes": (32, 16), "local_crops": 3, "out_dim": 64} | sizes)


def variants(*without: str, **sizes: Any) -> dict[str, update.Variant]:
    return update.variants_of(problem(**sizes), update.Shared(problem(**sizes), CPU), False, without)


def check(*names: str, found: dict[str, update.Variant], **sizes: Any) -> dict[str, Any]:
    return update.check({name: found[name] for name in names or found}, problem(**sizes).crops(2, CPU))


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


def test_the_trainers_own_update_is_timed_and_a_wait_in_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = variants()
    assert type(found["fastdino"].update) is Update
    rows = check("official", "fastdino", found=found)
    assert (rows["fastdino"]["waits"], rows["official"]["waits"] > 50) == (0, True)
    right = Update.clip
    monkeypatch.setattr(Update, "clip", lambda *args: torch.tensor(right(*args).item()))
    assert check("fastdino", found=variants())["fastdino"]["waits"] == 1


def patched(owner: Any, name: str, wrong: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    right = getattr(owner, name)
    return lambda patch: patch.setattr(owner, name, lambda *a, **k: wrong(right, *a, **k))


WRONG = [
    ("loss", ops, "dino_loss", lambda right, *a, **k: right(*a, **k | {"student_temp": 0.11})),
    ("teacher", ops, "ema_", lambda right, teacher, student, m: right(teacher, student, 0.99)),
    ("clipping", optim, "clip_gradients", lambda right, net, limit, _: right(net, limit, "global")),
    ("optimiser", Update, "step_student", lambda right, self, finite: right(self, ~finite)),
    ("optimiser", optim, "peak_lr", None),
]


@pytest.mark.parametrize(("what", "owner", "name", "wrong"), WRONG)
def test_check_refuses_a_wrong_update(
    what: str, owner: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = variants()
    if name == "peak_lr":
        shared = found["fastdino"].shared
        shared.settings = update.replace(shared.settings, lr=1.1 * shared.settings.lr)
    else:
        patched(owner, name, wrong)(monkeypatch)
    with pytest.raises(SystemExit, match=f"fastdino in torch.*: {what} off by .*nothing was timed"):
        check("fastdino", found=found)


def test_check_refuses_a_wrong_centre() -> None:
    found = variants()
    found["fastdino"].update.dino.loss.center_momentum = 0.8
    with pytest.raises(SystemExit, match="centre off by"):
        check("fastdino", found=found)


def test_check_finds_the_scale_of_half_precision() -> None:
    """The command does not take fp16 on a CPU; here from a scale at which its gradients overflow."""
    found = variants()
    for name in ("official", "fastdino"):
        found[name].update.dtype = torch.float16
        found[name].update.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    rows = check("official", "fastdino", found=found)
    assert all(0 < row["gradients"] < 0.05 for row in rows.values())
    assert 1 < found["fastdino"].update.scaler.get_scale() < 2**40


def test_each_optimization_can_be_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "choose_precision", lambda *_: torch.float32)
    monkeypatch.setattr("fastdino.update.choose_precision", lambda *_: torch.float32)
    found = variants(*update.OPTIMIZATIONS)
    check(found=found)
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


def test_lightly_is_held_to_official_dino_on_global_crops() -> None:
    pytest.importorskip("lightly")
    pytest.importorskip("timm")
    odd = {"sizes": (36, 20)}  # neither a multiple of 8
    found = variants(**odd)
    check("lightly", found=found, **odd)
    assert found["lightly"](found["lightly"].inputs(problem(**odd).crops(2, CPU))).isfinite()
