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
from workers.sites.records import Records, tail
from workers.staging import Stager

COPY_BYTES = 64 * 1024 * 1024
INPUTS_AT_ONCE = 8
OUTPUTS_AT_ONCE = 4
DISK_HINT = "Look at the disk of the site: whether its work folder is there, and there is room."
_DISK_TROUBLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.EROFS, errno.ENODEV),
    *(errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EAGAIN),
)
_CANNOT_COPY = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # where the kernel does not do it

Tell = Callable[[Said], None]


class Outputs(NamedTuple):
    """What a job left: the URIs of its outputs by name, and the names under which nothing was found.

    ``refused`` tells of those under whose names something else than a file of the job's own lies, or a file that cannot
    be kept, such as one that is still written to.
    """

    kept: dict[str, str]
    missing: list[str]
    refused: list[str]


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

    async def make_directory(self, spec: JobSpec) -> None:
        """Make the folder that a job names to run in, if it names one.

        Raises:
            BadRequest: it cannot be made.
            OSError: the disk does not do it now.
        """
        if spec.directory is None:
            return
        try:
            await asyncio.to_thread(Path(spec.directory).mkdir, parents=True, exist_ok=True)
        except OSError as error:
            if is_of_site(error):
                raise
            raise BadRequest(
                f"the directory in which it is to run cannot be made: {reason_of(error)}",
                hint="Name one that the user of the agent may write to, or none: each job has a folder of its own.",
            ) from error

    async def bring(self, spec: JobSpec, folder: Path, tell: Tell | None = None) -> None:
        """Put the inputs where the job runs. Safe to repeat.

        Raises:
            BadRequest, NotFound: an input cannot be had, and never will.
            Unavailable: an input cannot be had now.
            OSError: they cannot be written there.
        """
        where = Path(spec.directory or folder)
        turns = asyncio.Semaphore(INPUTS_AT_ONCE)

        async def one(name: str, uri: str) -> None:
            async with turns:
                try:
                    staged = await self._stager.stage(uri, tell)
                except (BadRequest, NotFound) as error:
                    raise type(error)(f"input {ascii(name)[:80]}: {error}", hint=error.hint) from error
                if isinstance(staged, Path):
                    await asyncio.to_thread(_copy, staged, where, name)
                else:
                    with staged:
                        await asyncio.to_thread(_copy, staged.path, where, name)

        tasks = [asyncio.create_task(one(name, uri)) for name, uri in spec.inputs.items()]
        try:
            await asyncio.gather(*tasks)
        finally:  # nothing is written there any more once this has ended, whatever ended it
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def keep(self, spec: JobSpec, folder: Path) -> Outputs:
        """Keep the outputs of a job that has ended. Safe to repeat: content is kept once.

        Raises:
            Unavailable: they cannot be kept now.
            OSError: they cannot be read.
        """
        where = Path(spec.directory or folder)
        turns = asyncio.Semaphore(OUTPUTS_AT_ONCE)
        kept: dict[str, str] = {}
        missing: list[str] = []
        refused: list[str] = []

        async def one(name: str) -> None:
            async with turns:
                try:
                    handle = await asyncio.to_thread(open_inside, where, name)
                except (NotFound, FileNotFoundError):
                    missing.append(name)
                    return
                except BadRequest as error:
                    refused.append(reason_of(error))
                    return
                # By its descriptor: what lies under the name may be another thing by now.
                file = Path(f"/proc/self/fd/{handle}")
                try:
                    kept[name] = await self._stager.store(file)
                except HeadraceError as error:
                    if error.transient:
                        raise
                    refused.append(reason_of(error).replace(str(file), ascii(name)[:200]))
                finally:
                    os.close(handle)

        # None of them goes on beside the next try. They are not stopped: a thread may be reading by the descriptor.
        for error in await asyncio.gather(*(one(name) for name in spec.outputs), return_exceptions=True):
            if error is not None:
                raise error
        # The order of the specification, and not of who was first.
        return Outputs(
            {name: kept[name] for name in spec.outputs if name in kept},
            [name for name in spec.outputs if name in missing],
            sorted(refused),
        )

    async def last_lines(self, folder: Path) -> str:
        """Return the end of what a job said on stderr or, where it said nothing there, on stdout."""
        return await asyncio.to_thread(_last_lines, Records(folder))

    async def sweep(self, keep_s: float, but: Collection[str]) -> int:
        """Remove folders in which nothing has changed for ``keep_s`` seconds, and return how many those were.

        Those in ``but`` belong to jobs that are watched: they stay, and look as if something had just changed, so that
        no other agent of the site removes them either.
        """
        return await asyncio.to_thread(self._sweep, time.time() - keep_s, frozenset(but))

    def _sweep(self, before: float, but: Collection[str]) -> int:
        gone = 0
        for name in but:
            with contextlib.suppress(OSError):
                os.utime(self.root / name)
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.name not in but and not _changed_since(entry, before):
                        shutil.rmtree(entry.path, ignore_errors=True)
                        gone += 1
        return gone


def _changed_since(entry: os.DirEntry[str], before: float) -> bool:
    """Say whether anything in a folder, however deep, is newer than an instant in epoch seconds."""
    if entry.stat(follow_symlinks=False).st_mtime >= before:
        return True
    if not entry.is_dir(follow_symlinks=False):
        return False
    with os.scandir(entry.path) as entries:
        return any(_changed_since(each, before) for each in entries)


def is_of_site(error: OSError) -> bool:
    """Say whether an error with a file is one of the site's disk, which may pass; others are of what is asked for."""
    return error.errno in _DISK_TROUBLE


def reason_of(error: HeadraceError | OSError) -> str:
    """Return what is told of an error, its hint included."""
    if isinstance(error, OSError):
        return f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")
    said = str(error)
    if error.hint and said[-1:] not in (".", "!", "?"):
        said += "."
    return f"{said} {error.hint or ''}".strip()


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
    return next(filter(str.strip, map(tail, (records.stderr, records.stdout))), "")
