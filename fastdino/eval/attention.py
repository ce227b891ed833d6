"""Where the network looks: attention of the CLS token over the image in the last block (paper, figure 1)."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastdino.config import CropPolicy
from fastdino.data import crops
from fastdino.files import write_atomically


@torch.no_grad()
def attention_maps(network: Any, images: Tensor) -> Tensor:
    """CLS attention per head (B, heads, h, w) over the patch grid; CLS and registers have the rest of 1.

    Args:
        network: a `VisionTransformer` in evaluation mode.
        images: normalised (B, 3, H, W).
    """
    patch = network.patch_size
    h, w = images.shape[-2] // patch, images.shape[-1] // patch
    return network.get_last_selfattention(images)[:, :, 0, -h * w :].unflatten(
        -1, (h, w)
    )  # patches come last


def plot_attention(
    network: Any,
    images: list[Image.Image],
    policy: CropPolicy,
    path: Path,
    device: str | torch.device = "cpu",
) -> Path:
    """Draw a row per image, image | mean of the heads | each head (at most six), to the PNG `path`.

    Images are shown at twice the training size, as the paper shows 480 pixels for a network trained at 224.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    patch = network.patch_size
    side = 2 * policy.global_crops_size // patch * patch
    shown = [crops.eval_image(image, side) for image in images]
    # One image at a time: for ViT-B/8 at 448 pixels the attention of each is 0.5 GB.
    pixels = [crops.normalize(crops.to_tensor(image)[None].to(device), policy) for image in shown]
    maps = torch.cat([attention_maps(network, x) for x in pixels])
    maps = torch.cat([maps.mean(dim=1, keepdim=True), maps[:, :6]], dim=1)
    pictures = F.interpolate(maps.float(), size=(side, side), mode="nearest").cpu().numpy()
    # Two images share a row, so that the figure is about as wide as high.
    pairs, columns = math.ceil(len(shown) / 2), 1 + pictures.shape[1]
    figure = Figure(figsize=(2 * columns * 1.1, pairs * 1.15 + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(pairs, 2 * columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    titles = ["image", "mean", *(f"head {i}" for i in range(1, columns - 1))]
    for i, image in enumerate(shown):
        row = axes[i // 2][columns * (i % 2) :]
        row[0].imshow(image)
        for axis, heads in zip(row[1:], pictures[i], strict=False):
            axis.imshow(heads, cmap="inferno", vmin=0)
        if i < 2:
            for axis, title in zip(row, titles, strict=False):
                axis.set_title(title, fontsize=8)
    write_atomically(path, lambda beside: figure.savefig(beside, format="png", dpi=110))
    return path
