"""Reading and canceling runs: from the read model where it is up to date, else from the log itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import get_args

import msgspec
from aiohttp import web
from msgspec import structs
from multidict import CIMultiDict

from functions.admission import guard_subject
from gateway.auth import tenant_of
from gateway.needs import Follow, Log, Reader
from headrace.clock import parse_instant
from headrace.errors import BadRequest, Conflict, NotFound, RunCanceled, RunFailed, RunRetracted, TooLarge, Unavailable
from headrace.model import FINAL, JobView, RunState, RunView
from headrace.names import check_name
from headrace.wire import Cancel, Outcome, Payload, decode, encode
from streams.blobs import Blobs
from streams.log import AlreadyThere, Record
from streams.record import Answered, InvocationRecord, RunRecord, answer_url, apply, fact_of, fold_run, view
from streams.stored import Stored
from streams.topology import cancel_subject, done_subject, replay_subject, run_subjects

LIMIT_MAX = 1000
LIMIT_DEFAULT = 100
CURSOR_CHARS_MAX = 512
REASON_CHARS_MAX = 500
RESULT_RETRY_S = 1
CATCH_UP_S_MAX = 1.0
_LOOK_AGAIN_S = 0.01
_SCAN_IDLE_S = 1.0

# What comes out of a function is shown by no browser as part of this site.
RESULT_HEADERS = {"Content-Security-Policy": "default-src 'none'; sandbox", "Cache-Control": "no-store"}

Folded = tuple[RunRecord, list[InvocationRecord]]


class RunBook:
    """Finds runs of one tenant, to whom those of others are not there.

    What this gateway has promised is found at once, however far the read model is behind.
    """

    def __init__(self, *, log: Log, follow: Follow, reader: Reader, tenant: str) -> None:
        self._log = log
        self._follow = follow
        self._reader = reader
        self._tenant = tenant

    async def read(self, run_id: str, *, seq: int | None = None) -> RunView:
        """Return a run as it is now: what has ended from the read model, what is open from the log.

        Only a run of more than 1,000 facts is taken from the read model while it is open, if that is at least as far as
        ``seq`` (by default: this gateway's last append).

        Raises:
            NotFound: there is no such run.
            Unavailable: neither the read model nor the log can tell.
        """
        check_name(run_id, "run id")
        known: RunView | None = None
        fresh = False
        with suppress(Unavailable):
            # The position is asked for first: what is read after it is at least as new.
            fresh = await self._reader.position() >= (self._log.last_seq if seq is None else seq)
            known = await self._reader.run(run_id)
        if known is None or known.state not in FINAL:
            folded = await self._fold(run_id, enough=known is not None and fresh)
            if folded is not None:
                known = view(*folded)
        elif known.thread or known.state == "failed":
            record = await self.record(run_id, seq=seq)
            known = structs.replace(
                known,
                superseded_by=record.superseded_by,
                retracted_by=record.retracted_by,
                replayed_as=record.replayed_as,
                error=record.error,
            )
        if known is None or known.tenant != self._tenant:
            raise _unknown(run_id)
        return known

    async def read_end(self, run_id: str, seq: int) -> RunView:
        """Return a run of which the fact ``seq`` was heard just now: the log has it, the read model hardly ever."""
        try:
            folded = fold_run(await self._log.last_of_each(run_subjects(run_id)))
        except TooLarge:
            folded = None
        return view(*folded) if folded is not None else await self.read(run_id, seq=seq)

    async def record(self, run_id: str, *, seq: int | None = None) -> RunRecord:
        """Return what is known of a run without its invocations; raises what ``read`` raises."""
        check_name(run_id, "run id")
        known: RunRecord | None = None
        fresh = False
        with suppress(Unavailable):
            fresh = await self._reader.position() >= (self._log.last_seq if seq is None else seq)
            known = await self._reader.record(run_id)
        if known is None or not known.ended:
            folded = await self._fold(run_id, enough=known is not None and fresh)
            if folded is not None:
                known = folded[0]
        elif known.thread or known.state == "failed":
            # What has ended can still be retracted, by any gateway, and from then on nobody must be told its answer;
            # and what has failed can be replayed.
            for stored in await self._log.last_of_each([cancel_subject(run_id, "*"), replay_subject(run_id)]):
                fact = fact_of(stored)
                known = known if fact is None else apply(known, fact, stored)
        if known is None or known.tenant != self._tenant:
            raise _unknown(run_id)
        return known

    async def behind(self) -> bool:
        """Wait a moment for the read model to have what this gateway had appended before; say whether it still has not.

        Raises:
            Unavailable: it is away.
        """
        promised, give_up_at = self._log.last_seq, time.monotonic() + CATCH_UP_S_MAX
        while await self._reader.position() < promised:
            if time.monotonic() >= give_up_at:
                return True
            await asyncio.sleep(_LOOK_AGAIN_S)
        return False

    async def answer(self, record: RunRecord, one: Answered | None = None) -> Payload | None:
        """Return the answer of a run, or None while there is none; ``one``: this one of several."""
        identity, explicit = (record.answer_id, record.explicit) if one is None else (one.invocation_id, one.explicit)
        if identity is None:
            return None
        stored = await self._log.last(done_subject(record.run_id, identity))
        if stored is None:
            raise Unavailable(f"the log does not hold the answer of {record.run_id} (yet)", hint="Try again.")
        outcome = decode(stored.body, Outcome)
        return outcome.answer if explicit else outcome.result

    async def _fold(self, run_id: str, *, enough: bool) -> Folded | None:
        """Fold a run from the log; None if there is none, or if it is too much and what is known is ``enough``.

        One of more than 1,000 facts is read through, which takes a moment.
        """
        try:
            return fold_run(await self._log.last_of_each(run_subjects(run_id)))
        except TooLarge:
            return None if enough else fold_run(await self._read_through(run_id))
        except Unavailable:
            if enough:
                return None
            raise

    async def _read_through(self, run_id: str) -> list[Stored]:
        first = await self._log.last(guard_subject(self._tenant, run_id))
        if first is None:
            return []
        end = await self._log.end_seq()
        facts: list[Stored] = []
        batches = self._follow(run_subjects(run_id), after=first.seq - 1, idle_s=_SCAN_IDLE_S)
        async with aclosing(batches):
            async for batch in batches:
                facts += batch
                if not batch or batch[-1].seq >= end:
                    break
        return facts


class RunBooks:
    """Gives each tenant his own ``RunBook``."""

    def __init__(self, *, log: Log, follow: Follow, reader: Reader) -> None:
        self._log = log
        self._follow = follow
        self._reader = reader
        self._books: dict[str, RunBook] = {}

    def of(self, tenant: str) -> RunBook:
        """Return what finds the runs of this tenant."""
        book = self._books.get(tenant)
        if book is None:
            book = RunBook(log=self._log, follow=self._follow, reader=self._reader, tenant=tenant)
            self._books[tenant] = book
        return book


class Runs:
    """The endpoints under ``/v1/runs``."""

    def __init__(
        self,
        *,
        books: RunBooks,
        log: Log,
        reader: Reader,
        blobs: Blobs,
        why_waits: Callable[[str], str],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Use what they are read from; ``why_waits`` tells why a job waits for a site, empty where it is taken."""
        self._why_waits = why_waits
        self._books = books
        self._log = log
        self._reader = reader
        self._blobs = blobs
        self._clock = clock

    async def one(self, request: web.Request) -> web.Response:
        """Answer ``GET /v1/runs/{run_id}``."""
        found = await self._books.of(tenant_of(request)).read(request.match_info["run_id"])
        return as_json(structs.replace(found, jobs=[self._told(job) for job in found.jobs]))

    def _told(self, job: JobView) -> JobView:
        return job if job.state != "new" else structs.replace(job, why=self._why_waits(job.site) or job.why)

    async def page(self, request: web.Request) -> web.Response:
        """Answer ``GET /v1/runs``."""
        query = request.query
        state = query.get("state")
        if state is not None and state not in get_args(RunState):
            raise BadRequest(
                f"state: {ascii(state)[:40]} is no state of a run", hint=f"Use {', '.join(get_args(RunState))}."
            )
        route = query.get("route")
        since = query.get("since")
        tenant = tenant_of(request)
        behind = await self._books.of(tenant).behind()
        found = await self._reader.page(
            tenant,
            state=state,
            route=None if route is None else check_name(route, "route name"),
            since=None if since is None else parse_instant(since, "since"),
            limit=limit_of(query.get("limit")),
            cursor=cursor_of(query.get("cursor")),
        )
        return as_json(structs.replace(found, behind=behind))

    async def result(self, request: web.Request) -> web.StreamResponse:
        """Answer ``GET /v1/runs/{run_id}/result``: the answer, 202 while there is none, 410 if none will come.

        A retracted answer is 410 too; a superseded one comes with a ``Link`` to the run that took its place. Of several
        answers it is the best one, or with ``level`` the one of that fidelity; links lead from each to the others.
        """
        book = self._books.of(tenant_of(request))
        record = await book.record(request.match_info["run_id"])
        if record.retracted_by is not None:
            raise RunRetracted(
                f"the run {record.run_id} was retracted by the run {record.retracted_by}",
                hint=f"headrace run {record.retracted_by}",
                kind="retracted",
                run_id=record.run_id,
            )
        one = answer_of_level(record, request.query.get("level"))
        answer = await book.answer(record, one)
        if answer is not None:
            headers = CIMultiDict({**RESULT_HEADERS, "Content-Type": answer.type})
            if record.superseded_by is not None:
                headers.add("Link", f'</v1/runs/{record.superseded_by}>; rel="successor-version"')
            headers.extend(fidelity_headers(record, one))
            if answer.blob is not None:
                place = await self._blobs.where(answer.blob)
                if isinstance(place, Path):
                    return web.FileResponse(place, headers=headers)
                return web.Response(body=await self._blobs.get(answer.blob), headers=headers)
            return web.Response(body=answer.body, headers=headers)
        if record.state in ("failed", "canceled"):
            kind = RunCanceled if record.state == "canceled" else RunFailed
            why = f": {record.error.kind}: {record.error.message}" if record.error else ""
            raise kind(f"the run {record.run_id} {_ended(record.state)}{why}", hint=f"headrace run {record.run_id}")
        return web.json_response(
            {"run_id": record.run_id, "state": record.state}, status=202, headers={"Retry-After": str(RESULT_RETRY_S)}
        )

    async def cancel(self, request: web.Request) -> web.Response:
        """Answer ``POST /v1/runs/{run_id}/cancel``. Twice is one wish; to cancel what has ended is a conflict."""
        run_id = request.match_info["run_id"]
        record = await self._books.of(tenant_of(request)).record(run_id)
        if record.ended and record.state != "canceled":
            raise Conflict(f"the run {run_id} has {record.state} already", hint=f"headrace run {run_id}")
        if not record.ended:
            subject = cancel_subject(run_id)
            wish = Cancel(run_id=run_id, at=self._clock(), reason=_reason(request))
            with suppress(AlreadyThere):  # somebody else was quicker, to the same end
                await self._log.append([Record(subject, encode(wish), subject)])
        return web.json_response({"run_id": run_id, "state": "canceled"}, status=202)


def as_json(value: object, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """Return a struct as a JSON response."""
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json", headers=headers
    )


def _ended(state: RunState) -> str:
    return "was canceled" if state == "canceled" else state


def _reason(request: web.Request) -> str:
    return request.query.get("reason", "")[:REASON_CHARS_MAX]


def answer_of_level(record: RunRecord, text: str | None) -> Answered | None:
    """Return the answer of a run that has this fidelity, or None where none is asked for.

    Raises:
        NotFound: there is none of this level.
    """
    if text is None:
        return None
    for one in record.answers:
        if str(one.fidelity.level) == text:
            return one
    known = ", ".join(str(one.fidelity.level) for one in record.answers) or "none yet"
    raise NotFound(
        f"the run {record.run_id} has no answer of the level {ascii(text)[:20]}",
        hint=f"Levels of its answers: {known}. Without a level the best answer is given.",
    )


def fidelity_headers(record: RunRecord, one: Answered | None) -> CIMultiDict[str]:
    """Return what is said of one of several answers (None: the best) beside it: its worth, and where the others are."""
    headers: CIMultiDict[str] = CIMultiDict()
    if not record.answers:
        return headers
    place = record.answers.index(one) if one is not None else len(record.answers) - 1
    worth = record.answers[place].fidelity
    headers["Headrace-Fidelity"] = f"{worth.level}; function={worth.function}; of={worth.of}"
    if place > 0:
        headers.add("Link", f'<{answer_url(record.run_id, record.answers[place - 1])}>; rel="predecessor-version"')
    if place + 1 < len(record.answers):
        headers.add("Link", f'<{answer_url(record.run_id, record.answers[place + 1])}>; rel="successor-version"')
    if one is not None:
        headers.add("Link", f'</v1/runs/{record.run_id}/result>; rel="latest-version"')
    if record.improving:  # a better one is being computed: here it is told
        headers.add("Link", f'</v1/runs/{record.run_id}/events>; rel="monitor"')
    return headers


def limit_of(text: str | None) -> int:
    """Return how many rows a page may have.

    Raises:
        BadRequest: it is not a number from 1 to 1,000.
    """
    if text is None:
        return LIMIT_DEFAULT
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= LIMIT_MAX:
        raise BadRequest(f"limit: {ascii(text)[:40]} is not possible", hint=f"Use 1 to {LIMIT_MAX}.")
    return int(text)


def cursor_of(text: str | None) -> str | None:
    """Return a cursor, which only the read model understands.

    Raises:
        BadRequest: it is too long to be one.
    """
    if text is not None and len(text) > CURSOR_CHARS_MAX:
        raise BadRequest("cursor: this was not given out here", hint="Use `next` of the page before.")
    return text


def _unknown(run_id: str) -> NotFound:
    return NotFound(
        f"there is no run {run_id}", hint="Check the id; a run is kept as long as the log, 7 days by default."
    )
