"""The Triton kernels as machine code for three generations of GPUs, compiled here without one."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CAPABILITIES = (80, 90, 100)
CROPS = ("weights_kernel", "horizontal_kernel", "vertical_kernel", "color_kernel", "blur_kernel")
Usage = dict[str, int | str | bool]

pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="needs triton")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Usage]:
    """Resources of every kernel of every op, dtype of the logits or parameters, and target."""
    env = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'ops'}:{ROOT / 'tests' / 'helpers'}",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    program = [sys.executable, ROOT / "tests" / "helpers" / "compile_triton.py"]
    return json.loads(subprocess.run(program, env=env, check=True, stdout=subprocess.PIPE).stdout)


def test_every_kernel_compiles_for_every_target(compiled):
    # those that take no logits are the same for both dtypes, and compiled once
    kernels = dict.fromkeys(("tile_kernel", "bwd_kernel", "ema_kernel"), ("bf16", "fp32"))
    kernels |= dict.fromkeys(("merge_kernel", "finish_kernel", *CROPS), ("bf16",))
    found = {(u["kernel"], u["logits"], u["capability"]) for u in compiled}
    assert found >= {
        (kernel, d, c) for kernel, dtypes in kernels.items() for d in dtypes for c in CAPABILITIES
    }
    assert found == {(kernel, d, c) for kernel, d, _ in found for c in CAPABILITIES}  # and those of other ops


def test_nothing_spills(compiled):
    assert [u for u in compiled if u["spills"] or u["STACK"] or u["LOCAL"]] == []


def test_registers_leave_room_for_seven_programs_of_two_warps(compiled):
    # 64 threads x 7 programs x 144 registers: the 65,536 of a multiprocessor
    assert [u for u in compiled if u["kernel"] in ("tile_kernel", "bwd_kernel") and u["REG"] > 144] == []


def test_logits_are_read_and_written_16_bytes_at_a_time(compiled):
    for usage in compiled:
        if usage["kernel"] == "tile_kernel":
            assert usage["wide_loads"] == usage["all_loads"]
        if usage["kernel"] == "bwd_kernel":
            # a row of the student and the next, two of the teacher, the centre; the rest are statistics
            assert usage["wide_loads"] >= (12 if usage["logits"] == "bf16" else 20)
            assert usage["wide_stores"] == (2 if usage["logits"] == "bf16" else 4)
        if usage["kernel"] == "ema_kernel":
            assert usage["wide_loads"] >= 4
            assert usage["wide_stores"] >= 2


def test_gradient_and_teacher_are_rounded_to_bfloat16(compiled):
    written = [u for u in compiled if u["kernel"] in ("bwd_kernel", "ema_kernel") and u["logits"] == "bf16"]
    assert written
    assert all(u["rounds_to_bf16"] for u in written)


def test_crops_fuse_no_multiplication_with_an_addition(compiled):
    crops = [u for u in compiled if u["kernel"] in CROPS]
    assert crops
    assert not any(u["fuses"] for u in crops)


def test_colors_leave_room_for_four_programs_of_eight_warps(compiled):
    assert [u for u in compiled if u["kernel"] in ("vertical_kernel", "color_kernel") and u["REG"] > 64] == []


def test_planes_are_read_four_bytes_at_a_time(compiled):
    assert [u for u in compiled if u["kernel"] == "vertical_kernel" and u["byte_loads"]] == []


def test_passes_of_the_blur_wait_for_one_another(compiled):
    for usage in compiled:
        if usage["kernel"] in ("color_kernel", "blur_kernel"):
            assert usage["barriers"] >= (3 if usage["kernel"] == "color_kernel" else 2)
