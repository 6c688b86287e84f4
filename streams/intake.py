"""From lanes to deliveries in deadline order.

A worker keeps a small window of every lane in its hand and always takes the earliest deadline of what it holds. What
it holds and cannot start soon it gives back, so that no work waits here beside a free slot elsewhere. Everything that
was delivered and not yet acknowledged is told to the server again and again as being in progress; whoever stops
telling, because it died or was paused, loses it to another worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import math
import sys
from collections import OrderedDict
from collections.abc import Callable

from headrace.errors import Unavailable
from headrace.wire import Invocation, decode
from streams.log import Log
from streams.poll import Arrival, Poll
from streams.topology import ACK_WAIT_S, LANES, lane_consumer

_log = logging.getLogger(__name__)

WINDOW_MAX = 128
WINDOW_SPAN_S = 0.01  # how much work, by its usual length, is held ahead in one lane
HOLD_S = 0.1
HEADS_S = 0.002
KEEP_S = ACK_WAIT_S / 4
USUAL_WEIGHT = 0.1
HANDED_BACK_KEPT_MAX = 100_000
ENDLESS = sys.maxsize
UNREADABLE_DELIVERIES_MAX = 10  # a release that can read it may be on its way; each delivery takes ACK_WAIT_S


def window(usual_s: float, slots: int) -> int:
    """Return how many messages of a lane to hold ahead: about 10 ms of work for all slots, at least one."""
    return max(1, min(WINDOW_MAX, int(WINDOW_SPAN_S * slots / max(usual_s, 1e-6))))


class Delivery:
    """One invocation in the hand of this worker. Exactly one of ``ack``, ``give_back`` and ``leave`` ends it.

    ``fresh`` says that this is its first delivery, or that all before it were handed back not started; ``doubtful``
    that the server may have forgotten deliveries of it, for what it knows of them does not survive a crash.
    """

    __slots__ = (
        "_intake",
        "at",
        "delivered",
        "doubtful",
        "fresh",
        "held_at",
        "invocation",
        "lane",
        "order",
        "reply",
        "seq",
        "told_at",
    )

    def __init__(self, intake: Intake, lane: int, arrived: Arrival, now: float, *, fresh: bool, doubtful: bool) -> None:
        self._intake = intake
        self.lane = lane
        self.seq = arrived.seq
        self.at = arrived.at
        self.delivered = arrived.delivered
        self.fresh = fresh
        self.doubtful = doubtful
        self.reply = arrived.reply
        self.invocation = decode(arrived.body, Invocation)
        self.held_at = now
        self.told_at = now
        due = self.invocation.deadline
        self.order = (math.inf if due is None else due, arrived.seq)

    def __lt__(self, other: Delivery) -> bool:
        return self.order < other.order

    async def ack(self) -> None:
        """Say that it is done for good: its outcome is in the log."""
        await self._intake.settle(self, b"+ACK")

    async def give_back(self, delay_s: float = 0.0) -> None:
        """Hand it back, to be delivered again after the delay."""
        body = b"-NAK" if delay_s <= 0.0 else b'-NAK {"delay":%d}' % int(delay_s * 1e9)
        await self._intake.settle(self, body)

    def leave(self) -> None:
        """Let go of it without a word: it was delivered to another worker, whose it is now."""
        self._intake.forget(self)


class Intake:
    """The lanes of the log as one worker sees them."""

    def __init__(self, log: Log, *, slots: int, on_unreadable: Callable[[Arrival], None] | None = None) -> None:
        """Describe it; nothing is asked for yet.

        Args:
            log: where the lanes are.
            slots: how many invocations this worker runs at a time.
            on_unreadable: gets a message that no worker could read in ``UNREADABLE_DELIVERIES_MAX`` deliveries.
        """
        self._log = log
        self._on_unreadable = on_unreadable
        self._slots = slots
        self._polls: list[Poll] = []
        self._heap: list[Delivery] = []
        self._out: dict[str, Delivery] = {}
        # By sequence, up to which delivery this worker had it in its hand each time, and handed it back not started.
        self._handed_back: OrderedDict[int, int] = OrderedDict()
        self._arrived = asyncio.Event()
        self._usual_s = [0.1] * LANES
        # Of what was stored before this connection stood, the server may have forgotten that it was delivered.
        self._doubtful_up_to = ENDLESS
        self._forget: Callable[[], None] | None = None
        self._takers = 0
        self._busy_since = 0.0
        self._paused = False
        self._keeping: asyncio.Task[None] | None = None
        self._pausing: asyncio.Task[None] | None = None

    @property
    def held(self) -> int:
        """How many messages are in the hand and not started."""
        return len(self._heap)

    async def start(self) -> None:
        """Open a poll on every lane."""
        self._forget = self._log.link.on_reconnect(self._doubt_all)
        await self._doubt_less()
        for lane in range(LANES):

            def take(arrived: Arrival, lane: int = lane) -> None:
                self._take(lane, arrived)

            poll = Poll(self._log.link, lane_consumer(lane), take, lambda: None)
            self._polls.append(poll)
            await poll.start()
        await self._ask_all()
        self._busy_since = asyncio.get_running_loop().time()
        self._keeping = asyncio.create_task(self._keep(), name="intake-keep")
        self._pausing = asyncio.create_task(self._pause_when_busy(), name="intake-pause")

    async def stop(self) -> None:
        """Stop asking, and hand back what has not been started; what runs is still told to be in progress."""
        if self._forget is not None:
            self._forget()
        if self._pausing is not None:
            self._pausing.cancel()
            await asyncio.gather(self._pausing, return_exceptions=True)
        for poll in self._polls:
            await poll.close()
        await self._give_back_held()

    async def close(self) -> None:
        """Stop, and leave what still runs to be delivered again."""
        await self.stop()
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

    async def take(self) -> Delivery:
        """Return the delivery with the earliest deadline of all lanes, as soon as there is one."""
        self._takers += 1
        try:
            if self._paused:
                self._paused = False
                await self._ask_all()
                # The first head to arrive need not be the most urgent one: a moment for the others.
                await asyncio.sleep(HEADS_S)
            while not self._heap:
                self._arrived.clear()
                await self._arrived.wait()
            delivery = heapq.heappop(self._heap)
        finally:
            self._takers -= 1
            self._busy_since = asyncio.get_running_loop().time()
        poll = self._polls[delivery.lane]
        wanted = window(self._usual_s[delivery.lane], self._slots)
        if poll.outstanding <= wanted // 2:
            await poll.want(wanted)
        return delivery

    def learn(self, lane: int, busy_s: float) -> None:
        """Take note of how long one invocation of this lane kept a slot busy; the window follows from it."""
        usual = self._usual_s[lane]
        self._usual_s[lane] = usual + USUAL_WEIGHT * (busy_s - usual)

    async def settle(self, delivery: Delivery, body: bytes) -> None:
        """Answer the server about one delivery; a lost answer means that it comes again, which is expected."""
        self._out.pop(delivery.reply, None)
        with contextlib.suppress(Exception):
            await self._log.link.nc.publish(delivery.reply, body)

    async def acknowledge(self, arrived: Arrival) -> None:
        """Say that a message that nobody can read is done with."""
        with contextlib.suppress(Exception):
            await self._log.link.nc.publish(arrived.reply, b"+ACK")

    def forget(self, delivery: Delivery) -> None:
        """Keep a delivery no longer: it is somebody else's."""
        self._out.pop(delivery.reply, None)

    def _take(self, lane: int, arrived: Arrival) -> None:
        now = asyncio.get_running_loop().time()
        try:
            fresh = arrived.delivered == self._handed_back.pop(arrived.seq, 0) + 1
            delivery = Delivery(self, lane, arrived, now, fresh=fresh, doubtful=arrived.seq <= self._doubtful_up_to)
        except Exception:
            # Not ours to read: written by a release to come, or damaged. Left alone, it is delivered to another.
            _log.exception("message %d of lane %d cannot be read", arrived.seq, lane)
            if self._on_unreadable is not None and arrived.delivered >= UNREADABLE_DELIVERIES_MAX:
                self._on_unreadable(arrived)
            return
        self._out[arrived.reply] = delivery
        if not self._heap:
            self._busy_since = max(self._busy_since, now)
        heapq.heappush(self._heap, delivery)
        self._arrived.set()

    async def _ask_all(self) -> None:
        for lane, poll in enumerate(self._polls):
            await poll.want(window(self._usual_s[lane], self._slots))

    async def _doubt_all(self) -> None:
        self._doubtful_up_to = ENDLESS

    async def _doubt_less(self) -> None:
        with contextlib.suppress(Unavailable):
            self._doubtful_up_to = await self._log.end_seq()

    async def _keep(self) -> None:
        """Tell the server about everything in hand before it thinks that we are gone."""
        while True:
            await asyncio.sleep(KEEP_S / 2)
            if self._doubtful_up_to == ENDLESS:
                await self._doubt_less()
            now = asyncio.get_running_loop().time()
            for delivery in list(self._out.values()):
                if now - delivery.told_at >= KEEP_S:
                    delivery.told_at = now
                    with contextlib.suppress(Exception):
                        await self._log.link.nc.publish(delivery.reply, b"+WPI")

    async def _pause_when_busy(self) -> None:
        """When all slots have been busy for a while, give back what waits here and ask again once a slot is free."""
        while True:
            if not self._heap:  # an idle worker sleeps
                self._arrived.clear()
                await self._arrived.wait()
            await asyncio.sleep(HOLD_S / 2)
            now = asyncio.get_running_loop().time()
            if self._takers == 0 and self._heap and now - self._busy_since > HOLD_S:
                self._paused = True
                for poll in self._polls:
                    await poll.want(0)
                await self._give_back_held()

    async def _give_back_held(self) -> None:
        held, self._heap = self._heap, []
        for delivery in held:
            if delivery.fresh:
                self._handed_back[delivery.seq] = delivery.delivered
            await delivery.give_back()
        while len(self._handed_back) > HANDED_BACK_KEPT_MAX:
            self._handed_back.popitem(last=False)
