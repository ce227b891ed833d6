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

from fastdino.ops import dino_loss_triton, ema_triton, multi_crop_triton

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
CROPS = {
    "BLOCK": multi_crop_triton.BLOCK,
    "COLUMNS": multi_crop_triton.COLUMNS,
    "ROWS_SUMMED": multi_crop_triton.ROWS,
}
TILE = CROPS | {"ROWS": multi_crop_triton.ROWS}
STRIP = CROPS | {"ROWS": multi_crop_triton.STRIP_ROWS}
POINTERS = {
    "copy": "*bf16",
    "table": "*i64",
    **dict.fromkeys(("weights", "sums", "programs"), "*i32"),
    **dict.fromkeys(("images", "scratch", "out"), "*u8"),
}


def signature(
    kernel: triton.JITFunction, logits: str, given: dict[str, object]
) -> tuple[dict[str, str], dict[str, object]]:
    """Types and constants of a launch at K = 65,536 on logits of one dtype."""
    types: dict[str, str] = {}
    constants: dict[str, object] = {}
    for param in kernel.params:
        name = param.name
        if param.is_constexpr:
            types[name] = "constexpr"
            constants[name] = given[name]
        elif name in ("student", "teacher", "grad_student"):
            types[name] = f"*{logits}"
        elif name in ("student_temp", "teacher_temp", "momentum"):
            types[name] = "fp32"
        elif name in POINTERS:
            types[name] = POINTERS[name]
        elif name in ("B", "group", "groups", "tiles") or name.endswith(("_crop", "_image")):
            types[name] = "i32"
        else:
            types[name] = "*fp32"
    return types, constants


def resources(
    kernel: triton.JITFunction,
    logits: str,
    capability: int,
    warps: int,
    constants: dict[str, object],
    fuses: bool,
) -> dict[str, object]:
    types, constants = signature(kernel, logits, constants)
    # what a launch finds out by itself: pointers and strides are multiples of 16
    aligned = [
        i
        for i, (name, type_) in enumerate(types.items())
        if (type_[0] == "*" and not kernel.params[i].do_not_specialize_on_alignment)
        or name.endswith(("_crop", "_image"))
    ]
    source = ASTSource(kernel, types, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": warps, "enable_fp_fusion": fuses}
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


if __name__ == "__main__":
    both = ("bf16", "fp32")
    wide, narrow = multi_crop_triton.COLOR_WARPS, multi_crop_triton.WARPS
    # warps, dtypes of the logits or parameters, constants, whether a multiplication and an addition may fuse
    kernels = {
        dino_loss_triton.tile_kernel: (dino_loss_triton.WARPS, both, SIZES | FLAGS, True),
        dino_loss_triton.merge_kernel: (1, both, SIZES | FLAGS, True),
        dino_loss_triton.finish_kernel: (4, both, SIZES | FLAGS, True),
        dino_loss_triton.bwd_kernel: (dino_loss_triton.WARPS, both, SIZES | FLAGS, True),
        ema_triton.ema_kernel: (ema_triton.WARPS, both, FLAGS, True),
        multi_crop_triton.weights_kernel: (narrow, ("none",), TILE, False),
        multi_crop_triton.horizontal_kernel: (narrow, ("none",), TILE, False),
        multi_crop_triton.vertical_kernel: (wide, ("none",), TILE, False),
        multi_crop_triton.color_kernel: (wide, ("none",), STRIP, False),
        multi_crop_triton.blur_kernel: (narrow, ("none",), STRIP, False),
    }
    found = [
        resources(kernel, logits, capability, warps, constants, fuses)
        for kernel, (warps, dtypes, constants, fuses) in kernels.items()
        for logits in dtypes
        for capability in (80, 90, 100)
    ]
    json.dump(found, sys.stdout)
