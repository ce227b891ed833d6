"""Self-attention, softmax(q k^T / sqrt(d)) v, within each image of a packed sequence.

A packed sequence holds the tokens of all images, one image after another. Its `runs` say how many successive
images have the same length: ((8, 197), (32, 37)) is 8 images of 197 tokens, then 32 of 37. Implementations:

    sdpa      torch's scaled_dot_product_attention, once a run; every device and dtype, compiles
    varlen    torch.nn.attention.varlen, all images in one launch; CUDA, bf16 and fp16, compiles
    xformers  memory_efficient_attention with a BlockDiagonalMask, one launch; CUDA, if installed
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IMPLS = ("sdpa", "varlen", "xformers")
Runs = tuple[tuple[int, int], ...]

# On a CPU, in half precision, torch 2.15's fused attention is slower than the matrix products of oneDNN: bf16
# forward and backward of 8 x 6 heads of 785 tokens took 125 ms, `attention_ref` 113, `attention_pieces` 67;
# of 197 tokens 15, 4 and 6 (two AVX-512 cores).
PLAIN_SCORES = 256 * 256  # of an image and head, up to which the weights are written out
PIECE_SCORES = 1 << 20  # at a time, above: they stay in the cache from one pass to the next


class Packing(NamedTuple):
    """Where the images of a packed sequence lie, in the form that an implementation wants; see `packing`."""

    runs: Runs
    impl: str
    offsets: Tensor | None = None
    """(images + 1,) int32: where each image begins, and the end. For varlen."""
    longest: int = 0
    masks: tuple[Any, Any] | None = None
    """xformers' BlockDiagonalMask from all tokens to all, and from the class tokens to all."""


def packing(runs: Runs, impl: str, device: torch.device) -> Packing:
    """The packing of `runs`, (images, tokens) each, for one implementation on a device.

    Call outside torch.compile. Packings are cached, since every step packs the same lengths.

    Raises:
        ValueError: an unknown implementation, or one that is not installed.
    """
    if impl == "sdpa":
        return Packing(runs, impl)
    if impl not in IMPLS:
        raise ValueError(f"attention impl {impl!r}: choose from auto, {', '.join(IMPLS)}")
    if reason := missing(impl):
        raise ValueError(f"attention impl {impl!r} cannot run: {reason}")
    return _packing(runs, impl, device)


@functools.lru_cache(maxsize=4096)  # stochastic depth asks for up to four a branch of each block
def _packing(runs: Runs, impl: str, device: torch.device) -> Packing:
    lengths = [tokens for images, tokens in runs for _ in range(images)]
    if impl == "xformers":
        mask = _xformers().fmha.attn_bias.BlockDiagonalMask.from_seqlens
        masks = (mask(lengths, device=device), mask([1] * len(lengths), lengths, device=device))
        return Packing(runs, impl, masks=masks)
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Packing(runs, impl, offsets.to(device), max(lengths, default=0))


def missing(impl: str) -> str:
    """Why an implementation is not installed; empty if it is."""
    if impl == "varlen" and not find_spec("torch.nn.attention.varlen"):
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if impl == "xformers" and not find_spec("xformers"):
        return "xformers is not installed: pip install 'fastdino[xformers]'"
    return ""


@functools.cache
def _xformers() -> Any:
    # It warns on import where its own kernels do not fit torch; those it takes here are torch's.
    logging.getLogger("xformers").setLevel(logging.ERROR)
    import xformers.ops

    return xformers.ops


def choose(runs: Runs, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """What "auto" runs: in half precision on a GPU the fastest, tried once on these sizes; else sdpa.

    Which is faster turns on the tokens, the GPU and the versions: one launch for all images saves little
    where a kernel's tile is larger than an image.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    return _fastest(runs, heads, head_dim, dtype, device)


@functools.cache
def _fastest(runs: Runs, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    total = sum(images * tokens for images, tokens in runs)
    # A generator of its own: the run's random numbers stay as they are.
    numbers = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(total, 3, heads, head_dim, dtype=dtype, device=device, generator=numbers)
    times = {}
    for impl in IMPLS:
        if missing(impl):
            continue
        try:
            packed = packing(runs, impl, device)
            times[impl] = _milliseconds(lambda: _forward_backward(qkv, packed))  # noqa: B023  called at once
        except (ValueError, RuntimeError, NotImplementedError, ImportError, AttributeError):
            continue  # installed, but not for this GPU or these sizes
    return min(times, key=lambda impl: times[impl], default="sdpa")


def _forward_backward(qkv: Tensor, packed: Packing) -> None:
    with torch.enable_grad():
        leaf = qkv.detach().requires_grad_()
        torch.autograd.grad(attention(leaf, packed), leaf, qkv[:, 0])


def _milliseconds(f: Callable[[], None]) -> float:
    """Median of seven, on the current CUDA stream, after two."""
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        f()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[2:])[3]


def attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The specification, of images of one length, weights written out: q (B, heads, M, d), k and v (B, heads,
    N, d) to (B, heads, M, d)."""
    # softmax accumulates in float32 and rounds once, whatever the dtype
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def _pieces(q: Tensor, k: Tensor) -> Iterator[slice]:
    images = max(1, PIECE_SCORES // (q.shape[1] * q.shape[2] * k.shape[2]))
    return (slice(i, i + images) for i in range(0, len(q), images))


@torch.library.custom_op("fastdino::attention_pieces", mutates_args=())
def attention_pieces(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention_ref` for a few images at a time, whose weights stay in the cache and are not kept."""
    out = _like(q, v.shape[-1])
    for i in _pieces(q, k):
        out[i] = attention_ref(q[i], k[i], v[i])
    return out


@torch.library.custom_op("fastdino::attention_pieces_backward", mutates_args=())
def _attention_pieces_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    dq, dk, dv = (_like(x, x.shape[-1]) for x in (q, k, v))
    for i in _pieces(q, k):
        scaled = q[i] * q.shape[-1] ** -0.5
        weights = (scaled @ k[i].transpose(-2, -1)).softmax(dim=-1)
        dv[i] = weights.transpose(-2, -1) @ grad[i]
        scores = torch._softmax_backward_data(grad[i] @ v[i].transpose(-2, -1), weights, -1, weights.dtype)
        dq[i] = (scores @ k[i]) * q.shape[-1] ** -0.5
        dk[i] = scores.transpose(-2, -1) @ scaled
    return [dq, dk, dv]


def _like(x: Tensor, channels: int) -> Tensor:
    """Memory for (B, heads, N, channels) that lies as (B, N, heads, channels), as what comes next wants."""
    images, heads, tokens, _ = x.shape
    return x.new_empty(images, tokens, heads, channels).transpose(1, 2)


attention_pieces.register_fake(lambda q, k, v: _like(q, v.shape[-1]))
_attention_pieces_backward.register_fake(lambda grad, *qkv: [_like(x, x.shape[-1]) for x in qkv])
attention_pieces.register_autograd(
    lambda ctx, grad: tuple(_attention_pieces_backward(grad, *ctx.saved_tensors)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _sdpa_run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        plain = q.shape[-2] * k.shape[-2] <= PLAIN_SCORES or torch.compiler.is_exporting()
        return attention_ref(q, k, v) if plain else attention_pieces(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def split_runs(x: Tensor, runs: Runs) -> list[Tensor]:
    """A packed sequence x (T, ...) as a view for each run, (images, tokens, ...)."""
    parts = x.split([images * tokens for images, tokens in runs])
    return [part.unflatten(0, run) for part, run in zip(parts, runs, strict=True)]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def class_tokens(x: Tensor, runs: Runs) -> Tensor:
    """The first token of each image of a packed sequence x (T, ...): (images, ...)."""
    return _join([part[:, 0] for part in split_runs(x, runs)])


def attention(qkv: Tensor, packed: Packing | Sequence[tuple[int, int]], impl: str = "auto") -> Tensor:
    """Attention within each image of a packed sequence.

    Args:
        qkv: queries, keys and values (T, 3, heads, d), T tokens in all; any floating dtype, any strides.
        packed: a `Packing`, or runs of (images, tokens) whose products sum to T.
        impl: "auto", "sdpa", "varlen" or "xformers"; not looked at where `packed` is a `Packing`, which
            says so itself.

    Returns:
        (T, heads, d), same dtype and device.

    Raises:
        ValueError: shapes that do not fit, or an implementation that cannot run.
    """
    if not isinstance(packed, Packing):
        runs = tuple((images, tokens) for images, tokens in packed)
        total = sum(images * tokens for images, tokens in runs)
        if qkv.ndim != 4 or qkv.shape[1] != 3 or qkv.shape[0] != total:
            raise ValueError(
                f"qkv of shape {tuple(qkv.shape)}: {runs} wants ({total}, 3, heads, channels a head)"
            )
        if impl == "auto":
            impl = choose(runs, qkv.shape[2], qkv.shape[3], qkv.dtype, qkv.device)
        packed = packing(runs, impl, qkv.device)
    if packed.impl == "sdpa":
        outs = []
        for part in split_runs(qkv, packed.runs):
            q, k, v = part.permute(2, 0, 3, 1, 4).unbind(0)
            outs.append(_sdpa_run(q, k, v).transpose(1, 2).flatten(0, 1))
        return _join(outs)
    q, k, v = qkv.unbind(1)
    return _packed(q, k, v, packed, packed.offsets, packed.longest, 0)


def class_attention(q: Tensor, kv: Tensor, packed: Packing) -> Tensor:
    """What the class token of each image attends to: q (images, heads, d) over kv (T, 2, heads, d).

    The last block needs no more where its class tokens alone are used. Returns (images, heads, d).
    """
    if packed.impl == "sdpa":
        outs = []
        queries = q.split([images for images, _ in packed.runs])
        for query, part in zip(queries, split_runs(kv, packed.runs), strict=True):
            k, v = part.permute(2, 0, 3, 1, 4).unbind(0)
            outs.append(_sdpa_run(query[:, :, None], k, v)[:, :, 0])
        return _join(outs)
    k, v = kv.unbind(1)
    first = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    return _packed(q, k, v, packed, first, 1, 1)


def _packed(
    q: Tensor, k: Tensor, v: Tensor, packed: Packing, offsets: Tensor | None, longest: int, mask: int
) -> Tensor:
    """One launch over all images; offsets and longest are the queries', mask says which of xformers' two."""
    if packed.impl == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q, k, v, offsets, packed.offsets, longest, packed.longest)  # type: ignore
    assert packed.masks is not None
    bias = packed.masks[mask]
    return _xformers().memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]
