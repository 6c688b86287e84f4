"""Events and triggers become runs: read, admitted, appended to the log, and only then answered.

This is the hot path. What it does per request is decode, derive ids, encode and append; it logs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web
from msgspec import Struct, structs

from functions.admission import Admitted, due_of, reference
from functions.qos import deadline_of as route_deadline
from functions.routing import matching
from gateway import cloudevents
from gateway.acceptance import Accepted, check_batch, check_same
from gateway.admitting import Offer, trigger_event
from gateway.auth import tenant_of
from gateway.entrance import Entrance
from gateway.media import digest_of, read_payload
from gateway.metrics import Metrics
from gateway.runs import RunBooks
from gateway.waiting import Waiting, wait_of
from headrace.errors import HeadraceError, NotFound, Unavailable
from headrace.model import RunRef
from headrace.wire import RouteRecord
from streams.blobs import check_in

JSON_HEADERS = {"Content-Type": "application/json"}  # given as headers, because aiohttp is quicker that way

encode_json = msgspec.json.Encoder().encode


class EventsAccepted(Struct, frozen=True, kw_only=True):
    """The answer to ``POST /v1/events``: one reference per run."""

    runs: list[RunRef]


class Ingest:
    """``POST /v1/events`` and ``POST /v1/triggers/{route}``."""

    def __init__(self, entrance: Entrance, *, books: RunBooks, waiting: Waiting, metrics: Metrics) -> None:
        self._tables = entrance.behind.tables
        self._blobs = entrance.behind.blobs
        self._admitting = entrance.admitting
        self._acceptance = entrance.acceptance
        self._backlog = entrance.backlog
        self._gate = entrance.gate
        self._limits = entrance.limits
        self._clock = entrance.clock
        self._books = books
        self._waiting = waiting
        self._door = metrics.door

    # ------------------------------------------------------------ endpoints

    async def trigger(self, request: web.Request) -> web.Response:
        """Answer ``POST /v1/triggers/{route}``: 202 once it is in the log; asked to wait, 200 once it has ended."""
        wait_s = wait_of(request.headers.get("Prefer"), self._limits.wait_seconds_max)
        if wait_s == 0.0:
            return await self._promise(await self._take_trigger(request))
        async with self._waiting.seat(tenant_of(request)) as seat:
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
                accepted = await self._append(await self._admit_events(received, tenant_of(request)))
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
            route = await self._admitting.route(request.match_info["route"], tenant_of(request))
            now = self._clock()
            deadline = route_deadline(route.route, request.headers.get("Headrace-Deadline"), now)
            self._backlog.check(deadline, now, tenant=route.tenant)
            held = self._gate.enter(request)
            try:
                admitted = await self._admit_trigger(request, route, await held.read())
                if before is not None:
                    await before(admitted.invocation.run_id)
                [accepted] = await self._append([admitted])
            finally:
                held.leave()
        except HeadraceError:
            self._door.refused += 1
            raise
        self._count([accepted], began)
        return accepted

    async def _admit_trigger(self, request: web.Request, route: RouteRecord, body: bytes) -> Admitted:
        headers = request.headers
        event = trigger_event(headers, route)
        payload = read_payload(headers.get("Content-Type"), body)
        now = self._clock()
        return self._admitting.admit(
            Offer(event, payload, digest_of(payload)),
            await check_in(payload, self._blobs),
            route,
            await self._admitting.function(route),
            deadline=route_deadline(route.route, headers.get("Headrace-Deadline"), now),
            now=now,
        )

    async def _admit_events(self, received: list[cloudevents.Received], tenant: str) -> list[Admitted]:
        """Admit every event on every route of a tenant that takes it. The same event twice in a batch counts once."""
        admitted: dict[str, Admitted] = {}
        now = self._clock()
        for event, payload in received:
            routes = matching(self._tables.routes.items().values(), event, tenant)
            if not routes:
                continue
            offer = Offer(event, payload, cloudevents.digest_of(event, payload))
            own_deadline = cloudevents.deadline_of(event, now)
            kept = await check_in(payload, self._blobs)
            for route in routes:
                one = self._admitting.admit(
                    offer,
                    kept,
                    route,
                    await self._admitting.function(route),
                    deadline=route_deadline(route.route, None, now) if own_deadline is None else own_deadline,
                    now=now,
                    behind=len(admitted),
                )
                known = admitted.setdefault(one.invocation.run_id, one)
                check_same(known.invocation, offer.digest)
        check_batch(list(admitted.values()), self._backlog, now)
        return list(admitted.values())

    async def _append(self, admitted: list[Admitted]) -> list[Accepted]:
        with self._backlog.coming([one.invocation for one in admitted]):
            return await self._acceptance.append(admitted)

    # ------------------------------------------------------------ answers

    def _count(self, accepted: list[Accepted], began: float) -> None:
        now = self._clock()
        for first, duplicate in accepted:
            if not duplicate:
                need_s = self._admitting.need_s(first)
                self._backlog.took(first.route, due_of(first), now, tenant=first.tenant, need_s=need_s)
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
            return structs.replace(made, state=(await self._books.of(accepted.first.tenant).record(made.run_id)).state)
        except (Unavailable, NotFound):
            return made  # the promise stands all the same
