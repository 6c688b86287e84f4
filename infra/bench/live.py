"""Deadlines on a real platform: triggers that are due soon, among twice the work that the slots can do.

Two platforms one after the other, each started for this: with lanes and the order of Headrace, and without, as a queue
is: triggers carry no deadline, so they wait in the lane of all other work, and workers take what came first. Nobody
waits for an answer before the next is sent (open loop). What is counted is the time from acceptance to answer, as the
platform states it for each run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import msgspec
import uvloop
from msgspec import Struct

from headrace.client import AsyncClient
from headrace.errors import HeadraceError
from headrace.model import FINAL
from infra import telemetry
from infra.bench.load import quantile
from infra.settings import load
from infra.up import Platform

REPORTS = Path(__file__).parents[1] / "reports"
DEADLINE_S = 2.0
WORK_S = 0.05
LOAD = 2.0
TRIGGERS = 200
SPAN_S = 60.0
TICK_S = 0.1
LEAD_S = 3.0  # background work alone, so that there is a queue when the first trigger comes
DRAIN_S_MAX = 300.0
BACKGROUND_TYPE = "org.headrace.bench.background"
FUNCTIONS = f'''\
"""Work that keeps a slot for {WORK_S * 1000:g} ms."""

import time

from headrace import function, on


@on(type="{BACKGROUND_TYPE}")
@function
def background(x: int) -> int:
    time.sleep({WORK_S})
    return x


@on(name="with-deadline", deadline="{DEADLINE_S:g}s")
@on(name="without-deadline")
@function
def urgent(x: int) -> int:
    time.sleep({WORK_S})
    return x
'''


class Plan(Struct, frozen=True):
    """What is sent: so many triggers in so many seconds, among background work of so many times the capacity."""

    slots: int
    triggers: int = TRIGGERS
    span_s: float = SPAN_S
    load: float = LOAD

    @property
    def background_per_s(self) -> float:
        """Pieces of background work a second: ``load`` times what the slots can do if nothing else takes time."""
        return self.load * self.slots / WORK_S


class Found(Struct, frozen=True):
    """What came of the triggers: answered within the deadline, refused at the door, never answered; seconds.

    ``background_sent`` and ``background_done`` count the work among them up to the last trigger's answer.
    """

    order: str
    sent: int
    met: int
    refused: int
    unanswered: int
    p50_s: float
    p99_s: float
    background_sent: int
    background_done: int

    @property
    def share(self) -> float:
        """The share of all triggers sent that met the deadline."""
        return self.met / self.sent


class Report(Struct, frozen=True):
    """Both platforms side by side."""

    cores: int
    plan: Plan
    deadline_s: float
    work_s: float
    with_lanes: Found
    without: Found


async def measured(folder: Path, plan: Plan, *, lanes: bool) -> Found:
    """Start a platform, send what is planned, and return what came of it.

    Args:
        folder: for all that the platform keeps.
        plan: what is sent.
        lanes: whether deadlines order the work; else triggers have none and work is taken as it came.
    """
    order = "headrace" if lanes else "fifo"
    settings = load({}, data_dir=folder, port=0, worker_slots=plan.slots, order=order)
    async with Platform(settings) as running, AsyncClient(running.url, running.token) as client:
        source = folder / "work.py"
        source.write_text(FUNCTIONS)
        await client.deploy(source)
        for number in range(4 * plan.slots):  # children are born, functions loaded, durations learned
            await client.trigger("with-deadline", number, deadline="30s", wait=30)
        await client.publish([_event("warm", number) for number in range(4 * plan.slots)])
        background = asyncio.create_task(_background(client, plan))
        try:
            runs = await _triggers(client, plan, "with-deadline" if lanes else "without-deadline")
        finally:
            background.cancel()
            await asyncio.gather(background, return_exceptions=True)
        took = await _answered(client, [run for run in runs if run is not None])
        done = len(await client.runs(route="background", state="succeeded", limit=1_000_000))
        sent = len(await client.runs(route="background", limit=1_000_000))
    answered = sorted(seconds for seconds in took if seconds is not None)
    return Found(
        order=order,
        sent=plan.triggers,
        met=sum(seconds <= DEADLINE_S for seconds in answered),
        refused=sum(run is None for run in runs),
        unanswered=sum(seconds is None for seconds in took),
        p50_s=round(quantile(answered, 0.5), 3) if answered else 0.0,
        p99_s=round(quantile(answered, 0.99), 3) if answered else 0.0,
        background_sent=sent,
        background_done=done,
    )


def _event(prefix: str, number: int) -> dict[str, object]:
    return {
        "specversion": "1.0",
        "id": f"{prefix}-{number}",
        "source": "/bench/live",
        "type": BACKGROUND_TYPE,
        "data": number,
    }


async def _background(client: AsyncClient, plan: Plan) -> None:
    """Send background work at its rate until it is canceled, whatever becomes of it."""
    began, sent = time.monotonic(), 0
    posts: set[asyncio.Task[object]] = set()
    for tick in range(1, 1 << 30):
        due = int(tick * TICK_S * plan.background_per_s)
        events = [_event("background", number) for number in range(sent, due)]
        sent = due
        if events:
            post: asyncio.Task[object] = asyncio.create_task(_publish(client, events))
            posts.add(post)
            post.add_done_callback(posts.discard)
        await asyncio.sleep(max(0.0, began + tick * TICK_S - time.monotonic()))


async def _publish(client: AsyncClient, events: list[dict[str, object]]) -> None:
    with suppress(HeadraceError):  # what is refused is not accepted, and so not counted as sent
        await client.publish(events)


async def _triggers(client: AsyncClient, plan: Plan, route: str) -> list[str | None]:
    """Send the triggers evenly over the span; return the run of each, None for one that was refused."""

    async def send(number: int) -> str | None:
        await asyncio.sleep(LEAD_S + number * plan.span_s / plan.triggers)
        try:
            return (await client.trigger(route, number, id=f"trigger-{number}")).run_id
        except HeadraceError:
            return None

    return await asyncio.gather(*(send(number) for number in range(plan.triggers)))


async def _answered(client: AsyncClient, runs: list[str]) -> list[float | None]:
    """Return for each run the seconds from acceptance to its answer, as soon as all have ended; None for no answer."""
    took: dict[str, float | None] = {}
    give_up_at = time.monotonic() + DRAIN_S_MAX
    while len(took) < len(runs) and time.monotonic() < give_up_at:
        for run in runs:
            if run not in took:
                view = await client.view(run)
                if view.state not in FINAL:
                    break  # those after it have hardly ended either
                took[run] = view.time_to_solution_s
        await asyncio.sleep(TICK_S)
    return [took.get(run) for run in runs]


async def report(plan: Plan) -> Report:
    """Measure both, one after the other."""
    found: list[Found] = []
    for lanes in (True, False):
        with tempfile.TemporaryDirectory(prefix="headrace-live-") as folder:
            found.append(await measured(Path(folder), plan, lanes=lanes))
    return Report(os.cpu_count() or 1, plan, DEADLINE_S, WORK_S, *found)


def markdown(made: Report) -> str:
    """Return the report as text."""
    plan = made.plan
    each = f"{made.work_s * 1000:g} ms"
    lines = [
        "# Deadlines kept, on a real platform",
        "",
        "Written by `make bench-live`.",
        "",
        f"{made.cores} cores, {plan.slots} slots; every piece of work keeps one for {each}. {plan.triggers} triggers in"
        f" {plan.span_s:g} s, due after {made.deadline_s:g} s, among background work without deadline of"
        f" {plan.load:g} times the capacity ({plan.background_per_s:g} a second), sent whatever becomes of it.",
        "",
        "Without lanes: triggers carry no deadline and wait with all other work, which is taken first in first out"
        " (`HEADRACE_ORDER=fifo`); they are judged by the same time. Seconds from acceptance to answer, as each run"
        " states them.",
        "",
        "| | met | share | refused | unanswered | p50 s | p99 s | background sent | done by then |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, of in (("lanes, order of Headrace", made.with_lanes), ("no lanes, FIFO", made.without)):
        lines.append(
            f"| {name} | {of.met} of {of.sent} | {100 * of.share:.1f} % | {of.refused} | {of.unanswered} |"
            f" {of.p50_s:.3f} | {of.p99_s:.3f} | {of.background_sent:,} | {of.background_done:,} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, store."""
    options = argparse.ArgumentParser(prog="make bench-live", description=__doc__)
    options.add_argument("--slots", type=int, default=os.cpu_count() or 1, help="functions that run at a time")
    options.add_argument("--triggers", type=int, default=TRIGGERS)
    options.add_argument("--span", type=float, default=SPAN_S, help="seconds in which the triggers come")
    options.add_argument("--into", type=Path, default=REPORTS, help="folder for deadlines-live.md and .json")
    chosen = options.parse_args()
    telemetry.configure(level="error", role="bench", terminal=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        made = runner.run(report(Plan(chosen.slots, chosen.triggers, chosen.span)))
    text = markdown(made)
    chosen.into.mkdir(parents=True, exist_ok=True)
    (chosen.into / "deadlines-live.md").write_text(text)
    (chosen.into / "deadlines-live.json").write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n")
    print(text)


if __name__ == "__main__":
    main()
