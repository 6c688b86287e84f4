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

from aiohttp import web

from gateway.limits import GatewayLimits
from gateway.metrics import Metrics
from gateway.needs import Follow, Log
from gateway.problems import Busy
from gateway.runs import RunBook
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
    note_subject,
    run_subjects,
    start_subject,
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
        self, *, log: Log, follow: Follow, book: RunBook, metrics: Metrics, tenant: str, limits: GatewayLimits
    ) -> None:
        self._log = log
        self._follow = follow
        self._book = book
        self._metrics = metrics
        self._tenant = tenant
        self._limits = limits
        self._open: set[asyncio.Task[Any]] = set()
        self._closing = False

    async def run(self, request: web.Request) -> web.StreamResponse:
        """Answer ``GET /v1/runs/{run_id}/events``: from the beginning, or after ``Last-Event-ID``, to the run's end."""
        run_id = check_name(request.match_info["run_id"], "run id")
        record = await self._book.record(run_id)
        after = last_event_id(request)
        if after is None:
            after = record.first_seq - 1
        elif record.ended and after >= record.seq:
            # Nothing will ever follow. Telling the end again lets a client that asks for more see that it is over.
            return await self._serve(request, self._again(record, after), after)
        subjects = [*run_subjects(run_id), note_subject(run_id, "*", "*")]
        return await self._serve(request, self._until_end(subjects, after), after)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Answer ``GET /v1/stream``: all runs, from now on or after ``Last-Event-ID``."""
        after = last_event_id(request)
        end = await self._log.end_seq()
        # An id from a log that was replaced by an emptier one must not wait for the day that log has grown to it.
        after = end if after is None else min(after, end)
        return await self._serve(request, self._texts(all_subjects(self._tenant), after), after)

    async def close(self) -> None:
        """End all streams in good order; their clients come back to whoever serves next."""
        self._closing = True
        for task in list(self._open):
            task.cancel()

    async def _texts(self, subjects: list[str], after: int) -> AsyncGenerator[bytes, None]:
        teller = Teller(self._book)
        async with aclosing(self._follow(subjects, after=after)) as batches:
            async for batch in batches:
                parts = [text_of(stored.seq, await teller.tell(stored)) for stored in batch]
                yield b"".join(parts) or KEEP_ALIVE

    async def _until_end(self, subjects: list[str], after: int) -> AsyncGenerator[bytes, None]:
        teller = Teller(self._book)
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
        if len(self._open) >= self._limits.streams_max:
            raise Busy(
                f"{self._limits.streams_max} clients read events already", hint="Close some, or come back later."
            )
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a handler always runs in a task
        self._open.add(task)
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
            if not self._closing:
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
            self._open.discard(task)
            self._metrics.streams.set(len(self._open))
        return response


def all_subjects(tenant: str) -> list[str]:
    """Return the subjects of all that is told of a tenant's runs."""
    return [
        work_subject("*", tenant, "*", "*"),
        done_subject("*", "*"),
        end_subject("*"),
        start_subject("*", "*", "*"),
        attempt_subject("*", "*", "*"),
        note_subject("*", "*", "*"),
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
