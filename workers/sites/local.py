"""This machine as a site: jobs are processes, started by PSI/J, and found again by what stands in their environment.

There is no queue: a job that finds no free place is refused for now. What PSI/J does not do is done here: a job ends at
its walltime, GPUs are given out one by one, and jobs outlive the agent, whose next start finds them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import cast

import psij
import psutil
from msgspec import Struct
from psij.executors.local import LocalJobExecutor, _ProcessEntry

from headrace.jobs import RECORDS, Reason
from workers.sites import machine
from workers.sites.base import (
    FINAL,
    Capacity,
    JobStatus,
    Known,
    SiteConfig,
    Submission,
    SubmitBusy,
    SubmitRejected,
)
from workers.sites.batch import judge
from workers.sites.executors import psij_job
from workers.sites.records import Records

DEVICES = "CUDA_VISIBLE_DEVICES"
SITE = "HEADRACE_SITE"  # tells this site's jobs from those of another one on the same machine
# A line of the job's own script: what shares the machine with it has deadlines of seconds, and a job has not.
YIELD = "renice -n 10 -p $$ >/dev/null 2>&1"
GRACE_S = 2.0
STEP_S = 0.02
UNSEEN_S = 5.0  # a process is there as soon as it is started, and gone as soon as it has ended


class MendedLocalExecutor(LocalJobExecutor):
    """PSI/J's executor for this machine, which closes what it read a job's output from."""

    _NAME_ = "local"
    _VERSION_ = "0.0.1"

    def _process_done(self, p: _ProcessEntry) -> None:
        super()._process_done(p)
        output = getattr(p.process, "stdout", None)  # one that it was attached to has none
        if output is not None:
            output.close()


class Running(Struct):
    """The processes of one job that run now."""

    folder: str
    devices: frozenset[str]
    pids: list[int]


class Local:
    """A site that is this machine."""

    def __init__(
        self,
        config: SiteConfig,
        *,
        gpus: Sequence[str] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Describe the site.

        Args:
            config: the site.
            gpus: the names that programs know its GPUs by; None looks for NVIDIA's devices.
            now: the clock, in seconds since 1970.
        """
        self.config = config
        self._now = now
        self._gpus = [str(number) for number in range(machine.gpus())] if gpus is None else list(gpus)
        self._places = machine.places(config.jobs_max)
        self._mark = f"{config.name}:{Path(config.work).absolute()}"
        self._giving_out = Lock()
        self._executor: LocalJobExecutor | None = None
        self._missing_since: dict[str, float] = {}

    async def submit(self, job: Submission) -> str:
        """See ``BatchSystem.submit``."""
        return await asyncio.to_thread(self._submit, job)

    async def submit_array(self, array_id: str, jobs: Sequence[Submission]) -> dict[str, str]:
        """See ``BatchSystem.submit_array``; a machine without a queue has no arrays."""
        return {job.job_id: await self.submit(job) for job in jobs}

    async def find(self, job_id: str, folder: Path) -> str | None:
        """See ``BatchSystem.find``."""
        return await asyncio.to_thread(self._find, job_id, Records(folder))

    async def status(self, jobs: Sequence[Known]) -> Mapping[str, JobStatus]:
        """See ``BatchSystem.status``."""
        return await asyncio.to_thread(self._status, jobs) if jobs else {}

    async def cancel(self, native_ids: Sequence[str]) -> None:
        """See ``BatchSystem.cancel``."""
        await asyncio.to_thread(self._cancel, set(native_ids))

    async def capacity(self) -> Capacity:
        """See ``BatchSystem.capacity``."""
        running = await asyncio.to_thread(self._processes)
        taken = {device for job in running.values() for device in job.devices}
        return Capacity(
            at=self._now(),
            nodes_total=1,
            nodes_free=int(len(running) < self._places),
            nodes_unusable=0,
            gpus_total=len(self._gpus),
            gpus_free=len(set(self._gpus) - taken),
            jobs_waiting=0,
            jobs_running=len(running),
        )

    # ------------------------------------------------------------ inside

    def _submit(self, job: Submission) -> str:
        records = Records(job.folder)
        records.prepare(f"{YIELD}\n{job.before}", job.after)
        made = psij_job(self.config, job, "local")
        spec = cast(psij.JobSpec, made.spec)
        if job.spec.resources.processes > 1 and job.spec.launcher is None and self.config.launcher is None:
            spec.launcher = "multiple"  # needs no MPI
        Path(spec.directory or job.folder).mkdir(parents=True, exist_ok=True)
        with self._giving_out, records.submitting():
            found = self._find(job.job_id, records)
            if found is None:
                spec.environment = {**(spec.environment or {}), SITE: self._mark, DEVICES: ",".join(self._devices(job))}
                records.note_attempt()
                try:
                    self._started().submit(made)
                except psij.SubmitException as error:
                    records.forget_attempt()
                    raise SubmitRejected(f"{self.config.name}: {error}", hint="Does its directory exist?") from error
                found = str(made.native_id)
            records.note_native_id(found)
            return found

    def _processes(self) -> dict[str, Running]:
        return processes(self._mark)

    def _started(self) -> LocalJobExecutor:
        if self._executor is None:
            config = psij.JobExecutorConfig(work_directory=Path(self.config.work) / "psij")
            self._executor = MendedLocalExecutor(config=config)
        return self._executor

    def _devices(self, job: Submission) -> list[str]:
        """Return the GPUs that the job gets.

        Raises:
            SubmitBusy: all places, or too many GPUs, are taken.
            SubmitRejected: there are not as many GPUs or nodes.
        """
        wanted, nodes = job.spec.resources.gpus, job.spec.resources.nodes
        if wanted > len(self._gpus) or nodes > 1:
            raise SubmitRejected(
                f"{self.config.name} has 1 node and {len(self._gpus)} GPUs; {job.job_id} asks for {nodes} and {wanted}",
                hint="Ask for less, or send it to another site.",
            )
        running = self._processes()
        taken = {device for other in running.values() for device in other.devices}
        free = [device for device in self._gpus if device not in taken]
        if len(running) >= self._places or wanted > len(free):
            raise SubmitBusy(
                f"{self.config.name} runs {len(running)} jobs and has {len(free)} GPUs free",
                hint="It is started as others end.",
            )
        return free[:wanted]

    def _find(self, job_id: str, records: Records) -> str | None:
        noted = records.native_id()
        if noted is not None or not records.attempted():
            return noted
        running = self._processes().get(job_id)
        return str(min(running.pids)) if running else None

    def _status(self, jobs: Sequence[Known]) -> dict[str, JobStatus]:
        running = self._processes()  # before the records: what is gone by now has written its own
        told = {}
        now = self._now()
        for job in jobs:
            records = Records(job.folder)
            claim, ended, there = records.claim(), records.ended(), job.job_id in running
            native_id = claim.native_id if claim else job.native_id
            if there and claim and job.limit_s is not None and now - claim.at >= job.limit_s:
                end(self._mark, job.job_id, running[job.job_id], "walltime")
                ended, there = records.ended(), False
            elif there and claim and ended and claim.native_id not in map(str, running[job.job_id].pids):
                end(
                    self._mark, job.job_id, running[job.job_id], None
                )  # its program has ended, and what that left behind ends with the job
                there = False
            seen = JobStatus(native_id=native_id, state="active", nodes="localhost") if there else None
            killed = records.killed()
            if killed is not None and not there and (ended is None or ended.exit_code != 0):
                told[job.job_id] = JobStatus(
                    native_id=native_id,
                    state="canceled" if killed[0] == "canceled" else "failed",
                    reason=killed[0],
                    started_at=claim.at if claim else None,
                    ended_at=killed[1],
                    nodes="localhost",
                )
                continue
            since = now if there else self._missing_since.setdefault(job.job_id, now)
            told[job.job_id] = judge(native_id, seen, claim, ended, job.limit_s, now - since, UNSEEN_S)
            if there or told[job.job_id].state in FINAL:
                self._missing_since.pop(job.job_id, None)
        return told

    def _cancel(self, native_ids: set[str]) -> None:
        for job_id, running in self._processes().items():
            claim = Records(Path(running.folder)).claim()
            if {str(pid) for pid in running.pids} & native_ids or (claim and claim.native_id in native_ids):
                end(self._mark, job_id, running, "canceled")


def processes(site: str) -> dict[str, Running]:
    """Return the processes of all jobs of one site that run on this machine, by job id."""
    found: dict[str, Running] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            environ = process.environ()
            job_id = environ.get("HEADRACE_JOB_ID")
            if not job_id or environ.get(SITE) != site or process.status() == psutil.STATUS_ZOMBIE:
                continue
            running = found.setdefault(job_id, Running(environ.get("HEADRACE_JOB_FOLDER", ""), frozenset(), []))
            running.pids.append(process.pid)
            running.devices |= {device for device in environ.get(DEVICES, "").split(",") if device}
    return found


def end(site: str, job_id: str, running: Running, why: Reason | None) -> None:
    """End all processes of a job, kindly and then by force, and note why; None where the job has ended by itself."""
    folder = Path(running.folder)
    if why is not None and (folder / RECORDS).is_dir():
        Records(folder).note_killed(why)
    now = time.monotonic()
    force_at, give_up_at = now + GRACE_S, now + 2 * GRACE_S
    told: set[int] = set()
    while left := processes(site).get(job_id):  # looked for anew: one that is told to end may just have started another
        now = time.monotonic()
        if now > give_up_at:
            return
        for pid in left.pids:
            with suppress(ProcessLookupError, PermissionError):
                if now > force_at:
                    os.kill(pid, signal.SIGKILL)
                elif pid not in told:
                    told.add(pid)
                    os.kill(pid, signal.SIGTERM)
        time.sleep(STEP_S)
