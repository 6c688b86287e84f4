"""The process behind ``tests.agents.AgentProcess``: an agent whose log stands still at one moment."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from headrace.wire import ForecastRow
from infra.rights import agent_user
from streams.blobs import FolderBlobs
from streams.link import open_link
from streams.log import Log, Record
from streams.tables import SiteTable, Table
from workers.agent import Agent
from workers.jobtools import Tools
from workers.push import Push
from workers.sites.base import SiteConfig
from workers.sites.lazy import LazySite
from workers.staging import Stager


class HaltingLog(Log):
    """A log whose appends to one kind of subject stand still."""

    before = ""
    after = ""
    reached = Path()

    async def append(self, unit: list[Record], *, timeout_s: float = 10.0) -> list[int]:
        """Append, or stand still before or after that."""
        if self.before and any(record.subject.startswith(self.before) for record in unit):
            await self._halt()
        seqs = await super().append(unit, timeout_s=timeout_s)
        if self.after and any(record.subject.startswith(self.after) for record in unit):
            await self._halt()
        return seqs

    async def _halt(self) -> None:
        self.reached.touch()
        while not self.reached.with_suffix(".on").exists():
            await asyncio.sleep(0.05)


async def main(told: dict[str, Any]) -> None:
    """Be an agent until killed."""
    password = Path(told["password_file"]).read_text().strip()
    site = msgspec.convert(told["site"], SiteConfig)
    link = await open_link(told["url"], user=agent_user(site.name), password=password, name="agent", site=site.name)
    log = HaltingLog(link)
    log.before, log.after, log.reached = told["before"], told["after"], Path(told["reached"])
    await log.start()
    sites = SiteTable(link)
    forecasts: Table[ForecastRow] = Table(link, "forecasts", ForecastRow)
    await sites.open()
    await forecasts.open()
    blobs = FolderBlobs(Path(told["blobs"]))
    tools = Tools(
        host="process",
        site=site,
        system=LazySite(site),
        log=log,
        forecasts=forecasts,
        sites=sites,
        blobs=blobs,
        stager=Stager(blobs),
        push=Push(""),
        ends_at=told["ends_at"],
    )
    await Agent(tools).run(asyncio.Event())


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
