"""Flux: its results and exceptions in our words, and an executor for its commands in PSI/J's frame of batch systems.

PSI/J's own executor for Flux needs Flux's Python bindings where the agent runs, and a thread that holds every job; it
cannot look one up by its name. Here Flux is asked by its commands, as the others are.

What the words mean: https://flux-framework.readthedocs.io/projects/flux-core, flux-batch(1) and flux-jobs(1), and
https://flux-framework.readthedocs.io/projects/flux-rfc, RFC 21.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import cast

import psij
from psij import Launcher
from psij.launchers import MultipleLauncher

from headrace.jobs import Reason
from headrace.model import JobState
from workers.sites.base import SIGNAL_BIT, JobStatus, SiteConfig, Submission, is_signal
from workers.sites.batch import Batch, abbreviates, refuse
from workers.sites.executors import Mended, run_command

LAUNCHER = "flux"

STATES: dict[str, JobState] = {
    "NEW": "queued",
    "DEPEND": "queued",
    "PRIORITY": "queued",
    "SCHED": "queued",
    "RUN": "active",
    "CLEANUP": "active",
    "COMPLETED": "completed",
    "FAILED": "failed",
    "CANCELED": "canceled",
    "TIMEOUT": "failed",
}
# The types of the exceptions that end a job. One that none ended failed by its own exit code.
REASONS: dict[str, Reason] = {
    "timeout": "walltime",
    "cancel": "canceled",
    "node-failure": "node_failure",
    "preempt": "preempted",
    "exec": "launch",
    "alloc": "launch",
    "dependency": "launch",
}
LOST = "lost contact"  # in the note of an ``exec`` exception: the node is gone
FIELDS = (
    "id.dec",
    "status",
    "urgency",
    "returncode",
    "t_run",
    "t_cleanup",
    "nodelist",
    "exception.type",
    "exception.severity",
    "name",
    "exception.note",
)
LIST_COMMAND = ["flux", "jobs", "-n", "--format", "|".join(f"{{{field}}}" for field in FIELDS)]
# Flux lists a thousand where nobody says otherwise.
LOOK_UP = ["flux", "jobs", "-a", "-n", "--count=0", "--format", "{id.dec}"]
RESERVED = frozenset(
    {
        *("bcc", "cc", "cwd", "dry-run", "error", "flags", "help", "input", "job-name", "output", "quiet", "setattr"),
        *("wait", "watch", "wrap"),
    }
)

_UNKNOWN = re.compile(r"unknown|not found", re.IGNORECASE)


def parse_jobs(text: str) -> dict[str, JobStatus]:
    """Return how each job is, by its id in digits, from what ``LIST_COMMAND`` prints; other lines are skipped."""
    found = {}
    for line in text.splitlines():
        words = [word.strip() for word in line.split("|", len(FIELDS) - 1)]
        if len(words) < len(FIELDS):
            continue
        native_id, native, urgency, code, began, ended, nodes, kind, severity, name, note = words
        word, reason = _end(native, kind, severity, note, code)
        if word == "queued" and urgency == "0":
            word = "held"
        final = word in ("completed", "failed", "canceled")
        own = word == "completed" or reason in ("exit_code", "signal")
        said = f"{native}: {kind}: {note}" if note else f"{native}: {kind}" if kind else native
        found[native_id] = JobStatus(
            native_id=native_id,
            state=word,
            reason=reason,
            detail=said,
            exit_code=_exit_code(code) if final and own else None,
            started_at=_instant(began),
            ended_at=_instant(ended) if final else None,
            nodes=nodes,
            name=name,
        )
    return found


def _end(native: str, kind: str, severity: str, note: str, code: str) -> tuple[JobState, Reason]:
    word = STATES.get(native, "active")
    if word == "canceled":
        return word, "canceled"
    if word != "failed":
        return word, ""
    if native == "TIMEOUT":
        return word, "walltime"
    if kind == "node-failure" or (kind == "exec" and LOST in note):
        return word, "node_failure"
    if kind and severity == "0" and kind in REASONS:
        return word, REASONS[kind]
    return word, "signal" if is_signal(_exit_code(code) or 0) else "exit_code"


def _exit_code(text: str) -> int | None:
    """Return an exit code, 128 more than the signal where Flux tells one as a number below 0."""
    try:
        code = int(text)
    except ValueError:
        return None
    return code if code >= 0 else SIGNAL_BIT - code


def _instant(text: str) -> float | None:
    try:
        return float(text) or None
    except ValueError:
        return None


class FluxLauncher(MultipleLauncher):
    """Starts the processes of a job with ``flux run``."""

    def __init__(self, config: psij.JobExecutorConfig) -> None:
        super().__init__(Path(__file__).with_name("flux_launch.sh"), config)

    def get_additional_args(self, job: psij.Job) -> list[str]:
        """Return the shape of the job, as one word for the script."""
        resources = cast(psij.ResourceSpecV1, cast(psij.JobSpec, job.spec).resources)
        shape = [f"--nodes={resources.computed_node_count}", f"--ntasks={resources.computed_process_count}"]
        if resources.cpu_cores_per_process:
            shape.append(f"--cores-per-task={resources.cpu_cores_per_process}")
        if resources.gpu_cores_per_process:
            shape.append(f"--gpus-per-task={resources.gpu_cores_per_process}")
        return [" ".join(shape)]


class FluxCommandExecutor(Mended):
    """An executor for Flux that needs its commands and nothing else."""

    _NAME_ = "flux"
    TEMPLATE = "flux.mustache"

    def get_submit_command(self, job: psij.Job, submit_file_path: Path) -> list[str]:
        """See PSI/J's ``BatchSchedulerExecutor``, here and below."""
        return ["flux", "batch", str(submit_file_path.absolute())]

    def job_id_from_submit_output(self, out: str) -> str:
        """Return the id in digits, which every one of Flux's commands takes, and file names and terminals, too."""
        return self._run_command(["flux", "job", "id", "--to=dec", out.split()[-1]]).strip()

    def get_cancel_command(self, native_id: str) -> list[str]:
        """See above."""
        return ["flux", "cancel", native_id]

    def process_cancel_command_output(self, exit_code: int, out: str) -> None:
        """See above."""
        if "inactive" not in out:
            raise psij.SubmitException(out)

    def get_status_command(self, native_ids: Collection[str]) -> list[str]:
        """Ask for these jobs, ended ones too."""
        return [*LIST_COMMAND, *native_ids]

    def get_list_command(self) -> list[str]:
        """See above."""
        return LOOK_UP

    def read(self, text: str) -> dict[str, JobStatus]:
        """See ``Mended.read``."""
        return parse_jobs(text)

    def _get_launcher(self, name: str, version_constraint: str | None = None) -> Launcher:
        return self.new_launcher(name, self.config)

    def new_launcher(self, name: str, config: psij.JobExecutorConfig) -> Launcher:
        """See ``Mended.new_launcher``."""
        return FluxLauncher(config) if name == LAUNCHER else super().new_launcher(name, config)


class Flux(Batch):
    """A site with Flux. Its nodes are not known, and it has no arrays: it takes hundreds of jobs in a second.

    Flux gives out nodes, cores and GPUs. Of memory it knows nothing: what a job says it needs of it is left out, and
    one that is ended for its memory was ended by a signal.
    """

    def __init__(self, config: SiteConfig) -> None:
        super().__init__(config, FluxCommandExecutor)

    def check(self, job: Submission) -> None:
        """See ``Batch.check``."""
        refuse(job, "flux", abbreviates(RESERVED))

    def look_up(self, name: str, *, ever: bool) -> list[str]:
        """See ``Batch.look_up``; ids of Flux grow with time."""
        return sorted(run_command(self.config, [*LOOK_UP, f"--name={name}"]).split(), key=int)

    def queue(self, native_ids: Sequence[str]) -> dict[str, JobStatus]:
        """See ``Batch.queue``."""
        return parse_jobs(self.ask(LIST_COMMAND, native_ids, _UNKNOWN))
