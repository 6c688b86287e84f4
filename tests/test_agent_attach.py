"""An agent that starts finds what was submitted before: each job by itself, whatever is wrong with one of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from functions import outcomes
from functions.jobs import payload_of, read_job
from functions.moves import lease
from headrace.errors import Unavailable
from headrace.jobs import JobSpec
from headrace.wire import Invocation
from streams.blobs import FolderBlobs, check_in
from streams.log import Log, Record
from streams.topology import done_subject, fence_subject, job_subject, submit_subject
from tests.agents import Lab, there, until
from tests.sites import shell
from tests.test_agent_local import processes_of
from workers import jobhand
from workers.jobpast import unfinished
from workers.sites.base import Known, SiteConfig, SiteUnreachable, Submission
from workers.sites.local import Local

WAITS = "until [ -e go ]; do sleep 0.05; done"


class Away(FolderBlobs):
    """A store that may not answer."""

    away = False

    async def get(self, digest: str) -> bytes:
        if self.away:
            raise Unavailable("the store does not answer", hint="Try again.")
        return await super().get(digest)


@pytest.fixture
def store(tmp_path: Path) -> Away:
    return Away(tmp_path / "store")


@pytest.fixture
def lab(log: Log, tmp_path: Path, store: Away) -> Lab:
    site = SiteConfig(name="here", kind="local", work=str(tmp_path / "work"), jobs_max=4, settle_s=1.0, unseen_s=2.0)
    lab = Lab(log, site, tmp_path)
    lab.blobs = store
    return lab


async def large(lab: Lab) -> Invocation:
    """Return a job whose specification is kept in the store."""
    spec = JobSpec(executable="/bin/sh", arguments=["-c", WAITS, "x" * 70_000])
    job, body = lab.job(spec, on_failure="mend"), msgspec.json.encode(spec)
    work = msgspec.structs.replace(
        read_job(job), spec=await check_in(msgspec.structs.replace(read_job(job).spec, body=body), lab.blobs)
    )
    return msgspec.structs.replace(job, payload=payload_of(work))


async def submit(lab: Lab, *jobs: Invocation) -> None:
    """Let an agent submit jobs, and be gone."""
    async with lab.agent():
        await lab.send(*jobs)
        for job in jobs:
            await there(lambda job=job: lab.log.last(submit_subject(job.run_id, job.invocation_id, 1, "here")))  # type: ignore[misc]
            await until(lambda job=job: bool(processes_of(job)))  # type: ignore[misc]


def let_go(lab: Lab, job: Invocation) -> None:
    (Path(lab.site.work) / "jobs" / f"{job.invocation_id}-1" / "go").touch()


async def test_a_job_whose_specification_is_gone_is_lost_and_no_other_one_is(lab: Lab, store: Away) -> None:
    gone, other = await large(lab), lab.job(shell(WAITS))
    await submit(lab, gone, other)
    (await store.where(read_job(gone).spec.blob or "")).unlink()
    async with lab.agent():
        end = await lab.end(gone)
        await until(lambda: not processes_of(gone))
        let_go(lab, other)
        assert (await lab.end(other)).state == "completed"
    assert (end.state, end.reason) == ("failed", "lost")
    assert "cannot be read any more" in end.detail
    assert (await unfinished(lab.log, "here")).jobs == []


async def test_a_job_of_a_canceled_run_is_ended_though_its_specification_is_gone(lab: Lab, store: Away) -> None:
    gone = await large(lab)
    await submit(lab, gone)
    (await store.where(read_job(gone).spec.blob or "")).unlink()
    await lab.cancel(gone.run_id)
    async with lab.agent():
        assert (await lab.outcome(gone)).state == "canceled"
    assert not processes_of(gone)


async def test_a_store_that_is_away_keeps_no_other_job_waiting_and_is_asked_again(lab: Lab, store: Away) -> None:
    kept, other = await large(lab), lab.job(shell(WAITS))
    await submit(lab, kept, other)
    store.away = True
    async with lab.agent() as agent:
        let_go(lab, other)
        assert (await lab.end(other)).state == "completed"
        assert agent._attaching.late == {(kept.run_id, kept.invocation_id)}
        store.away = False
        let_go(lab, kept)
        assert (await lab.end(kept)).state == "completed"


@pytest.mark.parametrize("what", ["job", "submit"])
async def test_a_job_that_nobody_can_read_any_more_is_ended_and_no_other_one_is(lab: Lab, what: str) -> None:
    strange, other = lab.job(shell(WAITS)), lab.job(shell(WAITS))
    await submit(lab, strange, other)
    subjects = {
        "job": job_subject("here", "default", strange.run_id, strange.invocation_id),
        "submit": submit_subject(strange.run_id, strange.invocation_id, 1, "here"),
    }
    await lab.log.append([Record(subjects[what], b"\xff")])  # of a release to come
    async with lab.agent():
        outcome = await lab.outcome(strange)
        await until(lambda: not processes_of(strange))
        let_go(lab, other)
        assert (await lab.end(other)).state == "completed"
    assert outcome.error is not None
    assert outcome.error.kind == "unreadable"
    assert (await unfinished(lab.log, "here")).jobs == []


async def send_unreadable(lab: Lab, job: Invocation, holder: str) -> None:
    """Let a job wait that nobody can read, and whose newest lease is a holder's."""
    subject = job_subject("here", "default", job.run_id, job.invocation_id)
    await lab.log.append([lease(job, holder, 1, time.time(), 0)])
    await lab.log.append([Record(subject, b"\xc1 not a message")])


@pytest.mark.parametrize("holder", ["agent/here/", "agent/here/before"])
async def test_a_job_that_has_a_lease_and_that_nobody_can_read_is_ended(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, holder: str
) -> None:
    monkeypatch.setattr(jobhand, "UNREADABLE_DELIVERIES_MAX", 1)
    job, machine = lab.job(shell(WAITS)), Local(lab.site)
    async with lab.agent(opened=lambda _: machine) as agent:
        if holder != "agent/here/":  # it was begun, and no record of that was written
            name = f"{job.invocation_id}-1"
            folder = agent._folders.of(name)
            await machine.submit(Submission(job_id=name, spec=shell(WAITS), folder=folder))
            await until(lambda: bool(processes_of(job)))
        await send_unreadable(lab, job, holder)
        outcome = await lab.outcome(job)
        await until(lambda: not processes_of(job))
    assert outcome.error is not None
    assert outcome.error.kind == "unreadable"


async def test_a_job_of_another_site_by_its_lease_is_not_ended_though_its_old_message_cannot_be_read(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobhand, "UNREADABLE_DELIVERIES_MAX", 1)
    job, other = lab.job(shell("true")), lab.job(shell("true"))
    async with lab.agent() as agent:
        buried: list[bool] = []
        bury = agent._attaching._burial.bury

        async def bury_and_tell(subject: str, at: float) -> None:
            await bury(subject, at)
            buried.append(True)

        monkeypatch.setattr(agent._attaching._burial, "bury", bury_and_tell)
        await send_unreadable(lab, job, "agent/there/x")
        await until(lambda: bool(buried))
        await lab.send(other)
        await lab.end(other)
    assert await lab.count(done_subject(job.run_id, job.invocation_id)) == 0


class Overtaken(Local):
    """A machine that takes a job as somebody else ends that, and that cannot be reached when it is first canceled."""

    lab: Lab
    cancels = 0

    async def submit(self, job: Submission) -> str:
        native_id = await super().submit(job)
        (stored,) = await self.lab.all("hr.job.>")
        newest = await self.lab.log.last(fence_subject(*stored.subject.split(".")[-2:]))
        assert newest is not None
        _, unit = outcomes.unreadable(stored.subject, "w", stored.at, time.time(), newest.seq)
        await self.lab.log.append(unit)
        return native_id

    async def cancel(self, jobs: Sequence[Known]) -> None:
        self.cancels += 1
        if self.cancels == 1:
            raise SiteUnreachable("it does not answer")
        await super().cancel(jobs)


async def test_a_job_that_ended_as_it_was_submitted_is_canceled_until_that_is_done(lab: Lab) -> None:
    machine, job = Overtaken(lab.site), lab.job(shell("sleep 3600"))
    machine.lab = lab
    async with lab.agent(opened=lambda _: machine) as agent:
        await lab.send(job)
        await lab.outcome(job)
        await until(lambda: machine.cancels > 0 and not agent._hand.tries)
        await until(lambda: not processes_of(job), 20.0)
