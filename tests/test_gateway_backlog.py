"""What would be late is refused before it is accepted, and nothing else is."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest

from gateway.backlog import RETRY_S_MAX, Backlog
from gateway.problems import Busy
from headrace.errors import Overloaded, Unavailable
from headrace.wire import Invocation, Payload
from streams.backlog import Lanes, Look
from streams.link import Link
from streams.log import Log, Record
from streams.topology import LANES, done_subject, work_subject
from tests.doors import TOKEN, Door, Doors

NOW = 1_000_000.0


class Counted:
    """Lanes of which a test says what waits in them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waiting = [0] * LANES
        self.held = [0] * LANES
        self.given_back = 0
        self.ended = 0
        self.away = False
        self.looks = 0

    def clock(self) -> float:
        return self.now

    async def look(self) -> Look:
        self.looks += 1
        if self.away:
            raise Unavailable("away")
        return Look(self.now, tuple(self.waiting), tuple(self.held), self.ended, "count", given_back=self.given_back)


@pytest.fixture
def lanes() -> Counted:
    return Counted()


@pytest.fixture
def backlog(lanes: Counted) -> Backlog:
    return Backlog(lanes, backlog_max=1000, clock=lanes.clock, rng=random.Random(1))


async def look(backlog: Backlog, lanes: Counted, after_s: float = 0.5) -> None:
    """Let time pass and have it look."""
    lanes.now += after_s
    backlog.learn(await lanes.look())


async def test_nothing_is_refused_while_nothing_waits(backlog: Backlog, lanes: Counted) -> None:
    for _ in range(50):
        await look(backlog, lanes)
        backlog.check(NOW + 0.1, NOW)


async def test_what_would_wait_for_half_of_its_time_is_refused(backlog: Backlog, lanes: Counted) -> None:
    lanes.waiting[3] = 100
    for _ in range(10):
        await look(backlog, lanes)
        lanes.ended += 10  # 20 a second: 5 s of work wait
    backlog.check(NOW + 12.0, NOW)
    with pytest.raises(Busy, match="100 pieces of work are ahead") as refused:
        backlog.check(NOW + 8.5, NOW)
    assert 1.0 <= refused.value.retry_after_s <= 3.0


async def test_the_urgent_pass_by_what_can_wait(backlog: Backlog, lanes: Counted) -> None:
    lanes.waiting[8] = 900
    for _ in range(40):
        await look(backlog, lanes)
        lanes.ended += 1
    backlog.check(NOW + 5.0, NOW)
    with pytest.raises(Busy):
        backlog.check(NOW + 300.0, NOW)


async def test_what_was_accepted_since_the_last_look_counts(backlog: Backlog, lanes: Counted) -> None:
    lanes.waiting[3] = 10
    for _ in range(10):
        await look(backlog, lanes)
        lanes.ended += 10
    backlog.check(NOW + 10.0, NOW)
    for _ in range(100):
        backlog.took("r", NOW + 10.0, NOW)
    with pytest.raises(Busy):
        backlog.check(NOW + 10.0, NOW)


async def test_what_follows_from_what_waits_counts(backlog: Backlog, lanes: Counted) -> None:
    # Between two moments of rest, four outcomes came for each that was accepted.
    await look(backlog, lanes)
    backlog.took("r", NOW + 10.0, NOW, runs=100)
    lanes.ended = 400
    await look(backlog, lanes)
    lanes.waiting[3] = 100
    backlog.took("r", NOW + 10.0, NOW, runs=100)
    for _ in range(10):
        await look(backlog, lanes)
        lanes.ended += 2  # 4 a second: 100 s of work, of which 25 s wait already
    assert backlog.following() == pytest.approx(4.0, rel=0.1)
    backlog.check(NOW + 255.0, NOW)
    with pytest.raises(Busy):
        backlog.check(NOW + 80.0, NOW)


async def test_the_members_of_a_large_map_wait_by_themselves(backlog: Backlog, lanes: Counted) -> None:
    await look(backlog, lanes)
    backlog.took("r", NOW + 10.0, NOW, runs=20)
    lanes.ended = 20 * 500
    await look(backlog, lanes)
    backlog.took("r", NOW + 10.0, NOW)
    lanes.waiting[3] = 499
    for _ in range(5):
        await look(backlog, lanes)
        lanes.ended += 50
        lanes.waiting[3] -= 50
    assert backlog.following() == pytest.approx(1.0, abs=0.01)


async def test_a_large_map_of_one_route_says_nothing_of_the_runs_of_another(backlog: Backlog, lanes: Counted) -> None:
    await look(backlog, lanes)
    for _ in range(3):
        backlog.took("map", NOW + 10.0, NOW)
        lanes.ended += 10_002
        await look(backlog, lanes)
    backlog.took("plain", NOW + 10.0, NOW, runs=100)
    lanes.ended += 100
    await look(backlog, lanes)
    backlog.took("plain", NOW + 10.0, NOW, runs=500)
    lanes.waiting[3] = 500
    for _ in range(3):
        await look(backlog, lanes)
        lanes.ended += 50
        lanes.waiting[3] -= 50
    assert backlog.following() == 1.0


async def test_work_without_a_deadline_is_bounded_by_number_alone(backlog: Backlog, lanes: Counted) -> None:
    lanes.waiting[LANES - 1] = 998
    await look(backlog, lanes)
    await look(backlog, lanes)
    backlog.check(None, NOW)
    with pytest.raises(Busy, match="the limit is 1,000"):
        backlog.check(None, NOW, runs=3)


async def test_a_slow_start_is_no_reason_to_refuse(backlog: Backlog, lanes: Counted) -> None:
    lanes.waiting[3] = 2
    await look(backlog, lanes)
    await look(backlog, lanes)  # nothing has ended in half a second
    backlog.check(NOW + 10.0, NOW)


async def test_what_was_learned_is_forgotten_when_nothing_waits(backlog: Backlog, lanes: Counted) -> None:
    lanes.waiting[3] = 500
    for _ in range(20):
        await look(backlog, lanes)
    with pytest.raises(Busy):
        backlog.check(NOW + 10.0, NOW)
    lanes.waiting[3] = 0
    await look(backlog, lanes)
    backlog.check(NOW + 10.0, NOW)
    assert backlog.per_second() is None


async def test_nobody_is_asked_to_stay_away_for_long(backlog: Backlog, lanes: Counted) -> None:
    lanes.waiting[3] = 900
    for _ in range(200):
        await look(backlog, lanes)
    with pytest.raises(Busy) as refused:
        backlog.check(NOW + 10.0, NOW)
    assert refused.value.retry_after_s == RETRY_S_MAX


async def test_a_log_that_tells_nothing_refuses_nobody(lanes: Counted) -> None:
    lanes.away = True
    backlog = Backlog(lanes, backlog_max=1000, clock=lanes.clock)
    for _ in range(5):
        lanes.now += 1.0
        backlog.check(NOW + 1.0, NOW)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert lanes.looks > 0
    await backlog.close()


async def test_looks_are_rare(lanes: Counted) -> None:
    backlog = Backlog(lanes, backlog_max=100_000, clock=lanes.clock)
    for _ in range(100):
        backlog.check(NOW + 1.0, NOW)
        await asyncio.sleep(0)
    assert lanes.looks == 1
    await backlog.close()


class Full:
    """Lanes in which more waits than will be done today."""

    async def look(self) -> Look:
        return Look(time.monotonic(), (5000,) * LANES, (0,) * LANES, 0, "count")


async def full_door(doors: Doors) -> Door:
    """Open a gateway that has looked at its lanes for long enough to know that nothing gets done."""
    door = await doors.open(Full())
    await door.deploy(deadline="10s", filter={"type": "t"})
    give_up_at = time.monotonic() + 30.0
    while (await door.ask("POST", "/v1/triggers/r", json=1))[0] != 503:
        assert time.monotonic() < give_up_at
        await asyncio.sleep(0.01)
    return door


async def test_a_trigger_is_refused_before_its_body_is_read(tmp_path: Path) -> None:
    async with Doors(tmp_path) as doors:
        door = await full_door(doors)
        accepted = len(door.firsts())
        reader, writer = await asyncio.open_connection("127.0.0.1", int(door.url.rpartition(":")[2]))
        head = (
            f"POST /v1/triggers/r HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 999\r\n\r\n"
        )
        writer.write(head.encode())  # and not one byte of the body
        async with asyncio.timeout(10):
            answer = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nRetry-After: " in answer
        assert len(door.firsts()) == accepted


async def test_events_that_would_be_late_are_refused_as_a_whole(tmp_path: Path) -> None:
    async with Doors(tmp_path) as doors:
        door = await full_door(doors)
        accepted = len(door.firsts())
        events = [{"specversion": "1.0", "id": str(i), "source": "/s", "type": "t"} for i in range(3)]
        headers = {"Content-Type": "application/cloudevents-batch+json"}
        problem = await door.problem(503, "POST", "/v1/events", json=events, headers=headers)
        assert problem.type == "urn:headrace:problem:busy"
        assert len(door.firsts()) == accepted


async def test_the_server_counts_what_waits_and_what_ends(link: Link, log: Log) -> None:
    lanes = Lanes(link)
    before = await lanes.look()
    assert (before.waiting, before.held, before.ended) == ((0,) * LANES, (0,) * LANES, 0)
    await log.append([Record(work_subject(4, "default", "r", str(i)), b"x") for i in range(7)])
    await log.append([Record(done_subject("r", str(i)), b"x") for i in range(5)])
    after = await lanes.look()
    assert after.waiting[4] == sum(after.waiting) == 7
    assert after.ended == 5
    assert after.counting == before.counting


# ---------------------------------------------------------------- what the slots should do


@pytest.fixture
def slotted(lanes: Counted) -> Backlog:
    return Backlog(lanes, backlog_max=10_000, slots=lambda: 4, clock=lanes.clock, rng=random.Random(1))


async def test_a_burst_is_quoted_by_the_slots_before_anything_has_ended(slotted: Backlog, lanes: Counted) -> None:
    slotted.took("r", None, NOW, runs=803, need_s=0.05)
    assert slotted.wait_s(None, NOW) == pytest.approx(10.0)
    assert slotted.wait_s(None, NOW, behind=80) == pytest.approx(11.0)


async def test_of_what_was_seen_waiting_some_has_ended_before_the_next_look(slotted: Backlog, lanes: Counted) -> None:
    slotted.took("r", None, NOW, need_s=0.05)
    lanes.waiting[11] = 803
    slotted.learn(await lanes.look())
    slotted._looked_at = lanes.now
    before = slotted.wait_s(None, NOW)
    lanes.now += 2.0
    assert slotted.wait_s(None, NOW) == pytest.approx(before - 2.0)
    lanes.now += 3600.0
    assert slotted.wait_s(None, NOW) == 0.0
    assert slotted.wait_s(None, NOW, behind=80) == pytest.approx(1.0, abs=0.1)


async def test_each_kind_of_work_that_waits_counts_with_its_own_duration(slotted: Backlog, lanes: Counted) -> None:
    slotted.took("short", None, NOW, runs=100, need_s=0.1)
    slotted.took("long", None, NOW, runs=100, need_s=0.9)
    slotted._looked_at = lanes.now
    assert slotted.wait_s(None, NOW) == pytest.approx((200 + 1 - 4) / 8.0)


async def test_the_first_of_all_takes_what_is_ahead_for_its_like(slotted: Backlog) -> None:
    assert slotted.wait_s(None, NOW, behind=43, need_s=1.0) == pytest.approx(10.0)


async def test_without_any_known_duration_the_slots_tell_nothing(slotted: Backlog) -> None:
    slotted.took("r", None, NOW, runs=803)
    assert slotted.wait_s(None, NOW) == 0.0


def first() -> Invocation:
    """Return the first invocation of a run without deadline."""
    return Invocation(
        run_id="R",
        invocation_id="I",
        function="f",
        version="v",
        route="r",
        tenant="default",
        payload=Payload(),
        accepted_at=NOW,
        sent_at=NOW,
    )


async def test_what_is_on_its_way_into_the_log_is_ahead(slotted: Backlog, lanes: Counted) -> None:
    slotted._looked_at = lanes.now
    slotted.took("r", None, NOW, runs=4, need_s=1.0)
    alone = slotted.wait_s(None, NOW)
    with slotted.coming([first()] * 40):
        assert slotted.wait_s(None, NOW) == pytest.approx(alone + 10.0)
    assert slotted.wait_s(None, NOW) == alone


async def test_what_was_taken_is_ahead_until_a_look_has_seen_it(slotted: Backlog, lanes: Counted) -> None:
    slotted._looked_at = lanes.now
    slotted.took("r", None, NOW, runs=403, need_s=1.0)
    there = asyncio.Event()
    plain = lanes.look

    async def slow() -> Look:
        await there.wait()
        lanes.waiting[11] = 403
        return await plain()

    lanes.look = slow  # type: ignore[method-assign]
    looking = asyncio.create_task(slotted._look())
    await asyncio.sleep(0)
    assert slotted.wait_s(None, NOW) == pytest.approx(100.0)
    slotted.took("r", None, NOW, need_s=1.0)
    there.set()
    await looking
    assert slotted.waiting == 404
    assert slotted.wait_s(None, NOW) == pytest.approx(100.25)


# ---------------------------------------------------------------- several tenants


def shared(lanes: Counted, **waiting: int) -> Look:
    """Return a look at tenants with so much work each, all of it in the lane of 8 to 16 s."""
    tenants = {name: (0, 0, 0, number, *(0,) * (LANES - 4)) for name, number in waiting.items()}
    total = tuple(map(sum, zip(*tenants.values(), strict=True)))
    return Look(lanes.now, total, (0,) * LANES, lanes.ended, "count", tenants)


def learn(backlog: Backlog, lanes: Counted, ended: int, **waiting: int) -> None:
    lanes.now += 1.0
    lanes.ended += ended
    backlog.learn(shared(lanes, **waiting))


async def test_of_another_tenants_work_no_more_is_ahead_than_of_ones_own(backlog: Backlog, lanes: Counted) -> None:
    for _ in range(10):
        learn(backlog, lanes, 10, default=0, a=400, b=3)
    with pytest.raises(Busy):  # 400 pieces, at ten a second
        backlog.check(NOW + 10.0, NOW, tenant="a")
    backlog.check(NOW + 10.0, NOW, tenant="b")  # its three, and four of a's
    backlog.check(NOW + 10.0, NOW)
    assert backlog.wait_s(NOW + 10.0, NOW, "b") < 1.0 < 30.0 < backlog.wait_s(NOW + 10.0, NOW, "a")


async def test_a_tenant_may_have_as_much_waiting_as_there_is_room_left(backlog: Backlog, lanes: Counted) -> None:
    learn(backlog, lanes, 0, default=0, a=499, b=0)
    backlog.check(None, NOW, tenant="a")
    backlog.took("r", None, NOW, tenant="a")
    with pytest.raises(Overloaded) as refused:
        backlog.check(None, NOW, tenant="a")
    assert not isinstance(refused.value, Busy)
    backlog.check(None, NOW, runs=300, tenant="b")
    backlog.check(None, NOW, runs=300)


async def test_one_who_is_alone_may_fill_all_of_it(backlog: Backlog, lanes: Counted) -> None:
    learn(backlog, lanes, 0, default=999)
    backlog.check(None, NOW)
    with pytest.raises(Busy):
        backlog.check(None, NOW, runs=2)


async def test_a_backlog_that_fits_into_the_hands_of_workers_counts_once_they_give_back(
    backlog: Backlog, lanes: Counted
) -> None:
    lanes.held[5] = 100
    for _ in range(20):
        lanes.ended += 1
        await look(backlog, lanes)
    backlog.check(NOW + 40.0, NOW)  # that much may be running: nobody had to give anything back
    lanes.given_back = 90
    for _ in range(20):
        lanes.ended += 1
        await look(backlog, lanes)
    with pytest.raises(Busy, match="100 pieces of work are ahead"):
        backlog.check(NOW + 40.0, NOW)


async def test_a_few_attempts_that_came_again_are_no_backlog(backlog: Backlog, lanes: Counted) -> None:
    lanes.held[5], lanes.given_back = 7, 7
    for _ in range(20):
        await look(backlog, lanes)
    backlog.check(NOW + 40.0, NOW)
    lanes.held[5], lanes.given_back = 100, 40
    for _ in range(20):
        await look(backlog, lanes)
    backlog.check(NOW + 40.0, NOW)


async def test_hands_that_stay_full_for_a_moment_are_still_a_backlog(backlog: Backlog, lanes: Counted) -> None:
    lanes.held[5], lanes.waiting[5] = 200, 10
    for _ in range(20):
        lanes.ended += 1
        await look(backlog, lanes)
    lanes.waiting[5] = 0
    await look(backlog, lanes)
    with pytest.raises(Busy):
        backlog.check(NOW + 40.0, NOW)
    lanes.held[5] = 20
    await look(backlog, lanes)
    backlog.check(NOW + 40.0, NOW)


async def test_after_a_storm_nobody_is_told_of_it(lanes: Counted) -> None:
    backlog = Backlog(lanes, backlog_max=1000, clock=lanes.clock)

    async def pass_by(looks: int) -> None:
        """Let time pass until it has looked so often, though nobody sends anything."""
        wanted = lanes.looks + looks
        async with asyncio.timeout(30):
            while lanes.looks < wanted:
                lanes.now += 0.5
                await asyncio.sleep(0.01)

    lanes.waiting[3] = 500
    backlog.check(NOW + 10.0, NOW)
    await pass_by(3)
    with pytest.raises(Busy):
        backlog.check(NOW + 10.0, NOW)
    lanes.waiting[3] = 0
    await pass_by(1)
    await asyncio.sleep(0)
    backlog.check(NOW + 10.0, NOW)
    await backlog.close()
