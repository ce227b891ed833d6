"""The teacher update against its formula in float64."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fastdino.ops import ema_, native
from fastdino.ops.ema import _ema_

CUDA = torch.cuda.is_available()


def lists(
    teacher: torch.dtype = torch.float32, student: torch.dtype = torch.float32
) -> tuple[list[Tensor], ...]:
    shapes = [(), (1,), (7,), (33, 65), (3, 5, 7), (0,), (130, 129), (2, 3)]
    return [torch.randn(x).to(teacher) for x in shapes], [torch.randn(x).to(student) for x in shapes]


def assert_updated(
    before: list[Tensor], student: list[Tensor], after: list[Tensor], momentum: float, ulps: float = 0.5
) -> None:
    for b, s, a in zip(before, student, after, strict=True):
        truth = momentum * b.double() + (1 - momentum) * s.double()
        size = torch.maximum(b.double().abs(), s.double().abs())
        # three float32 roundings of terms no larger than `size`, then one to the teacher's dtype
        bound = 3 * torch.finfo(torch.float32).eps * size + torch.finfo(a.dtype).eps * ulps * truth.abs()
        assert ((a.double() - truth).abs() <= bound).all()


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def launch(dtype: torch.dtype) -> None:
    """Launches the Triton kernel as an update does: compile_triton.py makes machine code of it."""
    from fastdino.ops.ema_triton import ema_triton_

    teacher, student = torch.zeros(2, 2, 8192, dtype=dtype)
    ema_triton_([*teacher], [*student], [*torch.zeros(2, 8192, dtype=torch.bfloat16)], torch.tensor(0.996))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
@pytest.mark.parametrize("student", DTYPES[:3])
@pytest.mark.parametrize("teacher", DTYPES)
def test_update_follows_the_formula(impl, teacher, student, momentum):
    t, s = lists(teacher, student)
    before, given = copy.deepcopy(t), copy.deepcopy(s)
    ema_(t, s, momentum, impl=impl)
    # Triton's interpreter truncates to bfloat16; compiled, it rounds (test_triton.py)
    truncates = impl == "triton" and teacher == torch.bfloat16 and not CUDA
    assert_updated(before, s, t, momentum, ulps=1.0 if truncates else 0.5)
    assert all(torch.equal(a, b) for a, b in zip(s, given, strict=True))


def test_dtypes_may_differ_within_the_list(impl):
    t, s = lists()
    t[1], s[3], t[4] = t[1].double(), s[3].bfloat16(), t[4].half()
    before = copy.deepcopy(t)
    ema_(t, s, 0.9, impl=impl)
    assert_updated(before, s, t, 0.9)


def test_layout_does_not_matter(impl):
    t = [torch.randn(6, 4).t(), torch.randn(8)[::2], torch.randn(3, 3)]
    s = [torch.randn(4, 6), torch.randn(4), torch.randn(3, 3).t()]
    before = copy.deepcopy(t)
    ema_(t, s, 0.9, impl=impl)
    assert_updated(before, s, t, 0.9)


def test_alignment_does_not_matter(impl):
    t, s = [torch.randn(4100)[i:] for i in range(3)], [torch.randn(4100)[i:] for i in (0, 1, 2)]
    t.append(torch.randn(9000)[8:])
    s.append(torch.randn(9000)[:-8])
    before = copy.deepcopy(t)
    ema_(t, s, 0.9, impl=impl)
    assert_updated(before, s, t, 0.9)


def test_moved_tensors_are_found_again(impl):
    for _ in range(3):  # new memory each time: a table of old addresses would write elsewhere
        t, s = lists()
        before = copy.deepcopy(t)
        ema_(t, s, 0.9, impl=impl)
        assert_updated(before, s, t, 0.9)
        del t, s


def test_momentum_may_be_a_tensor(impl):
    t, s = lists()
    twin = copy.deepcopy(t)
    ema_(t, s, torch.tensor(0.9), impl=impl)
    assert_updated(twin, s, t, 0.9)


def test_modules_average_their_parameters_and_keep_their_buffers(impl):
    student = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    teacher = copy.deepcopy(student)
    student(torch.randn(4, 3))
    for p in student.parameters():
        p.data.normal_()
    before = [p.detach().clone() for p in teacher.parameters()]
    ema_(teacher, student, 0.9, impl=impl)
    assert_updated(before, list(student.parameters()), [p.detach() for p in teacher.parameters()], 0.9)
    assert torch.equal(teacher[1].running_mean, torch.zeros(5))


def test_buffers_are_copied_or_averaged_by_choice(impl):
    student = nn.BatchNorm1d(5)
    teacher = copy.deepcopy(student)
    student(torch.randn(4, 5))
    averaged = copy.deepcopy(teacher)
    ema_(teacher, student, 0.9, buffers="copy", impl=impl)
    assert torch.equal(teacher.running_mean, student.running_mean)
    ema_(averaged, student, 0.9, buffers="average", impl=impl)
    torch.testing.assert_close(averaged.running_mean, 0.1 * student.running_mean)
    assert averaged.num_batches_tracked == 1
    with pytest.raises(ValueError, match="buffers are those of modules"):
        ema_([torch.zeros(1)], [torch.ones(1)], 0.9, buffers="copy", impl=impl)


@pytest.mark.parametrize("teacher", DTYPES)
def test_a_bfloat16_copy_follows_the_teacher(impl, teacher, poison):
    t, s = lists(teacher)
    # odd offsets, and a copy that is not contiguous
    t += [torch.randn(5001)[1:].to(teacher), torch.randn(6, 4).to(teacher)]
    s += [torch.randn(5000), torch.randn(6, 4)]
    copies = [torch.empty(x.shape, dtype=torch.bfloat16, device=x.device) for x in t]
    copies[-2] = torch.empty(5003, dtype=torch.bfloat16, device=t[0].device)[3:]
    copies[-1] = torch.empty(4, 6, dtype=torch.bfloat16, device=t[0].device).t()
    before = copy.deepcopy(t)
    ema_(t, s, 0.9, bf16_copy=copies, impl=impl)
    assert_updated(before, s, t, 0.9, ulps=1.0 if impl == "triton" and not CUDA else 0.5)
    for x, c in zip(t, copies, strict=True):
        # Triton's interpreter truncates; and of a teacher in fp16 the kernels copy what was not yet rounded
        ulps = 1.0 if teacher != torch.float32 or (impl == "triton" and not CUDA) else 0.5
        bound = (ulps * torch.finfo(torch.bfloat16).eps) * x.double().abs()
        assert ((c.double() - x.double()).abs() <= bound).all()
    if teacher == torch.float32 and impl != "triton":
        assert all(torch.equal(c, x.bfloat16()) for x, c in zip(t, copies, strict=True))


def test_a_copy_of_another_dtype_or_shape_is_refused():
    t, s = [torch.zeros(3)], [torch.ones(3)]
    with pytest.raises(ValueError, match=r"tensor 0 of bf16_copy is torch\.float16: give bfloat16"):
        ema_(t, s, 0.5, bf16_copy=[torch.zeros(3, dtype=torch.float16)])
    with pytest.raises(ValueError, match=r"\(3,\) in the teacher, \(4,\) in the bf16_copy"):
        ema_(t, s, 0.5, bf16_copy=[torch.zeros(4, dtype=torch.bfloat16)])
    assert not t[0].any()


def test_a_module_of_bfloat16_is_kept_up_with_its_teacher(impl):
    student = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    teacher = copy.deepcopy(student)
    half = copy.deepcopy(teacher).bfloat16()
    for p in student.parameters():
        p.data.normal_()
    ema_(teacher, student, 0.5, buffers="average", bf16_copy=half, impl=impl)
    for p, h in zip(teacher.parameters(), half.parameters(), strict=True):
        torch.testing.assert_close(h.float(), p.detach(), rtol=2**-7, atol=0)


@pytest.mark.skipif(CUDA, reason="its mesh is of CPUs")
def test_shards_of_a_dtensor_are_updated_in_place(impl, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        t, s = torch.randn(6, 5), torch.randn(6, 5)
        sharded = [distribute_tensor(x.clone(), mesh, [Shard(0)]) for x in (t, s)]
        ema_([sharded[0]], [sharded[1]], 0.9, impl=impl)
        assert_updated([t], [s], [sharded[0].full_tensor()], 0.9)
    finally:
        dist.destroy_process_group()


def test_a_wrapped_student_matches_its_plain_teacher(impl):
    student = nn.Linear(3, 5)
    teacher = copy.deepcopy(student)
    wrapped = torch.compile(student)
    student.weight.data.zero_()
    before = teacher.weight.detach().clone()
    ema_(teacher, wrapped, 0.5, impl=impl)
    assert torch.equal(teacher.weight, before / 2)


def test_mismatch_names_the_first_parameter_that_differs():
    wide, narrow = (
        nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)),
        nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3)),
    )
    with pytest.raises(ValueError, match=r"1\.weight has shape \(2, 5\) in the teacher, \(3, 5\)"):
        ema_(wide, narrow, 0.9)
    with pytest.raises(ValueError, match=r"only the teacher has 1\.weight"):
        ema_(wide, narrow[:1], 0.9)
    with pytest.raises(ValueError, match=r"teacher has 0\.weight where student has weight"):
        ema_(wide, nn.Linear(3, 5), 0.9)
    with pytest.raises(ValueError, match="tensor 1 is"):
        ema_([torch.zeros(1), torch.zeros(1, dtype=torch.int64)], [torch.zeros(1), torch.zeros(1)], 0.9)


def test_nothing_is_changed_when_a_later_parameter_does_not_match():
    t = [torch.zeros(2), torch.zeros(2)]
    with pytest.raises(ValueError, match="tensor 1"):
        ema_(t, [torch.ones(2), torch.ones(3)], 0.5)
    assert not t[0].any()


def test_shared_memory_raises():
    student = nn.Linear(3, 5)
    teacher = copy.deepcopy(student)
    teacher.bias = student.bias
    with pytest.raises(ValueError, match="bias of teacher and student share memory"):
        ema_(teacher, student, 0.9)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_impossible_momentum_raises(momentum):
    with pytest.raises(ValueError, match="momentum is"):
        ema_([torch.zeros(1)], [torch.ones(1)], momentum)


def test_operator_passes_opcheck(impl):
    t, s = lists()
    torch.library.opcheck(_ema_, (t, s, [], torch.tensor(0.9), impl))
    torch.library.opcheck(_ema_, (t, s, [x.bfloat16() for x in t], torch.tensor(0.9), impl))


needs_native = pytest.mark.skipif(not native.isas(), reason=native.describe())


@needs_native
@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_instruction_set_and_number_of_threads_updates_every_element(isa, threads, monkeypatch):
    monkeypatch.setattr(native, "isas", lambda: (isa,))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    sizes = (1, 16384, 100_003, 0, 16385, 7)  # around the kernel's chunk of 16384
    for dtype in (torch.float32, torch.bfloat16):
        t, s = [torch.randn(n) for n in sizes], [torch.randn(n).to(dtype) for n in sizes]
        before = copy.deepcopy(t)
        ema_(t, s, 0.9, impl="cpu")
        assert_updated(before, s, t, 0.9)
