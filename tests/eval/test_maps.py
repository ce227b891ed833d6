"""Maps of attention: which weights they are, and where on the image they lie."""

from pathlib import Path

import numpy as np
import pytest
import torch
from eval_runs import ATTENTION_CONFIG as CONFIG
from eval_runs import make_attention_run, photo
from PIL import Image

from fastdino.config import CropPolicy
from fastdino.eval.maps import attention_maps, fit_to_patches, keep_mass, load_vit, look
from fastdino.vit import VisionTransformer, vit_nano, vit_small

POLICY = CropPolicy(global_crops_size=16, local_crops_number=0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_attention_run(tmp_path)


# Maps.


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(("patch", "height", "width"), [(4, 16, 16), (4, 12, 24), (5, 17, 23)])
def test_maps_are_the_class_tokens_row_over_the_patch_grid(patch, height, width, depth, registers):
    network = VisionTransformer(
        img_size=16,
        patch_size=patch,
        embed_dim=24,
        depth=depth,
        num_heads=3,
        num_register_tokens=registers,
        init_values=0.5,
    ).eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.5)  # initial weights make nearly uniform attention
    images = torch.randn(2, 3, height, width)
    maps = attention_maps(network, images)
    rows, columns = height // patch, width // patch
    weights = network.get_last_selfattention(images)
    assert weights.shape[-1] == 1 + registers + rows * columns
    assert maps.shape == (2, 3, rows, columns)
    assert maps.std() > 0.01
    for i in range(rows):
        for j in range(columns):
            torch.testing.assert_close(maps[:, :, i, j], weights[:, :, 0, 1 + registers + i * columns + j])
    torch.testing.assert_close(maps.sum((2, 3)), 1 - weights[:, :, 0, : 1 + registers].sum(-1))
    assert not maps.requires_grad


def test_maps_need_no_square_of_the_tokens(monkeypatch: pytest.MonkeyPatch):
    sizes: list[torch.Size] = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda x, *args, **kw: sizes.append(x.shape) or softmax(x, *args, **kw)
    )
    attention_maps(vit_nano(4, img_size=16).eval(), torch.randn(1, 3, 40, 60))
    assert sizes == [(1, 4, 1, 1 + 150)]  # the class token's row, and no other


# Sums of powers of two, so that nothing is rounded. Of eight equal patches 0.375 are three: five hold 0.625.
@pytest.mark.parametrize(
    ("values", "share", "kept"),
    [
        ([8, 1, 4, 1, 1, 1], 0.5, [1, 0, 0, 0, 0, 0]),  # 8 of 16
        ([8, 1, 4, 1, 1, 1], 0.625, [1, 0, 1, 0, 0, 0]),  # 10 of 16 want 12
        ([8, 1, 4, 1, 1, 1], 0.75, [1, 0, 1, 0, 0, 0]),  # 12 are exactly enough
        ([8, 1, 4, 1, 1, 1], 0.8125, [1, 0, 1, 0, 0, 1]),  # of equal ones the last stays
        ([1, 1, 1, 1, 1, 1, 1, 1], 0.625, [0, 0, 0, 1, 1, 1, 1, 1]),
        ([2, 2, 4, 4, 2, 2], 0.5, [0, 0, 1, 1, 0, 0]),
        ([3, 1, 0, 0], 1.0, [1, 1, 0, 0]),
        ([3, 1, 0, 0], 0.01, [1, 0, 0, 0]),
        ([0, 0, 0, 0], 0.6, [0, 0, 0, 0]),
    ],
)
def test_a_mask_keeps_the_fewest_strongest_patches_that_hold_the_share(values, share, kept):
    maps = torch.tensor(values, dtype=torch.float32).view(1, 2, -1) / 16
    assert keep_mass(maps, share).int().flatten().tolist() == kept


def test_masks_of_many_maps_are_each_their_own():
    maps = torch.rand(2, 3, 4, 5).square()
    masks = keep_mass(maps, 0.6)
    assert masks.shape == maps.shape
    assert masks.dtype == torch.bool
    for one, mask in zip(maps.flatten(0, 1), masks.flatten(0, 1), strict=True):
        assert torch.equal(keep_mass(one, 0.6), mask)
        total, kept = one.double().sum(), one[mask].double().sum()
        assert kept >= 0.6 * total > kept - one[mask].min()
        assert one[mask].min() >= one[~mask].max()


# Images as the network sees them.


@pytest.mark.parametrize(
    ("size", "side", "patch", "resized", "box"),
    [
        ((640, 427), 480, 16, (719, 480), (7, 0, 711, 480)),  # 640 * 480 / 427 = 719.4; 15 pixels too many
        ((427, 640), 480, 16, (480, 719), (0, 7, 480, 711)),
        ((300, 300), 480, 14, (476, 476), (0, 0, 476, 476)),  # 34 patches
        ((100, 50), 32, 8, (64, 32), (0, 0, 64, 32)),
    ],
)
def test_images_keep_their_aspect_and_lose_less_than_a_patch(size, side, patch, resized, box):
    assert fit_to_patches(size, side, patch) == (resized, box)


@pytest.mark.parametrize("size", [(50, 40), (33, 70)])
def test_the_network_sees_the_middle_of_the_resized_image(size):
    network, image = vit_nano(4, img_size=16).eval(), photo(*size)
    seen, maps = look(network, image, 22, POLICY)  # 20 pixels are whole patches
    wide = image.resize((25, 20) if size[0] == 50 else (20, 42), Image.Resampling.BICUBIC)
    expected = wide.crop((0, 0, 24, 20) if size[0] == 50 else (0, 1, 20, 41))
    assert np.array_equal(np.asarray(seen), np.asarray(expected))
    pixels = (np.asarray(expected, dtype=np.float32) / 255 - POLICY.mean) / POLICY.std
    x = torch.from_numpy(pixels).float().permute(2, 0, 1)[None]
    torch.testing.assert_close(maps, attention_maps(network, x)[0], rtol=1e-4, atol=1e-6)


def test_weights_come_with_the_side_to_show_images_at(run: Path, tmp_path: Path):
    network, policy, side = load_vit(str(run), "cpu")
    assert (policy, side) == (CONFIG.data.crops, 32)
    torch.save(network.state_dict(), tmp_path / "other.pth")
    other, policy, side = load_vit(str(tmp_path / "other.pth"), "cpu")
    assert (policy, side) == (CropPolicy(), 480)
    x = torch.randn(1, 3, 24, 24)
    assert torch.equal(attention_maps(other, x), attention_maps(network, x))


def test_released_networks_have_the_maps_of_their_heads():
    """Six of ViT-S/8 over 4 x 6 patches, as official DINO's weights are shown."""
    assert attention_maps(vit_small(8).eval(), torch.randn(1, 3, 32, 48)).shape == (1, 6, 4, 6)
