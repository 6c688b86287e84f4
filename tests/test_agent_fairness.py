"""Where a site has fewer places than there are jobs: whose is next, and which. Real processes, and a real log."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from headrace.joblog import Submitted
from headrace.wire import Invocation, Slot, decode
from streams import topology
from streams.follow import follow
from streams.link import Link
from streams.log import Log
from streams.topology import job_subject, submit_subject
from tests.agents import Lab, there
from tests.sites import shell
from workers.sites.base import SiteConfig

PLACES = 2
QUEUED = 3000
SOON = 200  # of 3,000: so many go before at most, while the queue is being looked through


@pytest.fixture
async def lab(log: Log, link: Link, tmp_path: Path) -> Lab:
    for tenant in ("a", "b"):
        await topology.add_tenant(link, tenant)
    site = SiteConfig(
        name="here", kind="local", work=str(tmp_path / "work"), jobs_max=PLACES, settle_s=1.0, unseen_s=2.0
    )
    return Lab(log, site, tmp_path)


async def submitted(lab: Lab, job: Invocation) -> int:
    """Return where in the log it stands that a job was submitted, once it does."""

    async def look() -> int | None:
        found = await lab.log.last(submit_subject(job.run_id, job.invocation_id, "*", "*"))
        return None if found is None else found.seq

    return await there(look)


async def order(lab: Lab, count: int) -> list[tuple[int, str]]:
    """Return where in the log the first submissions stand, and of which jobs."""
    found: list[tuple[int, str]] = []
    batches = follow(lab.log, [submit_subject("*", "*", "*", "*")], after=0)
    async for batch in batches:
        found += [(stored.seq, decode(stored.body, Submitted).invocation_id) for stored in batch]
        if len(found) >= count:
            break
    await batches.aclose()
    return found[:count]


def quick(lab: Lab, tenant: str, count: int) -> list[Invocation]:
    return [lab.job(shell("sleep 0.05"), tenant=tenant) for _ in range(count)]


async def ahead(lab: Lab, job: Invocation) -> int:
    """Return how many jobs were submitted between the moment a job began to wait and its own submission."""
    last = await submitted(lab, job)
    sent = await lab.log.last(job_subject("*", "*", job.run_id, job.invocation_id))
    assert sent is not None
    number = await lab.count(submit_subject("*", "*", "*", "*"))
    return sum(sent.seq < seq < last for seq, _ in await order(lab, number))


async def test_another_tenants_job_is_next_though_thousands_wait_before_it(lab: Lab) -> None:
    await lab.send(*quick(lab, "a", QUEUED))
    async with lab.agent():
        await order(lab, 10)
        one = lab.job(shell("true"), tenant="b")
        await lab.send(one)
        assert await ahead(lab, one) <= 5 * PLACES


async def test_what_is_due_first_does_not_wait_for_thousands_of_the_same_tenant(lab: Lab) -> None:
    await lab.send(*quick(lab, "a", QUEUED))
    urgent = lab.job(shell("true"), tenant="a", deadline=time.time() + 600.0)
    await lab.send(urgent)
    async with lab.agent():
        assert await ahead(lab, urgent) <= SOON


async def test_two_who_have_many_get_as_many_places(lab: Lab) -> None:
    await lab.send(*quick(lab, "a", 200))
    await lab.send(*quick(lab, "b", 40))
    async with lab.agent():
        first = [identity for _, identity in await order(lab, 24)]
        who = {s.subject.split(".")[5]: s.subject.split(".")[3] for s in await lab.all(job_subject("*", "*", "*", "*"))}
    assert 9 <= sum(who[identity] == "b" for identity in first) <= 15


async def test_an_ensemble_leaves_a_place_for_anothers_single_job(lab: Lab) -> None:
    members = [
        lab.job(shell("sleep 0.05"), run="ensemble", tenant="a", slot=Slot(scope="s", index=n, size=100))
        for n in range(100)
    ]
    one = lab.job(shell("true"), tenant="b")
    await lab.send(*members, one)
    async with lab.agent():
        await submitted(lab, one)
        assert one.invocation_id in [identity for _, identity in await order(lab, 2 * PLACES)]


async def test_the_jobs_of_a_tenant_that_comes_while_the_agent_works_are_run(lab: Lab, link: Link) -> None:
    async with lab.agent():
        await topology.add_tenant(link, "late")
        job = lab.job(shell("true"), tenant="late")
        await lab.send(job)
        assert (await lab.end(job)).state == "completed"


async def test_the_places_of_a_canceled_run_are_given_to_what_waits(lab: Lab) -> None:
    held = [lab.job(shell("sleep 60"), run="canceled", tenant="a") for _ in range(PLACES)]
    async with lab.agent():
        await lab.send(*held)
        for job in held:
            await submitted(lab, job)
        waiting = lab.job(shell("true"), tenant="a")
        await lab.send(waiting)
        await lab.cancel("canceled")
        assert (await lab.end(waiting)).state == "completed"
