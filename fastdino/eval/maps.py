"""Attention of the class token over an image in the last block: maps and masks (paper, figures 1, 3, 4)."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from fastdino.cli import say
from fastdino.config import CropPolicy
from fastdino.data import crops, open_source
from fastdino.data.images import EXTENSIONS, Unreadable, read_image
from fastdino.eval.common import trained_policy
from fastdino.ops.packed_attention import choose, packing
from fastdino.vit import VisionTransformer
from fastdino.weights import load_backbone

SIDE = 480  # of an image's shorter side, in pixels, as official DINO shows networks trained at 224
MASS = 0.6  # share of the attention that a mask keeps, as in the paper


@torch.no_grad()
def attention_maps(network: VisionTransformer, images: Tensor) -> Tensor:
    """CLS attention per head (B, heads, h, w) over the patch grid; CLS and registers have the rest of 1.

    Equals row 0 of `get_last_selfattention`. Only that row is computed: all rows would take 1.1 GB an image
    for ViT-B/8 at 480 x 640 pixels.

    Args:
        network: in evaluation mode.
        images: normalised (B, 3, H, W).
    """
    patch, heads, channels = network.patch_size, network.num_heads, network.embed_dim // network.num_heads
    tokens = network.prepare_tokens(images)
    runs = ((tokens.shape[0], tokens.shape[1]),)
    impl = network.attention_impl
    if impl == "auto":
        impl = choose(runs, heads, channels, tokens.dtype, tokens.device)
    packed = packing(runs, impl, tokens.device)
    x = tokens.flatten(0, 1)
    blocks: list[Any] = list(network.blocks)
    for block in blocks[:-1]:
        x = block(x, packed)
    normed = blocks[-1].norm1(x.unflatten(0, runs[0]))
    q, k, _ = blocks[-1].attn.heads(normed).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q[:, :, :1] * channels**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1)[:, :, 0]
    h, w = images.shape[-2] // patch, images.shape[-1] // patch
    return weights[:, :, -h * w :].unflatten(-1, (h, w))  # patches come last


def keep_mass(maps: Tensor, share: float = MASS) -> Tensor:
    """The patches that hold `share` of each map's mass, as official DINO: (..., h, w), to bool on the CPU.

    The weakest patches are left out as long as together they hold at most 1 - share; among equal ones those
    above, then those on the left, are left out first.
    """
    values, order = maps.double().cpu().flatten(-2).sort(dim=-1, stable=True)
    mass = values.cumsum(-1)
    kept = mass > (1 - share) * mass[..., -1:]
    return torch.zeros_like(kept).scatter(-1, order, kept).view(maps.shape)


class Fit(NamedTuple):
    """How an image is resized and then cropped to whole patches, without distortion."""

    size: tuple[int, int]
    """(width, height) after resizing."""
    box: tuple[int, int, int, int]
    """The crop of the resized image: left, top, right, bottom."""


def fit_to_patches(size: tuple[int, int], side: int, patch: int) -> Fit:
    """Fit an image of (width, height): resize the shorter side to `side`, rounded down to whole patches, and
    crop the longer one to the central patches. Raises ValueError if `side` holds no patch."""
    if side < patch:
        raise ValueError(
            f"--image-size {side}: the network's patches have {patch} pixels; give {patch} or more"
        )
    side = side // patch * patch
    width, height = (max(side, round(x * side / min(size))) for x in size)
    left, top = width % patch // 2, height % patch // 2
    return Fit((width, height), (left, top, left + width // patch * patch, top + height // patch * patch))


def look(
    network: VisionTransformer,
    image: Image.Image,
    side: int,
    policy: CropPolicy,
    device: str | torch.device = "cpu",
) -> tuple[Image.Image, Tensor]:
    """The image as the network saw it (`fit_to_patches`) and the maps (heads, h, w), float32 on the CPU."""
    size, box = fit_to_patches(image.size, side, network.patch_size)
    seen = image.resize(size, Image.Resampling.BICUBIC).crop(box)
    return seen, maps_of(network, seen, policy, device)


def maps_of(
    network: VisionTransformer, image: Image.Image, policy: CropPolicy, device: str | torch.device
) -> Tensor:
    """The maps (heads, h, w) of an image that holds whole patches, float32 on the CPU."""
    x = crops.normalize(crops.to_tensor(image)[None].to(device), policy)
    return attention_maps(network, x)[0].float().cpu()


def load_vit(weights: str, device: str | torch.device) -> tuple[VisionTransformer, CropPolicy, int]:
    """A ViT, how images are normalised for it, and the shorter side of the images to show it.

    That is twice the size of the crops it was trained on, 480 pixels for weights of others.

    Raises:
        ValueError: weights of another network.
    """
    policy = trained_policy(weights)
    side = 2 * policy.global_crops_size if policy else SIDE
    network = load_backbone(weights, device)
    if not isinstance(network, VisionTransformer):
        raise ValueError(
            f"{weights}: a {type(network).__name__} has no class token whose attention could be shown; give "
            "weights of a ViT: a run with --arch vit_..., official DINO's, DINOv2's or timm's"
        )
    return network, policy or CropPolicy(), side


class NamedImage(NamedTuple):
    """An image that is read when it is needed."""

    name: str
    load: Callable[[], Image.Image]
    """Raises ValueError, naming the file and the reason."""


def open_images(paths: Iterable[str]) -> list[NamedImage]:
    """Images named one by one, or by a folder, a text file or tar shards of them."""
    images = []
    for path in paths:
        if Path(path).suffix.lower() in EXTENSIONS and not Path(path).is_dir():
            images.append(NamedImage(Path(path).name, partial(_readable, partial(read_image, path))))
        else:
            source = open_source(path)
            say(*source.notes)
            images += [
                NamedImage(source.name(i), partial(_readable, partial(source.load, i)))
                for i in range(len(source))
            ]
    return images


def _readable(load: Callable[[], Image.Image]) -> Image.Image:
    try:
        return load()
    except Unreadable as error:
        raise ValueError(f"{error}; give images that can be read") from None
