"""``Prefer: wait=N``: callers that stay until their run has ended."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from gateway.needs import Log
from gateway.problems import Busy
from gateway.runs import RunBook
from headrace.errors import BadRequest, NotFound
from headrace.model import FINAL, RunView
from headrace.wire import Outcome, decode
from streams.stored import Stored
from streams.topology import cancel_subject, done_subject, end_subject, kind_of

_WAIT = re.compile(r'(?:^|[,;\s])wait\s*=\s*"?([0-9]{1,6}(?:\.[0-9]{1,6})?)"?(?=$|[,;\s])', re.IGNORECASE)
_MENTIONED = re.compile(r"(?:^|[,;\s])wait\s*(?:=|$|[,;])", re.IGNORECASE)
_LOOK_S = 5.0


def wait_of(prefer: str | None, seconds_max: float) -> float:
    """Return the seconds that a ``Prefer`` header asks to wait, 0 if it does not ask.

    Raises:
        BadRequest: it asks with something that is no number of seconds.
    """
    if prefer is None:
        return 0.0
    match = _WAIT.search(prefer)
    if match is not None:
        return min(float(match[1]), seconds_max)
    if _MENTIONED.search(prefer):
        raise BadRequest(f"Prefer: {ascii(prefer)[:80]} is not understood", hint="Write wait=10 for ten seconds.")
    return 0.0


class Seat:
    """One caller that waits. It listens before the run is appended, so that no end is too quick to be heard."""

    def __init__(self, log: Log, book: RunBook, stack: AsyncExitStack) -> None:
        self._log = log
        self._book = book
        self._stack = stack
        self._heard: AsyncIterator[Stored] | None = None

    async def listen(self, run_id: str) -> None:
        """Begin to listen for the end of this run."""
        self._heard = await self._stack.enter_async_context(
            self._log.live(done_subject(run_id, "*"), end_subject(run_id), cancel_subject(run_id, "*"), wanted=ends)
        )

    async def view(self, run_id: str, wait_s: float, *, duplicate: bool) -> RunView | None:
        """Wait for the end of the run and return it as it is then, or None if it has not ended in time.

        What is heard live may miss an end while the connection comes back, so the run is looked at now and then too;
        one that was there before may have ended long ago, so it is looked at first.
        """
        loop = asyncio.get_running_loop()
        give_up = loop.time() + wait_s
        if duplicate and (found := await self._look(run_id, None)) is not None:
            return found
        while (left := give_up - loop.time()) > 0.0:
            seq = await self._end(min(left, _LOOK_S))
            if (found := await self._look(run_id, seq)) is not None:
                return found
        return None

    async def _end(self, wait_s: float) -> int | None:
        """Return the sequence of the fact that ended the run, or None if none was heard in time."""
        if self._heard is None:
            return None
        try:
            async with asyncio.timeout(wait_s):
                return (await anext(self._heard)).seq
        except TimeoutError:
            pass
        return None

    async def _look(self, run_id: str, seq: int | None) -> RunView | None:
        try:
            found = await (self._book.read(run_id) if seq is None else self._book.read_end(run_id, seq))
        except NotFound:
            return None
        return found if found.state in FINAL else None


class Waiting:
    """How many callers may wait at once."""

    def __init__(self, *, log: Log, book: RunBook, seats_max: int) -> None:
        self._log = log
        self._book = book
        self._seats_max = seats_max
        self.taken = 0

    @asynccontextmanager
    async def seat(self) -> AsyncIterator[Seat]:
        """Lend a seat.

        Raises:
            Busy: all are taken.
        """
        if self.taken >= self._seats_max:
            raise Busy(
                "too many callers wait for answers", hint="Trigger without `Prefer: wait` and read the run later."
            )
        self.taken += 1
        try:
            async with AsyncExitStack() as stack:
                yield Seat(self._log, self._book, stack)
        finally:
            self.taken -= 1


def ends(subject: str, body: bytes) -> bool:
    """Return whether this fact ends its run. A map has thousands of outcomes that do not."""
    kind = kind_of(subject)
    return kind in ("end", "cancel") or (kind == "done" and decode(body, Outcome).end is not None)
