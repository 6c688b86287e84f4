"""Late or in danger: the best answer that is possible is out at the deadline, and a better one follows."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec import structs

from functions.admission import admit
from headrace.children import ChildLimits
from headrace.wire import EventMeta, Expected, ForecastRow, Outcome, Payload, decode
from streams.blobs import FolderBlobs
from streams.link import Link
from streams.log import Log
from streams.record import InvocationRecord, RunRecord
from streams.tables import open_tables
from streams.topology import done_subject, work_subject
from tests.stories import route
from tests.test_worker import Platform, working
from workers.pool import Pool
from workers.worker import Tools, Worker

SOURCE = """
import time
def full(x, ctx):
    if x < 0:
        raise ValueError("full is broken")
    time.sleep(x)
    return "full"
def half(x, ctx):
    if x == -2:
        raise ValueError("half is broken")
    return "half"
def quick(x, ctx):
    return "quick"
def first(x, ctx):
    ctx.call("full", x)
def spread(x, ctx):
    ctx.map("full", [x, x], then="join")
def join(results):
    return results
"""
VARIANTS: dict[str, dict[str, object]] = {"full": {"variants": ["half", "quick"], "timeout": "30s"}}


async def trigger(platform: Platform, function: str, data: object, deadline_s: float) -> str:
    """Accept one event on a route that degrades."""
    platform.count += 1
    body = json.dumps(data).encode()
    record = platform.tables.function("default", function)
    assert record is not None
    rule = route(function, function=function)
    now = time.time()
    admitted = admit(
        event=EventMeta(id=f"l{platform.count}", source="/test", type="org.test"),
        payload=Payload(body=body, size=len(body)),
        digest="",
        route=structs.replace(rule, route=structs.replace(rule.route, on_late="degrade")),
        function=record,
        tenant="default",
        now=now,
        deadline=now + deadline_s,
    )
    await platform.log.append([admitted.record])
    return admitted.invocation.run_id


async def learned(platform: Platform, **p90_s: float) -> None:
    """Let it be known how long functions take from their start to their answer."""
    for name, seconds in p90_s.items():
        kinds = {"answer|||": Expected(seconds, seconds, seconds, 50)}
        await platform.tables.forecasts.put(name, ForecastRow(function=name, kinds=kinds, at=0.0))


async def answers(platform: Platform, run: str) -> list[object]:
    """All answers of a run, the first one first."""
    found: list[object] = []
    record = await platform.ended(run)
    for one in record.answers:
        stored = await platform.log.last(done_subject(run, one.invocation_id))
        assert stored is not None
        outcome = decode(stored.body, Outcome)
        payload = outcome.answer if one.explicit else outcome.result
        assert payload is not None
        found.append(json.loads(payload.body))
    return found


async def story(platform: Platform, run: str) -> tuple[RunRecord, dict[str, InvocationRecord]]:
    """A run that has ended, and its invocations by function; all of them have ended too."""
    await platform.ended(run)
    async with asyncio.timeout(20.0):
        while True:
            record, invocations = await platform.state(run)
            if all(each.ended_at is not None for each in invocations):
                return record, {each.function: each for each in invocations}
            await asyncio.sleep(0.05)


@pytest.fixture
async def platform(log: Log, link: Link, tmp_path: Path) -> AsyncIterator[Platform]:
    async with working(log, link, tmp_path) as running:
        await running.deploy(SOURCE, **VARIANTS)
        yield running


async def test_a_full_function_that_fits_is_the_only_one_to_run(platform: Platform) -> None:
    await learned(platform, full=0.1, half=0.1, quick=0.1)
    run = await trigger(platform, "full", 0.05, deadline_s=30.0)
    record, invocations = await story(platform, run)
    assert await answers(platform, run) == ["full"]
    assert list(invocations) == ["full"]
    assert record.fidelity is not None
    assert (record.fidelity.level, record.fidelity.of, record.deadline_met) == (0, 3, True)


async def test_where_the_full_one_does_not_fit_a_variant_answers_and_the_full_one_follows(platform: Platform) -> None:
    await learned(platform, full=60.0, half=0.1, quick=0.05)
    run = await trigger(platform, "full", 0.3, deadline_s=20.0)
    record, invocations = await story(platform, run)
    assert await answers(platform, run) == ["half", "full"]
    assert record.deadline_met is True
    assert record.answered_at is not None
    assert [each.at >= record.answered_at for each in record.answers] == [True, True]
    assert record.answered_at == record.answers[0].at
    assert set(invocations) == {"half", "full"}
    assert invocations["full"].parent_id == invocations["half"].invocation_id
    assert record.spent.total_s() == pytest.approx(record.answered_at - record.accepted_at, rel=0.01)


async def test_a_full_one_that_overruns_is_rescued_though_all_slots_are_taken(platform: Platform) -> None:
    """Nothing is known of any of them, so the full ones run; and there are as many of them as slots."""
    runs = [await trigger(platform, "full", 6.0, deadline_s=4.0) for _ in range(2)]
    for run in runs:
        record, invocations = await story(platform, run)
        assert await answers(platform, run) == ["half", "full"]
        assert record.deadline_met is True
        assert record.answers[1].at > (record.deadline or 0.0)
        assert record.state == "succeeded"
        assert invocations["half"].parent_id == invocations["full"].invocation_id
        assert record.answered_at is not None
        assert record.spent.total_s() == pytest.approx(record.answered_at - record.accepted_at, rel=0.01)


async def test_a_rescue_that_is_not_needed_is_not_run(platform: Platform) -> None:
    run = await trigger(platform, "full", 0.6, deadline_s=3.0)
    record, invocations = await story(platform, run)
    assert await answers(platform, run) == ["full"]
    assert invocations["half"].state == "canceled"
    assert invocations["half"].error is not None
    assert invocations["half"].error.kind == "answered"
    assert record.error is None


async def test_when_the_full_one_fails_the_next_rung_answers_at_once(platform: Platform) -> None:
    run = await trigger(platform, "full", -1, deadline_s=600.0)
    record, _ = await story(platform, run)
    assert await answers(platform, run) == ["half"]
    assert record.state == "succeeded"
    assert record.error is not None
    assert "full is broken" in record.error.message
    run = await trigger(platform, "full", -2, deadline_s=600.0)
    assert await answers(platform, run) == ["quick"]


async def test_a_full_one_that_fails_after_the_rescue_leaves_its_answer(platform: Platform) -> None:
    await platform.deploy(
        """
        import time
        def full(x, ctx):
            time.sleep(x)
            raise ValueError("full is broken")
        """,
        **VARIANTS,
    )
    run = await trigger(platform, "full", 4.0, deadline_s=3.0)
    record, _ = await story(platform, run)
    assert await answers(platform, run) == ["half"]
    assert (record.state, record.deadline_met) == ("succeeded", True)
    assert record.error is not None
    assert "full is broken" in record.error.message


async def test_a_follow_up_has_a_ladder_too_and_branches_take_a_rung_without_more(platform: Platform) -> None:
    await learned(platform, full=60.0, half=0.1, quick=0.05)
    run = await trigger(platform, "first", 0.1, deadline_s=20.0)
    assert await answers(platform, run) == ["half", "full"]
    run = await trigger(platform, "spread", 0.1, deadline_s=20.0)
    record, _ = await story(platform, run)
    assert await platform.answer(run) == ["half", "half"]
    assert record.fidelity is not None
    assert record.fidelity.level == 1
    assert [one.fidelity.level for one in record.answers] == [1]


async def test_a_rescue_is_run_by_another_worker_where_its_own_is_gone(log: Log, link: Link, tmp_path: Path) -> None:
    tables, blobs = await open_tables(link), FolderBlobs(tmp_path / "blobs")
    pool = Pool(1, limits=ChildLimits(), scratch=tmp_path / "scratch-1")
    await pool.start()
    worker = Worker(Tools(name="w0", log=log, tables=tables, blobs=blobs, pool=pool, slots=1))
    running = asyncio.create_task(worker.run(asyncio.Event(), drain_s=0.0))
    platform = Platform(log, tables, blobs)
    await platform.deploy(SOURCE, **VARIANTS)
    run = await trigger(platform, "full", 8.0, deadline_s=8.0)
    async with asyncio.timeout(10.0):
        while await log.count(work_subject("*", "*", run, "*")) < 2:
            await asyncio.sleep(0.05)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await pool.close()
    async with working(log, link, tmp_path):
        record, invocations = await story(platform, run)
    await tables.close()
    assert await answers(platform, run) == ["half", "full"]
    assert (record.deadline_met, record.state) == (True, "succeeded")
    assert {name: each.worker for name, each in invocations.items()} == {"full": "w1", "half": "w1"}
