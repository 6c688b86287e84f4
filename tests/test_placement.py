"""Which site a job goes to, and why not to the others: pure."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from functions.outlook import JOBS, Outlook
from functions.placement import place, refused
from functions.sites import SILENT_S, awaited, shape_of
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
    ],
)
def test_a_site_that_can_never_run_a_job_is_rejected_with_the_reason(
    spec: JobSpec, fields: dict[str, Any], why: str
) -> None:
    found = place(spec, [site("lab", **fields)], NOW)
    assert (found.site, found.later) == (None, False)
    assert why in found.rejected["lab"]
    error = refused(spec, found)
    assert "no site can run md: lab: its jobs" in str(error) or "no site can run md: lab: it " in str(error)
    assert not error.retry
    assert error.hint.endswith("change what the job asks for.")
    beside = place(
        spec, [site("lab", **fields), site("other", nodes_total=None, gpus_total=None, containers=["x"])], NOW
    )
    assert beside.site == "other"
    assert why in beside.rejected["lab"]
    # Nor is it waited for where the other one is away.
    away = site("other", nodes_total=None, gpus_total=None, containers=["x"], at=NOW - 1000.0)
    assert place(spec, [site("lab", **fields), away], NOW) == ("other", {"lab": found.rejected["lab"]}, True)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"at": NOW - SILENT_S}, "it is unknown: its agent says nothing"),
        ({"status": "down", "detail": "slurmctld does not answer"}, "it is down: slurmctld does not answer"),
        ({"accepts": False}, "it takes no more jobs"),
    ],
)
def test_a_job_waits_at_a_site_that_takes_none_now_if_no_other_does(fields: dict[str, Any], why: str) -> None:
    lab = site("lab", **fields)
    assert place(job(), [lab], NOW) == ("lab", {}, True)
    assert place(job(), [lab, site("other", jobs_waiting=9)], NOW) == ("other", {"lab": why}, False)
    # At the one that was heard last; one whose allocation ends is the last choice of all.
    long_gone = site("gone", at=NOW - 500.0)
    assert place(job(), [long_gone, lab], NOW).site == "lab"
    assert place(job(), [long_gone, site("pilot", ends_at=NOW - 1.0), site("p2", accepts=False, ends_at=NOW)], NOW) == (
        "gone",
        {"pilot": "it is down: its allocation has ended", "p2": "it is down: its allocation has ended"},
        True,
    )


def test_a_site_for_which_no_agent_ever_spoke_is_nothing_to_a_job_that_does_not_name_it() -> None:
    typo = awaited("typo", NOW)
    assert place(job(), [typo], NOW) == (None, {}, False)
    assert refused(job(), place(job(), [typo], NOW)).retry
    assert place(job(sites=("typo",)), [typo], NOW) == ("typo", {}, True)
    # Of two that are named, the job waits at the one that is there.
    away = site("away", at=NOW - 1000.0)
    assert place(job(sites=("typo", "away")), [typo, away], NOW) == ("away", {"typo": "it is not known"}, True)


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


def test_a_pilot_takes_no_job_that_may_not_be_through_before_it_ends() -> None:
    short = site("pilot", ends_at=NOW + 300.0, duration_s=600.0)
    found = place(job(), [short, site("batch", jobs_waiting=3)], NOW)
    assert found.site == "batch"
    assert found.rejected == {"pilot": "it ends in 300 s, and the job may take longer"}
    # Where there is no other, it waits for one: but not if it names this one, for no time will be better.
    assert place(job(), [short], NOW) == ("pilot", {}, True)
    assert place(job(sites=("pilot",)), [short], NOW) == (None, found.rejected, False)
    assert place(job(attributes=JobAttributes(duration="4m")), [short], NOW).site == "pilot"
    assert place(job(), [short], NOW, None, runs(job(), pilot=(100.0, 200.0))).site == "pilot"


def test_a_job_is_not_sent_back_to_where_it_is_taken_away_from() -> None:
    here, there = site("here"), site("there", jobs_waiting=3)
    assert place(job(), [here, there], NOW, leaves={"here": "it ends"}) == ("there", {"here": "it ends"}, False)
    assert place(job(sites=("here",)), [here], NOW, leaves={"here": "it ends"}) == (None, {"here": "it ends"}, False)
    # A site that is named and away is waited for, which is told.
    away = place(job(sites=("here", "away")), [here], NOW, leaves={"here": "it ends"})
    assert away == ("away", {"here": "it ends"}, True)
