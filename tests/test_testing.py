"""Firing events through functions without a server."""

from __future__ import annotations

import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import headrace.testing
from headrace import Context, Event, function, on
from headrace.errors import NotFound, RunCanceled, RunFailed
from headrace.model import Fidelity
from headrace.testing import Bench, fire


@dataclass
class Frame:
    number: int
    peaks: list[int]


@on(type="run.stop", deadline="60s")
@function
def run_stopped(event: Event, ctx: Context) -> None:
    ctx.map(find_hits, event.data["frames"], then="report")


@function
def find_hits(frame: Frame, ctx: Context) -> dict[str, int]:
    ctx.log.info("frame %d", frame.number)
    ctx.progress(1.0, "done")
    return {"hits": len(frame.peaks)}


@function
def report(found: list[dict[str, int]], ctx: Context) -> dict[str, int]:
    ctx.emit("org.example.rate", {"frames": len(found)})
    return {"hits": sum(each["hits"] for each in found)}


FRAMES = [{"number": 1, "peaks": [5]}, {"number": 2, "peaks": [5, 6]}]


def test_the_usage_in_the_docstring_runs() -> None:
    @function(name="find_hits")
    def hits(frame: int) -> dict[str, int]:
        return {"hits": frame}

    lines = (headrace.testing.__doc__ or "").splitlines()
    usage = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ") or not line))
    space: dict[str, Any] = {"Event": Event, "run_stopped": run_stopped, "find_hits": hits, "report": report}
    exec(usage, space)
    space["test_a_run_with_two_frames_is_reported"]()


def test_log_lines_progress_effects_and_events_are_there_to_look_at() -> None:
    trace = fire(run_stopped, Event(id="1", source="/beamline", type="run.stop", data={"frames": FRAMES}))
    assert trace.log == [("info", "frame 1"), ("info", "frame 2")]
    assert trace.steps_of(find_hits)[0].progress == [(1.0, "done")]
    assert len(trace.step(run_stopped).effects) == 1
    assert [(event.type, event.data) for event in trace.emitted] == [("org.example.rate", {"frames": 2})]


def test_the_same_event_gives_the_same_ids_in_the_same_order() -> None:
    event = Event(id="1", source="/beamline", type="run.stop", data={"frames": FRAMES})
    one, two = (Bench(sys.modules[__name__]).fire(run_stopped, event) for _ in range(2))
    assert [step.invocation_id for step in one.steps] == [step.invocation_id for step in two.steps]
    assert one.run_id == two.run_id
    assert len({step.invocation_id for step in one.steps}) == 4
    assert {step.parent_id for step in one.steps[1:]} == {one.steps[0].invocation_id}


def test_an_event_starts_a_run_on_every_route_that_takes_it() -> None:
    bench = Bench(sys.modules[__name__])
    event = Event(id="1", source="/beamline", type="run.stop", data={"frames": []})
    assert [trace.function for trace in bench.publish(event)] == ["run_stopped"]
    assert bench.publish(Event(id="1", source="/beamline", type="other")) == []


def test_data_of_the_wrong_type_fails_the_run_and_names_the_field() -> None:
    trace = fire(find_hits, {"number": "one", "peaks": []})
    assert trace.state == "failed"
    assert trace.error is not None
    assert trace.error.kind == "user"
    assert "$.number" in trace.error.message
    with pytest.raises(RunFailed, match=r"\$\.number"):
        trace.result()


def test_what_has_no_form_in_json_fails_here_as_it_does_on_the_platform() -> None:
    def odd(x: int) -> object:
        return object()

    trace = Bench(odd).fire("odd", 1)
    assert trace.state == "failed"
    assert "object" in (trace.error.message if trace.error else "")


def test_a_body_that_raises_has_asked_for_nothing() -> None:
    def careless(x: int, ctx: Context) -> None:
        ctx.call(report, [])
        ctx.emit("org.example.rate", 1)
        ctx.answer(1)
        raise ValueError("too late")

    trace = Bench(careless, report).fire("careless", 1)
    assert (trace.state, trace.emitted, trace.answered) == ("failed", [], False)
    assert [step.function for step in trace.steps] == ["careless"]
    assert isinstance(trace.steps[0].exception, ValueError)
    with pytest.raises(RunFailed, match="ValueError: too late") as caught:
        trace.result()
    assert isinstance(caught.value.__cause__, ValueError)
    assert "raise ValueError" in caught.value.traceback


def test_a_failed_attempt_is_repeated_as_often_as_retries_allow() -> None:
    attempts: list[int] = []

    @function(retries=2)
    def shaky(x: int, ctx: Context) -> int:
        attempts.append(ctx.attempt)
        if ctx.attempt < 3:
            raise OSError("not yet")
        return ctx.attempt

    trace = Bench(shaky).fire(shaky, 1)
    assert attempts == [1, 2, 3]
    assert (trace.state, trace.answer, trace.steps[0].attempts) == ("succeeded", 3, 3)
    assert trace.steps[0].error is None


def test_bad_input_is_not_tried_again() -> None:
    @function(retries=5)
    def strict(x: int) -> int:
        return x

    trace = Bench(strict).fire(strict, "x")
    assert trace.steps[0].attempts == 1


def test_a_call_to_a_function_that_is_not_there_fails_the_caller() -> None:
    def caller(x: int, ctx: Context) -> None:
        ctx.call("nowhere", 1)

    trace = Bench(caller).fire("caller", 1)
    assert trace.state == "failed"
    assert "nowhere" in (trace.error.message if trace.error else "")


def test_delays_are_virtual_and_keep_their_order() -> None:
    def start(x: int, ctx: Context) -> None:
        ctx.call("note", "late", delay=3600.0)
        ctx.call("note", "soon", delay=60.0)

    def note(word: str, ctx: Context) -> str:
        ctx.log.info("%s %.0f", word, ctx.time_left())
        return word

    trace = Bench(start, note).fire("start", 1, deadline="2h")
    assert trace.log == [("info", "soon 7140"), ("info", "late 3600")]
    assert trace.ended_s == 3600.0
    assert trace.answer == "late"


def test_the_answer_is_the_first_one_given_else_the_last_result_of_the_chain() -> None:
    def first(x: int, ctx: Context) -> str:
        ctx.call("second", 1)
        return "of the first"

    def second(x: int) -> str:
        return "of the second"

    def early(x: int, ctx: Context) -> None:
        ctx.answer("early")
        ctx.answer("again")
        ctx.call("second", 1)

    bench = Bench(first, second, early)
    assert bench.fire("first", 1).result() == "of the second"
    assert bench.fire("early", 1).result() == "early"


def test_a_map_that_fails_in_one_member_runs_the_others_and_fails_the_run() -> None:
    def spread(x: int, ctx: Context) -> None:
        ctx.map("member", [0, 1, 2], then="join")

    def member(x: int) -> float:
        return 1 / x

    def join(found: list[float]) -> float:
        return sum(found)

    trace = Bench(spread, member, join).fire("spread", 1)
    assert trace.state == "failed"
    assert [step.state for step in trace.steps_of("member")] == ["dead", "succeeded", "succeeded"]
    assert not trace.steps_of("join")
    assert trace.error is not None
    assert (trace.error.kind, "1 of 3" in trace.error.message) == ("map", True)


def test_then_waits_for_whole_chains_and_gets_their_last_results_in_order() -> None:
    def spread(x: int, ctx: Context) -> None:
        ctx.map("member", [1, 2], then="join")

    def member(x: int, ctx: Context) -> str:
        if x == 1:
            ctx.call("longer", x, delay=10.0)
        return "short"

    def longer(x: int) -> bytes:
        return b"long"

    def join(found: list[Any]) -> Any:
        return [each.decode() if isinstance(each, bytes) else each for each in found]

    assert Bench(spread, member, longer, join).fire("spread", 1).result() == ["long", "short"]


def test_an_empty_map_gives_then_an_empty_list() -> None:
    def spread(x: int, ctx: Context) -> None:
        ctx.map("join", [], then="join")

    def join(found: list[int]) -> int:
        return len(found)

    assert Bench(spread, join).fire("spread", 1).result() == 0


def test_a_late_step_of_a_route_that_cancels_is_not_run() -> None:
    @on(deadline="1s", on_late="cancel")
    def start(x: int, ctx: Context) -> None:
        ctx.call("late", 1, delay=2.0)

    def late(x: int) -> None:
        raise AssertionError("it ran")

    trace = Bench(start, late).fire(start, 1)
    assert (trace.state, trace.step("late").state) == ("canceled", "canceled")
    with pytest.raises(RunCanceled, match="deadline"):
        trace.result()


def test_files_are_staged_and_stored_on_the_bench(tmp_path: Path) -> None:
    def analyse(uri: str, ctx: Context) -> str:
        return ctx.store(ctx.stage(uri).read_bytes().upper(), "loud.txt")

    def again(uri: str, ctx: Context) -> str:
        return ctx.stage(uri).read_text()

    kept = tmp_path / "frame.txt"
    kept.write_text("quiet")
    bench = Bench(analyse, again, files={"s3://bucket/frame.txt": kept})
    trace = bench.fire("analyse", "s3://bucket/frame.txt")
    assert trace.stored["loud.txt"].read_text() == "QUIET"
    assert bench.fire("again", trace.answer).result() == "QUIET"
    assert bench.fire("again", kept.as_uri()).result() == "quiet"
    failed = bench.fire("again", "s3://bucket/other")
    assert "is not on the bench" in (failed.error.message if failed.error else "")


def test_async_functions_bytes_and_text_work() -> None:
    async def reverse(data: bytes) -> bytes:
        return data[::-1]

    def shout(event: Event) -> str:
        return str(event.data).upper()

    bench = Bench(reverse, shout)
    assert bench.fire("reverse", b"abc").result() == b"cba"
    text = Event(id="1", source="/s", type="t", datacontenttype="text/plain", data="quiet")
    assert bench.fire("shout", text).result() == "QUIET"


async def test_async_functions_work_in_a_test_that_is_a_coroutine_itself() -> None:
    async def add(x: int) -> int:
        return x + 1

    assert Bench(add).fire("add", 1).result() == 2


def test_what_is_not_on_the_bench_is_told_with_what_is() -> None:
    with pytest.raises(NotFound, match="no function named nowhere") as caught:
        Bench(report).fire("nowhere")
    assert "report" in caught.value.hint
    with pytest.raises(NotFound, match="ran 2 times, not once"):
        fire(run_stopped, Event(id="1", source="/b", type="run.stop", data={"frames": FRAMES})).step(find_hits)


# ---------------------------------------------------------------- variants


def test_of_a_function_with_variants_the_full_one_is_fired_unless_another_rung_is_asked_for() -> None:
    @function
    def half(x: int) -> str:
        return "half"

    @function
    def quick(x: int) -> str:
        return "quick"

    @function(variants=[half, quick])
    def full(x: int) -> str:
        return "full"

    @function
    def first(x: int, ctx: Context) -> None:
        ctx.call(full, x)

    bench = Bench(first, full, half, quick)
    assert [bench.fire(first, 1, rung=rung).answer for rung in range(4)] == ["full", "half", "quick", "quick"]
    assert bench.fire(first, 1).step("full").fidelity == Fidelity(level=0, function="full", of=3)
    assert bench.fire(first, 1, rung=1).step("half").fidelity == Fidelity(level=1, function="half", of=3)
    assert bench.fire(first, 1).step("first").fidelity is None


def test_what_follows_takes_nothing_from_the_time_of_a_step_here() -> None:
    @function
    def asks(data: Any, ctx: Context) -> list[float]:
        return [ctx.time_left(), ctx.budget_left()]

    assert Bench(asks).fire(asks, None, deadline="40s").answer == [40.0, 40.0]
