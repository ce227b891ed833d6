"""The whole trainer in one and in several processes: images/s, bytes sent, time to save and to go on, syncs.

    python -m benchmarks.parallel [--device cuda] [--ranks 1 2] [--arch vit_tiny] [--images 8] [--updates 12]

Runs fastdino-train's own loop under torchrun, on random images made for it, once for each way: plain (one
process without a group), DDP and FSDP2, each with and without torch.compile. An update has as many images for
all, so of two ranks each does half the work; on a CPU each has half the cores. Prints and writes:

    images/s        of the later half of the updates, from the trainer's own log lines, each update logged
    sent MB         by each rank in an update: what the loopback interface carried, less what a run of one
                    update carries; on a CPU, where ranks talk over it
    save ms         what a checkpoint keeps the training waiting for: copying the tensors
    on disk ms      until it is whole on the disk, beside the training
    resume ms       to read it back
    syncs           places in an update that wait for the device, where it does not log: on a GPU those that
                    torch's sync debug mode finds, on a CPU operators that read a value on the host
    peak MB         of rank 0
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from benchmarks.measure import Conditions, Row, folder, machine, write
from fastdino import checkpoint, distributed, train
from fastdino.config import Config, CropPolicy, DataConfig, ModelConfig, OptimConfig, RunConfig
from fastdino.monitor import read_metrics
from tests.counting import CountSyncs, loopback_bytes


def config_of(job: Row, folder: Path, updates: int, log_every: int) -> Config:
    """A run of so many updates, one to an epoch."""
    return Config(
        data=DataConfig(data=str(folder / "images"), workers=0, crops=CropPolicy(**job["crops"])),
        model=ModelConfig(arch=job["arch"], patch_size=16, drop_path_rate=0.1),
        optim=OptimConfig(epochs=1, batch_size=job["images"]),
        run=RunConfig(
            out=str(folder / job["name"] / f"{updates}_{log_every}"),
            device=job["device"],
            parallel=job["parallel"],
            compile=job["compile"],
            log_every=log_every,
            save_every=10**9,
            knn_every_epochs=0,
        ),
    )


def work(path: Path) -> None:
    """One rank of one job: what torchrun starts."""
    job = json.loads(path.read_text())
    where, updates = path.parent, job["updates"]
    images = where / "images"
    times: dict[str, float] = {}
    copy, complete, load = checkpoint.Saver.save, checkpoint.Saver._complete, checkpoint.load_newest

    def timed(name: str, call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                times[name] = 1e3 * (time.perf_counter() - began)

        return run

    checkpoint.Saver.save = timed("save", copy)  # type: ignore[method-assign]
    checkpoint.Saver._complete = timed("on disk", complete)  # type: ignore[method-assign]
    checkpoint.load_newest = timed("resume", load)

    def use(count: int) -> None:
        """Have the folder hold as many images as a run of so many updates takes."""
        if distributed.rank() == 0:
            numbers = np.random.default_rng(0)
            images.mkdir(exist_ok=True)
            for i in range(count * job["images"]):
                if not (picture := images / f"{i:05d}.jpg").exists():
                    Image.fromarray(numbers.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(picture)
            for extra in sorted(images.iterdir())[count * job["images"] :]:
                extra.unlink()
        distributed.gather(None)

    def run(count: int, log_every: int) -> tuple[Path, int]:
        use(count)
        config = config_of(job, where, count, log_every)
        before = loopback_bytes()
        distributed.gather(None)
        train.train(config)
        distributed.gather(None)
        return Path(config.run.out), loopback_bytes() - before

    row: Row = {key: job[key] for key in ("name", "ranks", "parallel", "compile")}
    with distributed.joined(job["device"], job["parallel"]):
        _, few = run(1, 1)
        out, many = run(updates, 1)
        rates = [m["images_per_s"] for m in read_metrics(out)][updates // 2 :]
        row["images/s"] = float(np.median(rates))
        row["peak MB"] = 1e3 * read_metrics(out)[-1]["memory_gb"]
        row["sent MB"] = (many - few) / (updates - 1) / job["ranks"] / 1e6 if dist.is_initialized() else 0.0
        train.train(config_of(job, where, updates, 1))  # goes on from its end
        row |= {f"{name} ms": value for name, value in times.items()}
        # between two log lines: the difference of two lengths has neither lines nor ends in it
        counts = []
        for count in (2, 4):
            with CountSyncs(job["device"]) as syncs:
                run(count, 100)
            counts.append(syncs.count)
        row["syncs"] = (counts[1] - counts[0]) / 2
    if distributed.place().rank == 0:
        (where / "row.json").write_text(json.dumps(row))


def start(job: Row, where: Path) -> Row:
    """Run a job under torchrun, or as one process; its row."""
    path = where / "job.json"
    path.write_text(json.dumps(job))
    (where / "row.json").unlink(missing_ok=True)
    command = [sys.executable]
    if job["parallel"] != "auto":
        command += ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        command += [f"--nproc-per-node={job['ranks']}"]
    threads = max(1, (os.cpu_count() or 1) // job["ranks"])
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run([*command, "-m", "benchmarks.parallel", "--job", str(path)], env=env, check=True)
    return json.loads((where / "row.json").read_text())


COLUMNS = ("images/s", "sent MB", "save ms", "on disk ms", "resume ms", "syncs", "peak MB")


def table(rows: list[Row]) -> str:
    """As Markdown."""
    lines = ["", "| ranks | way | " + " | ".join(COLUMNS) + " |", "|--:|---|" + "--:|" * len(COLUMNS)]
    for row in rows:
        cells = [f"{row[name]:.2f}" if name in COLUMNS[:2] else f"{row[name]:.0f}" for name in COLUMNS]
        lines.append(f"| {row['ranks']} | {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DEVICE/parallel")
    parser.add_argument("--ranks", type=int, nargs="*", help="default: 1 2 on a CPU, 1 to all GPUs")
    parser.add_argument("--arch", default="vit_small" if cuda else "vit_tiny")
    parser.add_argument("--images", type=int, default=128 if cuda else 8, help="an update, of all ranks")
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--small", action="store_true", help="crops of 32 and 16 pixels, to try it out")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        work(args.job)
        return
    device = torch.device(args.device)
    counts = args.ranks or ([1, *range(2, torch.cuda.device_count() + 1)] if cuda else [1, 2])
    out = args.out or folder(device) / "parallel"
    about, conditions = machine(device), Conditions()
    crops = {"global_crops_size": 32, "local_crops_size": 16} if args.small else {}
    rows: list[Row] = []
    for ranks in counts:
        for parallel in (["auto"] if ranks == 1 else []) + ["ddp", "fsdp"]:
            for compile_ in ["off", "on"] if args.compile else ["off"]:
                name = {"auto": "plain"}.get(parallel, parallel) + (", compiled" if compile_ == "on" else "")
                job = {
                    "name": name,
                    "ranks": ranks,
                    "parallel": parallel,
                    "compile": compile_,
                    "device": args.device,
                    "arch": args.arch,
                    "images": args.images,
                    "updates": args.updates,
                    "crops": crops,
                }
                with tempfile.TemporaryDirectory() as where:
                    rows.append(start(job, Path(where)))
                text = table(rows)
                write("The trainer in several processes", rows, about | conditions.describe(), text, out)
    print(table(rows))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
