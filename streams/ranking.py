"""Messages by how urgent they are, where the server hands them out in the order in which they came."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
Urgency = tuple[float, int]  # by when it is due in epoch seconds, and its place in the log


class Ranking(Generic[T]):
    """Things in order, the most urgent first. Each has a place in the log of its own, by which it is found."""

    def __init__(self) -> None:
        self._order: list[Urgency] = []
        self._things: dict[int, tuple[Urgency, T]] = {}

    def __len__(self) -> int:
        return len(self._order)

    def values(self) -> list[T]:
        """Return them, in no order."""
        return [thing for _, thing in self._things.values()]

    def items(self) -> list[tuple[int, T]]:
        """Return them with their places in the log, in no order."""
        return [(seq, thing) for seq, (_, thing) in self._things.items()]

    def put(self, place: Urgency, thing: T) -> None:
        """Add a thing, or replace it."""
        self.pop(place[1])
        self._things[place[1]] = (place, thing)
        insort(self._order, place)

    def get(self, seq: int) -> T | None:
        """Return a thing."""
        found = self._things.get(seq)
        return None if found is None else found[1]

    def pop(self, seq: int) -> T | None:
        """Remove a thing and return it."""
        found = self._things.pop(seq, None)
        if found is None:
            return None
        del self._order[bisect_left(self._order, found[0])]
        return found[1]

    def first(self) -> int:
        """Return the most urgent one."""
        return self._order[0][1]

    def last(self) -> int:
        """Return the least urgent one."""
        return self._order[-1][1]


class Aside(NamedTuple):
    """What is kept of a message that was handed back for a while: where the server is answered about it, and when it
    comes by itself (by the clock of the event loop).
    """

    reply: str
    until: float
