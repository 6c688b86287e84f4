"""How a server process tells the one that started it that it is ready: a line on a pipe."""

from __future__ import annotations

import contextlib
import os

from infra.settings import Settings


class ReadyPipe:
    """The pipe of one child, for all its restarts. Each process says its id, so an old word is not taken for new."""

    def __init__(self) -> None:
        self._read, self.fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read, False)
        self._said = b""

    def has_said(self, pid: int | None) -> bool:
        """Say whether the process with this id is ready."""
        with contextlib.suppress(BlockingIOError):
            self._said += os.read(self._read, 4096)
        *lines, self._said = self._said.split(b"\n")
        return pid is not None and str(pid).encode() in lines

    def close(self) -> None:
        """Close both ends."""
        os.close(self._read)
        os.close(self.fd)


def say_ready(settings: Settings) -> None:
    """Tell whoever started this process that it is ready; nobody is told where nobody asked."""
    if settings.ready_fd is not None:
        with contextlib.suppress(OSError):  # a supervisor that is gone takes us with it
            os.write(settings.ready_fd, b"%d\n" % os.getpid())
            os.close(settings.ready_fd)
