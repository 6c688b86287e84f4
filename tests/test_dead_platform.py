"""Giving up and another go, on a whole platform: poison, a redeploy, a map, the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from headrace import Client
from headrace.errors import Conflict, NotFound, RunFailed
from headrace.model import Replaying
from tests.commands import Run
from tests.platforms import UpProcess
from tests.processes import wait_until

AUDIT = {"HEADRACE_AUDIT_EVERY_S": "0.3", "HEADRACE_AUDIT_GRACE_S": "0.5"}
GOOD_RUNS = 50

FUNCTIONS = """
import os
import time

from headrace import Context, Event, function, on


@on(name="poison")
@function(retries=2)
def poison(data):
    os._exit(7)


@on(name="good")
@function
def good(n: int) -> int:
    time.sleep(0.01)
    return n + 1


@on(type="org.test.mend", name="mend", deadline="60s")
@function(retries=1)
def mend(event: Event, ctx: Context):
    raise ValueError(f"broken {ctx.attempt}")


@on(name="wide")
@function
def wide(numbers: list[int], ctx: Context):
    ctx.map(member, numbers, then=total)


@function
def member(n: int) -> int:
    if n < 0:
        raise ValueError("negative")
    return n


@function
def total(numbers: list[int]) -> int:
    return sum(numbers)
"""
MENDED = FUNCTIONS.replace('raise ValueError(f"broken {ctx.attempt}")', "return [event.id, event.data]").replace(
    'raise ValueError("negative")', "return 0"
)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpProcess]:
    """A platform of its own whose auditor looks often."""
    folder = tmp_path_factory.mktemp("dead")
    process = UpProcess(folder / "headrace", env=AUDIT)
    try:
        process.wait_ready()
        yield process
    finally:
        process.end()


@pytest.fixture
def client(up: UpProcess) -> Iterator[Client]:
    with Client(up.url, up.token) as opened:
        yield opened


def deploy(client: Client, folder: Path, text: str) -> None:
    (folder / "shots.py").write_text(text)
    client.deploy(folder / "shots.py")


def fail(client: Client, route: str, data: Any) -> str:
    run = client.trigger(route, data)
    with pytest.raises(RunFailed):
        run.result(timeout=60)
    return run.run_id


def test_an_empty_platform_has_nothing_dead(up: UpProcess, client: Client, run: Run, tmp_path: Path) -> None:
    environment(up, tmp_path)
    assert client.dead() == []
    said = run("dead")
    assert (said.code, said.out.strip()) == (0, "nothing was given up on")
    assert run("dead", "--json").json == {"dead": []}


def environment(up: UpProcess, folder: Path) -> None:
    """Let commands that are run in this folder find the platform."""
    (folder / ".headrace").mkdir(exist_ok=True)
    (folder / ".headrace" / "url").write_text(up.url)
    token = folder / ".headrace" / "token"
    token.write_text(up.token)
    token.chmod(0o600)


def test_poison_is_dead_after_its_attempts_and_hurts_nobody(client: Client, tmp_path: Path) -> None:
    deploy(client, tmp_path, FUNCTIONS)
    good = [client.trigger("good", n) for n in range(GOOD_RUNS // 2)]
    poisoned = client.trigger("poison", {})
    good += [client.trigger("good", n) for n in range(GOOD_RUNS // 2, GOOD_RUNS)]
    assert [one.result(timeout=60) for one in good] == [n + 1 for n in range(GOOD_RUNS)]
    with pytest.raises(RunFailed):
        poisoned.result(timeout=60)
    (dead,) = client.dead(route="poison")
    assert (dead.run_id, dead.attempts, dead.error.kind) == (poisoned.run_id, 3, "lost")
    assert [(e.attempt, e.error.kind) for e in dead.errors] == [(1, "lost"), (2, "lost"), (3, "lost")]


def test_a_replay_after_a_redeploy_gives_the_answer_of_the_same_event(client: Client, tmp_path: Path) -> None:
    deploy(client, tmp_path, FUNCTIONS)
    event = {"id": "shot-1", "source": "/beam", "type": "org.test.mend", "specversion": "1.0", "data": {"n": 1}}
    (old,) = client.publish(event)
    with pytest.raises(RunFailed):
        old.result(timeout=60)
    wait_until(lambda: bool(client.dead(function="mend")), 10)
    (dead,) = client.dead(function="mend")
    assert [e.error.message for e in dead.errors] == ["ValueError: broken 1", "ValueError: broken 2"]
    assert "broken 2" in dead.errors[1].error.traceback
    deploy(client, tmp_path, MENDED)
    new = client.replay(dead.invocation_id)
    assert new.result(timeout=60) == ["shot-1", {"n": 1}]
    assert isinstance(new.ref, Replaying)
    assert (new.ref.from_, new.ref.replay_of.run_id) == ("invocation", old.run_id)
    seen = new.view()
    assert seen.event.source == "/beam"
    assert seen.deadline_met is True
    wait_until(lambda: client.run(old.run_id).view().replayed_as == new.run_id, 10)
    assert client.run(old.run_id).state == "failed"
    assert client.dead(function="mend") == []
    assert [d.replayed_as for d in client.dead(function="mend", all=True)] == [new.run_id]
    with pytest.raises(Conflict, match="succeeded"):
        client.replay(new.run_id)
    with pytest.raises(NotFound):
        client.replay("nothing")


def test_a_member_of_a_map_starts_its_run_again(client: Client, tmp_path: Path) -> None:
    deploy(client, tmp_path, FUNCTIONS)
    old = fail(client, "wide", [1, -1, 2, -2])
    wait_until(lambda: len(client.dead(route="wide")) == 2, 10)
    one, other = client.dead(route="wide")
    assert {one.function, other.function} == {"member"}
    deploy(client, tmp_path, MENDED)
    new = client.replay(one.invocation_id, key="k")
    assert isinstance(new.ref, Replaying)
    assert new.ref.from_ == "start"
    assert new.result(timeout=60) == 3
    again = client.replay(other.invocation_id, key="k")
    assert (again.run_id, again.duplicate) == (new.run_id, True)
    wait_until(lambda: client.dead(route="wide") == [], 10)
    assert client.run(old).view().replayed_as == new.run_id


def test_the_commands_list_and_replay(up: UpProcess, client: Client, run: Run, tmp_path: Path) -> None:
    environment(up, tmp_path)
    deploy(client, tmp_path, FUNCTIONS)
    old = fail(client, "wide", [-1, -2])
    wait_until(lambda: len(client.dead(route="wide")) == 2, 10)
    said = run("dead", "--route", "wide")
    assert said.code == 0
    assert said.out.count(old) == 2
    assert "user: ValueError: negative" in said.out
    assert f"headrace replay {old}" in said.err
    listed = run("dead", "--function", "member", "--limit", "1", "--json").json["dead"]
    assert [d["run_id"] for d in listed] == [old]
    assert [e["error"]["kind"] for e in listed[0]["errors"]] == ["user"]
    deploy(client, tmp_path, MENDED)
    ids = [d.invocation_id for d in client.dead(route="wide")]
    said = run("replay", *ids)
    assert said.code == 0
    lines = said.out.split("\n")[:-1]
    assert len(lines) == 2
    assert len({line.split()[0] for line in lines}) == 1
    assert all("from the start of its run" in line for line in lines)
    shown = run("run", old)
    assert "replayed as" in shown.out
    made = run("replay", old, "--json").json["runs"]
    assert (made[0]["from"], made[0]["replay_of"]["run_id"]) == ("start", old)
    wait_until(lambda: run("dead", "--route", "wide").out.strip() == "nothing was given up on", 10)
    assert old in run("dead", "--route", "wide", "--all").out
    wrong = run("replay", "nothing", lines[0].split()[0])
    assert wrong.code == 2
    assert "there is no run and no invocation nothing" in wrong.err
    assert run("replay").code == 2
    assert run("dead", "--limit", "0").code == 2


async def test_the_auditor_finds_nothing_wrong_with_all_of_this(up: UpProcess) -> None:
    headers = {"Authorization": f"Bearer {up.token}"}
    async with aiohttp.ClientSession(headers=headers) as http:
        before = ""
        while True:
            async with http.get(f"{up.url}/v1/audit") as answer:
                said = json.loads(await answer.read())
            if said.get("running") == 0 and before and said["at"] > before:
                break
            before = before or said.get("at", "")
        assert said["accepted"] == said["ended"] > GOOD_RUNS
        assert (said["difference"], said["lost"], said["stuck"], said["missed"]) == (0, 0, 0, 0)
        async with http.get(f"{up.url}/metrics") as answer:
            assert "headrace_audit_difference 0.0" in await answer.text()
