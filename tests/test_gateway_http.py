"""The front door over real HTTP, with the log and the read model in memory."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from cloudevents.core.bindings.http import to_binary_event, to_structured_event
from cloudevents.core.v1.event import CloudEvent

from gateway.app import DRAINING, build
from gateway.limits import GatewayLimits
from gateway.server import Runner
from headrace.errors import HeadraceError
from headrace.model import ErrorInfo, Problem, RunRef, RunView
from headrace.wire import Invocation, Outcome, Payload, RunEnd, decode, encode
from streams.blobs import FolderBlobs
from streams.topology import INLINE_BYTES_MAX, done_subject, end_subject
from tests.doubles import MemoryLog, MemoryReader, MemoryTables

TOKEN = "test-token-0123456789"
CODE = {"kind": "source", "name": "f", "module": "user", "files": {"user.py": "def f(x):\n    return x\n"}}
DATA = Path(__file__).parent / "data" / "cloudevents"


@dataclass
class Door:
    """A gateway on a free port, and what is behind it."""

    url: str
    http: aiohttp.ClientSession
    app: web.Application
    log: MemoryLog
    reader: MemoryReader
    tables: MemoryTables
    blobs: FolderBlobs

    async def ask(self, method: str, path: str, **options: Any) -> tuple[int, Any, aiohttp.ClientResponse]:
        async with self.http.request(method, self.url + path, **options) as answer:
            body = await answer.read()
            said: Any = body
            if "json" in answer.headers.get("Content-Type", ""):
                said = json.loads(body)
            return answer.status, said, answer

    async def problem(self, status: int, method: str, path: str, **options: Any) -> Problem:
        """Ask for what must be refused, and return a well-formed problem."""
        found, said, answer = await self.ask(method, path, **options)
        assert found == status, said
        assert answer.headers["Content-Type"] == "application/problem+json"
        problem = msgspec.convert(said, Problem)
        assert problem.status == status
        assert problem.detail
        assert problem.type.startswith("urn:headrace:problem:")
        assert "Traceback" not in str(said)
        return problem

    async def deploy(self, route: str = "r", **rule: Any) -> None:
        status, said, _ = await self.ask("PUT", "/v1/functions/f", json={"code": CODE})
        assert status in (200, 201), said
        status, said, _ = await self.ask("PUT", f"/v1/routes/{route}", json={"function": "f", **rule})
        assert status in (200, 201), said

    async def trigger(self, route: str = "r", **options: Any) -> RunRef:
        status, said, _ = await self.ask("POST", f"/v1/triggers/{route}", **options)
        assert status == 202, said
        return msgspec.convert(said, RunRef)

    def firsts(self) -> list[Invocation]:
        """Return all accepted first invocations, in order."""
        return [decode(s.body, Invocation) for s in self.log.stored if s.subject.startswith("hr.work.")]

    def finish(self, run_id: str, result: bytes = b'{"ok":true}', **changes: Any) -> int:
        """Commit the outcome of a run's first invocation, as a worker would."""
        first = next(i for i in self.firsts() if i.run_id == run_id)
        now = time.time()
        fields: dict[str, Any] = {
            "run_id": run_id,
            "invocation_id": first.invocation_id,
            "function": first.function,
            "version": first.version,
            "route": first.route,
            "tenant": first.tenant,
            "state": "succeeded",
            "attempts": 1,
            "queued_at": now,
            "started_at": now,
            "ended_at": now,
            "worker": "w",
            "accepted_at": first.accepted_at,
            "deadline": first.deadline,
            "result": Payload(body=result, size=len(result)),
            "end": RunEnd(run_id=run_id, state="succeeded", answer_id=first.invocation_id, ended_at=now),
            **changes,
        }
        return self.log.put(done_subject(run_id, first.invocation_id), encode(Outcome(**fields)))


Open = Callable[..., Awaitable[Door]]


@pytest.fixture
async def opening(tmp_path: Path) -> AsyncIterator[Open]:
    """Return what opens a door with limits of one's own; all are closed in the end."""
    undo: list[Callable[[], Awaitable[None]]] = []

    async def open_door(**limits: Any) -> Door:
        log, tables, blobs = MemoryLog(), MemoryTables(), FolderBlobs(tmp_path / "blobs")
        reader = MemoryReader(log)
        app = build(
            log=log,
            follow=log.follow,
            tables=tables,
            blobs=blobs,
            reader=reader,
            token=TOKEN,
            version="1.2.3",
            limits=GatewayLimits(**{"disk_bytes_min": 0, **limits}),
        )
        runner = Runner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        http = aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"})
        undo.extend([runner.cleanup, http.close])
        host, port = runner.addresses[0][:2]
        return Door(f"http://{host}:{port}", http, app, log, reader, tables, blobs)

    yield open_door
    for act in reversed(undo):
        await act()


@pytest.fixture
async def door(opening: Open) -> Door:
    opened = await opening()
    await opened.deploy()
    return opened


# ---------------------------------------------------------------- triggers


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
        ({"Idempotency-Key": "x" * 10_000}, "Idempotency-Key"),
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


@pytest.mark.parametrize("case", json.loads((DATA / "malformed_bodies.json").read_bytes())["cases"], ids=lambda c: c["id"])
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
    from yarl import URL

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
    head = f"POST /v1/triggers/r HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 16777217\r\n\r\n"
    writer.write(head.encode())
    assert b" 413 " in await reader.readline()
    writer.close()


async def test_a_body_over_the_limit_is_refused_when_it_is_chunked_or_packed(opening: Open) -> None:
    door = await opening(body_bytes_max=1000)
    await door.deploy()

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 100

    await door.problem(413, "POST", "/v1/triggers/r", data=chunks())
    import gzip

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
    status, said, answer = await door.ask("POST", "/v1/triggers/r", json={}, headers={"Prefer": "respond-async, wait=20"})
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


# ---------------------------------------------------------------- overload and trouble


async def test_too_many_at_once_are_refused_before_their_bodies_are_read(opening: Open) -> None:
    door = await opening(in_flight_max=1)
    await door.deploy()
    reading = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"a"
        await reading.wait()
        yield b"b"

    first = asyncio.create_task(door.ask("POST", "/v1/triggers/r", data=slow()))
    while True:
        status, said, answer = await door.ask("POST", "/v1/triggers/r", data=b"x")
        if status == 503:
            break
    assert answer.headers["Retry-After"]
    assert said["type"].endswith(":busy")
    reading.set()
    assert (await first)[0] == 202


async def test_a_log_that_is_away_is_a_503_and_nothing_is_half_accepted(door: Door) -> None:
    door.log.away = True
    status, said, answer = await door.ask("POST", "/v1/triggers/r", json={}, headers={"Idempotency-Key": "k"})
    assert status == 503
    assert answer.headers["Retry-After"]
    assert said["type"].endswith(":unavailable")
    door.log.away = False
    assert not (await door.trigger(json={}, headers={"Idempotency-Key": "k"})).duplicate


async def test_a_nearly_full_disk_refuses_triggers_and_readiness(opening: Open) -> None:
    door = await opening(disk_bytes_min=2**62)
    await door.problem(503, "POST", "/v1/triggers/r", data=b"")if False else None
    door.tables.routes.rows.clear()
    status, said, _ = await door.ask("GET", "/readyz")
    assert status == 503
    assert said["disk_free"] is False
    await door.problem(503, "PUT", "/v1/functions/f", json={"code": CODE})


async def test_an_error_that_nobody_foresaw_is_told_without_its_inside(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    async def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("secret detail")

    door.log.append = broken  # type: ignore[method-assign]
    problem = await door.problem(500, "POST", "/v1/triggers/r", json={})
    assert "secret" not in problem.detail
    assert "secret detail" in caplog.text


@pytest.mark.parametrize("method", ["POST", "DELETE", "PATCH"])
async def test_a_wrong_method_says_which_are_right(door: Door, method: str) -> None:
    status, said, answer = await door.ask(method, "/v1/runs")
    assert status == 405
    assert answer.headers["Allow"] == "GET,HEAD"
    assert said["type"] == "urn:headrace:problem:method-not-allowed"


async def test_what_is_not_there_is_a_problem_too(door: Door) -> None:
    assert (await door.problem(404, "GET", "/nowhere")).hint
    assert (await door.problem(404, "GET", "/v1/nowhere")).hint


@pytest.mark.parametrize(
    "raw",
    [
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: +3\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX : y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 40_000 + b"\r\n\r\n",
    ],
)
async def test_broken_http_is_a_problem_that_names_no_software(door: Door, raw: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(door.url.rsplit(":", 1)[1]))
    writer.write(raw)
    said = await reader.read()
    writer.close()
    assert said.startswith(b"HTTP/1.0 400") or said.startswith(b"HTTP/1.1 400")
    assert b"application/problem+json" in said
    assert b"aiohttp" not in said
    assert b"Python" not in said


# ---------------------------------------------------------------- the token


CLOSED = [
    ("POST", "/v1/events"),
    ("POST", "/v1/triggers/r"),
    ("POST", "/v1/uploads"),
    ("POST", "/v1/uploads/0/complete"),
    ("GET", "/v1/runs"),
    ("GET", "/v1/runs/x"),
    ("GET", "/v1/runs/x/result"),
    ("GET", "/v1/runs/x/events"),
    ("POST", "/v1/runs/x/cancel"),
    ("GET", "/v1/stream"),
    ("GET", "/v1/functions"),
    ("PUT", "/v1/functions/f"),
    ("PUT", "/v1/routes/r"),
    ("DELETE", "/v1/routes/r"),
    ("GET", "/v1/sites"),
    ("GET", "/v1/nowhere"),
]


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer ", "Basic " + TOKEN, TOKEN, "Bearer " + TOKEN + "x", "Bearer \xff"]
)
async def test_nothing_under_v1_is_open_without_the_token(door: Door, header: str | None) -> None:
    async with aiohttp.ClientSession() as stranger:
        for method, path in CLOSED:
            headers = {} if header is None else {"Authorization": header}
            async with stranger.request(method, door.url + path, headers=headers) as answer:
                assert answer.status == 401, (method, path)
                assert answer.headers["WWW-Authenticate"].startswith("Bearer")
                assert TOKEN not in await answer.text()


@pytest.mark.parametrize("path", ["/", "/page/app.js", "/livez", "/readyz", "/metrics", "/openapi.json"])
async def test_page_and_health_are_open(door: Door, path: str) -> None:
    async with aiohttp.ClientSession() as stranger, stranger.get(door.url + path) as answer:
        assert answer.status == 200
        assert answer.headers["Server"] == "Headrace"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


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
    await door.problem(
        415, "POST", "/v1/events", data=b"x", headers={"Content-Type": "application/cloudevents+avro"}
    )


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


# ---------------------------------------------------------------- runs


async def test_a_run_is_readable_at_once_whatever_the_read_model_knows(door: Door) -> None:
    door.reader.lag_at = 0
    ref = await door.trigger(json={})
    for state in ("lag", "away"):
        door.reader.away = state == "away"
        status, said, _ = await door.ask("GET", f"/v1/runs/{ref.run_id}")
        assert status == 200, said
        view = msgspec.convert(said, RunView)
        assert (view.state, view.route, view.event.type) == ("accepted", "r", "org.headrace.trigger")
        assert view.invocations[0].state == "queued"


async def test_an_unknown_run_is_a_404(door: Door) -> None:
    for path in ("", "/result", "/events"):
        await door.problem(404, "GET", f"/v1/runs/rnope{path}")
    await door.problem(404, "POST", "/v1/runs/rnope/cancel")


async def test_runs_come_newest_first_in_pages(door: Door) -> None:
    refs = [await door.trigger(data=b"x") for _ in range(5)]
    found: list[str] = []
    cursor: str | None = None
    while True:
        query = {"limit": "2", **({"cursor": cursor} if cursor else {})}
        status, said, _ = await door.ask("GET", "/v1/runs", params=query)
        assert status == 200
        found += [r["run_id"] for r in said["runs"]]
        cursor = said["next"]
        if cursor is None:
            break
    assert found == [r.run_id for r in reversed(refs)]


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "limit=x", "limit=-1", "state=done", "since=today", "route=a*", "cursor=" + "1" * 600]
)
async def test_a_bad_query_is_named(door: Door, query: str) -> None:
    problem = await door.problem(400, "GET", f"/v1/runs?{query}")
    assert query.partition("=")[0] in problem.detail


async def test_the_result_is_the_answer_itself(door: Door) -> None:
    ref = await door.trigger(json={})
    status, _, answer = await door.ask("GET", f"/v1/runs/{ref.run_id}/result")
    assert status == 202
    assert answer.headers["Retry-After"]
    door.finish(ref.run_id, b'{"hits":3}')
    status, said, answer = await door.ask("GET", f"/v1/runs/{ref.run_id}/result")
    assert (status, said) == (200, {"hits": 3})
    assert "sandbox" in answer.headers["Content-Security-Policy"]


async def test_an_explicit_answer_stands_before_the_run_has_ended(door: Door) -> None:
    ref = await door.trigger(json={})
    door.finish(ref.run_id, b"1", answer=Payload(type="text/html", body=b"<p>", size=3), end=None, children=1)
    status, said, answer = await door.ask("GET", f"/v1/runs/{ref.run_id}/result")
    assert (status, said) == (200, b"<p>")
    assert answer.headers["Content-Type"] == "text/html"


async def test_a_large_result_comes_from_the_blobs(door: Door) -> None:
    body = b"y" * 200_000
    digest = await door.blobs.put(body)
    ref = await door.trigger(json={})
    door.finish(ref.run_id, result=b"") if False else door.finish(
        ref.run_id, **{"result": Payload(type="application/x-thing", blob=digest, size=len(body))}  # type: ignore[arg-type]
    ) if False else door.log.put(
        done_subject(ref.run_id, door.firsts()[0].invocation_id),
        encode(_outcome_with(door, ref.run_id, Payload(type="application/x-thing", blob=digest, size=len(body)))),
    )
    status, said, answer = await door.ask("GET", f"/v1/runs/{ref.run_id}/result")
    assert (status, said) == (200, body)
    assert answer.headers["Content-Type"] == "application/x-thing"
