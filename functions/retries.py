"""What earlier deliveries of an invocation left behind, and whether a failed attempt is followed by another."""

from __future__ import annotations

import random
from collections.abc import Iterable

from msgspec import Struct

from headrace.errors import FunctionError
from headrace.wire import Attempt, Lease, Started, decode
from streams.stored import Stored
from streams.topology import kind_of

FIRST_DELAY_S = 0.2
DELAY_S_MAX = 30.0
LOST_ATTEMPTS_MAX = 20


class Past(Struct, frozen=True, kw_only=True):
    """What the log holds of an invocation that was delivered before.

    ``fence`` is the sequence of its newest lease, 0 without one; ``attempt`` the number of the next attempt;
    ``failures`` how many attempts said that they failed, and ``failed_s`` how long those ran; ``retry_at`` the instant
    before which none may begin, and ``retry_s`` how long after the failure that was.
    """

    done: Stored | None = None
    fence: int = 0
    attempt: int = 1
    failures: int = 0
    retry_at: float = 0.0
    retry_s: float = 0.0
    failed_s: float = 0.0

    @property
    def lost(self) -> int:
        """How many attempts ended without a word: their worker died, was paused, or had no time left to finish."""
        return self.attempt - 1 - self.failures


NO_PAST = Past()


def look_back(found: Iterable[Stored]) -> Past:
    """Read the newest message of each subject that tells of an invocation's attempts: done, lease, start and try."""
    done: Stored | None = None
    fence = last = failures = 0
    retry_at = retry_s = failed_s = 0.0
    for stored in found:
        match kind_of(stored.subject):
            case "done":
                done = stored
            case "lease":
                fence = stored.seq
                last = max(last, decode(stored.body, Lease).attempt)
            case "start":
                last = max(last, decode(stored.body, Started).attempt)
            case "try":
                failed = decode(stored.body, Attempt)
                failures += 1
                failed_s += max(0.0, failed.ended_at - failed.started_at)
                last = max(last, failed.attempt)
                if failed.retry_at > retry_at:
                    retry_at, retry_s = failed.retry_at, failed.retry_at - failed.ended_at
    return Past(
        done=done,
        fence=fence,
        attempt=last + 1,
        failures=failures,
        retry_at=retry_at,
        retry_s=retry_s,
        failed_s=failed_s,
    )


def retry_at(error: FunctionError, *, failures: int, retries: int, now: float, rng: random.Random) -> float | None:
    """Return the instant of the next attempt, or None when the invocation is given up on.

    The delay doubles with each failure and is drawn from its upper half, so that many that failed together do not
    come back together.

    Args:
        error: why the attempt failed; permanent errors (``retry`` is False) are not tried again.
        failures: how many attempts have failed, this one included.
        retries: how many attempts may follow the first.
        now: the present instant.
        rng: where the jitter comes from.
    """
    if not error.retry or failures > retries:
        return None
    longest = min(DELAY_S_MAX, FIRST_DELAY_S * 2.0 ** (failures - 1))
    return now + longest * (0.5 + 0.5 * rng.random())


def wait_s(until: float, asked_s: float, now: float, *, again: bool) -> float:
    """Return how many seconds work has to wait yet; none are left at 0 and below.

    Where more are left than were asked for, who wrote the instant has another clock. Then what was asked for is
    waited once: work that was delivered before has waited already.

    Args:
        until: the instant, by the clock of whoever wrote it.
        asked_s: how long it was to wait when that was written.
        now: the present instant, by our clock.
        again: whether the work was delivered before.
    """
    left_s = until - now
    if left_s <= asked_s:
        return left_s
    return 0.0 if again else asked_s
