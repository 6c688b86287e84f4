"""What the batch systems have in common: each is asked by calls that block, and so in threads of their own."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

from workers.sites.base import JobStatus, Known, SiteConfig, SiteUnreachable, Submission
from workers.sites.records import Records

P = ParamSpec("P")
T = TypeVar("T")


class Blocking(ABC):
    """A batch system, but for what it has free."""

    config: SiteConfig

    async def submit(self, job: Submission) -> str:
        """See ``BatchSystem.submit``."""
        return await self.beside(self._submit, job)

    async def submit_array(self, array_id: str, jobs: Sequence[Submission]) -> dict[str, str]:
        """See ``BatchSystem.submit_array``; one after the other where the batch system has no arrays."""
        return {job.job_id: await self.submit(job) for job in jobs}

    async def find(self, job_id: str, folder: Path, place: int | None = None) -> str | None:
        """See ``BatchSystem.find``; ``place`` is for those that have arrays."""
        return await self.beside(self._find, job_id, Records(folder))

    async def status(self, jobs: Sequence[Known]) -> Mapping[str, JobStatus]:
        """See ``BatchSystem.status``."""
        return await self.beside(self._status, jobs) if jobs else {}

    async def cancel(self, jobs: Sequence[Known]) -> None:
        """See ``BatchSystem.cancel``."""
        if jobs:
            await self.beside(self._cancel, jobs)

    async def beside(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a call in a thread.

        Raises:
            SiteUnreachable: the site's own disk is in trouble; nothing is the fault of a job there.
        """
        try:
            return await asyncio.to_thread(call, *args, **kwargs)
        except OSError as error:
            raise SiteUnreachable(
                f"{self.config.name}: {error}", hint="Is the disk of its work folder well?"
            ) from error

    @abstractmethod
    def _submit(self, job: Submission) -> str: ...

    @abstractmethod
    def _find(self, job_id: str, records: Records) -> str | None: ...

    @abstractmethod
    def _status(self, jobs: Sequence[Known]) -> dict[str, JobStatus]: ...

    @abstractmethod
    def _cancel(self, jobs: Sequence[Known]) -> None: ...
