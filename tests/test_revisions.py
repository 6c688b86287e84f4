"""Revisions: what is read at the door, what follows from it, and that the order of arrival does not matter."""

from __future__ import annotations

import asyncio
import json
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functions.admission import Admitted, admit
from functions.effects import succeed
from functions.outcomes import World
from functions.retraction import RETRACTED_TYPE, retract
from functions.revisions import ORDINARY, Standing, standing
from functions.voevent import CITATIONS_MAX, PACKET_BYTES_MAX
from headrace import function, on
from headrace.errors import BadRequest, TooLarge
from headrace.model import EventFilter, Revision, Route
from headrace.revision import revision_of
from headrace.sdk import declaration
from headrace.wire import (
    NOTHING,
    RETRACTER,
    Cancel,
    Emit,
    EventMeta,
    Invocation,
    Payload,
    RouteRecord,
    decode,
    encode,
)
from streams.log import READ_MANY_MAX, AlreadyThere, Record
from streams.record import RunRecord, fold_run
from streams.stored import Stored
from streams.threads import PLAIN, REPLACES, RETRACTS, membership, settle
from streams.topology import cancel_subject, run_subjects, thread_subject
from tests import stories
from tests.doubles import MemoryLog

NOTICES = Path(__file__).parent / "data" / "notices"
COUNTED = {"key": "subject", "kind": "data.kind", "retraction": ["withdrawn"], "order": "data.n"}


def route(**revision: Any) -> RouteRecord:
    told = revision_of(revision)
    return RouteRecord(name="alerts", tenant="default", route=Route(function="f", revision=told))


def read(data: object, event: dict[str, Any] | None = None, **revision: Any) -> Standing:
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    kind = "application/xml" if revision.get("preset") == "voevent" else "application/json"
    meta = EventMeta(**{"id": "e1", "source": "/s", "type": "org.test", **(event or {})})
    return standing(route(**revision), meta, Payload(type=kind, body=body, size=len(body)))


def keys(found: Standing) -> dict[str, int]:
    return {place.key: place.rank[0] for place in found.places}


# ---------------------------------------------------------------- what a route may say


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ({}, "neither a preset nor a key"),
        ({"preset": "lvk", "key": "subject"}, "key"),
        ({"preset": "ivoa"}, "preset"),
        ({"key": "data"}, "key"),
        ({"key": "data..id"}, "key"),
        ({"key": "Data.id"}, "key"),
        ({"key": "subject", "order": "data.a b"}, "order"),
        ({"key": "subject", "kind": "data.kind"}, "retraction"),
        ({"key": "subject", "retraction": ["x"]}, "kind"),
        ({"key": "subject", "kind": "data.kind", "retraction": [""]}, "retraction"),
        ({"key": "subject", "retractions": ["x"]}, "retractions"),
        ({"key": 7}, "key"),
    ],
)
def test_a_revision_that_cannot_work_is_refused_and_the_message_names_the_field(told: Any, named: str) -> None:
    with pytest.raises(BadRequest) as refused:
        revision_of(told)
    assert named in str(refused.value)
    assert str(refused.value).startswith("revision: ")


def test_a_function_declares_its_revision_and_a_new_name_keeps_it() -> None:
    @function(name="other")
    @on(type="igwn.gwalert", revision={"preset": "lvk"})
    def triage(alert: dict[str, Any]) -> None: ...

    made = declaration(triage)
    assert made is not None
    assert made.routes["other"] == Route(
        function="other", filter=made.routes["other"].filter, revision=Revision(preset="lvk")
    )


# ---------------------------------------------------------------- what is read


def test_a_route_without_a_revision_reads_nothing() -> None:
    plain = RouteRecord(name="r", tenant="default", route=Route(function="f"))
    assert standing(plain, EventMeta(id="e", source="s", type="x"), Payload(body=b"{")) is ORDINARY


def test_an_lvk_alert_and_its_retraction_are_one_thread() -> None:
    alert = read((NOTICES / "igwn_gwalert_preliminary.json").read_bytes(), preset="lvk")
    retraction = read((NOTICES / "igwn_gwalert_retraction.json").read_bytes(), {"id": "e2"}, preset="lvk")
    assert (keys(alert), alert.retraction) == ({"MS260605l": PLAIN}, False)
    assert (keys(retraction), retraction.retraction) == ({"MS260605l": RETRACTS}, True)
    assert alert.places[0].thread == retraction.places[0].thread
    assert alert.places[0].rank < retraction.places[0].rank


def test_a_gcn_notice_is_ranked_by_its_number_and_belongs_to_its_mission_instrument_and_id() -> None:
    notice = {"mission": "M", "instrument": "I", "id": ["7", "bn7"], "alert_datetime": "2023-01-01T03:24:36.0Z"}
    first = read({**notice, "alert_type": "initial", "record_number": 1}, preset="gcn")
    later = read({**notice, "alert_type": "update", "record_number": 2}, preset="gcn")
    gone = read({**notice, "alert_type": "retraction", "record_number": 1}, preset="gcn")
    assert keys(first) == {"M/I/7": PLAIN, "M/I/bn7": PLAIN}
    assert first.places[0].rank < later.places[0].rank < gone.places[0].rank
    assert gone.retraction


def test_a_gcn_notice_that_names_no_thing_or_repeats_a_detection_is_an_ordinary_event() -> None:
    assert read({"mission": "M", "flux": 1.0}, preset="gcn") == ORDINARY
    assert read({"id": "7", "alert_type": "subsequent"}, preset="gcn") == ORDINARY
    assert keys(read({"id": "7"}, preset="gcn")) == {"//7": PLAIN}


def test_exercises_have_threads_of_their_own() -> None:
    assert keys(read({"id": "7", "alert_tense": "test", "alert_type": "retraction"}, preset="gcn")) == {
        "//7 (test)": RETRACTS
    }
    assert list(keys(read((NOTICES / "no_namespace_packet.xml").read_bytes(), preset="voevent"))) == [
        "ivo://com.dc3/dc3.broker#BrokerTest-2014-02-24T15:55:27.72 (test)"
    ]


def voevent(*citations: tuple[str, str], name: str = "ivo://x#2", date: str = "2020-01-01T00:00:00") -> bytes:
    cited = "".join(f'<EventIVORN cite="{kind}"> {ivorn} </EventIVORN>' for ivorn, kind in citations)
    return (
        f'<?xml version="1.0"?><v:VOEvent xmlns:v="http://www.ivoa.net/xml/VOEvent/v2.0" ivorn="{name}" '
        f'role="observation"><Who><Date>{date}</Date></Who><Citations>{cited}</Citations></v:VOEvent>'
    ).encode()


def test_a_voevent_stands_at_its_own_name_and_above_what_it_supersedes_or_retracts() -> None:
    found = read(
        voevent(("ivo://x#1", "supersedes"), ("ivo://x#0", "retraction"), ("ivo://y", "followup")), preset="voevent"
    )
    assert keys(found) == {"ivo://x#2": PLAIN, "ivo://x#1": REPLACES, "ivo://x#0": RETRACTS}
    assert found.retraction


def test_voevents_of_all_versions_are_read() -> None:
    swift = read((NOTICES / "SWIFT_xrt_position_v1.1_example.xml").read_bytes(), preset="voevent")
    assert keys(swift) == {"ivo://nasa.gsfc.gcn/SWIFT#XRT_Pos_644259-941": PLAIN}  # it follows up, and replaces nothing
    lvc = read((NOTICES / "LVC_MS191201o-1-Preliminary.xml").read_bytes(), preset="voevent")
    assert lvc.places[0].rank[2] == 1575219408.0


BOMB = b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><VOEvent ivorn="i">&b;</VOEvent>'


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "no element found"),
        (b"{}", "not well-formed"),
        (BOMB, "document type"),
        (b'<!DOCTYPE VOEvent SYSTEM "file:///etc/passwd"><VOEvent ivorn="i"/>', "document type"),
        (b'<VOEvent ivorn="i">&undefined;</VOEvent>', "undefined entity"),
        (b"<quakeml/>", "quakeml"),
        (b"<VOEvent/>", "ivorn"),
        (b'<?xml version="1.0" encoding="no-such"?><VOEvent ivorn="i"/>', "unknown encoding"),
        (b'<VOEvent ivorn="i">' + b"<a>" * 100 + b"</a>" * 100 + b"</VOEvent>", "nested"),
        (voevent(("", "retraction")), "empty"),
        (voevent(("x" * 300, "retraction")), "longer"),
        (voevent(*[(f"ivo://{n}", "followup") for n in range(CITATIONS_MAX + 1)]), "cites more"),
        (voevent(date="yesterday"), "Who/Date"),
    ],
)
def test_what_is_no_voevent_is_refused_and_the_message_names_the_route(body: bytes, says: str) -> None:
    with pytest.raises(BadRequest) as refused:
        read(body, preset="voevent")
    assert says in str(refused.value)
    assert "alerts" in str(refused.value)


def test_a_voevent_has_a_limit_and_names_a_bounded_number_of_things() -> None:
    with pytest.raises(TooLarge):
        read(b" " * (PACKET_BYTES_MAX + 1), preset="voevent")
    with pytest.raises(TooLarge, match="33 things"):
        read(voevent(*[(f"ivo://{n}", "retraction") for n in range(32)]), preset="voevent")


@pytest.mark.parametrize(
    ("data", "event", "named"),
    [
        ({"n": 1}, {}, "subject"),
        ({}, {"subject": "s"}, "data.n"),
        ({"n": "first"}, {"subject": "s"}, "data.n"),
        ({"n": True}, {"subject": "s"}, "data.n"),
        ({"n": 1, "kind": ["withdrawn"]}, {"subject": "s"}, "data.kind"),
        ({"n": 1}, {"subject": "s" * 300}, "subject"),
        ([1, 2], {"subject": "s"}, "data.n"),
    ],
)
def test_what_the_route_needs_and_is_not_there_is_refused_by_path_and_route(data: Any, event: Any, named: str) -> None:
    with pytest.raises(BadRequest) as refused:
        read(data, event, **COUNTED)
    assert str(refused.value).startswith(named)
    assert "alerts" in str(refused.value)


def test_paths_reach_attributes_extensions_and_data() -> None:
    event = {"subject": "s", "extensions": {"sequence": "2020-01-01T00:00:00Z"}}
    found = read({"a": {"$b": 12}}, event, key="data.a.$b", order="sequence")
    assert (found.places[0].key, found.places[0].rank) == ("12", (PLAIN, 1577836800.0, 0.0, "e1"))


def test_without_an_order_events_are_ranked_by_time_and_need_one() -> None:
    timed = {"subject": "s", "time": "1970-01-01T00:00:09Z"}
    assert read({}, timed, key="subject").places[0].rank == (PLAIN, 0.0, 9.0, "e1")
    with pytest.raises(BadRequest, match="time"):
        read({}, {"subject": "s"}, key="subject")


def test_a_retraction_needs_no_order() -> None:
    assert read({"kind": "withdrawn"}, {"subject": "s"}, **COUNTED).retraction


def test_a_key_is_looked_for_in_json_only() -> None:
    meta = EventMeta(id="e", source="s", type="x")
    with pytest.raises(BadRequest, match="text/plain"):
        standing(route(preset="lvk"), meta, Payload(type="text/plain", body=b"superevent"))


# ---------------------------------------------------------------- what follows


def admitted(alerts: RouteRecord, event: EventMeta, payload: Payload) -> Admitted:
    return admit(
        event=event,
        payload=payload,
        digest="",
        route=alerts,
        function=stories.function(),
        tenant="default",
        now=1000.0,
        deadline=None,
        revises=standing(alerts, event, payload),
    )


def accept(event_id: str, data: dict[str, Any], key: str = "k") -> Admitted:
    """Admit a notice on a route that counts its notices."""
    event = EventMeta(id=event_id, source="/s", type="org.test", subject=key)
    return admitted(route(**COUNTED), event, Payload(body=json.dumps(data).encode()))


INITIAL, UPDATE, GONE = accept("i", {"n": 1}), accept("u", {"n": 2}), accept("r", {"n": 3, "kind": "withdrawn"})


async def state(log: MemoryLog, one: Admitted) -> RunRecord:
    folded = fold_run(await log.last_of_each(run_subjects(one.invocation.run_id)))
    assert folded is not None
    return folded[0]


def seen(record: RunRecord) -> tuple[object, ...]:
    return record.state, record.superseded_by, record.retracted_by, record.error


async def play(accepted: list[Admitted], settled: list[Admitted]) -> dict[str, tuple[object, ...]]:
    """Accept in one order and settle in another; return how the runs stand by the id of their event."""
    log = MemoryLog()
    for one in accepted:
        await log.append(one.records)
    for one in settled:
        await settle(log, one.invocation, 1001.0)
    found = {}
    for one in accepted:
        event = one.invocation.event
        assert event is not None
        found[event.id] = seen(await state(log, one))
    return found


def test_a_retraction_is_done_by_the_platform_and_however_late() -> None:
    assert GONE.invocation.function == RETRACTER
    assert GONE.invocation.on_late == "continue"
    assert INITIAL.invocation.function == "f"
    assert [r.subject.split(".")[1] for r in INITIAL.records] == ["work", "thread"]


async def test_every_order_of_initial_update_and_retraction_ends_in_the_same_state() -> None:
    ends = []
    for order in permutations([INITIAL, UPDATE, GONE]):
        log = MemoryLog()
        for one in order:  # as a gateway does
            await log.append(one.records)
            await settle(log, one.invocation, 1001.0)
        ends.append([seen(await state(log, one)) for one in (INITIAL, UPDATE, GONE)])
    gone = GONE.invocation.run_id
    for end in ends:
        assert end == ends[0]
    initial, update, last = ends[0]
    assert (initial[0], initial[2], update[2]) == ("canceled", gone, gone)
    assert last == ("accepted", None, None, None)


NOTICE = st.tuples(st.sampled_from(["", "", "", "withdrawn"]), st.integers(0, 4))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), notices=st.lists(NOTICE, min_size=1, max_size=7))
def test_no_order_of_acceptance_and_settling_changes_the_end(
    data: st.DataObject, notices: list[tuple[str, int]]
) -> None:
    """Every event is settled at least once after it is accepted, by whomever and whenever, and perhaps again."""
    events = [
        accept(f"e{n}", {"n": order, "kind": kind} if kind else {"n": order}) for n, (kind, order) in enumerate(notices)
    ]
    ends = []
    for _ in range(2):
        log = MemoryLog()

        async def run(log: MemoryLog = log) -> dict[str, tuple[object, ...]]:
            waiting = list(data.draw(st.permutations(events)))
            unsettled: list[Admitted] = []
            accepted: list[Admitted] = []
            while waiting or unsettled:
                if waiting and (not unsettled or data.draw(st.booleans())):
                    one = waiting.pop()
                    await log.append(one.records)
                    accepted.append(one)
                    unsettled.append(one)
                else:
                    one = unsettled[data.draw(st.integers(0, len(unsettled) - 1))]
                    again = data.draw(st.booleans()) and data.draw(st.booleans())
                    await settle(log, one.invocation, 1001.0)
                    if not again:
                        unsettled.remove(one)
            return {one.invocation.run_id: seen(await state(log, one)) for one in events}

        ends.append(asyncio.run(run()))
    assert ends[0] == ends[1]

    # And the end is the one that the ranks say, not only the same one.
    ranked = sorted(events, key=lambda one: one.invocation.places[0].rank)
    plain = [one.invocation.run_id for one in ranked if one.invocation.function != RETRACTER]
    gone = [one.invocation.run_id for one in ranked if one.invocation.function == RETRACTER]
    for runs in (plain, gone):
        for n, run_id in enumerate(runs):
            retracted = gone[-1] if gone and runs is plain else None
            superseded = runs[n + 1] if retracted is None and n + 1 < len(runs) else None
            assert ends[0][run_id][1:3] == (superseded, retracted)
            assert ends[0][run_id][0] == ("canceled" if retracted or superseded else "accepted")


class SlowLog(MemoryLog):
    """A log whose answers and acknowledgements take their time, so that one who settles acts on what was so before."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._rng = Random(seed)

    async def pause(self) -> None:
        for _ in range(self._rng.randrange(12)):
            await asyncio.sleep(0)

    async def append(self, unit: list[Record], *, timeout_s: float = 10.0) -> list[int]:
        await self.pause()
        return await super().append(unit, timeout_s=timeout_s)

    async def last_of_each(self, subjects: list[str]) -> list[Stored]:
        found = await super().last_of_each(subjects)
        await self.pause()
        return found


@settings(max_examples=100, deadline=None)
@given(seeds=st.tuples(st.integers(), st.integers()), notices=st.lists(NOTICE, min_size=2, max_size=6))
def test_all_at_the_same_time_end_as_one_after_the_other(
    seeds: tuple[int, int], notices: list[tuple[str, int]]
) -> None:
    events = [
        accept(f"e{n}", {"n": order, "kind": kind} if kind else {"n": order}) for n, (kind, order) in enumerate(notices)
    ]

    async def run(seed: int) -> list[tuple[object, ...]]:
        log = SlowLog(seed)

        async def one(event: Admitted) -> None:
            await log.append(event.records)
            await asyncio.gather(*(settle(log, event.invocation, 1001.0) for _ in range(2)))  # a gateway and a worker

        await asyncio.gather(*(one(event) for event in events))
        return [seen(await state(log, event)) for event in events]

    async def in_turn() -> list[tuple[object, ...]]:
        log = MemoryLog()
        for event in events:
            await log.append(event.records)
            await settle(log, event.invocation, 1001.0)
        return [seen(await state(log, event)) for event in events]

    expected = asyncio.run(in_turn())
    assert [asyncio.run(run(seed)) for seed in seeds] == [expected, expected]


async def test_settling_twice_says_nothing_twice() -> None:
    log = MemoryLog()
    for one in (INITIAL, UPDATE, GONE):
        await log.append(one.records)
        for _ in range(3):
            await settle(log, one.invocation, 1001.0)
    # The update superseded the initial one, and the retraction took both back.
    said = [s.subject for s in log.stored if s.subject.startswith("hr.cancel.")]
    assert len(said) == len(set(said)) == 3


async def test_a_membership_that_a_power_cut_tore_off_is_said_again() -> None:
    log = MemoryLog()
    await log.append(UPDATE.records[:1])
    await log.append(INITIAL.records)
    assert not (await settle(log, UPDATE.invocation, 1001.0)).overruled
    assert (await settle(log, INITIAL.invocation, 1001.0)).overruled
    assert (await state(log, INITIAL)).superseded_by == UPDATE.invocation.run_id


async def test_what_was_read_before_oneself_is_in_it_is_not_believed() -> None:
    """A copy of the log that is behind shows a thread without the one who asks."""
    log = MemoryLog()
    await log.append(INITIAL.records)
    await log.append(UPDATE.records)
    real, behind = log.last_of_each, [True]

    async def late(subjects: list[str]) -> Any:
        found = await real(subjects)
        return [s for s in found if s.seq < 3] if behind and behind.pop() else found

    log.last_of_each = late  # type: ignore[method-assign]
    assert (await settle(log, UPDATE.invocation, 1001.0)).over == [INITIAL.invocation.run_id]


async def test_a_run_that_has_ended_keeps_its_end_and_is_marked() -> None:
    log = MemoryLog()
    await log.append(INITIAL.records)
    await log.append(stories.success(INITIAL.invocation))
    await log.append(GONE.records)
    await settle(log, GONE.invocation, 1001.0)
    assert seen(await state(log, INITIAL)) == ("succeeded", None, GONE.invocation.run_id, None)


async def test_a_run_that_a_user_canceled_before_stays_canceled_by_the_user_and_is_marked() -> None:
    log = MemoryLog()
    await log.append(INITIAL.records)
    run = INITIAL.invocation.run_id
    log.put(cancel_subject(run), encode(Cancel(run_id=run, at=1.0, reason="enough")))
    await log.append(GONE.records)
    await settle(log, GONE.invocation, 1001.0)
    record = await state(log, INITIAL)
    assert record.error is not None
    assert (record.error.kind, record.error.message) == ("canceled", "enough")
    assert record.retracted_by == GONE.invocation.run_id


async def test_a_retraction_of_nothing_stands_for_what_comes_later() -> None:
    log = MemoryLog()
    await log.append(GONE.records)
    assert await settle(log, GONE.invocation, 1001.0) == (False, [])
    await log.append(INITIAL.records)
    assert (await settle(log, INITIAL.invocation, 1001.0)).overruled


async def test_what_a_run_emits_after_it_was_overruled_starts_nothing() -> None:
    log = MemoryLog()
    await log.append(INITIAL.records)
    listener = RouteRecord(name="l", tenant="default", route=Route(function="f", filter=EventFilter(type="seen")))
    _, late = succeed(
        INITIAL.invocation,
        stories.tried(),
        result=NOTHING,
        answer=None,
        effects=[Emit(type="seen", payload=NOTHING)],
        kept={},
        world=World(function=lambda _: stories.function(), routes=[listener], now=1002.0),
    )
    await log.append(GONE.records)
    await settle(log, GONE.invocation, 1001.0)
    with pytest.raises(AlreadyThere):
        await log.append(late)


async def test_a_retraction_tells_it_in_one_event_to_the_routes_that_take_it() -> None:
    listener = RouteRecord(
        name="l", tenant="default", route=Route(function="f", filter=EventFilter(type=RETRACTED_TYPE))
    )
    world = World(function=lambda _: stories.function(), routes=[listener], now=1002.0)
    outcome, unit = retract(GONE.invocation, stories.tried(), ["r1"], world)
    assert outcome.result is not None
    assert json.loads(outcome.result.body) == {"retracted": ["k"]}
    work, done = unit
    assert done.subject.startswith("hr.done.")
    told = decode(work.body, Invocation)
    assert told.event is not None
    assert (told.event.type, told.event.subject) == (RETRACTED_TYPE, "k")
    assert json.loads(told.payload.body)["runs"] == ["r1"]
    # The same attempt again makes the same event: whoever takes it runs once.
    assert decode(retract(GONE.invocation, stories.tried(), ["r1"], world)[1][0].body, Invocation).run_id == told.run_id


async def test_another_key_is_another_thread() -> None:
    log = MemoryLog()
    other = accept("o", {"n": 1}, key="other")
    await log.append(other.records)
    await log.append(GONE.records)
    assert (await settle(log, GONE.invocation, 1001.0)).over == []


async def test_a_thread_has_a_limit_and_the_error_names_the_route_and_the_key() -> None:
    log = MemoryLog()
    thread = INITIAL.invocation.places[0].thread
    member = membership(INITIAL.invocation)[0]
    for n in range(READ_MANY_MAX + 1):
        log.put(thread_subject(thread, f"r{n}"), member.body)
    with pytest.raises(TooLarge, match="1,000 events on the route alerts share the key 'k'"):
        await settle(log, INITIAL.invocation, 1001.0)


async def test_one_more_event_of_a_long_thread_costs_two_messages() -> None:
    log = MemoryLog()
    many = [accept(f"e{n}", {"n": n}) for n in range(40)]
    for one in many:
        await log.append(one.records)
        await settle(log, one.invocation, 1001.0)
    before = len(log.stored)
    between = accept("between", {"n": 20.5})
    await log.append(between.records)
    await settle(log, between.invocation, 1001.0)
    assert len(log.stored) - before - len(between.records) == 2
    await log.append(GONE.records)
    assert len((await settle(log, GONE.invocation, 1001.0)).over) == 41


async def test_a_chain_of_voevents_ends_the_same_in_every_order() -> None:
    """B supersedes A, and C retracts B without a word of A, which stays superseded by what was retracted."""
    alerts = route(preset="voevent")

    def packet(name: str, *citations: tuple[str, str]) -> Admitted:
        body = voevent(*citations, name=name)
        event = EventMeta(id=name, source="/s", type="org.test")
        return admitted(alerts, event, Payload(type="application/xml", body=body))

    a, b, c = packet("a"), packet("b", ("a", "supersedes")), packet("c", ("b", "retraction"))
    orders = list(permutations([a, b, c]))
    ends = [await play(list(accepted), list(settled)) for accepted in orders for settled in orders]
    assert all(end == ends[0] for end in ends)
    assert ends[0]["a"][1:3] == (b.invocation.run_id, None)
    assert ends[0]["b"][1:3] == (None, c.invocation.run_id)


async def test_a_mark_is_what_a_cancel_carries() -> None:
    log = MemoryLog()
    await log.append(INITIAL.records)
    await log.append(GONE.records)
    await settle(log, GONE.invocation, 1001.0)
    stored = await log.last(cancel_subject(INITIAL.invocation.run_id, "*"))
    assert stored is not None
    told = decode(stored.body, Cancel)
    assert told.by is not None
    assert (told.by.kind, told.by.run_id, told.at) == ("retracted", GONE.invocation.run_id, 1001.0)
