"""The log: appended in groups, guarded, synced, and read back."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from typing import Any

import pytest

from headrace.errors import TooLarge, Unavailable
from infra.embedded import NatsServer
from streams import link as links
from streams import topology
from streams.link import Link, open_link
from streams.log import AlreadyThere, Log, Record
from streams.topology import STREAM, done_subject, report_subject, run_subjects, work_subject


def kill(server: NatsServer) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)


async def messages_of(log: Log, most: int) -> int:
    """Wait until the log holds at most so many messages, and return how many those are."""
    while True:
        found = (await log.link.jetstream().stream_info(STREAM)).state.messages
        if found <= most:
            return found
        await asyncio.sleep(0.05)


def done(run: str, invocation: str, body: bytes = b"x") -> Record:
    subject = done_subject(run, invocation)
    return Record(subject, body, subject)


async def test_two_that_want_one_place_at_the_same_time_do_not_both_get_it(log: Log) -> None:
    family = "hr.*.r.i"
    rivals = [[Record("hr.lease.r.i", b"%d" % n, family)] for n in range(3)]
    crowd = [[Record(f"hr.done.r.{n}", b"", f"hr.*.r.{n}")] for n in range(40)]
    took = await asyncio.gather(*(log.append(unit) for unit in [*crowd, *rivals, *crowd]), return_exceptions=True)
    assert sum(isinstance(t, AlreadyThere) for t in took[40:43]) == 2
    assert sum(isinstance(t, AlreadyThere) for t in took) == 42


async def test_an_appended_record_is_read_back_with_its_sequence(log: Log) -> None:
    (seq,) = await log.append([Record("hr.note.r.i", b"hello")])
    stored = await log.last("hr.note.r.i")
    assert stored is not None
    assert (stored.seq, stored.subject, stored.body) == (seq, "hr.note.r.i", b"hello")
    assert stored.at > 1_700_000_000


async def test_a_guarded_subject_takes_one_record_for_ever(log: Log) -> None:
    await log.append([done("r1", "i1", b"first")])
    with pytest.raises(AlreadyThere):
        await log.append([done("r1", "i1", b"second")])
    stored = await log.last(done_subject("r1", "i1"))
    assert stored is not None
    assert stored.body == b"first"


async def test_a_guard_with_a_wildcard_spans_all_lanes(log: Log) -> None:
    guard = work_subject("*", "t", "r1", "i1")
    await log.append([Record(work_subject(5, "t", "r1", "i1"), b"", guard)])
    with pytest.raises(AlreadyThere):
        await log.append([Record(work_subject(3, "t", "r1", "i1"), b"", guard)])


async def test_a_unit_is_appended_whole_or_not_at_all(log: Log) -> None:
    await log.append([done("r1", "i1")])
    with pytest.raises(AlreadyThere):
        await log.append([Record("hr.work.1.t.r1.child", b""), done("r1", "i1")])
    assert await log.last(work_subject("*", "t", "r1", "child")) is None


async def test_one_conflict_in_a_group_does_not_fail_its_neighbours(log: Log) -> None:
    await log.append([done("r1", "i7")])
    answers = await asyncio.gather(*(log.append([done("r1", f"i{n}")]) for n in range(100)), return_exceptions=True)
    refused = [n for n, answer in enumerate(answers) if isinstance(answer, BaseException)]
    assert refused == [7]
    assert isinstance(answers[7], AlreadyThere)


async def test_sequences_given_to_a_group_are_those_of_the_log(log: Log) -> None:
    units = [[Record(f"hr.note.r{n}.a", b""), Record(f"hr.note.r{n}.b", b"")] for n in range(40)]
    for unit, seqs in zip(units, await asyncio.gather(*map(log.append, units)), strict=True):
        for record, seq in zip(unit, seqs, strict=True):
            stored = await log.last(record.subject)
            assert stored is not None
            assert stored.seq == seq


async def test_an_expected_sequence_makes_a_chain(log: Log) -> None:
    subject = "hr.tally.r.s"
    (first,) = await log.append([Record(subject, b"1", subject)])
    (second,) = await log.append([Record(subject, b"2", subject, first)])
    with pytest.raises(AlreadyThere):
        await log.append([Record(subject, b"3", subject, first)])
    await log.append([Record(subject, b"3", subject, second)])


async def test_a_unit_over_the_limit_is_refused_with_the_limit_named(log: Log) -> None:
    with pytest.raises(TooLarge, match="901"):
        await log.append([Record("hr.note.r.i", b"")] * 901)


async def test_the_state_of_a_run_is_one_question(log: Log) -> None:
    await log.append([Record(work_subject(4, "t", "r1", "i1"), b"w")])
    await log.append([done("r1", "i1"), done("r2", "i1")])
    subjects = [s.subject for s in await log.last_of_each(run_subjects("r1"))]
    assert subjects == ["hr.work.4.t.r1.i1", "hr.done.r1.i1"]
    assert await log.last_of_each(run_subjects("r9")) == []


async def test_what_is_stored_is_heard_live_with_its_sequence(log: Log) -> None:
    async with log.live(done_subject("r1", "*")) as live:
        (seq,) = await log.append([done("r1", "i1", b"answer")])
        async with asyncio.timeout(5):
            stored = await anext(live)
    assert (stored.seq, stored.subject, stored.body) == (seq, "hr.done.r1.i1", b"answer")


async def test_appends_survive_a_kill_of_the_server_and_none_is_doubled(log: Log, nats_server: NatsServer) -> None:
    async def append(n: int) -> None:
        await log.append([done("r1", f"i{n}")], timeout_s=60)

    tasks = [asyncio.create_task(append(n)) for n in range(300)]
    await tasks[0]
    kill(nats_server)
    tasks += [asyncio.create_task(append(n)) for n in range(300, 600)]
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [a for a in answers if a is not None] == []
    assert await log.end_seq() == 600


async def test_an_append_to_a_server_that_stays_away_ends_with_unavailable(log: Log, nats_server: NatsServer) -> None:
    await nats_server.stop()
    with pytest.raises(Unavailable) as caught:
        await log.append([Record("hr.note.r.i", b"")], timeout_s=0.5)
    assert caught.value.retry_after_s > 0
    assert caught.value.hint


async def test_a_connection_with_a_wrong_password_is_refused_in_time_and_told(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.link.OPEN_TIMEOUT_S", 1.0)
    with pytest.raises(Unavailable, match="Authorization") as caught:
        await open_link(nats_server.url, user="gateway", password="wrong", name="test")
    assert "password" in caught.value.hint


async def test_a_client_that_does_not_hear_a_cancel_is_not_left_to_connect_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client swallows the first one, as ``asyncio.wait_for`` does at times before Python 3.12."""
    connect = links._Client.connect

    async def deaf(client: links._Client, **options: Any) -> None:
        connecting = asyncio.create_task(connect(client, **options))
        with suppress(asyncio.CancelledError):
            await asyncio.shield(connecting)
        await connecting

    monkeypatch.setattr(links._Client, "connect", deaf)
    monkeypatch.setattr(links, "OPEN_TIMEOUT_S", 0.1)
    with pytest.raises(Unavailable, match="no NATS server"):
        await open_link("nats://127.0.0.1:9", name="test")


async def test_what_is_a_hint_leaves_the_log_soon_and_all_else_stays(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.log.HINT_KEEP_S", 1)
    hints = [[Record(report_subject("r", "j", "lab"), b"0.5", hint=True)] for _ in range(200)]
    (said, *_), *_ = await asyncio.gather(
        log.append([done("r", "i"), Record("hr.note.r.i.1", b"", hint=True)]), *map(log.append, hints)
    )
    assert await messages_of(log, 1) == 1
    assert [found.seq for found in await log.last_of_each(["hr.done.r.i", "hr.note.r.*.*"])] == [said]


async def test_a_log_that_an_older_release_set_up_keeps_hints_until_it_is_set_up_again(
    link: Link, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.log.HINT_KEEP_S", 1)
    js = link.jetstream()
    await js.delete_stream(STREAM)
    older = topology._stream(topology.Limits(), 1)
    older.allow_msg_ttl = False
    await js.add_stream(older)
    hint = Record("hr.note.r.i.1", b"", hint=True)
    await asyncio.gather(*(log.append([done("r", f"i{n}"), hint]) for n in range(20)), log.append([hint]))
    assert await messages_of(log, 41) == 41
    await topology.ensure(link, topology.Limits())
    newer = Log(link)
    await newer.start()
    await newer.append([hint])
    assert await messages_of(newer, 41) == 41
    await newer.close()
