"""The jobs of one tenant at a site, as its agent sees them: the most urgent in the hand, the others put aside.

A consumer hands messages out in the order in which they came, and a job that is due soon may be behind thousands that
are not. So where the hand is full, the least urgent of it is put aside: handed back for a while, with nothing of it
kept but how urgent it is. What is behind comes in its place, until all was seen. When the hand has room again, the most
urgent of what was put aside is called back: handed back once more, without a delay.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from functions.ensembles import urgency
from headrace.wire import Invocation
from streams.link import Link
from streams.poll import Arrival, Poll
from streams.ranking import Aside, Ranking
from streams.topology import JobsOf, jobs_consumer

NEAR = 128  # so many are asked for at a time
ASIDE_S = 60.0  # so long is put aside; after that it comes by itself, also to an agent that knows nothing of it
ASIDE_RATE = 200.0  # unless so many would come so in a second
CALLED_S = 2.0  # what was called back is not waited for any longer


class Held(Protocol):
    """A job in the hand."""

    @property
    def invocation(self) -> Invocation:
        """Return its invocation."""

    @property
    def seq(self) -> int:
        """Return its place in the log."""

    @property
    def reply(self) -> str:
        """Return where the server is answered about it."""


H = TypeVar("H", bound=Held)


class JobView(Generic[H]):
    """What the agent of a site has of one tenant's jobs; ``behind`` is how many nobody has been given yet."""

    def __init__(
        self,
        link: Link,
        whose: JobsOf,
        take: Callable[[JobView[H], Arrival], None],
        lost: Callable[[], None],
    ) -> None:
        """Describe it; nothing is asked for yet.

        Args:
            link: a connection to the log's servers.
            whose: the tenant and the site.
            take: gets each message.
            lost: hears that the consumer may be gone.
        """
        self._link = link
        self.whose = whose
        self.held: Ranking[H] = Ranking()
        self.aside: Ranking[Aside] = Ranking()
        self.behind = 0
        self._called: dict[int, float] = {}  # by place in the log: when it was called back; it has not come yet
        self._forgot_at = 0.0
        self._poll = Poll(link, jobs_consumer(whose.site, whose.tenant), lambda arrived: take(self, arrived), lost)

    async def start(self) -> None:
        """Begin to listen."""
        await self._poll.start()

    async def close(self) -> None:
        """Ask for no more, and let what was put aside come to whoever asks."""
        await self._poll.close()
        while self.aside:
            await self._call_back()

    def hold(self, job: H) -> H | None:
        """Take a job into the hand. Return what it replaces: an older delivery of the same."""
        before = self.held.pop(job.seq)
        self.aside.pop(job.seq)
        self._called.pop(job.seq, None)
        self.held.put(urgency(job), job)
        return before

    async def tend(self, held_max: int, aside_max: int, put_aside: Callable[[H], None]) -> None:
        """Bring the hand to its size: put aside what is too much, or call back, and ask for what is behind.

        Args:
            held_max: how many may be in the hand; a few more may be on their way.
            aside_max: how many may be put aside for what is behind them to be seen.
            put_aside: hears what leaves the hand so.
        """
        while len(self.held) > held_max:
            job = self.held.pop(self.held.last())
            assert job is not None  # noqa: S101 - it was there
            put_aside(job)
            await self._put_aside(job)
        self._forget_late()
        coming = len(self.held) + len(self._called)
        if coming <= held_max // 2:
            for _ in range(min(len(self.aside), held_max - coming)):
                await self._call_back()
        if len(self.held) < held_max or len(self.aside) < aside_max:
            if self._poll.outstanding <= NEAR // 2:
                await self._poll.want(NEAR)
        else:
            await self._poll.want(0)

    async def _put_aside(self, job: H) -> None:
        delay_s = max(ASIDE_S, len(self.aside) / ASIDE_RATE)
        self.aside.put(urgency(job), Aside(job.reply, asyncio.get_running_loop().time() + delay_s))
        await self._answer(job.reply, b'-NAK {"delay":%d}' % int(delay_s * 1e9))

    async def _call_back(self) -> None:
        """Have the most urgent of what was put aside come again."""
        seq = self.aside.first()
        aside = self.aside.pop(seq)
        assert aside is not None  # noqa: S101 - it was there
        now = asyncio.get_running_loop().time()
        if aside.until > now:  # else it comes by itself, or another agent has it
            self._called[seq] = now
            await self._answer(aside.reply, b"-NAK")

    def _forget_late(self) -> None:
        """Forget what should have come and has not: another agent has it, or it comes yet."""
        now = asyncio.get_running_loop().time()
        while self._called and now - (oldest := next(iter(self._called.items())))[1] > CALLED_S:
            del self._called[oldest[0]]
        if now - self._forgot_at > ASIDE_S:
            self._forgot_at = now
            for seq in [seq for seq, aside in self.aside.items() if aside.until <= now]:
                self.aside.pop(seq)

    async def _answer(self, reply: str, body: bytes) -> None:
        with contextlib.suppress(Exception):  # a lost answer means that it comes again later
            await self._link.nc.publish(reply, body)
