"""The device that a flag names, where a process was launched, and the mean over ranks; test_loss.py has that
between two real processes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastdino.distributed import (
    Launch,
    choose_device,
    first_host,
    gather,
    launch,
    mean_over_ranks_,
    norms,
    on_rank_zero,
    raise_on_all_ranks,
)


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
        ({}, Launch(0, 1, 0, 1)),
        (TORCHRUN, Launch(5, 8, 1, 4)),
        (SRUN, Launch(5, 11, 1, 4)),
        (SRUN | TORCHRUN, Launch(5, 8, 1, 4)),  # torchrun under srun
        # a shell in an allocation of SLURM, or a batch script: one process
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16"}, Launch(0, 1, 0, 1)),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, Launch(0, 1, 0, 1)),
    ],
)
def test_the_place_is_that_of_torchrun_or_srun(
    env: dict[str, str], expected: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in {*TORCHRUN, *SRUN, "SLURM_NTASKS"}:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert launch() == expected


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


def test_norms_in_one_process_are_those_of_the_tensors() -> None:
    tensors = [torch.randn(3, 4), torch.randn(()), torch.zeros(0)]
    assert torch.equal(norms(tensors), torch.stack([x.norm() for x in tensors]))


def test_alone_everything_is_said_to_and_by_oneself() -> None:
    assert gather({"a": 1}) == [{"a": 1}]
    assert on_rank_zero(lambda: 3) == 3
    with pytest.raises(KeyError), raise_on_all_ranks():
        raise KeyError("its own error")
