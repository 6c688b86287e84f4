"""``POST /v1/quote``: what would come of an event or a trigger if it were sent now. Nothing is appended or kept."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple, ParamSpec

from aiohttp import web
from msgspec import structs

from functions.admission import Admitted, check_feasible, due_of
from functions.qos import deadline_of as route_deadline
from functions.qos import lane
from functions.routing import matching
from gateway import cloudevents
from gateway.acceptance import check_batch, check_same
from gateway.admitting import Offer, trigger_event
from gateway.auth import tenant_of
from gateway.entrance import Entrance
from gateway.media import digest_of, read_payload
from gateway.problems import refusal
from gateway.runs import as_json
from headrace.clock import maybe_instant
from headrace.errors import HeadraceError
from headrace.filters import why_not
from headrace.model import (
    ChoiceView,
    EventExplanation,
    EventView,
    Explanation,
    PartView,
    Refusal,
    RouteExplanation,
)
from headrace.wire import EventMeta, FunctionRecord, Invocation, RouteRecord
from streams.newest import newest_run
from streams.threads import foresee

ROUTES_TOLD_MAX = 200  # of those that do not take an event

P = ParamSpec("P")


class Asked(NamedTuple):
    """An event on a route that takes it. Only one of ``admitted`` and ``refused`` is there."""

    route: RouteRecord
    function: FunctionRecord | None
    admitted: Admitted | None
    refused: HeadraceError | None


class _Stage(IntEnum):
    """Where the door refuses something: at the first of these where there is a reason to."""

    READING = 0
    LOAD = 1
    REPEATS = 2
    DEADLINE = 3
    ROOM = 4


class _Post(NamedTuple):
    """All that one request asks for: its runs, those that are in the log already, of each run the first invocation
    that counts, and why it would be refused."""

    admitted: list[Admitted]
    known: dict[str, Invocation]
    firsts: dict[str, Invocation]
    reasons: list[tuple[_Stage, Refusal]]

    def refuses(self, stage: _Stage, check: Callable[P, None], *given: P.args, **named: P.kwargs) -> Refusal | None:
        """Return what a check refuses at some stage, None where it lets pass."""
        try:
            check(*given, **named)
        except HeadraceError as error:
            return self.note(stage, error)
        return None

    def note(self, stage: _Stage, error: HeadraceError) -> Refusal:
        """Take note of a reason to refuse all of this."""
        found = refusal(error)
        self.reasons.append((stage, found))
        return found

    @property
    def refused(self) -> Refusal | None:
        """What the door would answer: the reason that it comes upon first."""
        return min(self.reasons, key=lambda reason: reason[0])[1] if self.reasons else None


class DryRun:
    """Explains what the door would do, by asking the same code."""

    def __init__(self, entrance: Entrance) -> None:
        self._log = entrance.behind.log
        self._tables = entrance.behind.tables
        self._admitting = entrance.admitting
        self._acceptance = entrance.acceptance
        self._backlog = entrance.backlog
        self._gate = entrance.gate
        self._limits = entrance.limits
        self._clock = entrance.clock

    async def explain(self, request: web.Request) -> web.Response:
        """Answer ``POST /v1/quote``: what ``POST /v1/events`` takes, or with ``?route=`` what the trigger takes."""
        tenant, now = tenant_of(request), self._clock()
        name = request.query.get("route")
        held = self._gate.enter(request)
        try:
            body = await held.read()
        finally:
            held.leave()
        if name is not None:
            asked = [await self._trigger(request, body, await self._admitting.route(name, tenant), now)]
        else:
            asked = await self._events(request, body, tenant, now)
        admitted = [one.admitted for _, several in asked for one in several if one.admitted is not None]
        known = await self._acceptance.known(admitted)
        post = _Post(admitted, known, dict(known), [])
        once = {one.invocation.run_id: one for one in admitted}
        post.refuses(_Stage.LOAD, check_batch, list(once.values()), self._backlog, now)
        explained = [[await self._explain(one, post, now) for one in several] for _, several in asked]
        events = [
            EventExplanation(
                event=_event_view(offer.event),
                routes=[*routes, *([] if name is not None else self._silent(offer.event, tenant))],
            )
            for (offer, _), routes in zip(asked, explained, strict=True)
        ]
        return as_json(Explanation(refused=post.refused, events=events))

    # ------------------------------------------------------------ from request to admitted runs

    async def _trigger(
        self, request: web.Request, body: bytes, route: RouteRecord, now: float
    ) -> tuple[Offer, list[Asked]]:
        payload = read_payload(request.headers.get("Content-Type"), body)
        offer = Offer(trigger_event(request.headers, route), payload, digest_of(payload))
        deadline = route_deadline(route.route, request.headers.get("Headrace-Deadline"), now)
        return offer, [await self._ask(offer, route, deadline, now)]

    async def _events(
        self, request: web.Request, body: bytes, tenant: str, now: float
    ) -> list[tuple[Offer, list[Asked]]]:
        received = cloudevents.read_events(
            request.headers.get("Content-Type"),
            request.headers.items(),
            body,
            events_max=self._limits.batch_events_max,
        )
        asked: list[tuple[Offer, list[Asked]]] = []
        for event, payload in received:
            offer = Offer(event, payload, cloudevents.digest_of(event, payload))
            own = cloudevents.deadline_of(event, now)
            several = [
                await self._ask(offer, route, route_deadline(route.route, None, now) if own is None else own, now)
                for route in matching(self._tables.routes.items().values(), event, tenant)
            ]
            asked.append((offer, several))
        return asked

    async def _ask(self, offer: Offer, route: RouteRecord, deadline: float | None, now: float) -> Asked:
        function = None
        try:
            function = await self._admitting.function(route)
            # What would be kept elsewhere is described here as it came: only its size tells anything.
            return Asked(
                route,
                function,
                self._admitting.admit(offer, offer.payload, route, function, deadline=deadline, now=now),
                None,
            )
        except HeadraceError as error:
            return Asked(route, function, None, error)

    # ------------------------------------------------------------ what the door would say

    async def _explain(self, one: Asked, post: _Post, now: float) -> RouteExplanation:
        if one.admitted is None or one.function is None:
            return RouteExplanation(
                route=one.route.name,
                fires=True,
                function=one.route.route.function,
                refused=None if one.refused is None else post.note(_Stage.READING, one.refused),
            )
        first = one.admitted.invocation
        # The same event twice in a batch counts once, like one that came before.
        earlier = post.firsts.setdefault(first.run_id, first)
        told = RouteExplanation(
            route=one.route.name,
            fires=True,
            function=earlier.function,
            version=earlier.version,
            deadline=maybe_instant(earlier.deadline),
            lane=lane(due_of(earlier), earlier.accepted_at),
            quote=earlier.quote,
        )
        if earlier is not first:
            stage = _Stage.REPEATS if first.run_id in post.known else _Stage.READING
            refused = post.refuses(stage, check_same, earlier, first.digest)
            return structs.replace(told, duplicate_of=first.run_id, refused=refused)
        refused = await self._refused(one.admitted, post)
        if not one.admitted.retraction:
            told = structs.replace(told, **self._plan(one.route, one.function, first, now))
        if refused is None:
            told = structs.replace(told, **await self._overruling(first))
        return structs.replace(told, refused=refused)

    async def _refused(self, one: Admitted, post: _Post) -> Refusal | None:
        """Return why this run would not be accepted, whatever waits; None where it would."""
        route = one.invocation.route
        new = {a.invocation.run_id: a for a in post.admitted if a.invocation.route == route}
        late = post.refuses(_Stage.DEADLINE, check_feasible, one)
        try:
            await self._acceptance.check_room([a for run, a in new.items() if run not in post.known])
        except HeadraceError as error:
            full = post.note(_Stage.ROOM, error)
            return late or full
        return late

    def _plan(self, route: RouteRecord, function: FunctionRecord, first: Invocation, now: float) -> dict[str, object]:
        plan, parts = self._admitting.plan(route, function, first.payload.size, first.deadline, now)
        return {
            "quote": plan[0].quote,  # of the same moment as the parts
            "plan": [
                ChoiceView(
                    function=choice.function,
                    version=choice.version,
                    quote=choice.quote,
                    chosen=choice.chosen,
                    why=choice.why,
                )
                for choice in plan
            ],
            "parts": [PartView(part=part.name, p50_s=part.p50_s, p90_s=part.p90_s) for part in parts],
        }

    async def _overruling(self, first: Invocation) -> dict[str, object]:
        """Return what its standing among revisions would bring, or which run it would replace."""
        marks = await foresee(self._log, first)
        over = sorted(run for run in marks if run != first.run_id)
        if first.newest:
            newest = await newest_run(self._log, first.newest)
            over += [] if newest is None else [newest]
        own = marks.get(first.run_id)
        return {"overruled_by": None if own is None else own.run_id, "overrules": over}

    def _silent(self, event: EventMeta, tenant: str) -> list[RouteExplanation]:
        """Return the other routes of the tenant, with what keeps them from firing."""
        silent: list[RouteExplanation] = []
        for record in sorted(self._tables.routes.items().values(), key=lambda r: r.name):
            rule = record.route.filter
            if record.tenant != tenant or len(silent) >= ROUTES_TOLD_MAX:
                continue
            why = "it has no filter: only triggers by its name reach it" if rule is None else why_not(rule, event)
            if why:
                silent.append(RouteExplanation(route=record.name, fires=False, why=why))
        return silent


def _event_view(event: EventMeta) -> EventView:
    return EventView(id=event.id, source=event.source, type=event.type, subject=event.subject, time=event.time)
