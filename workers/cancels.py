"""Runs that nobody needs any more: what runs of them is stopped, and what comes later of them is dropped."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import aclosing
from types import TracebackType
from typing import Any

from headrace.errors import Unavailable
from streams.follow import follow
from streams.log import Log
from streams.topology import cancel_subject, run_of

CANCELS_KEPT_MAX = 100_000


class Cancels:
    """Hears of runs that are canceled, and knows what of them runs here."""

    def __init__(self, log: Log, heard: Callable[[], None] = lambda: None) -> None:
        """Describe it; ``read`` is set once all that the log holds now is known, ``heard`` is called after news."""
        self._log = log
        self._heard = heard
        self._canceled: OrderedDict[str, None] = OrderedDict()
        self._running: dict[str, set[asyncio.Task[Any] | None]] = {}
        self.read = asyncio.Event()

    def __contains__(self, run: object) -> bool:
        """Say whether a run was canceled."""
        return run in self._canceled

    def stopping(self, run: str) -> _Stopping:
        """Return what to be within (``with``) to have the current task canceled should the run be."""
        return _Stopping(self._running, run)

    async def follow(self) -> None:
        """Hear of cancels for ever."""
        known_up_to, read_up_to = await self._newest(), 0
        if not known_up_to:
            self.read.set()
        async with aclosing(follow(self._log, [cancel_subject("*", "*")], after=0)) as batches:
            async for batch in batches:
                for stored in batch:
                    run = run_of(stored.subject)
                    self._canceled[run] = None
                    for task in list(self._running.get(run, ())):
                        if task is not None:
                            task.cancel()
                while len(self._canceled) > CANCELS_KEPT_MAX:
                    self._canceled.popitem(last=False)
                self._heard()
                if batch:
                    read_up_to = batch[-1].seq
                elif not self.read.is_set():
                    with contextlib.suppress(Unavailable):  # what was the newest may have become too old to be kept
                        known_up_to = await self._newest()
                if read_up_to >= known_up_to:
                    self.read.set()

    async def _newest(self) -> int:
        newest = await self._log.last(cancel_subject("*", "*"))
        return 0 if newest is None else newest.seq


class _Stopping:
    """The current task, as one of those that run something of a run."""

    __slots__ = ("_run", "_running", "_task")

    def __init__(self, running: dict[str, set[asyncio.Task[Any] | None]], run: str) -> None:
        self._running = running
        self._run = run
        self._task = asyncio.current_task()

    def __enter__(self) -> None:
        self._running.setdefault(self._run, set()).add(self._task)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        mine = self._running[self._run]
        mine.discard(self._task)
        if not mine:
            del self._running[self._run]
