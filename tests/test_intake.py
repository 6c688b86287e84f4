"""From lanes to deliveries: earliest deadline first, and nothing is kept from others or lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from streams.intake import Delivery, Intake, window
from streams.log import Log
from tests.stories import trigger


@pytest.fixture
async def intake(log: Log) -> AsyncIterator[Intake]:
    opened = Intake(log, slots=2)
    await opened.start()
    yield opened
    await opened.close()


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
    other = Intake(log, slots=2)
    await other.start()
    try:
        assert len({(await take(other)).seq for _ in range(3)}) == 3
    finally:
        await other.close()


async def test_work_left_by_a_closed_intake_goes_to_the_next(log: Log) -> None:
    await log.append([trigger("e").record])
    first = Intake(log, slots=1)
    await first.start()
    await until_held(first, 1)
    await first.close()
    second = Intake(log, slots=1)
    await second.start()
    try:
        assert (await take(second)).delivered == 2
    finally:
        await second.close()


@pytest.mark.parametrize(("usual_s", "expected"), [(10.0, 1), (0.01, 2), (0.001, 20), (0.00001, 128), (0.0, 128)])
def test_the_window_holds_about_ten_milliseconds_of_work(usual_s: float, expected: int) -> None:
    assert window(usual_s, slots=2) == expected
