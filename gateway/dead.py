"""What was given up on: listed with the error of every attempt, and given another go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec
from aiohttp import web
from msgspec import structs

from functions.admission import guard_subject, reference
from functions.qos import deadline_of
from functions.replays import Again, again, function_of, replay, told
from gateway.acceptance import Acceptance, Accepted
from gateway.admitting import Admitting, event_id
from gateway.auth import tenant_of
from gateway.gate import Gate
from gateway.needs import Behind
from gateway.runs import RunBooks, as_json, cursor_of, limit_of
from headrace.clock import format_instant, parse_instant
from headrace.errors import BadRequest, Conflict, NotFound, Unavailable
from headrace.model import AttemptError, DeadPage, DeadView, ErrorInfo, Replaying, ReplayView
from headrace.names import check_name, invocation_id
from headrace.wire import GATHER, RETRACTER, Attempt, FunctionRecord, Gather, Invocation, Outcome, RouteRecord, decode
from streams.blobs import check_out
from streams.reader import Dead
from streams.record import RunRecord
from streams.tables import row_key
from streams.topology import attempt_subject, done_subject, job_subject, kind_of, replay_subject, run_of, work_subject

READS_AT_ONCE = 32
_YES, _NO = ("1", "true"), ("", "0", "false")


class DeadList:
    """The endpoints under ``/v1/dead``."""

    def __init__(
        self,
        behind: Behind,
        *,
        acceptance: Acceptance,
        admitting: Admitting,
        books: RunBooks,
        gate: Gate,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._log, self._tables, self._blobs, self._reader = behind
        self._acceptance = acceptance
        self._admitting = admitting
        self._books = books
        self._gate = gate
        self._clock = clock

    # ------------------------------------------------------------ listing

    async def page(self, request: web.Request) -> web.Response:
        """Answer ``GET /v1/dead``: newest first, by default those that were not replayed yet."""
        query = request.query
        function, route, since = query.get("function"), query.get("route"), query.get("since")
        tenant = tenant_of(request)
        behind = await self._books.of(tenant).behind()
        found = await self._reader.dead(
            tenant,
            function=None if function is None else check_name(function, "function name"),
            route=None if route is None else check_name(route, "route name"),
            since=None if since is None else parse_instant(since, "since"),
            replayed=_flag(query.get("all", ""), "all"),
            limit=limit_of(query.get("limit")),
            cursor=cursor_of(query.get("cursor")),
        )
        turns = asyncio.Semaphore(READS_AT_ONCE)

        async def shown(one: Dead) -> DeadView:
            async with turns:
                return _view(one, await self._errors(one))

        dead = await asyncio.gather(*(shown(one) for one in found.dead))
        return as_json(DeadPage(dead=dead, next=found.next, behind=behind))

    async def _errors(self, one: Dead) -> list[AttemptError]:
        """Return the error of every failed attempt, the last one included, as the log has them."""
        run, identity = one.run.run_id, one.invocation.invocation_id
        found: list[AttemptError] = []
        for stored in await self._log.last_of_each([attempt_subject(run, identity, "*"), done_subject(run, identity)]):
            with suppress(msgspec.MsgspecError):
                if kind_of(stored.subject) == "try":
                    failed = decode(stored.body, Attempt)
                    found.append(_error(failed.attempt, failed.ended_at, failed.worker, failed.error))
                else:
                    last = decode(stored.body, Outcome)
                    if last.error is not None:
                        found.append(_error(last.attempts, last.ended_at, last.worker, last.error))
        return sorted(found, key=lambda e: e.attempt)

    # ------------------------------------------------------------ replay

    async def replay(self, request: web.Request) -> web.Response:
        """Answer ``POST /v1/dead/{id}/replay``: 202 with the new run once it is in the log.

        The id is a dead invocation's or a failed run's; the same ``Idempotency-Key`` is the same new run.
        """
        key = event_id(request.headers.get("Idempotency-Key"))
        held = self._gate.enter(request)
        try:
            wanted = await self._wanted(check_name(request.match_info["id"], "id"), tenant_of(request))
            route, function = await self._registered(wanted)
            await self._check_data(wanted)
            now = self._clock()
            deadline = deadline_of(route.route, None, now)
            quote, due = self._admitting.quote(route, function, wanted.source.payload.size, deadline, now)
            admitted = replay(wanted, key=key, route=route, function=function, now=now, quote=quote, due=due)
            [accepted] = await self._acceptance.append([admitted])
            if accepted.duplicate:
                await self._tell_old_run(wanted, accepted.first.run_id, now)
        finally:
            held.leave()
        answer = await self._promise(wanted, accepted)
        return as_json(answer, status=202, headers={"Location": f"/v1/runs/{answer.run_id}"})

    async def _wanted(self, wanted: str, tenant: str) -> Again:
        """Find what the id names, and what of it has to be repeated.

        Raises:
            NotFound: there is nothing of this id.
            Conflict: it did not fail, or the log does not hold it any more.
        """
        record, identity = await self._find(wanted, tenant)
        if record.state != "failed":
            state = "has not ended yet" if not record.ended else f"is {record.state}"
            raise Conflict(
                f"{_named(record, wanted)} {state}; only what failed can be replayed",
                hint=f"headrace run {record.run_id}",
            )
        if record.retracted_by is not None:
            raise Conflict(
                f"the event of {_named(record, wanted)} was retracted", hint=f"headrace run {record.retracted_by}"
            )
        first = await self._work(record, guard_subject(tenant, record.run_id))
        dead = first
        if identity != first.invocation_id:
            subjects = [of("*", tenant, record.run_id, identity) for of in (work_subject, job_subject)]
            dead = await self._work(record, *subjects)
        if first.function == RETRACTER:
            raise Conflict(
                f"the run {record.run_id} is a retraction", hint="Send its event again, with an id of its own."
            )
        return again(first, dead)

    async def _find(self, wanted: str, tenant: str) -> tuple[RunRecord, str]:
        """Return the run that an id means, and its invocation that was given up on."""
        try:
            record = await self._books.of(tenant).record(wanted)
        except NotFound:
            return await self._find_invocation(wanted, tenant)
        return record, record.dead_id or invocation_id(record.run_id, 0)

    async def _find_invocation(self, identity: str, tenant: str) -> tuple[RunRecord, str]:
        run: str | None = None
        with suppress(Unavailable):  # the log knows it too, only not as fast
            run = await self._reader.run_of_dead(identity)
        if run is None:
            stored = await self._log.last(done_subject("*", identity))
            if stored is None:
                await self._refuse_unended(identity, tenant)
            else:
                run = run_of(stored.subject)
        if run is None:
            raise _nothing(identity)
        try:
            record = await self._books.of(tenant).record(run)
        except NotFound as error:  # it is another tenant's: not even the id of its run is told
            raise _nothing(identity) from error
        stored = await self._log.last(done_subject(run, identity))
        if stored is not None and (outcome := decode(stored.body, Outcome)).state != "dead":
            raise Conflict(
                f"the invocation {identity} is {outcome.state}; only what failed can be replayed",
                hint=f"headrace run {run}",
            )
        return record, identity

    async def _refuse_unended(self, identity: str, tenant: str) -> None:
        for of in (work_subject, job_subject):
            stored = await self._log.last(of("*", tenant, "*", identity))
            if stored is not None:
                run = stored.subject.split(".")[4]
                raise Conflict(
                    f"the invocation {identity} has not ended yet; only what failed can be replayed",
                    hint=f"headrace run {run}",
                )

    async def _work(self, record: RunRecord, *subjects: str) -> Invocation:
        """Return the work on the first of these subjects that holds some."""
        for subject in subjects:
            stored = await self._log.last(subject)
            with suppress(msgspec.MsgspecError):
                if stored is not None:
                    return decode(stored.body, Invocation)
        raise _gone(record.run_id)

    async def _registered(self, wanted: Again) -> tuple[RouteRecord, FunctionRecord]:
        """Return the route and the function as they are now: asked of the server, for what was deployed this moment."""
        tenant = wanted.first.tenant
        route = await self._tables.routes.fetch(row_key(tenant, wanted.first.route))
        if route is None:
            raise Conflict(
                f"the route {wanted.first.route} is not registered any more",
                hint="Register it again: `headrace deploy FILE.py`.",
            )
        name = function_of(wanted, route)
        function = await self._tables.functions.fetch(row_key(tenant, name))
        if function is None:
            raise Conflict(
                f"the function {name} is not registered any more", hint="Register it again: `headrace deploy FILE.py`."
            )
        return route, function

    async def _check_data(self, wanted: Again) -> None:
        """Return if what the function is given can still be read.

        Raises:
            Conflict: it is not kept any more, in the log or in the blob store.
        """
        payload = wanted.source.payload
        try:
            if payload.blob is not None:
                await self._blobs.where(payload.blob)
            if payload.type == GATHER:
                gathered = decode(await check_out(payload, self._blobs), Gather)
                await self._log.at(gathered.outcomes)
        except (NotFound, Unavailable) as error:
            if self._log.link.connected:
                raise _gone(wanted.of.run_id) from error
            raise

    async def _tell_old_run(self, wanted: Again, run: str, now: float) -> None:
        """Make up for a unit that a power cut tore apart: the new run is there, and the old one knows nothing of it."""
        if await self._log.last(replay_subject(wanted.of.run_id)) is None:
            await self._log.append([told(wanted.of, run, now)])

    async def _promise(self, wanted: Again, accepted: Accepted) -> Replaying:
        made = reference(accepted.first, duplicate=accepted.duplicate)
        if accepted.duplicate:
            with suppress(Unavailable, NotFound):  # the promise stands all the same
                made = structs.replace(
                    made, state=(await self._books.of(accepted.first.tenant).record(made.run_id)).state
                )
        return Replaying(
            **structs.asdict(made),
            replay_of=ReplayView(run_id=wanted.of.run_id, invocation_id=wanted.of.invocation_id),
            from_=wanted.start,
        )


def _view(one: Dead, errors: list[AttemptError]) -> DeadView:
    invocation = one.invocation
    return DeadView(
        invocation_id=invocation.invocation_id,
        run_id=one.run.run_id,
        route=one.run.route,
        function=invocation.function,
        version=invocation.version,
        attempts=invocation.attempts,
        at=format_instant(invocation.ended_at or 0.0),
        error=invocation.error or ErrorInfo(kind="lost", message="nothing is known of its error"),
        errors=errors,
        replayed_as=one.run.replayed_as,
    )


def _error(attempt: int, at: float, worker: str, error: ErrorInfo) -> AttemptError:
    return AttemptError(attempt=attempt, at=format_instant(at), worker=worker, error=error)


def _flag(text: str, what: str) -> bool:
    if text.lower() not in (*_YES, *_NO):
        raise BadRequest(f"{what}: {ascii(text)[:40]} is not possible", hint="Use 1 or 0.")
    return text.lower() in _YES


def _nothing(wanted: str) -> NotFound:
    return NotFound(f"there is no run and no invocation {wanted}", hint="headrace dead lists what can be replayed.")


def _named(record: RunRecord, wanted: str) -> str:
    return f"the run {wanted}" if wanted == record.run_id else f"the run {record.run_id} of the invocation {wanted}"


def _gone(run: str) -> Conflict:
    return Conflict(
        f"what the run {run} was given is not kept any more: it has left the log or the blob store",
        hint="Send the event again, with an id of its own.",
    )
