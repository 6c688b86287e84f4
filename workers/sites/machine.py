"""What this machine has, found without PSI/J: an agent that has had no job yet costs next to nothing."""

from __future__ import annotations

import os
from pathlib import Path

from headrace.jobs import Resources
from workers.sites.base import SubmitRejected


def gpus() -> int:
    """Return how many of NVIDIA's devices there are."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def places(jobs_max: int | None) -> int:
    """Return how many jobs run at once: one for each core where nobody said otherwise."""
    return jobs_max or os.cpu_count() or 1


def check(site: str, wanted: Resources, gpus_total: int) -> None:
    """Refuse what this machine does not have. What others use of it is not looked at: a place is all a job is given.

    Raises:
        SubmitRejected: there are not as many nodes, cores or GPUs, or not as much memory.
    """
    has = {
        "nodes": (wanted.nodes, 1),
        "GPUs": (wanted.gpus, gpus_total),
        "cores": (wanted.processes * (wanted.cpu_cores_per_process or 0), os.cpu_count() or 1),
        "bytes of memory": (wanted.memory or 0, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
    }
    for what, (asked, there) in has.items():
        if asked > there:
            raise SubmitRejected(
                f"{site} has {there} {what}, and the job asks for {asked}.",
                hint="Ask for less, or send it to another site.",
            )
