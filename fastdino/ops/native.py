"""What kernels run with: loads libfastdino_cpu.so, or says why there is none; asks Triton how it runs."""

import ctypes
import functools
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).parent.parent / "libfastdino_cpu.so"
# Whether linear.py multiplies with oneDNN: torch has the operator, and the processor AVX-512.
ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
)


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library and the instruction sets it can use here, best first; or None and the reason."""
    if not LIBRARY.exists():
        log = LIBRARY.with_suffix(".log")  # left by setup.py
        why = (
            log.read_text().partition("\n")[0]
            if log.exists()
            else "`pip install .` with a C++ compiler builds it"
        )
        return None, f"{LIBRARY.name} is not built: {why}"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, f"{LIBRARY.name} does not load: {error}"
    library.fastdino_isas.restype = ctypes.c_char_p
    return library, library.fastdino_isas().decode()


@torch.compiler.assume_constant_result
def isas() -> tuple[str, ...]:
    """Instruction sets of the kernels that this machine runs, best first; empty without the library."""
    library, what = load()
    return tuple(what.split()) if library else ()


@torch.compiler.assume_constant_result
def describe() -> str:
    """Which instruction set the kernels use, or why there are no kernels."""
    return (isas() or (load()[1],))[0]


def kernel(name: str, argtypes: tuple[Any, ...]) -> Callable[..., None]:
    """The C function fastdino_<name> for the best instruction set. It runs without the GIL."""
    return _kernel(name, argtypes, isas()[0])


@functools.cache
def _kernel(name: str, argtypes: tuple[Any, ...], isa: str) -> Callable[..., None]:
    function = getattr(load()[0], f"fastdino_{name}_{isa}")
    function.argtypes, function.restype = argtypes, None
    return function


def triton_version() -> str:
    """Version of Triton, which is imported only now."""
    import triton

    return triton.__version__


@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors, for tests."""
    import triton

    return triton.knobs.runtime.interpret


@torch.compiler.assume_constant_result
def choose(device: torch.device) -> tuple[str, str]:
    """The implementation that "auto" takes on a device, and with what, or why none that is faster."""
    if device.type == "cpu":
        return ("cpu" if isas() else "torch"), describe()
    if device.type != "cuda":
        return "torch", f"there is no kernel for {device.type}"
    return ("triton", triton_version()) if find_spec("triton") else ("torch", "triton is not installed")


def missing(impl: str, device: torch.device) -> str:
    """Why an implementation cannot run on tensors of a device; empty if it can."""
    here = True
    if impl == "cpu":
        if not isas():
            return describe()
        here = device.type == "cpu"
    if impl == "triton":
        if not find_spec("triton"):
            return "triton is not installed"
        here = device.type == "cuda" or interpreted()
    return "" if here else f"the tensors are on {device}"


def resolve(impl: str, device: torch.device, unfit: Mapping[str, str] | None = None) -> str:
    """The implementation that runs.

    Args:
        impl: "auto", "torch", "cpu" or "triton". "auto" takes the plain form for what no kernel covers.
        device: of the tensors.
        unfit: for an implementation that cannot take the tensors, why.

    Raises:
        ValueError: an unknown implementation, or one that cannot run.
    """
    if impl not in ("auto", "torch", "cpu", "triton"):
        raise ValueError(f"impl is {impl!r}: give auto, torch, cpu or triton")
    chosen = choose(device)[0] if impl == "auto" else impl
    why = missing(chosen, device) or (unfit or {}).get(chosen, "")
    if not why:
        return chosen
    if impl == "auto":
        return "torch"
    raise ValueError(f"impl={impl!r} cannot run: {why}; give impl='torch' or 'auto'")


def contiguous_rows(x: Tensor) -> Tensor:
    """x (..., K) with a contiguous last axis; the other axes keep any stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def threads(elements: int) -> int:
    """Threads for a pass over N elements on the CPU."""
    # below some ten microseconds of work a second thread costs more than it does
    return torch.get_num_threads() if elements > 65536 else 1


def check_temperature(name: str, temp: float | Tensor) -> None:
    """Raise a ValueError unless `temp` is a number above 0 or a tensor of one number, which is not read."""
    if isinstance(temp, Tensor):
        if temp.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(temp.shape)}: give one number")
    elif not temp > 0:
        raise ValueError(f"{name} is {temp}: a temperature is above 0")
