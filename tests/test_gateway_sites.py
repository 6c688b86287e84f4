"""Sites over HTTP: as they are, when they change, and when nothing is heard of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from msgspec import structs

from functions.sites import GONE_S, SILENT_S, UNHEARD, Trouble, awaited, seen
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
    record = structs.replace(row(time.time(), nodes_unusable=1), wait=Expected(1.5, 9.0, 20.0, 12))
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


@pytest.mark.parametrize("silent_s", [SILENT_S, GONE_S])
async def test_of_a_site_of_which_nobody_knows_anything_nothing_is_said_to_be_free(door: Door, silent_s: float) -> None:
    """An agent that is silent counts nothing, and neither does one whose batch system is down."""
    record = structs.replace(row(time.time() - silent_s, nodes_unusable=1), wait=Expected(1.5, 9.0, 20.0, 12))
    down = seen(row(time.time(), "down"), None, Trouble("down", "slurmctld does not answer"))
    await door.tables.sites.put("lab", record)
    await door.tables.sites.put("down", down)
    for found in (await door.ask("GET", "/v1/sites"))[1]["sites"]:
        assert found["status"] in ("unknown", "down")
        assert found["gpus"] == {"total": 16}
        assert "free" not in found["nodes"]
        assert (found["queue"]["jobs"], found["queue"]["running"]) == (None, None)
    text = (await door.ask("GET", "/metrics"))[1].decode()
    for name in ("lab", "down"):
        assert f'headrace_site_gpus{{site="{name}"}} 16.0' in text
        assert f'headrace_site_gpus_free{{site="{name}"}}' not in text
        assert f'headrace_site_jobs_waiting{{site="{name}"}}' not in text


async def test_a_site_that_only_jobs_know_is_unknown_and_stays_so(door: Door) -> None:
    await door.tables.sites.put("typo", awaited("typo", NOW - 3600.0))
    found = (await door.ask("GET", "/v1/sites/typo"))[1]
    assert (found["status"], found["kind"], found["detail"]) == ("unknown", "", UNHEARD)
    assert (found["gpus"], found["nodes"], found["last_seen_at"]) == ({}, {}, None)
    assert (await door.ask("GET", "/status/resources/typo"))[1]["description"] == UNHEARD
    assert (await door.ask("GET", "/status/incidents"))[1] == []


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


async def test_what_was_there_before_the_gateway_is_as_old_as_it_is() -> None:
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
    now = time.time()
    await door.tables.sites.put("lab", row(now))
    async with door.http.get(door.url + "/v1/stream") as answer:
        name, site = await read_event(answer.content)
        assert (name, site["name"], site["gpus"]["free"]) == ("site", "lab", 5)
        await door.tables.sites.put("lab", row(now + 5.0))  # the same, a little later: nothing is told
        await door.tables.sites.put("lab", row(now + 10.0, gpus_free=1))
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
    await door.tables.sites.put("lab", row(time.time()))
    metric = only((await door.ask("GET", "/metrics"))[1].decode(), "lab")
    assert (metric("up"), metric("gpus"), metric("gpus_free"), metric("jobs_waiting")) == (1.0, 16.0, 5.0, 7.0)
    assert 0.0 <= metric("silent_seconds") < SILENT_S
