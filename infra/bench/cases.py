"""What is measured, each case on a running platform and through the front door."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import NamedTuple
from uuid import uuid4

from headrace.client import AsyncClient
from infra.bench import load
from infra.bench.processes import Usage, platform
from infra.rights import GATEWAY
from infra.up import Platform
from streams.follow import follow
from streams.link import open_link
from streams.log import Log

ANSWERS_TIMEOUT_S = 300.0
JSON = "application/json"
BATCH = "application/cloudevents-batch+json"
EVENT_TYPE = "org.headrace.bench"
FUNCTIONS = f'''\
"""Functions that do nothing, so that what is measured is the platform."""

from headrace import Context, function, on


@on(type="{EVENT_TYPE}")  # without a deadline nothing is refused for coming late: that is for `make chaos` F11
@function
def noop(x: int) -> int:
    return x


@on(deadline="60s")
@function
def fan(n: int, ctx: Context) -> None:
    ctx.map("noop", range(n), then="count")


@function
def count(xs: list[int]) -> int:
    return len(xs)
'''


class Bench(NamedTuple):
    """A platform under measurement: its address, and a view of its log to see answers as they are stored."""

    platform: Platform
    host: str
    port: int
    log: Log

    def post(self, path: str, body: object, content_type: str = JSON, *headers: str) -> bytes:
        """Return the bytes of one POST to the platform."""
        raw = json.dumps(body).encode()
        return load.request(f"{self.host}:{self.port}", self.platform.token, path, raw, content_type, *headers)


@asynccontextmanager
async def bench(running: Platform) -> AsyncIterator[Bench]:
    """Deploy the functions and open a view of the log."""
    source = running.data / "noop.py"
    source.write_text(FUNCTIONS)
    async with AsyncClient(running.url, running.token) as client:
        await client.deploy(source)
    where = json.loads((running.data / "run" / "servers.json").read_text())
    password = (running.data / "run" / f"nats-{GATEWAY}.password").read_text().strip()
    link = await open_link(where["nats_url"], user=GATEWAY, password=password, name="bench")
    log = Log(link)
    await log.start()
    host, _, port = running.url.removeprefix("http://").rpartition(":")
    try:
        yield Bench(running, host, int(port), log)
    finally:
        await log.close()
        await link.close()


async def answers(of: Bench, after: int, count: int) -> float:
    """Wait until so many outcomes are in the log after a sequence, and return the instant of the last."""
    seen = 0
    async with asyncio.timeout(ANSWERS_TIMEOUT_S):
        async for batch in follow(of.log, ["hr.done.>"], after=after, window=4096):
            seen += len(batch)
            if seen >= count:
                break
    return time.perf_counter()


def _batch(prefix: str, number: int, size: int) -> list[dict[str, object]]:
    return [
        {"specversion": "1.0", "id": f"{prefix}-{number}-{i}", "source": "/bench", "type": EVENT_TYPE, "data": i}
        for i in range(size)
    ]


class Throughput(NamedTuple):
    """Runs accepted and answered per second, and latencies of the requests in seconds."""

    accepted_per_s: float
    answered_per_s: float
    p50_s: float
    p99_s: float


async def _through(of: Bench, requests: Iterator[bytes], runs: int, per_request: int, in_flight: int) -> Throughput:
    after = await of.log.end_seq()
    began = time.perf_counter()
    last = asyncio.create_task(answers(of, after, runs))
    sent = await load.send(of.host, of.port, requests, in_flight=in_flight)
    if sent.refused:
        raise RuntimeError(f"{sent.refused} requests were refused")
    ended = await last
    return Throughput(
        sent.per_s * per_request,
        runs / (ended - began),
        load.quantile(sent.latencies_s, 0.5),
        load.quantile(sent.latencies_s, 0.99),
    )


async def single_posts(of: Bench, *, runs: int, in_flight: int) -> Throughput:
    """One trigger per request."""
    one = of.post("/v1/triggers/noop", 1)
    return await _through(of, iter([one] * runs), runs, 1, in_flight)


async def batches(of: Bench, *, runs: int, size: int, in_flight: int) -> Throughput:
    """CloudEvents in batches."""
    prefix = uuid4().hex
    requests = (of.post("/v1/events", _batch(prefix, n, size), BATCH) for n in range(runs // size))
    return await _through(of, iter(list(requests)), runs, size, in_flight)


async def one_at_a_time(of: Bench, *, runs: int) -> tuple[float, float, float]:
    """Trigger to answer with one in flight: per second, p50 and p99 in seconds."""
    one = of.post("/v1/triggers/noop", 1, JSON, "Prefer: wait=10")
    sent = await load.send(of.host, of.port, iter([one] * runs), in_flight=1, expect=b"200")
    if sent.refused:
        raise RuntimeError(f"{sent.refused} answers did not come in time")
    return sent.per_s, load.quantile(sent.latencies_s, 0.5), load.quantile(sent.latencies_s, 0.99)


async def map_of(of: Bench, *, members: int) -> float:
    """Trigger to answer of one map, in seconds."""
    request = of.post("/v1/triggers/fan", members, JSON, "Prefer: wait=60")
    sent = await load.send(of.host, of.port, iter([request]), in_flight=1, expect=b"200")
    if sent.refused:
        raise RuntimeError("the map did not end in time")
    return sent.latencies_s[0]


async def idle_cpu(of: Bench, *, seconds: float) -> dict[str, float]:
    """Share of one core that each process uses while nothing happens, in percent."""
    before = platform(of.platform.processes)
    await asyncio.sleep(seconds)
    after = platform(of.platform.processes)
    return {name: 100 * (after[name].cpu_s - before[name].cpu_s) / seconds for name in before if name in after}


async def settled(read: Callable[[], dict[str, Usage]], seconds: float = 10.0) -> dict[str, Usage]:
    """Return the usage of all processes once what was begun is over."""
    await asyncio.sleep(seconds)
    return read()
