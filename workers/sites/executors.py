"""PSI/J's executors, mended, without the thread that polls for them, and our jobs in PSI/J's words.

PSI/J 0.9.11 calls a job that it cannot see completed, calls all jobs failed when the controller is away, and stops
telling anything when one job has a reason it does not know. So it writes the script and speaks with the batch system,
and what became of the jobs is asked for by ``batch``, once for all of them. The version is pinned: what begins with an
underscore here is PSI/J's own.
"""

from __future__ import annotations

import math
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from threading import local
from typing import IO, Any, ClassVar, TypeVar, cast

import psij
from psij import Launcher
from psij.executors.batch.batch_scheduler_executor import (
    BatchSchedulerExecutor,
    BatchSchedulerExecutorConfig,
    _QueuePollThread,
)
from psij.executors.batch.script_generator import TemplatedScriptGenerator

from headrace.errors import BadRequest
from headrace.jobs import JobSpec
from headrace.model import JobState
from workers.sites.base import JobStatus, SiteConfig, SiteUnreachable, Submission
from workers.sites.records import Records

NAME_PREFIX = "hr-"
ENV = "/usr/bin/env"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_inherited = local()
E = TypeVar("E", bound="Mended")

# What starts the processes of a job that has several, where neither the job nor its site says.
STARTERS = {"slurm": "srun", "flux": "flux"}


class Failed(subprocess.CalledProcessError):
    """A command of the batch system ended with an error.

    ``output`` holds all it said, ``printed`` what of it went to stdout: there are commands that tell of the jobs they
    know and fail for one that they do not.
    """

    printed = ""


class Missing(SiteUnreachable):
    """A command of the batch system is not there."""


class Mended(BatchSchedulerExecutor):
    """One of PSI/J's batch executors with a script of ours, whose polling guesses nothing.

    Also for use by itself: it passes PSI/J's own tests of executors. PSI/J's own scripts forget much of what a job asks
    for (GPUs and cores at PBS, the environment at LSF), and tell the batch system that every program ended well.
    """

    _VERSION_ = "0.0.1"
    TEMPLATE: ClassVar[str]

    def __init__(self, url: str | None = None, config: Any = None) -> None:
        config = config or BatchSchedulerExecutorConfig()
        config.queue_polling_error_threshold = sys.maxsize  # a batch system that is away has failed no job
        BatchSchedulerExecutor.__init__(
            self, url=url, config=config
        )  # those between would only choose their own script
        self.generator = TemplatedScriptGenerator(config, Path(__file__).with_name(self.TEMPLATE))

    def read(self, text: str) -> dict[str, JobStatus]:
        """Return how the jobs are that the status command told of, by native id."""
        raise NotImplementedError

    def context(self, job: psij.Job) -> dict[str, object]:
        """Return what the script needs beyond what PSI/J offers it."""
        spec = cast(psij.JobSpec, job.spec)
        resources = cast(psij.ResourceSpecV1, spec.resources)
        ours = job if isinstance(job, Job) else None
        nodes, per_node = resources.computed_node_count or 1, resources.computed_processes_per_node or 1
        limit = spec.attributes.duration
        return {
            "alone": ours is None,
            "folder": str(self.work_directory if ours is None else ours.records.path),
            "nodes": nodes,
            "processes": resources.computed_process_count or 1,
            "ppn": per_node,
            "cpus_per_node": per_node * (resources.cpu_cores_per_process or 1),
            "gpus_per_node": per_node * (resources.gpu_cores_per_process or 0) or None,
            "memory_kib": resources.memory_kb or None,
            # A job says what it needs in all, and most batch systems ask for what it needs of one node.
            "memory_per_node_kib": max(1, resources.memory_kb // nodes) if resources.memory_kb else None,
            "minutes": math.ceil(limit.total_seconds() / 60),
            "seconds": math.ceil(limit.total_seconds()),
        }

    def generate_submit_script(self, job: psij.Job, context: dict[str, object], submit_file: IO[str]) -> None:
        """Write the script."""
        self.generator.generate_submit_script(job, {**context, **self.context(job)}, submit_file)

    def new_launcher(self, name: str, config: psij.JobExecutorConfig) -> Launcher:
        """Return a launcher of PSI/J, by its name."""
        return Launcher.get_instance(name, config=config)

    def parse_status_output(self, exit_code: int, out: str) -> dict[str, psij.JobStatus]:
        """Return the status of all jobs; of those that are gone, what their exit code tells."""
        if exit_code != 0:
            raise RuntimeError(f"{self.name}: {out}")
        told = {native_id: psij_status(status) for native_id, status in self.read(out).items()}
        for native_id in list(self._queue_poll_thread._jobs):  # noqa: SLF001 - PSI/J is pinned
            if native_id not in told:
                told[native_id] = self._after_purge(native_id)
        return told

    def _after_purge(self, native_id: str) -> psij.JobStatus:
        if (self.work_directory / f"{native_id}.ec").exists():
            return psij.JobStatus(psij.JobState.COMPLETED)  # PSI/J reads the exit code there, and says FAILED by it
        return psij.JobStatus(psij.JobState.FAILED, message=f"unknown to {self.name}, and without a record of its end")

    def _current_user(self) -> str:
        return pwd.getpwuid(os.getuid()).pw_name  # PSI/J asks for who sits at the terminal, and a service has none

    def _format_duration(self, d: timedelta) -> str:
        seconds = math.ceil(d.total_seconds())  # a part of a second would be none, and none is no limit
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


PSIJ_STATES: dict[JobState, psij.JobState] = {
    "new": psij.JobState.NEW,
    "queued": psij.JobState.QUEUED,
    "held": psij.JobState.QUEUED,
    "active": psij.JobState.ACTIVE,
    "completed": psij.JobState.COMPLETED,
    "failed": psij.JobState.FAILED,
    "canceled": psij.JobState.CANCELED,
}


def psij_status(status: JobStatus) -> psij.JobStatus:
    """Return a status in PSI/J's words."""
    failed = status.state == "failed"
    return psij.JobStatus(
        PSIJ_STATES[status.state],
        message=status.detail if failed else None,
        exit_code=status.exit_code,
        metadata={"native_state": status.detail, "reason": status.reason},
    )


class Job(psij.Job):
    """A job whose own folder holds all that is written for it: its script, and what starts its processes.

    So nothing that lies elsewhere can be cleaned away under a job that waits, and nobody else reads what stands there.
    """

    def __init__(self, spec: psij.JobSpec, records: Records) -> None:
        super().__init__(spec)
        self.records = records
        # It names the script, and so the job where a batch system takes its name from there.
        self._id = str(spec.name)


class Unpolled:
    """Goes in front of one of our executors: no polling thread, commands that end in time, jobs in their folders."""

    site: SiteConfig

    def submit(self, job: psij.Job) -> None:
        """Write the script of a ``Job``, and submit it.

        Raises:
            psij.SubmitException: the batch system says no.
            SiteUnreachable: it says nothing.
            OSError: the script cannot be written.
        """
        assert isinstance(job, Job)  # noqa: S101 - no others are made
        executor = cast(Mended, self)
        executor._check_job(job)  # noqa: SLF001 - PSI/J is pinned
        script = job.records.script
        with script.open("w") as file:
            executor.generate_submit_script(job, executor._create_script_context(job), file)  # noqa: SLF001
        try:
            said = self._run_command(executor.get_submit_command(job, script))
        except Failed as error:
            raise psij.SubmitException(error.output) from None
        try:
            job._native_id = executor.job_id_from_submit_output(said)  # noqa: SLF001
        except (Failed, psij.SubmitException, IndexError) as error:
            # It was taken, and its id is not known: that is no refusal.
            raise SiteUnreachable(
                f"{self.site.name}: the id of a job that was submitted is not known: {error}", hint="It is looked up."
            ) from error

    def _get_launcher_from_job(self, job: psij.Job) -> Launcher:
        assert isinstance(job, Job)  # noqa: S101 - no others are made
        return cast(Mended, self).new_launcher(launcher_of(job), beside(job.records))

    def _start_queue_poll_thread(self) -> _QueuePollThread:
        class Nobody(_QueuePollThread):
            def __init__(self) -> None:
                pass

        return Nobody()

    def _run_command(self, cmd: list[str]) -> str:
        return run_command(self.site, cmd)


def launcher_of(job: Job) -> str:
    """Return the name of what starts the processes of a job."""
    return str(cast(psij.JobSpec, job.spec).launcher)


def beside(records: Records) -> psij.JobExecutorConfig:
    """Return a configuration with which PSI/J puts what starts a job beside the job's records, and anew.

    PSI/J takes its folder for complete if it is there, also where who wrote it died in the middle.
    """
    folder = records.path / "launch"
    shutil.rmtree(folder, ignore_errors=True)
    return psij.JobExecutorConfig(work_directory=folder)


def run_command(site: SiteConfig, command: list[str]) -> str:
    """Run a command of the batch system and return what it printed.

    Raises:
        Failed: it ended with an error.
        SiteUnreachable: it did not end in time.
        Missing: it is not there.
    """
    # ``env`` sets the site's variables, and nothing else of ours, and finds the command on the site's path.
    variables = {**_user(), "PATH": PATH, **site.environment}
    settings = [f"{name}={value}" for name, value in variables.items()]
    kept: tuple[int, ...] = getattr(_inherited, "fds", ())
    try:
        ran = subprocess.run(
            [ENV, "--ignore-environment", *settings, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=site.command_s,
            pass_fds=kept,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SiteUnreachable(
            f"{site.name}: {command[0]} did not end within {site.command_s:g} s", hint="Is the controller up?"
        ) from error
    if ran.returncode == 127:
        raise Missing(f"{site.name}: {command[0]} is not installed", hint="Set `environment` with its PATH.")
    if ran.returncode != 0:
        said = "\n".join(part.strip() for part in (ran.stdout, ran.stderr) if part.strip())
        failed = Failed(ran.returncode, command, output=said or f"exit code {ran.returncode}", stderr=ran.stderr)
        failed.printed = ran.stdout
        raise failed
    return ran.stdout


def _user() -> dict[str, str]:
    entry = pwd.getpwuid(os.getuid())
    return {"HOME": entry.pw_dir, "USER": entry.pw_name, "LOGNAME": entry.pw_name, "LANG": "C.UTF-8"}


def inherit(*fds: int) -> None:
    """Let the commands that this thread runs from now on inherit these descriptors, and no others."""
    _inherited.fds = fds


def executor(kind: type[E], name: str, site: SiteConfig) -> E:
    """Return an executor for a site, unpolled."""
    unpolled = type(f"Unpolled{kind.__name__}", (Unpolled, kind), {"site": site, "_NAME_": name, "_VERSION_": "0.0.1"})
    config = BatchSchedulerExecutorConfig(work_directory=Path(site.work))  # in which it writes nothing
    made: E = unpolled(url=None, config=config)
    return made


def native_name(job_id: str) -> str:
    """Return the name that a job has in the batch system: it is looked up by it."""
    return f"{NAME_PREFIX}{job_id}"


def psij_job(site: SiteConfig, submission: Submission, kind: str, *, single: bool = False) -> Job:
    """Return a job in PSI/J's words.

    Args:
        site: fills in what the job does not say.
        submission: the job.
        kind: custom attributes for other kinds of batch systems are left out.
        single: the executable starts its own processes.

    Raises:
        BadRequest: the site cannot run this, and the message says why.
    """
    spec, records = submission.spec, Records(submission.folder)
    executable, *arguments = command(site, spec, submission.folder)
    resources, attributes = spec.resources, spec.attributes
    several = STARTERS.get(kind, "mpirun")
    return Job(
        psij.JobSpec(
            executable=executable,
            arguments=arguments,
            directory=spec.directory or str(submission.folder),
            name=native_name(submission.job_id),
            # The agent's environment holds its secrets. A batch system's commands do not have it, so what the job may
            # inherit of theirs is harmless; without it Slurm would start a login shell, which may take long or hang.
            inherit_environment=kind != "local",
            environment=dict(environment(site, submission)),
            stdout_path=records.stdout,
            stderr_path=records.stderr,
            resources=psij.ResourceSpecV1(
                node_count=resources.node_count,
                process_count=resources.process_count,
                processes_per_node=resources.processes_per_node,
                cpu_cores_per_process=resources.cpu_cores_per_process,
                gpu_cores_per_process=resources.gpu_cores_per_process,
                exclusive_node_use=resources.exclusive_node_use,
                memory=resources.memory,
            ),
            attributes=psij.JobAttributes(
                duration=timedelta(seconds=attributes.duration_s or site.duration_s),
                queue_name=attributes.queue_name or site.queue,
                account=attributes.account or site.account,
                reservation_id=attributes.reservation_id,
                custom_attributes=_custom(attributes.custom_attributes, kind),
            ),
            pre_launch=records.before,
            post_launch=records.after,
            launcher="single" if single or resources.processes == 1 else spec.launcher or site.launcher or several,
        ),
        records,
    )


def environment(site: SiteConfig, submission: Submission) -> dict[str, str]:
    """Return the whole environment that the program is given, beside what the batch system adds."""
    return {
        "PATH": PATH,
        **site.job_environment,
        **submission.spec.environment,
        "HEADRACE_JOB_ID": submission.job_id,
        "HEADRACE_JOB_FOLDER": str(submission.folder),
        "HEADRACE_PROGRESS": str(Records(submission.folder).progress),
    }


def command(site: SiteConfig, spec: JobSpec, folder: Path) -> list[str]:
    """Return the program and its arguments, inside its container if it has one.

    Raises:
        BadRequest: the site runs no containers.
    """
    plain = [spec.executable, *spec.arguments]
    if spec.container is None:
        return plain
    where = spec.directory or str(folder)
    if site.container == "apptainer":
        gpus = ["--nv"] if spec.resources.gpus else []
        return ["apptainer", "exec", *gpus, "--bind", str(folder), "--pwd", where, spec.container, *plain]
    if site.container == "podman":
        gpus = ["--device", "nvidia.com/gpu=all", "--env", "CUDA_VISIBLE_DEVICES"] if spec.resources.gpus else []
        names = ("HEADRACE_JOB_ID", "HEADRACE_JOB_FOLDER", "HEADRACE_PROGRESS", *spec.environment)
        variables = [word for name in names for word in ("--env", name)]
        volume = ["--volume", f"{folder}:{folder}", "--workdir", where]
        return ["podman", "run", "--rm", "--userns=keep-id", *gpus, *variables, *volume, spec.container, *plain]
    raise BadRequest(
        f"container: site {site.name} runs no containers, and the job asks for {spec.container}",
        hint='Name sites that do in `sites`, or leave the container out; the operator sets `container = "apptainer"`.',
    )


def _custom(attributes: Mapping[str, str], kind: str) -> dict[str, object]:
    dialect = kind.partition("_")[0]  # "pbs.q" is for both that speak PBS
    return {name: value for name, value in attributes.items() if name.partition(".")[0] == dialect}
