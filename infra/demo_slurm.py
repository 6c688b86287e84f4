"""``headrace demo --slurm``: a run stop starts a simulation in the queue of a real Slurm, under a deadline.

Starts a small Slurm on this machine, a platform, and the agent that serves the one to the other; what is shown is the
campaign of ``functions/examples/md_campaign.py``. Everything ends with it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
from rich.console import Console

from headrace.client import AsyncClient
from infra.demo import PLAIN_WIDTH, demo
from infra.demo_triggers import EXAMPLES, STATE, Show, Trigger, campaign
from infra.slurm import site
from infra.slurm.cluster import Cluster
from infra.slurm.layout import Shape
from infra.up import Platform, Servers

DEADLINE = "90s"  # the queue of the test cluster is short; a fresh Slurm takes a second or two to start a job
SHAPE = Shape(nodes=3, gpus=4, cpus=4)


def triggers(uris: Mapping[str, str]) -> list[Trigger]:
    """Return run stops with simulations of several sizes; ``uris`` says where the state was uploaded to."""
    sizes = ((1, 4), (2, 4), (1, 5), (4, 5))
    return [campaign(uris["state"], gpus=gpus, cells=cells, deadline=DEADLINE) for gpus, cells in sizes]


SHOW = Show((EXAMPLES / "md_campaign.py",), lambda: {"state": STATE}, triggers)


async def demo_slurm(platform: Platform, folder: Path) -> bool:
    """Start a Slurm and its agent beside a platform, run the demo, and return whether all was right and on time.

    Args:
        platform: ready.
        folder: an empty one, for the cluster and its jobs.

    Raises:
        NoServer: Slurm is not installed.
        NotStarted: a part of it does not get ready.
    """
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    servers = msgspec.json.decode((platform.data / "run" / "servers.json").read_bytes(), type=Servers)
    cluster = Cluster(folder / "slurm", SHAPE)
    try:
        await asyncio.to_thread(cluster.start, tied=True)
        console.print(f"Slurm is up: {SHAPE.nodes} nodes with {SHAPE.gpus} GPUs each, which are only counted.")
        config = site.write_config(cluster, folder)
        async with site.agent(config, data=platform.data, nats_url=servers.nats_url, url=platform.url):
            good = await demo(platform.url, platform.token, show=SHOW, console=console)
            return await _told_jobs(platform, cluster, console) and good
    finally:
        await asyncio.to_thread(cluster.stop)


async def _told_jobs(platform: Platform, cluster: Cluster, console: Console) -> bool:
    """Print every job with its name in Slurm's own records; return whether those hold each of them, and no other."""
    native = await asyncio.to_thread(cluster.jobs)
    jobs = missing = 0
    async with AsyncClient(platform.url, platform.token) as client:
        for run in await client.runs():
            view = await (await client.run(run.run_id)).view()
            for job in view.jobs:
                name = native.pop(job.native_id or "", "missing there")
                console.print(f"{view.run_id}: {job.state} at {job.site}, in Slurm as {job.native_id} ({name}).")
                jobs, missing = jobs + 1, missing + (job.job_id not in name)
    console.print(f"{jobs} jobs, of which Slurm's own records miss {missing}, and hold {len(native)} others.")
    return jobs > 0 and not missing and not native
