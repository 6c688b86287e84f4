"""F7: the disk gets full under the log, first by what is accepted, then by somebody else and to the last byte.

The data folder lies on a small file system in memory. A ballast file on it is what an operator removes later; a filler
is what somebody else writes there. Triggers have to be refused before the log stalls, nothing may be promised that is
not kept, and once there is room again everything has to go on by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from pathlib import Path

from infra.chaos.island import Island, cannot_mount
from infra.chaos.lines import Figure, Result
from infra.chaos.trial import Case, Trial

FULL = "unavailable"
DISK_BYTES = 64 * 1024**2
BALLAST_BYTES = 20 * 1024**2
FLOOR_BYTES = 20 * 1024**2
PAYLOAD_BYTES = 24 * 1024
TRIGGERS = 1200
RATE_PER_S = 200.0
SLOW_S = 0.5
# More that takes its time than two slots can do meanwhile: there is work to end while nothing can be written.
MIX = {"instant": 0.88, "chained": 0.08, "slow": 0.04}
FULL_S = 8.0
FULL_SHORT_S = 2.0
PATIENCE_S = 60.0
STEP_S = 0.05
REFUSED_MAX_S = 2.0
RECOVERED_MAX_S = 10.0


async def run(trial: Trial) -> Result:
    """Fill the disk by accepting, then to the last byte, make room, and look at what is left."""
    mounts = [("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "data", str(trial.folder / "disk"))]
    env = {"HEADRACE_DISK_BYTES_MIN": str(FLOOR_BYTES)}
    async with Island(trial.folder / "disk", mounts, env=env) as island:
        await trial.deploy(island.url, island.token)
        ballast = island.data / "ballast"
        ballast.write_bytes(b"\0" * BALLAST_BYTES)
        before = island.pids()
        load = trial.load(
            island,
            total=TRIGGERS,
            rate_per_s=RATE_PER_S,
            mix=MIX,
            extra={route: {"padding": "x" * PAYLOAD_BYTES, "takes_s": SLOW_S} for route in MIX},
            patience_s=PATIENCE_S,
            deadline="10m",  # so that nothing is refused because it would be late
        )
        async with trial.driving(load):
            refused_at = await _first_refusal(trial)
            trial.say(f"refused after {sum(r.answered == 'accepted' for r in trial.replies()):,} were accepted")
            filler = island.data / "filler"
            await asyncio.to_thread(_fill, filler)
            full_at = time.time()
            await asyncio.sleep(FULL_S if trial.scale >= 1.0 else FULL_SHORT_S)
            filler.unlink()
            ballast.unlink()
            room_at = time.time()
            trial.say(f"the disk was full for {room_at - full_at:.1f} s")
        await trial.read_back(island)
        verdict = await trial.check(island)
        same = {who for who, pid in before.items() if island.pids().get(who) == pid}
    replies = trial.replies()
    refusals = [reply for reply in replies if reply.slug == FULL]
    last_before = max(r.at for r in replies if r.answered == "accepted" and r.at <= refused_at)
    first_after = min((r.at for r in replies if r.answered == "accepted" and r.at > room_at), default=float("inf"))
    polite = sum(r.retry_after_s is not None for r in refusals)
    slowest = max(r.took_s for r in replies if r.at <= full_at)
    return Result(
        verdict=verdict,
        figures=[
            Figure(
                name="promised on the full disk and not kept", value=str(verdict.lost), bar="0", good=not verdict.lost
            ),
            Figure(
                name="from the last promise to the first 503",
                value=f"{refused_at - last_before:.2f} s",
                bar=f"< {REFUSED_MAX_S:g} s",
                good=refused_at - last_before < REFUSED_MAX_S,
            ),
            Figure(
                name="slowest reply while the disk filled up",
                value=f"{slowest:.2f} s",
                bar=f"< {REFUSED_MAX_S:g} s",
                good=slowest < REFUSED_MAX_S,
            ),
            Figure(
                name="503 with Retry-After",
                value=f"{polite:,} of {len(refusals):,}",
                bar="all",
                good=polite == len(refusals) > 0,
            ),
            Figure(
                name="from room on the disk to the first promise",
                value=f"{first_after - room_at:.2f} s",
                bar=f"< {RECOVERED_MAX_S:g} s",
                good=first_after - room_at < RECOVERED_MAX_S,
            ),
            Figure(name="processes that went on all the time", value=", ".join(sorted(same))),
        ],
    )


async def _first_refusal(trial: Trial) -> float:
    """Return the instant of the first 503 (epoch seconds).

    Raises:
        AssertionError: the disk could not be filled; the sizes above do not fit together.
    """
    give_up_at = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up_at:
        found = [reply.at for reply in trial.replies() if reply.slug == FULL]
        if found:
            return min(found)
        await asyncio.sleep(STEP_S)
    raise AssertionError(f"no trigger was refused within {PATIENCE_S:g} s")


def _fill(path: Path) -> None:
    """Write until nothing fits any more, in ever smaller pieces."""
    with path.open("wb", buffering=0) as filler:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    if filler.write(b"\0" * size) < size:
                        raise OSError(errno.ENOSPC, "full")


def probe() -> str:
    """Return why no disk can be filled here."""
    return cannot_mount(loop=False)


CASE = Case(name="F7", title="disk full under the log", run=run, probe=probe)
