"""F11: ten times what the workers can do, open loop; what is refused is refused at once and completely."""

from __future__ import annotations

import msgspec

from infra.bench.load import quantile
from infra.chaos import measure
from infra.chaos.launch import Up
from infra.chaos.lines import Figure, Reply, Result, Timing
from infra.chaos.trial import Case, Trial

LASTS_S = 60.0
TAKES_S = 0.1
SLOTS = 2
TIMES = 10
RATE_PER_S_MAX = 600.0  # more than this, and on two cores the driver takes the machine from the platform
CHAINED_SHARE = 0.5
DEADLINE_S = 10
GOODPUT = 0.70
IN_TIME = 0.99
REFUSAL_S = 0.100


async def run(trial: Trial) -> Result:
    """Measure what two slots can do, then ask for ten times as much; then the same with chains of four."""
    figures: list[Figure] = []
    async with trial.platform(options=["--workers", str(SLOTS)]) as up:
        for route, share in (("slow", 1.0), ("chained", CHAINED_SHARE)):
            figures += await _overload(trial, up, route, max(10.0, LASTS_S * trial.scale * share))
        await trial.read_back(up)
        verdict = await trial.check(up)
    return Result(verdict=verdict, figures=figures)


async def _overload(trial: Trial, up: Up, route: str, lasts_s: float) -> list[Figure]:
    extra = {"slow": {"takes_s": TAKES_S}}
    # What can be done: a queue that is never empty, worked off.
    crowd = trial.load(up, total=100, rate_per_s=1000.0, mix={route: 1.0}, extra=extra, deadline="300s")
    await trial.drive(crowd)
    await trial.read_back(up)
    capacity = (await trial.check(up)).by_load[crowd.name]
    # Some that come one by one, in between which all is done.
    few = trial.load(up, total=30, rate_per_s=5.0, mix={route: 1.0}, extra=extra, deadline="300s")
    await trial.drive(few)
    per_s = capacity.n / capacity.most_s
    rate_per_s = min(RATE_PER_S_MAX, TIMES * per_s)
    load = trial.load(
        up,
        total=round(rate_per_s * lasts_s),
        rate_per_s=rate_per_s,
        mix={route: 1.0},
        extra=extra,
        deadline=f"{DEADLINE_S}s",
        once=True,
    )
    trial.say(f"{route}: {per_s:.1f} runs/s can be done; {load.total:,} triggers at {load.rate_per_s:.0f}/s")
    await trial.drive(load)
    await trial.read_back(up)
    done = (await trial.check(up)).by_load[load.name]
    replies = [r for r in trial.replies() if r.id.startswith(f"{load.name}-")]
    return [msgspec.structs.replace(f, name=f"{route}: {f.name}") for f in _figures(replies, done, per_s, lasts_s)]


def _figures(replies: list[Reply], done: Timing, per_s: float, lasts_s: float) -> list[Figure]:
    accepted = [r for r in replies if r.answered == "accepted"]
    refused = [r for r in replies if r.answered == "refused"]
    other = [r for r in replies if r.answered == "unknown"]
    with_retry = sum(r.status in (429, 503) and r.retry_after_s is not None for r in refused)
    in_time = 1 - done.late / done.n
    # What came in until the end of the load is worked off after it, so both are counted.
    goodput = (done.n - done.late) / (lasts_s + max(0.0, done.p50_s)) / per_s
    refusal_s = quantile([r.took_s for r in refused], 0.99) if refused else 0.0
    at_door = measure.door(replies)
    return [
        Figure(name="capacity, and load", value=f"{per_s:.1f} runs/s, {len(replies) / lasts_s:.0f}/s"),
        Figure(
            name="goodput, in time, share of capacity",
            value=f"{goodput:.0%}",
            bar=f">= {GOODPUT:.0%}",
            good=goodput >= GOODPUT,
        ),
        Figure(
            name=f"accepted that met the deadline of {DEADLINE_S} s",
            value=f"{in_time:.1%} of {done.n:,} (p50 {done.p50_s:.2f} s, p99 {done.p99_s:.2f} s)",
            bar=f">= {IN_TIME:.0%}",
            good=in_time >= IN_TIME,
        ),
        Figure(
            name="refused with 429 or 503 and Retry-After",
            value=f"{with_retry:,} of {len(refused):,}; {len(other):,} without a clear answer",
            bar="all",
            good=with_retry == len(refused) and not other,
        ),
        Figure(
            name="refusal p99",
            value=f"{refusal_s * measure.MS:.1f} ms",
            bar=f"< {REFUSAL_S * measure.MS:.0f} ms",
            good=refusal_s < REFUSAL_S,
        ),
        Figure(
            name="202 p50, p99",
            value=f"{at_door.p50_s * measure.MS:.1f} ms, {at_door.p99_s * measure.MS:.1f} ms of {len(accepted):,}",
        ),
    ]


CASE = Case(name="F11", title="ten times too much", run=run)
