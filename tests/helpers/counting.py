"""Counters: operators that wait for the device, and bytes that went over the loopback interface."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CountSyncs(TorchDispatchMode):
    """Counts what waits for the device: on a GPU by torch's sync debug mode, on a CPU reads of a value."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.count = 0
        self.cuda = device.startswith("cuda")

    def __enter__(self) -> "CountSyncs":
        if self.cuda:
            self.warnings = warnings.catch_warnings(record=True)
            self.seen = self.warnings.__enter__() or []
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self.cuda:
            torch.cuda.set_sync_debug_mode("default")
            self.warnings.__exit__(*error)
            self.count = sum("synchronizing CUDA operation" in str(w.message) for w in self.seen)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


def loopback_bytes() -> int:
    """Bytes sent over the loopback interface so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split()[9])
