"""An alert, its update and its retraction, with real servers: whatever comes first, the end is the same."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import msgspec
import pytest

from functions.admission import Admitted, admit
from functions.revisions import standing
from headrace import Client, Event
from headrace.errors import RunRetracted
from headrace.model import Revision, Route, RunView
from headrace.wire import Cancel, EventMeta, Member, Payload, RouteRecord, decode, encode
from streams.link import Link
from streams.log import Log, Record
from streams.record import RunRecord, fold_run
from streams.threads import settle
from streams.topology import DEFAULT_TENANT, STREAM, cancel_subject, run_subjects, thread_subject
from tests.platforms import UpProcess
from tests.processes import wait_until
from tests.test_worker import Platform, working

FUNCTIONS = '''\
import time
from typing import Any

from headrace import Context, Event, function, on


@on(type="org.test.alert", revision={"preset": "lvk"}, deadline="5m")
@function(timeout="2m")
def follow_up(alert: dict[str, Any], ctx: Context) -> None:
    """Work for longer than any test waits, on several processes at once."""
    ctx.map(point, [60.0, 60.0])


@function(timeout="2m")
def point(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@on(type="org.test.quick", revision={"preset": "lvk"})
@function
def quick(alert: dict[str, Any]) -> str:
    return alert["alert_type"]


@on(type="org.headrace.retracted")
@function
def tell(event: Event) -> Any:
    return {"subject": event.subject, **event.data}
'''
KINDS = {"i": ("INITIAL", 1), "u": ("UPDATE", 2), "r": ("RETRACTION", 3)}


def alert(key: str, name: str, event_type: str = "org.test.alert") -> Event:
    kind, minute = KINDS[name]
    data = {"superevent_id": key, "alert_type": kind, "time_created": f"2026-06-05T12:0{minute}:00Z"}
    return Event(id=f"{key}-{name}", source="/igwn", type=event_type, data=data)


@pytest.fixture
def client(shared_platform: UpProcess, tmp_path: Path) -> Iterator[Client]:
    (tmp_path / "alerts.py").write_text(FUNCTIONS)
    with Client(shared_platform.url, shared_platform.token) as opened:
        opened.deploy(tmp_path / "alerts.py")
        yield opened


def view(client: Client, run_id: str) -> RunView:
    return client.run(run_id).view()


def told(client: Client, key: str) -> list[dict[str, Any]]:
    """Return what the route that takes retractions was told of a key."""
    answers = [run.result(timeout=30) for run in client.runs(route="tell", limit=100)]
    return [answer for answer in answers if answer["subject"] == key]


def test_every_order_of_initial_update_and_retraction_ends_in_the_same_state_on_a_platform(client: Client) -> None:
    began = time.monotonic()
    for number, order in enumerate(permutations("iur")):
        key = f"S{number}"
        runs: dict[str, str] = {}
        for name in order:
            runs[name] = client.publish(alert(key, name))[0].run_id
            if name != "r" and not runs.keys() & ({"r"} if name == "u" else {"r", "u"}):
                # Nothing that came before stops it, so it gets to work.
                wait_until(lambda run=runs[name]: view(client, run).invocations_total > 1)  # type: ignore[misc]
        assert client.run(runs["r"]).result(timeout=30) == {"retracted": [key]}
        for name in "iu":
            shown = view(client, runs[name])
            assert shown.error is not None
            assert (shown.state, shown.retracted_by, shown.superseded_by) == ("canceled", runs["r"], None), order
            assert shown.error.kind == "retracted"
            with pytest.raises(RunRetracted):
                client.run(runs[name]).result(timeout=1)
        shown = view(client, runs["r"])
        assert (shown.state, shown.retracted_by, shown.superseded_by) == ("succeeded", None, None)
        wait_until(lambda key=key: len(told(client, key)) == 1)  # type: ignore[misc]
    assert time.monotonic() - began < 60.0  # nothing was waited for that had been retracted


def test_an_answer_is_superseded_and_then_retracted_and_whoever_asks_is_told(client: Client) -> None:
    first = client.publish(alert("Q", "i", "org.test.quick"))[0]
    assert first.result(timeout=30) == "INITIAL"
    second = client.publish(alert("Q", "u", "org.test.quick"))[0]
    assert second.result(timeout=30) == "UPDATE"
    assert view(client, first.run_id).superseded_by == second.run_id
    assert client.run(first.run_id).result(timeout=30) == "INITIAL"

    last = client.publish(alert("Q", "r", "org.test.quick"))[0]
    for run in (first, second):
        with pytest.raises(RunRetracted):
            client.run(run.run_id).result(timeout=1)
    last.result(timeout=30)
    wait_until(lambda: len(told(client, "Q")) == 1)
    [said] = told(client, "Q")
    assert said["by"]["run_id"] == last.run_id
    assert sorted(said["runs"]) == sorted([first.run_id, second.run_id])
    assert (said["retracted"], said["route"]) == (["Q"], "quick")


# ---------------------------------------------------------------- without a gateway's help


SLOW = """
    import time
    def slow(x):
        time.sleep(60)
    def many(x, ctx):
        ctx.map("part", list(range(10_000)))
    def part(n):
        time.sleep(0.02)
    def echo(x):
        return x
"""


@pytest.fixture
async def platform(log: Log, link: Link, tmp_path: Path) -> AsyncIterator[Platform]:
    async with working(log, link, tmp_path) as running:
        await running.deploy(SLOW)
        yield running


def notice(platform: Platform, name: str, key: str = "S", function: str = "slow") -> Admitted:
    found = platform.tables.function(DEFAULT_TENANT, function)
    assert found is not None
    event = alert(key, name)
    meta = EventMeta(id=event.id, source=event.source, type=event.type)
    body = json.dumps(event.data).encode()
    payload = Payload(body=body, size=len(body))
    route = RouteRecord(
        name=function, tenant="default", route=Route(function=function, revision=Revision(preset="lvk"))
    )
    return admit(
        event=meta,
        payload=payload,
        digest="",
        route=route,
        function=found,
        tenant="default",
        now=time.time(),
        deadline=time.time() + 300,
        revises=standing(route, meta, payload),
    )


async def marked(platform: Platform, one: Admitted, by: str) -> RunRecord:
    """Wait until a run is marked by another one."""
    async with asyncio.timeout(30):
        while True:
            folded = fold_run(await platform.log.last_of_each(run_subjects(one.invocation.run_id)))
            if folded is not None and folded[0].mark is not None and folded[0].mark.run_id == by:
                return folded[0]
            await asyncio.sleep(0.01)


async def test_workers_settle_what_a_gateway_left_when_it_died(platform: Platform) -> None:
    for number, order in enumerate(permutations("iur")):
        sent = {name: notice(platform, name, f"S{number}") for name in order}
        for name in order:
            await platform.log.append(sent[name].records)
        gone = sent["r"].invocation.run_id
        assert (await platform.ended(gone)).state == "succeeded"
        for name in "iu":
            record = await marked(platform, sent[name], gone)
            assert (record.state, record.retracted_by) == ("canceled", gone)


async def test_a_retraction_stops_ten_thousand_members_and_the_next_work_is_soon_done(platform: Platform) -> None:
    first = notice(platform, "i", function="many")
    await platform.log.append(first.records)
    run = first.invocation.run_id
    async with asyncio.timeout(60):
        while await _queued(platform.log, run) < 10_000:
            await asyncio.sleep(0.05)
    gone = notice(platform, "r", function="many")
    await platform.log.append(gone.records)
    await settle(platform.log, gone.invocation, time.time())
    began = time.monotonic()
    assert await platform.log.last(cancel_subject(run, "*")) is not None
    assert (await platform.ended(gone.invocation.run_id)).state == "succeeded"
    assert await platform.answer(await platform.trigger("echo", 5, deadline_s=600.0)) == 5
    assert time.monotonic() - began < 60.0  # two slots would take 100 s and more for the rest of the members


async def _queued(log: Log, run: str) -> int:
    """Return how many invocations of a run the log holds."""
    raw = await log.link.nc.request(
        f"$JS.API.STREAM.INFO.{STREAM}",
        msgspec.json.encode({"subjects_filter": f"hr.work.*.default.{run}.*"}),
        timeout=5,
    )
    return len(msgspec.json.decode(raw.data)["state"].get("subjects") or {})


async def test_a_retraction_that_a_user_cancels_still_counts(platform: Platform) -> None:
    gone, first = notice(platform, "r"), notice(platform, "i")
    run = gone.invocation.run_id
    await platform.log.append([Record(cancel_subject(run), encode(Cancel(run_id=run, at=time.time())))])
    await platform.log.append(first.records)
    await platform.log.append(gone.records)
    assert (await marked(platform, first, run)).retracted_by == run


async def test_a_thread_that_is_too_long_fails_the_run_and_says_what_to_do(platform: Platform) -> None:
    first = notice(platform, "i")
    [member] = first.records[1:]
    thread = first.invocation.places[0].thread
    for start in range(0, 1000, 500):
        await platform.log.append(
            [member._replace(subject=thread_subject(thread, f"r{n}"), absent=None) for n in range(start, start + 500)]
        )
    await platform.log.append(first.records)
    record = await platform.ended(first.invocation.run_id)
    assert record.error is not None
    assert record.error.kind == "thread"
    assert "share the key 'S'" in record.error.message


async def test_a_retraction_of_a_thread_of_nine_hundred_takes_all_of_it_back(platform: Platform) -> None:
    first, gone = notice(platform, "i"), notice(platform, "r")
    [member] = first.records[1:]
    thread = first.invocation.places[0].thread
    for start in range(0, 950, 475):
        known = decode(member.body, Member)
        unit = [
            member._replace(
                subject=thread_subject(thread, f"r{n}"),
                absent=None,
                body=encode(Member(run_id=f"r{n}", rank=known.rank, at=0.0)),
            )
            for n in range(start, start + 475)
        ]
        await platform.log.append(unit)
    await platform.log.append(gone.records)
    settled = await settle(platform.log, gone.invocation, time.time())
    assert len(settled.over) == 950
    assert await platform.log.last("hr.cancel.r949.*") is not None
