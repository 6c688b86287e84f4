"""What came of the trials: a table for the terminal, a JSON file for each fault, and a summary in Markdown."""

from __future__ import annotations

import os
import platform as machine
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from headrace.clock import format_instant
from headrace.errors import HeadraceError
from infra.chaos.lines import Figure, Result
from infra.programs import nats_program, redis_program
from infra.settings import Settings
from streams.topology import ACK_WAIT_S

REPORTS = Path(__file__).resolve().parent.parent / "reports"
SUMMARY = "README.md"
COUNTS = ("lost", "doubled", "ghost", "wrong", "late")


class Report(Struct, frozen=True, kw_only=True):
    """One trial as it is kept: what was tried, with what, and what came of it. ``skipped`` says why it was not."""

    fault: str
    title: str
    seed: int
    scale: float
    began: str
    took_s: float
    versions: dict[str, str] = {}
    settings: dict[str, str] = {}
    machine: str = ""
    result: Result | None = None
    skipped: str = ""
    failed: str = ""

    @property
    def good(self) -> bool:
        """Whether the promise was kept and every bar held; what was skipped is neither."""
        return self.result is not None and self.result.good


def bound(n: int) -> str:
    """Return the rate below which the failures lie with 95 % confidence after none in ``n`` trials."""
    return f"< {3 / n:.2g}" if n else "-"


def versions() -> dict[str, str]:
    """Return the versions of what was tried."""
    found = {"headrace": version("headrace"), "python": sys.version.split()[0], "kernel": machine.release()}
    for name, program in (("nats-server", nats_program), ("redis-server", redis_program)):
        try:
            said = subprocess.run(
                [str(program()), "--version"], capture_output=True, text=True, timeout=10, check=False
            )
            words = said.stdout.replace("=", " ").split()
            found[name] = next((word.lstrip("v") for word in words if word.lstrip("v")[:1].isdigit()), "")
        except (OSError, HeadraceError):
            found[name] = "not found"
    return found


def settings() -> dict[str, str]:
    """Return the settings that the promise hangs on, as they are shipped."""
    return {
        "sync_interval": "always",
        "replicas": str(Settings().log_replicas),
        "ack_wait_s": f"{ACK_WAIT_S:g}",
        "worker_slots": str(Settings().worker_slots or os.cpu_count()),
    }


def where() -> str:
    """Return what it ran on."""
    return f"{os.cpu_count()} cores, {machine.machine()}"


def stamp(began: float) -> str:
    """Return an instant for a report."""
    return format_instant(began)


def write(reports: list[Report], folder: Path = REPORTS) -> None:
    """Write each report, and the summary of all reports that are there, those of earlier calls included."""
    folder.mkdir(parents=True, exist_ok=True)
    for report in reports:
        if report.result is not None:
            body = msgspec.json.format(msgspec.json.encode(report), indent=2)
            (folder / f"{report.fault}.json").write_bytes(body + b"\n")
    kept = [msgspec.json.decode(path.read_bytes(), type=Report) for path in folder.glob("[A-Z]*.json")]
    (folder / SUMMARY).write_text(summary(sorted(kept, key=_order)))


def _order(report: Report) -> tuple[str, int]:
    return report.fault[:1], int("".join(c for c in report.fault if c.isdigit()) or 0)


def summary(reports: list[Report]) -> str:
    """Return the summary of reports as Markdown."""
    head = ["fault", "n accepted", "kills", "seed", "scale", *COUNTS, "95 % bound", "bars held"]
    lines = [
        "# What was tried, and what came of it",
        "",
        "Written by `make chaos`. `lost`: accepted, and no end, or an end without its effect. `doubled`: two committed",
        "effects under one key. `ghost`: an effect that nobody was promised. `wrong`: a state that a replay of the log",
        "does not give. `late`: ended well after its deadline. No failure in n trials means a rate below 3/n with 95 %",
        "confidence. Each JSON file beside this one holds all that was found.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    lines += ["| " + " | ".join(_row(report)) + " |" for report in reports]
    for report in reports:
        result = report.result
        if result is None:
            continue
        lines += ["", f"## {report.fault}: {report.title}", ""]
        lines += [f"- {_told(figure)}" for figure in result.figures]
        lines += [f"- {note}" for note in result.notes]
        if result.verdict is not None and result.verdict.bodies_again:
            lines.append(
                f"- bodies run again after a crash, their effects committed once: {result.verdict.bodies_again}"
            )
        versions_said = ", ".join(f"{name} {text}" for name, text in report.versions.items())
        settings_said = ", ".join(f"{name} {text}" for name, text in report.settings.items())
        lines += ["", f"{report.began}, {report.took_s:.0f} s, {report.machine}; {versions_said}; {settings_said}."]
    return "\n".join(lines) + "\n"


def _told(figure: Figure) -> str:
    bar = f" (bar: {figure.bar})" if figure.bar else ""
    mark = {True: "", False: " **not held**", None: ""}[figure.good]
    return f"{figure.name}: {figure.value}{bar}{mark}"


def _row(report: Report) -> list[str]:
    result = report.result
    verdict = result.verdict if result is not None else None
    held = [f for f in result.figures if f.good is not None] if result is not None else []
    counts = [str(getattr(verdict, name)) for name in COUNTS] if verdict is not None else ["-"] * len(COUNTS)
    return [
        report.fault,
        f"{verdict.accepted:,}" if verdict is not None else "-",
        str(result.kills) if result is not None else "-",
        str(report.seed),
        f"{report.scale:g}",
        *counts,
        bound(verdict.accepted) if verdict is not None else "-",
        f"{sum(f.good is True for f in held)} of {len(held)}",
    ]


def show(reports: list[Report], console: Console) -> None:
    """Print the table of all, and below it every figure."""
    table = Table(title="What was tried, and what came of it", box=None, header_style="bold", pad_edge=False)
    for heading in ("fault", "what", "n", "kills", "seed", *COUNTS, "bound", "bars held"):
        table.add_column(heading, justify="left" if heading in ("fault", "what") else "right")
    for report in reports:
        if report.result is None:
            table.add_row(report.fault, report.title, "failed" if report.failed else "skipped", style="yellow")
            continue
        row = _row(report)
        table.add_row(row[0], report.title, *row[1:4], *row[5:], style=None if report.good else "red")
    console.print(table)
    for report in reports:
        console.print(f"\n[bold]{report.fault}[/bold] {report.title}, {report.took_s:.0f} s", highlight=False)
        if report.result is None:
            console.print(
                f"  {'failed' if report.failed else 'skipped'}: {report.failed or report.skipped}", markup=False
            )
            continue
        for figure in report.result.figures:
            console.print(f"  {_told(figure)}", markup=False, highlight=False)
        for note in report.result.notes:
            console.print(f"  {note}", markup=False, highlight=False)
        _show_verdict(report.result, console)


def _show_verdict(result: Result, console: Console) -> None:
    verdict = result.verdict
    if verdict is None:
        return
    told = (
        f"accepted {verdict.accepted:,}, refused {verdict.refused:,}, unknown {verdict.unknown:,} (of which ran "
        f"{verdict.unknown_ran:,}); runs {verdict.runs:,}, invocations {verdict.invocations:,}, "
        f"leases {verdict.leases:,}, bodies run again {verdict.bodies_again:,}; reads {verdict.reads:,}; "
        f"states {verdict.states}"
    )
    console.print(f"  {told}", markup=False, highlight=False)
    for kind, named in verdict.named.items():
        for text in named[:5]:
            console.print(f"  {kind}: {text}", markup=False, highlight=False)
