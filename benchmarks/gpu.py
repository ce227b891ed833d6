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

ROOT = Path(__file__).parent.parent
# Part, most seconds, module and its arguments.
OPS = "benchmarks.ops loss --seconds 4 --rounds 101"
SIZES = "benchmarks.patch_size --optimizations --compiled"
GPU = f"""
    tests          420  pytest -q -m cuda
    headline       120  {OPS} --images 64 --prototypes 65536 --dtypes bfloat16
    profile        150  benchmarks.patch_size --profile --archs vit_small --patches 16
    patch_size     300  {SIZES} --archs vit_small --patches 16 8 --minutes 3
    optimizations  560  benchmarks.patch_size --archs vit_small --patches 16 --minutes 5
    sizes          420  {SIZES} --minutes 6
    loader         240  benchmarks.loader --count 128 --worker-rounds 2 --parts workers
    distributed    420  benchmarks.distributed --ranks 1 --images 64
    ema             60  benchmarks.ops ema --archs vit_base vit_small vit_large --seconds 4 --rounds 101
    attention      120  benchmarks.ops attention linear --seconds 4
    batch          120  {OPS} --images 8 16 32 --prototypes 65536 --dtypes bfloat16
    float32         90  {OPS} --images 64 --prototypes 65536 --dtypes float32
    width          120  {OPS} --images 64 --prototypes 4096 262144 --dtypes bfloat16
"""
TINY = "--no-compile --global-size 32 --local-size 16 --local-crops 2 --out-dim 64 --images 2"
TINY += " --archs vit_nano --patches 8"
REHEARSED = f"""
    tests          900  pytest -q -k follows_the_upstream
    headline       900  benchmarks.ops loss --no-compile --images 2 --rounds 2 --prototypes 512
    ema            900  benchmarks.ops ema --rounds 2 --archs vit_tiny
    profile        900  benchmarks.patch_size --profile {TINY}
    patch_size     900  benchmarks.patch_size {TINY} --optimizations vit_nano --rounds 2 --minutes 1
    loader         900  benchmarks.loader --quick --parts core
    distributed    900  benchmarks.distributed --ranks 1 --arch vit_nano --small --images 2 --updates 2
"""


def importable(command: list[str], env: dict[str, str], log: Path) -> list[str]:
    """The test files that hold what pytest is to run and can be imported here; `log` names the others."""
    collect = [*command, "tests", "--collect-only", "--continue-on-collection-errors"]
    done = subprocess.run(collect, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    log.write_text(done.stdout + done.stderr)
    return sorted(
        {line.partition("::")[0] for line in done.stdout.splitlines() if re.match(r"tests/.*::", line)}
    )


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
    missing = re.search(r"^(?:ModuleNotFound|Import)Error: (.*)", log.read_text(), re.MULTILINE)
    if code and missing:
        return f"left out: {missing[1]}"
    return f"failed with {code}, see {log.name}" if code else "ok"


def main() -> None:
    """See the module's docstring."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8, help="after which no part begins or goes on")
    parser.add_argument("--parts", nargs="*", help="only these; default: all, in order")
    parser.add_argument("--rehearse", action="store_true", help="the same without a GPU, at tiny sizes")
    args = parser.parse_args()
    lines = (REHEARSED if args.rehearse else GPU).strip().splitlines()
    planned = {name: (float(seconds), words) for name, seconds, *words in map(str.split, lines)}
    if unknown := {*(args.parts or ())} - planned.keys():
        parser.error(f"no parts {' '.join(sorted(unknown))}: there are {' '.join(planned)}")
    out, end = args.out.resolve(), time.monotonic() + 60 * args.minutes
    out.mkdir(parents=True, exist_ok=True)
    env, summary = os.environ | ({"TRITON_INTERPRET": "1"} if args.rehearse else {}), []
    for name in args.parts or planned:
        limit, words = planned[name]
        start, command = time.monotonic(), [sys.executable, "-m", *words]
        if name == "tests":
            command += importable(command, env, out / "collected.log")
            command += ["-n", "12"] if find_spec("xdist") and not args.rehearse else []
        else:
            command += ["--device", "cpu" if args.rehearse else "cuda", "--out", str(out / name)]
        seconds, status = min(limit, end - time.monotonic()), "left out: no time"
        if seconds >= 5:
            status = run(command, env, out / f"{name}.log", seconds)
        summary.append({"part": name, "status": status, "seconds": round(time.monotonic() - start, 1)})
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        shutil.make_archive(str(out), "gztar", out.parent, out.name)
        print(f"{name}: {status}", flush=True)
    if any(str(part["status"]).startswith(("failed", "stopped", "left out: no time")) for part in summary):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
