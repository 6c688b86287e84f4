"""The sites over HTTP, in our words and in those of the IRI Facility API; and who wants to hear when one changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from typing import Literal

from aiohttp import web
from msgspec import Struct, structs

from functions import sites
from gateway.needs import Tables
from gateway.runs import as_json
from headrace.clock import format_instant, maybe_instant
from headrace.errors import NotFound
from headrace.joblog import Incident, SiteRecord
from headrace.model import SiteStatus, SiteView
from headrace.names import check_name

TICK_S = 1.0  # how often a silence is looked for
RESOURCE_TYPE = "urn:doe-iri:resource:compute:system"


class SiteList(Struct, frozen=True, kw_only=True):
    """All sites that the platform knows, by name."""

    sites: list[SiteView]


class ResourceView(Struct, frozen=True, kw_only=True):
    """A site as a resource of the IRI Facility API."""

    id: str
    self_uri: str
    name: str
    description: str
    last_modified: str
    group: str | None
    current_status: SiteStatus
    resource_type: str
    capability_uris: list[str]


class IncidentView(Struct, frozen=True, kw_only=True):
    """A time in which a site was not up, as an incident of the IRI Facility API."""

    id: str
    self_uri: str
    name: str
    description: str
    last_modified: str
    status: SiteStatus
    resource_uris: list[str]
    event_uris: list[str]
    start: str
    end: str | None
    type: Literal["planned", "unplanned", "reservation"]
    resolution: Literal["unresolved", "cancelled", "completed", "extended", "pending"]


class Sites:
    """The endpoints under ``/v1/sites`` and ``/status``. Sites are there for all tenants."""

    def __init__(self, tables: Tables, clock: Callable[[], float] = time.time) -> None:
        self._rows = tables.sites
        self._clock = clock
        self._views: dict[str, SiteView] = {}
        self._changed = asyncio.Event()
        self.forget = self._rows.listen(self.look)
        self.look()

    # ------------------------------------------------------------ over HTTP

    async def all(self, request: web.Request) -> web.Response:
        """Answer ``GET /v1/sites``."""
        return as_json(SiteList(sites=[view_of(record, self._clock()) for record in self.records()]))

    async def one(self, request: web.Request) -> web.Response:
        """Answer ``GET /v1/sites/{name}``."""
        return as_json(view_of(self._record(request.match_info["name"]), self._clock()))

    async def resources(self, request: web.Request) -> web.Response:
        """Answer ``GET /status/resources``."""
        return as_json([resource_of(record, self._clock()) for record in self.records()])

    async def resource(self, request: web.Request) -> web.Response:
        """Answer ``GET /status/resources/{resource_id}``."""
        return as_json(resource_of(self._record(request.match_info["resource_id"]), self._clock()))

    async def incidents(self, request: web.Request) -> web.Response:
        """Answer ``GET /status/incidents``: the newest ones of each site, the newest first."""
        found = sorted(self._incidents(), key=lambda view: view.start, reverse=True)
        return as_json(found)

    async def incident(self, request: web.Request) -> web.Response:
        """Answer ``GET /status/incidents/{incident_id}``."""
        identity = check_name(request.match_info["incident_id"], "incident id")
        for found in self._incidents():
            if found.id == identity:
                return as_json(found)
        raise NotFound(
            f"there is no incident {identity}",
            hint="GET /status/incidents lists the newest of each site; older ones are forgotten.",
        )

    # ------------------------------------------------------------ what is known

    def records(self) -> list[SiteRecord]:
        """Return all sites by name."""
        return [row for _, row in sorted(self._rows.items().items())]

    def why_waits(self, name: str) -> str:
        """Return why a job waits that was sent to a site and is not submitted there; empty where the site takes it."""
        return sites.why_waits(name, self._rows.get(name), self._clock())

    def _record(self, name: str) -> SiteRecord:
        found = self._rows.get(check_name(name, "site name"))
        if found is None:
            raise NotFound(f"there is no site {name}", hint="GET /v1/sites lists them.")
        return found

    def _incidents(self) -> list[IncidentView]:
        now = self._clock()
        return [incident_of(record, incident) for record in self.records() for incident in sites.incidents(record, now)]

    # ------------------------------------------------------------ what changes

    def look(self) -> None:
        """Wake those who want to hear of changes, if there is one."""
        now = self._clock()
        views = {record.name: _lasting(view_of(record, now)) for record in self.records()}
        if views != self._views:
            self._views = views
            self._changed.set()
            self._changed = asyncio.Event()

    async def watch(self, app: web.Application) -> AsyncIterator[None]:
        """Look again and again, for a silence changes no row; for as long as the application runs."""
        task = asyncio.create_task(self._watch_for_ever(), name="sites")
        yield
        self.forget()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    async def _watch_for_ever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.look()

    async def news(self) -> AsyncGenerator[list[SiteView], None]:
        """Yield all sites as they are, and then those that have changed, for ever."""
        told: dict[str, SiteView] = {}
        while True:
            changed = self._changed
            views = self._views
            news = [view for name, view in views.items() if told.get(name) != view]
            told = views
            if news:
                now = self._clock()
                yield [view_of(record, now) for record in self.records() if record.name in {view.name for view in news}]
            await changed.wait()


def view_of(record: SiteRecord, now: float) -> SiteView:
    """Return a site as ``GET /v1/sites/{name}`` shows it at an instant: without what is free where nobody can tell."""
    word, why = sites.status(record, now)
    told = sites.is_told(record, now)
    queue: dict[str, int | float | None] = {
        "jobs": record.jobs_waiting if told else None,
        "running": record.jobs_running if told else None,
        "wait_p50_s": None if record.wait is None else record.wait.p50_s,
        "wait_p90_s": None if record.wait is None else record.wait.p90_s,
    }
    gpus, nodes = {}, {}
    if record.gpus_total is not None:
        gpus = {"total": record.gpus_total}
        if told and record.gpus_free is not None:
            gpus["free"] = record.gpus_free
    if record.nodes_total is not None:
        nodes = {"total": record.nodes_total, "unusable": record.nodes_unusable}
        if told and record.nodes_free is not None:
            nodes["free"] = record.nodes_free
    return SiteView(
        name=record.name,
        kind=record.kind,
        status=word,
        gpus=gpus,
        queue=queue,
        last_seen_at=None if sites.is_awaited(record) else format_instant(record.at),
        nodes=nodes,
        detail=why,
        since=format_instant(_since(record, now)),
    )


def _since(record: SiteRecord, now: float) -> float:
    """Return since when a site is as it is."""
    word, _ = sites.status(record, now)
    if word == record.status:
        return record.since
    return record.at + (sites.SILENT_S if word == "unknown" else sites.GONE_S)


def _lasting(view: SiteView) -> SiteView:
    """Return a view without what changes by itself."""
    return structs.replace(view, last_seen_at=None, since=None)


def resource_of(record: SiteRecord, now: float) -> ResourceView:
    """Return a site as a resource of the IRI Facility API."""
    word, why = sites.status(record, now)
    return ResourceView(
        id=record.name,
        self_uri=f"/status/resources/{record.name}",
        name=record.name,
        description=why or f"a site with {record.kind}",
        last_modified=format_instant(record.at),
        group=None,
        current_status=word,
        resource_type=RESOURCE_TYPE,
        capability_uris=[],
    )


def incident_of(record: SiteRecord, incident: Incident) -> IncidentView:
    """Return an incident in the words of the IRI Facility API. What we see of a site is never planned by us."""
    over = incident.ended_at is not None
    return IncidentView(
        id=incident.id,
        self_uri=f"/status/incidents/{incident.id}",
        name=f"{record.name} {incident.status}",
        description=incident.why,
        last_modified=format_instant(incident.ended_at or incident.began_at),
        status=incident.status,
        resource_uris=[f"/status/resources/{record.name}"],
        event_uris=[],
        start=format_instant(incident.began_at),
        end=maybe_instant(incident.ended_at),
        type="unplanned",
        resolution="completed" if over else "unresolved",
    )
