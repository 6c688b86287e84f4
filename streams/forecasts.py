"""Telling all processes what is expected of each function, as the ledger learned it: a row of a table per function."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from headrace.errors import Unavailable
from headrace.wire import ForecastRow
from streams.tables import Table

EVERY_S = 2.0

_log = logging.getLogger(__name__)


class Source(Protocol):
    """What knows what is to be told."""

    def untold(self) -> set[str]:
        """Return the functions of which something was learned since they were told."""

    def tell(self, function: str, at: float, told: ForecastRow | None) -> ForecastRow | None:
        """Return what to tell of a function: what was told already where that will do, None where nothing is known."""


class Forecasts:
    """Writes rows that changed, each once in two seconds at most."""

    def __init__(
        self,
        table: Table[ForecastRow],
        source: Source,
        ready: Callable[[], bool],
        *,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Args:
        table: where the rows are.
        source: what is to be told.
        ready: whether the source has caught up with the log; what it knows before is of the past.
        every_s: how often to look.
        clock: tells epoch seconds.
        """
        self._table = table
        self._source = source
        self._ready = ready
        self._every_s = every_s
        self._clock = clock
        self._pending: set[str] | None = None  # None: what others told before was not looked at yet

    async def run(self) -> None:
        """Write for ever; while the table is away nothing is lost, it is told later."""
        while True:
            try:
                if self._ready():
                    await self.step()
            except Unavailable as error:
                _log.warning("forecasts cannot be told: %s", error)
            await asyncio.sleep(self._every_s)

    async def step(self) -> None:
        """Tell what was learned since the last time. The first time also what others were told before is looked at.

        Raises:
            Unavailable: the table does not answer; what was not told yet is told the next time.
        """
        if self._pending is None:
            self._pending = set(self._table.items())
        self._pending |= self._source.untold()
        for name in sorted(self._pending):
            told = self._table.get(name)
            row = self._source.tell(name, self._clock(), told)
            if row is None:
                if told is not None:
                    await self._table.delete(name)
            elif row is not told:
                await self._table.put(name, row)
            self._pending.discard(name)
