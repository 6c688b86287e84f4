"""What a freshly forked process does to become a child: a session, limits and a folder of its own."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import random
import resource
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from headrace.channel import Channel
from headrace.runner import Runner
from headrace.wire import ChildLimits, Fork

TELL_SIGNAL = signal.SIGRTMAX - 1  # leaves SIGUSR1 and SIGUSR2 to the user's code
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(number: int) -> None:
    """Have the kernel send this signal when the parent is gone, however it went."""
    _prctl(PR_SET_PDEATHSIG, number)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that none gets away."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def live(order: Fork, fds: Sequence[int], zygote: int) -> None:
    """Become a child and work until the worker hangs up.

    Args:
        order: what the worker asked for.
        fds: the line to the worker, stdout, stderr, and where the last words go.
        zygote: the process id of the parent.
    """
    line, out, err, words = fds
    os.setsid()
    die_with_parent(signal.SIGKILL)
    if os.getppid() != zygote:
        return  # it died before the line above; nobody would tell us
    adopt_orphans()
    _attach(out, err)
    for fd in (line, words):
        os.set_inheritable(fd, False)
    work = _folders(Path(order.scratch))
    _limit(order.limits)
    # A crash leaves the user's frames behind, and so does a process that is asked where it is.
    faulthandler.enable(file=words, all_threads=False)
    faulthandler.register(TELL_SIGNAL, file=words, all_threads=False)
    _reseed()
    Runner(Channel(socket.socket(fileno=line)), order.limits, work).serve()


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")


def _attach(out: int, err: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (out, 1), (err, 2)):
        os.dup2(source, target)
        os.close(source)


def _folders(scratch: Path) -> Path:
    """Make the working directory, emptied after each invocation, and a folder for temporary files, which stay."""
    work, temporary = scratch / "work", scratch / "tmp"
    for folder in (work, temporary):
        folder.mkdir(mode=0o700)
    os.chdir(work)
    os.environ["TMPDIR"] = str(temporary)
    tempfile.tempdir = None  # what the zygote may have found out is not ours
    return work


def _limit(limits: ChildLimits) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limits.memory_bytes_max is None:
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + limits.memory_bytes_max
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _reseed() -> None:
    """Give each child random numbers of its own: all are copies of one process."""
    random.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
