"""Looks at the children that run something, a few times a second: what they take that no limit of the kernel can hold.

Short invocations are over before they are seen and pay nothing. The look itself happens in another thread, so that a
slow disk holds up nothing; the next one waits until this one has cost ten times less than the time in between.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from headrace import groups
from headrace.children import ChildLimits
from headrace.errors import FunctionError, OutOfMemory, OverLimit
from headrace.failures import size_text
from headrace.family import Family, measure, shared_fairly_bytes

LOOK_S = 0.25
LOOK_SHARE_MAX = 0.1
WORN_SHARE = 0.25

_log = logging.getLogger(__name__)


class Seen(Struct, frozen=True, kw_only=True):
    """A child that runs something: ``served`` tells one invocation of it from the next."""

    number: int
    served: int
    pid: int
    scratch: Path
    group: str = ""


class Found(Struct, frozen=True, kw_only=True):
    """What a look found: ``error`` ends the invocation; ``worn`` says that the child should run no other after it."""

    seen: Seen
    error: FunctionError | None = None
    worn: bool = False


class Watch:
    """Looks as long as anything runs; ``begin`` says that something does."""

    def __init__(
        self,
        limits: ChildLimits,
        *,
        scratch: Path,
        disk_bytes_min: int,
        running: Callable[[], list[Seen]],
        on_found: Callable[[Found], None],
    ) -> None:
        """Describe what is watched.

        Args:
            limits: what each child may take.
            scratch: the folder whose disk must keep ``disk_bytes_min`` bytes free for anything to be started.
            disk_bytes_min: that floor in bytes.
            running: tells the children that run something at the moment.
            on_found: hears of those that were found to take too much.
        """
        self._looker = _Looker(limits)
        self._scratch = scratch
        self._disk_bytes_min = disk_bytes_min
        self._running = running
        self._on_found = on_found
        self._timer: asyncio.TimerHandle | None = None
        self._looking: asyncio.Future[tuple[list[Found], int, float]] | None = None
        self._closed = False
        self.room = asyncio.Event()
        self.room.set()

    def begin(self) -> None:
        """Go on looking, if it had stopped because nothing ran."""
        if self._timer is None and self._looking is None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    async def close(self) -> None:
        """Stop looking. Safe to repeat."""
        self._closed = True
        self.room.set()  # whoever waits for it has to hear that it is over
        if self._timer is not None:
            self._timer.cancel()
        if self._looking is not None:
            await asyncio.wait({self._looking})

    def _look(self) -> None:
        self._timer = None
        running = self._running()
        if not running and self.room.is_set():
            return
        loop = asyncio.get_running_loop()
        self._looking = loop.run_in_executor(None, self._look_at, running)
        self._looking.add_done_callback(self._take)

    def _look_at(self, running: list[Seen]) -> tuple[list[Found], int, float]:
        began = time.perf_counter()
        found = self._looker.look(running)
        free = shutil.disk_usage(self._scratch).free
        return found, free, time.perf_counter() - began

    def _take(self, looked: asyncio.Future[tuple[list[Found], int, float]]) -> None:
        self._looking = None
        if self._closed or looked.cancelled():
            return
        took_s = 0.0
        if (failure := looked.exception()) is not None:
            _log.error("the children could not be looked at: %r", failure)
        else:
            found, free, took_s = looked.result()
            for each in found:
                self._on_found(each)
            self._heed(free)
        self._timer = asyncio.get_running_loop().call_later(max(LOOK_S, took_s / LOOK_SHARE_MAX), self._look)

    def _heed(self, free: int) -> None:
        """Let nothing begin while the disk has too little room for what it may write."""
        enough = free >= self._disk_bytes_min
        if enough == self.room.is_set():
            return
        if enough:
            _log.info("there is room on the disk of %s again: work goes on", self._scratch)
            self.room.set()
        else:
            _log.error(
                "%s is free on the disk of %s, less than %s: nothing new is begun until there is more",
                size_text(free),
                self._scratch,
                size_text(self._disk_bytes_min),
            )
            self.room.clear()


class _Looker:
    """What was seen of each child, so that one invocation is not taken to account for the one before it."""

    def __init__(self, limits: ChildLimits) -> None:
        self._limits = limits
        self._first: dict[int, tuple[int, float, int]] = {}  # by child: invocation, CPU seconds and refusals by then

    def look(self, running: list[Seen]) -> list[Found]:
        """Return what there is to say of these children."""
        numbers = {seen.number for seen in running}
        for gone in self._first.keys() - numbers:
            del self._first[gone]
        return [found for seen in running if (found := self._look_at(seen)) is not None]

    def _look_at(self, seen: Seen) -> Found | None:
        limits = self._limits
        family = measure(seen.pid, limits.tasks_max)
        if not family.pids:
            return None  # it has just died, which is told elsewhere
        refusals = groups.refused(seen.group) if seen.group else 0
        first = self._first.get(seen.number)
        if first is None or first[0] != seen.served:
            first = self._first[seen.number] = (seen.served, family.cpu_s, refusals)
        size, files = _content(seen.scratch, limits.scratch_files_max)
        most = limits.tasks_max
        if family.tasks > most or refusals > first[2] or (refusals and family.tasks >= most):
            what = f"had more than {most:,} processes and threads at a time"
            hint = "Start fewer at a time, or have HEADRACE_CHILD_TASKS_MAX raised."
        elif family.cpu_s - first[1] > limits.cpu_max_s:
            what = f"took more than {limits.cpu_max_s:,g} s of CPU time"
            hint = "Do less at a time, or have HEADRACE_CHILD_CPU_MAX_S raised."
        elif size > limits.scratch_bytes_max:
            what = f"had more than {size_text(limits.scratch_bytes_max)} in its folder"
            hint = (
                "Remove files as you go, keep results with ctx.store(...), or have HEADRACE_SCRATCH_BYTES_MAX raised."
            )
        elif files > limits.scratch_files_max:
            what = f"had more than {limits.scratch_files_max:,} files in its folder"
            hint = "Remove files as you go, or have HEADRACE_SCRATCH_FILES_MAX raised."
        elif (memory := limits.memory_bytes_max) is not None and _takes_more(family, memory):
            what = f"had processes that took more than {size_text(memory)} of memory together and was stopped"
            hint = "Start fewer at a time, or have HEADRACE_CHILD_BYTES_MAX raised."
            return Found(seen=seen, error=OutOfMemory(what, hint=hint))
        else:
            worn = size > WORN_SHARE * limits.scratch_bytes_max or files > WORN_SHARE * limits.scratch_files_max
            # What it leaves behind in its temporary files must not be held against the next one.
            return Found(seen=seen, worn=True) if worn else None
        return Found(seen=seen, error=OverLimit(f"{what} and was stopped", hint=hint))


def _takes_more(family: Family, memory_bytes_max: int) -> bool:
    """Return whether several processes, each within the limit, pass it together."""
    if len(family.pids) == 1 or family.resident_bytes <= memory_bytes_max:
        return False
    return shared_fairly_bytes(family.pids) > memory_bytes_max


def _content(folder: Path, files_max: int) -> tuple[int, int]:
    """Return the bytes on disk and the number of entries below a folder, which may change meanwhile.

    Nothing is counted behind the first ``files_max`` entries and one.
    """
    size = files = 0
    waiting = [str(folder)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    files += 1
                    if files > files_max:
                        return size, files
                    try:
                        size += entry.stat(follow_symlinks=False).st_blocks * 512
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(entry.path)
                    except OSError:  # it was removed at this moment
                        continue
        except OSError:
            continue
    return size, files
