"""The read model is what the log folds into, key by key, however often it is lost; half of it is never shown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from functions.replays import again, replay
from headrace.errors import Unavailable
from headrace.wire import NOTHING, Invocation, Map, Started, encode
from streams import ledger
from streams.follow import follow
from streams.ledger import FACTS, LAYOUT, POSITION, WHOLE, Writer
from streams.log import Log, Record
from streams.reader import Reader
from streams.topology import DEFAULT_TENANT, start_subject
from tests.stories import children, failure, function, route, success, trigger
from tests.writers import at_work, caught_up


@pytest.fixture
async def writer(log: Log, redis: Redis) -> AsyncIterator[Writer]:
    """A writer at work."""
    async with at_work(Writer(log, redis)) as made:
        yield made


async def everything(redis: Redis) -> dict[bytes, Any]:
    """Return all keys with what they hold; the token of the generation is another one each time."""
    found: dict[bytes, Any] = {}
    anything: Any = redis
    for key in await anything.keys("*"):
        kind = await anything.type(key)
        if kind == b"zset":
            found[key] = await anything.zrange(key, 0, -1, withscores=True)
        elif kind == b"hash":
            found[key] = await anything.hgetall(key)
        else:
            found[key] = await anything.get(key)
    found.pop(WHOLE.encode(), None)
    return found


async def fail(log: Log, event_id: str) -> Invocation:
    first = trigger(event_id).invocation
    await log.append([trigger(event_id).record])
    await log.append(failure(first))
    return first


async def fill(log: Log, number: int) -> None:
    """Runs of every kind: ended well, open, failed, failed and replayed, failed in a map."""
    for n in range(number):
        first = trigger(f"e{n}")
        await log.append([first.record])
        match n % 5:
            case 0:
                await log.append(success(first.invocation))
            case 1:
                await log.append(failure(first.invocation))
            case 2:
                await log.append(failure(first.invocation))
                await give_another_go(log, first.invocation, str(n))
            case 3:
                unit = success(first.invocation, Map(function="g", payloads=[NOTHING] * 3, then="join"))
                await log.append(unit)
                for member in children(unit):
                    await log.append(failure(member))


async def give_another_go(log: Log, dead: Invocation, key: str) -> str:
    made = replay(again(dead, dead), key=key, route=route(), function=function(), now=2000.0)
    await log.append(made.records)
    return made.invocation.run_id


async def dead_runs(reader: Reader, **narrowed: Any) -> list[str]:
    return [one.run.run_id for one in (await reader.dead(DEFAULT_TENANT, **narrowed)).dead]


async def test_the_dead_are_listed_until_they_are_replayed(log: Log, redis: Redis, writer: Writer) -> None:
    reader = Reader(redis)
    first, second = await fail(log, "first"), await fail(log, "second")
    await caught_up(log, redis)
    assert await dead_runs(reader) == [second.run_id, first.run_id]
    assert await reader.run_of_dead(first.invocation_id) == first.run_id
    new = await give_another_go(log, first, "k")
    await caught_up(log, redis)
    assert await dead_runs(reader) == [second.run_id]
    assert await dead_runs(reader, replayed=True) == [second.run_id, first.run_id]
    old, made = await reader.record(first.run_id), await reader.record(new)
    assert old is not None
    assert made is not None
    assert (old.state, old.replayed_as) == ("failed", new)
    assert made.replays is not None
    assert made.replays.run_id == first.run_id


async def test_pages_of_the_dead_end(log: Log, redis: Redis, writer: Writer) -> None:
    runs = [(await fail(log, f"e{n}")).run_id for n in range(7)]
    await caught_up(log, redis)
    found: list[str] = []
    cursor: str | None = None
    while True:
        page = await Reader(redis).dead(DEFAULT_TENANT, limit=3, cursor=cursor)
        found += [one.run.run_id for one in page.dead]
        cursor = page.next
        if cursor is None:
            break
    assert found == runs[::-1]


async def test_after_a_wipe_every_key_is_as_it_was(log: Log, redis: Redis, writer: Writer) -> None:
    await fill(log, 50)
    await caught_up(log, redis)
    before = await everything(redis)
    assert len(before[b"hr:dead:left:default"]) == 10 + 30
    assert len(before[b"hr:dead:all:default"]) == 20 + 30
    assert before[b"hr:totals"] == {b"accepted": b"60", b"ended": b"30"}
    await redis.flushall()
    await log.append([trigger("e0").record._replace(absent=None)])  # what comes twice counts once
    await caught_up(log, redis)
    after = await everything(redis)
    before.pop(b"hr:position")
    after.pop(b"hr:position")
    assert after == before


async def test_a_wipe_in_the_midst_of_writing_ends_the_same(log: Log, redis: Redis, writer: Writer) -> None:
    filling = asyncio.create_task(fill(log, 200))
    while not filling.done():
        await asyncio.sleep(0.1)
        await redis.flushall()
    await filling
    await caught_up(log, redis)
    found = await everything(redis)
    await redis.flushall()
    await log.append([trigger("e0").record._replace(absent=None)])
    await caught_up(log, redis)
    again_found = await everything(redis)
    for one in (found, again_found):
        one.pop(b"hr:position")
    assert again_found == found


async def test_lists_are_refused_until_the_read_model_is_whole(
    log: Log, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(log, 20)
    reader, writer = Reader(redis), Writer(log, redis)
    refused: list[Callable[[], Awaitable[Any]]] = [
        lambda: reader.page(DEFAULT_TENANT),
        lambda: reader.dead(DEFAULT_TENANT),
        lambda: reader.open_runs(DEFAULT_TENANT, "f"),
    ]
    monkeypatch.setattr(ledger, "WINDOW", 8)
    await writer._begin()
    batches = follow(log, FACTS, after=0, window=8)
    end = await log.end_seq()
    seen = 0
    async for batch in batches:
        for ask in refused:
            with pytest.raises(Unavailable, match="built anew"):
                await ask()
        await writer.step(batch)
        seen += 1
        if batch[-1].seq >= end:
            break
    await batches.aclose()
    assert seen > 3
    assert len((await reader.page(DEFAULT_TENANT)).runs) == 24
    assert await reader.open_runs(DEFAULT_TENANT, "f") == 4 + 4 + 4


async def test_keys_of_another_release_are_thrown_away(log: Log, redis: Redis) -> None:
    await fill(log, 10)
    await redis.set(POSITION, 5)
    await redis.zadd("hr:open:default:f", {"stray": 1})
    await redis.set(LAYOUT, "1")
    async with at_work(Writer(log, redis)):
        await caught_up(log, redis)
        assert (await everything(redis))[b"hr:totals"] == {b"accepted": b"12", b"ended": b"6"}
        assert await redis.zscore("hr:open:default:f", "stray") is None


async def test_what_is_further_than_the_log_is_of_another_log(log: Log, redis: Redis) -> None:
    await fill(log, 5)
    await redis.set(POSITION, 1_000_000)
    await redis.set(LAYOUT, ledger.LAYOUT_NOW)
    async with at_work(Writer(log, redis)), asyncio.timeout(20):
        while int(await redis.get(POSITION) or 0) != await log.end_seq():
            await asyncio.sleep(0.01)
        assert len((await Reader(redis).page(DEFAULT_TENANT)).runs) == 6


async def test_the_dead_are_forgotten_together_with_their_runs(
    log: Log, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "TRIM_AT_ONCE", 10)
    runs = [await fail(log, f"e{n}") for n in range(40)]
    writer = Writer(log, redis, runs_max=20)
    await writer._begin()
    batches = follow(log, FACTS, after=0, window=8)
    end = await log.end_seq()
    async for batch in batches:
        await writer.step(batch)
        if batch[-1].seq >= end:
            break
    await batches.aclose()
    kept = int(await redis.zcard("hr:runs"))
    assert 20 <= kept <= 30
    for key in ("hr:dead:all:default", "hr:dead:left:default"):
        assert int(await redis.zcard(key)) == kept
    assert len(await redis.hkeys("hr:dead:runs")) == kept
    assert await Reader(redis).run_of_dead(runs[0].invocation_id) is None
    assert (await everything(redis))[b"hr:totals"] == {b"accepted": b"40", b"ended": b"40"}


async def test_a_first_invocation_that_comes_twice_does_not_open_its_run_again(
    log: Log, redis: Redis, writer: Writer
) -> None:
    first = trigger("e")
    await log.append([first.record])
    await log.append(success(first.invocation))
    await caught_up(log, redis)
    await log.append([first.record._replace(absent=None)])
    await caught_up(log, redis)
    record = await Reader(redis).record(first.invocation.run_id)
    assert record is not None
    assert record.state == "succeeded"
    assert (await everything(redis))[b"hr:totals"] == {b"accepted": b"1", b"ended": b"1"}
    assert await Reader(redis).open_runs(DEFAULT_TENANT, "f") == 0


async def test_an_attempt_that_is_told_late_does_not_change_what_has_ended(
    log: Log, redis: Redis, writer: Writer
) -> None:
    work = (first := trigger("e")).invocation
    await log.append([first.record])
    await log.append(success(work))
    await caught_up(log, redis)
    late = Started(
        run_id=work.run_id,
        invocation_id=work.invocation_id,
        function="f",
        version="v1",
        worker="w2",
        attempt=1,
        queued_at=1.0,
        started_at=2.0,
    )
    await log.append([Record(start_subject(work.run_id, work.invocation_id, 1), encode(late))])
    await caught_up(log, redis)
    run = await Reader(redis).run(work.run_id)
    assert run is not None
    assert [(i.state, i.worker) for i in run.invocations] == [("succeeded", "w")]
