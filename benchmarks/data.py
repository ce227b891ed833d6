"""Times the loading of DINO's crops, here and as others write it: images/s, and which stage takes the time.

    python -m benchmarks.data [--images DIR] [--workers 2] [--entries 1000000] [--quick] [--out DIR]

All loaders read the same JPEGs in the same order and draw crops of their own, by official DINO's settings:
two global ones of 224 and eight local ones of 96 pixels, counted when they are float32 and normalised.

    official DINO     its data set and transform, on Pillow and torchvision.transforms
    torchvision v2    the same on uint8 tensors: decode_jpeg, then torchvision.transforms.v2, with the blur of
                      DINOv2 (a kernel of 9 pixels, which is less work than all that Pillow's reaches)
    lightly           its LightlyDataset and DINOTransform, with eight local crops, not its six; its other
                      defaults are official DINO's
    fastdino          make_loader; workers send uint8, and this process normalises, which is counted
    fastdino, DALI    make_loader(loader="dali"), where nvidia.dali is installed; on a CPU, too

Parts; core, split, workers and gpu are interleaved so that a disturbance meets all loaders. The table has
medians and, in brackets, quartiles of the rounds; a ratio is the median of the rounds' own ratios, since all
have the same images in one.

    core        no workers, one thread, a batch a round; `cores` is processor time by wall time. Without
                DALI, which has threads of its own
    split       the same time by stage. Of others each transform is timed; fastdino's kernel does all at
                once, so loaders whose policies leave stages out, with the same boxes, are subtracted from
                one another: `crop, flip` has drawing and writing into the batch in it. rest: making the batch
    workers     batches come from worker processes; timed once each has sent its first. KB sent: of an image,
                to the trainer. own MB: what a worker shares with no other process, the most that was seen.
                DALI's workers read alone; decoding and cropping are the trainer's process's and add to them
    entries     opening a list, and tar shards with their indexes, of so many images: seconds, and memory held
                afterwards and at its peak
    gpu         DALI's decoder alone, and the kernel that makes the crops alone
    train       fastdino-train's loop, fed by each loader: images/s, and the share of it that waits for data

Nothing is timed unless fastdino's crops are, bit for bit, those that Pillow renders (on a GPU DALI's differ
by its decoder), and the others' have the shapes, the type and nearly the mean and deviation of these. Files
are read once before. The JPEGs are made for it; benchmarks/photos.py says how.
"""

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import photos
from benchmarks.measure import Clock, Conditions, Row, Timed, folder, interleave, machine, write
from fastdino import data, ops, train
from fastdino.config import Config, CropPolicy, DataConfig, ModelConfig, OptimConfig, RunConfig
from fastdino.data import crops
from fastdino.monitor import read_metrics

HAS_DALI = bool(find_spec("nvidia") and find_spec("nvidia.dali"))
POLICY = CropPolicy()
SEED = 0
SIZES = [POLICY.global_crops_size] * POLICY.n_global + [POLICY.local_crops_size] * POLICY.local_crops_number
STAGES = ("decode", "crop, flip", "jitter, grayscale", "blur, solarise", "to tensor, normalise", "rest")
STAGE_OF = {
    "RandomResizedCrop": "crop, flip",
    "RandomHorizontalFlip": "crop, flip",
    "RandomVerticalFlip": "crop, flip",
    "RandomRotate": "crop, flip",
    "ColorJitter": "jitter, grayscale",
    "RandomGrayscale": "jitter, grayscale",
    "GaussianBlur": "blur, solarise",
    "Solarize": "blur, solarise",
    "RandomSolarize": "blur, solarise",
    "RandomSolarization": "blur, solarise",
    "ToTensor": "to tensor, normalise",
    "ToDtype": "to tensor, normalise",
    "Normalize": "to tensor, normalise",
}


@dataclass
class Way:
    """A way to load. `open` takes images a batch, workers and batches, and gives batches as they are sent."""

    name: str
    open: Callable[[int, int, int], Iterable[Any]]
    views: Callable[[Any], list[Tensor]] = lambda sent: sent[0]
    dataset: Any = None  # others': has loader, samples and transform, as torchvision's
    threads: bool = False  # has some of its own, and so is not for timing by the core
    weigh: Callable[[Any], int] | None = None  # bytes that a worker sent, where these are not the views


# What the others do.


class GaussianBlur:
    """Official DINO's, of a Pillow image."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() > self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*POLICY.blur_radius)))


class Solarize:
    """Official DINO's, of a Pillow image."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < self.p else image


class MultiCrop:
    """Every view of an image."""

    def __init__(self, view: Callable[[int, tuple[float, float], float, float], Any]) -> None:
        sizes = [POLICY.global_crops_size] * 2 + [POLICY.local_crops_size]
        scales = [POLICY.global_crops_scale] * 2 + [POLICY.local_crops_scale]
        first, second, local = map(view, sizes, scales, POLICY.blur, POLICY.solarize)
        self.transforms = [first, second, *[local] * POLICY.local_crops_number]

    def __call__(self, image: Any) -> list[Tensor]:
        return [transform(image) for transform in self.transforms]


def official_view(size: int, scale: tuple[float, float], blur: float, solarize: float) -> Any:
    from torchvision import transforms as t

    return t.Compose(
        [
            t.RandomResizedCrop(size, scale, interpolation=t.InterpolationMode.BICUBIC),
            t.RandomHorizontalFlip(POLICY.flip),
            t.RandomApply([t.ColorJitter(*_strengths())], p=POLICY.jitter),
            t.RandomGrayscale(POLICY.grayscale),
            GaussianBlur(blur),
            *([Solarize(solarize)] if solarize else []),
            t.ToTensor(),
            t.Normalize(POLICY.mean, POLICY.std),
        ]
    )


def v2_view(size: int, scale: tuple[float, float], blur: float, solarize: float) -> Any:
    from torchvision.transforms import v2 as t

    return t.Compose(
        [
            t.RandomResizedCrop(size, scale, interpolation=t.InterpolationMode.BICUBIC, antialias=True),
            t.RandomHorizontalFlip(POLICY.flip),
            t.RandomApply([t.ColorJitter(*_strengths())], p=POLICY.jitter),
            t.RandomGrayscale(POLICY.grayscale),
            t.RandomApply([t.GaussianBlur(9, POLICY.blur_radius)], p=blur),
            *([t.RandomSolarize(128, solarize)] if solarize else []),
            t.ToDtype(torch.float32, scale=True),
            t.Normalize(POLICY.mean, POLICY.std),
        ]
    )


def _strengths() -> tuple[float, float, float, float]:
    return POLICY.brightness, POLICY.contrast, POLICY.saturation, POLICY.hue


def decode_tensor(path: str) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    return decode_jpeg(read_file(path), mode=ImageReadMode.RGB)


# All ways.


def batches_of(n: int, batch: int, count: int) -> list[list[int]]:
    """The images of each batch: those of make_loader, so that all load the same at the same time."""
    per_epoch, found, order = n // batch, [], []
    for step in range(count):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = data.epoch_order(n, SEED, epoch).tolist()
        found.append(order[place * batch : (place + 1) * batch])
    return found


def other(name: str, dataset: Any, images: Any, device: torch.device) -> Way:
    """A data set in torch's DataLoader with its defaults."""

    def open_(batch: int, workers: int, count: int) -> DataLoader:
        order = batches_of(len(dataset), batch, count)
        return DataLoader(dataset, batch_sampler=order, num_workers=workers, pin_memory=device.type == "cuda")

    return Way(name, open_, dataset=images)


def our_loader(
    source: Any, policy: CropPolicy, kind: str, batch: int, workers: int, count: int, device: torch.device
) -> Iterable[data.Batch]:
    """Our batches; the one place that knows how make_loader is called."""
    return data.make_loader(
        source,
        policy,
        batch_size=batch,
        pieces=1,
        seed=SEED,
        start_step=0,
        total_steps=count,
        workers=workers,
        device=device,
        loader=kind,
    )


def ours(source: Any, device: torch.device, kind: str) -> Way:
    def encoded(batch: data.Batch) -> int:
        files = sum(os.path.getsize(source.path(index)) for index in batch.indices.tolist())
        return files + crops.encode(crops.draw(POLICY, SEED, 0, 0, (500, 400))).nbytes * len(batch.indices)

    return Way(
        "fastdino" if kind == "torchvision" else "fastdino, DALI",
        lambda batch, workers, count: our_loader(source, POLICY, kind, batch, workers, count, device),
        lambda sent: sent.views,
        threads=kind == "dali",
        weigh=encoded if kind == "dali" else None,
    )


def ways_of(where: Path, source: Any, device: torch.device) -> tuple[list[Way], dict[str, str]]:
    """The ways that run here, and why the others do not."""
    found, missing = [], {}
    if find_spec("torchvision"):
        from torchvision.datasets import ImageFolder

        official = ImageFolder(str(where), transform=MultiCrop(official_view))
        v2 = ImageFolder(str(where), transform=MultiCrop(v2_view), loader=decode_tensor)
        found += [other("official DINO", official, official, device), other("torchvision v2", v2, v2, device)]
    else:
        missing |= dict.fromkeys(("official DINO", "torchvision v2"), "torchvision is not installed")
    try:
        from lightly.data import LightlyDataset
        from lightly.transforms import DINOTransform
    except ImportError as error:  # itself, or what it needs
        missing["lightly"] = str(error)
    else:
        theirs = LightlyDataset(str(where), DINOTransform(n_local_views=POLICY.local_crops_number))
        found.append(other("lightly", theirs, theirs.dataset, device))
    found.append(ours(source, device, "torchvision"))
    if HAS_DALI:
        found.append(ours(source, device, "dali"))
    else:
        missing["fastdino, DALI"] = "nvidia.dali is not installed"
    listed = [source.path(i) for i in range(len(source))]
    for way in found:
        if way.dataset and [path for path, _ in way.dataset.samples] != listed:
            raise SystemExit(f"{way.name} numbers the images otherwise than fastdino: nothing was timed")
    return found, missing


def finish(views: list[Tensor], device: torch.device) -> list[Tensor]:
    """What the network gets: on the device, in float32, normalised."""
    moved = [view.to(device, non_blocking=True) for view in views]
    return [view if view.is_floating_point() else crops.normalize(view, POLICY) for view in moved]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Correctness.


def check(ways: list[Way], source: Any, device: torch.device, images: int) -> Row:
    """Raises SystemExit where a way's crops are not what they should be; else says how far they are."""
    (indices,) = batches_of(len(source), images, 1)
    (batch,) = our_loader(source, POLICY, "torchvision", images, 0, 1, torch.device("cpu"))
    if batch.indices.tolist() != indices or batch.unreadable:
        raise SystemExit("fastdino loaded other images than asked for: nothing was timed")
    for place, index in enumerate(indices):
        image = source.load(index)
        for v, view in enumerate(crops.draw(POLICY, SEED, 0, index, image.size)):
            if not torch.equal(batch.views[v][place], crops.to_tensor(crops.render(image, view))):
                raise SystemExit(f"view {v} of image {index} is not Pillow's: nothing was timed")
    right = finish(batch.views, torch.device("cpu"))
    far: dict[str, str] = {}
    for way in ways:
        torch.manual_seed(SEED)
        random.seed(SEED)
        np.random.seed(SEED)
        (sent,) = way.open(images, 0, 1)
        views = [view.cpu() for view in finish(way.views(sent), device)]
        shapes = [tuple(view.shape) for view in views]
        if shapes != [(images, 3, size, size) for size in SIZES]:
            raise SystemExit(f"{way.name} gives views of {shapes}: nothing was timed")
        if isinstance(sent, data.Batch):
            levels = torch.cat(
                [(a.cpu().float() - b).abs().flatten() for a, b in zip(sent.views, batch.views, strict=True)]
            )
            # nvJPEG rounds otherwise than libjpeg
            if levels.mean() > (2 if way.threads and device.type == "cuda" else 0):
                raise SystemExit(f"{way.name} is {levels.mean():.2f} levels off: nothing was timed")
            far[way.name] = f"{levels.mean():.3f} levels of 255 off"
            continue
        flat, expected = (torch.cat([view.flatten() for view in v]) for v in (views, right))
        mean, deviation = (flat.mean() - expected.mean()).item(), (flat.std() / expected.std()).item()
        # in standard deviations of a pixel; each view has a light of its own, drawn within 0.6 to 1.4
        if flat.dtype != torch.float32 or not abs(mean) < 0.3 or not 0.8 < deviation < 1.25:
            raise SystemExit(
                f"{way.name} gives {flat.dtype}, mean {mean:+.2f} and {deviation:.2f} times the deviation of "
                "Pillow's crops: nothing was timed"
            )
        far[way.name] = f"mean {mean:+.3f}, deviation x {deviation:.3f}"
    return {"checked_images": images, "from_pillow": far}


# A core, and its time by stage.


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": middle, "low": low, "high": high, "rounds": len(values)}


def times_official(times: dict[str, list[float]], name: str) -> dict[str, float] | None:
    if "official DINO" not in times:
        return None
    return spread([theirs / its for theirs, its in zip(times["official DINO"], times[name], strict=True)])


def bench_core(ways: list[Way], batch: int, seconds: float, rounds: int) -> list[Row]:
    ways = [way for way in ways if not way.threads]
    used: dict[str, list[float]] = {way.name: [0.0, 0.0] for way in ways}
    timed: Timed = {}
    for way in ways:
        batches = iter(way.open(batch, 0, rounds + 2))

        def run(way: Way = way, batches: Iterator[Any] = batches) -> None:
            began, busy = time.perf_counter(), time.process_time()
            finish(way.views(next(batches)), torch.device("cpu"))
            used[way.name][0] += time.process_time() - busy
            used[way.name][1] += time.perf_counter() - began

        timed[way.name] = run
    times = interleave(timed, Clock(torch.device("cpu")), seconds, rounds)
    return [
        {
            "part": "core",
            "loader": name,
            "images_per_s": spread([batch / t * 1e3 for t in ms]),
            "times_official": times_official(times, name),
            "cores": used[name][0] / used[name][1],
        }
        for name, ms in times.items()
    ]


def steps_of(transform: Any) -> list[tuple[str, Any]]:
    """Stage and transform of everything in a Compose."""
    found = []
    compose = transform if hasattr(transform, "transforms") else transform.transform  # lightly's view
    for step in compose.transforms:
        name = type(step.transforms[0] if type(step).__name__ == "RandomApply" else step).__name__
        found.append((STAGE_OF[name], step))
    return found


def staged(way: Way, batch: int, count: int, into: list[Counter[str]]) -> Callable[[], None]:
    """Loads a batch as its DataLoader would, and appends the seconds of each stage."""
    from torch.utils.data import default_collate

    order = iter(batches_of(len(way.dataset), batch, count))
    views = [steps_of(transform) for transform in way.dataset.transform.transforms]

    def run() -> None:
        spent: Counter[str] = Counter()
        clock = time.perf_counter
        began, samples = clock(), []
        for index in next(order):
            at = clock()
            image = way.dataset.loader(way.dataset.samples[index][0])
            spent["decode"] += clock() - at
            sample = []
            for steps in views:
                view, at = image, clock()
                for stage, step in steps:
                    view, last = step(view), at
                    at = clock()
                    spent[stage] += at - last
                sample.append(view)
            samples.append((sample, way.dataset.samples[index][1]))
        default_collate(samples)
        spent["rest"] = clock() - began - spent.total()
        into.append(spent)

    return run


def bench_split(ways: list[Way], source: Any, batch: int, seconds: float, rounds: int) -> list[Row]:
    cpu = torch.device("cpu")
    spent: dict[str, list[Counter[str]]] = {way.name: [] for way in ways if way.dataset}
    timed: Timed = {way.name: staged(way, batch, rounds + 2, spent[way.name]) for way in ways if way.dataset}
    order = iter(batches_of(len(source), batch, rounds + 2))
    timed["decode"] = lambda: [source.load(index) for index in next(order)]
    sharp = replace(POLICY, blur=(0.0, 0.0, 0.0), solarize=(0.0, 0.0, 0.0))
    for name, policy in (
        ("crop, flip", replace(sharp, jitter=0.0, grayscale=0.0)),
        ("jitter, grayscale", sharp),
        ("blur, solarise", POLICY),
    ):
        batches = iter(our_loader(source, policy, "torchvision", batch, 0, rounds + 2, cpu))
        timed[name] = lambda batches=batches: kept.update(views=next(batches).views)
    kept: dict[str, list[Tensor]] = {}
    timed["to tensor, normalise"] = lambda: finish(kept["views"], cpu)
    times = interleave(timed, Clock(cpu), seconds, rounds)
    rows = []
    for name, counts in spent.items():
        stages = {stage: 1e3 * statistics.median(c[stage] for c in counts[2:]) / batch for stage in STAGES}
        rows.append({"part": "split", "loader": name, "ms": stages})
    stages = {"decode": statistics.median(times["decode"]) / batch}
    for less, more in itertools.pairwise(STAGES[:4]):
        pairs = zip(times[more], times[less], strict=True)
        stages[more] = statistics.median(a - b for a, b in pairs) / batch
    stages |= {STAGES[4]: statistics.median(times[STAGES[4]]) / batch, "rest": 0.0}
    return [*rows, {"part": "split", "loader": "fastdino", "ms": stages}]


# Worker processes.


def own_bytes(process: int) -> int:
    """Memory that a process shares with no other; -1 where the system does not tell."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return -1
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def steady(way: Way, batch: int, workers: int, each: int, device: torch.device) -> Row:
    """Images/s once all workers have sent their first batch, and what is sent and held.

    Workers send in turn, so whole turns are timed; two more follow, so that none is idle meanwhile.
    """
    batches = iter(way.open(batch, workers, (each + 3) * workers))

    def take(count: int) -> None:
        for _ in range(count):
            finish(way.views(next(batches)), device)
        synchronize(device)

    first = next(batches)
    weight = way.weigh(first) if way.weigh else sum(view.nbytes for view in way.views(first))
    row: Row = {"KB_sent": weight / batch / 1e3}
    del first
    take(workers - 1)
    began = time.perf_counter()
    take(each * workers)
    row["seconds"] = (time.perf_counter() - began) / (each * workers * batch)
    own = []
    for _ in range(workers):
        take(1)
        own += [own_bytes(process.pid or 0) for process in multiprocessing.active_children()]
    return row | {"own_MB": max(own, default=0) / 1e6}


def bench_workers(
    ways: list[Way], batch: int, workers: int, each: int, rounds: int, device: torch.device
) -> list[Row]:
    found: dict[str, list[Row]] = {way.name: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            found[way.name].append(steady(way, batch, workers, each, device))
            gc.collect()  # its workers end
    times = {name: [row["seconds"] for row in its] for name, its in found.items()}
    return [
        {
            "part": "workers",
            "loader": name,
            "workers": workers,
            "images_per_s": spread([1 / seconds for seconds in times[name]]),
            "times_official": times_official(times, name),
            "KB_sent": its[0]["KB_sent"],
            "own_MB": max(row["own_MB"] for row in its),
        }
        for name, its in found.items()
    ]


# Opening many images.

OPEN = """
import json, resource, sys, time
from pathlib import Path
from fastdino import data
from fastdino.data import shards
def held(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
before, began = held("VmRSS"), time.perf_counter()
source = data.open_source(sys.argv[1])
seconds = time.perf_counter() - began
row = {"entries": len(source), "seconds": seconds, "held_MB": (held("VmRSS") - before) / 1e6}
print(json.dumps(row | {"peak_MB": (held("VmHWM") - before) / 1e6}))
"""


def sparse_shards(where: Path, count: int) -> Path:
    """Shards of 1000 images of 110 KB, with indexes; only the bytes that opening them reads are there."""
    from fastdino.data import shards

    where.mkdir()
    blocks = 220
    member = tarfile.TarInfo("image.jpg")
    member.size = blocks * shards.BLOCK
    header = member.tobuf(tarfile.USTAR_FORMAT)
    checksum = tarfile.TarInfo.frombuf(header, "utf-8", "strict").chksum & 0xFFFF
    for shard, first in enumerate(range(0, count, 1000)):
        n, path = min(1000, count - first), where / f"{shard:06d}.tar"
        records = np.zeros(n, shards.RECORD)
        records["block"] = 1 + np.arange(n) * (1 + blocks)
        records["size"], records["head"], records["sum"] = member.size, 1, checksum
        labels = (first + np.arange(n, dtype=np.int32)) // 1300
        kinds, labels = np.unique(labels, return_inverse=True)
        with path.open("wb") as file:
            for record in records[[0, -1]]:
                file.seek((int(record["block"]) - 1) * shards.BLOCK)
                file.write(header)
            size = file.truncate((n * (1 + blocks) + 2) * shards.BLOCK)
        found = shards.Index(
            records, labels.astype(np.int32), [str(kind) for kind in kinds], np.full(n, -1, np.int32), []
        )
        shards.save_index(path, size, found, [])
    return where


def bench_entries(count: int) -> list[Row]:
    """Each opened in a process of its own; the page cache has them, as they have just been written."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch, "list.txt")
        with listed.open("w") as file:  # names as ImageNet's
            for i in range(count):
                name = f"n{1440764 + i // 1300:08d}"
                file.write(f"train/{name}/{name}_{i}.JPEG\t{name}\n")
        for kind, path in (("list", listed), ("shards", sparse_shards(Path(scratch, "shards"), count))):
            run = [sys.executable, "-c", OPEN, str(path)]
            found = subprocess.run(run, capture_output=True, text=True, check=True)
            rows.append({"part": "entries", "loader": kind, **json.loads(found.stdout)})
    return rows


# On a GPU.


def dali_decode(files: list[str], batch: int, threads: int, device: torch.device) -> Callable[[], object]:
    """DALI's decoder without anything after it: a batch a call."""
    from nvidia.dali import fn, pipeline_def, types

    gpu = device.type == "cuda"

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=(device.index or 0) if gpu else None)
    def pipeline() -> Any:
        encoded, _ = fn.readers.file(files=files, random_shuffle=True, seed=SEED)
        where = "mixed" if gpu else "cpu"
        # as the loader has it
        return fn.decoders.image(encoded, device=where, output_type=types.RGB, jpeg_fancy_upsampling=True)

    made = pipeline()
    made.build()
    return made.run


def crops_alone(source: Any, batch: int, device: torch.device) -> Callable[[], object]:
    """The kernel that makes the crops, of images that lie decoded on the device."""
    (indices,) = batches_of(len(source), batch, 1)
    images = [source.load(index) for index in indices]
    drawn = [crops.draw(POLICY, SEED, 0, i, image.size) for i, image in zip(indices, images, strict=True)]
    parameters = torch.stack([crops.encode(views) for views in drawn])
    pixels = [crops.pixels(image).to(device) for image in images]
    out = [torch.empty(batch, 3, size, size, dtype=torch.uint8, device=device) for size in SIZES]
    return lambda: ops.multi_crop(pixels, parameters, out)


def bench_gpu(source: Any, batch: int, rounds: int, device: torch.device) -> list[Row]:
    """By the wall, over several batches on end: a decoder works ahead, on threads and a stream of its own."""

    def sustained(run: Callable[[], object], times: int = 10) -> float:
        for _ in range(5):  # what had been decoded ahead while others ran
            run()
        synchronize(device)
        began = time.perf_counter()
        for _ in range(times):
            run()
        synchronize(device)
        return times * batch / (time.perf_counter() - began)

    timed = {"the crops alone, decoded images on the device": crops_alone(source, batch, device)}
    if HAS_DALI:
        files = [source.path(i) for i in range(len(source))]
        # threads as the loader's
        timed["DALI's decoder alone"] = dali_decode(files, batch, data.choose_workers(8), device)
    rates: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, run in timed.items():
            rates[name].append(sustained(run))
    return [{"part": "gpu", "loader": name, "images_per_s": spread(found)} for name, found in rates.items()]


class Fed:
    """Stands for make_loader's result, whichever way the batches come."""

    def __init__(self, way: Way, batch: int, workers: int, count: int) -> None:
        self.views, self.workers = way.views, workers
        self.sent = way.open(batch, workers, count)

    def __iter__(self) -> Iterator[data.Batch]:
        for sent in self.sent:
            views = self.views(sent)
            yield data.Batch(views, torch.zeros(len(views[0]), dtype=torch.int64), [], [])


def bench_train(
    ways: list[Way], files: list[str], arch: str, batch: int, workers: int, updates: int, device: str
) -> list[Row]:
    """The trainer itself, with another loader put in; of the later half of its updates."""
    normalize, rows = crops.normalize, []
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch, "list.txt")
        listed.write_text(
            "".join(f"{path}\n" for path in itertools.islice(itertools.cycle(files), updates * batch))
        )
        for way in ways:
            config = Config(
                data=DataConfig(data=str(listed)),
                model=ModelConfig(arch=arch, patch_size=16),
                optim=OptimConfig(epochs=1, batch_size=batch),
                run=RunConfig(
                    out=str(Path(scratch, way.name)), device=device, log_every=max(1, updates // 10)
                ),
            )
            fed = Fed(way, batch, workers, updates)

            def once(views: Tensor, policy: CropPolicy) -> Tensor:
                return views if views.is_floating_point() else normalize(views, policy)

            instead = mock.patch.object(data, "make_loader", return_value=fed)
            with instead, mock.patch.object(crops, "normalize", once):
                train.train(config)
            logged = read_metrics(Path(config.run.out))
            logged = logged[len(logged) // 2 :]
            row = {"part": "train", "loader": way.name, "arch": arch, "images": batch, "workers": workers}
            row["images_per_s"] = spread([line["images_per_s"] for line in logged])
            rows.append(row | {"data_wait": statistics.mean(line["data_wait"] for line in logged)})
    return rows


# What is written.


def table(rows: list[Row]) -> str:
    out: list[str] = []

    def between(x: dict[str, float] | None, digits: int = 1) -> str:
        if x is None:
            return "-"
        return f"{x['median']:.{digits}f} ({x['low']:.{digits}f}-{x['high']:.{digits}f})"

    def section(part: str, title: str, heads: str, line: Callable[[Row], list[str]]) -> None:
        mine = [row for row in rows if row["part"] == part]
        if not mine:
            return
        columns = heads.split(" | ")
        out.extend(["", f"**{title.format(**mine[0])}**", "", f"| loader | {heads} |"])
        out.append("|---|" + "--:|" * len(columns))
        out.extend(f"| {row['loader']} | {' | '.join(line(row))} |" for row in mine)

    section(
        "core",
        "One core, no workers",
        "images/s | crops/s | times official | cores | rounds",
        lambda r: [
            between(r["images_per_s"]),
            f"{r['images_per_s']['median'] * POLICY.n_views:.0f}",
            between(r["times_official"], 2),
            f"{r['cores']:.2f}",
            str(r["images_per_s"]["rounds"]),
        ],
    )
    section(
        "split",
        "Milliseconds of an image on one core",
        " | ".join((*STAGES, "all")),
        lambda r: [f"{r['ms'][stage]:.2f}" for stage in STAGES] + [f"{sum(r['ms'].values()):.2f}"],
    )
    section(
        "workers",
        "{workers} worker processes",
        "images/s | crops/s | times official | KB sent | own MB | rounds",
        lambda r: [
            between(r["images_per_s"]),
            f"{r['images_per_s']['median'] * POLICY.n_views:.0f}",
            between(r["times_official"], 2),
            f"{r['KB_sent']:.0f}",
            f"{r['own_MB']:.0f}",
            str(r["images_per_s"]["rounds"]),
        ],
    )
    section(
        "entries",
        "Opening {entries} images",
        "seconds | held MB | peak MB",
        lambda r: [f"{r['seconds']:.2f}", f"{r['held_MB']:.1f}", f"{r['peak_MB']:.1f}"],
    )
    section("gpu", "Alone, on the device", "images/s", lambda r: [between(r["images_per_s"], 0)])
    section(
        "train",
        "Training {arch}, {images} images an update, {workers} workers",
        "images/s | waiting for data",
        lambda r: [between(r["images_per_s"]), f"{r['data_wait']:.1%}"],
    )
    return "\n".join(out) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    split = {row["loader"]: row["ms"] for row in rows if row["part"] == "split"}
    rates = [
        (title, {row["loader"]: row["images_per_s"] for row in rows if row["part"] == part})
        for part, title in (("core", "one core"), ("workers", "worker processes"))
    ]
    names = list(dict.fromkeys(row["loader"] for row in rows if row["part"] in ("core", "split", "workers")))
    places = range(len(names))
    figure, (left, *others) = plt.subplots(1, 3, figsize=(13, 1.5 + 0.5 * len(names)))
    begin = np.zeros(len(names))
    for stage in STAGES:
        widths = np.array([max(0.0, split.get(name, {}).get(stage, 0.0)) for name in names])
        left.barh(places, widths, left=begin, label=stage)
        begin += widths
    left.set_xlabel("ms of an image on one core")
    left.legend(fontsize="x-small", loc="lower right")
    for axis, (title, mine) in zip(others, rates, strict=True):
        nothing = {"median": 0.0, "low": 0.0, "high": 0.0}
        found = [mine.get(name, nothing) for name in names]
        middle = [x["median"] for x in found]
        error = [[x["median"] - x["low"] for x in found], [x["high"] - x["median"] for x in found]]
        colours = ["tab:orange" if "fastdino" in name else "tab:grey" for name in names]
        axis.barh(places, middle, color=colours, xerr=error)
        axis.set_title(title)
        axis.set_xlabel("images/s (median, quartiles)")
    for axis in (left, *others):
        axis.set_yticks(places, names if axis is left else [])
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


PARTS = ("core", "split", "workers", "entries", "gpu", "train")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DEVICE/data")
    parser.add_argument(
        "--images",
        type=Path,
        help="folder of folders of JPEGs; where it is empty they are made in it (benchmarks/photos.py, which "
        "needs scikit-learn and scikit-image), as they are in a temporary one by default",
    )
    parser.add_argument("--count", type=int, default=512, help="images to make (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images a batch (default %(default)s)")
    parser.add_argument("--workers", type=int, help="default: 2 on a CPU; on a GPU what make_loader chooses")
    parser.add_argument("--parts", nargs="*", choices=PARTS, help="default: all, on a CPU without gpu, train")
    parser.add_argument("--seconds", type=float, default=120, help="of core and of split, at most")
    parser.add_argument("--rounds", type=int, default=15, help="of core, split and gpu, at most")
    parser.add_argument("--worker-rounds", type=int, default=5, help="of workers")
    parser.add_argument(
        "--each", type=int, default=4, help="batches of each worker that are timed in a round"
    )
    parser.add_argument("--entries", type=int, default=0, help="images in the list and the shards to open")
    parser.add_argument("--arch", default="vit_small", help="of train")
    parser.add_argument("--updates", type=int, default=100, help="of train")
    parser.add_argument(
        "--quick", action="store_true", help="16 images, batches of 4, 2 rounds: to try it out"
    )
    args = parser.parse_args()
    if args.quick:
        args.count, args.batch, args.rounds, args.worker_rounds, args.each = 16, 4, 2, 1, 1
        args.updates = 4
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    parts = args.parts or (PARTS if gpu else PARTS[:4])
    workers = args.workers or (data.choose_workers(args.batch) if gpu else 2)
    out = args.out or folder(device) / "data"
    about, conditions = machine(device), Conditions()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of workers that are started afresh and not forked
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        where = args.images or Path(scratch, "images")
        photos.make(where, args.count, SEED)
        source = data.open_source(str(where))
        ways, missing = ways_of(where, source, device)
        about |= {
            "images": photos.describe([source.path(i) for i in range(len(source))]),
            "batch": args.batch,
        }
        about |= check(ways, source, device, min(16, len(source)))
        about |= {"left_out": missing} if missing else {}
        print("\n".join(f"{key}: {value}" for key, value in about.items()), flush=True)

        def done(found: list[Row]) -> None:
            rows.extend(found)
            write("Loading DINO's crops", rows, about | conditions.describe(), table(rows), out)
            print(table(found), flush=True)

        on_cpu, _ = ways_of(where, source, torch.device("cpu"))  # nothing is pinned
        if "core" in parts:
            done(bench_core(on_cpu, args.batch, args.seconds, args.rounds))
        if "split" in parts:
            done(bench_split(on_cpu, source, args.batch, args.seconds, args.rounds))
        if "workers" in parts:
            done(bench_workers(ways, args.batch, workers, args.each, args.worker_rounds, device))
        if "entries" in parts and args.entries:
            done(bench_entries(args.entries))
        if "gpu" in parts:
            done(bench_gpu(source, args.batch, args.rounds, device))
        if "train" in parts:
            torch.set_num_threads(threads)
            files = [source.path(i) for i in range(len(source))]
            done(bench_train(ways, files, args.arch, args.batch, workers, args.updates, args.device))
    if find_spec("matplotlib"):
        plot(rows, out / "plot.png")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
