"""From lanes to deliveries: a worker's hand, out of which its order chooses.

A worker keeps a bounded view of every lane of every tenant in its hand. What it holds of a lane that has nothing more
behind it and cannot start soon it gives back, so that no work waits here beside a free slot elsewhere. Everything that
was delivered and not yet acknowledged is told to the server again and again as being in progress; whoever stops
telling, because it died or was paused, loses it to another worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, Protocol

from headrace.errors import Unavailable
from headrace.wire import Invocation, decode
from streams.lanes import ASIDE_MAX, TenantLane
from streams.log import Log
from streams.poll import Arrival, heartbeat_s
from streams.ranking import Aside
from streams.topology import ACK_WAIT_S, DEFAULT_TENANT, LANES, LaneOf

_log = logging.getLogger(__name__)

HELD_MAX = 1024  # messages in the hand in all; beyond that, a lane of which none is held still gets one
HELD_BYTES_MAX = 64 * 1024**2
HOLD_S = 0.1  # so long a message may wait here that a free worker elsewhere might want
HEADS_S = 0.002
KEPT_S = 0.05  # a slot that was kept for urgent work is decided about again after this
ASIDE_S_MIN, ASIDE_S_MAX = 0.25, 30.0  # work that is put off goes back for as long as what is behind it takes
KEEP_S = ACK_WAIT_S / 4
HANDED_BACK_KEPT_MAX = 100_000
ENDLESS = sys.maxsize
UNREADABLE_DELIVERIES_MAX = 10  # a release that can read it may be on its way; each delivery takes ACK_WAIT_S

Over = Literal["", "deadline", "superseded"]


class Delivery:
    """One invocation in the hand of this worker. Exactly one of ``ack``, ``give_back`` and ``leave`` ends it.

    ``fresh`` says that this is its first delivery, or that all before it were handed back not started; ``doubtful``
    that the server may have forgotten deliveries of it, for what it knows of them does not survive a crash. ``over``
    says why it is not worth starting any more, if it is not. ``counts`` as long as it takes room in the hand. ``run``
    is set by the hand: p50 and p90 of how long it is expected to run, in seconds, None where nothing is known.
    """

    __slots__ = (
        "_intake",
        "at",
        "counts",
        "delivered",
        "doubtful",
        "fresh",
        "held_at",
        "identity",
        "invocation",
        "lane",
        "over",
        "reply",
        "run",
        "seq",
        "size",
        "told_at",
    )

    def __init__(
        self, intake: Intake, lane: TenantLane, arrived: Arrival, now: float, *, fresh: bool, doubtful: bool
    ) -> None:
        self._intake = intake
        self.lane = lane
        self.seq = arrived.seq
        self.identity = str(arrived.seq)
        self.at = arrived.at
        self.delivered = arrived.delivered
        self.fresh = fresh
        self.doubtful = doubtful
        self.reply = arrived.reply
        self.size = len(arrived.body)
        self.invocation = decode(arrived.body, Invocation)
        self.held_at = now
        self.told_at = now
        self.over: Over = ""
        self.counts = False
        self.run: tuple[float, float] | None = None

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


class Hand(Protocol):
    """What is held and not started, in the order in which it is to be. It knows the time, and what runs."""

    def add(self, delivery: Delivery) -> Delivery | None:
        """Let it wait; return what need not be started as there is a newer one: another, or this one."""

    def take(self) -> tuple[Delivery | None, Sequence[Delivery]]:
        """Return what to start on a slot that is free now, and what is not worth starting any more.

        Nothing may be started although something waits: then a slot is kept for more urgent work.
        """

    def drop(self, delivery: Delivery) -> None:
        """Let go of it."""

    def put_off(self, delivery: Delivery) -> bool:
        """Say whether it waits behind other work because it is not expected to make its deadline."""


class Rows(Protocol):
    """The table of tenants."""

    def items(self) -> Mapping[str, object]:
        """Return the rows by tenant."""

    def listen(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call ``changed`` after each change, until what is returned is called."""


class Intake:
    """The lanes of the log as one worker sees them."""

    def __init__(
        self,
        log: Log,
        hand: Hand,
        tenants: Rows,
        *,
        slots: int,
        on_over: Callable[[Delivery], None],
        on_unreadable: Callable[[Arrival], None] | None = None,
    ) -> None:
        """Describe it; nothing is asked for yet.

        Args:
            log: where the lanes are.
            hand: the order in which they are taken.
            tenants: whose lanes there are, besides those of the default tenant.
            slots: how many invocations this worker runs at a time.
            on_over: gets what is not worth starting any more, to end it for good; ``over`` says why.
            on_unreadable: gets a message that no worker could read in ``UNREADABLE_DELIVERIES_MAX`` deliveries.
        """
        self._log = log
        self._hand = hand
        self._tenants = tenants
        self._on_over = on_over
        self._on_unreadable = on_unreadable
        self._slots = slots
        self._lanes: dict[LaneOf, TenantLane] = {}
        self._held: dict[int, Delivery] = {}  # by sequence
        self._held_bytes = 0
        self._out: dict[str, Delivery] = {}
        # By sequence, up to which delivery this worker had it in its hand each time, and handed it back not started.
        self._handed_back: OrderedDict[int, int] = OrderedDict()
        self._arrived = asyncio.Event()
        self._stirred = asyncio.Event()
        self._asking: set[TenantLane] = set()
        self._tenants_changed = asyncio.Event()
        # Of what was stored before this connection stood, the server may have forgotten that it was delivered.
        self._doubtful_up_to = ENDLESS
        self._forget: list[Callable[[], None]] = []
        self._takers = 0
        self._paused = False
        self._tasks: list[asyncio.Task[None]] = []
        self._keeping: asyncio.Task[None] | None = None

    @property
    def held(self) -> int:
        """How many messages are in the hand and not started."""
        return len(self._held)

    async def start(self) -> None:
        """Open a poll on every lane of every tenant."""
        self._forget = [
            self._log.link.on_reconnect(self._doubt_all),
            self._tenants.listen(self._tenants_changed.set),
        ]
        await self._doubt_less()
        await self._open_lanes()
        self._keeping = asyncio.create_task(self._keep(), name="intake-keep")
        self._tasks = [
            asyncio.create_task(self._review_for_ever(), name="intake-review"),
            asyncio.create_task(self._ask_for_ever(), name="intake-ask"),
            asyncio.create_task(self._follow_tenants(), name="intake-tenants"),
        ]

    async def stop(self) -> None:
        """Stop asking, and hand back what has not been started; what runs is still told to be in progress."""
        for forget in self._forget:
            forget()
        self._forget = []
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for lane in self._lanes.values():
            await lane.close()
        await self._give_back(self._held.values())

    async def close(self) -> None:
        """Stop, and leave what still runs to be delivered again."""
        await self.stop()
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

    async def take(self) -> Delivery:
        """Return what to start on a slot that is free, as soon as there is something."""
        self._takers += 1
        try:
            if self._paused:
                self._paused = False
                for lane in self._lanes.values():
                    await lane.ask(self._room())
                # The first head to arrive need not be the most urgent one: a moment for the others, and for a look at
                # what turns out to be behind them.
                await asyncio.sleep(HEADS_S)
                if any(lane.behind for lane in self._lanes.values()):
                    await asyncio.sleep(HEADS_S)
            while (delivery := self._choose()) is None:
                self._arrived.clear()
                if not self._held:
                    await self._call_back()
                look_again = None
                if self._held:
                    look_again = asyncio.get_running_loop().call_later(KEPT_S, self._arrived.set)
                try:
                    await self._arrived.wait()
                finally:
                    if look_again is not None:
                        look_again.cancel()
        finally:
            self._takers -= 1
        return delivery

    def slot_freed(self) -> None:
        """Take note that there is one more free slot: a slot that was kept may be given away now."""
        if self._takers and self._held:
            self._arrived.set()

    async def settle(self, delivery: Delivery, body: bytes) -> None:
        """Answer the server about one delivery; a lost answer means that it comes again, which is expected."""
        self.forget(delivery)
        with contextlib.suppress(Exception):
            await self._log.link.nc.publish(delivery.reply, body)

    def forget(self, delivery: Delivery) -> None:
        """Keep a delivery no longer: it is done with, or somebody else's."""
        self._uncount(delivery)
        self._out.pop(delivery.reply, None)

    # ------------------------------------------------------------ the hand

    def _choose(self) -> Delivery | None:
        start, over = self._hand.take()
        for delivery in over:
            self._end(delivery, "deadline")
        if start is not None:
            del self._held[start.seq]
            self._uncount(start)
        return start

    def _end(self, delivery: Delivery, why: Over) -> None:
        """Have it ended. It takes its room until that is in the log, so that no more is begun than can be done."""
        del self._held[delivery.seq]
        delivery.over = why
        self._on_over(delivery)

    def _uncount(self, delivery: Delivery) -> None:
        if delivery.counts:
            delivery.counts = False
            delivery.lane.held -= 1
            self._held_bytes -= delivery.size
            self._ask_soon(delivery.lane)

    def _ask_soon(self, lane: TenantLane) -> None:
        """Ask for more of a lane, if it is time to; a worker that is busy for long asks for nothing."""
        if not self._paused and lane.wants():
            self._asking.add(lane)
            self._stirred.set()

    def _room(self) -> int:
        """Return how many more messages may be asked for, beside those that are asked for already in any lane."""
        if self._held_bytes > HELD_BYTES_MAX:
            return 0
        return HELD_MAX - len(self._held) - sum(lane.outstanding for lane in self._lanes.values())

    def _take(self, lane: TenantLane, arrived: Arrival) -> None:
        now = asyncio.get_running_loop().time()
        lane.heard(arrived.behind, now)
        try:
            fresh = arrived.delivered == self._handed_back.pop(arrived.seq, 0) + 1
            delivery = Delivery(self, lane, arrived, now, fresh=fresh, doubtful=arrived.seq <= self._doubtful_up_to)
        except Exception:
            # Not ours to read: written by a release to come, or damaged. Left alone, it is delivered to another.
            _log.exception("message %d of lane %d of %s cannot be read", arrived.seq, *lane.where)
            if self._on_unreadable is not None and arrived.delivered >= UNREADABLE_DELIVERIES_MAX:
                self._on_unreadable(arrived)
            return
        lane.away.pop(arrived.seq)
        before = self._held.pop(arrived.seq, None)
        if before is not None:  # it came again while it waited here: the newer delivery is the one that counts
            self._hand.drop(before)
            self.forget(before)
            delivery.fresh = before.fresh and arrived.delivered == before.delivered + 1
        self._out[arrived.reply] = delivery
        self._held[arrived.seq] = delivery
        delivery.counts = True
        lane.held += 1
        self._held_bytes += delivery.size
        older = self._hand.add(delivery)
        if older is not None:
            self._end(older, "superseded")
        self._arrived.set()
        if arrived.behind:
            self._ask_soon(lane)

    async def _give_back(self, deliveries: Iterable[Delivery], delay_s: float = 0.0) -> None:
        """Hand back what has not been started."""
        for delivery in list(deliveries):
            if self._held.pop(delivery.seq, None) is None:
                continue  # it was taken while another one was handed back
            self._hand.drop(delivery)
            if delivery.fresh:
                self._handed_back[delivery.seq] = delivery.delivered
            if not delay_s:
                delivery.lane.gave_back()
            else:
                now = asyncio.get_running_loop().time()
                delivery.lane.put_away(_urgency(delivery), Aside(delivery.reply, now + delay_s), now)
            await delivery.give_back(delay_s)
        while len(self._handed_back) > HANDED_BACK_KEPT_MAX:
            self._handed_back.popitem(last=False)

    # ------------------------------------------------------------ what goes on beside

    async def _open_lanes(self) -> None:
        """Have a poll on every lane of those who are tenants now, and of nobody else."""
        tenants = {DEFAULT_TENANT, *self._tenants.items()}
        for where in [where for where in self._lanes if where.tenant not in tenants]:
            await self._lanes.pop(where).close()
        every_s = heartbeat_s(LANES * len(tenants), replicated=self._log.replicated)
        for lane in self._lanes.values():
            lane.hear_every(every_s)
        for tenant in sorted(tenants):
            for number in range(LANES):
                where = LaneOf(number, tenant)
                if where not in self._lanes:
                    lane = TenantLane(self._log.link, where, self._slots, self._take)
                    lane.hear_every(every_s)
                    await lane.start()
                    self._lanes[where] = lane
                    await lane.ask(self._room())

    async def _follow_tenants(self) -> None:
        while True:
            await self._tenants_changed.wait()
            self._tenants_changed.clear()
            # Lanes that were made anew bring all of the log again: what is in it now may be done.
            await self._doubt_less()
            await self._open_lanes()

    async def _ask_for_ever(self) -> None:
        """Ask for a look at what turned out to wait behind a message."""
        while True:
            await self._stirred.wait()
            self._stirred.clear()
            while self._asking:
                await self._asking.pop().ask(self._room())

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

    async def _review_for_ever(self) -> None:
        """Look over what is in the hand as long as there is something."""
        while True:
            if not self._held:  # an idle worker sleeps
                self._arrived.clear()
                await self._arrived.wait()
            await asyncio.sleep(HOLD_S / 2)
            await self.review()

    async def review(self) -> None:
        """Give back what others might start sooner, and what is put off beyond the room that there is for it."""
        now = asyncio.get_running_loop().time()
        waited = [one for one in self._held.values() if now - one.held_at > HOLD_S and one.lane.dry(now)]
        if waited:
            if not self._takers:
                self._paused = True
                for lane in self._lanes.values():
                    await lane.rest()
            # What is due first comes first when it is asked for again.
            await self._give_back(sorted(waited, key=_urgency))
        await self._set_aside()

    async def _set_aside(self) -> None:
        """Look past work that is put off, and give back what there is too much of: what is behind it may be in time."""
        aside: dict[TenantLane, list[Delivery]] = {}
        for delivery in self._held.values():
            if delivery.lane.behind and delivery.invocation.deadline and self._hand.put_off(delivery):
                aside.setdefault(delivery.lane, []).append(delivery)
        for lane in self._lanes.values():
            lane.aside = min(len(aside.get(lane, ())), ASIDE_MAX)
        for lane, those in aside.items():
            through_s = (lane.held + lane.behind) * lane.usual_s / self._slots
            # What is due last has the most time to come again.
            those.sort(key=_urgency)
            await self._give_back(those[ASIDE_MAX:], min(ASIDE_S_MAX, max(ASIDE_S_MIN, through_s)))
            self._ask_soon(lane)
        if self._takers:
            await self._call_back()

    async def _call_back(self) -> None:
        """Have what is put off come again where nothing else is left to be seen: no slot waits beside it."""
        now = asyncio.get_running_loop().time()
        for lane in self._lanes.values():
            for reply in lane.call_back(now):
                with contextlib.suppress(Exception):  # it comes later by itself
                    await self._log.link.nc.publish(reply, b"-NAK")
                self._ask_soon(lane)


def _urgency(delivery: Delivery) -> tuple[float, int]:
    invocation = delivery.invocation
    due = invocation.deadline if invocation.due is None else invocation.due
    return (float("inf") if due is None else due, delivery.seq)
