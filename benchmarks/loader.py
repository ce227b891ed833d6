"""Times the loading of DINO's crops, here and as others write it: images/s.

    python -m benchmarks.loader [--images DIR] [--workers 2] [--quick] [--out DIR]

All loaders read the same JPEGs in the same order and draw crops of their own with official DINO's settings:
two global ones of 224 and eight local ones of 96 pixels, counted when they are float32 and normalised.

    official DINO     its data set and transform, on Pillow and torchvision.transforms
    torchvision v2    the same on uint8 tensors: decode_jpeg, then torchvision.transforms.v2, with the blur of
                      DINOv2 (a kernel of 9 pixels, which is less work than all that Pillow's reaches)
    lightly           its LightlyDataset and DINOTransform, with eight local crops, not its six
    fastdino          make_loader; workers send uint8, and this process normalises, which is counted
    fastdino, DALI    make_loader(loader="dali"), where nvidia.dali is installed; on a CPU, too

    core        no workers, one thread, a batch a round. Without DALI, which has threads of its own
    workers     batches come from worker processes; timed once each has sent its first

Nothing is timed unless fastdino's crops are bit for bit those that Pillow renders (on a GPU DALI's differ by
its decoder), and the others' have the shapes, the type and nearly the mean and deviation of these. The JPEGs
are random pieces of eight photographs that scikit-learn and scikit-image hold, of ImageNet's sizes and
weight, with the grain of a sensor; the same seed makes the same pixels.
"""

import gc
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.harness import (
    Clock,
    Results,
    Row,
    Timed,
    interleave,
    parser,
    ratio,
    spread,
    synchronize,
    table,
)
from fastdino import data
from fastdino.config import CropPolicy
from fastdino.data import crops

SEED = 0
PARTS = ("core", "workers")
CPU = torch.device("cpu")
PHOTOGRAPHS = {
    "skimage/data": "astronaut.png chelsea.png coffee.png motorcycle_left.png "
    "motorcycle_right.png rocket.jpg",
    "sklearn/datasets/images": "china.jpg flower.jpg",
}


# Images.


def photographs() -> dict[str, Any]:
    """The photographs by name, uint8 (h, w, 3); ImportError where a package is missing."""
    found = {}
    for folder, names in PHOTOGRAPHS.items():
        package, _, below = folder.partition("/")
        if not (spec := find_spec(package)) or spec.origin is None:
            raise ImportError(f"the photographs lie in {package}: pip install scikit-learn scikit-image")
        for name in names.split():
            path = Path(spec.origin).parent / below / name
            found[path.stem] = np.asarray(Image.open(path).convert("RGB"))
    return found


def piece(photo: Any, rng: np.random.Generator) -> Image.Image:
    """A random piece, mirrored at its edges where the photograph is smaller than it."""
    width, height = ((500, 400), (500, 375), (400, 500), (500, 333))[rng.choice(4, p=(0.5, 0.2, 0.2, 0.1))]
    image, scale = Image.fromarray(photo), rng.uniform(0.7, 1.0)  # larger would be smooth
    pixels = np.asarray(image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS))
    short = [max(0, side - had) for side, had in zip((height, width), pixels.shape, strict=False)]
    pixels = np.pad(pixels, [(s // 2, s - s // 2) for s in short] + [(0, 0)], "symmetric")
    top, left = (rng.integers(had - s + 1) for had, s in zip(pixels.shape, (height, width), strict=False))
    pixels = pixels[top : top + height, left : left + width]
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    grain = rng.uniform(3.0, 9.0) * rng.standard_normal((height, width, 1), dtype=np.float32)
    return Image.fromarray(np.clip(pixels + grain + 0.5, 0, 255).astype(np.uint8))


def make_photos(folder: Path, count: int = 512, seed: int = 0) -> None:
    """JPEGs in a new or empty folder, a subfolder for each photograph; a folder that holds files stays."""
    if folder.exists() and any(folder.iterdir()):
        return
    originals = photographs()
    for i, name in enumerate(itertools.islice(itertools.cycle(originals), count)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        image = piece(originals[name], np.random.default_rng([seed, i]))
        image.save(folder / name / f"{i:05d}.jpg", quality=95, subsampling="4:2:0")


# Loaders.


@dataclass
class Way:
    """A way to load: `open` takes images a batch, workers and batches, and yields batches as sent."""

    name: str
    open: Callable[[int, int, int], Iterable[Any]]
    views: Callable[[Any], list[Tensor]] = lambda sent: sent[0]
    dataset: Any = None  # of others: has loader, samples and transform, as torchvision's
    dali: bool = False


class Sometimes:
    """A Pillow image through `change` with probability p, as official DINO's blur and solarisation."""

    def __init__(self, change: Callable[[Image.Image], Image.Image], p: float) -> None:
        self.change, self.p = change, p

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.change(image) if random.random() < self.p else image


class AllViews:
    """Every view of an image, of official DINO's policy, by Pillow or by torchvision's v2."""

    def __init__(self, policy: CropPolicy, v2: bool) -> None:
        sizes = [policy.global_crops_size] * 2 + [policy.local_crops_size]
        scales = [policy.global_crops_scale] * 2 + [policy.local_crops_scale]
        each = zip(sizes, scales, policy.blur, policy.solarize, strict=True)
        first, second, local = (self.view(policy, v2, *one) for one in each)
        self.transforms = [first, second, *[local] * policy.local_crops_number]

    def __call__(self, image: Any) -> list[Tensor]:
        return [transform(image) for transform in self.transforms]

    @staticmethod
    def view(p: CropPolicy, v2: bool, size: int, scale: tuple[float, float], blur: float, sun: float) -> Any:
        """The transforms of one view."""
        from torchvision import transforms
        from torchvision.transforms import v2 as tensors

        t: Any = tensors if v2 else transforms
        crop = t.RandomResizedCrop(size, scale, interpolation=t.InterpolationMode.BICUBIC, antialias=True)
        jitter = t.RandomApply([t.ColorJitter(p.brightness, p.contrast, p.saturation, p.hue)], p=p.jitter)
        if v2:
            smooth: Any = t.RandomApply([t.GaussianBlur(9, p.blur_radius)], p=blur)
            light: Any = t.RandomSolarize(128, sun)
            last: Any = t.ToDtype(torch.float32, scale=True)
        else:
            radius = p.blur_radius
            smooth = Sometimes(lambda x: x.filter(ImageFilter.GaussianBlur(random.uniform(*radius))), blur)
            light, last = Sometimes(ImageOps.solarize, sun), t.ToTensor()
        steps = [crop, t.RandomHorizontalFlip(p.flip), jitter, t.RandomGrayscale(p.grayscale), smooth]
        return t.Compose([*steps, *([light] if sun else []), last, t.Normalize(p.mean, p.std)])


def decode_tensor(path: str) -> Tensor:
    """A JPEG as a uint8 tensor (3, H, W)."""
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    return decode_jpeg(read_file(path), mode=ImageReadMode.RGB)


def batches_of(n: int, batch: int, count: int) -> list[list[int]]:
    """The images of each batch: those of make_loader, so that all load the same at the same time."""
    epochs = (data.epoch_order(n, SEED, epoch).tolist() for epoch in itertools.count())
    whole = (order[i : i + batch] for order in epochs for i in range(0, n - batch + 1, batch))
    return list(itertools.islice(whole, count))


def our_loader(
    source: Any,
    policy: CropPolicy,
    kind: str,
    batch: int,
    workers: int,
    count: int,
    device: torch.device = CPU,
) -> Iterable[Any]:
    """Our batches; the one place that knows how make_loader is called."""
    steps: Any = {"seed": SEED, "start_step": 0, "total_steps": count}
    options: Any = {"batch_size": batch, "pieces": 1, "workers": workers, "device": device, "loader": kind}
    return data.make_loader(source, policy, **steps, **options)


def ways_of(
    where: Path, source: Any, device: torch.device, policy: CropPolicy
) -> tuple[list[Way], dict[str, str]]:
    """The ways that run here, and why the others do not."""
    found: list[Way] = []
    missing: dict[str, str] = {}

    def other(name: str, dataset: Any, images: Any) -> None:
        if [path for path, _ in images.samples] != [source.path(i) for i in range(len(source))]:
            raise SystemExit(f"{name} numbers the images otherwise than fastdino: nothing was timed")

        def open_(batch: int, workers: int, count: int) -> DataLoader[Any]:
            order, pinned = batches_of(len(dataset), batch, count), device.type == "cuda"
            return DataLoader(dataset, batch_sampler=order, num_workers=workers, pin_memory=pinned)

        found.append(Way(name, open_, dataset=images))

    def ours(name: str, kind: str) -> None:
        def open_(batch: int, workers: int, count: int) -> Iterable[Any]:
            return our_loader(source, policy, kind, batch, workers, count, device)

        found.append(Way(name, open_, lambda sent: sent.views, dali=kind == "dali"))

    from torchvision.datasets import ImageFolder

    official = ImageFolder(str(where), transform=AllViews(policy, v2=False))
    other("official DINO", official, official)
    v2 = ImageFolder(str(where), transform=AllViews(policy, v2=True), loader=decode_tensor)
    other("torchvision v2", v2, v2)
    try:
        from lightly.data import LightlyDataset
        from lightly.transforms import DINOTransform
    except ImportError as error:  # lightly itself, or a package that it needs
        missing["lightly"] = str(error)
    else:
        dataset = LightlyDataset(str(where), DINOTransform(n_local_views=policy.local_crops_number))
        other("lightly", dataset, dataset.dataset)
    ours("fastdino", "torchvision")
    if find_spec("nvidia") and find_spec("nvidia.dali"):
        ours("fastdino, DALI", "dali")
    else:
        missing["fastdino, DALI"] = "nvidia.dali is not installed"
    return found, missing


def finish(views: list[Tensor], device: torch.device, policy: CropPolicy) -> list[Tensor]:
    """The network's input: on the device, in float32, normalised."""
    moved = [view.to(device, non_blocking=True) for view in views]
    return [view if view.is_floating_point() else crops.normalize(view, policy) for view in moved]


def check(ways: list[Way], source: Any, device: torch.device, images: int, policy: CropPolicy) -> Row:
    """Raises SystemExit where a way's crops are not what they should be; else how far off they are."""
    (indices,) = batches_of(len(source), images, 1)
    (batch,) = our_loader(source, policy, "torchvision", images, 0, 1)
    if batch.indices.tolist() != indices or batch.unreadable:
        raise SystemExit("fastdino loaded other images than asked for: nothing was timed")
    for place, index in enumerate(indices):
        image = source.load(index)
        for v, view in enumerate(crops.draw(policy, SEED, 0, index, image.size)):
            if not torch.equal(batch.views[v][place], crops.to_tensor(crops.render(image, view))):
                raise SystemExit(f"view {v} of image {index} is not Pillow's: nothing was timed")
    right, away = finish(batch.views, CPU, policy), {}
    for way in ways:
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(SEED)
        (sent,) = way.open(images, 0, 1)
        views = [view.cpu() for view in finish(way.views(sent), device, policy)]
        if [view.shape for view in views] != [view.shape for view in right]:
            raise SystemExit(f"{way.name} gives views of {[*views[0].shape]}, ...: nothing was timed")
        if way.dataset is None:
            pairs = zip(way.views(sent), batch.views, strict=True)
            levels = torch.cat([(a.cpu().float() - b).abs().flatten() for a, b in pairs]).mean().item()
            # nvJPEG rounds otherwise than libjpeg
            wrong = levels > (2 if way.dali and device.type == "cuda" else 0)
            away[way.name] = f"{levels:.3f} levels of 255 off"
        else:
            flat, expected = (torch.cat([view.flatten() for view in v]) for v in (views, right))
            mean, deviation = (flat.mean() - expected.mean()).item(), (flat.std() / expected.std()).item()
            # in standard deviations of a pixel; each view has a light of its own, drawn within 0.6 to 1.4
            wrong = flat.dtype != torch.float32 or not abs(mean) < 0.3 or not 0.8 < deviation < 1.25
            away[way.name] = f"mean {mean:+.3f}, deviation x {deviation:.3f}"
        if wrong:
            raise SystemExit(f"{way.name} is not right, {away[way.name]}: nothing was timed")
    return {"checked_images": images, "from_pillow": away}


# What is timed.


def rows_of(part: str, seconds: dict[str, list[float]], workers: int, sent: dict[str, float]) -> list[Row]:
    """Images/s, from the seconds of an image in each round."""
    return [
        {"part": part, "loader": name, "workers": workers, "images_per_s": spread([1 / s for s in times])}
        | {"times_official": ratio(seconds, "official DINO", name), "KB_sent": sent.get(name)}
        for name, times in seconds.items()
    ]


def bench_core(ways: list[Way], batch: int, policy: CropPolicy, seconds: float, rounds: int) -> list[Row]:
    """Each way in this process, a batch a round."""
    timed: Timed = {}
    for way in ways:
        batches = iter(way.open(batch, 0, rounds + 1))

        def run(way: Way = way, batches: Iterator[Any] = batches) -> None:
            finish(way.views(next(batches)), CPU, policy)

        timed[way.name] = run
    times = interleave(timed, Clock(CPU), seconds, rounds)
    each = {name: [t / 1e3 / batch for t in ms] for name, ms in times.items()}
    return rows_of("core", each, 0, {})


def steady(
    way: Way, batch: int, workers: int, each: int, device: torch.device, policy: CropPolicy
) -> tuple[float, float]:
    """Seconds of an image once all workers have sent their first batch, and KB sent of an image.

    Workers send in turn, so whole turns are timed; two more follow, so that none is idle meanwhile.
    """
    batches = iter(way.open(batch, workers, (each + 3) * workers))

    def take(count: int) -> None:
        for _ in range(count):
            finish(way.views(next(batches)), device, policy)
        synchronize(device)

    sent = sum(view.nbytes for view in way.views(next(batches))) / batch / 1e3
    take(workers - 1)
    began = time.perf_counter()
    take(each * workers)
    return (time.perf_counter() - began) / (each * workers * batch), sent


# What is written.


def text(rows: list[Row]) -> str:
    """A table for each part."""
    out = []
    for part in dict.fromkeys(r["part"] for r in rows):
        mine = [r for r in rows if r["part"] == part]
        cells = [
            {"images/s": r["images_per_s"], "times official": r["times_official"], "KB sent": r["KB_sent"]}
            for r in mine
        ]
        out.append(table(f"{part}, {mine[0]['workers']} workers", mine, "loader", cells))
    return "\n".join(out)


def main() -> None:
    """See the module's docstring."""
    arguments = parser(__doc__, "loader")
    add = arguments.add_argument
    add("--images", type=Path, help="folder of folders of JPEGs; where it is empty they are made in it")
    add("--count", type=int, default=512, help="images to make (default %(default)s)")
    add("--batch", type=int, default=64, help="images a batch (default %(default)s)")
    add("--workers", type=int, help="default: 2 on a CPU; on a GPU what make_loader chooses")
    add("--parts", nargs="*", choices=PARTS, default=PARTS, help="default: all")
    add("--seconds", type=float, default=120, help="of core, at most")
    add("--rounds", type=int, default=15, help="of core, at most")
    add("--worker-rounds", type=int, default=5, help="of workers")
    add("--each", type=int, default=4, help="batches of each worker that are timed in a round")
    add("--quick", action="store_true", help="16 images, batches of 4, 2 rounds: to try it out")
    args = arguments.parse_args()
    if args.quick:
        args.count, args.batch, args.rounds, args.worker_rounds, args.each = 16, 4, 2, 1, 1
    device, policy = torch.device(args.device), CropPolicy()
    workers = args.workers or (data.choose_workers(args.batch) if device.type == "cuda" else 2)
    results = Results("Loading DINO's crops", text, args)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of workers that are started afresh and not forked
    with tempfile.TemporaryDirectory() as scratch:
        where = args.images or Path(scratch, "images")
        make_photos(where, args.count, SEED)
        source = data.open_source(str(where))
        weights = [Path(source.path(i)).stat().st_size / 1e3 for i in range(len(source))]
        ways, missing = ways_of(where, source, device, policy)
        results.about |= {
            "images": len(source),
            "mean_KB": round(statistics.mean(weights), 1),
            "batch": args.batch,
        }
        results.about |= {"left_out": missing} | check(ways, source, device, min(16, len(source)), policy)
        alone = [way for way in ways_of(where, source, CPU, policy)[0] if not way.dali]
        limits = (args.seconds, args.rounds)
        if "core" in args.parts:
            results.add(bench_core(alone, args.batch, policy, *limits))
        if "workers" in args.parts:
            seconds: dict[str, list[float]] = {way.name: [] for way in ways}
            sent: dict[str, float] = {}
            for _ in range(args.worker_rounds):
                for way in ways:
                    found, sent[way.name] = steady(way, args.batch, workers, args.each, device, policy)
                    seconds[way.name].append(found)
                    gc.collect()  # its workers end
            results.add(rows_of("workers", seconds, workers, sent))
    print(f"written to {results.out}")


if __name__ == "__main__":
    main()
