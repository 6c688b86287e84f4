"""Several who share one platform: what belongs to one is not there for the others, at any endpoint."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import pytest

from gateway.problems import Busy
from gateway.shares import Shares
from gateway.table import ENDPOINTS
from headrace.errors import Overloaded
from headrace.model import RunRef
from headrace.names import run_id
from headrace.wire import RunEnd, Started, TenantRecord, encode
from streams.topology import start_subject
from tests.doors import CODE, Door, Doors

ROUTE = {"function": "f", "filter": {"type": "org.shared"}}
EVENT = {"specversion": "1.0", "id": "e-1", "source": "/s", "type": "org.shared", "data": 1}


class Things(NamedTuple):
    """What the tenant ``a`` has: an open run, one that failed, its dead invocation, and an upload."""

    run: str
    failed: str
    dead: str
    upload: str
    part: str


class Case(NamedTuple):
    """What ``b`` asks of an endpoint about what ``a`` has, and how it is told that there is nothing.

    ``status`` 404 says so; else ``empty`` looks at the answer.
    """

    path: Callable[[Things], str]
    status: int
    empty: Callable[[Any], bool] = lambda said: True
    body: Mapping[str, Any] = MappingProxyType({})
    headers: Mapping[str, str] = MappingProxyType({})


def fixed(path: str, status: int, **more: Any) -> Case:
    return Case(lambda _: path, status, **more)


def no(name: str) -> Callable[[Any], bool]:
    return lambda said: said[name] == []


CASES: dict[str, Case] = {
    "send_events": fixed(
        "/v1/events",
        202,
        empty=no("runs"),
        body=EVENT | {"id": "e-2"},
        headers={"Content-Type": "application/cloudevents+json"},
    ),
    "trigger": fixed("/v1/triggers/r", 404),
    "begin_upload": fixed("/v1/uploads", 201, body={"size": 1}),
    "complete_upload": Case(lambda a: f"/v1/uploads/{a.upload}/complete", 404),
    "list_runs": fixed("/v1/runs", 200, empty=no("runs")),
    "get_run": Case(lambda a: f"/v1/runs/{a.run}", 404),
    "get_result": Case(lambda a: f"/v1/runs/{a.failed}/result", 404),
    "follow_run": Case(lambda a: f"/v1/runs/{a.run}/events", 404),
    "cancel_run": Case(lambda a: f"/v1/runs/{a.run}/cancel", 404),
    "list_dead": fixed("/v1/dead", 200, empty=no("dead")),
    "replay": Case(lambda a: f"/v1/dead/{a.dead}/replay", 404),
    "get_history": fixed("/v1/history?since=2000-01-01T00:00:00Z", 200, empty=no("invocations")),
    "get_audit": fixed("/v1/audit", 403),
    "list_functions": fixed("/v1/functions", 200, empty=no("functions")),
    "get_function": fixed("/v1/functions/f", 404),
    "list_routes": fixed("/v1/routes", 200, empty=no("routes")),
    "get_route": fixed("/v1/routes/r", 404),
    "put_route": fixed("/v1/routes/mine", 404, body=ROUTE),
    "delete_route": fixed("/v1/routes/r", 404),
    "quote": fixed("/v1/quote?route=r", 404),
    "list_sites": fixed("/v1/sites", 200, empty=no("sites")),
    "get_site": fixed("/v1/sites/s", 404),
    "list_resources": fixed("/status/resources", 200),
    "get_resource": fixed("/status/resources/s", 404),
    "list_incidents": fixed("/status/incidents", 200),
    "get_incident": fixed("/status/incidents/i", 404),
}
# Not found by anybody: there are no sites here, and those that are there belong to all.
ALIKE = {"get_site", "get_resource", "get_incident"}
# Those that need a token and have a test of their own below.
ALONE = {"put_function", "follow_all"}


def token_of(tenant: str) -> str:
    return f"token-of-{tenant}"


def bearer(tenant: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token_of(tenant)}"}


async def add(door: Door, *tenants: str) -> None:
    for name in tenants:
        found = hashlib.sha256(token_of(name).encode()).hexdigest()
        await door.tables.tenants.put(name, TenantRecord(name=name, digests=[found], added_at=1.0))


@pytest.fixture
async def door(doors: Doors) -> Door:
    opened = await doors.open()
    await add(opened, "a", "b")
    return opened


async def register(door: Door, tenant: str, source: str | None = None) -> None:
    code = CODE if source is None else {**CODE, "files": {"user.py": source}}
    status, said, _ = await door.ask("PUT", "/v1/functions/f", json={"code": code}, headers=bearer(tenant))
    assert status in (200, 201), said
    status, said, _ = await door.ask("PUT", "/v1/routes/r", json=ROUTE, headers=bearer(tenant))
    assert status in (200, 201), said


async def trigger(door: Door, tenant: str, key: str) -> RunRef:
    headers = bearer(tenant) | {"Idempotency-Key": key}
    status, said, _ = await door.ask("POST", "/v1/triggers/r", json=1, headers=headers)
    assert status == 202, said
    return msgspec.convert(said, RunRef)


async def things(door: Door) -> Things:
    await register(door, "a")
    running, failed = await trigger(door, "a", "1"), await trigger(door, "a", "2")
    door.finish(failed.run_id, state="dead", end=RunEnd(run_id=failed.run_id, state="failed"))
    dead = next(i.invocation_id for i in door.firsts() if i.run_id == failed.run_id)
    status, upload, _ = await door.ask("POST", "/v1/uploads", json={"size": 1}, headers=bearer("a"))
    assert status == 201
    return Things(running.run_id, failed.run_id, dead, upload["upload_id"], upload["parts"][0]["url"])


def test_every_endpoint_that_asks_for_a_token_is_tried() -> None:
    assert {e.name for e in ENDPOINTS if not e.open} == {*CASES, *ALONE}


@pytest.mark.parametrize("name", CASES)
async def test_what_belongs_to_one_is_not_there_for_another(door: Door, name: str) -> None:
    a, case = await things(door), CASES[name]
    endpoint = next(e for e in ENDPOINTS if e.name == name)
    options: dict[str, Any] = {"json": dict(case.body)} if endpoint.method in ("POST", "PUT") else {}
    options["headers"] = bearer("b") | dict(case.headers)
    status, said, _ = await door.ask(endpoint.method, case.path(a), **options)
    assert status == case.status, said
    assert case.empty(said)
    asked = case.path(a)  # what was asked for may be repeated, and nothing else is told
    assert not [secret for secret in a if secret in str(said) and secret not in asked]


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.status == 404 and n not in ALIKE])
async def test_it_is_there_for_its_owner(door: Door, name: str) -> None:
    """Without this, a wrong path would be a good answer above."""
    a, case = await things(door), CASES[name]
    endpoint = next(e for e in ENDPOINTS if e.name == name)
    options: dict[str, Any] = {"json": dict(case.body)} if endpoint.method in ("POST", "PUT") else {}
    async with door.http.request(
        endpoint.method, door.url + case.path(a), headers=bearer("a") | dict(case.headers), **options
    ) as answer:
        assert answer.status != 404


async def test_a_list_shows_what_is_ones_own(door: Door) -> None:
    a = await things(door)
    status, said, _ = await door.ask("GET", "/v1/runs", headers=bearer("a"))
    assert (status, {run["run_id"] for run in said["runs"]}) == (200, {a.run, a.failed})
    status, said, _ = await door.ask("GET", "/v1/runs")  # with the platform's own token: the default tenant's
    assert (status, said["runs"]) == (200, [])


async def test_two_may_have_functions_and_routes_of_one_name(door: Door) -> None:
    await register(door, "a", "def f(x):\n    return 'a'\n")
    await register(door, "b", "def f(x):\n    return 'b'\n")
    for tenant in ("a", "b"):
        status, said, _ = await door.ask("GET", "/v1/functions/f", headers=bearer(tenant))
        assert (status, f"return '{tenant}'" in said["source"]) == (200, True)
    status, _, _ = await door.ask("DELETE", "/v1/routes/r", headers=bearer("b"))
    assert status == 204
    assert (await trigger(door, "a", "1")).route == "r"
    versions = {first.tenant: first.version for first in door.firsts()}
    assert versions == {"a": door.tables.functions.rows["a.f"].version}


async def test_one_event_starts_the_run_of_its_sender_only(door: Door) -> None:
    await register(door, "a")
    await register(door, "b")
    headers = {"Content-Type": "application/cloudevents+json"}
    _, said, _ = await door.ask("POST", "/v1/events", json=EVENT, headers=bearer("b") | headers)
    assert [run["run_id"] for run in said["runs"]] == [run_id("b", "/s", "e-1", "r")]
    assert [first.tenant for first in door.firsts()] == ["b"]


async def test_the_stream_of_one_tells_nothing_of_another(door: Door) -> None:
    await register(door, "a")
    await register(door, "b")
    async with door.http.get(door.url + "/v1/stream", headers=bearer("b")) as stream:
        await stream.content.readuntil(b"\n\n")
        a, b = await trigger(door, "a", "1"), await trigger(door, "b", "1")
        for ref in (a, b):
            first = next(i for i in door.firsts() if i.run_id == ref.run_id)
            began = Started(
                run_id=ref.run_id,
                invocation_id=first.invocation_id,
                function="f",
                version=first.version,
                worker="w",
                attempt=1,
                queued_at=1.0,
                started_at=2.0,
            )
            door.log.put(start_subject(ref.run_id, first.invocation_id, 1), encode(began))
            door.finish(ref.run_id)
        told = b""
        async with asyncio.timeout(10):
            while b'"succeeded"' not in told:
                told += await stream.content.readuntil(b"\n\n")
    assert b.run_id.encode() in told
    assert a.run_id.encode() not in told


async def test_a_token_that_is_taken_back_is_good_no_longer(door: Door) -> None:
    await register(door, "a")
    async with door.http.get(door.url + "/v1/stream", headers=bearer("a")) as stream:
        await stream.content.readuntil(b"\n\n")
        await door.tables.tenants.delete("a")
        async with asyncio.timeout(10):
            assert await stream.content.read() == b""  # the stream that was open ends too
    await door.problem(401, "GET", "/v1/runs", headers=bearer("a"))
    status, _, _ = await door.ask("GET", "/v1/runs", headers=bearer("b"))
    assert status == 200


async def test_a_row_cannot_take_the_name_or_the_token_of_the_default_tenant(door: Door) -> None:
    found = hashlib.sha256(token_of("x").encode()).hexdigest()
    own = hashlib.sha256(door.http.headers["Authorization"].split()[1].encode()).hexdigest()
    await door.tables.tenants.put("default", TenantRecord(name="default", digests=[found], added_at=1.0))
    await door.problem(401, "GET", "/v1/runs", headers=bearer("x"))
    await door.tables.tenants.put("x", TenantRecord(name="x", digests=[own], added_at=1.0))
    await door.problem(503, "GET", "/v1/audit")  # allowed, though there was none yet: it is still the operator's


# ---------------------------------------------------------------- the places at the door


def test_two_who_want_all_get_a_third_each_and_the_next_one_finds_room() -> None:
    shares = Shares(300, lambda: True, lambda: Busy("full"))
    for _ in range(300):
        for tenant in ("a", "b"):
            with suppress(Overloaded):
                shares.take(tenant)
    assert shares.taken == 200
    shares.take("c", 50)
    for refused in ("a", "b", "c"):
        with pytest.raises(Overloaded) as told:
            shares.take(refused)
        assert not isinstance(told.value, Busy)
    shares.give_back("a", 100)
    shares.take("b")
    with pytest.raises(Busy):
        shares.take("a", 300)


def test_one_who_is_alone_gets_all() -> None:
    shares = Shares(3, lambda: False, lambda: Busy("full"))
    shares.take("a", 3)
    with pytest.raises(Busy):
        shares.take("a")


async def test_one_tenants_streams_leave_room_for_those_of_another(tmp_path: Path) -> None:
    async with Doors(tmp_path) as doors, AsyncExitStack() as opened:
        door = await doors.open(streams_max=4)
        await add(door, "a", "b")

        async def stream(tenant: str) -> int:
            answer = await opened.enter_async_context(door.http.get(door.url + "/v1/stream", headers=bearer(tenant)))
            return answer.status

        assert [await stream("a") for _ in range(3)] == [200, 200, 429]
        assert [await stream("b") for _ in range(2)] == [200, 429]
        assert [await stream("b") for _ in range(1)] == [429]
