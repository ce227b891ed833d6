"""How a network runs: attention, checkpointing, compilation, what is sharded, batch norm over ranks."""

from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

from fastdino import parallel, vit
from fastdino.config import RunConfig
from fastdino.distributed import Launch
from fastdino.parallel import choose_parallel, parallelize
from fastdino.sync_batch_norm import synchronize_batch_norm
from fastdino.vit import VisionTransformer

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _settings(dynamo: None) -> None:
    """Every `parallelize` here may change Dynamo's settings."""


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[nn.Module, dict[str, Any]]]:
    """The modules that are to be compiled, and with what; none is."""
    asked: list[tuple[nn.Module, dict[str, Any]]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: asked.append((module, options)))
    return asked


def small_vit() -> VisionTransformer:
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=2)


@pytest.mark.parametrize("attention", ["auto", "sdpa", "varlen", "xformers"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_vits_attention_and_checkpointing_are_as_asked_for(attention: Any, checkpointing: bool) -> None:
    network = small_vit()
    network.attention_impl, network.checkpointing = "other", False
    parallelize(network, RunConfig(attention=attention, activation_checkpointing=checkpointing), CPU)
    assert (network.attention_impl, network.checkpointing) == (attention, checkpointing)


def test_checkpointing_recomputes_each_block_and_changes_no_gradient() -> None:
    images = torch.randn(2, 3, 16, 16)
    gradients, passes = [], []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        network = small_vit()
        ran: list[nn.Module] = []
        for block in network.blocks:
            block.register_forward_pre_hook(lambda module, _, ran=ran: ran.append(module))
        parallelize(network, RunConfig(activation_checkpointing=checkpointing), CPU)
        network(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
        passes.append(len(ran))
    assert passes == [3, 6]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_timms_networks_checkpoint_by_their_own_means() -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0)
    assert not network.grad_checkpointing
    parallelize(network, RunConfig(), CPU)
    assert not network.grad_checkpointing
    parallelize(network, RunConfig(activation_checkpointing=True), CPU)
    assert network.grad_checkpointing
    assert not hasattr(network, "attention_impl")  # and no attribute of ours is left on it


def test_a_network_that_cannot_checkpoint_is_refused(compiled: list) -> None:
    with torch.device("meta"):
        network = models.resnet18()
    parallelize(network, RunConfig(), CPU)
    with pytest.raises(ValueError, match=r"--activation-checkpointing: this network has no blocks"):
        parallelize(network, RunConfig(activation_checkpointing=True, compile="on"), CPU)
    assert compiled == []


@pytest.mark.parametrize(
    ("flag", "device", "compiles"),
    [("off", CPU, 0), ("off", GPU, 0), ("auto", CPU, 0), ("auto", GPU, 1), ("on", CPU, 1), ("on", GPU, 1)],
    ids=str,
)
def test_what_is_compiled_where(flag: Any, device: torch.device, compiles: int, compiled: list) -> None:
    network = small_vit()
    parallelize(network, RunConfig(compile=flag), device)
    # each block, with sizes left open
    assert compiled == [(block, {"dynamic": True}) for block in network.blocks] * compiles
    compiled.clear()
    with torch.device("meta"):
        other = models.resnet18()
    parallelize(other, RunConfig(compile=flag), device)
    assert compiled == [(other, {"dynamic": None})] * compiles


@pytest.mark.parametrize("flag", ["off", "auto", "on"])
def test_compilation_is_prepared_only_where_there_is_any(flag: Any, compiled: list) -> None:
    import torch._dynamo
    import torch.fx.experimental._config as symbolic

    parallelize(small_vit(), RunConfig(compile=flag), CPU)
    prepared = (torch._dynamo.config.recompile_limit, symbolic.use_duck_shape)
    assert prepared == ((32, False) if flag == "on" else (8, True))
    if flag == "on":  # who has allowed more keeps it
        torch._dynamo.config.recompile_limit = 99
        parallelize(small_vit(), RunConfig(compile=flag), CPU)
        assert torch._dynamo.config.recompile_limit == 99


@pytest.mark.parametrize("flag", ["auto", "on"])
def test_names_and_parameters_stay_as_they_are_when_blocks_are_compiled(flag: Any) -> None:
    network = small_vit()
    before = {name: value.data_ptr() for name, value in network.state_dict().items()}
    parallelize(network, RunConfig(compile=flag), CPU)
    assert {name: value.data_ptr() for name, value in network.state_dict().items()} == before
    # the modules themselves, not the graphs, which are made when one first runs
    assert [block._compiled_call_impl is not None for block in network.blocks] == [flag == "on"] * 3
    assert network._compiled_call_impl is None


@pytest.mark.parametrize(("local_ranks", "large"), [(4, "fsdp"), (2, "hsdp")])
def test_auto_shards_what_is_large_within_a_node(
    local_ranks: int, large: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "world_size", lambda: 4)
    monkeypatch.setattr(parallel, "launch", lambda: Launch(0, 4, 0, local_ranks))
    with torch.device("meta"):
        for arch, expected in ((vit.vit_small, "ddp"), (vit.vit_base, "ddp"), (vit.vit_large, large)):
            assert choose_parallel("auto", arch()) == expected
    assert choose_parallel("fsdp", small_vit()) == "fsdp"


def test_a_batch_norm_that_cannot_be_kept_in_step_is_refused() -> None:
    class Fancy(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="Fancy cannot be kept in step over ranks on a CPU"):
        synchronize_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 1), Fancy(4)), CPU)
