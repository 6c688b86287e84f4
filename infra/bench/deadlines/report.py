"""The table: who met how many deadlines, at which load, how late the rest was, and what could have been reached."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from infra.bench.deadlines import oracle
from infra.bench.deadlines.calibration import Coverage
from infra.bench.deadlines.makespans import Gain
from infra.bench.deadlines.policies import Headrace, policies
from infra.bench.deadlines.simulator import met, simulate
from infra.bench.deadlines.traces import Job, Trace, with_deadlines

SLOTS = 8
LOADS = (0.5, 0.8, 0.95, 1.2, 2.0)
TOLD = "told"
ORACLE = "oracle"
BOUND = "bound"
ALL = "all traces"


class Score(Struct, frozen=True):
    """Deadlines met, plain and weighted by value, as shares; seconds late of the middle and of the 99th percentile.

    The lateness of work in time is 0; None for the oracle and the bound, which give late work up.
    """

    plain: float
    weighted: float
    late_p50_s: float | None = None
    late_p99_s: float | None = None


class Row(Struct, frozen=True):
    """The scores of all orders on one trace at one load."""

    trace: str
    load: float
    jobs: int
    scores: dict[str, Score]


class Report(Struct, frozen=True):
    """Everything that is stored."""

    sources: list[str]
    slots: int
    rows: list[Row]
    makespans: dict[str, Gain]
    coverage: dict[str, Coverage]


def _score(jobs: list[Job], ends: list[float]) -> Score:
    held = met(jobs, ends)
    late = sorted(max(0.0, end - job.deadline) for job, end in zip(jobs, ends, strict=True))
    return Score(
        sum(held) / len(jobs),
        sum(job.value for job, one in zip(jobs, held, strict=True) if one) / sum(job.value for job in jobs),
        round(late[len(late) // 2], 3),
        round(late[min(len(late) - 1, len(late) * 99 // 100)], 3),
    )


def row(trace: Trace, load: float, slots: int = SLOTS) -> Row:
    """Return the scores on this trace at this load of so many slots."""
    jobs = with_deadlines(trace, slots=slots, load=load).jobs
    orders = {**policies(slots), TOLD: Headrace(slots, told=True)}
    scores = {name: _score(jobs, simulate(jobs, slots, order)) for name, order in orders.items()}
    ones, values = [1.0] * len(jobs), [job.value for job in jobs]
    plain = sum(oracle.placed(jobs, slots, ones)) / len(jobs)
    found = oracle.placed(jobs, slots, values)
    weighted = sum(value for value, one in zip(values, found, strict=True) if one) / sum(values)
    scores[ORACLE] = Score(
        max(plain, *(score.plain for score in scores.values())),
        max(weighted, *(score.weighted for score in scores.values())),
    )
    # Every schedule is below the bound; what the floating-point sum loses is given back.
    scores[BOUND] = Score(
        max(oracle.bound(jobs, slots, ones), scores[ORACLE].plain),
        max(oracle.bound(jobs, slots, values), scores[ORACLE].weighted),
    )
    return Row(trace.name, load, len(jobs), scores)


def rows(traces: list[Trace]) -> Iterator[Row]:
    """Yield a row for each load and trace, and after each load the mean of the traces, each counting the same."""
    for load in LOADS:
        these = [row(trace, load) for trace in traces]
        yield from these
        scores = {
            name: Score(
                sum(one.scores[name].plain for one in these) / len(these),
                sum(one.scores[name].weighted for one in these) / len(these),
            )
            for name in these[0].scores
        }
        yield Row(ALL, load, sum(one.jobs for one in these), scores)


def _cells(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def markdown(report: Report) -> str:
    """Return the report as text."""
    names = list(report.rows[0].scores)
    lines = ["# Deadlines kept, in simulated time", "", "Written by `make bench-deadlines`.", ""]
    lines += [f"- {source}" for source in report.sources]
    lines += [
        "",
        f"{report.slots} slots, nothing is interrupted. Load is the work of the whole trace over what the slots can do"
        " in its time; within it, bursts are many times as high. Percent of deadlines met: plain / weighted by value.",
        "`told` is Headrace with the true durations: what the order is worth without the errors of forecasts. `oracle`"
        " knows durations and future: the best of a greedy placement by value per second, of `told`, and of all"
        " others. `bound` is what no schedule exceeds (fluid, interruptible work).",
        "",
        _cells(["load", "trace", *names]),
        _cells(["---:", "---", *["---:"] * len(names)]),
    ]
    for one in report.rows:
        cells = [f"{100 * score.plain:.1f} / {100 * score.weighted:.1f}" for score in one.scores.values()]
        lines.append(_cells([f"{one.load}", one.trace, *cells]))
    timed = [name for name in names if report.rows[0].scores[name].late_p50_s is not None]
    lines += ["", "Lateness in seconds, p50 / p99 of all work:", "", _cells(["load", "trace", *timed])]
    lines.append(_cells(["---:", "---", *["---:"] * len(timed)]))
    for one in report.rows:
        if one.trace != ALL:
            cells = [f"{one.scores[name].late_p50_s:,.1f} / {one.scores[name].late_p99_s:,.1f}" for name in timed]
            lines.append(_cells([f"{one.load}", one.trace, *cells]))
    lines += [
        "",
        "Makespans of workflows without deadline, shorter than first in first out by (%). Durations were learned from"
        " an earlier run of the same workflow, as means by category and size of input:",
        "",
    ]
    lines += [_cells(["workflows", "mean", "least", "most"]), _cells(["---", "---:", "---:", "---:"])]
    for what, gain in report.makespans.items():
        lines.append(_cells([what, *(f"{100 * part:.1f}" for part in (gain.mean, gain.least, gain.most))]))
    lines += ["", "What the stated quantiles cover (%), of durations that had a forecast:", ""]
    lines += [_cells(["trace", "forecast", "without", "p50", "p90", "p99"]), _cells(["---", *["---:"] * 5])]
    for what, held in report.coverage.items():
        shares = [f"{100 * share:.1f}" for share in (held.p50, held.p90, held.p99)]
        lines.append(_cells([what, f"{held.stated:,}", f"{held.unknown:,}", *shares]))
    return "\n".join(lines) + "\n"
