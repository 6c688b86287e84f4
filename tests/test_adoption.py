"""Jobs that are in no agent's hands: at a site whose agent is silent, and at one for which none ever spoke."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from functions.outlook import NOTHING_KNOWN
from functions.sites import awaited
from headrace.joblog import SiteRecord
from headrace.jobs import JobSpec
from headrace.wire import Invocation, Lease, encode
from infra.embedded import NatsServer
from infra.rights import WORKER
from streams.link import Link, open_link
from streams.log import Log, Record
from streams.tables import SiteTable
from streams.topology import ensure_jobs, job_subject, lease_subject
from tests.agents import Lab, until
from workers.adoption import Adoption
from workers.sites.base import SiteConfig

SILENT_S = 0.3


def lab_of(log: Log, folder: Path, name: str) -> Lab:
    return Lab(log, SiteConfig(name=name, kind="local", work=str(folder / name)), folder)


@pytest.fixture
async def rows(link: Link) -> AsyncIterator[SiteTable]:
    table = SiteTable(link)
    await table.open()
    yield table
    await table.close()


@asynccontextmanager
async def adoption(server: NatsServer, lab: Lab, **settings: Any) -> AsyncIterator[Adoption]:
    """Lend what looks after such jobs, with the rights of a worker."""
    link = await open_link(server.url, user=WORKER, password=server.password(WORKER), name="worker")
    log = Log(link)
    await log.start()
    sites = SiteTable(link)
    await sites.open()
    settings = {"silent_s": SILENT_S, **settings}
    try:
        yield Adoption("w", log, sites, lab.blobs, NOTHING_KNOWN, random.Random(1), **settings)
    finally:
        await sites.close()
        await log.close()
        await link.close()


async def heard(adoption: Adoption, rows: SiteTable, name: str) -> None:
    """Have a site's agent heard just now."""
    before = adoption._sites.items().get(name)
    now = time.time()
    await rows.put(name, SiteRecord(name=name, kind="local", at=now, since=now))
    await until(lambda: adoption._sites.items().get(name) not in (None, before))


async def sites_of(lab: Lab, job: Invocation) -> list[str]:
    """Return the sites at which a job waited."""
    found = await lab.all(job_subject("*", "*", job.run_id, job.invocation_id))
    return [stored.subject.split(".")[2] for stored in sorted(found, key=lambda stored: stored.seq)]


async def test_what_has_not_begun_at_a_site_that_is_silent_goes_where_another_takes_it(
    log: Log, link: Link, nats_server: NatsServer, rows: SiteTable, tmp_path: Path
) -> None:
    """What was begun is its agent's, and what names that site alone waits for it; both until the agent is back."""
    lab = lab_of(log, tmp_path, "lab")
    free, bound, begun = (lab.job(JobSpec(executable="x", sites=sites)) for sites in ([], ["lab"], []))
    late = lab.job(JobSpec(executable="x"), deadline=time.time() - 1.0, on_late="cancel")
    await ensure_jobs(link, "lab")
    await lab.send(free, bound, begun, late)
    lease = Lease(run_id=begun.run_id, invocation_id=begun.invocation_id, attempt=1, worker="agent/lab/x", at=1.0)
    await log.append([Record(lease_subject(begun.run_id, begun.invocation_id), encode(lease))])
    async with adoption(nats_server, lab) as one:
        await heard(one, rows, "lab")
        await heard(one, rows, "other")
        await one.round()
        assert await sites_of(lab, free) == ["lab"]  # its agent was heard
        await asyncio.sleep(SILENT_S)
        await heard(one, rows, "other")
        await one.round()
        assert await sites_of(lab, free) == ["lab", "other"]
        assert (await lab.outcome(late)).state == "canceled"
        for job in (bound, begun):
            assert await sites_of(lab, job) == ["lab"]
    async with adoption(nats_server, lab, work_age_max_s=0.0, silent_s=0.0) as two:
        await two.round()
        told = await lab.outcome(bound)
        assert (told.state, told.error and told.error.kind) == ("dead", "expired")
        assert await sites_of(lab, begun) == ["lab"]
        assert len(await lab.all(f"hr.done.{begun.run_id}.*")) == 0


@pytest.mark.parametrize("holder", ["agent/lab/", "agent/lab/x"])
async def test_a_job_that_was_moved_here_and_that_nobody_can_read_ends_with_its_site(
    log: Log, nats_server: NatsServer, tmp_path: Path, holder: str
) -> None:
    lab = lab_of(log, tmp_path, "lab")
    job = lab.job(JobSpec(executable="x"))
    run, identity = job.run_id, job.invocation_id
    lease = Lease(run_id=run, invocation_id=identity, attempt=1, worker=holder, at=1.0)
    await log.append(
        [
            Record(job_subject("lab", "default", run, identity), b"\xc1 not a message"),
            Record(lease_subject(run, identity), encode(lease)),
        ]
    )
    async with adoption(nats_server, lab) as one:
        await one.look_after(SiteRecord(name="lab", kind="local", at=0.0, since=0.0, ends_at=1.0))
        told = await lab.outcome(job)
    assert (told.state, told.error and told.error.kind) == ("dead", "unreadable")


async def test_a_job_stays_where_it_is_if_it_would_only_wait_elsewhere(
    log: Log, link: Link, nats_server: NatsServer, rows: SiteTable, tmp_path: Path
) -> None:
    lab = lab_of(log, tmp_path, "lab")
    job = lab.job(JobSpec(executable="x"))
    await ensure_jobs(link, "lab")
    await lab.send(job)
    async with adoption(nats_server, lab, silent_s=0.0) as one:
        await heard(one, rows, "lab")
        await rows.put("other", SiteRecord(name="other", kind="local", at=0.0, since=0.0, status="down"))
        await until(lambda: "other" in one._sites.items())
        await one.round()
        assert await sites_of(lab, job) == ["lab"]


async def test_a_job_at_a_site_that_nobody_knows_ends_with_its_time_and_the_site_is_forgotten(
    log: Log, nats_server: NatsServer, rows: SiteTable, tmp_path: Path
) -> None:
    typo = lab_of(log, tmp_path, "typo")
    late, old, waits = (
        typo.job(JobSpec(executable="x", sites=["typo"]), deadline=deadline, on_late="cancel")
        for deadline in (time.time() - 1.0, None, time.time() + 3600.0)
    )
    old = structs.replace(old, sent_at=old.sent_at - 7200.0)
    await rows.create("typo", awaited("typo", time.time()))
    await typo.send(late, old, waits)
    async with (
        adoption(nats_server, typo, forgotten_s=0.0) as one,
        adoption(nats_server, typo, forgotten_s=0.0, work_age_max_s=0.0) as impatient,
    ):
        await one.round()
        assert (await typo.outcome(late)).state == "canceled"
        await one.round()
        assert await sites_of(typo, waits) == ["typo"]
        assert await rows.fetch("typo") is not None
        await impatient.round()
        for job in (old, waits):
            told = await typo.outcome(job)
            assert (told.state, told.error and told.error.kind) == ("dead", "expired")
        assert await rows.fetch("typo") is None
        # Who had seen its row may have sent one more.
        await until(lambda: "typo" not in one._sites.items())
        more = typo.job(JobSpec(executable="x", sites=["typo"]))
        await typo.send(more)
        await one.round()
        assert await rows.fetch("typo") is not None
        assert await sites_of(typo, more) == ["typo"]
        assert await typo.count(f"hr.done.{more.run_id}.*") == 0


async def test_a_job_that_names_an_unknown_site_beside_another_goes_there_once_that_is_back(
    log: Log, nats_server: NatsServer, rows: SiteTable, tmp_path: Path
) -> None:
    typo = lab_of(log, tmp_path, "typo")
    job = typo.job(JobSpec(executable="x", sites=["typo", "lab"]))
    await rows.create("typo", awaited("typo", time.time()))
    await typo.send(job)
    async with adoption(nats_server, typo) as one:
        await one.round()
        assert await sites_of(typo, job) == ["typo"]
        await heard(one, rows, "lab")
        await one.round()
        assert await sites_of(typo, job) == ["typo", "lab"]
