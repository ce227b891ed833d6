"""Linear classification of frozen features, as official DINO's eval_linear; many learning rates at once.

    logits = W x + b;   v <- 0.9 v + gradient;   W <- W - rate v

with cross-entropy, a rate that falls along a cosine from epoch to epoch, and no weight decay (DINO paper,
section 4.1 and appendix F). Which rate is best differs between networks. The heads of all of them are one
matrix product on the same features, which cost far more than the heads do.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from fastdino import distributed
from fastdino.cli import progress, say
from fastdino.config import CropPolicy, DataConfig
from fastdino.data import crops, epoch_order, identity_collate
from fastdino.data.images import Unreadable
from fastdino.data.sources import Source
from fastdino.eval.common import (
    FeatureEvaluation,
    Network,
    check_classes,
    check_readable,
    extract,
    extract_shared,
    labels_of,
    on_device,
    print_table,
    rank_slice,
    say_unreadable,
    write_json,
)
from fastdino.vit import VisionTransformer

RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # official DINO's default, 0.001, and around it
EPOCHS = 100
MOMENTUM = 0.9
REFERENCE_BATCH = 256  # rates are for an update by this number of images, and scaled with it
LOGIT_BYTES = 256 << 20  # of held-out images at a time

# An epoch's batches: features (b, D) and labels (b,), of this rank.
Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]


class Heads:
    """Linear classifiers of the same features, one for each learning rate, trained independently.

    All begin equal: weights N(0, 0.01), biases 0.

    Args:
        rates: of an update, already scaled with the batch.

    Attributes:
        weight: (H, C, D).
        bias: (H, C).
    """

    def __init__(
        self,
        rates: Sequence[float],
        classes: int,
        width: int,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(classes, width, generator=generator).mul_(0.01).to(device, dtype)
        self.rates = torch.tensor(rates, device=device, dtype=dtype)
        self.weight = first.repeat(len(rates), 1, 1).requires_grad_()
        self.bias = first.new_zeros(len(rates), classes).requires_grad_()
        self._velocity = [torch.zeros_like(x) for x in (self.weight, self.bias)]

    def __call__(self, x: Tensor) -> Tensor:
        """Features (B, D) to logits (B, H, C)."""
        return F.linear(x, self.weight.flatten(0, 1), self.bias.flatten()).unflatten(1, self.bias.shape)

    def step(self, x: Tensor, labels: Tensor, factor: float = 1.0) -> None:
        """One update by the mean gradient of a batch (b, D) with labels (b,), at factor times the rates.

        Each of several ranks brings its part of the batch, which may be empty, and all do the same update.
        """
        with torch.enable_grad():
            logits = self(x)
            loss = F.cross_entropy(
                logits.flatten(0, 1), labels.repeat_interleave(len(self.rates)), reduction="sum"
            )
        gradients = torch.autograd.grad(loss, (self.weight, self.bias))
        # Sums and their count are reduced together: parts of a batch may differ in size.
        sums = torch.cat((*(g.flatten() for g in gradients), x.new_full((1,), len(x))))
        distributed.mean_over_ranks_(sums)
        sums /= sums[-1].clamp(min=1e-6)  # no image could be read
        means = sums[:-1].split([g.numel() for g in gradients])
        with torch.no_grad():
            for parameter, velocity, mean in zip(
                (self.weight, self.bias), self._velocity, means, strict=True
            ):
                velocity.mul_(MOMENTUM).add_(mean.view_as(velocity))
                rates = (self.rates * factor).view(-1, *[1] * (parameter.ndim - 1))
                parameter.addcmul_(velocity, rates, value=-1)

    @torch.no_grad()
    def correct(self, x: Tensor, labels: Tensor) -> Tensor:
        """How many images (n, D) have their label (n,) first, and among the first five: int64 (2, H).

        A head whose numbers are no longer finite has none right. `x` may be on another device.
        """
        heads, classes = self.bias.shape
        right = torch.zeros(2, heads, dtype=torch.int64, device=self.bias.device)
        rows = max(1, LOGIT_BYTES // (4 * heads * classes))
        for part, truth in zip(x.split(rows), labels.split(rows), strict=True):
            logits = self(part.to(self.bias.device, self.bias.dtype))
            first = logits.topk(min(5, classes), dim=-1).indices == truth.to(logits.device)[:, None, None]
            first &= logits.isfinite().all(dim=-1, keepdim=True)
            right += torch.stack((first[..., 0].sum(0), first.any(dim=-1).sum(0)))
        return right


def train_heads(
    heads: Heads,
    batches: Batches,
    epochs: int,
    held_out: Tensor,
    labels: Tensor,
    progress: Callable[[int], None] = lambda updates: None,
) -> Iterator[Tensor]:
    """Train, and after each epoch yield accuracy in per cent on the held-out images of all ranks: top-1 and
    top-5, float64 (2, H).

    Args:
        held_out, labels: features (m, D) and labels (m,) of this rank's part of them.
    """
    n = sum(distributed.gather(len(held_out)))
    for epoch in range(epochs):
        factor = (1 + math.cos(math.pi * epoch / epochs)) / 2
        for x, y in batches(epoch):
            heads.step(x, y, factor)
            progress(1)
        right = torch.stack(distributed.gather(heads.correct(held_out, labels).cpu())).sum(0)
        yield 100 * right.double() / n


def choose_layers(network: nn.Module, blocks: int, avgpool: bool | None) -> tuple[int, bool]:
    """The number of last blocks whose class tokens are used, and whether the mean of the patch tokens is.

    blocks 0 and avgpool None choose as official DINO does: four blocks up to ViT-S, one and the mean from
    ViT-B on. (0, False) for networks that are no ViT: their pooled features. Raises ValueError.
    """
    if not isinstance(network, VisionTransformer):
        if blocks or avgpool:
            raise ValueError(
                f"--n-last-blocks and --avgpool are for a ViT; a {type(network).__name__} gives its pooled "
                "features"
            )
        return 0, False
    depth, wide = len(network.blocks), network.embed_dim >= 768
    if blocks > depth:
        raise ValueError(f"--n-last-blocks {blocks}: this network has {depth} blocks")
    return blocks or (1 if wide else min(4, depth)), wide if avgpool is None else avgpool


def probe_features(network: Any, blocks: int, avgpool: bool) -> Network:
    """Images to what is classified: class tokens of the last blocks, normed, and the mean of the patch tokens
    if asked, (B, (blocks + avgpool) * D); what a network that is no ViT gives, (B, D)."""
    if blocks == 0 or (blocks, avgpool) == (1, False):
        return network

    def features(images: Tensor) -> Tensor:
        outputs = network.get_intermediate_layers(images, blocks)
        tokens = [x[:, 0] for x in outputs]
        if avgpool:
            tokens.append(outputs[-1][:, 1 + network.num_register_tokens :].mean(dim=1))
        return torch.cat(tokens, dim=1)

    return features


def train_view(image: Image.Image, policy: CropPolicy, seed: int, epoch: int, index: int) -> Image.Image:
    """torchvision's RandomResizedCrop, bilinear as there, and a flip of one in two; see `crops.draw`."""
    drawn = replace(
        policy,
        global_crops_scale=(0.08, 1.0),
        aspect_ratio=(3 / 4, 4 / 3),
        flip=0.5,
        local_crops_number=0,
    )
    view = crops.draw(drawn, seed, epoch, index, image.size)[0]
    top, left, height, width = view.box
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((view.size, view.size), Image.Resampling.BILINEAR)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else image


class _TrainViews(Dataset):
    def __init__(self, source: Source, policy: CropPolicy, seed: int) -> None:
        self.source, self.policy, self.seed = source, policy, seed

    def __getitems__(self, items: list[tuple[int, int]]) -> tuple[Tensor, Tensor, list[str]]:
        """Views of the readable ones of images (epoch, index), uint8 (b, 3, size, size); labels; paths of the
        others."""
        size = self.policy.global_crops_size
        views = torch.empty(len(items), 3, size, size, dtype=torch.uint8)
        indices: list[int] = []
        unreadable: list[str] = []
        for epoch, index in items:
            try:
                image = self.source.load(index)
            except Unreadable:
                unreadable.append(self.source.path(index))
                continue
            view = train_view(image, self.policy, self.seed, epoch, index)
            views[len(indices)] = crops.to_tensor(view)
            indices.append(index)
        kept = torch.tensor(indices, dtype=torch.int64)
        return views[: len(kept)], labels_of(self.source, kept, self.source.classes), unreadable


class _Order(Sampler[list[tuple[int, int]]]):
    """This rank's images (epoch, index) of each batch of all epochs; the last one of an epoch is smaller."""

    def __init__(self, source: Source, batch_size: int, seed: int, epochs: int) -> None:
        self.source, self.batch_size, self.seed, self.epochs = source, batch_size, seed, epochs

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.epochs):
            order = self.source.order(self.seed, epoch, DataConfig().shuffle_buffer)
            for batch in order.split(self.batch_size):
                yield [(epoch, i) for i in batch[distributed.rank() :: distributed.world_size()].tolist()]


def augmented(
    features: Network,
    source: Source,
    policy: CropPolicy,
    *,
    width: int,
    seed: int,
    epochs: int,
    batch_size: int,
    device: torch.device,
    workers: int,
    unreadable: list[str] | None = None,
) -> Batches:
    """Batches of features of `train_view`s, other ones in each epoch; epochs are to be asked for in order.

    width: of the features. batch_size: over all ranks. See `extract` for the rest.
    """
    loaded = iter(
        DataLoader(
            _TrainViews(source, policy, seed),
            batch_sampler=_Order(source, batch_size, seed, epochs),
            num_workers=workers,
            collate_fn=identity_collate,
            pin_memory=device.type == "cuda",
        )
    )

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(-(-len(source) // batch_size)):
            images, labels, failed = next(loaded)
            if unreadable is not None:
                unreadable.extend(failed)
            x = torch.empty(0, width, device=device)
            if len(images):
                with torch.no_grad():
                    pixels = crops.normalize(images.to(device, non_blocking=True), policy)
                    x = features(pixels).flatten(1).float()
            yield x, labels.to(device)

    return batches


def cached(features: Tensor, labels: Tensor, *, seed: int, batch_size: int, device: torch.device) -> Batches:
    """Batches of features (n, D) that are there already, in another order each epoch.

    batch_size: over all ranks, all of which have all features; on `device` or on the CPU.
    """
    labels = labels.to(features.device)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = epoch_order(len(features), seed, epoch).to(features.device)
        for batch in order.split(batch_size):
            rows = batch[distributed.rank() :: distributed.world_size()]
            yield features[rows].to(device), labels[rows].to(device)

    return batches


@dataclass(frozen=True, kw_only=True)
class LinearCommand(FeatureEvaluation):
    """Accuracy of linear classifiers on frozen features, as official DINO's eval_linear."""

    data: str
    """Labelled images to train on: a folder with a sub-folder per class, or a text file of path TAB label."""
    val: str
    """Labelled images to classify. Learning rate and epoch are chosen on them, as official DINO does."""
    lr: tuple[float, ...] = RATES
    """Learning rates for batches of 256, scaled with --batch-size; each trains a classifier of its own."""
    epochs: int = EPOCHS
    """Passes over --data."""
    batch_size: int = 128
    """Images in an update, over all processes."""
    cached: bool = False
    """Compute features of the plain images once and train on them: takes seconds, a little less accurate.
    Default: new random crops and flips in each epoch, as official DINO."""
    n_last_blocks: int = 0
    """ViT only: concatenate the class tokens of the last N blocks. Default, as official DINO: 4, and 1 from
    ViT-B on."""
    avgpool: bool | None = None
    """ViT only: concatenate the mean of the patch tokens. Default, as official DINO: from ViT-B on."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and their crops."""

    def _check(self) -> None:
        super()._check()
        if not self.lr or min(self.lr) <= 0 or not all(map(math.isfinite, self.lr)):
            raise ValueError(f"--lr {' '.join(map(str, self.lr))}: give learning rates above 0")
        if self.epochs < 1:
            raise ValueError(f"--epochs {self.epochs}: give 1 or more")
        if self.n_last_blocks < 0:
            raise ValueError(f"--n-last-blocks {self.n_last_blocks}: give 1 or more")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed}: give 0 or more")

    def run(self) -> None:
        """Print the table, and write the JSON if asked."""
        with distributed.process_group(self.device) as device:
            with distributed.raise_on_all_ranks():
                self._check()
                train, val = self._open(self.data), self._open(self.val)
                check_classes(train, val, "linear evaluation")
                network, policy = self._load(device)
                blocks, avgpool = choose_layers(network, self.n_last_blocks, self.avgpool)
            features, options = probe_features(network, blocks, avgpool), self._options(device)
            unreadable: list[str] = []
            failed: list[str] = []  # of --val
            part = rank_slice(len(val))
            with progress("held-out features", len(part)) as advance, distributed.raise_on_all_ranks():
                x, kept = extract(
                    features,
                    val,
                    policy,
                    indices=part,
                    progress=advance,
                    unreadable=failed,
                    **options,
                )
            tested, width = sum(distributed.gather(len(kept))), max(distributed.gather(x.shape[1]))
            check_readable(tested, val)
            held_out = on_device(x.reshape(-1, width), device), labels_of(val, kept, train.classes)
            lrs = tuple(dict.fromkeys(self.lr))
            rates = [lr * self.batch_size / REFERENCE_BATCH for lr in lrs]
            heads = Heads(rates, len(train.classes), width, seed=self.seed, device=device)
            batches = self._batches(features, train, policy, width, unreadable, options)
            with progress("linear", self.epochs * -(-len(train) // self.batch_size), "updates") as advance:
                found = torch.stack([*train_heads(heads, batches, self.epochs, *held_out, advance)])
            trained = len(train) - len({path for paths in distributed.gather(unreadable) for path in paths})
            check_readable(trained, train)
            what = "pooled features"
            if blocks:
                what = "class tokens of the last " + (f"{blocks} blocks" if blocks > 1 else "block")
                what += " and the mean of the patch tokens" if avgpool else ""
            how = "plain images, computed once" if self.cached else "random crops and flips"
            say(
                f"linear accuracy in %: {tested} images of {self.val}, {len(train.classes)} classes; trained "
                f"on {trained} images of {self.data}",
                f"{what} ({width} numbers) of {how}; {self.epochs} epochs, batches of {self.batch_size}",
            )
            about = {"n_last_blocks": blocks, "avgpool": avgpool, "width": width, "cached": self.cached}
            self._report(found, lrs, len(train.classes) >= 5, about | {"epochs": self.epochs})
            say_unreadable([*unreadable, *failed])

    def _batches(
        self,
        features: Network,
        train: Source,
        policy: CropPolicy,
        width: int,
        unreadable: list[str],
        options: dict[str, Any],
    ) -> Batches:
        """What the classifiers are trained on, of new crops each epoch or, with --cached, of plain images."""
        if not self.cached:
            return augmented(
                features,
                train,
                policy,
                width=width,
                seed=self.seed,
                epochs=self.epochs,
                unreadable=unreadable,
                **options,
            )
        with progress("features", len(rank_slice(len(train)))) as advance:
            x, kept = extract_shared(
                features, train, policy, progress=advance, unreadable=unreadable, **options
            )
        check_readable(len(kept), train)
        x, labels = on_device(x, options["device"]), labels_of(train, kept, train.classes)
        return cached(x, labels, seed=self.seed, batch_size=self.batch_size, device=options["device"])

    def _report(self, found: Tensor, lrs: tuple[float, ...], five: bool, about: dict[str, Any]) -> None:
        """Table and JSON of accuracy in per cent, (epochs, 2, H); five: there are classes for a top-5."""
        figures: dict[float, dict[str, float]] = {}
        for lr, (top1, top5) in zip(lrs, found.permute(2, 1, 0), strict=True):
            epoch = int(top1.argmax())  # the first of the best
            figures[lr] = {"top1": top1[-1].item()} | ({"top5": top5[-1].item()} if five else {})
            figures[lr] |= {"best_top1": top1[epoch].item(), "best_epoch": epoch + 1}
        chosen = max(lrs, key=lambda lr: figures[lr]["best_top1"])
        columns = ("lr", "top-1", *(("top-5",) if five else ()), "best top-1", "in epoch")
        rows = [
            (f"{lr:g}", *(f"{x:.0f}" if key == "best_epoch" else f"{x:.1f}" for key, x in values.items()))
            for lr, values in figures.items()
        ]
        print_table(columns, rows)
        best = figures[chosen]
        say(
            f"best: {best['best_top1']:.1f} % with --lr {chosen:g} after epoch {best['best_epoch']}. Both "
            "are chosen by the images of --val, as official DINO does: others will score a little lower"
        )
        for end, more in ((min(lrs), "smaller"), (max(lrs), "larger")):
            if chosen == end and len(lrs) > 1:
                say(f"it is the last of those tried at its end: try {more} --lr, too")
        by_lr = {str(lr): values for lr, values in figures.items()}
        write_json(self.json, {**about, "lr": by_lr, "best": {"lr": chosen, **best}})
