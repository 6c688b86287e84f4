"""The log file of a server process: appended to by the process itself, kept below a size by its parent."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

LOG_BYTES_MAX = 8 * 1024 * 1024


class LogFile:
    """A file and the one before it (``NAME.1``), together at most about twice ``bytes_max``."""

    def __init__(self, path: Path, bytes_max: int = LOG_BYTES_MAX) -> None:
        self.path = path
        self.older = path.with_name(path.name + ".1")
        self.bytes_max = bytes_max
        self._from = 0

    def open(self) -> int:
        """Return a file descriptor to append to, readable by its owner only; close it once the process has it."""
        self.trim()
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._from = os.fstat(handle).st_size
        return handle

    def trim(self) -> None:
        """Move what is there to ``NAME.1`` if it has grown too large.

        The process keeps its descriptor, so the content is copied and the file cut: it appends, and goes on at the
        new end. What it writes between the copy and the cut is lost, which a log line may be.
        """
        try:
            if self.path.stat().st_size <= self.bytes_max:
                return
            shutil.copyfile(self.path, self.older)
            self.older.chmod(0o600)
            os.truncate(self.path, 0)
        except OSError:
            return  # it is not there, or its disk is full; what watches over the process must not fail over this
        self._from = 0

    def tail(self, lines: int = 12, chars_max: int = 3000) -> str:
        """Return the last lines since the process was started."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(min(self._from, size), size - chars_max))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])
