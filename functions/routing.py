"""Which routes take an event."""

from __future__ import annotations

from collections.abc import Iterable

from headrace.filters import takes
from headrace.wire import EventMeta, RouteRecord


def matching(routes: Iterable[RouteRecord], event: EventMeta, tenant: str) -> list[RouteRecord]:
    """Return the routes of the tenant whose filter takes the event, by name. Routes without a filter take none."""
    found = [r for r in routes if r.tenant == tenant and r.route.filter is not None and takes(r.route.filter, event)]
    return sorted(found, key=lambda r: r.name)
