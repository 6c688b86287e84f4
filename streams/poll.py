"""Pull requests that stay open: the server holds the request, so a message costs no question.

A poll dies with the connection, with the server, and silently when a request is lost. So it asks again after a
reconnect, when its requests expire, and when heartbeats stop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import NamedTuple

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from streams.link import Link
from streams.topology import STREAM

EXPIRES_S = 120
# In a cluster the request of an agent that is gone seems to be open until it expires, for the user of a site is of
# another account; what it is given until then comes to nobody, and again only when the time to acknowledge it is over.
SITE_EXPIRES_S = 5
GLANCE_S = 0.25
# In a cluster a consumer may lose its leader while our own connection stands: only the silence tells. A server that is
# alone does not fall silent while it answers the pings of the connection; then it is only to be on the safe side.
HEARTBEAT_S, HEARTBEAT_ALONE_S, HEARTBEAT_S_MAX = 2.0, 10.0, 60.0
HEARTBEATS_PER_S_MAX = 30.0  # for one process, however many lanes of however many tenants it polls
SILENT_BEATS = 2.5  # so many heartbeats late, and the request is taken for lost
ABSENT_RETRY_S = 0.25


def heartbeat_s(polls: int, *, replicated: bool) -> float:
    """Return how often the server is to say of a request that it is still open, in seconds.

    Args:
        polls: how many there are beside each other.
        replicated: whether the log has copies on several servers.
    """
    often = HEARTBEAT_S if replicated else HEARTBEAT_ALONE_S
    return min(HEARTBEAT_S_MAX, max(often, polls / HEARTBEATS_PER_S_MAX))


class Arrival(NamedTuple):
    """A message as a consumer delivers it: ``delivered`` counts deliveries, ``place`` the consumer's own order.

    ``behind`` is how many the consumer had left that nobody was given yet.
    """

    seq: int
    subject: str
    body: bytes
    at: float
    delivered: int
    place: int
    reply: str
    behind: int = 0


def arrival(message: Msg) -> Arrival:
    """Read the place of a delivered message from its reply subject ($JS.ACK, with or without domain and account)."""
    parts = message.reply.split(".")
    base = 4 if len(parts) == 9 else 6
    return Arrival(
        int(parts[base + 1]),
        message.subject,
        message.data,
        int(parts[base + 3]) // 1000 / 1e6,  # whole microseconds, as of a message that is read
        int(parts[base]),
        int(parts[base + 2]),
        message.reply,
        int(parts[base + 4]),
    )


class Poll:
    """Open requests on one consumer: ``take`` gets each message, ``lost`` hears that the consumer is gone.

    ``heartbeat_s`` may be changed at any time, and counts from the next request on.
    """

    def __init__(
        self,
        link: Link,
        consumer: str,
        take: Callable[[Arrival], None],
        lost: Callable[[], None],
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        self._link = link
        self._next = f"{link.api}.CONSUMER.MSG.NEXT.{STREAM}.{consumer}"
        self._take = take
        self._lost = lost
        self._prefix = ""
        # Requests die together (reconnect, silence): what an answer belongs to is told by the round it was asked in.
        self._round = 0
        self._sub: Subscription | None = None
        self._forget: Callable[[], None] | None = None
        self._guard: asyncio.Task[None] | None = None
        self._retry: asyncio.Future[None] | None = None
        self._heard_at = 0.0
        self._wanted = 0
        self._silent_s = SILENT_BEATS * heartbeat_s
        self.heartbeat_s = heartbeat_s
        self._expires_s = SITE_EXPIRES_S if link.site else EXPIRES_S
        self.outstanding = 0
        self.dry = False  # a request ended for want of messages, and nothing came since

    async def start(self) -> None:
        """Begin to listen; nothing is asked for yet."""
        self._prefix = self._link.nc.new_inbox() + "."
        self._sub = await self._link.nc.subscribe(self._prefix + "*", cb=self._hear)
        self._forget = self._link.on_reconnect(self._reconnected)
        self._guard = asyncio.create_task(self._watch(), name="poll-guard")

    async def close(self) -> None:
        """Stop listening. What the server sends to an open request after this comes to somebody else in time."""
        if self._forget is not None:
            self._forget()
            self._forget = None
        if self._guard is not None:
            self._guard.cancel()
        if self._sub is not None and not self._link.nc.is_closed:
            with contextlib.suppress(Exception):
                await self._sub.unsubscribe()

    async def want(self, messages: int) -> None:
        """Ask for as many more as bring ``outstanding`` to this number; fewer than now asks for nothing."""
        self._wanted = messages
        more = messages - self.outstanding
        if more <= 0 or not self._link.connected:
            return
        # The open requests of a poll differ for a while where this was changed: the rarest heartbeat is waited for.
        self._silent_s = max(self._silent_s if self.outstanding else 0.0, SILENT_BEATS * self.heartbeat_s)
        request = b'{"batch":%d,"expires":%d,"idle_heartbeat":%d}' % (
            more,
            self._expires_s * 1_000_000_000,
            int(min(self.heartbeat_s, self._expires_s / 2) * 1e9),
        )
        await self._ask(more, request)

    async def glance(self, messages: int) -> None:
        """Ask for so many more on top, of what is there at this moment: soon after, nobody is held to it."""
        if self._link.connected:
            await self._ask(messages, b'{"batch":%d,"expires":%d}' % (messages, int(GLANCE_S * 1_000_000_000)))

    async def _ask(self, messages: int, request: bytes) -> None:
        self.outstanding += messages
        self._heard_at = asyncio.get_running_loop().time()
        with contextlib.suppress(OSError, nats.errors.Error):  # lost this instant: a reconnect asks again
            await self._link.nc.publish(self._next, request, reply=f"{self._prefix}{self._round}")

    async def _hear(self, message: Msg) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        headers = message.headers
        status = headers.get("Status") if headers is not None else None
        if headers is None or status is None:
            self.outstanding = max(0, self.outstanding - 1)
            self.dry = False
            self._take(arrival(message))
            return
        # A status comes to the inbox itself; 100 is a heartbeat, all others end one request: expired, refused, gone.
        if status == "100" or message.subject[len(self._prefix) :] != str(self._round):
            return
        unfilled = headers.get("Nats-Pending-Messages")
        self.outstanding = 0 if unfilled is None else max(0, self.outstanding - int(unfilled))
        self.dry = True
        if status in ("404", "503") or "Deleted" in str(headers.get("Description", "")):
            # Nobody serves this consumer: it is gone, or its server is only half up and will be asked again.
            self._lost()
            asyncio.get_running_loop().call_later(ABSENT_RETRY_S, self._ask_again, self._round)
        elif self.outstanding <= self._wanted // 2:
            await self.want(self._wanted)

    def _ask_again(self, asked_in: int) -> None:
        if asked_in == self._round and self._forget is not None:
            self._retry = asyncio.ensure_future(self.want(self._wanted))

    async def _reconnected(self) -> None:
        """Ask again; and what was on its way over the old connection is lost, be it the last message there is."""
        self._lost()
        await self._restart()

    async def _restart(self) -> None:
        self._round += 1
        self.outstanding = 0
        if self._wanted:
            await self.want(self._wanted)

    async def _watch(self) -> None:
        """Ask again when a request has been open for long without a sign of life."""
        while True:
            await asyncio.sleep(self.heartbeat_s)
            silent_s = asyncio.get_running_loop().time() - self._heard_at
            if self.outstanding and silent_s > self._silent_s and self._link.connected:
                self._lost()
                await self._restart()
