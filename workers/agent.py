"""Take, submit, record, acknowledge; then watch, and commit how it ended: the life of a job at its site.

A message is held until the batch system has the job, and no longer. What was submitted is in the log, so a restart
attaches to it. Whatever dies at whatever moment, the same job is submitted under the same name and looked for before:
it exists once, and its outcome's subject takes one outcome for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine
from typing import Any

from functions.ensembles import delay_s, together
from functions.outlook import Outlook
from functions.shares import Shares
from headrace.errors import HeadraceError, Unavailable
from headrace.tasks import ended
from workers.attaching import Attaching
from workers.cancels import Cancels
from workers.commits import Commits, Fenced
from workers.jobburial import JobBurial
from workers.jobends import JobEnds
from workers.jobfolders import DISK_HINT, JobFolders, reason_of
from workers.jobhand import JobHand, Waiting
from workers.jobtools import Tools
from workers.jobwatch import Attached, JobWatch
from workers.joins import Joins
from workers.moves import Moves
from workers.readying import Readying
from workers.reports import hear
from workers.sitebook import SiteBook
from workers.sites.base import Submission
from workers.sites.machine import places
from workers.submitting import Ready, Submitter, Told
from workers.whywaits import WhyWaits
from workers.workfolder import WorkFolder

_log = logging.getLogger(__name__)

SUBMITS_MAX = 4
PREPARED_MAX = 64
GROUPS_MAX = 64
TROUBLE_DELAY_S = 1.0
BUSY_LOCAL_S_MAX = 2.0  # a machine without a queue gives its places out as they get free
SWEEP_S = 3600.0
HEAR_ON_S = 60.0
UNLIMITED = 10_000_000
FITS_AGAIN_S = 5.0
LAST_S, LOOK_S = 1.0, 0.1  # of a drain: for what is left at its end, and between looks whether all is done


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
        self._work = WorkFolder(tools.site)
        self._folders = JobFolders(self._work.path, tools.stager)
        self._submitter = Submitter(tools.system, self._folders.root)
        self._book = SiteBook(tools.sites, tools.site, tools.system, self._work, tools.name, tools.clock)
        self._book.ends_at = tools.ends_at
        burial = JobBurial(tools, self._folders, self._submitter, self._commits, self._go_on)
        self._hand = JobHand(tools.log, self._site, burial.later, tools.held_max)
        self._ends = JobEnds(
            agent=tools.name,
            site=self._site,
            log=tools.log,
            blobs=tools.blobs,
            folders=self._folders,
            work=self._work,
            commits=self._commits,
            book=self._book,
            outlook=outlook,
            clock=tools.clock,
            forget=self._forget,
        )
        self._moves = Moves(tools, outlook, self._submitter, tools.spec)
        self._cancels = Cancels(tools.log, lambda: self._watch.stir())
        self._watch = JobWatch(tools.system, self._ends, self._cancels, self._work.check, tools.clock, self._go_on)
        self._attaching = Attaching(
            tools,
            self._work,
            self._folders,
            burial,
            self._commits,
            self._ends,
            self._watch,
            self._cancels,
            self._go_on,
        )
        self._readying = Readying(
            tools,
            self._work,
            self._folders,
            self._submitter,
            self._commits,
            self._ends,
            self._moves,
            self._cancels,
            self._attaching,
            self._go_on,
        )
        self._why = WhyWaits(tools.log, self._site, self._go_on, tools.clock)
        self._jobs_max = places(tools.site.jobs_max) if tools.site.kind == "local" else tools.site.jobs_max or UNLIMITED
        self._shares = Shares()
        self._begun: Counter[str] = Counter()  # jobs by tenant: taken from the hand, and not submitted yet
        self._groups: Counter[str] = Counter()  # likewise what is submitted at once
        # Of each tenant: one whose inputs take long to come keeps nobody else from being prepared.
        self._preparing: dict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(PREPARED_MAX))
        self._turns = asyncio.Semaphore(SUBMITS_MAX)
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, stop: asyncio.Event, drain_s: float = 10.0, ready: Callable[[], None] = lambda: None) -> None:
        """Work until ``stop`` is set; then let submissions come to an end, ``drain_s`` seconds at most.

        ``ready`` is called once the site has its row, so that jobs may be sent to it.

        Raises:
            Conflict: another site has this name, or this is not the folder of the site that is known by it.
            OSError: the folder of the site cannot be made.
            Unavailable: the log does not answer.
        """
        await self._book.begin(anew=self._tools.alone)
        self._folders.make()
        await self._hand.ensure()
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
            if self._tools.ends_at is not None:
                await self._end(drain_s)
                drain_s = LAST_S
        finally:
            await ended({*beside, stopping})
            await self._hand.stop()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=drain_s)
            await ended(set(self._tasks))
            await self._hand.close()

    async def _end(self, drain_s: float) -> None:
        """End a site that ends with this agent: hand on what waits, and watch what runs as long as there is time."""
        self._moves.ending = True
        self._book.accepts = False
        self._book.ends_at = min(self._clock() + drain_s, self._tools.ends_at or math.inf)
        with contextlib.suppress(HeadraceError):
            await self._book.look()
        self._hand.stir()
        until = self._clock() + drain_s - LAST_S
        while self._tasks or len(self._watch) or self._hand.left() or self._hand.tries:
            if self._clock() >= until:
                return
            await asyncio.sleep(LOOK_S)

    def _go_on(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _forget(self, job: Attached) -> None:
        self._shares.ended(job.invocation.tenant, self._clock() - job.submitted.at)
        self._watch.forget(job)
        self._idle()
        self._hand.stir()

    def _idle(self) -> None:
        self._system.idle = self._room() == self._jobs_max

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
                await ended({hearing})

    # ------------------------------------------------------------ taking

    async def _take_for_ever(self) -> None:
        await self._cancels.read.wait()
        await self._attaching.attach_all()
        self._idle()
        await self._hand.start()
        while True:
            with contextlib.suppress(TimeoutError):
                # In an allocation what waits may not fit any more, though nothing else has changed.
                async with asyncio.timeout(None if self._tools.ends_at is None else FITS_AGAIN_S):
                    await self._hand.changed()
            for one in self._hand.waiting():
                if self._moves.why_not(one.work):  # it is handed on at once, whatever else there is to do
                    self._begin([one])
            if self._room() <= 0:
                continue
            await self._hand.gathered()
            for group in self._next():
                self._begin(group)

    def _next(self) -> list[list[Waiting]]:
        """Return what to submit now, in order, in groups that are submitted at once.

        Of each tenant only so much is begun that another's job need not wait long for its turn at the batch system.
        """
        waiting = [one for one in self._hand.waiting() if self._groups[one.invocation.tenant] < GROUPS_MAX]
        places = self._watch.tenants() + self._begun
        groups = together(self._shares.next(waiting, places, self._room()), max(1, self._submitter.together_max))
        of = Counter(self._groups)
        begun = []
        for group in groups:
            tenant = group[0].invocation.tenant
            if of[tenant] < GROUPS_MAX:
                of[tenant] += 1
                begun.append(group)
        return begun

    def _begin(self, group: list[Waiting]) -> None:
        tenant = group[0].invocation.tenant
        self._hand.begin(group)
        self._begun[tenant] += len(group)
        self._groups[tenant] += 1
        self._idle()
        self._go_on(self._handle(group))

    def _room(self) -> int:
        return self._jobs_max - len(self._watch) - len(self._attaching.late) - self._begun.total()

    async def _handle(self, group: list[Waiting]) -> None:
        """Bring some jobs from the hand to the batch system."""
        try:
            ready = [one for one in await asyncio.gather(*map(self._ready, group)) if one is not None]
            for one in [one for one in ready if self._moves.why_not(one.waiting.work)]:
                ready.remove(one)  # bringing its inputs took what it had left: it is looked at anew
                await one.waiting.give_back()
            if ready:
                told = await self._submit([one.submission for one in ready])
                self._book.submitted(list(told.values()))
                await asyncio.gather(*(self._told(one, told[one.submission.job_id]) for one in ready))
        finally:
            tenant = group[0].invocation.tenant
            self._begun[tenant] -= len(group)
            self._groups[tenant] -= 1
            self._idle()
            self._hand.stir()

    async def _submit(self, submissions: list[Submission]) -> dict[str, Told]:
        async with self._turns:
            try:
                return await self._submitter.submit(submissions)
            except Exception as error:  # whatever was begun is found the next time
                if isinstance(error, OSError):
                    said, hint = reason_of(error), DISK_HINT
                    _log.warning("site %s: %d jobs are not submitted now: %s", self._site, len(submissions), said)
                else:
                    said, hint = f"not submitted: {error}", "It is looked for, and submitted, once more."
                    _log.exception("site %s: %d jobs are not submitted now", self._site, len(submissions))
                return {submission.job_id: Unavailable(said, hint=hint) for submission in submissions}

    async def _ready(self, waiting: Waiting) -> Ready | None:
        found: list[Ready] = []

        async def prepare() -> None:
            async with self._preparing[waiting.invocation.tenant]:
                ready = await self._readying.ready(waiting)
            if ready is not None:
                found.append(ready)

        await self._safely(waiting, prepare())
        return found[0] if found else None

    async def _told(self, ready: Ready, told: Told) -> None:
        """Do what follows from what the batch system said of a job."""
        waiting = ready.waiting
        if isinstance(told, str):
            await self._safely(waiting, self._attaching.record(ready, told))
        elif told.transient:
            await self._come_again(waiting, told)
        else:
            said = reason_of(told)
            await self._safely(waiting, self._readying.refuse(waiting, ready.past, "rejected", said, ready.stage_in_s))

    async def _come_again(self, waiting: Waiting, error: HeadraceError) -> None:
        _log.info("job %s is submitted later: %s", waiting.invocation.invocation_id, error)
        self._why.tell(waiting, error)
        after_s = self._delay_s(waiting)
        await waiting.give_back(min(after_s, BUSY_LOCAL_S_MAX) if self._tools.site.kind == "local" else after_s)

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
            self._why.tell(waiting, error)
            await waiting.give_back(self._delay_s(waiting))
        except Exception:
            _log.exception("job %s goes back", identity)
            await waiting.give_back(max(TROUBLE_DELAY_S, self._delay_s(waiting)))

    def _delay_s(self, waiting: Waiting) -> float:
        deadline = waiting.invocation.deadline
        return delay_s(waiting.tries + 1, None if deadline is None else deadline - self._clock())

    # ------------------------------------------------------------ what goes on beside

    async def _sweep_for_ever(self) -> None:
        """Remove the folders of jobs that ended long ago, and have those of ours that have not look new to others."""
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self._sweep()
            except HeadraceError as error:
                _log.warning("site %s: %s", self._site, error)
            except OSError as error:
                _log.warning("site %s: old folders stay for now: %s", self._site, reason_of(error))

    async def _sweep(self) -> None:
        kept = set()
        for name, folder in self._watch.names():
            array = await asyncio.to_thread(self._submitter.array_of, folder)
            kept |= {name} if array is None else {name, self._submitter.folder_name(array)}
        await self._work.check()
        gone = await self._folders.sweep(self._tools.site.keep_s, kept)
        if gone:
            _log.info("removed the folders of %d jobs", gone)
