"""A run in the hand: asking for its state, its answer and its story."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Protocol

from headrace.answers import value_of
from headrace.following import has_answer, is_end
from headrace.model import FINAL, Fidelity, Quote, RunRef, RunState, RunView, StreamEvent
from headrace.transport import delays
from headrace.wire import Payload

_READABLE_S = 5.0  # what is known to be there is readable everywhere within a moment


class Platform(Protocol):
    """What a run asks of the client it came from."""

    async def view(self, run_id: str) -> RunView:
        """Return the run as it is now."""

    async def answer(self, run_id: str, timeout: float | None) -> Payload:
        """Wait for the answer."""

    async def answer_now(self, run_id: str, level: int | None = None) -> Payload | None:
        """Return the answer, or the one of this level."""

    def events(self, path: str, after: int | None = None) -> AsyncGenerator[StreamEvent, None]:
        """Yield the events of a path."""

    async def cancel(self, run_id: str) -> None:
        """Stop the run."""


class AsyncRun:
    """One run on the platform. ``run_id`` names it everywhere; ``duplicate`` says that it was there already.

    ``ref`` is the promise given when this call had it accepted; ``seen`` is the run as it was last looked at.
    """

    def __init__(
        self, platform: Platform, run_id: str, *, ref: RunRef | None = None, seen: RunView | None = None
    ) -> None:
        told = ref or seen
        self.run_id = run_id
        self.route = told.route if told else ""
        self.deadline = told.deadline if told else None
        self.quote = told.quote if told else Quote()
        self.duplicate = ref.duplicate if ref else False
        self.ref = ref
        self._platform = platform
        self.seen = seen

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.run_id} on {self.route or '?'}>"

    async def view(self) -> RunView:
        """Return the run as it is now. What has ended, and cannot be revised, stays so and is not asked for again."""
        if self.seen is None or self.seen.state not in FINAL or self.seen.thread:
            self.seen = await self._platform.view(self.run_id)
        return self.seen

    async def state(self) -> RunState:
        """Return the state: accepted, running, succeeded, failed or canceled."""
        return (await self.view()).state

    async def result(self, timeout: float | None = None) -> Any:
        """Wait for the answer and return it: decoded JSON, text, or bytes, as its content type says.

        Args:
            timeout: the longest wait in seconds; None waits for as long as it takes.

        Raises:
            RunFailed: the run ended without an answer; ``kind`` and ``traceback`` say why.
            RunCanceled: somebody canceled it.
            TimeoutError: there is no answer yet. The run goes on.
        """
        return value_of(await self.payload(timeout))

    async def payload(self, timeout: float | None = None) -> Payload:
        """Wait for the answer and return its bytes with their content type; raises what ``result`` raises."""
        if timeout is not None and self.seen is not None and self.seen.state in FINAL:
            timeout = max(timeout, _READABLE_S)  # it has ended, so this is not about waiting for it
        return await self._platform.answer(self.run_id, timeout)

    async def result_at(self, level: int) -> Any:
        """Return one of several answers: that of the variant of this level, whatever came after it.

        Raises:
            NotFound: there is no answer of this level (yet); ``view().answers`` tells which there are.
        """
        payload = await self._platform.answer_now(self.run_id, level)
        return None if payload is None else value_of(payload)

    async def follow(self, after: int | None = None) -> AsyncGenerator[StreamEvent, None]:
        """Yield what happens in the run, from its acceptance to its end, across lost connections without a gap.

        Args:
            after: go on after this event (its ``seq``) instead of beginning with the first.
        """
        async with aclosing(self._platform.events(f"/v1/runs/{self.run_id}/events", after)) as found:
            async for event in found:
                yield event
                if is_end(event):
                    return

    async def answered(self) -> RunView:
        """Wait until the run has its answer, or has ended without one, and return it as it is then.

        Of several answers this is the first; ``ended`` waits for the best.
        """
        return await self._seen_as(has_answer, lambda view: view.answered_at is not None or view.state in FINAL)

    async def fidelity(self) -> Fidelity | None:
        """Return how good the answer is that there is now; None where there is none, or its function has no variants.

        Asks the platform.
        """
        return (await self.view()).fidelity

    async def ended(self) -> RunView:
        """Wait until the run has ended, however that may be, and return it as it is then."""
        return await self._seen_as(is_end, lambda view: view.state in FINAL)

    async def _seen_as(self, told: Callable[[StreamEvent], bool], seen: Callable[[RunView], bool]) -> RunView:
        """Wait until an event tells something of the run, and then until its view says so too."""
        async with aclosing(self.follow()) as events:
            async for event in events:
                if told(event):
                    break
        waits = delays()
        while True:
            view = await self.view()
            if seen(view):
                return view
            await asyncio.sleep(next(waits))  # what was told is not readable yet

    async def cancel(self) -> None:
        """Stop the run: what waits is dropped, what runs is stopped.

        Raises:
            Conflict: it has succeeded or failed already.
        """
        await self._platform.cancel(self.run_id)
