"""The ResNets: torchvision's networks without their classifier."""

import copy

import pytest
import torch
from torch import nn
from torchvision import models

from fastdino.resnet import NAMES, resnet


def test_the_names_are_torchvisions() -> None:
    # ResNets are the models that torchvision's own module of that name builds.
    family = [
        name for name in models.list_models() if models.get_model_builder(name).__module__.endswith(".resnet")
    ]
    in_segmentation_or_quantization = {name for name in family if not hasattr(models, name)}
    assert set(NAMES) == set(family) - in_segmentation_or_quantization


@pytest.mark.parametrize("name", NAMES)
def test_every_network_is_torchvisions_without_its_classifier(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = resnet(name), models.get_model(name, weights=None)
    classifier = {"fc.weight", "fc.bias"}
    assert list(ours.state_dict()) == [key for key in theirs.state_dict() if key not in classifier]
    assert ours.embed_dim == theirs.fc.in_features == (512 if name in ("resnet18", "resnet34") else 2048)
    assert isinstance(ours.fc, nn.Identity)


def test_resnet50_has_the_published_size() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in resnet("resnet50").parameters()) == 23_508_032


def test_features_are_what_torchvision_classifies(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    ours, theirs = resnet("resnet18").eval(), models.resnet18().eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    x = torch.randn(2, 3, 65, 48)
    with torch.no_grad():
        features = ours(x)
        assert features.shape == (2, 512)
        assert features.std() > 0.1
        assert torch.equal(theirs.fc(features), theirs(x))
        assert torch.equal(copy.deepcopy(ours)(x), features)
    assert all(value.isfinite().all() for value in ours.state_dict().values())


@pytest.mark.parametrize("name", ["resnet51", "vgg16", "fcn_resnet50", ""])
def test_an_unknown_name_lists_the_known(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"no ResNet is called '{name}': choose one of resnet18, .*wide_resnet101_2"
    ):
        resnet(name)
