"""How urgent a job is, which are submitted together, and which are run again: decided without I/O."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

import msgspec
from msgspec import structs

from headrace.jobs import JobSpec
from headrace.wire import Invocation

# What would come again if the same job were run again.
PERMANENT = frozenset(
    {"walltime", "out_of_memory", "deadline", "launch", "canceled", "rejected", "stage_in", "site_ended"}
)
DELAY_FIRST_S = 0.5
DELAY_S_MAX = 30.0
DELAY_SHARE = 0.1  # of the time that is left to the deadline, a job never waits for more than this before it is tried


class Waiting(Protocol):
    """A job that waits to be submitted."""

    @property
    def invocation(self) -> Invocation:
        """Return its invocation."""

    @property
    def seq(self) -> int:
        """Return its place in the log."""


W = TypeVar("W", bound=Waiting)


def urgency(waiting: Waiting) -> tuple[float, int]:
    """Return what jobs are sorted by: what is due first comes first, then what came first."""
    invocation = waiting.invocation
    due = invocation.deadline if invocation.due is None else invocation.due
    return (float("inf") if due is None else due, waiting.seq)


def together(jobs: Iterable[W], together_max: int) -> list[list[W]]:
    """Return jobs in groups of one ensemble, at most ``together_max`` in each, in the order of their first ones."""
    groups: list[list[W]] = []
    open_groups: dict[tuple[str, str], list[W]] = {}
    for one in jobs:
        slot = one.invocation.slot
        ensemble = None if slot is None else (one.invocation.run_id, slot.scope)
        group = None if ensemble is None else open_groups.get(ensemble)
        if group is not None and len(group) < together_max:
            group.append(one)
            continue
        groups.append([one])
        if ensemble is not None:
            open_groups[ensemble] = groups[-1]
    return groups


def shape(spec: JobSpec) -> JobSpec:
    """Return what jobs that are submitted at once have in common: all but what each one's own folder holds."""
    return structs.replace(spec, arguments=[], environment={}, inputs={}, outputs=[], directory=None)


def alike(specs: Sequence[JobSpec], together_max: int) -> list[list[int]]:
    """Return which of these jobs differ in arguments, environment and files only, by their places."""
    groups: list[list[int]] = []
    open_groups: dict[bytes, list[int]] = {}
    for place, spec in enumerate(specs):
        common = msgspec.json.encode(shape(spec))
        group = open_groups.get(common)
        if group is None or len(group) >= together_max:
            group = open_groups[common] = []
            groups.append(group)
        group.append(place)
    return groups


def again(spec: JobSpec, reason: str, attempt: int) -> bool:
    """Say whether a job that failed is run again. ``attempt`` is the number of the one that failed, the first is 1."""
    return attempt <= spec.retries and reason not in PERMANENT


def delay_s(tries: int, left_s: float | None) -> float:
    """Return how long a job waits that could not be submitted now, in seconds.

    Args:
        tries: how often it was tried; the delay doubles with each.
        left_s: seconds to its deadline, None without one.
    """
    delay = min(DELAY_S_MAX, DELAY_FIRST_S * 2.0 ** min(tries - 1, 16))
    if left_s is None or left_s <= 0:
        return delay
    return max(DELAY_FIRST_S, min(delay, left_s * DELAY_SHARE))
