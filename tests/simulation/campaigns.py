"""Runs that submit batch jobs, in the simulation: a site, its batch system and agent, and what has to come of it."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from functions.jobs import read_job
from headrace.joblog import SiteRecord
from streams.log import Log
from tests.simulation import programs
from tests.simulation.actors import Actor, Blobs
from tests.simulation.programs import RETRIES, SITE, Program, Step
from tests.simulation.server import EPOCH
from workers.agent import Agent
from workers.jobhand import HELD_MAX
from workers.jobtools import Tools
from workers.push import Pushed
from workers.sites.base import (
    Capacity,
    JobStatus,
    Known,
    SiteConfig,
    SiteUnreachable,
    Submission,
    SubmitBusy,
    SubmitUnsure,
)
from workers.sites.lazy import LazySite

if TYPE_CHECKING:
    from tests.simulation.check import Facts
    from tests.simulation.world import World

PILOT_JOB_S = 1.0  # so long jobs are counted with at a pilot; some take longer
DRAIN_S = 1.5
NARROW_SHARE = 0.4
LEFT_S = 15.0  # so soon after its run was canceled a job has ended, once there are no faults any more


@dataclass
class Native:
    """One job of the batch system, by its name there; instants in epoch seconds."""

    name: str
    native_id: str
    program: Program
    submitted_at: float
    started_at: float
    ended_at: float
    canceled: bool = False
    killed: bool = False


class SimBatch:
    """A batch system that does what all promise: a job exists once, however often it is submitted under its name."""

    def __init__(self, world: World, rng: random.Random, site: str = SITE) -> None:
        self._world = world
        self._rng = rng
        self.jobs: dict[str, Native] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="headrace-sim-"))
        # In some worlds the site takes few jobs at a time, and its agent has fewer of them in its hand than wait.
        narrow = random.Random(world.seed * 104729 + 11)
        jobs_max = narrow.randrange(1, 4) if narrow.random() < NARROW_SHARE else None
        self.held_max = narrow.randrange(1, 4) if narrow.random() < NARROW_SHARE else HELD_MAX
        self.config = SiteConfig(
            name=site,
            kind="simulated",
            work=str(self.folder),
            settle_s=2.0,
            duration_s=PILOT_JOB_S,
            jobs_max=jobs_max,
        )

    def close(self) -> None:
        """Remove what the agents left on the site's disk."""
        shutil.rmtree(self.folder, ignore_errors=True)

    async def _reach(self) -> None:
        await asyncio.sleep(0.02 * self._rng.random())
        if self._world.server.lost_share and self._rng.random() < 0.1:
            raise SiteUnreachable("the batch system does not answer")

    async def submit(self, job: Submission) -> str:
        await self._reach()
        if self._world.server.lost_share and self._rng.random() < 0.1:
            raise SubmitBusy("it takes no more jobs now")
        known = self.jobs.get(job.job_id)
        if known is None:
            program = programs.read(job.spec.arguments[0].encode())
            now = self._world.server.now
            started_at = now + self._rng.choice((0.0, 0.1, 2.0)) * self._rng.random()
            known = self.jobs[job.job_id] = Native(
                name=job.job_id,
                native_id=str(1000 + len(self.jobs)),
                program=program,
                submitted_at=now,
                started_at=started_at,
                ended_at=started_at + program.work_s,
            )
            self._world.note("native", job.job_id, known.native_id)
        await asyncio.sleep(0.02 * self._rng.random())
        if self._rng.random() < (0.15 if self._world.server.lost_share else 0.0):
            raise SubmitUnsure("it did not say whether it took the job")
        return known.native_id

    async def submit_array(self, array_id: str, jobs: Sequence[Submission]) -> dict[str, str]:
        raise NotImplementedError

    async def find(self, job_id: str, folder: Path, place: int | None = None) -> str | None:
        await self._reach()
        known = self.jobs.get(job_id)
        return None if known is None else known.native_id

    async def status(self, jobs: Sequence[Known]) -> Mapping[str, JobStatus]:
        await self._reach()
        return {job.job_id: self._status(self.jobs[job.job_id]) for job in jobs}

    def _status(self, job: Native) -> JobStatus:
        now = self._world.server.now
        if job.canceled and now >= job.ended_at:
            return JobStatus(native_id=job.native_id, state="canceled", reason="canceled", ended_at=job.ended_at)
        if now < job.started_at:
            return JobStatus(native_id=job.native_id, state="queued")
        if now < job.ended_at:
            return JobStatus(native_id=job.native_id, state="active", started_at=job.started_at)
        program, attempt = job.program, int(job.name.rpartition("-")[2])
        ended = JobStatus(native_id=job.native_id, state="completed", started_at=job.started_at, ended_at=job.ended_at)
        if attempt <= program.failures:
            return msgspec.structs.replace(ended, state="failed", reason="node_failure")
        if program.how == "permanent":
            return msgspec.structs.replace(ended, state="failed", reason="exit_code", exit_code=program.value)
        return msgspec.structs.replace(ended, exit_code=program.value)

    async def cancel(self, jobs: Sequence[Known]) -> None:
        native_ids = {job.native_id for job in jobs}
        await self._reach()
        now = self._world.server.now
        for job in self.jobs.values():
            if job.native_id in native_ids and now < job.ended_at:
                job.canceled, job.ended_at = True, now

    async def capacity(self) -> Capacity | None:
        await self._reach()
        return Capacity(
            at=self._world.server.now,
            nodes_total=8,
            nodes_free=8,
            nodes_unusable=0,
            gpus_total=8,
            gpus_free=8,
            jobs_waiting=0,
            jobs_running=0,
        )

    def end(self) -> None:
        """Lose all nodes, with what runs on them."""
        now = self._world.server.now
        for job in self.jobs.values():
            if now < job.ended_at:
                job.ended_at, job.killed = now, True

    @property
    def quiet(self) -> bool:
        """Whether nothing of it waits or runs."""
        return all(job.ended_at <= self._world.server.now for job in self.jobs.values())


class _NoPush:
    """Jobs here report nothing: the looks of the agent find their ends."""

    def prepare(self, folder: Path, run: str, job: str) -> Pushed:
        return Pushed()


class Sites:
    """The table of sites, as all processes see it at once; ``now`` tells the server's time, at which it stores rows."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._rows: dict[str, SiteRecord] = {}
        self._now = now

    def items(self) -> dict[str, SiteRecord]:
        return self._rows

    def get(self, name: str) -> SiteRecord | None:
        return self._rows.get(name)

    async def fetch(self, name: str) -> SiteRecord | None:
        return self._rows.get(name)

    async def put(self, name: str, row: SiteRecord) -> None:
        self._rows[name] = msgspec.structs.replace(row, at=self._now())

    async def create(self, name: str, row: SiteRecord) -> bool:
        if name in self._rows:
            return False
        await self.put(name, row)
        return True

    async def delete(self, name: str) -> bool:
        return self._rows.pop(name, None) is not None


class AgentActor(Actor):
    """The agent of a site."""

    kind = "agent"
    ends_at: float | None = None

    def __init__(self, world: World, name: str, batch: SimBatch) -> None:
        super().__init__(world, name)
        self.batch = batch

    async def main(self, log: Log) -> None:
        """Work for ever."""
        world = self.world
        assert self.process is not None
        batch = self.batch
        tools = Tools(
            host=self.process.name,
            site=batch.config,
            system=LazySite(batch.config, lambda config: batch, self.clock),
            log=log,
            forecasts=world.tables.forecasts,  # type: ignore[arg-type]
            sites=world.tables.sites,
            blobs=Blobs(world),
            stager=None,  # type: ignore[arg-type] # no job here has inputs or outputs
            push=_NoPush(),  # type: ignore[arg-type]
            ends_at=self.ends_at,
            held_max=batch.held_max,
            clock=self.clock,
        )
        stop = asyncio.Event()
        if self.ends_at is not None:
            left_s = self.ends_at - DRAIN_S - self.clock()
            asyncio.get_running_loop().call_later(max(0.0, left_s), stop.set)
        await Agent(tools).run(stop, drain_s=DRAIN_S)


class PilotActor(AgentActor):
    """The agent of a site in an allocation, which ends when that does, or before, with all that runs on its nodes."""

    def __init__(self, world: World, name: str, batch: SimBatch, rng: random.Random) -> None:
        super().__init__(world, name, batch)
        left_s = 4.0 + 12.0 * rng.random()
        self.ends_at = EPOCH + left_s
        self.gone = False
        world.loop.later(left_s * (rng.random() if rng.random() < 0.5 else 1.0), self._end)

    @property
    def well(self) -> bool:
        """Whether it works, or has ended."""
        return self.gone or super().well

    def start(self) -> None:
        """Start a process, unless one runs, or there is no machine to start it on."""
        if not self.gone:
            super().start()

    def _end(self) -> None:
        self.gone = True
        self.batch.end()
        self.crash(0.0)


# ---------------------------------------------------------------- drawing them


def draw(rng: random.Random) -> Program:
    """Draw the program of one trigger: what submits jobs, perhaps beside other work, perhaps after some."""
    program = Program(value=rng.randrange(1, 1000), steps=[_step(rng)])
    if rng.random() < 0.25:
        program.steps.append(Step(kind="call", programs=[Program(value=rng.randrange(1, 1000))]))
    if rng.random() < 0.15:
        program.steps.append(_step(rng))
    if rng.random() < 0.2:
        program = Program(value=rng.randrange(1, 1000), steps=[Step(kind="call", programs=[program])])
    return program


def _step(rng: random.Random) -> Step:
    care = rng.random() < 0.6
    if rng.random() < 0.6:
        return Step(kind="submit", programs=[_job(rng)], join=care)
    size = rng.randrange(1, 6) if rng.random() < 0.95 else 0
    return Step(kind="submit_many", programs=[_job(rng) for _ in range(size)], join=care)


def _job(rng: random.Random) -> Program:
    job = Program(value=rng.randrange(1, 256), work_s=rng.choice((0.0, 0.3, 3.0)) * rng.random())
    if rng.random() < 0.08:
        job.work_s = 20.0 + 20.0 * rng.random()
    elif rng.random() < 0.25:
        job.failures = rng.randrange(1, RETRIES + 1)
    if rng.random() < 0.12:
        job.how = "permanent"
    return job


# ---------------------------------------------------------------- what is right


def check(world: World, facts: Facts) -> list[str]:
    """Return what is wrong with jobs: each attempt exists once at the site, one of them counts, and none is left."""
    wrong = []
    natives = [(name, native) for batch in world.batches.values() for name, native in batch.jobs.items()]
    names = Counter(name for name, _ in natives)
    wrong += [
        f"doubled: the job {name} was submitted at {several} sites" for name, several in names.items() if several > 1
    ]
    for name, native in natives:
        identity, _, attempt = name.rpartition("-")
        works = facts.works.get(identity)
        if works is None:
            wrong.append(f"ghost: the job {name} was submitted, and is not in the log")
            continue
        if int(attempt) > 1 + len(facts.tries.get(identity, [])):
            wrong.append(f"doubled: the job {name} was submitted, and the attempt before it did not fail")
        run = works[0][1].run_id
        if run in facts.cancels:
            at = max(world.server.log[facts.cancels[run] - 1].at, world.calm_at)
            if not native.canceled and native.ended_at > at + LEFT_S:
                wrong.append(f"left: the job {name} ran on for {native.ended_at - at:.0f} s after its run was canceled")
    for identity, several in facts.jobs.items():
        tries = len(facts.tries.get(identity, []))
        sites = [read_job(job).site for _, job in several]
        stayed = sum(before == after for before, after in pairwise(sites))
        if stayed > tries or len(several) < 1 + tries:
            wrong.append(f"doubled: the job {identity} waited at {sites}, and failed {tries} times")
        for _, done in facts.dones.get(identity, []):
            if done.job is not None and done.job.state == "completed":
                ran = world.batches[done.job.site].jobs.get(f"{identity}-{done.attempts}")
                if ran is None or ran.canceled or ran.killed or ran.native_id != done.job.native_id:
                    wrong.append(f"wrong: the job {identity} completed, and its site knows nothing of it: {done.job}")
    return wrong
