"""Hearing what is stored as it is stored, for those who wait for one run."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Self

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from headrace.errors import Unavailable
from streams.link import Link
from streams.stored import Stored

HINT_FIRST_LOOK_S = 0.0003
HINT_LAST_LOOK_S = 5.0


class Live:
    """What is stored from now on, soon after it is stored: enter it, then iterate.

    The server passes every message on to those who listen before it is stored, and also one that it then refuses. That
    costs nothing where nobody listens, so it is taken as a hint: what is given out was read from the log.
    """

    def __init__(
        self,
        link: Link,
        last: Callable[[str], Awaitable[Stored | None]],
        subjects: tuple[str, ...],
        wanted: Callable[[str, bytes], bool] | None = None,
    ) -> None:
        """Describe it; ``last`` reads the newest message of a subject from the log."""
        self._link = link
        self._last = last
        self._subjects = subjects
        self._wanted = wanted
        self._subs: list[Subscription] = []
        self._hinted: asyncio.Queue[str] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        for subject in self._subjects:
            self._subs.append(await self._link.nc.subscribe(subject, cb=self._hint))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sub in self._subs:
            if not self._link.nc.is_closed:
                await sub.unsubscribe()

    async def _hint(self, message: Msg) -> None:
        if self._wanted is None or self._wanted(message.subject, message.data):
            self._hinted.put_nowait(message.subject)

    def __aiter__(self) -> AsyncIterator[Stored]:
        return self

    async def __anext__(self) -> Stored:
        while True:
            stored = await self._await_stored(await self._hinted.get())
            if stored is not None:
                return stored

    async def _await_stored(self, subject: str) -> Stored | None:
        """Look until the hinted message is there; one that was refused never is."""
        delay_s = HINT_FIRST_LOOK_S
        while delay_s < HINT_LAST_LOOK_S:
            await asyncio.sleep(delay_s)
            with contextlib.suppress(Unavailable):
                stored = await self._last(subject)
                if stored is not None:
                    return stored
            delay_s *= 2
        return None
