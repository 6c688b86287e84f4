"""What jobs report: who may, how often, and when nothing more is heard of them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway import reports
from gateway.reports import BURST, STRANGE_BURST, TEXT_BYTES_MAX, Reports, progress
from gateway.story import events_of
from headrace.joblog import Report, Submitted
from headrace.wire import Outcome, decode, encode
from streams.topology import done_subject, report_subject, submit_subject
from tests.doors import TOKEN, Door, Doors
from tests.test_tenants import add, bearer

SECRET = "c" * 64
OTHER = "d" * 64


@pytest.fixture
async def door(doors: Doors) -> Door:
    return await doors.open()


class Watch:
    """Seconds that grow when the test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Door, Watch]]:
    """A gateway for whose reports the time stands still."""
    watch = Watch()
    made = Reports.__init__

    def frozen(self: Reports, log: Any, clock: Any) -> None:
        made(self, log, clock, watch)

    monkeypatch.setattr(reports.Reports, "__init__", frozen)
    async with Doors(tmp_path) as doors:
        yield await doors.open(), watch


def submit(door: Door, run: str = "R", job: str = "J", secret: str = SECRET, attempt: int = 1) -> None:
    """Record that a job was submitted, as an agent would."""
    submitted = Submitted(
        run_id=run,
        invocation_id=job,
        site="lab",
        attempt=attempt,
        native_id="7",
        at=1.0,
        agent="a",
        secret_digest=hashlib.sha256(secret.encode()).hexdigest() if secret else "",
    )
    door.log.put(submit_subject(run, job, attempt, "lab"), encode(submitted))


def end(door: Door, run: str = "R", job: str = "J") -> None:
    outcome = Outcome(
        run_id=run,
        invocation_id=job,
        function="headrace.job",
        version="",
        route="r",
        tenant="default",
        state="succeeded",
        attempts=1,
        queued_at=1.0,
        started_at=1.0,
        ended_at=2.0,
        worker="a",
        accepted_at=1.0,
    )
    door.log.put(done_subject(run, job), encode(outcome))


def path(event: str, run: str = "R", job: str = "J", **more: object) -> str:
    rest = "".join(f"&{name}={value}" for name, value in more.items())
    return f"/v1/jobs/{run}/{job}/report?event={event}{rest}"


def carrying(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


async def say(door: Door, event: str, secret: str = SECRET, text: str = "", **more: Any) -> int:
    status, _, _ = await door.ask("POST", path(event, **more), headers=carrying(secret), data=text.encode())
    return status


def heard(door: Door) -> list[Report]:
    return [decode(s.body, Report) for s in door.log.stored if s.subject.startswith("hr.report.")]


async def test_what_a_job_says_is_in_the_log(door: Door) -> None:
    submit(door, attempt=2)
    assert await say(door, "start") == 204
    assert await say(door, "progress", text="0.25 relaxing\n") == 204
    assert await say(door, "end", exit_code=3) == 204
    start, half, ended = heard(door)
    assert (start.event, start.run_id, start.invocation_id, start.site, start.attempt) == ("start", "R", "J", "lab", 2)
    assert (half.event, half.fraction, half.text) == ("progress", 0.25, "relaxing")
    assert (ended.event, ended.exit_code) == ("end", 3)
    assert {s.subject for s in door.log.stored[1:]} == {report_subject("R", "J", "lab")}
    assert door.log.hints == 3 * [report_subject("R", "J", "lab")]  # none of them is worth anything for days


async def test_progress_is_told_on_the_run(door: Door) -> None:
    submit(door)
    await say(door, "progress", text="40% relaxing")
    await say(door, "progress", text="warming up")
    (job, half), (_, words) = (events_of(stored) for stored in door.log.stored[1:])
    assert (job[0], job[1]["job_id"], job[1]["site"]) == ("job", "J", "lab")
    assert (half[0], half[1]["fraction"], half[1]["note"], half[1]["invocation_id"]) == (
        "progress",
        0.4,
        "relaxing",
        "J",
    )
    assert (words[0], words[1]["text"]) == ("log", "warming up")


@pytest.mark.parametrize(
    ("text", "share", "words"),
    [
        ("0.5", 0.5, ""),
        ("50%", 0.5, ""),
        ("1 all done", 1.0, "all done"),
        ("1.5 too much", None, "1.5 too much"),
        ("nan no number", None, "nan no number"),
        ("inf% never", None, "inf% never"),
        ("step 3", None, "step 3"),
        ("% x", None, "% x"),
        ("", None, ""),
    ],
)
def test_progress_is_a_share_and_words(text: str, share: float | None, words: str) -> None:
    assert progress(text) == (share, words)


# ---------------------------------------------------------------- who


async def test_only_the_job_itself_is_heard(door: Door) -> None:
    submit(door)
    submit(door, job="K", secret=OTHER)
    await add(door, "a")
    for headers in (
        {"Authorization": ""},
        {"Authorization": f"Basic {SECRET}"},
        {"Authorization": "Bearer "},
        carrying("e" * 64),
        carrying(OTHER),  # that of another job
        carrying(SECRET[:-1]),
        carrying(hashlib.sha256(SECRET.encode()).hexdigest()),  # what the log holds is no secret
        carrying(TOKEN),
        bearer("a"),
    ):
        await door.problem(401, "POST", path("end"), headers=headers)
    assert heard(door) == []
    assert await say(door, "end") == 204


async def test_a_job_that_has_no_secret_has_none_that_fits(door: Door) -> None:
    submit(door, secret="")
    for secret in ("", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"):
        await door.problem(401, "POST", path("end"), headers=carrying(secret))


async def test_the_secret_of_a_job_is_good_for_nothing_else(door: Door) -> None:
    submit(door)
    for method, where in (("GET", "/v1/runs"), ("POST", "/v1/runs/R/cancel"), ("GET", "/v1/sites")):
        await door.problem(401, method, where, headers=carrying(SECRET))


async def test_a_job_that_is_not_known_yet_is_told_to_come_back(door: Door) -> None:
    await door.problem(404, "POST", path("start"), headers=carrying(SECRET))
    submit(door)
    assert await say(door, "start") == 204


async def test_the_secret_of_an_older_attempt_is_good_no_more(slow: tuple[Door, Watch]) -> None:
    door, watch = slow
    submit(door)
    assert await say(door, "start") == 204
    submit(door, secret=OTHER, attempt=2)
    watch.now += 1.0
    assert await say(door, "start", OTHER) == 204
    await door.problem(401, "POST", path("end"), headers=carrying(SECRET))
    assert [report.attempt for report in heard(door)] == [1, 2]


async def test_guessing_costs_the_log_nothing_after_a_while(slow: tuple[Door, Watch]) -> None:
    door, _ = slow
    submit(door)
    asked = 0
    last = door.log.last

    async def counted(subject: str) -> Any:
        nonlocal asked
        asked += 1
        return await last(subject)

    door.log.last = counted  # type: ignore[method-assign]
    found = [await say(door, "end", f"{number:064d}", job=f"J{number}") for number in range(STRANGE_BURST + 50)]
    assert found == [404] * STRANGE_BURST + [429] * 50
    assert asked == STRANGE_BURST


async def test_a_job_that_is_known_is_heard_although_strangers_knock(slow: tuple[Door, Watch]) -> None:
    door, _ = slow
    submit(door)
    assert await say(door, "start") == 204
    for number in range(STRANGE_BURST + 10):
        await say(door, "end", OTHER, job=f"J{number}")
    assert await say(door, "end") == 204


# ---------------------------------------------------------------- how often


async def test_a_job_that_never_stops_talking_does_not_flood_the_log(slow: tuple[Door, Watch]) -> None:
    door, watch = slow
    submit(door)
    found = [await say(door, "progress", text=f"0.{number:04d}") for number in range(1000)]
    assert found.count(204) == BURST
    assert set(found[BURST:]) == {429}
    assert len(heard(door)) == BURST
    answer = (await door.ask("POST", path("progress"), headers=carrying(SECRET)))[2]
    assert int(answer.headers["Retry-After"]) >= 1
    watch.now += 2 * reports.EVERY_S
    assert [await say(door, "progress", text="0.9") for _ in range(3)] == [204, 204, 429]
    assert await say(door, "end", exit_code=0) == 204  # its end is heard all the same


async def test_an_end_that_is_said_by_many_at_a_time_is_there_once(door: Door) -> None:
    submit(door)
    assert await say(door, "start") == 204
    found = await asyncio.gather(*(say(door, "end", exit_code=0) for _ in range(200)))
    assert set(found) == {204}
    assert [report.event for report in heard(door)] == ["start", "end"]


async def test_heartbeats_that_tell_nothing_new_are_not_kept(slow: tuple[Door, Watch]) -> None:
    door, watch = slow
    submit(door)
    await say(door, "start")
    for _ in range(50):
        assert await say(door, "heartbeat") == 204
    assert [report.event for report in heard(door)] == ["start"]
    watch.now += reports.HEARTBEAT_S_MIN
    assert await say(door, "heartbeat") == 204
    assert [report.event for report in heard(door)] == ["start", "heartbeat"]


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_long_report_is_refused(door: Door, chunked: bool) -> None:
    submit(door)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * (TEXT_BYTES_MAX // 4)

    body: Any = pieces() if chunked else b"x" * (TEXT_BYTES_MAX + 1)
    await door.problem(413, "POST", path("progress"), headers=carrying(SECRET), data=body)
    assert await say(door, "progress", text="x" * TEXT_BYTES_MAX) == 204


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (path(""), "event"),
        (path("ended"), "event"),
        (path("end", exit_code="-1"), "exit_code"),
        (path("end", exit_code="256"), "exit_code"),
        (path("end", exit_code="1e1"), "exit_code"),
        (path("end", run="a.b"), "run id"),
        (path("end", job="%2A"), "job id"),
    ],
)
async def test_what_makes_no_sense_is_refused(door: Door, where: str, said: str) -> None:
    submit(door)
    problem = await door.problem(400, "POST", where, headers=carrying(SECRET))
    assert said in problem.detail


async def test_control_characters_do_not_get_into_the_log(door: Door) -> None:
    submit(door)
    await say(door, "progress", text="0.5 a\x1b[31mb\x00c\nd")
    assert heard(door)[0].text == "a [31mb c d"


# ---------------------------------------------------------------- the end of it


async def test_after_its_end_a_job_says_nothing_more(door: Door) -> None:
    submit(door)
    assert await say(door, "end", exit_code=0) == 204
    for event in ("start", "progress", "heartbeat"):
        await door.problem(410, "POST", path(event), headers=carrying(SECRET))
    assert await say(door, "end", exit_code=0) == 204  # said again, as the answer was lost
    assert len(heard(door)) == 1


async def test_a_job_that_has_an_outcome_is_over(door: Door) -> None:
    submit(door)
    assert await say(door, "start") == 204
    end(door)
    for event in ("progress", "end", "stopping", "end"):
        await door.problem(410, "POST", path(event), headers=carrying(SECRET))
    assert len(heard(door)) == 1


async def test_a_job_that_is_being_stopped_may_still_tell_its_end(door: Door) -> None:
    submit(door)
    assert [await say(door, event) for event in ("stopping", "stopping", "end", "stopping", "end")] == [204] * 5
    assert [report.event for report in heard(door)] == ["stopping", "end"]


async def test_while_the_log_is_away_the_job_is_asked_to_come_back(door: Door) -> None:
    submit(door)
    assert await say(door, "start") == 204
    door.log.away = True
    await door.problem(503, "POST", path("end"), headers=carrying(SECRET))
    door.log.away = False
    assert await say(door, "end") == 204
    assert [report.event for report in heard(door)] == ["start", "end"]
