"""Where the network looks: attention of the class token over an image in the last block.

Its maps and masks (paper, figures 1, 3 and 4), a picture of them for several images, and a video of them.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fastdino import checkpoint
from fastdino.config import CropPolicy
from fastdino.data import Unreadable, crops, open_source
from fastdino.data.images import EXTENSIONS, read_image
from fastdino.distributed import choose_device
from fastdino.files import write_atomically
from fastdino.ops.packed_attention import choose, packing
from fastdino.vit import VisionTransformer
from fastdino.weights import load_backbone

Pixels = NDArray[np.uint8]  # (height, width, 3)

SIDE = 480  # pixels of the shorter side, as official DINO shows networks trained at 224
SHARE = 0.6  # of the attention that a mask keeps, as in the paper
HEADS = 6  # shown in a picture unless more are asked for: ViT-S has no more
CELL, GAP, TEXT = 200, 8, 22  # of a picture, in pixels: a panel's width, what is between two, a letter
MOST = 1920  # pixels across a video
# The heads' colours in turn, and the mean's.
COLOURS = ((255, 75, 75), (60, 150, 255), (80, 215, 100), (255, 195, 40), (200, 105, 255), (30, 220, 220))
MEAN_COLOUR = (255, 130, 20)


@torch.no_grad()
def attention_maps(network: VisionTransformer, images: Tensor) -> Tensor:
    """CLS attention per head (B, heads, h, w) over the patch grid; CLS and registers have the rest of 1.

    It is row 0 of `get_last_selfattention`, and no other row is computed: of ViT-B/8 at 480 x 640 pixels all
    would be 1.1 GB an image.

    Args:
        network: in evaluation mode.
        images: normalised (B, 3, H, W).
    """
    patch, heads, channels = network.patch_size, network.num_heads, network.embed_dim // network.num_heads
    tokens = network.prepare_tokens(images)
    runs = ((tokens.shape[0], tokens.shape[1]),)
    impl = network.attention_impl
    if impl == "auto":
        impl = choose(runs, heads, channels, tokens.dtype, tokens.device)
    packed = packing(runs, impl, tokens.device)
    x = tokens.flatten(0, 1)
    blocks: list[Any] = list(network.blocks)
    for block in blocks[:-1]:
        x = block(x, packed)
    normed = blocks[-1].norm1(x.unflatten(0, runs[0]))
    q, k, _ = blocks[-1].attn.heads(normed).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (q[:, :, :1] * channels**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1)[:, :, 0]
    h, w = images.shape[-2] // patch, images.shape[-1] // patch
    return weights[:, :, -h * w :].unflatten(-1, (h, w))  # patches come last


def keep_mass(maps: Tensor, share: float = SHARE) -> Tensor:
    """The patches that hold `share` of each map's mass, as official DINO: (..., h, w), to bool on the CPU.

    The weakest patches are left out as long as together they hold at most 1 - share; among equal ones those
    above, then those on the left, are left out first.
    """
    values, order = maps.double().cpu().flatten(-2).sort(dim=-1, stable=True)
    mass = values.cumsum(-1)
    kept = mass > (1 - share) * mass[..., -1:]
    return torch.zeros_like(kept).scatter(-1, order, kept).view(maps.shape)


class Fit(NamedTuple):
    """How an image is brought to whole patches: resized, then cropped; nothing is distorted."""

    size: tuple[int, int]
    """(width, height) after resizing."""
    box: tuple[int, int, int, int]
    """What is kept of that: left, top, right, bottom."""


def fit(size: tuple[int, int], side: int, patch: int) -> Fit:
    """For an image of (width, height): the shorter side to `side`, or the multiple of `patch` below, and of
    the longer the central patches; raises ValueError if `side` holds no patch."""
    if side < patch:
        raise ValueError(
            f"--image-size {side}: the network's patches have {patch} pixels; give {patch} or more"
        )
    side = side // patch * patch
    width, height = (max(side, round(x * side / min(size))) for x in size)
    left, top = width % patch // 2, height % patch // 2
    return Fit((width, height), (left, top, left + width // patch * patch, top + height // patch * patch))


def look(
    network: VisionTransformer,
    image: Image.Image,
    side: int,
    policy: CropPolicy,
    device: str | torch.device = "cpu",
) -> tuple[Image.Image, Tensor]:
    """The image as the network saw it, see `fit`, and the maps (heads, h, w), float32 on the CPU."""
    size, box = fit(image.size, side, network.patch_size)
    seen = image.resize(size, Image.Resampling.BICUBIC).crop(box)
    return seen, _maps(network, seen, policy, device)


def _maps(
    network: VisionTransformer, image: Image.Image, policy: CropPolicy, device: str | torch.device
) -> Tensor:
    x = crops.normalize(crops.to_tensor(image)[None].to(device), policy)
    return attention_maps(network, x)[0].float().cpu()


def load(weights: str, device: str | torch.device) -> tuple[VisionTransformer, CropPolicy, int]:
    """A ViT, how its images are normalised, and the shorter side to show it images at: twice the size of the
    crops it was trained on, 480 for weights of others. Raises ValueError if it is no ViT."""
    policy, side = CropPolicy(), SIDE
    if checkpoint.is_ours(weights):
        policy = checkpoint.read_teacher(weights)[1].data.crops
        side = 2 * policy.global_crops_size
    network = load_backbone(weights, device)
    if not isinstance(network, VisionTransformer):
        raise ValueError(
            f"{weights}: a {type(network).__name__} has no class token whose attention could be shown; give "
            "weights of a ViT: a run with --arch vit_..., official DINO's, DINOv2's or timm's"
        )
    return network, policy, side


# Drawing. Maps and masks are enlarged without smoothing: the squares are the patches.


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
    # the root: weak attention is to be seen too
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
    for rows, its in zip(blocks, heights, strict=True):
        for j, (row, high) in enumerate(zip(rows, its, strict=True)):
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
    write_atomically(path, lambda beside: image.save(beside, format="PNG"))
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
        maps = _maps(network, seen, policy, device)
        rows += panels(_zoomed(seen, CELL), maps, HEADS)
    # Two images share a row, so that the figure is about as wide as high.
    pairs = [[[*rows[i], *(rows[i + 1] if i + 1 < len(rows) else [])]] for i in range(0, len(rows), 2)]
    titles = _titles(len(rows[0])) * min(len(rows), 2)
    return _save(sheet(pairs, titles, [], cell=CELL // 2), path)


# Video.


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise ValueError("videos need PyAV, which is not installed: pip install 'fastdino[video]'") from None
    return av


class Film(NamedTuple):
    """Images in order, each made when it is asked for."""

    frames: Iterator[Image.Image]
    rate: Fraction
    """Frames a second."""
    length: int | None
    """How many frames there are; None where the file does not say."""


def open_film(path: str, fps: float = 0.0) -> Film:
    """The frames of a video file, the images of a text file, or those of a folder by their names, in which
    numbers count as numbers: 9.png comes before 10.png.

    fps: frames a second; 0: as the file, and 30 for images.

    Raises FileNotFoundError if there is no such path, ValueError if it holds no video; the frames raise
    ValueError where one cannot be read.
    """
    rate = Fraction(fps).limit_denominator(1001) if fps else Fraction(30)
    if Path(path).is_dir() or path.endswith(".txt"):
        images = open_images((path,))
        if Path(path).is_dir():
            images.sort(key=lambda image: _by_number(image.name))
        return Film((image.load() for image in images), rate, len(images))
    av = _av()
    if not Path(path).exists():
        raise FileNotFoundError(f"--video {path}: no such file; give a video or a folder of frames")
    try:
        container = av.open(path)
    except av.FFmpegError as error:
        raise ValueError(f"--video {path}: not a video that can be read ({error.strerror})") from None
    if not container.streams.video:
        container.close()
        raise ValueError(
            f"--video {path}: no pictures in it, or cut short; give a video or a folder of frames"
        )
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return Film(_decode(container, path), rate if fps else stream.average_rate or rate, stream.frames or None)


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(x), "") if x[:1] in "0123456789" else (-1, x) for x in re.split(r"([0-9]+)", name) if x]


def _decode(container: Any, path: str) -> Iterator[Image.Image]:
    with container:
        frames = container.decode(video=0)
        for i in itertools.count():
            try:
                frame = next(frames, None)
            except _av().FFmpegError as error:
                raise ValueError(f"--video {path}: frame {i} cannot be read ({error.strerror})") from None
            if frame is None:
                return
            image = frame.to_image()
            # telephones store what they film upright on its side
            yield image.rotate(frame.rotation, expand=True) if frame.rotation else image


def write_film(frames: Iterable[Pixels], rate: Fraction, path: Path) -> int:
    """Write frames of one size to the MP4 `path`, as each comes; how many they were.

    H.264 where PyAV was built with x264, else MPEG-4; no sound. Odd sides grow by a pixel, as both want.

    Raises ValueError on no frames, or frames of several sizes.
    """
    av = _av()
    written = 0

    def write(beside: Path) -> None:
        nonlocal written
        first: tuple[int, ...] = ()
        with av.open(str(beside), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            for pixels in frames:
                if not written:
                    h264 = "libx264" in av.codecs_available
                    stream = container.add_stream("libx264" if h264 else "mpeg4", rate=rate)
                    stream.options = {"crf": "18"} if h264 else {"q:v": "3"}
                    first = pixels.shape
                    stream.height, stream.width = (x + x % 2 for x in first[:2])
                    stream.pix_fmt = "yuv420p"
                    # What this size is not always played as, unless the file says so: full HD's BT.709.
                    colours = stream.codec_context
                    colours.colorspace = colours.color_primaries = colours.color_trc = colours.color_range = 1
                if pixels.shape != first:
                    raise ValueError(
                        f"frame {written} becomes {pixels.shape[1]} x {pixels.shape[0]} pixels, those before "
                        f"it {first[1]} x {first[0]}: give frames of one size"
                    )
                even = np.pad(pixels, ((0, first[0] % 2), (0, first[1] % 2), (0, 0)), mode="edge")
                frame = av.VideoFrame.from_ndarray(even, "rgb24")
                container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
                written += 1
            if not written:
                raise ValueError("a video without frames: nothing to write")
            container.mux(stream.encode())

    write_atomically(path, write)
    return written


def tile(rows: list[list[Pixels]]) -> Pixels:
    """Panels of one size side by side and below one another, made smaller where they would be too wide."""
    picture = np.concatenate([np.concatenate(row, axis=1) for row in rows])
    if picture.shape[1] <= MOST:
        return picture
    height = round(picture.shape[0] * MOST / picture.shape[1])
    return np.asarray(Image.fromarray(picture).resize((MOST, height), Image.Resampling.BOX))


# The command.


class Named(NamedTuple):
    """An image that is read when it is asked for."""

    name: str
    load: Callable[[], Image.Image]
    """Raises ValueError, naming the file and the reason."""


def open_images(paths: Iterable[str]) -> list[Named]:
    """Images named one by one, or by a folder, a text file or tar shards of them."""
    images = []
    for path in paths:
        if Path(path).suffix.lower() in EXTENSIONS and not Path(path).is_dir():
            images.append(Named(Path(path).name, partial(_readable, partial(read_image, path))))
        else:
            source = open_source(path)
            images += [
                Named(source.name(i), partial(_readable, partial(source.load, i))) for i in range(len(source))
            ]
    return images


def _readable(load: Callable[[], Image.Image]) -> Image.Image:
    try:
        return load()
    except Unreadable as error:
        raise ValueError(f"{error}; give images that can be read") from None


@dataclass(frozen=True, kw_only=True)
class Attention:
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
    """How many heads are shown beside their mean. Default: up to six in a picture, none in a video."""
    threshold: float | None = None
    """Show masks of the patches that hold this share of the attention. Default: 0.6 in a picture; in a video,
    or with 0, no masks."""
    over: bool = False
    """Draw the maps over the image."""
    rows: int = 8
    """Images in the picture at most, evenly spread over those given; --separate writes them all."""
    fps: float = 0.0
    """Frames a second of the video. Default: as the file that is given, 30 for a folder."""
    device: str = "auto"
    """auto (a CUDA GPU if there is one), cpu, cuda, ..."""

    def run(self) -> None:
        """Write the picture or the video."""
        out = Path(self.out or ("attention.mp4" if self.video else "attention.png"))
        self._check(out)
        device = choose_device(self.device)
        if self.video:
            _av()  # said before the weights are read
        images = open_images(self.images)
        film = open_film(self.video, self.fps) if self.video else None
        network, policy, side = load(self.weights, device)
        side = self.image_size or side

        def see(image: Image.Image) -> tuple[Image.Image, Tensor]:
            return look(network, image, side, policy, device)

        console = Console()
        bar = partial(
            track, description="attention", console=console, transient=True, disable=not console.is_terminal
        )
        if film:
            frames = (self._frame(*see(frame)) for frame in bar(film.frames, total=film.length))
            n = write_film(frames, film.rate, out)
            said = f"{out}: {n} frames, {float(film.rate):g} a second"
        else:
            said = self._draw(images, bar, see, out)
        console.print(said, markup=False, highlight=False, soft_wrap=True)

    def _check(self, out: Path) -> None:
        if bool(self.images) == bool(self.video):
            raise ValueError("give either --images PATH... or --video PATH")
        if out.suffix.lower() != (".mp4" if self.video else ".png"):
            raise ValueError(f"--out {out}: give a name that ends in {'.mp4' if self.video else '.png'}")
        if not out.parent.is_dir():
            raise ValueError(f"--out {out}: there is no folder {out.parent}; make it first")
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

    def _draw(self, images: list[Named], bar: Callable[..., Any], see: Callable[..., Any], out: Path) -> str:
        """Make the picture and the files of their own; returns what was written, for people."""
        share = SHARE if self.threshold is None else self.threshold
        heads = HEADS if self.heads is None else self.heads
        blocks: list[list[list[Pixels]]] = []
        digits = len(str(len(images) - 1))
        shown = {round(x) for x in np.linspace(0, len(images) - 1, min(self.rows, len(images)))}
        for i in bar(range(len(images)) if self.separate else sorted(shown)):
            image = images[i]
            seen, maps = see(image.load())
            if i in shown:
                blocks.append(panels(_zoomed(seen, 2 * CELL), maps, heads, share, self.over))
            if self.separate:
                # numbered: images of several folders may have one name
                folder = Path(self.separate) / f"{i:0{digits}d}-{Path(image.name).stem}"
                folder.mkdir(parents=True, exist_ok=True)
                names = ["mean", *(f"head-{j + 1}" for j in range(len(maps)))]
                files = [["image", *names], ["masks", *(f"{name}-mask" for name in names)]]
                for row, its in zip(panels(seen, maps, len(maps), share, self.over), files, strict=False):
                    for panel, name in zip(row, its, strict=True):
                        _save(Image.fromarray(panel), folder / f"{name}.png")
        labels = ["attention", f"masks, {100 * share:g} %"] if share else []
        _save(sheet(blocks, _titles(len(blocks[0][0])), labels), out)
        said = str(out)
        if len(blocks) < len(images):
            said += f": {len(blocks)} of {len(images)} images, evenly spread (--rows)"
        return said + (f"; each by itself in {self.separate}" if self.separate else "")
