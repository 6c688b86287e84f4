"""Whose job is next: places of a site, and the time of slots, in fair shares between tenants. Decided without I/O.

A place of a site goes to the tenant that has the fewest there at this moment, so that one who comes to a site that is
full of another's jobs gets the next place that is free, and all have as many before long. Of those who have as many it
goes to the one who has used the least time, as a slot of a worker does among those without a deadline. What is due
first goes first among the jobs of one tenant, and among those only: no tenant gains a place by setting deadlines.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence

from functions.ensembles import W, urgency


class Used:
    """How much time each tenant has used. One who comes back has no claim on the time in which he had no work."""

    def __init__(self) -> None:
        self._used_s: dict[str, float] = {}
        self._now_s = 0.0

    def join(self, tenant: str) -> float:
        """Return what counts as used by a tenant that begins to wait, in seconds."""
        used_s = self._used_s[tenant] = max(self._used_s.get(tenant, 0.0), self._now_s)
        return used_s

    def turn(self, used_s: float) -> None:
        """Take note that it was the turn of one who had used so much."""
        self._now_s = max(self._now_s, used_s)

    def use(self, tenant: str, seconds: float) -> float:
        """Take note that a tenant uses so many seconds more, and return how many those are in all."""
        used_s = self._used_s[tenant] = self._used_s.get(tenant, 0.0) + seconds
        return used_s

    def of(self, tenant: str) -> float:
        """Return how much a tenant has used, in seconds."""
        return self._used_s.get(tenant, 0.0)


class Shares:
    """Gives the places of one site to jobs."""

    def __init__(self) -> None:
        self._used = Used()
        self._there: frozenset[str] = frozenset()

    def ended(self, tenant: str, seconds: float) -> None:
        """Take note that a job of a tenant has had a place for so many seconds."""
        self._used.use(tenant, max(0.0, seconds))

    def next(self, waiting: Iterable[W], places: Mapping[str, int], free: int) -> list[W]:
        """Return what to begin now, in order, as long as there are places.

        Args:
            waiting: all that waits.
            places: how many places each tenant has already; who is not in it has none.
            free: how many are free.
        """
        queues: dict[str, list[W]] = {}
        for one in sorted(waiting, key=urgency, reverse=True):
            queues.setdefault(one.invocation.tenant, []).append(one)
        self._join({*queues, *(tenant for tenant, number in places.items() if number > 0)})
        turns = [_turn(tenant, queue, places.get(tenant, 0), self._used) for tenant, queue in queues.items()]
        heapq.heapify(turns)
        begun: list[W] = []
        while turns and len(begun) < free:
            has, used_s, _, tenant = turns[0]
            self._used.turn(used_s)
            queue = queues[tenant]
            begun.append(queue.pop())
            if queue:
                heapq.heapreplace(turns, _turn(tenant, queue, has + 1, self._used))
            else:
                heapq.heappop(turns)
        return begun

    def _join(self, there: set[str]) -> None:
        for tenant in sorted(there - self._there):
            self._used.join(tenant)
        self._there = frozenset(there)


def _turn(tenant: str, queue: Sequence[W], has: int, used: Used) -> tuple[int, float, tuple[float, int], str]:
    return has, used.of(tenant), urgency(queue[-1]), tenant
