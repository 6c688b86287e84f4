"""The orders that work can be taken in, by name: the one that keeps deadlines, and three to compare it with.

Workers, the simulation and the replay of the past are all driven by what ``policy`` returns, and see no more of it than
``Waiting``.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Protocol

from functions.order import Decision, Order, Work
from headrace.errors import BadRequest
from headrace.wire import Invocation

COMPACT_MIN = 64  # entries of work that is gone, below which a heap is left as it is


class Waiting(Protocol):
    """Work that waits for one set of slots; the time is told by the caller, who keeps count of what runs."""

    def __len__(self) -> int:
        """How many pieces of work wait."""

    def add(self, work: Work, now: float) -> Work | None:
        """Let work wait. Return what need not be done as there is newer work of its subject: another, or this one."""

    def take(self, now: float, busy_s: Sequence[float] = ()) -> Decision:
        """Return what to start on a slot that is free now, and what is not worth starting any more.

        Nothing may be started although some work waits: then a slot is kept for more urgent work.
        ``busy_s`` holds for each slot that is busy how many seconds more it is expected to be.
        """

    def drop(self, identity: str) -> Work | None:
        """Let go of work that waits; None if it does not wait here."""

    def put_off(self, identity: str) -> bool:
        """Say whether work waits behind other work because it is not expected to make its deadline."""


class Ranked:
    """The order by a rank that work has once and for all, and then by arrival. It knows nothing of durations."""

    def __init__(self, rank: Callable[[Work], float]) -> None:
        """Begin with nothing; the lowest rank is first."""
        self._rank = rank
        self._heap: list[tuple[float, float, int, str]] = []
        self._waits: dict[str, tuple[int, Work]] = {}
        self._number = 0

    def __len__(self) -> int:
        """How many pieces of work wait."""
        return len(self._waits)

    def add(self, work: Work, now: float) -> Work | None:
        """Let work wait; every piece is as good as any other."""
        if len(self._heap) > 2 * len(self._waits) + COMPACT_MIN:
            self._heap = [one for one in self._heap if self._waits.get(one[3], (0,))[0] == one[2]]
            heapq.heapify(self._heap)
        self._number += 1
        self._waits[work.id] = (self._number, work)
        heapq.heappush(self._heap, (self._rank(work), work.arrived, self._number, work.id))
        return None

    def take(self, now: float, busy_s: Sequence[float] = ()) -> Decision:
        """Return the work with the lowest rank."""
        while self._heap:
            _, _, number, identity = heapq.heappop(self._heap)
            known = self._waits.get(identity)
            if known is not None and known[0] == number:
                del self._waits[identity]
                return Decision(known[1])
        return Decision(None)

    def drop(self, identity: str) -> Work | None:
        """Let go of work that waits."""
        known = self._waits.pop(identity, None)
        return None if known is None else known[1]

    def put_off(self, identity: str) -> bool:
        """Nothing is put off here."""
        return False


def _deadline(work: Work) -> float:
    return float("inf") if work.deadline is None else work.deadline


_POLICIES: dict[str, Callable[[int], Waiting]] = {
    "headrace": lambda slots: Order(slots=slots),
    "edf": lambda slots: Ranked(_deadline),
    "fifo": lambda slots: Ranked(lambda work: work.arrived),
    "priority": lambda slots: Ranked(lambda work: -work.value),
}
POLICIES = tuple(_POLICIES)


def policy(name: str, slots: int) -> Waiting:
    """Return an empty order of this name for so many slots.

    Raises:
        BadRequest: there is no order of this name.
    """
    make = _POLICIES.get(name)
    if make is None:
        raise BadRequest(f"there is no order named {name}", hint=f"There are {', '.join(POLICIES)}.")
    return make(slots)


def work_of(
    invocation: Invocation, *, identity: str, arrived: float, run: tuple[float, float] | None, path_s: float = 0.0
) -> Work:
    """Return an invocation as an order sees it.

    Args:
        invocation: what waits.
        identity: what it is called while it waits.
        arrived: when it was stored in the log.
        run: p50 and p90 of how long it is expected to run, in seconds; None where nothing is known.
        path_s: how long it is expected to be from its start to the answer of its run, in seconds.
    """
    due = invocation.deadline if invocation.due is None else invocation.due
    return Work(
        id=identity,
        tenant=invocation.tenant,
        arrived=arrived,
        deadline=due,
        p50_s=None if run is None else run[0],
        p90_s=None if run is None else run[1],
        if_late=invocation.on_late,
        late_at=invocation.deadline,
        run_at=invocation.accepted_at,
        path_s=path_s,
        subject=invocation.newest or None,
    )
