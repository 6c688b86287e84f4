"""Take, run, commit: the life of an invocation in a worker.

Record, then acknowledge: a delivery is acknowledged once its outcome, and all that follows from it, is in the log. A
crash at any point before repeats the work; the outcome's subject takes one outcome for ever, so the effects count once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import msgspec
from msgspec import Struct, structs

from functions import effects, outcomes
from functions.busy import Busy
from functions.outcomes import Attempted, World
from functions.outlook import Outlook
from functions.pilot import fits
from functions.policies import policy
from functions.retraction import retract
from functions.retries import LOST_ATTEMPTS_MAX, NO_PAST, Past, look_back, retry_at, wait_s
from functions.runaway import INVOCATIONS_MAX
from headrace.clock import parse_duration
from headrace.errors import (
    ChildLost,
    FunctionError,
    HeadraceError,
    LoadError,
    NotFound,
    TooLarge,
    Unavailable,
    UserError,
)
from headrace.model import Code, ErrorInfo, InvocationState
from headrace.tasks import ended
from headrace.wire import (
    RETRACTER,
    SPREADER,
    Ask,
    FunctionRecord,
    Granted,
    Invocation,
    Invoke,
    Lease,
    Outcome,
    Returned,
    Spread,
    decode,
    encode,
)
from streams.blobs import Blobs, check_in
from streams.intake import Delivery, Intake
from streams.log import AlreadyThere, Log, Record
from streams.newest import outdated
from streams.presence import Present, tell
from streams.tables import Tables
from streams.threads import NOTHING_TO_SETTLE, Settled, settle
from streams.topology import (
    attempt_subject,
    fence_subject,
    lease_subject,
    start_subject,
)
from workers.bound import Bound
from workers.burial import Burial
from workers.cancels import Cancels
from workers.commits import APPEND_TIMEOUT_S, Commits, Fenced, checked_in, listed
from workers.durations import Durations
from workers.hand import WorkerHand
from workers.inputs import Inputs
from workers.joins import Joins
from workers.ladder import Ladder
from workers.late import Late, stopped_after, useful_s
from workers.placing import placed
from workers.pool import Pool
from workers.staging import Errands, Stager
from workers.voice import Voice

_log = logging.getLogger(__name__)

# Begun and not yet in the log: at 2,000 a second enough for a log that takes a quarter of a second. What is more hides
# from the gateway how much waits.
UNCOMMITTED_MAX = 512
TROUBLE_DELAY_S = 1.0


class Tools(Struct, frozen=True, kw_only=True):
    """What a worker works with, made and owned by whoever starts it.

    ``order`` names one of ``functions.policies``. ``work_age_max_s`` is how long work may wait, in seconds, before it
    is given up on; ``chain_depth_max`` bounds how many invocations follow one another, ``run_invocations_max`` how many
    there are in a run; ``ends_at`` is the epoch second at which the allocation ends that this worker is in, if it is in
    one; ``clock`` tells epoch seconds, and ``rng`` the jitter of delays.
    """

    name: str
    log: Log
    tables: Tables
    blobs: Blobs
    pool: Pool
    slots: int
    stager: Stager | None = None
    order: str = "headrace"
    work_age_max_s: float = 86400.0
    chain_depth_max: int = outcomes.DEPTH_MAX
    run_invocations_max: int = INVOCATIONS_MAX
    ends_at: float | None = None
    clock: Callable[[], float] = time.time
    rng: random.Random = msgspec.field(default_factory=random.Random)


class Worker:
    """Runs invocations from all lanes until it is told to stop."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._log = tools.log
        self._clock = tools.clock
        self._outlook = Outlook(tools.tables.forecasts.get)
        self._durations = Durations(self._outlook, tools.clock)
        self._busy = Busy(tools.clock)
        self._hand = WorkerHand(policy(tools.order, tools.slots), self._durations, self._busy, tools.clock)
        self._commits = Commits(tools.log, Joins(tools.log, tools.clock, self._outlook), tools.clock)
        self._intake = Intake(
            tools.log,
            self._hand,
            tools.tables.tenants,
            slots=tools.slots,
            on_over=self._end_later,
            on_unreadable=Burial(tools.name, tools.log, self._commits, self._go_on, tools.clock).later,
        )
        self._ladder = Ladder(tools.log, tools.tables, self._outlook, tools.clock)
        self._free = asyncio.Semaphore(tools.slots)
        self._uncommitted = asyncio.Semaphore(UNCOMMITTED_MAX)
        self._tasks: set[asyncio.Task[None]] = set()
        self._cancels = Cancels(tools.log)
        self._inputs = Inputs(tools.log, tools.blobs)
        self._stager = tools.stager or Stager(tools.blobs)
        self._bound = Bound(tools.log, tools.run_invocations_max)

    async def run(self, stop: asyncio.Event, drain_s: float = 10.0) -> None:
        """Work until ``stop`` is set; then finish what runs (``drain_s`` seconds at most), hand back the rest."""
        cancels = asyncio.create_task(self._cancels.follow(), name="worker-cancels")
        taking = asyncio.create_task(self._take_for_ever(), name="worker-take")
        present = Present(worker=self._tools.name, slots=self._tools.slots)
        telling = asyncio.create_task(tell(self._log.link, present), name="worker-presence")
        stopping = asyncio.create_task(stop.wait())
        try:
            done, _ = await asyncio.wait({taking, cancels, stopping}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # one that failed ends the worker, which is started again
        finally:
            await ended({taking, cancels, telling, stopping})
            await self._intake.stop()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=drain_s)
            await ended(self._tasks)
            await self._intake.close()

    async def _take_for_ever(self) -> None:
        await self._cancels.read.wait()
        await self._intake.start()
        while True:
            await self._free.acquire()
            try:
                await self._uncommitted.acquire()
                delivery = await self._intake.take()
            except asyncio.CancelledError:
                self._free.release()
                raise
            self._busy.begin(delivery.reply, delivery.run)
            self._go_on(self._handle(delivery))

    def _go_on(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _end_later(self, delivery: Delivery) -> None:
        self._go_on(self._finish(delivery, lambda: None))

    def _free_slot(self, delivery: Delivery) -> None:
        self._busy.end(delivery.reply)
        self._free.release()
        self._intake.slot_freed()

    async def _handle(self, delivery: Delivery) -> None:
        slot = _Once(partial(self._free_slot, delivery))
        try:
            await self._finish(delivery, slot.release)
        finally:
            slot.release()
            self._uncommitted.release()

    async def _finish(self, delivery: Delivery, slot_free: Callable[[], None]) -> None:
        try:
            if await self.step(delivery, slot_free):
                await self._ladder.settle(delivery.invocation)
                await delivery.ack()
        except Fenced:
            _log.warning("invocation %s was taken over by another worker", delivery.invocation.invocation_id)
            delivery.leave()
        except asyncio.CancelledError:
            await delivery.give_back()
            raise
        except HeadraceError as error:
            _log.warning("invocation %s goes back: %s", delivery.invocation.invocation_id, error)
            await delivery.give_back(TROUBLE_DELAY_S)
        except Exception:
            _log.exception("invocation %s goes back", delivery.invocation.invocation_id)
            await delivery.give_back(TROUBLE_DELAY_S)

    async def step(self, delivery: Delivery, slot_free: Callable[[], None]) -> bool:
        """Handle one delivery and return whether it may be acknowledged; if not, it was handed back already.

        Raises:
            Unavailable: the log does not answer; nothing was acknowledged.
        """
        invocation = delivery.invocation
        settled, error = await self._settle(invocation)
        if settled.overruled or invocation.run_id in self._cancels:
            return True
        invocation = delivery.invocation = await self._ladder.place(invocation)
        past = NO_PAST if delivery.fresh and not delivery.doubtful else await self._past(invocation)
        if past.done is not None:
            await self._commits.fill(decode(past.done.body, Outcome), past.done.seq, past.done.at)
            return True
        now, again = self._clock(), not delivery.fresh
        left_s = max(
            wait_s(past.retry_at, past.retry_s, now, again=again),
            wait_s(invocation.not_before, invocation.not_before - invocation.sent_at, now, again=again),
        )
        if left_s > 0.005:
            await delivery.give_back(left_s)
            return False
        # What has begun goes on, also when a newer event has come in its place.
        if invocation.newest and past.attempt == 1:
            lease = self._lease(invocation, past)
            if await outdated(self._log, invocation, delivery.seq, lease, now):
                return True
        hopeless = self._hopeless(invocation, past) if error is None else ("dead", error)
        if hopeless is None and (needless := await self._ladder.needless(invocation)) is not None:
            hopeless = ("canceled", needless)
        if hopeless is not None:
            state, error = hopeless
            outcome, unit = outcomes.fail(invocation, self._tried(delivery, past, now, now), error, state)
            await self._commits.commit(outcome, unit)
            return True
        if delivery.over:  # our order thought so, the log does not: it has to wait for a slot again
            await delivery.give_back(TROUBLE_DELAY_S)
            return False
        if invocation.function == SPREADER:
            slot_free()
            await self._spread(delivery, past)
            return True
        if invocation.function == RETRACTER:
            slot_free()
            tried = self._tried(delivery, past, now, self._clock())
            await self._commits.commit(*retract(invocation, tried, settled.over, self._world(invocation)))
            return True
        if self._tools.ends_at is not None and not await self._fits(delivery, self._tools.ends_at):
            await delivery.give_back(TROUBLE_DELAY_S)  # to a worker that has the time
            return False
        delivery.invocation, why = await self._ladder.choose(invocation, again=not delivery.fresh)
        return await self._attempt(delivery, past, slot_free, why)

    async def _fits(self, delivery: Delivery, ends_at: float) -> bool:
        """Say whether it is expected to be over when the allocation of this worker ends."""
        work = delivery.invocation
        record = await self._tools.tables.version(work.tenant, work.function, work.version)
        limit_s = 0.0 if record is None else parse_duration(record.options.timeout)  # what is not there fails at once
        return fits(self._clock(), ends_at, delivery.run, limit_s)

    async def _settle(self, invocation: Invocation) -> tuple[Settled, ErrorInfo | None]:
        """Say what the event of a run overrules, as its gateway did unless it died. It does so also if it is canceled:
        that stops its function, and does not take back the event."""
        if not invocation.places:
            return NOTHING_TO_SETTLE, None
        try:
            return await settle(self._log, invocation, self._clock()), None
        except TooLarge as error:
            return NOTHING_TO_SETTLE, ErrorInfo(kind="thread", message=f"{error}. {error.hint}")

    async def _past(self, invocation: Invocation) -> Past:
        """Look for what earlier deliveries left."""
        run, identity = invocation.run_id, invocation.invocation_id
        return look_back(
            await self._log.last_of_each(
                [
                    fence_subject(run, identity),
                    start_subject(run, identity, "*"),
                    attempt_subject(run, identity, "*"),
                ]
            )
        )

    def _hopeless(self, invocation: Invocation, past: Past) -> tuple[InvocationState, ErrorInfo] | None:
        """Return how an invocation ends that is not worth an attempt, or None."""
        now = self._clock()
        if invocation.on_late == "cancel" and invocation.deadline is not None and now > invocation.deadline:
            return "canceled", ErrorInfo(kind="deadline", message="the deadline has passed")
        if past.lost > LOST_ATTEMPTS_MAX:
            return "dead", ErrorInfo(
                kind="lost", message=f"{past.lost} attempts were lost together with the workers that ran them"
            )
        age_s = now - max(invocation.sent_at, invocation.not_before)
        if age_s > self._tools.work_age_max_s:
            return "dead", ErrorInfo(
                kind="expired",
                message=f"it waited {age_s:,.0f} s for a worker; the limit is {self._tools.work_age_max_s:,.0f} s",
            )
        return None

    def _lease(self, invocation: Invocation, past: Past) -> Record:
        """Return what takes an invocation over from whoever had it, unless more has become of it than is known."""
        run, identity = invocation.run_id, invocation.invocation_id
        lease = Lease(
            run_id=run, invocation_id=identity, attempt=past.attempt, worker=self._tools.name, at=self._clock()
        )
        return Record(lease_subject(run, identity), encode(lease), fence_subject(run, identity), past.fence)

    async def _claim(self, delivery: Delivery, past: Past) -> Past:
        """Take over an invocation that was delivered before: from here on, older attempts cannot commit.

        Raises:
            Fenced: another worker took it over, or has committed it, at this moment.
        """
        record = self._lease(delivery.invocation, past)
        try:
            (seq,) = await self._log.append([record], timeout_s=APPEND_TIMEOUT_S)
        except AlreadyThere as other:
            raise Fenced from other
        return structs.replace(past, fence=seq)

    # ------------------------------------------------------------ one attempt

    async def _attempt(self, delivery: Delivery, past: Past, slot_free: Callable[[], None], why: str) -> bool:
        invocation = delivery.invocation
        started_at = self._clock()
        record: FunctionRecord | None = None
        voice: Voice | None = None
        errands = Errands(self._stager)
        error: FunctionError
        try:
            record = await self._tools.tables.version(invocation.tenant, invocation.function, invocation.version)
            if record is None:
                raise LoadError(
                    f"version {invocation.version} of {invocation.function} is not registered", hint="Deploy it again."
                )
            kind, body = await self._inputs.body(invocation)
            errands.stage_in_s += max(0.0, self._clock() - started_at)
            if not delivery.fresh or past != NO_PAST:
                past = await self._claim(delivery, past)
            voice = Voice(self._log, delivery, self._tools.name, past.attempt, past.fence, self._clock)
            if why:
                voice.line("ladder", why)
            returned = await self._ladder.looked_after(
                invocation,
                self._run(delivery, past, record, kind, body, voice, errands),
                tried=partial(self._tried, delivery, past, started_at, errands=errands),
                lend=partial(self._lend, slot_free),
            )
        except FunctionError as failure:
            error = failure
        except NotFound as gone:  # its payload or its code was cleaned away: no further attempt can bring it back
            error = LoadError(str(gone), hint=gone.hint)
        except asyncio.CancelledError:
            if invocation.run_id not in self._cancels:
                raise
            task = asyncio.current_task()
            if task is not None:
                task.uncancel()  # it was the run that was canceled, not this task
            return True
        else:
            slot_free()
            tried = self._tried(delivery, past, started_at, self._clock(), errands)
            delivery.lane.learn(tried.ended_at - started_at)
            self._durations.learn(invocation, tried.ended_at - started_at, tried.ended_at)
            try:
                if returned.answer is None and effects.started_by(returned.effects):
                    await self._ladder.keep(invocation, tried)  # what follows may be late
                await self._succeed(delivery, tried, returned, await voice.close())
            except (UserError, TooLarge) as refused:
                error = refused if isinstance(refused, UserError) else UserError(str(refused), hint=refused.hint)
                error.retry = False
            else:
                return True
        finally:
            errands.close()
            if voice is not None:
                voice.hush()
        slot_free()
        tried = self._tried(delivery, past, started_at, self._clock(), errands)
        delivery.lane.learn(tried.ended_at - started_at)
        notes = [] if voice is None else await voice.close()
        ended = await self._failed(delivery, tried, past.failures + 1, error, record, notes)
        if not ended:
            await self._ladder.keep(invocation, tried)
        return ended

    def _lend(self, slot_free: Callable[[], None], lent: contextlib.ExitStack) -> None:
        """Let what is most urgent run beside what overruns, where no slot is free."""
        if self._free.locked():
            lent.enter_context(self._tools.pool.one_more())
            slot_free()

    async def _run(
        self,
        delivery: Delivery,
        past: Past,
        record: FunctionRecord,
        kind: str,
        body: bytes,
        voice: Voice,
        errands: Errands,
    ) -> Returned:
        invocation = delivery.invocation
        invoke = Invoke(
            run_id=invocation.run_id,
            invocation_id=invocation.invocation_id,
            attempt=past.attempt,
            function=invocation.function,
            version=invocation.version,
            type=kind,
            body=body,
            deadline=invocation.deadline,
            event=invocation.event,
            due=invocation.due,
            tenant=invocation.tenant,
        )

        async def code() -> Code:
            return await self._inputs.code(record.code_blob)

        async def ask(what: Ask) -> Granted:
            return await errands.grant(what, voice.said)

        with self._cancels.stopping(invocation.run_id):
            running = self._tools.pool.run(
                invoke,
                code,
                timeout_s=parse_duration(record.options.timeout),
                on_said=voice.said,
                on_line=voice.line,
                on_ask=ask,
            )
            left_s = useful_s(invocation, self._clock())
            return await (running if left_s is None else stopped_after(left_s, running))

    def _tried(
        self, delivery: Delivery, past: Past, started_at: float, ended_at: float, errands: Errands | None = None
    ) -> Attempted:
        return Attempted(
            attempt=past.attempt,
            worker=self._tools.name,
            queued_at=delivery.at,
            started_at=started_at,
            ended_at=ended_at,
            fence=past.fence,
            stage_in_s=errands.stage_in_s if errands else 0.0,
            stage_out_s=errands.stage_out_s if errands else 0.0,
            failed_s=past.failed_s,
        )

    # ------------------------------------------------------------ commit

    async def _succeed(self, delivery: Delivery, tried: Attempted, returned: Returned, notes: list[Record]) -> None:
        """Commit the outcome and its effects as one unit, then count the slot it fills."""
        async with self._bound.hold(delivery.invocation, effects.started_by(returned.effects)):
            await self._append_success(delivery, tried, returned, notes)

    async def _append_success(
        self, delivery: Delivery, tried: Attempted, returned: Returned, notes: list[Record]
    ) -> None:
        blobs, world = self._tools.blobs, self._world(delivery.invocation)
        planned = await placed(returned.effects, delivery.invocation, world, self._tools.tables.sites)
        asked = [await checked_in(each, blobs) for each in planned]
        kept = {
            position: await check_in(listed(payloads), blobs)
            for position, payloads in effects.large_maps(asked).items()
        }
        outcome, unit = effects.succeed(
            delivery.invocation,
            tried,
            result=await check_in(returned.result, blobs),
            answer=None if returned.answer is None else await check_in(returned.answer, blobs),
            effects=asked,
            kept=kept,
            world=world,
        )
        await self._commits.commit(outcome, [*notes, *unit])

    def _world(self, invocation: Invocation) -> World:
        tables = self._tools.tables
        return World(
            function=functools.partial(tables.function, invocation.tenant),
            routes=tables.routes.items().values(),
            now=self._clock(),
            depth_max=self._tools.chain_depth_max,
            outlook=self._outlook,
            sites=tables.sites.items().values(),
        )

    async def _failed(
        self,
        delivery: Delivery,
        tried: Attempted,
        failures: int,
        error: FunctionError,
        record: FunctionRecord | None,
        notes: list[Record],
    ) -> bool:
        """Record a failed attempt: another one follows, or the invocation is given up on."""
        invocation = delivery.invocation
        info = ErrorInfo(kind=error.kind, message=_told(error), traceback=error.traceback)
        again = retry_at(
            error,
            failures=failures,
            retries=0 if record is None else record.options.retries,
            now=tried.ended_at,
            rng=self._tools.rng,
        )
        if isinstance(error, ChildLost):
            _log.warning("invocation %s of %s: %s", invocation.invocation_id, invocation.function, error)
        if again is None:
            outcome, unit = outcomes.fail(invocation, tried, info, "canceled" if isinstance(error, Late) else "dead")
            await self._commits.commit(outcome, [*notes, *unit])
            return True
        failed = outcomes.failed_attempt(invocation, tried, info, again)
        try:
            await self._log.append([*notes, failed], timeout_s=APPEND_TIMEOUT_S)
        except AlreadyThere:
            if await self._commits.settled_otherwise(invocation.run_id, invocation.invocation_id, tried.fence):
                return True
            raise Unavailable("the log refuses a failed attempt and shows no reason", hint="It is run again.") from None
        await delivery.give_back(again - tried.ended_at)
        return False

    async def _spread(self, delivery: Delivery, past: Past) -> None:
        """Start one part of a large map."""
        started_at = self._clock()
        work = decode(delivery.invocation.payload.body, Spread)
        try:
            async with self._bound.hold(delivery.invocation, work.last - work.first):
                payloads = await self._inputs.members(work)
                tried = self._tried(delivery, past, started_at, self._clock())
                unit = effects.spread(delivery.invocation, tried, work, payloads, self._world(delivery.invocation))
                with contextlib.suppress(AlreadyThere):
                    await self._log.append(unit, timeout_s=APPEND_TIMEOUT_S)
        except UserError as error:
            tried = self._tried(delivery, past, started_at, self._clock())
            info = ErrorInfo(kind=error.kind, message=_told(error))
            await self._commits.commit(*outcomes.fail(delivery.invocation, tried, info))


class _Once:
    """Calls something once, however often it is asked to."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act: Callable[[], None] | None = act

    def release(self) -> None:
        act, self._act = self._act, None
        if act is not None:
            act()


def _told(error: FunctionError) -> str:
    return f"{error} {error.hint}".strip() if error.hint else str(error)
