"""A writer of the read model at work, and waiting until it has read the whole log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.asyncio import Redis

from streams.ledger import POSITION, WHOLE, Writer
from streams.log import Log
from tests.processes import until


@asynccontextmanager
async def at_work(writer: Writer) -> AsyncIterator[Writer]:
    """Let a writer follow the log."""
    writing = asyncio.create_task(writer.run())
    try:
        yield writer
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)


async def caught_up(log: Log, redis: Redis) -> None:
    """Return once all that is in the log now is in the read model, and that is whole."""
    end = await log.end_seq()

    async def read() -> bool:
        return int(await redis.get(POSITION) or 0) >= end and bool(await redis.exists(WHOLE))

    await until(read)
