"""What the evaluations share: features of every image of a source, over ranks, flags, tables and JSON."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import tyro
from PIL import Image
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastdino import checkpoint, cli, data, distributed
from fastdino.config import CropPolicy
from fastdino.data import crops
from fastdino.data.images import Unreadable
from fastdino.data.sources import Source
from fastdino.dino import DINO
from fastdino.files import write_text
from fastdino.weights import load_backbone

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
        view: makes an image of size S x S of an image.
        progress: called after each batch with the number of images done.
        unreadable: gets the paths of the files that could not be read.

    Returns:
        features: (n, D) float32 on the CPU; (0, 0) without a batch.
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


def rank_slice(n: int) -> range:
    """This rank's part of 0 to n - 1, which the ranks divide in their order."""
    rank, ranks = distributed.rank(), distributed.world_size()
    return range(n * rank // ranks, n * (rank + 1) // ranks)


def collect(part: Tensor, everywhere: bool = True) -> Tensor:
    """The rows of all ranks, (n, ...) on the CPU, in the order of ranks.

    Without `everywhere` only rank 0 gets them, and other ranks get `part` back. Nothing is pickled, so this
    takes no more memory than the result.
    """
    if distributed.world_size() == 1:
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
    """`extract` by all ranks, each a part: the result of one process, on all of them or only on rank 0."""
    chosen = range(len(source)) if indices is None else indices
    part = rank_slice(len(chosen))
    with distributed.raise_on_all_ranks():
        x, kept = extract(network, source, policy, indices=chosen[part.start : part.stop], **options)
    return collect(x, everywhere), collect(kept, everywhere)


def labels_of(source: Source, kept: Tensor, classes: list[str]) -> Tensor:
    """For the images `kept` (n,) of a labelled source, the index of the class in `classes`: (n,) int64."""
    assert source.labels is not None
    index = {name: i for i, name in enumerate(classes)}
    labels = np.array([index[name] for name in source.classes])
    return torch.from_numpy(labels[source.labels[kept.numpy()]])


def check_labels(source: Source, what: str) -> None:
    """Raise ValueError where `what` cannot be measured because the source has no labels."""
    if source.labels is None:
        raise ValueError(
            f"{source.root} has no labels: {what} needs a sub-folder per class, two at least, or a text "
            "file of path TAB class"
        )


def check_classes(train: Source, val: Source | None, what: str = "k-NN") -> None:
    """Raise ValueError where images of `val` cannot be classified by `train`, or `train` by itself."""
    for source in (train, val) if val is not None else (train,):
        check_labels(source, what)
        if missing := sorted(set(source.classes) - set(train.classes)):
            raise ValueError(
                f"{source.root} has classes that {train.root} does not have: {', '.join(missing[:10])}"
            )


def check_readable(n: int, source: Source) -> None:
    """Raise ValueError, on rank 0 for all, if no image of a source could be read: n is 0."""
    with distributed.raise_on_all_ranks():
        if n == 0 and distributed.rank() == 0:
            raise ValueError(f"{source.root}: none of its {len(source)} images can be read")


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """`x` on a GPU if it fits in half of the free memory there; else as it is, to be copied in parts."""
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
    config = checkpoint.read_teacher_config(weights)
    torch.manual_seed(config.run.seed)
    network = DINO(config)
    if config.model.init_from:
        network.load_weights(config.model.init_from)
    return network.teacher.backbone.eval()  # type: ignore[operator]


def raw_pixels(images: Tensor) -> Tensor:
    """The baseline without learning: pixels (B, 3, S, S) as features, averaged to at most 32 x 32."""
    if images.shape[-1] > 32:
        images = nn.functional.interpolate(images, size=(32, 32), mode="area")
    return images


def trained_policy(weights: str) -> CropPolicy | None:
    """The crops that the run of `weights` was trained on; None for weights of others."""
    return checkpoint.read_teacher_config(weights).data.crops if checkpoint.is_ours(weights) else None


# What the commands print and write.


def check_folder(flag: str, path: str) -> None:
    """Raise ValueError if the file that --flag names cannot be written, because there is no such folder."""
    if path and not Path(path).parent.is_dir():
        raise ValueError(f"--{flag} {path}: there is no folder {Path(path).parent}; make it first")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, on rank 0."""
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    cli.console().print(table)


def write_json(path: str, figures: Mapping[str, Any]) -> None:
    """Write figures to the file that --json names, if any, on rank 0."""
    with distributed.raise_on_all_ranks():
        if path and distributed.rank() == 0:
            write_text(Path(path), json.dumps(figures, indent=2) + "\n")


def say_unreadable(paths: list[str]) -> None:
    """Name the files that could not be read, of all ranks."""
    unreadable = list(dict.fromkeys(path for part in distributed.gather(paths) for path in part))
    if unreadable:
        more = ", ..." if len(unreadable) > 5 else ""
        cli.say(f"left out, they cannot be read: {len(unreadable)} images: {', '.join(unreadable[:5])}{more}")


# Flags.


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The flags of every command that measures something."""

    weights: Annotated[str, tyro.conf.Positional]
    """teacher.safetensors, the folder of the run that wrote it, or weights of official DINO, DINOv2, timm."""
    device: str = "auto"
    """auto (a CUDA GPU if there is one), cpu, cuda, ..."""
    json: str = ""
    """File to write the figures to."""

    def _check(self) -> None:
        """Raise ValueError on flags that make no sense."""
        check_folder("json", self.json)


@dataclass(frozen=True, kw_only=True)
class FeatureEvaluation(Evaluation):
    """The flags of the commands that compute features of many images, over ranks."""

    arch: str = ""
    """The network, as --arch of fastdino-train, for weights of others that are neither a ViT nor a ResNet."""
    image_size: int = 0
    """Side in pixels of what the network sees of an image. Default: that of the run's global crops, 224 for
    weights of others."""
    batch_size: int = 128
    """Images in a forward pass of a process."""
    workers: int = -1
    """Processes that read images; 0 reads in this one, -1 chooses by the machine's cores."""
    include: tuple[str, ...] = ()
    """Patterns as 'photos/*': of each folder, list or set of shards only images are taken whose path below it
    fits one."""
    exclude: tuple[str, ...] = ()
    """Patterns as 'masks/*' '*_depth.png': images whose path fits one are left out."""

    def _check(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size}: give 1 or more")
        if self.workers < -1:
            raise ValueError(f"--workers {self.workers}: give 0 or more, or -1 to choose by the machine")
        if not 0 <= self.image_size <= 4096:
            raise ValueError(f"--image-size {self.image_size}: give 1 to 4096 pixels")
        super()._check()

    def _open(self, path: str) -> Source:
        """The images of a path, after a sentence on what is left out of them."""
        source = data.open_source(path, include=self.include, exclude=self.exclude)
        cli.say(*source.notes)
        return source

    def _load(self, device: torch.device) -> tuple[nn.Module, CropPolicy]:
        """The backbone, and how images are prepared for it; raises ValueError if it takes no RGB images."""
        policy = trained_policy(self.weights) or CropPolicy()
        if self.image_size:
            policy = replace(policy, global_crops_size=self.image_size, local_crops_number=0)
        with warnings.catch_warnings():
            if distributed.rank() > 0:  # rank 0 says what was left out of the file
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
        """Arguments of `extract`."""
        workers = self.workers
        if workers < 0:
            workers = data.choose_workers(self.batch_size, distributed.launch().local_ranks)
        return {"device": device, "workers": workers, "batch_size": self.batch_size}
