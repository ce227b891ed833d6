"""The loss and its gradient against official DINO's formula in float64.

Bound: twice the error of that formula computed in float32 on the same inputs, plus one rounding to the
output's dtype.
"""

import pytest
import torch
from dino_loss_checks import by_formula, check, default_weights, logits
from torch import Tensor

from fastdino.ops import dino_loss, native
from fastdino.ops.dino_loss import _dino_loss

# numpy warns of what PyTorch computes in silence, such as inf - inf, in Triton's interpreter
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

CUDA = torch.cuda.is_available()


SHAPES = [  # V, G, B, K
    (10, 2, 3, 1000),
    (4, 2, 1, 257),
    (2, 2, 5, 64),  # V == G: no local crop
    (3, 1, 2, 33),  # one global crop
    (2, 1, 1, 1),  # the loss of one prototype is 0
    (3, 3, 2, 7),
    (1, 2, 2, 50),  # fewer crops for the student than for the teacher
    (3, 2, 2, 4097),  # one column more than a tile of the C++ kernel
    (2, 1, 3, 2049),
    (3, 70, 1, 5),  # many global crops
]


def launch(dtype: torch.dtype) -> None:
    """Launches the Triton kernels as an update does: compile_triton.py makes machine code of them."""
    from fastdino.ops.dino_loss_triton import dino_loss_bwd_triton, dino_loss_triton

    student, teacher, c = logits(10, 2, 2, 65536, student=dtype, teacher=dtype)
    results = torch.zeros(()), torch.zeros(2, 10, 2), torch.zeros(2, 2, 2), torch.zeros(65536)
    inputs = student, teacher, c, torch.tensor(0.1), torch.tensor(0.04), None
    dino_loss_triton(results, *inputs)
    dino_loss_bwd_triton(torch.zeros_like(student), torch.ones(()), *inputs, *results[1:3])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_are_as_accurate_as_the_formula(impl, shape, poison):
    check(impl, *logits(*shape))


@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher", [torch.float32, torch.bfloat16, torch.float16])
def test_each_side_has_its_own_dtype(impl, student, teacher, poison):
    tensors = logits(5, 2, 3, 301, student=student, teacher=teacher)
    if impl == "cpu" and torch.float16 in (student, teacher):
        with pytest.raises(ValueError, match=r"not torch\.float16"):
            check(impl, *tensors)
        check("auto", *tensors)
    else:
        check(impl, *tensors)


@pytest.mark.parametrize(("ts", "tt"), [(0.1, 0.01), (0.01, 0.07), (1.0, 1.0)])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_large_logits_and_small_temperatures(impl, ts, tt, scale):
    check(impl, *logits(4, 2, 2, 500, scale), ts, tt)


def test_gradient_follows_the_upstream_gradient(impl):
    check(impl, *logits(4, 2, 2, 100), upstream=0.37)
    check(impl, *logits(4, 2, 2, 100, student=torch.bfloat16), upstream=1024.0)


def test_pair_weights_choose_and_weigh_the_pairs(impl):
    weights = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.5, 0.0], [0.0, 0.0]])
    check(impl, *logits(4, 2, 3, 100), weights=weights)
    check(impl, *logits(4, 3, 2, 40), weights=torch.rand(4, 3) * (torch.rand(4, 3) > 0.3))
    check(impl, *logits(1, 1, 3, 100), weights=torch.ones(1, 1))


def test_equal_and_one_hot_rows(impl):
    s, t, c = logits(4, 2, 3, 100)
    check(impl, torch.zeros_like(s), torch.zeros_like(t), torch.zeros_like(c))
    s[..., 3] = t[..., 5] = 1e4
    check(impl, s, t, c)


def test_layout_does_not_matter(impl):
    s, t, c = logits(4, 2, 3, 100)
    check(
        impl,
        s.transpose(0, 1).contiguous().transpose(0, 1),
        t.transpose(0, 2).contiguous().transpose(0, 2),
        c,
    )
    check(impl, torch.randn(4, 3, 203)[..., 1:101], torch.randn(2, 3, 200)[..., ::2], torch.randn(200)[::2])
    check(impl, torch.randn(4, 1, 100).expand(4, 3, 100), t, torch.randn(1).expand(100))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_non_finite_logits_give_what_the_formula_gives(impl, side, value):
    s, t, c = logits(4, 2, 3, 100)
    (s if side == "student" else t)[1, 1, 7] = value
    leaf = s.clone().requires_grad_()
    loss = dino_loss(leaf, t, c, student_temp=0.1, teacher_temp=0.4, impl=impl)
    (grad,) = torch.autograd.grad(loss, leaf)
    plain_terms, plain_grad = by_formula(torch.float32, s, t, c, 0.1, 0.4, default_weights(4, 2))
    torch.testing.assert_close(loss.detach(), plain_terms.sum(), equal_nan=True)
    torch.testing.assert_close(grad, plain_grad, equal_nan=True, rtol=1e-4, atol=1e-6)


def test_gradient_of_float64_passes_gradcheck():
    s, t, c = (x.double() for x in logits(3, 2, 2, 9))
    temps = {"student_temp": 0.1, "teacher_temp": 0.04}
    assert torch.autograd.gradcheck(lambda s: dino_loss(s, t, c, **temps), s.requires_grad_())
    assert dino_loss(s, t, c, **temps).dtype == torch.float64


def test_gradient_is_written_over_the_logits_when_asked(impl):
    s, t, c = logits(4, 2, 3, 100)
    leaf, twin = s.clone().requires_grad_(), s.clone().requires_grad_()
    raw, copy = leaf * 2, twin * 2
    temps = {"student_temp": 0.1, "teacher_temp": 0.04, "impl": impl}
    (dino_loss(raw, t, c, **temps, inplace_backward=True) * 3).backward()
    (dino_loss(copy, t, c, **temps) * 3).backward()
    assert torch.equal(leaf.grad, twin.grad)
    assert torch.equal(raw.detach() * 2, leaf.grad)  # the logits' memory holds their gradient
    assert torch.equal(copy, twin * 2)


def test_logits_that_share_memory_are_not_written_over(impl):
    _, t, c = logits(4, 2, 3, 100)
    leaf = torch.randn(4, 1, 100).requires_grad_()
    expanded = leaf.expand(4, 3, 100)
    temps = {"student_temp": 0.1, "teacher_temp": 0.04, "impl": impl}
    (grad,) = torch.autograd.grad(dino_loss(expanded, t, c, **temps, inplace_backward=True), leaf)
    (expected,) = torch.autograd.grad(dino_loss(expanded, t, c, **temps), leaf)
    assert torch.equal(grad, expected)


def test_overwriting_logits_that_autograd_needs_raises(impl):
    s, t, c = logits(4, 2, 3, 100)
    saved = s.requires_grad_().exp()  # exp saves its output for its own backward
    loss = dino_loss(saved, t, c, student_temp=0.1, teacher_temp=0.04, impl=impl, inplace_backward=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_autocast_changes_nothing(impl):
    s, t, c = logits(4, 2, 3, 100)
    temps = {"student_temp": 0.1, "teacher_temp": 0.04, "impl": impl}
    loss = dino_loss(s, t, c, **temps)
    with torch.autocast(s.device.type, dtype=torch.bfloat16):
        assert torch.equal(dino_loss(s, t, c, **temps), loss)


def test_temperatures_may_be_tensors(impl):
    s, t, c = logits(4, 2, 3, 100)
    a = dino_loss(s, t, c, student_temp=torch.tensor(0.1), teacher_temp=torch.tensor([0.04]), impl=impl)
    assert torch.equal(a, dino_loss(s, t, c, student_temp=0.1, teacher_temp=0.04, impl=impl))


def test_no_gradient_reaches_teacher_or_centre(impl):
    s, t, c = (x.requires_grad_() for x in logits(4, 2, 3, 100))
    dino_loss(s, t, c, student_temp=0.1, teacher_temp=0.04, impl=impl).backward()
    assert s.grad is not None
    assert t.grad is None
    assert c.grad is None


def test_compiles_in_one_graph(impl):
    s, t, c = logits(4, 2, 3, 100)
    s.requires_grad_()

    def loss(s: Tensor, temp: Tensor) -> Tensor:
        return dino_loss(s, t, c, student_temp=0.1, teacher_temp=temp, impl=impl)

    compiled, temp = torch.compile(loss, fullgraph=True, backend="aot_eager"), torch.tensor(0.04)
    expected, result = loss(s, temp), compiled(s, temp)
    assert torch.equal(result, expected)
    assert torch.equal(*(torch.autograd.grad(x, s)[0] for x in (result, expected)))


def test_operator_passes_opcheck(impl):
    s, t, c = logits(3, 2, 2, 20)
    temp = torch.tensor(0.1)
    args = (s.requires_grad_(), t, c, temp, temp, default_weights(3, 2), impl, False)
    torch.library.opcheck(_dino_loss, args)


BAD = {
    "student has shape": {"student": (4, 100)},
    "teacher has shape": {"teacher": (0, 3, 100)},
    "differ in images": {"teacher": (2, 2, 100)},
    r"give \(100,\)": {"center": (1, 100)},
    r"\(V, G\) = \(4, 2\)": {"pair_weights": (2, 4)},
    "student_temp is 0": {"student_temp": 0},
    "teacher_temp has shape": {"teacher_temp": (2,)},
    "impl is 'fast'": {"impl": "fast"},
}


@pytest.mark.parametrize(("message", "change"), BAD.items(), ids=str)
def test_impossible_arguments_raise_and_say_what_was_given(message, change):
    good = {
        "student": (4, 3, 100),
        "teacher": (2, 3, 100),
        "center": (100,),
        "student_temp": 0.1,
        "teacher_temp": 0.04,
    }
    args = {n: torch.zeros(x) if isinstance(x, tuple) else x for n, x in (good | change).items()}
    with pytest.raises(ValueError, match=message):
        dino_loss(args.pop("student"), args.pop("teacher"), args.pop("center"), **args)


def test_one_crop_a_side_needs_pair_weights():
    with pytest.raises(ValueError, match="no pair"):
        dino_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(3), student_temp=1, teacher_temp=1)


def test_integers_raise():
    x = torch.zeros(2, 2, 3)
    with pytest.raises(ValueError, match="int64"):
        dino_loss(x.long(), x, torch.zeros(3), student_temp=1, teacher_temp=1)


needs_native = pytest.mark.skipif(not native.isas(), reason=native.describe())


@needs_native
@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set_is_as_accurate(isa, dtype, monkeypatch, poison):
    monkeypatch.setattr(native, "isas", lambda: (isa,))
    for shape in SHAPES:
        check("cpu", *logits(*shape, student=dtype, teacher=dtype))


@needs_native
def test_result_does_not_depend_on_the_number_of_threads(monkeypatch):
    s, t, c = logits(4, 2, 3, 30000)
    results = []
    for threads in (1, 2, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        leaf = s.clone().requires_grad_()
        loss, mean = dino_loss(
            leaf,
            t,
            c,
            student_temp=0.1,
            teacher_temp=0.04,
            impl="cpu",
            return_teacher_mean=True,
        )
        results.append((loss.detach(), mean, torch.autograd.grad(loss, leaf)[0]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
def test_a_large_gradient_is_streamed_past_the_caches(poison):
    check("cpu", *logits(4, 2, 2, 2**19 + 64))  # 16 MiB of gradient and a little


needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")


@pytest.mark.cuda
@needs_gpu
def test_a_step_does_not_wait_for_the_gpu():
    with torch.device("cuda"):
        s, t, c = logits(4, 2, 3, 1000)
    s.requires_grad_()
    try:
        for mode in ("default", "error"):  # the first round compiles
            torch.cuda.set_sync_debug_mode(mode)
            dino_loss(s, t, c, student_temp=0.1, teacher_temp=0.04).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@needs_gpu
def test_a_captured_graph_follows_logits_and_temperature():
    with torch.device("cuda"):
        s, t, c = logits(4, 2, 3, 1000)
        temp = torch.tensor(0.04)
    s.requires_grad_()

    def step() -> Tensor:
        loss = dino_loss(s, t, c, student_temp=torch.full_like(temp, 0.1), teacher_temp=temp)
        return torch.autograd.grad(loss, s)[0]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    t.normal_()
    temp.fill_(0.07)
    graph.replay()
    assert torch.equal(captured, step())


@pytest.mark.cuda
@needs_gpu
def test_addresses_beyond_two_to_the_31():
    v, b, k = 10, 3300, 65536
    s = torch.randn(1, 1, k, device="cuda", dtype=torch.bfloat16).repeat(v, b, 1).requires_grad_()
    t, c = torch.randn(2, 1, k, device="cuda").expand(2, b, k), torch.zeros(k, device="cuda")
    loss = dino_loss(s, t, c, student_temp=0.1, teacher_temp=0.04)
    loss.backward()
    one = s.detach()[:, :1].clone().requires_grad_()
    alone = dino_loss(one, t[:, :1], c, student_temp=0.1, teacher_temp=0.04)
    (alone / b).backward()
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close(s.grad[:, -1], one.grad[:, 0], rtol=2e-2, atol=0)
