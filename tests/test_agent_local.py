"""The site agent on this machine's own processes: from a job in the log to its outcome, and to what follows it."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec
import psutil
import pytest

from functions.moves import agent_of, lease
from headrace.errors import BadRequest
from headrace.joblog import JOB, Held, SiteRecord, Submitted
from headrace.jobs import JobSpec
from headrace.names import invocation_id
from headrace.wire import Attempt, Invocation, Slot, Started, decode
from infra.embedded import NatsServer
from streams.blobs import FolderBlobs
from streams.log import Log
from streams.record import apply_invocation
from streams.topology import (
    attempt_subject,
    done_subject,
    end_subject,
    held_subject,
    job_subject,
    lease_subject,
    start_subject,
    submit_subject,
    tally_subject,
    work_subject,
)
from tests.agents import AgentProcess, Lab, there, until
from tests.sites import shell, timed
from workers.jobpast import unfinished
from workers.sites.base import Known, SiteConfig, Submission, SubmitBusy, SubmitUnsure
from workers.sites.local import Local
from workers.sites.records import Records


@pytest.fixture
def lab(log: Log, tmp_path: Path) -> Lab:
    site = SiteConfig(name="here", kind="local", work=str(tmp_path / "work"), jobs_max=4, settle_s=1.0, unseen_s=2.0)
    return Lab(log, site, tmp_path)


def processes_of(job: Invocation) -> list[int]:
    """Return the processes of a job that run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HEADRACE_JOB_ID", "").startswith(job.invocation_id):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


async def follow_ups(lab: Lab, job: Invocation) -> list[Invocation]:
    return [decode(s.body, Invocation) for s in await lab.all(work_subject("*", "*", job.run_id, "*"))]


async def test_a_job_that_completed_starts_what_follows_with_its_end(lab: Lab) -> None:
    job = lab.job(shell("echo hello"), then="collect", on_failure="mend")
    async with lab.agent():
        await lab.send(job)
        end = await lab.end(job)
    assert (end.job_id, end.site, end.state, end.exit_code, end.reason) == (
        job.invocation_id,
        "here",
        "completed",
        0,
        "",
    )
    (follow_up,) = await follow_ups(lab, job)
    assert (follow_up.function, follow_up.invocation_id) == ("collect", invocation_id(job.invocation_id, "then"))
    (submitted,) = await lab.all(submit_subject(job.run_id, job.invocation_id, "*", "*"))
    assert decode(submitted.body, Submitted).native_id == end.native_id


@pytest.mark.parametrize(("script", "reason", "code"), [("exit 3", "exit_code", 3), ("kill -9 $$", "signal", 137)])
async def test_a_job_that_failed_starts_the_function_for_that(lab: Lab, script: str, reason: str, code: int) -> None:
    job = lab.job(shell(f"echo why it was >&2; {script}"), then="collect", on_failure="mend")
    async with lab.agent():
        await lab.send(job)
        end = await lab.end(job)
    assert (end.state, end.reason, end.exit_code, end.last_lines) == ("failed", reason, code, "why it was\n")
    assert [f.function for f in await follow_ups(lab, job)] == ["mend"]


async def test_without_a_function_for_that_its_run_fails_and_says_why(lab: Lab) -> None:
    job = lab.job(shell("echo why it was >&2; exit 3"), then="collect")
    async with lab.agent():
        await lab.send(job)
        outcome = await lab.outcome(job)
    assert outcome.state == "dead"
    assert outcome.error is not None
    assert outcome.error.kind == "exit_code"
    assert "why it was" in outcome.error.message
    assert outcome.end is not None
    assert outcome.end.state == "failed"


async def test_a_job_at_its_walltime_ends_with_that_reason(lab: Lab) -> None:
    job = lab.job(timed(shell("sleep 60"), "1s"), on_failure="mend")
    async with lab.agent():
        await lab.send(job)
        assert (await lab.end(job)).reason == "walltime"


async def test_that_a_job_runs_is_told_while_it_does(lab: Lab) -> None:
    job = lab.job(shell("until [ -e go ]; do sleep 0.05; done"))
    async with lab.agent():
        await lab.send(job)

        async def started() -> Started | None:
            found = await lab.all(start_subject(job.run_id, job.invocation_id, "*"))
            return decode(found[0].body, Started) if found else None

        told = await there(started)
        assert (told.function, told.attempt) == (JOB, 1)
        assert await lab.log.last(done_subject(job.run_id, job.invocation_id)) is None
        (Path(lab.site.work) / "jobs" / f"{job.invocation_id}-1" / "go").touch()
        assert (await lab.end(job)).state == "completed"


# ---------------------------------------------------------------- inputs and outputs


async def test_inputs_are_brought_and_outputs_kept(lab: Lab) -> None:
    digest = await lab.blobs.put(b"seven")
    spec = JobSpec(
        executable="/bin/sh",
        arguments=["-c", "mkdir out; cp in/number.txt out/copy.txt; echo more >>in/number.txt"],
        inputs={"in/number.txt": f"blob:{digest}"},
        outputs=["out/copy.txt", "out/never.txt"],
    )
    job = lab.job(spec)
    async with lab.agent():
        await lab.send(job)
        end = await lab.end(job)
    assert end.state == "completed"
    assert end.missing == ["out/never.txt"]
    assert list(end.outputs) == ["out/copy.txt"]
    assert await lab.blobs.get(end.outputs["out/copy.txt"].removeprefix("blob:")) == b"seven"
    assert await lab.blobs.get(digest) == b"seven"  # the job wrote to a copy of its own


async def test_outputs_of_a_job_that_failed_are_kept_too(lab: Lab) -> None:
    spec = JobSpec(executable="/bin/sh", arguments=["-c", "echo half >out.txt; exit 1"], outputs=["out.txt"])
    job = lab.job(spec, on_failure="mend")
    async with lab.agent():
        await lab.send(job)
        end = await lab.end(job)
    assert (end.state, end.reason) == ("failed", "exit_code")
    assert await lab.blobs.get(end.outputs["out.txt"].removeprefix("blob:")) == b"half\n"


@pytest.mark.parametrize("uri", ["blob:" + "0" * 64, "file:///etc/passwd", "http://169.254.169.254/latest"])
async def test_an_input_that_cannot_be_had_is_told_and_nothing_is_submitted(lab: Lab, uri: str) -> None:
    job = lab.job(JobSpec(executable="/bin/true", inputs={"in.txt": uri}), on_failure="mend")
    async with lab.agent():
        await lab.send(job)
        end = await lab.end(job)
    assert (end.state, end.reason, end.native_id) == ("failed", "stage_in", None)
    assert "in.txt" in end.detail
    assert await lab.all(submit_subject(job.run_id, job.invocation_id, "*", "*")) == []


async def test_an_output_that_leads_out_of_the_folder_is_refused(lab: Lab) -> None:
    spec = JobSpec(executable="/bin/sh", arguments=["-c", "ln -s /etc/passwd out.txt"], outputs=["out.txt"])
    job = lab.job(spec, on_failure="mend")
    async with lab.agent():
        await lab.send(job)
        end = await lab.end(job)
    assert (end.state, end.reason, end.outputs) == ("failed", "stage_out", {})
    assert "'out.txt' is a link. " in end.detail


async def test_outputs_that_can_be_kept_are_kept_although_another_one_cannot(lab: Lab) -> None:
    spec = JobSpec(
        executable="/bin/sh",
        arguments=["-c", "mkdir frames; mkfifo pipe; echo good >energy.json"],
        outputs=["frames", "energy.json", "pipe", "nothing"],
    )
    job = lab.job(spec, on_failure="mend")
    async with lab.agent():
        await lab.send(job)
        end = await lab.end(job)
    assert (end.state, end.reason, end.exit_code, end.missing) == ("failed", "stage_out", 0, ["nothing"])
    assert await lab.blobs.get(end.outputs.pop("energy.json").removeprefix("blob:")) == b"good\n"
    assert end.outputs == {}
    assert "'frames' is a folder. " in end.detail
    assert "'pipe' is a pipe" in end.detail


# ---------------------------------------------------------------- what cannot run


async def test_a_job_that_the_site_refuses_has_failed_in_its_own_words(lab: Lab) -> None:
    job = lab.job(JobSpec(executable="/bin/true", container="md.sif"), on_failure="mend")
    async with lab.agent():
        await lab.send(job)
        end = await lab.end(job)
    assert (end.state, end.reason) == ("failed", "rejected")
    assert "runs no containers" in end.detail


async def test_only_as_many_run_as_there_are_places_and_what_is_due_first_goes_first(log: Log, tmp_path: Path) -> None:
    site = SiteConfig(name="one", kind="local", work=str(tmp_path / "work"), jobs_max=1)
    lab = Lab(log, site, tmp_path)
    order = tmp_path / "order"
    now = time.time()
    blocker = lab.job(shell(f"echo first >>{order}; sleep 1"))
    later = lab.job(shell(f"echo later >>{order}"), deadline=now + 300)
    soon = lab.job(shell(f"echo soon >>{order}"), deadline=now + 100)
    never = lab.job(shell(f"echo never >>{order}"))
    async with lab.agent():
        await lab.send(blocker)
        await until(order.exists)
        await lab.send(never, later, soon)
        for job in (blocker, later, soon, never):
            assert (await lab.end(job)).state == "completed"
    assert order.read_text().split() == ["first", "soon", "later", "never"]


class Stumbling(Local):
    """A machine whose disk fails at the first submission."""

    stumbled = False

    async def submit(self, job: Submission) -> str:
        if not self.stumbled:
            self.stumbled = True
            raise OSError(errno.EIO, "the disk failed")
        return await super().submit(job)


async def test_a_submission_that_goes_wrong_in_any_way_is_made_again(lab: Lab) -> None:
    job = lab.job(shell("true"))
    async with lab.agent(opened=Stumbling):
        await lab.send(job)
        assert (await lab.end(job)).state == "completed"
    assert await lab.count(submit_subject(job.run_id, "*", "*", "*")) == 1


# ---------------------------------------------------------------- canceled, and too late


async def test_a_canceled_run_leaves_no_job_behind(lab: Lab) -> None:
    job = lab.job(shell("sleep 300"))
    async with lab.agent():
        await lab.send(job)
        await until(lambda: bool(processes_of(job)))
        await lab.cancel(job.run_id)
        await until(lambda: not processes_of(job))
        outcome = await lab.outcome(job)
    assert (outcome.state, outcome.end, outcome.slot) == ("canceled", None, None)
    assert await follow_ups(lab, job) == []


async def test_a_run_that_is_canceled_while_the_agent_is_away_leaves_none_either(lab: Lab) -> None:
    job = lab.job(shell("sleep 300"), then="collect", on_failure="mend")
    async with lab.agent():
        await lab.send(job)
        await until(lambda: bool(processes_of(job)))
    assert processes_of(job)
    await lab.cancel(job.run_id)
    async with lab.agent():
        await until(lambda: not processes_of(job))
        assert (await lab.outcome(job)).state == "canceled"  # so nobody comes back to it
    assert await follow_ups(lab, job) == []
    assert (await unfinished(lab.log, "here")).jobs == []


async def test_a_job_that_is_at_another_site_by_its_lease_is_let_go_of(lab: Lab) -> None:
    job, other = lab.job(shell("true")), lab.job(shell("true"))
    await lab.send(job)
    await lab.log.append([lease(job, agent_of("elsewhere"), 1, time.time(), 0)])
    async with lab.agent() as agent:
        await lab.send(other)
        await lab.end(other)
        await until(lambda: not agent._hand.left())
    assert await lab.all(submit_subject(job.run_id, "*", "*", "*")) == []
    assert await lab.count(lease_subject(job.run_id, job.invocation_id)) == 1


class Doubtful(Local):
    """A machine that does not say whether it took a job, which comes up only after it was looked for once more."""

    looks = 0
    ended: list[str]

    async def submit(self, job: Submission) -> str:
        records = Records(job.folder)
        records.make()
        records.note_attempt()
        raise SubmitUnsure("it may have been submitted")

    async def find(self, job_id: str, folder: Path, place: int | None = None) -> str | None:
        self.looks += 1
        return "7" if self.looks > 1 else None

    async def cancel(self, jobs: Sequence[Known]) -> None:
        self.ended = [job.native_id for job in jobs]


async def test_a_canceled_job_that_may_come_up_yet_is_looked_for_until_it_cannot(lab: Lab) -> None:
    lab.site = msgspec.structs.replace(lab.site, settle_s=3.0)
    machine, job = Doubtful(lab.site), lab.job(shell("true"))
    machine.ended = []
    async with lab.agent(opened=lambda _: machine) as agent:
        await lab.send(job)
        await until(lambda: bool(agent._hand.tries))
        await lab.cancel(job.run_id)
        await until(lambda: machine.ended == ["7"], 20.0)


async def test_a_directory_that_cannot_be_made_is_told_as_such(lab: Lab) -> None:
    job = lab.job(JobSpec(executable="/bin/true", directory="/proc/nope"), on_failure="mend")
    async with lab.agent():
        await lab.send(job)
        end = await lab.end(job)
    assert (end.state, end.reason) == ("failed", "rejected")
    assert "the directory in which it is to run cannot be made: /proc/nope" in end.detail


class Full(Local):
    """A machine that takes no jobs at the first tries."""

    tries = 0

    async def submit(self, job: Submission) -> str:
        self.tries += 1
        if self.tries <= 3:
            raise SubmitBusy("all is taken")
        return await super().submit(job)


async def test_why_a_job_waits_is_told_once_it_was_tried_twice(lab: Lab) -> None:
    job = lab.job(shell("true"))
    async with lab.agent(opened=Full):
        await lab.send(job)
        await lab.end(job)
    (told,) = await lab.all(held_subject(job.run_id, job.invocation_id, "here"))
    assert decode(told.body, Held).why == "all is taken"
    assert await lab.count(held_subject(job.run_id, job.invocation_id, "here")) == 1
    (waits,) = await lab.all(job_subject("*", "*", job.run_id, "*"))
    shown = apply_invocation(apply_invocation(None, job, waits), decode(told.body, Held), told)
    assert shown is not None
    assert shown.job is not None
    assert (shown.job.state, shown.job.why) == ("new", "all is taken")
    (stored,) = await lab.all(submit_subject(job.run_id, job.invocation_id, "*", "*"))
    shown = apply_invocation(shown, decode(stored.body, Submitted), stored)
    assert apply_invocation(shown, decode(told.body, Held), told) == shown  # late, it tells nothing
    assert shown is not None
    assert shown.job is not None
    assert (shown.job.state, shown.job.why) == ("queued", "")


class Moving(FolderBlobs):
    """Stands in for a store of objects, which takes no file that changes meanwhile."""

    async def put_file(self, path: Path) -> str:
        if b"half" in path.read_bytes():
            raise BadRequest(f"{path} changed while it was stored", hint="Store it when it is complete.")
        return await super().put_file(path)


async def test_an_output_that_is_still_written_to_is_not_kept_and_the_job_ends(lab: Lab, tmp_path: Path) -> None:
    lab.blobs = Moving(tmp_path / "blobs")
    spec = shell("echo whole >a.txt; echo half >b.txt")
    job = lab.job(msgspec.structs.replace(spec, outputs=["a.txt", "b.txt"]), on_failure="mend")
    async with lab.agent():
        await lab.send(job)
        end = await lab.end(job)
    assert (end.state, end.reason, list(end.outputs)) == ("failed", "stage_out", ["a.txt"])
    assert "'b.txt' changed while it was stored" in end.detail


async def test_an_agent_outlives_a_disk_that_lets_no_folders_be_removed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.agent.SWEEP_S", 0.05)
    tried = asyncio.Event()
    job = lab.job(shell("true"))
    async with lab.agent() as agent:

        async def sweep(keep_s: float, but: Collection[str]) -> int:
            if agent_tries:
                tried.set()
            agent_tries.append(keep_s)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

        agent_tries: list[float] = []
        monkeypatch.setattr(agent._folders, "sweep", sweep)
        async with asyncio.timeout(10.0):
            await tried.wait()
        await lab.send(job)
        assert (await lab.end(job)).state == "completed"


async def test_a_job_of_a_canceled_run_is_not_submitted(lab: Lab) -> None:
    job, other = lab.job(shell("sleep 300")), lab.job(shell("true"))
    await lab.send(job)
    await lab.cancel(job.run_id)
    async with lab.agent():
        await lab.send(other)
        await lab.end(other)
    assert await lab.all(submit_subject(job.run_id, "*", "*", "*")) == []


async def test_a_job_is_canceled_at_the_deadline_where_nobody_needs_it_later(lab: Lab) -> None:
    job = lab.job(shell("sleep 300"), deadline=time.time() + 2.0, on_late="cancel")
    waits = lab.job(shell("sleep 300"), deadline=time.time() + 300.0)
    async with lab.agent():
        await lab.send(job, waits)
        outcome = await lab.outcome(job)
        await until(lambda: not processes_of(job))
        assert processes_of(waits)
        await lab.cancel(waits.run_id)
        await until(lambda: not processes_of(waits))
    assert outcome.state == "canceled"
    assert outcome.error is not None
    assert outcome.error.kind == "deadline"
    assert outcome.end is not None


async def test_what_is_too_late_already_is_not_submitted(lab: Lab) -> None:
    job = lab.job(shell("true"), deadline=time.time() - 1.0, on_late="cancel")
    async with lab.agent():
        await lab.send(job)
        assert (await lab.outcome(job)).state == "canceled"
    assert await lab.all(submit_subject(job.run_id, "*", "*", "*")) == []


# ---------------------------------------------------------------- again


async def test_a_job_that_failed_is_run_again_as_often_as_it_says(lab: Lab, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    script = f"echo x >>{runs}; [ $(wc -l <{runs}) -ge 3 ]"
    job = lab.job(JobSpec(executable="/bin/sh", arguments=["-c", script], retries=2))
    async with lab.agent():
        await lab.send(job)
        end = await lab.end(job)
    assert (end.state, end.attempts) == ("completed", 3)
    tried = await lab.all(attempt_subject(job.run_id, job.invocation_id, "*"))
    assert [decode(s.body, Attempt).error.kind for s in tried] == ["exit_code", "exit_code"]
    assert await lab.count(job_subject("*", "*", job.run_id, "*")) == 3


async def test_it_is_not_run_again_where_the_same_would_come_of_it(lab: Lab) -> None:
    spec = JobSpec(executable="/bin/sh", arguments=["-c", "sleep 60"], retries=2)
    job = lab.job(timed(spec, "1s"), on_failure="mend")
    async with lab.agent():
        await lab.send(job)
        end = await lab.end(job)
    assert (end.reason, end.attempts) == ("walltime", 1)


async def test_members_of_an_ensemble_fill_their_scope(lab: Lab) -> None:
    slots = [Slot(scope="scope", index=i, size=3, then="collect", then_version="v1", opened_by="p") for i in range(3)]
    jobs = [lab.job(shell(f"exit {i // 9}"), run="ensemble", slot=slot) for i, slot in enumerate(slots)]
    async with lab.agent():
        await lab.send(*jobs)
        for job in jobs:
            assert (await lab.outcome(job)).state == "succeeded"

        async def gathered() -> Invocation | None:
            found = await lab.all(work_subject("*", "*", "ensemble", "*"))
            return decode(found[0].body, Invocation) if found else None

        assert (await there(gathered)).function == "collect"
    assert await lab.count(tally_subject("ensemble", "scope")) >= 1
    assert await lab.all(end_subject("ensemble")) == []


# ---------------------------------------------------------------- restarts, and two of them


async def test_a_restart_attaches_to_what_runs(lab: Lab) -> None:
    job = lab.job(shell("until [ -e go ]; do sleep 0.05; done"))
    async with lab.agent():
        await lab.send(job)
        await there(lambda: lab.log.last(submit_subject(job.run_id, job.invocation_id, 1, "here")))
    pids = processes_of(job)
    (Path(lab.site.work) / "jobs" / f"{job.invocation_id}-1" / "go").touch()
    async with lab.agent():
        end = await lab.end(job)
    assert end.state == "completed"
    assert int(end.native_id or 0) in pids
    assert await lab.count(submit_subject(job.run_id, "*", "*", "*")) == 1


@pytest.mark.parametrize(
    ("before", "after"), [("hr.submit.", ""), ("", "hr.submit."), ("hr.done.", ""), ("", "hr.done.")]
)
async def test_a_killed_agent_leaves_one_job_and_one_outcome(
    lab: Lab, nats_server: NatsServer, tmp_path: Path, before: str, after: str
) -> None:
    runs = tmp_path / "runs"
    job = lab.job(shell(f"echo x >>{runs}"), then="collect")
    process = AgentProcess(lab, nats_server, tmp_path, before=before, after=after)
    try:
        await lab.send(job)
        await process.stands_still()
    finally:
        process.kill()
    async with lab.agent():
        assert (await lab.end(job)).state == "completed"
        await asyncio.sleep(1.0)  # what comes twice comes soon
    assert runs.read_text() == "x\n"
    assert await lab.count(done_subject(job.run_id, job.invocation_id)) == 1
    assert len(await follow_ups(lab, job)) == 1


async def test_two_agents_of_one_site_run_each_job_once(lab: Lab, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    jobs = [lab.job(shell(f"echo {i} >>{runs}; sleep 0.2")) for i in range(12)]
    async with lab.agent(host="one"), lab.agent(host="two"):
        await lab.send(*jobs)
        for job in jobs:
            assert (await lab.end(job)).state == "completed"
    assert sorted(map(int, runs.read_text().split())) == list(range(12))
    for job in jobs:
        assert await lab.count(done_subject(job.run_id, job.invocation_id)) == 1


async def test_the_site_has_its_row_before_it_is_ready(lab: Lab) -> None:
    async with lab.agent():
        row = await lab.log.link.jetstream().key_value("sites")
        found = decode((await row.get("here")).value or b"", SiteRecord)
    assert (found.name, found.kind, found.status, found.nodes_total) == ("here", "local", "up", 1)


async def test_a_work_folder_that_is_away_for_a_while_costs_no_job(lab: Lab, tmp_path: Path) -> None:
    jobs = [lab.job(shell("exit 0"), then="collect") for _ in range(3)]
    async with lab.agent() as agent:
        (tmp_path / "work" / "jobs").rename(tmp_path / "away")  # a disk that is not mounted now
        await lab.send(*jobs)
        await until(lambda: len(agent._hand.tries) == len(jobs))
        assert not (tmp_path / "work" / "jobs").exists()  # and nothing is made beside it
        (tmp_path / "away").rename(tmp_path / "work" / "jobs")
        assert [(await lab.end(job)).state for job in jobs] == ["completed"] * 3
