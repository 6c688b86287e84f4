"""From lanes to deliveries: earliest deadline first, and nothing is kept from others or lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from functions.busy import Busy
from functions.outlook import Outlook
from functions.policies import policy
from headrace.wire import TenantRecord
from infra.embedded import NatsServer
from infra.rights import ADMIN
from streams import topology
from streams.intake import Delivery, Intake
from streams.lanes import ASIDE_MAX, VIEW_LOW, VIEW_MAX, window
from streams.link import open_link
from streams.log import Log
from tests.stories import trigger
from workers.durations import Durations
from workers.hand import WorkerHand


class Tenants:
    """A table of tenants that a test fills by hand."""

    def __init__(self) -> None:
        self.rows: dict[str, TenantRecord] = {}
        self._listeners: list[Callable[[], None]] = []

    def items(self) -> dict[str, TenantRecord]:
        return self.rows

    def listen(self, changed: Callable[[], None]) -> Callable[[], None]:
        self._listeners.append(changed)
        return lambda: self._listeners.remove(changed)

    def put(self, name: str) -> None:
        self.rows[name] = TenantRecord(name=name, digests=[], added_at=0.0)
        for changed in self._listeners:
            changed()

    def delete(self, name: str) -> None:
        del self.rows[name]
        for changed in self._listeners:
            changed()


def hand(slots: int = 2, order: str = "headrace") -> WorkerHand:
    durations = Durations(Outlook(lambda name: None), time.time)
    return WorkerHand(policy(order, slots), durations, Busy(time.time), time.time)


@asynccontextmanager
async def opened(
    log: Log, *, slots: int = 2, tenants: Tenants | None = None, over: list[Delivery] | None = None
) -> AsyncIterator[Intake]:
    """Have an intake at work; what is not worth starting is gathered in ``over``."""
    gathered: list[Delivery] = [] if over is None else over
    intake = Intake(log, hand(slots), tenants or Tenants(), slots=slots, on_over=gathered.append)
    await intake.start()
    try:
        yield intake
    finally:
        await intake.close()


@pytest.fixture
async def intake(log: Log) -> AsyncIterator[Intake]:
    async with opened(log) as one:
        yield one


async def take(intake: Intake) -> Delivery:
    async with asyncio.timeout(15):
        return await intake.take()


async def until_held(intake: Intake, count: int) -> None:
    async with asyncio.timeout(15):
        while intake.held < count:
            await asyncio.sleep(0.005)


async def test_the_earliest_deadline_of_all_lanes_is_taken_first(
    log: Log, intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.intake.HOLD_S", 60.0)  # nobody takes while all four arrive: keep them all the same
    now = time.time()
    for name, left in (("none", None), ("quarter", 900.0), ("minute", 60.0), ("seconds", 4.0)):
        deadline = None if left is None else now + left
        await log.append([trigger(name, now=now, deadline=deadline).record])
    await until_held(intake, 4)
    names = [(await take(intake)).invocation.event for _ in range(4)]
    assert [n.id for n in names if n] == ["seconds", "minute", "quarter", "none"]


async def test_inside_a_lane_without_deadlines_the_first_comes_first(log: Log, intake: Intake) -> None:
    for n in range(20):
        await log.append([trigger(f"e{n}").record])
    taken = []
    for _ in range(20):
        delivery = await take(intake)
        taken.append(delivery.seq)
        await delivery.ack()
    assert taken == sorted(taken)


async def test_what_was_given_back_comes_again_and_counts_its_deliveries(log: Log, intake: Intake) -> None:
    await log.append([trigger("e").record])
    first = await take(intake)
    await first.give_back()
    second = await take(intake)
    assert (second.seq, second.delivered) == (first.seq, 2)


async def test_what_was_given_back_with_a_delay_comes_after_it(log: Log, intake: Intake) -> None:
    await log.append([trigger("late").record])
    delivery = await take(intake)
    given_back_at = time.time()
    await delivery.give_back(0.5)
    again = await take(intake)
    assert again.seq == delivery.seq
    assert time.time() - given_back_at >= 0.45


async def test_what_nobody_can_start_here_is_given_to_another_worker(log: Log, intake: Intake) -> None:
    for n in range(4):
        await log.append([trigger(f"e{n}").record])
    await take(intake)  # this worker is busy now, and holds one or more of the others in its window
    async with opened(log) as other:
        assert len({(await take(other)).seq for _ in range(3)}) == 3


async def test_work_left_by_a_closed_intake_goes_to_the_next(log: Log) -> None:
    await log.append([trigger("e").record])
    async with opened(log, slots=1) as first:
        await until_held(first, 1)
    async with opened(log, slots=1) as second:
        assert (await take(second)).delivered == 2


@pytest.mark.parametrize(("usual_s", "expected"), [(10.0, 1), (0.01, 2), (0.001, 20), (0.00001, 128), (0.0, 128)])
def test_the_window_holds_about_ten_milliseconds_of_work(usual_s: float, expected: int) -> None:
    assert window(usual_s, slots=2) == expected


async def backlog(log: Log, count: int, *, prefix: str = "e", deadline: float | None = None) -> None:
    """Put work into the log, all of it at once."""
    now = time.time()
    for start in range(0, count, 400):
        units = [trigger(f"{prefix}{n}", now=now, deadline=deadline) for n in range(start, min(count, start + 400))]
        await log.append([record for unit in units for record in unit.records])


async def until_there(intake: Intake, event: str) -> None:
    """Return once the work of an event is in the hand."""
    async with asyncio.timeout(15):
        while not any(one.invocation.event and one.invocation.event.id == event for one in intake._held.values()):
            await asyncio.sleep(0.005)


async def held_steadily(intake: Intake, at_least: int) -> int:
    """Return how much is held once it is so much and nothing more comes."""
    await until_held(intake, at_least)
    before = -1
    async with asyncio.timeout(15):
        while before != intake.held:
            before = intake.held
            await asyncio.sleep(0.03)
    return intake.held


async def test_of_a_long_lane_a_bounded_view_is_held_and_no_more(log: Log) -> None:
    await backlog(log, 1000)
    async with opened(log) as intake:
        assert VIEW_LOW < await held_steadily(intake, VIEW_LOW + 1) <= VIEW_MAX
        for _ in range(3 * VIEW_MAX):
            await (await take(intake)).ack()
            assert intake.held <= VIEW_MAX
        info = await log.link.jetstream().consumer_info(topology.STREAM, topology.lane_consumer(11, "default"))
        assert (info.num_ack_pending or 0) <= 2 * VIEW_MAX


async def test_all_lanes_together_are_held_to_a_bound(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.intake.HELD_MAX", 150)
    now = time.time()
    for number, left_s in enumerate((None, 900.0, 300.0, 100.0)):
        await backlog(log, 200, prefix=f"l{number}-", deadline=None if left_s is None else now + left_s)
    async with opened(log) as intake:
        assert VIEW_LOW < await held_steadily(intake, VIEW_LOW + 1) <= 150 + topology.LANES


async def test_an_urgent_one_is_taken_next_however_much_is_held(log: Log) -> None:
    await backlog(log, 400)
    async with opened(log) as intake:
        await held_steadily(intake, VIEW_LOW + 1)
        await log.append([trigger("urgent", now=time.time(), deadline=time.time() + 30.0).record])
        await until_there(intake, "urgent")
        taken = await take(intake)
        assert taken.invocation.event is not None
        assert taken.invocation.event.id == "urgent"


async def test_work_that_is_late_does_not_hide_what_comes_behind_it(log: Log) -> None:
    seen: set[str] = set()

    class Watching(WorkerHand):
        def add(self, delivery: Delivery) -> Delivery | None:
            assert delivery.invocation.event is not None
            seen.add(delivery.invocation.event.id)
            return super().add(delivery)

    durations = Durations(Outlook(lambda name: None), time.time)
    watching = Watching(policy("headrace", 2), durations, Busy(time.time), time.time)
    late = 2 * (VIEW_MAX + ASIDE_MAX)
    await backlog(log, late, deadline=time.time() - 5.0)
    await log.append([trigger("behind", now=time.time(), deadline=time.time() + 1.9).record])
    intake = Intake(log, watching, Tenants(), slots=2, on_over=lambda delivery: None)
    await intake.start()
    try:
        async with asyncio.timeout(15):
            while "behind" not in seen:
                assert intake.held <= VIEW_MAX + ASIDE_MAX
                await asyncio.sleep(0.005)
    finally:
        await intake.close()
    assert len(seen) == late + 1


async def test_work_that_went_back_for_a_while_is_called_back_before_a_slot_stands_idle(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.intake.ASIDE_S_MIN", 3600.0)  # what is not called back does not come at all
    monkeypatch.setattr("streams.intake.ASIDE_S_MAX", 3600.0)
    monkeypatch.setattr(WorkerHand, "put_off", lambda self, delivery: True)
    now, count = time.time(), 5 * VIEW_MAX
    for n in range(count):
        await log.append([trigger(f"e{n}", now=now, deadline=now + 600.0 - n / 1000).record])
    taken = []
    async with opened(log, slots=1) as intake:
        await until_held(intake, VIEW_MAX)
        for _ in range(count):
            delivery = await take(intake)
            taken.append(delivery.seq)
            await asyncio.sleep(0.002)
            await delivery.ack()
    assert len(set(taken)) == count


async def test_what_is_not_worth_starting_is_handed_over_and_takes_room_until_it_is_done(log: Log) -> None:
    over: list[Delivery] = []
    now = time.time()
    for name in ("a", "b"):
        await log.append([trigger(name, now=now, deadline=now - 1.0, on_late="cancel").record])
    await log.append([trigger("good", now=now).record])
    async with opened(log, over=over) as intake:
        await until_held(intake, 3)
        taken = await take(intake)
        assert taken.invocation.event is not None
        assert taken.invocation.event.id == "good"
        assert [one.over for one in over] == ["deadline", "deadline"]
        assert all(one.counts for one in over)
        await over[0].ack()
        assert [one.counts for one in over] == [False, True]


async def test_a_message_that_comes_again_while_it_is_held_is_held_once(
    log: Log, intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.intake.HOLD_S", 60.0)
    await log.append([trigger("e").record])
    await until_held(intake, 1)
    (first,) = intake._held.values()
    await first.lane.ask(room=10)
    await log.link.nc.publish(first.reply, b"-NAK")  # as if the server had thought that this worker is gone
    async with asyncio.timeout(15):
        while first.seq in intake._held and intake._held[first.seq] is first:
            await asyncio.sleep(0.005)
    assert intake.held == 1
    taken = await take(intake)
    assert (taken.delivered, taken.fresh) == (2, True)


async def test_lanes_are_read_of_tenants_as_they_come_and_go(log: Log) -> None:
    tenants = Tenants()
    async with opened(log, tenants=tenants) as intake:
        await topology.add_tenant(log.link, "beamline")
        tenants.put("beamline")
        await log.append([trigger("theirs", tenant="beamline").record])
        taken = await take(intake)
        assert taken.invocation.tenant == "beamline"
        await taken.ack()
        tenants.delete("beamline")
        async with asyncio.timeout(15):
            while any(where.tenant == "beamline" for where in intake._lanes):
                await asyncio.sleep(0.005)
        await log.append([trigger("ours").record])
        assert (await take(intake)).invocation.tenant == "default"


async def test_a_tenant_with_a_long_queue_does_not_delay_the_urgent_work_of_another(log: Log) -> None:
    tenants = Tenants()
    await topology.add_tenant(log.link, "small")
    tenants.put("small")
    await backlog(log, 1000, deadline=time.time() + 31.0)
    async with opened(log, tenants=tenants) as intake:
        await held_steadily(intake, VIEW_LOW + 1)
        await log.append([trigger("theirs", tenant="small", now=time.time(), deadline=time.time() + 20.0).record])
        await until_there(intake, "theirs")
        assert (await take(intake)).invocation.tenant == "small"


async def test_a_deep_hand_that_died_is_taken_up_by_another(log: Log, nats_server: NatsServer) -> None:
    await backlog(log, 300)
    link = await open_link(nats_server.url, user=ADMIN, password=nats_server.password(ADMIN), name="dies")
    theirs = Log(link)
    await theirs.start()
    intake = Intake(theirs, hand(), Tenants(), slots=2, on_over=lambda delivery: None)
    await intake.start()
    await held_steadily(intake, VIEW_LOW + 1)
    for task in [*intake._tasks, intake._keeping]:
        assert task is not None
        task.cancel()
    await theirs.close()
    await link.close()
    seen: set[int] = set()
    async with opened(log) as other:
        while len(seen) < 300:
            delivery = await take(other)
            seen.add(delivery.seq)
            await delivery.ack()
