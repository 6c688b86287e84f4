"""The real nats-server and redis-server as children of this process, on free loopback ports with generated passwords.

Nothing secret stands in a command line or an environment: both servers read a configuration file of mode 0600, and the
processes that connect to them read password files of mode 0600. Ports and passwords stay the same over restarts, so
clients simply connect again.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from infra.credentials import new_secret, private_folder, write_private
from infra.logfile import LogFile
from infra.mending import mend
from infra.probe import ask, http_get
from infra.process import Child, NotStarted
from infra.programs import nats_program, redis_program
from infra.rights import ACCOUNT, RIGHTS, SYSTEM, SiteUser, accounts, site_accounts
from infra.settings import GIB, MIB
from infra.staging import Staging
from streams.topology import STREAM

_log = structlog.get_logger(__name__)

LOOPBACK = "127.0.0.1"
PAYLOAD_BYTES_MAX = 8 * MIB
PENDING_BYTES_MAX = 128 * MIB
MEMORY_STORE_BYTES_MAX = 256 * MIB
# Each stream has a limit of its own. One for the whole server would keep it from opening a log whose limit was lowered.
FILE_STORE_BYTES_MAX = 16 * 1024 * GIB
ACK_PENDING_MAX = 100_000
BATCHES_OF_STREAM_MAX = 1000
BATCHES_MAX = 4000
BATCH_MESSAGES_MAX = 1000
BATCH_TIMEOUT = "5s"
PORT_TRIES = 3
STAGING_LOOK_S = 1.0
FULL_DISK_LOOK_S = 1.0
RELOAD_S = 0.3
CONFIG = "nats.json"
FULL_DISK_PATIENCE_S = 5.0
FREE_AGAIN_BYTES_MIN = 8 * MIB
NO_SPACE = b"no space left on device"


def free_port() -> int:
    """Return a loopback port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


async def monitor(url: str, page: str) -> dict[str, Any]:
    """Return a page of a nats-server's monitoring address; empty if it does not answer."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    status, body = await http_get(host, int(port), page)
    found: dict[str, Any] = json.loads(body) if status == 200 else {}
    return found


class NatsServer:
    """A nats-server with JetStream that syncs each write to disk before it acknowledges it.

    Everything it needs lies under the data folder: ``nats`` (the store), ``run`` (configuration, passwords), ``logs``.
    """

    def __init__(self, data: Path, *, keep_fds: Sequence[int] = ()) -> None:
        """Describe the server; nothing is started yet.

        Args:
            data: the data folder.
            keep_fds: descriptors that it holds open, such as the lock on the data folder.
        """
        self._keep_fds = tuple(keep_fds)
        self.data = data.absolute()
        self.store = self.data / "nats"
        self.run = self.data / "run"
        self.port = 0
        self.monitor_port = 0
        self._passwords = {role: new_secret() for role in (*RIGHTS, SYSTEM)}
        self._sites: dict[str, dict[str, list[object]]] = {}
        self._child: Child | None = None
        self._staging = Staging(str(self.data))
        self._staging_kept: asyncio.Task[None] | None = None
        self._disk_watched: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """The address for clients."""
        return f"nats://{LOOPBACK}:{self.port}"

    @property
    def monitor_url(self) -> str:
        """The address of the monitoring pages; open to every user of this machine, and without secrets."""
        return f"http://{LOOPBACK}:{self.monitor_port}"

    @property
    def pid(self) -> int | None:
        """The id of the process now running."""
        return self._child.pid if self._child is not None else None

    @property
    def restarts(self) -> int:
        """How often it died and was started again."""
        return self._child.restarts if self._child is not None else 0

    def password(self, role: str) -> str:
        """Return the password of a role."""
        return self._passwords[role]

    def password_file(self, role: str) -> Path:
        """Return the file with the password of a role (mode 0600)."""
        return self.run / f"nats-{role}.password"

    def stream_dir(self) -> Path:
        """Return the folder of the log in the store."""
        return self.store / "jetstream" / ACCOUNT / "streams" / STREAM

    async def start(self) -> None:
        """Start it and return when JetStream answers; it is started again whenever it dies.

        Raises:
            NotStarted, NoServer: it cannot be started; the message says why.
        """
        program = nats_program()
        for folder in (self.data, self.store, self.run, self.data / "logs"):
            private_folder(folder)
        for role, password in self._passwords.items():
            write_private(self.password_file(role), password + "\n")
        mend(self.stream_dir())
        for attempt in range(1, PORT_TRIES + 1):
            self.port, self.monitor_port = free_port(), free_port()
            self._write_config(self._sites)
            child = Child(
                "nats-server",
                [str(program), "-c", str(self.run / CONFIG)],
                log=LogFile(self.data / "logs" / "nats.log"),
                ready=self._answers,
                on_ready=self._after_start,
                keep_fds=self._keep_fds,
                folder=self.run,
            )
            try:
                await child.start()
            except NotStarted as error:
                if attempt < PORT_TRIES and "address already in use" in str(error):
                    continue  # somebody took the port between our look and the server's
                raise
            self._child = child
            self._disk_watched = asyncio.create_task(self._watch_disk(), name="watch-disk")
            return

    async def serve_sites(self, users: Iterable[SiteUser], tenants: Iterable[str]) -> None:
        """Let the agents of these sites connect, for the jobs of these tenants, from now on."""
        sites = site_accounts(users, tenants)
        if sites == self._sites:
            return
        if self._child is None:
            self._sites = sites
            return
        new = {name: {**account, "users": []} for name, account in sites.items() if name not in self._sites}
        if new:
            # An account has what it imports from the second time on that the server reads of it: not before then can
            # its user connect.
            await self._reload(self._sites | new)
        await self._reload(sites)

    async def _reload(self, sites: dict[str, dict[str, list[object]]]) -> None:
        self._write_config(sites)
        if self.pid is not None:
            os.kill(self.pid, signal.SIGHUP)
        await asyncio.sleep(RELOAD_S)
        self._sites = sites  # not before: what failed is done again

    def _write_config(self, sites: dict[str, dict[str, list[object]]]) -> None:
        config = self._config()
        config["accounts"] |= sites
        write_private(self.run / CONFIG, json.dumps(config, indent=1, ensure_ascii=False))

    async def stage_in_memory(self) -> bool:
        """Let the log's batches be staged in memory, from now on and after each restart; False where that cannot be."""
        linked = await self._staging.link(self.stream_dir())
        if linked and self._staging_kept is None:
            self._staging_kept = asyncio.create_task(self._keep_staging(), name="keep-staging")
        return linked

    async def stop(self) -> None:
        """End it and return once it is gone."""
        for task in (self._staging_kept, self._disk_watched):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._staging_kept = self._disk_watched = None
        if self._child is not None:
            await self._child.stop()
        self._staging.remove()

    async def _after_start(self) -> None:
        if self._staging_kept is not None:  # the server has just removed the link
            await self.stage_in_memory()

    async def _keep_staging(self) -> None:
        """Mend the link when its target is gone: some systems clear shared memory when its user logs out."""
        while True:
            await asyncio.sleep(STAGING_LOOK_S)
            if not self._staging.is_linked(self.stream_dir()):
                await self.stage_in_memory()

    async def _watch_disk(self) -> None:
        """Start the server again when its disk was full and has room again: by itself it never writes again."""
        log = self.data / "logs" / "nats.log"
        read = _size(log)
        while True:
            await asyncio.sleep(FULL_DISK_LOOK_S)
            if shutil.disk_usage(self.store).free < FREE_AGAIN_BYTES_MIN:
                continue  # what it says of a full disk, it cannot write down either; it says so at the next write
            size = _size(log)
            said = _read_from(log, read if size >= read else 0)
            read = size
            if NO_SPACE in said and self.pid is not None:
                _log.warning("nats-server is started again: its disk was full, and has room again")
                os.kill(self.pid, signal.SIGTERM)
                await asyncio.sleep(FULL_DISK_PATIENCE_S)
                read = _size(log)

    async def _answers(self) -> bool:
        return (await http_get(LOOPBACK, self.monitor_port, "/healthz"))[0] == 200

    def _config(self) -> dict[str, Any]:
        # The server's own format takes JSON as it is, so no name or path has to be quoted by hand.
        return {
            "server_name": "headrace",
            "listen": f"{LOOPBACK}:{self.port}",
            "http": f"{LOOPBACK}:{self.monitor_port}",
            "max_payload": PAYLOAD_BYTES_MAX,
            "max_pending": PENDING_BYTES_MAX,
            "jetstream": {
                "store_dir": str(self.store),
                "max_memory_store": MEMORY_STORE_BYTES_MAX,
                "max_file_store": FILE_STORE_BYTES_MAX,
                "sync_interval": "always",
                "limits": {
                    "max_ack_pending": ACK_PENDING_MAX,
                    "batch": {
                        "max_inflight_per_stream": BATCHES_OF_STREAM_MAX,
                        "max_inflight_total": BATCHES_MAX,
                        "max_msgs": BATCH_MESSAGES_MAX,
                        "timeout": BATCH_TIMEOUT,
                    },
                },
            },
            "accounts": accounts(self._passwords),
            "system_account": "SYS",
        }


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_from(path: Path, offset: int) -> bytes:
    """Return what was written to a log since, at most its last 64 KiB."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(offset, _size(path) - 65536))
        return file.read()
    return b""


class RedisServer:
    """A redis-server that holds the read model in memory only: it is rebuilt from the log."""

    def __init__(self, data: Path, bytes_max: int = GIB) -> None:
        self.data = data.absolute()
        self.run = self.data / "run"
        self.port = 0
        self._bytes_max = bytes_max
        self._password = new_secret()
        self._child: Child | None = None

    @property
    def url(self) -> str:
        """The address for clients, without the password."""
        return f"redis://{LOOPBACK}:{self.port}/0"

    @property
    def pid(self) -> int | None:
        """The id of the process now running."""
        return self._child.pid if self._child is not None else None

    @property
    def restarts(self) -> int:
        """How often it died and was started again."""
        return self._child.restarts if self._child is not None else 0

    @property
    def password(self) -> str:
        """The password of its only user."""
        return self._password

    @property
    def password_file(self) -> Path:
        """The file with the password (mode 0600)."""
        return self.run / "redis.password"

    async def start(self) -> None:
        """Start it and return when it answers; it is started again, empty, whenever it dies.

        Raises:
            NotStarted, NoServer: it cannot be started; the message says why.
        """
        program = redis_program()
        for folder in (self.data, self.run, self.data / "logs"):
            private_folder(folder)
        write_private(self.password_file, self._password + "\n")
        for attempt in range(1, PORT_TRIES + 1):
            self.port = free_port()
            config = self.run / "redis.conf"
            write_private(config, self._config())
            child = Child(
                "redis-server",
                [str(program), str(config)],
                log=LogFile(self.data / "logs" / "redis.log"),
                ready=self._answers,
                folder=self.run,
            )
            try:
                await child.start()
            except NotStarted as error:
                if attempt < PORT_TRIES and "already in use" in str(error):
                    continue  # somebody took the port between our look and the server's
                raise
            self._child = child
            return

    async def stop(self) -> None:
        """End it and return once it is gone."""
        if self._child is not None:
            await self._child.stop()

    async def _answers(self) -> bool:
        request = f"AUTH {self._password}\r\nPING\r\n".encode()
        return b"+PONG" in await ask(LOOPBACK, self.port, request, b"PONG\r\n")

    def _config(self) -> str:
        # It runs in its own folder and writes no file, so no path stands here.
        return "\n".join(
            [
                f"bind {LOOPBACK}",
                f"port {self.port}",
                "protected-mode yes",
                f"requirepass {self._password}",
                "databases 1",
                "daemonize no",
                'save ""',
                "appendonly no",
                f"maxmemory {self._bytes_max}",
                "maxmemory-policy noeviction",
                "",
            ]
        )
