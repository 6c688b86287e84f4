"""Fetched content on the disk of this machine, by its SHA-256, shared by all workers of one user.

``content/BOOT/DIGEST`` is what is complete, ``growing/KEY`` what is on its way, ``known/KEY`` which content an address
held when it was last asked. What says that something is in use is a lock on the file itself, which the kernel drops
with the process that held it: nothing is left behind by a crash. Nothing is synced to disk either, so what was fetched
before the machine last started is checked once more before it is used.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import msgspec
from msgspec import Struct

from headrace.errors import BadRequest, Unavailable
from workers.egress import Stopped
from workers.transfer import JOURNAL, journal_of

LOOK_S = 0.05
KNOWN_MAX = 10_000
LOOKS_AFTER = 4096
SPARE = 20  # the share of the cache that is freed at once where it is full
COUNT_BYTES = 80
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Known(Struct, frozen=True, kw_only=True):
    """Which content an address held: its entity tag, and the size and SHA-256 that were found."""

    etag: str
    size: int
    sha256: str


class Count(Struct, frozen=True, kw_only=True):
    """What lies here at most, in bytes, and how often room was made since somebody looked."""

    bytes: int
    made: int


class Held:
    """Content that stays where it is until ``close`` is called, or this process ends."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self._handle: int | None = handle

    def close(self) -> None:
        """Let go of it. Safe to repeat."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Cache:
    """The folder. Methods block; call them in a thread."""

    def __init__(self, root: Path, *, bytes_max: int, disk_bytes_min: int = 0, boot: str | None = None) -> None:
        """Open it, and make it if it is not there.

        Args:
            root: the folder; only this user may enter it.
            bytes_max: what may lie in it. What was used longest ago leaves first, and never what is in use.
            disk_bytes_min: free bytes that are left on its disk.
            boot: names the time since this machine started.
        """
        self.boot = boot if boot is not None else _boot()
        self._bytes_max = bytes_max
        self._disk_bytes_min = disk_bytes_min
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._content, self._growing, self._known = root / "content", root / "growing", root / "known"
        self._ours = self._content / self.boot
        for folder in (self._content, self._ours, self._growing, self._known):
            folder.mkdir(mode=0o700, exist_ok=True)
        self._lock = root / "lock"

    # ------------------------------------------------------------ what is complete

    def hold(self, sha256: str) -> Held | None:
        """Return the content of this digest, if it is here, and note that it was used."""
        for folder in self._boots():
            held = _held(folder / sha256)
            if held is None:
                continue
            if folder == self._ours:
                with suppress(OSError):
                    os.utime(held.path)
                return held
            # From before the machine started: it may never have reached the disk. Another worker may be quicker.
            with held, suppress(FileNotFoundError):
                if _digest(held.path) == sha256:
                    held.path.replace(self._ours / sha256)
                else:
                    held.path.unlink()
            with suppress(OSError):
                folder.rmdir()  # once it is empty
            return self.hold(sha256)
        return None

    def adopt(self, path: Path, sha256: str) -> None:
        """Take in a file from ``growing``, whose digest was checked by the caller."""
        path.chmod(0o444)
        os.utime(path)
        path.replace(self._ours / sha256)

    def recall(self, name: str) -> Known | None:
        """Return what is known of an address."""
        with suppress(OSError, msgspec.MsgspecError):
            return msgspec.json.decode((self._known / _key(name)).read_bytes(), type=Known)
        return None

    def remember(self, name: str, known: Known) -> None:
        """Note which content an address held."""
        place = self._known / _key(name)
        aside = place.with_name(f"{place.name}.{os.getpid()}.{threading.get_ident()}")
        aside.write_bytes(msgspec.json.encode(known))
        aside.replace(place)

    # ------------------------------------------------------------ what is on its way

    @contextmanager
    def growing(self, name: str, stopped: threading.Event) -> Iterator[Path]:
        """Lend the file in which something grows, to one at a time on this machine; what is half there stays.

        Raises:
            Stopped: nobody waits for it any more.
        """
        path = self._growing / _key(name)
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _leads_to(path, handle):
                    yield path
                    if _leads_to(path, handle) and not os.fstat(handle).st_size:
                        path.unlink()  # nothing came of it
                    return
            except BlockingIOError:
                if stopped.wait(LOOK_S):
                    raise Stopped from None
            finally:
                os.close(handle)

    def room(self, size: int, growing: Path) -> None:
        """Make room for a file that will grow to ``size`` bytes, at the cost of what was used longest ago.

        Raises:
            BadRequest: it is larger than the whole cache.
            Unavailable: what is in use leaves too little room.
        """
        if size > self._bytes_max:
            raise BadRequest(
                f"{size:,} bytes do not fit into the cache of {self._bytes_max:,}",
                hint="Stage a part of it; an operator sets the size with HEADRACE_CACHE_BYTES_MAX.",
            )
        with self._alone() as lock:
            count = _read_count(lock)
            # All that lies here is looked at when it may be too much; else many small files would cost their square.
            if count is None or count.made >= LOOKS_AFTER or not self._fits(count.bytes, size, growing):
                count = Count(bytes=self._evict_for(size, growing), made=0)
            _write_count(lock, Count(bytes=count.bytes + size, made=count.made + 1))
            # Taken up now, while nobody else looks: two that make room at once must not count the same room twice.
            if growing.stat().st_size != size:
                os.truncate(growing, 0)
                journal_of(growing).unlink(missing_ok=True)  # what it says is there is there no more
                _allocate(growing, size)

    def _fits(self, taken: int, size: int, growing: Path) -> bool:
        return taken + size <= self._bytes_max and self._disk_free() >= size - _allocated(growing)

    def _evict_for(self, size: int, growing: Path) -> int:
        """Make room for ``size`` bytes, and a little more so that the next ones have it; return what is still there."""
        self._trim()
        files = self._files(growing)
        taken = sum(found.st_size for _, found in files)
        spare = 0 if taken + size <= self._bytes_max else self._bytes_max // SPARE
        for path, found in sorted(files, key=lambda f: f[1].st_mtime):
            if self._fits(taken + spare, size, growing):
                break
            if _evict(path):
                taken -= found.st_size
        if taken + size > self._bytes_max:
            raise Unavailable(
                f"the cache has no room for {size:,} bytes: {taken:,} of {self._bytes_max:,} are in use",
                hint="Try again later, or give it more with HEADRACE_CACHE_BYTES_MAX.",
            )
        if self._disk_free() < size - _allocated(growing):
            raise Unavailable(
                f"the disk of the cache has no room for {size:,} bytes", hint="Free some space on it, or move it."
            )
        return taken

    def _disk_free(self) -> int:
        space = os.statvfs(self._content)
        return space.f_bavail * space.f_frsize - self._disk_bytes_min

    def _files(self, but: Path) -> list[tuple[Path, os.stat_result]]:
        found = []
        for folder in (*self._boots(), self._growing):
            with suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    path = Path(entry.path)
                    with suppress(FileNotFoundError):
                        if path.suffix != JOURNAL and path != but:
                            found.append((path, entry.stat(follow_symlinks=False)))
        return found

    def _boots(self) -> list[Path]:
        others = [folder for folder in self._content.iterdir() if folder != self._ours]
        return [self._ours, *others]

    @contextmanager
    def _alone(self) -> Iterator[int]:
        """Lend the lock of the whole folder, in which the count of what lies here is kept."""
        handle = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)

    def _trim(self) -> None:
        """Forget what is known of some addresses, if it has become too many."""
        names = list(os.scandir(self._known))
        if len(names) > KNOWN_MAX:
            for entry in sorted(names, key=lambda e: e.stat().st_mtime)[: len(names) - KNOWN_MAX // 2]:
                Path(entry.path).unlink(missing_ok=True)


def _read_count(lock: int) -> Count | None:
    with suppress(msgspec.MsgspecError):
        return msgspec.json.decode(os.pread(lock, COUNT_BYTES, 0), type=Count)
    return None


def _write_count(lock: int, count: Count) -> None:
    os.pwrite(lock, msgspec.json.encode(count).ljust(COUNT_BYTES), 0)


def _held(path: Path) -> Held | None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    fcntl.flock(handle, fcntl.LOCK_SH)
    if _leads_to(path, handle):
        return Held(path, handle)
    os.close(handle)  # it was evicted between opening and locking it
    return None


def _evict(path: Path) -> bool:
    """Remove a file that nobody uses, and say whether it is gone."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        journal_of(path).unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def _leads_to(path: Path, handle: int) -> bool:
    with suppress(OSError):
        return os.path.samestat(path.lstat(), os.fstat(handle))
    return False


def _allocated(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_blocks * 512
    return 0


def _allocate(path: Path, size: int) -> None:
    if not size:
        return
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        os.ftruncate(handle, 0)
        raise Unavailable(f"there is no room for {size:,} bytes: {error.strerror}", hint="Free some space.") from error
    finally:
        os.close(handle)


def _key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _boot() -> str:
    """Return what names the time since this machine started; elsewhere than on Linux, this moment."""
    with suppress(OSError):
        return _BOOT.read_text().strip()
    return f"{time.time():.0f}"
