"""LSF: its states and its reasons for ending a job in our words, arrays, and PSI/J's executor, mended.

What the words mean: https://www.ibm.com/docs/en/spectrum-lsf/10.1.0, "bjobs" and "Termination reasons displayed by
bacct, bhist, and bjobs".
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import psij
from psij.executors.batch.lsf import LsfJobExecutor

from headrace.jobs import Reason
from headrace.model import JobState
from workers.sites.arrays import ArrayBatch
from workers.sites.base import JobStatus, SiteConfig, Submission, is_signal
from workers.sites.batch import refuse
from workers.sites.executors import Failed, Mended, run_command

STATES: dict[str, JobState] = {
    "PEND": "queued",
    "PROV": "queued",  # its host is being switched on
    "WAIT": "queued",  # a member of a chunk of jobs
    "PSUSP": "held",
    "USUSP": "held",
    "SSUSP": "held",
    "RUN": "active",
    "UNKWN": "active",  # LSF has lost touch with its host, which may come back
    "ZOMBI": "active",  # the same, and somebody has ended it meanwhile
    "DONE": "completed",
    "EXIT": "failed",
}
CANCELED = (
    *("TERM_OWNER", "TERM_ADMIN", "TERM_FORCE_OWNER", "TERM_FORCE_ADMIN", "TERM_BUCKET_KILL"),
    *("TERM_REMOVE_HUNG_JOB", "TERM_ORPHAN_SYSTEM"),
)
REASONS: dict[str, Reason] = {
    **dict.fromkeys(CANCELED, "canceled"),
    **dict.fromkeys(("TERM_RUNLIMIT", "TERM_CPULIMIT"), "walltime"),
    **dict.fromkeys(("TERM_MEMLIMIT", "TERM_SWAP"), "out_of_memory"),
    **dict.fromkeys(("TERM_ZOMBIE", "TERM_RMS", "TERM_SLURM"), "node_failure"),
    "TERM_DEADLINE": "deadline",
    **dict.fromkeys(
        (
            *("TERM_PREEMPT", "TERM_LOAD", "TERM_WINDOW", "TERM_OTHER", "TERM_CHKPNT", "TERM_RC", "TERM_MC_RECALL"),
            *("TERM_REQUEUE_OWNER", "TERM_REQUEUE_ADMIN", "TERM_REQUEUE_RC"),
        ),
        "preempted",
    ),
    **dict.fromkeys(("TERM_CWD_NOTEXIST", "TERM_PRE_EXEC_FAIL", "TERM_DATA", "TERM_CSM_ALLOC", "TERM_KUBE"), "launch"),
    **dict.fromkeys(("TERM_EXTERNAL_SIGNAL", "TERM_PROCESSLIMIT", "TERM_THREADLIMIT"), "signal"),
}
FIELDS = ("jobid", "jobindex", "stat", "exit_code", "exec_host", "job_name", "exit_reason", "pend_reason")
QUEUE_COMMAND = ["bjobs", "-a", "-noheader", "-o", f"{' '.join(FIELDS)} delimiter='|'"]
NOTHING = ("No job found", "No unfinished job found", "is not found")
RESERVED = frozenset(
    {
        *(
            "J",
            "rn",
            "r",
            "cwd",
            "o",
            "oo",
            "e",
            "eo",
            "i",
            "is",
            "I",
            "Ip",
            "Is",
            "ISs",
            "K",
            "env",
            "H",
            "Zs",
            "h",
            "V",
        ),
        *("Q", "pack", "jsdl", "jsdl_strict", "json", "yaml"),  # it runs again by itself, or is described elsewhere
    }
)


def parse_queue(text: str) -> dict[str, JobStatus]:
    """Return how each job is, by native id, from the output of ``QUEUE_COMMAND``; what is no line of it is skipped."""
    found = {}
    for line in text.splitlines():
        words = [word.strip() for word in line.split("|", len(FIELDS) - 1)]
        if len(words) < len(FIELDS):
            continue
        number, index, stat, code, hosts, name, exit_reason, pend_reason = words
        native_id = f"{number}[{index}]" if index not in ("", "-", "0") else number
        word: JobState = STATES.get(stat, "active")
        why = exit_reason if word == "failed" else pend_reason
        reason: Reason = ""
        exit_code = 0 if word == "completed" else None
        if word == "failed":
            reason = REASONS.get(exit_reason.partition(":")[0], "")
            if not reason or reason == "signal":
                exit_code = int(code) if code.isdigit() else None
                reason = "signal" if reason or is_signal(exit_code or 0) else "exit_code"
            if reason == "canceled":
                word = "canceled"
        found[native_id] = JobStatus(
            native_id=native_id,
            state=word,
            reason=reason,
            detail=f"{stat}: {why}" if why not in ("", "-") else stat,
            exit_code=exit_code,
            nodes=",".join(dict.fromkeys(host.partition("*")[2] or host for host in hosts.split(":") if host != "-")),
            name=name.partition("[")[0],  # that of an array has its numbers behind it
        )
    return found


class MendedLSFExecutor(Mended, LsfJobExecutor):
    """PSI/J's executor for LSF, which stops at the first job that LSF has a word about, and hands over no options."""

    _NAME_ = "lsf"
    TEMPLATE = "lsf.mustache"

    def get_submit_command(self, job: psij.Job, submit_file_path: Path) -> list[str]:
        """Hand the script over as input: as a file, LSF takes it for a program, and reads no options in it."""
        return ["/bin/sh", "-c", 'exec bsub <"$0"', str(submit_file_path.absolute())]

    def get_status_command(self, native_ids: Collection[str]) -> list[str]:
        """Ask for all jobs of this user: asking for one that was cleaned away is an error."""
        return QUEUE_COMMAND

    def read(self, text: str) -> dict[str, JobStatus]:
        """See ``Mended.read``."""
        return parse_queue(text)


class LSF(ArrayBatch):
    """A site with LSF. Its nodes are not known."""

    INDEX = "LSB_JOBINDEX"
    FIRST = 1

    def __init__(self, config: SiteConfig) -> None:
        super().__init__(config, MendedLSFExecutor)

    def mark_array(self, spec: psij.JobSpec, numbers: str) -> None:
        """See ``ArrayBatch.mark_array``: it stands in the name."""
        spec.name = f"{spec.name}[{numbers}]"

    def member(self, array: str, number: int) -> str:
        """See ``ArrayBatch.member``."""
        return f"{array}[{number}]"

    def check(self, job: Submission) -> None:
        """See ``Batch.check``."""
        refuse(job, "lsf", RESERVED.__contains__)

    def look_up(self, name: str, *, ever: bool) -> list[str]:
        """See ``Batch.look_up``."""
        found = self._bjobs(["bjobs", "-a", "-noheader", "-o", "jobid", "-J", name]).split()
        return sorted(set(found), key=int)

    def queue(self, native_ids: Sequence[str]) -> dict[str, JobStatus]:
        """See ``Batch.queue``."""
        return parse_queue(self._bjobs(QUEUE_COMMAND))

    def _bjobs(self, command: list[str]) -> str:
        try:
            return run_command(self.config, command)
        except Failed as error:
            if any(words in error.stderr for words in NOTHING):
                return error.printed
            raise
