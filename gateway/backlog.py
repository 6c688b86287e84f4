"""Whether what comes in now can still be done in time: asked before a body is read, so that refusing stays cheap.

What is accepted waits behind all work of its own lane and of more urgent ones. How long, the platform learns while
work waits: so many outcomes a second is what it can do, and so many outcomes follow from one that waits. A trigger that
would wait for more than half of the time it has is refused with 503 and the time after which there will be room.
Nothing is learned, and nothing refused, while no work waits; and what may wait at all is bounded by ``backlog_max``.
What workers hold counts as waiting: they hold more than they run, so that their order has something to choose from.

A quote is told from the first of a burst on: what the slots of the workers that are there should do in a second, by
what was learned of the work that waits, stands in for what was not seen yet.

Workers take of every tenant in turn, so of another's work no more is ahead than one has oneself. Where several share
the platform, each may have as much waiting as there is room left for the others: one alone half of ``backlog_max``, two
a third each. Who has more is told so (429), and the others are still accepted.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import add, sub
from typing import NamedTuple

from functions.admission import due_of
from functions.qos import lane
from functions.quotes import ahead_s, pace
from functions.sizes import Sizes
from gateway.needs import Lanes
from gateway.problems import Busy
from headrace.errors import Overloaded, Unavailable
from headrace.wire import Invocation
from streams.backlog import Look
from streams.tables import row_key
from streams.topology import DEFAULT_TENANT, LANES

_log = logging.getLogger(__name__)

LOOK_S = 0.5
LOOK_SOON_S = 0.1  # while little is known of how fast work is done, or much comes
YOUNG_S = 3.0
LOOK_RUNS = 16  # accepted since the last look, after which the next one comes as early as when little is known
FORGET_S = 10.0  # what was done before this long ago tells little of what is done now
EVIDENCE = 20  # unless so few outcomes came since
GIVEN_BACK_MIN = 8  # fewer deliveries that came again may be attempts that failed
REMEMBER_S = 120.0
FOLLOWING_MAX = 16.0  # outcomes that one piece of waiting work is thought to lead to, at most
BENEFIT_SHARE = 0.05  # of the time that is left: for so long, nothing done yet is no sign that nothing gets done
WAIT_SHARE = 0.5  # of the time that is left may be spent waiting; the rest is for running, and for what follows
RETRY_S_MAX = 30.0


class _Sample(NamedTuple):
    """What a look saw, with all that this gateway had accepted until then."""

    at: float
    ended: int
    waiting: int
    accepted: int


class _Load:
    """What was learned of the work that waits: the mean duration of one piece, in seconds."""

    __slots__ = ("_count", "_seconds")

    def __init__(self) -> None:
        self._count = 0
        self._seconds = 0.0

    @property
    def each_s(self) -> float | None:
        """The mean, None where nothing is known of any."""
        return self._seconds / self._count if self._count else None

    def add(self, seconds: float, pieces: int) -> None:
        """Take in that so many pieces came which need so many seconds each."""
        self._count += pieces
        self._seconds += pieces * seconds

    def shrink(self, left: int) -> None:
        """Take in that no more than so many are left; which ones is not known."""
        if left < self._count:
            self._seconds *= left / self._count
            self._count = left


class Backlog:
    """Knows how much waits, and refuses what would wait too long."""

    def __init__(
        self,
        lanes: Lanes | None,
        *,
        backlog_max: int,
        slots: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        """Begin without any knowledge.

        Args:
            lanes: whom to ask; without one nothing is ever refused.
            backlog_max: how much may wait at all.
            slots: how many pieces of work all workers run at a time, as far as is known.
            clock: monotonic seconds.
            rng: where the jitter of ``Retry-After`` comes from.
        """
        self._lanes = lanes
        self._backlog_max = backlog_max
        self._slots = slots
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311 - spreads retries, no secret
        self._waiting: Mapping[str, Sequence[int]] = {}  # by tenant and lane
        self._taken: dict[str, list[int]] = {}
        self._coming: dict[str, list[int]] = {}
        self._waiting_count = 0
        self._taken_count = 0
        self._load = _Load()
        self._accepted = 0
        self._samples: deque[_Sample] = deque()
        self._waits_since = 0.0
        self._held_full = 0
        self._rest: _Sample | None = None
        self._sizes = Sizes()
        self._counting = ""
        self._looked_at = -math.inf
        self._looking: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """How much waits for a worker, as far as is known."""
        return self._waiting_count + self._taken_count

    def _count(self, tenant: str, lanes: int = LANES) -> int:
        """Return how much of a tenant's work waits in the first so many lanes."""
        counts = (self._waiting.get(tenant, ()), self._taken.get(tenant, ()), self._coming.get(tenant, ()))
        return sum([sum(by_lane[:lanes]) for by_lane in counts])

    def _ahead(self, tenant: str, lanes: int, runs: int) -> int:
        """Return how much is done before runs of a tenant that come last in the first so many lanes."""
        own = self._count(tenant, lanes)
        others = {*self._waiting, *self._taken, *self._coming} - {tenant}
        return own + sum(min(self._count(other, lanes), own + runs) for other in others)

    def per_second(self) -> float | None:
        """Return how many outcomes a second came while work waited; None where nothing waits.

        One more is counted than was seen: an estimate from little evidence errs on the side of accepting.
        """
        if not self._samples:
            return None
        return (self._samples[-1].ended - self._samples[0].ended + 1) / max(self._clock() - self._samples[0].at, 1e-3)

    def following(self) -> float:
        """Return how many outcomes follow from one piece of waiting work, itself included: chains and what they emit.

        What was accepted since nothing waited comes to so many outcomes, by the sizes that runs of its routes had
        before; less what has ended, that is yet to be done by what waits. Members of large maps wait themselves.
        """
        if not self._samples:
            return 1.0
        first, last = self._samples[0], self._samples[-1]
        if not self._sizes.accepted or self._rest is None:
            return 1.0
        begun = last.accepted - first.accepted
        seen = (last.ended - first.ended + last.waiting - first.waiting) / begun if begun >= EVIDENCE else 1.0
        expected = self._sizes.expected(min(FOLLOWING_MAX, max(1.0, seen)))
        each = min(FOLLOWING_MAX, max(1.0, expected / self._sizes.accepted))
        to_do = expected - (last.ended - self._rest.ended)
        return min(each, max(1.0, to_do / max(1, last.waiting)))

    def wait_s(
        self,
        deadline: float | None,
        now: float,
        tenant: str = DEFAULT_TENANT,
        behind: int = 0,
        need_s: float | None = None,
    ) -> float:
        """Return how many seconds what is ahead of a run with this deadline keeps it waiting; 0 while nothing waits.

        Args:
            deadline: epoch seconds, or None.
            now: epoch seconds.
            tenant: whose run it is.
            behind: how many runs of the same request come before it.
            need_s: how long it is expected to run, in seconds: so is what is ahead, where nothing is known of that.
        """
        slots, each_s = self._slots(), self._load.each_s or need_s
        if not slots or not each_s:
            per_second = self.per_second()
            if per_second is None:
                return 0.0
            return (self._ahead(tenant, lane(deadline, now) + 1, 1) + behind) * self.following() / per_second
        ended, seconds = 0, 0.0
        if self._samples:
            first, last = self._samples[0], self._samples[-1]
            ended, seconds = last.ended - first.ended, last.at - first.at
        ahead = (self._ahead(tenant, lane(deadline, now) + 1, 1) + behind) * self.following()
        per_second = pace(ended, seconds, slots / each_s)
        # Of what was seen some has ended meanwhile; of what came since nothing is taken to.
        since_s = min(max(0.0, self._clock() - self._looked_at), self._waiting_count / per_second)
        return ahead_s(ahead, slots, per_second, since_s)

    def check(self, deadline: float | None, now: float, runs: int = 1, tenant: str = DEFAULT_TENANT) -> None:
        """Return if runs with this deadline would be begun in time; ``now`` and ``deadline`` in epoch seconds.

        Raises:
            Busy: they would not, or too much waits already.
            Overloaded: the tenant has as much waiting as it may have.
        """
        if self._lanes is None:
            return
        self._look_soon()
        waiting = self.waiting
        if waiting + runs > self._backlog_max:
            raise self._refusal(f"{waiting:,} pieces of work wait, the limit is {self._backlog_max:,}", 1.0)
        if len(self._waiting) > 1:
            self._check_share(tenant, runs, self._backlog_max - waiting)
        per_second = None if deadline is None else self.per_second()
        if deadline is None or per_second is None:
            return
        ahead = self._ahead(tenant, lane(deadline, now) + 1, runs)
        left_s = max(0.0, deadline - now)
        wait_s = (ahead + runs - 1) * self.following() / per_second
        if ahead and wait_s > WAIT_SHARE * left_s and self._clock() - self._waits_since > BENEFIT_SHARE * left_s:
            raise self._refusal(
                f"{ahead:,} pieces of work are ahead and take about {wait_s:.1f} s, more than half of the "
                f"{left_s:.1f} s that this one has",
                wait_s - WAIT_SHARE * left_s,
            )

    def _check_share(self, tenant: str, runs: int, room: int) -> None:
        own = self._count(tenant)
        if own + runs > room:
            raise Overloaded(
                f"{own:,} pieces of your work wait; of the {self._backlog_max:,} that may wait, the other {room:,} are "
                "kept for other tenants",
                hint="Send it again when some of yours has ended. A tenant may have as much waiting as is left free.",
                retry_after_s=self._spread(1.0),
            )

    @contextmanager
    def coming(self, firsts: Iterable[Invocation]) -> Iterator[None]:
        """Count runs that are on their way into the log as ahead of what comes in meanwhile."""
        places = [(first.tenant, lane(due_of(first), first.accepted_at)) for first in firsts]
        for tenant, at in places:
            self._coming.setdefault(tenant, [0] * LANES)[at] += 1
        try:
            yield
        finally:
            for tenant, at in places:
                self._coming[tenant][at] -= 1

    def took(
        self,
        route: str,
        deadline: float | None,
        now: float,
        runs: int = 1,
        tenant: str = DEFAULT_TENANT,
        need_s: float | None = None,
    ) -> None:
        """Count runs that were accepted on a tenant's route, until the next look sees them.

        Args:
            route: its name.
            deadline: by when the function has to end, epoch seconds or None.
            now: epoch seconds.
            runs: how many.
            tenant: whose they are.
            need_s: how long the function is expected to run, in seconds; None where that is not known.
        """
        self._sizes.accept(row_key(tenant, route), runs)
        self._taken.setdefault(tenant, [0] * LANES)[lane(deadline, now)] += runs
        self._taken_count += runs
        self._accepted += runs
        if need_s is not None:
            self._load.add(need_s, runs)

    async def close(self) -> None:
        """Look no more."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    def _refusal(self, why: str, retry_after_s: float) -> Busy:
        return Busy(
            why,
            hint="Send it again after Retry-After seconds, give it a later deadline, or add workers.",
            retry_after_s=self._spread(retry_after_s),
        )

    def _spread(self, retry_after_s: float) -> float:
        """Return a time to come back after: those that were refused together do not come back together."""
        return min(RETRY_S_MAX, max(1.0, retry_after_s) * (1.0 + 0.5 * self._rng.random()))

    def _look_soon(self) -> None:
        """Begin a look if the last one is too old; nobody waits for it."""
        if (self._looking is None or self._looking.done()) and self._is_old():
            self._looking = asyncio.create_task(self._look_on(), name="backlog-look")

    def _is_old(self) -> bool:
        """Say whether the last look was too long ago."""
        now = self._clock()
        young = bool(self._samples) and now - self._waits_since < YOUNG_S
        soon = young or self._taken_count >= LOOK_RUNS
        return now - self._looked_at >= (LOOK_SOON_S if soon else LOOK_S)

    async def _look_on(self) -> None:
        """Look, and go on while work waits: else who comes first after a storm would be told of the storm."""
        await self._look()
        while self._samples:
            await asyncio.sleep(LOOK_SOON_S)
            if self._is_old():
                await self._look()

    async def _look(self) -> None:
        assert self._lanes is not None  # noqa: S101 - check returned before
        before, count = {tenant: [*taken] for tenant, taken in self._taken.items()}, self._taken_count
        try:
            look = await self._lanes.look()
            # What came before it was asked for is in it; until it was there, nothing else told of that.
            for tenant, seen in before.items():
                self._taken[tenant] = list(map(sub, self._taken[tenant], seen))
            self._taken_count -= count
            self.learn(look)
        except Unavailable as error:
            _log.debug("no look at the backlog: %s", error)
        finally:
            self._looked_at = self._clock()

    def learn(self, look: Look) -> None:
        """Take note of a look."""
        sample = _Sample(look.at, look.ended, sum(look.waiting) + sum(look.held), self._accepted)
        if look.counting != self._counting:
            self._counting = look.counting
            self._rest = None
            self._samples.clear()
        # What workers hold is mostly not begun either, and what they gave back waits with them.
        self._waiting = look.tenants or {DEFAULT_TENANT: tuple(map(add, look.waiting, look.held))}
        self._waiting_count = sum(map(sum, self._waiting.values()))
        self._load.shrink(self._waiting_count + self._taken_count)
        if not sample.waiting:
            self._rest_at(sample)
        if not self._waits(look):
            # No work waits, so how fast it is done tells what comes in, not what could be done.
            self._samples.clear()
            return
        if not self._samples:
            self._waits_since = look.at
        self._samples.append(sample)
        while len(self._samples) > 2:
            second = self._samples[1]
            aged = look.at - second.at >= FORGET_S and look.ended - second.ended >= EVIDENCE
            if not aged and look.at - self._samples[0].at < REMEMBER_S:
                break
            self._samples.popleft()

    def _waits(self, look: Look) -> bool:
        """Say whether there is more work than workers can begin, from what they hold where nothing else waits.

        They take a bounded view of a lane into their hands: a backlog that is no larger shows in what they give back as
        they cannot begin it. And once there was more, hands that are still more than half as full are not empty.
        """
        held = sum(look.held)
        if any(look.waiting):
            self._held_full = held
            return True
        if look.given_back >= GIVEN_BACK_MIN and look.given_back > held / 2:
            return True
        return bool(self._samples) and self._held_full >= GIVEN_BACK_MIN and held > self._held_full / 2

    def _rest_at(self, sample: _Sample) -> None:
        """All that was accepted has come to its end: so many outcomes belong to so many runs."""
        if self._rest is None:
            self._sizes.forget()
        else:
            self._sizes.rest(sample.ended - self._rest.ended)
        self._rest = sample
