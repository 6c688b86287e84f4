"""Measures the window of ``functions.forecast`` against sketch libraries, as far as they are installed here.

Run by hand: ``python -P -m infra.bench.sketches``. Each learns the durations of the traces, kind by kind, and says
before each what p90 is: what that covers, what learning and asking cost, and how long yesterday's storm stays in it.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable
from typing import Any, Protocol

from functions.forecast import Forecast, History, Kind, forecast
from infra.bench.deadlines import traces

LEAST = 20  # observations of a kind before its forecast counts here: smaller numbers are a matter of their own
CALM_S, STORM_S = 1.0, 10.0
STORM_MAX = 5000


class Learner(Protocol):
    """Something that learns durations and states a p90."""

    def learn(self, seconds: float, at: float) -> None: ...

    def p90(self) -> float: ...


class Window:
    """The window, as it is used."""

    def __init__(self) -> None:
        self._history = History()

    def learn(self, seconds: float, at: float) -> None:
        self._history.learn(seconds, at)

    def p90(self) -> float:
        said: Forecast | None = forecast(self._history)
        return math.inf if said is None else said.p90_s


class Sketch:
    """A sketch of a library behind two functions; none of them forgets."""

    def __init__(self, made: Any, add: Callable[[Any, float], Any], ask: Callable[[Any], Any]) -> None:
        self._made = made
        self._add = add
        self._ask = ask

    def learn(self, seconds: float, at: float) -> None:
        self._add(self._made, seconds)

    def p90(self) -> float:
        return float(self._ask(self._made))


def learners() -> dict[str, Callable[[], Learner]]:
    """Return what there is to compare here, by name."""
    found: dict[str, Callable[[], Learner]] = {"window": Window}

    def library(name: str, make: Callable[[Any], Callable[[], Learner]]) -> None:
        try:
            found[name] = make(importlib.import_module(name))
        except ImportError:
            print(f"{name} is not installed here: left out (pip install {name})")

    library(
        "ddsketch",
        lambda m: lambda: Sketch(m.DDSketch(0.01), lambda one, x: one.add(x), lambda one: one.get_quantile_value(0.9)),
    )
    library(
        "tdigest",
        lambda m: lambda: Sketch(m.TDigest(), lambda one, x: one.update(x), lambda one: one.percentile(90)),
    )
    library(
        "fastdigest",
        lambda m: lambda: Sketch(m.TDigest(), lambda one, x: one.update(x), lambda one: one.quantile(0.9)),
    )
    library(
        "datasketches",
        lambda m: (
            lambda: Sketch(m.kll_doubles_sketch(200), lambda one, x: one.update(x), lambda one: one.get_quantile(0.9))
        ),
    )
    return found


def measure(make: Callable[[], Learner], series: list[tuple[Kind, float, float]]) -> tuple[float, float, float]:
    """Return the share that p90 covered, and the microseconds that one learning and one asking took."""
    of: dict[Kind, Learner] = {}
    seen: dict[Kind, int] = {}
    held = stated = 0
    learning = asking = 0.0
    for kind, seconds, at in series:
        learner = of.get(kind) or of.setdefault(kind, make())
        if seen.get(kind, 0) >= LEAST:
            began = time.perf_counter()
            held += seconds <= learner.p90()
            asking += time.perf_counter() - began
            stated += 1
        began = time.perf_counter()
        learner.learn(seconds, at)
        learning += time.perf_counter() - began
        seen[kind] = seen.get(kind, 0) + 1
    return held / stated, learning / len(series) * 1e6, asking / stated * 1e6


def storm(make: Callable[[], Learner]) -> int:
    """Return after how many calm durations p90 is calm again: 500 calm, a storm of 500, then, a day later, calm."""
    learner = make()
    for place in range(1000):
        learner.learn(CALM_S if place < 500 else STORM_S, float(place))
    for place in range(STORM_MAX):
        if learner.p90() < 2.0 * CALM_S:
            return place
        learner.learn(CALM_S, 86400.0 + place)
    return STORM_MAX


def main() -> None:
    """Measure and print."""
    series = [
        (job.kind, job.seconds, job.arrived)
        for trace in (traces.inference(), traces.pods())
        for job in trace.jobs
        if job.seconds > 0.0
    ]
    print(f"{len(series)} durations; aim: 87 to 93 % covered")
    for name, make in learners().items():
        covered, learning, asking = measure(make, series)
        calm = storm(make)
        after = f"{calm}" if calm < STORM_MAX else f"more than {STORM_MAX}"
        print(
            f"{name:13} p90 covers {covered:6.1%}; learn {learning:5.1f} us, ask {asking:5.1f} us; "
            f"calm again after {after} durations"
        )


if __name__ == "__main__":
    main()
