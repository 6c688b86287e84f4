"""What outcomes teach about the next ones: the histories behind the outlook, learned from the log in its order.

The ledger learns in the step in which it folds, so that each outcome teaches once; the same log makes the same
histories, however it was read. A run that was canceled, or has its answer already, teaches nothing about answers, and
an attempt that failed nothing at all: how long it took says little about one that goes well. An invocation that was
tried again teaches the time of the attempt that went well, and what came before it the whole wait for the answer.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

from functions import trail
from functions.forecast import History, forecast
from functions.outlook import JOBS, Measure, kind_names
from headrace.wire import Expected, ForecastRow, Outcome, RunEnd, Step, decode, encode
from streams.record import Fact, RunRecord
from streams.stored import Stored
from streams.tables import row_key

HISTORIES_MAX = 4096  # with what was learned of each last: 2.5 KB, in the ledger's memory and in Redis
HISTORIES_LEFT = 3584  # where there are more, the least recently learned ones are forgotten down to this number
KINDS_TOLD_MAX = 256  # of one function, the most recently learned ones
ALIKE = 0.05  # a quantile that moved by less is not told again
ALIKE_S, ALIKE_SHORT = 0.005, 0.5  # nor is one that moved by less than both, so many seconds and such a share
QUIET_S = 0.5  # a first invocation that waited longer waited for others, and tells nothing of the way to a worker
SITE = ""  # work of this platform's own workers


class Lessons:
    """The histories of all kinds of work. ``histories`` is the whole state: by the key of a function's row, by kind."""

    def __init__(self) -> None:
        self.histories: dict[str, dict[str, History]] = {}
        self._count = 0
        self._learned: set[tuple[str, str]] = set()
        self._forgotten: set[tuple[str, str]] = set()
        self._told: dict[tuple[str, str], Expected] = {}
        self._untold: set[str] = set()

    # ------------------------------------------------------------ the state, kept by the ledger

    def load(self, kept: Mapping[str, bytes]) -> None:
        """Go on from histories as ``changed`` gave them; whatever was here before is dropped."""
        self._untold |= self.histories.keys()
        self.histories = {}
        for name, raw in kept.items():
            function, _, kind = name.partition("|")
            self.histories.setdefault(function, {})[kind] = decode(raw, History)
        self._count = len(kept)
        self._untold |= self.histories.keys()
        self._learned.clear()
        self._forgotten.clear()
        self._told.clear()

    def changed(self) -> tuple[dict[str, bytes], list[str]]:
        """Return what changed since the last call: histories to be kept, by name, and the names of those forgotten."""
        kept = {
            f"{function}|{kind}": encode(self.histories[function][kind]) for function, kind in sorted(self._learned)
        }
        gone = [f"{function}|{kind}" for function, kind in sorted(self._forgotten)]
        self._learned.clear()
        self._forgotten.clear()
        return kept, gone

    # ------------------------------------------------------------ learning

    def learn(self, fact: Fact, stored: Stored, before: RunRecord | None, after: RunRecord | None) -> None:
        """Take in what a fact of the log teaches.

        Args:
            fact: an outcome or the end of a run; any other teaches nothing.
            stored: its message.
            before: its run before this fact, None where its beginning is not known.
            after: its run after it.
        """
        answered = before is not None and after is not None and after.answer_id != before.answer_id
        if isinstance(fact, Outcome) and fact.state == "succeeded":
            number = zlib.crc32(fact.invocation_id.encode())
            if not trail.belongs_to_platform(fact.function):
                this = Step(fact.function, fact.version, fact.size, fact.started_at, fact.ended_at)
                self._take("run", fact.tenant, this, fact.ended_at - fact.started_at, number, stored.at)
                if fact.stage_in_s > 0.0:
                    self._take("stage", fact.tenant, this, fact.stage_in_s, number, stored.at)
                waited = fact.started_at - fact.accepted_at
                if fact.parent_id is None and fact.attempts == 1 and waited < QUIET_S:
                    self._take("wait", fact.tenant, this, waited, number, stored.at)
            self._take_job(fact, number, stored.at)
            if answered and before is not None:
                # A better answer that came later tells of its own function alone: the way to the first one was shorter.
                steps = trail.of(fact) if before.answered_at is None else trail.of(fact)[-1:]
                self._answered(fact.tenant, steps, number, stored.at)
        elif isinstance(fact, RunEnd) and after is not None and answered:
            self._answered(after.tenant, fact.trail, zlib.crc32(fact.run_id.encode()), stored.at)

    def _take_job(self, done: Outcome, number: int, at: float) -> None:
        job = done.job
        if job is not None and job.state == "completed" and job.started_at is not None and job.ended_at is not None:
            self._learn("run", JOBS, done.version, job.site, 0, job.ended_at - job.started_at, number, at)

    def _answered(self, tenant: str, steps: Iterable[Step], number: int, at: float) -> None:
        for step in steps:
            self._take("answer", tenant, step, at - step.started_at, number, at)
            self._take("rest", tenant, step, at - step.ended_at, number, at)

    def _take(self, measure: Measure, tenant: str, step: Step, seconds: float, number: int, at: float) -> None:
        self._learn(measure, row_key(tenant, step.function), step.version, SITE, step.size, seconds, number, at)

    def _learn(
        self,
        measure: Measure,
        function: str,
        version: str,
        site: str,
        size: int,
        seconds: float,
        number: int,
        at: float,
    ) -> None:
        """Learn one duration of work under all kinds that it belongs to; ``function`` is the key of its row."""
        mine = self.histories.setdefault(function, {})
        for kind in kind_names(measure, version, site, size):
            history = mine.get(kind)
            if history is None:
                history = mine[kind] = History()
                self._count += 1
                self._forgotten.discard((function, kind))
            stride = history.stride
            if history.takes(number, at):
                history.learn(seconds, at)
                self._told.pop((function, kind), None)
                self._untold.add(function)
                self._learned.add((function, kind))
            elif stride != history.stride:
                self._learned.add((function, kind))
        if self._count > HISTORIES_MAX:
            self._forget()

    def _forget(self) -> None:
        """Drop the histories that were not learned for longest, so that new kinds of work find room for ever."""
        ages = [(mine[kind].at[-1], name, kind) for name, mine in self.histories.items() for kind in mine]
        for _, function, kind in sorted(ages)[: len(ages) - HISTORIES_LEFT]:
            mine = self.histories[function]
            del mine[kind]
            if not mine:
                del self.histories[function]
            self._learned.discard((function, kind))
            self._forgotten.add((function, kind))
            self._told.pop((function, kind), None)
            self._untold.add(function)
        self._count = min(self._count, HISTORIES_LEFT)

    # ------------------------------------------------------------ telling

    def untold(self) -> set[str]:
        """Return the functions of which something was learned since they were told."""
        return self._untold

    def tell(self, function: str, at: float, told: ForecastRow | None) -> ForecastRow | None:
        """Return what is expected of a function now; None where nothing is known of it any more.

        Args:
            function: its name.
            at: the present instant.
            told: what others know of it. It is returned as it is where little has changed since.
        """
        self._untold.discard(function)
        mine = self.histories.get(function)
        if not mine:
            return None
        kinds: dict[str, Expected] = {}
        for kind in sorted(mine, key=lambda kind: (mine[kind].at[-1], kind))[-KINDS_TOLD_MAX:]:
            known = self._told.get((function, kind))
            if known is None:
                said = forecast(mine[kind])
                if said is None:
                    continue
                known = Expected(said.p50_s, said.p90_s, said.p99_s, said.observations)
                self._told[function, kind] = known
            kinds[kind] = known
        if told is not None and alike(told.kinds, kinds):
            return told
        return ForecastRow(function=function, kinds=kinds, at=at)


def alike(one: Mapping[str, Expected], other: Mapping[str, Expected]) -> bool:
    """Say whether two forecasts of a function are as good as the same: the same kinds, and quantiles hardly apart."""
    if one.keys() != other.keys():
        return False
    for name, new in other.items():
        old = one[name]
        if new.observations >= 2 * old.observations:
            return False
        for before, now in ((old.p50_s, new.p50_s), (old.p90_s, new.p90_s)):
            if abs(now - before) > max(ALIKE * before, min(ALIKE_S, ALIKE_SHORT * before)):
                return False
    return True
