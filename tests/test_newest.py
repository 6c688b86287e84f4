"""Where the newest event wins, older ones that wait are dropped without a start, and the newest is never lost."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pytest

from functions.admission import Admitted, admit
from functions.effects import succeed
from functions.outcomes import World
from gateway.acceptance import Acceptance
from headrace import Client, Event
from headrace.errors import BadRequest, Infeasible
from headrace.model import EventFilter, Quote, RunView
from headrace.sdk import on
from headrace.wire import (
    NOTHING,
    Cancel,
    Emit,
    EventMeta,
    FunctionRecord,
    Invocation,
    Lease,
    Mark,
    Newest,
    Payload,
    decode,
    encode,
)
from streams.link import Link
from streams.log import AlreadyThere, Log, Record
from streams.newest import WHO, newest_run, outdated
from streams.topology import (
    DEFAULT_TENANT,
    cancel_subject,
    done_subject,
    fence_subject,
    kind_of,
    lease_subject,
    newest_subject,
)
from tests import stories
from tests.commands import Run
from tests.doubles import MemoryLog
from tests.platforms import UpProcess
from tests.processes import wait_until
from tests.test_worker import Platform, working


def frame(identity: str, subject: str | None = "cam", function: FunctionRecord | None = None) -> Admitted:
    """Admit one frame on a route where the newest wins."""
    body = json.dumps(identity).encode()
    return admit(
        event=EventMeta(id=identity, source="/cam", type="org.test.frame", subject=subject),
        payload=Payload(body=body, size=len(body)),
        digest=identity,
        route=stories.route("frames", newest_wins=True),
        function=function or stories.function(),
        tenant=DEFAULT_TENANT,
        now=time.time(),
        deadline=None,
    )


# ---------------------------------------------------------------- what is decided


def lease_of(work: Invocation, fence: int = 0) -> Record:
    """Return the lease of a worker that knows of nothing after ``fence``."""
    run, identity = work.run_id, work.invocation_id
    lease = Lease(run_id=run, invocation_id=identity, attempt=1, worker="w", at=5.0)
    return Record(lease_subject(run, identity), encode(lease), fence_subject(run, identity), fence)


async def accept(log: MemoryLog, *frames: Admitted) -> list[int]:
    """Accept frames as one unit and return where the work of each stands in the log."""
    seqs = await log.append([record for one in frames for record in one.records])
    places = dict(zip([record.subject for one in frames for record in one.records], seqs, strict=False))
    return [places[one.record.subject] for one in frames]


@pytest.mark.parametrize("together", [True, False])
async def test_all_but_the_last_accepted_are_outdated_whatever_order_they_are_looked_at_in(together: bool) -> None:
    for order in permutations(range(3)):
        log = MemoryLog()
        frames = [frame(str(n)) for n in range(3)]
        if together:
            seqs = await accept(log, *frames)
        else:
            seqs = [(await accept(log, one))[0] for one in frames]
        last = frames[-1].invocation.run_id
        for n in order:
            first = frames[n].invocation
            assert await outdated(log, first, seqs[n], lease_of(first), 5.0) == (n != 2)
            stored = await log.last(cancel_subject(first.run_id, WHO))
            if n == 2:
                assert stored is None
            else:
                assert stored is not None
                claim = await log.last(newest_subject(first.newest))
                assert claim is not None
                mark = Mark(kind="superseded", run_id=last, rank=(0, float(claim.seq), 0.0, ""))
                assert decode(stored.body, Cancel) == Cancel(run_id=first.run_id, at=5.0, by=mark)


async def test_to_look_twice_says_it_once() -> None:
    log = MemoryLog()
    older, newer = frame("1"), frame("2")
    [seq] = await accept(log, older)
    await accept(log, newer)
    assert await outdated(log, older.invocation, seq, lease_of(older.invocation), 5.0)
    kept = len(log.stored)
    assert await outdated(log, older.invocation, seq, lease_of(older.invocation), 6.0)
    assert len(log.stored) == kept


async def test_what_was_done_meanwhile_is_not_ended() -> None:
    log = MemoryLog()
    older, newer = frame("1"), frame("2")
    [seq] = await accept(log, older)
    await accept(log, newer)
    work = older.invocation
    late = lease_of(work)
    await log.append([Record(done_subject(work.run_id, work.invocation_id), b"", late.absent, 0)])
    assert not await outdated(log, work, seq, late, 5.0)
    assert await log.last(cancel_subject(work.run_id, WHO)) is None


async def test_a_frame_whose_unit_a_power_cut_tore_apart_is_the_newest_all_the_same() -> None:
    log = MemoryLog()
    await accept(log, frame("1"))
    torn = frame("2")
    [seq] = await log.append([torn.record])
    assert not await outdated(log, torn.invocation, seq, lease_of(torn.invocation), 5.0)


async def test_a_repeat_of_an_older_frame_does_not_take_the_place_of_a_newer_one() -> None:
    log = MemoryLog()
    older, newer = frame("1"), frame("2")
    await accept(log, older)
    [seq] = await accept(log, newer)
    with pytest.raises(AlreadyThere):
        await accept(log, older)
    assert await newest_run(log, newer.invocation.newest) == newer.invocation.run_id
    assert not await outdated(log, newer.invocation, seq, lease_of(newer.invocation), 5.0)


async def test_work_of_other_routes_is_never_looked_up() -> None:
    log = MemoryLog()
    log.away = True
    assert not await outdated(log, stories.trigger("e").invocation, 1, lease_of(stories.trigger("e").invocation), 5.0)


def test_what_a_function_emits_takes_the_place_of_what_it_emitted_before() -> None:
    first = stories.trigger("e").invocation
    rule = stories.route("frames", filter=EventFilter(type="org.test.frame"), newest_wins=True)
    _, unit = succeed(
        first,
        stories.tried(),
        result=NOTHING,
        answer=None,
        effects=[Emit(type="org.test.frame", subject="cam", payload=NOTHING) for _ in range(2)],
        kept={},
        world=World(function={"f": stories.function()}.get, routes=[rule], now=1004.0),
    )
    assert [kind_of(record.subject) for record in unit] == ["work", "newest", "work", "newest", "done"]
    assert unit[1].subject == unit[3].subject
    assert decode(unit[3].body, Newest).run_id == decode(unit[2].body, Invocation).run_id


def test_a_route_says_in_one_way_which_event_takes_the_place_of_another() -> None:
    with pytest.raises(BadRequest, match="newest_wins and revision"):
        on(newest_wins=True, revision={"preset": "lvk"})
    with pytest.raises(BadRequest, match="admission"):
        on(admission="sometimes")  # type: ignore[arg-type]


# ---------------------------------------------------------------- with a real log and a real worker


async def accept_all(platform: Platform, *frames: Admitted) -> None:
    for one in frames:
        await platform.log.append(one.records)


async def is_superseded_by(platform: Platform, old: Admitted, new: Admitted) -> None:
    record = await platform.ended(old.invocation.run_id)
    assert (record.state, record.superseded_by) == ("canceled", new.invocation.run_id)
    assert record.error is not None
    assert record.error.kind == "superseded"
    assert await platform.log.last(done_subject(old.invocation.run_id, "*")) is None


async def test_of_those_that_wait_for_a_worker_only_the_newest_runs(log: Log, link: Link, tmp_path: Path) -> None:
    async with working(log, link, tmp_path) as platform:
        await platform.deploy("def f(x):\n    return x")
        function = platform.tables.function(DEFAULT_TENANT, "f")
    waiting = [frame(str(n), function=function) for n in range(5)]
    other = frame("other", subject="another", function=function)
    for one in [*waiting, other]:
        await log.append(one.records)
    async with working(log, link, tmp_path) as platform:
        *old, last = waiting
        assert await platform.answer(last.invocation.run_id) == "4"
        assert await platform.answer(other.invocation.run_id) == "other"
        for one in old:
            await is_superseded_by(platform, one, last)


async def test_what_runs_goes_on_and_what_follows_from_it_too(log: Log, link: Link, tmp_path: Path) -> None:
    gate = tmp_path / "open"
    async with working(log, link, tmp_path) as platform:
        await platform.deploy(
            f"""\
            import pathlib, time
            def f(x, ctx):
                while x == "1" and not pathlib.Path({str(gate)!r}).exists():
                    time.sleep(0.01)
                ctx.call("g", x)
            def g(x):
                return "done " + x
            """
        )
        function = platform.tables.function(DEFAULT_TENANT, "f")
        first = frame("1", function=function)
        await accept_all(platform, first)
        while (await platform.state(first.invocation.run_id))[0].state != "running":
            await asyncio.sleep(0.01)
        later = [frame(str(n), function=function) for n in range(2, 5)]
        await platform.log.append([record for one in later for record in one.records])
        assert await platform.answer(later[-1].invocation.run_id) == "done 4"
        gate.touch()
        assert await platform.answer(first.invocation.run_id) == "done 1"
        for one in later[:-1]:
            await is_superseded_by(platform, one, later[-1])


async def test_a_frame_that_its_gateway_never_confirmed_runs(log: Log, link: Link, tmp_path: Path) -> None:
    async with working(log, link, tmp_path) as platform:
        await platform.deploy("def f(x):\n    return x")
        function = platform.tables.function(DEFAULT_TENANT, "f")
        lost = frame("1", function=function)
        await accept_all(platform, lost)  # and nobody was told: its sender sends it again, through another gateway
        acceptance = Acceptance(log=log, tables=platform.tables, quota=None)  # type: ignore[arg-type] # no limits here
        [again] = await acceptance.append([frame("1", function=function)])
        assert again.duplicate
        assert await platform.answer(lost.invocation.run_id) == "1"


# ---------------------------------------------------------------- on a platform

FUNCTIONS = '''\
import pathlib
import time

from headrace import Context, function, on


@function(timeout="2m")
@on()
def hold(path: str) -> None:
    """Keep a slot busy until the file is there."""
    while not pathlib.Path(path).exists():
        time.sleep(0.01)


@function
@on(type="org.test.frame", newest_wins=True)
def steer(frame: int) -> int:
    return frame


@function
@on(deadline="100ms", admission="strict", name="in_time")
def slow(seconds: float) -> float:
    time.sleep(seconds)
    return seconds
'''


@pytest.fixture
def client(shared_platform: UpProcess, tmp_path: Path) -> Iterator[Client]:
    (tmp_path / "newest.py").write_text(FUNCTIONS)
    with Client(shared_platform.url, shared_platform.token) as opened:
        opened.deploy(tmp_path / "newest.py")
        yield opened


def shown(client: Client, run_id: str) -> RunView:
    return client.run(run_id).view()


def test_frames_that_wait_behind_busy_slots_are_dropped_for_the_newest(client: Client, tmp_path: Path) -> None:
    gate = tmp_path / "open"
    held = [client.trigger("hold", str(gate)) for _ in range(32)]
    wait_until(lambda: any(shown(client, run.run_id).state == "running" for run in held))
    frames = [
        client.publish(Event(id=f"frame-{n}", source="/cam", type="org.test.frame", subject="cam", data=n))[0]
        for n in range(20)
    ]
    batch = client.publish(
        [Event(id=f"frame-{n}", source="/cam", type="org.test.frame", subject="cam", data=n) for n in range(20, 30)]
    )
    gate.touch()
    assert batch[-1].result(timeout=60) == 29
    for run in held:
        run.result(timeout=60)
    seen = [shown(client, run.run_id) for run in [*frames, *batch[:-1]]]
    wait_until(lambda: all(shown(client, run.run_id).state in ("succeeded", "canceled") for run in frames))
    seen = [shown(client, run.run_id) for run in [*frames, *batch[:-1]]]
    for view in seen:
        assert view.state == "succeeded" or (view.state == "canceled" and view.superseded_by), view
    assert sum(view.state == "canceled" for view in seen) > len(seen) // 2


def test_a_strict_route_refuses_once_it_knows_that_it_takes_too_long(client: Client, run: Run) -> None:
    for n in range(4):
        client.trigger("in_time", 0.4, deadline="60s", id=f"learn-{n}").result(timeout=30)

    def verdict() -> Quote:
        [told] = client.quote(0.4, route="in_time").events[0].routes
        assert told.quote is not None
        return told.quote

    wait_until(lambda: verdict().verdict == "infeasible")
    with pytest.raises(Infeasible) as refused:
        client.trigger("in_time", 0.4)
    assert refused.value.quote is not None
    assert refused.value.quote.p50_s is not None
    assert refused.value.quote.p50_s >= 0.4
    assert client.trigger("in_time", 0.4, deadline="60s").quote.verdict == "on_track"
