"""The promise under faults from seeds, in virtual time; and that the simulated servers are like the real ones."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from infra.embedded import RedisServer
from streams.ledger import WHOLE, Writer
from streams.link import Link
from streams.stored import Stored
from tests.doubles import MemoryLog
from tests.simulation.client import Network, SimClient
from tests.simulation.conversation import Said, converse
from tests.simulation.loop import Process, SimLoop, run
from tests.simulation.redis import SimRedis
from tests.simulation.server import SimServer
from tests.simulation.world import Options, Verdict, World, simulate
from workers.attaching import Attaching
from workers.worker import Tools, Worker

SEEDS = 2000
SHARE = 250  # so many in one test, so that the tests spread over the cores
CONTRAST_SEEDS = 40
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("first", range(0, SEEDS, SHARE))
def test_two_thousand_seeds_keep_the_promise(first: int) -> None:
    words = [sys.executable, "-P", "-m", "tests.simulation", "--seeds", str(SHARE), "--from", str(first)]
    ran = subprocess.run([*words, "--processes", "1"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{SHARE} seeds, 0 of them with something wrong" in ran.stdout


def test_a_seed_repeats_exactly() -> None:
    for seed in range(5):
        assert simulate(seed, Options(trace=True)).trace == simulate(seed, Options(trace=True)).trace


def test_a_seed_repeats_exactly_in_another_process() -> None:
    words = [sys.executable, "-P", "-m", "tests.simulation", "--seed", "7", "--trace"]
    told = {
        subprocess.run(
            words, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(told) == 1
    assert b"store" in told.pop()


def kinds(options: Options) -> set[str]:
    """Return the kinds of what is wrong in some seeds."""
    verdicts: list[Verdict] = [simulate(seed, options) for seed in range(CONTRAST_SEEDS)]
    return {wrong.partition(":")[0] for verdict in verdicts for wrong in verdict.wrong}


def test_without_the_guards_of_the_log_the_simulation_fails() -> None:
    assert {"doubled", "fencing", "wrong"} <= kinds(Options(guarding=False))


def test_a_worker_that_acknowledges_before_it_records_loses_runs() -> None:
    class Hasty(Worker):
        async def step(self, delivery, slot_free):  # type: ignore[no-untyped-def]
            await delivery.ack()
            return await super().step(delivery, slot_free)

    def hasty(tools: Tools) -> Worker:
        return Hasty(tools)

    assert "lost" in kinds(Options(worker=hasty))


def test_a_worker_that_takes_over_without_a_lease_is_caught() -> None:
    class Bold(Worker):
        async def _claim(self, delivery, past):  # type: ignore[no-untyped-def]
            return past

    def bold(tools: Tools) -> Worker:
        return Bold(tools)

    assert any("fencing" in w for seed in range(200) for w in simulate(seed, Options(worker=bold)).wrong)


def test_an_agent_that_does_not_attach_to_what_it_left_loses_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(self: Attaching) -> None:
        return

    monkeypatch.setattr(Attaching, "attach_all", nothing)
    assert any(wrong.startswith("lost") for seed in range(70, 80) for wrong in simulate(seed).wrong)


def test_a_quiet_world_is_quick_and_right() -> None:
    for seed in range(20):
        verdict = simulate(seed, Options(faults=False))
        assert verdict.wrong == []
        assert verdict.virtual_s < 60


# ---------------------------------------------------------------- the simulated servers are like the real ones


def simulated(seed: int) -> Said:
    """Have the conversation with the simulated server."""
    loop = SimLoop(random.Random(seed))
    rng = random.Random(seed)
    process = Process(loop, "talker")

    async def talk() -> Said:
        link = Link()
        client = SimClient(process, link, SimServer(loop, rng), Network(loop, rng))
        client.connect()
        said: Said = await process.spawn(converse(client))
        return said

    try:
        return run(loop, talk())  # type: ignore[no-any-return]
    finally:
        loop.take_apart([process])


async def test_the_simulated_log_server_answers_as_the_real_one(link: Link) -> None:
    real = await converse(link.nc)
    for seed in range(5):
        for expected, found in zip(real, simulated(seed), strict=True):
            assert found == expected


async def test_the_simulated_redis_holds_what_the_real_one_holds(redis_server: RedisServer) -> None:
    world = World(11, Options(faults=False))
    run(world.loop, world.live())
    facts = [Stored(k.seq, k.subject, k.body, k.at) for k in world.server.log]
    world.loop.take_apart(world.processes)
    real = Redis.from_url(redis_server.url, password=redis_server.password)
    loop = SimLoop(random.Random(1))
    fake = SimRedis(loop, random.Random(1))
    log = MemoryLog()
    log.stored = facts
    for redis in (real, fake):
        writer = Writer(log, redis)  # type: ignore[arg-type]
        await writer._begin()
        for start in range(0, len(facts), 7):
            await writer.step(facts[start : start + 7])
    loop.close()
    found: dict[Any, Any] = {}
    for key in await real.keys():
        match await real.type(key):
            case b"hash":
                found[key] = await real.hgetall(key)
            case b"zset":
                scores: Any = await real.zrange(key, 0, -1, withscores=True)
                found[key] = dict(scores)
            case _:
                found[key] = await real.get(key)
    await real.aclose()
    assert len(found) > 5
    assert found.pop(WHOLE.encode())
    assert fake.data.pop(WHOLE.encode())
    assert fake.data == found


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_killed_process_runs_nothing_more(share: float) -> None:
    loop = SimLoop(random.Random(1))
    done: list[str] = []
    processes: list[Process] = []

    async def work() -> None:
        try:
            await asyncio.sleep(1.0)
            done.append("woke")
        finally:
            done.append("cleaned up")

    async def live() -> None:
        process = Process(loop, "p")
        process.spawn(work())
        await asyncio.sleep(share)
        process.kill()
        await asyncio.sleep(5.0)
        assert done == []
        processes.append(process)

    run(loop, live())
    loop.take_apart(processes)
