"""Jobs for the tests of sites: short programs, and waiting for what becomes of them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import msgspec

from headrace.jobs import JobAttributes, JobEnd, JobSpec, JobTime, Resources
from headrace.testing import Bench
from workers.sites.base import FINAL, BatchSystem, JobStatus, Known, Submission

LOOK_S = 0.1


def shell(script: str, resources: Resources | None = None) -> JobSpec:
    """Return a job that runs lines of shell."""
    return JobSpec(executable="/bin/sh", arguments=["-c", script], resources=resources or Resources())


def timed(spec: JobSpec, duration: str) -> JobSpec:
    """Return the job with a limit on its time."""
    attributes = msgspec.structs.replace(spec.attributes, duration=duration)
    return msgspec.structs.replace(spec, attributes=attributes)


def with_option(spec: JobSpec, **options: str) -> JobSpec:
    """Return the job with options of Slurm."""
    custom = {f"slurm.{name}": value for name, value in options.items()}
    return msgspec.structs.replace(
        spec, attributes=JobAttributes(duration=spec.attributes.duration, custom_attributes=custom)
    )


def submission(folder: Path, job_id: str, spec: JobSpec) -> Submission:
    """Return a job in a folder of its own; each job of a session needs another id, for Slurm remembers them all."""
    return Submission(job_id=job_id, spec=spec, folder=folder / job_id)


def known(job: Submission, native_id: str) -> Known:
    """Return what is asked for after a submission."""
    return Known(
        job_id=job.job_id, native_id=native_id, folder=job.folder, limit_s=job.spec.attributes.duration_s or 600.0
    )


async def until(
    site: BatchSystem, jobs: list[Known], holds: Callable[[dict[str, JobStatus]], bool], seconds: float = 60.0
) -> dict[str, JobStatus]:
    """Look until it holds, and return how the jobs are then."""
    give_up_at = time.monotonic() + seconds
    while True:
        told = dict(await site.status(jobs))
        if holds(told):
            return told
        assert time.monotonic() < give_up_at, told
        await asyncio.sleep(LOOK_S)


async def ended(site: BatchSystem, *jobs: Known, seconds: float = 60.0) -> dict[str, JobStatus]:
    """Wait until all have ended."""
    return await until(site, list(jobs), lambda told: all(job.state in FINAL for job in told.values()), seconds)


async def reached(site: BatchSystem, job: Known, state: str, seconds: float = 60.0) -> JobStatus:
    """Wait until a job is in a state."""
    told = await until(site, [job], lambda told: told[job.job_id].state == state, seconds)
    return told[job.job_id]


class Here:
    """A bench that runs the programs of jobs where the test runs: inputs in, Python on NumPy, outputs out."""

    def __init__(self, folder: Path, *modules: ModuleType) -> None:
        self.bench = Bench(*modules, jobs=self.run)
        self._folder = folder
        self._count = 0

    def run(self, spec: JobSpec) -> JobEnd:
        """Run one job in a folder of its own."""
        self._count += 1
        folder = self._folder / f"job-{self._count}"
        folder.mkdir()
        for name, uri in spec.inputs.items():
            (folder / name).write_bytes(self.bench.stage(uri).read_bytes())
        ran = subprocess.run(
            [sys.executable, "-I", *spec.arguments, "--backend", "numpy"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        there = [name for name in spec.outputs if (folder / name).exists()]
        return JobEnd(
            job_id="",
            site="here",
            state="failed" if ran.returncode else "completed",
            reason="exit_code" if ran.returncode else "",
            exit_code=ran.returncode,
            outputs={name: self.bench.store((folder / name).read_bytes()) for name in there},
            time_s=JobTime(queue=1.5, run=2.5),
            last_lines=ran.stdout + ran.stderr,
        )
