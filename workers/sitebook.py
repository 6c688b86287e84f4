"""The row of a site in the table of sites, which its agent writes for all who want to know how the site is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from msgspec import structs

from functions import sites
from headrace.errors import HeadraceError
from headrace.joblog import SiteRecord
from headrace.jobs import JobSpec
from workers.sites.base import BatchSystem, Capacity, SiteConfig, SiteError

_log = logging.getLogger(__name__)

LOOK_S = 5.0
WRITE_S = 10.0  # the longest time without a row: half of the silence after which nobody knows how the site is
UNREACHABLE_S = 10.0  # a batch system that is restarted is not called down


class Rows(Protocol):
    """The table of sites, as far as an agent needs it."""

    async def fetch(self, name: str) -> SiteRecord | None:
        """Return a row as the server has it."""

    async def put(self, name: str, row: SiteRecord) -> None:
        """Write a row."""


class SiteBook:
    """Keeps the row of one site. ``accepts`` and ``ends_at`` may be set at any time; the next row tells them."""

    def __init__(
        self, rows: Rows, config: SiteConfig, batch: BatchSystem, agent: str, clock: Callable[[], float] = time.time
    ) -> None:
        """Describe the site.

        Args:
            rows: the table of sites.
            config: the site.
            batch: is asked for what the site has and what is free.
            agent: the identity of this process.
            clock: the time in epoch seconds.
        """
        self.accepts = True
        self.ends_at: float | None = None
        self._rows = rows
        self._config = config
        self._batch = batch
        self._agent = agent
        self._clock = clock
        self._capacity: Capacity | None = None
        self._answered_at = clock()
        self._written: SiteRecord | None = None
        self._waits: list[tuple[str, float, float]] = []

    async def run(self) -> None:
        """Look at the site and write its row, again and again; never returns."""
        while True:
            try:
                await self.look()
            except HeadraceError as error:
                _log.warning("the row of site %s is not written: %s", self._config.name, error)
            await asyncio.sleep(LOOK_S)

    def waited(self, spec: JobSpec, wait_s: float) -> None:
        """Take note that a job has left the queue, in which it waited for so many seconds."""
        self._waits.append((sites.shape_of(spec), wait_s, self._clock()))

    async def look(self) -> None:
        """Look at the site once, and write its row if it changed or is old.

        Raises:
            Unavailable: the table does not answer.
        """
        if self._written is None:
            self._written = await self._rows.fetch(self._config.name)
        problem = await self._ask()
        record = sites.seen(self._fresh(), self._written, problem)
        waits, self._waits = self._waits, []
        for shape, wait_s, at in waits:
            record = sites.waited(record, shape, wait_s, at)
        before = self._written
        fresh = before is not None and record.at - before.at < WRITE_S
        if before is not None and fresh and structs.replace(record, at=before.at) == before:
            return
        try:
            await self._rows.put(self._config.name, record)
        except HeadraceError:
            self._waits = waits + self._waits
            raise
        self._written = record

    async def _ask(self) -> str:
        """Ask the batch system, and return why it has not answered for a while; empty if it has."""
        now = self._clock()
        try:
            self._capacity = await self._batch.capacity()
        except SiteError as error:
            _log.warning("site %s: %s", self._config.name, error)
            return str(error) if now - self._answered_at >= UNREACHABLE_S else ""
        self._answered_at = now
        return ""

    def _fresh(self) -> SiteRecord:
        now = self._clock()
        record = SiteRecord(
            name=self._config.name,
            kind=self._config.kind,
            at=now,
            since=now,
            agent=self._agent,
            accepts=self.accepts,
            ends_at=self.ends_at,
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
