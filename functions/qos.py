"""Deadlines and lanes: which band of time left a piece of work belongs to."""

from __future__ import annotations

import math

from headrace.clock import parse_deadline, parse_duration
from headrace.model import Route
from headrace.wire import Expected
from streams.topology import LANES

LAST_LANE = LANES - 1


def lane(deadline: float | None, now: float) -> int:
    """Return ``floor(log2(time left in seconds))`` clamped to 0..11; work without deadline is in lane 11.

    Inside a lane first in, first out is nearly earliest deadline first, because its deadlines differ by a factor of
    two at most when they are appended.
    """
    if deadline is None:
        return LAST_LANE
    left = deadline - now
    return 0 if left < 2.0 else min(LAST_LANE, int(math.log2(left)))


def due_of(deadline: float, rest: Expected | None, now: float) -> float:
    """Return the instant by which an invocation should have ended, so that the answer of its run is there in time.

    Where the rest of the way will rarely fit in any more, it is due as if all went as usual; where not even that fits,
    and where nothing is known, it is due when the answer is.

    Args:
        deadline: by when the answer has to be there.
        rest: what is expected of the time from the end of the invocation to the answer.
        now: when the invocation can start.
    """
    if rest is None:
        return deadline
    if deadline - rest.p90_s > now:
        return deadline - rest.p90_s
    return deadline - rest.p50_s if deadline - rest.p50_s > now else deadline


def deadline_of(route: Route, asked: str | None, now: float) -> float | None:
    """Return the instant by which the answer is due: as asked with the trigger, else as the route says, else None.

    Raises:
        BadRequest: what was asked for is neither a duration nor an instant.
    """
    if asked is not None:
        return parse_deadline(asked, now)
    return None if route.deadline is None else now + parse_duration(route.deadline, "deadline")
