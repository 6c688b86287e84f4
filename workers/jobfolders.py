"""The folders in which jobs run at a site: inputs brought in, outputs kept, and the old ones removed. Blocks nothing.

A folder is one attempt's own. What tells of the job lies in it (``workers.sites.records``), and keeps a job that is
submitted twice by mistake from running twice; so it stays for as long as the log might hand out the job again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from headrace.errors import BadRequest, HeadraceError, NotFound
from headrace.jobs import JobSpec
from headrace.wire import Said
from workers.guard import open_inside
from workers.sites.records import Records
from workers.staging import Stager

LAST_LINES_BYTES = 4096
COPY_BYTES = 64 * 1024 * 1024
OUTPUTS_AT_ONCE = 4
_CANNOT_COPY = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # where the kernel does not do it

Tell = Callable[[Said], None]


class Outputs(NamedTuple):
    """What a job left: the URIs of its outputs by name, and the names under which nothing was found."""

    kept: dict[str, str]
    missing: list[str]


class JobFolders:
    """The folders of one site's jobs."""

    def __init__(self, work: Path, stager: Stager) -> None:
        """Use the folder of a site; ``stager`` fetches and keeps content."""
        self.root = work / "jobs"
        self._stager = stager

    def make(self) -> None:
        """Make the folder of all folders; only this user may enter it.

        Raises:
            OSError: it cannot be made or written to.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def of(self, name: str) -> Path:
        """Return the folder of one attempt of a job, by its name at the site."""
        return self.root / name

    async def bring(self, spec: JobSpec, folder: Path, tell: Tell | None = None) -> None:
        """Put the inputs where the job runs. Safe to repeat.

        Raises:
            BadRequest, NotFound: an input cannot be had, and never will.
            Unavailable: an input cannot be had now.
            OSError: they cannot be written there.
        """
        where = Path(spec.directory or folder)
        await asyncio.to_thread(where.mkdir, parents=True, exist_ok=True)
        for name, uri in spec.inputs.items():
            try:
                staged = await self._stager.stage(uri, tell)
            except (BadRequest, NotFound) as error:
                raise type(error)(f"input {ascii(name)[:80]}: {error}", hint=error.hint) from error
            if isinstance(staged, Path):
                await asyncio.to_thread(_copy, staged, where, name)
            else:
                with staged:
                    await asyncio.to_thread(_copy, staged.path, where, name)

    async def keep(self, spec: JobSpec, folder: Path) -> Outputs:
        """Keep the outputs of a job that has ended. Safe to repeat: content is kept once.

        Raises:
            BadRequest: something that is no file of the job's own lies under the name of an output.
            Unavailable: they cannot be kept now.
        """
        where = Path(spec.directory or folder)
        turns = asyncio.Semaphore(OUTPUTS_AT_ONCE)

        async def one(name: str) -> str | None:
            async with turns:
                try:
                    handle = await asyncio.to_thread(open_inside, where, name)
                except (NotFound, FileNotFoundError):
                    return None
                try:
                    # By its descriptor: what lies under the name may be another thing by now.
                    return await self._stager.store(Path(f"/proc/self/fd/{handle}"))
                finally:
                    os.close(handle)

        found = await asyncio.gather(*(one(name) for name in spec.outputs))
        named = dict(zip(spec.outputs, found, strict=True))
        return Outputs(
            {name: uri for name, uri in named.items() if uri is not None},
            [name for name, uri in named.items() if uri is None],
        )

    async def last_lines(self, folder: Path) -> str:
        """Return the end of what a job said on stderr or, where it said nothing there, on stdout."""
        return await asyncio.to_thread(_last_lines, Records(folder))

    async def sweep(self, keep_s: float, but: Collection[str]) -> int:
        """Remove folders in which nothing has changed for ``keep_s`` seconds, and return how many those were."""
        return await asyncio.to_thread(self._sweep, time.time() - keep_s, frozenset(but))

    def _sweep(self, before: float, but: Collection[str]) -> int:
        gone = 0
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.name not in but and entry.stat(follow_symlinks=False).st_mtime < before:
                        shutil.rmtree(entry.path, ignore_errors=True)
                        gone += 1
        return gone


def reason_of(error: HeadraceError | OSError) -> str:
    """Return what is told of an error, its hint included."""
    if isinstance(error, OSError):
        return f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")
    return f"{error} {error.hint or ''}".strip()


def _copy(source: Path, folder: Path, name: str) -> None:
    """Copy a file to its place; a job may write to its inputs, so what is kept for others is never lent to it."""
    handle = open_inside(folder, name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        with source.open("rb", buffering=0) as file:
            try:
                while os.copy_file_range(file.fileno(), handle, COPY_BYTES):
                    pass
            except OSError as error:
                if error.errno not in _CANNOT_COPY:
                    raise
                file.seek(0)
                os.ftruncate(handle, 0)
                os.lseek(handle, 0, os.SEEK_SET)
                with open(handle, "wb", closefd=False) as target:
                    shutil.copyfileobj(file, target, 1024 * 1024)
    finally:
        os.close(handle)


def _last_lines(records: Records) -> str:
    for path in (records.stderr, records.stdout):
        with contextlib.suppress(OSError), path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LAST_LINES_BYTES))
            text = file.read().decode(errors="replace")
            if size > LAST_LINES_BYTES:
                text = text.partition("\n")[2] or text
            if text.strip():
                return text
    return ""
