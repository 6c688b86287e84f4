"""Jobs that report, on a whole platform: what is told of them, and that nothing depends on it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace import AsyncClient
from headrace.model import RunView, StreamEvent
from infra.slurm import site
from infra.slurm.cluster import Cluster
from infra.up import Servers
from tests.platforms import UpProcess

ANSWER_S = 90.0
NOBODY = "http://127.0.0.1:9"
FUNCTIONS = """\
from headrace import Context, JobEnd, JobSpec, function, on


@on(name="push-launch")
@function
def push_launch(order: dict, ctx: Context) -> None:
    spec = JobSpec(executable="/bin/sh", arguments=["-c", order["script"]], sites=[order["site"]])
    ctx.submit(spec, then="push_landed", on_failure="push_landed")


@function
def push_landed(end: JobEnd) -> list:
    return [end.state, end.exit_code, end.last_lines.strip()]
"""


async def launch(client: AsyncClient, folder: Path, at: str, script: str) -> tuple[Any, list[StreamEvent], RunView]:
    """Run a job at a site and return the answer, all that was told, and the run."""
    source = folder / "push.py"
    source.write_text(FUNCTIONS)
    await client.deploy(source)
    run = await client.trigger("push-launch", {"site": at, "script": script})
    async with asyncio.timeout(ANSWER_S):
        told = [event async for event in run.follow()]
    return await run.result(), told, await run.view()


def heard(told: list[StreamEvent]) -> int:
    """Return how often it was told that the job itself was heard."""
    return sum(event.kind == "job" and "heard_at" in event.data for event in told)


async def test_progress_of_a_job_is_told_on_its_run_and_its_site_is_up(
    shared_platform: UpProcess, tmp_path: Path
) -> None:
    script = 'echo "0.25 relaxing" >"$HEADRACE_PROGRESS"; sleep 5; echo done; exit 3'
    async with AsyncClient(shared_platform.url, shared_platform.token) as client:
        answer, told, view = await launch(client, tmp_path, "local", script)
        sites = {found.name: found for found in await client.sites()}
    assert answer == ["failed", 3, "done"]
    (progress,) = [event.data for event in told if event.kind == "progress"]
    assert (progress["fraction"], progress["note"]) == (0.25, "relaxing")
    assert [job.job_id for job in view.jobs] == [progress["invocation_id"]]
    assert heard(told) == 3  # its start, its progress and its end
    assert (sites["local"].kind, sites["local"].status) == ("local", "up")
    assert sites["local"].last_seen_at is not None


@pytest.mark.parametrize("reached", [True, False])
async def test_a_job_is_followed_up_whether_it_is_heard_or_not(
    platform: UpProcess, slurm: Cluster, tmp_path: Path, reached: bool
) -> None:
    servers = msgspec.json.decode((platform.data / "run" / "servers.json").read_bytes(), type=Servers)
    config = site.write_config(slurm, tmp_path)
    url = platform.url if reached else NOBODY
    async with (
        site.agent(config, data=platform.data, nats_url=servers.nats_url, url=url),
        AsyncClient(platform.url, platform.token) as client,
    ):
        answer, told, view = await launch(client, tmp_path, "lab", "sleep 1; echo done")
        assert answer == ["completed", 0, "done"]
        assert bool(heard(told)) == reached
        assert [job.site for job in view.jobs] == ["lab"]
        found = {each.name: each for each in await client.sites()}["lab"]
        assert (found.kind, found.status, found.gpus) == ("slurm", "up", {"total": 12, "free": 12})
        assert found.nodes == {"total": 3, "free": 3, "unusable": 0}
