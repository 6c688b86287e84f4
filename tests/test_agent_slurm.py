"""The site agent on a real Slurm: each job exactly once by Slurm's own records, whatever dies and whenever."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from msgspec import structs

from headrace.joblog import Submitted
from headrace.jobs import JobSpec, Resources
from headrace.wire import Invocation, Slot, decode
from infra.embedded import NatsServer
from infra.slurm.cluster import Cluster
from infra.slurm.sbatch import Fault
from streams.log import Log
from streams.topology import done_subject, start_subject, submit_subject, work_subject
from tests.agents import AgentProcess, Lab, there, until
from tests.sites import shell, timed, with_option
from workers.sites.base import SiteConfig

SETTLE_S = 2.5  # longer than the wrapper's late submission takes


@pytest.fixture
def lab(log: Log, slurm: Cluster, tmp_path: Path) -> Lab:
    site = SiteConfig(
        name="lab", kind="slurm", work=str(tmp_path / "work"), environment=slurm.env, settle_s=SETTLE_S, unseen_s=2.0
    )
    return Lab(log, site, tmp_path)


def once(slurm: Cluster, job: Invocation, attempt: int = 1) -> bool:
    """Say whether Slurm's own records hold a job of this name once."""
    return list(slurm.jobs().values()).count(f"hr-{job.invocation_id}-{attempt}") == 1


def ensemble(lab: Lab, specs: Sequence[JobSpec], run: str) -> list[Invocation]:
    """Return jobs that end together."""
    size = len(specs)
    slot = Slot(scope=f"{run}-scope", index=0, size=size, then="collect", then_version="v1", opened_by="parent")
    return [lab.job(spec, run=run, slot=structs.replace(slot, index=i)) for i, spec in enumerate(specs)]


async def native_ids(lab: Lab, jobs: Sequence[Invocation], attempt: int = 1) -> list[str]:
    """Return the native id of each job once all are submitted."""

    async def look() -> list[str] | None:
        found = []
        for job in jobs:
            stored = await lab.log.last(submit_subject(job.run_id, job.invocation_id, attempt, "lab"))
            if stored is None:
                return None
            found.append(decode(stored.body, Submitted).native_id)
        return found

    return await there(look)


async def test_a_job_is_submitted_watched_and_followed(lab: Lab, slurm: Cluster) -> None:
    spec = JobSpec(
        executable="/bin/sh",
        arguments=["-c", 'sleep 2; echo "$CUDA_VISIBLE_DEVICES" >gpus.txt'],
        resources=Resources(gpu_cores_per_process=2),
        outputs=["gpus.txt"],
    )
    job = lab.job(spec, then="collect")
    async with lab.agent():
        await lab.send(job)
        end = await lab.end(job)
    assert (end.state, end.exit_code, end.site) == ("completed", 0, "lab")
    assert end.nodes
    assert len((await lab.blobs.get(end.outputs["gpus.txt"].removeprefix("blob:"))).decode().split(",")) == 2
    assert once(slurm, job)
    assert await lab.count(start_subject(job.run_id, job.invocation_id, 1)) == 1
    assert await lab.count(work_subject("*", "*", job.run_id, "*")) == 1


async def test_a_rejected_job_has_failed_with_slurms_own_words(lab: Lab) -> None:
    job = lab.job(shell("true", Resources(node_count=50)), on_failure="mend")
    async with lab.agent():
        await lab.send(job)
        end = await lab.end(job)
    assert (end.state, end.reason, end.native_id) == ("failed", "rejected", None)
    assert "sbatch: error" in end.detail


async def test_cancels_reach_what_waits_and_what_runs(lab: Lab, slurm: Cluster) -> None:
    runs, waits = lab.job(shell("sleep 300")), lab.job(shell("sleep 300", Resources(gpu_cores_per_process=4)))
    async with lab.agent():
        await lab.send(runs)
        await there(lambda: lab.log.last(start_subject(runs.run_id, runs.invocation_id, 1)))
        slurm.fill()
        await lab.send(waits)
        await native_ids(lab, [waits])
        for job in (runs, waits):
            await lab.cancel(job.run_id)
        await until(lambda: not ours(slurm))
    assert await lab.log.last(done_subject(runs.run_id, runs.invocation_id)) is None


def ours(slurm: Cluster) -> list[str]:
    """Return our jobs that wait or run."""
    names = slurm.run("squeue", "-h", "-r", "-t", "PD,R,CG", "-o", "%j").split()
    return [name for name in names if name.startswith("hr-")]


@pytest.mark.parametrize("fault", ["after", "late", "before"])
async def test_an_sbatch_of_unknown_fate_gives_one_job(lab: Lab, slurm: Cluster, fault: Fault) -> None:
    slurm.fail_sbatch(fault)
    job = lab.job(shell("true"))
    async with lab.agent():
        await lab.send(job)
        assert (await lab.end(job)).state == "completed"
    assert once(slurm, job)


async def test_a_queue_that_is_closed_for_now_is_tried_again(lab: Lab, slurm: Cluster) -> None:
    slurm.set_partition("INACTIVE")
    job = lab.job(shell("true"))
    async with lab.agent():
        await lab.send(job)
        await asyncio.sleep(2.0)
        assert await lab.log.last(done_subject(job.run_id, job.invocation_id)) is None
        slurm.set_partition("UP")
        assert (await lab.end(job)).state == "completed"
    assert once(slurm, job)


async def test_a_controller_that_is_away_ends_nothing(lab: Lab, slurm: Cluster) -> None:
    runs = lab.job(shell("until [ -e go ]; do sleep 0.1; done"))
    async with lab.agent():
        await lab.send(runs)
        await there(lambda: lab.log.last(start_subject(runs.run_id, runs.invocation_id, 1)))
        slurm.stop_controller()
        later = lab.job(shell("true"))
        await lab.send(later)
        await asyncio.sleep(4.0)
        assert await lab.log.last(done_subject(runs.run_id, runs.invocation_id)) is None
        slurm.start_controller()
        (Path(lab.site.work) / "jobs" / f"{runs.invocation_id}-1" / "go").touch()
        for job in (runs, later):
            assert (await lab.end(job)).state == "completed"
            assert once(slurm, job)


async def test_what_follows_a_job_is_told_why_it_failed(lab: Lab, slurm: Cluster) -> None:
    greedy = "import time; held = bytearray(200 << 20); time.sleep(300)"
    failing = {
        "exit_code": shell("exit 3"),
        "signal": shell("kill -9 $$"),
        "out_of_memory": JobSpec(
            executable=sys.executable, arguments=["-c", greedy], resources=Resources(memory=50 << 20)
        ),
        "node_failure": with_option(shell("sleep 300"), nodelist="n3"),
        "walltime": with_option(timed(shell("sleep 300"), "1s"), nodelist="n1"),
    }
    jobs = {why: lab.job(spec, run=why.replace("_", "-"), on_failure="mend") for why, spec in failing.items()}
    async with lab.agent():
        await lab.send(*jobs.values())
        (long,) = await native_ids(lab, [jobs["walltime"]])
        for why in ("node_failure", "walltime"):
            await there(partial(lab.log.last, start_subject(jobs[why].run_id, jobs[why].invocation_id, 1)))
        slurm.down("n3")
        slurm.end_soon([long])
        ends = {why: await lab.end(job) for why, job in jobs.items()}
    assert {why: (end.state, end.reason) for why, end in ends.items()} == {why: ("failed", why) for why in jobs}
    for job in jobs.values():
        assert await lab.count(work_subject("*", "*", job.run_id, "*")) == 1


async def test_a_job_whose_node_died_is_run_again_if_it_says_so(lab: Lab, slurm: Cluster) -> None:
    script = 'case "$HEADRACE_JOB_ID" in *-1) sleep 300;; esac'
    again = lab.job(JobSpec(executable="/bin/sh", arguments=["-c", script], retries=1))
    never = lab.job(shell("sleep 300"), on_failure="mend")
    async with lab.agent():
        await lab.send(again, never)
        for job in (again, never):
            await there(partial(lab.log.last, start_subject(job.run_id, job.invocation_id, 1)))
        for node in slurm.shape.names:
            slurm.down(node)
            slurm.resume(node)
        end, failed = await lab.end(again), await lab.end(never)
    assert (end.state, end.attempts) == ("completed", 2)
    assert (failed.state, failed.reason, failed.attempts) == ("failed", "node_failure", 1)
    assert once(slurm, again, 1)
    assert once(slurm, again, 2)
    assert once(slurm, never)


# ---------------------------------------------------------------- ensembles


async def test_an_ensemble_is_one_array_and_what_failed_comes_again_in_a_smaller_one(lab: Lab, slurm: Cluster) -> None:
    fails = 'case "$HEADRACE_JOB_ID" in *-1) [ "$0" -ge 5 ];; esac'
    specs = [JobSpec(executable="/bin/sh", arguments=["-c", fails, str(i)], retries=1) for i in range(20)]
    jobs = ensemble(lab, specs, "ensemble")
    async with lab.agent():
        await lab.send(*jobs)
        for place, job in enumerate(jobs):
            end = await lab.end(job)
            assert (end.state, end.attempts) == ("completed", 2 if place < 5 else 1)
        first = await native_ids(lab, jobs)
        second = await native_ids(lab, jobs[:5], 2)
    assert len({native.partition("_")[0] for native in first}) == 1
    assert len(set(first)) == 20
    assert len({native.partition("_")[0] for native in second}) < 5
    assert len(set(second)) == 5
    assert await lab.count(work_subject("*", "*", "ensemble", "*")) == 1


async def test_an_ensemble_that_is_canceled_leaves_nothing(lab: Lab, slurm: Cluster) -> None:
    jobs = ensemble(lab, [shell(f"sleep 300 # {i}") for i in range(30)], "canceled-ensemble")
    async with lab.agent():
        await lab.send(*jobs)
        await native_ids(lab, jobs)
        await lab.cancel("canceled-ensemble")
        await until(lambda: not ours(slurm))


@pytest.mark.parametrize("fault", ["after", "before"])
async def test_an_array_of_unknown_fate_is_submitted_once(
    lab: Lab, slurm: Cluster, tmp_path: Path, fault: Fault
) -> None:
    runs = tmp_path / "runs"
    slurm.fail_sbatch(fault)
    jobs = ensemble(lab, [shell(f"echo {i} >>{runs}") for i in range(10)], f"unsure-{fault}")
    async with lab.agent():
        await lab.send(*jobs)
        for job in jobs:
            assert (await lab.end(job)).state == "completed"
    assert sorted(map(int, runs.read_text().split())) == list(range(10))


# ---------------------------------------------------------------- the agent dies


@pytest.mark.parametrize(
    ("before", "after"), [("hr.submit.", ""), ("", "hr.submit."), ("hr.done.", ""), ("", "hr.done.")]
)
async def test_a_killed_agent_leaves_one_job_one_outcome_and_one_follow_up(
    lab: Lab, slurm: Cluster, nats_server: NatsServer, tmp_path: Path, before: str, after: str
) -> None:
    job = lab.job(shell("true"), then="collect")
    process = AgentProcess(lab, nats_server, tmp_path, before=before, after=after)
    try:
        await lab.send(job)
        await process.stands_still()
    finally:
        process.kill()
    async with lab.agent():
        assert (await lab.end(job)).state == "completed"
        await asyncio.sleep(1.0)  # what comes twice comes soon
    assert once(slurm, job)
    assert await lab.count(done_subject(job.run_id, job.invocation_id)) == 1
    assert await lab.count(work_subject("*", "*", job.run_id, "*")) == 1


async def test_an_agent_killed_between_an_array_and_its_record_leaves_one_array(
    lab: Lab, slurm: Cluster, nats_server: NatsServer, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    jobs = ensemble(lab, [shell(f"echo {i} >>{runs}") for i in range(10)], "killed-ensemble")
    known = set(slurm.jobs())
    process = AgentProcess(lab, nats_server, tmp_path, before="hr.submit.")
    try:
        await lab.send(*jobs)
        await process.stands_still()
    finally:
        process.kill()
    async with lab.agent():
        for job in jobs:
            assert (await lab.end(job)).state == "completed"
        natives = await native_ids(lab, jobs)
    assert sorted(map(int, runs.read_text().split())) == list(range(10))
    names = [name for native, name in slurm.jobs().items() if native not in known and name.startswith("hr-")]
    assert len({native.partition("_")[0] for native in natives}) == 1
    assert len(set(names)) == 1


async def test_a_job_that_is_canceled_while_nobody_knows_whether_it_was_submitted_is_not_left(
    lab: Lab, slurm: Cluster, nats_server: NatsServer, tmp_path: Path
) -> None:
    job = lab.job(shell("sleep 300"))
    process = AgentProcess(lab, nats_server, tmp_path, before="hr.submit.")
    try:
        await lab.send(job)
        await process.stands_still()
    finally:
        process.kill()
    assert ours(slurm)
    await lab.cancel(job.run_id)
    async with lab.agent():
        await until(lambda: not ours(slurm))
