"""F13: a function takes four gigabytes, again and again, beside others that behave."""

from __future__ import annotations

from infra.chaos import hostile
from infra.chaos.faces import EVERYBODY
from infra.chaos.lines import Figure, Result
from infra.chaos.trial import Case, Trial

GREEDY = 100
GOOD = 500
RATE_PER_S = 5.0


async def run(trial: Trial) -> Result:
    """Post both, and look at verdicts, neighbours and processes."""
    greedy, good = trial.n(GREEDY, 5), trial.n(GOOD, 25)
    async with trial.platform() as up:
        await trial.deploy(up.url, up.token, hostile.PATH)
        before = up.pids()
        clean = trial.load(up, total=good, rate_per_s=RATE_PER_S * good / greedy, mix={"instant": 1.0})
        dirty = trial.load(up, total=greedy, rate_per_s=RATE_PER_S, mix={"greedy": 1.0}, deadline="60s")
        async with trial.driving(clean), trial.driving(dirty):
            trial.say(f"{greedy} times 4 GB, {good} good ones")
        await trial.read_back(up)
        verdict = await trial.check(up, expected={"greedy": ["failed"]})
        after = up.pids()
    changed = [who for who in EVERYBODY if before.get(who) != after.get(who)]
    dead = {what: n for what, n in verdict.deaths.items() if what.startswith("greedy:")}
    hurt = verdict.unexpected + verdict.late
    return Result(
        verdict=verdict,
        figures=[
            Figure(
                name="greedy ones that ended dead, with their reason",
                value=f"{sum(dead.values())} of {greedy} ({', '.join(dead)})",
                bar="all",
                good=sum(dead.values()) == greedy,
            ),
            Figure(name="neighbours hurt (not well, or late)", value=str(hurt), bar="0", good=hurt == 0),
            Figure(name="processes restarted", value=str(len(changed)), bar="0", good=not changed),
        ],
    )


CASE = Case(name="F13", title="4 GB in a function, over and over", run=run)
