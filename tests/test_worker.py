"""The worker: work is taken, run in a child, and committed exactly once with its effects."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from msgspec import structs

from functions.admission import admit, body_digest
from functions.catalog import register, version_of
from headrace.children import ChildLimits
from headrace.model import Code, FunctionOptions
from headrace.wire import Cancel, EventMeta, Note, Outcome, Payload, decode, encode
from streams.blobs import FolderBlobs, check_out
from streams.follow import follow
from streams.link import Link
from streams.log import Log, Record
from streams.record import InvocationRecord, RunRecord, fold_run
from streams.stored import Stored
from streams.tables import Tables, open_tables
from streams.topology import DEFAULT_TENANT, cancel_subject, done_subject, note_subject, run_subjects
from tests.stories import route
from workers.pool import Pool
from workers.worker import Tools, Worker


class Platform:
    """What stands between an event and its answer, in one process but with real servers and real children."""

    def __init__(self, log: Log, tables: Tables, blobs: FolderBlobs) -> None:
        self.log = log
        self.tables = tables
        self.blobs = blobs
        self.count = 0

    async def deploy(self, source: str, **options: dict[str, object]) -> None:
        """Register every function that the source defines; ``options`` by function name."""
        source = dedent(source)
        names = [line[4 : line.index("(")] for line in source.splitlines() if line.startswith("def ")]
        for name in names:
            code = Code(kind="source", name=name, module="user", files={"user.py": source})
            chosen = FunctionOptions(**options.get(name, {}))  # type: ignore[arg-type] # real options
            version, content = version_of(code, chosen)
            record = register(
                name=name,
                version=version,
                options=chosen,
                code_blob=await self.blobs.put(content),
                doc="",
                tenant=DEFAULT_TENANT,
                now=time.time(),
            )
            await self.tables.versions.put(f"{name}.{version}", record)
            await self.tables.functions.put(name, record)

    async def trigger(self, name: str, data: object = None, deadline_s: float | None = 60.0, **fields: object) -> str:
        """Accept one event for a function and return the id of its run; its route has these fields."""
        self.count += 1
        body = json.dumps(data).encode()
        function = self.tables.function(DEFAULT_TENANT, name)
        assert function is not None
        admitted = admit(
            event=EventMeta(id=f"e{self.count}", source="/test", type="org.test"),
            payload=Payload(body=body, size=len(body)),
            digest=body_digest("application/json", body),
            route=route(name, function=name, **fields),
            function=function,
            tenant="default",
            now=time.time(),
            deadline=None if deadline_s is None else time.time() + deadline_s,
        )
        await self.log.append([admitted.record])
        return admitted.invocation.run_id

    async def state(self, run: str) -> tuple[RunRecord, list[InvocationRecord]]:
        end = await self.log.end_seq()
        found: list[Stored] = []
        async with aclosing(follow(self.log, [*run_subjects(run)], after=0, idle_s=1.0)) as batches:
            async for batch in batches:
                found += batch
                if found and (not batch or batch[-1].seq >= end):
                    break
        folded = fold_run(found)
        assert folded is not None
        return folded

    async def ended(self, run: str, timeout_s: float = 30.0) -> RunRecord:
        async with asyncio.timeout(timeout_s):
            while not (record := (await self.state(run))[0]).ended:
                await asyncio.sleep(0.01)
        return record

    async def answer(self, run: str) -> object:
        record = await self.ended(run)
        assert record.error is None, record.error
        assert record.answer_id is not None
        stored = await self.log.last(done_subject(run, record.answer_id))
        assert stored is not None
        outcome = decode(stored.body, Outcome)
        payload = outcome.answer if record.explicit else outcome.result
        assert payload is not None
        return json.loads(await check_out(payload, self.blobs))


@asynccontextmanager
async def working(log: Log, link: Link, folder: Path, **settings: Any) -> AsyncIterator[Platform]:
    """Have a worker at work on a log."""
    tables = await open_tables(link)
    blobs = FolderBlobs(folder / "blobs")
    pool = Pool(2, limits=ChildLimits(), scratch=folder / "scratch")
    await pool.start()
    worker = Worker(Tools(name="w1", log=log, tables=tables, blobs=blobs, pool=pool, slots=2, **settings))
    stop = asyncio.Event()
    running = asyncio.create_task(worker.run(stop))
    yield Platform(log, tables, blobs)
    stop.set()
    await running
    await pool.close()
    await tables.close()


@pytest.fixture
async def platform(log: Log, link: Link, tmp_path: Path) -> AsyncIterator[Platform]:
    async with working(log, link, tmp_path) as running:
        yield running


async def test_a_trigger_becomes_an_answer(platform: Platform) -> None:
    await platform.deploy("def double(x: int):\n    return 2 * x")
    run = await platform.trigger("double", 21)
    assert await platform.answer(run) == 42
    record, invocations = await platform.state(run)
    assert record.deadline_met is True
    assert record.spent.total_s() == pytest.approx((record.answered_at or 0) - record.accepted_at, rel=0.01)
    assert [(i.state, i.attempts, i.worker) for i in invocations] == [("succeeded", 1, "w1")]


async def test_a_chain_ends_with_the_answer_of_its_last_call(platform: Platform) -> None:
    await platform.deploy(
        """
        def first(x, ctx):
            ctx.call("second", x + 1)
        def second(x, ctx):
            ctx.call("third", x * 10)
        def third(x):
            return {"value": x}
        """
    )
    run = await platform.trigger("first", 4)
    assert await platform.answer(run) == {"value": 50}
    record, invocations = await platform.state(run)
    assert [i.function for i in invocations] == ["first", "second", "third"]
    assert record.spent.total_s() == pytest.approx((record.answered_at or 0) - record.accepted_at, rel=0.01)


async def test_a_map_joins_its_results_in_order(platform: Platform) -> None:
    await platform.deploy(
        """
        def fan(n, ctx):
            ctx.map("square", range(n), then="total")
        def square(x):
            return x * x
        def total(xs):
            return {"sum": sum(xs), "first": xs[:3], "count": len(xs)}
        """
    )
    run = await platform.trigger("fan", 40)
    assert await platform.answer(run) == {"sum": sum(x * x for x in range(40)), "first": [0, 1, 4], "count": 40}


async def test_a_map_larger_than_a_unit_is_spread_and_joined(platform: Platform) -> None:
    await platform.deploy(
        """
        def fan(n, ctx):
            ctx.map("same", range(n), then="check")
        def same(x):
            return x
        def check(xs):
            return xs == list(range(len(xs))) and len(xs)
        """
    )
    run = await platform.trigger("fan", 700)
    assert await platform.answer(run) == 700


async def test_maps_inside_maps_and_calls_beside_them_end_together(platform: Platform) -> None:
    await platform.deploy(
        """
        def top(x, ctx):
            ctx.map("row", [1, 2, 3], then="sum_rows")
            ctx.call("aside", "beside")
        def row(n, ctx):
            ctx.map("cell", range(n), then="sum_cells")
        def cell(x):
            return x
        def sum_cells(xs):
            return sum(xs)
        def sum_rows(xs, ctx):
            ctx.answer({"rows": xs})
        def aside(x):
            return x
        """
    )
    run = await platform.trigger("top")
    assert await platform.answer(run) == {"rows": [0, 1, 3]}


async def test_an_empty_map_calls_its_join_with_nothing(platform: Platform) -> None:
    await platform.deploy('def fan(x, ctx):\n    ctx.map("fan", [], then="size")\ndef size(xs):\n    return len(xs)')
    assert await platform.answer(await platform.trigger("fan")) == 0


async def test_a_failing_body_is_dead_after_its_attempts_and_says_why(platform: Platform) -> None:
    await platform.deploy('def bad(x):\n    raise ValueError("no beam")', bad={"retries": 2})
    run = await platform.trigger("bad")
    record = await platform.ended(run)
    assert (record.state, record.deadline_met) == ("failed", False)
    assert record.error is not None
    assert "ValueError: no beam" in record.error.message
    assert 'raise ValueError("no beam")' in record.error.traceback
    _, (invocation,) = await platform.state(run)
    assert (invocation.state, invocation.attempts) == ("dead", 3)


async def test_an_attempt_that_failed_is_followed_by_one_that_succeeds(platform: Platform, tmp_path: Path) -> None:
    mark = tmp_path / "seen"
    await platform.deploy(
        f"""
        def flaky(x, ctx):
            if ctx.attempt == 1:
                open({str(mark)!r}, "w").close()
                raise OSError("not yet")
            return ctx.attempt
        """,
        flaky={"retries": 3},
    )
    assert await platform.answer(await platform.trigger("flaky")) == 2
    assert mark.exists()


async def test_a_body_that_raises_has_asked_for_nothing(platform: Platform) -> None:
    await platform.deploy(
        'def bad(x, ctx):\n    ctx.call("other")\n    raise ValueError\ndef other(x):\n    return "ran"'
    )
    run = await platform.trigger("bad")
    await platform.ended(run)
    _, invocations = await platform.state(run)
    assert [i.function for i in invocations] == ["bad"]


async def test_a_child_that_dies_is_a_failed_attempt_and_the_next_runs_on(platform: Platform) -> None:
    await platform.deploy("import os\ndef die(x):\n    os._exit(7)\ndef live(x):\n    return x")
    dead, alive = await platform.trigger("die"), await platform.trigger("live", 1)
    record = await platform.ended(dead)
    assert record.error is not None
    assert record.error.kind == "lost"
    assert await platform.answer(alive) == 1


async def test_an_unknown_function_in_an_effect_is_the_users_error(platform: Platform) -> None:
    await platform.deploy('def f(x, ctx):\n    ctx.call("nowhere")')
    record = await platform.ended(await platform.trigger("f"))
    assert record.error is not None
    assert "no function named nowhere is registered" in record.error.message


async def test_one_failed_member_fails_the_run_and_the_join_does_not_start(platform: Platform) -> None:
    await platform.deploy(
        """
        def fan(n, ctx):
            ctx.map("odd", range(n), then="never")
        def odd(x):
            if x == 3:
                raise ValueError("three")
            return x
        def never(xs):
            return xs
        """
    )
    run = await platform.trigger("fan", 5)
    record = await platform.ended(run)
    assert record.state == "failed"
    assert record.error is not None
    assert "1 of 5 branches failed" in record.error.message
    assert "never" not in {i.function for i in (await platform.state(run))[1]}


async def test_what_a_function_says_is_in_the_log_before_its_outcome(platform: Platform) -> None:
    await platform.deploy(
        """
        def talk(x, ctx):
            print("out")
            ctx.log.warning("careful")
            ctx.progress(0.5, "half")
            return 1
        """
    )
    run = await platform.trigger("talk")
    record = await platform.ended(run)
    stored = await platform.log.last(note_subject(run, record.answer_id or "", 1))
    assert stored is not None
    note = decode(stored.body, Note)
    assert sorted(note.lines) == [("stdout", "out"), ("warning", "careful")]
    assert (note.fraction, note.text) == (0.5, "half")
    outcome = await platform.log.last(done_subject(run, record.answer_id or ""))
    assert outcome is not None
    assert stored.seq < outcome.seq


async def test_a_canceled_run_stops_its_child_and_drops_what_waits(platform: Platform, tmp_path: Path) -> None:
    started = tmp_path / "started"
    await platform.deploy(
        f"""
        import time
        def slow(x):
            open({str(started)!r}, "w").close()
            time.sleep(600)
        def quick(x):
            return x
        """
    )
    run = await platform.trigger("slow")
    async with asyncio.timeout(20):
        while not started.exists():
            await asyncio.sleep(0.01)
    subject = cancel_subject(run)
    await platform.log.append([Record(subject, encode(Cancel(run_id=run, at=time.time())), subject)])
    assert (await platform.ended(run)).state == "canceled"
    # Both slots are free again although the body would have slept for ten minutes.
    runs = [await platform.trigger("quick", n) for n in range(4)]
    assert [await platform.answer(r) for r in runs] == [0, 1, 2, 3]


async def test_the_same_work_delivered_twice_has_its_effects_once(platform: Platform) -> None:
    await platform.deploy('def f(x, ctx):\n    ctx.call("g", x)\ndef g(x):\n    return x')
    run = await platform.trigger("f", 5)
    assert await platform.answer(run) == 5
    first = await platform.log.last(f"hr.work.*.default.{run}.*")
    assert first is not None
    _, before = await platform.state(run)
    lane = "11" if not first.subject.startswith("hr.work.11.") else "10"
    parts = first.subject.split(".")
    await platform.log.append([Record(".".join([*parts[:2], lane, *parts[3:]]), first.body)])
    await platform.answer(await platform.trigger("g", 1))
    _, after = await platform.state(run)
    assert [structs.replace(i, seq=0) for i in after] == [structs.replace(i, seq=0) for i in before]


async def test_a_delayed_call_waits(platform: Platform) -> None:
    await platform.deploy(
        "import time\ndef f(x, ctx):\n    ctx.call('g', time.time(), delay=0.6)\ndef g(t):\n    return time.time() - t"
    )
    waited = await platform.answer(await platform.trigger("f"))
    assert isinstance(waited, float)
    assert waited >= 0.55


async def test_a_large_result_travels_by_claim_check(platform: Platform) -> None:
    await platform.deploy("def big(n):\n    return 'x' * n")
    run = await platform.trigger("big", 200_000)
    assert await platform.answer(run) == "x" * 200_000
    stored = await platform.log.last(done_subject(run, "*"))
    assert stored is not None
    assert len(stored.body) < 2000


async def test_a_payload_that_is_gone_is_told_and_not_tried_for_ever(platform: Platform) -> None:
    await platform.deploy("def f(x):\n    return x")
    function = platform.tables.function(DEFAULT_TENANT, "f")
    assert function is not None
    admitted = admit(
        event=EventMeta(id="gone", source="/test", type="org.test"),
        payload=Payload(blob="0" * 64, size=100_000),
        digest="",
        route=route("f", function="f"),
        function=function,
        tenant="default",
        now=time.time(),
        deadline=None,
    )
    await platform.log.append([admitted.record])
    record = await platform.ended(admitted.invocation.run_id)
    assert record.state == "failed"
    assert record.error is not None
    assert "no content with the digest" in record.error.message
