"""F10: events that kill the process of their function each time, among good ones."""

from __future__ import annotations

from infra.chaos.faces import ZYGOTE
from infra.chaos.lines import Figure, Result
from infra.chaos.trial import Case, Trial
from infra.rights import WORKER

GOOD = 1_000
POISONED = 10
RATE_PER_S = 50.0
ATTEMPTS_MAX = 3  # of `poison` in effects.py: one and two retries


async def run(trial: Trial) -> Result:
    """Post both kinds, and look at how the bad ones ended and whether the good ones noticed."""
    good, bad = trial.n(GOOD, 60), trial.n(POISONED, 3)
    async with trial.platform() as up:
        before = up.pids()
        mix = {"instant": 0.8, "chained": 0.2}
        clean, dirty = (
            trial.load(up, total=good, rate_per_s=RATE_PER_S, mix=mix),
            trial.load(up, total=bad, rate_per_s=RATE_PER_S * bad / good, mix={"poison": 1.0}),
        )
        async with trial.driving(clean), trial.driving(dirty):
            trial.say(f"{bad} poisoned among {good:,} good ones")
        await trial.read_back(up)
        verdict = await trial.check(up, expected={"poison": ["failed"]})
        after = up.pids()
    same = all(before.get(who) == after.get(who) for who in (WORKER, ZYGOTE))
    dead = sum(n for what, n in verdict.deaths.items() if what.startswith("poison:"))
    attempts = verdict.attempts_most.get("poison", 0)
    return Result(
        verdict=verdict,
        figures=[
            Figure(
                name="poisoned events that ended dead, with their reason",
                value=f"{dead} of {bad} ({', '.join(verdict.deaths) or 'none'})",
                bar="all",
                good=dead == bad,
            ),
            Figure(
                name="attempts of a poisoned event, most",
                value=str(attempts),
                bar=f"<= {ATTEMPTS_MAX}",
                good=attempts <= ATTEMPTS_MAX,
            ),
            Figure(name="seconds from acceptance to dead, most", value=f"{verdict.by_route['poison'].most_s:.2f} s"),
            Figure(name="good ones late", value=str(verdict.late), bar="0", good=verdict.late == 0),
            Figure(
                name="runs that ended otherwise than they should",
                value=str(verdict.unexpected),
                bar="0",
                good=verdict.unexpected == 0,
            ),
            Figure(name="worker and zygote are still the same processes", value=str(same), bar="True", good=same),
        ],
    )


CASE = Case(name="F10", title="poison events among good ones", run=run)
