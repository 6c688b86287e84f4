"""The platform from Python, as coroutines: ``AsyncClient`` and its ``AsyncRun``. ``headrace.sync`` has the plain form."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
import uuid
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from headrace.address import Address, find
from headrace.clock import format_instant, parse_deadline
from headrace.context import to_payload
from headrace.errors import BadRequest, HeadraceError, NotFound, PlatformUnreachable, RunCanceled, RunFailed
from headrace.model import (
    FINAL,
    Code,
    Event,
    EventFilter,
    FunctionOptions,
    FunctionView,
    Quote,
    Route,
    RouteView,
    RunPage,
    RunRef,
    RunState,
    RunView,
    StreamEvent,
)
from headrace.names import check_name
from headrace.packing import pack, pack_file
from headrace.sdk import declaration, function_name
from headrace.sse import messages
from headrace.transport import Answer, Transport, delays, problem
from headrace.wire import BYTES, JSON, Payload

T = TypeVar("T")

PATIENCE_S = 10.0
PAGE_RUNS_MAX = 1000
_DOOR_WAIT_S_MAX = 30.0  # how long one request is held at the gateway; longer waits go on from here
_LOOK_AGAIN_S_MAX = 5.0
_CHUNK_BYTES = 1024 * 1024

Deadline = str | float | datetime


class AsyncRun:
    """One run on the platform. ``run_id`` names it everywhere; ``duplicate`` says that it was there already."""

    def __init__(
        self, client: AsyncClient, run_id: str, *, ref: RunRef | None = None, seen: RunView | None = None
    ) -> None:
        self.run_id = run_id
        self.route = ref.route if ref else seen.route if seen else ""
        self.duplicate = ref.duplicate if ref else False
        self.deadline = ref.deadline if ref else seen.deadline if seen else None
        self.quote = ref.quote if ref else seen.quote if seen else Quote()
        self.ref = ref
        self._client = client
        self._seen = seen

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.run_id} on {self.route or '?'}>"

    async def view(self) -> RunView:
        """Return the run as it is now. What has ended stays as it is and is not asked for again."""
        if self._seen is None or self._seen.state not in FINAL:
            self._seen = await self._client.view(self.run_id)
        return self._seen

    async def state(self) -> RunState:
        """Return the state: accepted, running, succeeded, failed or canceled."""
        return (await self.view()).state

    async def result(self, timeout: float | None = None) -> Any:
        """Wait for the answer and return it: decoded JSON, text, or bytes, as its content type says.

        Args:
            timeout: the longest wait in seconds; None waits for as long as it takes.

        Raises:
            RunFailed: the run ended without an answer; ``kind`` and ``traceback`` say why.
            RunCanceled: somebody canceled it.
            TimeoutError: there is no answer yet. The run goes on.
        """
        return value_of(await self.payload(timeout))

    async def payload(self, timeout: float | None = None) -> Payload:
        """Wait for the answer and return its bytes with their content type; raises what ``result`` raises."""
        return await self._client.wait_for_answer(self.run_id, timeout)

    async def follow(self, after: int | None = None) -> AsyncIterator[StreamEvent]:
        """Yield what happens in the run, from its acceptance to its end, across lost connections without a gap.

        Args:
            after: go on after this event (its ``seq``) instead of beginning with the first.
        """
        async with aclosing(self._client.events(f"/v1/runs/{self.run_id}/events", after)) as found:
            async for event in found:
                yield event
                if event.kind == "run" and event.data.get("state") in FINAL:
                    return

    async def cancel(self) -> None:
        """Stop the run: what waits is dropped, what runs is stopped. Nothing happens if it has ended."""
        await self._client.cancel(self.run_id)


class AsyncClient:
    """A platform, from within one event loop. Close it, or use it as an async context manager.

    Calls are repeated after lost connections and while the platform is busy, for ``patience_s`` seconds. A repeat never
    runs twice, because what starts a run carries an id made here.

    Args:
        url: the gateway; else ``HEADRACE_URL``, else ``./.headrace/url``.
        token: the bearer token; else ``HEADRACE_TOKEN``, else ``./.headrace/token``.
        patience_s: how long a call goes on trying.

    Raises:
        PlatformUnreachable: no URL is given anywhere.
        Unauthorized: no token is given for the URL.
    """

    def __init__(self, url: str | None = None, token: str | None = None, *, patience_s: float = PATIENCE_S) -> None:
        self.address: Address = find(url, token)
        self._http = Transport(self.address, patience_s=patience_s)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address.url}>"

    async def close(self) -> None:
        """Close all connections."""
        await self._http.close()

    # ------------------------------------------------------------ functions and routes

    async def register(self, fn: Callable[..., Any], *, name: str | None = None) -> FunctionView:
        """Register a function by value, with the options and the routes that its decorators declare.

        Args:
            fn: a function; a lambda needs a ``name``.
            name: the registered name, if it shall differ from the declared one.

        Raises:
            BadRequest: the code cannot travel, or an option is not possible.
        """
        declared = declaration(fn)
        registered = check_name(name, "function name") if name else function_name(fn)
        options = declared.options if declared else None
        view = await self.put_function(registered, pack(fn), options or FunctionOptions(), _doc(fn))
        for route_name, route in (declared.routes if declared else {}).items():
            await self.put_route(route_name, msgspec.structs.replace(route, function=registered))
        return view

    async def deploy(self, path: str | Path) -> list[FunctionView]:
        """Load a user's file in this process, and register its declared functions and their routes.

        Raises:
            LoadError: the file raised when it was loaded.
            BadRequest: it declares nothing, or its code cannot travel.
        """
        packed = pack_file(path)
        views = [
            await self.put_function(each.declaration.name, each.code, each.declaration.options, each.doc)
            for each in packed
        ]
        for each in packed:  # after all functions: a run that starts at once finds its follow-ups registered
            for route_name, route in each.declaration.routes.items():
                await self.put_route(route_name, route)
        return views

    async def put_function(
        self, name: str, code: Code, options: FunctionOptions | None = None, doc: str = ""
    ) -> FunctionView:
        """Register code that is already packed."""
        body = msgspec.json.encode({"code": code, "options": options or FunctionOptions(), "doc": doc})
        return _read(await self._json("PUT", f"/v1/functions/{check_name(name, 'function name')}", body), FunctionView)

    async def route(
        self,
        name: str,
        *,
        function: str | Callable[..., Any],
        type: str | None = None,  # noqa: A002 - the CloudEvents attribute is called so
        source: str | None = None,
        subject: str | None = None,
        deadline: str | None = None,
        on_late: Literal["continue", "cancel"] = "continue",
        max_in_flight: int | None = None,
    ) -> RouteView:
        """Register a route to a registered function, with the meaning that ``headrace.on`` gives to each word.

        Raises:
            NotFound: the function is not registered.
            BadRequest: a part of the route is not possible.
        """
        rule = EventFilter(type=type, source=source, subject=subject) if type or source or subject else None
        return await self.put_route(
            name,
            Route(
                function=function_name(function),
                filter=rule,
                deadline=deadline,
                on_late=on_late,
                max_in_flight=max_in_flight,
            ),
        )

    async def put_route(self, name: str, route: Route) -> RouteView:
        """Register a route that is already put together."""
        path = f"/v1/routes/{check_name(name, 'route name')}"
        return _read(await self._json("PUT", path, msgspec.json.encode(route)), RouteView)

    async def functions(self) -> list[FunctionView]:
        """Return all registered functions."""
        return await self._list("/v1/functions", "functions", FunctionView)

    async def routes(self) -> list[RouteView]:
        """Return all registered routes."""
        return await self._list("/v1/routes", "routes", RouteView)

    async def sites(self) -> list[SiteView]:
        """Return all sites that the platform knows."""
        return await self._list("/v1/sites", "sites", SiteView)

    # ------------------------------------------------------------ starting runs

    async def trigger(
        self,
        route: str,
        data: Any = None,
        *,
        id: str | None = None,  # noqa: A002 - the CloudEvents attribute is called so
        deadline: Deadline | None = None,
        wait: float | None = None,
        content_type: str | None = None,
    ) -> AsyncRun:
        """Start a run on a route, and return it as soon as it is accepted: in the log, synced to disk.

        Args:
            route: the route's name.
            data: bytes go as they are; text with a ``content_type`` too; everything else goes as JSON.
            id: the event id; the same id on the same route is the same run. One is made if none is given.
            deadline: by when the answer is due instead of the route's: "60s", seconds, or an instant.
            wait: return only when the run has ended, or after this many seconds.
            content_type: what the bytes or the text are.

        Raises:
            NotFound: there is no such route.
            Conflict: the id was used with other data.
            Overloaded: the platform takes no more at the moment; nothing was started.
        """
        payload = _payload(data, content_type)
        headers = {"Content-Type": payload.type, "Idempotency-Key": id or uuid.uuid4().hex}
        if deadline is not None:
            headers["Headrace-Deadline"] = _deadline(deadline)
        door_s = 0.0 if wait is None else min(float(wait), _DOOR_WAIT_S_MAX)
        if door_s > 0.0:
            headers["Prefer"] = f"wait={math.ceil(door_s)}"
        began = time.monotonic()
        path = f"/v1/triggers/{check_name(route, 'route name')}"
        answer = await self._http.ask("POST", path, body=payload.body, headers=headers, wait_s=door_s)
        if answer.status == 200:
            view = _read(answer, RunView)
            return AsyncRun(self, view.run_id, seen=view)
        run = AsyncRun(self, (ref := _read(answer, RunRef)).run_id, ref=ref)
        if wait is not None and (left := wait - (time.monotonic() - began)) > 0.0:
            await self._wait_for_end(run, left)
        return run

    async def publish(self, events: Event | Mapping[str, Any] | Sequence[Event | Mapping[str, Any]]) -> list[AsyncRun]:
        """Send an event, or a batch that is accepted whole or refused whole, and return the runs that it starts.

        An event may also be a mapping in the JSON form of CloudEvents. No run is returned where no route takes it.
        """
        if isinstance(events, Event | Mapping):
            kind, body = "application/cloudevents+json", msgspec.json.encode(cloudevent(events))
        else:
            kind = "application/cloudevents-batch+json"
            body = msgspec.json.encode([cloudevent(each) for each in events])
        answer = await self._http.ask("POST", "/v1/events", body=body, headers={"Content-Type": kind})
        return [AsyncRun(self, ref.run_id, ref=ref) for ref in _read(answer, _Started).runs]

    # ------------------------------------------------------------ runs

    async def run(self, run_id: str) -> AsyncRun:
        """Return a run.

        Raises:
            NotFound: there is no run of this id.
        """
        return AsyncRun(self, run_id, seen=await self.view(run_id))

    async def view(self, run_id: str) -> RunView:
        """Return a run as it is now."""
        return _read(await self._http.ask("GET", f"/v1/runs/{check_name(run_id, 'run id')}"), RunView)

    async def runs(
        self,
        *,
        state: RunState | None = None,
        route: str | None = None,
        since: str | datetime | None = None,
        limit: int = 100,
    ) -> list[AsyncRun]:
        """Return runs, newest first.

        Args:
            state: only those in this state.
            route: only those on this route.
            since: only those accepted at or after this instant, as RFC 3339 text or a ``datetime`` with a time zone.
            limit: how many at most.
        """
        instant = format_instant(since.timestamp()) if isinstance(since, datetime) else since
        query = {k: str(v) for k, v in (("state", state), ("route", route), ("since", instant)) if v is not None}
        found: list[AsyncRun] = []
        while len(found) < limit:
            query["limit"] = str(min(PAGE_RUNS_MAX, limit - len(found)))
            page = _read(await self._http.ask("GET", "/v1/runs", params=query), RunPage)
            found += [AsyncRun(self, view.run_id, seen=view) for view in page.runs]
            if page.next is None:
                break
            query["cursor"] = page.next
        return found

    async def cancel(self, run_id: str) -> None:
        """Stop a run; nothing happens if it has ended.

        Raises:
            NotFound: there is no run of this id.
        """
        await self._http.ask("POST", f"/v1/runs/{check_name(run_id, 'run id')}/cancel")

    async def stream(self, after: int | None = None) -> AsyncIterator[StreamEvent]:
        """Yield what happens in all runs, for ever, from now on or after the event with the ``seq`` ``after``."""
        async with aclosing(self.events("/v1/stream", after)) as found:
            async for event in found:
                yield event

    async def events(self, path: str, after: int | None = None) -> AsyncIterator[StreamEvent]:
        """Yield the server-sent events of a path, and go on after the last one when a connection is lost.

        Raises:
            PlatformUnreachable: no connection came about for ``patience_s`` seconds.
        """
        last = "" if after is None else str(after)
        waits = delays()
        give_up = time.monotonic() + self._http.patience_s
        while True:
            headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last} if last else {})}
            try:
                async with self._http.stream(path, headers) as chunks:
                    async for message in messages(chunks):
                        last, waits = message.id, delays()
                        give_up = time.monotonic() + self._http.patience_s
                        yield _event(message.id, message.event, message.data)
                    give_up = max(give_up, time.monotonic() + self._http.patience_s)  # it ended in good order
            except HeadraceError as error:
                if not error.transient or time.monotonic() > give_up:
                    raise
            await asyncio.sleep(next(waits))

    async def answer(self, run_id: str) -> Payload | None:
        """Return the answer of a run, or None while there is none.

        Raises:
            RunFailed: the run ended without one.
            NotFound: there is no run of this id.
        """
        found = await self._http.request("GET", f"/v1/runs/{check_name(run_id, 'run id')}/result")
        if found.status == 202:
            return None
        if found.status == 410:
            raise failure(await self.view(run_id), found)
        if found.status >= 400:
            raise problem(found)
        return Payload(type=found.type, body=found.body, size=len(found.body))

    async def wait_for_answer(self, run_id: str, timeout: float | None = None) -> Payload:
        """Wait for the answer of a run; raises what ``AsyncRun.result`` raises."""
        try:
            async with asyncio.timeout(timeout):
                while True:
                    found = await self.answer(run_id)
                    if found is not None:
                        return found
                    await self._until_news(run_id)
        except TimeoutError as error:
            raise TimeoutError(f"the run {run_id} has no answer after {timeout:g} s; it goes on") from error

    async def _wait_for_end(self, run: AsyncRun, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout), aclosing(run.follow()) as events:
                async for _ in events:
                    pass
                await run.view()
        except TimeoutError:
            return

    async def _until_news(self, run_id: str) -> None:
        """Return when the run's state has changed, or after a few seconds: a stream that says nothing proves nothing."""
        try:
            async with (
                asyncio.timeout(_LOOK_AGAIN_S_MAX),
                aclosing(self.events(f"/v1/runs/{run_id}/events")) as events,
            ):
                async for event in events:
                    if event.kind == "run" and event.data.get("answered_at") is not None:
                        return
                    if event.kind == "run" and event.data.get("state") in FINAL:
                        return
        except (TimeoutError, PlatformUnreachable):
            return
        except NotFound:
            await asyncio.sleep(_LOOK_AGAIN_S_MAX / 10)

    # ------------------------------------------------------------ large data

    async def upload(self, content: str | Path | bytes, *, content_type: str | None = None) -> str:
        """Upload a file or bytes, and return the URI that ``ctx.stage`` and the ``dataref`` of an event take.

        The platform checks what arrives against its size and its SHA-256.
        """
        kept = content if isinstance(content, bytes) else Path(content)
        if isinstance(kept, Path) and not kept.is_file():
            raise BadRequest(f"there is no file {kept}", hint="Name a file to upload.")
        size, digest = await asyncio.to_thread(_measure, kept)
        wanted = {"size": size, "sha256": digest, **({"content_type": content_type} if content_type else {})}
        offer = _read(await self._json("POST", "/v1/uploads", msgspec.json.encode(wanted)), _Upload)
        start = 0
        for part in offer.parts:
            end = min(size, start + part.size)
            await self._http.ask(
                "PUT", part.url, body=_piece(kept, start, end), headers={"Content-Length": str(end - start)}
            )
            start = end
        return _read(await self._json("POST", offer.complete, b""), _Uploaded).uri

    # ------------------------------------------------------------ in between

    async def _json(self, method: str, path: str, body: bytes) -> Answer:
        return await self._http.ask(method, path, body=body, headers={"Content-Type": JSON})

    async def _list(self, path: str, key: str, kind: type[T]) -> list[T]:
        return _read(await self._http.ask("GET", path), dict[str, list[kind]])[key]  # type: ignore[valid-type]
