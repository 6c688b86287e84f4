"""The client against a server that misbehaves: what is tried again, with the same id, and what is told in the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from headrace import address
from headrace.client import AsyncClient
from headrace.errors import (
    BadName,
    BadRequest,
    Conflict,
    HeadraceError,
    NotFound,
    Overloaded,
    PlatformUnreachable,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from headrace.events import to_json
from headrace.handle import AsyncRun
from headrace.model import Event
from headrace.sse import Message, messages
from headrace.sync import Client

TOKEN = "secret-token-of-a-test"
REF = {
    "run_id": "r1",
    "route": "r",
    "state": "accepted",
    "duplicate": False,
    "accepted_at": "2026-11-21T03:14:15Z",
    "deadline": None,
    "quote": {"verdict": "unknown", "p50_s": None, "p90_s": None},
    "links": {"self": "/v1/runs/r1", "result": "/v1/runs/r1/result", "events": "/v1/runs/r1/events"},
}

Answer = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class StandIn:
    """A server that answers each request with the next thing it was told to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[web.BaseRequest] = []
        self.bodies: list[bytes] = []
        self.answers: list[Answer] = []
        self.url = ""

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked.append(request)
        self.bodies.append(await request.read())
        return await self.answers[min(len(self.asked), len(self.answers)) - 1](request)


def says(status: int, body: object = None, **headers: str) -> Answer:
    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        return web.json_response(body, status=status, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return answer


def problem(status: int, slug: str = "x", **headers: str) -> Answer:
    body = {"type": f"urn:headrace:problem:{slug}", "title": "T", "status": status, "detail": "what", "hint": "how"}
    return says(status, body, **headers)


async def hangs_up(request: web.BaseRequest) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


@pytest.fixture
async def server() -> AsyncIterator[StandIn]:
    stand_in = StandIn()
    runner = web.ServerRunner(web.Server(stand_in.answer))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    stand_in.url = f"http://{host}:{port}"
    yield stand_in
    await runner.cleanup()


@pytest.fixture
async def client(server: StandIn) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.url, TOKEN, patience_s=20.0) as made:
        yield made


# ---------------------------------------------------------------- trying again


async def test_a_trigger_without_an_id_is_tried_again_under_one_id(server: StandIn, client: AsyncClient) -> None:
    server.answers = [hangs_up, problem(503, Retry_After="0"), problem(429, Retry_After="0"), says(202, REF)]
    run = await client.trigger("r", {"x": 1})
    assert run.run_id == "r1"
    keys = {request.headers["Idempotency-Key"] for request in server.asked}
    assert (len(server.asked), len(keys)) == (4, 1)
    assert set(server.bodies) == {b'{"x":1}'}
    assert {request.headers["Authorization"] for request in server.asked} == {f"Bearer {TOKEN}"}


async def test_two_triggers_without_an_id_have_two(server: StandIn, client: AsyncClient) -> None:
    server.answers = [says(202, REF)]
    await client.trigger("r")
    await client.trigger("r")
    assert len({request.headers["Idempotency-Key"] for request in server.asked}) == 2


async def test_what_the_caller_got_wrong_is_not_tried_again(server: StandIn, client: AsyncClient) -> None:
    server.answers = [problem(400)]
    with pytest.raises(BadRequest):
        await client.trigger("r")
    assert len(server.asked) == 1


async def test_a_platform_that_stays_busy_is_told_with_when_to_come_back(server: StandIn) -> None:
    server.answers = [problem(503, Retry_After="3600")]
    async with AsyncClient(server.url, TOKEN, patience_s=0.5) as client:
        with pytest.raises(Unavailable) as caught:
            await client.trigger("r")
    assert caught.value.retry_after_s == 3600
    assert len(server.asked) == 1


async def test_an_address_where_nobody_listens_is_unreachable_and_says_how_to_mend_it(
    unused_tcp_port: int,
) -> None:
    async with AsyncClient(f"http://127.0.0.1:{unused_tcp_port}", TOKEN, patience_s=0.0) as client:
        with pytest.raises(PlatformUnreachable, match=str(unused_tcp_port)) as caught:
            await client.runs()
    assert "headrace up" in caught.value.hint
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "slug", "kind"),
    [
        (400, "bad-request", BadRequest),
        (400, "bad-name", BadName),
        (401, "unauthorized", Unauthorized),
        (404, "not-found", NotFound),
        (409, "conflict", Conflict),
        (413, "too-large", TooLarge),
        (415, "unsupported-format", BadRequest),
        (422, "key-reused", Conflict),
        (422, "unknown-function", BadRequest),
        (429, "overloaded", Overloaded),
        (503, "unavailable", Unavailable),
        (500, "internal", HeadraceError),
    ],
)
async def test_a_problem_becomes_the_error_it_was_with_its_hint(
    server: StandIn, status: int, slug: str, kind: type[HeadraceError]
) -> None:
    server.answers = [problem(status, slug)]
    async with AsyncClient(server.url, TOKEN, patience_s=0.0) as client:
        with pytest.raises(HeadraceError) as caught:
            await client.trigger("r")
    assert type(caught.value) is kind
    assert (str(caught.value), caught.value.hint) == ("what", "how")


async def test_a_server_that_is_no_headrace_is_told_so(server: StandIn, client: AsyncClient) -> None:
    server.answers = [says(200, {"hello": "world"}), says(404)]
    with pytest.raises(PlatformUnreachable, match="not of Headrace") as caught:
        await client.functions()
    assert "URL" in caught.value.hint
    with pytest.raises(NotFound, match="answered 404"):
        await client.functions()


async def test_the_token_follows_no_redirect(server: StandIn, client: AsyncClient) -> None:
    server.answers = [says(302, Location="http://127.0.0.1:9/elsewhere")]
    with pytest.raises(PlatformUnreachable, match="302"):
        await client.functions()
    assert len(server.asked) == 1


async def test_the_token_goes_to_no_other_server_that_an_upload_is_sent_to(
    server: StandIn, client: AsyncClient
) -> None:
    other = server.url.replace("127.0.0.1", "localhost")
    offer = {"upload_id": "u1", "parts": [{"url": f"{other}/part", "size": 3}], "complete": f"{other}/complete"}
    server.answers = [says(201, offer), says(204), says(200, {"uri": "blob:1"})]
    assert await client.upload(b"abc") == "blob:1"
    begin, part, complete = server.asked
    assert "Authorization" in begin.headers
    assert "Authorization" not in part.headers
    assert (server.bodies[1], part.content_length) == (b"abc", 3)
    assert complete.host == begin.host
    assert complete.path == "/v1/uploads/u1/complete"
    assert "Authorization" in complete.headers


async def test_a_part_of_a_file_is_sent_from_the_start_when_it_is_tried_again(
    server: StandIn, client: AsyncClient, tmp_path: Path
) -> None:
    (tmp_path / "data").write_bytes(bytes(range(10)))
    parts = [{"url": f"{server.url}/1", "size": 6}, {"url": f"{server.url}/2", "size": 4}]
    offer = {"upload_id": "u1", "parts": parts, "complete": "/"}
    server.answers = [says(201, offer), says(204), hangs_up, says(204), says(200, {"uri": "blob:1"})]
    await client.upload(tmp_path / "data", content_type="application/x-frame")
    assert server.bodies[1:4] == [bytes(range(6)), bytes(range(6, 10)), bytes(range(6, 10))]
    with pytest.raises(BadRequest, match="there is no file"):
        await client.upload(tmp_path / "nowhere")


async def test_many_requests_take_turns_without_running_out_of_time(server: StandIn, client: AsyncClient) -> None:
    server.answers = [says(202, REF)]
    runs = await asyncio.gather(*(client.trigger("r", n) for n in range(1000)))
    assert len(runs) == 1000
    assert sorted(map(int, server.bodies)) == list(range(1000))


@pytest.mark.parametrize(
    "options", [{"id": "a\nb"}, {"id": "\u00e9"}, {"content_type": "a/b\r\nX: y"}, {"deadline": "\n"}]
)
async def test_what_cannot_stand_in_a_header_is_refused_before_it_is_sent(
    server: StandIn, client: AsyncClient, options: dict[str, str]
) -> None:
    with pytest.raises(BadRequest, match=next(iter(options))):
        await client.trigger("r", b"x", **options)  # type: ignore[arg-type] # each is one of several options
    assert server.asked == []


# ---------------------------------------------------------------- streams


def tells(*chunks: bytes) -> Answer:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
        return response

    return answer


async def test_a_stream_goes_on_after_the_last_event_when_its_connection_is_lost(
    server: StandIn, client: AsyncClient
) -> None:
    server.answers = [
        tells(b"retry: 1000\nid: 4\n\n", b'id: 7\nevent: run\ndata: {"state": "accepted"}\n\n', b"event: log\nda"),
        hangs_up,
        problem(503, Retry_After="0"),
        tells(b": here\n\n", b'id: 9\nevent: run\ndata: {"state": "succeeded"}\n\n'),
    ]
    run = await _run(server, client)
    seen = [(event.seq, event.kind, event.data["state"]) async for event in run.follow()]
    assert seen == [(7, "run", "accepted"), (9, "run", "succeeded")]
    resumed = [request.headers.get("Last-Event-ID") for request in server.asked]
    assert resumed == [None, "7", "7", "7"]


async def test_a_stream_that_only_told_where_it_stands_resumes_there(server: StandIn, client: AsyncClient) -> None:
    server.answers = [tells(b"id: 41\n\n"), tells(b'id: 42\nevent: run\ndata: {"run_id": "r1"}\n\n')]
    events = client.stream()
    assert (await anext(events)).seq == 42
    await events.aclose()
    assert server.asked[1].headers["Last-Event-ID"] == "41"


async def test_a_stream_that_is_refused_says_why(server: StandIn, client: AsyncClient) -> None:
    server.answers = [problem(404)]
    run = await _run(server, client)
    with pytest.raises(NotFound):
        await anext(run.follow())


async def _run(server: StandIn, client: AsyncClient) -> AsyncRun:
    answers, server.answers = server.answers, [says(202, REF)]
    run = await client.trigger("r")
    server.answers = answers
    server.asked.clear()
    return run


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
async def test_server_sent_events_are_read_however_they_are_cut(size: int) -> None:
    text = (
        b": comment\r\n\r\nid: 1\r\nevent: run\r\ndata: a\r\ndata: b\r\n\r\n"
        b"data:c\r\rid\ndata\n\nid: 2\n\nevent: log\n\nevent: x\ndata:  d \xc3\xa9\n\ndata: half"
    )

    async def chunks() -> AsyncIterator[bytes]:
        for at in range(0, len(text), size):
            yield text[at : at + size]

    assert [message async for message in messages(chunks())] == [
        Message("1", "run", b"a\nb"),
        Message("1", "message", b"c"),
        Message("", "message", b""),
        Message("2", "", b""),
        Message("2", "x", b" d \xc3\xa9"),
    ]


# ---------------------------------------------------------------- where the platform is


def test_the_address_comes_from_arguments_then_the_environment_then_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlatformUnreachable, match="no platform is known here") as caught:
        address.find()
    assert "headrace up" in caught.value.hint
    (tmp_path / ".headrace").mkdir()
    (tmp_path / ".headrace" / "url").write_text("http://127.0.0.1:1\n")
    (tmp_path / ".headrace" / "token").write_text("near\n")
    assert address.find() == address.Address("http://127.0.0.1:1", "near")
    assert address.find("http://127.0.0.1:1/") == address.Address("http://127.0.0.1:1", "near")
    monkeypatch.setenv("HEADRACE_URL", "https://far.example/base/")
    with pytest.raises(Unauthorized, match=r"no token for https://far.example/base") as missing:
        address.find()
    assert "HEADRACE_TOKEN" in missing.value.hint
    monkeypatch.setenv("HEADRACE_TOKEN", "far")
    assert address.find() == address.Address("https://far.example/base", "far")
    assert address.find("http://other:80", "given") == address.Address("http://other:80", "given")


@pytest.mark.parametrize(
    "url", ["localhost:8080", "ftp://x", "http://", "http://x:port", "http://a:b@x", "http://x/?q"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(BadRequest) as caught:
        address.find(url, "token")
    assert caught.value.hint
    assert "a:b" not in str(caught.value)


def test_a_token_shows_in_no_repr_and_may_hold_no_line_break() -> None:
    client = Client("http://127.0.0.1:1", TOKEN)
    assert TOKEN not in repr(client) + repr(address.find("http://127.0.0.1:1", TOKEN))
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.functions()
    with pytest.raises(BadRequest):
        address.find("http://127.0.0.1:1", "to\nken")


# ---------------------------------------------------------------- events


def test_an_event_is_written_in_the_json_form_of_cloudevents() -> None:
    event = Event(id="1", source="/s", type="t", subject="x", data={"a": 1}, extensions={"deadline": "5s"})
    assert to_json(event) == (
        b'{"specversion":"1.0","id":"1","source":"/s","type":"t","subject":"x","deadline":"5s",'
        b'"data":{"a":1},"datacontenttype":"application/json"}'
    )
    assert b'"data_base64":"AAE="' in to_json(Event(id="1", source="/s", type="t", data=b"\0\1"))
    assert b'"data":"text"' in to_json(Event(id="1", source="/s", type="t", datacontenttype="text/plain", data="text"))
    with pytest.raises(BadRequest, match="extension source"):
        to_json(Event(id="1", source="/s", type="t", extensions={"source": "/other"}))


async def test_a_client_may_be_used_from_many_threads_at_once(server: StandIn) -> None:
    server.answers = [says(200, {"functions": []})]
    with Client(server.url, TOKEN) as client:
        found = await asyncio.gather(*(asyncio.to_thread(client.functions) for _ in range(20)))
        await asyncio.to_thread(client.close)
    assert found == [[]] * 20
