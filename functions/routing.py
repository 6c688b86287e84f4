"""Which routes take an event."""

from __future__ import annotations

from collections.abc import Iterable

from headrace.model import EventFilter
from headrace.wire import EventMeta, RouteRecord

PREFIX = "prefix:"


def matching(routes: Iterable[RouteRecord], event: EventMeta, tenant: str) -> list[RouteRecord]:
    """Return the routes of the tenant whose filter takes the event, by name. Routes without a filter take none."""
    found = [r for r in routes if r.tenant == tenant and r.route.filter is not None and takes(r.route.filter, event)]
    return sorted(found, key=lambda r: r.name)


def takes(rule: EventFilter, event: EventMeta) -> bool:
    """Return whether each attribute that the filter gives is equal, or begins with what follows ``prefix:``."""
    return _fits(rule.type, event.type) and _fits(rule.source, event.source) and _fits(rule.subject, event.subject)


def _fits(wanted: str | None, found: str | None) -> bool:
    if wanted is None:
        return True
    if found is None:
        return False
    return found.startswith(wanted[len(PREFIX) :]) if wanted.startswith(PREFIX) else found == wanted
