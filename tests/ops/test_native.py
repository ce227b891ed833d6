"""The native build: how it is found, and what is said where there is none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from imports import imports

from fastdino import ops
from fastdino.ops import native

ROOT = Path(__file__).parents[2]
OPS = ROOT / "fastdino" / "ops"
LAUNCHERS = [*OPS.glob("*_cpu.py"), *OPS.glob("*_triton.py")]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Another place to look for the library; forgotten afterwards."""
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libfastdino_cpu.so")
    native.load.cache_clear()
    yield native.LIBRARY
    native.load.cache_clear()


def test_without_library_the_plain_form_runs_and_the_reason_is_said(library):
    library.with_suffix(".log").write_text("no compiler\nand more")
    assert native.isas() == ()
    assert native.describe() == "libfastdino_cpu.so is not built: no compiler"
    described = ops.describe("cpu")
    assert described.keys() >= {"dino_loss", "ema"}
    assert "multi_crop" not in described  # it has no plain form to run
    assert set(described.values()) == {f"torch ({native.describe()})"}
    x, c = torch.zeros(2, 1, 4), torch.zeros(4)
    assert ops.dino_loss(x, x, c, student_temp=1, teacher_temp=1).isfinite()
    with pytest.raises(ValueError, match="is not built: no compiler"):
        ops.dino_loss(x, x, c, student_temp=1, teacher_temp=1, impl="cpu")
    with pytest.raises(ValueError, match="is not built: no compiler"):
        ops.ema_([torch.zeros(1)], [torch.ones(1)], 0.5, impl="cpu")


def test_a_library_that_does_not_load_is_named(library):
    library.write_text("no library")
    assert native.describe().startswith("libfastdino_cpu.so does not load")


@pytest.mark.skipif(not native.isas(), reason=native.describe())
def test_kernels_share_the_thread_pool_of_torch():
    ops.ema_([torch.zeros(1)], [torch.ones(1)], 0.5, impl="cpu")
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    pools = {
        line.split()[-1]
        for line in maps.read_text().splitlines()
        if ("libgomp" in line or "libomp" in line) and "scikit_learn" not in line  # other tests import that
    }
    assert len(pools) == 1


@pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")
def test_building_without_a_compiler_succeeds_and_keeps_the_reason(tmp_path):
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        tmp_path,
        "--build-temp",
        tmp_path / "temp",
    ]
    env = os.environ | {"CXX": str(tmp_path / "no-compiler")}
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    assert not (tmp_path / "fastdino" / "libfastdino_cpu.so").exists()
    assert "no-compiler" in (tmp_path / "fastdino" / "libfastdino_cpu.log").read_text()


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_a_launcher_does_not_import_its_specification(path: Path) -> None:
    """An op's NAME.py imports NAME_cpu.py and NAME_triton.py: what they share lies in native.py."""
    specification = f"fastdino.ops.{path.stem.rpartition('_')[0]}"
    names = [name for name in imports(path.read_text()) if f"{name}.".startswith(f"{specification}.")]
    assert names == []
