"""Is it alive, is it ready, and what does it count."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from msgspec import Struct
from prometheus_client.exposition import choose_encoder

from gateway.gate import Disk, Gate
from gateway.limits import GatewayLimits
from gateway.metrics import Metrics
from gateway.needs import Log
from gateway.runs import as_json
from gateway.waiting import Waiting


class Readiness(Struct, frozen=True, kw_only=True):
    """Whether triggers are taken now, and why not."""

    ready: bool
    log_connected: bool
    disk_free: bool
    draining: bool
    version: str


class Status:
    """``/livez``, ``/readyz`` and ``/metrics``; none of them asks for a token or waits for anybody."""

    def __init__(
        self,
        *,
        log: Log,
        disk: Disk,
        gate: Gate,
        waiting: Waiting,
        metrics: Metrics,
        limits: GatewayLimits,
        version: str,
        draining: Callable[[], bool],
    ) -> None:
        self._log = log
        self._disk = disk
        self._gate = gate
        self._waiting = waiting
        self._metrics = metrics
        self._limits = limits
        self._version = version
        self._draining = draining

    async def live(self, request: web.Request) -> web.Response:
        """Answer ``GET /livez``: the event loop turns, and nothing else is asked."""
        return web.json_response({"alive": True})

    async def ready(self, request: web.Request) -> web.Response:
        """Answer ``GET /readyz``: 200 while triggers are taken, else 503."""
        log_connected = self._log.link.connected
        disk_free = self._disk.free() >= self._limits.disk_bytes_min
        draining = self._draining()
        ready = log_connected and disk_free and not draining
        found = Readiness(
            ready=ready, log_connected=log_connected, disk_free=disk_free, draining=draining, version=self._version
        )
        return as_json(found, status=200 if ready else 503, headers={} if ready else {"Retry-After": "1"})

    async def metrics(self, request: web.Request) -> web.Response:
        """Answer ``GET /metrics``: OpenMetrics for those who ask for it, else the older text that all can read."""
        metrics = self._metrics
        metrics.in_flight.set(self._gate.requests)
        metrics.in_flight_bytes.set(self._gate.bytes)
        metrics.waiting.set(self._waiting.taken)
        metrics.log_connected.set(self._log.link.connected)
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(metrics.registry), headers={"Content-Type": content_type})
