"""What a command says when it cannot go on, and how it ends; the bar and the lines for people."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest

from fastdino import cli, distributed


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The command sets one, as if it were a process of its own."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def failing(error: BaseException, rank: int | None = None, **how: Any) -> int | str | None:
    """What the process ends with where its command raises `error`."""

    def command() -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        if rank is not None:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(SystemExit) as stopped:
            cli.run("fastdino-x", command, **how)
    return stopped.value.code


def test_the_exit_status_is_the_commands() -> None:
    assert cli.run("fastdino-x", lambda: 3) == 3
    assert cli.run("fastdino-x", lambda: None) == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("--seed -1: give 0 or more"), "fastdino-x: --seed -1: give 0 or more"),
        (FileNotFoundError("no file: give one"), "fastdino-x: no file: give one"),
        (ValueError(os.fsdecode(b"caf\xe9")), "fastdino-x: caf\\udce9"),
        (BrokenProcessPool("..."), "fastdino-x: a process died: often memory ran out; lower --workers"),
        (distributed.OtherRankFailed("rank 1 failed"), 1),
    ],
)
def test_an_error_is_one_line(error: Exception, said: str | int) -> None:
    assert failing(error) == said


def test_only_the_errors_named_are_a_line() -> None:
    assert failing(RuntimeError("no"), errors=(RuntimeError,)) == "fastdino-x: no"
    with pytest.raises(RuntimeError, match="no"):
        failing(RuntimeError("no"))
    with pytest.raises(KeyError, match="no"):
        failing(KeyError("no"), errors=(RuntimeError,))


def test_a_rank_says_which_it_is_and_only_rank_0_that_it_stopped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert failing(ValueError("no"), rank=1) == "fastdino-x, rank 1: no"
    assert failing(KeyboardInterrupt(), rank=1) == 130
    assert capsys.readouterr().err == ""
    assert failing(KeyboardInterrupt(), rank=0, stopped="stopped; the same command goes on") == 130
    assert capsys.readouterr().err == "fastdino-x: stopped; the same command goes on\n"
    assert signal.getsignal(signal.SIGTERM) == before  # torchrun ends the others by it


WAIT = """
import time
from fastdino import cli
def command():
    print("ready", flush=True)
    time.sleep(60)
cli.run("fastdino-x", command)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_command(how: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAIT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(how)
        _, error = process.communicate(timeout=300)
    assert (process.returncode, error) == (130, "fastdino-x: stopped\n")


def test_lines_are_said_as_they_are_by_rank_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "[bold]x[/bold] " * 20
    cli.say(long, os.fsdecode(b"caf\xe9"))
    assert capsys.readouterr().out == f"{long}\ncaf\\udce9\n"
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    cli.say("x")
    assert capsys.readouterr().out == ""


def test_a_bar_is_drawn_in_a_terminal_only_and_counts_what_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(cli.track("abc", "letters")) == [*"abc"]
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with cli.progress("letters", 10, "signs") as advance:
        advance(4)
        advance(6)
    out = capsys.readouterr().out
    assert "letters" in out
    assert "10/10" in out
    assert "signs" in out
    assert list(cli.track((c for c in "abc"), "letters", 3)) == [*"abc"]
    assert "3/3" in capsys.readouterr().out
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert list(cli.track("abc", "letters")) == [*"abc"]
    assert capsys.readouterr().out == ""
