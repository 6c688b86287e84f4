"""The tables on a real server: who reads a site's row, by whose clock that is, and who was first to write one."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest

from functions.sites import SILENT_S, awaited, status
from headrace.joblog import SiteRecord
from streams.link import Link
from streams.tables import SiteTable
from tests.agents import there, until


@pytest.fixture
async def sites(link: Link) -> AsyncIterator[SiteTable]:
    table = SiteTable(link)
    await table.open()
    yield table
    await table.close()


def row(at: float, name: str = "lab") -> SiteRecord:
    return SiteRecord(name=name, kind="slurm", at=at, since=at)


@pytest.mark.parametrize("ahead_s", [-3600.0, 3600.0])
async def test_a_site_is_heard_when_the_server_stored_its_row_whatever_time_its_agent_has(
    link: Link, sites: SiteTable, ahead_s: float
) -> None:
    before = time.time()
    await sites.put("lab", row(before + ahead_s))
    reader = SiteTable(link)
    await reader.open()
    try:
        fetched = await there(lambda: reader.fetch("lab"))
        watched = reader.items()["lab"]
        await until(lambda: abs(sites.items()["lab"].at - watched.at) < 0.001)  # who wrote it hears it as well
    finally:
        await reader.close()
    for found in (fetched, watched):
        assert before - 1.0 < found.at < time.time() + 1.0
        assert status(found, found.at + SILENT_S - 1.0)[0] == "up"
        assert status(found, found.at + SILENT_S)[0] == "unknown"


async def test_a_row_is_created_where_there_is_none(sites: SiteTable) -> None:
    assert await sites.create("lab", awaited("lab", time.time()))
    assert not await sites.create("lab", awaited("lab", time.time()))
    await sites.put("lab", row(time.time()))
    assert not await sites.create("lab", awaited("lab", time.time()))
    assert (await there(lambda: sites.fetch("lab"))).kind == "slurm"
    assert await sites.delete("lab")
    assert await sites.fetch("lab") is None
    assert await sites.create("lab", awaited("lab", time.time()))  # what was removed is none
    assert (await there(lambda: sites.fetch("lab"))).kind == ""
