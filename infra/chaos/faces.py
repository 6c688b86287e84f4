"""Which process is which: the family of a supervisor, told by their command lines."""

from __future__ import annotations

from pathlib import Path

from infra.bench.processes import descendants
from infra.rights import GATEWAY, LEDGER, WORKER

SUPERVISOR = "supervisor"
NATS = "nats-server"
REDIS = "redis-server"
ZYGOTE = "zygote"
ROLES = (GATEWAY, WORKER, LEDGER)
EVERYBODY = (*ROLES, NATS, REDIS, ZYGOTE, SUPERVISOR)


def words_of(pid: int) -> list[str]:
    """Return the command line of a process, empty for one that is gone."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    # One that wrote its own title over its arguments parts them by spaces.
    return raw.replace(b"\0", b" ").decode("utf-8", "replace").split()


def pids_by_name(supervisor: int) -> dict[str, int]:
    """Return the ids of a platform's processes by name; one that does not run at the moment is not there."""
    if not supervisor or not words_of(supervisor):
        return {}
    found = {SUPERVISOR: supervisor}
    for pid in descendants(supervisor):  # parents come before their children
        words = words_of(pid)
        if not words:
            continue
        program = words[0].rpartition("/")[2]
        if program in (NATS, REDIS):
            found[program] = pid
        elif words[-1] in ROLES and "infra" in words:
            found[words[-1]] = pid
        elif "headrace.zygote" in words:
            found.setdefault(ZYGOTE, pid)  # its children look like it and come later
    return found
