"""Futures of runs, and the one listener that completes them all."""

from __future__ import annotations

import asyncio
import builtins
import re
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import aclosing, suppress
from typing import Any, Protocol

import cloudpickle
from msgspec import Struct

from headrace.answers import value_of
from headrace.errors import BadRequest, HeadraceError, RunFailed
from headrace.failures import error_text
from headrace.following import has_answer
from headrace.model import StreamEvent
from headrace.transport import delays
from headrace.wire import PICKLE, Payload

_FETCHING_MAX = 64
_ANSWERED_KEPT_MAX = 10_000
_OPEN_S_MAX = 2.0
_LOOK_S = 5.0
_LOOK_S_MAX = 60.0
_IDLE_S = 10.0


class RunFuture(Future[Any]):
    """A future whose ``run_id`` is known once the platform has accepted the run; ``cancel`` cancels the run."""

    def __init__(self, on_cancel: Callable[[RunFuture], None]) -> None:
        super().__init__()
        self.run_id: str | None = None
        self._on_cancel = on_cancel
        self._turn = threading.RLock()
        self._told = False

    def cancel(self) -> bool:
        """Cancel the run, wherever it is. Returns False only if it has ended."""
        with self._turn:
            if not super().cancel():
                return False
            first, self._told = not self._told, True
            if first:
                self.set_running_or_notify_cancel()  # wakes those who wait for it
        if first:
            self._on_cancel(self)
        return True

    def running(self) -> bool:
        """Return whether the platform has accepted the run and it has not ended."""
        return self.run_id is not None and not self.done()

    def settle(self, result: Any = None, error: BaseException | None = None) -> None:
        """Set the result or the error, unless the future was canceled."""
        with self._turn:
            if self._told:
                return
            self._told = True
            self.set_running_or_notify_cancel()
        if error is None:
            self.set_result(result)
        else:
            self.set_exception(error)


class Platform(Protocol):
    """What completing futures asks of the client."""

    async def answer_now(self, run_id: str) -> Payload | None:
        """Return the answer of a run, or None while there is none."""

    def events(
        self, path: str, after: int | None = None, *, on_open: Callable[[], None] | None = None
    ) -> AsyncGenerator[StreamEvent, None]:
        """Yield the events of a path."""


class _Waiting(Struct):
    future: RunFuture
    look_at: float
    pause_s: float = _LOOK_S


class Awaited:
    """The runs whose ends somebody waits for. Belongs to one event loop, and listens only while there are any."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._waiting: dict[str, _Waiting] = {}
        self._answered: dict[str, None] = {}  # heard before the run was known to be one of ours
        self._fetching = asyncio.Semaphore(_FETCHING_MAX)
        self._fetches: set[asyncio.Task[None]] = set()
        self._opened = asyncio.Event()
        self._listener: asyncio.Task[None] | None = None
        self._used_at = 0.0

    async def listen(self) -> None:
        """Begin to listen, before a run is sent off: then none can end unheard.

        If that takes long, go on all the same; runs are looked at now and then too.
        """
        self._used_at = time.monotonic()
        if self._listener is None or self._listener.done():
            self._opened.clear()
            self._listener = asyncio.create_task(self._listen())
        with suppress(TimeoutError):
            async with asyncio.timeout(_OPEN_S_MAX):
                await self._opened.wait()

    def add(self, future: RunFuture, run_id: str) -> None:
        """Complete this future when its run has its answer, or will never have one."""
        self._waiting[run_id] = _Waiting(future, time.monotonic() + _LOOK_S)
        if run_id in self._answered:
            self._fetch(run_id)

    async def _listen(self) -> None:
        """Hear what has ended, and look now and then at what should have; end when there was nothing to do for long."""
        ears = asyncio.create_task(self._hear())
        try:
            while self._waiting or time.monotonic() - self._used_at < _IDLE_S:
                await asyncio.sleep(1.0)
                now = time.monotonic()
                for run_id, each in list(self._waiting.items()):
                    self._used_at = now
                    if each.future.done():
                        del self._waiting[run_id]
                    elif each.look_at <= now:
                        each.pause_s = min(_LOOK_S_MAX, each.pause_s * 2)
                        each.look_at = now + each.pause_s
                        self._fetch(run_id, again=False)
        finally:
            ears.cancel()
            await asyncio.gather(ears, return_exceptions=True)

    async def _hear(self) -> None:
        last: int | None = None
        while True:
            with suppress(HeadraceError):  # the platform is away for longer than we are patient: begin anew
                async with aclosing(self._platform.events("/v1/stream", last, on_open=self._opened.set)) as events:
                    async for event in events:
                        last = event.seq
                        if has_answer(event):
                            self._heard(str(event.data.get("run_id")))
            await asyncio.sleep(1.0)

    def _heard(self, run_id: str) -> None:
        if run_id in self._waiting:
            self._fetch(run_id)
            return
        self._answered[run_id] = None
        if len(self._answered) > _ANSWERED_KEPT_MAX:
            del self._answered[next(iter(self._answered))]

    def _fetch(self, run_id: str, *, again: bool = True) -> None:
        task = asyncio.create_task(self._complete(run_id, again=again))
        self._fetches.add(task)
        task.add_done_callback(self._fetches.discard)

    async def _complete(self, run_id: str, *, again: bool) -> None:
        """Fetch the answer of a run; ``again``: it is known to be there, though perhaps not readable yet."""
        waits = delays()
        async with self._fetching:
            while (waiting := self._waiting.get(run_id)) is not None and not waiting.future.done():
                try:
                    answer = await self._platform.answer_now(run_id)
                    if answer is not None:
                        waiting.future.settle(_opened(answer))
                except RunFailed as error:
                    waiting.future.settle(error=_as_built_in(error))
                except HeadraceError as error:
                    waiting.future.settle(error=error)
                if waiting.future.done():
                    self._waiting.pop(run_id, None)
                elif again:
                    await asyncio.sleep(next(waits))
                else:
                    return


def _opened(answer: Payload) -> Any:
    """Return what a result holds. It is a pickle made by the caller's own function, opened in the caller's process."""
    if answer.type != PICKLE:
        return value_of(answer)
    try:
        return cloudpickle.loads(answer.body)
    except Exception as error:  # unpickling runs the constructors of the user's classes
        raise BadRequest(
            f"the result cannot be opened here: {error_text(error)}",
            hint="Import or install here what the result's classes come from, or return plain data.",
        ) from error


# ---------------------------------------------------------------- errors


def _as_built_in(error: RunFailed) -> RunFailed:
    """Return the error as one that is of the built-in type too which the function raised, if it raised such a one."""
    name = re.match(r"[A-Za-z]+(?=: |$)", error.reason)
    found = getattr(builtins, name[0], None) if name and error.kind == "user" else None
    if not (isinstance(found, type) and issubclass(found, Exception)):
        return error
    try:
        both = type(found.__name__, (type(error), found), {"__str__": _first, "__module__": __name__})
        made: RunFailed = both(
            str(error),
            hint=error.hint,
            kind=error.kind,
            reason=error.reason,
            traceback=error.traceback,
            run_id=error.run_id,
        )
    except TypeError:  # a few, such as UnicodeDecodeError, cannot be made from text alone
        return error
    for note in getattr(error, "__notes__", []):
        made.add_note(note)
    return made


def _first(error: BaseException) -> str:
    """Return the message; a KeyError by itself would put it in quotes."""
    return str(error.args[0])
