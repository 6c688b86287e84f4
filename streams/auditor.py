"""The auditor: looks at the oldest open runs in the log itself, round after round, and says what it found.

The counts come from the read model, whose writer moves them together; they cannot tell on their own whether what is
open will ever end. So each round takes some open runs, oldest first, and looks for their work, outcomes and ends where
the truth is. It is bounded by ``RUNS_MAX`` runs a round, and when nothing is open it asks Redis one question.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, NamedTuple

import msgspec
import nats.errors
import redis.exceptions
from redis.asyncio import Redis

from headrace.clock import format_instant
from headrace.errors import TooLarge, Unavailable
from headrace.model import Audit
from streams import audit
from streams.audit import Place, Verdict
from streams.follow import follow
from streams.ledger import AUDIT, OPEN, POSITION, TOTALS, WHOLE
from streams.log import Log
from streams.stored import Stored
from streams.topology import consumers, jobs_of, lane_of

_log = logging.getLogger(__name__)

EVERY_S = 10.0
GRACE_S = 30.0
RUNS_MAX = 200
SUSPECTS_MAX = 1000
NAMED_MAX = 20
READS_AT_ONCE = 16
LARGE_RUNS_MAX = 1
SCAN_IDLE_S = 1.0


class Counts(NamedTuple):
    """The read model at one moment: up to where it is true, and how many runs it has."""

    position: int
    accepted: int
    ended: int
    open: int


class Auditor:
    """Audits every ``every_s`` seconds; runs younger than ``grace_s`` are left alone."""

    def __init__(
        self,
        log: Log,
        redis: Redis,
        *,
        every_s: float = EVERY_S,
        grace_s: float = GRACE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._log = log
        self._redis: Any = redis
        self._every_s = every_s
        self._grace_s = grace_s
        self._clock = clock
        self._cursor = 0
        self._marks: deque[tuple[float, int]] = deque()
        self._verdicts: dict[str, Verdict] = {}
        self._told: tuple[int, int, int] = (0, 0, 0)

    async def run(self) -> None:
        """Audit for ever. What cannot be asked now is asked in the next round."""
        while True:
            try:
                await self.round()
            except (redis.exceptions.RedisError, nats.errors.Error, OSError, Unavailable) as error:
                _log.warning("no audit at the moment: %s", error)
            await asyncio.sleep(self._every_s)

    async def round(self) -> Audit | None:
        """Look at some open runs and write down what was found; None while the read model is not whole."""
        counts = await self._count()
        if counts is None:
            self._verdicts, self._cursor = {}, 0
            return None
        now = self._clock()
        before, self._verdicts = self._verdicts, {}
        if counts.open:
            self._verdicts = await self._examine(before, self._old_enough(now, counts.position))
        else:
            self._old_enough(now, counts.position)
        found = _audit(counts, audit.confirmed(before, self._verdicts), now)
        fields = {name: msgspec.json.encode(value) for name, value in msgspec.structs.asdict(found).items()}
        await self._redis.hset(AUDIT, mapping=fields)
        self._tell(found)
        return found

    async def _count(self) -> Counts | None:
        """Return the counts of one moment, None while the read model is being built."""
        pipe = self._redis.pipeline(transaction=True)
        pipe.get(POSITION).exists(WHOLE).hmget(TOTALS, "accepted", "ended").zcard(OPEN)
        position, whole, (accepted, ended), number = await pipe.execute()
        return Counts(int(position or 0), int(accepted or 0), int(ended or 0), int(number)) if whole else None

    def _old_enough(self, now: float, position: int) -> int:
        """Return the sequence up to which everything was in the log ``grace_s`` ago already, by our own clock."""
        self._marks.append((now, position))
        while len(self._marks) > 1 and self._marks[1][0] <= now - self._grace_s:
            self._marks.popleft()
        at, old = self._marks[0]
        return old if at <= now - self._grace_s else 0

    async def _examine(self, before: dict[str, Verdict], old_enough: int) -> dict[str, Verdict]:
        """Return verdicts on the runs that looked bad in the round before, and on the next open ones."""
        suspects = [run for run, verdict in before.items() if verdict != "on_its_way"][:SUSPECTS_MAX]
        floors = await self._floors()
        # Of a run whose first work is not acknowledged nothing is: no need to look at those that wait in a backlog.
        places = await self._candidates(suspects, min(old_enough, max(floors.values(), default=0)))
        turns, large = asyncio.Semaphore(READS_AT_ONCE), asyncio.Semaphore(LARGE_RUNS_MAX)

        async def look(run: str, first_seq: int) -> Verdict:
            async with turns:
                try:
                    found = await self._log.last_of_each(audit.subjects(run))
                except TooLarge:
                    async with large:
                        found = await self._read_through(run, first_seq)
            return audit.examine(audit.read(found), floors)

        verdicts = await asyncio.gather(*(look(run, seq) for run, seq in places.items()))
        return dict(zip(places, verdicts, strict=True))

    async def _candidates(self, suspects: list[str], newest: int) -> dict[str, int]:
        """Return the open runs to look at now, each with the sequence of its acceptance; the cursor moves on."""
        places: dict[str, int] = {}
        if suspects:
            for run, score in zip(suspects, await self._redis.zmscore(OPEN, suspects), strict=True):
                if score is not None:
                    places[run] = int(score)
        following = await self._redis.zrangebyscore(
            OPEN, f"({self._cursor}", newest, start=0, num=RUNS_MAX, withscores=True
        )
        for run, score in following:
            places[run.decode()] = int(score)
        self._cursor = int(following[-1][1]) if len(following) == RUNS_MAX else 0
        return places

    async def _floors(self) -> dict[Place, int]:
        floors: dict[Place, int] = {}
        for name, info in (await consumers(self._log.link.jetstream())).items():
            place = lane_of(name) or jobs_of(name)
            if place is not None:
                floors[place] = 0 if info.ack_floor is None else info.ack_floor.stream_seq
        return floors

    async def _read_through(self, run: str, first_seq: int) -> list[Stored]:
        """Read all facts of a run that has more of them than one answer holds."""
        end = await self._log.end_seq()
        found: list[Stored] = []
        batches: AsyncGenerator[list[Stored], None] = follow(
            self._log, audit.subjects(run), after=first_seq - 1, idle_s=SCAN_IDLE_S
        )
        async with aclosing(batches):
            async for batch in batches:
                found += batch
                if not batch or batch[-1].seq >= end:
                    break
        return found

    def _tell(self, found: Audit) -> None:
        """Log what changed: an error while there is something to mend, and that it is mended."""
        bad = (found.lost, found.stuck, found.missed)
        if bad != self._told:
            if found.difference:
                _log.error(
                    "accepted - ended - running = %d: lost %d %s, stuck %d %s, missed %d %s",
                    found.difference,
                    found.lost,
                    found.lost_runs,
                    found.stuck,
                    found.stuck_runs,
                    found.missed,
                    found.missed_runs,
                )
            else:
                _log.warning("every accepted run has ended or is on its way again")
        self._told = bad


def _audit(counts: Counts, bad: dict[str, Verdict], now: float) -> Audit:
    by_verdict: dict[Verdict, list[str]] = {"lost": [], "stuck": [], "ended": []}
    for run, verdict in bad.items():
        by_verdict[verdict].append(run)
    running = counts.open - len(bad)
    return Audit(
        at=format_instant(now),
        accepted=counts.accepted,
        ended=counts.ended,
        running=running,
        difference=counts.accepted - counts.ended - running,
        lost=len(by_verdict["lost"]),
        stuck=len(by_verdict["stuck"]),
        missed=len(by_verdict["ended"]),
        lost_runs=by_verdict["lost"][:NAMED_MAX],
        stuck_runs=by_verdict["stuck"][:NAMED_MAX],
        missed_runs=by_verdict["ended"][:NAMED_MAX],
    )
