"""`--loader dali`: DALI decodes, on the GPU where there is one, and one kernel makes all crops there.

Workers read the files and draw every parameter (`crops.draw`); the pipeline decodes each image once, and
`ops.multi_crop` makes its views on the device, with the arithmetic of Pillow. So this loader differs from the
other in the decoder alone: not at all on a CPU, where both use libjpeg-turbo, and on a GPU by nvJPEG's
rounding.
"""

import gc
import io
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastdino.config import CropPolicy
from fastdino.data.crops import View, draw, encode, fits_row, pixels, render, to_tensor
from fastdino.data.images import Unreadable, decode_image, orientation_of
from fastdino.data.loader import Batch, Loader, load_or_next, shared_buffer
from fastdino.data.sources import Source
from fastdino.ops import multi_crop

MAX_PIXELS = 64_000_000  # of an image that DALI is given; larger ones are Pillow's, which bounds its memory
LARGEST_DIFFERENCE = 3.0  # from Pillow's crops, mean in levels of 255; decoders differ by less than 1
_END = b"\xff\xd9"  # of a JPEG


@dataclass
class EncodedBatch:
    """What a worker sends of B images."""

    content: Tensor  # uint8, all files one after the other, or pixels (h, w, 3) of those that Pillow decoded
    ends: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (height, width), upright
    decoded: list[bool] = field(default_factory=list)
    parameters: Tensor = field(default_factory=lambda: torch.empty(0))  # float64 (B, V, FIELDS)
    indices: list[int] = field(default_factory=list)  # the images used
    failed: list[tuple[str, str]] = field(default_factory=list)  # path and reason of unreadable files
    items: list[tuple[int, int]] = field(default_factory=list)  # (epoch, index) asked for
    # (image, view, pixels uint8 (3, size, size)) of the views that no kernel can make
    rendered: list[tuple[int, int, Tensor]] = field(default_factory=list)

    def of(self, i: int) -> Tensor:
        """The content of image i."""
        return self.content[self.ends[i - 1] if i else 0 : self.ends[i]]


class Encoded(Dataset[EncodedBatch | Unreadable]):
    """Files as they are, with the drawn parameters of their views."""

    def __init__(self, source: Source, policy: CropPolicy, seed: int) -> None:
        self.source, self.policy, self.seed = source, policy, seed

    def __getitems__(
        self, items: list[tuple[int, int]], by_pillow: bool = False
    ) -> EncodedBatch | Unreadable:
        """Unreadable is returned, not raised: the DataLoader would bury its message in a traceback."""
        piece = EncodedBatch(torch.empty(0), items=items)
        contents, parameters = [], []
        for place, item in enumerate(items):
            try:
                used, (content, size, decoded, views) = load_or_next(
                    self.source, item[1], piece.failed, partial(self._open, item, by_pillow)
                )
            except Unreadable as error:
                return error
            contents.append(content)
            piece.indices.append(used)
            piece.ends.append(len(content) + (piece.ends[-1] if piece.ends else 0))
            piece.sizes.append(size[::-1])
            piece.decoded.append(decoded)
            parameters.append(encode(views))
            for v, view in enumerate(views):
                if not fits_row(view):  # so the image is decoded
                    piece.rendered.append((place, v, to_tensor(render(_image(content, size), view))))
        piece.content = shared_buffer(piece.ends[-1])
        np.concatenate(contents, out=piece.content.numpy())
        piece.parameters = torch.stack(parameters)
        return piece

    def _open(
        self, item: tuple[int, int], by_pillow: bool, index: int
    ) -> tuple[np.ndarray, tuple[int, int], bool, list[View]]:
        """Content, (width, height), whether it is decoded, and the views drawn for `item`.

        An image of which Pillow makes a view is decoded by Pillow. Raises Unreadable.
        """
        content = self.source.read(index)
        if not by_pillow and (size := jpeg_size(content)):
            views = draw(self.policy, self.seed, *item, size)
            if all(map(fits_row, views)):
                return np.frombuffer(content, dtype=np.uint8), size, False, views
        image = decode_image(content, self.source.path(index))
        views = draw(self.policy, self.seed, *item, image.size)
        return np.asarray(image).reshape(-1), image.size, True, views


def _image(content: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """The image of decoded pixels; `size` is (width, height)."""
    return Image.fromarray(content.reshape(size[1], size[0], 3))


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """(width, height), upright, of a whole JPEG that DALI decodes as Pillow does; None for all else."""
    # A file cut short has no end; an end within the pixels would be escaped.
    if content[:3] != b"\xff\xd8\xff" or _END not in content[-64:]:
        return None
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            width, height = image.size
            adobe = image.info.get("adobe_transform", 1)  # 0: stored as RGB
            if image.mode not in ("RGB", "L") or width * height > MAX_PIXELS or adobe != 1:
                return None
            return (height, width) if orientation_of(image) in (5, 6, 7, 8) else (width, height)
    except Exception:  # Pillow's decoder says what is wrong with it
        return None


@cache
def _keep_garbage_from_children() -> None:
    """Let no process that is forked from now on collect what is garbage here.

    A pipeline may be among it: in a child its destructor would wait for ever for threads that only the parent
    has, wherever the child happened to collect.
    """
    os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)


class DaliLoader(Loader):
    """Iterates over a run's batches, decoded by DALI, with views on `device`."""

    def __init__(
        self, loader: DataLoader, policy: CropPolicy, device: torch.device, batch: int, threads: int
    ) -> None:
        super().__init__(loader, policy)
        self.device, self.batch, self.threads = device, batch, threads
        self.cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.cuda else None

    def _build(self) -> Any:
        from nvidia.dali import Pipeline, fn
        from nvidia.dali.types import UINT8  # type: ignore[attr-defined]  # made at run time

        _keep_garbage_from_children()
        pipeline = Pipeline(
            batch_size=self.batch,
            num_threads=self.threads,
            device_id=self.stream.device_index if self.stream is not None else None,
            prefetch_queue_depth=1,  # with more, the first run would wait for that many pieces
        )
        with pipeline:
            files = fn.external_source(name="files", dtype=UINT8, ndim=1)
            # With fancy upsampling nvJPEG interpolates chroma as libjpeg does.
            images = fn.decoders.image(
                files, device="mixed" if self.cuda else "cpu", jpeg_fancy_upsampling=True
            )
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def __iter__(self) -> Iterator[Batch]:
        """While one piece is trained on, the next one is cropped and the one after is decoded."""
        with closing(self.arriving()) as arriving:
            pipeline: Any = None
            decoding: EncodedBatch | None = None
            made: tuple[Batch, Any] | None = None
            checked = False
            try:
                for piece in chain(arriving, (None, None)):
                    images: list[Tensor] = []
                    if decoding is not None and not all(decoding.decoded):
                        try:
                            (outputs,) = pipeline.share_outputs(cuda_stream=self.stream)
                            # not in the trainer's stream, which would wait for the decoder
                            with torch.cuda.stream(self.stream):
                                images = [torch.from_dlpack(image) for image in outputs]
                        except (RuntimeError, IndexError):  # one file that DALI cannot read ends a pipeline
                            pipeline, decoding = None, self._by_pillow(decoding)
                    if piece is not None:
                        # built once the workers are started, who are to share no threads
                        pipeline = pipeline or self._build()
                        files = [piece.of(i).numpy() for i, done in enumerate(piece.decoded) if not done]
                        if files:
                            pipeline.feed_input("files", files)
                            pipeline.schedule_run()
                    before, made = made, None
                    if decoding is not None:
                        with torch.cuda.stream(self.stream):  # nothing where there is none
                            batch = self._crop(decoding, images)
                            if not checked:
                                self._check(decoding, batch.views)
                                checked = True
                        made = batch, self.stream.record_event() if self.stream is not None else None
                    decoding = piece
                    if before is not None:
                        yield self._give(*before)
            finally:
                # ends its threads now, not when a traceback that holds this frame is dropped: in a process
                # forked in between, its destructor would wait for them for ever
                pipeline = outputs = None

    def _by_pillow(self, piece: EncodedBatch) -> EncodedBatch:
        loaded = self._loader.dataset.__getitems__(piece.items, by_pillow=True)  # type: ignore[attr-defined]
        if isinstance(loaded, Unreadable):
            raise loaded
        return loaded

    def _check(self, piece: EncodedBatch, views: list[Tensor]) -> None:
        """Compare the first image's views with Pillow's: there are many drivers, decoders and compilers."""
        dataset: Any = self._loader.dataset
        content, (height, width) = piece.of(0).numpy(), piece.sizes[0]
        image = _image(content, (width, height)) if piece.decoded[0] else decode_image(content.tobytes(), "")
        drawn = draw(dataset.policy, dataset.seed, *piece.items[0], image.size)
        for view, made in zip(drawn, views, strict=True):
            by_pillow = to_tensor(render(image, view)).float()
            difference = (made[0].cpu().float() - by_pillow).abs().mean().item()
            if difference > LARGEST_DIFFERENCE:
                raise RuntimeError(
                    f"the crops that --loader dali makes on {self.device} differ from Pillow's by "
                    f"{difference:.1f} of 255 levels on average: use --loader torchvision, and report it"
                )

    def _give(self, batch: Batch, event: Any) -> Batch:
        if self.stream is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(event)
            for views in batch.views:
                views.record_stream(here)
        return batch

    def _crop(self, piece: EncodedBatch, decoded: list[Tensor]) -> Batch:
        rest, images, by_pillow = iter(decoded), [], 0
        for i, (height, width) in enumerate(piece.sizes):
            shape, content = (height, width, 3), piece.of(i)
            image = None if piece.decoded[i] else next(rest)
            if image is None or tuple(image.shape) != shape:  # or DALI turned what Pillow does not
                by_pillow += 1
                if image is not None:
                    content = pixels(decode_image(content.numpy().tobytes(), "")).reshape(-1)
                image = content.reshape(shape).to(self.device, non_blocking=True)
            images.append(image)
        out = [
            torch.empty(len(images), 3, size, size, dtype=torch.uint8, device=self.device)
            for size in self.sizes
        ]
        multi_crop(images, piece.parameters, out)
        for i, v, made in piece.rendered:
            out[v][i].copy_(made)
        return Batch(
            out,
            torch.tensor(piece.indices),
            [path for path, _ in piece.failed],
            [reason for _, reason in piece.failed],
            by_pillow,
        )
