"""Folders for child processes: private, made for each, removed with it, and swept up after a worker that was killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX = "pool-"
LOCK = "lock"


class Scratch:
    """The folder of one pool below ``root``, locked for as long as its worker lives."""

    def __init__(self, root: Path) -> None:
        """Make the folder, and remove those of workers that are gone."""
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep(root)
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
        self._lock = _lock(self.folder)

    def make(self, number: int) -> Path:
        """Make the folder of a child."""
        path = self.folder / f"child-{number}"
        path.mkdir(mode=0o700)
        return path

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _lock(folder: Path) -> int | None:
    """Lock a pool's folder, or return None if it is locked already."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sweep(root: Path) -> None:
    for folder in root.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another worker that starts may be sweeping too
            if not (folder / LOCK).exists():
                continue  # it is being made at this moment
            held = _lock(folder)
            if held is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(held)
