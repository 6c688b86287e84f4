"""The first of a burst already hear how long it will take: the gateway knows the slots of all workers."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

from headrace.client import AsyncClient
from infra.settings import Settings
from infra.up import Platform
from tests.processes import until

SLOTS = 2
NAP_S = 0.25
BURST = 40
LEARNED = 10  # one after the other, while the worker says more than once that it is there
USER = dedent(
    f"""
    import time

    from headrace import function, on


    @on(type="org.example.tired", name="nap")
    @function
    def nap(number: int) -> int:
        time.sleep({NAP_S})
        return number
    """
)


def tired(number: int) -> dict[str, object]:
    return {
        "specversion": "1.0",
        "id": str(number),
        "source": "/beds",
        "type": "org.example.tired",
        "datacontenttype": "application/json",
        "data": number,
    }


async def quoted_s(client: AsyncClient) -> float | None:
    """Return how long an answer is expected to take that is asked for now."""
    (event,) = (await client.quote(0, route="nap")).events
    quote = event.routes[0].quote
    return None if quote is None else quote.p50_s


async def test_each_of_a_burst_is_quoted_behind_those_before_it(tmp_path: Path) -> None:
    path = tmp_path / "naps.py"
    path.write_text(USER)
    settings = Settings(data_dir=tmp_path / "headrace", port=0, worker_slots=SLOTS)
    async with Platform(settings) as platform, AsyncClient(platform.url, platform.token) as client:
        await client.deploy(path)
        for number in range(LEARNED):
            await (await client.trigger("nap", number)).result(timeout=60)

        async def rested() -> bool:
            """Say whether what was learned has been told, and nothing waits any more."""
            said = await quoted_s(client)
            return said is not None and said < NAP_S * 3

        await until(rested)
        runs = await client.publish([tired(100 + number) for number in range(BURST)])
        views = [await client.view(run.run_id) for run in runs]
        told = [0.0 if view.quote is None else view.quote.p50_s or 0.0 for view in views]
        assert told == sorted(told)
        # Nothing of it has ended yet: so long all that is ahead of the last one takes the slots that there are.
        assert told[-1] - told[0] >= 0.8 * (BURST - SLOTS) * NAP_S / SLOTS
