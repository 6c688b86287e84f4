"""The row of a site in the table of sites, which its agent writes for all who want to know how the site is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from msgspec import structs

from functions import sites
from functions.sites import Trouble
from headrace.errors import Conflict, HeadraceError
from headrace.joblog import SiteRecord
from headrace.jobs import JobSpec
from workers.jobfolders import reason_of
from workers.sites.base import BatchSystem, Capacity, SiteConfig, SiteError, SubmitBusy
from workers.workfolder import WorkFolder

_log = logging.getLogger(__name__)

LOOK_S = 5.0
WRITE_S = 10.0  # the longest time without a row: half of the silence after which nobody knows how the site is
UNREACHABLE_S = 10.0  # a batch system that is restarted is not called down
REFUSED_S = 120.0  # so long is told that jobs could not be submitted, unless some were
HEAR_S = 1.0
STORED_S = 0.001  # the instant of one row differs by less, however it was read
SILENT_FOR_SURE_S = 600.0  # whatever the clocks of two machines say


class Rows(Protocol):
    """The table of sites, as far as an agent needs it."""

    async def fetch(self, name: str) -> SiteRecord | None:
        """Return a row as the server has it."""

    async def put(self, name: str, row: SiteRecord) -> None:
        """Write a row."""


class SiteBook:
    """Keeps the row of one site. ``accepts`` and ``ends_at`` may be set at any time; the next row tells them."""

    def __init__(
        self,
        rows: Rows,
        config: SiteConfig,
        batch: BatchSystem,
        work: WorkFolder,
        agent: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Describe the site.

        Args:
            rows: the table of sites.
            config: the site.
            batch: is asked for what the site has and what is free.
            work: the site's folder.
            agent: the identity of this process.
            clock: the time in epoch seconds.
        """
        self.accepts = True
        self.ends_at: float | None = None
        self._rows = rows
        self._config = config
        self._batch = batch
        self._work = work
        self._agent = agent
        self._clock = clock
        self._capacity: Capacity | None = None
        self._answered, self._answered_at = False, clock()
        self._refused = ""  # what the batch system said when it could not take jobs the last time
        self._refused_at = 0.0
        self._beside = ""  # another agent of this site that works
        self._written: SiteRecord | None = None
        self._waits: list[tuple[str, float, float]] = []

    async def begin(self, *, anew: bool) -> None:
        """Find out that this is the site that is known by its name, or that nobody is heard of under it.

        Args:
            anew: whether it may have a new folder, though it is known by another one.

        Raises:
            Conflict: it is neither.
            OSError: its folder cannot be made, or written to.
            Unavailable: the table does not answer.
        """
        row = await self._rows.fetch(self._config.name)
        await self._work.open("" if row is None else row.id, anew=anew)
        if row is not None and row.id not in ("", self._work.id):
            await self._wait_for_silence(row)
            _log.warning(
                "%s is another site than the one that had the name %s before, whose agent was %s and is not heard",
                *(self._work.path, row.name, row.agent),
            )

    async def _wait_for_silence(self, row: SiteRecord) -> None:
        """Return once nothing more is heard of a site, by our own clock: the other's may be another."""
        now, loop = self._clock(), asyncio.get_running_loop()
        if (row.ends_at is not None and now >= row.ends_at) or now - row.at > SILENT_FOR_SURE_S:
            return
        until = loop.time() + sites.SILENT_S
        while loop.time() < until:
            await asyncio.sleep(HEAR_S)
            found = await self._rows.fetch(row.name)
            if found is None or found.id != row.id:
                return
            if found.at > row.at + STORED_S:
                raise self._taken(found)

    def _taken(self, row: SiteRecord) -> Conflict:
        return Conflict(
            f"the name {row.name} is taken: {row.agent} speaks for a site with {row.kind} and another work folder",
            hint="Give one of the two another name, or stop that agent first.",
        )

    async def run(self) -> None:
        """Look at the site and write its row, again and again; never returns.

        Raises:
            Conflict: another site has its name, too.
        """
        while True:
            try:
                await self.look()
            except Conflict:
                raise
            except HeadraceError as error:
                _log.warning("the row of site %s is not written: %s", self._config.name, error)
            await asyncio.sleep(LOOK_S)

    def waited(self, spec: JobSpec, wait_s: float) -> None:
        """Take note that a job has left the queue, in which it waited for so many seconds."""
        self._waits.append((sites.shape_of(spec), wait_s, self._clock()))

    def submitted(self, told: Iterable[str | HeadraceError]) -> None:
        """Take note of what the batch system said of jobs: that it is full is as usual, that it cannot tell is not."""
        said = [one for one in told if not isinstance(one, SubmitBusy)]
        troubles = [reason_of(one) for one in said if not isinstance(one, str) and one.transient]
        if said:
            self._refused, self._refused_at = troubles[0] if len(troubles) == len(said) else "", self._clock()

    async def look(self) -> None:
        """Look at the site once, and write its row if it changed or is old.

        Raises:
            Conflict: another site has its name, too.
            Unavailable: the table does not answer.
        """
        first = self._written is None
        if first:
            self._written = await self._rows.fetch(self._config.name)
        trouble = await self._trouble()
        record = sites.seen(self._fresh(), self._written, trouble)
        waits, self._waits = self._waits, []
        for shape, wait_s, at in waits:
            record = sites.waited(record, shape, wait_s, at)
        before = self._written
        fresh = before is not None and not first and record.at - before.at < WRITE_S
        if before is not None and fresh and structs.replace(record, at=before.at) == before:
            return
        try:
            if not first:
                self._meet(await self._rows.fetch(self._config.name))
            await self._rows.put(self._config.name, record)
        except HeadraceError:
            self._waits = waits + self._waits
            raise
        self._written = record

    def _meet(self, row: SiteRecord | None) -> None:
        """See whether somebody else has written the row since we did.

        Raises:
            Conflict: another site did, and it is not the one that gives way. Of two that began at once one stays.
        """
        if row is None or row.agent in ("", self._agent):
            return
        if row.id not in ("", self._work.id) and row.id < self._work.id:
            raise self._taken(row)
        if row.agent != self._beside:
            self._beside = row.agent
            _log.warning(
                "%s speaks for site %s, too: each job is run once, but both have up to jobs_max of them at a time",
                *(row.agent, row.name),
            )

    async def _trouble(self) -> Trouble | None:
        """Look at the site's folder, ask its batch system, and return what is wrong."""
        why = await self._work.trouble()
        unreachable = await self._ask()
        if why:
            return Trouble("down", f"{sites.WORK_FOLDER}: {why}")
        if unreachable is not None:
            return unreachable
        if self._refused and self._clock() - self._refused_at < REFUSED_S:
            return Trouble("degraded", f"jobs cannot be submitted: {self._refused}")
        return None

    async def _ask(self) -> Trouble | None:
        """Ask the batch system, and return why it has not answered for a while, or never has; None if it has."""
        now = self._clock()
        try:
            self._capacity = await self._batch.capacity()
        except SiteError as error:
            _log.warning("site %s: %s", self._config.name, error)
            if now - self._answered_at >= UNREACHABLE_S:
                return Trouble("down", reason_of(error))
            return None if self._answered else Trouble("unknown", reason_of(error))
        self._answered, self._answered_at = True, now
        return None

    def _fresh(self) -> SiteRecord:
        now = self._clock()
        record = SiteRecord(
            name=self._config.name,
            kind=self._config.kind,
            at=now,
            since=now,
            id=self._work.id,
            agent=self._agent,
            accepts=self.accepts,
            ends_at=self.ends_at,
            duration_s=self._config.duration_s,
            containers=[self._config.container] if self._config.container else [],
        )
        seen = self._capacity
        if seen is None:
            return record
        return structs.replace(
            record,
            nodes_total=seen.nodes_total,
            nodes_free=seen.nodes_free,
            nodes_unusable=seen.nodes_unusable,
            gpus_total=seen.gpus_total,
            gpus_free=seen.gpus_free,
            jobs_waiting=seen.jobs_waiting,
            jobs_running=seen.jobs_running,
            queue_open=seen.queue_open,
            states=seen.states,
        )
