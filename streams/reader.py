"""Reading the read model: runs, lists of them, and what was given up on.

What the keys hold is told in ``streams.ledger``, which writes them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

import msgspec
import redis.exceptions
from redis.asyncio import Redis

from headrace.errors import BadRequest, Unavailable
from headrace.model import Audit, RunPage, RunView
from headrace.wire import decode
from streams.ledger import (
    AUDIT,
    DEAD_RUNS,
    POSITION,
    WHOLE,
    dead_key,
    dead_left_key,
    open_key,
    route_key,
    run_key,
    runs_key,
    state_key,
)
from streams.record import InvocationRecord, RunRecord, view

PAGE_MAX = 1000
SCAN_MAX = 20_000

T = TypeVar("T")


class Dead(NamedTuple):
    """An invocation that was given up on, and its run."""

    run: RunRecord
    invocation: InvocationRecord


class DeadFound(NamedTuple):
    """A page of dead invocations, newest first, and the cursor of the next one, None at the end."""

    dead: list[Dead]
    next: str | None


class Reader:
    """Reads what the writer wrote.

    Every method raises ``Unavailable`` while Redis is away, and those that tell of many runs while it is built anew.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis

    async def position(self) -> int:
        """Return the sequence of the log up to which this read model is true."""
        return int(await _answered(self._redis.get(POSITION)) or 0)

    async def record(self, run: str) -> RunRecord | None:
        """Return the state of a run without its invocations."""
        raw = await _answered(self._redis.hget(run_key(run), "r"))
        return None if raw is None else decode(raw, RunRecord)

    async def run(self, run: str) -> RunView | None:
        """Return a run with its invocations, or None where it is not known here."""
        raw = await _answered(self._redis.hgetall(run_key(run)))
        if b"r" not in raw:
            return None
        invocations = [decode(v, InvocationRecord) for k, v in raw.items() if k != b"r"]
        return view(decode(raw[b"r"], RunRecord), invocations)

    async def open_runs(self, tenant: str, route: str) -> int:
        """Return how many runs of a tenant's route have not ended."""
        whole, number = await _answered(
            self._redis.pipeline(transaction=True).exists(WHOLE).zcard(open_key(tenant, route)).execute()
        )
        if not whole:
            raise _rebuilding()
        return int(number)

    async def page(
        self,
        tenant: str,
        *,
        state: str | None = None,
        route: str | None = None,
        since: float | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> RunPage:
        """Return runs, newest first, without their invocations.

        Args:
            tenant: whose runs.
            state: only runs in this state.
            route: only runs of this route.
            since: only runs accepted at or after this instant.
            limit: at most so many, 1 to 1,000.
            cursor: the ``next`` of the page before.

        Raises:
            BadRequest: the limit or the cursor is not possible.
        """

        def wanted(record: RunRecord) -> bool:
            return (
                (not route or record.route == route)
                and (not state or record.state == state)
                and (since is None or record.accepted_at >= since)
            )

        index = state_key(tenant, state) if state else route_key(tenant, route) if route else runs_key(tenant)
        found, following = await self._scan(index, self._load_runs, wanted, limit, cursor)
        return RunPage(runs=[view(r, []) for r in found], next=following)

    async def dead(
        self,
        tenant: str,
        *,
        function: str | None = None,
        route: str | None = None,
        since: float | None = None,
        replayed: bool = False,
        limit: int = 100,
        cursor: str | None = None,
    ) -> DeadFound:
        """Return invocations that were given up on, newest first.

        Args:
            tenant: whose invocations.
            function: only those of this function.
            route: only those in runs of this route.
            since: only those given up on at or after this instant.
            replayed: those in runs that were replayed too.
            limit: at most so many, 1 to 1,000.
            cursor: the ``next`` of the page before.

        Raises:
            BadRequest: the limit or the cursor is not possible.
        """

        def wanted(one: Dead) -> bool:
            return (
                (not function or one.invocation.function == function)
                and (not route or one.run.route == route)
                and (since is None or (one.invocation.ended_at or 0.0) >= since)
            )

        index = dead_key(tenant) if replayed else dead_left_key(tenant)
        return DeadFound(*await self._scan(index, self._load_dead, wanted, limit, cursor))

    async def run_of_dead(self, invocation: str) -> str | None:
        """Return the run of an invocation that was given up on, None where it is not known here."""
        run = await _answered(self._redis.hget(DEAD_RUNS, invocation))
        return None if run is None else str(run.decode())

    async def audit(self) -> Audit | None:
        """Return what the auditor found last, None before its first round."""
        raw = await _answered(self._redis.hgetall(AUDIT))
        fields = {name.decode(): msgspec.json.decode(value) for name, value in raw.items()}
        return msgspec.convert(fields, Audit) if fields else None

    async def _scan(
        self,
        index: str,
        load: Callable[[list[bytes]], Awaitable[list[T | None]]],
        wanted: Callable[[T], bool],
        limit: int,
        cursor: str | None,
    ) -> tuple[list[T], str | None]:
        """Return what is wanted of an index, newest first, and the cursor of what follows."""
        if not 1 <= limit <= PAGE_MAX:
            raise BadRequest(f"limit: {limit} is not possible", hint=f"Use 1 to {PAGE_MAX}.")
        before = _cursor(cursor)
        generation = await self._generation()
        found: list[T] = []
        count, scanned, more = max(limit, 100), 0, True
        while len(found) < limit and more and scanned < SCAN_MAX:
            newest = "+inf" if before is None else f"({before}"
            members = await _answered(
                self._redis.zrevrangebyscore(index, newest, "-inf", start=0, num=count, withscores=True)
            )
            rows = await load([member for member, _ in members])
            more = len(members) == count
            scanned += len(members)
            for number, ((_, score), row) in enumerate(zip(members, rows, strict=True), 1):
                before = int(score)
                if row is not None and wanted(row):
                    found.append(row)
                    if len(found) == limit:
                        more = more or number < len(members)
                        break
        if await self._generation() != generation:
            raise _rebuilding()  # it was wiped in the midst of this
        return found, str(before) if more and before else None

    async def _generation(self) -> bytes:
        """Return the token of the read model as it stands; one that is built anew has none until it is whole."""
        token: bytes | None = await _answered(self._redis.get(WHOLE))
        if token is None:
            raise _rebuilding()
        return token

    async def _load_runs(self, runs: list[bytes]) -> list[RunRecord | None]:
        pipe = self._redis.pipeline(transaction=False)
        for run in runs:
            pipe.hget(b"hr:run:" + run, "r")
        return [None if raw is None else decode(raw, RunRecord) for raw in await _answered(pipe.execute())]

    async def _load_dead(self, members: list[bytes]) -> list[Dead | None]:
        pipe = self._redis.pipeline(transaction=False)
        for member in members:
            run, _, identity = member.partition(b".")
            pipe.hmget(b"hr:run:" + run, "r", b"i:" + identity)
        return [
            Dead(decode(run, RunRecord), decode(invocation, InvocationRecord)) if run and invocation else None
            for run, invocation in await _answered(pipe.execute())
        ]


async def _answered(answer: Awaitable[Any]) -> Any:
    """Return what Redis answers.

    Raises:
        Unavailable: it does not.
    """
    try:
        return await answer
    except (redis.exceptions.RedisError, OSError) as error:
        raise Unavailable(
            "the read model does not answer", hint="Triggers are still accepted; read again in a moment."
        ) from error


def _cursor(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 19:
        raise BadRequest(f"cursor: {ascii(text)[:80]} is not one of ours", hint="Pass on `next` of the page before.")
    return int(text)


def _rebuilding() -> Unavailable:
    return Unavailable(
        "the read model is being built anew from the log",
        hint="Triggers are still accepted, and single runs can be read; ask again in a moment.",
    )
