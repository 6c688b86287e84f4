"""``concurrent.futures`` over a platform: the functions of a script run on its workers, durably and by a deadline.

Functions, arguments and results travel as pickles. Arguments are opened in a worker's child only, results in the
caller's own process only. One stream of events tells when runs have ended; no thread and no connection waits per call.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Executor as FuturesExecutor
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple, ParamSpec, TypeVar

from headrace.client import AsyncClient
from headrace.errors import Conflict, HeadraceError
from headrace.futures import Awaited, RunFuture
from headrace.loopthread import LoopThread
from headrace.model import Code, FunctionOptions, Route
from headrace.packing import pack, pickled
from headrace.sdk import declaration
from headrace.wire import PICKLE, encode

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE_S = 60.0
_SENDING_MAX = 64


class _Prepared(NamedTuple):
    """A function that was packed, and the name it is registered under."""

    fn: Callable[..., Any]
    code: Code
    name: str


class Executor(FuturesExecutor):
    """Runs functions on the workers of a platform.

    An exception of the function comes out of ``future.result()`` as ``RunFailed`` with the traceback of the worker; if
    its type is built in, it is of that type too, so that ``except ValueError`` works. A function may take a ``ctx``.

    Use it as a context manager, or call ``shutdown``: what was not sent when the process ends is not run.

    Args:
        url: the gateway; else ``HEADRACE_URL``, else ``./.headrace/url``.
        token: the bearer token; else ``HEADRACE_TOKEN``, else ``./.headrace/token``.
        deadline: by when each answer is due: "60s", seconds, or an instant.
        timeout: the longest that one attempt may take, for functions that do not say so with ``@function``.
        patience_s: how long calls are repeated while the platform cannot be reached or is busy.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        deadline: str | float | datetime | None = None,
        timeout: str = "60s",
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._client = AsyncClient(url, token, patience_s=patience_s)
        self._options = FunctionOptions(timeout=timeout)
        self._deadline = deadline
        self._loop = LoopThread("headrace-executor")
        self._awaited = Awaited(self._client)
        self._lock = threading.Lock()
        self._prepared: dict[int, _Prepared] = {}
        self._registered: dict[str, asyncio.Task[None]] = {}
        self._sending = asyncio.Semaphore(_SENDING_MAX)
        self._tasks: set[asyncio.Task[None] | None] = set()
        self._open: set[RunFuture] = set()
        self._closed = False
        self._close = weakref.finalize(self, self._loop.close, self._client.close)

    def __repr__(self) -> str:
        return f"<Executor {self._client.address.url}>"

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run ``fn(*args, **kwargs)`` on a worker and return its future, a ``RunFuture``.

        Raises:
            BadRequest: the function or an argument cannot travel.
            RuntimeError: the executor was shut down.
        """
        prepared = self._prepare(fn)
        payload = pickled((args, kwargs), prepared.code)
        future = RunFuture(self._canceled)
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot submit: the executor was shut down")
            self._open.add(future)
        future.add_done_callback(self._forget)
        self._loop.spawn(self._run, future, prepared, payload)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; with ``wait``, return when all futures are done.

        Without ``wait`` the futures go on for as long as this process does. What was accepted goes on in any case.

        Args:
            wait: whether to wait.
            cancel_futures: cancel all runs that have not ended.
        """
        with self._lock:
            self._closed = True
            left = list(self._open)
        if cancel_futures:
            for future in left:
                future.cancel()
        if wait and not self._loop.is_current and self._close.alive:
            wait_for(left)
            with suppress(RuntimeError):  # another thread was quicker
                self._loop.call(self._finish)
            self._close()

    # ------------------------------------------------------------ in the caller's thread

    def _prepare(self, fn: Callable[..., Any]) -> _Prepared:
        with self._lock:
            found = self._prepared.get(id(fn))
        if found is not None:
            return found
        code = pack(fn)
        base = re.sub("[^A-Za-z0-9_-]+", "_", getattr(fn, "__name__", type(fn).__name__)).strip("_")[:40]
        # A name of its own, so that no executor replaces a function that somebody has deployed.
        name = f"{base or 'function'}-{hashlib.sha256(encode(code)).hexdigest()[:12]}"
        with self._lock:
            return self._prepared.setdefault(id(fn), _Prepared(fn, code, name))

    def _forget(self, future: Future[Any]) -> None:
        with self._lock:
            self._open.discard(future)

    def _canceled(self, future: RunFuture) -> None:
        if future.run_id is not None:
            with suppress(RuntimeError):  # the loop is closed: the process ends, and the run goes on without it
                self._loop.spawn(self._cancel, future.run_id)

    # ------------------------------------------------------------ in the loop's thread

    async def _run(self, future: RunFuture, prepared: _Prepared, payload: bytes) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            async with self._sending:
                if future.done():
                    return
                await self._awaited.listen()
                await self._register(prepared)
                run = await self._client.trigger(prepared.name, payload, deadline=self._deadline, content_type=PICKLE)
            future.run_id = run.run_id
            if future.done():  # canceled while it was on its way
                await self._cancel(run.run_id)
            else:
                self._awaited.add(future, run.run_id)
        except Exception as error:  # whatever it is, somebody waits for this future
            future.settle(error=error)
        finally:
            self._tasks.discard(task)

    async def _register(self, prepared: _Prepared) -> None:
        """Register a function once, however many of its calls are on their way."""
        task = self._registered.get(prepared.name)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._registered[prepared.name] = asyncio.create_task(self._put(prepared))
        await asyncio.shield(task)

    async def _put(self, prepared: _Prepared) -> None:
        declared = declaration(prepared.fn)
        options = declared.options if declared and declared.options else self._options
        await self._client.put_function(prepared.name, prepared.code, options)
        await self._client.put_route(prepared.name, Route(function=prepared.name))

    async def _cancel(self, run_id: str) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            with suppress(Conflict):  # it was quicker
                await self._client.cancel(run_id)
        except HeadraceError:
            return  # nobody waits for it any more; it goes on, and its result is dropped
        finally:
            self._tasks.discard(task)

    async def _finish(self) -> None:
        """Wait until all that is on its way has arrived, cancellations above all."""
        await asyncio.gather(*(task for task in self._tasks if task), return_exceptions=True)
