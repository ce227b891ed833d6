"""Backbones by name and by the tensors of a file."""

import pytest
import torch
from torchvision import models

from fastdino import vit
from fastdino.backbones import build_backbone, flags_of, network_of
from fastdino.config import ModelConfig
from fastdino.vit import VisionTransformer


def test_unknown_arch_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"--arch vit_smal is unknown.*vit_small.*resnet50"):
        build_backbone(ModelConfig(arch="vit_smal"))


@pytest.mark.parametrize("arch", ["vit_nano", "vit_tiny", "vit_huge", "vit_giant"])
def test_every_vit_is_known_by_its_tensors(arch: str) -> None:
    # No tensor tells the number of heads: vit_nano's and vit_huge's are not 64 channels wide.
    with torch.device("meta"):
        source = getattr(vit, arch)(14, num_register_tokens=4, init_values=0.1, img_size=70)
        plain = getattr(vit, arch)(16)
        read = network_of(source.state_dict())
    shapes = {name: value.shape for name, value in source.state_dict().items()}
    assert {name: value.shape for name, value in read.state_dict().items()} == shapes
    assert (read.num_heads, read.patch_size, read.grid) == (source.num_heads, 14, (5, 5))
    assert (
        flags_of(source.state_dict())
        == f"--arch {arch} --patch-size 14 --num-register-tokens 4 --layer-scale 1e-05"
    )
    assert flags_of(plain.state_dict()) == f"--arch {arch} --patch-size 16"


def test_networks_without_a_name_have_no_flags() -> None:
    unnamed = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1)
    assert flags_of(unnamed.state_dict()) == ""
    assert flags_of(models.resnet18().state_dict()) == ""
    assert flags_of({"weight": torch.zeros(1)}) == ""
