"""Attention of packed images against softmax(q k^T) v of each image; how it chooses and compiles."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor

from fastdino.ops import packed_attention
from fastdino.ops.packed_attention import PLAIN_SCORES, Packing, attention, class_attention, packing
from fastdino.vit import VisionTransformer

CUDA = torch.cuda.is_available()

CPU = torch.device("cpu")

RUNS = ((4, 1), (3, 37), (2, 50), (0, 9), (2, 197), (1, 785), (1, 37))
LENGTHS = [tokens for images, tokens in RUNS for _ in range(images)]
HEADS, DIM = 3, 16


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of one image: q (M, heads, d), k and v (N, heads, d)."""
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdim=True), v)


def plain_attention(qkv: Tensor) -> Tensor:
    return torch.cat([formula(*image.unbind(1)) for image in qkv.split(LENGTHS)])


def plain_class_attention(q: Tensor, kv: Tensor) -> Tensor:
    pairs = zip(q.split(1), kv.split(LENGTHS), strict=True)
    return torch.cat([formula(one, *image.unbind(1)) for one, image in pairs])


def random_qkv(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(sum(LENGTHS), 3, HEADS, DIM).to(dtype)


def run(f: Callable[..., Tensor], inputs: tuple[Tensor, ...], upstream: Tensor) -> list[Tensor]:
    """The value, and the gradient of each input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = f(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def assert_each_image_as_accurate(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Image by image, if there are all their tokens: an error in a short one would be nothing beside the
    long ones. Class tokens, one an image, together: the gradient of an only token's query is 0."""
    assert ours.shape == truth.shape
    eps, lengths = torch.finfo(ours.dtype).eps, LENGTHS if len(truth) > len(LENGTHS) else [len(truth)]
    for i, (a, b, true) in enumerate(zip(*(x.split(lengths) for x in (ours, plain, truth)), strict=True)):
        error, allowed = (a.double() - true).norm(), (b.double() - true).norm()
        # An only token's q and k have differences of equals for gradients, which the plain form alone, by
        # order of its operations, computes without an error.
        roundings = 2 if true.shape[:2] == (1, 3) or true.shape[:2] == (1, 2) else 1
        assert error <= 2 * allowed + roundings * eps * true.norm(), f"image {i}"


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", ["auto", "sdpa"])
def test_attention_is_the_formula_of_each_image_in_value_and_gradient(impl: str, dtype: torch.dtype) -> None:
    assert PLAIN_SCORES in range(197**2, 785**2)  # both forms of half precision on a CPU
    qkv, upstream = random_qkv(dtype), torch.randn(sum(LENGTHS), HEADS, DIM).to(dtype)
    ours = run(lambda x: attention(x, RUNS, impl), (qkv,), upstream)
    # The plain form in the same dtype: what official DINO computes under autocast.
    plain, truth = (run(plain_attention, (x,), upstream) for x in (qkv, qkv.double()))
    for a, b, true in zip(ours, plain, truth, strict=True):
        assert a.dtype == dtype
        assert_each_image_as_accurate(a, b, true)


@pytest.mark.parametrize("dtype", DTYPES)
def test_class_attention_is_the_first_rows_in_value_and_gradient(dtype: torch.dtype) -> None:
    q, kv = torch.randn(len(LENGTHS), HEADS, DIM).to(dtype), random_qkv(dtype)[:, 1:]
    upstream = torch.randn(len(LENGTHS), HEADS, DIM).to(dtype)
    packed = packing(RUNS, "sdpa", CPU)
    ours = run(lambda q, kv: class_attention(q, kv, packed), (q, kv), upstream)
    plain = run(plain_class_attention, (q, kv), upstream)
    truth = run(plain_class_attention, (q.double(), kv.double()), upstream)
    for a, b, true in zip(ours, plain, truth, strict=True):
        assert a.dtype == dtype
        assert_each_image_as_accurate(a, b, true)


def test_class_attention_is_what_attention_gives_the_class_tokens() -> None:
    qkv, packed = random_qkv(), packing(RUNS, "sdpa", CPU)
    first = torch.tensor([0, *LENGTHS]).cumsum(0)[:-1]
    ours = class_attention(qkv[first, 0], qkv[:, 1:], packed)
    torch.testing.assert_close(ours, attention(qkv, packed)[first], rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),  # heads before tokens
        lambda x: torch.cat((x, x), dim=-1)[..., :DIM],  # of a wider tensor
        lambda x: x.mT.contiguous().mT,
        lambda x: x.repeat_interleave(2, dim=0)[::2],
    ],
)
def test_strides_of_queries_keys_and_values_do_not_matter(strided: Callable[[Tensor], Tensor]) -> None:
    qkv, upstream = random_qkv(), torch.randn(sum(LENGTHS), HEADS, DIM)
    assert not strided(qkv).is_contiguous()
    assert torch.equal(strided(qkv), qkv)
    ours = run(lambda x: attention(strided(x), RUNS), (qkv,), upstream)
    truth = run(plain_attention, (qkv,), upstream)
    packed, q = packing(RUNS, "sdpa", CPU), torch.randn(len(LENGTHS), HEADS, DIM).double()
    ours += run(lambda q, x: class_attention(q, strided(x)[:, 1:], packed), (q, qkv), upstream[: len(q)])
    truth += run(lambda q, x: plain_class_attention(q, x[:, 1:]), (q, qkv), upstream[: len(q)])
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_weights_are_written_out_in_half_precision_alone_and_in_pieces_for_long_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[tuple[torch.dtype, int, int]] = []
    ref = packed_attention.attention_ref

    def spy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        written.append((k.dtype, len(k), k.shape[-2]))
        return ref(q, k, v)

    monkeypatch.setattr(packed_attention, "attention_ref", spy)
    monkeypatch.setattr(packed_attention, "PIECE_SCORES", 2 * 257**2)
    runs = ((5, 256), (5, 257))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        attention(torch.randn(5 * (256 + 257), 3, 1, 8).to(dtype), runs)
    half = [[(dtype, 5, 256), *[(dtype, n, 257) for n in (2, 2, 1)]] for dtype in DTYPES[1:]]
    assert written == half[0] + half[1]


@pytest.mark.parametrize("images", [1, 3, 5])
def test_pieces_are_a_proper_operator_and_the_formula_at_any_size(
    images: int, monkeypatch: pytest.MonkeyPatch, poison: None
) -> None:
    monkeypatch.setattr(packed_attention, "PIECE_SCORES", 2 * 3 * 7 * 9)
    q, k, v = (torch.randn(images, 3, n, d).bfloat16().requires_grad_() for n, d in ((7, 8), (9, 8), (9, 5)))
    torch.library.opcheck(packed_attention.attention_pieces, (q, k, v))
    upstream = torch.randn(images, 3, 7, 5).bfloat16()
    ours = run(packed_attention.attention_pieces, (q, k, v), upstream)
    plain = run(packed_attention.attention_ref, (q, k, v), upstream)
    truth = run(packed_attention.attention_ref, (q.double(), k.double(), v.double()), upstream)
    for a, b, true in zip(ours, plain, truth, strict=True):
        assert a.dtype == torch.bfloat16
        error, allowed = ((x.double() - true).norm() for x in (a, b))
        assert error <= 2 * allowed + torch.finfo(torch.bfloat16).eps * true.norm()


def test_a_sequence_of_no_images_has_no_attention() -> None:
    packed = packing(((0, 5),), "sdpa", CPU)
    assert attention(torch.zeros(0, 3, 2, 8), packed).shape == (0, 2, 8)
    assert class_attention(torch.zeros(0, 2, 8), torch.zeros(0, 2, 2, 8), packed).shape == (0, 2, 8)


@pytest.mark.parametrize("shape", [(9, 3, 2, 8), (11, 3, 2, 8), (10, 2, 2, 8), (10, 3, 16), (1, 10, 3, 2, 8)])
def test_a_sequence_that_does_not_fit_its_runs_is_named(shape: tuple[int, ...]) -> None:
    given = ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"qkv of shape \({given}\): .*\(2, 5\).* wants \(10, 3, heads, "):
        attention(torch.zeros(shape), [(2, 5)])


@pytest.mark.parametrize("impl", ["flash", "SDPA", ""])
def test_an_unknown_implementation_is_named(impl: str) -> None:
    with pytest.raises(
        ValueError, match=f"attention impl '{impl}': choose from auto, sdpa, varlen, xformers"
    ):
        attention(torch.zeros(10, 3, 2, 8), [(2, 5)], impl)


@pytest.mark.parametrize(
    ("impl", "module", "message"),
    [
        (
            "xformers",
            "xformers",
            r"'xformers' cannot run: xformers is not installed: pip install 'fastdino\[",
        ),
        (
            "varlen",
            "torch.nn.attention.varlen",
            "'varlen' cannot run: torch .* has no torch.nn.attention.var",
        ),
    ],
)
def test_an_implementation_that_is_not_installed_is_named(
    impl: str, module: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(packed_attention, "find_spec", asked.append)  # which gives None
    with pytest.raises(ValueError, match=message):
        attention(torch.zeros(10, 3, 2, 8), [(2, 5)], impl)
    assert asked == [module]


def test_importing_the_operations_loads_no_xformers_and_says_nothing() -> None:
    script = "import sys, fastdino.ops, fastdino.vit; print([m for m in sys.modules if 'xformers' in m])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (out.stdout.strip(), out.stderr) == ("[]", "")


# The packed kernels run on GPUs alone: here a formula takes the place of each, and what it is given.


def ref_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
) -> Tensor:
    assert not options
    for x, offsets, longest in ((q, cu_q, max_q), (k, cu_k, max_k), (v, cu_k, max_k)):
        assert offsets.dtype == torch.int32
        assert (offsets[0], offsets[-1]) == (0, len(x))
        assert longest == offsets.diff().max()
    q_ends, k_ends = cu_q.tolist(), cu_k.tolist()
    assert len(q_ends) == len(k_ends)
    pairs = zip(q_ends[:-1], q_ends[1:], k_ends[:-1], k_ends[1:], strict=True)
    return torch.cat([formula(q[a:b], k[c:d], v[c:d]) for a, b, c, d in pairs])


def ref_memory_efficient(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any) -> Tensor:
    assert type(attn_bias).__name__ == "BlockDiagonalMask"
    (_, m, heads, d), n = q.shape, k.shape[1]
    assert (q.shape[0], k.shape, v.shape) == (1, (1, n, heads, d), (1, n, heads, d))
    bias = attn_bias.materialize((1, heads, m, n), dtype=q.dtype)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / d**0.5 + bias
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


@pytest.fixture(params=["varlen", "xformers"])
def one_launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[int]]:
    """An implementation with its kernel replaced by the formula, and the number of its calls."""
    calls = [0]

    def counted(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            calls[0] += 1
            return f(*args, **kwargs)

        return call

    if request.param == "varlen":
        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", counted(ref_varlen))
    else:
        xformers = pytest.importorskip("xformers.ops")
        monkeypatch.setattr(xformers, "memory_efficient_attention", counted(ref_memory_efficient))
    return request.param, calls


def test_one_launch_over_all_images_keeps_each_to_itself(one_launch: tuple[str, list[int]]) -> None:
    impl, calls = one_launch
    qkv, upstream = random_qkv(), torch.randn(sum(LENGTHS), HEADS, DIM)
    ours = run(lambda x: attention(x, RUNS, impl), (qkv,), upstream)
    truth = run(lambda x: attention(x, RUNS, "sdpa"), (qkv,), upstream)
    assert calls == [1]
    q, packed = torch.randn(len(LENGTHS), HEADS, DIM).double(), packing(RUNS, impl, CPU)
    sdpa, upstream = packing(RUNS, "sdpa", CPU), upstream[: len(LENGTHS)]
    ours += run(lambda q, x: class_attention(q, x[:, 1:], packed), (q, qkv), upstream)
    truth += run(lambda q, x: class_attention(q, x[:, 1:], sdpa), (q, qkv), upstream)
    assert calls == [2]
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("patches", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_network_gives_the_same_with_one_launch(
    one_launch: tuple[str, list[int]], rate: float, patches: bool
) -> None:
    """With stochastic depth, which packs anew for each branch; its last block asks for class tokens."""
    impl, calls = one_launch
    network = VisionTransformer(16, 4, embed_dim=16, depth=3, num_heads=2, drop_path_rate=rate).double()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    images = [torch.randn(n, 3, *size).double() for n, *size in ((4, 16, 16), (5, 8, 12), (2, 16, 16))]

    def values() -> list[Tensor]:
        torch.manual_seed(1)
        network.zero_grad()
        out = network(images, return_patches=patches)
        out = torch.cat([x.flatten() for x in (out[0], *out[1])]) if patches else out
        out.square().sum().backward()
        return [out.detach(), *(p.grad for p in network.parameters())]

    expected = values()
    assert calls == [0]
    network.attention_impl = impl
    for a, b in zip(values(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert calls == [3]


def test_what_a_packing_puts_on_the_device_is_kept() -> None:
    first = packing(RUNS, "varlen", CPU)
    assert packing(RUNS, "varlen", CPU) is first
    assert first.offsets is not None
    assert first.offsets.tolist() == [0, 1, 2, 3, 4, 41, 78, 115, 165, 215, 412, 609, 1394, 1431]
    assert first.longest == 785
    assert packing(((2, 5),), "varlen", CPU).longest == 5
    assert packing(((0, 5),), "varlen", CPU)[2:4] == (torch.zeros(1, dtype=torch.int32), 0)


def test_auto_is_sdpa_but_in_half_precision_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(packed_attention, "_fastest", lambda *args: asked.append(args) or "varlen")
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert packed_attention.choose(RUNS, HEADS, DIM, dtype, CPU) == "sdpa"
    cuda = torch.device("cuda")
    for dtype in (torch.float32, torch.float64):
        assert packed_attention.choose(RUNS, HEADS, DIM, dtype, cuda) == "sdpa"
    assert asked == []
    for dtype in (torch.bfloat16, torch.float16):
        assert packed_attention.choose(RUNS, HEADS, DIM, dtype, cuda) == "varlen"
    assert asked == [(RUNS, HEADS, DIM, dtype, cuda) for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(
    ("times", "absent", "expected"),
    [
        ({"sdpa": 1.0, "varlen": 2.0, "xformers": 3.0}, "", "sdpa"),
        ({"sdpa": 2.0, "varlen": 1.0, "xformers": 3.0}, "", "varlen"),
        ({"sdpa": 3.0, "varlen": 2.0, "xformers": 1.0}, "", "xformers"),
        ({"sdpa": 3.0, "varlen": 1.0, "xformers": 2.0}, "varlen", "xformers"),
        ({"sdpa": 3.0, "varlen": 2.0, "xformers": NotImplementedError}, "", "varlen"),
        ({"sdpa": 3.0, "varlen": RuntimeError, "xformers": ValueError}, "", "sdpa"),
        ({"sdpa": 3.0, "varlen": ImportError, "xformers": AttributeError}, "", "sdpa"),
        ({"sdpa": torch.OutOfMemoryError, "varlen": RuntimeError, "xformers": ValueError}, "", "sdpa"),
    ],
)
def test_the_fastest_is_taken_of_those_that_run(
    times: dict[str, Any], absent: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU with the clock replaced: once for each set of sizes, and no random number of the run's."""
    ran: list[str] = []

    def clock(f: Callable[[], None]) -> float:
        f()
        if isinstance(times[ran[-1]], float):
            return times[ran[-1]]
        raise times[ran[-1]]

    missing = packed_attention.missing
    monkeypatch.setattr(
        packed_attention, "missing", lambda impl: "absent" if impl == absent else missing(impl)
    )
    monkeypatch.setattr(packed_attention, "_packing", lambda runs, impl, device: Packing(runs, impl))
    monkeypatch.setattr(packed_attention, "_forward_backward", lambda qkv, packed: ran.append(packed.impl))
    monkeypatch.setattr(packed_attention, "_milliseconds", clock)
    monkeypatch.setattr(packed_attention, "find_spec", lambda name: name)
    packed_attention._fastest.cache_clear()
    state = torch.get_rng_state()
    for _ in range(2):
        assert packed_attention._fastest(((2, 5),), 2, 8, torch.bfloat16, CPU) == expected
    packed_attention._fastest.cache_clear()
    assert ran == [impl for impl in times if impl != absent]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_clock_runs_attention_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under no_grad, as the teacher's first forward is, with what the trial kept forgotten."""
    qkv, seen = torch.randn(22, 3, 2, 8), []
    monkeypatch.setattr(packed_attention, "attention", lambda x, packed: seen.append(x) or x[:, 2] * 2)
    with torch.no_grad():
        packed_attention._forward_backward(qkv, packing(((2, 5), (3, 4)), "sdpa", CPU))
    assert seen[0].requires_grad
    assert seen[0].grad is None
    assert not qkv.requires_grad


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_attention_compiles_without_a_graph_break(backend: str) -> None:
    runs = ((2, 5), (3, 4))
    packed, qkv = packing(runs, "sdpa", CPU), torch.randn(22, 3, 2, 8)

    def both(qkv: Tensor, q: Tensor, packed: Packing) -> Tensor:
        return torch.cat((attention(qkv, packed), class_attention(q, qkv[:, 1:], packed)))

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend=backend)
    inputs, upstream = (qkv, torch.randn(5, 2, 8)), torch.randn(27, 2, 8)
    ours, expected = (run(lambda *x, f=f: f(*x, packed), inputs, upstream) for f in (compiled, both))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_varlen_compiles_to_one_graph_with_its_kernel_in_it() -> None:
    """Traced alone: there is no kernel for the CPU, so that the graph's outputs here are zeros."""
    graphs: list[Any] = []

    def backend(module: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        graphs.append(module.graph)
        (output,) = module.graph.find_nodes(op="output")
        shapes = [
            (tuple(x.meta["example_value"].shape), x.meta["example_value"].dtype) for x in output.args[0]
        ]
        return lambda *args: tuple(torch.zeros(shape, dtype=dtype) for shape, dtype in shapes)

    runs = ((2, 5), (3, 4))
    packed, qkv = packing(runs, "varlen", CPU), torch.randn(22, 3, 2, 8).bfloat16()
    torch._dynamo.reset()
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would ask for the GPU's properties
    try:
        whole = torch.compile(attention, fullgraph=True, backend=backend)(qkv, packed)
        first = torch.compile(class_attention, fullgraph=True, backend=backend)(
            qkv[:5, 0], qkv[:, 1:], packed
        )
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
    assert (whole.shape, first.shape, first.dtype) == ((22, 2, 8), (5, 2, 8), torch.bfloat16)
    assert len(graphs) == 2
    longest = []
    for graph in graphs:
        (node,) = (n for n in graph.nodes if "_varlen_attn" in str(n.target))
        assert str(node.target) == "torch_attn._varlen_attn"
        longest.append(node.args[5:7])
    assert longest == [(5, 5), (1, 5)]


def on_gpu(impl: str) -> None:
    if not CUDA:
        pytest.skip("needs a CUDA GPU")
    if reason := packed_attention.missing(impl):
        pytest.skip(reason)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", packed_attention.IMPLS)
def test_on_a_gpu_it_is_the_formula_of_each_image(impl: str, dtype: torch.dtype) -> None:
    on_gpu(impl)
    runs = tuple(run for run in RUNS if run[0])
    qkv = torch.randn(sum(LENGTHS), 3, HEADS, 64).to(dtype).cuda()
    upstream = torch.randn(sum(LENGTHS), HEADS, 64).to(dtype).cuda()
    ours = run(lambda x: attention(x, runs, impl), (qkv,), upstream)
    plain, truth = (run(plain_attention, (x,), upstream) for x in (qkv, qkv.double()))
    for a, b, true in zip(ours, plain, truth, strict=True):
        assert_each_image_as_accurate(a, b, true)
    q, kv, upstream = qkv[: len(LENGTHS), 0], qkv[:, 1:], upstream[: len(LENGTHS)]
    packed = packing(runs, impl, qkv.device)
    ours = run(lambda q, kv: class_attention(q, kv, packed), (q, kv), upstream)
    plain = run(plain_class_attention, (q, kv), upstream)
    truth = run(plain_class_attention, (q.double(), kv.double()), upstream)
    for a, b, true in zip(ours, plain, truth, strict=True):
        assert_each_image_as_accurate(a, b, true)


@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("impl", ["auto", *packed_attention.IMPLS])
def test_on_a_gpu_a_network_gives_the_same_with_each(impl: str, compiled: bool) -> None:
    on_gpu("sdpa" if impl == "auto" else impl)
    if compiled and impl == "xformers":
        pytest.skip("it breaks the graph")
    vit = VisionTransformer(32, 4, embed_dim=128, depth=3, num_heads=2, drop_path_rate=0.3).cuda()
    crops = [torch.randn(4, 3, 32, 32).cuda(), torch.randn(12, 3, 16, 16).cuda()]
    found = []
    for its, mode in (("sdpa", False), (impl, compiled)):
        vit.attention_impl = its
        if mode:
            for block in vit.blocks:
                block.compile(dynamic=True)
        torch.manual_seed(0)
        with torch.autocast("cuda", torch.bfloat16):
            found.append(vit(crops))
    assert (found[1] - found[0]).norm() < 0.02 * found[0].norm()
