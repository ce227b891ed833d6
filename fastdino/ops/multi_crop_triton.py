"""All views of a batch of decoded images in Triton: pixel for pixel what Pillow makes (data/crops.py).

Five launches, whatever the number of images and views, and nothing waits for the GPU. A table has a row per
view of an image; a list says on which row each program works.

1. `weights_kernel`: Pillow's fixed-point weights of both passes of the resize, in float64.
2. `horizontal_kernel`: the box of the image to planes as wide as the view, flipped already.
3. `vertical_kernel`: these to the view, and its colours up to contrast, which needs the mean of the whole
   view: each tile leaves its sum.
4. `color_kernel`: contrast and what follows it, then the blur's three passes along the rows.
5. `blur_kernel`: its three passes along the columns.

Views without contrast and blur are done after the third.

Bytes of a view of s x s from a box of h x w: 3hw of the image are read (4hw with alpha), 3hs of planes
written and read, 3ss of view written; contrast reads and writes these once more, blur six times, most of it
in the caches. The passes of the resize have about 4 max(1, w/s) + 1 and 4 max(1, h/s) + 1 taps, so often each
reads its source, nearly always from the first-level cache; weights take 4s bytes a tap.
"""
# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of a kernel as its own types.)

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdino.ops.multi_crop_row import AT, number_of

ROWS = 32  # of a tile of the resize; weights are padded to whole tiles of COLUMNS, so no more than these
STRIP_ROWS = 16  # of a tile of the colours and the blur
COLUMNS = 32  # of any tile: a warp side by side. Rows of scratch are padded to whole tiles.
BLOCK = 128  # outputs of a program that makes weights
WARPS = 4
COLOR_WARPS = 8  # of kernels with colours: these take many registers per pixel, so fewer pixels a thread

# A row of the table. Offsets are in elements from the start of their memory.
IMAGE = tl.constexpr(0)  # the box's first byte, counted from the first image
PITCH = tl.constexpr(1)  # of the image's rows
CHANNELS = tl.constexpr(2)
EXTENT = tl.constexpr(3)  # height and width of the box
SIZE = tl.constexpr(5)
WEIGHTS = tl.constexpr(6)  # of the vertical and of the horizontal pass
SCRATCH = tl.constexpr(8)
PLANE = tl.constexpr(9)  # bytes of scratch per channel
OUT = tl.constexpr(10)  # counted from the first view
FLIP = tl.constexpr(11)
JITTER = tl.constexpr(12)  # four pairs of kind and factor: steps of hue, or the bits of a float32
BEFORE = tl.constexpr(20)  # how many of them come before contrast; 4 if there is none
GRAYSCALE = tl.constexpr(21)
RADIUS = tl.constexpr(22)  # whole pixels of the box that blurs; negative: no blur
NEAR = tl.constexpr(23)  # weight of these, and of the two beyond, in 1 / 2**24
FAR = tl.constexpr(24)
SOLARIZE = tl.constexpr(25)
HORIZONTAL = tl.constexpr(26)  # the first program of each kernel that works on the view
VERTICAL = tl.constexpr(27)
COLOR = tl.constexpr(28)
BLUR = tl.constexpr(29)
ENTRIES = tl.constexpr(30)

CONTRAST = tl.constexpr(number_of("contrast"))
SATURATION = tl.constexpr(number_of("saturation"))
HUE = tl.constexpr(number_of("hue"))
BITS = tl.constexpr(22)  # of the resize's weights behind the point
ONE = tl.constexpr(1 << 22)


@triton.jit
def _bicubic(x):
    x = tl.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return tl.where(x < 1, near, tl.where(x < 2, far, 0.0))


@triton.jit
def weights_kernel(
    weights,  # by view and pass: (2 + taps, padded size) first pixel, number of taps, weights
    table,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # every operation is rounded by itself, as on the CPU: launched without fused multiply-add
    which = tl.program_id(0) % 2
    row = table + (tl.program_id(0) // 2).to(tl.int64) * ENTRIES
    extent = tl.load(row + EXTENT + which).to(tl.int32)
    size = tl.load(row + SIZE).to(tl.int32)
    padded = tl.cdiv(size, COLUMNS) * COLUMNS
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    to = weights + tl.load(row + WEIGHTS + which) + at
    scale = extent.to(tl.float64) / size.to(tl.float64)
    stretch = tl.maximum(scale, 1.0)
    support = 2.0 * stretch
    shrink = 1.0 / stretch
    center = (at.to(tl.float64) + 0.5) * scale
    # conversion truncates toward zero
    first = tl.maximum((center - support + 0.5).to(tl.int32), 0)
    count = tl.minimum((center + support + 0.5).to(tl.int32), extent) - first
    count = tl.where(at < size, count, 0)
    tl.store(to, first, mask=at < padded)
    tl.store(to + padded, count, mask=at < padded)
    to += 2 * padded
    taps = tl.max(count)
    total = tl.zeros([BLOCK], tl.float64)
    for k in range(taps):
        w = _bicubic(((k + first).to(tl.float64) - center + 0.5) * shrink)
        total += tl.where(k < count, w, 0.0)
    total = tl.where(total != 0, total, 1.0)
    for k in range(taps):
        w = _bicubic(((k + first).to(tl.float64) - center + 0.5) * shrink) / total
        w *= ONE
        fixed = tl.where(w < 0, w - 0.5, w + 0.5).to(tl.int32)
        tl.store(to, fixed, mask=k < count)
        to += padded


@triton.jit
def _clip8(x):
    return tl.minimum(tl.maximum(x >> BITS, 0), 255)


@triton.jit(do_not_specialize_on_alignment=["images", "programs"])
def horizontal_kernel(
    scratch,  # by view: (3, rows of the box, padded size), flipped
    images,  # the first; the others lie at offsets from it
    weights,
    table,
    programs,  # view of each program
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = table + tl.load(programs + tl.program_id(0)).to(tl.int64) * ENTRIES
    tile = tl.program_id(0) - tl.load(row + HORIZONTAL).to(tl.int32)
    size, height = tl.load(row + SIZE).to(tl.int32), tl.load(row + EXTENT).to(tl.int32)
    tiles = tl.cdiv(size, COLUMNS)
    padded = tiles * COLUMNS
    y = (tile // tiles) * ROWS + tl.arange(0, ROWS)
    x = (tile % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    # a pass that keeps the size has weights of exactly 1 and 0, so it copies
    column = tl.maximum(tl.where(tl.load(row + FLIP) != 0, size - 1 - x, x), 0)
    tap = weights + tl.load(row + WEIGHTS + 1) + column
    first, count = tl.load(tap), tl.load(tap + padded)
    channels = tl.load(row + CHANNELS).to(tl.int32)
    line = tl.minimum(y, height - 1).to(tl.int64) * tl.load(row + PITCH)
    pixel = images + tl.load(row + IMAGE) + line[:, None] + (first * channels)[None, :]
    red = tl.full([ROWS, COLUMNS], ONE // 2, tl.int32)
    green, blue = red, red
    for k in range(tl.max(count)):
        tap += padded
        w = tl.load(tap + padded)[None, :]
        inside = (k < count)[None, :]
        red += w * tl.load(pixel, mask=inside, other=0)
        green += w * tl.load(pixel + 1, mask=inside, other=0)
        blue += w * tl.load(pixel + 2, mask=inside, other=0)
        pixel += channels
    to = scratch + tl.load(row + SCRATCH) + (y.to(tl.int64) * padded)[:, None] + x[None, :]
    plane, inside = tl.load(row + PLANE), (y < height)[:, None]
    tl.store(to, _clip8(red).to(tl.uint8), mask=inside)
    tl.store(to + plane, _clip8(green).to(tl.uint8), mask=inside)
    tl.store(to + 2 * plane, _clip8(blue).to(tl.uint8), mask=inside)


@triton.jit
def _luma(red, green, blue):
    return (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16


@triton.jit
def _blend(base, x, alpha):
    # float32 without fused multiply-add; within 0 to 1 there is nothing to clip
    blended = base.to(tl.float32) + alpha * (x - base).to(tl.float32)
    return tl.minimum(tl.maximum(blended, 0.0), 255.0).to(tl.int32)


@triton.jit
def _to_hsv(red, green, blue):
    """Pillow's conversion: on all 2**24 colours the same, without its doubles and two of its divisions."""
    top = tl.maximum(tl.maximum(red, green), blue)
    low = tl.minimum(tl.minimum(red, green), blue)
    span = top - low
    divisor = tl.maximum(span, 1).to(tl.float32)
    third = tl.math.div_rn((2 * top + low - red - green - blue).to(tl.float32), divisor)
    from_red, from_green = red == top, green == top
    rising = tl.where(from_red, green == low, tl.where(from_green, red != low, green != low))
    start = tl.where(from_red, 0, tl.where(from_green, 2, 4)) + tl.where(rising, -1, 1)
    sixths = start.to(tl.float32) + tl.where(rising, third, -third)
    hue = tl.math.div_rn(sixths, tl.full(sixths.shape, 6.0, tl.float32))
    hue = (tl.where(hue < 0, 1 + hue, hue) * 255).to(tl.int32)
    saturation = (tl.math.div_rn(span.to(tl.float32), tl.maximum(top, 1).to(tl.float32)) * 255).to(tl.int32)
    return tl.where(span == 0, 0, hue), saturation, top


@triton.jit
def _to_rgb(hue, saturation, value):
    """Pillow's conversion in integers, on all 2**24 triples the same: none of its roundings meets a tie."""
    sector = (2 * hue) // 85
    part = 2 * hue - 85 * sector  # of the sector, in 1 / 85
    part = tl.where(sector % 2 == 1, part, 85 - part)
    low = (2 * value * (255 - saturation) + 255) // 510
    middle = (2 * value * (21675 - saturation * part) + 21675) // 43350
    sector = tl.where(sector == 6, 0, sector)
    red = tl.where((sector == 0) | (sector == 5), value, tl.where((sector == 2) | (sector == 3), low, middle))
    green = tl.where((sector == 1) | (sector == 2), value, tl.where(sector >= 4, low, middle))
    blue = tl.where((sector == 3) | (sector == 4), value, tl.where(sector <= 1, low, middle))
    return red, green, blue


@triton.jit
def _shift_hue(red, green, blue, steps):
    hue, saturation, value = _to_hsv(red, green, blue)
    return _to_rgb((hue + steps) & 255, saturation, value)


@triton.jit
def _jitter(red, green, blue, row, first, last, mean):
    for i in range(first, last):
        kind = tl.load(row + JITTER + 2 * i)
        factor = tl.load(row + JITTER + 2 * i + 1).to(tl.int32)
        if kind == HUE:
            red, green, blue = _shift_hue(red, green, blue, factor)
        elif kind > 0:
            base = tl.where(kind == SATURATION, _luma(red, green, blue), tl.where(kind == CONTRAST, mean, 0))
            alpha = factor.to(tl.float32, bitcast=True)
            red, green, blue = _blend(base, red, alpha), _blend(base, green, alpha), _blend(base, blue, alpha)
    return red, green, blue


@triton.jit
def _solarize(x):
    return tl.where(x < 128, x, 255 - x)


@triton.jit
def _finish(red, green, blue, row):
    """Grayscale, and solarisation unless blur comes first."""
    if tl.load(row + GRAYSCALE) != 0:
        red = _luma(red, green, blue)
        green, blue = red, red
    if (tl.load(row + SOLARIZE) != 0) & (tl.load(row + RADIUS) < 0):
        red, green, blue = _solarize(red), _solarize(green), _solarize(blue)
    return red, green, blue


@triton.jit(do_not_specialize_on_alignment=["out", "programs"])
def vertical_kernel(
    out,  # the first view (B, 3, size, size); the others lie at offsets from it
    sums,  # by program: of what contrast takes the mean of
    scratch,
    weights,
    table,
    programs,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = table + tl.load(programs + tl.program_id(0)).to(tl.int64) * ENTRIES
    tile = tl.program_id(0) - tl.load(row + VERTICAL).to(tl.int32)
    size, height = tl.load(row + SIZE).to(tl.int32), tl.load(row + EXTENT).to(tl.int32)
    tiles = tl.cdiv(size, COLUMNS)
    padded = tiles * COLUMNS
    y = (tile // tiles) * ROWS + tl.arange(0, ROWS)
    x = (tile % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (y < size)[:, None] & (x < size)[None, :]
    tap = weights + tl.load(row + WEIGHTS) + y
    first, count = tl.load(tap), tl.load(tap + padded)
    plane = tl.multiple_of(tl.load(row + PLANE), COLUMNS)
    source = scratch + tl.multiple_of(tl.load(row + SCRATCH), COLUMNS)
    red = tl.full([ROWS, COLUMNS], ONE // 2, tl.int32)
    green, blue = red, red
    for k in range(tl.max(count)):
        tap += padded
        w = tl.where(k < count, tl.load(tap + padded), 0)[:, None]
        pixel = source + (tl.minimum(first + k, height - 1) * padded)[:, None] + x[None, :]
        red += w * tl.load(pixel)
        green += w * tl.load(pixel + plane)
        blue += w * tl.load(pixel + 2 * plane)
    red, green, blue = _clip8(red), _clip8(green), _clip8(blue)
    before = tl.load(row + BEFORE).to(tl.int32)
    red, green, blue = _jitter(red, green, blue, row, 0, before, 0)
    if before < 4:
        tl.store(sums + tl.program_id(0), tl.sum(tl.where(inside, _luma(red, green, blue), 0)))
    else:
        red, green, blue = _finish(red, green, blue, row)
    to = out + tl.load(row + OUT) + (y * size)[:, None] + x[None, :]
    plane = size.to(tl.int64) * size
    tl.store(to, red.to(tl.uint8), mask=inside)
    tl.store(to + plane, green.to(tl.uint8), mask=inside)
    tl.store(to + 2 * plane, blue.to(tl.uint8), mask=inside)


@triton.jit
def _pixel(source, i, step, last):
    # pixels beyond an edge are those at the edge
    return tl.load(source + tl.minimum(tl.maximum(i, 0), last) * step).to(tl.uint32)


@triton.jit
def _box(source, i, step, last, radius, near, far):
    """A tile of one pass of the blur, along a direction in which pixels are a step apart."""
    total = _pixel(source, i, step, last)
    for by in range(1, radius + 1):
        total += _pixel(source, i - by, step, last) + _pixel(source, i + by, step, last)
    ends = _pixel(source, i - radius - 1, step, last) + _pixel(source, i + radius + 1, step, last)
    return (total * near + ends * far + (1 << 23)) >> 24


@triton.jit
def _blur_rows(to, to_pitch, to_plane, source, pitch, plane, y, row, COLUMNS: tl.constexpr):
    """One pass over all channels of some rows."""
    last = tl.load(row + SIZE).to(tl.int32) - 1
    radius = tl.load(row + RADIUS).to(tl.int32)
    near, far = tl.load(row + NEAR).to(tl.uint32), tl.load(row + FAR).to(tl.uint32)
    source += (tl.minimum(y, last) * pitch)[:, None]
    to += (y * to_pitch)[:, None]
    for _ in range(3):
        for left in range(0, last + 1, COLUMNS):
            x = (left + tl.arange(0, COLUMNS))[None, :]
            blurred = _box(source, x, 1, last, radius, near, far)
            tl.store(to + x, blurred.to(tl.uint8), mask=(y <= last)[:, None] & (x <= last))
        to += to_plane
        source += plane


@triton.jit
def _blur_columns(to, to_pitch, source, pitch, x, row, ROWS: tl.constexpr, SOLARIZED: tl.constexpr):
    """One pass over some columns of a channel."""
    last = tl.load(row + SIZE).to(tl.int32) - 1
    radius = tl.load(row + RADIUS).to(tl.int32)
    near, far = tl.load(row + NEAR).to(tl.uint32), tl.load(row + FAR).to(tl.uint32)
    source += tl.minimum(x, last)[None, :]
    to += x[None, :]
    for top in range(0, last + 1, ROWS):
        y = (top + tl.arange(0, ROWS))[:, None]
        blurred = _box(source, y, pitch, last, radius, near, far)
        if SOLARIZED and tl.load(row + SOLARIZE) != 0:
            blurred = _solarize(blurred)
        tl.store(to + y * to_pitch, blurred.to(tl.uint8), mask=(y <= last) & (x <= last)[None, :])


@triton.jit(do_not_specialize_on_alignment=["out", "programs"])
def color_kernel(
    out,
    scratch,  # its planes are no longer needed: the blur's memory
    sums,
    table,
    programs,
    ROWS: tl.constexpr,  # of a strip, across the whole view
    COLUMNS: tl.constexpr,
    ROWS_SUMMED: tl.constexpr,  # of the tiles that left sums
):
    row = table + tl.load(programs + tl.program_id(0)).to(tl.int64) * ENTRIES
    strip = tl.program_id(0) - tl.load(row + COLOR).to(tl.int32)
    size = tl.load(row + SIZE).to(tl.int32)
    y = strip * ROWS + tl.arange(0, ROWS)
    view, plane = out + tl.load(row + OUT), size.to(tl.int64) * size
    before = tl.load(row + BEFORE).to(tl.int32)
    if before < 4:
        total = tl.zeros([128], tl.int64)
        tiles = tl.cdiv(size, ROWS_SUMMED) * tl.cdiv(size, COLUMNS)
        for i in range(0, tiles, 128):
            each = i + tl.arange(0, 128)
            total += tl.load(sums + tl.load(row + VERTICAL) + each, mask=each < tiles, other=0)
        # int(mean + 0.5): in integers, as the mean is nowhere near a tie that it is not
        mean = ((2 * tl.sum(total) + plane) // (2 * plane)).to(tl.int32)
        for left in range(0, size, COLUMNS):
            x = left + tl.arange(0, COLUMNS)
            inside = (y < size)[:, None] & (x < size)[None, :]
            at = view + (y * size)[:, None] + x[None, :]
            red = tl.load(at, mask=inside, other=0).to(tl.int32)
            green = tl.load(at + plane, mask=inside, other=0).to(tl.int32)
            blue = tl.load(at + 2 * plane, mask=inside, other=0).to(tl.int32)
            red, green, blue = _jitter(red, green, blue, row, before, 4, mean)
            red, green, blue = _finish(red, green, blue, row)
            tl.store(at, red.to(tl.uint8), mask=inside)
            tl.store(at + plane, green.to(tl.uint8), mask=inside)
            tl.store(at + 2 * plane, blue.to(tl.uint8), mask=inside)
    if tl.load(row + RADIUS) >= 0:
        # rows are blurred each by itself, and this program's are no other's
        space, pitch = scratch + tl.load(row + SCRATCH), tl.cdiv(size, COLUMNS) * COLUMNS
        space_plane = tl.load(row + PLANE)
        tl.debug_barrier()
        _blur_rows(space, pitch, space_plane, view, size, plane, y, row, COLUMNS)
        tl.debug_barrier()
        _blur_rows(view, size, plane, space, pitch, space_plane, y, row, COLUMNS)
        tl.debug_barrier()
        _blur_rows(space, pitch, space_plane, view, size, plane, y, row, COLUMNS)


@triton.jit(do_not_specialize_on_alignment=["out", "programs"])
def blur_kernel(out, scratch, table, programs, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = table + tl.load(programs + tl.program_id(0)).to(tl.int64) * ENTRIES
    strip = tl.program_id(0) - tl.load(row + BLUR).to(tl.int32)
    size = tl.load(row + SIZE).to(tl.int32)
    pitch = tl.cdiv(size, COLUMNS) * COLUMNS
    x = strip * COLUMNS + tl.arange(0, COLUMNS)
    view = out + tl.load(row + OUT) + tl.program_id(1) * (size.to(tl.int64) * size)
    space = scratch + tl.load(row + SCRATCH) + tl.program_id(1) * tl.load(row + PLANE)
    # columns are blurred each by itself, and this program's are no other's
    _blur_columns(view, size, space, pitch, x, row, ROWS, False)
    tl.debug_barrier()
    _blur_columns(space, pitch, view, size, x, row, ROWS, False)
    tl.debug_barrier()
    _blur_columns(view, size, space, pitch, x, row, ROWS, True)


def _box_blur(radius: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The box's whole pixels (-1: no blur) and two weights, of Pillow's radius and with Pillow's types."""
    one, two, three, six = (np.float32(x) for x in (1, 2, 3, 6))
    sigma = np.maximum(radius, 0).astype(np.float32)
    variance = sigma * sigma / three
    length = np.sqrt(12.0 * variance.astype(np.float64) + 1.0).astype(np.float32)
    whole = np.floor((length.astype(np.float64) - 1.0) / 2.0).astype(np.float32)
    part = (two * whole + one) * (whole * (whole + one) - three * variance)
    part /= six * (variance - (whole + one) * (whole + one))
    box = whole + part
    pixels = box.astype(np.int64)
    near = (np.float32(1 << 24) / (box * two + one)).astype(np.int64)
    far = (((1 << 24) - (2 * pixels + 1) * near) & 0xFFFFFFFF) // 2
    return np.where(radius > 0, pixels, -1), near, far


def _offsets(counts: np.ndarray) -> tuple[np.ndarray, int]:
    """Where each of several runs starts if they lie one after another, and where the last one ends."""
    ends = np.cumsum(counts)
    return ends - counts, int(ends[-1])


def _addresses(tensors: list[Tensor]) -> np.ndarray:
    """Of each, counted from the first."""
    addresses = np.array([x.data_ptr() for x in tensors], dtype=np.int64)
    return addresses - addresses[0]


def _table(
    images: list[Tensor], given: np.ndarray, out: list[Tensor]
) -> tuple[np.ndarray, list[np.ndarray], int, int]:
    """The table, the programs of each kernel on each view, the elements of the weights and of scratch."""
    B, V, n = len(images), len(out), len(given)
    table = np.empty((n, ENTRIES.value), dtype=np.int64)

    def put(entry: tl.constexpr, *values: np.ndarray) -> None:
        for i, value in enumerate(values, entry.value):
            table[:, i] = value

    field = {name: given[:, at].T for name, at in AT.items()}
    top, left, height, width = field["box"].astype(np.int64)
    _, columns, channels = np.repeat(np.array([x.shape for x in images]), V, axis=0).T
    size = np.tile(np.array([x.shape[-1] for x in out]), B)
    tiles = -(-size // COLUMNS)
    padded = tiles * COLUMNS
    put(IMAGE, np.repeat(_addresses(images), V) + (top * columns + left) * channels)
    put(PITCH, columns * channels, channels)
    put(EXTENT, height, width, size)
    # taps as Pillow reserves them
    taps = 2 * np.ceil(2 * np.maximum(np.stack([height, width], 1) / size[:, None], 1)).astype(np.int64) + 1
    weights, all_weights = _offsets(((2 + taps) * padded[:, None]).ravel())
    put(WEIGHTS, *weights.reshape(n, 2).T)
    plane = np.maximum(height, size) * padded
    scratch, all_scratch = _offsets(3 * plane)
    put(SCRATCH, scratch, plane)
    put(OUT, np.tile(_addresses(out), B) + np.repeat(np.arange(B), V) * 3 * size**2)
    put(FLIP, *field["flip"])

    kind, factor = field["jitter"][::2].T.astype(np.int64), field["jitter"][1::2].T
    steps = np.trunc(factor * 255).astype(np.int64) % 256
    factor = np.where(kind == HUE.value, steps, factor.astype(np.float32).view(np.int32))
    put(JITTER, *np.stack([kind, factor], 2).reshape(n, 8).T)
    contrast = kind == CONTRAST.value
    if (contrast.sum(1) > 1).any():
        raise ValueError("a view has contrast twice: there is room for one mean per view")
    before = np.where(contrast.any(1), contrast.argmax(1), 4)
    radius, near, far = _box_blur(*field["blur"])
    put(BEFORE, before, *field["grayscale"], radius, near, far, *field["solarize"])

    blurred = radius >= 0
    programs = [
        -(-height // ROWS) * tiles,
        -(-size // ROWS) * tiles,
        np.where(blurred | (before < 4), -(-size // STRIP_ROWS), 0),
        np.where(blurred, tiles, 0),
    ]
    put(HORIZONTAL, *(_offsets(counts)[0] for counts in programs))
    return table, programs, all_weights, all_scratch


def multi_crop(images: list[Tensor], parameters: Tensor, out: list[Tensor]) -> None:
    """Make every view of every image: out[v][b] from images[b] by parameters[b, v].

    `images` are uint8 (height, width, 3 or 4), `out` uint8 (B, 3, size, size), all contiguous and on one
    device. `parameters` are float64 (B, V, FIELDS) on the CPU, see multi_crop_row.py. Raises ValueError where
    a view has contrast twice.
    """
    if not images or not out:
        return
    given = parameters.numpy().reshape(-1, parameters.shape[-1])
    table, programs, all_weights, all_scratch = _table(images, given, out)
    lengths = [int(counts.sum()) for counts in programs]
    device = images[0].device
    # one transfer, from pinned memory, so that nothing waits for it
    host = torch.empty(2 * table.size + sum(lengths), dtype=torch.int32, pin_memory=device.type == "cuda")
    host.numpy()[: 2 * table.size] = table.ravel().view(np.int32)
    views = np.arange(len(table), dtype=np.int32)
    np.concatenate([np.repeat(views, counts) for counts in programs], out=host.numpy()[2 * table.size :])
    rows, *lists = host.to(device, non_blocking=True).split([2 * table.size, *lengths])
    rows = rows.view(torch.int64)

    weights = torch.empty(all_weights, dtype=torch.int32, device=device)
    scratch = torch.empty(all_scratch, dtype=torch.uint8, device=device)
    sums = torch.empty(lengths[1], dtype=torch.int32, device=device)
    tile = {"ROWS": ROWS, "COLUMNS": COLUMNS}
    strip = {"ROWS": STRIP_ROWS, "COLUMNS": COLUMNS}
    # fused, a multiplication and an addition would be rounded once where Pillow's are rounded twice
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    colors = {"num_warps": COLOR_WARPS, "enable_fp_fusion": False}
    blocks = triton.cdiv(max(x.shape[-1] for x in out) + COLUMNS - 1, BLOCK)
    with torch.cuda.device_of(out[0]):
        weights_kernel[(2 * len(table), blocks)](weights, rows, BLOCK=BLOCK, COLUMNS=COLUMNS, **options)
        horizontal_kernel[(lengths[0],)](scratch, images[0], weights, rows, lists[0], **tile, **options)
        vertical_kernel[(lengths[1],)](out[0], sums, scratch, weights, rows, lists[1], **tile, **colors)
        if lengths[2]:
            color_kernel[(lengths[2],)](
                out[0], scratch, sums, rows, lists[2], **strip, ROWS_SUMMED=ROWS, **colors
            )
        if lengths[3]:
            blur_kernel[(lengths[3], 3)](out[0], scratch, rows, lists[3], **strip, **options)
