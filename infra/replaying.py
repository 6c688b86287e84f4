"""``headrace replay --simulate``: records from the platform or from a file, replayed, and the report in words."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from functions.hindsight import Report, RouteReport, replayed
from functions.policies import policy as checked
from headrace.client import AsyncClient
from headrace.clock import format_instant, parse_duration, parse_instant
from headrace.errors import BadRequest
from headrace.model import Recorded
from headrace.terminal import say

RECORDS_MAX = 2_000_000
COLUMNS = (
    "route",
    "runs",
    "deadlines",
    "met",
    "would be met",
    "gained",
    "lost",
    "headrace",
    "gained",
    "lost",
    "late p50",
    "late p99",
)


async def replay(
    since: str | None,
    until: str | None,
    policy: str,
    *,
    slots: int | None = None,
    save: Path | None = None,
    kept: Path | None = None,
    clock: Callable[[], float] = time.time,
) -> Report:
    """Return what the policy would have made of what was recorded.

    Args:
        since: from when on, as a duration before now or as an instant; not needed with ``kept``.
        until: up to when, likewise; now if it is None.
        policy: its name.
        slots: how many invocations run at a time; as many as did if it is None.
        save: a file to keep the records in.
        kept: a file that an earlier replay kept its records in, in place of the platform.
        clock: the time in epoch seconds.

    Raises:
        BadRequest: an option is not possible, or the file holds no records.
        NotFound: nothing is recorded.
    """
    checked(policy, 1)
    if slots is not None and slots < 1:
        raise BadRequest(f"--slots: {slots} is not possible", hint="Use 1 or more.")
    if since is None and kept is None:
        raise BadRequest("--since is not given", hint="Say --since 24h, or --from FILE for records that were kept.")
    now = clock()
    begin = None if since is None else _instant(since, "--since", now)
    end = None if until is None else _instant(until, "--until", now)
    if begin is not None and (now if end is None else end) <= begin:
        raise BadRequest("--until is not after --since", hint="Choose a span that has a length.")
    records = await _fetched(begin or 0.0, end) if kept is None else _chosen(_read(kept), begin, end)
    if save is not None:
        _keep(records, save)
    return replayed(records, policy, slots)


async def _fetched(since: float, until: float | None) -> list[Recorded]:
    """Return the records of a platform, in the order of its log; say so where the log does not reach back so far."""
    found: list[Recorded] = []
    first = True
    async with AsyncClient() as client:
        async for page in client.history(format_instant(since), None if until is None else format_instant(until)):
            if first and page.kept_since is not None and parse_instant(page.kept_since) > since:
                say(f"the log begins at {page.kept_since}", "Nothing is kept of what was before.")
            first = False
            found += page.invocations
            if len(found) > RECORDS_MAX:
                raise BadRequest(
                    f"more than {RECORDS_MAX:,} invocations ended in that time", hint="Choose a shorter span."
                )
    return found


def _instant(text: str, what: str, now: float) -> float:
    try:
        return now - parse_duration(text)
    except BadRequest:
        pass
    try:
        return parse_instant(text)
    except BadRequest as error:
        raise BadRequest(
            f"{what}: {ascii(text)[:80]} is neither a duration nor an instant",
            hint='Write "24h" for so long ago, or RFC 3339 such as "2026-11-21T03:14:15Z".',
        ) from error


def _chosen(records: list[Recorded], begin: float | None, end: float | None) -> list[Recorded]:
    return [
        one
        for one in records
        if (begin is None or parse_instant(one.stored_at) >= begin)
        and (end is None or parse_instant(one.stored_at) < end)
    ]


def _read(path: Path) -> list[Recorded]:
    try:
        return msgspec.json.Decoder(Recorded).decode_lines(path.read_bytes())
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}", hint="Name a file that --save made.") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path} holds no records: {error}", hint="Name a file that --save made.") from error


def _keep(records: list[Recorded], path: Path) -> None:
    try:
        path.write_bytes(msgspec.json.Encoder().encode_lines(records))
    except OSError as error:
        raise BadRequest(f"{path} cannot be written: {error.strerror}", hint="Name another file.") from error


def as_json(report: Report) -> str:
    """Return the report as JSON."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()


def as_text(report: Report) -> str:
    """Return the report for a person: a table of routes, and what it stands on."""
    rows = [COLUMNS, *(_cells(route) for route in report.routes)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(COLUMNS))]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(
        [
            f"{report.invocations:,} invocations from {report.since} to {report.until} under {report.policy}, "
            f"{report.slots} at a time ({report.slots_seen} were seen at a time).",
            "",
            *lines,
            "",
            "met: what really happened, and the first gained and lost are against that. headrace: met in the same",
            "simulation under headrace, and the second gained and lost are against that. late: in seconds.",
            *_remarks(report),
        ]
    )


def _cells(route: RouteReport) -> tuple[str, ...]:
    return (
        route.route,
        f"{route.runs:,}",
        f"{route.with_deadline:,}",
        f"{route.recorded.met:,}",
        f"{route.simulated.met:,}",
        f"+{route.against_recorded.gained:,}",
        f"-{route.against_recorded.lost:,}",
        f"{route.ours.met:,}",
        f"+{route.against_ours.gained:,}",
        f"-{route.against_ours.lost:,}",
        f"{route.simulated.late_p50_s:,.3f}",
        f"{route.simulated.late_p99_s:,.3f}",
    )


def _remarks(report: Report) -> list[str]:
    said = []
    if report.guessed:
        said.append(f"{report.guessed:,} invocations had been stopped: they are taken to last as long as their like.")
    if report.left_out:
        said.append(f"{report.left_out:,} invocations are left out: they never ran, nor did any of their like.")
    if report.not_judged:
        said.append(f"{report.not_judged:,} runs are not judged: they failed, or are not recorded from start to end.")
    return said
