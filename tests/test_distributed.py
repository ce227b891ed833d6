"""The device that a flag names, and the mean over ranks; test_loss.py has it between two real processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastdino.distributed import choose_device, mean_over_ranks_


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
    monkeypatch.setattr(dist, "all_reduce", lambda x: x.add_(torch.arange(3.0)))  # what three others have
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
