"""Slurm: its states in our words, one look for all jobs, arrays, nodes and GPUs; and PSI/J's executor, mended.

What the words mean: https://slurm.schedmd.com/squeue.html and https://slurm.schedmd.com/job_reason_codes.html
"""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import IO, Any, cast

import psij
from psij.executors.batch.script_generator import TemplatedScriptGenerator
from psij.executors.batch.slurm import SlurmExecutorConfig, SlurmJobExecutor

from headrace.errors import BadRequest, TooLarge
from headrace.jobs import JobSpec, Reason
from headrace.model import JobState
from workers.sites.base import (
    Capacity,
    JobStatus,
    SiteConfig,
    SiteUnreachable,
    Submission,
)
from workers.sites.batch import Batch
from workers.sites.executors import Failed, environment, native_name, psij_job, run_command
from workers.sites.records import Records

TEMPLATE = Path(__file__).with_name("slurm.mustache")

STATES: dict[str, tuple[JobState, Reason]] = {
    "PENDING": ("queued", ""),
    "CONFIGURING": ("queued", ""),
    "REQUEUED": ("queued", ""),
    "REQUEUE_FED": ("queued", ""),
    "REQUEUE_HOLD": ("held", ""),
    "RESV_DEL_HOLD": ("held", ""),
    "SPECIAL_EXIT": ("held", ""),
    "SUSPENDED": ("held", ""),
    "STOPPED": ("held", ""),
    "RUNNING": ("active", ""),
    "COMPLETING": ("active", ""),
    "SIGNALING": ("active", ""),
    "RESIZING": ("active", ""),
    "STAGE_OUT": ("active", ""),
    "COMPLETED": ("completed", ""),
    "FAILED": ("failed", "exit_code"),
    "TIMEOUT": ("failed", "walltime"),
    "OUT_OF_MEMORY": ("failed", "out_of_memory"),
    "NODE_FAIL": ("failed", "node_failure"),
    "BOOT_FAIL": ("failed", "node_failure"),
    "PREEMPTED": ("failed", "preempted"),
    "DEADLINE": ("failed", "deadline"),
    "CANCELLED": ("canceled", "canceled"),
    "REVOKED": ("canceled", "canceled"),
}
# A job that waits for these does not start until somebody does something.
HELD_REASONS = ("JobHeldUser", "JobHeldAdmin", "launch failed requeued held", "job requeued in held state")
# A job that FAILED for these never ran its program.
LAUNCH_REASONS = (
    "JobLaunchFailure",
    "BadConstraints",
    "InvalidAccount",
    "InvalidQOS",
    "Prolog",
    "RaisedSignal:53(Real-time_signal_19)",  # the job's folder or output file could not be opened
)
UNUSABLE = ("down", "drain", "fail", "maint", "unknown", "invalid", "inval", "power", "reboot", "perfctrs", "blocked")
SIGNAL_BIT = 128
LAUNCH_EXIT_CODE = SIGNAL_BIT + 53  # Slurm's own signal for a program that could not be started
CANCEL_MANY_MAX = 500
ARRAY_JOBS_MAX = 1000  # Slurm's own limit is 1,001 where nobody raised it

_FIELDS = (
    ("JobArrayID", 64),
    ("JobID", 32),
    ("State", 32),
    ("exit_code", 16),
    ("RestartCnt", 8),
    ("StartTime", 32),
    ("EndTime", 32),
    ("NodeList", 512),
    ("Reason", 512),
    ("Name", 128),
)
QUEUE_COMMAND = ["env", "SLURM_TIME_FORMAT=%s", "squeue", "-h", "-r", "-t", "all", "--me", "-O"]
QUEUE_COMMAND.append(",".join(f"{name}:{size}|" for name, size in _FIELDS))
# Options that would undo what the exactly-once promise, or the job's records, stand on.
RESERVED = frozenset(
    {
        "array",
        "batch",
        "chdir",
        "error",
        "export",
        "export-file",
        "gid",
        "job-name",
        "open-mode",
        "output",
        "parsable",
        "requeue",
        "test-only",
        "uid",
        "wait",
        "wrap",
    }
)
_GRES = re.compile(r"gpu(?::[A-Za-z0-9_.-]+)?:(\d+)")


def state(native: str, why: str) -> tuple[JobState, Reason]:
    """Return a state of Slurm and its reason in our words; an unknown state is taken for one that goes on."""
    word, reason = STATES.get(native.partition(" ")[0].rstrip("+"), ("active", ""))
    if word == "queued" and why.startswith(HELD_REASONS):
        word = "held"
    elif word == "failed" and reason == "exit_code" and why.startswith(LAUNCH_REASONS):
        reason = "launch"
    return word, reason


def exit_code(raw: int) -> int:
    """Return a wait status as an exit code, 128 more than the signal where one ended the job."""
    signal = raw & 0x7F
    return SIGNAL_BIT + signal if signal else raw >> 8


def parse_queue(text: str) -> dict[str, JobStatus]:
    """Return how each job is, by native id, from the output of ``QUEUE_COMMAND``; what is no line of it is skipped.

    A member of an array is there under ``1234_5``. No line can keep others from being read.
    """
    found: dict[str, JobStatus] = {}
    for line in text.splitlines():
        words = [word.strip() for word in line.split("|", len(_FIELDS))]
        if len(words) < len(_FIELDS):
            continue
        native_id, _, native, raw, restarts, start, end, nodes, why, _ = words[: len(_FIELDS)]
        word, reason = state(native, why)
        ended = word in ("completed", "failed", "canceled")
        code = exit_code(int(raw)) if raw.isdigit() and ended and word != "canceled" else None
        if word == "failed" and reason in ("exit_code", "launch") and SIGNAL_BIT < (code or 0) != LAUNCH_EXIT_CODE:
            reason = "signal"  # "JobLaunchFailure", too, where its program had begun and somebody killed it
        if word == "failed" and (code == 0 or reason not in ("exit_code", "signal")):
            code = None  # Slurm ended it, not its program
        found[native_id] = JobStatus(
            native_id=native_id,
            state=word,
            reason=reason,
            detail=native if why in ("", "None", "(null)") else f"{native}: {why}",
            exit_code=code,
            # One that was canceled as it waited is given a start, too, but no nodes.
            started_at=_instant(start) if nodes and word not in ("queued", "held") else None,
            ended_at=_instant(end) if ended else None,
            restarts=int(restarts) if restarts.isdigit() else 0,
            nodes=nodes,
        )
    return found


def parse_accounts(text: str) -> dict[str, JobStatus]:
    """Return how jobs ended from ``sacct -X -n -P --format=JobID,State,ExitCode,Start,End,NodeList``."""
    found: dict[str, JobStatus] = {}
    for line in text.splitlines():
        words = line.split("|")
        if len(words) != 6:
            continue
        native_id, native, code, start, end, nodes = words
        word, reason = state(native, "")
        status, _, signal = code.partition(":")
        number = int(status or 0) if signal in ("", "0") else SIGNAL_BIT + int(signal)
        ended = word in ("completed", "failed", "canceled")
        if word == "failed" and reason == "exit_code" and number > SIGNAL_BIT:
            reason = "signal"
        found[native_id] = JobStatus(
            native_id=native_id,
            state=word,
            reason=reason,
            detail=native,
            exit_code=number if word == "completed" or (number and reason in ("exit_code", "signal")) else None,
            started_at=_instant(start),
            ended_at=_instant(end) if ended else None,
            nodes=nodes,
        )
    return found


def parse_nodes(text: str) -> dict[str, tuple[str, int, int]]:
    """Return each node's state, GPUs and GPUs in use from ``sinfo -h -N -O`` with fields parted by ``|``."""
    found: dict[str, tuple[str, int, int]] = {}
    for line in text.splitlines():
        words = [word.strip() for word in line.split("|")]
        if len(words) >= 4:
            name, native, gres, used = words[:4]
            found[name] = (native, _gpus(gres), _gpus(used))  # a node of several partitions is told once for each
    return found


def is_open(text: str) -> bool:
    """Say from ``sinfo -h -o '%P|%a'`` whether jobs are taken: by the default partition, or by any where none is it."""
    states = dict(line.strip().split("|", 1) for line in text.splitlines() if "|" in line)
    default = [state for name, state in states.items() if name.endswith("*")]
    return "up" in (default or states.values())


def count(nodes: dict[str, tuple[str, int, int]], waiting: int, running: int, queue_open: bool, at: float) -> Capacity:
    """Return what a site has. A node with all GPUs taken may still be called mixed: free GPUs come from their count."""
    states: dict[str, int] = {}
    for native, _, _ in nodes.values():
        states[native] = states.get(native, 0) + 1
    usable = {name: node for name, node in nodes.items() if not _unusable(node[0])}
    return Capacity(
        at=at,
        nodes_total=len(nodes),
        nodes_free=sum(native == "idle" for native, _, _ in usable.values()),
        nodes_unusable=len(nodes) - len(usable),
        gpus_total=sum(gpus for _, gpus, _ in nodes.values()),
        gpus_free=sum(max(0, gpus - used) for _, gpus, used in usable.values()),
        jobs_waiting=waiting,
        jobs_running=running,
        queue_open=queue_open,
        states=states,
    )


def _unusable(native: str) -> bool:
    return native.endswith(("*", "~", "!", "%", "$", "@", "^")) or native.lower().startswith(UNUSABLE)


def _gpus(gres: str) -> int:
    return sum(int(number) for number in _GRES.findall(gres))


def _instant(text: str) -> float | None:
    return float(text) if text.isdigit() else None


class MendedSlurmExecutor(SlurmJobExecutor):
    """PSI/J's executor for Slurm, whose polling neither stops at a job that it does not know nor guesses how one ended.

    Also for use by itself: it passes PSI/J's own tests of executors.
    """

    _NAME_ = "slurm"
    _VERSION_ = "0.0.1"

    def __init__(self, url: str | None = None, config: Any = None) -> None:
        config = config or SlurmExecutorConfig()
        config.queue_polling_error_threshold = sys.maxsize  # a controller that is away has failed no job
        super().__init__(url, config)
        self.generator = TemplatedScriptGenerator(config, TEMPLATE)

    def generate_submit_script(self, job: psij.Job, context: dict[str, object], submit_file: IO[str]) -> None:
        """Write the script; the memory of a job is PSI/J's for all nodes, and Slurm's for one."""
        resources = cast(psij.ResourceSpecV1, cast(psij.JobSpec, job.spec).resources)
        if resources.memory_kb:
            context["memory_per_node_kib"] = max(1, resources.memory_kb // (resources.computed_node_count or 1))
        super().generate_submit_script(job, context, submit_file)

    def get_status_command(self, native_ids: Collection[str]) -> list[str]:
        """Ask for all jobs of this user: asking for one that was purged is an error."""
        return QUEUE_COMMAND

    def parse_status_output(self, exit_code: int, out: str) -> dict[str, psij.JobStatus]:
        """Return the status of all jobs; of those that are gone, what their exit code tells."""
        if exit_code != 0:
            raise RuntimeError(f"squeue: {out}")
        told = {native_id: psij_status(status) for native_id, status in parse_queue(out).items()}
        for native_id in list(self._queue_poll_thread._jobs):  # noqa: SLF001 - PSI/J is pinned
            if native_id not in told:
                told[native_id] = self._after_purge(native_id)
        return told

    def _after_purge(self, native_id: str) -> psij.JobStatus:
        if (self.work_directory / f"{native_id}.ec").exists():
            return psij.JobStatus(psij.JobState.COMPLETED)  # PSI/J reads the exit code there, and says FAILED by it
        return psij.JobStatus(psij.JobState.FAILED, message="unknown to Slurm, and without a record of its end")


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


class Slurm(Batch):
    """A site with Slurm."""

    def __init__(self, config: SiteConfig) -> None:
        super().__init__(config, MendedSlurmExecutor)
        self._accounts = True  # until sacct says that there are none

    async def submit(self, job: Submission) -> str:
        """See ``BatchSystem.submit``."""
        _check(job)
        return await super().submit(job)

    async def submit_array(self, array_id: str, jobs: Sequence[Submission]) -> dict[str, str]:
        """See ``BatchSystem.submit_array``: one array, whose members find what is theirs by their number."""
        for job in jobs:
            _check(job)
        return await asyncio.to_thread(self._submit_array, array_id, list(jobs))

    async def capacity(self) -> Capacity:
        """See ``BatchSystem.capacity``."""
        return await asyncio.to_thread(self._capacity)

    def look_up(self, name: str) -> list[str]:
        """See ``Batch.look_up``."""
        command = ["squeue", "-h", "-t", "all", "--me", f"--name={name}", "-o", "%F"]
        found = set(run_command(self.config, command).split())
        if not found and self._accounts:
            lines = self._sacct(f"--name={name}", "--starttime=now-7days", "--format=JobID")
            found = {line.partition("_")[0] for line in lines}
        return sorted(found, key=int)

    def queue(self, native_ids: Sequence[str]) -> dict[str, JobStatus]:
        """See ``Batch.queue``."""
        return parse_queue(run_command(self.config, QUEUE_COMMAND))

    def after_purge(self, native_id: str) -> JobStatus | None:
        """See ``Batch.after_purge``."""
        lines = self._sacct("-j", native_id, "--format=JobID,State,ExitCode,Start,End,NodeList")
        return parse_accounts("\n".join(lines)).get(native_id)

    def _sacct(self, *arguments: str) -> list[str]:
        if not self._accounts:
            return []
        try:
            return run_command(
                self.config, ["env", "SLURM_TIME_FORMAT=%s", "sacct", "-X", "-n", "-P", *arguments]
            ).splitlines()
        except Failed as error:
            if "disabled" in error.output:
                self._accounts = False
                return []
            raise SiteUnreachable(f"{self.config.name}: {error.output}", hint="Is slurmdbd up?") from error

    def _submit_array(self, array_id: str, jobs: list[Submission]) -> dict[str, str]:
        first, name = jobs[0], native_name(array_id)
        group = Submission(job_id=array_id, spec=_array_spec(jobs), folder=first.folder.parent / name)
        records = Records(group.folder)
        records.prepare("", "")
        for number, job in enumerate(jobs):
            Records(job.folder).prepare(job.before, job.after)
            (group.folder / f"{number}.sh").write_text(self._member_script(job))
        made = psij_job(self.config, group, self.config.kind, single=True)
        spec = cast(psij.JobSpec, made.spec)
        spec.executable, spec.arguments = "/bin/bash", ["-c", f'exec bash {group.folder}/"$SLURM_ARRAY_TASK_ID".sh']
        spec.pre_launch = spec.post_launch = None  # each member has its own
        spec.stdout_path = spec.stderr_path = Path("/dev/null")
        spec.attributes.set_custom_attribute("slurm.array", f"0-{len(jobs) - 1}")
        array = self._once(name, records, made)
        native = {job.job_id: f"{array}_{number}" for number, job in enumerate(jobs)}
        for job in jobs:
            Records(job.folder).note_native_id(native[job.job_id])
        return native

    def _member_script(self, job: Submission) -> str:
        """Return what one member of an array does: what it would do as a job of its own."""
        made = psij_job(self.config, job, self.config.kind)
        launcher = self._executor._get_launcher_from_job(made)  # noqa: SLF001 - PSI/J is pinned
        launch = launcher.get_launch_command(made)
        where = shlex.quote(str(job.spec.directory or job.folder))
        lines = [f"export {name}={shlex.quote(value)}" for name, value in environment(self.config, job).items()]
        return "\n".join([f"cd {where} || exit", *lines, f"exec {shlex.join(launch)}", ""])

    def _cancel(self, native_ids: Sequence[str]) -> None:
        for begin in range(0, len(native_ids), CANCEL_MANY_MAX):
            try:
                run_command(self.config, ["scancel", "-Q", *native_ids[begin : begin + CANCEL_MANY_MAX]])
            except Failed as error:
                raise SiteUnreachable(f"{self.config.name}: {error.output}", hint="Is the controller up?") from error

    def _capacity(self) -> Capacity:
        partition = ["-p", self.config.queue] if self.config.queue else []
        try:
            nodes = run_command(
                self.config,
                ["sinfo", "-h", "-N", *partition, "-O", "NodeList:128|,StateLong:32|,Gres:512|,GresUsed:512|"],
            )
            queue = run_command(self.config, ["squeue", "-h", "-r", *partition, "-t", "PD,R", "-o", "%T"])
            partitions = run_command(self.config, ["sinfo", "-h", *partition, "-o", "%P|%a"])
        except Failed as error:
            raise SiteUnreachable(f"{self.config.name}: {error.output}", hint="Is the controller up?") from error
        words = queue.split()
        return count(
            parse_nodes(nodes), words.count("PENDING"), words.count("RUNNING"), is_open(partitions), self._now()
        )


def _check(job: Submission) -> None:
    """Refuse options that would undo what the platform promises of a job."""
    for name in job.spec.attributes.custom_attributes:
        kind, _, option = name.partition(".")
        if kind == "slurm" and (option in RESERVED or not option):
            raise BadRequest(f"attributes: {name} is set by Headrace", hint="Leave it out.")


def _array_spec(jobs: Sequence[Submission]) -> JobSpec:
    """Return the specification of an array: what all its members have in common."""
    first = jobs[0].spec
    if len(jobs) > ARRAY_JOBS_MAX:
        raise TooLarge(f"an array of {len(jobs)} jobs; at most {ARRAY_JOBS_MAX}", hint="Submit several.")
    for job in jobs:
        if (job.spec.resources, job.spec.attributes) != (first.resources, first.attributes):
            raise BadRequest(
                f"jobs {jobs[0].job_id} and {job.job_id} need different resources or attributes",
                hint="Only jobs of one shape can be one array.",
            )
    return JobSpec(executable="/bin/bash", resources=first.resources, attributes=first.attributes)
