"""Names and ids: one rule, checked once, and every id derived so that a repeat gives the same id.

Names become subjects of the log, keys and file names. Nothing else in Headrace builds those from text of a user.
"""

from __future__ import annotations

import hashlib
import re

from headrace.errors import BadName

NAME_RULE = "[A-Za-z0-9_-]{1,64}"
_NAME = re.compile(NAME_RULE)
_BASE32 = "abcdefghijklmnopqrstuvwxyz234567"
_PAIRS = [a + b for a in _BASE32 for b in _BASE32]


def check_name(name: object, what: str = "name") -> str:
    """Return ``name`` if it is a valid name of a function, route, site or tenant.

    Raises:
        BadName: it is not text that matches ``[A-Za-z0-9_-]{1,64}`` from end to end. ``fullmatch`` and not ``$``,
            which lets a trailing newline pass.
    """
    if isinstance(name, str) and _NAME.fullmatch(name):
        return name
    shown = ascii(name)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    raise BadName(
        f"{shown} is not a valid {what}",
        hint="Use 1 to 64 letters, digits, underscores or hyphens.",
    )


def _digest(*parts: str, size: int) -> str:
    """Hash length-prefixed parts, so that ("a", "bc") and ("ab", "c") differ."""
    raws = [part.encode("utf-8", "surrogatepass") for part in parts]
    told = b"".join([len(raw).to_bytes(4, "big") + raw for raw in raws])
    return _base32(hashlib.blake2b(told, digest_size=size).digest())


def _base32(raw: bytes) -> str:
    """Return lower-case base32 without padding, two characters at a time: ids are made for every message of the log."""
    bits = len(raw) * 8
    padding = -bits % 10
    number = int.from_bytes(raw, "big") << padding
    return "".join([_PAIRS[number >> shift & 1023] for shift in range(bits + padding - 10, -1, -10)])


def run_id(tenant: str, source: str, event_id: str, route: str) -> str:
    """Derive the id of the run that this event starts on this route: 26 characters, 128 bits."""
    return "r" + _digest(tenant, source, event_id, route, size=16)[:25]


def thread_id(tenant: str, route: str, source: str, key: str) -> str:
    """Derive the id of the thread of events that share a source and a key on a route: 26 characters, 128 bits."""
    return "t" + _digest(tenant, route, source, key, size=16)[:25]


def newest_id(tenant: str, route: str, source: str, subject: str | None) -> str:
    """Derive the key of the events of a source and a subject on a route where the newest one wins: 26 characters."""
    # Events without a subject are of one kind; none of them is that of an event with a subject.
    said = ("",) if subject is None else ("s", subject)
    return "n" + _digest(tenant, route, source, *said, size=16)[:25]


def invocation_id(parent: str, position: int | str) -> str:
    """Derive the id of the invocation that ``parent`` (an invocation or a run) starts there: 16 characters."""
    return _digest(parent, str(position), size=10)


def incident_id(site: str, began_at: float) -> str:
    """Derive the id of the time from an instant on (epoch seconds) in which a site was not up: 16 characters."""
    return _digest("incident", site, f"{began_at:.3f}", size=10)


def content_version(content: bytes) -> str:
    """Return the version of a function: the first 12 hex digits of the SHA-256 of its code and options."""
    return hashlib.sha256(content).hexdigest()[:12]
