"""Functions that misbehave, each in its own way. They note what they did as those in ``effects`` do."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from headrace import Context, function, on
from infra.chaos.effects import note

PATH = Path(__file__)
TIMEOUT_S = 2.0  # of those that never end
FORKS_MAX = 200  # the bound of the bomb itself, should nothing else bound it
LINGER_S = 300.0


@on(deadline="60s")
@function(timeout="20s")
def greedy(task: dict[str, Any], ctx: Context) -> int:
    """Take four gigabytes and write on every page."""
    note(task, ctx)
    taken = bytearray(4 * 1024**3)
    return len(taken)


@on(deadline="60s")
@function(timeout="2s")
def busy(task: dict[str, Any], ctx: Context) -> None:
    """Count for ever."""
    note(task, ctx)
    number = 0
    while True:
        number += 1


@on(deadline="60s")
@function(timeout="2s")
def deaf(task: dict[str, Any], ctx: Context) -> None:
    """Ignore every signal that can be ignored, and sleep."""
    note(task, ctx)
    for number in range(1, signal.NSIG):
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(1)


@on(deadline="60s")
@function(timeout="2s")
def stuck(task: dict[str, Any], ctx: Context) -> None:
    """Block in C with the interpreter locked, so that no signal handler of Python ever runs."""
    note(task, ctx)
    while True:
        ctypes.PyDLL(None).sleep(1000)


def _linger(pids: str) -> None:
    """Be a process that got away: in a session of its own, telling its id, and staying."""
    os.setsid()
    handle = os.open(pids, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(handle, f"{os.getpid()}\n".encode())
    os.close(handle)
    time.sleep(LINGER_S)
    os._exit(0)


@on(deadline="60s")
@function(timeout="10s")
def bomb(task: dict[str, Any], ctx: Context) -> int:
    """Fork until it is not let, and leave all of them behind."""
    note(task, ctx)
    forked = 0
    for _ in range(FORKS_MAX):
        try:
            pid = os.fork()
        except OSError:
            break
        if pid == 0:
            _linger(task["pids"])
        forked += 1
    return forked


@on(deadline="60s")
@function(timeout="10s")
def detached(task: dict[str, Any], ctx: Context) -> str:
    """Leave a grandchild behind that belongs to nobody."""
    token = note(task, ctx)
    pid = os.fork()
    if pid == 0:
        if os.fork() == 0:
            _linger(task["pids"])
        os._exit(0)
    os.waitpid(pid, 0)
    return token


@on(deadline="60s")
@function(timeout="2s")
def noisy(task: dict[str, Any], ctx: Context) -> None:
    """Write to stdout without an end."""
    note(task, ctx)
    while True:
        sys.stdout.write("all work and no play makes a dull log\n")


@on(deadline="60s")
@function(timeout="20s")
def large(task: dict[str, Any], ctx: Context) -> bytes:
    """Return so many bytes."""
    note(task, ctx)
    return b"x" * int(task["bytes"])


@on(deadline="60s")
@function(timeout="5s")
def flood(task: dict[str, Any], ctx: Context) -> list[str]:
    """Build a result without an end."""
    note(task, ctx)
    found: list[str] = []
    while True:
        found.append("more" * 250_000)
