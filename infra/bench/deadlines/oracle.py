"""Who knows every duration and the whole future: what can be reached, and what nobody can.

``best`` is a schedule that exists: jobs are placed by value per second, each where it first fits between those already
placed, without moving them and without interrupting any (Moore and Hodgson's rule as a greedy); the orders of the
table, and Headrace told the true durations, stand for election too, so the oracle is never below one of them.
``bound`` is what no schedule can exceed: work may be interrupted, spread over all slots at once, and what is done of it
counts in part. There the greedy by value per second is optimal, and cheap on a grid of instants (releases rounded down,
deadlines up, which can only help).
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from infra.bench.deadlines.traces import Job

GRID = 400


def placed(jobs: list[Job], slots: int, values: list[float]) -> list[bool]:
    """Return of each job whether the greedy found a place for it that ends by its deadline."""
    begins: list[list[float]] = [[] for _ in range(slots)]
    ends: list[list[float]] = [[] for _ in range(slots)]
    found = [False] * len(jobs)
    ranked = sorted(range(len(jobs)), key=lambda place: (-values[place] / jobs[place].seconds, jobs[place].deadline))
    for place in ranked:
        job = jobs[place]
        best: tuple[float, int, int] | None = None
        for slot in range(slots):
            begin, end = begins[slot], ends[slot]
            after = bisect_left(end, job.arrived)
            at = job.arrived
            while after < len(begin) and begin[after] < at + job.seconds:
                at = end[after]
                after += 1
                if at + job.seconds > job.deadline:
                    break
            if at + job.seconds <= job.deadline and (best is None or at < best[0]):
                best = (at, slot, after)
        if best is not None:
            at, slot, after = best
            begins[slot].insert(after, at)
            ends[slot].insert(after, at + job.seconds)
            found[place] = True
    return found


def bound(jobs: list[Job], slots: int, values: list[float]) -> float:
    """Return the value that no schedule on so many slots can exceed, as a share of all value."""
    instants = np.array([job.arrived for job in jobs] + [job.deadline for job in jobs])
    grid = np.unique(np.quantile(instants, np.linspace(0.0, 1.0, GRID), method="nearest"))
    release = np.searchsorted(grid, [job.arrived for job in jobs], side="right") - 1
    due = np.searchsorted(grid, [job.deadline for job in jobs], side="left")
    # room[a, b]: what the slots can still do between instants a and b, beyond what has to be done just there.
    room = slots * (grid[None, :] - grid[:, None])
    ranked = sorted(range(len(jobs)), key=lambda place: (-values[place] / jobs[place].seconds, jobs[place].deadline))
    reached = 0.0
    for place in ranked:
        job = jobs[place]
        if job.arrived + job.seconds > job.deadline + 1e-9:
            continue
        around = room[: release[place] + 1, due[place] :]
        done = min(job.seconds, float(around.min()))
        if done > 0.0:
            around -= done
            reached += values[place] * done / job.seconds
    return reached / sum(values)
