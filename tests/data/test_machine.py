"""Processes that share the work: results in order, and an end for all at once."""

import itertools
import os
import time

import pytest

from fastdino.data.machine import map_in_processes, raise_if_stopped


def half_asleep(i: int) -> tuple[int, int]:
    time.sleep(0.05 * (i % 3))
    return i, os.getpid()


def sleep_or_fail(i: int) -> None:
    if i == 1:
        raise ZeroDivisionError("job 1")
    for _ in range(3000):
        raise_if_stopped()
        time.sleep(0.01)


def test_results_come_in_the_order_of_the_jobs_from_other_processes():
    found = list(map_in_processes(half_asleep, iter(range(20)), 3))
    assert [i for i, _ in found] == list(range(20))
    assert len({process for _, process in found} - {os.getpid()}) == 3


def test_no_job_is_no_result():
    assert list(map_in_processes(half_asleep, [], 2)) == []


def test_jobs_are_taken_as_they_are_needed():
    results = map_in_processes(half_asleep, itertools.count(), 2)
    assert [i for i, _ in itertools.islice(results, 9)] == list(range(9))
    results.close()


def test_an_error_ends_the_jobs_under_way():
    begin = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="job 1"):
        list(map_in_processes(sleep_or_fail, range(9), 2))
    assert time.monotonic() - begin < 15  # the first job alone takes 30 seconds


def test_tick_is_called_while_jobs_are_under_way():
    ticks = []
    list(map_in_processes(half_asleep, [2, 2], 1, lambda: ticks.append(1)))
    assert ticks
