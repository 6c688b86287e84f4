"""What the log holds of batch jobs beside what it holds of any invocation, and a row of the table of sites.

A job is an invocation whose body runs at a site: its work message goes to the site's agent and not to a worker, and
all else (leases, outcome, slot) is as of any other.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from headrace.model import SiteStatus
from headrace.wire import Expected, Move, Payload

JOB = "headrace.job"  # the function of an invocation that is a job; the dot keeps it apart from every name of a user
JOB_WORK = "application/vnd.headrace.job+msgpack"  # the content type of its payload

# "stopping": somebody ends the job, or its wrapper was killed; what became of it, the batch system tells.
ReportEvent = Literal["start", "heartbeat", "progress", "stopping", "end"]


class JobWork(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The payload of a job's invocation, never by claim check itself: what to run at which site, and what follows.

    ``spec`` is an encoded ``JobSpec`` (JSON), or the claim check of one; ``shape`` is what it has in common with jobs
    that take about as long, and ``limit_s`` the most it may run, in seconds, where it says so. ``then`` starts when the
    job has completed, ``on_failure`` when it has not; both get a ``JobEnd``, and their versions are those of the moment
    of submission. ``moves`` holds the newest moves from one site to another, oldest first; ``waits_since`` (epoch
    seconds) is when a job that was moved began to wait for the attempt that is next.
    """

    site: str
    spec: Payload
    then: str | None = None
    then_version: str = ""
    on_failure: str | None = None
    on_failure_version: str = ""
    shape: str = ""
    limit_s: float | None = None
    moves: list[Move] = []
    waits_since: float | None = None


class Submitted(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The batch system of a site has this job. Once this is in the log, the work message is acknowledged.

    ``secret_digest`` is the SHA-256 (hex) of the secret with which the job's wrapper reports; ``directory`` the job's
    own folder at the site; ``limit_s`` the most it may run, in seconds. ``first_at`` is when the first attempt was
    submitted, ``stage_in_s`` how long its inputs took. ``site_id`` is the ``id`` in the site's row.
    """

    run_id: str
    invocation_id: str
    site: str
    attempt: int
    native_id: str
    at: float
    agent: str
    directory: str = ""
    secret_digest: str = ""
    limit_s: float | None = None
    first_at: float | None = None
    stage_in_s: float = 0.0
    site_id: str = ""


class Held(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A job could not be submitted at its site at ``at``, and waits there to be tried again; ``why`` says what for."""

    run_id: str
    invocation_id: str
    site: str
    at: float
    why: str


class Report(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the wrapper of a job said through a gateway, by whose clock ``at`` is: a hint, never the truth."""

    run_id: str
    invocation_id: str
    site: str
    event: ReportEvent
    at: float
    attempt: int = 1
    exit_code: int | None = None
    fraction: float | None = None
    text: str = ""


class Waited(Struct, frozen=True, array_like=True):
    """How long a job of some shape waited in the queue of a site, in seconds, and when that was over."""

    shape: str
    wait_s: float
    at: float


class Incident(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A time in which a site was not up; it still is not where there is no ``ended_at``."""

    id: str
    status: SiteStatus
    began_at: float
    why: str
    ended_at: float | None = None


class SiteRecord(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a site is, as its agent last wrote it at ``at``; nodes, GPUs and jobs are None where it cannot be told.

    ``status`` is what the agent sees of the batch system, with its words in ``detail``; that an agent is silent, its
    readers see by ``at``. ``wait`` is how long jobs waited in the queue, ``containers`` the programs that run images.
    ``duration_max_s`` is the longest a job may run, ``duration_s`` how long one may that does not say. ``ends_at`` is
    when the site itself ends (a pilot in an allocation); with ``accepts`` False it takes no more jobs. ``waits`` holds
    the newest waits, ``incidents`` the newest incidents, both oldest first. ``id`` stands in the work folder, and tells
    this site from others that were given its name.
    """

    name: str
    kind: str
    at: float
    since: float
    id: str = ""
    agent: str = ""
    status: SiteStatus = "up"
    detail: str = ""
    accepts: bool = True
    nodes_total: int | None = None
    nodes_free: int | None = None
    nodes_unusable: int = 0
    gpus_total: int | None = None
    gpus_free: int | None = None
    jobs_waiting: int = 0
    jobs_running: int = 0
    queue_open: bool = True
    states: dict[str, int] = {}
    wait: Expected | None = None
    containers: list[str] = []
    duration_max_s: float | None = None
    duration_s: float | None = None
    ends_at: float | None = None
    waits: list[Waited] = []
    incidents: list[Incident] = []
