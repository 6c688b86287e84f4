"""Figures that several cases need: latencies of the door, gaps, memory, and what lies in the read model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import redis.exceptions
from redis.asyncio import Redis

from infra.bench.load import quantile
from infra.bench.processes import usage
from infra.chaos.launch import Up
from infra.chaos.lines import Figure, Hit, Reply
from streams.ledger import AUDIT, POSITION, WHOLE

MS = 1000.0
LOOK_S = 0.02


class Door(NamedTuple):
    """How triggers fared at the door: how many, latencies of those accepted in seconds, and the longest gap."""

    n: int
    p50_s: float
    p99_s: float


def door(replies: Iterable[Reply], since_s: float = 0.0, until_s: float = float("inf")) -> Door:
    """Return how triggers fared that were accepted at once and sent in this part of the load."""
    took = [r.took_s for r in replies if r.answered == "accepted" and r.attempt == 1 and since_s <= r.sent_s < until_s]
    return Door(len(took), quantile(took, 0.5) if took else 0.0, quantile(took, 0.99) if took else 0.0)


def longest_gap(replies: Sequence[Reply]) -> float:
    """Return the longest time between two promises in a row, in seconds."""
    at = sorted(r.sent_s + r.took_s for r in replies if r.answered == "accepted")
    return max((b - a for a, b in pairwise(at)), default=0.0)


def gap(replies: Sequence[Reply]) -> Figure:
    """Return the longest time without a promise as a figure."""
    return Figure(name="longest time without a 202", value=f"{longest_gap(replies):.2f} s")


def hits_of(hits: Iterable[Hit], act: str) -> list[Hit]:
    """Return the faults of one kind that did hit somebody."""
    return [hit for hit in hits if hit.act == act and hit.pid]


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    return usage(pid).resident_mib


@asynccontextmanager
async def read_model(up: Up) -> AsyncIterator[Any]:
    """Open the read model of a platform from the side, to see what lies in it."""
    password = (up.data / "run" / "redis.password").read_text().strip()
    client = Redis.from_url(up.servers().redis_url, password=password, socket_timeout=2.0, socket_connect_timeout=1.0)
    try:
        yield client
    finally:
        await client.aclose()


async def position(client: Any) -> int:
    """Return how far the read model is in the log; -1 while it is away."""
    try:
        return int(await client.get(POSITION) or 0)
    except (redis.exceptions.RedisError, OSError):
        return -1


async def until_position(client: Any, wanted: int, patience_s: float = 60.0) -> tuple[float, float]:
    """Return the instants (epoch seconds) at which the first facts were there again, and all that were wanted."""
    give_up_at = time.monotonic() + patience_s
    back_at = 0.0
    while time.monotonic() < give_up_at:
        now = await position(client)
        if now > 0 and not back_at:
            back_at = time.time()
        if now >= wanted:
            return back_at, time.time()
        await asyncio.sleep(LOOK_S)
    return back_at, float("inf")


async def contents(client: Any) -> dict[bytes, object]:
    """Return all that lies in the read model, key by key.

    Left out are its mark of being whole and the report of the auditor, which are other ones each time.
    """
    found: dict[bytes, object] = {}
    async for key in client.scan_iter(count=1000):
        if key in (WHOLE.encode(), AUDIT.encode()):
            continue
        kind = await client.type(key)
        if kind == b"hash":
            found[key] = await client.hgetall(key)
        elif kind == b"zset":
            found[key] = sorted(await client.zrange(key, 0, -1, withscores=True))
        elif kind == b"set":
            found[key] = await client.smembers(key)
        else:
            found[key] = await client.get(key)
    return found


def differing(before: dict[bytes, object], after: dict[bytes, object]) -> list[str]:
    """Return the keys that are not the same."""
    return sorted(
        key.decode("utf-8", "replace") for key in before.keys() | after.keys() if before.get(key) != after.get(key)
    )
