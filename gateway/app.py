"""The one place that puts the front door together."""

from __future__ import annotations

import time
from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler

from functions.outlook import Outlook
from functions.quotes import Quoter
from gateway import auth, page, problems
from gateway.acceptance import Acceptance
from gateway.admitting import Admitting
from gateway.backlog import Backlog
from gateway.catalog import Catalog
from gateway.dead import DeadList
from gateway.entrance import Entrance
from gateway.gate import Disk, Fill, Gate
from gateway.history import History
from gateway.ingest import Ingest
from gateway.limits import GatewayLimits
from gateway.live import Live
from gateway.metrics import Metrics
from gateway.needs import Behind, Follow, Lanes, Log, Reader, Store, Tables
from gateway.openapi import OpenApi
from gateway.quota import Quota
from gateway.quote import DryRun
from gateway.reports import Reports
from gateway.runs import RunBooks, Runs
from gateway.server import SERVER
from gateway.sites import Sites
from gateway.spool import Spool
from gateway.status import Status
from gateway.table import ENDPOINTS, EVENTS
from gateway.uploads import Landing, Uploads
from gateway.waiting import Waiting
from headrace.wire import FunctionRecord
from streams.tables import row_key


class Draining:
    """Whether this gateway is on its way out: ``/readyz`` says so while it still serves what comes."""

    def __init__(self) -> None:
        self.begun = False

    def begin(self) -> None:
        """Make ``/readyz`` answer 503 from now on."""
        self.begun = True

    def __call__(self) -> bool:
        return self.begun


DRAINING = web.AppKey("draining", Draining)
METRICS = web.AppKey("metrics", Metrics)


def build(
    *,
    log: Log,
    follow: Follow,
    tables: Tables,
    blobs: Store,
    reader: Reader,
    token: str,
    version: str,
    limits: GatewayLimits | None = None,
    lanes: Lanes | None = None,
    slots: Callable[[], int] = lambda: 0,
    direct: Landing | None = None,
    public_url: str = "",
    clock: Callable[[], float] = time.time,
) -> web.Application:
    """Return the application. Run it with ``gateway.server.Runner``; it opens and closes nothing that it was given.

    Args:
        log: where runs are appended.
        follow: ordered reading of that log.
        tables: what is registered.
        blobs: where large bodies and code are kept; free space is watched on its disk.
        reader: the read model.
        token: the platform's own bearer token, which speaks for the default tenant; those of the others are in the
            table of tenants.
        version: of the platform, for ``/openapi.json`` and ``/metrics``.
        limits: how much to take on.
        lanes: how much work waits; without it nothing is refused because it would be late.
        slots: how many invocations all workers run at a time, as far as is known.
        direct: where uploads arrive that do not come through here; without it they do.
        public_url: where callers reach it, if that is not the ``Host`` they send (behind a proxy).
        clock: the time in epoch seconds.
    """
    limits = limits or GatewayLimits()
    behind = Behind(log, tables, blobs, reader)
    metrics = Metrics(version)
    draining = Draining()
    disk = Disk(blobs.incoming, limits.disk_bytes_min)
    fill = Fill(log, limits.log_share_max)
    tokens = auth.Tokens(token, tables.tenants)
    gate = Gate(limits, disk, fill, tokens.shared)
    backlog = Backlog(lanes, backlog_max=limits.backlog_max, slots=slots)
    books = RunBooks(log=log, follow=follow, reader=reader)
    waiting = Waiting(log=log, books=books, seats_max=limits.waiting_max, shared=tokens.shared)
    quoter = Quoter(Outlook(tables.forecasts.get), _functions(tables))
    admitting = Admitting(tables=tables, quoter=quoter, backlog=backlog)
    acceptance = Acceptance(log=log, tables=tables, quota=Quota(log, reader))
    sites = Sites(tables, clock)
    metrics.sites.records = sites.records
    live = Live(log=log, follow=follow, books=books, sites=sites, metrics=metrics, tokens=tokens, limits=limits)
    status = Status(behind, disk=disk, gate=gate, waiting=waiting, metrics=metrics, version=version, draining=draining)
    uploads = Uploads(
        spool=Spool(blobs), direct=direct, disk=disk, token=token, limits=limits, public_url=public_url, clock=clock
    )
    entrance = Entrance(behind, admitting, acceptance, backlog, gate, limits, clock)
    handlers = {
        **_ingest(Ingest(entrance, books=books, waiting=waiting, metrics=metrics), DryRun(entrance)),
        **_uploads(uploads),
        **_runs(Runs(books=books, log=log, reader=reader, blobs=blobs, why_waits=sites.why_waits, clock=clock), live),
        **_dead(DeadList(behind, acceptance=acceptance, admitting=admitting, books=books, gate=gate, clock=clock)),
        "get_history": History(log=log, follow=follow, clock=clock).page,
        **_catalog(Catalog(tables=tables, blobs=blobs, gate=gate, clock=clock)),
        **_jobs(Reports(log, clock), sites),
        **_status(status),
        "openapi": OpenApi(version).get,
        **_page(page.Page(page.load())),
    }
    app = _application(handlers, tokens, limits)
    app[DRAINING] = draining
    app[METRICS] = metrics
    app.cleanup_ctx.append(uploads.sweep)
    app.cleanup_ctx.append(fill.watch)
    app.cleanup_ctx.append(sites.watch)
    app.on_shutdown.append(lambda _: live.close())
    app.on_cleanup.append(lambda _: backlog.close())
    return app


def _functions(tables: Tables) -> Callable[[str, str], FunctionRecord | None]:
    """Return what finds the current version of a function in memory, by tenant and name."""
    return lambda tenant, name: tables.functions.get(row_key(tenant, name))


def _application(handlers: dict[str, Handler], tokens: auth.Tokens, limits: GatewayLimits) -> web.Application:
    """Return an application that serves every endpoint of the table."""
    open_paths = {e.path for e in ENDPOINTS if e.open}
    app = web.Application(
        middlewares=[problems.problems, auth.middleware(tokens, open_paths)],
        client_max_size=limits.body_bytes_max,
    )
    for endpoint in ENDPOINTS:
        handler = handlers[endpoint.name]
        if endpoint.method == "GET" and endpoint.answers.get(200) != EVENTS:
            app.router.add_get(endpoint.path, handler)  # HEAD comes with it
        else:
            app.router.add_route(endpoint.method, endpoint.path, handler)
    app.on_response_prepare.append(_sign)
    return app


# Which method serves which endpoint of the table.


def _ingest(ingest: Ingest, dry: DryRun) -> dict[str, Handler]:
    return {"send_events": ingest.events, "trigger": ingest.trigger, "quote": dry.explain}


def _uploads(uploads: Uploads) -> dict[str, Handler]:
    return {"begin_upload": uploads.begin, "put_part": uploads.part, "complete_upload": uploads.complete}


def _runs(runs: Runs, live: Live) -> dict[str, Handler]:
    return {
        "list_runs": runs.page,
        "get_run": runs.one,
        "get_result": runs.result,
        "follow_run": live.run,
        "cancel_run": runs.cancel,
        "follow_all": live.stream,
    }


def _dead(dead: DeadList) -> dict[str, Handler]:
    return {"list_dead": dead.page, "replay": dead.replay}


def _catalog(catalog: Catalog) -> dict[str, Handler]:
    return {
        "list_functions": catalog.functions,
        "get_function": catalog.function,
        "put_function": catalog.put_function,
        "list_routes": catalog.routes,
        "get_route": catalog.route,
        "put_route": catalog.put_route,
        "delete_route": catalog.delete_route,
    }


def _jobs(reports: Reports, sites: Sites) -> dict[str, Handler]:
    return {
        "report_job": reports.take,
        "list_sites": sites.all,
        "get_site": sites.one,
        "list_resources": sites.resources,
        "get_resource": sites.resource,
        "list_incidents": sites.incidents,
        "get_incident": sites.incident,
    }


def _status(status: Status) -> dict[str, Handler]:
    return {"live": status.live, "ready": status.ready, "metrics": status.metrics, "get_audit": status.audit}


def _page(files: page.Page) -> dict[str, Handler]:
    return {"page": files.index, "page_file": files.file}


async def _sign(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Set what every response carries; here, because a stream has sent its headers before a middleware sees it."""
    response.headers["Server"] = SERVER
    response.headers["X-Content-Type-Options"] = "nosniff"


__all__ = ["DRAINING", "METRICS", "build"]
