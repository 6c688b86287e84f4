"""Work that nobody needs any more: the deadline of its run has passed, or it has waited for too long."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from headrace.errors import FunctionError
from headrace.model import ErrorInfo, InvocationState
from headrace.wire import Invocation

T = TypeVar("T")


class Late(FunctionError):
    """The deadline of its run passed while it ran, and its route says that nobody needs the answer then."""

    title = "The deadline has passed"
    kind = "deadline"


def useful_s(invocation: Invocation, now: float) -> float | None:
    """Return for how many seconds more an invocation is worth running; None for as long as it takes."""
    if invocation.on_late != "cancel" or invocation.deadline is None:
        return None
    return invocation.deadline - now


def hopeless(
    invocation: Invocation, since: float, now: float, age_max_s: float
) -> tuple[ErrorInfo, InvocationState] | None:
    """Return how a job ends that is not worth submitting, or None.

    Args:
        invocation: the job's.
        since: when it began to wait.
        now: likewise in epoch seconds.
        age_max_s: how long it may wait, in seconds.
    """
    left_s = useful_s(invocation, now)
    if left_s is not None and left_s <= 0:
        return ErrorInfo(kind="deadline", message="the deadline passed before it was submitted"), "canceled"
    if now - since > age_max_s:
        message = f"it waited {now - since:,.0f} s to be submitted; the limit is {age_max_s:,.0f} s"
        return ErrorInfo(kind="expired", message=message), "dead"
    return None


async def stopped_after(seconds: float, running: Coroutine[Any, Any, T]) -> T:
    """Return what ``running`` gives, unless it takes longer.

    Raises:
        Late: it does; it was stopped.
    """
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await running
    except TimeoutError:
        if not limit.expired():
            raise
        raise Late("the deadline passed while it ran, and it was stopped") from None
