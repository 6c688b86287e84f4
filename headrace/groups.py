"""Control groups that hold a child and all it starts, where the kernel and the rights on this machine allow it.

In a group the kernel itself refuses the process too many, and nothing that was started in one gets away when it ends:
not by a session of its own, not by an orphan that forks faster than it is found. Both versions of control groups will
do; of the second, the folder above the worker's must be handed over to it (``Delegate=pids`` and ``DelegateSubgroup=``
of systemd). Where there are none, ``headrace.family`` is what the worker counts by.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PREFIX = "headrace-"
CONTROLLER = "pids"
REMOVE_TRIES = 100
REMOVE_STEP_S = 0.01


def find() -> Path | None:
    """Return the folder in which groups can be made, or None. It is tried out, with a group and a process."""
    for base in _candidates():
        with suppress(OSError):
            trial = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=base))
            try:
                (trial / "pids.max").write_text("16")
                enter = ["/bin/sh", "-c", 'echo 0 >"$1"', "sh", str(trial / "cgroup.procs")]
                if subprocess.run(enter, stderr=subprocess.DEVNULL, check=False).returncode == 0:
                    return base
            finally:
                remove(trial)
    return None


def make(base: Path, tasks_max: int) -> Path:
    """Make the group of a child of this process, for at most so many processes and threads.

    Raises:
        OSError: there are too many groups, or the folder is gone.
    """
    group = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=base))
    (group / "pids.max").write_text(str(tasks_max))
    return group


def enter(group: str) -> None:
    """Move this process into a group; what it starts from here on belongs to it."""
    Path(group, "cgroup.procs").write_text("0")


def refused(group: str) -> int:
    """Return how many processes and threads the kernel has refused to a group; 0 where nobody knows."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path(group, "pids.events").read_text().split("max ", 1)[1].split()[0])
    return 0


def end(group: str) -> None:
    """Kill all that is in a group."""
    with suppress(OSError):
        Path(group, "pids.max").write_text("0")  # from here on nobody forks, so whoever is found is one fewer
    for _ in range(2):  # once more for a fork that was under way
        with suppress(OSError):
            for pid in map(int, Path(group, "cgroup.procs").read_text().split()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def remove(group: Path) -> None:
    """Kill all that is in a group, and remove it once the last one is gone. Waits, for a second at most."""
    for _ in range(REMOVE_TRIES):
        try:
            group.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            end(str(group))
            time.sleep(REMOVE_STEP_S)
        else:
            return


def sweep(base: Path) -> None:
    """End and remove the groups of workers that are gone."""
    for group in base.glob(f"{PREFIX}*-*"):
        worker = group.name.removeprefix(PREFIX).partition("-")[0]
        if worker.isdigit() and not Path("/proc", worker).exists():
            remove(group)


# ---------------------------------------------------------------- where they may be


def _candidates() -> Iterator[Path]:
    with suppress(OSError):
        places = dict(_places())
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if CONTROLLER in controllers.split(",") and CONTROLLER in places:
                yield _below(*places[CONTROLLER], path)
            elif not controllers and "" in places:
                own = _below(*places[""], path)
                yield from (folder for folder in (own, own.parent) if _hands_on(folder))


def _places() -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield, by controller ("" for version 2), the root of the mounted tree and where it is mounted."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mounted, _, described = line.partition(" - ")
        kind, _, options = described.split(" ", 2)
        root, where = mounted.split(" ")[3:5]
        if kind == "cgroup2":
            yield "", (root, where)
        elif kind == "cgroup" and CONTROLLER in options.split(","):
            yield CONTROLLER, (root, where)


def _below(root: str, where: str, path: str) -> Path:
    return Path(where, os.path.relpath(path, root))


def _hands_on(folder: Path) -> bool:
    """Return whether groups below a folder of version 2 count processes, having it so if this is possible."""
    try:
        if CONTROLLER in (folder / "cgroup.subtree_control").read_text().split():
            return True
        # Only a folder without processes of its own may, and only its owner.
        (folder / "cgroup.subtree_control").write_text(f"+{CONTROLLER}")
    except OSError:
        return False
    return True
