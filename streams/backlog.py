"""How much work waits, and how much has ended: counted by the log's server, asked for in one short question.

The server keeps a count of what each consumer has yet to read. For the lanes that is the work that waits; a consumer
of outcomes that nobody ever reads counts what ends, wherever it ends, without one message on its way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple
from uuid import uuid4

import msgspec
import nats.errors
import nats.js.errors
from msgspec import Struct
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from headrace.errors import Unavailable
from streams.link import Link
from streams.topology import LANES, STREAM, lane_of

ANSWER_S = 2.0
INACTIVE_S = 600.0  # the server forgets the count then, and it is begun anew
PREFIX = "ended-"


class Look(NamedTuple):
    """What was there at one moment, by lane: what no worker has yet, and what workers hold or gave back.

    ``at`` is monotonic; ``ended`` counts outcomes since ``counting``, the name of the count, was begun. ``tenants``
    has, for each of those who share the platform (also without any work), both together by lane. ``given_back`` is how
    much of what is held was delivered more than once: mostly because whoever had it had no slot for it.
    """

    at: float
    waiting: tuple[int, ...]
    held: tuple[int, ...]
    ended: int
    counting: str
    tenants: Mapping[str, tuple[int, ...]] = {}
    given_back: int = 0


class _Consumer(Struct, frozen=True):
    name: str
    num_pending: int = 0
    num_ack_pending: int = 0
    num_redelivered: int = 0


class _Page(Struct, frozen=True):
    total: int = 0
    consumers: list[_Consumer] = []


_page = msgspec.json.Decoder(_Page).decode


class Lanes:
    """Looks at the lanes of one log."""

    def __init__(self, link: Link, clock: Callable[[], float] = time.monotonic) -> None:
        self._link = link
        self._clock = clock
        self._counting = ""

    async def look(self) -> Look:
        """Return what waits now.

        Raises:
            Unavailable: the log's server does not answer.
        """
        try:
            found = await self._consumers()
            if self._counting not in found:
                await self._count_anew()
                found = await self._consumers()
        except (nats.errors.Error, nats.js.errors.Error, msgspec.MsgspecError, OSError, TimeoutError) as error:
            raise Unavailable("the log does not tell how much waits", hint="Try again in a moment.") from error
        waiting, held = [0] * LANES, [0] * LANES
        tenants: dict[str, list[int]] = {}
        given_back = 0
        for name, consumer in found.items():
            place = lane_of(name)
            if place is not None:
                waiting[place.lane] += consumer.num_pending
                held[place.lane] += consumer.num_ack_pending
                given_back += consumer.num_redelivered
                mine = tenants.setdefault(place.tenant, [0] * LANES)
                mine[place.lane] += consumer.num_pending + consumer.num_ack_pending
        counted = found.get(self._counting)
        ended = 0 if counted is None else counted.num_pending
        each = {tenant: tuple(by_lane) for tenant, by_lane in tenants.items()}
        return Look(self._clock(), tuple(waiting), tuple(held), ended, self._counting, each, given_back)

    async def _consumers(self) -> dict[str, _Consumer]:
        """Return the consumers of the stream by name, page by page."""
        found: dict[str, _Consumer] = {}
        while True:
            request = b'{"offset":%d}' % len(found)
            answer = await self._link.nc.request(f"$JS.API.CONSUMER.LIST.{STREAM}", request, timeout=ANSWER_S)
            page = _page(answer.data)
            known = len(found)
            found |= {consumer.name: consumer for consumer in page.consumers}
            if len(found) >= page.total or len(found) == known:
                return found

    async def _count_anew(self) -> None:
        self._counting = f"{PREFIX}{uuid4().hex[:16]}"
        await self._link.jetstream().add_consumer(
            STREAM,
            ConsumerConfig(
                name=self._counting,
                filter_subject="hr.done.>",
                ack_policy=AckPolicy.NONE,
                deliver_policy=DeliverPolicy.NEW,
                inactive_threshold=INACTIVE_S,
                mem_storage=True,
                num_replicas=1,
            ),
        )
