"""The platform from Python, in the plain form: ``Client`` and its ``Run``, with the methods of ``AsyncClient``."""

from __future__ import annotations

import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from headrace.client import PATIENCE_S, AsyncClient
from headrace.handle import AsyncRun
from headrace.loopthread import LoopThread
from headrace.model import (
    Admission,
    DeadView,
    Event,
    Explanation,
    Fidelity,
    FunctionView,
    HistoryPage,
    OnLate,
    Quote,
    Revision,
    RouteView,
    RunRef,
    RunState,
    RunView,
    SiteView,
    StreamEvent,
)
from headrace.packing import pack_file
from headrace.wire import Payload

T = TypeVar("T")


class Run:
    """One run on the platform. ``run_id`` names it everywhere; ``duplicate`` says that it was there already."""

    def __init__(self, inner: AsyncRun, loop: LoopThread) -> None:
        self._inner = inner
        self._loop = loop

    def __repr__(self) -> str:
        return f"<Run {self.run_id} on {self.route or '?'}>"

    @property
    def run_id(self) -> str:
        """The id of the run."""
        return self._inner.run_id

    @property
    def route(self) -> str:
        """The route that the run is on."""
        return self._inner.route

    @property
    def deadline(self) -> str | None:
        """By when the answer is due, as RFC 3339 text."""
        return self._inner.deadline

    @property
    def quote(self) -> Quote:
        """What the platform expected when it accepted the run."""
        return self._inner.quote

    @property
    def duplicate(self) -> bool:
        """Whether an earlier trigger with the same id had started this run."""
        return self._inner.duplicate

    @property
    def ref(self) -> RunRef | None:
        """The promise given when the run was accepted, if it was accepted by this call."""
        return self._inner.ref

    @property
    def seen(self) -> RunView | None:
        """The run as it was last looked at, without asking the platform."""
        return self._inner.seen

    @property
    def state(self) -> RunState:
        """The state as it is now: accepted, running, succeeded, failed or canceled. Asks the platform."""
        return self._loop.call(self._inner.state)

    def view(self) -> RunView:
        """Return the run as it is now."""
        return self._loop.call(self._inner.view)

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the answer and return it: decoded JSON, text, or bytes, as its content type says.

        Args:
            timeout: the longest wait in seconds; None waits for as long as it takes.

        Raises:
            RunFailed: the run ended without an answer; ``kind`` and ``traceback`` say why.
            RunCanceled: somebody canceled it.
            TimeoutError: there is no answer yet. The run goes on.
        """
        return self._loop.call(self._inner.result, timeout)

    def result_at(self, level: int) -> Any:
        """Return one of several answers: that of the variant of this level, whatever came after it.

        Raises:
            NotFound: there is no answer of this level (yet); ``view().answers`` tells which there are.
        """
        return self._loop.call(self._inner.result_at, level)

    def payload(self, timeout: float | None = None) -> Payload:
        """Wait for the answer and return its bytes with their content type; raises what ``result`` raises."""
        return self._loop.call(self._inner.payload, timeout)

    @property
    def fidelity(self) -> Fidelity | None:
        """How good the answer is that there is now; None without one, or without variants. Asks the platform."""
        return self._loop.call(self._inner.fidelity)

    def answered(self) -> RunView:
        """Wait until the run has its answer, or has ended without one, and return it as it is then.

        Of several answers this is the first; ``ended`` waits for the best.
        """
        return self._loop.call(self._inner.answered)

    def ended(self) -> RunView:
        """Wait until the run has ended, however that may be, and return it as it is then."""
        return self._loop.call(self._inner.ended)

    def follow(self, after: int | None = None) -> Generator[StreamEvent, None, None]:
        """Yield what happens in the run, from its acceptance to its end, across lost connections without a gap."""
        return _drawn(self._loop, self._inner.follow(after))

    def cancel(self) -> None:
        """Stop the run: what waits is dropped, what runs is stopped.

        Raises:
            Conflict: it has succeeded or failed already.
        """
        self._loop.call(self._inner.cancel)


class Client:
    """A platform. May be used from any thread. Close it, or use it as a context manager.

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
        self._inner = AsyncClient(url, token, patience_s=patience_s)
        self._loop = LoopThread("headrace-client")
        self._close = weakref.finalize(self, _close, self._inner, self._loop)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client {self.url}>"

    @property
    def url(self) -> str:
        """The address of the platform."""
        return self._inner.address.url

    def close(self) -> None:
        """Close all connections. Closing twice does no harm."""
        self._close()

    # ------------------------------------------------------------ functions and routes

    def register(self, fn: Callable[..., Any], *, name: str | None = None) -> FunctionView:
        """Register a function by value, with the options and the routes that its decorators declare.

        Args:
            fn: a function; a lambda needs a ``name``.
            name: the registered name, if it shall differ from the declared one.

        Raises:
            BadRequest: the code cannot travel, or an option is not possible.
        """
        return self._loop.call(self._inner.register, fn, name=name)

    def deploy(self, path: str | Path) -> list[FunctionView]:
        """Load a user's file in this process, and register its declared functions and their routes.

        Raises:
            LoadError: the file raised when it was loaded.
            BadRequest: it declares nothing, or its code cannot travel.
        """
        packed = pack_file(path)  # in the caller's own thread, which is where users expect their code to be loaded
        return self._loop.call(self._inner.put_packed, packed)

    def route(
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
        return self._loop.call(
            self._inner.route,
            name,
            function=function,
            type=type,
            source=source,
            subject=subject,
            deadline=deadline,
            on_late=on_late,
            max_in_flight=max_in_flight,
            revision=revision,
            admission=admission,
            newest_wins=newest_wins,
        )

    def functions(self) -> list[FunctionView]:
        """Return all registered functions."""
        return self._loop.call(self._inner.functions)

    def routes(self) -> list[RouteView]:
        """Return all registered routes."""
        return self._loop.call(self._inner.routes)

    def sites(self) -> list[SiteView]:
        """Return all sites that the platform knows."""
        return self._loop.call(self._inner.sites)

    # ------------------------------------------------------------ starting runs

    def trigger(
        self,
        route: str,
        data: Any = None,
        *,
        id: str | None = None,  # noqa: A002 - the CloudEvents attribute is called so
        deadline: str | float | datetime | None = None,
        wait: float | None = None,
        content_type: str | None = None,
    ) -> Run:
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
        options: dict[str, Any] = {"id": id, "deadline": deadline, "wait": wait, "content_type": content_type}
        return Run(self._loop.call(self._inner.trigger, route, data, **options), self._loop)

    def publish(self, events: Event | Mapping[str, Any] | Sequence[Event | Mapping[str, Any]]) -> list[Run]:
        """Send an event, or a batch that is accepted whole or refused whole, and return the runs that it starts.

        An event may also be a mapping in the JSON form of CloudEvents. No run is returned where no route takes it.
        """
        return [Run(each, self._loop) for each in self._loop.call(self._inner.publish, events)]

    def quote(
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
        options: dict[str, Any] = {"route": route, "id": id, "deadline": deadline, "content_type": content_type}
        return self._loop.call(self._inner.quote, what, **options)

    # ------------------------------------------------------------ runs

    def run(self, run_id: str) -> Run:
        """Return a run.

        Raises:
            NotFound: there is no run of this id.
        """
        return Run(self._loop.call(self._inner.run, run_id), self._loop)

    def runs(
        self,
        *,
        state: RunState | None = None,
        route: str | None = None,
        since: str | datetime | None = None,
        limit: int = 100,
    ) -> list[Run]:
        """Return runs, newest first.

        Args:
            state: only those in this state.
            route: only those on this route.
            since: only those accepted at or after this instant, as RFC 3339 text or a ``datetime`` with a time zone.
            limit: how many at most.
        """
        found = self._loop.call(self._inner.runs, state=state, route=route, since=since, limit=limit)
        return [Run(each, self._loop) for each in found]

    def dead(
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
        options: dict[str, Any] = {"function": function, "route": route, "since": since, "all": all, "limit": limit}
        return self._loop.call(self._inner.dead, **options)

    def replay(self, id: str, *, key: str | None = None) -> Run:  # noqa: A002 - of either kind
        """Give a dead invocation, or a run that failed, another go: a new run, with the functions as they are now.

        Its ``ref`` says where it begins: ``from_`` is "invocation", or "start" where a branch needs its siblings.

        Args:
            id: of an invocation or of a run.
            key: the same key for the same id is the same new run. One is made if none is given.

        Raises:
            NotFound: there is nothing of this id.
            Conflict: it did not fail, or what it was given is not kept any more.
        """
        return Run(self._loop.call(self._inner.replay, id, key=key), self._loop)

    def cancel(self, run_id: str) -> None:
        """Stop a run: what waits is dropped, what runs is stopped. Canceling twice is one wish.

        Raises:
            NotFound: there is no run of this id.
            Conflict: it has succeeded or failed already.
        """
        self._loop.call(self._inner.cancel, run_id)

    def history(self, since: str | datetime, until: str | datetime | None = None) -> Generator[HistoryPage, None, None]:
        """Yield what has ended from one instant on and before another (now, if not given), page by page.

        The pages are in the order of the log. Both instants are given as for ``runs``.
        """
        return _drawn(self._loop, self._inner.history(since, until))

    def stream(self, after: int | None = None) -> Generator[StreamEvent, None, None]:
        """Yield what happens in all runs, for ever, from now on or after the event with the ``seq`` ``after``."""
        return _drawn(self._loop, self._inner.stream(after))

    def upload(self, content: str | Path | bytes, *, content_type: str | None = None) -> str:
        """Upload a file or bytes, and return the URI that ``ctx.stage`` and the ``dataref`` of an event take.

        The platform checks what arrives against its size and its SHA-256.
        """
        return self._loop.call(self._inner.upload, content, content_type=content_type)


def _close(inner: AsyncClient, loop: LoopThread) -> None:
    loop.close(inner.close)


def _drawn(loop: LoopThread, events: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    """Yield what the loop's thread yields, one by one, as it is asked for."""

    async def draw() -> T | None:
        return await anext(events, None)

    async def close() -> None:
        with suppress(RuntimeError):  # after Ctrl-C it is still on its way out, by itself
            await events.aclose()

    try:
        while (event := loop.call(draw)) is not None:
            yield event
    finally:
        loop.call(close)
