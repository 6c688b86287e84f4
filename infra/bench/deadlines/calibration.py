"""What the stated quantiles cover: every duration of a trace is forecast from what had ended before, then learned."""

from __future__ import annotations

import heapq

from msgspec import Struct

from functions.forecast import Forecasts, Kind
from infra.bench.deadlines.dags import Dag
from infra.bench.deadlines.makespans import kind
from infra.bench.deadlines.traces import Trace


class Coverage(Struct, frozen=True):
    """Of ``stated`` durations that were forecast, the shares that p50, p90 and p99 held; ``unknown`` had no history."""

    stated: int
    unknown: int
    p50: float
    p90: float
    p99: float


def coverage(pieces: list[tuple[float, float, Kind]]) -> Coverage:
    """Return what forecasts cover of these pieces of work: (began at, seconds, kind), in the order they began."""
    forecasts = Forecasts()
    running: list[tuple[float, int, float, Kind]] = []
    held = [0, 0, 0]
    stated = unknown = 0
    for place, (at, seconds, what) in enumerate(pieces):
        while running and running[0][0] <= at:
            ended, _, took, known = heapq.heappop(running)
            forecasts.learn(known, took, ended)
        forecast = forecasts.of(what)
        if forecast is None:
            unknown += 1
        else:
            stated += 1
            for which, bound in enumerate((forecast.p50_s, forecast.p90_s, forecast.p99_s)):
                held[which] += seconds <= bound
        heapq.heappush(running, (at + seconds, place, seconds, what))
    p50, p90, p99 = (count / max(1, stated) for count in held)
    return Coverage(stated, unknown, p50, p90, p99)


def of_trace(trace: Trace) -> Coverage:
    """Return the coverage of a trace as it arrived, each job run at once."""
    return coverage([(job.arrived, job.seconds, job.kind) for job in trace.jobs])


def of_dags(dags: list[Dag], rounds: int = 1) -> Coverage:
    """Return the coverage of the tasks of workflows, one workflow after another, each task when its parents ended."""
    pieces: list[tuple[float, float, Kind]] = []
    begin = 0.0
    for _ in range(rounds):
        for dag in dags:
            ends: list[float] = []
            for task in dag.tasks:
                at = max([begin, *(ends[parent] for parent in task.parents)])
                ends.append(at + task.seconds)
                if task.seconds > 0.0:
                    pieces.append((at, task.seconds, kind(dag, task)))
            begin = max(ends)
    return coverage(sorted(pieces, key=lambda piece: piece[0]))


def mean(of: list[Coverage]) -> Coverage:
    """Return the coverage of all of them together, each duration counting the same."""
    stated = sum(one.stated for one in of)
    return Coverage(
        stated,
        sum(one.unknown for one in of),
        sum(one.p50 * one.stated for one in of) / stated,
        sum(one.p90 * one.stated for one in of) / stated,
        sum(one.p99 * one.stated for one in of) / stated,
    )
