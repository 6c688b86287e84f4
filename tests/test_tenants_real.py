"""Tenants on real servers: added, used, given tokens and removed with the commands of an operator."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from nats.js.api import AckPolicy, ConsumerConfig

from headrace import Client
from headrace.errors import Conflict, NotFound, Unauthorized
from infra.embedded import NatsServer
from infra.rights import ADMIN, WORKER
from infra.settings import Settings
from infra.tenants import Admin, administration
from streams import topology
from streams.backlog import Lanes
from streams.link import Link, open_link
from streams.log import Log
from streams.tables import open_tables
from streams.topology import ACK_WAIT_S, DEFAULT_TENANT, LANES, STREAM, lane_consumer, lane_of
from tests.platforms import UpProcess
from tests.processes import wait_until
from tests.stories import success, trigger

FUNCTIONS = """
import time

from headrace import function, on


@on(name="whoami")
@function
def whoami(data):
    return "{name}"


@on(name="slow")
@function
def slow(seconds: float):
    time.sleep(seconds)
"""


def headrace(platform: UpProcess, *words: str, code: int = 0) -> str:
    """Run a server command beside a running platform, as an operator does from a second terminal."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "infra", "tenant", *words, "--data", str(platform.data)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def deploy(client: Client, folder: Path, name: str) -> None:
    path = folder / f"{name.replace('-', '_')}.py"
    path.write_text(FUNCTIONS.format(name=name))
    client.deploy(path)


def test_tenants_come_and_go_beside_a_running_platform(platform: UpProcess, tmp_path: Path) -> None:
    tokens = {name: headrace(platform, "add", name).strip() for name in ("lab-a", "lab-b")}
    clients = {name: Client(platform.url, token) for name, token in tokens.items()}
    own = Client(platform.url, platform.token)
    try:
        for name, client in clients.items():
            wait_until(partial(knows, client), 10)
            deploy(client, tmp_path, name)
        # Functions and routes of one name: each runs his own, on consumers that were made while the worker ran.
        for name, client in clients.items():
            assert client.trigger("whoami", 1).result(timeout=60) == name
        with pytest.raises(NotFound):
            own.trigger("whoami", 1)
        assert [run.view().tenant for run in clients["lab-a"].runs()] == ["lab-a"]
        assert list(own.runs()) == []
        listed = json.loads(headrace(platform, "list", "--json"))["tenants"]
        assert [(t["name"], t["tokens"]) for t in listed] == [(DEFAULT_TENANT, 1), ("lab-a", 1), ("lab-b", 1)]
        assert not any(token in headrace(platform, "list") for token in tokens.values())

        headrace(platform, "add", "lab-a", code=2)
        headrace(platform, "add", "default", code=2)
        headrace(platform, "add", "no.dots", code=2)
        second = headrace(platform, "token", "lab-a", "--revoke").strip()
        wait_until(lambda: not knows(clients["lab-a"]), 10)
        renewed = Client(platform.url, second)
        assert len(list(renewed.runs())) == 1

        busy = renewed.trigger("slow", 120.0)
        wait_until(lambda: busy.view().state == "running", 60)
        headrace(platform, "remove", "lab-a", code=2)
        assert "1 runs were canceled" in headrace(platform, "remove", "lab-a", "--force")
        wait_until(lambda: not knows(renewed), 10)
        assert clients["lab-b"].trigger("whoami", 2).result(timeout=60) == "lab-b"
        assert [t["name"] for t in json.loads(headrace(platform, "list", "--json"))["tenants"]] == ["default", "lab-b"]
        renewed.close()
    finally:
        for client in (own, *clients.values()):
            client.close()


def knows(client: Client) -> bool:
    """Say whether the gateway knows the token of a client."""
    try:
        list(client.runs())
    except Unauthorized:
        return False
    return True


# ---------------------------------------------------------------- lanes of tenants


@pytest.fixture
async def admin(nats_server: NatsServer, link: Link) -> AsyncIterator[Admin]:
    settings = Settings(nats_url=nats_server.url, nats_user=ADMIN, nats_password_file=nats_server.password_file(ADMIN))
    async with administration(settings) as opened:
        yield opened


async def lanes(link: Link, tenant: str) -> set[str]:
    return {
        name for name in await topology.consumers(link.jetstream()) if (of := lane_of(name)) and of.tenant == tenant
    }


async def test_a_tenant_has_a_consumer_for_each_lane_before_it_has_a_row(link: Link, admin: Admin) -> None:
    await admin.add("a")
    assert await lanes(link, "a") == {lane_consumer(lane, "a") for lane in range(LANES)}
    await topology.ensure(link, topology.Limits())
    assert await lanes(link, "a") == {lane_consumer(lane, "a") for lane in range(LANES)}
    await admin.remove("a", force=False)
    assert await lanes(link, "a") == set()
    with pytest.raises(NotFound):
        await admin.remove("a", force=False)


async def test_setup_makes_the_lanes_of_a_tenant_again_from_the_beginning(link: Link, admin: Admin) -> None:
    """A power cut may cost a consumer: what it had yet to deliver must not be lost with it."""
    await admin.add("a")
    await link.jetstream().publish(topology.work_subject(3, "a", "r", "i"), b"work")
    await link.jetstream().delete_consumer(STREAM, lane_consumer(3, "a"))
    await topology.ensure(link, topology.Limits())
    look = await Lanes(link).look()
    assert (look.tenants["a"][3], look.waiting[3]) == (1, 1)


async def test_one_who_comes_back_is_not_given_the_work_of_long_ago(link: Link, admin: Admin) -> None:
    await admin.add("a")
    await link.jetstream().publish(topology.work_subject(3, "a", "r", "i"), b"work")
    removed = await admin.remove("a", force=True)
    assert removed.canceled == 1
    await admin.add("a")
    assert (await Lanes(link).look()).tenants["a"] == (0,) * LANES


async def test_the_runs_of_batch_jobs_that_a_site_has_are_canceled_with_their_tenant(link: Link, admin: Admin) -> None:
    await admin.add("a")
    js = link.jetstream()
    for run in ("ended", "canceled", "open"):
        await js.publish(topology.job_subject("lab", "a", run, "j"), b"job")
    await js.publish(topology.done_subject("ended", "j"), b"outcome")
    await js.publish(topology.cancel_subject("canceled"), b"wish")
    with pytest.raises(Conflict, match="1 invocations and jobs of a wait or run"):
        await admin.remove("a", force=False)
    assert (await admin.remove("a", force=True)).canceled == 1
    assert await js.get_last_msg(STREAM, topology.cancel_subject("open"))


async def test_an_upgrade_from_undivided_lanes_loses_nothing_and_repeats_little(
    nats_server: NatsServer, link: Link, log: Log
) -> None:
    js = link.jetstream()
    for lane in range(LANES):
        await js.delete_consumer(STREAM, lane_consumer(lane, DEFAULT_TENANT))
        await js.add_consumer(
            STREAM,
            ConsumerConfig(
                durable_name=f"work-{lane}",
                filter_subject=f"hr.work.{lane}.>",
                ack_policy=AckPolicy.EXPLICIT,
                ack_wait=ACK_WAIT_S,
                max_ack_pending=1000,
            ),
        )
    admitted = [trigger(f"e{n}") for n in range(6)]
    for one in admitted:
        await log.append([one.record])
    for one in admitted[:2]:
        await log.append(success(one.invocation))
    old = await js.pull_subscribe_bind("work-11", STREAM)
    for message in await old.fetch(2, timeout=5):
        await message.ack_sync()
    await topology.ensure(link, topology.Limits())
    there = await topology.consumers(js)
    assert {name for name in there if lane_of(name) is None and name.startswith("work-")} == set()
    assert len([name for name in there if lane_of(name)]) == LANES
    tables = await open_tables(link)
    worker = await open_link(nats_server.url, user=WORKER, password=nats_server.password(WORKER))
    fresh = await worker.jetstream().pull_subscribe_bind(lane_consumer(11, DEFAULT_TENANT), STREAM)
    found = [m.metadata.sequence.stream for m in await fresh.fetch(6, timeout=2)]
    firsts = [stored.seq for stored in await log.last_of_each(["hr.work.>"])]
    assert found == firsts[2:]
    await worker.close()
    await tables.close()
