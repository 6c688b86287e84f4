"""The folder of a site: which site it is the folder of, and whether it can be used now. Blocks nothing.

A mark in it has an id of its own, one for each name and kind of site. It tells two sites apart that were given the same
name, and the folder from the empty place at which its disk is mounted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from uuid import uuid4

from headrace.errors import Conflict, Unavailable
from workers.jobfolders import DISK_HINT, reason_of
from workers.sites.base import SiteConfig

PROBE_BYTES = 4096  # more than fits into what a file system keeps beside the name of a file
PROBE_S = 10.0


class WorkFolder:
    """The work folder of one site. ``id`` is empty until it was opened."""

    def __init__(self, config: SiteConfig) -> None:
        """Describe it; nothing is looked at yet."""
        self.path = Path(config.work)
        self.mark = self.path / f".site-{config.name}.{config.kind}"
        self._name = config.name
        self._probing: asyncio.Task[str] | None = None
        self.id = ""

    async def open(self, known: str, *, anew: bool) -> None:
        """Make the folder where there is none, and read its mark, or leave one.

        Args:
            known: the id by which the site of this name is known; empty if it is not.
            anew: whether the site may have a new folder though it is known by another one's id.

        Raises:
            Conflict: it is not the folder of the site that is known, or not mounted.
            OSError: it cannot be made or written to.
        """
        self.id = await asyncio.to_thread(self._open, known, anew)

    async def check(self) -> None:
        """See that the folder is the one that was opened.

        Raises:
            Unavailable: it is not there now, or cannot be read.
        """
        why = await asyncio.to_thread(self._missing)
        if why:
            raise Unavailable(why, hint=DISK_HINT)

    async def trouble(self) -> str:
        """Write a little, and return why the folder cannot be used now; empty if it can."""
        if self._probing is None:
            self._probing = asyncio.create_task(asyncio.to_thread(self._probe))
        done, _ = await asyncio.wait({self._probing}, timeout=PROBE_S)
        if not done:  # a disk that hangs has one thread of ours, and not one more with each look
            return f"{self.path} does not answer"
        self._probing = None
        return done.pop().result()

    def _open(self, known: str, anew: bool) -> str:
        found = self._read()
        if found is None and known and not anew:
            raise Conflict(
                f"{self.path} is not the work folder by which the platform knows the site {self._name}: it has no"
                f" {self.mark.name}",
                hint="Mount it, or give this site a name of its own. Where that folder is gone for good, make this one"
                f" take its place: echo {known} >{self.mark}",
            )
        if found is None:
            self._leave_mark()
            found = self._read()
        if not found:
            raise Conflict(
                f"{self.mark} has no id in it",
                hint=f"Write the one in by which the platform knows this site: echo {known} >{self.mark}"
                if known
                else "Remove it, and start again: the platform knows no site by it.",
            )
        return found

    def _leave_mark(self) -> None:
        """Make the folder and its mark, which is whole on the disk before it has its name: it may lose power."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside = self.mark.with_name(f"{self.mark.name}.{uuid4().hex[:8]}")
        try:
            with aside.open("w") as file:
                file.write(f"{uuid4().hex}\n")
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):  # another agent of this site was first
                os.link(aside, self.mark)
        finally:
            aside.unlink(missing_ok=True)
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def _read(self) -> str | None:
        """Return the id in the mark; None where there is no mark."""
        try:
            return self.mark.read_text().strip()
        except FileNotFoundError:
            return None

    def _missing(self) -> str:
        try:
            found = self._read()
        except OSError as error:
            return reason_of(error)
        if found == self.id:
            return ""
        return f"{self.path} is not the folder it was: {self.mark.name} is {_instead(found)}"

    def _probe(self) -> str:
        probe = self.mark.with_name(f"{self.mark.name}.look")
        try:
            if why := self._missing():
                return why
            try:
                probe.write_bytes(bytes(PROBE_BYTES))
            finally:
                probe.unlink(missing_ok=True)
            os.utime(self.mark)  # some sites remove what is old
        except OSError as error:
            return reason_of(error)
        return ""


def _instead(found: str | None) -> str:
    """Return what is said of a mark that has not the id that it had."""
    if found is None:
        return "not there"
    return "another one" if found else "empty"
