"""Backbones by name, and by the tensors of a file: images (B, C, H, W) to features (B, D)."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdino import adapter, vit
from fastdino.config import ModelConfig
from fastdino.vit import VisionTransformer

VITS: dict[str, Callable[..., VisionTransformer]] = {
    "vit_nano": vit.vit_nano,
    "vit_tiny": vit.vit_tiny,
    "vit_small": vit.vit_small,
    "vit_base": vit.vit_base,
    "vit_large": vit.vit_large,
    "vit_huge": vit.vit_huge,
    "vit_giant": vit.vit_giant,
}


def build_backbone(config: ModelConfig, image_size: int = 224, drop_path_rate: float = 0.0) -> nn.Module:
    """The network that `config.arch` names, untrained: (B, 3, H, W) to (B, D) features.

    `image_size` is the side in pixels whose patch grid a ViT's position embedding is made for.

    Raises:
        ValueError: an unknown name; the message lists known ones.
    """
    library, _, name = config.arch.rpartition(":")
    if config.arch in VITS:
        return VITS[config.arch](
            config.patch_size,
            img_size=image_size,
            drop_path_rate=drop_path_rate,
            init_values=config.layer_scale or None,
            **register_options(config.num_register_tokens),
        )
    if library == "torchvision" or config.arch in adapter.RESNETS:
        return adapter.torchvision_backbone(name, drop_path_rate)
    if library == "timm":
        return adapter.timm_backbone(name, drop_path_rate)
    raise ValueError(
        f"--arch {config.arch} is unknown: choose from {', '.join([*VITS, *adapter.RESNETS])}, "
        "torchvision:NAME, timm:NAME"
    )


def register_options(n: int) -> dict[str, Any]:
    """A ViT's options for n registers: with some, DINOv2 resizes positions with antialiasing, offset 0."""
    if n == 0:
        return {"num_register_tokens": 0}
    return {"num_register_tokens": n, "interpolate_antialias": True, "interpolate_offset": 0.0}


@functools.cache
def _names_and_heads() -> dict[tuple[int, int], tuple[str, int]]:
    """Name and number of heads of each ViT by width and depth."""
    with torch.device("meta"):
        networks = {name: make() for name, make in VITS.items()}
    return {(vit.embed_dim, len(vit.blocks)): (name, vit.num_heads) for name, vit in networks.items()}


def network_of(state: dict[str, Tensor]) -> nn.Module:
    """An untrained network for a backbone's tensors, by our names: a ResNet or a ViT.

    No tensor tells the number of heads: it is that of the named ViT of this width and depth, else heads are
    64 channels wide.

    Raises:
        ValueError: the tensors are of neither.
    """
    if "conv1.weight" in state:
        shapes = {name: tensor.shape for name, tensor in state.items() if not name.startswith("fc.")}
        for name in adapter.RESNETS:
            with torch.device("meta"):
                candidate = adapter.torchvision_backbone(name)
            if {n: t.shape for n, t in candidate.state_dict().items()} == shapes:
                return adapter.torchvision_backbone(name)
    ffn = "swiglu" if "blocks.0.mlp.w3.weight" in state else "mlp"
    last = f"blocks.0.mlp.{'w3' if ffn == 'swiglu' else 'fc2'}.weight"
    ndims = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, last: 2}
    if missing := [name for name, ndim in ndims.items() if name not in state or state[name].ndim != ndim]:
        raise ValueError(
            f"these are not the tensors of a ViT (no {', '.join(missing)}) or a ResNet of torchvision: there "
            f"are {', '.join(list(state)[:6])}, ..."
            + ("; DINOv3's rotary positions are not known here" if "rope_embed.periods" in state else "")
        )
    dim, patches = state["cls_token"].shape[-1], state["pos_embed"].shape[1] - 1
    side, filters = math.isqrt(max(patches, 0)), state["patch_embed.proj.weight"]
    blocks = (int(match[1]) for name in state if (match := re.match(r"blocks\.(\d{1,6})\.", name)))
    depth = min(1 + max(blocks), len(state))  # a block has several tensors
    _, heads = _names_and_heads().get((dim, depth), ("", dim // 64))
    if side * side != patches or not side or not filters.shape[-1] or not heads or dim % heads:
        raise ValueError(
            f"a ViT of width {dim} with {patches} positions: only square grids and heads of 64 are known"
        )
    # a SwiGLU is two thirds as wide as its ratio says
    ratio = state[last].shape[1] / dim * (1.5 if ffn == "swiglu" else 1)
    registers = state.get("register_tokens")
    return VisionTransformer(
        img_size=side * filters.shape[-1],
        patch_size=filters.shape[-1],
        in_chans=filters.shape[1],
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=ratio,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        init_values=1e-5 if "blocks.0.ls1.gamma" in state else None,
        ffn_layer=ffn,  # type: ignore[arg-type]
        **register_options(0 if registers is None else registers.shape[1]),
    )


def flags_of(state: dict[str, Tensor]) -> str:
    """The flags of `fastdino-train` for a ViT with these tensors; empty if it is none of VITS."""
    try:
        with torch.device("meta"):
            network: Any = network_of(state)
        arch, _ = _names_and_heads()[network.embed_dim, len(network.blocks)]
    except (ValueError, LookupError, AttributeError, RuntimeError, ArithmeticError):
        return ""
    flags = {"arch": arch, "patch-size": network.patch_size}
    if network.num_register_tokens:
        flags["num-register-tokens"] = network.num_register_tokens
    if "blocks.0.ls1.gamma" in state:
        flags["layer-scale"] = 1e-5
    return " ".join(f"--{name} {value}" for name, value in flags.items())
