"""Which jobs are submitted together, and which again."""

from __future__ import annotations

from msgspec import Struct

from functions.ensembles import DELAY_FIRST_S, DELAY_S_MAX, again, alike, delay_s, together
from headrace.jobs import JobSpec, Resources
from headrace.wire import Invocation, Payload, Slot


class Held(Struct, frozen=True):
    invocation: Invocation
    seq: int


def held(seq: int, *, deadline: float | None = None, due: float | None = None, scope: str = "", run: str = "r") -> Held:
    slot = Slot(scope=scope, index=seq, size=9) if scope else None
    return Held(
        Invocation(
            run_id=run,
            invocation_id=f"i{seq}",
            function="headrace.job",
            version="",
            route="",
            tenant="default",
            payload=Payload(),
            accepted_at=0.0,
            sent_at=0.0,
            deadline=deadline,
            due=due,
            slot=slot,
        ),
        seq,
    )


def seqs(groups: list[list[Held]]) -> list[list[int]]:
    return [[one.seq for one in group] for group in groups]


def test_members_of_one_ensemble_go_together_up_to_a_limit() -> None:
    jobs = [held(1, scope="a"), held(2, scope="b"), held(3), held(4, scope="a"), held(5, scope="a"), held(6)]
    assert seqs(together(jobs, 10)) == [[1, 4, 5], [2], [3], [6]]
    assert seqs(together(jobs, 2)) == [[1, 4], [2], [3], [5], [6]]
    assert seqs(together([held(1, scope="a"), held(2, scope="a", run="other")], 10)) == [[1], [2]]


def test_jobs_that_differ_in_arguments_environment_and_files_are_alike() -> None:
    plain = JobSpec(executable="md", arguments=["1"])
    specs = [
        plain,
        JobSpec(executable="md", arguments=["2"], environment={"A": "b"}, inputs={"x": "blob:y"}, outputs=["z"]),
        JobSpec(executable="md", resources=Resources(gpu_cores_per_process=1)),
        JobSpec(executable="other"),
        plain,
    ]
    assert alike(specs, 10) == [[0, 1, 4], [2], [3]]
    assert alike(specs, 2) == [[0, 1], [2], [3], [4]]


def test_a_job_is_run_again_as_often_as_it_says_and_only_where_it_may_help() -> None:
    spec = JobSpec(executable="md", retries=2)
    assert [again(spec, "node_failure", attempt) for attempt in (1, 2, 3)] == [True, True, False]
    assert not again(JobSpec(executable="md"), "node_failure", 1)
    assert not any(again(spec, reason, 1) for reason in ("walltime", "out_of_memory", "rejected", "launch", "deadline"))
    assert all(again(spec, reason, 1) for reason in ("exit_code", "signal", "preempted", "lost"))


def test_the_delay_grows_and_stays_small_beside_what_is_left() -> None:
    assert [delay_s(tries, None) for tries in (1, 2, 3)] == [DELAY_FIRST_S, 2 * DELAY_FIRST_S, 4 * DELAY_FIRST_S]
    assert delay_s(10_000, None) == DELAY_S_MAX
    assert delay_s(10, 50.0) == 5.0
    assert delay_s(10, 0.1) == DELAY_FIRST_S
    assert delay_s(10, -5.0) == DELAY_S_MAX
