"""The steps that led to an invocation: carried along, so that an answer teaches without looking anything up.

Whoever is at the end of the way tells with one message how long it took from each step on. Only the way to the answer
counts: of the members of a map it goes over the one that ended last, since the others waited for it.
"""

from __future__ import annotations

from functions.forecast import size_class
from headrace.wire import Invocation, Outcome, Step

STEPS_MAX = 16
FIRST_MAX = 4  # of these; where a chain is longer, its middle is left out
BROAD_STEPS_MAX = 4  # that each of many branches carries
BROAD = 64  # so many branches at once are many


def belongs_to_platform(function: str) -> bool:
    """Return whether nobody wrote this function: what the platform does by itself teaches nothing about others."""
    return "." in function or not function


def of(outcome: Outcome) -> list[Step]:
    """Return the steps that led to the end of an invocation which ended well, its own the last."""
    if belongs_to_platform(outcome.function):
        return outcome.trail
    last = Step(outcome.function, outcome.version, outcome.size, outcome.started_at, outcome.ended_at)
    return cut([*outcome.trail, last])


def onward(invocation: Invocation, started_at: float, ended_at: float, branches: int) -> list[Step]:
    """Return the trail of what an invocation starts that ended well.

    Args:
        invocation: what ended.
        started_at: when its last attempt began, in epoch seconds.
        ended_at: when that ended.
        branches: how many invocations follow at once; each of many carries less.
    """
    if belongs_to_platform(invocation.function):
        return invocation.trail
    size = size_class(invocation.payload.size)
    last = Step(invocation.function, invocation.version, size, started_at, ended_at)
    return cut([*invocation.trail, last], BROAD_STEPS_MAX if branches >= BROAD else STEPS_MAX)


def cut(steps: list[Step], most: int = STEPS_MAX) -> list[Step]:
    """Return at most so many steps: the first few and the last ones."""
    if len(steps) <= most:
        return steps
    first = min(FIRST_MAX, most // 2)
    return [*steps[:first], *steps[len(steps) - (most - first) :]]
