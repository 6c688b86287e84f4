"""Outcomes on their way into the log: once, by whoever holds the newest lease, and with the slot that they fill."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import structs

from functions.jobs import Jobs
from functions.scopes import Fill
from headrace.errors import Unavailable
from headrace.wire import SPREAD, Call, Emit, Map, Outcome, Payload, decode, encode
from streams.blobs import Blobs, check_in
from streams.log import AlreadyThere, Log, Record
from streams.topology import INLINE_BYTES_MAX, cancel_subject, fence_subject, kind_of
from workers.joins import Joins

CLASHES_MAX = 5
APPEND_TIMEOUT_S = 60.0


class Fenced(Exception):
    """Another worker has taken over what this one was doing; nothing of ours may be committed or acknowledged."""


class Commits:
    """Commits what invocations came to."""

    def __init__(self, log: Log, joins: Joins, clock: Callable[[], float]) -> None:
        """Use a log, and the joins of this worker; ``clock`` tells epoch seconds."""
        self._log = log
        self._joins = joins
        self._clock = clock

    async def commit(self, outcome: Outcome, unit: list[Record]) -> None:
        """Append an outcome with its effects, as one unit, then count the slot it fills. Safe to repeat.

        Raises:
            Fenced: another worker has taken the invocation over.
            Unavailable: the log does not answer.
        """
        for _ in range(CLASHES_MAX):
            try:
                seqs = await self._log.append(unit, timeout_s=APPEND_TIMEOUT_S)
            except AlreadyThere:
                if await self.settled_otherwise(outcome.run_id, outcome.invocation_id, unit[-1].expected):
                    return
            else:
                await self.fill(outcome, seqs[-1], self._clock())
                return
        raise Unavailable("the log refuses an outcome and shows no reason", hint="The invocation is run again.")

    async def settled_otherwise(self, run: str, identity: str, fence: int) -> bool:
        """Say whether a refused unit need not be appended any more; if not, two writers met and it may be tried again.

        Raises:
            Fenced: another worker has taken the invocation over.
        """
        newest = await self._log.last(fence_subject(run, identity))
        if newest is not None and kind_of(newest.subject) == "done":
            # Another attempt was first: its outcome and its effects stand. Its slot may still have to be counted.
            await self.fill(decode(newest.body, Outcome), newest.seq, newest.at)
            return True
        if newest is not None and newest.seq > fence:
            raise Fenced
        return await self._log.last(cancel_subject(run, "*")) is not None

    async def fill(self, outcome: Outcome, seq: int, at: float) -> None:
        """Count the slot that an outcome of the log fills, if it fills one."""
        if outcome.slot is not None:
            failed = outcome.state != "succeeded"
            await self._joins.fill(
                Fill(slot=outcome.slot, outcome=outcome, seq=seq, at=at, failed=failed, error=outcome.error)
            )


def listed(payloads: list[Payload]) -> Payload:
    """Return the payloads of a large map as one."""
    body = encode(payloads)
    return Payload(type=SPREAD, body=body, size=len(body))


async def checked_in(effect: Call | Map | Emit | Jobs, blobs: Blobs) -> Call | Map | Emit | Jobs:
    """Return the effect with payloads as the log may hold them."""
    if isinstance(effect, Jobs):
        if all(len(work.spec.body) <= INLINE_BYTES_MAX for work in effect.works):
            return effect
        works = [structs.replace(work, spec=await check_in(work.spec, blobs)) for work in effect.works]
        return structs.replace(effect, works=works)
    if isinstance(effect, Map):
        large = [i for i, p in enumerate(effect.payloads) if len(p.body) > INLINE_BYTES_MAX]
        if not large:
            return effect
        payloads = [await check_in(p, blobs) for p in effect.payloads]
        return structs.replace(effect, payloads=payloads)
    return structs.replace(effect, payload=await check_in(effect.payload, blobs))
