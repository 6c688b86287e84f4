"""What a function takes too much of is refused or ends it, with the limit in the message, and hurts nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import shutil
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from headrace import Client, groups
from headrace.errors import FunctionError, OutOfMemory, OverLimit, TimeLimit, TooLarge, UserError
from tests.platforms import UpProcess
from tests.pools import MIB, NOOP, PID, Runs, pool_of
from tests.processes import alive, until
from workers.watch import LOOK_S

TASKS_MAX = 64
SLOT_BACK_S = 2.0

find_groups = functools.cache(groups.find)


@pytest.fixture(params=["groups", "counting"])
def means(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Both ways to hold a child to its number of processes."""
    if request.param == "groups" and find_groups() is None:
        pytest.skip("no control group for processes can be made here: that needs root, or Delegate=pids of systemd")
    return {"use_groups": request.param == "groups"}


@contextlib.asynccontextmanager
async def neighbour(runs: Runs, tmp_path: Path) -> AsyncIterator[None]:
    """Another function that runs beside what is tried, and has to come through it."""
    gate = tmp_path / "gate"
    waiting = asyncio.create_task(
        runs.value(
            """
            import os, time
            def run(data):
                open(data + ".began", "w").close()
                while not os.path.exists(data): time.sleep(0.001)
                return os.getpid()
            """,
            str(gate),
        )
    )
    await until(lambda: (tmp_path / "gate.began").exists())
    try:
        yield
    finally:
        gate.touch()
    pid = await waiting
    assert await runs.value(NOOP, 1) == 1
    assert alive(pid)
    gate.unlink()
    (tmp_path / "gate.began").unlink()


async def refused(runs: Runs, text: str, match: str, data: Any = None, timeout_s: float = 30.0) -> FunctionError:
    """Return the verdict on a function, once a new child stands in the place of the one that ran it."""
    with pytest.raises(FunctionError, match=match) as seen:
        await runs.run(text, data, timeout_s=timeout_s)
    began = time.monotonic()
    assert await runs.value(NOOP, 1) == 1
    assert time.monotonic() - began < SLOT_BACK_S
    return seen.value


# ---------------------------------------------------------------- processes


# It makes at most 400 processes, in all, whatever holds it: a test that fails must not take the machine.
BOMB = """
    import mmap, os, time
    def run(data):
        count, left = mmap.mmap(-1, 8), 400
        with open(data, "a") as file:
            while int.from_bytes(count[:8], "little") < left:
                count[:8] = (int.from_bytes(count[:8], "little") + 1).to_bytes(8, "little")
                try:
                    if os.fork() == 0:
                        os.setsid()
                        file.write(f"{os.getpid()} ")
                        file.flush()
                except OSError:
                    time.sleep(0.01)
        time.sleep(3600)
    """


async def test_a_fork_bomb_is_ended_and_nothing_of_it_is_left(tmp_path: Path, means: dict[str, Any]) -> None:
    pids = tmp_path / "pids"
    async with pool_of(tmp_path, tasks_max=TASKS_MAX, **means) as runs:
        async with neighbour(runs, tmp_path):
            told = await refused(runs, BOMB, "run had more than 64 processes and threads at a time", str(pids))
        assert isinstance(told, OverLimit)
        assert not told.retry
        assert "HEADRACE_CHILD_TASKS_MAX" in told.hint
        made = [int(pid) for pid in pids.read_text().split() if pid]
        assert len(made) > 30
        await until(lambda: not any(alive(pid) for pid in made))


async def test_forks_are_refused_with_the_limit_where_control_groups_are(tmp_path: Path) -> None:
    if find_groups() is None:
        pytest.skip("no control group for processes can be made here: that needs root, or Delegate=pids of systemd")
    text = """
        import os, time
        def run(data):
            pids = []
            try:
                for _ in range(400):
                    pids.append(os.fork())
                    if pids[-1] == 0: time.sleep(60)
            finally:
                open(data, "w").write(str(len(pids)))
        """
    async with pool_of(tmp_path, tasks_max=TASKS_MAX) as runs:
        await refused(runs, text, "64 processes and threads", str(tmp_path / "count"))
    assert int((tmp_path / "count").read_text()) == TASKS_MAX - 1


async def test_threads_count_as_processes_do(tmp_path: Path, means: dict[str, Any]) -> None:
    text = """
        import threading, time
        def run(data):
            for _ in range(200): threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
            time.sleep(3600)
        """
    async with pool_of(tmp_path, tasks_max=TASKS_MAX, **means) as runs:
        await refused(runs, text, "64 processes and threads")


async def test_as_many_processes_as_are_allowed_are_let_be(tmp_path: Path, means: dict[str, Any]) -> None:
    text = """
        import multiprocessing, time
        def run(data):
            with multiprocessing.get_context("fork").Pool(8) as pool: return sum(pool.map(slow, range(16)))
        def slow(n):
            time.sleep(0.3)
            return n
        """
    async with pool_of(tmp_path, tasks_max=TASKS_MAX, **means) as runs:
        assert await runs.value(text) == sum(range(16))


async def test_a_detached_process_that_forks_without_end_is_ended_with_its_child(
    tmp_path: Path, means: dict[str, Any]
) -> None:
    # Each of the chain ends as soon as it has made the next, in a session of its own; after 20 s it gives up.
    text = """
        import os, sys, time
        def run(data):
            until = time.monotonic() + 20
            if os.fork() == 0:
                while time.monotonic() < until:
                    os.setsid()
                    with open(data, "w") as file: file.write(f"{os.getpid()} ")
                    time.sleep(0.002)
                    if os.fork(): os._exit(0)
                os._exit(0)
            time.sleep(0.3)
        """
    last = tmp_path / "last"
    async with pool_of(tmp_path, **means) as runs:
        await runs.run(text, str(last))
        assert await runs.value(NOOP, 1) == 1

        def rests() -> bool:
            return not last.exists() or time.time() - last.stat().st_mtime > 0.5

        await until(rests, 5.0)


async def test_a_group_is_gone_with_its_child_and_the_rest_with_the_pool(tmp_path: Path) -> None:
    base = find_groups()
    if base is None:
        pytest.skip("no control group for processes can be made here: that needs root, or Delegate=pids of systemd")

    def made() -> int:
        return len(list(base.glob(f"{groups.PREFIX}{os.getpid()}-*")))

    async with pool_of(tmp_path) as runs:
        for _ in range(3):
            await runs.value(PID)
            with pytest.raises(FunctionError):
                await runs.run("import os\ndef run(data): os._exit(1)")
        await runs.value(PID)
        await until(lambda: made() == 2)
    assert made() == 0


# ---------------------------------------------------------------- memory


async def test_a_hundred_allocations_over_the_limit_are_told_and_hurt_nobody(tmp_path: Path) -> None:
    async with pool_of(tmp_path, memory_bytes_max=256 * MIB) as runs, neighbour(runs, tmp_path):
        for _ in range(100):
            with pytest.raises(OutOfMemory, match="ran out of memory; its limit is 256 MiB"):
                await runs.run("def run(data): return len(bytearray(4 * 2**30))")


async def test_processes_that_pass_the_memory_limit_together_are_ended(tmp_path: Path) -> None:
    text = """
        import os, time
        def run(data):
            for _ in range(4):
                if os.fork() == 0:
                    kept = bytes(range(256)) * (2**18)
                    time.sleep(3600)
            time.sleep(3600)
        """
    async with pool_of(tmp_path, memory_bytes_max=160 * MIB) as runs, neighbour(runs, tmp_path):
        told = await refused(runs, text, "processes that took more than 160 MiB of memory together")
        assert isinstance(told, OutOfMemory)


async def test_memory_that_processes_share_counts_once(tmp_path: Path) -> None:
    text = """
        import os, time
        def run(data):
            kept = bytes(range(256)) * (2**18)
            pids = []
            for _ in range(8):
                pids.append(os.fork())
                if pids[-1] == 0:
                    time.sleep(0.8)
                    os._exit(0)
            for pid in pids: os.waitpid(pid, 0)
        """
    async with pool_of(tmp_path, memory_bytes_max=160 * MIB) as runs:
        await runs.run(text)


async def test_when_memory_runs_out_functions_go_before_servers(tmp_path: Path) -> None:
    async with pool_of(tmp_path) as runs:
        text = "def run(data): return int(open('/proc/self/oom_score_adj').read())"
        assert await runs.value(text) > int(Path("/proc/self/oom_score_adj").read_text())


# ---------------------------------------------------------------- time


# Each runs for ever, or for a minute at least where the machine must not be left with it.
ENDLESS = {
    "busy": "def run(data):\n    while True: pass",
    "deaf": (
        "import signal, time\ndef run(data):\n"
        "    for n in (1, 2, 3, 10, 12, 15): signal.signal(n, signal.SIG_IGN)\n    time.sleep(3600)"
    ),
    "in C": (
        "import ctypes\ndef run(data):\n"
        "    lock = ctypes.create_string_buffer(64)\n"
        "    for _ in range(2): ctypes.PyDLL(None).pthread_mutex_lock(lock)"
    ),
    "a regular expression": "import re\ndef run(data): re.match(r'(a+)+$', 'a' * 60 + 'b')",
    "printing": "def run(data):\n    while True: print('x' * 1000)",
    "many processes": "import os\ndef run(data):\n    [os.fork() for _ in range(3)]\n    while True: pass",
}


@pytest.mark.parametrize("way", ENDLESS)
async def test_a_function_that_never_ends_is_stopped_in_time(tmp_path: Path, way: str) -> None:
    late: list[float] = []
    async with pool_of(tmp_path) as runs, neighbour(runs, tmp_path):
        for _ in range(5):
            began = time.monotonic()
            with pytest.raises(TimeLimit, match=r"longer than its timeout of 0\.2 s"):
                await runs.run(ENDLESS[way], timeout_s=0.2)
            late.append(time.monotonic() - began - 0.2)
            began = time.monotonic()
            assert await runs.value(NOOP, 1) == 1
            assert time.monotonic() - began < SLOT_BACK_S
    assert max(late) < 1.0
    assert statistics.median(late) < 0.5


async def test_cpu_time_of_all_processes_together_is_limited(tmp_path: Path) -> None:
    text = "import os\ndef run(data):\n    if os.fork() == 0:\n        while True: pass\n    os.wait()"
    async with pool_of(tmp_path, cpu_max_s=0.5) as runs, neighbour(runs, tmp_path):
        told = await refused(runs, text, r"run took more than 0\.5 s of CPU time")
        assert "HEADRACE_CHILD_CPU_MAX_S" in told.hint


async def test_cpu_time_is_counted_for_each_invocation(tmp_path: Path) -> None:
    text = "import time\ndef run(data):\n    end = time.process_time() + 0.4\n    while time.process_time() < end: pass"
    async with pool_of(tmp_path, slots=1, cpu_max_s=0.6) as runs:
        for _ in range(4):
            await runs.run(text)


# ---------------------------------------------------------------- scratch


async def test_a_file_over_the_limit_cannot_be_written(tmp_path: Path) -> None:
    text = "def run(data):\n    with open('large', 'wb') as file:\n        while True: file.write(bytes(2**16))"
    async with pool_of(tmp_path, scratch_bytes_max=4 * MIB) as runs, neighbour(runs, tmp_path):
        told = await refused(runs, text, "File too large; the limit of one file is 4 MiB")
        assert "HEADRACE_SCRATCH_BYTES_MAX" in str(told)


@pytest.mark.parametrize("folder", [".", "os.environ['TMPDIR']"])
async def test_files_over_the_limit_together_end_the_function(tmp_path: Path, folder: str) -> None:
    text = f"""
        import os, time
        def run(data):
            os.makedirs(os.path.join({folder if folder != "." else "'.'"}, "a", "b"))
            for n in range(20):
                with open(os.path.join({folder if folder != "." else "'.'"}, "a", "b", str(n)), "wb") as file:
                    file.write(bytes(2**20))
            time.sleep(3600)
        """
    async with pool_of(tmp_path, scratch_bytes_max=8 * MIB) as runs:
        async with neighbour(runs, tmp_path):
            told = await refused(runs, text, "run had more than 8 MiB in its folder")
        assert not told.retry
        await until(lambda: not list((tmp_path / "scratch").glob("pool-*/child-*/*/a")))


async def test_too_many_files_end_the_function(tmp_path: Path) -> None:
    text = "import time\ndef run(data):\n    for n in range(300): open(str(n), 'w').close()\n    time.sleep(3600)"
    async with pool_of(tmp_path, scratch_files_max=200) as runs:
        await refused(runs, text, "run had more than 200 files in its folder")


async def test_what_one_function_leaves_in_temporary_files_is_not_held_against_the_next(tmp_path: Path) -> None:
    text = f"""
        import os, tempfile, time
        def run(data):
            descriptor, _ = tempfile.mkstemp()
            os.write(descriptor, bytes(3 * 2**20))
            os.close(descriptor)
            time.sleep({3 * LOOK_S})
            return os.getpid()
        """
    async with pool_of(tmp_path, slots=1, scratch_bytes_max=4 * MIB) as runs:
        assert len({await runs.value(text) for _ in range(3)}) == 3


async def test_nothing_is_begun_while_the_disk_has_no_room(tmp_path: Path) -> None:
    async with pool_of(tmp_path) as runs:
        assert await runs.value(NOOP, 1) == 1
    free = shutil.disk_usage(tmp_path).free
    async with pool_of(tmp_path, disk_bytes_min=4 * free) as runs:
        assert (
            await runs.value(f"import time\ndef run(data): time.sleep({2 * LOOK_S})") is None
        )  # nobody has looked yet
        waiting = asyncio.create_task(runs.value(NOOP, 2))
        await asyncio.sleep(2 * LOOK_S)
        assert not waiting.done()
        assert runs.pool.free == 1
        watch = runs.pool._watch
        assert watch is not None
        watch._disk_bytes_min = 0
        assert await waiting == 2


async def test_who_waits_for_room_hears_that_the_worker_stops(tmp_path: Path) -> None:
    async with pool_of(tmp_path, disk_bytes_min=2**62) as runs:
        await runs.value(f"import time\ndef run(data): time.sleep({2 * LOOK_S})")
        waiting = asyncio.create_task(runs.value(NOOP, 2))
        await asyncio.sleep(0.05)
        await runs.pool.close()
        with pytest.raises(FunctionError, match="the worker is stopping"):
            await waiting


# ---------------------------------------------------------------- output and results


@pytest.mark.parametrize(
    "flood",
    [
        "import os\ndef run(data):\n    line = b'y' * 99 + b'\\n'\n    while True: os.write(1, line * 100)",
        "def run(data):\n    while True: print('y' * 99)",
        "def run(data, ctx):\n    while True: ctx.log.info('y' * 99)",
        "import subprocess\ndef run(data): subprocess.run(['yes', 'y' * 99])",
    ],
)
async def test_of_endless_output_a_megabyte_is_kept_with_a_note(tmp_path: Path, flood: str) -> None:
    async with pool_of(tmp_path, output_lines_max=10**6) as runs, neighbour(runs, tmp_path):
        with pytest.raises(TimeLimit):
            await runs.run(flood, timeout_s=1.0)
        kept = [text for _, text in runs.heard]
        assert kept[-1] == "(output cut at 1 MiB)"
        assert 0.9 * MIB < sum(len(text) + 1 for text in kept[:-1]) <= MIB


async def test_results_over_the_limit_are_refused_with_it(tmp_path: Path) -> None:
    refused_with = {
        "def run(data): return bytes(100 * 2**20)": "run returned 100 MiB .* the limit is 16 MiB",
        "def run(data): return bytes(10 * 2**30)": "ran out of memory; its limit is 2 GiB",
        "import itertools\ndef run(data): return itertools.count()": "cannot be sent as JSON",
        "import itertools\ndef run(data, ctx): ctx.map('run', itertools.count())": "more than 10,000 payloads",
    }
    async with pool_of(tmp_path, memory_bytes_max=2048 * MIB) as runs, neighbour(runs, tmp_path):
        assert len((await runs.run("def run(data): return bytes(2**20)")).result.body) == MIB
        for text, told in refused_with.items():
            with pytest.raises(OutOfMemory if "memory" in told else UserError, match=told):
                await runs.run(text)


async def test_the_members_of_a_map_are_limited_by_the_setting(tmp_path: Path) -> None:
    async with pool_of(tmp_path, fan_out_max=3) as runs:
        assert len((await runs.run("def run(data, ctx): ctx.map('run', range(3))")).effects) == 1
        with pytest.raises(UserError, match="map: more than 3 payloads"):
            await runs.run("def run(data, ctx): ctx.map('run', range(4))")


# ---------------------------------------------------------------- through the whole platform


GREEDY = """
import os, time
from headrace import function, on

@on()
@function
def allocates(data): return len(bytearray(4 * 2**30))

@on()
@function
def forks(data):
    try:
        for _ in range(100):
            if os.fork() == 0: time.sleep(60)
    except OSError: pass
    time.sleep(60)

@on()
@function
def computes(data):
    while True: pass

@on()
@function
def writes(data):
    with open("large", "wb") as file: file.write(bytes(9 * 2**20))

@on()
@function
def leaves_files(data):
    for n in range(100): open(str(n), "w").close()
    time.sleep(60)

@on()
@function
def returns(data): return "x" * 3 * 2**20

@on()
@function
def spreads(data, ctx): ctx.map("returns", range(4))

@on()
@function
def loops(data, ctx): ctx.call("loops", data)

@on()
@function
def doubles(data, ctx):
    ctx.call("doubles", data)
    ctx.call("doubles", data)

@on()
@function
def prints(data):
    for n in range(100): print(n)
    return "x" * 2**20
"""

SETTINGS = {
    "HEADRACE_CHILD_BYTES_MAX": "256MiB",
    "HEADRACE_CHILD_TASKS_MAX": "64",
    "HEADRACE_CHILD_CPU_MAX_S": "0.5",
    "HEADRACE_SCRATCH_BYTES_MAX": "8MiB",
    "HEADRACE_SCRATCH_FILES_MAX": "50",
    "HEADRACE_OUTPUT_LINES_MAX": "10",
    "HEADRACE_RESULT_BYTES_MAX": "2MiB",
    "HEADRACE_FAN_OUT_MAX": "3",
    "HEADRACE_CHAIN_DEPTH_MAX": "20",
    "HEADRACE_RUN_INVOCATIONS_MAX": "50",
    "HEADRACE_PAYLOAD_BYTES_MAX": "64KiB",
}
VERDICTS = {
    "allocates": ("memory", "256 MiB, set by HEADRACE_CHILD_BYTES_MAX"),
    "forks": ("limit", "64 processes and threads .* HEADRACE_CHILD_TASKS_MAX"),
    "computes": ("limit", r"0\.5 s of CPU time .* HEADRACE_CHILD_CPU_MAX_S"),
    "writes": ("user", r"8 MiB \(HEADRACE_SCRATCH_BYTES_MAX\)"),
    "leaves_files": ("limit", "50 files .* HEADRACE_SCRATCH_FILES_MAX"),
    "returns": ("user", "returned 3 MiB .* the limit is 2 MiB"),
    "spreads": ("user", "more than 3 payloads"),
    "loops": ("user", r"20 calls long \(HEADRACE_CHAIN_DEPTH_MAX\)"),
    "doubles": ("map", "limit is 50.*HEADRACE_RUN_INVOCATIONS_MAX"),
}


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_every_limit_is_set_where_it_holds_and_the_gateway_stays_as_large_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "greedy.py").write_text(GREEDY)
    process = UpProcess(tmp_path / "headrace", env=SETTINGS)
    try:
        process.wait_ready()
        gateway, worker = process.child("gateway"), process.child("worker")
        with Client(process.url, process.token) as client:
            client.deploy(tmp_path / "greedy.py")
            fine = client.trigger("prints", 1)
            assert len(fine.result(timeout=30)) == MIB
            before = resident_bytes(gateway)
            runs = {name: client.trigger(name, 1) for name in VERDICTS}
            for name, run in runs.items():
                error = run.ended().error
                assert error is not None, name
                kind, told = VERDICTS[name]
                assert (error.kind, re.search(told, error.message) is not None) == (kind, True), (name, error)
            with pytest.raises(TooLarge, match="65,536 bytes"):
                client.trigger("prints", "x" * 65536)
            lines = [event.data["text"] for event in fine.follow() if event.kind == "log"]
            assert lines == [*map(str, range(10)), "(output cut at 10 lines)"]
            assert len(client.trigger("prints", 2).result(timeout=30)) == MIB
        assert resident_bytes(gateway) - before < 16 * MIB
        assert (process.child("gateway"), process.child("worker")) == (gateway, worker)
    finally:
        process.end()
