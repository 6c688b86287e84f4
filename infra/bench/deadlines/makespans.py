"""Workflows without deadline: how long from the start of each to its end, first in first out and by learned paths."""

from __future__ import annotations

from msgspec import Struct

from functions.forecast import Forecasts, Kind
from functions.order import Work
from functions.policies import policy
from functions.simulate import Piece, simulate
from infra.bench.deadlines.dags import Dag, Task

SLOTS = (4, 8, 16)
SPACING = 0.1  # of the time all need together: how far apart workflows come when they share the slots


class Gain(Struct, frozen=True):
    """How much shorter makespans are than with FIFO: the mean over workflows, the least and the most, as shares."""

    mean: float
    least: float
    most: float


def kind(dag: Dag, task: Task) -> Kind:
    """Return what a task has in common with those it is forecast from."""
    return Kind(f"{dag.name}.{task.category}", "1", "", task.size)


def learned(dags: list[Dag]) -> Forecasts:
    """Return what one earlier run of each workflow teaches, task after task."""
    forecasts = Forecasts()
    for dag in dags:
        now = 0.0
        for task in dag.tasks:
            now += task.seconds
            forecasts.learn(kind(dag, task), task.seconds, now)
    return forecasts


def _pieces(dags: list[Dag], starts: list[float], forecasts: Forecasts) -> list[Piece]:
    """Return the tasks of all workflows, each with the longest path from it to the end, as it is expected to be."""
    found: list[Piece] = []
    for at, (dag, start) in enumerate(zip(dags, starts, strict=True)):
        means = [known.mean_s if (known := forecasts.of(kind(dag, task))) is not None else 0.0 for task in dag.tasks]
        path = list(means)
        for place in reversed(range(len(dag.tasks))):
            for parent in dag.tasks[place].parents:
                path[parent] = max(path[parent], means[parent] + path[place])
        first = len(found)
        for place, task in enumerate(dag.tasks):
            work = Work(
                id=f"{at} {place}",
                tenant="all",
                arrived=start,
                p50_s=means[place],
                run_at=start,
                run_s=sum(means),
                path_s=path[place],
            )
            found.append(Piece(work, task.seconds, None, tuple(first + parent for parent in task.parents)))
    return found


def makespans(name: str, dags: list[Dag], starts: list[float], slots: int, forecasts: Forecasts) -> list[float]:
    """Return the makespan of each workflow, in seconds, under the policy of this name."""
    ends = iter(simulate(_pieces(dags, starts, forecasts), slots, policy(name, slots)))
    return [
        max(next(ends).at for _ in dag.tasks) - start if dag.tasks else 0.0
        for dag, start in zip(dags, starts, strict=True)
    ]


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
        before, after = (
            [makespans(name, one, start, slots, forecasts)[0] for one, start in alone] for name in ("fifo", "headrace")
        )
        found[f"each alone, {slots} slots"] = _gain(before, after)
        found[f"each alone, {slots} slots: no order gains more"] = _gain(before, [least(dag, slots) for dag in dags])
        span = sum(task.seconds for dag in dags for task in dag.tasks) / slots
        for what, spacing in (("all at once", 0.0), ("one after another", SPACING)):
            starts = [place * spacing * span for place in range(len(dags))]
            before, after = (makespans(name, dags, starts, slots, forecasts) for name in ("fifo", "headrace"))
            found[f"{what}, {slots} slots"] = _gain(before, after)
    return found
