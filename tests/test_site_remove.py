"""A site that is no more is removed by an operator: not while it works, and not with jobs unless he says so."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec import structs

from functions.sites import awaited
from headrace import Client
from headrace.errors import BadName, Conflict, NotFound
from headrace.joblog import SiteRecord, Submitted
from headrace.jobs import JobSpec
from headrace.wire import Lease, encode
from infra.embedded import NatsServer
from infra.removal import JobsThere, Remover, removal
from infra.rights import ADMIN
from infra.settings import Settings
from streams import topology
from streams.link import Link
from streams.log import Log, Record
from streams.tables import SiteTable
from streams.topology import JobsOf, cancel_subject, job_subject, jobs_of, lease_subject, submit_subject
from tests.agents import Lab
from tests.platforms import UpProcess
from tests.processes import wait_until
from workers.sites.base import SiteConfig


@pytest.fixture
def lab(log: Log, tmp_path: Path) -> Lab:
    site = SiteConfig(name="lab", kind="local", work=str(tmp_path / "work"), jobs_max=2, settle_s=1.0, unseen_s=2.0)
    return Lab(log, site, tmp_path)


@pytest.fixture
def settings(nats_server: NatsServer, tmp_path: Path) -> Settings:
    return Settings(
        data_dir=tmp_path,
        nats_url=nats_server.url,
        nats_user=ADMIN,
        nats_password_file=nats_server.password_file(ADMIN),
    )


@pytest.fixture
async def remover(settings: Settings, link: Link) -> AsyncIterator[Remover]:
    """Return what removes sites of which nothing is heard for a moment."""
    async with removal(settings, silent_s=0.0) as opened:
        yield opened


@pytest.fixture
async def rows(link: Link) -> AsyncIterator[SiteTable]:
    table = SiteTable(link)
    await table.open()
    yield table
    await table.close()


async def silent(rows: SiteTable, link: Link, name: str) -> None:
    """Have a site that has no agent any more."""
    await rows.put(name, SiteRecord(name=name, kind="local", at=time.time(), since=time.time()))
    await topology.ensure_jobs(link, name)


async def consumers(link: Link) -> set[JobsOf]:
    return {found for name in await topology.consumers(link.jetstream()) if (found := jobs_of(name))}


async def test_a_site_that_is_silent_and_has_no_jobs_is_removed_with_its_consumers(
    remover: Remover, rows: SiteTable, link: Link
) -> None:
    await topology.add_tenant(link, "a")
    await silent(rows, link, "lab")
    await silent(rows, link, "other")
    assert await remover.remove("lab", force=False) == JobsThere()
    assert await rows.fetch("lab") is None
    assert await rows.fetch("other") is not None
    assert await consumers(link) == {JobsOf("other", "default"), JobsOf("other", "a")}
    with pytest.raises(NotFound, match="there is no site lab"):
        await remover.remove("lab", force=True)
    with pytest.raises(BadName):
        await remover.remove("no.dots", force=True)


async def test_a_site_whose_agent_is_heard_is_not(
    remover: Remover, settings: Settings, rows: SiteTable, lab: Lab
) -> None:
    async with lab.agent():
        job = lab.job(JobSpec(executable="/bin/true"))
        await lab.send(job)
        await lab.end(job)
        before = await rows.fetch("lab")
        assert before is not None
        with pytest.raises(Conflict, match="the agent of lab is at work"):
            await remover.remove("lab", force=True)
    async with removal(settings) as patient:
        with pytest.raises(Conflict, match="was heard"):
            await patient.remove("lab", force=True)
    assert await rows.fetch("lab") is not None


async def test_a_site_with_jobs_is_not_unless_they_shall_be_taken_from_it(
    remover: Remover, rows: SiteTable, link: Link, lab: Lab
) -> None:
    """One that may run elsewhere goes there; one that may not has failed; one that was begun is lost."""
    await silent(rows, link, "lab")
    await silent(rows, link, "other")
    free, bound, begun, canceled = (lab.job(JobSpec(executable="x", sites=sites)) for sites in ([], ["lab"], [], []))
    await lab.send(free, bound, begun, canceled)
    await lab.cancel(canceled.run_id)
    run, identity = begun.run_id, begun.invocation_id
    lease = Lease(run_id=run, invocation_id=identity, attempt=1, worker="agent/lab/x", at=1.0)
    submitted = Submitted(
        run_id=run, invocation_id=identity, site="lab", attempt=1, native_id="42", at=1.0, agent="agent/lab/x"
    )
    await lab.log.append([Record(lease_subject(run, identity), encode(lease))])
    await lab.log.append([Record(submit_subject(run, identity, 1, "lab"), encode(submitted))])
    with pytest.raises(Conflict, match="2 jobs wait for lab, and 1 submitted there have not ended"):
        await remover.remove("lab", force=False)
    row = await rows.fetch("lab")
    assert row is not None
    assert row.ends_at is None

    assert await remover.remove("lab", force=True) == JobsThere(waiting=2, submitted=1)
    assert await rows.fetch("lab") is None
    assert {found.site for found in await consumers(link)} == {"other"}
    assert await lab.count(job_subject("other", "*", free.run_id, "*")) == 1
    failed = await lab.outcome(bound)
    assert (failed.state, failed.error and failed.error.kind) == ("dead", "site_ended")
    lost = await lab.outcome(begun)
    assert (lost.state, lost.error and lost.error.kind, lost.job and lost.job.native_id) == ("dead", "lost", "42")
    assert await lab.log.last(cancel_subject(canceled.run_id, "*")) is not None


async def test_a_job_that_no_site_takes_has_failed_then(
    remover: Remover, rows: SiteTable, link: Link, lab: Lab
) -> None:
    await silent(rows, link, "lab")
    job = lab.job(JobSpec(executable="x"), on_failure="mend")
    await lab.send(job)
    await remover.remove("lab", force=True)
    assert (await lab.end(job)).reason == "site_ended"


async def test_a_site_that_nobody_ever_knew_is_removed_with_the_jobs_that_name_it(
    settings: Settings, rows: SiteTable, lab: Lab
) -> None:
    await rows.create("lab", awaited("lab", time.time()))
    job = lab.job(JobSpec(executable="x", sites=["lab"]), on_failure="mend")
    await lab.send(job)
    async with removal(settings) as patient:  # no agent is there that could be heard
        await patient.remove("lab", force=True)
    assert (await lab.end(job)).reason == "site_ended"
    assert await rows.fetch("lab") is None


async def test_an_agent_that_begins_while_its_site_is_removed_keeps_its_jobs(
    remover: Remover, rows: SiteTable, link: Link, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    await silent(rows, link, "lab")
    job = lab.job(JobSpec(executable="x", sites=["lab"]))
    await lab.send(job)
    put, run, identity = remover._tables.sites.put, job.run_id, job.invocation_id
    lease = Lease(run_id=run, invocation_id=identity, attempt=1, worker="agent/lab/x", at=1.0)

    async def put_and_begin(name: str, row: SiteRecord) -> None:
        await put(name, row)
        await put(name, structs.replace(row, agent="agent/lab/x", ends_at=None, accepts=True, at=time.time()))
        await lab.log.append([Record(lease_subject(run, identity), encode(lease))])

    monkeypatch.setattr(remover._tables.sites, "put", put_and_begin)
    with pytest.raises(Conflict, match="an agent of lab has begun meanwhile"):
        await remover.remove("lab", force=True)
    assert await lab.count(f"hr.done.{run}.*") == 0
    row = await rows.fetch("lab")
    assert row is not None
    assert row.agent == "agent/lab/x"


async def test_a_site_is_back_where_its_agent_comes_back(
    remover: Remover, rows: SiteTable, link: Link, lab: Lab
) -> None:
    await silent(rows, link, "lab")
    await remover.remove("lab", force=False)
    async with lab.agent():
        job = lab.job(JobSpec(executable="/bin/true"))
        await lab.send(job)
        assert (await lab.end(job)).state == "completed"
        row = await rows.fetch("lab")
        assert row is not None
        assert row.ends_at is None


def headrace(platform: UpProcess, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a server command beside a running platform, as an operator does from a second terminal."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "infra", "site", *words, "--data", str(platform.data)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_site_that_works_is_refused_with_what_to_do(platform: UpProcess) -> None:
    with Client(platform.url, platform.token) as client:
        wait_until(lambda: [site.name for site in client.sites()] == ["local"], 30)
    refused = headrace(platform, "remove", "local")
    assert refused.returncode == 2
    assert "the agent of local is at work" in refused.stderr
    assert "Stop it first" in refused.stderr
    unknown = headrace(platform, "remove", "nowhere")
    assert unknown.returncode == 2
    assert "there is no site nowhere" in unknown.stderr
