"""Pictures and videos of where the network looks (paper, figures 1 and 3): `fastdino-eval attention`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from fastdino.cli import say, track
from fastdino.config import CropPolicy
from fastdino.data import crops
from fastdino.distributed import choose_device
from fastdino.eval.common import check_folder
from fastdino.eval.maps import MASS, NamedImage, keep_mass, load_vit, look, maps_of, open_images
from fastdino.eval.video import Pixels, import_av, open_film, tile, write_film
from fastdino.files import write_atomically

HEADS = 6  # shown in a picture unless more are asked for: ViT-S has no more
CELL, GAP, TEXT = 200, 8, 22  # of a picture, in pixels: width of a panel, gap between panels, letters
# The heads' colours in turn, and the mean's.
COLOURS = ((255, 75, 75), (60, 150, 255), (80, 215, 100), (255, 195, 40), (200, 105, 255), (30, 220, 220))
MEAN_COLOUR = (255, 130, 20)


# Maps and masks are enlarged without smoothing: the squares are the patches.


def _enlarge(grid: NDArray[Any], image: Pixels) -> NDArray[Any]:
    """A value per patch (h, w) for each pixel of the image, whose sides are multiples of h and w."""
    return grid.repeat(image.shape[0] // grid.shape[0], 0).repeat(image.shape[1] // grid.shape[1], 1)


def _heat(attention: NDArray[Any], image: Pixels, over: bool) -> Pixels:
    """A map (h, w) in colours, its strongest patch the brightest; with `over`, on the gray image."""
    from matplotlib import colormaps

    strength = _enlarge(attention / (attention.max() or 1), image)
    colours = colormaps["inferno"](strength, bytes=True)[..., :3]
    if not over:
        return colours
    gray = image.mean(axis=2, keepdims=True)
    # square root, so that weak attention shows too
    alpha = 0.3 + 0.6 * np.sqrt(strength[..., None])
    return ((1 - alpha) * gray + alpha * colours).astype(np.uint8)


def _mark(owner: NDArray[Any], image: Pixels, colours: Sequence[tuple[int, int, int]]) -> Pixels:
    """Regions of patches as colours that the image shines through, with outlines; the rest of it is darker.

    owner: (h, w), the region of each patch: 0 for none, i for that of the i-th colour.
    """
    large = _enlarge(owner.astype(np.uint8), image)
    thickness = round(min(min(image.shape[:2]) / 200, image.shape[0] / owner.shape[0] / 5))
    width = 2 * max(1, thickness) + 1
    around = [
        np.asarray(Image.fromarray(large).filter(f(width)))
        for f in (ImageFilter.MinFilter, ImageFilter.MaxFilter)
    ]
    line = (large > 0) & ((around[0] != large) | (around[1] != large))
    colour = np.array([(0, 0, 0), *colours])[large]
    alpha = np.where(line, 1.0, np.where(large > 0, 0.55, 0.45))[..., None]
    return ((1 - alpha) * image + alpha * colour).astype(np.uint8)


def panels(
    image: Image.Image, maps: Tensor, heads: int, share: float = 0.0, over: bool = False
) -> list[list[Pixels]]:
    """Image | mean of the heads | the first `heads` of them; with `share`, below it their masks: of all heads
    together, a patch having the colour of the head that looks at it most | of the mean | of each.

    Returns rows of panels, all of the image's size.

    image: as the network saw it, or enlarged by a whole number. maps: (heads, h, w). share: see `keep_mass`.
    over: draw the maps on the image.
    """
    pixels = np.asarray(image)
    mean = maps.mean(dim=0, keepdim=True)
    shown = torch.cat([mean, maps[:heads]]).numpy()
    rows = [[pixels, *(_heat(attention, pixels, over) for attention in shown)]]
    if share:
        colours = [COLOURS[i % len(COLOURS)] for i in range(len(maps))]
        kept = keep_mass(maps, share)
        strongest = ((maps * kept).argmax(dim=0) + 1) * kept.any(dim=0)
        row = [_mark(strongest.numpy(), pixels, colours)]
        row.append(_mark(keep_mass(mean[0], share).numpy(), pixels, [MEAN_COLOUR]))
        row += [
            _mark(mask.numpy(), pixels, [colour]) for mask, colour in zip(kept[:heads], colours, strict=False)
        ]
        rows.append(row)
    return rows


def _titles(panels: int) -> list[str]:
    return ["image", "mean", *(f"head {i + 1}" for i in range(panels - 2))]


def _zoomed(image: Image.Image, width: int) -> Image.Image:
    """The image enlarged by a whole number, which keeps its patches even, to at least `width` pixels."""
    times = -(-width // image.width)
    return image.resize((image.width * times, image.height * times), Image.Resampling.BICUBIC)


def sheet(
    blocks: list[list[list[Pixels]]], titles: list[str], labels: list[str], cell: int = CELL
) -> Image.Image:
    """Panels on white: blocks of rows, a title over each column, and beside each row of a block its label.

    A panel is `cell` pixels wide, or where it is higher than 1.5 times that, as wide as fits.
    """
    from matplotlib import get_data_path

    def font(size: int) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)

    tall = cell * 3 // 2
    heights = [[_within(row[0], cell, tall)[1] for row in rows] for rows in blocks]
    left, small = TEXT + GAP if labels else GAP, TEXT * 3 // 4
    columns = max(len(row) for rows in blocks for row in rows)
    top = TEXT + 2 * GAP
    height = top + sum(sum(row + GAP for row in rows) + GAP for rows in heights)
    canvas = Image.new("RGB", (left + columns * (cell + GAP), height), "white")
    draw = ImageDraw.Draw(canvas)
    for i, title in enumerate(titles):
        draw.text((left + i * (cell + GAP) + cell // 2, GAP), title, "black", font(TEXT), "ma")
    for rows, row_heights in zip(blocks, heights, strict=True):
        for j, (row, high) in enumerate(zip(rows, row_heights, strict=True)):
            if labels and font(small).getlength(labels[j]) <= high:  # beside a panorama is no room
                words = Image.new("RGB", (high, TEXT), "white")
                ImageDraw.Draw(words).text((high // 2, 0), labels[j], "black", font(small), "ma")
                canvas.paste(words.rotate(90, expand=True), (GAP // 2, top))
            for i, panel in enumerate(row):
                size = _within(panel, cell, tall)
                x = left + i * (cell + GAP) + (cell - size[0]) // 2
                canvas.paste(Image.fromarray(panel).resize(size, Image.Resampling.BOX), (x, top))
            top += high + GAP
        top += GAP
    return canvas


def _within(panel: Pixels, width: int, height: int) -> tuple[int, int]:
    scale = min(width / panel.shape[1], height / panel.shape[0])
    return max(1, round(panel.shape[1] * scale)), max(1, round(panel.shape[0] * scale))


def _save(image: Image.Image, path: Path) -> Path:
    write_atomically(path, lambda tmp: image.save(tmp, format="PNG"))
    return path


def plot_attention(
    network: Any,
    images: list[Image.Image],
    policy: CropPolicy,
    path: Path,
    device: str | torch.device = "cpu",
) -> Path:
    """Draw image | mean of the heads | each head (at most six) for each image, two a row, to the PNG `path`.

    Images are shown at twice the training size, as the paper shows 480 pixels for a network trained at 224.
    """
    side = 2 * policy.global_crops_size // network.patch_size * network.patch_size
    rows = []
    for image in images:
        seen = crops.eval_image(image, side)
        maps = maps_of(network, seen, policy, device)
        rows += panels(_zoomed(seen, CELL), maps, HEADS)
    # Two images share a row, so that the figure is about as wide as high.
    pairs = [[[*rows[i], *(rows[i + 1] if i + 1 < len(rows) else [])]] for i in range(0, len(rows), 2)]
    titles = _titles(len(rows[0])) * min(len(rows), 2)
    return _save(sheet(pairs, titles, [], cell=CELL // 2), path)


@dataclass(frozen=True, kw_only=True)
class AttentionCommand:
    """Pictures or a video of where the class token looks in the last block (paper, figures 1 and 3)."""

    weights: Annotated[str, tyro.conf.Positional]
    """teacher.safetensors, the folder of the run that wrote it, or a ViT of official DINO, DINOv2 or timm."""
    images: tuple[str, ...] = ()
    """Images, folders of them, or text files with a path a line, of any sizes."""
    video: str = ""
    """Instead of --images: a video, or a folder of frames in the order of their names."""
    out: str = ""
    """File to write. Default: attention.png, for a video attention.mp4."""
    separate: str = ""
    """Folder to write each image, map and mask to as a file of its own, all heads, at the network's size."""
    image_size: int = 0
    """The image's shorter side in pixels, cut to whole patches; the longer one follows, nothing is distorted.
    Default: twice the size of the crops that the run was trained on, 480 for weights of others."""
    heads: int | None = None
    """Heads to show besides their mean. Default: up to six in a picture, none in a video."""
    threshold: float | None = None
    """Show masks of the patches that hold this share of the attention. Default: 0.6 in a picture; in a video,
    or with 0, no masks."""
    over: bool = False
    """Draw the maps over the image."""
    rows: int = 8
    """Images in the picture at most, evenly spread over those given; --separate writes them all."""
    fps: float = 0.0
    """Frames a second of the video. Default: those of the given file, 30 for a folder."""
    device: str = "auto"
    """auto (a CUDA GPU if there is one), cpu, cuda, ..."""

    def run(self) -> None:
        """Write the picture or the video."""
        out = Path(self.out or ("attention.mp4" if self.video else "attention.png"))
        self._check(out)
        device = choose_device(self.device)
        if self.video:
            import_av()  # refused before the weights are read
        images = open_images(self.images)
        film = open_film(self.video, self.fps) if self.video else None
        network, policy, side = load_vit(self.weights, device)
        side = self.image_size or side

        def see(image: Image.Image) -> tuple[Image.Image, Tensor]:
            return look(network, image, side, policy, device)

        if film:
            frames = (self._frame(*see(frame)) for frame in track(film.frames, "attention", film.length))
            n = write_film(frames, film.rate, out)
            say(f"{out}: {n} frames, {float(film.rate):g} a second")
        else:
            say(self._draw(images, see, out))

    def _check(self, out: Path) -> None:
        if bool(self.images) == bool(self.video):
            raise ValueError("give either --images PATH... or --video PATH")
        if out.suffix.lower() != (".mp4" if self.video else ".png"):
            raise ValueError(f"--out {out}: give a name that ends in {'.mp4' if self.video else '.png'}")
        check_folder("out", str(out))
        if self.video and self.separate:
            raise ValueError("--separate is for --images: a video is written to --out alone")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold {self.threshold}: give a share of the attention, 0 to 1")
        if self.heads is not None and self.heads < 0:
            raise ValueError(f"--heads {self.heads}: give 0 or more")
        if self.fps < 0 or self.rows < 1 or self.image_size < 0:
            raise ValueError("--fps and --image-size are above 0, and --rows is 1 or more")

    def _frame(self, image: Image.Image, maps: Tensor) -> Pixels:
        rows = panels(image, maps, self.heads or 0, self.threshold or 0.0, self.over)
        return tile([row[1:] if self.over else row for row in rows])

    def _draw(
        self,
        images: list[NamedImage],
        see: Callable[[Image.Image], tuple[Image.Image, Tensor]],
        out: Path,
    ) -> str:
        """Make the picture and the separate files; returns what was written, for people."""
        share = MASS if self.threshold is None else self.threshold
        heads = HEADS if self.heads is None else self.heads
        blocks: list[list[list[Pixels]]] = []
        digits = len(str(len(images) - 1))
        shown = {round(x) for x in np.linspace(0, len(images) - 1, min(self.rows, len(images)))}
        for i in track(range(len(images)) if self.separate else sorted(shown), "attention"):
            image = images[i]
            seen, maps = see(image.load())
            if i in shown:
                blocks.append(panels(_zoomed(seen, 2 * CELL), maps, heads, share, self.over))
            if self.separate:
                # numbered: images of several folders may have one name
                folder = Path(self.separate) / f"{i:0{digits}d}-{Path(image.name).stem}"
                _save_panels(panels(seen, maps, len(maps), share, self.over), folder)
        labels = ["attention", f"masks, {100 * share:g} %"] if share else []
        _save(sheet(blocks, _titles(len(blocks[0][0])), labels), out)
        said = str(out)
        if len(blocks) < len(images):
            said += f": {len(blocks)} of {len(images)} images, evenly spread (--rows)"
        return said + (f"; each by itself in {self.separate}" if self.separate else "")


def _save_panels(rows: list[list[Pixels]], folder: Path) -> None:
    """Write the panels of an image, all heads, to files of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["mean", *(f"head-{i + 1}" for i in range(len(rows[0]) - 2))]
    files = [["image", *names], ["masks", *(f"{name}-mask" for name in names)]]
    for row, row_names in zip(rows, files, strict=False):
        for panel, name in zip(row, row_names, strict=True):
            _save(Image.fromarray(panel), folder / f"{name}.png")
