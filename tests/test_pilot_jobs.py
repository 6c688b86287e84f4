"""Jobs at a site that ends: what it does not begin goes elsewhere, what was lost is told, and the site is forgotten."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec import structs

from functions.jobs import payload_of, read_job
from functions.moves import over
from functions.outlook import NOTHING_KNOWN
from headrace.joblog import SiteRecord, Submitted
from headrace.jobs import JobSpec
from headrace.wire import Invocation, decode
from infra.embedded import NatsServer
from infra.rights import WORKER
from streams.link import open_link
from streams.log import Log
from streams.tables import SiteTable
from streams.topology import STREAM, consumers, job_subject, jobs_consumer, jobs_of, remove_site, submit_subject
from tests.agents import AgentProcess, Lab, there, until
from tests.sites import shell
from workers.adoption import Adoption
from workers.jobpast import past_of
from workers.sites.base import SiteConfig


@pytest.fixture
def here(log: Log, tmp_path: Path) -> Lab:
    """A site that stays."""
    return Lab(log, config(tmp_path, "here"), tmp_path)


def config(folder: Path, name: str, **fields: object) -> SiteConfig:
    site = SiteConfig(name=name, kind="local", work=str(folder / name), jobs_max=1, settle_s=0.5, unseen_s=2.0)
    return structs.replace(site, duration_s=5.0, **fields)


def pilot(log: Log, folder: Path, left_s: float) -> Lab:
    return Lab(log, config(folder, "pilot"), folder, ends_at=time.time() + left_s)


@asynccontextmanager
async def adoption(server: NatsServer, lab: Lab, *, forgotten_s: float = 600.0) -> AsyncIterator[Adoption]:
    """Lend what looks after sites that have ended, with the rights of a worker."""
    link = await open_link(server.url, user=WORKER, password=server.password(WORKER), name="worker")
    log = Log(link)
    await log.start()
    sites = SiteTable(link)
    await sites.open()
    try:
        yield Adoption(
            "w",
            log,
            sites,
            lab.blobs,
            NOTHING_KNOWN,
            random.Random(1),
            grace_s=0.0,
            forgotten_s=forgotten_s,
        )
    finally:
        await sites.close()
        await log.close()
        await link.close()


async def ended(lab: Lab) -> None:
    """Let the time of a pilot be over for all who read its row; whoever wrote that is gone."""
    sites = SiteTable(lab.log.link)
    await sites.open()
    row = await there(lambda: sites.fetch(lab.site.name))
    await sites.put(row.name, structs.replace(row, ends_at=time.time() - 1.0))
    await sites.close()


def lengthy(job: Invocation) -> Invocation:
    """Return a job that may take longer than a pilot has."""
    return structs.replace(job, payload=payload_of(structs.replace(read_job(job), limit_s=7200.0)))


async def waited_at(lab: Lab, job: Invocation) -> list[str]:
    """Return the sites at which a job waited."""
    stored = await lab.all(job_subject("*", "*", job.run_id, job.invocation_id))
    return [read_job(decode(one.body, Invocation)).site for one in sorted(stored, key=lambda one: one.seq)]


async def test_what_does_not_fit_into_what_is_left_goes_elsewhere_at_once(here: Lab, log: Log, tmp_path: Path) -> None:
    short = pilot(log, tmp_path, 3600.0)
    job = lengthy(short.job(shell("exit 0"), then="collect"))
    fits = short.job(shell("exit 0"), then="collect")
    async with here.agent(), short.agent():
        await short.send(job, fits)
        assert (await here.end(job)).site == "here"
        assert (await short.end(fits)).site == "pilot"
    outcome = await here.outcome(job)
    assert outcome.job is not None
    (move,) = outcome.job.moves
    assert (move.site, outcome.attempts) == ("pilot", 1)
    assert "the job may take longer" in move.why
    # Where the time went sums to the whole, with what it waited at the other site.
    assert outcome.spent.total_s() == pytest.approx(outcome.ended_at - outcome.accepted_at, rel=0.01, abs=0.01)


async def test_a_pilot_that_stops_hands_on_what_waits(here: Lab, log: Log, tmp_path: Path) -> None:
    short, marker = pilot(log, tmp_path, 3600.0), tmp_path / "runs"
    first, *others = (short.job(shell(f"echo x >>{marker}; sleep 1"), then="collect") for _ in range(4))
    async with here.agent():
        async with short.agent():
            await short.send(first)
            await there(lambda: log.last(submit_subject(first.run_id, first.invocation_id, "*", "*")))
            await short.send(*others)
        assert [(await here.end(job)).site for job in others] == ["here"] * 3
    assert (await here.end(first)).site == "pilot"  # it was through in the time in which a pilot drains
    assert marker.read_text() == "x\n" * 4
    assert await waited_at(here, others[0]) == ["pilot", "here"]


async def test_a_pilot_hands_nothing_on_to_a_site_that_is_away(here: Lab, log: Log, tmp_path: Path) -> None:
    """It would only wait there; where it is, whoever comes first takes it to the first site that takes it."""
    short = pilot(log, tmp_path, 3600.0)
    job = lengthy(short.job(shell("exit 0"), then="collect"))
    sites = SiteTable(log.link)
    await sites.open()
    await sites.put("here", SiteRecord(name="here", kind="local", at=0.0, since=0.0, status="down"))
    await sites.close()
    async with short.agent():
        await short.send(job)
    assert await waited_at(here, job) == ["pilot"]


async def test_what_is_left_of_a_pilot_that_died_is_looked_after_once(
    here: Lab, log: Log, nats_server: NatsServer, tmp_path: Path
) -> None:
    short = pilot(log, tmp_path, 3600.0)
    again = JobSpec(executable="/bin/sleep", arguments=["60"], retries=1)
    lost = short.job(again, then="collect")
    process = AgentProcess(short, nats_server, tmp_path)
    try:
        await short.send(lost)
        found = await there(lambda: log.last(submit_subject(lost.run_id, lost.invocation_id, "*", "*")))
        waits = short.job(shell("exit 0"), then="collect")
        named = short.job(structs.replace(shell("exit 0"), sites=["pilot"]), then="collect", on_failure="mend")
        await short.send(waits, named)
    finally:
        process.kill()
    assert decode(found.body, Submitted).site == "pilot"
    async with here.agent(), adoption(nats_server, here) as one, adoption(nats_server, here, forgotten_s=0.0) as two:
        await one.round()  # it has not ended
        assert await waited_at(here, waits) == ["pilot"]
        await ended(short)
        await until(lambda: (one._sites.items()["pilot"].ends_at or time.time()) < time.time())
        await one.round()
        await one.round()
        assert await waited_at(here, waits) == ["pilot", "here"]
        assert await waited_at(here, named) == ["pilot"]  # another one of the name may come
        assert await waited_at(here, lost) == ["pilot", "here"]
        assert (await past_of(log, "here", lost.run_id, lost.invocation_id)).attempt == 2
        assert (await here.end(waits)).site == "here"
        await two.round()
        await two.round()
        end = await here.end(named)
        assert (end.state, end.reason, end.detail) == ("failed", "site_ended", "pilot: it has ended")
        assert "pilot" not in two._sites.items()
        left = [jobs_of(name) for name in await consumers(log.link.jetstream())]
        assert {each.site for each in left if each is not None} == {"here"}
        await here.cancel(lost.run_id)


async def test_who_finds_the_old_message_of_a_moved_job_lets_go_of_it(here: Lab, log: Log, tmp_path: Path) -> None:
    short, marker = pilot(log, tmp_path, 3600.0), tmp_path / "runs"
    job = lengthy(short.job(shell(f"echo x >>{marker}"), then="collect"))
    async with here.agent():
        pass  # it has a row now, and takes nothing
    async with short.agent():
        await short.send(job)
        await there(lambda: log.last(job_subject("here", "*", job.run_id, job.invocation_id)))
    await remove_site(log.link, "pilot")  # and with it the memory of what was acknowledged

    async def over_again() -> bool | None:
        info = await log.link.jetstream().consumer_info(STREAM, jobs_consumer("pilot", "default"))
        return (info.num_pending == 0 and info.num_ack_pending == 0) or None

    short.ends_at = time.time() + 100_000.0  # it would fit by now
    async with short.agent():
        await there(over_again)
        assert await log.count(job_subject("*", "*", job.run_id, job.invocation_id)) == 2
        async with here.agent():
            assert (await here.end(job)).site == "here"
    assert marker.read_text() == "x\n"


def test_nothing_is_moved_to_a_site_that_ends() -> None:
    row = SiteRecord(name="p", kind="local", at=0.0, since=0.0, ends_at=10.0)
    assert over([row], 9.0) == {}
    assert over([structs.replace(row, accepts=False)], 9.0) == {"p": "it ends"}
    assert over([row], 10.0) == {"p": "it has ended"}
    assert over([structs.replace(row, ends_at=None, accepts=False)], 10.0) == {}
