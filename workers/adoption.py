"""The jobs that are in no agent's hands: those that had not begun go elsewhere, those that were lost are told so.

A pilot ends with its allocation, and its agent with it, at times without a word. Every worker looks after what is left:
all it does counts once, by the guards of the log, so it does not matter who was first. A site whose end is some time
ago, and at which nothing waits, is forgotten, with its row and its consumers.

The agent of a site that has not ended may be silent for long, or there never was one. What it was given stays its own;
what has not begun goes where another site takes it, or ends when its time is over, as it would in an agent's hands.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple, Protocol

import msgspec
from msgspec import structs

from functions import jobs, outcomes
from functions.ensembles import again
from functions.jobs import JobTried, read_job
from functions.moves import agent_of, is_elsewhere, may_have_begun, moved, over, repeated
from functions.outcomes import Attempted, World
from functions.outlook import Outlook
from functions.placement import Placement, place
from functions.sites import GONE_S, awaited, is_awaited
from headrace.errors import BadRequest, HeadraceError, NotFound
from headrace.joblog import SiteRecord
from headrace.jobs import JobEnd, JobSpec, Reason, failure
from headrace.wire import Invocation, Outcome, decode
from streams.blobs import Blobs, check_in, check_out
from streams.log import AlreadyThere, Log, Record
from streams.stored import Stored
from streams.topology import cancel_subject, jobs_waiting, remove_site
from workers.commits import APPEND_TIMEOUT_S, Commits, Fenced
from workers.jobpast import JobPast, left, past_of
from workers.joins import Joins
from workers.late import hopeless

_log = logging.getLogger(__name__)

ROUND_S = 5.0
GRACE_S = 20.0  # without a word from its agent for so long after its end, a site is taken for ended
LATE_S = 60.0
REST_MIN = 10.0  # a look at many jobs is followed by so many times as long without one
FORGOTTEN_S = 600.0  # a name may be given to the next allocation: so long those who name a site wait for that


NO_SPEC = JobSpec(executable="-")  # of one that cannot be read


class Rows(Protocol):
    """The table of sites."""

    def items(self) -> dict[str, SiteRecord]:
        """Return all rows, by name."""

    async def fetch(self, name: str) -> SiteRecord | None:
        """Return a row as the server has it."""

    async def create(self, name: str, row: SiteRecord) -> bool:
        """Write a row unless there is one, and say whether there was none."""

    async def delete(self, name: str) -> bool:
        """Remove a row and say whether there was one."""


class Care(Enum):
    """Which jobs of a site are in nobody's hands."""

    ALL = "it has ended"
    NOT_BEGUN = "its agent says nothing"


class _Seen(NamedTuple):
    """A row, since when we know it by the clock of the loop, and whether we saw it change then."""

    row: SiteRecord
    since: float
    changed: bool = False


class _Job(NamedTuple):
    """A job that is in no agent's hands, and what was done about it."""

    stored: Stored
    invocation: Invocation
    past: JobPast
    spec: JobSpec = NO_SPEC


class Adoption:
    """Looks after the jobs of sites that have ended or whose agents are silent, round after round."""

    def __init__(
        self,
        name: str,
        log: Log,
        sites: Rows,
        blobs: Blobs,
        outlook: Outlook,
        rng: random.Random,
        *,
        work_age_max_s: float = 86400.0,
        grace_s: float = GRACE_S,
        forgotten_s: float = FORGOTTEN_S,
        silent_s: float = GONE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Describe it.

        Args:
            name: who does it.
            log: where jobs wait, and what becomes of them stands.
            sites: the table of sites.
            blobs: where large specifications are.
            outlook: how long jobs run.
            rng: spreads the rounds of several processes.
            work_age_max_s: how long a job may wait, in seconds.
            grace_s: how long after its end, and after the last word of its agent, a site is taken for ended.
            forgotten_s: how long after that its row is kept, and who names it waits for another one of its name.
            silent_s: without a word from its agent for so long, what has not begun at a site may go elsewhere.
            clock: the time in epoch seconds.
        """
        self._silent_s = silent_s
        self._name = name
        self._log = log
        self._sites = sites
        self._blobs = blobs
        self._outlook = outlook
        self._age_max_s = work_age_max_s
        self._grace_s = grace_s
        self._forgotten_s = forgotten_s
        self._clock = clock
        self._rng = rng
        self._commits = Commits(log, Joins(log, clock, outlook), clock)
        self._seen: dict[str, _Seen] = {}
        self._gone: dict[str, _Seen] = {}  # rows that were there until then
        self.removing = False  # a site is removed for good: what no other one takes now has failed
        self._settled: dict[tuple[str, Care], int] = {}  # the sequence up to which nothing is left to do
        self._rests_until: dict[str, float] = {}  # by site, by the clock of the loop

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(ROUND_S * (0.5 + self._rng.random()))
            await self.round()

    async def round(self) -> None:
        """Look once at every site whose jobs are in nobody's hands. What goes wrong at one is tried again later."""
        rows, loop_s = dict(self._sites.items()), asyncio.get_running_loop().time()
        for name in sorted(self._seen.keys() - rows.keys()):
            row = self._seen.pop(name).row
            if row.ends_at is not None or is_awaited(row):
                self._gone[name] = _Seen(row, loop_s)
        for name, (row, since, _) in list(self._gone.items()):
            if name not in rows:
                await self._safely(row, None)
            if name in rows or loop_s - since >= LATE_S:
                del self._gone[name]
                self._rests_until.pop(name, None)
                self._well(name)
        for name, row in rows.items():
            care = self._care(row)
            if care is None:
                self._well(name)
            elif loop_s >= self._rests_until.get(name, 0.0):
                await self._safely(row, care)

    async def _safely(self, row: SiteRecord, care: Care | None) -> None:
        """Look after the jobs of a site, or of one that is forgotten (None); what goes wrong keeps no other waiting."""
        try:
            if care is None:
                await self._look_back(row)
            else:
                await self.look_after(row, care)
        except HeadraceError as error:
            _log.warning("the jobs of site %s are looked at later: %s", row.name, error)
        except Exception:  # the jobs of other sites are looked after all the same
            _log.exception("the jobs of site %s are looked at later", row.name)

    async def _look_back(self, row: SiteRecord) -> None:
        """Look at a site that is forgotten: who had seen its row may have sent a job there meanwhile."""
        if not is_awaited(row):
            await self.look_after(row)
        elif await self.look_after(row, Care.NOT_BEGUN):
            await self._sites.create(row.name, awaited(row.name, self._clock()))

    def _well(self, site: str) -> None:
        for care in Care:
            self._settled.pop((site, care), None)

    def _care(self, row: SiteRecord) -> Care | None:
        """Return which jobs of a site are in nobody's hands.

        How long its agent has been silent is counted by our own clock, from the moment at which its row last changed:
        what is at a site that is well is to be left alone, whatever time it is here.
        """
        loop_s = asyncio.get_running_loop().time()
        seen = self._seen.get(row.name)
        if seen is None or seen.row.at != row.at:
            seen = self._seen[row.name] = _Seen(row, loop_s, changed=seen is not None)
        silent_s = loop_s - seen.since
        if row.ends_at is not None and self._clock() >= row.ends_at + self._grace_s and silent_s >= self._grace_s:
            return Care.ALL
        return Care.NOT_BEGUN if is_awaited(row) or silent_s >= self._silent_s else None

    def _rows(self) -> list[SiteRecord]:
        """Return all rows with the instants at which their agents were heard by our own clock, as far as we heard."""
        now, loop_s = self._clock(), asyncio.get_running_loop().time()
        found = []
        for row in self._sites.items().values():
            seen = self._seen.get(row.name, _Seen(row, loop_s))
            at = now - (loop_s - seen.since)
            found.append(structs.replace(row, at=at if seen.changed else min(at, row.at)))
        return found

    async def look_after(self, row: SiteRecord, care: Care = Care.ALL) -> bool:
        """Look once at the jobs of a site that are in nobody's hands, and say whether some still wait there.

        Raises:
            HeadraceError: the log does not answer.
        """
        site, loop = row.name, asyncio.get_running_loop()
        began_at = loop.time()
        after = self._settled.get((site, care), 0)
        if care is Care.NOT_BEGUN:
            floor = await jobs_waiting(self._log.link, site)
            if floor is None:
                return False
            after = max(after, floor)
        found = await left(self._log, site, after)
        if care is Care.ALL:
            for ended in found.uncounted:
                await self._commits.fill(decode(ended.body, Outcome), ended.seq, ended.at)
        waiting: list[int] = []
        for stored in found.jobs:
            try:
                if not await self._settle(stored, row, care):
                    waiting.append(stored.seq)
            except Fenced:  # somebody else was first: the next round sees what he did
                waiting.append(stored.seq)
            except HeadraceError as error:
                _log.warning("%s is looked at later: %s", stored.subject, error)
                waiting.append(stored.seq)
        self._settled[site, care] = min(waiting, default=found.seen + 1) - 1
        rest_s = REST_MIN * (loop.time() - began_at)
        self._rests_until[site] = loop.time() + rest_s if rest_s > ROUND_S else 0.0
        if not waiting and self._is_forgotten(row):
            await self._forget(row)
        return bool(waiting)

    def _is_forgotten(self, row: SiteRecord) -> bool:
        if is_awaited(row):
            return self._clock() >= row.at + min(LATE_S, self._forgotten_s)
        return row.ends_at is not None and self._clock() >= row.ends_at + self._forgotten_s

    async def _forget(self, row: SiteRecord) -> None:
        """Remove a site, unless one of its name has begun."""
        now = await self._sites.fetch(row.name)
        if now is None or (now.agent, now.ends_at) != (row.agent, row.ends_at):
            return
        await self._sites.delete(row.name)
        await remove_site(self._log.link, row.name)
        _log.info("site %s is forgotten", row.name)

    # ------------------------------------------------------------ one job

    async def _settle(self, stored: Stored, row: SiteRecord, care: Care) -> bool:
        """Do what is to be done about a job without an outcome, and say whether that is all.

        Raises:
            Fenced: somebody else has done something about it at this moment.
            HeadraceError: it cannot be done now.
        """
        site, now = row.name, self._clock()
        *_, run, identity = stored.subject.split(".")
        past = await past_of(self._log, site, run, identity)
        if past.done is not None or is_elsewhere(past.holder, site):
            return True
        if await self._log.last(cancel_subject(run, "*")) is not None:
            return True  # nobody needs it
        begun = past.submitted is not None or may_have_begun(past.holder)
        if begun and care is Care.NOT_BEGUN:
            return True  # its agent knows, and may come back
        try:
            invocation = decode(stored.body, Invocation)
            work = read_job(invocation)
        except msgspec.MsgspecError:
            await self._commits.commit(*outcomes.unreadable(stored.subject, self._name, stored.at, now, past.fence))
            return True
        try:
            spec = msgspec.json.decode(await check_out(work.spec, self._blobs), type=JobSpec)
        except (BadRequest, NotFound, msgspec.MsgspecError) as error:
            await self._fail(_Job(stored, invocation, past), site, "stage_in", str(error))
            return True
        job = _Job(stored, invocation, past, spec)
        rows = self._rows()
        leaves = over(rows, now) | {site: _why(row, care)}
        placement = place(spec, rows, now, invocation.deadline, self._outlook, leaves)
        if begun:
            await self._lost(job, row, placement)
            return True
        return await self._move_on(job, row, placement, care)

    def _to(self, row: SiteRecord, placement: Placement) -> str | None:
        """Return where a job goes on now. One that would only wait there as well waits here, as long as it may."""
        if placement.later and not self.removing and not (row.ends_at is not None and self._is_forgotten(row)):
            return None
        return placement.site

    async def _move_on(self, job: _Job, row: SiteRecord, placement: Placement, care: Care) -> bool:
        """Take a job that has not begun to another site; where there is none it waits, or is told why."""
        invocation, past, now = job.invocation, job.past, self._clock()
        queued_at = job.stored.at
        since = read_job(invocation).waits_since or max(queued_at, invocation.sent_at)
        over = hopeless(invocation, since, now, self._age_max_s)
        if over is not None:
            await self._commits.commit(*outcomes.fail(invocation, _attempted(job, self._name, now), *over))
            return True
        to = self._to(row, placement)
        if to is not None:
            why, times = _why(row, care), (queued_at, now)
            await self._append(moved(invocation, to, why, times, attempt=past.attempt, fence=past.fence))
            _log.info("job %s goes on from %s to %s", invocation.invocation_id, row.name, to)
            return True
        if care is Care.NOT_BEGUN:
            return False
        if self.removing or (job.spec.sites and not placement.later and self._is_forgotten(row)):
            told = "; ".join(f"{name}: {why}" for name, why in placement.rejected.items())
            await self._fail(job, row.name, "site_ended", told)
            return True
        return False

    async def _lost(self, job: _Job, row: SiteRecord, placement: Placement) -> None:
        """Tell that a job was lost with its site, and try it again where it is to be."""
        site, past, now = row.name, job.past, self._clock()
        detail = f"{site} has ended, and no end of the job was heard of"
        if past.submitted is None:
            detail = f"{site} ended while it was being submitted there: nobody knows whether it began"
        waits = not job.spec.sites or placement.later
        if again(job.spec, "lost", past.attempt) and (placement.site is not None or waits):
            to, error = self._to(row, placement), failure(_end(job, site, "lost", detail))
            attempted = _attempted(job, self._name, now)
            holder = agent_of(to or site)
            await self._append(
                repeated(job.invocation, attempted, error, holder=holder, to=to, why=f"{site} has ended")
            )
            return
        await self._fail(job, site, "lost", detail)

    async def _fail(self, job: _Job, site: str, reason: Reason, detail: str) -> None:
        """Commit that a job has failed."""
        past, now = job.past, self._clock()
        tried = JobTried(
            attempt=past.attempt,
            agent=self._name,
            queued_at=job.stored.at,
            ended_at=now,
            submitted_at=None if past.submitted is None else past.submitted.at,
            stage_in_s=0.0 if past.submitted is None else past.submitted.stage_in_s,
            fence=past.fence,
        )
        end = msgspec.structs.replace(_end(job, site, reason, detail), time_s=jobs.times(tried))
        said = await check_in(jobs.told(end), self._blobs)
        world = World(function=lambda _: None, routes=(), now=now, outlook=self._outlook)
        await self._commits.commit(*jobs.ended(job.invocation, end, tried, world, said))

    async def _append(self, unit: list[Record]) -> None:
        try:
            await self._log.append(unit, timeout_s=APPEND_TIMEOUT_S)
        except AlreadyThere as other:
            raise Fenced from other


def _why(row: SiteRecord, care: Care) -> str:
    return "it is not known" if is_awaited(row) else care.value


def _end(job: _Job, site: str, reason: Reason, detail: str) -> JobEnd:
    submitted = job.past.submitted
    return JobEnd(
        job_id=job.invocation.invocation_id,
        site=site,
        state="failed",
        reason=reason,
        detail=detail,
        native_id=None if submitted is None else submitted.native_id,
        attempts=job.past.attempt,
    )


def _attempted(job: _Job, name: str, now: float) -> Attempted:
    submitted = job.past.submitted
    return Attempted(
        attempt=job.past.attempt,
        worker=name,
        queued_at=job.stored.at,
        started_at=now if submitted is None else submitted.at,
        ended_at=now,
        fence=job.past.fence,
    )
