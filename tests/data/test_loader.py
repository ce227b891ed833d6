"""Loader: the same images and crops whatever workers and resumes do; bad files, dying workers and signals."""

import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino import data
from fastdino.config import CropPolicy
from fastdino.data import Batch, Unreadable, crop_size_warning, make_loader, open_source, steps_per_epoch
from fastdino.data.crops import draw, enough_pixels, render, to_tensor
from fastdino.data.loader import load_or_next

POLICY = CropPolicy(global_crops_size=16, local_crops_size=8, local_crops_number=3)
N = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(N):
        height, width = rng.integers(12, 40, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / f"{i:02}.png")
    return root


def load(folder: Path, **options) -> list[Batch]:
    options = {
        "batch_size": 6,
        "pieces": 1,
        "seed": 0,
        "start_step": 0,
        "total_steps": 8,
        "workers": 0,
    } | options
    loader = make_loader(open_source(str(folder)), options.pop("policy", POLICY), **options)
    batches = list(loader)
    assert len(batches) == len(loader)
    return batches


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert len(a.views) == len(b.views)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
        assert (a.unreadable, a.reasons) == (b.unreadable, b.reasons)


# --- what a batch holds


def test_a_batch_holds_the_drawn_views_of_its_images(folder):
    source = open_source(str(folder))
    per_epoch = N // 6
    for step, batch in enumerate(load(folder, seed=5)):
        assert [tuple(v.shape) for v in batch.views] == [(6, 3, 16, 16)] * 2 + [(6, 3, 8, 8)] * 3
        assert all(v.dtype == torch.uint8 and v.is_contiguous() for v in batch.views)
        assert batch.indices.dtype == torch.int64
        assert batch.unreadable == batch.reasons == []
        for place, index in enumerate(batch.indices.tolist()):
            image = source.load(index)
            for got, view in zip(
                batch.views, draw(POLICY, 5, step // per_epoch, index, image.size), strict=True
            ):
                assert torch.equal(got[place], to_tensor(render(image, view)))


def test_an_epoch_is_a_permutation_without_its_last_incomplete_batch(folder):
    batches = load(folder, total_steps=9)
    epochs = [torch.cat([b.indices for b in batches[e * 3 : e * 3 + 3]]).tolist() for e in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == 18
        assert set(epoch) <= set(range(N))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = torch.cat([b.indices for b in load(folder, total_steps=3, seed=1)]).tolist()
    assert other not in epochs


@pytest.mark.parametrize(("ranks", "pieces"), [(2, 1), (2, 3), (3, 2), (6, 1)])
def test_ranks_share_the_batches_of_one(folder, ranks: int, pieces: int):
    """Each gets a part of each piece, with the crops that one process would have made."""
    whole = load(folder, pieces=pieces)
    parts = [load(folder, pieces=pieces, rank=rank, ranks=ranks) for rank in range(ranks)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert [len(share.indices) for share in shares] == [6 // pieces // ranks] * ranks
        assert torch.equal(torch.cat([share.indices for share in shares]), batch.indices)
        for view, *its in zip(batch.views, *(share.views for share in shares), strict=True):
            assert torch.equal(torch.cat(its), view)


def test_a_batch_that_ranks_cannot_share_is_refused(folder):
    with pytest.raises(ValueError, match="--batch-size 6 is not a multiple of --accumulate 1 times 4 ranks"):
        load(folder, ranks=4)


def test_every_image_is_equally_likely_at_every_place():
    n, epochs = 8, 4000
    orders = torch.stack([data.epoch_order(n, 3, epoch) for epoch in range(epochs)])
    assert torch.equal(orders.sort(1).values, torch.arange(n).expand(epochs, n))
    counts = torch.stack([(orders == image).sum(0) for image in range(n)]).double()
    expected = epochs / n
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square <= 98  # the 1 - 1e-4 quantile at 7 x 7 degrees of freedom is 97.8


def test_the_order_follows_from_seed_and_epoch_not_from_their_sum():
    orders = {tuple(data.epoch_order(50, seed, epoch).tolist()) for seed in range(6) for epoch in range(6)}
    assert len(orders) == 36


# --- the same whatever happens


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_the_batches(folder, workers):
    assert_same(load(folder, workers=workers), load(folder))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 3, 5, 7, 8])
def test_a_resumed_run_sees_what_the_uninterrupted_one_would_have_seen(folder, start, workers):
    assert_same(load(folder, start_step=start, workers=workers), load(folder)[start:])


def test_a_longer_run_begins_like_a_shorter_one(folder):
    assert_same(load(folder, total_steps=11)[:8], load(folder))


@pytest.mark.parametrize("pieces", [2, 3, 6])
def test_pieces_are_consecutive_parts_of_the_batch(folder, pieces):
    whole, parts = load(folder, start_step=2), load(folder, start_step=2, pieces=pieces)
    assert len(parts) == pieces * len(whole)
    for i, batch in enumerate(whole):
        own = parts[i * pieces : (i + 1) * pieces]
        assert torch.equal(torch.cat([p.indices for p in own]), batch.indices)
        for v, view in enumerate(batch.views):
            assert torch.equal(torch.cat([p.views[v] for p in own]), view)


def test_iterating_twice_gives_the_same_batches(folder):
    loader = make_loader(
        open_source(str(folder)),
        POLICY,
        batch_size=6,
        pieces=1,
        seed=0,
        start_step=0,
        total_steps=2,
        workers=0,
    )
    assert_same(list(loader), list(loader))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_random_states_are_left_alone(folder, workers):
    np.random.seed(0)
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    load(folder, total_steps=2, workers=workers)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_the_next_epoch_is_loaded_before_it_is_asked_for(folder):
    """Asked of the source while the batches of the first epoch, three of them, are taken out."""
    source, asked = open_source(str(folder)), multiprocessing.Value("i", 0)

    def load_and_count(i, **options):
        with asked.get_lock():
            asked.value += 1
        return read(i, **options)

    read, source.load = source.load, load_and_count
    options = {"seed": 0, "start_step": 0, "total_steps": 9, "workers": 2}
    batches = iter(make_loader(source, POLICY, batch_size=6, pieces=1, **options))
    for _ in range(3):
        next(batches)
    workers = {child.pid for child in multiprocessing.active_children()}
    deadline = time.monotonic() + 300
    while asked.value < 6 * 5:  # two batches of the next epoch, though nobody has asked for them
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(list(batches)) == 6
    assert len(workers) == 2


# --- large photographs


def test_jpegs_are_scaled_where_that_is_asked_for_and_enough_is_left(tmp_path):
    policy = CropPolicy(global_crops_size=16, local_crops_size=12, local_crops_number=2)
    assert enough_pixels(policy) == math.ceil(12**2 / 0.05 / 0.75)  # the local crops' need: 3,840
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8))  # smooth
    expected = {"a.jpg": (64, 64), "b.jpg": (120, 75), "c.jpg": (61, 62), "d.jpg": (61, 125)}
    for name, size in {
        "a.jpg": (512, 512),
        "b.jpg": (480, 300),
        "c.jpg": (61, 62),
        "d.jpg": (121, 250),
    }.items():
        coarse.resize(size, Image.Resampling.BICUBIC).save(tmp_path / name, quality=95)
    coarse.resize((512, 512)).save(tmp_path / "e.png")
    source = open_source(str(tmp_path))
    sizes = [source.load(i, enough=enough_pixels(policy)).size for i in range(5)]
    assert sizes == [*expected.values(), (512, 512)]

    (scaled,) = load(tmp_path, policy=policy, batch_size=5, total_steps=1, jpeg_scaling=True)
    for place, index in enumerate(scaled.indices.tolist()):
        image = source.load(index, enough=enough_pixels(policy))
        drawn = draw(policy, 0, 0, index, image.size)
        assert all(min(view.box[2:]) >= view.size for view in drawn)
        for got, view in zip(scaled.views, drawn, strict=True):
            assert torch.equal(got[place], to_tensor(render(image, view)))


# --- files that cannot be read


@pytest.fixture
def holed(folder, tmp_path) -> Path:
    """The same folder with files 4, 5 and the last one broken."""
    for i in range(N):
        content = (folder / f"{i:02}.png").read_bytes()
        (tmp_path / f"{i:02}.png").write_bytes(content[:60] if i in (4, 5, N - 1) else content)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_gives_its_place_to_the_next_with_crops_of_its_own(folder, holed, workers):
    source = open_source(str(folder))
    whole, some = load(folder), load(holed, workers=workers)
    seen = 0
    for step, (a, b) in enumerate(zip(whole, some, strict=True)):
        broken = [i for i in a.indices.tolist() if i in (4, 5, N - 1)]
        assert b.unreadable == [str(holed / f"{i:02}.png") for i in broken]
        assert len(b.reasons) == len(broken)
        assert all("truncated" in reason.lower() for reason in b.reasons)
        for place, index in enumerate(a.indices.tolist()):
            used = {4: 6, 5: 6, N - 1: 0}.get(index, index)
            assert b.indices[place] == used
            if used == index:
                assert all(torch.equal(x[place], y[place]) for x, y in zip(a.views, b.views, strict=True))
                continue
            seen += 1
            image = source.load(used)
            for got, view in zip(b.views, draw(POLICY, 0, step // 3, index, image.size), strict=True):
                assert torch.equal(got[place], to_tensor(render(image, view)))
    assert seen >= 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanishes_during_the_run_is_reported(folder, tmp_path, workers):
    for i in range(N):
        os.link(folder / f"{i:02}.png", tmp_path / f"{i:02}.png")
    source = open_source(str(tmp_path))
    os.unlink(tmp_path / "07.png")
    options = {"seed": 0, "start_step": 0, "total_steps": 1, "workers": workers}
    (batch,) = make_loader(source, POLICY, batch_size=N, pieces=1, **options)
    assert batch.unreadable == [str(tmp_path / "07.png")]
    assert batch.reasons == ["no such file"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_of_broken_files_ends_with_one_named(tmp_path, workers):
    (tmp_path / "list.txt").write_text("".join(f"missing/{i:03}.png\n" for i in range(150)))
    before = len(multiprocessing.active_children())
    with pytest.raises(
        Unreadable, match=r"missing/\d+\.png: no such file; so were the 99 files before it"
    ) as caught:
        load(tmp_path / "list.txt", workers=workers)
    assert "Traceback" not in str(caught.value)
    assert len(multiprocessing.active_children()) == before  # though `caught` still holds the loader's frames


def test_of_a_single_broken_file_it_is_not_said_that_others_are(tmp_path):
    (tmp_path / "x.png").touch()
    with pytest.raises(Unreadable, match=r"x\.png: empty file: are the paths right\?$"):
        load_or_next(open_source(str(tmp_path)), 0, [], open_source(str(tmp_path)).load)


def test_fewer_broken_files_than_a_hundred_also_end(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.png").touch()
    with pytest.raises(Unreadable, match="empty file; so were the 7 files before it"):
        load(tmp_path)


# --- impossible settings


def test_a_batch_larger_than_the_set_says_so(folder):
    with pytest.raises(ValueError, match=f"--batch-size 24 is larger than the {N} images: lower it to {N}"):
        load(folder, batch_size=24)
    with pytest.raises(ValueError, match="larger than the 5 images"):
        steps_per_epoch(5, 6)
    assert [steps_per_epoch(n, 6) for n in (6, 11, 12)] == [1, 1, 2]
    assert [len(b.indices) for b in load(folder, batch_size=N, total_steps=2)] == [N, N]


def test_pieces_that_do_not_divide_the_batch_say_so(folder):
    with pytest.raises(ValueError, match="--batch-size 6 is not a multiple of --accumulate 4"):
        load(folder, pieces=4)


def test_crops_far_larger_than_the_images_are_noted(folder, tmp_path):
    source = open_source(str(folder))
    assert crop_size_warning(source, replace(POLICY, global_crops_size=32)) is None
    note = crop_size_warning(source, replace(POLICY, global_crops_size=96))
    assert note is not None
    shorts = sorted(min(source.load(i).size) for i in range(N))
    assert f"shorter side is {shorts[N // 2]:g} pixels (median of {N})" in note
    assert "global crops' 96: lower --global-crops-size" in note
    short = shorts[N // 2]
    assert crop_size_warning(source, replace(POLICY, global_crops_size=2 * short)) is None
    assert crop_size_warning(source, replace(POLICY, global_crops_size=2 * short + 1)) is not None
    assert crop_size_warning(source, replace(POLICY, global_crops_size=8 * short)) is not None
    with pytest.raises(
        ValueError, match=rf"--global-crops-size {8 * short + 1} makes no sense .* {short:g} pixels"
    ):
        crop_size_warning(source, replace(POLICY, global_crops_size=8 * short + 1))


def test_a_note_on_sizes_does_without_unreadable_files(holed, tmp_path_factory):
    assert "median of 23" in crop_size_warning(
        open_source(str(holed)), CropPolicy(global_crops_size=128)
    )  # headers are whole
    (holed / "list.txt").write_text("missing.png\n")
    assert crop_size_warning(open_source(str(holed / "list.txt")), CropPolicy()) is None


# --- workers


@pytest.mark.parametrize(
    ("cores", "quota", "batch", "expected"),
    [
        (16, None, 64, 15),
        (1, None, 64, 1),
        (2, None, 64, 1),
        (16, None, 4, 4),
        (16, "max 100000", 64, 15),
        (16, "400000 100000", 64, 3),
        (16, "50000 100000", 64, 1),
    ],
)
def test_workers_follow_the_cores_this_process_may_use(monkeypatch, tmp_path, cores, quota, batch, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(data.machine, "_CPU_QUOTA", str(tmp_path / "cpu.max"))
    if quota:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert data.choose_workers(batch) == expected


def long_run(folder: Path) -> tuple[Iterator[Batch], list[int]]:
    """A run under way, and its workers' process ids."""
    before = {child.pid for child in multiprocessing.active_children()}
    options = {"seed": 0, "start_step": 0, "total_steps": 10_000, "workers": 2}
    batches = iter(make_loader(open_source(str(folder)), POLICY, batch_size=6, pieces=1, **options))
    next(batches), next(batches)  # one of each worker: both have set themselves up
    return batches, [child.pid for child in multiprocessing.active_children() if child.pid not in before]


def kill_and_iterate(pid: int, batches: Iterator[Batch]) -> None:
    os.kill(pid, signal.SIGKILL)  # the error may be raised from here on, wherever this process just is
    for _ in batches:
        pass


def test_a_killed_worker_is_a_clear_error_and_no_hang(folder):
    batches, workers = long_run(folder)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"DataLoader worker|process that loads images died"):
        kill_and_iterate(workers[0], batches)
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
        ConnectionResetError("connection reset"),
        EOFError("no more"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_worker_s_death_says_what_to_do(folder, monkeypatch, error):
    def die(self, *args):
        raise error

    monkeypatch.setattr(torch.utils.data.dataloader._SingleProcessDataLoaderIter, "_next_data", die)
    message = rf"a process that loads images died \({re.escape(str(error))}\).*lower --workers"
    with pytest.raises(RuntimeError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("x"),
        RuntimeError("x"),
        RuntimeError("Caught RuntimeError in DataLoader worker process 0."),
    ],
)
def test_other_errors_pass_as_they_are(folder, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(data.loader, "render_into", fail)
    with pytest.raises(type(error)) as caught:
        load(folder)
    assert caught.value is error


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="macOS does not tell who sent a signal")
def test_workers_leave_signals_to_the_training_process(folder):
    """A signal to the whole process group must not take the batches that the trainer needs for its step."""
    heard = []
    handler = signal.signal(signal.SIGTERM, lambda signum, _: heard.append(signum))
    try:
        batches, workers = long_run(folder)
        for name in ("-INT", "-TERM", "-TERM"):
            subprocess.run(["kill", name, *map(str, workers)], check=True)
        for _ in range(20):
            assert len(next(batches).indices) == 6
        assert {child.pid for child in multiprocessing.active_children()} >= set(workers)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert heard == []


def test_a_process_that_ends_with_a_loader_under_way_does_not_hang(folder):
    code = f"""
from fastdino.config import CropPolicy
from fastdino.data import make_loader, open_source
options = dict(batch_size=6, pieces=1, seed=0, start_step=0, total_steps=1000, workers=2)
batches = iter(make_loader(open_source({str(folder)!r}), CropPolicy(), **options))
next(batches)
class Kept:
    pass
Kept.cycle, Kept.batches = Kept, batches  # still there when the interpreter ends
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, stderr=subprocess.DEVNULL)


def test_workers_end_with_the_iteration(folder):
    batches, workers = long_run(folder)
    batches.close()
    deadline = time.monotonic() + 300
    while any(child.pid in workers for child in multiprocessing.active_children()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_workers_use_one_thread_each(folder, monkeypatch):
    def tell(self, i, enough=0):
        raise Unreadable(str(torch.get_num_threads()), "threads")

    monkeypatch.setattr(data.Source, "load", tell)
    with pytest.raises(Unreadable, match=r"^1: threads"):
        load(folder, workers=1)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_batches_come_pinned(folder):
    (batch, *_) = load(folder, workers=1, device="cuda")
    assert all(v.is_pinned() for v in batch.views)
