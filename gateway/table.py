"""Every endpoint of the gateway, once: the router, the door and ``/openapi.json`` are made from this table."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from msgspec import Meta

from gateway.catalog import FunctionBody, FunctionList, RouteList
from gateway.ingest import EventsAccepted
from gateway.sites import IncidentView, ResourceView, SiteList
from gateway.spool import Kept
from gateway.status import Readiness
from gateway.uploads import Upload, UploadBody
from headrace.joblog import ReportEvent
from headrace.model import (
    Audit,
    DeadPage,
    Explanation,
    FunctionView,
    HistoryPage,
    Replaying,
    Route,
    RouteView,
    RunPage,
    RunRef,
    RunState,
    RunView,
    SiteView,
)

Where = Literal["query", "header"]
Flag = Literal["0", "1"]
Limit = Annotated[int, Meta(ge=1, le=1000)]
ExitCode = Annotated[int, Meta(ge=0, le=255)]


class Param(NamedTuple):
    """A query parameter or a header that an endpoint reads."""

    name: str
    where: Where
    kind: Any
    text: str


class Body(NamedTuple):
    """A body that is sent: a struct as JSON, or anything of a content type."""

    kind: Any
    content_type: str = "application/json"


class Endpoint(NamedTuple):
    """One method on one path. ``answers`` maps a status to what it carries: a struct, a content type, or nothing."""

    method: str
    path: str
    name: str
    text: str
    answers: dict[int, Any]
    params: tuple[Param, ...] = ()
    bodies: tuple[Body, ...] = ()
    open: bool = False


ANYTHING = "*/*"
HTML = "text/html"
EVENTS = "text/event-stream"
JSON = "application/json"
METRICS = "application/openmetrics-text"

_AFTER = Param("Last-Event-ID", "header", int, "Go on after this event.")

ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint(
        "POST",
        "/v1/events",
        "send_events",
        "Send CloudEvents 1.0 in binary, structured or batch mode. A batch is accepted whole or refused whole.",
        {202: EventsAccepted},
        bodies=(
            Body(dict[str, Any], "application/cloudevents+json"),
            Body(list[dict[str, Any]], "application/cloudevents-batch+json"),
            Body(None, ANYTHING),
        ),
        params=(
            Param("ce-id", "header", str, "In binary mode: the event's id."),
            Param("ce-source", "header", str, "In binary mode: where the event comes from."),
            Param("ce-type", "header", str, "In binary mode: what happened."),
            Param("ce-specversion", "header", str, "In binary mode: 1.0."),
        ),
    ),
    Endpoint(
        "POST",
        "/v1/triggers/{route}",
        "trigger",
        "Start a run on a route with any body. 202 once it is synced to disk; asked to wait, 200 once it has ended.",
        {200: RunView, 202: RunRef},
        bodies=(Body(None, ANYTHING),),
        params=(
            Param("Idempotency-Key", "header", str, "The event id; the same one again is the same run."),
            Param("Headrace-Deadline", "header", str, "A duration such as 60s, or an RFC 3339 instant."),
            Param("Prefer", "header", str, "wait=N: answer when the run has ended, after N seconds at the latest."),
        ),
    ),
    Endpoint(
        "POST",
        "/v1/quote",
        "quote",
        "What would come of an event or a trigger if it were sent now, route by route. Nothing is started.",
        {200: Explanation},
        bodies=(
            Body(dict[str, Any], "application/cloudevents+json"),
            Body(list[dict[str, Any]], "application/cloudevents-batch+json"),
            Body(None, ANYTHING),
        ),
        params=(
            Param("route", "query", str, "Take the body as a trigger of this route; else it is an event or a batch."),
            Param("Idempotency-Key", "header", str, "With route: the event id."),
            Param("Headrace-Deadline", "header", str, "With route: a duration such as 60s, or an RFC 3339 instant."),
        ),
    ),
    Endpoint(
        "POST",
        "/v1/uploads",
        "begin_upload",
        "Announce large data and get the addresses to PUT its parts to.",
        {201: Upload},
        bodies=(Body(UploadBody),),
    ),
    Endpoint(
        "PUT",
        "/v1/uploads/{upload_id}/parts/{number}",
        "put_part",
        "Send one part to the address that was given out; its signature is the permission.",
        {204: None},
        bodies=(Body(None, ANYTHING),),
        params=(
            Param("expires", "query", int, "As given out."),
            Param("signature", "query", str, "As given out."),
        ),
        open=True,
    ),
    Endpoint(
        "POST",
        "/v1/uploads/{upload_id}/complete",
        "complete_upload",
        "Have all parts checked and get the URI that an event carries as dataref.",
        {200: Kept},
    ),
    Endpoint(
        "GET",
        "/v1/runs",
        "list_runs",
        "Runs, newest first, without their invocations.",
        {200: RunPage},
        params=(
            Param("state", "query", RunState, "Only runs in this state."),
            Param("route", "query", str, "Only runs of this route."),
            Param("since", "query", str, "Only runs accepted at or after this RFC 3339 instant."),
            Param("limit", "query", Limit, "At most so many; 100 if not given."),
            Param("cursor", "query", str, "`next` of the page before."),
        ),
    ),
    Endpoint("GET", "/v1/runs/{run_id}", "get_run", "One run, readable at once after its 202.", {200: RunView}),
    Endpoint(
        "GET",
        "/v1/runs/{run_id}/result",
        "get_result",
        "The answer with its own content type; 202 while there is none, 410 if the run failed, was canceled or "
        "retracted. That of a superseded run comes with a Link to its successor. Of several answers it is the best; "
        "Headrace-Fidelity tells its level, and Links lead to the others.",
        {200: ANYTHING, 202: JSON},
        params=(Param("level", "query", int, "The answer of this fidelity, whatever came after it."),),
    ),
    Endpoint(
        "GET",
        "/v1/runs/{run_id}/events",
        "follow_run",
        "What happens in the run as server-sent events, from its beginning to its end.",
        {200: EVENTS},
        params=(_AFTER,),
    ),
    Endpoint(
        "POST",
        "/v1/runs/{run_id}/cancel",
        "cancel_run",
        "Stop a run; 409 if it has succeeded or failed already.",
        {202: JSON},
        params=(Param("reason", "query", str, "Why, for those who read the run."),),
    ),
    Endpoint(
        "GET",
        "/v1/dead",
        "list_dead",
        "Invocations that were given up on, newest first, with the error of every attempt.",
        {200: DeadPage},
        params=(
            Param("function", "query", str, "Only those of this function."),
            Param("route", "query", str, "Only those in runs of this route."),
            Param("since", "query", str, "Only those given up on at or after this RFC 3339 instant."),
            Param("all", "query", Flag, "1: those in runs that were replayed too."),
            Param("limit", "query", Limit, "At most so many; 100 if not given."),
            Param("cursor", "query", str, "`next` of the page before."),
        ),
    ),
    Endpoint(
        "POST",
        "/v1/dead/{id}/replay",
        "replay",
        "Give a dead invocation or a failed run another go, as a new run; 409 if it did not fail.",
        {202: Replaying},
        params=(Param("Idempotency-Key", "header", str, "The same one again is the same new run."),),
    ),
    Endpoint(
        "GET",
        "/v1/history",
        "get_history",
        "Invocations that have ended, in the order of the log: what a replay of the past under another policy needs.",
        {200: HistoryPage},
        params=(
            Param("since", "query", str, "From this RFC 3339 instant on; it has to be given."),
            Param("until", "query", str, "Before this RFC 3339 instant; now, if not given."),
            Param("limit", "query", Limit, "At most so many; 100 if not given."),
            Param("cursor", "query", str, "`next` of the page before, with the same instants."),
        ),
    ),
    Endpoint(
        "GET",
        "/v1/audit",
        "get_audit",
        "Whether every accepted run of all tenants has ended or is on its way; for the platform's own token only.",
        {200: Audit},
    ),
    Endpoint(
        "GET",
        "/v1/stream",
        "follow_all",
        "What happens in all runs as server-sent events, from now on or after Last-Event-ID; and how all sites are.",
        {200: EVENTS},
        params=(_AFTER,),
    ),
    Endpoint("GET", "/v1/functions", "list_functions", "All functions, without their source.", {200: FunctionList}),
    Endpoint("GET", "/v1/functions/{name}", "get_function", "One function, with its source.", {200: FunctionView}),
    Endpoint(
        "PUT",
        "/v1/functions/{name}",
        "put_function",
        "Register a function by value. The same code and options are the same version.",
        {200: FunctionView, 201: FunctionView},
        bodies=(Body(FunctionBody),),
    ),
    Endpoint("GET", "/v1/routes", "list_routes", "All routes.", {200: RouteList}),
    Endpoint("GET", "/v1/routes/{name}", "get_route", "One route.", {200: RouteView}),
    Endpoint(
        "PUT",
        "/v1/routes/{name}",
        "put_route",
        "Register a route, or change it. Its function must be registered.",
        {200: RouteView, 201: RouteView},
        bodies=(Body(Route),),
    ),
    Endpoint("DELETE", "/v1/routes/{name}", "delete_route", "Remove a route; its runs go on.", {204: None}),
    Endpoint("GET", "/v1/sites", "list_sites", "All sites.", {200: SiteList}),
    Endpoint("GET", "/v1/sites/{name}", "get_site", "One site.", {200: SiteView}),
    Endpoint(
        "GET",
        "/status/resources",
        "list_resources",
        "All sites, in the words of the IRI Facility API.",
        {200: list[ResourceView]},
    ),
    Endpoint(
        "GET",
        "/status/resources/{resource_id}",
        "get_resource",
        "One site, in the words of the IRI Facility API.",
        {200: ResourceView},
    ),
    Endpoint(
        "GET",
        "/status/incidents",
        "list_incidents",
        "The newest times in which sites were not up, in the words of the IRI Facility API, newest first.",
        {200: list[IncidentView]},
    ),
    Endpoint(
        "GET",
        "/status/incidents/{incident_id}",
        "get_incident",
        "One time in which a site was not up, in the words of the IRI Facility API.",
        {200: IncidentView},
    ),
    Endpoint(
        "POST",
        "/v1/jobs/{run_id}/{job_id}/report",
        "report_job",
        "For the wrapper of a batch job alone, which proves itself with the secret in the job's own folder: it has "
        "started, is alive, how far it is, has ended. 404 while the job is not known, 410 once it has ended.",
        {204: None},
        bodies=(Body(None, "text/plain"),),
        params=(
            Param("event", "query", ReportEvent, "What happened; it has to be given."),
            Param("exit_code", "query", ExitCode, "At its end: that of the program."),
        ),
        open=True,
    ),
    Endpoint("GET", "/livez", "live", "200 while the process turns.", {200: JSON}, open=True),
    Endpoint("GET", "/readyz", "ready", "200 while triggers are taken.", {200: Readiness, 503: Readiness}, open=True),
    Endpoint("GET", "/metrics", "metrics", "What this gateway counts.", {200: METRICS}, open=True),
    Endpoint("GET", "/openapi.json", "openapi", "This document.", {200: JSON}, open=True),
    Endpoint("GET", "/", "page", "The live page.", {200: HTML}, open=True),
    Endpoint("GET", "/page/{file}", "page_file", "A file of the live page.", {200: ANYTHING}, open=True),
)
