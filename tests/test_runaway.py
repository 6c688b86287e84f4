"""A run that would go on for ever comes to an end, and the others go on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec import structs

from functions import effects
from functions.outcomes import Attempted, World
from functions.runaway import worth_counting
from headrace.errors import UserError
from headrace.model import FunctionOptions
from headrace.wire import NOTHING, SPREADER, Call, FunctionRecord, Invocation, Map, decode
from streams.link import Link
from streams.log import Log, Record
from streams.topology import work_subject
from tests.test_effects import ROOT, TRIED, succeed, work
from tests.test_worker import Platform, working

INVOCATIONS_MAX = 300
DEPTH_MAX = 40


@pytest.fixture
async def platform(log: Log, link: Link, tmp_path: Path) -> AsyncIterator[Platform]:
    async with working(log, link, tmp_path, chain_depth_max=DEPTH_MAX, run_invocations_max=INVOCATIONS_MAX) as running:
        yield running


async def invocations(platform: Platform, run: str) -> int:
    return await platform.log.count(work_subject("*", "*", run, "*"))


async def test_a_recursion_that_doubles_is_stopped_at_the_limit_and_another_run_goes_on(platform: Platform) -> None:
    await platform.deploy(
        """
        def double(n, ctx):
            ctx.call("double", n + 1)
            ctx.call("double", n + 1)
        def fine(x):
            return x
        """
    )
    run = await platform.trigger("double", 0)
    other = await platform.trigger("fine", 7)
    assert await platform.answer(other) == 7
    record = await platform.ended(run)
    assert record.error is not None
    assert "the limit is 300" in record.error.message
    assert "HEADRACE_RUN_INVOCATIONS_MAX" in record.error.message
    assert await invocations(platform, run) <= INVOCATIONS_MAX


async def test_maps_inside_maps_are_stopped_before_their_members_are_started(platform: Platform) -> None:
    await platform.deploy(
        """
        def outer(n, ctx):
            ctx.map("inner", range(20))
        def inner(n, ctx):
            ctx.map("leaf", range(40))
        def leaf(x):
            return x
        """
    )
    run = await platform.trigger("outer", 0)
    record = await platform.ended(run)
    assert record.error is not None
    assert "would start 40 more; the limit is 300" in record.error.message
    assert await invocations(platform, run) <= INVOCATIONS_MAX


async def test_a_large_map_over_the_limit_fails_its_run_at_once(platform: Platform) -> None:
    await platform.deploy("def fan(n, ctx):\n    ctx.map('leaf', range(1000))\ndef leaf(x):\n    return x")
    run = await platform.trigger("fan", 0)
    record = await platform.ended(run)
    assert record.error is not None
    assert "would start 1,000 more; the limit is 300" in record.error.message
    assert await invocations(platform, run) == 1


async def test_a_loop_of_maps_and_joins_is_as_deep_as_it_has_rounds(platform: Platform) -> None:
    await platform.deploy(
        """
        def fan(n, ctx):
            ctx.map("leaf", [1], then="fan")
        def leaf(x):
            return x
        """
    )
    run = await platform.trigger("fan", 0)
    record = await platform.ended(run)
    assert record.error is not None
    assert "the chain is 40 calls long (HEADRACE_CHAIN_DEPTH_MAX)" in record.error.message


async def test_a_long_loop_of_maps_within_the_limits_is_let_be(platform: Platform) -> None:
    await platform.deploy(
        """
        def fan(n, ctx):
            if isinstance(n, list): n = n[0]
            if n == 15: ctx.answer(n)
            else: ctx.map("leaf", [n + 1] * 8, then="fan")
        def leaf(x):
            return x
        """
    )
    run = await platform.trigger("fan", 0)
    assert await platform.answer(run) == 15


async def test_messages_of_a_subject_are_counted(log: Log) -> None:
    assert await log.count("hr.work.*.t.r.*") == 0
    await log.append([Record(f"hr.work.{n % 3}.t.r.{n}", b"x") for n in range(20)])
    await log.append([Record("hr.work.1.t.other.1", b"x")])
    assert await log.count("hr.work.*.t.r.*") == 20


# ---------------------------------------------------------------- the estimate that says whether to count


def test_hardly_any_run_has_to_be_counted() -> None:
    most = 1_000_000
    assert not worth_counting(ROOT, 10_000, most)
    assert not worth_counting(structs.replace(ROOT, depth=999), 1, most)
    assert not worth_counting(structs.replace(ROOT, breadth=10_000, depth=1), 40, most)
    assert worth_counting(structs.replace(ROOT, breadth=10_000, depth=1), 10_000, most)
    assert worth_counting(structs.replace(ROOT, breadth=2**17, depth=17), 2, most)


def test_breadth_multiplies_along_branches_and_a_join_goes_on_where_its_map_began() -> None:
    of = structs.replace(ROOT, breadth=5, depth=3)
    _, records = succeed(
        Call(function="a", payload=NOTHING), Map(function="b", payloads=[NOTHING] * 3, then="join"), of=of
    )
    assert {(i.depth, i.breadth) for i in work(records)} == {(4, 20)}
    member = work(records)[-1]
    assert member.slot is not None
    assert (member.slot.depth, member.slot.breadth) == (3, 10)


def test_members_of_a_spread_map_have_the_breadth_of_the_whole_map() -> None:
    _, records = succeed(Map(function="b", payloads=[NOTHING] * 700), kept={0: NOTHING})
    spreaders = work(records)
    assert {(i.function, i.breadth) for i in spreaders} == {(SPREADER, 700)}


def test_breadth_without_bound_still_fits_into_a_message() -> None:
    of = structs.replace(ROOT, breadth=effects.BREADTH_MAX, depth=900)
    _, records = succeed(*[Call(function="a", payload=NOTHING)] * 50, of=of)
    assert {i.breadth for i in work(records)} == {effects.BREADTH_MAX}


def test_a_chain_as_long_as_the_setting_is_stopped() -> None:
    record = FunctionRecord(name="a", version="v", options=FunctionOptions(), code_blob="b", registered_at=0.0)
    world = World(function=lambda name: record, routes=[], now=105.0, depth_max=7)

    def call(of: Invocation, tried: Attempted = TRIED) -> Invocation:
        asked = [Call(function="a", payload=NOTHING)]
        unit = effects.succeed(of, tried, result=NOTHING, answer=None, effects=list(asked), kept={}, world=world)[1]
        return decode(unit[0].body, Invocation)

    of = ROOT
    for _ in range(7):
        of = call(of)
    with pytest.raises(UserError, match="7 calls long"):
        call(of)
