"""Linear against the matrix product in float64, and where it leaves the work to torch's own."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdino.ops import Linear, linear
from fastdino.ops.linear import linear_ref
from fastdino.ops.native import ONEDNN

onednn = pytest.mark.skipif(not ONEDNN, reason="this processor has no AVX-512, or torch no oneDNN")


class Seen(TorchDispatchMode):
    """The operators that run within, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    def ours(self) -> int:
        return sum(name.startswith("fastdino::") for name in self.names)


def run(f: Callable[..., Tensor], inputs: list[Tensor | None], upstream: Tensor) -> list[Tensor]:
    """The value, and the gradient of each input that there is."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    out = f(*leaves)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves if x is not None)]


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = torch.einsum("...i,oi->...o", x, weight)
    return out if bias is None else out + bias


def assert_as_accurate(
    ours: list[Tensor], plain: list[Tensor], truth: list[Tensor], terms: list[Tensor]
) -> None:
    """Each error at most twice that of torch's own form, plus one rounding: of the result, or where that is a
    few numbers, whose error is luck, of the terms that they sum."""
    for i, (a, b, true, summed) in enumerate(zip(ours, plain, truth, terms, strict=True)):
        assert a.shape == true.shape
        assert a.dtype == b.dtype
        rounding = torch.finfo(a.dtype).eps * (true if true.numel() > 64 else summed).norm()
        bound = 2 * (b.double() - true).norm() + rounding
        assert (a.double() - true).norm() <= bound, ("out", "x", "weight", "bias")[i]


def check(x: Tensor, weight: Tensor, bias: Tensor | None, upstream: Tensor | None = None) -> None:
    if upstream is None:
        upstream = torch.randn(*x.shape[:-1], len(weight))
    inputs = [x, weight, bias]
    with Seen() as seen:
        ours = run(linear, inputs, upstream)
    assert seen.ours() == 3 * ONEDNN  # the output and two gradients
    plain = run(F.linear, inputs, upstream)

    wide = [None if x is None else x.double() for x in inputs]
    truth = run(product, wide, upstream)
    terms = run(product, [None if x is None else x.abs() for x in wide], upstream.abs())
    assert_as_accurate(ours, plain, truth, terms)


# ViT-S's four layers, and what no tile divides; the gradient of the weight takes one of two forms by which
# side is wider.
WIDTHS = [(384, 1536), (1536, 384), (1, 1), (1, 7), (7, 1), (37, 61), (129, 65)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 40, 2760])
@pytest.mark.parametrize(("columns", "out"), WIDTHS)
def test_linear_is_the_matrix_product_in_value_and_gradient(
    rows: int, columns: int, out: int, bias: bool, poison: None
) -> None:
    check(torch.randn(rows, columns), torch.randn(out, columns), torch.randn(out) if bias else None)


@pytest.mark.parametrize("shape", [(40, 37), (5, 8, 37), (1, 1, 37), (2, 3, 4, 37), (3, 1, 37), (37,)])
def test_any_number_of_dimensions_goes_before_the_channels(shape: tuple[int, ...], poison: None) -> None:
    check(torch.randn(shape), torch.randn(61, 37), torch.randn(61))


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def every_second(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=0)[::2]


def of_wider(x: Tensor) -> Tensor:
    return torch.cat((x, x), dim=-1)[..., : x.shape[-1]]


@pytest.mark.parametrize("form", [transposed, every_second, of_wider])
@pytest.mark.parametrize("which", ["x", "weight", "upstream"])
def test_strides_do_not_matter(which: str, form: Callable[[Tensor], Tensor]) -> None:
    tensors = {"x": torch.randn(5, 8, 37), "weight": torch.randn(61, 37), "upstream": torch.randn(5, 8, 61)}
    tensors[which] = form(value := tensors[which])
    assert not tensors[which].is_contiguous()
    assert torch.equal(tensors[which], value)
    check(tensors["x"], tensors["weight"], torch.randn(61), tensors["upstream"])


def test_an_expanded_gradient_counts_for_every_row() -> None:
    """As that of a sum, which has strides of 0."""
    check(torch.randn(40, 37), torch.randn(61, 37), torch.randn(61), torch.ones(1, 1).expand(40, 61))


def test_the_same_image_in_every_row() -> None:
    check(torch.randn(1, 37).expand(40, 37), torch.randn(61, 37), torch.randn(61))


def test_parts_of_a_weight_are_weights() -> None:
    """The last block takes the queries' third of one, and the keys' and values' two thirds."""
    x, weight, bias = torch.randn(40, 24), torch.randn(72, 24), torch.randn(72)

    def parts(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight, bias: torch.cat(
            (f(x, weight[:24], bias[:24]), f(x, weight[24:], bias[24:])), 1
        )

    upstream = torch.randn(40, 72)
    ours, plain = (run(parts(f), [x, weight, bias], upstream) for f in (linear, F.linear))
    truth = run(product, [x.double(), weight.double(), bias.double()], upstream)
    assert_as_accurate(ours, plain, truth, truth)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "all"])
def test_what_is_frozen_gets_no_gradient_and_costs_nothing(frozen: str) -> None:
    tensors = {"x": torch.randn(40, 37), "weight": torch.randn(61, 37), "bias": torch.randn(61)}
    upstream = torch.randn(40, 61)
    leaves, twins = (
        {name: x.detach().clone().requires_grad_(frozen not in (name, "all")) for name, x in tensors.items()}
        for _ in range(2)
    )
    with Seen() as seen:
        out = linear(*leaves.values())
        assert out.requires_grad == (frozen != "all")
        if frozen != "all":
            out.backward(upstream)
    expected = {"x": 2, "weight": 2, "bias": 3, "all": 1}
    assert seen.ours() == expected[frozen] * ONEDNN
    if frozen != "all":
        F.linear(*twins.values()).backward(upstream)
    for name, leaf in leaves.items():
        if frozen in (name, "all"):
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, twins[name].grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 37), (3, 0, 37)])
def test_no_rows_give_no_rows_and_gradients_of_zero(shape: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(shape), torch.randn(61, 37), torch.randn(61)
    out, *gradients = run(linear, [x, weight, bias], torch.randn(*shape[:-1], 61))
    assert out.shape == (*shape[:-1], 61)
    for gradient, tensor in zip(gradients, (x, weight, bias), strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_torchs_own_bit_for_bit(dtype: torch.dtype) -> None:
    inputs = [torch.randn(shape).to(dtype) for shape in ((40, 37), (61, 37), (61,))]
    with Seen() as seen:
        ours = run(linear, inputs, torch.ones(40, 61))
    assert seen.ours() == 0
    for a, b in zip(ours, run(F.linear, inputs, torch.ones(40, 61)), strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b)


def test_autocast_is_torchs_own_bit_for_bit() -> None:
    inputs = [torch.randn(shape) for shape in ((40, 37), (61, 37), (61,))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with Seen() as seen:
            ours = run(linear, inputs, torch.ones(40, 61))
        plain = run(F.linear, inputs, torch.ones(40, 61))
    assert seen.ours() == 0
    assert [x.dtype for x in ours] == [torch.bfloat16, *[torch.float32] * 3]
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_a_mixture_of_types_is_torchs_error() -> None:
    for other in (torch.bfloat16, torch.float64):
        with pytest.raises(RuntimeError, match="dtype"):
            linear(torch.randn(4, 3), torch.randn(2, 3).to(other))
        with pytest.raises(RuntimeError, match="dtype"):
            linear(torch.randn(4, 3).to(other), torch.randn(2, 3))
    with pytest.raises(RuntimeError):
        linear(torch.randn(4, 3), torch.randn(2, 5))


def test_the_specification_is_torchs() -> None:
    inputs = (torch.randn(40, 37), torch.randn(61, 37), torch.randn(61))
    assert torch.equal(linear_ref(*inputs), F.linear(*inputs))


def test_the_layer_is_torchs_in_names_start_and_values() -> None:
    torch.manual_seed(3)
    ours = Linear(37, 61)
    torch.manual_seed(3)
    plain = nn.Linear(37, 61)
    for (name, a), (expected, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert name == expected
        assert torch.equal(a, b)
    assert isinstance(ours, nn.Linear)  # by which networks find what to initialise
    x = torch.randn(5, 8, 37)
    with Seen() as seen:
        out = ours(x)
    assert seen.ours() == ONEDNN
    exact = x.double() @ plain.weight.double().T + plain.bias.double()
    assert_as_accurate([out.detach()], [plain(x).detach()], [exact.detach()], [exact.detach()])
    assert list(dict(Linear(37, 61, bias=False).named_parameters())) == ["weight"]
    assert Linear(37, 61, bias=False)(x).shape == (5, 8, 61)


@onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40, 37), (2, 3, 37), (1, 37)])
def test_the_operator_keeps_torchs_rules_for_operators(shape: tuple[int, ...], bias: bool) -> None:
    inputs = (
        torch.randn(shape, requires_grad=True),
        torch.randn(61, 37, requires_grad=True),
        torch.randn(61, requires_grad=True) if bias else None,
    )
    torch.library.opcheck(torch.ops.fastdino.linear_onednn.default, inputs)


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True])
def test_linear_compiles_without_a_graph_break(dynamo: None, dynamic: bool) -> None:
    graphs: list[str] = []

    def backend(module: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(str(module.graph))
        return torch._dynamo.lookup_backend("aot_eager")(module, example)

    compiled = torch.compile(linear, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (40, 23):
        inputs, upstream = (
            [torch.randn(rows, 37), torch.randn(61, 37), torch.randn(61)],
            torch.randn(rows, 61),
        )
        ours, expected = (run(f, inputs, upstream) for f in (compiled, linear))
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert len(graphs) == (1 if dynamic else 2)
    assert all(("fastdino.linear_onednn" in graph) == ONEDNN for graph in graphs)


def test_an_exported_graph_holds_torchs_operators_alone() -> None:
    layer, x = Linear(37, 61), torch.randn(40, 37)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names
    assert not any("fastdino" in name or "mkldnn" in name for name in names)
    x = torch.randn(23, 37)
    torch.testing.assert_close(program.module()(x), F.linear(x, layer.weight, layer.bias))
