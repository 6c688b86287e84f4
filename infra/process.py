"""A server process that is kept up: started, waited for until it is ready, started again when it dies, and stopped.

It never outlives this process: the kernel sends it SIGKILL when this one is gone, however it went. It leads a session
of its own, so Ctrl-C in a terminal reaches only the supervisor, which stops its children in the right order.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import structlog

from headrace.errors import HeadraceError
from infra.logfile import LogFile

_log = structlog.get_logger(__name__)

PR_SET_PDEATHSIG = 1
READY_STEP_S = 0.015
BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 5.0
STEADY_S = 2.0  # one that served this long did not fail to start: its back-off begins anew
TRIM_EVERY_S = 10.0

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class NotStarted(HeadraceError):
    """A server process ended, or did not get ready in time; the message holds its last log lines."""

    title = "A server did not start"


def tie_to(parent: int) -> Callable[[], None]:
    """Return what a new process does before it becomes its program: ask to die with its parent."""

    def tie() -> None:
        if _libc is not None:
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            # The parent may have died between the fork and the line above; nobody would tell us then.
            if os.getppid() != parent:
                os._exit(1)

    return tie


class Child:
    """One server process, by name. ``pid`` is that of the process now running, ``restarts`` how often it died."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: LogFile,
        ready: Callable[[], Awaitable[bool]],
        env: Mapping[str, str] | None = None,
        folder: Path | None = None,
        keep_fds: Sequence[int] = (),
        on_ready: Callable[[], Awaitable[None]] | None = None,
        ready_s: float = 15.0,
        grace_s: float = 10.0,
    ) -> None:
        """Describe the process; nothing is started yet.

        Args:
            name: what it is called in log lines and errors.
            command: the program by its full path, and its arguments. They are visible to every user of the machine.
            log: where its output goes.
            ready: asked again and again until it says yes.
            env: its whole environment; None passes on ours.
            folder: its working directory; None passes on ours.
            keep_fds: descriptors that it inherits.
            on_ready: awaited each time it has become ready, after a restart too.
            ready_s: how long it may take to get ready.
            grace_s: how long it may take to end after SIGTERM, before SIGKILL.
        """
        self.name = name
        self.restarts = 0
        self._command = list(command)
        self._log_file = log
        self._ready = ready
        self._env = env
        self._folder = folder
        self._keep_fds = tuple(keep_fds)
        self._on_ready = on_ready
        self._ready_s = ready_s
        self._grace_s = grace_s
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The id of the process now running, None while there is none."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if running and self._process is not None else None

    async def start(self) -> None:
        """Start it and return once it is ready; from then on it is started again whenever it dies.

        Raises:
            NotStarted: it ended or was not ready in time; it does not run then.
        """
        await self._spawn()
        try:
            await self._until_ready()
        except BaseException:
            await self._end()
            raise
        self._keeper = asyncio.create_task(self._keep_up(), name=f"keep-{self.name}")

    async def stop(self) -> None:
        """End it, kindly and then by force, and return once it is gone. Safe to repeat."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        await self._end()

    async def _spawn(self) -> None:
        output = self._log_file.open()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self._folder,
                env=None if self._env is None else dict(self._env),
                pass_fds=self._keep_fds,
                start_new_session=True,
                preexec_fn=tie_to(os.getpid()),
            )
        except OSError as error:
            raise NotStarted(
                f"{self.name} cannot be started: {error}", hint="`headrace doctor` looks for what is missing."
            ) from error
        finally:
            os.close(output)

    async def _until_ready(self) -> None:
        process = self._process
        assert process is not None  # noqa: S101 - _spawn has just set it
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._ready_s
        while not await self._ready():
            if process.returncode is not None:
                raise self._not_started(f"ended with {_how(process.returncode)}")
            if loop.time() > give_up_at:
                raise self._not_started(f"was not ready within {self._ready_s:g} s")
            await asyncio.sleep(READY_STEP_S)
        if process.returncode is not None:  # somebody else answered in its place
            raise self._not_started(f"ended with {_how(process.returncode)}")
        if self._on_ready is not None:
            await self._on_ready()

    def _not_started(self, what: str) -> NotStarted:
        tail = self._log_file.tail()
        said = f"; its last lines:\n{tail}" if tail else ""
        return NotStarted(f"{self.name} {what}{said}", hint=f"Its log is {self._log_file.path}.")

    async def _keep_up(self) -> None:
        loop = asyncio.get_running_loop()
        backoff_s = BACKOFF_FIRST_S
        while True:
            process = self._process
            since = loop.time()
            if process is not None:
                waiting = asyncio.ensure_future(process.wait())
                try:
                    while not (await asyncio.wait({waiting}, timeout=TRIM_EVERY_S))[0]:
                        self._log_file.trim()
                finally:
                    waiting.cancel()
                _sweep(process.pid)
                _log.warning("process ended", process=self.name, pid=process.pid, how=_how(process.returncode or 0))
            self.restarts += 1
            if loop.time() - since > STEADY_S:
                backoff_s = BACKOFF_FIRST_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)
            try:
                await self._spawn()
                await self._until_ready()
            except HeadraceError as error:
                _log.error("process did not start", process=self.name, error=str(error))
                await self._end()
            else:
                _log.warning("process is back", process=self.name, pid=self.pid, restarts=self.restarts)

    async def _end(self) -> None:
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(self._grace_s):
                    await process.wait()
            except TimeoutError:
                _log.warning("process did not stop in time", process=self.name, pid=process.pid)
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
            _sweep(process.pid)
        self._process = None


def _sweep(leader: int) -> None:
    """End what is left of a process group whose leader is gone: a killed server cannot stop its own children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _how(code: int) -> str:
    """Say how a process ended: its exit code, or the signal that ended it."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
