"""All cases, in the order in which they are run."""

from __future__ import annotations

from infra.chaos import (
    away,
    batch,
    bombs,
    cluster,
    disk,
    endless,
    greed,
    kills,
    overload,
    pauses,
    poisoned,
    power,
    results,
    stalled,
    wipe,
)
from infra.chaos.trial import Case

CASES: list[Case] = [
    kills.CASE,
    power.CASE,
    cluster.CASE,
    wipe.CASE,
    away.CASE,
    disk.CASE,
    stalled.CASE,
    poisoned.CASE,
    overload.CASE,
    greed.CASE,
    endless.CASE,
    bombs.CASE,
    results.CASE,
    pauses.CASE,
    batch.CASE,
]
