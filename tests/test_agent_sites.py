"""Which site an agent speaks for: two of one name, two agents of one, a folder that is not the one it was."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from pathlib import Path

import msgspec
import pytest

from functions import sites
from headrace.errors import Conflict, Unavailable
from headrace.joblog import SiteRecord, Submitted
from headrace.wire import Lease, Started, decode
from infra.embedded import NatsServer
from streams.follow import follow
from streams.log import Log
from streams.stored import Stored
from streams.topology import done_subject, kind_of, lease_subject, start_subject, submit_subject
from tests.agents import AgentProcess, Lab, there, until
from tests.sites import shell
from workers import sitebook
from workers.jobpast import unfinished
from workers.sites.base import FINAL, JobStatus, Known, SiteConfig
from workers.sites.local import Local
from workers.workfolder import WorkFolder

WAITS = "until [ -e go ]; do sleep 0.05; done"


@pytest.fixture
def lab(log: Log, tmp_path: Path) -> Lab:
    """A machine that looks like a batch system: what it runs goes on when its agent is gone."""
    site = SiteConfig(name="lab", kind="slurm", work=str(tmp_path / "work"), settle_s=1.0, unseen_s=1.0)
    return Lab(log, site, tmp_path)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rows be written, and silence be noticed, sooner than they are."""
    monkeypatch.setattr(sitebook, "LOOK_S", 0.2)
    monkeypatch.setattr(sitebook, "WRITE_S", 0.5)
    monkeypatch.setattr(sites, "SILENT_S", 3.0)


def elsewhere(lab: Lab, folder: Path) -> SiteConfig:
    """Return another site of the same name, whose folder was its own before."""
    folder.mkdir()
    other = msgspec.structs.replace(lab.site, work=str(folder))
    WorkFolder(other).mark.write_text("another\n")
    return other


def folder_of(lab: Lab, job: str) -> Path:
    return Path(lab.site.work) / "jobs" / f"{job}-1"


async def told_of(lab: Lab, run: str, job: str) -> list[Stored]:
    """Return what was said of a job, in the order of the log."""
    subjects = [lease_subject(run, job), submit_subject(run, job, "*", "*"), start_subject(run, job, "*")]
    last = max(stored.seq for stored in await lab.log.last_of_each(subjects))
    found: list[Stored] = []
    async with aclosing(follow(lab.log, subjects, after=0)) as batches:
        async for batch in batches:
            found += batch
            if batch and batch[-1].seq >= last:
                break
    return found


async def row_of(lab: Lab) -> SiteRecord:
    table = await lab.log.link.jetstream().key_value("sites")
    return decode((await table.get(lab.site.name)).value or b"", SiteRecord)


# ---------------------------------------------------------------- two sites of one name


@pytest.mark.usefixtures("soon")
async def test_a_second_site_of_a_name_is_refused_while_the_first_is_heard(lab: Lab, tmp_path: Path) -> None:
    other = elsewhere(lab, tmp_path / "other")
    async with lab.agent("first", Local):
        with pytest.raises(Conflict, match="the name lab is taken: agent/lab/first speaks for"):
            async with lab.agent("second", Local, other):
                pass
        assert (await row_of(lab)).agent == "agent/lab/first"


@pytest.mark.usefixtures("soon")
async def test_jobs_of_another_site_of_the_name_are_not_judged_and_its_agent_finds_them(
    lab: Lab, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job, next_one = lab.job(shell(WAITS)), lab.job(shell("true"))
    async with lab.agent("first", Local):
        await lab.send(job)
        stored = await there(lambda: lab.log.last(submit_subject(job.run_id, job.invocation_id, 1, "lab")))
    assert decode(stored.body, Submitted).site_id == WorkFolder(lab.site).mark.read_text().strip()
    async with lab.agent("second", Local, elsewhere(lab, tmp_path / "other")) as agent:
        await lab.send(next_one)
        assert (await lab.end(next_one)).state == "completed"
        assert len(agent._watch) == 0
    assert "1 jobs were submitted by another site with the name lab" in caplog.text
    assert await lab.log.last(done_subject(job.run_id, job.invocation_id)) is None
    (folder_of(lab, job.invocation_id) / "go").touch()
    async with lab.agent("third", Local):
        assert (await lab.end(job)).state == "completed"


@pytest.mark.usefixtures("soon")
async def test_an_empty_folder_is_not_taken_for_that_of_a_site_that_is_known(lab: Lab, tmp_path: Path) -> None:
    async with lab.agent(opened=Local):
        pass
    away = tmp_path / "work"
    away.rename(tmp_path / "away")  # its disk is not mounted
    with pytest.raises(Conflict, match=r"\.site-lab\.slurm") as refused:
        async with lab.agent(opened=Local):
            pass
    assert not away.exists()
    # What the hint says is all that has to be done where that folder is gone for good.
    command = (refused.value.hint or "").partition("take its place: ")[2]
    away.mkdir()
    made = await asyncio.create_subprocess_shell(command)
    assert await made.wait() == 0
    async with lab.agent(opened=Local):
        assert (await row_of(lab)).id == WorkFolder(lab.site).mark.read_text().strip()


@pytest.mark.usefixtures("soon")
async def test_a_machine_may_have_a_new_folder_and_tells_what_was_lost_with_the_old_one(
    lab: Lab, tmp_path: Path
) -> None:
    lab.site = msgspec.structs.replace(lab.site, kind="local")
    job = lab.job(shell(WAITS), on_failure="mend")
    async with lab.agent():
        await lab.send(job)
        await there(lambda: lab.log.last(submit_subject(job.run_id, job.invocation_id, 1, "lab")))
    old = folder_of(lab, job.invocation_id)
    lab.site = msgspec.structs.replace(lab.site, work=str(tmp_path / "new"))
    async with lab.agent():
        end = await lab.end(job)
    (old / "go").touch()
    assert (end.state, end.reason) == ("failed", "lost")
    assert "another site of this name" in end.detail


async def test_two_kinds_in_one_folder_are_two_sites(lab: Lab) -> None:
    other = msgspec.structs.replace(lab.site, kind="pbs")
    for site in (lab.site, other):
        await WorkFolder(site).open("", anew=False)
    with pytest.raises(Conflict):
        await WorkFolder(msgspec.structs.replace(lab.site, kind="lsf")).open("known", anew=False)
    assert len({WorkFolder(site).mark.read_text() for site in (lab.site, other)}) == 2


async def test_many_who_mark_a_folder_at_once_find_one_mark(lab: Lab) -> None:
    folders = [WorkFolder(lab.site) for _ in range(20)]
    await asyncio.gather(*(folder.open("", anew=False) for folder in folders))
    assert len({folder.id for folder in folders}) == 1
    assert len(list(Path(lab.site.work).iterdir())) == 1


@pytest.mark.parametrize("known", ["", "known"])
async def test_a_mark_without_an_id_is_refused(lab: Lab, known: str) -> None:
    """As a power cut may leave it: it must not equal what is read where the disk is not mounted."""
    folder = WorkFolder(lab.site)
    folder.path.mkdir()
    folder.mark.touch()
    with pytest.raises(Conflict, match="has no id in it") as refused:
        await folder.open(known, anew=True)
    assert (f"echo {known} >" if known else "Remove it") in str(refused.value.hint)


async def test_a_mark_is_on_the_disk_before_it_has_its_name(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bool]] = []
    folder, sync = WorkFolder(lab.site), os.fsync

    def note(handle: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{handle}")).name, folder.mark.exists()))
        sync(handle)

    monkeypatch.setattr(os, "fsync", note)
    await folder.open("", anew=False)
    assert [(name.startswith(folder.mark.name), there) for name, there in synced] == [(True, False), (False, True)]
    assert synced[-1][0] == folder.path.name


# ---------------------------------------------------------------- two agents of one site


@pytest.mark.parametrize("before", ["hr.lease.", "hr.submit.", "hr.start."])
async def test_an_agent_that_was_overtaken_between_two_steps_writes_nothing_more(
    lab: Lab, nats_server: NatsServer, tmp_path: Path, before: str
) -> None:
    lab.site = msgspec.structs.replace(lab.site, kind="local", jobs_max=4)
    job, next_one = lab.job(shell(WAITS)), lab.job(shell("true"))
    run, identity = job.run_id, job.invocation_id

    async def is_newest_of_other() -> Stored | None:
        found = await lab.log.last(lease_subject(run, identity))
        return found if found is not None and decode(found.body, Lease).worker == "agent/lab/here" else None

    older = AgentProcess(lab, nats_server, tmp_path, before=before)
    try:
        await lab.send(job)
        await older.stands_still()
        older.pause()
        async with lab.agent():
            await there(is_newest_of_other)
            await there(lambda: lab.log.last(start_subject(run, identity, 1)))
            older.go_on()
            await asyncio.sleep(2.0)  # what it does at once, it has done
            (folder_of(lab, identity) / "go").touch()
            assert (await lab.end(job)).state == "completed"
        await lab.send(next_one)  # which shows that it works
        assert (await lab.end(next_one)).state == "completed"
    finally:
        older.kill()
    held = Lease(run_id=run, invocation_id=identity, attempt=1, worker="", at=0.0)
    for stored in await told_of(lab, run, identity):
        match kind_of(stored.subject):
            case "lease":
                lease = decode(stored.body, Lease)
                assert lease.at > held.at  # one that was asked for before another one was given is refused
                held = lease
            case "submit":
                assert decode(stored.body, Submitted).agent == held.worker
            case "start":
                assert decode(stored.body, Started).worker == held.worker


@pytest.mark.usefixtures("soon")
async def test_two_agents_of_one_site_may_work_and_say_so(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with lab.agent("one", Local), lab.agent("two", Local):
        await until(lambda: "speaks for site lab, too" in caplog.text)


# ---------------------------------------------------------------- a folder that is not there for a while


@pytest.mark.usefixtures("soon")
async def test_nothing_is_concluded_while_the_work_folder_is_away(lab: Lab, tmp_path: Path) -> None:
    lab.site = msgspec.structs.replace(lab.site, kind="local", unseen_s=1.0)
    job, waits = lab.job(shell(WAITS)), lab.job(shell("true"))
    mark, jobs = WorkFolder(lab.site).mark, Path(lab.site.work) / "jobs"
    async with lab.agent() as agent:
        await lab.send(job)
        await there(lambda: lab.log.last(start_subject(job.run_id, job.invocation_id, 1)))
        records = folder_of(lab, job.invocation_id) / ".headrace"
        mark.rename(tmp_path / "mark")
        with pytest.raises(Unavailable, match="is not the folder it was"):
            await agent._watch.look()
        (folder_of(lab, job.invocation_id) / "go").touch()
        await until(lambda: (records / "ended").exists())
        await lab.send(waits)
        await until(lambda: bool(agent._hand.tries))
        assert not folder_of(lab, waits.invocation_id).exists()
        jobs.rename(tmp_path / "jobs")

        async def is_down() -> bool | None:
            row = await row_of(lab)
            return True if row.status == "down" and "its work folder" in row.detail else None

        await there(is_down)
        await asyncio.sleep(2 * lab.site.unseen_s)
        assert await lab.all(done_subject("*", "*")) == []
        assert not jobs.exists()
        (tmp_path / "jobs").rename(jobs)
        (tmp_path / "mark").rename(mark)
        assert (await lab.end(job)).state == "completed"
        assert (await lab.end(waits)).state == "completed"

        async def is_up() -> bool | None:
            return True if (await row_of(lab)).status == "up" else None

        await there(is_up)
    assert (await unfinished(lab.log, "lab")).jobs == []


class Unmounting(Local):
    """A machine that loses the disk of its site as soon as a job has ended."""

    disk = Path()

    async def status(self, jobs: Sequence[Known]) -> Mapping[str, JobStatus]:
        told = await super().status(jobs)
        if any(status.state in FINAL for status in told.values()):
            Path(self.config.work).rename(self.disk)
        return told


async def test_outputs_are_not_taken_for_missing_because_their_disk_is(lab: Lab, tmp_path: Path) -> None:
    lab.site = msgspec.structs.replace(lab.site, kind="local")
    machine = Unmounting(lab.site)
    machine.disk = tmp_path / "away"
    job = lab.job(msgspec.structs.replace(shell("echo seven >out.txt"), outputs=["out.txt"]))
    async with lab.agent(opened=lambda _: machine) as agent:
        await lab.send(job)
        await until(machine.disk.exists)
        await until(lambda: all(each.ending for each in agent._watch._jobs.values()))
        await asyncio.sleep(0.5)  # it is tried now
        machine.disk.rename(lab.site.work)
        end = await lab.end(job)
    assert await lab.blobs.get(end.outputs["out.txt"].removeprefix("blob:")) == b"seven\n"


async def test_a_folder_that_cannot_be_written_to_is_told_and_leaves_nothing(lab: Lab) -> None:
    folder = WorkFolder(lab.site)
    await folder.open("", anew=False)
    assert await folder.trouble() == ""
    assert [path.name for path in Path(lab.site.work).iterdir()] == [folder.mark.name]
    blocking = folder.mark.with_name(f"{folder.mark.name}.look")
    blocking.symlink_to("/dev/full")
    assert await folder.trouble() == "No space left on device"
    folder.mark.write_text("another\n")
    assert "another one" in await folder.trouble()
