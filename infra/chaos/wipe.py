"""F5: Redis is killed and comes back empty, under load and then in peace; the read model is rebuilt from the log."""

from __future__ import annotations

from infra.chaos import measure
from infra.chaos.faces import REDIS
from infra.chaos.launch import Up
from infra.chaos.lines import Figure, Result, Step
from infra.chaos.trial import Case, Trial

TRIGGERS = 10_000
RATE_PER_S = 200.0
WIPES = 3
BAR_PER_S = 15_000.0
GAP_S_MAX = 1.0


async def run(trial: Trial) -> Result:
    """Wipe under load, wait for the end, wipe again, and compare key by key."""
    triggers = trial.n(TRIGGERS, 60)
    lasts_s = triggers / RATE_PER_S
    steps = [Step(after_s=lasts_s / (WIPES + 1), act="kill", who=REDIS) for _ in range(WIPES)]
    async with trial.platform() as up:
        load = trial.load(
            up, total=triggers, rate_per_s=RATE_PER_S, reads_per_s=10.0, mix={"instant": 0.8, "chained": 0.2}
        )
        async with trial.driving(load), trial.nemesis(up, steps=steps):
            trial.say(f"{triggers:,} triggers, redis wiped {WIPES} times")
        await trial.read_back(up)
        verdict = await trial.check(up)
        differing, rebuilt_s, equal_s, events = await _again(trial, up)
    gap_s = measure.longest_gap(trial.replies())
    per_s = events / rebuilt_s if rebuilt_s else 0.0
    return Result(
        verdict=verdict,
        kills=trial.kills(),
        figures=[
            Figure(
                name=f"rebuild of {events:,} events of the log",
                value=f"{per_s:,.0f} events/s",
                bar=f">= {BAR_PER_S:,.0f}/s",
                good=per_s >= BAR_PER_S,
            ),
            Figure(name="kill of Redis to equal", value=f"{equal_s:.2f} s"),
            Figure(
                name="keys that differ after the rebuild",
                value=f"{len(differing)}{': ' + ', '.join(differing[:5]) if differing else ''}",
                bar="0",
                good=not differing,
            ),
            Figure(
                name="longest time without a 202 while Redis was wiped",
                value=f"{gap_s:.2f} s",
                bar=f"< {GAP_S_MAX:g} s",
                good=gap_s < GAP_S_MAX,
            ),
        ],
    )


async def _again(trial: Trial, up: Up) -> tuple[list[str], float, float, int]:
    """Wipe once more in peace; return the keys that differ, seconds of rebuilding, seconds to equal, and events."""
    async with measure.read_model(up) as client:
        reached = await measure.position(client)
        before = await measure.contents(client)
    async with trial.nemesis(up, steps=[Step(after_s=0.0, act="kill", who=REDIS)]):
        pass
    killed_at = measure.hits_of(trial.hits(), "kill")[-1].at
    async with measure.read_model(up) as client:
        back_at, equal_at = await measure.until_position(client, reached)
        after = await measure.contents(client)
    return measure.differing(before, after), equal_at - back_at, equal_at - killed_at, reached


CASE = Case(name="F5", title="Redis wiped, rebuilt from the log", run=run)
