"""The read model: the log folded into Redis, so that a list of runs costs no search through the log.

Redis holds nothing that matters. The writer keeps its position in the log beside the data and moves both in one
script; when Redis comes back empty, or with an older state, it finds another position there than it left and
begins again from it. Until it has caught up, lists are refused: half a list is a wrong one.

    hr:position       sequence of the log up to which everything here is true
    hr:layout         which of the keys below there are; another layout is thrown away and built anew
    hr:whole          a token, there once all that was in the log when the writer began is here
    hr:run:<id>       hash: ``r`` the run, ``i:<invocation>`` its invocations
    hr:runs           all runs by the sequence of their acceptance; and likewise, those of one tenant:
                      hr:runs:<tenant>, hr:route:<tenant>:<route>, hr:state:<tenant>:<state>
    hr:open           runs that have not ended, likewise; hr:open:<tenant>:<route> those of a route
    hr:totals         hash: ``accepted`` and ``ended``, how many runs did so since the beginning of the log
    hr:dead:all:<tenant>    ``<run>.<invocation>`` of all that were given up on, by the sequence of their outcome
    hr:dead:left:<tenant>   those among them whose run was not replayed
    hr:dead:runs      hash: the run of each of them, by invocation
    hr:audit          hash: what the auditor found last, each field as JSON
    hr:forecasts      hash: what was learned of each kind of work up to the position
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol
from uuid import uuid4

import redis.exceptions
from redis.asyncio import Redis

from headrace.errors import Unavailable
from headrace.joblog import Held, Submitted
from headrace.wire import Attempt, Invocation, Replay, Started, decode, encode
from streams.follow import follow
from streams.log import Log
from streams.record import Fact, InvocationRecord, RunRecord, apply, apply_invocation, fact_of, moves_of
from streams.stored import Stored

_log = logging.getLogger(__name__)

FACTS = [
    "hr.work.>",
    "hr.job.>",
    "hr.submit.>",
    "hr.held.>",
    "hr.done.>",
    "hr.end.>",
    "hr.start.>",
    "hr.try.>",
    "hr.cancel.>",
    "hr.replay.>",
    "hr.thread.>",
]
POSITION = "hr:position"
LAYOUT = "hr:layout"
LAYOUT_NOW = "3"
WHOLE = "hr:whole"
RUNS = "hr:runs"
OPEN = "hr:open"
TOTALS = "hr:totals"
DEAD_RUNS = "hr:dead:runs"
AUDIT = "hr:audit"
FORECASTS = "hr:forecasts"
RECORDS_CACHED_MAX = 20_000
WINDOW = 2048
RETRY_S = 0.5
LINGER_S = 0.02
TRIM_AT_ONCE = 500
TRIM_AT_MOST = 5000
WORDS_MAX = 2000  # of one command: the script's stack holds 8,000

Command = list[Any]


# One round trip and one answer per batch, and one word for all of its commands: the client library takes longer to pack
# thousands of words than all the rest takes.
# ARGV: the position this writer left, the new one, and the commands, each packed behind the number of its words.
WRITE = """
local there = tonumber(redis.call('GET', KEYS[1]) or '0')
if there ~= tonumber(ARGV[1]) then return there end
local packed, at = ARGV[3], 1
while at <= #packed do
  local words, command = 0, {}
  words, at = struct.unpack('>I4', packed, at)
  for n = 1, words do command[n], at = struct.unpack('>I4c0', packed, at) end
  redis.call(unpack(command))
end
redis.call('SET', KEYS[1], ARGV[2])
return there
"""

# ARGV: keys of hashes, each with a field of it, packed.
READ = """
local found, packed, at = {}, ARGV[1], 1
local key, field
while at <= #packed do
  key, field, at = struct.unpack('>I4c0I4c0', packed, at)
  found[#found + 1] = redis.call('HGET', key, field)
end
return found
"""


def run_key(run: str) -> str:
    """Return the key of the hash that holds a run."""
    return f"hr:run:{run}"


def runs_key(tenant: str) -> str:
    """Return the key of all runs of a tenant."""
    return f"{RUNS}:{tenant}"


def route_key(tenant: str, route: str) -> str:
    """Return the key of the runs of a route."""
    return f"hr:route:{tenant}:{route}"


def state_key(tenant: str, state: str) -> str:
    """Return the key of the runs of a tenant that are in a state."""
    return f"hr:state:{tenant}:{state}"


def open_key(tenant: str, route: str) -> str:
    """Return the key of the runs of a route that have not ended."""
    return f"{OPEN}:{tenant}:{route}"


def dead_key(tenant: str) -> str:
    """Return the key of all invocations of a tenant that were given up on."""
    return f"hr:dead:all:{tenant}"


def dead_left_key(tenant: str) -> str:
    """Return the key of those among them whose run was not replayed."""
    return f"hr:dead:left:{tenant}"


class _Moved(Exception):
    """Redis is at another position than this writer left it at: it was wiped, replaced, or has another writer."""


class Learner(Protocol):
    """What learns from facts, in the order of the log; ``functions.lessons`` is the one."""

    def load(self, kept: Mapping[str, bytes]) -> None:
        """Go on from what ``changed`` gave, by name."""

    def learn(self, fact: Fact, stored: Stored, before: RunRecord | None, after: RunRecord | None) -> None:
        """Take in one more fact; ``before`` and ``after`` it are what is known of its run."""

    def changed(self) -> tuple[dict[str, bytes], list[str]]:
        """Return what is to be kept since the last call, by name, and the names of what is not any more."""


class Writer:
    """Follows the log into Redis. One is at work at a time; a second one notices and starts over behind the first."""

    def __init__(self, log: Log, redis: Redis, learner: Learner | None = None, *, runs_max: int = 100_000) -> None:
        self._log = log
        self._learner = learner
        self._redis: Any = redis  # redis-py's types cannot tell that answers are bytes here
        self._runs_max = runs_max
        self._cache: OrderedDict[str, RunRecord] = OrderedDict()
        self._position = 0
        self._whole_at: int | None = None  # where everything is here that was in the log at the beginning; None: it is
        self._begun = False
        self._ended = 0
        self._scripts: dict[str, str] = {}

    @property
    def whole(self) -> bool:
        """Whether all is here that was in the log when this writer began."""
        return self._begun and self._whole_at is None

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
        if self._learner is not None:
            kept = await self._redis.hgetall(FORECASTS) if self._position else {}
            self._learner.load({name.decode(): raw for name, raw in kept.items()})
        self._begun = True
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
        replayed: dict[str, str] = {}
        for fact, stored in facts:
            run = fact.run_id
            known = now.get(run, before.get(run))
            record = apply(known, fact, stored)
            if self._learner is not None:
                self._learner.learn(fact, stored, known, record)
            if record is None:
                continue  # its beginning is older than the log keeps: nothing to show
            now[run] = record
            if isinstance(fact, Replay):
                replayed[run] = record.tenant
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
            if (
                one.state == "queued"
                and one.attempts == 0
                and not (one.job is not None and (one.job.moves or one.job.why))
            ):
                # Work that stands in the log twice must not make its invocation wait again.
                commands.append(["HSETNX", run_key(run), "i:" + identity, encode(one)])
            elif one is not unchanged.get((run, identity)):
                fields[run] += ("i:" + identity, encode(one))
        for run, values in fields.items():
            commands += _split("HSET", run_key(run), values)
        commands += _index(before, now)
        commands += _bury(died, now)
        commands += await self._dig_up(replayed)
        commands += self._learned()
        await self._commit(commands, batch[-1].seq)
        self._remember(now)
        await self._trim()

    def _learned(self) -> list[Command]:
        """Return the commands that keep what was learned since the last time."""
        if self._learner is None:
            return []
        kept, gone = self._learner.changed()
        values = [word for name, raw in kept.items() for word in (name, raw)]
        return [*_split("HSET", FORECASTS, values), *_split("HDEL", FORECASTS, gone)]

    async def _records(self, runs: set[str]) -> dict[str, RunRecord]:
        """Return the known records of these runs, from the cache or from Redis."""
        found = {run: self._cache[run] for run in runs if run in self._cache}
        missing = [run for run in runs if run not in found]
        if missing and self._position:
            raws = await self._fields([(run_key(run), "r") for run in missing])
            found |= {run: decode(raw, RunRecord) for run, raw in zip(missing, raws, strict=True) if raw is not None}
        return found

    async def _begun_before(self, facts: list[tuple[Fact, Stored]]) -> dict[tuple[str, str], InvocationRecord]:
        """Return what is known of invocations that an attempt or a move tells of: it may be late, not the last word."""
        keys = list(
            {
                (f.run_id, f.invocation_id): None
                for f, _ in facts
                if isinstance(f, Started | Attempt | Submitted | Held) or (isinstance(f, Invocation) and moves_of(f))
            }
        )
        if not keys or not self._position:
            return {}
        raws = await self._fields([(run_key(run), "i:" + identity) for run, identity in keys])
        return {key: decode(raw, InvocationRecord) for key, raw in zip(keys, raws, strict=True) if raw is not None}

    async def _fields(self, places: list[tuple[str, str]]) -> list[bytes | None]:
        """Return fields of hashes, each given by its key and its name."""
        packed = _packed(word for place in places for word in place)
        found: list[bytes | None] = await self._redis.evalsha(await self._script(READ), 0, packed)
        return found

    async def _dead_of(self, runs: Iterable[str]) -> dict[str, list[str]]:
        """Return the dead invocations of these runs."""
        found: dict[str, list[str]] = {}
        for run in runs:
            raw = await self._redis.hgetall(run_key(run))
            found[run] = [
                key[2:].decode()
                for key, value in raw.items()
                if key != b"r" and decode(value, InvocationRecord).state == "dead"
            ]
        return found

    async def _dig_up(self, replayed: dict[str, str]) -> list[Command]:
        """Return the commands that take replayed runs (with their tenants) off the lists of what is left to do."""
        left: dict[str, list[str]] = {}
        for run, found in (await self._dead_of(replayed)).items():
            left.setdefault(dead_left_key(replayed[run]), []).extend(f"{run}.{identity}" for identity in found)
        return [command for key, members in left.items() for command in _split("ZREM", key, members)]

    async def _commit(self, commands: list[Command], position: int) -> None:
        """Do all of it and move the position, or nothing.

        Raises:
            _Moved: Redis is not where this writer left it.
        """
        whole = self._whole_at is not None and position >= self._whole_at
        if whole:
            # The layout once more: it may have been wiped since it was written, while the position was 0 anyway.
            commands = [*commands, ["SET", LAYOUT, LAYOUT_NOW], ["SET", WHOLE, uuid4().hex]]
        packed = b"".join([len(command).to_bytes(4, "big") + _packed(command) for command in commands])
        there = int(await self._redis.evalsha(await self._script(WRITE), 1, POSITION, self._position, position, packed))
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
            tenant = record.tenant
            for key in (RUNS, runs_key(tenant), route_key(tenant, record.route), state_key(tenant, record.state)):
                gone.setdefault(key, []).append(run)
            for key in (dead_key(tenant), dead_left_key(tenant)) if run in dead else ():
                gone.setdefault(key, []).extend(f"{run}.{identity}" for identity in dead[run])
        commands = [command for key, runs in gone.items() for command in _split("ZREM", key, runs)]
        commands += _split("HDEL", DEAD_RUNS, [identity for found in dead.values() for identity in found])
        commands += [["UNLINK", run_key(run)] for run in ended]
        await self._commit(commands, self._position)
        for run in ended:
            self._cache.pop(run, None)


def _packed(words: Iterable[Any]) -> bytes:
    """Return words (bytes, text or numbers) as one, each behind its length, as the scripts read them."""
    plain = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"".join([len(word).to_bytes(4, "big") + word for word in plain])


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
            for key in (RUNS, runs_key(record.tenant), route_key(record.tenant, record.route)):
                added.setdefault(key, []).extend(place)
        ends = record.ended and (known is None or not known.ended)
        ended += ends
        for key in (OPEN, open_key(record.tenant, record.route)):
            if ends and known is not None:
                removed.setdefault(key, []).append(run)
            elif known is None and not ends:
                added.setdefault(key, []).extend(place)
        if known is None or known.state != record.state:
            if known is not None:
                removed.setdefault(state_key(known.tenant, known.state), []).append(run)
            added.setdefault(state_key(record.tenant, record.state), []).extend(place)
    commands = [command for key, members in removed.items() for command in _split("ZREM", key, members)]
    commands += [command for key, places in added.items() for command in _split("ZADD", key, places)]
    return commands + [["HINCRBY", TOTALS, name, n] for name, n in (("accepted", accepted), ("ended", ended)) if n]


def _bury(died: dict[str, list[tuple[str, int]]], now: dict[str, RunRecord]) -> list[Command]:
    """Return the commands that list invocations that were given up on: by run, each with its outcome's sequence."""
    places: dict[str, list[Any]] = {}
    runs: list[Any] = []
    for run, found in died.items():
        record = now[run]
        for identity, seq in found:
            for key in (dead_key(record.tenant), *(() if record.replayed_as else (dead_left_key(record.tenant),))):
                places.setdefault(key, []).extend((seq, f"{run}.{identity}"))
            runs += (identity, run)
    commands = [command for key, members in places.items() for command in _split("ZADD", key, members)]
    return commands + _split("HSET", DEAD_RUNS, runs)
