"""How well attention segments: Jaccard similarity of its masks and the objects' masks (paper, figure 4)."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastdino.cli import say, track
from fastdino.config import CropPolicy
from fastdino.data.images import reason_of
from fastdino.distributed import choose_device
from fastdino.eval.common import Evaluation, print_table, untrained, write_json
from fastdino.eval.maps import MASS, NamedImage, fit_to_patches, keep_mass, load_vit, look, open_images
from fastdino.vit import VisionTransformer


def jaccard(masks: Tensor, truth: Tensor, counted: Tensor | None = None) -> Tensor:
    """Intersection over union of each mask (n, H, W) and the object (H, W), all bool, over the pixels that
    are `counted` (H, W): (n,) float64, NaN where both are empty."""
    if counted is not None:
        masks, truth = masks & counted, truth & counted
    return (masks & truth).sum((-2, -1)).double() / (masks | truth).sum((-2, -1))


def read_mask(path: Path, class_value: int | None = None, ignore: int | None = None) -> tuple[Tensor, Tensor]:
    """The object and the pixels that count, both bool (H, W), of a PNG of gray levels or palette indices.

    The object is where the value is `class_value`, or where it is not 0; `ignore` is never of the object, and
    does not count. Raises ValueError on a file that cannot be read or has colours.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            values = np.asarray(image)
            mode = image.mode
    except Exception as error:  # decoders raise anything on broken files
        raise ValueError(f"{path}: {reason_of(error)}; give masks as PNG") from None
    if values.ndim == 3:
        gray = values[..., : 3 if mode.startswith("RGB") else 1]
        if (gray != gray[..., :1]).any():
            raise ValueError(f"{path}: a mask of colours; give one of gray levels or with a palette")
        values = gray[..., 0]
    of = torch.from_numpy(values.astype(np.int64))
    counted = of != ignore if ignore is not None else torch.ones_like(of, dtype=torch.bool)
    return (of != 0 if class_value is None else of == class_value) & counted, counted


def _patch_of(pixels: int, resized: int, start: int, stop: int, patch: int) -> tuple[slice, Tensor]:
    """Along one side of a mask of `pixels`, of an image that was resized and cut from start to stop:
    the pixels whose middle was in the cut, and the patch that each of them is in, int64."""
    # In units of half a pixel of the mask times one of the resized image, all are whole numbers.
    middle = (2 * torch.arange(pixels) + 1) * resized
    inside = ((middle >= 2 * pixels * start) & (middle < 2 * pixels * stop)).nonzero()[:, 0]
    where = (middle[inside] - 2 * pixels * start) // (2 * pixels * patch)
    return slice(int(inside[0]), int(inside[-1]) + 1), where


class Segmented(NamedTuple):
    """What the masks of attention are worth."""

    jaccard: NDArray[np.float64]
    """(images, heads), of the images that show an object."""
    left_out: list[str]
    """Names of those that show none: any mask of attention, as none is empty, is as wrong there."""


def evaluate_segmentation(
    network: VisionTransformer,
    pairs: Iterable[tuple[NamedImage, Path]],
    policy: CropPolicy,
    *,
    side: int,
    share: float = MASS,
    class_value: int | None = None,
    ignore: int | None = None,
    device: str | torch.device = "cpu",
) -> Segmented:
    """Jaccard similarity of each head's mask, see `keep_mass`, and the object's, at the latter's resolution.

    The network sees the image as `maps.look` shows it; pixels beyond its patches do not count. A mask of
    the object may be larger or smaller than the image, in its proportions.

    Raises ValueError on a file that cannot be read, proportions that differ, or no object in any image.
    """
    rows, left_out = [], []
    for image, path in pairs:
        truth, counted = read_mask(path, class_value, ignore)
        picture = image.load()
        (width, height), (h, w) = picture.size, truth.shape
        if abs(w * height - h * width) > width + height:  # beyond what rounding each side makes
            raise ValueError(
                f"{path}: a mask of {w} x {h} pixels for an image of {width} x {height} ({image.name}); give "
                "it the proportions of the image, upright as its EXIF says"
            )
        size, box = fit_to_patches(picture.size, side, network.patch_size)
        ys, row = _patch_of(h, size[1], box[1], box[3], network.patch_size)
        xs, column = _patch_of(w, size[0], box[0], box[2], network.patch_size)
        truth, counted = truth[ys, xs], counted[ys, xs]
        if not truth.any():
            left_out.append(image.name)
            continue
        masks = keep_mass(look(network, picture, side, policy, device)[1], share)
        rows.append(jaccard(masks[:, row][:, :, column], truth, counted).numpy())
    if not rows:
        what = "is not 0" if class_value is None else f"is {class_value}"
        raise ValueError(f"no mask has a pixel whose value {what}: there is no object to compare with")
    return Segmented(np.stack(rows), left_out)


def pair(images: str, masks: str) -> list[tuple[NamedImage, Path]]:
    """Each image with its mask: MASKS/NAME.png for IMAGES/NAME.jpg, sub-folders included; for the paths of a
    text file also MASKS/STEM.png. Raises ValueError naming images without one."""
    found, missing = [], []
    for image in open_images((images,)):
        name = Path(image.name)
        places = [Path(masks) / name.with_suffix(".png")]
        if not Path(images).is_dir():
            places.append(Path(masks) / f"{name.stem}.png")
        path = next((place for place in places if place.is_file()), None)
        if path:
            found.append((image, path))
        else:
            missing.append(image.name)
    if missing:
        n = len(found) + len(missing)
        raise ValueError(
            f"--masks {masks}: no mask for {len(missing)} of {n} images: {_some(missing)}. An image NAME.jpg "
            "wants the mask NAME.png, in the same sub-folder; name images that have one in a text file"
        )
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


@dataclass(frozen=True, kw_only=True)
class SegmentationCommand(Evaluation):
    """Jaccard similarity of attention's masks and the objects' (paper, figure 4: 45.9 on VOC12, ViT-S/16)."""

    weights: Annotated[str, tyro.conf.Positional]
    """teacher.safetensors, the folder of the run that wrote it, or a ViT of official DINO, DINOv2 or timm."""
    images: str
    """A folder of images, or a text file with a path a line."""
    masks: str
    """Folder of the objects' masks, a PNG of the same name and sub-folder for each image; not 0 is object."""
    class_value: int | None = None
    """The value that is the object, where other values are other objects."""
    ignore: int | None = None
    """A value whose pixels do not count: 255 for the borders in PASCAL VOC."""
    threshold: float = MASS
    """The share of the attention that a mask keeps."""
    image_size: int = 0
    """The image's shorter side in pixels, cut to whole patches. Default: twice the size of the crops that the
    run was trained on, 480 for weights of others."""
    baselines: bool = False
    """Also the same network with the weights that the run began with."""

    def _check(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"--threshold {self.threshold}: give a share of the attention above 0, up to 1")
        if self.image_size < 0:
            raise ValueError(f"--image-size {self.image_size}: give a number of pixels")
        if not Path(self.masks).is_dir():
            raise FileNotFoundError(f"--masks {self.masks}: no such folder; give that of the objects' masks")
        super()._check()

    def run(self) -> None:
        """Print the table, and write the JSON if asked."""
        self._check()
        device = choose_device(self.device)
        pairs = pair(self.images, self.masks)
        network, policy, side = load_vit(self.weights, device)
        side = self.image_size or side
        networks = {"teacher": network}
        if self.baselines:
            before: Any = untrained(self.weights).to(device)
            networks["untrained"] = before
        results = {
            name: evaluate_segmentation(
                net,
                track(pairs, name),
                policy,
                side=side,
                share=self.threshold,
                class_value=self.class_value,
                ignore=self.ignore,
                device=device,
            )
            for name, net in networks.items()
        }
        self._report(results, side // network.patch_size * network.patch_size)

    def _report(self, results: dict[str, Segmented], side: int) -> None:
        n, heads = results["teacher"].jaccard.shape
        left_out = results["teacher"].left_out
        say(
            f"Jaccard similarity in %: attention's masks ({100 * self.threshold:g} % of it) and the objects' "
            f"of {n} images of {self.images}, shorter side {side}"
        )
        by_head = {name: 100 * result.jaccard.mean(axis=0) for name, result in results.items()}
        best = {name: 100 * result.jaccard.max(axis=1).mean() for name, result in results.items()}
        rows = [(f"head {i + 1}", *(f"{values[i]:.1f}" for values in by_head.values())) for i in range(heads)]
        rows.append(("best head of each image", *(f"{value:.1f}" for value in best.values())))
        print_table(("mask", *results), rows)
        if left_out:
            say(f"left out, no object in their masks: {len(left_out)} images: {_some(left_out)}")
        values = {name: {"best_head": best[name], "heads": by_head[name].tolist()} for name in results}
        settings = {"images": n, "left_out": left_out, "threshold": self.threshold, "image_size": side}
        write_json(self.json, values | settings)
