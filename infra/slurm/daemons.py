"""Daemons by pid: started in the foreground, remembered in a file, and found again by the next command.

A pid alone may by then belong to somebody else, so the file also holds when the process began.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from infra.process import tie_to

STEP_S = 0.02
STATE, PARENT, BEGAN = 0, 1, 19  # fields of /proc/PID/stat after the name


class Daemon:
    """One process of a cluster, by name; ``run`` holds its pid file and ``log`` its output."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], run: Path, log: Path) -> None:
        self.name = name
        self._command = list(command)
        self._env = dict(env)
        self._file = run / f"{name}.process"
        self._log = log / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process now running, None if there is none."""
        with suppress(FileNotFoundError, ValueError):
            pid, began = map(int, self._file.read_text().split())
            fields = process_fields(pid)
            if fields is not None and fields[STATE] != "Z" and int(fields[BEGAN]) == began:
                return pid
        return None

    def start(self, *, tied: bool) -> None:
        """Start it; ``tied`` lets the kernel end it when this process is gone."""
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._env,
                start_new_session=True,
                preexec_fn=tie_to(os.getpid()) if tied else None,
            )
        fields = process_fields(self._process.pid)
        self._file.write_text(f"{self._process.pid} {fields[BEGAN] if fields else 0}\n")

    def send(self, number: signal.Signals) -> None:
        """Send it a signal; nothing happens if it does not run."""
        if (pid := self.pid) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self, grace_s: float = 3.0) -> None:
        """End it, kindly and then by force, and return once it is gone."""
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)
        if not self._gone_within(grace_s):
            self.send(signal.SIGKILL)
            self._gone_within(grace_s)
        self._file.unlink(missing_ok=True)

    def kill(self) -> None:
        """End it by force and return once it is gone."""
        self.send(signal.SIGKILL)
        self._gone_within(3.0)

    def tail(self, lines: int = 12) -> str:
        """Return the last lines it wrote."""
        with suppress(FileNotFoundError):
            return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])
        return ""

    def _gone_within(self, seconds: float) -> bool:
        def gone() -> bool:
            if self._process is not None:  # a child of ours: taking note of its end also takes it off the table
                return self._process.poll() is not None
            return self.pid is None

        return until(gone, seconds)


def until(holds: Callable[[], bool], seconds: float) -> bool:
    """Look again and again until it holds; False when it does not within ``seconds``."""
    give_up_at = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > give_up_at:
            return False
        time.sleep(STEP_S)
    return True


def process_fields(pid: int) -> list[str] | None:
    """Return what the kernel says of a process after its name; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None


def processes_marked(*marks: Mapping[str, str]) -> set[int]:
    """Return the processes that were started with all variables of one of these, and all that descend from them."""
    wanted = [{f"{name}={value}".encode() for name, value in mark.items()} for mark in marks]
    parents: dict[int, int] = {}
    marked: set[int] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        fields = process_fields(pid)
        if fields is None:
            continue
        parents[pid] = int(fields[PARENT])
        with suppress(OSError):
            variables = set((entry / "environ").read_bytes().split(b"\0"))
            if any(mark <= variables for mark in wanted):
                marked.add(pid)
    grew = True
    while grew:
        more = {pid for pid, parent in parents.items() if parent in marked and pid not in marked}
        marked |= more
        grew = bool(more)
    return marked - {os.getpid()}
