"""Batch jobs on the bench: submitted, ended as the test says, and followed by what was asked for."""

from __future__ import annotations

from typing import Any

import pytest

from headrace import Context, JobEnd, JobSpec, JobTime, function
from headrace.errors import BadRequest, RunFailed, TooLarge
from headrace.testing import Bench


def job(number: int = 0) -> JobSpec:
    return JobSpec(executable="md", arguments=[str(number)], sites=["cluster"])


@function
def simulate(count: int, ctx: Context) -> None:
    if count == 1:
        ctx.submit(job(), then=collect, on_failure=mourn)
    else:
        ctx.submit_many([job(number) for number in range(count)], then=gather, on_failure=mourn)


@function
def collect(end: JobEnd) -> dict[str, Any]:
    return {"state": end.state, "site": end.site, "exit_code": end.exit_code, "job": end.job_id}


@function
def gather(ends: list[Any]) -> list[Any]:
    return [end["state"] if isinstance(end, dict) else end for end in ends]


@function
def mourn(end: JobEnd) -> str:
    return f"{end.reason} {end.exit_code}"


@function
def alone(_: object, ctx: Context) -> None:
    ctx.submit(job())


def test_a_job_completes_unless_the_bench_says_otherwise_and_then_gets_its_end() -> None:
    trace = Bench(simulate, collect, mourn).fire(simulate, 1)
    assert [step.function for step in trace.steps] == ["simulate", "collect"]
    (submitted,) = trace.jobs
    assert trace.answer == {"state": "completed", "site": "cluster", "exit_code": 0, "job": submitted.job_id}
    assert submitted.spec == job()
    assert submitted.parent_id == trace.step(simulate).invocation_id


@function
def many(count: int, ctx: Context) -> None:
    ctx.submit_many([job(number) for number in range(count)], then=gather)


def test_jobs_that_fail_together_are_told_as_jobs() -> None:
    trace = Bench(many, gather, jobs=lambda spec: int(spec.arguments[0] == "1")).fire(many, 3)
    assert trace.error is not None
    assert (trace.error.kind, trace.error.message[:36]) == ("jobs", "1 of 3 jobs failed; the first: exit_")


def test_a_job_that_fails_starts_on_failure_in_its_place() -> None:
    trace = Bench(simulate, collect, mourn, jobs=lambda spec: 3).fire(simulate, 1)
    assert trace.state == "succeeded"
    assert trace.answer == "exit_code 3"


def test_many_jobs_end_together_and_the_list_has_their_order() -> None:
    trace = Bench(simulate, gather, mourn, jobs=lambda spec: int(spec.arguments[0] == "2")).fire(simulate, 4)
    assert trace.answer == ["completed", "completed", "exit_code 1", "completed"]
    assert [each.spec.arguments for each in trace.jobs] == [["0"], ["1"], ["2"], ["3"]]
    assert Bench(simulate, gather, mourn).fire(simulate, 0).answer == []


def test_a_job_that_nothing_follows_is_the_answer_and_its_failure_that_of_the_run() -> None:
    good = Bench(alone, jobs=lambda spec: JobEnd(outputs={"e": "blob:1"}, time_s=JobTime(queue=5.0, run=60.0)))
    trace = good.fire(alone)
    assert trace.result()["outputs"] == {"e": "blob:1"}
    assert trace.ended_s == 65.0
    bad = Bench(alone, jobs=lambda spec: JobEnd(state="failed", reason="walltime", native_id="17")).fire(alone)
    assert bad.state == "failed"
    with pytest.raises(RunFailed, match=r"\(17\) at cluster failed: It ran longer than it may"):
        bad.result()


def test_what_follows_a_job_must_be_there_before_it_is_submitted() -> None:
    trace = Bench(simulate, collect).fire(simulate, 1)
    assert trace.state == "failed"
    assert trace.error is not None
    assert "submit: no function named mourn" in trace.error.message
    assert trace.jobs == []


def test_only_a_job_can_be_submitted_and_not_too_many_of_them() -> None:
    @function
    def wrong(_: object, ctx: Context) -> None:
        ctx.submit({"executable": "md"})  # type: ignore[arg-type] # which is the point

    @function
    def many(_: object, ctx: Context) -> None:
        ctx.submit_many(job() for _ in range(10_001))

    assert isinstance(Bench(wrong).fire(wrong).steps[0].exception, BadRequest)
    assert isinstance(Bench(many).fire(many).steps[0].exception, TooLarge)
