"""Short ways to say in a test what an instrument, a gateway and a worker put into the log."""

from __future__ import annotations

from collections.abc import Iterable

from functions.admission import UNKNOWN, Admitted, admit, body_digest
from functions.effects import succeed
from functions.lessons import Lessons
from functions.outcomes import Attempted, World, fail
from headrace.model import ErrorInfo, FunctionOptions, Quote, Route
from headrace.wire import Effect, EventMeta, FunctionRecord, Invocation, Payload, RouteRecord, decode
from streams.log import Record
from streams.record import RunRecord, apply, fact_of
from streams.stored import Stored


def function(name: str = "f", **options: object) -> FunctionRecord:
    return FunctionRecord(
        name=name,
        version="v1",
        options=FunctionOptions(**options),  # type: ignore[arg-type] # the test names real options
        code_blob="0" * 64,
        registered_at=0.0,
    )


def route(name: str = "f", **fields: object) -> RouteRecord:
    return RouteRecord(name=name, tenant="default", route=Route(**{"function": "f", **fields}))  # type: ignore[arg-type]


def trigger(
    event_id: str,
    *,
    now: float = 1000.0,
    deadline: float | None = None,
    body: bytes = b"1",
    tenant: str = "default",
    quote: Quote = UNKNOWN,
    **fields: object,
) -> Admitted:
    """Admit an event on the route ``f``, which has these fields."""
    return admit(
        event=EventMeta(id=event_id, source="/test", type="org.test"),
        payload=Payload(body=body, size=len(body)),
        digest=body_digest("application/json", body),
        route=route("f", **fields),
        function=function(),
        tenant=tenant,
        now=now,
        deadline=deadline,
        quote=quote,
    )


def tried(at: float = 1001.0, attempt: int = 1) -> Attempted:
    return Attempted(attempt=attempt, worker="w", queued_at=at, started_at=at + 1, ended_at=at + 3)


def success(invocation: Invocation, *asked: Effect, at: float = 1001.0, result: bytes = b"42") -> list[Record]:
    known = {name: function(name) for name in ("f", "g", "join")}
    return succeed(
        invocation,
        tried(at),
        result=Payload(body=result, size=len(result)),
        answer=None,
        effects=list(asked),
        kept={},
        world=World(function=known.get, routes=[], now=at + 3),
    )[1]


def failure(invocation: Invocation, message: str = "broken") -> list[Record]:
    return fail(invocation, tried(), ErrorInfo(kind="user", message=message))[1]


def stored(records: list[Record], first_seq: int = 1, at: float = 1004.5) -> list[Stored]:
    """Return the records as the log would give them back."""
    return [Stored(first_seq + i, r.subject, r.body, at) for i, r in enumerate(records)]


def children(records: list[Record]) -> list[Invocation]:
    return [decode(r.body, Invocation) for r in records if r.subject.startswith("hr.work.")]


def teach(lessons: Lessons, facts: Iterable[Stored], runs: dict[str, RunRecord] | None = None) -> None:
    """Let these messages of the log teach, in their order; ``runs`` is what was known before, and grows."""
    runs = {} if runs is None else runs
    for one in facts:
        fact = fact_of(one)
        if fact is not None:
            before = runs.get(fact.run_id)
            after = apply(before, fact, one)
            lessons.learn(fact, one, before, after)
            if after is not None:
                runs[fact.run_id] = after
