"""F1: any process is killed at a random moment, again and again, while triggers come in."""

from __future__ import annotations

from infra.chaos.faces import EVERYBODY, SUPERVISOR
from infra.chaos.lines import Figure, Result
from infra.chaos.measure import gap
from infra.chaos.trial import Case, Trial

TRIGGERS = 10_000
QUIET = 1_000
KILLS = 200
GAP_S = 1.5
RATE_PER_S_MAX = 200.0
SUPERVISOR_SHARE = 0.05
READS_PER_S = 5.0
PATIENCE_S = 180.0


async def run(trial: Trial) -> Result:
    """Post in peace, post while all are killed, and look at what is left."""
    triggers, kills, quiet = trial.n(TRIGGERS, 60), trial.n(KILLS, 12), trial.n(QUIET, 60)
    rate_per_s = min(RATE_PER_S_MAX, triggers / (kills * GAP_S))
    weights = {who: 1.0 for who in EVERYBODY if who != SUPERVISOR}
    weights[SUPERVISOR] = SUPERVISOR_SHARE * len(weights)
    async with trial.platform() as up:
        calm = trial.load(up, total=quiet, rate_per_s=rate_per_s)
        await trial.drive(calm)
        load = trial.load(
            up, total=triggers, rate_per_s=rate_per_s, reads_per_s=READS_PER_S, patience_s=PATIENCE_S, deadline="60s"
        )
        async with trial.driving(load), trial.nemesis(up, kills=kills, gap_s=GAP_S, weights=weights):
            trial.say(f"{triggers:,} triggers at {rate_per_s:.0f}/s, {kills} kills")
        await trial.read_back(up, patience_s=PATIENCE_S)
        verdict = await trial.check(up)
        restarts = up.restarts
    hits = trial.hits()
    by_name = {who: sum(h.who == who and h.pid > 0 for h in hits) for who in EVERYBODY}
    before, during = verdict.by_load[calm.name], verdict.by_load[load.name]
    return Result(
        verdict=verdict,
        kills=trial.kills(),
        figures=[
            Figure(name="kills by process", value=", ".join(f"{who} {n}" for who, n in by_name.items())),
            Figure(name="supervisor started again by hand", value=str(restarts)),
            Figure(name="acceptance to end in peace, p50 and p99", value=f"{before.p50_s:.2f} s, {before.p99_s:.2f} s"),
            Figure(
                name="acceptance to end under kills, p50 and p99",
                value=f"{during.p50_s:.2f} s, {during.p99_s:.2f} s",
                bar="p99 < 2x in peace",
                good=during.p99_s < 2 * before.p99_s,
            ),
            gap([r for r in trial.replies() if r.id.startswith(load.name)]),
            Figure(
                name="runs that did not succeed", value=str(verdict.unexpected), bar="0", good=verdict.unexpected == 0
            ),
        ],
    )


CASE = Case(name="F1", title="any process killed at random", run=run)
