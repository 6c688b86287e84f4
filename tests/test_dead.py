"""What was given up on: listed with every attempt's error, and given another go as a new run."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest

from functions import effects, outcomes
from functions.outcomes import Attempted, World
from headrace.model import DeadPage, ErrorInfo, FunctionOptions, Replaying, RunView
from headrace.names import invocation_id
from headrace.wire import FunctionRecord, Invocation, Map, Payload, decode
from streams.log import Record
from streams.topology import work_subject
from tests.doors import CODE, Door


def put(door: Door, unit: list[Record]) -> None:
    for record in unit:
        door.log.put(record.subject, record.body)


def tried(attempt: int = 1) -> Attempted:
    now = time.time()
    return Attempted(attempt=attempt, worker=f"w{attempt}", queued_at=now, started_at=now, ended_at=now)


def first_of(door: Door, run_id: str) -> Invocation:
    return next(i for i in door.firsts() if i.run_id == run_id and i.parent_id is None)


def die(door: Door, work: Invocation, *messages: str) -> None:
    """Fail once per message, and be given up on with the last."""
    for number, message in enumerate(messages[:-1], 1):
        error = ErrorInfo(kind="user", message=message)
        put(door, [outcomes.failed_attempt(work, tried(number), error, time.time())])
    put(door, outcomes.fail(work, tried(len(messages)), ErrorInfo(kind="timeout", message=messages[-1]))[1])


async def dead_run(door: Door, body: object = None, route: str = "r") -> Invocation:
    ref = await door.trigger(route, json=body)
    work = first_of(door, ref.run_id)
    die(door, work, "no")
    return work


def spread_out(door: Door, work: Invocation, members: int) -> list[Invocation]:
    """Let an invocation end well with a map, and return its members."""
    g = FunctionRecord(name="f", version="v", options=FunctionOptions(), code_blob="0" * 64, registered_at=0.0)
    mapping = Map(function="f", payloads=[Payload(body=b"%d" % n, size=1) for n in range(members)])
    world = World(function=lambda _: g, routes=[], now=time.time())
    result = Payload(body=b"null", size=4)
    unit = effects.succeed(work, tried(), result=result, answer=None, effects=[mapping], kept={}, world=world)[1]
    put(door, unit)
    return [decode(r.body, Invocation) for r in unit if r.subject.startswith("hr.work.")]


async def listed(door: Door, query: str = "") -> DeadPage:
    status, said, _ = await door.ask("GET", f"/v1/dead{query}")
    assert status == 200, said
    return msgspec.convert(said, DeadPage)


async def replayed(door: Door, identity: str, key: str | None = None) -> Replaying:
    headers = {} if key is None else {"Idempotency-Key": key}
    status, said, answer = await door.ask("POST", f"/v1/dead/{identity}/replay", headers=headers)
    assert status == 202, said
    assert answer.headers["Location"] == f"/v1/runs/{said['run_id']}"
    return msgspec.convert(said, Replaying)


async def view(door: Door, run_id: str) -> RunView:
    status, said, _ = await door.ask("GET", f"/v1/runs/{run_id}")
    assert status == 200, said
    return msgspec.convert(said, RunView)


# ---------------------------------------------------------------- listing


async def test_nothing_was_given_up_on_is_an_empty_list(door: Door) -> None:
    assert await listed(door) == DeadPage(dead=[], next=None)


async def test_a_dead_invocation_is_listed_with_the_error_of_every_attempt(door: Door) -> None:
    ref = await door.trigger(json={"n": 1})
    work = first_of(door, ref.run_id)
    die(door, work, "first", "second", "third")
    (one,) = (await listed(door)).dead
    assert (one.invocation_id, one.run_id) == (work.invocation_id, ref.run_id)
    assert (one.route, one.function, one.version) == ("r", "f", work.version)
    assert (one.attempts, one.error.kind, one.error.message, one.replayed_as) == (3, "timeout", "third", None)
    assert [(e.attempt, e.worker, e.error.kind, e.error.message) for e in one.errors] == [
        (1, "w1", "user", "first"),
        (2, "w2", "user", "second"),
        (3, "w3", "timeout", "third"),
    ]


async def test_the_list_can_be_narrowed(door: Door) -> None:
    await door.deploy("other")
    old = await dead_run(door)
    between = time.time()
    new = await dead_run(door, route="other")
    assert [d.run_id for d in (await listed(door)).dead] == [new.run_id, old.run_id]
    assert [d.run_id for d in (await listed(door, "?route=r")).dead] == [old.run_id]
    assert [d.run_id for d in (await listed(door, "?function=f")).dead] == [new.run_id, old.run_id]
    assert (await listed(door, "?function=g")).dead == []
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(between + 3600))
    assert (await listed(door, f"?since={since}")).dead == []


async def test_pages_of_dead_go_from_new_to_old_and_end(door: Door) -> None:
    runs = [(await dead_run(door, n)).run_id for n in range(5)]
    found: list[str] = []
    query = "?limit=2"
    while True:
        page = await listed(door, query)
        assert len(page.dead) <= 2
        found += [d.run_id for d in page.dead]
        if page.next is None:
            break
        query = f"?limit=2&cursor={page.next}"
    assert found == runs[::-1]


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "limit=x", "since=yesterday", "function=a.b", "route=%00", "all=perhaps"]
)
async def test_a_list_that_cannot_be_is_refused(door: Door, query: str) -> None:
    assert (await door.problem(400, "GET", f"/v1/dead?{query}")).detail


async def test_a_list_says_that_the_read_model_is_behind_and_is_refused_while_it_is_away(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.runs.CATCH_UP_S_MAX", 0.05)
    await dead_run(door)
    door.reader.lag_at = 0
    for path in ("/v1/dead", "/v1/runs"):
        assert (await door.ask("GET", path))[1]["behind"] is True
    door.reader.away = True
    for path in ("/v1/dead", "/v1/runs", "/v1/audit"):
        assert (await door.problem(503, "GET", path)).detail


# ---------------------------------------------------------------- replay


async def test_a_replay_is_a_new_run_with_the_same_event_and_the_function_as_it_is_now(door: Door) -> None:
    await door.deploy(deadline="60s")
    ref = await door.trigger(json={"n": 1}, headers={"Headrace-Deadline": "5s"})
    work = first_of(door, ref.run_id)
    die(door, work, "no")
    mended = {**CODE, "files": {"user.py": "def f(x):\n    return x + 1\n"}}
    assert (await door.ask("PUT", "/v1/functions/f", json={"code": mended}))[0] == 201
    made = await replayed(door, work.invocation_id)
    assert (made.from_, made.duplicate, made.state, made.route) == ("invocation", False, "accepted", "r")
    assert made.run_id != ref.run_id
    again = first_of(door, made.run_id)
    assert (again.payload, again.event, again.tenant) == (work.payload, work.event, work.tenant)
    assert again.version != work.version
    assert again.deadline is not None
    assert again.deadline == pytest.approx(time.time() + 60, abs=5)
    new, old = await view(door, made.run_id), await view(door, ref.run_id)
    assert new.replay_of is not None
    assert (new.replay_of.run_id, new.replay_of.invocation_id) == (ref.run_id, work.invocation_id)
    assert new.event == old.event
    assert (old.state, old.replayed_as, old.error and old.error.message) == ("failed", made.run_id, "no")


async def test_the_old_run_tells_of_its_replay_before_the_read_model_knows(door: Door) -> None:
    work = await dead_run(door)
    door.reader.lag_at = door.log.last_seq
    made = await replayed(door, work.run_id)
    assert (await view(door, work.run_id)).replayed_as == made.run_id


async def test_what_was_replayed_leaves_the_list_and_is_in_the_full_one(door: Door) -> None:
    work, left = await dead_run(door), await dead_run(door)
    made = await replayed(door, work.run_id)
    assert [d.run_id for d in (await listed(door)).dead] == [left.run_id]
    full = {d.run_id: d.replayed_as for d in (await listed(door, "?all=1")).dead}
    assert full == {work.run_id: made.run_id, left.run_id: None}


async def test_the_same_key_is_the_same_run_and_another_key_another_one(door: Door) -> None:
    work = await dead_run(door)
    first = await replayed(door, work.invocation_id, "k")
    again = await replayed(door, work.invocation_id, "k")
    assert (again.run_id, again.duplicate) == (first.run_id, True)
    others = {(await replayed(door, work.invocation_id, key)).run_id for key in ("l", None, None)}
    assert len({first.run_id, *others}) == 4
    by_run = await replayed(door, work.run_id, "k")
    assert (by_run.run_id, by_run.duplicate) == (first.run_id, True)


async def test_a_unit_that_a_power_cut_tore_apart_is_mended_by_the_repeat(door: Door) -> None:
    work = await dead_run(door)
    made = await replayed(door, work.invocation_id, "k")
    door.log.stored = [s for s in door.log.stored if not s.subject.startswith("hr.replay.")]
    assert (await view(door, work.run_id)).replayed_as is None
    await replayed(door, work.invocation_id, "k")
    assert (await view(door, work.run_id)).replayed_as == made.run_id


async def test_a_follow_up_that_stood_alone_runs_again_by_itself(door: Door) -> None:
    ref = await door.trigger(json={"n": 1})
    work = first_of(door, ref.run_id)
    payload = Payload(body=b'"mine"', size=6)
    child = msgspec.structs.replace(
        work,
        invocation_id=invocation_id(work.invocation_id, 0),
        payload=payload,
        parent_id=work.invocation_id,
        event=None,
        digest="",
        depth=1,
    )
    put(door, [Record(work_subject(3, work.tenant, work.run_id, child.invocation_id), msgspec.msgpack.encode(child))])
    die(door, child, "no")
    made = await replayed(door, child.invocation_id)
    again = first_of(door, made.run_id)
    assert (made.from_, again.payload, again.event) == ("invocation", payload, work.event)
    assert (await replayed(door, ref.run_id)).from_ == "invocation"


async def test_a_branch_starts_its_whole_run_again_once_for_one_key(door: Door) -> None:
    ref = await door.trigger(json={"n": 1})
    work = first_of(door, ref.run_id)
    members = spread_out(door, work, 3)
    for member in members:
        die(door, member, "no")
    door.finish_run(ref.run_id, state="failed")
    made = [await replayed(door, member.invocation_id, "k") for member in members]
    assert [m.from_ for m in made] == ["start"] * 3
    assert len({m.run_id for m in made}) == 1
    assert first_of(door, made[0].run_id).payload == work.payload
    assert (await listed(door)).dead == []
    assert {d.replayed_as for d in (await listed(door, "?all=1")).dead} == {made[0].run_id}


async def test_only_what_failed_can_be_replayed(door: Door) -> None:
    running = await door.trigger(json={})
    work = first_of(door, running.run_id)
    for identity in (running.run_id, work.invocation_id):
        assert "has not ended" in (await door.problem(409, "POST", f"/v1/dead/{identity}/replay")).detail
    door.finish(running.run_id)
    for identity in (running.run_id, work.invocation_id):
        assert "succeeded" in (await door.problem(409, "POST", f"/v1/dead/{identity}/replay")).detail
    canceled = await door.trigger(json={})
    await door.ask("POST", f"/v1/runs/{canceled.run_id}/cancel")
    assert "canceled" in (await door.problem(409, "POST", f"/v1/dead/{canceled.run_id}/replay")).detail
    await door.problem(404, "POST", "/v1/dead/rnothing/replay")
    await door.problem(400, "POST", "/v1/dead/a.b/replay")
    dead = await dead_run(door)
    await door.problem(400, "POST", f"/v1/dead/{dead.run_id}/replay", headers={"Idempotency-Key": "k" * 300})


async def test_a_branch_of_a_run_that_goes_on_cannot_be_replayed_yet(door: Door) -> None:
    ref = await door.trigger(json={})
    members = spread_out(door, first_of(door, ref.run_id), 2)
    die(door, members[0], "no")
    assert "has not ended" in (await door.problem(409, "POST", f"/v1/dead/{members[0].invocation_id}/replay")).detail


async def test_what_is_needed_and_gone_is_told(door: Door) -> None:
    large = await dead_run(door, "x" * 100_000)
    assert large.payload.blob is not None
    (await door.blobs.where(large.payload.blob)).unlink()
    assert "not kept" in (await door.problem(409, "POST", f"/v1/dead/{large.run_id}/replay")).detail
    small = await dead_run(door)
    await door.ask("DELETE", "/v1/routes/r")
    assert "route r" in (await door.problem(409, "POST", f"/v1/dead/{small.run_id}/replay")).detail


@pytest.mark.parametrize("how", ["away", "lags"])
async def test_a_replay_needs_no_read_model(door: Door, how: str) -> None:
    work = await dead_run(door)
    door.reader.away, door.reader.lag_at = how == "away", 0
    assert (await replayed(door, work.invocation_id)).from_ == "invocation"
    assert (await replayed(door, work.run_id)).from_ == "invocation"


async def test_a_replay_counts_against_the_limit_of_its_route(door: Door) -> None:
    work: Any = await dead_run(door)
    await door.deploy(max_in_flight=1)
    await door.trigger(json={})
    await door.problem(429, "POST", f"/v1/dead/{work.run_id}/replay")
