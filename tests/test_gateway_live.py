"""Server-sent events: what facts become, and how a client follows them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import pytest
from msgspec import structs

from gateway.story import events_of, text_of
from headrace.clock import format_instant, parse_instant
from headrace.model import ErrorInfo
from headrace.names import invocation_id
from headrace.sse import Message, messages
from headrace.wire import (
    Attempt,
    Cancel,
    EventMeta,
    Invocation,
    Note,
    Outcome,
    Payload,
    RunEnd,
    Started,
    Tally,
    encode,
)
from streams.record import fold_run, view
from streams.stored import Stored
from streams.topology import cancel_subject, done_subject, end_subject, note_subject
from tests.doors import Door, Doors

# ---------------------------------------------------------------- from facts to events

FIRST = Invocation(
    run_id="R",
    invocation_id="I",
    function="f",
    version="v",
    route="r",
    tenant="default",
    payload=Payload(),
    accepted_at=100.0,
    sent_at=100.0,
    deadline=110.0,
    event=EventMeta(id="e", source="/s", type="t"),
)
DONE = Outcome(
    run_id="R",
    invocation_id="I",
    function="f",
    version="v",
    route="r",
    tenant="default",
    state="succeeded",
    attempts=1,
    queued_at=100.0,
    started_at=101.0,
    ended_at=102.0,
    worker="w",
    accepted_at=100.0,
    deadline=110.0,
    result=Payload(body=b"1"),
)
ERROR = ErrorInfo(kind="user", message="no")


def stored(kind: str, fact: Any, at: float = 103.0, seq: int = 7) -> Stored:
    return Stored(seq, f"hr.{kind}.R.I", encode(fact), at)


def told(kind: str, fact: Any, at: float = 103.0) -> list[tuple[str, dict[str, Any]]]:
    """Return the events of a fact as a client reads them."""
    text = text_of(7, events_of(stored(kind, fact, at))).decode()
    found = []
    for block in text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((fields["event"], json.loads(fields["data"])))
    return found


def test_the_first_invocation_tells_of_the_run_and_of_itself() -> None:
    (name, run), (other, invocation) = told("work.3.t", FIRST)
    assert (name, run["state"], run["route"], run["deadline"]) == ("run", "accepted", "r", format_instant(110.0))
    assert run["event"] == {"id": "e", "source": "/s", "type": "t"}
    assert (other, invocation["state"], invocation["parent_id"]) == ("invocation", "queued", None)


def test_a_fact_with_two_events_carries_its_id_on_the_second() -> None:
    text = text_of(7, events_of(stored("work.3.t", FIRST))).decode()
    assert [line for line in text.split("\n") if line.startswith(("id", "event"))] == [
        "event: run",
        "id: 7",
        "event: invocation",
    ]


def test_an_outcome_that_ends_the_run_tells_the_answer_and_whether_it_was_in_time() -> None:
    end = RunEnd(run_id="R", state="succeeded", answer_id="I")
    for at, met in ((103.0, True), (110.0, True), (110.5, False)):
        (_, invocation), (_, run) = told("done", structs.replace(DONE, end=end), at)
        assert (invocation["state"], invocation["worker"]) == ("succeeded", "w")
        assert (run["state"], run["answered_at"], run["ended_at"]) == ("succeeded", *[format_instant(at)] * 2)
        assert run["time_to_solution_s"] == pytest.approx(at - 100.0)
        assert run["deadline_met"] is met


def test_a_failed_run_has_no_answer_and_missed_its_deadline() -> None:
    end = RunEnd(run_id="R", state="failed", error=ERROR)
    (_, invocation), (_, run) = told("done", structs.replace(DONE, state="dead", error=ERROR, end=end))
    assert (invocation["state"], invocation["error"]["message"]) == ("dead", "no")
    assert (run["state"], run["deadline_met"]) == ("failed", False)
    assert "answered_at" not in run


def test_an_explicit_answer_is_told_while_the_run_goes_on() -> None:
    _, (_, run) = told("done", structs.replace(DONE, answer=Payload(body=b"2"), children=1))
    assert (run["state"], run["answered_at"], run["deadline_met"]) == ("running", format_instant(103.0), True)


def test_other_facts_tell_one_thing_each() -> None:
    start = Started(
        run_id="R", invocation_id="I", function="f", version="v", worker="w", attempt=2, queued_at=1.0, started_at=2.0
    )
    assert [(n, d["state"]) for n, d in told("start", start)] == [("run", "running"), ("invocation", "running")]
    attempt = Attempt(
        run_id="R",
        invocation_id="I",
        function="f",
        version="v",
        worker="w",
        attempt=1,
        started_at=1.0,
        ended_at=2.0,
        retry_at=3.0,
        error=ERROR,
    )
    [(name, data)] = told("try", attempt)
    assert (name, data["state"], data["error"]["kind"], data["attempts"]) == ("invocation", "queued", "user", 1)
    note = Note(
        run_id="R", invocation_id="I", at=5.0, lines=[("info", "a\nb"), ("error", "c")], fraction=0.5, text="half"
    )
    assert [(n, d.get("text"), d.get("fraction")) for n, d in told("note", note)] == [
        ("log", "a\nb", None),
        ("log", "c", None),
        ("progress", None, 0.5),
    ]
    [(name, data)] = told("cancel", Cancel(run_id="R", at=1.0, reason="beam"))
    assert (name, data["state"], data["error"]["message"]) == ("run", "canceled", "beam")
    assert told("tally", Tally(run_id="R", scope="s", filled=[(0, 1)])) == []


def test_the_events_of_a_run_agree_with_its_view() -> None:
    end = RunEnd(run_id="R", state="succeeded", answer_id="I", spent=DONE.spent)
    facts = [
        Stored(1, "hr.work.3.default.R.I", encode(FIRST), 100.1),
        stored("done", structs.replace(DONE, end=end), 103.0, seq=2),
    ]
    folded = fold_run(facts)
    assert folded is not None
    shown = json.loads(msgspec.json.encode(view(*folded)))
    seen: dict[str, Any] = {}
    for fact in facts:
        for name, data in events_of(fact):
            if name == "run":
                seen |= json.loads(msgspec.json.encode(data))
    for name in ("state", "route", "accepted_at", "answered_at", "ended_at", "deadline", "deadline_met"):
        assert seen[name] == shown[name], name
    assert seen["time_to_solution_s"] == pytest.approx(shown["time_to_solution_s"])


# ---------------------------------------------------------------- following


class Reading:
    """A client that reads a stream message by message."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self._messages = messages(response.content.iter_any())

    async def next(self) -> Message:
        async with asyncio.timeout(10):
            return await anext(self._messages)

    async def until(self, name: str, **fields: Any) -> Message:
        """Return the next event of this name with these fields."""
        while True:
            found = await self.next()
            data = json.loads(found.data or b"{}")
            if found.event == name and all(data.get(k) == v for k, v in fields.items()):
                return found

    async def rest(self) -> list[Message]:
        """Return all that comes until the server ends the stream."""
        async with asyncio.timeout(10):
            return [message async for message in self._messages]


@asynccontextmanager
async def reading(door: Door, path: str, after: str | None = None) -> AsyncIterator[Reading]:
    headers = {} if after is None else {"Last-Event-ID": after}
    async with door.http.get(door.url + path, headers=headers) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["Server"] == "Headrace"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        yield Reading(response)


def states(found: list[Message]) -> Iterator[tuple[str, str]]:
    for message in found:
        if message.event in ("run", "invocation"):
            yield message.event, json.loads(message.data)["state"]


async def test_a_run_is_told_from_its_beginning_to_its_end(door: Door) -> None:
    ref = await door.trigger(json={})
    async with reading(door, f"/v1/runs/{ref.run_id}/events") as client:
        await client.until("invocation", state="queued")
        [first] = door.firsts()
        note = Note(run_id=ref.run_id, invocation_id=first.invocation_id, at=1.0, lines=[("info", "hello")])
        door.log.put(note_subject(ref.run_id, first.invocation_id, 1), encode(note))
        assert json.loads((await client.until("log")).data)["text"] == "hello"
        other = await door.trigger(json={})
        door.finish(other.run_id)
        door.finish(ref.run_id)
        found = await client.rest()
    assert list(states(found)) == [("invocation", "succeeded"), ("run", "succeeded")]
    assert all(json.loads(m.data)["run_id"] == ref.run_id for m in found)


async def test_a_client_goes_on_after_any_event_without_a_gap(door: Door) -> None:
    ref = await door.trigger(json={})
    door.finish(ref.run_id)
    async with reading(door, f"/v1/runs/{ref.run_id}/events") as client:
        whole = [m for m in await client.rest() if m.data]
    assert list(states(whole)) == [
        ("run", "accepted"),
        ("invocation", "queued"),
        ("invocation", "succeeded"),
        ("run", "succeeded"),
    ]
    async with reading(door, f"/v1/runs/{ref.run_id}/events", after=whole[1].id) as client:
        assert [m for m in await client.rest() if m.data] == whole[2:]


async def test_after_the_end_of_a_run_its_end_is_told_again(door: Door) -> None:
    ref = await door.trigger(json={})
    seq = door.finish(ref.run_id)
    async with reading(door, f"/v1/runs/{ref.run_id}/events", after=str(seq)) as client:
        found = [m for m in await client.rest() if m.data]
    assert list(states(found)) == [("run", "succeeded")]
    assert json.loads(found[0].data)["route"] == "r"


async def test_the_stream_of_all_runs_begins_now_and_tells_from_where(door: Door) -> None:
    await door.trigger(json={})
    async with reading(door, "/v1/stream") as client:
        opened = await client.next()
        assert (opened.id, opened.event, opened.data) == (str(door.log.last_seq), "", b"")
        ref = await door.trigger(json={})
        first = await client.until("run")
        assert json.loads(first.data)["run_id"] == ref.run_id
    async with reading(door, "/v1/stream", after="0") as client:
        assert json.loads((await client.until("run")).data)["run_id"] == door.firsts()[0].run_id
    async with reading(door, "/v1/stream", after="999999") as client:  # an id of a log that is no more
        assert (await client.next()).id == str(door.log.last_seq)
        ref = await door.trigger(json={})
        await client.until("run", run_id=ref.run_id)


async def test_what_comes_after_a_cancel_does_not_change_the_run(door: Door) -> None:
    ref = await door.trigger(json={})
    async with reading(door, "/v1/stream", after="0") as client:
        door.log.put(cancel_subject(ref.run_id), encode(Cancel(run_id=ref.run_id, at=1.0)))
        await client.until("run", state="canceled")
        door.finish(ref.run_id)
        other = await door.trigger(json={})
        assert json.loads((await client.until("run")).data)["run_id"] == other.run_id


async def test_an_answer_that_was_told_is_not_told_again_at_the_end(door: Door) -> None:
    ref = await door.trigger(json={})
    [first] = door.firsts()
    async with reading(door, f"/v1/runs/{ref.run_id}/events") as client:
        door.finish(ref.run_id, answer=Payload(body=b"2"), end=None, children=1)
        await client.until("run", state="running", deadline_met=None)
        child = invocation_id(first.invocation_id, 0)
        end = RunEnd(run_id=ref.run_id, state="succeeded", answer_id=child)
        done = structs.replace(
            DONE, run_id=ref.run_id, invocation_id=child, parent_id=first.invocation_id, end=end, tenant=first.tenant
        )
        door.log.put(done_subject(ref.run_id, child), encode(done))
        last = json.loads((await client.rest())[-1].data)
    assert last["state"] == "succeeded"
    assert "answered_at" not in last


async def test_the_end_of_a_run_with_branches_tells_all_of_the_run(door: Door) -> None:
    ref = await door.trigger(json={}, headers={"Headrace-Deadline": "60s"})
    door.finish(ref.run_id, end=None, children=2)
    door.log.put(end_subject(ref.run_id), encode(RunEnd(run_id=ref.run_id, state="succeeded", answer_id="x")))
    async with reading(door, f"/v1/runs/{ref.run_id}/events") as client:
        last = json.loads((await client.rest())[-1].data)
    assert (last["state"], last["route"], last["deadline_met"]) == ("succeeded", "r", True)
    assert parse_instant(last["answered_at"]) == parse_instant(last["ended_at"])


async def test_a_client_too_many_is_refused_and_a_place_becomes_free_again(doors: Doors) -> None:
    door = await doors.open(streams_max=1)
    await door.deploy()
    async with reading(door, "/v1/stream") as client:
        await client.next()
        await door.problem(503, "GET", "/v1/stream")
    status = 503
    while status == 503:  # the server notices at its next write that the client has gone
        await door.trigger(json={})
        async with door.http.get(door.url + "/v1/stream") as answer:
            status = answer.status
    assert status == 200


async def test_a_client_that_does_not_read_is_dropped_and_holds_up_nobody(doors: Doors) -> None:
    door = await doors.open(stream_send_seconds_max=0.2)
    await door.deploy()
    ref = await door.trigger(json={})
    [first] = door.firsts()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(door.url.rsplit(":", 1)[1]), limit=1024)
    token = door.http.headers["Authorization"]
    writer.write(f"GET /v1/stream HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\n\r\n".encode())
    await reader.readline()
    note = Note(run_id=ref.run_id, invocation_id=first.invocation_id, at=1.0, lines=[("info", "x" * 50_000)])
    metrics = b""
    while b"headrace_streams_dropped_total 1.0" not in metrics:
        for _ in range(40):
            door.log.put(note_subject(ref.run_id, first.invocation_id, 1), encode(note))
        await door.trigger(json={})
        _, metrics, _ = await door.ask("GET", "/metrics")
    assert b"headrace_streams 0.0" in metrics
    writer.close()


@pytest.mark.parametrize("after", ["x", "-1", "1" * 30, "1.5"])
async def test_an_id_that_is_none_is_refused(door: Door, after: str) -> None:
    ref = await door.trigger(json={})
    for path in ("/v1/stream", f"/v1/runs/{ref.run_id}/events"):
        await door.problem(400, "GET", path, headers={"Last-Event-ID": after})


async def test_closing_the_gateway_ends_its_streams_in_good_order(door: Door) -> None:
    async with reading(door, "/v1/stream") as client:
        await client.next()
        closing = asyncio.create_task(door.runner.cleanup())
        assert await client.rest() == []
    await closing


def test_a_message_that_cannot_be_read_makes_no_event() -> None:
    assert events_of(Stored(1, "hr.done.run.invocation", b"\xc1 not a message", 1.0)) == []
