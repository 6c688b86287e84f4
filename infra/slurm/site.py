"""A test cluster as a site of a platform: what its operator would write down, and the agent that serves it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from infra import siteusers
from infra.logfile import LogFile
from infra.process import Child
from infra.readiness import ReadyPipe
from infra.rights import AGENT
from infra.settings import PREFIX, environment
from infra.slurm.cluster import Cluster

SITE = "lab"
QUEUE = "gpu"
READY_S = 30.0
PATH = "/usr/local/bin:/usr/bin:/bin"


def write_config(cluster: Cluster, folder: Path, *, settle_s: float = 15.0, unseen_s: float = 60.0) -> Path:
    """Write the configuration of a cluster as a site, and return its path; jobs find our Python as ``python3``."""
    jobs_path = f"{Path(sys.executable).parent}:{PATH}"
    lines = [
        f'name = "{SITE}"',
        'kind = "slurm"',
        f'queue = "{QUEUE}"',
        f"work = {json.dumps(str(folder / 'work'))}",
        f"settle_s = {settle_s}",
        f"unseen_s = {unseen_s}",
        "[environment]",
        *(f"{name} = {json.dumps(value)}" for name, value in cluster.env.items()),
        "[job_environment]",
        f"PATH = {json.dumps(jobs_path)}",
    ]
    path = folder / f"{SITE}.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


@asynccontextmanager
async def agent(config: Path, *, data: Path, nats_url: str, url: str) -> AsyncIterator[Child]:
    """Run the agent of a site beside a platform of this machine, and start it again whenever it dies.

    Args:
        config: of the site.
        data: folder of the platform, whose blobs it shares.
        nats_url: the server of the log.
        url: of the gateway, for jobs to report to.

    Raises:
        NotStarted: it does not get ready.
    """
    pipe = ReadyPipe()
    settings = {
        "data_dir": data,
        "nats_url": nats_url,
        "nats_password_file": siteusers.kept(data, SITE),
        "public_url": url,
        "ready_fd": pipe.fd,
    }
    kept = {name: text for name, text in os.environ.items() if not name.startswith(PREFIX)}

    async def ready() -> bool:
        return pipe.has_said(child.pid)

    child = Child(
        f"agent-{SITE}",
        [sys.executable, "-P", "-m", "infra", AGENT, "--site", SITE, "--config", str(config)],
        log=LogFile(config.with_suffix(".log")),
        ready=ready,
        env=kept | environment(settings),
        keep_fds=[pipe.fd],
        ready_s=READY_S,
    )
    with contextlib.closing(pipe):
        await child.start()
        try:
            yield child
        finally:
            await child.stop()
