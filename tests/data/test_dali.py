"""The DALI loader, run on the CPU: the same batches as the other one, whatever the files are."""

import builtins
import gc
import io
import json
import os
import signal
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor

from fastdino import data, train
from fastdino.config import PRESETS, CropPolicy
from fastdino.data import Batch, Unreadable, choose_loader, make_loader, open_source, tool
from fastdino.data import dali as module
from fastdino.data.crops import View, draw, render, to_tensor

pytest.importorskip("nvidia.dali")
POLICY = CropPolicy(global_crops_size=48, local_crops_size=24, local_crops_number=3)
PHOTOS = [Image.fromarray(x) for x in load_sample_images().images]


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 92} | options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def pieces() -> list[Image.Image]:
    """Parts of the photographs, of many sizes."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(12):
        photo = PHOTOS[i % 2]
        w, h = rng.integers(60, 300, 2).tolist()
        left, top = rng.integers(0, photo.width - w), rng.integers(0, photo.height - h)
        found.append(photo.crop((left, top, left + w, top + h)))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """JPEGs of every sort that DALI decodes."""
    root = tmp_path_factory.mktemp("jpegs")
    for i, image in enumerate(pieces()):
        options = [
            {},
            {"subsampling": 0},
            {"subsampling": 1},
            {"progressive": True},
            {"quality": 20},
            {"exif": exif(6)},
            {"exif": exif(3)},
            {"exif": exif(5)},
            {"optimize": True},
            {"restart_marker_blocks": 3},
            {"exif": exif(1), "comment": "a comment"},
            {},
        ][i]
        image = image.convert("L") if i == 11 else image
        (root / f"{i:02}.jpg").write_bytes(jpeg(image, **options))
    return root


def load(folder: Path, loader: str = "dali", **options) -> list[Batch]:
    options = {
        "batch_size": 4,
        "pieces": 1,
        "seed": 0,
        "start_step": 0,
        "total_steps": 6,
        "workers": 0,
    } | options
    policy = options.pop("policy", POLICY)
    return list(make_loader(open_source(str(folder)), policy, loader=loader, **options))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
        assert (a.unreadable, a.reasons) == (b.unreadable, b.reasons)


# --- the same crops


def test_batches_are_those_of_the_other_loader_and_dali_decoded_them(folder):
    batches = load(folder)
    assert_same(batches, load(folder, "torchvision"))
    assert sum(batch.by_pillow for batch in batches) == 0
    for batch in batches:
        assert all(v.dtype == torch.uint8 and v.is_contiguous() for v in batch.views)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("start", [0, 4, 6])
def test_workers_and_resumes_in_mid_epoch_change_nothing(folder, workers, start):
    assert_same(load(folder, start_step=start, workers=workers), load(folder, "torchvision")[start:])


@pytest.mark.parametrize(("ranks", "pieces"), [(2, 1), (4, 1), (2, 2)])
def test_ranks_share_the_batches_of_one_and_see_each_image_once(folder, ranks, pieces):
    whole = load(folder, "torchvision", total_steps=3, pieces=pieces)
    parts = [load(folder, rank=rank, ranks=ranks, total_steps=3, pieces=pieces) for rank in range(ranks)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([share.indices for share in shares]), batch.indices)
        for view, *its in zip(batch.views, *(share.views for share in shares), strict=True):
            assert torch.equal(torch.cat(its), view)
    assert sorted(i for part in parts for batch in part for i in batch.indices.tolist()) == list(range(12))


OPERATIONS: dict[str, dict] = {
    "resize": {},
    "flip": {"flip": 1.0},
    "brightness": {"jitter": 1.0, "brightness": 0.4},
    "contrast": {"jitter": 1.0, "contrast": 0.4},
    "saturation": {"jitter": 1.0, "saturation": 0.4},
    "hue": {"jitter": 1.0, "hue": 0.1},
    "jitter": {"jitter": 1.0, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1},
    "grayscale": {"grayscale": 1.0},
    "blur": {"blur": (1.0, 1.0, 1.0)},
    "solarize": {"solarize": (1.0, 1.0, 1.0)},
}
NOTHING = {
    "flip": 0.0,
    "jitter": 0.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
    "grayscale": 0.0,
    "blur": (0.0, 0.0, 0.0),
    "solarize": (0.0, 0.0, 0.0),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for i, photo in enumerate(PHOTOS):
        (root / f"{i}.jpg").write_bytes(jpeg(photo, quality=95))
    return root


def by_pillow(root: Path, policy: CropPolicy, change: Callable[[View], View], **how) -> list[Tensor]:
    """The views of both photographs, in the loader's order, by Pillow, from changed parameters."""
    source = open_source(str(root))
    views: list[list[Tensor]] = [[] for _ in range(policy.n_views)]
    for index in data.epoch_order(2, 0, 0).tolist():
        image = source.load(index)
        for its, view in zip(views, draw(policy, 0, 0, index, image.size), strict=True):
            its.append(to_tensor(how.get("render", render)(image, change(view))))
    return [torch.stack(its) for its in views]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Mean over all pixels of the absolute difference, in levels of 255."""
    return (
        torch.cat([(x.int() - y.int()).abs().flatten() for x, y in zip(a, b, strict=True)])
        .float()
        .mean()
        .item()
    )


@pytest.mark.parametrize("operation", [*OPERATIONS, "all"])
def test_each_operation_on_photographs_is_pillow_s(photos, operation):
    """No difference at all on a CPU: both decode with libjpeg-turbo, and the crops are the same integers."""
    policy = replace(CropPolicy(), **(NOTHING | OPERATIONS[operation] if operation != "all" else {}))
    (batch,) = load(photos, policy=policy, batch_size=2, total_steps=1)
    assert difference(batch.views, by_pillow(photos, policy, lambda view: view)) == 0


def smoother(image: Image.Image, view: View) -> Image.Image:
    top, left, h, w = view.box
    box = image.crop((left, top, left + w, top + h))
    return box.resize((view.size, view.size), Image.Resampling.BILINEAR)


def aliased(image: Image.Image, view: View) -> Image.Image:
    top, left, h, w = view.box
    matrix = (w / view.size, 0, left, 0, h / view.size, top)
    return image.transform((view.size, view.size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("operation", "change", "how"),
    [
        ("resize", lambda v: v, {"render": smoother}),
        ("resize", lambda v: v, {"render": aliased}),
        ("resize", lambda v: replace(v, box=(v.box[0], v.box[1], v.box[2], v.box[3] - 1)), {}),
        ("jitter", lambda v: replace(v, jitter=v.jitter[::-1]), {}),
        ("blur", lambda v: replace(v, blur=v.blur * 1.1), {}),
        (
            "blur",
            lambda v: v,
            {
                "render": lambda image, v: render(image, replace(v, blur=None)).filter(
                    ImageFilter.BoxBlur(v.blur)
                )
            },
        ),
    ],
    ids=["filter", "antialias", "box", "order", "radius", "box blur"],
)
def test_a_wrong_filter_order_or_radius_would_show(photos, operation, change, how):
    """What the test above is worth: errors that users of other pipelines report are no zeros."""
    policy = replace(CropPolicy(), **(NOTHING | OPERATIONS[operation]))
    (batch,) = load(photos, policy=policy, batch_size=2, total_steps=1)
    assert difference(batch.views, by_pillow(photos, policy, change, **how)) > 0.03


# --- probabilities, seen in what comes out


def steps(x: Tensor) -> Tensor:
    """Largest difference of neighbours in a row, of each view."""
    return (x[..., 1:].float() - x[..., :-1].float()).abs().flatten(1).max(1).values


def is_gray(x: Tensor) -> Tensor:
    return ((x[:, 0] == x[:, 1]) & (x[:, 1] == x[:, 2])).flatten(1).all(1)


N = 600
# policy, probability for each kind of view, and which views (N, 3, 8, 8) of one and the same image show it
SEEN: dict[str, tuple[dict, tuple[float, ...], Callable[[Tensor], Tensor]]] = {
    "flip": ({"flip": 0.5}, (0.5, 0.5, 0.5), lambda x: x[:, 0, 0, 0] > x[:, 0, 0, -1]),
    "grayscale": ({"grayscale": 0.2}, (0.2, 0.2, 0.2), is_gray),
    "solarize": ({"solarize": (0.0, 0.2, 0.0)}, (0.0, 0.2, 0.0), lambda x: x.flatten(1).max(1).values < 128),
    "blur": (
        {"blur": (1.0, 0.1, 0.5), "blur_radius": (2.0, 2.0)},
        (1.0, 0.1, 0.5),
        lambda x: steps(x) < 100,
    ),
    # the dark side, which no factor takes to 255
    "jitter": (
        {"jitter": 0.8, "brightness": 0.4},
        (0.8, 0.8, 0.8),
        lambda x: x[:, 0, 0, 0] != x[:, 0, 0, 0].mode().values,
    ),
}


@pytest.fixture(scope="module")
def same(tmp_path_factory) -> Path:
    """One image many times: steps from dark to light, coloured, uniform in what a crop can hold of it."""
    root = tmp_path_factory.mktemp("same")
    x = np.zeros((8, 8, 3), dtype=np.uint8)
    x[:, 4:] = (255, 235, 215)
    x[:, :4] = (40, 20, 0)
    (root / "0.jpg").write_bytes(jpeg(Image.fromarray(x), quality=100, subsampling=0))
    for i in range(1, N):
        os.link(root / "0.jpg", root / f"{i}.jpg")
    return root


@pytest.mark.parametrize("loader", ["torchvision", "dali"])
@pytest.mark.parametrize("operation", SEEN)
def test_probabilities_seen_in_the_pixels(same, loader, operation):
    options, expected, shows = SEEN[operation]
    whole = {"global_crops_scale": (1.0, 1.0), "local_crops_scale": (1.0, 1.0), "aspect_ratio": (1.0, 1.0)}
    policy = replace(
        CropPolicy(global_crops_size=8, local_crops_size=8, local_crops_number=1),
        **(NOTHING | whole | options),
    )
    batches = load(same, loader, policy=policy, batch_size=N // 4, total_steps=4)
    for view, p in enumerate(expected):
        n = int(shows(torch.cat([batch.views[view] for batch in batches])).sum())
        assert abs(n - p * N) <= 4 * (p * (1 - p) * N) ** 0.5, (view, n / N)


# --- shards


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_shards_through_both_loaders_at_any_ranks_workers_and_resumes(folder, tmp_path):
    """Twelve images in shards of five, read through a shuffle buffer of four: each once, always the same."""
    tool.Pack(data=str(folder), out=str(tmp_path / "shards"), images_per_shard=5, workers=1).run()
    shards = tmp_path / "shards"
    options = {"shuffle_buffer": 4, "total_steps": 6}
    whole = load(shards, "torchvision", **options)
    for epoch in (whole[:3], whole[3:]):
        assert sorted(i for batch in epoch for i in batch.indices.tolist()) == list(range(12))
    assert [b.indices.tolist() for b in whole[:3]] != [b.indices.tolist() for b in whole[3:]]
    for loader in ("torchvision", "dali"):
        for workers, start in ((0, 0), (2, 0), (3, 4)):
            got = load(shards, loader, workers=workers, start_step=start, **options)
            assert_same(got, whole[start:])
            assert sum(batch.by_pillow for batch in got) == 0
        for ranks in (2, 4):
            parts = [
                load(shards, loader, rank=r, ranks=ranks, workers=r % 2, **options) for r in range(ranks)
            ]
            for batch, *shares in zip(whole, *parts, strict=True):
                assert torch.equal(torch.cat([share.indices for share in shares]), batch.indices)
                for view, *its in zip(batch.views, *(share.views for share in shares), strict=True):
                    assert torch.equal(torch.cat(its), view)


# --- files that are not plain


def files(root: Path) -> dict[str, int]:
    """Files of every kind that DALI is not given or cannot decode; 1 where Pillow decodes it instead."""
    image = pieces()[0]
    whole = jpeg(image)
    gray16 = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    made: dict[str, tuple[bytes, int]] = {
        "a.jpg": (whole, 0),
        "cmyk.jpg": (jpeg(image.convert("CMYK")), 1),
        "no_end.jpg": (whole[:-2] + bytes(80), 1),
        "cut_with_end.jpg": (whole[: len(whole) // 2] + b"\xff\xd9", 0),
        "one.jpg": (jpeg(image.resize((1, 1))), 0),
        "rgb_stored.jpg": (jpeg(image, keep_rgb=True), 1),
    }
    for name, other in {
        "palette.png": image.convert("P"),
        "alpha.png": image.convert("RGBA"),
        "gray16.png": gray16,
        "x.webp": image,
        "y.bmp": image,
        "z.tiff": image.convert("L"),
    }.items():
        file = io.BytesIO()
        other.save(file, {"tiff": "TIFF"}.get(name.split(".")[1], name.split(".")[1]))
        made[name] = file.getvalue(), 1
    for name, (content, _) in made.items():
        (root / name).write_bytes(content)
    return {name: n for name, (_, n) in made.items()}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_dali_does_not_decode_pillow_does_and_it_is_counted(tmp_path, workers):
    counts = files(tmp_path)
    n = len(counts)
    options = {"batch_size": 1, "total_steps": n, "workers": workers}
    ours = load(tmp_path, **options)
    assert_same(ours, load(tmp_path, "torchvision", **options))
    source = open_source(str(tmp_path))
    for batch in ours:
        name = source.path(int(batch.indices[0])).rpartition("/")[2]
        assert batch.by_pillow == counts[name], name
    (batch,) = load(tmp_path, batch_size=n, total_steps=1)
    assert_same([batch], load(tmp_path, "torchvision", batch_size=n, total_steps=1))
    assert batch.by_pillow == sum(counts.values())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pipeline_goes_on_after_a_file_that_ended_it(folder, tmp_path, monkeypatch, workers):
    """Its batch is Pillow's, with whatever Pillow says of the file, and the next ones are DALI's again."""
    for path in sorted(folder.iterdir()):
        os.link(path, tmp_path / path.name)
    cut = (tmp_path / "00.jpg").read_bytes()
    os.unlink(tmp_path / "00.jpg")
    (tmp_path / "00.jpg").write_bytes(cut[: len(cut) // 2])
    monkeypatch.setattr(module, "_END", b"")  # as if it had one
    ours = load(tmp_path, total_steps=9, workers=workers)
    assert_same(ours, load(tmp_path, "torchvision", total_steps=9))
    assert sum(len(batch.unreadable) for batch in ours) == 3
    assert [batch.by_pillow for batch in ours] == [4 * len(batch.unreadable) for batch in ours]


def test_unreadable_files_give_their_places_as_in_the_other_loader(folder, tmp_path):
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        bad = {
            "02.jpg": content[:300],
            "07.jpg": b"",
            "11.jpg": b"text",
            "05.jpg": content[: len(content) // 2],
        }
        (tmp_path / path.name).write_bytes(bad.get(path.name, content))
    for workers in (0, 2):
        ours = load(tmp_path, workers=workers)
        assert_same(ours, load(tmp_path, "torchvision"))
        assert {os.path.basename(name) for batch in ours for name in batch.unreadable} == {
            "02.jpg",
            "05.jpg",
            "07.jpg",
            "11.jpg",
        }


def test_a_set_of_broken_files_ends_with_one_named(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(b"\xff\xd8\xff broken \xff\xd9")
    with pytest.raises(Unreadable, match="so were the 7 files before it"):
        load(tmp_path)


def test_huge_images_are_left_to_pillow(folder, monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 100 * 100)
    ours = load(folder)
    large = sum(w * h > 100 * 100 for w, h in (image.size for image in pieces()))
    assert sum(batch.by_pillow for batch in ours[:3]) == large > 0
    assert_same(ours, load(folder, "torchvision"))


def test_a_size_other_than_the_header_s_is_decoded_again_by_pillow(folder, monkeypatch):
    """Whatever DALI makes of a file, its boxes were drawn for what Pillow makes of it."""
    from nvidia.dali import fn

    decode = fn.decoders.image
    monkeypatch.setattr(fn.decoders, "image", lambda *a, **k: decode(*a, **k, adjust_orientation=False))
    ours = load(folder, total_steps=3)
    turned = {5, 7}  # orientations 6 and 5; 3 keeps the size, and DALI would have turned it
    for a, b in zip(ours, load(folder, "torchvision", total_steps=3), strict=True):
        assert a.by_pillow == len(turned & set(a.indices.tolist()))
        kept = [i for i, index in enumerate(a.indices.tolist()) if index != 6]
        assert all(torch.equal(x[kept], y[kept]) for x, y in zip(a.views, b.views, strict=True))


@dataclass(frozen=True)
class Posterized(View):
    """A view with a parameter for which the kernels' row has no place."""

    bits: int = 8


@pytest.mark.parametrize("workers", [0, 1])
def test_views_that_no_kernel_can_make_are_pillow_s(folder, monkeypatch, workers):
    def draw_some(policy: CropPolicy, seed: int, epoch: int, index: int, size: tuple[int, int]) -> list[View]:
        bits = [2 if index % 3 == 0 and v in (0, 4) else 8 for v in range(policy.n_views)]
        views = draw(policy, seed, epoch, index, size)
        return [Posterized(**vars(view), bits=n) for view, n in zip(views, bits, strict=True)]

    def posterize(image: Image.Image, view: View) -> Image.Image:
        return ImageOps.posterize(render(image, view), view.bits)

    plain = load(folder)
    for patched in (data.loader, module):
        monkeypatch.setattr(patched, "draw", draw_some)
    for patched in (data.crops, module):
        monkeypatch.setattr(patched, "render", posterize)
    ours = load(folder, workers=workers)
    assert_same(ours, load(folder, "torchvision", workers=workers))
    for a, b in zip(ours, plain, strict=True):
        few = a.indices % 3 == 0
        assert a.by_pillow == few.sum()
        for v, (x, y) in enumerate(zip(a.views, b.views, strict=True)):
            same = [torch.equal(p, q) for p, q in zip(x, y, strict=True)]
            assert same == (~few).tolist() if v in (0, 4) else all(same)


def test_crops_that_are_not_pillow_s_end_the_run(folder, monkeypatch):
    crop = module.multi_crop
    monkeypatch.setattr(
        module, "multi_crop", lambda images, p, out: crop([i.flip(0) for i in images], p, out)
    )
    with pytest.raises(RuntimeError, match=r"differ from Pillow's by [0-9.]+ of 255 .*--loader torchvision"):
        load(folder)


def test_an_iteration_that_fails_leaves_no_pipeline(folder, monkeypatch):
    """A process that is forked with one would wait for ever for threads that it lacks."""
    made, build = [], module.DaliLoader._build

    def keep(self: module.DaliLoader) -> object:
        pipeline = build(self)
        made.append(weakref.ref(pipeline))
        return pipeline

    monkeypatch.setattr(module.DaliLoader, "_build", keep)
    monkeypatch.setattr(module, "LARGEST_DIFFERENCE", -1.0)
    with pytest.raises(RuntimeError, match="differ from Pillow's") as caught:
        load(folder)
    assert [pipeline() for pipeline in made] == [None]  # though `caught` still holds the loader's frames
    assert caught.value


def test_a_forked_process_does_not_collect_a_pipeline_that_is_garbage(folder):
    """Its destructor waits for threads; the child would collect wherever it happens to be."""
    loader = make_loader(
        open_source(str(folder)),
        POLICY,
        loader="dali",
        batch_size=4,
        pieces=1,
        seed=0,
        start_step=0,
        total_steps=1,
        workers=0,
    )
    cycle = [loader._build()]
    cycle[0].feed_input("files", [np.frombuffer((folder / "00.jpg").read_bytes(), np.uint8)] * 4)
    cycle[0].run()
    cycle.append(cycle)
    gc.disable()
    try:
        del cycle
        if (child := os.fork()) == 0:
            gc.collect()
            os._exit(7)
        until = time.monotonic() + 120
        while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
            time.sleep(0.05)
        if done == (0, 0):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    finally:
        gc.enable()
    assert os.waitstatus_to_exitcode(done[1]) == 7
    assert done[0] == child


# --- the choice, and training


def test_the_loader_is_chosen_by_what_is_there(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_loader("auto", cpu) == ("torchvision", "")
    assert choose_loader("auto", cuda) == ("dali", "")
    assert choose_loader("dali", cpu) == ("dali", "")
    assert choose_loader("torchvision", cuda) == ("torchvision", "")
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    assert choose_loader("auto", cpu) == ("torchvision", "")
    for name in ("auto", "dali"):
        chosen, note = choose_loader(name, cuda)
        assert chosen == "torchvision"
        assert "pip install 'fastdino[dali]' (CUDA 13) or 'fastdino[dali-cuda12]'" in note


def test_dali_is_imported_where_it_is_asked_for_alone(folder, monkeypatch):
    imported = builtins.__import__

    def refuse(name, *args, **kwargs):
        assert not name.startswith("nvidia.dali")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert load(folder, "torchvision")


def test_training_with_dali_is_training_with_the_other(folder, tmp_path, capsys):
    demo = PRESETS["demo"][1]
    metrics = []
    for loader in ("torchvision", "dali"):
        out = tmp_path / loader
        train.train(
            replace(
                demo,
                data=replace(demo.data, data=str(folder), loader=loader, workers=1),
                optim=replace(demo.optim, epochs=2, batch_size=4),
                run=replace(demo.run, out=str(out), device="cpu", log_every=1, knn_every_epochs=0),
            )
        )
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        metrics.append([(line["step"], line["loss"], line["grad_norm"]) for line in lines])
    assert metrics[0] == metrics[1]
    assert len(metrics[0]) == 6
    assert all(line["decoded_by_pillow"] == 0 for line in lines)
    assert "1 loader processes and DALI" in capsys.readouterr().out


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_batches_differ_by_the_decoder_alone(photos):
    for _ in range(3):
        (batch,) = load(photos, policy=CropPolicy(), batch_size=2, total_steps=1, device="cuda")
        assert all(views.is_cuda for views in batch.views)
        (expected,) = load(photos, "torchvision", policy=CropPolicy(), batch_size=2, total_steps=1)
        views = [view.cpu() for view in batch.views]
        assert difference(views, expected.views) < 0.5
