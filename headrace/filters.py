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


def why_not(rule: EventFilter, event: Attributes) -> str:
    """Return in one sentence which attributes keep an event from a filter; nothing where it is taken."""
    differing: list[str] = []
    for name in ("type", "source", "subject"):
        wanted, found = getattr(rule, name), getattr(event, name)
        if not _fits(wanted, found):
            has = "there is no " + name if found is None else f"{name} is {found!r}"
            begins = wanted.startswith(PREFIX)
            differing.append(f"{has}, not {'one that begins with ' if begins else ''}{wanted.removeprefix(PREFIX)!r}")
    return "; ".join(differing)


def _fits(wanted: str | None, found: str | None) -> bool:
    if wanted is None:
        return True
    if found is None:
        return False
    return found.startswith(wanted[len(PREFIX) :]) if wanted.startswith(PREFIX) else found == wanted
