"""The verdict, without I/O: what was promised, what the log holds, what happened outside, and whether they agree.

The log's facts are folded with the same pure function that the platform uses, ``streams.record.fold_run``; everything
else here is counted independently of it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import msgspec

from headrace.wire import SPREADER, Invocation, Lease, Outcome, RunEnd, Tally, decode
from infra.bench.load import quantile
from infra.chaos.lines import DriverLine, Read, Reply, Shown, Timing, Verdict
from streams.record import RunRecord, fold_run
from streams.stored import Stored
from streams.topology import kind_of, run_of

N = TypeVar("N", int, float)

STALE_S = 1.0  # a read that was begun this long after a run ended has to say so
NAMED_MAX = 20
FINAL_STATES = frozenset({"succeeded", "failed", "canceled"})
# Routes whose answer is the token of their trigger; see effects.py.
TELLING = frozenset({"instant", "slow", "chained", "fanned", "emitted"})


class Effect(NamedTuple):
    """One line of the ledger of effects."""

    run: str
    invocation: str
    attempt: int
    token: str


class _Trigger:
    """What the driver knows of one id."""

    def __init__(self) -> None:
        self.route = ""
        self.runs: set[str] = set()
        self.unknown = False

    @property
    def fate(self) -> str:
        return "accepted" if self.runs else "unknown" if self.unknown else "refused"


class _Invocation:
    """What the log holds of one invocation."""

    def __init__(self) -> None:
        self.works: list[Invocation] = []
        self.dones: list[Outcome] = []
        self.done_at = 0.0
        self.newest_lease = 0
        self.stale = False


class Judge:
    """Collects what is known and gives the verdict. Facts come in the order of the log."""

    def __init__(self) -> None:
        self._triggers: defaultdict[str, _Trigger] = defaultdict(_Trigger)
        self._reads: list[Read] = []
        self._shown: dict[str, Shown] = {}
        self._facts: defaultdict[str, list[Stored]] = defaultdict(list)
        self._invocations: defaultdict[tuple[str, str], _Invocation] = defaultdict(_Invocation)
        self._ends: Counter[str] = Counter()
        self._filled: Counter[tuple[str, str, int]] = Counter()
        self._note_bytes: Counter[str] = Counter()
        self._leases = 0
        self._effects: list[Effect] = []
        self._by_run: defaultdict[str, list[Effect]] = defaultdict(list)
        self._records: dict[str, RunRecord | None] = {}
        self._found: defaultdict[str, dict[str, str]] = defaultdict(dict)

    # ------------------------------------------------------------ what is known

    def heard(self, lines: Iterable[DriverLine]) -> None:
        """Take what a driver logged."""
        for line in lines:
            match line:
                case Reply():
                    trigger = self._triggers[line.id]
                    trigger.route = line.route
                    if line.answered == "accepted":
                        trigger.runs.add(line.run)
                    trigger.unknown = trigger.unknown or line.answered == "unknown"
                case Read():
                    self._reads.append(line)
                case Shown():
                    self._shown[line.run] = line
                case _:
                    pass

    def stored(self, facts: Iterable[Stored]) -> None:
        """Take messages of the log, in their order."""
        for fact in facts:
            match kind_of(fact.subject):
                case "work" | "job":
                    work = decode(fact.body, Invocation)
                    self._invocations[work.run_id, work.invocation_id].works.append(work)
                    self._facts[work.run_id].append(fact)
                case "done":
                    done = decode(fact.body, Outcome)
                    one = self._invocations[done.run_id, done.invocation_id]
                    one.stale = one.stale or one.newest_lease > done.attempts > 0
                    one.dones.append(done)
                    one.done_at = fact.at
                    self._ends[done.run_id] += done.end is not None
                    self._facts[done.run_id].append(fact)
                case "end":
                    self._ends[decode(fact.body, RunEnd).run_id] += 1
                    self._facts[run_of(fact.subject)].append(fact)
                case "lease":
                    lease = decode(fact.body, Lease)
                    self._leases += 1
                    self._invocations[lease.run_id, lease.invocation_id].newest_lease = lease.attempt
                case "tally":
                    tally = decode(fact.body, Tally)
                    self._filled.update((tally.run_id, tally.scope, index) for index, _ in tally.filled)
                case "note":
                    self._note_bytes[run_of(fact.subject)] += len(fact.body)
                case "start" | "try" | "cancel" | "submit":
                    self._facts[run_of(fact.subject)].append(fact)
                case _:
                    pass  # of no weight here

    def happened(self, effects: Iterable[Effect]) -> None:
        """Take lines of the ledger of effects."""
        for effect in effects:
            self._effects.append(effect)
            self._by_run[effect.run].append(effect)

    def open_runs(self) -> set[str]:
        """Return the runs that were promised or begun and have not ended in the facts so far."""
        known = {run for run, facts in self._facts.items() if any(kind_of(f.subject) == "work" for f in facts)}
        promised = {run for trigger in self._triggers.values() for run in trigger.runs}
        return {run for run in known | promised if not self._ends[run] and not self._canceled(run)}

    def _canceled(self, run: str) -> bool:
        return any(kind_of(f.subject) == "cancel" for f in self._facts.get(run, ()))

    # ------------------------------------------------------------ the verdict

    def verdict(self, expected: Mapping[str, Sequence[str]] | None = None, silent: Sequence[str] = ()) -> Verdict:
        """Say what was lost, doubled, ghost and wrong.

        Args:
            expected: by route, the states its runs may end in; ``succeeded`` where it is not named.
            silent: functions that write nothing into the ledger of effects.
        """
        self._found.clear()
        runs = {run for run, facts in self._facts.items() if facts}
        self._records = {run: folded[0] if (folded := fold_run(self._facts[run])) else None for run in runs}
        self._find_lost(silent)
        self._find_doubled()
        self._find_ghosts()
        self._find_wrong()
        self._find_unexpected(expected or {})
        fates = Counter(trigger.fate for trigger in self._triggers.values())
        ended = [r for r in self._records.values() if r is not None and r.ended and r.ended_at is not None]
        took = [r.ended_at - r.accepted_at for r in ended if r.ended_at is not None]
        bodies = Counter((e.run, e.invocation, e.attempt) for e in self._effects)
        again = Counter((run, invocation) for run, invocation, _ in bodies)
        first = {
            t.event.id for (_, _), i in self._invocations.items() for t in i.works if t.parent_id is None and t.event
        }
        return Verdict(
            triggers=len(self._triggers),
            accepted=fates["accepted"],
            refused=fates["refused"],
            unknown=fates["unknown"],
            unknown_ran=sum(t.fate == "unknown" and name in first for name, t in self._triggers.items()),
            runs=len(runs),
            invocations=len(self._invocations),
            facts=sum(map(len, self._facts.values())),
            reads=len(self._reads) + len(self._shown),
            lost=len(self._found["lost"]),
            doubled=len(self._found["doubled"]),
            ghost=len(self._found["ghost"]),
            wrong=len(self._found["wrong"]),
            stale=sum(one.stale for one in self._invocations.values()),
            late=sum(r.state == "succeeded" and r.deadline_met is False for r in ended),
            unexpected=len(self._found["unexpected"]),
            bodies_again=sum(n > 1 for n in again.values()),
            leases=self._leases,
            states=dict(Counter("none" if r is None else r.state for r in self._records.values())),
            end_p50_s=quantile(took, 0.5) if took else 0.0,
            end_p99_s=quantile(took, 0.99) if took else 0.0,
            by_load=self._timings(self._load_of),
            by_route=self._timings(lambda record: record.route),
            deaths=dict(Counter(f"{d.function}: {d.error.kind}" for d, _ in self._dones() if d.error is not None)),
            attempts_most=_most((d.function, d.attempts) for d, _ in self._dones()),
            ran_most_s=_most((d.function, at - d.started_at) for d, at in self._dones()),
            note_bytes_most=max(self._note_bytes.values(), default=0),
            named={
                kind: [f"{k}: {why}" for k, why in list(what.items())[:NAMED_MAX]] for kind, what in self._found.items()
            },
        )

    def _dones(self) -> Iterator[tuple[Outcome, float]]:
        for one in self._invocations.values():
            for done in one.dones[:1]:
                if done.function != SPREADER:
                    yield done, one.done_at

    def _load_of(self, record: RunRecord) -> str:
        return record.event.id.rpartition("-")[0] if record.event.id in self._triggers else ""

    def _timings(self, key: Callable[[RunRecord], str]) -> dict[str, Timing]:
        took: defaultdict[str, list[float]] = defaultdict(list)
        late: Counter[str] = Counter()
        for record in self._records.values():
            if record is not None and record.ended_at is not None:
                took[key(record)].append(record.ended_at - record.accepted_at)
                late[key(record)] += record.state == "succeeded" and record.deadline_met is False
        return {
            name: Timing(n=len(of), p50_s=quantile(of, 0.5), p99_s=quantile(of, 0.99), most_s=max(of), late=late[name])
            for name, of in took.items()
            if name
        }

    def _find_lost(self, silent: Sequence[str]) -> None:
        lost = self._found["lost"]
        for name, trigger in self._triggers.items():
            for run in trigger.runs:
                if self._records.get(run) is None:
                    lost[run] = f"{name} was accepted and is not in the log"
        for run, record in self._records.items():
            if record is not None and not record.ended:
                lost[run] = f"accepted and still {record.state}"
        happened = {(e.run, e.invocation, e.attempt) for e in self._effects}
        children = Counter(w.parent_id for i in self._invocations.values() for w in i.works[:1] if w.parent_id)
        for (run, identity), one in self._invocations.items():
            record = self._records.get(run)
            if not one.works:
                lost.setdefault(run, f"{identity} has an outcome and no work")
            elif not one.dones and record is not None and record.state == "succeeded":
                lost.setdefault(run, f"succeeded, and {one.works[0].function} {identity} has no outcome")
            for done in one.dones[:1]:
                if done.state != "succeeded" or done.function == SPREADER or done.function in silent:
                    continue
                if (run, identity, done.attempts) not in happened:
                    lost.setdefault(run, f"{done.function} {identity} succeeded, and its effect is not there")
                if children[identity] < done.children:
                    lost.setdefault(run, f"{identity} started {done.children}, and {children[identity]} are there")

    def _find_doubled(self) -> None:
        doubled = self._found["doubled"]
        for (run, identity), one in self._invocations.items():
            if len(one.works) > 1:
                doubled[f"{run}.{identity}"] = f"started {len(one.works)} times"
            if len(one.dones) > 1:
                doubled[f"{run}.{identity}"] = f"{len(one.dones)} outcomes"
            if one.stale:
                doubled[f"{run}.{identity}"] = "an outcome was committed over a newer lease"
        for run, number in self._ends.items():
            if number > 1:
                doubled[run] = f"ended {number} times"
        for (run, scope, index), number in self._filled.items():
            if number > 1:
                doubled[f"{run}.{scope}.{index}"] = f"a slot was filled {number} times"
        for name, trigger in self._triggers.items():
            if len(trigger.runs) > 1:
                doubled[name] = f"one id, {len(trigger.runs)} runs"

    def _find_ghosts(self) -> None:
        ghosts = self._found["ghost"]
        for (run, _), one in self._invocations.items():
            for work in one.works:
                if work.parent_id is None and work.event is not None and work.event.source.startswith("/v1/triggers/"):
                    self._promised(ghosts, run, work.event.id, "begun")
        for effect in self._effects:
            if not self._invocations[effect.run, effect.invocation].works:
                ghosts[effect.run] = f"{effect.invocation} ran and is not in the log"
            self._promised(ghosts, effect.run, effect.token, "ran")

    def _promised(self, ghosts: dict[str, str], run: str, name: str, what: str) -> None:
        trigger = self._triggers.get(name)
        if trigger is None:
            ghosts.setdefault(run, f"{what} for {name}, which nobody sent")
        elif trigger.fate == "refused":
            ghosts.setdefault(run, f"{what} for {name}, which was refused")

    def _find_wrong(self) -> None:
        wrong = self._found["wrong"]
        for read in self._reads:
            if said := self._misread(read):
                wrong[read.run] = said
        for run, shown in self._shown.items():
            record = self._records.get(run)
            if record is None:
                wrong[run] = f"shown as {shown.state}, and not in the log"
            elif (shown.state, shown.deadline_met) != (record.state, record.deadline_met):
                told, true = (shown.state, shown.deadline_met), (record.state, record.deadline_met)
                wrong[run] = f"shown as {told}, and the log says {true}"
        if self._shown:
            for run in self._records.keys() - self._shown.keys():
                wrong[run] = "in the log, and not in the list of runs"
        for run, record in self._records.items():
            if record is not None and record.state == "succeeded" and record.route in TELLING:
                self._check_answer(wrong, run, record)

    def _misread(self, read: Read) -> str:
        """Return what is wrong with what one read told, nothing if it was right or told nothing."""
        if read.status == 404:
            return "accepted, and then not found"
        if read.status != 200:
            return ""
        record = self._records.get(read.run)
        if record is None:
            return f"read as {read.state}, and not in the log"
        if read.state not in FINAL_STATES:
            over = record.ended_at is not None and record.ended_at < read.at - STALE_S
            return (
                f"read as {read.state}, {read.at - (record.ended_at or 0):.1f} s after it {record.state}"
                if over
                else ""
            )
        if read.state != record.state:
            return f"read as {read.state}, and the log says {record.state}"
        early = record.ended_at is None or record.ended_at > read.at + read.took_s + STALE_S
        return f"read as {read.state} before it was" if early else ""

    def _check_answer(self, wrong: dict[str, str], run: str, record: RunRecord) -> None:
        tokens = {e.token for e in self._by_run[run]}
        done = self._invocations[run, record.answer_id or ""].dones[:1]
        payload = (done[0].answer or done[0].result) if done else None
        if payload is None:
            wrong[run] = "succeeded without an answer"
        elif payload.blob is None and tokens and msgspec.json.decode(payload.body) not in tokens:
            wrong[run] = "its answer is another one's"

    def _find_unexpected(self, expected: Mapping[str, Sequence[str]]) -> None:
        for run, record in self._records.items():
            if record is not None and record.ended and record.state not in expected.get(record.route, ("succeeded",)):
                why = f": {record.error.kind}: {record.error.message}" if record.error else ""
                self._found["unexpected"][run] = f"{record.route} {record.state}{why}"[:300]


def _most(pairs: Iterable[tuple[str, N]]) -> dict[str, N]:
    found: dict[str, N] = {}
    for name, value in pairs:
        found[name] = max(value, found.get(name, value))
    return found


def read_effects(text: str) -> list[Effect]:
    """Read the ledger of effects. A line that a killed body left half written is none: nothing follows from it."""
    found: list[Effect] = []
    for line in text.split("\n")[:-1]:
        run, invocation, attempt, token = line.split(",")
        found.append(Effect(run, invocation, int(attempt), token))
    return found
