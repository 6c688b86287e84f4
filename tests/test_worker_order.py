"""The worker keeps deadlines: what is urgent starts next, what is late is ended, and nothing waits for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path

import pytest

from functions.outlook import Outlook
from headrace.wire import Expected, ForecastRow, Outcome, decode
from streams.follow import follow
from streams.intake import Delivery, Intake
from streams.link import Link
from streams.log import Log
from streams.topology import run_of
from tests.processes import until
from tests.stories import trigger
from tests.test_intake import Tenants, opened, until_held
from tests.test_worker import Platform, working
from workers.durations import Durations


@pytest.fixture
async def platform(log: Log, link: Link, tmp_path: Path) -> AsyncIterator[Platform]:
    async with working(log, link, tmp_path) as running:
        yield running


async def outcomes(platform: Platform, count: int) -> dict[str, tuple[int, Outcome]]:
    """Return so many outcomes, of runs that have one each, by run and with their places in the log."""
    found: dict[str, tuple[int, Outcome]] = {}
    async with asyncio.timeout(60), aclosing(follow(platform.log, ["hr.done.>"], after=0)) as batches:
        async for batch in batches:
            found |= {run_of(one.subject): (one.seq, decode(one.body, Outcome)) for one in batch}
            if len(found) >= count:
                break
    return found


async def test_an_urgent_trigger_among_a_deep_backlog_is_answered_next(platform: Platform, tmp_path: Path) -> None:
    go = tmp_path / "go"
    await platform.deploy(
        f"""
        import os, time
        def slow(x):
            while not os.path.exists({str(go)!r}):
                time.sleep(0.001)
            return x
        def quick(x):
            return x
        """
    )
    waiting = [await platform.trigger("slow", n, deadline_s=None) for n in range(150)]
    urgent = await platform.trigger("quick", 1, deadline_s=10.0)
    go.touch()
    found = await outcomes(platform, len(waiting) + 1)
    # Two ran, and a few more may have been committed in the same moment; the others waited.
    assert sum(found[run][0] < found[urgent][0] for run in waiting) <= 12


async def test_what_is_late_before_it_starts_ends_canceled_and_never_runs(platform: Platform, tmp_path: Path) -> None:
    go, ran = tmp_path / "go", tmp_path / "ran"
    await platform.deploy(
        f"""
        import os, time
        def block(x):
            while not os.path.exists({str(go)!r}):
                time.sleep(0.01)
        def never(x):
            open({str(ran)!r}, "w").close()
        """
    )
    blocking = [await platform.trigger("block", deadline_s=None) for _ in range(2)]
    late = [await platform.trigger("never", n, deadline_s=0.4, on_late="cancel") for n in range(20)]
    await asyncio.sleep(0.5)
    go.touch()
    found = await outcomes(platform, len(late) + len(blocking))
    for run in late:
        outcome = found[run][1]
        assert outcome.state == "canceled"
        assert outcome.error is not None
        assert outcome.error.kind == "deadline"
        assert outcome.end is not None
        assert outcome.end.state == "canceled"
    assert not ran.exists()
    assert [found[run][1].state for run in blocking] == ["succeeded"] * 2


async def test_what_runs_past_the_deadline_is_stopped_where_nobody_needs_it_then(
    platform: Platform, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    await platform.deploy(
        f"""
        import time
        def endless(x):
            open({str(started)!r}, "w").close()
            time.sleep(600)
        def quick(x):
            return x
        """,
        endless={"retries": 3},
    )
    run = await platform.trigger("endless", deadline_s=1.0, on_late="cancel")
    await until(started.exists)
    record = await platform.ended(run)
    assert record.state == "canceled"
    assert record.error is not None
    assert (record.error.kind, "stopped" in record.error.message) == ("deadline", True)
    _, (invocation,) = await platform.state(run)
    assert (invocation.state, invocation.attempts) == ("canceled", 1)
    quick = [await platform.trigger("quick", n) for n in range(4)]
    assert [await platform.answer(run) for run in quick] == [0, 1, 2, 3]  # its slot is free again


async def test_late_branches_cancel_their_run_and_the_join_does_not_start(platform: Platform) -> None:
    await platform.deploy(
        """
        import time
        def fan(n, ctx):
            ctx.map("member", range(n), then="never")
        def member(x):
            time.sleep(600 if x else 0)
        def never(xs):
            return xs
        """
    )
    run = await platform.trigger("fan", 4, deadline_s=1.0, on_late="cancel")
    record = await platform.ended(run)
    assert record.state == "canceled"
    assert record.error is not None
    assert record.error.kind == "deadline"
    assert "never" not in {i.function for i in (await platform.state(run))[1]}


async def test_late_work_goes_on_where_the_route_does_not_say_otherwise(platform: Platform) -> None:
    await platform.deploy("import time\ndef slow(x):\n    time.sleep(0.3)\n    return x")
    run = await platform.trigger("slow", 7, deadline_s=0.1)
    assert await platform.answer(run) == 7
    assert (await platform.state(run))[0].deadline_met is False


async def test_work_without_deadline_gets_its_share_beside_more_urgent_work_than_can_be_done(
    platform: Platform,
) -> None:
    await platform.deploy("import time\ndef work(x):\n    time.sleep(0.02)\n    return x")
    await platform.answer(await platform.trigger("work", 0))  # how long it takes is known from here on
    urgent = [await platform.trigger("work", n, deadline_s=30.0) for n in range(250)]
    patient = await platform.trigger("work", 1, deadline_s=None)
    urgent += [await platform.trigger("work", n, deadline_s=30.0) for n in range(50)]
    found = await outcomes(platform, len(urgent) + 2)
    assert sum(found[run][0] > found[patient][0] for run in urgent) >= 50


@pytest.mark.parametrize("order", ["edf", "fifo", "priority"])
async def test_the_other_orders_do_all_the_work_as_well(log: Log, link: Link, tmp_path: Path, order: str) -> None:
    async with working(log, link, tmp_path, order=order) as platform:
        await platform.deploy("def f(x):\n    return x")
        runs = [await platform.trigger("f", n, deadline_s=None if n % 2 else 60.0) for n in range(20)]
        found = await outcomes(platform, len(runs))
        assert {found[run][1].state for run in runs} == {"succeeded"}


class Keeping:
    """A hand that keeps its slot for a while."""

    def __init__(self, times: int) -> None:
        self.left = times
        self.asked = 0
        self.waits: list[Delivery] = []

    def add(self, delivery: Delivery) -> Delivery | None:
        self.waits.append(delivery)
        return None

    def take(self) -> tuple[Delivery | None, Sequence[Delivery]]:
        if not self.waits:
            return None, ()
        self.asked += 1
        self.left -= 1
        return (None if self.left >= 0 else self.waits.pop()), ()

    def drop(self, delivery: Delivery) -> None:
        self.waits.remove(delivery)

    def put_off(self, delivery: Delivery) -> bool:
        return False


async def test_a_slot_that_was_kept_is_decided_about_again_soon_and_not_all_the_time(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.intake.HOLD_S", 60.0)
    keeping = Keeping(times=4)
    intake = Intake(log, keeping, Tenants(), slots=2, on_over=lambda delivery: None)
    await intake.start()
    try:
        await log.append([trigger("e").record])
        async with asyncio.timeout(15):
            await intake.take()
        assert keeping.asked == 5
    finally:
        await intake.close()


async def test_a_slot_that_gets_free_lets_a_kept_one_go(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.intake.HOLD_S", 60.0)
    monkeypatch.setattr("streams.intake.KEPT_S", 60.0)
    keeping = Keeping(times=1)
    intake = Intake(log, keeping, Tenants(), slots=2, on_over=lambda delivery: None)
    await intake.start()
    try:
        taking = asyncio.create_task(intake.take())
        await log.append([trigger("e").record])
        await until_held(intake, 1)
        async with asyncio.timeout(15):
            while keeping.asked < 1:
                await asyncio.sleep(0.005)
        assert not taking.done()
        intake.slot_freed()
        async with asyncio.timeout(15):
            await taking
    finally:
        await intake.close()


async def test_replaced_work_is_handed_over_as_superseded(log: Log) -> None:
    over: list[Delivery] = []
    for place in range(3):
        await log.append(trigger(f"frame {place}", newest_wins=True).records)
    async with opened(log, over=over) as intake:
        async with asyncio.timeout(15):
            while len(over) < 2:
                await asyncio.sleep(0.005)
        assert [one.over for one in over] == ["superseded"] * 2
        assert [one.invocation.event.id for one in over if one.invocation.event] == ["frame 0", "frame 1"]
        assert intake.held == 1


def test_what_this_worker_saw_of_late_counts_before_what_all_learned() -> None:
    invocation = trigger("e").invocation
    row = ForecastRow(function="f", kinds={"run|||": Expected(9.0, 10.0, 11.0, 50)}, at=0.0)
    now = [1000.0]
    durations = Durations(Outlook(lambda name: row if name == "f" else None), lambda: now[0])
    assert durations.of(invocation).run == (9.0, 10.0)
    for _ in range(5):
        now[0] += 1.0
        durations.learn(invocation, 2.0, now[0])
    now[0] += 1.0
    run = durations.of(invocation).run
    assert run is not None
    assert run[0] == pytest.approx(2.0)


def test_what_becomes_known_is_news_for_those_who_guessed() -> None:
    invocation = trigger("e").invocation
    durations = Durations(Outlook(lambda name: None), lambda: 1000.0)
    assert durations.of(invocation).run is None
    before = durations.news
    durations.learn(invocation, 2.0, 1000.0)
    assert durations.news > before
    assert durations.of(invocation).run is not None
