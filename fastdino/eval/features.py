"""`fastdino-eval features`: features of every image of a source, written to a file."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastdino import distributed
from fastdino.cli import progress, say
from fastdino.config import CropPolicy
from fastdino.data.sources import Source
from fastdino.eval.common import (
    FeatureEvaluation,
    check_folder,
    check_readable,
    extract_shared,
    print_table,
    rank_slice,
    say_unreadable,
    write_json,
)
from fastdino.files import printable, write_atomically, write_text
from fastdino.vit import VisionTransformer

HEADER_BYTES = 95_000_000  # of a safetensors file for names; its readers take 100 MB at most


def class_and_patches(network: VisionTransformer, images: Tensor) -> Tensor:
    """The normed class token and the mean of the normed patch tokens, (B, 2 D)."""
    features, (patches,) = network(images, return_patches=True)
    return torch.cat((features, patches.mean(dim=1)), dim=1)


@dataclass(frozen=True, kw_only=True)
class FeaturesCommand(FeatureEvaluation):
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
        with distributed.process_group(self.device) as device:
            with distributed.raise_on_all_ranks():
                self._check()
                source = self._open(self.data)
                self._check_names(source)
                network, policy = self._load(device)
                if self.patches and not isinstance(network, VisionTransformer):
                    raise ValueError(f"--patches: a {type(network).__name__} has no patch tokens")
            unreadable: list[str] = []
            with progress("features", len(rank_slice(len(source)))) as advance:
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
            with distributed.raise_on_all_ranks():
                if distributed.rank() == 0:
                    self._save(source, kept, tensors, policy)
            say(f"{len(kept)} images of {self.data}, {policy.global_crops_size} pixels, in {self.out}")
            rows = [(name, " x ".join(map(str, x.shape))) for name, x in tensors.items()]
            print_table(("", "shape"), rows)
            say_unreadable(unreadable)
            width, size = tensors["features"].shape[1], policy.global_crops_size
            write_json(self.json, {"images": len(kept), "width": width, "image_size": size})

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
            write_atomically(out, lambda tmp: save_file(whole, tmp, metadata=texts))
            return
        write_atomically(out, partial(_save_npy, tensors["features"]))
        if self.patches:
            write_atomically(others[0], partial(_save_npy, tensors["patches"]))
        labels = tensors["labels"].tolist() if "labels" in tensors else None
        text = json.dumps({"names": names, "classes": source.classes, "labels": labels} | about)
        write_text(others[-1], text + "\n")


def _save_npy(x: Tensor, path: Path) -> None:
    with path.open("wb") as file:  # np.save would append .npy to a name
        np.save(file, x.numpy())
