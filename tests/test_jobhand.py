"""The jobs that an agent has in its hand: a bounded view of each tenant's, in which the most urgent ones are."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nats.js.api import AckPolicy, ConsumerConfig
from nats.js.errors import NotFoundError

from functions.ensembles import urgency
from headrace.jobs import JobSpec
from headrace.wire import Invocation
from streams import topology
from streams.link import Link
from streams.log import Log
from streams.topology import ACK_WAIT_S, DEFAULT_TENANT, STREAM, jobs_consumer, jobs_of
from tests.agents import Lab, until
from workers import jobview
from workers.jobhand import HELD_MIN, JobHand, Waiting
from workers.sites.base import SiteConfig

MANY = 400


@pytest.fixture
def lab(log: Log, tmp_path: Path) -> Lab:
    return Lab(log, SiteConfig(name="lab", kind="local", work=str(tmp_path)), tmp_path)


@asynccontextmanager
async def opened(lab: Lab, held_max: int = HELD_MIN) -> AsyncIterator[JobHand]:
    hand = JobHand(lab.log, lab.site.name, lambda arrived: None, held_max)
    await hand.ensure()
    await hand.start()
    try:
        yield hand
    finally:
        await hand.stop()
        await hand.close()


def jobs(
    lab: Lab, count: int, tenant: str = DEFAULT_TENANT, deadline: Callable[[int], float | None] = lambda n: None
) -> list[Invocation]:
    return [lab.job(JobSpec(executable="x"), tenant=tenant, deadline=deadline(n)) for n in range(count)]


async def seen(lab: Lab, tenant: str, count: int) -> None:
    """Return once the server has given out so many jobs of a tenant."""
    js = lab.log.link.jetstream()
    while True:
        info = await js.consumer_info(STREAM, jobs_consumer(lab.site.name, tenant))
        if not info.num_pending and info.num_ack_pending == count:
            return
        await asyncio.sleep(0.02)


def first(hand: JobHand) -> Waiting:
    return min(hand.waiting(), key=urgency)


async def take(hand: JobHand) -> Invocation:
    """Take what is most urgent, and have done with it."""
    await until(lambda: bool(hand.waiting()))
    one = first(hand)
    hand.begin([one])
    await one.ack()
    return one.invocation


async def test_all_that_waits_is_seen_and_the_most_urgent_of_it_is_held(lab: Lab) -> None:
    rng, now = random.Random(7), time.time()
    waiting = jobs(lab, MANY, deadline=lambda n: None if n % 2 else now + rng.uniform(100.0, 1e6))
    await lab.send(*waiting)
    async with opened(lab) as hand:
        await seen(lab, DEFAULT_TENANT, MANY)
        await until(lambda: len(hand.waiting()) == HELD_MIN and hand.left() == MANY)
        urgent = sorted(waiting, key=lambda job: job.deadline or 1e18)[:HELD_MIN]
        assert {one.invocation.invocation_id for one in hand.waiting()} == {job.invocation_id for job in urgent}


async def test_what_was_put_aside_comes_back_in_order_and_nothing_is_lost(lab: Lab) -> None:
    rng, now = random.Random(7), time.time()
    waiting = jobs(lab, MANY, deadline=lambda n: now + rng.uniform(100.0, 1e6))
    await lab.send(*waiting)
    async with opened(lab) as hand:
        await seen(lab, DEFAULT_TENANT, MANY)
        taken = []
        for _ in range(MANY):
            taken.append((await take(hand)).invocation_id)
            await asyncio.sleep(0.002)  # what is taken faster than it can come back is taken as it comes
        assert hand.left() == 0
    assert len(set(taken)) == MANY
    places = {job.invocation_id: n for n, job in enumerate(sorted(waiting, key=lambda job: job.deadline or 0.0))}
    assert max(abs(places[identity] - n) for n, identity in enumerate(taken)) < HELD_MIN
    await seen(lab, DEFAULT_TENANT, 0)


async def test_a_hand_that_is_stopped_gives_all_back_at_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobview, "ASIDE_S", 3600.0)
    await lab.send(*jobs(lab, MANY))
    async with opened(lab):
        await seen(lab, DEFAULT_TENANT, MANY)
    async with opened(lab, held_max=2 * MANY) as hand:
        await until(lambda: len(hand.waiting()) == MANY)


async def test_the_jobs_of_one_hide_those_of_no_other(lab: Lab, link: Link) -> None:
    await topology.add_tenant(link, "a")
    await topology.add_tenant(link, "b")
    await lab.send(*jobs(lab, MANY, "a"), *jobs(lab, 1, "b"), *jobs(lab, MANY, "a"))
    async with opened(lab) as hand:
        await seen(lab, "a", 2 * MANY)
        await until(lambda: {one.invocation.tenant for one in hand.waiting()} == {"a", "b"})
        await until(lambda: len(hand.waiting()) == HELD_MIN + 1)


async def test_those_who_have_jobs_share_the_hand(lab: Lab, link: Link) -> None:
    await topology.add_tenant(link, "a")
    await topology.add_tenant(link, "b")
    async with opened(lab, held_max=4 * HELD_MIN) as hand:
        await lab.send(*jobs(lab, MANY, "a"))
        await until(lambda: len(hand.waiting()) == 4 * HELD_MIN)
        await lab.send(*jobs(lab, MANY, "b"))

        def shares() -> list[int]:
            return [sum(one.invocation.tenant == tenant for one in hand.waiting()) for tenant in "ab"]

        await until(lambda: shares() == [2 * HELD_MIN, 2 * HELD_MIN])


# ---------------------------------------------------------------- tenants and consumers


async def consumers(link: Link) -> set[str]:
    return {found.tenant for name in await topology.consumers(link.jetstream()) if (found := jobs_of(name))}


async def test_a_tenant_that_comes_is_served_and_one_that_goes_leaves_nothing(lab: Lab, link: Link) -> None:
    async with opened(lab) as hand:
        assert await consumers(link) == {DEFAULT_TENANT}
        await topology.add_tenant(link, "a")
        await lab.send(*jobs(lab, 1, "a"))
        await until(lambda: bool(hand.waiting()))
        await topology.remove_tenant(link, "a")
        await until(lambda: not hand.waiting())
        while await consumers(link) != {DEFAULT_TENANT}:
            await asyncio.sleep(0.05)


async def test_a_consumer_that_is_gone_is_made_again_and_nothing_is_lost(lab: Lab, link: Link) -> None:
    """As after a power cut, or after its site was removed while the agent could not be heard."""
    async with opened(lab) as hand:
        await topology.remove_site(link, lab.site.name)
        await lab.send(*jobs(lab, 1))
        await until(lambda: len(hand.waiting()) == 1)


async def test_a_hand_without_any_tenant_serves_the_first_that_comes(lab: Lab) -> None:
    hand = JobHand(lab.log, lab.site.name, lambda arrived: None)
    await hand.start()  # nobody is known yet
    await lab.send(*jobs(lab, 1))
    await until(lambda: len(hand.waiting()) == 1, 20)
    await hand.stop()
    await hand.close()


async def until_it_ends(lab: Lab) -> None:
    async with lab.agent("one") as agent:
        await until(lambda: bool(tasks := agent._hand._tasks) and all(task.done() for task in tasks), 20)


async def test_what_ends_the_asking_is_told_to_who_waits_for_jobs(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent ends with it, and is started again; else it would be there and take nothing."""

    async def breaks(hand: JobHand) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(JobHand, "_tend_for_ever", breaks)
    with pytest.raises(RuntimeError, match="broken"):
        await until_it_ends(lab)


def test_names_of_consumers_are_read_as_they_are_made() -> None:
    assert jobs_of(jobs_consumer("my-site", "lab-a")) == ("my-site", "lab-a")
    assert jobs_of(topology.lane_consumer(3, "a")) is None
    assert jobs_of("jobs-lab") is None
    assert topology.lane_of(jobs_consumer("3", "3-a")) is None


async def test_an_upgrade_from_an_undivided_consumer_loses_nothing_and_repeats_little(lab: Lab, link: Link) -> None:
    js = link.jetstream()
    await topology.add_tenant(link, "a")
    await js.add_consumer(
        STREAM,
        ConsumerConfig(
            durable_name="jobs-lab",
            filter_subject="hr.job.lab.*.*.*",
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=ACK_WAIT_S,
            max_ack_pending=1000,
        ),
    )
    waiting = [*jobs(lab, 3), *jobs(lab, 3, "a"), *jobs(lab, 3)]
    await lab.send(*waiting)
    old = await js.pull_subscribe_bind("jobs-lab", STREAM)
    first_four = await old.fetch(4, timeout=5)
    for message in (first_four[0], first_four[1], first_four[3]):
        await message.ack_sync()
    async with opened(lab, 1000) as hand:
        await until(lambda: len(hand.waiting()) == 7)  # the fourth was acknowledged behind one that was not
        found = {one.invocation.invocation_id for one in hand.waiting()}
    assert found == {job.invocation_id for job in waiting[2:]}
    with pytest.raises(NotFoundError):
        await js.consumer_info(STREAM, "jobs-lab")
    async with opened(lab, 1000) as hand:  # and is not done again
        await until(lambda: len(hand.waiting()) == 7)
