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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.harness import Results, Row, interleave, parser, ratio, spread, synchronize, table
from fastdino import data
from fastdino.config import CropPolicy
from fastdino.data import crops

SEED = 0
CPU = torch.device("cpu")


# Images.


def photographs() -> dict[str, Any]:
    """Eight photographs by name, uint8 (h, w, 3); ImportError where a package is missing."""
    from skimage import data as found
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    left, right, _ = found.stereo_motorcycle()
    named = {"astronaut": found.astronaut(), "chelsea": found.chelsea(), "coffee": found.coffee()}
    named |= {"motorcycle_left": left, "motorcycle_right": right, "rocket": found.rocket()}
    return named | {"china": china, "flower": flower}


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

    open: Callable[[int, int, int], Iterable[Any]]
    ours: bool = False
    dali: bool = False

    def views(self, sent: Any) -> list[Tensor]:
        """Of a batch as sent."""
        return sent.views if self.ours else sent[0]


def blurred(image: Image.Image, radius: tuple[float, float]) -> Image.Image:
    """By Pillow, with a radius drawn anew."""
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*radius)))


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
        blurring = (
            t.GaussianBlur(9, p.blur_radius) if v2 else t.Lambda(partial(blurred, radius=p.blur_radius))
        )
        last = t.ToDtype(torch.float32, scale=True) if v2 else t.ToTensor()
        steps = [crop, t.RandomHorizontalFlip(p.flip), jitter, t.RandomGrayscale(p.grayscale)]
        steps += [t.RandomApply([blurring], p=blur), t.RandomSolarize(128, sun)]
        return t.Compose([*steps, last, t.Normalize(p.mean, p.std)])


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
    source: Any, policy: CropPolicy, kind: str, device: torch.device, batch: int, workers: int, count: int
) -> Iterable[Any]:
    """Our batches; the one place that knows how make_loader is called."""
    steps: Any = {"seed": SEED, "start_step": 0, "total_steps": count}
    options: Any = {"batch_size": batch, "pieces": 1, "workers": workers, "device": device, "loader": kind}
    return data.make_loader(source, policy, **steps, **options)


def ways_of(where: Path, source: Any, device: torch.device, policy: CropPolicy) -> dict[str, Way]:
    """The ways that run here, by name."""
    from torchvision.datasets import ImageFolder

    official = ImageFolder(str(where), transform=AllViews(policy, v2=False))
    v2 = ImageFolder(str(where), transform=AllViews(policy, v2=True), loader=decode_tensor)
    others: Row = {"official DINO": (official, official), "torchvision v2": (v2, v2)}
    if find_spec("lightly"):
        from lightly.data import LightlyDataset
        from lightly.transforms import DINOTransform

        lightly = LightlyDataset(str(where), DINOTransform(n_local_views=policy.local_crops_number))
        others["lightly"] = lightly, lightly.dataset
    found = {}
    for name, (dataset, images) in others.items():
        if [path for path, _ in images.samples] != [source.path(i) for i in range(len(source))]:
            raise SystemExit(f"{name} numbers the images otherwise than fastdino: nothing was timed")

        def open_(batch: int, workers: int, count: int, dataset: Any = dataset) -> DataLoader[Any]:
            order, pinned = batches_of(len(dataset), batch, count), device.type == "cuda"
            return DataLoader(dataset, batch_sampler=order, num_workers=workers, pin_memory=pinned)

        found[name] = Way(open_)
    found["fastdino"] = Way(partial(our_loader, source, policy, "torchvision", device), ours=True)
    if find_spec("nvidia") and find_spec("nvidia.dali"):
        dali = partial(our_loader, source, policy, "dali", device)
        found["fastdino, DALI"] = Way(dali, ours=True, dali=True)
    return found


def finish(views: list[Tensor], device: torch.device, policy: CropPolicy) -> list[Tensor]:
    """The network's input: on the device, in float32, normalised."""
    moved = [view.to(device, non_blocking=True) for view in views]
    return [view if view.is_floating_point() else crops.normalize(view, policy) for view in moved]


def check(ways: dict[str, Way], source: Any, device: torch.device, images: int, policy: CropPolicy) -> Row:
    """Raises SystemExit where a way's crops are not what they should be; else how far off they are."""
    (indices,) = batches_of(len(source), images, 1)
    (batch,) = our_loader(source, policy, "torchvision", CPU, images, 0, 1)
    if batch.indices.tolist() != indices or batch.unreadable:
        raise SystemExit("fastdino loaded other images than asked for: nothing was timed")
    for place, index in enumerate(indices):
        image = source.load(index)
        for v, view in enumerate(crops.draw(policy, SEED, 0, index, image.size)):
            if not torch.equal(batch.views[v][place], crops.to_tensor(crops.render(image, view))):
                raise SystemExit(f"view {v} of image {index} is not Pillow's: nothing was timed")
    right, away = finish(batch.views, CPU, policy), {}
    for name, way in ways.items():
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(SEED)
        (sent,) = way.open(images, 0, 1)
        views = [view.cpu() for view in finish(way.views(sent), device, policy)]
        wrong = [view.shape for view in views] != [view.shape for view in right]
        if way.ours and not wrong:
            pairs = zip(way.views(sent), batch.views, strict=True)
            levels = torch.cat([(a.cpu().float() - b).abs().flatten() for a, b in pairs]).mean().item()
            # nvJPEG rounds otherwise than libjpeg
            wrong = levels > (2 if way.dali and device.type == "cuda" else 0)
            away[name] = f"{levels:.3f} levels of 255 off"
        elif not wrong:
            flat, expected = (torch.cat([view.flatten() for view in v]) for v in (views, right))
            mean, deviation = (flat.mean() - expected.mean()).item(), (flat.std() / expected.std()).item()
            # in standard deviations of a pixel; each view has a light of its own, drawn within 0.6 to 1.4
            wrong = flat.dtype != torch.float32 or not abs(mean) < 0.3 or not 0.8 < deviation < 1.25
            away[name] = f"mean {mean:+.3f}, deviation x {deviation:.3f}"
        if wrong:
            shapes = [tuple(view.shape) for view in views]
            raise SystemExit(f"{name} is not right, {away.get(name, shapes)}: nothing was timed")
    return {"checked_images": images, "from_pillow": away}


# What is timed.


def steady(way: Way, batch: int, workers: int, each: int, device: torch.device) -> tuple[float, float]:
    """Seconds of an image once all workers have sent their first batch, and KB sent of an image.

    Workers send in turn, so whole turns are timed; two more follow, so that none is idle meanwhile.
    """
    policy, turn = CropPolicy(), max(1, workers)
    batches = iter(way.open(batch, workers, (each + 1) * turn + 2 * workers))

    def take(count: int) -> None:
        for _ in range(count):
            finish(way.views(next(batches)), device, policy)
        synchronize(device)

    sent = sum(view.nbytes for view in way.views(next(batches))) / batch / 1e3
    take(turn - 1)
    began = time.perf_counter()
    take(each * turn)
    return (time.perf_counter() - began) / (each * turn * batch), sent


def bench(part: str, ways: dict[str, Way], workers: int, limits: tuple[float, int], *how: Any) -> list[Row]:
    """Images/s, in rounds within limits of seconds and of rounds; `how` goes on to `steady`."""
    sent: dict[str, float] = {}

    def clock(name: str) -> float:
        batch, *rest = how
        found, sent[name] = steady(ways[name], batch, workers, *rest)
        gc.collect()  # its workers end
        return found

    times = interleave({name: partial(clock, name) for name in ways}, lambda call: call(), *limits, warm=0)
    rows: list[Row] = []
    for name, seconds in times.items():
        row: Row = {"part": part, "loader": name, "workers": workers}
        row |= {"images_per_s": spread([1 / s for s in seconds])}
        row |= {"times_official": ratio(times, "official DINO", name)}
        rows.append(row | {"KB_sent": sent[name] if workers else None})
    return rows


def text(rows: list[Row]) -> str:
    """A table for each part."""
    tables: dict[str, list[tuple[str, Row]]] = {}
    for r in rows:
        cells = {"images/s": r["images_per_s"], "times official": r["times_official"]}
        lines = tables.setdefault(f"{r['part']}, {r['workers']} workers", [])
        lines.append((r["loader"], cells | {"KB sent": r["KB_sent"]}))
    return "\n".join(table(title, "loader", lines) for title, lines in tables.items())


def main() -> None:
    """See the module's docstring."""
    arguments, parts = parser(__doc__, "loader"), ("core", "workers")
    add = arguments.add_argument
    add("--images", type=Path, help="folder of folders of JPEGs; where it is empty they are made in it")
    add("--count", type=int, default=512, help="images to make (default %(default)s)")
    add("--batch", type=int, default=64, help="images a batch (default %(default)s)")
    add("--workers", type=int, help="default: 2 on a CPU; on a GPU what make_loader chooses")
    add("--parts", nargs="*", choices=parts, default=parts, help="default: all")
    add("--seconds", type=float, default=120, help="of core, at most")
    add("--rounds", type=int, default=15, help="of core, at most")
    add("--worker-rounds", type=int, default=5, help="of workers")
    add("--each", type=int, default=4, help="batches of each worker that are timed in a round")
    add("--quick", action="store_true", help="16 images, batches of 4, 2 rounds: to try it out")
    args = arguments.parse_args()
    if args.quick:
        args.count, args.batch, args.rounds, args.worker_rounds, args.each = 16, 4, 2, 1, 1
    device, policy, batch = torch.device(args.device), CropPolicy(), args.batch
    workers = args.workers or (data.choose_workers(batch) if device.type == "cuda" else 2)
    results = Results("Loading DINO's crops", text, args)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of workers that are started afresh and not forked
    with tempfile.TemporaryDirectory() as scratch:
        where = args.images or Path(scratch, "images")
        make_photos(where, args.count, SEED)
        source = data.open_source(str(where))
        weight = statistics.mean(Path(source.path(i)).stat().st_size / 1e3 for i in range(len(source)))
        ways = ways_of(where, source, device, policy)
        results.about |= {"images": len(source), "mean_KB": round(weight, 1), "batch": batch}
        results.about |= check(ways, source, device, min(16, len(source)), policy)
        alone = {name: way for name, way in ways_of(where, source, CPU, policy).items() if not way.dali}
        if "core" in args.parts:
            results.add(bench("core", alone, 0, (args.seconds, args.rounds), batch, 1, CPU))
        if "workers" in args.parts:
            results.add(bench("workers", ways, workers, (1e9, args.worker_rounds), batch, args.each, device))
    print(f"written to {results.out}")


if __name__ == "__main__":
    main()
