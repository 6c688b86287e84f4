"""Which of the waiting pieces of work starts next, and which is not worth starting.

Earliest deadline first, as long as everything that waits is expected to make its deadline. Where it is not, plain
deadline order collapses: it starts one piece after another just too late. So work is put off until the rest fits again,
the one with the least value per second of a slot first (Moore and Hodgson's rule), and what can no longer make its
deadline waits behind what can. A tenant that holds far more than the others is put off before all of them, so
another's urgent work does not feel its queue. Work without deadline, and work that missed it, shares what is left
among tenants by the time they used, and a small share of the slots in any case: it never starves. Inside a tenant the
run that is expected to need least goes first, aged by its waiting, and inside a run the longest remaining path.

The caller tells the time and how long its slots are still busy; nothing here waits, asks or remembers the past.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from msgspec import Struct

from functions.due import NEED_S_MIN, Due, Entry
from functions.forecast import mean_s
from functions.reserve import Reserve
from functions.shares import Used

SHARE = 0.05  # of the time of the slots, for work without deadline, whatever else waits
OWED_S_MAX = 3600.0
UNKNOWN_PART = 0.25  # work without history is taken to need this part of the time that it was given
UNKNOWN_S = 1.0  # and so much where it was given none
HOG_TIMES = 16.0  # a tenant holding so many times as much urgent work as the others do on average is put off first
NEAR = 32  # so many of the earliest deadlines are looked at one by one at each decision
FAR_BLOCKS = 4  # blocks of what is due later that a decision looks at, on average
PUT_OFF_MAX = 8  # at one decision, among these; the next decision goes on
REST_VALUE = 0.1  # of its value is lost when work without deadline waits for another slot
LATE_PART = 0.5  # of those, so many may look late before any is put off
STILL_POSSIBLE = 0.5  # of p50: with less time left than this, work is late
RUN_STRETCH = 8.0  # a second that a run needs counts as so many seconds of waiting
TIDY_MIN = 1024  # of what has gone, so much may be left in the heaps beside twice what waits


class Work(Struct, frozen=True, kw_only=True):
    """A piece of work that waits.

    ``p50_s`` and ``p90_s`` are what is expected of its duration, None without history. ``value`` is what an answer in
    time is worth. ``subject``: of all with the same subject only the newest is worth starting; None: each is.
    ``if_late``: "cancel" if it is not worth starting after ``late_at`` (None: after its deadline). ``run_s`` is how
    much work its whole run was expected to be, ``run_at`` the instant that began, ``path_s`` the longest path from here
    to the end of the run.
    """

    id: str
    tenant: str
    arrived: float
    deadline: float | None = None
    p50_s: float | None = None
    p90_s: float | None = None
    value: float = 1.0
    subject: str | None = None
    if_late: str = "continue"
    late_at: float | None = None
    run_s: float = 0.0
    run_at: float | None = None
    path_s: float = 0.0

    @property
    def stopped_at(self) -> float | None:
        """When it is not worth starting any more, and is stopped where it runs; None: never."""
        if self.if_late != "cancel":
            return None
        return self.deadline if self.late_at is None else self.late_at


class Decision(Struct, frozen=True):
    """What to start, None if nothing waits, and what is not worth starting any more."""

    start: Work | None
    give_up: tuple[Work, ...] = ()


def entry_of(work: Work, now: float) -> Entry:
    """Return the work with what it is expected to need, and its worth: value per second of a slot.

    What will be stopped when it is late needs a slot for no longer than until then.
    """
    if work.p50_s is None:
        likely = UNKNOWN_S if work.deadline is None else UNKNOWN_PART * (work.deadline - work.arrived)
        need = likely
    else:
        likely = work.p50_s
        stopped_at = work.stopped_at
        limit_s = math.inf if stopped_at is None else stopped_at - now
        need = mean_s(likely, likely if work.p90_s is None else work.p90_s, limit_s)
    need = max(NEED_S_MIN, need)
    return Entry(work.id, work.tenant, math.inf if work.deadline is None else work.deadline, likely, need, work.value)


class Rest:
    """Work without a deadline to make: tenants by the time they used, inside a tenant the shortest run first."""

    def __init__(self) -> None:
        self._of: dict[str, list[tuple[float, float, int, Work, float]]] = {}
        self._turns: list[tuple[float, str]] = []
        self._used = Used()

    def add(self, work: Work, entry: Entry, number: int) -> None:
        """Let it wait."""
        queue = self._of.get(work.tenant)
        if queue is None:
            queue = self._of[work.tenant] = []
            heapq.heappush(self._turns, (self._used.join(work.tenant), work.tenant))
        began = work.arrived if work.run_at is None else work.run_at
        rank = began + RUN_STRETCH * (work.run_s or entry.need_s)
        heapq.heappush(queue, (rank, -work.path_s, number, work, entry.need_s))

    def head(self, waiting: dict[str, Entry]) -> Work | None:
        """Return what is next, and leave it there; what no longer waits here is forgotten."""
        while self._turns:
            used, tenant = self._turns[0]
            queue = self._of[tenant]
            while queue:
                work = queue[0][3]
                entry = waiting.get(work.id)
                if entry is not None and entry.number == queue[0][2]:
                    return work
                heapq.heappop(queue)
            heapq.heappop(self._turns)
            del self._of[tenant]
            self._used.turn(used)
        return None

    def tidy(self, waiting: dict[str, Entry]) -> None:
        """Forget all that no longer waits."""
        for tenant, queue in self._of.items():
            self._of[tenant] = [
                one for one in queue if (entry := waiting.get(one[3].id)) is not None and entry.number == one[2]
            ]
            heapq.heapify(self._of[tenant])

    def pop(self) -> None:
        """Take what ``head`` has just returned, on its tenant's account."""
        used, tenant = self._turns[0]
        need_s = heapq.heappop(self._of[tenant])[4]
        self._used.turn(used)
        heapq.heapreplace(self._turns, (self._used.use(tenant, need_s), tenant))


class Order:
    """All that waits for one set of slots."""

    def __init__(self, *, slots: int, share: float = SHARE) -> None:
        """Begin with nothing.

        Args:
            slots: how many pieces of work run at a time.
            share: the part of the time of the slots that work without deadline gets in any case, 0 to 1.
        """
        self._slots = slots
        self._share = share
        self._work: dict[str, Work] = {}
        self._entries: dict[str, Entry] = {}
        self._subjects: dict[tuple[str, str], str] = {}
        self._due = Due()
        self._put_off: list[tuple[float, int, str]] = []
        self._expiring: list[tuple[float, int, str]] = []
        self._likely_s_max = 0.0  # of what is in order of deadlines, since that was last empty
        self._need_s_held = 0.0
        self._gone = 0
        self._rest = Rest()
        self._held_s: dict[str, float] = defaultdict(float)
        self._timed_s: dict[str, float] = defaultdict(float)  # by tenant: of all that has a deadline, held or not
        # By tenant what it holds, by deadline; kept from the first time that one goes before another's.
        self._held_of: dict[str, list[tuple[float, int, str]]] | None = None
        self._reserve = Reserve()
        self._owed_s = 0.0
        self._owed_at: float | None = None
        self._number = 0
        self._since_far = 0

    def __len__(self) -> int:
        """How many pieces of work wait."""
        return len(self._work)

    def add(self, work: Work, now: float) -> Work | None:
        """Let work wait. Return the older work of the same tenant and subject that it replaces, if there is one."""
        older: Work | None = None
        if work.subject is not None:
            key = (work.tenant, work.subject)
            known = self._work.get(self._subjects.get(key, ""))
            if known is not None and known.arrived > work.arrived:
                return work
            older = None if known is None else self.drop(known.id)
            self._subjects[key] = work.id
        entry = entry_of(work, now)
        self._number += 1
        entry.number = self._number
        self._work[work.id] = work
        self._entries[work.id] = entry
        if entry.deadline < math.inf:
            self._timed_s[entry.tenant] += entry.need_s
            self._reserve.saw(entry.deadline - now - entry.likely_s, work.value, entry.need_s, now)
        if (stopped_at := work.stopped_at) is not None:
            heapq.heappush(self._expiring, (stopped_at, entry.number, work.id))
        if now + entry.likely_s <= entry.deadline < math.inf:
            self._hold(entry)
        elif self._possible(entry, now) and entry.deadline < math.inf:
            self._defer(entry)
        else:
            self._rest.add(work, entry, entry.number)
        return older

    def drop(self, identity: str) -> Work | None:
        """Let go of work that waits, as it was cancelled or is another's; None if it does not wait here."""
        work = self._work.pop(identity, None)
        if work is None:
            return None
        entry = self._entries.pop(identity)
        if entry.deadline < math.inf:
            _take_off(self._timed_s, entry.tenant, entry.need_s)
        if entry.held:
            self._let_go(entry)
        if not self._work:
            self._timed_s.clear()
        if work.subject is not None and self._subjects.get((work.tenant, work.subject)) == identity:
            del self._subjects[work.tenant, work.subject]
        self._gone += 1
        if self._gone > 2 * len(self._work) + TIDY_MIN:
            self._tidy()
        return work

    def put_off(self, identity: str) -> bool:
        """Say whether work waits behind other work because it is not expected to make its deadline."""
        entry = self._entries.get(identity)
        return entry is not None and not entry.held and entry.deadline < math.inf

    def take(self, now: float, busy_s: Sequence[float] = ()) -> Decision:
        """Return what to start on a slot that is free now.

        Args:
            now: the present instant.
            busy_s: for each slot that is busy, how many seconds more it is expected to be.
        """
        given_up = self._expired(now)
        if not self._work:
            self._owed_s, self._owed_at = 0.0, None
            return Decision(None, given_up)
        # Most of the time nothing looks at it: where only work without deadline waits, and hardly any other ever came.
        busy = sorted(busy_s) if self._due or self._put_off or self._reserve.learned else []
        if self._due:
            self._relieve(now, busy)
        elif self._put_off:
            self._restore(now, busy)
        rest = self._next_of_rest()
        if rest is not None and self._owed(now) >= self._entries[rest.id].need_s:
            return self._start_rest(rest, given_up)
        first = self._first_due(now, busy)
        if first is not None:
            if self._worth(first, busy, now):
                return self._start(self._work[first.id], given_up)
            for entry in self._due.near(NEAR)[1:]:
                if self._worth(entry, busy, now):
                    return self._start(self._work[entry.id], given_up)
        best = self._first_put_off(now)
        if best is not None and self._worth(best, busy, now):
            return self._start(self._work[best.id], given_up)
        # Work that is late may have come into the rest while the best of what was put off was looked for.
        rest = self._next_of_rest()
        if rest is not None:
            need_s = self._entries[rest.id].need_s
            if REST_VALUE * rest.value >= self._reserve.cost(need_s, busy, self._slots, now):
                return self._start_rest(rest, given_up)
        return Decision(None, given_up)

    def _first_due(self, now: float, busy_s: Sequence[float]) -> Entry | None:
        """Return what is due first; or, where that is of a tenant that has far more waiting than the others, the
        first of those who have not: if nothing is expected to be late for it, or work is put off in any case.
        """
        first = self._due.first()
        if first is None or len(self._held_s) < 2:
            return first
        hogs = _far_above(self._timed_s)
        if first.tenant not in hogs:
            return first
        others = [entry for tenant in self._held_s if tenant not in hogs and (entry := self._first_of(tenant))]
        if not others:
            return first
        other = min(others, key=lambda entry: entry.key)
        near = [other, *(entry for entry in self._due.near(NEAR) if entry is not other)]
        return other if self._put_off or self._late(near, now, busy_s)[1] == 0 else first

    def _first_of(self, tenant: str) -> Entry | None:
        """Return what a tenant holds that is due first."""
        if self._held_of is None:
            self._held_of = {}
            for held in self._due.near(len(self._due)):
                self._held_of.setdefault(held.tenant, []).append((*held.key, held.id))
        heap = self._held_of.get(tenant, [])
        while heap:
            entry = self._entries.get(heap[0][2])
            if entry is not None and entry.held and entry.number == heap[0][1]:
                return entry
            heapq.heappop(heap)
        self._held_of.pop(tenant, None)
        return None

    def _worth(self, entry: Entry, busy_s: Sequence[float], now: float) -> bool:
        """Say whether starting it now is worth what it is expected to cost others."""
        return self._work[entry.id].value >= self._reserve.cost(entry.need_s, busy_s, self._slots, now)

    def _expired(self, now: float) -> tuple[Work, ...]:
        """Let go of what is not worth starting any more, and return it."""
        gone: list[Work] = []
        while self._expiring and self._expiring[0][0] < now:
            _, number, identity = heapq.heappop(self._expiring)
            entry = self._entries.get(identity)
            if entry is not None and entry.number == number and (work := self.drop(identity)) is not None:
                gone.append(work)
        return tuple(gone)

    def _tidy(self) -> None:
        """Forget what has gone: only the first of each heap is looked at, so the rest would stay for ever."""
        self._gone = 0
        for heap in (self._put_off, self._expiring):
            heap[:] = [
                one for one in heap if (entry := self._entries.get(one[2])) is not None and entry.number == one[1]
            ]
            heapq.heapify(heap)
        self._rest.tidy(self._entries)
        self._held_of = None

    def _owed(self, now: float) -> float:
        """Return how many seconds of a slot the rest has a claim to; it grows while some of it waits."""
        if self._owed_at is not None:
            self._owed_s += self._share * self._slots * max(0.0, now - self._owed_at)
            self._owed_s = min(OWED_S_MAX, self._owed_s)
        self._owed_at = now
        return self._owed_s

    def _start_rest(self, work: Work, given_up: tuple[Work, ...]) -> Decision:
        self._owed_s = max(0.0, self._owed_s - self._entries[work.id].need_s)
        self._rest.pop()
        return self._start(work, given_up)

    def _start(self, work: Work, given_up: tuple[Work, ...]) -> Decision:
        self.drop(work.id)
        return Decision(work, given_up)

    def _hold(self, entry: Entry) -> None:
        entry.held = True
        if not self._due:
            self._likely_s_max = self._need_s_held = 0.0
        self._likely_s_max = max(self._likely_s_max, entry.likely_s)
        self._need_s_held += entry.need_s
        self._held_s[entry.tenant] += entry.need_s
        self._due.add(entry)
        if self._held_of is not None:
            heapq.heappush(self._held_of.setdefault(entry.tenant, []), (*entry.key, entry.id))

    def _let_go(self, entry: Entry) -> None:
        entry.held = False
        self._need_s_held -= entry.need_s
        self._due.remove(entry)
        _take_off(self._held_s, entry.tenant, entry.need_s)
        if not self._due:
            self._held_of = None
            self._held_s.clear()  # and with it what rounding has left

    def _defer(self, entry: Entry) -> None:
        heapq.heappush(self._put_off, (-entry.worth, entry.number, entry.id))

    @staticmethod
    def _possible(entry: Entry, now: float) -> bool:
        return now + STILL_POSSIBLE * entry.likely_s <= entry.deadline

    def _hogs(self) -> frozenset[str]:
        """Return the tenants that hold far more of the urgent work than others do."""
        return _far_above(self._held_s)

    def _relieve(self, now: float, busy_s: Sequence[float]) -> None:
        """Put work off until what remains is expected to make its deadlines."""
        self._since_far += 1
        earliest = self._due.first()
        if earliest is not None:
            # No piece begins later than when all slots together are through with all the work there is.
            through_s = (sum(busy_s) + self._need_s_held) / self._slots
            if through_s <= earliest.deadline - now - self._likely_s_max:
                if self._put_off:
                    self._restore(now, busy_s)
                return
        if len(self._due) > NEAR and self._since_far * FAR_BLOCKS >= self._due.blocks:
            gone, all_of_them = self._due.overfull(now, busy_s, self._slots, self._hogs())
            if all_of_them:
                self._since_far = 0
            for entry in gone:
                self._move(entry, now)
        for _ in range(PUT_OFF_MAX):
            near = self._due.near(NEAR)
            first, late = self._late(near, now, busy_s)
            if late == 0:
                self._restore(now, busy_s)
                return
            at = near[first]
            if now + at.likely_s > at.deadline:
                self._move(at, now)
                continue
            hogs = self._hogs()
            # A few that are expected to be a little late are left alone: forecasts err, and one that ends early makes
            # room. But not if it is a tenant that holds too much that makes another late.
            if late < LATE_PART * len(near) and (not hogs or at.tenant in hogs):
                return
            self._move(self._due.least(near[: first + 1], hogs), now)

    def _restore(self, now: float, busy_s: Sequence[float]) -> None:
        """Take the best of what was put off back, if all that is due next still makes its deadline then."""
        entry = None if len(self._due) >= NEAR else self._first_put_off(now)
        if entry is None:
            return
        self._hold(entry)
        if self._late(self._due.near(NEAR), now, busy_s)[1] == 0:
            heapq.heappop(self._put_off)
        else:
            self._let_go(entry)

    def _late(self, near: list[Entry], now: float, busy_s: Sequence[float]) -> tuple[int, int]:
        """Return the place of the first of these that is expected to be late, and how many are; (0, 0) if none is.

        What cannot be in time even if it starts now comes first of all.
        """
        # Shortest first is a heap, and no more slots than pieces of work are of interest.
        free = [*(0.0,) * (self._slots - len(busy_s)), *busy_s][:NEAR]
        first = late = 0
        for place, entry in enumerate(near):
            begin = free[0]
            left = entry.deadline - now - entry.likely_s
            if begin > left:
                if left < 0.0:
                    return place, len(near)
                first = first if late else place
                late += 1
            heapq.heapreplace(free, begin + entry.need_s)
        return first, late

    def _move(self, entry: Entry, now: float) -> None:
        self._let_go(entry)
        if self._possible(entry, now):
            self._defer(entry)
        else:
            self._rest.add(self._work[entry.id], entry, entry.number)

    def _first_put_off(self, now: float) -> Entry | None:
        """Return the best of what was put off, and leave it there; what became late meanwhile joins the rest."""
        while self._put_off:
            _, number, identity = self._put_off[0]
            entry = self._entries.get(identity)
            if entry is not None and entry.number == number and not entry.held:
                if self._possible(entry, now):
                    return entry
                self._rest.add(self._work[identity], entry, number)
            heapq.heappop(self._put_off)
        return None

    def _next_of_rest(self) -> Work | None:
        work = self._rest.head(self._entries)
        if work is None:
            self._owed_s, self._owed_at = 0.0, None
        return work


def _far_above(seconds: Mapping[str, float]) -> frozenset[str]:
    """Return the tenants that have far more than others do."""
    others = len(seconds) - 1
    if others < 1:
        return frozenset()
    all_s = sum(seconds.values())
    return frozenset(tenant for tenant, has in seconds.items() if has * others > HOG_TIMES * (all_s - has))


def _take_off(seconds: dict[str, float], tenant: str, less_s: float) -> None:
    left = seconds[tenant] - less_s
    if left > NEED_S_MIN / 2:
        seconds[tenant] = left
    else:
        del seconds[tenant]
