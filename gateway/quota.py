"""How many runs of a route may be open (``max_in_flight``): the read model's count, and what it has yet to see."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from gateway.needs import Log, Reader
from headrace.errors import Overloaded

RETRY_S = 1.0


class RouteOf(NamedTuple):
    """A route of a tenant: others may have one of the same name."""

    tenant: str
    name: str


class Quota:
    """Counts for the routes that have a limit; the others cost nothing.

    A run counts from the moment it is about to be appended. What this gateway appended after the read model's position
    is remembered here, so the limit holds although the read model lags. With several gateways it may be passed by what
    the others append in that lag.
    """

    def __init__(self, log: Log, reader: Reader) -> None:
        self._log = log
        self._reader = reader
        self._about: Counter[RouteOf] = Counter()
        self._recent: defaultdict[RouteOf, list[int]] = defaultdict(list)

    async def take(self, wanted: Mapping[RouteOf, int], limits: Mapping[RouteOf, int]) -> None:
        """Count runs that are about to be appended, by route; ``done`` takes them out again. Raises as ``check``."""
        await self.check(wanted, limits)
        self._about.update(wanted)

    async def check(self, wanted: Mapping[RouteOf, int], limits: Mapping[RouteOf, int]) -> None:
        """Return if there is room for so many more runs.

        Args:
            wanted: how many runs of each route.
            limits: how many of each of these routes may be open.

        Raises:
            Overloaded: one of the routes has no room for them.
            Unavailable: the read model does not answer.
        """
        for route, number in wanted.items():
            limit = limits[route]
            position = await self._reader.position()
            unseen = self._recent[route] = [seq for seq in self._recent[route] if seq > position]
            if await self._reader.open_runs(*route) + len(unseen) + self._about[route] + number > limit:
                raise Overloaded(
                    f"{limit} runs of the route {route.name} are open, which is its limit",
                    hint="Send it again when one has ended, or raise max_in_flight of the route.",
                    retry_after_s=RETRY_S,
                )

    def done(self, wanted: Mapping[RouteOf, int], *, appended: bool) -> None:
        """Take runs out of the count of those about to be appended; if they were, they wait for the read model."""
        for route, number in wanted.items():
            self._about[route] -= number
            if appended:
                self._recent[route] += [self._log.last_seq] * number
