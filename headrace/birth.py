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
from contextlib import suppress
from pathlib import Path

from headrace import groups
from headrace.channel import Channel
from headrace.children import ChildLimits, Fork
from headrace.runner import Runner

TELL_SIGNAL = signal.SIGRTMAX - 1  # leaves SIGUSR1 and SIGUSR2 to the user's code
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
OOM_SCORE_MORE = 500

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
    with suppress(OSError):  # without it, the worker's counting is what holds
        if order.group:
            groups.enter(order.group)
    _attach(out, err)
    for fd in (line, words):
        os.set_inheritable(fd, False)
    work = _folders(Path(order.scratch))
    _limit(order.limits)
    # A crash leaves the user's frames behind, and so does a process that is asked where it is.
    faulthandler.enable(file=words, all_threads=False)
    faulthandler.register(TELL_SIGNAL, file=words, all_threads=False)
    _reseed()
    Runner(Channel(socket.socket(fileno=line)), order.limits, work, order.group).serve()


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
    """Have the kernel hold what it can hold; what no such limit can say is watched by the worker."""
    _hold(resource.RLIMIT_CORE, 0)
    _hold(resource.RLIMIT_FSIZE, limits.scratch_bytes_max)
    if limits.user_tasks_max is not None:
        _hold(resource.RLIMIT_NPROC, limits.user_tasks_max)
    if limits.memory_bytes_max is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _hold(resource.RLIMIT_AS, pages * resource.getpagesize() + limits.memory_bytes_max)
    with suppress(OSError):
        # Should the machine run out of memory, a function has to go before the worker and the servers beside it.
        adjusted = Path("/proc/self/oom_score_adj")
        adjusted.write_text(str(min(1000, int(adjusted.read_text()) + OOM_SCORE_MORE)))


def _hold(what: int, most: int) -> None:
    hard = resource.getrlimit(what)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(what, (most, most))


def _reseed() -> None:
    """Give each child random numbers of its own: all are copies of one process."""
    random.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
