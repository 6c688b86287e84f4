"""Deadlines and lanes: which band of time left a piece of work belongs to."""

from __future__ import annotations

import math

from headrace.clock import parse_deadline, parse_duration
from headrace.model import Route
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


def deadline_of(route: Route, asked: str | None, now: float) -> float | None:
    """Return the instant by which the answer is due: as asked with the trigger, else as the route says, else None.

    Raises:
        BadRequest: what was asked for is neither a duration nor an instant.
    """
    if asked is not None:
        return parse_deadline(asked, now)
    return None if route.deadline is None else now + parse_duration(route.deadline, "deadline")
