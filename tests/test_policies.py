"""The orders by name: what each takes first, and that workers are driven by the one that is simulated."""

from __future__ import annotations

import pytest

from functions.order import Order, Work
from functions.policies import POLICIES, policy, work_of
from headrace.errors import BadRequest
from infra.settings import BadSetting, Settings, load
from tests.simulation.world import Options, simulate
from tests.stories import trigger
from workers.worker import Tools, Worker


def work(identity: str, *, arrived: float, deadline: float | None = None, value: float = 1.0) -> Work:
    return Work(id=identity, tenant="a", arrived=arrived, deadline=deadline, p50_s=1.0, p90_s=1.0, value=value)


PIECES = (
    work("first", arrived=1.0, deadline=90.0),
    work("urgent", arrived=2.0, deadline=30.0),
    work("dear", arrived=3.0, deadline=60.0, value=9.0),
    work("patient", arrived=4.0),
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("headrace", ["urgent", "dear", "first", "patient"]),
        ("edf", ["urgent", "dear", "first", "patient"]),
        ("fifo", ["first", "urgent", "dear", "patient"]),
        ("priority", ["dear", "first", "urgent", "patient"]),
    ],
)
def test_each_order_takes_first_what_its_name_says(name: str, expected: list[str]) -> None:
    waiting = policy(name, 1)
    for piece in reversed(PIECES):
        assert waiting.add(piece, 5.0) is None
    assert len(waiting) == 4
    found = []
    while (chosen := waiting.take(5.0).start) is not None:
        found.append(chosen.id)
    assert found == expected


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_dropped_does_not_start_and_may_come_again(name: str) -> None:
    waiting = policy(name, 1)
    for place in range(500):
        waiting.add(work(str(place), arrived=float(place), deadline=900.0), 0.0)
    for place in range(1, 500):
        assert waiting.drop(str(place)) is not None
        assert waiting.drop(str(place)) is None
    waiting.add(work("7", arrived=600.0, deadline=900.0), 0.0)
    chosen = [waiting.take(0.0).start for _ in range(3)]
    assert [None if one is None else one.id for one in chosen] == ["0", "7", None]


def test_an_order_that_is_unknown_is_told_with_those_there_are() -> None:
    with pytest.raises(BadRequest, match="no order named lifo") as told:
        policy("lifo", 1)
    assert "headrace, edf, fifo, priority" in told.value.hint


def test_the_setting_takes_every_order_and_no_other() -> None:
    assert Settings().order == "headrace"
    for name in POLICIES:
        assert load({"HEADRACE_ORDER": name}).order == name
    with pytest.raises(BadSetting, match="HEADRACE_ORDER"):
        load({"HEADRACE_ORDER": "lifo"})


def test_a_worker_is_driven_by_the_order_that_is_simulated() -> None:
    made: list[Worker] = []

    def kept(tools: Tools) -> Worker:
        made.append(Worker(tools))
        return made[-1]

    assert simulate(3, Options(worker=kept)).wrong == []
    assert type(policy("headrace", 1)) is Order
    assert {type(worker._hand.waiting) for worker in made} == {Order}


def test_an_invocation_waits_by_its_own_due_instant_and_ends_by_the_runs_deadline() -> None:
    invocation = trigger("e", deadline=2000.0, on_late="cancel").invocation
    seen = work_of(invocation, identity="1", arrived=1000.5, run=(2.0, 3.0), path_s=4.0)
    assert (seen.deadline, seen.late_at, seen.if_late) == (2000.0, 2000.0, "cancel")
    assert (seen.p50_s, seen.p90_s, seen.path_s, seen.arrived, seen.subject) == (2.0, 3.0, 4.0, 1000.5, None)


def test_work_past_its_due_instant_is_given_up_only_when_the_run_is_late() -> None:
    order = Order(slots=1)
    piece = Work(id="1", tenant="a", arrived=0.0, deadline=5.0, late_at=9.0, if_late="cancel", p50_s=1.0, p90_s=1.0)
    order.add(piece, 0.0)
    order.add(Work(id="2", tenant="a", arrived=0.0, deadline=5.0, late_at=9.0, if_late="cancel"), 0.0)
    decision = order.take(7.0)
    assert (decision.start is not None, decision.give_up) == (True, ())
    assert len(order.take(9.5).give_up) == 1


def test_what_has_gone_leaves_nothing_behind_in_an_order() -> None:
    order = Order(slots=1)
    for place in range(20_000):
        late = place % 3
        order.add(
            Work(
                id=str(place),
                tenant="a",
                arrived=float(place),
                deadline=place + (0.4, 1.5, 1000.0)[late],
                p50_s=1.0,
                p90_s=1.0,
                if_late="cancel",
                late_at=place + 100_000.0,
            ),
            float(place),
        )
        order.drop(str(place))
    assert len(order) == 0
    assert len(order._put_off) + len(order._expiring) + sum(map(len, order._rest._of.values())) < 5000
