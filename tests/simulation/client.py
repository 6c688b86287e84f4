"""The NATS client of a simulated process: what ``Link`` and our code use of it, over a network that has faults."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import nats.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from streams.link import PING_INTERVAL_S, PINGS_UNANSWERED_MAX, RECONNECT_WAIT_S, Link
from tests.simulation.loop import Process, SimLoop
from tests.simulation.messages import Headers, Wire
from tests.simulation.server import SimServer

SUB, UNSUB = "+SUB", "-SUB"  # in place of a reply: what the client wants to hear, and no longer
NOTICED_S = PING_INTERVAL_S * (PINGS_UNANSWERED_MAX + 1)
Outgoing = tuple[str, bytes, str, Headers]


class _Version(NamedTuple):
    major: int = 2
    minor: int = 15
    patch: int = 1


class Network:
    """How long messages take. Those of one connection keep their order."""

    def __init__(self, loop: SimLoop, rng: random.Random) -> None:
        self.loop = loop
        self._draw = rng.random
        self.usual_s = 0.0005
        self.slow_share = 0.0
        self.slow_s = 0.2

    def delay_s(self) -> float:
        """Draw the time that what is sent now takes."""
        if self.slow_share and self._draw() < self.slow_share:
            return self.slow_s * self._draw()
        return self.usual_s * (0.5 + self._draw())

    def unique(self) -> str:
        """Draw a name that nobody else has."""
        return f"{int(self._draw() * 16**12):012x}"


class Wired:
    """One connection, from when it is made until it breaks."""

    def __init__(self, client: SimClient, server: SimServer, network: Network) -> None:
        self.name = client.process.name
        self._client = client
        self._server = server
        self._network = network
        self._to_server: list[Outgoing] = []
        self._to_client: list[Wire] = []
        self.open = True
        self.stalled = False
        self._lingers = False

    def say(self, messages: list[Outgoing]) -> None:
        """Put messages on the way to the server."""
        if not self._to_server and not self.stalled:
            self._network.loop.later(self._network.delay_s(), self._reach_server)
        self._to_server += messages

    def send(self, message: Wire) -> None:
        """Put a message on the way to the client."""
        if not self._to_client and not self.stalled:
            self._network.loop.later(self._network.delay_s(), self._reach_client)
        self._to_client.append(message)

    def _reach_server(self) -> None:
        if self.stalled:
            return
        messages, self._to_server = self._to_server, []
        if self.open or self._lingers:
            for subject, body, reply, headers in messages:
                if reply == SUB:
                    self._server.subscribe(self, subject)
                elif reply == UNSUB:
                    self._server.unsubscribe(self, subject)
                else:
                    self._server.handle(self, subject, body, reply, headers)
            if not self.open:
                self._server.forget(self)

    def _reach_client(self) -> None:
        if self.stalled:
            return
        messages, self._to_client = self._to_client, []
        if self.open:
            self._client.process.soon(self._client.receive, self, messages)

    def stall(self) -> None:
        """Let nothing through any more; neither side is told."""
        self.stalled = True

    def flow(self) -> None:
        """Let through what was held up."""
        if self.stalled and self.open:
            self.stalled = False
            self._network.loop.later(self._network.delay_s(), self._reach_server)
            self._network.loop.later(self._network.delay_s(), self._reach_client)

    def cut(self, *, lingers: bool = False) -> None:
        """Break: what is on its way to the client is lost, and both sides are told.

        With ``lingers`` what has left the client arrives, as when its process was killed and its machine was not.
        """
        if self.open:
            self.open = False
            self._lingers = lingers and not self.stalled
            self._server.forget(self)
            self._client.process.soon(self._client.lose, self)

    def abandon(self) -> None:
        """The client has gone without a word; the server will not notice for a while, and sends into the void."""
        self.stalled = True


class SimSubscription:
    """Messages of one subject pattern, given to its callback one after the other."""

    def __init__(self, client: SimClient, pattern: str, take: Callable[[Msg], Awaitable[None]]) -> None:
        self.pattern = pattern
        self._client = client
        self._take = take
        self.waiting: deque[Msg] = deque()

    def next(self) -> None:
        """Give the next message to the callback, which must not have to wait for anything."""
        if self.waiting:
            message = self.waiting.popleft()
            try:
                self._take(message).__await__().send(None)
            except StopIteration:
                return
            raise AssertionError(f"the callback of {self.pattern} waits")

    async def unsubscribe(self) -> None:
        """Hear no more."""
        self.waiting.clear()
        await self._client.drop(self)


class SimClient:
    """One process's client: it reconnects for ever, and what is published in the meantime goes out then."""

    connected_server_version = _Version()

    def __init__(self, process: Process, link: Link, server: SimServer, network: Network) -> None:
        self.process = process
        self.is_closed = False
        self.wired: Wired | None = None
        self.reachable = True
        self._link = link
        self._server = server
        self._network = network
        self._prefix = f"_INBOX_{process.name}"
        self._asked = itertools.count(1)
        self._outgoing: list[Outgoing] = []
        self._flushing = False
        self._subs: dict[str, list[SimSubscription]] = {}  # by what comes before a closing ``*``, or by exact subject
        self._requests: dict[str, asyncio.Future[Msg]] = {}
        self._request_prefix = ""

    @property
    def is_connected(self) -> bool:
        """Whether the connection stands, as far as this client knows."""
        return self.wired is not None

    def new_inbox(self) -> str:
        """Return a subject that nobody else uses."""
        return f"{self._prefix}.{self._network.unique()}"

    def jetstream(self, **options: Any) -> JetStreamContext:
        """Return the interface for management requests."""
        return JetStreamContext(self, **options)  # type: ignore[arg-type] # it uses no more than this client has

    # ------------------------------------------------------------ out

    async def publish(self, subject: str, payload: bytes = b"", reply: str = "", headers: Headers = None) -> None:
        """Send a message; it leaves with others a moment later."""
        if self.is_closed:
            raise nats.errors.ConnectionClosedError
        self._outgoing.append((subject, payload, reply, None if headers is None else dict(headers)))
        if not self._flushing:
            self._flushing = True
            self.process.soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self.wired is not None and self._outgoing:
            self.wired.say(self._outgoing)
            self._outgoing = []

    async def flush(self) -> None:
        """Send what waits."""
        self._flush()

    async def request(self, subject: str, payload: bytes = b"", timeout: float = 0.5, headers: Headers = None) -> Msg:
        """Ask, and return the answer."""
        if not self._request_prefix:
            self._request_prefix = self.new_inbox()
            await self.subscribe(self._request_prefix + ".*", cb=self._take_answer)
        reply = f"{self._request_prefix}.{next(self._asked)}"
        future = self._requests[reply] = asyncio.get_running_loop().create_future()
        try:
            await self.publish(subject, payload, reply=reply, headers=headers)
            answer: Msg = await asyncio.wait_for(future, timeout)
        except TimeoutError as error:
            raise nats.errors.TimeoutError from error
        finally:
            self._requests.pop(reply, None)
        if answer.headers and answer.headers.get("Status") == "503":
            raise nats.errors.NoRespondersError
        return answer

    async def _take_answer(self, message: Msg) -> None:
        future = self._requests.get(message.subject)
        if future is not None and not future.done():
            future.set_result(message)

    # ------------------------------------------------------------ in

    async def subscribe(self, subject: str, *, cb: Callable[[Msg], Awaitable[None]]) -> SimSubscription:
        """Hear a subject; what waits to be sent leaves first, in order."""
        if self.is_closed:
            raise nats.errors.ConnectionClosedError
        sub = SimSubscription(self, subject, cb)
        subs = self._subs.setdefault(subject, [])
        subs.append(sub)
        if len(subs) == 1:
            await self.publish(subject, reply=SUB)
        return sub

    async def drop(self, sub: SimSubscription) -> None:
        """Hear a subject no longer."""
        subs = self._subs.get(sub.pattern, [])
        if sub in subs:
            subs.remove(sub)
            if not subs:
                del self._subs[sub.pattern]
                await self.publish(sub.pattern, reply=UNSUB)

    def receive(self, wired: Wired, messages: list[Wire]) -> None:
        """Take what has come over a connection; each subscription goes at its own pace."""
        if wired is not self.wired:
            return
        for to, subject, reply, body, headers in messages:
            for sub in self._subs.get(to.rpartition(".")[0] + ".*") or self._subs.get(to) or ():
                sub.waiting.append(Msg(self, subject, reply, body, headers))  # type: ignore[arg-type]
                self.process.soon(sub.next)

    # ------------------------------------------------------------ connection

    async def open(self) -> None:
        """Make the first connection, as soon as the server takes it."""
        while not (self.reachable and self._server.up):
            await asyncio.sleep(RECONNECT_WAIT_S)
        self.connect()

    def connect(self) -> None:
        """Make a connection; the server has to be up."""
        self.wired = Wired(self, self._server, self._network)
        if self._subs:
            self.wired.say([(pattern, b"", SUB, None) for pattern in self._subs])
        self._flush()

    def lose(self, wired: Wired) -> None:
        """Notice that the connection is gone, with all that has not left yet."""
        if self.wired is wired and not self.is_closed:
            self.wired = None
            self._outgoing = []
            self.process.spawn(self._reconnect())

    async def _reconnect(self) -> None:
        await self._link.gone()
        await self.open()
        await self._link.back()

    async def close(self) -> None:
        """Close for good."""
        self.is_closed = True
        wired, self.wired = self.wired, None
        if wired is not None:
            wired.open = False
            self._server.forget(wired)
        await self._link.gone()

    # ------------------------------------------------------------ faults, from outside

    def partition(self) -> None:
        """Let nothing through, and no new connection either; the client notices by its pings."""
        self.reachable = False
        if self.wired is not None:
            wired = self.wired
            wired.stall()
            self._network.loop.later(NOTICED_S, self._notice, wired)

    def heal(self) -> None:
        """Let messages through again."""
        self.reachable = True
        if self.wired is not None:
            self.wired.flow()

    def _notice(self, wired: Wired) -> None:
        if wired.stalled and wired.open:
            wired.abandon()
            self._network.loop.later(5.0, self._server.forget, wired)
            self.process.soon(self.lose, wired)
