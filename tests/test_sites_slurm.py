"""Jobs on a real Slurm: each exactly once, and told apart by how they ended."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from headrace.errors import BadRequest
from headrace.jobs import JobSpec, Resources
from infra.slurm.cluster import Cluster
from tests.sites import ended, known, reached, shell, submission, timed, until, with_option
from workers.sites import open_site
from workers.sites.base import (
    SiteConfig,
    SiteUnreachable,
    SubmitBusy,
    SubmitRejected,
    SubmitUnsure,
)
from workers.sites.slurm import Slurm

SETTLE_S = 2.5  # longer than the wrapper's late submission takes


@pytest.fixture
def config(slurm: Cluster, tmp_path: Path) -> SiteConfig:
    return SiteConfig(
        name="lab", kind="slurm", work=str(tmp_path / "work"), environment=slurm.env, settle_s=SETTLE_S, unseen_s=2.0
    )


@pytest.fixture
def site(config: SiteConfig) -> Slurm:
    opened = open_site(config)
    assert isinstance(opened, Slurm)
    return opened


def named(cluster: Cluster, name: str) -> int:
    return list(cluster.jobs().values()).count(name)


async def test_the_agents_environment_stays_its_own(
    site: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_SECRET", "hidden")
    job = submission(tmp_path, "secretless", shell("env"))
    await ended(site, known(job, await site.submit(job)))
    text = (job.folder / "stdout.txt").read_text()
    assert "HEADRACE_JOB_ID=secretless" in text
    assert "hidden" not in text


async def test_gpus_are_the_jobs_own(site: Slurm, tmp_path: Path) -> None:
    spec = shell('echo "$CUDA_VISIBLE_DEVICES"; sleep 2', Resources(gpu_cores_per_process=2))
    jobs = [submission(tmp_path, f"gpu{i}", with_option(spec, nodelist="n1")) for i in range(2)]
    asked = [known(job, await site.submit(job)) for job in jobs]
    await until(site, asked, lambda told: all(status.state == "active" for status in told.values()))
    capacity = await site.capacity()
    assert (capacity.nodes_total, capacity.gpus_total, capacity.gpus_free, capacity.jobs_running) == (3, 12, 8, 2)
    assert capacity.nodes_free == 2
    told = await ended(site, *asked)
    assert {status.state for status in told.values()} == {"completed"}
    devices = [(job.folder / "stdout.txt").read_text().strip().split(",") for job in jobs]
    assert sorted(devices[0] + devices[1]) == ["0", "1", "2", "3"]


async def test_processes_are_started_on_all_nodes(site: Slurm, tmp_path: Path) -> None:
    spec = shell('echo "$SLURMD_NODENAME $SLURM_PROCID $WORD"', Resources(node_count=2, processes_per_node=2))
    job = submission(tmp_path, "wide", msgspec.structs.replace(spec, environment={"WORD": "here"}))
    told = (await ended(site, known(job, await site.submit(job))))["wide"]
    assert told.state == "completed", (job.folder / "stderr.txt").read_text()
    lines = [line.split() for line in (job.folder / "stdout.txt").read_text().splitlines()]
    assert len({node for node, _, _ in lines}) == 2
    assert sorted(rank for _, rank, _ in lines) == ["0", "1", "2", "3"]
    assert {word for _, _, word in lines} == {"here"}


async def test_a_held_job_says_so(site: Slurm, slurm: Cluster, tmp_path: Path) -> None:
    job = submission(tmp_path, "holds", with_option(shell("true"), begin="now+1hour"))
    asked = known(job, await site.submit(job))
    assert (await site.status([asked]))["holds"].state == "queued"
    slurm.run("scontrol", "hold", asked.native_id)
    told = await reached(site, asked, "held")
    assert "JobHeld" in told.detail


async def test_a_node_that_loses_power_fails_its_job(site: Slurm, slurm: Cluster, tmp_path: Path) -> None:
    job = submission(tmp_path, "dark", with_option(shell("echo $$ >pid; sleep 300"), nodelist="n2"))
    asked = known(job, await site.submit(job))
    await reached(site, asked, "active")
    slurm.kill_node("n2")
    told = (await ended(site, asked, seconds=120))["dark"]
    assert (told.state, told.reason) == ("failed", "node_failure")


async def test_no_odd_job_of_ours_or_of_others_hides_the_rest(site: Slurm, slurm: Cluster, tmp_path: Path) -> None:
    for node in ("n1", "n2"):
        slurm.drain(node)
    slurm.run("sbatch", "--job-name=a | b  c", "--nodelist=n1", "--output=/dev/null", "--wrap=sleep 60")
    late = submission(
        tmp_path, "late", with_option(timed(shell("true"), "5m"), nodelist="n1", deadline="now+30seconds")
    )
    fine = submission(tmp_path, "fine", shell("true"))
    asked = [known(late, await site.submit(late)), known(fine, await site.submit(fine))]
    told = await ended(site, *asked)
    assert (told["late"].state, told["late"].reason) == ("failed", "deadline")
    assert told["fine"].state == "completed"


async def test_a_drained_site_takes_jobs_that_wait(site: Slurm, slurm: Cluster, tmp_path: Path) -> None:
    for node in slurm.shape.names:
        slurm.drain(node)
    capacity = await site.capacity()
    assert (capacity.nodes_unusable, capacity.gpus_total, capacity.gpus_free) == (3, 12, 0)
    job = submission(tmp_path, "patient", shell("true"))
    asked = known(job, await site.submit(job))
    told = await until(
        site, [asked], lambda told: "NotAvail" in told["patient"].detail or "DRAINED" in told["patient"].detail
    )
    assert told["patient"].state == "queued"
    for node in slurm.shape.names:
        slurm.resume(node)
    assert (await ended(site, asked))["patient"].state == "completed"


async def test_a_closed_partition_takes_no_jobs_now_and_an_impossible_job_is_refused(
    site: Slurm, slurm: Cluster, tmp_path: Path
) -> None:
    slurm.set_partition("INACTIVE")
    assert not (await site.capacity()).queue_open
    with pytest.raises(SubmitBusy, match=r"(?s)lab did not take hr-refused.*inactive"):
        await site.submit(submission(tmp_path, "refused", shell("true")))
    slurm.set_partition("UP")
    with pytest.raises(SubmitRejected, match="node configuration"):
        await site.submit(submission(tmp_path, "huge", shell("true", Resources(gpu_cores_per_process=99))))


async def test_a_container_is_refused_where_there_is_none(site: Slurm, tmp_path: Path) -> None:
    spec = JobSpec(executable="md", container="md.sif")
    with pytest.raises(BadRequest, match=r"site lab runs no containers.*md\.sif"):
        await site.submit(submission(tmp_path, "boxed", spec))


# ---------------------------------------------------------------- exactly once


async def test_an_sbatch_that_hangs_is_given_up_on_and_holds_nobody_else_up(
    slurm: Cluster, config: SiteConfig, tmp_path: Path
) -> None:
    hasty = open_site(msgspec.structs.replace(config, command_s=1.0))
    slurm.fail_sbatch("hang")
    job = submission(tmp_path, "hung", shell("true"))
    with pytest.raises(SubmitUnsure):
        await hasty.submit(job)
    other = submission(tmp_path, "other", shell("true"))
    assert (await ended(hasty, known(other, await hasty.submit(other))))["other"].state == "completed"


async def test_an_agent_killed_while_it_submits_leaves_one_job(
    slurm: Cluster, config: SiteConfig, site: Slurm, tmp_path: Path
) -> None:
    """The agent is gone, its sbatch is not: who comes next waits for that one and finds its job."""
    slurm.fail_sbatch("slow")
    job = submission(tmp_path, "orphan", shell("echo ran >>count"))
    script = """if True:
        import asyncio, sys
        from pathlib import Path
        import msgspec
        from workers.sites import open_site
        from workers.sites.base import SiteConfig, Submission
        config = msgspec.json.decode(sys.argv[1].encode(), type=SiteConfig)
        job = msgspec.json.decode(sys.argv[2].encode(), type=Submission, dec_hook=lambda of, text: of(text))
        asyncio.run(open_site(config).submit(job))
    """
    agent = subprocess.Popen(  # noqa: ASYNC220 - it is killed before anything waits for it
        [sys.executable, "-P", "-c", script, msgspec.json.encode(config), msgspec.json.encode(job, enc_hook=str)]
    )
    give_up_at = time.monotonic() + 20
    while not (job.folder / ".headrace" / "attempt").exists():
        assert time.monotonic() < give_up_at
        await asyncio.sleep(0.01)
    agent.send_signal(signal.SIGKILL)
    agent.wait()
    native_id = None
    while native_id is None:
        try:
            native_id = await site.submit(job)
        except SubmitUnsure:
            assert time.monotonic() < give_up_at
            await asyncio.sleep(0.1)
    await ended(site, known(job, native_id))
    assert named(slurm, "hr-orphan") == 1
    assert (job.folder / "count").read_text() == "ran\n"


async def test_of_two_native_jobs_of_one_job_only_one_runs_the_program(
    site: Slurm, slurm: Cluster, tmp_path: Path
) -> None:
    """A second submission that nobody could prevent ends at the claim, and the one that runs is the one told of."""
    fillers = slurm.fill()
    job = submission(tmp_path, "twin", shell("echo ran >>count; sleep 1"))
    first = await site.submit(job)
    script = job.folder / ".headrace" / "batch.sh"
    second = slurm.run("sbatch", "--parsable", str(script)).strip()
    slurm.run("scontrol", "hold", first)  # so the second one is quicker
    slurm.cancel(fillers)
    asked = known(job, first)
    await until(site, [asked], lambda told: told["twin"].state == "active")
    slurm.run("scontrol", "release", first)
    told = (await ended(site, asked))["twin"]
    assert (told.state, told.native_id) == ("completed", second)
    while "hr-twin" in slurm.run("squeue", "-h", "-o", "%j"):
        await asyncio.sleep(0.1)
    assert (job.folder / "count").read_text() == "ran\n"


# ---------------------------------------------------------------- a controller that is away


async def test_a_controller_that_hangs_and_wakes_gives_one_job(site: Slurm, slurm: Cluster, tmp_path: Path) -> None:
    slurm.hang_controller()
    job = submission(tmp_path, "frozen", shell("true"))
    with pytest.raises((SubmitUnsure, SiteUnreachable)):
        await site.submit(job)
    slurm.wake_controller()
    asked = known(job, await site.submit(job))
    assert (await ended(site, asked))["frozen"].state == "completed"
    assert named(slurm, "hr-frozen") == 1


async def test_a_directory_is_the_one_that_is_named_whatever_signs_it_holds(site: Slurm, tmp_path: Path) -> None:
    where = tmp_path / 'it\'s a "folder" $HOME #50%j'
    job = submission(tmp_path, "signs", msgspec.structs.replace(shell("pwd >here.txt"), directory=str(where)))
    assert (await ended(site, known(job, await site.submit(job))))["signs"].state == "completed"
    assert (where / "here.txt").read_text() == f"{where}\n"


# ---------------------------------------------------------------- arrays


async def test_jobs_of_different_shapes_are_no_array(site: Slurm, tmp_path: Path) -> None:
    jobs = [
        submission(tmp_path, "small", shell("true")),
        submission(tmp_path, "big", shell("true", Resources(node_count=2))),
    ]
    with pytest.raises(BadRequest, match="small and big"):
        await site.submit_array("mixed", jobs)
