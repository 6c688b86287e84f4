"""How a site is, by its row and the time: status, incidents, waits."""

from __future__ import annotations

import pytest
from msgspec import structs

from functions.sites import (
    ENDED,
    GONE_S,
    INCIDENTS_MAX,
    SILENT,
    SILENT_S,
    UNHEARD,
    WAITS_MAX,
    WORK_FOLDER,
    Trouble,
    awaited,
    incidents,
    seen,
    shape_of,
    status,
    wait_of,
    waited,
    why_waits,
)
from headrace.joblog import SiteRecord
from headrace.jobs import JobAttributes, JobSpec, Resources
from headrace.model import SiteView
from infra import doctor
from streams.topology import STREAM, jobs_consumer


def look(at: float, **found: object) -> SiteRecord:
    """Return what an agent saw at an instant."""
    record = SiteRecord(name="lab", kind="slurm", at=at, since=at, nodes_total=4, nodes_free=4, gpus_total=16)
    return structs.replace(record, **found)


@pytest.mark.parametrize(
    ("found", "problem", "word", "why"),
    [
        ({}, "", "up", ""),
        ({"nodes_unusable": 1}, "", "degraded", "1 of its 4 nodes"),
        ({"nodes_unusable": 4}, "", "down", "none of its 4 nodes"),
        ({"queue_open": False}, "", "down", "queue"),
        ({"accepts": False}, "", "degraded", "no more jobs"),
        ({}, "squeue did not answer", "down", "squeue did not answer"),
        ({"nodes_total": None, "nodes_free": None, "gpus_total": None}, "", "up", ""),
    ],
)
def test_the_status_follows_from_what_was_seen(found: dict[str, object], problem: str, word: str, why: str) -> None:
    record = seen(look(100.0, **found), None, Trouble("down", problem) if problem else None)
    told, because = status(record, 100.0)
    assert told == word
    assert why in because
    assert bool(because) == (word != "up")
    assert [incident.status for incident in incidents(record, 100.0)] == ([] if word == "up" else [word])


def test_a_silent_agent_makes_its_site_unknown_and_then_down() -> None:
    record = seen(look(100.0), None)
    assert status(record, 100.0 + SILENT_S - 0.1)[0] == "up"
    assert status(record, 100.0 + SILENT_S)[0] == "unknown"
    assert status(record, 100.0 + GONE_S - 0.1)[0] == "unknown"
    assert status(record, 100.0 + GONE_S)[0] == "down"
    assert incidents(record, 100.0 + SILENT_S - 0.1) == []
    first, later = incidents(record, 100.0 + SILENT_S), incidents(record, 100.0 + GONE_S + 1000.0)
    assert [(i.status, i.began_at, i.ended_at) for i in first] == [("unknown", 100.0 + SILENT_S, None)]
    assert [(i.status, i.began_at, i.ended_at) for i in later] == [("down", 100.0 + SILENT_S, None)]
    assert first[0].id == later[0].id  # it is one and the same, whoever tells it and when


def test_an_agent_that_comes_back_ends_the_incident_of_its_silence_under_the_same_id() -> None:
    before = seen(look(100.0), None)
    told = incidents(before, 500.0)
    record = seen(look(500.0), before)
    (kept,) = incidents(record, 500.0)
    assert (kept.id, kept.began_at, kept.ended_at) == (told[0].id, 100.0 + SILENT_S, 500.0)
    assert status(record, 500.0)[0] == "up"
    assert record.since == 500.0


def test_one_time_of_trouble_is_one_incident_as_bad_as_the_worst_of_it() -> None:
    record = seen(look(0.0), None)
    for at, found in ((5.0, {"nodes_unusable": 1}), (10.0, {"queue_open": False}), (15.0, {"nodes_unusable": 1})):
        record = seen(look(at, **found), record)
    assert status(record, 15.0)[0] == "degraded"
    assert [(i.status, i.began_at, i.ended_at) for i in record.incidents] == [("down", 5.0, None)]
    record = seen(look(20.0), record)
    record = seen(look(25.0, queue_open=False), record)
    assert [(i.status, i.began_at, i.ended_at) for i in record.incidents] == [("down", 5.0, 20.0), ("down", 25.0, None)]


def test_since_is_when_the_status_began() -> None:
    record = seen(look(0.0), None)
    record = seen(look(5.0), record)
    assert record.since == 0.0
    record = seen(look(10.0, nodes_unusable=2), record)
    record = seen(look(15.0, nodes_unusable=1), record)
    assert (record.status, record.since) == ("degraded", 10.0)


def test_no_more_incidents_are_kept_than_the_newest() -> None:
    record = seen(look(0.0), None)
    for number in range(2 * INCIDENTS_MAX):
        record = seen(look(10.0 * number + 5.0, queue_open=False), record)
        record = seen(look(10.0 * number + 10.0), record)
    assert len(record.incidents) == INCIDENTS_MAX
    assert record.incidents[-1].began_at == 10.0 * (2 * INCIDENTS_MAX - 1) + 5.0


def test_a_site_in_an_allocation_is_down_when_that_has_ended() -> None:
    record = seen(look(100.0, ends_at=110.0), None)
    assert status(record, 109.9)[0] == "up"
    assert status(record, 110.0)[0] == "down"
    assert incidents(record, 110.0)[0].began_at == 110.0


def job(nodes: int, gpus: int, duration: str) -> JobSpec:
    return JobSpec(
        executable="x",
        resources=Resources(node_count=nodes, gpu_cores_per_process=gpus),
        attributes=JobAttributes(duration=duration),
    )


def test_jobs_of_a_shape_are_expected_to_wait_as_those_before_them() -> None:
    small, large = shape_of(job(1, 0, "5m")), shape_of(job(64, 4, "10h"))
    assert small != large
    record = seen(look(0.0), None)
    assert wait_of(record, small) is None
    for at in range(20):
        record = waited(record, small, 2.0, float(at))
        record = waited(record, large, 7200.0, float(at))
    own, other = wait_of(record, small), wait_of(record, large)
    assert own is not None
    assert other is not None
    assert own.p50_s == pytest.approx(2.0)
    assert other.p50_s == pytest.approx(7200.0)
    unseen = wait_of(record, shape_of(job(2, 0, "5m")))
    assert unseen == record.wait  # nothing is known of its kind: as of all others
    assert seen(look(100.0), record).wait == record.wait


def test_no_more_waits_are_kept_than_the_newest() -> None:
    record = seen(look(0.0), None)
    for at in range(WAITS_MAX + 10):
        record = structs.replace(record, waits=[*record.waits, *waited(record, "s", 1.0, float(at)).waits[-1:]])
    record = waited(record, "s", 1.0, 1000.0)
    assert len(record.waits) == WAITS_MAX
    assert record.waits[-1].at == 1000.0


@pytest.mark.parametrize(
    ("view", "state", "said"),
    [
        (SiteView(name="lab", kind="slurm", status="up", gpus={"total": 16, "free": 5}), "ok", "5 of 16 GPUs free"),
        (SiteView(name="lab", kind="slurm", status="up"), "ok", "lab (slurm) is up"),
        (SiteView(name="lab", kind="slurm", status="down", detail=SILENT), "warning", "headrace agent --site lab"),
        (SiteView(name="lab", kind="slurm", status="down", detail="no queue"), "warning", "is down: no queue"),
        (SiteView(name="typo", kind="", status="unknown", detail=UNHEARD), "warning", "headrace agent --site typo"),
        (SiteView(name="pilot", kind="local", status="down", detail=ENDED), "ok", "its allocation has ended"),
        (
            SiteView(name="lab", kind="slurm", status="down", detail=f"{WORK_FOLDER}: No space left on device"),
            "warning",
            "No space left on device Free some space there",
        ),
    ],
)
def test_the_doctor_tells_how_a_site_is_and_what_to_do(view: SiteView, state: str, said: str) -> None:
    found = doctor.site_finding(view)
    assert found.state == state
    assert said in f"{found.detail} {found.cure}"
    assert bool(found.cure) == (state != "ok")


def test_the_doctor_says_for_how_long_a_site_has_not_been_up() -> None:
    view = SiteView(name="lab", kind="slurm", status="down", detail=SILENT, gpus={"total": 12})
    found = doctor.site_finding(view, 90.0)
    assert (found.state, found.detail) == ("warning", "lab (slurm) is down, for 1 min 30 s: its agent says nothing")
    idle = doctor.site_finding(SiteView(name="here", kind="local", status="up", gpus={"total": 0, "free": 0}))
    assert idle.detail == "here (local) is up"
    found = doctor.site_finding(view, 4 * 3600.0)
    assert found.state == "failed"
    assert "for 4 h 0 min" in found.detail
    assert "headrace site remove lab" in found.cure


def test_the_doctor_names_the_sites_for_which_jobs_wait_and_no_agent_asks() -> None:
    consumers = [
        {"name": jobs_consumer("away", "a"), "num_pending": 2, "num_ack_pending": 1, "num_waiting": 0},
        {"name": jobs_consumer("away", "b"), "num_pending": 1},
        {"name": jobs_consumer("busy", "a"), "num_pending": 5, "num_waiting": 1},
        {"name": jobs_consumer("idle", "a"), "num_pending": 0},
        {"name": "work-3-a", "num_pending": 7},
    ]
    state = {"account_details": [{"stream_detail": [{"name": STREAM, "consumer_detail": consumers}]}]}
    (found,) = doctor._jobs(state)
    assert (found.state, found.detail) == ("warning", "4 wait for away, and no agent asks for them")


def test_why_a_job_waits_is_told_where_its_site_does_not_take_it() -> None:
    assert why_waits("typo", None, 0.0) == "it waits for site typo, which is not known"
    assert why_waits("typo", awaited("typo", 0.0), 9999.0) == "it waits for site typo, which is not known"
    lab = SiteRecord(name="lab", kind="slurm", at=0.0, since=0.0)
    assert why_waits("lab", lab, 0.0) == ""
    assert why_waits("lab", lab, SILENT_S) == "it waits for site lab, which is unknown: its agent says nothing"
    assert (
        why_waits("lab", structs.replace(lab, accepts=False), 0.0) == "it waits for site lab, which takes no more jobs"
    )
