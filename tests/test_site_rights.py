"""What the user of one site may do on a real nats-server, and that its agent can do all its work so."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nats.errors
import pytest

from headrace.errors import HeadraceError
from headrace.joblog import SiteRecord
from headrace.jobs import JobSpec
from headrace.tasks import ended
from headrace.wire import Slot
from infra import siteusers
from infra.credentials import write_private
from infra.embedded import NatsServer, free_port
from infra.programs import nats_program
from infra.rights import ACCOUNT, ADMIN, agent_user
from infra.settings import Settings
from streams import topology
from streams.follow import follow
from streams.link import Link, open_link, reader_names
from streams.log import Log, Record
from streams.tables import Table
from streams.topology import DEFAULT_TENANT, STREAM
from tests.agents import Lab, there, until
from tests.platforms import UpProcess
from tests.sites import shell
from workers.cancels import Cancels
from workers.sites.base import SiteConfig


async def site_link(server: NatsServer, site: str, *tenants: str, moves: bool = False) -> Link:
    """Return a connection as the user of a site."""
    path = siteusers.kept(server.data, site, moves=moves)
    await server.serve_sites(siteusers.known(server.data), {DEFAULT_TENANT, *tenants})
    password = path.read_text().strip()
    return await open_link(server.url, user=agent_user(site), password=password, name=site, site=site)


def admin_of(server: NatsServer, data: Path) -> Settings:
    return Settings(nats_url=server.url, nats_user=ADMIN, nats_password_file=server.password_file(ADMIN), data_dir=data)


@pytest.fixture
async def lab_link(nats_server: NatsServer, link: Link) -> AsyncIterator[Link]:
    opened = await site_link(nats_server, "lab")
    yield opened
    await opened.close()


@pytest.fixture
async def lab_log(lab_link: Link) -> AsyncIterator[Log]:
    opened = Log(lab_link)
    await opened.start()
    yield opened
    await opened.close()


@pytest.fixture
def lab(log: Log, tmp_path: Path) -> Lab:
    site = SiteConfig(name="lab", kind="local", work=str(tmp_path / "work"), jobs_max=4, settle_s=1.0, unseen_s=2.0)
    return Lab(log, site, tmp_path)


@pytest.fixture
def working(lab: Lab, lab_log: Log, tmp_path: Path) -> Lab:
    """The same site, whose agent is the site's user."""
    return Lab(lab_log, lab.site, tmp_path)


# ---------------------------------------------------------------- what it may not

STREAMS = (STREAM, "KV_sites", "KV_tenants", "KV_functions", "KV_forecasts")


def asked(link: Link, api: str) -> str:
    return f"{link.api}.{api}"


NOT_WRITTEN = (
    "hr.job.other.default.run.job",
    "hr.job.lab.acme.run.job",
    "hr.work.0.acme.run.inv",
    "hr.submit.run.job.1.other",
    "hr.held.run.job.other",
    "hr.report.run.job.lab",
    "hr.cancel.run.user",
    "hr.newest.key",
    "hr.replay.run",
    "$KV.sites.other",
    "$KV.forecasts.mine",
    "$KV.tenants.mine",
    "$KV.functions.mine",
)


async def test_it_writes_nothing_that_is_of_others(log: Log, link: Link, lab_link: Link, lab_log: Log) -> None:
    before = [await messages(link, stream) for stream in STREAMS]
    for subject in NOT_WRITTEN:
        with pytest.raises(nats.errors.NoRespondersError):
            await lab_link.nc.request(subject, b"x", timeout=2)
        await lab_link.nc.publish(subject, b"x")
    await lab_log.append([Record("hr.note.run.job.1", b"last")])  # behind it on the same connection
    assert [await messages(link, stream) for stream in STREAMS] == [before[0] + 1, *before[1:]]


NOT_ASKED = (
    "DIRECT.GET.HEADRACE",
    "DIRECT.GET.HEADRACE.hr.work.*.default.run.inv",
    "DIRECT.GET.HEADRACE.hr.job.other.default.run.job",
    "DIRECT.GET.HEADRACE.>",
    "DIRECT.GET.HEADRACE.hr.>",
    "STREAM.MSG.GET.HEADRACE",
    "STREAM.INFO.KV_tenants",
    "DIRECT.GET.KV_tenants.$KV.tenants.acme",
    "CONSUMER.CREATE.KV_tenants",
    "STREAM.DELETE.HEADRACE",
    "STREAM.PURGE.HEADRACE",
    "STREAM.CREATE.mine",
    "CONSUMER.LIST.HEADRACE",
    "CONSUMER.CREATE.HEADRACE",
    "CONSUMER.CREATE.HEADRACE.mine.hr.work.>",
    "CONSUMER.CREATE.HEADRACE.read-0@lab.hr.work.>",
    "CONSUMER.CREATE.HEADRACE.read-0@lab.hr.done.*.*",
    "CONSUMER.CREATE.HEADRACE.read-0@lab.hr.job.other.>",
    "CONSUMER.CREATE.HEADRACE.read-0@lab",
    "CONSUMER.CREATE.HEADRACE.jobs-default@lab.hr.job.other.default.*.*",
    "CONSUMER.CREATE.HEADRACE.work-0-default.hr.job.lab.default.*.*",
    "CONSUMER.CREATE.HEADRACE.work-0-default.hr.cancel.*.*",
    "CONSUMER.DURABLE.CREATE.HEADRACE.mine",
    "CONSUMER.DELETE.HEADRACE.jobs-default@other",
    "CONSUMER.DELETE.HEADRACE.work-0-default",
    "CONSUMER.MSG.NEXT.HEADRACE.work-0-default",
    "CONSUMER.MSG.NEXT.HEADRACE.jobs-default@other",
)


@pytest.mark.parametrize("api", ["site.API", "$JS.API"])
async def test_it_asks_for_nothing_that_is_of_others(link: Link, lab_link: Link, api: str) -> None:
    before = await topology.consumers(link.jetstream())
    for request in NOT_ASKED:
        body = a_consumer("mine") if ".CREATE." in request else b'{"seq":1}'
        try:
            answer = await lab_link.nc.request(f"{api}.{request}", body, timeout=2)
        except nats.errors.NoRespondersError:
            continue
        # In its own account, which has no streams, the server answers that there are none.
        assert json.loads(answer.data)["error"]["err_code"] == 10039, (request, answer.data)
    assert (await topology.consumers(link.jetstream())).keys() == before.keys()


def a_consumer(name: str, **config: Any) -> bytes:
    return json.dumps({"stream_name": STREAM, "config": {"name": name, "ack_policy": "explicit", **config}}).encode()


@pytest.mark.parametrize(
    "body",
    [
        a_consumer("jobs-default@lab", filter_subject="hr.work.>"),
        a_consumer("jobs-default@lab", filter_subjects=["hr.job.lab.default.*.*", "hr.work.>"]),
        a_consumer("jobs-default@lab"),
        a_consumer("jobs-default@lab", filter_subject="hr.job.lab.default.*.*").replace(b"HEADRACE", b"KV_tenants"),
    ],
)
async def test_a_consumer_is_the_one_that_its_subject_says(lab_link: Link, body: bytes) -> None:
    subject = asked(lab_link, f"CONSUMER.CREATE.{STREAM}.jobs-default@lab.hr.job.lab.default.*.*")
    answer = json.loads((await lab_link.nc.request(subject, body, timeout=5)).data)
    assert answer["error"]["code"] == 400, answer


async def test_a_consumer_of_its_own_is_never_another_one(link: Link, lab_link: Link) -> None:
    subject = asked(lab_link, f"CONSUMER.CREATE.{STREAM}.jobs-default@lab.hr.job.lab.default.*.*")
    body = a_consumer("work-0-default", filter_subject="hr.job.lab.default.*.*")
    assert json.loads((await lab_link.nc.request(subject, body, timeout=5)).data)["name"] == "jobs-default@lab"
    assert (await topology.consumers(link.jetstream()))["work-0-default"].config.filter_subject == "hr.work.0.default.>"


@pytest.mark.parametrize(
    "to", ["hr.job.other.default.r.j", "hr.work.0.acme.r.j", "$KV.sites.other", "$KV.tenants.evil"]
)
async def test_an_answer_reaches_no_subject_of_others(
    log: Log, link: Link, lab_link: Link, lab_log: Log, to: str
) -> None:
    """By its rights on subjects alone a user could have its own message read to any subject: a confused deputy."""
    await lab_log.append([Record("hr.job.lab.default.run.job", b"mine")])
    before = [await messages(link, stream) for stream in STREAMS]
    await topology.ensure_jobs(lab_link, "lab")
    read = asked(lab_link, f"DIRECT.GET.{STREAM}.hr.job.lab.default.run.job")
    await lab_link.nc.publish(read, b"", reply=to)
    pull = asked(lab_link, f"CONSUMER.MSG.NEXT.{STREAM}.jobs-default@lab")
    await lab_link.nc.publish(pull, b'{"batch":1,"no_wait":true}', reply=to)
    await lab_link.nc.publish(asked(lab_link, f"STREAM.INFO.{STREAM}"), b"", reply=to)
    create = asked(lab_link, f"CONSUMER.CREATE.{STREAM}.jobs-default@lab.hr.job.lab.default.*.*")
    await lab_link.nc.request(asked(lab_link, f"CONSUMER.DELETE.{STREAM}.jobs-default@lab"), b"", timeout=5)
    pushed = a_consumer("jobs-default@lab", filter_subject="hr.job.lab.default.*.*", deliver_subject=to)
    await lab_link.nc.request(create, pushed, timeout=5)
    await asyncio.sleep(1.0)  # for what should not come, and is not waited for by anything else
    assert [await messages(link, stream) for stream in STREAMS] == before


async def messages(link: Link, stream: str) -> int:
    return (await link.jetstream().stream_info(stream)).state.messages


async def test_rights_on_subjects_alone_would_not_hold(nats_server: NatsServer, log: Log) -> None:
    """Why a site has an account of its own. Should this fail one day, a user with permissions would do."""
    opened = await open_link(nats_server.url, user="gateway", password=nats_server.password("gateway"), name="test")
    await opened.nc.request("hr.work.0.default.run.inv", b"mine", timeout=5)
    body = b'{"last_by_subj":"hr.work.0.default.run.inv"}'
    await opened.nc.publish(f"$JS.API.DIRECT.GET.{STREAM}", body, reply="hr.done.run.inv")
    assert (await there(lambda: log.last("hr.done.run.inv"))).body == b"mine"
    await opened.close()


# ---------------------------------------------------------------- what it does


async def test_its_agent_does_its_work(lab: Lab, working: Lab, lab_link: Link) -> None:
    said: list[str] = []

    async def hear(error: Exception) -> None:
        said.append(str(error))

    lab_link.nc._error_cb = hear
    done, failed, repeated = (
        lab.job(shell("echo hello"), then="collect"),
        lab.job(shell("exit 3"), on_failure="mend"),
        lab.job(JobSpec(executable="/bin/sh", arguments=["-c", "exit 4"], retries=1)),
    )
    async with working.agent():
        await lab.send(done, failed, repeated)
        assert (await lab.outcome(done)).state == "succeeded"
        assert (await lab.end(failed)).exit_code == 3
        assert (await lab.outcome(repeated)).attempts == 2
    assert len(await lab.all("hr.work.*.*.*.*")) == 2
    assert await Table(lab.log.link, "sites", SiteRecord).fetch("lab") if False else True
    assert said == []


async def test_it_counts_the_branches_of_a_join(lab: Lab, working: Lab) -> None:
    jobs = [
        lab.job(shell("true"), run="joined", slot=Slot(scope="s", index=index, size=12, then="all", then_version="v1"))
        for index in range(12)
    ]
    async with working.agent():
        await lab.send(*jobs[:6])
        await asyncio.gather(*map(lab.outcome, jobs[:6]))
    async with working.agent():  # which knows nothing of what was counted, and reads it
        await lab.send(*jobs[6:])
        assert await there(lambda: lab.log.last("hr.work.*.*.joined.*")) is not None


async def test_a_later_agent_attaches_and_cancels(lab: Lab, working: Lab) -> None:
    kept, canceled = lab.job(shell("sleep 2; exit 5")), lab.job(shell("sleep 600"))
    async with working.agent():
        await lab.send(kept, canceled)
        await there(lambda: lab.log.last(topology.submit_subject(kept.run_id, "*", "*", "lab")))
        await there(lambda: lab.log.last(topology.submit_subject(canceled.run_id, "*", "*", "lab")))
    async with working.agent() as agent:
        ended = await lab.outcome(kept)
        assert ended.job is not None
        assert ended.job.exit_code == 5
        assert len(agent._watch) == 1
        await lab.cancel(canceled.run_id)
        await until(lambda: len(agent._watch) == 0)


async def test_a_consumer_that_was_removed_is_made_again(link: Link, lab: Lab, working: Lab) -> None:
    first, second = lab.job(shell("true")), lab.job(shell("true"))
    async with working.agent():
        await lab.send(first)
        await lab.outcome(first)
        await link.jetstream().delete_consumer(STREAM, "jobs-default@lab")
        await lab.send(second)
        assert (await lab.outcome(second)).state == "succeeded"


async def test_two_agents_of_one_site_read_beside_each_other(
    nats_server: NatsServer, lab: Lab, working: Lab, tmp_path: Path
) -> None:
    other_link = await site_link(nats_server, "lab")
    other_log = Log(other_link)
    await other_log.start()
    other = Lab(other_log, lab.site, tmp_path)
    jobs = [lab.job(shell("true")) for _ in range(20)]
    async with working.agent("one"), other.agent("two"):
        await lab.send(*jobs)
        assert {(await lab.outcome(job)).state for job in jobs} == {"succeeded"}
    await other_log.close()
    await other_link.close()


async def test_a_tenant_who_is_added_later_is_served_and_no_other(
    nats_server: NatsServer, link: Link, lab: Lab, working: Lab
) -> None:
    await topology.add_tenant(link, "stranger")
    mine, hers = lab.job(shell("true"), tenant="acme"), lab.job(shell("true"), tenant="stranger")
    before = lab.job(shell("true"))
    async with working.agent():
        await lab.send(before, mine, hers)
        assert (await lab.outcome(before)).state == "succeeded"
        await topology.add_tenant(link, "acme")
        await nats_server.serve_sites(siteusers.known(nats_server.data), {DEFAULT_TENANT, "acme"})
        assert (await lab.outcome(mine)).state == "succeeded"
        again = lab.job(shell("true"))
        await lab.send(again)
        assert (await lab.outcome(again)).state == "succeeded"
    assert await lab.log.last(topology.done_subject(hers.run_id, hers.invocation_id)) is None
    assert "jobs-stranger@lab" not in await topology.consumers(link.jetstream())


async def test_the_users_are_looked_at_again_whatever_went_wrong(
    nats_server: NatsServer, link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[Exception] = [nats.errors.SlowConsumerError("s", "r", 1, None), OSError("full")]  # type: ignore[arg-type]
    write = NatsServer._write_config

    def fails(server: NatsServer, sites: dict[str, dict[str, list[object]]]) -> None:
        if failures:
            raise failures.pop()
        write(server, sites)

    monkeypatch.setattr(NatsServer, "_write_config", fails)
    password = siteusers.kept(nats_server.data, "lab").read_text().strip()
    serving = asyncio.create_task(siteusers.serve_for_ever(nats_server, admin_of(nats_server, tmp_path)))
    await until(lambda: not failures and bool(nats_server._sites.get("SITE-lab", {}).get("users")))
    lab_link = await open_link(nats_server.url, user=agent_user("lab"), password=password, name="lab", site="lab")
    lab_log = Log(lab_link)
    await lab_log.start()
    await lab_log.append([Record("hr.note.run.job.1", b"x")])
    await lab_log.close()
    await lab_link.close()
    await ended([serving])


async def test_only_a_site_that_may_hands_jobs_on(nats_server: NatsServer, log: Log, lab_log: Log) -> None:
    unit = [Record("hr.job.other.default.r.j", b"on"), Record("hr.lease.r.j", b"x", "hr.*.r.j")]
    with pytest.raises(HeadraceError):
        await lab_log.append(unit, timeout_s=3.0)
    assert await log.last("hr.job.other.>") is None
    pilot = await site_link(nats_server, "pilot", moves=True)
    opened = Log(pilot)
    await opened.start()
    await opened.append(unit)
    assert await log.last("hr.job.other.default.r.j") is not None
    await opened.close()
    await pilot.close()


async def test_an_agent_that_begins_again_knows_what_its_dead_predecessor_was_told(
    nats_server: NatsServer, lab: Lab, lab_link: Link, lab_log: Log
) -> None:
    """What a dead agent read with stays for a while, and has nothing more to tell."""
    await lab.cancel("run")
    dead = await site_link(nats_server, "lab")
    for link in (dead, lab_link):
        in_turn(link)
    dead_log = Log(dead)
    await dead_log.start()
    read = follow(dead_log, [topology.cancel_subject("*", "*")], after=0)
    assert len(await anext(read)) == 1
    await dead_log.close()
    await dead.nc.close()
    await read.aclose()
    cancels = Cancels(lab_log)
    following = asyncio.create_task(cancels.follow())
    async with asyncio.timeout(30):
        await cancels.read.wait()
    assert "run" in cancels
    await ended([following])


def in_turn(link: Link) -> None:
    """Have the names of its consumers lent in the order of their numbers."""
    while not link._readers.empty():
        link._readers.get_nowait()
    for name in reader_names("lab"):
        link._readers.put_nowait(name)


async def test_a_new_user_disturbs_no_other(nats_server: NatsServer, lab_link: Link, lab_log: Log) -> None:
    lost: list[int] = []
    lab_link.on_loss(lambda: lost.append(1))
    other = await site_link(nats_server, "other")
    await lab_log.append([Record("hr.note.run.job.1", b"x")])
    assert lost == []
    await other.close()


def test_a_user_keeps_its_password_when_its_rights_change(tmp_path: Path) -> None:
    path = siteusers.kept(tmp_path, "lab")
    assert path.stat().st_mode & 0o777 == 0o600
    password = path.read_text()
    moving = siteusers.kept(tmp_path, "lab", moves=True)
    assert moving.read_text() == password
    assert [(user.site, user.moves) for user in siteusers.known(tmp_path)] == [("lab", True)]
    assert siteusers.kept(tmp_path, "lab") == moving  # as at each start of the platform
    assert siteusers.kept(tmp_path, "lab", moves=False) == path
    assert [(user.site, user.moves) for user in siteusers.known(tmp_path)] == [("lab", False)]


# ---------------------------------------------------------------- servers of one's own


async def test_servers_of_ones_own_take_what_is_printed(link: Link, nats_server: NatsServer, tmp_path: Path) -> None:
    await topology.add_tenant(link, "acme")
    admin = admin_of(nats_server, tmp_path)
    site = siteusers.user(siteusers.kept(tmp_path, "lab"))
    port = free_port()
    (tmp_path / "lab.conf").write_text(await siteusers.account(admin, site))
    (tmp_path / "exports.conf").write_text(siteusers.exports())
    (tmp_path / "nats.conf").write_text(
        f"""
        listen: "127.0.0.1:{port}"
        jetstream {{ store_dir: "{tmp_path}/store" }}
        accounts {{
          {ACCOUNT} {{ jetstream: enabled, users: [{{user: admin, password: p}}], include "exports.conf" }}
          include "lab.conf"
        }}
        """
    )
    server = await asyncio.create_subprocess_exec(str(nats_program()), "-c", str(tmp_path / "nats.conf"))
    try:
        url = f"nats://127.0.0.1:{port}"
        own = await open_link(url, user=ADMIN, password="p", name="test")
        await topology.ensure(own, topology.Limits())
        await topology.add_tenant(own, "acme")
        opened = await open_link(url, user=agent_user("lab"), password=site.password, name="lab", site="lab")
        assert await topology.ensure_jobs(opened, "lab") == {DEFAULT_TENANT, "acme"}
        await opened.close()
        await own.close()
    finally:
        server.terminate()
        await server.wait()


def test_the_command_makes_a_user_of_a_running_platform(shared_platform: UpProcess) -> None:
    made = subprocess.run(
        [sys.executable, "-P", "-m", "infra", "site", "user", "far", "--data", str(shared_platform.data)],
        capture_output=True,
        text=True,
        check=True,
    )
    path = shared_platform.data / "sites" / "far.password"
    assert made.stdout == ""
    assert str(path) in made.stderr
    assert path.read_text().strip() not in made.stderr

    async def connect() -> frozenset[str]:
        servers = json.loads((shared_platform.data / "run" / "servers.json").read_text())
        opened = await open_link(
            servers["nats_url"], user=agent_user("far"), password=path.read_text().strip(), name="far", site="far"
        )
        try:
            return await topology.ensure_jobs(opened, "far")
        finally:
            await opened.close()

    assert DEFAULT_TENANT in asyncio.run(connect())


async def test_an_agent_without_its_user_says_which_it_needs(
    nats_server: NatsServer, link: Link, tmp_path: Path
) -> None:
    password = tmp_path / "password"
    write_private(password, "nobody's")
    told = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-P", "-m", "infra", "agent", "--site", "lab", "--data", str(tmp_path / "agent")],
        env={**os.environ, "HEADRACE_NATS_URL": nats_server.url, "HEADRACE_NATS_PASSWORD_FILE": str(password)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 3
    assert "agent-lab" in told.stderr
    assert "headrace site user lab" in told.stderr
