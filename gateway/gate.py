"""How much may be in flight at once. Asked before a body is read, so that refusing stays cheap under any load."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

from aiohttp import web

from gateway.auth import tenant_of
from gateway.limits import GatewayLimits
from gateway.needs import Log
from gateway.problems import Busy
from gateway.shares import Shares
from headrace.errors import BadRequest, Overloaded, TooLarge, Unavailable

_log = logging.getLogger(__name__)

_DISK_LOOK_S = 1.0
_LOG_LOOK_S = 1.0
_BESIDE_BODY_BYTES = 4096  # what one trigger takes in the log and on disk besides its body, outcome included


class Disk:
    """Free space where the log and the blobs lie; looked at no more than once a second."""

    def __init__(self, folder: Path, bytes_min: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._bytes_min = bytes_min
        self._clock = clock
        self._looked_at = float("-inf")
        self._free = 0

    def free(self) -> int:
        """Return the bytes free: as seen at most a second ago, less what was let in since."""
        now = self._clock()
        if now - self._looked_at >= _DISK_LOOK_S:
            self._free, self._looked_at = shutil.disk_usage(self._folder).free, now
        return self._free

    def took(self, size: int) -> None:
        """Count so many bytes as taken until the next look."""
        self._free -= size

    def check(self, wanted: int = 0) -> None:
        """Return if so many bytes can be taken and the floor still holds.

        Raises:
            Unavailable: they cannot. Said here, because a log on a full disk falls silent instead.
        """
        if self.free() - wanted < self._bytes_min:
            raise Unavailable(
                "the disk of the platform is nearly full",
                hint="Free some space, or lower log_keep_s; the operator's page is `headrace doctor`.",
                retry_after_s=30,
            )


class Fill:
    """How full the log is, asked of its server once a second.

    A full log refuses everything, also the outcomes of what it holds. So triggers are refused while there is room left
    for those.
    """

    def __init__(self, log: Log, share_max: float) -> None:
        self._log = log
        self._share_max = share_max
        self._used = 0
        self._limit = 0

    @property
    def share(self) -> float:
        """The share of the log's size limit that is taken, what was let in since the last look included."""
        return self._used / self._limit if self._limit else 0.0

    @property
    def room(self) -> bool:
        """Whether triggers may come in."""
        return self.share < self._share_max

    def check(self) -> None:
        """Return if there is room for more triggers.

        Raises:
            Unavailable: there is not.
        """
        if not self.room:
            raise Unavailable(
                f"the log is {self.share:.0%} full",
                hint="Raise log_bytes_max or lower log_keep_s; what was accepted still comes to its end.",
                retry_after_s=30,
            )

    def took(self, size: int) -> None:
        """Count so many bytes as taken until the next look."""
        self._used += size

    async def look(self) -> None:
        """Ask the log's server; while it does not answer, what is known stays."""
        with suppress(Unavailable):
            self._used, self._limit = await self._log.size()

    async def watch(self, app: web.Application) -> AsyncIterator[None]:
        """Look again and again, for as long as the application runs."""
        task = asyncio.create_task(self._watch_for_ever(), name="log-fill")
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def _watch_for_ever(self) -> None:
        while True:
            had_room = self.room
            await self.look()
            if self.room != had_room:
                _log.warning(
                    "the log is %.0f %% full; triggers are %s", 100 * self.share, "taken" if self.room else "refused"
                )
            await asyncio.sleep(_LOG_LOOK_S)


class Held:
    """A request that was let in, and the bytes it takes. Whoever got it from ``Gate.enter`` ends with ``leave``."""

    __slots__ = ("_gate", "_request", "size", "tenant")

    def __init__(self, gate: Gate, request: web.Request, tenant: str, size: int) -> None:
        self._gate = gate
        self._request = request
        self.tenant = tenant
        self.size = size

    async def read(self) -> bytes:
        """Return the body.

        Raises:
            TooLarge: it is larger than the limit.
            BadRequest: it does not come to an end in time.
            Busy: its length was not told beforehand, and it turned out to be more than there is room for.
        """
        request, limits = self._request, self._gate.limits
        try:
            if request.content.is_eof() and self.size:  # it came together with its headers: no timer is needed
                return await request.read()
            async with asyncio.timeout(limits.body_seconds_max):
                return await request.read() if self.size else await self._read_unannounced()
        except web.HTTPRequestEntityTooLarge as error:
            raise too_large(limits) from error
        except TimeoutError as error:
            raise BadRequest(
                f"the body did not arrive within {limits.body_seconds_max:g} s",
                hint="Send large data with POST /v1/uploads.",
            ) from error

    async def _read_unannounced(self) -> bytes:
        parts: list[bytes] = []
        async for chunk in self._request.content.iter_any():
            self._gate.grow(self, len(chunk))
            parts.append(chunk)
        return b"".join(parts)

    def leave(self) -> None:
        """Give back what was taken."""
        self._gate.leave(self)


class Gate:
    """Counts requests and bytes in flight against their limits; no tenant may have all of either."""

    def __init__(self, limits: GatewayLimits, disk: Disk, fill: Fill, shared: Callable[[], bool]) -> None:
        """Begin with nothing in flight; ``shared`` says whether there is more than one tenant."""
        self.limits = limits
        self._disk = disk
        self.fill = fill
        self._requests = Shares(limits.in_flight_max, shared, busy)
        self._bytes = Shares(limits.in_flight_bytes_max, shared, busy)

    @property
    def requests(self) -> int:
        """How many requests are in flight."""
        return self._requests.taken

    @property
    def bytes(self) -> int:
        """How many bytes they take."""
        return self._bytes.taken

    def enter(self, request: web.Request) -> Held:
        """Let a request in.

        Raises:
            TooLarge: it says itself that its body is larger than the limit.
            Busy: too many requests or bytes are in flight.
            Overloaded: too many of this tenant are.
            Unavailable: the disk or the log is nearly full.
        """
        limits = self.limits
        size = request.content_length or 0
        if size > limits.body_bytes_max:
            raise too_large(limits)
        if "Content-Encoding" in request.headers:
            size = 0  # what is packed says nothing about what comes out of it
        tenant = tenant_of(request)
        self._disk.check()
        self.fill.check()
        self._requests.take(tenant)
        try:
            self._bytes.take(tenant, size)
        except Overloaded:
            self._requests.give_back(tenant)
            raise
        self._disk.took(size + _BESIDE_BODY_BYTES)
        self.fill.took(size + _BESIDE_BODY_BYTES)
        return Held(self, request, tenant, size)

    def grow(self, held: Held, more: int) -> None:
        """Count bytes that were not announced.

        Raises:
            TooLarge: this body is larger than the limit.
            Busy: there is no room for it at the moment.
            Overloaded: what room there is, is kept for other tenants.
        """
        if held.size + more > self.limits.body_bytes_max:
            raise too_large(self.limits)
        self._bytes.take(held.tenant, more)
        held.size += more

    def leave(self, held: Held) -> None:
        """Take a request out of the count."""
        self._requests.give_back(held.tenant)
        self._bytes.give_back(held.tenant, held.size)


def busy() -> Busy:
    """Return the refusal of a gateway that has its hands full."""
    return Busy("too many requests are in flight", hint="Send it again after Retry-After seconds.")


def too_large(limits: GatewayLimits) -> TooLarge:
    """Return the refusal of a body over the limit."""
    return TooLarge(
        f"the body is larger than {limits.body_bytes_max:,} bytes",
        hint="Send large data with POST /v1/uploads and pass its URI as dataref.",
    )
