"""Triggers and events at the front door: what is promised, what is refused, and what is in the log then."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cloudevents.core.bindings.http import to_binary_event, to_structured_event
from cloudevents.core.v1.event import CloudEvent
from yarl import URL

from headrace.model import RunRef, RunView
from headrace.wire import Payload
from streams.topology import INLINE_BYTES_MAX
from tests.doors import TOKEN, Door, Doors

DATA = Path(__file__).parent / "data" / "cloudevents"


async def test_a_trigger_is_in_the_log_when_its_202_comes(door: Door) -> None:
    ref = await door.trigger(json={"shot": 7}, headers={"Idempotency-Key": "shot-7", "Headrace-Deadline": "60s"})
    [first] = door.firsts()
    assert (first.run_id, first.route, first.function) == (ref.run_id, "r", "f")
    assert first.event is not None
    assert (first.event.id, first.event.source) == ("shot-7", "/v1/triggers/r")
    assert first.payload == Payload(type="application/json", body=b'{"shot": 7}', size=11)
    assert first.deadline == pytest.approx(first.accepted_at + 60)
    assert not ref.duplicate
    assert ref.state == "accepted"
    assert ref.links.self == f"/v1/runs/{ref.run_id}"


async def test_a_repeat_is_the_same_run_and_says_how_far_it_is(door: Door) -> None:
    one = await door.trigger(data=b"x", headers={"Idempotency-Key": "k"})
    two = await door.trigger(data=b"x", headers={"Idempotency-Key": '"k"'})
    assert two.run_id == one.run_id
    assert two.duplicate
    assert two.accepted_at == one.accepted_at
    door.finish(one.run_id)
    assert (await door.trigger(data=b"x", headers={"Idempotency-Key": "k"})).state == "succeeded"
    assert len(door.firsts()) == 1


async def test_the_same_key_with_another_body_is_refused(door: Door) -> None:
    await door.trigger(data=b"x", headers={"Idempotency-Key": "k"})
    problem = await door.problem(422, "POST", "/v1/triggers/r", data=b"y", headers={"Idempotency-Key": "k"})
    assert problem.type.endswith(":key-reused")
    assert len(door.firsts()) == 1


async def test_without_a_key_every_trigger_is_a_run_of_its_own(door: Door) -> None:
    assert (await door.trigger(data=b"x")).run_id != (await door.trigger(data=b"x")).run_id


async def test_the_route_gives_the_deadline_unless_the_trigger_does(door: Door) -> None:
    await door.deploy("timed", deadline="10s")
    await door.trigger("timed")
    await door.trigger("timed", headers={"Headrace-Deadline": "2100-01-01T00:00:00Z"})
    by_route, by_caller = door.firsts()
    assert by_route.deadline == pytest.approx(by_route.accepted_at + 10)
    assert by_caller.deadline == 4102444800.0


async def test_a_large_body_goes_to_the_blobs_and_its_digest_to_the_log(door: Door) -> None:
    body = b"x" * (INLINE_BYTES_MAX + 1)
    await door.trigger(data=body)
    [first] = door.firsts()
    assert first.payload.body == b""
    assert first.payload.size == len(body)
    assert first.payload.blob == hashlib.sha256(body).hexdigest()
    assert await door.blobs.get(first.payload.blob) == body


async def test_no_body_at_all_is_no_data(door: Door) -> None:
    await door.trigger()
    assert door.firsts()[0].payload.body == b"null"


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"Headrace-Deadline": "soon"}, "deadline"),
        ({"Idempotency-Key": "x" * 257}, "Idempotency-Key"),
        ({"Idempotency-Key": " "}, "Idempotency-Key"),
        ({"Prefer": "wait=soon"}, "Prefer"),
        ({"Content-Type": "nonsense"}, "Content-Type"),
        ({"Content-Type": "application/json"}, "JSON"),
    ],
)
async def test_a_bad_header_is_named(door: Door, headers: dict[str, str], said: str) -> None:
    problem = await door.problem(400, "POST", "/v1/triggers/r", data=b"{", headers=headers)
    assert said in problem.detail
    assert not door.firsts()


@pytest.mark.parametrize(
    "case", json.loads((DATA / "malformed_bodies.json").read_bytes())["cases"], ids=lambda c: c["id"]
)
async def test_after_any_malformed_body_the_next_trigger_is_taken(door: Door, case: dict[str, Any]) -> None:
    body, headers = base64.b64decode(case["body_base64"]), {"Content-Type": case["content_type"]}
    for path in ("/v1/triggers/r", "/v1/events", "/v1/functions/f", "/v1/routes/r", "/v1/uploads"):
        method = "POST" if path.endswith(("r", "s")) and "routes" not in path else "PUT"
        status, said, _ = await door.ask(method, path, data=body, headers=headers)
        assert status < 500, said
        if case["expect"].startswith("4xx") and case["id"] != "dup-keys":
            assert status >= 400, said
    await door.trigger(json={})


async def test_an_unknown_route_is_a_404_with_a_cure(door: Door) -> None:
    problem = await door.problem(404, "POST", "/v1/triggers/nope", json={})
    assert "nope" in problem.detail
    assert problem.hint


@pytest.mark.parametrize("name", ["a b", "a%2fb", "..", "a*", "%3e", "x" * 65, "%0a", "a%0a"])
async def test_what_is_no_name_reaches_nothing(door: Door, name: str) -> None:
    before = list(door.log.stored)
    for path in (f"/v1/triggers/{name}", f"/v1/runs/{name}/cancel"):
        async with door.http.post(URL(door.url + path.replace(" ", "%20"), encoded=True)) as answer:
            assert answer.status in (400, 404, 405)
    assert door.log.stored == before


async def test_a_body_over_the_limit_is_refused_by_its_announced_length(door: Door) -> None:
    async def never() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    reader, writer = await asyncio.open_connection("127.0.0.1", int(door.url.rsplit(":", 1)[1]))
    head = (
        f"POST /v1/triggers/r HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 16777217\r\n\r\n"
    )
    writer.write(head.encode())
    assert b" 413 " in await reader.readline()
    writer.close()


async def test_a_body_over_the_limit_is_refused_when_it_is_chunked_or_packed(doors: Doors) -> None:
    door = await doors.open(body_bytes_max=1000)
    await door.deploy()

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 100

    await door.problem(413, "POST", "/v1/triggers/r", data=chunks())
    packed = gzip.compress(b"x" * 100_000)
    assert len(packed) < 1000
    await door.problem(413, "POST", "/v1/triggers/r", data=packed, headers={"Content-Encoding": "gzip"})
    await door.problem(400, "POST", "/v1/triggers/r", data=b"junk", headers={"Content-Encoding": "gzip"})


async def test_waiting_answers_with_the_run_when_it_ends(door: Door) -> None:
    async def finish() -> None:
        while not door.firsts():
            await asyncio.sleep(0.001)
        door.finish(door.firsts()[0].run_id)

    task = asyncio.create_task(finish())
    status, said, answer = await door.ask(
        "POST", "/v1/triggers/r", json={}, headers={"Prefer": "respond-async, wait=20"}
    )
    await task
    assert status == 200
    assert answer.headers["Preference-Applied"] == "wait=20"
    assert msgspec.convert(said, RunView).state == "succeeded"


async def test_waiting_in_vain_answers_with_the_promise(door: Door) -> None:
    status, said, answer = await door.ask("POST", "/v1/triggers/r", json={}, headers={"Prefer": "wait=0.05"})
    assert status == 202
    assert answer.headers["Preference-Applied"] == "wait=0.05"
    assert msgspec.convert(said, RunRef).state == "accepted"


async def test_waiting_for_what_ended_before_answers_at_once(door: Door) -> None:
    ref = await door.trigger(headers={"Idempotency-Key": "k"})
    door.finish(ref.run_id)
    status, said, _ = await door.ask("POST", "/v1/triggers/r", headers={"Idempotency-Key": "k", "Prefer": "wait=30"})
    assert status == 200
    assert said["state"] == "succeeded"


async def test_a_route_at_its_limit_refuses_with_429_and_takes_repeats(door: Door) -> None:
    await door.deploy("small", max_in_flight=1)
    ref = await door.trigger("small", headers={"Idempotency-Key": "a"})
    door.reader.lag_at = 0  # the limit holds although the read model has seen nothing yet
    status, said, answer = await door.ask("POST", "/v1/triggers/small", headers={"Idempotency-Key": "b"})
    assert status == 429, said
    assert int(answer.headers["Retry-After"]) >= 1
    assert (await door.trigger("small", headers={"Idempotency-Key": "a"})).duplicate
    door.reader.lag_at = None
    door.finish(ref.run_id)
    await door.trigger("small", headers={"Idempotency-Key": "b"})


# ---------------------------------------------------------------- events


def event(identity: str = "e-1", **attributes: Any) -> dict[str, Any]:
    return {"specversion": "1.0", "id": identity, "source": "/s", "type": "t", "data": {"n": 1}, **attributes}


async def publish(door: Door, body: Any) -> tuple[int, Any]:
    kind = "application/cloudevents-batch+json" if isinstance(body, list) else "application/cloudevents+json"
    status, said, _ = await door.ask("POST", "/v1/events", data=json.dumps(body), headers={"Content-Type": kind})
    return status, said


async def test_an_event_starts_a_run_on_every_route_that_takes_it(door: Door) -> None:
    await door.deploy("a", filter={"type": "t"})
    await door.deploy("b", filter={"source": "prefix:/s"}, deadline="5s")
    await door.deploy("c", filter={"type": "other"})
    status, said = await publish(door, event())
    assert status == 202
    assert [r["route"] for r in said["runs"]] == ["a", "b"]
    assert door.log.appends == 1
    status, again = await publish(door, event())
    assert [r["duplicate"] for r in again["runs"]] == [True, True]
    assert [r["run_id"] for r in again["runs"]] == [r["run_id"] for r in said["runs"]]


async def test_an_event_that_no_route_takes_is_accepted_and_starts_nothing(door: Door) -> None:
    assert await publish(door, event()) == (202, {"runs": []})
    assert await publish(door, []) == (202, {"runs": []})


async def test_a_batch_is_one_unit_and_what_came_before_is_left_out(door: Door) -> None:
    await door.deploy("a", filter={"type": "t"})
    await publish(door, event("1"))
    appends = door.log.appends
    status, said = await publish(door, [event("1"), event("2"), event("3"), event("2")])
    assert status == 202
    assert [r["duplicate"] for r in said["runs"]] == [True, False, False]
    assert door.log.appends == appends + 1
    assert len(door.firsts()) == 3


async def test_a_batch_with_one_bad_event_is_refused_whole(door: Door) -> None:
    await door.deploy("a", filter={"type": "t"})
    assert (await publish(door, [event("1"), event("2", id=None)]))[0] == 400
    await publish(door, event("1"))
    assert (await publish(door, [event("2"), event("1", data={"n": 2})]))[0] == 422
    assert (await publish(door, [event("5"), event("5", data={"n": 2})]))[0] == 422
    assert (await publish(door, [event(str(n)) for n in range(501)]))[0] == 413
    assert len(door.firsts()) == 1


async def test_a_repeat_may_carry_another_trace_but_not_another_reference(door: Door) -> None:
    await door.deploy("a", filter={"type": "t"})
    await publish(door, event(traceparent="one"))
    assert (await publish(door, event(traceparent="two")))[1]["runs"][0]["duplicate"]
    await publish(door, event("big", data=None, dataref="blob:a"))
    assert (await publish(door, event("big", data=None, dataref="blob:b")))[0] == 422


async def test_the_event_gives_the_deadline(door: Door) -> None:
    await door.deploy("a", filter={"type": "t"}, deadline="1h")
    await publish(door, event(deadline="5s"))
    [first] = door.firsts()
    assert first.deadline == pytest.approx(first.accepted_at + 5)
    assert (await publish(door, event("2", deadline="never")))[0] == 400


async def test_an_unknown_format_is_a_415(door: Door) -> None:
    await door.problem(415, "POST", "/v1/events", data=b"x", headers={"Content-Type": "application/cloudevents+avro"})


async def test_events_of_the_official_sdk_arrive_whole_in_both_modes(door: Door) -> None:
    await door.deploy("a", filter={"type": "org.example"})
    for identity, to_message in (("1", to_binary_event), ("2", to_structured_event)):
        made = CloudEvent(
            attributes={
                "id": identity,
                "source": "/sdk",
                "type": "org.example",
                "subject": "Euro € 😀",
                "datacontenttype": "application/json",
            },
            data={"a": [1, "ü"]},
        )
        message = to_message(made)
        status, said, _ = await door.ask("POST", "/v1/events", data=message.body, headers=dict(message.headers))
        assert status == 202, said
    for first in door.firsts():
        assert first.event is not None
        assert first.event.subject == "Euro € 😀"
        assert json.loads(first.payload.body) == {"a": [1, "ü"]}
