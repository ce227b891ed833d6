"""DINO loss in Triton, forward and backward. Formulas and letters: fastdino/ops/dino_loss.py.

The columns are cut into tiles. A program holds the teacher's probabilities of a tile in registers and takes
all crops of an image past them, so each is computed once. Forward: every tile yields maximum, sum and <q, x>
relative to its own maxima (`tile_kernel`); `merge_kernel` puts the tiles of a row together, `finish_kernel`
the rows and the teacher's column sums. All in a fixed order: results repeat bit by bit.
"""
# mypy: disable-error-code="no-untyped-def"
# (Triton reads the annotations of a kernel as its own types.)

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdino.ops import native

WARPS = 2  # of 32 threads: few that wait for one another at each sum over a tile
LOWEST = tl.constexpr(-3.0e38)  # a finite reference for rows of -inf
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _temperature(temp, on_device: tl.constexpr):
    return tl.load(temp) if on_device else temp


@triton.jit
def _weights(pair_weights, v, g, G: tl.constexpr, given: tl.constexpr):
    # official DINO's weights need no memory
    return (
        tl.load(pair_weights + v * G + g, mask=g < G, other=0.0)
        if given
        else tl.where((g < G) & (g != v), 1.0, 0.0)
    )


@triton.jit(do_not_specialize=["B", "group"])
def tile_kernel(
    student_top,  # (B, V, tiles)
    student_sum,  # (B, V, tiles)
    teacher_top,  # (B, G, tiles)
    teacher_sum,  # (B, G, tiles)
    dot,  # (B, V, G, tiles)
    column_sum,  # (groups, K)
    student,  # (V, B, K)
    teacher,  # (G, B, K)
    center,  # (K,)
    student_temp,
    teacher_temp,
    student_crop,
    student_image,
    teacher_crop,
    teacher_image,
    B,
    group,
    V: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    G_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    TEMPS_ON_DEVICE: tl.constexpr,
):
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    first = tl.program_id(1).to(tl.int64) * group
    student_scale = LOG2E / _temperature(student_temp, TEMPS_ON_DEVICE)
    teacher_scale = LOG2E / _temperature(teacher_temp, TEMPS_ON_DEVICE)
    k = tile * TILE + tl.arange(0, TILE)[None, :]
    g = tl.arange(0, G_PADDED)[:, None]
    inside = k < K
    crop = tl.arange(0, G_PADDED)
    c = tl.load(center + k, mask=inside, other=0.0)
    columns = tl.zeros([1, TILE], tl.float32)
    for i in range(tl.minimum(group, B - first)):
        image = first + i
        row = student + image * student_image
        x = tl.load(row + k, mask=inside, other=-float("inf"))
        t = tl.load(
            teacher + g.to(tl.int64) * teacher_crop + image * teacher_image + k,
            mask=inside & (g < G),
            other=-float("inf"),
        ).to(tl.float32)
        columns += tl.sum(tl.where(g < G, t, 0.0), axis=0)[None, :]
        u = t - c
        top = tl.maximum(tl.max(u, axis=1), LOWEST)
        e = tl.exp2((u - top[:, None]) * teacher_scale)
        at = (image * G + crop) * tiles + tile
        tl.store(teacher_top + at, top, mask=crop < G)
        tl.store(teacher_sum + at, tl.sum(e, axis=1), mask=crop < G)
        for v in range(V):
            # the next crop's logits travel while this one's are worked on
            row += student_crop
            ahead = tl.load(row + k, mask=inside & (v + 1 < V), other=-float("inf"))
            s = x.to(tl.float32)
            s_top = tl.maximum(tl.max(s), LOWEST)
            shifted = s - s_top
            total = tl.sum(tl.exp2(shifted * student_scale))
            dots = tl.sum(e * tl.where(inside, shifted, 0.0), axis=1)
            line = image * V + v
            tl.store(student_top + line * tiles + tile, s_top)
            tl.store(student_sum + line * tiles + tile, total)
            tl.store(dot + (line * G + crop) * tiles + tile, dots, mask=crop < G)
            x = ahead
    tl.store(column_sum + tl.program_id(1).to(tl.int64) * K + k, columns, mask=inside)


@triton.jit(do_not_specialize=["B"])
def merge_kernel(
    losses,  # (B, V)
    student_stats,  # (2, V, B)
    teacher_stats,  # (2, G, B)
    student_top,
    student_sum,
    teacher_top,
    teacher_sum,
    dot,
    pair_weights,  # (V, G)
    student_temp,
    teacher_temp,
    B,
    tiles,
    V: tl.constexpr,
    G: tl.constexpr,
    G_PADDED: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    TEMPS_ON_DEVICE: tl.constexpr,
    WEIGHTS_GIVEN: tl.constexpr,
):
    b, v = tl.program_id(0).to(tl.int64), tl.program_id(1)
    student_temp = _temperature(student_temp, TEMPS_ON_DEVICE)
    teacher_scale = LOG2E / _temperature(teacher_temp, TEMPS_ON_DEVICE)
    t = tl.arange(0, TILES_PADDED)[None, :]
    g = tl.arange(0, G_PADDED)[:, None]
    crop = tl.arange(0, G_PADDED)
    known = (t < tiles) & (g < G)
    at = (b * G + g) * tiles + t
    tops = tl.load(teacher_top + at, mask=known, other=LOWEST)
    top = tl.max(tops, axis=1)
    to_q = tl.exp2((tops - top[:, None]) * teacher_scale)  # what turns a tile's sums into the row's
    mass = tl.load(teacher_sum + at, mask=known, other=0.0) * to_q
    total = tl.sum(mass, axis=1)
    to_q, mass = to_q / total[:, None], mass / total[:, None]
    if v == 0:
        tl.store(teacher_stats + crop * B + b, top, mask=crop < G)
        tl.store(teacher_stats + (G + crop) * B + b, total, mask=crop < G)

    line = b * V + v
    s_tops = tl.load(student_top + line * tiles + t, mask=t < tiles, other=LOWEST)
    s_top = tl.max(s_tops)
    sums = tl.load(student_sum + line * tiles + t, mask=t < tiles, other=0.0)
    s_total = tl.sum(sums * tl.exp2((s_tops - s_top) * (LOG2E / student_temp)))
    log_sum = tl.log(s_total)
    tl.store(student_stats + v * B + b, s_top)
    tl.store(student_stats + (V + v) * B + b, s_total)

    # log_sum - <q, x - max>, tile by tile
    dots = tl.load(dot + (line * G + g) * tiles + t, mask=known, other=0.0)
    inner = tl.sum(tl.where(known, to_q * dots + mass * (s_tops - s_top), 0.0), axis=1)
    weight = _weights(pair_weights, v, crop, G, WEIGHTS_GIVEN)
    pairs = tl.where(
        weight == 0, 0.0, weight * (log_sum - inner / student_temp)
    )  # what is left out may be NaN
    tl.store(losses + line, tl.sum(pairs))


@triton.jit(do_not_specialize=["B", "groups"])
def finish_kernel(
    loss,  # ()
    teacher_mean,  # (K,)
    losses,
    column_sum,
    pair_weights,
    B,
    groups,
    V: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    G_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTS_GIVEN: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.zeros([BLOCK], tl.float32)
    for _ in range(groups):
        columns += tl.load(column_sum + k, mask=k < K, other=0.0)
        column_sum += K
    tl.store(teacher_mean + k, columns / (B * G), mask=k < K)
    if tl.program_id(0) == 0:
        total = tl.zeros([BLOCK], tl.float64)
        for i in range(0, B * V, BLOCK):
            at = i + tl.arange(0, BLOCK)
            total += tl.load(losses + at, mask=at < B * V, other=0.0)
        n = _pairs(pair_weights, V, G, G_PADDED, WEIGHTS_GIVEN)
        tl.store(loss, (tl.sum(total) / (n * B)).to(tl.float32))


@triton.jit
def _pairs(pair_weights, V: tl.constexpr, G: tl.constexpr, G_PADDED: tl.constexpr, given: tl.constexpr):
    n = 0.0
    for v in range(V):
        n += tl.sum(_weights(pair_weights, v, tl.arange(0, G_PADDED), G, given))
    return n


@triton.jit(do_not_specialize=["B"])
def bwd_kernel(
    grad_student,  # (V, B, K)
    grad,  # ()
    student,
    teacher,
    center,
    student_stats,
    teacher_stats,
    pair_weights,
    student_temp,
    teacher_temp,
    grad_crop,
    grad_image,
    student_crop,
    student_image,
    teacher_crop,
    teacher_image,
    B,
    V: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    G_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    TEMPS_ON_DEVICE: tl.constexpr,
    WEIGHTS_GIVEN: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    student_temp = _temperature(student_temp, TEMPS_ON_DEVICE)
    student_scale = LOG2E / student_temp
    teacher_scale = LOG2E / _temperature(teacher_temp, TEMPS_ON_DEVICE)
    n = _pairs(pair_weights, V, G, G_PADDED, WEIGHTS_GIVEN)
    scale = tl.load(grad) / (n * B * student_temp)
    k = tl.program_id(0) * TILE + tl.arange(0, TILE)[None, :]
    g = tl.arange(0, G_PADDED)[:, None]
    inside = k < K
    row = student + b * student_image
    out = grad_student + b * grad_image
    x = tl.load(row + k, mask=inside, other=0.0)
    t = tl.load(
        teacher + g.to(tl.int64) * teacher_crop + b * teacher_image + k, mask=inside & (g < G), other=0.0
    ).to(tl.float32)
    u = t - tl.load(center + k, mask=inside, other=0.0)
    top = tl.load(teacher_stats + g * B + b, mask=g < G, other=0.0)
    # the sums stay factors: as logarithms in the exponent they would cost the digits of log2(K)
    share = scale / tl.load(teacher_stats + (G + g) * B + b, mask=g < G, other=1.0)
    q = tl.exp2((u - top) * teacher_scale) * share
    for v in range(V):
        row += student_crop
        ahead = tl.load(row + k, mask=inside & (v + 1 < V), other=0.0)
        s_top = tl.load(student_stats + v * B + b)
        s_share = scale / tl.load(student_stats + (V + v) * B + b)
        p = tl.exp2((x.to(tl.float32) - s_top) * student_scale)
        weight = _weights(pair_weights, v, g, G, WEIGHTS_GIVEN)
        taught = tl.sum(tl.where(weight == 0, 0.0, weight * q), axis=0)[None, :]
        own = tl.sum(weight)
        dx = tl.where(own == 0, 0.0, own * s_share * p - taught)
        tl.store(out + k, dx.to(grad_student.dtype.element_ty), mask=inside)
        out += grad_crop
        x = ahead


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _tile(crops: int) -> int:
    """Columns whose probabilities for this number of teacher crops stay in registers: 32 numbers a thread."""
    return max(64, 2048 // triton.next_power_of_2(crops))


def _temps(device: torch.device, *temps: Tensor) -> tuple[list[Any], bool]:
    """Numbers if the temperatures are on the CPU, where reading them waits for nothing; else pointers."""
    if all(t.device.type == "cpu" for t in temps):
        return [t.item() for t in temps], False
    return [t.to(device) for t in temps], True


def dino_loss_triton(
    results: tuple[Tensor, Tensor, Tensor, Tensor],  # written: what `dino_loss_ref` returns
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    pair_weights: Tensor | None,
) -> None:
    """`dino_loss_ref` in three launches."""
    student, teacher = native.contiguous_rows(student), native.contiguous_rows(teacher)
    center = center.contiguous()
    (V, B, K), G = student.shape, teacher.shape[0]
    tile = _tile(G)
    tiles = triton.cdiv(K, tile)
    # images share a program, and so a row of column sums, as far as eight programs a multiprocessor remain
    groups = min(B, triton.cdiv(8 * _processors(student.device), tiles))
    group = triton.cdiv(B, groups)
    groups = triton.cdiv(B, group)
    student_top, student_sum = center.new_empty(2, B, V, tiles)
    teacher_top, teacher_sum = center.new_empty(2, B, G, tiles)
    dot, column_sum = center.new_empty(B, V, G, tiles), center.new_empty(groups, K)
    losses = center.new_empty(B, V)
    loss, student_stats, teacher_stats, teacher_mean = results
    temps, on_device = _temps(student.device, student_temp, teacher_temp)
    sizes = {"V": V, "G": G, "G_PADDED": triton.next_power_of_2(G)}
    weights = {"WEIGHTS_GIVEN": pair_weights is not None}
    pair_weights = center if pair_weights is None else pair_weights.contiguous()
    partial = (student_top, student_sum, teacher_top, teacher_sum, dot)
    with torch.cuda.device_of(student):
        tile_kernel[(tiles, groups)](
            *partial,
            column_sum,
            student,
            teacher,
            center,
            *temps,
            *student.stride()[:2],
            *teacher.stride()[:2],
            B,
            group,
            **sizes,
            K=K,
            TILE=tile,
            TEMPS_ON_DEVICE=on_device,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
        merge_kernel[(B, V)](
            losses,
            student_stats,
            teacher_stats,
            *partial,
            pair_weights,
            *temps,
            B,
            tiles,
            **sizes,
            **weights,
            TILES_PADDED=triton.next_power_of_2(tiles),
            TEMPS_ON_DEVICE=on_device,
            num_warps=1,
            enable_fp_fusion=True,
        )
        finish_kernel[(triton.cdiv(K, 256),)](
            loss,
            teacher_mean,
            losses,
            column_sum,
            pair_weights,
            B,
            groups,
            **sizes,
            **weights,
            K=K,
            BLOCK=256,
            enable_fp_fusion=True,
        )


def dino_loss_bwd_triton(
    grad_student: Tensor,
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_temp: Tensor,
    teacher_temp: Tensor,
    pair_weights: Tensor | None,
    student_stats: Tensor,
    teacher_stats: Tensor,
) -> None:
    """`dino_loss_bwd_ref` in one launch; reads the upstream gradient on the device."""
    student, teacher = native.contiguous_rows(student), native.contiguous_rows(teacher)
    center = center.contiguous()
    (V, B, K), G = student.shape, teacher.shape[0]
    tile, out = _tile(G), grad_student if grad_student.stride(-1) == 1 else torch.empty_like(student)
    temps, on_device = _temps(student.device, student_temp, teacher_temp)
    with torch.cuda.device_of(student):
        bwd_kernel[(triton.cdiv(K, tile), B)](
            out,
            grad,
            student,
            teacher,
            center,
            student_stats,
            teacher_stats,
            center if pair_weights is None else pair_weights.contiguous(),
            *temps,
            *out.stride()[:2],
            *student.stride()[:2],
            *teacher.stride()[:2],
            B,
            V=V,
            G=G,
            K=K,
            G_PADDED=triton.next_power_of_2(G),
            TILE=tile,
            TEMPS_ON_DEVICE=on_device,
            WEIGHTS_GIVEN=pair_weights is not None,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    if out is not grad_student:
        grad_student.copy_(out)
