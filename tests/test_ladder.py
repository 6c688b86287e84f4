"""Which rung runs in the time that is left, when a cheaper one has to begin, and what becomes of the run."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from functions import ladder, rungs
from functions.effects import succeed
from functions.ladder import RESCUE_MARGIN_S, Choice, Rescue
from functions.lessons import Lessons
from functions.outcomes import Attempted, World, fail
from functions.outlook import Outlook
from functions.rungs import Family
from headrace.errors import UserError
from headrace.model import ErrorInfo, Fidelity, FunctionOptions, TimeLedger
from headrace.names import invocation_id
from headrace.wire import (
    NOTHING,
    Call,
    Emit,
    Expected,
    ForecastRow,
    FunctionRecord,
    Invocation,
    Outcome,
    Payload,
    RunEnd,
    Slot,
    Step,
    decode,
    encode,
)
from streams.log import Record
from streams.record import RunRecord, apply, fold_run, view
from streams.stored import Stored
from streams.topology import LANES, kind_of

OPTIONS = FunctionOptions(timeout="20s", variants=["half", "quick"])
FULL = FunctionRecord(name="full", version="f1", options=OPTIONS, code_blob="", registered_at=0.0)
OTHERS = {
    name: FunctionRecord(name=name, version=f"{name}1", options=FunctionOptions(), code_blob="", registered_at=0.0)
    for name in ("half", "quick")
}
FIRST = Invocation(
    run_id="r",
    invocation_id="i",
    function="full",
    version="f1",
    route="main",
    tenant="default",
    payload=Payload(body=b"1", size=1),
    accepted_at=100.0,
    sent_at=100.0,
    deadline=160.0,
    on_late="degrade",
)
ASKED = rungs.placed(FIRST, FULL)
TRIED = Attempted(attempt=1, worker="w", queued_at=100.5, started_at=101.0, ended_at=102.0)
BROKEN = ErrorInfo(kind="user", message="broken")


def choice(level: int, p90_s: float | None = None, timeout_s: float = 60.0) -> Choice:
    """A rung of this level."""
    name = ("full", "half", "quick")[level]
    return Choice(level=level, function=name, version="1", timeout_s=timeout_s, p90_s=p90_s, observations=20)


THREE = [choice(0, 40.0), choice(1, 10.0), choice(2, 1.0)]


# ---------------------------------------------------------------- the planner


@pytest.mark.parametrize(
    ("left_s", "level"), [(100.0, 0), (40.0, 0), (39.9, 1), (10.0, 1), (9.9, 2), (1.0, 2), (0.5, 2), (-5.0, 2)]
)
def test_the_best_rung_that_fits_is_taken(left_s: float, level: int) -> None:
    assert ladder.pick(THREE, left_s).choice.level == level


def test_each_better_rung_has_the_reason_why_it_was_not_taken() -> None:
    chosen = ladder.pick(THREE, 5.0)
    assert chosen.fits
    assert [each.function for each in chosen.rejected] == ["full", "half"]
    assert chosen.rejected[1].why == "half takes 10 s (9 in 10 of 20), and 5 s are left"
    late = ladder.pick(THREE, 0.2)
    assert not late.fits
    assert [each.level for each in late.rejected] == [0, 1]


def test_what_was_never_seen_is_not_degraded_while_there_is_time() -> None:
    unknown = [choice(0), choice(1), choice(2)]
    assert ladder.pick(unknown, 0.1).choice.level == 0
    assert ladder.pick(unknown, -0.1).choice.level == 2
    assert ladder.pick([choice(0, 40.0), choice(1), choice(2, 1.0)], 20.0).choice.level == 1


def test_where_nothing_fits_the_quickest_is_taken() -> None:
    odd = [choice(0, 40.0), choice(1, 2.0), choice(2, 5.0)]
    assert ladder.pick(odd, 1.0).choice.level == 1


def test_a_rescue_begins_when_its_own_time_is_left() -> None:
    assert ladder.rescue(THREE[1:], 160.0, 100.0) == Rescue(choice=THREE[1], at=150.0 - RESCUE_MARGIN_S)
    assert ladder.rescue(THREE[1:], 160.0, 155.0) == Rescue(choice=THREE[2], at=159.0 - RESCUE_MARGIN_S)
    assert ladder.rescue(THREE[1:], 160.0, 159.5) == Rescue(choice=THREE[2], at=159.5)
    assert ladder.rescue([], 160.0, 100.0) is None


def test_a_rescue_waits_in_the_lane_as_long_as_such_work_waits() -> None:
    waits = structs.replace(THREE[1], wait_s=2.0)
    assert ladder.rescue([waits], 160.0, 100.0) == Rescue(choice=waits, at=148.0 - RESCUE_MARGIN_S)


def test_a_rescue_that_was_never_seen_gets_half_the_time_or_its_timeout() -> None:
    found = ladder.rescue([choice(1)], 160.0, 120.0)
    assert found is not None
    assert found.at == 140.0
    short = ladder.rescue([choice(1, timeout_s=5.0)], 160.0, 120.0)
    assert short is not None
    assert short.at == 155.0 - RESCUE_MARGIN_S


def test_rungs_know_what_was_learned_of_their_own_function() -> None:
    kinds = {"answer|||": Expected(1.0, 2.0, 3.0, 9), "wait|||": Expected(0.1, 0.2, 0.3, 9)}
    rows = {
        "half": ForecastRow(function="half", kinds=kinds, at=0.0),
        "full": ForecastRow(function="full", kinds={"run|||": Expected(4.0, 5.0, 6.0, 9)}, at=0.0),
    }
    found = ladder.choices(FULL, OTHERS.get, Outlook(rows.get), size=0)
    assert [(each.level, each.function, each.p90_s, each.wait_s) for each in found] == [
        (0, "full", 5.0, 0.0),
        (1, "half", 2.0, 0.2),
        (2, "quick", None, 0.0),
    ]


def test_a_variant_that_is_not_registered_any_more_is_left_out() -> None:
    only = {"quick": OTHERS["quick"]}
    assert [each.level for each in ladder.choices(FULL, only.get, Outlook(lambda _: None), size=0)] == [0, 2]


# ---------------------------------------------------------------- what goes into the log


def done(invocation: Invocation, effects: list[Any] | None = None, **given: Any) -> tuple[Outcome, list[Record]]:
    """What a successful attempt appends."""
    given = {"result": NOTHING, "answer": None, "kept": {}} | given
    world = World(function=(OTHERS | {"full": FULL}).get, routes=[], now=102.0)
    return succeed(invocation, TRIED, effects=effects or [], world=world, **given)


def rescue_of(invocation: Invocation, level: int, at: float = 150.0) -> tuple[Invocation, Record]:
    """A rescue as it stands in the log."""
    record = rungs.put(invocation, Rescue(choice=THREE[level], at=at), TimeLedger(), 102.0, 102.0)
    return decode(record.body, Invocation), record


def test_the_full_function_ends_its_run_as_any_other_does() -> None:
    outcome, records = done(ASKED)
    assert outcome.fidelity == Fidelity(level=0, function="full", of=3)
    assert outcome.end is not None
    assert outcome.answer is None
    assert len(records) == 1


def test_a_variant_that_was_taken_at_once_answers_and_the_full_one_follows_without_a_deadline() -> None:
    outcome, records = done(rungs.taken(ASKED, 1, "half", "half1"), result=Payload(body=b"7", size=1))
    assert outcome.fidelity == Fidelity(level=1, function="half", of=3)
    assert (outcome.end, outcome.answer, outcome.children) == (None, Payload(body=b"7", size=1), 1)
    full = decode(records[0].body, Invocation)
    assert records[0].subject.startswith(f"hr.work.{LANES - 1}.")
    assert (full.function, full.version, full.deadline, full.payload) == ("full", "f1", None, FIRST.payload)
    better, _ = done(full)
    assert better.end is not None
    assert better.fidelity == Fidelity(level=0, function="full", of=3)


def test_a_variant_that_leaves_the_answer_to_follow_ups_is_followed_by_them_alone() -> None:
    outcome, records = done(rungs.taken(ASKED, 1, "half", "half1"), [Call(function="quick", payload=NOTHING)])
    assert outcome.answer is None
    assert [decode(each.body, Invocation).function for each in records[:-1]] == ["quick"]


def test_a_branch_of_a_map_takes_a_rung_and_nothing_follows() -> None:
    inside = structs.replace(ASKED, slot=Slot(scope="s", index=0, size=2))
    outcome, records = done(rungs.taken(inside, 2, "quick", "quick1"))
    assert (outcome.answer, outcome.end, len(records)) == (None, None, 1)
    assert outcome.slot == inside.slot
    assert not rungs.watched(inside)


def test_a_rescue_answers_and_does_nothing_else() -> None:
    rescue, record = rescue_of(ASKED, 1)
    assert record.absent == f"hr.work.*.default.r.{rungs.rung_id('i', 1)}"
    assert (rescue.parent_id, rescue.not_before, rescue.function) == ("i", 150.0, "half")
    outcome, records = done(rescue, [Emit(type="t", payload=NOTHING)], result=Payload(body=b"7", size=1))
    assert (outcome.end, outcome.answer, outcome.slot) == (None, Payload(body=b"7", size=1), None)
    assert len(records) == 1
    with pytest.raises(UserError, match="leaves the answer to follow-ups"):
        done(rescue, [Call(function="quick", payload=NOTHING)])


def full_after(asked: Invocation) -> Invocation:
    """The full one that follows on this one, which has answered."""
    return decode(done(asked)[1][0].body, Invocation)


def test_nobody_on_a_ladder_ends_its_run_by_failing() -> None:
    half = rungs.taken(ASKED, 1, "half", "half1")
    for each in (ASKED, half, rescue_of(ASKED, 1)[0], full_after(half)):
        assert fail(each, TRIED, BROKEN)[0].end is None
    inside = structs.replace(ASKED, slot=Slot(scope="s", index=0, size=2))
    assert fail(inside, TRIED, BROKEN)[0].slot is not None


def step(
    asked: Outcome | None = None,
    rescues: dict[int, Outcome] | None = None,
    begun: tuple[int, ...] = (),
    full: Outcome | None = None,
    *,
    full_begun: bool = False,
) -> Any:
    """What follows from what is there of a ladder of three rungs."""
    family = Family(
        of=3,
        asked=asked,
        rescues=rescues or {},
        begun=frozenset(begun),
        full=full,
        full_begun=full_begun or full is not None,
    )
    found = rungs.next_step(family)
    return (found.state, found.answer_id, found.error) if isinstance(found, RunEnd) else found


def test_whoever_comes_last_ends_the_run() -> None:
    asked = fail(ASKED, TRIED, BROKEN)[0]
    good = done(rescue_of(ASKED, 1)[0])[0]
    bad = fail(rescue_of(ASKED, 1)[0], TRIED, BROKEN)[0]
    lower = done(rescue_of(ASKED, 2)[0])[0]
    assert step() is None
    assert step(done(ASKED)[0], {1: bad}, (1,)) is None
    assert step(asked, begun=(1,)) is None  # it may answer yet
    assert step(None, {1: good}, (1,)) is None  # the full one may end well yet
    assert step(asked) == 1
    assert step(None, {1: bad}, (1,)) == 2
    assert step(asked, {1: bad}, (1,)) == 2
    assert step(asked, {1: good, 2: lower}, (1, 2)) == ("succeeded", rungs.rung_id("i", 1), BROKEN)
    assert step(asked, {1: bad, 2: bad}, (1, 2)) == ("failed", None, BROKEN)


def test_the_full_one_is_tried_where_all_else_has_failed() -> None:
    half, quick = rungs.taken(ASKED, 1, "half", "half1"), rungs.taken(ASKED, 2, "quick", "quick1")
    bad, worse = fail(half, TRIED, BROKEN)[0], fail(quick, TRIED, BROKEN)[0]
    lower = done(rescue_of(ASKED, 2)[0])[0]
    assert step(bad) == 2
    assert step(bad, {2: lower}, (2,)) == ("succeeded", rungs.rung_id("i", 2), BROKEN)
    assert step(worse) == "full"
    assert step(worse, full_begun=True) is None
    record = rungs.put_full(quick, TimeLedger(), 102.0, 102.0)
    full = decode(record.body, Invocation)
    assert record.absent == f"hr.work.*.default.r.{rungs.full_id('i')}"
    assert (full.function, full.version, full.deadline, full.parent_id) == ("full", "f1", None, "i")
    assert done(full)[0].end is not None
    assert step(worse, full=done(full)[0]) is None
    assert step(worse, full=fail(full, TRIED, BROKEN)[0]) == ("failed", None, BROKEN)


def test_a_run_whose_full_function_fails_after_a_variant_keeps_its_answer() -> None:
    half = rungs.taken(ASKED, 1, "half", "half1")
    began, failed = done(half), fail(full_after(half), TRIED, BROKEN)
    end = rungs.next_step(Family(of=3, asked=began[0], full=failed[0], full_begun=True))
    assert isinstance(end, RunEnd)
    now = folded(*began[1], failed[1][-1], rungs.end_record(end))
    assert (now.state, now.error, now.answer_id, now.explicit) == ("succeeded", BROKEN, "i", True)
    assert now.fidelity == Fidelity(level=1, function="half", of=3)
    assert now.invocations == 2


# ---------------------------------------------------------------- what a run comes to


def folded(*records: Record) -> RunRecord:
    """The run as these records tell it, one second apart."""
    first = Record("hr.work.5.default.r.i", encode(FIRST))
    facts = [Stored(seq, each.subject, each.body, 100.0 + seq) for seq, each in enumerate((first, *records), 1)]
    found = fold_run(each for each in facts if kind_of(each.subject) in ("work", "done", "end"))
    assert found is not None
    return found[0]


def test_a_better_answer_takes_the_place_of_a_worse_one_and_the_time_is_that_of_the_first() -> None:
    rescue, put = rescue_of(ASKED, 1)
    now = folded(put, done(rescue)[1][-1])
    assert now.state == "running"
    assert now.improving
    assert (now.answer_id, now.explicit, now.answered_at) == (rescue.invocation_id, True, 103.0)
    assert now.invocations == 2
    then = folded(put, done(rescue)[1][-1], done(ASKED)[1][-1])
    assert (then.state, then.answer_id, then.explicit, then.answered_at) == ("succeeded", "i", False, 103.0)
    assert then.fidelity == Fidelity(level=0, function="full", of=3)
    shown = view(then, [])
    assert [each.fidelity.level for each in shown.answers] == [1, 0]
    assert [each.in_time for each in shown.answers] == [True, True]
    assert shown.answers[0].links.successor_version == "/v1/runs/r/result?level=0"
    assert shown.answers[1].links.predecessor_version == "/v1/runs/r/result?level=1"
    assert shown.answers[0].links.predecessor_version is None


def test_a_worse_answer_after_a_better_one_changes_nothing() -> None:
    better, worse = rescue_of(ASKED, 1), rescue_of(ASKED, 2)
    now = folded(better[1], worse[1], done(better[0])[1][-1], done(worse[0])[1][-1])
    assert (now.answer_id, [each.fidelity.level for each in now.answers]) == (better[0].invocation_id, [1])


def test_a_rescue_put_by_a_clock_that_is_behind_waits_no_longer_than_a_whole_run() -> None:
    behind_s = 2500.0
    record = rungs.put(ASKED, Rescue(choice=THREE[1], at=150.0), TimeLedger(), 102.0, 102.0 - behind_s)
    rescue = decode(record.body, Invocation)
    assert ASKED.deadline is not None
    assert rescue.not_before - rescue.sent_at == pytest.approx(ASKED.deadline - ASKED.accepted_at)


def test_a_run_whose_full_function_fails_after_a_rescue_has_succeeded_and_says_why_there_is_no_better_answer() -> None:
    rescue, put = rescue_of(ASKED, 1)
    answered, failed = done(rescue), fail(ASKED, TRIED, BROKEN)
    end = rungs.next_step(Family(of=3, asked=failed[0], rescues={1: answered[0]}, begun=frozenset({1})))
    assert isinstance(end, RunEnd)
    now = folded(put, answered[1][-1], failed[1][-1], rungs.end_record(end))
    assert (now.state, now.error, now.answer_id) == ("succeeded", BROKEN, rescue.invocation_id)
    assert (now.answered_at, now.deadline_met, now.fidelity and now.fidelity.level) == (103.0, True, 1)


def test_what_a_chain_of_the_full_function_fails_with_does_not_take_the_answer_of_a_rescue() -> None:
    rescue, put = rescue_of(ASKED, 1)
    began = done(ASKED, [Call(function="quick", payload=NOTHING)])
    child = decode(began[1][0].body, Invocation)
    good = folded(put, *began[1], done(rescue)[1][-1], done(child)[1][-1])
    assert (good.state, good.answer_id, good.fidelity and good.fidelity.level) == ("succeeded", child.invocation_id, 0)
    bad = folded(put, *began[1], done(rescue)[1][-1], fail(child, TRIED, BROKEN)[1][-1])
    assert (bad.state, bad.answer_id, bad.error) == ("succeeded", rescue.invocation_id, BROKEN)


def test_an_answer_is_no_better_than_what_it_is_made_of() -> None:
    began = done(rungs.taken(ASKED, 2, "quick", "quick1"), [Call(function="half", payload=NOTHING)])
    child = decode(began[1][0].body, Invocation)
    now = folded(*began[1], done(child)[1][-1])
    assert (now.state, now.answer_id) == ("succeeded", child.invocation_id)
    assert now.fidelity == Fidelity(level=2, function="quick", of=3)


def test_the_ids_of_rescues_follow_from_the_one_that_was_asked_for() -> None:
    first = rescue_of(ASKED, 1)[0]
    assert rescue_of(first, 2)[0].invocation_id == invocation_id("i", "rung-2")
    assert not rungs.rescues(ASKED)
    assert rungs.rescues(first)


def test_every_rung_teaches_how_long_its_own_answer_takes_and_no_other() -> None:
    before = Step("first", "1", 0, 100.2, 100.4)
    asked = structs.replace(ASKED, trail=[before])
    rescue = decode(rungs.put(asked, Rescue(choice=THREE[1], at=150.0), TimeLedger(), 102.0, 102.0).body, Invocation)
    records = [done(rescue)[1][-1], done(asked)[1][-1]]
    learned = Lessons()
    run: RunRecord | None = fold_first(FIRST)
    for seq, record in enumerate(records, 2):
        stored = Stored(seq, record.subject, record.body, 100.0 + 10.0 * seq)
        outcome = decode(record.body, Outcome)
        after = apply(run, outcome, stored)
        learned.learn(outcome, stored, run, after)
        run = after
    rows = [learned.tell(name, 200.0, None) for name in ("first", "half", "full")]
    answers = {row.function: row.kinds["answer|||"].p50_s for row in rows if row is not None}
    assert answers == {"first": pytest.approx(19.8), "half": pytest.approx(19.0), "full": pytest.approx(29.0)}


def fold_first(first: Invocation) -> RunRecord | None:
    """A run of which only the first invocation is known."""
    return apply(None, first, Stored(1, "hr.work.5.default.r.i", encode(first), 100.0))
