"""What is learned is kept in Redis, comes back from the log bit for bit, and is told to every process by a table."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis

from functions.lessons import Lessons
from functions.outlook import Outlook
from headrace.errors import Unavailable
from headrace.wire import NOTHING, Call, Map
from infra.embedded import NatsServer
from infra.rights import LEDGER, WORKER
from streams.follow import follow
from streams.forecasts import Forecasts
from streams.ledger import FACTS, FORECASTS, Writer
from streams.link import Link, open_link
from streams.log import Log
from streams.stored import Stored
from streams.tables import Tables, open_tables
from tests.processes import until
from tests.stories import children, failure, success, teach, trigger
from tests.writers import at_work, caught_up


@asynccontextmanager
async def learning(log: Log, redis: Redis) -> AsyncIterator[tuple[Writer, Lessons]]:
    """A ledger that learns."""
    lessons = Lessons()
    async with at_work(Writer(log, redis, lessons)) as writer:
        yield writer, lessons


@asynccontextmanager
async def told_by(writer: Writer, lessons: Lessons, tables: Tables) -> AsyncIterator[None]:
    """Forecasts that are told often."""
    telling = asyncio.create_task(Forecasts(tables.forecasts, lessons, lambda: writer.whole, every_s=0.02).run())
    try:
        yield
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)


@asynccontextmanager
async def tables_of(server: NatsServer, role: str) -> AsyncIterator[Tables]:
    """The tables as a process of this role has them."""
    link: Link = await open_link(server.url, user=role, password=server.password(role), name=role)
    tables = await open_tables(link)
    try:
        yield tables
    finally:
        await tables.close()
        await link.close()


async def live(log: Log, number: int, *, prefix: str = "e", took_s: float = 2.0) -> None:
    """Runs of several kinds, a moment ago: of one step, of a chain, of a map that goes on, and failed ones."""
    for n in range(number):
        began = time.time() - 10.0 - took_s
        first = trigger(f"{prefix}{n}", now=began - 0.01, body=b"1" * (1 + n % 3)).invocation
        await log.append([trigger(f"{prefix}{n}", now=began - 0.01, body=b"1" * (1 + n % 3)).record])
        match n % 4:
            case 0:
                await log.append(success(first, at=began))
            case 1:
                unit = success(first, Call(function="g", payload=NOTHING), at=began)
                await log.append(unit)
                await log.append(success(children(unit)[0], at=began))
            case 2:
                await log.append(success(first, Map(function="g", payloads=[NOTHING] * 3, then="join"), at=began))
            case 3:
                await log.append(failure(first))


async def kept(redis: Redis) -> dict[bytes, bytes]:
    anything: Any = redis
    found: dict[bytes, bytes] = await anything.hgetall(FORECASTS)
    return found


async def facts(log: Log) -> list[Stored]:
    end, found = await log.end_seq(), list[Stored]()
    async for batch in follow(log, FACTS, after=0):
        found += batch
        if found and found[-1].seq >= end:
            break
    return found


async def test_what_is_kept_is_what_the_log_teaches(log: Log, redis: Redis) -> None:
    async with learning(log, redis):
        await live(log, 40)
        await caught_up(log, redis)
    lessons = Lessons()
    teach(lessons, await facts(log))
    expected = {name.encode(): raw for name, raw in lessons.changed()[0].items()}
    assert await kept(redis) == expected
    assert {name.split(b"|")[1] for name in expected} == {b"run", b"answer", b"rest"}
    assert lessons.histories["f"]["run|||"].observed == 30


async def test_after_a_wipe_every_history_is_as_it_was(log: Log, redis: Redis) -> None:
    async with learning(log, redis):
        await live(log, 40)
        await caught_up(log, redis)
        before = await kept(redis)
        assert len(before) > 20
        await redis.flushall()
        await log.append([trigger("one more").record])
        await caught_up(log, redis)
        assert await kept(redis) == before


async def test_a_ledger_that_is_started_again_goes_on_where_the_other_ended(log: Log, redis: Redis) -> None:
    for n in range(4):
        async with learning(log, redis):
            await live(log, 12, prefix=f"{n}-")
            await caught_up(log, redis)
    one_by_one = await kept(redis)
    await redis.flushall()
    async with learning(log, redis):
        await caught_up(log, redis)
    assert await kept(redis) == one_by_one


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_what_is_learned_does_not_depend_on_how_the_log_was_cut(log: Log, redis: Redis, size: int) -> None:
    await live(log, 30)
    everything = await facts(log)
    lessons = Lessons()
    writer = Writer(log, redis, Lessons())
    await writer._begin()
    for start in range(0, len(everything), size):
        await writer.step(everything[start : start + size])
    teach(lessons, everything)
    assert await kept(redis) == {name.encode(): raw for name, raw in lessons.changed()[0].items()}


async def test_every_process_hears_what_is_expected(nats_server: NatsServer, log: Log, redis: Redis) -> None:
    async with tables_of(nats_server, LEDGER) as ledgers, tables_of(nats_server, WORKER) as workers:
        outlook = Outlook(workers.forecasts.get)
        assert outlook.of("run", "f", "v1", size=1) is None
        async with learning(log, redis) as (writer, lessons), told_by(writer, lessons, ledgers):
            await live(log, 12)
            await until(lambda: (found := outlook.of("run", "f", "v1", size=1)) is not None and found.observations == 3)
            found = outlook.of("run", "f", "v1", size=1)
            assert found is not None
            assert 1.5 < found.p50_s < 2.5
            assert found.p50_s <= found.p90_s <= found.p99_s
            await until(lambda: outlook.of("rest", "g", "v1", size=3) is not None)


async def test_nothing_new_is_not_told_again(nats_server: NatsServer, log: Log, redis: Redis) -> None:
    async with tables_of(nats_server, LEDGER) as tables, learning(log, redis) as (writer, lessons):
        forecasts = Forecasts(tables.forecasts, lessons, lambda: writer.whole)
        await live(log, 240)
        await caught_up(log, redis)
        await forecasts.step()
        rows = dict(tables.forecasts.items())
        assert rows.keys() == {"f", "g"}
        await live(log, 4, prefix="more")
        await caught_up(log, redis)
        assert lessons.untold() == {"f", "g"}
        await forecasts.step()
        assert tables.forecasts.items() == rows


async def test_after_a_restart_the_rows_follow_what_is_known(nats_server: NatsServer, log: Log, redis: Redis) -> None:
    async with tables_of(nats_server, LEDGER) as tables:
        async with learning(log, redis) as (writer, lessons):
            await live(log, 12)
            await caught_up(log, redis)
            await Forecasts(tables.forecasts, lessons, lambda: True).step()
            row = tables.forecasts.get("f")
            assert row is not None
            await tables.forecasts.put("gone", row)  # as one of whose work the log keeps nothing
            await tables.forecasts.delete("f")
        async with learning(log, redis) as (writer, lessons), told_by(writer, lessons, tables):
            await until(lambda: tables.forecasts.items().keys() == {"f", "g"})
            again = tables.forecasts.get("f")
            assert again is not None
            assert again.kinds == row.kinds


async def test_while_the_log_is_read_anew_nothing_is_told_of_the_past(
    nats_server: NatsServer, log: Log, redis: Redis
) -> None:
    ready = False
    async with tables_of(nats_server, LEDGER) as tables, learning(log, redis) as (_, lessons):
        telling = asyncio.create_task(Forecasts(tables.forecasts, lessons, lambda: ready, every_s=0.01).run())
        await live(log, 12)
        await caught_up(log, redis)
        await until(lambda: bool(lessons.untold()))
        await asyncio.sleep(0.1)
        assert tables.forecasts.items() == {}
        ready = True
        await until(lambda: tables.forecasts.items().keys() == {"f", "g"})
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)


async def test_what_could_not_be_told_is_told_the_next_time(nats_server: NatsServer, log: Log, redis: Redis) -> None:
    async with tables_of(nats_server, LEDGER) as tables, learning(log, redis) as (_, lessons):
        await live(log, 12)
        await caught_up(log, redis)
        forecasts = Forecasts(tables.forecasts, lessons, lambda: True)
        store, tables.forecasts._store = tables.forecasts._store, None
        with pytest.raises(Unavailable):
            await forecasts.step()
        tables.forecasts._store = store
        await forecasts.step()
        assert tables.forecasts.items().keys() == {"f", "g"}


def test_a_writer_is_whole_once_it_has_begun_and_caught_up() -> None:
    nothing: Any = None
    assert not Writer(nothing, nothing).whole
