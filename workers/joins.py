"""Counting branches that end together, in the log: the I/O around ``functions.scopes``.

Many members of one scope end at about the same time. While one tally of a scope is being appended, the fills that
come in gather for the next, so ten thousand members cost a few hundred tallies.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import aclosing

from functions.outlook import NOTHING_KNOWN, Outlook
from functions.scopes import Fill, Scope, read, tally, upward
from headrace.errors import Unavailable
from streams.follow import follow
from streams.log import AlreadyThere, Log, Record
from streams.stored import Stored
from streams.topology import tally_subject

SCOPES_KEPT_MAX = 1000
APPEND_TIMEOUT_S = 30.0


class _Open:
    """One scope as this worker knows it, and the fills that wait for the tally in flight."""

    def __init__(self) -> None:
        self.scope: Scope | None = None
        self.waiting: list[tuple[Fill, asyncio.Future[Scope | None]]] = []
        self.running = False


class Joins:
    """Fills slots; shared by all invocations of one worker."""

    def __init__(self, log: Log, clock: Callable[[], float] = time.time, outlook: Outlook = NOTHING_KNOWN) -> None:
        self._log = log
        self._clock = clock
        self._outlook = outlook
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    async def fill(self, fill: Fill) -> None:
        """Count a filled slot, and all that follows from it, up to the end of the run. Safe to repeat.

        Raises:
            Unavailable: the log does not answer; the work stays unacknowledged and comes again.
        """
        step: Fill | Record | None = fill
        while isinstance(step, Fill):
            scope = await self._count(step)
            step = None if scope is None else upward(scope, step)
        if isinstance(step, Record):
            with contextlib.suppress(AlreadyThere):  # the run's end was recorded by an attempt before this one
                await self._log.append([step], timeout_s=APPEND_TIMEOUT_S)

    async def _count(self, fill: Fill) -> Scope | None:
        """Count one slot and return its scope, or None where another fill of the same tally leads the way up."""
        key = f"{fill.outcome.run_id}.{fill.slot.scope}"
        known = self._open.get(key)
        if known is None:
            known = self._open[key] = _Open()
            self._forget_old()
        self._open.move_to_end(key)
        counted: asyncio.Future[Scope | None] = asyncio.get_running_loop().create_future()
        known.waiting.append((fill, counted))
        if not known.running:
            known.running = True
            task = asyncio.create_task(self._tally(known), name="tally")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await counted

    async def _tally(self, known: _Open) -> None:
        try:
            while known.waiting:
                group, known.waiting = known.waiting, []
                try:
                    scope = await self._append(known, [fill for fill, _ in group])
                except Exception as error:
                    known.scope = None  # what the log holds is unknown now: read it again next time
                    for _, counted in group:
                        if not counted.done():
                            counted.set_exception(error)
                else:
                    # One of the group goes on upward, and is acknowledged only after that: should it die on the way,
                    # its work comes again and finds itself counted and the scope full.
                    leader = max(fill.seq for fill, _ in group)
                    for fill, counted in group:
                        if not counted.done():
                            counted.set_result(scope if fill.seq == leader else None)
        finally:
            known.running = False

    async def _append(self, known: _Open, fills: list[Fill]) -> Scope:
        slot, run = fills[0].slot, fills[0].outcome.run_id
        if known.scope is None:
            # Most scopes are new to everybody: assume so, and read only when the log objects.
            known.scope = Scope(size=slot.size)
        for _ in range(100):
            scope = known.scope
            made = tally(scope, fills, self._clock(), self._outlook)
            if made is None:
                return scope
            counted, records = made
            try:
                seqs = await self._log.append(records, timeout_s=APPEND_TIMEOUT_S)
            except AlreadyThere:
                known.scope = await self._read(run, slot.scope, slot.size)
            else:
                scope.take(counted, seqs[-1])
                return scope
        raise Unavailable(f"the tallies of scope {slot.scope} change faster than they can be read", hint="Try again.")

    async def _read(self, run: str, scope: str, size: int) -> Scope:
        """Read all tallies of a scope from the log."""
        subject = tally_subject(run, scope)
        newest = await self._log.last(subject)
        found: list[Stored] = []
        if newest is not None:
            async with aclosing(follow(self._log, [subject], after=0)) as batches:
                async for batch in batches:
                    found += batch
                    if found and found[-1].seq >= newest.seq:
                        break
        return read(size, found)

    def _forget_old(self) -> None:
        """Drop what was not touched for longest; a scope that is needed again is read from the log."""
        while len(self._open) > SCOPES_KEPT_MAX:
            key, oldest = next(iter(self._open.items()))
            if oldest.running or oldest.waiting:
                self._open.move_to_end(key)
                return
            del self._open[key]
