"""Jobs that report by themselves, on a real Slurm and on this machine, to a real gateway."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import stat
from pathlib import Path

import msgspec
import pytest
from msgspec import structs

from headrace.errors import BadRequest
from headrace.joblog import Report, Submitted
from headrace.jobs import RECORDS, JobSpec
from headrace.wire import decode, encode
from infra.slurm.cluster import Cluster
from streams.topology import submit_subject
from tests.doors import Door, Doors
from tests.sites import ended, known, reached, shell, submission
from workers.push import Push, Pushed
from workers.sites import open_site
from workers.sites.base import BatchSystem, JobStatus, Known, SiteConfig, Submission
from workers.sites.records import Records

HEARD_S = 30.0
TOOLS = (
    "bash",
    "sh",
    "cat",
    "date",
    "hostname",
    "mv",
    "rm",
    "sleep",
    "tail",
    "head",
    "grep",
    "seq",
    "scontrol",
    "dirname",
)


@pytest.fixture(params=["local", "slurm"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> BatchSystem:
    environment = {}
    if request.param == "slurm":
        cluster: Cluster = request.getfixturevalue("slurm")
        environment = cluster.env
    return open_site(
        SiteConfig(name="lab", kind=request.param, work=str(tmp_path / "work"), environment=environment, unseen_s=2.0)
    )


@pytest.fixture
async def door(doors: Doors) -> Door:
    return await doors.open()


def named(name: str, tmp_path: Path) -> str:
    """Return a job id that no other job of this session has."""
    return f"{name}{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:8]}"


async def submit(site: BatchSystem, url: str, job: Submission, door: Door | None = None) -> tuple[Known, Pushed]:
    """Submit a job that pushes to an address, and record it, as an agent would."""
    pushed = Push(url).prepare(job.folder, "R", job.job_id)
    native_id = await site.submit(structs.replace(job, before=pushed.before, after=pushed.after))
    if door is not None:
        record(door, job, native_id, pushed)
    return known(job, native_id), pushed


def record(door: Door, job: Submission, native_id: str, pushed: Pushed) -> None:
    submitted = Submitted(
        run_id="R",
        invocation_id=job.job_id,
        site="lab",
        attempt=1,
        native_id=native_id,
        at=1.0,
        agent="a",
        secret_digest=pushed.digest,
    )
    door.log.put(submit_subject("R", job.job_id, 1, "lab"), encode(submitted))


def heard(door: Door) -> list[Report]:
    return [decode(s.body, Report) for s in door.log.stored if s.subject.startswith("hr.report.")]


async def hears(door: Door, event: str) -> Report:
    async with asyncio.timeout(HEARD_S):
        while True:
            for report in heard(door):
                if report.event == event:
                    return report
            await asyncio.sleep(0.02)


def with_path(spec: JobSpec, folder: Path, *more: str) -> JobSpec:
    """Return the job with so few programs on its path."""
    folder.mkdir()
    for tool in (*TOOLS, *more):
        for place in (Path("/usr/bin"), Path("/bin")):
            if (place / tool).exists():
                (folder / tool).symlink_to(place / tool)
                break
    return structs.replace(spec, environment={"PATH": str(folder)})


@pytest.mark.parametrize(("script", "code"), [("true", 0), ("exit 3", 3)])
async def test_a_job_tells_its_start_its_progress_and_its_end(
    site: BatchSystem, door: Door, tmp_path: Path, script: str, code: int
) -> None:
    told = 'echo "0.1 begins" >"$HEADRACE_PROGRESS"; echo "0.5 half way" >>"$HEADRACE_PROGRESS"; sleep 3; '
    job = submission(tmp_path, named(f"tells{code}", tmp_path), shell(told + script))
    asked, _ = await submit(site, door.url, job, door)
    assert (await hears(door, "start")).invocation_id == job.job_id
    half = await hears(door, "progress")
    assert (half.fraction, half.text) == (0.5, "half way")
    last = await hears(door, "end")
    assert last.exit_code == code
    status = (await ended(site, asked))[job.job_id]
    assert (status.state, status.exit_code) == ("completed" if code == 0 else "failed", code)
    assert [report.event for report in heard(door)] == ["start", "progress", "end"]


async def test_a_job_that_is_over_before_it_is_known_is_heard_when_it_is(
    site: BatchSystem, door: Door, tmp_path: Path
) -> None:
    job = submission(tmp_path, named("early", tmp_path), shell("true"))
    pushed = Push(door.url).prepare(job.folder, "R", job.job_id)
    native_id = await site.submit(structs.replace(job, before=pushed.before, after=pushed.after))
    while Records(job.folder).ended() is None:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)  # it is told 404 in the meantime
    record(door, job, native_id, pushed)
    assert (await hears(door, "end")).exit_code == 0


async def test_without_curl_python_speaks(site: BatchSystem, door: Door, tmp_path: Path) -> None:
    spec = with_path(shell("sleep 1; exit 4"), tmp_path / "tools", "python3")
    job = submission(tmp_path, named("python", tmp_path), spec)
    await submit(site, door.url, job, door)
    assert (await hears(door, "start")).event == "start"
    assert (await hears(door, "end")).exit_code == 4


async def test_with_neither_a_job_runs_as_ever_and_says_nothing(site: BatchSystem, door: Door, tmp_path: Path) -> None:
    spec = with_path(shell("exit 5"), tmp_path / "tools")
    job = submission(tmp_path, named("mute", tmp_path), spec)
    asked, _ = await submit(site, door.url, job, door)
    status = (await ended(site, asked))[job.job_id]
    assert (status.state, status.exit_code) == ("failed", 5)
    assert heard(door) == []


async def test_a_gateway_that_is_away_changes_nothing_for_the_job(site: BatchSystem, tmp_path: Path) -> None:
    job = submission(tmp_path, named("away", tmp_path), shell("echo done; exit 6"))
    asked, _ = await submit(site, "http://127.0.0.1:9", job)
    status = (await ended(site, asked))[job.job_id]
    assert (status.state, status.exit_code) == ("failed", 6)
    assert (job.folder / "stdout.txt").read_text() == "done\n"
    assert (job.folder / "stderr.txt").read_text() == ""


async def test_a_gateway_that_never_answers_neither_holds_the_program_up_nor_sees_the_secret_leak(
    site: BatchSystem, tmp_path: Path
) -> None:
    silent = socket.create_server(("127.0.0.1", 0))  # connections stand, and nobody ever reads
    port = silent.getsockname()[1]
    # While its own report hangs, the job looks for its secret wherever other users could see it.
    look = (
        f'cut -d " " -f 5 "$HEADRACE_JOB_FOLDER/{RECORDS}/secret" | tr -d \'"\' >wanted; sleep 1; '
        "grep -la -f wanted /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null; exit 7"
    )
    job = submission(tmp_path, named("silent", tmp_path), shell(look))
    asked, _ = await submit(site, f"http://127.0.0.1:{port}", job)
    status = (await ended(site, asked))[job.job_id]
    assert (status.state, status.exit_code) == ("failed", 7)
    assert len((job.folder / "wanted").read_text().strip()) == 64
    assert (job.folder / "stdout.txt").read_text() == ""
    silent.close()


@pytest.mark.parametrize("site", ["slurm"], indirect=True)  # on this machine all its processes are ended one by one
async def test_a_job_that_is_canceled_says_that_it_is_being_stopped(
    site: BatchSystem, door: Door, tmp_path: Path
) -> None:
    job = submission(tmp_path, named("stopped", tmp_path), shell("sleep 60"))
    asked, _ = await submit(site, door.url, job, door)
    await hears(door, "start")
    await reached(site, asked, "active")
    await site.cancel([asked])
    await hears(door, "stopping")
    status: JobStatus = (await ended(site, asked))[job.job_id]
    assert status.state == "canceled"


async def test_each_member_of_an_array_speaks_for_itself(slurm: Cluster, door: Door, tmp_path: Path) -> None:
    config = SiteConfig(name="lab", kind="slurm", work=str(tmp_path / "work"), environment=slurm.env)
    opened, push = open_site(config), Push(door.url)
    members = [
        submission(tmp_path, named(f"member{code}", tmp_path), shell(f"sleep 1; exit {code}")) for code in range(3)
    ]
    pushed = [push.prepare(job.folder, "R", job.job_id) for job in members]
    native = await opened.submit_array(
        named("array", tmp_path),
        [structs.replace(job, before=made.before, after=made.after) for job, made in zip(members, pushed, strict=True)],
    )
    for job, made in zip(members, pushed, strict=True):
        record(door, job, native[job.job_id], made)
    async with asyncio.timeout(HEARD_S):
        while len(ends := {r.invocation_id: r.exit_code for r in heard(door) if r.event == "end"}) < len(members):
            await asyncio.sleep(0.02)
    assert ends == {job.job_id: code for code, job in enumerate(members)}


# ---------------------------------------------------------------- the secret


def test_a_folder_keeps_its_secret_and_others_have_their_own(tmp_path: Path) -> None:
    push = Push("https://gateway.example.org/")
    one, again, other = (push.prepare(tmp_path / name, "R", "J") for name in ("a", "a", "b"))
    assert one == again
    assert len({one.digest, other.digest}) == 2
    secret = tmp_path / "a" / RECORDS / "secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    words = secret.read_text().split('"')[1].split()
    assert hashlib.sha256(words[-1].encode()).hexdigest() == one.digest
    assert words[-1] not in one.before + one.after
    assert "https://gateway.example.org/v1/jobs/R/J/report" in one.before


def test_half_a_secret_is_made_anew(tmp_path: Path) -> None:
    push = Push("http://127.0.0.1:1")
    secret = tmp_path / RECORDS / "secret"
    secret.parent.mkdir()
    secret.write_text('header = "Authorization: Bea')
    made = push.prepare(tmp_path, "R", "J")
    assert made == push.prepare(tmp_path, "R", "J")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600


def test_without_an_address_nothing_is_pushed(tmp_path: Path) -> None:
    assert Push("").prepare(tmp_path / "job", "R", "J") == Pushed("", "", "")
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("url", ["gateway:8080", "ftp://x", "http://", "http://u:p@x", "http://x?a=b"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(BadRequest, match="address"):
        Push(url)


def test_a_report_is_read_by_whoever_knows_less() -> None:
    report = Report(run_id="R", invocation_id="J", site="lab", event="end", at=1.0)
    assert decode(msgspec.msgpack.encode(msgspec.to_builtins(report) | {"new": 1}), Report) == report
