"""Warm child processes, one invocation at a time in each.

A child that died, was stopped or has had its time is replaced at once by a fresh one, which the zygote forks within
milliseconds. The pool decides which child runs what; ``workers.child`` talks to it. A child runs the code of one tenant
only: what one has loaded, and left in its modules, is out of reach of the code of another.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from headrace import groups
from headrace.children import Born, ChildLimits, Died
from headrace.errors import ChildLost, HeadraceError, LoadError
from headrace.family import tasks_of_user
from headrace.model import Code
from headrace.wire import Invoke, Returned
from workers.child import Child, NotTaken, OnAsk
from workers.deaths import cause
from workers.output import OnLine, OnSaid
from workers.scratch import Scratch
from workers.watch import LOOK_S, Found, Watch
from workers.zygote import Zygote, child_environment

BACKOFF_FIRST_S = 0.01
BACKOFF_MAX_S = 5.0
USER_TASKS_SPARE = 1024
ASIDE_PER_SLOT = 1  # children kept warm for tenants whose turn it is not

_log = logging.getLogger(__name__)


class _Key(NamedTuple):
    """What is to be run: whose it is, and its function and version."""

    tenant: str
    version: tuple[str, str]


class _Waiter(NamedTuple):
    key: _Key
    child: asyncio.Future[Child]


class Pool:
    """As many children as there are slots."""

    def __init__(
        self,
        slots: int,
        *,
        limits: ChildLimits,
        scratch: Path,
        preload: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        disk_bytes_min: int = 0,
        use_groups: bool = True,
    ) -> None:
        """Describe the pool; nothing is started yet.

        Args:
            slots: how many invocations run at a time.
            limits: what each child may take.
            scratch: the folder in which children get folders of their own; pools may share it.
            preload: modules that the zygote imports, where they are installed, so that functions have them at once.
            environment: the environment of functions; None passes on ours. ``HEADRACE_*`` never gets there.
            disk_bytes_min: free bytes on the disk of ``scratch`` below which nothing new is begun.
            use_groups: whether to hold children in control groups, where this can be done.
        """
        self._slots = slots
        self._limits = limits
        self._scratch_root = scratch
        self._scratch: Scratch | None = None
        self._preload = list(preload)
        self._environment = child_environment(os.environ if environment is None else environment, slots)
        self._zygote: Zygote | None = None
        self._children: dict[int, Child] = {}
        self._idle: list[Child] = []
        self._aside: list[Child] = []  # warm ones of tenants whose turn it is not; they take no slot
        self._waiters: deque[_Waiter] = deque()
        self._busy = 0
        self._made = 0
        self._stillborn = 0
        self._refilling: asyncio.TimerHandle | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._removing: set[asyncio.Future[None]] = set()
        self._closing = False
        self._disk_bytes_min = disk_bytes_min
        self._use_groups = use_groups
        self._groups: Path | None = None
        self._watch: Watch | None = None

    @property
    def free(self) -> int:
        """How many more invocations can start at once."""
        return max(0, self._slots - self._busy)

    @property
    def processes(self) -> int:
        """How many child processes there are, those on their way out included."""
        return len(self._children)

    async def start(self) -> None:
        """Start the zygote and the children.

        Raises:
            NoZygote: it could not be started.
        """
        self._closing = False
        self._scratch = Scratch(self._scratch_root)
        await self._confine()
        self._watch = Watch(
            self._limits,
            scratch=self._scratch.folder,
            disk_bytes_min=self._disk_bytes_min,
            running=lambda: [seen for child in self._children.values() if (seen := child.seen) is not None],
            on_found=self._heed,
        )
        try:
            await self._start_zygote()
        except BaseException:
            self._scratch.close()
            raise
        self._refill()

    async def _confine(self) -> None:
        """Find out what can hold a child to its number of processes, and say so."""
        loop = asyncio.get_running_loop()
        if self._use_groups:
            self._groups = await loop.run_in_executor(None, groups.find)
        if self._groups is not None:
            _log.info("children are held to %d tasks by control groups in %s", self._limits.tasks_max, self._groups)
            await loop.run_in_executor(None, groups.sweep, self._groups)
            return
        _log.info("children are held to %d tasks by counting every %g s", self._limits.tasks_max, LOOK_S)
        if os.getuid() != 0:  # the kernel holds root to nothing
            taken = await loop.run_in_executor(None, tasks_of_user, os.getuid())
            most = taken + self._slots * self._limits.tasks_max + USER_TASKS_SPARE
            self._limits = msgspec.structs.replace(self._limits, user_tasks_max=most)

    async def close(self) -> None:
        """End all processes, what runs in them included, and remove their folders. Safe to repeat."""
        self._closing = True
        if self._watch is not None:
            await self._watch.close()
        if self._refilling is not None:
            self._refilling.cancel()
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.gather(self._restarting, return_exceptions=True)
        for waiter in self._waiters:
            if not waiter.child.done():
                waiter.child.set_exception(ChildLost("the worker is stopping"))
        for child in list(self._children.values()):
            child.abandon("was stopped: the worker is stopping")
        if self._zygote is not None:
            await self._zygote.close()
            self._zygote = None
        for child in list(self._children.values()):
            self._child_died(Died(child=child.number, status=None))
        if self._removing:
            await asyncio.wait(self._removing)
        if self._scratch is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._scratch.close)
            self._scratch = None

    async def run(
        self,
        invoke: Invoke,
        code: Callable[[], Awaitable[Code]],
        *,
        timeout_s: float,
        on_said: OnSaid,
        on_line: OnLine,
        on_ask: OnAsk,
    ) -> Returned:
        """Run one invocation in a child, waiting for a free one if there is none. Canceled, it ends the child.

        Args:
            invoke: what to run, without its code.
            code: brings the code; asked only if the child does not hold this version yet.
            timeout_s: how long loading and running may take together, in seconds.
            on_said: called with each line of ``ctx.log`` and each progress.
            on_line: called with stream ("stdout" or "stderr") and text of each printed line.
            on_ask: answers ``ctx.stage`` and ``ctx.store``.

        Returns:
            The result and the effects. Nothing is said or printed after it.

        Raises:
            FunctionError: LoadError, UserError, OutOfMemory, OverLimit, TimeLimit or ChildLost;
                ``retry`` says whether to try again.
            Exception: what ``code`` raised; the child is unhurt then.
        """
        key = _Key(invoke.tenant, (invoke.function, invoke.version))
        self._busy += 1
        child: Child | None = None
        try:
            watch = self._watch
            assert watch is not None  # noqa: S101 - start() made it
            if not watch.room.is_set():
                await watch.room.wait()
                if self._closing:
                    raise ChildLost("the worker is stopping")
            watch.begin()
            while True:
                child = self._pick(key) or await self._wait(key)
                child.tenant = key.tenant
                if key.version in child.versions:
                    sent = invoke
                else:
                    sent = msgspec.structs.replace(invoke, code=await code())
                    child.versions.add(key.version)
                try:
                    return await child.run(sent, timeout_s=timeout_s, on_said=on_said, on_line=on_line, on_ask=on_ask)
                except NotTaken:
                    self._release(child)
                    child = None
        except LoadError:
            if child is not None:
                child.versions.discard(key.version)  # it did not keep what it could not load
            raise
        finally:
            self._busy -= 1
            if child is not None:
                self._release(child)

    # ------------------------------------------------------------ which child

    def _pick(self, key: _Key) -> Child | None:
        """Take an idle child that runs this; where all have run code of other tenants, one of them makes room."""
        found = _best(self._idle, key)
        if found is not None or not self._idle:
            return found
        found = _best(self._aside, key)
        self._set_aside(self._idle.pop(0))
        if found is None:
            self._refill()
            found = _best(self._idle, key)
        return found

    async def _wait(self, key: _Key) -> Child:
        waiter = _Waiter(key, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            return await waiter.child
        except asyncio.CancelledError:
            if waiter.child.done() and not waiter.child.cancelled() and waiter.child.exception() is None:
                self._release(waiter.child.result())
            raise

    def _set_aside(self, child: Child) -> None:
        """Let a child keep what it has loaded for when its tenant comes back; of too many, the oldest are ended."""
        self._aside.append(child)
        while len(self._aside) > ASIDE_PER_SLOT * self._slots:
            self._aside.pop(0).stop()

    def _release(self, child: Child) -> None:
        if not child.usable:
            self._refill()
            return
        while self._waiters and self._waiters[0].child.done():
            self._waiters.popleft()
        if not self._waiters:
            self._idle.append(child)
        elif _fits(child, self._waiters[0].key):
            self._waiters.popleft().child.set_result(child)
            return
        else:
            found = _best(self._aside, self._waiters[0].key)
            self._set_aside(child)
            if found is None:
                self._refill()
            else:
                self._waiters.popleft().child.set_result(found)
            return
        if len(self._children) > self._slots:
            self._thin()

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """Have a child more than there are slots within this: what overruns shall not keep another from running."""
        self._slots += 1
        self._refill()
        try:
            yield
        finally:
            self._slots -= 1
            self._thin()

    def _thin(self) -> None:
        """End children that wait beyond the slots, those first that hold the least code."""
        while self._idle and self._counted() > self._slots:
            spare = min(self._idle, key=lambda child: len(child.versions))
            self._idle.remove(spare)
            spare.stop()

    # ------------------------------------------------------------ making and losing children

    def _refill(self) -> None:
        """Make children until every slot has a usable one."""
        if self._closing or self._zygote is None or self._restarting is not None or self._refilling is not None:
            return
        for _ in range(self._slots - self._counted()):
            try:
                child = self._make(self._zygote)
            except OSError as error:  # the disk is full, or there are no descriptors left
                self._stillborn += 1
                _log.warning("a child could not be made: %s", error)
                self._refill_later()
                return
            self._release(child)

    def _counted(self) -> int:
        """Return how many children there are for the slots, without those aside."""
        return sum(child.usable for child in self._children.values()) - sum(child.usable for child in self._aside)

    def _make(self, zygote: Zygote) -> Child:
        assert self._scratch is not None  # noqa: S101 - there is no zygote without it
        self._made += 1
        number = self._made
        folder = self._scratch.make(number)
        child = Child(number, limits=self._limits, scratch=folder, kill=zygote.kill, tell=zygote.tell)
        child.group = group = self._make_group()
        self._children[number] = child
        zygote.fork(
            number,
            scratch=str(folder),
            limits=self._limits,
            group="" if group is None else str(group),
            fds=child.theirs,
        )
        return child

    def _make_group(self) -> Path | None:
        if self._groups is None:
            return None
        try:
            return groups.make(self._groups, self._limits.tasks_max)
        except OSError as error:
            _log.warning("no more control groups, so tasks are counted every %g s: %s", LOOK_S, error)
            self._groups = None
            return None

    def _child_born(self, report: Born) -> None:
        child = self._children.get(report.child)
        if child is not None:
            child.pid = report.pid

    def _heed(self, found: Found) -> None:
        child = self._children.get(found.seen.number)
        if child is not None:
            child.heed(found)

    def _child_died(self, report: Died) -> None:
        child = self._children.pop(report.child, None)
        if child is None:
            return
        child.died(report)
        for kept in (self._idle, self._aside):
            if child in kept:
                kept.remove(child)
        self._remove(child)
        if child.deserted and not child.served:
            self._stillborn += 1
            _log.warning("a child died before it served: %s", cause(report.status, report.error))
            self._refill_later()
        else:
            self._stillborn = 0
            self._refill()

    def _refill_later(self) -> None:
        """Wait a little longer each time: whatever keeps children from living is not mended by making more of them."""
        if self._refilling is None and not self._closing:
            delay_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(self._stillborn, 16))
            self._refilling = asyncio.get_running_loop().call_later(delay_s, self._refill_now)

    def _refill_now(self) -> None:
        self._refilling = None
        self._refill()

    def _remove(self, child: Child) -> None:
        loop = asyncio.get_running_loop()
        removing = loop.run_in_executor(None, _remove_all, child.scratch, child.group)
        self._removing.add(removing)
        removing.add_done_callback(self._removing.discard)

    # ------------------------------------------------------------ the zygote

    async def _start_zygote(self) -> None:
        zygote = Zygote(
            preload=self._preload,
            environment=self._environment,
            on_born=self._child_born,
            on_died=self._child_died,
            on_lost=self._zygote_lost,
        )
        await zygote.start()
        self._zygote = zygote

    def _zygote_lost(self) -> None:
        """Take all children for dead, as the kernel ends them with their parent, and start over."""
        if self._closing or self._restarting is not None:
            return
        _log.error("the zygote died, and %d children with it", len(self._children))
        self._restarting = asyncio.get_running_loop().create_task(self._restart_zygote())
        for child in list(self._children.values()):
            self._child_died(Died(child=child.number, status=None, error="the parent of all children died"))

    async def _restart_zygote(self) -> None:
        if self._zygote is not None:
            await self._zygote.close()
            self._zygote = None
        delay_s = BACKOFF_FIRST_S
        while True:
            try:
                await self._start_zygote()
                break
            except HeadraceError as error:
                _log.error("the zygote did not start: %s", error)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, BACKOFF_MAX_S)
        self._restarting = None
        self._refill()


def _fits(child: Child, key: _Key) -> bool:
    """Say whether a child may run this: it has run nothing yet, or code of the same tenant only."""
    return child.tenant is None or child.tenant == key.tenant


def _best(children: list[Child], key: _Key) -> Child | None:
    """Take out the child that holds the version, or else, of those that may run it, the one that holds the fewest."""
    best: int | None = None
    for index in range(len(children) - 1, -1, -1):
        child = children[index]
        if not _fits(child, key):
            continue
        if key.version in child.versions:
            return children.pop(index)
        if best is None or len(child.versions) < len(children[best].versions):
            best = index
    return None if best is None else children.pop(best)


def _remove_all(folder: Path, group: Path | None) -> None:
    """End what is left of a child, and remove its control group and its folder."""
    if group is not None:
        groups.remove(group)
    shutil.rmtree(folder, ignore_errors=True)
