"""The jobs of one site that were delivered and are not yet submitted: a bounded view of each tenant's, out of which
shares and urgency choose.

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
from headrace.errors import HeadraceError
from headrace.joblog import JOB
from headrace.tasks import ended
from headrace.wire import Invocation, decode
from streams.log import Log
from streams.poll import Arrival
from streams.topology import ACK_WAIT_S, JobsOf, ensure_jobs
from workers.jobview import JobView

_log = logging.getLogger(__name__)

HELD_MAX = 1000
HELD_MIN = 32
ASIDE_MAX = 100_000  # of all tenants together: what is behind that is not seen until some of it has been submitted
WHO_S = 2.0  # after so long it is looked who the tenants are
ENSURE_S = 0.5
KEEP_S = ACK_WAIT_S / 4
GATHER_S = 0.05  # jobs of one ensemble come within a moment of each other
GATHER_S_MAX = 1.0
UNREADABLE_DELIVERIES_MAX = 10
TRIES_KEPT_MAX = 10_000


class Waiting:
    """One job in the hand. Exactly one of ``ack``, ``give_back`` and ``leave`` ends it."""

    __slots__ = ("_hand", "at", "invocation", "reply", "seq", "told_at", "view", "work")

    def __init__(self, hand: JobHand, view: JobView[Waiting], arrived: Arrival, now: float) -> None:
        self._hand = hand
        self.view = view
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
    """The consumers of one site's jobs, a tenant's each, as its agent sees them."""

    def __init__(
        self,
        log: Log,
        site: str,
        on_unreadable: Callable[[Arrival], None],
        held_max: int = HELD_MAX,
    ) -> None:
        """Describe it; nothing is asked for yet.

        Args:
            log: where the jobs are.
            site: where they are to run.
            on_unreadable: gets a message that no agent could read in ``UNREADABLE_DELIVERIES_MAX`` deliveries.
            held_max: how many may be in the hand, shared by the tenants who have any; each has ``HELD_MIN`` at least.
        """
        self._log = log
        self._site = site
        self._on_unreadable = on_unreadable
        self._held_max = held_max
        self._views: dict[str, JobView[Waiting]] = {}
        self._out: dict[str, Waiting] = {}  # by reply: not settled
        self._stirred = asyncio.Event()
        self._untended = asyncio.Event()
        self._tenants: frozenset[str] = frozenset()
        self._unsure = asyncio.Event()  # whether all consumers are there
        self._tasks: list[asyncio.Task[None]] = []
        self._keeping: asyncio.Task[None] | None = None
        self.tries: OrderedDict[int, int] = OrderedDict()

    async def ensure(self) -> None:
        """Make the consumers of all who are tenants now, and note who they are.

        Raises:
            Unavailable: the log does not answer.
        """
        self._tenants = await ensure_jobs(self._log.link, self._site)

    async def start(self) -> None:
        """Begin to ask for jobs; the consumers are there."""
        await self._open()
        self._tasks = [
            asyncio.create_task(self._tend_for_ever(), name="jobs-tend"),
            asyncio.create_task(self._follow_tenants(), name="jobs-tenants"),
        ]
        for task in self._tasks:
            task.add_done_callback(lambda _: self.stir())

    async def stop(self) -> None:
        """Ask for no more, and hand back what has not been begun; what was begun is still told to be in progress."""
        await ended(self._tasks)
        for tenant in list(self._views):
            await self._close(tenant)

    async def close(self) -> None:
        """Leave what is still not settled to be delivered again."""
        if self._keeping is not None:
            await ended([self._keeping])

    def stir(self) -> None:
        """Let ``changed`` return: there may be room for more now."""
        self._stirred.set()

    async def changed(self) -> None:
        """Return once a job has come, or ``stir`` was called; raise what ended the asking for jobs."""
        await self._stirred.wait()
        self._stirred.clear()
        for task in self._tasks:
            if task.done():
                task.result()

    async def gathered(self) -> None:
        """Return once nothing more is expected to come at once."""
        waited_s, known = 0.0, -1
        while waited_s < GATHER_S_MAX and known < (held := self._held()) and not self._full():
            known = held
            await asyncio.sleep(GATHER_S)
            waited_s += GATHER_S
            if not any(view.behind for view in self._views.values()) and known == self._held():
                return

    def waiting(self) -> list[Waiting]:
        """Return what is held and not begun."""
        return [waiting for view in self._views.values() for waiting in view.held.values()]

    def left(self) -> int:
        """Return how many jobs wait, also those that are not held, as far as is known."""
        return sum(len(view.held) + len(view.aside) + view.behind for view in self._views.values())

    def begin(self, those: Iterable[Waiting]) -> None:
        """Take these out of the hand, to be submitted, and ask for others in their place."""
        for waiting in those:
            waiting.view.held.pop(waiting.seq)
        self._untended.set()

    async def settle(self, waiting: Waiting, body: bytes) -> None:
        """Answer the server about one; a lost answer means that it comes again, which is expected."""
        self.forget(waiting)
        with contextlib.suppress(Exception):
            await self._log.link.nc.publish(waiting.reply, body)

    def forget(self, waiting: Waiting) -> None:
        """Keep it no longer."""
        if waiting.view.held.get(waiting.seq) is waiting:
            waiting.view.held.pop(waiting.seq)
            self._untended.set()
        self._out.pop(waiting.reply, None)

    def count_try(self, seq: int) -> None:
        """Take note that a job could not be submitted once more."""
        self.tries[seq] = self.tries.pop(seq, 0) + 1
        while len(self.tries) > TRIES_KEPT_MAX:
            self.tries.popitem(last=False)

    # ------------------------------------------------------------ the tenants

    async def _open(self) -> None:
        """Have a view of the jobs of those who are tenants now, and of nobody else."""
        for gone in self._views.keys() - self._tenants:
            await self._close(gone)
        for tenant in sorted(self._tenants - self._views.keys()):
            view = JobView(self._log.link, JobsOf(self._site, tenant), self._take, self._unsure.set)
            await view.start()
            self._views[tenant] = view
        self._untended.set()

    async def _close(self, tenant: str) -> None:
        view = self._views.pop(tenant)
        await view.close()
        for waiting in view.held.values():
            await self.settle(waiting, b"-NAK")

    async def _follow_tenants(self) -> None:
        """Follow the tenants as they come and go, and make consumers again that are gone: their site is back."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WHO_S):
                    await self._unsure.wait()
            self._unsure.clear()
            try:
                await self.ensure()
                await self._open()
            except HeadraceError as error:
                _log.warning("site %s: %s", self._site, error)
            await asyncio.sleep(ENSURE_S)

    # ------------------------------------------------------------ the hand

    def _held(self) -> int:
        return sum(len(view.held) for view in self._views.values())

    def _share(self) -> int:
        """Return how many jobs of each tenant may be in the hand."""
        sharing = sum(1 for view in self._views.values() if view.held)
        return max(min(HELD_MIN, self._held_max), self._held_max // max(1, sharing))

    def _full(self) -> bool:
        share = self._share()
        return all(len(view.held) >= share or not view.behind for view in self._views.values())

    async def _tend_for_ever(self) -> None:
        while True:
            await self._untended.wait()
            self._untended.clear()
            share, aside_max = self._share(), ASIDE_MAX // max(1, len(self._views))
            for view in list(self._views.values()):
                await view.tend(share, aside_max, self._let_go)

    def _let_go(self, waiting: Waiting) -> None:
        self._out.pop(waiting.reply, None)

    def _take(self, view: JobView[Waiting], arrived: Arrival) -> None:
        view.behind = arrived.behind
        self._untended.set()
        try:
            waiting = Waiting(self, view, arrived, asyncio.get_running_loop().time())
        except Exception:
            # Written by a release to come, or damaged. Left alone, it is delivered to another agent.
            _log.exception("message %d is no job that can be read", arrived.seq)
            if arrived.delivered >= UNREADABLE_DELIVERIES_MAX:
                self._on_unreadable(arrived)
            return
        before = view.hold(waiting)
        if before is not None:  # it came again while it waited here: the newer delivery is the one that counts
            self._let_go(before)
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
