"""The worker's side of its zygote: started, given orders, listened to, and started again should it die."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from headrace.children import Born, ChildLimits, Died, Fork, FromZygote, Kill, Ready, ToZygote
from headrace.errors import HeadraceError
from headrace.wire import encode

MESSAGE_BYTES_MAX = 64 * 1024
READY_S = 60.0  # NumPy on a cold network file system takes its time
END_S = 10.0
THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_log = logging.getLogger(__name__)
_reports: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromZygote)


class NoZygote(HeadraceError):
    """The process that makes child processes could not be started."""

    title = "The worker cannot make child processes"


def child_environment(inherited: Mapping[str, str], slots: int) -> dict[str, str]:
    """Return the environment of children: without settings and secrets of ours, and with its share of the cores."""
    passed = {name: value for name, value in inherited.items() if not name.startswith("HEADRACE_")}
    threads = str(max(1, (os.cpu_count() or 1) // slots))
    for name in THREAD_SETTINGS:
        passed.setdefault(name, threads)  # otherwise every child would start as many threads as there are cores
    return passed


class Zygote:
    """One zygote process.

    ``on_born`` hears of each child that was made, ``on_died`` of each that ended, ``on_lost`` of the end of the zygote
    itself.
    """

    def __init__(
        self,
        *,
        preload: Sequence[str],
        environment: Mapping[str, str],
        on_born: Callable[[Born], None],
        on_died: Callable[[Died], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._preload = list(preload)
        self._environment = dict(environment)
        self._on_born = on_born
        self._on_died = on_died
        self._on_lost = on_lost
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._ready: asyncio.Future[None] | None = None
        self._waiting: deque[tuple[bytes, list[int]]] = deque()

    @property
    def pid(self) -> int | None:
        """The process id, None while there is none."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the process and return once it can make children.

        Raises:
            NoZygote: it ended, or was not ready within a minute.
        """
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        command = [sys.executable, "-P", "-m", "headrace.zygote", str(theirs.fileno()), *self._preload]
        try:
            # Not in another thread: the kernel ends the zygote with the thread that started it.
            self._process = subprocess.Popen(  # noqa: ASYNC220 - it takes milliseconds, once
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=self._environment,
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise NoZygote(f"{sys.executable} cannot be started: {error}", hint="Is its folder still there?") from error
        finally:
            theirs.close()
        self._control = ours
        self._ready = loop.create_future()
        loop.add_reader(ours.fileno(), self._listen)
        try:
            async with asyncio.timeout(READY_S):
                await self._ready
        except TimeoutError as error:
            await self.close()
            raise NoZygote(f"it was not ready within {READY_S:g} s", hint="Is the machine very busy?") from error

    async def close(self) -> None:
        """End the process and all children, and return once it is gone. Safe to repeat."""
        self._hang_up()
        process, self._process = self._process, None
        if process is None:
            return
        loop = asyncio.get_running_loop()
        ended = loop.run_in_executor(None, process.wait)
        try:
            async with asyncio.timeout(END_S):
                await asyncio.shield(ended)
        except TimeoutError:
            _log.warning("zygote %d did not end in time", process.pid)
            process.send_signal(signal.SIGKILL)
            await ended

    def fork(self, number: int, *, scratch: str, limits: ChildLimits, group: str, fds: Sequence[int]) -> None:
        """Order a child and hand over these descriptors, which are closed here when they are on their way."""
        self._order(Fork(child=number, scratch=scratch, limits=limits, group=group), list(fds))

    def kill(self, number: int) -> None:
        """Order the end of a child and of all that it started; its death is reported when it has happened."""
        self._order(Kill(child=number), [])

    def tell(self, number: int) -> None:
        """Have a child write down where it is."""
        self._order(Kill(child=number, tell=True), [])

    # ------------------------------------------------------------ the control socket

    def _order(self, order: ToZygote, fds: list[int]) -> None:
        self._waiting.append((encode(order), fds))
        if len(self._waiting) == 1:
            self._send_waiting()

    def _send_waiting(self) -> None:
        control = self._control
        while self._waiting:
            message, fds = self._waiting[0]
            if control is not None:
                try:
                    socket.send_fds(control, [message], fds)
                except BlockingIOError:
                    asyncio.get_running_loop().add_writer(control.fileno(), self._send_waiting)
                    return
                except OSError:
                    pass  # it is gone, which its end of the socket tells next
            self._waiting.popleft()
            for fd in fds:
                os.close(fd)
        if control is not None:
            asyncio.get_running_loop().remove_writer(control.fileno())

    def _listen(self) -> None:
        control = self._control
        while control is not None and control is self._control:
            try:
                message = control.recv(MESSAGE_BYTES_MAX)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                message = b""
            if not message:
                self._lost()
                return
            report = _reports.decode(message)
            if isinstance(report, Died):
                self._on_died(report)
            elif isinstance(report, Born):
                self._on_born(report)
            elif isinstance(report, Ready) and self._ready is not None and not self._ready.done():
                self._ready.set_result(None)

    def _lost(self) -> None:
        self._hang_up()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(
                NoZygote("it ended before it was ready", hint="Its own words are in the worker's log.")
            )
        else:
            self._on_lost()

    def _hang_up(self) -> None:
        control, self._control = self._control, None
        if control is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(control.fileno())
            loop.remove_writer(control.fileno())
            control.close()
        with suppress(IndexError):
            while True:
                for fd in self._waiting.popleft()[1]:
                    os.close(fd)
