"""F15: a function forks until it is stopped, one leaves children behind, one writes to stdout without an end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

from infra.chaos import hostile
from infra.chaos.faces import words_of
from infra.chaos.lines import Figure, Result
from infra.chaos.trial import Case, Trial
from infra.rights import WORKER

TIMES = 5
KEPT_BYTES = 1024**2
SETTLE_S = 5.0
KINDS = ("bomb", "detached", "noisy")


async def run(trial: Trial) -> Result:
    """Let each do its worst, and count what is left."""
    times = trial.n(TIMES, 1)
    pids = trial.folder / "pids"
    extra = {kind: {"pids": str(pids)} for kind in KINDS}
    async with trial.platform() as up:
        await trial.deploy(up.url, up.token, hostile.PATH)
        worker = up.pids()[WORKER]
        trial.say(f"{times} times {', '.join(KINDS)}; a bomb forks {hostile.FORKS_MAX} times at most")
        for kind in KINDS:
            await trial.drive(trial.load(up, total=times, rate_per_s=2.0, mix={kind: 1.0}, extra=extra, deadline="60s"))
        good = trial.load(up, total=20, rate_per_s=20.0, mix={"instant": 1.0}, deadline="60s")
        await trial.drive(good)
        await trial.read_back(up)
        verdict = await trial.check(
            up, expected={"bomb": ["succeeded", "failed"], "detached": ["succeeded", "failed"], "noisy": ["failed"]}
        )
        await asyncio.sleep(SETTLE_S)
        left = _alive(pids)
        alive = up.pids().get(WORKER) == worker
    for pid in left:  # nothing that a trial began outlives it
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    begun = len(pids.read_text().split()) if pids.exists() else 0
    return Result(
        verdict=verdict,
        figures=[
            Figure(name=f"processes left of {begun} that got away", value=str(len(left)), bar="0", good=not left),
            Figure(name="the worker is still the same process", value=str(alive), bar="True", good=alive),
            Figure(
                name="bytes of output kept of one run, most",
                value=f"{verdict.note_bytes_most:,}",
                bar=f"<= {KEPT_BYTES:,}",
                good=verdict.note_bytes_most <= 1.1 * KEPT_BYTES,
            ),
            Figure(name="how they ended", value=", ".join(f"{k} {n}" for k, n in verdict.deaths.items()) or "well"),
        ],
    )


def _alive(pids: Path) -> list[int]:
    if not pids.exists():
        return []
    return [int(pid) for pid in pids.read_text().split() if "headrace.zygote" in words_of(int(pid))]


CASE = Case(name="F15", title="fork bombs, children left behind, endless output", run=run)
