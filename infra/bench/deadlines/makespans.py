"""Workflows without deadline: how long from the start of each to its end, first in first out and by learned paths."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from msgspec import Struct

from functions.forecast import Forecasts, Kind
from functions.order import Order, Work
from infra.bench.deadlines.dags import Dag, Task

SLOTS = (4, 8, 16)
SPACING = 0.1  # of the time all need together: how far apart workflows come when they share the slots

# Names a ready task: workflow, task.
Ready = tuple[int, int]
Pick = Callable[[float], Ready | None]


class Gain(Struct, frozen=True):
    """How much shorter makespans are than with FIFO: the mean over workflows, the least and the most, as shares."""

    mean: float
    least: float
    most: float


def kind(dag: Dag, task: Task) -> Kind:
    """Return what a task has in common with those it is forecast from."""
    return Kind(f"{dag.name}.{task.category}", "1", "", task.size)


def _run(
    dags: list[Dag], starts: list[float], slots: int, add: Callable[[Ready, float], None], take: Pick
) -> list[float]:
    """Simulate, and return the makespan of each workflow in seconds."""
    waits = [[len(set(task.parents)) for task in dag.tasks] for dag in dags]
    children: list[list[list[int]]] = [[[] for _ in dag.tasks] for dag in dags]
    for at, dag in enumerate(dags):
        for place, task in enumerate(dag.tasks):
            for parent in set(task.parents):
                children[at][parent].append(place)
    events: list[tuple[float, int, int, int]] = [(start, 0, at, -1) for at, start in enumerate(starts)]
    heapq.heapify(events)
    ended = list(starts)
    busy = 0
    while events:
        now = events[0][0]
        while events and events[0][0] <= now:
            _, _, at, place = heapq.heappop(events)
            if place < 0:
                ready = [index for index, count in enumerate(waits[at]) if count == 0]
            else:
                busy -= 1
                ended[at] = now
                ready = []
                for child in children[at][place]:
                    waits[at][child] -= 1
                    if waits[at][child] == 0:
                        ready.append(child)
            for index in ready:
                add((at, index), now)
        while busy < slots and (chosen := take(now)) is not None:
            at, place = chosen
            busy += 1
            heapq.heappush(events, (now + dags[at].tasks[place].seconds, 1, at, place))
    return [end - start for end, start in zip(ended, starts, strict=True)]


def fifo(dags: list[Dag], starts: list[float], slots: int) -> list[float]:
    """Return the makespans, in seconds, of tasks started in the order in which they became ready."""
    queue: list[tuple[float, int, Ready]] = []
    count = iter(range(1 << 62))

    def add(ready: Ready, now: float) -> None:
        heapq.heappush(queue, (now, next(count), ready))

    return _run(dags, starts, slots, add, lambda now: heapq.heappop(queue)[2] if queue else None)


def learned(dags: list[Dag]) -> Forecasts:
    """Return what one earlier run of each workflow teaches, task after task."""
    forecasts = Forecasts()
    for dag in dags:
        now = 0.0
        for task in dag.tasks:
            now += task.seconds
            forecasts.learn(kind(dag, task), task.seconds, now)
    return forecasts


def headrace(dags: list[Dag], starts: list[float], slots: int, forecasts: Forecasts) -> list[float]:
    """Return the makespans, in seconds, in the order of ``functions.order`` with paths of learned durations."""
    order = Order(slots=slots)
    expected: list[list[float]] = []
    paths: list[list[float]] = []
    for dag in dags:
        means = [known.mean_s if (known := forecasts.of(kind(dag, task))) is not None else 0.0 for task in dag.tasks]
        path = list(means)
        for place in reversed(range(len(dag.tasks))):
            for parent in dag.tasks[place].parents:
                path[parent] = max(path[parent], means[parent] + path[place])
        expected.append(means)
        paths.append(path)
    total = [sum(means) for means in expected]

    def add(ready: Ready, now: float) -> None:
        at, place = ready
        work = Work(
            id=f"{at} {place}",
            tenant="all",
            arrived=now,
            p50_s=expected[at][place],
            run_at=starts[at],
            run_s=total[at],
            path_s=paths[at][place],
        )
        order.add(work, now)

    def take(now: float) -> Ready | None:
        work = order.take(now).start
        if work is None:
            return None
        at, _, place = work.id.partition(" ")
        return int(at), int(place)

    return _run(dags, starts, slots, add, take)


def least(dag: Dag, slots: int) -> float:
    """Return what no makespan is below, in seconds: the longest path, and all work spread over the slots."""
    path: list[float] = []
    for task in dag.tasks:
        path.append(task.seconds + max((path[parent] for parent in task.parents), default=0.0))
    return max(*path, sum(task.seconds for task in dag.tasks) / slots)


def _gain(before: list[float], after: list[float]) -> Gain:
    shares = [1.0 - new / old for old, new in zip(before, after, strict=True) if old > 0.0]
    return Gain(sum(shares) / len(shares), min(shares), max(shares))


def gains(dags: list[Dag]) -> dict[str, Gain]:
    """Return the gains of each workflow alone, and of all sharing the slots, by what is compared."""
    forecasts = learned(dags)
    found: dict[str, Gain] = {}
    for slots in SLOTS:
        alone = [([dag], [0.0]) for dag in dags]
        before = [fifo(one, start, slots)[0] for one, start in alone]
        after = [headrace(one, start, slots, forecasts)[0] for one, start in alone]
        found[f"each alone, {slots} slots"] = _gain(before, after)
        found[f"each alone, {slots} slots: no order gains more"] = _gain(before, [least(dag, slots) for dag in dags])
        span = sum(task.seconds for dag in dags for task in dag.tasks) / slots
        for name, spacing in (("all at once", 0.0), ("one after another", SPACING)):
            starts = [place * spacing * span for place in range(len(dags))]
            found[f"{name}, {slots} slots"] = _gain(fifo(dags, starts, slots), headrace(dags, starts, slots, forecasts))
    return found
