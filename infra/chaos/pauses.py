"""F19: a process stands still for twice its lease and then goes on as if nothing had happened."""

from __future__ import annotations

from infra.chaos.lines import Figure, Result, Step
from infra.chaos.measure import gap
from infra.chaos.trial import Case, Trial
from infra.rights import GATEWAY, LEDGER, WORKER
from streams.topology import ACK_WAIT_S

ROUNDS = 3
RATE_PER_S = 20.0
HOLD_S = 2 * ACK_WAIT_S + 1.0
BETWEEN_S = 3.0
TAKES_S = 2.0


async def run(trial: Trial) -> Result:
    """Pause worker, gateway and ledger in turn; a second worker takes over what the first one had in its hand."""
    rounds = trial.n(ROUNDS, 1)
    # At small scales the worker alone: it is the one that holds a lease.
    turn = (WORKER, GATEWAY, LEDGER) if trial.scale >= 0.3 else (WORKER,)
    steps = [Step(after_s=BETWEEN_S, act="pause", who=who, hold_s=HOLD_S) for who in turn * rounds]
    lasts_s = len(steps) * (HOLD_S + BETWEEN_S) + BETWEEN_S
    async with trial.platform() as up, trial.second_worker(up):
        load = trial.load(
            up,
            total=round(lasts_s * RATE_PER_S),
            rate_per_s=RATE_PER_S,
            mix={"instant": 0.7, "chained": 0.2, "slow": 0.1},
            extra={"slow": {"takes_s": TAKES_S}},
            deadline="60s",
            reads_per_s=5.0,
        )
        trial.say(f"{load.total:,} triggers, {len(steps)} pauses of {HOLD_S:g} s (a lease is {ACK_WAIT_S:g} s)")
        async with trial.driving(load), trial.nemesis(up, steps=steps):
            pass
        await trial.read_back(up)
        verdict = await trial.check(up)
    pauses = sum(hit.act == "pause" and hit.pid > 0 for hit in trial.hits())
    return Result(
        verdict=verdict,
        figures=[
            Figure(name="pauses", value=f"{pauses} of {len(steps)}", good=pauses == len(steps)),
            Figure(
                name="bodies that ran again because their worker stood still; stale outcomes of theirs in the log",
                value=f"{verdict.bodies_again}; {verdict.stale}",
                bar="0 stale",
                good=verdict.stale == 0,
            ),
            gap(trial.replies()),
            Figure(
                name="runs that did not succeed", value=str(verdict.unexpected), bar="0", good=verdict.unexpected == 0
            ),
        ],
    )


CASE = Case(name="F19", title="pauses of twice the lease", run=run)
