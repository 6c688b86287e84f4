"""PBS and LSF through PSI/J: what one has to know of them beyond it is how to look a job up by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import psij
from psij.executors.batch.batch_scheduler_executor import BatchSchedulerExecutor
from psij.executors.batch.lsf import LsfJobExecutor
from psij.executors.batch.pbs import PBSJobExecutor
from psij.executors.batch.pbs_classic import PBSClassicJobExecutor

from headrace.model import JobState
from workers.sites.base import JobStatus, SiteConfig, SiteUnreachable
from workers.sites.batch import Batch
from workers.sites.executors import run_command

EXECUTORS: dict[str, type[BatchSchedulerExecutor]] = {
    "pbs": PBSJobExecutor,
    "pbs_classic": PBSClassicJobExecutor,
    "lsf": LsfJobExecutor,
}
# A job is named there after its script, which PSI/J calls NAME.job. Ended jobs are looked for, too.
LOOK_UP: dict[str, Callable[[str], list[str]]] = {
    "pbs": lambda name: ["qselect", "-x", "-N", f"{name}.job"],
    "pbs_classic": lambda name: ["qselect", "-N", f"{name}.job"],
    "lsf": lambda name: ["bjobs", "-a", "-noheader", "-o", "jobid", "-J", f"{name}.job"],
}
STATES: dict[psij.JobState, JobState] = {
    psij.JobState.NEW: "new",
    psij.JobState.QUEUED: "queued",
    psij.JobState.ACTIVE: "active",
    psij.JobState.COMPLETED: "completed",
    psij.JobState.FAILED: "failed",
    psij.JobState.CANCELED: "canceled",
}


class Portable(Batch):
    """A site with PBS or LSF. Its arrays are not used, and its nodes are not known."""

    def __init__(self, config: SiteConfig) -> None:
        super().__init__(config, EXECUTORS[config.kind])

    def look_up(self, name: str) -> list[str]:
        """See ``Batch.look_up``."""
        return run_command(self.config, LOOK_UP[self.config.kind](name)).split()

    def queue(self, native_ids: Sequence[str]) -> dict[str, JobStatus]:
        """See ``Batch.queue``."""
        out = run_command(self.config, self._executor.get_status_command(native_ids))
        try:
            told = self._executor.parse_status_output(0, out)
        except (AssertionError, KeyError, ValueError) as error:
            raise SiteUnreachable(
                f"{self.config.name}: PSI/J cannot read what the queue says: {error!r}", hint="Nothing is concluded."
            ) from error
        return {
            native_id: JobStatus(
                native_id=native_id,
                state=STATES[status.state],
                reason="canceled" if status.state == psij.JobState.CANCELED else "",
                detail=status.message or "",
            )
            for native_id, status in told.items()
        }
