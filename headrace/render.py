"""What the command line shows: text for a terminal, made of things from outside that may hold anything.

All such text goes through ``clean`` and into ``rich.text.Text``, which knows no markup: no name of a run can colour the
terminal, make a link in it, or write over a line.
"""

from __future__ import annotations

import json
import sys
import time
import unicodedata
from collections.abc import Iterable
from typing import Any, TextIO

import msgspec
from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from headrace.clock import parse_instant
from headrace.model import (
    FINAL,
    DeadView,
    Explanation,
    FunctionView,
    InvocationView,
    JobView,
    Quote,
    Route,
    RouteExplanation,
    RouteView,
    RunView,
    SiteView,
    StreamEvent,
)

PIPE_COLUMNS = 200
_STYLES = {
    "succeeded": "green",
    "up": "green",
    "met": "green",
    "running": "cyan",
    "failed": "red",
    "dead": "red",
    "down": "red",
    "missed": "red",
    "retracted": "red",
    "canceled": "yellow",
    "superseded": "yellow",
    "degraded": "yellow",
    "on track": "green",
    "at risk": "yellow",
    "infeasible": "red",
}
_PARTS = {
    "ahead": "work that is ahead",
    "wait": "the way to a worker",
    "run": "the function",
    "rest": "what follows it",
}
_HARMLESS = frozenset("\n\t")
_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # controls, bidirectional and other formats, surrogates


def clean(text: object) -> str:
    """Return text without anything that a terminal would obey; tabs and ends of lines stay."""
    return "".join(c for c in str(text) if c in _HARMLESS or unicodedata.category(c) not in _CATEGORIES)


def one_line(text: object, chars_max: int = 200) -> str:
    """Return text cleaned, on one line, and cut to a length."""
    flat = " ".join(clean(text).split())
    return flat if len(flat) <= chars_max else flat[: chars_max - 3] + "..."


def as_json(value: object) -> str:
    """Return JSON on one line, in ASCII: nothing in it can act on a terminal."""
    return json.dumps(msgspec.to_builtins(value))


def console(file: TextIO | None = None) -> Console:
    """Return a console that takes text as it is; where it is no terminal, lines are not broken."""
    made = Console(file=file or sys.stdout, markup=False, highlight=False, emoji=False, soft_wrap=False)
    if not made.is_terminal:
        made.width = max(made.width, PIPE_COLUMNS)
    return made


def seconds(value: float | None) -> str:
    """Return a duration as people say it: "850 us", "12.3 ms", "1.25 s", "2 min 5 s", "3 h 4 min"."""
    if value is None:
        return ""
    if value < 0.001:
        return f"{value * 1e6:.0f} us"
    if value < 1.0:
        return f"{value * 1e3:.3g} ms"
    if value < 60.0:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


# ---------------------------------------------------------------- tables


def runs_table(views: Iterable[RunView], now: float | None = None) -> Table:
    """Return runs, one per line."""
    table = _table("run", "route", "state", "accepted", ">answer after", "deadline")
    for view in views:
        table.add_row(
            _id(view.run_id),
            _text(view.route),
            _state(_fate(view)),
            _text(_moment(view.accepted_at)),
            _text(seconds(view.time_to_solution_s)),
            _deadline(view, time.time() if now is None else now),
        )
    return table


def run_table(view: RunView, now: float | None = None) -> Table:
    """Return the facts of one run, one per line."""
    table = Table.grid(Column(style="dim", no_wrap=True), Column(overflow="fold"), padding=(0, 2))
    ledger = msgspec.to_builtins(view.time_ledger)
    spent = ", ".join(f"{name.removesuffix('_s')} {seconds(value)}" for name, value in ledger.items() if value)
    event = f"{view.event.type} {view.event.id} from {view.event.source}"
    facts: list[tuple[str, Text]] = [
        ("run", _text(view.run_id)),
        ("route", _text(view.route)),
        ("event", _text(one_line(event, 300))),
        ("state", _state(view.state)),
        ("accepted", _text(_moment(view.accepted_at))),
        ("deadline", _deadline(view, time.time() if now is None else now)),
        ("expected", _expected(view.quote)),
        ("answer after", _text(seconds(view.time_to_solution_s))),
        ("time went to", _text(spent)),
    ]
    if view.fidelity is not None:
        facts.append(("fidelity", _text(fidelity(view))))
    if view.thread:
        facts.insert(3, ("thread", _text(one_line(", ".join(view.thread), 300))))
    if view.superseded_by is not None:
        facts.append(("superseded by", _text(view.superseded_by)))
    if view.retracted_by is not None:
        facts.append(("retracted by", Text(clean(view.retracted_by), "red")))
    if view.replay_of is not None:
        facts.append(("replay of", _text(view.replay_of.run_id)))
    if view.replayed_as is not None:
        facts.append(("replayed as", _text(view.replayed_as)))
    if view.error is not None:
        facts.append(("error", Text(f"{clean(view.error.kind)}: {clean(view.error.message)}", "red")))
    for name, value in facts:
        if value.plain:
            table.add_row(name, value)
    return table


def fidelity(view: RunView) -> str:
    """Return how good the answer of a run is, and what there was before; empty where there is only one kind."""
    worth = view.fidelity
    if worth is None:
        return ""
    said = "full" if worth.level == 0 else f"level {worth.level} of {worth.of - 1}"
    before = [f"level {each.fidelity.level}" for each in view.answers[:-1]]
    return f"{said} ({worth.function})" + (f", after {' and '.join(before)}" if before else "")


def invocations_table(invocations: Iterable[InvocationView]) -> Table:
    """Return the invocations of a run, one per line."""
    table = _table("invocation", "function", "version", "state", ">tries", ">took", "worker", "error")
    for each in invocations:
        table.add_row(
            _id(each.invocation_id),
            _text(each.function),
            _text(each.version),
            _state(each.state),
            _text(each.attempts),
            _text(seconds(_between(each.started_at, each.ended_at))),
            _text(each.worker or ""),
            _text(one_line(each.error.message, 100) if each.error else ""),
        )
    return table


def jobs_table(jobs: Iterable[JobView]) -> Table:
    """Return the batch jobs of a run, one per line."""
    table = _table("job", "site", "native id", "state", ">queued", ">ran", ">exit code", "why")
    for job in jobs:
        table.add_row(
            _id(job.job_id),
            _text(job.site),
            _text(one_line(job.native_id or "", 40)),
            _state(job.state),
            _text(seconds(_between(job.submitted_at, job.started_at))),
            _text(seconds(_between(job.started_at, job.ended_at))),
            _text("" if job.exit_code is None else job.exit_code),
            _text(one_line(_why(job), 100)),
        )
    return table


def _why(job: JobView) -> str:
    """Return why a job waits, or ended as it did or, where that is not said, was taken to the site where it is."""
    if job.why:
        return job.why
    if job.error is not None:
        return job.error.message
    return job.reason or "; ".join(f"moved from {move.site}: {move.why}" for move in job.moves)


def _between(earlier: str | None, later: str | None) -> float | None:
    return None if earlier is None or later is None else max(0.0, parse_instant(later) - parse_instant(earlier))


def dead_table(views: Iterable[DeadView]) -> Table:
    """Return invocations that were given up on, one per line."""
    table = _table("when", "function", "run", ">tries", "error", "replayed as")
    for view in views:
        error = f"{view.error.kind}: {view.error.message.strip().partition(chr(10))[0]}"
        table.add_row(
            _id(_moment(view.at)),
            _text(view.function),
            _id(view.run_id),
            _text(view.attempts),
            Text(one_line(error, 120), "red"),
            _id(view.replayed_as or ""),
        )
    return table


def functions_table(views: Iterable[FunctionView]) -> Table:
    """Return functions, one per line."""
    table = _table("function", "version", ">usually runs", "timeout", ">retries", "registered", "what it does")
    for view in views:
        usual = view.expected.get("run")
        table.add_row(
            _id(view.name),
            _text(view.version),
            _text("" if usual is None else f"{seconds(usual.p50_s)} to {seconds(usual.p90_s)}"),
            _text(view.options.timeout),
            _text(view.options.retries),
            _text(_moment(view.registered_at)),
            _text(one_line(view.doc.partition("\n")[0], 80)),
        )
    return table


def routes_table(views: Iterable[RouteView]) -> Table:
    """Return routes, one per line."""
    table = _table("route", "function", "takes", "deadline", "when late", "admission", ">in flight at most")
    for view in views:
        rule = view.route.filter
        parts = [] if rule is None else [("type", rule.type), ("source", rule.source), ("subject", rule.subject)]
        takes = ", ".join(f"{name} {value}" for name, value in parts if value) or "triggers by its name"
        table.add_row(
            _id(view.name),
            _text(view.route.function),
            _text(one_line(takes, 100)),
            _text(view.route.deadline or ""),
            _text(view.route.on_late if view.route.deadline else ""),
            _text(_admission(view.route)),
            _text(view.route.max_in_flight or ""),
        )
    return table


def _admission(route: Route) -> str:
    return ", ".join([route.admission, *(["newest wins"] if route.newest_wins else [])])


def explanation(told: Explanation) -> Iterable[Table | Text]:
    """Yield what would come of an event or a trigger, part by part."""
    for event in told.events:
        yield Text(one_line(f"{event.event.type} {event.event.id} from {event.event.source}", 300), "bold")
        fires = [route for route in event.routes if route.fires]
        silent = [route for route in event.routes if not route.fires]
        yield _fires_table(fires) if fires else Text("no route takes this", "yellow")
        for route in fires:
            yield from _said_of_route(route)
        if silent:
            table = _table("not taken by", "because")
            for route in silent:
                table.add_row(_id(route.route), _text(one_line(route.why, 300)))
            yield table
    if told.refused is not None:
        told_before = any(route.refused == told.refused for event in told.events for route in event.routes)
        why = "" if told_before else f": {one_line(told.refused.detail, 500)}"
        yield Text(f"It would be refused now ({told.refused.status}){why}", "red")
        if told.refused.hint:
            yield Text(f"hint: {one_line(told.refused.hint, 500)}")


def _fires_table(routes: Iterable[RouteExplanation]) -> Table:
    table = _table("route", "function", "version", "deadline", "verdict", ">answer after", ">at most, 9 in 10")
    for route in routes:
        quote = route.quote or Quote()
        table.add_row(
            _id(route.route),
            _text(route.function or ""),
            _text(route.version or ""),
            _text("" if route.deadline is None else _moment(route.deadline)),
            _state(quote.verdict.replace("_", " ")),
            _text(seconds(quote.p50_s)),
            _text(seconds(quote.p90_s)),
        )
    return table


def _said_of_route(route: RouteExplanation) -> Iterable[Text | Table]:
    """Yield what is special about an event on one route, and how its time is expected to go."""
    name = clean(route.route)
    if route.duplicate_of is not None:
        yield Text(f"{name}: it came before, as the run {clean(route.duplicate_of)}; nothing new is started", "yellow")
    if route.refused is not None:
        yield Text(f"{name}: refused: {one_line(route.refused.detail, 500)}", "red")
    if route.overruled_by is not None:
        yield Text(f"{name}: it would end at once, for the later run {clean(route.overruled_by)}", "yellow")
    if route.overrules:
        yield Text(f"{name}: it would take the place of {one_line(', '.join(route.overrules), 300)}")
    if route.parts:
        parts = ", ".join(f"{_PARTS[part.part]} {seconds(part.p50_s)}" for part in route.parts)
        yield Text(f"{name}: of that usually {parts}")
    if len(route.plan) > 1:
        table = _table("plan", "version", "verdict", ">answer after", "taken")
        for choice in route.plan:
            table.add_row(
                _id(choice.function),
                _text(choice.version),
                _state(choice.quote.verdict.replace("_", " ")),
                _text(seconds(choice.quote.p50_s)),
                _text("yes" if choice.chosen else f"no: {one_line(choice.why, 200)}"),
            )
        yield table


def sites_table(views: Iterable[SiteView]) -> Table:
    """Return sites, one per line."""
    table = _table("site", "kind", "status", ">nodes free", ">GPUs free", ">waiting", ">usual wait", "last seen", "why")
    for view in views:
        table.add_row(
            _id(view.name),
            _text(view.kind),
            _state(view.status),
            _text(_free(view.nodes)),
            _text(_free(view.gpus)),
            _text("" if view.queue.get("jobs") is None else view.queue["jobs"]),
            _text(seconds(view.queue.get("wait_p50_s"))),
            _text("" if view.last_seen_at is None else _moment(view.last_seen_at)),
            _text(one_line(view.detail)),
        )
    return table


def _free(counted: dict[str, int]) -> str:
    """Return how many of something are free, of how many; nothing where nobody can tell."""
    return f"{counted['free']} of {counted['total']}" if "free" in counted else ""


def worth_a_line(event: StreamEvent) -> bool:
    """Say whether an event tells more than that a job was heard, which the live page shows and a terminal does not."""
    return event.kind != "job" or "state" in event.data


def event_line(event: StreamEvent, *, with_run: bool) -> Text:
    """Return what happened, on one line."""
    data = event.data
    line = Text()
    if with_run:
        line.append(clean(data.get("run_id", "")) + "  ", "dim")
    line.append(f"{clean(event.kind):<11}")
    line.append(_said(event.kind, data))
    return line


def _said(kind: str, data: dict[str, Any]) -> Text:
    if kind == "log":
        return _text(f"{data.get('level', '')}: {str(data.get('text', '')).rstrip()}")
    if kind == "progress":
        return _text(one_line(f"{float(data.get('fraction') or 0.0):.0%} {data.get('note', '')}"))
    line = _state(str(data.get("status" if kind == "site" else "state", "")))
    if kind == "site":
        return line.append(" " + one_line(f"{data.get('name', '')} {data.get('detail', '')}"))
    if kind == "job":
        return line.append(" " + one_line(f"{data.get('job_id', '')} at {data.get('site', '')}"))
    name = data.get("function") if kind == "invocation" else data.get("route")
    line.append(f" {one_line(name)}" if name else "")
    if data.get("time_to_solution_s") is not None:
        line.append(f", answer after {seconds(float(data['time_to_solution_s']))}")
    if data.get("deadline_met") is not None:
        line.append(", deadline ")
        line.append(_state("met" if data["deadline_met"] else "missed"))
    if isinstance(data.get("error"), dict):
        line.append(f": {one_line(data['error'].get('message', ''))}", "red")
    return line


# ---------------------------------------------------------------- cells


def _table(*names: str) -> Table:
    """Return an empty table; a name that begins with ">" is set to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    table.columns[0].no_wrap = True
    return table


def _text(value: object) -> Text:
    return Text(clean(value))


def _id(value: str) -> Text:
    return Text(clean(value), no_wrap=True)


def _state(state: str) -> Text:
    return Text(clean(state), _STYLES.get(state, ""))


def _moment(instant: str) -> str:
    """Return an instant to the second; the microseconds are in the JSON."""
    return instant.partition(".")[0].rstrip("Z").replace("T", " ") + "Z"


def _expected(quote: Quote) -> Text:
    """Return what was said at the door; nothing where nothing was known."""
    if quote.p50_s is None or quote.p90_s is None:
        return Text("")
    line = _state(quote.verdict.replace("_", " "))
    return line.append(f", after {seconds(quote.p50_s)}, 9 in 10 within {seconds(quote.p90_s)}", "")


def _fate(view: RunView) -> str:
    """Return the state, or what ended a run that nothing was wrong with."""
    if view.retracted_by is not None:
        return "retracted"
    return "superseded" if view.state == "canceled" and view.superseded_by is not None else view.state


def _deadline(view: RunView, now: float) -> Text:
    if view.deadline_met is not None:
        return _state("met" if view.deadline_met else "missed")
    if view.deadline is None or view.state in FINAL:
        return Text("")
    left = parse_instant(view.deadline) - now
    if left < 0:
        return Text(f"{seconds(-left)} ago", "red")
    line = Text(f"in {seconds(left)}")
    if view.quote.verdict in ("at_risk", "infeasible"):
        line.append(", ").append(_state(view.quote.verdict.replace("_", " ")))
    return line
