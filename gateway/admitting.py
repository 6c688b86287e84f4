"""From an event on a route to a run about to be accepted: looked up, quoted, and put into its records. Nothing is sent.

The door and its dry run both go through here, so that what a quote says of an event is what the door does with it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import NamedTuple

from functions.admission import UNKNOWN, Admitted, admit
from functions.quotes import Choice, Demand, Part, Quoter
from functions.revisions import standing
from gateway.backlog import Backlog
from gateway.needs import Tables
from headrace.errors import BadRequest, Conflict, NotFound
from headrace.model import Quote
from headrace.names import check_name
from headrace.wire import EventMeta, FunctionRecord, Invocation, Payload, RouteRecord
from streams.tables import row_key

TRIGGER_TYPE = "org.headrace.trigger"
KEY_CHARS_MAX = 256
_KEY = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")


class Quoted(NamedTuple):
    """What is told of a run that is about to be accepted, and by when its first function should have ended."""

    quote: Quote
    due: float | None


class Offer(NamedTuple):
    """An event that came in: ``payload`` is its data inline, ``digest`` tells its body from others."""

    event: EventMeta
    payload: Payload
    digest: str


class Admitting:
    """Looks up what an event leads to, and admits it."""

    def __init__(self, *, tables: Tables, quoter: Quoter, backlog: Backlog) -> None:
        self._tables = tables
        self._quoter = quoter
        self._backlog = backlog

    async def route(self, name: str, tenant: str) -> RouteRecord:
        """Return a route of this tenant.

        Raises:
            NotFound: it has none of this name.
        """
        check_name(name, "route name")
        key = row_key(tenant, name)
        found = self._tables.routes.get(key) or await self._tables.routes.fetch(key)
        if found is None:
            raise NotFound(f"there is no route {name}", hint="GET /v1/routes lists them; `headrace deploy` makes them.")
        return found

    async def function(self, route: RouteRecord) -> FunctionRecord:
        """Return the function that a route leads to.

        Raises:
            Conflict: it is not registered.
        """
        key = row_key(route.tenant, route.route.function)
        found = self._tables.functions.get(key) or await self._tables.functions.fetch(key)
        if found is None:
            raise Conflict(
                f"the route {route.name} leads to the function {route.route.function}, which is not registered",
                hint="Register it: `headrace deploy FILE.py`.",
            )
        return found

    def quote(
        self,
        route: RouteRecord,
        function: FunctionRecord,
        size: int,
        deadline: float | None,
        now: float,
        behind: int = 0,
    ) -> Quoted:
        """Return what is told of a run.

        Args:
            route: says whether a cheaper variant may answer.
            function: what runs first.
            size: the bytes of its payload.
            deadline: of the run, epoch seconds or None.
            now: when it comes in, epoch seconds.
            behind: how many runs of the same request come before it.
        """
        due = self._quoter.due(function, size, deadline, now)
        return Quoted(
            self._quoter.quote(function, self._demand(route, function, size, deadline, due, now, behind)), due
        )

    def plan(
        self, route: RouteRecord, function: FunctionRecord, size: int, deadline: float | None, now: float
    ) -> tuple[list[Choice], list[Part]]:
        """Return all ways to the answer, the chosen one first, and where the time of the function is expected to go.

        Takes what ``quote`` takes of a run that comes alone.
        """
        due = self._quoter.due(function, size, deadline, now)
        demand = self._demand(route, function, size, deadline, due, now)
        return self._quoter.plan(function, demand), self._quoter.parts(function, demand)

    def need_s(self, first: Invocation) -> float | None:
        """Return how long an invocation is expected to keep a slot, in seconds; None where nothing is known of it."""
        return self._quoter.need_s(first.tenant, first.function, first.version, first.payload.size)

    def _demand(
        self,
        route: RouteRecord,
        function: FunctionRecord,
        size: int,
        deadline: float | None,
        due: float | None,
        now: float,
        behind: int = 0,
    ) -> Demand:
        need_s = self._quoter.need_s(function.tenant, function.name, function.version, size)
        ahead_s = self._backlog.wait_s(due, now, route.tenant, behind, need_s)
        return Demand(size, ahead_s, deadline, now, route.route.on_late == "degrade")

    def admit(
        self,
        offer: Offer,
        kept: Payload,
        route: RouteRecord,
        function: FunctionRecord,
        *,
        deadline: float | None,
        now: float,
        behind: int = 0,
    ) -> Admitted:
        """Return the run of an event on a route of its tenant, with the records that accept it.

        Args:
            offer: the event.
            kept: its payload as the log may hold it.
            route: where it leads.
            function: what that route leads to.
            deadline: of the run, epoch seconds or None.
            now: epoch seconds.
            behind: how many runs of the same request come before it.

        Raises:
            BadRequest: the route tells revisions by something that the event does not have.
        """
        revises = standing(route, offer.event, offer.payload)
        quoted = Quoted(UNKNOWN, None)
        if not revises.retraction:
            quoted = self.quote(route, function, kept.size, deadline, now, behind)
        return admit(
            event=offer.event,
            payload=kept,
            digest=offer.digest,
            route=route,
            function=function,
            tenant=route.tenant,
            now=now,
            deadline=deadline,
            revises=revises,
            quote=quoted.quote,
            due=quoted.due,
        )


def trigger_event(headers: Mapping[str, str], route: RouteRecord) -> EventMeta:
    """Return the event that a trigger by the name of a route is.

    Raises:
        BadRequest: its ``Idempotency-Key`` is not possible.
    """
    key = event_id(headers.get("Idempotency-Key"))
    return EventMeta(id=key, source=f"/v1/triggers/{route.name}", type=TRIGGER_TYPE)


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
