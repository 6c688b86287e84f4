"""The read model: the log folded into Redis, so that a list of runs costs no search through the log.

Redis holds nothing that matters. The writer keeps its position in the log beside the data and moves both in one
script; when Redis comes back empty, or with an older state, it finds another position there than it left and
begins again from it. Until it has caught up, lists are refused: half a list is a wrong one.

    hr:position       sequence of the log up to which everything here is true
    hr:layout         which of the keys below there are; another layout is thrown away and built anew
    hr:whole          a token, there once all that was in the log when the writer began is here
    hr:run:<id>       hash: ``r`` the run, ``i:<invocation>`` its invocations
    hr:runs           all runs by the sequence of their acceptance; hr:route:<route> and hr:state:<state> likewise
    hr:open           runs that have not ended, likewise; hr:open:<route> those of a route
    hr:totals         hash: ``accepted`` and ``ended``, how many runs did so since the beginning of the log
    hr:dead           ``<run>.<invocation>`` of all that were given up on, by the sequence of their outcome
    hr:dead:left      those among them whose run was not replayed
    hr:dead:runs      hash: the run of each of them, by invocation
    hr:audit          hash: what the auditor found last, each field as JSON
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

import msgspec
import redis.exceptions
from redis.asyncio import Redis

from headrace.errors import BadRequest, Unavailable
from headrace.model import Audit, RunPage, RunView
from headrace.wire import Attempt, Replay, Started, decode, encode
from streams.follow import follow
from streams.log import Log
from streams.record import Fact, InvocationRecord, RunRecord, apply, apply_invocation, fact_of, view
from streams.stored import Stored

_log = logging.getLogger(__name__)

FACTS = ["hr.work.>", "hr.done.>", "hr.end.>", "hr.start.>", "hr.try.>", "hr.cancel.>", "hr.replay.>", "hr.thread.>"]
POSITION = "hr:position"
LAYOUT = "hr:layout"
LAYOUT_NOW = "2"
WHOLE = "hr:whole"
RUNS = "hr:runs"
OPEN = "hr:open"
TOTALS = "hr:totals"
DEAD = "hr:dead"
DEAD_LEFT = "hr:dead:left"
DEAD_RUNS = "hr:dead:runs"
AUDIT = "hr:audit"
RECORDS_CACHED_MAX = 20_000
WINDOW = 2048
RETRY_S = 0.5
LINGER_S = 0.02
TRIM_AT_ONCE = 500
TRIM_AT_MOST = 5000
PAGE_MAX = 1000
SCAN_MAX = 20_000
WORDS_MAX = 2000  # of one command: the script's stack holds 8,000

T = TypeVar("T")
Command = list[Any]


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

# ARGV: keys of hashes, each with a field of it. One command for a thousand, where the client library would pack a
# thousand.
READ = """
local found = {}
for n = 1, #ARGV, 2 do found[(n + 1) / 2] = redis.call('HGET', ARGV[n], ARGV[n + 1]) end
return found
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
        self._whole_at: int | None = None  # where everything is here that was in the log at the beginning; None: it is
        self._ended = 0
        self._scripts: dict[str, str] = {}

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
        await self._begin()
        async with aclosing(follow(self._log, FACTS, after=self._position, window=WINDOW)) as batches:
            async for batch in batches:
                if batch:
                    await self.step(batch)
                    # A transaction costs the same for one fact and for hundreds: let some gather. Who reads in the
                    # meantime is told from the log.
                    if len(batch) < WINDOW // 4:
                        await asyncio.sleep(LINGER_S)
                elif (there := await self._redis.get(POSITION)) is None or int(there) != self._position:
                    raise _Moved("it changed while nothing happened")

    async def _begin(self) -> None:
        """Find the place to go on from, and see how far it is behind."""
        self._cache.clear()
        self._scripts.clear()
        self._position = int(await self._redis.get(POSITION) or 0)
        layout = await self._redis.get(LAYOUT)
        # What is further than the log is of another log, and what has other keys is of another release.
        if layout != LAYOUT_NOW.encode() or self._position > await self._log.end_seq():
            await self._wipe()
            self._position = 0
        newest = [found.seq for facts in FACTS if (found := await self._log.last(facts)) is not None]
        self._whole_at = max(newest, default=0)
        if self._position < self._whole_at:
            await self._redis.delete(WHOLE)
        else:
            await self._commit([], self._position)

    async def _wipe(self) -> None:
        """Forget everything; the position first, so that what a crash leaves behind is written over from the start."""
        await self._redis.delete(POSITION, WHOLE, LAYOUT)
        found: list[bytes] = []
        async for key in self._redis.scan_iter("hr:*", count=1000):
            found.append(key)
            if len(found) >= WORDS_MAX:
                await self._redis.unlink(*found)
                found.clear()
        if found:
            await self._redis.unlink(*found)
        await self._redis.set(LAYOUT, LAYOUT_NOW)

    async def step(self, batch: Sequence[Stored]) -> None:
        """Fold a batch of facts and write what changed, together with the new position."""
        facts = [(fact, stored) for stored in batch if (fact := fact_of(stored)) is not None]
        before = await self._records({fact.run_id for fact, _ in facts})
        now: dict[str, RunRecord] = {}
        invocations = await self._begun_before(facts)
        unchanged = dict(invocations)
        died: dict[str, list[tuple[str, int]]] = {}
        replayed: set[str] = set()
        for fact, stored in facts:
            run = fact.run_id
            known = now.get(run, before.get(run))
            record = apply(known, fact, stored)
            if record is None:
                continue  # its beginning is older than the log keeps: nothing to show
            now[run] = record
            if isinstance(fact, Replay):
                replayed.add(run)
                continue
            identity = getattr(fact, "invocation_id", None)
            if identity is not None:
                changed = apply_invocation(invocations.get((run, identity)), fact, stored)
                if changed is not None:
                    invocations[run, identity] = changed
                if known is not None and record.dead > known.dead:
                    died.setdefault(run, []).append((identity, stored.seq))
        fields: dict[str, list[Any]] = {run: ["r", encode(record)] for run, record in now.items()}
        commands: list[Command] = []
        for (run, identity), one in invocations.items():
            if one.state == "queued" and one.attempts == 0:
                # Work that stands in the log twice must not make its invocation wait again.
                commands.append(["HSETNX", _run_key(run), "i:" + identity, encode(one)])
            elif one is not unchanged.get((run, identity)):
                fields[run] += ("i:" + identity, encode(one))
        for run, values in fields.items():
            commands += _split("HSET", _run_key(run), values)
        commands += _index(before, now)
        commands += _bury(died, now)
        commands += await self._dig_up(replayed)
        await self._commit(commands, batch[-1].seq)
        self._remember(now)
        await self._trim()

    async def _records(self, runs: set[str]) -> dict[str, RunRecord]:
        """Return the known records of these runs, from the cache or from Redis."""
        found = {run: self._cache[run] for run in runs if run in self._cache}
        missing = [run for run in runs if run not in found]
        if missing and self._position:
            raws = await self._fields([(_run_key(run), "r") for run in missing])
            found |= {run: decode(raw, RunRecord) for run, raw in zip(missing, raws, strict=True) if raw is not None}
        return found

    async def _begun_before(self, facts: list[tuple[Fact, Stored]]) -> dict[tuple[str, str], InvocationRecord]:
        """Return what is known of invocations that an attempt tells of: it may be late, and not the last word."""
        keys = list({(f.run_id, f.invocation_id): None for f, _ in facts if isinstance(f, Started | Attempt)})
        if not keys or not self._position:
            return {}
        raws = await self._fields([(_run_key(run), "i:" + identity) for run, identity in keys])
        return {key: decode(raw, InvocationRecord) for key, raw in zip(keys, raws, strict=True) if raw is not None}

    async def _fields(self, places: list[tuple[str, str]]) -> list[bytes | None]:
        """Return fields of hashes, each given by its key and its name."""
        words = [word for place in places for word in place]
        found: list[bytes | None] = await self._redis.evalsha(await self._script(READ), 0, *words)
        return found

    async def _dead_of(self, runs: Iterable[str]) -> dict[str, list[str]]:
        """Return the dead invocations of these runs."""
        found: dict[str, list[str]] = {}
        for run in runs:
            raw = await self._redis.hgetall(_run_key(run))
            found[run] = [
                key[2:].decode()
                for key, value in raw.items()
                if key != b"r" and decode(value, InvocationRecord).state == "dead"
            ]
        return found

    async def _dig_up(self, replayed: set[str]) -> list[Command]:
        """Return the commands that take replayed runs off the list of what is left to do."""
        dead = await self._dead_of(replayed)
        return _split("ZREM", DEAD_LEFT, [f"{run}.{identity}" for run, found in dead.items() for identity in found])

    async def _commit(self, commands: list[Command], position: int) -> None:
        """Do all of it and move the position, or nothing.

        Raises:
            _Moved: Redis is not where this writer left it.
        """
        whole = self._whole_at is not None and position >= self._whole_at
        if whole:
            # The layout once more: it may have been wiped since it was written, while the position was 0 anyway.
            commands = [*commands, ["SET", LAYOUT, LAYOUT_NOW], ["SET", WHOLE, uuid4().hex]]
        flat: list[Any] = [self._position, position]
        for command in commands:
            flat.append(len(command))
            flat += command
        there = int(await self._redis.evalsha(await self._script(WRITE), 1, POSITION, *flat))
        if there != self._position:
            raise _Moved(f"{there} instead of {self._position}")
        self._position = position
        if whole:
            self._whole_at = None

    async def _script(self, text: str) -> str:
        """Return the hash of a script; a Redis that was started anew is given it again."""
        known = self._scripts.get(text)
        if known is None:
            known = self._scripts[text] = str(await self._redis.script_load(text))
        return known

    def _remember(self, now: dict[str, RunRecord]) -> None:
        for run, record in now.items():
            self._cache[run] = record
            self._cache.move_to_end(run)
            self._ended += record.ended
        while len(self._cache) > RECORDS_CACHED_MAX:
            self._cache.popitem(last=False)

    async def _trim(self) -> None:
        """Forget the oldest ended runs beyond the limit; the log still has them."""
        if self._ended < TRIM_AT_ONCE:
            return
        self._ended = 0
        surplus = int(await self._redis.zcard(RUNS)) - self._runs_max
        if surplus <= 0:
            return
        oldest = {r.decode() for r in await self._redis.zrange(RUNS, 0, min(surplus, TRIM_AT_MOST) - 1)}
        ended = {run: record for run, record in (await self._records(oldest)).items() if record.ended}
        dead = await self._dead_of(run for run, record in ended.items() if record.dead)
        gone: dict[str, list[str]] = {}
        for run, record in ended.items():
            for key in (RUNS, f"hr:route:{record.route}", f"hr:state:{record.state}"):
                gone.setdefault(key, []).append(run)
        buried = [f"{run}.{identity}" for run, found in dead.items() for identity in found]
        commands = [command for key, runs in gone.items() for command in _split("ZREM", key, runs)]
        commands += [command for key in (DEAD, DEAD_LEFT) for command in _split("ZREM", key, buried)]
        commands += _split("HDEL", DEAD_RUNS, [identity for found in dead.values() for identity in found])
        commands += [["UNLINK", _run_key(run)] for run in ended]
        await self._commit(commands, self._position)
        for run in ended:
            self._cache.pop(run, None)


def _split(name: str, key: str, words: list[Any]) -> list[Command]:
    """Return the command as often as it takes to give the key all these words; none for no words."""
    return [[name, key, *words[start : start + WORDS_MAX]] for start in range(0, len(words), WORDS_MAX)]


def _index(before: dict[str, RunRecord], now: dict[str, RunRecord]) -> list[Command]:
    """Return the commands that keep sorted sets and totals true for the changed runs."""
    added: dict[str, list[Any]] = {}
    removed: dict[str, list[Any]] = {}
    accepted = ended = 0
    for run, record in now.items():
        known, place = before.get(run), (record.first_seq, run)
        if known is None:
            accepted += 1
            for key in (RUNS, f"hr:route:{record.route}"):
                added.setdefault(key, []).extend(place)
        ends = record.ended and (known is None or not known.ended)
        ended += ends
        for key in (OPEN, f"{OPEN}:{record.route}"):
            if ends and known is not None:
                removed.setdefault(key, []).append(run)
            elif known is None and not ends:
                added.setdefault(key, []).extend(place)
        if known is None or known.state != record.state:
            if known is not None:
                removed.setdefault(f"hr:state:{known.state}", []).append(run)
            added.setdefault(f"hr:state:{record.state}", []).extend(place)
    commands = [command for key, members in removed.items() for command in _split("ZREM", key, members)]
    commands += [command for key, places in added.items() for command in _split("ZADD", key, places)]
    return commands + [["HINCRBY", TOTALS, name, n] for name, n in (("accepted", accepted), ("ended", ended)) if n]


def _bury(died: dict[str, list[tuple[str, int]]], now: dict[str, RunRecord]) -> list[Command]:
    """Return the commands that list invocations that were given up on: by run, each with its outcome's sequence."""
    everyone: list[Any] = []
    left: list[Any] = []
    runs: list[Any] = []
    for run, found in died.items():
        for identity, seq in found:
            everyone += (seq, f"{run}.{identity}")
            left += () if now[run].replayed_as else (seq, f"{run}.{identity}")
            runs += (identity, run)
    return [*_split("ZADD", DEAD, everyone), *_split("ZADD", DEAD_LEFT, left), *_split("HSET", DEAD_RUNS, runs)]


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
        raw = await _answered(self._redis.hget(_run_key(run), "r"))
        return None if raw is None else decode(raw, RunRecord)

    async def run(self, run: str) -> RunView | None:
        """Return a run with its invocations, or None where it is not known here."""
        raw = await _answered(self._redis.hgetall(_run_key(run)))
        if b"r" not in raw:
            return None
        invocations = [decode(v, InvocationRecord) for k, v in raw.items() if k != b"r"]
        return view(decode(raw[b"r"], RunRecord), invocations)

    async def open_runs(self, route: str) -> int:
        """Return how many runs of a route have not ended."""
        whole, number = await _answered(
            self._redis.pipeline(transaction=True).exists(WHOLE).zcard(f"{OPEN}:{route}").execute()
        )
        if not whole:
            raise _rebuilding()
        return int(number)

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

        def wanted(record: RunRecord) -> bool:
            return (
                (not route or record.route == route)
                and (not state or record.state == state)
                and (since is None or record.accepted_at >= since)
            )

        index = f"hr:state:{state}" if state else f"hr:route:{route}" if route else RUNS
        found, following = await self._scan(index, self._load_runs, wanted, limit, cursor)
        return RunPage(runs=[view(r, []) for r in found], next=following)

    async def dead(
        self,
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

        index = DEAD if replayed else DEAD_LEFT
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
