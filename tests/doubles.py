"""Doubles of the log, the tables and the read model, in memory: what they promise is what the real ones promise."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from headrace.errors import TooLarge, Unavailable
from headrace.joblog import SiteRecord
from headrace.model import Audit, RunPage, RunView
from headrace.wire import ForecastRow, FunctionRecord, RouteRecord, TenantRecord
from streams.log import READ_MANY_MAX, AlreadyThere, Record
from streams.reader import Dead, DeadFound
from streams.record import InvocationRecord, RunRecord, fold_run, view
from streams.stored import Stored

T = TypeVar("T")


def matches(pattern: str, subject: str) -> bool:
    """Say whether a subject matches a pattern with ``*`` and a closing ``>``."""
    wanted, found = pattern.split("."), subject.split(".")
    for i, token in enumerate(wanted):
        if token == ">":
            return len(found) > i
        if i >= len(found) or token not in ("*", found[i]):
            return False
    return len(wanted) == len(found)


@dataclass
class MemoryLink:
    connected: bool = True


class Heard:
    """What is stored on some subjects; breaking off one wait leaves it as it is."""

    def __init__(self) -> None:
        self.waiting: asyncio.Queue[Stored] = asyncio.Queue()

    def __aiter__(self) -> AsyncIterator[Stored]:
        return self

    async def __anext__(self) -> Stored:
        return await self.waiting.get()


class MemoryLog:
    """A log in a list. ``away`` makes every call fail as the real one does when its server is gone."""

    def __init__(self) -> None:
        self.link = MemoryLink()
        self.stored: list[Stored] = []
        self.bytes_max = 0
        self.last_seq = 0
        self.away = False
        self.appends = 0
        self.hints: list[str] = []  # the subjects of what would leave the log soon
        self._listening: list[tuple[tuple[str, ...], Callable[[str, bytes], bool] | None, Heard]] = []
        self._news = asyncio.Event()

    def _check(self) -> None:
        if self.away:
            raise Unavailable("the log does not answer")

    async def append(self, unit: list[Record], *, timeout_s: float = 10.0) -> list[int]:
        self._check()
        await asyncio.sleep(0)
        for record in unit:
            if record.absent is not None and any(matches(record.absent, s.subject) for s in self.stored):
                raise AlreadyThere("this was recorded before")
        self.appends += 1
        self.hints += [record.subject for record in unit if record.hint]
        return [self.put(record.subject, record.body) for record in unit]

    def put(self, subject: str, body: bytes) -> int:
        """Store one message at once, as another process would."""
        stored = Stored(len(self.stored) + 1, subject, body, time.time())
        self.stored.append(stored)
        self.last_seq = stored.seq
        for subjects, wanted, queue in self._listening:
            if any(matches(s, subject) for s in subjects) and (wanted is None or wanted(subject, body)):
                queue.waiting.put_nowait(stored)
        self._news.set()
        self._news = asyncio.Event()
        return stored.seq

    async def last(self, subject: str) -> Stored | None:
        self._check()
        return next((s for s in reversed(self.stored) if matches(subject, s.subject)), None)

    async def last_of_each(self, subjects: list[str]) -> list[Stored]:
        self._check()
        found = {s.subject: s for s in self.stored if any(matches(p, s.subject) for p in subjects)}
        if len(found) > READ_MANY_MAX:
            raise TooLarge(f"more than {READ_MANY_MAX} messages match")
        return sorted(found.values(), key=lambda s: s.seq)

    async def at(self, seqs: Iterable[int]) -> list[Stored]:
        self._check()
        return [self.stored[seq - 1] for seq in seqs]

    async def end_seq(self) -> int:
        self._check()
        return len(self.stored)

    async def begins_at(self) -> float | None:
        self._check()
        return self.stored[0].at if self.stored else None

    async def size(self) -> tuple[int, int]:
        self._check()
        return sum(len(stored.body) for stored in self.stored), self.bytes_max

    @asynccontextmanager
    async def live(
        self, *subjects: str, wanted: Callable[[str, bytes], bool] | None = None
    ) -> AsyncIterator[AsyncIterator[Stored]]:
        entry = (subjects, wanted, Heard())
        self._listening.append(entry)
        try:
            yield entry[2]
        finally:
            self._listening.remove(entry)

    async def follow(
        self,
        subjects: list[str],
        *,
        after: int = -1,
        since: float | None = None,
        window: int = 512,
        idle_s: float = 5.0,
    ) -> AsyncGenerator[list[Stored], None]:
        position = len(self.stored) if after < 0 else after
        if since is not None:
            position = sum(stored.at < since for stored in self.stored)
        while True:
            news = self._news
            batch = [s for s in self.stored[position:] if any(matches(p, s.subject) for p in subjects)][:window]
            if batch:
                position = batch[-1].seq
                yield batch
                continue
            try:
                async with asyncio.timeout(idle_s):
                    await news.wait()
            except TimeoutError:
                yield []


@dataclass
class MemoryTable(Generic[T]):
    rows: dict[str, T] = field(default_factory=dict)
    listeners: list[Callable[[], None]] = field(default_factory=list)

    def get(self, name: str) -> T | None:
        return self.rows.get(name)

    def items(self) -> dict[str, T]:
        return self.rows

    def listen(self, changed: Callable[[], None]) -> Callable[[], None]:
        self.listeners.append(changed)
        return lambda: self.listeners.remove(changed)

    def _tell(self) -> None:
        for changed in list(self.listeners):
            changed()

    async def fetch(self, name: str) -> T | None:
        return self.rows.get(name)

    async def put(self, name: str, row: T) -> None:
        self.rows[name] = row
        self._tell()

    async def create(self, name: str, row: T) -> bool:
        if name in self.rows:
            return False
        await self.put(name, row)
        return True

    async def delete(self, name: str) -> bool:
        found = self.rows.pop(name, None) is not None
        self._tell()
        return found


@dataclass
class MemoryTables:
    functions: MemoryTable[FunctionRecord] = field(default_factory=MemoryTable)
    versions: MemoryTable[FunctionRecord] = field(default_factory=MemoryTable)
    routes: MemoryTable[RouteRecord] = field(default_factory=MemoryTable)
    tenants: MemoryTable[TenantRecord] = field(default_factory=MemoryTable)
    forecasts: MemoryTable[ForecastRow] = field(default_factory=MemoryTable)
    sites: MemoryTable[SiteRecord] = field(default_factory=MemoryTable)


class MemoryReader:
    """A read model that folds the log when asked, up to where ``lag_at`` holds it, or not at all when ``away``."""

    def __init__(self, log: MemoryLog) -> None:
        self._log = log
        self.lag_at: int | None = None
        self.audited: Audit | None = None
        self.away = False

    def _facts(self, run: str) -> list[Stored]:
        return [s for s in self._log.stored[: self.lag_at] if run in s.subject.split(".")]

    def _fold(self, run: str) -> tuple[RunRecord, list[InvocationRecord]] | None:
        if self.away:
            raise Unavailable("the read model does not answer")
        return fold_run(self._facts(run))

    def _all(self) -> list[RunRecord]:
        runs = dict.fromkeys(s.subject.split(".")[4] for s in self._log.stored if s.subject.startswith("hr.work."))
        return [found[0] for run in runs if (found := self._fold(run)) is not None]

    async def position(self) -> int:
        if self.away:
            raise Unavailable("the read model does not answer")
        return len(self._log.stored) if self.lag_at is None else self.lag_at

    async def run(self, run: str, /) -> RunView | None:
        found = self._fold(run)
        return None if found is None else view(*found)

    async def record(self, run: str, /) -> RunRecord | None:
        found = self._fold(run)
        return None if found is None else found[0]

    async def open_runs(self, tenant: str, route: str, /) -> int:
        return sum(not r.ended for r in self._all() if (r.tenant, r.route) == (tenant, route))

    async def page(
        self,
        tenant: str,
        /,
        *,
        state: str | None = None,
        route: str | None = None,
        since: float | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> RunPage:
        before = None if cursor is None else int(cursor)
        found = [
            r
            for r in sorted(self._all(), key=lambda r: -r.first_seq)
            if r.tenant == tenant
            and (state is None or r.state == state)
            and (route is None or r.route == route)
            and (since is None or r.accepted_at >= since)
            and (before is None or r.first_seq < before)
        ]
        shown = found[:limit]
        return RunPage(runs=[view(r, []) for r in shown], next=str(shown[-1].first_seq) if len(found) > limit else None)

    def _all_dead(self) -> list[Dead]:
        runs = dict.fromkeys(s.subject.split(".")[4] for s in self._log.stored if s.subject.startswith("hr.work."))
        found = [found for run in runs if (found := self._fold(run)) is not None]
        return [Dead(record, i) for record, invocations in found for i in invocations if i.state == "dead"]

    async def dead(
        self,
        tenant: str,
        /,
        *,
        function: str | None = None,
        route: str | None = None,
        since: float | None = None,
        replayed: bool = False,
        limit: int = 100,
        cursor: str | None = None,
    ) -> DeadFound:
        before = None if cursor is None else int(cursor)
        found = [
            d
            for d in sorted(self._all_dead(), key=lambda d: -d.invocation.seq)
            if d.run.tenant == tenant
            and (function is None or d.invocation.function == function)
            and (route is None or d.run.route == route)
            and (since is None or (d.invocation.ended_at or 0.0) >= since)
            and (replayed or d.run.replayed_as is None)
            and (before is None or d.invocation.seq < before)
        ]
        more = str(found[limit - 1].invocation.seq) if len(found) > limit else None
        return DeadFound(found[:limit], more)

    async def run_of_dead(self, invocation: str, /) -> str | None:
        return next((d.run.run_id for d in self._all_dead() if d.invocation.invocation_id == invocation), None)

    async def audit(self) -> Audit | None:
        if self.away:
            raise Unavailable("the read model does not answer")
        return self.audited
