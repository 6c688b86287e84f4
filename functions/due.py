"""Work in the order of its deadlines, in small blocks with sums, so that a look at 100,000 pieces stays cheap."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import accumulate
from operator import attrgetter

BLOCK = 64  # entries at which a block is cut in two
NEED_S_MIN = 1e-6
GONE_MAX = 256  # so many are put off at one look: a flood is not sorted out at a single decision

_key = attrgetter("key")


class Entry:
    """A piece of work as the order sees it: when it is due, what it is likely to take and to need, what it is worth.

    ``likely_s`` decides whether it can make its deadline, ``need_s`` (the mean) how long it keeps a slot from others.
    """

    __slots__ = ("deadline", "held", "id", "likely_s", "need_s", "number", "tenant", "worth")

    def __init__(
        self, identity: str, tenant: str, deadline: float, likely_s: float, need_s: float, value: float
    ) -> None:
        self.id = identity
        self.tenant = tenant
        self.deadline = deadline
        self.likely_s = likely_s
        self.need_s = need_s
        self.worth = value / need_s
        self.number = 0
        self.held = False

    @property
    def key(self) -> tuple[float, int]:
        """The place in the order of deadlines; of equal ones the first that came is first."""
        return (self.deadline, self.number)


class _Block:
    __slots__ = ("entries", "hogs", "least", "need_s")

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.need_s = sum(entry.need_s for entry in entries)
        self.least: Entry | None = None
        self.hogs: frozenset[str] = frozenset()

    def find_least(self, hogs: frozenset[str]) -> Entry:
        if self.least is None or self.hogs != hogs:
            self.least = _least(self.entries, hogs)
            self.hogs = hogs
        return self.least


def _least(entries: Sequence[Entry], hogs: frozenset[str]) -> Entry:
    if hogs:
        return min(entries, key=lambda entry: (entry.tenant not in hogs, entry.worth, -entry.number))
    return min(entries, key=lambda entry: (entry.worth, -entry.number))


class Due:
    """Entries by deadline."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._lasts: list[tuple[float, int]] = []
        self._count = 0

    def __len__(self) -> int:
        """How many there are."""
        return self._count

    @property
    def blocks(self) -> int:
        """How many blocks they lie in: what ``overfull`` has to look at."""
        return len(self._blocks)

    def first(self) -> Entry | None:
        """Return the one that is due first."""
        return self._blocks[0].entries[0] if self._blocks else None

    def near(self, count: int) -> list[Entry]:
        """Return the few that are due first, in order."""
        found: list[Entry] = []
        for block in self._blocks:
            found += block.entries[: count - len(found)]
            if len(found) >= count:
                break
        return found

    def add(self, entry: Entry) -> None:
        """Put it in its place."""
        self._count += 1
        if not self._blocks:
            self._blocks.append(_Block([entry]))
            self._lasts.append(entry.key)
            return
        place = min(bisect_left(self._lasts, entry.key), len(self._blocks) - 1)
        block = self._blocks[place]
        insort(block.entries, entry, key=_key)
        block.need_s += entry.need_s
        block.least = None
        self._lasts[place] = block.entries[-1].key
        if len(block.entries) > BLOCK:
            half = len(block.entries) // 2
            self._blocks[place : place + 1] = [_Block(block.entries[:half]), _Block(block.entries[half:])]
            self._lasts.insert(place, block.entries[half - 1].key)

    def remove(self, entry: Entry) -> None:
        """Take it out; it must be in."""
        self._count -= 1
        place = bisect_left(self._lasts, entry.key)
        block = self._blocks[place]
        del block.entries[bisect_left(block.entries, entry.key, key=_key)]
        if not block.entries:
            del self._blocks[place], self._lasts[place]
            return
        block.need_s -= entry.need_s
        if block.least is entry:
            block.least = None
        self._lasts[place] = block.entries[-1].key

    @staticmethod
    def least(entries: Sequence[Entry], hogs: frozenset[str]) -> Entry:
        """Return the entry to put off first: of the tenants that hold too much, else of all, the least worth."""
        return _least(entries, hogs)

    def overfull(
        self, now: float, busy_s: Sequence[float], slots: int, hogs: frozenset[str]
    ) -> tuple[list[Entry], bool]:
        """Return what has to go so that the last of each block is expected to make its deadline, and if that is all.

        Slots are taken together as one that is so many times as fast: near for what lies far ahead, and cheap. But one
        that is busy for longer than that takes no more than itself from the others. ``busy_s``: shortest first.
        """
        gone: list[Entry] = []
        taken: set[int] = set()
        worst: list[tuple[bool, float, int, int]] = []
        looked = 0
        ahead_s = 0.0
        sums_s = [0.0, *accumulate(busy_s)]
        for place, block in enumerate(self._blocks):
            ahead_s += block.need_s
            last = block.entries[-1]
            left_s = last.deadline - now - last.likely_s
            ended = bisect_left(busy_s, left_s)
            excess_s = ahead_s - last.need_s - (slots - len(busy_s) + ended) * left_s + sums_s[ended]
            if excess_s <= 0.0:
                continue
            for where in range(looked, place + 1):
                heapq.heappush(worst, self._rank(self._blocks[where].find_least(hogs), where, hogs))
            looked = place + 1
            while excess_s > 0.0 and worst:
                where = heapq.heappop(worst)[3]
                left = self._blocks[where]
                victim = left.find_least(hogs)
                gone.append(victim)
                taken.add(victim.number)
                ahead_s -= victim.need_s
                excess_s -= victim.need_s
                remain = [entry for entry in left.entries if entry.number not in taken]
                if remain:
                    left.least = _least(remain, hogs)
                    heapq.heappush(worst, self._rank(left.least, where, hogs))
                if len(gone) >= GONE_MAX:
                    return gone, False
        return gone, True

    @staticmethod
    def _rank(entry: Entry, place: int, hogs: frozenset[str]) -> tuple[bool, float, int, int]:
        return (entry.tenant not in hogs, entry.worth, -entry.number, place)
