"""Ladders of variants at work: which rung runs, who looks after it, and how the run ends. The I/O around ``rungs``.

A rung that runs is looked after by its own worker: a while before the next cheaper one would have to begin, that one
is put into the log, to begin at its moment. From then on it does not matter who dies; before, there is time enough for
another worker to get what this one had, and to look after it in turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Literal, TypeVar

from functions import ladder, rungs
from functions.forecast import size_class
from functions.ladder import Choice, Rescue
from functions.outcomes import Attempted, spent
from functions.outlook import Outlook
from functions.rungs import Family
from functions.trail import belongs_to_platform
from headrace.errors import TooLarge
from headrace.model import ErrorInfo
from headrace.wire import FunctionRecord, Invocation, Outcome, RunEnd, decode
from streams.log import AlreadyThere, Log, Record
from streams.record import fold_run
from streams.tables import Tables
from streams.topology import ACK_WAIT_S, done_subject, kind_of, run_subjects, work_subject

_log = logging.getLogger(__name__)

LEAD_S = 2.5 * ACK_WAIT_S  # a worker's death is known after ACK_WAIT_S; this long before its moment a rescue is put
PUT_AFTER_S = 0.25  # what has ended by then costs no message
KEEP_S_MAX = 300.0
RETRY_S = 0.5

T = TypeVar("T")


class Ladder:
    """Decides which rung of a function runs, and sees to it that an answer is there in time."""

    def __init__(self, log: Log, tables: Tables, outlook: Outlook, clock: Callable[[], float]) -> None:
        self._log = log
        self._tables = tables
        self._outlook = outlook
        self._clock = clock

    async def place(self, invocation: Invocation) -> Invocation:
        """Return an invocation with its place on the ladder, where its route degrades and its function has variants.

        Raises:
            Unavailable: what is registered cannot be read.
        """
        if invocation.on_late != "degrade" or invocation.deadline is None or invocation.rung is not None:
            return invocation
        if belongs_to_platform(invocation.function):
            return invocation
        record = await self._tables.version(invocation.tenant, invocation.function, invocation.version)
        return invocation if record is None or not record.options.variants else rungs.placed(invocation, record)

    async def choose(self, invocation: Invocation, *, again: bool) -> tuple[Invocation, str]:
        """Return an invocation as it runs in the time that is left, and why no better rung was taken, if one was not.

        Args:
            invocation: a placed one.
            again: whether it was delivered before. Where a rescue was put by then, the full function runs beside it.
        """
        rung, deadline = invocation.rung, invocation.deadline
        if rung is None or rung.role != "asked" or deadline is None:
            return invocation, ""
        if again and invocation.slot is None and (await self._family(invocation)).begun:
            return invocation, ""
        choices = await self._choices(invocation)
        if len(choices) < 2:
            return invocation, ""
        chosen = ladder.pick(choices, deadline - self._clock())
        choice = chosen.choice
        why = "; ".join(each.why for each in chosen.rejected if each.level < choice.level)
        told = f"{choice.function} answers instead of {choices[0].function}: {why}" if why else ""
        return rungs.taken(invocation, choice.level, choice.function, choice.version), told

    async def needless(self, invocation: Invocation) -> ErrorInfo | None:
        """Say why a rescue need not begin: the run has ended, or has an answer as good; None where it has to.

        Raises:
            Unavailable: the log does not answer.
        """
        rung = invocation.rung
        if rung is None or not rungs.rescues(invocation):
            return None
        try:
            folded = fold_run(await self._log.last_of_each(run_subjects(invocation.run_id)))
        except TooLarge:  # what it costs to know is more than what it costs to answer
            return None
        if folded is None:
            return None
        record = folded[0]
        level = 0 if record.fidelity is None else record.fidelity.level
        if not record.ended and (record.answered_at is None or level > rung.level):
            return None
        return ErrorInfo(kind="answered", message="the run had its answer before this was needed")

    async def looked_after(
        self,
        invocation: Invocation,
        running: Coroutine[Any, Any, T],
        *,
        tried: Callable[[float], Attempted],
        lend: Callable[[contextlib.ExitStack], None],
    ) -> T:
        """Return what an attempt comes to. Where it would be late, a cheaper rung answers beside it.

        Args:
            invocation: what runs, as it was chosen.
            running: the attempt.
            tried: tells the attempt up to an instant.
            lend: makes room for a rescue where all slots are taken; what it is given ends with the attempt.
        """
        if not rungs.watched(invocation):
            return await running
        with contextlib.ExitStack() as lent:
            looking = self._look_after(invocation, tried, functools.partial(lend, lent))
            watch = asyncio.create_task(looking, name="ladder-watch")
            try:
                return await running
            finally:
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)

    async def settle(self, invocation: Invocation) -> None:
        """Do what follows from an outcome on a ladder that ends no run: begin the next rung, or end the run.

        Safe to repeat.

        Raises:
            Unavailable: the log does not answer; the work stays unacknowledged and comes again.
        """
        rung = invocation.rung
        if rung is None or invocation.slot is not None:
            return
        if rung.role == "asked" and await self._ends_itself(invocation):
            return
        family = await self._family(invocation)
        step = rungs.next_step(family)
        if isinstance(step, RunEnd):
            await self._append(rungs.end_record(step))
        elif step is not None:
            await self._append(await self._begin(invocation, family, step))

    async def _begin(self, invocation: Invocation, family: Family, step: int | Literal["full"]) -> Record:
        """Return the record that begins what is next on a ladder: a rescue of this level or below, or the full one."""
        last, now = family.asked or max(family.rescues.values(), key=lambda each: each.ended_at), self._clock()
        below = [] if step == rungs.FULL else [each for each in await self._choices(invocation) if each.level >= step]
        if not below:
            return rungs.put_full(invocation, last.spent, last.ended_at, now)
        # What was asked for has failed: then nothing is gained by waiting.
        wanted = None if family.asked is not None else ladder.rescue(below, invocation.deadline or now, now)
        return rungs.put(invocation, wanted or Rescue(choice=below[0], at=now), last.spent, last.ended_at, now)

    async def _look_after(
        self, invocation: Invocation, tried: Callable[[float], Attempted], lend: Callable[[], None]
    ) -> None:
        while True:
            try:
                rescue = await self.rescue(invocation)
                if rescue is None:
                    return
                now = self._clock()
                await asyncio.sleep(max(0.0, min(rescue.at - now, max(PUT_AFTER_S, rescue.at - LEAD_S - now))))
                await self.put(invocation, rescue, tried(self._clock()))
                break
            except Exception as error:  # the attempt goes on as well without being looked after
                _log.warning("the rescue of %s is not in the log yet: %s", invocation.invocation_id, error)
                await asyncio.sleep(RETRY_S)
        await asyncio.sleep(max(0.0, rescue.at - self._clock()))
        lend()

    async def rescue(self, invocation: Invocation) -> Rescue | None:
        """Return which rung answers in the place of this one, and when it has to begin."""
        rung, deadline = invocation.rung, invocation.deadline
        if rung is None or deadline is None or not rungs.watched(invocation):
            return None
        below = [choice for choice in await self._choices(invocation) if choice.level > rung.level]
        return ladder.rescue(below, deadline, self._clock())

    async def keep(self, invocation: Invocation, tried: Attempted) -> None:
        """Put the rescue of an attempt that has ended, to begin at its moment: until then nobody looks after the run.

        Where that is far away nothing is put: it would lie about for long, and what comes next is looked after in turn.

        Raises:
            Unavailable: the log does not answer.
        """
        rescue = await self.rescue(invocation)
        if rescue is not None and rescue.at - self._clock() < KEEP_S_MAX:
            await self.put(invocation, rescue, tried)

    async def put(self, invocation: Invocation, rescue: Rescue, tried: Attempted) -> None:
        """Put the rescue of an attempt into the log, once however often this is called.

        Raises:
            Unavailable: the log does not answer.
        """
        ledger = spent(invocation, tried)
        await self._append(rungs.put(invocation, rescue, ledger, tried.ended_at, self._clock()))

    async def _append(self, record: Record) -> None:
        with contextlib.suppress(AlreadyThere):
            await self._log.append([record])

    async def _choices(self, invocation: Invocation) -> list[Choice]:
        rung = invocation.rung
        assert rung is not None  # noqa: S101 - who calls has looked
        full = await self._tables.version(invocation.tenant, rung.full, rung.full_version)
        if full is None:
            return []
        function: Callable[[str], FunctionRecord | None] = functools.partial(self._tables.function, invocation.tenant)
        return ladder.choices(full, function, self._outlook, size=size_class(invocation.payload.size))

    async def _ends_itself(self, invocation: Invocation) -> bool:
        """Return whether an invocation has an outcome that ends its run, as nearly all have."""
        found = await self._log.last(done_subject(invocation.run_id, invocation.invocation_id))
        return found is not None and decode(found.body, Outcome).end is not None

    async def _family(self, invocation: Invocation) -> Family:
        """Return what the log holds of a ladder."""
        rung, run = invocation.rung, invocation.run_id
        assert rung is not None  # noqa: S101 - who calls has looked
        levels = {rungs.rung_id(rung.asked, level): level for level in range(1, rung.of)}
        full = rungs.full_id(rung.asked)
        others = [*levels, full]
        subjects = [
            *(done_subject(run, each) for each in (rung.asked, *others)),
            *(work_subject("*", "*", run, each) for each in others),
        ]
        outcomes: dict[str, Outcome] = {}
        begun: set[str] = set()
        # One by one: where many are asked for at once, one may be lost on the way, and nobody would end the run then.
        for stored in await asyncio.gather(*(self._log.last(subject) for subject in subjects)):
            if stored is None:
                continue
            if kind_of(stored.subject) == "done":
                outcome = decode(stored.body, Outcome)
                outcomes[outcome.invocation_id] = outcome
            else:
                begun.add(stored.subject.rsplit(".", 1)[1])
        return Family(
            of=rung.of,
            asked=outcomes.get(rung.asked),
            full=outcomes.get(full),
            full_begun=full in begun,
            rescues={level: outcomes[each] for each, level in levels.items() if each in outcomes},
            begun=frozenset(level for each, level in levels.items() if each in begun),
        )
