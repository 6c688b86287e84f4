"""Jobs that a site does not begin because it ends: they are placed anew, and handed on to the site that takes them.

A pilot begins what is expected to be over when its allocation ends. What is not goes to another site at once, where
there is one, and everything that waits does so once the pilot ends.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from functions.ensembles import delay_s
from functions.moves import agent_of, lease, may_have_begun, moved, over
from functions.outlook import JOBS, Outlook
from functions.pilot import fits
from functions.placement import place
from headrace.joblog import JobWork, SiteRecord
from headrace.jobs import JobSpec
from streams.log import AlreadyThere, Log, Record
from workers.commits import APPEND_TIMEOUT_S, Fenced
from workers.jobhand import Waiting
from workers.jobpast import JobPast
from workers.sites.base import SiteConfig
from workers.submitting import Submitter

_log = logging.getLogger(__name__)

Specs = Callable[[JobWork], Awaitable[JobSpec]]


class Rows(Protocol):
    """The table of sites, as far as it is needed to place jobs."""

    def items(self) -> dict[str, SiteRecord]:
        """Return all rows, by name."""


class Tools(Protocol):
    """What is needed of an agent's tools."""

    @property
    def log(self) -> Log:
        """Where moves are recorded."""

    @property
    def site(self) -> SiteConfig:
        """Whose jobs they are."""

    @property
    def sites(self) -> Rows:
        """All sites."""

    @property
    def ends_at(self) -> float | None:
        """When the site ends."""

    @property
    def clock(self) -> Callable[[], float]:
        """The time in epoch seconds."""


class Moves:
    """Hands on what one site does not begin. Set ``ending`` once it begins nothing more at all."""

    def __init__(self, tools: Tools, outlook: Outlook, submitter: Submitter, specs: Specs) -> None:
        """Describe it.

        Args:
            tools: the agent's.
            outlook: how long jobs run.
            submitter: knows what was begun.
            specs: returns the specification of a job.
        """
        self._log = tools.log
        self._site = tools.site
        self._ends_at = tools.ends_at
        self._rows = tools.sites
        self._clock = tools.clock
        self._outlook = outlook
        self._submitter = submitter
        self._specs = specs
        self.ending = False

    def why_not(self, work: JobWork) -> str:
        """Return why a job is not begun here now; empty where it may be."""
        if self._ends_at is None:
            return ""
        if self.ending:
            return f"{self._site.name} ends"
        now = self._clock()
        runs = self._outlook.of("run", JOBS, work.shape, site=self._site.name)
        expected = None if runs is None else (runs.p50_s, runs.p90_s)
        if fits(now, self._ends_at, expected, work.limit_s or self._site.duration_s):
            return ""
        return f"{self._site.name} ends in {self._ends_at - now:,.0f} s, and the job may take longer"

    async def leaves(self, waiting: Waiting, past: JobPast, name: str, folder: Path) -> bool:
        """Deal with a job that does not fit into what is left of this site, unless the batch system has it already.

        Return whether that was done, and nothing more is to be.

        Raises:
            Fenced: somebody else has the job.
            HeadraceError: it cannot be done now.
        """
        if not self.why_not(waiting.work):
            return False
        native_id, left_s = await self._submitter.begun(past, name, folder, self._clock())
        if native_id is not None:
            return False
        if left_s > 0:
            await waiting.give_back(left_s)
        else:
            await self.hand_on(waiting, past)
        return True

    async def hand_on(self, waiting: Waiting, past: JobPast) -> None:
        """Take a job that has not begun to another site; where there is none it stays, and is looked at again.

        Raises:
            Fenced: somebody else has the job.
            HeadraceError: its specification cannot be had, or the log does not answer.
        """
        here, now, invocation = self._site.name, self._clock(), waiting.invocation
        why = self.why_not(waiting.work)
        spec = await self._specs(waiting.work)
        rows = self._rows.items().values()
        placement = place(spec, rows, now, invocation.deadline, self._outlook, over(rows, now) | {here: why})
        if placement.site is not None and not placement.later:
            _log.info("job %s goes on to %s: %s", invocation.invocation_id, placement.site, why)
            to, times = placement.site, (waiting.at, now)
            await self._append(moved(invocation, to, why, times, attempt=past.attempt, fence=past.fence))
            await waiting.ack()
            return
        if self.ending and may_have_begun(past.holder):
            # It stays, and whoever comes upon it shall know that it did not begin.
            await self._append([lease(invocation, agent_of(here), past.attempt, now, past.fence)])
        left_s = None if invocation.deadline is None else invocation.deadline - now
        await waiting.give_back(delay_s(waiting.tries + 1, left_s))

    async def _append(self, unit: list[Record]) -> None:
        try:
            await self._log.append(unit, timeout_s=APPEND_TIMEOUT_S)
        except AlreadyThere as other:
            raise Fenced from other
