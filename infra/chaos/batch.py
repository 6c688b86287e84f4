"""F17: jobs in the queue of a real Slurm, while their agent is killed, and Slurm fails in all the ways it has."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from headrace.client import AsyncClient
from headrace.clock import parse_instant
from headrace.errors import HeadraceError
from headrace.joblog import JOB
from headrace.jobs import JobEnd
from headrace.model import RunView
from infra.bench.load import quantile
from infra.chaos import natives, submitted
from infra.chaos.launch import Up
from infra.chaos.lines import Figure, Result
from infra.chaos.natives import Found
from infra.chaos.trial import Case, Trial, nothing_missing
from infra.process import Child
from infra.slurm import site
from infra.slurm.cluster import Cluster, missing
from infra.slurm.layout import Shape
from infra.slurm.sbatch import Fault

JOBS = 200
KILLS = 10
EXITS_SHARE = 0.1
OUTLASTING = 2
UNWANTED = 20
RATE_PER_S = 4.0
JOB_S = 3.0
GAP_S = 4.0  # between two kills of the agent
SETTLE_S = 3.0  # longer than the wrapper's late submission takes
UNSEEN_S = 30.0
PATIENCE_S = 300.0
LOOK_S = 0.2
SHAPE = Shape(nodes=4, gpus=4, cpus=8)
FAULTS: tuple[Fault, ...] = ("before", "after", "late")


def slurm_missing() -> str:
    """Say what is missing here for a platform and a Slurm; nothing if all is there."""
    names = missing()
    return nothing_missing() or (f"not installed: {', '.join(names)} (slurm-wlm, munge)" if names else "")


@asynccontextmanager
async def slurm(folder: Path) -> AsyncIterator[Cluster]:
    """Start a cluster, and stop it with all of its jobs."""
    cluster = Cluster(folder, SHAPE)
    try:
        await asyncio.to_thread(cluster.start, tied=True)
        yield cluster
    finally:
        await asyncio.to_thread(cluster.stop)


class Weather:
    """The faults, in an order and at times that the seed says."""

    def __init__(self, trial: Trial, cluster: Cluster, agent: Child) -> None:
        self.done: Counter[str] = Counter()
        self._trial = trial
        self._cluster = cluster
        self._agent = agent

    async def run(self, kills: int) -> None:
        """Kill the agent so often, and let Slurm fail in between: submissions, the controller, a node."""
        async with asyncio.TaskGroup() as group:
            for number in range(kills):
                await self._wait()
                fault = FAULTS[number % len(FAULTS)]
                self._cluster.fail_sbatch(fault, 2)
                self.done[f"sbatch {fault}"] += 2
                if number == kills // 3:
                    await asyncio.to_thread(self._cluster.restart_controller)
                    self.done["controller restarted"] += 1
                if number == kills // 2:
                    await asyncio.to_thread(self._cluster.kill_node, submitted.MORTAL)
                    self.done["node died"] += 1
                    group.create_task(self._node_returns(submitted.MORTAL))
                await self._wait()
                await self._kill_agent()

    async def _wait(self) -> None:
        await asyncio.sleep(self._trial.rng.uniform(0.5, 1.5) * GAP_S / 2)

    async def _kill_agent(self) -> None:
        while (pid := self._agent.pid) is None:  # it is being started again
            await asyncio.sleep(LOOK_S)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.done["agent killed"] += 1

    async def _node_returns(self, name: str) -> None:
        """Switch a node on again once the controller has taken note that it was dead."""
        while "down" not in (await asyncio.to_thread(self._cluster.node_states)).get(name, ""):
            await asyncio.sleep(LOOK_S)
        await asyncio.to_thread(self._cluster.start_node, name)
        await asyncio.to_thread(self._cluster.resume, name)
        self.done["node came back"] += 1


async def run(trial: Trial) -> Result:
    """Have functions submit jobs, cancel some of their runs, let everything fail, and count in Slurm's own records."""
    jobs, kills = trial.n(JOBS, 12), trial.n(KILLS, 2)
    outlasting, unwanted = (OUTLASTING if trial.scale >= 1 else 0), trial.n(UNWANTED, 2)
    code = submitted.copy(trial.folder, trial.ledger)
    async with slurm(trial.folder / "slurm") as cluster, trial.platform() as up:
        config = site.write_config(cluster, trial.folder, settle_s=SETTLE_S, unseen_s=UNSEEN_S)
        agent = site.agent(config, data=up.data, nats_url=up.servers().nats_url, url=up.url)
        async with agent as child:
            await trial.deploy(up.url, up.token, code)
            weather = Weather(trial, cluster, child)
            trial.say(
                f"{jobs} jobs, of which {EXITS_SHARE:.0%} fail; {outlasting} past their time, {unwanted} canceled"
            )
            extra = {"simulated": {"takes_s": JOB_S}}
            mix = {"simulated": 1.0 - EXITS_SHARE, "exiting": EXITS_SHARE}
            loads = [
                trial.load(up, total=n, rate_per_s=RATE_PER_S, mix=of, extra=extra, deadline="900s", patience_s=60.0)
                for n, of in (
                    (jobs - outlasting, mix),
                    (outlasting, {"outlasting": 1.0}),
                    (unwanted, {"unwanted": 1.0}),
                )
                if n
            ]
            async with asyncio.TaskGroup() as group:
                for load in loads:
                    group.create_task(trial.drive(load))
                group.create_task(weather.run(kills))
                group.create_task(_cancel(trial, up, loads[-1].name, unwanted))
            await trial.read_back(up, patience_s=PATIENCE_S)
            verdict = await trial.check(up, expected={"unwanted": ["canceled"]}, silent=[JOB], patience_s=PATIENCE_S)
            views = await _views(up, trial)
            found = natives.count(
                views, cluster.jobs(), _open(cluster), _lines(trial.ledger, "ran"), _ends(trial.ledger)
            )
            restarts = child.restarts
    for text in found.wrong[: natives.NAMED_MAX]:
        trial.say(text)
    return Result(
        verdict=verdict,
        kills=weather.done["agent killed"],
        figures=_figures(found, weather.done, views, restarts),
        notes=[
            "out of memory is not tried here: tests/test_agent_slurm has a program that takes too much on a real Slurm"
        ],
    )


async def _cancel(trial: Trial, up: Up, load: str, wanted: int) -> None:
    """Cancel every run of a load a moment after it was accepted, some before and some after their job was submitted."""
    canceled: set[str] = set()
    async with AsyncClient(up.url, up.token) as client:
        while len(canceled) < wanted:
            await asyncio.sleep(trial.rng.uniform(LOOK_S, 5 * LOOK_S))
            for reply in trial.replies():
                if reply.id.startswith(f"{load}-") and reply.run and reply.run not in canceled:
                    with contextlib.suppress(HeadraceError):
                        await client.cancel(reply.run)
                        canceled.add(reply.run)


async def _views(up: Up, trial: Trial) -> list[RunView]:
    """Return every run that was accepted, as the platform shows it."""
    async with AsyncClient(up.url, up.token) as client:
        return [await (await client.run(run)).view() for run in sorted({r.run for r in trial.replies() if r.run})]


def _open(cluster: Cluster) -> list[str]:
    """Return the native ids of the jobs that wait or run in Slurm."""
    return cluster.run("squeue", "-h", "-r", "-t", "pending,running,suspended,configuring", "-o", "%A").split()


def _lines(ledger: Path, ending: str) -> list[str]:
    path = Path(f"{ledger}.{ending}")
    return path.read_text().split() if path.exists() else []


def _ends(ledger: Path) -> dict[str, list[JobEnd]]:
    """Return what the follow-ups of each job were given."""
    found: dict[str, list[JobEnd]] = {}
    for path in Path(f"{ledger}.ends").glob("*"):
        end = msgspec.json.decode(path.read_bytes(), type=JobEnd)
        found.setdefault(end.job_id, []).append(end)
    return found


def _follow_s(views: Sequence[RunView]) -> list[float]:
    """Return how long it took from the end of each job to the start of what followed it, in seconds."""
    took = []
    for view in views:
        ended = {job.job_id: job.ended_at for job in view.jobs}
        for each in view.invocations:
            at = ended.get(each.parent_id or "")
            if at and each.started_at:
                took.append(parse_instant(each.started_at, "started_at") - parse_instant(at, "ended_at"))
    return took


def _figures(found: Found, done: Counter[str], views: Sequence[RunView], restarts: int) -> list[Figure]:
    took = _follow_s(views)
    of = f"{found.jobs} jobs"
    return [
        Figure(name="faults", value=", ".join(f"{name} {n}" for name, n in sorted(done.items()))),
        Figure(name="agent started again", value=str(restarts)),
        Figure(
            name="jobs once in Slurm's own records",
            value=f"{found.once} of {of}; never {found.never}, twice {found.twice}, of nobody {found.strangers}",
            bar="all, 0, 0, 0",
            good=found.once == found.jobs and not found.never + found.twice + found.strangers,
        ),
        Figure(name="programs that ran twice", value=str(found.programs_twice), bar="0", good=not found.programs_twice),
        Figure(
            name="jobs followed once",
            value=f"{found.followed_once} of {of}",
            bar="all",
            good=found.followed_once == found.jobs,
        ),
        Figure(
            name="what the follow-ups were told",
            value=", ".join(f"{why} {n}" for why, n in sorted(found.reasons.items())) + f"; untrue {found.untrue}",
            bar="untrue 0",
            good=not found.untrue,
        ),
        Figure(
            name="jobs of canceled runs, and of those left in Slurm",
            value=f"{found.canceled}, {found.open}",
            bar="none left",
            good=not found.open,
        ),
        Figure(
            name="end of a job to its follow-up running, p50 and p99",
            value=f"{quantile(took, 0.5):.2f} s, {quantile(took, 0.99):.2f} s" if took else "-",
        ),
    ]


CASE = Case(name="F17", title="jobs in a Slurm that fails, and an agent that is killed", run=run, probe=slurm_missing)
