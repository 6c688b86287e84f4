"""What the caller hears at the door: whether the answer will be there in time, and after how long.

A quote counts from acceptance: the work that is ahead now, the way to a worker, and from the start of the function to
the answer, as learned. Where parts vary, their spreads add up as those of independent durations do, and not as if the
worst of each came together. Nothing here does I/O; every accepted event passes through.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

from msgspec import Struct, structs

from functions import ladder
from functions.forecast import mean_s, size_class
from functions.outlook import Measure, Outlook
from headrace.model import Quote, Verdict
from headrace.wire import Expected, FunctionRecord
from streams.tables import row_key

AHEAD_SPREAD = 0.5  # of the wait for what is ahead: so much longer it may be, as its pace is known from seconds only
PACE_WEIGHT = 20.0  # what the slots should do counts like so many outcomes that were seen
NOTHING_KNOWN = Quote()


class Demand(Struct, frozen=True):
    """A run that is asked for: the bytes of its payload, and when it comes in; instants in epoch seconds.

    ``ahead_s`` is how long the work that waits before it keeps it waiting, in seconds. ``degrade`` says that a cheaper
    variant may answer in place of the function.
    """

    size: int
    ahead_s: float
    deadline: float | None
    now: float
    degrade: bool = False

    @property
    def left_s(self) -> float | None:
        """The seconds until the deadline, None without one."""
        return None if self.deadline is None else self.deadline - self.now


class Choice(Struct, frozen=True):
    """One way to the answer: what would run, what is expected of it, and whether it is taken, or why not."""

    function: str
    version: str
    quote: Quote
    chosen: bool
    why: str = ""


class Part(Struct, frozen=True):
    """A part of the time from acceptance to the answer, in seconds."""

    name: Literal["ahead", "wait", "run", "rest"]
    p50_s: float
    p90_s: float


def pace(ended: int, seconds: float, expected: float) -> float:
    """Return how many pieces of work are expected to end in a second, while some wait.

    Args:
        ended: how many did of late, while some waited.
        seconds: in how much time.
        expected: how many should, by the slots that there are and by what was learned of such work.
    """
    return (ended + PACE_WEIGHT) / (seconds + PACE_WEIGHT / expected)


def ahead_s(ahead: float, slots: int, per_second: float, since_s: float) -> float:
    """Return for how many seconds the work that is ahead keeps a new piece from a slot.

    Args:
        ahead: how many pieces had not ended when they were last counted, those that run included, and came since.
        slots: how many run at a time.
        per_second: how many end in a second while some wait.
        since_s: how long ago they were counted: some have ended since.
    """
    return max(0.0, (ahead + 1.0 - slots) / per_second - since_s)


def verdict(p50_s: float, p90_s: float, left_s: float | None) -> Verdict:
    """Return what these quantiles mean for a run with so many seconds left; without a deadline nothing is missed."""
    if left_s is None or p90_s <= left_s:
        return "on_track"
    return "at_risk" if p50_s <= left_s else "infeasible"


def quote(answer: Expected | None, wait: Expected | None, demand: Demand) -> Quote:
    """Return what to tell the caller.

    Args:
        answer: what is expected from the start of the function to the answer; None without history.
        wait: what is expected from acceptance to the start where nothing is ahead; none at all without history.
        demand: what is asked for. A deadline that has passed is missed whatever is known.
    """
    left_s, ahead_s = demand.left_s, demand.ahead_s
    if answer is None:
        return NOTHING_KNOWN if left_s is None or left_s > 0.0 else Quote(verdict="infeasible")
    p50_s = answer.p50_s + ahead_s
    spread = answer.p90_s - answer.p50_s
    spread = spread * spread + (AHEAD_SPREAD * ahead_s) ** 2
    if wait is not None:
        p50_s += wait.p50_s
        spread += (wait.p90_s - wait.p50_s) ** 2
    p90_s = p50_s + math.sqrt(spread)
    return Quote(verdict=verdict(p50_s, p90_s, left_s), p50_s=p50_s, p90_s=p90_s)


class Quoter:
    """Quotes what is asked for, by what was learned of such work."""

    def __init__(self, outlook: Outlook, function: Callable[[str, str], FunctionRecord | None]) -> None:
        """Begin.

        Args:
            outlook: what was learned.
            function: finds the current version of a function by its tenant and name.
        """
        self._outlook = outlook
        self._function = function

    def quote(self, function: FunctionRecord, demand: Demand) -> Quote:
        """Return what to tell of the way that will be taken."""
        if demand.degrade and function.options.variants:
            return self.plan(function, demand)[0].quote
        expected = self._about(function, demand.size)
        return quote(expected("answer"), expected("wait"), demand)

    def need_s(self, tenant: str, function: str, version: str, size: int) -> float | None:
        """Return how long a function is expected to keep a slot on average, in seconds; None without history.

        Args:
            tenant: whose it is.
            function: its name.
            version: its version.
            size: the bytes of its payload.
        """
        found = self._outlook.of("run", row_key(tenant, function), version, size=size_class(size))
        return None if found is None else mean_s(found.p50_s, found.p90_s)

    def plan(self, function: FunctionRecord, demand: Demand) -> list[Choice]:
        """Return all ways that there are, the one that will be taken first."""
        left_s = demand.left_s
        if not (demand.degrade and function.options.variants and left_s is not None):
            plain = structs.replace(demand, degrade=False)
            return [Choice(function.name, function.version, self.quote(function, plain), chosen=True)]
        wait = self._about(function, demand.size)("wait")
        find = partial(self._function, function.tenant)
        rungs = ladder.choices(function, find, self._outlook, size=size_class(demand.size))
        # A worker chooses when the function is about to start; it is expected to find so much less time left.
        picked = ladder.pick(rungs, left_s - demand.ahead_s - (0.0 if wait is None else wait.p50_s))
        why = {rejected.level: rejected.why for rejected in picked.rejected}
        found: list[Choice] = []
        for rung in rungs:
            record = function if rung.level == 0 else find(rung.function)
            expected = (
                None if record is None else ladder.expected_answer(self._outlook, record, size_class(demand.size))
            )
            chosen = rung.level == picked.choice.level
            reason = "" if chosen else why.get(rung.level, f"{picked.choice.function} is better and fits")
            found.append(Choice(rung.function, rung.version, quote(expected, wait, demand), chosen, reason))
        return sorted(found, key=lambda choice: not choice.chosen)

    def due(self, function: FunctionRecord, size: int, deadline: float | None, now: float) -> float | None:
        """Return by when the function should have ended, so that what follows leads to the answer in time.

        Args:
            function: what runs first.
            size: the bytes of its payload.
            deadline: of the run, epoch seconds or None.
            now: when it comes in, epoch seconds.
        """
        if deadline is None:
            return None
        return self._outlook.due(deadline, _key(function), function.version, size_class(size), now)

    def parts(self, function: FunctionRecord, demand: Demand) -> list[Part]:
        """Return where the time of the way that will be taken is expected to go, as far as it is known, in order."""
        taken = self.plan(function, demand)[0].function
        if taken != function.name:
            function = self._function(function.tenant, taken) or function
        parts = [Part("ahead", demand.ahead_s, demand.ahead_s * (1.0 + AHEAD_SPREAD))] if demand.ahead_s > 0.0 else []
        measures: tuple[Literal["wait", "run", "rest"], ...] = ("wait", "run", "rest")
        expected = self._about(function, demand.size)
        for measure in measures:
            found = expected(measure)
            if found is not None:
                parts.append(Part(measure, found.p50_s, found.p90_s))
        return parts

    def _about(self, function: FunctionRecord, size: int) -> Callable[[Measure], Expected | None]:
        """Return what tells of a measure what is expected of a function with a payload of so many bytes."""
        return partial(self._outlook.of, function=_key(function), version=function.version, size=size_class(size))


def _key(function: FunctionRecord) -> str:
    """Return the name under which is learned of a function: two tenants' functions of one name are two."""
    return row_key(function.tenant, function.name)
