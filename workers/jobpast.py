"""What the log holds of the jobs of a site, of one that was delivered and of all that were submitted; and leases."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from typing import NamedTuple

import msgspec
from msgspec import Struct, structs

from functions.retries import Past, look_back
from headrace.joblog import Submitted
from headrace.wire import Lease, Outcome, decode, encode
from streams.follow import follow
from streams.log import AlreadyThere, Log, Record
from streams.stored import Stored
from streams.topology import (
    attempt_subject,
    end_subject,
    fence_subject,
    job_subject,
    kind_of,
    lease_subject,
    run_of,
    submit_subject,
)
from workers.commits import APPEND_TIMEOUT_S, Fenced

ASKED_AT_ONCE = 200

Job = tuple[str, str]  # its run and its own id


class JobPast(Struct, frozen=True, kw_only=True):
    """What was done about one job so far. Its attempts are submissions: each but the last one is known to have failed.

    ``submitted`` is what the batch system has of the present attempt, None if it has none that we know of;
    ``first_at`` when the first attempt was submitted. ``holder`` names the agent that holds the newest lease.
    """

    done: Stored | None = None
    fence: int = 0
    attempt: int = 1
    submitted: Submitted | None = None
    first_at: float | None = None
    holder: str = ""


def subjects(site: str, run: str, job: str) -> list[str]:
    """Return where it stands what was done about a job."""
    return [fence_subject(run, job), attempt_subject(run, job, "*"), submit_subject(run, job, "*", site)]


def read(found: Iterable[Stored]) -> JobPast:
    """Read the newest message of each of a job's subjects."""
    stored = list(found)
    past: Past = look_back(stored)
    every = [decode(s.body, Submitted) for s in stored if kind_of(s.subject) == "submit"]
    leases = [decode(s.body, Lease) for s in stored if kind_of(s.subject) == "lease"]
    # Leases are taken again and again for the same attempt; the newest one names it, should an answer not be whole.
    attempt = max([past.failures + 1, *(lease.attempt for lease in leases[-1:])])
    return JobPast(
        done=past.done,
        fence=past.fence,
        attempt=attempt,
        submitted=next((s for s in every if s.attempt == attempt), None),
        first_at=min((s.first_at or s.at for s in every), default=None),
        holder=leases[-1].worker if leases else "",
    )


async def past_of(log: Log, site: str, run: str, job: str) -> JobPast:
    """Return what was done about a job.

    Raises:
        Unavailable: the log does not answer.
    """
    return read(await log.last_of_each(subjects(site, run, job)))


async def taken_over(log: Log, past: JobPast, run: str, job: str, agent: str, now: float) -> JobPast:
    """Take a job over and return what was done about it, with the new fence: who had it before commits no more.

    Raises:
        Fenced: another agent took it over, or has committed it, at this moment.
        Unavailable: the log does not answer.
    """
    lease = Lease(run_id=run, invocation_id=job, attempt=past.attempt, worker=agent, at=now)
    record = Record(lease_subject(run, job), encode(lease), fence_subject(run, job), past.fence)
    try:
        (seq,) = await log.append([record], timeout_s=APPEND_TIMEOUT_S)
    except AlreadyThere as other:
        raise Fenced from other
    return structs.replace(past, fence=seq)


class Unfinished(NamedTuple):
    """What an agent before this one left: jobs that were submitted and have no outcome, and outcomes (messages of the
    log) of runs that go on, of which nobody may have counted the slot that they fill.
    """

    jobs: list[Job]
    uncounted: list[Stored]


async def unfinished(log: Log, site: str) -> Unfinished:
    """Return what is to be done about the jobs of a site that were submitted.

    The message of a job is acknowledged before its outcome is there, so nobody else comes and finds that uncounted.

    Raises:
        Unavailable: the log does not answer.
    """
    submitted: dict[Job, None] = {}
    async for stored in _each(log, submit_subject("*", "*", "*", site), 0):
        _, _, run, job, *_ = stored.subject.split(".")
        submitted[run, job] = None
    open_jobs, ended = await _open(log, submitted)
    return Unfinished(open_jobs, await _of_open_runs(log, ended))


class Left(NamedTuple):
    """What is left of the jobs that were ever for a site: the newest messages of those without an outcome, and
    outcomes as in ``Unfinished``. ``seen`` is the sequence of the last message that was looked at.
    """

    jobs: list[Stored]
    uncounted: list[Stored]
    seen: int


async def left(log: Log, site: str, after: int = 0) -> Left:
    """Return what is left of the jobs whose messages for a site came after a sequence of the log."""
    newest: dict[Job, Stored] = {}
    seen = after
    async for stored in _each(log, job_subject(site, "*", "*", "*"), after):
        *_, run, job = stored.subject.split(".")
        newest[run, job], seen = stored, stored.seq
    open_jobs, ended = await _open(log, newest)
    return Left([newest[each] for each in open_jobs], await _of_open_runs(log, ended), seen)


async def _each(log: Log, subject: str, after: int) -> AsyncIterator[Stored]:
    """Yield what is on a subject now, behind a sequence of the log."""
    last = await log.last(subject)
    if last is None or last.seq <= after:
        return
    async with aclosing(follow(log, [subject], after=after)) as batches:
        async for batch in batches:
            for stored in batch:
                yield stored
            if batch and batch[-1].seq >= last.seq:
                return


async def _open(log: Log, jobs: Iterable[Job]) -> tuple[list[Job], list[Stored]]:
    """Return which of these jobs have no outcome, and the outcomes of the others that fill a slot."""
    found: list[Job] = []
    ended: list[Stored] = []
    every = list(jobs)
    for start in range(0, len(every), ASKED_AT_ONCE):
        some = every[start : start + ASKED_AT_ONCE]
        # Whether it is over is asked first, for most are.
        last_words = await log.last_of_each([fence_subject(run, job) for run, job in some])
        outcomes = [stored for stored in last_words if kind_of(stored.subject) == "done"]
        over = {tuple(stored.subject.split(".")[2:4]) for stored in outcomes}
        ended += [stored for stored in outcomes if _fills(stored)]
        found += [each for each in some if each not in over]
    return found, ended


def _fills(stored: Stored) -> bool:
    """Say whether an outcome fills a slot; one that cannot be read was written, and counted, by a newer release."""
    try:
        return decode(stored.body, Outcome).slot is not None
    except msgspec.MsgspecError:
        return False


async def _of_open_runs(log: Log, outcomes: list[Stored]) -> list[Stored]:
    runs = list(dict.fromkeys(run_of(stored.subject) for stored in outcomes))
    over: set[str] = set()
    for start in range(0, len(runs), ASKED_AT_ONCE):
        some = runs[start : start + ASKED_AT_ONCE]
        over |= {run_of(stored.subject) for stored in await log.last_of_each([end_subject(run) for run in some])}
    return [stored for stored in outcomes if run_of(stored.subject) not in over]
