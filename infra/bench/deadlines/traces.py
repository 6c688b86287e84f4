"""Arrivals and durations as they were measured elsewhere, with deadlines as people set them: by what is usual."""

from __future__ import annotations

import csv
import random
from collections import defaultdict, deque
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from functions.forecast import Kind, size_class
from functions.order import Work
from functions.simulate import Piece
from headrace.model import OnLate
from infra.bench.deadlines.dags import Dag

DATA = Path(__file__).parent / "data"
PROMPT_S, TOKEN_S = 0.0002, 0.03  # seconds per token read and per token written, as of a 70-billion model on one node
GAP_S_MAX = 6 * 3600.0  # of the alerts: the longest silence that is kept
FANOUT = 8  # pieces of work that one alert starts
STRETCHES = (4.0, 8.0, 16.0, 32.0, 64.0)  # a deadline is so many times the usual duration of its kind
VALUES = (1.0, 2.0, 5.0, 10.0)
TENANTS = ("amber", "birch", "cedar", "delta")
SEED = 4


class Job(Struct, frozen=True):
    """One piece of work: when it came, how long it takes once it runs (no order is told), and when it is due."""

    arrived: float
    seconds: float
    kind: Kind
    tenant: str
    deadline: float = 0.0
    value: float = 1.0


class Trace(Struct, frozen=True):
    """Jobs by arrival; instants in seconds from the start of the trace."""

    name: str
    says: str
    jobs: list[Job]


def _rows(name: str) -> list[dict[str, str]]:
    with (DATA / name).open(newline="") as file:
        return list(csv.DictReader(file))


def inference() -> Trace:
    """Return an hour of inference: bursty arrivals, the size of the prompt known, that of the answer not."""
    jobs = []
    for place, row in enumerate(_rows("azure_inference.csv")):
        prompt, answer = int(row["context_tokens"]), int(row["generated_tokens"])
        kind = Kind("complete", "1", "", size_class(prompt))
        seconds = PROMPT_S * prompt + TOKEN_S * answer
        jobs.append(Job(int(row["at_ms"]) / 1000.0, seconds, kind, TENANTS[place % len(TENANTS)]))
    return Trace("inference", "Azure LLM inference 2023, code service: arrivals, durations from its token counts", jobs)


def pods() -> Trace:
    """Return GPU jobs of a shared cluster; what it was given is all that is known of a job."""
    jobs = []
    for place, row in enumerate(_rows("alibaba_pods.csv")):
        function = f"pod-{row['cpu_milli']}-{row['memory_mib']}"
        kind = Kind(function, "1", row["num_gpu"], int(row["gpu_milli"]))
        jobs.append(Job(float(row["created_s"]), float(row["run_s"]), kind, TENANTS[place % len(TENANTS)]))
    return Trace("gpu-jobs", "Alibaba GPU cluster 2023: arrivals and durations of GPU pods up to 4 h", jobs)


def helios() -> Trace:
    """Return GPU jobs rebuilt from counts per minute: the job that began first is taken to end first."""
    jobs: list[tuple[float, float]] = []
    running: deque[float] = deque()
    before = 0
    for row in _rows("helios_minutes.csv"):
        minute, count = int(row["minute"]), int(row["running_jobs"])
        for _ in range(count - before):
            running.append(minute * 60.0)
        for _ in range(before - count):
            began = running.popleft()
            jobs.append((began, minute * 60.0 - began))
        before = count
    kind = Kind("train", "1", "vc6YE")
    made = [
        Job(began, seconds, kind, TENANTS[place % len(TENANTS)])
        for place, (began, seconds) in enumerate(sorted(jobs))
        if seconds > 0.0
    ]
    return Trace("helios", "Helios Earth vc6YE, one week: jobs rebuilt from running jobs per minute", made)


def alerts(dags: list[Dag]) -> Trace:
    """Return what a stream of alerts starts: each circular a fan-out over one category of tasks of a workflow."""
    rng = random.Random(SEED)
    pools: list[tuple[Dag, str, list[int]]] = []
    for dag in dags:
        of: dict[str, list[int]] = defaultdict(list)
        for place, task in enumerate(dag.tasks):
            if task.seconds > 0.0:
                of[task.category].append(place)
        pools += [(dag, category, places) for category, places in of.items() if len(places) >= 2]
    jobs = []
    at = before = 0.0
    chosen: dict[str, int] = {}
    for row in sorted(_rows("gcn_circulars.csv"), key=lambda row: int(row["at_s"])):
        at += min(GAP_S_MAX, int(row["at_s"]) - before)
        before = float(row["at_s"])
        # Follow-ups of one event ask for the same analysis.
        pick = chosen.setdefault(row["event"], rng.randrange(len(pools)))
        dag, category, places = pools[pick]
        tenant = TENANTS[int(row["event"]) % len(TENANTS)]
        for _ in range(FANOUT):
            task = dag.tasks[rng.choice(places)]
            jobs.append(Job(at, task.seconds, Kind(f"{dag.name}.{category}", "1", "", task.size), tenant))
    return Trace("alerts", "GCN circulars: arrivals; each starts 8 tasks of one category of a WfCommons run", jobs)


def with_deadlines(trace: Trace, *, slots: int, load: float) -> Trace:
    """Return the trace at this load of so many slots: arrivals drawn together or apart, deadlines and values given.

    A deadline is the usual duration of its kind times a stretch; the tightest are the most valuable more often.
    """
    rng = random.Random(f"{SEED} {trace.name}")
    of: dict[Kind, list[float]] = defaultdict(list)
    for job in trace.jobs:
        of[job.kind].append(job.seconds)
    usual = {kind: sorted(seconds)[len(seconds) // 2] for kind, seconds in of.items()}
    first, last = trace.jobs[0].arrived, trace.jobs[-1].arrived
    span = sum(job.seconds for job in trace.jobs) / (slots * load)
    scale = span / (last - first)
    jobs = []
    for job in trace.jobs:
        stretch = rng.choice(STRETCHES)
        value = rng.choice(VALUES[1:] if stretch < 20.0 else VALUES[:-1])
        arrived = (job.arrived - first) * scale
        jobs.append(replace(job, arrived=arrived, deadline=arrived + stretch * usual[job.kind], value=value))
    return replace(trace, jobs=jobs)


def pieces(jobs: list[Job], *, on_late: OnLate, told: bool = False) -> list[Piece]:
    """Return the jobs for the simulation; if an order is to be told the true durations, they are the forecasts."""
    return [
        Piece(
            Work(
                id=str(place),
                tenant=job.tenant,
                arrived=job.arrived,
                deadline=job.deadline,
                p50_s=job.seconds if told else None,
                p90_s=job.seconds if told else None,
                value=job.value,
                if_late=on_late,
            ),
            job.seconds,
            None if told else job.kind,
        )
        for place, job in enumerate(jobs)
    ]
