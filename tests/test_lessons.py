"""What outcomes teach: durations of runs, and of the way from each step to the answer."""

from __future__ import annotations

import heapq
import random
from typing import Any

import pytest

from functions import effects, lessons, outcomes, scopes
from functions.forecast import History, forecast, size_class
from functions.lessons import Lessons, alike
from functions.outcomes import Attempted, World
from functions.outlook import Measure, Outlook
from functions.replays import again, replay
from functions.scopes import Fill, Scope
from headrace.model import ErrorInfo
from headrace.wire import (
    NOTHING,
    Call,
    Cancel,
    Effect,
    Expected,
    ForecastRow,
    Invocation,
    Map,
    Outcome,
    Payload,
    decode,
)
from headrace.wire import encode as encoded
from infra.bench.deadlines import traces
from streams.log import Record
from streams.record import RunRecord
from streams.stored import Stored
from streams.topology import cancel_subject
from tests.stories import children, function, route, teach, trigger

KNOWN = {name: function(name) for name in ("f", "g", "join")}


class Story:
    """A log that grows: each invocation is queued when it is due to be, starts 1 s later and runs for 2 s."""

    def __init__(self, outlook: Outlook | None = None) -> None:
        self.facts: list[Stored] = []
        self.now = 1000.0
        self._outlook = outlook or Outlook(lambda name: None)

    def append(self, records: list[Record]) -> list[Stored]:
        made = [Stored(len(self.facts) + n, r.subject, r.body, self.now) for n, r in enumerate(records, 1)]
        self.facts += made
        return made

    def begin(self, event_id: str = "e", body: bytes = b"1", deadline: float | None = None) -> Invocation:
        admitted = trigger(event_id, now=self.now, body=body, deadline=deadline)
        self.append(admitted.records)
        return admitted.invocation

    def tried(self, took_s: float = 2.0, waits_s: float = 1.0, attempt: int = 1, stage_in_s: float = 0.0) -> Attempted:
        queued, self.now = self.now, self.now + waits_s + took_s
        return Attempted(
            attempt=attempt,
            worker="w",
            queued_at=queued,
            started_at=queued + waits_s,
            ended_at=self.now,
            stage_in_s=stage_in_s,
        )

    def world(self) -> World:
        return World(function=KNOWN.get, routes=[], now=self.now, outlook=self._outlook)

    def succeed(self, one: Invocation, *asked: Effect, answer: bytes | None = None, **timed: Any) -> list[Invocation]:
        """End an invocation well, half a second after it ran; return what it started."""
        given = None if answer is None else Payload(body=answer, size=len(answer))
        world_tried = self.tried(**timed)
        _, unit = effects.succeed(
            one, world_tried, result=NOTHING, answer=given, effects=list(asked), kept={}, world=self.world()
        )
        self.now += 0.5
        self.append(unit)
        return children(unit)

    def fill(self, scope: Scope) -> list[Invocation]:
        """Count the outcome that was appended last, and go on as far as that leads."""
        last = self.facts[-1]
        outcome = decode(last.body, Outcome)
        assert outcome.slot is not None
        made = Fill(slot=outcome.slot, outcome=outcome, seq=last.seq, at=last.at, failed=False)
        counted = scopes.tally(scope, [made], self.now, self._outlook)
        assert counted is not None
        self.append(counted[1])
        scope.take(counted[0], self.facts[-1].seq)
        further = scopes.upward(scope, made)
        if isinstance(further, Record):
            self.append([further])
        return children(counted[1])

    def learned(self) -> Lessons:
        made = Lessons()
        teach(made, self.facts)
        return made


def seconds(learned: Lessons, measure: Measure, function: str, payload: bytes = b"1") -> list[float]:
    """Return the durations of functions of one version with payloads of one size."""
    found = learned.histories.get(function, {}).get(f"{measure}|v1||{size_class(len(payload))}")
    return [] if found is None else [round(one, 3) for one in found.seconds]


def test_a_run_of_one_step_teaches_all_four() -> None:
    story = Story()
    story.succeed(story.begin(), waits_s=0.25)
    learned = story.learned()
    assert seconds(learned, "run", "f") == [2.0]
    assert seconds(learned, "wait", "f") == [0.25]
    assert seconds(learned, "answer", "f") == [2.5]
    assert seconds(learned, "rest", "f") == [0.5]
    names = {"run|v1||1", "run|v1||", "run|||"}
    assert names < learned.histories["f"].keys()


def test_bringing_data_in_is_learned_of_each_step_by_itself_where_it_takes_more_than_a_moment() -> None:
    story = Story()
    (second,) = story.succeed(story.begin(), Call(function="g", payload=NOTHING), stage_in_s=0.75)
    (third,) = story.succeed(second, Call(function="g", payload=NOTHING), stage_in_s=0.25)
    story.succeed(third, stage_in_s=0.001)
    learned = story.learned()
    assert seconds(learned, "stage", "f") == [0.75]
    assert seconds(learned, "stage", "g", b"null") == [0.25]


def test_a_chain_teaches_from_each_step_to_the_answer() -> None:
    story = Story()
    (second,) = story.succeed(story.begin(), Call(function="g", payload=NOTHING))
    story.succeed(second)
    learned = story.learned()
    assert seconds(learned, "answer", "f") == [2.0 + 0.5 + 3.0 + 0.5]
    assert seconds(learned, "rest", "f") == [0.5 + 3.0 + 0.5]
    assert seconds(learned, "answer", "g", b"null") == [2.5]
    assert seconds(learned, "rest", "g", b"null") == [0.5]
    assert seconds(learned, "wait", "g", b"null") == []


def test_a_join_teaches_over_the_member_that_ended_last() -> None:
    story = Story()
    payloads = [NOTHING, Payload(body=b"long payload", size=12)]
    one, other = story.succeed(story.begin(), Map(function="g", payloads=payloads, then="join"))
    scope = Scope(size=2)
    story.succeed(one)
    assert story.fill(scope) == []
    story.succeed(other)
    (then,) = story.fill(scope)
    assert [step.function for step in then.trail] == ["f", "g"]
    story.succeed(then)
    learned = story.learned()
    assert seconds(learned, "rest", "g", b"null") == []  # it waited for the other one
    assert seconds(learned, "rest", "g", b"long payload") == [0.5 + 3.5]
    assert seconds(learned, "rest", "f") == [0.5 + 3 * 3.5]
    assert seconds(learned, "run", "g", b"null") == [2.0]


def test_branches_that_end_without_a_join_teach_too() -> None:
    story = Story()
    one, other = story.succeed(story.begin(), Map(function="g", payloads=[NOTHING, NOTHING]))
    scope = Scope(size=2)
    story.succeed(one)
    story.fill(scope)
    story.succeed(other)
    story.now += 0.25
    story.fill(scope)
    assert seconds(story.learned(), "rest", "g", b"null") == [0.75]
    assert seconds(story.learned(), "rest", "f") == [0.5 + 2 * 3.5 + 0.25]


def test_the_answer_is_the_first_that_was_given() -> None:
    story = Story()
    (second,) = story.succeed(story.begin(), Call(function="g", payload=NOTHING), answer=b"7")
    assert second.trail == []
    (third,) = story.succeed(second, Call(function="join", payload=NOTHING), answer=b"8")
    story.succeed(third)
    learned = story.learned()
    assert seconds(learned, "rest", "f") == [0.5]
    assert seconds(learned, "run", "join", b"null") == [2.0]
    assert {measure for name in ("g", "join") for measure in told(learned, name)} == {"run"}


def told(learned: Lessons, function: str) -> set[str]:
    return {kind.partition("|")[0] for kind in learned.histories.get(function, {})}


def test_a_canceled_run_teaches_nothing_about_answers() -> None:
    story = Story()
    (second,) = story.succeed(story.begin(), Call(function="g", payload=NOTHING))
    run = second.run_id
    story.append([Record(cancel_subject(run), encoded(Cancel(run_id=run, at=story.now)))])
    story.succeed(second)
    assert told(story.learned(), "f") == {"run"}
    assert told(story.learned(), "g") == {"run"}


def test_what_failed_teaches_nothing() -> None:
    story = Story()
    first = story.begin()
    _, unit = outcomes.fail(first, story.tried(), ErrorInfo(kind="user", message="broken"))
    story.append(unit)
    assert story.learned().histories == {}


def test_an_attempt_after_another_teaches_its_own_time_and_not_how_long_it_waited_for_that() -> None:
    story = Story()
    first = story.begin()
    story.now += 60.0
    story.succeed(first, attempt=2, waits_s=0.1)
    assert seconds(story.learned(), "run", "f") == [2.0]
    assert seconds(story.learned(), "answer", "f") == [2.5]
    assert told(story.learned(), "f") == {"run", "answer", "rest"}


def test_who_waited_for_others_teaches_nothing_of_the_way_to_a_worker() -> None:
    story = Story()
    story.succeed(story.begin(), waits_s=lessons.QUIET_S)
    assert "wait" not in told(story.learned(), "f")


def test_a_long_chain_carries_its_first_and_its_last_steps() -> None:
    story = Story()
    one = story.begin()
    for number in range(40):
        (one,) = story.succeed(one, Call(function="g" if number % 2 else "join", payload=NOTHING))
    assert len(one.trail) == 16
    assert one.trail[0].function == "f"
    ends = [step.ended_at for step in one.trail]
    assert ends == sorted(ends)
    assert ends[-1] == story.now - 0.5


def test_members_of_a_large_map_carry_little() -> None:
    story = Story()
    one = story.begin()
    for _ in range(8):
        (one,) = story.succeed(one, Call(function="g", payload=NOTHING))
    members = story.succeed(one, Map(function="g", payloads=[NOTHING] * 100, then="join"))
    assert {len(member.trail) for member in members} == {4}
    assert members[0].trail[0].function == "f"
    assert members[0].trail[-1].ended_at == story.now - 0.5


# ---------------------------------------------------------------- budgets


def row(function: str, p50_s: float, p90_s: float, measure: Measure = "rest") -> ForecastRow:
    return ForecastRow(function=function, kinds={f"{measure}|||": Expected(p50_s, p90_s, p90_s, 10)}, at=0.0)


ROWS = {name: row(name, *rest) for name, rest in (("f", (30.0, 40.0)), ("g", (8.0, 10.0)), ("join", (0.5, 1.0)))}
DEADLINE = 1100.0


def test_each_step_is_due_earlier_by_what_follows_it() -> None:
    story = Story(Outlook(ROWS.get))
    (second,) = story.succeed(story.begin(deadline=DEADLINE), Call(function="g", payload=NOTHING))
    (third,) = story.succeed(second, Call(function="join", payload=NOTHING))
    assert (second.due, third.due) == (DEADLINE - 10.0, DEADLINE - 1.0)
    assert (second.deadline, third.deadline) == (DEADLINE, DEADLINE)
    assert story.facts[-2].subject.startswith("hr.work.6.")  # the lane goes by it: 92 s are left
    assert f"hr.work.6.{third.tenant}.{third.run_id}.{third.invocation_id}" == story.facts[-2].subject


def test_the_lane_goes_by_what_is_due_and_not_by_the_deadline() -> None:
    story = Story(Outlook({"g": row("g", 60.0, 80.0)}.get))
    story.succeed(story.begin(deadline=DEADLINE), Call(function="g", payload=NOTHING))
    left_s = DEADLINE - 80.0 - (story.now - 0.5)
    assert 16.0 <= left_s < 32.0
    assert story.facts[-2].subject.startswith("hr.work.4.")


def test_members_and_their_join_are_due_one_after_the_other() -> None:
    story = Story(Outlook(ROWS.get))
    one, other = story.succeed(story.begin(deadline=DEADLINE), Map(function="g", payloads=[NOTHING] * 2, then="join"))
    assert (one.due, other.due) == (DEADLINE - 10.0,) * 2
    scope = Scope(size=2)
    story.succeed(one)
    story.fill(scope)
    story.succeed(other)
    (then,) = story.fill(scope)
    assert then.due == DEADLINE - 1.0


def test_where_not_all_fits_any_more_the_usual_counts_and_then_the_deadline() -> None:
    story = Story(Outlook(ROWS.get))
    first = story.begin(deadline=story.now + 12.5)  # 9.5 s are left when it has ended
    assert first.deadline is not None
    (second,) = story.succeed(first, Call(function="g", payload=NOTHING))
    assert second.due == first.deadline - 8.0
    (third,) = story.succeed(second, Call(function="g", payload=NOTHING))
    assert third.due == first.deadline


def test_an_attempt_that_failed_takes_nothing_from_what_follows() -> None:
    story = Story(Outlook(ROWS.get))
    first = story.begin(deadline=DEADLINE)
    story.append([outcomes.failed_attempt(first, story.tried(), ErrorInfo(kind="user", message="x"), story.now + 20.0)])
    story.now += 20.0
    (second,) = story.succeed(first, Call(function="g", payload=NOTHING), attempt=2)
    assert (second.due, second.deadline) == (DEADLINE - 10.0, DEADLINE)


def test_a_replay_has_a_deadline_and_a_trail_of_its_own() -> None:
    story = Story(Outlook(ROWS.get))
    first = story.begin(deadline=DEADLINE)
    (second,) = story.succeed(first, Call(function="g", payload=NOTHING))
    wanted = again(first, second)
    now, known = 5000.0, route(deadline="100s")
    due = Outlook(ROWS.get).due(now + 100.0, "g", "v1", size_class(second.payload.size), now)
    made = replay(wanted, key="k", route=known, function=KNOWN["g"], now=now, due=due).invocation
    assert (made.deadline, made.due, made.trail) == (now + 100.0, now + 90.0, [])
    story.now = now
    (third,) = story.succeed(made, Call(function="join", payload=NOTHING))
    assert third.due == now + 99.0
    assert [step.function for step in third.trail] == ["g"]


def test_without_a_deadline_nothing_is_due() -> None:
    story = Story(Outlook(ROWS.get))
    (second,) = story.succeed(story.begin(), Call(function="g", payload=NOTHING))
    assert second.due is None


def test_a_follow_up_that_is_to_wait_is_due_as_if_it_came_then() -> None:
    story = Story(Outlook(ROWS.get))
    first = story.begin(deadline=story.now + 60.0)
    assert first.deadline is not None
    (second,) = story.succeed(first, Call(function="g", payload=NOTHING, delay_s=50.0))
    assert second.due == first.deadline  # 7 s are left then, less than the rest takes
    (third,) = story.succeed(second, Call(function="g", payload=NOTHING))
    assert third.due == first.deadline - 10.0


# ---------------------------------------------------------------- the histories as a whole


def runs(number: int, seed: int = 1) -> list[Stored]:
    story = Story()
    rng = random.Random(seed)
    for n in range(number):
        story.succeed(story.begin(str(n)), took_s=rng.expovariate(1.0), waits_s=0.001)
    return story.facts


def test_histories_do_not_depend_on_where_they_were_kept_and_loaded_again() -> None:
    facts = runs(300)
    whole = Lessons()
    teach(whole, facts)
    kept: dict[str, bytes] = {}
    known: dict[str, RunRecord] = {}
    for start in range(0, len(facts), 7):
        one = Lessons()
        one.load(kept)
        teach(one, facts[start : start + 7], known)
        changed, gone = one.changed()
        kept |= changed
        assert gone == []
    again = Lessons()
    again.load(kept)
    assert again.histories == whole.histories
    assert kept == whole.changed()[0]


def test_the_number_of_histories_is_bounded_and_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lessons, "HISTORIES_MAX", 40)
    monkeypatch.setattr(lessons, "HISTORIES_LEFT", 30)
    story = Story()
    for size in range(20):
        story.succeed(story.begin(str(size), body=b"1" * 2**size), waits_s=0.001)
    learned = story.learned()
    count = sum(len(kinds) for kinds in learned.histories.values())
    assert 30 <= count <= 40
    assert seconds(learned, "run", "f", b"1" * 2**19) == [2.0]
    assert seconds(learned, "run", "f", b"1") == []
    assert "run|||" in learned.histories["f"]


def test_of_a_flood_only_some_are_learned_and_those_are_as_the_others() -> None:
    rng = random.Random(1)
    history = History()
    learned = 0
    for n in range(200_000):  # 2,000 a second, in bursts of a hundred of which the short ones end first
        burst, place = divmod(n, 100)
        took = 0.01 * (place + rng.random())
        if history.takes(rng.getrandbits(32), burst * 0.05 + took * 0.01):
            history.learn(took, burst * 0.05 + took * 0.01)
            learned += 1
    assert learned < 1000
    said = forecast(history)
    assert said is not None
    assert 0.4 < said.p50_s < 0.6
    assert 0.85 < said.p90_s <= 1.0
    assert 100_000 < said.observations < 400_000


def test_after_a_flood_the_rare_is_learned_again() -> None:
    history = History()
    rng = random.Random(1)
    for n in range(20_000):
        if history.takes(rng.getrandbits(32), n / 1000):
            history.learn(1.0, n / 1000)
    assert history.stride > 8
    for n in range(100):
        if history.takes(rng.getrandbits(32), 100.0 + 10 * n):
            history.learn(2.0, 100.0 + 10 * n)
    assert history.stride == 1
    assert history.seconds.count(2.0) > 80


# ---------------------------------------------------------------- what is told


def test_little_news_is_no_news() -> None:
    one = {"run|||": Expected(1.0, 2.0, 3.0, 100)}
    assert alike(one, {"run|||": Expected(1.04, 1.92, 9.0, 150)})
    assert not alike(one, {"run|||": Expected(1.06, 2.0, 3.0, 100)})
    assert not alike(one, {"run|||": Expected(1.0, 1.8, 3.0, 100)})
    assert not alike(one, {"run|||": Expected(1.0, 2.0, 3.0, 200)})
    assert not alike(one, one | {"run|v1||": Expected(1.0, 2.0, 3.0, 1)})


def test_what_was_told_is_told_again_only_where_it_changed() -> None:
    learned = Lessons()
    teach(learned, runs(100))
    assert learned.untold() == {"f"}
    told = learned.tell("f", 5.0, None)
    assert told is not None
    assert told.kinds["run|||"].observations == 100
    assert learned.untold() == set()
    assert learned.tell("f", 6.0, told) is told
    assert Outlook({"f": told}.get).of("run", "f", "v1", size=1) == told.kinds["run|v1||1"]
    assert learned.tell("nobody", 6.0, told) is None


def ran(number: int, size: int, began: float, took_s: float) -> tuple[Outcome, Stored]:
    """Return an outcome of a function that ran this long, as the log has it."""
    ended = began + took_s
    outcome = Outcome(
        run_id=f"r{number}",
        invocation_id=f"i{number}",
        function="f",
        version="v1",
        route="f",
        tenant="default",
        state="succeeded",
        attempts=1,
        queued_at=began,
        started_at=began,
        ended_at=ended,
        worker="w",
        accepted_at=began,
        parent_id="none",
        size=size,
    )
    return outcome, Stored(number + 1, f"hr.done.r{number}.i{number}", b"", ended)


@pytest.mark.parametrize("faster", [1.0, 50.0])
def test_what_is_told_covers_what_it_says_on_recorded_arrivals(faster: float) -> None:
    learned, told = Lessons(), None
    running: list[tuple[float, int, float, int]] = []
    told_at = 0.0
    stated = held = rows = 0
    for number, job in enumerate(traces.inference().jobs):
        now = job.arrived / faster
        while running and running[0][0] <= now:
            ended, which, took_s, size = heapq.heappop(running)
            learned.learn(*ran(which, size, ended - took_s, took_s), None, None)
            if ended - told_at >= 2.0:
                row = learned.tell("f", ended, told)
                rows += row is not told
                told, told_at = row, ended
        said = Outlook({"f": told}.get).of("run", "f", "v1", size=job.kind.size)
        if said is not None:
            stated += 1
            held += job.seconds <= said.p90_s
        heapq.heappush(running, (now + job.seconds, number, job.seconds, job.kind.size))
    assert stated > 5000
    assert 0.87 <= held / stated <= 0.93
    assert rows < told_at / 2.0
