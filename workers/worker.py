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
from msgspec import Struct

from functions import effects, retries
from functions.effects import Attempted, World
from functions.scopes import Fill
from headrace.clock import parse_duration
from headrace.errors import ChildLost, FunctionError, HeadraceError, LoadError, NotFound, TooLarge, UserError
from headrace.model import Code, ErrorInfo
from headrace.wire import (
    GATHER,
    ITEMS,
    JSON,
    NOTHING,
    SPREAD,
    SPREADER,
    Ask,
    Attempt,
    Effect,
    FunctionRecord,
    Gather,
    Granted,
    Invocation,
    Invoke,
    Map,
    Outcome,
    Payload,
    Returned,
    Spread,
    decode,
    encode,
)
from streams.blobs import Blobs, check_in, check_out
from streams.follow import follow
from streams.intake import Delivery, Intake
from streams.log import AlreadyThere, Log, Record
from streams.stored import Stored
from streams.tables import Tables
from streams.topology import (
    attempt_subject,
    done_subject,
    run_of,
)
from workers.joins import Joins
from workers.pool import Pool
from workers.staging import grant
from workers.voice import Voice

_log = logging.getLogger(__name__)

UNCOMMITTED_MAX = 1000
APPEND_TIMEOUT_S = 60.0
TROUBLE_DELAY_S = 1.0
CANCELS_KEPT_MAX = 100_000
CODES_KEPT_MAX = 64
RESULT_BYTES_MAX = 16 * 1024 * 1024


class Tools(Struct, frozen=True, kw_only=True):
    """What a worker works with, made and owned by whoever starts it."""

    name: str
    log: Log
    tables: Tables
    blobs: Blobs
    pool: Pool
    slots: int


class Worker:
    """Runs invocations from all lanes until it is told to stop."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._log = tools.log
        self._intake = Intake(tools.log, slots=tools.slots)
        self._joins = Joins(tools.log)
        self._free = asyncio.Semaphore(tools.slots)
        self._uncommitted = asyncio.Semaphore(UNCOMMITTED_MAX)
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: dict[str, set[asyncio.Task[Any] | None]] = {}
        self._canceled: OrderedDict[str, None] = OrderedDict()
        self._codes: OrderedDict[str, Code] = OrderedDict()
        self._spreads: OrderedDict[str, list[Payload]] = OrderedDict()
        self._rng = random.Random()  # noqa: S311 - jitter of delays, no secret depends on it

    async def run(self, stop: asyncio.Event, drain_s: float = 10.0) -> None:
        """Work until ``stop`` is set; then finish what runs (``drain_s`` seconds at most), hand back the rest."""
        await self._intake.start()
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
        if invocation.run_id in self._canceled:
            return True
        attempt = 1
        if delivery.delivered > 1:
            done, failed = await self._before(invocation)
            if done is not None:
                await self._fill(decode(done.body, Outcome), done.seq, done.at)
                return True
            if failed is not None:
                attempt = failed.attempt + 1
                if failed.retry_at - time.time() > 0.005:
                    await delivery.give_back(failed.retry_at - time.time())
                    return False
        if invocation.not_before - time.time() > 0.005:
            await delivery.give_back(invocation.not_before - time.time())
            return False
        if invocation.on_late == "cancel" and invocation.deadline is not None and time.time() > invocation.deadline:
            await self._give_up(delivery, attempt, ErrorInfo(kind="deadline", message="the deadline has passed"))
            return True
        if invocation.function == SPREADER:
            slot_free()
            await self._spread(delivery)
            return True
        return await self._attempt(delivery, attempt, slot_free)

    async def _before(self, invocation: Invocation) -> tuple[Stored | None, Attempt | None]:
        """Look for what an earlier delivery left: the outcome, or the newest failed attempt."""
        run, identity = invocation.run_id, invocation.invocation_id
        found = await self._log.last_of_each([done_subject(run, identity), attempt_subject(run, identity, "*")])
        outcome_at = done_subject(run, identity)
        failed: Attempt | None = None
        for stored in found:
            if stored.subject == outcome_at:
                return stored, None
            failed = decode(stored.body, Attempt)
        return None, failed

    # ------------------------------------------------------------ one attempt

    async def _attempt(self, delivery: Delivery, attempt: int, slot_free: Callable[[], None]) -> bool:
        invocation = delivery.invocation
        started_at = time.time()
        voice = Voice(self._log, delivery, self._tools.name, attempt, started_at)
        record: FunctionRecord | None = None
        error: FunctionError
        try:
            record = await self._tools.tables.version(invocation.function, invocation.version)
            if record is None:
                raise LoadError(
                    f"version {invocation.version} of {invocation.function} is not registered", hint="Deploy it again."
                )
            returned = await self._run(delivery, attempt, record, voice)
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
            await voice.close()
            return True
        else:
            slot_free()
            ended_at = time.time()
            self._intake.learn(delivery.lane, ended_at - started_at)
            tried = self._tried(delivery, attempt, started_at, ended_at)
            try:
                await self._succeed(delivery, tried, returned, await voice.close())
            except (UserError, TooLarge) as refused:
                error = refused if isinstance(refused, UserError) else UserError(str(refused), hint=refused.hint)
                error.retry = False
            else:
                return True
        slot_free()
        ended_at = time.time()
        self._intake.learn(delivery.lane, ended_at - started_at)
        tried = self._tried(delivery, attempt, started_at, ended_at)
        return await self._failed(delivery, tried, error, record, await voice.close())

    async def _run(self, delivery: Delivery, attempt: int, record: FunctionRecord, voice: Voice) -> Returned:
        invocation = delivery.invocation
        kind, body = await self._body(invocation)
        invoke = Invoke(
            run_id=invocation.run_id,
            invocation_id=invocation.invocation_id,
            attempt=attempt,
            function=invocation.function,
            version=invocation.version,
            type=kind,
            body=body,
            deadline=invocation.deadline,
            event=invocation.event,
        )

        async def code() -> Code:
            return await self._code(record.code_blob)

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

    async def _body(self, invocation: Invocation) -> tuple[str, bytes]:
        """Return the content type and the bytes that the function gets, wherever they lie."""
        payload = invocation.payload
        if payload.type != GATHER:
            return payload.type, await check_out(payload, self._tools.blobs)
        gather = decode(await check_out(payload, self._tools.blobs), Gather)
        results = [decode(s.body, Outcome).result or NOTHING for s in await self._log.at(gather.outcomes)]
        bodies = [await check_out(r, self._tools.blobs) for r in results]
        if sum(map(len, bodies)) > RESULT_BYTES_MAX:
            raise UserError(
                f"the results of {len(bodies):,} branches are larger than {RESULT_BYTES_MAX:,} bytes together",
                hint="Let the members keep their data with ctx.store(...) and return the URI.",
                transient=False,
            )
        if all(r.type == JSON for r in results):
            return JSON, b"[" + b",".join(bodies) + b"]"
        return ITEMS, encode([(r.type, b) for r, b in zip(results, bodies, strict=True)])

    async def _code(self, blob: str) -> Code:
        known = self._codes.get(blob)
        if known is None:
            known = self._codes[blob] = decode(await self._tools.blobs.get(blob), Code)
            while len(self._codes) > CODES_KEPT_MAX:
                self._codes.popitem(last=False)
        self._codes.move_to_end(blob)
        return known

    def _tried(self, delivery: Delivery, attempt: int, started_at: float, ended_at: float) -> Attempted:
        return Attempted(
            attempt=attempt,
            worker=self._tools.name,
            queued_at=delivery.at,
            started_at=started_at,
            ended_at=ended_at,
        )

    # ------------------------------------------------------------ commit

    async def _succeed(self, delivery: Delivery, tried: Attempted, returned: Returned, notes: list[Record]) -> None:
        """Commit the outcome and its effects as one unit, then count the slot it fills."""
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
            world=World(
                function=self._tools.tables.function,
                routes=self._tools.tables.routes.items().values(),
                now=time.time(),
            ),
        )
        await self._commit(outcome, [*notes, *unit])

    async def _commit(self, outcome: Outcome, unit: list[Record]) -> None:
        try:
            seqs = await self._log.append(unit, timeout_s=APPEND_TIMEOUT_S)
        except AlreadyThere:
            # Another attempt was first: its outcome and its effects stand. Its slot may still have to be counted.
            stored = await self._log.last(done_subject(outcome.run_id, outcome.invocation_id))
            if stored is not None:
                await self._fill(decode(stored.body, Outcome), stored.seq, stored.at)
        else:
            await self._fill(outcome, seqs[-1], time.time())

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
        error: FunctionError,
        record: FunctionRecord | None,
        notes: list[Record],
    ) -> bool:
        """Record a failed attempt: another one follows, or the invocation is given up on."""
        invocation = delivery.invocation
        info = ErrorInfo(kind=error.kind, message=_told(error), traceback=error.traceback)
        again = retries.retry_at(
            error,
            attempt=tried.attempt,
            retries=0 if record is None else record.options.retries,
            now=tried.ended_at,
            rng=self._rng,
        )
        if isinstance(error, ChildLost):
            _log.warning("invocation %s of %s: %s", invocation.invocation_id, invocation.function, error)
        if again is None:
            outcome, unit = effects.fail(invocation, tried, info)
            await self._commit(outcome, [*notes, *unit])
            return True
        subject = attempt_subject(invocation.run_id, invocation.invocation_id, tried.attempt)
        failed = Attempt(
            run_id=invocation.run_id,
            invocation_id=invocation.invocation_id,
            function=invocation.function,
            version=invocation.version,
            worker=tried.worker,
            attempt=tried.attempt,
            queued_at=tried.queued_at,
            started_at=tried.started_at,
            ended_at=tried.ended_at,
            retry_at=again,
            error=info,
            parent_id=invocation.parent_id,
        )
        with contextlib.suppress(AlreadyThere):
            await self._log.append([*notes, Record(subject, encode(failed), subject)], timeout_s=APPEND_TIMEOUT_S)
        await delivery.give_back(max(0.0, again - time.time()))
        return False

    async def _give_up(self, delivery: Delivery, attempt: int, error: ErrorInfo) -> None:
        now = time.time()
        tried = self._tried(delivery, attempt, now, now)
        outcome, unit = effects.fail(delivery.invocation, tried, error, "canceled")
        await self._commit(outcome, unit)

    async def _spread(self, delivery: Delivery) -> None:
        """Start one part of a large map. The list of payloads is the same for all parts, so it is kept for a while."""
        started_at = time.time()
        work = decode(delivery.invocation.payload.body, Spread)
        key = work.payloads.blob or work.slot.scope
        payloads = self._spreads.get(key)
        if payloads is None:
            raw = await check_out(work.payloads, self._tools.blobs)
            payloads = self._spreads[key] = decode(raw, list[Payload])
            while len(self._spreads) > 4:
                self._spreads.popitem(last=False)
        tried = self._tried(delivery, 1, started_at, time.time())
        with contextlib.suppress(AlreadyThere):
            await self._log.append(
                effects.spread(delivery.invocation, tried, work, payloads, time.time()), timeout_s=APPEND_TIMEOUT_S
            )

    # ------------------------------------------------------------ cancel

    async def _follow_cancels(self) -> None:
        """Hear of runs to be canceled: stop what runs of them, and drop what comes later."""
        async with aclosing(follow(self._log, ["hr.cancel.>"], after=0)) as batches:
            async for batch in batches:
                for stored in batch:
                    run = run_of(stored.subject)
                    self._canceled[run] = None
                    for task in list(self._running.get(run, ())):
                        if task is not None:
                            task.cancel()
                while len(self._canceled) > CANCELS_KEPT_MAX:
                    self._canceled.popitem(last=False)


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
