"""The projection head against its formula, written out below, and torch's own weight normalisation."""

import copy
import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdino.head import DINOHead, WeightNormLinear

Params = dict[str, Tensor]


def ref_head(p: Params, x: Tensor, nlayers: int, use_bn: bool) -> Tensor:
    """Linear-[BN]-GELU-...-Linear, divided by its length, times the normalised prototypes."""
    step = 3 if use_bn else 2
    for i in range(nlayers):
        name = f"mlp.{i * step}" if nlayers > 1 else "mlp"
        x = x @ p[f"{name}.weight"].T + p[f"{name}.bias"]
        if i == nlayers - 1:
            break
        if use_bn:
            name = f"mlp.{i * step + 1}"
            x = x - x.mean(0)
            x = x / (x.square().mean(0) + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]
        x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
    x = x / x.square().sum(-1, keepdim=True).sqrt()
    v = p["last_layer.weight_v"]
    return x @ (p["last_layer.weight_g"] * v / v.square().sum(1, keepdim=True).sqrt()).T


def randomised(head: DINOHead) -> DINOHead:
    """The head with every parameter far from 0 and 1, so that no term of the formula can hide."""
    with torch.no_grad():
        for name, p in head.named_parameters():
            bias = 0.0 if name.endswith("bias") or p.ndim > 1 else 1.0
            p.copy_(torch.randn_like(p) * p[0].numel() ** -0.5 * (1.0 if p.ndim > 1 else 0.3) + bias)
    return head


def params(head: nn.Module, dtype: torch.dtype) -> Params:
    return {name: p.detach().to(dtype).requires_grad_() for name, p in head.named_parameters()}


# Every depth has its own names; batch norm shifts them and needs more than one image; one image without it.
@pytest.mark.parametrize(
    ("nlayers", "use_bn", "images"),
    [(1, False, 5), (2, False, 1), (3, False, 4), (3, True, 16), (4, True, 16)],
)
def test_forward_and_gradients_match_the_formula(nlayers: int, use_bn: bool, images: int) -> None:
    head = DINOHead(7, 33, use_bn, norm_last_layer=False, nlayers=nlayers, hidden_dim=19, bottleneck_dim=5)
    randomised(head)
    features, upstream = torch.randn(images, 7), torch.randn(images, 33)

    def run(ours: bool, dtype: torch.dtype) -> Params:
        p, x = params(head, dtype), features.detach().to(dtype).requires_grad_()
        out = torch.func.functional_call(head, p, (x,)) if ours else ref_head(p, x, nlayers, use_bn)
        out.backward(upstream.to(dtype))
        return {"out": out.detach(), "x": x.grad} | {name: value.grad for name, value in p.items()}

    got, plain, truth = run(True, torch.float32), run(False, torch.float32), run(False, torch.float64)

    # The mean square over all tensors of their relative errors: that of one small tensor is luck.
    # The gradient of a bias before a batch norm is 0, and rounding noise in any form.
    live = {name for name, t in truth.items() if t.norm() > 1e-9}
    dead = truth.keys() - live
    assert dead == {f"mlp.{3 * i}.bias" for i in range(nlayers - 1) if use_bn}
    assert all(got[name].abs().max() < 1e-4 for name in dead)

    def error(values: Params) -> float:
        errors = [(values[n].double() - truth[n]).norm() / truth[n].norm() for n in live]
        return torch.stack(errors).square().mean().sqrt().item()

    assert error(got) <= 2 * error(plain) + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_accurate_as_the_formula_under_autocast(dtype: torch.dtype) -> None:
    head = randomised(DINOHead(16, 50, hidden_dim=32, bottleneck_dim=12))
    x = torch.randn(9, 16)
    truth = ref_head(params(head, torch.float64), x.double(), 3, False)
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        ours, plain = head(x), ref_head(params(head, torch.float32), x, 3, False)
    assert ours.dtype == dtype
    rounding = torch.finfo(dtype).eps * truth.abs().max()
    assert (ours.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + rounding


@pytest.mark.parametrize("scale", [3e4, 1e-6])
def test_lengths_that_do_not_fit_in_fp16_are_normalised(scale: float) -> None:
    """A norm above 65504 would become inf and the logits 0; one of denormals would lose its digits."""
    head = DINOHead(8, 20, nlayers=1, bottleneck_dim=8)
    with torch.no_grad():
        head.mlp.weight.copy_(torch.eye(8))
    head.half()
    x = (torch.randn(4, 8).sign() * scale).half()
    truth = ref_head(params(head, torch.float64), x.double(), 1, False)
    ours = head(x)
    assert ours.dtype == torch.float16
    assert (ours.double() - truth).abs().max() < 4 * torch.finfo(torch.float16).eps


def test_a_vector_of_zeros_gives_zeros() -> None:
    head = DINOHead(4, 6, nlayers=1, bottleneck_dim=3)  # biases are 0
    x = torch.zeros(2, 4, requires_grad=True)
    out = head(x)
    out.sum().backward()
    assert (out == 0).all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


# Numbers of the MLP's linear layers and batch norms, by options.
@pytest.mark.parametrize(
    ("options", "linear", "norm"),
    [
        ({}, [".0", ".2", ".4"], []),
        ({"use_bn": True}, [".0", ".3", ".6"], [".1", ".4"]),
        ({"nlayers": 1}, [""], []),
        ({"nlayers": 1, "use_bn": True}, [""], []),
        ({"nlayers": 2}, [".0", ".2"], []),
        ({"nlayers": 4, "use_bn": True}, [".0", ".3", ".6", ".9"], [".1", ".4", ".7"]),
    ],
)
def test_state_dict_names_are_official_dinos(
    options: dict[str, Any], linear: list[str], norm: list[str]
) -> None:
    state = DINOHead(8, 20, **options, hidden_dim=16, bottleneck_dim=4).state_dict()
    expected = {f"mlp{i}.{kind}" for i in linear for kind in ("weight", "bias")}
    kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected |= {f"mlp{i}.{kind}" for i in norm for kind in kinds}
    assert set(state) == expected | {"last_layer.weight_g", "last_layer.weight_v"}
    assert state["last_layer.weight_g"].shape == (20, 1)
    assert state["last_layer.weight_v"].shape == (20, 4)
    widths = [8] + [16] * (len(linear) - 1) + [4]
    for i, (a, b) in zip(linear, itertools.pairwise(widths), strict=True):
        assert state[f"mlp{i}.weight"].shape == (b, a)


def test_defaults_are_official_dinos() -> None:
    with torch.device("meta"):
        head = DINOHead(384, 65536)
    assert [tuple(p.shape) for p in head.mlp.parameters()][::2] == [(2048, 384), (2048, 2048), (256, 2048)]
    assert sum(p.numel() for p in head.parameters()) == 22_352_128  # 22.3 M; weight_g among them


def test_prototypes_follow_their_formula_in_value_and_gradient() -> None:
    ours = WeightNormLinear(6, 11)
    nn.init.uniform_(ours.weight_g, 0.5, 2)
    g, v, x = (t.detach().double().requires_grad_() for t in (*ours.parameters(), torch.randn(4, 6)))
    weight = g * v / v.square().sum(dim=1, keepdim=True).sqrt()
    (x @ weight.T).square().sum().backward()

    given = x.detach().float().requires_grad_()
    out = ours(given)
    out.square().sum().backward()
    pairs = [(out, x @ weight.T), (ours.weight, weight), (given.grad, x.grad)]
    for actual, expected in [*pairs, (ours.weight_g.grad, g.grad), (ours.weight_v.grad, v.grad)]:
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


def test_prototypes_have_the_names_of_torchs_weight_norm() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = nn.utils.weight_norm(nn.Linear(6, 11, bias=False))
    WeightNormLinear(6, 11).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("frozen", [True, False])
def test_norm_last_layer_freezes_the_lengths_at_one(frozen: bool) -> None:
    head = DINOHead(8, 20, norm_last_layer=frozen, nlayers=2, hidden_dim=16, bottleneck_dim=4)
    head(torch.randn(3, 8)).square().sum().backward()
    without_grad = [name for name, p in head.named_parameters() if p.grad is None]
    assert without_grad == (["last_layer.weight_g"] if frozen else [])
    assert (head.last_layer.weight_g == 1).all()
    assert copy.deepcopy(head).last_layer.weight_g.requires_grad is not frozen


def test_initial_weights_are_official_dinos() -> None:
    head = DINOHead(64, 500, use_bn=True, hidden_dim=256, bottleneck_dim=128)
    for name, p in head.named_parameters():
        if name == "last_layer.weight_v":  # as nn.Linear: uniform within 1 / sqrt(fan in)
            assert p.abs().max() <= 128**-0.5
            assert p.std().item() == pytest.approx(128**-0.5 / math.sqrt(3), rel=0.02)
        elif p.ndim == 2 and name.startswith("mlp"):
            assert p.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * p.numel())), name
        else:  # weight_g and the batch norms' scales are 1, biases 0
            assert (p == (0 if name.endswith("bias") else 1)).all(), name


def test_a_parameter_left_uninitialised_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    head = DINOHead(8, 20, use_bn=True, hidden_dim=16)
    head.forgotten = nn.Parameter(torch.ones(3))
    head.init_weights()
    assert [name for name, p in head.named_parameters() if p.isnan().any()] == ["forgotten"]
    monkeypatch.setattr(WeightNormLinear, "reset_parameters", lambda self: None)
    head = DINOHead(8, 20, hidden_dim=16)
    assert head(torch.zeros(1, 8)).isnan().all()


def test_a_head_built_on_meta_can_be_initialised_later() -> None:
    with torch.device("meta"):
        head = DINOHead(8, 20, use_bn=True, hidden_dim=16)
    head = head.to_empty(device="cpu")
    head.init_weights()
    fresh = DINOHead(8, 20, use_bn=True, hidden_dim=16)
    for (name, value), other in zip(head.named_buffers(), fresh.buffers(), strict=True):
        assert torch.equal(value, other), name
    assert head(torch.randn(3, 8)).isfinite().all()


@pytest.mark.parametrize("use_bn", [True, False])
def test_copies_and_loaded_heads_give_the_same_numbers_and_share_nothing(use_bn: bool) -> None:
    head = randomised(DINOHead(8, 20, use_bn, hidden_dim=16, bottleneck_dim=4))
    head(torch.randn(5, 8)).sum().backward()  # moves the batch norms' statistics, and leaves a graph behind
    loaded = DINOHead(8, 20, use_bn, hidden_dim=16, bottleneck_dim=4)
    loaded.load_state_dict(head.state_dict())
    x = torch.randn(3, 8)
    own = {p.data_ptr() for p in head.parameters()}
    for other in (copy.deepcopy(head), loaded):
        assert torch.equal(other.eval()(x), head.eval()(x))
        assert own.isdisjoint(p.data_ptr() for p in other.parameters())


def test_forward_compiles_without_a_graph_break() -> None:
    head = DINOHead(8, 20, use_bn=True, hidden_dim=16, bottleneck_dim=4)
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    x = torch.randn(3, 8)
    assert torch.equal(compiled(x), head(x))


def test_a_head_without_layers_is_named() -> None:
    with pytest.raises(ValueError, match="nlayers 0: give 1 or more"):
        DINOHead(8, 20, nlayers=0)
