"""Memory and CPU of the platform's processes, read from /proc."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Usage(NamedTuple):
    """Resident memory in MiB and CPU seconds used so far."""

    resident_mib: float
    cpu_s: float


def usage(pid: int) -> Usage:
    """Return what one process uses now; nothing for one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return Usage(0.0, 0.0)
    return Usage(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, (int(fields[11]) + int(fields[12])) / TICKS_PER_S)


def descendants(pid: int) -> list[int]:
    """Return the ids of all processes below one."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def platform(named: dict[str, int | None]) -> dict[str, Usage]:
    """Return the usage of each named process; what a worker started stands under ``functions``."""
    found = {name: usage(pid) for name, pid in named.items() if pid is not None}
    worker = named.get("worker")
    below = [usage(pid) for pid in descendants(worker)] if worker is not None else []
    found["functions"] = Usage(sum(u.resident_mib for u in below), sum(u.cpu_s for u in below))
    return found
