"""Jobs that are taken from one site to another: what is appended for that, so that a job is at one site at a time.

A job belongs to the site that its newest lease names, or, as long as nobody has it, to the one that its message is
for. So a move is a message for the new site and a lease in its name, in one unit that is guarded as an outcome is.
Whoever comes upon the old message sees by the lease that the job is another site's, and lets go of it. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import structs

from functions.jobs import payload_of, read_job
from functions.outcomes import Attempted, failed_attempt, work_record
from headrace.joblog import JobWork, SiteRecord
from headrace.model import ErrorInfo
from headrace.wire import Invocation, Lease, Move, encode
from streams.log import Record
from streams.topology import fence_subject, lease_subject

AGENT = "agent"
MOVES_KEPT_MAX = 8


def agent_of(site: str, host: str = "") -> str:
    """Return the name of an agent: of which site, and which process. Without one, it is whichever comes."""
    return f"{AGENT}/{site}/{host}"


def is_elsewhere(holder: str, site: str) -> bool:
    """Say whether a job whose newest lease is this holder's belongs to another site than this one."""
    return holder != "" and not holder.startswith(agent_of(site))


def may_have_begun(holder: str) -> bool:
    """Say whether a process holds a job, by its newest lease: it may have begun to submit it."""
    return holder != "" and not holder.endswith("/")


def over(sites: Iterable[SiteRecord], now: float) -> dict[str, str]:
    """Return the sites to which nothing is moved, with the reason: they have ended or are about to.

    Who names one when he asks for a job waits for the next of its name; what is moved would go round between two.
    """
    ending = [site for site in sites if site.ends_at is not None and (now >= site.ends_at or not site.accepts)]
    return {site.name: "it has ended" if now >= (site.ends_at or 0.0) else "it ends" for site in ending}


def lease(invocation: Invocation, holder: str, attempt: int, now: float, fence: int) -> Record:
    """Return the record with which a job becomes this holder's: it counts while ``fence`` is the newest lease."""
    run, identity = invocation.run_id, invocation.invocation_id
    held = Lease(run_id=run, invocation_id=identity, attempt=attempt, worker=holder, at=now)
    return Record(lease_subject(run, identity), encode(held), fence_subject(run, identity), fence)


def moved(
    invocation: Invocation, to: str, why: str, times: tuple[float, float], *, attempt: int, fence: int
) -> list[Record]:
    """Return the unit with which a job that has not begun is taken to another site.

    Args:
        invocation: the job's, as it waited.
        to: the site.
        why: why it is not run where it was.
        times: when its message was stored, and now, in epoch seconds.
        attempt: the number of the attempt that is next.
        fence: the sequence of its newest lease, 0 without one.
    """
    (queued_at, now), work, before = times, read_job(invocation), invocation.spent
    since = work.waits_since or max(queued_at, invocation.sent_at)
    waiting = structs.replace(
        invocation,
        payload=payload_of(structs.replace(_left(work, to, why, now), waits_since=since)),
        # Its time where it was is told now: the new message counts from here on.
        spent=structs.replace(
            before,
            commit_s=before.commit_s + max(0.0, queued_at - invocation.sent_at),
            lane_s=before.lane_s + max(0.0, now - max(queued_at, invocation.sent_at)),
        ),
        sent_at=now,
    )
    return [work_record(waiting, now), lease(invocation, agent_of(to), attempt, now, fence)]


def repeated(
    invocation: Invocation, tried: Attempted, error: ErrorInfo, *, holder: str, to: str | None = None, why: str = ""
) -> list[Record]:
    """Return the unit with which a job whose attempt failed waits for the next one.

    Args:
        invocation: the job's, as it waited for this attempt, which began when it was submitted.
        tried: the attempt.
        error: why it failed.
        holder: whose the next attempt is.
        to: another site at which that is to be, None for the same one.
        why: why it is another one.
    """
    now, before = tried.ended_at, invocation.spent
    began_at = max(tried.queued_at, tried.started_at)
    spent = structs.replace(
        before,
        commit_s=before.commit_s + max(0.0, tried.queued_at - invocation.sent_at),
        lane_s=before.lane_s + began_at - max(tried.queued_at, invocation.sent_at),
        run_s=before.run_s + max(0.0, now - began_at),
    )
    work = structs.replace(read_job(invocation), waits_since=now)
    if to is not None:
        work = _left(work, to, why, now)
    again = structs.replace(invocation, payload=payload_of(work), spent=spent, sent_at=now)
    failed = failed_attempt(invocation, tried, error, now)
    return [
        Record(failed.subject, failed.body),
        work_record(again, now),
        # The guard of the unit: whoever held the job before it commits no more.
        lease(invocation, holder, tried.attempt + 1, now, tried.fence),
    ]


def _left(work: JobWork, to: str, why: str, now: float) -> JobWork:
    moves = [*work.moves, Move(at=now, site=work.site, why=why)][-MOVES_KEPT_MAX:]
    return structs.replace(work, site=to, moves=moves)
