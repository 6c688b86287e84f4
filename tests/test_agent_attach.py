"""An agent that starts finds what was submitted before: each job by itself, whatever is wrong with one of them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from functions.jobs import payload_of, read_job
from headrace.errors import Unavailable
from headrace.jobs import JobSpec
from headrace.wire import Invocation
from streams.blobs import FolderBlobs, check_in
from streams.log import Log, Record
from streams.topology import job_subject, submit_subject
from tests.agents import Lab, there, until
from tests.sites import shell
from tests.test_agent_local import processes_of
from workers.jobpast import unfinished
from workers.sites.base import SiteConfig

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
