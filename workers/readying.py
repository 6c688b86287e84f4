"""One job, from its message up to its submission: what was done about it before, its lease, its folder, its inputs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from functions import outcomes
from functions.moves import is_elsewhere
from headrace.errors import BadRequest, HeadraceError, NotFound, Unavailable
from headrace.jobs import Reason
from headrace.wire import Note, Outcome, Said, decode, encode
from streams.log import Record
from streams.topology import note_subject
from workers.attaching import Attaching
from workers.cancels import Cancels
from workers.commits import Commits
from workers.jobends import JobEnds
from workers.jobfolders import DISK_HINT, JobFolders, is_of_site, reason_of
from workers.jobhand import Waiting
from workers.jobpast import JobPast, past_of, taken_over
from workers.jobtools import Tools
from workers.late import hopeless
from workers.moves import Moves
from workers.sites.base import Known, Submission
from workers.submitting import Ready, Submitter
from workers.workfolder import WorkFolder

_log = logging.getLogger(__name__)


class Readying:
    """Gets the jobs of one site ready to be submitted, and ends those that are not to be."""

    def __init__(
        self,
        tools: Tools,
        work: WorkFolder,
        folders: JobFolders,
        submitter: Submitter,
        commits: Commits,
        ends: JobEnds,
        moves: Moves,
        cancels: Cancels,
        attaching: Attaching,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        """Describe it; ``spawn`` runs something beside."""
        self._tools = tools
        self._site = tools.site.name
        self._log = tools.log
        self._clock = tools.clock
        self._work = work
        self._folders = folders
        self._submitter = submitter
        self._commits = commits
        self._ends = ends
        self._moves = moves
        self._cancels = cancels
        self._attaching = attaching
        self._spawn = spawn

    async def ready(self, waiting: Waiting) -> Ready | None:
        """Look at what was done about a job, and get it ready; None where nothing is to be submitted.

        Raises:
            Fenced: it is another agent's.
            HeadraceError: it cannot be done now.
        """
        invocation = waiting.invocation
        run, identity = invocation.run_id, invocation.invocation_id
        past = await past_of(self._log, self._site, run, identity)
        name = f"{identity}-{past.attempt}"
        folder = self._folders.of(name)
        if past.done is not None:
            await self._commits.fill(decode(past.done.body, Outcome), past.done.seq, past.done.at)
            # What was being submitted as it ended has no record, and nobody watches it.
            if past.submitted is not None or await self._is_clear(waiting, past, name, folder):
                await waiting.ack()
            return None
        if run in self._cancels:
            if await self._is_clear(waiting, past, name, folder):
                await waiting.ack()
            return None
        if is_elsewhere(past.holder, self._site):
            _log.warning("job %s is at another site: %s has it", name, past.holder)
            await waiting.ack()
            return None
        if past.submitted is not None:
            await self._attaching.attach(past)
            await waiting.ack()
            return None
        since = waiting.work.waits_since or max(waiting.at, invocation.sent_at)
        over = hopeless(invocation, since, self._clock(), self._tools.work_age_max_s)
        if over is not None:
            if await self._is_clear(waiting, past, name, folder):
                await self._commits.commit(*outcomes.fail(invocation, self._attempted(waiting, past), *over))
                await waiting.ack()
            return None
        if await self._moves.leaves(waiting, past, name, folder):
            return None
        await self._work.check()
        past = await taken_over(self._log, past, run, identity, self._tools.name, self._clock())
        return await self._bring(waiting, past, name, folder)

    async def _is_clear(self, waiting: Waiting, past: JobPast, name: str, folder: Path) -> bool:
        """Cancel what may be there of a job that nobody needs; say whether nothing is left, else it is handed back."""
        native_id, left_s = await self._submitter.begun(past, name, folder, self._clock())
        if native_id is not None:
            await self._tools.system.cancel([Known(job_id=name, native_id=native_id, folder=folder)])
        elif left_s > 0:
            await waiting.give_back(left_s)
            return False
        return True

    def _attempted(self, waiting: Waiting, past: JobPast) -> outcomes.Attempted:
        now = self._clock()
        return outcomes.Attempted(
            attempt=past.attempt,
            worker=self._tools.name,
            queued_at=waiting.at,
            started_at=now,
            ended_at=now,
            fence=past.fence,
        )

    async def _bring(self, waiting: Waiting, past: JobPast, name: str, folder: Path) -> Ready | None:
        """Make the folder of a job and bring its inputs there; one whose inputs cannot be had has failed."""
        invocation = waiting.invocation
        began_at = self._clock()

        def tell(said: Said) -> None:
            self._spawn(self._tell(invocation.run_id, invocation.invocation_id, past.attempt, said))

        try:
            # Without what is above it: that was there when the agent began, and is not to be made beside a lost disk.
            await asyncio.to_thread(folder.mkdir, mode=0o700, exist_ok=True)
            pushed = await asyncio.to_thread(
                self._tools.push.prepare, folder, invocation.run_id, invocation.invocation_id
            )
        except OSError as error:
            raise Unavailable(reason_of(error), hint=DISK_HINT) from error
        reason: Reason = "stage_in"
        try:
            spec = await self._tools.spec(waiting.work)
            reason = "rejected"
            await self._folders.make_directory(spec)
            reason = "stage_in"
            await self._folders.bring(spec, folder, tell)
        except (BadRequest, NotFound, msgspec.MsgspecError, OSError) as error:
            if isinstance(error, OSError):
                await self._work.check()  # whatever the error is called: without the disk nothing is the job's fault
                if is_of_site(error):
                    raise Unavailable(reason_of(error), hint=DISK_HINT) from error
            detail = str(error) if isinstance(error, msgspec.MsgspecError) else reason_of(error)
            await self.refuse(waiting, past, reason, detail, self._clock() - began_at)
            return None
        submission = Submission(job_id=name, spec=spec, folder=folder, before=pushed.before, after=pushed.after)
        return Ready(waiting, past, spec, submission, pushed.digest, max(0.0, self._clock() - began_at))

    async def refuse(self, waiting: Waiting, past: JobPast, reason: Reason, detail: str, stage_in_s: float) -> None:
        """Commit that a job failed before the batch system had it, and let go of its message.

        Raises:
            Fenced: it is another agent's.
            Unavailable: the log does not answer.
        """
        await self._ends.refuse(
            waiting.invocation,
            reason=reason,
            detail=detail,
            attempt=past.attempt,
            fence=past.fence,
            queued_at=waiting.at,
            stage_in_s=stage_in_s,
        )
        await waiting.ack()

    async def _tell(self, run: str, identity: str, attempt: int, said: Said) -> None:
        """Tell how far the inputs are."""
        note = Note(run_id=run, invocation_id=identity, at=self._clock(), moved=said.moved)
        try:
            await self._log.append([Record(note_subject(run, identity, attempt), encode(note), hint=True)])
        except HeadraceError as error:
            _log.warning("a note of job %s is lost: %s", identity, error)
