"""What the log holds of the jobs of a site: of one that was delivered, and of all that were submitted."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import aclosing
from typing import NamedTuple

from msgspec import Struct

from functions.retries import Past, look_back
from headrace.joblog import Submitted
from headrace.wire import Lease, Outcome, decode
from streams.follow import follow
from streams.log import Log
from streams.stored import Stored
from streams.topology import attempt_subject, end_subject, fence_subject, kind_of, run_of, submit_subject

ASKED_AT_ONCE = 200


class JobPast(Struct, frozen=True, kw_only=True):
    """What was done about one job so far. Its attempts are submissions: each but the last one is known to have failed.

    ``submitted`` is what the batch system has of the present attempt, None if it has none that we know of;
    ``first_at`` when the first attempt was submitted. ``holder`` names the agent that holds the newest lease.
    """

    done: Stored | None = None
    fence: int = 0
    attempt: int = 1
    failed_s: float = 0.0
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
        failed_s=past.failed_s,
        submitted=next((s for s in every if s.attempt == attempt), None),
        first_at=min((s.at for s in every), default=None),
        holder=leases[-1].worker if leases else "",
    )


async def past_of(log: Log, site: str, run: str, job: str) -> JobPast:
    """Return what was done about a job.

    Raises:
        Unavailable: the log does not answer.
    """
    return read(await log.last_of_each(subjects(site, run, job)))


class Unfinished(NamedTuple):
    """What an agent before this one left: jobs that were submitted and have no outcome, and outcomes (messages of the
    log) of runs that go on, of which nobody may have counted the slot that they fill.
    """

    jobs: list[JobPast]
    uncounted: list[Stored]


async def unfinished(log: Log, site: str) -> Unfinished:
    """Return what is to be done about the jobs of a site that were submitted.

    The message of a job is acknowledged before its outcome is there, so nobody else comes and finds that uncounted.

    Raises:
        Unavailable: the log does not answer.
    """
    newest: dict[tuple[str, str], int] = {}
    subject = submit_subject("*", "*", "*", site)
    last = await log.last(subject)
    if last is None:
        return Unfinished([], [])
    async with aclosing(follow(log, [subject], after=0)) as batches:
        async for batch in batches:
            for stored in batch:
                _, _, run, job, *_ = stored.subject.split(".")
                newest[run, job] = stored.seq
            if batch and batch[-1].seq >= last.seq:
                break
    found: list[JobPast] = []
    ended: list[Stored] = []
    every = list(newest)
    for start in range(0, len(every), ASKED_AT_ONCE):
        some = every[start : start + ASKED_AT_ONCE]
        # Whether it is over is asked first, for most are.
        last_words = await log.last_of_each([fence_subject(run, job) for run, job in some])
        outcomes = [stored for stored in last_words if kind_of(stored.subject) == "done"]
        over = {tuple(stored.subject.split(".")[2:4]) for stored in outcomes}
        ended += [stored for stored in outcomes if decode(stored.body, Outcome).slot is not None]
        for run, job in some:
            if (run, job) not in over:
                past = await past_of(log, site, run, job)
                if past.done is None and past.submitted is not None:
                    found.append(past)
    return Unfinished(found, await _of_open_runs(log, ended))


async def _of_open_runs(log: Log, outcomes: list[Stored]) -> list[Stored]:
    runs = list(dict.fromkeys(run_of(stored.subject) for stored in outcomes))
    over: set[str] = set()
    for start in range(0, len(runs), ASKED_AT_ONCE):
        some = runs[start : start + ASKED_AT_ONCE]
        over |= {run_of(stored.subject) for stored in await log.last_of_each([end_subject(run) for run in some])}
    return [stored for stored in outcomes if run_of(stored.subject) not in over]
