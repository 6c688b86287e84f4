"""A pool runs functions in children: one slot each, versions apart, tenants apart, and each in a place of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import cloudpickle
import msgspec
import pytest
import uvloop

from headrace.children import ChildLimits
from headrace.errors import ChildLost, FunctionError, TimeLimit, UserError
from headrace.wire import PICKLE, EventMeta
from tests.pools import MIB, NOOP, PID, Runs, pool_of
from tests.processes import until
from workers.pool import Pool

# ---------------------------------------------------------------- the ordinary way


async def test_a_function_is_loaded_called_and_its_result_and_effects_come_back(runs: Runs) -> None:
    returned = await runs.run(
        """
        def run(data, ctx):
            ctx.call("next", {"n": data["n"] + 1})
            ctx.answer("the answer")
            return {"n": data["n"], "ids": [ctx.run_id, ctx.invocation_id, ctx.attempt]}
        """,
        {"n": 1},
    )
    assert msgspec.json.decode(returned.result.body) == {"n": 1, "ids": ["r1", "i1", 1]}
    assert returned.answer is not None
    assert returned.answer.body == b'"the answer"'
    assert [effect.function for effect in returned.effects] == ["next"]  # type: ignore[union-attr]
    assert 0 < returned.started_at <= returned.ended_at <= time.time()


async def test_a_version_is_loaded_once_per_child_and_the_child_that_holds_it_is_preferred(runs: Runs) -> None:
    text = "import os\nprint('loading')\ndef run(data): return os.getpid()"
    pids = [await runs.value(text) for _ in range(5)]
    assert len(set(pids)) == 1
    assert runs.loads == 1
    assert runs.heard == [("stdout", "loading")]


async def test_another_version_goes_to_the_child_that_holds_fewer(runs: Runs) -> None:
    first = await runs.value(PID, version="1")
    assert await runs.value(PID, version="2") != first
    assert await runs.value(PID, version="1") == first


async def test_as_many_invocations_run_at_a_time_as_there_are_slots(runs: Runs, tmp_path: Path) -> None:
    meet = """
        import pathlib, time
        def run(data):
            here = pathlib.Path(data["folder"])
            (here / data["me"]).touch()
            while len(list(here.iterdir())) < 2:
                time.sleep(0.001)
        """
    here = tmp_path / "meet"
    here.mkdir()
    assert runs.pool.free == 2
    both = [asyncio.create_task(runs.run(meet, {"folder": str(here), "me": me})) for me in ("a", "b")]
    await asyncio.sleep(0)
    assert runs.pool.free == 0
    await asyncio.gather(*both)
    assert runs.pool.free == 2


async def test_more_invocations_than_slots_wait_for_their_turn(runs: Runs) -> None:
    assert await asyncio.gather(*(runs.value(NOOP, n) for n in range(50))) == list(range(50))
    assert runs.pool.processes == 2


PRIVATE = """
import builtins, os

def run(data):
    seen = getattr(builtins, "seen", [])
    builtins.seen = [*seen, data]
    return [os.getpid(), seen]
"""


async def test_no_code_of_one_tenant_runs_where_that_of_another_did(tmp_path: Path) -> None:
    async with pool_of(tmp_path, slots=1) as runs:
        first, seen = await runs.value(PRIVATE, "secret", tenant="a")
        assert seen == []
        other, seen = await runs.value(PRIVATE, "mine", tenant="b")
        assert (seen, other != first) == ([], True)
        # It comes back to its own process, which has the code loaded still.
        assert await runs.value(PRIVATE, "again", tenant="a") == [first, ["secret"]]
        assert runs.loads == 2


async def test_whoever_waits_longest_is_next_whosoever_process_was_free(tmp_path: Path) -> None:
    async with pool_of(tmp_path, slots=1) as runs:
        turns: list[str] = []

        async def turn(tenant: str) -> None:
            await runs.value(PRIVATE, tenant, tenant=tenant)
            turns.append(tenant)

        names = ["a", "b", "a", "c", "b"]
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for name in names:
                group.create_task(turn(name))
        assert turns == names


async def test_processes_kept_for_tenants_are_few(tmp_path: Path) -> None:
    async with pool_of(tmp_path, slots=2) as runs:
        for round_ in range(3):
            calls = [runs.value(PRIVATE, round_, tenant=f"t{n}") for n in range(6)]
            found = await asyncio.wait_for(asyncio.gather(*calls), 60)
            assert all(len(set(seen)) == len(seen) for _, seen in found)
        await until(lambda: runs.pool.processes <= 4)


async def test_it_works_the_same_on_uvloop(tmp_path: Path) -> None:
    async def story() -> None:
        async with pool_of(tmp_path) as runs:
            assert await asyncio.gather(*(runs.value(NOOP, n) for n in range(50))) == list(range(50))
            with pytest.raises(TimeLimit):
                await runs.run("def run(data):\n    while True: pass", timeout_s=0.1)
            with pytest.raises(ChildLost):
                await runs.run("import os\ndef run(data): os._exit(3)")
            assert len(await runs.value("def run(data): return 'x' * 3_000_000")) == 3_000_000
            assert await runs.value("def run(data): return len(data)", "x" * 3_000_000) == 3_000_000

    await asyncio.to_thread(_run_on_uvloop, story())


def _run_on_uvloop(story: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(story)


async def test_payloads_and_results_of_megabytes_pass(runs: Runs) -> None:
    raw = os.urandom(15 * MIB)
    returned = await runs.run("def run(raw: bytes): return raw[::-1]", body=raw, kind="application/octet-stream")
    assert returned.result.body == raw[::-1]


async def test_an_async_function_runs(runs: Runs) -> None:
    text = "import asyncio\nasync def run(data):\n    await asyncio.sleep(0)\n    return data + 1"
    assert [await runs.value(text, 1), await runs.value(text, 2)] == [2, 3]


async def test_pickled_arguments_come_back_pickled(runs: Runs) -> None:
    returned = await runs.run("def run(a, b): return {a, b}", kind=PICKLE, body=cloudpickle.dumps(((1,), {"b": 2})))
    assert returned.result.type == PICKLE
    assert cloudpickle.loads(returned.result.body) == {1, 2}


async def test_a_function_may_ask_for_the_event(runs: Runs) -> None:
    text = "from headrace import Event\ndef run(event: Event): return [event.id, event.data]"
    assert await runs.value(text, {"x": 1}, event=EventMeta(id="7", source="s", type="t")) == ["7", {"x": 1}]


# ---------------------------------------------------------------- versions


async def test_two_versions_with_files_of_the_same_names_are_apart_in_one_child(tmp_path: Path) -> None:
    text = "import helper, os\ndef run(data):\n    import late\n    return [helper.N, late.N, os.getpid()]"
    async with pool_of(tmp_path, slots=1) as runs:
        seen = [
            await runs.value(text, files={"helper.py": f"N = {n}", "late.py": f"N = {n * 10}"}) for n in (1, 2, 1, 2)
        ]
    assert [each[:2] for each in seen] == [[1, 10], [2, 20], [1, 10], [2, 20]]
    assert len({each[2] for each in seen}) == 1


async def test_files_named_like_folders_of_headrace_are_the_users(runs: Runs) -> None:
    names = ["functions", "workers", "streams", "gateway", "infra", "tests"]
    text = f"import {', '.join(names)}\ndef run(data): return [m.WHO for m in ({', '.join(names)})]"
    assert await runs.value(text, files={f"{n}.py": f"WHO = '{n}'" for n in names}) == names


# ---------------------------------------------------------------- a child and its place


async def test_a_child_is_replaced_after_its_share_of_invocations(tmp_path: Path) -> None:
    async with pool_of(tmp_path, slots=1, invocations_max=3) as runs:
        pids = [await runs.value(PID, version="1") for _ in range(9)]
    assert pids[0] == pids[1] == pids[2] != pids[3] == pids[5] != pids[6]


async def test_a_child_whose_memory_grows_is_replaced_but_not_for_what_it_keeps_from_the_start(tmp_path: Path) -> None:
    leak = """
        import os
        KEEP = [bytes(range(256)) * 200_000]
        def run(data):
            KEEP.append(bytes(range(256)) * data)
            return os.getpid()
        """
    async with pool_of(tmp_path, slots=1, growth_bytes_max=40 * MIB) as runs:
        steady = {await runs.value(leak, 1) for _ in range(5)}
        growing = {await runs.value(leak, 60_000) for _ in range(10)}
    assert len(steady) == 1
    assert len(growing) >= 3


async def test_each_invocation_starts_in_an_empty_private_folder(tmp_path: Path) -> None:
    text = """
        import os, stat, tempfile, pathlib
        def run(data):
            seen = os.listdir()
            mode = stat.S_IMODE(os.stat("..").st_mode)
            pathlib.Path("left.txt").write_text("x")
            os.makedirs("a/b")
            os.chdir("a")
            inside = pathlib.Path(tempfile.gettempdir()).is_relative_to(data)
            return [seen, mode, inside]
        """
    async with pool_of(tmp_path, slots=1) as runs:
        for _ in range(3):
            assert await runs.value(text, str(tmp_path)) == [[], 0o700, True]
        await runs.run("import os, shutil\ndef run(data): shutil.rmtree(os.getcwd())")
        assert await runs.value(text, str(tmp_path)) == [[], 0o700, True]


async def test_children_see_no_settings_of_headrace_and_no_core_files_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_NATS_PASSWORD", "canary")
    monkeypatch.setenv("OTHER", "seen")
    text = """
        import os, resource
        def run(data):
            mine = {k: v for k, v in os.environ.items() if k.startswith("HEADRACE") or v == "canary"}
            parent = open(f"/proc/{os.getppid()}/environ").read()
            return [mine, os.environ.get("OTHER"), "canary" in parent, resource.getrlimit(resource.RLIMIT_CORE)]
        """
    async with pool_of(tmp_path) as runs:
        assert await runs.value(text) == [{}, "seen", False, [0, 0]]


async def test_children_have_random_numbers_of_their_own(tmp_path: Path) -> None:
    text = "import random\nimport numpy.random\ndef run(data): return [random.random(), numpy.random.random()]"
    pool = Pool(1, limits=ChildLimits(invocations_max=1), scratch=tmp_path, preload=["numpy.random", "no_such_module"])
    await pool.start()
    drawn = [await Runs(pool).value(text, version=str(n)) for n in range(3)]
    await pool.close()
    assert len({a for a, _ in drawn}) == 3
    assert len({b for _, b in drawn}) == 3


async def test_stdin_is_empty(runs: Runs) -> None:
    with pytest.raises(UserError, match="EOFError"):
        await runs.run("def run(data): input()")


# ---------------------------------------------------------------- the pool itself


async def test_a_child_that_cannot_be_made_is_made_a_little_later(tmp_path: Path) -> None:
    async with pool_of(tmp_path, slots=1) as runs:
        folder = next((tmp_path / "scratch").iterdir())
        for number in (2, 3):
            (folder / f"child-{number}").mkdir()  # the next two will find their place taken
        os.kill(await runs.value(PID), signal.SIGKILL)
        await until(lambda: not (folder / "child-1").exists())
        assert await runs.value(NOOP, 1) == 1
        assert (folder / "child-4").exists()


async def test_children_that_cannot_live_fail_their_invocations_and_are_not_made_without_end(tmp_path: Path) -> None:
    async with pool_of(tmp_path, slots=1, memory_bytes_max=4096) as runs:
        for _ in range(3):
            with pytest.raises(FunctionError):
                await runs.run(NOOP, 1, timeout_s=10)
        assert runs.pool._made < 20


async def test_pools_may_share_a_scratch_folder(tmp_path: Path) -> None:
    other = Pool(1, limits=ChildLimits(), scratch=tmp_path / "scratch")
    await other.start()
    mine = Pool(1, limits=ChildLimits(), scratch=tmp_path / "scratch")
    await mine.start()
    assert await Runs(other).value(NOOP, 1) == 1
    await mine.close()
    assert await Runs(other).value("import os\ndef run(data): open('x', 'w').close(); return os.listdir()") == ["x"]
    await other.close()
