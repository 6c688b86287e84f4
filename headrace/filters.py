"""Whether a route's filter takes an event."""

from __future__ import annotations

from typing import Protocol

from headrace.model import EventFilter

PREFIX = "prefix:"


class Attributes(Protocol):
    """The attributes of an event that a filter looks at."""

    @property
    def type(self) -> str:
        """What happened."""

    @property
    def source(self) -> str:
        """Where."""

    @property
    def subject(self) -> str | None:
        """To what."""


def takes(rule: EventFilter, event: Attributes) -> bool:
    """Return whether each attribute that the filter gives is equal, or begins with what follows ``prefix:``."""
    return _fits(rule.type, event.type) and _fits(rule.source, event.source) and _fits(rule.subject, event.subject)


def _fits(wanted: str | None, found: str | None) -> bool:
    if wanted is None:
        return True
    if found is None:
        return False
    return found.startswith(wanted[len(PREFIX) :]) if wanted.startswith(PREFIX) else found == wanted
