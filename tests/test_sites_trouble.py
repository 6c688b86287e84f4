"""What goes wrong with one job, one command or one file of a batch system stays there."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import BrokenBarrierError

import msgspec
import pytest

from infra.slurm.cluster import Cluster
from infra.slurm.sbatch import LATE_S
from tests.kinds import QUEUED_KINDS, Kind, OverSlurm, named_kind
from tests.sites import ended, known, reached, shell, submission
from workers.sites import open_site
from workers.sites.base import BatchSystem, Known, SiteConfig, SiteUnreachable, Submission, SubmitUnsure
from workers.sites.batch import Batch

RECORDS = "$HEADRACE_JOB_FOLDER/.headrace"


@pytest.fixture(params=QUEUED_KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    return named_kind(request, request.param, tmp_path)


@pytest.fixture
def site(kind: Kind) -> BatchSystem:
    return open_site(kind.config)


# ---------------------------------------------------------------- what a job writes itself


@pytest.mark.parametrize(
    "damage",
    [
        f"echo a b c >{RECORDS}/claim",
        f"printf '\\0\\0 \\0\\n' >{RECORDS}/claim",
        f"rm {RECORDS}/claim; mkfifo {RECORDS}/claim",
        f"rm {RECORDS}/claim; mkdir {RECORDS}/claim",
        f"rm {RECORDS}/claim; ln -s /dev/zero {RECORDS}/claim",
        f"echo 1 nan n1 >{RECORDS}/claim; echo 1 900 nan >{RECORDS}/ended",
    ],
)
@pytest.mark.parametrize("kind", ["slurm"], indirect=True)
async def test_a_damaged_record_is_none_and_hides_no_other_job(site: BatchSystem, tmp_path: Path, damage: str) -> None:
    name = tmp_path.name
    odd = submission(tmp_path, f"{name}-odd", shell(f"{damage}; exit 3"))
    fine = submission(tmp_path, f"{name}-fine", shell("true"))
    asked = [known(job, await site.submit(job)) for job in (odd, fine)]
    told = await ended(site, *asked)
    assert (told[odd.job_id].state, told[odd.job_id].exit_code) == ("failed", 3), told
    assert told[fine.job_id].state == "completed"


async def test_a_claim_that_names_another_job_is_not_believed(kind: Kind, site: BatchSystem, tmp_path: Path) -> None:
    name = kind.config.kind
    other = submission(tmp_path, f"{name}-other", shell("sleep 60"))
    asked = known(other, await site.submit(other))
    await reached(site, asked, "active")
    script = f"echo '{asked.native_id} 1.0 n1' >{RECORDS}/claim; exit 3"
    liar = submission(tmp_path, f"{name}-liar", shell(script))
    told = (await ended(site, known(liar, await site.submit(liar))))[liar.job_id]
    assert (told.state, told.reason, told.exit_code) == ("failed", "exit_code", 3), told
    await site.cancel([asked])


async def test_only_what_the_queue_shows_under_our_name_is_canceled(
    kind: Kind, site: BatchSystem, tmp_path: Path
) -> None:
    """A number may be another job's by now: of a batch system that was set up anew, say."""
    name = kind.config.kind
    job = submission(tmp_path, f"{name}-stays", shell("sleep 60"))
    asked = known(job, await site.submit(job))
    await reached(site, asked, "active")
    await site.cancel([Known(job_id=f"{name}-past", native_id=asked.native_id, folder=tmp_path / f"{name}-past")])
    assert (await site.status([asked]))[job.job_id].state == "active"
    await asyncio.sleep(0.5)  # in which it would have been ended
    assert (await site.status([asked]))[job.job_id].state == "active"
    await site.cancel([asked])
    assert (await ended(site, asked))[job.job_id].state == "canceled"


async def test_what_a_job_does_is_nobody_elses_to_read(kind: Kind, site: BatchSystem, tmp_path: Path) -> None:
    spec = msgspec.structs.replace(shell("true"), environment={"TOKEN": "hunter2"})
    job = submission(tmp_path, f"{kind.config.kind}-private", spec)
    asked = known(job, await site.submit(job))
    assert job.folder.stat().st_mode & 0o077 == 0
    found = [path for path in tmp_path.rglob("*.*") if path.is_file() and b"hunter2" in path.read_bytes()]
    mine = [path for path in found if not path.is_relative_to(tmp_path / kind.config.kind)]  # a fake's own copy
    assert mine == [job.folder / ".headrace" / "batch.sh"]
    await ended(site, asked)


# ---------------------------------------------------------------- the site's disk


@pytest.mark.parametrize("target", ["/dev/full", "nowhere/at/all"])
async def test_a_program_whose_claim_cannot_be_written_is_not_begun(
    kind: Kind, site: BatchSystem, tmp_path: Path, target: str
) -> None:
    """As on a full disk, or one that is not there: nothing is told as the program's own end, and it may run again."""
    kind.hold()
    job = submission(tmp_path, f"{kind.config.kind}-full{len(target)}", shell("touch ran"))
    asked = known(job, await site.submit(job))
    (job.folder / ".headrace" / "claim").symlink_to(target)
    kind.release()
    told = (await ended(site, asked))[job.job_id]
    assert (told.state, told.reason, told.exit_code) == ("failed", "node_failure", None), told
    assert "was not begun" in told.detail
    assert not (job.folder / "ran").exists()


async def test_what_is_cleaned_away_between_two_jobs_is_missed_by_neither(
    kind: Kind, site: BatchSystem, tmp_path: Path
) -> None:
    """Scratch disks are: what has not changed for long goes first."""
    root = tmp_path / "jobs"
    for word in ("one", "two"):
        root.mkdir()
        job = submission(root, f"{kind.config.kind}-{word}", shell("true"))
        told = await ended(site, known(job, await site.submit(job)))
        assert told[job.job_id].state == "completed", told
        shutil.rmtree(root)
    with pytest.raises(SiteUnreachable, match="No such file"):
        await site.submit(submission(root, f"{kind.config.kind}-three", shell("true")))
    assert not root.exists()  # beside a disk that is gone, nothing is made in its place


async def test_a_job_whose_files_were_half_written_is_written_anew(
    kind: Kind, site: BatchSystem, tmp_path: Path
) -> None:
    kind.fail("before")
    job = submission(tmp_path, f"{kind.config.kind}-half", shell("true"))
    with pytest.raises(SubmitUnsure):
        await site.submit(job)
    for path in (job.folder / ".headrace" / "launch").rglob("*.sh"):
        path.unlink()
    asked = known(job, await site.submit(job))
    assert (await ended(site, asked))[job.job_id].state == "completed"


# ---------------------------------------------------------------- two at once, and one that came late


def submits_after_both_looked(config: SiteConfig, job: Submission, both: Barrier) -> None:
    """Submit, as an agent in a process of its own, once another one has looked for the job, too, and found none."""
    site = open_site(config)
    assert isinstance(site, Batch)
    look_up = site.look_up

    def looked(name: str, *, ever: bool) -> list[str]:
        found = look_up(name, ever=ever)
        with suppress(BrokenBarrierError):
            both.wait(5)
        return found

    site.look_up = looked  # type: ignore[method-assign]
    try:
        asyncio.run(site.submit(job))
    except SubmitUnsure:
        sys.exit(3)


@pytest.mark.parametrize("kind", ["slurm"], indirect=True)
async def test_two_processes_that_submit_one_job_at_a_time_give_one(
    kind: Kind, site: BatchSystem, slurm: Cluster, tmp_path: Path
) -> None:
    slurm.fail_sbatch("slow", count=2)
    job = submission(tmp_path, "at-once", shell("true"))
    spawn = multiprocessing.get_context("spawn")
    together = spawn.Barrier(2)
    both = [spawn.Process(target=submits_after_both_looked, args=(kind.config, job, together)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        await asyncio.to_thread(process.join, 60)
    assert {process.exitcode for process in both} <= {0, 3}
    native_id = await site.submit(job)
    await ended(site, known(job, native_id))
    assert kind.named("hr-at-once") == 1


def dies_as_it_looks(config: SiteConfig, job: Submission) -> None:
    """Submit, and be killed before a submission of unknown fate is looked for."""
    site = open_site(config)
    assert isinstance(site, Batch)
    site._settle = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    asyncio.run(site.submit(job))


async def test_a_submission_that_comes_late_after_its_agent_was_killed_is_waited_for(
    kind: Kind, site: BatchSystem, tmp_path: Path
) -> None:
    kind.fail("late")
    job = submission(tmp_path, f"{kind.config.kind}-later", shell("true"))
    agent = multiprocessing.get_context("spawn").Process(target=dies_as_it_looks, args=(kind.config, job))
    agent.start()
    await asyncio.to_thread(agent.join, 60)
    assert agent.exitcode == -signal.SIGKILL
    assert (job.folder / ".headrace" / "attempt").exists()
    asked = known(job, await site.submit(job))
    assert (await ended(site, asked))[job.job_id].state == "completed"
    await asyncio.sleep(LATE_S)
    assert kind.named(f"hr-{job.job_id}") == 1


# ---------------------------------------------------------------- accounts that are away


def broken_accounts(cluster: Cluster, folder: Path, body: str) -> SiteConfig:
    """Return a site whose ``sacct`` does this, and notes its calls in a file beside it."""
    programs = folder / "bin"
    programs.mkdir()
    script = programs / "sacct"
    script.write_text(f'#!/bin/sh\necho "$*" >>{folder}/asked\n{body}\n')
    script.chmod(0o755)
    config = OverSlurm("slurm", cluster, folder).config
    return msgspec.structs.replace(
        config, environment={**config.environment, "PATH": f"{programs}:{config.environment['PATH']}"}
    )


REFUSED = 'echo "sacct: error: slurmdbd: Connection refused" >&2; exit 1'


async def test_without_its_accounts_slurm_takes_jobs_and_tells_of_those_that_tell_of_themselves(
    forgetful: Cluster, tmp_path: Path
) -> None:
    site = open_site(broken_accounts(forgetful, tmp_path, REFUSED))
    scripts = {"well": "true", "badly": "exit 7", "struck": "touch began; sleep 60"}
    jobs = [submission(tmp_path, f"dbd-{word}", shell(script)) for word, script in scripts.items()]
    asked = [known(job, await site.submit(job)) for job in jobs]
    assert not (tmp_path / "asked").exists()  # nothing was ever submitted under these names: the queue tells enough
    while not (jobs[2].folder / "began").exists():
        await asyncio.sleep(0.05)
    await site.cancel([asked[2]])
    while forgetful.run("squeue", "-h", "-t", "all"):
        await asyncio.sleep(0.2)
    told = await ended(site, *asked[:2])
    assert (told["dbd-well"].state, told["dbd-badly"].exit_code) == ("completed", 7)
    begun_at = time.monotonic()
    while time.monotonic() < begun_at + 2 * site.config.unseen_s:  # and not lost, however long nobody knows
        status = (await site.status(asked))["dbd-struck"]
        assert (status.state, status.detail) == ("active", "not seen in the queue")
        await asyncio.sleep(0.2)


async def test_of_all_jobs_that_the_queue_forgot_the_accounts_are_asked_at_once(
    forgetful: Cluster, tmp_path: Path
) -> None:
    told = "\n".join(f'echo "{90000 + number}|TIMEOUT|0:0|1795275184|1795275185|n1"' for number in range(20))
    site = open_site(broken_accounts(forgetful, tmp_path, told))
    asked = [
        Known(job_id=f"old{number}", native_id=str(90000 + number), folder=tmp_path / f"old{number}")
        for number in range(20)
    ]
    ends = await ended(site, *asked)
    assert {(status.state, status.reason) for status in ends.values()} == {("failed", "walltime")}
    assert len((tmp_path / "asked").read_text().splitlines()) == 1


async def test_a_slurm_without_accounts_loses_nothing_by_it(forgetful: Cluster, tmp_path: Path) -> None:
    site = open_site(broken_accounts(forgetful, tmp_path, "exit 127"))  # as ``env`` says where there is no ``sacct``
    gone = Known(job_id="gone", native_id="90099", folder=tmp_path / "gone")
    told = (await ended(site, gone))["gone"]
    assert (told.state, told.reason) == ("failed", "lost")
