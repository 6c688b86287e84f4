"""F6: Redis stands still for a minute: it takes connections and answers nobody."""

from __future__ import annotations

from infra.chaos import measure
from infra.chaos.faces import REDIS
from infra.chaos.lines import Figure, Listing, Read, Result, Step
from infra.chaos.trial import Case, Trial

AWAY_S = 60.0
RATE_PER_S = 100.0
READS_PER_S = 20.0
LISTS_PER_S = 5.0
HANGS_S = 5.0
ALLOWED = 1.10


async def run(trial: Trial) -> Result:
    """Post and read for a while, then the same while Redis is away."""
    away_s = max(6.0, AWAY_S * trial.scale)
    total = round(2 * away_s * RATE_PER_S)
    async with trial.platform() as up:
        await trial.drive(trial.load(up, total=100, rate_per_s=RATE_PER_S, mix={"instant": 1.0}))  # children are born
        load = trial.load(
            up,
            total=total,
            rate_per_s=RATE_PER_S,
            mix={"instant": 0.9, "chained": 0.1},
            reads_per_s=READS_PER_S,
            lists_per_s=LISTS_PER_S,
        )
        step = Step(after_s=away_s, act="pause", who=REDIS, hold_s=away_s)
        async with trial.driving(load), trial.nemesis(up, steps=[step]):
            trial.say(f"{total:,} triggers, Redis away for {away_s:g} s")
        await trial.read_back(up)
        verdict = await trial.check(up)
    (pause,) = measure.hits_of(trial.hits(), "pause")
    replies = [r for r in trial.replies() if r.id.startswith(load.name)]
    with_redis = measure.door([r for r in replies if r.at < pause.at])
    without = measure.door([r for r in replies if pause.at <= r.at < pause.at + away_s])
    reads = [r for r in trial.lines() if isinstance(r, Read) and pause.at <= r.at < pause.at + away_s]
    lists = [r for r in trial.lines() if isinstance(r, Listing) and pause.at <= r.at < pause.at + away_s]
    asked: list[Read | Listing] = [*reads, *lists]
    slowest_s = max((r.took_s for r in asked), default=0.0)
    statuses = sorted({r.status for r in lists})
    return Result(
        verdict=verdict,
        figures=[
            Figure(
                name="accept p99, Redis away against there",
                value=f"{without.p99_s * measure.MS:.1f} ms against {with_redis.p99_s * measure.MS:.1f} ms",
                bar="+10 %",
                good=without.p99_s <= ALLOWED * with_redis.p99_s,
            ),
            Figure(
                name=f"reads of {len(reads):,} runs, told right",
                value=f"{sum(r.status == 200 for r in reads):,}; 503: {sum(r.status == 503 for r in reads):,}",
                bar="all are right or 503",
                good=all(r.status in (200, 503) for r in reads) and verdict.wrong == 0,
            ),
            Figure(name="lists answered with", value=str(statuses), bar="200 or 503", good=set(statuses) <= {200, 503}),
            Figure(name="slowest read", value=f"{slowest_s:.2f} s", bar=f"< {HANGS_S:g} s", good=slowest_s < HANGS_S),
        ],
    )


CASE = Case(name="F6", title="Redis away for a minute", run=run)
