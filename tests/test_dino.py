"""DINO: which crops go where, and where the teacher's weights come from."""

import pytest
import torch
from tiny import make_dino, perturb
from torch import Tensor

from fastdino.dino import MultiCrop


def make_crops(b: int = 3, local: int = 3) -> list[Tensor]:
    return [torch.randn(b, 3, 16, 16) for _ in range(2)] + [torch.randn(b, 3, 8, 8) for _ in range(local)]


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


SHAPES: dict[str, dict[str, list]] = {
    "vit_nano": {  # one pass over a list, as the crops come
        "student": [[(3, 3, 16, 16)] * 2 + [(3, 3, 8, 8)] * 3],
        "teacher": [[(3, 3, 16, 16)] * 2],
    },
    "resnet18": {"student": [(6, 3, 16, 16), (9, 3, 8, 8)], "teacher": [(6, 3, 16, 16)]},
}


@pytest.mark.parametrize("arch", SHAPES)
def test_student_sees_all_crops_and_teacher_the_global_ones(arch: str) -> None:
    dino = make_dino(drop_path_rate=0.0, arch=arch)
    seen: dict[str, list] = {"student": [], "teacher": []}
    for name, shapes in seen.items():
        getattr(dino, name).backbone.register_forward_pre_hook(
            lambda _, x, shapes=shapes: shapes.append(
                tuple(x[0].shape) if isinstance(x[0], Tensor) else [tuple(crop.shape) for crop in x[0]]
            )
        )
    dino(make_crops(), 0)
    assert seen == SHAPES[arch]


@pytest.mark.parametrize("arch", ["vit_nano", "resnet18"])
def test_multi_crop_equals_a_pass_per_crop_in_the_crops_order(arch: str) -> None:
    network = make_dino(drop_path_rate=0.0, arch=arch).student.double().eval()
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
    expected = twin.loss.cross_entropy(
        twin.student(crops), twin.teacher(crops[:2]), twin.loss.teacher_temp(0)
    )[0]
    expected.backward()
    for p, q in zip(dino.student.parameters(), twin.student.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)


def test_gradient_reaches_every_student_parameter_that_trains() -> None:
    dino = make_dino(drop_path_rate=0.0, norm_last_layer=False)
    perturb(dino.teacher)  # from equal networks on equal crops some gradients vanish
    dino(make_crops(), 0)[0].backward()
    without = [n for n, p in dino.student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("arch", ["vit_nano", "resnet18"])
def test_a_frozen_backbone_gets_no_gradient_and_the_head_all_of_its_own(arch: str) -> None:
    crops, gradients = make_crops(), []
    for freeze in (False, True):
        dino = make_dino(drop_path_rate=0.0, norm_last_layer=False, arch=arch)
        perturb(dino.teacher)
        torch.manual_seed(1)
        loss, _ = dino(crops, 0, freeze_backbone=freeze)
        loss.backward()
        assert all((p.grad is None) == freeze for p in dino.student.backbone.parameters())
        assert all(p.requires_grad for p in dino.student.backbone.parameters())  # it learns again later
        gradients.append([loss.detach(), *(p.grad for p in dino.student.head.parameters())])
    assert all(grad is not None and grad.abs().sum() > 0 for grad in gradients[0])
    # the ViT may compute its last block otherwise where no gradient is kept
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


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
