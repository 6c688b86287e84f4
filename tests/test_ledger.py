"""The read model: what Redis says is what the log says, also after Redis lost everything."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest
from msgspec import structs
from redis.asyncio import Redis

from functions.jobs import payload_of
from headrace.errors import BadRequest, Unavailable
from headrace.joblog import JOB, Held, JobWork, Submitted
from headrace.wire import NOTHING, Call, encode
from infra.embedded import RedisServer
from streams.ledger import Writer
from streams.log import Log, Record
from streams.reader import Reader
from streams.topology import DEFAULT_TENANT, held_subject, job_subject, submit_subject
from tests.stories import children, failure, success, trigger
from tests.writers import at_work


@pytest.fixture
async def reader(log: Log, redis: Redis) -> AsyncIterator[Reader]:
    """A reader whose writer is at work."""
    async with at_work(Writer(log, redis)):
        yield Reader(redis)


async def caught_up(reader: Reader, log: Log) -> None:
    end = await log.end_seq()
    async with asyncio.timeout(20):
        while True:
            try:
                if await reader.position() >= end:
                    return
            except Unavailable:
                pass
            await asyncio.sleep(0.01)


async def fill(log: Log, count: int, first_id: int = 0) -> None:
    """Three kinds of runs in turn: succeeded, failed, and open."""
    for n in range(first_id, first_id + count):
        first = trigger(f"e{n}", now=1000.0 + n, deadline=1060.0 + n)
        await log.append([first.record])
        if n % 3 == 0:
            await log.append(success(first.invocation))
        elif n % 3 == 1:
            await log.append(failure(first.invocation))


async def test_a_run_can_be_read_with_its_invocations(log: Log, reader: Reader) -> None:
    first = trigger("e", deadline=1060.0)
    await log.append([first.record])
    unit = success(first.invocation, Call(function="g", payload=NOTHING))
    await log.append(unit)
    await log.append(success(children(unit)[0]))
    await caught_up(reader, log)
    run = await reader.run(first.invocation.run_id)
    assert run is not None
    assert (run.state, run.invocations_total) == ("succeeded", 2)
    assert [(i.function, i.state, i.parent_id) for i in run.invocations] == [
        ("f", "succeeded", None),
        ("g", "succeeded", first.invocation.invocation_id),
    ]
    assert await reader.run("unknown") is None


async def test_why_a_job_waits_is_told_as_long_as_it_does(log: Log, reader: Reader) -> None:
    first = trigger("e").invocation
    job = structs.replace(
        first,
        invocation_id="job",
        parent_id=first.invocation_id,
        function=JOB,
        payload=payload_of(JobWork(site="lab", spec=NOTHING)),
    )
    run = job.run_id
    held = Held(run_id=run, invocation_id="job", site="lab", at=1001.0, why="its disk is full")
    submitted = Submitted(
        run_id=run, invocation_id="job", site="lab", attempt=1, native_id="7", at=1002.0, agent="agent/lab/here"
    )
    told = []
    for record in (
        trigger("e").record,
        Record(job_subject("lab", DEFAULT_TENANT, run, "job"), encode(job)),
        Record(held_subject(run, "job", "lab"), encode(held), hint=True),
        Record(submit_subject(run, "job", 1, "lab"), encode(submitted)),
    ):
        await log.append([record])
        await caught_up(reader, log)
        seen = await reader.run(run)
        assert seen is not None
        told += [(each.state, each.why) for each in seen.jobs]
    assert told == [("new", ""), ("new", "its disk is full"), ("queued", "")]


async def test_pages_go_from_new_to_old_and_end(log: Log, reader: Reader) -> None:
    await fill(log, 25)
    await caught_up(reader, log)
    seen: list[str] = []
    cursor: str | None = None
    for _ in range(10):
        page = await reader.page(DEFAULT_TENANT, limit=10, cursor=cursor)
        seen += [run.event.id for run in page.runs]
        cursor = page.next
        if cursor is None:
            break
    assert seen == [f"e{n}" for n in reversed(range(25))]


async def test_pages_can_be_narrowed_by_state_route_and_time(log: Log, reader: Reader) -> None:
    await fill(log, 12)
    await caught_up(reader, log)
    failed = await reader.page(DEFAULT_TENANT, state="failed")
    assert [run.event.id for run in failed.runs] == ["e10", "e7", "e4", "e1"]
    assert (await reader.page(DEFAULT_TENANT, route="g")).runs == []
    assert [r.event.id for r in (await reader.page(DEFAULT_TENANT, since=1010.0)).runs] == ["e11", "e10"]
    assert await reader.open_runs(DEFAULT_TENANT, "f") == 4


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"limit": 1001}, {"cursor": "x"}, {"cursor": "-1"}])
async def test_a_page_that_cannot_be_is_refused(reader: Reader, wrong: dict[str, object]) -> None:
    with pytest.raises(BadRequest):
        await reader.page(DEFAULT_TENANT, **wrong)  # type: ignore[arg-type] # wrong on purpose


async def test_a_wiped_redis_is_filled_again_from_the_log(log: Log, reader: Reader, redis: Redis) -> None:
    await fill(log, 30)
    await caught_up(reader, log)
    before = [(run.run_id, run.state) for run in (await reader.page(DEFAULT_TENANT, limit=100)).runs]
    await redis.flushall()
    await log.append([trigger("after").record])
    await caught_up(reader, log)
    after = [(run.run_id, run.state) for run in (await reader.page(DEFAULT_TENANT, limit=100)).runs]
    assert after[1:] == before


async def test_a_killed_redis_is_caught_up_with(log: Log, reader: Reader, redis_server: RedisServer) -> None:
    await fill(log, 9)
    await caught_up(reader, log)
    assert redis_server.pid is not None
    os.kill(redis_server.pid, signal.SIGKILL)
    await fill(log, 9, first_id=9)
    await caught_up(reader, log)
    assert len((await reader.page(DEFAULT_TENANT, limit=100)).runs) == 18


async def test_while_redis_is_away_a_read_says_so(reader: Reader, redis_server: RedisServer) -> None:
    await redis_server.stop()
    with pytest.raises(Unavailable) as caught:
        await reader.page(DEFAULT_TENANT)
    assert caught.value.hint


async def test_the_oldest_ended_runs_are_forgotten_beyond_the_limit(log: Log, redis: Redis) -> None:
    async with at_work(Writer(log, redis, runs_max=100)):
        firsts = [trigger(f"e{n}", now=1000.0 + n) for n in range(800)]
        await asyncio.gather(*(log.append([f.record]) for f in firsts))
        await asyncio.gather(*(log.append(success(f.invocation)) for f in firsts[1:]))
        reader = Reader(redis)
        await caught_up(reader, log)
        async with asyncio.timeout(20):
            while (kept := int(await redis.zcard("hr:runs"))) > 600:
                await asyncio.sleep(0.01)
        assert kept >= 100
        assert await reader.run(firsts[0].invocation.run_id) is not None  # open, however old
        assert await reader.run(firsts[1].invocation.run_id) is None
        assert len(await redis.keys("hr:run:*")) == kept
