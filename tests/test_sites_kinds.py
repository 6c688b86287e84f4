"""What every batch system must do, on each: a real Slurm, PBS's commands over it, and fakes of LSF and Flux."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec
import pytest

from headrace.errors import BadRequest
from headrace.jobs import JobAttributes, Resources
from infra.slurm.cluster import Cluster
from tests.kinds import OVER_SLURM, QUEUED_KINDS, Faked, Kind, OverSlurm, named_kind, over_slurm, site_config
from tests.sites import ended, known, reached, shell, submission, timed, until
from workers.sites import open_site
from workers.sites.base import BatchSystem, Known, SiteUnreachable, SubmitRejected, SubmitUnsure

ARRAYS = ("slurm", "pbs", "lsf")


@pytest.fixture(params=QUEUED_KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    return named_kind(request, request.param, tmp_path)


@pytest.fixture
def site(kind: Kind) -> BatchSystem:
    return open_site(kind.config)


# ---------------------------------------------------------------- how it runs


async def test_a_job_runs_with_its_arguments_environment_and_folder(
    site: BatchSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_SECRET", "hidden")
    spec = msgspec.structs.replace(
        shell('echo "$0 $WORD $(pwd)"; echo "it\'s" >&2; [ -z "$AGENT_SECRET" ]'),
        environment={"WORD": 'two "words" $HOME\n#SBATCH -H'},
    )
    spec = msgspec.structs.replace(spec, arguments=[*spec.arguments, "a'b"])
    job = submission(tmp_path, f"{site.config.kind}-first", spec)
    native_id = await site.submit(job)
    told = (await ended(site, known(job, native_id)))[job.job_id]
    assert (told.state, told.reason, told.exit_code, told.native_id) == ("completed", "", 0, native_id), told
    assert (job.folder / "stdout.txt").read_text() == f'a\'b two "words" $HOME\n#SBATCH -H {job.folder}\n'
    assert (job.folder / "stderr.txt").read_text() == "it's\n"
    assert told.started_at is not None
    assert told.ended_at is not None
    assert told.started_at <= told.ended_at
    assert not Path(site.config.work).exists()  # nothing lies anywhere but in the job's own folder


async def test_resources_are_asked_for_in_the_words_of_each(kind: Kind, site: BatchSystem, tmp_path: Path) -> None:
    resources = Resources(
        node_count=2, processes_per_node=2, cpu_cores_per_process=2, gpu_cores_per_process=1, memory=64 << 20
    )
    kind.hold()
    job = submission(tmp_path, f"{kind.config.kind}-shaped", timed(shell("true", resources), "90s"))
    native_id = await site.submit(job)
    script = job.folder / ".headrace" / "batch.sh"
    asked = [line.partition(" ")[2] for line in script.read_text().splitlines() if line.startswith("#")]
    wanted = {
        "slurm": (
            "--nodes=2",
            "--ntasks=4",
            "--gpus-per-task=1",
            "--cpus-per-task=2",
            "--mem=32768K",
            "--time=0:01:30",
        ),
        "pbs": ("-l select=2:ncpus=4:mpiprocs=2:ngpus=2:mem=32768kb", "-l walltime=0:01:30", "-r n"),
        "pbs_classic": ("-l nodes=2:ppn=4:gpus=2", "-l mem=65536kb", "-l walltime=0:01:30", "-r n"),
        "lsf": ("-n 4", '-R "span[ptile=2]"', '-R "affinity[core(2)]"', '-gpu "num=1/task"', "-M 32768KB", "-W 2"),
        "flux": ("--nodes=2 --nslots=4", "--cores-per-slot=2", "--gpus-per-slot=1", "--time-limit=90s"),
    }
    assert set(wanted[kind.config.kind]) <= set(asked), asked
    await site.cancel([known(job, native_id)])


@pytest.mark.parametrize(
    ("script", "reason", "code"),
    [
        ("exit 3", "exit_code", 3),
        ("exit 113", "exit_code", 113),
        ("exit 255", "exit_code", 255),  # what Python's sys.exit(-1) is
        ("kill -9 $$", "signal", 137),
    ],
)
async def test_exit_codes_and_signals_are_told_apart(
    site: BatchSystem, tmp_path: Path, script: str, reason: str, code: int
) -> None:
    job = submission(tmp_path, f"{site.config.kind}-ends{code}", shell(script))
    native_id = await site.submit(job)
    told = (await ended(site, known(job, native_id)))[job.job_id]
    assert (told.state, told.reason, told.exit_code) == ("failed", reason, code), told


async def test_a_job_is_queued_then_active_then_canceled(kind: Kind, site: BatchSystem, tmp_path: Path) -> None:
    kind.hold()
    job = submission(tmp_path, f"{kind.config.kind}-waits", shell("sleep 60"))
    asked = known(job, await site.submit(job))
    assert (await site.status([asked]))[job.job_id].state == "queued"
    kind.release()
    await reached(site, asked, "active")
    await site.cancel([asked])
    told = (await ended(site, asked))[job.job_id]
    assert (told.state, told.reason, told.exit_code) == ("canceled", "canceled", None), told
    await site.cancel([asked])  # once more is no error


async def test_a_job_canceled_while_it_waits_never_ran(kind: Kind, site: BatchSystem, tmp_path: Path) -> None:
    kind.hold()
    job = submission(tmp_path, f"{kind.config.kind}-never", shell("touch ran"))
    asked = known(job, await site.submit(job))
    await site.cancel([asked])
    told = (await ended(site, asked))[job.job_id]
    assert (told.state, told.reason, told.started_at) == ("canceled", "canceled", None), told
    assert not (job.folder / "ran").exists()


# ---------------------------------------------------------------- limits

OVER_TIME = shell("trap 'exit 0' TERM; while :; do sleep 0.1; done")


async def test_walltime_at_slurm_and_behind_the_commands_of_pbs(slurm: Cluster, tmp_path: Path) -> None:
    """All at once: Slurm looks at the time of its jobs twice in a minute."""
    asked = []
    for name in OVER_SLURM:
        site = open_site(over_slurm(name, slurm, tmp_path / name).config)
        job = submission(tmp_path, f"{name}-long", timed(OVER_TIME, "1s"))
        asked.append((site, known(job, await site.submit(job))))
    await asyncio.gather(*(reached(site, job, "active") for site, job in asked))
    slurm.end_soon([job.native_id for _, job in asked])
    told = await asyncio.gather(*(ended(site, job, seconds=120) for site, job in asked))
    assert [(status.state, status.reason) for found in told for status in found.values()] == [
        ("failed", "walltime")
    ] * len(asked), told


@pytest.mark.parametrize("name", ["lsf", "flux"])
async def test_walltime_of_others(name: str, tmp_path: Path) -> None:
    site = open_site(Faked(name, tmp_path).config)
    job = submission(tmp_path, "long", timed(OVER_TIME, "1s"))
    told = (await ended(site, known(job, await site.submit(job))))["long"]
    assert (told.state, told.reason) == ("failed", "walltime"), told


GREEDY = f"exec {sys.executable} -c 'import time; held = bytearray(200 << 20); time.sleep(60)'"


@pytest.mark.parametrize("launcher", [None, "srun"])
async def test_a_program_that_takes_too_much_memory_is_told_from_one_that_was_killed(
    slurm: Cluster, tmp_path: Path, launcher: str | None
) -> None:
    """A real program over its limit on a real Slurm, whose state of the job is that of any killed one."""
    site = open_site(OverSlurm("slurm", slurm, tmp_path).config)
    spec = msgspec.structs.replace(shell(GREEDY, Resources(memory=50 << 20)), launcher=launcher)
    if launcher is not None:
        spec = msgspec.structs.replace(spec, resources=Resources(process_count=2, memory=50 << 20))
    job = submission(tmp_path, f"greedy-{launcher}", spec)
    told = (await ended(site, known(job, await site.submit(job))))[job.job_id]
    assert (told.state, told.reason) == ("failed", "out_of_memory"), told
    assert "memory limit" in told.detail


async def test_a_program_that_takes_too_much_memory_at_lsf(tmp_path: Path) -> None:
    site = open_site(Faked("lsf", tmp_path).config)
    job = submission(tmp_path, "greedy", shell(GREEDY, Resources(memory=50 << 20)))
    told = (await ended(site, known(job, await site.submit(job))))["greedy"]
    assert (told.state, told.reason) == ("failed", "out_of_memory"), told


@pytest.mark.parametrize("name", OVER_SLURM)
async def test_a_node_that_goes_down_is_told_from_a_program_that_fails(
    slurm: Cluster, tmp_path: Path, name: str
) -> None:
    site = open_site(over_slurm(name, slurm, tmp_path).config)
    job = submission(tmp_path, f"{name}-struck", shell("sleep 60"))
    asked = known(job, await site.submit(job))
    nodes = (await until(site, [asked], lambda told: bool(told[job.job_id].nodes)))[job.job_id].nodes
    slurm.down(nodes)
    told = (await ended(site, asked))[job.job_id]
    assert (told.state, told.reason, told.restarts) == ("failed", "node_failure", 0), told


# ---------------------------------------------------------------- exactly once


async def test_the_same_job_again_is_the_same_native_job(kind: Kind, site: BatchSystem, tmp_path: Path) -> None:
    job = submission(tmp_path, f"{kind.config.kind}-again", shell("echo ran >>count"))
    native_id = await site.submit(job)
    assert await site.submit(job) == native_id
    assert await open_site(kind.config).submit(job) == native_id
    await ended(site, known(job, native_id))
    assert await site.submit(job) == native_id
    assert kind.named(f"hr-{job.job_id}") == 1
    assert (job.folder / "count").read_text() == "ran\n"


@pytest.mark.parametrize("fault", ["after", "late"])
async def test_a_submission_that_timed_out_and_was_heard_gives_one_job(
    kind: Kind, site: BatchSystem, tmp_path: Path, fault: str
) -> None:
    kind.fail(fault)
    job = submission(tmp_path, f"{kind.config.kind}-unsure-{fault}", shell("true"))
    asked = known(job, await site.submit(job))
    assert (await ended(site, asked))[job.job_id].state == "completed"
    assert kind.named(f"hr-{job.job_id}") == 1


async def test_a_submission_that_timed_out_unheard_is_made_again(kind: Kind, site: BatchSystem, tmp_path: Path) -> None:
    kind.fail("before")
    job = submission(tmp_path, f"{kind.config.kind}-unheard", shell("true"))
    with pytest.raises(SubmitUnsure, match=r"timed out|not responding"):
        await site.submit(job)
    assert await site.find(job.job_id, job.folder) is None
    asked = known(job, await site.submit(job))
    assert (await ended(site, asked))[job.job_id].state == "completed"
    assert kind.named(f"hr-{job.job_id}") == 1


async def test_a_job_that_flux_took_and_whose_id_is_not_known_is_found_by_its_name(tmp_path: Path) -> None:
    kind = Faked("flux", tmp_path)
    (kind.folder / "fault-id").touch()
    site, job = open_site(kind.config), submission(tmp_path, "flux-nameless", shell("true"))
    asked = known(job, await site.submit(job))
    assert (await ended(site, asked))[job.job_id].state == "completed"
    assert kind.named(f"hr-{job.job_id}") == 1


async def test_a_job_that_the_batch_system_refuses_is_rejected_with_its_words(
    site: BatchSystem, tmp_path: Path
) -> None:
    spec = msgspec.structs.replace(shell("true"), attributes=JobAttributes(queue_name="nowhere"))
    with pytest.raises(SubmitRejected, match=r"(?s)lab did not take hr-refused.*(nowhere|partition)"):
        await site.submit(submission(tmp_path, "refused", spec))


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *(("slurm", f"slurm.{option}") for option in ("job-name", "arra", "outpu", "expor", "job-n", "clusters", "q")),
        *(("pbs", f"pbs.{option}") for option in ("N", "J0-3", "lz")),
        *(("pbs_classic", f"pbs.{option}") for option in ("N", "t0-3")),
        *(("lsf", f"lsf.{option}") for option in ("J", "Q")),
        *(("flux", f"flux.{option}") for option in ("job-name", "job-n", "setattr")),
    ],
)
async def test_options_that_the_promise_stands_on_are_not_the_users(tmp_path: Path, name: str, option: str) -> None:
    spec = msgspec.structs.replace(shell("true"), attributes=JobAttributes(custom_attributes={option: "mine"}))
    site = open_site(site_config(name, tmp_path, {}))
    with pytest.raises(BadRequest, match=option):
        await site.submit(submission(tmp_path, "named", spec))


# ---------------------------------------------------------------- a batch system that does not answer, or forgets


async def test_one_that_is_away_has_ended_no_job(kind: Kind, site: BatchSystem, tmp_path: Path) -> None:
    job = submission(tmp_path, f"{kind.config.kind}-outlives", shell("sleep 3; exit 4"))
    asked = known(job, await site.submit(job))
    await reached(site, asked, "active")
    kind.stop()
    with pytest.raises(SiteUnreachable):
        await site.status([asked])
    with pytest.raises((SubmitUnsure, SiteUnreachable)):
        await site.submit(submission(tmp_path, f"{kind.config.kind}-absent", shell("true")))
    kind.start()
    told = (await ended(site, asked))[job.job_id]
    assert (told.state, told.exit_code) == ("failed", 4)


@pytest.mark.parametrize("name", QUEUED_KINDS)
async def test_jobs_that_it_forgot_are_told_from_their_own_records(
    request: pytest.FixtureRequest, name: str, tmp_path: Path
) -> None:
    cluster: Cluster | None = request.getfixturevalue("forgetful") if name in OVER_SLURM else None
    kind = Faked(name, tmp_path) if cluster is None else over_slurm(name, cluster, tmp_path)
    site = open_site(kind.config)
    scripts = {"good": "true", "bad": "exit 7", "killed": "sleep 60", "going": "sleep 60"}
    jobs = [submission(tmp_path, f"{name}-{word}", shell(script)) for word, script in scripts.items()]
    asked = [known(job, await site.submit(job)) for job in jobs]
    good, bad, killed, going = (job.job_id for job in jobs)
    await until(site, asked, lambda told: (told[killed].state, told[going].state) == ("active", "active"))
    await site.cancel([asked[2]])
    if cluster is not None:
        while len(cluster.run("squeue", "-h", "-t", "all").splitlines()) > 1:
            await asyncio.sleep(0.2)
    elif isinstance(kind, Faked):
        while sum("ended" in job for job in kind.jobs()) < 3:
            await asyncio.sleep(0.02)
        kind.forget()
    told = await ended(site, *asked[:3])
    assert (told[good].state, told[good].exit_code) == ("completed", 0)
    assert (told[bad].state, told[bad].reason, told[bad].exit_code) == ("failed", "exit_code", 7)
    # Nobody knows any more how this one ended, so nobody says that it completed.
    assert (told[killed].state, told[killed].reason) == ("failed", "lost")
    # A job that is not known hides none that is.
    never = Known(job_id="never", native_id="999999", folder=tmp_path / "never")
    both = await until(site, [never, asked[3]], lambda told: told["never"].state == "failed")
    assert (both["never"].reason, both[going].state) == ("lost", "active")
    await site.cancel([asked[3]])


@pytest.mark.parametrize(
    ("name", "command"),
    [("slurm", "squeue"), ("pbs", "qselect"), ("pbs_classic", "qselect"), ("lsf", "bjobs"), ("flux", "flux")],
)
async def test_a_site_without_the_commands_says_which(tmp_path: Path, name: str, command: str) -> None:
    site = open_site(site_config(name, tmp_path, {"PATH": str(tmp_path)}))
    with pytest.raises(SiteUnreachable, match=f"{command} is not installed") as error:
        await site.submit(submission(tmp_path, "first", shell("true")))
    assert "PATH" in error.value.hint


# ---------------------------------------------------------------- several


@pytest.mark.parametrize("kind", ARRAYS, indirect=True)
async def test_an_ensemble_is_one_array_and_each_member_its_own_job(
    kind: Kind, site: BatchSystem, tmp_path: Path
) -> None:
    name = kind.config.kind
    kind.fail("after")  # it is found again, as one job is
    jobs = [submission(tmp_path, f"{name}-m{i}", shell(f'echo "{i} $HEADRACE_JOB_ID"; exit {i % 3}')) for i in range(6)]
    native = await site.submit_array(f"{name}-ensemble", jobs)
    assert await site.submit_array(f"{name}-ensemble", jobs) == native
    told = await ended(site, *(known(job, native[job.job_id]) for job in jobs))
    for i, job in enumerate(jobs):
        status = told[job.job_id]
        assert (status.state, status.exit_code) == ("completed" if i % 3 == 0 else "failed", i % 3), status
        assert (job.folder / "stdout.txt").read_text() == f"{i} {job.job_id}\n"
    assert kind.named(f"hr-{name}-ensemble") == 6
    assert not Path(site.config.work).exists()


@pytest.mark.parametrize("kind", ARRAYS, indirect=True)
async def test_one_member_is_canceled_and_the_others_are_not(kind: Kind, site: BatchSystem, tmp_path: Path) -> None:
    name = kind.config.kind
    jobs = [submission(tmp_path, f"{name}-part{i}", shell("sleep 60")) for i in range(2)]
    native = await site.submit_array(f"{name}-parts", jobs)
    assert await site.find(f"{name}-parts", tmp_path / f"hr-{name}-parts", 1) == native[jobs[1].job_id]
    asked = [known(job, native[job.job_id]) for job in jobs]
    await until(site, asked, lambda told: all(status.state == "active" for status in told.values()))
    await site.cancel([asked[0]])
    assert (await ended(site, asked[0]))[jobs[0].job_id].state == "canceled"
    assert (await site.status([asked[1]]))[jobs[1].job_id].state == "active"
    await site.cancel([asked[1]])


async def test_processes_of_a_job_at_flux_are_started_by_flux(tmp_path: Path) -> None:
    site = open_site(Faked("flux", tmp_path).config)
    spec = shell('echo "$FLUX_TASK_RANK $WORD"', Resources(node_count=2, processes_per_node=2))
    job = submission(tmp_path, "wide", msgspec.structs.replace(spec, environment={"WORD": "here"}))
    told = (await ended(site, known(job, await site.submit(job))))["wide"]
    assert told.state == "completed", (job.folder / "stderr.txt").read_text()
    assert sorted((job.folder / "stdout.txt").read_text().splitlines()) == [f"{rank} here" for rank in range(4)]
