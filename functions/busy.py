"""The slots that are busy, and how long each is expected to be: what an order is told when a slot is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, overload

from functions.forecast import left_s


class _Run(NamedTuple):
    began: float
    p50_s: float
    p90_s: float


class Busy(Sequence[float]):
    """The slots that are busy: how many seconds more each is expected to be, worked out when somebody looks."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Begin with none; ``clock`` tells seconds."""
        self._clock = clock
        self._runs: dict[str, _Run] = {}

    def begin(self, identity: str, run: tuple[float, float] | None) -> None:
        """A slot is busy from now on, with p50 and p90 of how long it is expected to be."""
        p50_s, p90_s = run or (0.0, 0.0)
        self._runs[identity] = _Run(self._clock(), p50_s, p90_s)

    def end(self, identity: str) -> None:
        """It is free again; safe to repeat."""
        self._runs.pop(identity, None)

    def __len__(self) -> int:
        """How many slots are busy."""
        return len(self._runs)

    def __iter__(self) -> Iterator[float]:
        now = self._clock()
        return iter([left_s(run.p50_s, run.p90_s, max(0.0, now - run.began)) for run in self._runs.values()])

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> list[float]: ...
    def __getitem__(self, index: int | slice) -> float | list[float]:
        return list(self)[index]
