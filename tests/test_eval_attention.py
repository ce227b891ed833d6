"""Maps of attention: which weights they are, where on the image they lie, and the picture of them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastdino.config import CropPolicy
from fastdino.data import crops
from fastdino.eval.attention import attention_maps, plot_attention
from fastdino.vit import vit_nano

POLICY = CropPolicy(global_crops_size=16, local_crops_number=0)


def pictures(n: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20 + 3 * i, 33, 3), dtype=np.uint8)) for i in range(n)]


@pytest.mark.parametrize(("patch", "height", "width"), [(4, 16, 16), (4, 12, 24), (5, 17, 23)])
def test_maps_are_the_class_tokens_row_over_the_patch_grid(patch, height, width):
    network = vit_nano(patch, img_size=16).eval()
    images = torch.randn(2, 3, height, width)
    maps = attention_maps(network, images)
    weights = network.get_last_selfattention(images)
    rows, columns = height // patch, width // patch
    assert maps.shape == (2, 4, rows, columns)
    for i in range(rows):
        for j in range(columns):
            assert torch.equal(maps[:, :, i, j], weights[:, :, 0, 1 + i * columns + j])
    torch.testing.assert_close(maps.sum((2, 3)), 1 - weights[:, :, 0, 0])
    assert not maps.requires_grad


def test_maps_leave_registers_out():
    network = vit_nano(4, img_size=16, num_register_tokens=2).eval()
    images = torch.randn(2, 3, 12, 24)
    maps, weights = attention_maps(network, images), network.get_last_selfattention(images)
    assert weights.shape[-1] == 1 + 2 + 3 * 6
    assert torch.equal(maps, weights[:, :, 0, 3:].unflatten(-1, (3, 6)))


class Known:
    """A network whose six or more heads attend to patches that are known: head i to the i-th patch alone."""

    patch_size = 4

    def __init__(self, heads: int) -> None:
        self.heads, self.seen = heads, []

    def get_last_selfattention(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        rows, columns = images.shape[2] // 4, images.shape[3] // 4
        weights = torch.zeros(len(images), self.heads, 1 + rows * columns, 1 + rows * columns)
        for i in range(self.heads):
            weights[:, i, 0, 1 + i] = 1.0
        return weights


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("heads", [3, 8])
def test_a_row_shows_the_image_the_mean_and_up_to_six_heads(n, heads, drawn, tmp_path: Path):
    network, images = Known(heads), pictures(n)
    assert plot_attention(network, images, POLICY, tmp_path / "a.png") == tmp_path / "a.png"
    panels = [axis for axis in drawn[0].axes if axis.images]
    columns = 2 + min(heads, 6)
    assert len(panels) == n * columns
    titles = ["image", "mean", *(f"head {i + 1}" for i in range(min(heads, 6)))]
    assert [panel.get_title() for panel in panels[:columns]] == titles
    shown = [np.asarray(panel.images[0].get_array()) for panel in panels]
    for i, image in enumerate(images):
        # twice the training size, as fastdino-eval would crop it
        picture = crops.eval_image(image, 32)
        start = next(j for j, x in enumerate(shown) if x.ndim == 3 and np.array_equal(x, np.asarray(picture)))
        expected = (np.asarray(picture, dtype=np.float64) / 255 - POLICY.mean) / POLICY.std
        given = torch.cat(network.seen)[i].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(given, expected, atol=1e-5)
        blocks = np.zeros((heads, 32, 32))
        for head in range(heads):  # head i attends to the i-th of 8 x 8 patches: a square of 4 pixels
            row, column = divmod(head, 8)
            blocks[head, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
        np.testing.assert_allclose(shown[start + 1], blocks.mean(0), atol=1e-6)
        for head in range(min(heads, 6)):
            np.testing.assert_array_equal(shown[start + 2 + head], blocks[head])


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("patch", [4, 5])  # 32 pixels are no multiple of 5: 30 are shown
def test_the_picture_opens_and_needs_no_display(n, patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it raises
    path = plot_attention(
        vit_nano(patch, img_size=16).eval(), pictures(n), POLICY, tmp_path / "attention.png"
    )
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 100
        assert len(image.convert("RGB").getcolors(1 << 24)) > 100
    assert [p.name for p in tmp_path.iterdir()] == ["attention.png"]


# Images of one token, of DINO's crops, and of more than 256; none; one length that comes again.
