"""What one attempt says, on its way to the log: that it has started, lines, and how far it is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from headrace.errors import HeadraceError
from headrace.wire import Moved, Note, Said, Started, encode
from streams.intake import Delivery
from streams.log import Log, Record
from streams.topology import fence_subject, note_subject, start_subject

_log = logging.getLogger(__name__)

STARTED_AFTER_S = 0.1
NOTE_EVERY_S = 0.1


class Voice:
    """What one attempt says, on its way to the log: gathered for a moment, so that a chatty body costs few messages."""

    def __init__(
        self,
        log: Log,
        delivery: Delivery,
        worker: str,
        attempt: int,
        fence: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._log = log
        self._clock = clock
        self._invocation = delivery.invocation
        self._lines: list[tuple[str, str]] = []
        self._fraction: float | None = None
        self._text = ""
        self._moved: Moved | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._sending: set[asyncio.Task[None]] = set()
        self._delivery = delivery
        self._worker = worker
        self._attempt = attempt
        self._fence = fence
        self._started_at = clock()
        self._start = self._loop.call_later(STARTED_AFTER_S, self._tell_start)

    def said(self, said: Said) -> None:
        """Take a line of ``ctx.log``, a progress report, or how far staging is."""
        if said.moved is not None:
            self._moved = said.moved
        elif said.fraction is None:
            self._lines.append((said.level, said.text))
        else:
            self._fraction, self._text = said.fraction, said.text
        self._soon()

    def line(self, stream: str, line: str) -> None:
        """Take a line of stdout or stderr."""
        self._lines.append((stream, line))
        self._soon()

    def hush(self) -> None:
        """Say nothing more by itself."""
        self._start.cancel()
        if self._timer is not None:
            self._timer.cancel()

    async def close(self) -> list[Record]:
        """Return what has not been sent, to go in front of the outcome; all before it is in the log."""
        self.hush()
        if self._sending:
            await asyncio.gather(*self._sending, return_exceptions=True)
        note = self._note()
        return [] if note is None else [note]

    def _soon(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(NOTE_EVERY_S, self._send)

    def _send(self) -> None:
        self._timer = None
        note = self._note()
        if note is not None:
            self._append(note)

    def _note(self) -> Record | None:
        if not self._lines and self._fraction is None and self._moved is None:
            return None
        run, identity = self._invocation.run_id, self._invocation.invocation_id
        note = Note(
            run_id=run,
            invocation_id=identity,
            at=self._clock(),
            lines=self._lines,
            fraction=self._fraction,
            text=self._text,
            moved=self._moved,
        )
        self._lines, self._fraction, self._text, self._moved = [], None, "", None
        return Record(note_subject(run, identity, self._attempt), encode(note), hint=not note.lines)

    def _tell_start(self) -> None:
        invocation = self._invocation
        started = Started(
            run_id=invocation.run_id,
            invocation_id=invocation.invocation_id,
            function=invocation.function,
            version=invocation.version,
            worker=self._worker,
            attempt=self._attempt,
            queued_at=self._delivery.at,
            started_at=self._started_at,
            parent_id=invocation.parent_id,
        )
        run, identity = started.run_id, started.invocation_id
        # Guarded as an outcome is: a worker that wakes up late does not say that it has started what has long ended.
        self._append(
            Record(
                start_subject(run, identity, self._attempt),
                encode(started),
                fence_subject(run, identity),
                self._fence,
            )
        )

    def _append(self, record: Record) -> None:
        task = self._loop.create_task(self._try_append(record))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _try_append(self, record: Record) -> None:
        try:
            await self._log.append([record])
        except HeadraceError as error:  # what a function said is worth keeping, but not worth failing it
            _log.warning("a note of invocation %s is lost: %s", self._invocation.invocation_id, error)
