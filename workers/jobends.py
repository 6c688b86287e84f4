"""What is told of a job once it runs, and what is committed when it has ended or cannot begin."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable

from functions import jobs
from functions.ensembles import again
from functions.jobs import JobTried
from functions.moves import agent_of, repeated
from functions.outcomes import Attempted, World
from functions.outlook import Outlook
from headrace.errors import HeadraceError, Unavailable
from headrace.joblog import JOB
from headrace.jobs import JobEnd, Reason, failure
from headrace.model import ErrorInfo
from headrace.wire import Invocation, Started, encode
from streams.blobs import Blobs, check_in
from streams.log import AlreadyThere, Log, Record
from streams.topology import fence_subject, start_subject
from workers.commits import APPEND_TIMEOUT_S, Commits, Fenced
from workers.jobfolders import JobFolders, Outputs, reason_of
from workers.jobwatch import Attached
from workers.sitebook import SiteBook
from workers.sites.base import JobStatus
from workers.workfolder import WorkFolder

_log = logging.getLogger(__name__)

ENDED_MAX = 32
TROUBLE_DELAY_S, TROUBLE_DELAY_S_MAX = 1.0, 30.0
NO_OUTPUTS = Outputs({}, [], [])


class JobEnds:
    """Commits what becomes of the jobs of one site."""

    def __init__(
        self,
        *,
        agent: str,
        site: str,
        log: Log,
        blobs: Blobs,
        folders: JobFolders,
        work: WorkFolder,
        commits: Commits,
        book: SiteBook,
        outlook: Outlook,
        clock: Callable[[], float],
        forget: Callable[[Attached], None],
    ) -> None:
        """Describe it; ``forget`` is called with each job of which nothing more is to be done."""
        self._agent = agent
        self._site = site
        self._log = log
        self._blobs = blobs
        self._folders = folders
        self._work = work
        self._commits = commits
        self._book = book
        self._outlook = outlook
        self._clock = clock
        self._forget = forget
        self._turns = asyncio.Semaphore(ENDED_MAX)

    # ------------------------------------------------------------ of a job that is submitted

    async def began(self, job: Attached, status: JobStatus) -> None:
        """Tell that a job runs."""
        at = status.started_at or self._clock()
        self._book.waited(job.spec, max(0.0, at - job.submitted.at))
        started = Started(
            run_id=job.run_id,
            invocation_id=job.job_id,
            function=JOB,
            version="",
            worker=self._agent,
            attempt=job.attempt,
            queued_at=job.queued_at,
            started_at=at,
            parent_id=job.invocation.parent_id,
        )
        subject = start_subject(job.run_id, job.job_id, job.attempt)
        # Guarded as an outcome is: of a job that is another agent's by now, this one says nothing.
        record = Record(subject, encode(started), fence_subject(job.run_id, job.job_id), job.fence)
        try:
            await self._log.append([record])
        except HeadraceError as error:
            _log.warning("that job %s runs is not told: %s", job.name, error)

    async def finish(self, job: Attached, status: JobStatus) -> None:
        """Commit how a job ended, or submit it again."""
        if job.state != "active" and status.started_at is not None:  # it was over before it was seen to run
            self._book.waited(job.spec, max(0.0, status.started_at - job.submitted.at))
        if status.state == "failed" and again(job.spec, status.reason, job.attempt):
            await self._until_done(job, functools.partial(self._repeat, job, status))
        else:
            await self._until_done(job, functools.partial(self._end, job, status))

    async def give_up(self, job: Attached) -> None:
        """Commit that a job is of no use any more, for the deadline of its run has passed."""

        async def commit() -> None:
            now = self._clock()
            tried = self._tried(job, job.status, now, now)
            end = JobEnd(
                job_id=job.job_id,
                site=self._site,
                state="canceled",
                reason="deadline",
                native_id=job.submitted.native_id,
                attempts=job.attempt,
                time_s=jobs.times(tried),
            )
            error = ErrorInfo(kind="deadline", message="the deadline passed, and the job was canceled")
            await self._commits.commit(*jobs.canceled(job.invocation, end, tried, error))

        await self._until_done(job, commit)

    async def let_go(self, job: Attached, status: JobStatus) -> None:
        """Commit that a job of a canceled run has ended, so that nobody comes back to it; nothing follows from it."""

        async def commit() -> None:
            now = self._clock()
            tried = self._tried(job, status, now, now)
            end = JobEnd(
                job_id=job.job_id,
                site=self._site,
                state=status.state,
                exit_code=status.exit_code,
                reason=status.reason,
                detail=status.detail,
                native_id=status.native_id,
                attempts=job.attempt,
                time_s=jobs.times(tried),
            )
            try:
                await self._log.append([jobs.dropped(job.invocation, end, tried)], timeout_s=APPEND_TIMEOUT_S)
            except AlreadyThere as other:
                raise Fenced from other

        await self._until_done(job, commit)

    async def _until_done(self, job: Attached, act: Callable[[], Awaitable[None]]) -> None:
        """Do what ends a job, again and again until it is in the log, or in the hands of another agent."""
        delay_s = TROUBLE_DELAY_S
        while not await self._done(job, act):
            await asyncio.sleep(delay_s)
            delay_s = min(TROUBLE_DELAY_S_MAX, 2 * delay_s)
        self._forget(job)

    async def _done(self, job: Attached, act: Callable[[], Awaitable[None]]) -> bool:
        try:
            async with self._turns:
                await act()
        except Fenced:
            _log.warning("job %s was taken over by another agent", job.name)
        except HeadraceError as error:
            _log.warning("the end of job %s is not committed yet: %s", job.name, error)
            return False
        except Exception:
            _log.exception("the end of job %s is not committed yet", job.name)
            return False
        return True

    async def _end(self, job: Attached, status: JobStatus) -> None:
        began_at = self._clock()
        state, reason, detail = status.state, status.reason, status.detail
        outputs = NO_OUTPUTS
        try:
            outputs = await self._folders.keep(job.spec, job.folder)
            wrong = outputs.refused
        except OSError as error:
            wrong = [reason_of(error)]
        detail = "; ".join(filter(None, [detail, *wrong]))
        if wrong and state == "completed":
            state, reason = "failed", "stage_out"
        await self._work.check()  # else nothing is missing: its disk was away
        now = self._clock()
        tried = self._tried(job, status, now, began_at)
        end = JobEnd(
            job_id=job.job_id,
            site=self._site,
            state=state,
            exit_code=status.exit_code,
            reason=reason,
            detail=detail,
            outputs=outputs.kept,
            missing=outputs.missing,
            time_s=jobs.times(tried),
            native_id=status.native_id,
            attempts=job.attempt,
            nodes=status.nodes,
            last_lines=await self._folders.last_lines(job.folder),
        )
        await self._commit(job.invocation, end, tried)

    async def _repeat(self, job: Attached, status: JobStatus) -> None:
        """Let a job that failed wait for its agent once more; members of an ensemble that failed come together."""
        now = self._clock()
        tried = self._tried(job, status, now, now)
        end = JobEnd(
            job_id=job.job_id,
            site=self._site,
            state=status.state,
            exit_code=status.exit_code,
            reason=status.reason,
            detail=status.detail,
            native_id=status.native_id,
            attempts=job.attempt,
            time_s=jobs.times(tried),
            last_lines=await self._folders.last_lines(job.folder),
        )
        run, identity = job.run_id, job.job_id
        attempted = Attempted(
            attempt=job.attempt,
            worker=self._agent,
            queued_at=job.queued_at,
            started_at=job.submitted.at,
            ended_at=now,
            fence=job.fence,
        )
        unit = repeated(job.invocation, attempted, failure(end), holder=agent_of(self._site))
        try:
            await self._log.append(unit, timeout_s=APPEND_TIMEOUT_S)
        except AlreadyThere:
            if not await self._commits.settled_otherwise(run, identity, job.fence):
                raise Unavailable("the log refuses a failed attempt and shows no reason", hint="Again.") from None

    def _tried(self, job: Attached, status: JobStatus | None, now: float, ended_seen_at: float) -> JobTried:
        return JobTried(
            attempt=job.attempt,
            agent=self._agent,
            queued_at=job.queued_at,
            ended_at=now,
            submitted_at=job.submitted.at,
            started_at=None if status is None else status.started_at,
            job_ended_at=ended_seen_at if status is None or status.ended_at is None else status.ended_at,
            stage_in_s=job.submitted.stage_in_s,
            stage_out_s=max(0.0, now - ended_seen_at),
            fence=job.fence,
        )

    # ------------------------------------------------------------ of a job that cannot begin

    async def refuse(
        self,
        invocation: Invocation,
        *,
        reason: Reason,
        detail: str,
        attempt: int,
        fence: int,
        queued_at: float,
        stage_in_s: float = 0.0,
    ) -> None:
        """Commit that a job failed before the batch system had it.

        Raises:
            Fenced: another agent has taken it over.
            Unavailable: the log does not answer.
        """
        now = self._clock()
        tried = JobTried(
            attempt=attempt,
            agent=self._agent,
            queued_at=queued_at,
            ended_at=now,
            stage_in_s=stage_in_s,
            fence=fence,
        )
        end = JobEnd(
            job_id=invocation.invocation_id,
            site=self._site,
            state="failed",
            reason=reason,
            detail=detail,
            attempts=attempt,
            time_s=jobs.times(tried),
        )
        await self._commit(invocation, end, tried)

    async def _commit(self, invocation: Invocation, end: JobEnd, tried: JobTried) -> None:
        said = await check_in(jobs.told(end), self._blobs)
        outcome, unit = jobs.ended(invocation, end, tried, self._world(), said)
        await self._commits.commit(outcome, unit)

    def _world(self) -> World:
        return World(
            function=lambda _: None,  # what follows is named, with its version, in the job itself
            routes=(),
            now=self._clock(),
            outlook=self._outlook,
        )
