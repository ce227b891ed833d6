"""The cores of this machine, and the processes that work on them."""

import itertools
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

import torch

T = TypeVar("T")
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


def init_worker(worker: int = 0) -> None:
    """Set up a worker process: one thread, and it obeys the process that started it alone.

    Ctrl-C and job managers signal the whole process group, while the first process needs the work that is
    under way. So a worker, which inherited the signal handlers, ends at SIGTERM from that process alone, and
    with that process, however that ended.
    """
    for ignored in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        if not hasattr(signal, "sigtimedwait"):
            time.sleep(0.2)
        elif (heard := signal.sigtimedwait({signal.SIGTERM}, 0.2)) and heard.si_pid == parent:
            os._exit(0)
    os._exit(1)


# What a process of `map_in_processes` does, and whether it is to stop.
_work: Callable[[Any], Any]
_stop: Any


def map_in_processes(
    work: Callable[[Any], T], jobs: Iterable[Any], workers: int, tick: Callable[[], object] = lambda: None
) -> Iterator[T]:
    """Yield work(job) of all jobs in their order, made by `workers` processes.

    What a process raises, or Ctrl-C, stops the others and is raised here.

    Args:
        work: in long jobs it calls `raise_if_stopped` now and then.
        tick: called a few times a second.

    Raises:
        concurrent.futures.process.BrokenProcessPool: a process died.
    """
    jobs, running = iter(jobs), deque[Future[T]]()
    context = multiprocessing.get_context()
    stop = context.Event()
    with ProcessPoolExecutor(workers, context, _init_process, (work, stop)) as pool:
        try:
            while True:
                for job in itertools.islice(jobs, 2 * workers - len(running)):
                    running.append(pool.submit(_call, job))
                if not running:
                    return
                wait([running[0]], timeout=0.2)
                for future in running:
                    if future.done():
                        future.result()  # an error is raised though jobs before it are under way
                tick()
                while running and running[0].done():
                    yield running.popleft().result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _init_process(work: Callable[[Any], Any], stop: Any) -> None:
    global _work, _stop
    _work, _stop = work, stop
    init_worker()


def _call(job: Any) -> Any:
    return _work(job)


def raise_if_stopped() -> None:
    """Raise InterruptedError if `map_in_processes`, which runs this process, was stopped."""
    if _stop.is_set():
        raise InterruptedError
