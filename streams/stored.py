"""A message as the log holds it."""

from __future__ import annotations

from typing import NamedTuple


class Stored(NamedTuple):
    """A message of the log: its sequence, its subject, its body, and the log's own time of storing it."""

    seq: int
    subject: str
    body: bytes
    at: float
