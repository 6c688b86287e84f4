"""A site that is no more, removed by whoever may write everything to the log: its row, its consumers and its jobs.

A site whose agent is heard is not removed, nor is one that has jobs, unless that is asked for. Then it is as when an
allocation ends: jobs that have not begun go to other sites, those that were submitted are lost with it, and what no
site takes has failed, so that its run goes on or ends. Should its agent come back, so does the site.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from msgspec import Struct, structs

from functions.moves import is_elsewhere, may_have_begun
from functions.outlook import Outlook
from functions.sites import SILENT_S, is_awaited
from headrace.errors import Conflict, NotFound, Unavailable
from headrace.joblog import SiteRecord
from headrace.names import check_name
from infra import rights
from infra.services import link_to, log_on, tables_on
from infra.settings import Settings
from infra.stores import Stores
from infra.tenants import HEARD_S, of_running_platform
from streams import topology
from streams.blobs import Blobs
from streams.link import Link
from streams.log import Log
from streams.tables import Tables
from streams.topology import cancel_subject, jobs_of
from workers.adoption import Adoption
from workers.jobpast import left, past_of

ROUNDS_MAX = 30
ROUND_S = 1.0


class JobsThere(Struct, frozen=True, kw_only=True):
    """How many jobs of a site have not ended: those that wait for it, and those that it was given."""

    waiting: int = 0
    submitted: int = 0


class Remover:
    """Removes sites of one platform."""

    def __init__(self, link: Link, log: Log, tables: Tables, blobs: Blobs, silent_s: float) -> None:
        self._silent_s = silent_s
        self._link = link
        self._log = log
        self._tables = tables
        self._blobs = blobs

    async def remove(self, name: str, *, force: bool) -> JobsThere:
        """Remove a site, and return how many jobs it had. Broken off, it can be asked for again.

        Raises:
            BadName: the name does not follow the rule for names.
            NotFound: there is no such site.
            Conflict: its agent is heard, or begins meanwhile, or it has jobs, and ``force`` does not say that they
                shall be taken from it.
            Unavailable: the log does not answer, or a job could not be taken from it.
        """
        check_name(name, "name of a site")
        row = await self._tables.sites.fetch(name)
        if row is None:
            raise NotFound(f"there is no site {name}", hint="`headrace sites` shows them.")
        await self._check_silent(row)
        there = await self._jobs(name)
        if (there.waiting or there.submitted) and not force:
            raise Conflict(
                f"{there.waiting:,} jobs wait for {name}, and {there.submitted:,} submitted there have not ended",
                hint="Start its agent and wait; or add --force: what has not begun goes elsewhere, the rest is lost.",
            )
        now = time.time()
        # From here on nothing is placed there any more.
        row = structs.replace(row, ends_at=min(now, row.ends_at or now), accepts=False)
        await self._tables.sites.put(name, row)
        await asyncio.sleep(HEARD_S)
        await self._take_all(row)
        return there

    async def _check_silent(self, row: SiteRecord) -> None:
        """Make sure that no agent works for a site: none asks for its jobs, and none has written its row of late."""
        for name, info in (await topology.consumers(self._link.jetstream())).items():
            found = jobs_of(name)
            if found is not None and found.site == row.name and info.num_waiting:
                raise Conflict(f"the agent of {row.name} is at work", hint="Stop it first; its jobs go on without it.")
        silent_s = time.time() - row.at
        if silent_s < self._silent_s and not is_awaited(row):
            raise Conflict(
                f"the agent of {row.name} was heard {max(0.0, silent_s):.0f} s ago",
                hint=f"Stop it, and try again {self._silent_s:.0f} s after that.",
            )

    async def _jobs(self, site: str) -> JobsThere:
        """Count the jobs without an outcome that are this site's and of runs that go on."""
        waiting = submitted = 0
        for stored in (await left(self._log, site)).jobs:
            *_, run, job = stored.subject.split(".")
            past = await past_of(self._log, site, run, job)
            if is_elsewhere(past.holder, site) or await self._log.last(cancel_subject(run, "*")) is not None:
                continue
            if past.submitted is not None or may_have_begun(past.holder):
                submitted += 1
            else:
                waiting += 1
        return JobsThere(waiting=waiting, submitted=submitted)

    async def _take_all(self, row: SiteRecord) -> None:
        """Take all jobs from a site, and then forget it."""
        adoption = Adoption(
            rights.ADMIN,
            self._log,
            self._tables.sites,
            self._blobs,
            Outlook(self._tables.forecasts.get),
            random.Random(),  # noqa: S311 - nothing is drawn here
            grace_s=0.0,
            forgotten_s=0.0,
        )
        adoption.removing = True
        for _ in range(ROUNDS_MAX):
            if not await self._is_left(row):
                return
            await adoption.look_after(row)
            if not await self._is_left(row):
                return
            await asyncio.sleep(ROUND_S)
        raise Unavailable(f"{row.name} still has jobs", hint="Look at `headrace sites`, and try again.")

    async def _is_left(self, row: SiteRecord) -> bool:
        """Say whether the row is still there, as it was written.

        Raises:
            Conflict: an agent of the site has begun meanwhile: the jobs that are left are its own.
        """
        now = await self._tables.sites.fetch(row.name)
        if now is not None and (now.agent, now.ends_at) != (row.agent, row.ends_at):
            raise Conflict(
                f"an agent of {row.name} has begun meanwhile: what jobs the site has left are its own",
                hint="Leave it to its agent; or stop that, and try again.",
            )
        return now is not None


@asynccontextmanager
async def removal(settings: Settings, silent_s: float = SILENT_S) -> AsyncIterator[Remover]:
    """Lend what removes sites, as the user admin, on the servers of ``tenants.administration``.

    Args:
        settings: where those are.
        silent_s: without a word from its agent for so long, a site may be removed.
    """
    settings = of_running_platform(settings)
    async with (
        link_to(settings, rights.ADMIN) as link,
        log_on(link, settings) as log,
        tables_on(link) as tables,
    ):
        yield Remover(link, log, tables, Stores(settings).blobs, silent_s)
