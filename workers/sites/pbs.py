"""PBS: PBS Professional and OpenPBS (``pbs``), and TORQUE and other older ones (``pbs_classic``).

What the words mean: PBS Professional's Reference Guide, "Job States" and "Job Exit Status Codes", and
https://docs.adaptivecomputing.com/torque/6-1-2/adminGuide/Content/topics/torque/2-jobs/jobExitStatus.htm
Both are asked in the plain format of ``qstat -f``: TORQUE has no JSON, and that of PBS Professional cannot be read
where a job's environment holds what JSON would have to escape.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import ClassVar

import psij
from psij.executors.batch.pbs_base import GenericPBSJobExecutor

from headrace.jobs import Reason
from headrace.model import JobState
from workers.sites.arrays import ArrayBatch
from workers.sites.base import SIGNAL_BIT, JobStatus, SiteConfig, Submission, is_signal
from workers.sites.batch import Batch, refuse
from workers.sites.executors import Mended, run_command

STATES: dict[str, JobState] = {
    "B": "active",  # an array that has begun
    "E": "active",  # it has ended, and is being cleaned up after
    "H": "held",
    "M": "queued",  # moved to another server
    "Q": "queued",
    "R": "active",
    "S": "held",  # suspended
    "T": "queued",
    "U": "held",  # suspended by the owner of the workstation
    "W": "queued",
}
ENDED = frozenset("FXC")  # finished, a member of an array that is gone, and TORQUE's completed
# Below 0, a status is that of PBS and not of the program. All others: its program could not be started.
PBS_PRO: dict[int, Reason] = {
    **dict.fromkeys((-4, -5, -6, -14, -20, -30), "node_failure"),  # its node began anew, or lost touch
    **dict.fromkeys((-11, -12, -15), "preempted"),  # run again, or kept for later
    **dict.fromkeys((-24, -25), "signal"),  # more processors than it may
    **dict.fromkeys((-26, -27), "out_of_memory"),
    **dict.fromkeys((-28, -29), "walltime"),
}
TORQUE: dict[int, Reason] = {
    **dict.fromkeys((-4, -5, -6), "node_failure"),
    -10: "out_of_memory",
    **dict.fromkeys((-11, -12), "walltime"),
}
SIGNALED = 256  # and the signal: the job's script itself was ended by it
DELETED = "91"  # the substate of a job that somebody deleted; TORQUE tells no substate of one that has ended
TELLS_SUBSTATE = frozenset({"91", "92", "93", "94"})
DELETES_WITH = (9, 15)
RESERVED = frozenset("CINJSVehjkortxz")  # options that would undo what the job's records and its name stand on

_UNKNOWN = re.compile(r"unknown job id|has finished|history", re.IGNORECASE)
_UNIT = {"b": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40}
_SIZE = re.compile(r"(\d+)([kmgt]?b)")


def parse_jobs(text: str) -> dict[str, dict[str, str]]:
    """Return what ``qstat -f`` tells of each job, by native id. A long value goes on after a line break and a tab."""
    found: dict[str, dict[str, str]] = {}
    attributes: dict[str, str] = {}
    for line in text.replace("\n\t", "").splitlines():
        if line.startswith("Job Id:"):
            attributes = found.setdefault(line.removeprefix("Job Id:").strip(), {})
        elif line.startswith("    ") and " = " in line:
            name, _, value = line.strip().partition(" = ")
            attributes[name.casefold()] = value
    return found


def job_status(native_id: str, told: Mapping[str, str], reasons: Mapping[int, Reason]) -> JobStatus:
    """Return how a job is. An unknown state is taken for one that goes on."""
    native, substate = told.get("job_state", ""), told.get("substate")
    comment, name = told.get("comment", ""), told.get("job_name", "")
    detail = f"{native}: {comment}" if comment else native
    nodes = ",".join(dict.fromkeys(host.partition("/")[0] for host in told.get("exec_host", "").split("+")))
    runs = told.get("run_count", told.get("start_count", "1"))
    restarts = max(0, int(runs) - 1) if runs.isdigit() else 0
    if native not in ENDED:
        word = STATES.get(native, "active")
        return JobStatus(native_id=native_id, state=word, detail=detail, restarts=restarts, nodes=nodes, name=name)
    word, reason, code = _end(told, substate, reasons)
    return JobStatus(
        native_id=native_id,
        state=word,
        reason=reason,
        detail=detail,
        exit_code=code,
        restarts=restarts,
        nodes=nodes,
        name=name,
    )


def _end(
    told: Mapping[str, str], substate: str | None, reasons: Mapping[int, Reason]
) -> tuple[JobState, Reason, int | None]:
    try:
        status = int(told["exit_status"])
    except (KeyError, ValueError):  # it never ran
        return ("canceled", "canceled", None) if substate in (None, DELETED) else ("failed", "launch", None)
    if status < 0:
        return "failed", reasons.get(status, "launch"), None
    if status == 0:
        return ("canceled", "canceled", None) if substate == DELETED else ("completed", "", 0)
    if status <= SIGNALED:
        return "failed", "signal" if is_signal(status) else "exit_code", status
    # The script was ended, and not only its program: by PBS for a limit, by somebody, or by the kernel.
    signal = status - SIGNALED
    if _over(told, "walltime", _seconds):
        return "failed", "walltime", None
    if _over(told, "mem", _bytes) or _over(told, "vmem", _bytes):
        return "failed", "out_of_memory", None
    if substate == DELETED or (substate not in TELLS_SUBSTATE and signal in DELETES_WITH):
        return "canceled", "canceled", None
    return "failed", "signal", SIGNAL_BIT + signal


def _over(told: Mapping[str, str], resource: str, read: Callable[[str], int]) -> bool:
    """Say whether a job used all that it may of a resource: not every version says that it ended a job for it."""
    used, limit = told.get(f"resources_used.{resource}"), told.get(f"resource_list.{resource}")
    return used is not None and limit is not None and read(used) >= read(limit) > 0


def _seconds(text: str) -> int:
    seconds = 0
    for part in text.split(":"):
        seconds = seconds * 60 + (int(part) if part.isdigit() else 0)
    return seconds


def _bytes(text: str) -> int:
    found = _SIZE.fullmatch(text.casefold())
    return int(found[1]) * _UNIT[found[2]] if found else 0


class MendedClassicExecutor(Mended, GenericPBSJobExecutor):
    """PSI/J's executor for TORQUE and its like, asking in a format that they have."""

    _NAME_ = "pbs_classic"
    TEMPLATE = "pbs.mustache"
    REASONS: ClassVar[Mapping[int, Reason]] = TORQUE
    STATUS: ClassVar[list[str]] = ["qstat", "-f"]
    SELECT: ClassVar[list[str]] = ["qselect"]

    def context(self, job: psij.Job) -> dict[str, object]:
        """See ``Mended.context``."""
        return {**super().context(job), "classic": True}

    def get_status_command(self, native_ids: Collection[str]) -> list[str]:
        """Ask for these jobs."""
        return [*self.STATUS, *native_ids]

    def get_list_command(self) -> list[str]:
        """Ask for the ids of all jobs, whole: a table of jobs has room for a part of them."""
        return self.SELECT

    def parse_list_output(self, out: str) -> list[str]:
        """Return the ids."""
        return out.split()

    def read(self, text: str) -> dict[str, JobStatus]:
        """See ``Mended.read``."""
        return {native_id: job_status(native_id, told, self.REASONS) for native_id, told in parse_jobs(text).items()}


class MendedPBSExecutor(MendedClassicExecutor):
    """PSI/J's executor for PBS Professional and OpenPBS, which tell of ended jobs, too, if they are asked to."""

    _NAME_ = "pbs"
    REASONS = PBS_PRO
    STATUS: ClassVar[list[str]] = ["qstat", "-x", "-f"]
    SELECT: ClassVar[list[str]] = ["qselect", "-x"]

    def context(self, job: psij.Job) -> dict[str, object]:
        """See ``Mended.context``."""
        return {**super().context(job), "classic": False}


class PBSClassic(Batch):
    """A site with TORQUE or another older PBS. Its nodes are not known, and its arrays not used: nothing tests them."""

    EXECUTOR: ClassVar[type[MendedClassicExecutor]] = MendedClassicExecutor
    _executor: MendedClassicExecutor

    def __init__(self, config: SiteConfig) -> None:
        super().__init__(config, self.EXECUTOR)

    def check(self, job: Submission) -> None:
        """See ``Batch.check``."""
        refuse(job, "pbs", _reserved)

    def look_up(self, name: str, *, ever: bool) -> list[str]:
        """See ``Batch.look_up``."""
        return sorted(run_command(self.config, [*self._executor.SELECT, "-N", name]).split(), key=_number)

    def queue(self, native_ids: Sequence[str]) -> dict[str, JobStatus]:
        """See ``Batch.queue``."""
        return self._executor.read(self.ask(self._executor.STATUS, native_ids, _UNKNOWN))


class PBS(PBSClassic, ArrayBatch):
    """A site with PBS Professional or OpenPBS. Its nodes are not known."""

    EXECUTOR = MendedPBSExecutor
    INDEX = "PBS_ARRAY_INDEX"

    def mark_array(self, spec: psij.JobSpec, numbers: str) -> None:
        """See ``ArrayBatch.mark_array``."""
        spec.attributes.set_custom_attribute("pbs.J", numbers)

    def member(self, array: str, number: int) -> str:
        """See ``ArrayBatch.member``: the array is 12[].server, and its member 12[3].server."""
        return array.replace("[]", f"[{number}]", 1)


def _reserved(option: str) -> bool:
    """Say whether an option is ours. All have one letter, and what stands behind it is another one, or its value."""
    return len(option) > 1 or option in RESERVED


def _number(native_id: str) -> int:
    found = re.match(r"\d+", native_id)
    return int(found[0]) if found else 0
