"""Files of a run that nothing can spoil: checkpoints, config.json, teacher.safetensors.

Each is written beside its place, flushed to the disk and renamed, so one that is there is whole.
"""

import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException

from fastdino.checkpoint_reader import Reader, check, digests, misfit, read_info, read_metadata
from fastdino.config import Config, flag, from_dict, to_dict
from fastdino.distributed import cpu_group, full_tensor, gather, on_rank_zero, rank, world_size
from fastdino.files import (
    Lock,
    differences,
    holder,
    lock,
    read_json,
    sweep,
    sync,
    write_atomically,
    write_text,
)

# Fields that a continued run may change: none of them touches what is learnt, but by rounding.
MAY_CHANGE_ON_RESUME = {
    "data.data",  # the images themselves are compared, by their fingerprint in the checkpoint
    "data.include",
    "data.exclude",
    "data.loader",
    "data.workers",
    "data.max_unreadable",
    "data.val",
    "run.out",
    "run.precision",  # the type it comes to is compared, with that in the checkpoint
    "run.device",
    "run.log_every",
    "run.save_every",
    "run.keep",
    "run.keep_every_epochs",
    "run.knn_every_epochs",
    "run.knn_images",
    "run.max_nonfinite",
    "run.wandb",
    "optim.accumulate",  # fewer GPUs want more pieces
    "run.compile",
    "run.parallel",
    "run.attention",
    "run.activation_checkpointing",
}


def claim(out: Path, config: Config, tensors: Mapping[str, Tensor] | None = None) -> Lock:
    """Make `out` the folder of this run, new or continued, and hold it until the returned lock is closed.

    A run of another configuration is let through where --change or --extend says so; `changes` then names
    what differs.

    Args:
        out: the folder.
        config: the run.
        tensors: what its checkpoints hold, of these shapes.

    Raises:
        ValueError: it holds a run of another configuration (the differences are named), files of a run but no
            config.json, it is no folder, or another process is training in it.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: give a folder")
    out.mkdir(parents=True, exist_ok=True)
    # Not of the loader's processes: they outlive a kill -9 by seconds.
    held = lock(out)
    if held is None:
        raise ValueError(
            f"another process is training in {out}{holder(out)}: wait for it, or give another --out"
        )
    try:
        sweep(out)
        _sweep(out)
        _check_same_run(out, config, tensors or {})
    except BaseException:
        held.close()
        raise
    return held


def stored_config(out: Path) -> Config | None:
    """The configuration of the run in `out`; None where it has no checkpoint to go on from.

    Raises:
        ValueError: its config.json cannot be read.
    """
    path = out / "config.json"
    if not checkpoints(out) or not path.exists():
        return None
    # through the classes, so that a field newer than the run has the value it had before there was one
    try:
        return from_dict(Config, read_json(path))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}. Restore it, or give another --out") from None


def changes(out: Path, config: Config) -> dict[str, tuple[Any, Any]]:
    """What of `config` differs from the run in `out` and touches what is learnt: was and now, by dotted name.

    One file of weights by two paths is no difference.
    """
    stored = stored_config(out)
    if stored is None:
        return {}
    found = differences(_as_dict(stored), _as_dict(config))
    if _same_file(stored.model.init_from, config.model.init_from):
        found.pop("model.init_from", None)
    return {name: values for name, values in found.items() if name not in MAY_CHANGE_ON_RESUME}


def _same_file(was: str, now: str) -> bool:
    """Whether two paths may name one file, the first perhaps relative to another folder than this one."""
    a, b = ([part for part in Path(os.path.normpath(x)).parts if part != ".."] for x in (was, now))
    n = min(len(a), len(b))
    return bool(was and now) and (os.path.realpath(was) == os.path.realpath(now) or a[-n:] == b[-n:])


def _as_dict(config: Config) -> dict[str, Any]:
    """What is kept of a configuration: all but what is said of one continuation."""
    values = to_dict(config)
    for name in ("extend", "change"):
        del values["run"][name]
    return values


def write_config(out: Path, config: Config) -> None:
    """Write config.json."""
    write_text(out / "config.json", json.dumps(_as_dict(config), indent=2) + "\n")


def _check_same_run(out: Path, config: Config, tensors: Mapping[str, Tensor]) -> None:
    if not (out / "config.json").exists() and (
        found := [n for n in ("checkpoints", "metrics.jsonl", "teacher.safetensors") if (out / n).exists()]
    ):
        raise ValueError(f"{out} has {', '.join(found)} but no config.json: give another --out")
    if not checkpoints(out):  # a new run, or one that failed before it had anything to lose
        write_config(out, config)
        return
    differing = changes(out, config)
    if not differing:
        return
    longer = set(differing) == {"optim.epochs"}
    problem = _misfit(out, tensors)
    if (config.run.change or (config.run.extend and longer)) and not problem:
        return
    told = "".join(f"  {flag(name)}: was {was!r}, now {now!r}\n" for name, (was, now) in differing.items())
    how = "--extend" if longer else "--change"
    advice = f"to continue it, add {how} to continue it with these" if not problem else "to continue it"
    shapes = f"Its tensors have other shapes, which nothing can change: {problem}.\n" if problem else ""
    raise ValueError(
        f"{out} holds a run of another configuration:\n{told}{shapes}"
        f"Give the flags of that run {advice}, or give another --out to start anew."
    )


def _misfit(out: Path, tensors: Mapping[str, Tensor]) -> str:
    """How `tensors`, if any, differ from those of the newest checkpoint that can be read; else empty."""
    for path in reversed(checkpoints(out).values()) if tensors else ():
        with suppress(ValueError, OSError):
            metadata = read_metadata(path)
            more = sorted(metadata.state_dict_metadata.keys() - tensors.keys())
            return misfit(metadata, tensors) or (f"{more[0]} is there, not here" if more else "")
    return ""


class Saver:
    """Writes a run's checkpoints while it goes on: `save` copies the tensors, another thread writes them.

    All ranks take part, each with what it has (torch.distributed.checkpoint); rank 0 alone makes a checkpoint
    of what they wrote, by a rename once all of it is on the disk, then writes the teacher and removes what is
    no longer kept. A write that fails leaves the checkpoints before it and is reported by the next `finish`.

    Args:
        out: the run's folder, the same one for all ranks.
        keep, keep_every: see `prune`.
    """

    def __init__(self, out: Path, keep: int = 2, keep_every: int = 0) -> None:
        self.out, self.keep, self.keep_every = out, keep, keep_every
        self.group = cpu_group("checkpoints")  # its own: the thread's messages must not mix with others
        self.thread = ThreadPoolExecutor(1, "checkpoints")
        self.pending: tuple[int, Future[None]] | None = None

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        info: dict[str, Any],
        write_teacher: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin to write checkpoint `step`: named tensors, sharded or not, and a JSON-able dict.

        The tensors may change as soon as this returns. The thread of rank 0 calls `write_teacher`. Call
        `finish` before.
        """
        assert self.pending is None
        tmp = self.out / "checkpoints" / f".step_{step}.tmp"
        if rank() == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        # One process is what is meant. For good: it is DCP's thread that would warn.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        written = dcp.async_save(
            tensors, checkpoint_id=tmp, process_group=self.group, no_dist=self.group is None
        )
        self.pending = step, self.thread.submit(self._complete, step, written, info, write_teacher)

    def _complete(
        self, step: int, written: Any, info: dict[str, Any], write_teacher: Callable[[], None]
    ) -> None:
        metadata = written.result()
        if rank() != 0:
            return
        folder = self.out / "checkpoints"
        final, tmp = folder / f"step_{step}", folder / f".step_{step}.tmp"
        for name in {stored.relative_path for stored in metadata.storage_data.values()}:
            if not (tmp / name).exists():
                raise OSError(
                    f"{tmp / name}, which another rank wrote, is not here: --out must be on a file system "
                    "that all machines share"
                )
        info = info | {"checkpoint": step, "digests": digests(tmp)}
        (tmp / "info.json").write_text(json.dumps(info))
        for path in tmp.iterdir():
            sync(path)
        sync(tmp)
        old = folder / f".step_{step}.old.tmp"
        if final.exists():
            os.replace(final, old)
        os.replace(tmp, final)
        sync(folder)
        shutil.rmtree(old, ignore_errors=True)
        write_teacher()
        prune(self.out, self.keep, self.keep_every)

    def finish(self) -> str:
        """Wait for the last `save`. Returns why it failed, if it did; the same on all ranks."""
        if self.pending is None:
            return ""
        step, future = self.pending
        self.pending = None
        try:
            future.result()
            error = ""
        except (Exception, CheckpointException) as caught:  # DCP's, of all ranks, is a BaseException
            error = f"checkpoint {step} could not be written: {_reason(caught)}"
        return _agreed(error)

    def close(self) -> None:
        """End the thread, after the last save; with other ranks, that may be dead, it is not waited for."""
        self.thread.shutdown(wait=world_size() == 1)


def _agreed(error: str) -> str:
    """The first error of any rank, on all of them; empty if none has one."""
    return next(filter(None, gather(error)), "")


def _reason(error: BaseException) -> str:
    """What went wrong first, of an error that may hold those of several ranks."""
    failures = getattr(error, "failures", None)  # DCP's
    if failures:
        error = next(iter(failures.values()))[0]
    return " ".join(str(error).split()) or type(error).__name__


def save(out: Path, step: int, tensors: dict[str, Tensor], info: dict[str, Any]) -> Path:
    """Write checkpoint `step` of the run in `out` and wait for it. Returns its folder; raises OSError."""
    saver = Saver(out, keep=sys.maxsize)
    saver.save(step, tensors, info)
    error = saver.finish()
    saver.close()
    if error:
        raise OSError(error)
    return out / "checkpoints" / f"step_{step}"


def checkpoints(out: Path) -> dict[int, Path]:
    """Checkpoints of the run in `out` by step, oldest first."""
    # Not isdigit, for which other alphabets' digits are digits too.
    names = re.compile(r"step_(0|[1-9][0-9]{0,14})")
    found = {int(m[1]): p for p in (out / "checkpoints").glob("step_*") if (m := names.fullmatch(p.name))}
    return {step: path for step, path in sorted(found.items()) if path.is_dir()}


def load(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Fill `tensors` in place from checkpoint folder `path`; returns what `save` was given as `info`.

    However many ranks wrote it, and whether they held whole tensors or parts. Whoever wrote it, nothing in
    it is executed, and nothing is filled before its files have been found whole and of these sizes.

    Raises:
        ValueError: it cannot be read, on any rank; the tensors may then hold anything.
    """
    error, info = "", dict[str, Any]()
    try:
        info = read_info(path, verify=rank() == 0)
        if (step := info.pop("checkpoint", None)) is not None and path.name != f"step_{step}":
            raise ValueError(f"it is checkpoint {step} under another name")
        metadata = read_metadata(path)
        check(path, metadata, tensors)
    except Exception as caught:  # a damaged file can make a reader raise anything
        error = f"{path} cannot be read: {_reason(caught)}"
    if error := _agreed(error):
        raise ValueError(error)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")
            reader = Reader(path, metadata)
            dcp.load(tensors, storage_reader=reader, process_group=cpu_group(), no_dist=world_size() == 1)
    except (Exception, CheckpointException) as caught:
        error = f"{path} cannot be read: {_reason(caught)}"
    if error := _agreed(error):
        raise ValueError(error)
    return info


def load_newest(
    out: Path, tensors: dict[str, Tensor], check_info: Callable[[dict[str, Any]], None] = lambda info: None
) -> tuple[int, dict[str, Any], list[str]]:
    """Fill `tensors` from the newest checkpoint of the run in `out` that can be read.

    Args:
        out: the run's folder.
        tensors: see `load`.
        check_info: raises ValueError where it cannot go on from what `save` was given as `info`.

    Returns:
        its step and info, and a sentence on each newer one that cannot; step 0 and no info if there is none.

    Raises:
        ValueError: there are some, and none can be read.
    """
    problems: list[str] = []
    for step in on_rank_zero(lambda: list(reversed(checkpoints(out)))):
        path = out / "checkpoints" / f"step_{step}"
        try:
            info = load(path, tensors)
            check_info(info)
            return step, info, problems
        except ValueError as error:
            told = str(error)
            problems.append(told if told.startswith(str(path)) else f"{path} cannot be read: {told}")
    if problems:
        raise ValueError("\n".join([*problems, f"No checkpoint of {out} is left: give another --out."]))
    return 0, {}, []


def amend(path: Path, **values: Any) -> None:
    """Write checkpoint folder `path` anew with other values in its info."""
    write_text(path / "info.json", json.dumps(read_json(path / "info.json") | values))


def _sweep(out: Path) -> None:
    """Remove what killed saves left; a run's own alone calls it."""
    for leftover in (out / "checkpoints").glob(".step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def prune(out: Path, keep: int, keep_every: int) -> None:
    """Delete all checkpoints but the newest `keep` and those whose step is a multiple of `keep_every`.

    `keep_every` 0 keeps none for good.

    Also removes what a killed save left behind.
    """
    _sweep(out)
    for step, path in list(checkpoints(out).items())[:-keep]:
        if not keep_every or step == 0 or step % keep_every:
            # Renamed first, so that a deletion cut short never looks like a checkpoint.
            doomed = path.with_name(f".{path.name}.tmp")
            os.replace(path, doomed)
            shutil.rmtree(doomed)


def cpu_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's tensors in the CPU's memory, put together if sharded; of rank 0, else empty."""
    state: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        value = full_tensor(value.detach())
        if rank() == 0:
            state[name] = value.to("cpu", copy=True).contiguous()
    return state


def write_teacher(path: Path, teacher: nn.Module | dict[str, Tensor], config: Config, step: int) -> None:
    """Write the teacher, or what `cpu_state_dict` made of it, as one file with its configuration inside."""
    state = cpu_state_dict(teacher) if isinstance(teacher, nn.Module) else teacher
    metadata = {"format": "pt", "fastdino_config": json.dumps(_as_dict(config)), "step": str(step)}
    write_atomically(path, lambda tmp: save_file(state, tmp, metadata=metadata))


def teacher_step(out: Path) -> int | None:
    """The step of the teacher.safetensors in `out`, or None if there is none that can be read."""
    try:
        return int(_teacher_header(out)["step"])
    except (OSError, KeyError, ValueError):
        return None  # not there, or damaged: it is written anew


def read_teacher(path: str | Path) -> tuple[dict[str, Tensor], Config]:
    """The tensors and configuration of a teacher.safetensors, or of that of a run's folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, or not one of fastdino's.
    """
    config = read_teacher_config(path)
    try:
        return load_file(_teacher_path(path)), config
    except (SafetensorError, KeyError) as error:  # KeyError: of a type that torch does not have
        raise ValueError(f"{path} is not a safetensors file: {error}") from None


def read_teacher_config(path: str | Path) -> Config:
    """The configuration alone; raises as `read_teacher`."""
    metadata = _teacher_header(path)
    if "fastdino_config" not in metadata:
        raise ValueError(f"{path} carries no fastdino configuration: it was not written by fastdino-train")
    try:
        return from_dict(Config, json.loads(metadata["fastdino_config"]))
    except (TypeError, AttributeError, KeyError, RecursionError, OverflowError, ValueError) as error:
        raise ValueError(f"{path} carries a configuration that cannot be read: {error}") from None


def is_ours(path: str | Path) -> bool:
    """Whether `path` is a run's folder or a teacher.safetensors, rather than somebody else's weights."""
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return path.is_dir() or not path.exists()
    return "fastdino_config" in _teacher_header(path)


def _teacher_path(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        path = path / "teacher.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a run's folder or its teacher.safetensors")
    return path


def _teacher_header(path: str | Path) -> dict[str, str]:
    path = _teacher_path(path)
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
