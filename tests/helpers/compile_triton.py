"""Compiles the Triton kernels without a GPU and prints what the machine code uses, as JSON.

Of each fastdino/ops/NAME_triton.py, all kernels NAME_kernel as `launch` of the op's test launches them, for
logits of two dtypes. Run as a program, in a process of its own: where the tests interpret the kernels there
is nothing to compile.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # conftest, which tests import, leaves it so

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TESTS = Path(__file__).parents[1] / "ops"
CAPABILITIES = (80, 90, 100)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


class Launch(NamedTuple):
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: list[int]
    """Which parameters are multiples of 16: addresses and strides."""
    options: dict[str, Any]


def launched(kernel: Any, *args: Any, **kwargs: Any) -> Launch:
    """What a launch on a GPU would find out: types, constants, and multiples of 16."""
    constants = {p.name: kwargs.pop(p.name) for p in kernel.params if p.is_constexpr}
    types, aligned, given = {}, [], iter(args)
    for i, param in enumerate(kernel.params):
        if param.is_constexpr:
            types[param.name] = "constexpr"
            continue
        x = next(given)
        is_number = not isinstance(x, Tensor)
        types[param.name] = POINTERS[x.dtype] if not is_number else "fp32" if isinstance(x, float) else "i32"
        multiple = not isinstance(x, float) and (x if is_number else x.data_ptr()) % 16 == 0
        if multiple and not param.do_not_specialize and not param.do_not_specialize_on_alignment:
            aligned.append(i)
    return Launch(kernel, types, constants, aligned, kwargs)


class Recorded:
    """A kernel that notes how it is launched, and does nothing."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append(launched(self.kernel, *args, **kwargs))


def launches(module: ModuleType, launch: Callable[[torch.dtype], None]) -> dict[str, list[Launch]]:
    """Launches of all kernels of a module, by dtype of the logits; a repeated one is left out."""
    found: dict[str, list[Launch]] = {}
    kernels = {name: kernel for name, kernel in vars(module).items() if name.endswith("_kernel")}
    for dtype in (torch.bfloat16, torch.float32):
        noted: list[Launch] = []
        for name, kernel in kernels.items():
            setattr(module, name, Recorded(kernel, noted))
        launch(dtype)
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
        if missing := kernels.keys() - {one.kernel.__name__ for one in noted}:
            raise SystemExit(f"{launch.__module__}.launch launches no {', '.join(sorted(missing))}")
        before = [one for others in found.values() for one in others]
        found[POINTERS[dtype][1:]] = [one for one in noted if one not in before]
    return found


def resources(launch: Launch, logits: str, capability: int) -> dict[str, object]:
    """What one kernel's machine code uses on GPUs of one generation."""
    kernel, types, constants, aligned, options = launch
    source = ASTSource(kernel, types, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = [CUOBJDUMP, "--dump-sass", "-res-usage", file.name]
        sass = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", sass)}
    return usage | {
        "kernel": kernel.__name__,
        "capability": capability,
        "logits": logits,
        "wide_loads": len(re.findall(r"LDG\.E[\w.]*\.128", sass)),
        "all_loads": len(re.findall(r"LDG\.E", sass)),
        "wide_stores": len(re.findall(r"STG\.E[\w.]*\.128", sass)),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "byte_loads": len(re.findall(r"LDG\.E\.[US]8", sass)),
        "barriers": len(re.findall(r"\bbar\.sync\b", compiled.asm["ptx"])),
        "rounds_to_bf16": "cvt.rn.bf16" in compiled.asm["ptx"],
        "fuses": "fma.rn" in compiled.asm["ptx"],
    }


def main() -> None:
    usage = []
    for path in sorted((TESTS.parents[1] / "fastdino" / "ops").glob("*_triton.py")):
        name = path.stem.removesuffix("_triton")
        test = next(x for x in (f"test_{path.stem}", f"test_{name}") if (TESTS / f"{x}.py").exists())
        module = import_module(f"fastdino.ops.{path.stem}")
        for logits, found in launches(module, import_module(test).launch).items():
            usage += [resources(launch, logits, c) for launch in found for c in CAPABILITIES]
    json.dump(usage, sys.stdout)


if __name__ == "__main__":
    main()
