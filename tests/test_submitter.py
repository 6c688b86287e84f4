"""From jobs that are ready to native ids, on LSF's commands: what differs in little is one array there, too."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kinds import Faked, Kind, named_kind
from tests.sites import ended, known, shell, submission
from tests.test_sites_trouble import dies_as_it_looks
from workers.jobpast import JobPast
from workers.sites import open_site
from workers.sites.base import BatchSystem
from workers.sites.records import Records
from workers.submitting import Submitter

BEGUN = JobPast(fence=1)  # somebody had a lease


@pytest.fixture
def kind(tmp_path: Path) -> Kind:
    return Faked("lsf", tmp_path)


@pytest.fixture
def site(kind: Kind) -> BatchSystem:
    return open_site(kind.config)


@pytest.mark.parametrize("name", ["slurm", "pbs", "lsf"])
async def test_jobs_of_one_shape_are_one_array_whose_members_are_found_again(
    request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    kind = named_kind(request, name, tmp_path)
    site = open_site(kind.config)
    submitter = Submitter(site, tmp_path)
    jobs = [submission(tmp_path, f"{name}-alike{i}", shell(f"exit {i}")) for i in range(3)]
    kind.hold()
    told = await submitter.submit(jobs)
    for job in jobs:
        (job.folder / ".headrace" / "native").unlink()  # as if the agent had been killed a moment earlier
    again = Submitter(site, tmp_path)
    found = {job.job_id: await again.find(job.job_id, job.folder) for job in jobs}
    assert found == told
    kind.release()
    asked = [known(job, str(told[job.job_id])) for job in jobs]
    ends = await ended(site, *asked)
    assert [ends[job.job_id].exit_code for job in jobs] == [0, 1, 2]
    (array,) = tmp_path.glob("hr-*")
    assert kind.named(array.name) == 3
    gc.collect()
    assert not submitter._turns  # nothing is kept of what was submitted


async def test_a_job_of_unknown_fate_is_not_clear_before_it_can_no_longer_come(
    kind: Kind, site: BatchSystem, tmp_path: Path
) -> None:
    submitter = Submitter(site, tmp_path)
    job = submission(tmp_path, "late", shell("sleep 60"))
    assert await submitter.begun(JobPast(), job.job_id, job.folder, time.time()) == (None, 0.0)
    kind.fail("late")
    agent = multiprocessing.get_context("spawn").Process(target=dies_as_it_looks, args=(kind.config, job))
    agent.start()
    agent.join(60)
    native_id, left_s = await submitter.begun(BEGUN, job.job_id, job.folder, time.time())
    while native_id is None:
        assert 0.0 < left_s <= site.config.settle_s
        native_id, left_s = await submitter.begun(BEGUN, job.job_id, job.folder, time.time())
    await site.cancel([known(job, native_id)])
    assert (await ended(site, known(job, native_id)))["late"].state == "canceled"


@pytest.mark.parametrize("text", ["../../elsewhere", "\0\n", "no-such-array", 255 * "a"])
async def test_a_job_that_says_that_it_belongs_to_an_array_belongs_to_none(
    site: BatchSystem, tmp_path: Path, text: str
) -> None:
    submitter = Submitter(site, tmp_path)
    job = submission(tmp_path, "claims", shell("true"))
    await submitter.submit([job])
    (job.folder / ".headrace" / "array").write_text(text)
    assert submitter.array_of(job.folder) is None


async def test_of_a_member_it_is_not_said_that_it_is_none_while_the_disk_is_away(
    site: BatchSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitter = Submitter(site, tmp_path)
    records = Records(tmp_path / "member")
    records.make()
    records.note_array("an-array")

    def broken(number: int) -> Callable[[Path], bool]:
        def exists(path: Path) -> bool:
            raise OSError(number, os.strerror(number), str(path))

        return exists

    monkeypatch.setattr(Path, "exists", broken(errno.ESTALE))
    with pytest.raises(OSError, match="Stale"):
        submitter.array_of(records.folder)
    monkeypatch.setattr(Path, "exists", broken(errno.EACCES))
    assert submitter.array_of(records.folder) is None
