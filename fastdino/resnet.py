"""The ResNet family of torchvision as backbones: images in, pooled features out."""

from torch import nn

NAMES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)


def resnet(name: str) -> nn.Module:
    """The network `name`, untrained: (B, 3, H, W) -> (B, embed_dim). State-dict names: torchvision's, no fc.

    Its attribute embed_dim is the width of the features. Raises ValueError on a name that is not in NAMES.
    """
    if name not in NAMES:
        raise ValueError(f"no ResNet is called {name!r}: choose one of {', '.join(NAMES)}")
    from torchvision import models  # takes a second, and a ViT does without

    network = models.get_model(name, weights=None)
    network.embed_dim = network.fc.in_features
    network.fc = nn.Identity()
    return network
