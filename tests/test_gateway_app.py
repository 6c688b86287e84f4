"""What holds for every endpoint: the token, the form of errors, overload, health, and the document that lists them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from yarl import URL

from gateway import page, server
from gateway.app import DRAINING
from gateway.problems import MEANINGS, KeyReused, meaning_of
from gateway.table import ENDPOINTS
from headrace import errors
from tests.doors import CODE, TOKEN, Door, Doors

# ---------------------------------------------------------------- overload and trouble


async def test_too_many_at_once_are_refused_before_their_bodies_are_read(doors: Doors) -> None:
    door = await doors.open(in_flight_max=1)
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


async def test_a_nearly_full_disk_refuses_what_would_fill_it(doors: Doors) -> None:
    door = await doors.open(disk_bytes_min=2**62)
    status, said, _ = await door.ask("GET", "/readyz")
    assert (status, said["ready"], said["disk_free"]) == (503, False, False)
    assert (await door.problem(503, "PUT", "/v1/functions/f", json={"code": CODE})).type.endswith(":unavailable")
    assert (await door.problem(503, "POST", "/v1/events", data=b"")).hint
    await door.problem(503, "POST", "/v1/uploads", json={"size": 10})


async def test_an_error_that_nobody_foresaw_is_told_without_its_inside(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
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
    assert said.startswith((b"HTTP/1.0 400", b"HTTP/1.1 400"))
    assert b"application/problem+json" in said
    assert b"aiohttp" not in said
    assert b"Python" not in said


async def test_half_a_head_of_a_request_does_not_hold_a_connection(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEADERS_S_MAX", 0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(door.url.rsplit(":", 1)[1]))
    writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b" 200 " in await reader.readline()
    writer.write(b"GET /livez HTTP/1.1\r\nHos")
    async with asyncio.timeout(10):
        while await reader.read(1000):
            pass
    writer.close()


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


# ---------------------------------------------------------------- errors


def test_every_error_has_a_meaning_of_its_own_or_of_the_class_above() -> None:
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.HeadraceError):
            status, slug = meaning_of(kind("x"))
            assert 400 <= status < 600
            assert re.fullmatch("[a-z-]+", slug)
    assert meaning_of(errors.RunCanceled("x")).status == 410
    assert meaning_of(KeyReused("x")).status == 422
    assert len({m.slug for m in MEANINGS.values()}) == len(MEANINGS)


# ---------------------------------------------------------------- health


async def test_readiness_follows_the_log_and_the_wish_to_stop(door: Door) -> None:
    assert (await door.ask("GET", "/readyz"))[0] == 200
    door.log.link.connected = False
    assert (await door.ask("GET", "/readyz"))[0] == 503
    door.log.link.connected = True
    door.runner.app[DRAINING].begin()
    status, said, _ = await door.ask("GET", "/readyz")
    assert (status, said["draining"]) == (503, True)
    assert (await door.ask("GET", "/livez"))[0] == 200
    await door.trigger(json={})  # what comes all the same is served


async def test_metrics_count_what_happened_in_both_formats(door: Door) -> None:
    await door.trigger(headers={"Idempotency-Key": "k"})
    await door.trigger(headers={"Idempotency-Key": "k"})
    await door.ask("POST", "/v1/triggers/r", data=b"other", headers={"Idempotency-Key": "k"})
    _, raw, answer = await door.ask(
        "GET", "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
    )
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    parsed = text_string_to_metric_families(raw.decode())  # type: ignore[no-untyped-call]
    families = {f.name: f for f in parsed}
    triggers = {s.labels["result"]: s.value for s in families["headrace_triggers"].samples if s.name.endswith("_total")}
    assert triggers == {"accepted": 1.0, "duplicate": 1.0, "refused": 1.0}
    assert any(s.value == 2 for s in families["headrace_accept_seconds"].samples if s.name.endswith("_count"))
    assert "process_resident_memory_bytes" in families
    _, raw, answer = await door.ask("GET", "/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert b"headrace_triggers_total" in raw


# ---------------------------------------------------------------- the document


async def test_the_document_is_valid_openapi_and_lists_what_is_served(door: Door) -> None:
    _, document, _ = await door.ask("GET", "/openapi.json")
    OpenAPIV31SpecValidator(document).validate()
    documented = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    served = {
        (route.method, route.resource.canonical)
        for route in door.runner.app.router.routes()
        if route.method != "HEAD" and route.resource is not None
    }
    assert documented == served
    assert document["info"]["version"] == "1.2.3"


# What lies under /v1 and asks for no token has another proof: a signature, or the secret of a job.
OPENED = {"put_part", "report_job"}


async def test_only_what_the_table_opens_is_documented_as_open(door: Door) -> None:
    _, document, _ = await door.ask("GET", "/openapi.json")
    for endpoint in ENDPOINTS:
        operation = document["paths"][endpoint.path][endpoint.method.lower()]
        assert ("security" in operation) == endpoint.open
        assert endpoint.open is False or not endpoint.path.startswith("/v1") or endpoint.name in OPENED


# ---------------------------------------------------------------- the page


async def test_the_page_may_load_nothing_from_elsewhere(door: Door) -> None:
    for path in ("/", *(f"/page/{name}" for name in page.load())):
        status, _, answer = await door.ask("GET", path)
        assert status == 200
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["frame-ancestors"] == "'none'"
        assert "unsafe" not in str(policy)
        assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert (await door.ask("GET", "/"))[2].headers["Content-Type"] == "text/html; charset=utf-8"


async def test_a_file_that_has_not_changed_is_not_sent_again(door: Door) -> None:
    _, _, answer = await door.ask("GET", "/page/app.js")
    status, said, _ = await door.ask("GET", "/page/app.js", headers={"If-None-Match": answer.headers["ETag"]})
    assert (status, said) == (304, b"")


@pytest.mark.parametrize("name", ["nope.js", "..%2f..%2fapp.py", "%2e%2e/app.py", "..%5capp.py", "app.py", "%00"])
async def test_no_path_leads_out_of_the_page(door: Door, name: str) -> None:
    async with door.http.get(URL(f"{door.url}/page/{name}", encoded=True)) as answer:
        assert answer.status == 404
