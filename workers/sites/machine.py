"""What this machine has, found without PSI/J: an agent that has had no job yet costs next to nothing."""

from __future__ import annotations

import os
from pathlib import Path


def gpus() -> int:
    """Return how many of NVIDIA's devices there are."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def places(jobs_max: int | None) -> int:
    """Return how many jobs run at once: one for each core where nobody said otherwise."""
    return jobs_max or os.cpu_count() or 1
