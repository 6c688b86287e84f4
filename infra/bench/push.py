"""How long after the end of a batch job its follow-up runs: pushed by the job, and found by the poll behind it.

A real Slurm on this machine, a platform and an agent, all started for this. The last thing that each job does is to
print the time; the first thing that its follow-up does is to look at the clock. The poll is measured with jobs that
report to an address at which nobody listens: each report of theirs is lost.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from pathlib import Path

import msgspec
import uvloop
from msgspec import Struct

from headrace.client import AsyncClient
from infra.bench.load import quantile
from infra.settings import load
from infra.slurm import site
from infra.slurm.cluster import Cluster
from infra.slurm.layout import Shape
from infra.up import Platform, Servers

REPORT = Path(__file__).parents[1] / "reports" / "push.json"
SHAPE = Shape(nodes=3, gpus=4, cpus=4)
JOBS = 120
RUN_S_MIN, RUN_S_STEP, RUN_S_STEPS = 0.5, 0.37, 10  # jobs end one by one, and not in step with anything
LONE_S = 35.0  # a job of which nothing is heard is looked at ever more rarely, and by then as rarely as can be
ANSWERS_S_MAX = 300.0
NOBODY = "http://127.0.0.1:9"  # the port of a service that throws away what it is sent, and runs nowhere
PUSHED_S_MAX, POLLED_S_MAX = 1.0, 15.0
FUNCTIONS = '''\
"""A job that tells when it ended, and what follows it."""

import time

from headrace import Context, JobEnd, JobSpec, function, on


@on(name="launch")
@function
def launch(seconds: float, ctx: Context) -> None:
    script = f"sleep {seconds}; date +%s.%N"
    ctx.submit(JobSpec(executable="/bin/sh", arguments=["-c", script], sites=["lab"]), then="landed")


@function
def landed(end: JobEnd) -> float:
    now = time.time()
    return now - float(end.last_lines.split()[-1])
'''


class Found(Struct, frozen=True):
    """Seconds from the end of a job's program to the start of its follow-up, over so many jobs."""

    jobs: int
    p50_s: float
    p99_s: float
    longest_s: float


class Report(Struct, frozen=True):
    """Both ways; ``lone`` is one long job by itself, of which nothing is heard."""

    cores: int
    pushed: Found
    polled: Found
    lone: Found


async def measured(folder: Path, cluster: Cluster, seconds: list[float], *, pushed: bool) -> Found:
    """Start a platform and an agent, run jobs, and return how soon their follow-ups ran.

    Args:
        folder: an empty one, for all that they keep.
        cluster: runs the jobs.
        seconds: how long each of them runs.
        pushed: whether the jobs reach the gateway.
    """
    folder.mkdir()
    async with Platform(load({}, data_dir=folder / "data", port=0)) as running:
        servers = msgspec.json.decode((running.data / "run" / "servers.json").read_bytes(), type=Servers)
        url = running.url if pushed else NOBODY
        config = site.write_config(cluster, folder)
        source = folder / "work.py"
        source.write_text(FUNCTIONS)
        async with (
            site.agent(config, data=running.data, nats_url=servers.nats_url, url=url),
            AsyncClient(running.url, running.token) as client,
        ):
            await client.deploy(source)
            await (await client.trigger("launch", RUN_S_MIN)).result(timeout=ANSWERS_S_MAX)  # all is warm now
            runs = await asyncio.gather(*(client.trigger("launch", each) for each in seconds))
            took = sorted(await asyncio.gather(*(run.result(timeout=ANSWERS_S_MAX) for run in runs)))
    return Found(jobs=len(took), p50_s=quantile(took, 0.5), p99_s=quantile(took, 0.99), longest_s=took[-1])


async def measure(folder: Path, jobs: int) -> Report:
    """Measure both ways, on one cluster, one after the other."""
    cluster = Cluster(folder / "slurm", SHAPE)
    seconds = [RUN_S_MIN + RUN_S_STEP * (number % RUN_S_STEPS) for number in range(jobs)]
    try:
        await asyncio.to_thread(cluster.start, tied=True)
        pushed = await measured(folder / "pushed", cluster, seconds, pushed=True)
        polled = await measured(folder / "polled", cluster, seconds, pushed=False)
        lone = await measured(folder / "lone", cluster, [LONE_S], pushed=False)
    finally:
        await asyncio.to_thread(cluster.stop)
    return Report(cores=os.cpu_count() or 1, pushed=pushed, polled=polled, lone=lone)


def main() -> int:
    """Measure, print and write the figures; the exit code is 0 if both are as soon as is promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=JOBS, help="how many jobs, each way")
    parser.add_argument("--write", action="store_true", help=f"write {REPORT.name} into infra/reports")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="headrace-push-") as folder:
        found = uvloop.run(measure(Path(folder), options.jobs))
    late = False
    for name, way, most in (
        ("pushed", found.pushed, PUSHED_S_MAX),
        ("polled", found.polled, POLLED_S_MAX),
        ("polled, alone", found.lone, POLLED_S_MAX),
    ):
        late |= way.p99_s >= most
        print(
            f"{name}: {way.jobs} jobs, end to follow-up p50 {way.p50_s:.2f} s, p99 {way.p99_s:.2f} s, "
            f"longest {way.longest_s:.2f} s (p99 under {most:g} s is promised)"
        )
    if options.write:
        REPORT.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    return int(late)


if __name__ == "__main__":
    raise SystemExit(main())
