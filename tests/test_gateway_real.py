"""The front door on a real log and a real read model."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from gateway.app import build
from gateway.limits import GatewayLimits
from headrace.names import invocation_id
from headrace.names import run_id as run_id_of
from headrace.sse import messages
from headrace.wire import Invocation, Outcome, Payload, RunEnd, decode, encode
from streams.blobs import FolderBlobs
from streams.follow import follow
from streams.ledger import Writer
from streams.log import Log, Record
from streams.reader import Reader
from streams.tables import Tables, open_tables
from streams.topology import done_subject, work_subject
from tests.doors import TOKEN, Doors, Front
from tests.writers import at_work


@pytest.fixture
async def tables(log: Log) -> AsyncIterator[Tables]:
    opened = await open_tables(log.link)
    yield opened
    await opened.close()


@pytest.fixture
async def fronts(tmp_path: Path, log: Log, tables: Tables, redis: Redis) -> AsyncIterator[list[Front]]:
    """Two gateways on one log."""
    async with Doors(tmp_path) as doors:
        found = []
        for _ in range(2):
            app = build(
                log=log,
                follow=functools.partial(follow, log),
                tables=tables,
                blobs=FolderBlobs(tmp_path / "blobs"),
                reader=Reader(redis),
                token=TOKEN,
                version="1",
                limits=GatewayLimits(disk_bytes_min=0),
            )
            found.append(await doors.serve(app))
        await found[0].deploy(filter={"type": "t"})
        yield found


async def finish(log: Log, run_id: str, result: bytes = b'{"ok":true}') -> None:
    """Commit the outcome of a run's first invocation, as a worker would."""
    stored = await log.last(work_subject("*", "*", run_id, invocation_id(run_id, 0)))
    assert stored is not None
    first = decode(stored.body, Invocation)
    done = Outcome(
        run_id=run_id,
        invocation_id=first.invocation_id,
        function=first.function,
        version=first.version,
        route=first.route,
        tenant=first.tenant,
        state="succeeded",
        attempts=1,
        queued_at=stored.at,
        started_at=stored.at,
        ended_at=stored.at,
        worker="w",
        accepted_at=first.accepted_at,
        deadline=first.deadline,
        result=Payload(body=result, size=len(result)),
        end=RunEnd(run_id=run_id, state="succeeded", answer_id=first.invocation_id, ended_at=stored.at),
    )
    subject = done_subject(run_id, first.invocation_id)
    await log.append([Record(subject, encode(done), subject)])


async def test_a_run_is_one_run_whichever_gateway_is_asked_and_readable_without_the_read_model(
    fronts: list[Front], log: Log
) -> None:
    one, other = fronts
    asked = [f.trigger(data=b"x", headers={"Idempotency-Key": "k"}) for f in (one, other) for _ in range(10)]
    refs = await asyncio.gather(*asked)
    assert len({r.run_id for r in refs}) == 1
    assert sum(not r.duplicate for r in refs) == 1
    run_id = refs[0].run_id
    assert (await other.ask("GET", f"/v1/runs/{run_id}"))[1]["state"] == "accepted"
    await finish(log, run_id)
    assert (await one.ask("GET", f"/v1/runs/{run_id}"))[1]["state"] == "succeeded"
    assert (await other.ask("GET", f"/v1/runs/{run_id}/result"))[1] == {"ok": True}
    await one.problem(422, "POST", "/v1/triggers/r", data=b"y", headers={"Idempotency-Key": "k"})


async def test_a_batch_is_appended_without_what_came_before(fronts: list[Front], log: Log) -> None:
    def batch(*identities: int) -> dict[str, Any]:
        events = [{"specversion": "1.0", "id": str(n), "source": "/s", "type": "t", "data": n} for n in identities]
        return {"data": json.dumps(events), "headers": {"Content-Type": "application/cloudevents-batch+json"}}

    await fronts[0].ask("POST", "/v1/events", **batch(*range(0, 500, 5)))
    status, said, _ = await fronts[1].ask("POST", "/v1/events", **batch(*range(500)))
    assert status == 202
    assert [r["duplicate"] for r in said["runs"]] == [n % 5 == 0 for n in range(500)]
    assert await log.end_seq() == 500
    both = await asyncio.gather(*(f.ask("POST", "/v1/events", **batch(*range(400, 800))) for f in fronts))
    assert [status for status, _, _ in both] == [202, 202]
    assert await log.end_seq() == 800


async def test_waiting_hears_the_end_of_the_run(fronts: list[Front], log: Log) -> None:
    waiting = asyncio.create_task(
        fronts[0].ask("POST", "/v1/triggers/r", json={}, headers={"Idempotency-Key": "w", "Prefer": "wait=30"})
    )
    run = run_id_of("default", "/v1/triggers/r", "w", "r")
    while await log.last(work_subject("*", "*", run, "*")) is None:
        await asyncio.sleep(0.01)
    await finish(log, run)
    status, said, _ = await waiting
    assert (status, said["run_id"], said["state"]) == (200, run, "succeeded")


async def test_the_list_of_runs_comes_from_the_read_model(fronts: list[Front], log: Log, redis: Redis) -> None:
    async with at_work(Writer(log, redis)):
        refs = [await fronts[0].trigger(data=b"x") for _ in range(3)]
        await finish(log, refs[1].run_id)
        found: list[str] = []
        while len(found) < 3:
            _, said, _ = await fronts[1].ask("GET", "/v1/runs?limit=10")
            found = [r["run_id"] for r in said["runs"]]
        assert found == [r.run_id for r in reversed(refs)]
        states: list[str] = []
        while states != [refs[1].run_id]:
            _, said, _ = await fronts[1].ask("GET", "/v1/runs", params={"state": "succeeded"})
            states = [r["run_id"] for r in said["runs"]]


async def test_a_stream_goes_on_at_another_gateway_without_a_gap(fronts: list[Front], log: Log) -> None:
    one, other = fronts
    seen: list[str] = []
    async with one.http.get(one.url + "/v1/stream") as response:
        reading = messages(response.content.iter_any())
        await anext(reading)
        refs = [await one.trigger(data=b"x") for _ in range(20)]
        last = ""
        while len(seen) < 7:
            message = await anext(reading)
            if message.event == "run":
                seen.append(json.loads(message.data)["run_id"])
            else:
                last = message.id
    async with other.http.get(other.url + "/v1/stream", headers={"Last-Event-ID": last}) as response:
        reading = messages(response.content.iter_any())
        while seen[-1] != refs[-1].run_id:
            message = await anext(reading)
            if message.event == "run" and json.loads(message.data)["run_id"] != seen[-1]:
                seen.append(json.loads(message.data)["run_id"])
    assert seen == [r.run_id for r in refs]
