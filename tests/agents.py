"""Agents for tests: in this process, and as processes of their own that stand still at a chosen moment."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from functions.jobs import payload_of
from headrace.joblog import JOB, JobWork
from headrace.jobs import JobEnd, JobSpec
from headrace.wire import ForecastRow, Invocation, Outcome, Payload, Slot, decode, encode
from infra import siteusers
from infra.embedded import NatsServer
from streams.blobs import FolderBlobs
from streams.log import Log, Record
from streams.stored import Stored
from streams.tables import SiteTable, Table
from streams.topology import DEFAULT_TENANT, cancel_subject, done_subject, job_subject
from workers.agent import Agent
from workers.jobtools import Tools
from workers.push import Push
from workers.sites import open_site
from workers.sites.base import BatchSystem, SiteConfig
from workers.sites.lazy import LazySite
from workers.staging import Stager

WAIT_S = 90.0
T = TypeVar("T")

_numbers = itertools.count(1)


class Lab:
    """A log, a site, and whoever sends jobs to it."""

    def __init__(self, log: Log, site: SiteConfig, folder: Path, ends_at: float | None = None) -> None:
        self.log = log
        self.ends_at = ends_at
        self.site = site
        self.blobs = FolderBlobs(folder / "blobs")

    @asynccontextmanager
    async def agent(
        self,
        host: str = "here",
        opened: Callable[[SiteConfig], BatchSystem] = open_site,
        site: SiteConfig | None = None,
    ) -> AsyncIterator[Agent]:
        """Lend an agent of this process, at work; it is stopped as by SIGTERM.

        ``opened`` makes its batch system; ``site`` is another one than that of the lab.
        """
        site = site or self.site
        sites = SiteTable(self.log.link)
        forecasts: Table[ForecastRow] = Table(self.log.link, "forecasts", ForecastRow)
        await sites.open()
        await forecasts.open()
        agent = Agent(
            Tools(
                host=host,
                site=site,
                system=LazySite(site, opened),
                log=self.log,
                forecasts=forecasts,
                sites=sites,
                blobs=self.blobs,
                stager=Stager(self.blobs),
                push=Push(""),
                ends_at=self.ends_at,
            )
        )
        stop, ready = asyncio.Event(), asyncio.Event()
        running = asyncio.create_task(agent.run(stop, 5.0, ready.set))
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        try:
            yield agent
        finally:
            stop.set()
            await running
            await sites.close()
            await forecasts.close()

    def job(
        self,
        spec: JobSpec,
        *,
        then: str | None = None,
        on_failure: str | None = None,
        run: str = "",
        slot: Slot | None = None,
        deadline: float | None = None,
        on_late: str = "continue",
        tenant: str = "default",
    ) -> Invocation:
        """Return a job that was asked for a moment ago; each has another id, for a cluster remembers them all."""
        body = msgspec.json.encode(spec)
        work = JobWork(
            site=self.site.name,
            spec=Payload(body=body, size=len(body)),
            then=then,
            then_version="v1" if then else "",
            on_failure=on_failure,
            on_failure_version="v1" if on_failure else "",
        )
        now, identity = time.time(), f"j{next(_numbers)}t{time.time_ns()}"
        return Invocation(
            run_id=run or f"r{identity}",
            invocation_id=identity,
            function=JOB,
            version="",
            route="route",
            tenant=tenant,
            payload=payload_of(work),
            accepted_at=now,
            sent_at=now,
            parent_id="parent",
            slot=slot,
            deadline=deadline,
            on_late=on_late,
        )

    async def send(self, *jobs: Invocation) -> None:
        """Let jobs wait for the site."""
        unit = [
            Record(job_subject(self.site.name, job.tenant, job.run_id, job.invocation_id), encode(job)) for job in jobs
        ]
        for start in range(0, len(unit), 500):
            await self.log.append(unit[start : start + 500])

    async def cancel(self, run: str) -> None:
        """Say that nobody needs a run."""
        await self.log.append([Record(cancel_subject(run), b"\x82\xa6run_id\xa1x\xa2at\x00")])

    async def outcome(self, job: Invocation) -> Outcome:
        """Return the outcome of a job once it is there."""

        async def look() -> Outcome | None:
            stored = await self.log.last(done_subject(job.run_id, job.invocation_id))
            return None if stored is None else decode(stored.body, Outcome)

        return await there(look)

    async def end(self, job: Invocation) -> JobEnd:
        """Return what the function after a job is given, once it is there."""
        outcome = await self.outcome(job)
        assert outcome.result is not None, outcome.error
        return msgspec.json.decode(outcome.result.body, type=JobEnd)

    async def all(self, subject: str) -> list[Stored]:
        """Return the newest message of each subject that matches."""
        return await self.log.last_of_each([subject])

    async def count(self, subject: str) -> int:
        """Return how many messages match."""
        return await self.log.count(subject)


async def there(look: Callable[[], Awaitable[T | None]], seconds: float = WAIT_S) -> T:
    """Return what a look finds, as soon as it finds something."""
    give_up_at = time.monotonic() + seconds
    while (found := await look()) is None:
        assert time.monotonic() < give_up_at, "it is not there"
        await asyncio.sleep(0.05)
    return found


async def until(holds: Callable[[], bool], seconds: float = WAIT_S) -> None:
    """Return once something holds."""

    async def look() -> bool | None:
        return holds() or None

    await there(look, seconds)


class AgentProcess:
    """An agent in a process of its own.

    It stands still before, or after, it appends to a subject, if it is told to, and until ``go_on``.
    """

    def __init__(self, lab: Lab, server: NatsServer, folder: Path, *, before: str = "", after: str = "") -> None:
        """Start it.

        Args:
            lab: the site and its log.
            server: the server of the log.
            folder: for what it needs.
            before: stand still where a record on a subject that begins so is about to be appended.
            after: stand still where such a record has been appended.
        """
        self._reached = folder / f"reached-{next(_numbers)}"
        password_file = siteusers.kept(server.data, lab.site.name, moves=lab.ends_at is not None)
        self._served = asyncio.ensure_future(server.serve_sites(siteusers.known(server.data), {DEFAULT_TENANT}))
        told = {
            "url": server.url,
            "password_file": str(password_file),
            "site": msgspec.to_builtins(lab.site),
            "blobs": str(lab.blobs.root),
            "ends_at": lab.ends_at,
            "before": before,
            "after": after,
            "reached": str(self._reached),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.agent_process", json.dumps(told)],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )

    async def stands_still(self) -> None:
        """Return once it stands still where it was told to."""
        await until(lambda: self._reached.exists() or self.process.poll() is not None)
        assert self.process.poll() is None

    def pause(self) -> None:
        """Let nothing of it run any more, until ``go_on``."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it go on with what it stands still before, and stand still no more."""
        self._reached.with_suffix(".on").touch()
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def by_name(listed: dict[str, str], jobs: Sequence[Invocation]) -> dict[str, int]:
    """Return how often each job is in a list of native ids and names, at its first attempt."""
    names = list(listed.values())
    return {job.invocation_id: names.count(f"hr-{job.invocation_id}-1") for job in jobs}
