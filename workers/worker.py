"""Take, run, commit: the life of an invocation in a worker.

Record, then acknowledge: a delivery is acknowledged once its outcome, and all that follows from it, is in the log. A
crash at any point before repeats the work; the outcome's subject takes one outcome for ever, so the effects count once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import msgspec
from msgspec import Struct, structs

from functions import effects
from functions.effects import Attempted, World
from functions.retries import LOST_ATTEMPTS_MAX, NO_PAST, Past, look_back, retry_at, wait_s
from functions.scopes import Fill
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
from headrace.wire import (
    RETRACTER,
    SPREAD,
    SPREADER,
    Ask,
    Effect,
    FunctionRecord,
    Granted,
    Invocation,
    Invoke,
    Lease,
    Map,
    Outcome,
    Payload,
    Returned,
    Spread,
    decode,
    encode,
)
from streams.blobs import Blobs, check_in
from streams.follow import follow
from streams.intake import Delivery, Intake
from streams.log import AlreadyThere, Log, Record
from streams.poll import Arrival
from streams.tables import Tables
from streams.threads import NOTHING_TO_SETTLE, Settled, settle
from streams.topology import (
    attempt_subject,
    cancel_subject,
    fence_subject,
    kind_of,
    lease_subject,
    run_of,
    start_subject,
)
from workers.bound import Bound
from workers.inputs import Inputs
from workers.joins import Joins
from workers.pool import Pool
from workers.staging import grant
from workers.voice import Voice

_log = logging.getLogger(__name__)

UNCOMMITTED_MAX = 1000
CLASHES_MAX = 5
APPEND_TIMEOUT_S = 60.0
TROUBLE_DELAY_S = 1.0
CANCELS_KEPT_MAX = 100_000


class Fenced(Exception):
    """Another worker has taken over what this one was doing; nothing of ours may be committed or acknowledged."""


class Tools(Struct, frozen=True, kw_only=True):
    """What a worker works with, made and owned by whoever starts it.

    ``work_age_max_s`` is how long work may wait, in seconds, before it is given up on; ``chain_depth_max`` bounds how
    many invocations follow one another, ``run_invocations_max`` how many there are in a run; ``clock`` tells epoch
    seconds, and ``rng`` the jitter of delays.
    """

    name: str
    log: Log
    tables: Tables
    blobs: Blobs
    pool: Pool
    slots: int
    work_age_max_s: float = 86400.0
    chain_depth_max: int = effects.DEPTH_MAX
    run_invocations_max: int = effects.INVOCATIONS_MAX
    clock: Callable[[], float] = time.time
    rng: random.Random = msgspec.field(default_factory=random.Random)


class Worker:
    """Runs invocations from all lanes until it is told to stop."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._log = tools.log
        self._clock = tools.clock
        self._intake = Intake(tools.log, slots=tools.slots, on_unreadable=self._bury_later)
        self._joins = Joins(tools.log, tools.clock)
        self._free = asyncio.Semaphore(tools.slots)
        self._uncommitted = asyncio.Semaphore(UNCOMMITTED_MAX)
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: dict[str, set[asyncio.Task[Any] | None]] = {}
        self._canceled: OrderedDict[str, None] = OrderedDict()
        self._inputs = Inputs(tools.log, tools.blobs)
        self._bound = Bound(tools.log, tools.run_invocations_max)
        self._cancels_read = asyncio.Event()

    async def run(self, stop: asyncio.Event, drain_s: float = 10.0) -> None:
        """Work until ``stop`` is set; then finish what runs (``drain_s`` seconds at most), hand back the rest."""
        cancels = asyncio.create_task(self._follow_cancels(), name="worker-cancels")
        taking = asyncio.create_task(self._take_for_ever(), name="worker-take")
        stopping = asyncio.create_task(stop.wait())
        try:
            done, _ = await asyncio.wait({taking, cancels, stopping}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # one that failed ends the worker, which is started again
        finally:
            for task in (taking, cancels, stopping):
                task.cancel()
            await asyncio.gather(taking, cancels, stopping, return_exceptions=True)
            await self._intake.stop()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=drain_s)
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._intake.close()

    async def _take_for_ever(self) -> None:
        await self._cancels_read.wait()
        await self._intake.start()
        while True:
            await self._free.acquire()
            try:
                await self._uncommitted.acquire()
                delivery = await self._intake.take()
            except asyncio.CancelledError:
                self._free.release()
                raise
            task = asyncio.create_task(self._handle(delivery))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _handle(self, delivery: Delivery) -> None:
        slot = _Once(self._free.release)
        try:
            if await self.step(delivery, slot.release):
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
        finally:
            slot.release()
            self._uncommitted.release()

    async def step(self, delivery: Delivery, slot_free: Callable[[], None]) -> bool:
        """Handle one delivery and return whether it may be acknowledged; if not, it was handed back already.

        Raises:
            Unavailable: the log does not answer; nothing was acknowledged.
        """
        invocation = delivery.invocation
        settled, error = await self._settle(invocation)
        if settled.overruled or invocation.run_id in self._canceled:
            return True
        past = NO_PAST if delivery.fresh and not delivery.doubtful else await self._past(invocation)
        if past.done is not None:
            await self._fill(decode(past.done.body, Outcome), past.done.seq, past.done.at)
            return True
        now, again = self._clock(), not delivery.fresh
        left_s = max(
            wait_s(past.retry_at, past.retry_s, now, again=again),
            wait_s(invocation.not_before, invocation.not_before - invocation.sent_at, now, again=again),
        )
        if left_s > 0.005:
            await delivery.give_back(left_s)
            return False
        hopeless = self._hopeless(invocation, past) if error is None else ("dead", error)
        if hopeless is not None:
            state, error = hopeless
            outcome, unit = effects.fail(invocation, self._tried(delivery, past, now, now), error, state)
            await self._commit(outcome, unit)
            return True
        if invocation.function == SPREADER:
            slot_free()
            await self._spread(delivery, past)
            return True
        if invocation.function == RETRACTER:
            slot_free()
            tried = self._tried(delivery, past, now, self._clock())
            await self._commit(*effects.retract(invocation, tried, settled.over, self._world()))
            return True
        return await self._attempt(delivery, past, slot_free)

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

    async def _claim(self, delivery: Delivery, past: Past) -> Past:
        """Take over an invocation that was delivered before: from here on, older attempts cannot commit.

        Raises:
            Fenced: another worker took it over, or has committed it, at this moment.
        """
        run, identity = delivery.invocation.run_id, delivery.invocation.invocation_id
        lease = Lease(
            run_id=run,
            invocation_id=identity,
            attempt=past.attempt,
            worker=self._tools.name,
            at=self._clock(),
        )
        record = Record(lease_subject(run, identity), encode(lease), fence_subject(run, identity), past.fence)
        try:
            (seq,) = await self._log.append([record], timeout_s=APPEND_TIMEOUT_S)
        except AlreadyThere as other:
            raise Fenced from other
        return structs.replace(past, fence=seq)

    # ------------------------------------------------------------ one attempt

    async def _attempt(self, delivery: Delivery, past: Past, slot_free: Callable[[], None]) -> bool:
        invocation = delivery.invocation
        started_at = self._clock()
        record: FunctionRecord | None = None
        voice: Voice | None = None
        error: FunctionError
        try:
            record = await self._tools.tables.version(invocation.function, invocation.version)
            if record is None:
                raise LoadError(
                    f"version {invocation.version} of {invocation.function} is not registered", hint="Deploy it again."
                )
            kind, body = await self._inputs.body(invocation)
            if not delivery.fresh or past != NO_PAST:
                past = await self._claim(delivery, past)
            voice = Voice(self._log, delivery, self._tools.name, past.attempt, past.fence, self._clock)
            returned = await self._run(delivery, past, record, kind, body, voice)
        except FunctionError as failure:
            error = failure
        except NotFound as gone:  # its payload or its code was cleaned away: no further attempt can bring it back
            error = LoadError(str(gone), hint=gone.hint)
        except asyncio.CancelledError:
            if invocation.run_id not in self._canceled:
                raise
            task = asyncio.current_task()
            if task is not None:
                task.uncancel()  # it was the run that was canceled, not this task
            return True
        else:
            slot_free()
            tried = self._tried(delivery, past, started_at, self._clock())
            self._intake.learn(delivery.lane, tried.ended_at - started_at)
            try:
                await self._succeed(delivery, tried, returned, await voice.close())
            except (UserError, TooLarge) as refused:
                error = refused if isinstance(refused, UserError) else UserError(str(refused), hint=refused.hint)
                error.retry = False
            else:
                return True
        finally:
            if voice is not None:
                voice.hush()
        slot_free()
        tried = self._tried(delivery, past, started_at, self._clock())
        self._intake.learn(delivery.lane, tried.ended_at - started_at)
        notes = [] if voice is None else await voice.close()
        return await self._failed(delivery, tried, past.failures + 1, error, record, notes)

    async def _run(
        self, delivery: Delivery, past: Past, record: FunctionRecord, kind: str, body: bytes, voice: Voice
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
        )

        async def code() -> Code:
            return await self._inputs.code(record.code_blob)

        async def ask(what: Ask) -> Granted:
            return await grant(what, self._tools.blobs)

        task = asyncio.current_task()
        mine = self._running.setdefault(invocation.run_id, set())
        mine.add(task)
        try:
            return await self._tools.pool.run(
                invoke,
                code,
                timeout_s=parse_duration(record.options.timeout),
                on_said=voice.said,
                on_line=voice.line,
                on_ask=ask,
            )
        finally:
            mine.discard(task)
            if not mine:
                self._running.pop(invocation.run_id, None)

    def _tried(self, delivery: Delivery, past: Past, started_at: float, ended_at: float) -> Attempted:
        return Attempted(
            attempt=past.attempt,
            worker=self._tools.name,
            queued_at=delivery.at,
            started_at=started_at,
            ended_at=ended_at,
            fence=past.fence,
        )

    # ------------------------------------------------------------ commit

    async def _succeed(self, delivery: Delivery, tried: Attempted, returned: Returned, notes: list[Record]) -> None:
        """Commit the outcome and its effects as one unit, then count the slot it fills."""
        async with self._bound.hold(delivery.invocation, effects.started_by(returned.effects)):
            await self._append_success(delivery, tried, returned, notes)

    async def _append_success(
        self, delivery: Delivery, tried: Attempted, returned: Returned, notes: list[Record]
    ) -> None:
        blobs = self._tools.blobs
        kept = {
            position: await check_in(_listed(payloads), blobs)
            for position, payloads in effects.large_maps(returned.effects).items()
        }
        outcome, unit = effects.succeed(
            delivery.invocation,
            tried,
            result=await check_in(returned.result, blobs),
            answer=None if returned.answer is None else await check_in(returned.answer, blobs),
            effects=[await _checked_in(e, blobs) for e in returned.effects] if returned.effects else [],
            kept=kept,
            world=self._world(),
        )
        await self._commit(outcome, [*notes, *unit])

    def _world(self) -> World:
        tables = self._tools.tables
        return World(
            function=tables.function,
            routes=tables.routes.items().values(),
            now=self._clock(),
            depth_max=self._tools.chain_depth_max,
        )

    async def _commit(self, outcome: Outcome, unit: list[Record]) -> None:
        for _ in range(CLASHES_MAX):
            try:
                seqs = await self._log.append(unit, timeout_s=APPEND_TIMEOUT_S)
            except AlreadyThere:
                if await self._settled_otherwise(outcome.run_id, outcome.invocation_id, unit[-1].expected):
                    return
            else:
                await self._fill(outcome, seqs[-1], self._clock())
                return
        raise Unavailable("the log refuses an outcome and shows no reason", hint="The invocation is run again.")

    async def _settled_otherwise(self, run: str, identity: str, fence: int) -> bool:
        """Say whether a refused unit need not be appended any more; if not, two writers met and it may be tried again.

        Raises:
            Fenced: another worker has taken the invocation over.
        """
        newest = await self._log.last(fence_subject(run, identity))
        if newest is not None and kind_of(newest.subject) == "done":
            # Another attempt was first: its outcome and its effects stand. Its slot may still have to be counted.
            await self._fill(decode(newest.body, Outcome), newest.seq, newest.at)
            return True
        if newest is not None and newest.seq > fence:
            raise Fenced
        return await self._log.last(cancel_subject(run, "*")) is not None

    async def _fill(self, outcome: Outcome, seq: int, at: float) -> None:
        if outcome.slot is not None:
            failed = outcome.state != "succeeded"
            await self._joins.fill(
                Fill(slot=outcome.slot, outcome=outcome, seq=seq, at=at, failed=failed, error=outcome.error)
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
            outcome, unit = effects.fail(invocation, tried, info)
            await self._commit(outcome, [*notes, *unit])
            return True
        failed = effects.failed_attempt(invocation, tried, info, again)
        try:
            await self._log.append([*notes, failed], timeout_s=APPEND_TIMEOUT_S)
        except AlreadyThere:
            if await self._settled_otherwise(invocation.run_id, invocation.invocation_id, tried.fence):
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
                unit = effects.spread(delivery.invocation, tried, work, payloads, self._clock())
                with contextlib.suppress(AlreadyThere):
                    await self._log.append(unit, timeout_s=APPEND_TIMEOUT_S)
        except UserError as error:
            tried = self._tried(delivery, past, started_at, self._clock())
            info = ErrorInfo(kind=error.kind, message=_told(error))
            await self._commit(*effects.fail(delivery.invocation, tried, info))

    # ------------------------------------------------------------ what nobody can read

    def _bury_later(self, arrived: Arrival) -> None:
        task = asyncio.create_task(self._bury(arrived))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _bury(self, arrived: Arrival) -> None:
        """End an invocation whose message no worker could read, so that its run ends too."""
        try:
            outcome, unit = effects.unreadable(arrived.subject, self._tools.name, arrived.at, self._clock())
            await self._commit(outcome, unit)
            await self._intake.acknowledge(arrived)
        except (HeadraceError, Fenced) as error:
            _log.warning("message %d is not buried yet: %s", arrived.seq, error)

    # ------------------------------------------------------------ cancel

    async def _follow_cancels(self) -> None:
        """Hear of runs to be canceled: stop what runs of them, and drop what comes later."""
        newest = await self._log.last(cancel_subject("*", "*"))
        known_up_to = 0 if newest is None else newest.seq
        if not known_up_to:
            self._cancels_read.set()
        async with aclosing(follow(self._log, [cancel_subject("*", "*")], after=0)) as batches:
            async for batch in batches:
                for stored in batch:
                    run = run_of(stored.subject)
                    self._canceled[run] = None
                    for task in list(self._running.get(run, ())):
                        if task is not None:
                            task.cancel()
                while len(self._canceled) > CANCELS_KEPT_MAX:
                    self._canceled.popitem(last=False)
                if not batch or batch[-1].seq >= known_up_to:
                    self._cancels_read.set()


class _Once:
    """Calls something once, however often it is asked to."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act: Callable[[], None] | None = act

    def release(self) -> None:
        act, self._act = self._act, None
        if act is not None:
            act()


def _listed(payloads: list[Payload]) -> Payload:
    body = encode(payloads)
    return Payload(type=SPREAD, body=body, size=len(body))


async def _checked_in(effect: Effect, blobs: Blobs) -> Effect:
    """Return the effect with payloads as the log may hold them."""
    if isinstance(effect, Map):
        large = [i for i, p in enumerate(effect.payloads) if len(p.body) > 65536]
        if not large:
            return effect
        payloads = [await check_in(p, blobs) for p in effect.payloads]
        return msgspec.structs.replace(effect, payloads=payloads)
    return msgspec.structs.replace(effect, payload=await check_in(effect.payload, blobs))


def _told(error: FunctionError) -> str:
    return f"{error} {error.hint}".strip() if error.hint else str(error)
