"""Sites over HTTP: as they are, when they change, and when nothing is heard of them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from msgspec import structs

from functions.sites import GONE_S, SILENT_S, seen
from gateway.sites import Sites
from headrace.joblog import SiteRecord
from headrace.wire import Expected
from tests.doors import Door, Doors
from tests.doubles import MemoryTables
from tests.test_tenants import add, bearer

NOW = 1_790_000_000.0


class Clock:
    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def row(at: float, name: str = "lab", **found: Any) -> SiteRecord:
    record = SiteRecord(
        name=name,
        kind="slurm",
        at=at,
        since=at,
        nodes_total=4,
        nodes_free=2,
        gpus_total=16,
        gpus_free=5,
        jobs_waiting=7,
        jobs_running=2,
    )
    return seen(structs.replace(record, **found), None)


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    async with Doors(tmp_path) as found:
        yield found


@pytest.fixture
async def door(doors: Doors) -> Door:
    return await doors.open()


async def test_there_are_no_sites_without_agents(door: Door) -> None:
    assert (await door.ask("GET", "/v1/sites"))[1] == {"sites": []}
    assert (await door.ask("GET", "/status/resources"))[1] == []
    assert (await door.ask("GET", "/status/incidents"))[1] == []
    await door.problem(404, "GET", "/v1/sites/perlmutter")
    await door.problem(404, "GET", "/status/resources/perlmutter")
    await door.problem(404, "GET", "/status/incidents/i1")
    await door.problem(400, "GET", "/v1/sites/a.b")


async def test_a_site_is_told_as_its_agent_saw_it(door: Door) -> None:
    record = structs.replace(row(0.0, nodes_unusable=1), wait=Expected(1.5, 9.0, 20.0, 12))
    await door.tables.sites.put("lab", record)
    await door.tables.sites.put("bare", SiteRecord(name="bare", kind="pbs", at=0.0, since=0.0))
    status, found, _ = await door.ask("GET", "/v1/sites/lab")
    assert status == 200
    assert (found["name"], found["kind"], found["status"]) == ("lab", "slurm", "degraded")
    assert found["detail"] == "1 of its 4 nodes cannot be used"
    assert found["gpus"] == {"total": 16, "free": 5}
    assert found["nodes"] == {"total": 4, "free": 2, "unusable": 1}
    assert found["queue"] == {"jobs": 7, "running": 2, "wait_p50_s": 1.5, "wait_p90_s": 9.0}
    assert found["last_seen_at"]
    status, listed, _ = await door.ask("GET", "/v1/sites")
    assert [site["name"] for site in listed["sites"]] == ["bare", "lab"]
    assert listed["sites"][0]["gpus"] == {}


async def test_sites_are_resources_of_the_iri_api(door: Door) -> None:
    await door.tables.sites.put("lab", row(0.0, queue_open=False))
    status, found, _ = await door.ask("GET", "/status/resources/lab")
    assert status == 200
    assert (found["id"], found["current_status"], found["self_uri"]) == ("lab", "down", "/status/resources/lab")
    assert found["resource_type"] == "urn:doe-iri:resource:compute:system"
    assert (await door.ask("GET", "/status/resources"))[1] == [found]
    (incident,) = (await door.ask("GET", "/status/incidents"))[1]
    assert (incident["status"], incident["type"], incident["resolution"]) == ("down", "unplanned", "unresolved")
    assert (incident["end"], incident["resource_uris"]) == (None, ["/status/resources/lab"])
    assert (await door.ask("GET", incident["self_uri"]))[1] == incident


async def test_sites_are_for_all_tenants_and_for_nobody_else(door: Door) -> None:
    await door.tables.sites.put("lab", row(0.0))
    await add(door, "a")
    assert (await door.ask("GET", "/v1/sites/lab", headers=bearer("a")))[0] == 200
    for path in ("/v1/sites", "/v1/sites/lab", "/status/resources", "/status/incidents"):
        await door.problem(401, "GET", path, headers={"Authorization": "Bearer wrong"})


# ---------------------------------------------------------------- silence


def status_of(sites: Sites) -> str:
    from gateway.sites import view_of

    (record,) = sites.records()
    return view_of(record, sites._clock()).status


def tables_with(record: SiteRecord) -> MemoryTables:
    tables = MemoryTables()
    tables.sites.rows[record.name] = record
    return tables


async def test_a_site_of_which_nothing_is_heard_is_unknown_and_then_down() -> None:
    clock, tables = Clock(), tables_with(row(NOW))
    sites = Sites(tables, clock)
    assert status_of(sites) == "up"
    clock.now += SILENT_S
    assert status_of(sites) == "unknown"
    clock.now += GONE_S - SILENT_S
    assert status_of(sites) == "down"
    await tables.sites.put("lab", row(clock.now))
    assert status_of(sites) == "up"


@pytest.mark.parametrize("ahead_s", [-3600.0, 3600.0])
async def test_an_agent_whose_clock_is_wrong_is_heard_all_the_same(ahead_s: float) -> None:
    clock, tables = Clock(), MemoryTables()
    sites = Sites(tables, clock)
    await tables.sites.put("lab", row(NOW + ahead_s))
    assert status_of(sites) == "up"
    clock.now += SILENT_S
    assert status_of(sites) == "unknown"
    await tables.sites.put("lab", row(NOW + ahead_s + SILENT_S))
    assert status_of(sites) == "up"


async def test_what_was_there_before_the_gateway_is_as_old_as_it_says() -> None:
    sites = Sites(tables_with(row(NOW - 3600.0)), Clock())
    assert status_of(sites) == "down"


# ---------------------------------------------------------------- changes


async def read_event(lines: aiohttp.StreamReader) -> tuple[str, Any]:
    name = ""
    while True:
        line = (await lines.readline()).decode().rstrip("\n")
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            return name, json.loads(line.removeprefix("data: "))


async def test_the_stream_tells_how_sites_are_and_when_they_change(door: Door) -> None:
    await door.tables.sites.put("lab", row(NOW))
    async with door.http.get(door.url + "/v1/stream") as answer:
        name, site = await read_event(answer.content)
        assert (name, site["name"], site["gpus"]["free"]) == ("site", "lab", 5)
        await door.tables.sites.put("lab", row(NOW + 5.0))  # the same, a little later: nothing is told
        await door.tables.sites.put("lab", row(NOW + 10.0, gpus_free=1))
        await door.deploy()
        name, site = await read_event(answer.content)
        assert (name, site["gpus"]["free"]) == ("site", 1)
        await door.trigger()
        name, _ = await read_event(answer.content)
        assert name == "run"


async def test_a_silence_is_told_although_no_row_changes() -> None:
    clock, tables = Clock(), tables_with(row(NOW))
    sites = Sites(tables, clock)
    news = sites.news()
    assert [view.status for view in await anext(news)] == ["up"]
    clock.now += SILENT_S
    sites.look()
    assert [view.status for view in await anext(news)] == ["unknown"]
    await news.aclose()


def only(text: str, site: str) -> Callable[[str], float]:
    lines = {line.split(" ")[0]: float(line.split(" ")[1]) for line in text.splitlines() if f'site="{site}"' in line}
    return lambda name: lines[f'headrace_site_{name}{{site="{site}"}}']


async def test_metrics_tell_free_gpus_the_queue_and_the_silence(door: Door) -> None:
    await door.tables.sites.put("lab", row(NOW))
    metric = only((await door.ask("GET", "/metrics"))[1].decode(), "lab")
    assert (metric("up"), metric("gpus"), metric("gpus_free"), metric("jobs_waiting")) == (1.0, 16.0, 5.0, 7.0)
    assert 0.0 <= metric("silent_seconds") < SILENT_S
