"""The processes of jobs on this machine: by what ties them to their job, and how all of them are ended."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

import psutil
from msgspec import Struct

DEVICES = "CUDA_VISIBLE_DEVICES"
JOB = "HEADRACE_JOB_ID"
SITE = "HEADRACE_SITE"  # tells this site's jobs from those of another one on the same machine
# How many bytes a job's processes may hold. A limit on addresses would be simpler, but programs reserve for a GPU more
# than any machine has.
MEMORY = "HEADRACE_MEMORY_BYTES_MAX"
GRACE_S = 2.0
STEP_S = 0.02
CLOCK_S = 1.0  # how far the start of a process as the kernel tells it may be from what a clock said


class Running(Struct):
    """The processes of one job that run now."""

    devices: frozenset[str] = frozenset()
    memory_max: int | None = None
    pids: list[int] = []

    @property
    def began_at(self) -> float:
        """The epoch second at which the first of them began: what a job writes of that is its own word."""
        return min((at for pid in self.pids if (at := _began_at(pid)) is not None), default=time.time())

    @property
    def over(self) -> bool:
        """Whether they hold more memory than their job asked for."""
        return self.memory_max is not None and sum(map(held, self.pids)) > self.memory_max


def processes(site: str, known: Mapping[int, str] | None = None) -> dict[str, Running]:
    """Return the processes of all jobs of one site that run on this machine, by job id.

    A process is a job's by the marks in its environment. One without any, such as a program that was started with a
    clean environment, is its parent's, and that of whoever began its session. Only one that has neither is missed: it
    was left behind by its parent, in a session of its own.

    Args:
        site: the mark of the site.
        known: processes, gone by now or not, that are a job's: what they began is, too.
    """
    found: dict[str, Running] = {}
    job_of = dict(known or {})
    ties: dict[int, tuple[int, int]] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError), process.oneshot():
            environ = process.environ()
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            job_id = environ.get(JOB)
            if not job_id or SITE not in environ:
                ties[process.pid] = (process.ppid(), os.getsid(process.pid))
            elif environ[SITE] == site:
                running = found.setdefault(job_id, Running())
                limit = environ.get(MEMORY, "")
                running.memory_max = int(limit) if limit.isdigit() else None
                running.pids.append(process.pid)
                running.devices |= {device for device in environ.get(DEVICES, "").split(",") if device}
                job_of[process.pid] = job_id
    while more := {
        pid: job_of[parent] if parent in job_of else job_of[session]
        for pid, (parent, session) in ties.items()
        if pid not in job_of and (parent in job_of or session in job_of)
    }:
        job_of |= more
    for pid in ties.keys() & job_of.keys():
        found.setdefault(job_of[pid], Running()).pids.append(pid)
    return found


def leftovers(session: int, began_at: float, ended_at: float) -> list[int]:
    """Return the processes of a session whose first one has ended, if they began while that ran.

    No other session had this number meanwhile. A session that got it later has processes that began later.
    """

    def is_one(process: psutil.Process) -> bool:
        with suppress(psutil.Error, ProcessLookupError):
            if process.pid != session and os.getsid(process.pid) == session and runs(process):
                return bool(began_at - CLOCK_S <= process.create_time() <= ended_at + CLOCK_S)
        return False

    return [process.pid for process in psutil.process_iter() if is_one(process)]


def held(pid: int) -> int:
    """Return how many bytes of memory a process holds: what it shares with others counts in part."""
    with suppress(psutil.Error):
        return int(psutil.Process(pid).memory_full_info().pss)
    return 0


def end(look: Callable[[Collection[int]], Collection[int]], pids: Collection[int]) -> None:
    """End processes, kindly and then by force.

    Args:
        look: looks for what those that are known began: one that is told to end may just have started another.
        pids: all that there are, looked for before the first signal, which may end what ties them to their job.
    """
    now = time.monotonic()
    force_at, give_up_at = now + GRACE_S, now + 2 * GRACE_S
    known: dict[int, psutil.Process] = {}
    told: set[int] = set()
    while True:
        for pid in {*pids, *look(known)} - known.keys():
            with suppress(psutil.Error):
                known[pid] = psutil.Process(pid)
        left = [process for process in known.values() if runs(process)]
        now = time.monotonic()
        if not left or now > give_up_at:
            return
        for process in left:
            with suppress(psutil.Error):
                if now > force_at:
                    process.kill()
                elif process.pid not in told:
                    told.add(process.pid)
                    process.terminate()
        time.sleep(STEP_S)


def runs(process: psutil.Process) -> bool:
    """Say whether a process has not ended."""
    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _began_at(pid: int) -> float | None:
    with suppress(psutil.Error):
        return float(psutil.Process(pid).create_time())
    return None
