"""Time limits, cancelling, kills: what has to end ends, with all that it started, and nothing else does."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from headrace.children import ChildLimits
from headrace.errors import ChildLost, TimeLimit
from headrace.wire import Returned
from tests.pools import NOOP, PID, STUBBORN, Runs, pids_in, pool_of
from tests.processes import alive, until
from workers.pool import Pool


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


async def test_a_child_that_ignores_all_signals_is_ended_with_all_that_it_started(runs: Runs, tmp_path: Path) -> None:
    told = tmp_path / "pids"
    running = asyncio.create_task(runs.run(STUBBORN, str(told), timeout_s=2.0))
    pids = await pids_in(told)
    assert all(map(alive, pids))
    with pytest.raises(TimeLimit):
        await running
    await until(lambda: not any(map(alive, pids)))
    assert await runs.value(NOOP, 1) == 1


async def test_a_canceled_invocation_ends_its_child_and_only_that(runs: Runs, tmp_path: Path) -> None:
    told = tmp_path / "pids"
    running = asyncio.create_task(runs.run(STUBBORN, str(told)))
    pids = await pids_in(told)
    other = await runs.value(PID)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await until(lambda: not any(map(alive, pids)))
    assert alive(other)
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
    await until(lambda: not alive(pid))
    assert await runs.value(NOOP, 1) == 1


# ---------------------------------------------------------------- the pool's own end


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
    await until(lambda: not any(map(alive, pids)))


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
    assert not any(map(alive, pids))
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
    assert all(map(alive, pids))
    worker.kill()
    await worker.wait()
    await until(lambda: not any(map(alive, pids)))
    assert list((tmp_path / "scratch").iterdir()) != []
    async with pool_of(tmp_path) as runs:
        assert await runs.value(NOOP, 1) == 1
        assert len(list((tmp_path / "scratch").iterdir())) == 1
