"""Batch jobs of a run as a gateway tells of them: in the view of the run, live, and when it is canceled."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import msgspec
from rich.table import Table

from functions.sites import SILENT_S
from gateway.live import all_subjects
from headrace import render
from headrace.joblog import JOB, SiteRecord
from headrace.model import JobView, RunRef
from headrace.wire import Invocation
from streams.log import Record
from streams.topology import job_subject
from tests.doors import Door
from tests.doubles import matches
from tests.test_gateway_live import reading
from tests.test_submitting import beginning, end_of, ended, job_of, submission, submit, succeed


def put(door: Door, records: list[Record]) -> None:
    for record in records:
        door.log.put(record.subject, record.body)


def first_of(door: Door, ref: RunRef) -> Invocation:
    return next(first for first in door.firsts() if first.run_id == ref.run_id)


def submitted(door: Door, ref: RunRef) -> Invocation:
    """Have the first function of a run submit a job, and its site take it."""
    _, records = succeed(submit(then="collect"), of=first_of(door, ref))
    put(door, records)
    job = job_of(records)
    put(door, [submission(job)])
    return job


async def view(door: Door, ref: RunRef) -> Any:
    status, said, _ = await door.ask("GET", f"/v1/runs/{ref.run_id}")
    assert status == 200
    return said


async def test_a_run_shows_its_jobs_apart_from_its_invocations(door: Door) -> None:
    ref = await door.trigger(json={})
    job = submitted(door, ref)
    said = await view(door, ref)
    assert [i["invocation_id"] for i in said["invocations"]] == [first_of(door, ref).invocation_id]
    (shown,) = said["jobs"]
    assert (shown["job_id"], shown["site"], shown["native_id"]) == (job.invocation_id, "lab", "42")
    assert shown["state"] == "queued"
    assert shown["submitted_at"].startswith("1970-01-01T00:16:50")
    assert (said["invocations_total"], said["jobs_total"]) == (1, 1)
    put(door, [beginning(job), *ended(job, end_of(job, "failed", "walltime"))[1]])
    (shown,) = (await view(door, ref))["jobs"]
    assert (shown["state"], shown["reason"], shown["error"]["kind"]) == ("failed", "walltime", "walltime")
    assert "longer than it may" in (await view(door, ref))["error"]["message"]


async def test_a_run_tells_why_its_job_waits(door: Door) -> None:
    ref = await door.trigger(json={})
    _, records = succeed(submit(then="collect"), of=first_of(door, ref))
    put(door, records)
    (shown,) = (await view(door, ref))["jobs"]
    assert (shown["state"], shown["why"]) == ("new", "it waits for site lab, which is not known")
    now = time.time()
    await door.tables.sites.put("lab", SiteRecord(name="lab", kind="slurm", at=now - SILENT_S, since=now))
    (shown,) = (await view(door, ref))["jobs"]
    assert shown["why"] == "it waits for site lab, which is unknown: its agent says nothing"
    assert "which is unknown" in text_of(render.jobs_table([msgspec.convert(shown, JobView)]))
    await door.tables.sites.put("lab", SiteRecord(name="lab", kind="slurm", at=now, since=now))
    assert (await view(door, ref))["jobs"][0]["why"] == ""
    await door.tables.sites.delete("lab")
    put(door, [submission(job_of(records))])
    assert (await view(door, ref))["jobs"][0]["why"] == ""  # it is at its batch system


def text_of(table: Table) -> str:
    file = io.StringIO()
    render.console(file).print(table)
    return file.getvalue()


async def test_what_becomes_of_a_job_is_told_live_as_events_of_its_own(door: Door) -> None:
    ref = await door.trigger(json={})
    async with reading(door, f"/v1/runs/{ref.run_id}/events") as client:
        job = submitted(door, ref)
        await client.until("job", state="new", site="lab")
        await client.until("job", state="queued", native_id="42")
        put(door, [beginning(job)])
        told = json.loads((await client.until("job", state="active")).data)
        assert (told["run_id"], told["job_id"]) == (ref.run_id, job.invocation_id)
        put(door, ended(job, end_of(job, "failed", "exit_code", exit_code=3))[1])
        found = await client.rest()
    assert [message.event for message in found if message.event] == ["job", "run"]
    last = json.loads(found[0].data)
    assert (last["state"], last["reason"], last["exit_code"]) == ("failed", "exit_code", 3)


async def test_the_stream_of_all_runs_tells_of_jobs_and_of_those_of_others_nothing(door: Door) -> None:
    assert any(matches(subject, job_subject("lab", "default", "r", "j")) for subject in all_subjects("default"))
    assert not any(matches(subject, job_subject("lab", "guest", "r", "j")) for subject in all_subjects("default"))
    async with reading(door, "/v1/stream") as client:
        ref = await door.trigger(json={})
        submitted(door, ref)
        assert json.loads((await client.until("job", state="queued")).data)["run_id"] == ref.run_id


async def test_the_jobs_of_a_canceled_run_are_canceled(door: Door) -> None:
    ref = await door.trigger(json={})
    submitted(door, ref)
    status, _, _ = await door.ask("POST", f"/v1/runs/{ref.run_id}/cancel")
    assert status == 202
    said = await view(door, ref)
    assert (said["state"], said["jobs"][0]["state"]) == ("canceled", "canceled")


async def test_a_run_that_failed_with_its_job_is_given_another_go_from_its_beginning(door: Door) -> None:
    ref = await door.trigger(json={})
    job = submitted(door, ref)
    put(door, ended(job, end_of(job, "failed", "node_failure"))[1])
    status, listed, _ = await door.ask("GET", "/v1/dead")
    assert status == 200
    (dead,) = listed["dead"]
    assert (dead["function"], dead["error"]["kind"]) == (JOB, "node_failure")
    status, said, _ = await door.ask("POST", f"/v1/dead/{dead['invocation_id']}/replay")
    assert status == 202, said
    again = door.firsts()[-1]
    assert (again.function, again.payload) == ("f", first_of(door, ref).payload)
