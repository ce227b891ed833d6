"""One command for a GPU that is lent for minutes: tests, then benchmarks, the most telling first.

    python -m benchmarks.gpu --out DIR [--minutes 8] [--parts tests profile ...] [--rehearse]

Runs from a checkout with torch and triton alone, without a network, and without git if FASTDINO_COMMIT names
the commit; a part for which more must be installed is left out by name. Bring fastdino/libfastdino_cpu.so
with the checkout, or loaders crop by Pillow. Every part is a process of its own: its result is written as it
ends, a failure or a time-out is noted and the next part begins. All parts take some 40 minutes: --parts
chooses. `--rehearse` goes through the same without a GPU, at tiny sizes, with the Triton kernels in their
interpreter and the loss on the CPU.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PILLOW = ("PIL", "torchvision")
UPDATES = (*PILLOW, "rich", "safetensors", "tyro")
TRAINER = (*UPDATES, "tensorboard", "matplotlib")
TESTED: dict[str, tuple[str, ...]] = {  # and what they import beyond torch and triton
    "dino_loss": (),
    "ema": (),
    "packed_attention": (),
    "multi_crop_triton": PILLOW,
    "crops": PILLOW,
    "train": TRAINER,
    "loader": PILLOW,
    "dali": (*PILLOW, "sklearn", "nvidia"),
}
NEEDS = {
    "tests": ("pytest",),
    "patch_size": UPDATES,
    "profile": UPDATES,
    "means": UPDATES,
    "sizes": UPDATES,
    "data": (*TRAINER, "skimage", "sklearn"),
    "parallel": TRAINER,
}
# Part, most seconds, module of benchmarks and its arguments.
OPS = "ops --seconds 4 --rounds 101"
SIZES = "patch_size --means --loader --compiled"
GPU = f"""
    headline    120  {OPS} --images 64 --prototypes 65536 --dtypes bfloat16 --archs vit_base
    profile     150  profile
    patch_size  300  {SIZES} --archs vit_small --patches 16 8 --minutes 3
    tests       420
    means       560  patch_size --archs vit_small --patches 16 --minutes 5
    sizes       420  {SIZES} --minutes 6
    data        240  data --count 128 --worker-rounds 2 --parts gpu workers train
    parallel    420  parallel --ranks 1 --images 64 --updates 8
    step        420  step --archs vit_small --patches 16 --dtypes bfloat16 --seconds 15
    ema          60  {OPS} --images --prototypes --dtypes --archs vit_small vit_large
    batch       120  {OPS} --images 8 16 32 --prototypes 65536 --dtypes bfloat16 --archs
    float32      90  {OPS} --images 64 --prototypes 65536 --dtypes float32 --archs
    width       120  {OPS} --images 64 --prototypes 4096 262144 --dtypes bfloat16 --archs
"""
TOY = "--global-size 32 --local-size 16 --out-dim 64 --images 2"
REHEARSED = f"""
    tests       300
    loss        120  ops --no-compile --images 2 --rounds 2 --prototypes 512 --archs
    ema         120  ops --no-compile --images 2 --rounds 2 --prototypes --archs vit_tiny
    step        300  step --no-compile --archs vit_nano --patches 16 --images 1 --rounds 2
    data        120  data --quick --parts core
    patch_size  120  patch_size {TOY} --archs vit_nano --patches 8 --local-crops 2 --means vit_nano --loader
                     --no-compile --rounds 2 --minutes 1
    profile     120  profile {TOY} --arch vit_nano --patch 8
    parallel    240  parallel --ranks 1 --arch vit_nano --small --no-compile --images 2 --updates 2
"""


def parts(out: Path, rehearse: bool) -> list[tuple[str, float, list[str]]]:
    """Name, most seconds and arguments to Python, in the order of the list above."""
    found: list[tuple[str, float, list[str]]] = []
    for part in re.split(r"\n    (?=\w)", (REHEARSED if rehearse else GPU).rstrip())[1:]:
        name, seconds, *words = part.split()
        if name == "tests":
            tested = [f"tests/test_{stem}.py" for stem, needs in TESTED.items() if all(map(find_spec, needs))]
            which = ["-k", "triton and (upstream or layout)"] if rehearse else ["-m", "cuda"]
            command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *tested, *which]
        else:
            device = ["--device", "cpu" if rehearse else "cuda", "--out", str(out / name)]
            command = ["-m", f"benchmarks.{words[0]}", *device, *words[1:]]
        found.append((name, float(seconds), command))
    return found


def run(command: list[str], env: dict[str, str], log: Path, seconds: float) -> str:
    """How it ended. What runs out of its time is asked to stop, and then killed, with all that it started."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            return "ok" if code == 0 else f"failed with {code}, see {log.name}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)  # pytest tells what failed
            return f"stopped after {seconds:.0f} s, see {log.name}"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8, help="after which no part begins or goes on")
    parser.add_argument("--parts", nargs="*", help="these alone; default: all, in order")
    parser.add_argument("--rehearse", action="store_true", help="the same without a GPU, at tiny sizes")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    out, end = args.out.resolve(), time.monotonic() + 60 * args.minutes
    env = os.environ | ({"TRITON_INTERPRET": "1"} if args.rehearse else {})
    summary: list[dict[str, Any]] = []
    planned = parts(out, args.rehearse)
    if unknown := {*(args.parts or ())} - {name for name, *_ in planned}:
        names = " ".join(name for name, *_ in planned)
        parser.error(f"no parts {' '.join(sorted(unknown))}: there are {names}")
    for name, limit, command in planned:
        if args.parts and name not in args.parts:
            continue
        start = time.monotonic()
        seconds = min(limit, end - start)
        log = out / f"{name}.log"
        if lacking := [package for package in NEEDS.get(name, ()) if not find_spec(package)]:
            status = f"left out: not installed: {', '.join(lacking)}"
        elif seconds < 5:
            status = "left out: no time"
        else:
            status = run([sys.executable, *command], env, log, seconds)
        summary.append({"part": name, "status": status, "seconds": round(time.monotonic() - start, 1)})
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(f"{name}: {status}", flush=True)
    if any(not part["status"].startswith(("ok", "left out: not installed")) for part in summary):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
