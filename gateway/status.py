"""Is it alive, is it ready, and what does it count."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web
from msgspec import Struct
from prometheus_client.exposition import choose_encoder

from gateway.auth import check_operator
from gateway.gate import Disk, Gate
from gateway.metrics import Metrics
from gateway.needs import Behind
from gateway.runs import as_json
from gateway.waiting import Waiting
from headrace.errors import Unavailable
from headrace.model import Audit

AUDIT_WAIT_S_MAX = 0.5


class Readiness(Struct, frozen=True, kw_only=True):
    """Whether triggers are taken now, and why not."""

    ready: bool
    log_connected: bool
    disk_free: bool
    log_free: bool
    draining: bool
    version: str


class Status:
    """``/livez``, ``/readyz`` and ``/metrics``, which ask for no token and wait for nobody; and the last audit."""

    def __init__(
        self,
        behind: Behind,
        *,
        disk: Disk,
        gate: Gate,
        waiting: Waiting,
        metrics: Metrics,
        version: str,
        draining: Callable[[], bool],
    ) -> None:
        self._log = behind.log
        self._reader = behind.reader
        self._disk = disk
        self._gate = gate
        self._waiting = waiting
        self._metrics = metrics
        self._version = version
        self._draining = draining

    async def live(self, request: web.Request) -> web.Response:
        """Answer ``GET /livez``: the event loop turns, and nothing else is asked."""
        return web.json_response({"alive": True})

    async def ready(self, request: web.Request) -> web.Response:
        """Answer ``GET /readyz``: 200 while triggers are taken, else 503."""
        log_connected = self._log.link.connected
        disk_free = self._disk.free() >= self._gate.limits.disk_bytes_min
        draining = self._draining()
        log_free = self._gate.fill.room
        ready = log_connected and disk_free and log_free and not draining
        found = Readiness(
            ready=ready,
            log_connected=log_connected,
            disk_free=disk_free,
            log_free=log_free,
            draining=draining,
            version=self._version,
        )
        return as_json(found, status=200 if ready else 503, headers={} if ready else {"Retry-After": "1"})

    async def metrics(self, request: web.Request) -> web.Response:
        """Answer ``GET /metrics``: OpenMetrics for those who ask for it, else the older text that all can read."""
        metrics = self._metrics
        metrics.in_flight.set(self._gate.requests)
        metrics.in_flight_bytes.set(self._gate.bytes)
        metrics.waiting.set(self._waiting.taken)
        metrics.log_connected.set(self._log.link.connected)
        metrics.log_full.set(self._gate.fill.share)
        metrics.disk_free_bytes.set(self._disk.free())
        metrics.audit.last = await self._last_audit()
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(metrics.registry), headers={"Content-Type": content_type})

    async def audit(self, request: web.Request) -> web.Response:
        """Answer ``GET /v1/audit``: what the auditor found last, of all tenants, for whoever runs the platform."""
        check_operator(request)
        found = await self._reader.audit()
        if found is None:
            raise Unavailable("there was no audit yet", hint="The ledger audits every few seconds; is one running?")
        return as_json(found)

    async def _last_audit(self) -> Audit | None:
        """Return the last audit, None where the read model does not tell it at once."""
        try:
            async with asyncio.timeout(AUDIT_WAIT_S_MAX):
                return await self._reader.audit()
        except (Unavailable, TimeoutError):
            return None
