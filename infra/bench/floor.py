"""The raw floor: publish, pull, publish the result, acknowledge, with plain nats-py on the same server.

One stream of limits retention on a server that syncs every message, as Headrace has it; nothing else is done. Each
message is published by itself and awaited, as the client library's documentation shows.
"""

from __future__ import annotations

import asyncio
import time

from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig
from nats.js.errors import FetchTimeoutError

from infra.bench.load import quantile
from infra.embedded import NatsServer
from infra.rights import ADMIN
from streams.link import open_link

STREAM = "FLOOR"


async def measure(server: NatsServer, *, count: int, in_flight: int) -> tuple[float, float, float]:
    """Return loops per second, and the p50 and p99 of one loop in seconds."""
    link = await open_link(server.url, user=ADMIN, password=server.password(ADMIN), name="floor")
    js = link.jetstream()
    await js.add_stream(name=STREAM, subjects=["floor.>"], max_bytes=256 * 2**20)
    await js.add_consumer(
        STREAM, ConsumerConfig(durable_name="w", filter_subject="floor.work.*", ack_policy=AckPolicy.EXPLICIT)
    )
    seen: dict[str, asyncio.Future[None]] = {}
    latencies: list[float] = []

    async def work() -> None:
        pull = await js.pull_subscribe_bind(durable="w", stream=STREAM)
        while True:
            try:
                messages = await pull.fetch(max(1, in_flight // 2), timeout=1)
            except (FetchTimeoutError, TimeoutError):
                continue
            await asyncio.gather(*(answer(m.subject.rsplit(".", 1)[1], m) for m in messages))

    async def answer(number: str, message: Msg) -> None:
        await js.publish(f"floor.done.{number}", b"1", timeout=30)
        await message.ack()
        seen[number].set_result(None)

    numbers = iter(range(count))

    async def post() -> None:
        for n in numbers:
            began = time.perf_counter()
            answered = seen[str(n)] = asyncio.get_running_loop().create_future()
            await js.publish(f"floor.work.{n}", b"1", timeout=30)
            await answered
            del seen[str(n)]
            latencies.append(time.perf_counter() - began)

    worker = asyncio.create_task(work())
    began = time.perf_counter()
    await asyncio.gather(*(post() for _ in range(in_flight)))
    took_s = time.perf_counter() - began
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)
    await js.delete_stream(STREAM)
    await link.close()
    return count / took_s, quantile(latencies, 0.5), quantile(latencies, 0.99)
