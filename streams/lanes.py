"""One lane of one tenant as a worker sees it: how much of it is in the hand, and how much more to ask for.

While there is more behind, a worker holds a deep view of a lane, for its order to choose from: that keeps nothing from
anybody. Where nothing is behind, it asks for no more than it is about to start.
"""

from __future__ import annotations

from collections.abc import Callable

from streams.link import Link
from streams.poll import Arrival, Poll
from streams.ranking import Aside, Ranking, Urgency
from streams.topology import LaneOf, lane_consumer

WINDOW_MAX = 128
WINDOW_SPAN_S = 0.01  # how much work, by its usual length, is asked for ahead in one lane
VIEW_MAX = 128  # so much of a lane is held where more waits behind it
VIEW_LOW = VIEW_MAX // 2  # more is asked for once it has shrunk to this: a question for each message would cost as much
ASIDE_MAX = 128  # so much work that is put off does not count as held; what is more goes back for a while
CALLED_BEFORE_S = 0.5  # what comes by itself so soon is not called back
AWAY_MAX = 20_000  # so much of what goes back for a while is remembered
STALE_S = 1.0  # after so long without a message, what was known to be behind tells nothing any more
USUAL_FIRST_S = 0.1
USUAL_WEIGHT = 0.1


def window(usual_s: float, slots: int) -> int:
    """Return how many messages of a lane to ask for ahead: about 10 ms of work for all slots, at least one."""
    return max(1, min(WINDOW_MAX, int(WINDOW_SPAN_S * slots / max(usual_s, 1e-6))))


class TenantLane:
    """A lane of a tenant: its open requests, and the counts that decide how many there are.

    ``held`` is how many of its messages are in the hand and not begun, ``aside`` how many of those do not count;
    ``behind`` how many more there were when the last one came; ``returned`` how many went back and may be there still;
    ``away`` holds what went back for a while, for more urgent work to be seen.
    """

    __slots__ = (
        "_near",
        "_poll",
        "_slots",
        "aside",
        "away",
        "behind",
        "heard_at",
        "held",
        "returned",
        "usual_s",
        "where",
    )

    def __init__(self, link: Link, where: LaneOf, slots: int, take: Callable[[TenantLane, Arrival], None]) -> None:
        self.where = where
        self.held = 0
        self.aside = 0
        self.behind = 0
        self.heard_at = 0.0
        self.returned = 0
        self.away: Ranking[Aside] = Ranking()
        self.usual_s = USUAL_FIRST_S
        self._slots = slots
        self._near = window(self.usual_s, slots)

        def arrived(arrival: Arrival) -> None:
            take(self, arrival)

        self._poll = Poll(link, lane_consumer(where.lane, where.tenant), arrived, lambda: None)

    @property
    def outstanding(self) -> int:
        """How many messages are asked for and have not come."""
        return self._poll.outstanding

    def hear_every(self, seconds: float) -> None:
        """Have the server say so often, from the next request on, that it still knows of our requests."""
        self._poll.heartbeat_s = seconds

    async def start(self) -> None:
        """Begin to listen; nothing is asked for yet."""
        await self._poll.start()

    async def close(self) -> None:
        """Stop listening."""
        await self._poll.close()

    async def rest(self) -> None:
        """Ask for nothing more for the time being; what is asked for already may still come."""
        await self._poll.want(0)

    def heard(self, behind: int, now: float) -> None:
        """Take note that a message came, and of how many there are behind it; ``now`` is monotonic."""
        self.behind = behind
        self.heard_at = now
        self.returned = max(0, self.returned - 1)

    def gave_back(self) -> None:
        """Take note that one message went back: it can be had again, unless another worker takes it."""
        self.returned += 1
        self._poll.dry = False

    def put_away(self, urgency: Urgency, aside: Aside, now: float) -> None:
        """Remember what goes back for a while; what there is too much of comes by itself only."""
        if len(self.away) >= AWAY_MAX:
            for seq in [seq for seq, one in self.away.items() if one.until <= now]:
                self.away.pop(seq)
        if len(self.away) < AWAY_MAX:
            self.away.put(urgency, aside)

    def call_back(self, now: float) -> list[str]:
        """Return the most urgent of what went back for a while and is wanted now: where to answer about it.

        Nothing is as long as more is behind, or enough in the hand. What comes by itself within a moment is left alone,
        for it may be another worker's by then.
        """
        called: list[str] = []
        if self.held > VIEW_LOW or not self.dry(now):
            return called
        while self.away and self.held + len(called) < VIEW_MAX:
            aside = self.away.pop(self.away.first())
            if aside is not None and aside.until > now + CALLED_BEFORE_S:
                called.append(aside.reply)
                self.gave_back()
        return called

    def learn(self, busy_s: float) -> None:
        """Take note of how long one invocation kept a slot busy; what is asked for ahead follows from it."""
        self.usual_s += USUAL_WEIGHT * (busy_s - self.usual_s)
        self._near = window(self.usual_s, self._slots)

    def dry(self, now: float) -> bool:
        """Say whether all that is left of the lane may be in the hands of workers, so that some might lack it."""
        return self.behind == 0 or now - self.heard_at > STALE_S

    def wants(self) -> bool:
        """Say whether it is time to ask for more."""
        near, outstanding = self._near, self._poll.outstanding
        counted = self.held - self.aside + outstanding
        if counted > VIEW_LOW:
            return False
        if outstanding <= near // 2:
            return True
        more = 0 if self._poll.dry else self.behind + self.returned
        return more > 0 and (self.behind > 0 or counted <= near)

    async def ask(self, room: int) -> None:
        """Ask for what is about to be started, and for a look at what is known to wait behind it.

        ``room`` is how many more the worker may ask for in all; one is asked for in any case where nothing is held.
        """
        poll = self._poll
        if poll.dry:
            self.behind = self.returned = 0
        free = min(VIEW_MAX - (self.held - self.aside) - poll.outstanding, room)
        if self.held == 0 and poll.outstanding == 0:
            free = max(1, free)
        if free <= 0:
            return
        before = poll.outstanding
        await poll.want(min(self._near, before + free))
        asked = poll.outstanding - before
        more = min(free, self.behind + self.returned) - asked
        if more > 0:
            await poll.glance(more)
