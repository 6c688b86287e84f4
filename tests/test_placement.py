"""Which site a job goes to, and why not to the others: pure."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from functions.outlook import JOBS, Outlook
from functions.placement import place, refused
from functions.sites import SILENT_S, shape_of
from headrace.joblog import SiteRecord
from headrace.jobs import JobAttributes, JobSpec, Resources
from headrace.wire import Expected, ForecastRow

NOW = 1000.0


def site(name: str, **fields: Any) -> SiteRecord:
    row = SiteRecord(name=name, kind="slurm", at=NOW, since=0.0, nodes_total=4, nodes_free=4, gpus_total=8, gpus_free=8)
    return structs.replace(row, **fields)


def job(gpus: int = 0, nodes: int = 1, sites: tuple[str, ...] = (), **fields: Any) -> JobSpec:
    needs = Resources(node_count=nodes, gpu_cores_per_process=gpus or None)
    return JobSpec(executable="md", resources=needs, sites=list(sites), **fields)


def waits(p50_s: float, p90_s: float) -> Expected:
    return Expected(p50_s, p90_s, p90_s, 100)


def runs(spec: JobSpec, **by_site: tuple[float, float]) -> Outlook:
    """Return what is expected of jobs like this one at some sites."""
    kinds = {f"run|{shape_of(spec)}|{name}|": waits(*expected) for name, expected in by_site.items()}
    rows = {JOBS: ForecastRow(function=JOBS, kinds=kinds, at=0.0)}
    return Outlook(rows.get)


def test_a_job_goes_where_it_starts_at_once() -> None:
    full = site("full", gpus_free=0, nodes_free=0, jobs_waiting=9, wait=waits(600.0, 900.0))
    found = place(job(gpus=1), [full, site("free")], NOW)
    assert found.site == "free"
    assert found.rejected == {"full": "free is expected sooner"}
    assert place(job(), [site("b"), site("a")], NOW).site == "a"  # the same wherever it is asked


@pytest.mark.parametrize(
    ("spec", "fields", "why"),
    [
        (job(gpus=16), {}, "it has 8 GPUs, and the job takes 16"),
        (job(nodes=5), {}, "it has 4 nodes, and the job takes 5"),
        (job(container="md.sif"), {}, "it has no program for containers"),
        (job(attributes=JobAttributes(duration="2h")), {"duration_max_s": 3600.0}, "its jobs run at most 3,600 s"),
        (job(), {"at": NOW - SILENT_S}, "it is unknown: its agent"),
        (job(), {"status": "down", "detail": "slurmctld does not answer"}, "it is down: slurmctld does not answer"),
        (job(), {"accepts": False}, "it takes no more jobs"),
    ],
)
def test_a_site_that_cannot_run_a_job_is_rejected_with_the_reason(
    spec: JobSpec, fields: dict[str, Any], why: str
) -> None:
    found = place(spec, [site("lab", **fields)], NOW)
    assert found.site is None
    assert why in found.rejected["lab"]
    error = refused(spec, found)
    assert "no site can run md: lab: its jobs" in str(error) or "no site can run md: lab: it " in str(error)
    assert error.retry == ("at" in fields or "status" in fields or "accepts" in fields)
    beside = place(
        spec, [site("lab", **fields), site("other", nodes_total=None, gpus_total=None, containers=["x"])], NOW
    )
    assert beside.site == "other"
    assert why in beside.rejected["lab"]


def test_only_the_sites_that_a_job_names_are_looked_at() -> None:
    assert place(job(sites=("b",)), [site("a"), site("b", jobs_waiting=5)], NOW).site == "b"


def test_a_named_site_that_is_not_there_now_is_waited_for_unless_another_named_one_is() -> None:
    away = site("away", at=NOW - 1000.0)
    assert place(job(sites=("nowhere",)), [], NOW).site == "nowhere"
    assert place(job(sites=("away",)), [away], NOW).site == "away"
    assert place(job(sites=("away", "here")), [away, site("here")], NOW).site == "here"
    # One that can never run it is not waited for.
    small = site("small", at=NOW - 1000.0, gpus_total=1)
    assert place(job(gpus=4, sites=("small",)), [small], NOW).site is None
    assert place(job(gpus=4, sites=("small", "away")), [small, away], NOW).site == "away"


def test_without_a_site_the_error_says_what_to_do() -> None:
    found = place(job(), [], NOW)
    assert found.site is None
    assert "headrace agent --site" in refused(job(), found).hint


def test_a_job_under_a_deadline_goes_where_it_is_in_time() -> None:
    spec = job()
    outlook = runs(spec, quick=(100.0, 900.0), steady=(200.0, 250.0))
    both = [site("quick"), site("steady")]
    assert place(spec, both, NOW, None, outlook).site == "quick"
    found = place(spec, both, NOW, NOW + 300.0, outlook)
    assert found == ("steady", {"quick": "the job would be late there"}, False)
    # Late everywhere, it is not refused: late work goes on, where it ends first.
    assert place(spec, both, NOW, NOW + 10.0, outlook).site == "quick"


def test_a_job_does_not_go_to_an_allocation_that_ends_before_it() -> None:
    spec = job()
    outlook = runs(spec, pilot=(100.0, 120.0), batch=(100.0, 120.0))
    queue = site("batch", jobs_waiting=3, wait=waits(30.0, 60.0))
    assert place(spec, [site("pilot", ends_at=NOW + 60.0), queue], NOW, None, outlook).site == "batch"
    assert place(spec, [site("pilot", ends_at=NOW + 600.0), queue], NOW, None, outlook).site == "pilot"
