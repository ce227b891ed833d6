"""One command for a GPU that is lent for minutes: tests, then benchmarks, the most telling first.

    python -m benchmarks.gpu --out DIR [--minutes 8] [--parts tests profile ...] [--rehearse]

Runs from a checkout with torch and triton alone, without a network, and without git if FASTDINO_COMMIT names
the commit; a part that needs a package that is not installed is left out by name. Bring
fastdino/libfastdino_cpu.so with the checkout, or loaders crop by Pillow. Each part is a process of its own:
its result is written as it ends, a failure or a time-out is noted and the next part begins. All parts take
some 40 minutes: --parts chooses. DIR.tar.gz holds everything in one file to bring back. `--rehearse` runs the
same list without a GPU, at tiny sizes, with the Triton kernels in their interpreter and the loss on the CPU.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TESTED = {  # files, and the packages that their imports need beyond torch and triton
    "ops/test_dino_loss ops/test_ema ops/test_packed_attention": (),
    "ops/test_multi_crop_triton data/test_crops data/test_loader": ("PIL", "torchvision"),
    "training/test_train": ("PIL", "torchvision", "rich", "safetensors", "tyro", "tensorboard", "matplotlib"),
    "data/test_dali": ("PIL", "torchvision", "sklearn", "nvidia"),
}
# Part, most seconds, module of benchmarks and its arguments.
OPS = "ops loss --seconds 4 --rounds 101"
SIZES = "patch_size --optimizations --compiled"
GPU = f"""
    tests          420
    headline       120  {OPS} --images 64 --prototypes 65536 --dtypes bfloat16
    profile        150  patch_size --profile --archs vit_small --patches 16
    patch_size     300  {SIZES} --archs vit_small --patches 16 8 --minutes 3
    optimizations  560  patch_size --archs vit_small --patches 16 --minutes 5
    sizes          420  {SIZES} --minutes 6
    loader         240  loader --count 128 --worker-rounds 2 --parts workers
    distributed    420  distributed --ranks 1 --images 64
    ema             60  ops ema --archs vit_base vit_small vit_large --seconds 4 --rounds 101
    attention      120  ops attention linear --seconds 4
    batch          120  {OPS} --images 8 16 32 --prototypes 65536 --dtypes bfloat16
    float32         90  {OPS} --images 64 --prototypes 65536 --dtypes float32
    width          120  {OPS} --images 64 --prototypes 4096 262144 --dtypes bfloat16
"""
TINY = "--no-compile --global-size 32 --local-size 16 --local-crops 2 --out-dim 64 --images 2"
TINY += " --archs vit_nano --patches 8"
REHEARSED = f"""
    tests          900
    headline       900  ops loss --no-compile --images 2 --rounds 2 --prototypes 512
    ema            900  ops ema --rounds 2 --archs vit_tiny
    profile        900  patch_size --profile {TINY}
    patch_size     900  patch_size {TINY} --optimizations vit_nano --rounds 2 --minutes 1
    loader         900  loader --quick --parts core
    distributed    900  distributed --ranks 1 --arch vit_nano --small --images 2 --updates 2
"""


def parts(out: Path, rehearse: bool) -> list[tuple[str, float, list[str]]]:
    """Name, most seconds and arguments to Python, in the order of the list above."""
    found = []
    for part in (REHEARSED if rehearse else GPU).strip().splitlines():
        name, seconds, *words = part.split()
        if name == "tests":
            stems = " ".join(names for names, needs in TESTED.items() if all(map(find_spec, needs))).split()
            command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{s}.py" for s in stems)]
            command += ["-k", "triton and (upstream or layout)"] if rehearse else ["-m", "cuda"]
            command += ["-n", "12"] if find_spec("xdist") and not rehearse else []
        else:
            device = ["--device", "cpu" if rehearse else "cuda", "--out", str(out / name)]
            command = ["-m", f"benchmarks.{words[0]}", *words[1:], *device]
        found.append((name, float(seconds), command))
    return found


def run(command: list[str], env: dict[str, str], log: Path, seconds: float) -> str:
    """How it ended. A part that runs out of time is asked to stop, then killed with all that it started."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)  # pytest reports its failures
            return f"stopped after {seconds:.0f} s, see {log.name}"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if code and (
        missing := re.search(r"^(?:ModuleNotFound|Import)Error: (.*)", log.read_text(), re.MULTILINE)
    ):
        return f"left out: {missing[1]}"
    return "ok" if code == 0 else f"failed with {code}, see {log.name}"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8, help="after which no part begins or goes on")
    parser.add_argument("--parts", nargs="*", help="only these; default: all, in order")
    parser.add_argument("--rehearse", action="store_true", help="the same without a GPU, at tiny sizes")
    args = parser.parse_args()
    out, end = args.out.resolve(), time.monotonic() + 60 * args.minutes
    out.mkdir(parents=True, exist_ok=True)
    env = os.environ | ({"TRITON_INTERPRET": "1"} if args.rehearse else {})
    planned = parts(out, args.rehearse)
    summary: list[dict[str, Any]] = []
    if unknown := {*(args.parts or ())} - {name for name, *_ in planned}:
        names = " ".join(name for name, *_ in planned)
        parser.error(f"no parts {' '.join(sorted(unknown))}: there are {names}")
    for name, limit, command in planned:
        if args.parts and name not in args.parts:
            continue
        start = time.monotonic()
        seconds, status = min(limit, end - start), "left out: no time"
        if seconds >= 5:
            status = run([sys.executable, *command], env, out / f"{name}.log", seconds)
        summary.append({"part": name, "status": status, "seconds": round(time.monotonic() - start, 1)})
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        shutil.make_archive(str(out), "gztar", out.parent, out.name)
        print(f"{name}: {status}", flush=True)
    if any(part["status"].startswith(("failed", "stopped", "left out: no time")) for part in summary):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
