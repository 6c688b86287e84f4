"""Where the log's server keeps atomic batches until they are committed: memory instead of disk, on a single server.

A batch is first staged in files of its own, then written and synced to the stream's own files, then acknowledged. What
is staged is thrown away when the server starts, so it needs no disk; on one, its creations, syncs and deletions cost
several times what the commit costs. Figures and reasons: ``infra/decisions/0003-batch-staging-on-tmpfs.md``.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
from pathlib import Path

import structlog

_log = structlog.get_logger(__name__)

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - what we make in it is private and checked before use
FREE_BYTES_MIN = 256 * 1024 * 1024
LOCK = "lock"
PATIENCE_S = 2.0
STEP_S = 0.002


class Staging:
    """The staging folder of one data folder: private, locked while it is in use, swept up after a kill."""

    def __init__(self, key: str, memory: Path = SHARED_MEMORY) -> None:
        """Describe it; nothing is made yet.

        Args:
            key: names the data folder, so that two platforms never share a staging folder.
            memory: a folder on tmpfs.
        """
        self._memory = memory
        self._prefix = f"headrace-{os.geteuid()}-"
        self.folder = memory / (self._prefix + hashlib.sha256(key.encode()).hexdigest()[:16])
        self._lock: int | None = None

    async def link(self, stream_dir: Path) -> bool:
        """Make the server stage the batches of one stream in memory, and say whether it does.

        To be called each time the server has started, for it removes the link then. Safe while batches are on their
        way: the folder in the store gives way to the link only at a moment when it is empty.

        Args:
            stream_dir: the stream's folder in the server's store.

        Returns:
            False where that is not possible (no such memory, too little of it, no stream on disk); then it is slower.
        """
        if not stream_dir.is_dir() or not self._take():
            return False
        if self.is_linked(stream_dir):
            return True
        give_up_at = asyncio.get_running_loop().time() + PATIENCE_S
        while not _swap(stream_dir / "batches", self.folder):
            if asyncio.get_running_loop().time() > give_up_at:
                _log.warning("batches are staged on disk: that folder is never empty", folder=str(stream_dir))
                return False
            await asyncio.sleep(STEP_S)
        return True

    def is_linked(self, stream_dir: Path) -> bool:
        """Say whether the link stands and its folder is there."""
        place = stream_dir / "batches"
        return place.is_symlink() and place.readlink() == self.folder and _is_ours(self.folder)

    def remove(self) -> None:
        """Remove the folder and what is in it; the server must have ended."""
        if self._lock is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    def _take(self) -> bool:
        """Make the folder or take the one that is there, and lock it; False if that cannot be."""
        try:
            if self._lock is not None:
                if _names(self.folder / LOCK, self._lock):
                    return True
                os.close(self._lock)  # somebody cleared the memory: begin anew
                self._lock = None
            space = os.statvfs(self._memory)
            if space.f_bavail * space.f_frsize < FREE_BYTES_MIN:
                return False
            self._sweep()
            self.folder.mkdir(mode=0o700, exist_ok=True)
            if not _is_ours(self.folder):
                _log.warning("batches are staged on disk: the folder in memory is not ours", folder=str(self.folder))
                return False
            self._lock = _locked(self.folder)
        except OSError as error:
            _log.warning("batches are staged on disk", why=str(error))
        return self._lock is not None

    def _sweep(self) -> None:
        """Remove what platforms of this user left that were killed and did not start again."""
        for folder in self._memory.glob(self._prefix + "*"):
            # One without a lock is being made at this moment.
            if folder != self.folder and _is_ours(folder) and (folder / LOCK).exists():
                handle = _locked(folder)
                if handle is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(handle)


def _locked(folder: Path) -> int | None:
    """Lock a staging folder, or return None if somebody else has, or has removed it meanwhile."""
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    if not _names(folder / LOCK, handle):
        os.close(handle)
        return None
    return handle


def _names(path: Path, handle: int) -> bool:
    """Say whether the path still leads to the open file."""
    with contextlib.suppress(OSError):
        return os.path.samestat(path.lstat(), os.fstat(handle))
    return False


def _swap(place: Path, target: Path) -> bool:
    """Put the link where the folder is; False if a batch is in it, or the server has made it again this instant."""
    try:
        if place.is_symlink():
            place.unlink()
        elif place.is_dir():
            place.rmdir()  # refuses while anything is in it
        place.symlink_to(target, target_is_directory=True)
    except OSError:
        return False
    return True


def _is_ours(folder: Path) -> bool:
    """Say whether it is a real folder of this user that nobody else can enter."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
