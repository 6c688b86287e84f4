"""A run in virtual time, without a platform: what ``headrace.testing`` makes of an event.

Follows the platform's own rules: a follow-up takes over the place of its parent, a map's ``then`` starts when all its
members have ended well, effects of a body that raises are forgotten, and a failed attempt is repeated as often as
``retries`` allows.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from headrace.answers import value_of
from headrace.binding import Binding
from headrace.context import Context, to_payload
from headrace.errors import NotFound, TooLarge, UserError
from headrace.failures import together, told, worth_another_try
from headrace.joblog import JOB
from headrace.jobs import JobEnd, JobSpec, failure
from headrace.model import ErrorInfo, Event, Fidelity
from headrace.names import invocation_id
from headrace.sdk import declaration
from headrace.trace import Job, Step, Trace
from headrace.wire import (
    ITEMS,
    JSON,
    NOTHING,
    Call,
    Effect,
    Emit,
    EventMeta,
    Map,
    Payload,
    Slot,
    Submit,
    SubmitMany,
    encode,
)

STEPS_MAX = 100_000
SITE = "bench"  # where a job runs that names no site
BEGIN = 1_767_225_600.0  # 2026-01-01: when every virtual run is accepted
_FIRST_RETRY_S = 0.2
_RETRY_S_MAX = 30.0


class Stage(Protocol):
    """Where a virtual run finds functions and files."""

    def binding(self, name: str, what: str = "") -> Binding:
        """Return a function by its name."""

    def stage(self, uri: str) -> Path:
        """Return the local file of a URI."""

    def store(self, content: Path | bytes) -> str:
        """Keep the bytes and return their URI."""

    def job(self, spec: JobSpec) -> JobEnd:
        """Return how a batch job ends."""


class _Work(NamedTuple):
    """An invocation that waits; compared by its time and its turn."""

    at_s: float
    turn: int
    invocation_id: str
    parent_id: str | None
    function: str
    payload: Payload
    slot: Slot | None = None
    event: EventMeta | None = None
    job: Submit | None = None


class _Port:
    """What happens at once goes into the step."""

    def __init__(self, stage: Stage, trace: Trace, step: Step) -> None:
        self._stage = stage
        self._trace = trace
        self._step = step

    def say(self, level: str, text: str) -> None:
        """Keep a line of the function's log."""
        self._step.log.append((level, text))

    def progress(self, fraction: float, note: str) -> None:
        """Keep how far the function is."""
        self._step.progress.append((fraction, note))

    def stage(self, uri: str) -> Path:
        """Return the local file of a URI."""
        return self._stage.stage(uri)

    def store(self, content: Path | bytes, name: str) -> str:
        """Keep the bytes under the run's name for them."""
        uri = self._stage.store(content)
        self._trace.stored[name] = self._stage.stage(uri)
        return uri


@dataclass
class _Scope:
    filled: dict[int, Payload] = field(default_factory=dict)
    failed: int = 0
    error: ErrorInfo | None = None


class VirtualRun:
    """One run, from its event to its end; what happens is written into ``trace``."""

    def __init__(self, stage: Stage, trace: Trace, *, cancel_late: bool, rung: int) -> None:
        self._stage = stage
        self._trace = trace
        self._cancel_late = cancel_late
        self._rung = rung
        self._queue: list[_Work] = []
        self._turns = 0
        self._scopes: dict[str, _Scope] = {}

    def run(self, function: str, event: EventMeta, payload: Payload) -> None:
        """Run all there is to run."""
        self._put(0.0, invocation_id(self._trace.run_id, 0), None, function, payload, None, event)
        while self._queue:
            if len(self._trace.steps) == STEPS_MAX:
                raise TooLarge(
                    f"the run has {STEPS_MAX:,} invocations and has not ended",
                    hint="Look for a function that calls itself.",
                )
            self._take(heapq.heappop(self._queue))

    def _put(
        self,
        at_s: float,
        identity: str,
        parent_id: str | None,
        function: str,
        payload: Payload,
        slot: Slot | None,
        event: EventMeta | None = None,
        job: Submit | None = None,
    ) -> None:
        self._turns += 1
        heapq.heappush(self._queue, _Work(at_s, self._turns, identity, parent_id, function, payload, slot, event, job))

    # ------------------------------------------------------------ one invocation

    def _take(self, work: _Work) -> None:
        if work.job is not None:
            self._run_job(work, work.job)
            return
        work, worth = self._on_rung(work)
        step = Step(work.invocation_id, work.parent_id, work.function, _shown(work.payload), work.at_s)
        step.fidelity = worth
        self._trace.steps.append(step)
        self._trace.state = "running"
        late = self._trace.deadline is not None and BEGIN + work.at_s > self._trace.deadline
        if late and self._cancel_late:
            step.state, step.error = "canceled", ErrorInfo(kind="deadline", message="the deadline has passed")
            self._fill(work, work.slot, None, step.error)
            return
        binding = self._stage.binding(work.function)
        declared = declaration(binding.function)
        retries = declared.options.retries if declared and declared.options else 0
        while not self._attempt(work, step, binding):
            if step.attempts > retries or step.exception is None or not worth_another_try(step.exception):
                step.state = "dead"
                self._fill(work, work.slot, None, step.error)
                return
            pause_s = min(_RETRY_S_MAX, _FIRST_RETRY_S * 2.0 ** (step.attempts - 1))
            work = work._replace(at_s=work.at_s + pause_s)

    def _run_job(self, work: _Work, job: Submit) -> None:
        """End a batch job as the bench says, and go on with what follows it."""
        spec = msgspec.json.decode(job.spec.body, type=JobSpec)
        end = self._stage.job(spec)
        end = msgspec.structs.replace(
            end, job_id=end.job_id or work.invocation_id, site=end.site or next(iter(spec.sites), SITE)
        )
        self._trace.jobs.append(Job(work.invocation_id, work.parent_id, spec, end, work.at_s))
        took = end.time_s
        work = work._replace(at_s=work.at_s + took.stage_in + took.queue + took.run + took.stage_out)
        result = to_payload(end)
        completed = end.state == "completed"
        function = job.then if completed else job.on_failure
        if function is not None:
            identity = invocation_id(work.invocation_id, "then" if completed else "failure")
            self._put(work.at_s, identity, work.invocation_id, function, result, work.slot)
        else:
            self._fill(work, work.slot, *((result, None) if completed else (None, failure(end))))

    def _on_rung(self, work: _Work) -> tuple[_Work, Fidelity | None]:
        """Return the work as the variant does it that was asked for, and what that is worth."""
        declared = declaration(self._stage.binding(work.function).function)
        variants = declared.options.variants if declared and declared.options else []
        if not variants:
            return work, None
        level = min(self._rung, len(variants))
        name = [work.function, *variants][level]
        return work._replace(function=name), Fidelity(level=level, function=name, of=1 + len(variants))

    def _attempt(self, work: _Work, step: Step, binding: Binding) -> bool:
        """Call the body once; return whether it went well."""
        step.attempts += 1
        context = Context(
            run_id=self._trace.run_id,
            invocation_id=work.invocation_id,
            attempt=step.attempts,
            deadline=self._trace.deadline,
            port=_Port(self._stage, self._trace, step),
            clock=lambda: BEGIN + work.at_s,
        )
        try:
            result = binding.invoke(type=work.payload.type, body=work.payload.body, event=work.event, context=context)
            for effect in context.effects:
                self._check(effect)
        except (Exception, SystemExit) as error:  # whatever the user's body raises
            step.exception, step.error = error, told(error)
            return False
        step.state, step.error, step.exception = "succeeded", None, None
        step.result, step.effects = value_of(result), context.effects
        if context.answered is not None and not self._trace.answered:
            self._trace.answered, self._trace.answer = True, value_of(context.answered)
        self._commit(work, context.effects, result)
        return True

    def _check(self, effect: Effect) -> None:
        """Refuse an effect that names a function which is not there, before any of the effects counts."""
        for name in _named_by(effect):
            if name is not None:
                try:
                    self._stage.binding(name)
                except NotFound as error:
                    what = type(effect).__struct_config__.tag
                    raise UserError(f"{what}: {error}", hint=error.hint, transient=False) from error

    # ------------------------------------------------------------ what follows from it

    def _commit(self, work: _Work, effects: list[Effect], result: Payload) -> None:
        branches: list[tuple[int, Call | Map | Submit | SubmitMany]] = []
        for position, effect in enumerate(effects):
            if isinstance(effect, Emit):
                self._emit(work, effect, position)
            elif isinstance(effect, Call | Submit) or _members(effect) or effect.then is not None:
                branches.append((position, effect))
        if not branches:
            self._fill(work, work.slot, result, None)
        scope = invocation_id(work.invocation_id, "scope")
        for index, (position, effect) in enumerate(branches):
            slot = work.slot
            if len(branches) > 1:
                slot = Slot(scope=scope, index=index, size=len(branches), parent=work.slot)
            self._start(work, effect, position, slot)

    def _start(self, work: _Work, effect: Call | Map | Submit | SubmitMany, position: int, slot: Slot | None) -> None:
        parent = work.invocation_id
        if isinstance(effect, Submit):
            identity = invocation_id(parent, position)
            self._put(work.at_s, identity, parent, JOB, effect.spec, slot, job=effect)
            return
        if isinstance(effect, Call):
            at_s = work.at_s + effect.delay_s
            self._put(at_s, invocation_id(parent, position), parent, effect.function, effect.payload, slot)
            return
        members = _members(effect)
        if not members and effect.then is not None:
            self._put(work.at_s, invocation_id(parent, position), parent, effect.then, _listed([]), slot)
            return
        scope = invocation_id(parent, f"map-{position}")
        for index, payload in enumerate(members):
            place = Slot(scope=scope, index=index, size=len(members), then=effect.then, parent=slot, opened_by=parent)
            identity = invocation_id(scope, index)
            if isinstance(effect, Map):
                self._put(work.at_s, identity, parent, effect.function, payload, place)
            else:
                job = Submit(spec=payload, on_failure=effect.on_failure)
                self._put(work.at_s, identity, parent, JOB, payload, place, job=job)

    def _emit(self, work: _Work, effect: Emit, position: int) -> None:
        self._trace.emitted.append(
            Event(
                id=f"{work.invocation_id}-{position}",
                source=f"/v1/runs/{self._trace.run_id}",
                type=effect.type,
                datacontenttype=effect.payload.type,
                data=value_of(effect.payload),
                extensions={"correlationid": self._trace.run_id},
            )
        )

    def _fill(self, work: _Work, slot: Slot | None, result: Payload | None, error: ErrorInfo | None) -> None:
        """Fill the place that an invocation ran in; when that ends a scope, go on with what is around it."""
        if slot is None:
            self._end(work, result, error)
            return
        scope = self._scopes.setdefault(slot.scope, _Scope())
        scope.filled[slot.index] = result or NOTHING
        if error is not None:
            scope.failed += 1
            scope.error = scope.error or error
        if len(scope.filled) < slot.size:
            return
        if scope.error is not None:
            error = together(scope.error, scope.failed, slot, work.function, work.invocation_id)
            self._fill(work, slot.parent, None, error)
        elif slot.then is None:
            self._fill(work, slot.parent, result, None)
        else:
            payload = _listed([scope.filled[index] for index in range(slot.size)])
            self._put(work.at_s, invocation_id(slot.scope, "then"), slot.opened_by, slot.then, payload, slot.parent)

    def _end(self, work: _Work, result: Payload | None, error: ErrorInfo | None) -> None:
        trace = self._trace
        trace.ended_s = work.at_s
        trace.error = error
        if error is None:
            trace.state = "succeeded"
            if not trace.answered and result is not None:
                trace.answered, trace.answer = True, value_of(result)
        else:
            trace.state = "canceled" if error.kind == "deadline" else "failed"


def _members(effect: Map | SubmitMany) -> list[Payload]:
    return effect.payloads if isinstance(effect, Map) else effect.specs


def _named_by(effect: Effect) -> tuple[str | None, ...]:
    """Return the functions that an effect names."""
    match effect:
        case Call():
            return (effect.function,)
        case Map():
            return (effect.function, effect.then)
        case Submit() | SubmitMany():
            return (effect.then, effect.on_failure)
        case _:
            return ()


def _listed(results: list[Payload]) -> Payload:
    """Return the results of a scope as the payload of its ``then``."""
    if all(each.type == JSON for each in results):
        return Payload(type=JSON, body=b"[" + b",".join(each.body for each in results) + b"]")
    return Payload(type=ITEMS, body=encode([(each.type, each.body) for each in results]))


def _shown(payload: Payload) -> Any:
    if payload.type != ITEMS:
        return value_of(payload)
    items = msgspec.msgpack.decode(payload.body, type=list[tuple[str, bytes]])
    return [value_of(Payload(type=kind, body=body)) for kind, body in items]
