"""How invocations end: the time it took them, their outcomes, and the building blocks of the unit that tells of one.

Pure. The unit of one that went well is put together in ``functions.effects``, that of a batch job in
``functions.jobs``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from msgspec import Struct, structs

from functions import rungs
from functions.forecast import size_class
from functions.outlook import NOTHING_KNOWN, Outlook
from functions.qos import lane
from headrace.errors import UserError
from headrace.joblog import JOB, JobWork, SiteRecord
from headrace.model import ErrorInfo, InvocationState, RunState, TimeLedger
from headrace.wire import (
    Attempt,
    FunctionRecord,
    Invocation,
    JobDone,
    Outcome,
    Payload,
    RouteRecord,
    RunEnd,
    Slot,
    Step,
    decode,
    encode,
)
from streams.log import Record
from streams.tables import row_key
from streams.topology import attempt_subject, done_subject, fence_subject, job_subject, work_subject

DEPTH_MAX = 1000
STAGE_IN_S_MIN = 0.005  # what takes less is no part of its own of how long an attempt takes


class Attempted(Struct, frozen=True, kw_only=True):
    """One attempt: its times in epoch seconds, ``queued_at`` by the log's clock and the others by the worker's.

    ``fence`` is the sequence of the lease under which it runs, 0 for a first delivery: its outcome counts only while
    no newer lease is in the log. Of its time ``stage_in_s`` and ``stage_out_s`` went into moving data, in seconds;
    ``failed_s`` is how long attempts before it ran that failed.
    """

    attempt: int
    worker: str
    queued_at: float
    started_at: float
    ended_at: float
    fence: int = 0
    stage_in_s: float = 0.0
    stage_out_s: float = 0.0
    failed_s: float = 0.0


class World(Struct, frozen=True, kw_only=True):
    """What an outcome is committed against: functions, routes and sites as they are at this moment, and the time.

    ``depth_max`` is how long a chain may get, ``outlook`` what is expected of what follows.
    """

    function: Callable[[str], FunctionRecord | None]
    routes: Iterable[RouteRecord]
    now: float
    depth_max: int = DEPTH_MAX
    outlook: Outlook = NOTHING_KNOWN
    sites: Iterable[SiteRecord] = ()

    def named(self, name: str, what: str) -> FunctionRecord:
        """Return the function of this name as it is registered now; ``what`` is the effect that asks for it.

        Raises:
            UserError: there is none.
        """
        record = self.function(name)
        if record is None:
            raise UserError(
                f"{what}: no function named {name} is registered",
                hint=f"Deploy the file that defines {name}, then trigger again.",
                transient=False,
            )
        return record

    def due(
        self,
        tenant: str,
        deadline: float | None,
        function: str,
        version: str,
        size: int = 0,
        not_before: float = 0.0,
    ) -> float | None:
        """Return by when this function should have ended with so many bytes of payload; None: whenever.

        ``deadline`` is its run's; it starts now, or at ``not_before`` if that is later.
        """
        start = max(self.now, not_before)
        return self.outlook.due(deadline, row_key(tenant, function), version, size_class(size), start)


def spent(invocation: Invocation, tried: Attempted) -> TimeLedger:
    """Return the time ledger up to the end of this attempt. Clocks of two machines may differ: no part is negative.

    Attempts that failed have run too. What is left between the log and this attempt is waiting: for a worker, for the
    next attempt, for the end of a delay.
    """
    before = invocation.spent
    sent = max(0.0, tried.queued_at - invocation.sent_at)
    first = invocation.parent_id is None
    waited = max(0.0, tried.started_at - tried.queued_at)
    failed = min(waited, tried.failed_s)
    took = max(0.0, tried.ended_at - tried.started_at)
    moved_in = min(took, tried.stage_in_s)
    moved_out = min(took - moved_in, tried.stage_out_s)
    return structs.replace(
        before,
        gateway_s=before.gateway_s + (sent if first else 0.0),
        commit_s=before.commit_s + (0.0 if first else sent),
        lane_s=before.lane_s + waited - failed,
        stage_in_s=before.stage_in_s + moved_in,
        run_s=before.run_s + failed + took - moved_in - moved_out,
        stage_out_s=before.stage_out_s + moved_out,
    )


def fail(
    invocation: Invocation, tried: Attempted, error: ErrorInfo, state: InvocationState = "dead"
) -> tuple[Outcome, list[Record]]:
    """Return the outcome of an invocation that is given up on, and the unit to append."""
    ledger = spent(invocation, tried)
    ending: RunState = "canceled" if state == "canceled" else "failed"
    # On a ladder another one may answer yet, or has answered: who ends the run then has to look.
    ends = invocation.slot is None and invocation.rung is None
    end = run_end(invocation, tried, ledger, ending, error) if ends else None
    outcome = outcome_of(invocation, tried, state, error=error, spent=ledger, end=end)
    return outcome, [done_record(outcome, tried.fence)]


def failed_attempt(invocation: Invocation, tried: Attempted, error: ErrorInfo, retry_at: float) -> Record:
    """Return the record of a failed attempt that another one follows, not before ``retry_at``."""
    run, identity = invocation.run_id, invocation.invocation_id
    failed = Attempt(
        run_id=run,
        invocation_id=identity,
        function=invocation.function,
        version=invocation.version,
        worker=tried.worker,
        attempt=tried.attempt,
        queued_at=tried.queued_at,
        started_at=tried.started_at,
        ended_at=tried.ended_at,
        retry_at=retry_at,
        error=error,
        parent_id=invocation.parent_id,
    )
    subject = attempt_subject(run, identity, tried.attempt)
    return Record(subject, encode(failed), fence_subject(run, identity), tried.fence)


def unreadable(subject: str, worker: str, queued_at: float, now: float, fence: int = 0) -> tuple[Outcome, list[Record]]:
    """Return the outcome of work whose message cannot be read: its subject tells whose it is, and its run ends."""
    _, kind, place, tenant, run, identity = subject.split(".")
    error = ErrorInfo(
        kind="unreadable", message="the message of this invocation is damaged, or of another release of the platform"
    )
    outcome = Outcome(
        run_id=run,
        invocation_id=identity,
        function=JOB if kind == "job" else "",
        version="",
        route="",
        tenant=tenant,
        state="dead",
        attempts=0,
        queued_at=queued_at,
        started_at=now,
        ended_at=now,
        worker=worker,
        accepted_at=queued_at,
        error=error,
        end=RunEnd(run_id=run, state="failed", error=error, ended_at=now),
        job=JobDone(site=place, state="failed") if kind == "job" else None,
    )
    return outcome, [done_record(outcome, fence)]


def child(
    parent: Invocation,
    tried: Attempted,
    ledger: TimeLedger,
    *,
    identity: str,
    function: str,
    version: str,
    payload: Payload,
    slot: Slot | None,
    breadth: int,
    due: float | None,
    steps: list[Step],
    parent_id: str | None = None,
    not_before: float = 0.0,
) -> Invocation:
    """Return an invocation that ``parent`` starts with its outcome; ``parent_id`` is another one that asked for it."""
    return Invocation(
        run_id=parent.run_id,
        invocation_id=identity,
        function=function,
        version=version,
        route=parent.route,
        tenant=parent.tenant,
        payload=payload,
        accepted_at=parent.accepted_at,
        sent_at=tried.ended_at,
        deadline=parent.deadline,
        parent_id=parent_id or parent.invocation_id,
        slot=slot,
        spent=ledger,
        depth=parent.depth + 1,
        breadth=breadth,
        on_late=parent.on_late,
        not_before=not_before,
        due=due,
        trail=steps,
    )


def work_record(started: Invocation, now: float) -> Record:
    """Return the record with which an invocation waits: in a lane, or a job for its site."""
    tenant, run, identity = started.tenant, started.run_id, started.invocation_id
    if started.function == JOB:
        return Record(job_subject(decode(started.payload.body, JobWork).site, tenant, run, identity), encode(started))
    return Record(work_subject(lane(started.due, now), tenant, run, identity), encode(started))


def done_record(outcome: Outcome, fence: int) -> Record:
    """Return the record of an outcome: it counts while nothing newer than ``fence`` is in its family."""
    run, identity = outcome.run_id, outcome.invocation_id
    return Record(done_subject(run, identity), encode(outcome), fence_subject(run, identity), fence)


def run_end(
    invocation: Invocation, tried: Attempted, ledger: TimeLedger, state: RunState, error: ErrorInfo | None
) -> RunEnd:
    """Return the end of the run that ends with this invocation."""
    return RunEnd(
        run_id=invocation.run_id,
        state=state,
        answer_id=invocation.invocation_id if state == "succeeded" else None,
        error=error,
        spent=ledger,
        ended_at=tried.ended_at,
    )


def outcome_of(
    invocation: Invocation,
    tried: Attempted,
    state: InvocationState,
    *,
    result: Payload | None = None,
    answer: Payload | None = None,
    error: ErrorInfo | None = None,
    children: int = 0,
    jobs: int = 0,
    job: JobDone | None = None,
    spent: TimeLedger,
    end: RunEnd | None = None,
) -> Outcome:
    """Return the outcome of an invocation. It fills its slot unless it has children, which take that over.

    Args:
        invocation: what ended.
        tried: its last attempt.
        state: how it ended.
        result: what its body returned, as the log may hold it.
        answer: what it gave as the answer of its run, if anything.
        error: why it did not go well.
        children: how many invocations it starts.
        jobs: how many of these are batch jobs.
        job: how the batch job ended that it was, if it was one.
        spent: the time ledger up to the end of the attempt.
        end: the end of its run, where that ends with it.
    """
    staged_s = spent.stage_in_s - invocation.spent.stage_in_s
    return Outcome(
        run_id=invocation.run_id,
        invocation_id=invocation.invocation_id,
        function=invocation.function,
        version=invocation.version,
        route=invocation.route,
        tenant=invocation.tenant,
        state=state,
        attempts=tried.attempt,
        queued_at=tried.queued_at,
        started_at=tried.started_at,
        ended_at=tried.ended_at,
        worker=tried.worker,
        accepted_at=invocation.accepted_at,
        deadline=invocation.deadline,
        parent_id=invocation.parent_id,
        result=result,
        answer=answer,
        error=error,
        children=children,
        jobs=jobs,
        job=job or (_unrun_job(invocation, state) if invocation.function == JOB else None),
        slot=invocation.slot if children == 0 else None,
        spent=spent,
        end=end,
        size=size_class(invocation.payload.size),
        trail=invocation.trail if state == "succeeded" and (children == 0 or answer is not None) else [],
        due=invocation.due,
        on_late=invocation.on_late,
        fidelity=rungs.fidelity(invocation),
        stage_in_s=staged_s if staged_s >= STAGE_IN_S_MIN else 0.0,
    )


def _unrun_job(invocation: Invocation, state: InvocationState) -> JobDone:
    """Return the end of a job that its site never had."""
    work = decode(invocation.payload.body, JobWork)
    return JobDone(site=work.site, state="canceled" if state == "canceled" else "failed", moves=work.moves)
