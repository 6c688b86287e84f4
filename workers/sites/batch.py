"""Any batch system with a queue: submit once, look once for all, and conclude nothing from silence."""

from __future__ import annotations

import asyncio
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import psij
from psij.executors.batch.batch_scheduler_executor import BatchSchedulerExecutor

from headrace.jobs import Reason
from headrace.model import JobState
from workers.sites.base import (
    FINAL,
    Capacity,
    JobStatus,
    Known,
    SiteConfig,
    SiteUnreachable,
    Submission,
    SubmitBusy,
    SubmitRejected,
    SubmitUnsure,
)
from workers.sites.executors import Failed, executor, inherit, native_name, psij_job, run_command
from workers.sites.records import Claim, Ended, Records

LOOK_AGAIN_S = 0.5
SIGNAL_EXIT_CODE = 128
LEFTOVERS = (".out", ".ec", ".nodefile")

# What the commands say when the controller was too slow or away. It may have taken the job all the same.
UNSURE = re.compile(
    r"timed? ?out|unable to contact|connect(ion)? (failure|refused|reset)|zero bytes|not responding"
    r"|temporarily unable|transport endpoint|unexpected message|communication|network|slow down|try again",
    re.IGNORECASE,
)
# What they say when a limit on jobs is reached that goes away as others end, or when an operator closed the queue.
BUSY = re.compile(
    r"MaxSubmit|SubmitJobsLimit|too many jobs|maximum number of (user )?jobs|exceeds queue job limit|inactive or drain",
    re.IGNORECASE,
)


class Batch(ABC):
    """A batch system of which PSI/J has an executor. What PSI/J cannot do, a subclass does."""

    def __init__(
        self, config: SiteConfig, of: type[BatchSchedulerExecutor], now: Callable[[], float] = time.time
    ) -> None:
        self.config = config
        self._now = now
        self._executor = executor(of, config.kind, config)
        self._missing_since: dict[str, float] = {}

    # ------------------------------------------------------------ the Protocol

    async def submit(self, job: Submission) -> str:
        """See ``BatchSystem.submit``."""
        return await asyncio.to_thread(self._submit, job)

    async def submit_array(self, array_id: str, jobs: Sequence[Submission]) -> dict[str, str]:
        """See ``BatchSystem.submit_array``; one after the other where the batch system has no arrays."""
        return {job.job_id: await self.submit(job) for job in jobs}

    async def find(self, job_id: str, folder: Path) -> str | None:
        """See ``BatchSystem.find``."""
        return await asyncio.to_thread(self._find, job_id, Records(folder))

    async def status(self, jobs: Sequence[Known]) -> Mapping[str, JobStatus]:
        """See ``BatchSystem.status``."""
        return await asyncio.to_thread(self._status, jobs) if jobs else {}

    async def cancel(self, native_ids: Sequence[str]) -> None:
        """See ``BatchSystem.cancel``."""
        await asyncio.to_thread(self._cancel, native_ids)

    async def capacity(self) -> Capacity | None:
        """See ``BatchSystem.capacity``."""
        return None

    # ------------------------------------------------------------ what a subclass knows

    @abstractmethod
    def look_up(self, name: str) -> list[str]:
        """Return the native ids of all jobs of ours with this name, the first submitted first, ended ones too.

        Raises:
            Failed, SiteUnreachable: nobody knows.
        """

    @abstractmethod
    def queue(self, native_ids: Sequence[str]) -> dict[str, JobStatus]:
        """Return how the jobs are that the batch system knows, by native id.

        Raises:
            Failed, SiteUnreachable: nobody knows.
        """

    def after_purge(self, native_id: str) -> JobStatus | None:
        """Return how a job ended that the queue no longer knows, where the batch system keeps accounts."""
        return None

    # ------------------------------------------------------------ submitting

    def _submit(self, job: Submission) -> str:
        records = Records(job.folder)
        records.prepare(job.before, job.after)
        made = psij_job(self.config, job, self.config.kind)
        Path(job.spec.directory or job.folder).mkdir(parents=True, exist_ok=True)
        return self._once(native_name(job.job_id), records, made)

    def _once(self, name: str, records: Records, made: psij.Job) -> str:
        """Submit under a lock, after a look; the look is long where an earlier submission is of unknown fate."""
        with records.submitting() as lock:
            found = self._find_by_name(name, records)
            if found is None and records.attempted():
                found = self._settle(name, records)
            if found is not None:
                records.note_native_id(found)
                return found
            records.note_attempt()
            inherit(lock)
            try:
                self._executor.submit(made)
            except SiteUnreachable as error:
                found = self._unsure(name, records, str(error))
            except psij.SubmitException as error:
                found = self._refused(name, records, str(error))
            else:
                found = str(made.native_id)
            finally:
                inherit()
            records.note_native_id(found)
            return found

    def _refused(self, name: str, records: Records, said: str) -> str:
        """Return the native id if the job was submitted after all; else tell what went wrong."""
        where = f"{self.config.name} did not take {name}: {said.strip()}"
        if BUSY.search(said):
            records.forget_attempt()
            raise SubmitBusy(where, hint="Try again as other jobs end, or when the queue is open.")
        if not UNSURE.search(said):
            records.forget_attempt()
            raise SubmitRejected(where, hint="Change what the job asks for, or send it to another site.")
        return self._unsure(name, records, where)

    def _unsure(self, name: str, records: Records, said: str) -> str:
        found = self._settle(name, records)
        if found is None:
            raise SubmitUnsure(said, hint=f"No job of this name came up within {self.config.settle_s:g} s.")
        return found

    def _settle(self, name: str, records: Records) -> str | None:
        """Look for a job whose submission is of unknown fate until it is there, or can no longer come.

        Raises:
            SubmitUnsure: the batch system could not be asked; the attempt stays noted.
        """
        give_up_at = time.monotonic() + self.config.settle_s
        while True:
            try:
                found = self._find_by_name(name, records)
            except SiteUnreachable as error:
                raise SubmitUnsure(
                    f"{name} may have been submitted: {error}", hint="It is looked for again."
                ) from error
            if found is not None:
                return found
            if time.monotonic() >= give_up_at:
                records.forget_attempt()
                return None
            time.sleep(min(LOOK_AGAIN_S, self.config.settle_s))

    def _find(self, job_id: str, records: Records) -> str | None:
        return self._find_by_name(native_name(job_id), records)

    def _find_by_name(self, name: str, records: Records) -> str | None:
        noted = records.native_id()
        if noted is not None:
            return noted
        try:
            found = self.look_up(name)
        except Failed as error:
            raise SiteUnreachable(f"{self.config.name}: {error.output}", hint="Is the controller up?") from error
        if len(found) > 1:  # only the first keeps its place; the program would run once in any case
            with suppress(SiteUnreachable):
                self._cancel(found[1:])
        return found[0] if found else None

    # ------------------------------------------------------------ looking

    def _status(self, jobs: Sequence[Known]) -> dict[str, JobStatus]:
        records = {job.job_id: Records(job.folder) for job in jobs}
        claims = {job_id: found.claim() for job_id, found in records.items()}
        native = {job.job_id: claim.native_id if (claim := claims[job.job_id]) else job.native_id for job in jobs}
        try:
            seen = self.queue(sorted(set(native.values())))
        except Failed as error:
            raise SiteUnreachable(f"{self.config.name}: {error.output}", hint="Is the controller up?") from error
        now = self._now()
        told = {}
        for job in jobs:
            native_id, claim = native[job.job_id], claims[job.job_id]
            found = seen.get(native_id)
            missing_s = self._missing_s(native_id, found is not None, now)
            if found is None and missing_s > 0 and (account := self.after_purge(native_id)) is not None:
                found = account
            ended = records[job.job_id].ended()
            status = judge(native_id, found, claim, ended, job.limit_s, missing_s, self.config.unseen_s)
            told[job.job_id] = status
            if status.state in FINAL:
                self._missing_since.pop(native_id, None)
                self._clean(job.job_id, native_id)
        return told

    def _missing_s(self, native_id: str, there: bool, now: float) -> float:
        if there:
            self._missing_since.pop(native_id, None)
            return 0.0
        return now - self._missing_since.setdefault(native_id, now)

    def _clean(self, job_id: str, native_id: str) -> None:
        """Remove what PSI/J's script left beside the job's own folder."""
        folder = self._executor.work_directory
        names = [native_name(job_id) + ".job", *(native_id + ending for ending in LEFTOVERS)]
        for name in names:
            (folder / name).unlink(missing_ok=True)

    def _cancel(self, native_ids: Sequence[str]) -> None:
        for native_id in native_ids:
            try:
                run_command(self.config, self._executor.get_cancel_command(native_id))
            except Failed as error:
                if UNSURE.search(error.output):
                    raise SiteUnreachable(
                        f"{self.config.name}: {error.output}", hint="Is the controller up?"
                    ) from error
                # it has ended, or was never there: what the next look at the queue tells stands


def judge(
    native_id: str,
    seen: JobStatus | None,
    claim: Claim | None,
    ended: Ended | None,
    limit_s: float | None,
    missing_s: float,
    unseen_s: float,
) -> JobStatus:
    """Say how a job is, from what the queue and the job itself tell.

    The batch system's word that it ended a job stands, and so does the job's own record of its exit code, which the
    queue may not have. Of a job that nobody knows it is said that it is lost, but not before it was missing for long:
    a queue that has just been started, or does not yet show what it took, has no word either.
    """
    if ended is not None and ended.native_id != native_id:
        ended = None  # left by an earlier run of the same job
    if seen is not None:
        if seen.state in FINAL:
            return _with_record(seen, claim, ended)
        if ended is not None and ended.exit_code == 0 and claim is not None and _in_time(claim, ended, limit_s):
            return _with_record(msgspec.structs.replace(seen, state="completed", reason=""), claim, ended)
        return _with_record(seen, claim, None)
    if ended is not None:
        state, reason = _reason(ended.exit_code)
        return _with_record(JobStatus(native_id=native_id, state=state, reason=reason), claim, ended)
    if missing_s < unseen_s:
        waits = claim is None
        return JobStatus(
            native_id=native_id,
            state="queued" if waits else "active",
            detail="not seen in the queue",
            started_at=None if claim is None else claim.at,
        )
    return JobStatus(
        native_id=native_id,
        state="failed",
        reason="lost",
        detail="unknown to the batch system, and without a record of its end",
        started_at=None if claim is None else claim.at,
    )


def _in_time(claim: Claim, ended: Ended, limit_s: float | None) -> bool:
    """Say whether a program ended by itself: past its limit, it may have been told to end and did so politely."""
    return limit_s is None or ended.at - claim.at < limit_s


def _reason(exit_code: int) -> tuple[JobState, Reason]:
    if exit_code == 0:
        return "completed", ""
    return "failed", "exit_code" if exit_code <= SIGNAL_EXIT_CODE else "signal"


def _with_record(status: JobStatus, claim: Claim | None, ended: Ended | None) -> JobStatus:
    """Return the status with what the job's own records tell better than the queue."""
    started_at = claim.at if claim is not None else status.started_at
    if ended is None:
        return msgspec.structs.replace(status, started_at=started_at)
    state, reason, exit_code = status.state, status.reason, ended.exit_code
    if state == "completed" or reason in ("exit_code", "signal"):
        state, reason = _reason(exit_code)  # some scripts end well whatever their program did
    return msgspec.structs.replace(
        status, state=state, reason=reason, exit_code=exit_code, started_at=started_at, ended_at=ended.at
    )
