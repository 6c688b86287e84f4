"""One child process as its worker sees it: an invocation goes in, and what comes of it comes out.

Everything here happens in callbacks of the event loop, without a task or a copy per message: this is the path that
every invocation takes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec

from headrace.children import ChildLimits, Died
from headrace.errors import ChildLost, FunctionError, HeadraceError, LoadError, OutOfMemory, TimeLimit, UserError
from headrace.failures import size_text
from headrace.wire import Ask, FromChild, Granted, Invoke, Raised, Returned, Said, encode
from workers.deaths import cause, forget_words, last_words
from workers.line import Line
from workers.output import OnLine, OnSaid, Output, Pipe
from workers.watch import Found, Seen

SLACK_BYTES = 64 * 1024
TELL_S = 0.02  # how long a process that ran too long may take to write down where it is
HUNG_UP_S = 0.1  # a process that closes its line is nearly always one that has just died; its zygote will say how

OnAsk = Callable[[Ask], Awaitable[Granted]]

_log = logging.getLogger(__name__)
_decoder: msgspec.msgpack.Decoder[Returned | Raised | Said | Ask] = msgspec.msgpack.Decoder(FromChild)


_KINDS: dict[str, type[FunctionError]] = {"load": LoadError, "memory": OutOfMemory}


class NotTaken(Exception):
    """The process was gone before it could take the invocation: nothing has run, and another may take it."""


class Child:
    """A child process. It runs one invocation at a time; ``versions`` says whose code it holds.

    ``group`` is the folder of its control group, where there are any.

    ``usable`` turns False when it is told to stop or has died; it never gets another invocation then. ``deserted`` says
    that it went without being told to.
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
        """Open both ends of all that leads to the process; it is made by the zygote, which takes over ``theirs``.

        Args:
            number: its number, never given to another child.
            limits: what it may take.
            scratch: its folder.
            kill: ends the process with this number.
            tell: has the process with this number write down where it is.

        Raises:
            OSError: there are no descriptors left.
        """
        self.number = number
        self.scratch = scratch
        self.group: Path | None = None
        self.pid: int | None = None
        self.versions: set[tuple[str, str]] = set()
        self.tenant: str | None = None  # whose code it has run; it runs no other's
        self.usable = True
        self.deserted = False
        self.served = 0
        self._limits = limits
        self._kill = kill
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        with ExitStack() as undo:
            self._line = Line(
                message_bytes_max=max(limits.result_bytes_max, limits.output_bytes_max) + SLACK_BYTES,
                on_message=self._take,
                on_too_large=self._refuse_large,
                on_hung_up=self._hung_up,
            )
            undo.callback(self._line.abandon)
            out = Pipe("stdout", self._print)
            undo.callback(out.abandon)
            err = Pipe("stderr", self._print)
            undo.callback(err.abandon)
            self._pipes = (out, err)
            self._words = os.memfd_create("words")
            undo.callback(os.close, self._words)
            self.theirs = [self._line.theirs, out.theirs, err.theirs, os.dup(self._words)]
            undo.pop_all()
        self._function = ""
        self._ended: asyncio.Future[Returned] | None = None
        self._output: Output | None = None
        self._on_ask: OnAsk | None = None
        self._asking: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._left: ChildLost | None = None
        self._worn = False

    # ------------------------------------------------------------ one invocation

    async def run(
        self, invoke: Invoke, *, timeout_s: float, on_said: OnSaid, on_line: OnLine, on_ask: OnAsk
    ) -> Returned:
        """Run one invocation. Canceled, it ends the process.

        Raises:
            FunctionError: the code did not load, the body raised, took too long, or the process died.
            NotTaken: the process was gone already.
        """
        if not self.usable or not self._line.send(encode(invoke)):
            self._desert()
            raise NotTaken
        ended: asyncio.Future[Returned] = self._loop.create_future()
        self._ended = ended
        self._function = invoke.function
        self._output = Output(self._limits, on_said, on_line)
        self._on_ask = on_ask
        self._timer = None if math.isinf(timeout_s) else self._loop.call_later(timeout_s, self._expire, timeout_s)
        try:
            return await ended
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

    @property
    def seen(self) -> Seen | None:
        """What the watch has to know of it while it runs something; None while it does not."""
        if self._ended is None or self.pid is None:
            return None
        group = "" if self.group is None else str(self.group)
        return Seen(number=self.number, served=self.served, pid=self.pid, scratch=self.scratch, group=group)

    def heed(self, found: Found) -> None:
        """Take what the watch has found, unless the invocation that it saw has ended."""
        if self._ended is None or found.seen.served != self.served:
            return
        self._worn = self._worn or found.worn
        if found.error is None:
            return
        self._read_rest()
        if self._ended is not None:
            self._fail(type(found.error)(f"{self._function} {found.error}", hint=found.error.hint))
            self.stop()

    def stop(self) -> None:
        """Have the process ended, and all that it started. Safe to repeat; nothing is waited for."""
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
        self._read_rest()
        self.deserted = self.deserted or self.usable
        self.usable = False
        if self._ended is not None:
            self._fail(self._left or self._lost(cause(report.status, report.error)))
        self._line.close()
        for pipe in self._pipes:
            pipe.close()
        os.close(self._words)

    def _read_rest(self) -> None:
        while self._line.read():
            pass

    def _expire(self, timeout_s: float) -> None:
        self._tell(self.number)
        self._timer = self._loop.call_later(TELL_S, self._stop_late, timeout_s)

    def _stop_late(self, timeout_s: float) -> None:
        self._read_rest()
        if self._ended is None:
            forget_words(self._words)  # it ended well in the last moment
            return
        self._fail(
            TimeLimit(
                f"{self._function} ran longer than its timeout of {timeout_s:g} s and was stopped",
                hint="Give it more time with @function(timeout=...), or look where its time goes.",
                traceback=last_words(self._words),
            )
        )
        self.stop()

    def _fail(self, error: FunctionError) -> None:
        ended = self._end()
        if ended is not None and not ended.done():
            ended.set_exception(error)

    def _end(self) -> asyncio.Future[Returned] | None:
        """Pass on all that was printed up to now, and return what waits for the end of the invocation."""
        for pipe in self._pipes:
            pipe.end()
        ended, self._ended = self._ended, None
        self._output = None
        return ended

    def _lost(self, why: str) -> ChildLost:
        return ChildLost(f"{self._function} {why}", traceback=last_words(self._words))

    # ------------------------------------------------------------ what comes from the process

    def _take(self, body: bytes | memoryview) -> None:
        try:
            message = _decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            self._fail(self._lost("sent something that cannot be read; did it write to files that it had not opened?"))
            self.stop()
            return
        if isinstance(message, Returned | Raised):
            self._take_end(message)
        elif isinstance(message, Said):
            if self._output is not None:
                for pipe in self._pipes:
                    pipe.drain()  # what C code printed before this comes before it
                self._output.said(message)
        elif self._on_ask is not None and self._asking is None and self._ended is not None:
            self._asking = self._loop.create_task(self._grant(message, self._on_ask))

    def _take_end(self, message: Returned | Raised) -> None:
        ended = self._end()
        if message.leave or self._worn:
            self.stop()
        if ended is None or ended.done():
            return
        if isinstance(message, Returned):
            ended.set_result(message)
        else:
            told = message.error
            kind = _KINDS.get(told.kind, UserError)
            ended.set_exception(kind(told.message, traceback=told.traceback, transient=message.transient))

    async def _grant(self, ask: Ask, on_ask: OnAsk) -> None:
        try:
            granted = await on_ask(ask)
        except HeadraceError as error:
            granted = Granted(error=str(error), hint=error.hint)
        except Exception:
            _log.exception("ctx.%s of %s failed", ask.what, self._function)
            granted = Granted(error=f"the platform failed at ctx.{ask.what}", hint="The worker's log says why.")
        self._asking = None
        if self._ended is not None:
            self._line.send(encode(granted))

    def _refuse_large(self, size: int) -> None:
        most = size_text(self._limits.result_bytes_max)
        error = UserError(
            f"{self._function} sent {size_text(size)}; the limit is {most}",
            hint="Keep large data with ctx.store(...) and return the URI.",
            transient=False,
        )
        self._fail(error)
        self.stop()

    def _hung_up(self) -> None:
        if self._ended is None:
            self._desert()
        else:
            self._loop.call_later(HUNG_UP_S, self._stop_silent)

    def _desert(self) -> None:
        if self.usable:
            self.deserted = True
            self.stop()

    def _stop_silent(self) -> None:
        """End a process that goes on living without a line to us."""
        if self.usable:
            self._left = self._lost("closed its line to the worker; did it close files that it had not opened?")
            self.stop()

    def _print(self, stream: str, line: bytes) -> None:
        if self._output is not None:
            self._output.line(stream, line.decode("utf-8", "replace"))
