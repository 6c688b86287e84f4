"""The orders that are compared. All but the last know nothing of durations; none knows what is to come."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Protocol

from functions.forecast import Forecasts, left_s
from functions.order import Order, Work
from infra.bench.deadlines.traces import Job


class Policy(Protocol):
    """An order as the simulator drives it; a job is named by its place in the trace."""

    def arrived(self, place: int, job: Job, now: float) -> None:
        """A job waits from now on."""

    def take(self, now: float) -> int | None:
        """Return the job to start on a slot that is free now; None if none waits."""

    def ended(self, place: int, job: Job, now: float) -> None:
        """A job that was started has ended now."""


class Ranked:
    """The order by a rank that a job has once and for all."""

    def __init__(self, rank: Callable[[Job], tuple[float, ...]]) -> None:
        self._rank = rank
        self._heap: list[tuple[tuple[float, ...], int]] = []

    def arrived(self, place: int, job: Job, now: float) -> None:
        heapq.heappush(self._heap, (self._rank(job), place))

    def take(self, now: float) -> int | None:
        return heapq.heappop(self._heap)[1] if self._heap else None

    def ended(self, place: int, job: Job, now: float) -> None:
        return


class Headrace:
    """The order of ``functions.order`` with forecasts learned from the jobs that have ended.

    With ``told`` it is given the true durations: a part of the oracle, not of Headrace.
    """

    def __init__(self, slots: int, *, told: bool = False) -> None:
        self._order = Order(slots=slots)
        self._forecasts = Forecasts()
        self._told = told
        self._expected: dict[int, tuple[float, float]] = {}
        self._running: dict[int, float] = {}

    def arrived(self, place: int, job: Job, now: float) -> None:
        p50 = p90 = None
        if self._told:
            p50 = p90 = job.seconds
        elif (forecast := self._forecasts.of(job.kind)) is not None:
            p50, p90 = forecast.p50_s, forecast.p90_s
        if p50 is not None and p90 is not None:
            self._expected[place] = (p50, p90)
        self._order.add(
            Work(
                id=str(place),
                tenant=job.tenant,
                arrived=now,
                deadline=job.deadline,
                p50_s=p50,
                p90_s=p90,
                value=job.value,
            ),
            now,
        )

    def take(self, now: float) -> int | None:
        busy = [left_s(*self._expected.get(place, (0.0, 0.0)), now - began) for place, began in self._running.items()]
        chosen = self._order.take(now, busy).start
        if chosen is None:
            return None
        place = int(chosen.id)
        self._running[place] = now
        return place

    def ended(self, place: int, job: Job, now: float) -> None:
        began = self._running.pop(place)
        self._expected.pop(place, None)
        if not self._told:
            self._forecasts.learn(job.kind, now - began, now)


def policies(slots: int) -> dict[str, Policy]:
    """Return a fresh one of each, by the name it has in the table."""
    return {
        "FIFO": Ranked(lambda job: (job.arrived,)),
        "priority": Ranked(lambda job: (-job.value, job.arrived)),
        "EDF": Ranked(lambda job: (job.deadline,)),
        "Headrace": Headrace(slots),
    }
