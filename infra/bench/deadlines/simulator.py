"""Slots and simulated time: jobs arrive, wait, run to their end and free a slot. Nothing is drawn by chance."""

from __future__ import annotations

import heapq

from infra.bench.deadlines.policies import Policy
from infra.bench.deadlines.traces import Job


def simulate(jobs: list[Job], slots: int, policy: Policy) -> list[float]:
    """Return the instant at which each job ended, in the order of the trace.

    At one instant, jobs end before others arrive, and all that have arrived are known before one is started.
    """
    ends = [0.0] * len(jobs)
    running: list[tuple[float, int]] = []
    coming = 0
    while coming < len(jobs) or running:
        now = running[0][0] if running else jobs[coming].arrived
        if coming < len(jobs):
            now = min(now, jobs[coming].arrived)
        while running and running[0][0] <= now:
            _, place = heapq.heappop(running)
            policy.ended(place, jobs[place], now)
        while coming < len(jobs) and jobs[coming].arrived <= now:
            policy.arrived(coming, jobs[coming], now)
            coming += 1
        while len(running) < slots:
            chosen = policy.take(now)
            if chosen is None:
                break
            ends[chosen] = now + jobs[chosen].seconds
            heapq.heappush(running, (ends[chosen], chosen))
    return ends


def met(jobs: list[Job], ends: list[float]) -> list[bool]:
    """Return of each job whether it ended by its deadline."""
    return [end <= job.deadline for job, end in zip(jobs, ends, strict=True)]
