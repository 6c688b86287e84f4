from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from functions.forecast import Forecasts, Kind
from functions.policies import POLICIES, policy
from functions.simulate import End, simulate
from infra.bench import sketches
from infra.bench.deadlines import calibration, dags, makespans, oracle, report, traces
from infra.bench.deadlines.dags import Dag, Task
from infra.bench.deadlines.traces import Job, Trace


def tiny(seed: int = 1, count: int = 150) -> Trace:
    rng = random.Random(seed)
    at = 0.0
    jobs = []
    for place in range(count):
        at += rng.expovariate(1.0)
        kind = Kind(f"f{place % 3}")
        jobs.append(Job(at, rng.lognormvariate(place % 3, 0.5), kind, "ab"[place % 2]))
    return Trace("tiny", "made here", jobs)


def test_a_deadline_is_met_by_what_ran_to_its_end_in_time() -> None:
    jobs = [Job(0.0, 5.0, Kind("f"), "a", 10.0), Job(1.0, 1.0, Kind("f"), "a", 3.0), Job(1.5, 1.0, Kind("f"), "a", 9.0)]
    ends = simulate(traces.pieces(jobs, on_late="continue"), 1, policy("fifo", 1))
    assert [end.at for end in ends] == [5.0, 6.0, 7.0]
    assert report.met(jobs, ends) == [True, False, True]
    assert report.met(jobs, [End("done", 10.0), End("late", 3.0), End("given_up", 2.0)]) == [True, False, False]


@pytest.mark.parametrize("name", POLICIES)
def test_every_order_runs_every_job_once_and_not_before_it_came(name: str) -> None:
    jobs = traces.with_deadlines(tiny(), slots=3, load=1.5).jobs
    ends = simulate(traces.pieces(jobs, on_late="continue"), 3, policy(name, 3))
    assert {end.ending for end in ends} == {"done"}
    assert all(end.at >= job.arrived + job.seconds - 1e-9 for job, end in zip(jobs, ends, strict=True))
    assert max(end.at for end in ends) >= sum(job.seconds for job in jobs) / 3


@pytest.mark.parametrize("load", [0.5, 1.2, 2.0])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_oracle_is_never_below_an_order_and_the_bound_never_below_the_oracle(load: float, seed: int) -> None:
    for row in report.both(tiny(seed), load, slots=3):
        top, bound = row.scores[report.ORACLE], row.scores[report.BOUND]
        assert all(score.plain <= top.plain + 1e-9 or name == report.BOUND for name, score in row.scores.items())
        assert all(score.weighted <= top.weighted + 1e-9 or name == report.BOUND for name, score in row.scores.items())
        assert top.plain <= bound.plain
        assert top.weighted <= bound.weighted


def test_the_bound_holds_by_itself_for_what_the_greedy_placed() -> None:
    for seed in range(5):
        jobs = traces.with_deadlines(tiny(seed), slots=2, load=2.0).jobs
        values = [job.value for job in jobs]
        found = oracle.placed(jobs, 2, values)
        reached = sum(value for value, one in zip(values, found, strict=True) if one) / sum(values)
        assert reached <= oracle.bound(jobs, 2, values) + 1e-9


def test_the_greedy_meets_what_fits_and_the_bound_knows_what_does_not() -> None:
    fits = [Job(0.0, 1.0, Kind("f"), "a", 2.0), Job(0.0, 1.0, Kind("f"), "a", 2.0)]
    assert oracle.placed(fits, 1, [1.0, 1.0]) == [True, True]
    assert oracle.bound(fits, 1, [1.0, 1.0]) == pytest.approx(1.0)
    tight = [Job(0.0, 1.0, Kind("f"), "a", 1.0), Job(0.0, 1.0, Kind("f"), "a", 1.0)]
    assert sum(oracle.placed(tight, 1, [1.0, 1.0])) == 1
    assert oracle.bound(tight, 1, [1.0, 1.0]) == pytest.approx(0.5)


def test_headrace_is_above_the_others_under_overload() -> None:
    for row in report.both(tiny(count=600), 2.0, slots=3):
        assert row.scores["Headrace"].plain > max(row.scores[name].plain for name in ("FIFO", "priority", "EDF"))


def test_the_same_input_gives_the_same_report_byte_for_byte() -> None:
    def made() -> str:
        graphs = [dags.twin(shape) for shape in dags.shapes() if shape.name.startswith(("sarek", "blast"))]
        trace = tiny()
        whole = report.Report(
            ["tiny"],
            report.SLOTS,
            list(report.rows([trace])),
            makespans.gains(graphs),
            {"tiny": calibration.of_trace(trace)},
        )
        return report.markdown(whole) + msgspec.json.encode(whole).decode()

    assert made() == made()


def test_a_twin_has_the_tasks_and_nearly_the_work_of_its_shape() -> None:
    for shape in dags.shapes():
        twin = dags.twin(shape)
        assert len(twin.tasks) == sum(category.count for category in shape.categories)
        assert all(parent < place for place, task in enumerate(twin.tasks) for parent in task.parents)
        again = dags.shape_of(twin)
        assert [one.count for one in again.categories] == [one.count for one in shape.categories]


def test_a_workflow_file_is_read_parents_first(tmp_path: Path) -> None:
    tasks = [
        {"name": "merge_1", "id": "merge_1", "parents": ["cut_1"], "children": [], "inputFiles": ["a"]},
        {"name": "cut_1", "id": "cut_1", "parents": [], "children": ["merge_1"]},
    ]
    body = {
        "workflow": {
            "specification": {"tasks": tasks, "files": [{"id": "a", "sizeInBytes": 1000}]},
            "execution": {"tasks": [{"id": "cut_1", "runtimeInSeconds": 2.5}, {"id": "merge_1"}]},
        }
    }
    (tmp_path / "one.json").write_bytes(msgspec.json.encode(body))
    found, _ = dags.read(tmp_path)
    assert found == [Dag("one", (Task("cut", 2.5, 0, ()), Task("merge", 0.0, 10, (0,))))]


def test_a_folder_without_workflows_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="WfCommons"):
        dags.read(tmp_path)


def test_the_longest_path_first_shortens_a_workflow() -> None:
    # Two short leaves come first in the file, a chain of three last: whoever starts with the leaves ends later.
    tasks = (*(Task("leaf", 2.0, 0, ()) for _ in range(2)), Task("chain", 2.0, 1, ()), Task("chain", 2.0, 1, (2,)))
    dag = Dag("fork", tasks)
    assert makespans.makespans("fifo", [dag], [0.0], 2, Forecasts()) == [6.0]
    assert makespans.makespans("headrace", [dag], [0.0], 2, makespans.learned([dag])) == [4.0]
    assert makespans.least(dag, 2) == 4.0


def test_the_traces_that_ship_are_complete() -> None:
    assert [len(trace.jobs) for trace in (traces.inference(), traces.pods())] == [8819, 5848]
    graphs, _ = dags.read(None)
    assert len(traces.alerts(graphs).jobs) == 508 * traces.FANOUT
    assert len(traces.helios().jobs) > 300


def test_load_is_the_work_over_what_the_slots_can_do() -> None:
    jobs = traces.with_deadlines(tiny(), slots=4, load=0.8).jobs
    assert sum(job.seconds for job in jobs) / (4 * jobs[-1].arrived) == pytest.approx(0.8)
    assert all(job.deadline > job.arrived for job in jobs)


def test_p90_covers_ninety_percent_of_a_trace() -> None:
    found = calibration.of_trace(tiny(count=3000))
    assert 0.87 <= found.p90 <= 0.93


def test_the_window_forgets_a_storm() -> None:
    assert sketches.storm(sketches.Window) < 30
