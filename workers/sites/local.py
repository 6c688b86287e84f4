"""This machine as a site: jobs are processes, started by PSI/J and each in a session of its own.

There is no queue: a job that finds no free place is refused for now. What PSI/J does not do is done here: a job ends at
its walltime and when it holds more memory than it asked for, GPUs are given out one by one, and jobs outlive the agent,
whose next start finds them. Time and memory are looked at whenever the state of jobs is, every few seconds: one that
takes all memory in less is the kernel's to end, and was ended by a signal.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from threading import Lock
from typing import cast

import psij
from psij import Launcher
from psij.executors.local import LocalJobExecutor, _ProcessEntry

from headrace.jobs import RECORDS, Reason
from workers.sites import machine
from workers.sites.base import (
    Capacity,
    JobStatus,
    Known,
    SiteConfig,
    Submission,
    SubmitBusy,
    SubmitRejected,
)
from workers.sites.batch import judge
from workers.sites.blocking import Blocking
from workers.sites.executors import beside, native_name, psij_job
from workers.sites.processes import DEVICES, MEMORY, SITE, Running, end, leftovers, processes
from workers.sites.records import Records

_log = logging.getLogger(__name__)

SETSID = "/usr/bin/setsid"
# A line of the job's own script: what shares the machine with it has deadlines of seconds, and a job has not.
YIELD = "renice -n 10 -p $$ >/dev/null 2>&1"
BUSY_HINT = "It is started as others end."
UNSEEN_S = 5.0  # a process is there as soon as it is started, and gone as soon as it has ended


class OwnSession(Launcher):
    """Starts a job in a session of its own: whatever it starts is found by that."""

    def __init__(self, launcher: Launcher) -> None:
        super().__init__(launcher.config)
        self._launcher = launcher

    def get_launch_command(self, job: psij.Job, log_file: str | None = None) -> list[str]:
        """See PSI/J's ``Launcher``, here and below."""
        # PSI/J's launchers do not quote their paths: from the job's own folder on, they hold nothing to quote.
        assert job.spec is not None  # noqa: S101 - a job of ours has one
        given = 1 + len(job.spec.arguments or ())
        command = self._launcher.get_launch_command(job)
        here = f"{job.spec.directory}/"
        return [SETSID, *(word.removeprefix(here) for word in command[:-given]), *command[-given:]]

    def is_launcher_failure(self, output: str) -> bool:
        """See above."""
        return self._launcher.is_launcher_failure(output)

    def get_launcher_failure_message(self, output: str) -> str:
        """See above."""
        return self._launcher.get_launcher_failure_message(output)


class MendedLocalExecutor(LocalJobExecutor):
    """PSI/J's executor for this machine, which closes what it read a job's output from."""

    _NAME_ = "local"
    _VERSION_ = "0.0.1"

    def _get_launcher(self, name: str, version_constraint: str | None = None) -> Launcher:
        return OwnSession(super()._get_launcher(name, version_constraint))

    def _process_done(self, p: _ProcessEntry) -> None:
        super()._process_done(p)
        output = getattr(p.process, "stdout", None)  # one that it was attached to has none
        if output is not None:
            output.close()


class Local(Blocking):
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
        self._missing_since: dict[str, float] = {}

    async def capacity(self) -> Capacity:
        """See ``BatchSystem.capacity``."""
        running = await self.beside(self._processes)
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
        records.make()
        with self._giving_out, records.submitting():
            found = self._find(job.job_id, records)
            if found is None:
                marks = {SITE: self._mark, DEVICES: ",".join(self._devices(job))}
                if job.spec.resources.memory is not None:
                    marks[MEMORY] = str(job.spec.resources.memory)
                found = self._start(job, records, marks)
            records.note_native_id(found, native_name(job.job_id))
            return found

    def _start(self, job: Submission, records: Records, marks: dict[str, str]) -> str:
        records.prepare(f"{YIELD}\n{job.before}", job.after)
        made = psij_job(self.config, job, "local")
        spec = cast(psij.JobSpec, made.spec)
        if job.spec.resources.processes > 1 and job.spec.launcher is None and self.config.launcher is None:
            spec.launcher = "multiple"  # needs no MPI
        spec.environment = {**(spec.environment or {}), **marks}
        Path(spec.directory or job.folder).mkdir(parents=True, exist_ok=True)
        records.note_attempt()
        try:
            MendedLocalExecutor(config=beside(records)).submit(made)
        except psij.SubmitException as error:
            records.forget_attempt()
            raise SubmitRejected(f"{self.config.name}: {error}.", hint="Does its directory exist?") from error
        return str(made.native_id)

    def _processes(self) -> dict[str, Running]:
        return processes(self._mark)

    def _devices(self, job: Submission) -> list[str]:
        """Return the GPUs that the job gets.

        Raises:
            SubmitBusy: all places, or too many GPUs, are taken.
            SubmitRejected: there are not as many GPUs, nodes or cores, or not as much memory.
        """
        machine.check(self.config.name, job.spec.resources, len(self._gpus))
        wanted = job.spec.resources.gpus
        running = self._processes()
        taken = {device for other in running.values() for device in other.devices}
        free = [device for device in self._gpus if device not in taken]
        # Without what changes as others come and go: why a job waits is told anew where it reads anew.
        if len(running) >= self._places:
            raise SubmitBusy(f"{self.config.name} runs {self._places} jobs at once.", hint=BUSY_HINT)
        if wanted > len(free):
            raise SubmitBusy(f"{self.config.name} has fewer GPUs free than the {wanted} it needs.", hint=BUSY_HINT)
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
        since = {job.job_id: self._missing_since.get(job.job_id, now) for job in jobs if job.job_id not in running}
        self._missing_since = since
        for job in jobs:
            try:
                told[job.job_id] = self._one(job, running.get(job.job_id), now)
            except Exception:  # whatever is wrong with one job is its own; the others are told of
                _log.exception("site %s: job %s cannot be judged", self.config.name, job.job_id)
        return told

    def _one(self, job: Known, running: Running | None, now: float) -> JobStatus:
        records = Records(job.folder)
        claim, ended = records.claim(), records.ended()
        native_id = job.native_id if claim is None else claim.native_id
        why: Reason = ""
        if running is not None and job.limit_s is not None and now - running.began_at >= job.limit_s:
            why = "walltime"
        elif running is not None and running.over:
            why = "out_of_memory"
        if running is not None and why:
            self._end(job, running.pids, why)
            ended, running = records.ended(), None
        elif claim and ended and (running is None or native_id not in map(str, running.pids)):
            # Its program has ended, and what that left behind ends with the job.
            if left := {*(running.pids if running else ()), *leftovers(int(job.native_id), claim.at, ended.at)}:
                self._end(job, left, None)
            running = None
        killed = records.killed()
        if killed is not None and running is None and (ended is None or ended.exit_code != 0):
            return JobStatus(
                native_id=native_id,
                state="canceled" if killed[0] == "canceled" else "failed",
                reason=killed[0],
                started_at=claim.at if claim else None,
                ended_at=killed[1],
                nodes="localhost",
            )
        seen = None if running is None else JobStatus(native_id=native_id, state="active", nodes="localhost")
        missing_s = now - self._missing_since.get(job.job_id, now)
        return judge(native_id, seen, claim, ended, job.limit_s, missing_s, UNSEEN_S)

    def _cancel(self, jobs: Sequence[Known]) -> None:
        running = self._processes()
        for job in jobs:
            if (found := running.get(job.job_id)) is not None:
                self._end(job, found.pids, "canceled")

    def _end(self, job: Known, pids: Collection[int], why: Reason | None) -> None:
        """End processes of a job, and note why; None where the job has ended by itself."""
        if why is not None and (job.folder / RECORDS).is_dir():
            Records(job.folder).note_killed(why)

        def look(known: Collection[int]) -> list[int]:
            found = processes(self._mark, dict.fromkeys(known, job.job_id)).get(job.job_id)
            return found.pids if found else []

        end(look, pids)
