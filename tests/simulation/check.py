"""Is everything as it was promised? Told from the log, from what functions did outside, and from what senders know."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from msgspec import structs

from functions.lessons import Lessons
from headrace.errors import Unavailable
from headrace.names import invocation_id
from headrace.wire import Attempt, Gather, Invocation, Lease, Newest, Outcome, RunEnd, Tally, decode, encode
from streams.ledger import (
    DEAD_RUNS,
    FORECASTS,
    LAYOUT,
    OPEN,
    POSITION,
    RUNS,
    TOTALS,
    WHOLE,
    dead_key,
    dead_left_key,
    open_key,
    route_key,
    runs_key,
    state_key,
)
from streams.record import InvocationRecord, RunRecord, fold_run
from streams.stored import Stored
from tests.simulation import campaigns, ladders, programs
from tests.simulation.messages import Kept
from tests.stories import teach

if TYPE_CHECKING:
    from tests.simulation.world import World


LEDGER_SHARE = 0.01


class Facts:
    """The log, sorted out."""

    def __init__(self, log: list[Kept]) -> None:
        self.by_run: dict[str, list[Stored]] = {}
        self.first: dict[str, Invocation] = {}
        self.works: dict[str, list[tuple[int, Invocation]]] = {}
        self.jobs: dict[str, list[tuple[int, Invocation]]] = {}
        self.dones: dict[str, list[tuple[int, Outcome]]] = {}
        self.leases: dict[str, list[tuple[int, Lease]]] = {}
        self.tries: dict[str, list[tuple[int, Attempt]]] = {}
        self.tallies: dict[str, list[tuple[int, Tally]]] = {}
        self.ends: dict[str, list[tuple[int, RunEnd]]] = {}
        self.cancels: dict[str, int] = {}
        self.newest: dict[str, list[tuple[int, str]]] = {}
        for seq, subject, body, at, _, tokens in log:
            kind = tokens[1]
            if kind == "newest":
                self.newest.setdefault(tokens[2], []).append((seq, decode(body, Newest).run_id))
                continue
            run = tokens[4] if kind in ("work", "job") else tokens[2]
            self.by_run.setdefault(run, []).append(Stored(seq, subject, body, at))
            match kind:
                case "work":
                    work = decode(body, Invocation)
                    self.works.setdefault(work.invocation_id, []).append((seq, work))
                    if work.parent_id is None:
                        self.first[run] = work
                case "job":
                    job = decode(body, Invocation)
                    self.jobs.setdefault(job.invocation_id, []).append((seq, job))
                    self.works.setdefault(job.invocation_id, [(seq, job)])  # after a failure it waits again
                case "done":
                    done = decode(body, Outcome)
                    self.dones.setdefault(done.invocation_id, []).append((seq, done))
                    if done.end is not None:
                        self.ends.setdefault(run, []).append((seq, done.end))
                case "end":
                    self.ends.setdefault(run, []).append((seq, decode(body, RunEnd)))
                case "lease":
                    lease = decode(body, Lease)
                    self.leases.setdefault(lease.invocation_id, []).append((seq, lease))
                case "try":
                    tried = decode(body, Attempt)
                    self.tries.setdefault(tried.invocation_id, []).append((seq, tried))
                case "tally":
                    self.tallies.setdefault(tokens[3], []).append((seq, decode(body, Tally)))
                case "cancel":
                    self.cancels.setdefault(run, seq)
        self.records = {run: folded for run, facts in self.by_run.items() if (folded := fold_run(facts)) is not None}


def check(world: World) -> list[str]:
    """Return what is wrong, each in a line that begins with its kind; nothing where all is well."""
    facts = Facts(world.server.log)
    return [
        *_lost(world, facts),
        *_doubled(facts),
        *_fencing(world, facts),
        *_joins(facts),
        *_newest(facts),
        *_runs(world, facts),
        *_time_ledgers(world, facts),
        *_dues(facts),
        *_ghosts(world, facts),
        *campaigns.check(world, facts),
        *_heard(world, facts),
        *_read_model(world, facts),
        *{f"died: {name} of {error!r}" for name, error in world.ended if error and not isinstance(error, Unavailable)},
    ]


def _lost(world: World, facts: Facts) -> list[str]:
    wrong = [
        f"lost: {t.event} was accepted and is not in the log"
        for t in world.triggers
        if t.accepted and t.run not in facts.first
    ]
    return wrong + [
        f"lost: the run {run} has not ended, it is {r.state}" for run, (r, _) in facts.records.items() if not r.ended
    ]


def _doubled(facts: Facts) -> list[str]:
    wrong = []
    for what, found in (("outcomes", facts.dones), ("starts", facts.works)):
        for identity, several in found.items():
            if len(several) > 1:
                wrong.append(f"doubled: {identity} has {len(several)} {what}, at {[seq for seq, _ in several]}")
    for run, ends in facts.ends.items():
        if len(ends) > 1:
            wrong.append(f"doubled: the run {run} ended {len(ends)} times, at {[seq for seq, _ in ends]}")
    return wrong


def _fencing(world: World, facts: Facts) -> list[str]:
    """What stands in the log was written by the holder of the newest lease of its time, and attempts only grow."""
    wrong = []
    log = world.server.log
    for effect in world.effects:
        for seq, done in facts.dones.get(effect.invocation, []):
            if done.attempts < effect.attempt and effect.at < log[seq - 1].at:
                told = f"attempt {done.attempts} of {effect.invocation} committed while attempt {effect.attempt} ran"
                wrong.append(f"fencing: {told}")
    for identity, leases in facts.leases.items():
        numbers = [lease.attempt for _, lease in leases]
        # The agent of a site takes a job over as often as it likes: what counts its attempts are its submissions.
        if numbers != (sorted(numbers) if identity in facts.jobs else sorted(set(numbers))):
            wrong.append(f"fencing: the leases of {identity} have the numbers {numbers}")
        for seq, done in facts.dones.get(identity, []):
            holder = max((lease for lease in leases if lease[0] < seq), default=None)
            if holder is not None and holder[1].attempt > done.attempts:
                wrong.append(
                    f"fencing: attempt {done.attempts} of {identity} committed after lease {holder[1].attempt}"
                )
            if any(at > seq for at, _ in leases):
                wrong.append(f"fencing: {identity} was taken over after its outcome")
        for seq, tried in facts.tries.get(identity, []):
            if any(at < seq and lease.attempt > tried.attempt for at, lease in leases):
                wrong.append(f"fencing: attempt {tried.attempt} of {identity} failed after a newer lease")
    for identity, tries in facts.tries.items():
        done_at = min((seq for seq, _ in facts.dones.get(identity, [])), default=1 << 60)
        if any(seq > done_at for seq, _ in tries):
            wrong.append(f"fencing: an attempt of {identity} failed after its outcome")
    return wrong


def _joins(facts: Facts) -> list[str]:
    """Each slot counts once, with the outcome that filled it, and a join gets the results in order."""
    wrong = []
    outcome_at = {seq: done for several in facts.dones.values() for seq, done in several}
    for scope, tallies in facts.tallies.items():
        filled = [(index, seq) for _, tally in tallies for index, seq in tally.filled]
        twice = [index for index, n in Counter(index for index, _ in filled).items() if n > 1]
        if twice:
            wrong.append(f"doubled: the slots {twice} of {scope} were counted more than once")
        for index, seq in filled:
            if seq not in outcome_at:
                wrong.append(f"wrong: slot {index} of {scope} names {seq}, which is no outcome")
        for _, then in facts.works.get(invocation_id(scope, "then"), []):
            gathered = decode(then.payload.body, Gather)
            if gathered.outcomes != [seq for _, seq in sorted(filled)]:
                wrong.append(f"wrong: the join of {scope} gathers {gathered.outcomes} of {sorted(filled)}")
    return wrong


def _newest(facts: Facts) -> list[str]:
    """Of frames only the newest counts: nothing takes its place, and only a later one takes the place of others."""
    wrong = []
    for claims in facts.newest.values():
        places = {run: seq for seq, run in claims}
        if len(places) < len(claims):
            wrong.append(f"doubled: a frame was accepted twice: {claims}")
        for run, seq in places.items():
            by = facts.records[run][0].superseded_by
            if by is not None and places.get(by, 0) <= seq:
                wrong.append(f"lost: the frame {run} gave way to {by}, which is no later one: {claims}")
    return wrong


def _gave_way(facts: Facts, record: RunRecord) -> bool:
    """Say whether a run ended for a newer one before it had begun: none of its work has an outcome that counts."""
    if record.state != "canceled" or record.superseded_by is None or not facts.first[record.run_id].newest:
        return False
    first = facts.dones.get(facts.first[record.run_id].invocation_id, [])
    return all(seq > facts.cancels[record.run_id] for seq, _ in first)


def _runs(world: World, facts: Facts) -> list[str]:
    """Compare every run with what its program had to do."""
    wrong = []
    wanted: list[tuple[str, programs.Program, bool, bool]] = [
        (t.run, t.program, t.canceled, t.route == "late") for t in world.triggers if t.run in facts.first
    ]
    while wanted:
        run, program, canceled, late = wanted.pop()
        if program.variants:
            wrong += ladders.check(facts, run, program, canceled=canceled)
            continue
        expected = programs.expect(run, program)
        record, invocations = facts.records[run]
        done = {i for i, several in facts.dones.items() if several[0][1].run_id == run}
        known = {i for i, several in facts.works.items() if several[0][1].run_id == run}
        if known - expected.invocations:
            wrong.append(f"ghost: the run {run} has the invocations {sorted(known - expected.invocations)}")
        dropped = any(i.state == "canceled" for i in invocations)
        if record.state == "canceled" and (canceled or (late and dropped) or _gave_way(facts, record)):
            pass
        elif late and dropped and record.state == "failed":
            pass  # some of its branches were dropped because they were late, and the run says so
        elif record.state != ("failed" if expected.fails else "succeeded"):
            wrong.append(f"wrong: the run {run} {record.state}, with {record.error}")
        elif not expected.fails:
            if done != expected.invocations:
                wrong.append(f"lost: the run {run} misses outcomes of {sorted(expected.invocations - done)}")
            wrong += _answer(facts, record, expected)
        for event, emitted in expected.emits.items():
            emitter = event.rpartition("-")[0]
            started = programs.emitted_run(record.tenant, run, event)
            outcome = facts.dones.get(emitter)
            if outcome is not None and outcome[0][1].state == "succeeded":
                if started not in facts.first:
                    wrong.append(f"lost: {emitter} of {run} succeeded, and the event it emitted started nothing")
                else:
                    wanted.append((started, emitted, False, False))
                    at = facts.works[invocation_id(started, 0)][0][0]
                    if facts.cancels.get(run, at) < at:
                        wrong.append(f"fencing: {emitter} emitted an event after its run {run} was canceled")
            elif started in facts.first:
                wrong.append(f"ghost: {emitter} of {run} did not succeed, and the event it emitted started {started}")
    return wrong


def _answer(facts: Facts, record: RunRecord, expected: programs.Expected) -> list[str]:
    found = facts.dones.get(record.answer_id or "")
    if found is None:
        return [f"wrong: the run {record.run_id} succeeded without an answer"]
    outcome = found[0][1]
    payload = outcome.answer if record.explicit else outcome.result
    said = None if payload is None else int(payload.body)
    if expected.answer is not None and said != expected.answer:
        return [f"wrong: the run {record.run_id} answers {said} instead of {expected.answer}"]
    if expected.answers and (not record.explicit or said not in expected.answers):
        return [f"wrong: the run {record.run_id} answers {said}, which none of its functions gave"]
    return []


def _time_ledgers(world: World, facts: Facts) -> list[str]:
    """The parts of a time to solution sum to the whole, where all clocks are the same."""
    wrong = []
    for run, (record, _) in facts.records.items():
        if record.answered_at is None or world.nemesis.clocks_differ:
            continue
        whole_s, sum_s = record.answered_at - record.accepted_at, record.spent.total_s()
        if abs(whole_s - sum_s) > LEDGER_SHARE * whole_s + 1e-6:  # an instant in floating point is that coarse
            wrong.append(f"ledger: the run {run} took {whole_s:.6f} s, and {sum_s:.6f} s are told: {record.spent}")
        if min(structs.astuple(record.spent)) < 0.0:
            wrong.append(f"ledger: the run {run} has a negative part: {record.spent}")
    return wrong


def _dues(facts: Facts) -> list[str]:
    """Work has to be done by its run's deadline or before, and stands in the lane that goes by that."""
    wrong = []
    for identity, works in facts.works.items():
        for _, work in works:
            first = facts.first.get(work.run_id)
            if first is not None and first.on_late == "degrade" and work.deadline is None:
                continue  # it follows on an answer, and nothing presses it any more
            if first is not None and work.rung is None and work.deadline != first.deadline:
                wrong.append(f"wrong: {identity} has the deadline {work.deadline}, and its run {first.deadline}")
            if (work.due is None) != (work.deadline is None) and work.parent_id is not None:
                wrong.append(f"wrong: {identity} is due at {work.due}, with the deadline {work.deadline}")
            if work.due is not None and work.deadline is not None and work.due > work.deadline:
                wrong.append(f"wrong: {identity} is due after the deadline of its run")
    return wrong


def _ghosts(world: World, facts: Facts) -> list[str]:
    """What runs was asked for: by a sender, by a run that stands in the log; and what was done outside likewise."""
    sent = {t.run for t in world.triggers}
    emitted = {
        programs.emitted_run(done.tenant, done.run_id, f"{identity}-{position}")
        for identity, several in facts.dones.items()
        for _, done in several
        if done.state == "succeeded"
        for position in range(5)
    }
    wrong = [f"ghost: nobody asked for the run {run}" for run in facts.by_run if run not in sent | emitted]
    return wrong + [
        f"ghost: {effect.process} ran {effect.invocation} of {effect.run}, which is not in the log"
        for effect in world.effects
        if effect.run not in facts.first or effect.invocation not in facts.works
    ]


def _heard(world: World, facts: Facts) -> list[str]:
    log = world.server.log
    return [
        f"wrong: who waited for {run} heard of message {stored.seq}, which is another in the log"
        for run, stored in world.heard
        if (kept := log[stored.seq - 1]).subject != stored.subject or kept.body != stored.body
    ]


# ---------------------------------------------------------------- the read model


def _read_model(world: World, facts: Facts) -> list[str]:
    """Compare Redis with a fold of the log, key by key."""
    expected = read_model(facts.records) | histories(world.server.log)
    found = {k.decode(): v for k, v in world.redis.data.items() if k.decode() not in (POSITION, WHOLE, LAYOUT)}
    wrong = []
    for key in sorted(found.keys() | expected.keys()):
        has, wants = found.get(key, {}), expected.get(key, {})
        for field in sorted(has.keys() | wants.keys()):
            if has.get(field) != wants.get(field):
                told = f"{_shown(key, field, has)}, not {_shown(key, field, wants)}"
                wrong.append(f"wrong: the read model has in {key} {field.decode()}: {told}")
    return wrong


def histories(log: list[Kept]) -> dict[str, Any]:
    """Return the key of Redis that holds what was learned from the log."""
    lessons = Lessons()
    teach(lessons, [Stored(kept.seq, kept.subject, kept.body, kept.at) for kept in log])
    learned, _ = lessons.changed()
    return {FORECASTS: {name.encode(): raw for name, raw in learned.items()}} if learned else {}


def read_model(records: dict[str, tuple[RunRecord, list[InvocationRecord]]]) -> dict[str, Any]:
    """Return the keys of Redis that these runs make."""
    made: dict[str, Any] = {}

    def rank(key: str, member: str, score: int) -> None:
        made.setdefault(key, {})[member.encode()] = float(score)

    ended = 0
    for run, (record, invocations) in records.items():
        rows = {b"r": encode(record)} | {b"i:" + i.invocation_id.encode(): encode(i) for i in invocations}
        made[f"hr:run:{run}"] = rows
        tenant = record.tenant
        keys = [RUNS, runs_key(tenant), route_key(tenant, record.route), state_key(tenant, record.state)]
        for key in keys if record.ended else [*keys, OPEN, open_key(tenant, record.route)]:
            rank(key, run, record.first_seq)
        ended += record.ended
        for one in invocations:
            # What was given up on after its run was canceled bothers nobody.
            if one.state == "dead" and one.seq <= record.seq:
                for key in (dead_key(tenant), dead_left_key(tenant)):
                    rank(key, f"{run}.{one.invocation_id}", one.seq)
                made.setdefault(DEAD_RUNS, {})[one.invocation_id.encode()] = run.encode()
    if records:
        made[TOTALS] = {b"accepted": str(len(records)).encode()}
        if ended:
            made[TOTALS][b"ended"] = str(ended).encode()
    return made


def _shown(key: str, field: bytes, rows: dict[bytes, Any]) -> str:
    if field not in rows or not key.startswith("hr:run:"):
        return repr(rows.get(field))
    return repr(decode(rows[field], RunRecord if field == b"r" else InvocationRecord))
