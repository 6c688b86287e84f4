"""Jobs on a real Slurm while everything fails, in small; and what counts them, which has to find what is planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.jobs import JobEnd
from headrace.model import EventView, InvocationView, JobView, Links, Quote, RunView, TimeLedger
from infra.chaos import batch, natives, submitted
from infra.chaos.natives import Found
from infra.chaos.trial import Trial

SCALE = 0.06


class Records:
    """What is there to be counted, put together by hand; everything is right until it is spoilt."""

    def __init__(self) -> None:
        self.views: list[RunView] = []
        self.native: dict[str, str] = {}
        self.open: list[str] = []
        self.programs: list[str] = []
        self.ends: dict[str, list[JobEnd]] = {}

    def ran(self, run: str, route: str = "simulated", state: str = "completed", reason: str = "", code: int = 0) -> str:
        """Let one run submit a job that ends so and is followed, and return the job."""
        job, native = f"{run}-job", str(len(self.native) + 1)
        follower = InvocationView(
            invocation_id=f"{run}-after",
            parent_id=job,
            function="went_well",
            version="1",
            state="succeeded",
            attempts=1,
            queued_at=None,
        )
        self.views.append(view(run, route, [JobView(job_id=job, site="lab", native_id=native, state="completed")]))
        self.views[-1].invocations.append(follower)
        self.native[native] = f"hr-{job}-1"
        self.programs.append(f"{job}-1")
        self.ends[job] = [
            msgspec.convert({"job_id": job, "site": "lab", "state": state, "reason": reason, "exit_code": code}, JobEnd)
        ]
        return job

    def count(self) -> Found:
        return natives.count(self.views, self.native, self.open, self.programs, self.ends)


def view(run: str, route: str, jobs: list[JobView], **changes: Any) -> RunView:
    made = RunView(
        run_id=run,
        route=route,
        function=route,
        tenant="default",
        event=EventView(id="1", source="/s", type="t"),
        state="succeeded",
        deadline=None,
        deadline_met=None,
        accepted_at="2026-01-01T00:00:00.000000Z",
        answered_at=None,
        ended_at=None,
        time_to_solution_s=None,
        time_ledger=TimeLedger(),
        quote=Quote(),
        invocations=[],
        invocations_total=0,
        jobs=jobs,
        error=None,
        links=Links(self="/", result="/", events="/"),
    )
    return msgspec.structs.replace(made, **changes)


@pytest.fixture
def records() -> Records:
    made = Records()
    made.ran("r1")
    made.ran("r2", "exiting", "failed", "exit_code", submitted.EXIT_CODE)
    made.ran("r3", "outlasting", "failed", "walltime", 143)
    made.ran("r4", "simulated", "failed", "node_failure", 1)
    return made


def test_nothing_is_found_where_nothing_is_wrong(records: Records) -> None:
    found = records.count()
    assert (found.good, found.wrong) == (True, [])
    assert (found.jobs, found.once, found.followed_once) == (4, 4, 4)
    assert found.reasons == {"completed": 1, "exit_code": 1, "walltime": 1, "node_failure": 1}


def test_a_job_that_slurm_never_had_is_found(records: Records) -> None:
    del records.native["1"]
    records.programs.remove("r1-job-1")
    found = records.count()
    assert (found.good, found.never, found.untrue) == (False, 1, 1)  # nor can it have completed


def test_a_run_that_never_submitted_is_found(records: Records) -> None:
    records.views.append(view("r5", "simulated", []))
    assert records.count().never == 1
    records.views[-1] = view("r5", "unwanted", [], state="canceled")
    assert records.count().good


@pytest.mark.parametrize("name", ["hr-r1-job-1", "hr-r1-job-2", "hr-r1-job"])
def test_a_job_that_slurm_had_twice_is_found(records: Records, name: str) -> None:
    records.native["9"] = name
    found = records.count()
    assert (found.good, found.twice, found.native) == (False, 1, 5)


def test_a_job_of_nobody_is_found_and_those_of_others_are_left_alone(records: Records) -> None:
    records.native["9"] = "filler"
    assert records.count().good
    records.native["10"] = "hr-r9-job-1"
    assert records.count().strangers == 1


def test_a_program_that_ran_twice_is_found(records: Records) -> None:
    records.programs.append("r1-job-1")
    assert records.count().programs_twice == 1


def test_a_job_that_is_left_behind_is_found(records: Records) -> None:
    canceled = records.views[0]
    records.views[0] = msgspec.structs.replace(canceled, state="canceled", invocations=[])
    records.ends.pop("r1-job")
    assert records.count().good
    records.open.append("1")
    assert records.count().open == 1


def test_a_follow_up_that_is_missing_or_there_twice_is_found(records: Records) -> None:
    records.views[0].invocations.append(records.views[0].invocations[0])
    assert (records.count().good, records.count().followed_once) == (False, 3)
    records.views[0].invocations.clear()
    assert (records.count().good, records.count().followed_once) == (False, 3)


def test_a_follow_up_that_ran_once_in_the_log_and_twice_outside_is_found(records: Records) -> None:
    records.ends["r1-job"].append(records.ends["r1-job"][0])
    assert not records.count().good


@pytest.mark.parametrize(
    ("job", "change"),
    [
        ("r1-job", {"reason": "walltime", "state": "failed"}),
        ("r2-job", {"reason": "", "state": "completed"}),
        ("r2-job", {"exit_code": 1}),
        ("r3-job", {"reason": "canceled", "state": "canceled"}),
    ],
)
def test_a_follow_up_that_was_told_what_cannot_be_is_found(records: Records, job: str, change: dict[str, Any]) -> None:
    records.ends[job] = [msgspec.structs.replace(records.ends[job][0], **change)]
    assert (records.count().good, records.count().untrue) == (False, 1)


async def test_every_job_is_submitted_once_and_followed_once(tmp_path: Path) -> None:
    if reason := batch.slurm_missing():
        pytest.skip(reason)
    result = await batch.CASE.run(Trial(tmp_path, seed=5, scale=SCALE))
    assert result.verdict is not None
    assert {kind: what for kind, what in result.verdict.named.items() if what} == {}
    assert {figure.name: figure.value for figure in result.figures if figure.good is False} == {}
    assert result.kills > 0
