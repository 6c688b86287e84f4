"""When the allocation ends that a pilot runs in: what somebody says, or what the batch system knows."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

from headrace.clock import parse_deadline
from headrace.errors import HeadraceError

ASK_S = 30.0
JOB_ID = "SLURM_JOB_ID"
HINT = 'Say when it ends: --until 2026-11-21T18:00:00Z, or --until "55m" from now.'


class NoAllocation(HeadraceError):
    """It is not known when the allocation ends, so nothing can be said to fit into it."""

    title = "The end of the allocation is not known"


def ends_at(until: str | None, environ: Mapping[str, str], now: float) -> float:
    """Return the epoch second at which the allocation of this process ends.

    Args:
        until: what somebody says: an instant, or how long from now.
        environ: where Slurm says which job this is.
        now: epoch seconds.

    Raises:
        NoAllocation: nobody says it, or that is over.
        BadRequest: ``until`` is neither an instant nor a duration.
    """
    end = _asked(environ) if until is None else parse_deadline(until, now)
    if end <= now:
        raise NoAllocation(f"the allocation ended {now - end:.0f} s ago", hint=HINT)
    return end


def _asked(environ: Mapping[str, str]) -> float:
    job = environ.get(JOB_ID)
    if not job:
        raise NoAllocation(f"{JOB_ID} is not set: this is no job of Slurm", hint=HINT)
    try:
        ran = subprocess.run(
            ["/usr/bin/env", "squeue", "-h", "-j", job, "-o", "%e"],
            env={**environ, "SLURM_TIME_FORMAT": "%s"},
            capture_output=True,
            text=True,
            timeout=ASK_S,
            check=True,
        )
        return float(ran.stdout.strip())
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise NoAllocation(f"Slurm does not say when job {job} ends: {error}", hint=HINT) from error
