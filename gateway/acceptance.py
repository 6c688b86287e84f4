"""From admitted runs to the log: all of a request or nothing, each run once however often it comes."""

from __future__ import annotations

import logging
from collections import Counter
from typing import NamedTuple

from functions.admission import Admitted
from gateway.needs import Log, Tables
from gateway.problems import KeyReused
from gateway.quota import Quota
from headrace.errors import HeadraceError, Overloaded, Unavailable
from headrace.wire import Invocation, decode
from streams.log import AlreadyThere
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

    async def append(self, admitted: list[Admitted]) -> list[Accepted]:
        """Append all runs that are not in the log yet as one unit, and return all in the order given.

        Runs that they supersede or retract are stopped at once: a retraction waits for no worker to be free.

        Raises:
            KeyReused: one of them is in the log with another body; nothing was appended.
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

    async def _append(self, admitted: list[Admitted]) -> list[Accepted]:
        pending = {a.invocation.run_id: a for a in admitted}
        there: dict[str, Invocation] = {}
        for _ in range(_APPEND_TRIES_MAX):
            if not pending:
                break
            try:
                await self._append_within_quota(list(pending.values()))
                if not there:
                    return [Accepted(a.invocation, False) for a in admitted]
                break
            except (AlreadyThere, Overloaded) as refused:
                found = [] if isinstance(refused, Unavailable) else await self._existing(pending)
                if not found and not isinstance(refused, AlreadyThere):
                    raise
            for first in found:
                check_same(first, pending.pop(first.run_id).invocation.digest)
                there[first.run_id] = first
        else:
            raise Unavailable("the log says that this is there and shows it not", hint="Send it again.")
        return [Accepted(there.get(a.invocation.run_id, a.invocation), a.invocation.run_id in there) for a in admitted]

    async def _append_within_quota(self, admitted: list[Admitted]) -> None:
        unit = [record for a in admitted for record in a.records]
        routes = self._tables.routes.items()
        limits: dict[str, int] = {}
        counted = [one for one in admitted if not one.retraction]
        for one in counted:
            record = routes.get(one.invocation.route)
            if record is not None and record.route.max_in_flight is not None:
                limits[record.name] = record.route.max_in_flight
        if not limits:
            await self._log.append(unit)
            return
        wanted = Counter(a.invocation.route for a in counted if a.invocation.route in limits)
        await self._quota.take(wanted, limits)
        appended = False
        try:
            await self._log.append(unit)
            appended = True
        finally:
            self._quota.done(wanted, appended=appended)

    async def _existing(self, pending: dict[str, Admitted]) -> list[Invocation]:
        """Return the first invocations of those runs that the log has already."""
        guards = [a.record.absent or a.record.subject for a in pending.values()]
        if len(guards) == 1:
            stored = await self._log.last(guards[0])
            found = [] if stored is None else [stored]
        else:
            found = await self._log.last_of_each(guards)
        return [decode(stored.body, Invocation) for stored in found]


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
