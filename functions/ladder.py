"""Which variant of a function to run in the time that is left, and when a cheaper one has to begin: pure.

A function and its variants are the rungs of a ladder: level 0 is the full function, each next one is cheaper. Taken is
the best rung of which nine answers in ten fit into the time left. One that was never seen is taken to fit: a first run
is not degraded without a reason. What keeps the promise then is the rescue: while a rung runs, the next one that still
fits begins so early that it can answer in time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import Struct

from functions.outlook import Outlook
from headrace.clock import parse_duration
from headrace.model import Fidelity
from headrace.wire import Expected, FunctionRecord
from streams.tables import row_key

RESCUE_MARGIN_S = 0.3  # from "begin" to "runs": appended, delivered, and its code loaded in another child
UNKNOWN_SHARE = 0.5  # of the time left: what a rung that was never seen is given


class Choice(Struct, frozen=True, kw_only=True):
    """A rung that can be chosen: ``p90_s`` is how long nine answers in ten take from its start, None if never seen.

    ``timeout_s`` is the longest that one attempt may take; ``wait_s`` how long work like it waits before it begins.
    """

    level: int
    function: str
    version: str
    timeout_s: float
    p90_s: float | None = None
    observations: int = 0
    wait_s: float = 0.0

    @property
    def told(self) -> str:
        """What is expected of it, in words."""
        if self.p90_s is None:
            return f"{self.function} was never seen"
        return f"{self.function} takes {self.p90_s:.3g} s (9 in 10 of {self.observations:,})"


class Rejected(Struct, frozen=True, kw_only=True):
    """A better rung that was not taken, and why."""

    level: int
    function: str
    why: str


class Pick(Struct, frozen=True, kw_only=True):
    """The rung that is taken; ``fits`` says whether it is expected to answer in time."""

    choice: Choice
    fits: bool
    rejected: list[Rejected] = []


class Rescue(Struct, frozen=True, kw_only=True):
    """The rung that answers if the one that runs has not ended by then; ``at`` is in epoch seconds."""

    choice: Choice
    at: float


def choices(
    full: FunctionRecord, function: Callable[[str], FunctionRecord | None], outlook: Outlook, *, size: int
) -> list[Choice]:
    """Return the rungs of a function, the full one first. A variant that is not registered any more is left out.

    Args:
        full: the function.
        function: finds the current version of another one.
        outlook: what was learned.
        size: the size class of the payload.
    """
    found: list[Choice] = []
    for level, name in enumerate([full.name, *full.options.variants]):
        record = full if level == 0 else function(name)
        if record is None:
            continue
        expected = expected_answer(outlook, record, size)
        wait = outlook.of("wait", row_key(record.tenant, record.name), record.version, size=size)
        found.append(
            Choice(
                level=level,
                function=record.name,
                version=record.version,
                timeout_s=parse_duration(record.options.timeout),
                p90_s=None if expected is None else expected.p90_s,
                observations=0 if expected is None else expected.observations,
                wait_s=0.0 if wait is None else wait.p90_s,
            )
        )
    return found


def expected_answer(outlook: Outlook, record: FunctionRecord, size: int) -> Expected | None:
    """Return how long it takes from the start of a function to its answer; its run time where that was never seen."""
    key = row_key(record.tenant, record.name)
    return outlook.of("answer", key, record.version, size=size) or outlook.of("run", key, record.version, size=size)


def pick(rungs: Sequence[Choice], left_s: float) -> Pick:
    """Return the best rung that answers in the time left, and why no better one was taken.

    Where none does, the quickest is taken: then the answer is as little late as it can be.

    Args:
        rungs: at least one, the best first.
        left_s: seconds to the deadline; negative when it has passed.
    """
    rejected: list[Rejected] = []
    for rung in rungs:
        if left_s > 0.0 and (rung.p90_s is None or rung.p90_s <= left_s):
            return Pick(choice=rung, fits=True, rejected=rejected)
        why = f"the deadline was {-left_s:.3g} s ago" if left_s <= 0.0 else f"{rung.told}, and {left_s:.3g} s are left"
        rejected.append(Rejected(level=rung.level, function=rung.function, why=why))
    # One that was never seen is quick or slow; the last rung was made to be quick.
    quickest = min(reversed(rungs), key=lambda rung: rung.p90_s if rung.p90_s is not None else 0.0)
    return Pick(choice=quickest, fits=False, rejected=[each for each in rejected if each.level != quickest.level])


def rescue(below: Sequence[Choice], deadline: float, now: float) -> Rescue | None:
    """Return the rung that answers if the one that begins now has not ended, and when it has to begin for that.

    It is the best one that still fits; where none does, the last one, at once. None where there is none.

    Args:
        below: the rungs below the one that begins now, the best first.
        deadline: by when the answer is due, in epoch seconds.
        now: the present instant.
    """
    if not below:
        return None
    for rung in below:
        at = deadline - needed_s(rung, deadline - now)
        if at >= now:
            return Rescue(choice=rung, at=at)
    return Rescue(choice=below[-1], at=now)


def needed_s(rung: Choice, left_s: float) -> float:
    """Return how many seconds before the deadline a rescue has to begin.

    One that was never seen gets half the time that is left, or all that it may take if that is less.
    """
    if rung.p90_s is not None:
        return rung.p90_s + rung.wait_s + RESCUE_MARGIN_S
    return min(rung.timeout_s + RESCUE_MARGIN_S, max(0.0, left_s) * UNKNOWN_SHARE)


def fidelity_of(level: int, function: str, of: int) -> Fidelity:
    """Return what an answer of this rung is worth."""
    return Fidelity(level=level, function=function, of=of)
