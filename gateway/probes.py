"""A strict route never shuts for good: now and then one that is expected to be late is let in, to learn from.

What is refused teaches nothing. Without this, one bad afternoon would have a route refuse everything for ever, though
its function is as quick as before.
"""

from __future__ import annotations

from gateway.quota import RouteOf

PROBE_S = 600.0  # for so long a route has to have refused all that came before one is let in
ROUTES_KEPT_MAX = 10_000


class Probes:
    """Knows since when a route has let nothing in; instants in epoch seconds."""

    def __init__(self) -> None:
        self._refuses_since: dict[RouteOf, float] = {}

    def lets_in(self, route: RouteOf, now: float) -> bool:
        """Return whether one that would be refused on this route is to be let in."""
        since = self._refuses_since.setdefault(route, now)
        while len(self._refuses_since) > ROUTES_KEPT_MAX:
            del self._refuses_since[next(iter(self._refuses_since))]
        return now - since >= PROBE_S

    def accepted(self, route: RouteOf) -> None:
        """Take note that the route let something in."""
        self._refuses_since.pop(route, None)
