"""Runs that do not come to an end: how many invocations one may have, and when that is worth counting."""

from __future__ import annotations

from headrace.errors import UserError
from headrace.wire import SPREADER, Invocation

INVOCATIONS_MAX = 1_000_000


def worth_counting(invocation: Invocation, starting: int, invocations_max: int) -> bool:
    """Return whether a run may pass this many invocations when this one starts so many.

    It is an estimate from the way that led here, as if all branches had branched alike, so that hardly any run ever
    has to be counted: not one with a loop or a chain, nor one with a single large map.
    """
    branches = 1 if invocation.function == SPREADER else starting  # its breadth holds all members of its map already
    return invocation.breadth * branches * (invocation.depth + 1) > invocations_max


def check_count(count: int, starting: int, invocations_max: int) -> None:
    """Refuse to go on with a run that has ``count`` invocations in the log.

    Raises:
        UserError: with so many more it would pass the limit.
    """
    if count + starting > invocations_max:
        raise UserError(
            f"the run has come to {count:,} invocations and would start {starting:,} more; "
            f"the limit is {invocations_max:,}",
            hint="Do functions that start each other come to an end? Else raise HEADRACE_RUN_INVOCATIONS_MAX.",
            transient=False,
        )
