"""From an outcome to messages: what one finished invocation appends to the log, as one unit.

The work it starts comes first and the outcome last. Should a power cut tear the unit apart, the outcome is missing
rather than the work: the invocation runs again, and whatever it starts twice has the same ids and counts once.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import structs

from functions import jobs, routing, rungs, trail
from functions.admission import admit
from functions.jobs import Jobs
from functions.outcomes import Attempted, World, child, done_record, outcome_of, run_end, spent, work_record
from functions.qos import deadline_of
from headrace.errors import TooLarge, UserError
from headrace.joblog import JOB
from headrace.names import invocation_id
from headrace.wire import (
    NOTHING,
    SPREAD,
    SPREADER,
    Call,
    Effect,
    Emit,
    EventMeta,
    FunctionRecord,
    Invocation,
    Map,
    Outcome,
    Payload,
    Slot,
    Spread,
    Step,
    Submit,
    SubmitMany,
    encode,
)
from streams.log import UNIT_MESSAGES_MAX, Record
from streams.newest import claim
from streams.topology import cancel_subject

BREADTH_MAX = 10**15  # more is as good as endless, and must still fit into the message
MEMBERS_AT_ONCE_MAX = 256
EMPTY_LIST = Payload(body=b"[]", size=2)


def large_maps(effects: Sequence[Effect | Jobs]) -> dict[int, list[Payload]]:
    """Return the payloads of maps and ensembles that do not fit in one unit, by position; they go by claim check."""
    found: dict[int, list[Payload]] = {}
    for i, effect in enumerate(effects):
        if isinstance(effect, Map) and len(effect.payloads) > MEMBERS_AT_ONCE_MAX:
            found[i] = effect.payloads
        elif isinstance(effect, Jobs) and len(effect.works) > MEMBERS_AT_ONCE_MAX:
            found[i] = [jobs.payload_of(work) for work in effect.works]
    return found


def started_by(effects: Sequence[Effect | Jobs]) -> int:
    """Return how many invocations these effects start in their own run, those of large maps included."""
    return sum(_members(effect) for effect in effects)


def _members(effect: Effect | Jobs) -> int:
    match effect:
        case Call() | Submit():
            return 1
        case Map():
            return len(effect.payloads)
        case SubmitMany():
            return len(effect.specs)
        case Jobs():
            return len(effect.works)
        case _:
            return 0


def succeed(
    invocation: Invocation,
    tried: Attempted,
    *,
    result: Payload,
    answer: Payload | None,
    effects: Sequence[Effect | Jobs],
    kept: dict[int, Payload],
    world: World,
) -> tuple[Outcome, list[Record]]:
    """Return the outcome of an invocation that went well, and the unit to append.

    Args:
        invocation: what ran.
        tried: when and where.
        result: what the body returned, as the log may hold it.
        answer: what ``ctx.answer`` was given, if anything.
        effects: what the body asked for, in order; jobs that have no site yet are given one here.
        kept: for each large map or ensemble, by position, its encoded payloads as the log may hold them.
        world: what is registered, and the time.

    Raises:
        UserError: an effect names a function that is not registered, no site can run a job, or the chain is too long.
        TooLarge: the effects do not fit in one unit.
    """
    plan = _Plan(invocation, tried, world, kept)
    if rungs.rescues(invocation):
        rungs.check_only_answers(invocation, effects, answer)
        effects = []
    effects = jobs.placed(effects, invocation, world)
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
        end = run_end(invocation, tried, plan.spent, "succeeded", None)
    outcome = outcome_of(
        invocation,
        tried,
        "succeeded",
        result=result,
        answer=answer,
        children=plan.children,
        jobs=plan.jobs,
        spent=plan.spent,
        end=end,
    )
    plan.records.append(done_record(outcome, tried.fence))
    if len(plan.records) >= UNIT_MESSAGES_MAX:  # what the function said last goes in front of it
        raise TooLarge(
            f"the effects of one invocation start {len(plan.records) - 1} pieces of work at once",
            hint="Use one ctx.map(...) instead of many, or chain.",
        )
    return outcome, plan.records


def spread(
    invocation: Invocation, tried: Attempted, work: Spread, payloads: list[Payload], world: World
) -> list[Record]:
    """Return the unit that starts one part of a large map: its members, then the outcome of the spreading itself."""
    ledger = spent(invocation, tried)
    tenant, deadline = invocation.tenant, invocation.deadline
    records = [
        work_record(
            child(
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
    started = len(records)
    outcome = outcome_of(
        invocation,
        tried,
        "succeeded",
        result=NOTHING,
        children=started,
        jobs=started if work.function == JOB else 0,
        spent=ledger,
    )
    return [*records, done_record(structs.replace(outcome, slot=None), tried.fence)]


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
        self.jobs = 0
        self.breadth = invocation.breadth

    def start_branches(self, effects: Sequence[Effect | Jobs]) -> None:
        """Start all calls, maps and jobs. One branch takes over the slot of its parent; several share a new scope."""
        starting = [
            (i, e)
            for i, e in enumerate(effects)
            if isinstance(e, Call) or (isinstance(e, Map | Jobs) and (_members(e) or e.then is not None))
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
            elif isinstance(effect, Jobs):
                self._submit(effect, position, slot)

    def _call(self, effect: Call, position: int, slot: Slot | None) -> None:
        record = self.world.named(effect.function, "call")
        not_before = self.tried.ended_at + effect.delay_s if effect.delay_s > 0.0 else 0.0
        self._start(
            invocation_id(self.invocation.invocation_id, position),
            record.name,
            record.version,
            effect.payload,
            slot,
            not_before,
        )

    def _map(self, effect: Map, position: int, slot: Slot | None) -> None:
        member = self.world.named(effect.function, "map")
        then = None if effect.then is None else self.world.named(effect.then, "map(then=...)")
        self._together(member.name, member.version, effect.payloads, then, position, slot)

    def _submit(self, effect: Jobs, position: int, slot: Slot | None) -> None:
        payloads = [] if position in self.kept else [jobs.payload_of(work) for work in effect.works]
        self.jobs += len(payloads)
        if effect.together:
            self._together(JOB, "", payloads, effect.then, position, slot, size=len(effect.works))
        else:
            self._start(invocation_id(self.invocation.invocation_id, position), JOB, "", payloads[0], slot)

    def _together(
        self,
        function: str,
        version: str,
        payloads: list[Payload],
        then: FunctionRecord | None,
        position: int,
        around: Slot | None,
        size: int | None = None,
    ) -> None:
        """Start one invocation per payload, which end together; those of a large map are ``size`` and start later."""
        identity = self.invocation.invocation_id
        members = len(payloads) if size is None else size
        if not members and then is not None:
            self._start(invocation_id(identity, position), then.name, then.version, EMPTY_LIST, around)
            return
        scope = invocation_id(identity, f"map-{position}")
        slot = Slot(
            scope=scope,
            index=0,
            size=members,
            then=None if then is None else then.name,
            then_version="" if then is None else then.version,
            parent=around,
            opened_by=identity,
            on_late=self.invocation.on_late,
            depth=self.invocation.depth,
            breadth=min(BREADTH_MAX, self.invocation.breadth * self.branches),
        )
        if position in self.kept:
            self._spread(function, version, slot, self.kept[position])
            return
        for index, payload in enumerate(payloads):
            self._start(invocation_id(scope, index), function, version, payload, structs.replace(slot, index=index))

    def _spread(self, function: str, version: str, slot: Slot, payloads: Payload) -> None:
        """Start the pieces of work that will start the members, each a part of them."""
        for first in range(0, slot.size, MEMBERS_AT_ONCE_MAX):
            work = Spread(
                function=function,
                version=version,
                payloads=payloads,
                slot=slot,
                first=first,
                last=min(slot.size, first + MEMBERS_AT_ONCE_MAX),
            )
            body = encode(work)
            self._append(
                child(
                    self.invocation,
                    self.tried,
                    self.spent,
                    identity=invocation_id(slot.scope, f"spread-{first}"),
                    function=SPREADER,
                    version="",
                    payload=Payload(type=SPREAD, body=body, size=len(body)),
                    slot=None,
                    breadth=self.breadth,
                    due=self._due(function, version),
                    steps=self.steps,
                )
            )

    def _start(
        self,
        identity: str,
        function: str,
        version: str,
        payload: Payload,
        slot: Slot | None,
        not_before: float = 0.0,
    ) -> None:
        self._append(
            child(
                self.invocation,
                self.tried,
                self.spent,
                identity=identity,
                function=function,
                version=version,
                payload=payload,
                slot=slot,
                breadth=self.breadth,
                due=self._due(function, version, payload.size, not_before),
                steps=self.steps,
                not_before=not_before,
            )
        )

    def _append(self, started: Invocation) -> None:
        self.children += 1
        self.records.append(work_record(started, self.world.now))

    def follow(self) -> None:
        """Start the full function after a cheaper variant of it has answered."""
        asked = self.invocation
        assert asked.rung is not None  # noqa: S101 - only on a ladder is there one to follow
        full = child(
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

    def _due(self, function: str, version: str, size: int = 0, not_before: float = 0.0) -> float | None:
        of = self.invocation
        return self.world.due(of.tenant, of.deadline, function, version, size, not_before)
