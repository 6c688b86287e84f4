"""PSI/J's executors, by name, without the thread that polls for them, and our jobs in PSI/J's words.

PSI/J 0.9.11 calls a job that it cannot see completed, calls all jobs failed when the controller is away, and stops
telling anything when one job has a reason it does not know. So it writes the script and speaks with the batch system,
and what became of the jobs is asked for by ``batch``, once for all of them. The version is pinned: what begins with an
underscore here is PSI/J's own.
"""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from threading import local

import psij
from psij.executors.batch.batch_scheduler_executor import (
    BatchSchedulerExecutor,
    BatchSchedulerExecutorConfig,
    _QueuePollThread,
)

from headrace.errors import BadRequest
from headrace.jobs import JobSpec
from workers.sites.base import SiteConfig, SiteUnreachable, Submission
from workers.sites.records import Records

NAME_PREFIX = "hr-"
ENV = "/usr/bin/env"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_inherited = local()


class Failed(subprocess.CalledProcessError):
    """A command of the batch system ended with an error; ``output`` holds all it said."""


class Unpolled:
    """Goes in front of one of PSI/J's batch executors: no polling thread, and commands that end in time."""

    site: SiteConfig

    def _start_queue_poll_thread(self) -> _QueuePollThread:
        class Nobody(_QueuePollThread):
            def __init__(self) -> None:
                pass

            def register_job(self, job: psij.Job) -> None:
                """Leave the job alone: we ask for it."""

        return Nobody()

    def _run_command(self, cmd: list[str]) -> str:
        return run_command(self.site, cmd)


def run_command(site: SiteConfig, command: list[str]) -> str:
    """Run a command of the batch system and return what it printed.

    Raises:
        Failed: it ended with an error.
        SiteUnreachable: it did not end in time, or is not there.
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
        raise SiteUnreachable(f"{site.name}: {command[0]} is not installed", hint="Set `environment` with its PATH.")
    if ran.returncode != 0:
        said = "\n".join(part.strip() for part in (ran.stdout, ran.stderr) if part.strip())
        raise Failed(ran.returncode, command, output=said or f"exit code {ran.returncode}")
    return ran.stdout


def _user() -> dict[str, str]:
    entry = pwd.getpwuid(os.getuid())
    return {"HOME": entry.pw_dir, "USER": entry.pw_name, "LOGNAME": entry.pw_name, "LANG": "C.UTF-8"}


def inherit(*fds: int) -> None:
    """Let the commands that this thread runs from now on inherit these descriptors, and no others."""
    _inherited.fds = fds


def executor(kind: type[BatchSchedulerExecutor], name: str, site: SiteConfig) -> BatchSchedulerExecutor:
    """Return one of PSI/J's batch executors for a site, unpolled."""
    unpolled = type(f"Unpolled{kind.__name__}", (Unpolled, kind), {"site": site, "_NAME_": name, "_VERSION_": "0.0.1"})
    config = BatchSchedulerExecutorConfig(work_directory=Path(site.work) / "psij", keep_files=True)
    made: BatchSchedulerExecutor = unpolled(url=None, config=config)
    return made


def native_name(job_id: str) -> str:
    """Return the name that a job has in the batch system: it is looked up by it."""
    return f"{NAME_PREFIX}{job_id}"


def psij_job(site: SiteConfig, submission: Submission, kind: str, *, single: bool = False) -> psij.Job:
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
    several = "srun" if kind == "slurm" else "mpirun"
    job = psij.Job(
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
        )
    )
    # It names the script, and so the job where a batch system takes its name from there.
    job._id = native_name(submission.job_id)  # noqa: SLF001 - PSI/J is pinned, and offers no other way
    return job


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
    return {name: value for name, value in attributes.items() if name.partition(".")[0] == kind}
