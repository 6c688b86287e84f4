"""The promise, tried from outside, in small; and the judge of the trials, which has to find what is planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.model import ErrorInfo, InvocationState
from headrace.wire import JSON, Cancel, EventMeta, Invocation, Lease, Outcome, Payload, RunEnd, Tally, encode
from infra.chaos import kills, lines, pauses, poisoned, report, wipe
from infra.chaos.cases import CASES
from infra.chaos.driver import fate
from infra.chaos.judge import Effect, Judge, read_effects
from infra.chaos.lines import Answered, Plan, Read, Reply, Result, Shown, Verdict
from infra.chaos.nemesis import steps_of
from infra.chaos.trial import Case, Trial
from streams.stored import Stored
from streams.topology import cancel_subject, done_subject, end_subject, lease_subject, tally_subject, work_subject


class World:
    """A log, a driver's log and a ledger of effects, put together by hand; everything is right until it is spoilt."""

    def __init__(self) -> None:
        self.facts: list[Stored] = []
        self.lines: list[lines.DriverLine] = []
        self.effects: list[Effect] = []

    def store(self, subject: str, body: msgspec.Struct) -> None:
        seq = len(self.facts) + 1
        self.facts.append(Stored(seq, subject, encode(body), float(seq)))

    def reply(self, name: str, run: str, answered: Answered = "accepted", status: int = 202) -> None:
        self.lines.append(
            Reply(
                id=name,
                route="instant",
                attempt=1,
                at=0.0,
                due_s=0.0,
                sent_s=0.0,
                took_s=0.0,
                status=status,
                answered=answered,
                run=run if answered == "accepted" else "",
            )
        )

    def work(self, run: str, name: str, invocation: str = "i", parent: str | None = None) -> None:
        event = EventMeta(id=name, source="/v1/triggers/instant", type="t")
        self.store(
            work_subject(3, "default", run, invocation),
            Invocation(
                run_id=run,
                invocation_id=invocation,
                function="instant",
                version="1",
                route="instant",
                tenant="default",
                payload=Payload(),
                accepted_at=0.0,
                sent_at=0.0,
                deadline=1000.0,
                parent_id=parent,
                event=event if parent is None else None,
            ),
        )

    def done(self, run: str, name: str, invocation: str = "i", *, attempts: int = 1, **more: Any) -> None:
        state: InvocationState = more.pop("state", "succeeded")
        ended = RunEnd(run_id=run, state="succeeded" if state == "succeeded" else "failed", answer_id=invocation)
        body = msgspec.json.encode(name)
        self.store(
            done_subject(run, invocation),
            Outcome(
                run_id=run,
                invocation_id=invocation,
                function="instant",
                version="1",
                route="instant",
                tenant="default",
                state=state,
                attempts=attempts,
                queued_at=0.0,
                started_at=0.0,
                ended_at=0.0,
                worker="w",
                accepted_at=0.0,
                result=Payload(type=JSON, body=body, size=len(body)),
                end=more.pop("end", ended),
                **more,
            ),
        )

    def effect(self, run: str, name: str, invocation: str = "i", attempt: int = 1) -> None:
        self.effects.append(Effect(run, invocation, attempt, name))

    def good(self, run: str, name: str) -> None:
        """Let one trigger be accepted, run, and end."""
        self.reply(name, run)
        self.work(run, name)
        self.effect(run, name)
        self.done(run, name)

    def verdict(self) -> Verdict:
        judge = Judge()
        judge.heard(self.lines)
        judge.stored(self.facts)
        judge.happened(self.effects)
        return judge.verdict()


@pytest.fixture
def world() -> World:
    """A world in which two triggers went well."""
    made = World()
    made.good("r1", "load-1")
    made.good("r2", "load-2")
    return made


def counts(verdict: Verdict) -> dict[str, int]:
    return {kind: n for kind in ("lost", "doubled", "ghost", "wrong") if (n := getattr(verdict, kind))}


def test_nothing_is_found_where_nothing_is_wrong(world: World) -> None:
    world.lines.append(Shown(run="r1", at=0.0, state="succeeded", deadline_met=True))
    world.lines.append(Shown(run="r2", at=0.0, state="succeeded", deadline_met=True))
    verdict = world.verdict()
    assert verdict.good
    assert (verdict.triggers, verdict.accepted, verdict.runs, verdict.late) == (2, 2, 2, 0)


def test_an_accepted_run_that_is_not_in_the_log_is_lost(world: World) -> None:
    world.reply("load-3", "r3")
    assert counts(world.verdict()) == {"lost": 1}


def test_an_accepted_run_that_never_ends_is_lost(world: World) -> None:
    world.reply("load-3", "r3")
    world.work("r3", "load-3")
    verdict = world.verdict()
    assert counts(verdict) == {"lost": 1}
    assert "accepted" in verdict.named["lost"][0]


def test_an_outcome_without_its_effect_is_lost(world: World) -> None:
    world.effects.pop()
    assert counts(world.verdict()) == {"lost": 1}


def test_an_outcome_whose_effect_was_of_another_attempt_is_lost(world: World) -> None:
    world.effects[-1] = world.effects[-1]._replace(attempt=2)
    assert counts(world.verdict()) == {"lost": 1}


def test_a_child_that_an_outcome_started_and_nobody_has_is_lost(world: World) -> None:
    world.good("r3", "load-3")
    body = msgspec.msgpack.decode(world.facts[-1].body) | {"children": 1}
    world.facts[-1] = world.facts[-1]._replace(body=msgspec.msgpack.encode(body))
    assert counts(world.verdict()) == {"lost": 1}


def test_two_outcomes_of_one_invocation_are_doubled(world: World) -> None:
    world.done("r2", "load-2", end=None)
    assert counts(world.verdict()) == {"doubled": 1}


def test_two_starts_of_one_invocation_are_doubled(world: World) -> None:
    world.work("r2", "load-2")
    assert counts(world.verdict()) == {"doubled": 1}


def test_two_ends_of_one_run_are_doubled(world: World) -> None:
    world.store(end_subject("r2"), RunEnd(run_id="r2", state="succeeded"))
    assert counts(world.verdict()) == {"doubled": 1}


def test_a_slot_that_is_filled_twice_is_doubled(world: World) -> None:
    for _ in range(2):
        world.store(tally_subject("r2", "s"), Tally(run_id="r2", scope="s", filled=[(0, 1)]))
    assert counts(world.verdict()) == {"doubled": 1}


def test_an_outcome_over_a_newer_lease_is_doubled() -> None:
    world = World()
    world.reply("load-1", "r1")
    world.work("r1", "load-1")
    world.effect("r1", "load-1")
    world.store(lease_subject("r1", "i"), Lease(run_id="r1", invocation_id="i", attempt=2, worker="w", at=0.0))
    world.done("r1", "load-1", attempts=1)
    verdict = world.verdict()
    assert counts(verdict) == {"doubled": 1}
    assert verdict.stale == 1


def test_one_id_with_two_runs_is_doubled(world: World) -> None:
    world.good("r3", "load-2")
    assert counts(world.verdict()) == {"doubled": 1}


def test_a_body_that_ran_twice_is_counted_and_not_doubled(world: World) -> None:
    world.effect("r2", "load-2", attempt=2)
    verdict = world.verdict()
    assert verdict.good
    assert verdict.bodies_again == 1


def test_an_effect_of_a_refused_trigger_is_a_ghost(world: World) -> None:
    world.reply("load-3", "", "refused", 503)
    world.work("r3", "load-3")
    world.effect("r3", "load-3")
    world.done("r3", "load-3")
    assert counts(world.verdict()) == {"ghost": 1}


def test_an_effect_that_nobody_sent_is_a_ghost(world: World) -> None:
    world.effect("r9", "load-9")
    assert counts(world.verdict()) == {"ghost": 1}


def test_a_trigger_of_unknown_fate_may_run_or_not(world: World) -> None:
    world.reply("load-3", "", "unknown", 0)
    world.reply("load-4", "", "unknown", 0)
    world.work("r3", "load-3")
    world.effect("r3", "load-3")
    world.done("r3", "load-3")
    verdict = world.verdict()
    assert verdict.good
    assert (verdict.unknown, verdict.unknown_ran) == (2, 1)


def test_an_unknown_trigger_that_began_has_to_end(world: World) -> None:
    world.reply("load-3", "", "unknown", 0)
    world.work("r3", "load-3")
    assert counts(world.verdict()) == {"lost": 1}


@pytest.mark.parametrize(
    "shown",
    [
        Shown(run="r1", at=0.0, state="running"),
        Shown(run="r1", at=0.0, state="succeeded", deadline_met=False),
        Shown(run="r9", at=0.0, state="succeeded", deadline_met=True),
    ],
)
def test_a_list_that_differs_from_a_replay_is_wrong(world: World, shown: Shown) -> None:
    listed = {run: Shown(run=run, at=0.0, state="succeeded", deadline_met=True) for run in ("r1", "r2")}
    listed[shown.run] = shown
    world.lines += listed.values()
    assert counts(world.verdict()) == {"wrong": 1}


def test_a_run_that_the_list_does_not_have_is_wrong(world: World) -> None:
    world.lines.append(Shown(run="r1", at=0.0, state="succeeded", deadline_met=True))
    assert counts(world.verdict()) == {"wrong": 1}


@pytest.mark.parametrize(
    ("status", "state", "at", "wrong"),
    [
        (200, "succeeded", 10.0, 0),
        (200, "accepted", 1.0, 0),
        (200, "accepted", 10.0, 1),  # it had ended long before
        (200, "failed", 10.0, 1),
        (200, "succeeded", 0.0, 1),  # it had not ended yet
        (404, "", 10.0, 1),
        (503, "", 10.0, 0),
        (0, "", 10.0, 0),
    ],
)
def test_a_read_is_right_or_says_nothing(world: World, status: int, state: str, at: float, wrong: int) -> None:
    # What r1 is: accepted at 1, ended at 2.
    world.lines.append(Read(run="r1", at=at, sent_s=0.0, took_s=0.0, status=status, state=state))
    assert world.verdict().wrong == wrong


def test_an_answer_that_belongs_to_another_trigger_is_wrong(world: World) -> None:
    world.reply("load-3", "r3")
    world.work("r3", "load-3")
    world.effect("r3", "load-3")
    world.done("r3", "load-2")
    assert counts(world.verdict()) == {"wrong": 1}


def test_a_canceled_run_has_ended(world: World) -> None:
    world.reply("load-3", "r3")
    world.work("r3", "load-3")
    world.store(cancel_subject("r3"), Cancel(run_id="r3", at=0.0))
    assert world.verdict().good


def test_a_run_that_failed_is_not_lost_but_told(world: World) -> None:
    world.reply("load-3", "r3")
    world.work("r3", "load-3")
    error = ErrorInfo(kind="lost", message="gone")
    ended = RunEnd(run_id="r3", state="failed", error=error)
    world.done("r3", "load-3", state="dead", error=error, end=ended)
    verdict = world.verdict()
    assert verdict.good
    assert verdict.unexpected == 1
    assert verdict.deaths == {"instant: lost": 1}


def test_a_line_that_a_killed_body_left_half_written_is_none() -> None:
    assert read_effects("r1,i,1,load-1\nr2,i,1,lo") == [Effect("r1", "i", 1, "load-1")]


@pytest.mark.parametrize(
    ("status", "slug", "said"),
    [
        (202, "", "accepted"),
        (200, "", "accepted"),
        (429, "overloaded", "refused"),
        (503, "busy", "refused"),
        (503, "unavailable", "unknown"),
        (500, "internal", "unknown"),
        (0, "", "unknown"),
        (422, "key-reused", "refused"),
    ],
)
def test_a_reply_promises_no_more_than_it_says(status: int, slug: str, said: str) -> None:
    assert fate(status, slug) == said


def test_the_same_seed_injects_the_same_faults() -> None:
    def steps(seed: int) -> list[lines.Step]:
        return steps_of(Plan(pid_file="", log="", seed=seed, kills=20, weights={"gateway": 1.0, "worker": 2.0}))

    assert steps(1) == steps(1)
    assert steps(1) != steps(2)


def test_a_report_tells_every_fault_and_what_did_not_hold(tmp_path: Path) -> None:
    result = Result(
        verdict=Verdict(accepted=300), figures=[lines.Figure(name="gap", value="9 s", bar="< 5 s", good=False)]
    )
    made = report.Report(fault="F1", title="kills", seed=7, scale=0.1, began="now", took_s=1.0, result=result)
    report.write([made], tmp_path)
    text = (tmp_path / report.SUMMARY).read_text()
    assert "| F1 | 300 | 0 | 7 | 0.1 | 0 | 0 | 0 | 0 | 0 | < 0.01 | 0 of 1 |" in text
    assert "gap: 9 s (bar: < 5 s) **not held**" in text
    assert msgspec.json.decode((tmp_path / "F1.json").read_bytes(), type=report.Report) == made


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


# ---------------------------------------------------------------- the trials themselves, in small


@pytest.mark.parametrize(
    ("case", "scale"),
    [(kills.CASE, 0.03), (wipe.CASE, 0.03), (poisoned.CASE, 0.06), (pauses.CASE, 0.1)],
    ids=["F1", "F5", "F10", "F19"],
)
async def test_accepted_is_kept(case: Case, scale: float, tmp_path: Path) -> None:
    if reason := case.probe():
        pytest.skip(reason)
    result = await case.run(Trial(tmp_path, seed=5, scale=scale))
    verdict = result.verdict
    assert verdict is not None
    assert counts(verdict) == {}, verdict.named
    assert verdict.accepted > 0
    assert verdict.unexpected == 0, verdict.named
