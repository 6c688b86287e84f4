"""What is said at the door follows from what was learned, from what is ahead, and from the time that is left."""

from __future__ import annotations

import pytest
from msgspec import structs

from functions.outlook import Outlook
from functions.quotes import AHEAD_SPREAD, Demand, Part, Quoter, ahead_s, pace, quote, verdict
from headrace.model import FunctionOptions, Quote
from headrace.wire import Expected, ForecastRow, FunctionRecord

NOW = 1_000_000.0
ANSWER = Expected(2.0, 3.0, 4.0, 50)
WAIT = Expected(0.01, 0.05, 0.1, 50)
FUNCTION = FunctionRecord(name="f", version="v1", options=FunctionOptions(), code_blob="", registered_at=0.0)


def quoter(**kinds: Expected) -> Quoter:
    """Return one that knows these measures of the function, whatever its version and size."""
    row = ForecastRow(function="f", kinds={f"{measure}|||": found for measure, found in kinds.items()}, at=NOW)
    return Quoter(Outlook({"f": row}.get), lambda tenant, name: None)


def demand(ahead_s: float = 0.0, left_s: float | None = None) -> Demand:
    return Demand(100, ahead_s, None if left_s is None else NOW + left_s, NOW)


@pytest.mark.parametrize(
    ("left_s", "said"),
    [(3.0, "on_track"), (2.9, "at_risk"), (2.0, "at_risk"), (1.9, "infeasible"), (-1.0, "infeasible")],
)
def test_a_verdict_compares_both_quantiles_with_the_time_left(left_s: float, said: str) -> None:
    assert verdict(2.0, 3.0, left_s) == said
    assert quote(ANSWER, None, demand(left_s=left_s)).verdict == said


def test_without_a_deadline_nothing_can_be_missed() -> None:
    assert quote(ANSWER, WAIT, demand(100.0)).verdict == "on_track"


def test_without_history_nothing_is_known() -> None:
    assert quote(None, WAIT, demand(5.0, 1.0)) == Quote()
    assert quote(None, None, demand()).verdict == "unknown"


def test_a_deadline_that_has_passed_is_missed_whatever_is_known() -> None:
    assert quote(None, None, demand(left_s=0.0)) == Quote(verdict="infeasible")


def test_what_is_ahead_comes_on_top() -> None:
    alone, behind = quote(ANSWER, WAIT, demand()), quote(ANSWER, WAIT, demand(10.0))
    assert alone.p50_s == pytest.approx(2.01)
    assert behind.p50_s == pytest.approx(12.01)
    assert alone.p90_s is not None
    assert behind.p90_s is not None
    assert behind.p90_s - 12.01 == pytest.approx(((10 * AHEAD_SPREAD) ** 2 + 1.0**2 + 0.04**2) ** 0.5)


def test_the_worst_of_all_parts_is_not_expected_together() -> None:
    said = quote(ANSWER, Expected(1.0, 2.0, 3.0, 9), demand())
    assert said.p50_s == pytest.approx(3.0)
    assert said.p90_s is not None
    assert 4.0 < said.p90_s < 5.0


def test_a_quote_is_that_of_the_way_which_is_taken() -> None:
    found = quoter(answer=ANSWER, wait=WAIT)
    [choice] = found.plan(FUNCTION, demand(left_s=2.5))
    assert choice.chosen
    assert choice.quote == found.quote(FUNCTION, demand(left_s=2.5))
    assert choice.quote.verdict == "at_risk"


def test_where_a_variant_may_answer_the_quote_is_that_of_the_one_that_fits() -> None:
    full = structs.replace(FUNCTION, options=FunctionOptions(variants=["half", "quick", "gone"]))
    others = {n: structs.replace(FUNCTION, name=n) for n in ("half", "quick")}
    rows = {
        name: ForecastRow(
            function=name,
            kinds={
                "answer|||": Expected(p50, p50 * 1.1, p50 * 2, 50),
                "run|||": Expected(p50 * 0.9, p50, p50 * 2, 50),
            },
            at=NOW,
        )
        for name, p50 in (("f", 10.0), ("half", 4.0), ("quick", 1.0))
    }
    found = Quoter(Outlook(rows.get), lambda tenant, name: others.get(name))
    asked = structs.replace(demand(ahead_s=1.0, left_s=4.0), degrade=True)
    plan = found.plan(full, asked)
    assert [(c.function, c.chosen, c.quote.verdict) for c in plan] == [
        ("quick", True, "on_track"),
        ("f", False, "infeasible"),
        ("half", False, "infeasible"),
    ]
    assert "3 s are left" in plan[1].why
    assert found.quote(full, asked) == plan[0].quote
    assert [part.p50_s for part in found.parts(full, asked)] == [1.0, 0.9]
    # With time enough the function itself is taken, and so it is on a route that does not degrade.
    assert found.plan(full, structs.replace(asked, deadline=NOW + 60.0))[0].function == "f"
    assert found.quote(full, structs.replace(asked, degrade=False)).verdict == "infeasible"


def test_the_parts_are_those_that_are_known() -> None:
    found = quoter(answer=ANSWER, wait=WAIT, run=Expected(1.5, 2.0, 2.5, 50))
    assert found.parts(FUNCTION, demand(4.0)) == [
        Part("ahead", 4.0, 4.0 * (1 + AHEAD_SPREAD)),
        Part("wait", 0.01, 0.05),
        Part("run", 1.5, 2.0),
    ]
    assert quoter().parts(FUNCTION, demand()) == []


def test_what_was_learned_of_another_tenants_function_of_the_same_name_tells_nothing() -> None:
    other = structs.replace(FUNCTION, tenant="other")
    assert quoter(answer=ANSWER).quote(other, demand()).verdict == "unknown"


def test_the_first_function_is_due_before_what_follows_it() -> None:
    found = quoter(rest=Expected(1.0, 3.0, 5.0, 50))
    assert found.due(FUNCTION, 100, NOW + 10.0, NOW) == NOW + 7.0
    assert found.due(FUNCTION, 100, None, NOW) is None
    assert quoter().due(FUNCTION, 100, NOW + 10.0, NOW) == NOW + 10.0


# ---------------------------------------------------------------- what is ahead


def test_before_anything_has_ended_the_slots_tell_the_pace() -> None:
    assert pace(0, 0.0, 80.0) == 80.0


def test_what_was_seen_outweighs_what_was_expected() -> None:
    assert pace(2000, 100.0, 80.0) == pytest.approx(20.0, rel=0.05)
    assert 20.0 < pace(10, 0.5, 80.0) < 80.0


def test_while_a_slot_is_free_nothing_is_ahead() -> None:
    assert ahead_s(3, 4, 80.0, 0.0) == 0.0
    assert ahead_s(4, 4, 80.0, 0.0) == pytest.approx(1 / 80)
    assert ahead_s(803, 4, 80.0, 0.0) == pytest.approx(10.0)


def test_what_was_counted_a_while_ago_has_ended_in_part() -> None:
    assert ahead_s(803, 4, 80.0, 2.0) == pytest.approx(8.0)
    assert ahead_s(803, 4, 80.0, 3600.0) == 0.0


def test_a_function_needs_a_slot_for_its_mean_duration() -> None:
    knows = quoter(run=Expected(1.0, 1.0, 1.0, 50))
    assert knows.need_s("default", "f", "v1", 100) == 1.0
    assert knows.need_s("default", "g", "v1", 100) is None
