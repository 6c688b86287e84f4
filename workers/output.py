"""What a running function prints: cut into lines, up to a limit, and never in the way of anything else."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

from headrace.children import ChildLimits
from headrace.failures import size_text
from headrace.wire import Said

READ_BYTES = 64 * 1024
READS_MAX = 4  # a pipe holds 64 KiB; who writes faster than we read must not keep us from other work
LINE_BYTES_MAX = 16 * 1024

_log = logging.getLogger(__name__)

OnSaid = Callable[[Said], None]
OnLine = Callable[[str, str], None]


class Pipe:
    """The worker's end of a pipe that a child prints to, cut into lines."""

    def __init__(self, stream: str, on_line: Callable[[str, bytes], None]) -> None:
        """Open both ends; ``theirs`` is a descriptor for the child, to be closed by who hands it over."""
        self._loop = asyncio.get_running_loop()
        self._stream = stream
        self._on_line = on_line
        self._held = b""
        self._ours, self.theirs = os.pipe2(os.O_CLOEXEC)
        self._reading = True
        os.set_blocking(self._ours, False)
        self._loop.add_reader(self._ours, self._read)

    def drain(self) -> None:
        """Take what has been printed up to now."""
        for _ in range(READS_MAX):
            if not self._read():
                return

    def end(self) -> None:
        """Take what has been printed up to now, an unfinished line too."""
        self.drain()
        if self._held:
            held, self._held = self._held, b""
            self._on_line(self._stream, held)

    def close(self) -> None:
        """Close our end."""
        self._stop_reading()
        os.close(self._ours)

    def abandon(self) -> None:
        """Close both ends, where there will be no child."""
        self.close()
        os.close(self.theirs)

    def _read(self) -> bool:
        if not self._reading:
            return False
        try:
            data = os.read(self._ours, READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._stop_reading()
            return False
        *lines, held = (self._held + data).split(b"\n")
        if len(held) > LINE_BYTES_MAX:
            # A progress bar draws over itself without ever ending its line; only its last state counts.
            held = held.rpartition(b"\r")[2]
        if len(held) > LINE_BYTES_MAX:
            lines.append(held)
            held = b""
        self._held = held
        for line in lines:
            self._on_line(self._stream, line)
        return True

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._ours)


class Output:
    """The output of one invocation: passes it on until a limit is reached, then says so once and drops the rest."""

    __slots__ = ("_bytes_left", "_cut", "_limits", "_lines_left", "_on_line", "_on_said")

    def __init__(self, limits: ChildLimits, on_said: OnSaid, on_line: OnLine) -> None:
        self._limits = limits
        self._on_said = on_said
        self._on_line = on_line
        self._bytes_left = limits.output_bytes_max
        self._lines_left = limits.output_lines_max
        self._cut = False

    def said(self, said: Said) -> None:
        """Take what the child said: a line of its log, lines it printed, or how far it is."""
        if said.fraction is not None:
            self._pass_on(self._on_said, said)
        elif said.level in ("stdout", "stderr"):
            for line in said.text.removesuffix("\n").split("\n"):
                self.line(said.level, line)
        elif self._spend(len(said.text) + 1, "stderr"):
            self._pass_on(self._on_said, said)

    def line(self, stream: str, line: str) -> None:
        """Take one printed line."""
        if self._spend(len(line) + 1, stream):
            # Of a line that was drawn over, people see the last state.
            self._pass_on(self._on_line, stream, line.rstrip("\r").rpartition("\r")[2])

    def _spend(self, size: int, stream: str) -> bool:
        if self._cut:
            return False
        self._lines_left -= 1
        self._bytes_left -= size
        if self._lines_left >= 0 and self._bytes_left >= 0:
            return True
        self._cut = True
        most = self._limits
        bound = size_text(most.output_bytes_max) if self._bytes_left < 0 else f"{most.output_lines_max:,} lines"
        self._pass_on(self._on_line, stream, f"(output cut at {bound})")
        return False

    def _pass_on(self, call: Callable[..., None], *what: object) -> None:
        try:
            call(*what)
        except Exception:
            _log.exception("output was not taken")  # the function is not to blame, and its result still counts
            self._cut = True
