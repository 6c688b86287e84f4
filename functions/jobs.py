"""Batch jobs as a part of the log: what an invocation that asks for some appends, and what the end of one leads to.

A job is an invocation whose body runs at a site. Its site is chosen when the outcome that asks for it is committed;
the functions that follow it are those of that moment. Its agent ends it with one unit, guarded as any outcome:

    completed          ── then ────────── starts in the place of the job
                          no then ─────── the end of the job is the result, and the end of its branch
    failed, canceled   ── on_failure ──── starts in the place of the job
                          no on_failure ─ the job is given up on, and its run fails

Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from msgspec import Struct, structs

from functions import trail
from functions.outcomes import Attempted, World, child, done_record, outcome_of, run_end, work_record
from functions.placement import place, refused
from functions.sites import shape_of
from headrace.errors import HeadraceError, UserError
from headrace.joblog import JOB_WORK, JobWork
from headrace.jobs import JobEnd, JobSpec, JobTime, failure
from headrace.model import ErrorInfo, InvocationState, TimeLedger
from headrace.names import invocation_id
from headrace.wire import (
    Call,
    Effect,
    Emit,
    FunctionRecord,
    Invocation,
    JobDone,
    Map,
    Move,
    Outcome,
    Payload,
    RunEnd,
    Submit,
    SubmitMany,
    decode,
    encode,
)
from streams.log import Record

_spec = msgspec.json.Decoder(JobSpec).decode


class Jobs(Struct, frozen=True, kw_only=True):
    """Jobs that have a site. Those that are ``together`` end together, and ``then`` gets their ends in order."""

    works: list[JobWork]
    together: bool = False
    then: FunctionRecord | None = None


class JobTried(Struct, frozen=True, kw_only=True):
    """The last attempt of a job: its times in epoch seconds, None where it did not come so far.

    ``queued_at`` is by the log's clock, ``started_at`` and ``job_ended_at`` by the batch system's, the others by the
    agent's; ``ended_at`` is when the agent was done with it. ``stage_in_s`` and ``stage_out_s`` went into moving data
    before its submission and after its end. ``fence`` is the sequence of the lease under which the agent holds it.
    """

    attempt: int
    agent: str
    queued_at: float
    ended_at: float
    submitted_at: float | None = None
    started_at: float | None = None
    job_ended_at: float | None = None
    stage_in_s: float = 0.0
    stage_out_s: float = 0.0
    fence: int = 0


# ---------------------------------------------------------------- asking for jobs


Planned = Call | Map | Emit | Jobs


def placed(effects: Sequence[Effect | Jobs], invocation: Invocation, world: World) -> list[Planned]:
    """Return the effects of an invocation with a site for each job; what has one keeps it.

    Raises:
        UserError: no site can run a job, a specification makes no sense, or what is to follow is not registered.
    """
    return [_placed(each, invocation, world) if isinstance(each, Submit | SubmitMany) else each for each in effects]


def _placed(effect: Submit | SubmitMany, invocation: Invocation, world: World) -> Jobs:
    together = isinstance(effect, SubmitMany)
    what = "submit_many" if together else "submit"
    then = None if effect.then is None else world.named(effect.then, f"{what}(then=...)")
    failing = None if effect.on_failure is None else world.named(effect.on_failure, f"{what}(on_failure=...)")
    after = None if together else then
    chosen: dict[bytes, _Chosen] = {}  # most members of an ensemble ask for the same
    works: list[JobWork] = []
    for payload in effect.specs if isinstance(effect, SubmitMany) else [effect.spec]:
        site, shape, limit_s = _site(payload, invocation, world, chosen)
        work = JobWork(
            site=site,
            spec=payload,
            shape=shape,
            limit_s=limit_s,
            then=None if after is None else after.name,
            then_version="" if after is None else after.version,
            on_failure=None if failing is None else failing.name,
            on_failure_version="" if failing is None else failing.version,
        )
        works.append(work)
    return Jobs(works=works, together=together, then=then if together else None)


class _Chosen(NamedTuple):
    """The site of a job, and what is told of it so that nobody has to read its specification for that."""

    site: str
    shape: str
    limit_s: float | None


def _site(payload: Payload, invocation: Invocation, world: World, chosen: dict[bytes, _Chosen]) -> _Chosen:
    """Return the site, the shape and the limit of a job."""
    spec = spec_of(payload)
    alike = msgspec.json.encode((spec.sites, spec.resources, spec.attributes, spec.container))
    found = chosen.get(alike)
    if found is None:
        placement = place(spec, world.sites, world.now, invocation.deadline, world.outlook)
        if placement.site is None:
            raise refused(spec, placement)
        found = chosen[alike] = _Chosen(placement.site, shape_of(spec), spec.attributes.duration_s)
    return found


def spec_of(payload: Payload) -> JobSpec:
    """Return the specification of a job; its bytes have to be there.

    Raises:
        UserError: it makes no sense.
    """
    try:
        return _spec(payload.body)
    except (msgspec.MsgspecError, HeadraceError) as error:
        hint = getattr(error, "hint", "")
        raise UserError(f"submit: {error}", hint=hint, transient=False) from error


def payload_of(work: JobWork) -> Payload:
    """Return the payload of a job's invocation. It is never a claim check, so that everybody can read its site."""
    body = encode(work)
    return Payload(type=JOB_WORK, body=body, size=len(body))


def read_job(invocation: Invocation) -> JobWork:
    """Return what a job's invocation asks its site for.

    Raises:
        MsgspecError: it is damaged, or of another release.
    """
    return decode(invocation.payload.body, JobWork)


# ---------------------------------------------------------------- the end of a job


def times(tried: JobTried) -> JobTime:
    """Return where the time of a job went, in the same numbers as the time ledger of its run."""
    whole = _parts(tried)
    return JobTime(
        queue=whole.queue_s,
        run=whole.run_s,
        stage_in=whole.stage_in_s,
        stage_out=whole.stage_out_s,
    )


def _parts(tried: JobTried) -> TimeLedger:
    """Return the parts of the time from the log to the end of a job. Clocks differ: no part is negative.

    What is neither in the queue nor running nor moving data is waiting for the agent before the submission, and after
    the job's end the platform's own time to hear and to tell of it.
    """
    ended = max(tried.queued_at, tried.ended_at)
    submitted = _within(tried.queued_at, tried.submitted_at, ended)
    job_ended = _within(submitted, tried.job_ended_at, ended)
    started = _within(submitted, tried.started_at, job_ended)
    before, after = submitted - tried.queued_at, ended - job_ended
    moved_in = min(before, tried.stage_in_s)
    moved_out = min(after, tried.stage_out_s)
    return TimeLedger(
        lane_s=before - moved_in,
        stage_in_s=moved_in,
        queue_s=started - submitted,
        run_s=job_ended - started,
        stage_out_s=moved_out,
        commit_s=after - moved_out,
    )


def _within(earliest: float, at: float | None, latest: float) -> float:
    """Return an instant between two others; one that was never reached counts as the latest."""
    return latest if at is None else min(max(earliest, at), latest)


def spent(invocation: Invocation, tried: JobTried) -> TimeLedger:
    """Return the time ledger of a run up to the end of a job."""
    before, parts = invocation.spent, _parts(tried)
    return structs.replace(
        before,
        lane_s=before.lane_s + parts.lane_s,
        stage_in_s=before.stage_in_s + parts.stage_in_s,
        queue_s=before.queue_s + parts.queue_s,
        run_s=before.run_s + parts.run_s,
        stage_out_s=before.stage_out_s + parts.stage_out_s,
        commit_s=before.commit_s + parts.commit_s + max(0.0, tried.queued_at - invocation.sent_at),
    )


def told(end: JobEnd) -> Payload:
    """Return the end of a job as a payload: what follows gets it, and where nothing follows it is the result."""
    body = msgspec.json.encode(end)
    return Payload(body=body, size=len(body))


def ended(
    invocation: Invocation, end: JobEnd, tried: JobTried, world: World, said: Payload
) -> tuple[Outcome, list[Record]]:
    """Return the outcome of a job that has ended for good, and the unit to append.

    Args:
        invocation: the job's.
        end: how it ended.
        tried: its last attempt.
        world: the time.
        said: ``told(end)`` as the log may hold it.
    """
    work = read_job(invocation)
    invocation = structs.replace(invocation, version=work.shape)  # which is what is learned of it
    completed = end.state == "completed"
    function, version = (work.then, work.then_version) if completed else (work.on_failure, work.on_failure_version)
    ledger = spent(invocation, tried)
    attempted = _attempted(tried)
    state: InvocationState = "succeeded" if completed else "failed" if function is not None else "dead"
    error = failure(end) if state == "dead" else None
    ends = function is None and invocation.slot is None
    run_ends: RunEnd | None = None
    if ends:
        run_ends = run_end(invocation, attempted, ledger, "succeeded" if completed else "failed", error)
    outcome = outcome_of(
        invocation,
        attempted,
        state,
        result=said if state != "dead" else None,
        error=error,
        children=0 if function is None else 1,
        job=_done(end, tried, work.moves),
        spent=ledger,
        end=run_ends,
    )
    done = done_record(outcome, tried.fence)
    if function is None:
        return outcome, [done]
    follow_up = child(
        invocation,
        attempted,
        ledger,
        identity=invocation_id(invocation.invocation_id, "then" if completed else "failure"),
        function=function,
        version=version,
        payload=said,
        slot=invocation.slot,
        breadth=invocation.breadth,
        due=world.due(invocation.tenant, invocation.deadline, function, version, said.size),
        steps=trail.onward(invocation, attempted.started_at, attempted.ended_at, 1),
    )
    return outcome, [work_record(follow_up, world.now), done]


def canceled(invocation: Invocation, end: JobEnd, tried: JobTried, error: ErrorInfo) -> tuple[Outcome, list[Record]]:
    """Return the outcome of a job that nobody needs any more though its run goes on or ends with it, and its unit."""
    ledger, attempted, moves = spent(invocation, tried), _attempted(tried), read_job(invocation).moves
    run_ends = run_end(invocation, attempted, ledger, "canceled", error) if invocation.slot is None else None
    outcome = outcome_of(
        invocation, attempted, "canceled", error=error, job=_done(end, tried, moves), spent=ledger, end=run_ends
    )
    return outcome, [done_record(outcome, tried.fence)]


def dropped(invocation: Invocation, end: JobEnd, tried: JobTried) -> Record:
    """Return the outcome of a job whose run was canceled: it fills no slot and ends nothing, for all that is over."""
    error = ErrorInfo(kind="canceled", message="its run was canceled")
    done = _done(end, tried, read_job(invocation).moves)
    outcome = outcome_of(
        structs.replace(invocation, slot=None),
        _attempted(tried),
        "canceled",
        error=error,
        job=done,
        spent=spent(invocation, tried),
    )
    return done_record(outcome, tried.fence)


def _done(end: JobEnd, tried: JobTried, moves: list[Move]) -> JobDone:
    return JobDone(
        site=end.site,
        state=end.state,
        native_id=end.native_id,
        reason=end.reason,
        exit_code=end.exit_code,
        submitted_at=tried.submitted_at,
        started_at=tried.started_at,
        ended_at=tried.job_ended_at,
        moves=moves,
    )


def _attempted(tried: JobTried) -> Attempted:
    return Attempted(
        attempt=tried.attempt,
        worker=tried.agent,
        queued_at=tried.queued_at,
        started_at=tried.ended_at if tried.started_at is None else tried.started_at,
        ended_at=tried.ended_at,
        fence=tried.fence,
    )
