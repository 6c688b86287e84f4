"""What the simulated functions do: small programs, drawn from the seed, whose right answer can be told beforehand.

A program travels as the payload. ``work`` does what its payload says; ``join`` gets the results of a map and adds them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct

from headrace import wire
from headrace.errors import ChildLost, FunctionError, TimeLimit, UserError
from headrace.jobs import JobEnd, JobSpec
from headrace.model import EventFilter, FunctionOptions, Route
from headrace.names import invocation_id, run_id
from headrace.wire import (
    Call,
    Effect,
    Emit,
    ForecastRow,
    FunctionRecord,
    Invoke,
    Map,
    Payload,
    Returned,
    RouteRecord,
    Submit,
    SubmitMany,
)
from streams.tables import row_key

TENANT, GUEST = "default", "guest"
RETRIES = 3
DEPTH_MAX = 3
EMITTED = "sim.more"
WORK, JOIN = "work", "join"
COLLECT, TOTAL = "collect", "total"  # what follows one batch job, and many
SITE = "lab"
PILOT = "allocation"  # before the other one, where both would do
FULL, HALF, QUICK = "full", "half", "quick"


class Step(Struct, omit_defaults=True):
    """What one effect of a program is: ``call`` one, ``map`` many and perhaps join them, or ``emit`` an event.

    Or ``submit`` one batch job, or ``submit_many``; ``join`` says then that somebody takes care of those that fail.
    """

    kind: str
    programs: list[Program]
    join: bool = False
    delay_s: float = 0.0


class Program(Struct, omit_defaults=True):
    """What one invocation does: work for a while, fail so often or for good, then return its value and its effects.

    ``variants`` are the programs of the variants of its function.
    """

    value: int
    work_s: float = 0.0
    failures: int = 0
    how: str = ""
    steps: list[Step] = []
    answers: bool = False
    variants: list[Program] = []


read = msgspec.json.Decoder(Program).decode
_write = msgspec.json.Encoder().encode


def functions() -> dict[str, FunctionRecord]:
    """Return the functions as they are registered."""
    options = FunctionOptions(timeout="30s", retries=RETRIES)
    return {
        name: FunctionRecord(name=name, version=f"{name}-1", options=options, code_blob=name, registered_at=0.0)
        for name in (WORK, JOIN, COLLECT, TOTAL)
    }


def routes() -> dict[str, RouteRecord]:
    """Return the routes: one to trigger, one that drops what is late, one of which only the newest event counts, one
    for what functions emit; and for a second tenant those of the same names."""
    made = {
        "main": Route(function=WORK),
        "late": Route(function=WORK, deadline="3s", on_late="cancel"),
        "newest": Route(function=WORK, newest_wins=True),
        "more": Route(function=WORK, filter=EventFilter(type=EMITTED), deadline="60s"),
    }
    return {
        row_key(tenant, name): RouteRecord(name=name, tenant=tenant, route=route)
        for tenant in (TENANT, GUEST)
        for name, route in made.items()
    }


def forecasts() -> dict[str, ForecastRow]:
    """Return what is expected of the two functions, where the second is known a little only."""
    long, short = wire.Expected(0.4, 2.5, 4.0, 100), wire.Expected(0.01, 0.05, 0.2, 2)
    return {
        WORK: ForecastRow(function=WORK, kinds={"run|||": short, "rest|||": long}, at=0.0),
        JOIN: ForecastRow(function=JOIN, kinds={f"rest|{JOIN}-1||": short}, at=0.0),
    }


# ---------------------------------------------------------------- drawing them


def draw(rng: random.Random) -> Program:
    """Draw the program of one trigger."""
    program = _draw(rng, 0, wide=True)
    if rng.random() < 0.15:
        _some(rng, program).answers = True
    if rng.random() < 0.12:
        _some(rng, program).how = "permanent"
    return program


def _some(rng: random.Random, program: Program) -> Program:
    """Return the program, or one that it calls."""
    while program.steps and rng.random() < 0.7:
        program = rng.choice(rng.choice(program.steps).programs or [program])
        if rng.random() < 0.3:
            break
    return program


def _draw(rng: random.Random, depth: int, *, wide: bool) -> Program:
    program = Program(value=rng.randrange(1, 1000))
    chance = rng.random()
    if chance < 0.1:
        program.work_s = 0.15 + rng.random()
    elif chance < 0.14:
        program.work_s = 4.0 + 6.0 * rng.random()
    elif chance < 0.6:
        program.work_s = 0.02 * rng.random()
    if rng.random() < 0.2:
        program.failures = rng.randrange(1, RETRIES + 1)
        program.how = rng.choice(("user", "lost", "timeout"))
    if depth < DEPTH_MAX and rng.random() < (0.7, 0.45, 0.25)[depth]:
        chance = rng.random()
        branches = rng.randrange(2, 4) if wide and chance < 0.25 else 1
        program.steps = [_draw_step(rng, depth, wide=wide) for _ in range(branches)]
    if rng.random() < 0.08:
        program.steps.append(Step(kind="emit", programs=[_draw(rng, DEPTH_MAX - 1, wide=False)]))
    return program


def _draw_step(rng: random.Random, depth: int, *, wide: bool) -> Step:
    if rng.random() < 0.5:
        delay_s = 0.5 * rng.random() if rng.random() < 0.2 else 0.0
        return Step(kind="call", programs=[_draw(rng, depth + 1, wide=wide)], delay_s=delay_s)
    join = not wide or rng.random() < 0.7
    size = rng.randrange(1, 5) if rng.random() < 0.95 else 0
    # What a member of a joined map returns must not depend on which of its branches ends last.
    return Step(kind="map", programs=[_draw(rng, depth + 1, wide=not join) for _ in range(size)], join=join)


# ---------------------------------------------------------------- running them


def payload(program: Program) -> Payload:
    """Return a program as a payload."""
    body = _write(program)
    return Payload(body=body, size=len(body))


def _program(function: str, body: bytes) -> Program:
    program = read(body)
    return program.variants[(HALF, QUICK).index(function)] if function in (HALF, QUICK) else program


def fails(function: str, body: bytes, attempt: int) -> tuple[float, FunctionError | None]:
    """Return how long an attempt takes, in seconds, and how it fails, if it does."""
    if function in (COLLECT, TOTAL):
        return 0.001, None
    if function == JOIN:
        total = sum(msgspec.json.decode(body))
        return 0.001 * (total % 7), UserError("not yet") if total % 5 == 0 and attempt == 1 else None
    program = _program(function, body)
    if program.how == "permanent":
        return program.work_s, UserError("never", transient=False)
    if attempt > program.failures:
        return program.work_s, None
    kinds: dict[str, Callable[[], FunctionError]] = {
        "user": lambda: UserError("not yet"),
        "lost": lambda: ChildLost("killed"),
        "timeout": lambda: TimeLimit("too long"),
    }
    return program.work_s, kinds[program.how]()


def returns(function: str, body: bytes) -> Returned:
    """Return what a successful attempt returns."""
    if function == COLLECT:
        return Returned(result=_value(_code(msgspec.json.decode(body))))
    if function == TOTAL:
        return Returned(result=_value(sum(_code(each) for each in msgspec.json.decode(body))))
    if function == JOIN:
        values: list[int] = msgspec.json.decode(body)
        effects: list[Effect] = []
        if sum(values) % 11 == 0:
            effects = [Call(function=WORK, payload=payload(Program(value=sum(values) + 1)))]
        return Returned(result=_value(sum(values)), effects=effects)
    program = _program(function, body)
    return Returned(
        result=_value(program.value),
        effects=[_effect(step) for step in program.steps],
        answer=_value(-program.value) if program.answers else None,
    )


def _code(end: Any) -> int:
    """Return the exit code of a job's end, or what was made of it."""
    return end if isinstance(end, int) else msgspec.convert(end, JobEnd).exit_code or 0


def _spec(job: Program) -> Payload:
    spec = JobSpec(executable="job", arguments=[_write(job).decode()], sites=[SITE, PILOT], retries=RETRIES + 1)
    body = msgspec.json.encode(spec)
    return Payload(body=body, size=len(body))


def _effect(step: Step) -> Effect:
    care = COLLECT if step.join else None
    if step.kind == "submit":
        return Submit(spec=_spec(step.programs[0]), then=COLLECT, on_failure=care)
    if step.kind == "submit_many":
        return SubmitMany(specs=[_spec(job) for job in step.programs], then=TOTAL, on_failure=care)
    if step.kind == "call":
        return Call(function=WORK, payload=payload(step.programs[0]), delay_s=step.delay_s)
    if step.kind == "map":
        return Map(function=WORK, payloads=[payload(p) for p in step.programs], then=JOIN if step.join else None)
    return Emit(type=EMITTED, payload=payload(step.programs[0]))


def _value(value: int) -> Payload:
    body = str(value).encode()
    return Payload(body=body, size=len(body))


def perform(invoke: Invoke) -> tuple[float, Returned | FunctionError]:
    """Return how long an attempt takes, in seconds, and how it ends."""
    took_s, error = fails(invoke.function, invoke.body, invoke.attempt)
    return took_s, error or returns(invoke.function, invoke.body)


# ---------------------------------------------------------------- what is right


class Expected(Struct):
    """What has to come of a run where nothing is canceled, and where its functions are given enough attempts.

    ``answer`` is None where it depends on which of several branches ends last.
    """

    invocations: set[str]
    fails: bool = False
    answer: int | None = None
    answers: list[int] = []
    emits: dict[str, Program] = {}


def expect(run: str, program: Program) -> Expected:
    """Work out what has to come of a run."""
    expected = Expected(set(), answers=[], emits={})
    value = _expect(expected, invocation_id(run, 0), program)
    expected.fails = value is _FAILED
    expected.answer = value if isinstance(value, int) else None
    if expected.answers:
        expected.answer = expected.answers[0] if len(expected.answers) == 1 else None
    return expected


_FAILED: Any = object()
_EITHER: Any = object()


def _expect(into: Expected, identity: str, program: Program) -> Any:
    """Add an invocation and all that follows; return the value that fills its slot."""
    into.invocations.add(identity)
    if program.how == "permanent":
        return _FAILED
    if program.answers:
        into.answers.append(-program.value)
    run = into
    values = []
    for position, step in enumerate(program.steps):
        if step.kind == "emit":
            run.emits[f"{identity}-{position}"] = step.programs[0]
        elif step.kind == "submit":
            values.append(_expect_job(into, invocation_id(identity, position), step.programs[0], step, follow=True))
        elif step.kind == "submit_many":
            values.append(_expect_jobs(into, identity, position, step))
        elif step.kind == "call":
            values.append(_expect(into, invocation_id(identity, position), step.programs[0]))
        elif step.programs:
            values.append(_expect_map(into, identity, position, step))
        elif step.join:
            values.append(_expect_join(into, invocation_id(identity, position), []))
    if not values:
        return program.value
    if any(v is _FAILED for v in values):
        return _FAILED
    return values[0] if len(values) == 1 else _EITHER


def _expect_job(into: Expected, identity: str, job: Program, step: Step, *, follow: bool) -> Any:
    """Add a job and what follows it; ``follow`` says that something does also where it completes."""
    into.invocations.add(identity)
    if job.how == "permanent":
        if not step.join:
            return _FAILED
        into.invocations.add(invocation_id(identity, "failure"))
    elif follow:
        into.invocations.add(invocation_id(identity, "then"))
    return job.value


def _expect_jobs(into: Expected, identity: str, position: int, step: Step) -> Any:
    scope = invocation_id(identity, f"map-{position}")
    if not step.programs:
        into.invocations.add(invocation_id(identity, position))
        return 0
    results = [
        _expect_job(into, invocation_id(scope, i), job, step, follow=False) for i, job in enumerate(step.programs)
    ]
    if any(result is _FAILED for result in results):
        return _FAILED
    into.invocations.add(invocation_id(scope, "then"))
    return sum(results)


def _expect_map(into: Expected, identity: str, position: int, step: Step) -> Any:
    scope = invocation_id(identity, f"map-{position}")
    results = [_expect(into, invocation_id(scope, i), member) for i, member in enumerate(step.programs)]
    if any(r is _FAILED for r in results):
        return _FAILED
    if not step.join:
        return results[0] if len(results) == 1 else _EITHER
    return _expect_join(into, invocation_id(scope, "then"), results)


def _expect_join(into: Expected, identity: str, results: list[int]) -> Any:
    into.invocations.add(identity)
    total = sum(results)
    if total % 11 == 0:
        into.invocations.add(invocation_id(identity, 0))
        return total + 1
    return total


def emitted_run(tenant: str, run: str, event_id: str) -> str:
    """Return the id of the run that an event starts which a tenant's run emitted."""
    return run_id(tenant, f"/v1/runs/{run}", event_id, "more")
