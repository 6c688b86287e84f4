"""``concurrent.futures`` over a real platform."""

from __future__ import annotations

import concurrent.futures
import functools
import math
import operator
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import pytest

from headrace import Client, Context, Executor, function
from headrace.errors import BadRequest, RunFailed
from headrace.futures import RunFuture
from tests.platforms import UpProcess
from tests.processes import wait_until


@dataclass
class Point:
    x: float
    y: float = 0.0


def square(x: int) -> int:
    return x * x


def shifted(point: Point, *, by: float) -> Point:
    return Point(point.x + by, point.y)


def fails(kind: str) -> None:
    if kind == "key":
        raise KeyError("frame")
    if kind == "own":
        raise Trouble("of its own kind")
    int(kind)


class Trouble(Exception):
    pass


def sleeps(seconds: float) -> str:
    time.sleep(seconds)
    return "awake"


@function(timeout="1s")
def too_slow() -> None:
    time.sleep(30)


@pytest.fixture
def executor(shared_platform: UpProcess) -> Iterator[Executor]:
    with Executor(shared_platform.url, shared_platform.token) as made:
        yield made


def test_a_function_of_a_module_runs_with_arguments_and_results_of_any_class(executor: Executor) -> None:
    future = executor.submit(shifted, Point(1.0, 2.0), by=0.5)
    assert future.result(60) == Point(1.5, 2.0)
    assert type(future.result()) is Point
    assert future.done()
    assert not future.running()


def test_lambdas_closures_partials_and_builtins_run(executor: Executor) -> None:
    factor = 3
    assert executor.submit(lambda x: x * factor, 5).result(60) == 15
    assert executor.submit(functools.partial(operator.mul, 4), 5).result(60) == 20
    assert executor.submit(math.hypot, 3, 4).result(60) == 5.0
    assert executor.submit(bytes.upper, b"abc").result(60) == b"ABC"


def test_a_function_gets_its_context_if_it_names_one(executor: Executor) -> None:
    def tells(x: int, ctx: Context) -> tuple[int, str]:
        return x, ctx.run_id

    future = executor.submit(tells, 1)  # type: ignore[call-arg] # the platform passes the context
    assert future.result(60) == (1, future.run_id)  # type: ignore[attr-defined]


def test_map_gives_results_in_order_and_many_calls_register_once(executor: Executor) -> None:
    assert list(executor.map(square, range(200), timeout=120)) == [n * n for n in range(200)]
    assert len(executor._prepared) == len(executor._registered) == 1


def test_an_exception_comes_back_with_the_remote_traceback_as_its_own_type_if_built_in(executor: Executor) -> None:
    with pytest.raises(ValueError, match="invalid literal") as caught:
        executor.submit(fails, "word").result(60)
    assert isinstance(caught.value, RunFailed)
    assert "int(kind)" in caught.value.traceback
    assert any("int(kind)" in note for note in caught.value.__notes__)
    with pytest.raises(KeyError, match="frame"):
        executor.submit(fails, "key").result(60)
    with pytest.raises(RunFailed, match="Trouble: of its own kind") as own:
        executor.submit(fails, "own").result(60)
    assert type(own.value) is RunFailed


def test_the_time_limit_of_a_function_holds(executor: Executor) -> None:
    error = executor.submit(too_slow).exception(60)
    assert isinstance(error, RunFailed)
    assert (error.kind, "timeout=" in error.hint) == ("timeout", True)


def test_canceling_a_future_cancels_its_run(executor: Executor, shared_platform: UpProcess) -> None:
    future = executor.submit(sleeps, 60.0)
    assert isinstance(future, RunFuture)
    wait_until(future.running)
    assert future.cancel()
    assert future.cancel()
    assert future.cancelled()
    with pytest.raises(CancelledError):
        future.result(0)
    with Client(shared_platform.url, shared_platform.token) as client:
        run = client.run(future.run_id or "")
        wait_until(lambda: run.state == "canceled")
    ended = executor.submit(square, 2)
    ended.result(60)
    assert not ended.cancel()


def test_futures_work_with_wait_as_completed_and_callbacks(executor: Executor) -> None:
    called: list[Any] = []
    futures = [executor.submit(square, n) for n in range(5)]
    slow = executor.submit(sleeps, 60.0)
    for future in futures:
        future.add_done_callback(lambda done: called.append(done.result()))
    assert {future.result() for future in concurrent.futures.as_completed(futures, timeout=60)} == {0, 1, 4, 9, 16}
    assert sorted(called) == [0, 1, 4, 9, 16]
    every: list[concurrent.futures.Future[Any]] = [*futures, slow]
    done, waiting = concurrent.futures.wait(every, timeout=0)
    assert (len(done), waiting) == (5, {slow})
    threading.Thread(target=slow.cancel).start()
    assert concurrent.futures.wait([slow], timeout=60).done == {slow}


def test_a_callback_may_submit_again(executor: Executor) -> None:
    again: concurrent.futures.Future[int] = concurrent.futures.Future()

    def chain(done: concurrent.futures.Future[int]) -> None:
        executor.submit(square, done.result()).add_done_callback(lambda last: again.set_result(last.result()))

    executor.submit(square, 3).add_done_callback(chain)
    assert again.result(60) == 81


def test_shutdown_waits_for_all_or_cancels_all_and_takes_no_more(shared_platform: UpProcess) -> None:
    with Executor(shared_platform.url, shared_platform.token) as waits:
        future = waits.submit(square, 3)
    assert future.done()
    assert future.result() == 9
    with pytest.raises(RuntimeError, match="shut down"):
        waits.submit(square, 3)
    waits.shutdown()

    cancels = Executor(shared_platform.url, shared_platform.token)
    futures = [cancels.submit(sleeps, 60.0) for _ in range(3)]
    wait_until(lambda: any(each.running() for each in futures))
    cancels.shutdown(cancel_futures=True)
    assert all(each.cancelled() for each in futures)
    with Client(shared_platform.url, shared_platform.token) as client:
        sent = [each.run_id for each in futures if isinstance(each, RunFuture) and each.run_id]
        assert sent
        wait_until(lambda: all(client.run(run_id).state == "canceled" for run_id in sent))


def test_a_deadline_is_the_deadline_of_every_run(shared_platform: UpProcess) -> None:
    with Executor(shared_platform.url, shared_platform.token, deadline="45s") as executor:
        future = executor.submit(square, 2)
        future.result(60)
    with Client(shared_platform.url, shared_platform.token) as client:
        assert isinstance(future, RunFuture)
        view = client.run(future.run_id or "").view()
    assert view.deadline is not None
    assert view.deadline_met is True


def test_what_cannot_travel_is_refused_at_once(executor: Executor) -> None:
    with pytest.raises(BadRequest, match="cannot travel"):
        executor.submit(square, threading.Lock())  # type: ignore[arg-type] # wrong on purpose
    lock = threading.Lock()
    with pytest.raises(BadRequest, match="cannot travel"):
        executor.submit(lambda: lock)


def test_a_platform_that_refuses_is_told_by_the_future(shared_platform: UpProcess) -> None:
    with Executor(shared_platform.url, "wrong") as executor:
        error = executor.submit(square, 1).exception(60)
    assert type(error).__name__ == "Unauthorized"
