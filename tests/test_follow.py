"""Following the log: everything, in order, without a gap, whatever happens on the way."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import aclosing

from infra.embedded import NatsServer
from streams.follow import follow
from streams.log import Log, Record
from streams.stored import Stored


def kill(server: NatsServer) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)


async def collect(log: Log, subjects: list[str], after: int, count: int) -> list[Stored]:
    found: list[Stored] = []
    async with asyncio.timeout(30), aclosing(follow(log, subjects, after=after, window=64)) as batches:
        async for batch in batches:
            found += batch
            if len(found) >= count:
                break
    return found


async def note(log: Log, first: int, last: int) -> None:
    for start in range(first, last, 100):
        numbers = range(start, min(last, start + 100))
        await asyncio.gather(*(log.append([Record(f"hr.note.r.i{n}", b"%d" % n)], timeout_s=30) for n in numbers))


async def test_everything_after_a_sequence_comes_in_order(log: Log) -> None:
    await note(log, 0, 1000)
    found = await collect(log, ["hr.note.>"], 250, 750)
    assert [s.seq for s in found] == list(range(251, 1001))


async def test_only_the_subjects_asked_for_come(log: Log) -> None:
    await log.append([Record("hr.note.r1.i", b"a"), Record("hr.start.r1.i", b"b"), Record("hr.note.r2.i", b"c")])
    found = await collect(log, ["hr.start.>", "hr.note.r2.>"], 0, 2)
    assert [s.body for s in found] == [b"b", b"c"]


async def test_without_a_place_it_begins_with_what_comes_from_now_on(log: Log) -> None:
    await log.append([Record("hr.note.r.old", b"old")])
    async with asyncio.timeout(30), aclosing(follow(log, ["hr.note.>"], idle_s=0.05)) as batches:
        assert await anext(batches) == []  # it is listening now, and what was there before does not come
        await log.append([Record("hr.note.r.new", b"new")])
        async for batch in batches:
            if batch:
                assert [s.body for s in batch] == [b"new"]
                break


async def test_a_killed_server_leaves_no_gap_and_no_repeat(log: Log, nats_server: NatsServer) -> None:
    reading = asyncio.create_task(collect(log, ["hr.note.>"], 0, 900))
    await note(log, 0, 300)
    kill(nats_server)
    await note(log, 300, 600)
    kill(nats_server)
    await note(log, 600, 900)
    found = await reading
    assert [s.seq for s in found] == list(range(1, 901))
