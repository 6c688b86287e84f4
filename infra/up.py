"""The whole platform on one machine: two servers and four processes of ours, started, kept up, stopped in order.

    nats-server, redis-server  ->  the log is set up  ->  gateway, worker, ledger, agent  ->  DIR/token, DIR/url

``DIR/url`` is there exactly while the platform takes triggers. The listening socket belongs to the supervisor: over a
restart of the gateway, callers wait in its queue instead of being refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import structlog
from msgspec import Struct

from headrace.errors import Unavailable
from headrace.tasks import ended
from infra import rights, services, siteusers
from infra.credentials import kept_secret, private_folder, write_private
from infra.embedded import NatsServer, RedisServer
from infra.locking import lock
from infra.logfile import LogFile
from infra.probe import http_get
from infra.process import Child
from infra.readiness import ReadyPipe
from infra.settings import PREFIX, BadSetting, Settings, env_name, environment
from infra.site import site_of

_log = structlog.get_logger(__name__)

BACKLOG = 1024
READY_S = 30.0
READY_STEP_S = 0.02
GRACE_S = 10.0
STOPPED_AT_ONCE = 130


class Servers(Struct, frozen=True, kw_only=True):
    """Where the servers of a running platform are, for ``headrace doctor``; kept in ``DIR/run/servers.json``."""

    pid: int
    nats_url: str
    nats_monitor_url: str
    redis_url: str


class Platform:
    """All of Headrace on one data folder: ``async with Platform(settings) as platform: platform.url``."""

    def __init__(self, settings: Settings, environ: Mapping[str, str] | None = None) -> None:
        """Describe it; nothing is started yet.

        Args:
            settings: as read; host, port and data folder count, the addresses of servers do not.
            environ: the environment of our processes; ours if not given. Settings in it are not passed on.
        """
        self.settings = settings
        self.data = settings.data_dir.absolute()
        self.url = ""
        self.token = ""
        self._environ = dict(os.environ if environ is None else environ)
        self._stack = contextlib.AsyncExitStack()
        self._children: dict[str, Child] = {}
        self._servers: tuple[NatsServer, RedisServer] | None = None
        self._site = ""

    @property
    def processes(self) -> dict[str, int | None]:
        """The ids of the six processes by name; None for one that is being started again."""
        found = {name: child.pid for name, child in self._children.items()}
        if self._servers is not None:
            found |= {"nats-server": self._servers[0].pid, "redis-server": self._servers[1].pid}
        return found

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start everything and return once triggers are taken; whatever dies later is started again.

        Raises:
            InUse: another platform runs on the data folder.
            BadSetting: the port is taken or not allowed.
            NotStarted, NoServer: a process cannot be started; all others are stopped again.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop everything, those that take work first and the log last. Safe to repeat."""
        await self._stack.aclose()

    def _file(self, name: str) -> Path:
        return self.data / name

    async def _start(self) -> None:
        held = lock(self.data)
        self._stack.callback(os.close, held)
        self._file("url").unlink(missing_ok=True)  # of one that was killed
        listening = _listen(self.settings.host, self.settings.port)
        self._stack.callback(listening.close)
        private_folder(self.data / "logs")
        self.token = kept_secret(self._file("token"), env_name("token_file"))

        self._site = site_of(self.settings).name
        siteusers.kept(self.data, self._site)
        nats, redis = NatsServer(self.data, keep_fds=(held,)), RedisServer(self.data, self.settings.redis_bytes_max)
        self._servers = nats, redis
        self._stack.push_async_callback(nats.stop)
        self._stack.push_async_callback(redis.stop)
        await _all(nats.start(), redis.start())
        await services.setup(self._for_role(rights.ADMIN, nats, redis))
        await nats.stage_in_memory()
        serving = asyncio.create_task(siteusers.serve_for_ever(nats, self._for_role(rights.ADMIN, nats, redis)))
        self._stack.push_async_callback(ended, [serving])
        servers = Servers(pid=os.getpid(), nats_url=nats.url, nats_monitor_url=nats.monitor_url, redis_url=redis.url)
        write_private(self._file("run") / "servers.json", msgspec.json.encode(servers).decode())

        # Stopped in the opposite order: first nothing new comes in, then what runs ends, then its record is read.
        host, port = _reachable(self.settings.host), listening.getsockname()[1]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        for role in (rights.LEDGER, rights.AGENT, rights.WORKER, rights.GATEWAY):
            settings = self._for_role(role, nats, redis)
            if role == rights.AGENT and not settings.public_url:
                settings = msgspec.structs.replace(settings, public_url=url)  # its jobs run on this machine, or near it
            child = self._child(role, settings, listening)
            self._children[role] = child
            self._stack.push_async_callback(child.stop)
        await _all(*(child.start() for child in self._children.values()))
        await _until_ready(host, port)
        self._stack.callback(self._file("url").unlink, missing_ok=True)  # last to come, first to go
        write_private(self._file("url"), url + "\n")
        self.url = url

    def _for_role(self, role: str, nats: NatsServer, redis: RedisServer) -> Settings:
        """Return the settings of one of our processes: its own user on the log's server, and the embedded servers."""
        return msgspec.structs.replace(
            self.settings,
            data_dir=self.data,
            token_file=self._file("token"),
            nats_url=nats.url,
            nats_user=rights.agent_user(self._site) if role == rights.AGENT else role,
            nats_password_file=siteusers.kept(self.data, self._site)
            if role == rights.AGENT
            else nats.password_file(role),
            nats_monitor_url=nats.monitor_url,
            redis_url=redis.url,
            redis_password_file=redis.password_file,
        )

    def _child(self, role: str, settings: Settings, listening: socket.socket) -> Child:
        pipe = ReadyPipe()
        self._stack.callback(pipe.close)
        handed: dict[str, object] = {"ready_fd": pipe.fd}
        if role == rights.GATEWAY:
            handed["listen_fd"] = listening.fileno()
        kept = {name: text for name, text in self._environ.items() if not name.startswith(PREFIX)}

        async def ready() -> bool:
            return pipe.has_said(child.pid)

        child = Child(
            role,
            # -P: a file of the user's called functions.py or workers.py must not be taken for ours.
            [sys.executable, "-P", "-m", "infra", role],
            log=LogFile(self.data / "logs" / f"{role}.log"),
            ready=ready,
            env=kept | environment({**msgspec.structs.asdict(settings), **handed}),
            keep_fds=[int(str(fd)) for fd in handed.values()],
            ready_s=READY_S,
            grace_s=settings.drain_s + GRACE_S,
        )
        return child


async def up(settings: Settings, serve: Callable[[Platform], Awaitable[None]]) -> None:
    """Run the platform until ``serve`` has returned, or SIGINT, SIGTERM or SIGHUP has come; then stop it in order.

    A second signal ends this process at once, and the kernel ends the others with it; what was accepted is in the log.

    Args:
        settings: as read.
        serve: called once the platform is ready; canceled by a signal.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            _log.warning("stopped at once")
            os._exit(STOPPED_AT_ONCE)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)

    async def run() -> None:
        async with Platform(settings) as platform:
            # Before Python 3.12 a cancel gets lost in ``wait_for`` at times, such as that of the log's client.
            if not stop.is_set():
                await serve(platform)

    running = asyncio.create_task(run())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if running.done():
        running.result()
    else:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def _all(*starts: Awaitable[None]) -> None:
    """Await all together; when one fails, the others are broken off first, so that nothing starts behind our back."""
    tasks = [asyncio.ensure_future(start) for start in starts]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _listen(host: str, port: int) -> socket.socket:
    """Return the socket that callers connect to, already listening.

    Raises:
        BadSetting: the address cannot be had.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        listening.close()
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BadSetting(
            f"port {port} on {host} cannot be used: {reason}",
            hint="Stop what listens there, or choose another with --port; --port 0 takes a free one.",
        ) from error
    return listening


def _reachable(host: str) -> str:
    """Return the address by which callers on this machine reach what listens on ``host``."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - looked up, not bound


async def _until_ready(host: str, port: int) -> None:
    """Return once the gateway says that it takes triggers."""
    give_up_at = asyncio.get_running_loop().time() + READY_S
    status, said = 0, b""
    while asyncio.get_running_loop().time() < give_up_at:
        status, said = await http_get(host, port, "/readyz")
        if status == 200:
            return
        await asyncio.sleep(READY_STEP_S)
    why = ascii(said[:300]) if status else "it does not answer"
    raise Unavailable(f"the gateway is not ready after {READY_S:g} s: {why}", hint="`headrace doctor` looks for why.")
