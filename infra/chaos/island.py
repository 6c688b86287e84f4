"""A platform whose disk is ours to break: ``headrace up`` in a mount namespace of its own.

What is mounted there is seen by nobody else, and gone with the last process of the platform, however that ended: no
mount and no loop device can be left behind. Shared memory is fresh in each namespace, as it is after a power cut.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from headrace.errors import HeadraceError
from infra.bench.processes import descendants
from infra.chaos.launch import Up

SHARED_MEMORY_BYTES = 1024**3
PROGRAMS = ("unshare", "mount", "mkfs.ext4")
PROBE_BYTES = 16 * 1024**2
COPY_TRIES_MAX = 500
COPY_STEP_S = 0.002

Mount = Sequence[str]


class NotStill(HeadraceError):
    """A disk could not be copied as it was at one instant."""

    title = "The disk does not stand still"


class Island(Up):
    """A platform under test on a file system of its own. From outside, ``data`` leads into its namespace."""

    def __init__(
        self,
        place: Path,
        mounts: Sequence[Mount],
        *,
        env: Mapping[str, str] | None = None,
        room: str = "infra",
        port: int = 0,
    ) -> None:
        """Describe it; nothing is started or mounted yet.

        Args:
            place: an empty folder: the mount point, the same for all that are to look alike from inside.
            mounts: what to mount before the platform starts, as the arguments of ``mount``.
            env: settings, as environment variables.
            room: what to run in place of ``infra``, given the same words.
            port: of the gateway; a free one if 0.
        """
        place.mkdir(parents=True, exist_ok=True)
        super().__init__(place / "headrace", env=env, port=port)
        self.pid_file = place.with_suffix(".pid")
        self.said = place.with_suffix(".out")
        self._inside = self.data
        self._mounts = [*mounts, ("-t", "tmpfs", "-o", f"size={SHARED_MEMORY_BYTES}", "shm", "/dev/shm")]  # noqa: S108
        self._room = room

    def _command(self) -> list[str]:
        where = ["--port", str(self.port), "--data", str(self._inside)]
        up = [sys.executable, "-P", "-m", self._room, "up", *where, *self._options]
        script = [shlex.join(["mount", *mount]) for mount in self._mounts]
        script.append("exec " + shlex.join(up))
        return [*_NAMESPACE, "sh", "-c", " && ".join(script)]

    def _spawn(self) -> None:
        self.data = self._inside
        super()._spawn()
        self.data = self.seen(self._inside)

    def seen(self, path: Path) -> Path:
        """Return where an absolute path of the island is found from outside."""
        return Path(f"/proc/{self.pid}/root") / str(path).lstrip("/")

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Stop every process of the platform for a moment, and let all go on."""
        stopped = [self.pid]
        os.kill(self.pid, signal.SIGSTOP)  # first, so that it starts nothing meanwhile
        try:
            for pid in descendants(self.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                    stopped.append(pid)
            yield
        finally:
            for pid in reversed(stopped):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)


_NAMESPACE = ["unshare", "--mount", "--propagation", "private"]


def cannot_mount(loop: bool) -> str:
    """Return why this process may not mount what an island needs; nothing where it may.

    Args:
        loop: whether a file system in a file is needed, and not only one in memory.
    """
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    with tempfile.TemporaryDirectory(prefix="headrace-probe-") as folder:
        point = Path(folder) / "point"
        point.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "probe", str(point)]
        if loop:
            image = make_image(Path(folder) / "image", PROBE_BYTES)
            mount = ["mount", "-o", "loop", str(image), str(point)]
        tried = subprocess.run([*_NAMESPACE, *mount], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"this user may not mount: {tried.stderr.strip()[-200:]}"


def make_image(path: Path, size: int) -> Path:
    """Make a file with an ext4 file system of so many bytes; what is empty in it takes no room."""
    with path.open("wb") as image:
        image.truncate(size)
    lazy = ["-E", "lazy_itable_init=0,lazy_journal_init=0"]
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", *lazy, str(path)], check=True)  # noqa: S607
    return path


def copy_disk(image: Path, target: Path) -> float:
    """Copy what a mounted image holds at one instant, and return that instant in epoch seconds.

    A disk holds one state at a time, and a copy takes a while: it counts only if nothing was written meanwhile.

    Raises:
        NotStill: the disk was written to each time.
    """
    device = next(
        path.parent.parent
        for path in Path("/sys/block").glob("loop*/loop/backing_file")
        if path.read_text().strip() == str(image.resolve())
    )
    for _ in range(COPY_TRIES_MAX):
        before, at = _writes(device), time.time()
        if before is not None:
            copy_image(image, target)
            if _writes(device) == before:
                return at
        time.sleep(COPY_STEP_S)
    raise NotStill(f"{image} was written to {COPY_TRIES_MAX} times while it was copied")


def _writes(device: Path) -> int | None:
    """Return how often a block device was written to so far, or None while it is being written to."""
    fields = (device / "stat").read_text().split()
    return None if int(fields[8]) else int(fields[4])


def copy_image(source: Path, target: Path) -> None:
    """Copy what the disk holds at this moment, holes left out."""
    read = os.open(source, os.O_RDONLY)
    size = os.fstat(read).st_size
    with target.open("wb") as write:
        write.truncate(size)
        at = 0
        try:
            while at < size:
                try:
                    at = os.lseek(read, at, os.SEEK_DATA)
                except OSError:  # there is nothing but a hole from here on
                    break
                end = os.lseek(read, at, os.SEEK_HOLE)
                while at < end:
                    at += os.copy_file_range(read, write.fileno(), min(end - at, 1 << 24), at, at)
        finally:
            os.close(read)
