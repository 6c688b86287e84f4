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
from infra.slurm.layout import Shape
from tests.sites import ended, known, reached, shell, submission, timed, until, with_option
from workers.sites import open_site
from workers.sites.base import (
    Known,
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


async def test_a_job_runs_with_its_arguments_environment_and_folder(site: Slurm, tmp_path: Path) -> None:
    spec = msgspec.structs.replace(
        shell('echo "$0 $WORD $(pwd)"; echo "it\'s" >&2; [ -z "$SECRET" ]'),
        environment={"WORD": 'two "words" $HOME\n#SBATCH -H'},
    )
    spec = msgspec.structs.replace(spec, arguments=[*spec.arguments, "a'b"])
    job = submission(tmp_path, "first", spec)
    native_id = await site.submit(job)
    told = (await ended(site, known(job, native_id)))["first"]
    assert (told.state, told.reason, told.exit_code, told.native_id) == ("completed", "", 0, native_id)
    assert (job.folder / "stdout.txt").read_text() == f'a\'b two "words" $HOME\n#SBATCH -H {job.folder}\n'
    assert (job.folder / "stderr.txt").read_text() == "it's\n"
    assert told.started_at is not None
    assert told.ended_at is not None
    assert told.started_at <= told.ended_at


async def test_the_agents_environment_stays_its_own(
    site: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_SECRET", "hidden")
    job = submission(tmp_path, "secretless", shell("env"))
    await ended(site, known(job, await site.submit(job)))
    text = (job.folder / "stdout.txt").read_text()
    assert "HEADRACE_JOB_ID=secretless" in text
    assert "hidden" not in text


@pytest.mark.parametrize(
    ("script", "reason", "code"),
    [("exit 3", "exit_code", 3), ("exit 113", "exit_code", 113), ("kill -9 $$", "signal", 137)],
)
async def test_exit_codes_and_signals_are_told_apart(
    site: Slurm, slurm: Cluster, tmp_path: Path, script: str, reason: str, code: int
) -> None:
    job = submission(tmp_path, f"ends{code}", shell(script))
    native_id = await site.submit(job)
    told = (await ended(site, known(job, native_id)))[job.job_id]
    assert (told.state, told.reason, told.exit_code) == ("failed", reason, code)
    # Slurm is told, too, so that its own accounts and dependencies are right.
    assert f"ExitCode={code}:0" in slurm.run("scontrol", "show", "job", native_id)


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


async def test_a_job_is_queued_then_active_then_canceled(site: Slurm, slurm: Cluster, tmp_path: Path) -> None:
    fillers = slurm.fill()
    job = submission(tmp_path, "waits", shell("sleep 60"))
    asked = known(job, await site.submit(job))
    assert (await site.status([asked]))["waits"].state == "queued"
    slurm.cancel(fillers)
    await reached(site, asked, "active")
    await site.cancel([asked.native_id])
    told = (await ended(site, asked))["waits"]
    assert (told.state, told.reason, told.exit_code) == ("canceled", "canceled", None)
    await site.cancel([asked.native_id])  # once more is no error


async def test_a_job_canceled_while_it_waits_never_ran(site: Slurm, slurm: Cluster, tmp_path: Path) -> None:
    slurm.fill()
    job = submission(tmp_path, "never", shell("touch ran"))
    asked = known(job, await site.submit(job))
    await site.cancel([asked.native_id])
    told = (await ended(site, asked))["never"]
    assert (told.state, told.started_at) == ("canceled", None)
    assert not (job.folder / "ran").exists()


async def test_a_held_job_says_so(site: Slurm, slurm: Cluster, tmp_path: Path) -> None:
    job = submission(tmp_path, "holds", with_option(shell("true"), begin="now+1hour"))
    asked = known(job, await site.submit(job))
    assert (await site.status([asked]))["holds"].state == "queued"
    slurm.run("scontrol", "hold", asked.native_id)
    told = await reached(site, asked, "held")
    assert "JobHeld" in told.detail


async def test_walltime(site: Slurm, tmp_path: Path) -> None:
    job = submission(tmp_path, "long", timed(shell("trap 'exit 0' TERM; while :; do sleep 0.1; done"), "1s"))
    told = (await ended(site, known(job, await site.submit(job)), seconds=120))["long"]
    assert (told.state, told.reason) == ("failed", "walltime")


async def test_a_node_that_goes_down_is_told_from_a_program_that_fails(
    site: Slurm, slurm: Cluster, tmp_path: Path
) -> None:
    job = submission(tmp_path, "struck", with_option(shell("sleep 60"), nodelist="n3"))
    asked = known(job, await site.submit(job))
    await reached(site, asked, "active")
    slurm.down("n3")
    told = (await ended(site, asked))["struck"]
    assert (told.state, told.reason, told.restarts) == ("failed", "node_failure", 0)
    assert (await site.capacity()).nodes_unusable == 1


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


async def test_options_that_the_promise_stands_on_are_not_the_users(site: Slurm, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"slurm\.job-name"):
        await site.submit(submission(tmp_path, "named", with_option(shell("true"), **{"job-name": "mine"})))


async def test_a_container_is_refused_where_there_is_none(site: Slurm, tmp_path: Path) -> None:
    spec = JobSpec(executable="md", container="md.sif")
    with pytest.raises(BadRequest, match=r"site lab runs no containers.*md\.sif"):
        await site.submit(submission(tmp_path, "boxed", spec))


# ---------------------------------------------------------------- exactly once


async def test_the_same_job_again_is_the_same_native_job(
    site: Slurm, slurm: Cluster, config: SiteConfig, tmp_path: Path
) -> None:
    job = submission(tmp_path, "again", shell("echo ran >>count"))
    native_id = await site.submit(job)
    assert await site.submit(job) == native_id
    assert await open_site(config).submit(job) == native_id
    await ended(site, known(job, native_id))
    assert await site.submit(job) == native_id
    assert named(slurm, "hr-again") == 1
    assert (job.folder / "count").read_text() == "ran\n"


@pytest.mark.parametrize("fault", ["after", "late"])
async def test_an_sbatch_that_timed_out_and_was_heard_gives_one_job(
    site: Slurm, slurm: Cluster, tmp_path: Path, fault: str
) -> None:
    slurm.fail_sbatch("after" if fault == "after" else "late")
    job = submission(tmp_path, f"unsure-{fault}", shell("true"))
    asked = known(job, await site.submit(job))
    assert (await ended(site, asked))[job.job_id].state == "completed"
    assert named(slurm, f"hr-{job.job_id}") == 1


async def test_an_sbatch_that_timed_out_unheard_is_made_again(site: Slurm, slurm: Cluster, tmp_path: Path) -> None:
    slurm.fail_sbatch("before")
    job = submission(tmp_path, "unheard", shell("true"))
    with pytest.raises(SubmitUnsure, match="timed out"):
        await site.submit(job)
    assert await site.find("unheard", job.folder) is None
    asked = known(job, await site.submit(job))
    assert (await ended(site, asked))["unheard"].state == "completed"
    assert named(slurm, "hr-unheard") == 1


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
    script = Path(site.config.work) / "psij" / "slurm" / "hr-twin.job"
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


async def test_a_controller_that_is_away_has_ended_no_job(site: Slurm, slurm: Cluster, tmp_path: Path) -> None:
    job = submission(tmp_path, "outlives", shell("sleep 3; exit 4"))
    asked = known(job, await site.submit(job))
    await reached(site, asked, "active")
    slurm.stop_controller()
    with pytest.raises(SiteUnreachable):
        await site.status([asked])
    with pytest.raises(SiteUnreachable):
        await site.capacity()
    with pytest.raises((SubmitUnsure, SiteUnreachable)):
        await site.submit(submission(tmp_path, "absent", shell("true")))
    slurm.start_controller()
    told = (await ended(site, asked))["outlives"]
    assert (told.state, told.exit_code) == ("failed", 4)


async def test_a_controller_that_hangs_and_wakes_gives_one_job(site: Slurm, slurm: Cluster, tmp_path: Path) -> None:
    slurm.hang_controller()
    job = submission(tmp_path, "frozen", shell("true"))
    with pytest.raises((SubmitUnsure, SiteUnreachable)):
        await site.submit(job)
    slurm.wake_controller()
    asked = known(job, await site.submit(job))
    assert (await ended(site, asked))["frozen"].state == "completed"
    assert named(slurm, "hr-frozen") == 1


async def test_jobs_that_slurm_forgot_are_told_from_their_own_records(config: SiteConfig, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "forgetful", Shape(nodes=1, gpus=0, finished_kept_s=2))
    cluster.start(tied=True)
    try:
        site = open_site(msgspec.structs.replace(config, environment=cluster.env))
        good, bad = submission(tmp_path, "good", shell("true")), submission(tmp_path, "bad", shell("exit 7"))
        killed = submission(tmp_path, "killed", shell("sleep 60"))
        asked = [known(job, await site.submit(job)) for job in (good, bad, killed)]
        await until(site, asked, lambda told: told["killed"].state == "active")
        cluster.cancel([asked[2].native_id])
        give_up_at = time.monotonic() + 60
        while cluster.run("squeue", "-h", "-t", "all"):
            assert time.monotonic() < give_up_at
            await asyncio.sleep(0.2)
        told = await ended(site, *asked)
        assert (told["good"].state, told["good"].exit_code) == ("completed", 0)
        assert (told["bad"].state, told["bad"].reason, told["bad"].exit_code) == ("failed", "exit_code", 7)
        # Nobody knows any more how this one ended, so nobody says that it completed.
        assert (told["killed"].state, told["killed"].reason) == ("failed", "lost")
        never = Known(job_id="never", native_id="999999", folder=tmp_path / "never")
        assert (await ended(site, never))["never"].reason == "lost"
    finally:
        cluster.stop()


# ---------------------------------------------------------------- arrays


async def test_an_ensemble_is_one_array_and_each_member_its_own_job(
    site: Slurm, slurm: Cluster, tmp_path: Path
) -> None:
    jobs = [submission(tmp_path, f"member{i}", shell(f'echo "{i} $HEADRACE_JOB_ID"; exit {i % 3}')) for i in range(12)]
    native = await site.submit_array("ensemble", jobs)
    assert await site.submit_array("ensemble", jobs) == native
    assert len({native_id.partition("_")[0] for native_id in native.values()}) == 1
    told = await ended(site, *(known(job, native[job.job_id]) for job in jobs))
    for i, job in enumerate(jobs):
        status = told[job.job_id]
        assert (status.state, status.exit_code) == ("completed" if i % 3 == 0 else "failed", i % 3), status
        assert (job.folder / "stdout.txt").read_text() == f"{i} member{i}\n"
    assert named(slurm, "hr-ensemble") == 12


async def test_an_array_whose_submission_timed_out_is_found_again(site: Slurm, slurm: Cluster, tmp_path: Path) -> None:
    slurm.fail_sbatch("after")
    jobs = [submission(tmp_path, f"part{i}", shell("true")) for i in range(3)]
    native = await site.submit_array("lucky", jobs)
    told = await ended(site, *(known(job, native[job.job_id]) for job in jobs))
    assert {status.state for status in told.values()} == {"completed"}
    assert named(slurm, "hr-lucky") == 3


async def test_jobs_of_different_shapes_are_no_array(site: Slurm, tmp_path: Path) -> None:
    jobs = [
        submission(tmp_path, "small", shell("true")),
        submission(tmp_path, "big", shell("true", Resources(node_count=2))),
    ]
    with pytest.raises(BadRequest, match="small and big"):
        await site.submit_array("mixed", jobs)
