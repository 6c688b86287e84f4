"""``headrace``: the platform from a terminal.

Exit codes: 0 good, 1 the run failed or missed its deadline (or has no answer yet, or is refused as it cannot be in
time), 2 wrong usage, 3 the platform cannot be reached.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import msgspec
from cyclopts import App, CycloptsError, Parameter
from rich.text import Text

from headrace import render
from headrace.errors import BadRequest, HeadraceError, RunFailed
from headrace.events import new_id
from headrace.model import FINAL, Replaying, RunState, RunView
from headrace.terminal import (
    GOOD,
    RUN_FAILED,
    WRONG_USAGE,
    print_all,
    print_answer,
    print_json,
    read_data,
    read_input,
    say,
    shown,
    tell,
)

if TYPE_CHECKING:
    from headrace.sync import Client

PATIENCE_S = 3.0
SEND_PATIENCE_S = 10.0
WATCH_PATIENCE_S = 30.0

app = App(
    name="headrace",
    help="Carries a trigger from an instrument to the compute that must answer in time.",
    help_format="plaintext",
    version=lambda: importlib.import_module("headrace").__version__,
    result_action="return_value",
)


def _input(_: object, value: str | None) -> None:
    """Let "-" pass as standard input, and refuse what was meant as an option."""
    if value is not None and value.startswith("-") and value != "-":
        raise ValueError(f"there is no option {value}")


Input = Parameter(allow_leading_hyphen=True, validator=_input)
AsJson = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")]
Deadline = Annotated[str | None, Parameter(help='By when the answer is due: "60s", "10m", or an RFC 3339 instant.')]
Wait = Annotated[float | None, Parameter(help="Wait for the answer for so many seconds and print it.")]
State = Annotated[RunState | None, Parameter(help="Only runs in this state.")]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command, from the process's own arguments if none are given, and end the process with its exit code."""
    try:
        code = app(arguments, exit_on_error=False, print_error=True)
        sys.stdout.flush()
    except CycloptsError:
        sys.exit(WRONG_USAGE)
    except HeadraceError as error:
        sys.exit(tell(error))
    except TimeoutError as error:
        sys.exit(tell(RunFailed(str(error), hint="It goes on; `headrace watch ID` follows it.")))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(GOOD)
    sys.exit(code if isinstance(code, int) else GOOD)


# ---------------------------------------------------------------- servers


def _serve(command: str, help_text: str) -> None:
    """Add a command that another program of ours runs: servers come with the extra `platform`."""

    def run(*arguments: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]) -> None:
        _become(command, arguments)

    run.__doc__ = help_text
    app.command(run, name=command, help_flags=[], version_flags=[], group="Servers")


def _become(command: str, arguments: Sequence[str]) -> NoReturn:
    """Go on as a command of the servers' program.

    Raises:
        BadRequest: it is not installed.
    """
    for needed in ("infra", "nats", "redis"):
        if importlib.util.find_spec(needed) is None:
            raise BadRequest(
                f"`headrace {command}` needs the servers, which are not installed here",
                hint="pip install 'headrace[platform]'",
            )
    sys.stdout.flush()
    # -P: a file `infra.py` in this folder must not be taken for ours.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "infra", command, *arguments])  # noqa: S606 - no shell


_serve("up", "Run the whole platform in this terminal until Ctrl-C.")
_serve("demo", "Start a platform, send it real triggers, and check every answer.")
_serve("doctor", "Look for what is wrong; each finding says its cure.")
_serve("setup", "Make the stream and the tables on servers of your own.")
_serve("tenant", "Add, list and remove those who share the platform: tenant add NAME.")
_serve("site", "Make the user of a site's agent, or remove a site that is no more: site user NAME.")
_serve("gateway", "Run one gateway, configured by file and environment.")
_serve("worker", "Run one worker, configured by file and environment.")
_serve("agent", "Run the agent of a site: it submits the site's batch jobs and tells how they end.")
_serve("ledger", "Run the writer of the read model, configured by file and environment.")


# ---------------------------------------------------------------- functions, routes, sites


@app.command
def deploy(file: Path, /, *, as_json: AsJson = False) -> None:
    """Register the functions of a Python file, and the routes that they declare with @on.

    The file is loaded in this process, its folder first on the path. It travels with what it imports from its folder.
    """
    with _client() as client:
        views = client.deploy(file)
        if as_json:
            return print_json(views)
        names = {view.name for view in views}
        render.console().print(render.functions_table(views))
        routes = [route for route in client.routes() if route.route.function in names]
        if routes:
            render.console().print(render.routes_table(routes))
    return None


@app.command
def functions(*, as_json: AsJson = False) -> None:
    """List what is registered."""
    with _client() as client:
        print_all("functions", client.functions(), render.functions_table, as_json)


@app.command
def routes(*, as_json: AsJson = False) -> None:
    """List the routes: which events or names lead to which function, and by when."""
    with _client() as client:
        print_all("routes", client.routes(), render.routes_table, as_json)


@app.command
def sites(*, as_json: AsJson = False) -> None:
    """List the sites that run jobs, and how they are."""
    with _client() as client:
        print_all("sites", client.sites(), render.sites_table, as_json)


# ---------------------------------------------------------------- starting runs


@app.command
def trigger(
    route: str,
    file: Annotated[str | None, Input] = None,
    /,
    *,
    deadline: Deadline = None,
    wait: Wait = None,
    id: Annotated[str | None, Parameter(help="The event id; the same id is the same run.")] = None,  # noqa: A002 - --id
    content_type: Annotated[str | None, Parameter(help="What the data is, such as application/json.")] = None,
    as_json: AsJson = False,
) -> int:
    """Start a run on a route and print its id; with --wait, its answer.

    Args:
        route: the route's name.
        file: the data; - reads it from standard input. Without it the run gets no data.
    """
    data, kind = (None, None) if file is None else read_data(file, content_type)
    with _client(SEND_PATIENCE_S) as client:
        run = client.trigger(route, data, id=id, deadline=deadline, wait=wait, content_type=kind)
        if wait is None:
            print(render.as_json(run.ref) if as_json and run.ref else run.run_id)
            return GOOD
        view = run.view()
        answered = view.answered_at is not None
        if as_json:
            answer = shown(run.payload()) if answered else None
            print(render.as_json({**msgspec.to_builtins(view), "answer": answer}))
        elif answered:
            print_answer(run.payload())
        elif view.state in FINAL:
            run.payload()  # raises what went wrong
        else:
            say(f"no answer after {wait:g} s; the run {run.run_id} goes on", f"headrace watch {run.run_id}")
        if view.fidelity is not None and view.fidelity.level > 0 and not as_json:
            say(f"this is {render.fidelity(view)}", f"headrace result {run.run_id} gives the best answer there is")
        if view.deadline_met is False and not as_json:
            say(f"the run {run.run_id} missed its deadline", f"headrace run {run.run_id} tells where the time went")
        return _standing(view) if answered or view.state in FINAL else RUN_FAILED


@app.command
def publish(file: Annotated[str, Input] = "-", /, *, as_json: AsJson = False) -> None:
    """Send a CloudEvent, or a list of them as one batch, and print the runs that they start.

    Args:
        file: JSON in the form of CloudEvents; - reads standard input.
    """
    events = _read_events(file)
    with _client(SEND_PATIENCE_S) as client:
        runs = client.publish(events)
        if as_json:
            return print_json({"runs": [run.ref for run in runs]})
        for run in runs:
            print(run.run_id, render.clean(run.route))
        if not runs:
            say("no route takes this", "`headrace routes` lists what each one takes")
    return None


@app.command
def explain(
    file: Annotated[str | None, Input] = None,
    /,
    *,
    route: Annotated[str | None, Parameter(help="Explain a trigger of this route with the file as its data.")] = None,
    deadline: Deadline = None,
    id: Annotated[str | None, Parameter(help="With --route: the event id.")] = None,  # noqa: A002 - --id
    content_type: Annotated[str | None, Parameter(help="With --route: what the data is.")] = None,
    as_json: AsJson = False,
) -> int:
    """Tell what would come of an event or a trigger if it were sent now: which routes fire, and whether in time.

    Nothing is started. The exit code is 1 where it would be refused.

    Args:
        file: a CloudEvent as JSON, or a list of them; with --route any data. - reads standard input.
    """
    if route is None:
        if file is None or id is not None or content_type is not None:
            raise BadRequest(
                "explain: " + ("no event is given" if file is None else "--id and --content-type go with --route only"),
                hint="headrace explain EVENT.json, or headrace explain --route NAME [FILE]",
            )
        events = _read_events(file)
        if deadline is not None:
            for event in [events] if isinstance(events, dict) else events:
                event["deadline"] = deadline
    with _client() as client:
        if route is None:
            explanation = client.quote(events)
        else:
            data, kind = (None, None) if file is None else read_data(file, content_type)
            explanation = client.quote(data, route=route, id=id, deadline=deadline, content_type=kind)
    if as_json:
        print_json(explanation)
    else:
        for part in render.explanation(explanation):
            render.console().print(part, soft_wrap=isinstance(part, Text))
    return GOOD if explanation.refused is None else RUN_FAILED


def _read_events(file: str) -> dict[str, Any] | list[dict[str, Any]]:
    body = read_input(file)
    try:
        return msgspec.json.decode(body, type=dict[str, Any] | list[dict[str, Any]])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadRequest(
            f"{file}: not an event or a list of events: {error}", hint="Send the JSON form of CloudEvents 1.0."
        ) from error


# ---------------------------------------------------------------- runs


@app.command(name="runs")
def list_runs(*, state: State = None, route: str | None = None, limit: int = 20, as_json: AsJson = False) -> None:
    """List runs, newest first.

    Args:
        route: only runs on this route.
        limit: how many at most.
    """
    if limit < 1:
        raise BadRequest(f"limit: {limit} is not possible", hint="Use 1 or more.")
    with _client() as client:
        views = [run.seen for run in client.runs(state=state, route=route, limit=limit) if run.seen]
    if as_json:
        return print_json({"runs": views})
    render.console().print(render.runs_table(views) if views else Text("no runs"))
    return None


@app.command(name="run")
def show_run(run_id: str, /, *, as_json: AsJson = False) -> int:
    """Show one run: its state, its deadline, where the time went, its invocations and its jobs."""
    with _client() as client:
        view = client.run(run_id).view()
    if as_json:
        print_json(view)
        return _standing(view)
    out = render.console()
    out.print(render.run_table(view))
    out.print(render.invocations_table(view.invocations))
    hidden = view.invocations_total - len(view.invocations)
    if hidden > 0:
        out.print(Text(f"and {hidden:,} more"))
    if view.jobs:
        out.print(render.jobs_table(view.jobs))
    if view.jobs_total > len(view.jobs):
        out.print(Text(f"and {view.jobs_total - len(view.jobs):,} more jobs"))
    if view.error is not None and view.error.traceback:
        out.print(Text(render.clean(view.error.traceback)), soft_wrap=True)
    return _standing(view)


@app.command
def result(
    run_id: str,
    /,
    *,
    wait: Annotated[float, Parameter(help="Wait for it for so many seconds.")] = 0.0,
    as_json: AsJson = False,
) -> int:
    """Print the answer of a run."""
    with _client() as client:
        run = client.run(run_id)
        try:
            payload = run.payload(timeout=max(0.0, wait))
        except TimeoutError:
            say(f"the run {run_id} has no answer yet", f"headrace result {run_id} --wait 60")
            return RUN_FAILED
        if as_json:
            print_json(shown(payload))
        else:
            print_answer(payload)
        return _standing(run.view())


@app.command
def watch(run_id: str | None = None, /, *, as_json: AsJson = False) -> int:
    """Follow one run to its end, or all runs until Ctrl-C.

    Args:
        run_id: the run; all runs if it is not given.
    """
    return asyncio.run(_watch(run_id, as_json))


async def _watch(run_id: str | None, as_json: bool) -> int:
    """Follow, in a loop of our own: Ctrl-C then stops it where it waits, and not between any two steps."""
    from headrace.client import AsyncClient  # here, as in `_client`

    out = render.console()
    async with AsyncClient(patience_s=WATCH_PATIENCE_S) as client:
        run = None if run_id is None else await client.run(run_id)
        async with aclosing(client.stream() if run is None else run.follow()) as events:
            async for event in events:
                if as_json:
                    print(render.as_json(event), flush=True)
                elif render.worth_a_line(event):
                    out.print(render.event_line(event, with_run=run is None), soft_wrap=True)
        return GOOD if run is None else _standing(await run.ended())


@app.command
def cancel(run_id: str, /) -> None:
    """Stop a run: what waits is dropped, what runs is stopped."""
    with _client() as client:
        client.cancel(run_id)
    print(f"{run_id} canceled")


# ---------------------------------------------------------------- what was given up on


@app.command
def dead(
    *,
    function: Annotated[str | None, Parameter(help="Only those of this function.")] = None,
    route: Annotated[str | None, Parameter(help="Only those in runs on this route.")] = None,
    all: Annotated[  # noqa: A002 - the word that people try
        bool, Parameter(negative="", help="Those in runs that were replayed too.")
    ] = False,
    limit: Annotated[int, Parameter(help="How many at most.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List invocations that were given up on, newest first."""
    if limit < 1:
        raise BadRequest(f"limit: {limit} is not possible", hint="Use 1 or more.")
    with _client() as client:
        views = client.dead(function=function, route=route, all=all, limit=limit)
    if as_json:
        return print_json({"dead": views})
    render.console().print(render.dead_table(views) if views else Text("nothing was given up on"))
    if views:
        say(f"{len(views)} given up on", f"headrace replay {views[0].run_id} gives the first another go")
    return None


Since = Annotated[str | None, Parameter(help='With --simulate: from when on, "24h" ago or an RFC 3339 instant.')]
Until = Annotated[str | None, Parameter(help="With --simulate: up to when, likewise; now if it is not given.")]
Policy = Annotated[str | None, Parameter(help="With --simulate: headrace (the default), edf, fifo or priority.")]
Slots = Annotated[int | None, Parameter(help="With --simulate: how many run at a time; as many as did if not given.")]
Save = Annotated[Path | None, Parameter(help="With --simulate: keep the records in this file.")]
From = Annotated[Path | None, Parameter(name="--from", help="With --simulate: take the records from such a file.")]


@app.command
def replay(
    *ids: str,
    simulate: Annotated[bool, Parameter(negative="", help="Simulate the past; nothing is run.")] = False,
    since: Since = None,
    until: Until = None,
    policy: Policy = None,
    slots: Slots = None,
    save: Save = None,
    from_: From = None,
    as_json: AsJson = False,
) -> int:
    """Give dead work another go, or see what the past would have been under another policy.

    `headrace replay ID...` starts dead invocations or failed runs again, as new runs with the functions as they are
    now. `headrace replay --simulate --since 24h --policy fifo` runs nothing: it takes what was recorded through the
    code that decides what starts next, in simulated time, and reports deadlines met, gained and lost.

    Args:
        ids: of invocations as `headrace dead --json` has them, or of runs.
    """
    given = {
        "--since": since,
        "--until": until,
        "--policy": policy,
        "--slots": slots,
        "--save": save,
        "--from": from_,
    }
    options = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    if simulate:
        if ids:
            raise BadRequest("--simulate takes no id", hint="Leave out --simulate to give dead work another go.")
        _become("replay", [*options, *(["--json"] if as_json else [])])
    if options:
        raise BadRequest(
            f"{options[0]} goes with --simulate only", hint="Add --simulate; to give dead work another go, name its id."
        )
    if not ids:
        raise BadRequest("no id is given", hint="`headrace dead` lists what can be replayed.")
    key = new_id()  # one for all: several branches of one run start it again once
    worst, refs = GOOD, []
    with _client(SEND_PATIENCE_S) as client:
        for each in ids:
            try:
                run = client.replay(each, key=key)
            except HeadraceError as error:
                worst = max(worst, tell(error))
                continue
            refs.append(run.ref)
            if not as_json and isinstance(run.ref, Replaying):
                print(run.run_id, f"replays {render.clean(each)} from {_BEGINS[run.ref.from_]}")
    if as_json:
        print_json({"runs": refs})
    return worst


# ---------------------------------------------------------------- in and out

_BEGINS = {"invocation": "the invocation that died", "start": "the start of its run"}


def _client(patience_s: float | None = None) -> Client:
    from headrace.sync import Client  # here, because the commands that run servers have no use for it

    return Client(patience_s=PATIENCE_S if patience_s is None else patience_s)


def _standing(view: RunView) -> int:
    """Return the exit code that tells how a run stands."""
    if view.state in ("failed", "canceled") or view.retracted_by is not None:
        return RUN_FAILED
    return RUN_FAILED if view.deadline_met is False else GOOD


if __name__ == "__main__":
    main()
