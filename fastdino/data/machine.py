"""The cores of this machine, and how worker processes behave on it."""

import math
import os
import signal
import threading

import torch

_CPU_QUOTA = "/sys/fs/cgroup/cpu.max"


def cores() -> int:
    """Cores of this machine that this process may use."""
    number = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open(_CPU_QUOTA) as file:  # a container's share: "200000 100000" is two cores
            quota, period = file.read().split()
        number = min(number, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass
    return number


def choose_workers(batch: int, local_ranks: int = 1) -> int:
    """Cores that this process may use, less one for itself; no more than there are images in a batch.

    `local_ranks` processes of this machine share its cores.
    """
    return max(1, min(cores() // local_ranks - 1, batch))


def init_worker(worker: int) -> None:
    """Set up a worker of a DataLoader: one thread, and no signals but SIGTERM from the training process.

    Ctrl-C and job managers signal the whole process group, while the trainer needs batches to end its step.
    The workers inherited its handlers.
    """
    for ignored in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parent_sigterm, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)


def _exit_on_parent_sigterm(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
