"""Prints one table: the floor and the platform, side by side."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform as machine
import tempfile
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from infra import telemetry
from infra.bench import cases, floor
from infra.bench.processes import Usage, platform
from infra.embedded import NatsServer
from infra.settings import Settings, load
from infra.up import Platform

MS = 1000.0


async def _floor(folder: Path, rows: list[tuple[str, str, str]], count: int) -> float:
    server = NatsServer(folder)
    await server.start()
    try:
        per_s, p50, p99 = await floor.measure(server, count=count // 10, in_flight=1)
        rows.append(
            (
                "(a) floor: plain nats-py loop, 1 in flight",
                f"{per_s:,.0f}/s",
                f"p50 {p50 * MS:.1f} p99 {p99 * MS:.1f} ms",
            )
        )
        per_s, p50, p99 = await floor.measure(server, count=count, in_flight=64)
        rows.append(
            (
                "(a) floor: plain nats-py loop, 64 in flight",
                f"{per_s:,.0f}/s",
                f"p50 {p50 * MS:.1f} p99 {p99 * MS:.1f} ms",
            )
        )
        return per_s
    finally:
        await server.stop()


async def _cases(of: cases.Bench, rows: list[tuple[str, str, str]], scale: float) -> None:
    def n(count: int) -> int:
        return max(200, int(count * scale) // 100 * 100)

    await cases.single_posts(of, runs=n(1000), in_flight=16)  # children are born and functions loaded
    for in_flight in (1, 64, 256):
        got = await cases.single_posts(of, runs=n(2000 if in_flight == 1 else 10_000), in_flight=in_flight)
        rows.append(
            (
                f"(b) single POSTs accepted, {in_flight} in flight",
                f"{got.accepted_per_s:,.0f}/s",
                f"202 after p50 {got.p50_s * MS:.1f} p99 {got.p99_s * MS:.1f} ms; answered {got.answered_per_s:,.0f}/s",
            )
        )
    got = await cases.batches(of, runs=n(20_000), size=100, in_flight=8)
    rows.append(
        (
            "(b) CloudEvents in batches of 100, 8 in flight",
            f"{got.accepted_per_s:,.0f}/s",
            f"202 after p50 {got.p50_s * MS:.1f} p99 {got.p99_s * MS:.1f} ms",
        )
    )
    rows.append(
        ("(c) trigger to answer, by batch", f"{got.answered_per_s:,.0f}/s", "no-op; last answer synced to disk")
    )
    per_s, p50, p99 = await cases.one_at_a_time(of, runs=n(1000))
    rows.append(("(c) trigger to answer, 1 in flight", f"{per_s:,.0f}/s", f"p50 {p50 * MS:.1f} p99 {p99 * MS:.1f} ms"))
    took = [await cases.map_of(of, members=n(10_000)) for _ in range(3)]
    rows.append(
        (
            f"(d) map of {n(10_000):,} no-ops, with join",
            f"{sorted(took)[1]:.2f} s",
            "of 3: " + ", ".join(f"{t:.2f}" for t in took),
        )
    )


async def _memory(of: cases.Bench, console: Console, runs: int) -> None:
    def read() -> dict[str, Usage]:
        return platform(of.platform.processes)

    await cases.batches(of, runs=runs, size=100, in_flight=8)  # buffers have their working size
    before = await cases.settled(read)
    await cases.batches(of, runs=runs, size=100, in_flight=8)
    after = await cases.settled(read)
    idle = await cases.idle_cpu(of, seconds=10)
    table = Table(title=f"(e) memory before and after {runs:,} runs more, and CPU when idle")
    for heading in ("process", "before MiB", "after MiB", "growth", "idle CPU % of a core"):
        table.add_column(heading, justify="left" if heading == "process" else "right")
    for name in before:
        grown = after[name].resident_mib - before[name].resident_mib
        table.add_row(
            name,
            f"{before[name].resident_mib:.0f}",
            f"{after[name].resident_mib:.0f}",
            f"{grown:+.0f}",
            f"{idle.get(name, 0.0):.2f}",
        )
    total = sum(u.resident_mib for u in after.values()) - sum(u.resident_mib for u in before.values())
    table.add_row("all", "", "", f"{total:+.0f}", f"{sum(idle.values()):.2f}")
    console.print(table)


async def _main(scale: float, memory_runs: int) -> None:
    console = Console(width=140)
    rows: list[tuple[str, str, str]] = []
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        floor_per_s = await _floor(Path(folder) / "floor", rows, max(1000, int(10_000 * scale)))
        settings: Settings = load({}, data_dir=Path(folder) / "platform", port=0)
        async with Platform(settings) as running, cases.bench(running) as of:
            await _cases(of, rows, scale)
            table = Table(title=f"Headrace on {os.cpu_count()} cores, {machine.machine()}, everything synced to disk")
            for heading in ("what", "figure", "detail"):
                table.add_column(heading, overflow="fold")
            for row in rows:
                table.add_row(*row)
            console.print(table)
            console.print(
                f"Ratios in one run count; absolute figures hold for this machine. Floor: {floor_per_s:,.0f}/s."
            )
            if memory_runs:
                await _memory(of, console, memory_runs)


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(prog="make bench", description=__doc__)
    options.add_argument("--scale", type=float, default=1.0, help="share of the full number of runs")
    options.add_argument(
        "--memory-runs", type=int, default=50_000, help="runs between the two looks at memory; 0: none"
    )
    chosen = options.parse_args()
    telemetry.configure(level="error", role="bench", terminal=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_main(chosen.scale, chosen.memory_runs))


if __name__ == "__main__":
    main()
