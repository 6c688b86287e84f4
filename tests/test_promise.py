"""Accepted means kept: every run that was accepted ends, once, whatever is killed on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace import Client
from tests.platforms import UpProcess
from tests.processes import wait_until

FUNCTIONS = '''\
import time

from headrace import Context, function, on


@on(type="org.test.shot")
@function(retries=20)
def shot(n: int, ctx: Context) -> None:
    """Fan out, join, and chain: every way for a run to go on."""
    time.sleep(0.01)
    ctx.map(part, [n, n + 1, n + 2], then=whole)


@function(retries=20)
def part(n: int) -> int:
    time.sleep(0.005)
    return n * n


@function(retries=20)
def whole(parts: list[int], ctx: Context) -> None:
    ctx.call(last, sum(parts))


@function(retries=20)
def last(total: int) -> dict[str, int]:
    return {"total": total}
'''
RUNS = 60


def expected(n: int) -> dict[str, int]:
    return {"total": n * n + (n + 1) ** 2 + (n + 2) ** 2}


@pytest.fixture
def sturdy(tmp_path: Path) -> Iterator[UpProcess]:
    """A platform of its own with the functions deployed."""
    process = UpProcess(tmp_path / "headrace")
    try:
        process.wait_ready()
        (tmp_path / "shots.py").write_text(FUNCTIONS)
        with Client(process.url, process.token) as client:
            client.deploy(tmp_path / "shots.py")
        yield process
    finally:
        process.end()


def accept(process: UpProcess, first: int, count: int) -> dict[int, str]:
    """Send so many shots and return the ids of their runs."""
    with Client(process.url, process.token) as client:
        return {n: client.trigger("shot", n, id=f"shot-{n}").run_id for n in range(first, first + count)}


def check(process: UpProcess, runs: dict[int, str]) -> None:
    """Every run has ended with the right answer, and no invocation of it was committed more than once."""
    with Client(process.url, process.token) as client:
        for n, run_id in runs.items():
            assert client.run(run_id).result(timeout=90) == expected(n)
            shown = client.run(run_id).view()
            names = sorted(i.function for i in shown.invocations)
            assert names == ["last", "part", "part", "part", "shot", "whole"]
            assert {i.state for i in shown.invocations} == {"succeeded"}
            assert shown.state == "succeeded"


def some_ended(process: UpProcess, runs: dict[int, str]) -> bool:
    with Client(process.url, process.token) as client:
        return client.run(next(iter(runs.values()))).state == "succeeded"


def test_every_accepted_run_ends_after_a_kill_of_everything(sturdy: UpProcess, tmp_path: Path) -> None:
    runs = accept(sturdy, 0, RUNS)
    wait_until(lambda: some_ended(sturdy, runs), 60)
    sturdy.kill()
    again = UpProcess(tmp_path / "headrace").wait_ready()
    try:
        check(again, runs)
    finally:
        again.end()


def test_every_accepted_run_ends_after_a_stop_in_mid_run(sturdy: UpProcess, tmp_path: Path) -> None:
    runs = accept(sturdy, 0, RUNS)
    assert sturdy.stop() == 0
    again = UpProcess(tmp_path / "headrace").wait_ready()
    try:
        check(again, runs)
    finally:
        again.end()


def test_every_accepted_run_ends_while_each_process_is_killed_in_turn(sturdy: UpProcess) -> None:
    runs: dict[int, str] = {}
    for turn, name in enumerate(["worker", "nats-server", "ledger", "gateway", "redis-server", "headrace.zygote"]):
        runs |= accept(sturdy, turn * 20, 20)
        os.kill(sturdy.child(name), signal.SIGKILL)
    check(sturdy, runs)


def test_an_event_sent_again_after_a_restart_is_the_same_run(sturdy: UpProcess, tmp_path: Path) -> None:
    before = accept(sturdy, 0, 5)
    sturdy.kill()
    again = UpProcess(tmp_path / "headrace").wait_ready()
    try:
        assert accept(again, 0, 5) == before
        check(again, before)
        with Client(again.url, again.token) as client:
            assert len(client.runs()) == 5
    finally:
        again.end()
