"""Update: a loop of one's own around it is fastdino-train; what it takes, returns, refuses and waits for."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import CountSyncs
from faults import with_nan_losses
from tiny import final_tensors, make_config, make_images
from torch import Tensor

import fastdino
from fastdino import data
from fastdino.config import Config
from fastdino.data.crops import normalize
from fastdino.data.feed import Feed, Piece, Tally
from fastdino.diagnostics import DIAGNOSTICS
from fastdino.monitor import read_metrics
from fastdino.train import train
from fastdino.update import COLUMNS, Update


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nineteen images: two updates of 8 an epoch, three left over."""
    return make_images(tmp_path_factory.mktemp("images"), 19)


def views(seed: int = 0, images: int = 8) -> list[Tensor]:
    """Crops of the tiny run: two global ones and three local ones."""
    numbers = torch.Generator().manual_seed(seed)
    sides = (16, 16, 8, 8, 8)
    return [
        torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, generator=numbers) for side in sides
    ]


def tiny(**flags: Any) -> Config:
    return make_config(Path(), Path("run"), **{"drop_path_rate": 0.0, **flags})


def batches(config: Config, steps: int) -> Iterator[data.Batch]:
    loader = data.make_loader(
        data.open_source(config.data.data),
        config.data.crops,
        batch_size=config.optim.batch_size,
        pieces=config.optim.accumulate,
        seed=config.run.seed,
        start_step=0,
        total_steps=steps,
        workers=0,
    )
    return iter(loader)


@pytest.mark.parametrize(
    "flags",
    [
        {"drop_path_rate": 0.3},
        {"accumulate": 2, "precision": "bf16", "centering": "sinkhorn"},
        {
            "arch": "resnet18",
            "optimizer": "sgd",
            "use_bn_in_head": True,
            "teacher_update": "previous_iteration",
        },
    ],
    ids=["adamw", "pieces, bf16, sinkhorn", "resnet, sgd"],
)
def test_a_loop_of_ones_own_equals_the_trainer_bit_for_bit(
    images: Path, tmp_path: Path, flags: dict[str, Any]
) -> None:
    config = make_config(images, tmp_path, epochs=2, log_every=1, **flags)
    train(config)
    schedule = fastdino.Schedule(config, steps_per_epoch=2)
    update = fastdino.Update(config)
    arriving = batches(config, schedule.total_steps)
    rows = []
    for step in range(schedule.total_steps):
        pieces = [next(arriving).views for _ in range(config.optim.accumulate)]
        rows.append(dict(zip(COLUMNS, update(pieces, schedule.at(step)).tolist(), strict=True)))
    expected, found = final_tensors(tmp_path, 4), update.tensors()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert expected.keys() == found.keys()
    for line, row in zip(read_metrics(tmp_path), rows, strict=True):
        for name in ("loss", "grad_norm", *DIAGNOSTICS):
            assert line[name] == row[name], name


def test_whole_numbers_are_normalised_and_floats_are_taken_as_they_are() -> None:
    config, crops = tiny(), views()
    settings = fastdino.Schedule(config, 2).at(1)
    rows = [
        Update(config)([piece], settings)
        for piece in (crops, [normalize(view, config.data.crops) for view in crops])
    ]
    assert torch.equal(rows[0], rows[1])
    assert rows[0].shape == (len(COLUMNS),)
    assert rows[0].dtype == torch.float32


def test_the_row_has_the_tally_of_the_last_piece_and_diagnostics_where_it_logs() -> None:
    config = tiny(accumulate=2, log_every=2)
    schedule, update = fastdino.Schedule(config, 4), Update(config)
    tallies = [Tally(0, 1, 0.5, 3), Tally(1, 2, 0.75, 4)]
    pieces = [Piece(views(i, 4), tally) for i, tally in enumerate(tallies)]
    plain, logged = (
        dict(zip(COLUMNS, update(pieces, schedule.at(step)).tolist(), strict=True)) for step in (0, 1)
    )
    for row in (plain, logged):
        assert [row[name] for name in Tally._fields] == list(tallies[1])
    assert [plain[name] for name in DIAGNOSTICS] == [0.0] * len(DIAGNOSTICS)
    assert all(logged[name] > 0 for name in DIAGNOSTICS)


def test_an_update_takes_its_pieces_and_no_more() -> None:
    config = tiny(accumulate=2)
    given = iter([views(i, 4) for i in range(3)])
    Update(config)(given, fastdino.Schedule(config, 2).at(1))
    assert len(list(given)) == 1


def test_fewer_pieces_than_accumulate_are_refused() -> None:
    config = tiny(accumulate=2)
    with pytest.raises(ValueError, match=r"an update takes 2 pieces \(--accumulate\), but there were 1"):
        Update(config)([views(0, 4)], fastdino.Schedule(config, 2).at(1))


def test_an_update_that_is_not_finite_changes_nothing_but_the_teacher() -> None:
    config = tiny(use_bn_in_head=True, precision="fp32")
    schedule, update = fastdino.Schedule(config, 2), with_nan_losses(3)(config)
    for step in (0, 1):
        update([views(step)], schedule.at(step))
    before = {name: tensor.clone() for name, tensor in update.tensors().items()}
    row = update([views(2)], schedule.at(2))
    assert row[COLUMNS.index("loss")].isnan()
    changed = {name for name, tensor in update.tensors().items() if not torch.equal(tensor, before[name])}
    assert {name.partition(".")[0] for name in changed if "num_batches_tracked" not in name} == {"teacher"}


class Waiting(Update):
    """An update that reads its loss."""

    def clip(self, settings: Any) -> Tensor:
        norm = super().clip(settings)
        norm.item()
        return norm


@pytest.mark.parametrize(("kind", "waits"), [(Update, 0), (Waiting, 3)])
def test_an_update_waits_for_nothing_and_a_wait_in_it_is_seen(kind: type[Update], waits: int) -> None:
    config = tiny(log_every=100)
    schedule, update = fastdino.Schedule(config, 10), kind(config)
    with CountSyncs("cpu") as syncs:
        for step in range(3):
            update([views(step)], schedule.at(step))
    assert syncs.count == waits


def test_numbers_that_are_still_auto_are_refused() -> None:
    with pytest.raises(ValueError, match="still auto"):
        Update(tiny(out_dim="auto"))


# Feed


def batch(first: int, unreadable: int = 0, by_pillow: int = 0) -> data.Batch:
    names = [f"{first}-{i}.png" for i in range(unreadable)]
    return data.Batch(
        views(first, 2), torch.arange(first, first + 2), names, ["torn"] * unreadable, by_pillow
    )


def test_a_feed_counts_within_an_update_and_begins_anew_with_the_next() -> None:
    signals: list[int] = []
    feed = Feed([batch(0, 1, 2), batch(2, 2), batch(4), batch(6, 1, 1)], 2, signals)
    tallies = [next(feed).tally, next(feed).tally]
    assert [(t.unreadable, t.by_pillow, t.stop) for t in tallies] == [(1, 2, 0), (3, 2, 0)]
    assert 0 <= tallies[0].waited <= tallies[1].waited
    assert [i.tolist() for i in feed.indices] == [[0, 1], [2, 3]]
    assert next(feed).tally.unreadable == 0
    signals.append(15)
    last = next(feed).tally
    assert (last.unreadable, last.by_pillow, last.stop) == (1, 1, 1)
    assert [i.tolist() for i in feed.indices] == [[4, 5], [6, 7]]
    assert [(update, name) for update, name, _ in feed.take_unreadable()] == [
        *[(0, "0-0.png"), (0, "2-0.png"), (0, "2-1.png")],
        *[(1, "6-0.png")],
    ]
    assert feed.take_unreadable() == []
    assert list(feed) == []


# examples/own_trainer.py


def test_the_example_of_an_own_trainer_trains(tmp_path: Path) -> None:
    folder, weights = make_images(tmp_path / "images", 40), tmp_path / "teacher.pth"
    example = Path(__file__).parents[1] / "examples" / "own_trainer.py"
    done = subprocess.run(
        [sys.executable, example, folder, weights], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert [line.partition(" loss ")[0] for line in done.stdout.splitlines()] == ["step 2/4", "step 4/4"]
    features = fastdino.load_backbone(str(weights))(torch.zeros(1, 3, 32, 32))
    assert features.isfinite().all()
