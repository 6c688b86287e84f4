"""``headrace explain``: what would come of an event, told by a real platform that starts nothing for it."""

from __future__ import annotations

import io
import json
import textwrap
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from headrace import render
from headrace.model import (
    ChoiceView,
    EventExplanation,
    EventView,
    Explanation,
    PartView,
    Quote,
    Refusal,
    RouteExplanation,
)
from tests.commands import ESCAPES, Run
from tests.platforms import UpProcess
from tests.processes import wait_until

USER_FILE = """
    import time
    from headrace import function, on

    @on(type="org.example.explained", deadline="60s", name="explained")
    @on(type="org.example.explained", source="/nowhere", name="explained_elsewhere")
    @on(deadline="50ms", admission="strict", name="explained_strictly")
    @function(name="explained")
    def look(data):
        time.sleep(0.2)
        return data
"""
HOSTILE = "[bold red]x[/] \x1b]8;;http://evil\x07link\x1b[31m\r\n\u202ereversed\u2066 \x9b2J"


@pytest.fixture
def near(shared_platform: UpProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run) -> UpProcess:
    """A platform to which the environment points, with the user's function on it."""
    monkeypatch.setenv("HEADRACE_URL", shared_platform.url)
    monkeypatch.setenv("HEADRACE_TOKEN", shared_platform.token)
    (tmp_path / "explained.py").write_text(textwrap.dedent(USER_FILE))
    assert run("deploy", "explained.py").code == 0
    return shared_platform


def event(**more: Any) -> dict[str, Any]:
    made = {"specversion": "1.0", "id": uuid4().hex, "source": "/cli", "type": "org.example.explained", "data": 1}
    return {**made, **more}


def test_an_event_is_explained_before_and_after_it_was_sent(near: UpProcess, run: Run, tmp_path: Path) -> None:
    (tmp_path / "event.json").write_text(json.dumps(event()))
    said = run("explain", "event.json")
    assert said.code == 0, said.err
    assert "explained" in said.out
    assert "source is '/cli', not '/nowhere'" in said.out
    assert "it came before" not in said.out
    run_id = run("publish", "event.json").out.split()[0]
    assert f"it came before, as the run {run_id}" in run("explain", "event.json").out


def test_a_batch_is_explained_event_by_event_with_a_deadline_of_ones_own(near: UpProcess, run: Run) -> None:
    batch = [event(), event(type="org.example.unknown")]
    said = run("explain", "-", "--deadline", "10m", "--json", stdin=json.dumps(batch).encode())
    assert said.code == 0, said.err
    told = msgspec.convert(said.json, Explanation)
    firing = [[route.route for route in one.routes if route.fires] for one in told.events]
    assert firing == [["explained"], []]
    assert told.events[0].routes[0].lane == 9
    assert "no route takes this" in run("explain", "-", stdin=json.dumps(batch).encode()).out


def test_what_a_strict_route_would_refuse_ends_with_1(near: UpProcess, run: Run) -> None:
    for _ in range(4):
        assert run("trigger", "explained_strictly", "--deadline", "60s", "--wait", "30").code == 0
    wait_until(lambda: run("explain", "--route", "explained_strictly").code == 1)
    said = run("explain", "--route", "explained_strictly")
    assert "infeasible" in said.out
    assert "refused" in said.out
    assert "the function" in said.out
    refused = run("trigger", "explained_strictly")
    assert (refused.code, refused.out) == (1, "")
    assert "strict" in refused.err
    assert run("explain", "--route", "explained_strictly", "--deadline", "60s").code == 0
    listed = run("routes").out.splitlines()
    assert any("explained_strictly" in line and "strict" in line.split() for line in listed)


@pytest.mark.parametrize(
    "arguments",
    [["explain"], ["explain", "nowhere.json"], ["explain", "-", "--id", "x"], ["explain", "--route", "nowhere"]],
)
def test_what_cannot_be_explained_ends_with_2(near: UpProcess, run: Run, arguments: list[str]) -> None:
    said = run(*arguments, stdin=b"{}")
    assert (said.code, said.out) == (2, "")
    assert "hint:" in said.err


def test_no_text_from_outside_reaches_the_terminal_as_anything_but_text() -> None:
    quote = Quote(verdict="at_risk", p50_s=1.0, p90_s=2.0)
    refused = Refusal(status=409, title=HOSTILE, detail=HOSTILE, hint=HOSTILE)
    choices = [
        ChoiceView(function=HOSTILE, version=HOSTILE, quote=quote, chosen=chosen, why=HOSTILE)
        for chosen in (True, False)
    ]
    route = RouteExplanation(
        route=HOSTILE,
        fires=True,
        function=HOSTILE,
        version=HOSTILE,
        deadline="2026-11-21T03:14:15Z",
        quote=quote,
        duplicate_of=HOSTILE,
        refused=refused,
        overruled_by=HOSTILE,
        overrules=[HOSTILE],
        plan=choices,
        parts=[PartView(part="run", p50_s=1.0, p90_s=2.0)],
    )
    silent = RouteExplanation(route=HOSTILE, fires=False, why=HOSTILE)
    told = Explanation(
        refused=msgspec.structs.replace(refused, status=503),
        events=[EventExplanation(event=EventView(id=HOSTILE, source=HOSTILE, type=HOSTILE), routes=[route, silent])],
    )
    out = io.StringIO()
    for part in render.explanation(told):
        render.console(out).print(part)
    assert not ESCAPES.search(out.getvalue())
    assert out.getvalue().count("[bold red]x[/]") >= 12
