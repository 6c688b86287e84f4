"""What travels between simulated clients and the simulated server, and what its log keeps."""

from __future__ import annotations

from typing import NamedTuple, Protocol

Headers = dict[str, str] | None
Tokens = tuple[str, ...]


class Wire(NamedTuple):
    """A message on its way; ``to`` is the subject by which it finds its subscription."""

    to: str
    subject: str
    reply: str
    body: bytes
    headers: Headers


class Kept(NamedTuple):
    """A message of the log."""

    seq: int
    subject: str
    body: bytes
    at: float
    at_ns: int
    tokens: Tokens


class Connection(Protocol):
    """A client as the server sees it."""

    name: str

    def send(self, message: Wire) -> None:
        """Put a message on the way to the client."""


def fits(pattern: Tokens, tokens: Tokens) -> bool:
    """Say whether a subject is among those that a pattern with ``*`` and a closing ``>`` names."""
    if pattern[-1] == ">":
        if len(tokens) < len(pattern):
            return False
        pattern = pattern[:-1]
    elif len(pattern) != len(tokens):
        return False
    return all(p in ("*", t) for p, t in zip(pattern, tokens, strict=False))
