"""One connection to NATS for a whole process: it reconnects for ever and notices a dead network within seconds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from nats.aio.client import Client as NatsClient
from nats.js import JetStreamContext

from headrace.errors import Unavailable

_log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2
OPEN_TIMEOUT_S = 20.0
PING_INTERVAL_S = 1
# With two, a server that hangs is left after three to four seconds: sooner than a cluster has a new leader.
PINGS_UNANSWERED_MAX = 2
RECONNECT_WAIT_S = 0.1
PENDING_BYTES_MAX = 64 * 1024 * 1024


class _Client(NatsClient):
    """The client, which drops a connection at once when it is lost, with all that has not left yet.

    Left alone, it waits until the server has taken the rest, which a paused one never does; and it would send the rest
    over the next connection, when those who wait for answers have asked again long ago.

    Headers are read without a look at every character of their names: the server and we alone write them, each message
    of the log has several, and that look took a tenth of a worker's time.
    """

    @staticmethod
    def _parse_header_lines(raw: bytes) -> dict[str, str]:
        found: dict[str, str] = {}
        for line in raw.split(b"\r\n"):
            name, colon, value = line.partition(b":")
            if colon:
                found[name.strip().decode("ascii", "replace")] = value.strip().decode("utf-8", "replace")
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

    def __init__(self) -> None:
        self.nc: NatsClient = _Client()
        self.last_error = ""
        self._reconnected: list[Callable[[], Awaitable[None]]] = []
        self._lost: list[Callable[[], None]] = []
        self._up = asyncio.Event()

    @property
    def connected(self) -> bool:
        """Whether the connection stands at this moment."""
        return bool(self.nc.is_connected)

    def jetstream(self, timeout_s: float = 5.0) -> JetStreamContext:
        """Return the JetStream interface for management requests."""
        return self.nc.jetstream(timeout=timeout_s)

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
        if not self.last_error or not isinstance(error, OSError):
            # A server that refuses somebody may reset the connection before its reason is read: the reason says more.
            self.last_error = str(error)
        _log.warning("NATS says: %s", error)

    async def close(self) -> None:
        """Send what is waiting and close; an unreachable server does not hold this up."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(2):
                await self.nc.flush()
        with contextlib.suppress(OSError):  # closing a connection that the server closed first
            await self.nc.close()


async def open_link(url: str, *, user: str = "", password: str = "", name: str = "headrace") -> Link:
    """Connect to one or more servers (URLs parted by commas) and return the link.

    Raises:
        Unavailable: no server answered within 20 s, or all refuse the credentials.
    """
    link = Link()
    options: dict[str, Any] = {
        "servers": url.split(","),
        "name": name,
        "inbox_prefix": f"_INBOX_{user or name}",
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
    try:
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            await link.nc.connect(**options)
    except TimeoutError as error:
        await link.close()
        raise Unavailable(
            f"no NATS server at {url} takes this connection: {link.last_error or 'none answers'}",
            hint="Check HEADRACE_NATS_URL, the user and its password file; `headrace doctor` looks for the cause.",
        ) from error
    return link
