"""One job, from its submission on: that the batch system has it is recorded, and it is watched, also by a later agent.

A job that a site of another id submitted is not ours to judge, though that site had the name of this one: where this
one has a machine or an allocation to itself, that one is gone with what it ran, and else its jobs are left to it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from functions.jobs import read_job
from headrace.errors import BadRequest, HeadraceError, NotFound, Unavailable
from headrace.joblog import Submitted
from headrace.jobs import JobSpec
from headrace.wire import Invocation, Outcome, decode, encode
from streams.log import AlreadyThere, Record
from streams.stored import Stored
from streams.topology import fence_subject, job_subject, submit_subject
from workers.cancels import Cancels
from workers.commits import APPEND_TIMEOUT_S, Commits, Fenced
from workers.jobburial import JobBurial
from workers.jobends import JobEnds
from workers.jobfolders import JobFolders, reason_of
from workers.jobpast import Job, JobPast, past_of, taken_over, unfinished
from workers.jobtools import Tools
from workers.jobwatch import Attached, JobWatch
from workers.sites.base import JobStatus, Known
from workers.submitting import Ready
from workers.workfolder import WorkFolder

_log = logging.getLogger(__name__)

AT_ONCE = 64
AGAIN_S, AGAIN_S_MAX = 1.0, 30.0
NO_SPEC = JobSpec(executable="-")  # of one that cannot be read


class Attaching:
    """Brings jobs of one site under watch. ``late`` are those that a start has found and not attached yet."""

    def __init__(
        self,
        tools: Tools,
        work: WorkFolder,
        folders: JobFolders,
        burial: JobBurial,
        commits: Commits,
        ends: JobEnds,
        watch: JobWatch,
        cancels: Cancels,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        """Describe it; ``spawn`` runs something beside."""
        self._tools = tools
        self._site = tools.site.name
        self._log = tools.log
        self._clock = tools.clock
        self._work = work
        self._folders = folders
        self._burial = burial
        self._commits = commits
        self._ends = ends
        self._watch = watch
        self._cancels = cancels
        self._spawn = spawn
        self._others = 0
        self.late: set[Job] = set()

    async def record(self, ready: Ready, native_id: str) -> None:
        """Record that the batch system has a job, watch it, and let go of its message.

        Raises:
            Fenced: it is another agent's.
            HeadraceError: it cannot be recorded now.
        """
        waiting, past, now = ready.waiting, ready.past, self._clock()
        run, identity = waiting.invocation.run_id, waiting.invocation.invocation_id
        submitted = Submitted(
            run_id=run,
            invocation_id=identity,
            site=self._site,
            attempt=past.attempt,
            native_id=native_id,
            at=now,
            agent=self._tools.name,
            directory=str(ready.submission.folder),
            secret_digest=ready.digest,
            limit_s=ready.spec.attributes.duration_s or self._tools.site.duration_s,
            first_at=past.first_at or now,
            stage_in_s=ready.stage_in_s,
            site_id=self._work.id,
        )
        subject = submit_subject(run, identity, past.attempt, self._site)
        record = Record(subject, encode(submitted), fence_subject(run, identity), past.fence)
        try:
            await self._log.append([record], timeout_s=APPEND_TIMEOUT_S)
        except AlreadyThere:
            if not await self._commits.settled_otherwise(run, identity, past.fence):
                raise Unavailable("the log refuses a submission and shows no reason", hint="Again.") from None
            submission = ready.submission
            native = Known(job_id=submission.job_id, native_id=native_id, folder=submission.folder)
            await self._tools.system.cancel([native])  # its outcome stands already
        else:
            self._watch.attach(self._attached(waiting.invocation, waiting.at, past, ready.spec, submitted))
        await waiting.ack()

    async def attach_all(self) -> None:
        """Watch everything that was submitted and has not ended, and count what was not counted.

        What cannot be attached now is tried again and again while the others are watched.

        Raises:
            Unavailable: the log does not answer.
        """
        found, uncounted = await unfinished(self._log, self._site)
        self.late = set(found)
        for start in range(0, len(found), AT_ONCE):
            some = found[start : start + AT_ONCE]
            for job, done in zip(some, await asyncio.gather(*map(self._try, some)), strict=True):
                if not done:
                    self._spawn(self._again(job))
        for start in range(0, len(uncounted), AT_ONCE):
            await asyncio.gather(*map(self._count, uncounted[start : start + AT_ONCE]))
        if found:
            _log.info("attached to %d jobs", len(self._watch))
        if self._others:
            _log.warning(
                "%d jobs were submitted by another site with the name %s, and are left to it: to have them told as"
                " lost, stop this agent and run `headrace site remove %s --force`",
                *(self._others, self._site, self._site),
            )

    async def attach(self, past: JobPast) -> None:
        """Watch a job that was submitted by an agent before this one; one that cannot be watched has ended.

        Raises:
            HeadraceError: it cannot be done now.
        """
        submitted = past.submitted
        assert submitted is not None  # noqa: S101 - there is nothing to attach to otherwise
        run, identity = submitted.run_id, submitted.invocation_id
        if self._watch.get(run, identity) is not None:
            return
        is_ours = submitted.site_id in ("", self._work.id)
        if not is_ours and not self._tools.alone:
            self._others += 1
            return
        stored = await self._log.last(job_subject(self._site, "*", run, identity))
        if stored is None:
            _log.warning("the log holds job %s no longer", identity)
            return
        lost = "" if is_ours else "it was submitted by another site of this name, which is gone"
        invocation, spec = decode(stored.body, Invocation), NO_SPEC
        try:
            spec = await self._tools.spec(read_job(invocation))
        except (BadRequest, NotFound, msgspec.MsgspecError) as error:
            said = reason_of(error) if isinstance(error, HeadraceError) else str(error)
            lost = lost or f"what was to be run cannot be read any more: {said}"
        try:
            if run not in self._cancels:
                past = await taken_over(self._log, past, run, identity, self._tools.name, self._clock())
        except Fenced:
            return  # it has ended meanwhile, or another agent has it
        job = self._attached(invocation, stored.at, past, spec, submitted)
        if lost and run not in self._cancels:
            _log.error("job %s is given up on: %s", identity, lost)
            if is_ours:
                await self._tools.system.cancel([job.known()])
            status = JobStatus(native_id=submitted.native_id, state="failed", reason="lost", detail=lost)
            self._spawn(self._ends.finish(job, status))
            return
        self._watch.attach(job)

    async def _try(self, job: Job) -> bool:
        """Attach to a job if that can be done now, and say whether nothing more is to be done about it."""
        run, identity = job
        try:
            past = await past_of(self._log, self._site, run, identity)
            if past.done is None and past.submitted is not None:
                await self.attach(past)
        except msgspec.MsgspecError as error:
            _log.error("what the log says of job %s cannot be read: %s", identity, error)
            return await self._bury(run, identity)
        except HeadraceError as error:
            _log.warning("job %s is attached to later: %s", identity, error)
            return False
        self.late.discard(job)
        return True

    async def _again(self, job: Job) -> None:
        delay_s = AGAIN_S
        while True:
            await asyncio.sleep(delay_s)
            if await self._try(job):
                return
            delay_s = min(AGAIN_S_MAX, 2 * delay_s)

    async def _bury(self, run: str, identity: str) -> bool:
        """Cancel and end a job of which nobody can read what the log says; say whether that was done."""
        try:
            stored = await self._log.last(job_subject(self._site, "*", run, identity))
            if stored is not None:
                await self._burial.bury(stored.subject, stored.at)
        except Fenced:
            pass  # somebody else has it
        except (HeadraceError, OSError) as error:
            _log.warning("job %s is ended later: %s", identity, error)
            return False
        self.late.discard((run, identity))
        return True

    async def _count(self, ended: Stored) -> None:
        """Count the slot that the outcome of a job fills: who committed it may have died before."""
        outcome = decode(ended.body, Outcome)
        if outcome.run_id not in self._cancels:
            await self._commits.fill(outcome, ended.seq, ended.at)

    def _attached(
        self, invocation: Invocation, queued_at: float, past: JobPast, spec: JobSpec, submitted: Submitted
    ) -> Attached:
        name = f"{invocation.invocation_id}-{submitted.attempt}"
        return Attached(
            invocation=invocation,
            spec=spec,
            name=name,
            folder=Path(submitted.directory or self._folders.of(name)),
            attempt=submitted.attempt,
            fence=past.fence,
            queued_at=queued_at,
            submitted=submitted,
        )
