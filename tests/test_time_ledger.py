"""Where the time of a run went, on a whole platform: the parts sum to the whole, and each went where it should."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from headrace import Client
from headrace.model import RunView, TimeLedger
from tests.platforms import UpProcess
from tests.processes import wait_until

ALIKE_SHARE = 0.01
FUNCTIONS = """
import os
import time

from headrace import Context, function, on


@on(name="chain")
@function
def chain(seconds: list[float], ctx: Context):
    time.sleep(seconds[0])
    if seconds[1:]:
        ctx.call(chain, seconds[1:])
    return len(seconds)


@on(name="wide")
@function
def wide(seconds: list[float], ctx: Context):
    ctx.map(member, seconds, then=total)


@function
def member(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@function
def total(seconds: list[float], ctx: Context) -> float:
    time.sleep(0.02)
    return sum(seconds)


@on(name="apart")
@function
def apart(seconds: list[float], ctx: Context):
    ctx.map(member, seconds)
    ctx.call(member, 0.01)


@on(name="again")
@function(retries=2)
def again(seconds: float, ctx: Context) -> int:
    time.sleep(seconds)
    if ctx.attempt < 3:
        raise ValueError("not yet")
    return ctx.attempt


@on(name="later")
@function
def later(seconds: float, ctx: Context):
    ctx.call(member, 0.01, delay=seconds)


@on(name="heavy")
@function
def heavy(data: bytes, ctx: Context):
    path = ctx.stage(ctx.store(data, "data"))
    ctx.call(weigh, path.read_bytes())


@function
def weigh(data: bytes) -> int:
    return len(data)


@on(name="early")
@function
def early(seconds: float, ctx: Context):
    ctx.answer("here")
    ctx.call(member, seconds)


@on(name="broken")
@function(retries=0)
def broken(seconds: float):
    if os.path.exists("FOLDER/broken"):
        raise ValueError("broken")
    time.sleep(seconds)
    return "mended"


@on(name="first", deadline="60s")
@function
def first(data, ctx: Context):
    ctx.call(second, [ctx.time_left(), ctx.budget_left()])


@function
def second(before: list[float], ctx: Context):
    time.sleep(0.3)
    ctx.call(third, [*before, ctx.time_left(), ctx.budget_left()])


@function
def third(before: list[float], ctx: Context) -> list[float]:
    time.sleep(0.5)
    return before


@on(name="endless")
@function
def endless(data, ctx: Context) -> bool:
    return ctx.budget_left() == ctx.time_left() == float("inf")
"""


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpProcess]:
    """A platform of its own: nothing else runs on it, and nothing was learned yet."""
    folder = tmp_path_factory.mktemp("ledger")
    process = UpProcess(folder / "headrace")
    try:
        process.wait_ready()
        (folder / "timed.py").write_text(FUNCTIONS.replace("FOLDER", str(folder)))
        with Client(process.url, process.token) as client:
            client.deploy(folder / "timed.py")
        yield process
    finally:
        process.end()


@pytest.fixture
def client(up: UpProcess) -> Iterator[Client]:
    with Client(up.url, up.token) as opened:
        yield opened


def ended(client: Client, route: str, data: Any) -> RunView:
    """Fire a route and return the run once it has ended, with its parts checked."""
    run = client.trigger(route, data)
    run.result(timeout=60)
    wait_until(lambda: run.view().ended_at is not None, 20)
    return checked(run.view())


def checked(view: RunView) -> RunView:
    whole_s, ledger = view.time_to_solution_s, view.time_ledger
    assert whole_s is not None
    assert abs(ledger.total_s() - whole_s) <= ALIKE_SHARE * whole_s, ledger
    assert min(ledger.gateway_s, ledger.lane_s, ledger.stage_in_s, ledger.run_s, ledger.commit_s) >= 0.0
    assert ledger.stage_out_s >= 0.0
    return view


def ledger_of(client: Client, route: str, data: Any) -> TimeLedger:
    return ended(client, route, data).time_ledger


def test_the_steps_of_a_chain_run_one_after_the_other(client: Client) -> None:
    assert ledger_of(client, "chain", [0.1, 0.2, 0.1]).run_s >= 0.4


def test_of_a_map_the_way_over_its_last_member_is_told(client: Client) -> None:
    ledger = ledger_of(client, "wide", [0.05, 0.4, 0.05])
    assert ledger.run_s >= 0.4 + 0.02
    assert ended(client, "wide", []).time_ledger.run_s >= 0.02
    assert ended(client, "wide", [0.01] * 300).invocations_total > 300  # its members were started in parts


def test_of_branches_that_end_apart_the_last_is_told(client: Client) -> None:
    assert ledger_of(client, "apart", [0.05, 0.3]).run_s >= 0.3


def test_attempts_that_failed_have_run_and_between_them_it_waited(client: Client) -> None:
    ledger = ledger_of(client, "again", 0.15)
    assert ledger.run_s >= 3 * 0.15
    assert ledger.lane_s >= 0.1 + 0.2  # the shortest delays after a first and a second failure


def test_a_delay_is_waited_for_and_not_run(client: Client) -> None:
    ledger = ledger_of(client, "later", 0.5)
    assert ledger.lane_s >= 0.5
    assert ledger.run_s < ledger.lane_s


def test_data_that_is_brought_and_kept_has_parts_of_its_own(client: Client) -> None:
    ledger = ledger_of(client, "heavy", b"x" * 900_000)
    assert ledger.stage_in_s > 0.0
    assert ledger.stage_out_s > 0.0


def test_an_answer_that_is_given_early_ends_the_account(client: Client) -> None:
    view = ended(client, "early", 0.4)
    assert view.time_to_solution_s is not None
    assert view.answered_at is not None
    assert view.ended_at is not None
    assert view.answered_at < view.ended_at
    assert view.time_ledger.run_s < 0.4


def test_a_replay_has_an_account_of_its_own(client: Client, up: UpProcess) -> None:
    flag = up.data.parent / "broken"
    flag.touch()
    old = client.trigger("broken", 0.1)
    wait_until(lambda: old.state == "failed", 30)
    assert old.view().time_to_solution_s is None
    wait_until(lambda: bool(client.dead(function="broken")), 20)
    flag.unlink()
    new = client.replay(old.run_id)
    assert new.result(timeout=30) == "mended"
    wait_until(lambda: new.view().ended_at is not None, 20)
    assert checked(new.view()).time_ledger.run_s >= 0.1


def test_what_is_left_for_a_step_shrinks_by_what_usually_follows_it(client: Client) -> None:
    assert client.trigger("endless", None).result(timeout=30) is True
    first_left, first_budget, second_left, second_budget = client.trigger("first", None).result(timeout=30)
    assert 50.0 < second_left < first_left <= 60.0
    assert first_budget <= first_left
    assert second_budget <= second_left

    def known() -> bool:
        first_left, first_budget, second_left, second_budget = client.trigger("first", None).result(timeout=30)
        third_runs, second_and_third_run = 0.5, 0.3 + 0.5
        return bool(first_left - first_budget >= second_and_third_run and second_left - second_budget >= third_runs)

    wait_until(known, 30)
