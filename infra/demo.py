"""``headrace demo``: real triggers in, the right answers out, before their deadlines.

Deploys the example functions to a running platform, uploads their inputs, sends every trigger, waits for the answers
and compares each with the one that is known; a ``Show`` says which. It uses the public client only: what it does, any
user can do.
"""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from headrace.client import AsyncClient
from headrace.clock import format_instant
from headrace.errors import Conflict, RunFailed
from headrace.handle import AsyncRun
from headrace.model import Event, RunView, TimeLedger
from infra.demo_triggers import EVERYTHING, Show, Trigger

ANSWER_WAIT_S = 75.0  # longer than any deadline here, so that a late answer is seen as late
PLAIN_WIDTH = 160  # of the table where the output is no terminal


@dataclass(frozen=True)
class Result:
    """What became of one trigger; ``fault`` says what is wrong with the answer, and is empty when it is right."""

    trigger: Trigger
    view: RunView
    fault: str

    @property
    def good(self) -> bool:
        """Whether the answer was right and on time."""
        return not self.fault and self.view.deadline_met is True


async def demo(url: str, token: str, *, show: Show = EVERYTHING, console: Console | None = None) -> bool:
    """Run the demo on a platform, print its table, and return whether every answer was right and on time.

    Raises:
        PlatformUnreachable: no gateway answers at ``url``.
    """
    console = console or Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    async with AsyncClient(url, token) as client:
        names = [view.name for path in show.files for view in await client.deploy(path)]
        console.print(f"Deployed {len(names)} functions from {len(show.files)} files: {', '.join(names)}.")
        files = show.inputs()
        uris = dict(zip(files, await asyncio.gather(*map(client.upload, files.values())), strict=True))
        size = sum(path.stat().st_size for path in files.values())
        console.print(f"Uploaded {len(uris)} inputs, {size / 1e6:.1f} MB.")
        began = time.perf_counter()
        sent, repeated = await send(client, show.triggers(uris))
        console.print(f"Sent {len(sent)} triggers, and one of them a second time.")
        results = await asyncio.gather(*(outcome(trigger, run) for trigger, run in sent))
        took_s = time.perf_counter() - began
    print_table(console, results)
    for result in results:
        if len(result.view.answers) > 1:
            console.print(improvement(result.trigger, result.view))
    console.print(f"The event that was sent twice {repeated or 'ran once'}.")
    for result in results:
        if result.fault:
            console.print(Text(f"{result.trigger.title} ({result.view.run_id}): {result.fault}", style="red"))
    good = sum(result.good for result in results)
    console.print(f"{good} of {len(results)} answers were right and on time; all were there after {took_s:.1f} s.")
    return good == len(results) and not repeated


async def send(client: AsyncClient, chosen: Sequence[Trigger]) -> tuple[list[tuple[Trigger, AsyncRun]], str]:
    """Send all triggers: CloudEvents as one batch, the others to their route by name.

    Returns:
        Each trigger with its run; and what was wrong with the answer to the first event when it was sent again.
    """
    series = uuid.uuid4().hex[:12]  # a second demo on the same platform starts runs of its own
    sent: list[tuple[Trigger, AsyncRun]] = []
    events: list[tuple[Trigger, Event]] = []
    for number, trigger in enumerate(chosen):
        event_id = f"{series}-{number}"
        if trigger.by_name:
            run = await client.trigger(trigger.route, trigger.data, id=event_id, content_type=trigger.content_type)
            sent.append((trigger, run))
        else:
            event = Event(
                id=event_id,
                source="/headrace/demo",
                type=trigger.type,
                time=format_instant(time.time()),
                data=trigger.data,
                extensions={} if trigger.deadline is None else {"deadline": trigger.deadline},
            )
            events.append((trigger, event))
    runs = await client.publish([event for _, event in events])
    if len(runs) != len(events):
        raise Conflict(
            f"{len(events)} events started {len(runs)} runs",
            hint="Another route of this platform takes the events of the demo too; run it on a platform of its own.",
        )
    again = await client.publish(events[0][1])
    once = len(again) == 1 and again[0].duplicate and again[0].run_id == runs[0].run_id
    by_run = [(trigger, run) for (trigger, _), run in zip(events, runs, strict=True)]
    order = {id(trigger): number for number, trigger in enumerate(chosen)}
    return sorted(sent + by_run, key=lambda pair: order[id(pair[0])]), "" if once else "was not seen as a repeat"


async def outcome(trigger: Trigger, run: AsyncRun) -> Result:
    """Wait until the run has ended, and say what is wrong with it, if anything."""
    fault = ""
    try:
        async with asyncio.timeout(ANSWER_WAIT_S):
            answer = await run.result()
            view = await run.ended()
            if view.answers:
                found = [(await run.result_at(one.fidelity.level), one.fidelity.level) for one in view.answers]
                fault = next((wrong for each, level in found if (wrong := trigger.wrong(each, level))), "")
            else:
                fault = trigger.wrong(answer)
    except TimeoutError:
        view = await run.view()
        fault = f"it has not ended after {ANSWER_WAIT_S:.0f} s"
    except RunFailed as error:
        view = await run.view()
        fault = str(error)
    if view.route != trigger.route:
        fault = f"it was taken by the route {view.route}, not {trigger.route}"
    return Result(trigger=trigger, view=view, fault=fault)


def print_table(console: Console, results: Sequence[Result]) -> None:
    """Print one row per run: where its time went, how long it had, and whether it was right and on time."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("run", no_wrap=True, overflow="ellipsis", min_width=9)
    table.add_column("trigger", no_wrap=True, overflow="ellipsis", min_width=16)
    table.add_column("route", no_wrap=True)
    table.add_column("where the time went (ms)")
    table.add_column("time to solution", justify="right")
    table.add_column("deadline", justify="right")
    table.add_column("met", justify="center")
    table.add_column("fidelity", no_wrap=True)
    table.add_column("answer", justify="center")
    for result in results:
        view = result.view
        solution = view.time_to_solution_s
        table.add_row(
            view.run_id,
            result.trigger.title,
            view.route,
            spent(view.time_ledger),
            "-" if solution is None else f"{solution:.3f} s",
            allowed(view),
            Text("yes", style="green") if view.deadline_met else Text("no", style="red"),
            fidelity(view),
            Text("wrong", style="red") if result.fault else Text("right", style="green"),
        )
    console.print(table)


def fidelity(view: RunView) -> str:
    """Return how good the answer was that came first, and what took its place; empty where there are no variants."""
    levels = ["full" if one.fidelity.level == 0 else str(one.fidelity.level) for one in view.answers]
    return ", ".join(levels) if levels in ([], ["full"]) else f"level {', '.join(levels)}"


def spent(ledger: TimeLedger) -> str:
    """Return the parts of the time that matter, in milliseconds, in the order in which they were spent."""
    parts = {
        "gateway": ledger.gateway_s,
        "lane": ledger.lane_s,
        "stage in": ledger.stage_in_s,
        "queue": ledger.queue_s,
        "run": ledger.run_s,
        "stage out": ledger.stage_out_s,
        "commit": ledger.commit_s,
    }
    return ", ".join(f"{name} {seconds * 1e3:.0f}" for name, seconds in parts.items() if seconds >= 0.0005) or "-"


def improvement(trigger: Trigger, view: RunView) -> str:
    """Return in one sentence when which answer of a run was there."""
    began = datetime.fromisoformat(view.accepted_at)
    told = [
        f"{one.fidelity.function} after {(datetime.fromisoformat(one.answered_at) - began).total_seconds():.1f} s"
        for one in view.answers
    ]
    return f"{trigger.title} ({allowed(view)}): {told[0]}, superseded by {' and '.join(told[1:])}."


def allowed(view: RunView) -> str:
    """Return how long the run had from its acceptance."""
    if view.deadline is None:
        return "none"
    seconds = (datetime.fromisoformat(view.deadline) - datetime.fromisoformat(view.accepted_at)).total_seconds()
    return f"{seconds:.0f} s"
