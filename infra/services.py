"""Gateway, worker, ledger and agent, wired: each opens what it needs, serves until SIGTERM, and closes it in turn.

Each imports what it is made of when it is started, and nothing of the others: they start at the same time on a
machine that may have two cores, and what a process has not imported cannot be reached in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, TypeVar

import structlog
from nats.js.errors import NotFoundError, ServiceUnavailableError

from headrace.errors import Unavailable
from headrace.tasks import ended
from infra import home, rights, telemetry
from infra.readiness import say_ready
from infra.settings import Settings
from infra.stores import Stores
from streams import topology
from streams.link import Link, open_link
from streams.log import Log
from streams.tables import SiteTable, Table, Tables, open_tables

if TYPE_CHECKING:
    from redis.asyncio import Redis

_log = structlog.get_logger(__name__)

BACKLOG = 1024
REDIS_ANSWER_S = 5.0
REDIS_READ_S = 1.0  # of the gateway, whose callers wait: past this it says 503, or tells from the log
REDIS_CONNECT_S = 2.0
SETUP_S = 30.0
SETUP_STEP_S = 0.2
CLOSE_S = 5.0
OUTCOMES_LINGER_S = 0.008
AGENT_THREADS_MAX = 32
# A process has thousands of invocations in hand at once, and the collector would go through them every few hundred new
# objects: a fifth of a worker's time, measured. Nearly all of it is freed by counting references anyway.
GC_THRESHOLD = (20_000, 20, 20)

Ready = Callable[[], None]
T = TypeVar("T")


def release() -> str:
    """Return the version of the platform."""
    return version("headrace")


# ---------------------------------------------------------------- what they are made of


@asynccontextmanager
async def link_to(settings: Settings, role: str, site: str = "") -> AsyncIterator[Link]:
    """Lend a connection to the log's servers as the user who is set, or else as the one of this role, or of a site.

    Raises:
        Unavailable: no server takes it.
    """
    own = rights.agent_user(site) if site else role
    user = settings.nats_user or (own if settings.nats_password_file else "")
    link = await open_link(
        settings.nats_url,
        user=user,
        password=settings.nats_password(),
        name=f"{role}-{os.getpid()}",
        site=site if user == own else "",
    )
    try:
        yield link
    finally:
        await link.close()


@asynccontextmanager
async def log_on(link: Link, settings: Settings, linger_s: float = 0.0) -> AsyncIterator[Log]:
    """Lend the log at the other end of a connection."""
    log = Log(link, linger_s=linger_s, replicated=settings.log_replicas > 1)
    await log.start()
    try:
        yield log
    finally:
        await log.close()


@asynccontextmanager
async def tables_on(link: Link) -> AsyncIterator[Tables]:
    """Lend the tables at the other end of a connection.

    Raises:
        Unavailable: they were never made.
    """
    try:
        tables = await open_tables(link)
    except NotFoundError as error:
        raise _not_set_up() from error
    try:
        yield tables
    finally:
        await tables.close()


@asynccontextmanager
async def opened(table: Table[T]) -> AsyncIterator[Table[T]]:
    """Lend one of the tables, open, to a process that needs no others.

    Raises:
        Unavailable: it was never made.
    """
    try:
        await table.open()
    except NotFoundError as error:
        raise _not_set_up() from error
    try:
        yield table
    finally:
        await table.close()


def _not_set_up() -> Unavailable:
    return Unavailable(
        "the log is not set up: its tables are missing", hint="Run `headrace setup` once, as the user admin."
    )


@asynccontextmanager
async def _redis(settings: Settings, answer_s: float = REDIS_ANSWER_S) -> AsyncIterator[Redis]:
    from redis.asyncio import Redis

    client = Redis.from_url(
        settings.redis_url,
        password=settings.redis_password(),
        socket_timeout=answer_s,
        socket_connect_timeout=min(answer_s, REDIS_CONNECT_S),
    )
    try:
        yield client
    finally:
        await client.aclose()


def limits(settings: Settings) -> topology.Limits:
    """Return the limits of the log."""
    return topology.Limits(keep_s=settings.log_keep_s, bytes_max=settings.log_bytes_max)


async def setup(settings: Settings) -> None:
    """Make the stream, its lanes and the tables, or bring them to these settings. Safe to repeat.

    Raises:
        Unavailable: the log's server does not answer, or does not let this user do so.
    """
    try:
        async with asyncio.timeout(SETUP_S), link_to(settings, rights.ADMIN) as link:
            while True:
                try:
                    notes = await home.settle(link, Stores(settings))
                    await topology.ensure(link, limits(settings), settings.log_replicas, notes)
                except (TimeoutError, ServiceUnavailableError):  # the server was killed and is on its way back
                    await asyncio.sleep(SETUP_STEP_S)
                else:
                    break
    except TimeoutError as error:
        raise Unavailable(
            f"the log's server does not do as asked within {SETUP_S:g} s",
            hint="Check HEADRACE_NATS_URL, and that HEADRACE_NATS_USER may make streams (the user admin may).",
        ) from error


# ---------------------------------------------------------------- the three processes


async def gateway(settings: Settings, stop: asyncio.Event, ready: Ready) -> None:
    """Serve the front door until ``stop`` is set; then finish what was begun."""
    from aiohttp import web

    from gateway import app as front_door
    from gateway.limits import GatewayLimits
    from gateway.server import Runner
    from streams.backlog import Lanes
    from streams.follow import follow
    from streams.presence import roll_on
    from streams.reader import Reader

    stores = Stores(settings)
    async with AsyncExitStack() as stack:
        link = await stack.enter_async_context(link_to(settings, rights.GATEWAY))
        await home.check(link, stores, rights.GATEWAY)
        log = await stack.enter_async_context(log_on(link, settings))
        app = front_door.build(
            log=log,
            follow=functools.partial(follow, log),
            tables=await stack.enter_async_context(tables_on(link)),
            blobs=stores.blobs,
            direct=stores.direct(),
            reader=Reader(await stack.enter_async_context(_redis(settings, REDIS_READ_S))),
            token=settings.token(),
            version=release(),
            limits=GatewayLimits(
                body_bytes_max=settings.payload_bytes_max,
                disk_bytes_min=settings.disk_bytes_min,
                log_share_max=settings.log_share_max,
                backlog_max=settings.backlog_max,
            ),
            lanes=Lanes(link),
            slots=(await stack.enter_async_context(roll_on(link))).slots,
            public_url=settings.public_url,
        )
        runner = Runner(app, shutdown_timeout=settings.drain_s)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        if settings.listen_fd is None:
            await web.TCPSite(runner, settings.host, settings.port, backlog=BACKLOG).start()
        else:
            listening = socket.socket(fileno=settings.listen_fd)
            listening.set_inheritable(False)
            await web.SockSite(runner, listening, backlog=BACKLOG).start()
        ready()
        await stop.wait()
        app[front_door.DRAINING].begin()


async def worker(settings: Settings, stop: asyncio.Event, ready: Ready) -> None:
    """Take, run and commit invocations until ``stop`` is set; then finish what runs and hand back the rest."""
    from functions.outlook import Outlook
    from headrace.children import ChildLimits
    from workers.adoption import Adoption
    from workers.pool import Pool
    from workers.worker import Tools, Worker

    slots = settings.worker_slots or os.cpu_count() or 1
    stores = Stores(settings)
    async with AsyncExitStack() as stack:
        link = await stack.enter_async_context(link_to(settings, rights.WORKER))
        await home.check(link, stores, rights.WORKER)
        log = await stack.enter_async_context(log_on(link, settings, OUTCOMES_LINGER_S))
        tables = await stack.enter_async_context(tables_on(link))
        pool = Pool(
            slots,
            limits=ChildLimits(
                memory_bytes_max=settings.child_bytes_max,
                tasks_max=settings.child_tasks_max,
                cpu_max_s=settings.child_cpu_max_s,
                scratch_bytes_max=settings.scratch_bytes_max,
                scratch_files_max=settings.scratch_files_max,
                output_bytes_max=settings.output_bytes_max,
                output_lines_max=settings.output_lines_max,
                result_bytes_max=settings.result_bytes_max,
                fan_out_max=settings.fan_out_max,
            ),
            disk_bytes_min=settings.disk_bytes_min // 4,
            scratch=settings.scratch_path(),
            preload=[module for module in settings.worker_preload.split(",") if module],
            environment=stores.environment(),
        )
        await pool.start()
        stack.push_async_callback(pool.close)
        tools = Tools(
            name=worker_name(),
            log=log,
            tables=tables,
            blobs=stores.blobs,
            stager=stores.stager(),
            pool=pool,
            slots=slots,
            order=settings.order,
            work_age_max_s=settings.work_age_s(),
            chain_depth_max=settings.chain_depth_max,
            run_invocations_max=settings.run_invocations_max,
            ends_at=settings.ends_at,
        )
        adoption = Adoption(
            tools.name,
            log,
            tables.sites,
            tools.blobs,
            Outlook(tables.forecasts.get),
            tools.rng,
            work_age_max_s=tools.work_age_max_s,
        )
        ready()
        stop_in_time(settings, stop)
        adopting = asyncio.create_task(adoption.run(), name="adoption")
        stack.push_async_callback(ended, [adopting])
        await Worker(tools).run(stop, settings.drain_s)


def stop_in_time(settings: Settings, stop: asyncio.Event) -> None:
    """Have what runs in an allocation drain before that ends."""
    if settings.ends_at is not None:
        left_s = settings.ends_at - settings.drain_s - time.time()
        asyncio.get_running_loop().call_later(max(0.0, left_s), stop.set)


def worker_name() -> str:
    """Return a name for this worker: the host's, as far as names allow, and the id of the process."""
    host = re.sub("[^A-Za-z0-9_-]", "-", socket.gethostname().split(".", 1)[0])[:48] or "worker"
    return f"{host}-{os.getpid()}"


async def ledger(settings: Settings, stop: asyncio.Event, ready: Ready) -> None:
    """Follow the log into the read model, tell what it teaches, and audit that every accepted run ends."""
    from functions.lessons import Lessons
    from headrace.wire import ForecastRow
    from streams.auditor import Auditor
    from streams.forecasts import Forecasts
    from streams.ledger import Writer

    async with AsyncExitStack() as stack:
        link = await stack.enter_async_context(link_to(settings, rights.LEDGER))
        log = await stack.enter_async_context(log_on(link, settings))
        redis = await stack.enter_async_context(_redis(settings))
        told = await stack.enter_async_context(opened(Table(link, "forecasts", ForecastRow)))
        lessons = Lessons()
        writer = Writer(log, redis, lessons, runs_max=settings.ledger_runs_max)
        writing = asyncio.create_task(writer.run(), name="ledger")
        forecasts = Forecasts(told, lessons, lambda: writer.whole)
        telling = asyncio.create_task(forecasts.run(), name="forecasts")
        auditor = Auditor(log, redis, every_s=settings.audit_every_s, grace_s=settings.audit_grace_s)
        auditing = asyncio.create_task(auditor.run(), name="auditor")
        stopping = asyncio.create_task(stop.wait())
        ready()
        try:
            done, _ = await asyncio.wait({writing, telling, auditing, stopping}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # one that failed ends the ledger, which is started again
        finally:
            await ended({writing, telling, auditing, stopping})


async def agent(settings: Settings, stop: asyncio.Event, ready: Ready) -> None:
    """Submit the jobs of one site, watch them and commit how they end, until ``stop`` is set; what runs goes on."""
    from concurrent.futures import ThreadPoolExecutor

    from headrace.wire import ForecastRow
    from infra.site import site_of
    from workers.agent import Agent
    from workers.jobtools import Tools
    from workers.push import Push
    from workers.sites.lazy import LazySite

    site = site_of(settings)
    # The commands of the batch system and transfers block in threads; none shall wait for the other.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(AGENT_THREADS_MAX, "agent"))
    stores = Stores(settings)
    async with AsyncExitStack() as stack:
        with _user_told(settings, site.name):
            link = await stack.enter_async_context(link_to(settings, rights.AGENT, site.name))
            await home.check(link, stores, rights.AGENT)
        tools = Tools(
            host=worker_name(),
            site=site,
            system=LazySite(site),
            log=await stack.enter_async_context(log_on(link, settings)),
            forecasts=await stack.enter_async_context(opened(Table(link, "forecasts", ForecastRow))),
            sites=await stack.enter_async_context(opened(SiteTable(link))),
            blobs=stores.blobs,
            stager=stores.stager(),
            push=Push(settings.public_url),
            work_age_max_s=settings.work_age_s(),
            ends_at=settings.ends_at,
        )
        stop_in_time(settings, stop)
        await Agent(tools).run(stop, settings.drain_s, ready)


@contextlib.contextmanager
def _user_told(settings: Settings, site: str) -> Iterator[None]:
    """Tell which user an agent has to be, where it is the one of an older release."""
    cure = f"`headrace site user {site}` makes {rights.agent_user(site)}"
    if settings.nats_user == rights.AGENT:
        _log.warning("the user agent may what the agents of all sites may, and goes with the next release", cure=cure)
    try:
        yield
    except ServiceUnavailableError as error:
        if error.err_code is not None:
            raise
        raise Unavailable(
            f"{rights.agent_user(site)} is let in by the log's servers, and reaches nothing there",
            hint=f"Their configuration needs what `headrace site user {site}` prints, and with --exports, once; a new "
            "account has it when they have read it twice.",
        ) from error
    except Unavailable as error:
        if settings.nats_user or settings.nats_password_file is None:
            raise
        raise Unavailable(
            f"{error}; it was asked for as {rights.agent_user(site)}",
            hint=f"{cure}; with HEADRACE_NATS_USER=agent an agent is the user of older releases until the next one.",
        ) from error


ROLES: Mapping[str, Callable[[Settings, asyncio.Event, Ready], Awaitable[None]]] = {
    rights.GATEWAY: gateway,
    rights.WORKER: worker,
    rights.LEDGER: ledger,
    rights.AGENT: agent,
}


def run(role: str, settings: Settings) -> None:
    """Be one server process until SIGTERM or SIGINT.

    Raises:
        HeadraceError: it cannot serve; the message says why.
    """
    import uvloop

    telemetry.configure(level=settings.log_level, role=role)
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(role, settings))


async def _serve(role: str, settings: Settings) -> None:
    stop, ready = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def is_ready() -> None:
        ready.set()
        say_ready(settings)
        _log.info("ready", release=release())

    serving = asyncio.ensure_future(ROLES[role](settings, stop, is_ready))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not serving.done():
        # A server that serves drains by itself; one that still waits for its connections has nothing to drain.
        await asyncio.wait({serving}, timeout=settings.drain_s + CLOSE_S if ready.is_set() else 0)
        serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    _log.info("stopped")
