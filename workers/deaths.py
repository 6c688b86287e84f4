"""How a child died, told to the person whose function it was."""

from __future__ import annotations

import os
import re
import signal
from contextlib import suppress

from headrace.failures import TRACEBACK_CHARS_MAX, is_above, is_ours, shorten

WORDS_BYTES_MAX = 64 * 1024

_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)


def cause(status: int | None, error: str = "") -> str:
    """Return why a process is gone, as the end of a sentence that begins with the function's name.

    Args:
        status: its wait status; None where it never was or nobody knows.
        error: what was said instead of a status.
    """
    if status is None:
        return f"could not be run: {error}" if error else "was lost with its process, for an unknown reason"
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"ended its process with exit code {code} instead of returning (os._exit, or a library that exits)"
    name, meaning = f"signal {-code}", ""
    with suppress(ValueError):
        name = signal.Signals(-code).name
        meaning = signal.strsignal(-code) or ""
    if name == "SIGKILL":
        meaning = "killed from outside; often it is the kernel, when the machine runs out of memory"
    return f"died with its process from {name}" + (f" ({meaning})" if meaning else "")


def last_words(descriptor: int) -> str:
    """Return the user's frames that a dying process wrote down, as a traceback; empty if there are none."""
    text = os.pread(descriptor, WORDS_BYTES_MAX, 0).decode("utf-8", "replace")
    frames = [
        match for match in _FRAME.findall(text.rpartition("(most recent call first)")[2]) if not is_ours(match[0])
    ]
    while frames and is_above(frames[-1][0]):
        frames.pop()  # the outermost frame comes last here
    if not frames:
        return ""
    lines = [f'  File "{path}", line {line}, in {name}' for path, line, name in reversed(frames)]
    return shorten("\n".join(["Traceback (most recent call last):", *lines]), TRACEBACK_CHARS_MAX)


def forget_words(descriptor: int) -> None:
    """Empty what a process wrote down that then went on to live."""
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
