"""Simulated time: when work comes, waits, runs and ends, and that the same input gives the same ends."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple, cast

import msgspec
import pytest
from msgspec import structs

from functions.busy import Busy
from functions.forecast import Forecasts, Kind
from functions.order import Decision, Order, Work
from functions.policies import POLICIES, policy
from functions.simulate import End, Piece, simulate
from headrace.wire import NOTHING, Invocation
from workers.hand import WorkerHand

if TYPE_CHECKING:
    from streams.intake import Delivery
    from workers.durations import Durations


def piece(
    name: str,
    at: float,
    seconds: float,
    deadline: float | None = None,
    *,
    parents: tuple[int, ...] = (),
    delay_s: float = 0.0,
    kind: Kind | None = None,
    if_late: str = "continue",
    subject: str | None = None,
) -> Piece:
    work = Work(id=name, tenant="a", arrived=at, deadline=deadline, if_late=if_late, subject=subject)
    return Piece(work, seconds, kind, parents, delay_s)


def crowd(seed: int, count: int = 300) -> list[Piece]:
    rng = random.Random(seed)
    found: list[Piece] = []
    at = 0.0
    for place in range(count):
        at += rng.expovariate(2.0)
        parents = (rng.randrange(place),) if place and rng.random() < 0.3 else ()
        work = Work(
            id=f"w{place}",
            tenant=rng.choice("abc"),
            arrived=at,
            deadline=None if rng.random() < 0.3 else at + rng.uniform(1.0, 30.0),
            value=rng.choice((1.0, 5.0)),
            if_late=rng.choice(("continue", "cancel")),
        )
        found.append(Piece(work, rng.lognormvariate(0.0, 1.0), Kind(rng.choice("fg")), parents, rng.random()))
    return found


def test_one_slot_runs_one_after_another() -> None:
    ends = simulate([piece("x", 0.0, 5.0), piece("y", 1.0, 1.0), piece("z", 1.5, 1.0)], 1, policy("fifo", 1))
    assert ends == [End("done", 5.0, 0.0), End("done", 6.0, 5.0), End("done", 7.0, 6.0)]


def test_a_child_comes_so_long_after_the_last_of_its_parents_has_ended() -> None:
    pieces = [
        piece("x", 0.0, 2.0),
        piece("y", 0.0, 3.0),
        piece("z", 99.0, 1.0, parents=(0, 1), delay_s=0.5),
    ]
    assert [end.at for end in simulate(pieces, 2, policy("fifo", 2))] == [2.0, 3.0, 4.5]


def test_what_follows_from_work_that_was_stopped_never_comes() -> None:
    pieces = [piece("x", 0.0, 5.0, 2.0, if_late="cancel"), piece("y", 0.0, 1.0, parents=(0,))]
    assert [end.ending for end in simulate(pieces, 1, policy("fifo", 1))] == ["late", "never"]


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_has_the_right_to_stop_work_at_its_deadline_and_not_to_start_it_after(name: str) -> None:
    pieces = [
        piece("long", 0.0, 10.0, 4.0, if_late="cancel"),
        piece("missed", 1.0, 1.0, 3.0, if_late="cancel"),
        piece("last", 1.0, 1.0),
    ]
    ends = simulate(pieces, 1, policy(name, 1))
    assert (ends[0].ending, ends[0].at) == ("late", 4.0)
    assert ends[1].started is None
    assert ends[1].ending in ("late", "given_up")
    assert (ends[2].ending, ends[2].at) == ("done", 5.0)


def test_newer_work_of_a_subject_replaces_the_older() -> None:
    pieces = [
        piece("busy", 0.0, 5.0),
        piece("old", 1.0, 1.0, 50.0, subject="frame"),
        piece("new", 2.0, 1.0, 50.0, subject="frame"),
    ]
    assert [end.ending for end in simulate(pieces, 1, policy("headrace", 1))] == ["done", "replaced", "done"]


class Told:
    """A policy that notes what it is told of durations."""

    def __init__(self) -> None:
        self.inner = Order(slots=1)
        self.known: list[float | None] = []
        self.busy: list[list[float]] = []

    def __len__(self) -> int:
        return len(self.inner)

    def add(self, work: Work, now: float) -> Work | None:
        self.known.append(work.p50_s)
        return self.inner.add(work, now)

    def take(self, now: float, busy_s: Sequence[float] = ()) -> Decision:
        self.busy.append(list(busy_s))
        return self.inner.take(now, busy_s)

    def drop(self, identity: str) -> Work | None:
        return self.inner.drop(identity)

    def put_off(self, identity: str) -> bool:
        return self.inner.put_off(identity)


def test_durations_are_learned_when_they_end_and_never_before() -> None:
    kind = Kind("f")
    told = Told()
    simulate(
        [piece("x", 0.0, 5.0, kind=kind), piece("y", 4.0, 5.0, kind=kind), piece("z", 6.0, 1.0, kind=kind)], 1, told
    )
    assert told.known[:2] == [None, None]
    assert told.known[2:] == [pytest.approx(5.0), pytest.approx(5.0)]


def test_what_nothing_was_known_of_when_it_came_is_estimated_as_soon_as_something_is_learned() -> None:
    kind = Kind("f")
    told = Told()
    simulate([piece("x", 0.0, 5.0, kind=kind), piece("y", 1.0, 1.0, kind=kind)], 1, told)
    assert told.known == [None, None, pytest.approx(5.0)]


def test_what_is_known_beforehand_is_told() -> None:
    forecasts, kind, told = Forecasts(), Kind("f"), Told()
    forecasts.learn(kind, 3.0, 0.0)
    simulate([piece("x", 10.0, 5.0, kind=kind)], 1, told, forecasts)
    assert told.known == [pytest.approx(3.0)]


def test_a_policy_is_told_how_long_slots_are_expected_to_be_busy() -> None:
    forecasts, kind = Forecasts(), Kind("f")
    for _ in range(30):
        forecasts.learn(kind, 4.0, 0.0)
    told = Told()
    simulate([piece("x", 10.0, 4.0, kind=kind), piece("y", 11.0, 4.0, kind=kind)], 2, told, forecasts)
    assert [round(each[0], 6) for each in told.busy if each] == [4.0, 3.0, 1.0]


@pytest.mark.parametrize("name", POLICIES)
def test_everything_ends_and_no_more_runs_at_a_time_than_there_are_slots(name: str) -> None:
    pieces = crowd(7)
    ends = simulate(pieces, 3, policy(name, 3))
    spans = [(end.started, end.at) for end in ends if end.started is not None]
    steps = sorted([(at, -1) for _, at in spans] + [(began, 1) for began, _ in spans])
    running = most = 0
    for _, step in steps:
        running += step
        most = max(most, running)
    assert most == 3
    for one, end in zip(pieces, ends, strict=True):
        if end.ending == "done" and end.started is not None:
            assert end.at == pytest.approx(end.started + one.seconds)
            assert one.parents or end.started >= one.work.arrived
        if end.ending == "never":
            assert ends[one.parents[0]].ending != "done"


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_input_gives_the_same_ends_byte_for_byte(name: str) -> None:
    def made() -> bytes:
        return msgspec.json.encode(simulate(crowd(3), 2, policy(name, 2)))

    assert made() == made()


# ---------------------------------------------------------------- production's own hand, in simulated time


class Known(NamedTuple):
    run: tuple[float, float] | None
    path_s: float


class InHand:
    """What a worker holds its deliveries with, driven by the simulation in place of a worker."""

    def __init__(self, name: str, slots: int, pieces: Sequence[Piece]) -> None:
        self.now = 0.0
        self.seconds = {one.work.id: one.seconds for one in pieces}
        self.expected: dict[str, Known] = {}
        self.work: dict[str, Work] = {}
        self.running: dict[str, float] = {}
        self.deliveries: dict[str, Delivery] = {}
        self.busy = Busy(lambda: self.now)
        durations = SimpleNamespace(of=lambda invocation: self.expected[invocation.invocation_id], news=0)
        self.hand = WorkerHand(policy(name, slots), cast("Durations", durations), self.busy, lambda: self.now)

    def __len__(self) -> int:
        return len(self.hand.waiting)

    def add(self, work: Work, now: float) -> Work | None:
        self.now = now
        run = None if work.p50_s is None or work.p90_s is None else (work.p50_s, work.p90_s)
        self.expected[work.id] = Known(run, work.path_s)
        self.work[work.id] = work
        invocation = Invocation(
            run_id="r",
            invocation_id=work.id,
            function="f",
            version="1",
            route="r",
            tenant=work.tenant,
            payload=NOTHING,
            accepted_at=work.arrived if work.run_at is None else work.run_at,
            sent_at=now,
            deadline=work.deadline,
            on_late=work.if_late,
        )
        delivery = cast("Delivery", SimpleNamespace(invocation=invocation, identity=work.id, at=work.arrived))
        self.deliveries[work.id] = delivery
        older = self.hand.add(delivery)
        return None if older is None else self.work[older.identity]

    def take(self, now: float, busy_s: Sequence[float] = ()) -> Decision:
        self.now = now
        for identity, until in list(self.running.items()):
            if until <= now:
                self.busy.end(identity)
                del self.running[identity]
        assert list(self.busy) == pytest.approx(list(busy_s))
        start, over = self.hand.take()
        if start is None:
            return Decision(None, tuple(self.work[one.identity] for one in over))
        work = self.work[start.identity]
        if work.if_late != "cancel" or work.deadline is None or now <= work.deadline:
            until = now + self.seconds[work.id]
            self.running[work.id] = until if work.if_late != "cancel" else min(until, work.deadline or until)
            self.busy.begin(work.id, self.expected[work.id].run)
        return Decision(work, tuple(self.work[one.identity] for one in over))

    def drop(self, identity: str) -> Work | None:
        before = len(self)
        self.hand.drop(self.deliveries[identity])
        return None if len(self) == before else self.work[identity]

    def put_off(self, identity: str) -> bool:
        return self.hand.waiting.put_off(identity)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_a_worker_takes_work_with_decides_as_the_simulation_does(name: str, seed: int) -> None:
    # The value of work is not on the wire, so all is worth the same here.
    pieces = [structs.replace(one, work=structs.replace(one.work, value=1.0)) for one in crowd(seed)]
    inside = simulate(pieces, 3, InHand(name, 3, pieces))
    assert inside == simulate(pieces, 3, policy(name, 3))
    assert len({end.ending for end in inside}) >= 2
