"""What has ended, as the log tells it: the records from which the past is replayed under another policy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing

import msgspec
from aiohttp import web

from gateway.auth import tenant_of
from gateway.needs import Follow, Log
from gateway.runs import LIMIT_MAX, as_json, limit_of
from headrace.clock import format_instant, maybe_instant, parse_instant
from headrace.errors import BadRequest, Unavailable
from headrace.model import HistoryPage, Recorded
from headrace.names import invocation_id
from headrace.wire import Outcome, Slot, decode
from streams.stored import Stored
from streams.topology import done_subject

SCAN_MAX = 10 * LIMIT_MAX  # outcomes read for one page, whosoever they are
READ_TIMEOUT_S = 10.0
_EVERY = done_subject("*", "*")


class History:
    """``GET /v1/history``."""

    def __init__(self, *, log: Log, follow: Follow, clock: Callable[[], float] = time.time) -> None:
        self._log = log
        self._follow = follow
        self._clock = clock

    async def page(self, request: web.Request) -> web.Response:
        """Answer with invocations that ended from ``since`` on and before ``until``, in the order of the log."""
        query = request.query
        if "since" not in query:
            raise BadRequest("since: it is not said from when on", hint="Add ?since= with an RFC 3339 instant.")
        since = parse_instant(query["since"], "since")
        until = parse_instant(query["until"], "until") if "until" in query else self._clock()
        limit, after = limit_of(query.get("limit")), _position(query.get("cursor"))
        kept_since, newest = await self._log.begins_at(), await self._log.last(_EVERY)
        found = _Page(tenant_of(request), until, 0 if newest is None else newest.seq, limit)
        if newest is not None and newest.at >= since and after < newest.seq:
            batches = self._follow(
                [_EVERY], after=after or -1, since=None if after else since, window=max(64, min(LIMIT_MAX, limit))
            )
            try:
                async with asyncio.timeout(READ_TIMEOUT_S), aclosing(batches):
                    async for batch in batches:
                        if found.take(batch):
                            break
            except TimeoutError as error:
                raise Unavailable("the log does not answer", hint="Try again in a moment.") from error
        following = None if found.following is None else str(found.following)
        return as_json(HistoryPage(invocations=found.rows, next=following, kept_since=maybe_instant(kept_since)))


class _Page:
    """What is on a page; ``following`` is the sequence that the next one begins after, None if there is none."""

    def __init__(self, tenant: str, until: float, end: int, limit: int) -> None:
        self.rows: list[Recorded] = []
        self.following: int | None = None
        self._tenant = tenant
        self._until = until
        self._end = end
        self._limit = limit
        self._scanned = 0

    def take(self, batch: list[Stored]) -> bool:
        """Take outcomes of the log in, and say whether the page is complete."""
        for stored in batch:
            if stored.at >= self._until or stored.seq > self._end:
                return True
            self._scanned += 1
            row = recorded(stored, self._tenant)
            if row is not None:
                self.rows.append(row)
            if stored.seq == self._end:
                return True
            if len(self.rows) == self._limit or self._scanned == SCAN_MAX:
                self.following = stored.seq
                return True
        return False


def recorded(stored: Stored, tenant: str) -> Recorded | None:
    """Return what an outcome of the log tells; None if it is another tenant's, or cannot be read."""
    try:
        done = decode(stored.body, Outcome)
    except msgspec.MsgspecError:
        return None  # damaged, or of a release to come
    if done.tenant != tenant:
        return None
    return Recorded(
        run_id=done.run_id,
        invocation_id=done.invocation_id,
        function=done.function,
        version=done.version,
        tenant=done.tenant,
        route=done.route,
        state=done.state,
        accepted_at=format_instant(done.accepted_at),
        queued_at=format_instant(done.queued_at),
        started_at=format_instant(done.started_at),
        ended_at=format_instant(done.ended_at),
        stored_at=format_instant(stored.at),
        worker=done.worker,
        attempts=done.attempts,
        parent_id=done.parent_id,
        deadline=maybe_instant(done.deadline),
        due=maybe_instant(done.due),
        on_late=done.on_late,
        size=done.size,
        children=done.children,
        fills=_fills(done.slot),
        answered=done.answer is not None,
        run_state=None if done.end is None else done.end.state,
    )


def _fills(slot: Slot | None) -> list[str]:
    """Return the invocations that may start when this slot is full: a scope with none fills the slot around it."""
    found: list[str] = []
    while slot is not None:
        if slot.then is not None:
            return [*found, invocation_id(slot.scope, "then")]
        slot = slot.parent
    return found


def _position(cursor: str | None) -> int:
    if cursor is None:
        return 0
    if not cursor.isascii() or not cursor.isdigit() or not 0 < int(cursor[:19]) < 2**63 or len(cursor) > 19:
        raise BadRequest("cursor: this was not given out here", hint="Pass on `next` of the page before.")
    return int(cursor)
