"""One connection to NATS for a whole process: it reconnects for ever and notices a dead network within seconds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import uuid4

from nats.aio.client import Client as NatsClient
from nats.js import JetStreamContext

from headrace.errors import Unavailable
from headrace.tasks import ended

_log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2
OPEN_TIMEOUT_S = 20.0
PING_INTERVAL_S = 1
# With two, a server that hangs is left after three to four seconds: sooner than a cluster has a new leader.
PINGS_UNANSWERED_MAX = 2
RECONNECT_WAIT_S = 0.1
PENDING_BYTES_MAX = 64 * 1024 * 1024
API = "$JS.API"
# An account without streams of its own cannot import the API of another one under this name: the server answers itself.
SITE_API = "site.API"
READERS = 16
SAY_AGAIN_S = 10.0


class _Client(NatsClient):
    """The client, which drops a connection at once when it is lost, with all that has not left yet.

    Left alone, it waits until the server has taken the rest, which a paused one never does; and it would send the rest
    over the next connection, when those who wait for answers have asked again long ago.

    Headers are written and read without a look at every character of them: the server and we alone write them, each
    message of the log has several, and that look took a tenth of a worker's time.
    """

    async def _send_publish(
        self, subject: str, reply: str, payload: bytes, payload_size: int, headers: dict[str, str] | None
    ) -> None:
        if not headers:
            await super()._send_publish(subject, reply, payload, payload_size, None)
            return
        # Put together, not formatted: the names of the client's own are members of an enumeration, and would be those.
        lines = "".join([name + f": {value}\r\n" for name, value in headers.items()])
        head = f"NATS/1.0\r\n{lines}\r\n".encode()
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += payload_size
        order = f"HPUB {subject} {reply} {len(head)} {len(head) + payload_size}\r\n".encode()
        await self._send_command(b"%b%b%b\r\n" % (order, head, payload))
        if self._flush_queue is not None and self._flush_queue.empty():
            await self._flush_pending()

    @staticmethod
    def _parse_header_lines(raw: bytes) -> dict[str, str]:
        found: dict[str, str] = {}
        for line in raw.decode("utf-8", "replace").split("\r\n"):
            name, colon, value = line.partition(":")
            if colon:
                found[name] = value.strip()
        return found

    async def _process_op_err(self, e: Exception) -> None:
        if (self.is_connected or self.is_connecting) and not self.is_closed:
            writer = getattr(self._transport, "_io_writer", None)
            if writer is not None:
                writer.transport.abort()
            self._pending = []
            self._pending_data_size = 0
        await super()._process_op_err(e)


class Link:
    """A NATS connection and those who want to know when it came back.

    Pull requests and ephemeral consumers die with a connection: whoever holds one registers with ``on_reconnect`` and
    asks again.
    """

    def __init__(self, site: str = "") -> None:
        """Describe it; ``site`` is the one whose account this is a user of, which reaches a part of the log only."""
        self.site = site
        self.api = SITE_API if site else API
        self._readers: asyncio.Queue[str] = asyncio.Queue()
        for name in random.sample(reader_names(site), READERS if site else 0):
            self._readers.put_nowait(name)
        self.nc: NatsClient = _Client()
        self.last_error = ""
        self._said, self._said_at = "", 0.0
        self._reconnected: list[Callable[[], Awaitable[None]]] = []
        self._lost: list[Callable[[], None]] = []
        self._up = asyncio.Event()

    @property
    def connected(self) -> bool:
        """Whether the connection stands at this moment."""
        return bool(self.nc.is_connected)

    def jetstream(self, timeout_s: float = 5.0) -> JetStreamContext:
        """Return the JetStream interface for management requests."""
        return self.nc.jetstream(timeout=timeout_s, prefix=self.api)

    @contextlib.asynccontextmanager
    async def reader(self) -> AsyncIterator[str]:
        """Lend a name for a short-lived consumer; the user of a site waits for one of those that it may use."""
        if not self.site:
            yield f"follow-{uuid4().hex[:16]}"
            return
        name = await self._readers.get()
        try:
            yield name
        finally:
            self._readers.put_nowait(name)

    def on_reconnect(self, act: Callable[[], Awaitable[None]]) -> Callable[[], None]:
        """Have ``act`` awaited after each reconnect; call what is returned to stop that."""
        self._reconnected.append(act)

        def forget() -> None:
            with contextlib.suppress(ValueError):
                self._reconnected.remove(act)

        return forget

    def on_loss(self, act: Callable[[], None]) -> Callable[[], None]:
        """Have ``act`` called each time the connection is lost; call what is returned to stop that."""
        self._lost.append(act)

        def forget() -> None:
            with contextlib.suppress(ValueError):
                self._lost.remove(act)

        return forget

    async def until_connected(self) -> None:
        """Return as soon as the connection stands."""
        while not self.connected:
            self._up.clear()
            await self._up.wait()

    async def back(self) -> None:
        """Called by the client after a reconnect."""
        self._up.set()
        _log.warning("connected to NATS again")
        for act in list(self._reconnected):
            try:
                await act()
            except Exception:
                _log.exception("after a reconnect, %r failed", act)

    async def gone(self) -> None:
        """Called by the client when the connection is lost, and when it is closed on purpose."""
        for act in list(self._lost):
            act()
        if not self.nc.is_closed:
            _log.warning("the connection to NATS is gone; trying again for ever")

    async def failed(self, error: Exception) -> None:
        """Called by the client when something goes wrong in the background."""
        if not self.last_error or not isinstance(error, OSError) or isinstance(error, ssl.SSLError):
            # A server that refuses somebody may reset the connection before its reason is read: the reason says more.
            self.last_error = str(error)
        said, now = str(error), time.monotonic()
        if said != self._said or now - self._said_at >= SAY_AGAIN_S:  # it is tried ten times a second
            self._said, self._said_at = said, now
            _log.warning("NATS says: %s", error)

    async def close(self) -> None:
        """Send what is waiting and close; an unreachable server does not hold this up."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(2):
                await self.nc.flush()
        with contextlib.suppress(OSError):  # closing a connection that the server closed first
            await self.nc.close()


def reader_names(site: str) -> list[str]:
    """Return the names that short-lived consumers of a site's user have: its rights name each of them."""
    return [f"read-{number}@{site}" for number in range(READERS)]


def inbox_of(site: str) -> str:
    """Return the prefix of the subjects on which the user of a site hears."""
    return f"_INBOX_site.{site}"


async def open_link(url: str, *, user: str = "", password: str = "", name: str = "headrace", site: str = "") -> Link:
    """Connect to one or more servers (URLs parted by commas) and return the link; ``site`` as of ``Link``.

    Raises:
        Unavailable: no server answered within 20 s, or all refuse the credentials.
    """
    link = Link(site)
    options: dict[str, Any] = {
        "servers": url.split(","),
        "name": name,
        "inbox_prefix": inbox_of(site) if site else f"_INBOX_{user or name}",
        "allow_reconnect": True,
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": RECONNECT_WAIT_S,
        "connect_timeout": CONNECT_TIMEOUT_S,
        "ping_interval": PING_INTERVAL_S,
        "max_outstanding_pings": PINGS_UNANSWERED_MAX,
        "pending_size": PENDING_BYTES_MAX,
        # Subjects are built from checked names in one place (topology.py), so checking each again is wasted time.
        "skip_subject_validation": True,
        "error_cb": link.failed,
        "disconnected_cb": link.gone,
        "reconnected_cb": link.back,
    }
    if user:
        options |= {"user": user, "password": password}
    # In a task of its own: where a cancel gets lost in the client, it would try to connect for ever.
    connecting = asyncio.create_task(link.nc.connect(**options), name="connect")
    try:
        done, _ = await asyncio.wait({connecting}, timeout=OPEN_TIMEOUT_S)
    finally:
        await ended({connecting})
    if not done:
        await link.close()
        raise Unavailable(
            f"no NATS server at {url} takes this connection: {link.last_error or 'none answers'}",
            hint="Check HEADRACE_NATS_URL, the user and its password file; `headrace doctor` looks for the cause.",
        )
    connecting.result()
    return link
