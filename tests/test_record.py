"""A run is what its facts fold into, and the same facts always fold into the same run."""

from __future__ import annotations

import pytest

from headrace.wire import NOTHING, Call, Cancel, encode
from streams.log import Record
from streams.record import RunRecord, fold_run, view
from streams.stored import Stored
from streams.topology import cancel_subject
from tests.stories import children, failure, stored, success, trigger


def fold(*units: list[Record], at: float = 1004.5) -> RunRecord:
    folded = fold_run(stored([record for unit in units for record in unit], at=at))
    assert folded is not None
    return folded[0]


def test_a_run_is_accepted_with_its_first_invocation() -> None:
    first = trigger("e", deadline=1060.0)
    record = fold([first.record])
    assert (record.state, record.deadline, record.deadline_met) == ("accepted", 1060.0, None)
    assert record.event.id == "e"


def test_a_run_that_answered_in_time_met_its_deadline_and_its_ledger_sums_to_the_whole() -> None:
    first = trigger("e", deadline=1060.0)
    record = fold([first.record], success(first.invocation))
    shown = view(record, [])
    assert (record.state, record.deadline_met) == ("succeeded", True)
    assert shown.time_to_solution_s == pytest.approx(4.5)
    assert shown.time_ledger.total_s() == pytest.approx(4.5)


def test_an_answer_after_the_deadline_missed_it() -> None:
    first = trigger("e", deadline=1002.0)
    assert fold([first.record], success(first.invocation)).deadline_met is False


def test_without_a_deadline_none_is_met_or_missed() -> None:
    first = trigger("e")
    assert fold([first.record], success(first.invocation)).deadline_met is None


def test_a_chain_is_running_until_its_last_outcome() -> None:
    first = trigger("e")
    unit = success(first.invocation, Call(function="g", payload=NOTHING))
    assert fold([first.record], unit).state == "running"
    (child,) = children(unit)
    record = fold([first.record], unit, success(child))
    assert (record.state, record.answer_id, record.invocations) == ("succeeded", child.invocation_id, 2)


def test_a_failed_run_tells_why_and_missed_its_deadline() -> None:
    first = trigger("e", deadline=1060.0)
    record = fold([first.record], failure(first.invocation, "no beam"))
    assert (record.state, record.deadline_met) == ("failed", False)
    assert record.error is not None
    assert record.error.message == "no beam"


def test_a_canceled_run_ignores_what_comes_later() -> None:
    first = trigger("e")
    cancel = Record(cancel_subject(first.invocation.run_id), encode(Cancel(run_id=first.invocation.run_id, at=1.0)))
    record = fold([first.record], [cancel], success(first.invocation))
    assert record.state == "canceled"
    assert record.answered_at is None


def test_a_fact_counts_once_however_often_it_is_applied() -> None:
    first = trigger("e")
    unit = success(first.invocation, Call(function="g", payload=NOTHING))
    facts = stored([first.record, *unit])
    once, twice = fold_run(facts), fold_run(sorted([*facts, *facts], key=lambda s: s.seq))
    assert once == twice


def test_facts_without_their_beginning_are_no_run() -> None:
    first = trigger("e")
    assert fold_run(stored(success(first.invocation))) is None


def test_notes_do_not_change_a_run() -> None:
    first = trigger("e")
    note = Stored(2, f"hr.note.{first.invocation.run_id}.x", b"not even readable", 1.0)
    assert fold_run([*stored([first.record]), note]) == fold_run(stored([first.record]))


def test_a_message_that_cannot_be_read_does_not_hold_up_the_next() -> None:
    first = trigger("e")
    run = first.invocation.run_id
    damaged = Record(f"hr.done.{run}.x", b"\xc1 not a message")
    assert fold([first.record], [damaged], success(first.invocation)).state == "succeeded"
