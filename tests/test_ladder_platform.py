"""A scientist's ladder on a real platform: the first answer is there in time, and a better one takes its place."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from textwrap import dedent

import aiohttp
import pytest

from headrace.client import AsyncClient
from headrace.errors import BadRequest, NotFound
from headrace.model import Code, FunctionOptions, Route
from infra.settings import Settings
from infra.up import Platform
from tests.doors import TOKEN, Doors

USER = dedent(
    """
    import time

    from headrace import function, on


    @function
    def reduced(seconds: float) -> str:
        return "reduced"


    @function
    def surrogate(seconds: float) -> str:
        return "surrogate"


    @on(deadline="4s", on_late="degrade")
    @function(variants=[reduced, surrogate])
    def analyse(seconds: float) -> str:
        time.sleep(seconds)
        return "full"
    """
)


@pytest.fixture
async def platform(tmp_path: Path) -> AsyncIterator[Platform]:
    async with Platform(Settings(data_dir=tmp_path / "headrace", port=0, worker_slots=1)) as started:
        yield started


@pytest.fixture
async def client(platform: Platform, tmp_path: Path) -> AsyncIterator[AsyncClient]:
    path = tmp_path / "ladder.py"
    path.write_text(USER)
    async with AsyncClient(platform.url, platform.token) as opened:
        names = [view.name for view in await opened.deploy(path)]
        assert names == ["reduced", "surrogate", "analyse"]
        yield opened


async def links(platform: Platform, path: str) -> tuple[str, str, list[str], str]:
    """What is answered to a path: its body, its fidelity, and where its links lead to, by relation."""
    headers = {"Authorization": f"Bearer {platform.token}"}
    async with aiohttp.ClientSession(headers=headers) as http, http.get(platform.url + path) as answer:
        found = [each.replace("<", "").replace(">", "").replace('"', "") for each in answer.headers.getall("Link", [])]
        fidelity = answer.headers.get("Headrace-Fidelity", "")
        return await answer.text(), fidelity, sorted(found), str(answer.status)


async def test_the_first_answer_is_there_in_time_and_a_better_one_supersedes_it_with_a_link(
    platform: Platform, client: AsyncClient
) -> None:
    run = await client.trigger("analyse", 6.0, wait=30.0)
    base = f"/v1/runs/{run.run_id}"
    assert run.seen is not None
    assert (run.seen.state, run.seen.deadline_met) == ("running", True)  # what waits returns with the first answer
    assert await run.result(timeout=5.0) == "reduced"
    fidelity = await run.fidelity()
    assert fidelity is not None
    assert (fidelity.level, fidelity.function, fidelity.of) == (1, "reduced", 3)
    assert await links(platform, f"{base}/result") == (
        '"reduced"',
        "1; function=reduced; of=3",
        [f"{base}/events; rel=monitor"],
        "200",
    )
    told = [event async for event in run.follow()]
    levels = [event.data["fidelity"]["level"] for event in told if event.data.get("fidelity")]
    assert levels == [1, 0]
    assert [event.data["state"] for event in told if event.data.get("fidelity")] == ["running", "succeeded"]

    ended = await run.ended()
    assert await run.result() == "full"
    assert await run.result_at(1) == "reduced"
    assert [(each.fidelity.level, each.in_time) for each in ended.answers] == [(1, True), (0, False)]
    assert ended.deadline_met is True
    assert ended.time_to_solution_s is not None
    assert ended.time_to_solution_s < 4.0
    assert await links(platform, f"{base}/result") == (
        '"full"',
        "0; function=analyse; of=3",
        [f"{base}/result?level=1; rel=predecessor-version"],
        "200",
    )
    assert await links(platform, f"{base}/result?level=1") == (
        '"reduced"',
        "1; function=reduced; of=3",
        [f"{base}/result; rel=latest-version", f"{base}/result?level=0; rel=successor-version"],
        "200",
    )
    assert (await links(platform, f"{base}/result?level=2"))[3] == "404"
    by_function = {each.function: each for each in ended.invocations}
    assert set(by_function) == {"analyse", "reduced"}


async def test_what_has_time_is_answered_in_full_and_says_so(platform: Platform, client: AsyncClient) -> None:
    run = await client.trigger("analyse", 0.0, wait=30.0)
    assert await run.result() == "full"
    body, fidelity, found, _ = await links(platform, f"/v1/runs/{run.run_id}/result")
    assert (body, fidelity, found) == ('"full"', "0; function=analyse; of=3", [])


async def test_variants_must_be_registered_and_be_the_last_of_their_kind(tmp_path: Path) -> None:
    code = Code(kind="source", name="f", module="user", files={"user.py": "def f(x):\n    return x\n"})
    async with Doors(tmp_path) as doors:
        door = await doors.open()
        async with AsyncClient(door.url, TOKEN) as client:
            await client.put_function("top", code)
            with pytest.raises(BadRequest, match="neither top nor any other function has variants"):
                await client.put_route("r", Route(function="top", on_late="degrade"))
            with pytest.raises(NotFound, match="names low as a variant, which is not registered"):
                await client.put_function("top", code, FunctionOptions(variants=["low"]))
            await client.put_function("low", code)
            await client.put_function("top", code, FunctionOptions(variants=["low"]))
            await client.put_route("r", Route(function="top", on_late="degrade"))
            with pytest.raises(BadRequest, match="names top as a variant, which has variants itself"):
                await client.put_function("over", code, FunctionOptions(variants=["top"]))
            await client.put_function("other", code)
            with pytest.raises(BadRequest, match="low is a variant of top, so it cannot have variants itself"):
                await client.put_function("low", code, FunctionOptions(variants=["other"]))
            with pytest.raises(BadRequest, match="are not all different"):
                await client.put_function("top", code, FunctionOptions(variants=["top"]))
