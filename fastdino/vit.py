"""The vision transformer of DINO: images to the normed class token (paper, section 3.2).

Crops of all sizes run as one packed sequence (T, D) of tokens, one image after another: every norm,
projection and MLP is one operation over all of them, and attention (ops/packed_attention.py) keeps to each
image.
The last block computes the class tokens alone where nothing else is asked for.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdino.ops import Linear, linear
from fastdino.ops.packed_attention import (
    Packing,
    Runs,
    attention,
    choose,
    class_attention,
    class_tokens,
    packing,
    split_runs,
)


class DropPathSubset(NamedTuple):
    """What stochastic depth leaves of one branch of one block: some samples of the packed sequence."""

    images: Tensor
    """Which samples, (B',) int64, those of one size together."""
    rows: Tensor
    """Their tokens' indices in the packed sequence, (T',) int64, sample by sample."""
    packed: Packing
    """How those tokens are packed."""
    scale: float
    """1 / (1 - drop rate), which keeps the branch's expectation."""

    def add(self, x: Tensor, indices: Tensor, branch: Tensor) -> Tensor:
        """x with branch, scaled, added to the rows at `indices`."""
        # In float32, where 1 / 0.9 is not rounded: in bf16 every sample would be off by 0.16 % alike.
        wide = branch.to(torch.promote_types(x.dtype, torch.float32)) * self.scale
        return x.index_add(0, indices, wide.to(x.dtype))


def draw_drop_path(images: int, rates: Sequence[float]) -> tuple[Tensor, list[int]]:
    """Which of `images` samples each block keeps in its two branches, given its drop rate, from torch's CPU
    generator.

    A block keeps floor or ceil of (1 - rate) * images samples, by chance so that each sample is kept with
    probability 1 - rate exactly: shapes then take two values, where a coin per sample takes many.

    Returns:
        A random order of the samples for each branch, (len(rates), 2, images) int64, and how many of them
        each block keeps in both.
    """
    order = torch.rand(len(rates), 2, images).argsort(dim=-1)
    return order, [
        int((1 - r) * images + u) for r, u in zip(rates, torch.rand(len(rates)).tolist(), strict=True)
    ]


class Attention(nn.Module):
    """Multi-head self-attention within each image of a packed sequence, (T, D) -> (T, D)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def heads(self, x: Tensor) -> Tensor:
        """Queries, keys and values of x (..., D), as (..., 3, heads, D / heads)."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1))

    def weights(self, x: Tensor) -> Tensor:
        """The attention weights of images x (B, N, D) written out, (B, heads, N, N); each row sums to 1."""
        q, k, _ = self.heads(x).permute(2, 0, 3, 1, 4).unbind(0)
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)

    def forward(self, x: Tensor, packed: Packing, class_only: bool = False) -> Tensor:
        """(T, D) -> (T, D), or with `class_only` the class tokens' rows of that, (images, D)."""
        if not class_only:
            return self.proj(attention(self.heads(x), packed).flatten(1))
        d, weight, bias = x.shape[-1], self.qkv.weight, self.qkv.bias
        q = linear(class_tokens(x, packed.runs), weight[:d], None if bias is None else bias[:d])
        kv = linear(x, weight[d:], None if bias is None else bias[d:])
        heads = (self.num_heads, d // self.num_heads)
        return self.proj(
            class_attention(q.unflatten(-1, heads), kv.unflatten(-1, (2, *heads)), packed).flatten(1)
        )


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """Linear(silu(a) * b), a and b the halves of one Linear (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w12 = Linear(dim, 2 * hidden_dim)
        self.w3 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learnt factor per channel (Touvron et al. 2021, arXiv:2103.17239)."""

    def __init__(self, dim: int, init_value: float) -> None:
        super().__init__()
        self.init_value = init_value
        self.gamma = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block over a packed sequence, (T, D) -> (T, D).

    With `kept`, one for each branch, the branch is computed for those samples alone and the others pass by it
    (stochastic depth, Huang et al. 2016, arXiv:1603.09382).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_rate: float = 0.0,
        init_values: float | None = None,
        ffn_layer: str = "mlp",
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.ls1 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        # DINOv2's width: two thirds, for as many parameters as the plain MLP, in steps of eight
        self.mlp = Mlp(dim, hidden) if ffn_layer == "mlp" else SwiGLU(dim, (int(hidden * 2 / 3) + 7) // 8 * 8)
        self.ls2 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_rate = drop_rate

    def forward(
        self,
        x: Tensor,
        packed: Packing,
        kept: tuple[DropPathSubset, DropPathSubset] | None = None,
        class_only: bool = False,
    ) -> Tensor:
        """(T, D) -> (T, D), or with `class_only` the class tokens alone, (images, D): a fifth of the work."""
        out = class_tokens(x, packed.runs) if class_only else x
        if kept is None:
            out = out + self.ls1(self.attn(self.norm1(x), packed, class_only))
            return out + self.ls2(self.mlp(self.norm2(out)))
        # index_select: its backward needs no sorting, as that of x[rows] does
        first, second = kept
        branch = self.ls1(self.attn(self.norm1(x.index_select(0, first.rows)), first.packed, class_only))
        out = first.add(out, first.images if class_only else first.rows, branch)
        rows = second.images if class_only else second.rows
        return second.add(out, rows, self.ls2(self.mlp(self.norm2(out.index_select(0, rows)))))


class PatchEmbed(nn.Module):
    """Each patch to a vector: (B, C, H, W) -> (B, (H // patch) * (W // patch), D); the rest is left out."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def resize_positions(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], offset: float, antialias: bool
) -> Tensor:
    """A position embedding (1, 1 + rows * columns, D) of grid `old` for grid `new`, bicubic.

    The class token's stays. `offset` is what official DINO adds to the rows and columns it scales to.
    """
    patches = positions[:, 1:].unflatten(1, old).permute(0, 3, 1, 2)
    # The 0.1 moves every sample a little: `size=` is not what released weights were trained with.
    patches = F.interpolate(
        patches,
        size=None if offset else new,
        scale_factor=((new[0] + offset) / old[0], (new[1] + offset) / old[1]) if offset else None,
        mode="bicubic",
        antialias=antialias,
    )
    if patches.shape[2:] != new:
        raise ValueError(
            f"position embedding of {old[0]} x {old[1]} patches became {patches.shape[2]} x "
            f"{patches.shape[3]}, not {new[0]} x {new[1]}: give another image size"
        )
    return torch.cat((positions[:, :1], patches.flatten(2).transpose(1, 2)), dim=1)


class VisionTransformer(nn.Module):
    """A vision transformer with official DINO's mathematics and state-dict names.

    `img_size`, pixels or (height, width), fixes the base grid: the shape of the learnt position embedding.
    Images of any other size that hold a patch are taken too, with the embedding interpolated. Raises
    ValueError on sizes that cannot be.

    Of DINOv2 (Oquab et al. 2023, arXiv:2304.07193) are `init_values`, the start of a layer scale;
    `num_register_tokens` (Darcet et al. 2023, arXiv:2309.16588), extra tokens after the class token;
    `ffn_layer` "swiglu"; and `interpolate_antialias` and `interpolate_offset`, how its position embeddings
    are resized.

    Attributes that may be set later and change no result but by rounding: `attention_impl` ("auto", "sdpa",
    "varlen", "xformers"), and `checkpointing`, which keeps a block's input alone and computes the block again
    in the backward pass.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        num_register_tokens: int = 0,
        init_values: float | None = None,
        ffn_layer: Literal["mlp", "swiglu"] = "mlp",
        interpolate_antialias: bool = False,
        interpolate_offset: float = 0.1,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        for name, value in {"patch_size": patch_size, "in_chans": in_chans, "depth": depth}.items():
            if value < 1:
                raise ValueError(f"{name} {value}: give 1 or more")
        if min(height, width) < patch_size:
            raise ValueError(f"img_size {height} x {width} holds no patch of {patch_size} pixels")
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a positive multiple of num_heads {num_heads}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate {drop_path_rate}: give 0 up to, not including, 1")
        if num_register_tokens < 0:
            raise ValueError(f"num_register_tokens {num_register_tokens}: give 0 or more")
        if ffn_layer not in ("mlp", "swiglu"):
            raise ValueError(f"ffn_layer {ffn_layer!r}: choose mlp or swiglu")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.grid = (height // patch_size, width // patch_size)
        self.num_register_tokens = num_register_tokens
        self.interpolate_antialias = interpolate_antialias
        self.interpolate_offset = interpolate_offset
        self.attention_impl = "auto"
        self.checkpointing = False

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1], embed_dim))
        self.register_parameter("register_tokens", None)
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.empty(1, num_register_tokens, embed_dim))
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                drop_path_rate * i / max(depth - 1, 1),
                init_values,
                ffn_layer,
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise every parameter as official DINO; one that is forgotten here stays NaN, and shows."""
        for parameter in self.parameters():
            nn.init.constant_(parameter, math.nan)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.register_tokens is not None:
            nn.init.trunc_normal_(self.register_tokens, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, module.init_value)
            elif isinstance(module, nn.LayerNorm | nn.Conv2d):
                module.reset_parameters()

    def interpolate_pos_embed(self, height: int, width: int) -> Tensor:
        """The position embedding (1, 1 + N, D) of an image of `height` x `width` pixels.

        The class token stays. As in official DINO, a square base grid is kept for square images only: 224 x
        230 pixels are interpolated too, though they hold the same 14 x 14 patches as 224 x 224.
        """
        rows, columns = height // self.patch_size, width // self.patch_size
        base_rows, base_columns = self.grid
        if (rows, columns) == self.grid and (height == width or base_rows != base_columns):
            return self.pos_embed
        return resize_positions(
            self.pos_embed, self.grid, (rows, columns), self.interpolate_offset, self.interpolate_antialias
        )

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"images of shape {tuple(x.shape)}: give (batch, {self.in_chans}, height, width)"
            )
        if min(x.shape[2:]) < self.patch_size:
            raise ValueError(
                f"images of {x.shape[2]} x {x.shape[3]} pixels hold no patch of {self.patch_size}: "
                "give larger images or a smaller patch_size"
            )

    def prepare_tokens(self, x: Tensor) -> Tensor:
        """Class token, R registers, N patches of x (B, C, H, W) with their positions: (B, 1 + R + N, D)."""
        self._check(x)
        positions = self.interpolate_pos_embed(x.shape[2], x.shape[3])
        patches = self.patch_embed(x) + positions[:, 1:]
        first = self.cls_token + positions[:, :1]
        if self.register_tokens is not None:
            first = torch.cat((first, self.register_tokens), dim=1)
        return torch.cat((first.expand(x.shape[0], -1, -1), patches), dim=1)

    def _pack(self, sizes: list[list[Tensor]]) -> tuple[Tensor, Runs]:
        """Batches of images, those of one size in one list, to a packed sequence (T, D) and its runs."""
        tokens = [self.prepare_tokens(torch.cat(same) if len(same) > 1 else same[0]) for same in sizes]
        flat = [x.flatten(0, 1) for x in tokens]
        return flat[0] if len(flat) == 1 else torch.cat(flat), tuple((x.shape[0], x.shape[1]) for x in tokens)

    def _run(self, x: Tensor, runs: Runs, blocks: Any, class_only: bool = False, n: int = 1) -> list[Tensor]:
        """The packed sequence x (T, D) after each of the last n of `blocks`; with `class_only`, of the last
        the class tokens alone."""
        kind, impl = x.device.type, self.attention_impl
        if impl == "auto":
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            impl = choose(runs, self.num_heads, self.embed_dim // self.num_heads, dtype, x.device)
        packed = packing(runs, impl, x.device)
        rates = [block.drop_rate if self.training else 0.0 for block in blocks]
        kept = self._kept(runs, impl, rates, x.device) if any(rates) else [None] * len(blocks)
        outputs: list[Tensor] = []
        for block, subset in zip(blocks, kept, strict=True):
            args = (x, packed, subset, class_only and block is blocks[-1])
            if self.checkpointing and torch.is_grad_enabled():
                # Nothing within a block is drawn at random.
                x = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)  # type: ignore[assignment]
            else:
                x = block(*args)
            outputs = [*outputs[len(outputs) == n :], x]
        return outputs

    def _kept(
        self, runs: Runs, impl: str, rates: Sequence[Any], device: torch.device
    ) -> list[tuple[DropPathSubset, DropPathSubset] | None]:
        """What each block of these drop rates keeps. Run by run, so that a pass per size draws the same."""
        samples, rows, counts, image, start = [], [], [], 0, 0
        for images, tokens in runs:
            order, keep = draw_drop_path(images, rates)
            # Tokens are counted on the device: the samples' numbers alone are copied, without waiting.
            if device.type == "cuda":
                order = order.pin_memory()
            order = order.to(device, non_blocking=True)[:, :, : max(keep)]
            samples.append(order + image)
            rows.append(order[..., None] * tokens + torch.arange(start, start + tokens, device=device))
            counts.append(keep)
            image, start = image + images, start + images * tokens

        def branch(i: int, j: int) -> DropPathSubset:
            lengths = tuple((keep[i], tokens) for keep, (_, tokens) in zip(counts, runs, strict=True))
            kept_images, kept_rows = (
                torch.cat([x[i, j, : keep[i]].flatten() for x, keep in zip(xs, counts, strict=True)])
                for xs in (samples, rows)
            )
            return DropPathSubset(kept_images, kept_rows, packing(lengths, impl, device), 1 / (1 - rates[i]))

        return [(branch(i, 0), branch(i, 1)) if rate else None for i, rate in enumerate(rates)]

    @overload
    def forward(self, x: Tensor | list[Tensor], return_patches: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor | list[Tensor], return_patches: Literal[True]
    ) -> tuple[Tensor, list[Tensor]]: ...
    def forward(
        self, x: Tensor | list[Tensor], return_patches: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Features of images: the normed class token.

        Args:
            x: images (B, C, H, W), or a list of such batches of any sizes, which run as one sequence.
            return_patches: return the normed patch tokens too.

        Returns:
            features: (B, D), all batches' one after another.
            patches: if asked, a list of (B, (H // patch) * (W // patch), D), one for each batch given.
        """
        images = [x] if isinstance(x, Tensor) else list(x)
        if not images:
            raise ValueError("an empty list of images: give at least one batch")
        sizes: list[list[Tensor]] = []
        for batch in images:
            self._check(batch)
            if sizes and sizes[-1][0].shape[2:] == batch.shape[2:]:
                sizes[-1].append(batch)
            else:
                sizes.append([batch])
        tokens, runs = self._pack(sizes)
        (tokens,) = self._run(tokens, runs, self.blocks, class_only=not return_patches)
        if not return_patches:
            return self.norm(tokens)
        normed = split_runs(self.norm(tokens), runs)
        return torch.cat([part[:, 0] for part in normed]), [
            patches
            for part, same in zip(normed, sizes, strict=True)
            for patches in part[:, 1 + self.num_register_tokens :].split([len(batch) for batch in same])
        ]

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """The last block's attention weights (B, heads, 1 + R + N, 1 + R + N); row 0 is the class token's.

        Whatever computes attention elsewhere, these are written out.
        """
        tokens, runs = self._pack([[x]])
        (tokens,) = self._run(tokens, runs, self.blocks[:-1]) or (tokens,)  # a single block has none before
        last: Any = self.blocks[-1]
        return last.attn.weights(last.norm1(tokens.unflatten(0, runs[0])))

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """The outputs (B, 1 + R + N, D) of the last n blocks, each normed, the deepest last."""
        if not 1 <= n <= len(self.blocks):
            raise ValueError(f"n {n}: there are {len(self.blocks)} blocks, give 1 to {len(self.blocks)}")
        tokens, runs = self._pack([[x]])
        outputs = self._run(tokens, runs, self.blocks, n=n)
        return [self.norm(tokens).unflatten(0, runs[0]) for tokens in outputs]


def vit_nano(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """Width 128, 4 blocks, 4 heads: 0.9 M parameters, for demonstrations and tests."""
    return VisionTransformer(patch_size=patch_size, embed_dim=128, depth=4, num_heads=4, **kwargs)


def vit_tiny(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """Width 192, 12 blocks, 3 heads: 5.5 M parameters."""
    return VisionTransformer(patch_size=patch_size, embed_dim=192, depth=12, num_heads=3, **kwargs)


def vit_small(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """Width 384, 12 blocks, 6 heads: 21.7 M parameters."""
    return VisionTransformer(patch_size=patch_size, embed_dim=384, depth=12, num_heads=6, **kwargs)


def vit_base(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """Width 768, 12 blocks, 12 heads: 85.8 M parameters."""
    return VisionTransformer(patch_size=patch_size, embed_dim=768, depth=12, num_heads=12, **kwargs)


def vit_large(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """Width 1024, 24 blocks, 16 heads: 303 M parameters."""
    return VisionTransformer(patch_size=patch_size, embed_dim=1024, depth=24, num_heads=16, **kwargs)


def vit_huge(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """Width 1280, 32 blocks, 16 heads: 631 M parameters."""
    return VisionTransformer(patch_size=patch_size, embed_dim=1280, depth=32, num_heads=16, **kwargs)


def vit_giant(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """Width 1536, 40 blocks, 24 heads, SwiGLU, as DINOv2's giant: 1.1 G parameters."""
    kwargs = {"ffn_layer": "swiglu"} | kwargs
    return VisionTransformer(patch_size=patch_size, embed_dim=1536, depth=40, num_heads=24, **kwargs)
