"""Runs over HTTP: readable at once, results as they are, cancel once."""

from __future__ import annotations

import msgspec
import pytest

from headrace.model import ErrorInfo, RunView
from headrace.names import invocation_id
from headrace.wire import Cancel, Outcome, Payload, RunEnd, decode, encode
from streams.topology import done_subject, end_subject
from tests.doors import Door


async def test_a_run_is_readable_at_once_whatever_the_read_model_knows(door: Door) -> None:
    door.reader.lag_at = 0
    ref = await door.trigger(json={})
    for state in ("lag", "away"):
        door.reader.away = state == "away"
        status, said, _ = await door.ask("GET", f"/v1/runs/{ref.run_id}")
        assert status == 200, said
        view = msgspec.convert(said, RunView)
        assert (view.state, view.route, view.event.type) == ("accepted", "r", "org.headrace.trigger")
        assert view.invocations[0].state == "queued"


async def test_an_unknown_run_is_a_404(door: Door) -> None:
    for path in ("", "/result", "/events"):
        await door.problem(404, "GET", f"/v1/runs/rnope{path}")
    await door.problem(404, "POST", "/v1/runs/rnope/cancel")


async def test_runs_come_newest_first_in_pages(door: Door) -> None:
    refs = [await door.trigger(data=b"x") for _ in range(5)]
    found: list[str] = []
    cursor: str | None = None
    while True:
        query = {"limit": "2", **({"cursor": cursor} if cursor else {})}
        status, said, _ = await door.ask("GET", "/v1/runs", params=query)
        assert status == 200
        found += [r["run_id"] for r in said["runs"]]
        cursor = said["next"]
        if cursor is None:
            break
    assert found == [r.run_id for r in reversed(refs)]


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=1001", "limit=x", "limit=-1", "state=done", "since=today", "route=a*", "cursor=" + "1" * 600],
)
async def test_a_bad_query_is_named(door: Door, query: str) -> None:
    problem = await door.problem(400, "GET", f"/v1/runs?{query}")
    assert query.partition("=")[0] in problem.detail


async def test_the_result_is_the_answer_itself(door: Door) -> None:
    ref = await door.trigger(json={})
    status, _, answer = await door.ask("GET", f"/v1/runs/{ref.run_id}/result")
    assert status == 202
    assert answer.headers["Retry-After"]
    door.finish(ref.run_id, b'{"hits":3}')
    status, said, answer = await door.ask("GET", f"/v1/runs/{ref.run_id}/result")
    assert (status, said) == (200, {"hits": 3})
    assert "sandbox" in answer.headers["Content-Security-Policy"]


async def test_an_explicit_answer_stands_before_the_run_has_ended(door: Door) -> None:
    ref = await door.trigger(json={})
    door.finish(ref.run_id, b"1", answer=Payload(type="text/html", body=b"<p>", size=3), end=None, children=1)
    status, said, answer = await door.ask("GET", f"/v1/runs/{ref.run_id}/result")
    assert (status, said) == (200, b"<p>")
    assert answer.headers["Content-Type"] == "text/html"


async def test_a_large_result_comes_from_the_blobs(door: Door) -> None:
    body = b"y" * 200_000
    ref = await door.trigger(json={})
    door.finish(ref.run_id, Payload(type="application/x-thing", blob=await door.blobs.put(body), size=len(body)))
    status, said, answer = await door.ask("GET", f"/v1/runs/{ref.run_id}/result")
    assert (status, said) == (200, body)
    assert answer.headers["Content-Type"] == "application/x-thing"
    assert "sandbox" in answer.headers["Content-Security-Policy"]


async def test_the_result_of_a_failed_run_is_gone_and_says_why(door: Door) -> None:
    ref = await door.trigger(json={})
    error = ErrorInfo(kind="user", message="ValueError: no hits")
    door.finish(ref.run_id, state="dead", error=error, end=RunEnd(run_id=ref.run_id, state="failed", error=error))
    problem = await door.problem(410, "GET", f"/v1/runs/{ref.run_id}/result")
    assert "no hits" in problem.detail


async def test_a_run_of_more_facts_than_the_log_tells_at_once_is_read_all_the_same(door: Door) -> None:
    ref = await door.trigger(json={})
    [first] = door.firsts()
    for n in range(1100):
        member = invocation_id(first.invocation_id, n)
        done = Outcome(
            run_id=ref.run_id,
            invocation_id=member,
            parent_id=first.invocation_id,
            function="f",
            version="v",
            route="r",
            tenant=first.tenant,
            state="succeeded",
            attempts=1,
            queued_at=1.0,
            started_at=1.0,
            ended_at=1.0,
            worker="w",
            accepted_at=first.accepted_at,
            result=Payload(body=b"%d" % n),
        )
        door.log.put(done_subject(ref.run_id, member), encode(done))
    end = RunEnd(run_id=ref.run_id, state="succeeded", answer_id=member)
    door.log.put(end_subject(ref.run_id), encode(end))
    door.reader.away = True
    status, said, _ = await door.ask("GET", f"/v1/runs/{ref.run_id}")
    assert (status, said["state"], len(said["invocations"])) == (200, "succeeded", 1000)
    assert (await door.ask("GET", f"/v1/runs/{ref.run_id}/result"))[:2] == (200, 1099)


async def test_cancel_is_one_wish_however_often_it_comes(door: Door) -> None:
    ref = await door.trigger(json={})
    for _ in range(2):
        status, said, _ = await door.ask("POST", f"/v1/runs/{ref.run_id}/cancel?reason=beam+lost")
        assert (status, said["state"]) == (202, "canceled")
    wishes = [decode(s.body, Cancel) for s in door.log.stored if s.subject.startswith("hr.cancel.")]
    assert [w.reason for w in wishes] == ["beam lost"]
    _, said, _ = await door.ask("GET", f"/v1/runs/{ref.run_id}")
    assert (said["state"], said["error"]["kind"]) == ("canceled", "canceled")
    await door.problem(410, "GET", f"/v1/runs/{ref.run_id}/result")


async def test_what_has_ended_cannot_be_canceled(door: Door) -> None:
    ref = await door.trigger(json={})
    door.finish(ref.run_id)
    assert "succeeded" in (await door.problem(409, "POST", f"/v1/runs/{ref.run_id}/cancel")).detail
