"""``sys.stdout`` and ``sys.stderr`` of a child: what Python prints goes to the run line by line, in order.

Python's own output takes the same line to the worker as ``ctx.log``, so that both keep their order. What C code and
subprocesses write to the descriptors 1 and 2 takes two pipes; C buffers are emptied before an invocation ends.
"""

from __future__ import annotations

import ctypes
import io
import os
import sys
import threading
from collections.abc import Callable
from typing import BinaryIO, cast

HELD_BYTES_MAX = 8 * 1024
_LINE_BUFFERED = 1  # _IOLBF of glibc and musl

Say = Callable[[str, str], None]


class _Stream(io.BufferedIOBase):
    """The bytes below ``sys.stdout``: whole lines are said, the rest is held until its line ends."""

    def __init__(self, name: str, descriptor: int, say: Say) -> None:
        super().__init__()
        self._stream = name
        self._descriptor = descriptor
        self._say = say
        self._held = b""
        self._lock = threading.RLock()
        self._process = os.getpid()

    def writable(self) -> bool:
        """Say that it can be written to."""
        return True

    def fileno(self) -> int:
        """Return the descriptor for code that writes beside Python, such as a subprocess."""
        return self._descriptor

    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # type: ignore[override]  # bytes-like is all that comes
        """Pass on the lines that are complete."""
        raw = bytes(data)
        if os.getpid() != self._process:
            # A process that the user's code forked must not speak on the child's line to the worker.
            os.write(self._descriptor, raw)
            return len(raw)
        with self._lock:
            held = self._held + raw
            end = held.rfind(b"\n") + 1
            if len(held) - end > HELD_BYTES_MAX:
                end = len(held)
            self._held = held[end:]
            if end:
                self._say(self._stream, held[:end].decode("utf-8", "replace"))
        return len(raw)

    def end_line(self) -> None:
        """Pass on what is held although its line has not ended."""
        if self._held and os.getpid() == self._process:
            with self._lock:
                held, self._held = self._held, b""
                self._say(self._stream, held.decode("utf-8", "replace"))


class Capture:
    """Both streams of a process."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._libc = ctypes.CDLL(None)
        for name in ("stdout", "stderr"):
            # C code would otherwise hold its lines back until its buffer is full, as it does for every pipe.
            stream = ctypes.c_void_p.in_dll(self._libc, name)
            self._libc.setvbuf(stream, None, _LINE_BUFFERED, 0)
        self._open()

    def _open(self) -> None:
        self._raw = (_Stream("stdout", 1, self._say), _Stream("stderr", 2, self._say))
        self._out, self._err = map(_text, self._raw)

    def begin(self) -> None:
        """Put the streams in place; an earlier invocation may have closed or replaced them."""
        if self._out.closed or self._err.closed:
            self._open()
        # Declared final, and taken all the same: code that prints to the original streams is heard too.
        sys.stdout = sys.__stdout__ = self._out  # type: ignore[misc]  # final for the types, not for us
        sys.stderr = sys.__stderr__ = self._err  # type: ignore[misc]  # the same

    def flush(self) -> None:
        """Pass on what Python still holds back."""
        for wrapper, raw in zip((self._out, self._err), self._raw, strict=True):
            if not wrapper.closed:
                wrapper.flush()
                raw.end_line()

    def end(self) -> None:
        """Pass on all that was printed, C buffers included, so that none of it is taken for the next invocation's."""
        self.flush()
        self._libc.fflush(None)


def _text(raw: _Stream) -> io.TextIOWrapper:
    return io.TextIOWrapper(cast(BinaryIO, raw), encoding="utf-8", errors="backslashreplace", line_buffering=True)
