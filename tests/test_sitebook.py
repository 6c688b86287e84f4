"""The row that an agent keeps of its site, and the reports that it hears."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from headrace.errors import Conflict, Unavailable
from headrace.joblog import Report, SiteRecord
from headrace.wire import encode
from streams.log import Log, Record
from streams.topology import report_subject
from tests.doubles import MemoryTable
from tests.sites import shell
from workers.reports import hear
from workers.sitebook import REFUSED_S, UNREACHABLE_S, WRITE_S, SiteBook
from workers.sites.base import Capacity, JobStatus, Known, SiteConfig, SiteUnreachable, Submission, SubmitBusy
from workers.workfolder import WorkFolder


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Rows(MemoryTable[SiteRecord]):
    """A table that counts what is written and may be away."""

    away = False
    puts = 0

    async def put(self, name: str, row: SiteRecord) -> None:
        if self.away:
            raise Unavailable("the table does not answer")
        self.puts += 1
        await super().put(name, row)


class Machine:
    """A batch system that says of itself what the test wants."""

    config = SiteConfig(name="lab", kind="slurm", work="/nowhere", container="apptainer")

    def __init__(self) -> None:
        self.has: Capacity | None = Capacity(
            at=0.0,
            nodes_total=4,
            nodes_free=4,
            nodes_unusable=0,
            gpus_total=16,
            gpus_free=16,
            jobs_waiting=0,
            jobs_running=0,
        )
        self.away = False
        self.hint = ""

    async def capacity(self) -> Capacity | None:
        if self.away:
            raise SiteUnreachable("slurmctld does not answer", hint=self.hint)
        return self.has

    async def submit(self, job: Submission) -> str:
        raise AssertionError

    async def submit_array(self, array_id: str, jobs: Sequence[Submission]) -> dict[str, str]:
        raise AssertionError

    async def find(self, job_id: str, folder: Path, place: int | None = None) -> str | None:
        raise AssertionError

    async def status(self, jobs: Sequence[Known]) -> dict[str, JobStatus]:
        raise AssertionError

    async def cancel(self, jobs: Sequence[Known]) -> None:
        raise AssertionError


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rows() -> Rows:
    return Rows()


@pytest.fixture
def machine() -> Machine:
    return Machine()


class Folder(WorkFolder):
    """A work folder that says of itself what the test wants."""

    why = ""

    async def trouble(self) -> str:
        return self.why


def book(rows: Rows, machine: Machine, clock: Clock, folder: Folder | None = None, agent: str = "here") -> SiteBook:
    work = folder or Folder(machine.config)
    return SiteBook(rows, machine.config, machine, work, f"agent/lab/{agent}", clock)


async def test_the_row_tells_what_the_batch_system_has(rows: Rows, machine: Machine, clock: Clock) -> None:
    await book(rows, machine, clock).look()
    row = rows.rows["lab"]
    assert (row.kind, row.agent, row.status, row.at, row.containers) == (
        "slurm",
        "agent/lab/here",
        "up",
        1000.0,
        ["apptainer"],
    )
    assert (row.nodes_total, row.gpus_free) == (4, 16)


async def test_a_batch_system_that_cannot_be_asked_has_a_row_all_the_same(
    rows: Rows, machine: Machine, clock: Clock
) -> None:
    machine.has = None
    await book(rows, machine, clock).look()
    assert (rows.rows["lab"].status, rows.rows["lab"].gpus_total) == ("up", None)


async def test_what_does_not_change_is_written_now_and_then(rows: Rows, machine: Machine, clock: Clock) -> None:
    kept = book(rows, machine, clock)
    await kept.look()
    clock.now += WRITE_S / 2
    await kept.look()
    assert rows.puts == 1
    clock.now += WRITE_S / 2
    await kept.look()
    assert (rows.puts, rows.rows["lab"].at) == (2, clock.now)
    clock.now += 1.0
    kept.accepts = False
    await kept.look()
    assert (rows.puts, rows.rows["lab"].status) == (3, "degraded")


async def test_a_controller_that_is_restarted_is_not_down_and_one_that_stays_away_is(
    rows: Rows, machine: Machine, clock: Clock
) -> None:
    kept = book(rows, machine, clock)
    await kept.look()
    machine.away = True
    clock.now += UNREACHABLE_S - 1.0
    await kept.look()
    assert rows.rows["lab"].status == "up"
    clock.now += 1.0
    await kept.look()
    row = rows.rows["lab"]
    assert (row.status, row.detail) == ("down", "slurmctld does not answer")
    machine.away = False
    clock.now += 5.0
    await kept.look()
    row = rows.rows["lab"]
    assert (row.status, [i.ended_at for i in row.incidents]) == ("up", [clock.now])


async def test_waits_survive_a_restart_and_a_table_that_is_away(rows: Rows, machine: Machine, clock: Clock) -> None:
    kept = book(rows, machine, clock)
    for _ in range(3):
        kept.waited(shell("true"), 8.0)
    rows.away = True
    with pytest.raises(Unavailable):
        await kept.look()
    rows.away = False
    await kept.look()
    again = book(rows, machine, clock)
    again.waited(shell("true"), 8.0)
    await again.look()
    wait = rows.rows["lab"].wait
    assert wait is not None
    assert wait.observations == 4
    assert wait.p50_s == pytest.approx(8.0)


async def test_the_reports_of_a_site_are_heard_and_those_of_others_are_not(log: Log) -> None:
    found: list[Report] = []
    hearing = asyncio.create_task(hear(log, "lab", found.append))
    try:
        async with asyncio.timeout(20.0):
            for number in range(1000):  # until it listens: what was said before is not told
                report = Report(run_id="R", invocation_id=f"J{number}", site="lab", event="start", at=1.0)
                other = report_subject("R", "J", "elsewhere")
                await log.append([Record(other, encode(report))])
                await log.append([Record(report_subject("R", "J", "lab"), b"\xff")])  # of no use, and no harm
                await log.append([Record(report_subject("R", report.invocation_id, "lab"), encode(report))])
                if found:
                    break
                await asyncio.sleep(0.05)
            end = Report(run_id="R", invocation_id="J", site="lab", event="end", at=2.0, exit_code=3)
            await log.append([Record(report_subject("R", "J", "lab"), encode(end))])
            while end not in found:
                await asyncio.sleep(0.01)
        assert found.count(end) == 1
        assert len({report.invocation_id for report in found}) == len(found)
    finally:
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)


# ---------------------------------------------------------------- trouble


async def test_the_first_look_that_fails_is_told_at_once_with_its_cure(
    rows: Rows, machine: Machine, clock: Clock
) -> None:
    machine.away = True
    machine.hint = "Set `environment` with its PATH."
    kept = book(rows, machine, clock)
    await kept.look()
    row = rows.rows["lab"]
    assert (row.status, row.detail) == ("unknown", "slurmctld does not answer. Set `environment` with its PATH.")
    machine.away = False
    clock.now += 5.0
    await kept.look()
    assert rows.rows["lab"].status == "up"


async def test_a_work_folder_that_cannot_be_written_to_is_told(rows: Rows, machine: Machine, clock: Clock) -> None:
    folder = Folder(machine.config)
    kept = book(rows, machine, clock, folder)
    folder.why = "No space left on device"
    await kept.look()
    row = rows.rows["lab"]
    assert (row.status, row.detail) == ("down", "its work folder: No space left on device")
    assert row.gpus_total == 16
    folder.why = ""
    clock.now += 5.0
    await kept.look()
    assert rows.rows["lab"].status == "up"


async def test_a_batch_system_that_takes_no_jobs_is_told_until_it_takes_one(
    rows: Rows, machine: Machine, clock: Clock
) -> None:
    kept = book(rows, machine, clock)
    busy, away = SubmitBusy("full"), SiteUnreachable("sacct does not answer")
    for told, word in (
        ([busy], "up"),
        ([busy, away], "degraded"),
        (["17", away], "up"),  # it takes some
        ([away], "degraded"),
        ([busy], "degraded"),
        (["17"], "up"),
    ):
        kept.submitted(told)  # type: ignore[arg-type] # lists of several kinds
        clock.now += 5.0
        await kept.look()
        assert rows.rows["lab"].status == word, told
    kept.submitted([away])
    await kept.look()
    assert rows.rows["lab"].detail == "jobs cannot be submitted: sacct does not answer"
    clock.now += REFUSED_S
    await kept.look()
    assert rows.rows["lab"].status == "up"


async def test_of_two_sites_that_began_at_once_one_gives_way(
    rows: Rows, machine: Machine, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    books: list[SiteBook] = []
    for name in ("a", "b", "a"):
        folder = Folder(machine.config)
        folder.id = name
        books.append(book(rows, machine, clock, folder, f"host{len(books)}"))
    first, second, beside = books
    for each in books:
        await each.look()
    for each in (beside, first):  # one site, two agents
        clock.now += WRITE_S
        await each.look()
    assert "agent/lab/host2 speaks for site lab, too" in caplog.text
    clock.now += WRITE_S
    with pytest.raises(Conflict, match="the name lab is taken"):
        await second.look()
