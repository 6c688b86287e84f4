"""What there is only so much of at the door, shared out: places for requests, streams and callers that wait.

Where one tenant is alone he may have all of it. Where there are several, each may have as much as is left free: so
there is always room for the next one, and two who want all there is get a third each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from gateway.problems import Busy
from headrace.errors import Overloaded


class Shares:
    """Counts who has how much of something."""

    def __init__(self, total: int, shared: Callable[[], bool], full: Callable[[], Busy]) -> None:
        """Begin with all of it free.

        Args:
            total: how much there is.
            shared: whether there is more than one tenant.
            full: makes the refusal for when there is nothing left.
        """
        self._total = total
        self._shared = shared
        self._full = full
        self._had: Counter[str] = Counter()
        self.taken = 0

    def take(self, tenant: str, amount: int = 1) -> None:
        """Give a tenant so much more.

        Raises:
            Busy: there is not so much left.
            Overloaded: there is, and it is kept for the others.
        """
        free = self._total - self.taken
        if amount > free:
            raise self._full()
        if amount and self._had[tenant] + amount > free and self._shared():
            raise Overloaded(
                f"{self._full()}: {self._had[tenant]:,} of yours, and what is left is kept for other tenants",
                hint="Send it again when some of yours are through.",
            )
        self._had[tenant] += amount
        self.taken += amount

    def give_back(self, tenant: str, amount: int = 1) -> None:
        """Take note that a tenant has so much less."""
        self.taken -= amount
        self._had[tenant] -= amount
        if not self._had[tenant]:
            del self._had[tenant]
