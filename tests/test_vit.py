"""The vision transformer against the formulas, written out below in plain tensor operations."""

import copy
import math
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastdino import vit
from fastdino.config import RunConfig
from fastdino.ops.packed_attention import packing
from fastdino.parallel import parallelize
from fastdino.vit import (
    VisionTransformer,
    vit_base,
    vit_giant,
    vit_huge,
    vit_large,
    vit_nano,
    vit_small,
    vit_tiny,
)

Params = dict[str, Tensor]
CPU = torch.device("cpu")


def cubic(t: Tensor) -> Tensor:
    """Keys' convolution kernel with a = -0.75."""
    t, a = t.abs(), -0.75
    near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
    return torch.where(t <= 1, near, torch.where(t < 2, far, 0.0))


def resampling(base: int, size: int, dtype: torch.dtype, extra: float = 0.1) -> Tensor:
    """Weights (size, base) of bicubic interpolation of one axis, at the scale (size + extra) / base."""
    at = (torch.arange(size, dtype=dtype) + 0.5) * (1 / ((size + extra) / base)) - 0.5
    weights = torch.zeros(size, base, dtype=dtype)
    for offset in (-1, 0, 1, 2):  # pixels beyond the edge repeat it
        pixel = at.floor() + offset
        weights.scatter_add_(1, pixel.long().clamp(0, base - 1)[:, None], cubic(at - pixel)[:, None])
    return weights


def ref_positions(
    p: Params, grid: tuple[int, int], rows: int, columns: int, keep: bool = False, extra: float = 0.1
) -> Tensor:
    positions = p["pos_embed"][0]
    if keep:
        return positions
    patches = positions[1:].reshape(*grid, -1)
    by_row, by_column = (
        resampling(*sizes, patches.dtype, extra) for sizes in zip(grid, (rows, columns), strict=True)
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
    x = ref_norm(x, p, f"blocks.{i}.norm2")
    if f"blocks.{i}.mlp.w12.weight" in p:
        gate, value = ref_linear(x, p, f"blocks.{i}.mlp.w12").chunk(2, dim=-1)
        return ref_linear(gate / (1 + (-gate).exp()) * value, p, f"blocks.{i}.mlp.w3")
    x = ref_linear(x, p, f"blocks.{i}.mlp.fc1")
    return ref_linear(x * (1 + torch.erf(x / math.sqrt(2))) / 2, p, f"blocks.{i}.mlp.fc2")


def ref_tokens(p: Params, x: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    rows, columns = x.shape[2] // patch, x.shape[3] // patch
    keep = (rows, columns) == grid and (x.shape[2] == x.shape[3] or rows != columns)
    x = x[:, :, : rows * patch, : columns * patch]
    x = (
        x.reshape(*x.shape[:2], rows, patch, columns, patch)
        .permute(0, 2, 4, 1, 3, 5)
        .flatten(3)
        .flatten(1, 2)
    )
    x = x @ p["patch_embed.proj.weight"].flatten(1).T + p["patch_embed.proj.bias"]
    x = torch.cat((p["cls_token"].expand(len(x), -1, -1), x), dim=1)
    x = x + ref_positions(p, grid, rows, columns, keep)
    if "register_tokens" in p:  # after the class token, without a position
        x = torch.cat((x[:, :1], p["register_tokens"].expand(len(x), -1, -1), x[:, 1:]), dim=1)
    return x


def ref_blocks(p: Params, x: Tensor, patch: int, heads: int, grid: tuple[int, int]) -> list[Tensor]:
    """The tokens before the first block and after each."""
    outputs = [ref_tokens(p, x, patch, grid)]
    for i in range(sum(name.endswith("norm1.weight") for name in p)):
        scales = [p.get(f"blocks.{i}.ls{j}.gamma", 1.0) for j in (1, 2)]
        x = outputs[-1] + scales[0] * ref_attention(outputs[-1], p, i, heads)[1]
        outputs.append(x + scales[1] * ref_mlp(x, p, i))
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
# grid; a rectangular base grid, shrunk; one patch; one row. Channels 1, 3, 5; batch 1 too. Then what DINOv2
# adds, one at a time and all together.
SHAPES: list[tuple[dict[str, Any], tuple[int, int, int, int]]] = [
    ({"patch_size": 5, "img_size": 30, "in_chans": 1}, (3, 1, 37, 61)),
    ({"patch_size": 4, "img_size": 16}, (1, 3, 16, 16)),
    ({"patch_size": 8, "img_size": (48, 32), "in_chans": 5, "qkv_bias": False}, (2, 5, 33, 17)),
    ({"patch_size": 16, "img_size": (16, 37)}, (2, 3, 31, 16)),
    ({"patch_size": 3, "img_size": 10, "mlp_ratio": 2.5}, (2, 3, 3, 20)),
    ({"patch_size": 4, "img_size": 16, "num_register_tokens": 1}, (2, 3, 12, 20)),
    ({"patch_size": 4, "img_size": 16, "init_values": 1e-5}, (2, 3, 16, 16)),
    ({"patch_size": 4, "img_size": 16, "ffn_layer": "swiglu", "in_chans": 1}, (2, 1, 16, 16)),
    (
        {
            "patch_size": 4,
            "img_size": 16,
            "num_register_tokens": 4,
            "init_values": 1.0,
            "ffn_layer": "swiglu",
            "mlp_ratio": 3.7,
            "in_chans": 5,
        },
        (3, 5, 9, 21),
    ),
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
        (vit_huge, 1280, 32, 16, 630_918_400),
        (vit_giant, 1536, 40, 24, 1_134_831_104),
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
    # Norms, attention and MLP of a block; class token and positions; patches; the last norm.
    mlp = 3 * 4096 * dim + 2 * 4096 + dim if make is vit_giant else 8 * dim * dim + 5 * dim
    block = 4 * dim + 4 * dim * dim + 4 * dim + mlp
    assert count == depth * block + 198 * dim + (3 * 16 * 16 + 1) * dim + 2 * dim
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


def test_state_dict_names_and_shapes_of_the_additions_are_dinov2s() -> None:
    def shapes(**options: Any) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            model = vit_nano(**options)
        return {name: tuple(value.shape) for name, value in model.state_dict().items()}

    plain, d = shapes(), 128
    blocks = [f"blocks.{i}" for i in range(4)]
    assert shapes(num_register_tokens=4) == plain | {"register_tokens": (1, 4, d)}
    gammas = {f"{block}.ls{j}.gamma": (d,) for block in blocks for j in (1, 2)}
    assert shapes(init_values=1e-5) == plain | gammas
    # 4 d * 2 / 3 = 341.3, to the next multiple of eight
    gated = {
        f"{block}.mlp.{name}": shape
        for block in blocks
        for name, shape in {
            "w12.weight": (2 * 344, d),
            "w12.bias": (2 * 344,),
            "w3.weight": (d, 344),
            "w3.bias": (d,),
        }.items()
    }
    assert shapes(ffn_layer="swiglu") == {k: v for k, v in plain.items() if ".mlp." not in k} | gated


@pytest.mark.parametrize(
    ("registers", "options"), [(0, {}), (3, {}), (1, {"init_values": 1.0, "ffn_layer": "swiglu"})]
)
def test_last_selfattention_is_the_weights_of_the_last_block(registers: int, options: dict[str, Any]) -> None:
    options = options | {"num_register_tokens": registers}
    model = randomised(VisionTransformer(20, 4, embed_dim=24, depth=3, num_heads=4, **options))
    x, n = torch.randn(2, 3, 28, 17), 1 + registers + 7 * 4
    with torch.no_grad():
        ours = model.get_last_selfattention(x)
        layers = ref_blocks(params(model, torch.float32), x, 4, 4, model.grid)
        plain, _ = ref_attention(layers[-2], params(model, torch.float32), 2, 4)
        p = params(model, torch.float64)
        layers = ref_blocks(p, x.double(), 4, 4, model.grid)
        truth, _ = ref_attention(layers[-2], p, 2, 4)
        assert ours.shape == (2, 4, n, n)
        assert_as_accurate(ours, plain, truth)
        assert_as_accurate(ours.sum(-1), plain.sum(-1), torch.ones(2, 4, n, dtype=torch.float64))
        # With the values, the projection and the MLP, these weights give what the block itself gives.
        packed, inputs = packing(((2, n),), "sdpa", CPU), model.prepare_tokens(x)
        assert inputs.shape == (2, n, 24)
        inputs = inputs.flatten(0, 1)
        for block in model.blocks[:-1]:
            inputs = block(inputs, packed)
        last = model.blocks[-1]
        values = last.attn.heads(last.norm1(inputs))[:, 2].unflatten(0, (2, n)).transpose(1, 2)
        rebuilt = inputs + last.ls1(last.attn.proj((ours @ values).transpose(1, 2).flatten(2).flatten(0, 1)))
        rebuilt = rebuilt + last.ls2(last.mlp(last.norm2(rebuilt)))
        plain = ref_blocks(params(model, torch.float32), x, 4, 4, model.grid)[-1]
        for tokens in (rebuilt, last(inputs, packed)):
            assert_as_accurate(tokens.unflatten(0, (2, n)), plain, layers[-1])
        classes = last(inputs, packed, class_only=True)
        assert_as_accurate(classes, plain[:, 0], layers[-1][:, 0])


def test_a_single_block_has_attention_weights_too() -> None:
    model = randomised(VisionTransformer(8, 4, embed_dim=24, depth=1, num_heads=4))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        ours = model.get_last_selfattention(x)
        plain, truth = (
            ref_attention(ref_tokens(p, x.to(dtype), 4, model.grid), p, 0, 4)[0]
            for dtype in (torch.float32, torch.float64)
            for p in [params(model, dtype)]
        )
        assert_as_accurate(ours, plain, truth)


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


# The sizes that DINO's networks are used at; 224 x 230 holds the base grid, and is not square.
SIZES = [(96, 96), (480, 480), (480, 320), (96, 160), (224, 230)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", [0.1, 0.0])
def test_positions_of_224_pixels_reach_the_sizes_in_use(size: tuple[int, int], offset: float) -> None:
    model = VisionTransformer(224, 16, embed_dim=8, num_heads=2, depth=1, interpolate_offset=offset)
    nn.init.normal_(model.pos_embed)
    ours = model.interpolate_pos_embed(*size)[0].detach()
    rows, columns = size[0] // 16, size[1] // 16
    plain, truth = (
        ref_positions(params(model, dtype), (14, 14), rows, columns, extra=offset).detach()
        for dtype in (torch.float32, torch.float64)
    )
    assert ours.shape == (1 + rows * columns, 8)
    assert_as_accurate(ours, plain, truth)


@pytest.mark.parametrize("size", SIZES)
def test_antialiased_positions_are_torchs_in_float64(size: tuple[int, int]) -> None:
    model = VisionTransformer(
        224, 16, embed_dim=8, num_heads=2, depth=1, interpolate_offset=0.0, interpolate_antialias=True
    )
    nn.init.normal_(model.pos_embed)
    grid = (size[0] // 16, size[1] // 16)
    patches = model.pos_embed.detach()[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    plain, truth, aliased = (
        F.interpolate(x, size=grid, mode="bicubic", antialias=antialias).flatten(2).mT[0]
        for x, antialias in ((patches, True), (patches.double(), True), (patches.double(), False))
    )
    ours = model.interpolate_pos_embed(*size)[0, 1:].detach()
    assert_as_accurate(ours, plain, truth)
    assert grid == (14, 14) or (ours - aliased).abs().max() > 0.01  # it is at work


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


def second_block(model: VisionTransformer, images: Tensor | list[Tensor]) -> tuple[Tensor, Tensor]:
    """What enters and what leaves block 1, whole, in one forward of the model."""
    seen: list[Tensor] = []
    with model.blocks[1].register_forward_hook(lambda module, args, out: seen.extend((args[0], out))):
        model(images, return_patches=True)
    return seen[0], seen[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kept_branch_is_scaled_without_a_bias_and_the_rest_is_left(dtype: torch.dtype) -> None:
    x, branch = torch.zeros(20_000, 6, dtype=dtype), torch.rand(18_000, 6).to(dtype) + 1
    rows = torch.randperm(20_000)[:18_000]
    kept = vit.DropPathSubset(rows, rows, packing(((1, 1),), "sdpa", CPU), 1 / 0.9)
    out = kept.add(x, rows, branch)
    assert out.dtype == dtype
    assert not x.any()
    assert (out != 0).any(1).sum() == 18_000
    torch.testing.assert_close(out[rows].double(), branch.double() / 0.9, rtol=torch.finfo(dtype).eps, atol=0)
    # A factor of 1 / 0.9 rounded to bf16 would scale every kept sample by 0.9984.
    assert abs((out[rows].double() / branch.double()).mean() * 0.9 - 1) < 2e-4


def test_each_branch_of_each_sample_is_dropped_on_its_own() -> None:
    model = randomised(VisionTransformer(8, 4, embed_dim=8, depth=2, num_heads=2, drop_path_rate=0.5)).train()
    p = params(model, torch.float32)
    with torch.no_grad():
        before, out = (
            tokens.unflatten(0, (200, 5))
            for tokens in second_block(model, torch.randn(1, 3, 8, 8).expand(200, -1, -1, -1))
        )
        x = before[:1]
        torch.testing.assert_close(before, x.expand_as(before))  # the first block drops nothing
        attended = ref_attention(x, p, 1, 2)[1]
        first = [x, x + 2 * attended]  # the branch dropped, or kept and doubled
        possible = torch.cat([after + keep * ref_mlp(after, p, 1) for after in first for keep in (0, 2)])
    distances = (out[:, None] - possible).abs().amax((2, 3))
    assert distances.amin(1).max() < 1e-5
    counts = distances.argmin(1).bincount(minlength=4)
    assert counts[2:].sum() == counts[1::2].sum() == 100  # half of the samples, in each branch
    # The number kept in both is hypergeometric: 50, of variance 100^4 / (200^2 199).
    assert abs(counts[3] - 50) < 5 * math.sqrt(100**4 / (200**2 * 199))


@pytest.mark.parametrize("images", [1, 3, 10, 64])
@pytest.mark.parametrize("rate", [0.0, 0.03, 0.3, 0.85])
def test_every_sample_is_kept_as_often_as_it_should(images: int, rate: float) -> None:
    n = 20_000
    order, counts = vit.draw_drop_path(images, [rate] * n)
    assert order.shape == (n, 2, images)
    assert torch.equal(order.sort(-1).values, torch.arange(images).expand_as(order))
    exact = (1 - rate) * images
    assert set(counts) <= {math.floor(exact), math.ceil(exact)}
    keep = torch.tensor(counts)
    assert abs(keep.double().mean() - exact) <= 5 * math.sqrt((exact % 1) * (1 - exact % 1) / n)
    # inverse permutation: at which place of the order a sample stands
    kept = order.argsort(-1) < keep[:, None, None]
    assert torch.equal(kept.sum(-1), keep[:, None].expand(-1, 2))
    off = (kept.double().mean(0) - (1 - rate)).abs()
    assert off.max() <= 5 * math.sqrt(rate * (1 - rate) / n)
    if images > 1:  # the two branches and two blocks draw apart, given how many
        same = (order[:, 0] == order[:, 1]).double().mean() * images
        next_same = (order[1:, 0] == order[:-1, 0]).double().mean() * images
        assert abs(same - 1) <= 5 / math.sqrt(n)  # the number of matches in one draw varies by 1 about 1
        assert abs(next_same - 1) <= 5 / math.sqrt(n)


def test_draws_follow_the_rates_and_the_seed() -> None:
    rates = [0.0, 0.25, 0.5]
    torch.manual_seed(3)
    order, counts = vit.draw_drop_path(8, rates)
    assert counts == [8, 6, 4]
    torch.manual_seed(3)
    again, _ = vit.draw_drop_path(8, rates)
    assert torch.equal(order, again)
    assert not torch.equal(order, vit.draw_drop_path(8, rates)[0])


@pytest.mark.parametrize("branch", ["attn.proj", "mlp.fc2"])
def test_stochastic_depth_leaves_the_expectation_of_each_branch(branch: str) -> None:
    """Of ten equal samples seven are kept: their mean is the output without dropping, exactly."""
    model = VisionTransformer(8, 4, embed_dim=8, depth=2, num_heads=2, drop_path_rate=0.3)
    model = randomised(model).double().train()
    other = {"attn.proj": "mlp.fc2", "mlp.fc2": "attn.proj"}[branch]
    for p in model.blocks[1].get_submodule(other).parameters():
        nn.init.zeros_(p)
    images = [torch.randn(1, 3, *size).double().expand(10, -1, -1, -1) for size in ((8, 8), (8, 12))]
    with torch.no_grad():
        _, out = second_block(model, images)
        _, expected = second_block(model.eval(), images)
    for ours, truth in zip(out.split([50, 70]), expected.split([50, 70]), strict=True):
        ours, truth = ours.unflatten(0, (10, -1)), truth.unflatten(0, (10, -1))
        assert (ours - truth).abs().max() > 0.01  # some were dropped
        torch.testing.assert_close(ours.mean(0), truth.mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("patches", [False, True])
def test_what_is_dropped_is_not_computed(patches: bool) -> None:
    options: dict[str, Any] = {"depth": 3, "drop_path_rate": 0.5, "num_register_tokens": 2}
    model = VisionTransformer(16, 4, embed_dim=8, num_heads=2, **options).train()
    attended, mixed = [], []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda module, args: attended.append(len(args[0])))
        block.mlp.register_forward_pre_hook(lambda module, args: mixed.append(len(args[0])))
    # Rates 0, 1/4, 1/2; batches of 4 and 8 images of 19 and 7 tokens.
    model([torch.randn(4, 3, 16, 16), torch.randn(8, 3, 8, 8)], return_patches=patches)
    expected = [4 * 19 + 8 * 7, 3 * 19 + 6 * 7, 2 * 19 + 4 * 7]
    assert attended == expected
    assert mixed == (expected if patches else [*expected[:2], 2 + 4])  # the last: class tokens alone
    attended.clear()
    model.eval()([torch.randn(4, 3, 16, 16), torch.randn(8, 3, 8, 8)], return_patches=patches)
    assert attended == [expected[0]] * 3


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


@pytest.mark.parametrize(
    "options", [{}, {"num_register_tokens": 4, "init_values": 1e-5, "ffn_layer": "swiglu"}], ids=str
)
def test_initial_weights_are_official_dinos(options: dict[str, Any]) -> None:
    model = vit_nano(**options)
    for name, p in model.named_parameters():
        if name.startswith("patch_embed"):  # torch's own: uniform within 1 / sqrt(fan in), here 3 * 16 * 16
            bound = 768**-0.5
            assert p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15), name
        elif p.ndim == 1:
            expected = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            expected = 1e-5 if name.endswith("gamma") else expected
            assert torch.equal(p, torch.full_like(p, expected)), name
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


@pytest.mark.parametrize(
    "options", [{}, {"num_register_tokens": 4, "init_values": 1e-5, "ffn_layer": "swiglu"}], ids=str
)
def test_a_network_built_on_meta_can_be_initialised_later(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = vit_nano(4, img_size=8, **options)
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


def test_a_whole_network_compiles_without_a_graph_break_for_evaluation(dynamo: None) -> None:
    model = randomised(vit_nano(4, img_size=16))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for shape in ((2, 3, 16, 16), (3, 3, 8, 13), (5, 3, 12, 16)):
        x = torch.randn(shape)
        assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("training", [False, True])
def test_an_empty_batch_gives_no_features(training: bool) -> None:
    model = vit_nano(4, img_size=8, drop_path_rate=0.5).train(training)
    assert model(torch.zeros(0, 3, 8, 8)).shape == (0, 128)
    features, patches = model([torch.zeros(0, 3, 8, 8), torch.zeros(0, 3, 4, 8)], return_patches=True)
    assert features.shape == (0, 128)
    assert [x.shape for x in patches] == [(0, 4, 128), (0, 2, 128)]


def test_an_empty_list_of_images_is_an_error() -> None:
    with pytest.raises(ValueError, match="an empty list of images: give at least one batch"):
        vit_nano(4, img_size=8)([])


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
    ("shape", "message"),
    [
        ((2, 1, 16, 16), r"shape \(2, 1, 16, 16\): give \(batch, 3, height, width\)"),
        ((3, 16, 16), r"shape \(3, 16, 16\): give \(batch, 3"),
        ((2, 3, 7, 16), "images of 7 x 16 pixels hold no patch of 8"),
    ],
)
def test_a_batch_of_a_list_that_does_not_fit_is_named(shape: tuple[int, ...], message: str) -> None:
    """Beside one of the same size that fits too, with which it would run as one batch."""
    with pytest.raises(ValueError, match=message):
        vit_nano(8, img_size=16)([torch.zeros(2, 3, 16, 16), torch.zeros(shape)])


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
        ({"drop_path_rate": -0.1}, "drop_path_rate -0.1: give 0 up to"),
        ({"num_register_tokens": -1}, "num_register_tokens -1: give 0 or more"),
        ({"ffn_layer": "gated"}, "ffn_layer 'gated': choose mlp or swiglu"),
    ],
)
def test_sizes_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**options)


@pytest.mark.parametrize("n", [0, 5])
def test_intermediate_layers_that_do_not_exist_are_named(n: int) -> None:
    with pytest.raises(ValueError, match=f"n {n}: there are 4 blocks"):
        vit_nano(4, img_size=8).get_intermediate_layers(torch.zeros(1, 3, 8, 8), n)


def values_and_gradients(
    model: VisionTransformer, images: list[Tensor], forward: Callable[[list[Tensor]], Tensor]
) -> Params:
    """Features, and the gradients of parameters and images from one upstream gradient that is always the
    same, for the same random draws."""
    dtype = model.cls_token.dtype
    leaves = [x.detach().to(dtype).requires_grad_() for x in images]
    torch.manual_seed(5)
    out = forward(leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    model.zero_grad()
    out.backward(upstream.to(dtype))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"out": out.detach()} | {f"x{i}": x.grad for i, x in enumerate(leaves)} | gradients


def assert_equal_to_rounding(ours: Params, expected: Params) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].shape == value.shape, name
        if value.numel():
            assert (ours[name] - value).abs().max() <= 1e-12 * value.abs().max(), name


def assert_errors_at_most_twice(ours: Params, plain: Params, truth: Params) -> None:
    """The mean square over all tensors of their relative errors, as above; and none stands out by far."""

    def errors(values: Params) -> Tensor:
        return torch.stack(
            [(values[k].double() - t).norm() / t.norm() for k, t in truth.items() if t.numel()]
        )

    got, allowed = errors(ours), errors(plain)
    eps = torch.finfo(torch.float32).eps
    assert got.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt() + eps
    assert (got <= 10 * allowed + 4 * eps).all()


# Square, rectangular, no multiple of the patch; equal neighbours; sizes that come again; one image; none.
BATCHES = [
    (2, 16, 16),
    (3, 16, 16),
    (1, 8, 13),
    (0, 20, 8),
    (4, 8, 8),
    (2, 16, 16),
    (1, 8, 8),
]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_register_tokens": 2, "init_values": 1.0, "ffn_layer": "swiglu", "qkv_bias": False},
]


def packed_model(rate: float = 0.0, **options: Any) -> VisionTransformer:
    model = VisionTransformer(16, 4, embed_dim=24, depth=3, num_heads=4, drop_path_rate=rate, **options)
    return randomised(model).train(rate > 0)


def batches() -> list[Tensor]:
    return [torch.randn(n, 3, height, width) for n, height, width in BATCHES]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_list_of_batches_gives_what_each_alone_gives(options: dict[str, Any]) -> None:
    model, images = packed_model(**options), batches()

    def alone(xs: list[Tensor]) -> Tensor:
        return torch.cat([model(x) for x in xs])

    def formula(xs: list[Tensor]) -> Tensor:
        p = dict(model.named_parameters())
        return torch.cat([ref_forward(p, x, 4, 4, model.grid) for x in xs])

    ours, plain = (values_and_gradients(model, images, form) for form in (model, formula))
    model.double()
    packed, apart, truth = (values_and_gradients(model, images, form) for form in (model, alone, formula))
    assert_equal_to_rounding(packed, apart)
    assert_equal_to_rounding(packed, truth)
    assert_errors_at_most_twice(ours, plain, truth)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_list_of_batches_drops_what_each_size_alone_drops(options: dict[str, Any]) -> None:
    """The draws are of each run of neighbours of one size, in order, so that one seed gives the same."""
    model, images = packed_model(0.3, **options), batches()

    def alone(xs: list[Tensor]) -> Tensor:
        same = groupby(xs, key=lambda x: x.shape[-2:])
        return torch.cat([model(torch.cat(list(neighbours))) for _, neighbours in same])

    ours, plain = (values_and_gradients(model, images, form) for form in (model, alone))
    model.double()
    packed, truth = (values_and_gradients(model, images, form) for form in (model, alone))
    assert_equal_to_rounding(packed, truth)
    assert_errors_at_most_twice(ours, plain, truth)
    without = values_and_gradients(model.eval(), images, model)
    assert (packed["out"] - without["out"]).abs().max() > 0.01  # samples were dropped


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_class_features_are_the_same_with_patches_and_without(
    rate: float, options: dict[str, Any]
) -> None:
    """Without patches the last block computes class tokens alone, of the samples that it keeps."""
    model, images = packed_model(rate, **options).double(), batches()

    def with_patches(xs: list[Tensor]) -> Tensor:
        return model(xs, return_patches=True)[0]

    assert_equal_to_rounding(
        values_and_gradients(model, images, model), values_and_gradients(model, images, with_patches)
    )


@pytest.mark.parametrize("registers", [0, 3])
def test_patches_are_those_of_the_last_layer_in_the_order_given(registers: int) -> None:
    model, images = packed_model(num_register_tokens=registers).double(), [x.double() for x in batches()]
    with torch.no_grad():
        features, patches = model(images, return_patches=True)
        assert features.shape == (13, 24)
        assert len(patches) == len(images)
        for x, ours in zip(images, patches, strict=True):
            expected = model.get_intermediate_layers(x)[-1][:, 1 + registers :]
            assert ours.shape == (len(x), (x.shape[2] // 4) * (x.shape[3] // 4), 24)
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
            alone, (single,) = model(x, return_patches=True)
            torch.testing.assert_close(single, expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(alone, model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("patches", [False, True])
def test_activation_checkpointing_changes_no_bit_and_saves_memory(rate: float, patches: bool) -> None:
    model, images = packed_model(rate), [torch.randn(6, 3, 16, 16), torch.randn(4, 3, 8, 12)]
    model.train()
    runs = [0]
    model.blocks[1].attn.register_forward_hook(lambda *args: runs.append(runs.pop() + 1))

    def forward(xs: list[Tensor]) -> Tensor:
        return torch.cat([x.flatten(0, -2) for x in (lambda f, p: [f, *p])(*model(xs, True))])

    def run() -> tuple[Params, int, int]:
        runs[0], kept = 0, {}

        def count(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            values = values_and_gradients(model, images, forward if patches else model)
        return values, sum(kept.values()) - sum(p.nbytes for p in model.parameters()), runs[0]

    plain, plain_bytes, plain_runs = run()
    model.checkpointing = True
    ours, our_bytes, our_runs = run()
    assert plain.keys() == ours.keys()
    for name, value in plain.items():
        assert torch.equal(ours[name], value), name
    assert (plain_runs, our_runs) == (1, 2)  # computed again
    # what checkpoint keeps beside these is each block's input
    inputs = len(model.blocks) * (6 * 17 + 4 * 7) * 24 * 4
    assert our_bytes + inputs < plain_bytes / 2
    with torch.no_grad():
        model(images)
    assert runs == [3]  # once, where nothing is kept


def meta(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A model whose memory is not yet written: initial values take longer than the test."""
    with torch.device("meta"):
        model = make(*args, **kwargs)
    return model.to_empty(device="cpu").eval()


@pytest.mark.parametrize(
    ("make", "patch", "name"),
    [
        (vit_tiny, 16, "vit_tiny_patch16_224"),
        (vit_tiny, 8, "vit_tiny_patch16_224"),
        (vit_small, 16, "vit_small_patch16_224"),
        (vit_small, 8, "vit_small_patch8_224"),
        (vit_base, 16, "vit_base_patch16_224"),
        (vit_base, 8, "vit_base_patch8_224"),
    ],
)
def test_features_are_timms_with_the_same_weights(
    make: Callable[..., VisionTransformer], patch: int, name: str
) -> None:
    timm = pytest.importorskip("timm")
    theirs = randomised(meta(timm.create_model, name, pretrained=False, num_classes=0, patch_size=patch))
    ours = meta(make, patch)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        got, plain, truth = ours(x), theirs(x), theirs.double()(x.double())
    assert got.shape == (1, ours.embed_dim)
    assert_as_accurate(got, plain, truth)


def compiled_copy(model: VisionTransformer, monkeypatch: pytest.MonkeyPatch) -> VisionTransformer:
    """A copy compiled as `parallelize` does it, but at once and with graph breaks an error."""
    compile_ = nn.Module.compile
    with monkeypatch.context() as patch:
        patch.setattr(
            nn.Module, "compile", lambda self, **how: compile_(self, **how, fullgraph=True, backend="eager")
        )
        twin = copy.deepcopy(model)
        parallelize(twin, RunConfig(compile="on"), CPU)
    return twin


def test_a_compiled_run_makes_no_graph_after_its_second_step(
    dynamo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = randomised(vit_nano(4, img_size=16, drop_path_rate=0.3)).train()
    teacher = randomised(vit_nano(4, img_size=16)).train().requires_grad_(False)
    fast_student, fast_teacher = (compiled_copy(model, monkeypatch) for model in (student, teacher))

    def graphs() -> int:
        return counters["stats"]["unique_graphs"]

    def evaluate(n: int, size: int = 16) -> None:
        x = torch.randn(n, 3, size, size)
        with torch.no_grad():
            for model, fast in ((student, fast_student), (teacher, fast_teacher)):
                torch.testing.assert_close(fast.eval()(x), model.eval()(x))
                model.train()
                fast.train()

    # While graphs are made, as many of one size as of the other, and all kept, as chance may have it: that
    # must not become a rule of the graphs.
    draw = vit.draw_drop_path
    monkeypatch.setattr(vit, "draw_drop_path", lambda n, rates: (draw(n, rates)[0], [n] * len(rates)))
    made = []
    for step in range(12):
        if step == 2:
            monkeypatch.setattr(vit, "draw_drop_path", draw)
        crops = [torch.randn(8, 3, 16, 16), torch.randn(8 if step < 2 else 12, 3, 8, 8)]
        got = []
        for model, its_teacher in ((student, teacher), (fast_student, fast_teacher)):
            with torch.no_grad():
                target = its_teacher(crops[0])
            torch.manual_seed(step)
            model.zero_grad()
            out = model(crops)
            (out[:8] * target).sum().backward()
            got.append({"target": target, "out": out} | {n: p.grad for n, p in model.named_parameters()})
        for name, expected in got[0].items():
            torch.testing.assert_close(got[1][name], expected, msg=name)
        made.append(graphs())
        if step == 5:  # an evaluation between two epochs: batches, and the rest of the images
            evaluate(5)
            first = graphs()
            evaluate(3)
            evaluate(7)
            assert graphs() == first
            made = [x + first - made[-1] for x in made]
    assert made[0] > 0
    assert set(made[1:]) == {made[1]}
    evaluate(6)
    evaluate(4, 12)
    assert graphs() == made[-1]
    assert not counters["graph_break"]


def test_blocks_compiled_by_inductor_give_the_same_numbers(dynamo: None) -> None:
    options: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 4, "drop_path_rate": 0.5}
    model = randomised(VisionTransformer(16, 4, **options)).train()
    images = [torch.randn(4, 3, 16, 16), torch.randn(6, 3, 8, 12)]
    fast = copy.deepcopy(model)
    parallelize(fast, RunConfig(compile="on"), CPU)
    got, plain = (values_and_gradients(network, images, network) for network in (fast, model))
    truth = values_and_gradients(model.double(), images, model)
    assert counters["stats"]["unique_graphs"] > 0
    assert_errors_at_most_twice(got, plain, truth)
