"""Whether what comes in now can still be done in time: asked before a body is read, so that refusing stays cheap.

What is accepted waits behind all work of its own lane and of more urgent ones. How long, the platform learns while
work waits: so many outcomes a second is what it can do, and so many outcomes follow from one that waits. A trigger that
would wait for more than half of the time it has is refused with 503 and the time after which there will be room.
Nothing is learned, and nothing refused, while no work waits; and what may wait at all is bounded by ``backlog_max``.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable
from operator import add
from typing import NamedTuple

from functions.qos import lane
from functions.sizes import Sizes
from gateway.needs import Lanes
from gateway.problems import Busy
from headrace.errors import Unavailable
from streams.backlog import Look
from streams.topology import LANES

_log = logging.getLogger(__name__)

LOOK_S = 0.5
LOOK_SOON_S = 0.1  # while little is known of how fast work is done, or much comes
YOUNG_S = 3.0
LOOK_RUNS = 16  # accepted since the last look, after which the next one comes as early as when little is known
FORGET_S = 10.0  # what was done before this long ago tells little of what is done now
EVIDENCE = 20  # unless so few outcomes came since
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


class Backlog:
    """Knows how much waits, and refuses what would wait too long."""

    def __init__(
        self,
        lanes: Lanes | None,
        *,
        backlog_max: int,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        """Begin without any knowledge.

        Args:
            lanes: whom to ask; without one nothing is ever refused.
            backlog_max: how much may wait at all.
            clock: monotonic seconds.
            rng: where the jitter of ``Retry-After`` comes from.
        """
        self._lanes = lanes
        self._backlog_max = backlog_max
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311 - spreads retries, no secret
        self._waiting = (0,) * LANES
        self._taken = [0] * LANES
        self._accepted = 0
        self._samples: deque[_Sample] = deque()
        self._waits_since = 0.0
        self._rest: _Sample | None = None
        self._sizes = Sizes()
        self._counting = ""
        self._looked_at = -math.inf
        self._looking: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """How much waits for a worker, as far as is known."""
        return sum(self._waiting) + sum(self._taken)

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

    def check(self, deadline: float | None, now: float, runs: int = 1) -> None:
        """Return if runs with this deadline would be begun in time; ``now`` and ``deadline`` in epoch seconds.

        Raises:
            Busy: they would not, or too much waits already.
        """
        if self._lanes is None:
            return
        self._look_soon()
        if self.waiting + runs > self._backlog_max:
            raise self._refusal(f"{self.waiting:,} pieces of work wait, the limit is {self._backlog_max:,}", 1.0)
        per_second = self.per_second()
        if deadline is None or per_second is None:
            return
        mine = lane(deadline, now)
        ahead = sum(self._waiting[: mine + 1]) + sum(self._taken[: mine + 1])
        left_s = max(0.0, deadline - now)
        wait_s = (ahead + runs - 1) * self.following() / per_second
        if ahead and wait_s > WAIT_SHARE * left_s and self._clock() - self._waits_since > BENEFIT_SHARE * left_s:
            raise self._refusal(
                f"{ahead:,} pieces of work are ahead and take about {wait_s:.1f} s, more than half of the "
                f"{left_s:.1f} s that this one has",
                wait_s - WAIT_SHARE * left_s,
            )

    def took(self, route: str, deadline: float | None, now: float, runs: int = 1) -> None:
        """Count runs that were accepted on a route, until the next look sees them."""
        self._sizes.accept(route, runs)
        self._taken[lane(deadline, now)] += runs
        self._accepted += runs

    async def close(self) -> None:
        """Look no more."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    def _refusal(self, why: str, retry_after_s: float) -> Busy:
        spread = 1.0 + 0.5 * self._rng.random()  # those that were refused together do not come back together
        return Busy(
            why,
            hint="Send it again after Retry-After seconds, give it a later deadline, or add workers.",
            retry_after_s=min(RETRY_S_MAX, max(1.0, retry_after_s) * spread),
        )

    def _look_soon(self) -> None:
        """Begin a look if the last one is too old; nobody waits for it."""
        if self._looking is not None and not self._looking.done():
            return
        now = self._clock()
        young = bool(self._samples) and now - self._waits_since < YOUNG_S
        soon = young or sum(self._taken) >= LOOK_RUNS
        if now - self._looked_at >= (LOOK_SOON_S if soon else LOOK_S):
            self._looking = asyncio.create_task(self._look(), name="backlog-look")

    async def _look(self) -> None:
        assert self._lanes is not None  # noqa: S101 - check returned before
        before, self._taken = self._taken, [0] * LANES
        try:
            self.learn(await self._lanes.look())
        except Unavailable as error:
            self._taken = list(map(add, before, self._taken))
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
        self._waiting = tuple(map(add, look.waiting, look.held))
        if not sample.waiting:
            self._rest_at(sample)
        if not any(look.waiting):
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

    def _rest_at(self, sample: _Sample) -> None:
        """All that was accepted has come to its end: so many outcomes belong to so many runs."""
        if self._rest is None:
            self._sizes.forget()
        else:
            self._sizes.rest(sample.ended - self._rest.ended)
        self._rest = sample
