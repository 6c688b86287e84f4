"""A process and all that descends from it, as the kernel lists them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from msgspec import Struct

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Family(Struct, kw_only=True):
    """What a process and its descendants take together.

    ``tasks`` are processes and threads. ``cpu_s`` is CPU time in seconds, that of descendants that have ended
    included. ``resident_bytes`` counts memory that several of them share once for each.
    """

    pids: list[int] = []
    tasks: int = 0
    cpu_s: float = 0.0
    resident_bytes: int = 0


def measure(pid: int, tasks_max: int) -> Family:
    """Look at a process and its descendants; stop looking at those behind the first ``tasks_max`` tasks and one."""
    family = Family()
    waiting = [pid]
    while waiting and family.tasks <= tasks_max:
        each = waiting.pop()
        try:
            # The name of the program, in parentheses, may hold anything.
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            waiting += children_of(each, threads=True)
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        family.pids.append(each)
        family.tasks += int(fields[17])
        family.cpu_s += sum(map(int, fields[11:15])) / TICKS_PER_S
        family.resident_bytes += int(fields[21]) * PAGE_BYTES
    return family


def shared_fairly_bytes(pids: list[int]) -> int:
    """Return the resident memory of these processes, what they share counted once. Takes a while for each."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def children_of(pid: int, *, threads: bool = False) -> Iterator[int]:
    """Yield the process ids of all children, those of strangers that were adopted included.

    With ``threads`` also those that were begun by, or fell to, a thread other than the first.
    """
    for thread in os.listdir(f"/proc/{pid}/task") if threads else (pid,):
        try:
            listed = Path(f"/proc/{pid}/task/{thread}/children").read_text()
        except FileNotFoundError:  # the thread has ended, or this is a kernel built without this file
            if _listed_by_kernel():
                continue
            yield from (child for child, parent in _all() if parent == pid)
            return
        yield from map(int, listed.split())


def tasks_of_user(user: int) -> int:
    """Return how many processes and threads a user has on this machine."""
    total = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError):
                if entry.stat().st_uid == user:
                    total += len(os.listdir(f"{entry.path}/task"))
    return total


def _listed_by_kernel() -> bool:
    return os.path.exists("/proc/thread-self/children")


def _all() -> Iterator[tuple[int, int]]:
    """Yield every process on the machine with its parent."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError):
                yield int(entry.name), int(Path(entry.path, "stat").read_text().rpartition(")")[2].split()[1])
