"""Jobs on this machine: no queue, but the same promises."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from headrace.jobs import JobSpec, Resources
from tests.sites import ended, known, reached, shell, submission, timed
from workers.sites import open_site
from workers.sites.base import Known, SiteConfig, SubmitBusy, SubmitRejected
from workers.sites.local import Local


@pytest.fixture
def config(tmp_path: Path) -> SiteConfig:
    return SiteConfig(name="here", kind="local", work=str(tmp_path / "work"), jobs_max=4)


@pytest.fixture
def site(config: SiteConfig) -> Local:
    return Local(config, gpus=["0", "1", "2", "3"])


async def test_a_job_runs_with_its_arguments_environment_and_folder(
    site: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_SECRET", "hidden")
    spec = msgspec.structs.replace(shell('echo "$WORD $(pwd) $AGENT_SECRET"'), environment={"WORD": "a 'b'"})
    job = submission(tmp_path, "first", spec)
    told = (await ended(site, known(job, await site.submit(job))))["first"]
    assert (told.state, told.exit_code) == ("completed", 0)
    assert (job.folder / "stdout.txt").read_text() == f"a 'b' {job.folder} \n"
    assert told.started_at is not None
    assert told.ended_at is not None
    assert told.started_at <= told.ended_at


@pytest.mark.parametrize(
    ("script", "reason", "code"),
    [("exit 3", "exit_code", 3), ("kill -9 $$", "signal", 137), ("/no/such", "exit_code", 127)],
)
async def test_exit_codes_and_signals_are_told_apart(
    site: Local, tmp_path: Path, script: str, reason: str, code: int
) -> None:
    job = submission(tmp_path, "ends", shell(script))
    told = (await ended(site, known(job, await site.submit(job))))["ends"]
    assert (told.state, told.reason, told.exit_code) == ("failed", reason, code)


async def test_the_folder_of_a_job_may_have_a_path_that_a_shell_would_read_otherwise(tmp_path: Path) -> None:
    odd = tmp_path / "My 'own' $(project)"
    odd.mkdir()
    site = Local(SiteConfig(name="here", kind="local", work=str(odd / "work")))
    several = msgspec.structs.replace(shell("pwd"), resources=Resources(process_count=2), launcher="multiple")
    for name, spec in (("one", shell("pwd")), ("two", several)):
        job = submission(odd, name, spec)
        told = (await ended(site, known(job, await site.submit(job))))[name]
        assert (told.state, told.exit_code) == ("completed", 0)
        assert set((job.folder / "stdout.txt").read_text().splitlines()) == {str(job.folder)}


async def test_walltime_ends_every_process_of_the_job_and_nothing_else(site: Local, tmp_path: Path) -> None:
    bystander = submission(tmp_path, "bystander", shell("sleep 30"))
    other = known(bystander, await site.submit(bystander))
    job = submission(tmp_path, "long", timed(shell("trap '' TERM; (setsid sleep 97 &); sleep 97"), "500ms"))
    told = (await ended(site, known(job, await site.submit(job))))["long"]
    assert (told.state, told.reason) == ("failed", "walltime")
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "97"]]
    assert (await site.status([other]))["bystander"].state == "active"
    await site.cancel([other])
    told = (await ended(site, other))["bystander"]
    assert (told.state, told.reason) == ("canceled", "canceled")


async def test_a_program_that_takes_too_much_memory_is_told_from_one_that_was_killed(
    site: Local, tmp_path: Path
) -> None:
    lines = "import sys, time; held = bytearray(int(sys.argv[1]) << 20); time.sleep(60)"
    spec = JobSpec(executable=sys.executable, arguments=["-c", lines, "200"], resources=Resources(memory=100 << 20))
    greedy = submission(tmp_path, "greedy", spec)
    modest = submission(tmp_path, "modest", msgspec.structs.replace(spec, arguments=["-c", lines, "20"]))
    asked = [known(job, await site.submit(job)) for job in (greedy, modest)]
    told = (await ended(site, asked[0]))["greedy"]
    assert (told.state, told.reason) == ("failed", "out_of_memory")
    assert (await site.status([asked[1]]))["modest"].state == "active"
    await site.cancel([asked[1]])


async def test_gpus_are_given_out_one_by_one(site: Local, tmp_path: Path) -> None:
    spec = shell("echo $CUDA_VISIBLE_DEVICES; sleep 30", Resources(gpu_cores_per_process=2))
    jobs = [submission(tmp_path, f"gpu{i}", spec) for i in range(3)]
    asked = [known(job, await site.submit(job)) for job in jobs[:2]]
    for job in asked:
        await reached(site, job, "active")
    with pytest.raises(SubmitBusy, match="fewer GPUs free than the 2 it needs"):
        await site.submit(jobs[2])
    assert (await site.capacity()).gpus_free == 0
    await site.cancel([asked[0]])
    await ended(site, asked[0])
    asked.append(known(jobs[2], await site.submit(jobs[2])))
    while not (jobs[2].folder / "stdout.txt").exists() or not (jobs[2].folder / "stdout.txt").read_text():
        await asyncio.sleep(0.02)
    devices = [(job.folder / "stdout.txt").read_text().strip() for job in jobs]
    assert sorted(devices[:2]) == ["0,1", "2,3"]
    assert devices[2] == devices[0]
    await site.cancel(asked)
    with pytest.raises(SubmitRejected, match="4 GPUs"):
        await site.submit(submission(tmp_path, "huge", shell("true", Resources(gpu_cores_per_process=5))))


async def test_a_machine_takes_only_as_many_jobs_as_it_has_places(site: Local, tmp_path: Path) -> None:
    jobs = [submission(tmp_path, f"place{i}", shell("sleep 30")) for i in range(5)]
    asked = [known(job, await site.submit(job)) for job in jobs[:4]]
    with pytest.raises(SubmitBusy, match="runs 4 jobs"):
        await site.submit(jobs[4])
    await site.cancel(asked)
    await ended(site, *asked)
    await site.cancel([known(jobs[4], await site.submit(jobs[4]))])


async def test_several_processes_each_know_their_number(site: Local, tmp_path: Path) -> None:
    job = submission(tmp_path, "several", shell("echo $_PSI_J_PROCESS_INDEX_", Resources(process_count=3)))
    told = (await ended(site, known(job, await site.submit(job))))["several"]
    assert told.state == "completed"
    assert sorted((job.folder / "stdout.txt").read_text().split()) == ["1", "2", "3"]


async def test_a_job_outlives_the_agent_and_is_found_again(config: SiteConfig, site: Local, tmp_path: Path) -> None:
    job = submission(tmp_path, "orphan", shell("sleep 1; echo ran >>count; exit 5"))
    script = """if True:
        import asyncio, os, signal, sys
        from pathlib import Path
        import msgspec
        from workers.sites import open_site
        from workers.sites.base import SiteConfig, Submission
        config = msgspec.json.decode(sys.argv[1].encode(), type=SiteConfig)
        job = msgspec.json.decode(sys.argv[2].encode(), type=Submission, dec_hook=lambda of, text: of(text))
        asyncio.run(open_site(config).submit(job))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    await asyncio.to_thread(
        subprocess.run,
        [
            sys.executable,
            "-P",
            "-c",
            script,
            *(msgspec.json.encode(part, enc_hook=str).decode() for part in (config, job)),
        ],
        check=False,
    )
    (job.folder / ".headrace" / "native").unlink()  # as if it had been killed a moment earlier
    (job.folder / ".headrace" / "attempt").touch()
    native_id = await site.submit(job)
    told = (await ended(site, known(job, native_id)))["orphan"]
    assert (told.state, told.exit_code, told.native_id) == ("failed", 5, native_id)
    assert (job.folder / "count").read_text() == "ran\n"
    assert await site.submit(job) == native_id


async def test_lines_before_and_after_a_program_run_beside_it_and_cannot_harm_it(site: Local, tmp_path: Path) -> None:
    job = submission(tmp_path, "hooked", shell("cat said; exit 0"))
    job = msgspec.structs.replace(
        job,
        before='echo "began $HEADRACE_JOB_ID $headrace_native" >said; exit 3',
        after='echo "ended $_PSI_J_EC" >>said; false; exit 4',
    )
    native_id = await site.submit(job)
    told = (await ended(site, known(job, native_id)))["hooked"]
    assert (told.state, told.exit_code) == ("completed", 0)
    assert (job.folder / "stdout.txt").read_text() == f"began hooked {native_id}\n"
    assert (job.folder / "said").read_text().splitlines()[1] == "ended 0"


async def test_what_a_program_leaves_behind_ends_with_its_job(site: Local, tmp_path: Path) -> None:
    job = submission(tmp_path, "leaves", shell("(setsid sleep 98 &); exit 2"))
    told = (await ended(site, known(job, await site.submit(job))))["leaves"]
    assert (told.state, told.exit_code) == ("failed", 2)
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "98"]]


def sleeping(seconds: str) -> list[psutil.Process]:
    """Return the processes that sleep for so long."""
    return [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["/bin/sleep", seconds]]


@pytest.fixture
def seconds() -> Iterator[str]:
    """A time to sleep for by which nobody else's process is found."""
    unique = str(secrets.randbelow(10**8) + 10**8)
    yield unique
    for process in sleeping(unique):
        process.kill()


@pytest.mark.parametrize("how", ["alone", "child", "session", "loop"])
async def test_a_program_with_a_clean_environment_ends_with_its_job(
    site: Local, tmp_path: Path, how: str, seconds: str
) -> None:
    script = {
        "alone": f"exec env -i /bin/sleep {seconds}",
        "child": f"env -i /bin/sleep {seconds}; true",
        "session": f"env -i setsid /bin/sleep {seconds} & wait",
        "loop": f"exec env -i /bin/sh -c 'trap : TERM; while :; do /bin/sleep {seconds} & wait; done'",
    }[how]
    for word, duration in (("canceled", "1h"), ("over", "500ms")):
        job = submission(tmp_path, f"{how}-{word}", timed(shell(script), duration))
        asked = known(job, await site.submit(job))
        while not sleeping(seconds):
            await asyncio.sleep(0.02)
        if word == "canceled":
            await site.cancel([asked])
        told = (await ended(site, asked))[job.job_id]
        assert told.reason == ("canceled" if word == "canceled" else "walltime"), told
        assert not sleeping(seconds)


async def test_what_a_program_leaves_behind_with_a_clean_environment_ends_with_its_job(
    site: Local, tmp_path: Path, seconds: str
) -> None:
    bystander = subprocess.Popen(["/bin/sleep", f"1{seconds}"])  # noqa: ASYNC220 - it is nobody's
    job = submission(tmp_path, "leaves-clean", shell(f"env -i /bin/sleep {seconds} & sleep 0.2"))
    told = (await ended(site, known(job, await site.submit(job))))[job.job_id]
    assert told.state == "completed"
    assert not sleeping(seconds)
    assert sleeping(f"1{seconds}")
    bystander.kill()
    bystander.wait()


async def test_of_several_processes_each_has_to_end_well(site: Local, tmp_path: Path) -> None:
    script = '[ "$_PSI_J_PROCESS_INDEX_" != 1 ] || exit 4'
    job = submission(tmp_path, "one-fails", shell(script, Resources(process_count=3)))
    told = (await ended(site, known(job, await site.submit(job))))["one-fails"]
    assert (told.state, told.reason, told.exit_code) == ("failed", "exit_code", 4)


@pytest.mark.parametrize("wanted", [Resources(memory=1 << 60), Resources(process_count=2, cpu_cores_per_process=9999)])
async def test_what_this_machine_does_not_have_is_refused(site: Local, tmp_path: Path, wanted: Resources) -> None:
    with pytest.raises(SubmitRejected, match=r"here has \d+ (bytes of memory|cores)"):
        await site.submit(submission(tmp_path, "vast", shell("true", wanted)))


@pytest.mark.parametrize(
    "damage", ["echo a b c >claim", "rm claim; mkfifo claim", "echo a b c >ended; sleep 60", "rm claim; sleep 60"]
)
async def test_a_damaged_record_is_none_and_hides_no_other_job(site: Local, tmp_path: Path, damage: str) -> None:
    odd = submission(tmp_path, "odd", timed(shell(f"cd .headrace; {damage}; exit 3"), "2s"))
    fine = submission(tmp_path, "fine", shell("true"))
    asked = [known(job, await site.submit(job)) for job in (odd, fine)]
    assert (await ended(site, asked[1]))["fine"].state == "completed"
    assert (await ended(site, asked[0]))["odd"].state == "failed"


async def test_a_job_that_vanished_is_lost_and_not_completed(site: Local, tmp_path: Path) -> None:
    never = Known(job_id="never", native_id="1", folder=tmp_path / "never")
    assert (await site.status([never]))["never"].state == "queued"
    told = (await ended(site, never))["never"]
    assert (told.state, told.reason) == ("failed", "lost")


def test_a_site_is_opened_by_its_kind(config: SiteConfig) -> None:
    assert isinstance(open_site(config), Local)
