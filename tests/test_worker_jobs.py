"""Functions that submit batch jobs, on a real log and with a real worker; the site is played by the test."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from functions import jobs
from functions.jobs import JobTried
from functions.outcomes import World
from functions.sites import awaited, is_awaited, seen
from headrace.joblog import SiteRecord, Submitted
from headrace.jobs import JobEnd, JobSpec
from headrace.wire import Cancel, Invocation, Payload, decode, encode
from streams.blobs import check_out
from streams.follow import follow
from streams.link import Link
from streams.log import Log, Record
from streams.record import view
from streams.topology import (
    cancel_subject,
    ensure_jobs,
    fence_subject,
    job_subject,
    jobs_consumer,
    submit_subject,
)
from tests.test_worker import Platform, working
from workers.commits import Commits
from workers.joins import Joins

LAB = SiteRecord(name="lab", kind="slurm", at=0.0, since=0.0, gpus_total=8, gpus_free=8, nodes_total=4, nodes_free=4)

How = Callable[[JobSpec], JobEnd]


def completes(spec: JobSpec) -> JobEnd:
    return JobEnd(exit_code=0, outputs={name: f"blob:{name}" for name in spec.outputs})


class Site:
    """Takes jobs as they come, and ends each at once."""

    def __init__(self, platform: Platform, how: How) -> None:
        self._platform = platform
        self._log = platform.log
        self._how = how
        self.seen: list[Invocation] = []

    async def run(self) -> None:
        commits = Commits(self._log, Joins(self._log), time.time)
        async with aclosing(follow(self._log, [job_subject("lab", "*", "*", "*")], after=0)) as batches:
            async for batch in batches:
                taken = [(decode(stored.body, Invocation), stored.at) for stored in batch]
                self.seen += [job for job, _ in taken]
                await asyncio.gather(*(self._end(job, at, commits) for job, at in taken))

    async def _end(self, job: Invocation, queued_at: float, commits: Commits) -> None:
        run, identity = job.run_id, job.invocation_id
        if await self._log.last(cancel_subject(run, "*")) is not None:
            return
        now = time.time()
        submitted = Submitted(
            run_id=run, invocation_id=identity, site="lab", attempt=1, native_id=identity[:4], at=now, agent="agent/lab"
        )
        subject = submit_subject(run, identity, 1, "lab")
        await self._log.append([Record(subject, encode(submitted), fence_subject(run, identity))])
        tried = JobTried(
            attempt=1,
            agent="agent/lab",
            queued_at=queued_at,
            submitted_at=now,
            started_at=now,
            job_ended_at=now,
            ended_at=time.time(),
        )
        spec = jobs.spec_of(await self._whole(job))
        end = structs.replace(
            self._how(spec), job_id=identity, site="lab", native_id=identity[:4], time_s=jobs.times(tried)
        )
        world = World(function=lambda name: None, routes=[], now=time.time())
        await commits.commit(*jobs.ended(job, end, tried, world, jobs.told(end)))

    async def _whole(self, job: Invocation) -> Payload:
        work = jobs.read_job(job)
        return structs.replace(work.spec, body=await check_out(work.spec, self._platform.blobs))


@asynccontextmanager
async def site(platform: Platform, how: How = completes) -> AsyncIterator[Site]:
    """Have a site at work, and known."""
    await platform.tables.sites.put("lab", structs.replace(LAB, at=time.time()))
    played = Site(platform, how)
    task = asyncio.create_task(played.run())
    yield played
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


@pytest.fixture
async def platform(log: Log, link: Link, tmp_path: Path) -> AsyncIterator[Platform]:
    async with working(log, link, tmp_path) as running:
        yield running


PROGRAM = """
    from headrace import JobEnd, JobSpec, Resources
    def prepare(n, ctx):
        ctx.submit(JobSpec(executable="md", arguments=[str(n)], outputs=["energy"]), then="collect", on_failure="mourn")
    def campaign(n, ctx):
        specs = (JobSpec(executable="md", arguments=[str(i)]) for i in range(n))
        ctx.submit_many(specs, then="count", on_failure="mourn")
    def alone(n, ctx):
        ctx.submit(JobSpec(executable="md", environment={"PADDING": "x" * n}))
    def far(site, ctx):
        ctx.submit(JobSpec(executable="md", sites=[site] if site else [], resources=Resources(gpu_cores_per_process=4)))
    def collect(end: JobEnd):
        return [end.site, end.state, end.outputs]
    def mourn(end: JobEnd):
        return [end.reason, end.exit_code]
    def count(ends):
        return [len(ends), sum(isinstance(end, dict) and end["state"] == "completed" for end in ends), ends[:2]]
"""


async def test_a_job_that_a_function_submits_is_followed_by_what_it_asked_for(platform: Platform) -> None:
    await platform.deploy(PROGRAM)
    async with site(platform) as lab:
        run = await platform.trigger("prepare", 7)
        assert await platform.answer(run) == ["lab", "completed", {"energy": "blob:energy"}]
    assert len(lab.seen) == 1
    record, invocations = await platform.state(run)
    shown = view(record, invocations)
    assert [i.function for i in shown.invocations] == ["prepare", "collect"]
    assert [(job.site, job.state, job.exit_code) for job in shown.jobs] == [("lab", "completed", 0)]
    assert shown.jobs[0].job_id == lab.seen[0].invocation_id
    assert record.spent.total_s() == pytest.approx((record.answered_at or 0) - record.accepted_at, rel=0.01)


async def test_a_thousand_jobs_end_together_and_each_failed_one_was_taken_care_of(platform: Platform) -> None:
    await platform.deploy(PROGRAM)

    def how(spec: JobSpec) -> JobEnd:
        if int(spec.arguments[0]) % 100 == 1:
            return JobEnd(state="failed", reason="node_failure", exit_code=None)
        return completes(spec)

    async with site(platform, how) as lab:
        run = await platform.trigger("campaign", 1000)
        async with asyncio.timeout(60):
            await platform.ended(run, 60.0)
        answer: Any = await platform.answer(run)
    assert answer[:2] == [1000, 990]
    assert answer[2][0]["state"] == "completed"
    assert answer[2][1] == ["node_failure", None]
    assert len({job.invocation_id for job in lab.seen}) == len(lab.seen) == 1000
    record, _ = await platform.state(run)
    assert record.jobs == 1000


async def test_a_job_that_fails_without_on_failure_fails_its_run_with_the_reason(platform: Platform) -> None:
    await platform.deploy(PROGRAM)
    async with site(platform, lambda spec: JobEnd(state="failed", reason="out_of_memory")):
        run = await platform.trigger("alone", 1)
        record = await platform.ended(run)
    assert record.state == "failed"
    assert record.error is not None
    assert record.error.kind == "out_of_memory"
    assert record.dead == 1


async def test_a_large_specification_travels_by_claim_check(platform: Platform) -> None:
    await platform.deploy(PROGRAM)
    lengths: list[int] = []

    def how(spec: JobSpec) -> JobEnd:
        lengths.append(len(spec.environment["PADDING"]))
        return completes(spec)

    async with site(platform, how):
        await platform.answer(await platform.trigger("alone", 100_000))
    assert lengths == [100_000]


async def test_where_no_site_can_run_a_job_its_function_fails_and_says_why(platform: Platform) -> None:
    await platform.deploy(PROGRAM)
    await platform.tables.sites.put("small", structs.replace(LAB, name="small", at=time.time(), gpus_total=1))
    record = await platform.ended(await platform.trigger("far", ""))
    assert record.state == "failed"
    assert record.error is not None
    assert "small: it has 1 GPUs, and the job takes 4" in record.error.message
    assert record.jobs == 0


async def test_a_job_that_names_no_site_waits_for_one_that_is_away(platform: Platform) -> None:
    """An agent that is restarted, or a controller that is, costs no run its life."""
    await platform.deploy(PROGRAM)
    await platform.tables.sites.put("lab", structs.replace(LAB, at=time.time(), status="down", detail="no controller"))
    run = await platform.trigger("far", "")
    async with asyncio.timeout(20):
        while not (await platform.state(run))[0].jobs:
            await asyncio.sleep(0.01)
    async with site(platform):
        assert (await platform.ended(run)).state == "succeeded"


async def test_a_site_that_nobody_knows_has_a_row_once_a_job_waits_for_it(platform: Platform) -> None:
    await platform.deploy(PROGRAM)
    run = await platform.trigger("far", "typo")
    async with asyncio.timeout(20):
        while not (await platform.state(run))[0].jobs:
            await asyncio.sleep(0.01)
    row = await platform.tables.sites.fetch("typo")
    assert row is not None
    assert is_awaited(row)
    # Its agent is the first who says how it is.
    told = seen(structs.replace(LAB, name="typo", at=time.time()), row)
    assert (told.status, told.kind, told.incidents) == ("up", "slurm", [])


async def test_not_more_sites_are_waited_for_than_anybody_could_mean(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.placing.AWAITED_MAX", 1)
    await platform.deploy(PROGRAM)
    await platform.tables.sites.create("one", awaited("one", time.time()))
    record = await platform.ended(await platform.trigger("far", "two"))
    assert record.error is not None
    assert "site two is not known" in record.error.message
    assert "two" not in platform.tables.sites.items()


async def test_a_job_waits_for_the_site_that_it_names(platform: Platform, link: Link) -> None:
    await platform.deploy(PROGRAM)
    run = await platform.trigger("far", "lab")
    async with asyncio.timeout(20):
        while not (await platform.state(run))[0].jobs:
            await asyncio.sleep(0.01)
    await ensure_jobs(link, "lab")
    await ensure_jobs(link, "lab")
    info = await link.jetstream().consumer_info("HEADRACE", jobs_consumer("lab", "default"))
    assert info.num_pending == 1  # it is there for the first agent that comes
    async with site(platform):
        assert (await platform.ended(run)).state == "succeeded"


async def test_what_is_not_submitted_when_its_run_is_canceled_is_dropped(platform: Platform) -> None:
    await platform.deploy(PROGRAM)
    run = await platform.trigger("far", "lab")
    async with asyncio.timeout(20):
        while not (await platform.state(run))[0].jobs:
            await asyncio.sleep(0.01)
    wish = Cancel(run_id=run, at=time.time())
    await platform.log.append([Record(cancel_subject(run), encode(wish), cancel_subject(run))])
    async with site(platform) as lab:
        async with asyncio.timeout(20):
            while not lab.seen:
                await asyncio.sleep(0.01)
    (job,) = view(*await platform.state(run)).jobs
    assert (job.state, job.native_id) == ("canceled", None)
