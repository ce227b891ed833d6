"""Schedules, groups, clipping and optimisers against official DINO's formulas, written out in float64."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_config
from torch import Tensor, nn

from fastdino import optim
from fastdino.config import PRESETS, Config, OptimConfig
from fastdino.head import DINOHead
from fastdino.optim import Schedule
from fastdino.vit import VisionTransformer


class Network(nn.Module):
    """A backbone and a head with every kind of parameter that training meets."""

    def __init__(self, norm_last_layer: bool = True, use_bn: bool = False) -> None:
        super().__init__()
        self.backbone = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2)
        self.head = DINOHead(
            8, 12, norm_last_layer=norm_last_layer, use_bn=use_bn, hidden_dim=6, bottleneck_dim=4
        )


def official_schedule(base: float, final: float, total: int, warmup: int = 0) -> np.ndarray:
    cosine = np.array(
        [
            final + 0.5 * (base - final) * (1 + math.cos(math.pi * i / (total - warmup)))
            for i in range(total - warmup)
        ]
    )
    return np.concatenate((np.linspace(0, base, warmup), cosine))


def gradients(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale


@pytest.mark.parametrize(
    ("base", "final"),
    [(5e-4, 1e-6), (0.04, 0.4), (0.996, 1.0), (0.1, 0.0)],
    ids=["lr", "wd", "momentum", "zero"],
)
@pytest.mark.parametrize(("total", "warmup"), [(40, 0), (40, 1), (40, 2), (40, 13), (40, 40), (1, 0), (1, 1)])
def test_schedules_are_official_dinos_at_every_step(base, final, total, warmup):
    ours = [optim.cosine(step, base, final, total, warmup) for step in range(total)]
    np.testing.assert_allclose(ours, official_schedule(base, final, total, warmup), rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize(
    ("epochs", "asked", "expected"),
    [
        (100, "auto", 10),
        (300, "auto", 10),
        (12, "auto", 1.2),
        (9, "auto", 0.9),
        (1, "auto", 0.1),
        # asked for by name
        (100, 10.0, 10),
        (12, 10.0, 10),
        (10, 10.0, 10),
        (4, 0.0, 0),
        (4, 0.5, 0.5),
        # longer than the run
        (9, 10.0, 0.9),
        (1, 10.0, 0.1),
    ],
)
def test_a_warmup_is_a_tenth_of_the_run_at_the_most_unless_asked_for_by_name(epochs, asked, expected):
    config = make_config(Path(), Path("run"), epochs=epochs, warmup_epochs=asked, lr=1e-3, batch_size=256)
    schedule = Schedule(config, 100)
    assert schedule.lr_warmup == 100 * expected
    lr = np.array([schedule.at(step).lr for step in range(schedule.total_steps)])
    assert max(lr) == pytest.approx(1e-3)
    rising, falling = np.diff(lr[: max(schedule.lr_warmup, 1)]), np.diff(lr[max(schedule.lr_warmup, 1) :])
    assert (rising > 0).all()
    assert (falling < 0).all()


@pytest.mark.parametrize(
    ("epochs", "asked", "expected"),
    [(300, "auto", 30), (40, "auto", 12), (1, "auto", 0), (40, 30, 30), (20, 30, 6), (100, 0, 0)],
)
def test_a_temperature_rises_for_three_tenths_of_the_run_at_the_most_unless_asked_for_by_name(
    epochs, asked, expected
):
    flags = {"warmup_teacher_temp": 0.02, "teacher_temp": 0.05, "warmup_teacher_temp_epochs": asked}
    schedule = small(epochs, 2, **flags)
    assert (schedule.teacher_temps < 0.05).sum() == max(expected - 1, 0)  # its last epoch has 0.05


def test_peak_lr_is_per_256_images():
    config = OptimConfig(lr=5e-4, batch_size=1024)
    assert optim.peak_lr(config) == pytest.approx(2e-3)
    assert optim.peak_lr(dataclasses.replace(config, batch_size=64)) == pytest.approx(1.25e-4)


IMAGENET = 1_281_167


def published(preset: str, batch: int) -> tuple[Schedule, Config, int]:
    """A preset's schedule on ImageNet, as official DINO trains it."""
    config = PRESETS[preset][1]
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, batch_size=batch))
    return Schedule(config, IMAGENET // batch), config, IMAGENET // batch


@pytest.mark.parametrize(
    ("preset", "batch"), [("vit-small-16", 1024), ("vit-small-16-boost", 512), ("resnet50", 1024)]
)
def test_the_settings_of_every_step_are_the_published_schedules(preset: str, batch: int) -> None:
    schedule, config, per_epoch = published(preset, batch)
    cfg, method = config.optim, config.method
    total, warmup = cfg.epochs * per_epoch, 10 * per_epoch
    assert schedule.total_steps == total
    assert schedule.notes == []
    lr = official_schedule(cfg.lr * batch / 256, cfg.min_lr, total, warmup)
    decay = official_schedule(cfg.weight_decay, cfg.weight_decay_end, total)
    momentum = official_schedule(method.momentum_teacher, 1.0, total)
    warm = 30 if preset == "vit-small-16-boost" else 0
    temps = np.concatenate(
        (np.linspace(0.04, method.teacher_temp, warm), np.full(cfg.epochs - warm, method.teacher_temp))
    )
    steps = [*range(0, total, 997), warmup - 1, warmup, per_epoch - 1, per_epoch, total - 1]
    for step in steps:
        settings = schedule.at(step)
        assert (settings.step, settings.epoch) == (step, step // per_epoch)
        found = (settings.lr, settings.weight_decay, settings.momentum, settings.teacher_temp)
        expected = (lr[step], decay[step], momentum[step], temps[step // per_epoch])
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-16), step
        assert settings.freeze_last_layer == (step < per_epoch)
        assert not settings.freeze_backbone


def test_published_numbers_stand_where_they_were_published() -> None:
    schedule, _, per_epoch = published("vit-small-16-boost", 1024)
    assert schedule.at(0).lr == 0.0
    assert schedule.at(10 * per_epoch - 1).lr == pytest.approx(2e-3)
    last = schedule.at(300 * per_epoch - 1)
    assert last.lr == pytest.approx(1e-6, rel=1e-3)
    assert last.weight_decay == pytest.approx(0.4)
    assert (schedule.at(0).momentum, last.momentum) == (0.996, pytest.approx(1.0))
    assert (schedule.at(0).teacher_temp, schedule.at(29 * per_epoch).teacher_temp) == (0.04, 0.07)


def small(epochs: int, per_epoch: int, **flags: Any) -> Schedule:
    return Schedule(make_config(Path(), Path("run"), epochs=epochs, warmup_epochs=0, **flags), per_epoch)


def test_logs_saves_and_evaluations_are_due_at_their_steps() -> None:
    flags = {"log_every": 3, "save_every": 5, "keep_every_epochs": 2, "knn_every_epochs": 2}
    schedule = small(3, 4, **flags)
    settings = [schedule.at(step) for step in range(12)]

    def done(name: str) -> list[int]:
        return [s.step + 1 for s in settings if getattr(s, name)]

    assert done("begins_epoch") == [1, 5, 9]
    assert done("ends_epoch") == [4, 8, 12]
    assert done("saves") == [5, 8, 10, 12]  # each fifth; the end of the second epoch, for good; the last
    assert done("logs") == [3, 4, 5, 6, 8, 9, 10, 12]  # each third; the ends of epochs; what is saved
    assert done("evaluates") == [8, 12]  # each second epoch, and the last
    assert schedule.keep_every == 8


def test_nothing_is_evaluated_or_kept_for_good_unless_asked() -> None:
    schedule = small(2, 3, keep_every_epochs=0, knn_every_epochs=0, save_every=100)
    settings = [schedule.at(step) for step in range(6)]
    assert not any(s.evaluates for s in settings)
    assert [s.step for s in settings if s.saves] == [5]


def test_warmups_longer_than_the_run_are_shortened_and_the_schedule_says_so() -> None:
    config = make_config(
        Path(),
        Path("run"),
        epochs=9,
        warmup_epochs=10,
        warmup_teacher_temp=0.02,
        teacher_temp=0.05,
        warmup_teacher_temp_epochs=30,
    )
    schedule = Schedule(config, 10)
    assert schedule.notes == [
        "--warmup-epochs 10: shortened to a tenth of the run, which has 9 epochs",
        "--warmup-teacher-temp-epochs 30: shortened to three tenths of the run, which has 9 epochs",
    ]
    assert schedule.at(8).lr == pytest.approx(optim.peak_lr(config.optim))  # a tenth of 90 updates
    temps = [schedule.at(10 * epoch).teacher_temp for epoch in range(9)]
    assert temps[:4] == pytest.approx([0.02, 0.035, 0.05, 0.05])  # three tenths of 9 epochs


def test_the_backbone_is_frozen_while_the_head_warms_up_and_the_schedule_begins_after_it() -> None:
    config = make_config(
        Path(), Path("run"), epochs=4, warmup_epochs=1, init_from="weights.pth", head_warmup_steps=3
    )
    schedule, peak = Schedule(config, 5), optim.peak_lr(config.optim)
    settings = [schedule.at(step) for step in range(20)]
    assert [s.freeze_backbone for s in settings] == [True] * 3 + [False] * 17
    assert [s.lr for s in settings[:3]] == pytest.approx([peak / 3, 2 * peak / 3, peak])
    after = official_schedule(peak, config.optim.min_lr, 17, 5)
    assert [s.lr for s in settings[3:]] == pytest.approx(after.tolist())


@pytest.mark.parametrize(("asked", "frozen"), [(19, 19), (20, 2), (1000, 2)])
def test_a_head_warmup_longer_than_the_run_is_shortened_and_the_schedule_says_so(asked, frozen) -> None:
    flags = {"epochs": 4, "init_from": "weights.pth", "head_warmup_steps": asked}
    schedule = Schedule(make_config(Path(), Path("run"), **flags), 5)
    assert [schedule.at(step).freeze_backbone for step in range(20)] == [True] * frozen + [False] * (
        20 - frozen
    )
    said = f"--head-warmup-steps {asked}: shortened to 2, a tenth of the run, which has 20 updates"
    assert schedule.notes == [said] * (frozen == 2)


@pytest.mark.parametrize("step", [-1, 12])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"step is {step}, but the run has steps 0 to 11"):
        small(3, 4).at(step)


def test_an_epoch_without_an_update_is_refused() -> None:
    with pytest.raises(ValueError, match="steps_per_epoch is 0"):
        small(3, 0)


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_biases_and_vectors_alone_escape_weight_decay(norm_last_layer):
    model = Network(norm_last_layer, use_bn=True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = optim.param_groups(model)
    decayed, not_decayed = ({names[p] for p in group["params"]} for group in groups)
    expected = {"backbone.cls_token", "backbone.pos_embed", "backbone.patch_embed.proj.weight"}
    for i in range(2):
        expected |= {
            f"backbone.blocks.{i}.{n}.weight" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        }
    expected |= {"head.mlp.0.weight", "head.mlp.3.weight", "head.mlp.6.weight", "head.last_layer.weight_v"}
    if not norm_last_layer:
        expected.add("head.last_layer.weight_g")  # (K, 1): two dimensions, so decayed
    assert decayed == expected
    frozen = {"head.last_layer.weight_g"} if norm_last_layer else set()
    assert not_decayed == set(names.values()) - expected - frozen
    assert {
        "backbone.norm.weight",
        "backbone.norm.bias",
        "head.mlp.1.weight",
        "head.mlp.0.bias",
    } <= not_decayed
    assert "weight_decay" not in groups[0]
    assert groups[1]["weight_decay"] == 0.0


def clip_formula(grads: list[Tensor], limit: float, mode: str) -> tuple[list[Tensor], Tensor]:
    """Official DINO's clipping of each tensor by its own norm, or of all by their common one, in float64."""
    grads = [g.double() for g in grads]
    norms = [g.square().sum().sqrt() for g in grads]
    total = torch.stack(norms).square().sum().sqrt()
    clipped = []
    for g, norm in zip(grads, norms, strict=True):
        factor = limit / ((norm if mode == "per_tensor" else total) + 1e-6)
        clipped.append(g * factor if limit > 0 and factor < 1 else g)
    return clipped, total


@pytest.mark.parametrize("mode", ["per_tensor", "global"])
@pytest.mark.parametrize("limit", [3.0, 0.5, 1e4, 0.0])
def test_clipping_is_the_formula(mode, limit, poison):
    model = nn.ParameterList(torch.zeros(shape) for shape in ((40, 30), (7,), (1,), (5, 4, 3), (3,), (2, 2)))
    gradients(model, 0)
    model[1].grad *= 0.01  # below the limit: must not grow
    model[2].grad.zero_()
    model[4].grad = None
    model[5].grad.fill_(0.5)  # norm 1
    grads = [p.grad for p in model if p.grad is not None]
    before = [g.clone() for g in grads]
    expected, total = clip_formula(before, limit, mode)
    returned = optim.clip_gradients(model, limit, mode)
    assert returned.shape == ()
    torch.testing.assert_close(returned.double(), total, rtol=1e-6, atol=0)
    for g, e, b in zip(grads, expected, before, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-6, atol=0)
        if torch.equal(e, b.double()):
            assert torch.equal(g, b)  # what is not clipped keeps every bit
    assert model[4].grad is None
    changed = sum(not torch.equal(g, b) for g, b in zip(grads, before, strict=True))
    # per tensor: the two large ones, and the last where the limit is below 1; global: all but the zero
    assert changed == {3.0: (2, 4), 0.5: (3, 4), 1e4: (0, 0), 0.0: (0, 0)}[limit][mode == "global"]


def lars_formula(
    weights: list[Tensor], grads: list[list[Tensor]], decays: list[float], lr: float
) -> list[Tensor]:
    """Official DINO's LARS: momentum 0.9, trust 0.001; vectors are neither scaled nor decayed."""
    weights = [w.clone() for w in weights]
    momenta = [torch.zeros_like(w) for w in weights]
    for step in grads:
        for w, g, mu, decay in zip(weights, step, momenta, decays, strict=True):
            update = g
            if w.ndim != 1:
                update = g + decay * w
                if w.norm() > 0 and update.norm() > 0:
                    update = update * (0.001 * w.norm() / update.norm())
            mu.mul_(0.9).add_(update)
            w.sub_(lr * mu)
    return weights


def test_lars_is_the_formula_over_many_steps(poison):
    torch.manual_seed(3)
    model = nn.ParameterList(
        torch.randn(s, dtype=torch.float64) for s in ((6, 5), (5,), (4, 4), (2, 3, 2), (3, 3))
    )
    with torch.no_grad():
        model[2].zero_()  # weights of norm 0 move by the plain gradient
    optimizer = optim.make_optimizer(model, OptimConfig(optimizer="lars"))
    for group in optimizer.param_groups:
        group["lr"] = 0.3
    optimizer.param_groups[0]["weight_decay"] = 0.05
    start, steps = [p.detach().clone() for p in model], []
    for step in range(5):
        gradients(model, step)
        if step == 0:
            model[4].grad.copy_(-0.05 * model[4].detach())  # decay and gradient cancel: an update of norm 0
        steps.append([p.grad.clone() for p in model])
        optimizer.step()
    expected = lars_formula(start, steps, [0.05] * 5, lr=0.3)
    for p, e in zip(model, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-12, atol=1e-14)


def plain(name: str, groups: list[dict]) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=False, foreach=False)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=False, foreach=False)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("frozen_steps", [0, 2])
def test_state_made_early_changes_nothing(name, frozen_steps, poison):
    torch.manual_seed(1)
    ours, theirs = Network().double(), Network().double()
    theirs.load_state_dict(ours.state_dict())
    optimizer = optim.make_optimizer(ours, OptimConfig(optimizer=name))
    reference = plain(name, optim.param_groups(theirs))
    early = ours.head.last_layer.weight_v.detach().clone()
    for step in range(5):
        for model, o in ((ours, optimizer), (theirs, reference)):
            gradients(model, step)
            if step < frozen_steps:
                optim.cancel_last_layer_gradients(model)
            for group in o.param_groups:
                group["lr"] = 0.01 * (step + 1)
            o.param_groups[0]["weight_decay"] = 0.1 * (step + 1)
            o.step()
        if step < frozen_steps:  # neither gradient nor decay
            assert torch.equal(ours.head.last_layer.weight_v, early)
    for (n, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13, msg=n)
    assert not torch.equal(ours.head.last_layer.weight_v, early)


def test_cancel_last_layer_gradients_takes_those_of_the_prototypes_alone():
    model = Network(norm_last_layer=False)
    gradients(model, 0)
    optim.cancel_last_layer_gradients(model)
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {"head.last_layer.weight_g", "head.last_layer.weight_v"}


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_found_inf_changes_no_bit(name, bad):
    model = Network(norm_last_layer=False)
    optimizer = optim.make_optimizer(model, OptimConfig(optimizer=name))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    tensors = dict(model.state_dict()) | optim.optimizer_tensors(model, optimizer)

    def step(seed: int, found_inf: float, bad: float | None = None) -> None:
        gradients(model, seed)
        if bad is not None:
            for p in model.parameters():
                p.grad.view(-1)[0] = bad
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()

    step(0, 0.0)
    before = {name: value.clone() for name, value in tensors.items()}
    step(1, 1.0, bad)
    for key, value in tensors.items():
        assert torch.equal(value, before[key]), key
    step(2, 0.0)
    moved = {key for key, value in tensors.items() if not torch.equal(value, before[key])}
    assert moved == tensors.keys()
    assert all(value.isfinite().all() for value in tensors.values())


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_found_inf_of_zero_is_an_ordinary_step(name):
    results = []
    for found_inf in (None, torch.tensor(0.0)):
        torch.manual_seed(5)
        model = Network()
        optimizer = optim.make_optimizer(model, OptimConfig(optimizer=name))
        optimizer.param_groups[0]["lr"] = 0.1
        if found_inf is not None:
            optimizer.found_inf = found_inf
        for seed in range(3):
            gradients(model, seed)
            optimizer.step()
        results.append([*model.state_dict().values(), *optim.optimizer_tensors(model, optimizer).values()])
    for without, given in zip(*results, strict=True):
        assert torch.equal(without, given)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_writing_optimizer_tensors_back_restores_the_optimiser(name):
    model = Network()
    optimizer = optim.make_optimizer(model, OptimConfig(optimizer=name))
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    state = optim.optimizer_tensors(model, optimizer)
    entries = {"adamw": {"exp_avg", "exp_avg_sq", "step"}}.get(name, {"momentum_buffer"})
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert state.keys() == {f"{n}.{entry}" for n in trained for entry in entries}
    tensors = dict(model.state_dict()) | state

    def two_steps() -> list[Tensor]:
        for seed in (7, 8):
            gradients(model, seed)
            optimizer.step()
        return [value.clone() for value in tensors.values()]

    gradients(model, 0)
    optimizer.step()
    saved = {key: value.clone() for key, value in tensors.items()}
    first = two_steps()
    for key, value in tensors.items():
        value.copy_(saved[key])
    for once, again in zip(first, two_steps(), strict=True):
        assert torch.equal(once, again)
