"""The processes of a platform, each with the real code of its kind inside, and how they are started and killed."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from functions.admission import Admitted, admit
from functions.lessons import Lessons
from functions.outlook import Outlook
from functions.qos import deadline_of
from gateway.acceptance import Acceptance
from gateway.waiting import answers
from headrace.errors import FunctionError, NotFound, Overloaded, Unavailable
from headrace.model import Code
from headrace.tasks import ended
from headrace.wire import Cancel, EventMeta, ForecastRow, FunctionRecord, Invoke, Returned, RouteRecord, Said, encode
from streams.ledger import Writer
from streams.link import Link
from streams.log import AlreadyThere, Log, Record
from streams.tables import row_key
from streams.topology import cancel_subject, done_subject, end_subject
from tests.simulation import ladders, programs
from tests.simulation.client import SimClient
from tests.simulation.loop import WORLD, Process
from tests.simulation.server import EPOCH
from workers.adoption import Adoption
from workers.worker import Tools, Worker

if TYPE_CHECKING:
    from tests.simulation.world import Trigger, World

WAIT_S = 5.0


class Effect(NamedTuple):
    """What a function did outside: an attempt began, at this instant."""

    run: str
    invocation: str
    attempt: int
    process: str
    at: float


class Actor:
    """A place where one process after the other runs."""

    kind = ""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.skew_s = 0.0
        self.starts = 0
        self.process: Process | None = None
        self.client: SimClient | None = None
        self._restart: asyncio.TimerHandle | None = None

    @property
    def well(self) -> bool:
        """Whether a process runs, and is not frozen."""
        return self.process is not None and not self.process.frozen

    def clock(self) -> float:
        """Return the time by this machine's clock, in epoch seconds."""
        return EPOCH + self.world.loop.time() + self.skew_s

    def start(self) -> None:
        """Start a process, unless one runs."""
        if self.process is not None:
            return
        if self._restart is not None:
            self._restart.cancel()
            self._restart = None
        world = self.world
        self.starts += 1
        world.note("start", self.name)
        process = self.process = Process(world.loop, f"{self.name}-{self.starts}")
        world.processes.append(process)
        link = Link()
        self.client = SimClient(process, link, world.server, world.network)
        link.nc = self.client  # type: ignore[assignment] # it has what is used of the real one
        task = process.spawn(self._run(link))
        task.add_done_callback(self._ended, context=WORLD)

    async def _run(self, link: Link) -> None:
        assert self.client is not None
        await self.client.open()
        log = Log(link)
        await log.start()
        await self.main(log)
        await log.close()
        await link.close()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        """A process that ends, on purpose or not, is started again."""
        error = None if task.cancelled() else task.exception()
        self.world.note("end", self.name, repr(error))
        if error is not None and not isinstance(error, Exception):
            raise error
        self.world.ended.append((self.name, error))
        self.crash(0.5)

    def crash(self, restart_after_s: float) -> None:
        """Kill the process; a new one starts after a while."""
        if self.process is None:
            return
        self.world.note("crash", self.name)
        process, self.process = self.process, None
        process.kill()
        if self.client is not None and self.client.wired is not None:
            self.client.wired.cut(lingers=self.world.chance(0.5))
        self._restart = self.world.loop.later(restart_after_s, self.start)

    async def main(self, log: Log) -> None:
        """Do what this kind of process does."""
        raise NotImplementedError


class Blobs:
    """The blob store as a worker sees it; it may be away for a moment."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def put(self, body: bytes) -> str:
        await self._reach()
        digest = hashlib.sha256(body).hexdigest()
        self._world.blobs[digest] = body
        return digest

    async def get(self, digest: str) -> bytes:
        await self._reach()
        found = self._world.blobs.get(digest)
        if found is None:
            raise NotFound(f"no content with the digest {digest}")
        return found

    async def put_file(self, path: Path) -> str:
        raise NotImplementedError

    async def where(self, name: str) -> Path:
        raise NotImplementedError

    async def _reach(self) -> None:
        await asyncio.sleep(0.001)
        if self._world.server.lost_share and self._world.chance(0.05):
            raise Unavailable("the blob store is away")


class _Routes:
    def __init__(self) -> None:
        route = RouteRecord(name="ladder", tenant=programs.TENANT, route=ladders.ROUTE)
        self._rows = programs.routes() | {"ladder": route}

    def items(self) -> dict[str, RouteRecord]:
        return self._rows

    def get(self, name: str) -> RouteRecord | None:
        return self._rows.get(name)


class _Empty:
    """A table without rows."""

    def get(self, name: str) -> None:
        return None

    def items(self) -> dict[str, object]:
        return {}

    def listen(self, changed: Callable[[], None]) -> Callable[[], None]:
        return lambda: None


class _Tenants(_Empty):
    def items(self) -> dict[str, object]:
        return {programs.GUEST: None}


class _Forecasts(_Empty):
    """What is expected of the functions: what follows them takes a while."""

    def __init__(self) -> None:
        self._rows = programs.forecasts() | ladders.forecasts()

    def get(self, name: str) -> ForecastRow | None:  # type: ignore[override] # the empty one has none
        return self._rows.get(name)


class Tables:
    """What is registered: always the same here."""

    def __init__(self) -> None:
        self._functions = programs.functions() | ladders.functions()
        self.routes = _Routes()
        self.tenants = _Tenants()
        self.forecasts = _Forecasts()
        self.sites: Any = _Empty()

    @property
    def names(self) -> list[str]:
        """The names of all functions."""
        return list(self._functions)

    def function(self, tenant: str, name: str) -> FunctionRecord | None:
        return self._functions.get(name)

    async def version(self, tenant: str, name: str, version: str) -> FunctionRecord | None:
        return self._functions.get(name)


class Pool:
    """Runs programs instead of children, and writes down outside of the platform what it ran."""

    def __init__(self, world: World, process: Process | None) -> None:
        self._world = world
        self._process = "" if process is None else process.name

    async def run(
        self,
        invoke: Invoke,
        code: Callable[[], Awaitable[Code]],
        *,
        timeout_s: float,
        on_said: Callable[[Said], None],
        on_line: Callable[[str, str], None],
        on_ask: object,
    ) -> Returned:
        """Run one attempt."""
        world = self._world
        world.effects.append(
            Effect(invoke.run_id, invoke.invocation_id, invoke.attempt, self._process, world.server.now)
        )
        world.note("run", invoke.function, invoke.invocation_id, invoke.attempt, self._process)
        took_s, ended = programs.perform(invoke)
        if len(invoke.body) % 9 == 0:
            await code()
            on_said(Said(level="info", text="working"))
        if took_s:
            await asyncio.sleep(took_s)
        if isinstance(ended, FunctionError):
            raise ended
        return ended

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """Have room for one more, which there always is here."""
        yield


class WorkerActor(Actor):
    """A worker."""

    kind = "worker"

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self._stop: asyncio.Event | None = None

    async def main(self, log: Log) -> None:
        """Work until told to stop."""
        world = self.world
        tools = Tools(
            name=self.name,
            log=log,
            tables=world.tables,  # type: ignore[arg-type]
            blobs=Blobs(world),
            pool=Pool(world, self.process),  # type: ignore[arg-type]
            slots=world.slots,
            clock=self.clock,
            rng=random.Random(world.seed * 1000 + self.starts),
        )
        self._stop = asyncio.Event()
        adopting = None
        if world.batches:
            adoption = Adoption(
                self.name,
                log,
                world.tables.sites,
                tools.blobs,
                Outlook(world.tables.forecasts.get),
                tools.rng,
                grace_s=2.0,
                forgotten_s=8.0,
                silent_s=3.0,  # shorter than between two words of an agent: it is taken for silent while it works
                clock=self.clock,
            )
            adopting = asyncio.create_task(adoption.run())
        await world.worker_kind(tools).run(self._stop, drain_s=1.0)
        if adopting is not None:
            await ended([adopting])

    def stop(self) -> None:
        """Tell the process to finish and end, as a service manager does."""
        if self.process is not None and self._stop is not None:
            self.world.note("stop", self.name)
            self.process.soon(self._stop.set)


class LedgerActor(Actor):
    """The writer of the read model."""

    kind = "ledger"

    async def main(self, log: Log) -> None:
        """Write for ever."""
        await Writer(log, self.world.redis, Lessons()).run()  # type: ignore[arg-type]


class GatewayActor(Actor):
    """A door: it accepts triggers, lets callers wait for the end, and cancels."""

    kind = "gateway"

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self._log: Log | None = None
        self._acceptance: Acceptance | None = None

    async def main(self, log: Log) -> None:
        """Serve what ``submit`` and ``cancel`` bring."""
        self._log = log
        self._acceptance = Acceptance(log=log, tables=self.world.tables, quota=None)  # type: ignore[arg-type]
        await asyncio.Event().wait()

    def crash(self, restart_after_s: float) -> None:
        """Kill it; requests under way get no answer."""
        self._log = None
        super().crash(restart_after_s)

    @property
    def open(self) -> bool:
        """Whether it takes requests."""
        return self._log is not None and self.process is not None

    def submit(self, triggers: list[Trigger], respond: Callable[[bool], None], *, waits: bool) -> None:
        """Take a request with some events; ``respond`` hears whether they were accepted, if it hears anything."""
        assert self.process is not None
        self.process.spawn(self._submit(triggers, respond, waits))

    def cancel(self, run: str) -> None:
        """Take a wish to cancel a run."""
        assert self.process is not None
        self.process.spawn(self._cancel(run))

    async def _cancel(self, run: str) -> None:
        assert self._log is not None
        subject = cancel_subject(run)
        wish = Cancel(run_id=run, at=self.clock())
        with suppress(AlreadyThere, Unavailable):
            await self._log.append([Record(subject, encode(wish), subject)])

    def _admit(self, trigger: Trigger) -> Admitted:
        route = self.world.tables.routes.items()[row_key(trigger.tenant, trigger.route)]
        event = EventMeta(id=trigger.event, source="sim", type="sim.trigger", subject=trigger.subject)
        function = self.world.tables.function(trigger.tenant, route.route.function)
        assert function is not None
        now = self.clock()
        return admit(
            event=event,
            payload=programs.payload(trigger.program),
            digest=trigger.event,
            route=route,
            function=function,
            tenant=trigger.tenant,
            now=now,
            deadline=deadline_of(route.route, None, now),
        )

    async def _submit(self, triggers: list[Trigger], respond: Callable[[bool], None], waits: bool) -> None:
        log, acceptance, later = self._log, self._acceptance, self.world.network
        assert log is not None
        assert acceptance is not None
        run = triggers[0].run
        async with AsyncExitStack() as stack:
            heard = None
            if waits:
                live = log.live(done_subject(run, "*"), end_subject(run), cancel_subject(run, "*"), wanted=answers)
                heard = await stack.enter_async_context(live)
            try:
                accepted = await acceptance.append([self._admit(t) for t in triggers])
            except Overloaded:
                later.loop.later(later.delay_s(), respond, False)
                return
            assert [a.first.run_id for a in accepted] == [t.run for t in triggers]
            later.loop.later(later.delay_s(), respond, True)
            if heard is not None:
                try:
                    async with asyncio.timeout(WAIT_S):
                        self.world.heard.append((run, await anext(heard)))
                except TimeoutError:
                    pass


def worker_of(tools: Tools) -> Worker:
    """Return the worker as it is."""
    return Worker(tools)
