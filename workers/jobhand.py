"""The jobs of one site that were delivered and are not yet submitted: a bounded view, out of which an order chooses.

What is in the hand is told to the server again and again as being in progress; whoever stops telling, because it died
or was paused, loses it to another agent, or to its own next life.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable

from functions.jobs import read_job
from headrace.joblog import JOB
from headrace.wire import Invocation, decode
from streams.log import Log
from streams.poll import Arrival, Poll
from streams.topology import ACK_WAIT_S, site_consumer

_log = logging.getLogger(__name__)

HELD_MAX = 1000
KEEP_S = ACK_WAIT_S / 4
GATHER_S = 0.05  # jobs of one ensemble come within a moment of each other
GATHER_S_MAX = 1.0
UNREADABLE_DELIVERIES_MAX = 10
TRIES_KEPT_MAX = 10_000


class Waiting:
    """One job in the hand. Exactly one of ``ack``, ``give_back`` and ``leave`` ends it."""

    __slots__ = ("_hand", "at", "invocation", "reply", "seq", "told_at", "work")

    def __init__(self, hand: JobHand, arrived: Arrival, now: float) -> None:
        self._hand = hand
        self.seq = arrived.seq
        self.at = arrived.at
        self.reply = arrived.reply
        self.told_at = now
        self.invocation = decode(arrived.body, Invocation)
        if self.invocation.function != JOB:
            raise ValueError(f"{self.invocation.function} is no job")
        self.work = read_job(self.invocation)

    @property
    def tries(self) -> int:
        """How often it was handed back because it could not be submitted."""
        return self._hand.tries.get(self.seq, 0)

    async def ack(self) -> None:
        """Say that it is done with: that it is submitted, or how it ended, is in the log."""
        self._hand.tries.pop(self.seq, None)
        await self._hand.settle(self, b"+ACK")

    async def give_back(self, delay_s: float = 0.0) -> None:
        """Hand it back, to be delivered again after the delay, in seconds."""
        self._hand.count_try(self.seq)
        await self._hand.settle(self, b"-NAK" if delay_s <= 0.0 else b'-NAK {"delay":%d}' % int(delay_s * 1e9))

    def leave(self) -> None:
        """Let go of it without a word: it is another agent's now."""
        self._hand.forget(self)


class JobHand:
    """The consumer of one site's jobs, as its agent sees it."""

    def __init__(self, log: Log, site: str, on_unreadable: Callable[[Arrival], None]) -> None:
        """Describe it; nothing is asked for yet.

        Args:
            log: where the jobs are.
            site: whose they are.
            on_unreadable: gets a message that no agent could read in ``UNREADABLE_DELIVERIES_MAX`` deliveries.
        """
        self._log = log
        self._on_unreadable = on_unreadable
        self._poll = Poll(log.link, site_consumer(site), self._take, lambda: None)
        self._held: dict[int, Waiting] = {}  # by sequence: not begun
        self._out: dict[str, Waiting] = {}  # by reply: not settled
        self._behind = 0
        self._stirred = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None
        self._stopped = False
        self.tries: OrderedDict[int, int] = OrderedDict()

    async def start(self) -> None:
        """Begin to ask for jobs."""
        await self._poll.start()
        await self._poll.want(HELD_MAX)

    async def stop(self) -> None:
        """Ask for no more, and hand back what has not been begun; what was begun is still told to be in progress."""
        self._stopped = True
        await self._poll.close()
        for waiting in list(self._held.values()):
            await self.settle(waiting, b"-NAK")

    async def close(self) -> None:
        """Leave what is still not settled to be delivered again."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

    def stir(self) -> None:
        """Let ``changed`` return: there may be room for more now."""
        self._stirred.set()

    async def changed(self) -> None:
        """Return once a job has come, or ``stir`` was called."""
        await self._stirred.wait()
        self._stirred.clear()

    async def gathered(self) -> None:
        """Return once nothing more is expected to come at once."""
        waited_s, known = 0.0, -1
        while waited_s < GATHER_S_MAX and known < len(self._held) < HELD_MAX:
            known = len(self._held)
            await asyncio.sleep(GATHER_S)
            waited_s += GATHER_S
            if not self._behind and known == len(self._held):
                return

    def waiting(self) -> list[Waiting]:
        """Return what is held and not begun."""
        return list(self._held.values())

    async def begin(self, those: Iterable[Waiting]) -> None:
        """Take these out of the hand, to be submitted, and ask for others in their place."""
        for waiting in those:
            self._held.pop(waiting.seq, None)
        if not self._stopped:
            await self._poll.want(HELD_MAX - len(self._held))

    async def settle(self, waiting: Waiting, body: bytes) -> None:
        """Answer the server about one; a lost answer means that it comes again, which is expected."""
        self.forget(waiting)
        with contextlib.suppress(Exception):
            await self._log.link.nc.publish(waiting.reply, body)

    def forget(self, waiting: Waiting) -> None:
        """Keep it no longer."""
        if self._held.get(waiting.seq) is waiting:
            del self._held[waiting.seq]
        self._out.pop(waiting.reply, None)

    async def acknowledge(self, arrived: Arrival) -> None:
        """Say that a message that nobody can read is done with."""
        with contextlib.suppress(Exception):
            await self._log.link.nc.publish(arrived.reply, b"+ACK")

    def count_try(self, seq: int) -> None:
        """Take note that a job could not be submitted once more."""
        self.tries[seq] = self.tries.pop(seq, 0) + 1
        while len(self.tries) > TRIES_KEPT_MAX:
            self.tries.popitem(last=False)

    def _take(self, arrived: Arrival) -> None:
        self._behind = arrived.behind
        try:
            waiting = Waiting(self, arrived, asyncio.get_running_loop().time())
        except Exception:
            # Written by a release to come, or damaged. Left alone, it is delivered to another agent.
            _log.exception("message %d is no job that can be read", arrived.seq)
            if arrived.delivered >= UNREADABLE_DELIVERIES_MAX:
                self._on_unreadable(arrived)
            return
        before = self._held.pop(arrived.seq, None)
        if before is not None:  # it came again while it waited here: the newer delivery is the one that counts
            self.forget(before)
        self._held[arrived.seq] = waiting
        self._out[waiting.reply] = waiting
        self._stirred.set()
        if self._keeping is None or self._keeping.done():
            self._keeping = asyncio.create_task(self._keep(), name="jobs-keep")

    async def _keep(self) -> None:
        """Tell the server about everything in hand before it thinks that we are gone; over when nothing is."""
        while self._out:
            await asyncio.sleep(KEEP_S / 2)
            now = asyncio.get_running_loop().time()
            for waiting in list(self._out.values()):
                if now - waiting.told_at >= KEEP_S:
                    waiting.told_at = now
                    with contextlib.suppress(Exception):
                        await self._log.link.nc.publish(waiting.reply, b"+WPI")
