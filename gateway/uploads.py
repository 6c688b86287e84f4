"""The handshake for large data: announce, PUT the parts to signed addresses, complete, carry the URI in an event."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Annotated, Protocol

from aiohttp import web
from msgspec import Meta, Struct

from gateway.auth import tenant_of
from gateway.catalog import read_json
from gateway.gate import Disk
from gateway.limits import GatewayLimits
from gateway.media import parse_media
from gateway.problems import Busy
from gateway.runs import as_json
from gateway.spool import Announced, Kept, Spool
from headrace.errors import BadRequest, HeadraceError, TooLarge, Unauthorized

_log = logging.getLogger(__name__)

WRITERS_MAX = 32
SWEEP_S = 300.0
SILENCE_S_MAX = 30.0
PACE_BYTES_MIN = 1024 * 1024  # a second, of whoever sends much
_CHUNK_BYTES = 1024 * 1024


class UploadBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``POST /v1/uploads`` takes: the size in bytes, and what the data shall be checked against."""

    size: Annotated[int, Meta(ge=0)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-fA-F]{64}$", max_length=64)] | None = None
    content_type: str | None = None


class Part(Struct, frozen=True, kw_only=True):
    """One part: PUT exactly ``size`` bytes to ``url``, without a token."""

    number: int
    url: str
    size: int


class Upload(Struct, frozen=True, kw_only=True):
    """The answer to ``POST /v1/uploads``: where the parts go, and what to POST when they are there."""

    upload_id: str
    parts: list[Part]
    complete: str
    expires_in_s: float


class Landing(Protocol):
    """Where uploads arrive: a spool on our disk, or a bucket that callers send to themselves. Methods block."""

    def begin(self, upload_id: str, announced: Announced, keep_s: float) -> tuple[Announced, list[str]]:
        """Make room; return the parts as they have to be, and where to PUT them (nothing: to us)."""

    def complete(self, upload_id: str, tenant: str) -> Kept:
        """Check what arrived and keep it."""

    def reserved(self) -> tuple[int, int]:
        """Return how many uploads are open, and the bytes that they may still take on our disk."""

    def sweep(self, now: float) -> int:
        """Remove uploads whose time is over, and return how many."""


class Uploads:
    """The endpoints under ``/v1/uploads``."""

    def __init__(
        self,
        *,
        spool: Spool,
        direct: Landing | None = None,
        disk: Disk,
        token: str,
        limits: GatewayLimits,
        public_url: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._spool = spool
        self._landing: Landing = direct or spool
        self._disk = disk
        self._key = hmac.digest(token.encode(), b"headrace uploads, version 1", "sha256")
        self._limits = limits
        self._public_url = public_url.rstrip("/")
        self._clock = clock
        self._writers = 0

    async def begin(self, request: web.Request) -> web.Response:
        """Answer ``POST /v1/uploads``: 201 with the parts."""
        body = read_json(await request.read(), UploadBody)
        limits = self._limits
        if body.size > limits.upload_bytes_max:
            raise TooLarge(
                f"an upload of {body.size:,} bytes, the limit is {limits.upload_bytes_max:,}",
                hint="Split the data into several uploads.",
            )
        if body.content_type is not None:
            parse_media(body.content_type, "content_type")
        number, reserved = await asyncio.to_thread(self._landing.reserved)
        if number >= limits.uploads_open_max:
            raise Busy(f"{number} uploads are open", hint="Complete some, or wait until they expire.", retry_after_s=30)
        self._disk.check(body.size + reserved if self._landing is self._spool else 0)
        upload_id = secrets.token_hex(16)
        # A second more for each MiB: on a slow line the last part must not come too late.
        keep_s = limits.upload_keep_seconds + body.size / PACE_BYTES_MIN
        expires_at = self._clock() + keep_s
        announced = Announced(
            size=body.size,
            part_bytes=limits.upload_part_bytes,
            expires_at=expires_at,
            sha256=None if body.sha256 is None else body.sha256.lower(),
            content_type=body.content_type,
            tenant=tenant_of(request),
        )
        announced, addresses = await asyncio.to_thread(self._landing.begin, upload_id, announced, keep_s)
        base = f"{self._public_url or request.url.origin()}/v1/uploads/{upload_id}"
        numbers = range(1, announced.parts + 1)
        addresses = addresses or [f"{base}/parts/{n}?{self._signed(upload_id, n, int(expires_at))}" for n in numbers]
        parts = [Part(number=n, url=addresses[n - 1], size=announced.part_size(n)) for n in numbers]
        made = Upload(upload_id=upload_id, parts=parts, complete=f"{base}/complete", expires_in_s=keep_s)
        return as_json(made, status=201)

    async def part(self, request: web.Request) -> web.Response:
        """Answer ``PUT /v1/uploads/{upload_id}/parts/{number}``; the signature in the address is the permission."""
        upload_id, number = request.match_info["upload_id"], request.match_info["number"]
        self._check_signature(upload_id, number, request)
        announced = self._spool.announced(upload_id)
        size = announced.part_size(int(number))
        length = request.content_length
        if length is not None and length != size:
            raise BadRequest(f"part {number} has {size:,} bytes, not {length:,}", hint="Send exactly the part.")
        if self._writers >= WRITERS_MAX:
            raise Busy("too many parts are being written", hint="Send this part again in a moment.")
        self._writers += 1
        try:
            with self._spool.writing(upload_id) as handle:
                self._spool.unmark(upload_id, int(number))
                await self._write(request, handle, (int(number) - 1) * announced.part_bytes, size)
                self._spool.mark(upload_id, int(number))
        finally:
            self._writers -= 1
        return web.Response(status=204)

    async def complete(self, request: web.Request) -> web.Response:
        """Answer ``POST /v1/uploads/{upload_id}/complete``: size and SHA-256 are checked, and the URI comes back."""
        return as_json(
            await asyncio.to_thread(self._landing.complete, request.match_info["upload_id"], tenant_of(request))
        )

    async def sweep(self, app: web.Application) -> AsyncIterator[None]:
        """Remove expired uploads now and then, for as long as the application runs."""
        task = asyncio.create_task(self._sweep_for_ever(), name="upload-sweeper")
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def _sweep_for_ever(self) -> None:
        while True:
            try:
                removed = await asyncio.to_thread(self._landing.sweep, self._clock())
                if removed:
                    _log.info("removed %d uploads that were not completed in time", removed)
            except (OSError, HeadraceError) as error:
                _log.warning("uploads cannot be swept: %s", error)
            await asyncio.sleep(SWEEP_S)

    async def _write(self, request: web.Request, handle: int, offset: int, size: int) -> None:
        """Write the body to its place with flat memory; the disk is waited for in a thread."""
        end = offset + size
        waiting = bytearray()
        content = request.content
        while True:
            try:
                async with asyncio.timeout(SILENCE_S_MAX):
                    chunk = await content.readany()
            except TimeoutError as error:
                raise BadRequest("the part did not arrive in time", hint="Send the part again.") from error
            waiting += chunk
            if offset + len(waiting) > end:
                raise BadRequest(f"the part is longer than {size:,} bytes", hint="Send exactly the part.")
            if len(waiting) >= _CHUNK_BYTES or not chunk:
                await asyncio.to_thread(_write_all, handle, bytes(waiting), offset)
                offset += len(waiting)
                waiting.clear()
            if not chunk:
                break
        if offset != end:
            raise BadRequest(f"the part is shorter than {size:,} bytes", hint="Send the part again.")

    def _signed(self, upload_id: str, number: int, expires: int) -> str:
        return f"expires={expires}&signature={self._sign(upload_id, number, expires)}"

    def _sign(self, upload_id: str, number: int, expires: int) -> str:
        return hmac.new(self._key, f"{upload_id}\n{number}\n{expires}".encode(), hashlib.sha256).hexdigest()

    def _check_signature(self, upload_id: str, number: str, request: web.Request) -> None:
        expires, signature = request.query.get("expires", ""), request.query.get("signature", "")
        hint = "Use the address as POST /v1/uploads gave it out; it is good for a limited time."
        if not all(text.isascii() and text.isdigit() and len(text) <= 12 for text in (number, expires)):
            raise Unauthorized("this address was not given out here", hint=hint)
        wanted = self._sign(upload_id, int(number), int(expires))
        if not hmac.compare_digest(wanted.encode(), signature.encode("utf-8", "surrogateescape")):
            raise Unauthorized("this address was not given out here", hint=hint)
        if int(expires) < self._clock():
            raise Unauthorized("this address has expired", hint="Begin again with POST /v1/uploads.")


def _write_all(handle: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written
