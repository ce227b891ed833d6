"""Extraction of features, and their way over ranks."""

from pathlib import Path

import pytest
import torch
from eval_runs import CONFIG, make_run_with_flaws
from PIL import Image

from fastdino import distributed
from fastdino.data import open_source
from fastdino.eval.common import collect, extract, extract_shared, rank_slice

POLICY = CONFIG.data.crops


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_with_flaws(tmp_path_factory.mktemp("run"))


def test_no_images_are_no_features(run: Path):
    found, kept = extract(lambda x: x, open_source(str(run / "images")), POLICY, indices=[])
    assert (found.shape, kept.shape) == ((0, 0), (0,))


def test_unreadable_files_are_named_and_the_view_may_be_another(run: Path):
    def gray(image: Image.Image, size: int) -> Image.Image:
        return Image.new("RGB", (size, size), (image.width, image.height, 3))

    unreadable: list[str] = []
    found, kept = extract(
        lambda x: x[:, :, 0, 0],
        open_source(str(run / "images")),
        POLICY,
        view=gray,
        batch_size=5,
        unreadable=unreadable,
    )
    assert unreadable == [str(run / "images" / "class1" / "4.png")]
    assert len(found) == len(kept) == 13
    expected = (torch.tensor([24, 20, 3]) / 255 - torch.tensor(POLICY.mean)) / torch.tensor(POLICY.std)
    torch.testing.assert_close(found, expected.expand(13, 3))


@pytest.mark.parametrize(("n", "ranks"), [(7, 3), (2, 4), (0, 2), (9, 1)])
def test_shares_are_all_in_order(n, ranks, monkeypatch):
    found = []
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found.append(rank_slice(n))
    assert [i for its in found for i in its] == list(range(n))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def _collecting(rank: int, path: str) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    torch.distributed.init_process_group("gloo", f"file://{path}", rank=rank, world_size=3)
    # the second rank has none, and does not know how wide they are
    parts = [torch.arange(6.0).view(2, 3), torch.empty(0, 0), 10 + torch.arange(9.0).view(3, 3)]
    whole = torch.cat([parts[0], parts[2]])
    assert torch.equal(collect(parts[rank]), whole)
    first = collect(parts[rank], everywhere=False)
    assert torch.equal(first, whole if rank == 0 else parts[rank])
    integers = collect(torch.full((rank,), rank))
    assert integers.tolist() == [1, 2, 2]
    assert integers.dtype == torch.int64
    # fewer images than ranks
    source = open_source(str(Path(path).parent / "flat"))
    found, kept = extract_shared(lambda x: x.mean((2, 3)), source, POLICY, indices=[2, 0])
    assert kept.tolist() == [2, 0]
    expected, _ = extract(lambda x: x.mean((2, 3)), source, POLICY, indices=[2, 0])
    assert torch.equal(found, expected)
    torch.distributed.destroy_process_group()


def test_rows_of_all_ranks_come_in_their_order(run: Path):
    (run / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.start_processes(
        _collecting, (str(run / "rendezvous"),), nprocs=3, start_method="fork"
    )
