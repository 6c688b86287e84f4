"""The facts of a run folded into its state: pure, and the same for the read model, the gateway and the tests.

Facts arrive in the order of the log. Each is applied once; what is final stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import msgspec
from msgspec import Struct, structs

from headrace.clock import format_instant, maybe_instant
from headrace.joblog import JOB, Held, JobWork, Submitted
from headrace.model import (
    FINAL,
    AnswerLinks,
    AnswerView,
    ErrorInfo,
    EventView,
    Fidelity,
    InvocationState,
    InvocationView,
    JobMove,
    JobState,
    JobView,
    Links,
    Quote,
    ReplayView,
    RunState,
    RunView,
    TimeLedger,
)
from headrace.wire import (
    Attempt,
    Cancel,
    Invocation,
    JobDone,
    Mark,
    Move,
    Outcome,
    Replay,
    Replayed,
    RunEnd,
    Started,
    decode,
)
from streams.stored import Stored
from streams.topology import kind_of

INVOCATIONS_SHOWN_MAX = 1000

_log = logging.getLogger(__name__)


class Answered(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One of several answers of a run, and the instant at which it was there; ``explicit`` is as in ``RunRecord``."""

    invocation_id: str
    fidelity: Fidelity
    at: float
    explicit: bool = False


class RunRecord(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known of a run; instants in epoch seconds. ``seq`` is the last fact that changed it.

    ``answer_id`` names the invocation whose outcome holds the answer, ``explicit`` says that it was given with
    ``ctx.answer``. ``dead`` counts invocations that were given up on, ``dead_id`` is the first. ``replays`` is what it
    gives another go, and ``replayed_as`` the run that gave it another go.

    ``invocations`` counts all, and ``jobs`` those among them that are batch jobs.

    ``fidelity`` is that of the answer, and ``answers`` holds all there were, where functions have variants; when it was
    answered, and where the time went, are told of the first. ``coarsest`` is the worst of what the answer is made of.
    """

    run_id: str
    route: str
    function: str
    tenant: str
    event: EventView
    state: RunState
    accepted_at: float
    seq: int
    first_seq: int
    deadline: float | None = None
    quote: Quote | None = None
    answered_at: float | None = None
    ended_at: float | None = None
    answer_id: str | None = None
    explicit: bool = False
    spent: TimeLedger = TimeLedger()
    error: ErrorInfo | None = None
    invocations: int = 1
    jobs: int = 0
    dead: int = 0
    dead_id: str | None = None
    replays: Replayed | None = None
    replayed_as: str | None = None
    thread: list[str] = []
    mark: Mark | None = None
    fidelity: Fidelity | None = None
    answers: list[Answered] = []
    coarsest: Fidelity | None = None

    @property
    def ended(self) -> bool:
        """Whether the state is final."""
        return self.state in FINAL

    @property
    def superseded_by(self) -> str | None:
        """The run of the next later event of its thread, where that is not retracted."""
        return self.mark.run_id if self.mark is not None and self.mark.kind == "superseded" else None

    @property
    def retracted_by(self) -> str | None:
        """The run of the event that took the thread of this one back."""
        return self.mark.run_id if self.mark is not None and self.mark.kind == "retracted" else None

    @property
    def improving(self) -> bool:
        """Whether there is an answer, and a better one may come yet."""
        return _level(self.fidelity) > 0 and self.answered_at is not None and not self.ended

    @property
    def deadline_met(self) -> bool | None:
        """Whether the answer was there in time; None while that is open, and without a deadline."""
        if self.deadline is None:
            return None
        if self.answered_at is not None:
            return self.answered_at <= self.deadline
        return False if self.ended else None


class JobRecord(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known of an invocation that is a batch job beside what is known of any; instants in epoch seconds."""

    site: str
    state: JobState = "new"
    native_id: str | None = None
    submitted_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    exit_code: int | None = None
    reason: str = ""
    why: str = ""
    moves: list[Move] = []


class InvocationRecord(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known of an invocation; instants in epoch seconds. ``job`` is set where it is a batch job."""

    invocation_id: str
    function: str
    version: str
    state: InvocationState
    seq: int
    parent_id: str | None = None
    attempts: int = 0
    queued_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    worker: str | None = None
    error: ErrorInfo | None = None
    job: JobRecord | None = None


Fact = Invocation | Outcome | RunEnd | Started | Attempt | Cancel | Replay | Submitted | Held
_KINDS: dict[str, type[Fact]] = {
    "work": Invocation,
    "job": Invocation,
    "submit": Submitted,
    "held": Held,
    "done": Outcome,
    "end": RunEnd,
    "start": Started,
    "try": Attempt,
    "cancel": Cancel,
    "replay": Replay,
}


def fact_of(stored: Stored) -> Fact | None:
    """Return the fact that a message of the log holds, or None for one that does not change a run's state.

    One that cannot be read, damaged or of a release to come, is passed over: it must not hold up all that follows.
    """
    kind = _KINDS.get(kind_of(stored.subject))
    if kind is None:
        return None
    try:
        return decode(stored.body, kind)
    except msgspec.MsgspecError:
        _log.warning("message %d on %s cannot be read and is passed over", stored.seq, stored.subject)
        return None


def apply(record: RunRecord | None, fact: Fact, stored: Stored) -> RunRecord | None:
    """Return the run after one more fact. Without its first invocation a run is unknown and stays None."""
    if record is None:
        return _begin(fact, stored) if isinstance(fact, Invocation) and fact.parent_id is None else None
    if isinstance(fact, Replay):  # it comes after the end, and does not change how the run ended
        return structs.replace(record, replayed_as=fact.by)
    if isinstance(fact, Cancel) and fact.by is not None:  # it marks what has ended too
        return _marked(record, fact.by, stored)
    if stored.seq <= record.seq or record.ended:
        return record
    match fact:
        case Started() | Attempt():
            return structs.replace(record, state="running", seq=stored.seq)
        case Outcome():
            return _outcome(record, fact, stored)
        case RunEnd():
            return _end(record, fact, stored)
        case Invocation(rung=rung) if rung is not None and rung.role == "rescue":
            # No outcome counts it among its children.
            return structs.replace(record, seq=stored.seq, invocations=record.invocations + 1)
        case Cancel():
            return structs.replace(
                record,
                state="canceled",
                ended_at=stored.at,
                seq=stored.seq,
                error=ErrorInfo(kind="canceled", message=fact.reason or "the run was canceled"),
            )
        case _:
            return record


def _begin(first: Invocation, stored: Stored) -> RunRecord:
    event = first.event
    return RunRecord(
        run_id=first.run_id,
        route=first.route,
        function=first.function,
        tenant=first.tenant,
        event=EventView(id="", source="", type="")
        if event is None
        else EventView(id=event.id, source=event.source, type=event.type, subject=event.subject, time=event.time),
        state="accepted",
        accepted_at=first.accepted_at,
        deadline=first.deadline,
        quote=first.quote,
        seq=stored.seq,
        first_seq=stored.seq,
        replays=first.replays,
        thread=[place.key for place in first.places],
    )


def _outcome(record: RunRecord, done: Outcome, stored: Stored) -> RunRecord:
    record = structs.replace(
        record,
        state="running",
        seq=stored.seq,
        invocations=record.invocations + done.children,
        jobs=record.jobs + done.jobs,
    )
    if done.answer is not None:
        spent = _with_commit(done.spent, done.ended_at, stored.at)
        answer = (done.invocation_id, done.fidelity, stored.at)
        record = _answered(record, *answer, spent=spent, explicit=True)
    elif done.state == "succeeded" and done.end is None and _level(done.fidelity) > _level(record.coarsest):
        record = structs.replace(record, coarsest=done.fidelity)
    if done.state == "dead":
        record = structs.replace(record, dead=record.dead + 1, dead_id=record.dead_id or done.invocation_id)
    if done.error is not None and record.error is None and done.error.kind != "answered":
        record = structs.replace(record, error=done.error)
    return record if done.end is None else _end(record, done.end, stored, done.fidelity)


def _end(record: RunRecord, end: RunEnd, stored: Stored, fidelity: Fidelity | None = None) -> RunRecord:
    # Who has an answer of a cheaper variant has an answer; then the error says why there is no better one.
    state = "succeeded" if end.state == "failed" and record.improving else end.state
    error = end.error if state == "succeeded" or end.error is not None else record.error
    record = structs.replace(record, state=state, ended_at=stored.at, seq=stored.seq, error=error)
    spent = _with_commit(end.spent, end.ended_at, stored.at)
    if end.state == "succeeded" and end.answer_id is not None:
        return _answered(record, end.answer_id, fidelity, stored.at, spent=spent, explicit=False)
    return record if record.answered_at is not None else structs.replace(record, spent=spent)


def _answered(
    record: RunRecord, identity: str, fidelity: Fidelity | None, at: float, *, spent: TimeLedger, explicit: bool
) -> RunRecord:
    """Return the run after one more answer: the first one counts, unless a better one takes its place."""
    if _level(record.coarsest) > _level(fidelity):
        fidelity = record.coarsest
    if record.answered_at is None:
        record = structs.replace(record, answered_at=at, spent=spent)
    elif _level(fidelity) >= _level(record.fidelity) or any(each.invocation_id == identity for each in record.answers):
        return record
    elif fidelity is None and record.fidelity is not None:  # the end of a chain, which the full function began
        fidelity = Fidelity(level=0, function=record.function, of=record.fidelity.of)
    answers = record.answers
    if fidelity is not None:
        answers = [*answers, Answered(invocation_id=identity, fidelity=fidelity, at=at, explicit=explicit)]
    return structs.replace(record, answer_id=identity, explicit=explicit, fidelity=fidelity, answers=answers)


def _level(fidelity: Fidelity | None) -> int:
    return 0 if fidelity is None else fidelity.level


def _marked(record: RunRecord, by: Mark, stored: Stored) -> RunRecord:
    """Return the run with the mark that counts; the order in which marks come in does not matter."""
    if record.mark is not None and not _outweighs(by, record.mark):
        return record
    record = structs.replace(record, mark=by, seq=max(record.seq, stored.seq))
    if record.ended and (record.error is None or record.error.kind not in ("superseded", "retracted")):
        return record
    error = ErrorInfo(kind=by.kind, message=f"the run was {by.kind} by the run {by.run_id}")
    ended_at = record.ended_at if record.ended else stored.at
    return structs.replace(record, state="canceled", ended_at=ended_at, error=error)


def _outweighs(new: Mark, old: Mark) -> bool:
    """Say which of two marks of a run counts: of retractions the last, before all else; else the next in rank."""
    if new.kind != old.kind:
        return new.kind == "retracted"
    if new.kind == "retracted":
        return (new.rank, new.run_id) > (old.rank, old.run_id)
    return (new.rank, new.run_id) < (old.rank, old.run_id)


def _with_commit(spent: TimeLedger, ended_at: float, stored_at: float) -> TimeLedger:
    return structs.replace(spent, commit_s=spent.commit_s + max(0.0, stored_at - ended_at))


def apply_invocation(known: InvocationRecord | None, fact: Fact, stored: Stored) -> InvocationRecord | None:
    """Return the invocation after one more fact of it; an outcome tells all by itself."""
    match fact:
        case Submitted():
            return _submitted(known, fact, stored)
        case Held():
            return _held(known, fact)
        case Invocation(function=function) if function == JOB:
            return _waiting(known, fact, stored)
        case Invocation():
            return known or InvocationRecord(
                invocation_id=fact.invocation_id,
                parent_id=fact.parent_id,
                function=fact.function,
                version=fact.version,
                state="queued",
                queued_at=stored.at,
                seq=stored.seq,
            )
        case Outcome():
            return InvocationRecord(
                invocation_id=fact.invocation_id,
                parent_id=fact.parent_id,
                function=fact.function,
                version=fact.version,
                state=fact.state,
                attempts=fact.attempts,
                queued_at=fact.queued_at,
                started_at=fact.started_at,
                ended_at=fact.ended_at,
                worker=fact.worker,
                error=fact.error,
                seq=stored.seq,
                job=None if fact.job is None else _ended_job(fact.job),
            )
        case Started() | Attempt():
            if known is not None and known.state in FINAL:
                return known
            failed = isinstance(fact, Attempt)
            return InvocationRecord(
                invocation_id=fact.invocation_id,
                parent_id=fact.parent_id,
                function=fact.function,
                version=fact.version,
                state="queued" if failed else "running",
                attempts=fact.attempt,
                queued_at=fact.queued_at,
                started_at=fact.started_at,
                worker=fact.worker,
                error=fact.error if isinstance(fact, Attempt) else None,
                seq=stored.seq,
                job=None if known is None or known.job is None else _moved_on(known.job, fact),
            )
        case _:
            return known


def _waiting(known: InvocationRecord | None, job: Invocation, stored: Stored) -> InvocationRecord:
    """Return a job that waits for its site; one that waits again stands in the log behind its first submission."""
    moves = moves_of(job)
    if known is not None and (known.state in FINAL or not moves):
        return structs.replace(known, parent_id=job.parent_id, queued_at=known.queued_at or stored.at)
    site = stored.subject.split(".")[2]
    if known is not None:
        reason = "" if known.job is None else known.job.reason
        moved = JobRecord(site=site, reason=reason, moves=moves)
        return structs.replace(known, state="queued", worker=None, started_at=None, seq=stored.seq, job=moved)
    return InvocationRecord(
        invocation_id=job.invocation_id,
        parent_id=job.parent_id,
        function=job.function,
        version=job.version,
        state="queued",
        queued_at=stored.at,
        seq=stored.seq,
        job=JobRecord(site=site, moves=moves),
    )


def moves_of(fact: Fact) -> list[Move]:
    """Return where a job was before that a fact says to wait; none for any other fact."""
    if not isinstance(fact, Invocation) or fact.function != JOB:
        return []
    try:
        return decode(fact.payload.body, JobWork).moves
    except msgspec.MsgspecError:
        return []  # its site cannot read it either, and says so


def _submitted(known: InvocationRecord | None, fact: Submitted, stored: Stored) -> InvocationRecord:
    if known is not None and known.state in FINAL:
        return known
    moves = [] if known is None or known.job is None else known.job.moves
    job = JobRecord(site=fact.site, state="queued", native_id=fact.native_id, submitted_at=fact.at, moves=moves)
    before = known or InvocationRecord(
        invocation_id=fact.invocation_id, function=JOB, version="", state="queued", seq=stored.seq
    )
    return structs.replace(before, state="queued", attempts=fact.attempt, worker=fact.agent, seq=stored.seq, job=job)


def _held(known: InvocationRecord | None, fact: Held) -> InvocationRecord | None:
    """Return a job with why it is not submitted yet; what comes late, of another agent or site, tells nothing."""
    if known is None or known.state in FINAL or (known.job is not None and known.job.native_id is not None):
        return known
    job = known.job or JobRecord(site=fact.site)
    return known if job.site != fact.site else structs.replace(known, job=structs.replace(job, why=fact.why))


def _moved_on(job: JobRecord, fact: Started | Attempt) -> JobRecord:
    """Return a job that began to run, or whose attempt failed and which waits for the next one."""
    if isinstance(fact, Attempt):
        return JobRecord(site=job.site, reason=fact.error.kind, moves=job.moves)
    return structs.replace(job, state="active", started_at=fact.started_at)


def _ended_job(done: JobDone) -> JobRecord:
    return JobRecord(
        site=done.site,
        state=done.state,
        native_id=done.native_id,
        submitted_at=done.submitted_at,
        started_at=done.started_at,
        ended_at=done.ended_at,
        exit_code=done.exit_code,
        reason=done.reason,
        moves=done.moves,
    )


def fold_run(facts: Iterable[Stored]) -> tuple[RunRecord, list[InvocationRecord]] | None:
    """Fold the facts of one run, in the order of the log. None if its first invocation is not among them."""
    record: RunRecord | None = None
    invocations: dict[str, InvocationRecord] = {}
    for stored in facts:
        fact = fact_of(stored)
        if fact is None:
            continue
        record = apply(record, fact, stored)
        identity = getattr(fact, "invocation_id", None)
        if identity is not None:
            changed = apply_invocation(invocations.get(identity), fact, stored)
            if changed is not None:
                invocations[identity] = changed
    return None if record is None else (record, list(invocations.values()))


def view(record: RunRecord, invocations: Iterable[InvocationRecord]) -> RunView:
    """Return a run as the outside sees it, with its first 1,000 invocations and jobs in the order they were queued."""
    ordered = sorted(invocations, key=lambda i: (i.queued_at or 0.0, i.seq))
    shown = [i for i in ordered if i.job is None][:INVOCATIONS_SHOWN_MAX]
    jobs = [(i, i.job) for i in ordered if i.job is not None][:INVOCATIONS_SHOWN_MAX]
    answered = record.answered_at
    return RunView(
        run_id=record.run_id,
        route=record.route,
        function=record.function,
        tenant=record.tenant,
        event=record.event,
        state=record.state,
        deadline=maybe_instant(record.deadline),
        deadline_met=record.deadline_met,
        accepted_at=format_instant(record.accepted_at),
        answered_at=maybe_instant(answered),
        ended_at=maybe_instant(record.ended_at),
        time_to_solution_s=None if answered is None else max(0.0, answered - record.accepted_at),
        time_ledger=record.spent,
        quote=record.quote or Quote(),
        invocations=[_shown(i, record) for i in shown],
        invocations_total=record.invocations - record.jobs,
        jobs=[_shown_job(i, job, record) for i, job in jobs],
        jobs_total=record.jobs,
        error=record.error,
        links=Links(
            self=f"/v1/runs/{record.run_id}",
            result=f"/v1/runs/{record.run_id}/result",
            events=f"/v1/runs/{record.run_id}/events",
        ),
        replay_of=None
        if record.replays is None
        else ReplayView(run_id=record.replays.run_id, invocation_id=record.replays.invocation_id),
        replayed_as=record.replayed_as,
        thread=record.thread,
        superseded_by=record.superseded_by,
        retracted_by=record.retracted_by,
        fidelity=record.fidelity,
        answers=[_answer_view(record, position) for position in range(len(record.answers))],
    )


def _answer_view(record: RunRecord, position: int) -> AnswerView:
    one = record.answers[position]
    before = record.answers[position - 1] if position > 0 else None
    after = record.answers[position + 1] if position + 1 < len(record.answers) else None
    return AnswerView(
        invocation_id=one.invocation_id,
        fidelity=one.fidelity,
        answered_at=format_instant(one.at),
        in_time=None if record.deadline is None else one.at <= record.deadline,
        links=AnswerLinks(
            self=answer_url(record.run_id, one),
            predecessor_version=None if before is None else answer_url(record.run_id, before),
            successor_version=None if after is None else answer_url(record.run_id, after),
        ),
    )


def answer_url(run_id: str, one: Answered) -> str:
    """Return where one of several answers of a run is read, whatever comes later."""
    return f"/v1/runs/{run_id}/result?level={one.fidelity.level}"


def _shown_job(one: InvocationRecord, job: JobRecord, record: RunRecord) -> JobView:
    # A site that has a job still may take a moment to end it; nobody needs it any more.
    needless = record.state in ("canceled", "succeeded") and one.state not in FINAL
    return JobView(
        job_id=one.invocation_id,
        site=job.site,
        native_id=job.native_id,
        state="canceled" if needless else job.state,
        submitted_at=maybe_instant(job.submitted_at),
        started_at=maybe_instant(job.started_at),
        ended_at=maybe_instant(job.ended_at),
        exit_code=job.exit_code,
        reason=job.reason,
        why=job.why,
        parent_id=one.parent_id,
        error=one.error,
        moves=[JobMove(at=format_instant(move.at), site=move.site, why=move.why) for move in job.moves],
    )


def _shown(one: InvocationRecord, record: RunRecord) -> InvocationView:
    state: InvocationState = one.state
    if record.state in ("canceled", "succeeded") and state not in FINAL:
        state = "canceled"  # nobody needs it any more
    return InvocationView(
        invocation_id=one.invocation_id,
        parent_id=one.parent_id,
        function=one.function,
        version=one.version,
        state=state,
        attempts=one.attempts,
        queued_at=maybe_instant(one.queued_at),
        started_at=maybe_instant(one.started_at),
        ended_at=maybe_instant(one.ended_at),
        worker=one.worker,
        error=one.error,
    )
