"""One child process as its worker sees it: an invocation goes in, and what comes of it comes out.

Everything here happens in callbacks of the event loop, without a task or a copy per message: this is the path that
every invocation takes.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import structlog

from headrace.channel import HEADER_BYTES
from headrace.errors import ChildLost, FunctionError, HeadraceError, LoadError, TimeLimit, UserError
from headrace.failures import size_text
from headrace.wire import Ask, ChildLimits, Died, FromChild, Granted, Invoke, Raised, Returned, Said, ToChild, encode
from workers.deaths import cause, forget_words, last_words
from workers.output import Lines, OnLine, OnSaid, Output

READ_BYTES = 64 * 1024
PIPE_READS_MAX = 4  # a pipe holds 64 KiB; who writes faster than we read must not keep us from other work
SLACK_BYTES = 64 * 1024
TELL_S = 0.02  # how long a process that ran too long may take to write down where it is
HUNG_UP_S = 0.1

OnAsk = Callable[[Ask], Awaitable[Granted]]

_log = structlog.get_logger(__name__)
_decoder: msgspec.msgpack.Decoder[Returned | Raised | Said | Ask] = msgspec.msgpack.Decoder(FromChild)


class Child:
    """A child process. It runs one invocation at a time; ``versions`` says whose code it holds.

    ``usable`` turns False when it is told to stop or has died; it never gets another invocation then.
    """

    def __init__(
        self,
        number: int,
        *,
        limits: ChildLimits,
        scratch: Path,
        kill: Callable[[int], None],
        tell: Callable[[int], None],
    ) -> None:
        """Open the worker's ends; the process is made by the zygote, which gets ``theirs``.

        Args:
            number: its number, never given to another child.
            limits: what it may take.
            scratch: its folder.
            kill: ends the process with this number.
            tell: has the process with this number write down where it is.
        """
        self.number = number
        self.scratch = scratch
        self.versions: set[tuple[str, str]] = set()
        self.usable = True
        self.served = 0
        self._limits = limits
        self._frame_bytes_max = max(limits.result_bytes_max, limits.output_bytes_max) + SLACK_BYTES
        self._kill = kill
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._line, self._their_line = socket.socketpair()
        self._line.setblocking(False)
        (out, their_out), (err, their_err) = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
        self._words = os.memfd_create("words")
        self.theirs = (self._their_line.fileno(), their_out, their_err, self._words)
        self._pipes = {out: ("stdout", Lines()), err: ("stderr", Lines())}
        self._came = bytearray()
        self._unsent: memoryview | None = None
        self._function = ""
        self._ended: asyncio.Future[Returned] | None = None
        self._output: Output | None = None
        self._on_ask: OnAsk | None = None
        self._asking: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._hung_up = False
        self._loop.add_reader(self._line.fileno(), self._read_line)
        for fd in self._pipes:
            os.set_blocking(fd, False)
            self._loop.add_reader(fd, self._read_pipe, fd)

    def handed_over(self) -> None:
        """Close the ends that the process has taken over."""
        _, their_out, their_err, _ = self.theirs
        self._their_line.close()
        os.close(their_out)
        os.close(their_err)

    # ------------------------------------------------------------ one invocation

    async def run(
        self, invoke: Invoke, *, timeout_s: float, on_said: OnSaid, on_line: OnLine, on_ask: OnAsk
    ) -> Returned:
        """Run one invocation. Canceled, it ends the process.

        Raises:
            FunctionError: the code did not load, the body raised, took too long, or the process died.
        """
        ended = self._ended = self._loop.create_future()
        self._function = invoke.function
        self._output = Output(self._limits, on_said, on_line)
        self._on_ask = on_ask
        timer = None if math.isinf(timeout_s) else self._loop.call_later(timeout_s, self._expire, timeout_s)
        self._timer = timer
        self._send(invoke)
        try:
            reply: Returned = await ended
            return reply
        except asyncio.CancelledError:
            self._ended = self._output = None
            self.stop()
            raise
        finally:
            if self._timer is not None:
                self._timer.cancel()
            if self._asking is not None:
                self._asking.cancel()
                self._asking = None
            self.served += 1

    def stop(self) -> None:
        """Have the process and its group ended. Safe to repeat; nothing is waited for."""
        if self.usable:
            self.usable = False
            self._kill(self.number)

    def abandon(self, why: str) -> None:
        """Give up on what it runs, and end it."""
        if self._ended is not None:
            self._fail(ChildLost(f"{self._function} {why}"))
        self.stop()

    def died(self, report: Died) -> None:
        """Take the news of its death: what it still said counts, then whatever runs has failed. Closes everything."""
        while self._read_line():
            pass
        stopped = not self.usable
        self.usable = False
        if self._ended is not None:
            if self._hung_up and stopped:
                self._fail(self._lost("closed its line to the worker; did it close files that it had not opened?"))
            else:
                self._fail(self._lost(cause(report.status, report.error)))
        self._close()

    def _expire(self, timeout_s: float) -> None:
        self._tell(self.number)
        self._timer = self._loop.call_later(TELL_S, self._stop_late, timeout_s)

    def _stop_late(self, timeout_s: float) -> None:
        while self._read_line():
            pass
        if self._ended is not None:
            self._fail(
                TimeLimit(
                    f"{self._function} ran longer than its timeout of {timeout_s:g} s and was stopped",
                    hint="Give it more time with @function(timeout=...), or look where its time goes.",
                    traceback=last_words(self._words),
                )
            )
            self.stop()
        else:
            forget_words(self._words)  # it ended well in the last moment

    def _lost(self, why: str) -> ChildLost:
        return ChildLost(f"{self._function} {why}", traceback=last_words(self._words))

    def _fail(self, error: FunctionError) -> None:
        ended = self._end_output()
        if ended is not None and not ended.done():
            ended.set_exception(error)

    def _end_output(self) -> asyncio.Future[Returned] | None:
        """Pass on all that was printed up to now, and return what waits for the end of the invocation."""
        ended, self._ended = self._ended, None
        for fd, (stream, lines) in self._pipes.items():
            self._drain(fd)
            for line in lines.end():
                self._print(stream, line)
        self._output = None
        return ended

    # ------------------------------------------------------------ the line

    def _send(self, message: ToChild) -> None:
        body = encode(message)
        data = len(body).to_bytes(HEADER_BYTES, "big") + body
        if self._unsent is not None:
            self._unsent = memoryview(bytes(self._unsent) + data)
            return
        try:
            sent = self._line.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # it is gone; its zygote says how
        if sent < len(data):
            self._unsent = memoryview(data)[sent:]
            self._loop.add_writer(self._line.fileno(), self._send_rest)

    def _send_rest(self) -> None:
        if self._unsent is not None:
            try:
                self._unsent = self._unsent[self._line.send(self._unsent) :]
            except BlockingIOError:
                return
            except OSError:
                self._unsent = None
        if not self._unsent:
            self._unsent = None
            self._loop.remove_writer(self._line.fileno())

    def _read_line(self) -> bool:
        """Take what came; return False when there is nothing left to read."""
        if self._hung_up:
            return False
        try:
            data = self._line.recv(READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._hang_up()
            return False
        if not self._came and len(data) == HEADER_BYTES + int.from_bytes(data[:HEADER_BYTES], "big"):
            self._take(memoryview(data)[HEADER_BYTES:])  # nearly always: one message came, and nothing else
        else:
            self._came += data
            self._take_whole()
        return True

    def _take_whole(self) -> None:
        """Take the messages that are complete. No more than one of the largest size is ever held."""
        while len(self._came) >= HEADER_BYTES and self.usable:
            size = int.from_bytes(self._came[:HEADER_BYTES], "big")
            if size > self._frame_bytes_max:
                self._refuse(
                    UserError(
                        f"{self._function} sent {size_text(size)}, more than a result may have: "
                        f"{size_text(self._limits.result_bytes_max)}",
                        hint="Keep large data with ctx.store(...) and return the URI.",
                        transient=False,
                    )
                )
                return
            end = HEADER_BYTES + size
            if len(self._came) < end:
                return
            message = bytes(memoryview(self._came)[HEADER_BYTES:end])
            del self._came[:end]
            self._take(message)

    def _take(self, body: bytes | memoryview) -> None:
        try:
            message = _decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            self._refuse(self._lost("sent something that cannot be read; did it write to files it had not opened?"))
            return
        if isinstance(message, Returned | Raised):
            self._finish(message)
        elif isinstance(message, Said):
            if self._output is not None:
                for fd in self._pipes:
                    self._drain(fd)
                self._output.said(message)
        elif self._on_ask is not None and self._asking is None and self._ended is not None:
            self._asking = self._loop.create_task(self._grant(message, self._on_ask))

    def _finish(self, message: Returned | Raised) -> None:
        ended = self._end_output()
        if message.leave:
            self.stop()
        if ended is None or ended.done():
            return
        if isinstance(message, Returned):
            ended.set_result(message)
        else:
            told = message.error
            kind = LoadError if told.kind == "load" else UserError
            ended.set_exception(kind(told.message, traceback=told.traceback, transient=message.transient))

    async def _grant(self, ask: Ask, on_ask: OnAsk) -> None:
        try:
            granted = await on_ask(ask)
        except HeadraceError as error:
            granted = Granted(error=str(error), hint=error.hint)
        except Exception:
            _log.exception("ask failed", what=ask.what)
            granted = Granted(error=f"the platform failed at ctx.{ask.what}", hint="Its log says why.")
        self._asking = None
        if self._ended is not None:
            self._send(granted)

    def _refuse(self, error: FunctionError) -> None:
        self._fail(error)
        self._came.clear()
        self.stop()

    def _hang_up(self) -> None:
        """Note that the line is closed. As a rule the process has died, and the zygote says how in a moment."""
        self._hung_up = True
        self._loop.remove_reader(self._line.fileno())
        self._loop.call_later(HUNG_UP_S, self.stop)

    # ------------------------------------------------------------ the pipes

    def _read_pipe(self, fd: int) -> None:
        try:
            data = os.read(fd, READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._loop.remove_reader(fd)
            return
        self._printed(fd, data)

    def _drain(self, fd: int) -> None:
        for _ in range(PIPE_READS_MAX):
            try:
                data = os.read(fd, READ_BYTES)
            except BlockingIOError:
                return
            if not data:
                return
            self._printed(fd, data)

    def _printed(self, fd: int, data: bytes) -> None:
        stream, lines = self._pipes[fd]
        for line in lines.feed(data):
            self._print(stream, line)

    def _print(self, stream: str, line: bytes) -> None:
        if self._output is not None:
            self._output.line(stream, line.decode("utf-8", "replace"))

    def _close(self) -> None:
        if not self._hung_up:
            self._hung_up = True
            self._loop.remove_reader(self._line.fileno())
        self._loop.remove_writer(self._line.fileno())
        self._line.close()
        for fd in self._pipes:
            self._loop.remove_reader(fd)
            os.close(fd)
        self._pipes = {}
        os.close(self._words)
