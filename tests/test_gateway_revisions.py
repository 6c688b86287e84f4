"""Revisions at the door: what is registered, refused and stopped at once, and what is told of a retracted run."""

from __future__ import annotations

import asyncio
import json
from io import StringIO
from typing import Any

import msgspec
import pytest

from headrace import render
from headrace.client import AsyncClient
from headrace.errors import RunRetracted
from headrace.model import RunView
from headrace.wire import RETRACTER, Member, decode
from tests.doors import TOKEN, Door, Doors

LVK = {"revision": {"preset": "lvk"}}
EVENTS = "application/cloudevents+json"


@pytest.fixture
async def door(doors: Doors) -> Door:
    opened = await doors.open()
    await opened.deploy("alerts", filter={"type": "igwn.gwalert"}, **LVK)
    return opened


def alert(event_id: str, kind: str, at: str = "2026-06-05T12:01:07Z", **data: Any) -> dict[str, Any]:
    return {
        "specversion": "1.0",
        "id": event_id,
        "source": "/igwn",
        "type": "igwn.gwalert",
        "data": {"superevent_id": "S1", "alert_type": kind, "time_created": at, **data},
    }


async def send(door: Door, *events: dict[str, Any]) -> list[str]:
    kind = EVENTS.replace("+", "-batch+")
    status, said, _ = await door.ask("POST", "/v1/events", json=list(events), headers={"Content-Type": kind})
    assert status == 202, said
    return [run["run_id"] for run in said["runs"]]


async def view(door: Door, run: str) -> RunView:
    status, said, _ = await door.ask("GET", f"/v1/runs/{run}")
    assert status == 200
    return msgspec.convert(said, RunView)


@pytest.mark.parametrize(
    ("revision", "named"),
    [({}, "preset"), ({"preset": "ztf"}, "preset"), ({"key": "a b"}, "key"), ({"key": "id", "what": 1}, "what")],
)
async def test_a_route_with_a_revision_that_cannot_work_is_refused(door: Door, revision: Any, named: str) -> None:
    problem = await door.problem(400, "PUT", "/v1/routes/bad", json={"function": "f", "revision": revision})
    assert named in problem.detail
    assert problem.hint


async def test_a_route_shows_its_revision(door: Door) -> None:
    _, said, _ = await door.ask("GET", "/v1/routes/alerts")
    assert said["route"]["revision"] == {"preset": "lvk"}


async def test_an_event_without_the_key_is_refused_with_the_path_and_the_route_and_nothing_is_kept(door: Door) -> None:
    event = alert("e", "INITIAL")
    del event["data"]["superevent_id"]
    problem = await door.problem(400, "POST", "/v1/events", data=json.dumps(event), headers={"Content-Type": EVENTS})
    assert "data.superevent_id" in problem.detail
    assert "alerts" in problem.detail
    assert door.log.stored == []


async def test_a_trigger_is_read_as_an_event_is(door: Door) -> None:
    first = await door.trigger("alerts", json={"superevent_id": "S1", "time_created": "2026-06-05T12:00:00Z"})
    last = await door.trigger("alerts", json={"superevent_id": "S1", "alert_type": "RETRACTION"})
    assert (await view(door, first.run_id)).retracted_by == last.run_id
    problem = await door.problem(400, "POST", "/v1/triggers/alerts", json={"alert_type": "RETRACTION"})
    assert "data.superevent_id" in problem.detail


async def test_membership_stands_beside_the_acceptance_in_one_unit(door: Door) -> None:
    [run] = await send(door, alert("e", "INITIAL"))
    work, member = door.log.stored
    assert work.subject.startswith("hr.work.")
    assert decode(member.body, Member).run_id == run
    assert door.log.appends == 1


async def test_a_retraction_stops_what_runs_before_it_is_promised(door: Door) -> None:
    [first] = await send(door, alert("e1", "INITIAL"))
    [last] = await send(door, alert("e2", "RETRACTION", "2026-06-05T12:10:57Z"))
    assert (await view(door, first)).state == "canceled"
    assert door.firsts()[-1].function == RETRACTER
    problem = await door.problem(410, "GET", f"/v1/runs/{first}/result")
    assert problem.type == "urn:headrace:problem:run-retracted"
    assert last in problem.detail


async def test_a_retracted_answer_is_gone_at_once_though_the_read_model_lags(door: Door) -> None:
    [first] = await send(door, alert("e1", "INITIAL"))
    door.finish(first)
    status, _, _ = await door.ask("GET", f"/v1/runs/{first}/result")
    assert status == 200
    door.reader.lag_at = door.log.last_seq
    [last] = await send(door, alert("e2", "RETRACTION"))
    await door.problem(410, "GET", f"/v1/runs/{first}/result")
    shown = await view(door, first)
    assert (shown.state, shown.retracted_by, shown.superseded_by) == ("succeeded", last, None)


async def test_a_superseded_answer_comes_with_a_link_to_the_run_that_took_its_place(door: Door) -> None:
    [first] = await send(door, alert("e1", "PRELIMINARY"))
    door.finish(first, b"1")
    [second] = await send(door, alert("e2", "UPDATE", "2026-06-05T12:05:00Z"))
    status, said, answer = await door.ask("GET", f"/v1/runs/{first}/result")
    assert (status, said) == (200, 1)
    assert answer.headers["Link"] == f'</v1/runs/{second}>; rel="successor-version"'
    assert (await view(door, first)).superseded_by == second


async def test_what_comes_after_its_retraction_never_starts(door: Door) -> None:
    [last, first] = await send(door, alert("e2", "RETRACTION"), alert("e1", "INITIAL"))
    shown = await view(door, first)
    assert (shown.state, shown.retracted_by) == ("canceled", last)
    assert shown.error is not None
    assert shown.error.kind == "retracted"


async def test_the_same_event_again_is_a_duplicate_and_changes_nothing(door: Door) -> None:
    [first] = await send(door, alert("e1", "INITIAL"))
    kept = len(door.log.stored)
    assert await send(door, alert("e1", "INITIAL")) == [first]
    assert len(door.log.stored) == kept


async def test_a_retraction_finds_room_on_a_full_route(doors: Doors) -> None:
    door = await doors.open()
    await door.deploy("alerts", filter={"type": "igwn.gwalert"}, max_in_flight=1, **LVK)
    [first] = await send(door, alert("e1", "INITIAL"))
    status, _, _ = await door.ask("POST", "/v1/triggers/alerts", json=alert("x", "UPDATE")["data"])
    assert status == 429
    [last] = await send(door, alert("e2", "RETRACTION"))
    assert (await view(door, first)).retracted_by == last


async def test_whoever_waits_for_what_was_retracted_is_told_at_once(door: Door) -> None:
    source = {"superevent_id": "S1", "time_created": "2026-06-05T12:00:00Z"}
    await door.trigger("alerts", json={**source, "alert_type": "RETRACTION"})
    status, said, _ = await door.ask("POST", "/v1/triggers/alerts", json=source, headers={"Prefer": "wait=20"})
    assert (status, said["state"], said["error"]["kind"]) == (200, "canceled", "retracted")


async def test_the_command_line_shows_what_became_of_a_revised_run(door: Door) -> None:
    [first] = await send(door, alert("e1", "INITIAL"))
    door.finish(first)
    [last] = await send(door, alert("e2", "RETRACTION"))
    shown = await view(door, first)
    out = render.console(StringIO())
    out.print(render.run_table(shown))
    out.print(render.runs_table([shown]))
    assert isinstance(out.file, StringIO)
    lines = [line.split() for line in out.file.getvalue().splitlines()]
    assert ["thread", "S1"] in lines
    assert ["retracted", "by", last] in lines
    assert any(line[:3] == [first, "alerts", "retracted"] for line in lines)


async def test_a_promise_stands_though_the_log_goes_away_before_it_is_settled(door: Door) -> None:
    real = door.log.last_of_each

    async def away(subjects: list[str]) -> Any:
        door.log.last_of_each = real  # type: ignore[method-assign]
        door.log.away = True
        try:
            return await real(subjects)
        finally:
            door.log.away = False

    door.log.last_of_each = away  # type: ignore[method-assign]
    [first] = await send(door, alert("e1", "INITIAL"))
    assert (await view(door, first)).state == "accepted"


async def test_a_stream_tells_that_an_ended_run_was_retracted(door: Door) -> None:
    [first] = await send(door, alert("e1", "INITIAL"))
    door.finish(first)
    seen: list[dict[str, Any]] = []
    async with door.http.get(door.url + "/v1/stream") as stream:
        await send(door, alert("e2", "RETRACTION"))
        async with asyncio.timeout(10):
            async for line in stream.content:
                if line.startswith(b"data: "):
                    seen.append(json.loads(line[6:]))
                    if seen[-1].get("retracted_by"):
                        break
    assert (seen[-1]["run_id"], seen[-1]["state"]) == (first, "succeeded")


async def test_the_client_raises_that_a_run_was_retracted(door: Door) -> None:
    async with AsyncClient(door.url, token=TOKEN) as client:
        run = await client.trigger("alerts", alert("e1", "INITIAL")["data"])
        door.finish(run.run_id)
        assert await run.result(timeout=5) == {"ok": True}
        gone = await client.trigger("alerts", alert("e2", "RETRACTION")["data"])
        with pytest.raises(RunRetracted) as refused:
            await run.result(timeout=5)
    assert refused.value.kind == "retracted"
    assert refused.value.run_id == run.run_id
    assert gone.run_id in str(refused.value)
