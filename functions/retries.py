"""Whether a failed attempt is followed by another, and when."""

from __future__ import annotations

import random

from headrace.errors import FunctionError

FIRST_DELAY_S = 0.2
DELAY_S_MAX = 30.0


def retry_at(error: FunctionError, *, attempt: int, retries: int, now: float, rng: random.Random) -> float | None:
    """Return the instant of the next attempt, or None when the invocation is given up on.

    The delay doubles with each attempt and is drawn from its upper half, so that many that failed together do not
    come back together.

    Args:
        error: why the attempt failed; permanent errors (``retry`` is False) are not tried again.
        attempt: the number of the failed attempt, from 1.
        retries: how many attempts may follow the first.
        now: the present instant.
        rng: where the jitter comes from.
    """
    if not error.retry or attempt > retries:
        return None
    longest = min(DELAY_S_MAX, FIRST_DELAY_S * 2.0 ** (attempt - 1))
    return now + longest * (0.5 + 0.5 * rng.random())
