"""How long will an invocation run? What this worker saw itself of late, and where it saw nothing what all learned."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from functions.forecast import OWN_MIN, Forecasts, Kind, size_class
from functions.outlook import Outlook
from headrace.wire import RETRACTER, SPREADER, Invocation
from streams.tables import row_key

KNOWN_S = 0.25  # so long an answer is kept before it is looked up again
LEARN_EVERY_S = 0.05  # of each kind of work; learning from each of thousands a second would take a tenth of a core
KINDS_MAX = 1000  # more than this and what was seen is forgotten: it can be learned again, and the table knows too
OF_THE_PLATFORM_S = 0.01


class Duration(Struct, frozen=True):
    """What is expected of an invocation, in seconds.

    ``run`` holds p50 and p90 of how long it keeps a slot, None where nothing is known; ``path_s`` is how long it will
    be from its start to the answer of its run.
    """

    run: tuple[float, float] | None
    path_s: float = 0.0


class _Known:
    __slots__ = ("duration", "learn_at", "until")

    def __init__(self) -> None:
        self.duration = Duration(None)
        self.until = 0.0
        self.learn_at = 0.0


_PLATFORM = Duration((OF_THE_PLATFORM_S, OF_THE_PLATFORM_S))


class Durations:
    """Knows what to expect of each kind of work."""

    def __init__(self, outlook: Outlook, clock: Callable[[], float]) -> None:
        """Begin with what ``outlook`` knows; ``clock`` tells epoch seconds."""
        self._outlook = outlook
        self._clock = clock
        self._seen = Forecasts()
        self.news = 0  # grows when something was learned of a kind of work of which nothing was known
        self._known: dict[tuple[str, str, str, int], _Known] = {}

    def of(self, invocation: Invocation) -> Duration:
        """Return what is expected of an invocation that has not begun."""
        if invocation.function in (SPREADER, RETRACTER):
            return _PLATFORM
        known = self._of(invocation)
        now = self._clock()
        if not known.until - KNOWN_S <= now < known.until:
            known.until = now + KNOWN_S
            known.duration = self._look_up(invocation)
        return known.duration

    def learn(self, invocation: Invocation, seconds: float, at: float) -> None:
        """Take note that an attempt that went well kept its slot for so long, and ended at this instant."""
        known = self._of(invocation)
        if not known.learn_at - LEARN_EVERY_S <= at < known.learn_at:
            known.learn_at = at + LEARN_EVERY_S
            self._seen.learn(_kind(invocation), seconds, at)
            if known.duration.run is None:
                known.until = 0.0
                self.news += 1

    def _of(self, invocation: Invocation) -> _Known:
        key = (invocation.tenant, invocation.function, invocation.version, size_class(invocation.payload.size))
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= KINDS_MAX:
                self._known.clear()
                self._seen = Forecasts()
            known = self._known[key] = _Known()
        return known

    def _look_up(self, invocation: Invocation) -> Duration:
        kind = _kind(invocation)
        answer = self._outlook.of("answer", kind.function, kind.version, size=kind.size)
        path_s = 0.0 if answer is None else answer.p50_s
        own = self._seen.histories.get(kind.kin()[0])
        if own is None or own.observed < OWN_MIN:
            learned = self._outlook.of("run", kind.function, kind.version, size=kind.size)
            if learned is not None:
                return Duration((learned.p50_s, learned.p90_s), path_s)
        seen = self._seen.of(kind)
        return Duration(None if seen is None else (seen.p50_s, seen.p90_s), path_s)


def _kind(invocation: Invocation) -> Kind:
    return Kind(
        row_key(invocation.tenant, invocation.function),
        invocation.version,
        size=size_class(invocation.payload.size),
    )
