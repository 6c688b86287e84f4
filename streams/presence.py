"""Which workers there are, and how many slots they have: told in passing, kept nowhere, and forgotten by age.

Each worker says every two seconds that it is there. That is no fact of the log: what was said is worth nothing once it
is old, and whoever did not hear it hears the next one. A worker that stops says so; one that dies is silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import nats.errors
from msgspec import Struct
from nats.aio.msg import Msg

from headrace.wire import decode, encode
from streams.link import Link

EVERY_S = 2.0
SILENT_S = 5.0  # one that was not heard for so long is gone

_log = logging.getLogger(__name__)


class Present(Struct, frozen=True, kw_only=True):
    """What a worker says: its name, and how many invocations it runs at a time; none when it stops."""

    worker: str
    slots: int


def presence_subject(worker: str) -> str:
    """Return the subject on which a worker says that it is there; ``"*"`` means any."""
    return f"presence.{worker}"


async def tell(link: Link, present: Present, *, every_s: float = EVERY_S) -> None:
    """Say for ever that a worker is there, and when this is canceled that it has stopped."""
    try:
        while True:
            await _say(link, present)
            await asyncio.sleep(every_s)
    finally:
        await _say(link, msgspec.structs.replace(present, slots=0))


async def _say(link: Link, present: Present) -> None:
    if link.connected:
        with contextlib.suppress(OSError, nats.errors.Error):  # lost this instant: the next time will do
            await link.nc.publish(presence_subject(present.worker), encode(present))


class Roll:
    """The workers that were heard of late."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with none; ``clock`` tells monotonic seconds."""
        self._clock = clock
        self._slots: dict[str, int] = {}
        self._heard_at: dict[str, float] = {}
        self._total = 0
        self._true_until = 0.0

    def slots(self) -> int:
        """Return how many invocations all workers together run at a time, 0 where none was heard."""
        if self._slots and self._clock() > self._true_until:
            self._forget()
        return self._total

    def heard(self, present: Present) -> None:
        """Take note of what a worker said."""
        self._slots[present.worker] = present.slots
        self._heard_at[present.worker] = self._clock()
        self._forget()

    def _forget(self) -> None:
        oldest = self._clock() - SILENT_S
        for worker in [worker for worker, at in self._heard_at.items() if at < oldest or not self._slots[worker]]:
            del self._slots[worker], self._heard_at[worker]
        self._total = sum(self._slots.values())
        self._true_until = min(self._heard_at.values(), default=0.0) + SILENT_S


@asynccontextmanager
async def roll_on(link: Link) -> AsyncIterator[Roll]:
    """Lend a roll on which everything is written down that workers say on a connection."""
    roll = Roll()

    async def hear(message: Msg) -> None:
        try:
            roll.heard(decode(message.data, Present))
        except msgspec.MsgspecError:
            _log.warning("what was said on %s cannot be read and is passed over", message.subject)

    heard = await link.nc.subscribe(presence_subject("*"), cb=hear)
    try:
        yield roll
    finally:
        if not link.nc.is_closed:
            with contextlib.suppress(OSError, nats.errors.Error):
                await heard.unsubscribe()
