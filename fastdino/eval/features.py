"""Features of every image of a source, and `fastdino-eval features`, which writes them to a file.

What all commands share is here too: weights, device, loading, ranks, the table and the JSON (`Evaluation`).
"""

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastdino import checkpoint, data, distributed
from fastdino.config import CropPolicy
from fastdino.data import crops, open_source
from fastdino.data.images import Unreadable, printable
from fastdino.data.sources import Source
from fastdino.dino import DINO
from fastdino.files import write_atomically
from fastdino.vit import VisionTransformer
from fastdino.weights import load_backbone

HEADER_BYTES = 95_000_000  # of a safetensors file for names; its readers take 100 MB at most

Network = Callable[[Tensor], Tensor]
View = Callable[[Image.Image, int], Image.Image]


class _EvalImages(Dataset):
    def __init__(self, source: Source, indices: Sequence[int], size: int, view: View) -> None:
        self.source, self.indices, self.size, self.view = source, indices, size, view

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Tensor, bool]:
        """The view as uint8 (3, size, size), and whether the file could be read."""
        try:
            image = self.source.load(self.indices[i])
        except Unreadable:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), False
        return crops.to_tensor(self.view(image, self.size)), True


@torch.no_grad()
def extract(
    network: Network,
    source: Source,
    policy: CropPolicy,
    *,
    indices: Sequence[int] | None = None,
    view: View = crops.eval_image,
    device: str | torch.device = "cpu",
    workers: int = 0,
    batch_size: int = 128,
    progress: Callable[[int], None] = lambda images: None,
    unreadable: list[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Features of the readable images among `indices` (default: all), at the global crops' size.

    Args:
        network: normalised float32 images (B, 3, S, S) to features (B, D); put a module in eval mode first.
        view: what is made of an image for a size S.
        progress: called after each batch with the number of images done.
        unreadable: gets the paths of the files that could not be read.

    Returns:
        features: (n, D) float32 on the CPU, one array that is filled; (0, 0) where there was no batch.
        kept: (n,) int64, the index of each; shorter than `indices` where files were unreadable.
    """
    chosen = range(len(source)) if indices is None else indices
    loader: DataLoader[Any] = DataLoader(
        _EvalImages(source, chosen, policy.global_crops_size, view),
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=torch.device(device).type == "cuda",
    )
    features = torch.empty(0, 0)
    readable: list[Tensor] = []
    done = 0
    for images, ok in loader:
        x = network(crops.normalize(images.to(device, non_blocking=True), policy)).flatten(1)
        if not readable:
            features = torch.empty(len(chosen), x.shape[1])
        readable.append(ok)
        n = int(ok.sum())
        features[done : done + n] = x if n == len(ok) else x[ok.to(x.device)]
        done += n
        progress(len(ok))
    every = torch.from_numpy(np.asarray(chosen, dtype=np.int64))
    keep = torch.cat(readable) if readable else torch.empty(0, dtype=torch.bool)
    if unreadable is not None:
        unreadable += [source.path(i) for i in every[~keep].tolist()]
    return features[:done], every[keep]


def share(n: int) -> range:
    """This rank's part of 0 to n - 1, one after the other over the ranks."""
    rank, ranks = distributed.rank(), distributed.ranks()
    return range(n * rank // ranks, n * (rank + 1) // ranks)


def collect(part: Tensor, everywhere: bool = True) -> Tensor:
    """The rows of all ranks, (n, ...) on the CPU, in the order of ranks: on all of them, or on the first.

    Other ranks then have their own. Nothing is pickled, so no more memory is used than the result takes.
    """
    if distributed.ranks() == 1:
        return part
    shapes = distributed.gather(tuple(part.shape))
    counts = [shape[0] for shape in shapes]
    # a rank without images does not know how wide features are
    rest = next((shape[1:] for shape in shapes if shape[0]), shapes[0][1:])
    rank, group = distributed.rank(), distributed.cpu_group()
    if not everywhere and rank > 0:
        if len(part):
            dist.send(part.contiguous(), 0, group=group)
        return part
    whole = part.new_empty(sum(counts), *rest)
    for source, rows in enumerate(whole.split(counts)):
        if source == rank:
            rows.copy_(part.view_as(rows))
        if len(rows) and everywhere:
            dist.broadcast(rows, source, group=group)
        elif len(rows) and source:
            dist.recv(rows, source, group=group)
    return whole


def extract_shared(
    network: Network,
    source: Source,
    policy: CropPolicy,
    *,
    indices: Sequence[int] | None = None,
    everywhere: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`extract` by all ranks, each its part; what one process would give, on all of them or on the first."""
    chosen = range(len(source)) if indices is None else indices
    mine = share(len(chosen))
    with distributed.together():
        part = extract(network, source, policy, indices=chosen[mine.start : mine.stop], **options)
    return collect(part[0], everywhere), collect(part[1], everywhere)


def labels_of(source: Source, kept: Tensor, classes: list[str]) -> Tensor:
    """Of the images `kept` of a labelled source, the place of each one's class in `classes`: (n,) int64."""
    assert source.labels is not None
    places = {name: i for i, name in enumerate(classes)}
    names = np.array([places[name] for name in source.classes])
    return torch.from_numpy(names[source.labels[kept.numpy()]])


def check_classes(train: Source, val: Source | None, what: str = "k-NN") -> None:
    """Raise ValueError where images of `val` cannot be classified by `train`, or `train` by itself."""
    for source in (train, val) if val is not None else (train,):
        if source.labels is None:
            raise ValueError(
                f"{source.root} has no labels: {what} needs a sub-folder per class, two at least, or a text "
                "file of path TAB class"
            )
        if missing := sorted(set(source.classes) - set(train.classes)):
            raise ValueError(
                f"{source.root} has classes that {train.root} does not have: {', '.join(missing[:10])}"
            )


def check_readable(n: int, source: Source) -> None:
    """Raise ValueError on the first rank, for all, if of the images of a source n = 0 could be read."""
    with distributed.together():
        if n == 0 and distributed.rank() == 0:
            raise ValueError(f"{source.root}: none of its {len(source)} images can be read")


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on a GPU if it takes less than half of what is free there, else as it is: parts are copied then."""
    if device.type != "cuda":
        return x
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return x.to(device) if x.numel() * x.element_size() < free / 2 else x


def untrained(weights: str) -> nn.Module:
    """The teacher's backbone that the run of `weights` began with: of its seed, or of its --init-from.

    Raises:
        ValueError: weights that are not of a run.
        FileNotFoundError: the weights that it began with are no longer there.
    """
    if not checkpoint.is_ours(weights):
        raise ValueError("--baselines needs the weights of a run, which say how the network was initialised")
    config = checkpoint.read_teacher(weights)[1]
    torch.manual_seed(config.run.seed)
    network = DINO(config)
    if config.model.init_from:
        network.load_weights(config.model.init_from)
    return network.teacher.backbone.eval()  # type: ignore[operator]


def raw_pixels(images: Tensor) -> Tensor:
    """The baseline that has learnt nothing: pixels (B, 3, S, S) as features, at most 32 x 32 of them."""
    if images.shape[-1] > 32:
        images = nn.functional.interpolate(images, size=(32, 32), mode="area")
    return images


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the commands that look at many images take, and its checks."""

    weights: Annotated[str, tyro.conf.Positional]
    """teacher.safetensors, the folder of the run that wrote it, or weights of official DINO, DINOv2, timm."""
    arch: str = ""
    """The network, as --arch of fastdino-train, for weights of others that are neither a ViT nor a ResNet."""
    image_size: int = 0
    """Side in pixels of what the network sees of an image. Default: that of the run's global crops, 224 for
    weights of others."""
    batch_size: int = 128
    """Images in a forward pass of a process."""
    workers: int = -1
    """Processes that read images; 0 reads in this one, -1 chooses by the machine's cores."""
    device: str = "auto"
    """auto (a CUDA GPU if there is one), cpu, cuda, ..."""
    json: str = ""
    """File to write the figures to."""

    def _check(self) -> None:
        """Raise ValueError on flags that make no sense."""
        if self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size}: give 1 or more")
        if self.workers < -1:
            raise ValueError(f"--workers {self.workers}: give 0 or more, or -1 to choose by the machine")
        if not 0 <= self.image_size <= 4096:
            raise ValueError(f"--image-size {self.image_size}: give 1 to 4096 pixels")
        check_folder("json", self.json)

    def _load(self, device: torch.device) -> tuple[nn.Module, CropPolicy]:
        """The backbone, and how its images are made; raises ValueError if it takes no RGB images."""
        policy = CropPolicy()
        if checkpoint.is_ours(self.weights):
            policy = checkpoint.read_teacher(self.weights)[1].data.crops
        if self.image_size:
            policy = replace(policy, global_crops_size=self.image_size, local_crops_number=0)
        with warnings.catch_warnings():
            if distributed.rank() > 0:  # the first says what was left out of the file
                warnings.simplefilter("ignore")
            network = load_backbone(self.weights, device, self.arch)
        first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
        if first is not None and first.in_channels != 3:
            raise ValueError(
                f"{self.weights}: a network for images of {first.in_channels} channels, and images are read "
                "as RGB; give weights of a network for 3"
            )
        return network, policy

    def _options(self, device: torch.device) -> dict[str, Any]:
        """How `extract` is to go about it."""
        workers = self.workers
        if workers < 0:
            workers = data.choose_workers(self.batch_size, distributed.place().local_ranks)
        return {"device": device, "workers": workers, "batch_size": self.batch_size}

    def _say(self, *lines: str) -> None:
        """Print lines, on the first rank."""
        console = _console()
        for line in lines:
            console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def _say_unreadable(self, mine: list[str]) -> None:
        """Name the files that could not be read, of all ranks."""
        paths = list(dict.fromkeys(path for its in distributed.gather(mine) for path in its))
        if paths:
            more = ", ..." if len(paths) > 5 else ""
            self._say(f"left out, they cannot be read: {len(paths)} images: {', '.join(paths[:5])}{more}")

    def _table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table, on the first rank."""
        table = Table()
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        _console().print(table)

    def _write(self, figures: Mapping[str, Any]) -> None:
        """Write the JSON if asked, on the first rank."""
        with distributed.together():
            if self.json and distributed.rank() == 0:
                text = json.dumps(figures, indent=2)
                write_atomically(Path(self.json), lambda beside: beside.write_text(text + "\n"))


def check_folder(flag: str, path: str) -> None:
    """Raise ValueError if a file that --flag names cannot be written, for want of its folder."""
    if path and not Path(path).parent.is_dir():
        raise ValueError(f"--{flag} {path}: there is no folder {Path(path).parent}; make it first")


def _console() -> Console:
    return Console(quiet=distributed.rank() > 0)


@contextmanager
def bar(what: str, total: int, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """A progress bar in a terminal, on the first rank; call what it gives with how many more are done."""
    console = _console()
    # Without a thread of its own, which would be copied into workers.
    with Progress(
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), unit, TimeRemainingColumn()),
        console=console,
        transient=True,
        auto_refresh=False,
        disable=not console.is_terminal or distributed.rank() > 0,
    ) as progress:
        task, drawn = progress.add_task(what, total=total), 0.0

        def advance(n: int) -> None:
            nonlocal drawn
            progress.advance(task, n)
            if time.monotonic() - drawn > 0.1:  # drawing takes a millisecond, which some steps do not
                progress.refresh()
                drawn = time.monotonic()

        yield advance


def class_and_patches(network: VisionTransformer, images: Tensor) -> Tensor:
    """The normed class token and the mean of the normed patch tokens, (B, 2 D)."""
    features, (patches,) = network(images, return_patches=True)
    return torch.cat((features, patches.mean(dim=1)), dim=1)


@dataclass(frozen=True, kw_only=True)
class Features(Evaluation):
    """Write features of images to a file: a ViT's normed class token, or pooled features."""

    data: str
    """A folder of images, a text file with a path a line, or tar shards."""
    out: str
    """File to write. NAME.safetensors: `features` (n, D) float32 and, where there are classes, `labels` (n,);
    in its metadata `names` and `classes` as JSON. NAME.npy: the features; names, classes and labels in
    NAME.json. Names are relative to --data, and rows are in their order; unreadable images have none."""
    patches: bool = False
    """Also the mean of a ViT's patch tokens, as `patches`, or in NAME.patches.npy."""

    def _check(self) -> None:
        super()._check()
        if Path(self.out).suffix not in (".safetensors", ".npy"):
            raise ValueError(f"--out {self.out}: give a name that ends in .safetensors or .npy")
        check_folder("out", self.out)
        if self.json and Path(self.json).resolve() in [path.resolve() for path in self._files()]:
            raise ValueError(f"--json {self.json}: --out writes a file of that name; give another")

    def _files(self) -> list[Path]:
        out = Path(self.out)
        more = [out.with_suffix(".json")] if out.suffix == ".npy" else []
        return [out, *([out.with_suffix(".patches.npy")] if self.patches and more else []), *more]

    def run(self) -> None:
        """Write the features; print the table, and write the JSON if asked."""
        with distributed.joined(self.device) as device:
            with distributed.together():
                self._check()
                source = open_source(self.data)
                self._check_names(source)
                network, policy = self._load(device)
                if self.patches and not isinstance(network, VisionTransformer):
                    raise ValueError(f"--patches: a {type(network).__name__} has no patch tokens")
            unreadable: list[str] = []
            with bar("features", len(share(len(source)))) as advance:
                features, kept = extract_shared(
                    partial(class_and_patches, network) if self.patches else network,  # type: ignore[arg-type]
                    source,
                    policy,
                    everywhere=False,
                    progress=advance,
                    unreadable=unreadable,
                    **self._options(device),
                )
            check_readable(len(kept), source)  # the first rank's, which are all of them
            tensors = self._tensors(source, features, kept)
            with distributed.together():
                if distributed.rank() == 0:
                    self._save(source, kept, tensors, policy)
            self._say(f"{len(kept)} images of {self.data}, {policy.global_crops_size} pixels, in {self.out}")
            rows = [(name, " x ".join(map(str, x.shape))) for name, x in tensors.items()]
            self._table(("", "shape"), rows)
            self._say_unreadable(unreadable)
            width = tensors["features"].shape[1]
            self._write({"images": len(kept), "width": width, "image_size": policy.global_crops_size})

    def _check_names(self, source: Source) -> None:
        if Path(self.out).suffix != ".safetensors":
            return
        # JSON in JSON: quotes and what is not ASCII are escaped twice
        room = sum(len(json.dumps(json.dumps(source.name(i)))) for i in range(len(source)))
        if room > HEADER_BYTES:
            raise ValueError(
                f"--out {self.out}: the names of {len(source)} images take {room / 1e6:.0f} MB, more than "
                "the header of a safetensors file holds; give a name that ends in .npy"
            )

    def _tensors(self, source: Source, features: Tensor, kept: Tensor) -> dict[str, Tensor]:
        parts = features.chunk(2, dim=1) if self.patches else (features,)
        tensors = dict(zip(("features", "patches"), parts, strict=False))
        if source.labels is not None:
            tensors["labels"] = torch.from_numpy(source.labels[kept.numpy()])
        return tensors

    def _save(self, source: Source, kept: Tensor, tensors: dict[str, Tensor], policy: CropPolicy) -> None:
        names = [source.name(i) for i in kept.tolist()]
        about = {"weights": self.weights, "data": self.data, "image_size": policy.global_crops_size}
        out, *others = self._files()
        if out.suffix == ".safetensors":
            whole = {name: x.contiguous() for name, x in tensors.items()}
            texts = {"format": "pt", "names": json.dumps(names), "classes": json.dumps(source.classes)}
            texts |= {key: printable(str(value)) for key, value in about.items()}
            write_atomically(out, lambda beside: save_file(whole, beside, metadata=texts))
            return
        write_atomically(out, partial(_save_npy, tensors["features"]))
        if self.patches:
            write_atomically(others[0], partial(_save_npy, tensors["patches"]))
        labels = tensors["labels"].tolist() if "labels" in tensors else None
        text = json.dumps({"names": names, "classes": source.classes, "labels": labels} | about)
        write_atomically(others[-1], lambda beside: beside.write_text(text + "\n"))


def _save_npy(x: Tensor, beside: Path) -> None:
    with beside.open("wb") as file:  # np.save would append .npy to a name
        np.save(file, x.numpy())
