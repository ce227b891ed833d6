"""The device that a flag names, how a backbone is run, and the mean over ranks; test_loss.py has that between
two real processes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision import models

from fastdino import distributed, vit
from fastdino.config import RunConfig
from fastdino.distributed import (
    Place,
    choose_device,
    choose_parallel,
    first_host,
    gather,
    mean_over_ranks_,
    norms,
    on_first,
    parallelize,
    place,
    together,
)
from fastdino.vit import VisionTransformer


def test_without_a_process_group_the_mean_is_the_tensor_itself():
    x = torch.randn(5)
    before = x.clone()
    assert mean_over_ranks_(x) is x
    assert torch.equal(x, before)
    assert not dist.is_initialized()


def test_a_group_of_one_leaves_the_tensor(tmp_path: Path):
    x = torch.randn(5)
    before = x.clone()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        assert torch.equal(mean_over_ranks_(x), before)
    finally:
        dist.destroy_process_group()


def test_the_sum_over_ranks_is_divided_by_their_number_in_place(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)

    def others(x: Tensor, async_op: bool) -> Any:
        x.add_(torch.arange(3.0))  # what the three others have
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(dist, "all_reduce", others)
    x = torch.tensor([[2.0, 3.0, 4.0]])
    assert mean_over_ranks_(x) is x
    assert x.tolist() == [[0.5, 1.0, 1.5]]


def test_auto_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "--device gpu: give auto, cpu, cuda or cuda:N"),
        ("", "--device : give auto, cpu, cuda or cuda:N"),
        ("cuda", "--device cuda: this machine has 0 CUDA devices; try --device cpu"),
        ("cuda:3", "--device cuda:3: this machine has 0 CUDA devices; try --device cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name, message, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared
        choose_device(name)
    assert str(error.value) == message


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


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, Place(0, 1, 0, 1)),
        (TORCHRUN, Place(5, 8, 1, 4)),
        (SRUN, Place(5, 11, 1, 4)),
        (SRUN | TORCHRUN, Place(5, 8, 1, 4)),  # torchrun under srun
        # a shell in an allocation of SLURM, or a batch script: one process
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16"}, Place(0, 1, 0, 1)),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, Place(0, 1, 0, 1)),
    ],
)
def test_the_place_is_that_of_torchrun_or_srun(
    env: dict[str, str], expected: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in {*TORCHRUN, *SRUN, "SLURM_NTASKS"}:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert place() == expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("a[007-010,12],b3", "a007"), ("gpu-3,gpu-5", "gpu-3"), ("r[3,4]-ib", "r3-ib")],
)
def test_the_first_host_of_slurms_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_each_rank_takes_the_gpu_of_its_local_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == choose_device("cuda", 1) == torch.device("cuda:1")
    with pytest.raises(ValueError, match="has 2 CUDA devices, and rank 2 on it wants one"):
        choose_device("cuda", 2)


@pytest.mark.parametrize(("local_ranks", "large"), [(4, "fsdp"), (2, "hsdp")])
def test_auto_shards_what_is_large_within_a_node(
    local_ranks: int, large: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "ranks", lambda: 4)
    monkeypatch.setattr(distributed, "place", lambda: Place(0, 4, 0, local_ranks))
    with torch.device("meta"):
        for arch, expected in ((vit.vit_small, "ddp"), (vit.vit_base, "ddp"), (vit.vit_large, large)):
            assert choose_parallel("auto", arch()) == expected
    assert choose_parallel("fsdp", small_vit()) == "fsdp"


def test_norms_in_one_process_are_those_of_the_tensors() -> None:
    tensors = [torch.randn(3, 4), torch.randn(()), torch.zeros(0)]
    assert torch.equal(norms(tensors), torch.stack([x.norm() for x in tensors]))


def test_alone_everything_is_said_to_and_by_oneself() -> None:
    assert gather({"a": 1}) == [{"a": 1}]
    assert on_first(lambda: 3) == 3
    with pytest.raises(KeyError), together():
        raise KeyError("its own error")


def test_a_batch_norm_that_cannot_be_kept_in_step_is_refused() -> None:
    class Fancy(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="Fancy cannot be kept in step over ranks on a CPU"):
        distributed._synchronize_batch_norm(nn.Sequential(nn.Conv2d(3, 4, 1), Fancy(4)), CPU)
