"""An event loop without a world: its clock jumps to the next timer, and which of the ready callbacks runs is drawn."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
import random
from asyncio import events
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

_PROCESS: contextvars.ContextVar[Process] = contextvars.ContextVar("process")

# What belongs to no process: the network, the servers, those who inject faults.
WORLD = contextvars.Context()


class OutOfTime(Exception):
    """The virtual time that a simulation may take is over, or nothing can ever happen any more."""


class _Task(asyncio.Task[Any]):
    """A task with a hash that does not depend on its address, so that sets of tasks have the same order each time."""

    def __init__(self, work: Coroutine[Any, Any, Any], loop: SimLoop, context: contextvars.Context | None) -> None:
        loop.tasks_made += 1
        self._number = loop.tasks_made
        super().__init__(work, loop=loop, context=context)

    def __hash__(self) -> int:
        return self._number


class Process:
    """What runs in one simulated process: all callbacks that were made by it. It can be frozen, and it can be killed.

    A killed process runs nothing more, not even its ``finally`` blocks: its callbacks are dropped.
    """

    def __init__(self, loop: SimLoop, name: str) -> None:
        self.loop = loop
        self.name = name
        self.alive = True
        self.frozen = False
        self.special = False  # not simply running: dead, frozen, or to be stopped after some more callbacks
        self.context = contextvars.copy_context()
        self.context.run(_PROCESS.set, self)
        self._tasks: list[asyncio.Task[Any]] = []
        self._held: list[_Handle | _Timer] = []
        self._dropped: list[_Handle | _Timer] = []
        self._fuse = 0
        self._on_fuse: Callable[[], None] | None = None

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine in this process."""
        return self.loop.create_task(work, context=self.context.copy())

    def soon(self, act: Callable[..., object], *args: Any) -> None:
        """Call something in this process."""
        self.loop.call_soon(act, *args, context=self.context)

    def adopt(self, task: asyncio.Task[Any]) -> None:
        """Remember a task, so that it is not cleaned up before the simulation is over."""
        self._tasks.append(task)

    def light_fuse(self, callbacks: int, act: Callable[[], None]) -> None:
        """Have ``act`` called in between two callbacks of this process, after so many of them."""
        self._fuse, self._on_fuse = max(1, callbacks), act
        self.special = True

    def kill(self) -> None:
        """End it at once."""
        self.alive = False
        self.special = True

    def freeze(self) -> None:
        """Stop it; what is due waits until it goes on."""
        self.frozen = self.special = True

    def thaw(self) -> None:
        """Let it go on."""
        if self.alive and self.frozen:
            self.frozen = False
            self.special = self._on_fuse is not None
            held, self._held = self._held, []
            self.loop.resume(held)

    def calm(self) -> None:
        """Let nothing more happen to it; if it is frozen, it goes on in its own time."""
        self._on_fuse = None
        self.special = self.frozen or not self.alive

    def admits(self, handle: _Handle | _Timer) -> bool:
        """Say whether a callback of it may run now."""
        if not self.alive:
            self._dropped.append(handle)  # kept as it is until the end, so that nothing in it is cleaned up
            return False
        if self.frozen:
            self._held.append(handle)
            return False
        if self._on_fuse is not None:
            self._fuse -= 1
            if self._fuse <= 0:
                act, self._on_fuse = self._on_fuse, None
                self.special = False
                WORLD.run(act)
                return self.alive and (not self.frozen or self.admits(handle))
        return True

    def bury(self) -> None:
        """Take apart what is left when the simulation is over."""
        self.alive = False
        for task in self._tasks:
            if not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                with contextlib.suppress(BaseException):  # whatever it wants to do on the way out, it is dead
                    task.get_coro().close()
        self._tasks.clear()
        self._dropped.clear()
        self._held.clear()


class _Handle(asyncio.Handle):
    """A callback; made without what only a debugger needs, because hundreds of thousands are."""

    __slots__ = ()

    def __init__(
        self, callback: Callable[..., object], args: Any, loop: SimLoop, context: contextvars.Context | None
    ) -> None:
        self._context = contextvars.copy_context() if context is None else context
        self._loop = loop
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._repr = None
        self._source_traceback = None


class _Timer(asyncio.TimerHandle):
    __slots__ = ()
    _context: contextvars.Context
    _callback: Callable[..., object]

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: Any,
        loop: SimLoop,
        context: contextvars.Context | None,
    ) -> None:
        _Handle.__init__(self, callback, args, loop, context)  # type: ignore[arg-type] # they have the same fields
        self._when = when
        self._scheduled = True


class SimLoop(asyncio.BaseEventLoop):
    """Runs one simulation; everything that is left to chance comes from ``rng``."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._draw = rng.random
        self._now = 0.0
        self._ready: list[_Handle | _Timer] = []  # only what stands here touches it
        self._timers: list[tuple[float, int, _Timer]] = []
        self._timers_made = 0
        self.limit_s = 100_000.0
        self.limit_steps = 500_000
        self.steps = 0
        self.tasks_made = 0
        self.set_task_factory(_make_task)  # type: ignore[arg-type]
        self.set_exception_handler(lambda loop, context: None)  # of tasks that nobody waited for

    def time(self) -> float:
        """Return the virtual seconds since the beginning."""
        return self._now

    def later(self, delay_s: float, act: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
        """Call something of the world, and of no process, after a while."""
        return self.call_at(self._now + delay_s, act, *args, context=WORLD)

    def resume(self, handles: list[_Handle | _Timer]) -> None:
        """Have callbacks run that were held back."""
        self._ready += handles

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """Call something at this instant, after or before all else that is ready."""
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """Call something at a virtual instant."""
        timer = _Timer(when, callback, args, self, context)
        self._timers_made += 1
        heapq.heappush(self._timers, (when, self._timers_made, timer))
        return timer

    def _run_once(self) -> None:
        ready, draw = self._ready, self._draw
        while not self._stopping:  # type: ignore[attr-defined]
            count = len(ready)
            if count == 0:
                self._advance(ready)
                continue
            if count == 1:
                handle = ready.pop()
            else:
                place = int(draw() * count)
                handle = ready[place]
                ready[place] = ready[-1]
                ready.pop()
            if handle._cancelled:
                continue
            context = handle._context
            process = context.get(_PROCESS)
            if process is not None and process.special and not process.admits(handle):
                continue
            self.steps += 1
            if self.steps > self.limit_steps:
                raise OutOfTime(f"{self.steps:,} callbacks have run")
            context.run(handle._callback, *handle._args)

    def _advance(self, ready: list[_Handle | _Timer]) -> None:
        """Jump to the next instant at which something is due."""
        timers = self._timers
        while timers:
            when, _, first = heapq.heappop(timers)
            if first._cancelled:
                continue
            self._now = max(self._now, when)
            if self._now > self.limit_s:
                raise OutOfTime(f"{self.limit_s:,.0f} virtual seconds are over")
            ready.append(first)
            while timers and timers[0][0] <= self._now:
                due = heapq.heappop(timers)[2]
                if not due._cancelled:
                    ready.append(due)
            return
        raise OutOfTime("nothing can ever happen any more")

    def take_apart(self, processes: Iterable[Process]) -> None:
        """End for good: take apart what is left of the processes, and forget all that was to be called."""
        before = events._get_running_loop()
        events._set_running_loop(self)
        try:
            for process in processes:
                process.bury()
        finally:
            events._set_running_loop(before)
        self._ready.clear()
        self._timers.clear()
        self.close()

    def run_in_executor(self, executor: object, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Do at once what a thread would do: there is none."""
        done: asyncio.Future[Any] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done

    def _write_to_self(self) -> None:
        """There is one thread; nobody has to be woken."""

    def _process_events(self, events: object) -> None:
        """There is no input or output."""


def running_process() -> Process | None:
    """Return the process that the present callback belongs to."""
    return _PROCESS.get(None)


def _make_task(loop: SimLoop, work: Coroutine[Any, Any, Any], context: contextvars.Context | None = None) -> _Task:
    task = _Task(work, loop, context)
    process = _PROCESS.get(None) if context is None else context.get(_PROCESS)
    if process is not None:
        process.adopt(task)
    return task


def run(loop: SimLoop, work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end in this loop, as the loop of this thread."""
    before = events._get_running_loop()
    events._set_running_loop(None)
    try:
        return loop.run_until_complete(work)
    finally:
        events._set_running_loop(before)
