"""Branches that end together: the count is in the log, and each slot counts once."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from functions.scopes import Fill, Scope, tally, upward
from headrace.joblog import JOB
from headrace.model import ErrorInfo
from headrace.names import invocation_id
from headrace.wire import Gather, Invocation, Outcome, RunEnd, Slot, decode
from streams.log import Record

OUTCOME = Outcome(
    run_id="r",
    invocation_id="i",
    function="f",
    version="v",
    route="f",
    tenant="default",
    state="succeeded",
    attempts=1,
    queued_at=1.0,
    started_at=2.0,
    ended_at=3.0,
    worker="w",
    accepted_at=0.0,
)


def fill(
    index: int, *, size: int = 2, seq: int = 0, then: str | None = "join", failed: bool = False, **slot: Any
) -> Fill:
    place = Slot(scope="s", index=index, size=size, then=then, then_version="v", opened_by="root", **slot)
    error = ErrorInfo(kind="user", message="broken") if failed else None
    return Fill(slot=place, outcome=OUTCOME, seq=seq or 10 + index, at=4.0, failed=failed, error=error)


def count(scope: Scope, *fills: Fill, seq: int = 100) -> list[Record]:
    made = tally(scope, list(fills), 5.0)
    assert made is not None
    scope.take(made[0], seq)
    return made[1]


def test_a_tally_is_guarded_by_the_one_before_it() -> None:
    scope = Scope(size=3)
    assert [(r.absent, r.expected) for r in count(scope, fill(0, size=3), seq=100)] == [("hr.tally.r.s", 0)]
    assert [(r.absent, r.expected) for r in count(scope, fill(1, size=3), seq=101)] == [("hr.tally.r.s", 100)]


def test_the_tally_that_fills_the_scope_starts_the_join_with_all_outcomes_in_order() -> None:
    scope = Scope(size=3)
    count(scope, fill(2, size=3, seq=7))
    records = count(scope, fill(0, size=3, seq=9), fill(1, size=3, seq=8))
    joined = decode(records[0].body, Invocation)
    assert decode(joined.payload.body, Gather).outcomes == [9, 8, 7]
    assert (joined.function, joined.parent_id, joined.slot) == ("join", "root", None)
    assert records[-1].subject == "hr.tally.r.s"


def test_the_join_keeps_what_the_route_said_about_being_late() -> None:
    scope = Scope(size=1)
    records = count(scope, fill(0, size=1, on_late="cancel"))
    assert decode(records[0].body, Invocation).on_late == "cancel"


def test_a_slot_counts_once_however_often_it_is_reported() -> None:
    scope = Scope(size=2)
    count(scope, fill(0))
    assert tally(scope, [fill(0), fill(0)], 5.0) is None
    assert not scope.full


def test_a_full_scope_with_a_join_leads_no_further_until_the_join_has_ended() -> None:
    scope = Scope(size=1)
    count(scope, fill(0, size=1))
    assert upward(scope, fill(0, size=1)) is None


def test_a_full_scope_without_a_join_ends_the_run() -> None:
    scope = Scope(size=2)
    count(scope, fill(0, then=None), fill(1, then=None))
    step = upward(scope, fill(1, then=None))
    assert isinstance(step, Record)
    assert step.absent == step.subject == "hr.end.r"
    assert decode(step.body, RunEnd).state == "succeeded"


def test_a_full_scope_fills_the_slot_around_it() -> None:
    around = Slot(scope="outer", index=4, size=9)
    scope = Scope(size=1)
    last = fill(0, size=1, then=None, parent=around)
    count(scope, last)
    step = upward(scope, last)
    assert isinstance(step, Fill)
    assert (step.slot, step.failed) == (around, False)


def test_a_failed_member_fails_the_run_instead_of_starting_the_join() -> None:
    scope = Scope(size=2)
    count(scope, fill(0, failed=True))
    records = count(scope, fill(1))
    assert [r.subject for r in records] == ["hr.tally.r.s"]
    step = upward(scope, fill(1))
    assert isinstance(step, Record)
    ended = decode(step.body, RunEnd)
    assert ended.state == "failed"
    assert ended.error is not None
    assert ended.error.message == "1 of 2 branches failed; the first: user: broken"


def test_of_jobs_that_were_submitted_together_it_is_told_as_of_jobs() -> None:
    scope = Scope(size=3)
    lost = [fill(index, size=3, failed=index == 0) for index in range(3)]
    count(scope, *lost)
    made = structs.replace(OUTCOME, function=JOB, invocation_id=invocation_id("s", 2))
    step = upward(scope, structs.replace(lost[2], outcome=made))
    assert isinstance(step, Record)
    error = decode(step.body, RunEnd).error
    assert error is not None
    assert (error.kind, error.message) == ("jobs", "1 of 3 jobs failed; the first: user: broken")
    alone = structs.replace(
        made, invocation_id=invocation_id("root", 2)
    )  # one of several things that a function asked for
    step = upward(scope, structs.replace(lost[2], outcome=alone))
    assert isinstance(step, Record)
    assert "branches" in str(decode(step.body, RunEnd).error)


def test_a_scope_that_is_not_full_leads_nowhere() -> None:
    scope = Scope(size=2)
    count(scope, fill(0, then=None))
    assert upward(scope, fill(0, then=None)) is None
