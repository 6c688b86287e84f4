"""F16: results that are large, too large, and without an end."""

from __future__ import annotations

from headrace.client import AsyncClient
from headrace.errors import HeadraceError
from infra.chaos import hostile, measure
from infra.chaos.lines import Figure, Result
from infra.chaos.trial import Case, Trial
from infra.rights import GATEWAY
from infra.settings import MIB, Settings

FINE_BYTES = 1_000_000
TOO_LARGE_BYTES = 100_000_000
TIMES = 3
LIMIT_MIB = Settings().result_bytes_max // MIB
GROWTH_MIB = 16.0


async def run(trial: Trial) -> Result:
    """Ask for each, fetch what there is, and look at what is said of the others."""
    times = trial.n(TIMES, 1)
    async with trial.platform() as up:
        await trial.deploy(up.url, up.token, hostile.PATH)
        await trial.drive(trial.load(up, total=20, rate_per_s=20.0, mix={"instant": 1.0}))
        before_mib = measure.resident_mib(up.pids()[GATEWAY])
        trial.say(f"{times} results of 1 MB, of 100 MB and without an end")
        fine = trial.load(
            up, total=times, rate_per_s=2.0, mix={"large": 1.0}, extra={"large": {"bytes": FINE_BYTES}}, deadline="60s"
        )
        await trial.drive(fine)
        huge = trial.load(
            up,
            total=times,
            rate_per_s=2.0,
            mix={"large": 1.0},
            extra={"large": {"bytes": TOO_LARGE_BYTES}},
            deadline="60s",
        )
        await trial.drive(huge)
        await trial.drive(trial.load(up, total=times, rate_per_s=2.0, mix={"flood": 1.0}, deadline="60s"))
        await trial.read_back(up, patience_s=120.0)
        runs = {
            name: [r.run for r in trial.replies() if r.id.startswith(f"{name}-")] for name in (fine.name, huge.name)
        }
        async with AsyncClient(up.url, up.token) as client:
            whole = [len(await (await client.run(run)).result(timeout=30)) for run in runs[fine.name]]
            told = [await _told(client, run) for run in runs[huge.name]]
        after_mib = measure.resident_mib(up.pids()[GATEWAY])
        verdict = await trial.check(up, expected={"large": ["succeeded", "failed"], "flood": ["failed"]})
    grown_mib = after_mib - before_mib
    naming = sum(f"the limit is {LIMIT_MIB} MiB" in text for text in told)
    return Result(
        verdict=verdict,
        figures=[
            Figure(
                name="results of 1 MB that came whole",
                value=f"{sum(n == FINE_BYTES for n in whole)} of {times}",
                bar="all",
                good=whole == [FINE_BYTES] * times,
            ),
            Figure(
                name="results of 100 MB refused with the limit in the message",
                value=f"{naming} of {times}: {told[0] if told else ''}",
                bar="all",
                good=naming == times,
            ),
            Figure(name="how results without an end ended", value=_ends(verdict.deaths)),
            Figure(
                name="memory added to the gateway",
                value=f"{grown_mib:.1f} MiB",
                bar=f"< {GROWTH_MIB:g} MiB",
                good=grown_mib < GROWTH_MIB,
            ),
        ],
        notes=[f"the shipped limit of a result is {LIMIT_MIB} MiB; larger data goes to ctx.store"],
    )


async def _told(client: AsyncClient, run: str) -> str:
    try:
        await (await client.run(run)).result(timeout=30)
    except HeadraceError as error:
        return str(error)
    return "it came"


def _ends(deaths: dict[str, int]) -> str:
    return ", ".join(f"{what} {n}" for what, n in deaths.items() if what.startswith("flood:")) or "none ended dead"


CASE = Case(name="F16", title="results of 1 MB, 100 MB and without an end", run=run)
