"""Networks of torchvision and timm: their own features, of every size of crop, and clear words where not."""

import copy
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import make_config
from torch import Tensor, nn
from torchvision import models
from torchvision.ops import StochasticDepth

from fastdino.adapter import RESNETS, feature_dim, timm_backbone, torchvision_backbone
from fastdino.backbones import build_backbone
from fastdino.config import ModelConfig
from fastdino.dino import DINO

NOWHERE = Path("unused")


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Noted and not only refused: a library may fall back on something else when it cannot connect.
    asked: list[object] = []

    def refuse(*args: object, **kwargs: object) -> None:
        asked.append(args)
        raise OSError("weights were asked for")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)  # else served from its cache
    yield
    assert asked == []


def on_meta(library: str, name: str) -> nn.Module:
    with torch.device("meta"):
        return torchvision_backbone(name) if library == "torchvision" else timm_backbone(name)


def perturb(network: nn.Module) -> None:
    """Other values than the initial ones, many of which are zeros, ones or a layer scale of 1e-6."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.numel() < 1_000_000:  # the others are random, and take seconds
                parameter.add_(0.05 * torch.randn_like(parameter))


# torchvision


def test_the_names_are_torchvisions() -> None:
    # ResNets are the models that torchvision's own module of that name builds.
    family = [
        name for name in models.list_models() if models.get_model_builder(name).__module__.endswith(".resnet")
    ]
    in_segmentation_or_quantization = {name for name in family if not hasattr(models, name)}
    assert set(RESNETS) == set(family) - in_segmentation_or_quantization


@pytest.mark.parametrize("name", RESNETS)
def test_every_resnet_is_torchvisions_without_its_classifier(name: str) -> None:
    ours = on_meta("torchvision", name)
    with torch.device("meta"):
        theirs = models.get_model(name, weights=None)
    classifier = {"fc.weight", "fc.bias"}
    assert list(ours.state_dict()) == [key for key in theirs.state_dict() if key not in classifier]
    width = 512 if name in ("resnet18", "resnet34") else 2048
    assert feature_dim(ours, name, [224, 96]) == theirs.fc.in_features == width


def test_resnet50_has_the_published_size() -> None:
    assert sum(p.numel() for p in on_meta("torchvision", "resnet50").parameters()) == 23_508_032


LAST = {
    "convnext_tiny": "classifier.2",
    "swin_t": "head",
    "efficientnet_b0": "classifier.1",
    "resnet18": "fc",
    "mobilenet_v3_small": "classifier.3",
    "vgg11": "classifier.6",
}


@pytest.mark.parametrize("name", LAST)
def test_features_are_what_torchvision_classifies(name: str) -> None:
    ours, theirs = torchvision_backbone(name).eval(), models.get_model(name, weights=None).eval()
    perturb(ours)
    state = ours.state_dict()
    assert all(value.isfinite().all() for value in state.values())
    classifier = [f"{LAST[name]}.weight", f"{LAST[name]}.bias"]
    assert theirs.load_state_dict(state, strict=False) == (classifier, [])
    x = torch.randn(2, 3, 65, 48)
    with torch.no_grad():
        features = ours(x)
        last = theirs.get_submodule(LAST[name])
        assert features.shape == (2, last.in_features)
        assert features.std() > 0.01
        assert not torch.equal(*features)  # they are of the images
        assert torch.equal(last(features), theirs(x))
        if name == "resnet18":
            assert torch.equal(copy.deepcopy(ours)(x), features)
    assert feature_dim(ours, name, [65, 48]) == last.in_features


@pytest.mark.parametrize(
    ("name", "branches"), [("convnext_tiny", 18), ("swin_t", 12), ("efficientnet_b0", 16)]
)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_stochastic_depth_of_torchvisions_grows_linearly(name: str, branches: int, rate: float) -> None:
    with torch.device("meta"):
        network = torchvision_backbone(name, rate)
    rates = [module.p for module in network.modules() if isinstance(module, StochasticDepth)]
    assert rates == pytest.approx(torch.linspace(0, rate, branches).tolist())


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("resnet51", "did you mean .*resnet50"),
        ("convnext_tinny", "did you mean convnext_tiny"),
        ("fcn_resnet50", "did you mean .*resnet50"),  # a network of torchvision, but no classifier
        ("quantized_resnet18", "did you mean .*resnet18"),
        ("", "there are alexnet, .*"),
    ],
)
def test_an_unknown_name_of_torchvision_is_told_the_closest(name: str, advice: str) -> None:
    with pytest.raises(ValueError, match=f"^--arch torchvision:{name} is unknown: {advice}"):
        torchvision_backbone(name)


@pytest.mark.parametrize("name", ["squeezenet1_0", "squeezenet1_1"])
def test_a_classifier_without_a_linear_layer_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"--arch torchvision:{name} "):
        on_meta("torchvision", name)


# timm

TIMMS = [
    "convnext_atto",
    "xcit_nano_12_p16_224",
    "resnet18",
    "swin_tiny_patch4_window7_224",
    "vit_tiny_patch16_224",
]


@pytest.mark.parametrize("name", TIMMS)
def test_features_are_timms_own_for_images_of_any_size(name: str) -> None:
    timm = pytest.importorskip("timm")
    ours, theirs = timm_backbone(name).eval(), timm.create_model(name, num_classes=10).eval()
    perturb(ours)
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    classifier = theirs.default_cfg["classifier"]
    assert (missing, unexpected) == ([f"{classifier}.weight", f"{classifier}.bias"], [])
    theirs.reset_classifier(0)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():  # at their own size, which timm's own model takes without more ado
        features = ours(x)
        assert features.shape == (2, theirs.num_features)
        assert features.std() > 0.01
        assert not torch.equal(*features)  # they are of the images
        assert torch.equal(features, theirs(x))
        small = [ours(torch.randn(2, 3, size, size)) for size in (64, 96)]
    assert all(s.shape == features.shape and s.isfinite().all() for s in small)
    assert feature_dim(ours, f"timm:{name}", [96, 64]) == features.shape[1]


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_drop_path_rate_reaches_timm(name: str, rate: float) -> None:
    pytest.importorskip("timm")
    with torch.device("meta"):
        network = timm_backbone(name, rate)
    # timm has modules of that name where the rate is not 0, of each block one or one a branch
    rates = [m.drop_prob for m in network.modules() if type(m).__name__ == "DropPath"]
    if not rate:
        assert rates == []
    else:
        assert rates == sorted(rates)
        distinct = torch.tensor(sorted(set(rates)))
        torch.testing.assert_close(distinct, torch.linspace(0, rate, len(distinct) + 1)[1:])


def test_a_network_without_stochastic_depth_is_built_too() -> None:
    pytest.importorskip("timm")
    with torch.device("meta"):
        network = timm_backbone("vgg11", 0.3)  # timm's does not know `drop_path_rate`
    assert feature_dim(network, "timm:vgg11", [64, 96]) == 4096


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224"])
def test_images_of_other_channels(name: str) -> None:
    pytest.importorskip("timm")
    network = timm_backbone(name, in_chans=5)
    features = network(torch.randn(2, 5, 64, 64))
    assert features.shape[1] == feature_dim(network, f"timm:{name}", [64], in_chans=5)
    with pytest.raises(ValueError, match=f"--arch timm:{name} takes no images of 64 x 64 pixels"):
        feature_dim(network, f"timm:{name}", [64])


def test_an_unknown_name_of_timm_is_told_the_closest() -> None:
    pytest.importorskip("timm")
    with pytest.raises(
        ValueError, match=r"^--arch timm:convnext_ato is unknown: did you mean .*convnext_atto"
    ):
        timm_backbone("convnext_ato")
    with pytest.raises(ValueError, match=r"^--arch timm:zzzzzz is unknown: there are "):
        timm_backbone("zzzzzz")


def test_a_missing_timm_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"--arch timm:resnet18 needs timm: pip install 'fastdino\[timm\]'"):
        build_backbone(ModelConfig(arch="timm:resnet18"))


def test_a_bare_name_and_a_prefix_say_which_library() -> None:
    pytest.importorskip("timm")
    with torch.device("meta"):
        bare, torchvisions, timms = (
            type(build_backbone(ModelConfig(arch=arch)))
            for arch in ("resnet18", "torchvision:resnet18", "timm:resnet18")
        )
    assert bare is torchvisions is models.ResNet
    assert timms.__module__.startswith("timm.")


@pytest.mark.parametrize("arch", ["vit_b_16", "convnext_tiny", "hub:resnet18", "torch:vit_small"])
def test_other_libraries_networks_need_their_prefix(arch: str) -> None:
    with pytest.raises(ValueError, match=rf"--arch {arch} is unknown: .*torchvision:NAME, timm:NAME"):
        build_backbone(ModelConfig(arch=arch))


# feature_dim


def test_feature_dim_computes_nothing() -> None:
    # Dropout, stochastic depth and batch norm in training would draw numbers and move statistics.
    network = torchvision_backbone("efficientnet_b0", 0.5).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    held = {name: id(value) for name, value in network.state_dict(keep_vars=True).items()}
    generator = torch.get_rng_state()
    assert feature_dim(network, "torchvision:efficientnet_b0", [64, 32]) == 1280
    assert torch.equal(torch.get_rng_state(), generator)
    after = network.state_dict(keep_vars=True)
    assert {name: id(value) for name, value in after.items()} == held
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(module.training for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    "arch",
    ["timm:mixer_s32_224", "timm:beit_base_patch16_224", "torchvision:vit_b_16", "torchvision:inception_v3"],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_a_network_of_one_size_names_the_size_it_does_not_take(arch: str) -> None:
    library, _, name = arch.partition(":")
    if library == "timm":
        pytest.importorskip("timm")
    network = on_meta(library, name)
    own = [] if name == "inception_v3" else [224]  # made for 299
    assert all(feature_dim(network, arch, [size]) == feature_dim(network, arch, own) for size in own)
    with pytest.raises(
        ValueError, match=rf"^--arch {arch} takes no images of 96 x 96 pixels \(.+\): choose other "
    ) as error:
        feature_dim(network, arch, [*own, 96])
    for advice in ("--global-crops-size", "--local-crops-size", "--local-crops-number 0", "another network"):
        assert advice in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "size"), [("inception_v3", 299), ("googlenet", 224)])
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_a_network_of_several_outputs_is_refused(name: str, size: int) -> None:
    arch = f"torchvision:{name}"
    with pytest.raises(ValueError, match=rf"--arch {arch} gives \w+Outputs for two images, not features"):
        feature_dim(on_meta("torchvision", name), arch, [size])


def test_features_that_are_no_vectors_or_of_two_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--arch a gives \(2, 3, 8, 8\) for two images, not features"):
        feature_dim(nn.Identity(), "a", [8])
    with pytest.raises(ValueError, match="--arch a gives 192 or 768 features for images of 16 or 8 pixels"):
        feature_dim(nn.Flatten(), "a", [16, 8])
    assert feature_dim(nn.Flatten(), "a", [16]) == 768


# in DINO


@pytest.mark.parametrize("arch", ["timm:convnext_atto", "torchvision:mobilenet_v3_small"])
def test_dino_learns_with_a_network_of_others_in_a_pass_per_size(arch: str) -> None:
    if arch.startswith("timm"):
        pytest.importorskip("timm")
    # teacher and student differ: from equal networks on equal crops some gradients vanish
    config = make_config(NOWHERE, NOWHERE, arch=arch, global_crops_size=64, local_crops_size=32)
    dino = DINO(config).train()
    perturb(dino.teacher)
    seen: dict[str, list[tuple[int, ...]]] = {"student": [], "teacher": []}
    for name, shapes in seen.items():
        getattr(dino, name).backbone.register_forward_pre_hook(
            lambda _, x, shapes=shapes: shapes.append(tuple(x[0].shape))
        )
    crops: list[Tensor] = [torch.randn(4, 3, size, size) for size in (64, 64, 32, 32, 32)]
    loss, mean = dino(crops, 0)
    assert seen == {"student": [(8, 3, 64, 64), (12, 3, 32, 32)], "teacher": [(8, 3, 64, 64)]}
    loss.backward()
    assert loss.isfinite()
    assert mean.shape == (96,)
    trained = {name: p for name, p in dino.student.named_parameters() if p.requires_grad}
    still = [name for name, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []
    assert all(p.grad.isfinite().all() for p in trained.values())  # type: ignore[union-attr]


def test_dino_asks_for_sizes_that_the_network_takes() -> None:
    flags = {"arch": "torchvision:vit_b_16", "global_crops_size": 224, "local_crops_size": 96}
    with torch.device("meta"), pytest.raises(ValueError, match="takes no images of 96 x 96 pixels"):
        DINO(make_config(NOWHERE, NOWHERE, **flags))
    with torch.device("meta"):  # without local crops their size is not asked for
        dino = DINO(make_config(NOWHERE, NOWHERE, local_crops_number=0, **flags))
    assert dino.student.head.mlp[0].in_features == 768
