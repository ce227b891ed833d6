"""The vision transformer of DINO: images to the normed class token (paper, section 3.2)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.ops.attention import attention


def drop_path(x: Tensor, rate: float) -> Tensor:
    """Zero each sample of x (B, ...) with probability `rate`; scale the others to keep the expectation."""
    keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - rate)
    # Divide x, not the mask: 1 / 0.9 rounded to bf16 would be off by 0.16 % in every sample alike.
    return x / (1 - rate) * keep


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of x (B, N, D), each (B, heads, N, D / heads)."""
        b, n, d = x.shape
        return (
            self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        )

    def weights(self, x: Tensor) -> Tensor:
        """The attention weights written out, (B, heads, N, N); each row sums to 1."""
        q, k, _ = self.heads(x)
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; in training it drops a sample's branches with probability `drop_rate`."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, drop_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._drop(self.attn(self.norm1(x)))
        return x + self._drop(self.mlp(self.norm2(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_rate) if self.training and self.drop_rate > 0 else x


class PatchEmbed(nn.Module):
    """Each patch to a vector: (B, C, H, W) -> (B, (H // patch) * (W // patch), D); the rest is left out."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """A vision transformer with official DINO's mathematics and state-dict names.

    `img_size`, pixels or (height, width), fixes the base grid: the shape of the learnt position embedding.
    Images of any other size that hold a patch are taken too, with the embedding interpolated. Raises
    ValueError on sizes that cannot be.
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
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.grid = (height // patch_size, width // patch_size)

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1], embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, drop_rate=drop_path_rate * i / max(depth - 1, 1))
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
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
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
        patches = self.pos_embed[:, 1:].unflatten(1, self.grid).permute(0, 3, 1, 2)
        # The 0.1 moves every sample a little: `size=` would not be what released weights were trained with.
        patches = F.interpolate(
            patches,
            scale_factor=((rows + 0.1) / base_rows, (columns + 0.1) / base_columns),
            mode="bicubic",
        )
        if patches.shape[2:] != (rows, columns):
            raise ValueError(
                f"position embedding of {base_rows} x {base_columns} patches became "
                f"{patches.shape[2]} x {patches.shape[3]}, not {rows} x {columns}: give another image size"
            )
        return torch.cat((self.pos_embed[:, :1], patches.flatten(2).transpose(1, 2)), dim=1)

    def prepare_tokens(self, x: Tensor) -> Tensor:
        """Class token and patches of x (B, C, H, W) with their positions: (B, 1 + N, D)."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"images of shape {tuple(x.shape)}: give (batch, {self.in_chans}, height, width)"
            )
        rows, columns = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        if rows == 0 or columns == 0:
            raise ValueError(
                f"images of {x.shape[2]} x {x.shape[3]} pixels hold no patch of {self.patch_size}: "
                "give larger images or a smaller patch_size"
            )
        positions = self.interpolate_pos_embed(x.shape[2], x.shape[3])
        patches = self.patch_embed(x) + positions[:, 1:]
        cls_token = (self.cls_token + positions[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat((cls_token, patches), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, D) of images x (B, C, H, W): the normed class token."""
        x = self.prepare_tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """The last block's attention weights (B, heads, 1 + N, 1 + N); row 0 is the class token's."""
        x = self.prepare_tokens(x)
        for block in self.blocks[:-1]:
            x = block(x)
        last: Any = self.blocks[-1]
        return last.attn.weights(last.norm1(x))

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """The outputs (B, 1 + N, D) of the last n blocks, each normed, the deepest last."""
        if not 1 <= n <= len(self.blocks):
            raise ValueError(f"n {n}: there are {len(self.blocks)} blocks, give 1 to {len(self.blocks)}")
        x = self.prepare_tokens(x)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= len(self.blocks) - n:
                outputs.append(self.norm(x))
        return outputs


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
