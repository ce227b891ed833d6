"""One command for a GPU that is lent for minutes: tests, then benchmarks, the most telling first.

    python -m benchmarks.gpu --out DIR [--minutes 8] [--rehearse]

Runs from a checkout with torch and triton alone, without a network. Every part is a process of its own: its
result is written as it ends, a failure or a time-out is noted and the next part begins. `--rehearse` goes
through the same parts without a GPU, at tiny sizes, with the Triton kernels in their interpreter and the loss
on the CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PILLOW = ("PIL", "torchvision")
TESTED: dict[str, tuple[str, ...]] = {  # and what they import beyond torch and triton
    "dino_loss": (),
    "ema": (),
    "attention": (),
    "multi_crop_triton": PILLOW,
    "dali": (*PILLOW, "sklearn", "nvidia"),
}
OPS = ["-m", "benchmarks.ops"]
STEP = ["-m", "benchmarks.step"]
DATA = ["-m", "benchmarks.data"]
UPDATES = ["-m", "benchmarks.patch_size"]
NEEDS = {
    "tests": ("pytest",),
    "data": (*PILLOW, "skimage", "sklearn"),
    "patch_size": (*PILLOW, "rich", "safetensors", "tyro"),
}
# an update of a toy, every variant but the compiled ones
TINY_UPDATES = (
    "--archs vit_nano --patches 8 --global-size 32 --local-size 16 --local-crops 2 --out-dim 64 --images 2 "
    "--means vit_nano --loader --no-compile --rounds 2 --minutes 1"
)


def parts(out: Path, rehearse: bool) -> list[tuple[str, float, list[str]]]:
    """Name, most seconds and arguments to Python, the most telling first."""
    tested = [f"tests/test_{stem}.py" for stem, needs in TESTED.items() if all(map(find_spec, needs))]
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *tested]
    if rehearse:
        small_step = [
            "--no-compile",
            "--archs",
            "vit_nano",
            "--patches",
            "16",
            "--images",
            "1",
            "--rounds",
            "2",
        ]
        tiny = [*OPS, "--device", "cpu", "--no-compile", "--images", "2", "--rounds", "2"]
        return [
            ("tests", 300, [*tests, "-k", "triton and (upstream or layout)"]),
            ("loss", 120, [*tiny, "--out", str(out / "loss"), "--prototypes", "512", "--archs"]),
            ("ema", 120, [*tiny, "--out", str(out / "ema"), "--prototypes", "--archs", "vit_tiny"]),
            (
                "step",
                300,
                [*STEP, "--device", "cpu", "--out", str(out / "step"), *small_step],
            ),
            (
                "data",
                120,
                [*DATA, "--device", "cpu", "--out", str(out / "data"), "--quick", "--parts", "core"],
            ),
            (
                "patch_size",
                120,
                [*UPDATES, "--device", "cpu", "--out", str(out / "patch_size"), *TINY_UPDATES.split()],
            ),
        ]
    gpu = [*OPS, "--device", "cuda", "--seconds", "4", "--rounds", "101"]
    return [
        ("tests", 180, [*tests, "-m", "cuda"]),
        (
            "headline",
            120,
            [*gpu, "--out", str(out / "headline"), *_problems("64", "65536", "bfloat16", "vit_base")],
        ),
        (
            "step",
            240,
            [
                *STEP,
                "--device",
                "cuda",
                "--out",
                str(out / "step"),
                "--archs",
                "vit_small",
                "--seconds",
                "15",
            ],
        ),
        (
            "data",
            150,
            [*DATA, "--device", "cuda", "--out", str(out / "data"), "--parts", "gpu", "workers", "train"],
        ),
        (
            "patch_size",
            300,
            [*UPDATES, "--device", "cuda", "--out", str(out / "patch_size"), "--minutes", "4"],
        ),
        ("ema", 60, [*gpu, "--out", str(out / "ema"), *_problems("", "", "", "vit_small vit_large")]),
        ("batch", 120, [*gpu, "--out", str(out / "batch"), *_problems("8 16 32", "65536", "bfloat16", "")]),
        ("float32", 90, [*gpu, "--out", str(out / "float32"), *_problems("64", "65536", "float32", "")]),
        ("width", 120, [*gpu, "--out", str(out / "width"), *_problems("64", "4096 262144", "bfloat16", "")]),
    ]


def _problems(images: str, prototypes: str, dtypes: str, archs: str) -> list[str]:
    given = {"--images": images, "--prototypes": prototypes, "--dtypes": dtypes, "--archs": archs}
    return [word for flag, words in given.items() for word in (flag, *words.split())]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8, help="after which no part begins or goes on")
    parser.add_argument("--rehearse", action="store_true", help="the same without a GPU, at tiny sizes")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    out, end = args.out.resolve(), time.monotonic() + 60 * args.minutes
    env = os.environ | ({"TRITON_INTERPRET": "1"} if args.rehearse else {})
    summary: list[dict[str, Any]] = []
    for name, limit, command in parts(out, args.rehearse):
        start = time.monotonic()
        seconds = min(limit, end - start)
        log = out / f"{name}.log"
        if lacking := [package for package in NEEDS.get(name, ()) if not find_spec(package)]:
            status = f"left out: not installed: {', '.join(lacking)}"
        elif seconds < 5:
            status = "left out: no time"
        else:
            with log.open("w") as file:
                try:
                    done = subprocess.run(
                        [sys.executable, *command],
                        cwd=ROOT,
                        env=env,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        timeout=seconds,
                        check=False,
                    )
                    status = (
                        "ok" if done.returncode == 0 else f"failed with {done.returncode}, see {log.name}"
                    )
                except subprocess.TimeoutExpired:
                    status = f"stopped after {seconds:.0f} s, see {log.name}"
        summary.append({"part": name, "status": status, "seconds": round(time.monotonic() - start, 1)})
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(f"{name}: {status}", flush=True)
    if any(not part["status"].startswith(("ok", "left out: not installed")) for part in summary):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
