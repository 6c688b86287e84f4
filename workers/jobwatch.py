"""The jobs that a batch system has: how they are, from one look for all of them, and what is to be done about it.

A look is taken at once when something was heard of a job, and else in rounds that grow longer while nothing happens.
Nothing here is the truth but what the batch system and the jobs' own records say.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct

from headrace.errors import HeadraceError
from headrace.joblog import Report, Submitted
from headrace.jobs import JobSpec
from headrace.model import JobState
from headrace.wire import Invocation
from workers.late import useful_s
from workers.sites.base import FINAL, BatchSystem, JobStatus, Known

_log = logging.getLogger(__name__)

LOOK_S_MIN, LOOK_S_MAX = 1.0, 10.0  # so an end of which nothing is heard is followed up within 15 s
LOCAL_S_MIN = 0.25  # a machine without a queue is asked for nothing but its own processes
LOOK_GROWTH = 1.5
GAP_S = 0.2  # between two looks, whatever is heard
AGAIN_S = (0.2, 0.4, 0.8, 1.6)  # a job that says that it ends is through a moment later
CANCEL_AGAIN_S = 10.0


class Attached(Struct):
    """One job that the batch system has. ``name`` is its name there, ``queued_at`` when its message was stored.

    ``overdue`` says that it is canceled because its deadline has passed, ``ending`` that what is to follow is being
    done.
    """

    invocation: Invocation
    spec: JobSpec
    name: str
    folder: Path
    attempt: int
    fence: int
    queued_at: float
    submitted: Submitted
    state: JobState = "queued"
    status: JobStatus | None = None
    cancel_tried_at: float | None = None
    overdue: bool = False
    ending: bool = False

    @property
    def run_id(self) -> str:
        """The run it belongs to."""
        return self.invocation.run_id

    @property
    def job_id(self) -> str:
        """The invocation that it is."""
        return self.invocation.invocation_id

    def known(self) -> Known:
        """Return what the batch system is asked with."""
        return Known(
            job_id=self.name,
            native_id=self.submitted.native_id,
            folder=self.folder,
            limit_s=self.submitted.limit_s,
        )


class Keeper(Protocol):
    """Who does what is to be done about jobs."""

    async def began(self, job: Attached, status: JobStatus) -> None:
        """Tell that a job runs."""

    async def finish(self, job: Attached, status: JobStatus) -> None:
        """Commit how a job ended, once and for all; errors are told and it is asked again."""

    async def give_up(self, job: Attached) -> None:
        """Commit that a job is of no use any more; it is canceled already."""

    async def let_go(self, job: Attached, status: JobStatus) -> None:
        """Commit that a job of a canceled run has ended: nothing follows from it."""


class JobWatch:
    """All jobs of one site that are submitted and have not ended."""

    def __init__(
        self,
        system: BatchSystem,
        keeper: Keeper,
        canceled: Container[str],
        sure: Callable[[], Awaitable[None]],
        clock: Callable[[], float],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        """Describe it; nothing is asked yet.

        Args:
            system: the site's batch system.
            keeper: does what is to be done.
            canceled: the runs that nobody needs any more.
            sure: raises where the records of jobs cannot be read now, and nothing may be concluded.
            clock: the time in epoch seconds.
            spawn: runs something beside.
        """
        self._system = system
        self._keeper = keeper
        self._canceled = canceled
        self._sure = sure
        self._clock = clock
        self._spawn = spawn
        self._jobs: dict[tuple[str, str], Attached] = {}
        self._soon = asyncio.Event()
        self.busy = asyncio.Event()  # set while there are any
        self._least_s = LOCAL_S_MIN if system.config.kind == "local" else LOOK_S_MIN
        self._round_s = self._least_s
        self._looks: list[float] = []  # instants of the loop's clock at which to look without being asked again

    def __len__(self) -> int:
        return len(self._jobs)

    def names(self) -> list[tuple[str, Path]]:
        """Return the name and the folder of each job."""
        return [(job.name, job.folder) for job in self._jobs.values()]

    def tenants(self) -> Counter[str]:
        """Return how many jobs each tenant has here."""
        return Counter(job.invocation.tenant for job in self._jobs.values())

    def get(self, run: str, job: str) -> Attached | None:
        """Return a job that is watched."""
        return self._jobs.get((run, job))

    def attach(self, job: Attached) -> None:
        """Watch a job from now on; another attempt of it is watched no longer."""
        self._jobs[job.run_id, job.job_id] = job
        self._round_s = self._least_s
        self.busy.set()
        self._soon.set()

    def forget(self, job: Attached) -> None:
        """Watch it no longer."""
        if self._jobs.get((job.run_id, job.job_id)) is job:
            del self._jobs[job.run_id, job.job_id]
        if not self._jobs:
            self.busy.clear()

    def heard(self, report: Report) -> None:
        """Take a report as a reason to look."""
        if (report.run_id, report.invocation_id) not in self._jobs or report.event in ("heartbeat", "progress"):
            return
        if report.event != "start":
            now = asyncio.get_running_loop().time()
            self._looks += [now + after_s for after_s in AGAIN_S]
        self._soon.set()

    def stir(self) -> None:
        """Look soon: something may have to be canceled."""
        if self._jobs:
            self._soon.set()

    async def run(self) -> None:
        """Look for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await self._until_time(loop)
            self._soon.clear()
            began_at = loop.time()
            self._looks = [at for at in self._looks if at > began_at]
            try:
                changed = await self.look()
            except HeadraceError as error:
                _log.warning("site %s cannot be asked: %s", self._system.config.name, error)
                changed = False
            except Exception:
                _log.exception("site %s cannot be asked", self._system.config.name)
                changed = False
            self._round_s = self._least_s if changed else min(LOOK_S_MAX, self._round_s * LOOK_GROWTH)
            await asyncio.sleep(max(0.0, began_at + GAP_S - loop.time()))

    async def _until_time(self, loop: asyncio.AbstractEventLoop) -> None:
        if not any(not job.ending for job in self._jobs.values()):
            await self._soon.wait()
            return
        wait_s = min([self._round_s, *(at - loop.time() for at in self._looks)])
        now = self._clock()
        for job in self._jobs.values():
            if job.ending or job.overdue:
                continue
            left_s = useful_s(job.invocation, now)
            if left_s is not None:
                wait_s = min(wait_s, left_s)
        try:
            async with asyncio.timeout(max(0.0, wait_s)):
                await self._soon.wait()
        except TimeoutError:
            return

    async def look(self) -> bool:
        """Cancel what nobody needs, ask once how all are, act on it, and say whether anything was new.

        Raises:
            SiteUnreachable: the batch system does not answer.
            Unavailable: the records of jobs cannot be read now.
        """
        await self._cancel()
        asked = [job for job in self._jobs.values() if not job.ending]
        if not asked:
            return False
        await self._sure()
        told = await self._system.status([job.known() for job in asked])
        changed = False
        for job in asked:
            status = told.get(job.name)
            if status is not None and not job.ending:
                changed |= self._act(job, status)
        return changed

    def _act(self, job: Attached, status: JobStatus) -> bool:
        changed = status.state != job.state
        job.status = status
        if status.state in FINAL:
            # Of a canceled run nothing counts any more but that the job is over.
            ending = self._keeper.let_go if job.run_id in self._canceled else self._keeper.finish
            self._end(job, partial(ending, job, status))
            return True
        if changed:
            job.state = status.state
            if status.state == "active":
                self._spawn(self._keeper.began(job, status))
        return changed

    def _end(self, job: Attached, ending: Callable[[], Coroutine[Any, Any, None]]) -> None:
        job.ending = True
        self._spawn(ending())

    async def _cancel(self) -> None:
        now = self._clock()
        those = []
        for job in self._jobs.values():
            if job.ending:
                continue
            left_s = useful_s(job.invocation, now)
            job.overdue |= left_s is not None and left_s <= 0
            if (job.overdue or job.run_id in self._canceled) and (
                job.cancel_tried_at is None or now - job.cancel_tried_at > CANCEL_AGAIN_S
            ):
                those.append(job)
        if not those:
            return
        for job in those:
            job.cancel_tried_at = now
        try:
            await self._system.cancel([job.known() for job in those])
        except HeadraceError as error:  # how all others are may be told nevertheless
            _log.warning("site %s: %d jobs are not canceled now: %s", self._system.config.name, len(those), error)
            return
        for job in those:
            if job.overdue and job.run_id not in self._canceled:
                self._end(job, partial(self._keeper.give_up, job))
        self._round_s = self._least_s
