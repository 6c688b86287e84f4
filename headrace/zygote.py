"""The parent of a worker's children: imports once what they all need, then forks a fresh one within milliseconds.

Started as ``python -P -m headrace.zygote FD MODULE...``. It has a single thread and never opens code of users. It
takes orders on a packet socket, ends with its worker, and leaves nothing behind: every child is a process group of its
own, and what escapes from the group comes back to the zygote as an orphan and is ended too.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

import msgspec

from headrace import groups
from headrace.birth import TELL_SIGNAL, adopt_orphans, die_with_parent, live
from headrace.children import Born, Died, Fork, FromZygote, Kill, Ready, ToZygote
from headrace.family import children_of
from headrace.wire import encode

MESSAGE_BYTES_MAX = 64 * 1024
FORK_FDS = 4  # the line, stdout, stderr, last words
CLEANUP_S = 5.0
CLEANUP_STEP_MS = 20

_orders: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToZygote)


class Zygote:
    """Takes orders until its worker is gone."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._pid = os.getpid()
        self._parent = os.getppid()
        self._pids: dict[int, int] = {}  # by number of the child
        self._numbers: dict[int, int] = {}  # by process id
        self._groups: dict[int, str] = {}  # by process id, of those that have one
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._woken, select.POLLIN)

    def run(self) -> None:
        """Serve until the worker is gone, then end every process that is left."""
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, _only_wake)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the worker's to handle
        adopt_orphans()
        self._poll.register(self._control, select.POLLIN)
        self._tell(Ready(pid=self._pid))
        while os.getppid() == self._parent and self._step():
            pass
        self._end()

    def _step(self) -> bool:
        """Handle what has happened; return False when it is time to end."""
        happened = {fd for fd, _ in self._poll.poll()}
        if self._woken in happened:
            if signal.SIGTERM in os.read(self._woken, 4096):
                return False
            self._reap()
        return self._control.fileno() not in happened or self._take_order()

    def _take_order(self) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(self._control, MESSAGE_BYTES_MAX, FORK_FDS)
        except ConnectionResetError:
            return False
        if not data:
            return False
        order = _orders.decode(data)
        if isinstance(order, Fork):
            self._fork(order, fds)
        elif isinstance(order, Kill):
            self._kill(order)
        return True

    def _tell(self, message: FromZygote) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the worker is gone, as the next order will tell
            self._control.sendall(encode(message))

    # ------------------------------------------------------------ children

    def _fork(self, order: Fork, fds: Sequence[int]) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            self._tell(Died(child=order.child, status=None, error=f"no process could be made: {error.strerror}"))
        else:
            if pid == 0:
                self._become(order, fds)
            self._pids[order.child] = pid
            self._numbers[pid] = order.child
            if order.group:
                self._groups[pid] = order.group
            self._tell(Born(child=order.child, pid=pid))
        finally:
            for fd in fds:
                os.close(fd)

    def _become(self, order: Fork, fds: Sequence[int]) -> NoReturn:
        """Turn the process just forked into a child. It never comes back."""
        status = os.EX_SOFTWARE
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for fd in (self._control.detach(), self._woken, self._wake):
                os.close(fd)
            live(order, fds, self._pid)
            status = os.EX_OK
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def _kill(self, order: Kill) -> None:
        # A process in this table has not been reaped, so its id cannot have become somebody else's.
        pid = self._pids.get(order.child)
        if pid is None:
            return
        if order.tell:
            os.kill(pid, TELL_SIGNAL)
        else:
            self._end_with_all(pid)

    def _reap(self) -> None:
        """Report the children that ended, and end what they have left behind."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                break
            number = self._numbers.pop(ended.si_pid, None)
            if number is not None:
                # Before it is reaped: until then its id, and so that of its group, is not given to anybody else.
                self._end_with_all(ended.si_pid)
            _, status = os.waitpid(ended.si_pid, 0)
            if number is not None:
                del self._pids[number]
                self._groups.pop(ended.si_pid, None)
                self._tell(Died(child=number, status=status))
        self._end_orphans()

    def _end_with_all(self, pid: int) -> None:
        """End a child, its process group, and its control group where it has one."""
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):  # there is no group yet in the first moment of a child
            os.killpg(pid, signal.SIGKILL)
        if pid in self._groups:
            groups.end(self._groups[pid])

    def _end_orphans(self) -> None:
        for pid in children_of(self._pid):
            if pid not in self._numbers:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _end(self) -> None:
        """End all children and what they left, and wait until the last is gone."""
        self._poll.unregister(self._control)
        for pid in self._numbers:
            self._end_with_all(pid)
        give_up_at = time.monotonic() + CLEANUP_S
        while time.monotonic() < give_up_at:
            self._reap()
            if next(children_of(self._pid), None) is None:
                return
            self._poll.poll(CLEANUP_STEP_MS)
            with suppress(BlockingIOError):
                os.read(self._woken, 4096)


def _only_wake(number: int, frame: FrameType | None) -> None:
    """Do nothing: the signal's number arrives on the wake-up descriptor."""


def preload(modules: Sequence[str]) -> None:
    """Import what most functions need, where it is installed; a child that needs it then has it at once."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except Exception:
            traceback.print_exc()  # a broken library must not keep functions from running that do not use it


def main(arguments: Sequence[str]) -> None:
    """Run a zygote on the control socket whose descriptor is the first argument."""
    # A worker that is killed closes its end of the socket; should some other process hold it open, this tells us.
    die_with_parent(signal.SIGTERM)
    control = socket.socket(fileno=int(arguments[0]))
    control.set_inheritable(False)
    preload(arguments[1:])
    gc.collect()
    gc.freeze()  # what is here now stays shared with all children instead of being copied by their collectors
    Zygote(control).run()


if __name__ == "__main__":
    main(sys.argv[1:])
