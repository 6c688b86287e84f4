"""F14: functions that never end: one counts, one ignores signals, one blocks in C with the interpreter locked."""

from __future__ import annotations

from infra.chaos import hostile
from infra.chaos.lines import Figure, Result
from infra.chaos.trial import Case, Trial

KINDS = ("busy", "deaf", "stuck")
EACH = 10
OVERSHOOT_S = 1.0
SLOT_BACK_S = 2.0


async def run(trial: Trial) -> Result:
    """With one slot, post an endless one and an instant one right behind it, so that the slot tells when it is back."""
    each = trial.n(EACH, 1)
    async with trial.platform(options=["--workers", "1"]) as up:
        await trial.deploy(up.url, up.token, hostile.PATH)
        pairs: list[tuple[str, str]] = []
        trial.say(f"{each} times {', '.join(KINDS)}, on one slot")
        for _ in range(each):
            for kind in KINDS:
                first = trial.load(up, total=1, rate_per_s=1.0, mix={kind: 1.0}, deadline="60s")
                await trial.drive(first)
                behind = trial.load(up, total=1, rate_per_s=1.0, mix={"instant": 1.0}, deadline="60s")
                await trial.drive(behind)
                pairs.append((first.name, behind.name))
                await trial.read_back(up)
        verdict = await trial.check(up, expected={kind: ["failed"] for kind in KINDS})
    over_s = max(verdict.ran_most_s.get(kind, 0.0) for kind in KINDS) - hostile.TIMEOUT_S
    at = {reply.id.rpartition("-")[0]: reply.at for reply in trial.replies() if reply.answered == "accepted"}
    # From when its time was up to when the one behind it had run.
    back_s = max(at[b] + verdict.by_load[b].most_s - at[a] - hostile.TIMEOUT_S for a, b in pairs)
    timeouts = sum(verdict.deaths.get(f"{kind}: timeout", 0) for kind in KINDS)
    return Result(
        verdict=verdict,
        figures=[
            Figure(
                name="ended dead, kind timeout",
                value=f"{timeouts} of {each * len(KINDS)} ({', '.join(verdict.deaths)})",
                bar="all",
                good=timeouts == each * len(KINDS),
            ),
            Figure(
                name="time past the limit, most",
                value=f"{over_s:.2f} s",
                bar=f"< {OVERSHOOT_S:g} s",
                good=over_s < OVERSHOOT_S,
            ),
            Figure(
                name="slot back after the limit, most",
                value=f"{back_s:.2f} s",
                bar=f"< {SLOT_BACK_S:g} s",
                good=back_s < SLOT_BACK_S,
            ),
        ],
        notes=["sleep in an uninterruptible system call (fuse) was not tried"],
    )


CASE = Case(name="F14", title="functions that never end", run=run)
