"""What an invocation gets: its body, wherever that lies, the code of its function, and the list of a large map."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

from headrace.errors import UserError
from headrace.model import Code
from headrace.wire import GATHER, ITEMS, JSON, NOTHING, Gather, Invocation, Outcome, Payload, Spread, decode, encode
from streams.blobs import Blobs, check_out
from streams.log import Log

CODES_KEPT_MAX = 64
LISTS_KEPT_MAX = 4
GATHERED_BYTES_MAX = 16 * 1024 * 1024

T = TypeVar("T")


class Inputs:
    """Reads inputs from the log and the blob store, and keeps what is asked for again and again."""

    def __init__(self, log: Log, blobs: Blobs) -> None:
        self._log = log
        self._blobs = blobs
        self._codes: OrderedDict[str, Code] = OrderedDict()
        self._lists: OrderedDict[str, list[Payload]] = OrderedDict()

    async def body(self, invocation: Invocation) -> tuple[str, bytes]:
        """Return the content type and the bytes that the function gets.

        Raises:
            NotFound: the blob store does not have them any more.
            UserError: the results that a join gathers are too large together.
            Unavailable: log or blob store do not answer.
        """
        payload = invocation.payload
        if payload.type != GATHER:
            return payload.type, await check_out(payload, self._blobs)
        gather = decode(await check_out(payload, self._blobs), Gather)
        results = [decode(s.body, Outcome).result or NOTHING for s in await self._log.at(gather.outcomes)]
        bodies = [await check_out(r, self._blobs) for r in results]
        if sum(map(len, bodies)) > GATHERED_BYTES_MAX:
            raise UserError(
                f"the results of {len(bodies):,} branches are larger than {GATHERED_BYTES_MAX:,} bytes together",
                hint="Let the members keep their data with ctx.store(...) and return the URI.",
                transient=False,
            )
        if all(r.type == JSON for r in results):
            return JSON, b"[" + b",".join(bodies) + b"]"
        return ITEMS, encode([(r.type, b) for r, b in zip(results, bodies, strict=True)])

    async def code(self, blob: str) -> Code:
        """Return the code in this blob; raises what ``body`` raises."""
        known = self._codes.get(blob)
        if known is None:
            known = decode(await self._blobs.get(blob), Code)
        return _kept(self._codes, blob, known, CODES_KEPT_MAX)

    async def members(self, work: Spread) -> list[Payload]:
        """Return the payloads of a large map, which are the same for all its parts; raises what ``body`` raises."""
        key = work.payloads.blob or work.slot.scope
        known = self._lists.get(key)
        if known is None:
            known = decode(await check_out(work.payloads, self._blobs), list[Payload])
        return _kept(self._lists, key, known, LISTS_KEPT_MAX)


def _kept(kept: OrderedDict[str, T], key: str, value: T, most: int) -> T:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)
    return value
