"""The demo: what it counts as right, what it prints, and what it leaves behind."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from functions.examples import alerts, crystallography, fusion, indexing, md_campaign, molecular_dynamics, pointing
from headrace.client import AsyncClient
from headrace.model import (
    AnswerLinks,
    AnswerView,
    Event,
    EventView,
    Fidelity,
    Links,
    Quote,
    RunView,
    TimeLedger,
)
from headrace.testing import Bench
from infra import demo
from infra.demo_triggers import EVERYTHING, EXAMPLES, FUNCTION_FILES, Near, Trigger, inputs, part, triggers
from infra.settings import Settings
from infra.slurm.cluster import missing
from infra.up import Platform
from tests.processes import alive, descendants, wait_until
from tests.sites import Here

TRIGGERS = triggers({name: path.as_uri() for name, path in inputs().items()})
SLOW = ("lj_dynamics", "run_stopped", "md_campaign")
QUICK = [trigger for trigger in TRIGGERS if trigger.route not in SLOW and trigger.deadline is None]
(HURRIED,) = [trigger for trigger in TRIGGERS if trigger.deadline is not None]


# ---------------------------------------------------------------- what is right


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The answer of the example functions to each trigger."""
    modules = (fusion, crystallography, indexing, molecular_dynamics, alerts, pointing, md_campaign)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))  # as where they are deployed
        yield _answers(Here(tmp_path_factory.mktemp("jobs"), *modules).bench)


def _answers(bench: Bench) -> dict[str, Any]:
    found = {}
    for trigger in TRIGGERS:
        event = Event(
            id=trigger.title,
            source="/test",
            type=trigger.type,
            data=trigger.data,
            datacontenttype=trigger.content_type,
        )
        (trace,) = bench.publish(event)
        assert trace.event is event
        found[trigger.title] = trace.result()
    return found


@pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda trigger: trigger.title)
def test_the_answer_of_the_shipped_functions_is_the_known_one(trigger: Trigger, answers: dict[str, Any]) -> None:
    assert trigger.wrong(answers[trigger.title]) == ""


@pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda trigger: trigger.title)
def test_every_part_of_a_known_answer_is_looked_at(trigger: Trigger, answers: dict[str, Any]) -> None:
    assert trigger.expected
    for path in trigger.expected:
        spoilt = {"answer": copy.deepcopy(answers[trigger.title])}
        _spoil(spoilt, f"answer.{path}")
        assert trigger.wrong(spoilt["answer"]).startswith(f"{path} is ")


def _spoil(holder: Any, path: str) -> None:
    """Change the part of a JSON value at this path: numbers a little, everything else altogether."""
    name, _, rest = path.partition(".")
    if rest == "#":
        holder[name].append("one more")
    elif name == "*":
        _spoil(holder[-1], rest)
    elif rest:
        _spoil(holder[name], rest)
    else:
        value = holder.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        holder[name] = value * 1.5 + 1 if number else ["spoilt"]


@pytest.mark.parametrize("answer", [None, [], {}, "text", 7])
def test_an_answer_of_another_shape_is_wrong_and_no_crash(answer: object) -> None:
    assert all(trigger.wrong(answer) for trigger in TRIGGERS)


def test_a_list_of_numbers_must_be_as_long_as_the_known_one() -> None:
    near = Near([1.0, 2.0], 0.1)
    assert near.meets([1.05, 1.95])
    assert not near.meets([1.0])
    assert not near.meets([1.0, 2.0, 3.0])
    assert not near.meets([1.0, float("nan")])
    assert not near.meets(1.0)


def test_a_part_that_is_not_there_is_none() -> None:
    assert part({"a": [{"b": 1}, {"b": 2}]}, "a.*.b") == [1, 2]
    assert part({"a": [1, 2, 3]}, "a.#") == 3
    assert part({"a": 1}, "a.b.c") is None
    assert part({"a": 1}, "a.*.c") is None


def test_no_trigger_carries_its_known_answer() -> None:
    for trigger in TRIGGERS:
        if isinstance(trigger.data, dict):
            assert not {"tearing", "eigenmode", "windows", "hits", "frames", "energy", "action"} & trigger.data.keys()


@pytest.mark.parametrize("level", [1, 2])
def test_the_answers_of_variants_are_as_near_to_the_known_one_as_is_said_of_them(level: int) -> None:
    bench = Bench(fusion)
    answer = bench.fire("shot_done", HURRIED.data | {"resamples": 0}, rung=level).result()
    assert HURRIED.wrong(answer, level) == ""
    assert HURRIED.wrong(answer).startswith("eigenmode")
    full = bench.fire("shot_done", HURRIED.data | {"resamples": 0}).result()
    assert HURRIED.wrong(full) == ""
    assert HURRIED.wrong(full, level).startswith("eigenmode.points is 128")


def test_every_shipped_example_is_deployed() -> None:
    shipped = {path for path in Path(fusion.__file__).parent.glob("*.py") if path.name != "__init__.py"}
    assert set(FUNCTION_FILES) == shipped


# ---------------------------------------------------------------- what is shown


def run_view(**changes: Any) -> RunView:
    view = RunView(
        run_id="rabc",
        route="shot_done",
        function="shot_done",
        tenant="default",
        event=EventView(id="1", source="/s", type="t"),
        state="succeeded",
        deadline="2026-01-01T00:01:00.000000Z",
        deadline_met=True,
        accepted_at="2026-01-01T00:00:00.000000Z",
        answered_at="2026-01-01T00:00:00.250000Z",
        ended_at="2026-01-01T00:00:00.250000Z",
        time_to_solution_s=0.25,
        time_ledger=TimeLedger(gateway_s=0.003, lane_s=0.0, run_s=0.24, commit_s=0.007),
        quote=Quote(),
        invocations=[],
        invocations_total=0,
        jobs=[],
        error=None,
        links=Links(self="/", result="/", events="/"),
    )
    return msgspec.structs.replace(view, **changes)


def test_the_table_says_where_the_time_went_and_whether_the_deadline_was_met() -> None:
    late = run_view(run_id="rlate", deadline_met=False, deadline=None, time_to_solution_s=None)
    results = [
        demo.Result(trigger=TRIGGERS[0], view=run_view(), fault=""),
        demo.Result(trigger=TRIGGERS[1], view=late, fault="x is 1, but should be 2"),
    ]
    assert [result.good for result in results] == [True, False]
    shown = io.StringIO()
    demo.print_table(Console(file=shown, width=160), results)
    header, first, second = shown.getvalue().splitlines()
    assert header.split()[:3] == ["run", "trigger", "route"]
    assert " ".join(first.split()) == (
        "rabc tokamak shot 900001 shot_done gateway 3, run 240, commit 7 0.250 s 60 s yes right"
    )
    assert second.split()[-4:] == ["-", "none", "no", "wrong"]


def test_what_came_first_and_what_took_its_place_is_told() -> None:
    def answer(level: int, function: str, second: int) -> AnswerView:
        return AnswerView(
            invocation_id=function,
            fidelity=Fidelity(level=level, function=function, of=3),
            answered_at=f"2026-01-01T00:00:0{second}.000000Z",
            in_time=True,
            links=AnswerLinks(self="/"),
        )

    view = run_view(answers=[answer(1, "shot_modes_64", 2), answer(0, "shot_modes", 8)])
    assert demo.fidelity(run_view()) == ""
    assert demo.fidelity(view) == "level 1, full"
    told = demo.improvement(HURRIED, view)
    assert told.endswith("(60 s): shot_modes_64 after 2.0 s, superseded by shot_modes after 8.0 s.")


def test_a_right_answer_that_came_late_is_not_good() -> None:
    assert not demo.Result(trigger=TRIGGERS[0], view=run_view(deadline_met=False), fault="").good


# ---------------------------------------------------------------- on a real platform


@pytest.fixture
async def platform(tmp_path: Path) -> AsyncIterator[Platform]:
    async with Platform(Settings(data_dir=tmp_path / "headrace", port=0)) as started:
        yield started


async def test_one_wrong_answer_makes_the_demo_fail_and_is_told(platform: Platform) -> None:
    def only_quick(uris: Mapping[str, str]) -> list[Trigger]:
        return [trigger for trigger in triggers(uris) if trigger.title in {quick.title for quick in QUICK}]

    def one_wrong(uris: Mapping[str, str]) -> list[Trigger]:
        first, *others = only_quick(uris)
        return [dataclasses.replace(first, expected={"flagged": False}), *others]

    async def shows(chosen: Callable[[Mapping[str, str]], list[Trigger]], file: io.StringIO) -> bool:
        show = dataclasses.replace(EVERYTHING, triggers=chosen)
        return await demo.demo(platform.url, platform.token, show=show, console=Console(file=file, width=160))

    assert await shows(only_quick, io.StringIO()) is True
    shown = io.StringIO()
    assert await shows(one_wrong, shown) is False

    assert "flagged is True, but should be False" in shown.getvalue()
    assert f"{len(QUICK) - 1} of {len(QUICK)} answers were right and on time" in shown.getvalue()
    async with AsyncClient(platform.url, platform.token) as client:
        runs = await client.runs(limit=1000)
    assert len({run.run_id for run in runs}) == 2 * len(QUICK)  # the repeated event and the second demo included


@contextmanager
def demo_process(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`headrace demo` as a process of its own, killed with all it started if a test breaks off."""
    environ = {name: text for name, text in os.environ.items() if not name.startswith("HEADRACE_")}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "infra", "demo", *options],
        cwd=folder,
        env=environ | {"TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            for pid in [*descendants(process.pid), process.pid]:
                os.kill(pid, signal.SIGKILL)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@pytest.mark.alone  # it keeps real deadlines
async def test_the_demo_answers_everything_right_stays_when_asked_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with demo_process(tmp_path, "--stay") as process:
        shown = await asyncio.wait_for(asyncio.to_thread(_until_ready, process), 90)
        assert f"{len(TRIGGERS)} of {len(TRIGGERS)} answers were right and on time" in shown
        assert "The event that was sent twice ran once." in shown
        for trigger in TRIGGERS:
            assert trigger.title in shown
        started = descendants(process.pid)
        assert len(started) >= 5
        process.send_signal(signal.SIGINT)
        rest, _ = await asyncio.to_thread(process.communicate, timeout=30)
        assert process.returncode == 0, shown + rest
    wait_until(lambda: not any(alive(pid) for pid in started))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.alone  # so does this one
def test_a_simulation_in_the_queue_of_a_slurm_is_right_and_on_time() -> None:
    if names := missing():
        pytest.skip(f"needs Slurm, without {', '.join(names)}: apt-get install slurm-wlm munge")
    with tempfile.TemporaryDirectory() as folder, demo_process(Path(folder), "--slurm") as process:  # a short path
        shown, _ = process.communicate(timeout=150)
        assert process.returncode == 0, shown
        assert "4 of 4 answers were right and on time" in shown
        assert "4 jobs, of which Slurm's own records miss 0, and hold 0 others." in shown
        assert list(Path(folder).iterdir()) == []


def _until_ready(process: subprocess.Popen[str]) -> str:
    """Read what the demo prints until it says that the platform stays up."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if re.match(r"\s*stop\s+Ctrl-C", line):
            return "".join(lines)
    raise AssertionError("the demo ended early:\n" + "".join(lines))
