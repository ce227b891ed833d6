"""DINO: which crops go where, where the teacher's weights come from, and that nothing is shared."""

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import make_config
from torch import Tensor, nn

from fastdino import checkpoint
from fastdino.config import ModelConfig
from fastdino.dino import DINO, MultiCrop, build_backbone, load_backbone

NOWHERE = Path("unused")


def make_dino(**flags: object) -> DINO:
    torch.manual_seed(0)
    return DINO(make_config(NOWHERE, NOWHERE, **flags))


def make_crops(b: int = 3, local: int = 3) -> list[Tensor]:
    return [torch.randn(b, 3, 16, 16) for _ in range(2)] + [torch.randn(b, 3, 8, 8) for _ in range(local)]


def perturb(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))


@pytest.mark.parametrize("arch", ["vit_nano", "resnet18"])
def test_teacher_starts_equal_and_shares_no_tensor(arch: str) -> None:
    dino = make_dino(arch=arch, use_bn_in_head=True)
    student, teacher = dino.student.state_dict(), dino.teacher.state_dict()
    assert student.keys() == teacher.keys()
    assert all(torch.equal(student[k], teacher[k]) for k in student)
    held = {t.untyped_storage().data_ptr() for t in student.values()}
    assert held.isdisjoint(t.untyped_storage().data_ptr() for t in teacher.values())
    assert not any(p.requires_grad for p in dino.teacher.parameters())


def test_drop_path_is_the_students_alone() -> None:
    dino = make_dino(drop_path_rate=0.5).train()
    crops = make_crops()
    assert not torch.equal(dino.student(crops), dino.student(crops))
    assert torch.equal(dino.teacher(crops[:2]), dino.teacher(crops[:2]))


def test_student_sees_all_crops_and_teacher_the_global_ones() -> None:
    dino = make_dino(drop_path_rate=0.0)
    seen: dict[str, list[tuple[int, ...]]] = {"student": [], "teacher": []}
    for name, shapes in seen.items():
        getattr(dino, name).backbone.register_forward_pre_hook(
            lambda _, x, shapes=shapes: shapes.append(x[0].shape)
        )
    dino(make_crops(), 0)
    assert seen == {"student": [(6, 3, 16, 16), (9, 3, 8, 8)], "teacher": [(6, 3, 16, 16)]}


def test_multi_crop_equals_a_pass_per_crop_in_the_crops_order() -> None:
    network = make_dino(drop_path_rate=0.0).student.double()
    # Sizes that come again later must not be reordered.
    crops = [torch.randn(2, 3, s, s, dtype=torch.float64) for s in (16, 8, 8, 16, 12)]
    each = torch.cat([network.head(network.backbone(crop)) for crop in crops])
    torch.testing.assert_close(MultiCrop.forward(network, crops), each, rtol=1e-12, atol=1e-12)


def test_teacher_mean_is_over_images_and_global_crops() -> None:
    dino = make_dino(drop_path_rate=0.0)
    crops = make_crops()
    _, mean = dino(crops, 0)
    rows = [dino.teacher([crop]) for crop in crops[:2]]
    torch.testing.assert_close(mean, torch.cat(rows).mean(0))
    assert torch.equal(dino.loss.center, torch.zeros(1, 96))  # left to the caller


def test_backward_takes_the_memory_of_the_students_logits() -> None:
    dino, crops, kept = make_dino(drop_path_rate=0.0), make_crops(), []
    dino.student.head.register_forward_hook(lambda *args: kept.append(args[-1]))
    loss, _ = dino(crops, 0)
    (logits,) = kept
    logits.register_hook(lambda grad: kept.append(grad))
    loss.backward()
    assert kept[1].data_ptr() == logits.data_ptr()
    twin = make_dino(drop_path_rate=0.0)
    expected = twin.loss.cross_entropy(twin.student(crops), twin.teacher(crops[:2]), 0)[0]
    expected.backward()
    for p, q in zip(dino.student.parameters(), twin.student.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)


def test_gradient_reaches_every_student_parameter_that_trains() -> None:
    dino = make_dino(drop_path_rate=0.0, norm_last_layer=False)
    perturb(dino.teacher)  # from equal networks on equal crops some gradients vanish
    dino(make_crops(), 0)[0].backward()
    without = [n for n, p in dino.student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def step_teacher(
    kind: str, student_before: list[Tensor], teacher: list[Tensor], after: list[Tensor]
) -> list[Tensor]:
    """What a teacher of each kind is after one update of the student, in the middle of an epoch."""
    return {
        "momentum": [0.9 * t + 0.1 * s for t, s in zip(teacher, after, strict=True)],
        "student_copy": after,
        "previous_iteration": student_before,
        "previous_epoch": teacher,
    }[kind]


@pytest.mark.parametrize("kind", ["momentum", "student_copy", "previous_iteration", "previous_epoch"])
def test_teacher_update(kind: str) -> None:
    dino = make_dino(teacher_update=kind, arch="resnet18")
    perturb(dino.teacher)
    before = [p.detach().clone() for p in dino.student.parameters()]
    teacher = [p.detach().clone() for p in dino.teacher.parameters()]
    statistics = [b.clone() for b in dino.teacher.buffers()]
    if kind == "previous_iteration":
        dino.update_teacher(0.9)
    perturb(dino.student)
    after = [p.detach().clone() for p in dino.student.parameters()]
    if kind != "previous_iteration":
        dino.update_teacher(0.9)
    for got, expected in zip(
        dino.teacher.parameters(), step_teacher(kind, before, teacher, after), strict=True
    ):
        torch.testing.assert_close(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(statistics, dino.teacher.buffers(), strict=True))
    if kind == "previous_epoch":
        dino.update_teacher(0.9, new_epoch=True)
        assert all(torch.equal(t, s) for t, s in zip(dino.teacher.parameters(), after, strict=True))


@pytest.mark.parametrize(("warmup", "epochs", "expected"), [(3, 5, 3), (5, 5, 5), (30, 10, 3), (30, 1, 0)])
def test_temperature_warmup_fits_the_run(warmup: int, epochs: int, expected: int) -> None:
    dino = make_dino(
        warmup_teacher_temp_epochs=warmup, epochs=epochs, warmup_teacher_temp=0.01, teacher_temp=0.04
    )
    table = dino.loss.teacher_temp_schedule
    assert len(table) == epochs
    assert (table < 0.04).sum() == max(0, expected - 1)  # the last epoch of warm-up is at its end


def test_unknown_arch_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"--arch vit_smal is unknown.*vit_small.*resnet50"):
        build_backbone(ModelConfig(arch="vit_smal"))


def test_load_backbone_returns_the_teachers_network(tmp_path: Path) -> None:
    dino = make_dino()
    perturb(dino.teacher)
    path = tmp_path / "teacher.safetensors"
    checkpoint.write_teacher(path, dino.teacher, make_config(NOWHERE, NOWHERE), 0)
    images = torch.randn(2, 3, 16, 16)
    for given in (str(path), str(tmp_path)):
        backbone = load_backbone(given)
        assert not backbone.training
        assert torch.equal(backbone(images), dino.teacher.backbone.eval()(images))


def as_official(dino: DINO) -> dict[str, object]:
    """What official DINO's checkpoint.pth holds of these networks."""
    return {
        "student": {f"module.{k}": v for k, v in dino.student.state_dict().items()},
        "teacher": dino.teacher.state_dict(),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", lr=0.0005),
        "dino_loss": {"center": torch.zeros(1, 96)},
    }


@pytest.mark.parametrize("arch", ["vit_tiny", "resnet18"])
@pytest.mark.parametrize("kind", ["full", "backbone", "safetensors"])
def test_load_backbone_reads_official_files(tmp_path: Path, arch: str, kind: str) -> None:
    dino = make_dino(arch=arch)
    perturb(dino.teacher)
    backbone = dino.teacher.backbone.eval()
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "full":
        torch.save(as_official(dino), path)
    elif kind == "backbone":
        torch.save(backbone.state_dict(), path)
    else:
        save_file({k: v.contiguous() for k, v in backbone.state_dict().items()}, path)
    images = torch.randn(2, 3, 16, 16)
    read = load_backbone(str(path))
    assert not read.training
    assert torch.equal(read(images), backbone(images))


def test_load_backbone_refuses_what_it_cannot_load_whole(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    state = make_dino(arch="vit_tiny").teacher.backbone.state_dict()
    torch.save(
        {k: v for k, v in state.items() if k != "blocks.3.norm1.bias"} | {"extra": torch.zeros(1)}, path
    )
    with pytest.raises(ValueError, match=r"(?s)Missing.*blocks\.3\.norm1\.bias.*Unexpected.*extra"):
        load_backbone(str(path))
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"not the tensors of a ViT \(no cls_token.*there are weights"):
        load_backbone(str(path))
    torch.save({"teacher": 3}, path)
    with pytest.raises(ValueError, match="holds no tensors by name, nor under teacher: it has keys teacher"):
        load_backbone(str(path))
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_backbone(str(path))


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("executed"),)


def test_load_backbone_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"teacher": Hostile()}, "weights.pth")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_backbone("weights.pth")
    assert not Path("executed").exists()
