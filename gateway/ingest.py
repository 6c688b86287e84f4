"""Events and triggers become runs: read, admitted, appended to the log, and only then answered.

This is the hot path. What it does per request is decode, derive ids, encode and append; it logs nothing.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web
from msgspec import Struct, structs

from functions.admission import Admitted, admit, reference
from functions.qos import deadline_of as route_deadline
from functions.revisions import standing
from functions.routing import matching
from gateway import cloudevents
from gateway.acceptance import Acceptance, Accepted, check_same
from gateway.backlog import Backlog
from gateway.gate import Gate
from gateway.limits import GatewayLimits
from gateway.media import digest_of, read_payload
from gateway.metrics import Metrics
from gateway.needs import Tables
from gateway.runs import RunBook
from gateway.waiting import Waiting, wait_of
from headrace.errors import BadRequest, Conflict, HeadraceError, NotFound, TooLarge, Unavailable
from headrace.model import RunRef
from headrace.names import check_name
from headrace.wire import EventMeta, FunctionRecord, RouteRecord
from streams.blobs import Blobs, check_in
from streams.log import UNIT_MESSAGES_MAX

TRIGGER_TYPE = "org.headrace.trigger"
KEY_CHARS_MAX = 256
_KEY = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")
JSON_HEADERS = {"Content-Type": "application/json"}  # given as headers, because aiohttp is quicker that way

encode_json = msgspec.json.Encoder().encode


class EventsAccepted(Struct, frozen=True, kw_only=True):
    """The answer to ``POST /v1/events``: one reference per run."""

    runs: list[RunRef]


class Ingest:
    """``POST /v1/events`` and ``POST /v1/triggers/{route}``."""

    def __init__(
        self,
        *,
        acceptance: Acceptance,
        tables: Tables,
        blobs: Blobs,
        book: RunBook,
        gate: Gate,
        backlog: Backlog,
        waiting: Waiting,
        metrics: Metrics,
        tenant: str,
        limits: GatewayLimits,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._acceptance = acceptance
        self._tables = tables
        self._blobs = blobs
        self._book = book
        self._gate = gate
        self._backlog = backlog
        self._waiting = waiting
        self._door = metrics.door
        self._tenant = tenant
        self._limits = limits
        self._clock = clock

    # ------------------------------------------------------------ endpoints

    async def trigger(self, request: web.Request) -> web.Response:
        """Answer ``POST /v1/triggers/{route}``: 202 once it is in the log; asked to wait, 200 once it has ended."""
        wait_s = wait_of(request.headers.get("Prefer"), self._limits.wait_seconds_max)
        if wait_s == 0.0:
            return await self._promise(await self._take_trigger(request))
        async with self._waiting.seat() as seat:
            accepted = await self._take_trigger(request, seat.listen)
            view = await seat.view(accepted.first.run_id, wait_s, duplicate=accepted.duplicate)
            applied = {"Preference-Applied": f"wait={wait_s:g}"}
            if view is None:
                return await self._promise(accepted, applied)
            return web.Response(body=encode_json(view), content_type="application/json", headers=applied)

    async def events(self, request: web.Request) -> web.Response:
        """Answer ``POST /v1/events``: 202 once the runs of all events are in the log, as one unit."""
        began = time.perf_counter()
        try:
            held = self._gate.enter(request)
            try:
                content_type = request.headers.get("Content-Type")
                received = cloudevents.read_events(
                    content_type, request.headers.items(), await held.read(), events_max=self._limits.batch_events_max
                )
                self._door.events += len(received)
                accepted = await self._acceptance.append(await self._admit_events(received))
            finally:
                held.leave()
        except HeadraceError:
            self._door.refused += 1
            raise
        self._count(accepted, began)
        runs = [await self._reference(one) for one in accepted]
        return web.Response(body=encode_json(EventsAccepted(runs=runs)), status=202, headers=JSON_HEADERS)

    # ------------------------------------------------------------ from request to admitted runs

    async def _take_trigger(
        self, request: web.Request, before: Callable[[str], Awaitable[None]] | None = None
    ) -> Accepted:
        """Read, admit and append one trigger; ``before`` is awaited with the run's id just before the append."""
        began = time.perf_counter()
        try:
            route = await self._route(request.match_info["route"])
            now = self._clock()
            self._backlog.check(route_deadline(route.route, request.headers.get("Headrace-Deadline"), now), now)
            held = self._gate.enter(request)
            try:
                admitted = await self._admit_trigger(request, route, await held.read())
                if before is not None:
                    await before(admitted.invocation.run_id)
                [accepted] = await self._acceptance.append([admitted])
            finally:
                held.leave()
        except HeadraceError:
            self._door.refused += 1
            raise
        self._count([accepted], began)
        return accepted

    async def _admit_trigger(self, request: web.Request, route: RouteRecord, body: bytes) -> Admitted:
        headers = request.headers
        event = EventMeta(
            id=event_id(headers.get("Idempotency-Key")), source=f"/v1/triggers/{route.name}", type=TRIGGER_TYPE
        )
        payload = read_payload(headers.get("Content-Type"), body)
        now = self._clock()
        asked = headers.get("Headrace-Deadline")
        revises = standing(route, event, payload)
        return admit(
            event=event,
            payload=await check_in(payload, self._blobs),
            digest=digest_of(payload),
            route=route,
            function=await self._function(route),
            tenant=self._tenant,
            now=now,
            deadline=route_deadline(route.route, asked, now),
            revises=revises,
        )

    async def _admit_events(self, received: list[cloudevents.Received]) -> list[Admitted]:
        """Admit every event on every route that takes it. The same event twice in a batch counts once."""
        admitted: dict[str, Admitted] = {}
        now = self._clock()
        for event, payload in received:
            routes = matching(self._tables.routes.items().values(), event, self._tenant)
            if not routes:
                continue
            digest = digest_of(payload, str(event.extensions.get("dataref", "")))
            own_deadline = cloudevents.deadline_of(event, now)
            kept = await check_in(payload, self._blobs)
            for route in routes:
                one = admit(
                    event=event,
                    payload=kept,
                    digest=digest,
                    route=route,
                    function=await self._function(route),
                    tenant=self._tenant,
                    now=now,
                    deadline=route_deadline(route.route, None, now) if own_deadline is None else own_deadline,
                    revises=standing(route, event, payload),
                )
                known = admitted.setdefault(one.invocation.run_id, one)
                check_same(known.invocation, digest)
        waiting = [one.invocation.deadline for one in admitted.values() if not one.retraction]
        if waiting:
            due = [deadline for deadline in waiting if deadline is not None]
            self._backlog.check(min(due, default=None), now, runs=len(waiting))
        records = sum(len(one.records) for one in admitted.values())
        if records > UNIT_MESSAGES_MAX:
            raise TooLarge(
                f"the batch starts {len(admitted):,} runs with {records:,} records, the limit is {UNIT_MESSAGES_MAX}",
                hint="Send several batches.",
            )
        return list(admitted.values())

    async def _route(self, name: str) -> RouteRecord:
        check_name(name, "route name")
        found = self._tables.routes.get(name) or await self._tables.routes.fetch(name)
        if found is None or found.tenant != self._tenant:
            raise NotFound(f"there is no route {name}", hint="GET /v1/routes lists them; `headrace deploy` makes them.")
        return found

    async def _function(self, route: RouteRecord) -> FunctionRecord:
        name = route.route.function
        found = self._tables.functions.get(name) or await self._tables.functions.fetch(name)
        if found is None:
            raise Conflict(
                f"the route {route.name} leads to the function {name}, which is not registered",
                hint="Register it: `headrace deploy FILE.py`.",
            )
        return found

    # ------------------------------------------------------------ answers

    def _count(self, accepted: list[Accepted], began: float) -> None:
        now = self._clock()
        for one in accepted:
            if not one.duplicate:
                self._backlog.took(one.first.route, one.first.deadline, now)
        duplicates = sum(one.duplicate for one in accepted)
        self._door.duplicate += duplicates
        self._door.accepted += len(accepted) - duplicates
        self._door.took(time.perf_counter() - began)

    async def _promise(self, accepted: Accepted, headers: dict[str, str] | None = None) -> web.Response:
        return web.Response(
            body=encode_json(await self._reference(accepted)),
            status=202,
            headers={**JSON_HEADERS, "Location": f"/v1/runs/{accepted.first.run_id}", **(headers or {})},
        )

    async def _reference(self, accepted: Accepted) -> RunRef:
        """Return the reference of a run; only one that was there before can be further than accepted."""
        made = reference(accepted.first, duplicate=accepted.duplicate)
        if not accepted.duplicate:
            return made
        try:
            return structs.replace(made, state=(await self._book.record(made.run_id)).state)
        except (Unavailable, NotFound):
            return made  # the promise stands all the same


def event_id(key: str | None) -> str:
    """Return the event id that an ``Idempotency-Key`` gives (quotes of a structured header aside), or a new one."""
    if key is None:
        return secrets.token_hex(16)
    if len(key) >= 2 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if len(key) > KEY_CHARS_MAX or not _KEY.fullmatch(key):
        raise BadRequest(
            f"Idempotency-Key: {ascii(key)[:40]} is not possible",
            hint=f"Use 1 to {KEY_CHARS_MAX} printable ASCII characters.",
        )
    return key
