"""The promise where the ground gives way: the power is cut, the disk is full, the leader of a cluster dies.

Short versions of F2, F7 and R3 of ``make chaos``. Times are measured there, and are no matter of these tests.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from gateway.gate import Fill
from headrace.errors import Unavailable
from infra.chaos import cluster, disk, power
from infra.chaos.lines import Result
from infra.chaos.trial import Case, Trial
from infra.embedded import NatsServer
from infra.mending import mend
from infra.rights import ADMIN
from streams import topology
from streams.link import Link, open_link
from streams.log import Log, Record
from tests.conftest import NOT_PERMITTED
from tests.doubles import MemoryLog
from tests.processes import until


async def tried(case: Case, folder: Path, scale: float) -> Result:
    """Try a case on a small scale; where this user may not mount, that is said."""
    reason = case.probe()
    if reason:
        pytest.skip(f"{NOT_PERMITTED}: {reason}" if "mount" in reason else reason)
    return await case.run(Trial(folder, seed=11, scale=scale, say=print))


def kept(result: Result) -> None:
    assert result.verdict is not None
    assert result.verdict.accepted > 0
    assert result.verdict.good, result.verdict.named


async def test_what_was_accepted_survives_a_power_cut_and_would_not_without_syncing(tmp_path: Path) -> None:
    result = await tried(power.CASE, tmp_path, 0.02)
    kept(result)
    contrast = next(figure for figure in result.figures if "contrast" in figure.name)
    assert contrast.good, contrast


async def test_a_full_disk_refuses_and_goes_on_once_there_is_room(tmp_path: Path) -> None:
    result = await tried(disk.CASE, tmp_path, 0.5)
    kept(result)
    polite = next(figure for figure in result.figures if "Retry-After" in figure.name)
    assert polite.good, polite


async def test_nothing_is_lost_when_the_leader_of_a_cluster_is_killed_and_another_paused(tmp_path: Path) -> None:
    kept(await tried(cluster.CASE, tmp_path, 0.02))


# ---------------------------------------------------------------- the parts of it


@pytest.mark.parametrize("left", [b"", b"\0" * 29, b"\x16"])
async def test_a_damaged_consumer_does_not_keep_the_log_from_starting(tmp_path: Path, left: bytes) -> None:
    for round_ in range(2):
        server = NatsServer(tmp_path)
        await server.start()
        link = await open_link(server.url, user=ADMIN, password=server.password(ADMIN))
        await topology.ensure(link, topology.Limits())
        log = Log(link)
        await log.start()
        assert await log.end_seq() == round_
        await log.append([Record("hr.note.run.one.1", b"kept")])
        await log.close()
        await link.close()
        await server.stop()
        consumers = server.stream_dir() / "obs"
        (consumers / "work-0-default" / "o.dat").write_bytes(left)
        (consumers / "work-1-default" / "meta.inf").write_bytes(left)


def test_sound_consumers_are_left_alone(tmp_path: Path) -> None:
    consumer = tmp_path / "obs" / "work-0-default"
    consumer.mkdir(parents=True)
    (consumer / "meta.inf").write_text(json.dumps({"name": "work-0-default"}))
    (consumer / "meta.sum").write_text("0011223344556677")
    (consumer / "o.dat").write_bytes(b"\x16\x02\0\0\0\0\0\0")
    assert mend(tmp_path) == []
    assert mend(tmp_path / "nothing") == []
    assert sorted(path.name for path in consumer.iterdir()) == ["meta.inf", "meta.sum", "o.dat"]


async def test_a_log_server_whose_disk_was_full_is_started_again(nats_server: NatsServer, log: Log) -> None:
    pid = nats_server.pid
    with (nats_server.data / "logs" / "nats.log").open("a") as said:
        said.write("[ERR] write 1.blk: no space left on device\n")
    await until(lambda: nats_server.pid not in (None, pid))
    assert nats_server.restarts == 1
    await log.append([Record("hr.note.run.one.1", b"after")], timeout_s=20)


async def test_triggers_are_refused_while_the_log_has_room_for_what_it_holds(log: Log) -> None:
    fill = Fill(log, 0.9)
    await fill.look()
    fill.check()
    used, limit = await log.size()
    fill.took(int(limit * 0.9) - used + 1)
    with pytest.raises(Unavailable) as refused:
        fill.check()
    assert refused.value.retry_after_s > 0
    await fill.look()
    fill.check()


async def test_a_log_that_does_not_answer_is_as_full_as_it_was() -> None:
    log = MemoryLog()
    log.bytes_max = 100
    fill = Fill(log, 0.5)
    await fill.look()
    fill.took(60)
    log.away = True
    await fill.look()
    assert not fill.room


# ---------------------------------------------------------------- the client of the log


@pytest.fixture
async def replicated(link: Link) -> Log:
    """The log as one reads it that has copies on several servers."""
    opened = Log(link, replicated=True)
    await opened.start()
    return opened


async def test_reads_of_a_replicated_log_come_from_its_leader(replicated: Log) -> None:
    [first] = await replicated.append([Record("hr.note.run.one.1", b"\0\xff")])
    [second] = await replicated.append([Record("hr.note.run.two.1", b"")])
    newest = await replicated.last("hr.note.run.*.1")
    assert newest is not None
    assert (newest.seq, newest.body) == (second, b"")
    assert await replicated.last("hr.note.other.*.1") is None
    assert [s.seq for s in await replicated.last_of_each(["hr.note.run.*.*"])] == [first, second]
    assert await replicated.last_of_each(["hr.note.other.*.*"]) == []
    assert [s.body for s in await replicated.at([first])] == [b"\0\xff"]
    await replicated.close()


async def test_a_paused_server_is_left_and_what_was_on_its_way_is_stored_once(
    nats_server: NatsServer, log: Log
) -> None:
    assert nats_server.pid is not None
    subjects = [f"hr.done.run.i{number}" for number in range(64)]
    os.kill(nats_server.pid, signal.SIGSTOP)
    try:
        appending = [log.append([Record(s, b"x" * 4096, s)], timeout_s=30) for s in subjects]
        waiting = asyncio.gather(*appending)
        await until(lambda: not log.link.connected)
    finally:
        os.kill(nats_server.pid, signal.SIGCONT)
    await waiting
    assert await log.end_seq() == len(subjects)
