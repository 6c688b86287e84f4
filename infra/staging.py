"""Where the log's server keeps atomic batches until they are committed: memory instead of disk, on a single server.

A batch is first staged in files of its own, then written and synced to the stream's own files, then acknowledged. What
is staged is thrown away when the server starts, so it needs no disk; on one, its creations, syncs and deletions cost
several times what the commit costs. Figures and reasons: ``infra/decisions/0003-batch-staging-on-tmpfs.md``.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import stat
from pathlib import Path

import structlog

_log = structlog.get_logger(__name__)

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - what we make in it is private and checked before use
FREE_BYTES_MIN = 256 * 1024 * 1024
PATIENCE_S = 2.0
STEP_S = 0.002


def staging_folder(key: str, memory: Path = SHARED_MEMORY) -> Path:
    """Return the private folder in memory for the data folder named by ``key``; it may not exist yet."""
    return memory / f"headrace-{os.geteuid()}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


async def link_staging(stream_dir: Path, key: str, memory: Path = SHARED_MEMORY) -> bool:
    """Make the server stage the batches of one stream in memory, and say whether it does.

    To be called each time the server has started, for it removes the link then. Safe while batches are on their way:
    the folder gives way to the link only at a moment when it is empty.

    Args:
        stream_dir: the stream's folder in the server's store.
        key: names the data folder, so that two platforms never share a staging folder.
        memory: a folder on tmpfs.

    Returns:
        False where that is not possible here (no such memory, too little of it, no stream on disk); then it is slower.
    """
    place = stream_dir / "batches"
    target = _private(staging_folder(key, memory))
    if target is None or not stream_dir.is_dir():
        return False
    if place.is_symlink() and place.readlink() == target:
        return True
    give_up_at = asyncio.get_running_loop().time() + PATIENCE_S
    while not _swap(place, target):
        if asyncio.get_running_loop().time() > give_up_at:
            _log.warning("batches are staged on disk: the staging folder is never empty", folder=str(place))
            return False
        await asyncio.sleep(STEP_S)
    return True


def is_linked(stream_dir: Path, key: str, memory: Path = SHARED_MEMORY) -> bool:
    """Say whether the link stands and its folder is there."""
    folder = staging_folder(key, memory)
    place = stream_dir / "batches"
    return place.is_symlink() and place.readlink() == folder and _is_ours(folder)


def remove_staging(key: str, memory: Path = SHARED_MEMORY) -> None:
    """Remove the staging folder; the server must have ended."""
    folder = staging_folder(key, memory)
    if _is_ours(folder):
        shutil.rmtree(folder, ignore_errors=True)


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


def _private(folder: Path) -> Path | None:
    """Make the folder, or take the one that is there if it is a real folder of ours that nobody else can enter."""
    try:
        space = os.statvfs(folder.parent)
        if space.f_bavail * space.f_frsize < FREE_BYTES_MIN:
            return None
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return None
    if not _is_ours(folder):
        _log.warning("batches are staged on disk: the folder in memory belongs to somebody else", folder=str(folder))
        return None
    return folder


def _is_ours(folder: Path) -> bool:
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
