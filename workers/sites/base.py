"""What every batch system can be asked, in the words of PSI/J and IRI.

    SiteError
    ├── SiteUnreachable   it does not answer now; nothing was changed that is not told
    ├── SubmitUnsure      it did not say whether it took the job; ask again, and it is looked for first
    ├── SubmitBusy        it takes no more jobs of ours now
    └── SubmitRejected    it will never take this job as it is

The first three are transient: the same call made again is right. A call that is cut off by the death of its process
may be made again, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import msgspec
from msgspec import Struct

from headrace.errors import HeadraceError
from headrace.jobs import JobSpec, Reason
from headrace.model import JobState

FINAL: frozenset[JobState] = frozenset({"completed", "failed", "canceled"})
JOB_S_DEFAULT = 600.0
ARRAY_KINDS = frozenset({"slurm", "pbs", "lsf"})
ARRAY_JOBS_MAX = 1000  # Slurm's own limit is 1,001 where nobody raised it, and LSF's 1,000
SIGNAL_BIT = 128
SIGNAL_MAX = 64
KEEP_S_DEFAULT = 7 * 86400.0


class SiteError(HeadraceError):
    """A batch system did not do what it was asked to."""

    title = "A site did not do what it was asked to"


class SiteUnreachable(SiteError):
    """The batch system does not answer now."""

    title = "The batch system does not answer"
    transient = True


class SubmitUnsure(SiteError):
    """It is not known whether the job was submitted; the next call looks for it first."""

    title = "It is not known whether the job was submitted"
    transient = True


class SubmitBusy(SiteError):
    """The batch system takes no more jobs of this user or account now."""

    title = "The batch system takes no more jobs now"
    transient = True


class SubmitRejected(SiteError):
    """The batch system will never take this job as it is; the message is its own."""

    title = "The batch system refused the job"


class SiteConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A site as its operator describes it.

    ``work`` is a folder that the compute nodes see, too. ``environment`` is for the batch system's own commands,
    ``job_environment`` for every job, such as a PATH with the site's Python. ``queue``, ``account`` and ``duration_s``
    are for jobs that do not say. ``container`` is the program that runs images, None where there is none. A submission
    of unknown fate is looked for during ``settle_s`` before it is made again, and a job that the batch system no longer
    names is taken for gone after ``unseen_s``. ``jobs_max`` is how many jobs of ours it has at once, waiting or
    running; None is as many as there are, and on a machine without a queue one for each of its cores. The folders of
    jobs are kept for ``keep_s`` after the last change in them.
    """

    name: str
    kind: str
    work: str
    environment: dict[str, str] = {}
    job_environment: dict[str, str] = {}
    queue: str | None = None
    account: str | None = None
    duration_s: float = JOB_S_DEFAULT
    launcher: str | None = None
    container: Literal["apptainer", "podman"] | None = None
    settle_s: float = 15.0
    unseen_s: float = 60.0
    command_s: float = 30.0
    jobs_max: int | None = None
    keep_s: float = KEEP_S_DEFAULT


class Submission(Struct, frozen=True, kw_only=True):
    """A job to submit. ``folder`` is its own: nothing else may be in it, and the same job always has the same one.

    ``before`` and ``after`` are lines of bash that run on the job's first node beside its program, such as those that
    tell the platform of its start and its end. A failure in them does not touch the job.
    """

    job_id: str
    spec: JobSpec
    folder: Path
    before: str = ""
    after: str = ""


class Known(Struct, frozen=True, kw_only=True):
    """A job that was submitted; ``limit_s`` is the most it may run."""

    job_id: str
    native_id: str
    folder: Path
    limit_s: float | None = None


class JobStatus(Struct, frozen=True, kw_only=True):
    """How a job is. ``detail`` holds the batch system's own words; instants are seconds since 1970.

    ``native_id`` may differ from the one asked for where a job was submitted twice: it is the one whose program ran.
    ``exit_code`` is that of its program, 128 more than the signal where one ended it. ``name`` is what the batch system
    calls the job, where it tells.
    """

    native_id: str
    state: JobState
    reason: Reason = ""
    detail: str = ""
    exit_code: int | None = None
    started_at: float | None = None
    ended_at: float | None = None
    restarts: int = 0
    nodes: str = ""
    name: str = ""


class Capacity(Struct, frozen=True, kw_only=True):
    """What a site has at the instant ``at``. ``unusable`` nodes are drained, down or do not answer.

    A GPU is free if no job has it and its node can be used. ``states`` counts nodes by the batch system's own words.
    """

    at: float
    nodes_total: int
    nodes_free: int
    nodes_unusable: int
    gpus_total: int
    gpus_free: int
    jobs_waiting: int
    jobs_running: int
    queue_open: bool = True
    states: dict[str, int] = msgspec.field(default_factory=dict)


class BatchSystem(Protocol):
    """One site's batch system. No method holds up the event loop; all may be called again after any error."""

    config: SiteConfig

    async def submit(self, job: Submission) -> str:
        """Return the native id of this job, which then exists exactly once: it looks before it submits.

        Raises:
            SiteUnreachable, SubmitUnsure, SubmitBusy: not now; the same call may be made again.
            SubmitRejected: never.
        """
        ...

    async def submit_array(self, array_id: str, jobs: Sequence[Submission]) -> dict[str, str]:
        """Submit jobs that differ only in arguments, environment and folder, at once where the batch system can.

        Returns:
            The native id of each, by job id.

        Raises:
            As ``submit``; none of the jobs is submitted then, or all are found by the next call.
        """
        ...

    async def find(self, job_id: str, folder: Path, place: int | None = None) -> str | None:
        """Return the native id of a job if it was ever submitted, looked up by its name where no record tells.

        Of an array it is that of the job that was submitted at this ``place`` of it, the first one being 0.

        Raises:
            SiteUnreachable: it cannot be looked up now.
        """
        ...

    async def status(self, jobs: Sequence[Known]) -> Mapping[str, JobStatus]:
        """Return how each job is, by job id, from one look at the queue.

        Raises:
            SiteUnreachable: it cannot be told now, and nothing may be concluded.
        """
        ...

    async def cancel(self, jobs: Sequence[Known]) -> None:
        """End jobs; those that have ended already are left as they are, and so is what has their ids by now.

        Raises:
            SiteUnreachable: it cannot be done now.
        """
        ...

    async def capacity(self) -> Capacity | None:
        """Return what the site has and what is free; None where the batch system cannot be asked.

        Raises:
            SiteUnreachable: it does not answer now.
        """
        ...


def is_signal(exit_code: int) -> bool:
    """Say whether a shell tells of a signal with this exit code; above those there are exit codes again, up to 255."""
    return SIGNAL_BIT < exit_code <= SIGNAL_BIT + SIGNAL_MAX
