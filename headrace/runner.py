"""A worker's child: waits for an invocation, calls the user's code, and says how it ended.

It is the one kind of process that opens code of users. It speaks with its worker on a line of its own and is replaced
by a fresh one whenever it asks to be, or dies.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from headrace import groups
from headrace.binding import Binding
from headrace.capture import Capture
from headrace.channel import Channel, HungUp
from headrace.children import ChildLimits
from headrace.context import Context
from headrace.errors import HeadraceError, LoadError, UserError
from headrace.failures import size_text, told, worth_another_try
from headrace.loading import Bundle, load
from headrace.model import ErrorInfo
from headrace.wire import Ask, Granted, Invoke, Raised, Returned, Said, encode

STORED_INLINE_BYTES_MAX = 64 * 1024
NOTE_CHARS_MAX = 1_000
PROGRESS_BURST = 20
PROGRESS_PER_S = 20.0
BALLAST_BYTES = 1024 * 1024
ENVELOPE_BYTES_MAX = 4 * 1024  # what a result of the largest size may take on top of its bytes


class _Version(NamedTuple):
    binding: Binding
    bundle: Bundle


class _Port:
    """What happens at once, for the invocation that is running. Output past its limits is dropped here already."""

    def __init__(self, channel: Channel, limits: ChildLimits, flush: Callable[[], None]) -> None:
        self._channel = channel
        self._limits = limits
        self._flush = flush
        self._process = os.getpid()
        self._bytes_left = 0
        self._lines_left = 0
        self._progress_left = 0.0
        self._progress_at = 0.0
        self._held: Said | None = None

    def begin(self) -> None:
        """Give a new invocation its full share."""
        # The worker counts too and says where it cut; it must see a little more than it takes.
        self._bytes_left = self._limits.output_bytes_max + 4096
        self._lines_left = self._limits.output_lines_max + 1
        self._progress_left = PROGRESS_BURST
        self._held = None

    def end(self) -> None:
        """Say how far the function came, if that was held back."""
        if self._held is not None:
            held, self._held = self._held, None
            self._channel.send(held)

    def printed(self, stream: str, text: str) -> None:
        """Pass on lines that were printed."""
        self._say(stream, text, len(text), text.count("\n") or 1)

    def say(self, level: str, text: str) -> None:
        """Pass on a line of ``ctx.log``, behind what was printed before it."""
        if os.getpid() != self._process:
            os.write(2, f"{text}\n".encode("utf-8", "replace"))  # in a process that the function forked
            return
        self._flush()
        self._say(level, text.encode("utf-8", "replace").decode(), len(text) + 1, 1)

    def _say(self, level: str, text: str, size: int, lines: int) -> None:
        if self._bytes_left <= 0 or self._lines_left <= 0:
            return
        text = text[: self._bytes_left]
        self._bytes_left -= size
        self._lines_left -= lines
        self._channel.send(Said(level=level, text=text))

    def progress(self, fraction: float, note: str) -> None:
        """Pass on how far the function is; of a flood only some, and always the last."""
        if os.getpid() != self._process:
            return
        self._flush()
        now = time.monotonic()
        gained = (now - self._progress_at) * PROGRESS_PER_S
        self._progress_left = min(float(PROGRESS_BURST), self._progress_left + gained)
        self._progress_at = now
        self._held = Said(fraction=fraction, text=note[:NOTE_CHARS_MAX].encode("utf-8", "replace").decode())
        if self._progress_left >= 1.0:
            self._progress_left -= 1.0
            self.end()

    def stage(self, uri: str) -> Path:
        """Have the worker bring the bytes of ``uri`` here."""
        return Path(self._ask(Ask(what="stage", uri=uri)))

    def store(self, content: Path | bytes, name: str) -> str:
        """Have the worker keep the bytes."""
        if isinstance(content, Path):
            return self._ask(Ask(what="store", path=str(content.absolute()), name=name))
        if len(content) <= STORED_INLINE_BYTES_MAX:
            return self._ask(Ask(what="store", body=content, name=name))
        parked = Path(f".store-{time.monotonic_ns()}").absolute()
        try:
            parked.write_bytes(content)
            return self._ask(Ask(what="store", path=str(parked), name=name))
        finally:
            parked.unlink(missing_ok=True)

    def _ask(self, ask: Ask) -> str:
        if os.getpid() != self._process:
            raise HeadraceError(
                f"ctx.{ask.what} was called in another process", hint="Call it in the function's own process."
            )
        self._flush()
        self._channel.send(ask)
        answer = self._channel.receive()
        if not isinstance(answer, Granted):
            raise HungUp  # the two ends no longer agree on whose turn it is; a fresh child starts over
        if answer.error:
            raise HeadraceError(answer.error, hint=answer.hint)
        return answer.value


class Runner:
    """Runs invocations one after another until the worker hangs up."""

    def __init__(self, channel: Channel, limits: ChildLimits, scratch: Path, group: str = "") -> None:
        self._channel = channel
        self._limits = limits
        self._scratch = scratch
        self._group = group
        self._process = os.getpid()
        self._capture = Capture(self._printed)
        self._port = _Port(channel, limits, self._capture.flush)
        self._versions: dict[tuple[str, str], _Version] = {}
        self._statm = os.open("/proc/self/statm", os.O_RDONLY)
        self._folder = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
        self._resident_bytes_due = 0
        self._versions_weighed = 0
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        self._served = 0
        self._has_helpers = False
        self._ballast: bytes | None = bytes(BALLAST_BYTES)

    def _printed(self, stream: str, text: str) -> None:
        self._port.printed(stream, text)

    def serve(self) -> None:
        """Answer one invocation after another; return when the worker hangs up."""
        with suppress(HungUp):
            while True:
                message = self._channel.receive()
                if isinstance(message, Invoke):
                    self._channel.send_frame(self._answer(message))

    def _answer(self, invoke: Invoke) -> bytes:
        started_at = time.time()
        self._capture.begin()
        self._port.begin()
        reply: Returned | Raised
        try:
            reply = self._attempt(invoke, started_at)
        except HungUp:
            raise
        except BaseException as error:
            if os.getpid() != self._process:
                os._exit(1)  # the function forked, and this is the copy of us in the new process
            reply = self._raised(error, started_at)
        if os.getpid() != self._process:
            os._exit(0)
        self._tidy()
        return self._framed(reply, invoke.function, leave=self._must_leave())

    def _framed(self, reply: Returned | Raised, function: str, *, leave: bool) -> bytes:
        if leave:
            reply = msgspec.structs.replace(reply, leave=True)
        try:
            frame = encode(reply)
        except (ValueError, MemoryError) as error:  # such as an event type that is not text
            return encode(self._raised(error, reply.started_at, leave=leave))
        most = self._limits.result_bytes_max
        if isinstance(reply, Returned) and len(frame) > most + ENVELOPE_BYTES_MAX:
            refused = UserError(
                f"{function} returned {size_text(len(frame))} (result, answer and effects together); "
                f"the limit is {size_text(most)}",
                hint="Keep large data with ctx.store(...) and return the URI.",
                transient=False,
            )
            return encode(self._raised(refused, reply.started_at, leave=leave))
        return frame

    def _attempt(self, invoke: Invoke, started_at: float) -> Returned:
        version = self._version(invoke)
        context: Context | None = None
        if version.binding.wants_context:
            context = Context(
                run_id=invoke.run_id,
                invocation_id=invoke.invocation_id,
                attempt=invoke.attempt,
                deadline=invoke.deadline,
                due=invoke.due,
                port=self._port,
                fan_out_max=self._limits.fan_out_max,
            )
        result = version.binding.invoke(type=invoke.type, body=invoke.body, event=invoke.event, context=context)
        return Returned(
            result=result,
            effects=context.effects if context else [],
            answer=context.answered if context else None,
            started_at=started_at,
            ended_at=time.time(),
        )

    def _version(self, invoke: Invoke) -> _Version:
        """Return the loaded version; its code comes with the first invocation of it that this child sees."""
        key = (invoke.function, invoke.version)
        found = self._versions.get(key)
        if found is not None:
            found.bundle.activate()
            return found
        if invoke.code is None:
            raise LoadError(f"the code of {invoke.function} {invoke.version} did not come along")
        loaded = load(invoke.code)
        found = self._versions[key] = _Version(Binding(loaded.function, invoke.function), loaded.bundle)
        self._has_helpers = self._has_helpers or _has_children()
        return found

    # ------------------------------------------------------------ ends that are not a result

    def _raised(self, error: BaseException, started_at: float, *, leave: bool = False) -> Raised:
        if isinstance(error, MemoryError):
            self._ballast = None  # there may be too little left even to say so
            traceback.clear_frames(error.__traceback__)
        info = told(error)
        if isinstance(error, MemoryError):
            most = self._limits.memory_bytes_max
            limit = f"; its limit is {size_text(most)}, set by HEADRACE_CHILD_BYTES_MAX" if most else ""
            info = ErrorInfo(
                kind="memory", message=f"ran out of memory{limit} ({info.message})", traceback=info.traceback
            )
        elif limit := self._limit_behind(error):
            info = msgspec.structs.replace(info, message=f"{info.message}; {limit}")
        return Raised(
            error=info, transient=worth_another_try(error), started_at=started_at, ended_at=time.time(), leave=leave
        )

    def _limit_behind(self, error: BaseException) -> str:
        """Return which of our limits the kernel may have meant by this error, and the setting; empty if none."""
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            return f"the limit of one file is {size_text(self._limits.scratch_bytes_max)} (HEADRACE_SCRATCH_BYTES_MAX)"
        no_more = isinstance(error, OSError) and error.errno == errno.EAGAIN
        if (no_more or isinstance(error, RuntimeError)) and self._group and groups.refused(self._group):
            return f"the limit is {self._limits.tasks_max:,} processes and threads (HEADRACE_CHILD_TASKS_MAX)"
        return ""

    # ------------------------------------------------------------ between two invocations

    def _tidy(self) -> None:
        """Pass on all output and empty the working directory, so that nothing is left for the next invocation."""
        self._capture.end()
        self._port.end()
        os.fchdir(self._folder)
        for name in os.listdir(self._folder):
            with suppress(OSError):
                os.unlink(name)
                continue
            shutil.rmtree(name, ignore_errors=True)

    def _must_leave(self) -> bool:
        """Return whether this child has had its time, or what it ran has left something behind."""
        self._served += 1
        if self._ballast is None or self._served >= self._limits.invocations_max:
            return True
        if len(self._versions) > self._limits.versions_max:
            return True
        if not self._has_helpers and _has_children():
            return True  # processes of this invocation must not go on during the next
        if not os.fstat(self._folder).st_nlink:
            return True  # the function removed its working directory
        return self._has_grown()

    def _has_grown(self) -> bool:
        """Return whether the memory grew and grew since the first invocation of the newest version."""
        pages = int(os.pread(self._statm, 128, 0).split()[1])
        resident = pages * self._page_bytes
        if len(self._versions) != self._versions_weighed:
            self._versions_weighed = len(self._versions)
            self._resident_bytes_due = resident
        return resident - self._resident_bytes_due > self._limits.growth_bytes_max


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
