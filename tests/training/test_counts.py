"""Counts that do not hang on the machine's mood, against recorded ones: here a change's cost shows first.

Of an update of a run: operator calls, new tensors, waits for the device. Of the operations: what they keep
for the backward pass, launches on a GPU, graphs under torch.compile, the native kernels' instructions. A
count that differs need not be an error: where the change is worth it, record the new one here, and give the
reason in the commit message. (The graphs of a run with compiled blocks are counted in test_train.py.)
"""

import copy
import importlib
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tiny import make_config, make_images
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdino import DINOLoss, ops, train
from fastdino.data.crops import View, encode
from fastdino.data.feed import Feed, Piece
from fastdino.dino import DINO
from fastdino.ops import native
from fastdino.ops.ema import _ema_

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
ONEDNN = native.ONEDNN


def expect(found: dict[str, int], recorded: dict[str, int], what: str) -> None:
    changed = [
        f"    {name}: {recorded.get(name, 0):,} recorded, {found.get(name, 0):,} found"
        for name in sorted(found | recorded)
        if found.get(name, 0) != recorded.get(name, 0)
    ]
    if changed:
        pytest.fail(
            f"{what}:\n" + "\n".join(changed) + f"\nIf that is worth it, record it in {Path(__file__).name} "
            "and give the reason in the commit message.",
            pytrace=False,
        )


def expect_about(found: dict[str, int], recorded: dict[str, int], what: str) -> None:
    """`expect` of the counts that are found, within a hundredth."""
    off = {name: n for name, n in found.items() if abs(n - recorded[name]) > WITHIN * recorded[name]}
    expect(off, {name: recorded[name] for name in off}, what)


# Of one update of the tiny run, on a CPU: operator calls, each on a GPU one launch or several (views launch
# nothing and are left out), and bytes of the memory that operators return. What a fastdino operator does
# within is not seen. "logged" is what an update adds that logs: the diagnostics, the distance of the teacher
# tensor by tensor. The same from torch 2.11 to 2.15, and at any number of threads.
RECORDED: dict[str, dict[str, int]] = {
    "fp32": {"calls": 378, "bytes": 45_849_524, "logged calls": 173, "logged bytes": 3_298_944},
    "fp32-onednn": {"calls": 393, "bytes": 47_494_068, "logged calls": 173, "logged bytes": 3_298_944},
    "bf16": {"calls": 752, "bytes": 42_217_620, "logged calls": 175, "logged bytes": 3_305_084},
}
WITHIN = 0.01  # a change that is smaller needs no record
Run = tuple[list[Counter[str]], dict[str, int]]
LOG_EVERY = 4


class Calls(TorchDispatchMode):
    """Of each step, the operators called, those of autograd and the optimiser too, and what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Counter[str]] = []
        self.on = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.on or func.namespace == "profiler":
            return out
        step = self.steps[-1]
        step["calls"] += not func.is_view
        if func._schema.name == "aten::_local_scalar_dense":
            step["waits"] += 1
        given = {memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = {memory(x): x for x in tree_leaves(out) if isinstance(x, Tensor)}
        step["bytes"] += sum(made[key].untyped_storage().nbytes() for key in made.keys() - given)
        return out


class Waits(TorchFunctionMode):
    """Adds what asks a tensor for its numbers."""

    NAMES = ("item", "tolist", "numpy", "cpu", "nonzero", "equal")
    NAMES += ("__bool__", "__int__", "__float__", "__index__", "__array__")

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.calls.on and getattr(func, "__name__", "") in self.NAMES:
            self.calls.steps[-1]["waits"] += 1
        return func(*args, **(kwargs or {}))


def memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


@pytest.fixture(scope="module", params=RECORDED)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Counts of each of six updates, and those recorded. The fourth is logged, and the last."""
    precision, _, products = request.param.partition("-")
    onednn = products == "onednn"
    if onednn and not ONEDNN:
        pytest.skip("this processor or torch has no use for the products of oneDNN")
    folder, calls = tmp_path_factory.mktemp("counts"), Calls()

    class CountedFeed(Feed):
        """Begins a count with each update, and leaves the loader's own work out."""

        def __next__(self) -> Piece:
            calls.on = False
            piece = super().__next__()
            calls.steps.append(Counter())
            calls.on = True
            return piece

    config = make_config(
        make_images(folder / "images", 48),
        folder / "run",
        epochs=1,
        warmup_epochs=0,
        freeze_last_layer=0,
        drop_path_rate=0.0,  # which rows it drops is drawn anew each time
        log_every=LOG_EVERY,
        precision=precision,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "ONEDNN", onednn)
        with Waits(calls), calls:
            train.train(config, feed_type=CountedFeed)
    return calls.steps, RECORDED[request.param]


def test_an_update_calls_and_allocates_what_it_did(run: Run) -> None:
    steps, recorded = run
    # the first one makes what the others find
    expect_about(steps[2], recorded, "an update's operators and memory have changed")
    for step in (1, 4):
        expect(steps[step], steps[2], f"update {step + 1} differs from update 3")


def test_an_update_that_does_not_log_waits_for_nothing(run: Run) -> None:
    steps, _ = run
    for step in (0, 1, 2, 4):
        expect({"waits": steps[step]["waits"]}, {"waits": 0}, f"update {step + 1} reads from the device")


def test_a_logged_update_adds_what_it_did(run: Run) -> None:
    steps, recorded = run
    more = {f"logged {name}": n - steps[2][name] for name, n in steps[LOG_EVERY - 1].items()}
    # the rows of the window, the norm of the centre, the distance of the teacher: two of them by item()
    expect({"waits": more.pop("logged waits")}, {"waits": 5}, "a logged update's readings have changed")
    expect_about(more, recorded, "what logging adds to an update has changed")


# What is kept for the backward pass.


def kept(forward: Callable[[], object], given: list[Tensor]) -> dict[str, int]:
    """Bytes that autograd keeps of `forward`, beyond those of `given`."""
    found: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        found[memory(x)] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = forward()
    assert out is not None
    own = {memory(x) for x in given}
    return {"bytes": sum(x.untyped_storage().nbytes() for key, x in found.items() if key not in own)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prototypes", [100, 1000])
def test_the_loss_keeps_no_tensor_of_the_logits_size(prototypes: int, dtype: torch.dtype) -> None:
    student = torch.randn(10, 4, prototypes).to(dtype).requires_grad_()
    teacher, center = torch.randn(2, 4, prototypes).to(dtype), torch.randn(prototypes)
    found = kept(
        lambda: ops.dino_loss(student, teacher, center, student_temp=0.1, teacher_temp=0.04),
        [student, teacher, center],
    )
    # two float32 statistics of each of (10 + 2) x 4 rows, two temperatures
    expect(found, {"bytes": 392}, "what the loss keeps for its backward pass has changed")


@pytest.mark.parametrize(
    ("runs", "dtype", "recorded"),
    [
        # the result, 54 x 2 x 8 float32, and a logarithm of each row and head, 54 x 2
        (((2, 17), (4, 5)), torch.float32, 3888),
        # bf16 of few tokens: weights, scaled queries, keys and values as the products want them
        (((2, 17), (4, 5)), torch.bfloat16, 7896),
        (((2, 300),), torch.float32, 43200),  # as above: 600 x 2 x 8 + 600 x 2 float32
        (((2, 300),), torch.bfloat16, 0),  # of many tokens: weights are computed again
    ],
    ids=str,
)
def test_attention_keeps_for_its_backward_pass_what_it_did(
    runs: tuple[tuple[int, int], ...], dtype: torch.dtype, recorded: int
) -> None:
    qkv = torch.randn(sum(a * b for a, b in runs), 3, 2, 8, dtype=dtype, requires_grad=True)
    found = kept(lambda: ops.attention(qkv, runs), [qkv])
    expect(found, {"bytes": recorded}, "what attention keeps for its backward pass has changed")


@pytest.mark.parametrize(
    ("dtype", "recorded"), [(torch.float32, 11530824), (torch.bfloat16, 7905608)], ids=str
)
def test_a_student_keeps_for_its_backward_pass_what_it_did(dtype: torch.dtype, recorded: int) -> None:
    """Of a whole forward pass, beyond parameters and crops."""
    dino = DINO(make_config(Path(), Path("run"), drop_path_rate=0.0)).train()
    views = [torch.randn(8, 3, size, size) for size in (16, 16, 8, 8, 8)]

    def forward() -> object:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return dino(views, 0)

    found = kept(forward, [*views, *dino.parameters()])
    expect(found, {"bytes": recorded}, "what a forward pass keeps for the backward pass has changed")


# Launches of Triton's kernels: on a GPU, or as its interpreter would make them.


class Counted:
    """A kernel that notes its launches."""

    def __init__(self, kernel: Any, name: str, launches: Counter[str]) -> None:
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid: Any) -> Any:
        self.launches[self.name] += 1
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    pytest.importorskip("triton")
    counts: Counter[str] = Counter()
    for path in Path(ops.__file__).parent.glob("*_triton.py"):
        module = importlib.import_module(f"fastdino.ops.{path.stem}")
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Counted(getattr(module, name), name, counts))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield counts


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("crops", "images", "prototypes"), [(3, 2, 40), (10, 5, 2100)])
def test_the_loss_takes_three_launches_and_its_gradient_one(
    launches: Counter[str], crops: int, images: int, prototypes: int, given: bool
) -> None:
    student = torch.randn(crops, images, prototypes, requires_grad=True)
    loss = ops.dino_loss(
        student,
        torch.randn(2, images, prototypes),
        torch.randn(prototypes),
        student_temp=0.1,
        teacher_temp=0.04,
        pair_weights=torch.ones(crops, 2) if given else None,
        impl="triton",
    )
    forward = {"tile_kernel": 1, "merge_kernel": 1, "finish_kernel": 1}
    expect(launches, forward, "the loss's launches have changed")
    loss.backward()
    expect(launches, forward | {"bwd_kernel": 1}, "the launches of the loss's gradient have changed")


def test_the_teacher_takes_a_launch_for_each_kind_of_tensors(launches: Counter[str]) -> None:
    sizes = [1, 7, 4096, 5000] * 40
    teacher, student, half = ([torch.randn(n) for n in sizes] for _ in range(3))
    ops.ema_(teacher, student, 0.9, impl="triton")
    expect(launches, {"ema_kernel": 1}, "the launches for 160 parameters have changed")
    launches.clear()
    ops.ema_(teacher + half, student + [x.bfloat16() for x in student], 0.9, impl="triton")
    expect(launches, {"ema_kernel": 2}, "the launches for parameters of two types have changed")


PLAIN = View(size=16, box=(1, 2, 20, 22), flip=True, jitter=(), grayscale=True, blur=None, solarize=True)
CROPS = ("weights_kernel", "horizontal_kernel", "vertical_kernel", "color_kernel", "blur_kernel")


@pytest.mark.parametrize(
    ("views", "recorded"),
    [
        ([PLAIN, PLAIN], CROPS[:3]),
        ([PLAIN, replace(PLAIN, jitter=(("contrast", 1.2), ("hue", 0.1)), blur=1.0), PLAIN], CROPS),
    ],
    ids=["plain", "all"],
)
def test_all_crops_of_a_batch_take_five_launches(
    launches: Counter[str], views: list[View], recorded: tuple[str, ...]
) -> None:
    images = [torch.randint(0, 256, (24 + i, 30, 3), dtype=torch.uint8) for i in range(2)]
    out = [torch.empty(2, 3, view.size, view.size, dtype=torch.uint8) for view in views]
    with torch.device("cpu"):
        parameters = torch.stack([encode(views)] * 2)
        ops.multi_crop(images, parameters, out, impl="triton")
    expect(launches, dict.fromkeys(recorded, 1), "the launches of the crops have changed")


# Graphs, with schedules that go on.


def graphs(f: Callable[..., object], calls: list[tuple[Any, ...]]) -> list[int]:
    """How many graphs there are after each call of `f`, compiled without a break."""
    counter = CompileCounter()
    compiled, seen = torch.compile(f, backend=counter, fullgraph=True), []
    for arguments in calls:
        compiled(*arguments)
        seen.append(counter.frame_count)
    return seen


@pytest.mark.parametrize(("as_tensors", "recorded"), [(True, [1, 1, 1, 1]), (False, [1, 2, 2, 2])])
def test_a_schedule_of_temperatures_compiles_the_loss_no_more_than_it_did(
    dynamo: None, as_tensors: bool, recorded: list[int]
) -> None:
    """Numbers take one graph more: what Dynamo first takes for a constant."""
    student, teacher, center = (
        torch.randn(4, 2, 64, requires_grad=True),
        torch.randn(2, 2, 64),
        torch.zeros(64),
    )

    def loss(temp: float | Tensor) -> None:
        ops.dino_loss(student, teacher, center, student_temp=0.1, teacher_temp=temp)

    temps = [0.04, 0.05, 0.06, 0.07]
    found = graphs(loss, [(torch.tensor(x) if as_tensors else x,) for x in temps])
    assert found == recorded, (
        "graphs after each temperature; record them here and say why in the commit message"
    )


@pytest.mark.parametrize("centering", ["ema", "sinkhorn"])
def test_the_epochs_of_a_loss_compile_into_two_graphs(
    dynamo: None, centering: Literal["ema", "sinkhorn"]
) -> None:
    """Of the first epoch, and of any."""
    loss = DINOLoss(64, 4, 0.04, 0.07, 3, 6, centering=centering)
    eager = copy.deepcopy(loss)
    student, teacher = torch.randn(8, 64, requires_grad=True), torch.randn(4, 64)
    found = graphs(lambda epoch: loss(student, teacher, epoch), [(epoch,) for epoch in range(6)])
    assert found == [1, 2, 2, 2, 2, 2], "graphs after each epoch; record them here and say why in the commit"
    for epoch in range(6):
        eager(student, teacher, epoch)
    torch.testing.assert_close(loss.center, eager.center)


def test_a_schedule_of_momenta_compiles_the_teachers_update_once(dynamo: None) -> None:
    """The operator: `ema_` itself compares addresses, which Dynamo leaves to Python."""
    teacher, student = ([torch.randn(n) for n in (15, 7)] for _ in range(2))

    def update(momentum: Tensor) -> None:
        _ema_(teacher, student, [], momentum, "torch")

    found = graphs(update, [(torch.tensor(x),) for x in (0.99, 0.995, 0.999)])
    assert found == [1, 1, 1], (
        "graphs after each momentum; record them here and say why in the commit message"
    )


# Instructions of the native kernels, one thread, as valgrind sees them: an AVX2 processor.

PROGRAM = """
import ctypes, random, sys
from ctypes import addressof, byref, c_double, c_float, c_int32, c_int64, c_uint8, c_void_p

library, name = ctypes.CDLL(sys.argv[1]), sys.argv[2]
random.seed(0)

def call(kernel, *arguments):
    function = getattr(library, f"fastdino_{kernel}_avx2")
    function.restype = None
    function(*arguments)

def numbers(n):  # drawn here, each of them would take longer than the kernel
    few = [random.uniform(-2, 2) for _ in range(997)]
    return (c_float * n)(*(few * (n // 997 + 1))[:n])

def pointers(*arrays):
    return (c_void_p * len(arrays))(*map(addressof, arrays))

if name == "ema":
    n = 20_000
    teacher, student = numbers(n), numbers(n)
    sizes = (c_int64 * 1)(n), (c_int32 * 1)(0)
    call("ema", pointers(teacher), pointers(student), None, *sizes, c_int64(1), c_float(0.004), 1)
elif name == "dino_loss":
    V, G, B, K = 4, 2, 2, 1000
    numbers_of = (c_int64 * 10)(V, G, B, K, *(B * K, K) * 3)
    floats = c_int64()
    call("dino_loss_workspace", byref(floats), numbers_of, 1)
    student, teacher, center = numbers(V * B * K), numbers(G * B * K), numbers(K)
    gradient, workspace, mean = (c_float * (V * B * K))(), (c_float * floats.value)(), (c_float * K)()
    stats = (c_float * (2 * V * B))(), (c_float * (2 * G * B))()
    weights = (c_float * (V * G))(*(v != g for v in range(V) for g in range(G)))
    loss, losses, temps = c_float(), (c_double * B)(), (c_float(0.1), c_float(0.04))
    given = (student, teacher, center, weights)
    call("dino_loss_forward", byref(loss), *stats, mean, workspace, losses, *given, *temps, numbers_of, 0, 1)
    assert loss.value > 0
    call("dino_loss_backward", gradient, workspace, *given, *stats, *temps, c_float(1), numbers_of, 0, 1)
    assert any(gradient)
else:
    size, height, width, box = 64, 90, 120, (5, 10, 80, 100)
    image = (c_uint8 * (3 * height * width))(*random.randbytes(3 * height * width))
    views = [[*box, 1, 1, 1.2, 2, 0.8, 3, 1.1, 4, 0.05, 0, 1.5, 1], [*box, *[0] * 10, -1, 0]]
    out = [(c_uint8 * (3 * size * size))() for _ in views]
    shapes, sizes = (c_int64 * 3)(height, width, 3), (c_int64 * 2)(size, size)
    parameters = (c_double * 32)(*views[0], *views[1])
    call("multi_crop", pointers(image), shapes, c_int64(1), parameters, c_int64(2), pointers(*out), sizes, 1)
    assert all(map(any, out))
"""
COMPILER = re.search(rb"GCC: \([^)]*\) (\d+)\.", native.LIBRARY.read_bytes()) if native.isas() else None


@pytest.mark.skipif("avx2" not in native.isas(), reason="needs the native kernels and a processor with AVX2")
@pytest.mark.skipif(not shutil.which("valgrind"), reason="needs valgrind")
@pytest.mark.skipif(not COMPILER or COMPILER[1] != b"12", reason="these are recorded of code by GCC 12")
@pytest.mark.parametrize(
    ("kernel", "recorded"),
    [
        ("ema", 23_500),  # of 20,000 parameters: 1.1 each
        ("dino_loss", 125_500),  # of 8,000 logits, forward and backward: 15 each
        ("multi_crop", 1_117_400),  # of two views of 64 pixels, one with all there is: 45 a number
    ],
)
def test_kernels_take_no_more_instructions(tmp_path: Path, kernel: str, recorded: int) -> None:
    """Those of the library itself and of libm, within 3 %."""
    (tmp_path / "program.py").write_text(PROGRAM)
    program = [sys.executable, "-S", "-E", tmp_path / "program.py", native.LIBRARY, kernel]
    counts = tmp_path / "counts"
    tool = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={counts}"]
    subprocess.run([*tool, *program], check=True, capture_output=True)
    read = ["callgrind_annotate", "--threshold=100", "--show-percs=no", counts]
    listed = subprocess.run(read, check=True, capture_output=True, text=True).stdout
    lines = re.findall(rf"^ *([\d,]+)  .*\[.*/(?:{native.LIBRARY.name}|libm[.-].*)\]$", listed, re.MULTILINE)
    found = sum(int(n.replace(",", "")) for n in lines)
    if abs(found / recorded - 1) > 0.03:
        expect({kernel: found}, {kernel: recorded}, "the instructions of a kernel have changed")
