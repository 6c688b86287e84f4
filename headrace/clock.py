"""Instants and durations: read and written in one place.

Inside, an instant is a float of seconds since 1970-01-01 UTC and a duration a float of seconds. Outside they are
RFC 3339 text ("2026-11-21T03:14:15.926535Z") and short text ("60s", "1.5m", "500ms", "2h").
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache

from headrace.errors import BadRequest

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)")
DURATION_S_MAX = 366 * 86400.0
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_RFC3339 = re.compile(r"\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}:\d{2}(\.\d+)?([Zz]|[+-]\d{2}:\d{2})")


@lru_cache(maxsize=1024)
def parse_duration(text: str, what: str = "duration") -> float:
    """Return the seconds of "500ms", "60s", "1.5m", "2h" or "1d".

    Raises:
        BadRequest: the text is none of these, or the duration is not above zero, or above 366 days.
    """
    match = _DURATION.fullmatch(text.strip()) if isinstance(text, str) else None
    seconds = float(match[1]) * _UNIT_S[match[2]] if match else 0.0
    if seconds > DURATION_S_MAX:
        raise BadRequest(f"{what}: {ascii(text)[:80]} is longer than 366 days", hint="Nothing waits that long.")
    if seconds <= 0.0:
        raise BadRequest(
            f"{what}: {ascii(text)[:80]} is not a duration",
            hint='Write a number above zero with a unit, such as "500ms", "60s", "10m" or "2h".',
        )
    return seconds


def parse_instant(text: str, what: str = "time") -> float:
    """Return the seconds since 1970 of an RFC 3339 instant.

    Raises:
        BadRequest: the text is not RFC 3339 with a time zone.
    """
    if isinstance(text, str) and _RFC3339.fullmatch(text):
        try:
            return datetime.fromisoformat(text.upper()).timestamp()
        except ValueError:
            pass  # a 13th month, a 61st minute: told below like any other bad instant
    raise BadRequest(
        f"{what}: {ascii(text)[:80]} is not an instant",
        hint='Write RFC 3339 with a time zone, such as "2026-11-21T03:14:15Z".',
    )


def parse_deadline(text: str, now: float) -> float:
    """Return the instant meant by a deadline: a duration from ``now`` on ("60s") or an RFC 3339 instant."""
    if isinstance(text, str) and _DURATION.fullmatch(text.strip()):
        return now + parse_duration(text, "deadline")
    try:
        return parse_instant(text, "deadline")
    except BadRequest as error:
        raise BadRequest(
            f"deadline: {ascii(text)[:80]} is neither a duration nor an instant",
            hint='Write "60s" for sixty seconds after acceptance, or RFC 3339 such as "2026-11-21T03:14:15Z".',
        ) from error


def format_instant(instant: float) -> str:
    """Return RFC 3339 UTC text with microseconds."""
    return datetime.fromtimestamp(instant, UTC).isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


def maybe_instant(instant: float | None) -> str | None:
    """Return RFC 3339 text, or None where there is no instant."""
    return None if instant is None else format_instant(instant)
