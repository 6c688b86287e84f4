"""Work that nobody needs any more once the deadline of its run has passed: it is stopped there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from headrace.errors import FunctionError
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
