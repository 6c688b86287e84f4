"""How long will it take? Quantiles of durations, learned from what was measured, in the order of the log.

A history is a small exact window of the newest durations of one kind of work. Its quantiles are weighted by age, so
that yesterday's storm fades, and are drawn one rank higher than in the sample alone, so that they hold for the next
duration and not for the last ones. What the upper quantile should cover it covers: each duration that it missed moves
it up, each that it held moves it down a little. The same durations in the same order give the same forecast, so a
history can be stored, or be rebuilt from the log. ``python -P -m infra.bench.sketches`` measures the window against
sketches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from msgspec import Struct

WINDOW = 128  # durations kept in a history
HALF_LIFE_S = 6 * 3600.0
COVERED = 0.9  # the share of durations that `p90_s` is meant to hold
CORRECTION = 0.02  # how far one missed duration moves the rank of `p90_s`
RANK_MIN, RANK_MAX = 0.6, 0.995
SECONDS_MIN = 1e-6
FEW = 10  # below this number a rank says nothing about the upper quantiles: they come from the usual spread
USUAL_SPREAD = 0.5  # of the logarithm of durations of one kind of work, before any is known
USUAL_WEIGHT = 2.0  # how many durations that spread counts for
BUSY_COUNT, BUSY_S = 32, 32.0  # where so many durations were learned in so little time, every other one will do
QUIET_S = 8.0  # where none was learned for so long, each counts twice as much again
OWN_MIN = 3  # so many durations of its own and work is no longer forecast from its kin
Z90, Z99 = 1.2816, 2.3263  # of the normal distribution
T90 = (3.078, 1.886, 1.638, 1.533, 1.476, 1.440, 1.415, 1.397, 1.383, 1.372, 1.363)  # Student's t, 1 to 11 degrees


class Forecast(Struct, frozen=True):
    """What is expected of a duration, in seconds, and how many durations of its kind were seen so far."""

    p50_s: float
    p90_s: float
    p99_s: float
    observations: int

    @property
    def mean_s(self) -> float:
        """The mean of the lognormal distribution that has these p50 and p90: what a sum of many tends to."""
        return mean_s(self.p50_s, self.p90_s)


def mean_s(p50_s: float, p90_s: float, limit_s: float = math.inf) -> float:
    """Return the mean in seconds of the lognormal distribution with these quantiles, ``p90_s`` at most.

    Of work that is stopped after ``limit_s`` it is the mean of what it runs until then, however long its tail is.
    """
    if p50_s <= 0.0 or p90_s <= p50_s or limit_s <= 0.0:
        return max(0.0, min(p50_s, limit_s))
    spread = math.log(p90_s / p50_s) / Z90
    mean = p50_s * math.exp(spread * spread / 2.0)
    if limit_s == math.inf:
        return min(p90_s, mean)
    at = math.log(limit_s / p50_s) / spread
    return mean * _below(at - spread) + limit_s * _below(-at)


def _below(deviations: float) -> float:
    return 0.5 * math.erfc(-deviations / math.sqrt(2.0))


def left_s(p50_s: float, p90_s: float, elapsed_s: float) -> float:
    """Return how many seconds more work is expected to take that has been running for ``elapsed_s``.

    What outlived its p50 is taken to reach its p90, and what outlived that to take half of its time once more.
    """
    if elapsed_s < p50_s:
        return max(p50_s, mean_s(p50_s, p90_s)) - elapsed_s
    return p90_s - elapsed_s if elapsed_s < p90_s else elapsed_s / 2.0


class Kind(Struct, frozen=True):
    """What work of one kind has in common: function and version, where it runs, and how large its input is."""

    function: str
    version: str = ""
    site: str = ""
    size: int = 0

    def kin(self) -> tuple[str, str, str]:
        """Return the names of its histories, from its own to the widest."""
        return (
            f"{self.function}|{self.version}|{self.site}|{self.size}",
            f"{self.function}|{self.version}|{self.site}",
            f"{self.function}",
        )


def size_class(count: float) -> int:
    """Return the power of two that an input of this size (bytes, tokens, frames) lies in; 0 for nothing."""
    return math.frexp(count)[1] if count > 0 else 0


class History(Struct):
    """The newest durations of one kind of work, oldest first, each with the instant it ended at.

    ``observed`` counts all there ever were; ``rank`` is where in the window ``p90_s`` stands at present. Of much work
    only one in ``stride`` is learned (a power of two), since the instant ``strode_at``.
    """

    seconds: list[float] = []
    at: list[float] = []
    observed: int = 0
    rank: float = COVERED
    stride: int = 1
    strode_at: float = 0.0

    def takes(self, number: int, at: float) -> bool:
        """Say whether a duration is worth learning: of thousands a second a few are as good, and reach further back.

        Which ones says the work's own number, not when it ended: the first of a burst are the short ones.

        Args:
            number: any number of the work, drawn evenly.
            at: the instant it ended at, Unix seconds.
        """
        if not self.at:
            return True
        newest = self.at[-1]
        if self.stride > 1 and at - max(newest, self.strode_at) > QUIET_S:
            self.stride //= 2
            self.strode_at = at
        elif len(self.at) >= BUSY_COUNT and self.at[-BUSY_COUNT] > max(self.strode_at, newest - BUSY_S):
            self.stride *= 2
            self.strode_at = newest
        return number % self.stride == 0

    def learn(self, seconds: float, at: float) -> None:
        """Take one more duration in, and correct the rank by whether ``p90_s`` covered it.

        Args:
            seconds: the duration; none at all counts as a microsecond.
            at: the instant it ended at, Unix seconds.
        """
        seconds = max(SECONDS_MIN, seconds)
        if len(self.seconds) >= FEW:
            weights = _weights(self)
            below = sum([weight for one, weight in zip(self.seconds, weights, strict=True) if one < seconds])
            weight_all = sum(weights)
            missed = below >= min(self.rank * (weight_all + 1.0), weight_all)
            moved = self.rank + CORRECTION * (COVERED if missed else COVERED - 1.0)
            self.rank = min(RANK_MAX, max(RANK_MIN, moved))
        self.seconds.append(seconds)
        self.at.append(at)
        self.observed += self.stride
        if len(self.seconds) > WINDOW:
            del self.seconds[0], self.at[0]


def _weights(history: History) -> list[float]:
    """Return what each duration counts for: the newest few the same, what is older less by its age.

    Were it by age alone, a kind of work that ends twice a day would be known by its last duration only.
    """
    since = sorted(history.at)[-min(FEW, len(history.at))]
    return [2.0 ** ((at - since) / HALF_LIFE_S) if at < since else 1.0 for at in history.at]


def forecast(history: History) -> Forecast | None:
    """Return what the history says of the next duration; None without a history."""
    count = len(history.seconds)
    if count == 0:
        return None
    if count < FEW:
        return _of_few(history)
    weights = _weights(history)
    weighed = sorted(zip(history.seconds, weights, strict=True))
    # The next duration is one more of them, of full weight, and may be the longest.
    total = sum(weights) + 1.0
    wanted = (0.5 * total, history.rank * total, 0.99 * total)
    found: list[float] = []
    below = 0.0
    for seconds, weight in weighed:
        below += weight
        while len(found) < 3 and below >= wanted[len(found)]:
            found.append(seconds)
    longest = weighed[-1][0]
    found += [longest] * (3 - len(found))
    p50, p90, p99 = found
    p90 = max(p50, p90)
    if total <= 100.0:  # too few to hold a rank of 99 %: the tail of the lognormal distribution with this p50 and p90
        p99 = max(p99, p90 * (p90 / p50) ** (Z99 / Z90 - 1.0))
    return Forecast(p50, p90, max(p90, p99), history.observed)


def _of_few(history: History) -> Forecast:
    """Forecast as if durations were lognormal, with the usual spread counted in: Student's t of their logarithms."""
    logs = [math.log(seconds) for seconds in history.seconds]
    count = len(logs)
    middle = sum(logs) / count
    square = sum((one - middle) ** 2 for one in logs) + USUAL_WEIGHT * USUAL_SPREAD**2
    degrees = count - 1 + int(USUAL_WEIGHT)
    spread = math.sqrt(square / degrees * (1.0 + 1.0 / count))
    up = T90[min(degrees, len(T90)) - 1] * spread
    return Forecast(
        math.exp(middle), math.exp(middle + up), math.exp(min(700.0, middle + up * Z99 / Z90)), history.observed
    )


def merged(one: History, other: History) -> History:
    """Return the history of both, as far as the window reaches, in the order of their instants.

    For histories that were kept apart, as of two sites. The order of the two does not matter.
    """
    pairs = sorted([*zip(one.at, one.seconds, strict=True), *zip(other.at, other.seconds, strict=True)])[-WINDOW:]
    observed = one.observed + other.observed
    rank = (one.rank * one.observed + other.rank * other.observed) / observed if observed else COVERED
    return History([seconds for _, seconds in pairs], [at for at, _ in pairs], observed, rank)


class Forecasts:
    """The histories of all kinds of work. Work that was hardly ever seen is forecast from its kin.

    Fed by outcomes in the order of the log. ``histories`` is the whole state: by name, each to be stored by itself.
    """

    def __init__(self, histories: dict[str, History] | None = None) -> None:
        self.histories: dict[str, History] = {} if histories is None else histories
        self._known: dict[str, Forecast | None] = {}

    def learn(self, kind: Kind, seconds: float, at: float) -> None:
        """Take in that work of this kind took so many seconds and ended at this instant."""
        for name in kind.kin():
            history = self.histories.setdefault(name, History())
            history.learn(seconds, at)
            self._known.pop(name, None)

    def of(self, kind: Kind) -> Forecast | None:
        """Return the forecast for this kind of work: its own, else that of its kin; None if there is none of either."""
        first: str | None = None
        for name, history in self._of(kind):
            if history.observed >= OWN_MIN:
                return self._forecast(name)
            first = first or name
        return None if first is None else self._forecast(first)

    def _of(self, kind: Kind) -> Iterator[tuple[str, History]]:
        for name in kind.kin():
            history = self.histories.get(name)
            if history is not None:
                yield name, history

    def _forecast(self, name: str) -> Forecast | None:
        if name not in self._known:
            self._known[name] = forecast(self.histories[name])
        return self._known[name]
