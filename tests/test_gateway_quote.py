"""At the door the caller hears whether the answer will be in time, and may ask so before anything is sent."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from functions.outlook import Measure
from gateway.acceptance import Acceptance
from gateway.probes import PROBE_S
from gateway.problems import URN
from gateway.quota import Quota
from headrace.client import AsyncClient
from headrace.errors import Infeasible
from headrace.model import Explanation, Problem, Quote, RouteExplanation, Verdict
from headrace.wire import Expected, ForecastRow
from streams.backlog import Look
from streams.topology import LANES, cancel_subject
from tests import stories
from tests.doors import TOKEN, Door, Doors
from tests.doubles import MemoryLog, MemoryReader, MemoryTables

EVENTS = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"


def learned(door: Door, p50_s: float = 2.0, p90_s: float = 3.0, **others: Expected) -> None:
    """Let the platform have learned how long it takes from the start of the function f to its answer."""
    kinds = {"answer|||": Expected(p50_s, p90_s, p90_s * 2, 50)}
    measures: tuple[Measure, ...] = ("run", "rest", "wait")
    kinds |= {f"{measure}|||": others[measure] for measure in measures if measure in others}
    door.tables.forecasts.rows["f"] = ForecastRow(function="f", kinds=kinds, at=time.time())


def event(identity: str = "e-1", **attributes: Any) -> dict[str, Any]:
    return {"specversion": "1.0", "id": identity, "source": "/s", "type": "t", "data": {"n": 1}, **attributes}


async def publish(door: Door, body: Any) -> tuple[int, Any]:
    kind = BATCH if isinstance(body, list) else EVENTS
    status, said, _ = await door.ask("POST", "/v1/events", data=json.dumps(body), headers={"Content-Type": kind})
    return status, said


async def explained(door: Door, body: Any) -> Explanation:
    """Ask what would become of an event or a batch; nothing may be stored for it."""
    kind = BATCH if isinstance(body, list) else EVENTS
    before = list(door.log.stored)
    status, said, _ = await door.ask("POST", "/v1/quote", data=json.dumps(body), headers={"Content-Type": kind})
    assert status == 200, said
    assert door.log.stored == before
    return msgspec.convert(said, Explanation)


async def of_trigger(door: Door, route: str = "r", **options: Any) -> RouteExplanation:
    """Ask what would become of a trigger."""
    before = list(door.log.stored)
    status, said, _ = await door.ask("POST", f"/v1/quote?route={route}", **options)
    assert status == 200, said
    assert door.log.stored == before
    [found] = msgspec.convert(said, Explanation).events
    [told] = found.routes
    return told


# ---------------------------------------------------------------- what a 202 says


@pytest.mark.parametrize(
    ("deadline", "said"), [("60s", "on_track"), ("2500ms", "at_risk"), ("1s", "infeasible"), (None, "on_track")]
)
async def test_a_202_says_whether_the_answer_will_be_in_time(door: Door, deadline: str | None, said: Verdict) -> None:
    learned(door)
    headers = {} if deadline is None else {"Headrace-Deadline": deadline}
    ref = await door.trigger(json={}, headers=headers)
    assert ref.quote == Quote(verdict=said, p50_s=2.0, p90_s=3.0)
    assert door.firsts()[0].quote == ref.quote
    status, view, _ = await door.ask("GET", f"/v1/runs/{ref.run_id}")
    assert (status, view["quote"]["verdict"]) == (200, said)


async def test_without_history_a_202_says_that_nothing_is_known(door: Door) -> None:
    assert (await door.trigger(json={}, headers={"Headrace-Deadline": "1s"})).quote == Quote()


async def test_each_event_of_a_batch_is_told_its_own(door: Door) -> None:
    learned(door)
    await door.deploy("a", filter={"type": "t"})
    status, said = await publish(door, [event("1", deadline="60s"), event("2", deadline="1s")])
    assert status == 202
    assert [run["quote"]["verdict"] for run in said["runs"]] == ["on_track", "infeasible"]


async def test_a_repeat_is_told_the_quote_of_the_first(door: Door) -> None:
    headers = {"Idempotency-Key": "k"}
    first = await door.trigger(data=b"x", headers=headers)
    learned(door)
    again = await door.trigger(data=b"x", headers=headers)
    assert again.duplicate
    assert again.quote == first.quote == Quote()


async def test_work_that_is_ahead_is_in_the_quote(doors: Doors) -> None:
    lanes = _Slow()
    door = await doors.open(lanes)
    await door.deploy()
    learned(door)
    headers = {"Headrace-Deadline": "600s"}
    while not (told := await of_trigger(door, headers=headers)).parts:
        await door.trigger(json={})  # each has the gateway look how much waits
    assert told.parts[0].part == "ahead"
    assert told.quote is not None
    assert told.quote.p50_s is not None
    assert told.quote.p50_s > 2.0
    assert told.parts[0].p50_s == pytest.approx(told.quote.p50_s - 2.0)


class _Slow:
    """Lanes in which ten pieces of work wait in front of everything, of which one ends with each look."""

    def __init__(self) -> None:
        self._ended = 0

    async def look(self) -> Look:
        self._ended += 1
        return Look(time.monotonic(), (10, *(0,) * (LANES - 1)), (0,) * LANES, self._ended, "count")


# ---------------------------------------------------------------- strict admission


@pytest.fixture
async def strict(door: Door) -> Door:
    await door.deploy("strict", filter={"type": "t"}, deadline="1s", admission="strict")
    return door


async def test_a_strict_route_refuses_what_is_not_expected_in_time(strict: Door) -> None:
    learned(strict)
    status, said, answer = await strict.ask("POST", "/v1/triggers/strict", json={})
    assert status == 409
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem = msgspec.convert(said, Problem)
    assert problem.type == URN + "infeasible"
    assert problem.quote == Quote(verdict="infeasible", p50_s=2.0, p90_s=3.0)
    assert "strict" in problem.detail
    assert problem.hint
    assert not strict.log.stored


async def test_a_strict_route_takes_what_may_be_in_time_and_what_it_knows_nothing_of(strict: Door) -> None:
    assert (await strict.trigger("strict", json={})).quote.verdict == "unknown"
    learned(strict)
    risky = await strict.trigger("strict", json={}, headers={"Headrace-Deadline": "2500ms"})
    assert risky.quote.verdict == "at_risk"


async def test_other_routes_take_what_is_not_expected_in_time(door: Door) -> None:
    learned(door)
    assert (await door.trigger(json={}, headers={"Headrace-Deadline": "1s"})).quote.verdict == "infeasible"


async def test_a_repeat_of_what_was_accepted_is_a_duplicate_and_not_refused(strict: Door) -> None:
    headers = {"Idempotency-Key": "k"}
    first = await strict.trigger("strict", data=b"x", headers=headers)
    learned(strict)
    again = await strict.trigger("strict", data=b"x", headers=headers)
    assert (again.run_id, again.duplicate) == (first.run_id, True)
    problem = await strict.problem(422, "POST", "/v1/triggers/strict", data=b"y", headers=headers)
    assert problem.type == URN + "key-reused"


async def test_a_batch_with_one_infeasible_event_is_refused_whole_and_says_which(strict: Door) -> None:
    status, _ = await publish(strict, event("old"))
    assert status == 202
    kept = list(strict.log.stored)
    learned(strict)
    status, said = await publish(strict, [event("old"), event("fine", deadline="60s"), event("late")])
    assert status == 409
    assert "the event 'late' on the route strict" in said["detail"]
    assert strict.log.stored == kept
    assert (await publish(strict, [event("old"), event("fine", deadline="60s")]))[0] == 202


async def test_a_deadline_that_has_passed_is_refused_without_any_history(strict: Door) -> None:
    headers = {"Headrace-Deadline": "2020-01-01T00:00:00Z"}
    problem = await strict.problem(409, "POST", "/v1/triggers/strict", json={}, headers=headers)
    assert "has passed" in problem.detail


async def test_a_retraction_is_never_refused_for_its_deadline(door: Door) -> None:
    await door.deploy("alerts", filter={"type": "t"}, deadline="1s", admission="strict", revision={"preset": "lvk"})
    learned(door)
    data = {"superevent_id": "S1", "alert_type": "RETRACTION", "time_created": "2026-06-05T12:01:07Z"}
    assert (await publish(door, event(data=data)))[0] == 202


async def test_the_client_raises_a_refusal_with_its_quote(strict: Door) -> None:
    learned(strict)
    async with AsyncClient(strict.url, token=TOKEN) as client:
        with pytest.raises(Infeasible, match="expected after 2 s") as refused:
            await client.trigger("strict", {})
    assert refused.value.quote == Quote(verdict="infeasible", p50_s=2.0, p90_s=3.0)


async def test_a_strict_route_that_refuses_everything_lets_one_in_now_and_then_to_learn_from() -> None:
    log = MemoryLog()
    acceptance = Acceptance(log=log, tables=MemoryTables(), quota=Quota(log, MemoryReader(log)))
    began = 1000.0

    async def let_in(after_s: float, *, is_late: bool = True) -> bool:
        late = Quote(verdict="infeasible" if is_late else "at_risk", p50_s=2.0, p90_s=3.0)
        now = began + after_s
        one = stories.trigger(f"{after_s}", now=now, deadline=now + 1.0, admission="strict", quote=late)
        try:
            await acceptance.append([one])
        except Infeasible:
            return False
        return True

    assert [await let_in(s) for s in (0.0, 1.0, PROBE_S - 1.0, PROBE_S, PROBE_S + 1.0)] == [
        False,
        False,
        False,
        True,
        False,
    ]
    # Where one was taken in the meantime, there was something to learn from.
    assert await let_in(PROBE_S + 10.0, is_late=False)
    assert not await let_in(2 * PROBE_S + 5.0)
    assert await let_in(3 * PROBE_S + 5.0)


@pytest.mark.parametrize("rule", [{"admission": "sometimes"}, {"newest_wins": True, "revision": {"preset": "lvk"}}])
async def test_a_route_that_is_not_possible_is_refused(door: Door, rule: dict[str, Any]) -> None:
    problem = await door.problem(400, "PUT", "/v1/routes/x", json={"function": "f", **rule})
    assert next(iter(rule)) in problem.detail


# ---------------------------------------------------------------- asking before sending


async def test_every_route_says_whether_it_fires_and_why_not(door: Door) -> None:
    learned(door)
    await door.deploy("a", filter={"type": "t"}, deadline="60s")
    await door.deploy("b", filter={"type": "t", "source": "prefix:/other"})
    await door.deploy("c", filter={"subject": "x"})
    told = await explained(door, event())
    assert told.refused is None
    [one] = told.events
    assert (one.event.id, one.event.source) == ("e-1", "/s")
    assert [(route.route, route.fires) for route in one.routes] == [
        ("a", True),
        ("b", False),
        ("c", False),
        ("r", False),
    ]
    a, b, c, r = one.routes
    assert (a.function, a.lane, a.quote) == ("f", 5, Quote(verdict="on_track", p50_s=2.0, p90_s=3.0))
    assert a.deadline is not None
    assert a.version is not None
    assert "source is '/s', not one that begins with '/other'" in b.why
    assert "there is no subject" in c.why
    assert "by its name" in r.why


async def test_the_routes_of_another_tenant_are_not_told(door: Door) -> None:
    await door.deploy("mine", filter={"type": "t"})
    theirs = msgspec.structs.replace(door.tables.routes.rows["mine"], name="theirs", tenant="other")
    door.tables.routes.rows["other.theirs"] = theirs
    [one] = (await explained(door, event())).events
    assert {route.route for route in one.routes} == {"mine", "r"}


async def test_a_trigger_is_explained_like_it_is_sent(door: Door) -> None:
    learned(door, run=Expected(0.5, 0.6, 0.7, 50), rest=Expected(1.0, 1.5, 2.0, 50))
    headers = {"Idempotency-Key": "k", "Headrace-Deadline": "1s"}
    told = await of_trigger(door, json={}, headers=headers)
    assert told.fires
    assert told.quote == Quote(verdict="infeasible", p50_s=2.0, p90_s=3.0)
    assert [(choice.function, choice.chosen) for choice in told.plan] == [("f", True)]
    assert [(part.part, part.p50_s) for part in told.parts] == [("run", 0.5), ("rest", 1.0)]
    assert told.refused is None
    sent = await door.trigger(json={}, headers=headers)
    assert sent.quote == told.quote
    again = await of_trigger(door, json={}, headers=headers)
    assert again.duplicate_of == sent.run_id
    assert again.plan == []


async def test_what_would_be_refused_is_told_with_its_status(strict: Door) -> None:
    learned(strict)
    told = await of_trigger(strict, "strict", json={})
    assert told.refused is not None
    assert (told.refused.status, told.quote and told.quote.verdict) == (409, "infeasible")
    await strict.trigger(data=b"x", headers={"Idempotency-Key": "k"})
    reused = await of_trigger(strict, data=b"y", headers={"Idempotency-Key": "k"})
    assert reused.refused is not None
    assert reused.refused.status == 422
    await strict.deploy("small", max_in_flight=1)
    await strict.trigger("small")
    full = await of_trigger(strict, "small")
    assert full.refused is not None
    assert full.refused.status == 429


async def test_a_batch_is_explained_as_the_whole_that_it_is(door: Door) -> None:
    await door.deploy("small", filter={"type": "t"}, max_in_flight=2)
    assert (await explained(door, [event("1"), event("2"), event("1")])).refused is None
    told = await explained(door, [event("1"), event("2"), event("3")])
    assert told.refused is not None
    assert told.refused.status == 429
    assert (await explained(door, [event(str(n)) for n in range(3)])).refused is not None
    twice = (await explained(door, [event("1"), event("1")])).events
    assert [one.routes[0].duplicate_of is not None for one in twice] == [False, True]


async def test_a_full_platform_is_told_for_the_whole(doors: Doors) -> None:
    door = await doors.open(_Slow(), backlog_max=1)
    await door.deploy("a", filter={"type": "t"})
    told = await explained(door, [event("1"), event("2")])
    assert told.refused is not None
    assert told.refused.status == 503


async def test_an_event_that_no_route_takes_is_explained(door: Door) -> None:
    told = await explained(door, event())
    assert told.refused is None
    assert [route.fires for route in told.events[0].routes] == [False]
    assert (await explained(door, [])).events == []


async def test_a_route_whose_event_cannot_be_read_says_so(door: Door) -> None:
    await door.deploy("alerts", filter={"type": "t"}, revision={"preset": "lvk"})
    told = await explained(door, event())
    assert told.refused is not None
    assert told.refused.status == 400
    assert "superevent_id" in told.refused.detail


async def test_what_a_revision_would_overrule_is_told(door: Door) -> None:
    await door.deploy("alerts", filter={"type": "t"}, revision={"preset": "lvk"})

    def alert(identity: str, kind: str, at: str) -> dict[str, Any]:
        data = {"superevent_id": "S1", "alert_type": kind, "time_created": at}
        return event(identity, data=data)

    status, said = await publish(door, alert("1", "INITIAL", "2026-06-05T12:00:00Z"))
    assert status == 202
    first = said["runs"][0]["run_id"]
    later = (await explained(door, alert("2", "UPDATE", "2026-06-05T13:00:00Z"))).events[0].routes[0]
    assert (later.overrules, later.overruled_by) == ([first], None)
    earlier = (await explained(door, alert("0", "PRELIMINARY", "2026-06-05T11:00:00Z"))).events[0].routes[0]
    assert earlier.overruled_by == first


async def test_which_run_a_newer_event_would_replace_is_told(door: Door) -> None:
    await door.deploy("frames", filter={"type": "t"}, newest_wins=True)
    _, said = await publish(door, event("1", subject="cam"))
    told = await explained(door, event("2", subject="cam"))
    assert told.events[0].routes[0].overrules == [said["runs"][0]["run_id"]]
    other = await explained(door, event("2", subject="other"))
    assert other.events[0].routes[0].overrules == []


async def test_what_is_not_possible_is_refused_as_at_the_door(door: Door) -> None:
    await door.problem(400, "POST", "/v1/quote", data=b"{}", headers={"Content-Type": EVENTS})
    await door.problem(415, "POST", "/v1/quote", data=b"x", headers={"Content-Type": "application/cloudevents+avro"})
    await door.problem(404, "POST", "/v1/quote?route=nope", json={})
    await door.problem(400, "POST", "/v1/quote?route=r", json={}, headers={"Headrace-Deadline": "soon"})


async def test_a_large_body_is_explained_and_not_kept(door: Door, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    told = await of_trigger(door, data=b"x" * 1_000_000)
    assert told.refused is None
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_is_sent_the_door_does_what_the_quote_said(doors: Doors, seed: int) -> None:
    draw = random.Random(seed)
    door = await doors.open()
    await door.deploy("plain", filter={"type": "t"})
    await door.deploy("strict", filter={"type": "t", "subject": "s"}, admission="strict", deadline="1s")
    await door.deploy("small", filter={"type": "u"}, max_in_flight=3)
    await door.deploy("alerts", filter={"type": "v"}, revision={"key": "data.id"})
    await door.deploy("frames", filter={"type": "u"}, newest_wins=True)
    seen = set()
    for _ in range(40):
        if draw.random() < 0.2:
            learned(door, *((2.0, 3.0) if draw.random() < 0.5 else (0.2, 0.3)))
        batch = [
            event(
                str(draw.randrange(25)),
                type=draw.choice("tuvw"),
                time="2026-01-01T00:00:00Z",
                data=draw.choice([{"id": "x"}, {"id": "x"}, {"n": 1}]),
                **draw.choice([{}, {"subject": "s"}, {"subject": "s", "deadline": "60s"}]),
            )
            for _ in range(draw.randrange(1, 4))
        ]
        told = await explained(door, batch)
        status, said = await publish(door, batch)
        assert status == (202 if told.refused is None else told.refused.status), said
        seen.add(status)
        if status == 202:
            firing = {r.route: r for one in told.events for r in one.routes if r.fires and r.duplicate_of is None}
            fresh = [run for run in said["runs"] if not run["duplicate"]]
            assert {run["route"] for run in fresh} == set(firing)
            repeats = {r.duplicate_of for one in told.events for r in one.routes} - {None}
            assert {run["run_id"] for run in said["runs"] if run["duplicate"]} <= repeats
        else:
            assert said["detail"] in {r.refused.detail for one in told.events for r in one.routes if r.refused}
    assert {202, 409} <= seen


# ---------------------------------------------------------------- the newest wins


async def test_of_a_batch_each_frame_is_accepted_and_the_last_stands_in_the_log_last(door: Door) -> None:
    await door.deploy("frames", filter={"type": "t"}, newest_wins=True)
    status, said = await publish(door, [event(str(n), subject="cam") for n in range(3)])
    assert status == 202
    firsts = door.firsts()
    assert [run["run_id"] for run in said["runs"]] == [first.run_id for first in firsts]
    assert len({first.newest for first in firsts}) == 1
    last = await door.log.last(f"hr.newest.{firsts[0].newest}")
    assert last is not None
    assert last.seq == len(door.log.stored)


async def test_frames_of_another_subject_source_or_route_are_not_of_the_same_kind(door: Door) -> None:
    for name in ("frames", "others"):
        await door.deploy(name, filter={"type": "t"}, newest_wins=True)
    await publish(
        door,
        [event("1", subject="a"), event("2", subject="b"), event("3", subject="a", source="/z"), event("4")],
    )
    keys = [first.newest for first in door.firsts()]
    assert len(keys) == len(set(keys)) == 8


async def test_triggers_by_name_are_of_one_kind(door: Door) -> None:
    await door.deploy("frames", newest_wins=True)
    await door.trigger("frames", json={"n": 1})
    await door.trigger("frames", json={"n": 2})
    one, two = door.firsts()
    assert one.newest == two.newest != ""
    assert not any(s.subject == cancel_subject(one.run_id, "newest") for s in door.log.stored)
