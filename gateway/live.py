"""Server-sent events: what happens in one run, or in all, as it is written to the log.

``id:`` is the sequence in the log, so ``Last-Event-ID`` resumes without a gap, whichever gateway answers. A fact that
makes several events carries its id on the last of them: a client that loses the connection in between gets the fact
again rather than half of it. A client that does not read holds up nobody but itself, and is dropped after a while.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

import msgspec
from aiohttp import web

from gateway.auth import Caller, Tokens, caller_of, tenant_of
from gateway.limits import GatewayLimits
from gateway.metrics import Metrics
from gateway.needs import Follow, Log
from gateway.owners import Owners
from gateway.problems import Busy
from gateway.runs import RunBook, RunBooks
from gateway.shares import Shares
from gateway.sites import Sites
from gateway.story import Teller, run_event, text_of
from headrace.errors import BadRequest, HeadraceError
from headrace.model import FINAL
from headrace.names import check_name
from streams.record import RunRecord
from streams.topology import (
    attempt_subject,
    cancel_subject,
    done_subject,
    end_subject,
    job_subject,
    note_subject,
    report_subject,
    run_subjects,
    start_subject,
    submit_subject,
    work_subject,
)

_log = logging.getLogger(__name__)

SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
}
KEEP_ALIVE = b": here\n\n"
RECONNECT_MS = 1000
SEND_BUFFER_BYTES = 256 * 1024
CLOSE_S = 1.0


class Live:
    """``GET /v1/runs/{run_id}/events`` and ``GET /v1/stream``."""

    def __init__(
        self,
        *,
        log: Log,
        follow: Follow,
        books: RunBooks,
        sites: Sites,
        metrics: Metrics,
        tokens: Tokens,
        limits: GatewayLimits,
    ) -> None:
        self._log = log
        self._follow = follow
        self._books = books
        self._sites = sites
        self._metrics = metrics
        self._owners = Owners(log)
        self._places = Shares(limits.streams_max, tokens.shared, self._full)
        self._tokens = tokens
        self._limits = limits
        self._open: dict[asyncio.Task[Any], Caller] = {}
        self._ending: set[asyncio.Task[Any]] = set()
        tokens.listen(self._end_strangers)

    async def run(self, request: web.Request) -> web.StreamResponse:
        """Answer ``GET /v1/runs/{run_id}/events``: from the beginning, or after ``Last-Event-ID``, to the run's end."""
        run_id = check_name(request.match_info["run_id"], "run id")
        book = self._books.of(tenant_of(request))
        record = await book.record(run_id)
        after = last_event_id(request)
        if after is None:
            after = record.first_seq - 1
        elif record.ended and after >= record.seq:
            # Nothing will ever follow. Telling the end again lets a client that asks for more see that it is over.
            return await self._serve(request, self._again(record, after), after)
        subjects = [*run_subjects(run_id), note_subject(run_id, "*", "*"), report_subject(run_id, "*", "*")]
        return await self._serve(request, self._until_end(book, subjects, after), after)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Answer ``GET /v1/stream``: all runs of the caller, from now on or after ``Last-Event-ID``."""
        after = last_event_id(request)
        end = await self._log.end_seq()
        # An id from a log that was replaced by an emptier one must not wait for the day that log has grown to it.
        after = end if after is None else min(after, end)
        return await self._serve(request, merged(self._site_texts(), self._texts(tenant_of(request), after)), after)

    def _full(self) -> Busy:
        return Busy(f"{self._limits.streams_max} clients read events already", hint="Close some, or come back later.")

    async def close(self) -> None:
        """End all streams in good order; their clients come back to whoever serves next."""
        for task in list(self._open):
            self._end(task)

    def _end_strangers(self) -> None:
        """End the streams of those whose token is good no longer."""
        for task, caller in list(self._open.items()):
            if not self._tokens.is_valid(caller):
                self._end(task)

    def _end(self, task: asyncio.Task[Any]) -> None:
        if task not in self._ending:
            self._ending.add(task)
            task.cancel()

    async def _texts(self, tenant: str, after: int) -> AsyncGenerator[bytes, None]:
        teller = Teller(self._books.of(tenant))
        async with aclosing(self._follow(all_subjects(tenant), after=after)) as batches:
            async for batch in batches:
                mine = [stored for stored in batch if await self._owners.of(stored) == tenant]
                parts = [text_of(stored.seq, await teller.tell(stored)) for stored in mine]
                yield b"".join(parts) or KEEP_ALIVE

    async def _site_texts(self) -> AsyncGenerator[bytes, None]:
        async for views in self._sites.news():
            # They stand in no log, so they carry no id: who comes back is told how all sites are.
            yield b"".join(b"event: site\ndata: %s\n\n" % msgspec.json.encode(view) for view in views)

    async def _until_end(self, book: RunBook, subjects: list[str], after: int) -> AsyncGenerator[bytes, None]:
        teller = Teller(book)
        async with aclosing(self._follow(subjects, after=after)) as batches:
            async for batch in batches:
                parts: list[bytes] = []
                for stored in batch:
                    told = await teller.tell(stored)
                    parts.append(text_of(stored.seq, told))
                    if any(name == "run" and data.get("state") in FINAL for name, data in told):
                        yield b"".join(parts)
                        return
                yield b"".join(parts) or KEEP_ALIVE

    async def _again(self, record: RunRecord, after: int) -> AsyncGenerator[bytes, None]:
        yield text_of(after, [run_event(record)])

    async def _serve(self, request: web.Request, texts: AsyncGenerator[bytes, None], after: int) -> web.StreamResponse:
        task, caller = asyncio.current_task(), caller_of(request)
        assert task is not None  # noqa: S101 - a handler always runs in a task
        self._places.take(caller.tenant)
        self._open[task] = caller
        self._metrics.streams.set(len(self._open))
        response = web.StreamResponse(headers=SSE_HEADERS)
        try:
            _bound_buffer(request)
            await response.prepare(request)
            await response.write(b"retry: %d\nid: %d\n\n" % (RECONNECT_MS, after))
            async with aclosing(texts):
                async for text in texts:
                    async with asyncio.timeout(self._limits.stream_send_seconds_max):
                        await response.write(text)
            await response.write_eof()
        except TimeoutError:
            self._metrics.streams_dropped.inc()
            if request.transport is not None:
                request.transport.abort()
        except asyncio.CancelledError:
            if task not in self._ending:
                raise
            task.uncancel()
            with suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(CLOSE_S):
                    await response.write_eof()
        except ConnectionError:
            pass  # the client has gone, which is how most streams end
        except HeadraceError as error:
            _log.warning("a stream of events ends: %s", error)  # headers are sent; the client comes back by itself
        finally:
            self._open.pop(task, None)
            self._places.give_back(caller.tenant)
            self._ending.discard(task)
            self._metrics.streams.set(len(self._open))
        return response


async def merged(*sources: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Yield what comes of several sources that never end, as it comes; closes them all in the end."""
    waiting = {asyncio.ensure_future(anext(source)): source for source in sources}
    try:
        while True:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                source = waiting.pop(each)
                text = each.result()
                waiting[asyncio.ensure_future(anext(source))] = source
                yield text
    finally:
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for source in sources:
            await source.aclose()


def all_subjects(tenant: str) -> list[str]:
    """Return the subjects of all that is told of a tenant's runs; only those of work leave out those of others."""
    return [
        work_subject("*", tenant, "*", "*"),
        job_subject("*", tenant, "*", "*"),
        submit_subject("*", "*", "*", "*"),
        done_subject("*", "*"),
        end_subject("*"),
        start_subject("*", "*", "*"),
        attempt_subject("*", "*", "*"),
        note_subject("*", "*", "*"),
        report_subject("*", "*", "*"),
        cancel_subject("*", "*"),
    ]


def last_event_id(request: web.Request) -> int | None:
    """Return the sequence after which a client wants to go on, None for none.

    Raises:
        BadRequest: the header is no sequence.
    """
    text = request.headers.get("Last-Event-ID", "").strip()
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise BadRequest(f"Last-Event-ID: {ascii(text)[:40]} is not one of ours", hint="Send the id of the last event.")
    return int(text)


def _bound_buffer(request: web.Request) -> None:
    """Keep the kernel from taking megabytes for a client that does not read."""
    transport = request.transport
    found = None if transport is None else transport.get_extra_info("socket")
    if found is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
