"""Slots and simulated time: work arrives, waits, runs to its end and frees a slot. Nothing is drawn by chance.

What starts next is decided by the very code that decides it in a worker (``functions.policies``), from forecasts that
are learned as the simulated time goes. The same pieces of work under the same policy end at the same instants.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct, structs

from functions.busy import Busy
from functions.forecast import Forecasts, Kind
from functions.order import Work
from functions.policies import Waiting

Ending = Literal["done", "late", "given_up", "replaced", "never"]
ENDINGS: dict[Ending, str] = {
    "done": "it ran to its end",
    "late": "it was stopped at its deadline, or not started after it, as `on_late: cancel` asks",
    "given_up": "the policy did not think it worth starting",
    "replaced": "newer work of its subject came before it had started",
    "never": "what it follows from never ended",
}

_ENDS, _COMES = 0, 1


class Piece(Struct, frozen=True):
    """A piece of work as it was recorded: when it came, and how long it keeps a slot, which no policy is told.

    ``parents`` are the places, in the list of all pieces, of those that it follows from: it comes ``delay_s`` after the
    last of them has ended, whatever ``work.arrived`` says. Where there is a ``kind``, the forecast of ``work`` is what
    was learned of that kind so far; where there is none it stands as it is, and nothing is learned.
    """

    work: Work
    seconds: float
    kind: Kind | None = None
    parents: tuple[int, ...] = ()
    delay_s: float = 0.0


class End(Struct, frozen=True):
    """How and when a piece of work ended, and when it was started; None if it never was."""

    ending: Ending
    at: float
    started: float | None = None


class _Simulation:
    def __init__(self, pieces: Sequence[Piece], slots: int, waiting: Waiting, forecasts: Forecasts) -> None:
        self._pieces = pieces
        self._slots = slots
        self._waiting = waiting
        self._forecasts = forecasts
        self._ends: list[End | None] = [None] * len(pieces)
        self._now = 0.0
        self._began: dict[int, float] = {}
        self._busy = Busy(lambda: self._now)
        self._children: dict[int, list[int]] = defaultdict(list)
        self._missing = [len(set(piece.parents)) for piece in pieces]
        self._place = {piece.work.id: place for place, piece in enumerate(pieces)}
        self._guessed: dict[str, list[Work]] = defaultdict(list)  # by function, of which nothing was known
        self._events: list[tuple[float, int, int]] = []
        for place, piece in enumerate(pieces):
            for parent in set(piece.parents):
                self._children[parent].append(place)
            if not piece.parents:
                self._events.append((piece.work.arrived, _COMES, place))
        heapq.heapify(self._events)

    def run(self) -> list[End]:
        while self._events:
            now = self._now = self._events[0][0]
            while self._events and self._events[0][0] <= now:
                _, what, place = heapq.heappop(self._events)
                if what == _ENDS:
                    self._stop(place, now)
                else:
                    self._come(place, now)
            while len(self._began) < self._slots and self._start(now):
                pass
        return [end or End("never", self._now) for end in self._ends]

    def _come(self, place: int, now: float) -> None:
        piece = self._pieces[place]
        work = self._expected(structs.replace(piece.work, arrived=now), piece.kind)
        if piece.kind is not None and work.p50_s is None:
            self._guessed[piece.kind.function].append(work)
        replaced = self._waiting.add(work, now)
        if replaced is not None:
            self._end(replaced, End("replaced", now))

    def _expected(self, work: Work, kind: Kind | None) -> Work:
        known = None if kind is None else self._forecasts.of(kind)
        return work if known is None else structs.replace(work, p50_s=known.p50_s, p90_s=known.p90_s)

    def _learn(self, kind: Kind, seconds: float, now: float) -> None:
        """Learn a duration; what nothing was known of is taken in again with what is known now, as a worker does."""
        self._forecasts.learn(kind, seconds, now)
        for work in self._guessed.pop(kind.function, ()):
            if self._waiting.drop(work.id) is not None:
                self._waiting.add(self._expected(work, self._pieces[self._place[work.id]].kind), now)

    def _start(self, now: float) -> bool:
        """Ask what to start on a free slot, and say whether it may be worth to ask again."""
        decision = self._waiting.take(now, self._busy)
        for work in decision.give_up:
            self._end(work, End("given_up", now))
        if decision.start is None:
            return False
        work = decision.start
        place = self._place[work.id]
        piece = self._pieces[place]
        until = now + piece.seconds
        if (stopped_at := work.stopped_at) is not None:
            if now > stopped_at:
                self._end(work, End("late", now))
                return True
            until = min(until, stopped_at)
        self._began[place] = now
        self._busy.begin(work.id, None if work.p50_s is None else (work.p50_s, work.p90_s or work.p50_s))
        heapq.heappush(self._events, (until, _ENDS, place))
        return True

    def _stop(self, place: int, now: float) -> None:
        piece = self._pieces[place]
        began = self._began.pop(place)
        self._busy.end(piece.work.id)
        whole = now >= began + piece.seconds
        if piece.kind is not None and whole:
            self._learn(piece.kind, now - began, now)
        self._ends[place] = End("done" if whole else "late", now, began)
        if not whole:
            return
        for child in self._children[place]:
            self._missing[child] -= 1
            if self._missing[child] == 0:
                heapq.heappush(self._events, (now + self._pieces[child].delay_s, _COMES, child))

    def _end(self, work: Work, end: End) -> None:
        self._ends[self._place[work.id]] = end


def simulate(pieces: Sequence[Piece], slots: int, waiting: Waiting, forecasts: Forecasts | None = None) -> list[End]:
    """Return how each piece ended, in the order given.

    At one instant, work ends before other work comes, and all that has come is known before any is started.

    Args:
        pieces: the work; no two have the same ``work.id``, and none follows from itself.
        slots: how many run at a time, 1 or more.
        waiting: the policy, with nothing waiting yet.
        forecasts: what is known of durations beforehand; grows with what is learned. Nothing if it is not given.
    """
    return _Simulation(pieces, slots, waiting, Forecasts() if forecasts is None else forecasts).run()
