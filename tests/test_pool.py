from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import cloudpickle
import msgspec
import pytest
import uvloop

from headrace.children import ChildLimits
from headrace.errors import (
    BadRequest,
    ChildLost,
    FunctionError,
    LoadError,
    OutOfMemory,
    OverLimit,
    TimeLimit,
    UserError,
)
from headrace.model import Code
from headrace.wire import JSON, PICKLE, Ask, EventMeta, Granted, Invoke, Returned, Said
from workers.pool import Pool

MIB = 1024 * 1024


class Runs:
    """A pool, and what its functions said."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.heard: list[tuple[str, str]] = []
        self.progress: list[tuple[float, str]] = []
        self.asked: list[Ask] = []
        self.grant: Granted | Exception = Granted(value="/data/file")
        self.loads = 0

    async def run(
        self,
        text: str,
        data: Any = None,
        *,
        name: str = "run",
        version: str = "",
        timeout_s: float = 30.0,
        kind: str = JSON,
        body: bytes | None = None,
        event: EventMeta | None = None,
        files: dict[str, str] | None = None,
        heard: list[tuple[str, str]] | None = None,
        tenant: str = "",
    ) -> Returned:
        text = textwrap.dedent(text)
        listen = self.heard if heard is None else heard

        async def code() -> Code:
            self.loads += 1
            return Code(kind="source", module="shot", name=name, files={**(files or {}), "shot.py": text})

        async def ask(what: Ask) -> Granted:
            self.asked.append(what)
            if isinstance(self.grant, Exception):
                raise self.grant
            return self.grant

        def said(what: Said) -> None:
            if what.fraction is None:
                listen.append((what.level, what.text))
            else:
                self.progress.append((what.fraction, what.text))

        return await self.pool.run(
            Invoke(
                run_id="r1",
                invocation_id="i1",
                attempt=1,
                function=name,
                version=version or str(hash((text, tuple(sorted((files or {}).items()))))),
                type=kind,
                body=msgspec.json.encode(data) if body is None else body,
                event=event,
                tenant=tenant,
            ),
            code,
            timeout_s=timeout_s,
            on_said=said,
            on_line=lambda stream, line: listen.append((stream, line)),
            on_ask=ask,
        )

    async def value(self, text: str, data: Any = None, **more: Any) -> Any:
        return msgspec.json.decode((await self.run(text, data, **more)).result.body)


@contextlib.asynccontextmanager
async def pool_of(
    folder: Path, slots: int = 2, *, use_groups: bool = True, disk_bytes_min: int = 0, **limits: Any
) -> AsyncIterator[Runs]:
    pool = Pool(
        slots,
        limits=ChildLimits(**limits),
        scratch=folder / "scratch",
        use_groups=use_groups,
        disk_bytes_min=disk_bytes_min,
    )
    await pool.start()
    try:
        yield Runs(pool)
    finally:
        await pool.close()
        assert list((folder / "scratch").iterdir()) == []
        assert pool.processes == 0


@pytest.fixture
async def runs(tmp_path: Path) -> AsyncIterator[Runs]:
    async with pool_of(tmp_path) as made:
        yield made


async def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.005)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


NOOP = "def run(data): return data"
PID = "import os\ndef run(data): return os.getpid()"


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


# ---------------------------------------------------------------- the user's faults


async def test_an_exception_comes_back_with_the_users_frames_only(runs: Runs) -> None:
    with pytest.raises(UserError, match=r"^ValueError: bad shot 7$") as seen:
        await runs.run("def inner(n):\n    raise ValueError(f'bad shot {n}')\ndef run(data):\n    inner(data)\n", 7)
    assert seen.value.retry
    assert 'File "shot.py", line 4, in run\n    inner(data)' in seen.value.traceback
    assert 'File "shot.py", line 2, in inner' in seen.value.traceback
    assert "headrace" not in seen.value.traceback


async def test_data_of_the_wrong_type_is_a_user_error_that_names_the_field(runs: Runs) -> None:
    text = """
        from dataclasses import dataclass
        @dataclass
        class Frame:
            shot: int
        def run(frame: Frame): ...
        """
    with pytest.raises(UserError, match=r"`frame`.*Expected `int`, got `str` - at `\$\.shot`") as seen:
        await runs.run(text, {"shot": "seven"})
    assert not seen.value.retry


async def test_a_misused_effect_is_not_worth_another_try(runs: Runs) -> None:
    with pytest.raises(UserError, match="not a valid function name") as seen:
        await runs.run("def run(data, ctx): ctx.call('no such name!', 1)")
    assert not seen.value.retry
    assert "line 1, in run" in seen.value.traceback
    assert "context.py" not in seen.value.traceback


async def test_code_that_cannot_be_loaded_is_told_and_can_be_tried_again(runs: Runs) -> None:
    for _ in range(2):
        with pytest.raises(LoadError, match="No module named 'scipy_of_the_future'") as seen:
            await runs.run("import scipy_of_the_future\ndef run(data): ...")
        assert not seen.value.retry
        assert 'File "shot.py", line 1' in seen.value.traceback
    assert runs.loads == 2


async def test_a_function_with_two_payloads_is_told_so(runs: Runs) -> None:
    with pytest.raises(LoadError, match="one payload"):
        await runs.run("def run(a, b): ...")


async def test_code_that_cannot_be_fetched_hurts_no_child(runs: Runs) -> None:
    async def missing() -> Code:
        raise BadRequest("the blob is gone")

    invoke = Invoke(run_id="r", invocation_id="i", attempt=1, function="f", version="1", type=JSON, body=b"1")
    before = {await runs.value(PID, version=v) for v in ("1", "2")}
    with pytest.raises(BadRequest, match="blob is gone"):
        await runs.pool.run(
            invoke, missing, timeout_s=5, on_said=lambda s: None, on_line=lambda s, x: None, on_ask=_grant_nothing
        )
    assert runs.pool.free == 2
    assert {await runs.value(PID, version=v) for v in ("1", "2")} == before


async def _grant_nothing(ask: Ask) -> Granted:
    return Granted()


@pytest.mark.parametrize("code", ["3", "'no beam'", ""])
async def test_sys_exit_is_a_failure_and_the_child_lives_on(runs: Runs, code: str) -> None:
    shown = code.replace("(", r"\(")
    with pytest.raises(UserError, match=rf"called sys\.exit\({shown}\)") as seen:
        await runs.run(f"import sys\ndef run(data):\n    sys.exit({code})", version="x")
    assert "line 3, in run" in seen.value.traceback
    assert await runs.value(NOOP, 1) == 1


async def test_a_keyboard_interrupt_is_a_failure_like_any_other(runs: Runs) -> None:
    with pytest.raises(UserError, match="KeyboardInterrupt"):
        await runs.run("import os, signal\ndef run(data): os.kill(os.getpid(), signal.SIGINT)\n")


async def test_names_and_messages_that_are_no_text_do_not_stop_the_answer(runs: Runs) -> None:
    with pytest.raises(UserError, match=r"\\udcff"):
        await runs.run(r"def run(data): raise ValueError('\udcff')")
    with pytest.raises(UserError, match="cannot be shown"):
        await runs.run("class E(Exception):\n    def __str__(self): 1 / 0\ndef run(data): raise E()")
    with pytest.raises(UserError, match="surrogates"):
        await runs.run(r"def run(data, ctx): ctx.emit('\udcff', 1)")


# ---------------------------------------------------------------- crashes


CRASHES = {
    "segfault": ("import ctypes\ndef run(data): ctypes.string_at(0)", "SIGSEGV"),
    "abort": ("import os\ndef run(data): os.abort()", "SIGABRT"),
    "os._exit": ("import os\ndef run(data): os._exit(3)", "exit code 3"),
    "kill": ("import os\ndef run(data): os.kill(os.getpid(), 9)", "SIGKILL.*memory"),
    "stack": ("import sys\nsys.setrecursionlimit(10**9)\ndef run(data): repr(make())\n"
              "def make():\n    x = []\n    for _ in range(10**6): x = [x]\n    return x", "SIGSEGV|RecursionError"),
}  # fmt: skip


@pytest.mark.parametrize("crash", CRASHES)
async def test_a_crash_is_told_and_the_neighbour_is_unhurt(runs: Runs, tmp_path: Path, crash: str) -> None:
    text, told = CRASHES[crash]
    gate = tmp_path / "gate"
    neighbour = asyncio.create_task(
        runs.value(
            """
            import os, time
            def run(data):
                while not os.path.exists(data): time.sleep(0.001)
                return os.getpid()
            """,
            str(gate),
        )
    )
    with pytest.raises((ChildLost, UserError), match=told) as seen:
        await runs.run(text)
    assert seen.value.retry
    gate.touch()
    pid = await neighbour
    assert await runs.value(NOOP, 1) == 1
    assert is_alive(pid)


async def test_a_segfault_tells_where_it_was(runs: Runs) -> None:
    with pytest.raises(ChildLost, match="run died with its process from SIGSEGV") as seen:
        await runs.run("import ctypes\ndef inner():\n    ctypes.string_at(0)\ndef run(data):\n    inner()")
    assert 'File "shot.py", line 5, in run\n  File "shot.py", line 3, in inner' in seen.value.traceback
    assert "runner.py" not in seen.value.traceback


async def test_a_crash_while_loading_is_a_lost_child_too(runs: Runs) -> None:
    with pytest.raises(ChildLost, match="exit code 4"):
        await runs.run("import os\nos._exit(4)\ndef run(data): ...")


async def test_what_was_printed_before_a_crash_is_kept(runs: Runs) -> None:
    with pytest.raises(ChildLost):
        await runs.run(
            "import os\ndef run(data):\n    print('last words')\n    os.write(2, b'unfinished')\n    os._exit(1)"
        )
    assert runs.heard == [("stdout", "last words"), ("stderr", "unfinished")]


async def test_memory_over_the_limit_is_told_with_the_limit(tmp_path: Path) -> None:
    async with pool_of(tmp_path, memory_bytes_max=256 * MIB) as runs:
        with pytest.raises(OutOfMemory, match="ran out of memory; its limit is 256 MiB") as seen:
            await runs.run("def run(data):\n    x = []\n    while True:\n        x.append(bytearray(10**7))")
        assert "line 4, in run" in seen.value.traceback
        assert seen.value.retry
        # What the function is born with does not count, and nothing is left of the one before.
        assert await runs.value("def run(data): return len(bytearray(150 * 2**20))") == 150 * MIB


async def test_a_child_killed_from_outside_is_replaced(runs: Runs) -> None:
    pid = await runs.value(PID)
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not is_alive(pid))
    assert await runs.value(PID) != pid
    assert runs.pool.free == 2


async def test_a_child_that_closes_all_its_files_is_told_what_it_did(runs: Runs) -> None:
    with pytest.raises(ChildLost, match="closed its line to the worker"):
        await runs.run("import os, time\ndef run(data):\n    os.closerange(3, 256)\n    time.sleep(3600)")


async def test_a_child_that_writes_into_its_line_is_told_so(runs: Runs) -> None:
    text = """
        import os, stat
        def run(data):
            for fd in range(3, 256):
                try:
                    if stat.S_ISSOCK(os.fstat(fd).st_mode):
                        os.write(fd, b"\\0\\0\\0\\3abc")
                except OSError:
                    pass
        """
    with pytest.raises(ChildLost, match="cannot be read"):
        await runs.run(text)
    assert await runs.value(NOOP, 1) == 1


async def test_a_function_that_forks_and_returns_twice_returns_once(runs: Runs) -> None:
    text = "import os\ndef run(data):\n    pid = os.fork()\n    if pid: os.waitpid(pid, 0)\n    return os.getpid()"
    first = await runs.value(text)
    assert await runs.value(text) == first


# ---------------------------------------------------------------- time limits, cancelling


async def test_a_function_that_runs_too_long_is_stopped_and_tells_where_it_was(runs: Runs) -> None:
    before = await runs.value(PID)
    with pytest.raises(TimeLimit, match=r"longer than its timeout of 0\.2 s") as seen:
        await runs.run(
            "def spin():\n    while True: pass\ndef run(data):\n    print('began')\n    spin()", timeout_s=0.2
        )
    assert seen.value.retry
    assert 'line 5, in run\n  File "shot.py", line 2, in spin' in seen.value.traceback
    assert runs.heard == [("stdout", "began")]
    assert await runs.value(PID) in (before, await runs.value(PID))
    assert runs.pool.free == 2


STUBBORN = """
    import os, signal, subprocess, sys, time
    def run(data):
        for number in range(1, 32):
            try:
                signal.signal(number, signal.SIG_IGN)
            except OSError:
                pass
        away = "import os, time; os.setsid(); print(os.getpid(), flush=True); time.sleep(3600)"
        escaped = subprocess.Popen(
            [sys.executable, "-c", "import os\\nif os.fork() == 0:\\n    " + away], stdout=subprocess.PIPE, text=True)
        daemon = int(escaped.stdout.readline())
        escaped.wait()
        near = subprocess.Popen(["sleep", "3600"])
        with open(data, "w") as file:
            file.write(f"{os.getpid()} {near.pid} {daemon} ")
        time.sleep(3600)
    """


async def pids_in(path: Path) -> list[int]:
    await until(lambda: path.exists() and path.read_text().endswith(" "))
    return [int(pid) for pid in path.read_text().split()]


async def test_a_child_that_ignores_all_signals_is_ended_with_all_that_it_started(runs: Runs, tmp_path: Path) -> None:
    told = tmp_path / "pids"
    running = asyncio.create_task(runs.run(STUBBORN, str(told), timeout_s=2.0))
    pids = await pids_in(told)
    assert all(map(is_alive, pids))
    with pytest.raises(TimeLimit):
        await running
    await until(lambda: not any(map(is_alive, pids)))
    assert await runs.value(NOOP, 1) == 1


async def test_a_canceled_invocation_ends_its_child_and_only_that(runs: Runs, tmp_path: Path) -> None:
    told = tmp_path / "pids"
    running = asyncio.create_task(runs.run(STUBBORN, str(told)))
    pids = await pids_in(told)
    other = await runs.value(PID)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await until(lambda: not any(map(is_alive, pids)))
    assert is_alive(other)
    assert await asyncio.gather(*(runs.value(NOOP, n) for n in (1, 2))) == [1, 2]


async def test_an_invocation_canceled_while_it_waits_takes_nothing(tmp_path: Path) -> None:
    async with pool_of(tmp_path, slots=1) as runs:
        gate = tmp_path / "gate"
        text = "import os, time\ndef run(data):\n    while not os.path.exists(data): time.sleep(0.001)"
        first = asyncio.create_task(runs.run(text, str(gate)))
        await asyncio.sleep(0)
        waiting = [asyncio.create_task(runs.run(NOOP, n)) for n in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        gate.touch()
        await first
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(each) for each in ended] == [asyncio.CancelledError, Returned, Returned]
        assert runs.pool.free == 1


async def test_processes_left_behind_do_not_outlive_the_invocation(runs: Runs) -> None:
    text = "import subprocess\ndef run(data): return subprocess.Popen(['sleep', '3600']).pid"
    pid = await runs.value(text)
    await until(lambda: not is_alive(pid))
    assert await runs.value(NOOP, 1) == 1


# ---------------------------------------------------------------- what is said


async def test_prints_and_log_lines_keep_their_order(runs: Runs) -> None:
    text = """
        import logging, sys
        def run(data, ctx):
            print("one")
            ctx.log.info("two %d", 2)
            print("three", file=sys.stderr)
            print("four", "and", "more", sep="\\n")
            ctx.log.warning("five")
            sys.stdout.write("unfinished")
        """
    expected = [
        ("stdout", "one"), ("info", "two 2"), ("stderr", "three"), ("stdout", "four"), ("stdout", "and"),
        ("stdout", "more"), ("warning", "five"), ("stdout", "unfinished"),
    ]  # fmt: skip
    for _ in range(20):
        runs.heard.clear()
        await runs.run(text)
        assert runs.heard == expected


async def test_what_c_code_and_subprocesses_print_belongs_to_the_invocation(runs: Runs) -> None:
    text = """
        import ctypes, os, subprocess
        libc = ctypes.CDLL(None)
        def run(data):
            libc.printf(b"printf %d\\n", data)
            subprocess.run(["echo", f"echo {data}"], check=True)
            libc.printf(b"unfinished %d", data)
            os.write(2, b"raw %d\\n" % data)
        """
    for n in range(10):
        heard: list[tuple[str, str]] = []
        await runs.run(text, n, heard=heard)
        assert [line for stream, line in heard if stream == "stderr"] == [f"raw {n}"]
        assert [line for stream, line in heard if stream == "stdout"] == [f"printf {n}", f"echo {n}", f"unfinished {n}"]


async def test_lines_come_while_the_function_still_runs(runs: Runs, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    text = "import os, time\ndef run(data):\n    print('here')\n    while not os.path.exists(data): time.sleep(0.001)"
    running = asyncio.create_task(runs.run(text, str(gate)))
    await until(lambda: runs.heard == [("stdout", "here")])
    assert not running.done()
    gate.touch()
    await running


async def test_lines_of_two_invocations_at_a_time_are_not_mixed_up(runs: Runs) -> None:
    text = """
        import os
        def run(data):
            for i in range(200):
                print(data, i)
                os.write(1, b'%d c\\n' % data)
        """
    heard: list[list[tuple[str, str]]] = [[], []]
    await asyncio.gather(*(runs.run(text, n, heard=heard[n]) for n in (0, 1)))
    for n in (0, 1):
        assert len(heard[n]) == 400
        assert {line.split()[0] for _, line in heard[n]} == {str(n)}
        assert [line for _, line in heard[n] if not line.endswith("c")] == [f"{n} {i}" for i in range(200)]


async def test_what_a_thread_prints_after_the_end_is_nobodys(runs: Runs) -> None:
    text = """
        import threading, time
        def run(data):
            def later():
                for _ in range(50):
                    print("late")
                    time.sleep(0.001)
            threading.Thread(target=later, daemon=True).start()
        """
    await runs.run(text)
    heard = list(runs.heard)
    for _ in range(10):
        await runs.run(NOOP)
    await asyncio.sleep(0)
    assert [line for line in runs.heard if line != ("stdout", "late")] == []
    assert len(heard) <= 51


async def test_a_closed_or_replaced_stdout_is_back_for_the_next_invocation(tmp_path: Path) -> None:
    async with pool_of(tmp_path, slots=1) as runs:
        await runs.run("import sys, io\ndef run(data):\n    sys.stdout.close()\n    sys.stderr = io.StringIO()")
        await runs.run("import sys\ndef run(data):\n    print('out')\n    print('err', file=sys.stderr)")
    assert runs.heard == [("stdout", "out"), ("stderr", "err")]


async def test_a_progress_bar_is_shown_in_its_last_state(runs: Runs) -> None:
    await runs.run(
        "import os\ndef run(data):\n    for i in range(101): os.write(2, b'\\r%d %%' % i)\n    os.write(2, b'\\n')"
    )
    assert runs.heard == [("stderr", "100 %")]


async def test_progress_comes_through_and_of_a_flood_the_last_always_does(runs: Runs) -> None:
    await runs.run("def run(data, ctx):\n    ctx.progress(0.5, 'half')\n    ctx.progress(1)")
    assert runs.progress == [(0.5, "half"), (1.0, "")]
    runs.progress.clear()
    await runs.run("def run(data, ctx):\n    for i in range(20001): ctx.progress(i / 20000)")
    assert 2 <= len(runs.progress) < 2000
    assert runs.progress[-1] == (1.0, "")


@pytest.mark.parametrize(
    "flood",
    [
        "import sys\ndef run(data):\n    for _ in range(100_000): print('x' * 1000)",
        "import os\ndef run(data):\n    for _ in range(2_000): os.write(1, b'x' * 50_000 + b'\\n')",
        "def run(data):\n    print('x' * 50_000_000)",
        "def run(data, ctx):\n    ctx.log.info('x' * 50_000_000)",
        "def run(data):\n    for i in range(50_000): print(i)",
    ],
)
async def test_a_flood_of_output_is_cut_with_a_note_and_the_function_goes_on(runs: Runs, flood: str) -> None:
    await runs.run(flood)
    assert sum(len(line) for _, line in runs.heard) <= MIB + 100
    assert len(runs.heard) <= 10_001
    assert runs.heard[-1][1] in ("(output cut at 1 MiB)", "(output cut at 10,000 lines)")
    assert await runs.value(NOOP, 1) == 1


async def test_a_listener_that_raises_hurts_nobody(runs: Runs) -> None:
    async def code() -> Code:
        return Code(
            kind="source", module="shot", name="run", files={"shot.py": "def run(data):\n    print(1)\n    return 2"}
        )

    def broken(stream: str, line: str) -> None:
        raise RuntimeError("the disk of the log is full")

    invoke = Invoke(run_id="r", invocation_id="i", attempt=1, function="run", version="1", type=JSON, body=b"1")
    returned = await runs.pool.run(
        invoke, code, timeout_s=20, on_said=lambda s: None, on_line=broken, on_ask=_grant_nothing
    )
    assert returned.result.body == b"2"


# ---------------------------------------------------------------- stage and store


async def test_stage_and_store_ask_the_worker_and_wait(runs: Runs) -> None:
    text = """
        import pathlib
        def run(data, ctx):
            path = ctx.stage("https://example.org/frame.npy")
            pathlib.Path("made.bin").write_bytes(b"abc")
            return [str(path), ctx.store("made.bin", "a"), ctx.store(b"small", "b"), ctx.store(bytes(100_000), "c")]
        """
    assert await runs.value(text) == ["/data/file"] * 4
    staged, made, small, large = runs.asked
    assert (staged.what, staged.uri) == ("stage", "https://example.org/frame.npy")
    assert Path(made.path).is_absolute()
    assert (small.body, small.name) == (b"small", "b")
    assert large.body is None
    assert large.path


async def test_what_the_worker_refuses_is_raised_in_the_function(runs: Runs) -> None:
    text = """
        def run(data, ctx):
            try:
                ctx.stage("x")
            except Exception as error:
                return [str(error), error.hint]
        """
    runs.grant = Granted(error="there is no such blob", hint="Look again.")
    assert await runs.value(text) == ["there is no such blob", "Look again."]
    runs.grant = BadRequest("not a URI", hint="Write one.")
    assert await runs.value(text) == ["not a URI", "Write one."]
    runs.grant = RuntimeError("a bug")
    assert (await runs.value(text))[0] == "the platform failed at ctx.stage"
    with pytest.raises(UserError, match=r"a bug|the platform failed") as seen:
        await runs.run("def run(data, ctx): ctx.stage('x')")
    assert seen.value.retry


# ---------------------------------------------------------------- limits


async def test_a_result_over_the_limit_is_refused_with_the_limit(tmp_path: Path) -> None:
    async with pool_of(tmp_path, result_bytes_max=MIB) as runs:
        assert len((await runs.run(f"def run(data): return bytes({MIB})")).result.body) == MIB
        with pytest.raises(UserError, match=r"returned 2.*MiB.*the limit is 1 MiB") as seen:
            await runs.run(f"def run(data): return bytes({2 * MIB})")
        assert not seen.value.retry
        with pytest.raises(UserError, match="the limit is 1 MiB"):
            await runs.run(f"def run(data, ctx):\n    for i in range(4): ctx.emit('t', bytes({MIB // 2}))")


async def test_a_frame_over_the_limit_is_not_even_read(runs: Runs) -> None:
    text = """
        import os, stat, time
        def run(data):
            for fd in range(3, 256):
                try:
                    if stat.S_ISSOCK(os.fstat(fd).st_mode):
                        os.write(fd, b"\\x7f\\xff\\xff\\xff")
                except OSError:
                    pass
            time.sleep(3600)
        """
    with pytest.raises(UserError, match="sent 2 GiB; the limit is 16 MiB"):
        await runs.run(text)


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


async def test_a_zygote_that_dies_takes_its_children_along_and_is_started_again(runs: Runs, tmp_path: Path) -> None:
    told = tmp_path / "pids"
    spin = "import os\ndef run(data):\n    open(data, 'w').write(f'{os.getpid()} ')\n    while True: pass"
    running = asyncio.create_task(runs.run(spin, str(told)))
    pids = await pids_in(told)
    zygote = runs.pool._zygote
    assert zygote is not None
    assert zygote.pid is not None
    os.kill(zygote.pid, signal.SIGKILL)
    with pytest.raises(ChildLost, match="parent of all children died") as seen:
        await running
    assert seen.value.retry
    assert await runs.value(NOOP, 1) == 1
    await until(lambda: not any(map(is_alive, pids)))


async def test_close_ends_what_runs_and_leaves_nothing(tmp_path: Path) -> None:
    pool = Pool(2, limits=ChildLimits(), scratch=tmp_path / "scratch")
    await pool.start()
    runs = Runs(pool)
    told = tmp_path / "pids"
    running = asyncio.create_task(runs.run(STUBBORN, str(told)))
    waiting = [asyncio.create_task(runs.run("import time\ndef run(data): time.sleep(3600)")) for _ in range(3)]
    pids = await pids_in(told)
    await pool.close()
    await pool.close()
    assert not any(map(is_alive, pids))
    for ended in await asyncio.gather(running, *waiting, return_exceptions=True):
        assert isinstance(ended, ChildLost)
        assert "stopping" in str(ended)
    assert list((tmp_path / "scratch").iterdir()) == []


WORKER = """
import asyncio, sys
from pathlib import Path
from headrace.model import Code
from headrace.children import ChildLimits
from headrace.wire import Invoke
from workers.pool import Pool

async def main():
    pool = Pool(2, limits=ChildLimits(), scratch=Path(sys.argv[1]) / "scratch")
    await pool.start()
    async def code():
        return Code(kind="source", module="shot", name="run", files={"shot.py": Path(sys.argv[2]).read_text()})
    async def ask(what): ...
    print(pool._zygote.pid, flush=True)
    await pool.run(
        Invoke(run_id="r", invocation_id="i", attempt=1, function="run", version="1", type="application/json",
               body=b'"' + sys.argv[3].encode() + b'"'),
        code, timeout_s=3600, on_said=print, on_line=print, on_ask=ask)

asyncio.run(main())
"""


async def test_nothing_outlives_a_worker_that_is_killed_and_the_next_one_sweeps_its_folders(tmp_path: Path) -> None:
    text, told = tmp_path / "shot.txt", tmp_path / "pids"
    text.write_text(textwrap.dedent(STUBBORN))
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WORKER, str(tmp_path), str(text), str(told), stdout=subprocess.PIPE
    )
    assert worker.stdout is not None
    zygote = int(await worker.stdout.readline())
    pids = [zygote, *await pids_in(told)]
    assert all(map(is_alive, pids))
    worker.kill()
    await worker.wait()
    await until(lambda: not any(map(is_alive, pids)))
    assert list((tmp_path / "scratch").iterdir()) != []
    async with pool_of(tmp_path) as runs:
        assert await runs.value(NOOP, 1) == 1
        assert len(list((tmp_path / "scratch").iterdir())) == 1


async def test_pools_may_share_a_scratch_folder(tmp_path: Path) -> None:
    other = Pool(1, limits=ChildLimits(), scratch=tmp_path / "scratch")
    await other.start()
    mine = Pool(1, limits=ChildLimits(), scratch=tmp_path / "scratch")
    await mine.start()
    assert await Runs(other).value(NOOP, 1) == 1
    await mine.close()
    assert await Runs(other).value("import os\ndef run(data): open('x', 'w').close(); return os.listdir()") == ["x"]
    await other.close()


def test_errors_of_functions_have_a_kind() -> None:
    kinds = (LoadError, UserError, OutOfMemory, OverLimit, TimeLimit, ChildLost)
    assert [kind.kind for kind in kinds] == ["load", "user", "memory", "limit", "timeout", "lost"]
    assert issubclass(ChildLost, FunctionError)
