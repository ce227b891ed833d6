"""Compiles the Triton kernels without a GPU and prints what the machine code uses, as JSON.

Run as a program, in a process of its own: where the tests interpret the kernels there is nothing to compile.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdino.ops import dino_loss_triton, ema_triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SIZES = {"V": 10, "G": 2, "G_PADDED": 2, "K": 65536, "TILE": dino_loss_triton._tile(2), "TILES_PADDED": 64}
FLAGS = {
    "ALIGNED": True,
    "BLOCK": ema_triton.BLOCK,
    "COPY": True,
    "MOMENTUM_ON_DEVICE": False,
    "TEMPS_ON_DEVICE": False,
    "WEIGHTS_GIVEN": False,
}


def signature(kernel: triton.JITFunction, logits: str) -> tuple[dict[str, str], dict[str, object]]:
    """Types and constants of a launch at K = 65,536 on logits of one dtype."""
    types: dict[str, str] = {}
    constants: dict[str, object] = {}
    for param in kernel.params:
        name = param.name
        if param.is_constexpr:
            types[name] = "constexpr"
            constants[name] = (SIZES | FLAGS)[name]
        elif name in ("student", "teacher", "grad_student"):
            types[name] = f"*{logits}"
        elif name in ("student_temp", "teacher_temp", "momentum"):
            types[name] = "fp32"
        elif name == "copy":
            types[name] = "*bf16"
        elif name == "table":
            types[name] = "*i64"
        elif name in ("B", "group", "groups", "tiles") or name.endswith(("_crop", "_image")):
            types[name] = "i32"
        else:
            types[name] = "*fp32"
    return types, constants


def resources(kernel: triton.JITFunction, logits: str, capability: int, warps: int) -> dict[str, object]:
    types, constants = signature(kernel, logits)
    # what a launch finds out by itself: pointers and strides are multiples of 16
    aligned = [i for i, (n, t) in enumerate(types.items()) if t[0] == "*" or n.endswith(("_crop", "_image"))]
    source = ASTSource(kernel, types, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": warps, "enable_fp_fusion": True}
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
        "rounds_to_bf16": "cvt.rn.bf16" in compiled.asm["ptx"],
    }


if __name__ == "__main__":
    kernels = {
        dino_loss_triton.tile_kernel: dino_loss_triton.WARPS,
        dino_loss_triton.merge_kernel: 1,
        dino_loss_triton.finish_kernel: 4,
        dino_loss_triton.bwd_kernel: dino_loss_triton.WARPS,
        ema_triton.ema_kernel: ema_triton.WARPS,
    }
    found = [
        resources(kernel, logits, capability, warps)
        for kernel, warps in kernels.items()
        for logits in ("bf16", "fp32")
        for capability in (80, 90, 100)
    ]
    json.dump(found, sys.stdout)
