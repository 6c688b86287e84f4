"""What the agent of a site works with."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
from msgspec import Struct

from functions.moves import agent_of
from headrace.joblog import JobWork, SiteRecord
from headrace.jobs import JobSpec
from headrace.wire import ForecastRow
from streams.blobs import Blobs, check_out
from streams.log import Log
from streams.tables import Table
from workers.jobhand import HELD_MAX
from workers.push import Push
from workers.sites.base import SiteConfig
from workers.sites.lazy import LazySite
from workers.staging import Stager


class Tools(Struct, frozen=True, kw_only=True):
    """What an agent works with, made and owned by whoever starts it.

    ``host`` tells this process from other agents. ``work_age_max_s`` is how long a job may wait to be submitted, in
    seconds, before it is given up on; ``ends_at`` is the epoch second at which the site itself ends, where it is an
    allocation; ``held_max`` is how many jobs are in its hand at a time; ``clock`` tells epoch seconds.
    """

    host: str
    site: SiteConfig
    system: LazySite
    log: Log
    forecasts: Table[ForecastRow]
    sites: Table[SiteRecord]
    blobs: Blobs
    stager: Stager
    push: Push
    work_age_max_s: float = 86400.0
    ends_at: float | None = None
    held_max: int = HELD_MAX
    clock: Callable[[], float] = time.time

    @property
    def name(self) -> str:
        """The agent's name: of which site it is, and which process."""
        return agent_of(self.site.name, self.host)

    @property
    def alone(self) -> bool:
        """Whether what the site runs ends with its machine or allocation: one of its name before it is gone then."""
        return self.site.kind == "local" or self.ends_at is not None

    async def spec(self, work: JobWork) -> JobSpec:
        """Return the specification of a job.

        Raises:
            NotFound, MsgspecError: it cannot be read, and never will.
            Unavailable: it cannot be read now.
        """
        return msgspec.json.decode(await check_out(work.spec, self.blobs), type=JobSpec)
