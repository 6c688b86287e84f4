"""Take, submit, record, acknowledge; then watch, and commit how it ended: the life of a job at its site.

A message is held until the batch system has the job, and no longer. What was submitted is in the log, so a restart
attaches to it. Whatever dies at whatever moment, the same job is submitted under the same name and looked for before:
it exists once, and its outcome's subject takes one outcome for ever.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from functions import outcomes
from functions.ensembles import delay_s, in_order
from functions.jobs import read_job
from functions.outlook import Outlook
from headrace.errors import BadRequest, HeadraceError, NotFound, Unavailable
from headrace.joblog import JobWork, SiteRecord, Submitted
from headrace.jobs import JobSpec, Reason
from headrace.model import ErrorInfo, InvocationState
from headrace.wire import ForecastRow, Invocation, Lease, Note, Outcome, Said, decode, encode
from streams.blobs import Blobs, check_out
from streams.log import AlreadyThere, Log, Record
from streams.poll import Arrival
from streams.stored import Stored
from streams.tables import Table
from streams.topology import ensure_site, fence_subject, job_subject, lease_subject, note_subject, submit_subject
from workers.cancels import Cancels
from workers.commits import APPEND_TIMEOUT_S, Commits, Fenced
from workers.jobends import JobEnds
from workers.jobfolders import JobFolders, reason_of
from workers.jobhand import JobHand, Waiting
from workers.jobpast import JobPast, past_of, unfinished
from workers.jobwatch import Attached, JobWatch
from workers.joins import Joins
from workers.late import useful_s
from workers.push import Push
from workers.reports import hear
from workers.sitebook import SiteBook
from workers.sites.base import SiteConfig, Submission
from workers.sites.lazy import LazySite
from workers.sites.machine import places
from workers.staging import Stager
from workers.submitting import Submitter, Told

_log = logging.getLogger(__name__)

SUBMITS_MAX = 4
PREPARED_MAX = 64
ATTACHED_AT_ONCE = 64
TROUBLE_DELAY_S = 1.0
BUSY_LOCAL_S_MAX = 2.0  # a machine without a queue gives its places out as they get free
SWEEP_S = 3600.0
HEAR_ON_S = 60.0
CANCEL_AGAIN_S = 1.0
UNLIMITED = 10_000_000
# What may be better later; any other error with a folder or a file is about what the job asks for.
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)
NAME_PREFIX = "agent"


class Tools(Struct, frozen=True, kw_only=True):
    """What an agent works with, made and owned by whoever starts it.

    ``host`` tells this process from other agents. ``work_age_max_s`` is how long a job may wait to be submitted, in
    seconds, before it is given up on; ``ends_at`` is the epoch second at which the site itself ends, where it is an
    allocation; ``clock`` tells epoch seconds.
    """

    host: str
    site: SiteConfig
    system: LazySite
    log: Log
    forecasts: Table[ForecastRow]
    sites: Table[SiteRecord]
    blobs: Blobs
    stager: Stager
    push: Push
    work_age_max_s: float = 86400.0
    ends_at: float | None = None
    clock: Callable[[], float] = time.time

    @property
    def name(self) -> str:
        """The agent's name: of which site it is, and which process."""
        return f"{NAME_PREFIX}/{self.site.name}/{self.host}"


class _Ready(Struct, frozen=True):
    """A job that has its lease, its folder and its inputs, and can be submitted."""

    waiting: Waiting
    past: JobPast
    spec: JobSpec
    submission: Submission
    digest: str
    stage_in_s: float


class Agent:
    """Runs the jobs of one site until it is told to stop; what runs then goes on without it."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._log = tools.log
        self._clock = tools.clock
        self._site = tools.site.name
        self._system = tools.system
        outlook = Outlook(tools.forecasts.get)
        self._commits = Commits(tools.log, Joins(tools.log, tools.clock, outlook), tools.clock)
        self._folders = JobFolders(Path(tools.site.work), tools.stager)
        self._submitter = Submitter(tools.system, self._folders.root)
        self._book = SiteBook(tools.sites, tools.site, tools.system, tools.name, tools.clock)
        self._book.ends_at = tools.ends_at
        self._hand = JobHand(tools.log, self._site, self._bury_later)
        self._ends = JobEnds(
            agent=tools.name,
            site=self._site,
            log=tools.log,
            blobs=tools.blobs,
            folders=self._folders,
            commits=self._commits,
            book=self._book,
            outlook=outlook,
            clock=tools.clock,
            forget=self._forget,
        )
        self._cancels = Cancels(tools.log, self._stir)
        self._watch = JobWatch(tools.system, self._ends, self._cancels, tools.clock, self._go_on)
        self._jobs_max = places(tools.site.jobs_max) if tools.site.kind == "local" else tools.site.jobs_max or UNLIMITED
        self._submitting = 0
        self._preparing = asyncio.Semaphore(PREPARED_MAX)
        self._turns = asyncio.Semaphore(SUBMITS_MAX)
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, stop: asyncio.Event, drain_s: float = 10.0, ready: Callable[[], None] = lambda: None) -> None:
        """Work until ``stop`` is set; then let submissions come to an end, ``drain_s`` seconds at most.

        ``ready`` is called once the site has its row, so that jobs may be sent to it.

        Raises:
            OSError: the folder of the site cannot be made.
            Unavailable: the log does not answer.
        """
        self._folders.make()
        await ensure_site(self._log.link, self._site)
        await self._book.look()
        ready()
        beside = [
            asyncio.create_task(coroutine, name=f"agent-{name}")
            for name, coroutine in (
                ("cancels", self._cancels.follow()),
                ("reports", self._hear_for_ever()),
                ("book", self._book.run()),
                ("watch", self._watch.run()),
                ("take", self._take_for_ever()),
                ("sweep", self._sweep_for_ever()),
            )
        ]
        stopping = asyncio.create_task(stop.wait())
        try:
            done, _ = await asyncio.wait({*beside, stopping}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # one that failed ends the agent, which is started again
        finally:
            await _ended({*beside, stopping})
            await self._hand.stop()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=drain_s)
            await _ended(set(self._tasks))
            await self._hand.close()

    def _go_on(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _stir(self) -> None:
        self._watch.stir()

    def _forget(self, job: Attached) -> None:
        self._watch.forget(job)
        self._idle()
        self._hand.stir()

    def _idle(self) -> None:
        self._system.idle = not len(self._watch) and not self._submitting

    async def _hear_for_ever(self) -> None:
        """Hear what jobs report, as long as there are any."""
        while True:
            await self._watch.busy.wait()
            hearing = asyncio.create_task(hear(self._log, self._site, self._watch.heard))
            try:
                while self._watch.busy.is_set():
                    await asyncio.wait({hearing}, timeout=HEAR_ON_S)
                    if hearing.done():
                        hearing.result()
            finally:
                await _ended({hearing})

    # ------------------------------------------------------------ taking

    async def _take_for_ever(self) -> None:
        await self._cancels.read.wait()
        await self._attach_all()
        await self._hand.start()
        while True:
            await self._hand.changed()
            if self._room() <= 0:
                continue
            await self._hand.gathered()
            for group in in_order(self._hand.waiting(), self._room(), max(1, self._submitter.together_max)):
                await self._hand.begin(group)
                self._submitting += len(group)
                self._idle()
                self._go_on(self._handle(group))

    def _room(self) -> int:
        return self._jobs_max - len(self._watch) - self._submitting

    async def _handle(self, group: list[Waiting]) -> None:
        """Bring some jobs from the hand to the batch system."""
        try:
            ready = [one for one in await asyncio.gather(*map(self._ready, group)) if one is not None]
            if ready:
                told = await self._submit([one.submission for one in ready])
                await asyncio.gather(*(self._recorded(one, told[one.submission.job_id]) for one in ready))
        finally:
            self._submitting -= len(group)
            self._idle()
            self._hand.stir()

    async def _submit(self, submissions: list[Submission]) -> dict[str, Told]:
        async with self._turns:
            try:
                return await self._submitter.submit(submissions)
            except Exception as error:  # a full disk, say: whatever was begun is found the next time
                _log.exception("site %s: %d jobs are not submitted now", self._site, len(submissions))
                unsure = Unavailable(f"not submitted: {error}", hint="It is looked for, and submitted, once more.")
                return {submission.job_id: unsure for submission in submissions}

    async def _ready(self, waiting: Waiting) -> _Ready | None:
        found: list[_Ready] = []

        async def prepare() -> None:
            async with self._preparing:
                ready = await self._prepare(waiting)
            if ready is not None:
                found.append(ready)

        await self._safely(waiting, prepare())
        return found[0] if found else None

    async def _recorded(self, ready: _Ready, told: Told) -> None:
        await self._safely(ready.waiting, self._record(ready, told))

    async def _safely(self, waiting: Waiting, doing: Coroutine[Any, Any, None]) -> None:
        """Do something with a job in hand; where it goes wrong, the job is handed back or is another's already."""
        identity = waiting.invocation.invocation_id
        try:
            await doing
        except Fenced:
            _log.warning("job %s was taken over by another agent", identity)
            waiting.leave()
        except asyncio.CancelledError:
            await waiting.give_back()
            raise
        except HeadraceError as error:
            _log.warning("job %s goes back: %s", identity, error)
            await waiting.give_back(self._delay_s(waiting))
        except Exception:
            _log.exception("job %s goes back", identity)
            await waiting.give_back(max(TROUBLE_DELAY_S, self._delay_s(waiting)))

    def _delay_s(self, waiting: Waiting) -> float:
        deadline = waiting.invocation.deadline
        return delay_s(waiting.tries + 1, None if deadline is None else deadline - self._clock())

    # ------------------------------------------------------------ one job, up to its submission

    async def _prepare(self, waiting: Waiting) -> _Ready | None:
        """Look at what was done about a job, and get it ready; None where nothing is to be submitted.

        Raises:
            Fenced: it is another agent's.
            HeadraceError: it cannot be done now.
        """
        invocation = waiting.invocation
        run, identity = invocation.run_id, invocation.invocation_id
        past = await past_of(self._log, self._site, run, identity)
        if past.done is not None:
            await self._commits.fill(decode(past.done.body, Outcome), past.done.seq, past.done.at)
            await waiting.ack()
            return None
        name = f"{identity}-{past.attempt}"
        folder = self._folders.of(name)
        if run in self._cancels:
            if await self._is_clear(waiting, past, name, folder):
                await waiting.ack()
            return None
        if past.holder and not past.holder.startswith(f"{NAME_PREFIX}/{self._site}/"):
            _log.warning("job %s is at another site: %s has it", name, past.holder)
            await waiting.ack()
            return None
        if past.submitted is not None:
            if self._watch.get(run, identity) is None:
                await self._attach(past)
            await waiting.ack()
            return None
        hopeless = self._hopeless(waiting)
        if hopeless is not None:
            if await self._is_clear(waiting, past, name, folder):
                await self._commits.commit(*outcomes.fail(invocation, self._attempted(waiting, past), *hopeless))
                await waiting.ack()
            return None
        past = msgspec.structs.replace(past, fence=await self._claim(run, identity, past))
        return await self._bring(waiting, past, name, folder)

    async def _claim(self, run: str, identity: str, past: JobPast) -> int:
        """Take a job over, and return the fence: whoever had it before commits no more.

        Raises:
            Fenced: another agent took it over, or has committed it, at this moment.
        """
        lease = Lease(
            run_id=run, invocation_id=identity, attempt=past.attempt, worker=self._tools.name, at=self._clock()
        )
        record = Record(lease_subject(run, identity), encode(lease), fence_subject(run, identity), past.fence)
        try:
            (seq,) = await self._log.append([record], timeout_s=APPEND_TIMEOUT_S)
        except AlreadyThere as other:
            raise Fenced from other
        return seq

    async def _is_clear(self, waiting: Waiting, past: JobPast, name: str, folder: Path) -> bool:
        """Cancel what may be there of a job that nobody needs; say whether nothing is left, else it is handed back."""
        if past.submitted is not None:
            await self._system.cancel([past.submitted.native_id])
            return True
        if not past.fence:
            return True  # nobody ever began to submit it
        native_id = await self._submitter.find(name, folder)
        if native_id is not None:
            await self._system.cancel([native_id])
            return True
        attempted_at = await asyncio.to_thread(self._submitter.attempted_at, folder)
        left_s = 0.0 if attempted_at is None else attempted_at + self._tools.site.settle_s - self._clock()
        if left_s > 0:  # it was being submitted, and may come up yet
            await waiting.give_back(left_s)
            return False
        return True

    def _hopeless(self, waiting: Waiting) -> tuple[ErrorInfo, InvocationState] | None:
        """Return how a job ends that is not worth submitting, or None."""
        invocation, now = waiting.invocation, self._clock()
        left_s = useful_s(invocation, now)
        if left_s is not None and left_s <= 0:
            return ErrorInfo(kind="deadline", message="the deadline passed before it was submitted"), "canceled"
        age_s, limit_s = now - max(waiting.at, invocation.sent_at), self._tools.work_age_max_s
        if age_s > limit_s:
            message = f"it waited {age_s:,.0f} s to be submitted; the limit is {limit_s:,.0f} s"
            return ErrorInfo(kind="expired", message=message), "dead"
        return None

    def _attempted(self, waiting: Waiting, past: JobPast) -> outcomes.Attempted:
        now = self._clock()
        return outcomes.Attempted(
            attempt=past.attempt,
            worker=self._tools.name,
            queued_at=waiting.at,
            started_at=now,
            ended_at=now,
            fence=past.fence,
            failed_s=past.failed_s,
        )

    async def _bring(self, waiting: Waiting, past: JobPast, name: str, folder: Path) -> _Ready | None:
        """Make the folder of a job and bring its inputs there; one whose inputs cannot be had has failed."""
        invocation = waiting.invocation
        began_at = self._clock()

        def tell(said: Said) -> None:
            self._go_on(self._tell(invocation.run_id, invocation.invocation_id, past.attempt, said))

        try:
            spec = await self._spec(waiting.work)
            await asyncio.to_thread(folder.mkdir, mode=0o700, parents=True, exist_ok=True)
            await self._folders.bring(spec, folder, tell)
        except (BadRequest, NotFound, msgspec.MsgspecError, OSError) as error:
            if isinstance(error, OSError) and error.errno in DISK_TROUBLE:
                raise Unavailable(reason_of(error), hint="Free some space at the site.") from error
            detail = str(error) if isinstance(error, msgspec.MsgspecError) else reason_of(error)
            await self._refuse(waiting, past, "stage_in", detail, self._clock() - began_at)
            return None
        pushed = await asyncio.to_thread(self._tools.push.prepare, folder, invocation.run_id, invocation.invocation_id)
        submission = Submission(job_id=name, spec=spec, folder=folder, before=pushed.before, after=pushed.after)
        return _Ready(waiting, past, spec, submission, pushed.digest, max(0.0, self._clock() - began_at))

    async def _spec(self, work: JobWork) -> JobSpec:
        return msgspec.json.decode(await check_out(work.spec, self._tools.blobs), type=JobSpec)

    async def _refuse(self, waiting: Waiting, past: JobPast, reason: Reason, detail: str, stage_in_s: float) -> None:
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
            await self._log.append([Record(note_subject(run, identity, attempt), encode(note))])
        except HeadraceError as error:
            _log.warning("a note of job %s is lost: %s", identity, error)

    # ------------------------------------------------------------ one job, from its submission on

    async def _record(self, ready: _Ready, told: Told) -> None:
        """Record that the batch system has a job, and let go of its message.

        Raises:
            Fenced: it is another agent's.
            HeadraceError: the batch system does not have it now, or it cannot be recorded.
        """
        waiting, past = ready.waiting, ready.past
        if isinstance(told, HeadraceError):
            if told.transient:
                await self._come_again(waiting, told)
            else:
                await self._refuse(waiting, past, "rejected", reason_of(told), ready.stage_in_s)
            return
        invocation, now = waiting.invocation, self._clock()
        run, identity = invocation.run_id, invocation.invocation_id
        submitted = Submitted(
            run_id=run,
            invocation_id=identity,
            site=self._site,
            attempt=past.attempt,
            native_id=told,
            at=now,
            agent=self._tools.name,
            directory=str(ready.submission.folder),
            secret_digest=ready.digest,
            limit_s=ready.spec.attributes.duration_s or self._tools.site.duration_s,
            first_at=past.first_at or now,
            stage_in_s=ready.stage_in_s,
        )
        subject = submit_subject(run, identity, past.attempt, self._site)
        record = Record(subject, encode(submitted), fence_subject(run, identity), past.fence)
        try:
            await self._log.append([record], timeout_s=APPEND_TIMEOUT_S)
        except AlreadyThere:
            if not await self._commits.settled_otherwise(run, identity, past.fence):
                raise Unavailable("the log refuses a submission and shows no reason", hint="Again.") from None
            await self._system.cancel([told])  # its outcome stands already
        else:
            self._watch.attach(self._attached(waiting.invocation, waiting.at, past, ready.spec, submitted))
        await waiting.ack()

    async def _come_again(self, waiting: Waiting, error: HeadraceError) -> None:
        _log.info("job %s is submitted later: %s", waiting.invocation.invocation_id, error)
        after_s = self._delay_s(waiting)
        await waiting.give_back(min(after_s, BUSY_LOCAL_S_MAX) if self._tools.site.kind == "local" else after_s)

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
            failed_s=past.failed_s,
        )

    async def _attach_all(self) -> None:
        """Watch everything that was submitted and has not ended, and count what was not counted."""
        found, uncounted = await unfinished(self._log, self._site)
        for start in range(0, len(found), ATTACHED_AT_ONCE):
            await asyncio.gather(*map(self._attach, found[start : start + ATTACHED_AT_ONCE]))
        for start in range(0, len(uncounted), ATTACHED_AT_ONCE):
            await asyncio.gather(*map(self._count, uncounted[start : start + ATTACHED_AT_ONCE]))
        if found:
            _log.info("attached to %d jobs", len(self._watch))
        self._idle()

    async def _count(self, ended: Stored) -> None:
        """Count the slot that the outcome of a job fills: who committed it may have died before."""
        outcome = decode(ended.body, Outcome)
        if outcome.run_id not in self._cancels:
            await self._commits.fill(outcome, ended.seq, ended.at)

    async def _attach(self, past: JobPast) -> None:
        """Watch a job that was submitted by an agent before this one."""
        submitted = past.submitted
        assert submitted is not None  # noqa: S101 - there is nothing to attach to otherwise
        run, identity = submitted.run_id, submitted.invocation_id
        stored = await self._log.last(job_subject(self._site, "*", run, identity))
        if stored is None:
            _log.warning("the log holds job %s no longer", identity)
            return
        invocation = decode(stored.body, Invocation)
        try:
            if run not in self._cancels:
                past = msgspec.structs.replace(past, fence=await self._claim(run, identity, past))
        except Fenced:
            return  # it has ended meanwhile, or another agent has it
        spec = await self._spec(read_job(invocation))
        self._watch.attach(self._attached(invocation, stored.at, past, spec, submitted))

    # ------------------------------------------------------------ what goes on beside

    async def _sweep_for_ever(self) -> None:
        """Remove the folders of jobs that ended long ago."""
        while True:
            await asyncio.sleep(SWEEP_S)
            kept = set()
            for name, folder in self._watch.names():
                array = await asyncio.to_thread(self._submitter.array_of, folder)
                kept |= {name} if array is None else {name, self._submitter.folder_name(array)}
            gone = await self._folders.sweep(self._tools.site.keep_s, kept)
            if gone:
                _log.info("removed the folders of %d jobs", gone)

    def _bury_later(self, arrived: Arrival) -> None:
        self._go_on(self._bury(arrived))

    async def _bury(self, arrived: Arrival) -> None:
        """End a job whose message no agent could read, so that its run ends too."""
        try:
            outcome, unit = outcomes.unreadable(arrived.subject, self._tools.name, arrived.at, self._clock())
            await self._commits.commit(outcome, unit)
            await self._hand.acknowledge(arrived)
        except (HeadraceError, Fenced) as error:
            _log.warning("message %d is not buried yet: %s", arrived.seq, error)


async def _ended(tasks: set[asyncio.Task[Any]]) -> None:
    """Cancel tasks and return once they have ended. Before Python 3.12 a cancel gets lost in ``wait_for`` at times."""
    while tasks:
        for task in tasks:
            task.cancel()
        ended, tasks = await asyncio.wait(tasks, timeout=CANCEL_AGAIN_S)
        for task in ended:
            if not task.cancelled() and (error := task.exception()) is not None:
                _log.debug("%s ended: %s", task.get_name(), error)
