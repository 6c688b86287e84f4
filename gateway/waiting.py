"""``Prefer: wait=N``: callers that stay until their run has its answer, or has ended without one."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from gateway.needs import Log
from gateway.problems import Busy
from gateway.runs import RunBook, RunBooks
from gateway.shares import Shares
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
    """One caller that waits. It listens before the run is appended, so that no answer is too quick to be heard."""

    def __init__(self, log: Log, book: RunBook, stack: AsyncExitStack) -> None:
        self._log = log
        self._book = book
        self._stack = stack
        self._heard: AsyncIterator[Stored] | None = None

    async def listen(self, run_id: str) -> None:
        """Begin to listen for the answer of this run."""
        subjects = (done_subject(run_id, "*"), end_subject(run_id), cancel_subject(run_id, "*"))
        self._heard = await self._stack.enter_async_context(self._log.live(*subjects, wanted=answers))

    async def view(self, run_id: str, wait_s: float, *, duplicate: bool) -> RunView | None:
        """Wait for the answer of the run, or its end, and return it as it is then; None if neither came in time.

        What is heard live may miss an answer while the connection comes back, so the run is looked at now and then too;
        one that was there before may have had it long ago, so it is looked at first.
        """
        loop = asyncio.get_running_loop()
        give_up = loop.time() + wait_s
        if duplicate and (found := await self._look(run_id, None)) is not None:
            return found
        while (left := give_up - loop.time()) > 0.0:
            seq = await self._answer(min(left, _LOOK_S))
            if (found := await self._look(run_id, seq)) is not None:
                return found
        return None

    async def _answer(self, wait_s: float) -> int | None:
        """Return the sequence of the fact that answered or ended the run, or None if none was heard in time."""
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
        return found if found.state in FINAL or found.answered_at is not None else None


class Waiting:
    """How many callers may wait at once."""

    def __init__(self, *, log: Log, books: RunBooks, seats_max: int, shared: Callable[[], bool]) -> None:
        self._log = log
        self._books = books
        self._seats = Shares(seats_max, shared, _full)

    @property
    def taken(self) -> int:
        """How many callers wait."""
        return self._seats.taken

    @asynccontextmanager
    async def seat(self, tenant: str) -> AsyncIterator[Seat]:
        """Lend a seat to a caller who waits for a run of this tenant.

        Raises:
            Busy: all are taken.
            Overloaded: those that are left are kept for other tenants.
        """
        self._seats.take(tenant)
        try:
            async with AsyncExitStack() as stack:
                yield Seat(self._log, self._books.of(tenant), stack)
        finally:
            self._seats.give_back(tenant)


def answers(subject: str, body: bytes) -> bool:
    """Return whether this fact answers its run, or ends it. A map has thousands of outcomes that do neither."""
    kind = kind_of(subject)
    if kind != "done":
        return kind in ("end", "cancel")
    outcome = decode(body, Outcome)
    return outcome.end is not None or outcome.answer is not None


def _full() -> Busy:
    return Busy("too many callers wait for answers", hint="Trigger without `Prefer: wait` and read the run later.")
