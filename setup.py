"""Drives CMake for the optional native kernels; everything else is in pyproject.toml."""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent


class CMakeBuild(build_ext):
    """Builds libfastdino_cpu.so; where that fails the package installs without it and keeps the reason."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python version in it: it is no Python module

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        reason = target.with_suffix(".log")
        reason.unlink(missing_ok=True)
        try:
            if not (cmake := shutil.which("cmake")):
                raise CompileError("there was no cmake at installation")
            for step in (
                ["-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"],
                ["--build", str(build), "--parallel"],
                ["--install", str(build), "--prefix", str(target.parent.parent)],
            ):
                done = subprocess.run(
                    [cmake, *step], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
                print(done.stdout)
                if done.returncode:
                    why = f"CMake failed; is there a C++ compiler with OpenMP? The rest: {reason.name}"
                    raise CompileError(f"{why}\n{done.stdout[-2000:]}")
        except CompileError as error:
            target.unlink(missing_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            places = [reason]
            if self.inplace or self.editable_mode:
                places.append(ROOT / "fastdino" / reason.name)
            for place in places:
                place.write_text(str(error) + "\n")
            raise


setup(
    ext_modules=[Extension("fastdino.libfastdino_cpu", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
