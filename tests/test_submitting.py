"""Batch jobs as a part of the log: what asks for them, what ends them, and what is told of them. Pure."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec import structs

from functions import effects, jobs
from functions.jobs import JobTried
from functions.lessons import Lessons
from functions.outcomes import Attempted, World
from functions.outlook import JOBS, Outlook
from functions.scopes import Fill, Scope, tally
from functions.sites import shape_of
from gateway.story import events_of
from headrace.errors import UserError
from headrace.joblog import JOB, SiteRecord, Submitted
from headrace.jobs import JobEnd, JobSpec, Reason
from headrace.model import ErrorInfo, FunctionOptions, JobState, TimeLedger
from headrace.wire import (
    NOTHING,
    SPREADER,
    Call,
    Effect,
    FunctionRecord,
    Invocation,
    Outcome,
    Payload,
    Spread,
    Started,
    Submit,
    SubmitMany,
    decode,
    encode,
)
from streams.audit import examine, read
from streams.log import Record
from streams.record import InvocationRecord, RunRecord, fold_run, view
from streams.stored import Stored
from streams.topology import JobsOf, fence_subject, job_subject, kind_of, start_subject, submit_subject
from tests.stories import stored, teach, trigger

KNOWN = {
    name: FunctionRecord(name=name, version="v1", options=FunctionOptions(), code_blob="b", registered_at=0.0)
    for name in ("collect", "mourn")
}
AT_LAB = JobsOf("lab", "default")
SITES = [SiteRecord(name="lab", kind="slurm", at=1000.0, since=0.0, gpus_total=8)]
WORLD = World(function=KNOWN.get, routes=[], now=1005.0, sites=SITES)
TRIED = Attempted(attempt=1, worker="w", queued_at=1001.0, started_at=1002.0, ended_at=1004.0)
ROOT = structs.replace(trigger("1").invocation, function="prepare")
AT_SITE = JobTried(
    attempt=1,
    agent="agent/lab/1",
    queued_at=1005.0,
    submitted_at=1010.0,
    started_at=1030.0,
    job_ended_at=1130.0,
    ended_at=1140.0,
    stage_in_s=3.0,
    stage_out_s=8.0,
    fence=17,
)


def spec(name: str = "md", **fields: Any) -> Payload:
    body = msgspec.json.encode(JobSpec(executable=name, **fields))
    return Payload(body=body, size=len(body))


def submit(**fields: Any) -> Submit:
    return Submit(spec=spec(), **fields)


def succeed(
    *asked: Effect | jobs.Jobs, of: Invocation = ROOT, kept: dict[int, Payload] | None = None, world: World = WORLD
) -> tuple[Outcome, list[Record]]:
    return effects.succeed(of, TRIED, result=NOTHING, answer=None, effects=asked, kept=kept or {}, world=world)


def job_of(records: list[Record]) -> Invocation:
    (found,) = [decode(r.body, Invocation) for r in records if kind_of(r.subject) == "job"]
    return found


def submission(job: Invocation, native_id: str = "42") -> Record:
    """Return the record with which a site has a job."""
    run, identity = job.run_id, job.invocation_id
    fact = Submitted(
        run_id=run, invocation_id=identity, site="lab", attempt=1, native_id=native_id, at=1010.0, agent="agent/lab/1"
    )
    return Record(submit_subject(run, identity, 1, "lab"), encode(fact))


def beginning(job: Invocation) -> Record:
    """Return the record with which a job runs."""
    fact = Started(
        run_id=job.run_id,
        invocation_id=job.invocation_id,
        function=JOB,
        version="",
        worker="agent/lab/1",
        attempt=1,
        queued_at=1005.0,
        started_at=1030.0,
        parent_id=job.parent_id,
    )
    return Record(start_subject(job.run_id, job.invocation_id, 1), encode(fact))


def end_of(job: Invocation, state: JobState = "completed", reason: Reason = "", **fields: Any) -> JobEnd:
    return JobEnd(
        job_id=job.invocation_id,
        site="lab",
        state=state,
        reason=reason,
        time_s=jobs.times(AT_SITE),
        native_id="42",
        **fields,
    )


def ended(job: Invocation, end: JobEnd, tried: JobTried = AT_SITE) -> tuple[Outcome, list[Record]]:
    return jobs.ended(job, end, tried, WORLD, jobs.told(end))


# ---------------------------------------------------------------- asking for jobs


def test_a_job_is_work_for_the_agent_of_its_site_and_holds_what_follows_it() -> None:
    outcome, records = succeed(submit(then="collect", on_failure="mourn"))
    job = job_of(records)
    assert records[0].subject == job_subject("lab", "default", ROOT.run_id, job.invocation_id)
    assert (job.function, job.parent_id, job.slot) == (JOB, ROOT.invocation_id, None)
    work = jobs.read_job(job)
    assert jobs.spec_of(work.spec).executable == "md"
    assert (work.site, work.then, work.then_version) == ("lab", "collect", "v1")
    assert (work.on_failure, work.on_failure_version) == ("mourn", "v1")
    assert (outcome.children, outcome.jobs, outcome.end) == (1, 1, None)


def test_the_same_job_has_the_same_id_whatever_is_done_twice() -> None:
    assert job_of(succeed(submit())[1]).invocation_id == job_of(succeed(submit())[1]).invocation_id


@pytest.mark.parametrize(
    ("effect", "told"),
    [
        (submit(then="nothing"), "submit(then=...): no function named nothing"),
        (submit(on_failure="nothing"), "submit(on_failure=...): no function named nothing"),
        (SubmitMany(specs=[], then="nothing"), "submit_many(then=...): no function named nothing"),
        (Submit(spec=Payload(body=b'{"executable": ""}')), "executable is empty"),
        (Submit(spec=Payload(body=b"{}")), "executable"),
        (Submit(spec=spec(container="a.sif")), "lab: it has no program for containers"),
    ],
)
def test_what_cannot_be_submitted_is_an_error_of_the_function_that_asks(effect: Effect, told: str) -> None:
    with pytest.raises(UserError) as raised:
        succeed(effect)
    assert told in str(raised.value)
    assert not raised.value.retry


def test_many_jobs_share_a_scope_and_the_join_gets_their_ends_in_order() -> None:
    outcome, records = succeed(SubmitMany(specs=[spec("a"), spec("b")], then="collect", on_failure="mourn"))
    members = [decode(r.body, Invocation) for r in records[:-1]]
    assert [jobs.spec_of(jobs.read_job(m).spec).executable for m in members] == ["a", "b"]
    assert [m.slot.index for m in members if m.slot is not None] == [0, 1]
    assert {jobs.read_job(m).then for m in members} == {None}
    assert {jobs.read_job(m).on_failure for m in members} == {"mourn"}
    assert (outcome.children, outcome.jobs) == (2, 2)

    scope = Scope(size=2)
    units: list[Record] = []
    for seq, member in enumerate(members, 20):
        done, unit = ended(member, end_of(member))
        assert len(unit) == 1
        assert done.slot is not None
        made = tally(scope, [Fill(slot=done.slot, outcome=done, seq=seq, at=0.0, failed=False)], 1200.0)
        assert made is not None
        scope.take(made[0], seq + 10)
        units = made[1]
    join = decode(units[0].body, Invocation)
    assert (join.function, join.version, join.slot) == ("collect", "v1", None)


def test_no_jobs_at_all_start_the_join_with_an_empty_list() -> None:
    outcome, records = succeed(SubmitMany(specs=[], then="collect"))
    (join,) = [decode(r.body, Invocation) for r in records if kind_of(r.subject) == "work"]
    assert (join.function, join.payload.body, outcome.jobs) == ("collect", b"[]", 0)


def test_an_ensemble_of_a_thousand_is_started_in_parts() -> None:
    many = SubmitMany(specs=[spec("md", arguments=[str(i)]) for i in range(1000)], then="collect")
    asked = jobs.placed([many], ROOT, WORLD)
    (payloads,) = effects.large_maps(asked).values()
    outcome, records = succeed(*asked, kept={0: Payload(blob="c" * 64, size=9)})
    parts = [decode(r.body, Invocation) for r in records[:-1]]
    assert {p.function for p in parts} == {SPREADER}
    assert (outcome.jobs, sum(1 for r in records if kind_of(r.subject) == "job")) == (0, 0)
    subjects, started = [], []
    for part in parts:
        work = decode(part.payload.body, Spread)
        unit = effects.spread(part, TRIED, work, payloads, WORLD)
        spreading = decode(unit[-1].body, Outcome)
        assert spreading.jobs == spreading.children == work.last - work.first
        subjects += [r.subject for r in unit[:-1]]
        started += [decode(r.body, Invocation) for r in unit[:-1]]
    assert len(set(subjects)) == 1000
    assert {s.rsplit(".", 2)[0] for s in subjects} == {"hr.job.lab.default"}
    assert [jobs.spec_of(jobs.read_job(job).spec).arguments for job in started] == [[str(i)] for i in range(1000)]
    assert {job.slot.size for job in started if job.slot is not None} == {1000}


def test_a_job_beside_a_call_is_a_branch_of_its_own() -> None:
    _, records = succeed(submit(then="collect"), Call(function="mourn", payload=NOTHING))
    job = job_of(records)
    assert job.slot is not None
    assert (job.slot.index, job.slot.size) == (0, 2)
    _, unit = ended(job, end_of(job))
    assert decode(unit[0].body, Invocation).slot == job.slot  # what follows fills the place


# ---------------------------------------------------------------- the end of a job


def test_a_completed_job_starts_then_in_its_place_in_one_guarded_unit() -> None:
    job = job_of(succeed(submit(then="collect", on_failure="mourn"))[1])
    end = end_of(job, outputs={"e": "blob:1"}, exit_code=0)
    outcome, unit = ended(job, end)
    follow_up = decode(unit[0].body, Invocation)
    assert (follow_up.function, follow_up.version, follow_up.parent_id) == ("collect", "v1", job.invocation_id)
    assert msgspec.json.decode(follow_up.payload.body, type=JobEnd) == end
    assert (follow_up.deadline, follow_up.tenant, follow_up.slot) == (job.deadline, job.tenant, job.slot)
    assert follow_up.trail[-1].function == "prepare"
    assert (unit[-1].absent, unit[-1].expected) == (fence_subject(job.run_id, job.invocation_id), 17)
    assert (outcome.state, outcome.children, outcome.end) == ("succeeded", 1, None)
    assert outcome.job is not None
    assert (outcome.job.native_id, outcome.job.state) == ("42", "completed")
    assert ended(job, end)[1] == unit  # who does it twice does the same


def test_a_job_that_nothing_follows_ends_its_run_with_its_end_as_the_answer() -> None:
    job = job_of(succeed(submit())[1])
    outcome, unit = ended(job, end_of(job))
    assert len(unit) == 1
    assert outcome.end is not None
    assert (outcome.end.state, outcome.end.answer_id) == ("succeeded", job.invocation_id)
    assert outcome.result is not None
    assert msgspec.json.decode(outcome.result.body)["site"] == "lab"


@pytest.mark.parametrize(("state", "reason"), [("failed", "out_of_memory"), ("canceled", "canceled")])
def test_a_job_that_did_not_complete_starts_on_failure_and_nothing_has_died(state: JobState, reason: Reason) -> None:
    job = job_of(succeed(submit(then="collect", on_failure="mourn"))[1])
    outcome, unit = ended(job, end_of(job, state, reason))
    follow_up = decode(unit[0].body, Invocation)
    assert follow_up.function == "mourn"
    assert msgspec.json.decode(follow_up.payload.body)["reason"] == reason
    assert (outcome.state, outcome.error, outcome.end) == ("failed", None, None)


def test_a_failed_job_that_nobody_takes_care_of_is_given_up_on_and_its_run_says_why() -> None:
    job = job_of(succeed(submit(then="collect"))[1])
    lines = "\n".join(f"line {i}" for i in range(100))
    end = end_of(job, "failed", "exit_code", exit_code=3, last_lines=lines, detail="NonZeroExitCode")
    outcome, unit = ended(job, end)
    assert len(unit) == 1
    assert outcome.state == "dead"
    assert outcome.error is not None
    assert outcome.error.kind == "exit_code"
    for told in (job.invocation_id, "(42)", "at lab failed with exit code 3", "NonZeroExitCode", "line 80", "line 99"):
        assert told in outcome.error.message
    assert "line 79" not in outcome.error.message
    assert outcome.end is not None
    assert (outcome.end.state, outcome.end.error) == ("failed", outcome.error)


def test_a_job_that_is_too_late_is_canceled_with_its_run() -> None:
    job = job_of(succeed(submit(then="collect"))[1])
    late = ErrorInfo(kind="deadline", message="the deadline has passed")
    outcome, _ = jobs.canceled(job, end_of(job, "canceled", "canceled"), AT_SITE, late)
    assert outcome.state == "canceled"
    assert outcome.end is not None
    assert outcome.end.state == "canceled"


# ---------------------------------------------------------------- where the time went


def test_the_parts_of_a_jobs_time_sum_to_the_whole() -> None:
    job = job_of(succeed(submit(then="collect"))[1])
    outcome, _ = ended(job, end_of(job))
    own = outcome.spent
    before = job.spent
    assert own.queue_s - before.queue_s == 20.0
    assert own.run_s - before.run_s == 100.0
    assert own.stage_in_s - before.stage_in_s == 3.0
    assert own.stage_out_s - before.stage_out_s == 8.0
    assert own.lane_s - before.lane_s == 2.0  # until its agent took it
    assert own.total_s() == pytest.approx(AT_SITE.ended_at - ROOT.accepted_at)
    assert jobs.times(AT_SITE).queue == 20.0
    assert jobs.times(AT_SITE).run == 100.0


@pytest.mark.parametrize(
    "tried",
    [
        structs.replace(AT_SITE, submitted_at=None, started_at=None, job_ended_at=None),
        structs.replace(AT_SITE, started_at=None),
        structs.replace(AT_SITE, started_at=None, job_ended_at=None),
        structs.replace(AT_SITE, started_at=900.0, job_ended_at=5000.0),  # the clock of the site is off
        structs.replace(AT_SITE, submitted_at=900.0, stage_in_s=99.0, stage_out_s=99.0),
        structs.replace(AT_SITE, ended_at=900.0),
    ],
)
def test_no_part_is_negative_and_none_is_lost_whatever_the_clocks_say(tried: JobTried) -> None:
    job = structs.replace(job_of(succeed(submit())[1]), spent=TimeLedger(), sent_at=1005.0)
    spent = jobs.spent(job, tried)
    parts = msgspec.structs.asdict(spent).values()
    assert all(part >= 0.0 for part in parts)
    assert sum(parts) == pytest.approx(max(0.0, tried.ended_at - tried.queued_at))


def test_how_long_jobs_of_a_shape_run_at_a_site_is_learned_from_those_that_completed() -> None:
    lessons = Lessons()
    for event in range(5):
        first = trigger(str(event))
        records = succeed(submit(then="collect"), of=first.invocation)[1]
        job = job_of(records)
        teach(lessons, stored([first.record, *records, *ended(job, end_of(job))[1]]))
        bad = ended(job, end_of(job, "failed", "walltime"), structs.replace(AT_SITE, job_ended_at=9000.0, ended_at=9e3))
        teach(lessons, stored([first.record, *records, *bad[1]]))
    row = lessons.tell(JOBS, 2000.0, None)
    assert row is not None
    shape = shape_of(JobSpec(executable="md"))
    known = Outlook({JOBS: row}.get).of("run", JOBS, shape, site="lab")
    assert known is not None
    assert known.p50_s == pytest.approx(100.0)
    assert known.observations == 5
    assert f"run|{shape}|elsewhere|" not in row.kinds


# ---------------------------------------------------------------- what is told of it


def story(*, until: str = "", end: JobEnd | None = None) -> tuple[RunRecord, list[InvocationRecord], list[Stored]]:
    """Fold a run with one job, up to the fact of this kind."""
    first = trigger("1")
    _, records = succeed(submit(then="collect"), of=first.invocation)
    job = job_of(records)
    facts = [
        first.record,
        *records,
        submission(job),
        beginning(job),
        *ended(job, end or end_of(job, exit_code=0))[1],
    ]
    for number, fact in enumerate(facts):
        if kind_of(fact.subject) == until:
            facts = facts[: number + 1]
            break
    found = stored(facts)
    folded = fold_run(found)
    assert folded is not None
    return *folded, found


@pytest.mark.parametrize(
    ("until", "state", "native_id"),
    [("job", "new", None), ("submit", "queued", "42"), ("start", "active", "42"), ("", "completed", "42")],
)
def test_a_run_shows_its_job_once_and_in_the_state_that_it_is_in(until: str, state: str, native_id: str | None) -> None:
    record, invocations, facts = story(until=until)
    shown = view(record, invocations)
    (job,) = shown.jobs
    assert (job.site, job.state, job.native_id) == ("lab", state, native_id)
    assert job.job_id not in [i.invocation_id for i in shown.invocations]
    assert "job" in [name for name, _ in events_of(facts[-2 if until == "" else -1])] or until == ""
    if until != "job":
        assert (shown.invocations_total, shown.jobs_total) == ((2, 1) if until == "" else (1, 1))
    if until == "":
        assert (job.exit_code, job.submitted_at is not None, job.started_at is not None) == (0, True, True)
        assert job.ended_at is not None
        told = events_of(facts[-1])
        assert [name for name, _ in told] == ["job"]
        assert told[0][1]["state"] == "completed"


def test_a_job_that_was_left_behind_by_a_run_that_ended_is_shown_as_canceled() -> None:
    record, invocations, _ = story(until="submit")
    (job,) = view(structs.replace(record, state="canceled"), invocations).jobs
    assert job.state == "canceled"


def test_a_job_that_waits_again_after_a_failed_attempt_is_folded_alike_in_whole_and_in_part() -> None:
    _, _, facts = story(until="start")
    again = next(f for f in facts if kind_of(f.subject) == "job")
    whole = [*facts, Stored(99, again.subject, again.body, 1200.0)]
    last_of_each = sorted({f.subject: f for f in whole}.values(), key=lambda f: f.seq)
    for found in (whole, last_of_each):
        folded = fold_run(found)
        assert folded is not None
        (job,) = view(*folded).jobs
        assert (job.site, job.native_id, job.parent_id) == ("lab", "42", ROOT.invocation_id)


# ---------------------------------------------------------------- is it on its way?


def test_a_job_is_on_its_way_from_its_submission_to_its_end() -> None:
    def verdict(floor: int, until: str, *more: Stored) -> str:
        _, _, facts = story(until=until)
        lanes = {place: 99 for _, place, _ in read(facts).work}
        return examine(read([*facts, *more]), {**lanes, AT_LAB: floor})

    _, _, facts = story()
    waiting = next(f for f in facts if kind_of(f.subject) == "job")
    assert verdict(0, "done") == "on_its_way"  # nobody has taken it
    assert verdict(99, "submit") == "on_its_way"  # the batch system has it
    assert verdict(99, "done") == "lost"  # acknowledged without a submission
    again = Stored(50, waiting.subject, waiting.body, 1200.0)
    assert verdict(0, "submit", again) == "on_its_way"
    assert verdict(99, "submit", again) == "lost"  # it had to be submitted once more, and was not
    site_away = examine(read(story(until="done")[2]), {})
    assert site_away == "on_its_way"


def test_a_job_that_has_ended_is_not_on_its_way_any_more() -> None:
    _, _, facts = story()
    heard = [f for f in facts if kind_of(f.subject) != "start"]
    floors = {place: 99 for _, place, _ in read(heard).work}
    follow_up = next(f for f in heard[1:] if kind_of(f.subject) == "work")
    assert examine(read(heard), {**floors, AT_LAB: 99}) == "lost"  # acknowledged, and nobody runs what follows the job
    assert examine(read([f for f in heard if f is not follow_up]), {**floors, AT_LAB: 99}) == "stuck"
