"""Networks of torchvision and timm as backbones: images in, pooled features out, tensors' names unchanged."""

import difflib
from typing import Any

import torch
from torch import Tensor, nn

# The names that need no prefix, and whose released weights are recognised by their tensors.
RESNETS = (
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


def _unknown(arch: str, known: list[str]) -> ValueError:
    close = difflib.get_close_matches(arch.partition(":")[2], known, n=5)
    return ValueError(
        f"--arch {arch} is unknown: "
        + (f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(known[:5])}, ...")
    )


def torchvision_backbone(name: str, drop_path_rate: float = 0.0) -> nn.Module:
    """torchvision's classifier `name`, untrained, without its last linear layer: (B, 3, H, W) -> (B, D).

    Where the network has stochastic depth, its rate grows linearly from 0 to `drop_path_rate`.

    Raises:
        ValueError: there is no such classifier.
    """
    from torchvision import models  # takes a second, and a ViT does without
    from torchvision.ops import StochasticDepth

    known = models.list_models(module=models)
    if name not in known:
        raise _unknown(f"torchvision:{name}", known)
    network = models.get_model(name, weights=None)
    last = [n for n, m in network.named_modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    if not last:
        raise ValueError(
            f"--arch torchvision:{name} has no linear layer before which features could be taken"
        )
    network.set_submodule(last[-1], nn.Identity())
    depths = [module for module in network.modules() if isinstance(module, StochasticDepth)]
    for i, module in enumerate(depths):
        module.p = drop_path_rate * i / max(len(depths) - 1, 1)
    return network


def timm_backbone(name: str, drop_path_rate: float = 0.0, in_chans: int = 3) -> nn.Module:
    """timm's model `name`, untrained, without a classifier: (B, C, H, W) -> (B, D).

    It takes images of any size where timm can make it so, and stochastic depth where it has any.

    Raises:
        ValueError: timm is not installed, or has no such model.
    """
    try:
        import timm
    except ImportError:
        raise ValueError(f"--arch timm:{name} needs timm: pip install 'fastdino[timm]'") from None
    if not timm.is_model(name):
        raise _unknown(f"timm:{name}", timm.list_models())
    # What a model does not know it refuses with a TypeError; of the flags for sizes it has one or none.
    sizes: list[dict[str, Any]] = [{"dynamic_img_size": True}, {"strict_img_size": False}, {}]
    depths: list[dict[str, Any]] = [{"drop_path_rate": drop_path_rate}, {}]
    for options in [size | depth for depth in depths for size in sizes]:
        try:
            return timm.create_model(name, pretrained=False, num_classes=0, in_chans=in_chans, **options)
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
    raise AssertionError("unreachable: the last options are none")


def feature_dim(network: nn.Module, arch: str, sizes: list[int], in_chans: int = 3) -> int:
    """The width D of the features (2, D) that `network` gives for square images of each of `sizes` pixels.

    Nothing is computed: shapes alone go through the network.

    Raises:
        ValueError: it takes no images of one of the sizes, or gives no features of one width.
    """
    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    on_meta = {name: tensor.detach().to("meta") for name, tensor in state.items()}
    widths = set()
    for size in sizes:
        images = torch.empty(2, in_chans, size, size, device="meta")
        try:
            with torch.no_grad():
                features = torch.func.functional_call(network, on_meta, (images,))
        except Exception as error:  # whatever a network of others raises
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(
                f"--arch {arch} takes no images of {size} x {size} pixels ({reason}): choose other "
                "--global-crops-size and --local-crops-size, another network, or --local-crops-number 0 for "
                "one size"
            ) from error
        if not isinstance(features, Tensor) or features.ndim != 2:
            what = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"--arch {arch} gives {what} for two images, not features (2, D)")
        widths.add(features.shape[1])
    if len(widths) > 1:
        raise ValueError(
            f"--arch {arch} gives {' or '.join(map(str, sorted(widths)))} features for images of "
            f"{' or '.join(map(str, sizes))} pixels: it is made for one size"
        )
    return widths.pop()
