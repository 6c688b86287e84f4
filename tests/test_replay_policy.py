"""The past under another policy: records as the log tells them, and what would have become of their deadlines."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from functions.hindsight import ALL, replayed, slots_seen
from functions.policies import POLICIES
from gateway.history import SCAN_MAX, recorded
from headrace import AsyncClient
from headrace.clock import format_instant
from headrace.errors import BadRequest, NotFound
from headrace.joblog import JOB
from headrace.model import HistoryPage, Recorded
from headrace.names import invocation_id
from headrace.wire import Outcome, Payload, RunEnd, Slot, encode
from infra import replaying
from streams.stored import Stored
from streams.topology import done_subject
from tests.commands import Run
from tests.doors import Door
from tests.platforms import UpProcess

T = 1_700_000_000.0
REPLAY = [sys.executable, "-P", "-m", "headrace.cli", "replay"]


def record(
    name: str,
    began: float,
    ended: float,
    *,
    queued: float | None = None,
    deadline: float | None = None,
    stored: float | None = None,
    run: str = "",
    **fields: Any,
) -> Recorded:
    """Return a record of the only invocation of a run; instants in seconds after the first one."""
    plain: dict[str, Any] = {"function": "f", "route": "r", "state": "succeeded", "run_state": "succeeded", **fields}
    return Recorded(
        run_id=run or f"run-{name}",
        invocation_id=name,
        version="1",
        tenant="default",
        accepted_at=format_instant(T + (began if queued is None else queued)),
        queued_at=format_instant(T + (began if queued is None else queued)),
        started_at=format_instant(T + began),
        ended_at=format_instant(T + ended),
        stored_at=format_instant(T + (ended if stored is None else stored)),
        worker="w",
        deadline=None if deadline is None else format_instant(T + deadline),
        **plain,
    )


def crossed() -> list[Recorded]:
    """Two pieces of work that came together while one slot was busy, and were done in the order of their coming."""
    return [
        record("busy", 0.0, 5.0),
        record("patient", 5.0, 8.0, queued=1.0, deadline=30.0),
        record("urgent", 8.0, 9.0, queued=2.0, deadline=7.0, function="g"),
    ]


def test_under_deadline_order_the_urgent_one_would_have_been_met() -> None:
    edf = replayed(crossed(), "edf").routes[-1]
    assert (edf.route, edf.with_deadline, edf.recorded.met, edf.simulated.met) == (ALL, 2, 1, 2)
    assert (edf.against_recorded.gained, edf.against_recorded.lost) == (1, 0)


def test_under_the_order_it_had_everything_is_as_it_was_and_late_by_as_much() -> None:
    fifo = replayed(crossed(), "fifo").routes[-1]
    assert (fifo.recorded.met, fifo.simulated.met) == (1, 1)
    assert fifo.simulated == fifo.recorded
    assert fifo.simulated.late_p99_s == 2.0
    assert (fifo.against_ours.gained, fifo.against_ours.lost) == (0, 1)


def test_slots_are_as_many_as_ran_at_a_time() -> None:
    assert slots_seen([(0.0, 2.0), (1.0, 3.0), (2.0, 4.0)]) == 2
    assert replayed(crossed(), "fifo").slots == 1
    assert replayed(crossed(), "fifo", 2).routes[-1].simulated.met == 2


def test_a_join_waits_for_the_last_of_its_branches() -> None:
    mapped = [
        record("a", 0.0, 1.0, run="m", deadline=10.0, run_state=None, children=2),
        record("b1", 1.0, 2.0, run="m", deadline=10.0, run_state=None, parent_id="a", fills=["then"]),
        record("b2", 2.0, 6.0, queued=1.0, run="m", deadline=10.0, run_state=None, parent_id="a", fills=["then"]),
        record("then", 6.5, 7.5, queued=6.5, run="m", deadline=10.0, parent_id="a"),
    ]
    late = replayed([*mapped, record("x", 0.0, 100.0)], "fifo", 1)  # alone on one slot, behind work of 100 s
    assert late.routes[-1].simulated.met == 0
    alone = replayed(mapped, "fifo", 1)
    assert alone.routes[-1].simulated.met == 1
    assert alone.routes[-1].simulated.late_p99_s == 0.0
    assert replayed(mapped, "fifo", 2).routes[-1].recorded.met == 1


def test_what_follows_a_batch_job_follows_as_long_after_what_asked_for_it_and_the_job_takes_no_slot() -> None:
    chain = [
        record("ask", 1.0, 2.0, run="j", queued=1.0, deadline=60.0, run_state=None, children=1),
        record("job", 10.0, 40.0, run="j", queued=2.0, deadline=60.0, run_state=None, parent_id="ask", function=JOB),
        record("then", 42.0, 43.0, run="j", deadline=60.0, parent_id="job"),
    ]
    report = replayed([record("x", 0.0, 1.0), *chain, record("y", 20.0, 30.0)], "fifo", 1)
    assert (report.slots, report.routes[-1].simulated.met) == (1, 1)
    # Behind work of 30 s the first one begins later, and so does what follows its job.
    late = replayed([record("x", 0.0, 30.0), *chain], "fifo", 1)
    assert late.routes[-1].simulated.met == 0


def test_the_answer_of_a_run_counts_and_not_what_it_does_afterwards() -> None:
    given = [
        record("a", 0.0, 1.0, run="m", deadline=2.0, answered=True, children=1, run_state=None),
        record("b", 1.0, 9.0, run="m", deadline=2.0, parent_id="a"),
    ]
    report = replayed(given, "fifo").routes[-1]
    assert (report.recorded.met, report.simulated.met) == (1, 1)


def test_what_was_stopped_lasts_as_long_as_its_like_and_what_has_none_is_left_out() -> None:
    records = [
        record("x", 0.0, 5.0),
        record("stopped", 5.0, 6.0, deadline=6.0, state="canceled", run_state="canceled"),
        record("alien", 6.0, 6.0, deadline=9.0, function="g", state="canceled", run_state="canceled"),
    ]
    report = replayed(records, "fifo")
    assert (report.guessed, report.left_out) == (1, 1)
    assert report.routes[-1].recorded.met == 0
    assert report.routes[-1].simulated.met == 0


def test_runs_that_failed_or_are_not_whole_are_not_judged() -> None:
    records = [
        record("dead", 0.0, 1.0, deadline=9.0, state="dead", run_state="failed"),
        record("half", 0.0, 1.0, deadline=9.0, children=2, run_state=None),
        record("orphan", 0.0, 1.0, deadline=9.0, parent_id="before"),
        record("whole", 0.0, 1.0, deadline=9.0),
    ]
    report = replayed(records, "fifo", 1)
    assert report.not_judged == 3
    assert report.routes[-1].runs == 1
    assert report.invocations == 4


def test_nothing_recorded_says_so_and_an_unknown_policy_lists_those_there_are() -> None:
    with pytest.raises(NotFound, match="nothing is recorded"):
        replayed([], "fifo")
    with pytest.raises(BadRequest) as wrong:
        replayed([], "best")
    assert all(name in wrong.value.hint for name in POLICIES)


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_records_give_the_same_report_byte_for_byte(name: str) -> None:
    records = [
        record(f"w{n}", n * 0.5, n * 0.5 + 1.0 + n % 7, queued=n * 0.3, deadline=n * 0.3 + 4.0, route=f"r{n % 3}")
        for n in range(200)
    ]

    def made() -> tuple[str, str]:
        report = replayed(records, name, 2)
        return replaying.as_json(report), replaying.as_text(report)

    assert made() == made()
    assert [route.route for route in replayed(records, name, 2).routes] == ["r0", "r1", "r2", ALL]


# ---------------------------------------------------------------- the endpoint


def outcome(number: int, *, tenant: str = "default", **fields: Any) -> Outcome:
    run = f"run{number}"
    plain: dict[str, Any] = {"end": RunEnd(run_id=run, state="succeeded"), "deadline": T + 9.0, **fields}
    return Outcome(
        run_id=run,
        invocation_id=f"i{number}",
        function="f",
        version="v",
        route="r",
        tenant=tenant,
        state="succeeded",
        attempts=1,
        queued_at=T,
        started_at=T + 1.0,
        ended_at=T + 2.0,
        worker="w",
        accepted_at=T,
        **plain,
    )


def put(door: Door, number: int, **fields: Any) -> int:
    done = outcome(number, **fields)
    return door.log.put(done_subject(done.run_id, done.invocation_id), encode(done))


async def history(door: Door, query: str) -> HistoryPage:
    status, body, _ = await door.ask("GET", f"/v1/history?{query}")
    assert status == 200
    return msgspec.convert(body, HistoryPage)


async def test_pages_follow_one_another_without_a_gap_and_tell_only_of_the_callers_tenant(door: Door) -> None:
    for number in range(25):
        put(door, number, tenant="default" if number % 2 == 0 else "other")
    found: list[str] = []
    cursor = ""
    for _ in range(4):
        page = await history(door, f"since=2020-01-01T00:00:00Z&limit=4{cursor}")
        found += [one.invocation_id for one in page.invocations]
        if page.next is None:
            break
        cursor = f"&cursor={page.next}"
    assert found == [f"i{number}" for number in range(0, 25, 2)]


async def test_a_span_holds_what_ended_in_it(door: Door) -> None:
    put(door, 1)
    await asyncio.sleep(0.01)
    between = format_instant(time.time())
    await asyncio.sleep(0.01)
    put(door, 2)
    before = await history(door, f"since=2020-01-01T00:00:00Z&until={between}")
    after = await history(door, f"since={between}")
    assert [one.invocation_id for one in before.invocations] == ["i1"]
    assert [one.invocation_id for one in after.invocations] == ["i2"]
    assert after.kept_since is not None
    assert (await history(door, "since=2099-01-01T00:00:00Z")).invocations == []


async def test_an_empty_log_has_no_history(door: Door) -> None:
    page = await history(door, "since=2020-01-01T00:00:00Z")
    assert (page.invocations, page.next) == ([], None)


async def test_many_outcomes_of_others_do_not_make_a_page_endless(door: Door) -> None:
    for number in range(SCAN_MAX + 1):
        put(door, number, tenant="other")
    put(door, SCAN_MAX + 1)
    page = await history(door, "since=2020-01-01T00:00:00Z")
    assert page.invocations == []
    assert page.next is not None
    rest = await history(door, f"since=2020-01-01T00:00:00Z&cursor={page.next}")
    assert (len(rest.invocations), rest.next) == (1, None)


@pytest.mark.parametrize(
    "query",
    ["", "since=yesterday", "since=2020-01-01T00:00:00Z&limit=0", "since=2020-01-01T00:00:00Z&cursor=x"],
)
async def test_a_question_that_cannot_be_answered_is_a_400_with_a_hint(door: Door, query: str) -> None:
    problem = await door.problem(400, "GET", f"/v1/history?{query}")
    assert problem.hint


def test_a_record_names_the_joins_that_waited_for_it() -> None:
    inner = Slot(scope="inner", index=0, size=2, parent=Slot(scope="outer", index=1, size=3, then="g"))
    done = outcome(1, slot=inner, answer=Payload(body=b"1", size=1), size=7, on_late="cancel", due=T + 8.0)
    made = recorded(Stored(5, done_subject("run1", "i1"), encode(done), T + 2.5), "default")
    assert made is not None
    assert made.fills == [invocation_id("outer", "then")]
    assert (made.answered, made.size, made.on_late, made.due) == (True, 7, "cancel", format_instant(T + 8.0))
    assert (made.stored_at, made.run_state) == (format_instant(T + 2.5), "succeeded")


def test_what_cannot_be_read_is_passed_over() -> None:
    assert recorded(Stored(5, done_subject("run1", "i1"), b"\xff", T), "default") is None


# ---------------------------------------------------------------- the command


def test_the_two_forms_of_the_command_are_told_apart(run: Run) -> None:
    for arguments, said in (
        (["--since", "24h"], "--simulate"),
        (["--policy", "edf"], "--simulate"),
        (["--simulate", "some-id", "--since", "1h"], "takes no id"),
        ([], "no id"),
    ):
        ran = run("replay", *arguments)
        assert ran.code == 2
        assert said in ran.err
    shown = run("replay", "--help").out
    assert "--simulate" in shown
    assert "ID" in shown


def test_wrong_options_of_a_simulation_are_told_before_anything_is_read(tmp_path: Path) -> None:
    for arguments, said in (
        (["--since", "24h", "--policy", "best"], "headrace, edf, fifo, priority"),
        ([], "--since"),
        (["--since", "24h", "--slots", "0"], "--slots"),
        (["--since", "soon"], "--since"),
        (["--since", "1h", "--until", "2h"], "--until"),
        (["--from", "nothing.jsonl"], "cannot be read"),
    ):
        ran = subprocess.run(
            [*REPLAY, "--simulate", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert (ran.returncode, said in ran.stderr) == (2, True), ran.stderr


USER = """
import time

from headrace import Context, function, on


@on(name="shot", deadline="60s", on_late="cancel")
@function
def shot(n: int, ctx: Context):
    ctx.map(part, list(range(n)), then=total)


@function
def part(n: int) -> int:
    time.sleep(0.01)
    return n


@function
def total(parts: list[int]) -> int:
    return sum(parts)
"""


def test_a_night_on_a_real_platform_is_saved_and_replayed_from_the_file_to_the_byte(
    shared_platform: UpProcess, tmp_path: Path
) -> None:
    (tmp_path / "night.py").write_text(USER)
    (tmp_path / "empty.jsonl").write_text("")

    async def night() -> None:
        async with AsyncClient(shared_platform.url, shared_platform.token) as client:
            await client.deploy(tmp_path / "night.py")
            for number in range(5):
                run = await client.trigger("shot", 4, id=f"night-{number}", wait=30)
                assert await run.result(timeout=30) == 6

    asyncio.run(night())
    env = {"HEADRACE_URL": shared_platform.url, "HEADRACE_TOKEN": shared_platform.token, "PATH": ""}

    def replay(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*REPLAY, "--simulate", *arguments],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    live = replay("--since", "1h", "--policy", "fifo", "--save", "night.jsonl", "--json")
    assert live.returncode == 0, live.stderr
    assert "the log begins at" in live.stderr  # it is younger than an hour
    report = msgspec.json.decode(live.stdout)
    of = {route["route"]: route for route in report["routes"]}
    assert (of["shot"]["runs"], of["shot"]["recorded"]["met"], of["shot"]["simulated"]["met"]) == (5, 5, 5)
    again = [replay("--from", "night.jsonl", "--policy", "fifo", "--json").stdout for _ in range(2)]
    assert again == [live.stdout, live.stdout]
    text = replay("--from", "night.jsonl")
    assert (text.returncode, "shot" in text.stdout) == (0, True)
    nothing = replay("--from", "empty.jsonl")
    assert (nothing.returncode, "nothing is recorded" in nothing.stderr) == (2, True)
