"""A tenant with 10,000 queued invocations delays no other: in the hand of a worker, and on a platform."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from headrace import Client
from streams import topology
from streams.log import Log
from tests.platforms import UpProcess
from tests.processes import wait_until
from tests.stories import trigger
from tests.test_intake import Tenants, opened, take
from tests.test_tenants_real import headrace, knows

QUEUED = 10_000
BATCH = 500
WORK_S = 0.005

# ---------------------------------------------------------------- one worker's lanes


async def flood(log: Log, tenant: str, count: int, deadline: float | None) -> None:
    now = time.time()
    for start in range(0, count, BATCH):
        numbers = range(start, min(count, start + BATCH))
        units = [trigger(f"{tenant}{n}", tenant=tenant, now=now, deadline=deadline) for n in numbers]
        await log.append([record for unit in units for record in unit.records])


async def order_of(log: Log, tenants: Sequence[str], count: int) -> list[tuple[str, float | None]]:
    """Return whose work a worker takes first, and by when it is due."""
    rows = Tenants()
    for name in tenants:
        rows.put(name)
    found = []
    async with opened(log, slots=1, tenants=rows) as intake:
        for _ in range(count):
            delivery = await take(intake)
            found.append((delivery.invocation.tenant, delivery.invocation.deadline))
            await asyncio.sleep(WORK_S)  # what is taken faster than it can arrive is taken as it arrives
            await delivery.ack()
    return found


@pytest.mark.parametrize("left_s", [None, 600.0])
async def test_the_urgent_work_of_another_is_taken_among_the_next(log: Log, left_s: float | None) -> None:
    """Also where the queued work is in the same lane, and due a moment earlier than the other's."""
    for name in ("a", "b"):
        await topology.add_tenant(log.link, name)
    now = time.time()
    await flood(log, "a", QUEUED, None if left_s is None else now + left_s)
    await flood(log, "b", 1, now + 601.0)
    taken = await order_of(log, ("a", "b"), 20)
    assert "b" in [tenant for tenant, _ in taken]


async def test_behind_one_queue_for_both_it_would_not_be(log: Log) -> None:
    """The same work, all of one tenant and so of one consumer a lane: the last one to come is not even seen."""
    await topology.add_tenant(log.link, "a")
    now = time.time()
    await flood(log, "a", QUEUED, now + 600.0)
    await log.append([trigger("last", tenant="a", now=now, deadline=now + 601.0).record])
    taken = await order_of(log, ("a",), 500)
    assert now + 601.0 not in [deadline for _, deadline in taken]


async def test_work_without_deadlines_is_taken_in_even_shares(log: Log) -> None:
    for name in ("a", "b", "c"):
        await topology.add_tenant(log.link, name)
    await flood(log, "a", QUEUED, None)
    await flood(log, "b", 200, None)
    await flood(log, "c", 200, None)
    shares = Counter(tenant for tenant, _ in await order_of(log, ("a", "b", "c"), 150))
    assert min(shares["a"], shares["b"], shares["c"]) >= 40


# ---------------------------------------------------------------- a platform

FUNCTIONS = """
import os
import time

from headrace import function, on


def say(path, who):
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, who.encode() + b"\\n")
    os.close(handle)


@on(type="org.test.nap", name="nap")
@function
def nap(data):
    say(data["path"], data["who"])
    time.sleep(0.02)


@on(name="urgent", deadline="600s")
@function
def urgent(data):
    say(data["path"], data["who"])
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Client, Path]]:
    """A platform with two slots and two tenants, who have the same functions."""
    folder = tmp_path_factory.mktemp("fair")
    platform = UpProcess(folder / "headrace", "--workers", "2").wait_ready()
    try:
        (folder / "naps.py").write_text(FUNCTIONS)
        clients = [Client(platform.url, headrace(platform, "add", name).strip()) for name in ("a", "b")]
        for client in clients:
            wait_until(partial(knows, client), 10)
            client.deploy(folder / "naps.py")
        yield clients[0], clients[1], folder
        for client in clients:
            client.close()
    finally:
        platform.end()


def send(client: Client, who: str, path: Path, count: int, deadline: str | None) -> None:
    extra = {} if deadline is None else {"deadline": deadline}
    for start in range(0, count, BATCH):
        numbers = range(start, min(count, start + BATCH))
        data = {"path": str(path), "who": who}
        event = {"specversion": "1.0", "source": f"/{path.name}", "type": "org.test.nap", "data": data, **extra}
        client.publish([event | {"id": f"{who}-{n}"} for n in numbers])


def started(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


@pytest.mark.parametrize("deadline", [None, "600s"])
def test_on_a_platform_too(two: tuple[Client, Client, Path], deadline: str | None) -> None:
    a, b, folder = two
    path = folder / f"order-{deadline}"
    send(a, "a", path, QUEUED, deadline)
    before = len(started(path))
    assert before < QUEUED // 2
    b.trigger("urgent", {"path": str(path), "who": "b"}).result(timeout=60)
    ahead = started(path).index("b") - before
    assert ahead < 200  # some were begun while it came in; ten thousand were queued
    if deadline is None:
        send(b, "later", path, 200, None)
        wait_until(lambda: started(path).count("later") == 200, 100)
        order = started(path)
        first, last = order.index("later"), len(order) - order[::-1].index("later")
        assert order[first:last].count("a") <= 2 * 200
    for run in a.runs(limit=1):
        assert run.route == "nap"
