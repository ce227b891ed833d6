"""The vision transformer against the formulas, written out below in plain tensor operations."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdino import vit
from fastdino.vit import VisionTransformer, drop_path, vit_base, vit_large, vit_nano, vit_small, vit_tiny

Params = dict[str, Tensor]


def cubic(t: Tensor) -> Tensor:
    """Keys' convolution kernel with a = -0.75."""
    t, a = t.abs(), -0.75
    near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
    return torch.where(t <= 1, near, torch.where(t < 2, far, 0.0))


def resampling(base: int, size: int, dtype: torch.dtype) -> Tensor:
    """Weights (size, base) of bicubic interpolation of one axis, at the scale (size + 0.1) / base."""
    at = (torch.arange(size, dtype=dtype) + 0.5) * (1 / ((size + 0.1) / base)) - 0.5
    weights = torch.zeros(size, base, dtype=dtype)
    for offset in (-1, 0, 1, 2):  # pixels beyond the edge repeat it
        pixel = at.floor() + offset
        weights.scatter_add_(1, pixel.long().clamp(0, base - 1)[:, None], cubic(at - pixel)[:, None])
    return weights


def ref_positions(p: Params, grid: tuple[int, int], rows: int, columns: int, keep: bool = False) -> Tensor:
    positions = p["pos_embed"][0]
    if keep:
        return positions
    patches = positions[1:].reshape(*grid, -1)
    by_row, by_column = (
        resampling(*sizes, patches.dtype) for sizes in zip(grid, (rows, columns), strict=True)
    )
    patches = torch.einsum("ri,cj,ijd->rcd", by_row, by_column, patches)
    return torch.cat((positions[:1], patches.flatten(0, 1)))


def ref_norm(x: Tensor, p: Params, name: str) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def ref_linear(x: Tensor, p: Params, name: str) -> Tensor:
    x = x @ p[f"{name}.weight"].T
    return x + p[f"{name}.bias"] if f"{name}.bias" in p else x


def ref_attention(x: Tensor, p: Params, i: int, heads: int) -> tuple[Tensor, Tensor]:
    """Weights (B, heads, N, N) and output (B, N, D) of the attention of block i, given the block's input."""
    qkv = ref_linear(ref_norm(x, p, f"blocks.{i}.norm1"), p, f"blocks.{i}.attn.qkv")
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).exp()
    weights = scores / scores.sum(-1, keepdim=True)
    return weights, ref_linear((weights @ v).transpose(1, 2).flatten(2), p, f"blocks.{i}.attn.proj")


def ref_mlp(x: Tensor, p: Params, i: int) -> Tensor:
    x = ref_linear(ref_norm(x, p, f"blocks.{i}.norm2"), p, f"blocks.{i}.mlp.fc1")
    return ref_linear(x * (1 + torch.erf(x / math.sqrt(2))) / 2, p, f"blocks.{i}.mlp.fc2")


def ref_tokens(p: Params, x: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    rows, columns = x.shape[2] // patch, x.shape[3] // patch
    keep = (rows, columns) == grid and (x.shape[2] == x.shape[3] or rows != columns)
    x = x[:, :, : rows * patch, : columns * patch]
    x = x.reshape(len(x), -1, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    x = x @ p["patch_embed.proj.weight"].flatten(1).T + p["patch_embed.proj.bias"]
    x = torch.cat((p["cls_token"].expand(len(x), -1, -1), x), dim=1)
    return x + ref_positions(p, grid, rows, columns, keep)


def ref_blocks(p: Params, x: Tensor, patch: int, heads: int, grid: tuple[int, int]) -> list[Tensor]:
    """The tokens before the first block and after each."""
    outputs = [ref_tokens(p, x, patch, grid)]
    for i in range(sum(name.endswith("norm1.weight") for name in p)):
        x = outputs[-1] + ref_attention(outputs[-1], p, i, heads)[1]
        outputs.append(x + ref_mlp(x, p, i))
    return outputs


def ref_forward(p: Params, x: Tensor, patch: int, heads: int, grid: tuple[int, int]) -> Tensor:
    return ref_norm(ref_blocks(p, x, patch, heads, grid)[-1], p, "norm")[:, 0]


def randomised(model: nn.Module) -> Any:
    """The model with every parameter far from 0 and 1, so that no term of a formula can hide."""
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn_like(parameter) * scale + (0.5 if parameter.ndim == 1 else 0.0))
    return model.eval()


def params(model: nn.Module, dtype: torch.dtype) -> Params:
    return {name: p.detach().to(dtype).requires_grad_() for name, p in model.named_parameters()}


def assert_as_accurate(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Our error is at most twice the plain form's, plus one rounding to the dtype of the result."""
    rounding = torch.finfo(ours.dtype).eps * truth.abs().max()
    bound = 2 * (plain.double() - truth).abs().max() + rounding
    error = (ours.double() - truth).abs().max()
    assert error <= bound, f"error {error:.3g} above {bound:.3g}"


# Each row is one path through patches and positions: a size that is no multiple, on another grid; the base
# grid; a rectangular base grid, shrunk; one patch; one row. Channels 1, 3, 5; batch 1 too.
SHAPES: list[tuple[dict[str, Any], tuple[int, int, int, int]]] = [
    ({"patch_size": 5, "img_size": 30, "in_chans": 1}, (3, 1, 37, 61)),
    ({"patch_size": 4, "img_size": 16}, (1, 3, 16, 16)),
    ({"patch_size": 8, "img_size": (48, 32), "in_chans": 5, "qkv_bias": False}, (2, 5, 33, 17)),
    ({"patch_size": 16, "img_size": (16, 37)}, (2, 3, 31, 16)),
    ({"patch_size": 3, "img_size": 10, "mlp_ratio": 2.5}, (2, 3, 3, 20)),
]


@pytest.mark.parametrize(("options", "shape"), SHAPES, ids=str)
def test_forward_and_gradients_match_the_formulas(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    model = randomised(VisionTransformer(embed_dim=24, depth=3, num_heads=4, **options))
    images, upstream = torch.randn(shape), torch.randn(shape[0], 24)

    def run(forward: Callable[[Params, Tensor], Tensor], dtype: torch.dtype) -> Params:
        p, x = params(model, dtype), images.detach().to(dtype).requires_grad_()
        out = forward(p, x)
        out.backward(upstream.to(dtype))
        return {"out": out.detach(), "x": x.grad} | {name: value.grad for name, value in p.items()}

    def ours(p: Params, x: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (x,))

    def plain(p: Params, x: Tensor) -> Tensor:
        return ref_forward(p, x, model.patch_size, 4, model.grid)

    got, expected, truth = run(ours, torch.float32), run(plain, torch.float32), run(plain, torch.float64)

    # The mean square over all tensors of their relative errors: that of one small tensor is luck.
    def error(values: Params) -> float:
        errors = [(values[name].double() - t).norm() / t.norm() for name, t in truth.items()]
        return torch.stack(errors).square().mean().sqrt().item()

    assert error(got) <= 2 * error(expected) + torch.finfo(torch.float32).eps


def test_bf16_autocast_is_as_accurate_as_the_formulas_under_bf16_autocast() -> None:
    model = randomised(VisionTransformer(32, 4, embed_dim=32, depth=3, num_heads=4))
    p, x, shape = params(model, torch.float32), torch.randn(4, 3, 20, 28), (4, 4, model.grid)
    truth = ref_forward(params(model, torch.float64), x.double(), *shape)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        ours, plain = model(x), ref_forward(p, x, *shape)
    assert (ours.double() - truth).abs().max() > 1e-4  # autocast was at work
    rounding = torch.finfo(torch.bfloat16).eps * truth.abs().max()
    assert (ours.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + rounding


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("size", [16, 24])
def test_the_residual_keeps_one_dtype(autocast: bool, size: int) -> None:
    """float32 from patches to output under autocast; bf16 throughout when the network itself is bf16."""
    model = VisionTransformer(16, 4, embed_dim=16, depth=3, num_heads=2, drop_path_rate=0.5)
    images, expected = torch.randn(2, 3, size, size), torch.float32
    if not autocast:
        model, images, expected = model.bfloat16(), images.bfloat16(), torch.bfloat16
    seen = [] if (tokens := model.prepare_tokens(images).dtype) == expected else [tokens]
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.extend((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = model(images)
    assert seen == [expected] * 6
    assert out.dtype == expected


@pytest.mark.parametrize(
    ("make", "dim", "depth", "heads", "count"),
    [
        (vit_nano, 128, 4, 4, 917_120),
        (vit_tiny, 192, 12, 3, 5_524_416),
        (vit_small, 384, 12, 6, 21_665_664),
        (vit_base, 768, 12, 12, 85_798_656),
        (vit_large, 1024, 24, 16, 303_301_632),
    ],
)
def test_sizes_are_the_published_ones(
    make: Callable[..., VisionTransformer], dim: int, depth: int, heads: int, count: int
) -> None:
    with torch.device("meta"):
        model, fine = make(), make(patch_size=8)
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (dim, depth, heads)
    assert (model.patch_size, fine.patch_size) == (16, 8)
    assert sum(p.numel() for p in model.parameters()) == count
    assert fine.pos_embed.shape == (1, 1 + 28 * 28, dim)


def test_state_dict_names_and_shapes_are_official_dinos() -> None:
    with torch.device("meta"):
        model = vit_small()
    d = 384
    expected = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, 197, d),
        "patch_embed.proj.weight": (d, 3, 16, 16),
        "patch_embed.proj.bias": (d,),
    }
    for i in range(12):
        for name, shape in {
            "norm1": (d,),
            "attn.qkv": (3 * d, d),
            "attn.proj": (d, d),
            "norm2": (d,),
            "mlp.fc1": (4 * d, d),
            "mlp.fc2": (d, 4 * d),
        }.items():
            expected[f"blocks.{i}.{name}.weight"] = shape
            expected[f"blocks.{i}.{name}.bias"] = shape[:1]
    expected |= {"norm.weight": (d,), "norm.bias": (d,)}
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    with torch.device("meta"):
        unbiased = vit_small(qkv_bias=False)
    assert expected.keys() - unbiased.state_dict().keys() == {f"blocks.{i}.attn.qkv.bias" for i in range(12)}


def test_last_selfattention_is_the_weights_of_the_last_block() -> None:
    model = randomised(VisionTransformer(20, 4, embed_dim=24, depth=3, num_heads=4))
    x = torch.randn(2, 3, 28, 17)
    with torch.no_grad():
        ours = model.get_last_selfattention(x)
        layers = ref_blocks(params(model, torch.float32), x, 4, 4, model.grid)
        plain, _ = ref_attention(layers[-2], params(model, torch.float32), 2, 4)
        p = params(model, torch.float64)
        layers = ref_blocks(p, x.double(), 4, 4, model.grid)
        truth, _ = ref_attention(layers[-2], p, 2, 4)
        assert ours.shape == (2, 4, 1 + 7 * 4, 1 + 7 * 4)
        assert_as_accurate(ours, plain, truth)
        assert_as_accurate(ours.sum(-1), plain.sum(-1), torch.ones(2, 4, 29, dtype=torch.float64))
        # With the values, the projection and the MLP, these weights give what the block itself gives.
        inputs = model.prepare_tokens(x)
        for block in model.blocks[:-1]:
            inputs = block(inputs)
        last = model.blocks[-1]
        values = last.attn.heads(last.norm1(inputs))[2]
        rebuilt = inputs + last.attn.proj((ours @ values).transpose(1, 2).flatten(2))
        rebuilt = rebuilt + last.mlp(last.norm2(rebuilt))
        plain = ref_blocks(params(model, torch.float32), x, 4, 4, model.grid)[-1]
        assert_as_accurate(rebuilt, plain, layers[-1])
        assert_as_accurate(last(inputs), plain, layers[-1])


def test_intermediate_layers_are_the_last_blocks_each_normed() -> None:
    model = randomised(VisionTransformer(16, 4, embed_dim=24, depth=4, num_heads=4))
    x = torch.randn(2, 3, 12, 20)
    with torch.no_grad():
        for n in (1, 3, 4):
            layers = model.get_intermediate_layers(x, n)
            plain, truth = (
                [ref_norm(out, p, "norm") for out in ref_blocks(p, x.to(dtype), 4, 4, model.grid)[1:]]
                for dtype in (torch.float32, torch.float64)
                for p in [params(model, dtype)]
            )
            assert len(layers) == n
            for ours, a, b in zip(layers, plain[-n:], truth[-n:], strict=True):
                assert ours.shape == (2, 1 + 3 * 5, 24)
                assert_as_accurate(ours, a, b)
            assert_as_accurate(layers[-1][:, 0], model(x), truth[-1][:, 0])
        assert torch.equal(model.get_intermediate_layers(x)[0], layers[-1])


# Larger, smaller, mixed, from one row, from one patch, a rectangle of as many patches as the base grid.
@pytest.mark.parametrize(
    ("base", "grid"),
    [
        ((6, 6), (13, 11)),
        ((14, 14), (6, 6)),
        ((5, 9), (11, 4)),
        ((1, 7), (3, 5)),
        ((1, 1), (4, 2)),
        ((4, 4), (2, 8)),
        ((4, 4), (4, 4)),  # the base grid, of an image that is not square
    ],
)
def test_position_embedding_is_interpolated_as_official_dinos(
    base: tuple[int, int], grid: tuple[int, int]
) -> None:
    model = VisionTransformer((base[0] * 4 + 3, base[1] * 4), 4, embed_dim=6, num_heads=2, depth=1)
    nn.init.normal_(model.pos_embed)
    assert model.grid == base
    ours = model.interpolate_pos_embed(grid[0] * 4 + 1, grid[1] * 4)[0].detach()
    truth = ref_positions(params(model, torch.float64), base, *grid)
    plain = ref_positions(params(model, torch.float32), base, *grid)
    assert_as_accurate(ours, plain, truth)
    assert torch.equal(ours[0], model.pos_embed[0, 0])
    assert model.interpolate_pos_embed(base[0] * 4, base[1] * 4) is model.pos_embed


def test_the_tenth_in_the_position_scale_matters() -> None:
    model = VisionTransformer(56, 4, embed_dim=6, num_heads=2, depth=1)
    nn.init.normal_(model.pos_embed)
    patches = model.pos_embed[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    by_size = nn.functional.interpolate(patches, size=(6, 6), mode="bicubic").flatten(2).mT
    assert (model.interpolate_pos_embed(24, 24)[:, 1:] - by_size).abs().max() > 0.01


def test_a_position_embedding_of_the_wrong_size_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = VisionTransformer(16, 4, embed_dim=6, num_heads=2, depth=1)
    monkeypatch.setattr(vit.F, "interpolate", lambda x, **kwargs: x)
    with pytest.raises(ValueError, match=r"4 x 4 patches became 4 x 4, not 5 x 6"):
        model(torch.zeros(1, 3, 20, 24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_path_drops_whole_samples_and_keeps_the_expectation(dtype: torch.dtype) -> None:
    x = torch.rand(20_000, 2, 3).to(dtype) + 1
    out = drop_path(x, 0.1)
    kept = (out != 0).flatten(1)
    assert out.dtype == dtype
    assert torch.equal(kept.all(1), kept.any(1))  # a sample is kept whole or not at all
    torch.testing.assert_close(
        out[kept.all(1)].double(), x[kept.all(1)].double() / 0.9, rtol=torch.finfo(dtype).eps, atol=0
    )
    # The standard deviation of the share kept is 0.3 / sqrt(20000) = 0.0021, relative to 0.9 it is 0.0024.
    assert abs(kept.all(1).double().mean() - 0.9) < 5 * 0.0021
    assert abs(out.double().mean() / x.double().mean() - 1) < 5 * 0.0024
    # A mask of 1 / 0.9 rounded to bf16 would scale every kept sample by 0.9984.
    assert abs((out[kept.all(1)].double() / x[kept.all(1)].double()).mean() * 0.9 - 1) < 2e-4


def test_each_branch_of_each_sample_is_dropped_on_its_own() -> None:
    block = randomised(vit.Block(8, 2, 2.0, True, drop_rate=0.5)).train()
    p = {f"blocks.0.{name}": value for name, value in params(block, torch.float32).items()}
    x = torch.randn(1, 5, 8)
    with torch.no_grad():
        attended = ref_attention(x, p, 0, 2)[1]
        first = [x, x + 2 * attended]  # the branch dropped, or kept and doubled
        possible = torch.cat([after + keep * ref_mlp(after, p, 0) for after in first for keep in (0, 2)])
        out = block(x.expand(200, -1, -1))
    distances = (out[:, None] - possible).abs().amax((2, 3))
    assert distances.amin(1).max() < 1e-5
    counts = distances.argmin(1).bincount(minlength=4)
    assert (counts - 50).abs().max() < 5 * math.sqrt(200 * 0.25 * 0.75)


def test_drop_path_rates_grow_linearly_and_act_only_in_training() -> None:
    small: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "num_heads": 2}
    model, plain = VisionTransformer(**small, drop_path_rate=0.3), VisionTransformer(**small)
    assert [b.drop_rate for b in model.blocks] == pytest.approx(torch.linspace(0, 0.3, 12).tolist())
    assert VisionTransformer(**small, depth=1, drop_path_rate=0.3).blocks[0].drop_rate == 0
    plain.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert not torch.equal(model(x), plain(x))
        assert torch.equal(model.eval()(x), plain.eval()(x))
        assert torch.equal(plain.train()(x), plain.eval()(x))


def test_initial_weights_are_official_dinos() -> None:
    model = vit_nano()
    for name, p in model.named_parameters():
        if name.startswith("patch_embed"):  # torch's own: uniform within 1 / sqrt(fan in), here 3 * 16 * 16
            bound = 768**-0.5
            assert p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15), name
        elif p.ndim == 1:
            expected = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            assert (p == expected).all(), name
        else:  # the error of a standard deviation over n numbers is 1 / sqrt(2 n)
            assert p.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * p.numel())), name
            assert abs(p.mean()) < 5 * 0.02 / math.sqrt(p.numel()), name


def test_a_parameter_left_uninitialised_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit_nano(4, img_size=8)
    model.forgotten = nn.Parameter(torch.ones(3))
    model.init_weights()
    assert [name for name, p in model.named_parameters() if p.isnan().any()] == ["forgotten"]
    monkeypatch.setattr(nn.init, "zeros_", lambda tensor: tensor)  # whoever forgets the biases
    model = vit_nano(4, img_size=8)
    assert model.blocks[0].mlp.fc1.bias.isnan().all()
    assert model(torch.zeros(1, 3, 8, 8)).isnan().any()


def test_a_network_built_on_meta_can_be_initialised_later() -> None:
    with torch.device("meta"):
        model = vit_nano(4, img_size=8)
    model = model.to_empty(device="cpu")
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    assert model(torch.randn(2, 3, 8, 8)).isfinite().all()


def test_copies_and_loaded_networks_give_the_same_numbers_and_share_nothing() -> None:
    model = randomised(vit_nano(4, img_size=8))
    loaded = vit_nano(4, img_size=8).eval()
    loaded.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8, 12)
    own = {p.data_ptr() for p in model.parameters()}
    for other in (copy.deepcopy(model), loaded):
        assert torch.equal(other(x), model(x))
        assert own.isdisjoint(p.data_ptr() for p in other.parameters())


def test_forward_compiles_without_a_graph_break() -> None:
    model = vit_nano(4, img_size=16, drop_path_rate=0.5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for shape in ((2, 3, 16, 16), (3, 3, 8, 13)):
        x = torch.randn(shape)
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        assert torch.equal(compiled(x), expected)


def test_an_empty_batch_gives_no_features() -> None:
    model = vit_nano(4, img_size=8)
    assert model(torch.zeros(0, 3, 8, 8)).shape == (0, 128)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 16, 16), r"shape \(2, 1, 16, 16\): give \(batch, 3, height, width\)"),
        ((3, 16, 16), r"shape \(3, 16, 16\): give \(batch, 3"),
        ((2, 3, 7, 16), "images of 7 x 16 pixels hold no patch of 8"),
        ((2, 3, 16, 7), "images of 16 x 7 pixels hold no patch of 8"),
    ],
)
def test_images_that_do_not_fit_are_named(shape: tuple[int, ...], message: str) -> None:
    model = vit_nano(8, img_size=16)
    for method in (model, model.get_last_selfattention, model.get_intermediate_layers):
        with pytest.raises(ValueError, match=message):
            method(torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": (7, 32), "patch_size": 8}, "img_size 7 x 32 holds no patch of 8"),
        ({"patch_size": 0}, "patch_size 0: give 1 or more"),
        ({"in_chans": 0}, "in_chans 0"),
        ({"depth": 0}, "depth 0"),
        ({"embed_dim": 10, "num_heads": 4}, "embed_dim 10 is not a positive multiple of num_heads 4"),
        ({"num_heads": 0}, "num_heads 0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate 1.0: give 0 up to"),
    ],
)
def test_sizes_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**options)


@pytest.mark.parametrize("n", [0, 5])
def test_intermediate_layers_that_do_not_exist_are_named(n: int) -> None:
    with pytest.raises(ValueError, match=f"n {n}: there are 4 blocks"):
        vit_nano(4, img_size=8).get_intermediate_layers(torch.zeros(1, 3, 8, 8), n)
