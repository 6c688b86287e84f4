"""Sends the jobs that a function asks for to their sites, and sees to it that each of those sites has a row.

A job may name a site that nobody knows: one that is to come, or a slip of the pen. Its row is what keeps such a job in
somebody's hands: whoever looks at the sites sees it, and ``workers.adoption`` ends what waits there for too long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from functions import jobs
from functions.jobs import Jobs, Planned
from functions.outcomes import World
from functions.sites import awaited, is_awaited
from headrace.errors import UserError
from headrace.joblog import SiteRecord
from headrace.wire import Effect, Invocation

AWAITED_MAX = 1000


class Rows(Protocol):
    """The table of sites."""

    def items(self) -> dict[str, SiteRecord]:
        """Return all rows, by name."""

    async def create(self, name: str, row: SiteRecord) -> bool:
        """Write a row unless there is one, and say whether there was none."""


async def placed(effects: Sequence[Effect], invocation: Invocation, world: World, rows: Rows) -> list[Planned]:
    """Return the effects of an invocation with a site for each job.

    Raises:
        UserError: no site can run a job, a specification makes no sense, what is to follow is not registered, or too
            many sites are waited for already.
        Unavailable: the table of sites does not answer.
    """
    planned = jobs.placed(effects, invocation, world)
    sites = {work.site for each in planned if isinstance(each, Jobs) for work in each.works}
    for name in sorted(sites - rows.items().keys()):
        if sum(map(is_awaited, rows.items().values())) >= AWAITED_MAX:
            raise UserError(
                f"submit: site {name} is not known, and jobs wait for {AWAITED_MAX:,} such sites already",
                hint="Name one of those that `headrace sites` shows.",
            )
        await rows.create(name, awaited(name, world.now))
    return planned
