"""Whoever quotes knows how many slots there are: workers say so, and one that is not heard any more has none."""

from __future__ import annotations

import asyncio

import pytest

from streams.link import Link
from streams.presence import SILENT_S, Present, Roll, presence_subject, roll_on, tell


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def present(worker: str, slots: int) -> Present:
    return Present(worker=worker, slots=slots)


def test_slots_of_all_workers_are_counted_together(clock: Clock) -> None:
    roll = Roll(clock)
    assert roll.slots() == 0
    roll.heard(present("a", 4))
    roll.heard(present("b", 2))
    roll.heard(present("a", 3))
    assert roll.slots() == 5


def test_a_worker_that_stops_is_counted_no_more(clock: Clock) -> None:
    roll = Roll(clock)
    roll.heard(present("a", 4))
    roll.heard(present("b", 2))
    roll.heard(present("a", 0))
    assert roll.slots() == 2


def test_a_worker_that_is_silent_for_long_is_counted_no_more(clock: Clock) -> None:
    roll = Roll(clock)
    roll.heard(present("a", 4))
    clock.now += SILENT_S - 1.0
    roll.heard(present("b", 2))
    assert roll.slots() == 6
    clock.now += 1.5
    assert roll.slots() == 2
    clock.now += SILENT_S
    assert roll.slots() == 0
    roll.heard(present("a", 4))
    assert roll.slots() == 4


async def test_a_worker_is_heard_from_its_first_word_to_its_last(link: Link) -> None:
    async with roll_on(link) as roll:
        telling = asyncio.create_task(tell(link, present("w", 3)))
        await _until(roll, 3)
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)
        await _until(roll, 0)


async def test_what_cannot_be_read_is_passed_over(link: Link) -> None:
    async with roll_on(link) as roll:
        await link.nc.publish(presence_subject("x"), b"\xc1 nonsense")
        telling = asyncio.create_task(tell(link, present("w", 3)))
        await _until(roll, 3)
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)


async def _until(roll: Roll, slots: int) -> None:
    async with asyncio.timeout(10):
        while roll.slots() != slots:
            await asyncio.sleep(0.01)
