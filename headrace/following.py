"""What happens on the platform, as it happens; and waiting for an answer without asking all the time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec

from headrace.errors import HeadraceError, PlatformUnreachable, RunCanceled, RunFailed, RunRetracted
from headrace.model import FINAL, RunView, StreamEvent
from headrace.names import check_name
from headrace.sse import messages
from headrace.transport import Answer, Transport, delays, problem
from headrace.wire import BYTES, Payload

T = TypeVar("T")

_LOOK_AGAIN_S = 5.0


def read(answer: Answer, kind: type[T]) -> T:
    """Return what the platform answered.

    Raises:
        PlatformUnreachable: whoever answered is no Headrace.
    """
    try:
        return msgspec.json.decode(answer.body, type=kind)
    except msgspec.MsgspecError as error:
        raise PlatformUnreachable(
            f"the server answered {answer.status} with something that is not of Headrace: {error}",
            hint="Check that the URL is the one of a Headrace gateway, of this version or a newer one.",
        ) from error


async def events(
    http: Transport, path: str, after: int | None = None, *, on_open: Callable[[], None] | None = None
) -> AsyncGenerator[StreamEvent, None]:
    """Yield the server-sent events of a path, and go on after the last one when a connection is lost.

    Args:
        http: the platform.
        path: which stream.
        after: begin after the event with this ``seq``.
        on_open: called when a connection stands, and nothing that happens from now on will be missed.

    Raises:
        PlatformUnreachable: no connection came about for as long as the transport is patient.
        HeadraceError: the platform refused.
    """
    last = "" if after is None else str(after)
    waits = delays()
    seen_at = time.monotonic()
    while True:
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last} if last else {})}
        stands = False
        try:
            async with http.stream(path, headers) as chunks:
                stands = True
                async for message in messages(chunks):
                    last, waits = message.id or last, delays()
                    if message.event:
                        data = msgspec.json.decode(message.data, type=dict[str, Any])
                        yield StreamEvent(seq=int(last or 0), kind=message.event, data=data)
                    elif on_open is not None:
                        on_open()
        except HeadraceError as error:
            if not error.transient or (not stands and time.monotonic() - seen_at > http.patience_s):
                raise
        if stands:
            seen_at = time.monotonic()
        await asyncio.sleep(next(waits))


def is_end(event: StreamEvent) -> bool:
    """Return whether this event tells the end of a run."""
    return event.kind == "run" and event.data.get("state") in FINAL


def has_answer(event: StreamEvent) -> bool:
    """Return whether this event tells that a run has its answer, or will never have one."""
    return is_end(event) or (event.kind == "run" and event.data.get("answered_at") is not None)


async def view(http: Transport, run_id: str) -> RunView:
    """Return a run as it is now.

    Raises:
        NotFound: there is no run of this id.
    """
    return read(await http.ask("GET", f"/v1/runs/{check_name(run_id, 'run id')}"), RunView)


async def answer_now(http: Transport, run_id: str, level: int | None = None) -> Payload | None:
    """Return the answer of a run, or None while there is none; of several the best, or with ``level`` that one.

    Raises:
        RunFailed: the run ended without one.
        NotFound: there is no run of this id, or it has no answer of this level.
    """
    wanted = "" if level is None else f"?level={level:d}"
    found = await http.request("GET", f"/v1/runs/{check_name(run_id, 'run id')}/result{wanted}")
    if found.status == 202:
        return None
    if found.status == 410:
        told = problem(found)
        if isinstance(told, RunRetracted):  # how the run ended does not matter then
            told.kind, told.run_id = "retracted", run_id
            raise told
        raise failure(await _ended(http, run_id))
    if found.status >= 400:
        raise problem(found)
    return Payload(type=found.type or BYTES, body=found.body, size=len(found.body))


async def answer(http: Transport, run_id: str, timeout: float | None = None) -> Payload:
    """Wait for the answer of a run; raises what ``answer_now`` raises, and TimeoutError."""
    found = await answer_now(http, run_id)  # one look at least, however short the time
    if found is not None:
        return found
    try:
        async with asyncio.timeout(timeout):
            return await _answer_after_news(http, run_id)
    except TimeoutError as error:
        raise TimeoutError(f"the run {run_id} has no answer after {timeout:g} s; it goes on") from error


async def _answer_after_news(http: Transport, run_id: str) -> Payload:
    """Look when the run's stream says that there is an answer, and now and then: a silent stream proves nothing."""
    news = asyncio.Event()
    watcher = asyncio.create_task(_watch(http, run_id, news))
    waits = delays()
    try:
        while True:
            if watcher.done():  # it has told all it ever will, which may not be readable yet
                await asyncio.sleep(next(waits))
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_AGAIN_S):
                        await news.wait()
                news.clear()
            found = await answer_now(http, run_id)
            if found is not None:
                return found
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)


async def _watch(http: Transport, run_id: str, news: asyncio.Event) -> None:
    try:
        async with aclosing(events(http, f"/v1/runs/{run_id}/events")) as told:
            async for event in told:
                if has_answer(event):
                    news.set()
                if is_end(event):
                    return
    except HeadraceError:
        return  # the answer itself is asked for all the same, and tells what is wrong
    finally:
        news.set()


async def _ended(http: Transport, run_id: str) -> RunView:
    """Return a run that is known to have ended, as soon as its view says so too."""
    waits = delays()
    while True:
        found = await view(http, run_id)
        if found.state in FINAL:
            return found
        await asyncio.sleep(next(waits))


def failure(ended: RunView) -> RunFailed:
    """Return the error of a run that ended without an answer; its traceback is shown beneath the caller's own."""
    kind = RunCanceled if ended.state == "canceled" else RunFailed
    says = "was canceled" if ended.state == "canceled" else "failed"
    error = ended.error
    if error is None:
        return kind(f"the run {ended.run_id} on {ended.route} {says}", run_id=ended.run_id)
    made = kind(
        f"the run {ended.run_id} on {ended.route} {says}: {error.message}",
        hint=_HINTS.get(error.kind, ""),
        kind=error.kind,
        reason=error.message,
        traceback=error.traceback,
        run_id=ended.run_id,
    )
    if error.traceback:
        made.add_note(f"On the worker:\n{error.traceback.rstrip()}")
    return made


_HINTS = {
    "timeout": 'Give the function more time, as @function(timeout="10m"), or less to do.',
    "lost": "Look for what ends the process: a signal, an exit, more memory than there is.",
    "load": "Mend the function's code and deploy it again.",
    "deadline": "Give the route a later deadline, or let it go on when it is late.",
}
