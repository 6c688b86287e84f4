"""What a function says, and what it asks for: lines in their order, progress, and files by ctx.stage and ctx.store."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from headrace.errors import BadRequest, UserError
from headrace.model import Code
from headrace.wire import JSON, Granted, Invoke
from tests.pools import MIB, NOOP, Runs, grant_nothing, pool_of
from tests.processes import until

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
        invoke, code, timeout_s=20, on_said=lambda s: None, on_line=broken, on_ask=grant_nothing
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
