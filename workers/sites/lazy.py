"""A site that is opened when the first job comes: PSI/J takes 0.3 s and 30 MB, which most platforms never need."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from workers.sites import open_site
from workers.sites.base import BatchSystem, Capacity, JobStatus, Known, SiteConfig, Submission
from workers.sites.machine import gpus, places


class LazySite:
    """A ``BatchSystem`` that asks another one, which it makes when it is first needed."""

    def __init__(
        self,
        config: SiteConfig,
        opened: Callable[[SiteConfig], BatchSystem] = open_site,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Describe the site; nothing is imported or asked yet.

        Args:
            config: the site.
            opened: makes the batch system.
            now: the clock, in seconds since 1970.
        """
        self.config = config
        self._opened = opened
        self._now = now
        self._site: BatchSystem | None = None
        self.idle = True  # nothing of ours runs there: what it has is known without looking

    def site(self) -> BatchSystem:
        """Return the batch system itself. The first call takes a moment: PSI/J is best imported by the main thread."""
        if self._site is None:
            self._site = self._opened(self.config)
        return self._site

    async def submit(self, job: Submission) -> str:
        """See ``BatchSystem.submit``."""
        return await self.site().submit(job)

    async def submit_array(self, array_id: str, jobs: Sequence[Submission]) -> dict[str, str]:
        """See ``BatchSystem.submit_array``."""
        return await self.site().submit_array(array_id, jobs)

    async def find(self, job_id: str, folder: Path, place: int | None = None) -> str | None:
        """See ``BatchSystem.find``."""
        return await self.site().find(job_id, folder, place)

    async def status(self, jobs: Sequence[Known]) -> Mapping[str, JobStatus]:
        """See ``BatchSystem.status``."""
        return await self.site().status(jobs)

    async def cancel(self, jobs: Sequence[Known]) -> None:
        """See ``BatchSystem.cancel``."""
        await self.site().cancel(jobs)

    async def capacity(self) -> Capacity | None:
        """See ``BatchSystem.capacity``; an idle machine without a queue is not looked at."""
        if self.config.kind == "local" and self.idle:
            devices = gpus()
            return Capacity(
                at=self._now(),
                nodes_total=1,
                nodes_free=min(1, places(self.config.jobs_max)),
                nodes_unusable=0,
                gpus_total=devices,
                gpus_free=devices,
                jobs_waiting=0,
                jobs_running=0,
            )
        return await self.site().capacity()
