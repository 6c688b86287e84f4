"""Slurm: its states in our words, one look for all jobs, arrays, nodes and GPUs; and PSI/J's executor, mended.

What the words mean: https://slurm.schedmd.com/squeue.html and https://slurm.schedmd.com/job_reason_codes.html
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import cast

import msgspec
import psij
from psij.executors.batch.slurm import SlurmJobExecutor

from headrace.jobs import Reason
from headrace.model import JobState
from workers.sites.arrays import ArrayBatch
from workers.sites.base import (
    SIGNAL_BIT,
    Capacity,
    JobStatus,
    Known,
    SiteConfig,
    SiteUnreachable,
    Submission,
    is_signal,
)
from workers.sites.batch import ASK_MANY_MAX, NOT_BEGUN_DETAIL, abbreviates, away, refuse
from workers.sites.executors import Failed, Mended, Missing, run_command
from workers.sites.records import Records, tail

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
LAUNCH_EXIT_CODE = SIGNAL_BIT + 53  # Slurm's own signal for a program that could not be started
# What slurmd says of a job or step that it ended for its memory, itself or through the kernel's control groups.
OUT_OF_MEMORY = re.compile(r"exceeded (job |step )?memory limit|oom[-_ ]kill", re.IGNORECASE)

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
        "clusters",  # it would wait where nobody looks
        "error",
        "export",
        "export-file",
        "gid",
        "help",
        "job-name",
        "open-mode",
        "output",
        "parsable",
        "quiet",
        "requeue",
        "test-only",
        "uid",
        "usage",
        "version",
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
        native_id, _, native, raw, restarts, start, end, nodes, why, name = words[: len(_FIELDS)]
        word, reason = state(native, why)
        ended = word in ("completed", "failed", "canceled")
        code = exit_code(int(raw)) if raw.isdigit() and ended and word != "canceled" else None
        if word == "failed" and reason in ("exit_code", "launch") and is_signal(code or 0) and code != LAUNCH_EXIT_CODE:
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
            name=name,
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
        if word == "failed" and reason == "exit_code" and is_signal(number):
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


class MendedSlurmExecutor(Mended, SlurmJobExecutor):
    """PSI/J's executor for Slurm, whose polling stops at no job that it does not know, and guesses no end."""

    _NAME_ = "slurm"
    TEMPLATE = "slurm.mustache"

    def context(self, job: psij.Job) -> dict[str, object]:
        """See ``Mended.context``; ``%``-words of Slurm stand for a job's native id."""
        attributes = cast(psij.JobSpec, job.spec).attributes
        array = "slurm.array" in (attributes.custom_attributes or {})
        return {**super().context(job), "native": "%A_%a" if array else "%j"}

    def get_status_command(self, native_ids: Collection[str]) -> list[str]:
        """Ask for all jobs of this user: asking for one that was purged is an error."""
        return QUEUE_COMMAND

    def read(self, text: str) -> dict[str, JobStatus]:
        """See ``Mended.read``."""
        return parse_queue(text)


class Slurm(ArrayBatch):
    """A site with Slurm."""

    def __init__(self, config: SiteConfig) -> None:
        super().__init__(config, MendedSlurmExecutor)
        self._accounts = True  # until sacct says that there are none

    INDEX = "SLURM_ARRAY_TASK_ID"

    def mark_array(self, spec: psij.JobSpec, numbers: str) -> None:
        """See ``ArrayBatch.mark_array``."""
        spec.attributes.set_custom_attribute("slurm.array", numbers)

    def member(self, array: str, number: int) -> str:
        """See ``ArrayBatch.member``."""
        return f"{array}_{number}"

    def check(self, job: Submission) -> None:
        """See ``Batch.check``."""
        refuse(job, "slurm", abbreviates(RESERVED))

    async def capacity(self) -> Capacity:
        """See ``BatchSystem.capacity``."""
        return await self.beside(self._capacity)

    def look_up(self, name: str, *, ever: bool) -> list[str]:
        """See ``Batch.look_up``."""
        command = ["squeue", "-h", "-t", "all", "--me", f"--name={name}", "-o", "%F"]
        found = set(run_command(self.config, command).split())
        if not found and ever:
            lines = self._sacct(f"--name={name}", "--starttime=now-7days", "--format=JobID")
            found = {line.partition("_")[0] for line in lines}
        return sorted(found, key=int)

    def queue(self, native_ids: Sequence[str]) -> dict[str, JobStatus]:
        """See ``Batch.queue``."""
        return parse_queue(run_command(self.config, QUEUE_COMMAND))

    def explain(self, job: Known, status: JobStatus) -> JobStatus:
        """See ``Batch.explain``.

        Slurm has a state for a job that its control groups ended for its memory. Where slurmd itself watches the memory
        (``OverMemoryKill``), or a step of the job was ended and not the job, the state is that of any killed program,
        and Slurm says why on the standard error of the job or of the step only.
        """
        if status.detail == NOT_BEGUN_DETAIL:
            last = tail(self._error_file(job, status.native_id)).strip().splitlines()[-1:]
            return msgspec.structs.replace(status, detail=": ".join([status.detail, *last]))
        if status.state != "failed" or status.reason not in ("signal", "exit_code"):
            return status
        said = tail(self._error_file(job, status.native_id)) + tail(Records(job.folder).stderr)
        found = OUT_OF_MEMORY.search(said)
        if found is None:
            return status
        return msgspec.structs.replace(status, reason="out_of_memory", detail=f"{status.detail}: {found[0]}")

    def _error_file(self, job: Known, native_id: str) -> Path:
        """Return what Slurm itself writes to: beside the records of the job, or of the array that it belongs to."""
        records = Records(job.folder)
        if "_" in native_id:
            records = Records(job.folder.parent / records.native_name())
        return records.path / f"{native_id}.err"

    def after_purge(self, native_ids: Sequence[str]) -> dict[str, JobStatus]:
        """See ``Batch.after_purge``."""
        fields = "--format=JobID,State,ExitCode,Start,End,NodeList"
        parts = (native_ids[begin : begin + ASK_MANY_MAX] for begin in range(0, len(native_ids), ASK_MANY_MAX))
        lines = [line for part in parts for line in self._sacct("-j", ",".join(part), fields)]
        return parse_accounts("\n".join(lines))

    def _sacct(self, *arguments: str) -> list[str]:
        if not self._accounts:
            return []
        try:
            return run_command(
                self.config, ["env", "SLURM_TIME_FORMAT=%s", "sacct", "-X", "-n", "-P", *arguments]
            ).splitlines()
        except Missing:
            self._accounts = False
            return []
        except Failed as error:
            if "disabled" in error.output:
                self._accounts = False
                return []
            raise SiteUnreachable(f"{self.config.name}: {error.output}", hint="Is slurmdbd up?") from error

    def end(self, native_ids: Sequence[str]) -> None:
        """See ``Batch.end``."""
        for begin in range(0, len(native_ids), ASK_MANY_MAX):
            try:
                run_command(self.config, ["scancel", "-Q", *native_ids[begin : begin + ASK_MANY_MAX]])
            except Failed as error:
                raise away(self.config, error) from error

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
            raise away(self.config, error) from error
        words = queue.split()
        return count(
            parse_nodes(nodes), words.count("PENDING"), words.count("RUNNING"), is_open(partitions), self._now()
        )
