"""The platform from Python, as coroutines. ``headrace.sync`` has the same methods in the plain form."""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from headrace import following, uploading
from headrace.address import Address, find
from headrace.clock import format_instant
from headrace.context import to_payload
from headrace.errors import BadRequest, PlatformUnreachable
from headrace.events import BATCH, STRUCTURED, new_id, to_json
from headrace.following import read
from headrace.handle import AsyncRun
from headrace.model import (
    Admission,
    Code,
    DeadPage,
    DeadView,
    Event,
    EventFilter,
    Explanation,
    FunctionOptions,
    FunctionView,
    HistoryPage,
    OnLate,
    Replaying,
    Revision,
    Route,
    RouteView,
    RunPage,
    RunRef,
    RunState,
    RunView,
    SiteView,
    StreamEvent,
)
from headrace.names import check_name
from headrace.packing import Packed, pack, pack_file
from headrace.revision import revision_of
from headrace.sdk import declaration, function_name
from headrace.transport import Answer, Transport
from headrace.wire import JSON, Payload

PATIENCE_S = 10.0
PAGE_RUNS_MAX = 1000
_DOOR_WAIT_S_MAX = 30.0  # how long one request is held at the gateway; longer waits go on from here


class _Started(msgspec.Struct):
    runs: list[RunRef]


class _Functions(msgspec.Struct):
    functions: list[FunctionView]


class _Routes(msgspec.Struct):
    routes: list[RouteView]


class _Sites(msgspec.Struct):
    sites: list[SiteView]


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
        view = await self.put_function(registered, pack(fn), declared.options if declared else None, doc_of(fn))
        for route_name, route in (declared.routes if declared else {}).items():
            await self.put_route(route_name, msgspec.structs.replace(route, function=registered))
        return view

    async def deploy(self, path: str | Path) -> list[FunctionView]:
        """Load a user's file in this process, and register its declared functions and their routes.

        Raises:
            LoadError: the file raised when it was loaded.
            BadRequest: it declares nothing, or its code cannot travel.
        """
        return await self.put_packed(pack_file(path))

    async def put_packed(self, packed: Sequence[Packed]) -> list[FunctionView]:
        """Register functions that are already packed, and their routes."""
        views: dict[str, FunctionView] = {}
        for each in sorted(packed, key=_has_variants):  # those come first that others name as their variants
            name, options = each.declaration.name, each.declaration.options
            views[name] = await self.put_function(name, each.code, options, each.doc)
        for each in packed:  # after all functions: a run that starts at once finds its follow-ups registered
            for route_name, route in each.declaration.routes.items():
                await self.put_route(route_name, route)
        return [views[each.declaration.name] for each in packed]

    async def put_function(
        self, name: str, code: Code, options: FunctionOptions | None = None, doc: str = ""
    ) -> FunctionView:
        """Register code that is already packed."""
        body = msgspec.json.encode({"code": code, "options": options or FunctionOptions(), "doc": doc})
        path = f"/v1/functions/{check_name(name, 'function name')}"
        return read(await self._send("PUT", path, body), FunctionView)

    async def route(
        self,
        name: str,
        *,
        function: str | Callable[..., Any],
        type: str | None = None,  # noqa: A002 - the CloudEvents attribute is called so
        source: str | None = None,
        subject: str | None = None,
        deadline: str | None = None,
        on_late: OnLate = "continue",
        max_in_flight: int | None = None,
        revision: Revision | Mapping[str, Any] | None = None,
        admission: Admission = "always",
        newest_wins: bool = False,
    ) -> RouteView:
        """Register a route to a registered function, with the meaning that ``headrace.on`` gives to each word.

        Raises:
            NotFound: the function is not registered.
            BadRequest: a part of the route is not possible.
        """
        rule = EventFilter(type=type, source=source, subject=subject) if type or source or subject else None
        route = Route(
            function=function_name(function),
            filter=rule,
            deadline=deadline,
            on_late=on_late,
            max_in_flight=max_in_flight,
            revision=revision_of(revision),
            admission=admission,
            newest_wins=newest_wins,
        )
        return await self.put_route(name, route)

    async def put_route(self, name: str, route: Route) -> RouteView:
        """Register a route that is already put together."""
        path = f"/v1/routes/{check_name(name, 'route name')}"
        return read(await self._send("PUT", path, msgspec.json.encode(route)), RouteView)

    async def functions(self) -> list[FunctionView]:
        """Return all registered functions."""
        return read(await self._http.ask("GET", "/v1/functions"), _Functions).functions

    async def routes(self) -> list[RouteView]:
        """Return all registered routes."""
        return read(await self._http.ask("GET", "/v1/routes"), _Routes).routes

    async def sites(self) -> list[SiteView]:
        """Return all sites that the platform knows."""
        return read(await self._http.ask("GET", "/v1/sites"), _Sites).sites

    # ------------------------------------------------------------ starting runs

    async def trigger(
        self,
        route: str,
        data: Any = None,
        *,
        id: str | None = None,  # noqa: A002 - the CloudEvents attribute is called so
        deadline: str | float | datetime | None = None,
        wait: float | None = None,
        content_type: str | None = None,
    ) -> AsyncRun:
        """Start a run on a route, and return it as soon as it is accepted: in the log, synced to disk.

        Args:
            route: the route's name.
            data: bytes go as they are; text with a ``content_type`` too; everything else goes as JSON.
            id: the event id; the same id on the same route is the same run. One is made if none is given.
            deadline: by when the answer is due instead of the route's: "60s", seconds, or an instant.
            wait: return only when the run has its answer or has ended, or after this many seconds.
            content_type: what the bytes or the text are.

        Raises:
            NotFound: there is no such route.
            Conflict: the id was used with other data.
            Infeasible: the route is strict, and the answer is not expected in time; nothing was started.
            Overloaded: the platform takes no more at the moment; nothing was started.
        """
        payload = _payload(data, content_type)
        headers = _trigger_headers(payload, id or new_id(), deadline)
        door_s = 0.0 if wait is None else min(float(wait), _DOOR_WAIT_S_MAX)
        if door_s > 0.0:
            headers["Prefer"] = f"wait={math.ceil(door_s)}"
        began = time.monotonic()
        path = f"/v1/triggers/{check_name(route, 'route name')}"
        answer = await self._http.ask("POST", path, body=payload.body, headers=headers, wait_s=door_s)
        if answer.status == 200:
            view = read(answer, RunView)
            return AsyncRun(self, view.run_id, seen=view)
        ref = read(answer, RunRef)
        run = AsyncRun(self, ref.run_id, ref=ref)
        if wait is not None:
            with suppress(TimeoutError, PlatformUnreachable):  # it is accepted all the same
                async with asyncio.timeout(max(0.0, wait - (time.monotonic() - began))):
                    await run.answered()
        return run

    async def publish(self, events: Event | Mapping[str, Any] | Sequence[Event | Mapping[str, Any]]) -> list[AsyncRun]:
        """Send an event, or a batch that is accepted whole or refused whole, and return the runs that it starts.

        An event may also be a mapping in the JSON form of CloudEvents. No run is returned where no route takes it.
        """
        kind, body = _events(events)
        answer = await self._http.ask("POST", "/v1/events", body=body, headers={"Content-Type": kind})
        return [AsyncRun(self, ref.run_id, ref=ref) for ref in read(answer, _Started).runs]

    async def quote(
        self,
        what: Any = None,
        *,
        route: str | None = None,
        id: str | None = None,  # noqa: A002 - the CloudEvents attribute is called so
        deadline: str | float | datetime | None = None,
        content_type: str | None = None,
    ) -> Explanation:
        """Ask what would come of an event, a batch or a trigger if it were sent now. Nothing is started.

        Args:
            what: what ``publish`` takes; with ``route``, the data that ``trigger`` takes.
            route: the route to trigger by its name.
            id: with ``route``: the event id.
            deadline: with ``route``: by when the answer is due instead of the route's, as for ``trigger``.
            content_type: with ``route``: what the bytes or the text are.

        Raises:
            NotFound: there is no such route.
            BadRequest: it would be refused for what is in it.
        """
        if route is None:
            kind, body = _events(what)
            answer = await self._http.ask("POST", "/v1/quote", body=body, headers={"Content-Type": kind})
        else:
            payload = _payload(what, content_type)
            answer = await self._http.ask(
                "POST",
                "/v1/quote",
                body=payload.body,
                headers=_trigger_headers(payload, id, deadline),
                params={"route": check_name(route, "route name")},
            )
        return read(answer, Explanation)

    # ------------------------------------------------------------ runs

    async def run(self, run_id: str) -> AsyncRun:
        """Return a run.

        Raises:
            NotFound: there is no run of this id.
        """
        return AsyncRun(self, run_id, seen=await self.view(run_id))

    async def view(self, run_id: str) -> RunView:
        """Return a run as it is now; raises what ``run`` raises."""
        return await following.view(self._http, run_id)

    async def answer(self, run_id: str, timeout: float | None = None) -> Payload:
        """Wait for the answer of a run and return its bytes with their content type.

        Raises:
            RunFailed: the run ended without one.
            NotFound: there is no run of this id.
            TimeoutError: there is none yet after ``timeout`` seconds. The run goes on.
        """
        return await following.answer(self._http, run_id, timeout)

    async def answer_now(self, run_id: str, level: int | None = None) -> Payload | None:
        """Return the answer of a run, or None while there is none; raises what ``answer`` raises.

        Of several answers it is the best, or with ``level`` the one of this fidelity.
        """
        return await following.answer_now(self._http, run_id, level)

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
        given = {"state": state, "route": route, "since": _instant(since)}
        query = {name: str(value) for name, value in given.items() if value is not None}
        found: list[AsyncRun] = []
        while len(found) < limit:
            query["limit"] = str(min(PAGE_RUNS_MAX, limit - len(found)))
            page = read(await self._http.ask("GET", "/v1/runs", params=query), RunPage)
            found += [AsyncRun(self, view.run_id, seen=view) for view in page.runs]
            if page.next is None:
                break
            query["cursor"] = page.next
        return found

    async def dead(
        self,
        *,
        function: str | None = None,
        route: str | None = None,
        since: str | datetime | None = None,
        all: bool = False,  # noqa: A002 - called so everywhere else
        limit: int = 100,
    ) -> list[DeadView]:
        """Return invocations that were given up on, newest first, each with the error of every attempt.

        Args:
            function: only those of this function.
            route: only those in runs on this route.
            since: only those given up on at or after this instant, as for ``runs``.
            all: those in runs that were replayed too.
            limit: how many at most.
        """
        given = {"function": function, "route": route, "since": _instant(since), "all": "1" if all else None}
        query = {name: value for name, value in given.items() if value is not None}
        found: list[DeadView] = []
        while len(found) < limit:
            query["limit"] = str(min(PAGE_RUNS_MAX, limit - len(found)))
            page = read(await self._http.ask("GET", "/v1/dead", params=query), DeadPage)
            found += page.dead
            if page.next is None:
                break
            query["cursor"] = page.next
        return found

    async def replay(self, id: str, *, key: str | None = None) -> AsyncRun:  # noqa: A002 - of either kind
        """Give a dead invocation, or a run that failed, another go: a new run, with the functions as they are now.

        Its ``ref`` says where it begins: ``from_`` is "invocation", or "start" where a branch needs its siblings.

        Args:
            id: of an invocation or of a run.
            key: the same key for the same id is the same new run. One is made if none is given.

        Raises:
            NotFound: there is nothing of this id.
            Conflict: it did not fail, or what it was given is not kept any more.
        """
        headers = {"Idempotency-Key": _one_line(key or new_id(), "key")}
        answer = await self._http.ask("POST", f"/v1/dead/{check_name(id, 'id')}/replay", headers=headers)
        ref = read(answer, Replaying)
        return AsyncRun(self, ref.run_id, ref=ref)

    async def history(
        self, since: str | datetime, until: str | datetime | None = None
    ) -> AsyncGenerator[HistoryPage, None]:
        """Yield what has ended from one instant on and before another (now, if not given), page by page.

        The pages are in the order of the log. Both instants are given as for ``runs``.
        """
        given = {"since": _instant(since), "until": _instant(until), "limit": str(PAGE_RUNS_MAX)}
        query = {name: value for name, value in given.items() if value is not None}
        while True:
            page = read(await self._http.ask("GET", "/v1/history", params=query), HistoryPage)
            yield page
            if page.next is None:
                return
            query["cursor"] = page.next

    async def cancel(self, run_id: str) -> None:
        """Stop a run: what waits is dropped, what runs is stopped. Canceling twice is one wish.

        Raises:
            NotFound: there is no run of this id.
            Conflict: it has succeeded or failed already.
        """
        await self._http.ask("POST", f"/v1/runs/{check_name(run_id, 'run id')}/cancel")

    async def stream(self, after: int | None = None) -> AsyncGenerator[StreamEvent, None]:
        """Yield what happens in all runs, for ever, from now on or after the event with the ``seq`` ``after``."""
        async with aclosing(self.events("/v1/stream", after)) as found:
            async for event in found:
                yield event

    def events(
        self, path: str, after: int | None = None, *, on_open: Callable[[], None] | None = None
    ) -> AsyncGenerator[StreamEvent, None]:
        """Yield the events of a path, across lost connections, as ``headrace.following.events`` does."""
        return following.events(self._http, path, after, on_open=on_open)

    # ------------------------------------------------------------ large data

    async def upload(self, content: str | Path | bytes, *, content_type: str | None = None) -> str:
        """Upload a file or bytes, and return the URI that ``ctx.stage`` and the ``dataref`` of an event take.

        The platform checks what arrives against its size and its SHA-256.
        """
        return await uploading.upload(self._http, content, content_type)

    async def _send(self, method: str, path: str, body: bytes) -> Answer:
        return await self._http.ask(method, path, body=body, headers={"Content-Type": JSON})


def _has_variants(packed: Packed) -> bool:
    options = packed.declaration.options
    return options is not None and bool(options.variants)


def doc_of(fn: object) -> str:
    """Return the docstring of a function of the user's own; a callable object has its class's, which says nothing."""
    return (inspect.getdoc(fn) or "") if inspect.isroutine(fn) else ""


def _payload(data: Any, content_type: str | None) -> Payload:
    if content_type is None:
        return to_payload(data)
    body = data.encode() if isinstance(data, str) else to_payload(data).body
    return Payload(type=content_type, body=body, size=len(body))


def _trigger_headers(
    payload: Payload,
    id: str | None,  # noqa: A002 - the CloudEvents attribute is called so
    deadline: str | float | datetime | None,
) -> dict[str, str]:
    headers = {"Content-Type": _one_line(payload.type, "content_type")}
    if id is not None:
        headers["Idempotency-Key"] = _one_line(id, "id")
    if deadline is not None:
        headers["Headrace-Deadline"] = _one_line(_deadline(deadline), "deadline")
    return headers


def _events(events: Event | Mapping[str, Any] | Sequence[Event | Mapping[str, Any]]) -> tuple[str, bytes]:
    """Return one event or a batch in the form that goes over HTTP, with its content type."""
    if isinstance(events, Event | Mapping):
        return STRUCTURED, to_json(events)
    return BATCH, b"[" + b",".join(to_json(each) for each in events) + b"]"


def _instant(since: str | datetime | None) -> str | None:
    return format_instant(since.timestamp()) if isinstance(since, datetime) else since


def _deadline(deadline: str | float | datetime) -> str:
    if isinstance(deadline, datetime):
        return format_instant(deadline.timestamp())
    return deadline if isinstance(deadline, str) else f"{deadline:.3f}s"


def _one_line(text: str, what: str) -> str:
    """Return text that can be the value of a header."""
    if not text.isascii() or not text.isprintable():
        raise BadRequest(f"{what}: {ascii(text)[:80]} is not plain text", hint="Use printable ASCII on one line.")
    return text
