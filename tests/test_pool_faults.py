"""What goes wrong in a function is told as it was, the child dies at most, and its neighbour is unhurt."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

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
from headrace.wire import JSON, Invoke
from tests.pools import MIB, NOOP, PID, Runs, grant_nothing, pool_of
from tests.processes import alive, until

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
            invoke, missing, timeout_s=5, on_said=lambda s: None, on_line=lambda s, x: None, on_ask=grant_nothing
        )
    assert runs.pool.free == 2
    assert {await runs.value(PID, version=v) for v in ("1", "2")} == before


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
    assert alive(pid)


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
    await until(lambda: not alive(pid))
    assert await runs.value(PID) != pid
    assert runs.pool.free == 2


async def test_a_child_that_closes_all_its_files_is_told_what_it_did(runs: Runs) -> None:
    with pytest.raises(ChildLost, match="closed its line to the worker"):
        await runs.run("import os, time\ndef run(data):\n    os.closerange(3, 256)\n    time.sleep(3600)")


WRITES_INTO_ITS_LINE = """
    import os, stat, time
    def run(data):
        for fd in range(3, 256):
            try:
                if stat.S_ISSOCK(os.fstat(fd).st_mode):
                    os.write(fd, data.encode("latin-1"))
            except OSError:
                pass
        time.sleep(3600)
    """


async def test_a_child_that_writes_into_its_line_is_told_so(runs: Runs) -> None:
    with pytest.raises(ChildLost, match="cannot be read"):
        await runs.run(WRITES_INTO_ITS_LINE, "\0\0\0\3abc")
    assert await runs.value(NOOP, 1) == 1


async def test_a_function_that_forks_and_returns_twice_returns_once(runs: Runs) -> None:
    text = "import os\ndef run(data):\n    pid = os.fork()\n    if pid: os.waitpid(pid, 0)\n    return os.getpid()"
    first = await runs.value(text)
    assert await runs.value(text) == first


# ---------------------------------------------------------------- too much


async def test_a_result_over_the_limit_is_refused_with_the_limit(tmp_path: Path) -> None:
    async with pool_of(tmp_path, result_bytes_max=MIB) as runs:
        assert len((await runs.run(f"def run(data): return bytes({MIB})")).result.body) == MIB
        with pytest.raises(UserError, match=r"returned 2.*MiB.*the limit is 1 MiB") as seen:
            await runs.run(f"def run(data): return bytes({2 * MIB})")
        assert not seen.value.retry
        with pytest.raises(UserError, match="the limit is 1 MiB"):
            await runs.run(f"def run(data, ctx):\n    for i in range(4): ctx.emit('t', bytes({MIB // 2}))")


async def test_a_frame_over_the_limit_is_not_even_read(runs: Runs) -> None:
    with pytest.raises(UserError, match="sent 2 GiB; the limit is 16 MiB"):
        await runs.run(WRITES_INTO_ITS_LINE, "\x7f\xff\xff\xff")


def test_errors_of_functions_have_a_kind() -> None:
    kinds = (LoadError, UserError, OutOfMemory, OverLimit, TimeLimit, ChildLost)
    assert [kind.kind for kind in kinds] == ["load", "user", "memory", "limit", "timeout", "lost"]
    assert issubclass(ChildLost, FunctionError)
