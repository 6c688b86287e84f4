"""The auditor: what is lost or stuck is found in the log itself, and nothing else is."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from nats.aio.msg import Msg
from redis.asyncio import Redis

from functions.admission import Admitted
from headrace.model import Audit
from headrace.wire import NOTHING, Call, Cancel, Invocation, Map, Outcome, Payload, decode, encode
from infra import doctor
from infra.embedded import NatsServer
from infra.rights import LEDGER
from infra.settings import Settings
from streams import audit
from streams.audit import Place, RunFacts, confirmed, examine
from streams.auditor import Auditor
from streams.ledger import OPEN, Writer
from streams.link import open_link
from streams.log import Log, Record
from streams.reader import Reader
from streams.topology import DEFAULT_TENANT, LANES, STREAM, LaneOf, cancel_subject, lane_consumer
from tests.doors import TOKEN, Doors
from tests.stories import children, failure, stored, success, trigger
from tests.writers import at_work, caught_up

FLOORS: dict[Place, int] = {LaneOf(lane, DEFAULT_TENANT): 0 for lane in range(LANES)}
SECOND, THIRD, FOURTH = (LaneOf(lane, DEFAULT_TENANT) for lane in (2, 3, 4))

# ---------------------------------------------------------------- one run, judged


def test_work_that_waits_or_is_with_a_worker_is_on_its_way() -> None:
    facts = RunFacts(work=[("a", THIRD, 10)])
    assert examine(facts, {**FLOORS, THIRD: 9}) == "on_its_way"
    assert examine(facts, {**FLOORS, FOURTH: 99}) == "on_its_way"


def test_work_that_was_acknowledged_without_an_outcome_is_lost() -> None:
    assert examine(RunFacts(work=[("a", THIRD, 10)]), {**FLOORS, THIRD: 10}) == "lost"
    two = RunFacts(work=[("a", THIRD, 10), ("b", SECOND, 12)], done={"a"})
    assert examine(two, {**FLOORS, THIRD: 10, SECOND: 11}) == "on_its_way"
    assert examine(two, {**FLOORS, THIRD: 10, SECOND: 12}) == "lost"


def test_a_run_whose_work_is_all_done_and_acknowledged_is_stuck_without_an_end() -> None:
    facts = RunFacts(work=[("a", THIRD, 10), ("b", THIRD, 12)], done={"a", "b"})
    assert examine(facts, {**FLOORS, THIRD: 12}) == "stuck"
    # The last one is still in somebody's hand: who gets it again finds its outcome, and ends the run.
    assert examine(facts, {**FLOORS, THIRD: 11}) == "on_its_way"


def test_what_ended_in_the_log_has_ended() -> None:
    assert examine(RunFacts(work=[("a", THIRD, 10)], ended=True), {**FLOORS, THIRD: 10}) == "ended"


def test_a_run_that_the_log_forgot_without_an_end_is_lost() -> None:
    assert examine(RunFacts(), FLOORS) == "lost"


def test_a_verdict_needs_two_rounds_in_a_row() -> None:
    assert confirmed({}, {"r": "lost"}) == {}
    assert confirmed({"r": "stuck"}, {"r": "lost"}) == {}
    assert confirmed({"r": "on_its_way"}, {"r": "on_its_way"}) == {}
    assert confirmed({"r": "lost"}, {"r": "lost", "s": "lost"}) == {"r": "lost"}


def test_an_end_is_read_from_outcomes_ends_and_cancels() -> None:
    first = trigger("e")
    run = first.invocation.run_id
    chain = success(first.invocation, Call(function="g", payload=NOTHING))
    assert not audit.read(stored([first.record, *chain])).ended
    assert audit.read(stored([first.record, *success(first.invocation)])).ended
    assert audit.read(stored([first.record, *failure(first.invocation)])).ended
    cancel = Record(cancel_subject(run), encode(Cancel(run_id=run, at=1.0)))
    assert audit.read(stored([first.record, cancel])).ended
    facts = audit.read(stored([first.record, *chain]))
    assert facts.done == {first.invocation.invocation_id}
    assert {identity for identity, _, _ in facts.work} == {*facts.done, children(chain)[0].invocation_id}


# ---------------------------------------------------------------- a real log


@pytest.fixture
async def auditor(log: Log, redis: Redis, nats_server: NatsServer) -> AsyncIterator[Auditor]:
    """An auditor with the rights of the ledger, beside a writer that follows the log."""
    link = await open_link(nats_server.url, user=LEDGER, password=nats_server.password(LEDGER), name="ledger")
    own = Log(link)
    await own.start()
    async with at_work(Writer(log, redis)):
        yield Auditor(own, redis, grace_s=0.0)
    await own.close()
    await link.close()


async def deliver(log: Log, lane: int, number: int) -> list[Msg]:
    """Take messages of a lane, as a worker does."""
    nc = log.link.nc
    inbox = nc.new_inbox()
    hears = await nc.subscribe(inbox)
    await nc.publish(
        f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{lane_consumer(lane, DEFAULT_TENANT)}", b"%d" % number, reply=inbox
    )
    taken = [await hears.next_msg(timeout=5) for _ in range(number)]
    await hears.unsubscribe()
    return taken


async def acknowledge(log: Log, messages: list[Msg]) -> None:
    for message in messages:
        await log.link.nc.request(message.reply, b"+ACK", timeout=5)


async def twice(auditor: Auditor) -> Audit:
    await auditor.round()
    found = await auditor.round()
    assert found is not None
    return found


async def accept(log: Log, *ids: str) -> list[Admitted]:
    admitted = [trigger(each) for each in ids]
    for one in admitted:
        await log.append([one.record])
    return admitted


async def test_good_runs_are_counted_and_leave_no_difference(log: Log, redis: Redis, auditor: Auditor) -> None:
    ended, _, _, canceled = await accept(log, "ended", "waiting", "held", "canceled")
    await log.append(success(ended.invocation))
    run = canceled.invocation.run_id
    await log.append([Record(cancel_subject(run), encode(Cancel(run_id=run, at=1.0)))])
    taken = await deliver(log, 11, 3)
    await acknowledge(log, [taken[0]])
    await caught_up(log, redis)
    found = await twice(auditor)
    assert (found.accepted, found.ended, found.running, found.difference) == (4, 2, 2, 0)
    assert (found.lost, found.stuck, found.missed) == (0, 0, 0)
    assert await Reader(redis).audit() == found


async def test_work_acknowledged_without_an_outcome_is_found(
    log: Log, redis: Redis, auditor: Auditor, caplog: pytest.LogCaptureFixture
) -> None:
    lost, kept = await accept(log, "lost", "kept")
    taken = await deliver(log, 11, 2)
    await acknowledge(log, [taken[0]])
    await caught_up(log, redis)
    first = await auditor.round()
    assert first is not None
    assert first.difference == 0  # it may be a replica that lags: look again
    with caplog.at_level(logging.ERROR):
        found = await auditor.round()
    assert found is not None
    assert (found.accepted, found.ended, found.running, found.difference) == (2, 0, 1, 1)
    assert (found.lost, found.lost_runs) == (1, [lost.invocation.run_id])
    assert lost.invocation.run_id in caplog.text
    run = lost.invocation.run_id
    await log.append([Record(cancel_subject(run), encode(Cancel(run_id=run, at=1.0)))])
    await caught_up(log, redis)
    assert (await twice(auditor)).difference == 0
    assert kept.invocation.run_id not in caplog.text


async def test_a_run_without_an_end_is_found(log: Log, redis: Redis, auditor: Auditor) -> None:
    (first,) = await accept(log, "stuck")
    unit = success(first.invocation, Map(function="g", payloads=[NOTHING, NOTHING], then="join"))
    await log.append(unit)
    for member in children(unit):
        await log.append(success(member))  # and nobody counts the slots that they fill
    await acknowledge(log, await deliver(log, 11, 3))
    await caught_up(log, redis)
    found = await twice(auditor)
    assert (found.stuck, found.stuck_runs, found.difference) == (1, [first.invocation.run_id], 1)


async def test_a_run_of_many_facts_is_read_through(log: Log, redis: Redis, auditor: Auditor) -> None:
    (first,) = await accept(log, "large")
    for _ in range(6):
        unit = success(first.invocation, Map(function="g", payloads=[NOTHING] * 250, then="join"))
        renamed = [
            Record(r.subject.replace(w.invocation_id, w.invocation_id + str(_)), r.body)
            for r in unit
            if r.subject.startswith("hr.work.")
            for w in [decode(r.body, Invocation)]
        ]
        await log.append(renamed)
    await acknowledge(log, await deliver(log, 11, 1))
    await caught_up(log, redis)
    found = await twice(auditor)
    assert (found.lost, found.lost_runs) == (1, [first.invocation.run_id])


async def test_what_the_read_model_missed_is_found(log: Log, redis: Redis, auditor: Auditor) -> None:
    (first,) = await accept(log, "ended")
    await log.append(success(first.invocation))
    await acknowledge(log, await deliver(log, 11, 1))
    await caught_up(log, redis)
    await redis.zadd(OPEN, {first.invocation.run_id: 1})
    found = await twice(auditor)
    assert (found.missed, found.missed_runs) == (1, [first.invocation.run_id])


async def test_a_young_run_is_left_alone(log: Log, redis: Redis, auditor: Auditor) -> None:
    now = [1000.0]
    careful = Auditor(auditor._log, redis, grace_s=60.0, clock=lambda: now[0])
    await accept(log, "lost")
    await acknowledge(log, await deliver(log, 11, 1))
    await caught_up(log, redis)
    for _ in range(5):
        now[0] += 10.0
        found = await careful.round()
        assert found is not None
        assert found.lost == 0
    now[0] += 30.0
    assert (await twice(careful)).lost == 1


async def test_rounds_are_small_and_reach_everything(
    log: Log, redis: Redis, auditor: Auditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.auditor.RUNS_MAX", 3)
    await accept(log, *(f"lost{n}" for n in range(8)))
    await acknowledge(log, await deliver(log, 11, 8))
    await caught_up(log, redis)
    for _ in range(5):
        found = await auditor.round()
    assert found is not None
    assert found.lost == 8


async def test_counts_survive_a_restart_of_the_writer_and_a_wipe(log: Log, redis: Redis, auditor: Auditor) -> None:
    admitted = await accept(log, *(f"e{n}" for n in range(6)))
    for one in admitted[:4]:
        await log.append(success(one.invocation))
    await caught_up(log, redis)
    before = await auditor.round()
    await redis.flushall()
    assert await auditor.round() is None  # what is being built anew is not audited
    await log.append([trigger("after").record])
    await caught_up(log, redis)
    after = await auditor.round()
    assert before is not None
    assert after is not None
    assert (before.accepted, before.ended) == (6, 4)
    assert (after.accepted, after.ended, after.difference) == (7, 4, 0)


# ---------------------------------------------------------------- what is told


BAD = Audit(
    at="2026-01-01T00:00:00Z",
    accepted=10,
    ended=7,
    running=1,
    difference=2,
    lost=1,
    stuck=1,
    lost_runs=["rlost"],
    stuck_runs=["rstuck"],
)


async def test_an_audit_is_an_answer_and_a_metric(tmp_path: Path) -> None:
    async with Doors(tmp_path) as doors:
        door = await doors.open()
        await door.problem(503, "GET", "/v1/audit")
        _, raw, _ = await door.ask("GET", "/metrics")
        assert b"headrace_audit" not in raw
        door.reader.audited = BAD
        status, said, _ = await door.ask("GET", "/v1/audit")
        assert (status, msgspec.convert(said, Audit)) == (200, BAD)
        _, raw, _ = await door.ask("GET", "/metrics")
        lines = raw.decode().splitlines()
        assert "headrace_runs_accepted_total 10.0" in lines
        assert "headrace_runs_ended_total 7.0" in lines
        assert "headrace_runs_running 1.0" in lines
        assert "headrace_audit_difference 2.0" in lines
        assert "headrace_audit_lost 1.0" in lines
        assert "headrace_audit_stuck 1.0" in lines
        door.reader.away = True
        _, raw, _ = await door.ask("GET", "/metrics")
        assert b"headrace_audit" not in raw


@pytest.mark.parametrize("state", ["none", "old", "bad", "good"])
async def test_the_doctor_tells_of_the_audit(tmp_path: Path, state: str) -> None:
    async with Doors(tmp_path) as doors:
        door = await doors.open()
        (tmp_path / "url").write_text(door.url)
        (tmp_path / "token").write_text(TOKEN)
        (tmp_path / "token").chmod(0o600)
        fresh = msgspec.structs.replace(BAD, at="2999-01-01T00:00:00Z")
        good = msgspec.structs.replace(fresh, running=3, difference=0, lost=0, stuck=0, lost_runs=[], stuck_runs=[])
        door.reader.audited = {"none": None, "old": BAD, "bad": fresh, "good": good}[state]
        (finding,) = await doctor._audit(Settings(data_dir=tmp_path))
    assert finding.check == "runs"
    assert finding.state == {"none": "warning", "old": "warning", "bad": "failed", "good": "ok"}[state]
    assert bool(finding.cure) == (state != "good")
    assert state != "bad" or ("rlost, rstuck" in finding.detail and "headrace cancel" in finding.cure)


def test_an_outcome_that_cannot_be_read_is_no_end() -> None:
    first = trigger("e")
    (record,) = success(first.invocation)
    damaged = Record(record.subject, b"\xc1")
    facts = audit.read(stored([first.record, damaged]))
    assert (facts.ended, facts.done) == (False, {first.invocation.invocation_id})
    assert decode(record.body, Outcome).result == Payload(body=b"42", size=2)
