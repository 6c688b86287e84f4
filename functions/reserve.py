"""What it costs others to start long work now: urgent work that comes soon finds all slots busy.

Learned from what came with a deadline: how much of it, by how long it can wait. Long work that would shut the slots
for longer than that starts only if it is worth more than what is expected to be lost meanwhile.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

SEEN_MAX = 256  # arrivals with a deadline that rates are taken from
PART_MAX = 0.25  # of the slots, at most, are kept turning over for urgent work
BANDS = 48
BAND_FIRST = -12  # band 0 can wait for less than 2**-12 s


def _band(seconds: float) -> int:
    if seconds <= 0.0:
        return 0
    return min(BANDS - 1, max(0, math.frexp(seconds)[1] - BAND_FIRST))


class Reserve:
    """The urgent work of late, by powers of two of the seconds that it could wait."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int, float, float]] = deque()
        self._value = [0.0] * BANDS
        self._need_s = [0.0] * BANDS

    def saw(self, slack_s: float, value: float, need_s: float, now: float) -> None:
        """Take note of work that came: how long it can wait, what it is worth, how long it needs a slot."""
        band = _band(slack_s)
        self._seen.append((now, band, value, need_s))
        self._value[band] += value
        self._need_s[band] += need_s
        if len(self._seen) > SEEN_MAX:
            _, band, value, need_s = self._seen.popleft()
            self._value[band] -= value
            self._need_s[band] -= need_s

    @property
    def learned(self) -> bool:
        """Whether enough came to say anything."""
        return len(self._seen) > 1

    def cost(self, need_s: float, busy_s: Sequence[float], slots: int, now: float) -> float:
        """Return the value expected to be lost if work that needs so many seconds starts now.

        Args:
            need_s: how long it keeps its slot.
            busy_s: how long the slots that are busy are expected to be, shortest first.
            slots: how many there are in all; one of those not busy is the one in question.
            now: the present instant.
        """
        if slots < 2 or not self.learned:
            return 0.0
        span = max(now - self._seen[0][0], 1e-9)
        # So many slots, other than this one, urgent work that cannot wait for this one keeps busy by itself.
        wanted = min(max(1, int(slots * PART_MAX)), 1 + int(sum(self._need_s[: _band(need_s)]) / span))
        free = slots - len(busy_s) - 1
        if wanted <= free:
            return 0.0
        shut_s = min(need_s, busy_s[wanted - free - 1])
        band = _band(shut_s)
        # A slot cannot do more in that time than fits into it, however much comes.
        return sum(self._value[:band]) * shut_s / max(span, sum(self._need_s[:band]))
