"""From an outcome to messages: what one finished invocation appends to the log, as one unit.

The work it starts comes first and the outcome last. Should a power cut tear the unit apart, the outcome is missing
rather than the work: the invocation runs again, and whatever it starts twice has the same ids and counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from msgspec import Struct, structs

from functions import routing, rungs, trail
from functions.admission import admit
from functions.forecast import size_class
from functions.outlook import NOTHING_KNOWN, Outlook
from functions.qos import deadline_of, lane
from headrace.errors import TooLarge, UserError
from headrace.model import ErrorInfo, InvocationState, RunState, TimeLedger
from headrace.names import invocation_id
from headrace.wire import (
    NOTHING,
    SPREAD,
    SPREADER,
    Attempt,
    Call,
    Effect,
    Emit,
    EventMeta,
    FunctionRecord,
    Invocation,
    Map,
    Outcome,
    Payload,
    RouteRecord,
    RunEnd,
    Slot,
    Spread,
    Step,
    encode,
)
from streams.log import UNIT_MESSAGES_MAX, Record
from streams.newest import claim
from streams.tables import row_key
from streams.topology import attempt_subject, cancel_subject, done_subject, fence_subject, work_subject

DEPTH_MAX = 1000
BREADTH_MAX = 10**15  # more is as good as endless, and must still fit into the message
MEMBERS_AT_ONCE_MAX = 256
EMPTY_LIST = Payload(body=b"[]", size=2)


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
    """What an outcome is committed against: the functions and routes as registered at this moment, and the time.

    ``depth_max`` is how long a chain may get, ``outlook`` what is expected of what follows.
    """

    function: Callable[[str], FunctionRecord | None]
    routes: Iterable[RouteRecord]
    now: float
    depth_max: int = DEPTH_MAX
    outlook: Outlook = NOTHING_KNOWN

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


def large_maps(effects: list[Effect]) -> dict[int, list[Payload]]:
    """Return the payloads of the maps that do not fit in one unit, by position; they travel by claim check."""
    return {
        i: e.payloads for i, e in enumerate(effects) if isinstance(e, Map) and len(e.payloads) > MEMBERS_AT_ONCE_MAX
    }


def started_by(effects: list[Effect]) -> int:
    """Return how many invocations these effects start in their own run, those of large maps included."""
    return sum(1 if isinstance(e, Call) else len(e.payloads) if isinstance(e, Map) else 0 for e in effects)


def succeed(
    invocation: Invocation,
    tried: Attempted,
    *,
    result: Payload,
    answer: Payload | None,
    effects: list[Effect],
    kept: dict[int, Payload],
    world: World,
) -> tuple[Outcome, list[Record]]:
    """Return the outcome of an invocation that went well, and the unit to append.

    Args:
        invocation: what ran.
        tried: when and where.
        result: what the body returned, as the log may hold it.
        answer: what ``ctx.answer`` was given, if anything.
        effects: what the body asked for, in order.
        kept: for each large map, by position, its encoded payloads as the log may hold them.
        world: what is registered, and the time.

    Raises:
        UserError: an effect names a function that is not registered, or the chain is too long.
        TooLarge: the effects do not fit in one unit.
    """
    plan = _Plan(invocation, tried, world, kept)
    if rungs.rescues(invocation):
        effects = rungs.only_an_answer(invocation, effects, answer)
    if answer is None:  # what follows an answer teaches nothing of the way to it
        plan.steps = trail.onward(invocation, tried.started_at, tried.ended_at, started_by(effects))
    plan.start_branches(effects)
    for position, effect in enumerate(effects):
        if isinstance(effect, Emit):
            plan.emit(effect, position)
    end = None
    if plan.branches == 0 and rungs.answers_early(invocation):
        answer = answer or result
        if not rungs.rescues(invocation):
            plan.follow()
    elif plan.branches == 0 and invocation.slot is None:
        end = _end(invocation, tried, plan.spent, "succeeded", None)
    outcome = _outcome(
        invocation, tried, "succeeded", result=result, answer=answer, children=plan.children, spent=plan.spent, end=end
    )
    plan.records.append(_done(outcome, tried.fence))
    if len(plan.records) >= UNIT_MESSAGES_MAX:  # what the function said last goes in front of it
        raise TooLarge(
            f"the effects of one invocation start {len(plan.records) - 1} pieces of work at once",
            hint="Use one ctx.map(...) instead of many, or chain.",
        )
    return outcome, plan.records


def fail(
    invocation: Invocation, tried: Attempted, error: ErrorInfo, state: InvocationState = "dead"
) -> tuple[Outcome, list[Record]]:
    """Return the outcome of an invocation that is given up on, and the unit to append."""
    ledger = spent(invocation, tried)
    ending: RunState = "canceled" if state == "canceled" else "failed"
    # On a ladder another one may answer yet, or has answered: who ends the run then has to look.
    ends = invocation.slot is None and invocation.rung is None
    end = _end(invocation, tried, ledger, ending, error) if ends else None
    outcome = _outcome(invocation, tried, state, error=error, spent=ledger, end=end)
    return outcome, [_done(outcome, tried.fence)]


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


def unreadable(subject: str, worker: str, queued_at: float, now: float) -> tuple[Outcome, list[Record]]:
    """Return the outcome of work whose message cannot be read: its subject tells whose it is, and its run ends."""
    _, _, _, tenant, run, identity = subject.split(".")
    error = ErrorInfo(
        kind="unreadable", message="the message of this invocation is damaged, or of another release of the platform"
    )
    outcome = Outcome(
        run_id=run,
        invocation_id=identity,
        function="",
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
    )
    return outcome, [_done(outcome, 0)]


def spread(
    invocation: Invocation, tried: Attempted, work: Spread, payloads: list[Payload], world: World
) -> list[Record]:
    """Return the unit that starts one part of a large map: its members, then the outcome of the spreading itself."""
    ledger = spent(invocation, tried)
    tenant, deadline = invocation.tenant, invocation.deadline
    records = [
        _work(
            _child(
                invocation,
                tried,
                ledger,
                identity=invocation_id(work.slot.scope, index),
                function=work.function,
                version=work.version,
                payload=payloads[index],
                slot=structs.replace(work.slot, index=index),
                breadth=invocation.breadth,
                parent_id=work.slot.opened_by,
                due=world.due(tenant, deadline, work.function, work.version, payloads[index].size),
                steps=invocation.trail,
            ),
            world.now,
        )
        for index in range(work.first, work.last)
    ]
    outcome = _outcome(invocation, tried, "succeeded", result=NOTHING, children=len(records), spent=ledger)
    return [*records, _done(structs.replace(outcome, slot=None), tried.fence)]


class _Plan:
    """The unit of one successful invocation while it is being put together."""

    def __init__(self, invocation: Invocation, tried: Attempted, world: World, kept: dict[int, Payload]) -> None:
        self.invocation = invocation
        self.tried = tried
        self.world = world
        self.kept = kept
        self.spent = spent(invocation, tried)
        self.records: list[Record] = []
        self.steps: list[Step] = []
        self.branches = 0
        self.children = 0
        self.breadth = invocation.breadth

    def start_branches(self, effects: list[Effect]) -> None:
        """Start all calls and maps. One branch takes over the slot of its parent; several share a new scope."""
        starting = [
            (i, e)
            for i, e in enumerate(effects)
            if isinstance(e, Call) or (isinstance(e, Map) and (e.payloads or e.then is not None))
        ]
        self.branches = len(starting)
        if starting and self.invocation.depth >= self.world.depth_max:
            raise UserError(
                f"the chain is {self.world.depth_max:,} calls long (HEADRACE_CHAIN_DEPTH_MAX)",
                hint="A function that calls itself needs an end; start a new run with ctx.emit(...) for endless work.",
                transient=False,
            )
        self.breadth = min(BREADTH_MAX, self.invocation.breadth * max(1, started_by(effects)))
        around = self.invocation.slot
        scope = invocation_id(self.invocation.invocation_id, "scope") if len(starting) > 1 else ""
        for index, (position, effect) in enumerate(starting):
            slot = around
            if len(starting) > 1:
                slot = Slot(
                    scope=scope,
                    index=index,
                    size=len(starting),
                    parent=around,
                    opened_by=self.invocation.invocation_id,
                    on_late=self.invocation.on_late,
                    depth=self.invocation.depth,
                    breadth=self.invocation.breadth,
                )
            if isinstance(effect, Call):
                self._call(effect, position, slot)
            elif isinstance(effect, Map):
                self._map(effect, position, slot)

    def _call(self, effect: Call, position: int, slot: Slot | None) -> None:
        record = self._function(effect.function, "call")
        self._start(
            invocation_id(self.invocation.invocation_id, position), record, effect.payload, slot, delay_s=effect.delay_s
        )

    def _map(self, effect: Map, position: int, around: Slot | None) -> None:
        member = self._function(effect.function, "map")
        then = None if effect.then is None else self._function(effect.then, "map(then=...)")
        if not effect.payloads and then is not None:
            self._start(invocation_id(self.invocation.invocation_id, position), then, EMPTY_LIST, around)
            return
        scope = invocation_id(self.invocation.invocation_id, f"map-{position}")
        slot = Slot(
            scope=scope,
            index=0,
            size=len(effect.payloads),
            then=None if then is None else then.name,
            then_version="" if then is None else then.version,
            parent=around,
            opened_by=self.invocation.invocation_id,
            on_late=self.invocation.on_late,
            depth=self.invocation.depth,
            breadth=min(BREADTH_MAX, self.invocation.breadth * self.branches),
        )
        if position in self.kept:
            self._spread(member, slot, self.kept[position])
            return
        for index, payload in enumerate(effect.payloads):
            self._start(invocation_id(scope, index), member, payload, structs.replace(slot, index=index))

    def _spread(self, member: FunctionRecord, slot: Slot, payloads: Payload) -> None:
        """Start the pieces of work that will start the members, each a part of them."""
        for first in range(0, slot.size, MEMBERS_AT_ONCE_MAX):
            work = Spread(
                function=member.name,
                version=member.version,
                payloads=payloads,
                slot=slot,
                first=first,
                last=min(slot.size, first + MEMBERS_AT_ONCE_MAX),
            )
            body = encode(work)
            self._append(
                _child(
                    self.invocation,
                    self.tried,
                    self.spent,
                    identity=invocation_id(slot.scope, f"spread-{first}"),
                    function=SPREADER,
                    version="",
                    payload=Payload(type=SPREAD, body=body, size=len(body)),
                    slot=None,
                    breadth=self.breadth,
                    due=self._due(member),
                    steps=self.steps,
                )
            )

    def _start(
        self, identity: str, record: FunctionRecord, payload: Payload, slot: Slot | None, delay_s: float = 0.0
    ) -> None:
        not_before = self.tried.ended_at + delay_s if delay_s > 0.0 else 0.0
        child = _child(
            self.invocation,
            self.tried,
            self.spent,
            identity=identity,
            function=record.name,
            version=record.version,
            payload=payload,
            slot=slot,
            breadth=self.breadth,
            due=self._due(record, payload.size, not_before),
            steps=self.steps,
            not_before=not_before,
        )
        self._append(child)

    def _append(self, child: Invocation) -> None:
        self.children += 1
        self.records.append(_work(child, self.world.now))

    def follow(self) -> None:
        """Start the full function after a cheaper variant of it has answered."""
        asked = self.invocation
        assert asked.rung is not None  # noqa: S101 - only on a ladder is there one to follow
        full = _child(
            asked,
            self.tried,
            self.spent,
            identity=rungs.full_id(asked.invocation_id),
            function=asked.rung.full,
            version=asked.rung.full_version,
            payload=asked.payload,
            slot=None,
            breadth=asked.breadth,
            due=None,  # nothing presses it any more
            steps=[],
        )
        self._append(structs.replace(full, **rungs.of_full(asked)))

    def emit(self, effect: Emit, position: int) -> None:
        """Start a run on every route that takes the event; its id follows from this invocation."""
        event = EventMeta(
            id=f"{self.invocation.invocation_id}-{position}",
            source=f"/v1/runs/{self.invocation.run_id}",
            type=effect.type,
            subject=effect.subject,
            extensions={"correlationid": self.invocation.run_id},
        )
        for route in routing.matching(self.world.routes, event, self.invocation.tenant):
            function = self.world.function(route.route.function)
            if function is None:  # its function was never registered: a route cannot be kept without one
                continue
            deadline = deadline_of(route.route, None, self.world.now)
            admitted = admit(
                event=event,
                payload=effect.payload,
                digest="",
                route=route,
                function=function,
                tenant=self.invocation.tenant,
                now=self.world.now,
                deadline=deadline,
                due=self.world.due(
                    self.invocation.tenant, deadline, function.name, function.version, effect.payload.size
                ),
            )
            # The outcome's guard covers the unit, and a repeat finds the same id in the log. What a canceled run
            # starts in itself is never run; but a run of its own would be, so its cancel guards it.
            guarded = any(record.absent is not None for record in self.records)
            canceled = None if guarded else cancel_subject(self.invocation.run_id, "*")
            self.records.append(Record(admitted.record.subject, admitted.record.body, canceled))
            self.records += claim(admitted.invocation)

    def _due(self, follow_up: FunctionRecord, size: int = 0, not_before: float = 0.0) -> float | None:
        of = self.invocation
        return self.world.due(of.tenant, of.deadline, follow_up.name, follow_up.version, size, not_before)

    def _function(self, name: str, what: str) -> FunctionRecord:
        record = self.world.function(name)
        if record is None:
            raise UserError(
                f"{what}: no function named {name} is registered",
                hint=f"Deploy the file that defines {name}, then trigger again.",
                transient=False,
            )
        return record


def _child(
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


def _work(child: Invocation, now: float) -> Record:
    subject = work_subject(lane(child.due, now), child.tenant, child.run_id, child.invocation_id)
    return Record(subject, encode(child))


def _done(outcome: Outcome, fence: int) -> Record:
    run, identity = outcome.run_id, outcome.invocation_id
    return Record(done_subject(run, identity), encode(outcome), fence_subject(run, identity), fence)


def _end(
    invocation: Invocation, tried: Attempted, ledger: TimeLedger, state: RunState, error: ErrorInfo | None
) -> RunEnd:
    return RunEnd(
        run_id=invocation.run_id,
        state=state,
        answer_id=invocation.invocation_id if state == "succeeded" else None,
        error=error,
        spent=ledger,
        ended_at=tried.ended_at,
    )


def _outcome(
    invocation: Invocation,
    tried: Attempted,
    state: InvocationState,
    *,
    result: Payload | None = None,
    answer: Payload | None = None,
    error: ErrorInfo | None = None,
    children: int = 0,
    spent: TimeLedger,
    end: RunEnd | None = None,
) -> Outcome:
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
        slot=invocation.slot if children == 0 else None,
        spent=spent,
        end=end,
        size=size_class(invocation.payload.size),
        trail=invocation.trail if state == "succeeded" and (children == 0 or answer is not None) else [],
        due=invocation.due,
        on_late=invocation.on_late,
        fidelity=rungs.fidelity(invocation),
    )
