"""``headrace up`` as a user starts it, in a process of its own, and started again when somebody kills it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import msgspec

from headrace.errors import HeadraceError
from infra.bench.processes import descendants
from infra.chaos.faces import pids_by_name
from infra.embedded import free_port
from infra.probe import http_get
from infra.process import tie_to
from infra.settings import PREFIX
from infra.up import Servers

READY_S = 60.0
STOP_S = 60.0
STEP_S = 0.05
LOOPBACK = "127.0.0.1"


class NotUp(HeadraceError):
    """``headrace up`` did not get ready, or ended by itself; the message holds what it said last."""

    title = "The platform under test is not up"


class Up:
    """One platform under test. ``pid_file`` always names the supervisor that runs now."""

    def __init__(
        self, data: Path, options: Sequence[str] = (), env: Mapping[str, str] | None = None, port: int = 0
    ) -> None:
        """Describe it; nothing is started yet.

        Args:
            data: its data folder.
            options: further options of ``headrace up``.
            env: settings, as environment variables; none of ours is passed on.
            port: of the gateway; a free one if 0. It stays the same over restarts.
        """
        self.data = data
        self.port = port or free_port()
        self.pid_file = data.parent / f"{data.name}.pid"
        self.said = data.parent / f"{data.name}.out"
        self.restarts = 0
        self._options = list(options)
        self._env = {k: v for k, v in os.environ.items() if not k.startswith(PREFIX)} | dict(env or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where the gateway listens."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def token(self) -> str:
        """The bearer token."""
        return (self.data / "token").read_text().strip()

    @property
    def pid(self) -> int:
        """The id of the supervisor, 0 while there is none."""
        return self._process.pid if self._process is not None and self._process.poll() is None else 0

    def servers(self) -> Servers:
        """Return where its servers are."""
        return msgspec.json.decode((self.data / "run" / "servers.json").read_bytes(), type=Servers)

    def pids(self) -> dict[str, int]:
        """Return the ids of the processes that run now, by name."""
        return pids_by_name(self.pid)

    def output(self) -> str:
        """Return what it has printed so far."""
        return self.said.read_text(errors="replace") if self.said.exists() else ""

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start it and return once it takes triggers; from then on it is started again when it is killed.

        Raises:
            NotUp: it ended, or was not ready within a minute.
        """
        self._spawn()
        await self._until_ready()
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep_up(), name="keep-up")

    async def stop(self) -> None:
        """End it as Ctrl-C does, and by force where that takes too long. Safe to repeat."""
        await self._stop_keeping()
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        below = descendants(process.pid)
        for pid in below:  # one that is paused would hold up its own stop
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        process.send_signal(signal.SIGINT)
        try:
            async with asyncio.timeout(STOP_S):
                while process.poll() is None:
                    await asyncio.sleep(STEP_S)
        except TimeoutError:
            process.kill()
            process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    async def kill(self) -> None:
        """Kill the supervisor, with which the kernel ends all the others; it stays down until ``start``."""
        await self._stop_keeping()
        process, self._process = self._process, None
        if process is not None:
            below = descendants(process.pid)
            process.kill()
            process.wait()
            while any(Path(f"/proc/{pid}").exists() for pid in below):
                await asyncio.sleep(STEP_S)

    def _spawn(self) -> None:
        self.data.parent.mkdir(parents=True, exist_ok=True)
        with self.said.open("ab") as out:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,  # Ctrl-C reaches the trial alone, which stops this in order
                preexec_fn=tie_to(os.getpid()),
            )
        self.pid_file.write_text(str(self._process.pid))

    def _command(self) -> list[str]:
        where = ["--port", str(self.port), "--data", str(self.data)]
        return [sys.executable, "-P", "-m", "infra", "up", *where, *self._options]

    async def _until_ready(self) -> None:
        try:
            async with asyncio.timeout(READY_S):
                while self._process is not None and self._process.poll() is None:
                    if (await http_get(LOOPBACK, self.port, "/readyz"))[0] == 200 and (self.data / "url").exists():
                        return
                    await asyncio.sleep(STEP_S)
        except TimeoutError:
            pass
        raise NotUp(f"headrace up is not ready; it said: {self.output()[-2000:]}", hint="Its log is in its data folder")

    async def _keep_up(self) -> None:
        """Start it again whenever it is gone, as a service manager or a person would."""
        while True:
            await asyncio.sleep(STEP_S)
            if self._process is not None and self._process.poll() is not None:
                self.restarts += 1
                self._spawn()

    async def _stop_keeping(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
