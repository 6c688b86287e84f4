"""What an outcome starts: pure, so every case is a few lines."""

from __future__ import annotations

import pytest
from msgspec import structs

from functions import effects, outcomes
from functions.outcomes import Attempted
from headrace.errors import UserError
from headrace.model import ErrorInfo, EventFilter, FunctionOptions, Route
from headrace.wire import (
    NOTHING,
    SPREADER,
    Call,
    Effect,
    Emit,
    FunctionRecord,
    Invocation,
    Map,
    Outcome,
    Payload,
    RouteRecord,
    Slot,
    Spread,
    decode,
)
from streams.log import Record

KNOWN = {
    name: FunctionRecord(name=name, version="v1", options=FunctionOptions(), code_blob="b", registered_at=0.0)
    for name in ("a", "b", "join")
}
ROUTES = [RouteRecord(name="peaks", tenant="default", route=Route(function="b", filter=EventFilter(type="org.peak")))]
TRIED = Attempted(attempt=1, worker="w", queued_at=101.0, started_at=102.0, ended_at=105.0)
ROOT = Invocation(
    run_id="r",
    invocation_id="root",
    function="a",
    version="v1",
    route="a",
    tenant="default",
    payload=NOTHING,
    accepted_at=100.0,
    sent_at=100.0,
    deadline=160.0,
)

WORLD = outcomes.World(function=KNOWN.get, routes=ROUTES, now=105.0)


def succeed(
    *asked: Effect, of: Invocation = ROOT, kept: dict[int, Payload] | None = None
) -> tuple[Outcome, list[Record]]:
    return effects.succeed(of, TRIED, result=NOTHING, answer=None, effects=list(asked), kept=kept or {}, world=WORLD)


def work(records: list[Record]) -> list[Invocation]:
    return [decode(r.body, Invocation) for r in records if r.subject.startswith("hr.work.")]


def test_an_invocation_without_effects_ends_its_run() -> None:
    outcome, records = succeed()
    assert outcome.end is not None
    assert (outcome.end.state, outcome.end.answer_id) == ("succeeded", "root")
    assert [r.subject for r in records] == ["hr.done.r.root"]


def test_the_outcome_is_guarded_and_stands_last() -> None:
    _, records = succeed(Call(function="b", payload=NOTHING))
    assert [r.absent for r in records] == [None, "hr.*.r.root"]


def test_one_call_goes_on_in_the_slot_of_its_parent() -> None:
    slot = Slot(scope="s", index=3, size=9)
    outcome, records = succeed(Call(function="b", payload=NOTHING), of=structs.replace(ROOT, slot=slot))
    (child,) = work(records)
    assert child.slot == slot
    assert outcome.slot is None
    assert outcome.end is None


def test_two_calls_share_a_scope_inside_the_slot_of_their_parent() -> None:
    _, records = succeed(Call(function="b", payload=NOTHING), Call(function="a", payload=NOTHING))
    slots = [child.slot for child in work(records)]
    assert [(s.index, s.size, s.then, s.parent) for s in slots if s] == [(0, 2, None, None), (1, 2, None, None)]
    assert len({s.scope for s in slots if s}) == 1


def test_a_map_starts_one_member_per_payload_and_names_what_follows() -> None:
    outcome, records = succeed(Map(function="b", payloads=[NOTHING] * 3, then="join"))
    members = work(records)
    assert [m.slot.index for m in members if m.slot] == [0, 1, 2]
    assert all(m.slot and m.slot.then == "join" and m.slot.size == 3 for m in members)
    assert outcome.children == 3
    assert outcome.end is None


def test_a_map_of_nothing_goes_straight_to_its_join_with_an_empty_list() -> None:
    _, records = succeed(Map(function="b", payloads=[], then="join"))
    (joined,) = work(records)
    assert (joined.function, joined.payload.body, joined.slot) == ("join", b"[]", None)


def test_a_map_of_nothing_without_a_join_is_no_branch() -> None:
    outcome, records = succeed(Map(function="b", payloads=[]))
    assert work(records) == []
    assert outcome.end is not None


def test_a_large_map_travels_by_claim_check_and_is_spread_in_parts() -> None:
    large = Map(function="b", payloads=[NOTHING] * 1000, then="join")
    assert list(effects.large_maps([large])) == [0]
    outcome, records = succeed(large, kept={0: Payload(blob="digest", size=9)})
    parts = work(records)
    assert {p.function for p in parts} == {SPREADER}
    assert all(p.slot is None for p in parts)
    spans = [(s.first, s.last) for s in (decode(p.payload.body, Spread) for p in parts)]
    assert spans == [(0, 256), (256, 512), (512, 768), (768, 1000)]
    assert outcome.slot is None


def test_a_part_of_a_large_map_starts_its_members_and_fills_no_slot() -> None:
    slot = Slot(scope="s", index=0, size=1000, then="join", then_version="v1", opened_by="root")
    part = Spread(function="b", version="v1", payloads=NOTHING, slot=slot, first=256, last=258)
    payloads = [Payload(body=b"%d" % n, size=3) for n in range(1000)]
    records = effects.spread(structs.replace(ROOT, function=SPREADER), TRIED, part, payloads, WORLD)
    assert [(m.slot.index, m.payload.body, m.parent_id) for m in work(records) if m.slot] == [
        (256, b"256", "root"),
        (257, b"257", "root"),
    ]
    done = decode(records[-1].body, Outcome)
    assert (done.slot, done.end, done.children) == (None, None, 2)


def test_a_repeat_gives_the_same_ids() -> None:
    asked = (Call(function="b", payload=NOTHING), Map(function="a", payloads=[NOTHING] * 4, then="join"))
    first, second = succeed(*asked)[1], succeed(*asked)[1]
    assert [r.subject for r in first] == [r.subject for r in second]
    assert len({r.subject for r in first}) == len(first)


def test_an_effect_on_an_unknown_function_is_the_users_error_and_says_the_cure() -> None:
    with pytest.raises(UserError, match="no function named nowhere") as caught:
        succeed(Call(function="nowhere", payload=NOTHING))
    assert "Deploy" in caught.value.hint
    assert caught.value.retry is False


def test_a_delayed_call_is_not_due_before_its_time() -> None:
    _, records = succeed(Call(function="b", payload=NOTHING, delay_s=30.0))
    assert work(records)[0].not_before == 135.0


def test_an_emitted_event_starts_a_run_on_each_route_that_takes_it() -> None:
    outcome, records = succeed(Emit(type="org.peak", payload=NOTHING))
    (started,) = work(records)
    assert (started.route, started.function, started.parent_id) == ("peaks", "b", None)
    assert started.run_id != "r"
    assert outcome.end is not None  # a run of its own does not keep this one open
    assert work(succeed(Emit(type="org.other", payload=NOTHING))[1]) == []


def test_a_chain_without_end_is_stopped_with_a_clear_error() -> None:
    with pytest.raises(UserError, match="1,000 calls long"):
        succeed(Call(function="b", payload=NOTHING), of=structs.replace(ROOT, depth=1000))


def test_a_failed_invocation_ends_a_run_without_branches_and_fills_its_slot_otherwise() -> None:
    error = ErrorInfo(kind="user", message="no")
    outcome, _ = outcomes.fail(ROOT, TRIED, error)
    assert outcome.end is not None
    assert (outcome.state, outcome.end.state, outcome.end.error) == ("dead", "failed", error)
    slot = Slot(scope="s", index=0, size=2)
    outcome, _ = outcomes.fail(structs.replace(ROOT, slot=slot), TRIED, error)
    assert outcome.end is None
    assert outcome.slot == slot


def test_the_parts_of_the_time_ledger_sum_to_the_whole() -> None:
    first = outcomes.spent(ROOT, TRIED)
    assert (first.gateway_s, first.lane_s, first.run_s) == (1.0, 1.0, 3.0)
    child = structs.replace(ROOT, parent_id="root", sent_at=105.0, spent=first)
    later = Attempted(attempt=1, worker="w", queued_at=105.5, started_at=107.0, ended_at=110.0)
    whole = outcomes.spent(child, later)
    assert whole.commit_s == 0.5
    assert whole.total_s() == pytest.approx(110.0 - ROOT.accepted_at)
