"""The read model: the log folded into Redis, so that a list of runs costs no search through the log.

Redis holds nothing that matters. The writer keeps its position in the log beside the data and moves both in one
script; when Redis comes back empty, or with an older state, it finds another position there than it left and
begins again from it.

    hr:position       sequence of the log up to which everything here is true
    hr:run:<id>       hash: ``r`` the run, ``i:<invocation>`` its invocations
    hr:runs           all runs by the sequence of their acceptance; hr:route:<route> and hr:state:<state> likewise
    hr:open:<route>   runs of a route that have not ended
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import redis.exceptions
from redis.asyncio import Redis

from headrace.errors import BadRequest, Unavailable
from headrace.model import RunPage, RunView
from headrace.wire import Invocation, decode, encode
from streams.follow import follow
from streams.log import Log
from streams.record import InvocationRecord, RunRecord, apply, apply_invocation, fact_of, view
from streams.stored import Stored

_log = logging.getLogger(__name__)

FACTS = ["hr.work.>", "hr.done.>", "hr.end.>", "hr.start.>", "hr.try.>", "hr.cancel.>"]
POSITION = "hr:position"
RUNS = "hr:runs"
RECORDS_CACHED_MAX = 20_000
WINDOW = 2048
RETRY_S = 0.5
LINGER_S = 0.02
TRIM_AT_ONCE = 500
TRIM_AT_MOST = 5000
PAGE_MAX = 1000
SCAN_MAX = 20_000


# One round trip and one answer per batch, where a transaction of the client library has one answer per command.
# ARGV: the position this writer left, the new one, then for each command its number of words and the words.
WRITE = """
local there = tonumber(redis.call('GET', KEYS[1]) or '0')
if there ~= tonumber(ARGV[1]) then return there end
local at = 3
while at <= #ARGV do
  local words = tonumber(ARGV[at])
  redis.call(unpack(ARGV, at + 1, at + words))
  at = at + words + 1
end
redis.call('SET', KEYS[1], ARGV[2])
return there
"""


def _run_key(run: str) -> str:
    return f"hr:run:{run}"


class _Moved(Exception):
    """Redis is at another position than this writer left it at: it was wiped, replaced, or has another writer."""


class Writer:
    """Follows the log into Redis. One is at work at a time; a second one notices and starts over behind the first."""

    def __init__(self, log: Log, redis: Redis, *, runs_max: int = 100_000) -> None:
        self._log = log
        self._redis: Any = redis  # redis-py's types cannot tell that answers are bytes here
        self._runs_max = runs_max
        self._cache: OrderedDict[str, RunRecord] = OrderedDict()
        self._position = 0
        self._ended = 0
        self._script_hash: str | None = None

    async def run(self) -> None:
        """Follow for ever; while Redis is away nothing is lost, it is caught up with later."""
        while True:
            try:
                await self._follow()
            except _Moved as moved:
                _log.warning("the read model is at another position (%s); reading the log from there", moved)
            except (redis.exceptions.RedisError, OSError, Unavailable) as error:
                _log.warning("the read model cannot be written: %s", error)
                await asyncio.sleep(RETRY_S)

    async def _follow(self) -> None:
        self._cache.clear()
        self._script_hash = None
        self._position = int(await self._redis.get(POSITION) or 0)
        async with aclosing(follow(self._log, FACTS, after=self._position, window=WINDOW)) as batches:
            async for batch in batches:
                if batch:
                    await self.step(batch)
                    # A transaction costs the same for one fact and for hundreds: let some gather. Who reads in the
                    # meantime is told from the log.
                    await asyncio.sleep(LINGER_S)
                elif int(await self._redis.get(POSITION) or 0) != self._position:
                    raise _Moved("it changed while nothing happened")

    async def step(self, batch: Sequence[Stored]) -> None:
        """Fold a batch of facts and write what changed, together with the new position."""
        facts = [(fact, stored) for stored in batch if (fact := fact_of(stored)) is not None]
        begun = {fact.run_id for fact, _ in facts if isinstance(fact, Invocation) and fact.parent_id is None}
        before = await self._records({fact.run_id for fact, _ in facts} - begun)
        now: dict[str, RunRecord] = {}
        invocations: dict[tuple[str, str], InvocationRecord] = {}
        for fact, stored in facts:
            known = now.get(fact.run_id, before.get(fact.run_id))
            record = apply(known, fact, stored)
            if record is None:
                continue  # its beginning is older than the log keeps: nothing to show
            now[fact.run_id] = record
            identity = getattr(fact, "invocation_id", None)
            if identity is not None:
                key = (fact.run_id, identity)
                changed = apply_invocation(invocations.get(key), fact, stored)
                if changed is not None:
                    invocations[key] = changed
        await self._write(before, now, invocations, batch[-1].seq)

    async def _records(self, runs: set[str]) -> dict[str, RunRecord]:
        """Return the known records of these runs, from the cache or from Redis."""
        found = {run: self._cache[run] for run in runs if run in self._cache}
        missing = [run for run in runs if run not in found]
        if missing and self._position:
            pipe = self._redis.pipeline(transaction=False)
            for run in missing:
                pipe.hget(_run_key(run), "r")
            for run, raw in zip(missing, await pipe.execute(), strict=True):
                if raw is not None:
                    found[run] = decode(raw, RunRecord)
        return found

    async def _write(
        self,
        before: dict[str, RunRecord],
        now: dict[str, RunRecord],
        invocations: dict[tuple[str, str], InvocationRecord],
        position: int,
    ) -> None:
        fields: dict[str, list[Any]] = {run: ["r", encode(record)] for run, record in now.items()}
        for (run, identity), one in invocations.items():
            fields[run] += ("i:" + identity, encode(one))
        commands: list[list[Any]] = [["HSET", _run_key(run), *values] for run, values in fields.items()]
        commands += _index(before, now)
        flat: list[Any] = [self._position, position]
        for command in commands:
            flat.append(len(command))
            flat += command
        there = int(await self._redis.evalsha(await self._script(), 1, POSITION, *flat))
        if there != self._position:
            raise _Moved(f"{there} instead of {self._position}")
        self._position = position
        for run, record in now.items():
            self._cache[run] = record
            self._cache.move_to_end(run)
            self._ended += record.ended
        while len(self._cache) > RECORDS_CACHED_MAX:
            self._cache.popitem(last=False)
        await self._trim()

    async def _script(self) -> str:
        """Return the hash of the script; a Redis that was started anew is given it again."""
        if self._script_hash is None:
            self._script_hash = str(await self._redis.script_load(WRITE))
        return self._script_hash

    async def _trim(self) -> None:
        """Forget the oldest ended runs beyond the limit; the log still has them."""
        if self._ended < TRIM_AT_ONCE:
            return
        self._ended = 0
        surplus = int(await self._redis.zcard(RUNS)) - self._runs_max
        if surplus <= 0:
            return
        oldest = [r.decode() for r in await self._redis.zrange(RUNS, 0, min(surplus, TRIM_AT_MOST) - 1)]
        records = await self._records(set(oldest))
        pipe = self._redis.pipeline(transaction=True)
        for run in oldest:
            record = records.get(run)
            if record is not None and record.ended:
                pipe.delete(_run_key(run))
                pipe.zrem(RUNS, run)
                pipe.zrem(f"hr:route:{record.route}", run)
                pipe.zrem(f"hr:state:{record.state}", run)
                self._cache.pop(run, None)
        await pipe.execute()


def _index(before: dict[str, RunRecord], now: dict[str, RunRecord]) -> list[list[Any]]:
    """Return the commands that keep the sorted sets true for the changed runs."""
    added: dict[str, list[Any]] = {}
    removed: dict[str, list[Any]] = {}
    for run, record in now.items():
        known, place = before.get(run), (record.first_seq, run)
        if known is None:
            for key in (RUNS, f"hr:route:{record.route}"):
                added.setdefault(key, []).extend(place)
        if record.ended:
            if known is not None and not known.ended:
                removed.setdefault(f"hr:open:{record.route}", []).append(run)
        elif known is None:
            added.setdefault(f"hr:open:{record.route}", []).extend(place)
        if known is None or known.state != record.state:
            if known is not None:
                removed.setdefault(f"hr:state:{known.state}", []).append(run)
            added.setdefault(f"hr:state:{record.state}", []).extend(place)
    commands = [["ZREM", key, *members] for key, members in removed.items()]
    return commands + [["ZADD", key, *places] for key, places in added.items()]


class Reader:
    """Reads what the writer wrote. Every method raises ``Unavailable`` while Redis is away."""

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis

    async def position(self) -> int:
        """Return the sequence of the log up to which this read model is true."""
        try:
            return int(await self._redis.get(POSITION) or 0)
        except (redis.exceptions.RedisError, OSError) as error:
            raise _away() from error

    async def record(self, run: str) -> RunRecord | None:
        """Return the state of a run without its invocations."""
        try:
            raw = await self._redis.hget(_run_key(run), "r")
        except (redis.exceptions.RedisError, OSError) as error:
            raise _away() from error
        return None if raw is None else decode(raw, RunRecord)

    async def run(self, run: str) -> RunView | None:
        """Return a run with its invocations, or None where it is not known here."""
        try:
            raw = await self._redis.hgetall(_run_key(run))
        except (redis.exceptions.RedisError, OSError) as error:
            raise _away() from error
        if b"r" not in raw:
            return None
        invocations = [decode(v, InvocationRecord) for k, v in raw.items() if k != b"r"]
        return view(decode(raw[b"r"], RunRecord), invocations)

    async def open_runs(self, route: str) -> int:
        """Return how many runs of a route have not ended."""
        try:
            return int(await self._redis.zcard(f"hr:open:{route}"))
        except (redis.exceptions.RedisError, OSError) as error:
            raise _away() from error

    async def page(
        self,
        *,
        state: str | None = None,
        route: str | None = None,
        since: float | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> RunPage:
        """Return runs, newest first, without their invocations.

        Args:
            state: only runs in this state.
            route: only runs of this route.
            since: only runs accepted at or after this instant.
            limit: at most so many, 1 to 1,000.
            cursor: the ``next`` of the page before.

        Raises:
            BadRequest: the limit or the cursor is not possible.
        """
        if not 1 <= limit <= PAGE_MAX:
            raise BadRequest(f"limit: {limit} is not possible", hint=f"Use 1 to {PAGE_MAX}.")
        before = _cursor(cursor)
        index = f"hr:state:{state}" if state else f"hr:route:{route}" if route else RUNS
        found: list[RunRecord] = []
        scanned = 0
        more = True
        while len(found) < limit and more and scanned < SCAN_MAX:
            records = await self._newest(index, before, max(limit, 100))
            more = len(records) == max(limit, 100)
            scanned += len(records)
            for seq, record in records:
                before = seq
                if record is None or (route and record.route != route) or (state and record.state != state):
                    continue
                if since is not None and record.accepted_at < since:
                    continue
                found.append(record)
                if len(found) == limit:
                    more = more or record is not records[-1][1]
                    break
        return RunPage(runs=[view(r, []) for r in found], next=str(before) if more and before else None)

    async def _newest(self, index: str, before: int | None, count: int) -> list[tuple[int, RunRecord | None]]:
        try:
            members = await self._redis.zrevrangebyscore(
                index, "+inf" if before is None else f"({before}", "-inf", start=0, num=count, withscores=True
            )
            pipe = self._redis.pipeline(transaction=False)
            for run, _ in members:
                pipe.hget(b"hr:run:" + run, "r")
            raws = await pipe.execute()
        except (redis.exceptions.RedisError, OSError) as error:
            raise _away() from error
        return [
            (int(score), None if raw is None else decode(raw, RunRecord))
            for (_, score), raw in zip(members, raws, strict=True)
        ]


def _cursor(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 19:
        raise BadRequest(f"cursor: {ascii(text)[:80]} is not one of ours", hint="Pass on `next` of the page before.")
    return int(text)


def _away() -> Unavailable:
    return Unavailable("the read model does not answer", hint="Triggers are still accepted; read again in a moment.")
