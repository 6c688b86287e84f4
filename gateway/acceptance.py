"""From admitted runs to the log: all of a request or nothing, each run once however often it comes."""

from __future__ import annotations

import logging
from typing import NamedTuple

from functions.admission import Admitted, check_feasible, is_feasible
from gateway.backlog import Backlog
from gateway.needs import Log, Tables
from gateway.probes import Probes
from gateway.problems import KeyReused
from gateway.quota import Quota, RouteOf
from headrace.errors import HeadraceError, Overloaded, TooLarge, Unavailable
from headrace.wire import Invocation, decode
from streams.log import UNIT_MESSAGES_MAX, AlreadyThere
from streams.tables import row_key
from streams.threads import settle

_log = logging.getLogger(__name__)

_APPEND_TRIES_MAX = 5


class Accepted(NamedTuple):
    """A run in the log: its first invocation, and whether an earlier request put it there."""

    first: Invocation
    duplicate: bool


class Acceptance:
    """Appends the first invocations of runs."""

    def __init__(self, *, log: Log, tables: Tables, quota: Quota) -> None:
        self._log = log
        self._tables = tables
        self._quota = quota
        self._probes = Probes()

    async def append(self, admitted: list[Admitted]) -> list[Accepted]:
        """Append all runs that are not in the log yet as one unit, and return all in the order given.

        Runs that they supersede or retract are stopped at once: a retraction waits for no worker to be free.

        Raises:
            KeyReused: one of them is in the log with another body; nothing was appended.
            Infeasible: its route is strict, and the answer of one that is not in the log is not expected in time.
            Overloaded: a route has as many open runs as it may have.
        """
        accepted = await self._append(admitted) if admitted else []
        for first, _ in accepted:
            if first.places:
                try:
                    await settle(self._log, first, first.accepted_at)
                except HeadraceError as error:  # it is accepted all the same; whoever takes the run settles it
                    _log.warning("what the run %s overrules is not settled yet: %s", first.run_id, error)
        return accepted

    async def known(self, admitted: list[Admitted]) -> dict[str, Invocation]:
        """Return the first invocations of those runs that are in the log already, by run.

        Raises:
            Unavailable: the log does not answer.
        """
        pending = {a.invocation.run_id: a for a in admitted}
        return {first.run_id: first for first in await self._existing(pending)} if pending else {}

    async def check_room(self, admitted: list[Admitted]) -> None:
        """Return if so many more runs of their routes may be open; raises ``Overloaded`` as ``append`` does."""
        await self._quota.check(*self._wanted(admitted))

    async def _append(self, admitted: list[Admitted]) -> list[Accepted]:
        pending = {a.invocation.run_id: a for a in admitted}
        there: dict[str, Invocation] = {}
        if not all(is_feasible(a) for a in admitted):
            self._take_out(await self._existing(pending), pending, there)
            for one in pending.values():  # what is in the log already is a repeat, and no longer for refusal
                if not is_feasible(one) and not self._probes.lets_in(_route_of(one), one.invocation.accepted_at):
                    check_feasible(one)
        for _ in range(_APPEND_TRIES_MAX):
            if not pending:
                break
            try:
                await self._append_within_quota(list(pending.values()))
                break
            except (AlreadyThere, Overloaded) as refused:
                found = [] if isinstance(refused, Unavailable) else await self._existing(pending)
                if not found and not isinstance(refused, AlreadyThere):
                    raise
            self._take_out(found, pending, there)
        else:
            raise Unavailable("the log says that this is there and shows it not", hint="Send it again.")
        for one in pending.values():
            if one.strict:
                self._probes.accepted(_route_of(one))
        return [Accepted(there.get(a.invocation.run_id, a.invocation), a.invocation.run_id in there) for a in admitted]

    @staticmethod
    def _take_out(found: list[Invocation], pending: dict[str, Admitted], there: dict[str, Invocation]) -> None:
        for first in found:
            check_same(first, pending.pop(first.run_id).invocation.digest)
            there[first.run_id] = first

    async def _append_within_quota(self, admitted: list[Admitted]) -> None:
        unit = [record for a in admitted for record in a.records]
        wanted, limits = self._wanted(admitted)
        if not wanted:
            await self._log.append(unit)
            return
        await self._quota.take(wanted, limits)
        appended = False
        try:
            await self._log.append(unit)
            appended = True
        finally:
            self._quota.done(wanted, appended=appended)

    def _wanted(self, admitted: list[Admitted]) -> tuple[dict[RouteOf, int], dict[RouteOf, int]]:
        """Return how many runs are asked for on routes with a limit, and those limits."""
        wanted: dict[RouteOf, int] = {}
        limits: dict[RouteOf, int] = {}
        for one in admitted:
            route = _route_of(one)
            record = self._tables.routes.get(row_key(*route))
            if record is not None and record.route.max_in_flight is not None and not one.retraction:
                limits[route] = record.route.max_in_flight
                wanted[route] = wanted.get(route, 0) + 1
        return wanted, limits

    async def _existing(self, pending: dict[str, Admitted]) -> list[Invocation]:
        """Return the first invocations of those runs that the log has already."""
        guards = [a.record.absent or a.record.subject for a in pending.values()]
        if len(guards) == 1:
            stored = await self._log.last(guards[0])
            found = [] if stored is None else [stored]
        else:
            found = await self._log.last_of_each(guards)
        return [decode(stored.body, Invocation) for stored in found]


def _route_of(one: Admitted) -> RouteOf:
    return RouteOf(one.invocation.tenant, one.invocation.route)


def check_batch(admitted: list[Admitted], backlog: Backlog, now: float) -> None:
    """Return if all of these may come in together, as far as that can be told without asking anybody.

    Raises:
        Busy: the most urgent of them would wait too long, or too much waits already.
        Overloaded: their tenant has as much waiting as it may have.
        TooLarge: they do not fit into one unit of the log.
    """
    waiting = [one.invocation for one in admitted if not one.retraction]
    if waiting:
        deadlines = [one.deadline for one in waiting if one.deadline is not None]
        backlog.check(min(deadlines, default=None), now, runs=len(waiting), tenant=waiting[0].tenant)
    records = sum(len(one.records) for one in admitted)
    if records > UNIT_MESSAGES_MAX:
        raise TooLarge(
            f"the batch starts {len(admitted):,} runs with {records:,} records, the limit is {UNIT_MESSAGES_MAX}",
            hint="Send several batches.",
        )


def check_same(first: Invocation, digest: str) -> None:
    """Return if a repeat carries the body of the first.

    Raises:
        KeyReused: it carries another one.
    """
    if first.digest != digest:
        event_id = first.event.id if first.event is not None else ""
        raise KeyReused(
            f"the event id {ascii(event_id)[:80]} came before on the route {first.route} with another body",
            hint="Give each event an id of its own; a repeat must carry the same body.",
        )
