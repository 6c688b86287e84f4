"""When a worker or an agent knows of all runs that were canceled before it began."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from headrace.tasks import ended
from streams.log import Log, Record
from streams.stored import Stored
from streams.topology import STREAM, cancel_subject
from workers import cancels
from workers.cancels import Cancels


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> asyncio.Queue[list[Stored]]:
    """What comes of following the log, which is slow or has trouble: stands in for that, and gives what is put here."""
    queue: asyncio.Queue[list[Stored]] = asyncio.Queue()

    async def follow(log: Log, subjects: list[str], **_: Any) -> AsyncGenerator[list[Stored], None]:
        while True:
            yield await queue.get()
            queue.task_done()

    monkeypatch.setattr(cancels, "follow", follow)
    return queue


@asynccontextmanager
async def following(log: Log) -> AsyncIterator[Cancels]:
    found = Cancels(log)
    task = asyncio.create_task(found.follow())
    try:
        yield found
    finally:
        await ended([task])


async def test_silence_does_not_mean_that_all_is_known(log: Log, batches: asyncio.Queue[list[Stored]]) -> None:
    await log.append([Record(cancel_subject("run"), b"x")])
    stored = await log.last(cancel_subject("run"))
    assert stored is not None
    async with following(log) as found, asyncio.timeout(30):
        batches.put_nowait([])
        await batches.join()
        assert not found.read.is_set()
        batches.put_nowait([stored])
        await found.read.wait()
        assert "run" in found


async def test_what_has_left_the_log_is_not_waited_for(log: Log, batches: asyncio.Queue[list[Stored]]) -> None:
    (seq,) = await log.append([Record(cancel_subject("run"), b"x")])
    async with following(log) as found, asyncio.timeout(30):
        batches.put_nowait([])
        await batches.join()
        await log.link.jetstream().delete_msg(STREAM, seq)
        batches.put_nowait([])
        await found.read.wait()
